"""`check_backend`: every kernel of a backend on every call it takes, against what the format says must come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lowbit.activation import Activation
from lowbit.attention_cases import attentions
from lowbit.backends import Backend, Call, Description, Kernel
from lowbit.cache_cases import caches
from lowbit.cases import Case, Cases, Wanted, calls, moves
from lowbit.errors import BackendError, NoKernelError
from lowbit.format import Format
from lowbit.grid import FORMAT_GRID
from lowbit.reference import backend as reference
from lowbit.table import align
from lowbit.tensor import QuantizedTensor

ACTIVATIONS: tuple[Activation, ...] = tuple(
    map(
        Activation.parse,
        (
            "dynamic:INT8_ROW",
            "dynamic:INT8_ROW_ASYM",
            "static:INT8_TENSOR",
            "static:INT8_TENSOR_ASYM",
            "dynamic:FP8_ROW",
            "dynamic:FP8_1x128",
            "static:FP8_TENSOR",
            "dynamic:MXFP8",
            "dynamic:MXFP8@rceil",
            "dynamic:MXFP6_E2M3",
            "dynamic:MXFP4",
            "dynamic:NVFP4",
            "local:NVFP4",
        ),
    )
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((128, 384),)
_OPS = tuple(kernel.op for kernel in reference.kernels() if kernel.pack is None)
# Those whose weights bind packs.
_PACKED = ("linear", "embedding", "grouped_mm")


@dataclass(frozen=True, slots=True)
class Checked:
    """What was tried on one kernel."""

    kernel: str
    # Calls it took, and how often it ran: a call has several shapes of input.
    calls: int
    runs: int
    # Calls it refused, by reason.
    refusals: dict[str, int]


@dataclass(frozen=True, slots=True)
class Check:
    """What `check_backend` tried; everything that ran was right."""

    rows: tuple[Checked, ...]

    def __str__(self) -> str:
        """A line a kernel, and below why those refused that took no call at all."""
        lines = align(
            [
                {
                    "kernel": row.kernel,
                    "calls taken": str(row.calls),
                    "runs": str(row.runs),
                    "calls refused": str(sum(row.refusals.values())),
                }
                for row in self.rows
            ]
        )
        idle = [row for row in self.rows if not row.calls]
        return "\n".join(lines + [f"{row.kernel}: {reason}" for row in idle for reason in row.refusals])


@dataclass
class _Trial:
    """One kernel so far; after its first fault it is left alone."""

    kernel: Kernel
    calls: int = 0
    runs: int = 0
    refusals: Counter[str] = field(default_factory=Counter[str])
    fault: str | None = None
    cause: Exception | None = None

    def end(self, where: str, error: Exception) -> None:
        told = str(error) if isinstance(error, _FaultError) else f"raises {type(error).__name__}: {error}"
        self.fault, self.cause = f"{where} {told}", error


class _FaultError(Exception):
    """What a kernel did wrong, in words."""


def check_backend(
    backend: Backend,
    *,
    formats: Sequence[Format] = FORMAT_GRID,
    activations: Sequence[Activation] = ACTIVATIONS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    devices: Sequence[str] | None = None,
) -> Check:
    """Run every kernel of `backend` on every call it takes, op by format by shape, and compare with what must come out.

    `lowbit.cases` says what that is: the reference's bits, or a bound that follows from the format. A call runs with
    and without bias and `pre_scale`, on no, one and many tokens, with outliers; what a kernel packs must unpack to the
    same bits. `shapes` are weights (N, K) to try besides small odd ones, where the format's blocks divide them.
    Without `devices`: the CPU, and CUDA where it is available.

    Raises:
        BackendError: the backend breaks its contract, or a kernel is wrong; the message has the first fault of each
            kernel with its call, shapes, error and bound.
        NoKernelError: nothing ran, so nothing was shown: the backend cannot run here, or takes none of these calls.
    """
    trials = [_Trial(kernel) for kernel in _kernels(backend)]
    if devices is None:
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    with torch.no_grad():
        for device in devices:
            made = (calls(fmt, activations, dtypes, shapes, device) for fmt in formats)
            for call, cases in chain(moves(dtypes, device), attentions(dtypes, device), caches(dtypes, device), *made):
                takers = [trial for trial in trials if _takes(trial, call)]
                if takers:
                    _try(takers, call, cases)
    wrong = [trial for trial in trials if trial.fault is not None]
    if wrong:
        faults = "\n".join(f"  {trial.kernel.name}: {trial.fault}" for trial in wrong)
        raise BackendError(f"backend {backend.name!r} is wrong:\n{faults}") from wrong[0].cause
    if not any(trial.runs for trial in trials):
        told = [f"  {trial.kernel.name}: {reason}" for trial in trials for reason in trial.refusals]
        raise NoKernelError(
            f"backend {backend.name!r} took no call, so nothing was checked; give formats=, activations=, dtypes=, "
            f"shapes= or devices= that it takes:\n" + ("\n".join(told) or "  it has no kernels")
        )
    return Check(tuple(Checked(t.kernel.name, t.calls, t.runs, dict(t.refusals)) for t in trials))


def _kernels(backend: Backend) -> tuple[Kernel, ...]:
    """The backend's kernels, if it keeps to its contract and this machine can run it."""
    if not isinstance(backend, Backend):  # pyright: ignore[reportUnnecessaryIsInstance] - a stranger's object
        raise BackendError(f"{backend!r} must have name, probe() and kernels()")
    if (reason := backend.probe()) is not None:
        raise NoKernelError(f"backend {backend.name!r} cannot run here, so nothing was checked: {reason}")
    kernels = tuple(backend.kernels())
    doubled = [name for name, count in Counter(kernel.name for kernel in kernels).items() if count > 1]
    if doubled:
        raise BackendError(f"backend {backend.name!r} has two kernels of one name: {', '.join(doubled)}; rename one")
    for kernel in kernels:
        # An op with a dot, such as `algos.round_columns`, is another distribution's, which alone knows what is right.
        if kernel.op not in _OPS and "." not in kernel.op:
            raise BackendError(f"kernel {kernel.name!r} has the op {kernel.op!r}; it must be one of {', '.join(_OPS)}")
    return kernels


