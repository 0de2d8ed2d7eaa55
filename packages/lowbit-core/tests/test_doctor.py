"""`lowbit doctor`: what it says of the machine, of every op and format, and of what is broken or missing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from lowbit import FORMATS, backends, doctor
from lowbit.testing import Loopback, installed_backends


def run(capsys, *argv):
    code = doctor.main(list(argv))
    return code, capsys.readouterr().out


def broken(monkeypatch, name="moon"):
    real = backends.entry_points

    def load():
        raise ImportError("no libmoon")

    point = SimpleNamespace(name=name, value="moon:backend", dist=None, load=load)
    monkeypatch.setattr(backends, "entry_points", lambda *, group: [*real(group=group), point])
    backends.forget()


@pytest.fixture
def clean():
    yield
    backends.forget()


def test_it_tells_every_op_and_format_in_json(capsys):
    code, out = run(capsys, "--json", "--device", "cpu")
    report = json.loads(out)
    assert code == 0
    assert report["machine"]["torch"] == torch.__version__
    assert report["packages"]["lowbit-core"]
    assert report["backends"]["reference"]["problem"] is None
    assert set(report["backends"]["reference"]["kernels"]) >= {f"reference.{row['op']}" for row in report["kernels"]}
    told = {(row["format"], row["op"], row["activation"] is not None): row["kernel"] for row in report["kernels"]}
    for name, fmt in FORMATS.items():
        for op in ("quantize", "dequantize", "linear", "embedding", "grouped_mm"):
            assert told[name, op, False] == f"reference.{op}"
        sums = fmt.zero is not None and fmt.block[-1] == 0
        for op in ("linear", "scaled_mm"):
            wanted = None if fmt.block[0] > 1 else f"reference.{op}{'_row_sums' if sums and op == 'linear' else ''}"
            assert told.get((name, op, True)) == wanted
    assert all(row["refusals"] for row in report["kernels"] if row["op"] == "linear")


def test_a_backend_may_say_what_it_found(capsys):
    class Found(Loopback):
        def detail(self):
            return "avx9"

    with installed_backends(Found("found"), Loopback("silent"), Loopback("idle", reason="needs a moon")):
        _, out = run(capsys, "--format", "INT8_ROW", "--device", "cpu")
    states = dict(line.strip().split(None, 1) for line in out.splitlines() if line.startswith("  ") and ":" in line)
    assert states["found"].endswith("kernels by avx9")
    assert states["silent"].endswith("kernels")
    assert states["idle"].endswith(": needs a moon")


def test_one_screen_says_what_runs(capsys):
    code, out = run(capsys, "--device", "cpu")
    lines = [line.strip() for line in out.splitlines()]
    assert code == 0
    assert len(lines) < 40
    assert max(map(len, lines)) < 160
    assert not any(line.startswith("not ") for line in lines)
    assert f"linear: reference.linear  [all {len(FORMATS)} formats]" in lines
    assert [line for line in lines if line.startswith("linear (input rounded too)")] == [
        "linear (input rounded too): reference.linear  [all but INT8_ROW_ASYM INT8_TENSOR_ASYM FP8_128X128]",
        "linear (input rounded too): reference.linear_row_sums  [INT8_ROW_ASYM INT8_TENSOR_ASYM]",
    ]
    assert "why not another kernel: lowbit doctor --why, or --format MXFP8 for one format" in lines


def test_a_line_that_every_format_shares_is_one_line(capsys):
    code, out = run(capsys, "--device", "cpu", "--why")
    lines = [line.strip() for line in out.splitlines()]
    assert code == 0
    for op in ("quantize", "dequantize", "linear", "embedding", "grouped_mm"):
        assert f"{op}: reference.{op}  [all {len(FORMATS)} formats]" in lines
    assert "scaled_mm (input rounded too): reference.scaled_mm  [all but FP8_128X128]" in lines
    assert "linear (input rounded too): reference.linear_row_sums  [INT8_ROW_ASYM INT8_TENSOR_ASYM]" in lines
    assert "not reference.linear: priority 0; reference.linear_row_sums has 1" in lines
    assert max(map(len, lines)) < 160
    assert len(lines) < 40


def test_formats_of_the_users_choice(capsys):
    _, out = run(capsys, "--format", "int3:1x8:float16")
    assert "quantize: reference.quantize  [int3:1x8:float16]" in out
    _, out = run(capsys, "--format", "MXFP4", "--format", "NVFP4")
    assert "quantize: reference.quantize  [all 2 formats]" in out
    with pytest.raises(SystemExit) as caught:
        run(capsys, "--format", "nonsense")
    assert caught.value.code == 2
    assert "format 'nonsense' is" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--help"])
    assert caught.value.code == 0
    assert "example: lowbit doctor --format" in capsys.readouterr().out


def test_a_broken_backend_is_a_problem(capsys, monkeypatch, clean):
    broken(monkeypatch)
    with pytest.warns(RuntimeWarning, match="no libmoon"):
        code, out = run(capsys)
    assert code == 1
    assert "problem: backend moon: failed to load: ImportError: no libmoon" in out.splitlines()
    assert "an unknown distribution: failed to load" in out
    code, out = run(capsys, "--json")
    assert code == 1
    assert json.loads(out)["problems"] == ["backend moon: failed to load: ImportError: no libmoon"]


def test_a_backend_for_other_machines_is_no_problem(capsys):
    with installed_backends(Loopback("moon", reason="needs a moon; this planet has none")):
        code, out = run(capsys)
    assert code == 0
    assert "needs a moon; this planet has none" in out
    assert "problem:" not in out


def test_a_kernel_that_is_better_is_shown_with_what_it_beat(capsys):
    with installed_backends(Loopback("moon")):
        _, out = run(capsys, "--format", "MXFP4")
    assert "linear: moon.linear  [MXFP4]" in out
    assert "not reference.linear: priority 0; moon.linear has 10" in out


def test_no_kernel_at_all_is_said(capsys, monkeypatch):
    class Linear(Loopback):
        def kernels(self):
            return tuple(k for k in super().kernels() if k.op == "linear")

    monkeypatch.setenv("LOWBIT_BACKENDS", "moon")
    with installed_backends(Linear("moon")):
        _, out = run(capsys, "--format", "MXFP4")
    assert "embedding: no kernel  [MXFP4]" in out
    assert "not reference: LOWBIT_BACKENDS=moon leaves it out" in out


def having(monkeypatch, machine=None, **more):
    """Doctor finds lowbit-core and these alone, perhaps on another machine."""
    found = {"lowbit-core": "0.1.0"} | {name.replace("_", "-"): version for name, version in more.items()}
    monkeypatch.setattr(doctor, "versions", lambda: found)
    if machine:
        monkeypatch.setattr(doctor, "_machine", lambda: machine)


LINUX = {"python": "3.12", "torch": "2.11", "system": "Linux x86_64", "cpu": [], "gpu": []}
NO_GPU = {"lowbit-kernels-cuda": "needs an NVIDIA GPU that torch can use"}


@pytest.mark.parametrize(
    ("machine", "useless"),
    [
        (LINUX, NO_GPU),
        (LINUX | {"gpu": ["H100"]}, {}),
        (
            LINUX | {"system": "Darwin arm64"},
            NO_GPU | {"lowbit-kernels-x86": "needs Linux on x86-64; this is Darwin arm64"},
        ),
    ],
)
def test_what_is_missing_comes_with_its_pip_line(capsys, monkeypatch, machine, useless):
    having(monkeypatch, machine, lowbit_algos="0.1.3")
    code, out = run(capsys, "--device", "cpu")
    assert code == 0
    assert "not installed; Hugging Face checkpoints: lowbit quantize, eval, diff, ...: pip install lowbit-hf" in out
    told = json.loads(run(capsys, "--device", "cpu", "--json")[1])
    needed = {"lowbit-hf", "lowbit-kernels-cuda", "lowbit-kernels-x86", "lowbit-moe", "lowbit-pt2e"} - set(useless)
    assert told["missing"] == {name: f"pip install {name}" for name in needed}
    assert told["useless"] == useless
    for name, reason in useless.items():
        assert f"pip install {name}" not in out
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {name} "))
        assert line.endswith(f": {reason}")


def test_siblings_that_do_not_belong_together_are_a_problem(capsys, monkeypatch):
    having(monkeypatch, lowbit_hf="0.2.1", lowbit_moe="0.1.9", lowbit_moon="9.1")
    code, out = run(capsys)
    assert code == 1
    assert [line for line in out.splitlines() if line.startswith("problem")] == [
        "problem: lowbit-hf 0.2.1 beside lowbit-core 0.1.0, which it was not made for: pip install --upgrade lowbit-core lowbit-hf"
    ]
    assert "lowbit-moon            9.1" in out


def test_a_driver_without_a_torch_for_it_is_said(capsys, monkeypatch):
    having(monkeypatch, LINUX)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "can use, though nvidia-smi is here; is it a torch for CUDA?" in run(capsys, "--device", "cpu")[1]
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "GPU: none that torch can use\n" in run(capsys, "--device", "cpu")[1]
