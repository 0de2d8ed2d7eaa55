from __future__ import annotations

from math import inf, isnan, log10

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowbit.errors import CheckpointError
from lowbit.tensor import QuantizedTensor
from lowbit_hf.difference import Weights, compare
from lowbit_hf.loading import load
from lowbit_hf.schemes import scheme

Q = "model.layers.0.self_attn.q_proj"


def by_name(folder):
    """Every tensor of the model, by its name in model and file, in float64."""
    return {
        name: (p.dequantize(torch.float32) if isinstance(p, QuantizedTensor) else p.detach()).double().numpy()
        for name, p in load(folder).named_parameters()
    }


@pytest.mark.parametrize("name", ["W8A8", "W3A16_G32", "W4A16_ASYM_G32", "FP8_DYNAMIC", "MXFP6A16", "NVFP4A16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sqnr_in_float64(make, quantize, kind, name):
    folder = make(kind)
    out = quantize(folder, name)
    plain, rounded = by_name(folder), by_name(out)
    found = compare(folder, out)
    assert {d.name for d in found.differences} == set(plain)
    assert (found.only_a, found.only_b) == ((), ())
    for difference in found.differences:
        a, b = plain[difference.name], rounded[difference.name]
        noise = float(((a - b) ** 2).sum())
        assert difference.shape == a.shape
        assert difference.largest == np.abs(a - b).max()
        assert difference.stored_a == "bfloat16"
        if noise == 0:
            assert (difference.sqnr, difference.stored_b) == (inf, "bfloat16")
        else:
            assert difference.sqnr == pytest.approx(10 * log10(float((a**2).sum()) / noise))
            assert difference.stored_b == str(scheme(name).weight)


def test_square_weights_of_conv1d_are_not_compared_askew(make, quantize):
    folder = make("gpt2")  # c_proj is 128 x 128, and files of quantized models hold it the other way round
    found = {
        d.name: d for d in compare(folder, quantize(folder, "W8A16_G64", rules=[("*.c_fc", "W4A16_G32")])).differences
    }
    assert found["transformer.h.0.attn.c_proj.weight"].sqnr > 40
    assert found["transformer.h.0.mlp.c_fc.weight"].shape == (128, 512)


def edit(**values):
    return lambda state: state.update({name.replace("__", "."): value for name, value in values.items()})


def difference_of(folder, other, name):
    return next(d for d in compare(folder, other).differences if d.name == name)


def test_known_values(make, change):
    folder = change(make("llama"), tensors=edit(model__norm__weight=torch.tensor([3.0, 4.0])))
    near = change(folder, tensors=edit(model__norm__weight=torch.tensor([3.0, 4.5])))
    found = difference_of(folder, near, "model.norm.weight")
    assert (found.sqnr, found.largest) == (pytest.approx(20.0), 0.5)  # 25 against 0.25


CASES = {
    "equal": ([1.0, 2.0], [1.0, 2.0], inf, 0.0),
    "zeros": ([0.0, 0.0], [0.0, -0.0], inf, 0.0),
    "all noise": ([0.0, 0.0], [1.0, 0.0], -inf, 1.0),
    "equal infinities": ([inf, 2.0], [inf, 2.0], inf, 0.0),
    "infinite error": ([1.0, 2.0], [inf, 2.0], -inf, inf),
    "nan": ([1.0, 2.0], [torch.nan, 2.0], torch.nan, torch.nan),
    "nan in both": ([torch.nan, 2.0], [torch.nan, 2.0], torch.nan, torch.nan),
    "empty": ([], [], inf, 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_extremes(make, change, case):
    a, b, sqnr, largest = CASES[case]
    folders = [change(make("llama"), tensors=edit(extra=torch.tensor(values))) for values in (a, b)]
    found = difference_of(*folders, "extra")
    for got, wanted in ((found.sqnr, sqnr), (found.largest, largest)):
        assert isnan(got) if isnan(wanted) else got == wanted


def test_tensors_that_only_one_has(make, change, quantize):
    folder = make("llama")
    more = change(folder, tensors=edit(mtp__fc=torch.ones(3)))
    fewer = change(folder, tensors=lambda s: s.pop(f"{Q}.weight"))
    found = compare(more, fewer)
    assert (found.only_a, found.only_b) == (("mtp.fc", f"{Q}.weight"), ())
    assert compare(fewer, quantize(more, "W4A16_G32")).only_b == ("mtp.fc", f"{Q}.weight")
    assert len(found.differences) == len(load_file(folder / "model.safetensors")) - 1


def test_other_shapes(make, change):
    folder = change(make("llama"), tensors=edit(model__norm__weight=torch.ones(64)))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \(128,\) in A and \(64,\) in B"):
        compare(make("llama"), folder)


def test_tells_how_far_it_is(make):
    seen = []
    found = compare(make("llama"), make("llama"), advance=seen.append)
    assert seen == [d.name for d in found.differences]


@pytest.mark.parametrize(
    "name", ["W8A8", "W3A16_G40", "W5A16_G24", "W4A16_ASYM_G40", "MXFP4A16", "MXFP6A16", "NVFP4A16"]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_describe(make, quantize, kind, name):
    # 3 and 5 bits of 120 columns end inside a word, so that shapes cannot be told from the packed tensor's.
    sizes = (
        {"n_embd": 120} if kind == "gpt2" else {"hidden_size": 120, "intermediate_size": 120, "num_attention_heads": 2}
    )
    if name.startswith(("MX", "NV")):
        sizes = {}
    folder = make(kind, **sizes)
    out = quantize(folder, name)
    weights = Weights(out)
    rows = {row["name"]: row for row in weights.describe()}
    weights.close()
    assert {n: row["shape"] for n, row in rows.items()} == {n: p.shape for n, p in by_name(folder).items()}
    assert sum(row["bytes"] for row in rows.values()) == sum(
        t.nbytes for t in load_file(out / "model.safetensors").values()
    )
    entry, low = scheme(name), {n for n, row in rows.items() if row["stored"] != "bfloat16"}
    assert len(low) == {"llama": 14, "gpt2": 8}[kind]
    stored = str(entry.weight) if entry.activation is None else f"{entry.weight} x {entry.activation}"
    assert {rows[n]["stored"] for n in low} == {stored}


def test_a_single_file_can_be_read(make):
    weights = Weights(make("llama") / "model.safetensors")
    assert weights.names
    weights.close()


def drop(local):
    return lambda state: state.pop(f"{Q}.{local}")


@pytest.mark.parametrize("local", ["weight_packed", "weight_scale", "weight_shape"])
def test_incomplete_modules(make, quantize, change, local):
    out = change(quantize(make("llama"), "W4A16_G32"), tensors=drop(local))
    for look in (lambda: Weights(out).describe(), lambda: compare(make("llama"), out)):
        with pytest.raises(CheckpointError, match=local):
            look()


def test_flat_codes(make, quantize, change):
    flat = change(
        quantize(make("llama"), "W8A8"), tensors=lambda s: s.update({f"{Q}.weight": torch.ones(9, dtype=torch.int8)})
    )
    for look in (lambda: Weights(flat).describe(), lambda: compare(make("llama"), flat)):
        with pytest.raises(CheckpointError, match="only matrices are read"):
            look()
