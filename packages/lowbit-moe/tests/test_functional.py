"""Products of rounded operands, forward and backward, against float64 products of the operands that formats say."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lowbit
from lowbit import FormatError
from lowbit.hadamard import Rotation
from lowbit_moe import RECIPES, Operands, TrainRecipe, grouped_mm, linear
from lowbit_moe.routing import Routing

# Gradients rounded to nearest, as a second draw of a seed would have others.
NEAREST = TrainRecipe(
    name="NEAREST", forward=Operands.of("NVFP4"), dgrad=Operands.of("NVFP4"), wgrad=Operands.of("NVFP4"), rotation=16
)
ALL = [*RECIPES.values(), NEAREST]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
names = pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)


def normal(*shape, seed=0, outliers=False, dtype=torch.bfloat16):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if outliers:
        x[..., ::50] *= 100
    return x.to(dtype)


def decoded(x, fmt, align, recipe, *, seed=None, rotation=0):
    """What x (.., R, K) is once it is rounded along K, in float64, of K that zeros fill up."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % align))
    if rotation:
        x = Rotation(rotation).in_order(x)
    chance = {} if seed is None else {"rounding": "stochastic", "seed": seed}
    return lowbit.quantize(x, fmt, mode=recipe.mode, **chance).dequantize(torch.float32).double()


def products(x, w, grad, recipe, seed=None, ends=None):
    """Results of x (M, K) by w (N, K) and both gradients, and what sums of each may be off by; of `ends` for experts."""
    spans = moved = [(0, x.shape[0])]
    tokens = (grad.mT, x.mT)
    if ends is not None:
        spans = list(zip([0, *ends[:-1]], ends, strict=True))
        # Each group's rows, and zeros up to where another may begin, and as many rows as any ends could need.
        rows = (x.shape[0] + len(ends) * (recipe.align - 1)) // recipe.align * recipe.align
        tokens, moved = ([grad.new_zeros(side.shape[1], rows) for side in (grad, x)], [])
        for start, stop in spans:
            begin = -(-moved[-1][1] // recipe.align) * recipe.align if moved else 0
            moved.append((begin, begin + stop - start))
            for to, side in zip(tokens, (grad, x), strict=True):
                to[:, begin : begin + stop - start] = side[start:stop].mT
    found = []
    for operands, left, draws, right, is_wgrad in (
        (recipe.forward, x, None, w, False),
        (recipe.dgrad, grad, seed, w.mT, False),
        (recipe.wgrad, tokens[0], seed, tokens[1], True),
    ):
        a, b = left.double(), right.double()
        if operands is not None:
            turn = recipe.rotation if is_wgrad else 0
            a = decoded(left, operands.left, operands.align, recipe, seed=draws, rotation=turn)
            b = decoded(right, operands.right, operands.align, recipe, rotation=turn)
        each = []
        for e, span in enumerate(moved if is_wgrad else spans):
            # Of rotated columns a tail of zeros is none.
            cut = slice(span[0], -(-span[1] // recipe.align) * recipe.align) if is_wgrad else slice(*span)
            one, other = (a[:, cut], b[:, cut]) if is_wgrad else (a[cut], b if ends is None else b[e])
            each.append((one @ other.mT, (one.shape[-1] + 8) * 2.0**-24 * (one.abs() @ other.abs().mT)))
        found.append(each)
    return found


def drawn(recipe, device):
    """The seed that a layer drew once torch was seeded with 7."""
    torch.manual_seed(7)
    return int(torch.randint(1 << 62, (), device=device)) if recipe.gradient == "stochastic" else None


def assert_near(found, wanted, lost, dtype):
    if found.is_cuda:
        # Tensor cores keep 13 bits or so of sums of 8-bit floats.
        lost = lost * 2**11
    found = found.cpu()
    wanted, lost = wanted[: found.shape[0], : found.shape[1]], lost[: found.shape[0], : found.shape[1]]
    bound = lost + torch.finfo(dtype).eps / 2 * (wanted.abs() + lost) + torch.finfo(dtype).smallest_normal
    assert found.dtype == dtype
    assert ((found.double() - wanted).abs() <= bound).all()


@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 48, 128), (37, 40, 72), (1, 16, 16)])
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_a_linear_layer_and_its_gradients_are_products_of_rounded_operands(recipe, dtype, m, n, k, outliers, device):
    x, w = (
        normal(*shape, seed=i, outliers=outliers, dtype=dtype).to(device).requires_grad_()
        for i, shape in enumerate(((m, k), (n, k)))
    )
    grad = normal(m, n, seed=2, outliers=outliers, dtype=dtype)
    torch.manual_seed(7)
    out = linear(x, w, recipe=recipe)
    out.backward(grad.to(device))
    wanted = products(x.detach().cpu(), w.detach().cpu(), grad, recipe, drawn(recipe, device))
    for found, ((value, lost),) in zip((out, x.grad, w.grad), wanted, strict=True):
        assert_near(found, value, lost, dtype)


ENDS = {"some": [40, 40, 73, 100], "all": [10, 20, 30, 110], "none": [0, 0, 0, 0], "one": [0, 0, 0, 110]}


