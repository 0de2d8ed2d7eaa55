"""Where a model is: a local folder, or a repository of the Hugging Face hub that is downloaded first."""

from __future__ import annotations

import re
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.header import quote
from lowbit_hf.gguf.source import is_gguf, locate

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Weights in pickles are never downloaded, let alone loaded.
_WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.tiktoken", "LICENSE*")


def find_model(model: str) -> Path:
    """The local folder of `model`, or its GGUF file.

    Raises:
        CheckpointError: there is no such folder, and no such repository can be downloaded; or it holds several models.
    """
    try:
        folder = locate(Path(model))
    except OSError as error:
        raise CheckpointError(f"{quote(model)} cannot be looked for: {error.strerror}") from error
    if folder.is_dir() or (folder.exists() and is_gguf(folder)):
        return folder
    if folder.exists():
        msg = (
            f"{model} is a file; MODEL must be a Hugging Face folder (config.json and safetensors), a .gguf or a hub id"
        )
        raise CheckpointError(msg)
    if not _REPOSITORY.fullmatch(model) or model.startswith("."):
        msg = f"there is no folder {model}; MODEL must be a Hugging Face folder, or a hub id such as Qwen/Qwen3-0.6B"
        raise CheckpointError(msg)
    # Imported late: the hub client is slow to import, and most models are local.
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, allow_patterns=list(_WANTED)))
    except Exception as error:
        msg = f"there is no folder {model}, and the hub gave no repository of that name: {error}"
        raise CheckpointError(msg) from error
