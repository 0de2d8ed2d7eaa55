"""How far models get by each recipe of training on the same tokens, beside bfloat16 by two seeds.

    python benchmarks/training.py --model dense --tokens train.npy --validation val.npy --steps 600 --json FILE

trains a Llama-like model of 30 million parameters, or one with 8 experts of which 2 are chosen, from the same start on
the same tokens in the same order, and tells the mean loss over all of `--validation` at steps of equal distance. Model
and optimizer (AdamW, master weights in float32) are alike, and compiled; what differs is what the products of linear
layers and experts round. The second run in bfloat16 begins with other weights: what lies between the two is noise.
Without a GPU, `--device cpu --tiny` tries all of it on a tiny model.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from lowbit_moe import convert_, swiglu_experts

VOCABULARY = 4096
# Width, layers, heads, width between; experts, of which two are chosen, of so many columns; tokens of a sequence.
MODELS = {"dense": (512, 8, 8, 1536, 0, 0), "moe": (512, 6, 8, 0, 8, 768)}
TINY = {"dense": (64, 2, 2, 128, 0, 0), "moe": (64, 2, 2, 0, 4, 64)}
LENGTH = 512


class Block(nn.Module):
    """Attention with rotary positions, then a gated feed-forward layer or experts."""

    def __init__(self, width: int, heads: int, between: int, experts: int, columns: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = Norm(width), Norm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.experts: Mixture | None = Mixture(width, experts, columns) if experts else None
        if not experts:
            self.gate_up = nn.Linear(width, 2 * between, bias=False)
            self.down = nn.Linear(between, width, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """(B, S, width) to the same."""
        b, s, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (rotated(each, *turn) for each in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(b, s, width))
        y = self.second(x)
        if self.experts is not None:
            return x + self.experts(y.view(-1, width)).view(b, s, width)
        gate, up = self.gate_up(y).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Norm(nn.Module):
    """Root mean square of numbers as they are, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(.., width) to the same."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, 1e-6).to(x.dtype)


