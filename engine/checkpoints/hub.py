"""Checkpoints on a model hub: `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION` names a repository there.

The hub is Hugging Face's, or that of the address in HF_ENDPOINT. Its client caches downloads, and uses the token of the
logged-in user (`hf auth login`).
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
"""Files to download from a repository."""


def is_hub_name(path: str | Path) -> bool:
    """Returns whether a path is a name on the hub."""
    return str(path).startswith(PREFIX)


def local_path(path: str | Path) -> Path:
    """Returns the path, or for a name on the hub the folder of its download. Raises UserError if that fails."""
    return _download(str(path)) if is_hub_name(path) else Path(path)


@functools.cache
def _download(name: str) -> Path:
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    _check_name(repository, name)
    with _as_user_error(f"{name}: cannot be downloaded"):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repository, revision=revision or None, endpoint=_endpoint(), allow_patterns=FILES)
    return Path(folder)


def check_push(repository: str) -> None:
    """Raises UserError if a name is invalid, or the hub's client is not installed."""
    _check_name(repository, f"--push {repository}")
    with _as_user_error(f"--push {repository}"):
        import huggingface_hub  # noqa: F401


def push(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Uploads a folder as one commit to a repository, which is created if missing. Returns its address.

    private: visibility of a new repository. Raises UserError if the hub refuses it or cannot be reached.
    """
    with _as_user_error(f"--push {repository}: cannot be uploaded"):
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
def _as_user_error(what: str) -> Iterator[None]:
    """Converts exceptions of the hub's client to a UserError of one line."""
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