def _takes(trial: _Trial, call: Call) -> bool:
    if trial.kernel.op != call.op or trial.fault is not None:
        return False
    try:
        reason = _refusal(trial.kernel, call)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's code raises is told
        trial.end(f"{call}: refuses", error)
        return False
    if reason is None:
        trial.calls += 1
    else:
        trial.refusals[reason] += 1
    return reason is None


def _refusal(kernel: Kernel, call: Call) -> str | None:
    if kernel.device not in {"any", call.device}:
        return f"needs a {kernel.device} tensor; this one is on {call.device}"
    if kernel.pack is not None and kernel.op not in _PACKED:
        return f"needs its weight packed; bind packs for {', '.join(_PACKED[:-1])} and {_PACKED[-1]} alone"
    reason: Any = kernel.refuses(call)
    if reason is not None and not (isinstance(reason, str) and reason):
        raise _FaultError(f"gives {reason!r}, which is neither None nor a reason")
    if kernel.refuses(call) != reason:
        raise _FaultError(f"changes its answer, at first {reason!r}")
    return reason


def _try(takers: Sequence[_Trial], call: Call, cases: Cases) -> None:
    for case in cases():
        for trial in takers:
            if trial.fault is None and (trial.kernel.pack is not None or not case.autocast):
                trial.runs += 1
                try:
                    _check(trial.kernel, call, case)
                except Exception as error:  # noqa: BLE001 - whatever a stranger's code raises is told
                    trial.end(f"{call}; {case.told}: it", error)


def _check(kernel: Kernel, call: Call, case: Case) -> None:
    """Run the kernel once.

    Raises:
        _FaultError: what comes out, or what becomes of the arguments, is wrong.
    """
    arguments = tuple(_to(argument, call.device) for argument in case.arguments)
    weight, parts = None, ()
    if kernel.pack is not None:
        assert case.weight is not None
        inner = {name: _to(part, call.device) for name, part in case.weight.inner_tensors().items()}
        weight = case.weight.with_inner(inner)
        parts = kernel.pack(weight)
        description = Description(weight.storage_layout, tuple(inner), tuple(weight.shape))
        third = arguments[1] if call.op == "grouped_mm" else _to(case.bias, call.device)
        arguments = (arguments[0], parts, description, third)
    given = [tensor for tensor in (*arguments, *parts) if isinstance(tensor, Tensor)]
    written: list[Any] = [arguments[i] for i in case.written]
    kept = [tensor for tensor in given if not any(tensor is each for each in written)]
    before = [tensor.clone() for tensor in kept]
    result: Any = kernel.run(*arguments)
    if any(_unlike(*pair).any() for pair in zip(kept, before, strict=True)):
        raise _FaultError("changes its arguments")
    found = _outputs(result, call, given)
    if weight is not None and kernel.unpack is not None:
        _check_unpacked(kernel.unpack(parts, arguments[2]), weight)
    found = [part.cpu() for part in (*found, *written)]
    found = found if case.read is None else case.read(found)
    if len(found) != len(case.wanted):
        raise _FaultError(f"returns {len(found)} tensors; needed are {len(case.wanted)}")
    for part, wanted in zip(found, case.wanted, strict=True):
        _compare(part, wanted)


