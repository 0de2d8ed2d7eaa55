"""lowbit's own files: exact for every format, versioned, atomic, and never trusted."""

from __future__ import annotations

import json
import os
import stat
from importlib.metadata import version

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lowbit import CheckpointError, QuantizedTensor, bind, quantize
from lowbit.checkpoint import load, load_into, save
from lowbit.packed import PackedTensor
from lowbit.tensor import SCHEMA_VERSION
from lowbit.testing import FORMAT_GRID, sample, shapes


def full():
    """Weights that between them have every inner tensor."""
    asym = quantize(sample((6, 32)), "INT8_ROW_ASYM", activation="static:INT8_TENSOR_ASYM")
    extra = {"act_scale": torch.tensor(0.5), "act_zero": torch.tensor(3, dtype=torch.int8), "pre_scale": torch.rand(32)}
    nvfp4 = quantize(sample((2, 32, 6)), "NVFP4", axis=1, activation="local:NVFP4")
    return {
        "asym": asym.with_inner({**asym.inner_tensors(), **extra}),
        "nvfp4": nvfp4.with_inner({**nvfp4.inner_tensors(), "act_scale": torch.tensor(0.25)}),
        "odd": quantize(sample((5, 21), dtype=torch.bfloat16), "int5:1x*:float32"),
        "plain": sample((3,), dtype=torch.float16),
    }


def check_equal(found, wanted):
    assert type(found) is type(wanted)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    if isinstance(wanted, QuantizedTensor):
        assert found.storage_layout == wanted.storage_layout
        assert found.inner_tensors().keys() == wanted.inner_tensors().keys()
        for name, part in wanted.inner_tensors().items():
            check_equal(getattr(found, name), part)
    else:
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (found, wanted)))


