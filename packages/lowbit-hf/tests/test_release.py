"""`lowbit release`: the folder that it makes, and what keeps it from making one."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from lowbit.shards import Checkpoint
from lowbit_hf import load
from lowbit_hf.commands import releasing
from lowbit_hf.commands.evaluating import token_ids
from lowbit_hf.evaluate import evaluate
from lowbit_hf.quantize import prepare, run
from lowbit_hf.release.card import bench_lines, serve_line, speeds_of
from lowbit_hf.release.rehearsal import rehearsed
from lowbit_hf.schemes import scheme
from lowbit_hf.verify.readers import ByCompressedTensors

CARD = "---\nlicense: mit\nlanguage: en\nwidget: []\n---\n# The original\n"
SPEED = {"output_throughput": 1234.5, "median_ttft_ms": 6.5, "backend": "vllm"}


@pytest.fixture
def source(worded, change):
    """`source(kind)`: a model with a card."""

    def of(kind="llama", card=CARD):
        folder = change(worded(kind))
        # As a release has them.
        for name, content in {"README.md": card, "BASE_README.md": "older", "SHA256SUMS": "0  x\n"}.items():
            (folder / name).write_text(content)
        return folder

    return of


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i * 7 % 94 + 2}" for i in range(400)))
    return path


@pytest.fixture
def release(command, text, tmp_path, monkeypatch):
    """`release(folder, ...)`: the command on it, to tmp_path / "out"."""

    def called(folder, *more, to="W4AFP8"):
        line = ["release", folder, "--to", to, "--calibrate", text, "--samples", 4, "--seq-len", 16, "--text", text]
        line += ["-o", tmp_path / "out", "--device", "cpu", *more]
        monkeypatch.setattr("sys.argv", ["lowbit", *map(str, line)])
        return command(*line)

    return called


def test_a_release(release, source, text, tmp_path, command):
    folder, out, speed = source(), tmp_path / "out", tmp_path / "serve.json"
    speed.write_text(json.dumps(SPEED))
    code, said, _ = release(folder, "--gpu", "h100", "--bench", speed)
    assert code == 0, said
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in out.iterdir()} - {"SHA256SUMS"}
    assert all(sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())
    assert (out / "BASE_README.md").read_text() == CARD

    # What `lowbit quantize` makes of it, to the byte.
    line = ["quantize", folder, "--to", "W4AFP8", "--algorithm", "gptq", "--calibrate", text]
    assert command(*line, "--samples", 4, "--seq-len", 16, "-o", tmp_path / "same")[0] == 0
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "same" / name).read_bytes()

    card = (out / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert front.splitlines() == [
        *("language: en", "library_name: transformers", "license: mit"),
        *("tags:", "- lowbit", "- compressed-tensors", "- W4AFP8"),
    ]
    ids, base = token_ids(folder, text, None), load(folder)
    original, released = evaluate(base, ids, context=32), evaluate(load(out), ids, context=32, base=base)
    ratio = released.perplexity / original.perplexity - 1
    assert f"| original | {original.perplexity:.4f} |" in body
    assert f"| W4AFP8 | {released.perplexity:.4f} ({ratio:+.2%}) | {released.kl:.5f} | {released.top1:.2%} |" in body
    assert "```bash\nvllm serve out\n```" in body
    assert "--random-input-len 23 --random-output-len 8" in body
    assert "Measured (serve.json):\n\n| what | value |" in body
    assert "| output tokens/s | 1,234 |\n| time to first token, median, ms | 6.5 |" in body
    assert "compressed-tensors 0" in body
    assert body.count("of all 14 quantized weights") == 2
    for path in (folder / "model.safetensors", folder / "README.md", text):
        assert f"| `{path.name}` | {path.stat().st_size:,} | `{sha256(path.read_bytes()).hexdigest()}` |" in body
    assert str(tmp_path) not in card + (out / "report.json").read_text()
    # Again: it is there.
    code, _, told = release(folder, "--gpu", "h100", "--bench", speed)
    assert (code, "exists" in told) == (1, True)


def test_what_vllm_would_refuse_is_told_first(release, source, tmp_path, monkeypatch):
    monkeypatch.setattr(releasing, "carry_out", None)
    code, said, _ = release(source(), "--tp", 2)
    assert code == 1
    assert "K / 2 GPUs = 64 is no multiple of 128" in said
    assert "nothing was done" in said
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize("name", ["W4AFP8", "W8A8", "W4A16_ASYM", "MXFP4A16", "NVFP4A16"])
def test_the_rehearsal_is_what_comes(make, tmp_path, name):
    job = prepare(make("llama", shard="100KB"), scheme(name), mode="even")
    run(job, tmp_path / "out")
    with rehearsed(job) as folder, Checkpoint.open(folder) as planned, Checkpoint.open(tmp_path / "out") as real:
        assert {n: (e.dtype, e.shape) for n, e in planned.entries.items()} == {
            n: (e.dtype, e.shape) for n, e in real.entries.items()
        }
        for file in ("config.json", "model.safetensors.index.json"):
            assert json.loads((folder / file).read_text()) == json.loads((tmp_path / "out" / file).read_text())
        for entry in planned.entries.values():
            if entry.name.endswith("weight_shape"):
                assert torch.equal(planned.read(entry), real.read(real.entries[entry.name]))


def test_scales_of_a_cache_are_rehearsed_and_released(release, source, tmp_path):
    code, said, _ = release(source(), "--kv-cache", "fp8", to="W4A16")
    assert code == 0, said
    with Checkpoint.open(tmp_path / "out") as checkpoint:
        assert sum(name.endswith((".k_scale", ".v_scale")) for name in checkpoint.entries) == 4
    assert "k_scale" not in said


def test_a_stopped_release_goes_on(release, source, tmp_path, monkeypatch):
    folder = source()
    with monkeypatch.context() as patch:
        patch.setattr(releasing, "_measured", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert release(folder)[0] == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(releasing, "carry_out", None)
    assert release(folder)[0] == 0
    assert (tmp_path / "out/SHA256SUMS").exists()


def test_a_reader_that_differs_stops_it(release, source, tmp_path, monkeypatch):
    read = ByCompressedTensors.read
    monkeypatch.setattr(ByCompressedTensors, "read", lambda *given: read(*given) * 2)
    code, said, _ = release(source())
    assert code == 1
    assert "14 of 14 DIFFER" in said
    assert "not released; what was made is in" in said
    assert not (tmp_path / "out").exists()


def test_uploading(release, source, monkeypatch):
    calls = []
    folder = source()
    assert release(folder, "--push-to-hub", "me/model")[0] == 2
    assert release(folder, "--push-to-hub", "model", "--yes")[0] == 2
    monkeypatch.setattr(HfApi, "whoami", lambda *_: (_ for _ in ()).throw(LocalTokenNotFoundError("no token")))
    code, _, told = release(folder, "--push-to-hub", "me/model", "--yes")
    assert (code, "log in first: hf auth login" in told) == (1, True)
    monkeypatch.setattr(HfApi, "whoami", lambda *_: {})
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **options: calls.append(options))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **options: calls.append(options) or "there")
    code, said, _ = release(folder, "--push-to-hub", "me/model", "--yes", "--private")
    assert (code, "uploaded: there" in said, "vllm serve me/model" in said) == (0, True, True)
    assert calls[0] == {"private": True, "exist_ok": True}
    assert calls[1]["repo_id"] == "me/model"
    assert (calls[1]["folder_path"] / "SHA256SUMS").exists()


@pytest.mark.parametrize(
    ("content", "words"), [("[1]", "holds none of what"), ("{", "cannot be read as JSON"), ('{"a": 1}', "holds none")]
)
def test_speeds_that_are_none(release, source, tmp_path, content, words):
    path = tmp_path / "speed.json"
    path.write_text(content)
    code, _, told = release(source(), "--bench", path)
    assert (code, words in told) == (1, True)
    assert not (tmp_path / "out").exists()


def test_a_card_that_cannot_be_read(release, source):
    code, _, told = release(source(card="---\nlicense: [\n---\n"))
    assert (code, "the front matter of" in told) == (1, True)


def test_lines_fit_the_context():
    assert "--input-len 1024 --output-len 256" in bench_lines("m", 1, 40960)[1]
    assert "--input-len 191 --output-len 64" in bench_lines("m", 1, 256)[2]
    assert serve_line("m", 4) == "vllm serve m --tensor-parallel-size 4"


def test_speeds(tmp_path):
    path = tmp_path / "latency.json"
    path.write_text(json.dumps({"avg_latency": 0.25, "latencies": [0.25]}))
    assert speeds_of(path) == {"time for a batch, mean, s": 0.25}
