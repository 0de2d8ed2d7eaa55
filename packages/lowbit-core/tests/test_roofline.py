"""lowbit.roofline: the model against cases computed by hand, its tables against the formats, and the command."""

from __future__ import annotations

import json
from types import MappingProxyType

import pytest

from lowbit import roofline
from lowbit.backends import Refusal
from lowbit.bench import Use
from lowbit.bench.results import VERSION
from lowbit.roofline import Gpu, Kernel, Recipe, attention, gpus, linear, moe, predict, recipes

# 100 operations, 10 bytes and 5 exponentials a second, half of the first two within reach, a second a launch.
SLOW = Gpu(
    name="slow",
    devices=("Slow",),
    math=MappingProxyType({"bf16": 100.0}),
    memory=10.0,
    exponentials=5.0,
    achievable={"math": 0.5, "memory": 0.5},
    launch=1.0,
    source="made up",
)


def run(capsys, *argv):
    code = roofline.main(list(argv))
    return code, capsys.readouterr().out


def recipe(*kernels):
    return Recipe(name="some", about="", kernels=kernels)


@pytest.mark.parametrize(
    ("m", "seconds", "bound"),
    [
        # Weights of 2 x 8192^2 bytes, and input and output of 2 x 8192 each, at 3.35 TB/s x 0.92, and 2 us.
        (1, 134_250_496 / 3.082e12 + 2e-6, "memory"),
        # 2 x 4096 x 8192^2 operations at 989.4 TFLOP/s x 0.78.
        (4096, 549_755_813_888 / 771.732e12 + 2e-6, "math"),
    ],
)
def test_a_bfloat16_layer_on_an_h100_by_hand(m, seconds, bound):
    found = predict(gpus()["H100"], recipes("linear")["bf16"], linear(m, 8192, 8192))
    assert (found.seconds, found.bound) == (pytest.approx(seconds), bound)


def test_rounding_the_input_is_a_kernel_of_its_own_by_hand():
    found = predict(gpus()["H100"], recipes("linear")["fp8-row"], linear(4096, 8192, 8192))
    # 3 bytes a value and 4 a token to round, then the product at 1978.9 TFLOP/s x 0.78, and 2 us each.
    rounding = (3 * 4096 * 8192 + 4 * 4096) / 3.082e12
    assert found.seconds == pytest.approx(rounding + 549_755_813_888 / 1543.542e12 + 4e-6)


def test_int4_weights_on_an_h200_by_hand():
    found = predict(gpus()["H200"], recipes("linear")["w4a16"], linear(1, 28672, 8192))
    # Half a byte a weight, and two bytes of scale for each 128.
    moved = 28672 * 8192 * (0.5 + 2 / 128) + 2 * (28672 + 8192)
    assert found.seconds == pytest.approx(moved / (4.8e12 * 0.92) + 2e-6)


def test_the_largest_of_three_bounds_each_kernel_and_kernels_add_up():
    lengths = {"m": 2, "n": 3, "k": 5, "e": 1}
    # 30 values: 60 operations take 1.2 s, 30 bytes 6 s, 60 exponentials 12 s.
    parts = {"math": "bf16", "flops": {"mnk": 2}, "bytes": {"mnk": 1}, "exponentials": {"mnk": 2}}
    whole = Kernel(name="a", **parts)
    assert predict(SLOW, recipe(whole), lengths) == roofline.Prediction(13.0, "exponentials")
    assert predict(SLOW, recipe(Kernel(name="a", **parts | {"exponentials": {}})), lengths).seconds == 7.0
    assert predict(SLOW, recipe(Kernel(name="a", **parts | {"bytes": {}, "exponentials": {}})), lengths).bound == "math"
    two = predict(SLOW, recipe(Kernel(name="b", bytes={"mk": 1}), whole), lengths)
    assert (two.seconds, two.bound) == (13.0 + 2.0 + 1.0, "exponentials")
    assert predict(SLOW, recipe(Kernel(name="c", bytes={"": 1})), lengths) == roofline.Prediction(1.2, "launch")


