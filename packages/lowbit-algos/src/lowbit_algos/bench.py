"""`lowbit bench gptq`: GPTQ of a weight given its Hessian, and the factorization that is part of it.

Accuracy is that of the layer's output, over inputs with the Hessian's correlations; the baseline of GPTQ is rounding to
nearest, that of a stack of experts (small shapes) one expert after the other, that of the factorization the three steps
of the published algorithm, which works with the inverse.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from itertools import product

import torch
from torch import Tensor

import lowbit
from lowbit import QuantizedTensor
from lowbit.bench import Benchmark, Case, Contender, Dim, Given, Kind, Make, Shape, Use, copies, normal, peer
from lowbit_algos.factor import Factors, factors
from lowbit_algos.gptq import DAMPING, Options, gptq

# What the published algorithm has, and what lowbit adds by default.
_CHOICES: dict[str, Options] = {"plain": {"act_order": False, "scale_search": False}, "default": {}}
# Values of a weight, or of its Hessian, up to which it is measured as experts are, many of one shape.
_EXPERT = 1 << 22


def _cases(given: Given) -> Iterator[Case]:
    for shape in given.shapes:
        yield _factoring(given, shape)
        for use, choices in product(given.uses, _CHOICES):
            yield _rounding(given, shape, use, choices)
        if shape[1] * max(shape) <= _EXPERT:
            yield from (_stacked(given, shape, use) for use in given.uses)


def _problem(shape: Shape, device: torch.device, kind: Kind) -> tuple[Tensor, Tensor]:
    """A weight (N, K) as layers are initialised, or experts (E, N, K), and Hessians (K, K) of correlated inputs."""
    *experts, n, k = shape
    float32 = partial(normal, kind="normal", device=device, dtype=torch.float32)
    x = float32(*experts, 2 * k, k, seed=1) @ (float32(k, k, seed=2) / k**0.5 + torch.eye(k, device=device) / 2)
    if kind == "outliers":
        x[..., ::100] *= 30
    return float32(*experts, n, k, seed=0) / k**0.5, x.mT @ x


def _rounding(given: Given, shape: Shape, use: Use, choices: str) -> Case:
    (n, k), fmt, device = shape, use.format, given.device
    # Weight and Hessian are read, codes and scales written.
    moved = 4 * (n * k + k * k) + n * k * fmt.bits_per_element((n, k)) / 8

    def by_gptq(weight: Tensor, hessian: Tensor) -> tuple[QuantizedTensor, Tensor]:
        return gptq(weight, hessian, fmt, **_CHOICES[choices]), hessian

    def to_nearest(weight: Tensor, hessian: Tensor) -> tuple[QuantizedTensor, Tensor]:
        return lowbit.quantize(weight, fmt), hessian

    # torchao's loop has neither of lowbit's choices.
    same = (fmt, choices) == (lowbit.INT4_G128, "plain")
    return Case(
        {"step": "GPTQ", "format": use.spec, "choices": choices, "n": n, "k": k},
        # Products with the errors so far, and the factorization.
        n * k * k + k**3 / 3,
        partial(_problem, shape, device),
        _output,
        Contender("lowbit", copies, by_gptq, moved, _outputs),
        Contender("round to nearest", copies, to_nearest, moved, _outputs),
        peers=(peer("torchao", partial(_torchao, device, moved)),) if given.peers and same else (),
    )


def _stacked(given: Given, shape: Shape, use: Use) -> Case:
    """Experts at once, and one after the other."""
    (n, k), fmt, count = shape, use.format, 32 if given.device.type == "cuda" else 4
    moved = count * (4 * (n * k + k * k) + n * k * fmt.bits_per_element((n, k)) / 8)

    def at_once(weights: Tensor, hessians: Tensor) -> tuple[list[QuantizedTensor], Tensor]:
        return [gptq(weights, hessians, fmt)], hessians

    def one_by_one(weights: Tensor, hessians: Tensor) -> tuple[list[QuantizedTensor], Tensor]:
        return [gptq(*each, fmt) for each in zip(weights, hessians, strict=True)], hessians

    return Case(
        {"step": f"GPTQ of {count} experts", "format": use.spec, "choices": "default", "n": n, "k": k},
        count * (n * k * k + k**3 / 3),
        partial(_problem, (count, n, k), given.device),
        _output,
        Contender("lowbit", copies, at_once, moved, _outputs_of_experts),
        Contender("one by one", copies, one_by_one, moved, _outputs_of_experts),
    )


def _factoring(given: Given, shape: Shape) -> Case:
    k = shape[1]

    def prepare(weight: Tensor, hessian: Tensor) -> Make:
        del weight
        return copies(hessian[None], torch.arange(k, device=hessian.device)[None])

    def damped(hessian: Tensor) -> Tensor:
        mean = hessian.diagonal(dim1=-2, dim2=-1).mean()
        return hessian + DAMPING * mean * torch.eye(k, device=hessian.device)

    def by_inverse(hessian: Tensor, order: Tensor) -> Tensor:
        del order
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian)))
        return torch.linalg.cholesky(inverse, upper=True)

    def of_inverse(found: Tensor) -> Tensor:
        return torch.cholesky_inverse(found, upper=True)[0]

    def of_factors(found: Factors) -> Tensor:
        return found.m[0] * found.d @ found.m[0].mT

    def exact(weight: Tensor, hessian: Tensor) -> Tensor:
        del weight
        return damped(hessian)

    return Case(
        {"step": "factorization", "format": "", "choices": "", "n": "", "k": k},
        k**3 / 3,
        partial(_problem, shape, given.device),
        exact,
        Contender("lowbit", prepare, partial(factors, damping=DAMPING), 8 * k * k, of_factors),
        Contender("Cholesky, inverse, Cholesky", prepare, by_inverse, 8 * k * k, of_inverse),
    )


def _output(weight: Tensor, hessian: Tensor) -> Tensor:
    """Products whose squares add up to the output's: `W L` with `H = L L^T`."""
    if weight.dim() == 3:
        return torch.stack([_output(*each) for each in zip(weight, hessian, strict=True)])
    damping = 1e-6 * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    return weight @ torch.linalg.cholesky(hessian + damping)


