"""What lowbit adds to torch.compile: a pass in which backends fuse what they have kernels for."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph

from lowbit.backends import installed


def compile_options() -> dict[str, Any]:
    """Options for `torch.compile(model, options=...)`: what makes inputs of low-bit products rounds them, too.

    Backends look in the graph for norms and gated activations whose result is rounded, and for products that share
    their inputs. Without these options a compiled model runs as well, with a kernel more for each product.
    """
    # Only who compiles needs it.
    from torch._inductor.custom_graph_pass import CustomGraphPass  # noqa: PLC0415

    class Fuse(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            for backend in _fusing():
                backend.fuse(graph)

        def uuid(self) -> Any:
            return tuple(f"{loaded.name} {loaded.distribution}" for loaded in installed().values())

    return {"post_grad_custom_pre_pass": Fuse()}


def _fusing() -> list[Any]:
    usable = (loaded.backend for loaded in installed().values() if loaded.problem is None)
    return [backend for backend in usable if hasattr(backend, "fuse")]
