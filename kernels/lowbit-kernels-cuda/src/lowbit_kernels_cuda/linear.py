"""`linear` with a weight that alone is in low precision: how it is packed, and what runs for how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from lowbit_kernels_cuda.few import linear_tiles
from lowbit_kernels_cuda.fragments import Text, lines, text
from lowbit_kernels_cuda.many import linear_dots
from lowbit_kernels_cuda.scaling import Spec, raw, spec
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
    packed = [*pack_tiles(_above_least(codes, element), element.bits), _across(scale, n, fmt)]
    if weight.zero is not None:
        packed.append(_across(_above_least(weight.zero, element).to(torch.int16), n, fmt))
    return (*packed, *(part for part in (weight.tensor_scale, weight.pre_scale) if part is not None))


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

    def codes_of(above: Tensor, signed: bool) -> Tensor:  # noqa: FBT001 - of two kinds of codes
        if not (element.kind == "int" and element.signed):
            return above
        shift = 8 - element.bits
        codes = above ^ (1 << (element.bits - 1))
        return codes.view(torch.int8) << shift >> shift if signed else codes

    codes = codes_of(unpack_tiles(packed[:count], element.bits, n, k), signed=True)
    found = {"qdata": pack_codes(codes, element) if element.packed else codes.view(element.storage)}
    rows, group = fmt.block_for(2)
    for name, part in zip(description.names[1:], packed[count:], strict=True):
        if name in {"scale", "zero"}:
            each = unpack_scales(raw(part), n, -(-k // group) if group else 1)[:: rows or n].contiguous()
            if name == "zero":
                assert fmt.zero is not None
                each = codes_of(each.to(torch.uint8), signed=True).view(fmt.zero.code_dtype)
            found[name] = each.view(part.dtype) if name == "scale" else each
        else:
            found[name] = part
    return found


def linear(
    x: Tensor, packed: Sequence[Tensor], names: Sequence[str], spec_: str, n: int, k: int, bias: Tensor | None
) -> Tensor:
    """`x @ weight.T + bias` of what `pack` made of a weight (N, K) that has the inner tensors `names` beside its codes."""
    fmt = Format.parse(spec_)
    count = len(parts(fmt.element.bits))
    named = dict(zip(names, packed[count:], strict=True))
    if "pre_scale" in named:
        x = x * named["pre_scale"].to(x.dtype)
    tokens = x.reshape(-1, k).contiguous()
    out = x.new_empty(len(tokens), n)
    if out.numel():
        _launch(tokens, tuple(packed[:count]), named, bias, out, fmt)
    return out.view(*x.shape[:-1], n)


def _launch(
    x: Tensor, words: tuple[Tensor, ...], named: dict[str, Tensor], bias: Tensor | None, out: Tensor, fmt: Format
) -> None:
    (m, n), k = out.shape, x.shape[1]
    bf16, native = x.dtype == torch.bfloat16, x.is_cuda
    group, element = fmt.block_for(2)[-1], fmt.element
    form = replace(spec(fmt, device=x.device if native else None), tensor=False)
    zero, whole = named.get("zero"), named.get("tensor_scale")
    given = (words, _words(named["scale"]), None if zero is None else _words(zero))
    then = (whole, 0 if whole is None or whole.numel() == 1 else 1, None if bias is None else raw(bias), raw(out))
    constants: dict[str, Any] = {
        "SPEC": form,
        "PARTS": parts(element.bits),
        "GROUP": group,
        "BF16": bf16,
        "LINES": lines(element, bf16),
        "TEXT": text(element, bf16) if native else Text(),
    }
    plan = schedule(m, n, k, form, group, bf16)
    if isinstance(plan, Few):
        grid = (triton.cdiv(n, 16 * plan.tall), triton.cdiv(m, 8 * plan.tokens))
        constants |= {"EVEN": k % 64 == 0, "WARPS": plan.warps, "TALL": plan.tall, "TOKENS": plan.tokens}
        few: Any = linear_tiles[grid]
        few(x.view(torch.int32), *given, *then, m, n, k, **constants, AHEAD=plan.ahead, num_warps=plan.warps)
        return
    sums = None
    if zero is not None and (not group or (element.bits == 8 and bf16)):
        sums = x.view(m, -1, group or k).sum(-1, dtype=torch.float32)
    elif zero is not None:
        constants["LINES"] = ()
    blocks = triton.cdiv(n, plan.rows) * triton.cdiv(m, plan.tokens)
    partial, count = None, None
    if plan.splits > 1:
        partial = out.new_empty(plan.splits, m, n, dtype=torch.float32)
        count = _counters(blocks, x.device)
    many: Any = linear_dots[(blocks, plan.splits)]
    many(
        *(x if native else x.float(), *given, sums, *then, partial, count, m, n, k),
        **constants,
        EVEN=k % plan.columns == 0,
        ROWS=plan.rows,
        TOKENS=plan.tokens,
        COLUMNS=plan.columns,
        SPLITS=plan.splits,
        EXACT=plan.exact,
        STAGES=plan.stages,
        BAND=plan.band,
        num_warps=plan.warps,
    )


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
# Counters of calls that are captured in graphs, which may run beside anything: what is left for each device.
_SPARE: dict[torch.device, Tensor] = {}
_STOCK = 1 << 16


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
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _COUNTERS or _COUNTERS[key].numel() < count:
        _COUNTERS[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _COUNTERS[key][:count]


@dataclass(frozen=True, slots=True)
class Few:
    """How `linear_tiles` runs: warps of a program, tiles of rows and of tokens, and tiles read ahead."""

    warps: int
    tall: int
    tokens: int
    ahead: int


@dataclass(frozen=True, slots=True)
class Many:
    """How `linear_dots` runs: a program's rows, tokens, columns at a time and warps; parts of K; see there."""

    rows: int
    tokens: int
    columns: int
    warps: int
    splits: int
    exact: bool
    stages: int
    band: int


