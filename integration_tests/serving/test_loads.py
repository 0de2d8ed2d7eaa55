"""Every scheme in a real vLLM: it serves it by itself, with the plugin, or refuses it; what it serves agrees with ours.

With LOWBIT_INTEROP set, what came of it goes into docs/interop/vllm.json, from which docs/interop.md is made.
"""

from __future__ import annotations

import json
import os
import subprocess
from math import fsum
from pathlib import Path

import pytest
import torch
from agreement import bounds, compare, errors, greedy, usual_preference
from interop_table import VLLM, plainly
from test_serving import exact_model, machine

from lowbit_algos import Method
from lowbit_hf import load
from lowbit_hf.quantize import prepare, run
from lowbit_hf.schemes import SCHEMES, scheme
from lowbit_hf.texts import Calibration

pytestmark = pytest.mark.slow

NAMES = [*(name for name, each in SCHEMES.items() if each.refusal is None), "W4A16_G32", "W8A16_G32"]
PROMPTS, LENGTH = 4, 24
LOADS = Path(__file__).parent / "loads.py"


@pytest.fixture(scope="module")
def prompts(models):
    return Calibration((models / "calibration.txt",), PROMPTS, LENGTH).windows(models / "lm-tiny")


@pytest.mark.parametrize(("model", "kind"), [("lm-tiny", "dense"), ("moe-tiny", "experts")])
def test_every_scheme(vllm, models, prompts, tmp_path, model, kind):
    data = Calibration((models / "calibration.txt",), 16, 64)
    for name in NAMES:
        more = {"calibration": data, "method": Method.of("rtn")} if scheme(name).needs_data else {}
        run(prepare(models / model, scheme(name), mode="even", **more), tmp_path / name)
    alone = answers(vllm, prompts, [tmp_path / name for name in NAMES], plugin=False)
    refused = [name for name in NAMES if "error" in alone[name]]
    plugged = answers(vllm, prompts, [tmp_path / name for name in refused], plugin=True)
    rows = {}
    for name in NAMES:
        rows[name] = {"vllm": judged(tmp_path / name, prompts, alone[name])}
        if name in refused:
            rows[name]["plugin"] = judged(tmp_path / name, prompts, plugged[name])
    if os.environ.get("LOWBIT_INTEROP"):
        told = json.loads(VLLM.read_text()) if VLLM.exists() else {"rows": {}}
        told["machine"] = machine(vllm)
        told["versions"] = {"vLLM": told["machine"]["vllm"]}
        told["rows"][kind] = rows
        VLLM.write_text(json.dumps(told, indent=1) + "\n")
    marks = {(name, column): cell["mark"] for name, row in rows.items() for column, cell in row.items()}
    assert "serves" in marks.values()
    assert [where for where, mark in marks.items() if mark == "apart"] == []


def test_scales_for_a_cache(vllm, models, prompts, tmp_path):
    data, caches = Calibration((models / "calibration.txt",), 16, 64), ("fp8", "fp8-head")
    for cache in caches:
        job = prepare(models / "lm-tiny", scheme("W8A8"), mode="even", calibration=data, kv_cache=cache)
        run(job, tmp_path / cache)
    told = answers(vllm, prompts, [tmp_path / cache for cache in caches], plugin=False)
    assert [judged(tmp_path / cache, prompts, told[cache])["mark"] for cache in caches] == ["serves", "serves"]


def answers(vllm, prompts, folders, *, plugin):
    """What vLLM makes of each folder, by its name."""
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_INT4_W4A8": "0",  # or it rounds inputs that the checkpoint says to leave
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process for all
        "PATH": f"{vllm.parent}{os.pathsep}{os.environ['PATH']}",
    }
    if not plugin:
        env["VLLM_PLUGINS"] = ""
    told = {}
    # What kills the process takes the rest of its folders along, so those are tried again without it.
    while left := [folder for folder in folders if folder.name not in told]:
        ran = subprocess.run(
            [vllm, LOADS, json.dumps(prompts.tolist()), *left], env=env, capture_output=True, text=True, check=False
        )
        lines = [line.removeprefix("told ") for line in ran.stdout.splitlines() if line.startswith("told ")]
        told |= {Path(each["folder"]).name: each for each in map(json.loads, lines)}
        left = [folder for folder in folders if folder.name not in told]
        if left:
            told[left[0].name] = {"error": f"the process ends with {ran.returncode}: {ran.stderr[-200:]}"}
    return told


def judged(folder, prompts, told):
    """A cell: whether it serves, and how far its answers are from ours."""
    if "error" in told:
        return {"mark": "refused", "why": plainly(told["error"])}
    model = load(folder)
    ours = greedy(model, prompts)
    error = errors(exact_model(folder), prompts, ours)
    bound = bounds(error, error)
    pairs = zip(ours.tokens, ours.logs, told["tokens"], told["logs"], strict=True)
    agreements = [compare(*pair) for pair in pairs]
    apart = [each for agreement in agreements for each in agreement.apart] or [0.0]
    gaps = [agreement.gap for agreement in agreements]
    for i, agreement in enumerate(agreements):
        if agreement.gap > bound.gap:
            ids = torch.cat([prompts[i], ours.tokens[i][: agreement.common]])
            gaps[i] = usual_preference(
                model, ids, ours.tokens[i][agreement.common], told["tokens"][i][agreement.common]
            )
    told = {
        "gap": max(gaps),
        "gap_bound": bound.gap,
        "apart": (fsum(each**2 for each in apart) / len(apart)) ** 0.5,
        "apart_bound": bound.apart,
        "tokens_before_a_difference": sum(agreement.common for agreement in agreements),
        "tokens": ours.tokens.numel(),
    }
    if told["gap"] <= bound.gap and told["apart"] <= bound.apart:
        return {"mark": "serves", **told}
    return {"mark": "apart", "why": "its answers are further from lowbit's than rounding explains", **told}
