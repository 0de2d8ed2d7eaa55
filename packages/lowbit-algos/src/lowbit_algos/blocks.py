"""A model as a row of blocks that feed one another: found by structure, their calls recorded and replayed.

Nothing is traced. The model is run once with blocks that hand on what they are given; that tells what every block is
called with besides, such as masks and positions, and then blocks run one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import LowbitError
from lowbit.hadamard import Rotation

# Tokens of a sequence that show how a block is made.
_TOKENS = 32

Batch = Tensor | Mapping[str, Any]
"""What a model is called with: one tensor, or arguments by name."""


@dataclass(frozen=True, slots=True)
class Call:
    """How a block is called for one batch: everything but the hidden states that flow from block to block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    # Where the hidden states go: a position, or a name.
    at: int | str

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after the block."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.at, int):
            args[self.at] = hidden
        else:
            kwargs[self.at] = hidden
        return hidden_of(block(*args, **kwargs))


@dataclass(frozen=True, slots=True)
class Probe:
    """Runs a block on a few tokens."""

    block: nn.Module
    call: Call
    hidden: Tensor

    def __call__(self) -> Tensor:
        """Hidden states after the block."""
        return self.call(self.block, self.hidden)

    def fed(self, hidden: Tensor) -> Probe:
        """The same with other hidden states."""
        return replace(self, hidden=hidden)

    def to(self, dtype: torch.dtype) -> Probe:
        """The same with floats of another dtype."""
        call = replace(self.call, args=_cast(self.call.args, dtype), kwargs=_cast(dict(self.call.kwargs), dtype))
        return Probe(self.block, call, self.hidden.to(dtype))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Float tensors in nested arguments, in another dtype."""
    return _mapped(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested arguments with their tensors changed; what is of a class of its own stays as it is."""
    if isinstance(value, Tensor):
        return change(value)
    kind: Any = type(value)
    if kind in (tuple, list):
        return kind([_mapped(item, change) for item in value])
    if kind is dict:
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


