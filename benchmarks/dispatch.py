"""What lowbit adds to a kernel in eager mode: microseconds of an op through a quantized weight, above the kernel alone.

The kernels do nothing, so only the way to them is timed. Run: python benchmarks/dispatch.py --out benchmarks/x.json
"""

from __future__ import annotations

import argparse
import json
import platform
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lowbit import QuantizedTensor, bind, quantize
from lowbit.backends import Call, Description, Kernel
from lowbit.testing import installed_backends

CALLS, ROUNDS = 10_000, 25


def takes_all(call: Call) -> str | None:
    """Refuse nothing."""
    del call


def pack(weight: QuantizedTensor) -> tuple[Tensor, ...]:
    """The weight's tensors as they are."""
    return tuple(weight.inner_tensors().values())


def unpack(parts: tuple[Tensor, ...], description: Description) -> dict[str, Tensor]:
    """These tensors by name."""
    return dict(zip(description.names, parts, strict=True))


class Nothing:
    """A backend whose kernels return a tensor they have at hand, for canonical or for packed weights."""

    name = "nothing"

    def __init__(self, *, packs: bool) -> None:
        self.packs, self.answer = packs, torch.zeros(1, 64)

    def probe(self) -> str | None:
        """Run everywhere."""

    def run(self, *args: Any) -> torch.Tensor:
        """Give the answer at once."""
        del args
        return self.answer

    def kernels(self) -> tuple[Kernel, ...]:
        """One for each use of a weight."""
        packing: tuple[Any, ...] = ()
        if self.packs:
            packing = (pack, unpack)
        return (
            *(Kernel(f"nothing.{op}", op, "any", 100, self.run, takes_all, *packing) for op in ("linear", "embedding")),
            Kernel("nothing.grouped_mm", "grouped_mm", "any", 100, self.run, takes_all),
        )


class Caught(torch.Tensor):
    """What any tensor subclass costs: torch hands the function to Python, which answers at once."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Answer with the first argument."""
        del func, types, kwargs
        return args[0]


def rows(backend: Nothing) -> Iterator[dict[str, Any]]:
    """Time every use of a weight, in every mode."""
    x, ids, offs = torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    layer, table = torch.nn.Linear(64, 64, bias=False), torch.nn.Embedding(64, 64)
    for module in (layer, table):
        module.weight = torch.nn.Parameter(quantize(torch.randn(64, 64), "INT8_ROW"), requires_grad=False)
        bind(module)
    uses: dict[str, tuple[Callable[[torch.Tensor], Any], torch.Tensor]] = {
        "linear": (lambda weight: functional.linear(x, weight), layer.weight),
        "embedding": (lambda weight: functional.embedding(ids, weight), table.weight),
        "grouped_mm": (
            lambda weight: functional.grouped_mm(x, weight, offs=offs),
            quantize(torch.randn(1, 64, 64), "INT8_ROW").mT,
        ),
    }
    arguments, caught = (x, *[None] * 10), torch.zeros(1, 64).as_subclass(Caught)
    for (op, (use, weight)), mode in product(uses.items(), (torch.no_grad, torch.inference_mode, torch.enable_grad)):
        with mode():
            kernel = microseconds(partial(backend.run, *arguments))
            through, bare = microseconds(partial(use, weight)), microseconds(partial(use, caught))
        yield {
            "op": op,
            "weight": "packed" if backend.packs and op != "grouped_mm" else "canonical",
            "mode": mode.__name__,
            "kernel_us": round(kernel, 2),
            "added_us": round(through - kernel, 2),
            "any_subclass_us": round(bare, 2),
        }


def microseconds(function: Callable[[], Any]) -> float:
    """Time of one call, the least of some rounds: what another process took is not lowbit's."""
    function()
    return min(timeit.repeat(function, number=CALLS, repeat=ROUNDS)) / CALLS * 1e6


def main() -> None:
    """Time canonical and packed weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for packs in (False, True):
        backend = Nothing(packs=packs)
        with installed_backends(backend):
            found += rows(backend)
    told = {"torch": torch.__version__, "python": platform.python_version(), "cpu": cpu(), "rows": found}
    text = json.dumps(told, indent=1)
    print(text)  # noqa: T201 - a script's answer
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
