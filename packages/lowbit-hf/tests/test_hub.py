from __future__ import annotations

import huggingface_hub
import pytest

from lowbit.errors import CheckpointError
from lowbit_hf.hub import find_model


@pytest.fixture(autouse=True)
def downloads(monkeypatch, tmp_path):
    """What was asked of the hub, which has one repository."""
    asked = []

    def download(repository, *, allow_patterns):
        asked.append((repository, tuple(allow_patterns)))
        if repository != "someone/model-1.5_x":
            raise huggingface_hub.errors.LocalEntryNotFoundError("404 Not Found")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_local_folders_go_before_the_hub(downloads, tmp_path, monkeypatch):
    (tmp_path / "someone/model-1.5_x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("someone/model-1.5_x", str(tmp_path / "someone"), ".", "someone/../someone"):
        assert find_model(name).resolve() == (tmp_path / name).resolve()
    assert not downloads


def test_a_repository(downloads, tmp_path):
    assert find_model("someone/model-1.5_x") == tmp_path / "cache"
    ((_, patterns),) = downloads
    assert "*.safetensors" in patterns
    assert "LICENSE*" in patterns
    assert not [p for p in patterns if p.endswith((".bin", ".pt", ".py"))]  # nothing that runs code


@pytest.mark.parametrize(
    "name", ["nothing", "./some/model", "../model", "/some/model", "a/b/c", "a b/c", "a/b@main", "https://x/y"]
)
def test_names_that_are_no_repository(downloads, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no folder .*; MODEL must be a Hugging Face folder"):
        find_model(name)
    assert not downloads


def test_a_repository_that_is_not_there():
    with pytest.raises(
        CheckpointError, match="there is no folder no/such, and the hub gave no repository of that name: 404"
    ):
        find_model("no/such")


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; MODEL must be a Hugging Face folder"):
        find_model(str(tmp_path / "model.safetensors"))
