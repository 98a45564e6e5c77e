"""Checkpoints by name on a hub of models: `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION` stands for a repository there.

The hub is Hugging Face's, or the one whose address HF_ENDPOINT holds. Its client keeps what was downloaded, and has
the token of whoever is logged in (`hf auth login`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mam2.engine.errors import UserError

PREFIX = "hub:"
FILES = ["*.json", "*.safetensors", "*.bin", "*.md"]
"""What is downloaded of a repository."""


def is_hub_name(path: str | Path) -> bool:
    """Whether a path is a name on the hub."""
    return str(path).startswith(PREFIX)


def local_path(path: str | Path) -> Path:
    """The path, or for a name on the hub the folder that it is downloaded to. Raises UserError where that fails."""
    return _download(str(path)) if is_hub_name(path) else Path(path)


@functools.cache
def _download(name: str) -> Path:
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    _check_name(repository, name)
    with _told(f"{name}: cannot be downloaded"):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repository, revision=revision or None, endpoint=_endpoint(), allow_patterns=FILES)
    return Path(folder)


def check_push(repository: str) -> None:
    """Raises UserError where a name is none, or the hub's client is not installed."""
    _check_name(repository, f"--push {repository}")
    with _told(f"--push {repository}"):
        import huggingface_hub  # noqa: F401


def push(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Uploads a folder as one commit of a repository, which is made where it is missing. Returns its address.

    private: of a repository that is made. Raises UserError where the hub refuses it or cannot be reached.
    """
    with _told(f"--push {repository}: cannot be uploaded"):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=_endpoint())
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    return str(address)


def _check_name(repository: str, argument: str) -> None:
    owner, _, name = repository.partition("/")
    if not owner or not name or "/" in name:
        raise UserError(f"{argument}: expected OWNER/NAME, the name of a repository on the hub")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what the hub's client raises into a UserError of one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{what}: needs {error.name} (pip install 'mam2[hub]')") from None
    except Exception as error:
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        known = (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError)
        if not (isinstance(error, known) or type(error).__module__.startswith(("httpx", "requests"))):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{what}: {reason}") from error
