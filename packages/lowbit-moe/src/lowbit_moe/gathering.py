"""Weights that `fully_shard` gathers as codes: each rank rounds its share, once, and bytes travel.

A recipe rounds a weight along both its dimensions. Where blocks are square, or one scale serves the whole, both have
the same codes, and a byte a number travels; by groups of one row there are two sets of codes, and two bytes do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from lowbit import RecipeError, UnsupportedOpError
from lowbit.format import WHOLE, Format
from lowbit.numerics import scale_for_amax
from lowbit_moe.operands import Operand, Rounded
from lowbit_moe.recipe import TrainRecipe

_C: Any = vars(torch)["_C"]
_aten: Any = torch.ops.aten
# What FSDP takes a parameter apart by, and what optimizers and checkpoints copy it by.
_PARTS = {
    *(_aten.detach.default, _aten.view.default, _aten.as_strided.default, _aten.split.Tensor, _aten.slice.Tensor),
    *(_aten.clone.default, _aten._to_copy.default, _aten._pin_memory.default),  # noqa: SLF001 - operators' names
    *(_aten.new_zeros.default, _aten.empty_like.default),
}


class GatheredWeight(torch.Tensor):
    """A weight (N, K) that is here as codes alone, those of its rows and those of its columns."""

    rows: Operand
    columns: Operand
    # What is in memory of its own, and not in what was gathered.
    owned: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, rows: Operand, columns: Operand, owned: tuple[Tensor, ...], shape: tuple[int, ...], dtype: torch.dtype
    ) -> GatheredWeight:
        """Wrap what was gathered."""
        made: Any = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch's documented constructor for subclasses
            cls, shape, dtype=dtype, device=rows.parts[0].device
        )
        made.rows, made.columns, made.owned = rows, columns, owned
        return made

    __torch_function__ = _C._disabled_torch_function_impl  # noqa: SLF001 - as torch documents subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What FSDP and autograd do to it: nothing to its numbers."""
        del types, kwargs
        given: GatheredWeight = args[0]
        if func in {_aten.detach.default, _aten.alias.default, _aten.as_strided.default}:
            return GatheredWeight.of(given.rows, given.columns, given.owned, tuple(given.shape), given.dtype)
        raise UnsupportedOpError(f"{func} of a weight that was gathered as codes; only lowbit_moe's layers take it")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Shape and formats."""
        del tensor_contents
        return f"GatheredWeight({tuple(self.shape)}, {self.rows.format}, {self.columns.format})"


class CodesTravel(torch.Tensor):
    """A parameter like any other, but for the two functions by which FSDP gathers it."""

    recipe: TrainRecipe

    @classmethod
    def of(cls, weight: Tensor, recipe: TrainRecipe) -> torch.nn.Parameter:
        """The same numbers, which will be gathered in the formats of `recipe`: see `refuses_gathering`."""
        # Of a class that knows the recipe: what FSDP makes of a tensor has its class and no more.
        kind: Any = type("CodesTravel", (cls,), {"recipe": recipe, "__module__": cls.__module__})
        return torch.nn.Parameter(_made(kind, weight.detach()), requires_grad=weight.requires_grad)

    __torch_function__ = _C._disabled_torch_function_impl  # noqa: SLF001 - as torch documents subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is a part or a copy is of this class, too; what is computed is plain."""
        del types
        with _C._DisableTorchDispatch():  # noqa: SLF001 - has no public name
            out = func(*args, **(kwargs or {}))
        if func not in _PARTS:
            return out
        return [_made(cls, each) for each in out] if isinstance(out, (list, tuple)) else _made(cls, out)

    def fsdp_pre_all_gather(self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any) -> Any:
        """Codes and scales of this rank's rows, and what else `fsdp_post_all_gather` needs.

        Raises:
            RecipeError: ranks have unlike numbers of rows, or such that end within a block.
        """
        del outer_stride, module, mp_policy
        right, down = _formats(self.recipe)
        rows, ranks, x = self.shape[0], mesh.size(), plain(self)
        step = max(1, right.block[0], 1 if _alike(right, down) else down.block[1])
        if rows * ranks != outer_size[0] or rows % step:
            raise RecipeError(
                f"a weight {tuple(outer_size)} on {ranks} ranks is not gathered as codes of {right} and {down}: needed "
                f"is a multiple of {ranks * step} rows; leave fp8_all_gather out"
            )
        how, whole, scale = Rounded(self.recipe.mode), right.block == (WHOLE, WHOLE), None
        if whole:
            most = x.abs().amax().to(torch.float32)
            distributed.all_reduce(most, distributed.ReduceOp.MAX, group=mesh.get_group())
            scale = scale_for_amax(most.view(1, 1), right, mode=self.recipe.mode).scale
        first = how.along(x, right, _align(self.recipe, 0), scale)
        inputs = [_bytes(part) for part in first.parts[:2]]
        if not _alike(right, down):
            inputs += [_bytes(part) for part in how.along(x.mT, down, 1).parts[:2]]
        # Every rank has the scale of the whole; and one rank alone takes no more than one input.
        travels = 1 if whole or ranks == 1 else len(inputs)
        return tuple(inputs[:travels]), (inputs[travels:], first.k)

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole weight, and the tensors of its own that it has."""
        del param_dtype
        (kept, k), (right, down), columns = metadata, _formats(self.recipe), self.shape[1]
        for part in kept:
            if part.device.type != "cpu":
                # FSDP lets go of it before this stream has read it, and makes the next weight's codes on another.
                part.record_stream(torch.accelerator.current_stream(part.device))
        codes, scale, *others = *outputs, *kept
        n, align = codes.shape[0], _align(self.recipe, 1)
        if others:
            # Rank by rank, and of each all columns.
            turned = [part.view(-1, columns, part.shape[1]).transpose(0, 1).reshape(columns, -1) for part in others]
        else:
            turned = [codes[:, :columns].mT, scale.mT]
        turned[0] = torch.nn.functional.pad(turned[0], (0, -n % align))
        owned = tuple(part.clone(memory_format=torch.contiguous_format) for part in (*turned, scale))
        if out is not None:
            held: Any = out
            for mine, new in zip(held.owned, owned, strict=True):
                # The same values come back for the backward pass, which must not take them for a change.
                with vars(torch.autograd)["_unsafe_preserve_version_counter"](mine):
                    mine.copy_(new)
            return None
        rows = Operand(_viewed(codes, owned[2], right), str(right), k)
        of_columns = Operand(_viewed(owned[0], owned[1], down), str(down), n + -n % align)
        return GatheredWeight.of(rows, of_columns, owned, (n, columns), self.dtype), owned


def _made(kind: Any, x: Tensor) -> Any:
    return torch.Tensor._make_subclass(kind, x)  # noqa: SLF001 # pyright: ignore - how subclasses are made


def plain(x: Tensor) -> Tensor:
    """`x` as a tensor of torch's own class, and so its gradient."""
    return _aten.alias.default(x)


