"""Products with weights packed for 16-bit tensor cores: how they are packed, and what runs for how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from importlib import import_module
from typing import Any

import torch
import triton
from torch import Tensor

from lowbit.activation import Activation
from lowbit.backends import Call, Description
from lowbit.element import Element
from lowbit.errors import FormatError
from lowbit.format import Format
from lowbit.packing import pack as pack_codes
from lowbit.packing import unpack as unpack_codes
from lowbit.tensor import QuantizedTensor
from lowbit_kernels_cuda.compiling import told
from lowbit_kernels_cuda.dots import linear_dots
from lowbit_kernels_cuda.expanded import expand, row_factors
from lowbit_kernels_cuda.fragments import Text, lines, text
from lowbit_kernels_cuda.inputs import Inputs, Producer, overlaps, quantized, rounded
from lowbit_kernels_cuda.library import Side, by_library
from lowbit_kernels_cuda.lifts import is_lifted, lift, lifted, lowered
from lowbit_kernels_cuda.packed import meet_as_bytes
from lowbit_kernels_cuda.plans import Plan, choose, is_slower, plan_of_bytes, ratios, slower_tokens
from lowbit_kernels_cuda.programs import blocks_of_tokens
from lowbit_kernels_cuda.scaling import raw, spec
from lowbit_kernels_cuda.weights import (
    ROWS,
    pack_scales,
    pack_tiles,
    parts,
    repeated,
    side_by_side,
    unpack_scales,
    unpack_tiles,
)

# Up to so many tokens, as experts have, 16-bit tensor cores are as fast as those for 8-bit floats.
_FEW = 32
# From so many on, expanding a weight takes less time than torch's product saves; with groups, whose product is turned.
_MANY, _MANY_GROUPS = 512, 1024


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """Words of tiles, scales and zero points as a lane reads them, what else the weight has, and its `row_factors`.

    Raises:
        FormatError: an 8-bit float, or a scale, is no number, or a scale is negative.
    """
    fmt, element = weight.format, weight.format.element
    k = weight.canonical_shape[-1]
    codes = unpack_codes(weight.qdata.view(torch.uint8), element, k) if element.packed else weight.qdata
    if element.has_nan and not bool(torch.isfinite(weight.qdata.float()).all()):
        msg = f"the weight has codes of {element.name} that are no numbers; find out where they come from"
        raise FormatError(msg)
    scale = weight.scale
    if scale.itemsize == 1 and not bool((torch.isfinite(scale.float()) & (scale.float() >= 0)).all()):
        msg = "the weight has scales that are no numbers, or negative ones; find out where they come from"
        raise FormatError(msg)
    by_bytes = weight.activation is not None and meet_as_bytes(weight.activation.format, fmt)
    above = _above_least(side_by_side(codes) if by_bytes else codes, element)
    packed = [*pack_tiles(_tall(above), element), _across(lifted(scale, codes, fmt), weight)]
    if weight.zero is not None:
        packed.append(_across(_above_least(weight.zero, element).to(torch.int16), weight))
    rest = [weight.tensor_scale, weight.act_scale, weight.act_zero, weight.pre_scale]
    if by_bytes and element.kind == "float" and codes.dim() == 2:
        rest.append(row_factors(scale, codes))
    return (*packed, *(part for part in rest if part is not None))


def _above_least(codes: Tensor, element: Element) -> Tensor:
    """Uint8 of codes, integers as if the least were 0."""
    least = 1 << (element.bits - 1) if element.kind == "int" and element.signed else 0
    return (codes.view(torch.uint8) & ((1 << element.bits) - 1)) ^ least


def _tall(rows: Tensor) -> Tensor:
    """(rows of all experts, columns), each expert's from a tile of its own on; of one matrix, itself."""
    return rows if rows.dim() == 2 else torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % ROWS)).flatten(0, 1)


