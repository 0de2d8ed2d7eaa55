"""`lowbit bench ffn`, `experts` and `wgrad`: layers by recipes of training, beside bfloat16.

`ffn` is the gated feed-forward layer of a Llama, `experts` one linear layer of experts whose tokens are in uneven
groups, casts and what moves groups apart included, forward and backward; `wgrad` is that layer's product for the
gradients of its weights alone, of operands that are rounded already. Accuracy is that of the output and of all
gradients together. On a GPU lowbit's, torch's and torchao's layers run compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.backends import Refusal
from lowbit.bench import Benchmark, Case, Contender, Dim, Given, Kind, Make, Shape, copies, normal, peer
from lowbit.bench import plain as identity
from lowbit_moe.functional import grouped_mm, linear
from lowbit_moe.operands import Rounded, grouped
from lowbit_moe.recipe import RECIPES, TrainRecipe

_FFN = ("FP8_TENSOR", "FP8_ROW", "FP8_BLOCK", "MXFP8", "NVFP4")
_EXPERTS = ("FP8_ROW", "FP8_ROW_WGRAD_BF16", "FP8_BLOCK", "MXFP8", "NVFP4")
# What torchao calls recipes of linear layers that are alike.
_TORCHAO = {"FP8_TENSOR": "tensorwise", "FP8_ROW": "rowwise"}

Layer = Callable[..., Tensor]


def _ffn_cases(given: Given) -> Iterator[Case]:
    for shape, recipe in product(given.shapes, _FFN):
        yield _ffn_case(given, shape, recipe)


def _ffn_case(given: Given, shape: Shape, recipe: str) -> Case:
    (m, k, between), device = shape, given.device

    def data(kind: Kind) -> tuple[Tensor, ...]:
        x, grad = (normal(m, k, kind=kind, seed=i, device=device) for i in range(2))
        sizes = ((between, k), (between, k), (k, between))
        weights = [normal(n, w, kind=kind, seed=2 + i, device=device) / w**0.5 for i, (n, w) in enumerate(sizes)]
        return grad, x, *weights

    def layer(product: Layer, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return product(functional.silu(product(x, gate)) * product(x, up), down)

    # Forward reads x and weights and writes its result; backward reads these and a gradient, and writes as many.
    contender = partial(_contender, device, moved=2 * (5 * m * k + 9 * k * between))
    others = () if recipe not in _TORCHAO or not given.peers else (_torchao_ffn(recipe, contender, device),)
    return Case(
        {"recipe": recipe, "m": m, "k": k, "between": between},
        3 * 2 * m * 3 * k * between,
        data,
        partial(_exact, partial(layer, functional.linear)),
        contender("lowbit", partial(layer, partial(linear, recipe=recipe))),
        contender("bfloat16", partial(layer, functional.linear)),
        peers=others,
    )


def _torchao_ffn(recipe: str, contender: Callable[..., Contender], device: torch.device) -> Contender | Refusal:
    name = f"torchao float8 {_TORCHAO[recipe]}"

    def build() -> Contender:
        float8: Any = import_module("torchao.float8")
        config = float8.Float8LinearConfig.from_recipe_name(_TORCHAO[recipe])
        convert = partial(float8.convert_to_float8_training, config=config)
        return contender(name, None, prepare=partial(_torchao_modules, convert))

    return peer(name, build) if device.type == "cuda" else Refusal(name, f"needs an NVIDIA GPU; this is {device}")


class _Gated(nn.Module):
    """The same layer with modules, which torchao exchanges."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, weight in (("gate", gate), ("up", up), ("down", down)):
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            module.weight = nn.Parameter(weight)
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.children()
        return down(functional.silu(gate(x)) * up(x))


def _torchao_modules(convert: Callable[..., nn.Module], grad: Tensor, x: Tensor, *weights: Tensor) -> Make:
    def make(i: int) -> tuple[Any, ...]:
        del i
        module = convert(_Gated(*(weight.clone() for weight in weights)))
        run = torch.compile(module, fullgraph=True)
        return run, grad, x.clone().requires_grad_(), list(module.parameters())

    return make


def _experts_cases(given: Given) -> Iterator[Case]:
    for shape, recipe in product(given.shapes, _EXPERTS):
        yield _experts_case(given, shape, recipe)


def _uneven(m: int, experts: int, device: torch.device) -> Tensor:
    """Ends of groups, the same for a shape: one may be empty."""
    cuts = torch.randint(0, m + 1, (experts - 1,), generator=torch.Generator().manual_seed(1)).sort().values
    return torch.cat((cuts, torch.tensor([m]))).to(torch.int32).to(device)


