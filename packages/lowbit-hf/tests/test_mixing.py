"""Schemes chosen weight by weight on the command line, against what the files then hold and the models predict."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from lowbit.command import main
from lowbit_hf import load

SIZES = ["--samples", 8, "--seq-len", 16]


@pytest.fixture(scope="module")
def folder(worded):
    """A mixture of experts with a tokenizer of its 96 words."""
    return worded("qwen3-moe", num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    ids = torch.randint(96, (400,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return path


@pytest.fixture
def lowbit(capsys):
    def called(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return called


def stored(folder):
    """Bytes of every projection in the files, and how many values it has."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                module, _, local = name.rpartition(".")
                if module.endswith("_proj"):
                    part = tensors.get_tensor(name)
                    found.setdefault(module, {})[local] = part
    return found


def test_the_files_keep_to_the_budget_and_siblings_are_alike(lowbit, folder, text, tmp_path):
    out, plain = tmp_path / "out", stored(folder)
    line = ["quantize", folder, "--to", "w4a16_g32,W8A16_G32,KEEP", "--calibrate", text, *SIZES, "--device", "cpu"]
    code, said, told = lowbit(*line, "--bits-per-weight", 7, "-o", out)
    assert code == 0, told
    assert told.startswith("chosen: ")
    found = stored(out)
    values = sum(part["weight"].numel() for part in plain.values())
    bits = 8 * sum(t.numel() * t.element_size() for parts in found.values() for t in parts.values())
    assert set(found) == set(plain)
    assert 5 < bits / values <= 7

    def kind(module):
        parts = found[module]
        return (
            "keep" if "weight" in parts else parts["weight_packed"].shape[-1] * 32 // plain[module]["weight"].shape[-1]
        )

    kinds = {module: kind(module) for module in found}
    assert len(set(kinds.values())) > 1
    for layer in range(2):
        attention = {kinds[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv"}
        assert len(attention) == 1
        for pair in (("gate", "up"), ("down",)):
            experts = {
                value
                for module, value in kinds.items()
                if f"layers.{layer}.mlp" in module and module.endswith(tuple(f"{n}_proj" for n in pair))
            }
            assert len(experts) == 1
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == len(set(kinds.values()) - {"keep"})
    assert "bits per weight" in said


def test_a_bound_on_the_divergence(lowbit, folder, text, tmp_path):
    line = ["quantize", folder, "--to", "W4A16_G32,W8A16_G32", "--calibrate", text, *SIZES, "--device", "cpu"]
    code, _, told = lowbit(*line, "--max-kl", 1e-3, "-o", tmp_path / "out")
    assert code == 0, told
    assert float(told.split(" nats a token")[0].rpartition(" ")[2]) <= 1e-3
    ids = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        p, q = (load(f)(ids).logits.double().log_softmax(-1) for f in (folder, tmp_path / "out"))
    # On other text, of the same distribution.
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 1.5e-3
    code, _, told = lowbit(*line, "--max-kl", 1e-12, "-o", tmp_path / "never")
    assert code == 1
    assert "add a candidate that is more precise, or keeps weights as they are" in told
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--to", "W4A16_G32,W8A16_G32"], 2, "one of --bits-per-weight and --max-kl"),
        (["--to", "auto", "--bits-per-weight", "5", "--max-kl", "1"], 2, "one of --bits-per-weight and --max-kl"),
        (["--to", "W8A16_G32", "--bits-per-weight", "5"], 2, "several schemes"),
        (["--to", "W8A16_G32,NOPE", "--bits-per-weight", "5", "--calibrate"], 2, "no scheme is named"),
        (["--to", "W4A16_G32,W8A16_G32", "--bits-per-weight", "5"], 2, "needs a text to choose schemes by"),
        (["--to", "W4A16_G32,W8A16_G32", "--bits-per-weight", "3", "--calibrate"], 1, "are allowed; allow more"),
    ],
)
def test_what_cannot_be_chosen_is_refused(lowbit, folder, text, tmp_path, more, code, words):
    text = [text, *SIZES] if more[-1] == "--calibrate" else []
    found, _, told = lowbit("quantize", folder, *more, *text, "--device", "cpu", "-o", tmp_path / "out")
    assert found == code
    assert words in " ".join(told.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
