"""A stranger's backend, built and installed as a distribution of its own: found, chosen, refused, broken and doubled."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit as lb
from lowbit import backends
from lowbit.backends import Call
from lowbit.packed import PackedTensor
from lowbit.testing import check_backend, only_backends, product_bound, sample

SOURCE = Path(__file__).parent / "third_party_backend"
CALL = Call("linear", lb.INT8_ROW, None, "cpu", torch.float32, 64, 256)
OTHER = ('name = "lowbit-demo"', 'name = "other-demo"')
BROKEN = ("import torch\n", "import torch\nimport moon_driver\n")


@pytest.fixture(autouse=True, scope="module")
def alone():
    """Beside the reference, whatever kernels for this machine are installed."""
    with only_backends("reference", "demo", "other"):
        yield


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """`build((old, new), ...)`: a folder with the distribution in it, installed, texts and file names so edited."""
    made = {}

    def built(*edits):
        if edits not in made:
            made[edits] = install(tmp_path_factory.mktemp("demo"), edits)
        return made[edits]

    return built


def install(folder, edits):
    project, target = folder / "project", folder / "installed"
    project.mkdir()
    left = set(edits)
    for file in ("pyproject.toml", "lowbit_demo.py"):
        name, text = file, (SOURCE / file).read_text()
        for old, new in edits:
            left -= {(old, new)} if old in text else set()
            name, text = name.replace(old, new), text.replace(old, new)
        (project / name).write_text(text)
    assert not left, f"nothing of {left} is in the sources"
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=project, check=True, capture_output=True, timeout=60)
    (wheel,) = folder.glob("*.whl")
    # To unpack it is how a wheel of pure Python is installed.
    zipfile.ZipFile(wheel).extractall(target)
    return target


@pytest.fixture
def installed(build, monkeypatch):
    """`installed((old, new), ...)`: what `build` makes is on this process's path, and backends are found anew."""

    def forget():
        for name in ("lowbit_demo", "lowbit_other"):
            sys.modules.pop(name, None)
        backends.forget()

    def use(*edits):
        monkeypatch.syspath_prepend(build(*edits))
        forget()

    yield use
    monkeypatch.undo()
    forget()


def model(*formats):
    """Linear layers with weights of these formats."""
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in formats))
    rules = (lb.Rule.of(f"{i}.weight", fmt) for i, fmt in enumerate(formats))
    lb.quantize_(layers, lb.Recipe(tuple(rules)))
    return layers


def test_it_is_chosen(installed):
    layers, x = model("INT8_ROW", "INT4_G32"), sample((5, 64))
    weight = layers[0].weight
    before, exact = layers[1](x), x.double() @ weight.dequantize().double().T + layers[0].bias.double()
    bound = product_bound(x, weight.dequantize()) + 2.0**-22 * exact.abs()
    installed()
    table = lb.bind(layers)
    assert [(row.kernel, row.packed) for row in table.rows] == [
        ("demo.linear_int8_row", True),
        ("reference.linear", False),
    ]
    assert re.search(r"0.weight +linear +int8:1x\*:float32 +demo.linear_int8_row \(packed\)", str(table))
    assert backends.installed()["demo"].distribution == "lowbit-demo 0.1"
    assert isinstance(layers[0].weight, PackedTensor)
    assert ((layers[0](x).double() - exact).abs() <= bound).all()
    assert torch.equal(layers[1](x), before)
    lb.unbind(layers)
    for name, part in weight.inner_tensors().items():
        assert torch.equal(part, getattr(layers[0].weight, name)), name