def _experts_case(given: Given, shape: Shape, recipe: str) -> Case:
    (m, n, k, experts), device = shape, given.device
    offs = _uneven(m, experts, device)

    def data(kind: Kind) -> tuple[Tensor, ...]:
        grad, x = (normal(m, width, kind=kind, seed=i, device=device) for i, width in enumerate((n, k)))
        return grad, x, normal(experts, n, k, kind=kind, seed=2, device=device) / k**0.5

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return functional.grouped_mm(x, weight.mT, offs=offs)

    def exact(x: Tensor, weight: Tensor) -> Tensor:
        sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
        return torch.cat([rows @ each.mT for rows, each in zip(x.split(sizes), weight, strict=True)])

    def by_recipe(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_mm(x, weight, offs, recipe=recipe)

    contender = partial(_contender, device, moved=3 * 2 * (m * n + m * k + experts * n * k))
    others = () if recipe != "FP8_ROW" or not given.peers else (_torchao_experts(offs, contender, device),)
    return Case(
        {"recipe": recipe, "m": m, "n": n, "k": k, "experts": experts},
        3 * 2 * m * n * k,
        data,
        partial(_exact, exact),
        contender("lowbit", by_recipe),
        contender("bfloat16", plain),
        peers=others,
    )


def _wgrad_cases(given: Given) -> Iterator[Case]:
    for shape, recipe in product(given.shapes, _EXPERTS):
        if RECIPES[recipe].wgrad is not None:
            yield _wgrad_case(given, shape, RECIPES[recipe])


def _wgrad_case(given: Given, shape: Shape, recipe: TrainRecipe) -> Case:
    (m, n, k, experts), device = shape, given.device
    offs, operands, how = _uneven(m, experts, device), recipe.wgrad, Rounded(recipe.mode)
    assert operands is not None

    def data(kind: Kind) -> tuple[Tensor, ...]:
        return tuple(normal(m, width, kind=kind, seed=i, device=device) for i, width in enumerate((n, k)))

    def exact(grad: Tensor, x: Tensor) -> Tensor:
        sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
        pieces = zip(grad.double().split(sizes), x.double().split(sizes), strict=True)
        return torch.stack([one.mT @ other for one, other in pieces])

    def rounded(grad: Tensor, x: Tensor) -> Make:
        left, _ = how.apart(grad, None, offs, recipe.align, operands.left)
        right, ends = how.apart(x, None, offs, recipe.align, operands.right)
        return copies(left, right, ends)

    def plain(grad: Tensor, x: Tensor) -> Tensor:
        return functional.grouped_mm(grad.mT, x, offs=offs)

    moved = 2 * (m * n + m * k + experts * n * k)
    return Case(
        {"recipe": recipe.name, "m": m, "n": n, "k": k, "experts": experts},
        2 * m * n * k,
        data,
        exact,
        Contender("lowbit", rounded, partial(grouped, dtype=torch.bfloat16, kernels=recipe.kernels), moved, identity),
        Contender("bfloat16", copies, plain, moved, identity),
    )


def _torchao_experts(offs: Tensor, contender: Callable[..., Contender], device: torch.device) -> Contender | Refusal:
    name = "torchao fp8 rows"

    def build() -> Contender:
        found: Any = import_module("torchao.prototype.moe_training.fp8_grouped_mm")
        run = found._to_fp8_rowwise_then_scaled_grouped_mm  # noqa: SLF001 - it has no public name

        def layer(x: Tensor, weight: Tensor) -> Tensor:
            return run(x, weight.mT, offs)

        return contender(name, layer)

    return peer(name, build) if device.type == "cuda" else Refusal(name, f"needs an NVIDIA GPU; this is {device}")


def _contender(
    device: torch.device, name: str, layer: Layer | None, *, moved: float, prepare: Callable[..., Make] | None = None
) -> Contender:
    """A layer of x and weights, run forward and backward."""
    run = layer if layer is None or device.type != "cuda" else torch.compile(layer, fullgraph=True)

    def given(grad: Tensor, *operands: Tensor) -> Make:
        make = copies(grad, *operands)

        def made(i: int) -> tuple[Any, ...]:
            # A fresh start: what other recipes compiled counts as this function's.
            if i == 0:
                torch.compiler.reset()
            grad, x, *weights = make(i)
            x, *weights = (part.detach().requires_grad_() for part in (x, *weights))
            return run, grad, x, weights

        return made

    return Contender(name, prepare or given, _both, moved, joined)


def _both(run: Layer, grad: Tensor, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = (x, *weights)
        out = run(*leaves) if not isinstance(run, nn.Module) else run(x)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Output and gradients as one, those of weights about as large as the others."""
    out, to_x, *to_weights = parts
    by = out.shape[0] ** -0.5
    return torch.cat([part.detach().float().flatten() for part in (out, to_x, *(each * by for each in to_weights))])


def _exact(layer: Layer, grad: Tensor, *operands: Tensor) -> Tensor:
    leaves = [part.detach().float().requires_grad_() for part in operands]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.enable_grad():
            out = layer(*leaves)
            return joined((out.detach(), *torch.autograd.grad(out, leaves, grad.float())))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


ffn = Benchmark(
    about="a gated feed-forward layer forward and backward by recipes of training, beside bfloat16",
    dims=(Dim("M", 64, 32768, 512), Dim("K", 256, 8192, 512, grouped=True), Dim("I", 256, 16384, 512, grouped=True)),
    formats=(),
    usual=lambda device: [(16384, 4096, 14336), (8192, 2880, 8192)] if device == "cuda" else [(128, 256, 512)],
    quantized=lambda _: [],
    cases=_ffn_cases,
)
_EXPERTS_DIMS = (
    Dim("M", 64, 65536, 512),
    Dim("N", 256, 8192, 512, grouped=True),
    Dim("K", 256, 8192, 512, grouped=True),
    Dim("E", 2, 64, 8),
)


def _usual_experts(device: str) -> list[Shape]:
    return [(16384, 8192, 5120, 4), (65536, 2048, 7168, 8)] if device == "cuda" else [(128, 256, 256, 4)]


experts = Benchmark(
    about="a linear layer of experts forward and backward by recipes of training, beside bfloat16",
    dims=_EXPERTS_DIMS,
    formats=(),
    usual=_usual_experts,
    quantized=lambda _: [],
    cases=_experts_cases,
)
wgrad = Benchmark(
    about="gradients of experts' weights from operands that recipes of training rounded, beside bfloat16",
    dims=_EXPERTS_DIMS,
    formats=(),
    usual=_usual_experts,
    quantized=lambda _: [],
    cases=_wgrad_cases,
)
