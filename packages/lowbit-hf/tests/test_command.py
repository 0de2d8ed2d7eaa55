from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import load_file

from lowbit_hf.schemes import SCHEMES, scheme

NAMES = ["quantize", "plan", "eval", "compare", "inspect", "diff", "schemes", "synthesize"]
NAMES += ["export", "dequantize", "lint", "verify", "release"]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def lowbit(command):
    return command


@pytest.fixture(scope="session")
def folder(worded):
    """A model with a tokenizer of its 96 words."""
    return worded()


@pytest.fixture(scope="session")
def text(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    ids = torch.randint(96, (400,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(f"w{i}" for i in ids.tolist()))
    return path


# Help and wrong use


def test_every_subcommand_is_there():
    found = {point.name: point.value for point in entry_points(group="lowbit.commands")}
    assert {name for name, value in found.items() if value.startswith("lowbit_hf.commands.")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help_has_an_example_that_parses(lowbit, name):
    code, out, err = lowbit(name, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: lowbit {name}" in out
    example = re.search(r"example: (lowbit .*)", " ".join(out.split()))[1]
    program, given, *arguments = shlex.split(example)
    assert (program, given) == ("lowbit", name)
    options = re.findall(r"(?<!\S)(-\w|--[\w-]+)", out)
    assert all(argument in options for argument in arguments if argument.startswith("-"))
    for wanted in [] if name == "schemes" else ["MODEL"] if name != "diff" else ["A", "B"]:
        assert wanted in out
    # A release tells in files.
    assert ("--json" in out) == (name != "release")


def test_the_list_of_commands_says_what_each_does(lowbit):
    code, out, _ = lowbit("--help")
    assert code == 0
    for name in NAMES:
        assert re.search(rf"^  {name} +[A-Z].*\.$", out, re.MULTILINE)


WRONG = {
    "no such command": (["quantise"], "there is no command 'quantise'"),
    "no model": (["plan", "--to", "W8A8"], "Missing argument 'MODEL'"),
    "no scheme": (["plan", "MODEL"], "Missing option '--to'"),
    "unknown scheme": (["plan", "MODEL", "--to", "W4A17"], "no scheme is named 'W4A17'; did you mean W4A16"),
    "scheme that cannot be written": (["plan", "MODEL", "--to", "W4AFP8_G64"], "groups of 128 only"),
    "rule without a scheme": (["plan", "MODEL", "--to", "W8A8", "--rule", "*.up_proj"], "must be GLOB=SCHEME"),
    "rule without a glob": (["plan", "MODEL", "--to", "W8A8", "--rule", "=W8A8"], "must be GLOB=SCHEME"),
    "rule of an unknown scheme": (["plan", "MODEL", "--to", "W8A8", "--rule", "*=W9"], "no scheme is named 'W9'"),
    "unknown option": (["inspect", "MODEL", "--jason"], "No such option"),
    "unknown mode": (["quantize", "MODEL", "--to", "MXFP8", "-o", "x", "--scale-mode", "up"], "'up' is not one of"),
    "unknown device": (["plan", "MODEL", "--to", "W8A8", "--device", "tpu"], "'tpu' is neither cpu nor cuda"),
    "no output": (["quantize", "MODEL", "--to", "W8A8"], "needed is a folder to write to"),
    "tokens": (["eval", "MODEL", "--tokens", "1"], "greater than or equal to 2"),
    "one folder to compare": (["diff", "MODEL"], "Missing argument 'B'"),
    "scheme to compare": (["compare", "MODEL", "--to", "W4A17"], "no scheme is named 'W4A17'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_leaves_with_2(lowbit, folder, case):
    arguments, words = WRONG[case]
    code, out, err = lowbit(*[str(folder) if each == "MODEL" else each for each in arguments])
    assert code == 2
    assert out == ""
    assert words in " ".join(err.split())


def test_fused_projections_in_several_schemes_are_warned_of(lowbit, folder):
    attention = [f"model.layers.{{0..1}}.self_attn.{projection}_proj.weight" for projection in "qkv"]
    second = [f"model.layers.1.mlp.{projection}_proj.weight" for projection in ("gate", "up")]
    for more, names in (
        (["--rule", "*.k_proj=W4A16"], attention),
        (["--keep", "*.layers.1.mlp.up_proj*"], second),
    ):
        _, _, err = lowbit("plan", folder, "--to", "W8A16", *more)
        assert err.partition("refuse several schemes in it: ")[2].strip() == ", ".join(names)
    for more in ([], ["--rule", "*.o_proj=W4A16"], ["--keep", "*.mlp.gate_proj*", "--keep", "*.mlp.up_proj*"]):
        assert lowbit("plan", folder, "--to", "W8A16", *more)[2] == ""


PROBLEMS = {
    "no such model": (["plan", "./nothing", "--to", "W8A8"], "there is no folder ./nothing"),
    "a rule that matches nothing": (
        ["plan", "MODEL", "--to", "W8A8", "--rule", "nix=W8A8"],
        "'nix' matches no parameter",
    ),
    "coverage": (["plan", "MODEL", "--to", "W8A8", "--min-coverage", "0.999"], "below the 99.90% asked for"),
    "a text that is none": (["eval", "MODEL", "--text", "nothing.txt"], "nothing.txt cannot be read"),
    "nothing to compare with": (["diff", "MODEL", "nothing"], "there is no folder nothing"),
    "an output in the way": (
        ["compare", "MODEL", "--to", "W8A8", "--tokens", "40", "-o", "/dev/null/x"],
        "cannot make the folder",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_leave_with_1(lowbit, folder, text, case):
    arguments, words = PROBLEMS[case]
    more = ["--text", text] if arguments[0] == "compare" else []
    code, out, err = lowbit(*[str(folder) if each == "MODEL" else each for each in arguments], *more)
    assert (code, out) == (1, "")
    assert err.startswith(f"lowbit {arguments[0]}: ")
    assert words in err
    assert "Traceback" not in err


def test_no_cuda(lowbit, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = lowbit("plan", folder, "--to", "W8A8", "--device", "cuda")
    assert code == 2
    assert "torch finds no CUDA device" in " ".join(err.split())


# quantize and plan


def test_quantize(lowbit, folder, tmp_path):
    out = tmp_path / "out"
    code, said, err = lowbit("quantize", folder, "--to", "w4a16_g32", "-o", out)
    assert (code, err) == (0, "")
    stored = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    plain = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    assert said.startswith(
        f"{out}: 14 of 20 tensors, {2 * 294912 / plain:.1%} of the bytes, are low-bit, {BITS:.4g} bits per weight; "
        f"{kib(plain)} -> {kib(stored)}\n"
    )
    assert "nothing lost: 14 tensors quantized, 6 carried bit for bit, 3 other files carried" in said
    assert f"next: lowbit eval {out} --against {folder}" in said


# int4, a bfloat16 scale for every 32, and the shape (two int64) of 14 matrices of 294912 weights in all.
BITS = 4 + 16 / 32 + 14 * 128 / 294912


def kib(count):
    return f"{count / 1024:.4g} KiB"


def test_quantize_json(lowbit, folder, tmp_path):
    code, said, _ = lowbit("quantize", folder, "--to", "W4A16_G32", "-o", tmp_path / "out", "--json")
    found = json.loads(said)
    assert code == 0
    assert found["out"] == str(tmp_path / "out")
    assert found["bytes_before"] == sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    written = load_file(tmp_path / "out/model.safetensors")
    assert found["bytes_after"] == sum(t.nbytes for t in written.values())
    assert {name for names in found["tensors"].values() for name in names} == set(written)
    assert (found["quantized"], found["unowned"], found["left_behind"]) == (14, [], [])
    assert found["files"] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert found["bits_per_weight"] == pytest.approx(BITS)


def test_options_reach_the_job(lowbit, folder, tmp_path, change):
    def spoil(state):
        state[f"{Q}.weight"][0, 0] = torch.nan

    spoiled, out = change(folder, tensors=spoil), tmp_path / "out"
    options = ["--rule", "*.down_proj=W8A8", "--rule", "*.up_proj=MXFP8", "--keep", "*.v_proj", "--scale-mode", "floor"]
    line = ["quantize", spoiled, "--to", "MXFP4A16", "-o", out, *options]
    code, _, err = lowbit(*line)
    assert code == 1
    assert f"'{Q}.weight' holds NaN" in err
    assert lowbit(*line, "--allow-nonfinite")[0] == 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    groups = {group["format"]: group["targets"] for group in config["config_groups"].values()}
    assert groups == {
        "mxfp4-pack-quantized": ["Linear"],
        "int-quantized": [f"model.layers.{n}.mlp.down_proj" for n in range(2)],
        "mxfp8-quantized": [f"model.layers.{n}.mlp.up_proj" for n in range(2)],
    }
    kept = [f"model.layers.{n}.self_attn.v_proj" for n in range(2)]
    assert config["ignore"] == sorted([*kept, Q, "lm_head"])
    code, _, err = lowbit(*line, "--allow-nonfinite")
    assert code == 1
    assert "--overwrite" in err
    floor = (out / "model.safetensors").read_bytes()
    assert lowbit(*line[:-1], "even", "--allow-nonfinite", "--overwrite")[0] == 0
    assert (out / "model.safetensors").read_bytes() != floor


def test_what_is_said_of_the_rest(lowbit, folder, tmp_path, change):
    extra = {f"mtp.{n}.weight": torch.ones(4, 4) for n in range(3)}
    other = change(folder, tensors=lambda s: s.update(extra))
    (other / "pytorch_model.bin").write_bytes(b"")
    _, said, _ = lowbit("quantize", other, "--to", "W8A8", "-o", tmp_path / "out")
    assert "not part of the model, carried: mtp.{0..2}.weight" in said
    assert "left behind, of the original alone: pytorch_model.bin" in said


@pytest.mark.parametrize("name", ["plan", "quantize"])
def test_plan(lowbit, folder, tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ["--dry-run"] if name == "quantize" else []
    code, said, err = lowbit(name, folder, "--to", "W4A16_G32", "--keep", Q, *more)
    assert code == 0
    assert re.fullmatch(r"warning: .* refuse several schemes in it: [^\n]*q_proj[^\n]*\n", err)
    assert "13 of 20 parameters become low-bit" in said
    assert re.search(rf"{Q}.weight +32 KiB +kept by rule '{Q}'", said)
    assert ".linear" in said  # the kernel, whichever it is here
    assert max(map(len, said.splitlines())) < 250
    code, said, _ = lowbit(name, folder, "--to", "W4A16_G32", "--keep", Q, "--json", *more)
    found = json.loads(said)
    rows = {row["name"]: row for row in found["parameters"]}
    plain = load_file(folder / "model.safetensors")
    assert {n: (tuple(row["shape"]), row["dtype"], row["bytes_before"]) for n, row in rows.items()} == {
        n: (tuple(t.shape), "bfloat16", t.nbytes) for n, t in plain.items()
    }
    assert found["bytes_before"] == sum(t.nbytes for t in plain.values())
    assert not list(tmp_path.iterdir())  # nothing was made
    lowbit("quantize", folder, "--to", "W4A16_G32", "--keep", Q, "-o", tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    for tensor, row in rows.items():
        parts = [t.nbytes for n, t in written.items() if n == tensor or n.startswith(f"{tensor}_")]
        # A plan knows formats, not file layouts, which keep the shape (two int64) beside packed codes.
        assert row["bytes_after"] == sum(parts) - (16 if row["action"] == "quantize" else 0)


def test_memory_is_told_before_and_after(lowbit, folder, text, tmp_path):
    line = ["quantize", folder, "--to", "W4A16_G32", "--algorithm", "gptq", "--calibrate", text, "--samples", 4]
    line += ["--seq-len", 16, "--device", "cpu", "--max-memory", "64GiB"]
    code, said, _ = lowbit(*line, "--dry-run")
    assert code == 0
    assert re.search(r"\n\ntakes at most [\d.]+ [MG]iB of memory \(64 GiB allowed\), with 4096 tokens at once\n$", said)
    planned = json.loads(lowbit(*line, "--dry-run", "--json")[1])["planned_memory"]
    assert planned["host"] > 1 << 28
    assert planned["gpu"] == 0
    _, said, _ = lowbit(*line, "-o", tmp_path / "out")
    assert re.search(r"\nmemory: [\d.]+ [MG]iB at most, [\d.]+ [MG]iB planned, 64 GiB allowed\n", said)
    found = json.loads(lowbit(*line, "--json", "-o", tmp_path / "again")[1])["memory"]
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert found["host"] == {
        "peak": report["peak_memory"],
        "planned": report["planned_memory"],
        "allowed": 64 << 30,
    }
    assert found["gpu"] == {"peak": None, "planned": None, "allowed": None}


def test_a_bound_that_cannot_be_kept_is_refused(lowbit, folder, text, tmp_path):
    line = ["quantize", folder, "--to", "W4A16_G32", "--device", "cpu", "-o", tmp_path / "out"]
    code, _, err = lowbit(*line, "--max-gpu", "4GiB")
    assert code == 2
    assert "bounds a GPU's memory, and this run computes on cpu" in re.sub(r"\s+", " ", err)
    code, _, err = lowbit(*line, "--max-gpu", "four")
    assert code == 2
    for more in ([], ["--algorithm", "gptq", "--calibrate", text, "--samples", 4, "--seq-len", 16]):
        code, said, err = lowbit(*line, *more, "--max-memory", "1MiB", "--dry-run")
        assert (code, said) == (1, "")
        assert re.search(r"needs .*iB of memory, of which the program itself holds .*, and may take 1 MiB", err)
    assert not list(tmp_path.iterdir())


# eval and compare


def test_eval(lowbit, folder, text, tmp_path):
    lowbit("quantize", folder, "--to", "W4A16_G32", "-o", tmp_path / "out")
    code, said, err = lowbit("eval", tmp_path / "out", "--against", folder, "--text", text)
    assert (code, err) == (0, "")
    perplexity, kl, top1 = re.fullmatch(
        rf"perplexity ([\d.]+) over 372 tokens\nagainst {folder}: mean KL ([\d.]+) nats a token, "
        r"top-1 agreement ([\d.]+)%\n",
        said,
    ).groups()  # 12 windows of 32 tokens, 31 predicted in each
    code, said, _ = lowbit("eval", tmp_path / "out", "--against", folder, "--text", text, "--json")
    found = json.loads(said)
    assert (f"{found['perplexity']:.4f}", f"{found['kl']:.5f}", f"{found['top1'] * 100:.2f}") == (perplexity, kl, top1)
    assert (found["model"], found["against"], found["tokens"]) == (str(tmp_path / "out"), str(folder), 372)
    code, said, _ = lowbit("eval", folder, "--text", text, "--tokens", "70", "--json")
    found = json.loads(said)
    assert (found["tokens"], found["kl"], found["top1"], found["against"]) == (62, None, None, None)


def test_a_broken_model_is_a_problem(lowbit, folder, text, change):
    broken = change(folder, tensors=lambda s: s["model.norm.weight"].fill_(torch.nan))
    assert lowbit("eval", broken, "--text", text)[:2] == (1, "perplexity nan over 372 tokens\n")
    code, said, _ = lowbit("eval", broken, "--text", text, "--json")
    assert code == 1
    assert json.loads(said, parse_constant=pytest.fail)["perplexity"] is None


def test_compare(lowbit, folder, text, tmp_path):
    line = ["compare", folder, "--to", "W8A8", "--to", "w4a16_g32", "--to", "W8A8", "--text", text]
    code, said, err = lowbit(*line, "-o", tmp_path / "made")
    assert (code, err) == (0, "")
    head, *rows = said.splitlines()
    assert re.split(r"  +", head) == ["scheme", "bits per weight", "size", "perplexity", "KL", "top-1"]
    assert [row.split()[0] for row in rows] == ["bfloat16", "W8A8", "W4A16_G32"]
    code, said, _ = lowbit(*line, "--json")
    results = json.loads(said)["results"]
    for row, result in zip(rows, results, strict=True):
        assert f"{result['perplexity']:.3f}" in row
    for name, result in zip(["W8A8", "W4A16_G32"], results[1:], strict=True):
        code, said, _ = lowbit("eval", tmp_path / "made" / name, "--against", folder, "--text", text, "--json")
        found = json.loads(said)
        assert {key: found[key] for key in ("tokens", "perplexity", "kl", "top1")} == {
            key: result[key] for key in ("tokens", "perplexity", "kl", "top1")
        }
        stored = load_file(tmp_path / "made" / name / "model.safetensors").values()
        assert result["bytes"] == sum(t.nbytes for t in stored)
        plain = load_file(folder / "model.safetensors").values()
        assert results[0]["bytes"] == sum(t.nbytes for t in plain)
    assert lowbit(*line, "-o", tmp_path / "made")[0] == 1  # they exist


# inspect, diff and schemes


def test_inspect(lowbit, folder, tmp_path):
    lowbit("quantize", folder, "--to", "W4A16_G32", "-o", tmp_path / "out")
    code, said, err = lowbit("inspect", tmp_path / "out", "--json")
    rows, written = json.loads(said), load_file(tmp_path / "out/model.safetensors")
    plain = load_file(folder / "model.safetensors")
    assert (code, err) == (0, "")
    assert {row["name"]: tuple(row["shape"]) for row in rows} == {name: tuple(t.shape) for name, t in plain.items()}
    for row in rows:
        parts = [t for n, t in written.items() if n == row["name"] or n.startswith(f"{row['name']}_")]
        assert row["bytes"] == sum(t.nbytes for t in parts)
        assert row["stored"] == ("bfloat16" if len(parts) == 1 else str(scheme("W4A16_G32").weight))
    code, said, _ = lowbit("inspect", tmp_path / "out")
    assert re.search(r"model.layers.\{0..1\}.self_attn.q_proj.weight +128x128 +int4:1x32:bfloat16 +18.03 KiB", said)
    assert said.endswith(f"20 tensors, {kib(sum(t.nbytes for t in written.values()))}\n")


def test_diff(lowbit, folder, tmp_path, change):
    out = tmp_path / "out"
    lowbit("quantize", folder, "--to", "W4A16_G32", "-o", out)
    code, said, err = lowbit("diff", folder, out)
    assert (code, err) == (0, "")
    assert said.endswith("14 tensors differ, 6 are equal\n")
    shown = [float(row.split()[3]) for row in said.splitlines()[1:15]]
    assert shown == sorted(shown)
    code, said, _ = lowbit("diff", folder, out, "--json")
    found = json.loads(said, parse_constant=pytest.fail)
    assert sorted(f"{row['sqnr']:.2f}" for row in found["tensors"] if row["sqnr"] is not None) == sorted(
        f"{x:.2f}" for x in shown
    )
    assert (len(found["tensors"]), found["only_a"], found["only_b"]) == (20, [], [])
    assert lowbit("diff", folder, folder)[:2] == (0, "\n0 tensors differ, 20 are equal\n")


def test_diff_of_what_is_lost(lowbit, folder, change):
    fewer = change(folder, tensors=lambda s: s.pop(f"{Q}.weight"))
    code, said, _ = lowbit("diff", folder, fewer)
    assert code == 1
    assert f"only in A: {Q}.weight" in said
    code, said, _ = lowbit("diff", fewer, folder, "--json")
    assert code == 1
    assert json.loads(said)["only_b"] == [f"{Q}.weight"]


def test_diff_shows_nan_first(lowbit, folder, change):
    def spoil(state):
        state["model.norm.weight"][0] = torch.nan
        state[f"{Q}.weight"] *= 2

    code, said, _ = lowbit("diff", folder, other := change(folder, tensors=spoil))
    assert code == 0
    assert said.splitlines()[1].split() == ["model.norm.weight", "bfloat16", "bfloat16", "nan", "nan"]
    assert said.endswith("2 tensors differ, 18 are equal\n")
    rows = json.loads(lowbit("diff", folder, other, "--json")[1], parse_constant=pytest.fail)["tensors"]
    assert {row["name"]: row["largest"] for row in rows}["model.norm.weight"] is None


def test_schemes(lowbit):
    code, said, err = lowbit("schemes")
    assert (code, err) == (0, "")
    assert all(re.search(rf"^{name} ", said, re.MULTILINE) for name in SCHEMES)
    assert "other names: INT8 = W8A8" in said
    rows = {row["scheme"]: row for row in json.loads(lowbit("schemes", "--json")[1])}
    assert set(rows) == set(SCHEMES)
    for name, row in rows.items():
        assert (row["calibration"] == "needed") == (name in {"FP8", "NVFP4", "W8A8_STATIC", "W8A8_STATIC_ASYM"})


# Interruption


def test_ctrl_c_says_how_to_go_on(lowbit, folder, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit_hf.writing._write_weight", interrupt)
    code, said, err = lowbit("quantize", folder, "--to", "W8A8", "-o", tmp_path / "out")
    assert code == 130
    assert said == ""
    assert "the same command continues where this one stopped" in err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert lowbit("quantize", folder, "--to", "W8A8", "-o", tmp_path / "out")[0] == 0
