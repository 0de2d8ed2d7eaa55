"""`lowbit roofline`: the least time that each recipe can take on a GPU, by tables of GPUs and of kernels.

    time = sum over kernels of max(flops / (peak * share), bytes / (bandwidth * share), exponentials / rate) + launch

The tables are `data/gpus.toml`, each number with its source, and `data/kernels.toml`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any, Final

from lowbit.backends import Refusal
from lowbit.bench.results import in_words, read_results
from lowbit.command import DONE
from lowbit.errors import LowbitError
from lowbit.table import align

OPS: Final = ("linear", "moe", "attention")
_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
# What `lowbit bench` calls the ops that it measures.
_MEASURED = {"linear": "linear", "moe": "grouped"}

Terms = Mapping[str, float]
"""How much of each product of lengths, which its letters name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What a GPU can do: operations, bytes and exponentials a second at best, and the shares that kernels reach."""

    name: str
    devices: tuple[str, ...]
    math: Mapping[str, float]
    memory: float
    exponentials: float
    achievable: Mapping[str, float]
    # Seconds a kernel.
    launch: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What a kernel computes and moves."""

    name: str
    bytes: Terms
    # The rate that its operations run at; None: it has none that count.
    math: str | None = None
    flops: Terms = field(default_factory=dict[str, float])
    exponentials: Terms = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The kernels of an op in certain formats."""

    name: str
    about: str
    kernels: tuple[Kernel, ...]
    # As `lowbit bench` calls it; "" for what that does not measure.
    format: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds that a recipe takes, and what bounds the longest of its kernels: math, memory, exponentials or launch."""

    seconds: float
    bound: str


@cache
def gpus() -> dict[str, Gpu]:
    """Every GPU of the table, by name."""
    found: dict[str, Gpu] = {}
    for name, given in _table("gpus").items():
        devices = tuple(given.pop("devices"))
        found[name] = Gpu(name=name, devices=devices, **given)
    return found


@cache
def recipes(op: str) -> dict[str, Recipe]:
    """Every recipe of the table for an op, by name; experts have those of linear layers."""
    found: dict[str, Recipe] = {}
    for name, given in _table("kernels")["linear" if op == "moe" else op].items():
        kernels = tuple(Kernel(**kernel) for kernel in given.pop("kernels"))
        found[name] = Recipe(name=name, kernels=kernels, **given)
    return found


def predict(gpu: Gpu, recipe: Recipe, lengths: Terms) -> Prediction | Refusal:
    """The time of a recipe on a GPU for lengths by their letters; or why that GPU cannot run it."""
    lacking = [kernel.math for kernel in recipe.kernels if kernel.math is not None and kernel.math not in gpu.math]
    if lacking:
        return Refusal(recipe.name, f"needs tensor cores for {lacking[0]}; {gpu.name} has {', '.join(gpu.math)}")
    total, longest, bound = 0.0, 0.0, ""
    for kernel in recipe.kernels:
        parts = {
            "memory": _sum(kernel.bytes, lengths) / (gpu.memory * gpu.achievable["memory"]),
            "exponentials": _sum(kernel.exponentials, lengths) / gpu.exponentials,
        }
        if kernel.math is not None:
            parts["math"] = _sum(kernel.flops, lengths) / (gpu.math[kernel.math] * gpu.achievable["math"])
        work = max(parts.values())
        total += work + gpu.launch
        if work >= longest:
            longest, bound = work, max(parts, key=parts.__getitem__)
    return Prediction(total, bound if longest >= gpu.launch else "launch")


def linear(m: int, n: int, k: int) -> dict[str, float]:
    """The lengths of a linear layer: m tokens, a weight (n, k)."""
    return {"m": m, "n": n, "k": k, "e": 1}


def moe(tokens: int, n: int, k: int, experts: int, top: int) -> dict[str, float]:
    """The lengths of experts (experts, n, k) when each token goes to `top` of them, drawn at random.

    Weights are read of the experts that at least one token goes to: `E (1 - (1 - top / E)^tokens)` of E on average.
    """
    return {"m": tokens * top, "n": n, "k": k, "e": experts * (1 - (1 - top / experts) ** tokens)}


def attention(
    queries: int, keys: int, *, batch: int, heads: int, kv_heads: int, width: int, causal: bool
) -> dict[str, float]:
    """The lengths of attention; if causal, the queries are the last of the keys' tokens, and see none after them."""
    seen = keys - (queries - 1) / 2 if causal else keys
    return {"b": batch, "h": heads, "g": kv_heads, "q": queries, "s": keys, "v": seen, "d": width}


def _sum(terms: Terms, lengths: Terms) -> float:
    return sum(much * prod(lengths[letter] for letter in letters) for letters, much in terms.items())


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(files("lowbit").joinpath("data", f"{name}.toml").read_text("utf-8"))