def refuses_gathering(recipe: TrainRecipe) -> None:
    """Refuse a recipe whose weights are not gathered as codes.

    Raises:
        RecipeError: a product with the weight is not rounded to 8 bits, or a scale belongs to whole rows, or to a
            tensor beside others.
    """
    formats = () if recipe.forward is None or recipe.dgrad is None else _formats(recipe)
    wholes = [fmt for fmt in formats if fmt.block[1] == WHOLE and fmt.block[0] != WHOLE]
    if not formats or wholes or any(fmt.tensor_scale or fmt.element.bits != 8 for fmt in formats):
        raise RecipeError(
            f"weights of {recipe.name} are not gathered as codes; needed are 8-bit ones in forward and dgrad, with "
            "scales of blocks, or of whole tensors, as FP8_TENSOR, FP8_BLOCK and MXFP8 have them"
        )


def _formats(recipe: TrainRecipe) -> tuple[Format, Format]:
    assert recipe.forward is not None
    assert recipe.dgrad is not None
    return recipe.forward.right, recipe.dgrad.right


def _align(recipe: TrainRecipe, product: int) -> int:
    found = (recipe.forward, recipe.dgrad)[product]
    assert found is not None
    return found.align


def _alike(right: Format, down: Format) -> bool:
    """Whether rows and columns have the same codes."""
    return right == down and right.block[0] == right.block[1]


def _bytes(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.uint8)


def _viewed(codes: Tensor, scale: Tensor, fmt: Format) -> tuple[Tensor, Tensor, None]:
    return codes.view(fmt.element.storage), scale.view(fmt.scale.storage), None