def _outputs(result: Any, call: Call, given: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the kernel returned, as promised: tensors of their own, without gaps, or as queries where like these."""
    several = call.op.startswith("quantize") or call.op in {"attention", "varlen_attention", "pad_groups"}
    found: Sequence[Any] = result if several else [result]
    if not isinstance(found, (list, tuple)) or not all(isinstance(part, Tensor) for part in found):
        raise _FaultError(f"returns {type(result).__name__}; needed is {'tensors' if several else 'a tensor'}")
    memory = {tensor.untyped_storage().data_ptr() for tensor in given if tensor.numel()}
    for i, part in enumerate(found):
        as_queries = call.op == "attention" and i == 0
        right = part.stride() == torch.empty_like(given[0]).stride() if as_queries else part.is_contiguous()
        if part.device.type != call.device or not right:
            needed = f"tensor in the strides of queries, {given[0].stride()}," if as_queries else "contiguous tensor"
            raise _FaultError(
                f"returns shape {tuple(part.shape)} in strides {part.stride()} on {part.device}; needed is a "
                f"{needed} on {call.device}"
            )
        if part.numel() and part.untyped_storage().data_ptr() in memory:
            raise _FaultError("returns memory of its arguments; an operator's result must be new")
    return found


def _check_unpacked(inner: dict[str, Tensor], weight: QuantizedTensor) -> None:
    wanted = weight.inner_tensors()
    if inner.keys() != wanted.keys():
        raise _FaultError(f"unpacks {', '.join(inner)}; packed were {', '.join(wanted)}")
    for name, part in wanted.items():
        try:
            _compare(inner[name].cpu(), Wanted(part.cpu(), part.dtype))
        except _FaultError as error:
            raise _FaultError(f"unpacks another {name} than was packed: it {error}") from None


def _compare(found: Tensor, wanted: Wanted) -> None:
    if (tuple(found.shape), found.dtype) != (tuple(wanted.value.shape), wanted.dtype):
        raise _FaultError(
            f"gives {found.dtype} of shape {tuple(found.shape)}; needed is {wanted.dtype} of shape "
            f"{tuple(wanted.value.shape)}"
        )
    error = (_wide(found) - _wide(wanted.value)).abs()
    if wanted.bound is None:
        bound, excess = torch.zeros_like(error), error
        wrong = _unlike(found, wanted.value)
    else:
        # A NaN is beyond any bound.
        bound, excess = wanted.bound, error / wanted.bound
        wrong = ~(error <= bound)
    if wrong.any():
        worst = int(torch.where(wrong, excess.nan_to_num(torch.inf, torch.inf), -1.0).argmax())
        raise _FaultError(
            f"errs in {int(wrong.sum())} of {wrong.numel()} values, most by {error.flatten()[worst].item():.3g} at "
            f"{tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), wrong.shape))}, where the bound is "
            f"{bound.flatten()[worst].item():.3g}{' (the bits must be equal)' if wanted.bound is None else ''}"
        )


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ in bits; one NaN is as good as another."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    unlike = a.view(bits) != b.view(bits)
    return unlike & ~(_wide(a).isnan() & _wide(b).isnan()) if unlike.any() else unlike


def _wide(tensor: Tensor) -> Tensor:
    # 8-bit floats convert to float32 alone.
    return (tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor).to(torch.float64)


def _to(argument: Any, device: str) -> Any:
    """A copy, so that what a kernel does to its arguments spoils no other case; unlike `to`, it keeps a view's gaps."""
    if not isinstance(argument, Tensor):
        return argument
    empty = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=device)
    return empty.copy_(argument)
