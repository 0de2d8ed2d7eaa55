"""`lowbit bench scale`: experts, dense layers and rows of tokens on several ranks, by recipes and by what travels.

Run it by `torchrun --nproc-per-node N --no-python lowbit bench scale` for N ranks, and without torchrun for one. Every
rank has as many tokens, however many ranks there are, so that a step of twice as many ranks should take as long.

`experts` is a gated layer of experts, each rank with its share of them, forward and backward; `dense` are gated layers
that FSDP shards, forward and backward; `all-to-all` sends rows of tokens to where their experts are. "BF16 by MXFP8" is
the recipe of products, and the format that rows (of FSDP: weights) travel in. The loss told is that of 20 steps of
AdamW on tokens that the ranks share, so that it should be the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from lowbit.bench import Benchmark, Case, Contender, Dim, Given, Kind, Make, Shape, normal, plain
from lowbit.errors import FormatError
from lowbit_moe.bench.layers import joined
from lowbit_moe.convert import convert_
from lowbit_moe.exchange import Exchange
from lowbit_moe.optimizer import AdamW
from lowbit_moe.parallel import parallel_swiglu_experts

Way = tuple[str, str | None]
"""A recipe, and what travels; None: bfloat16."""

# Rows of e4m3 with scales that the wire's bytes hold, as the recipe FP8_ROW has no others.
ROWS = "e4m3fn:1x*:e8m0"
_EXPERTS: tuple[Way, ...] = (
    *(("BF16", None), ("BF16", "MXFP8"), ("FP8_ROW", None), ("FP8_ROW", ROWS), ("FP8_ROW", "MXFP8")),
    ("MXFP8", "MXFP8"),
)
# Of weights FSDP gathers codes, where a recipe has such of each rank's share.
_DENSE: tuple[Way, ...] = (("BF16", None), ("FP8_ROW", None), ("FP8_TENSOR", "FP8_TENSOR"), ("MXFP8", "MXFP8"))
_MOVES: tuple[Way, ...] = (("BF16", None), ("BF16", "MXFP8"), ("BF16", ROWS))
LAYERS, _STEPS, _SAMPLES, _RATE = 4, 20, 20, 1e-3
# What random numbers of weights are seeded by, from here on; those of ranks' tokens by less.
_WEIGHTS = 1 << 20


def _cases(given: Given) -> Iterator[Case]:
    ranks = distributed.get_world_size()
    for (m, k, between, experts, most), make in product(given.shapes, (_experts, _dense, _moves)):
        if experts % ranks or most > experts or k % (32 * ranks) or between % (32 * ranks):
            msg = (
                f"{m}x{k}x{between}x{experts}x{most}: {ranks} ranks need a multiple of {ranks} experts, and of "
                f"{32 * ranks} K and I; and a token has no more than all experts"
            )
            raise FormatError(msg)
        told = {"ranks": ranks, "m": m, "k": k, "between": between, "experts": experts, "chosen": most}
        yield make(told, given.device)


def _experts(told: dict[str, Any], device: torch.device) -> Case:
    m, k, between, experts, most = (told[name] for name in ("m", "k", "between", "experts", "chosen"))
    ranks, rank = told["ranks"], distributed.get_rank()
    each, shapes = experts // ranks, ((2 * between, k), (k, between))

    def weights() -> tuple[Tensor, Tensor]:
        """This rank's, of numbers that an expert has wherever it is."""
        mine = range(rank * each, (rank + 1) * each)
        gate_up, down = (
            torch.stack([_weight(*shape, 2 * expert + i, device) for expert in mine]) for i, shape in enumerate(shapes)
        )
        return gate_up.bfloat16(), down.bfloat16()

    def data(kind: Kind) -> tuple[Tensor, ...]:
        chosen, shares = choose(m, experts, most, device, seed=rank)
        x, grad = (normal(m, k, kind=kind, seed=2 * rank + i, device=device) for i in range(2))
        return grad, x, chosen, shares, *weights()

    def layer(way: Way, x: Tensor, chosen: Tensor, shares: Tensor, *sides: Tensor) -> Tensor:
        recipe, payload = way
        group = distributed.group.WORLD
        assert group is not None
        return parallel_swiglu_experts(x, chosen, shares, *sides, group=group, recipe=recipe, payload=payload)

    def exact(*data: Tensor) -> Tensor:
        grad, x, chosen, shares, *sides = (part.float() if part.is_floating_point() else part for part in data)
        return joined(_stepped(partial(layer, _EXPERTS[0]), grad, x, chosen, shares, *sides))

    def trained(way: Way) -> dict[str, float]:
        """The loss after steps on m tokens of all ranks together."""
        chosen, shares = choose(m, experts, most, device, seed=0)
        x, wanted = (_drawn(m, k, device=device, seed=i).bfloat16() for i in range(2))
        chosen, shares, x, wanted = (part.tensor_split(ranks)[rank] for part in (chosen, shares, x, wanted))
        parameters = [nn.Parameter(side) for side in weights()]
        return _learned(lambda: layer(way, x, chosen, shares, *parameters), parameters, wanted, m * k)

    # Rows of all tokens' experts, forward and twice backward.
    flops = 3 * 2 * m * most * 3 * k * between
    moved = 3 * 2 * (5 * m * most * k + 3 * m * most * between + each * 3 * k * between)

    def contender(way: Way) -> Contender:
        run = partial(_stepped, partial(layer, way))
        return Contender(_name(way), _once, run, moved, joined, tell=partial(trained, way))

    return _case("experts", told, flops, data, exact, contender, _EXPERTS)


