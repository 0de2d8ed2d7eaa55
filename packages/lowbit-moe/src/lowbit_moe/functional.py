"""Differentiable products whose operands are rounded in forward and backward; weights stay plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit import FormatError, QuantizedTensor
from lowbit.backends import under_autocast
from lowbit.experts import grouped_product
from lowbit.format import Format
from lowbit_moe.gathering import CodesTravel, GatheredWeight, plain
from lowbit_moe.operands import Operand, Rounded, as_dtype, counted, filled, grouped, product
from lowbit_moe.recipe import BF16, Operands, TrainRecipe
from lowbit_moe.routing import Routing, over_tokens

# What torch's own linear gives its shape by: no view, of which FSDP warns.
_unsafe_view: Any = torch.ops.aten._unsafe_view.default  # noqa: SLF001 - an operator's name


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, recipe: TrainRecipe | str = "MXFP8") -> Tensor:
    """`x @ weight.T + bias` (.., N) of x (.., K) and weight (N, K), as `recipe` says, and so its gradients.

    Autograd keeps the weight and what wgrad takes of x, which is x rounded where that product is. The result has the
    dtype of x, or autocast's, to which gradients are rounded, too, before they take that of what they are of. An x that
    is a QuantizedTensor already, of the forward product's format, is multiplied as it is.

    Raises:
        FormatError: shapes do not fit, x or weight is no floating-point tensor, or x is rounded to another format.
        NoKernelError: the recipe's kernels are "native", and this machine lacks one.
    """
    # Of no numbers there are no scales, and nothing is lost.
    recipe = TrainRecipe.parse(recipe) if x.numel() else BF16
    x, weight = under_autocast(x), plain(weight) if isinstance(weight, CodesTravel) else weight
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise FormatError(
            f"linear takes x (.., K) and weight (N, K); these are {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    _check_operands(x, weight, recipe)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise FormatError(f"bias is (N,) = ({weight.shape[0]},); this is {tuple(bias.shape)}")
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = _Layer.apply(rows, weight, bias, None, recipe, 1, _seed(x, recipe), None, None, torch.is_grad_enabled())
    return _unsafe_view(out, [*x.shape[:-1], weight.shape[0]])


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    *,
    recipe: TrainRecipe | str = "MXFP8",
    bias: Tensor | None = None,
    align: str | None = "auto",
    routing: Routing | None = None,
) -> Tensor:
    """Rows of x (M, K) each by the `weight[e].T` of their group, plus `bias[e]`, (M, N), as `recipe` says.

    `weight` (E, N, K); `bias` (E, N). Groups follow one another and end at `offs` (E,) int32; some may be empty, and
    rows from the last end on become zeros. Wgrad sums over blocks of a group's rows, which must not be another's:
    `align="auto"` moves groups apart as the recipe needs, on their way to codes; None says that each begins and
    ends at a multiple of `recipe.align` already. With a `routing`, x (T, K) are tokens, and rows are gathered from them
    while they are rounded. An x that is a QuantizedTensor already, of the forward product's format, is multiplied as it
    is. Nothing waits for the device.

    Raises:
        FormatError: shapes do not fit, a tensor is not floating-point, offs are not int32, align is another, or x is
            rounded to another format.
        NoKernelError: the recipe's kernels are "native", and this machine lacks one.
    """
    # Of no numbers there are no scales, and nothing is lost.
    recipe = TrainRecipe.parse(recipe) if x.numel() else BF16
    x = under_autocast(x)
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise FormatError(
            f"grouped_mm takes x (M, K) and weight (E, N, K); these are {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    _check_operands(x, weight, recipe)
    if offs.shape != weight.shape[:1] or offs.dtype != torch.int32:
        raise FormatError(f"offs are (E,) = ({weight.shape[0]},) int32; these are {tuple(offs.shape)} {offs.dtype}")
    if bias is not None and bias.shape != weight.shape[:2]:
        raise FormatError(f"bias is (E, N) = {tuple(weight.shape[:2])}; this is {tuple(bias.shape)}")
    if align not in {"auto", None}:
        raise FormatError(f"align={align!r} is neither 'auto' nor None")
    apart = recipe.align if align == "auto" else 1
    tokens, places = (None, None) if routing is None else (routing.tokens, routing.places)
    seed, watched = _seed(x, recipe), torch.is_grad_enabled()
    return _Layer.apply(x, weight, bias, offs, recipe, apart, seed, tokens, places, watched)


def _rows_of(values: Tensor, offs: Tensor, rows: int) -> Tensor:
    """What of `values` (E, N) belongs to each of `rows` rows in groups that end at `offs`; zeros beyond: (rows, N)."""
    return torch.nn.functional.pad(values, (0, 0, 0, 1)).index_select(0, _groups(offs, rows))


def _sums_of(rows: Tensor, offs: Tensor) -> Tensor:
    """Sums (E, N) of the rows of each group, in one order."""
    experts = torch.arange(offs.shape[0], device=offs.device)
    return (_groups(offs, rows.shape[0]) == experts.unsqueeze(1)).to(rows.dtype) @ rows


def _groups(offs: Tensor, rows: int) -> Tensor:
    return torch.searchsorted(offs, torch.arange(rows, device=offs.device, dtype=torch.int32), right=True)


def _check_operands(x: Tensor, weight: Tensor, recipe: TrainRecipe) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize not in {2, 4}:
            raise FormatError(f"{name} is float32, bfloat16 or float16; this is {tensor.dtype}")
    if isinstance(weight, QuantizedTensor):
        raise FormatError(f"weight is quantized, to {weight.storage_layout.format}; training needs a plain one")
    if isinstance(x, QuantizedTensor) and x.numel():
        found, takes = x.storage_layout.format, "numbers that are not rounded"
        if recipe.forward is not None:
            takes = f"{recipe.forward.left} along rows of a multiple of {recipe.forward.align} numbers"
            along = x.permutation == tuple(range(x.dim()))
            if along and found == str(recipe.forward.left) and x.shape[-1] % recipe.forward.align == 0:
                return
        raise FormatError(f"x {tuple(x.shape)} is rounded to {found}; {recipe.name} takes {takes}")


def _seed(x: Tensor, recipe: TrainRecipe) -> Tensor | None:
    """A seed from torch's generator, which recomputation in backward repeats; None where nothing is drawn."""
    if recipe.gradient == "nearest" or not torch.is_grad_enabled():
        return None
    return torch.randint(1 << 62, (), device=x.device)