def main(argv: list[str]) -> int:
    """Predict the time of each recipe on a GPU, beside what was measured."""
    parser = argparse.ArgumentParser(
        "lowbit roofline",
        description=main.__doc__,
        epilog="example: lowbit roofline --gpu B200 --op linear --m 1,4096 --n 8192 --k 8192",
    )
    parser.add_argument("--gpu", required=True, choices=list(gpus()), help="the GPU")
    parser.add_argument("--op", default="linear", choices=OPS, help="what to predict (linear)")
    parser.add_argument("--recipes", metavar="R,...", help="only these")
    parser.add_argument("--m", type=_counts, default=_TOKENS, metavar="M,...", help="tokens; of attention, queries")
    parser.add_argument("--n", type=_count, default=8192, help="rows of the weight (8192)")
    parser.add_argument("--k", type=_count, default=8192, help="columns of the weight (8192)")
    parser.add_argument("--experts", type=_count, default=64, help="of moe (64)")
    parser.add_argument("--top", type=_count, default=8, help="experts that a token goes to (8)")
    parser.add_argument("--keys", type=_count, help="of attention; default: as many as queries")
    parser.add_argument("--batch", type=_count, default=1, help="sequences of attention (1)")
    parser.add_argument("--heads", type=_count, default=32, help="of attention (32)")
    parser.add_argument("--kv-heads", type=_count, default=8, help="heads of keys and values (8)")
    parser.add_argument("--head-dim", type=_count, default=128, help="values a head (128)")
    parser.add_argument("--causal", action="store_true", help="queries see no later keys")
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="FILE", help="JSON of `lowbit bench`")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        chosen, grid = _chosen(options), {m: _lengths(options, m) for m in options.m}
        measured = _measured(options)
    except LowbitError as error:
        parser.error(str(error))
    gpu = gpus()[options.gpu]
    found = list(_rows(gpu, options.op, chosen, grid, measured))
    refusals = [
        str(refusal) for recipe in chosen if isinstance(refusal := predict(gpu, recipe, grid[options.m[0]]), Refusal)
    ]
    if options.json:
        told = {"gpu": gpu.name, "op": options.op, "rows": found, "refusals": refusals, "source": gpu.source}
        sys.stdout.write(json.dumps(told, indent=1) + "\n")
        return DONE
    lines = align([_cells(row) for row in found]) + [f"not {refusal}" for refusal in refusals]
    if options.measured and not any("measured" in row for row in found):
        lines.append(f"none of the measured cases is {options.op} of these sizes on {gpu.name}")
    sys.stdout.write("\n".join(lines) + "\n")
    return DONE


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 999999999")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _chosen(options: argparse.Namespace) -> list[Recipe]:
    """The recipes to predict.

    Raises:
        LowbitError: one is not known.
    """
    known = recipes(options.op)
    names = list(known) if options.recipes is None else options.recipes.split(",")
    for name in names:
        if name not in known:
            raise LowbitError(f"--recipes {name}: the recipes of {options.op} are {', '.join(known)}")
    return [known[name] for name in names]


def _lengths(options: argparse.Namespace, m: int) -> dict[str, float]:
    """The lengths for `m` tokens or queries.

    Raises:
        LowbitError: they contradict one another.
    """
    if options.op == "linear":
        return linear(m, options.n, options.k)
    if options.op == "moe":
        if options.top > options.experts:
            raise LowbitError(f"--top {options.top}: there are only {options.experts} experts")
        return moe(m, options.n, options.k, options.experts, options.top)
    keys = options.keys or m
    if options.heads % options.kv_heads or (options.causal and m > keys):
        raise LowbitError(
            "--heads must be a multiple of --kv-heads, and with --causal there are as many --keys as queries"
        )
    sizes = {"batch": options.batch, "heads": options.heads, "kv_heads": options.kv_heads, "width": options.head_dim}
    return attention(m, keys, **sizes, causal=options.causal)


def _measured(options: argparse.Namespace) -> dict[tuple[str, int], float]:
    """Seconds that were measured on the GPU at the sizes asked for, by format as the recipe has it ("" for bf16) and m.

    Raises:
        LowbitError: a file is none of `lowbit bench`, or none of its benchmarks measures the op.
    """
    found: dict[tuple[str, int], float] = {}
    if options.measured and options.op not in _MEASURED:
        raise LowbitError(f"--measured: no benchmark of `lowbit bench` measures {options.op}")
    for results in map(read_results, options.measured):
        there = results["environment"]["device"]
        if results["benchmark"] != _MEASURED[options.op] or not any(d in there for d in gpus()[options.gpu].devices):
            continue
        for row in results["rows"]:
            case, sizes = row["case"], {"n": options.n, "k": options.k}
            if options.op == "moe":
                sizes["experts"] = options.experts
            if all(case[name] == size for name, size in sizes.items()):
                m = case["m"] / (options.top if options.op == "moe" else 1)
                names = {"candidate": case["format"].upper(), "baseline": ""}
                found |= {
                    (names[each["role"]], m): each["seconds"]
                    for each in row["contenders"]
                    if each["role"] in names and "seconds" in each
                }
    return found


def _rows(
    gpu: Gpu, op: str, chosen: Sequence[Recipe], grid: Mapping[int, Terms], measured: Mapping[tuple[str, int], float]
) -> Iterator[dict[str, Any]]:
    """What is told of each recipe that the GPU can run, at each size."""
    plain = recipes(op)["bf16"]
    for m, lengths in grid.items():
        base = predict(gpu, plain, lengths)
        assert isinstance(base, Prediction)
        for recipe in chosen:
            found = predict(gpu, recipe, lengths)
            if isinstance(found, Refusal):
                continue
            row = {"recipe": recipe.name, "m": m, "seconds": found.seconds, "bound": found.bound}
            row["over_bf16"] = base.seconds / found.seconds
            if (recipe is plain or recipe.format) and (seconds := measured.get((recipe.format, m))) is not None:
                row |= {"measured": seconds, "of_predicted": found.seconds / seconds}
            yield row


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "recipe": row["recipe"],
        "m": str(row["m"]),
        "predicted": in_words(row["seconds"]),
        "bound by": row["bound"],
        "over bf16": f"{row['over_bf16']:.3g}",
        "measured": in_words(row["measured"]) if "measured" in row else "",
        "reaches": f"{100 * row['of_predicted']:.3g}%" if "measured" in row else "",
    }
