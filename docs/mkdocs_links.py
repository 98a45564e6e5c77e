"""MkDocs hook: files outside docs/ that pages link to become part of the site, under their path in the repository."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?\)")
"""A relative link: what is before its target, the target, and the anchor."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages of docs/ link to outside of it, and what those files link to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        page = waiting.pop()
        for _, target, _ in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            if path in seen or path.startswith("docs/") or not (ROOT / path).is_file():
                continue
            seen.add(path)
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            if path.endswith(".md"):
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links as they are in the site, where docs/ is the root."""
    start = posixpath.dirname(page.file.src_uri)
    here = posixpath.join("docs", start) if (ROOT / "docs" / page.file.src_uri).is_file() else start

    def rewritten(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, match[2])).removeprefix("docs/")
        return f"{match[1]}{posixpath.relpath(path, start or '.')}{match[3] or ''})"

    return LINK.sub(rewritten, markdown)
