"""What the operators refuse: arguments whose shapes, dtypes, devices or formats do not belong together.

Kernels read and write by these, and broadcasting would make wrong values of some without a word. All that is looked at
is hashable, so it is looked at once, and a call like an earlier one costs a lookup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import SymInt, Tensor

from lowbit.activation import Activation
from lowbit.attention import Scheme, check_devices, check_heads
from lowbit.element import E8M0
from lowbit.errors import FormatError
from lowbit.format import Format
from lowbit.groups import check_groups
from lowbit.numerics import Scales, check_data, check_scales, check_tensor_scale, check_use
from lowbit.varlen import check_packed

# Ends of groups are int32.
_MOST_ROWS = (1 << 31) - 1
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class _Like:
    """What is looked at of a tensor; stands for it in checks that ask for no more."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def transpose(self, a: int, b: int) -> _Like:
        sizes = list(self.shape)
        sizes[a], sizes[b] = sizes[b], sizes[a]
        return replace(self, shape=torch.Size(sizes))

    def unsqueeze(self, _: int) -> _Like:
        return replace(self, shape=torch.Size((1, *self.shape)))

    def __len__(self) -> int:
        return self.shape[0]


def check_call(op: str, names: tuple[str, ...], needed: tuple[str, ...], args: Sequence[Any]) -> None:
    """Refuse arguments of an operator, by `names`, of which `needed` are tensors that cannot be left out.

    Raises:
        FormatError: one is missing, or they do not belong together.
    """
    told = tuple((each.shape, each.dtype, each.device) if isinstance(each, Tensor) else each for each in args)
    if any(isinstance(size, SymInt) for each in told if isinstance(each, tuple) for size in each[0]):
        # Sizes that a compiler leaves open; they are looked at when the call is made.
        return
    _check(op, names, needed, told)


@lru_cache(maxsize=4096)
def _check(op: str, names: tuple[str, ...], needed: tuple[str, ...], told: tuple[Any, ...]) -> None:
    given = dict.fromkeys(names) | dict(
        zip(names, (_Like(*each) if isinstance(each, tuple) else each for each in told), strict=False)
    )
    for name in needed:
        if given[name] is None:
            raise FormatError(f"{op} needs a tensor {name}, and None was given")
    # What has one value may stay on the host.
    check_devices(*(each for each in given.values() if isinstance(each, _Like) and each.shape))  # pyright: ignore[reportArgumentType]
    _OF[op](given)


def _quantize(given: dict[str, Any]) -> None:
    x, fmt = given["x"], given["format"] or given.get("other_format")
    _floats("x", x)
    for name in ("format", "other_format"):
        if given.get(name) is not None:
            Format.parse(given[name])
    if not x.dim():
        raise FormatError("x is a number; needed are 1 dimension or more")
    offset = given["seed_offset"]
    if offset is not None and (offset.dtype != torch.int64 or offset.shape):
        raise FormatError(f"seed_offset is {_told(offset)}; needed is torch.int64 of shape ()")
    if given.get("scale") is not None:
        _scales(given, "", tuple(x.shape))
    elif given.get("zero") is not None:
        raise FormatError("zero points are given without scales; give both, or neither")
    elif given["tensor_scale"] is not None and fmt is not None:
        formats = [Format.parse(spec) for spec in (given["format"], given.get("other_format")) if spec is not None]
        of = next((each for each in formats if each.tensor_scale), formats[0])
        check_tensor_scale(given["tensor_scale"], of, tuple(x.shape))


def _quantize_groups(given: dict[str, Any]) -> None:
    _groups(given)
    _quantize(given)


def _groups(given: dict[str, Any]) -> None:
    check_groups(given["x"], given["index"], given["offs"], given["align"])


def _unpad(given: dict[str, Any]) -> None:
    check_groups(given["x"], None, given["offs"], given["align"])
    if not 0 <= given["rows"] <= _MOST_ROWS:
        raise FormatError(f"rows={given['rows']}; needed is how many rows there were before padding, 0 to 2^31 - 1")


def _dequantize(given: dict[str, Any]) -> None:
    _weight(given, "", given["qdata"].dim(), given["k"])
    _result(given)


def _linear(given: dict[str, Any]) -> None:
    x = given["x"]
    _floats("x", x)
    if not x.dim():
        raise FormatError("x is a number; needed is (.., K)")
    n = _weight(given, "", 2, x.shape[-1])
    _bias(given["bias"], n)
    _activation(given, x.shape[-1])


def _grouped_mm(given: dict[str, Any]) -> None:
    x, offs = given["x"], given["offs"]
    _floats("x", x)
    if x.dim() != 2:
        raise FormatError(f"x has shape {tuple(x.shape)}; needed is (M, K)")
    _weight(given, "", 3, x.shape[-1])
    _ends(offs, given["qdata"].shape[0])
    _activation(given, x.shape[-1])


def _scaled(given: dict[str, Any], rank: int = 2) -> None:
    _weight(given, "a_", 2, given["k"])
    n = _weight(given, "b_", rank, given["k"])
    _bias(given.get("bias"), n)
    _result(given)


def _scaled_grouped_mm(given: dict[str, Any]) -> None:
    _scaled(given, 3)
    _ends(given["offs"], given["b_qdata"].shape[0])


def _scaled_grouped_mm_k(given: dict[str, Any]) -> None:
    _scaled(given)
    _ends(given["offs"], None)


