"""`lowbit quantize`: where its output goes, and what stopped runs leave."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from folders import Q, config, job_of, leftovers, tree

from lowbit import header
from lowbit.errors import CheckpointError
from lowbit.shards import Checkpoint
from lowbit_hf import writing as module
from lowbit_hf.convert import convert
from lowbit_hf.layouts import WRITERS
from lowbit_hf.quantize import run


@pytest.mark.parametrize("place", ["itself", "inside", "around", "a link to it"])
def test_output_and_input_lie_apart(make, change, tmp_path, place):
    folder = change(make("llama"))
    before = tree(folder)
    (tmp_path / "link").symlink_to(folder)
    out = {"itself": folder, "inside": folder / "out", "around": tmp_path, "a link to it": tmp_path / "link"}[place]
    with pytest.raises(CheckpointError, match="lie in one another"):
        run(job_of(folder), out, overwrite=True)
    assert tree(folder) == before


def test_output_that_exists(make, tmp_path):
    out = tmp_path / "out"
    run(job_of(make("llama"), "W8A8"), out)
    before = tree(out)
    with pytest.raises(CheckpointError, match="exists; pass --overwrite"):
        run(job_of(make("llama")), out)
    assert tree(out) == before
    run(job_of(make("llama")), out, overwrite=True)
    assert config(out)["format"] == "pack-quantized"
    assert leftovers(tmp_path) == ["out"]


def test_a_folder_that_is_no_model_is_never_replaced(make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("all my work")
    with pytest.raises(CheckpointError, match="is no model folder"):
        run(job_of(make("llama")), out, overwrite=True)
    assert tree(out) == {"thesis.tex": b"all my work"}
    assert leftovers(tmp_path) == ["out"]


class Stopped(Exception):
    """Stands for a kill."""


def stop_after(count):
    def advance(nbytes):
        nonlocal count
        count -= nbytes
        if count < 0:
            raise Stopped

    return advance


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("name", ["W4A16_G32", "NVFP4A16"])
def test_a_stopped_run_continues(make, tmp_path, monkeypatch, kind, name):
    folder, out = make(kind, shard="300KB"), tmp_path / "out"
    run(job_of(folder, name), tmp_path / "whole")
    monkeypatch.setattr("lowbit.journal.SYNC_BYTES", 0)
    size = job_of(folder, name).checkpoint.nbytes
    for part in (0.2, 0.5, 0.9):
        with pytest.raises(Stopped):
            run(job_of(folder, name), out, advance=stop_after(int(size * part)))
        assert not out.exists()
    worked = []
    write = module._write_weight
    monkeypatch.setattr(
        module,
        "_write_weight",
        lambda job, writer, entry, *rest: worked.append(entry) or write(job, writer, entry, *rest),
    )
    told = []
    run(job_of(folder, name), out, advance=told.append)
    assert tree(out) == tree(tmp_path / "whole")
    assert 0 < len(worked) < len(job_of(folder, name).schemes) / 2
    assert sum(told) == size  # progress counts what was there already
    assert leftovers(tmp_path) == ["out"]


def test_the_old_output_is_kept_until_the_new_one_is_whole(make, tmp_path):
    folder, out = make("llama"), tmp_path / "out"
    run(job_of(folder, "W8A8"), out)
    before = tree(out)
    with pytest.raises(Stopped):
        run(job_of(folder), out, overwrite=True, advance=stop_after(100_000))
    assert tree(out) == before
    run(job_of(folder), out, overwrite=True)
    assert config(out)["format"] == "pack-quantized"


def test_another_run_s_beginnings_are_not_mixed_in(make, change, tmp_path):
    folder, out = change(make("llama")), tmp_path / "out"
    with pytest.raises(Stopped):
        run(job_of(folder), out, command="lowbit quantize this", advance=stop_after(100_000))
    others = [job_of(folder, "W8A8"), job_of(folder, keep=[Q]), job_of(folder, "W4A16_G32", mode="floor")]
    config_file = folder / "config.json"
    config_file.write_text(config_file.read_text().replace('"hidden_act"', '"note": 1, "hidden_act"'))
    for other in [*others, job_of(folder)]:
        with pytest.raises(CheckpointError, match="unfinished output of another run: lowbit quantize this"):
            run(other, out)
    run(others[0], out, overwrite=True)
    assert config(out)["format"] == "int-quantized"
    assert leftovers(tmp_path) == ["out"]


def test_files_say_what_wrote_them(make, quantize, tmp_path):
    out = quantize(make("llama"), "W4A16_G32")
    convert(out, tmp_path / "gptq", WRITERS["gptq"])
    convert(out, tmp_path / "plain", None)
    for folder in (out, tmp_path / "gptq", tmp_path / "plain"):
        with Checkpoint.open(folder) as checkpoint:
            assert checkpoint.metadata == {"format": "pt", "written_by": f"lowbit-hf {version('lowbit-hf')}"}


def test_another_version_s_beginnings_are_not_mixed_in(make, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        run(job_of(make("llama")), out, advance=stop_after(100_000))
    monkeypatch.setattr(header, "_version", lambda name: "0.1.9")
    with pytest.raises(CheckpointError, match="with the lowbit and the input that it began with"):
        run(job_of(make("llama")), out)


def test_too_little_space_leaves_nothing(make, tmp_path, monkeypatch):
    free = module.Staging.require_space
    monkeypatch.setattr(module.Staging, "require_space", lambda self, nbytes: free(self, nbytes + (1 << 60)))
    with pytest.raises(CheckpointError, match="needs .* bytes and holds 0 of them, but its disk has only"):
        run(job_of(make("llama")), tmp_path / "out")
    assert leftovers(tmp_path) == []