@pytest.mark.parametrize("fmt", FORMAT_GRID, ids=str)
def test_every_format_is_restored_exactly(fmt, tmp_path):
    tensors = {
        f"{len(shape)}.{axis}": quantize(sample(shape, dtype=torch.bfloat16).movedim(-1, axis), fmt, axis=axis)
        for shape in shapes(fmt)
        for axis in range(len(shape))
    }
    # Cuts share their memory with the whole.
    tensors |= {
        f"cut {name}": tensor.unsqueeze(0)[0]
        for name, tensor in tensors.items()
        if name.endswith(f".{tensor.dim() - 1}")
    }
    save(tensors, tmp_path / "a.safetensors")
    loaded = load(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        check_equal(loaded[name], tensor)


def test_the_file_is_plain_safetensors_without_a_class_name(tmp_path):
    save(full(), tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode()
    for name in ("Quantized", "Tensor", "lowbit.", "torch.", "class"):
        assert name not in header, name
    plain = load_file(tmp_path / "a.safetensors")
    assert {key for key in plain if key.startswith("asym.")} == {
        f"asym.{part}" for part in ("qdata", "scale", "zero", "act_scale", "act_zero", "pre_scale")
    }
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["written_by"] == f"lowbit-core {version('lowbit-core')}"
        described = json.loads(file.metadata()["lowbit"])
    assert described["version"] == SCHEMA_VERSION
    assert described["tensors"]["nvfp4"] == {
        "format": "e2m1:1x16:e4m3fn:tensor",
        "activation": "local:e2m1:1x16:e4m3fn:tensor",
        "permutation": [0, 2, 1],
        "tail": 0,
        "dtype": "float32",
        "parts": ["qdata", "scale", "tensor_scale", "act_scale"],
    }


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head, self.up = nn.Embedding(6, 32), nn.Linear(32, 6), nn.Linear(32, 6, bias=False)
        self.register_buffer("step", torch.tensor(7))

    def forward(self, ids):
        return self.up(self.table(ids)) + self.head(self.table(ids))


def model():
    made = Model()
    made.table.weight = made.head.weight = nn.Parameter(quantize(sample((6, 32)), "MXFP4"), requires_grad=False)
    weight = quantize(sample((6, 32), seed=1), "INT8_ROW", activation="dynamic:INT8_ROW_ASYM")
    made.up.weight = nn.Parameter(weight, requires_grad=False)
    return made


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_is_restored_tied_and_unpacked(bound, device, tmp_path):
    made, ids = model(), torch.tensor([0, 3])
    wanted = made(ids)
    if bound:
        bind(made)
        assert isinstance(made.up.weight, PackedTensor)
    save(made, tmp_path / "m")
    with torch.device(device):
        other = Model()
    load_into(other, tmp_path / "m")
    assert torch.equal(other(ids), wanted)
    assert other.table.weight is other.head.weight
    assert type(other.up.weight.detach()) is QuantizedTensor
    assert [p.requires_grad for p in (other.up.weight, other.head.bias)] == [False, True]
    assert other.step.item() == 7
    assert load_file(tmp_path / "m").keys() == {
        "table.weight.qdata", "table.weight.scale", "up.weight.qdata", "up.weight.scale", "head.bias", "step",
    }  # fmt: skip


def test_a_file_that_does_not_fit_the_model_changes_nothing(tmp_path):
    save(model(), tmp_path / "m")
    other = Model()
    other.more = nn.Linear(2, 2)
    before = dict(other.named_parameters())
    with pytest.raises(CheckpointError, match=r"lacks \['more.bias', 'more.weight'\] \(2\) and adds \[\]"):
        load_into(other, tmp_path / "m")
    del other.more
    other.up = nn.Linear(16, 6, bias=False)
    with pytest.raises(CheckpointError, match=r"'up.weight' is \(6, 32\), not \(6, 16\)"):
        load_into(other, tmp_path / "m")
    assert all(p is before[name] for name, p in other.named_parameters() if name in before and name != "up.weight")


def test_saving_is_atomic_and_leaves_an_ordinary_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save(full(), path)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    before = path.read_bytes()

    def fail(tensors, name, metadata):
        save_file({}, name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowbit.checkpoint.save_file", fail)
    with pytest.raises(CheckpointError, match="cannot be written: .*No space left"):
        save({"other": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved(tmp_path):
    q = full()["asym"]
    with pytest.raises(CheckpointError, match="two tensors would be stored as 'a.qdata'"):
        save({"a": q, "a.qdata": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="'a' is on the meta device"):
        save({"a": q.to("meta")}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save({"a": q}, tmp_path / "no folder" / "x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save({"a": q}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "a"
    save(full(), path)
    whole = path.read_bytes()
    told = {
        b"": "holds 0 bytes, too few",
        whole[:7]: "holds 7 bytes, too few",
        whole[:100]: "truncated: it holds 100 bytes",
        whole[:-1]: "truncated: it holds",
        b"\xff" * 8 + whole[8:]: "is not a safetensors file",
        whole[:9] + b"}" + whole[10:]: "is not the JSON it should be",
    }
    for damaged, words in told.items():
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=words):
            load(path)
    with pytest.raises(CheckpointError, match="cannot read .*none: No such file"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is a folder; needed is the file"):
        load(tmp_path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no 'lowbit' entry .*lowbit_hf.load reads others"):
        load(path)


def rewritten(path, described):
    tensors = load_file(path)
    save_file(tensors, path, {"lowbit": described if isinstance(described, str) else json.dumps(described)})


def read_header(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["lowbit"])


def test_a_newer_file_names_the_version(tmp_path):
    save(full(), tmp_path / "a")
    rewritten(tmp_path / "a", {"version": SCHEMA_VERSION + 6, "something": "else"})
    with pytest.raises(CheckpointError, match=rf"reads schema {SCHEMA_VERSION + 6}: pip install --upgrade lowbit-core"):
        load(tmp_path / "a")


DAMAGE = {
    "not JSON": "{",
    "too deep": "[" * 100_000,
    "a list": [],
    "no version": {},
    **{f"version {v!r}": {"version": v} for v in (0, -1, True, "1", None, 1.0)},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_headers(damage, tmp_path):
    save(full(), tmp_path / "a")
    rewritten(tmp_path / "a", DAMAGE[damage])
    with pytest.raises(CheckpointError):
        load(tmp_path / "a")


WRONG = [
    ("format", "e2m1:1x32:e8m0"),
    ("format", "int8:1x*:float32"),
    ("format", "nonsense"),
    ("format", 3),
    ("activation", "dynamic:nonsense"),
    ("permutation", [0]),
    ("permutation", [0, 0]),
    ("permutation", [1, 2]),
    ("permutation", ["0", "1"]),
    ("tail", 1),
    ("tail", -1),
    ("tail", 10**30),
    ("tail", 0.0),
    ("tail", None),
    ("dtype", "int8"),
    ("dtype", []),
    ("parts", ["qdata", "scale"]),
    ("parts", ["scale", "zero"]),
    ("parts", ["qdata", "scale", "zero", "more"]),
    ("parts", "qdata"),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=str)
def test_wrong_descriptions(key, value, tmp_path):
    save({"a": quantize(sample((6, 32)), "INT8_ROW_ASYM")}, tmp_path / "a")
    header = read_header(tmp_path / "a")
    header["tensors"]["a"][key] = value
    rewritten(tmp_path / "a", header)
    with pytest.raises(CheckpointError):
        load(tmp_path / "a")


@pytest.mark.parametrize("part", ["qdata", "scale", "zero", "tensor_scale", "act_scale", "act_zero", "pre_scale"])
def test_parts_of_a_wrong_shape_or_dtype(part, tmp_path):
    save(full(), tmp_path / "a")
    name = "nvfp4" if part == "tensor_scale" else "asym"
    header, tensors = read_header(tmp_path / "a"), load_file(tmp_path / "a")
    for wrong in (torch.zeros(7, 3), torch.zeros(2, 6, 32, dtype=torch.int64), torch.tensor([1.0, 2.0])):
        save_file({**tensors, f"{name}.{part}": wrong}, tmp_path / "a", {"lowbit": json.dumps(header)})
        with pytest.raises(CheckpointError, match="describes its tensors wrongly|does not fit"):
            load(tmp_path / "a")


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["MXFP4", "int8:1x*:float32:zero=int8", "asym", "qdata", "float32", "dynamic:MXFP8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def mutate(data, node):
    """The JSON value with one place of it replaced, removed or added to."""
    if isinstance(node, dict) and node and data.draw(st.integers(0, 9)):
        key = data.draw(st.sampled_from(sorted(node)))
        action = data.draw(st.sampled_from(["descend", "descend", "drop", "rename"]))
        rest = {k: v for k, v in node.items() if k != key}
        if action == "drop":
            return rest
        return rest | (
            {key: mutate(data, node[key])} if action == "descend" else {data.draw(st.text(max_size=8)): node[key]}
        )
    if isinstance(node, list) and node and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(node) - 1))
        return [*node[:at], mutate(data, node[at]), *node[at + 1 :]]
    return data.draw(values)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a"
    save({**full(), "again": torch.ones(2)}, path)
    return path, read_header(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_headers_are_errors_of_the_checkpoint_or_read(saved, data):
    path, header = saved
    header = {**header, "tied": {"c": "plain"}}
    rewritten(path, mutate(data, header))
    try:
        for tensor in load(path).values():
            if isinstance(tensor, QuantizedTensor):
                assert tensor.dequantize().shape == tensor.shape
    except CheckpointError:
        pass