class Mixture(nn.Module):
    """Two of several experts for each token, chosen by a router that is not rounded."""

    def __init__(self, width: int, experts: int, columns: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = Experts(width, experts, columns)

    def forward(self, x: Tensor) -> Tensor:
        """(T, width) to the same."""
        weights, chosen = self.router(x).float().softmax(-1).topk(2)
        return self.experts(x, chosen, (weights / weights.sum(-1, keepdim=True)).to(x.dtype))


class Experts(nn.Module):
    """Gated experts, with the names that transformers has for them."""

    def __init__(self, width: int, experts: int, columns: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * columns, width).normal_(std=0.02))
        self.down_proj = nn.Parameter(torch.empty(experts, width, columns).normal_(std=0.02))
        self.act_fn = F.silu

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The sum of what the chosen experts give (T, width), times their weights."""
        return swiglu_experts(x, chosen, weights, self.gate_up_proj, self.down_proj, recipe="BF16")


class Model(nn.Module):
    """A decoder whose head is its embedding."""

    cosines: Tensor
    sines: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        width, layers, heads, between, experts, columns = shape
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, heads, between, experts, columns) for _ in range(layers))
        self.last = Norm(width)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        angles = torch.outer(torch.arange(LENGTH), 10000.0 ** (-torch.arange(0, 1, 2 * heads / width)))
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of (B, S) ids and what follows each."""
        turn = self.cosines[: ids.shape[1]], self.sines[: ids.shape[1]]
        x = self.embedding(ids).to(torch.bfloat16)
        for layer in self.layers:
            x = layer(x, turn)
        logits = F.linear(self.last(x), self.embedding.weight.to(torch.bfloat16))
        return F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.reshape(-1))


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Halves of each head turned by its position's angles."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cosines - b * sines, a * sines + b * cosines), -1).to(x.dtype)


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: validation losses by step, and how long it took."""
    shape = (TINY if options.tiny else MODELS)[options.model]
    torch.manual_seed(seed)
    torch._dynamo.reset()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - no public name
    model = Model(shape).to(options.device)
    rounds = None
    if name != "BF16":
        rounds = str(convert_(model, name))
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1)
    run = model if options.device == "cpu" else torch.compile(model, fullgraph=True)
    tokens, held = (torch.from_numpy(loaded(path)).long() for path in (options.tokens, options.validation))
    batches = windows(held)
    torch.manual_seed(0)
    starts = torch.randint(
        len(tokens) - LENGTH - 1, (options.steps, options.batch), generator=torch.Generator().manual_seed(1)
    )
    place = torch.arange(LENGTH + 1)
    losses: list[tuple[int, float]] = []
    kind = torch.device(options.device).type
    begun = time.perf_counter()
    for step in range(options.steps):
        warm, left = (step + 1) / 50, math.cos(math.pi / 2 * step / options.steps) ** 2
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, warm) * max(left, 0.05)
        some = tokens[starts[step].unsqueeze(1) + place].to(options.device)
        with torch.autocast(kind, torch.bfloat16):
            loss = run(some[:, :-1], some[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % options.every == 0 or step + 1 == options.steps:
            losses.append((step + 1, validated(run, batches, options, kind)))
            sys.stderr.write(f"{name} {seed} {step + 1} {losses[-1][1]:.4f} {time.perf_counter() - begun:.0f} s\n")
    return {
        "recipe": name,
        "seed": seed,
        "parameters": parameters,
        "losses": losses,
        "seconds": time.perf_counter() - begun,
        "modules": rounds,
    }


def validated(run: Any, batches: list[Tensor], options: argparse.Namespace, kind: str) -> float:
    """The mean loss over windows that follow one another."""
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16):
        found = [run(some[:, :-1].to(options.device), some[:, 1:].to(options.device)) for some in batches]
    return float(torch.stack(found).mean())


def windows(held: Tensor) -> list[Tensor]:
    """Batches, alike in size, of windows of LENGTH + 1 tokens."""
    count = len(held) // (LENGTH + 1)
    each = held[: count * (LENGTH + 1)].view(count, LENGTH + 1)
    size = min(32, count)
    return list(each[: count // size * size].split(size))


def loaded(path: Path) -> np.ndarray[Any, Any]:
    """Token ids of a .npy file, or of one that xz made shorter."""
    data = path.read_bytes()
    found = np.load(BytesIO(lzma.decompress(data) if path.suffix == ".xz" else data))
    return found.astype(np.int32)


def main() -> None:
    """Train by each recipe, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="dense")
    parser.add_argument("--recipes", default="BF16,FP8_ROW,MXFP8,NVFP4")
    parser.add_argument("--seeds", default="0", help="of recipes; BF16 has 0 and 1, which bound the noise")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for name in options.recipes.split(","):
        for seed in (0, 1) if name == "BF16" else map(int, options.seeds.split(",")):
            runs.append(train(name, seed, options))
            if options.json:
                options.json.write_text(json.dumps(told(options, runs), indent=1) + "\n")
    plain = next((run["losses"][-1][1] for run in runs if run["recipe"] == "BF16"), None)
    for run in runs:
        last = run["losses"][-1][1]
        beside = "" if plain is None else f"{100 * (last / plain - 1):+.2f} %"
        sys.stdout.write(f"{run['recipe']:8} {run['seed']} {last:.4f} {beside} {run['seconds']:.0f} s\n")


def told(options: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    return {
        "benchmark": "training",
        "model": options.model,
        "tokens": options.steps * options.batch * LENGTH,
        "steps": options.steps,
        "batch": options.batch,
        "device": device,
        "versions": {name: version(name) for name in ("lowbit-core", "lowbit-moe", "torch")},
        "date": datetime.now(UTC).date().isoformat(),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
