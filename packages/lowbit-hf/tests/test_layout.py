from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from lowbit.activation import Activation
from lowbit.element import BFLOAT16, ELEMENTS
from lowbit.errors import CheckpointError, FormatError
from lowbit.format import FP8_TENSOR, INT8_TENSOR_ASYM, NVFP4, Format
from lowbit.numerics import Scales, choose_scale, decode, encode
from lowbit.packing import pack, unpack
from lowbit_hf.layout import (
    act_scales,
    format_from_config,
    from_compressed,
    input_tensors,
    row_alignment,
    shape_of,
    tensors_of,
    to_compressed,
)
from lowbit_hf.schemes import SCHEMES, Scheme, scheme

ODD_GROUPS = {2: 5, 3: 9, 4: 13, 5: 12, 6: 7, 7: 11, 8: 3}
GROUPED = [scheme(f"W{bits}A16_G{group}") for bits, group in ODD_GROUPS.items()]
ALL = [*SCHEMES.values(), scheme("W4A16_ASYM_G32"), scheme("W3A8_G40"), *GROUPED]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
N = 21  # no multiple of 8, so that zero points end inside a word

every_scheme = pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)


def weight(fmt, n, dtype):
    """Rows with outliers, a row of zeros and negative zeros; K is an odd number of groups, or odd."""
    group = fmt.block[-1]
    k = 3 * group if group and fmt.block[-2] == 1 else 300 if group else 131
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))
    x[::5, ::17] *= 40
    x[3] = 0
    x[4, ::2] = -0.0
    return x.to(dtype)


def quantized(entry, dtype, n=N, **stored):
    fmt = entry.weight_format(dtype)
    x = weight(fmt, n, dtype)
    scales = choose_scale(x, fmt, **stored)
    return fmt, tuple(x.shape), encode(x, fmt, scales), scales


def group_of(bits, kind, strategy, file_format, **more):
    """A config group with int8 inputs where compressed-tensors needs them for its file format."""
    args = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {"format": file_format, "targets": ["Linear"], "weights": args, "input_activations": None}


def compressor(group):
    return BaseCompressor.get_value_from_registry(group["format"]), QuantizationScheme(**group)


def decompressed(group, tensors):
    """compressed-tensors' own reading."""
    reader, parsed = compressor(group)
    return reader.decompress(dict(tensors), parsed)["weight"]


def same_bits(a, b):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))


def same_parts(a: Scales, b: Scales):
    pairs = [(a.scale, b.scale), (a.zero, b.zero), (a.tensor_scale, b.tensor_scale)]
    return all(x is y is None or same_bits(x, y) for x, y in pairs)


@every_scheme
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_compressed_tensors_reads_the_same_values(entry, dtype):
    fmt, shape, data, scales = quantized(entry, dtype)
    read = decompressed(entry.config_group(), to_compressed(entry, data, scales, shape))
    assert same_bits(read, decode(data, fmt, scales, shape[1], read.dtype))
    # Half-precision weights come back in their own dtype wherever scales keep it.
    assert read.dtype == (dtype if entry.weight.scale is BFLOAT16 else torch.bfloat16)


@every_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_exact(entry, dtype):
    fmt, shape, data, scales = quantized(entry, dtype)
    tensors = to_compressed(entry, data, scales, shape)
    back, back_scales, back_fmt = from_compressed(entry.config_group(), tensors)
    assert back_fmt == fmt
    assert same_bits(back, data)
    assert same_parts(back_scales, scales)
    assert shape_of(entry.config_group(), tensors) == shape


@every_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_planned_tensors_are_those_written(entry, dtype):
    _, shape, data, scales = quantized(entry, dtype)
    written = to_compressed(entry, data, scales, shape)
    act_zero = torch.zeros(1, 1, dtype=torch.int8) if entry.activation and entry.activation.format.zero else None
    written |= input_tensors(entry.activation, torch.ones(1, 1), act_zero, dtype)
    planned = {name: (stored, size) for name, stored, size in tensors_of(entry, shape, dtype)}
    assert planned == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()}
    assert all(tensor.is_contiguous() for tensor in written.values())


