"""Stacks of experts on disk: quantized a matrix at a time, and stacks again for the model and for plain folders."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError, RecipeError
from lowbit.numerics import choose_scale, decode, encode
from lowbit_algos import Method
from lowbit_hf.convert import convert
from lowbit_hf.difference import compare
from lowbit_hf.layout import to_compressed
from lowbit_hf.layouts import WRITERS
from lowbit_hf.lint import lint
from lowbit_hf.loading import load
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import scheme
from lowbit_hf.verify.checking import compare as read_by_others

KINDS = ["gpt-oss", "llama4", "qwen3-next"]


@dataclass(frozen=True)
class Windows:
    """Calibration tokens for models that have no tokenizer."""

    length = 32

    def windows(self, folder):
        return torch.randint(2, 96, (16, 32), generator=torch.Generator().manual_seed(5))

    def fingerprint(self):
        return "windows"

    def described(self):
        return {"samples": 16}


@pytest.fixture(scope="module")
def stacked(make, tmp_path_factory):
    """`stacked(kind)`: a random model whose experts lie on disk as the model keeps them, and its tensors."""
    made = {}

    def of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("stacked") / kind
            shutil.copytree(make(kind), folder)
            model = load(folder)
            state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if "experts" in name}
            plain = load_file(folder / "model.safetensors")
            plain = {n: t for n, t in plain.items() if ".experts." not in n} | {
                n: t.clone() for n, t in state.items() if ".experts." in n
            }
            save_file(plain, folder / "model.safetensors", {"format": "pt"})
            made[kind] = folder, plain
        return made[kind]

    return of


def matrices(kind, plain):
    """Every expert's matrix (N, K) by its name, cut out of the stacks as the models' own code uses them."""
    found = {}
    for name, stack in plain.items():
        module, _, last = name.rpartition(".")
        if not module.endswith(".experts") or stack.dim() != 3:
            continue
        for e, slab in enumerate(stack):
            rows = slab if kind == "qwen3-next" else slab.T
            if last == "down_proj":
                found[f"{module}.{e}.down_proj"] = rows
            elif kind == "gpt-oss":
                found[f"{module}.{e}.gate_proj"], found[f"{module}.{e}.up_proj"] = rows[0::2], rows[1::2]
            else:
                found[f"{module}.{e}.gate_proj"], found[f"{module}.{e}.up_proj"] = rows.chunk(2)
    return found


def made_of(folder, out, name, **options):
    job = prepare(folder, scheme(name), mode="even", **options)
    return run(job, out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["W8A8", "W4A16_ASYM_G32", "MXFP4A16", "NVFP4A16"])
def test_every_expert_is_rounded_by_itself_and_made_plain_again(stacked, kind, name, tmp_path):
    folder, plain = stacked(kind)
    account = made_of(folder, tmp_path / "out", name)
    written, entry, dtype = load_file(tmp_path / "out" / "model.safetensors"), scheme(name), torch.bfloat16
    fmt, expected, values = entry.weight_format(dtype), {}, {}
    cut = matrices(kind, plain)
    for module, weight in cut.items():
        x, amax = weight.contiguous(), None
        if fmt.tensor_scale:  # gate and up share one
            both = [cut.get(module.replace(a, b)) for a, b in (("up_proj", "gate_proj"), ("gate_proj", "up_proj"))]
            amax = choose_scale(torch.cat([x, *(w for w in both if w.shape == x.shape)]), fmt).tensor_scale
        scales = choose_scale(x, fmt, tensor_scale=amax)
        data = encode(x, fmt, scales)
        parts = to_compressed(entry, data, scales, tuple(x.shape))
        expected |= {f"{module}.{local}": part for local, part in parts.items()}
        values[module] = decode(data, fmt, scales, x.shape[1], dtype)
    for tensor, part in expected.items():
        assert torch.equal(written[tensor].view(torch.uint8), part.view(torch.uint8)), tensor
    # Nothing else became of stacks, and nothing of what lies beside them, biases among it.
    assert {n for n in written if ".experts." in n and n not in plain} == set(expected)
    for stack in (n for n, t in plain.items() if ".experts." in n and t.dim() == 3):
        assert set(account.tensors[stack]) <= set(expected)
    convert(tmp_path / "out", tmp_path / "plain", None)
    again = load_file(tmp_path / "plain" / "model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in again.items()} == {n: (t.shape, t.dtype) for n, t in plain.items()}
    for module, matrix in matrices(kind, again).items():
        assert torch.equal(matrix, values[module]), module
    ids = torch.arange(2, 34).view(1, -1)
    if entry.activation is None:
        architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
        stock = getattr(transformers, architecture).from_pretrained(tmp_path / "plain").eval()
        with torch.inference_mode():
            ours, theirs = load(tmp_path / "out")(ids).logits.float(), stock(ids).logits.float()
        # Sums in another order, in bfloat16.
        assert (ours - theirs).norm() <= 2**-5 * theirs.norm()
        with torch.inference_mode():
            assert torch.equal(ours, load(tmp_path / "plain")(ids).logits.float())


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_experts_are_those_of_the_model_and_continue_after_a_kill(stacked, kind, tmp_path):
    """The experts in the files are those that the model keeps as a stack, and GPTQ loses less than rounding does."""
    folder, plain = stacked(kind)
    options = {"calibration": Windows(), "method": Method()}
    made_of(folder, tmp_path / "out", "W4A16_G32", **options)
    job = prepare(folder, scheme("W4A16_G32"), mode="even", **options)

    def die(count):
        nonlocal left
        left -= count
        if left < 0:
            raise KeyboardInterrupt

    left = sum(t.nbytes for t in plain.values()) * 3 // 4
    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "killed", advance=die)
    run(job, tmp_path / "killed")
    name = "model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    convert(tmp_path / "out", tmp_path / "plain", None)
    again, cut = load_file(tmp_path / "plain" / name), matrices(kind, plain)
    fmt = scheme("W4A16_G32").weight_format(torch.bfloat16)
    for module, matrix in matrices(kind, again).items():
        x = cut[module].float()
        scales = choose_scale(x, fmt)
        nearest = decode(encode(x, fmt, scales), fmt, scales, x.shape[1], torch.float32)
        # GPTQ moves weights away from the nearest code, by little, and chooses scales, which may gain less: a row that
        # lies elsewhere would be off by sqrt(2).
        assert 0.9 * (nearest - x).norm() < (matrix.float() - x).norm() < 0.5 * x.norm(), module


def test_a_killed_run_continues_within_a_stack(stacked, tmp_path):
    folder, plain = stacked("gpt-oss")
    made_of(folder, tmp_path / "out", "W4A16_G32")
    job, done = prepare(folder, scheme("W4A16_G32"), mode="even"), 0

    def die(count):
        nonlocal done
        done += count
        if done > sum(t.nbytes for t in plain.values()) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "killed", advance=die)
    run(job, tmp_path / "killed")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_rules_speak_of_stacks_and_of_experts(stacked, tmp_path):
    folder, plain = stacked("gpt-oss")
    first, second = (f"model.layers.{i}.mlp.experts" for i in range(2))

    def left(*keep):
        schemes = prepare(folder, scheme("W4A16_G32"), keep=keep, mode="even").schemes
        return {n.removesuffix(".weight") for n in matrices_named if n not in schemes}

    matrices_named = {f"{module}.weight" for module in matrices("gpt-oss", plain)}
    halves = {f"{first}.{e}.{p}" for e in range(4) for p in ("gate_proj", "up_proj")}
    assert left(f"{first}.gate_up_proj") == halves
    assert left(f"{first}.2.*") == {f"{first}.2.{p}" for p in ("gate_proj", "up_proj", "down_proj")}
    assert left("*.down_proj") == {f"{s}.{e}.down_proj" for s in (first, second) for e in range(4)}
    # A stack of which all stays, stays a stack, and engines are told by the names of what it holds.
    account = made_of(folder, tmp_path / "out", "W4A16_G32", keep=[f"{first}.gate_up_proj"])
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[f"{first}.gate_up_proj"], plain[f"{first}.gate_up_proj"])
    assert account.tensors[f"{first}.gate_up_proj"] == (f"{first}.gate_up_proj",)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    (pattern,) = [entry for entry in ignored if entry.startswith("re:")]
    found = {module for module in matrices("gpt-oss", plain) if re.match(pattern.removeprefix("re:"), module)}
    assert found == halves
    # One that is kept by itself is a matrix of its own.
    made_of(folder, tmp_path / "one", "W4A16_G32", keep=[f"{first}.2.up_proj"])
    kept = load_file(tmp_path / "one" / "model.safetensors")[f"{first}.2.up_proj.weight"]
    assert torch.equal(kept, matrices("gpt-oss", plain)[f"{first}.2.up_proj"])
    convert(tmp_path / "one", tmp_path / "plain", None)
    again = load_file(tmp_path / "plain" / "model.safetensors")
    assert torch.equal(matrices("gpt-oss", again)[f"{first}.2.up_proj"], kept)


def test_blocks_of_rows_do_not_fit_rows_in_turn(make):
    folder = make("gpt-oss", intermediate_size=128)
    with pytest.raises(RecipeError, match="FP8_BLOCK has one scale for 128 rows, and the model keeps gate and up"):
        prepare(folder, scheme("FP8_BLOCK"), mode="even")


@pytest.mark.parametrize("kind", KINDS)
def test_other_commands_read_them(stacked, kind, tmp_path):
    folder, plain = stacked(kind)
    made_of(folder, tmp_path / "out", "W4A16_G32")
    cut = matrices(kind, plain)
    for sides in ((folder, tmp_path / "out"), (tmp_path / "out", folder)):
        found = compare(*sides)
        assert not found.only_a
        assert not found.only_b
        named = {d.name.removesuffix(".weight"): d for d in found.differences}
        assert cut.keys() <= named.keys()
        assert all(12 < named[module].sqnr < 30 for module in cut)
    readings = {r.reader.split()[0]: r for r in read_by_others(tmp_path / "out")}
    assert readings["compressed-tensors"].weights >= len(cut)
    assert not any(r.unequal for r in readings.values())
    alone = kind != "qwen3-next"  # transformers stacks its experts itself
    assert ("stacks alone" in (readings["transformers"].refused or "")) == alone
    loads = {v.runtime: v.loads for v in lint(tmp_path / "out").verdicts}
    assert loads == {"vllm": kind != "gpt-oss", "sglang": kind != "gpt-oss", "transformers": not alone}
    convert(tmp_path / "out", tmp_path / "gptq", WRITERS["gptq"])
    ids = torch.arange(2, 34).view(1, -1)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "gptq")(ids).logits, load(tmp_path / "out")(ids).logits)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_lowbits_layout_and_transformers(stacked, kind, tmp_path):
    """transformers joins experts by our conversion, and saves stacks."""
    folder, _ = stacked(kind)
    made_of(folder, tmp_path / "own", "W4A16_G32", layout="lowbit")
    ids = torch.arange(2, 34).view(1, -1)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        logits = load(tmp_path / "own")(ids).logits
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(load(tmp_path / "saved")(ids).logits, logits)


def test_notes_that_are_none_are_refused(stacked, tmp_path):
    folder, _ = stacked("qwen3-next")
    made_of(folder, tmp_path / "out", "W4A16_G32")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt", "stacks": '{"a": 1}'})
    with pytest.raises(CheckpointError, match="no object of names and booleans"):
        convert(tmp_path / "out", tmp_path / "plain", None)