def _across(part: Tensor, weight: QuantizedTensor) -> Tensor:
    """Scales or zero points as the kernels read them, those of several rows, or experts, once for each."""
    shape = weight.canonical_shape
    *blocks, group = weight.format.block_for(len(shape))
    return pack_scales(_tall(repeated(raw(part), blocks, shape)), group).view(part.dtype)


def _words(part: Tensor) -> Tensor:
    """What a lane reads of scales or zero points, in words of at most 32 bits."""
    size = 2 * part.shape[-1] * part.itemsize
    return raw(part).view(-1).view(torch.int16 if size == 2 else torch.int32)


def unpack(packed: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """Undo `pack`."""
    fmt = Format.parse(description.layout.format)
    *experts, n, k = description.canonical_shape
    element, count = fmt.element, len(parts(fmt.element.bits))
    high = n + -n % ROWS if experts else n

    def each_of(tall: Tensor) -> Tensor:
        return tall.unflatten(0, (experts[0], high))[:, :n] if experts else tall

    def codes_of(above: Tensor) -> Tensor:
        if not (element.kind == "int" and element.signed):
            return above
        shift = 8 - element.bits
        return (above ^ (1 << (element.bits - 1))).view(torch.int8) << shift >> shift

    rows = high * (experts[0] if experts else 1)
    activation = description.layout.activation
    if activation and meet_as_bytes(Activation.parse(activation).format, fmt):
        tall = side_by_side(unpack_tiles(packed[:count], element, rows, k + -k % 16), back=True)[:, :k]
    else:
        tall = unpack_tiles(packed[:count], element, rows, k)
    codes = codes_of(each_of(tall))
    found = {"qdata": pack_codes(codes, element) if element.packed else codes.view(element.storage)}
    *blocks, group = fmt.block_for(len(description.shape))
    firsts = tuple(slice(None, None, block or size) for block, size in zip(blocks, (*experts, n), strict=True))
    for name, part in zip(description.names[1:], packed[count:], strict=False):
        if name in {"scale", "zero"}:
            each = each_of(unpack_scales(raw(part), rows, -(-k // group) if group else 1))[firsts].contiguous()
            if name == "zero":
                assert fmt.zero is not None
                each = codes_of(each.to(torch.uint8)).view(fmt.zero.code_dtype)
            if name == "scale":
                each = (lowered(each, fmt) if is_lifted(part, fmt) else each).view(fmt.scale.storage)
            found[name] = each
        else:
            found[name] = part
    return found


def product(
    x: Tensor,
    packed: Sequence[Tensor],
    names: Sequence[str],
    spec_: str,
    activation: str,
    shape: Sequence[int],
    bias: Tensor | None,
    offs: Tensor | None,
    values: Tensor | None = None,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """`x @ weight.T + bias` of what `pack` made of a weight of `shape` with the inner tensors `names` beside its codes.

    With an activation, x is rounded first. The tokens of each expert end at `offs` where the weight is (E, N, K). Plain
    `values` are used where that is faster.
    """
    n, k = shape[-2:]
    weight = Weight(packed, names, Format.parse(spec_), n, k)
    fmt, named = weight.fmt, weight.named
    if "pre_scale" in named:
        x = x * named["pre_scale"].to(x.dtype)
    if values is not None and is_slower(_ratios(fmt, x.dtype, n, k, x.device), x.numel() // k):
        return torch.nn.functional.linear(x, values, bias)
    tokens = x.reshape(-1, k).contiguous()
    out = x.new_empty(len(tokens), n)
    if out.numel():
        # Before inputs are rounded: products read it while they wait for those.
        ends = None if offs is None else offs.to(torch.int32).contiguous()
        if activation:
            how = Activation.parse(activation)
            use, many = (how, named.get("act_scale"), named.get("act_zero")), weight.expands(bias, x.dtype)
            each = len(tokens) if offs is None else triton.cdiv(len(tokens), min(len(tokens), len(offs)))
            as_codes = _as_codes(how, fmt, each, k, x.device, expands=many and offs is None)
            codes = plan.kind.bytes if plan else as_codes
            if codes:
                found, scale, _ = quantized(tokens, *use)
                inputs = Inputs(found, scale.view(-1), exact=True)
            else:
                inputs = rounded(tokens, *use, moved=meet_as_bytes(how.format, fmt))
        else:
            # Sixteen bytes are copied at a time.
            inputs, many = Inputs(tokens.clone() if tokens.data_ptr() % 16 else tokens), False
        out = _multiply(inputs, weight, bias, out, ends, plan, expands=many)
    return out.view(*x.shape[:-1], n)


def rounded_once(
    x: Tensor,
    spec_: str,
    activation: str,
    act_scale: Tensor | None,
    act_zero: Tensor | None,
    producer: Producer,
    *,
    expands: bool,
) -> tuple[Tensor, Tensor | None, None]:
    """Bytes (M, 2 K) and scales of x (M, K) rounded for several weights: 16-bit floats, or in their place codes."""
    (m, k), fmt, how = x.shape, Format.parse(spec_), Activation.parse(activation)
    values = x.new_empty(m, 2 * k, dtype=torch.uint8)
    out, codes = _within(values, k, how, fmt, expands=expands)
    moved = meet_as_bytes(how.format, fmt)
    inputs = rounded(x, how, act_scale, act_zero, moved=moved and not codes, out=out, codes=codes, producer=producer)
    return values, inputs.scale, None


def several(
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    packed: Sequence[Sequence[Tensor]],
    names: Sequence[str],
    spec_: str,
    activation: str,
    rows: Sequence[int],
    k: int,
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    expands: bool,
) -> list[Tensor]:
    """`product` of inputs and each of several weights (N, K); with an activation, of what `rounded_once` gave."""
    del zero
    fmt = Format.parse(spec_)
    weights = [Weight(each, names, fmt, n, k) for each, n in zip(packed, rows, strict=True)]
    outs = [torch.empty(len(values), n, dtype=dtype, device=values.device) for n in rows]
    if not activation:
        inputs = Inputs(values.clone() if values.data_ptr() % 16 else values)
    else:
        how = Activation.parse(activation)
        x, codes = _within(values, k, how, fmt, expands=expands)
        if how.scaling == "static":
            scale = how.stored(weights[0].named.get("act_scale")).float().view(1)
        span = 0 if codes or scale is None or scale.dim() == 1 else how.format.block_for(2)[-1]
        inputs = Inputs(x, scale, span, exact=True)
    if inputs.values.itemsize > 1 and len(weights) > 1:
        plan = _scheduled(inputs, weights[0], sum(rows), 0)
        if not plan.kind.depth:
            _launch(inputs, weights, biases, outs, None, plan)
            return outs
    return [
        _multiply(inputs, weight, bias, out, None, None, expands=expands)
        for weight, bias, out in zip(weights, biases, outs, strict=True)
    ]


def _within(values: Tensor, k: int, how: Activation, fmt: Format, *, expands: bool) -> tuple[Tensor, bool]:
    """The inputs (M, K) that are in bytes (M, 2 K), and whether they are codes."""
    if _as_codes(how, fmt, len(values), k, values.device, expands=expands):
        return values.view(-1)[: len(values) * k].view(how.format.element.storage).view(-1, k), True
    return values.view(torch.bfloat16), False


@dataclass(frozen=True)
class Weight:
    """What `pack` made of a weight (N, K), or (E, N, K)."""

    packed: Sequence[Tensor]
    names: Sequence[str]
    fmt: Format
    n: int
    k: int

    @cached_property
    def words(self) -> tuple[Tensor, ...]:
        """Codes, as `pack_tiles` has them."""
        return tuple(self.packed[: len(parts(self.fmt.element.bits))])

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """What the weight has besides, by name."""
        return dict(zip(self.names, self.packed[len(self.words) :], strict=False))

    @property
    def factors(self) -> Tensor | None:
        """See `row_factors`."""
        rest = self.packed[len(self.words) + len(self.names) :]
        return rest[0] if rest else None

    def expands(self, bias: Tensor | None, dtype: torch.dtype, *, factored: bool = False) -> bool:
        """Whether torch's product of 8-bit floats takes it, expanded, or would if floats were `factored`."""
        fits = dtype == torch.bfloat16 and self.n % 16 == 0 and (bias is None or bias.dtype == dtype)
        integers = self.fmt.element.kind == "int" and self.fmt.block_for(2)[-1] in {0, 128}
        return fits and (integers or (self.fmt.element.kind == "float" and (factored or self.factors is not None)))


def _many(fmt: Format, device: torch.device) -> int | None:
    """From how many tokens on a weight that `expands` is expanded; None: never on this GPU."""
    _, hopper, floats = _device(device)
    if fmt.element.kind == "int" and fmt.block_for(2)[-1]:
        return _MANY_GROUPS if hopper else None
    return _MANY if floats else None


def _as_codes(how: Activation, fmt: Format, m: int, k: int, device: torch.device, *, expands: bool) -> bool:
    """Whether m tokens meet a weight as 8-bit floats; if it `expands`, also many of them."""
    if not meet_as_bytes(how.format, fmt) or k % 16:
        return False
    many = _many(fmt, device) if expands else None
    few = _FEW + 1 if _device(device)[1] and fmt.element.kind == "int" else None
    return any(least is not None and m >= least for least in (few, many))


def _multiply(
    inputs: Inputs,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    offs: Tensor | None,
    plan: Plan | None,
    *,
    expands: bool,
) -> Tensor:
    """The product, in `out` or elsewhere."""
    fmt, named, codes = weight.fmt, weight.named, inputs.values
    expands = expands and offs is None and plan is None and codes.itemsize == 1
    many = _many(fmt, codes.device) if expands else None
    if many is not None and len(codes) >= many:
        assert inputs.scale is not None
        scale = named["scale"]
        by = lift(fmt) if is_lifted(scale, fmt) else 0
        rows, factors = expand(weight.words[0], scale, weight.factors, fmt, weight.n, weight.k, by)
        left = Side(codes, inputs.scale.view(-1, 1))
        if len(factors) > 1:
            of_groups = import_module("lowbit_kernels_cuda.hopper_blocks").of_groups
            return of_groups(left, Side(rows, factors), bias, out.dtype)
        return by_library(left, Side(rows, factors.T), bias, out.dtype, group=0, rows=1)
    _launch(inputs, [weight], [bias], [out], offs, plan)
    return out


def _scheduled(inputs: Inputs, weight: Weight, n: int, experts: int) -> Plan:
    """The plan for `inputs` and n rows of weights like this one."""
    x = inputs.values
    (m, k), fmt = x.shape, weight.fmt
    if x.itemsize == 1:
        return _one(plan_of_bytes(m, n, k, _device(x.device)[0], experts))
    lifted = is_lifted(weight.named["scale"], fmt)
    return schedule(
        *(fmt, x.dtype, m, n, k, x.device), lifted=lifted, experts=experts, exact=inputs.exact, span=inputs.span
    )


def _launch(
    inputs: Inputs,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    offs: Tensor | None,
    plan: Plan | None,
) -> None:
    """Products of inputs with a weight, or with several of a kind, whose plan is one for `linear_dots`."""
    (weight, *others), bias, out, x = weights, biases[0], outs[0], inputs.values
    fmt, words, named = weight.fmt, weight.words, weight.named
    (m, n), k, experts = out.shape, x.shape[1], 0 if offs is None else len(offs)
    scale, zero, whole = named["scale"], named.get("zero"), named.get("tensor_scale")
    large = is_lifted(scale, fmt)
    by_bytes = x.itemsize == 1
    dtype = torch.bfloat16 if by_bytes else x.dtype
    how = constants(fmt, dtype, x.device if x.is_cuda else None, lifted=large)
    plan = plan or _scheduled(inputs, weight, n, experts)
    kind = plan.kind
    sums = None
    if zero is not None and how["LINES"]:
        sums = _sums(inputs, min(how["GROUP"], kind.columns) or k)
    blocks = sum(triton.cdiv(each.n, kind.rows) for each in weights) * blocks_of_tokens(m, kind.tokens, experts)
    rows = sum(each.n for each in weights)
    partial = out.new_empty(plan.splits * m * rows, dtype=torch.float32) if plan.splits > 1 else None
    count = counters(blocks * (2 if by_bytes else 1), x.device) if plan.splits > 1 else None
    of_tokens = (inputs.scale, int(inputs.scale is not None and inputs.scale.numel() > 1))
    then = (whole, *_strides(whole), None if bias is None else raw(bias), raw(out), partial, count, offs)
    constant = how | {"ROWS": kind.rows, "TOKENS": kind.tokens, "COLUMNS": kind.columns, "STAGES": kind.stages}
    constant |= {"SPLITS": plan.splits, "BAND": 8, "EXPERTS": experts, "num_warps": kind.warps}
    kernel: Any
    if by_bytes:
        kernel, given = import_module("lowbit_kernels_cuda.hopper_bytes").linear_wgmma_bytes, (raw(scale), None)
        tokens = import_module("lowbit_kernels_cuda.hopper").described(x, kind.tokens, kind.columns)
        constant = {name: value for name, value in constant.items() if name not in _SIXTEEN_BITS}
        # Half of a program's warps, which the others join.
        constant |= {"DEPTH": kind.depth, "launch_pdl": True, "num_warps": kind.warps // 2}
    elif kind.depth:
        hopper = import_module("lowbit_kernels_cuda.hopper")
        kernel, flat = hopper.linear_wgmma, not how["GROUP"]
        given = (raw(scale) if flat else _words(scale), zero if zero is None or flat else _words(zero))
        tokens = hopper.described(x, kind.tokens, kind.columns)
        constant["DEPTH"] = kind.depth
    else:
        kernel, given = linear_dots, _scales(weight)
        # A tuple of each thing that they have; of what they have not, an empty one.
        of_others = [
            (raw(o), each.n, *_scales(each), each.named.get("tensor_scale"), None if b is None else raw(b), *each.words)
            for each, b, o in zip(others, biases[1:], outs[1:], strict=True)
        ]
        then += (tuple(() if field[0] is None else field for field in zip(*of_others, strict=True)),)
        tokens = x if x.is_cuda else x.float()
        constant |= {"EVEN": k % kind.columns == 0, "EXACT": kind.exact, "UNROLL": kind.unroll, "SPAN": inputs.span}
        constant["OVERLAPS"] = inputs.exact and overlaps(x.device)
        constant |= {"launch_pdl": True} if constant["OVERLAPS"] else {}
    # What is kept in caches by those who made it, so that identities are its own.
    key = id(how), id(plan), experts, bias is None, inputs.scale is None, inputs.span, len(others)
    first = key not in _RUN
    with told(f"{fmt} x {x.dtype} for blocks of {kind.tokens} tokens") if first and x.is_cuda else nullcontext():
        kernel[(blocks, plan.splits)](tokens, *of_tokens, words, *given, sums, *then, m, n, k, **constant)
    _RUN.add(key)


def _scales(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points in the words that a lane reads."""
    zero = weight.named.get("zero")
    return _words(weight.named["scale"]), None if zero is None else _words(zero)


def _sums(inputs: Inputs, width: int) -> Tensor:
    """Float32 (M, K / width) of inputs; of all columns, under the scales that products meet before they are summed."""
    m, k = inputs.values.shape

    def of(size: int) -> Tensor:
        return torch.nn.functional.pad(inputs.values, (0, -k % size)).view(m, -1, size).sum(-1, dtype=torch.float32)

    if inputs.span and width == k:
        assert inputs.scale is not None
        return (of(inputs.span) * inputs.scale).sum(-1)
    return of(width)


# Constants that say how codes become 16-bit floats.
_SIXTEEN_BITS = {"PARTS", "BF16", "LINES", "TEXT", "LIFT"}
# Kernels that ran before.
_RUN: set[tuple[int, int, int, bool, bool, int, int]] = set()


def _strides(tensor_scale: Tensor | None) -> tuple[int, int]:
    """Steps from row to row, and from expert to expert."""
    if tensor_scale is None:
        return 0, 0
    rows = tensor_scale.shape[-2]
    return int(rows > 1), rows if tensor_scale.shape[:-2].numel() > 1 else 0


@lru_cache(maxsize=1024)
def constants(fmt: Format, dtype: torch.dtype, device: torch.device | None, *, lifted: bool = False) -> dict[str, Any]:
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
        "LIFT": lift(fmt) if lifted else 0,
        # What sums are multiplied by in the end.
        "AFTER": 2.0 ** lift(fmt) if lifted and bf16 and not fmt.scale.powers_of_two else 1.0,
    }


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}
# Counters of calls that are captured in graphs, which may run beside anything: what is left for each device.
_SPARE: dict[torch.device, Tensor] = {}
_STOCK = 1 << 16
# Graphs hold on to no memory from outside their own; they may run as long as the process does.
_KEPT: list[Tensor] = []


def counters(count: int, device: torch.device) -> Tensor:
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


@lru_cache(maxsize=1 << 14)
def schedule(
    fmt: Format,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    device: torch.device,
    *,
    lifted: bool,
    experts: int = 0,
    exact: bool = False,
    span: int = 0,
) -> Plan:
    """The plan for m tokens, of as many experts, on a device; see `choose`."""
    multiprocessors, hopper, _ = _device(device)
    how = constants(fmt, dtype, device if device.type == "cuda" else None, lifted=lifted)
    return _one(choose(fmt, how, m, n, k, multiprocessors, experts, hopper=hopper, exact=exact, span=span)[1])


@cache
def _one(plan: Plan) -> Plan:
    """Of equal plans one, which is known by its identity."""
    return plan


def how(call: Call) -> str | None:
    """How inputs and weights meet at how many tokens, in words; None: always in the same way."""
    fmt, k = call.format, call.k
    assert fmt is not None
    assert call.n is not None
    assert k is not None
    if call.activation is None or not meet_as_bytes(call.activation.format, fmt) or k % 16:
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    integer, many, hopper = fmt.element.kind == "int", _many(fmt, device), _device(device)[1]
    of_each = " an expert" if call.op == "grouped_mm" else ""
    words: list[str] = []
    if integer and hopper:
        words.append(
            f"beyond {_FEW} tokens{of_each} codes become 8-bit floats, up to them 16-bit ones, which is as fast there"
        )
    if many and not of_each and Weight((), (), fmt, call.n, k).expands(None, call.x_dtype, factored=True):
        near = "" if integer else ", if the scales of each row are within 2^11 of one another"
        words.append(f"from {many} tokens on the weight becomes 8-bit floats in memory for torch's scaled_mm{near}")
    return "; ".join(words) or None


def slower(call: Call) -> str | None:
    """At how many tokens a product is slower than with a plain weight, in words, or None."""
    assert call.format is not None
    assert call.n is not None
    assert call.k is not None
    device = torch.device(call.device, torch.cuda.current_device())
    words = slower_tokens(_ratios(call.format, call.x_dtype, call.n, call.k, device))
    return words if words is None or _device(device)[1] else f"{words} (a model: not measured on this GPU)"


@lru_cache(maxsize=4096)
def _ratios(fmt: Format, dtype: torch.dtype, n: int, k: int, device: torch.device) -> tuple[tuple[int, float], ...]:
    how = constants(fmt, dtype, device if device.type == "cuda" else None, lifted=bool(lift(fmt)))
    return ratios(fmt, how, n, k, hopper=_device(device)[1])


@cache
def _device(device: torch.device) -> tuple[int, bool, bool]:
    """Multiprocessors, whether it is Hopper, and whether it has tensor cores for 8-bit floats."""
    if device.type != "cuda":
        return 132, False, False
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.major == 9, (found.major, found.minor) >= (8, 9)
