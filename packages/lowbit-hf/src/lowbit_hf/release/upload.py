"""Uploading a release to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from lowbit.errors import CheckpointError
from lowbit.table import size


class Upload:
    """A repository of the hub that a release goes to."""

    def __init__(self, repository: str, *, private: bool) -> None:
        """Make sure beforehand that it can.

        Raises:
            CheckpointError: nobody is logged in to the hub, or it cannot be reached.
        """
        self._repository, self._private, self._hub = repository, private, HfApi()
        try:
            self._hub.whoami()
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            raise CheckpointError(f"cannot upload to {repository}: {error}; log in first: hf auth login") from error

    def told(self, folder: Path) -> str:
        """What would go where."""
        nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return f"{size(nbytes)} to the {'private' if self._private else 'public'} repository {self._repository}"

    def send(self, folder: Path) -> str:
        """Upload a folder; where it went.

        Raises:
            CheckpointError: it failed; the folder is as it was.
        """
        try:
            self._hub.create_repo(self._repository, private=self._private, exist_ok=True)
            found = self._hub.upload_folder(folder_path=folder, repo_id=self._repository, commit_message="Release")
        except (HfHubHTTPError, OSError) as error:
            msg = f"{folder} is whole, but was not uploaded: {error}; try again: hf upload {self._repository} {folder}"
            raise CheckpointError(msg) from error
        return str(found)
