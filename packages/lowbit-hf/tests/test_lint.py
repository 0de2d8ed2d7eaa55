from __future__ import annotations

import json

import pytest
import torch
from lint_edits import ALL, ENGINES, GROUP, Q, beside, drop, group_of

from lowbit.command import main
from lowbit_hf.lint import RUNTIMES, lint

# Good checkpoints, and who loads them.

GOOD = [
    ("llama", "W4A16", ALL),
    ("llama", "W8A16", ALL),
    ("llama", "W4A16_G32", ALL),
    ("llama", "W3A16_G32", ("vllm", "transformers")),
    ("llama", "W4A16_ASYM", ENGINES),
    ("llama", "W8A8", ALL),
    ("llama", "W8A8_ASYM", ALL),
    ("llama", "FP8_DYNAMIC", ALL),
    ("llama", "MXFP8", ("vllm", "transformers")),
    ("llama", "MXFP8A16", ("vllm", "transformers")),
    ("llama", "MXFP6A16", ("transformers",)),
    ("llama", "MXFP4", ("vllm", "transformers")),
    ("llama", "MXFP4XFP8", ("vllm", "transformers")),
    ("llama", "MXFP4A16", ("vllm", "transformers")),
    ("llama", "NVFP4A16", ALL),
    ("llama", "W4AFP8", ("vllm", "transformers")),
    ("llama", "W4A8", ("vllm", "transformers")),
    ("llama", "W4A4", ("vllm", "transformers")),
    ("qwen2", "W8A8", ALL),
    ("qwen2", "FP8_DYNAMIC", ALL),
    ("qwen3", "W4A16", ALL),
    ("qwen3", "NVFP4A16", ALL),
    ("bert", "W8A8", ALL),
    ("deepseek", "W8A8", ALL),
    ("deepseek", "W4A16_G32", ALL),
    ("qwen3-moe", "W4A16_G64", ALL),
    ("qwen3-moe", "FP8_DYNAMIC", ALL),
    ("qwen3-moe", "W8A8", ("vllm",)),
    ("qwen3-moe", "MXFP4A16", ("vllm", "transformers")),
    ("mixtral", "W4A16", ALL),
    ("mixtral", "NVFP4A16", ENGINES),
]


@pytest.mark.parametrize(("kind", "name", "runtimes"), GOOD, ids=[f"{kind}-{name}" for kind, name, _ in GOOD])
def test_good_checkpoints_are_good(good, kind, name, runtimes):
    folder = good(kind, name)
    assert lint(folder, runtimes).findings == ()
    refusing = [runtime for runtime in ALL if runtime not in runtimes]
    report = lint(folder, refusing) if refusing else None
    for runtime in refusing:
        keys = [finding.key for finding in report.findings if runtime in finding.runtimes]
        assert keys
        assert all(key.startswith(GROUP) for key in keys), keys


def test_blocks_are_good_where_rows_divide(good):
    assert lint(good("llama", "FP8_BLOCK", num_key_value_heads=4)).findings == ()


def test_mixed_schemes_are_good(good):
    assert lint(good("llama", "W8A8", [("*.mlp.*", "W4A16")])).findings == ()
    assert lint(good("qwen3-moe", "W8A8", [("*.experts.*", "W4A16_G64")])).findings == ()


def test_layers_left_alone_are_good(good):
    assert lint(good("llama", "W4A16", keep=("*.layers.0.*",))).findings == ()


def test_sharded_and_plain_checkpoints_are_good(make, good):
    assert lint(make("llama")).findings == ()
    assert lint(good("llama", "W4A16", shard="100KB")).findings == ()


def test_calibrated_schemes_are_good(good, change):
    scale = {"input_global_scale": torch.tensor([100.0])}

    def quantize_inputs(config):
        group = group_of(config)
        group["input_activations"] = group["weights"] | {"dynamic": "local"}

    folder = change(good("llama", "NVFP4A16"), tensors=beside("weight_packed", scale), config=quantize_inputs)
    assert lint(folder).findings == ()
    folder = change(folder, tensors=drop(f"{Q}.input_global_scale"))
    assert [finding.key for finding in lint(folder).findings] == [f"{Q}.input_global_scale"]


# The tables


def test_tables_say_where_they_come_from():
    assert tuple(RUNTIMES) == ALL
    for runtime in RUNTIMES.values():
        assert runtime.version
        assert runtime.source
        for row in runtime.rows:
            assert row.formats
            assert row.parts
            assert bool(row.refusal) == bool(row.fix), row.name
            assert row.refusal or row.kernel, row.name
            assert bool(row.native) == bool(row.fallback), row.name


# The command


@pytest.fixture
def lowbit(capsys):
    def called(*arguments):
        capsys.readouterr()
        code = main(["lint", *map(str, arguments)])
        return code, *capsys.readouterr()

    return called


def test_the_command_tells_what_loads_and_where(lowbit, good):
    code, out, err = lowbit(good("llama", "W4AFP8"), "--runtime", "vllm", "--tp", "1")
    assert (code, err) == (0, "")
    head, line = out.splitlines()
    assert head.split() == ["runtime", "loads", "schemes"]
    assert line.split(maxsplit=3) == ["vllm", "0.33", "yes", "W4AFP8 on sm90 only (CUTLASS w4a8)"]


def test_the_command_tells_what_is_wrong(lowbit, good):
    code, out, _ = lowbit(good("llama", "W4AFP8"), "--runtime", "vllm", "--gpu", "b200")
    assert code == 1
    assert f"error: {GROUP} [vllm on b200]" in out
    assert "  W4AFP8 needs sm90 only; b200 is sm100" in out
    assert "  fix: serve on another GPU" in out


def test_the_command_gives_json(lowbit, good):
    code, out, _ = lowbit(good("llama", "MXFP6A16"), "--json")
    report = json.loads(out)
    assert code == 1
    assert {tuple(finding["runtimes"]) for finding in report["findings"]} == {("vllm",), ("sglang",)}
    assert [verdict["loads"] for verdict in report["verdicts"]] == [False, True, False]


@pytest.mark.parametrize(
    ("option", "value", "words"), [("--runtime", "tgi", "'tgi' is not one of"), ("--gpu", "h900", "'h900' is no GPU")]
)
def test_wrong_use(lowbit, good, option, value, words):
    code, out, err = lowbit(good("llama", "W4A16"), option, value)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