def _outputs(result: tuple[QuantizedTensor, Tensor]) -> Tensor:
    q, hessian = result
    return _output(q.dequantize(torch.float32), hessian)


def _outputs_of_experts(result: tuple[list[QuantizedTensor], Tensor]) -> Tensor:
    several, hessians = result
    return _output(
        torch.stack([q.dequantize(torch.float32) for q in several]).view(len(hessians), -1, hessians.shape[1]), hessians
    )


def _torchao(device: torch.device, moved: float) -> Contender:
    """torchao's loop on int4 groups, timed alone: its result is in a layout of its own.

    The loop is for CUDA and needs two functions of a package of kernels. Where that is missing, plain ones take their
    place, and on a CPU the loop's check for CUDA and its waits for it are taken out, so that it runs at all.
    """
    api = import_module("torchao.prototype.gptq.api")
    if api.int4_row_quantize_zp is None:
        vars(api).update(int4_row_quantize_zp=_int4_rows, pack_int4=_packed)
    base = import_module("torchao.quantization").Int4WeightOnlyConfig(group_size=128)
    config, run = api.GPTQConfig(step="convert", base_config=base), api.gptq_quantize
    if device.type != "cuda":
        source = inspect.getsource(run).replace('assert device.type == "cuda"', "assert True")
        space = dict(vars(api))
        exec(compile(source.replace("torch.cuda.synchronize()", "pass"), "gptq_quantize", "exec"), space)  # noqa: S102 - the peer's own source
        run = space["gptq_quantize"]

    def by_torchao(weight: Tensor, hessian: Tensor) -> None:
        # It changes what it is given.
        run(hessian.clone(), weight.clone(), config)

    return Contender("torchao", copies, by_torchao, moved)


def _int4_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of int4 groups, as torchao's loop wants them."""
    groups = x.unflatten(1, (-1, group_size))
    low, high = torch.aminmax(groups, dim=2)
    scale = (high - low).clamp_min(1e-6) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round() - 8
    return codes.flatten(1).to(torch.int8), scale.mT.contiguous(), (low + 8 * scale).mT.contiguous()


def _packed(codes: Tensor) -> Tensor:
    return codes[:, ::2] & 15 | codes[:, 1::2] << 4


benchmark = Benchmark(
    about="GPTQ of a weight given its Hessian, beside rounding to nearest, and its factorization",
    dims=(Dim("N", 256, 16384, 1024, grouped=True), Dim("K", 256, 16384, 1024, grouped=True)),
    formats=("INT4_G128", "MXFP4", "NVFP4", "INT8_ROW", "FP8_128x128"),
    usual=lambda device: [
        (4096, 4096),
        (1024, 1024),
        *([(1024, 2048), (11008, 4096), (4096, 11008)] if device == "cuda" else []),
    ],
    quantized=lambda shape: [shape],
    cases=_cases,
)