def test_what_a_gpu_has_no_tensor_cores_for_is_refused():
    for name, found, lacking in (("A100", "fp8-row", "fp8"), ("H100", "mxfp8", "mxfp8"), ("L40S", "nvfp4", "fp4")):
        refusal = predict(gpus()[name], recipes("linear")[found], linear(1, 64, 64))
        assert isinstance(refusal, Refusal)
        assert refusal.reason.startswith(f"needs tensor cores for {lacking}; {name} has bf16")


def test_experts_that_some_token_goes_to():
    assert moe(1, 64, 64, 8, 2) == {"m": 2, "n": 64, "k": 64, "e": pytest.approx(2)}
    # Two tokens to one of two experts each: the same one half of the time.
    assert moe(2, 64, 64, 2, 1)["e"] == pytest.approx(1.5)
    assert moe(10_000, 64, 64, 8, 2)["e"] == pytest.approx(8)
    weights = 1.5 * 64 * 128 * (0.5 + 1 / 32)
    found = predict(gpus()["B200"], recipes("moe")["mxfp4a16"], moe(2, 64, 128, 2, 1))
    assert found.seconds == pytest.approx((weights + 2 * 2 * (64 + 128)) / (7.7e12 * 0.92) + 2e-6)


def test_causal_queries_see_as_many_keys_as_there_are_pairs():
    sizes = {"batch": 1, "heads": 4, "kv_heads": 2, "width": 64}
    for queries, keys in ((4, 4), (3, 7), (1, 9)):
        pairs = sum(k <= keys - queries + q for q in range(queries) for k in range(keys))
        lengths = attention(queries, keys, **sizes, causal=True)
        assert lengths["q"] * lengths["v"] == pairs
        assert attention(queries, keys, **sizes, causal=False)["v"] == keys


def test_attention_on_an_h100_by_hand():
    lengths = attention(8192, 8192, batch=1, heads=32, kv_heads=8, width=128, causal=False)
    plain = predict(gpus()["H100"], recipes("attention")["bf16"], lengths)
    assert plain.seconds == pytest.approx(4 * 32 * 8192**2 * 128 / 771.732e12 + 2e-6)
    low = predict(gpus()["H100"], recipes("attention")["fp8"], lengths)
    # Scales are a pass over 2 bytes a value, rounding one over 3; then exponentials are almost as slow as the math.
    values = 8192 * 128 * (32 + 2 * 8)
    computing = max(4 * 32 * 8192**2 * 128 / 1543.542e12, 32 * 8192**2 / 3.87e12)
    assert low.seconds == pytest.approx(5 * values / 3.082e12 + computing + 6e-6)


@pytest.mark.parametrize("name", [name for name, found in recipes("linear").items() if found.format])
def test_the_table_counts_bytes_as_the_formats_do(name):
    found, use = recipes("linear")[name], Use.parse(recipes("linear")[name].format)
    m, n, k = 256, 1024, 2048
    lengths, product = {"m": m, "n": n, "k": k, "e": 1}, found.kernels[-1]
    weight = roofline._sum({t: much for t, much in product.bytes.items() if "e" in t}, lengths)
    assert weight == pytest.approx(n * k * use.format.bits_per_element((n, k)) / 8, rel=1e-5)
    tokens = roofline._sum({t: much for t, much in product.bytes.items() if t in {"m", "mk"}}, lengths)
    bits = 16 if use.input is None else use.input.bits_per_element((m, k))
    # A tensor scale of four bytes is not counted.
    assert tokens == pytest.approx(m * k * bits / 8, rel=1e-5, abs=4)
    assert product.bytes["mn"] == 2
    assert product.flops == {"mnk": 2}
    if use.input is not None:
        rounding = roofline._sum(found.kernels[-2].bytes, lengths)
        assert rounding == pytest.approx(m * k * (2 + bits / 8), rel=1e-5, abs=4)


def test_every_gpu_says_where_its_numbers_come_from():
    assert set(gpus()) == {"H100", "H200", "A100", "L40S", "B200", "B300", "RTX5090"}
    for gpu in gpus().values():
        assert "NVIDIA" in gpu.source
        assert "achievable" in gpu.source or "as for H100" in gpu.source
        # Halving the bits of operands at least doubles the rate, but for what a chip hardly has.
        assert gpu.math.get("fp8", 2 * gpu.math["bf16"]) == pytest.approx(2 * gpu.math["bf16"], rel=0.02)
        assert gpu.math.get("fp4", 4 * gpu.math["bf16"]) >= 4 * gpu.math["bf16"]


