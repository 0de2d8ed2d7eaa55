"""What a lint says: one finding a defect, and what each runtime makes of the schemes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from lowbit.table import fold

Severity = Literal["error", "warning"]
"""An error does not load or gives wrong results; a warning loads, but is slower or less accurate."""

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One defect: where it is, what is wrong, what to do, and who minds."""

    severity: Severity
    # A path in `config.json`, a tensor's or module's name, or a file's.
    key: str
    what: str
    fix: str
    runtimes: tuple[str, ...]
    # The GPU that minds, where others do not.
    gpu: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What one runtime makes of one config group."""

    group: str
    # The table's name for the scheme; None: no row of the table fits.
    scheme: str | None
    # Where its modules lie: "linear" or "experts".
    part: str
    gpus: str
    kernel: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All that is known of one runtime and the checkpoint."""

    runtime: str
    version: str
    # What was read for the runtime's table of rules.
    source: str
    loads: bool
    support: tuple[Support, ...]

    def told(self) -> str:
        """What it makes of each part, in a line."""
        taken = [
            f"{each.scheme or 'refused'}{' experts' if each.part == 'experts' else ''}"
            + (f" on {each.gpus}" if each.scheme else "")
            + (f" ({each.kernel})" if each.kernel else "")
            for each in self.support
        ]
        return "; ".join(dict.fromkeys(taken))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of `lowbit_hf.lint.lint`."""

    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def failed(self) -> bool:
        """Whether anything is an error."""
        return any(finding.severity == "error" for finding in self.findings)


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """One finding for each defect that several runtimes mind alike; errors first, in order of appearance."""
    merged: dict[Finding, tuple[str, ...]] = {}
    for finding in findings:
        key = replace(finding, runtimes=())
        known = merged.get(key, ())
        merged[key] = (*known, *(name for name in finding.runtimes if name not in known))
    whole = [replace(finding, runtimes=runtimes) for finding, runtimes in merged.items()]
    return sorted(whole, key=lambda finding: finding.severity)


def name_all(names: Iterable[str]) -> str:
    """Names that a layer number tells apart written once, the first few of them: `layers.{0..31}.mlp.gate`."""
    folded = [name for name, _ in fold(sorted(names))]
    more = f" and {len(folded) - _SHOWN} more" if len(folded) > _SHOWN else ""
    return ", ".join(folded[:_SHOWN]) + more