def test_a_new_process_finds_it(build):
    code = (
        "import torch, lowbit; from torch import nn\n"
        "model = nn.Linear(64, 64)\n"
        "lowbit.quantize_(model, lowbit.Recipe((lowbit.Rule.of('weight', 'INT8_ROW'),)))\n"
        "print(lowbit.bind(model)); print(model(torch.ones(1, 64)).shape)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    output = subprocess.run(command, env=with_path(build()), check=True, stdout=-1, text=True, timeout=120).stdout
    assert "demo.linear_int8_row (packed)" in output
    assert "torch.Size([1, 64])" in output


def with_path(folder):
    return os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def test_it_is_forced(installed):
    installed(('"any", 10,', '"any", -1,'))
    assert lb.select(CALL).kernel.name == "reference.linear"
    layers = model("INT8_ROW")
    assert lb.bind(layers, prefer=("demo",)).rows[0].kernel == "demo.linear_int8_row"
    assert "demo.linear_int8_row: priority -1; reference.linear has 0" in lb.explain(CALL)
    assert lb.bind(layers).rows[0].kernel == "reference.linear"
    layers = model("INT8_ROW", "INT4_G32")
    with pytest.raises(lb.NoKernelError, match="no kernel of demo takes linear int4:1x32:bfloat16"):
        lb.bind(layers, prefer=("demo",))
    assert isinstance(layers[0].weight, lb.QuantizedTensor)


def test_it_refuses_with_a_reason(installed):
    installed()
    reason = "demo.linear_int8_row: needs int8:1x*:float32 weights, not int4:1x32:bfloat16"
    table = lb.bind(model("INT4_G32"))
    assert reason in table.rows[0].refusals
    assert reason in table.to_json()
    assert f"  refused by {reason}" in lb.explain(replace(CALL, format=lb.INT4_G32)).splitlines()
    rounded = lb.explain(replace(CALL, activation=lb.Activation(lb.INT8_ROW)), prefer=("demo",))
    assert "no kernel of demo takes" in rounded
    assert "demo.linear_int8_row: needs inputs that stay as they are" in rounded


@pytest.mark.parametrize(
    ("value", "kernel", "told"),
    [
        ("demo,reference", "demo.linear_int8_row", "reference.linear: LOWBIT_BACKENDS puts demo.linear_int8_row first"),
        ("reference,demo", "reference.linear", "demo.linear_int8_row: LOWBIT_BACKENDS puts reference.linear first"),
        ("reference", "reference.linear", "demo: LOWBIT_BACKENDS=reference leaves it out"),
    ],
)
def test_the_variable_orders_it(installed, monkeypatch, value, kernel, told):
    monkeypatch.setenv("LOWBIT_BACKENDS", value)
    installed()
    assert lb.select(CALL).kernel.name == kernel
    assert told in lb.explain(CALL)
    assert lb.bind(model("INT8_ROW")).rows[0].kernel == kernel


def test_a_broken_one_is_a_refusal(installed):
    installed(BROKEN)
    problem = "failed to load: ModuleNotFoundError: No module named 'moon_driver'"
    with pytest.warns(RuntimeWarning, match=rf"'demo' \(lowbit-demo 0.1\) {problem}") as told:
        assert lb.select(CALL).kernel.name == "reference.linear"
    assert len(told) == 1
    # From here on, a second warning would be an error.
    assert f"refused by demo: {problem}" in lb.explain(CALL)
    layers, x = model("INT8_ROW"), sample((5, 64))
    wanted = layers(x)
    assert f"demo: {problem}" in lb.bind(layers).rows[0].refusals
    assert torch.equal(layers(x), wanted)
    with pytest.raises(lb.NoKernelError, match="moon_driver"):
        lb.select(CALL, prefer=("demo",))


def test_doctor_shows_a_broken_one(build, start):
    process = start("doctor", "--format", "INT8_ROW", "--device", "cpu", env=with_path(build(BROKEN)))
    output, warned = process.communicate(timeout=120)
    problem = "failed to load: ModuleNotFoundError: No module named 'moon_driver'"
    assert process.returncode == 1
    assert warned.count("moon_driver") == 1
    lines = [line.split() for line in output.splitlines()]
    assert ["lowbit-demo", "0.1"] in lines
    assert f"demo lowbit-demo 0.1: {problem}".split() in lines
    assert f"problem: backend demo: {problem}".split() in lines
    # Once, not for every op.
    assert output.count("not demo") == 0


def test_two_distributions_of_one_backend_are_an_error(installed):
    installed()
    installed(OTHER)
    with pytest.raises(lb.BackendError) as caught:
        lb.select(CALL)
    for owner in ("lowbit-demo 0.1 (lowbit_demo:backend)", "other-demo 0.1 (lowbit_demo:backend)", "'demo'"):
        assert owner in str(caught.value)


def test_two_kernels_of_one_name_are_an_error(installed):
    renamed = (
        OTHER,
        ("lowbit_demo", "lowbit_other"),
        ("demo = ", "other = "),
        ('    name = "demo"', '    name = "other"'),
    )
    installed()
    installed(*renamed)
    with pytest.raises(lb.BackendError, match="'demo.linear_int8_row' is used twice, by backends 'demo' and 'other'"):
        lb.select(CALL)
    installed(*renamed, ("demo.linear", "other.linear"), ('"any", 10,', '"any", 11,'))
    assert lb.select(CALL).kernel.name == "other.linear_int8_row"


def check():
    return check_backend(importlib.import_module("lowbit_demo").backend, devices=("cpu",))


def test_it_passes_the_check(installed):
    installed()
    (row,) = check().rows
    assert (row.kernel, row.calls) == ("demo.linear_int8_row", 6)
    assert row.runs > row.calls
    assert "needs int8:1x*:float32 weights, not e2m1:1x32:e8m0" in row.refusals


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (("out if bias is None else out + bias", "out"), "bias: it errs in 30 of 30 values"),
        (('"pre_scale" in inner', "False"), "pre_scale: it errs in"),
        ((".squeeze(-1)", ".T"), r"x \(21,\), .* it gives torch.float32 of shape \(1, 6\); needed"),
        ((".squeeze(-1)", ".squeeze(-1).bfloat16()"), "torch.float32 n=6 k=21; .* it errs"),
        (("WHOLE = 128", "WHOLE = 1"), "torch.float16 n=6 k=21; .* a column of 1000 in x: it errs in .* most by inf"),
        (('["qdata"].to(x.dtype)', '["qdata"]'), "autocast to bfloat16, bias: it raises RuntimeError"),
        (("(torch.int8)", "(torch.int8).abs()"), "it unpacks another qdata than was packed"),
        (
            ("else out + bias).to(x.dtype)", "else out + bias)"),
            r"it gives torch.float32 of shape \(5, 6\); needed is torch.bfloat16",
        ),
    ],
)
def test_a_wrong_one_does_not(installed, edit, words):
    installed(edit)
    with pytest.raises(lb.BackendError, match=f"demo.linear_int8_row: linear int8:.* {words}"):
        check()


def test_the_documentation_shows_it():
    """The worked example is this distribution, word for word."""
    page = (SOURCE.parents[1] / "docs/backends.md").read_text()
    for language, file in (("python", "lowbit_demo.py"), ("toml", "pyproject.toml")):
        assert f"```{language}\n# {file}\n{(SOURCE / file).read_text()}```" in page, file
