"""The rule that experts are stored one by one, whatever a model does with them in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lowbit_hf.lint.finding import Finding, name_all
from lowbit_hf.lint.subject import Subject

_STACK = re.compile(r".+\.experts\.(?!\d)\w+?[._](weight_)?(packed|scale|zero_point|global_scale)")


def check_stacked(subject: Subject) -> Iterator[Finding]:
    """Quantized experts in three dimensions, for which compressed-tensors has no keys."""
    names = [name for name in subject.checkpoint.entries if _STACK.fullmatch(name)]
    if names:
        yield Finding(
            severity="error",
            key=name_all(names),
            what="experts are stored as one stack",
            fix="store each by itself, as experts.0.gate_proj.weight_packed and so on",
            runtimes=subject.everywhere,
        )
