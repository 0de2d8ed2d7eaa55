"""Which kernel runs a call: backends found by entry point, every refusal kept with its reason.

A backend is an object named by the entry-point group `lowbit.backends`; it lists `Kernel` rows. `select` asks each row
whether it takes a `Call` and picks the willing one of highest priority; `explain` tells the whole story. The variable
`LOWBIT_BACKENDS=x86,reference`, read when backends are first needed, is an allow-list and an order: the first backend
with a willing kernel wins. A backend that cannot be loaded is a refusal that carries its exception, warned about once.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.errors import BackendError, NoKernelError
from lowbit.format import Format

if TYPE_CHECKING:
    from lowbit.tensor import Layout, QuantizedTensor

__all__ = ["Backend", "Call", "Description", "Kernel", "Refusal", "Selection"]

GROUP = "lowbit.backends"
VARIABLE = "LOWBIT_BACKENDS"


@dataclass(frozen=True, slots=True)
class Call:
    """What is known of a call before it runs; never the number of tokens, so one choice serves every batch."""

    # An operator of `lowbit.ops`, such as quantize or linear; one of another distribution has a dot in it.
    op: str
    # Format of the weight (of the result, for quantize); None where values are moved as they are.
    format: Format | None
    activation: Activation | None
    # Device type: "cpu", "cuda".
    device: str
    x_dtype: torch.dtype
    # Weight rows and columns where there is a weight.
    n: int | None = None
    k: int | None = None
    # Of attention, whose k is channels of a head: its scheme, and "mask" and "window" where there is one. Of a cache of
    # keys, whose format is above, and values: the format of values.
    facts: tuple[str, ...] = ()

    @staticmethod
    def of(
        op: str,
        fmt: str,
        activation: str,
        device: torch.device,
        dtype: torch.dtype,
        n: int | None,
        k: int | None,
        *facts: str,
    ) -> Call:
        """The call that spec strings stand for; no activation is an empty one."""
        parsed = Activation.parse(activation) if activation else None
        return Call(op, Format.parse(fmt) if fmt else None, parsed, device.type, dtype, n, k, facts)

    def __str__(self) -> str:
        """The call in a line."""
        shape = "" if self.n is None else f" n={self.n} k={self.k}"
        activation = "" if self.activation is None else f" x {self.activation}"
        fmt = "" if self.format is None else f" {self.format}"
        facts = "".join(f" {fact}" for fact in self.facts)
        return f"{self.op}{fmt}{activation} on {self.device}, {self.x_dtype}{shape}{facts}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a kernel, or a whole backend, does not take a call."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        """The refusal in a line."""
        return f"{self.kernel}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Description:
    """What a packed weight was before it was packed."""

    layout: Layout
    # Inner tensors that were present.
    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """The shape with the blocked axis last, (N, K) or (E, N, K)."""
        permutation = self.layout.permutation
        return tuple(self.shape[permutation.index(d)] for d in range(len(permutation)))


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to run one op on one device type."""

    # Unique; by convention `backend.op` or `backend.op_variant`.
    name: str
    op: str
    # "cpu", "cuda", or "any".
    device: str
    # Higher wins; the reference is 0.
    priority: int
    # Without `pack`: the op's own arguments. With it: (x, parts, description, bias), parts being what `pack` returned;
    # grouped_mm has offs in the place of the bias.
    run: Callable[..., Any]
    # None where the call is taken, otherwise the reason, as "needs ...; this is ...".
    refuses: Callable[[Call], str | None]
    # Lays a weight out for this kernel; `unpack` restores its inner tensors bit for bit. Only `bind` uses these.
    pack: Callable[[QuantizedTensor], tuple[Tensor, ...]] | None = None
    unpack: Callable[[tuple[Tensor, ...], Description], dict[str, Tensor]] | None = None
    # At how many tokens it is slower than the same op with a plain weight, as "100 to 400 tokens"; None: at none.
    slower: Callable[[Call], str | None] | None = None
    # Whether `pack` keeps the plain values, too, for where codes are slower; only bind(policy="fastest") takes such.
    keeps: bool = False
    # What runs for how many tokens, and why, where that is not always the same; None: it is.
    how: Callable[[Call], str | None] | None = None
    # Rows of a packed weight as values of its type, (ids, parts, description), for tables that linear layers share.
    lookup: Callable[[Tensor, tuple[Tensor, ...], Description], Tensor] | None = None