class _Layer(torch.autograd.Function):
    """x (M, K) by weight (N, K), or with the ends `offs` (E,) of groups of rows by weight (E, N, K)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        offs: Tensor | None,
        recipe: TrainRecipe,
        apart: int,
        seed: Tensor | None,
        tokens: Tensor | None,
        places: Tensor | None,
        watched: bool,  # noqa: FBT001 - autograd takes arguments by their places
    ) -> Tensor:
        """Multiply, and keep what backward takes, if there is one."""
        of_x, of_weight = (None, None) if recipe.forward is None else (recipe.forward.left, recipe.forward.right)
        learns = watched and ctx.needs_input_grad[1]
        kept = None if recipe.wgrad is None or not learns else recipe.wgrad.right
        with torch.autocast(x.device.type, enabled=False):
            ways = _Ways(recipe, offs, apart, recipe.forward)
            if isinstance(x, QuantizedTensor) and of_x is None:
                x = x.dequantize()
            by_row, by_column = ways.of(x, of_x, kept, Rounded(recipe.mode), tokens)
            if by_row is None or of_weight is None:
                out = _plain(_gathered(x, tokens), as_dtype(weight, x.dtype), offs)
                if bias is not None and offs is None:
                    out = out + as_dtype(bias, out.dtype)
            else:
                rows = x.shape[0] if tokens is None else tokens.shape[0]
                out = ways.by_row(by_row, ways.weight(weight, of_weight), bias, x.dtype, rows)
            if bias is not None and offs is not None:
                out = out + as_dtype(_rows_of(bias, offs, out.shape[0]), out.dtype)
        plain = x if by_column is None and learns else None
        ctx.recipe, ctx.apart, ctx.dtype, ctx.kept = recipe, apart, x.dtype, None
        saved: tuple[Tensor | None, ...] = (plain,)
        if by_column is not None:
            ctx.kept, saved = by_column[1:], by_column.parts
        ctx.biased = bias is not None
        ctx.save_for_backward(weight, offs, seed, tokens, places, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Gradients to x, the weight and the bias."""
        (grad,), (weight, offs, seed, tokens, places, *saved) = grads, ctx.saved_tensors
        recipe: TrainRecipe = ctx.recipe
        to_x, to_weight, to_bias = None, None, None
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        left = None if recipe.dgrad is None or not wants_x else recipe.dgrad.left
        right = None if recipe.wgrad is None or not wants_weight else recipe.wgrad.left
        with torch.autocast(grad.device.type, enabled=False):
            ways = _Ways(recipe, offs, ctx.apart, recipe.dgrad)
            by_row, by_column = ways.of(grad, left, right, Rounded(recipe.mode, recipe.gradient, seed))
            if by_row is not None and recipe.dgrad is not None:
                to_x = ways.by_row(by_row, ways.turned(weight, recipe.dgrad.right), None, ctx.dtype, grad.shape[0])
            elif wants_x:
                to_x = _plain(grad, weight.mT.to(grad.dtype), offs).to(ctx.dtype)
            if to_x is not None and places is not None:
                to_x = over_tokens(to_x, places)
            if by_column is not None:
                found = ways.by_column(by_column, Operand(tuple(saved), *ctx.kept), grad.dtype)
                # Rows and columns that were filled up have gradients of zero.
                to_weight = found[..., : weight.shape[-2], : weight.shape[-1]].to(weight.dtype)
            elif wants_weight:
                (x,) = saved
                x = x.dequantize() if isinstance(x, QuantizedTensor) else x
                to_weight = _plain(grad.mT, _gathered(x, tokens).mT, offs).to(weight.dtype)
            if ctx.biased and wants_bias:
                to_bias = grad.sum(0) if offs is None else _sums_of(grad, offs)
        return to_x, to_weight, to_bias, *(None,) * 7


