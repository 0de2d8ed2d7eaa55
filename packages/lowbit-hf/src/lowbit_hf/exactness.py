"""Whether what was written still means what it was made from, weight by weight, and by how much not."""

from __future__ import annotations

import json
from math import inf

import torch
from torch import Tensor

from lowbit.staging import Staging
from lowbit.tensor import QuantizedTensor

# In the scratch folder: a line for each weight that changed.
_INEXACT = "inexact.jsonl"


def note_change(staging: Staging, name: str, before: QuantizedTensor, after: QuantizedTensor) -> None:
    """Note in the scratch folder by how much a weight changed, if it did."""
    change = _change(before, after)
    if change:
        path = staging.scratch / _INEXACT
        with path.open("a") as lines:
            # A kill may have left a line without its end.
            lines.write("\n" + json.dumps([name, change]))
        staging.wrote(path)


def changes(staging: Staging) -> dict[str, float]:
    """Weights that changed, and by how much: the largest difference over the largest value."""
    path = staging.scratch / _INEXACT
    lines = path.read_text().split("\n") if path.is_file() else []
    found: dict[str, float] = {}
    for line in lines:
        # A line that a kill cut off is written again.
        if line.endswith("]"):
            name, change = json.loads(line)
            found[name] = change
    return found


def _change(before: QuantizedTensor, after: QuantizedTensor) -> float:
    """The largest difference of two weights' values, over the largest value; and of what rounds their inputs."""
    a, b = before.dequantize(torch.float32), after.dequantize(torch.float32)
    found = [_relative(a, b)]
    for name in ("act_scale", "act_zero", "pre_scale"):
        one, two = getattr(before, name), getattr(after, name)
        if one is not None and two is not None:
            found.append(_relative(one.to(torch.float32), two.to(torch.float32)))
        elif one is not None or two is not None:
            found.append(inf)
    return max(found, default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    return float((a - b).abs().amax() / a.abs().amax().clamp_min(torch.finfo(torch.float32).tiny))