def _embedding(given: dict[str, Any]) -> None:
    _weight(given, "", 2, given["k"])
    _result(given)
    if given["ids"].dtype not in _INTEGERS:
        raise FormatError(f"ids are {given['ids'].dtype}; needed are torch.int32 or torch.int64")


def _embedding_bag(given: dict[str, Any]) -> None:
    _embedding(given)
    ids, offsets, by = given["ids"], given["offsets"], given["per_sample_weights"]
    if ids.dim() != 1 or offsets.dim() != 1 or offsets.dtype not in _INTEGERS:
        raise FormatError(f"ids are {_told(ids)} and offsets {_told(offsets)}; needed are integers (M,) and (B,)")
    if by is not None and (by.shape != ids.shape or not by.is_floating_point()):
        raise FormatError(f"per_sample_weights are {_told(by)}; needed are floats {tuple(ids.shape)}, one an id")
    if given["mode"] not in ("sum", "mean", "max"):
        raise FormatError(f"mode {given['mode']!r} is unknown; use one of sum, mean, max")


def _attention(given: dict[str, Any]) -> None:
    q, window = given["q"], given["window"]
    heads = (q, given["k"], given["v"], given["mask"], Scheme.parse(given["scheme"]))
    check_heads(*heads, causal=given["causal"], window=window or None)
    cos, sin = given["cos"], given["sin"]
    if (cos is None) != (sin is None) or (cos is not None and (cos.shape != sin.shape or not cos.is_floating_point())):
        raise FormatError("rotary embeddings are two tables of one shape, cos and sin, of floats; give both or neither")
    wanted = (given["k"].shape[2], q.shape[3] // 2)
    if cos is not None and (
        tuple(cos.shape[-2:]) != wanted or cos.dim() > 3 or (cos.dim() == 3 and cos.shape[0] not in (1, q.shape[0]))
    ):
        raise FormatError(f"tables of rotary embeddings are {_told(cos)}; needed are (.., T, D / 2), here {wanted}")


def _varlen_attention(given: dict[str, Any]) -> None:
    tensors = (given["q"], given["k"], given["v"], given["cu_q"], given["cu_k"])
    window = given["window"] or None
    check_packed(*tensors, Scheme.parse(given["scheme"]), causal=given["causal"], window=window)


def _weight(given: dict[str, Any], prefix: str, rank: int, k: int) -> int:
    """Its rows, once its parts are those of a weight (.., N, K)."""
    data = given[f"{prefix}qdata"]
    if data.dim() != rank or not rank:
        raise FormatError(f"{prefix}qdata has shape {tuple(data.shape)}; needed are {max(rank, 1)} dimensions")
    check_data(data, Format.parse(given[f"{prefix}format"]), k)
    _scales(given, prefix, (*data.shape[:-1], k))
    return data.shape[-2] if rank > 1 else 1


def _scales(given: dict[str, Any], prefix: str, shape: tuple[int, ...]) -> None:
    fmt, scale = Format.parse(given[f"{prefix}format"]), given[f"{prefix}scale"]
    if scale.dtype == torch.uint8 and fmt.scale is E8M0:
        # In traced graphs they come as bytes.
        scale = replace(scale, dtype=E8M0.storage)
    check_scales(Scales(scale, given[f"{prefix}zero"], given[f"{prefix}tensor_scale"]), fmt, shape)


def _activation(given: dict[str, Any], k: int) -> None:
    if given["activation"]:
        activation = Activation.parse(given["activation"])
        if activation.scaling != "dynamic" and given["act_scale"] is None:
            raise FormatError(f"{activation} needs a stored scale, act_scale, and None was given")
    check_use(given["act_scale"], given["act_zero"], given["pre_scale"], k)


def _bias(bias: Any, n: int) -> None:
    if bias is not None and (tuple(bias.shape) != (n,) or not bias.is_floating_point()):
        raise FormatError(f"bias is {_told(bias)}; needed are floats ({n},), one a row of the weight")


def _ends(offs: Any, groups: int | None) -> None:
    if offs.dtype != torch.int32 or offs.dim() != 1 or (groups is not None and offs.shape[0] != groups):
        of = "E" if groups is None else groups
        raise FormatError(f"offs are {_told(offs)}; needed is torch.int32 ({of},), the end of each expert's rows")


def _result(given: dict[str, Any]) -> None:
    dtype = given["dtype"]
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise FormatError(f"dtype is {dtype}; needed is one of float32, float16, bfloat16 and float64")


def _floats(name: str, x: Any) -> None:
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise FormatError(f"{name} is {x.dtype}; needed is one of float32, float16, bfloat16 and float64")


def _told(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)}"


_OF: dict[str, Callable[[dict[str, Any]], None]] = {
    "quantize": _quantize,
    "quantize_blocked": _quantize,
    "quantize_rotated": _quantize,
    "quantize_both": _quantize,
    "quantize_groups": _quantize_groups,
    "dequantize": _dequantize,
    "linear": _linear,
    "grouped_mm": _grouped_mm,
    "scaled_mm": _scaled,
    "scaled_grouped_mm": _scaled_grouped_mm,
    "scaled_grouped_mm_k": _scaled_grouped_mm_k,
    "pad_groups": _groups,
    "unpad_groups": _unpad,
    "attention": _attention,
    "varlen_attention": _varlen_attention,
    "embedding": _embedding,
    "embedding_bag": _embedding_bag,
    # Both are checked beside what they are for, in `lowbit.key_values`.
    "cache_write": lambda _: None,
    "cached_attention": lambda _: None,
}