@runtime_checkable
class Backend(Protocol):
    """What an entry point of the group `lowbit.backends` resolves to.

    It may have a method `detail`, whose text `lowbit doctor` shows: what it found on this machine; and a method `fuse`,
    which changes a `torch.fx.Graph` that is being compiled: see `lowbit.compile_options`.
    """

    name: str

    def probe(self) -> str | None:
        """None if this machine can run the backend, otherwise the reason it cannot."""
        ...

    def kernels(self) -> tuple[Kernel, ...]:
        """Every kernel, also those this machine refuses."""
        ...


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen kernel and what refused before it."""

    call: Call
    kernel: Kernel
    refusals: tuple[Refusal, ...]


@dataclass
class Loaded:
    """An installed backend: the object, or the reason there is none to ask."""

    name: str
    distribution: str
    backend: Backend | None
    # Why it cannot be used at all; None if it can.
    problem: str | None
    kernels: tuple[Kernel, ...] = field(default=())


class _Registry:
    """Installed backends, loaded at first use, and the choices made so far."""

    def __init__(self) -> None:
        self.renew()
        self.generation = 0
        self._loaded: dict[str, Loaded] | None = None
        self._kernels: dict[str, Kernel] = {}
        self._choices: dict[tuple[Any, ...], Selection] = {}
        self._listed: str = ""

    def renew(self) -> None:
        """Start with a free lock, as a forked process must: the thread that held it is not there."""
        self._lock = threading.RLock()

    def installed(self) -> dict[str, Loaded]:
        with self._lock:
            if self._loaded is None:
                loaded = {point.name: _load(point) for point in _discover()}
                self._kernels = _kernels_by_name(loaded)
                self._listed = os.environ.get(VARIABLE, "")
                self._loaded = loaded
            return self._loaded

    def kernel(self, name: str) -> Kernel | None:
        self.installed()
        return self._kernels.get(name)

    def choose(self, call: Call, prefer: tuple[str, ...], *, bound: bool, keeps: bool) -> Selection:
        key = (call, prefer, bound, keeps)
        choice = self._choices.get(key)
        if choice is None:
            installed = self.installed()
            choice = self._choices[key] = _choose(installed, call, prefer, self._listed, bound=bound, keeps=keeps)
        return choice

    def forget(self) -> None:
        with self._lock:
            self.generation += 1
            self._loaded = None
            self._choices.clear()


_REGISTRY = _Registry()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_REGISTRY.renew)


def installed() -> dict[str, Loaded]:
    """Every installed backend by name, broken ones with their problem.

    Raises:
        BackendError: two distributions claim one backend name, or two kernels one kernel name.
    """
    return dict(_REGISTRY.installed())


def kernel(name: str) -> Kernel:
    """The kernel of that name.

    Raises:
        NoKernelError: no installed backend has it.
    """
    found = _REGISTRY.kernel(name)
    if found is None:
        msg = f"no installed backend has the kernel {name!r}; installed are {', '.join(_REGISTRY.installed())}"
        raise NoKernelError(msg)
    return found


def without_autocast(run: Callable[..., Any], device: str, *args: Any) -> Any:
    """Run a kernel on its arguments, outside autocast: that would round inside what the kernel computes exactly."""
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(*args)
    return run(*args)


def under_autocast(x: Tensor) -> Tensor:
    """`x` as autocast, where it is on, hands it to a linear layer."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@cache
def kernel_for(
    op: str,
    fmt: str,
    activation: str,
    device: torch.device,
    dtype: torch.dtype,
    n: int | None,
    k: int | None,
    *facts: str,
) -> Kernel:
    """The kernel that runs an op on canonical weights; formats and activations by their spec strings ("": none).

    Raises:
        NoKernelError: none takes it.
    """
    return select(Call.of(op, fmt, activation, device, dtype, n, k, *facts), bound=False).kernel


def generation() -> int:
    """How often backends were forgotten: what was chosen under another number may no longer hold."""
    return _REGISTRY.generation


def forget() -> None:
    """Find backends and read LOWBIT_BACKENDS anew at the next use; for tests that install some."""
    _REGISTRY.forget()
    kernel_for.cache_clear()


def select(call: Call, *, prefer: Sequence[str] = (), bound: bool = True, keeps: bool = False) -> Selection:
    """The kernel that runs `call`, of highest priority among those that take it; cached.

    `prefer` names the only backends that will do. `bound=False` leaves out kernels that need their weight packed first,
    `keeps=False` those that keep its plain values.

    Raises:
        NoKernelError: none takes it; the message lists every refusal.
        BackendError: `prefer` or LOWBIT_BACKENDS names a backend that is not installed, or names clash.
    """
    return _REGISTRY.choose(call, tuple(prefer), bound=bound, keeps=keeps)


def explain(call: Call, *, prefer: Sequence[str] = ()) -> str:
    """Which kernel would run `call` on this machine, and why each other would not."""
    try:
        choice = select(call, prefer=prefer)
    except NoKernelError as error:
        return str(error)
    lines = [f"{call}", f"  runs on {choice.kernel.name} (priority {choice.kernel.priority})"]
    if choice.kernel.how is not None and (how := choice.kernel.how(call)) is not None:
        lines.append(f"  {how}")
    if (slower := slower_at(choice)) is not None:
        lines.append(f"  slower than a plain weight at {slower}")
    return "\n".join(lines + [f"  refused by {refusal}" for refusal in choice.refusals])


