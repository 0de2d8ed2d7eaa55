"""Calibrated runs from disk to disk: the same weights as in memory, for many architectures, however often killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from lowbit import QuantizedTensor, Recipe, Rule
from lowbit.command import main
from lowbit.errors import CheckpointError, LowbitError, RecipeError
from lowbit.report import Report
from lowbit_algos import Method, calibrate_
from lowbit_algos.blocks import capture, find_blocks
from lowbit_algos.folds import find_folds
from lowbit_algos.gptq import Options
from lowbit_hf import calibrated
from lowbit_hf.commands.quantizing import quantize
from lowbit_hf.loading import load
from lowbit_hf.quantize import foresee, prepare, run
from lowbit_hf.schemes import scheme
from lowbit_hf.texts import Calibration

EVERY = ["llama", "qwen2", "qwen3", "mixtral", "qwen3-moe", "gpt2", "bert"]


@dataclass(frozen=True)
class Windows:
    """Calibration tokens for models that have no tokenizer."""

    samples: int = 16
    length = 32

    def windows(self, folder):
        return torch.randint(2, 96, (self.samples, 32), generator=torch.Generator().manual_seed(5))

    def fingerprint(self):
        return f"windows {self.samples}"

    def described(self):
        return {"samples": self.samples}


def job_of(folder, name="W4A16_G32", method=None, **options):
    return prepare(folder, scheme(name), mode="even", calibration=Windows(), method=method or Method(), **options)


def tree(folder):
    """All files but the report, which tells how long things took."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.stem != "report"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def quantized(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def same(a, b):
    return float((a.dequantize() == b.dequantize()).float().mean())


@pytest.mark.parametrize("kind", EVERY)
def test_from_disk_as_in_memory(make, tmp_path, kind):
    folder = make(kind, num_hidden_layers=3) if kind != "gpt2" else make(kind, n_layer=3)
    job = job_of(folder)
    run(job, tmp_path / "out")
    streamed = quantized(load(tmp_path / "out"))
    model = load(folder)
    targets = dict(streamed)
    recipe = Recipe(tuple(Rule.of(name, "INT4_G32", k_axis=0 if kind == "gpt2" else -1) for name in targets))
    batches = [
        {"input_ids": w} | ({} if kind == "bert" else {"use_cache": False})
        for w in Windows().windows(folder).split(128)
    ]
    calibrate_(model, recipe, batches)
    assert set(quantized(model)) == set(targets)
    assert len(targets) >= 3 * 4
    for name, weight in quantized(model).items():
        assert same(weight, streamed[name]) == 1, name


EVERYTHING = replace(Method.of("rotation+smoothquant+gptq+learned", pre_scale=False), learned=3)


DISTILLED = replace(EVERYTHING, learned=0, distilled=2)


@pytest.mark.parametrize(
    ("kind", "tied", "method"),
    [("llama", True, DISTILLED), ("qwen3-moe", False, EVERYTHING)]
    + [
        pytest.param(kind, tied, method, marks=pytest.mark.slow)
        for kind, tied, method in (
            ("llama", False, EVERYTHING),
            ("llama", True, EVERYTHING),
            ("qwen3-moe", False, DISTILLED),
            ("qwen3", True, EVERYTHING),
            ("qwen3", False, EVERYTHING),
            ("qwen3-moe", True, EVERYTHING),
        )
    ],
)
def test_rotated_and_learned_from_disk_as_in_memory(make, tmp_path, kind, tied, method):
    folder = make(kind, num_hidden_layers=2, tie_word_embeddings=tied)
    account = run(job_of(folder, "MXFP4", method), tmp_path / "out")
    streamed = load(tmp_path / "out")
    assert not streamed.config.tie_word_embeddings
    model = load(folder)
    wanted = tuple(Rule(key, scheme("MXFP4").weight, scheme("MXFP4").activation) for key in quantized(streamed))
    batches = [{"input_ids": Windows().windows(folder), "use_cache": False}]
    calibrate_(model, Recipe(wanted), batches, method)
    assert not model.config.tie_word_embeddings
    theirs = dict(streamed.named_parameters())
    for key, weight in model.named_parameters():
        assert (
            same(weight, theirs[key]) == 1 if isinstance(weight, QuantizedTensor) else torch.equal(weight, theirs[key])
        ), key
    plain = {key for key in account.tensors if key not in job_of(folder, "MXFP4").schemes}
    kept = {key for key in plain if "mlp.gate.weight" not in key and "q_norm" not in key and "k_norm" not in key}
    assert kept <= set(account.changed) <= plain
    assert ("lm_head.weight" in account.tensors["model.embed_tokens.weight"]) == tied


