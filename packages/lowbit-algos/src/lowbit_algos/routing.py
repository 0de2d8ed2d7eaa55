"""More tokens for experts that a router fed too little: those that came closest to going there go there too.

The block runs once more. What its router computes is bent on the way, so that a starved expert gets a few tokens that
it did not get before and no others, and what is known of its inputs grows by them. All other experts' statistics stay
as they were, and so does what the block hands on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lowbit_algos.blocks import Call
from lowbit_algos.hidden import Hidden
from lowbit_algos.inputs import Input, Target
from lowbit_algos.moments import lacking
from lowbit_algos.watch import Product, See, Watch


@dataclass(slots=True)
class Router:
    """A matrix (E, K) whose products are the logits by which a token goes to the k experts of the largest."""

    weight: Tensor
    k: int
    # Tokens to send to each starved expert, of every batch.
    quotas: Mapping[int, int]
    # Tokens sent to each since this was emptied; empty: no product was seen.
    sent: dict[int, int] = field(default_factory=dict)

    def bend(self, logits: Tensor) -> Tensor:
        """Logits (.., E) that send each starved expert its quota of tokens it did not get, the closest, and no others.

        A token is sent to at most k of them; where there are too few tokens for that, quotas shrink alike.
        """
        rows = logits.reshape(-1, logits.shape[-1])
        top, bent = rows.topk(self.k), rows.clone()
        routed = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, top.indices, value=True)
        room = torch.full((len(rows),), self.k, device=rows.device)
        high, low = rows.amax(1) + 1, rows.amin(1) - 1
        share = min(self.k * len(rows) / sum(self.quotas.values()), 1)
        for e, quota in self.quotas.items():
            gap = (top.values[:, -1] - rows[:, e]).masked_fill(routed[:, e] | (room == 0), inf)
            nearest, chosen = gap.topk(min(int(quota * share), len(gap)), largest=False)
            chosen = chosen[nearest.isfinite()]
            bent[:, e] = low
            bent[chosen, e] = high[chosen]
            room[chosen] -= 1
            self.sent[e] = len(chosen)
        return bent.view_as(logits)


class Bent(Watch):
    """A `Watch` under which routers' logits are bent."""

    def __init__(self, parameters: Mapping[str, Tensor], see: See, routers: Sequence[Router]) -> None:
        super().__init__(parameters, see)
        self._routers = {(router.weight.data_ptr(), router.weight.shape): router for router in routers}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Carry out a call, and bend what comes of it if it is a router's product."""
        out = super().__torch_function__(func, types, args, kwargs)
        if func is not functional.linear:
            return out
        weight: Any = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
        # Only plain tensors are known to have a memory.
        if type(weight) not in (Tensor, nn.Parameter):
            return out
        router = self._routers.get((weight.data_ptr(), weight.shape))
        return out if router is None else router.bend(out)


class _Extra:
    """A `see` that adds what starved experts of stacks receive to `inputs`; `starved` says by name which those are."""

    def __init__(
        self,
        inputs: Mapping[str, Input],
        targets: Mapping[str, Target],
        pre_scales: Mapping[str, Tensor],
        starved: Mapping[str, Sequence[int]],
        routers: Mapping[int, Router],
    ) -> None:
        self._inputs, self._targets, self._pre_scales = inputs, targets, pre_scales
        self._starved, self._routers = starved, routers

    def __call__(self, product: Product) -> None:
        """Take in the inputs of a product."""
        assert product.ends is not None
        name, stops = product.name, product.ends.tolist()
        rows, sent = product.x.detach().reshape(-1, product.x.shape[-1]), self._routers[len(stops)].sent
        parts = [rows[:0]] * len(stops)
        for e in self._starved[name]:
            part = rows[stops[e - 1] if e else 0 : stops[e]]
            # Where it gets more than was sent, the model does not go by the largest logits alone, and some of this may
            # be what it saw already.
            if len(part) <= sent.get(e, 0):
                parts[e] = part
        rows = torch.cat(parts)
        if not len(rows):
            return
        if name in self._pre_scales:
            rows = rows * self._pre_scales[name].to(rows.dtype)
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._inputs[name].take(rows, ends, self._targets[name].activation)


def top_up(
    block: nn.Module,
    inputs: Mapping[str, Input],
    targets: Mapping[str, Target],
    calls: Sequence[Call],
    hidden: Hidden,
    pre_scales: Mapping[str, Tensor],
    *,
    least: int | None,
) -> None:
    """Add to `inputs` of stacks of experts what those that saw fewer than `least` tokens get under a bent router.

    `inputs` are what was observed while `block` ran by `calls` on `hidden`, joined over processes. A router is known by
    being the one matrix with as many rows as there are experts; where `linear` is not called with it, all stays.
    """
    lacks = {name: lacking(found, least) for name, found in inputs.items() if found.hessian.hessian.dim() == 3}
    lacks = {name: lack for name, lack in lacks.items() if int(lack.sum())}
    routers = _find_routers(block, inputs, lacks, calls, hidden)
    starved = {
        name: [e for e in routers[len(lack)].quotas if int(lack[e])]
        for name, lack in lacks.items()
        if len(lack) in routers
    }
    if not starved:
        return
    before = {name: inputs[name].hessian.tokens.clone() for name in starved}
    if dist.is_initialized() and dist.get_rank():
        # What is joined already is added up once more, with what every process adds to it.
        for part in _parts(inputs, starved):
            part.zero_()
    see = _Extra(inputs, targets, pre_scales, starved, routers)
    for i, call in enumerate(calls):
        for router in routers.values():
            router.sent.clear()
        with Bent({name: block.get_parameter(name) for name in starved}, see, list(routers.values())):
            call(block, hidden[i])
        if not any(router.sent for router in routers.values()):
            break
    if dist.is_initialized():
        for part in _parts(inputs, starved):
            dist.all_reduce(part)
    for name, tokens in before.items():
        inputs[name].extra = inputs[name].hessian.tokens - tokens


def _find_routers(
    block: nn.Module,
    inputs: Mapping[str, Input],
    lacks: Mapping[str, Tensor],
    calls: Sequence[Call],
    hidden: Hidden,
) -> dict[int, Router]:
    """The routers of stacks whose experts lack tokens, by how many experts there are."""
    if not lacks:
        return {}
    totals = torch.tensor(
        [len(calls), sum(hidden.tokens(i) for i in range(len(calls)))], device=next(iter(lacks.values())).device
    )
    if dist.is_initialized():
        dist.all_reduce(totals)
    batches, tokens = totals.tolist()
    routers: dict[int, Router] = {}
    for name, lack in lacks.items():
        count = len(lack)
        found = [p for p in block.parameters() if p.dim() == 2 and len(p) == count]
        if count in routers or len(found) != 1:
            continue
        k = min(max(round(int(inputs[name].hessian.tokens.sum()) / max(tokens, 1)), 1), count)
        most = torch.stack([other for other in lacks.values() if len(other) == count]).amax(0)
        # Tokens that are sent nowhere need k experts to go to; those that lack least have to be among them.
        order = most.argsort(descending=True, stable=True)[: count - k].tolist()
        quotas = {e: ceil(int(most[e]) / batches) for e in order if int(most[e])}
        if quotas:
            routers[count] = Router(found[0], k, quotas)
    return routers


def _parts(inputs: Mapping[str, Input], starved: Mapping[str, Sequence[int]]) -> list[Tensor]:
    """Everything that is known of starved experts, as views."""
    return [part[e] for name, experts in starved.items() for part in inputs[name].by_expert() for e in experts]
