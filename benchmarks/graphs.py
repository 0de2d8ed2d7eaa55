"""How fast int8 graphs run on a CPU, compiled, beside the float model and torchao's quantizer for Inductor.

    OMP_NUM_THREADS=2 python benchmarks/graphs.py --json FILE

makes ResNet-50, BERT-base and ViT-B/16 of random weights, exports them, and measures what torch.compile makes of each
contender, with Inductor's freezing:

- fp32: the model as it is.
- lowbit: norms folded, weights in INT8_ROW, static inputs in INT8_TENSOR_ASYM, layers by `lower_to_onednn`.
- lowbit dynamic: linear layers alone, inputs rounded as they come, by the kernels of lowbit-kernels-x86.
- torchao: X86InductorQuantizer as it is by default, static.

Static scales come of the same batches. Every model has a process of its own, in which contenders take turns; times are
those of the fastest turn, which what else runs on the machine delayed least, and quartiles stand beside them.
Deviations are from what the float model gives for one more batch. A contender that fails has its reason.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

import lowbit
from lowbit import Recipe, Rule
from lowbit.bench.environment import environment
from lowbit.bench.inputs import sqnr
from lowbit.table import align
from lowbit_pt2e import convert, fold_norms, prepare, quantize_layers
from lowbit_pt2e.onednn import lower_to_onednn

aten = torch.ops.aten
# Operators that multiply matrices or convolve, of floats.
PRODUCTS = (
    *(aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default),
    *(aten.baddbmm.default, aten.scaled_dot_product_attention.default),
    *(aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.convolution.default),
)
STATIC = Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),))
DYNAMIC = Recipe((Rule.of("*", "INT8_ROW", activation="dynamic:INT8_ROW"),))
# Batches that static scales come of.
CALIBRATION = 4
# Attention of the models that transformers has.
FUSED: dict[str, Any] = {"attn_implementation": "sdpa"}
# Seconds of a contender's turn, about.
TURN = 0.1


class One(nn.Module):
    """A model of transformers that takes one tensor, and gives one."""

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__()
        self.model, self.part = model, part

    def forward(self, x: Tensor) -> Tensor:
        """The part of what the model gives."""
        return getattr(self.model(x), self.part)


def resnet(batch: int) -> tuple[nn.Module, list[Tensor]]:
    """ResNet-50, whose norms have statistics of random images, and batches of such.

    Branches add little, as in trained ones: where they add as much as there is, any rounding of the image itself gives
    another result.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    model = One(ResNetForImageClassification(ResNetConfig()), "logits")
    for name, weight in model.named_parameters():
        if name.endswith("layer.2.normalization.weight"):
            weight.fill_(0.2)
    for norm in (each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
        # Statistics are means over all that was given.
        norm.momentum = None
    for _ in range(4):
        model(torch.randn(4, 3, 224, 224))
    images = [torch.randn(batch, 3, 224, 224) for _ in range(CALIBRATION + 1)]
    return model.to(memory_format=torch.channels_last), [each.to(memory_format=torch.channels_last) for each in images]


def bert(batch: int) -> tuple[nn.Module, list[Tensor]]:
    """The shape of BERT-base, and sequences of 128 tokens."""
    from transformers import BertConfig, BertModel

    how = BertConfig(**FUSED)
    tokens = [torch.randint(how.vocab_size, (batch, 128)) for _ in range(CALIBRATION + 1)]
    return One(BertModel(how, add_pooling_layer=False), "last_hidden_state"), tokens


def vit(batch: int) -> tuple[nn.Module, list[Tensor]]:
    """The shape of ViT-B/16, and images."""
    from transformers import ViTConfig, ViTModel

    how = ViTConfig(**FUSED)
    model = One(ViTModel(how, add_pooling_layer=False), "last_hidden_state")
    return model, [torch.randn(batch, 3, 224, 224) for _ in range(CALIBRATION + 1)]


MODELS: dict[str, Callable[[], tuple[nn.Module, list[Tensor]]]] = {
    "resnet50": partial(resnet, 1),
    "resnet50 x 16": partial(resnet, 16),
    "bert-base": partial(bert, 1),
    "vit-b/16": partial(vit, 1),
}


@dataclass(slots=True)
class Contender:
    """What is measured, and what there is to say of how it was made."""

    run: Callable[[Tensor], Tensor]
    told: dict[str, Any] = field(default_factory=dict)


def fp32(model: nn.Module, batches: list[Tensor]) -> Contender:
    """The model as it is."""
    del batches
    return Contender(torch.compile(model))


def static(model: nn.Module, batches: list[Tensor]) -> Contender:
    """Codes from layer to layer, by oneDNN."""
    graph = torch.export.export(model, (batches[-1],)).module()
    fold_norms(graph)
    prepared = prepare(graph, STATIC)
    for batch in batches[:-1]:
        prepared(batch)
    convert(prepared)
    report = lower_to_onednn(graph)
    reasons = Counter(f"{each.name}: {each.reason}" for each in report.refused)
    return Contender(torch.compile(graph), {"floats": floats(graph), "refused": reasons})


def dynamic(model: nn.Module, batches: list[Tensor]) -> Contender:
    """Linear layers by lowbit's own kernels."""
    graph = torch.export.export(model, (batches[-1],)).module()
    fold_norms(graph)
    report = quantize_layers(graph, DYNAMIC)
    lowered = lowbit.lower(torch.export.export(graph, (batches[-1],)), "x86")
    reasons = Counter(f"{each.name}: {each.reason}" for each in report.refused)
    kernels = Counter(str(row.kernel) for row in lowered.rows)
    graph = lowered.program.module()
    return Contender(torch.compile(graph), {"floats": floats(graph), "refused": reasons, "kernels": kernels})


def torchao(model: nn.Module, batches: list[Tensor]) -> Contender:
    """As torchao's documentation has it; its passes are Inductor's from when it is imported, so that it comes last."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e  # pyright: ignore[reportMissingImports]
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86  # pyright: ignore[reportMissingImports]

    graph = torch.export.export(model, (batches[-1],)).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph, quantizer)
    for batch in batches[:-1]:
        prepared(batch)
    return Contender(torch.compile(convert_pt2e(prepared)))


CONTENDERS: dict[str, Callable[[nn.Module, list[Tensor]], Contender]] = {
    "fp32": fp32,
    "lowbit": static,
    "lowbit dynamic": dynamic,
    "torchao": torchao,
}


def floats(graph: nn.Module) -> dict[str, list[str]]:
    """Products and convolutions of floats that a graph has, by operator."""
    found: dict[str, list[str]] = {}
    for node in graph.graph.nodes:  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues] - an fx graph
        if node.target in PRODUCTS:
            found.setdefault(str(node.target), []).append(node.name)
    return found


@torch.no_grad()
def measure(name: str, turns: int) -> list[dict[str, Any]]:
    """A row for each contender of one model."""
    inductor.freezing = True
    torch.manual_seed(0)
    model, batches = MODELS[name]()
    model.eval()
    x = batches[-1]
    exact, rows, running = model(x), [], {}
    for who, make in CONTENDERS.items():
        if make is dynamic and name.startswith("resnet"):
            # All of its layers convolve, but one.
            continue
        row: dict[str, Any] = {"model": name, "contender": who}
        rows.append(row)
        start = time.perf_counter()
        try:
            made = make(deepcopy(model), batches)
            found = made.run(x)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others run
            row["reason"] = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        row |= {"making_s": time.perf_counter() - start, "sqnr": sqnr(exact, found), **made.told}
        running[who] = made.run
    times = timed(running, x, turns)
    for row in rows:
        if row["contender"] in times:
            kept = times[row["contender"]]
            row |= {"seconds": min(kept), "quartiles": statistics.quantiles(kept)}
            row["over_fp32"] = min(times["fp32"]) / row["seconds"]
    return rows


def timed(running: dict[str, Callable[[Tensor], Tensor]], x: Tensor, turns: int) -> dict[str, list[float]]:
    """Seconds of a call, of each turn."""
    times: dict[str, list[float]] = {who: [] for who in running}
    calls: dict[str, int] = {}
    for who, run in running.items():
        run(x)
        calls[who] = max(1, int(TURN / seconds(run, x, 3)))
    order = list(running.items())
    for turn in range(turns):
        # Each is first as often: what runs before, and how hot it leaves the processor, is not the same for all.
        start = turn % len(order)
        for who, run in order[start:] + order[:start]:
            # What others drove out of caches comes back.
            run(x)
            times[who].append(seconds(run, x, calls[who]))
    return times


def seconds(run: Callable[[Tensor], Tensor], x: Tensor, calls: int) -> float:
    """Of a call, as so many take."""
    start = time.perf_counter()
    for _ in range(calls):
        run(x)
    return (time.perf_counter() - start) / calls


def main() -> None:
    """Measure each model in a process of its own, tell and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.stdout.write(json.dumps(measure(options.child, options.turns)) + "\n")
        return
    rows: list[dict[str, Any]] = []
    for name in options.models:
        child = [sys.executable, __file__, "--turns", str(options.turns), "--child", name]
        rows += json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    sys.stdout.write("\n".join(align([line(row) for row in rows])) + "\n")
    if options.json:
        result: dict[str, Any] = {"benchmark": "graphs", "environment": environment(torch.device("cpu"))}
        result["environment"]["versions"]["transformers"] = version("transformers")
        result |= {"calibration": CALIBRATION, "turns": options.turns, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def line(row: dict[str, Any]) -> dict[str, str]:
    """A row as it is told."""
    cells = {name: row[name] for name in ("model", "contender")} | {"ms": "", "over fp32": "", "SQNR, dB": ""}
    if "seconds" in row:
        cells |= {"ms": f"{1e3 * row['seconds']:.2f}", "over fp32": f"{row['over_fp32']:.2f}"}
        cells |= {"SQNR, dB": f"{row['sqnr']:.1f}"}
    left = ", ".join(f"{len(names)} {operator}" for operator, names in row.get("floats", {}).items())
    return cells | {"floats": left, "": row.get("reason", "")}


if __name__ == "__main__":
    main()