@names
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_experts_and_their_gradients_are_products_of_each_group(recipe, ends, device):
    m, n, k = 110, 48, 72
    x, w = (normal(*shape, seed=i).to(device).requires_grad_() for i, shape in enumerate(((m, k), (4, n, k))))
    grad = normal(m, n, seed=2)
    torch.manual_seed(7)
    out = grouped_mm(x, w, torch.tensor(ends, dtype=torch.int32, device=device), recipe=recipe)
    out.backward(grad.to(device))
    seed = drawn(recipe, device)
    forward, dgrad, wgrad = products(x.detach().cpu(), w.detach().cpu(), grad, recipe, seed, ends)
    start = 0
    for e, end in enumerate(ends):
        for found, (value, lost) in (
            (out[start:end], forward[e]),
            (x.grad[start:end], dgrad[e]),
            (w.grad[e], wgrad[e]),
        ):
            assert_near(found, value, lost, torch.bfloat16)
        start = end
    assert out[start:].count_nonzero() == 0
    assert x.grad[start:].count_nonzero() == 0


@pytest.mark.parametrize("experts", [False, True])
def test_without_gradients_nothing_is_made_for_them(experts):
    x, w = normal(32, 64), normal(*((4,) if experts else ()), 16, 64, seed=1).requires_grad_()
    made = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func.name())
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watching():
        if experts:
            grouped_mm(x, w, torch.tensor([3, 9, 20, 32], dtype=torch.int32), recipe="MXFP8")
        else:
            linear(x, w, recipe="MXFP8")
    assert [name for name in made if "quantize" in name] == ["lowbit::quantize"] * 2 + ["lowbit::dequantize"] * 2


@names
def test_groups_that_are_apart_already_are_not_moved(recipe):
    """Rows that follow the last need not fill a block."""
    nearest = recipe if recipe.gradient == "nearest" else NEAREST
    ends, m = [128, 128, 256], 303
    x, w, grad = normal(m, 72), normal(3, 48, 72, seed=1), normal(m, 48, seed=2)
    found = []
    for align in ("auto", None):
        parts = [part.clone().requires_grad_() for part in (x, w)]
        out = grouped_mm(parts[0], parts[1], torch.tensor(ends, dtype=torch.int32), recipe=nearest, align=align)
        found.append([out.detach(), *torch.autograd.grad(out, parts, grad)])
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        # Rows of no group are in scales of whole columns, and in sums that are put together otherwise.
        assert (one - other).float().norm() <= 0.02 * one.float().norm()


class Given(torch.autograd.Function):
    """Rounded where it is made; gradients are of the values."""

    @staticmethod
    def forward(ctx, x, recipe):
        return lowbit.quantize(x, recipe.forward.left, mode=recipe.mode)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], None


@pytest.mark.parametrize("recipe", [r for r in RECIPES.values() if r.forward], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("kind", ["dense", "groups", "tokens"])
def test_an_input_that_is_rounded_already_is_taken_as_it_is(recipe, kind):
    """Wgrad rounds its values along the tokens, as it would those of a plain tensor that holds them."""
    x, grad = normal(50, 128), normal(100 if kind == "tokens" else 50, 48, seed=2)
    w = normal(*(() if kind == "dense" else (4,)), 48, 128, seed=1).requires_grad_()
    routing = Routing.of(torch.randint(0, 5, (50, 2), generator=torch.Generator().manual_seed(3)), 4)
    offs = routing.offs if kind == "tokens" else torch.tensor([10, 10, 30, 45], dtype=torch.int32)

    def products_of(x):
        torch.manual_seed(7)
        if kind == "dense":
            return linear(x, w, recipe=recipe)
        return grouped_mm(x, w, offs, recipe=recipe, routing=routing if kind == "tokens" else None)

    x.requires_grad_()
    rounded = Given.apply(x, recipe)
    again = rounded.detach().dequantize().requires_grad_()
    results = []
    for of, leaf in ((rounded, x), (again, again)):
        out = products_of(of)
        results.append([out, *torch.autograd.grad(out, (leaf, w), grad)])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted)


def test_an_input_of_another_format_is_refused():
    w = normal(48, 128)
    for x, recipe, match in (
        (lowbit.quantize(normal(50, 128), "MXFP8"), "FP8_ROW", "FP8_ROW takes e4m3fn:1x.:e8m0 along rows"),
        (lowbit.quantize(normal(50, 128), "MXFP8"), "BF16", "BF16 takes numbers that are not rounded"),
        (lowbit.quantize(normal(128, 64), "MXFP8", axis=0).mT, "FP8_BLOCK", "FP8_BLOCK takes"),
        (lowbit.quantize(normal(128, 50), "MXFP8", axis=0), "MXFP8", "of a multiple of 32 numbers"),
    ):
        with pytest.raises(FormatError, match=match):
            linear(x, w[:, : x.shape[1]], recipe=recipe)
    with pytest.raises(FormatError, match="weight is quantized, to e4m3fn:1x32:e8m0; training needs a plain one"):
        linear(normal(50, 128), lowbit.quantize(w, "MXFP8"))


@names
def test_no_tokens_are_fine(recipe):
    x, w, stack = normal(0, 64).requires_grad_(), normal(16, 64).requires_grad_(), normal(3, 16, 64).requires_grad_()
    offs = torch.zeros(3, dtype=torch.int32)
    for out, weight in ((linear(x, w, recipe=recipe), w), (grouped_mm(x, stack, offs, recipe=recipe), stack)):
        assert out.shape == (0, 16)
        out.sum().backward()
        assert weight.grad.count_nonzero() == 0
