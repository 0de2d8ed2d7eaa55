"""What tests of formats, kernels and backends share: `check_backend`, a loopback backend, and `lowbit.grid`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from lowbit import backends
from lowbit.backends import Backend, Call, Description, Kernel
from lowbit.checking import check_backend
from lowbit.grid import FORMAT_GRID, product_bound, rounding_bound, sample, shapes
from lowbit.reference import backend as reference
from lowbit.tensor import INNER, QuantizedTensor

__all__ = [
    "FORMAT_GRID",
    "Loopback",
    "check_backend",
    "installed_backends",
    "only_backends",
    "product_bound",
    "rounding_bound",
    "sample",
    "shapes",
]


class Loopback:
    """A backend whose kernels hand on to the reference's, and that counts their calls by op.

    With `packs`, its linear, embedding and grouped_mm kernels take packed weights. `reason` is what `probe` answers.
    """

    def __init__(
        self, name: str = "loopback", *, priority: int = 10, packs: bool = False, reason: str | None = None
    ) -> None:
        self.name, self.priority, self.packs, self.reason = name, priority, packs, reason
        self.calls: Counter[str] = Counter()

    def probe(self) -> str | None:
        """The reason given, if any."""
        return self.reason

    def kernels(self) -> tuple[Kernel, ...]:
        """A kernel for each of the reference's that take canonical weights."""
        return tuple(self._kernel(row) for row in reference.kernels() if row.pack is None)

    def _kernel(self, row: Kernel) -> Kernel:
        name = f"{self.name}.{row.op}"
        if not self.packs or row.op not in {"linear", "embedding", "grouped_mm"}:
            return Kernel(name, row.op, "any", self.priority, self._counted(row.op, row.run), _takes_all)

        def run(x: Tensor, parts: tuple[Tensor, ...], description: Description, other: Tensor | None) -> Tensor:
            inner, layout = _unpack(parts, description), description.layout
            named = [inner.get(part) for part in INNER]
            if row.op == "embedding":
                return row.run(x, *named[:4], layout.format, description.shape[-1], layout.dtype)
            if row.op == "grouped_mm":
                return row.run(x, other, *named, layout.format, layout.activation or "")
            return row.run(x, *named, other, layout.format, layout.activation or "")

        return Kernel(name, row.op, "any", self.priority, self._counted(row.op, run), _takes_all, _pack, _unpack)

    def _counted(self, op: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.calls[op] += 1
            return run(*args)

        return counted


@contextmanager
def installed_backends(*given: Backend) -> Generator[None]:
    """Let `given` backends be found beside the installed ones inside the `with`, as their entry points would be."""
    with _finding(lambda points: [*points, *(_Point(backend.name, backend) for backend in given)]):
        yield


@contextmanager
def only_backends(*names: str) -> Generator[None]:
    """Let no installed backends but these be found inside the `with`; `installed_backends` may add others there."""
    with _finding(lambda points: [point for point in points if point.name in names]):
        yield


@contextmanager
def _finding(change: Callable[[list[Any]], list[Any]]) -> Generator[None]:
    """Find what `change` makes of the backends found before."""
    before: Any = vars(backends)["entry_points"]

    def found(*, group: str) -> list[Any]:
        return change([*before(group=group)])

    with mock.patch.object(backends, "entry_points", found):
        backends.forget()
        try:
            yield
        finally:
            backends.forget()


@dataclass(frozen=True)
class _Point:
    """An entry point that stands for an object at hand."""

    name: str
    backend: Backend
    dist: None = None

    @property
    def value(self) -> str:
        return repr(self.backend)

    def load(self) -> Backend:
        return self.backend


def _takes_all(call: Call) -> str | None:
    del call


def _pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """Every part with one dimension more, which no kernel could mistake for the portable layout."""
    return tuple(part.unsqueeze(0).clone() for part in weight.inner_tensors().values())


def _unpack(parts: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    return {name: part.squeeze(0) for name, part in zip(description.names, parts, strict=True)}