def slower_at(choice: Selection) -> str | None:
    """At how many tokens the chosen kernel is slower than the same op with a plain weight, in words; None: at none."""
    return None if choice.kernel.slower is None else choice.kernel.slower(choice.call)


def _discover() -> list[EntryPoint]:
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    for first, second in pairwise(points):
        if first.name == second.name:
            msg = (
                f"two installed distributions provide the backend {first.name!r}: {_owner(first)} ({first.value}) and "
                f"{_owner(second)} ({second.value}); uninstall one"
            )
            raise BackendError(msg)
    return points


def _owner(point: EntryPoint) -> str:
    return "an unknown distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _load(point: EntryPoint) -> Loaded:
    try:
        backend = point.load()
        if not isinstance(backend, Backend) or backend.name != point.name:
            msg = f"{point.value} must have name={point.name!r}, probe() and kernels(); it is {backend!r}"
            raise BackendError(msg)  # noqa: TRY301 - reported the same way as a failing import
        kernels = tuple(backend.kernels())
        return Loaded(point.name, _owner(point), backend, backend.probe(), kernels)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's import raises is shown, in place of the backend
        problem = f"failed to load: {type(error).__name__}: {error}"
        warnings.warn(f"lowbit backend {point.name!r} ({_owner(point)}) {problem}", RuntimeWarning, stacklevel=2)
        return Loaded(point.name, _owner(point), None, problem)


def _kernels_by_name(loaded: dict[str, Loaded]) -> dict[str, Kernel]:
    owners: dict[str, str] = {}
    kernels: dict[str, Kernel] = {}
    for entry in loaded.values():
        for row in entry.kernels:
            if row.name in kernels:
                msg = (
                    f"the kernel name {row.name!r} is used twice, by backends {owners[row.name]!r} and {entry.name!r}; "
                    "rename one"
                )
                raise BackendError(msg)
            owners[row.name], kernels[row.name] = entry.name, row
    return kernels


def _allowed(loaded: dict[str, Loaded], prefer: tuple[str, ...], variable: str) -> tuple[list[str], bool]:
    """Names of the backends to ask, and whether their order decides."""
    listed = [name.strip() for name in variable.split(",") if name.strip()]
    for source, names in ((VARIABLE, listed), ("prefer", prefer)):
        for name in names:
            if name not in loaded:
                msg = f"{source} names the backend {name!r}, which is not installed; installed are {', '.join(loaded)}"
                raise BackendError(msg)
    names = [name for name in listed or loaded if not prefer or name in prefer]
    return names, bool(listed)


def _choose(
    loaded: dict[str, Loaded], call: Call, prefer: tuple[str, ...], variable: str, *, bound: bool, keeps: bool
) -> Selection:
    names, ordered = _allowed(loaded, prefer, variable)
    refusals = [
        Refusal(name, f"{VARIABLE}={variable} leaves it out")
        for name in (prefer or loaded)
        if ordered and name not in names
    ]
    willing: list[tuple[tuple[int, int], Kernel]] = []
    for position, name in enumerate(names):
        entry = loaded[name]
        if entry.problem is not None:
            refusals.append(Refusal(name, entry.problem))
            continue
        for kernel in (k for k in entry.kernels if k.op == call.op):
            reason = _refusal(kernel, call, bound=bound, keeps=keeps)
            if reason is None:
                willing.append(((-position if ordered else 0, kernel.priority), kernel))
            else:
                refusals.append(Refusal(kernel.name, reason))
    if not willing:
        told = "\n".join(f"  {refusal}" for refusal in refusals) or "  no backend has a kernel for this op"
        asked = ", ".join(prefer or names)
        msg = f"no kernel of {asked} takes {call}:\n{told}\nRun `lowbit doctor` for what is installed."
        raise NoKernelError(msg)
    willing.sort(key=lambda pair: pair[0], reverse=True)
    (first, _), chosen = willing[0]
    passed = [
        Refusal(
            k.name,
            f"{VARIABLE} puts {chosen.name} first"
            if position < first
            else f"priority {k.priority}; {chosen.name} has {chosen.priority}",
        )
        for (position, _), k in willing[1:]
    ]
    return Selection(call, chosen, (*refusals, *passed))


def _refusal(kernel: Kernel, call: Call, *, bound: bool, keeps: bool) -> str | None:
    if kernel.device not in {"any", call.device}:
        return f"needs a {kernel.device} tensor; this one is on {call.device}"
    if kernel.pack is not None and not bound:
        return "needs its weight packed; call lowbit.bind(model)"
    if kernel.keeps and not keeps:
        return 'keeps plain values beside the codes; lowbit.bind(model, policy="fastest") asks for that'
    return kernel.refuses(call)