def schedule(m: int, n: int, k: int, form: Spec, group: int, bf16: bool) -> Few | Many:  # noqa: FBT001 - of two types
    """How a product of m tokens runs."""
    scale, element = form.scale, form.element
    # Whether a scale times a code is a number of the inputs' type, and whether the scale is.
    bits = element.mantissa + 1 if element.kind == "float" else element.bits
    product = scale.bits == 8 and bits + scale.mantissa <= (8 if bf16 else 11) and (bf16 or not scale.powers_of_two)
    fits = product or (scale.bits == 16 and (scale.mantissa == 7) == bf16)
    wide = form.zero and element.bits == 8 and bf16
    if m <= 8 or (not fits and group in (16, 32)):
        tokens = min(triton.next_power_of_2(triton.cdiv(m, 8)), 8)
        return Few(8, 2 if tokens > 2 else 1, tokens, 2 if tokens <= 2 else 1)
    exact = bool(group) and (not fits or (wide and group > 0) or (m <= 64 and not product)) and group >= 64
    columns = 128 if not group or group % 128 == 0 or (not exact and group <= 64) else 64
    tokens = 16 if m <= 16 else 32 if m <= 32 else 64 if m <= 64 or exact else 128
    rows, warps = (64, 4) if m <= 32 else (128, 8)
    if m > 64 and not exact:
        columns = 64 if columns == 128 and group != 128 else columns
        columns = 64
    blocks = triton.cdiv(n, rows) * triton.cdiv(m, tokens)
    splits = min(max(triton.next_power_of_2(264 // max(blocks, 1)), 1), 8) if m <= 64 else 1
    while splits > 1 and triton.cdiv(k, columns) < 2 * splits:
        splits //= 2
    return Many(rows, tokens, columns, warps, splits, exact, 4, 8)