class _Ways:
    """Both ways in which a matrix of tokens is rounded, along its rows and along its columns, and their products.

    Rows stay where they are, whose groups may begin anywhere; columns are moved apart.
    """

    def __init__(self, recipe: TrainRecipe, offs: Tensor | None, apart: int, along: Operands | None) -> None:
        self.recipe, self.offs, self.apart = recipe, offs, apart
        self.align = 1 if along is None else along.align
        self.ends = offs

    def of(
        self, x: Tensor, rows: Format | None, columns: Format | None, how: Rounded, tokens: Tensor | None = None
    ) -> tuple[Operand | None, Operand | None]:
        """`x` (M, K) rounded along K, and `x.mT` along M, in groups that are apart; None where there is no format.

        With `tokens` (M,) they are `x[tokens]`.
        """
        if isinstance(x, QuantizedTensor):
            by_column = None if columns is None else self.of(x.dequantize(), None, columns, how, tokens)[1]
            return None if rows is None else _codes(x, rows, tokens), by_column
        rotation, deep = self.recipe.rotation, self.recipe.align
        x = filled(x, self.align) if rows is not None else x
        offs = self.offs if self.apart > 1 or tokens is not None else None
        if rows is not None and columns is not None and not rotation and offs is None:
            return how.both(x, rows, self.align, columns, deep)
        if rows is None:
            by_row = None
        elif offs is not None and tokens is not None:
            by_row = how.moved(x, tokens, offs, rows)
        else:
            by_row = how.along(x, rows, self.align)
        if columns is None:
            return by_row, None
        if offs is not None and not rotation:
            by_column, self.ends = how.apart(x, tokens, offs, self.apart, columns)
            return by_row, by_column
        if offs is not None:
            x, self.ends = torch.ops.lowbit.pad_groups(x, tokens, offs, self.apart)
        return by_row, how.rotated(x.mT, columns, deep, rotation) if rotation else how.along(x.mT, columns, deep)

    def weight(self, weight: Tensor, fmt: Format) -> Operand:
        """A weight (.., N, K) rounded along K."""
        if isinstance(weight, GatheredWeight):
            return weight.rows
        return Rounded(self.recipe.mode).along(weight, fmt, self.align)

    def turned(self, weight: Tensor, fmt: Format) -> Operand:
        """`weight.mT` (.., K, N) rounded along N."""
        if isinstance(weight, GatheredWeight):
            return weight.columns
        return Rounded(self.recipe.mode).along(weight.mT, fmt, self.align)

    def by_row(self, a: Operand, b: Operand, bias: Tensor | None, dtype: torch.dtype, count: int) -> Tensor:
        """The product of `count` tokens, which zeros may follow, and a weight, or their experts' weights."""
        if self.offs is None:
            out = product(a, b, bias, dtype, self.recipe.kernels)
        else:
            out = grouped(a, b, self.offs, dtype, self.recipe.kernels)
        # No view: see `as_dtype`.
        return out if out.shape[0] == count else out[:count].clone()

    def by_column(self, a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
        """The product of what is summed over tokens, or over each group's."""
        if self.ends is not None:
            return grouped(a, b, self.ends, dtype, self.recipe.kernels)
        return product(a, b, None, dtype, self.recipe.kernels)


def _codes(x: QuantizedTensor, fmt: Format, tokens: Tensor | None) -> Operand:
    """What `x` (M, K) in `fmt`, or `x[tokens]`, holds."""
    codes, scale, _, whole = x.stored
    codes = _gathered_bytes(codes, tokens)
    if fmt.block[0] == 1:
        scale = _gathered_bytes(scale, tokens)
    return Operand((codes, scale, whole), str(fmt), x.shape[1])


def _gathered_bytes(part: Tensor, tokens: Tensor | None) -> Tensor:
    # Not every 8-bit float can be gathered.
    return part if tokens is None else part.view(torch.uint8).index_select(0, tokens).view(part.dtype)


def _gathered(x: Tensor, tokens: Tensor | None) -> Tensor:
    return x if tokens is None else x.index_select(0, tokens)


def _plain(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    counted("plain")
    return a @ b.mT if offs is None else grouped_product(a, b, offs)