@pytest.mark.parametrize("entry", [e for e in ALL if row_alignment(e)], ids=lambda entry: entry.name)
def test_row_slices_join_to_the_whole(entry):
    step = row_alignment(entry)
    _, shape, data, scales = quantized(entry, torch.bfloat16, n=2 * step + 5)
    whole = to_compressed(entry, data, scales, shape)
    rows = entry.weight.block[-2]
    pieces = {name: [] for name in whole}
    for start, end in ((0, step), (step, 2 * step), (2 * step, shape[0])):
        zero = None if scales.zero is None else scales.zero[start:end]
        part = Scales(scales.scale[start // rows : -(-end // rows)], zero, scales.tensor_scale)
        written = to_compressed(entry, data[start:end], part, shape, first_row=start)
        for name, tensor in written.items():
            pieces[name].append(tensor)
        stored = {**whole, **written}
        back, back_scales, _ = from_compressed(entry.config_group(), stored, (end - start, shape[1]))
        assert same_bits(back, data[start:end])
        assert same_parts(back_scales, part)
    for name, tensor in whole.items():
        assert same_bits(torch.cat(pieces[name]), tensor), name


def stream(codes, bits):
    """A row of codes as the words that the specification gives, by way of one big number."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    return [word - (word >> 31 << 32) for word in (number >> (32 * i) & 0xFFFFFFFF for i in range(words))]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 9), (9, 43), (33, 64), (12, 131)])
def test_words_follow_the_specification(bits, signed, n, k):
    codes = ELEMENTS[f"{'' if signed else 'u'}int{bits}"]
    random = torch.Generator().manual_seed(bits * n * k)
    unsigned = torch.randint(0, 2**bits, (n, k), generator=random)
    fmt = Format(element=codes, block=(1, 0), scale=BFLOAT16, zero=None if signed else codes)
    entry = Scheme(name="made", weight=fmt, file_format="pack-quantized")
    zero = torch.randint(0, 2**bits, (n, 1), generator=random)
    offset = 2 ** (bits - 1) if signed else 0
    scales = Scales(torch.ones(n, 1, dtype=torch.bfloat16), None if signed else zero.to(torch.uint8))
    written = to_compressed(entry, pack((unsigned - offset).to(codes.code_dtype), codes), scales, (n, k))
    assert written["weight_packed"].tolist() == [stream(row, bits) for row in unsigned.tolist()]
    assert written["weight_shape"].tolist() == [n, k]
    if not signed:
        assert written["weight_zero_point"].T.tolist() == [stream(column, bits) for column in zero.T.tolist()]
    back, _, _ = from_compressed(entry.config_group(), written)
    assert torch.equal(unpack(back, codes, k).to(torch.int64) + offset, unsigned)


@pytest.mark.parametrize("entry", [e for e in ALL if e.file_format == "pack-quantized"], ids=lambda entry: entry.name)
def test_words_are_what_compressed_tensors_packs(entry):
    fmt, shape, data, scales = quantized(entry, torch.bfloat16)
    written, bits = to_compressed(entry, data, scales, shape), fmt.element.bits
    middle = 0 if fmt.element.signed else 2 ** (bits - 1)
    codes = unpack(data, fmt.element, shape[1]).to(torch.int16) - middle
    assert torch.equal(written["weight_packed"], pack_to_int32(codes.to(torch.int8), bits))
    if scales.zero is not None:
        zeros = (scales.zero.to(torch.int16) - middle).to(torch.int8)
        assert torch.equal(written["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))


FOREIGN = [
    group_of(4, "int", "channel", "pack-quantized"),
    group_of(3, "int", "channel", "pack-quantized", group_size=-1),
    group_of(8, "int", None, "pack-quantized"),
    group_of(4, "int", None, "pack-quantized", group_size=64),
    group_of(5, "int", "group", "pack-quantized", group_size=40, actorder="weight"),
    group_of(4, "int", "channel", "pack-quantized", symmetric=False),
    group_of(2, "int", "group", "pack-quantized", symmetric=False, group_size=32),
    group_of(7, "int", "group", "pack-quantized", symmetric=False, group_size=16),
    group_of(8, "int", "group", "pack-quantized", symmetric=False, group_size=64),
    group_of(4, "int", "group", "int-quantized", group_size=128),
    group_of(8, "int", "channel", "int-quantized", symmetric=False),
    group_of(4, "int", "group", "int-quantized", symmetric=False, group_size=32),
    group_of(8, "int", "tensor", "int-quantized"),
    group_of(8, "float", "tensor", "float-quantized"),
    group_of(8, "float", "channel", "naive-quantized"),
    group_of(8, "float", "block", "float-quantized", block_structure=[32, 64]),
    group_of(8, "float", "group", "mxfp8-quantized", group_size=32, scale_dtype="torch.uint8"),
]


@pytest.mark.parametrize("group", FOREIGN, ids=lambda group: f"{group['format']}-{group['weights']}")
@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_compressed_tensors_writes(group, dtype):
    writer, parsed = compressor(group)
    args = parsed.weights
    # Blocks are padded by compressed-tensors; its own choice of block scales needs whole ones.
    x = torch.randn(64, 320 if args.group_size == 40 else 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[::5, ::17] *= 40
    rows, size = args.block_structure or (1, args.group_size if (args.group_size or 0) > 0 else x.shape[1])
    if args.strategy == "tensor":
        rows = x.shape[0]
    blocks = x.unflatten(0, (-1, rows)).unflatten(2, (-1, size)).movedim(2, 1)
    scale, zero = calculate_qparams(blocks.amin((2, 3)), blocks.amax((2, 3)), args)
    shape = (1,) if args.strategy == "tensor" else scale.shape
    state = {"weight": x, "weight_scale": scale.reshape(shape), "weight_zero_point": zero.reshape(shape)}
    tensors = writer.compress(state, parsed)
    assert set(tensors) & {"weight", "weight_packed"}

    data, scales, fmt = from_compressed(group, tensors)
    read = decompressed(group, tensors)
    assert same_bits(decode(data, fmt, scales, x.shape[1], read.dtype), read)
    assert shape_of(group, tensors) == tuple(x.shape)
    placeholder = fmt if "scale_dtype" in group["weights"] else replace(fmt, scale=BFLOAT16)
    again = to_compressed(
        Scheme(name="made", weight=placeholder, file_format=group["format"]), data, scales, tuple(x.shape)
    )
    assert set(again) == set(tensors)
    assert all(same_bits(again[name], tensor) for name, tensor in tensors.items())


def test_foreign_global_scales_read_to_the_nearest_float32():
    entry = SCHEMES["NVFP4A16"]
    fmt, shape, data, scales = quantized(entry, torch.bfloat16)
    tensors = to_compressed(entry, data, scales, shape)
    tensors["weight_global_scale"] = torch.tensor([448 * 6 / 11.3])
    _, read, _ = from_compressed(entry.config_group(), tensors)
    assert float(read.tensor_scale) == pytest.approx(1 / float(tensors["weight_global_scale"]), rel=2**-24)
    assert read.tensor_scale.shape == (1, 1)
    assert fmt == entry.weight


def test_global_scale_is_the_inverse_of_the_tensor_scale():
    entry = SCHEMES["NVFP4A16"]
    fmt, shape, data, scales = quantized(entry, torch.bfloat16, tensor_scale=torch.full((1, 1), 2.0**-7))
    assert to_compressed(entry, data, scales, shape)["weight_global_scale"].tolist() == [128.0]
    rows = Scales(scales.scale, None, scales.tensor_scale.expand(N, 1))
    assert to_compressed(entry, data, rows, shape)["weight_global_scale"].tolist() == [128.0]
    uneven = Scales(scales.scale, None, scales.tensor_scale * torch.arange(1.0, N + 1).unsqueeze(1))
    with pytest.raises(CheckpointError, match="one tensor scale a matrix, not 21 that differ"):
        to_compressed(entry, data, uneven, shape)
    assert fmt.tensor_scale


def test_row_alignment():
    wanted = {"W4A16": 1, "W4A16_ASYM": 8, "FP8_BLOCK": 128, "FP8": 0, "MXFP4": 1, "NVFP4A16": 1, "W8A8": 1}
    assert {name: row_alignment(SCHEMES[name]) for name in wanted} == wanted
    fmt = Format.parse("uint3:1x32:bfloat16:zero=uint3")
    assert row_alignment(Scheme(name="made", weight=fmt, file_format="pack-quantized")) == 32
    plain = Format.parse("int8:1x32:bfloat16:zero=int8")
    assert row_alignment(Scheme(name="made", weight=plain, file_format="int-quantized")) == 1


@pytest.mark.parametrize(
    ("name", "first", "rows", "words"),
    [
        ("W4A16_ASYM", 4, 8, "rows 4..12 of a W4A16_ASYM weight with 40 rows must .* multiples of 8"),
        ("W4A16_ASYM", 0, 12, "rows 0..12"),
        ("W4A16", 30, 11, "rows 30..41"),
        ("W4A16", -1, 5, "rows -1..4"),
        ("FP8", 0, 8, "rows 0..8 of a FP8 weight with 40 rows must lie in it and be the whole"),
    ],
)
def test_slices_off_the_alignment_are_refused(name, first, rows, words):
    fmt, (_, k), data, scales = quantized(SCHEMES[name], torch.bfloat16, n=rows)
    with pytest.raises(FormatError, match=words):
        to_compressed(SCHEMES[name], data, scales, (40, k), first_row=first)
    assert fmt.block[-1] in (0, 128)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("name", ["W4A16", "MXFP4", "NVFP4A16"])
def test_useless_scales_are_refused(name, bad):
    fmt, shape, data, scales = quantized(SCHEMES[name], torch.bfloat16)
    if name == "MXFP4":
        scales.scale.view(torch.uint8)[2, 1] = 255
    elif name == "NVFP4A16":
        scales = replace(scales, tensor_scale=torch.full((1, 1), bad))
    else:
        scales.scale[2, 1] = bad
    with pytest.raises(CheckpointError, match="scale is NaN, infinite or zero"):
        to_compressed(SCHEMES[name], data, scales, shape)
    assert fmt.element.bits == 4


def test_data_of_another_format_is_refused():
    _, shape, data, scales = quantized(SCHEMES["W4A16"], torch.bfloat16)
    with pytest.raises(FormatError, match=r"data is torch.uint8 .*needs torch.uint8 of shape \(21, 144\)"):
        to_compressed(SCHEMES["W3A16"], data, scales, shape)
    with pytest.raises(FormatError, match="scale is"):
        to_compressed(SCHEMES["MXFP4A16"], data, scales, shape)


def damage(name, change):
    entry = SCHEMES[name]
    _, shape, data, scales = quantized(entry, torch.bfloat16)
    tensors = to_compressed(entry, data, scales, shape)
    change(tensors)
    return entry.config_group(), tensors


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("W4A16", lambda t: t.pop("weight_packed"), "'weight_packed' is missing; the module has weight_scale"),
        ("W4A16", lambda t: t.pop("weight_shape"), "'weight_shape' is missing"),
        ("W4A16", lambda t: t.pop("weight_scale"), "'weight_scale' is missing"),
        ("W4A16_ASYM", lambda t: t.pop("weight_zero_point"), "'weight_zero_point' is missing"),
        ("NVFP4A16", lambda t: t.pop("weight_global_scale"), "'weight_global_scale' is missing"),
        ("W4A16", lambda t: t.update(weight_g_idx=torch.zeros(384)), r"\['weight_g_idx'\] have no meaning"),
        ("W8A8", lambda t: t.update(weight_zero_point=torch.zeros(21, 1)), r"\['weight_zero_point'\] have no meaning"),
        ("W4A16", lambda t: t.update(weight_shape=torch.tensor([2**40, 384])), "weight_packed is torch.int32"),
        ("W4A16", lambda t: t.update(weight_shape=torch.tensor([-21, 384])), "weight_packed is torch.int32"),
        ("W4A16", lambda t: t.update(weight_shape=torch.tensor([21, 385])), "not a multiple of block 128"),
        ("W4A16", lambda t: t.update(weight_shape=torch.tensor([21, 256])), "needs torch.int32 \\(21, 32\\)"),
        ("W4A16", lambda t: t.update(weight_shape=torch.tensor([21.0, 384.0])), "weight_shape is torch.float32"),
        ("W4A16", lambda t: t.update(weight_shape=torch.tensor([21, 384, 1])), "weight_shape is torch.int64"),
        ("W4A16", lambda t: t.update(weight_scale=t["weight_scale"].T), "weight_scale is torch.bfloat16 \\(3, 21\\)"),
        ("W4A16", lambda t: t.update(weight_scale=t["weight_scale"].double()), "weight_scale is torch.float64"),
        ("W8A8", lambda t: t.update(weight=t["weight"].unsqueeze(0)), "only matrices are read"),
        ("W8A8", lambda t: t.update(weight=t["weight"].view(torch.uint8)), "weight is torch.uint8"),
        ("MXFP4", lambda t: t.update(weight_scale=t["weight_scale"].bfloat16()[:, :2]), "weight_scale is"),
    ],
)
def test_damaged_weights_are_refused(name, change, words):
    group, tensors = damage(name, change)
    with pytest.raises((CheckpointError, FormatError), match=words):
        from_compressed(group, tensors)


def test_codes_beyond_their_bits_are_refused():
    group = group_of(4, "int", "channel", "int-quantized")
    tensors = {"weight": torch.tensor([[7, -8], [8, 0]], dtype=torch.int8), "weight_scale": torch.ones(2, 1)}
    with pytest.raises(CheckpointError, match=r"codes -8\.\.8, beyond int4"):
        from_compressed(group, tensors)


def test_scales_may_lack_dimensions_of_one():
    group = group_of(8, "float", "channel", "float-quantized")
    tensors = {"weight": torch.ones(3, 5).to(torch.float8_e4m3fn), "weight_scale": torch.tensor([1.0, 2.0, 4.0])}
    data, scales, fmt = from_compressed(group, tensors)
    assert decode(data, fmt, scales, 5).tolist() == [[1.0] * 5, [2.0] * 5, [4.0] * 5]
    group = group_of(8, "float", "tensor", "float-quantized")
    data, scales, fmt = from_compressed(group, {**tensors, "weight_scale": torch.tensor(0.5)})
    assert decode(data, fmt, scales, 5).tolist() == [[0.5] * 5] * 3


@every_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_config_group_reads_back(entry, dtype):
    fmt = entry.weight_format(dtype)
    k = 128 * max(fmt.block[-1], 1)
    stored = next(stored for name, stored, _ in tensors_of(entry, (128, k), dtype) if name == "weight_scale")
    assert format_from_config(entry.config_group(), stored) == (fmt, entry.activation)


def with_inputs(**args):
    return {**group_of(8, "int", "channel", "int-quantized"), "input_activations": args}


@pytest.mark.parametrize(
    ("inputs", "activation"),
    [
        ({"strategy": "tensor"}, "static:int8:*x*:float32"),
        ({"strategy": "tensor", "symmetric": False}, "static:int8:*x*:float32:zero=int8"),
        ({"strategy": "token", "dynamic": True, "symmetric": False}, "dynamic:int8:1x*:float32:zero=int8"),
        ({"dynamic": True, "type": "float"}, "dynamic:e4m3fn:*x*:float32"),
        ({"dynamic": True, "num_bits": 4, "strategy": "group", "group_size": 64}, "dynamic:int4:1x64:float32"),
    ],
)
def test_inputs_read_from_configs(inputs, activation):
    assert format_from_config(with_inputs(**inputs), torch.float32)[1] == Activation.parse(activation)


INT4 = group_of(4, "int", "channel", "pack-quantized")


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({**INT4, "format": "marlin-24"}, "format 'marlin-24'; lowbit reads int-quantized"),
        ({**INT4, "format": None}, "format None"),
        ({**INT4, "format": ["pack-quantized"]}, "format \\['pack"),
        ({**INT4, "weights": None}, "has weights None"),
        ({**INT4, "output_activations": {}}, "output_activations"),
        (group_of(4, "int", "group", "pack-quantized", group_size=128, actorder="group"), "actorder 'group'.*g_idx"),
        (group_of(4, "int", "group", "pack-quantized", group_size=128, actorder=True), "actorder True"),
        (group_of(4, "int", "attn_head", "pack-quantized"), "strategy 'attn_head'"),
        (group_of(4, "int", ["group"], "pack-quantized"), "strategy \\['group'\\]"),
        (group_of(4, "int", "group", "pack-quantized"), "group_size None"),
        (group_of(4, "int", "group", "pack-quantized", group_size=-1), "group_size -1"),
        (group_of(8, "float", "block", "float-quantized", block_structure="128x128"), "block_structure '128x128'"),
        (group_of(8, "float", "block", "float-quantized", block_structure=[128, 0]), "block_structure \\[128, 0\\]"),
        (group_of(16, "float", "channel", "float-quantized"), "float16 codes"),
        (group_of([4], "int", "channel", "pack-quantized"), "int\\[4\\] codes"),
        (group_of(4, "int", "channel", "pack-quantized", symmetric="no"), "symmetric 'no'"),
        (group_of(4, "int", "channel", "pack-quantized", dynamic=True), "dynamic weights"),
        (group_of(4, "int", "token", "pack-quantized"), "dynamic weights"),
        (group_of(4, "int", "channel", "pack-quantized", codebook=1), "keys \\['codebook'\\]"),
        (group_of(8, "float", "channel", "pack-quantized"), "does not hold e4m3fn"),
        (group_of(4, "float", "channel", "float-quantized"), "does not hold e2m1"),
        (group_of(4, "int", "channel", "mxfp4-pack-quantized"), "does not hold int4"),
        (group_of(4, "int", "tensor", "pack-quantized", symmetric=False), "zero points of channels and groups"),
        (group_of(8, "float", "channel", "float-quantized", symmetric=False), "zero points need integer codes"),
        (with_inputs(strategy="group", group_size=32), "static activations have one scale a tensor"),
        (with_inputs(strategy="token", dynamic="local"), "NVFP4's are 'local'"),
        (with_inputs(strategy="tensor_group", group_size=16, dynamic=True), "NVFP4's are 'local'"),
        (with_inputs(strategy="token", dynamic=True, scale_dtype="torch.int8"), "scale_dtype 'torch.int8'"),
        (with_inputs(strategy="block", block_structure=[2, 2]), "static activations"),
    ],
)
def test_groups_without_a_meaning_here_are_refused(group, words):
    with pytest.raises((CheckpointError, FormatError), match=words):
        format_from_config(group, torch.bfloat16)


def test_input_scales():
    static, local = Activation(FP8_TENSOR, "static"), Activation(NVFP4, "local")
    assert act_scales(SCHEMES["W8A8"].activation, {}) == (None, None)
    scale, zero = act_scales(static, {"input_scale": torch.tensor([0.25], dtype=torch.bfloat16)})
    assert (scale.dtype, scale.tolist(), zero) == (torch.float32, [[0.25]], None)
    scale, zero = act_scales(local, {"input_global_scale": torch.tensor([64.0])})
    assert (scale.tolist(), zero) == ([[1 / 64]], None)
    asymmetric = Activation(INT8_TENSOR_ASYM, "static")
    given = {"input_scale": torch.tensor(0.5), "input_zero_point": torch.tensor([-3], dtype=torch.int8)}
    scale, zero = act_scales(asymmetric, given)
    assert (scale.tolist(), zero.tolist(), zero.dtype) == ([[0.5]], [[-3]], torch.int8)
    with pytest.raises(CheckpointError, match="'input_zero_point' is missing"):
        act_scales(asymmetric, {"input_scale": torch.tensor(0.5)})