@pytest.fixture
def measured(tmp_path):
    """A file of results of an H100, of a layer that took 50 us in bfloat16 and 20 us in int4."""

    def write(name="linear", device="NVIDIA H100 80GB HBM3", **sizes):
        contenders = [
            {"role": "candidate", "name": "lowbit", "seconds": 20e-6},
            {"role": "baseline", "name": "bfloat16", "seconds": 50e-6},
            {"role": "peer", "name": "humming", "seconds": 10e-6},
        ]
        case = {"format": "INT4_G128", "m": 1, "n": 8192, "k": 8192, **sizes}
        told = {"version": VERSION, "benchmark": name, "environment": {"device": device}, "ceilings": {}}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(told | {"rows": [{"case": case, "contenders": contenders}]}))
        return str(file)

    return write


def test_what_was_measured_stands_beside_what_was_predicted(capsys, measured):
    argv = ("--gpu", "H100", "--m", "1,16", "--recipes", "bf16,w4a16,w4a8")
    code, out = run(capsys, *argv, "--measured", measured())
    assert code == 0
    lines = {tuple(line.split()[:2]): line for line in out.splitlines()}
    assert lines["bf16", "1"].endswith("50 us     91.1%")
    assert lines["w4a16", "1"].split()[-3:] == ["20", "us", "66.2%"]
    assert all(lines[name].count(" us") == 1 for name in (("w4a8", "1"), ("w4a16", "16")))
    told = {(row["recipe"], row["m"]): row for row in json.loads(run(capsys, *argv, "--json")[1])["rows"]}
    assert told["w4a16", 1]["over_bf16"] == pytest.approx(told["bf16", 1]["seconds"] / told["w4a16", 1]["seconds"])
    assert all("measured" not in row for row in told.values())


@pytest.mark.parametrize(
    "other",
    [{"device": "NVIDIA H200"}, {"device": "NVIDIA H100 PCIe"}, {"name": "cast"}, {"n": 4096}, {"m": 2}],
)
def test_measurements_of_something_else_are_left_out(capsys, measured, other):
    _, out = run(capsys, "--gpu", "H100", "--m", "1", "--measured", measured(**other))
    assert "none of the measured cases is linear of these sizes on H100" in out
    assert "measured" not in out.splitlines()[0]


def test_measured_experts_are_those_of_as_many_rows(capsys, measured):
    file = measured("grouped", experts=64, m=8)
    _, out = run(capsys, "--gpu", "H100", "--op", "moe", "--m", "1", "--measured", file, "--recipes", "w4a16")
    assert out.splitlines()[1].split()[-3:-1] == ["20", "us"]


def test_what_the_gpu_cannot_run_is_told(capsys):
    code, out = run(capsys, "--gpu", "A100", "--m", "1")
    assert code == 0
    assert "not mxfp8: needs tensor cores for mxfp8; A100 has bf16, int8" in out
    assert out.splitlines()[1].startswith("bf16 ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "H999"], "invalid choice: 'H999'"),
        ([], "--gpu"),
        (["--gpu", "H100", "--m", "0"], "'0' is no whole number"),
        (["--gpu", "H100", "--n", "x"], "'x' is no whole number"),
        (["--gpu", "H100", "--recipes", "moon"], "--recipes moon: the recipes of linear are bf16, w4a16"),
        (["--gpu", "H100", "--op", "moe", "--top", "9", "--experts", "8"], "--top 9: there are only 8 experts"),
        (["--gpu", "H100", "--op", "attention", "--heads", "3"], "--heads must be a multiple of --kv-heads"),
        (["--gpu", "H100", "--op", "attention", "--causal", "--keys", "1", "--m", "2"], "as many --keys as queries"),
        (["--gpu", "H100", "--op", "attention", "--measured", "x.json"], "no benchmark of `lowbit bench` measures"),
        (["--gpu", "H100", "--measured", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_bad_options_are_refused(capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        roofline.main(words)
    assert caught.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
