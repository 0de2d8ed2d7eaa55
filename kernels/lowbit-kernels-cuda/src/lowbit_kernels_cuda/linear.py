"""`linear` with a weight that alone is in low precision: how it is packed, and what runs for how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor

from lowbit.backends import Description
from lowbit.element import Element
from lowbit.errors import FormatError
from lowbit.format import Format
from lowbit.packing import pack as pack_codes
from lowbit.packing import unpack as unpack_codes
from lowbit.tensor import QuantizedTensor
from lowbit_kernels_cuda.dots import linear_dots
from lowbit_kernels_cuda.fragments import Text, lines, text
from lowbit_kernels_cuda.scaling import raw, spec
from lowbit_kernels_cuda.weights import pack_scales, pack_tiles, parts, unpack_scales, unpack_tiles


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """Words of tiles, scales and zero points as a lane reads them, and what else the weight has.

    Raises:
        FormatError: an 8-bit float, or a scale, is no number, or a scale is negative.
    """
    fmt = weight.format
    n, k = weight.canonical_shape
    element = fmt.element
    codes = unpack_codes(weight.qdata.view(torch.uint8), element, k) if element.packed else weight.qdata
    if element.has_nan and not bool(torch.isfinite(weight.qdata.float()).all()):
        msg = f"the weight has codes of {element.name} that are no numbers; find out where they come from"
        raise FormatError(msg)
    scale = weight.scale
    if scale.itemsize == 1 and not bool((torch.isfinite(scale.float()) & (scale.float() >= 0)).all()):
        msg = "the weight has scales that are no numbers, or negative ones; find out where they come from"
        raise FormatError(msg)
    lift = _lift(fmt)
    if lift and int(raw(scale).max()) + lift <= _LARGEST:
        # Bytes say that scales are packed so; they mostly can.
        scale = raw(scale) + lift
    packed = [*pack_tiles(_above_least(codes, element), element.bits), _across(scale, n, fmt)]
    if weight.zero is not None:
        packed.append(_across(_above_least(weight.zero, element).to(torch.int16), n, fmt))
    return (*packed, *(part for part in (weight.tensor_scale, weight.pre_scale) if part is not None))


# The exponent of a bfloat16 that is neither infinite nor no number.
_LARGEST = 254


def _lift(fmt: Format) -> int:
    """What exponents of scales may make up for, so that codes are bfloat16s by their bits alone; 0: nothing."""
    element = fmt.element
    return 127 - element.bias if fmt.scale.powers_of_two and element.kind == "float" and fmt.block_for(2)[-1] else 0


def _lifted(scale: Tensor, fmt: Format) -> bool:
    return scale.dtype != fmt.scale.storage


def _above_least(codes: Tensor, element: Element) -> Tensor:
    """Uint8 of codes, integers as if the least were 0."""
    least = 1 << (element.bits - 1) if element.kind == "int" and element.signed else 0
    return (codes.view(torch.uint8) & ((1 << element.bits) - 1)) ^ least


def _across(part: Tensor, n: int, fmt: Format) -> Tensor:
    """Scales or zero points as the kernels read them, those of several rows once for each."""
    rows, group = fmt.block_for(2)
    return pack_scales(raw(part).repeat_interleave(rows or n, 0)[:n], group).view(part.dtype)


def _words(part: Tensor) -> Tensor:
    """What a lane reads of scales or zero points, in words of at most 32 bits."""
    size = 2 * part.shape[-1] * part.itemsize
    return raw(part).view(-1).view(torch.int16 if size == 2 else torch.int32)


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    fmt = Format.parse(description.layout.format)
    n, k = (description.shape[description.layout.permutation.index(d)] for d in range(2))
    element, count = fmt.element, len(parts(fmt.element.bits))

    def codes_of(above: Tensor) -> Tensor:
        if not (element.kind == "int" and element.signed):
            return above
        shift = 8 - element.bits
        return (above ^ (1 << (element.bits - 1))).view(torch.int8) << shift >> shift

    codes = codes_of(unpack_tiles(packed[:count], element.bits, n, k))
    found = {"qdata": pack_codes(codes, element) if element.packed else codes.view(element.storage)}
    rows, group = fmt.block_for(2)
    for name, part in zip(description.names[1:], packed[count:], strict=True):
        if name in {"scale", "zero"}:
            each = unpack_scales(raw(part), n, -(-k // group) if group else 1)[:: rows or n].contiguous()
            if name == "zero":
                assert fmt.zero is not None
                each = codes_of(each.to(torch.uint8)).view(fmt.zero.code_dtype)
            if name == "scale":
                each = (each - _lift(fmt) if _lifted(part, fmt) else each).view(fmt.scale.storage)
            found[name] = each
        else:
            found[name] = part
    return found


def linear(
    x: Tensor, packed: Sequence[Tensor], names: Sequence[str], spec_: str, n: int, k: int, bias: Tensor | None
) -> Tensor:
    """`x @ weight.T + bias` of what `pack` made of a weight (N, K) with the inner tensors `names` beside its codes."""
    fmt = Format.parse(spec_)
    count = len(parts(fmt.element.bits))
    named = dict(zip(names, packed[count:], strict=True))
    if "pre_scale" in named:
        x = x * named["pre_scale"].to(x.dtype)
    tokens = x.reshape(-1, k).contiguous()
    if tokens.data_ptr() % 16:
        # Sixteen bytes are copied at a time.
        tokens = tokens.clone()
    out = x.new_empty(len(tokens), n)
    if out.numel():
        _launch(tokens, tuple(packed[:count]), named, bias, out, fmt)
    return out.view(*x.shape[:-1], n)


def _launch(
    x: Tensor, words: tuple[Tensor, ...], named: dict[str, Tensor], bias: Tensor | None, out: Tensor, fmt: Format
) -> None:
    (m, n), k = out.shape, x.shape[1]
    scale, zero, whole = named["scale"], named.get("zero"), named.get("tensor_scale")
    how = _constants(fmt, x.dtype, x.device if x.is_cuda else None, _lifted(scale, fmt))
    plan = schedule(m, n, k, how, x.device)
    sums = None
    if zero is not None and how["LINES"]:
        sums = x.view(m, -1, how["GROUP"] or k).sum(-1, dtype=torch.float32)
    blocks = triton.cdiv(n, plan.rows) * triton.cdiv(m, plan.tokens)
    partial = out.new_empty(plan.splits, m, n, dtype=torch.float32) if plan.splits > 1 else None
    count = _counters(blocks, x.device) if plan.splits > 1 else None
    then = (whole, 0 if whole is None or whole.numel() == 1 else 1, None if bias is None else raw(bias), raw(out))
    shape = {"ROWS": plan.rows, "TOKENS": plan.tokens, "COLUMNS": plan.columns, "SPLITS": plan.splits, "BAND": 8}
    kernel: Any
    if plan.depth:
        hopper = import_module("lowbit_kernels_cuda.hopper")
        flat = not how["GROUP"]
        given = (raw(scale) if flat else _words(scale), zero if zero is None or flat else _words(zero))
        kernel = hopper.linear_wgmma[(blocks, plan.splits)]
        kernel(
            *(hopper.described(x, plan.tokens, plan.columns), words, *given, sums, *then, partial, count, m, n, k),
            **(how | shape),
            STAGES=plan.stages,
            DEPTH=plan.depth,
            num_warps=plan.warps,
        )
        return
    kernel = linear_dots[(blocks, plan.splits)]
    kernel(
        *(x if x.is_cuda else x.float(), words, _words(scale), None if zero is None else _words(zero), sums, *then),
        *(partial, count, m, n, k),
        **(how | shape),
        EVEN=k % plan.columns == 0,
        EXACT=plan.exact,
        STAGES=plan.stages,
        num_warps=plan.warps,
    )


@lru_cache(maxsize=1024)
def _constants(fmt: Format, dtype: torch.dtype, device: torch.device | None, lifted: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - of two layouts
    """What kernels for a format and inputs are compiled for."""
    bf16, group, element = dtype == torch.bfloat16, fmt.block_for(2)[-1], fmt.element
    # Zero points are taken from codes above their offset, unless the difference is no number of the inputs' type.
    apart = fmt.zero is not None and bool(group) and not (element.bits == 8 and bf16)
    return {
        "SPEC": replace(spec(fmt, device=device), tensor=False),
        "PARTS": parts(element.bits),
        "GROUP": group,
        "BF16": bf16,
        "LINES": () if apart or (lifted and bf16) else lines(element, bf16),
        "TEXT": Text() if device is None else text(element, bf16),
        "LIFT": _lift(fmt) if lifted else 0,
    }


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
# Counters of calls that are captured in graphs, which may run beside anything: what is left for each device.
_SPARE: dict[torch.device, Tensor] = {}
_STOCK = 1 << 16
# Graphs hold on to no memory from outside their own; they may run as long as the process does.
_KEPT: list[Tensor] = []


def _counters(count: int, device: torch.device) -> Tensor:
    """Int32 zeros, which the kernel leaves as it finds them; no call has those of another that may run beside it."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        spare = _SPARE.get(device)
        if spare is None or spare.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        _SPARE[device] = spare[count:]
        return spare[:count]
    if device not in _SPARE or _SPARE[device].numel() < _STOCK // 2:
        _SPARE[device] = torch.zeros(_STOCK, dtype=torch.int32, device=device)
        _KEPT.append(_SPARE[device])
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _COUNTERS or _COUNTERS[key].numel() < count:
        _COUNTERS[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _COUNTERS[key][:count]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product runs: a program's rows, tokens, columns at a time and warps, and the parts that K is cut into."""

    rows: int
    tokens: int
    columns: int
    warps: int
    splits: int
    stages: int
    # Whether scales are of sums of products rather than of codes.
    exact: bool = False
    # Steps whose words are read ahead, by the kernel for Hopper; 0: `linear_dots`.
    depth: int = 0


def schedule(m: int, n: int, k: int, how: dict[str, Any], device: torch.device) -> Plan:
    """The plan for m tokens; from measurements on an H100, in numbers of its multiprocessors (docs/performance.md)."""
    form, group, bf16 = how["SPEC"], how["GROUP"], how["BF16"]
    scale, element = form.scale, form.element
    # Whether a scale times a code is a number of the inputs' type, and whether the scale is.
    bits = element.mantissa + 1 if element.kind == "float" else element.bits
    product = scale.bits == 8 and bits + scale.mantissa <= (8 if bf16 else 11) and (bf16 or not scale.powers_of_two)
    fits = product or (scale.bits == 16 and (scale.mantissa == 7) == bf16)
    apart = bool(form.zero and how["LINES"])
    # Exact where it costs no time.
    exact = bool(group) and (not fits or apart or (m <= 64 and not product and group >= 64))
    multiprocessors, hopper = _device(device)

    def blocks(rows: int, tokens: int) -> int:
        return triton.cdiv(n, rows) * triton.cdiv(m, tokens)

    def splits(waves: float, programs: int, columns: int) -> int:
        """The power of two that makes as many waves of programs, of at least two steps, on all multiprocessors."""
        most = min(int(waves * multiprocessors) // programs, 4, k // (2 * columns))
        return 1 << max(most, 1).bit_length() - 1

    columns = 128 if not exact or group % 128 == 0 else 64
    if m <= 64:
        tokens = 16 if m <= 16 else 32 if m <= 32 else 64
        rows = 128 if tokens == 64 and blocks(128, 64) >= 1.5 * multiprocessors else 64
        if tokens == 16 and not exact and element.bits < 8:
            columns = 256
        programs, waves = blocks(rows, tokens), 3 if tokens == 64 else 4 if element.bits < 8 else 2
        parts_ = 1 if programs >= 1.5 * multiprocessors else splits(waves, programs, columns)
        warps, stages = 4 if exact or rows == 64 else 8, 3 if tokens == 64 or columns == 256 else 4
        return Plan(rows, tokens, columns, warps, parts_, stages, exact)
    if exact or not hopper:
        return Plan(128, 128, columns if exact else 64, 8, 1, 3, exact)
    if blocks(128, 256) >= 0.75 * multiprocessors:
        return Plan(128, 256, 64, 8, 1, 4, depth=2)
    return Plan(64, 128, 64, 4, splits(2.9 if k >= 8192 else 1.45, blocks(64, 128), 64), 4, depth=4)


@cache
def _device(device: torch.device) -> tuple[int, bool]:
    """Multiprocessors, and whether it is Hopper."""
    if device.type != "cuda":
        return 132, False
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.major == 9