class _Sharing:
    """Makes equal tensors one: masks and positions are those of every batch, and would else be kept for each."""

    # Of the tensors of a shape, the last so many are compared; positions come as two, and layers may be of two kinds.
    _COMPARED = 4

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], list[Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor, or one before it that is equal."""
        known = self._known.setdefault((tensor.shape, tensor.dtype, tensor.device), [])
        for other in reversed(known[-self._COMPARED :]):
            if other is tensor or torch.equal(other, tensor):
                return other
        known.append(tensor)
        return tensor


@dataclass(frozen=True, slots=True)
class Captured:
    """What the first block is fed, and how every block is called."""

    # By batch; empty where it was given away.
    hidden: list[Tensor]
    # By block, then by batch.
    calls: list[list[Call]]
    # The same of a few tokens, by block, where they were asked for.
    few: tuple[Tensor, list[Call]] | None = None

    def turned(self, rotation: Rotation | None) -> list[Tensor]:
        """What the first block is fed, rotated."""
        return self.hidden if rotation is None else [rotation(hidden) for hidden in self.hidden]

    def probe(self, k: int, block: nn.Module) -> Probe | None:
        """Runs block k on a few tokens, where they were asked for."""
        if self.few is None:
            return None
        hidden, calls = self.few
        return Probe(block, calls[k], hidden)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model, by name, in order: the members of its largest ModuleList, or the model itself.

    Members of other lists, and whatever lies outside, belong to no block.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return {"": model}
    # Of equals the first, which is the outer one.
    sizes = [sum(p.numel() for p in members.parameters()) for _, members in lists]
    name, largest = lists[sizes.index(max(sizes))]
    return {f"{name}.{i}": block for i, block in enumerate(largest)}


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: the tensor, or the first of several.

    Raises:
        LowbitError: there is none.
    """
    first: Any = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise LowbitError(
            f"a block returned {type(output).__name__}; calibration needs blocks that return their hidden states as a "
            "tensor, or as the first of a tuple"
        )
    return first


def capture(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    *,
    probe: bool = False,
    keep: Callable[[Tensor], None] | None = None,
) -> Captured:
    """Run `model` on batches with blocks that only hand on, and tell what they were called with.

    With `probe`, a few tokens of the first batch come extra. What the first block is fed goes to `keep`, batch by
    batch, and otherwise into `hidden`. Of the blocks, the first has to hold its weights: it runs once, to show what a
    block returns.

    Raises:
        LowbitError: a block is not called exactly once, or is fed anything else than what the one before it returned.
    """
    if probe:
        batches = list(batches)
        extra = capture(model, blocks, [_few(batch) for batch in batches[:1]])
        found = capture(model, blocks, batches, keep=keep)
        return replace(found, few=(extra.hidden[0], [calls[0] for calls in extra.calls]))
    if list(blocks.values()) == [model]:
        return _as_one_block(batches, keep)
    captured = Captured([], [[] for _ in blocks])
    keep = keep or captured.hidden.append
    with _stubbed(list(blocks), list(blocks.values()), captured.calls, keep), torch.no_grad():
        for count, batch in enumerate(batches, 1):
            with suppress(_Done):
                call_model(model, batch)
            uneven = [name for name, calls in zip(blocks, captured.calls, strict=True) if len(calls) != count]
            if uneven:
                raise LowbitError(f"block {uneven[0]} was not called once; calibration needs blocks that run in order")
    if not captured.calls[0]:
        raise LowbitError("there are no batches to calibrate with")
    return captured


def _few(batch: Batch) -> Batch:
    """A few tokens of the first sequence of a batch."""
    if isinstance(batch, Tensor):
        return batch[:1, :_TOKENS] if batch.dim() > 1 and not batch.is_floating_point() else batch[:_TOKENS]
    return {
        key: _few(value) if isinstance(value, Tensor) and value.dim() > 1 else value for key, value in batch.items()
    }


def call_model(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch."""
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


class _Done(Exception):  # noqa: N818 - not an error: nothing after the last block is needed
    """The last block was reached."""


def _as_one_block(batches: Iterable[Batch], keep: Callable[[Tensor], None] | None) -> Captured:
    captured = Captured([], [[]])
    keep = keep or captured.hidden.append
    for batch in batches:
        named = {} if isinstance(batch, Tensor) else dict(batch)
        at: int | str = 0 if isinstance(batch, Tensor) else next(k for k, v in named.items() if isinstance(v, Tensor))
        keep(batch if isinstance(batch, Tensor) else named[str(at)])
        captured.calls[0].append(Call((None,) if at == 0 else (), named, at))
    return captured


@contextmanager
def _stubbed(
    names: Sequence[str], blocks: Sequence[nn.Module], calls: Sequence[list[Call]], keep: Callable[[Tensor], None]
) -> Generator[None]:
    """Blocks that record what they are called with and return their hidden states as they are."""
    shared = _Sharing()
    # What the block before returned, and what comes with hidden states in what a block returns.
    state: dict[str, Any] = {}

    def stub(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            at, hidden = _find_hidden(args, kwargs, state.get("returned") if index else None, names[index])
            if index == 0:
                keep(hidden)
            rest = tuple(None if i == at else _mapped(arg, shared) for i, arg in enumerate(args))
            named = {key: _mapped(value, shared) for key, value in kwargs.items() if key != at}
            calls[index].append(Call(rest, named, at))
            if index == len(blocks) - 1:
                raise _Done
            if "like" not in state:
                state["like"] = forward(*args, **kwargs)
                hidden_of(state["like"])
            # Another object each time, by which the next block's argument is known.
            state["returned"] = hidden.detach()
            like = state["like"]
            return state["returned"] if isinstance(like, Tensor) else type(like)((state["returned"], *like[1:]))

        return run

    with ExitStack() as undo:
        for index, block in enumerate(blocks):
            vars(block)["forward"] = stub(index, block.forward)
            undo.callback(vars(block).pop, "forward")
        yield


def _find_hidden(
    args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Tensor | None, name: str
) -> tuple[int | str, Tensor]:
    """Which argument the hidden states are: `wanted`, or the first float tensor."""
    for at, value in (*enumerate(args), *kwargs.items()):
        if type(value).__name__.endswith("Cache"):
            raise LowbitError(
                f"block {name} is called with a {type(value).__name__} as {at!r}, which remembers what it has seen, so "
                "that no call could be repeated; give batches with use_cache=False"
            )
    for at, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and (value is wanted or (wanted is None and value.is_floating_point())):
            return at, value
    raise LowbitError(
        f"block {name} is not fed what the block before it returned; calibration needs blocks that feed one another "
        "directly"
    )
