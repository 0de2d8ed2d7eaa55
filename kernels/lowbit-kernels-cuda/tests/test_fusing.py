"""Inputs made and rounded in one pass, and the pass that finds where: against the same steps one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional

import lowbit
from lowbit import backends, compiling
from lowbit.activation import Activation
from lowbit.backends import Call, Description, Loaded
from lowbit.tensor import QuantizedTensor
from lowbit_kernels_cuda.backend import backend
from lowbit_kernels_cuda.fusing import fuse
from lowbit_kernels_cuda.inputs import Producer, rounded
from lowbit_kernels_cuda.linear import pack, product, rounded_once, several

A8 = ("dynamic:FP8_ROW", "dynamic:MXFP8", "dynamic:FP8_1x128")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
K, EPS = 256, 1e-5
DECOMPOSED = select_decomp_table()


@pytest.fixture(autouse=True)
def anew():
    """Without what was compiled before: of one function only so much is kept."""
    torch.compiler.reset()


def silu_by_steps(x: Tensor, more: Tensor) -> Tensor:
    return functional.silu(x) * more


def norm_by_steps(x: Tensor, weight: Tensor) -> Tensor:
    """As models of transformers have it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("activation", ["FP8_ROW", "INT8_ROW_ASYM", "FP8_1x128", "MXFP8", "int8:*x*:float32"])
def test_what_is_made_is_rounded_as_if_it_were_made_before(activation, codes, device):
    dtype = torch.float16 if codes else torch.bfloat16
    static = "*x*" in activation
    how = Activation.parse(f"{'static' if static else 'dynamic'}:{activation}")
    scale = torch.tensor(0.02, device=device) if static else None
    generator = torch.Generator().manual_seed(0)
    # Whose squares float32 sums exactly, so that it does not matter in which order.
    x, more = (torch.randint(-64, 65, (5, K), generator=generator).to(device, dtype) / 8 for _ in range(2))
    weight = (1 + torch.randn(K, generator=generator) / 8).to(device, dtype)
    total = torch.empty_like(x)
    for producer, made in (
        (Producer("norm", None, weight, EPS), norm_by_steps(x, weight)),
        (Producer("norm", more, weight, EPS, total), norm_by_steps(x + more, weight)),
        (Producer("silu", more), silu_by_steps(x, more)),
    ):
        found = rounded(x, how, scale, None, codes=codes, producer=producer)
        wanted = rounded(made, how, scale, None, codes=codes)
        apart = found.values.float() != wanted.values.float()
        # Exponentials, and roots on a GPU, differ in the last bit.
        assert apart.float().mean() < (0.01 if producer.kind == "silu" or device == "cuda" else 1e-9)
        if found.scale is not None:
            assert torch.allclose(found.scale, wanted.scale, rtol=0.01)
    assert torch.equal(total, x + more)


@cache
def stored(device: str, *, asymmetric: bool) -> dict[str, Tensor]:
    """Scale, and zero point, that products share."""
    zero = {"act_zero": torch.tensor(-3, dtype=torch.int8, device=device)} if asymmetric else {}
    return {"act_scale": torch.tensor(0.02, device=device), **zero}


def bound(n: int, fmt: str, activation: str, device: str):
    """A product with a weight (N, K) packed for the kernel of most priority."""
    weight = torch.randn(n, K, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16) / K**0.5
    plain, how = lowbit.quantize(weight.to(device), fmt), Activation.parse(activation)
    given = stored(device, asymmetric=how.format.zero is not None) if how.scaling == "static" else {}
    q = QuantizedTensor.from_parts(
        *(plain.qdata, plain.scales, plain.format), k=K, dtype=torch.bfloat16, activation=how, **given
    )
    kernels = {row.name: row for row in backend.kernels()}
    call = Call("linear", q.format, q.activation, "cpu", torch.bfloat16, n, K)
    run = kernels["cuda.linear" if kernels["cuda.linear_bytes"].refuses(call) else "cuda.linear_bytes"]
    parts, description = run.pack(q), Description(q.storage_layout, tuple(q.inner_tensors()), tuple(q.shape))
    return lambda x: run.run(x, parts, description, None)


class Seen(CustomGraphPass):
    """The pass, and what it left of a graph."""

    def __call__(self, graph):
        fuse(graph)
        self.nodes = list(graph.nodes)
        graph.lint()

    def uuid(self):
        return None

    def made(self):
        return [node.args[7] for node in self.nodes if node.target is torch.ops.lowbit_cuda.rounded.default]

    def count(self, target):
        return sum(node.target is target for node in self.nodes)


