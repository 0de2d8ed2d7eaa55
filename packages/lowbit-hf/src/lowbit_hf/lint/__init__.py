"""Whether a checkpoint will load and be right in vLLM, SGLang and transformers, told from its headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lowbit.errors import CheckpointError
from lowbit.shards import Checkpoint
from lowbit_hf.lint.envelope import check_envelope
from lowbit_hf.lint.finding import Finding, Report, Severity, Verdict, merge
from lowbit_hf.lint.foreign import check_foreign, check_modelopt_file, named_quantization
from lowbit_hf.lint.gpus import capability_of
from lowbit_hf.lint.sglang import SGLANG
from lowbit_hf.lint.stacked import check_stacked
from lowbit_hf.lint.storage import check_scales, check_storage
from lowbit_hf.lint.structure import check_structure
from lowbit_hf.lint.subject import Subject
from lowbit_hf.lint.support import check_support, support_of
from lowbit_hf.lint.table import Runtime
from lowbit_hf.lint.transformers import TRANSFORMERS
from lowbit_hf.lint.vllm import VLLM

__all__ = ["RUNTIMES", "Finding", "Report", "Severity", "Verdict", "lint"]

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (VLLM, TRANSFORMERS, SGLANG)}
"""The runtimes whose rules are known, by name."""

_PICKLES = ("pytorch_model*.bin", "model*.bin", "consolidated*.pth", "model*.pt")


def lint(folder: Path, runtimes: Sequence[str] = (), *, tp: int = 1, gpu: str | None = None) -> Report:
    """Check a Hugging Face folder against the rules of `runtimes`, all of them where none is named.

    `tp` is the number of GPUs that each layer is divided among, `gpu` a name or a capability such as sm90. Headers and
    scales are read, weights are not.

    Raises:
        RecipeError: the GPU is unknown.
        CheckpointError: there is no `config.json` that can be read.
    """
    chosen = tuple(RUNTIMES[name] for name in runtimes or RUNTIMES)
    device = None if gpu is None else (gpu, capability_of(gpu))
    names = tuple(runtime.name for runtime in chosen)
    findings = list(_check_files(folder, names))
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        if not findings:
            findings.append(_unreadable(folder, error, names))
        verdicts = [
            Verdict(runtime=r.name, version=r.version, source=r.source, loads=False, support=()) for r in chosen
        ]
        return Report(findings=tuple(findings), verdicts=tuple(verdicts))
    with checkpoint:
        subject = Subject(folder, checkpoint, chosen, tp, device)
        found = merge([*findings, *_check(subject)])
        return Report(findings=tuple(found), verdicts=tuple(_verdict(subject, runtime, found) for runtime in chosen))


def _check(subject: Subject) -> Iterator[Finding]:
    yield from _check_architecture(subject)
    yield from check_modelopt_file(subject, subject.folder)
    if not named_quantization(subject.config):
        yield Finding(
            severity="error",
            key="quantization_config",
            what="it is no JSON object",
            fix="write the object that the quantizer made, or delete the key",
            runtimes=subject.everywhere,
        )
    elif subject.method == "compressed-tensors":
        yield from check_envelope(subject)
        yield from check_stacked(subject)
        yield from check_structure(subject)
        yield from check_storage(subject)
        yield from check_support(subject)
    elif subject.method is not None:
        yield from check_foreign(subject)
    yield from check_scales(subject)


def _check_architecture(subject: Subject) -> Iterator[Finding]:
    readers = subject.readers
    if subject.unknown is not None and readers:
        yield Finding(
            severity="error",
            key="architectures",
            what=subject.unknown,
            fix="upgrade transformers, or correct the key",
            runtimes=readers,
        )


def _check_files(folder: Path, runtimes: tuple[str, ...]) -> Iterator[Finding]:
    pickles = sorted({file.name for pattern in _PICKLES for file in folder.glob(pattern)})
    whole = any(folder.glob("*.safetensors"))
    for name in pickles:
        yield Finding(
            severity="warning" if whole else "error",
            key=name,
            what="it is a pickle, which can run code" + (", beside the safetensors" if whole else ""),
            fix="delete it" if whole else "convert what you trust: from_pretrained(FOLDER).save_pretrained(NEW)",
            runtimes=runtimes,
        )


def _unreadable(folder: Path, error: CheckpointError, runtimes: tuple[str, ...]) -> Finding:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    key = next((name for name in files if name in str(error)), "model.safetensors")
    return Finding(severity="error", key=key, what=str(error), fix="download or write it again", runtimes=runtimes)


def _verdict(subject: Subject, runtime: Runtime, findings: Sequence[Finding]) -> Verdict:
    loads = not any(finding.severity == "error" and runtime.name in finding.runtimes for finding in findings)
    support = tuple(support_of(subject, runtime)) if subject.method == "compressed-tensors" else ()
    return Verdict(runtime=runtime.name, version=runtime.version, source=runtime.source, loads=loads, support=support)
