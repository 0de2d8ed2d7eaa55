"""compressed-tensors' tensors for one weight matrix (n, k), and back to lowbit's canonical ones, bit for bit.

Codes are stored in one of three ways, which the file format names:

    plain   `weight` (n, k): a code a byte, int8 or float8_e4m3fn
    words   `weight_packed` int32 (n, ceil(k*bits/32)): `u = code + 2^(bits-1)`, code j in bits [j*bits, (j+1)*bits)
            of the row's little-endian stream, zeros after the last; `weight_shape` int64 (2,) keeps n and k
    bytes   `weight_packed` uint8 (n, k*bits/8): fp4 and fp6 codes in the same bit order

Canonical codes follow the same stream, in two's complement and padded to whole bytes, so words differ from them in sign
bits and padding only. `weight_scale` has the natural shape, but (1,) for one scale a matrix; e8m0 is stored as uint8.
Zero points of words are unsigned, like their codes, and packed along n: `weight_zero_point` int32 (ceil(n*bits/32),
groups); those of plain codes are int8, shaped as the scale. `weight_global_scale` float32 (1,) is a divisor,
`1 / tensor_scale`.

Source: compressed-tensors 0.20.0, `compressors/{naive_quantized,pack_quantized,nvfp4,mxfp4,mxfp6,mxfp8}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, inf, lcm
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.conventions import from_global_scale, to_global_scale
from lowbit.element import BFLOAT16, E2M1, E2M3, E4M3FN, E8M0, ELEMENTS, FLOAT16, FLOAT32, Element
from lowbit.errors import CheckpointError, FormatError
from lowbit.format import WHOLE, Format
from lowbit.numerics import Scales, check_scales, data_shape
from lowbit.packing import pack, unpack
from lowbit_hf.schemes import Scheme
from lowbit_hf.words import flip_signs, pack_zeros, to_bytes, to_words, unpack_zeros, words

_Storage = Literal["plain", "words", "bytes"]
_Entry = tuple[str, torch.dtype, tuple[int, ...]]

_STORAGE: dict[str, _Storage] = {
    "int-quantized": "plain",
    "float-quantized": "plain",
    "naive-quantized": "plain",
    "mxfp8-quantized": "plain",
    "pack-quantized": "words",
    "nvfp4-pack-quantized": "bytes",
    "mxfp4-pack-quantized": "bytes",
    "mxfp6-pack-quantized": "bytes",
}
_CODES = {f"int{b}": ELEMENTS[f"int{b}"] for b in range(1, 9)} | {"float4": E2M1, "float6": E2M3, "float8": E4M3FN}
# Scales by the dtype they are stored in, and inputs' by the `scale_dtype` a config gives.
_SCALES = {torch.uint8: E8M0} | {e.storage: e for e in (E4M3FN, BFLOAT16, FLOAT16, FLOAT32)}
_INPUT_SCALES = {None: FLOAT32} | {str(dtype): e for dtype, e in _SCALES.items()}


def tensors_of(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[_Entry]:
    """Local name, dtype and shape of every tensor that a weight of `shape` (n, k) and `dtype` becomes.

    Raises:
        FormatError: the shape or the dtype does not fit the scheme.
    """
    inputs: list[_Entry] = []
    activation = scheme.activation
    if activation is not None and activation.scaling == "local":
        inputs = [("input_global_scale", torch.float32, (1,))]
    elif activation is not None and activation.scaling == "static":
        inputs = [("input_scale", dtype, (1,))]
        if activation.format.zero is not None:
            inputs.append(("input_zero_point", activation.format.zero.code_dtype, (1,)))
    return _entries(scheme.weight_format(dtype), _STORAGE[scheme.file_format], shape) + inputs


def input_tensors(
    activation: Activation | None, act_scale: Tensor | None, act_zero: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a module stores of its input's rounding, by local name; `act_scales` reads it back.

    Raises:
        CheckpointError: a scale is missing, NaN, infinite or zero.
    """
    if activation is None or activation.scaling == "dynamic":
        return {}
    if act_scale is None or not bool((act_scale > 0) & act_scale.isfinite()):
        raise CheckpointError(f"{activation} needs a positive input scale, not {act_scale}; calibrate on other data")
    if activation.scaling == "local":
        return {"input_global_scale": to_global_scale(act_scale)}
    stored = {"input_scale": act_scale.reshape(1).to(dtype)}
    return stored if act_zero is None else {**stored, "input_zero_point": act_zero.reshape(1)}