def compiled(run, seen, device):
    """A function compiled with the pass; on a CPU, where that takes long, the graph is not made into C++."""
    if device == "cuda":
        return torch.compile(run, fullgraph=True, options={"post_grad_custom_pre_pass": seen})

    def interpreted(module, _):
        seen(module.graph)
        module.recompile()
        return make_boxed_func(module.forward)

    return torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=interpreted, decompositions=DECOMPOSED))


def decoder(fmt, activation, device):
    """Products of a decoder's layer, with a sum before the norm that is used again."""
    q, k, down = (bound(n, fmt, activation, device) for n in (K, K // 2, K))
    norm = (1 + torch.randn(K, generator=torch.Generator().manual_seed(1)) / 8).to(device, torch.bfloat16)

    def run(x: Tensor, attended: Tensor) -> Tensor:
        total = x + attended
        normed = norm_by_steps(total, norm)
        gated = silu_by_steps(q(normed), q(normed) + k(normed).repeat(*(1 for _ in x.shape[:-1]), 2))
        return total + down(gated)

    return run


CASES = [
    ("INT4_G128", "dynamic:FP8_ROW"),
    ("MXFP4", "static:FP8_TENSOR"),
    ("FP8_ROW", "dynamic:FP8_ROW"),
    ("INT8_ROW_ASYM", "dynamic:INT8_ROW_ASYM"),
    ("INT8_ROW", "static:INT8_TENSOR_ASYM"),
    ("FP8_128x128", "dynamic:FP8_1x128"),
]
ON_GPUS = [*CASES, ("MXFP8", "dynamic:MXFP8"), ("MXFP4", "dynamic:FP8_ROW"), ("int4:1x*:float32", "dynamic:FP8_ROW")]


@pytest.mark.parametrize(
    ("fmt", "activation", "device"),
    [
        *((*case, "cpu") for case in CASES),
        *(pytest.param(*case, "cuda", marks=pytest.mark.gpu) for case in ON_GPUS),
    ],
)
def test_a_compiled_layer_rounds_once_where_inputs_are_made(fmt, activation, device):
    run, seen = decoder(fmt, activation, device), Seen()
    fast = compiled(run, seen, device)
    generator = torch.Generator().manual_seed(0)
    for tokens in (3, 40, 600, 1100) if device == "cuda" else (3,):
        x, attended = (torch.randn(1, tokens, K, generator=generator).to(device, torch.bfloat16) for _ in range(2))
        found, wanted = fast(x, attended).float(), run(x, attended).float()
        assert seen.made() == ["norm", "silu"]
        # Of q, k and q again, and of what goes down.
        assert seen.count(torch.ops.lowbit_cuda.linears.default) == 2
        assert seen.count(torch.ops.lowbit_cuda.linear.default) == 0
        # The norm is of the same numbers, summed in another order: a code here and there is another.
        assert (found - wanted).norm() < 0.01 * wanted.norm()


WEIGHTS = [
    *("INT4_G128", "UINT4_G128", "MXFP4", "NVFP4", "int3:1x64:bfloat16", "INT8_ROW", "INT8_ROW_ASYM", "MXFP6_E2M3"),
    "FP8_128x128",
]


@pytest.mark.parametrize(
    ("fmt", "activation", "device"),
    [
        *((fmt, "", "cpu") for fmt in WEIGHTS[:4]),
        *(pytest.param(fmt, activation, "cuda", marks=pytest.mark.gpu) for fmt in WEIGHTS for activation in ("", *A8)),
    ],
)
def test_products_that_share_inputs_run_together(fmt, activation, device):
    """As one by one; of other rows each, that are not all whole tiles, with a bias or without."""
    rows, k = ((200, 64, 136), 512) if device == "cuda" else ((72, 16, 40), 128)
    generator = torch.Generator().manual_seed(0)
    packed, biases, alone = [], [], []
    how = Activation.parse(activation) if activation else None
    for n in rows:
        weight = lowbit.quantize(torch.randn(n, k, generator=generator).to(device) / 16, fmt, activation=how)
        packed.append(pack(weight))
        biases.append(torch.randn(n, generator=generator).to(device, torch.bfloat16))
    names = list(weight.inner_tensors())[1:]
    for m in (1, 5, 16, 40, 64) if device == "cuda" else (3,):
        x = torch.randn(m, k, generator=generator).to(device, torch.bfloat16)
        for given in (biases, [None] * 3):
            values, scale, expands = x, None, False
            if activation:
                values, scale, _ = rounded_once(x, fmt, activation, None, None, Producer(""), expands=expands)
            arguments = names, fmt, activation
            found = several(values, scale, None, packed, *arguments, rows, k, given, x.dtype, expands=expands)
            for parts, n, bias, out in zip(packed, rows, given, found, strict=True):
                alone = several(values, scale, None, [parts], *arguments, [n], k, [bias], x.dtype, expands=expands)
                exact = product(x, parts, names, fmt, activation, (n, k), bias, None)
                assert torch.equal(alone[0], exact)
                # Another plan may cut K into other parts, whose sums are rounded elsewhere.
                assert (out - exact).float().norm() <= 1e-3 * exact.float().norm()
                assert out.isfinite().all()


def test_kernels_get_inputs_without_gaps(monkeypatch):
    """A GPU's read rows one after another; the interpreter's copy closes gaps by itself."""
    seen = []

    def run(values, *_, **__):
        seen.append(values)
        return [values.new_empty(3, 16)]

    monkeypatch.setattr("lowbit_kernels_cuda.linear.several", run)
    x = torch.randn(3, 256)[:, 128:]
    torch.ops.lowbit_cuda.linears("linear", x, None, None, [x], [], "INT4_G128", "", [16], 128, [None], False, x.dtype)
    assert seen[0].is_contiguous()
    assert torch.equal(seen[0], x)


def test_inductor_takes_the_pass():
    seen = Seen()
    run = decoder("INT8_ROW", "dynamic:INT8_ROW", "cpu")
    x = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = torch.compile(run, fullgraph=True, options={"post_grad_custom_pre_pass": seen})(x, x)
    assert seen.made() == ["norm", "silu"]
    assert (found - run(x, x)).float().norm() < 0.01 * found.float().norm()


@pytest.fixture
def on_cpus(monkeypatch):
    """The kernels, interpreted, as those of a CPU."""
    rows = tuple(replace(row, device="cpu") for row in backend.kernels())
    monkeypatch.setattr(type(backend), "kernels", lambda _: rows)
    monkeypatch.setattr(type(backend), "probe", lambda _: None)
    backends.forget()
    yield
    monkeypatch.undo()
    backends.forget()


@pytest.mark.usefixtures("on_cpus")
@pytest.mark.parametrize("kind", ["LlamaConfig", "Qwen3Config"])
@torch.no_grad()
def test_norms_and_gates_of_transformers_models_are_found(kind):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = getattr(transformers, kind)(vocab_size=64, num_hidden_layers=2, head_dim=32, **sizes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model.eval()
    rule = lowbit.Rule.of("*_proj.weight", "INT8_ROW", activation="dynamic:INT8_ROW")
    lowbit.quantize_(model, lowbit.Recipe((rule,)))
    lowbit.bind(model, prefer=["cuda"])
    ids, seen = torch.arange(5)[None], Seen()

    def run(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).last_hidden_state

    found, wanted = compiled(run, seen, "cpu")(ids), run(ids)
    assert seen.made() == ["norm", "norm", "silu"] * 2
    # What attention gives is one product's alone.
    assert seen.count(torch.ops.lowbit_cuda.linear.default) == 2
    assert (found - wanted).float().norm() <= 0.01 * wanted.float().norm()


def test_what_others_read_is_left():
    product = bound(64, "FP8_ROW", "dynamic:FP8_ROW", "cpu")
    weight = torch.ones(K, dtype=torch.bfloat16)

    def run(x: Tensor, more: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = norm_by_steps(x, weight)
        return product(normed), normed, product(more * 2)

    seen = Seen()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for found, wanted in zip(compiled(run, seen, "cpu")(x, x), run(x, x), strict=True):
        assert torch.allclose(found.float(), wanted.float(), rtol=0.02, atol=0.02)
    assert seen.made() == []


def test_compile_options_ask_the_backends(monkeypatch):
    asked: list[object] = []
    fake = SimpleNamespace(name="fake", fuse=asked.append)
    loaded = [Loaded("fake", "fake 1.0", fake, None), Loaded("other", "other 1.0", None, "is broken")]
    monkeypatch.setattr(compiling, "installed", lambda: {each.name: each for each in loaded})
    (option,) = lowbit.compile_options().values()
    option("a graph")
    assert asked == ["a graph"]
    assert "fake 1.0" in str(option.uuid())
