"""Uploading an exported folder to the Hugging Face hub, only when asked to: `tailorpo export --push-to-hub`.

A repository that does not exist yet is created private: an upload is easily made public, and never taken back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from tailorpo import __version__
from tailorpo.errors import TailorpoError, UserError


class Hub(Protocol):
    """What is needed of `huggingface_hub.HfApi`."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make a repository, unless it is there already."""
        ...

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        """Add a folder's files to it in one commit."""
        ...


def connect(repo_id: str) -> Hub:
    """The hub under the user's token; nothing is sent yet.

    Raises:
        UserError: `repo_id` is not of the form owner/name, or there is no token.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: {error}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"--push-to-hub: got {repo_id}, expected owner/name")
    token = get_token()
    if token is None:
        raise UserError(
            "--push-to-hub: there is no token for the Hugging Face hub. Make one with write access at"
            " https://huggingface.co/settings/tokens, then `hf auth login`, or put it into HF_TOKEN"
        )
    return HfApi(token=token)


def push(folder: Path, repo_id: str, hub: Hub) -> str:
    """Upload a folder and return the address of the repository.

    Raises:
        TailorpoError: the hub or the network refused; the folder stays as it is.
    """
    try:
        hub.create_repo(repo_id, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repo_id, folder_path=str(folder), commit_message=f"Exported by tailorpo {__version__}"
        )
    except Exception as error:  # the hub's, httpx's and the system's own; whatever it was, the export is on the disk
        raise TailorpoError(
            f"the upload to {repo_id} failed ({error}). The export is in {folder}; once the cause is mended,"
            f" `hf upload {repo_id} {folder}` sends it"
        ) from error
    return f"https://huggingface.co/{repo_id}"
