"""`lowbit bench attention`: prefill and decode, rounding included, beside the fastest of torch's backends.

One sequence, heads of 128 values each: 32 of queries, 32 or 8 of keys and values, or as `--heads` has it. Decoding over
a cache reads codes that were rounded before, as a serving engine does.
"""

from __future__ import annotations

import re
import warnings
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lowbit.attending import roped
from lowbit.attention import attention, selection
from lowbit.backends import Call, Refusal, select
from lowbit.bench.case import Benchmark, Case, Contender, Dim, Given, Make, copies, plain
from lowbit.bench.inputs import Kind, normal
from lowbit.bench.peers import attentions, compiled
from lowbit.bench.timing import time_calls
from lowbit.format import Format
from lowbit.key_values import FORMATS, KeyValueCache

_HEADS, _D = [(32, 32), (32, 8)], 128
_SCHEMES = ("INT8_FP8", "INT8_FP8_ROTATED", "FP8_HEAD")
_STEPS = ("causal prefill", "causal prefill + RoPE", "prefill", "decode")
_Ways = Callable[..., tuple[Contender | Refusal, tuple[Contender, ...]]]
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Seconds to spend on each of them before the fastest is measured.
_SHORT = 0.02
# Queries whose scores are held at a time, in float64.
_ROWS = 1024


def _cases(given: Given) -> Iterator[Case]:
    all_heads: list[tuple[int, int]] = vars(given.options).get("heads", _HEADS)
    lengths = [keys for (keys,) in given.shapes]
    for keys, heads, step, scheme in product(lengths, all_heads, _STEPS, _SCHEMES):
        # Of one query nothing is rounded, by any scheme.
        if step != "decode" or scheme == _SCHEMES[0]:
            yield _case(given, keys, heads, step, partial(_lowbit, scheme=scheme), scheme)
    for keys, heads, fmt in product(lengths, all_heads, FORMATS):
        yield _case(given, keys, heads, "decode", partial(_cached, keys=keys, heads=heads[1], fmt=fmt), f"cache {fmt}")


def _case(given: Given, keys: int, heads: tuple[int, int], step: str, ways: _Ways, scheme: str) -> Case:
    causal, decode, turned = step.startswith("causal"), step == "decode", step.endswith("RoPE")
    queries, device, itemsize = 1 if decode else keys, given.device, torch.bfloat16.itemsize
    written = heads[0] * queries * _D * itemsize
    read = written + 2 * heads[1] * keys * _D * itemsize

    def data(kind: Kind) -> tuple[Tensor, ...]:
        lengths = ((heads[0], queries), (heads[1], keys), (heads[1], keys))
        made = [normal(1, *each, _D, kind=kind, seed=i, device=device) for i, each in enumerate(lengths)]
        return (*made, *_tables(keys, device)) if turned else tuple(made)

    operands = data("normal")
    name, run = fastest(operands, causal=causal)
    candidate, peers = ways(operands[0], moved=read + written, causal=causal)
    return Case(
        {"step": step, "heads": "{}/{}".format(*heads), "s": keys, "scheme": scheme},
        # Two products; a causal mask leaves half of each.
        4 * heads[0] * queries * keys * _D / (2 if causal else 1),
        data,
        partial(_exact, causal=causal),
        candidate,
        Contender(f"torch {name}", copies, run, read + written, plain),
        peers=peers
        + (attentions(read, written, device, causal=causal, decode=decode) if given.peers and not turned else ()),
    )


def _lowbit(q: Tensor, *, scheme: str, moved: float, causal: bool) -> tuple[Contender | Refusal, tuple[Contender, ...]]:
    """Attention as lowbit chooses it, and on codes even where that is slower; the reference is no contender."""
    chosen = selection(q, None, 0, scheme, "")
    kernel, backend = chosen.kernel.name, chosen.kernel.name.partition(".")[0]
    if backend == "reference":
        return Refusal("lowbit", "; ".join(map(str, chosen.refusals)) or "no installed backend has attention"), ()

    def run(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor, prefer: Sequence[str] = ()) -> Tensor:
        rope = (tables[0], tables[1]) if tables else None
        return attention(q, k, v, scheme=scheme, causal=causal, rope=rope, prefer=prefer)

    candidate = Contender("lowbit", copies, run, moved, plain, kernel, chosen.refusals)
    return candidate, (replace(candidate, name="lowbit by force", run=partial(run, prefer=(backend,))),)


