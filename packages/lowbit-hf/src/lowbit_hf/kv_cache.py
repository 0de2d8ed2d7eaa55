"""Scales of an fp8 key-value cache: which modules need them, how large what they put into it gets, what is written.

A cache keeps `x / scale` as e4m3fn, for keys x, normed and rotated by position, as the model hands them to its cache,
and for values. `scale = amax / 448`, and 1 where amax is 0; amax is over all tokens of the calibration, and over the
whole layer or each head.

Source: compressed-tensors 0.20 for names, shapes and `kv_cache_scheme`; vLLM 0.32 reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache

from lowbit.element import E4M3FN
from lowbit.errors import LowbitError, RecipeError
from lowbit.shards import Checkpoint
from lowbit.table import fold
from lowbit_algos.blocks import find_blocks
from lowbit_algos.walk import prefix_of
from lowbit_hf.layouts.layout import CACHED, Entry
from lowbit_hf.schemes import KvCache, cache_scheme
from lowbit_hf.skeleton import Owner, Skeleton

_ARGUMENT = "past_key_values"


@dataclass(frozen=True, slots=True)
class Attention:
    """A module that puts keys and values into a cache."""

    # Its name in the model, and in the checkpoint.
    name: str
    stored: str
    # The output file that its scales go to.
    file: str
    # Heads of keys, which are those of values.
    heads: int


@dataclass(frozen=True, slots=True)
class CacheScales:
    """The scales that a run adds to a checkpoint."""

    kind: KvCache
    attentions: tuple[Attention, ...]
    # Blocks without attention that keeps keys and values.
    without: tuple[str, ...]

    @property
    def by_head(self) -> bool:
        """Whether each head has scales of its own."""
        return self.kind == "fp8-head"

    @property
    def scheme(self) -> dict[str, Any]:
        """The `kv_cache_scheme` of the config."""
        return cache_scheme(self.kind)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Output file of every scale, and its name, dtype and shape."""
        for attention in self.attentions:
            shape = (attention.heads, 1, 1) if self.by_head else (1,)
            for local in CACHED:
                yield attention.file, (f"{attention.stored}.{local}", torch.float32, shape)

    def __str__(self) -> str:
        """In words."""
        each = "head" if self.by_head else "layer"
        without = f"; none in {', '.join(name for name, _ in fold(self.without))}" if self.without else ""
        return f"fp8 (e4m3fn), a scale for the keys and one for the values of each {each}{without}"


def plan_cache(
    kind: KvCache, checkpoint: Checkpoint, skeleton: Skeleton, owners: Mapping[str, Owner | None]
) -> CacheScales:
    """The scales that a model's key-value cache needs.

    Raises:
        RecipeError: the model keeps no cache of keys and values, or one in a way that scales cannot be measured for.
    """
    model, config = skeleton.model, skeleton.config.get_text_config()
    named = type(model).__name__
    if not model.can_generate():
        raise RecipeError(f"{named} does not generate, so it keeps no key-value cache; leave --kv-cache")
    if getattr(config, "kv_lora_rank", None):
        raise RecipeError(
            f"{named} keeps one latent vector of each token in its cache, not keys and values (multi-head latent "
            "attention), and lowbit has no scales for that; leave --kv-cache"
        )
    blocks = find_blocks(model)
    keeping = _keeping(model, blocks)
    prefixes = tuple(prefix_of(block) for block in blocks)
    if outside := [name for name in keeping if not name.startswith(prefixes)]:
        raise RecipeError(
            f"{outside[0]!r} of {named} keeps keys and values and lies outside the blocks that are calibrated, so "
            "nothing is seen of them; leave --kv-cache"
        )
    if not keeping:
        raise RecipeError(
            f"no module of {named} takes {_ARGUMENT}, so where keys and values go cannot be seen; leave --kv-cache"
        )
    attentions = tuple(_attention(name, checkpoint, skeleton, owners) for name in keeping)
    without = tuple(block for block in blocks if not any(name.startswith(prefix_of(block)) for name in keeping))
    scales = CacheScales(kind, attentions, without)
    if taken := [name for _, (name, _, _) in scales.entries() if name in checkpoint.entries]:
        raise RecipeError(f"the checkpoint already has {taken[0]!r}, which --kv-cache would write; leave it")
    return scales