def row_alignment(scheme: Scheme) -> int:
    """Slices of rows can be written apart where they start at multiples of this; 0: only the whole matrix can."""
    fmt = scheme.weight
    packs_rows = fmt.zero is not None and _STORAGE[scheme.file_format] == "words"
    return lcm(fmt.block[-2], 32 // gcd(32, fmt.element.bits) if packs_rows else 1)


def to_compressed(
    scheme: Scheme, data: Tensor, scales: Scales, shape: tuple[int, int], *, first_row: int = 0
) -> dict[str, Tensor]:
    """The tensors of a canonical weight of `shape` (n, k), or of the rows from `first_row` on that `data` holds.

    The slice at row 0 also has the tensors that belong to the whole matrix, so that the tensors of all slices, joined
    along dim 0, are those of the whole. Tensor scales that are powers of two, as lowbit's own are, invert exactly.

    Raises:
        FormatError: the data, the scales or the slice does not fit the scheme and shape.
        CheckpointError: a scale is NaN, infinite or zero, or rows differ in tensor scale.
    """
    (n, k), rows = shape, data.shape[0]
    fmt, storage = scheme.weight_format(scales.scale.dtype), _STORAGE[scheme.file_format]
    _check_slice(scheme, first_row, rows, n)
    _check_canonical(data, scales, fmt, (rows, k))
    scale = scales.scale.view(torch.uint8) if fmt.scale is E8M0 else scales.scale
    tensors = {"weight_scale": scale.reshape(_scale_shape(fmt, (rows, k)))}
    if storage == "plain":
        tensors["weight"] = unpack(data, fmt.element, k)
    elif storage == "bytes":
        tensors["weight_packed"] = data
    else:
        tensors["weight_packed"] = to_words(flip_signs(data, fmt.element, k), fmt.element.bits, k)
    if scales.zero is not None:
        tensors["weight_zero_point"] = scales.zero if storage == "plain" else pack_zeros(scales.zero, fmt.element)
    if first_row == 0 and storage == "words":
        tensors["weight_shape"] = torch.tensor([n, k], dtype=torch.int64)
    if first_row == 0 and scales.tensor_scale is not None:
        tensors["weight_global_scale"] = to_global_scale(one_number(scales.tensor_scale))
    return tensors


def from_compressed(
    group: Mapping[str, Any], tensors: Mapping[str, Tensor], shape: tuple[int, int] | None = None
) -> tuple[Tensor, Scales, Format]:
    """Canonical data, scales and format of the weight that a module's `tensors`, by local name, hold.

    `group` is its `config_groups` entry. For a slice of rows (aligned as `row_alignment` says) `shape` is the slice's.
    A global scale that is no power of two inverts to the nearest float32.

    Raises:
        CheckpointError: the group means what lowbit cannot hold, or a tensor is missing, unexpected or does not fit it.
        FormatError: the shape does not fit the group's format.
    """
    fmt, _ = format_from_config(group, _take(tensors, "weight_scale").dtype)
    storage = _storage_of(group)
    n, k = shape or shape_of(group, tensors)
    stored = _check_stored(tensors, _entries(fmt, storage, (n, k)))
    scale, zero = stored["weight_scale"].reshape(fmt.scale_shape((n, k))), stored.get("weight_zero_point")
    if zero is not None:
        zero = zero.reshape(scale.shape) if storage == "plain" else unpack_zeros(zero, fmt.element, n)
    scales = Scales(
        scale.view(torch.float8_e8m0fnu) if fmt.scale is E8M0 else scale,
        zero,
        from_global_scale(stored["weight_global_scale"]) if fmt.tensor_scale else None,
    )
    if storage == "plain":
        return _pack_plain(stored["weight"], fmt.element), scales, fmt
    if storage == "bytes":
        return stored["weight_packed"], scales, fmt
    data = flip_signs(to_bytes(stored["weight_packed"], fmt.element.bits, k), fmt.element, k)
    return data.view(fmt.element.storage), scales, fmt


def shape_of(group: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """The shape (n, k) of a stored weight.

    Raises:
        CheckpointError: the tensor that tells it is missing or is not a matrix, or the group is malformed.
    """
    storage = _storage_of(group)
    stored = _take(tensors, {"plain": "weight", "words": "weight_shape", "bytes": "weight_packed"}[storage])
    if storage == "words" and (stored.dtype, tuple(stored.shape)) != (torch.int64, (2,)):
        msg = f"weight_shape is {stored.dtype} {tuple(stored.shape)}; needed is torch.int64 (2,), rows and columns"
        raise CheckpointError(msg)
    size = [int(length) for length in stored] if storage == "words" else list(stored.shape)
    if len(size) != 2:
        msg = f"a stored weight has shape {tuple(size)}; only matrices are read, such as one expert's"
        raise CheckpointError(msg)
    n, k = size
    return n, k * 8 // _read_arguments(group, "weights").codes.bits if storage == "bytes" else k


def act_scales(activation: Activation, tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """A module's stored `act_scale` (float32) and `act_zero`, both (1, 1), as far as the activation has them.

    Raises:
        CheckpointError: one is missing, or is not a single number.
    """
    if activation.scaling == "dynamic":
        return None, None
    if activation.scaling == "local":
        return from_global_scale(one_number(_take(tensors, "input_global_scale"))), None
    scale = one_number(_take(tensors, "input_scale")).to(torch.float32).reshape(1, 1)
    zero = activation.format.zero
    return scale, zero and one_number(_take(tensors, "input_zero_point")).to(zero.code_dtype).reshape(1, 1)


def format_from_config(group: Mapping[str, Any], scale_dtype: torch.dtype) -> tuple[Format, Activation | None]:
    """What a `config_groups` entry means, whose stored `weight_scale` has `scale_dtype`.

    A group without a `format` of its own must be given the config's.

    Raises:
        CheckpointError: the entry is malformed, or means what lowbit cannot hold.
        FormatError: its parts do not fit together.
    """
    storage, weights = _storage_of(group), _read_arguments(group, "weights")
    if group.get("output_activations") is not None:
        raise CheckpointError("a config group has output_activations, but lowbit rounds only inputs; re-export without")
    if weights.dynamic or weights.strategy == "token":
        raise CheckpointError("a config group has dynamic weights, but only inputs can be; the config is damaged")
    if scale_dtype not in _SCALES:
        msg = f"weight_scale is {scale_dtype}; needed is one of {', '.join(str(dtype) for dtype in _SCALES)}"
        raise CheckpointError(msg)
    codes = weights.codes
    if (storage == "bytes") != (codes in (E2M1, E2M3)) or (storage == "words" and codes is E4M3FN):
        msg = f"file format {group['format']!r} does not hold {codes.name} weights; the config contradicts itself"
        raise CheckpointError(msg)
    if storage == "words" and not weights.symmetric:
        if weights.strategy not in ("channel", "group"):
            msg = f"pack-quantized packs zero points of channels and groups, not of strategy {weights.strategy!r}"
            raise CheckpointError(msg)
        codes = ELEMENTS[f"u{codes.name}"]
    activation = None if group.get("input_activations") is None else _activation(group)
    return weights.format(codes, _SCALES[scale_dtype]), activation


@dataclass(frozen=True, slots=True)
class _Arguments:
    """compressed-tensors' `QuantizationArgs`, read and checked."""

    codes: Element
    symmetric: bool
    strategy: str
    block: tuple[int, int]
    dynamic: bool | Literal["local"]
    scale_dtype: str | None

    def format(self, codes: Element, scale: Element) -> Format:
        """Their format, with codes and scales stored as given."""
        zero, two_level = None if self.symmetric else codes, self.strategy == "tensor_group"
        return Format(element=codes, block=self.block, scale=scale, zero=zero, tensor_scale=two_level)


_KEYS = {"num_bits", "type", "symmetric", "dynamic", "actorder", "scale_dtype"}
_BLOCK_KEYS = {"strategy", "group_size", "block_structure"}
# How scales were found, which does not change what is stored.
_IGNORED = {"observer", "observer_kwargs", "zp_dtype"}


def _read_arguments(group: Mapping[str, Any], part: str) -> _Arguments:
    """The QuantizationArgs that a group has as `part`; absent keys have compressed-tensors' defaults."""
    given = group.get(part)
    if not isinstance(given, dict):
        msg = f"a config group has {part} {given!r}; needed is an object with num_bits, type and strategy"
        raise CheckpointError(msg)
    args = cast("dict[str, Any]", given)
    if unknown := set(args) - _KEYS - _BLOCK_KEYS - _IGNORED:
        msg = f"{part} has the keys {sorted(unknown)}, which compressed-tensors 0.20 does not define; upgrade lowbit"
        raise CheckpointError(msg)
    if args.get("actorder") not in (None, False, "weight", "static"):
        msg = f"{part} has actorder {args['actorder']!r}, which scatters groups by a g_idx; use actorder 'weight'"
        raise CheckpointError(msg)
    name = f"{args.get('type', 'int')}{args.get('num_bits', 8)}"
    symmetric, dynamic, scale = args.get("symmetric", True), args.get("dynamic", False), args.get("scale_dtype")
    if name not in _CODES or not isinstance(symmetric, bool) or dynamic not in (False, True, "local"):
        msg = (
            f"{part} has {name} codes, symmetric {symmetric!r} and dynamic {dynamic!r}; lowbit reads "
            f"{', '.join(_CODES)}, symmetric true or false, and dynamic true, false or 'local'"
        )
        raise CheckpointError(msg)
    return _Arguments(_CODES[name], symmetric, *_read_block(args, part), dynamic, None if scale is None else str(scale))


def _read_block(args: Mapping[str, Any], part: str) -> tuple[str, tuple[int, int]]:
    """Strategy, and the block that a scale covers under it."""
    strategy, group, structure = args.get("strategy"), args.get("group_size"), args.get("block_structure")
    if strategy is None:  # inferred as compressed-tensors does
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    match strategy, structure if strategy == "block" else [1, group]:
        case "tensor", _:
            return "tensor", (WHOLE, WHOLE)
        case ("channel" | "token") as row, _:
            return row, (1, WHOLE)
        case ("group" | "tensor_group" | "block") as name, [int(rows), int(columns)] if min(rows, columns) > 0:
            return name, (rows, columns)
        case _:
            msg = (
                f"{part} has strategy {strategy!r} with group_size {group!r} and block_structure {structure!r}; lowbit "
                "reads tensor, channel, token, group or tensor_group with a positive group_size, and block of [n, k]"
            )
            raise CheckpointError(msg)


def _activation(group: Mapping[str, Any]) -> Activation:
    inputs = _read_arguments(group, "input_activations")
    if inputs.scale_dtype not in _INPUT_SCALES:
        known = ", ".join(map(str, _INPUT_SCALES))
        msg = f"input_activations have scale_dtype {inputs.scale_dtype!r}; lowbit reads {known}"
        raise CheckpointError(msg)
    if (inputs.strategy == "tensor_group") != (inputs.dynamic == "local"):
        msg = f"input_activations have strategy {inputs.strategy!r} and dynamic {inputs.dynamic!r}; NVFP4's are 'local'"
        raise CheckpointError(msg)
    scaling = "local" if inputs.dynamic == "local" else "dynamic" if inputs.dynamic else "static"
    return Activation(inputs.format(inputs.codes, _INPUT_SCALES[inputs.scale_dtype]), scaling)


def _storage_of(group: Mapping[str, Any]) -> _Storage:
    name = group.get("format")
    if not isinstance(name, str) or name not in _STORAGE:
        msg = f"a config group has format {name!r}; lowbit reads {', '.join(_STORAGE)} (one without takes the config's)"
        raise CheckpointError(msg)
    return _STORAGE[name]


def _entries(fmt: Format, storage: _Storage, shape: tuple[int, int]) -> list[_Entry]:
    """What a weight is stored as; the one statement of it, for planning, and for checking what is read."""
    (n, k), bits, scales = shape, fmt.element.bits, _scale_shape(fmt, shape)
    scale = ("weight_scale", torch.uint8 if fmt.scale is E8M0 else fmt.scale.storage, scales)
    if storage == "plain":
        entries: list[_Entry] = [("weight", fmt.element.code_dtype, shape), scale]
    elif storage == "bytes":
        entries = [("weight_packed", torch.uint8, data_shape(shape, fmt)), scale]
    else:
        entries = [("weight_packed", torch.int32, (n, words(k, bits))), scale, ("weight_shape", torch.int64, (2,))]
    if fmt.zero is not None:
        packed = storage == "words"
        zeros = (words(n, bits), scales[-1]) if packed else scales
        entries.append(("weight_zero_point", torch.int32 if packed else fmt.zero.code_dtype, zeros))
    if fmt.tensor_scale:
        entries.append(("weight_global_scale", torch.float32, (1,)))
    return entries


def _scale_shape(fmt: Format, shape: tuple[int, int]) -> tuple[int, ...]:
    return (1,) if fmt.block == (WHOLE, WHOLE) else fmt.scale_shape(shape)


def _pack_plain(codes: Tensor, stored: Element) -> Tensor:
    """Canonical data of codes kept a byte each."""
    if stored.packed and codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if low < stored.min or high > stored.max:
            msg = f"weight has codes {low}..{high}, beyond {stored.name}; its config group does not fit it"
            raise CheckpointError(msg)
    return pack(codes, stored)


def one_number(scale: Tensor) -> Tensor:
    """The one number, (1,), that every entry equals.

    Raises:
        CheckpointError: they differ, or there is none.
    """
    flat = scale.flatten()
    if flat.numel() == 0 or not bool((flat == flat[0]).all()):
        msg = f"a checkpoint has one tensor scale a matrix, not {flat.numel()} that differ; use one for all rows"
        raise CheckpointError(msg)
    return flat[:1]


def _take(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        msg = f"tensor {name!r} is missing; the module has {', '.join(sorted(tensors)) or 'none'}"
        raise CheckpointError(msg)
    return tensors[name]


def _check_slice(scheme: Scheme, first_row: int, rows: int, n: int) -> None:
    end, step = first_row + rows, row_alignment(scheme)
    whole = first_row == 0 and rows == n
    if not whole and (step == 0 or first_row % step or not 0 <= first_row <= end <= n or (end < n and end % step)):
        fits = f"start and end at multiples of {step}" if step else "be the whole"
        msg = f"rows {first_row}..{end} of a {scheme.name} weight with {n} rows must lie in it and {fits}"
        raise FormatError(msg)


def _check_canonical(data: Tensor, scales: Scales, fmt: Format, shape: tuple[int, int]) -> None:
    needed = data_shape(shape, fmt)
    if data.dtype != fmt.element.storage or tuple(data.shape) != needed:
        msg = f"data is {data.dtype} of shape {tuple(data.shape)}; {fmt} needs {fmt.element.storage} of shape {needed}"
        raise FormatError(msg)
    check_scales(scales, fmt, shape)
    for name, values in (("scale", scales.scale), ("tensor_scale", scales.tensor_scale)):
        if values is None or values.numel() == 0:
            continue
        low, high = torch.aminmax(values.to(torch.float32).abs())
        # Runtimes answer such a scale with NaN, far from where it came from. A NaN here compares as neither.
        if not (low > 0 and high < inf):
            msg = f"a {name} is NaN, infinite or zero; keep this weight unquantized, or repair its values"
            raise CheckpointError(msg)


def _check_stored(tensors: Mapping[str, Tensor], entries: list[_Entry]) -> dict[str, Tensor]:
    """The tensors of `entries`, each of its dtype and shape."""
    names = {name for name, _, _ in entries}
    if unexpected := {name for name in tensors if name.startswith("weight")} - names:
        msg = f"tensors {sorted(unexpected)} have no meaning under their config group, which stores {sorted(names)}"
        raise CheckpointError(msg)
    stored: dict[str, Tensor] = {}
    for name, dtype, shape in entries:
        if name == "weight_shape":  # says what the others must be, and a slice need not have it
            continue
        given = _take(tensors, name)
        # Dimensions of 1 come and go between writers.
        if given.dtype != dtype or [d for d in given.shape if d != 1] != [d for d in shape if d != 1]:
            msg = f"{name} is {given.dtype} {tuple(given.shape)}; its config group needs {dtype} {shape}"
            raise CheckpointError(msg)
        stored[name] = given.reshape(shape)
    return stored