def _cached(
    q: Tensor, *, keys: int, heads: int, fmt: Format, moved: float, causal: bool
) -> tuple[Contender | Refusal, tuple[Contender, ...]]:
    """Attention over a cache whose keys and values are codes of `fmt`."""
    del moved, causal
    chosen = select(Call.of("cached_attention", str(fmt), "", q.device, q.dtype, None, _D, str(fmt)), bound=False)
    if chosen.kernel.name.startswith("reference."):
        told = "; ".join(map(str, chosen.refusals)) or "no installed backend attends to a cache"
        return Refusal("lowbit", told), ()

    def prepare(q: Tensor, k: Tensor, v: Tensor) -> Make:
        cache = KeyValueCache.empty(1, heads, keys, _D, keys=fmt, device=q.device)
        cache.write(k, v, torch.zeros(1, dtype=torch.int64, device=q.device))
        return copies(q, cache, torch.full((1,), keys, device=q.device))

    def run(q: Tensor, cache: KeyValueCache, lengths: Tensor) -> Tensor:
        return cache.attend(q, lengths)

    read = 2 * heads * keys * fmt.bits_per_element((keys, _D)) / 8 * _D
    return Contender("lowbit", prepare, run, read + 2 * q.nbytes, plain, chosen.kernel.name, chosen.refusals), ()


def _tables(tokens: int, device: torch.device) -> list[Tensor]:
    """The cosine and the sine (T, D / 2) of rotary embeddings, in bfloat16."""
    angles = torch.outer(torch.arange(tokens), 1e4 ** (-torch.arange(_D // 2) / (_D // 2)))
    return [table.to(device, torch.bfloat16) for table in (angles.cos(), angles.sin())]


def fastest(data: tuple[Tensor, ...], *, causal: bool) -> tuple[str, Callable[..., Tensor]]:
    """The backend of torch that is the fastest on this, by a short measurement, and its name.

    Rotary embeddings are compiled, into one kernel.
    """
    device, make, times = data[0].device, copies(*data), dict[str, float]()
    turn = compiled(_turn) if len(data) > len("qkv") else None
    runs = {name: partial(_attention, backend, causal=causal, turn=turn) for name, backend in BACKENDS.items()}
    for name, run in runs.items():
        # It holds all scores at once, and on a GPU is for what no other takes.
        if name == "math" and times and device.type == "cuda":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a backend does not run
            try:
                run(*data)
            except RuntimeError:
                if name == "math" and not times:
                    raise
                continue
        calls = time_calls(
            lambda i, run=run: partial(run, *make(i)), sum(x.nbytes for x in data), device, budget=_SHORT
        )
        times[name] = calls.median
    name = min(times, key=lambda name: times[name])
    return name, runs[name]


def _attention(
    backend: SDPBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *tables: Tensor,
    causal: bool,
    turn: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    if turn is not None:
        q, k = turn(q, k, *tables)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def _turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return roped(q, cos, sin), roped(k, cos, sin)


def _exact(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor, causal: bool) -> Tensor:
    """`softmax(q k^T / sqrt(D)) v` in float64, a head and some queries at a time."""
    if tables:
        cos, sin = (table.double() for table in tables)
        q, k = (roped(x.double(), cos, sin) for x in (q, k))
    out, each = q.new_empty(q.shape, dtype=torch.float64), q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        keys, values = (x[0, head // each].double() for x in (k, v))
        for start in range(0, q.shape[2], _ROWS):
            rows = slice(start, start + _ROWS)
            scores = q[0, head, rows].double() @ keys.mT / _D**0.5
            if causal:
                later = torch.ones_like(scores, dtype=torch.bool).triu(start + 1)
                scores.masked_fill_(later, -torch.inf)
            out[0, head, rows] = scores.softmax(-1) @ values
    return out


def _heads(text: str) -> list[tuple[int, int]]:
    """Heads of queries, and of keys, of `32/32,32/8`."""
    found = [re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", pair) for pair in text.split(",")]
    pairs = [(int(each[1]), int(each[2])) for each in found if each is not None]
    if len(pairs) < len(found) or any(queries % keys for queries, keys in pairs):
        msg = f"{text!r} must be heads of queries, a slash, and those of keys that they share evenly: 32/8"
        raise ArgumentTypeError(msg)
    return pairs


def _options(parser: ArgumentParser) -> None:
    own = parser.add_argument_group("of attention")
    told = "heads of queries and of keys (32/32,32/8)"
    own.add_argument("--heads", type=_heads, default=_HEADS, metavar="H/G,...", help=told)


benchmark = Benchmark(
    about="prefill and decode of attention, by the fastest of torch's backends",
    dims=(Dim("S", 128, 65536, 1024),),
    formats=(),
    usual=lambda device: [(s,) for s in ((2048, 8192, 32768) if device == "cuda" else (128, 1024))],
    quantized=lambda _: [],
    cases=_cases,
    options=_options,
)
