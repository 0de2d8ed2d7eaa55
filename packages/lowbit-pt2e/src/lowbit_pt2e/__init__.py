"""Passes over exported graphs: each change is checked, and refused where results would differ."""

from lowbit_pt2e.comparing import Compared, Comparison, compare
from lowbit_pt2e.drawing import to_dot, to_svg
from lowbit_pt2e.explaining import Explanation, explain
from lowbit_pt2e.folding import fold_norms
from lowbit_pt2e.graphs import Editor, GraphError, Region
from lowbit_pt2e.observing import Prepared, convert, prepare
from lowbit_pt2e.onednn import lower_to_onednn
from lowbit_pt2e.passes import Difference, Finding, Match, Pass, Report, run_passes
from lowbit_pt2e.quantizing import quantize_layers
from lowbit_pt2e.showing import to_html
from lowbit_pt2e.training import Learning, prepare_qat

__all__ = [
    "Compared",
    "Comparison",
    "Difference",
    "Editor",
    "Explanation",
    "Finding",
    "GraphError",
    "Learning",
    "Match",
    "Pass",
    "Prepared",
    "Region",
    "Report",
    "compare",
    "convert",
    "explain",
    "fold_norms",
    "lower_to_onednn",
    "prepare",
    "prepare_qat",
    "quantize_layers",
    "run_passes",
    "to_dot",
    "to_html",
    "to_svg",
]