def _keeping(model: nn.Module, blocks: Collection[str]) -> list[str]:
    """Modules that are handed a cache of keys and values, and hand it on to none, by name.

    A block with no such module inside does not keep any, nor does a module that reads what another layer keeps.
    """
    takes = {name: m for name, m in model.named_modules() if _ARGUMENT in signature(m.forward).parameters}
    return [
        name
        for name, module in takes.items()
        if not any(other != name and other.startswith(prefix_of(name)) for other in (*takes, *blocks))
        and name not in blocks
        and not getattr(module, "is_kv_shared_layer", False)
    ]


def _attention(name: str, checkpoint: Checkpoint, skeleton: Skeleton, owners: Mapping[str, Owner | None]) -> Attention:
    """A module by its name in the model.

    Raises:
        RecipeError: the checkpoint has another name for each of its tensors.
    """
    config = getattr(skeleton.model.get_submodule(name), "config", None) or skeleton.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for file, entries in checkpoint.shards.items():
        for entry in entries:
            owner = owners[entry.name]
            if owner is None or owner.stacked or not owner.name.startswith(f"{name}."):
                continue
            local = owner.name.removeprefix(name)
            if entry.name.endswith(local):
                return Attention(name, entry.name.removesuffix(local), file, int(heads))
    raise RecipeError(
        f"the checkpoint has no tensor by the name that {type(skeleton.model).__name__} has for one of {name!r}, so "
        "its scales have no place; leave --kv-cache"
    )


class CacheWatch:
    """Sees what a model's blocks put into their cache, where that is asked for."""

    def __init__(self, planned: CacheScales | None, model: nn.Module) -> None:
        self._planned = () if planned is None else planned.attentions
        self._by_head = planned is not None and planned.by_head
        self._model = model
        # The largest magnitude of each head, by the scale's name.
        self._amax: dict[str, Tensor] = {}

    @property
    def looks(self) -> bool:
        """Whether anything is asked for."""
        return bool(self._planned)

    @contextmanager
    def seeing(self) -> Generator[None]:
        """A context in which every run of a block counts."""
        with ExitStack() as undo:
            for attention in self._planned:
                module = self._model.get_submodule(attention.name)
                hand = partial(_hand, _Seeing(partial(self._see, attention)))
                undo.callback(module.register_forward_pre_hook(hand, with_kwargs=True).remove)
            yield

    def give(self, block: str, write: Callable[[str, Tensor], None]) -> None:
        """Give a block's scales, by name, to `write`; they are over what all processes saw.

        Raises:
            LowbitError: a module put nothing into its cache, or what is not finite.
        """
        for attention in self._planned:
            for local in CACHED if attention.name.startswith(prefix_of(block)) else ():
                name = f"{attention.stored}.{local}"
                if name not in self._amax:
                    raise LowbitError(f"{attention.name} put nothing into its key-value cache; leave --kv-cache")
                amax = self._amax.pop(name)
                if dist.is_initialized():
                    dist.all_reduce(amax, op=dist.ReduceOp.MAX)
                if not bool(amax.isfinite().all()):
                    raise LowbitError(f"{attention.name} put NaN or infinity into its key-value cache")
                scale = (amax.reshape(-1, 1, 1) if self._by_head else amax.amax().reshape(1)) / E4M3FN.max
                write(name, torch.where(scale > 0, scale, 1.0))

    def _see(self, attention: Attention, keys: Tensor, values: Tensor) -> None:
        for local, states in zip(CACHED, (keys, values), strict=True):
            if keys is values or states.dim() != 4 or (self._by_head and states.shape[1] != attention.heads):
                raise LowbitError(
                    f"{attention.name} puts {tuple(states.shape)} into its cache, and needed are keys and values "
                    f"(batch, {attention.heads} heads, tokens, channels); leave --kv-cache"
                )
            low, high = states.amin((0, 2, 3)), states.amax((0, 2, 3))
            name, amax = f"{attention.stored}.{local}", torch.maximum(-low, high).to(torch.float32)
            known = self._amax.get(name)
            self._amax[name] = amax if known is None else torch.maximum(known, amax)


class _Seeing(DynamicCache):
    """A cache that keeps nothing, so that a call can be repeated."""

    def __init__(self, see: Any) -> None:
        super().__init__()
        self._see = see

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand back what a layer puts in."""
        del layer_idx, args, kwargs
        self._see(key_states, value_states)
        return key_states, value_states


def _hand(
    cache: DynamicCache, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments, with a cache among them."""
    bound = signature(module.forward).bind(*args, **kwargs)
    bound.arguments[_ARGUMENT] = cache
    return bound.args, bound.kwargs