def _dense(told: dict[str, Any], device: torch.device) -> Case:
    m, k, between, ranks = (told[name] for name in ("m", "k", "between", "ranks"))
    rank = distributed.get_rank()

    def model(way: Way, *, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        recipe, payload = way
        found = nn.Sequential(*(_Gated(k, between, seed=i, device=device) for i in range(LAYERS))).to(dtype)
        convert_(found, recipe, fp8_all_gather=payload is not None)
        for each in found:
            fully_shard(each)
        fully_shard(found)
        return found

    def data(kind: Kind) -> tuple[Tensor, ...]:
        return tuple(normal(m, k, kind=kind, seed=2 * rank + i, device=device) for i in range(2))

    def run(module: nn.Module, grad: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = module(x)
            out.backward(grad)
        found = torch.cat((out.detach().float(), _of(x.grad).float()))
        for parameter in module.parameters():
            parameter.grad = None
        return found

    def exact(grad: Tensor, x: Tensor) -> Tensor:
        return run(model(_DENSE[0], dtype=torch.float32), grad.float(), x.float())

    def trained(way: Way) -> dict[str, float]:
        module = model(way)
        x, wanted = (_drawn(m, k, device=device, seed=i).bfloat16() for i in range(2))
        x, wanted = (part.tensor_split(ranks)[rank] for part in (x, wanted))
        return _learned(lambda: module(x), list(module.parameters()), wanted, m * k, mean_of=ranks)

    weights = LAYERS * 3 * k * between

    def contender(way: Way) -> Contender:
        def prepare(*data: Tensor) -> Make:
            module = model(way)
            return lambda _: (module, *data)

        moved = 2 * (3 * weights + LAYERS * 3 * m * (3 * k + 3 * between))
        return Contender(_name(way), prepare, run, moved, plain, tell=partial(trained, way))

    return _case("dense", told, 3 * 2 * m * weights, data, exact, contender, _DENSE)


def _moves(told: dict[str, Any], device: torch.device) -> Case:
    m, k, experts, most, ranks = (told[name] for name in ("m", "k", "experts", "chosen", "ranks"))
    chosen, _ = choose(m, experts, most, device, seed=distributed.get_rank())
    group = distributed.group.WORLD
    assert group is not None
    ways = {way: Exchange(chosen, experts // ranks, group=group, recipe=way[0], payload=way[1]) for way in _MOVES}
    sent = sum(ways[_MOVES[0]].sizes[0])

    def data(kind: Kind) -> tuple[Tensor, ...]:
        return (normal(m, k, kind=kind, seed=distributed.get_rank(), device=device),)

    def run(way: Way, x: Tensor) -> Tensor:
        return ways[way].dispatch(x, plain=True)

    def contender(way: Way) -> Contender:
        # Of every row that an expert gets, its bytes on the way: codes and scales.
        bits = 16.0 if (payload := ways[way].payload) is None else payload.bits_per_element((sent, k))
        return Contender(_name(way), _once, partial(run, way), sent * k * bits / 8, plain)

    return _case("all-to-all", told, 0, data, partial(run, _MOVES[0]), contender, _MOVES)


def _case(
    step: str,
    told: dict[str, Any],
    flops: float,
    data: Callable[[Kind], tuple[Tensor, ...]],
    exact: Callable[..., Tensor],
    contender: Callable[[Way], Contender],
    ways: tuple[Way, ...],
) -> Case:
    """The first way is the baseline, the last the candidate."""
    base, *others, last = ways
    return Case(
        {"step": step, **told},
        flops,
        data,
        exact,
        contender(last),
        contender(base),
        peers=tuple(map(contender, others)),
        kinds=("normal",),
        samples=_SAMPLES,
    )


class _Gated(nn.Module):
    """A gated layer of a Llama with what passes around it; its numbers are the same on every rank."""

    def __init__(self, k: int, between: int, *, seed: int, device: torch.device) -> None:
        super().__init__()
        for i, (name, rows, columns) in enumerate((("gate", between, k), ("up", between, k), ("down", k, between))):
            made = nn.Linear(columns, rows, bias=False, device="meta")
            made.weight = nn.Parameter(_weight(rows, columns, 3 * seed + i, device))
            self.add_module(name, made)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.children()
        return x + down(functional.silu(gate(x)) * up(x))


def _stepped(layer: Callable[..., Tensor], grad: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of tokens and weights, which are the last two."""
    chosen, shares, *sides = rest
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in (x, *sides)]
        out = layer(leaves[0], chosen, shares, *leaves[1:])
        return out.detach(), *torch.autograd.grad(out, leaves, grad)


def _learned(
    run: Callable[[], Tensor], parameters: list[nn.Parameter], wanted: Tensor, numbers: int, *, mean_of: int = 1
) -> dict[str, float]:
    """The loss of all ranks' tokens after steps, the mean of squares over so many numbers in all.

    FSDP takes the mean of ranks' gradients, of which `mean_of` makes the sum that other parameters have.
    """
    optimizer = AdamW(parameters, lr=_RATE, bits=32)
    found = wanted.new_zeros((), dtype=torch.float32)
    for step in range(_STEPS + 1):
        with torch.enable_grad():
            loss = (run() - wanted).float().square().sum() / numbers
            if step < _STEPS:
                (loss * mean_of).backward()
                optimizer.step()
                optimizer.zero_grad()
        found = loss.detach()
    distributed.all_reduce(found)
    return {"loss": float(found)}


def choose(m: int, experts: int, most: int, device: torch.device, *, seed: int) -> tuple[Tensor, Tensor]:
    """Experts of tokens and their shares, of a router that prefers some."""
    scores = _drawn(m, experts, device=device, seed=_WEIGHTS - 1 - seed)
    # Which it prefers does not follow from where they are.
    liked = torch.linspace(0, 0.5, experts)[torch.randperm(experts, generator=torch.Generator().manual_seed(_WEIGHTS))]
    shares, chosen = (scores + liked.to(device)).softmax(-1).topk(most)
    return chosen, shares.bfloat16()


def _weight(rows: int, columns: int, number: int, device: torch.device) -> Tensor:
    return _drawn(rows, columns, device=device, seed=_WEIGHTS + number) / columns**0.5


def _drawn(*shape: int, device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _once(*operands: Any) -> Make:
    """Operands that no call changes; a call of several ranks is long beside what a cache gains."""
    return lambda _: operands


def _of(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


def _name(way: Way) -> str:
    recipe, payload = way
    return f"{recipe} by {'BF16' if payload is None else 'rows of e4m3' if payload == ROWS else payload}"


def _usual(device: str) -> list[Shape]:
    # Mixtral-8x7B and Qwen3-30B-A3B.
    return [(8192, 4096, 14336, 8, 2), (8192, 2048, 768, 128, 8)] if device == "cuda" else [(128, 128, 128, 8, 2)]


benchmark = Benchmark(
    about="experts, FSDP's layers and rows of tokens on as many ranks as torchrun starts, beside bfloat16",
    dims=(
        Dim("M", 64, 16384, 256),
        Dim("K", 256, 8192, 256, grouped=True),
        Dim("I", 256, 16384, 256, grouped=True),
        Dim("E", 8, 128, 8),
        Dim("C", 1, 8, 2),
    ),
    formats=(),
    usual=_usual,
    quantized=lambda _: [],
    cases=_cases,
    together=True,
)
