"""Checkpoints as other programs write them, built code by code from their documented layouts alone.

Nothing here comes from the package: words are Python integers, values are Python floats. `made(kind, seed)` is a random
model's weights in one layout, and what each of them stands for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


class Weight(NamedTuple):
    """A module's tensors by local name, its values (n, k) in float64, and its input scale if it has one."""

    tensors: dict[str, Tensor]
    values: Tensor
    input_scale: float | None = None


def int32(words: list[list[int]]) -> Tensor:
    """Unsigned words as int32."""
    return torch.tensor([[w - (1 << 32) if w >= 1 << 31 else w for w in row] for row in words], dtype=torch.int32)


def stream(codes: list[int], bits: int) -> list[int]:
    """Words of a little-endian stream of codes."""
    whole = sum(code << (bits * i) for i, code in enumerate(codes))
    return [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]


def fp16_scales(draw: random.Random, rows: int, columns: int) -> Tensor:
    return torch.tensor([[draw.uniform(1e-3, 1e-1) for _ in range(columns)] for _ in range(rows)], dtype=torch.float16)


def integers(draw: random.Random, n: int, k: int, bits: int, group: int, zeros: Callable[[], int]) -> Any:
    """Codes [n][k], zero points [n][groups], scales (n, groups), values (n, k)."""
    codes = [[draw.randrange(1 << bits) for _ in range(k)] for _ in range(n)]
    zero = [[zeros() for _ in range(k // group)] for _ in range(n)]
    scales = fp16_scales(draw, n, k // group)
    values = [[(codes[i][j] - zero[i][j // group]) * float(scales[i, j // group]) for j in range(k)] for i in range(n)]
    return codes, zero, scales, torch.tensor(values, dtype=torch.float64)


def gptq(draw: random.Random, n: int, k: int, *, bits: int, group: int, symmetric: bool, version: int) -> Weight:
    """qweight along K, qzeros along N, all transposed; version 1 stores zero points less 1."""
    middle, most = 1 << (bits - 1), (1 << bits) - 1
    zeros = (lambda: middle) if symmetric else lambda: draw.randint(1 if version == 1 else 0, most)
    codes, zero, scales, values = integers(draw, n, k, bits, group, zeros)
    columns = [stream(row, bits) for row in codes]
    less = 1 if version == 1 else 0
    packed = [stream([zero[i][g] - less for i in range(n)], bits) for g in range(k // group)]
    tensors = {
        "qweight": int32([list(row) for row in zip(*columns, strict=True)]),
        "qzeros": int32(packed),
        "scales": scales.T.contiguous(),
        "g_idx": torch.tensor([j // group for j in range(k)], dtype=torch.int32),
    }
    return Weight(tensors, values)


def awq(draw: random.Random, n: int, k: int, *, group: int, symmetric: bool) -> Weight:
    """qweight and qzeros along N, in AWQ's order of nibbles."""
    codes, zero, scales, values = integers(
        draw, n, k, 4, group, (lambda: 8) if symmetric else lambda: draw.randrange(16)
    )

    def words(row: list[int]) -> list[int]:
        return [sum(row[start + AWQ_ORDER[i]] << (4 * i) for i in range(8)) for start in range(0, len(row), 8)]

    tensors = {
        "qweight": int32([words([codes[i][j] for i in range(n)]) for j in range(k)]),
        "qzeros": int32([words([zero[i][g] for i in range(n)]) for g in range(k // group)]),
        "scales": scales.T.contiguous(),
    }
    return Weight(tensors, values)


def e4m3(draw: random.Random, n: int, k: int) -> Tensor:
    numbers = [c for c in range(256) if c & 0x7F != 0x7F]
    raw = [draw.choices(numbers, k=k) for _ in range(n)]
    return torch.tensor(raw, dtype=torch.uint8).view(torch.float8_e4m3fn)


def nvfp4(draw: random.Random, n: int, k: int, *, inputs: bool, power: bool) -> Weight:
    """ModelOpt's: nibbles, even columns low; block scales e4m3 under a multiplier."""
    codes = [[draw.randrange(16) for _ in range(k)] for _ in range(n)]
    scales = [[draw.uniform(1.0, 440.0) for _ in range(k // 16)] for _ in range(n)]
    block = torch.tensor(scales).to(torch.float8_e4m3fn)
    two = torch.tensor(2.0 ** draw.randint(-14, -6) if power else draw.uniform(1e-4, 1e-2), dtype=torch.float32)
    packed = [[row[j] | row[j + 1] << 4 for j in range(0, k, 2)] for row in codes]
    values = [[E2M1[codes[i][j]] * float(block[i, j // 16]) * float(two) for j in range(k)] for i in range(n)]
    tensors = {"weight": torch.tensor(packed, dtype=torch.uint8), "weight_scale": block, "weight_scale_2": two}
    scale = 2.0 ** draw.randint(-12, -4)
    if inputs:
        tensors["input_scale"] = torch.tensor(scale, dtype=torch.float32)
    return Weight(tensors, torch.tensor(values, dtype=torch.float64), scale if inputs else None)


def fp8_tensor(draw: random.Random, n: int, k: int) -> Weight:
    """ModelOpt's FP8."""
    codes, scale, inputs = (
        e4m3(draw, n, k),
        torch.tensor(draw.uniform(1e-4, 1e-1)),
        torch.tensor(draw.uniform(1e-3, 1.0)),
    )
    values = codes.to(torch.float64) * float(scale)
    return Weight({"weight": codes, "weight_scale": scale, "input_scale": inputs}, values, float(inputs))


def fp8_rows(draw: random.Random, n: int, k: int) -> Weight:
    """ModelOpt's FP8_PER_CHANNEL_PER_TOKEN."""
    codes, scale = e4m3(draw, n, k), torch.tensor([[draw.uniform(1e-4, 1e-1)] for _ in range(n)])
    return Weight({"weight": codes, "weight_scale": scale}, codes.to(torch.float64) * scale.to(torch.float64))


def mxfp8(draw: random.Random, n: int, k: int) -> Weight:
    """e4m3 under powers of two."""
    codes = e4m3(draw, n, k)
    bytes_ = [[draw.randint(110, 134) for _ in range(k // 32)] for _ in range(n)]
    tensors = {"weight": codes, "weight_scale": torch.tensor(bytes_, dtype=torch.uint8)}
    powers = (tensors["weight_scale"].to(torch.float64) - 127).exp2()
    return Weight(tensors, codes.to(torch.float64) * powers.repeat_interleave(32, 1))


def fp8_blocks(draw: random.Random, n: int, k: int) -> Weight:
    """DeepSeek's: a multiplier for each 128 x 128."""
    codes = e4m3(draw, n, k)
    scale = torch.tensor([[draw.uniform(1e-4, 1e-1) for _ in range(-(-k // 128))] for _ in range(-(-n // 128))])
    spread = scale.to(torch.float64).repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return Weight({"weight": codes, "weight_scale_inv": scale}, codes.to(torch.float64) * spread)


def mxfp4_experts(draw: random.Random, experts: int, n: int, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """gpt-oss's blocks and scales of a stack of experts, and its values (experts, k, n)."""
    blocks = [
        [[[draw.randrange(256) for _ in range(16)] for _ in range(k // 32)] for _ in range(n)] for _ in range(experts)
    ]
    scales = [[[draw.randint(120, 130) for _ in range(k // 32)] for _ in range(n)] for _ in range(experts)]

    def value(e: int, i: int, j: int) -> float:
        code = blocks[e][i][j // 32][j % 32 // 2] >> (4 * (j % 2)) & 15
        return E2M1[code] * 2.0 ** (scales[e][i][j // 32] - 127)

    values = [[[value(e, i, j) for i in range(n)] for j in range(k)] for e in range(experts)]
    tensors = {"blocks": torch.tensor(blocks, dtype=torch.uint8), "scales": torch.tensor(scales, dtype=torch.uint8)}
    return tensors, torch.tensor(values, dtype=torch.float64)


class Kind(NamedTuple):
    """A layout with its options: its `quantization_config`, a weight of it, and what `lowbit export --as` calls it."""

    config: Callable[[dict[str, Any]], dict[str, Any]]
    weight: Callable[..., Weight]
    export: str


def _gptq_config(o: dict[str, Any]) -> dict[str, Any]:
    form = "gptq" if o["version"] == 1 else "gptq_v2"
    told = {"bits": o["bits"], "group_size": o["group"], "sym": o["symmetric"], "desc_act": False}
    return {"quant_method": "gptq", **told, "checkpoint_format": form, "lm_head": False}


def _awq_config(o: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": o["group"], "zero_point": True, "version": "gemm"}


def _modelopt(algo: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {"quant_method": "modelopt", "quant_algo": algo, "ignore": ["lm_head"]}


def _fp8_config(_: dict[str, Any]) -> dict[str, Any]:
    told = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return {"quant_method": "fp8", **told}


KINDS: dict[str, Kind] = {
    "gptq": Kind(_gptq_config, gptq, "gptq"),
    "gptq_v2": Kind(_gptq_config, gptq, "gptq_v2"),
    "awq": Kind(_awq_config, awq, "awq"),
    "modelopt nvfp4": Kind(_modelopt("NVFP4"), nvfp4, "modelopt"),
    "modelopt nvfp4a16": Kind(_modelopt("W4A16_NVFP4"), nvfp4, "modelopt"),
    "modelopt fp8": Kind(_modelopt("FP8"), fp8_tensor, "modelopt"),
    "modelopt fp8 rows": Kind(_modelopt("FP8_PER_CHANNEL_PER_TOKEN"), fp8_rows, "modelopt"),
    "modelopt mxfp8": Kind(_modelopt("MXFP8"), mxfp8, "modelopt"),
    "fp8": Kind(_fp8_config, fp8_blocks, "deepseek-fp8"),
}


def options(kind: str, seed: int) -> dict[str, Any]:
    """What varies with the seed."""
    if kind.startswith("gptq"):
        version = 1 if kind == "gptq" else 2
        return {"bits": (2, 3, 4, 8)[seed % 4], "group": (32, 64)[seed // 4 % 2], "symmetric": seed % 3 == 0} | {
            "version": version
        }
    if kind == "awq":
        return {"group": (32, 64)[seed % 2], "symmetric": seed % 3 == 0}
    if "nvfp4" in kind:
        return {"inputs": kind == "modelopt nvfp4", "power": True}
    return {}
