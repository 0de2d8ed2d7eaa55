from __future__ import annotations

import shutil

import pytest
import torch

from lowbit.errors import CheckpointError, RecipeError
from lowbit_hf.lint import lint
from lowbit_hf.lint.gpus import capability_of

ALL = ("vllm", "transformers", "sglang")
ENGINES = ("vllm", "sglang")


def test_pickles_are_named(make, tmp_path):
    folder = tmp_path / "pickles"
    folder.mkdir()
    shutil.copy(make("llama") / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (found,) = lint(folder).findings
    assert (found.severity, found.key, found.runtimes) == ("error", "pytorch_model.bin", ALL)
    assert "save_pretrained" in found.fix
    shutil.copy(make("llama") / "model.safetensors", folder)
    (found,) = lint(folder).findings
    assert (found.severity, found.key, found.fix) == ("warning", "pytorch_model.bin", "delete it")


def test_damaged_files_are_named(make, change):
    folder = change(make("llama"))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    report = lint(folder)
    (found,) = report.findings
    assert (found.severity, found.key) == ("error", "model.safetensors")
    assert "truncated" in found.what
    assert not any(verdict.loads for verdict in report.verdicts)


def test_a_config_that_is_no_json_cannot_be_linted(make, change):
    folder = change(make("llama"))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not the JSON it should be"):
        lint(folder)


def test_unknown_gpus_are_refused(make):
    with pytest.raises(RecipeError, match="'h900' is no GPU known here"):
        lint(make("llama"), gpu="h900")
    assert (capability_of("sm90a"), capability_of("RTX 4090"), capability_of("l40s")) == (90, 89, 89)


MODULE = "model.layers.0.mlp.down_proj"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
INTEGERS = {"qweight": (torch.int32, (32, 128)), "qzeros": (torch.int32, (2, 16)), "scales": (torch.float16, (2, 128))}
TRANSPOSED = INTEGERS | {"qweight": (torch.int32, (256, 16))}
FLOATS = {"weight": (torch.float8_e4m3fn, (128, 256)), "weight_scale_inv": (torch.float32, (1, 2))}
EXPERTS = {"experts_blocks": (torch.uint8, (2, 8, 4, 16)), "experts_scales": (torch.uint8, (2, 8, 4))}

FOREIGN = {
    "gptq": (GPTQ, INTEGERS, None),
    "gptq in one group": (GPTQ | {"desc_act": True, "group_size": -1}, INTEGERS, None),
    "gptq by activation order": (GPTQ | {"desc_act": True}, INTEGERS, ("quantization_config.desc_act", ("vllm",))),
    "gptq of 3 bits": (
        GPTQ | {"bits": 3},
        INTEGERS | {"qweight": (torch.int32, (24, 128))},
        ("quantization_config.bits", ENGINES),
    ),
    "asymmetric gptq": (GPTQ | {"sym": False}, INTEGERS, ("quantization_config.sym", ENGINES)),
    "gptq without zeros": (GPTQ, {n: t for n, t in INTEGERS.items() if n != "qzeros"}, (f"{MODULE}.qzeros", ALL)),
    "awq": (AWQ, TRANSPOSED, None),
    "awq of 8 bits": (AWQ | {"bits": 8}, TRANSPOSED, ("quantization_config.bits", ALL)),
    "fp8": (FP8, FLOATS, None),
    "fp8 without scales": (FP8, {"weight": FLOATS["weight"]}, (f"{MODULE}.weight_scale_inv", ALL)),
    "fp8 in blocks, static": (
        FP8 | {"activation_scheme": "static"},
        FLOATS,
        ("quantization_config.activation_scheme", ENGINES),
    ),
    "modelopt": (MODELOPT, {}, ("quantization_config.quant_method", ("transformers",))),
    "mxfp4": ({"quant_method": "mxfp4"}, EXPERTS, None),
    "mxfp4 without scales": (
        {"quant_method": "mxfp4"},
        {"experts_blocks": EXPERTS["experts_blocks"]},
        (f"{MODULE}.experts_scales", ALL),
    ),
    "a method nobody loads": ({"quant_method": "magic"}, {}, ("quantization_config.quant_method", ALL)),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_methods(make, change, case):
    quantization, stored, expected = FOREIGN[case]

    def tensors(state):
        del state[f"{MODULE}.weight"]
        state |= {f"{MODULE}.{name}": torch.ones(shape).to(dtype) for name, (dtype, shape) in stored.items()}

    folder = change(make("llama"), tensors=tensors, config=lambda c: c.update(quantization_config=quantization))
    found = {finding.key: set() for finding in lint(folder).findings}
    for finding in lint(folder).findings:
        found[finding.key] |= set(finding.runtimes)
    assert found == ({} if expected is None else {expected[0]: set(expected[1])})


def test_groups_of_foreign_methods_on_several_gpus(make, change):
    def tensors(state):
        state |= {f"{MODULE}.{name}": torch.ones(shape).to(dtype) for name, (dtype, shape) in INTEGERS.items()}

    folder = change(make("llama"), tensors=tensors, config=lambda c: c.update(quantization_config=GPTQ))
    assert lint(folder, tp=2).findings == ()
    (found,) = lint(folder, tp=4).findings
    assert (found.key, found.runtimes) == (MODULE, ENGINES)
    assert "64 is no multiple of 128" in found.what


def test_modelopts_old_file(make, change):
    folder = change(make("llama"))
    (folder / "hf_quant_config.json").write_text("{}")
    (found,) = lint(folder).findings
    assert (found.severity, found.key) == ("warning", "hf_quant_config.json")