def test_distillation_is_planned_and_told(make, tmp_path):
    folder, method = make("llama"), Method(distilled=2)
    plain, more = (foresee(job_of(folder, method=each), "cpu").planned.host for each in (Method(), method))
    assert more > plain
    run(job_of(folder, method=method), tmp_path / "out")
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert all("nats a token on held out text" in layer.notes[-1] for layer in report.layers)
    assert {block.name for block in report.blocks} == {"model.layers.0", "model.layers.1"}


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_model_that_cannot_be_rotated_is_refused_before_anything_is_written(make, tmp_path, kind):
    with pytest.raises(LowbitError, match=r"rotation needs a model that has an embedding .* outside its blocks"):
        run(job_of(make(kind), method=Method.of("rotation+gptq")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tied_embedding_that_is_rotated_stays_plain(make):
    with pytest.raises(RecipeError, match=r"is the output head too.*--keep"):
        job_of(
            make("llama", tie_word_embeddings=True),
            method=Method.of("rotation+gptq"),
            rules=[("model.embed_tokens.weight", scheme("W8A8"))],
        )


def test_a_head_that_is_rotated_is_rounded_after(make, tmp_path):
    folder = make("llama", tie_word_embeddings=False)
    rules = [("lm_head.weight", scheme("W8A16"))]
    run(job_of(folder, method=Method.of("rotation+gptq"), rules=rules), tmp_path / "head")
    run(job_of(folder, method=Method.of("rotation+gptq")), tmp_path / "plain")
    low, plain = (load(tmp_path / name).lm_head.weight for name in ("head", "plain"))
    assert float((low.dequantize() - plain).norm() / plain.norm()) < 0.01


STATIC = ["W8A8_STATIC", "W8A8_STATIC_ASYM", "FP8", "NVFP4"]


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("name", STATIC)
def test_static_activations_are_written_and_read_back(make, tmp_path, kind, name):
    folder, entry = make(kind), scheme(name)
    run(job_of(folder, name, Method(rounding="nearest")), tmp_path / "out")
    model = load(folder)
    streamed = quantized(load(tmp_path / "out"))
    wanted = tuple(Rule(key, entry.weight_format(torch.bfloat16), entry.activation) for key in streamed)
    calibrate_(
        model,
        Recipe(wanted),
        [{"input_ids": Windows().windows(folder), "use_cache": False}],
        Method(rounding="nearest"),
    )
    for key, weight in quantized(model).items():
        read = streamed[key]
        assert read.activation == weight.activation == entry.activation
        assert same(weight, read) == 1
        for part in ("act_scale", "act_zero"):
            ours, theirs = getattr(weight, part), getattr(read, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours.flatten(), theirs.flatten()), (key, part)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    local = {"NVFP4": "input_global_scale"}.get(name, "input_scale")
    found = {key for key in stored if key.endswith(local)}
    assert len(found) == len(job_of(folder, name).schemes)
    assert ("input_zero_point" in {key.rpartition(".")[2] for key in stored}) == (name == "W8A8_STATIC_ASYM")
    ids = torch.randint(2, 96, (2, 16))
    a, b = model(ids).logits, load(tmp_path / "out")(ids).logits
    torch.testing.assert_close(a, b)


def test_without_data_such_schemes_are_refused_with_what_to_use_instead(make, tmp_path):
    for name, other in {"FP8": "FP8_DYNAMIC", "NVFP4": "NVFP4A16", "W8A8_STATIC": "W8A8"}.items():
        with pytest.raises(RecipeError, match=rf"scheme {name} of .* give a text by --calibrate FILE, or use {other}$"):
            run(prepare(make(), scheme(name), mode="even"), tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_an_input_outside_the_blocks_has_no_stored_scale(make, tmp_path):
    with pytest.raises(RecipeError, match=r"'cls.*dense.weight' lies outside the model's blocks.*--keep"):
        run(job_of(make("bert"), "FP8", Method(rounding="nearest")), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("kind", "sequential"), [("llama", True), ("qwen3-moe", True), ("llama", False)])
def test_a_run_that_was_cut_short_anywhere_ends_the_same(make, tmp_path, monkeypatch, kind, sequential):
    folder, method = make(kind, num_hidden_layers=3), Method(sequential=sequential)
    run(job_of(folder, method=method), tmp_path / "whole")
    expected = tree(tmp_path / "whole")
    writes = 0
    step = calibrated.Walk.step

    def count(self, *args, **kwargs):
        nonlocal writes
        writes += 1
        return step(self, *args, **kwargs)

    # Cut off when a block begins, in its middle, and when its weights are being written.
    for k, where in enumerate(("round", "begin", "write")):
        out = tmp_path / f"{k}-{where}"
        with monkeypatch.context() as patch:
            cut_off(patch, k, where)
            with pytest.raises(Killed):
                run(job_of(folder, method=method), out)
        assert not out.exists()
        with monkeypatch.context() as patch:
            writes = 0
            patch.setattr(calibrated.Walk, "step", count)
            job, counted = job_of(folder, method=method), []
            run(job, out, advance=counted.append)
        assert writes == 3 - k
        # What was done before counts as done.
        assert sum(counted) == job.checkpoint.nbytes
        assert tree(out) == expected
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def cut_off(patch, block, where):
    seen = {"blocks": -1}
    step, rounding, done = calibrated.Walk.step, calibrated.Walk.round, calibrated.Progress

    def begin(self, *args, **kwargs):
        seen["blocks"] += 1
        if where == "begin" and seen["blocks"] == block:
            raise Killed
        return step(self, *args, **kwargs)

    def rounded(self, *args):
        result = rounding(self, *args)
        if where == "round" and seen["blocks"] == block:
            raise Killed
        return result

    def progress(scratch, is_done, tell):
        def told(name, files):
            if where == "write" and seen["blocks"] == block:
                raise Killed
            tell(name, files)

        return done(scratch, is_done, told)

    patch.setattr(calibrated.Walk, "step", begin)
    patch.setattr(calibrated.Walk, "round", rounded)
    patch.setattr("lowbit_hf.writing.Progress", progress)


def test_another_text_or_method_is_another_run(make, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        cut_off(patch, 1, "begin")
        with pytest.raises(Killed):
            run(job_of(make()), out)
    for job in (
        job_of(make(), method=Method(options=Options(damping=0.02))),
        prepare(make(), scheme("W4A16_G32"), mode="even", calibration=Windows(8), method=Method()),
        prepare(make(), scheme("W4A16_G32"), mode="even"),
    ):
        with pytest.raises(CheckpointError, match="unfinished output of another run"):
            run(job, out)


def test_experts_of_a_stack_get_one_scheme(make):
    folder = make("qwen3-moe")
    one = [("model.layers.0.mlp.experts.1.gate_proj", scheme("W8A16"))]
    with pytest.raises(
        RecipeError, match=r"stacks in 'model.layers.0.mlp.experts.gate_up_proj' have different schemes"
    ):
        job_of(folder, rules=one)
    with pytest.raises(RecipeError, match=r"\(W4A16_G32, kept\)"):
        job_of(folder, keep=["model.layers.0.mlp.experts.1.gate_proj"])


def test_kept_weights_stay_in_calibrated_runs(make, tmp_path):
    folder = make()
    run(job_of(folder, keep=["*.down_proj", "model.layers.1.*"]), tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in before if "down_proj" in name or "layers.1." in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in after


def test_the_report_tells_what_happened(make, tmp_path):
    folder = make("qwen3-moe")
    run(job_of(folder, "W4A16_G32"), tmp_path / "out", command="lowbit quantize it")
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert (report.scheme, report.algorithm, report.command) == ("W4A16_G32", "gptq", "lowbit quantize it")
    plain, low = dict(load(folder).named_parameters()), quantized(load(tmp_path / "out"))
    assert {layer.name for layer in report.layers} == set(low)
    for layer in report.layers:
        weight, values = plain[layer.name].double(), low[layer.name].dequantize(torch.float64)
        sqnr = 10 * torch.log10(weight.square().sum() / (weight - values).square().sum())
        assert layer.weight_sqnr == pytest.approx(float(sqnr), abs=0.02)
        assert layer.output_sqnr > 0
        assert layer.bits == pytest.approx(4.5, abs=0.02 if "experts" not in layer.name else 0.1)
        assert layer.block == int(layer.name.split(".")[2])
    for experts in report.experts:
        assert sum(experts.tokens) == 2 * 16 * 32
        assert set(experts.fallback) == {e for e, tokens in enumerate(experts.tokens) if tokens < 128}
    model, whole = load(tmp_path / "out"), load(folder)
    ids = Windows().windows(folder)
    a, b = (m(ids, output_hidden_states=True).hidden_states for m in (model, whole))
    # The last hidden states that a model tells of went through its norm, so the first block's are compared.
    noise, signal = (a[1] - b[1]).double().square().sum(), b[1].double().square().sum()
    assert report.blocks[0].sqnr == pytest.approx(float(10 * torch.log10(signal / noise)), abs=0.1)
    assert report.bytes_before > report.bytes_after
    assert report.peak_memory > 1 << 28
    assert "lowbit quantize it" in (tmp_path / "out" / "report.html").read_text()


def test_the_report_of_rounding_to_nearest_tells_its_cost(make, quantize):
    folder = make()
    out = quantize(folder, "MXFP4A16")
    report = Report.from_json((out / "report.json").read_text())
    plain, low = dict(load(folder).named_parameters()), quantized(load(out))
    assert report.algorithm == "rtn"
    for layer in report.layers:
        weight, values = plain[layer.name].double(), low[layer.name].dequantize(torch.float64)
        sqnr = 10 * torch.log10(weight.square().sum() / (weight - values).square().sum())
        # An eighth of the rows stands for all.
        assert layer.weight_sqnr == pytest.approx(float(sqnr), abs=1)
        assert layer.output_sqnr is None
    assert not report.blocks


KILL = """
import os, signal, sys
from lowbit_algos.walk import Walk
step, seen = Walk.step, []
def counted(self, *args, **kwargs):
    seen.append(1)
    if len(seen) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
Walk.step = counted
if sys.argv[2] == "held":
    # As on a GPU with room for what blocks are fed, and saved after every second block.
    from types import SimpleNamespace
    from lowbit_hf import calibrated
    from lowbit_hf.budget import Budget
    Budget._hold = lambda self: setattr(self, "held", True)
    calibrated._UNSAVED, ticks = 1.5, iter(range(99))
    calibrated.time = SimpleNamespace(monotonic=lambda: next(ticks))
from lowbit.command import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("name", ["killed", pytest.param("held", marks=pytest.mark.slow)])
def test_the_command_goes_on_after_a_kill(speaking, tmp_path, name):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little model that was asked to be smaller. " * 80)
    command = ["quantize", str(speaking), "--to", "MXFP4A16", "--algorithm", "gptq", "--calibrate", str(text)]
    command += ["--samples", "4", "--seq-len", "64", "-o"]
    whole, out = tmp_path / "whole", tmp_path / name
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}

    def call(kill, out):
        line = [sys.executable, "-c", KILL, kill, out.name, *command, str(out)]
        return subprocess.run(line, check=False, env=environment, capture_output=True, text=True)

    assert call("4", out).returncode == -signal.SIGKILL
    assert not out.exists()
    again = call("99", out).returncode if name == "held" else main([*command, str(out)])
    assert again == main([*command, str(whole)]) == 0
    assert tree(whole) == tree(out)


def test_two_processes_make_what_one_makes(speaking, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little model that was asked to be smaller. " * 80)
    command = ["quantize", str(speaking), "--to", "NVFP4", "--algorithm", "gptq", "--calibrate", str(text)]
    command += ["--keep", "*.layers.[2-5].*", "--samples", "4", "--seq-len", "64", "--kv-cache", "fp8-head", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    scripts = Path(sys.executable).parent
    start = [str(scripts / "torchrun"), "--nproc-per-node", "2", "--standalone", "--no-python", str(scripts / "lowbit")]
    line = [*start, *command, str(tmp_path / "two")]
    done = subprocess.run(line, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert main([*command, str(tmp_path / "one")]) == 0
    for said in (done.stdout, capsys.readouterr().out):
        assert said.count("nothing lost: 14 tensors quantized") == 1
    one, two = (quantized(load(tmp_path / out)) for out in ("one", "two"))
    reports = [Report.from_json((tmp_path / out / "report.json").read_text()) for out in ("one", "two")]
    for name, weight in one.items():
        # Sums of Hessians were added up in another order, and a code may change where it was close; in the second block
        # all follow that come after it in a row, to the same effect.
        assert same(weight, two[name]) > (0.97 if ".0." in name else 0.5), name
        assert torch.equal(weight.act_scale, two[name].act_scale)
    for a, b in zip(*(report.layers for report in reports), strict=True):
        assert a.output_sqnr == pytest.approx(b.output_sqnr, abs=0.2)
    assert_cache_scales(tmp_path / "two", Calibration((text,), 4, 64, 0).windows(speaking))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def assert_cache_scales(folder, windows):
    """Each head's scales are of what the model in `folder` puts into a cache of transformers'."""
    cache, stored = DynamicCache(), load_file(folder / "model.safetensors")
    load(folder)(input_ids=windows, past_key_values=cache, use_cache=True)
    for k, layer in enumerate(cache.layers):
        for local, states in (("k_scale", layer.keys), ("v_scale", layer.values)):
            found = stored[f"model.layers.{k}.self_attn.{local}"].flatten() * 448
            # Batches of another size may sum in another order, in bfloat16.
            torch.testing.assert_close(found, states.float().abs().amax((0, 2, 3)), rtol=0.01, atol=0)


FOLDS = {
    "llama": {"self_attn.v_proj.weight": 1, "mlp.up_proj.weight": 1, "input_layernorm.weight": 3, "post_attention_layernorm.weight": 2},
    "gpt2": {"ln_1.weight": 1, "attn.c_attn.weight": 1, "ln_2.weight": 1},
    "bert": {"attention.self.value.weight": 1},
    "qwen3-moe": {
        "self_attn.v_proj.weight": 1, "mlp.experts.gate_up_proj": 1, "input_layernorm.weight": 3, "post_attention_layernorm.weight": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(FOLDS))
def test_folds_are_found_in_models_that_nobody_named(make, kind):
    model = load(make(kind))
    blocks = find_blocks(model)
    batch = {"input_ids": Windows().windows(None)[:1]} | ({} if kind == "bert" else {"use_cache": False})
    captured = capture(model, blocks, [batch])
    block = next(iter(blocks.values()))
    axes = {name: 0 if kind == "gpt2" else -1 for name, p in block.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        found = find_folds(block, axes, lambda: captured.calls[0][0](block, captured.hidden[0]))
    assert {fold.producer.parameters[0][0]: len(fold.consumers) for fold in found} == FOLDS[kind]


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_folded_factors_are_written(make, tmp_path, kind):
    folder = make(kind)
    run(
        job_of(folder, "W8A8", Method(rounding="nearest", smoothing="smoothquant", alpha=0.5, pre_scale=False)),
        tmp_path / "out",
    )
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    norms = [name for name in before if name.endswith("layernorm.weight")]
    assert norms
    assert all(not torch.equal(before[name], after[name]) for name in norms)
    model, plain = load(tmp_path / "out"), load(folder)
    ids = Windows().windows(folder)
    a, b = model(ids).logits.float(), plain(ids).logits.float()
    # What a norm gave away its weights took: eight bits change little.
    assert float((a - b).norm() / b.norm()) < 0.05
    if kind == "qwen3-moe":
        assert not torch.equal(before["model.layers.0.mlp.gate.weight"], after["model.layers.0.mlp.gate.weight"])


def test_gptq_without_a_text_is_wrong_use(speaking, capsys):
    assert quantize([str(speaking), "--to", "W4A16", "--algorithm", "gptq", "-o", "out"]) == 2
    assert "--calibrate FILE" in capsys.readouterr().err
    assert quantize([str(speaking), "--to", "W4A16", "--algorithm", "gtpq", "-o", "out"]) == 2
    assert quantize([str(speaking), "--to", "W4A16", "--calibrate", "none.txt", "-o", "out"]) == 2


def test_a_cache_is_told(make):
    model = load(make())
    recipe = Recipe((Rule.of("model.layers.*", "INT4_G32"),))
    with pytest.raises(LowbitError, match=r"called with a DynamicCache as 'past_key_values', .* use_cache=False"):
        calibrate_(model, recipe, [{"input_ids": Windows().windows(None)}])


def test_blocks_that_cannot_run_one_by_one_are_told(make, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit_algos.blocks._find_hidden", lambda *_: (_ for _ in ()).throw(LowbitError("not fed")))
    with pytest.raises(LowbitError, match="not fed"):
        run(job_of(make()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
