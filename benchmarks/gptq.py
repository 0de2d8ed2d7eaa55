"""Seconds that GPTQ takes for a weight, given its Hessian, and the error it leaves; beside torchao's if that is there.

    pip install --no-deps torchao==0.18.0
    python benchmarks/gptq.py --out benchmarks/gptq.json

torchao's loop is for CUDA and needs a package of kernels. Here its check for CUDA and its waits for it are taken out,
and the two functions from that package are replaced by plain ones, so that the loop runs at all on a CPU.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit_algos import gptq


def problem(n: int, k: int) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(k, k, generator=generator) / k**0.5 + torch.eye(k) / 2
    x = torch.randn(2 * k, k, generator=generator) @ mix
    return torch.randn(n, k, generator=generator) / k**0.5, x.T @ x


def relative(weight: Tensor, values: Tensor, hessian: Tensor) -> float:
    """Error of the weight's products with such inputs, as a share of the products."""
    error = weight - values
    return float(((error @ hessian * error).sum() / (weight @ hessian * weight).sum()).sqrt())


@cache
def of_torchao(group: int) -> Callable[[Tensor, Tensor], Any] | None:
    """torchao's loop on int4 groups, or None where torchao is not installed."""
    try:
        from torchao.prototype.gptq import GPTQConfig, api
        from torchao.quantization import Int4WeightOnlyConfig
    except ImportError:
        return None

    def rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
        low, high = torch.aminmax(x.unflatten(1, (-1, group_size)), dim=2)
        scale = (high - low).clamp_min(1e-6) / 15
        codes = ((x.unflatten(1, (-1, group_size)) - low[..., None]) / scale[..., None]).round() - 8
        return codes.flatten(1).to(torch.int8), scale.t().contiguous(), (low + 8 * scale).t().contiguous()

    source = inspect.getsource(api.gptq_quantize).replace('assert device.type == "cuda"', "assert True")
    source = source.replace("torch.cuda.synchronize()", "pass")
    space = vars(api)
    space |= {"int4_row_quantize_zp": rows, "pack_int4": lambda q: q[:, ::2] & 15 | q[:, 1::2] << 4}
    exec(compile(source, "gptq_quantize", "exec"), space)  # noqa: S102 - the peer's own source, less its check
    config = GPTQConfig(step="convert", base_config=Int4WeightOnlyConfig(group_size=group))
    return lambda w, h: space["gptq_quantize"](h.clone(), w.clone(), config)


def seconds(run: Callable[[], Any], runs: int) -> tuple[float, Any]:
    """The median of some calls after a first one, and what the last gave."""
    times, result = [], run()
    for _ in range(runs):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times), 3), result


CHOICES: dict[str, dict[str, bool]] = {
    "GPTQ": {"act_order": False, "scale_search": False},
    "GPTQ, act-order": {"scale_search": False},
    "GPTQ, act-order and scale search": {},
}


def measured(n: int, k: int, formats: list[str], runs: int) -> Iterator[dict[str, Any]]:
    """A row for each format and algorithm on one shape."""
    weight, hessian = problem(n, k)
    for fmt in formats:
        told: dict[str, Any] = {"n": n, "k": k, "format": fmt}
        nearest = relative(weight, lowbit.quantize(weight, fmt).dequantize(), hessian)
        yield {**told, "algorithm": "round to nearest", "error": nearest}
        for name, choices in CHOICES.items():
            taken, found = seconds(partial(gptq, weight, hessian, fmt, **choices), runs)
            error = relative(weight, found.dequantize(), hessian)
            yield {**told, "algorithm": name, "seconds": taken, "error": error}
    if (peer := of_torchao(128)) is not None:
        taken, _ = seconds(partial(peer, weight, hessian), 1)
        yield {"n": n, "k": k, "format": "INT4_G128", "algorithm": "torchao 0.18", "seconds": taken}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,1024x1024,11008x4096,4096x11008")
    parser.add_argument("--formats", default="INT4_G128,MXFP4,NVFP4,INT8_ROW,FP8_128x128")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    rows: list[dict[str, Any]] = []
    for shape in options.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for row in measured(n, k, options.formats.split(","), options.runs):
            rows.append(row)
            print(json.dumps(row), flush=True)  # noqa: T201 - a program
    machine = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine(), "threads": 2}
    if options.out:
        options.out.write_text(json.dumps({"benchmark": "gptq", "machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
