"""`lowbit bench llama3`: which models it compares, on which logits, and what it counts."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib.metadata import EntryPoint
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionMaskInterface

from lowbit.bench import Given, Use, ceilings, command, sqnr, timing
from lowbit.bench.measure import measure
from lowbit.bench.outcomes import read_run
from lowbit.errors import FormatError, LowbitError
from lowbit_hf import bench, llama3, load
from lowbit_hf.attention import round_attention
from lowbit_hf.bench import benchmark
from lowbit_hf.evaluate import evaluate, tokenize

MODELS = Path(__file__).parents[3] / "integration_tests" / "models"
CPU = torch.device("cpu")


def cases(length, specs, *words):
    parser = ArgumentParser()
    benchmark.options(parser)
    options = parser.parse_args(words)
    return list(benchmark.cases(Given([(length,)], [Use.parse(spec) for spec in specs], CPU, False, options)))


def logits(case, contender):
    return contender.run(*contender.prepare(*case.data("normal"))(0)).double()


@torch.no_grad()
def test_the_same_model_in_every_way():
    found = cases(150, ["INT8_ROW/INT8_ROW"], "--tiny", "--layers", "2")
    assert [case.told for case in found] == [{"step": step, "layers": 2, "s": 150} for step in ("prefill", "decode")]
    whole = found[0].exact(*found[0].data("normal"))
    for case in found:
        (ids,) = case.data("normal")
        model = case.baseline.prepare(ids)(0)[0]
        assert case.baseline.name.startswith("bfloat16, ")
        # transformers' own has masks in CUDA graphs, with which no fast attention runs.
        masks = AttentionMaskInterface()
        assert masks[model.config._attn_implementation] is masks["lowbit"]
        exact = case.exact(ids)
        assert torch.equal(logits(case, case.baseline), exact)
        # Of the last token, as the model gives them without what the benchmark adds.
        ours = case.candidate.prepare(ids)(0)[0]
        model.set_attn_implementation("sdpa")
        assert sqnr(model(ids).logits[:, -1:].double(), exact) > 40
        ours.set_attn_implementation("lowbit")
        attended = ours(ids).logits[:, -1:].double()
        if case is found[0]:
            assert torch.equal(logits(case, case.candidate), attended)
        else:
            assert sqnr(whole, exact) > 40
            assert sqnr(attended, logits(case, case.candidate)) > 25
        (linear,) = case.peers
        assert (case.candidate.name, linear.name) == ("INT8_FP8", "INT8_FP8 + INT8_ROW/INT8_ROW")
        assert "linear" in linear.kernel
        assert 15 < sqnr(exact, logits(case, linear)) < sqnr(exact, logits(case, case.candidate))
        # Shared, but for what is rounded.
        share = {id(parameter) for parameter in model.parameters()}
        assert {id(parameter) for parameter in ours.parameters()} == share
        head = linear.prepare(ids)(0)[0].get_output_embeddings()
        assert id(head.weight) in share


def test_a_step_writes_the_last_of_the_keys_that_it_reads():
    keys, values, last = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), torch.ones(1, 2, 1, 4)
    layer = llama3._Full(keys, values)
    assert (layer.get_seq_length(), layer.get_mask_sizes(1)) == (4, (5, 0))
    found = layer.update(last, 2 * last)
    assert [each.sum(-1)[0, 0].tolist() for each in found] == [[0, 0, 0, 0, 4], [0, 0, 0, 0, 8]]
    assert found[0] is keys


def test_operations_and_bytes():
    hidden, inner, kv, vocabulary, s = 256, 512, 128, 512, 40
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    cache = 2 * kv * s * 2  # keys and values in bfloat16
    norms = 2 * hidden + hidden
    prefill, decode = cases(s, [], "--tiny", "--layers", "1")
    assert prefill.flops == 2 * block * s + 2 * hidden * vocabulary + 4 * hidden * s * s / 2
    assert decode.flops == 2 * block + 2 * hidden * vocabulary + 4 * hidden * s
    for case in (prefill, decode):
        moved = case.baseline.moved - 2 * (block + hidden * vocabulary + norms) - cache
        assert 0 <= moved <= 512  # frequencies of positions


def test_a_trained_model_has_perplexity(monkeypatch):
    monkeypatch.setattr(llama3, "_SAMPLES", 2)
    folder = MODELS / "lm-tiny"
    prefill, decode = cases(64, ["INT8_ROW/INT8_ROW"], "--model", str(folder), "--tokens", "300")
    fast = ceilings.Ceilings(*[1.0] * len(ceilings.Ceilings.__slots__))
    row = measure(prefill, CPU, fast, budget=0.001)
    model = load(folder)
    with as_file(files("lowbit_hf") / "data" / "text.txt") as text:
        ids = tokenize(folder, text)[:300]
    ours, base, linear = (each["perplexity"] for each in row["contenders"])
    found = []
    for backends in ([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH]):  # whichever is faster
        with sdpa_kernel(backends):
            found.append(evaluate(model, ids, context=64).perplexity)
    assert base in found
    round_attention(model, "INT8_FP8")
    assert ours == evaluate(model, ids, context=64).perplexity
    assert len({ours, base, linear}) == 3
    assert [each["samples"] for each in row["contenders"]] == [2] * 3
    assert decode.baseline.tell is None
    assert torch.equal(prefill.data("normal")[0], ids[None, :64])


def test_results_are_a_file_as_others_are(monkeypatch, tmp_path):
    monkeypatch.setattr(ceilings, "_SIZES", {"cpu": ((1 << 16,), 32)})
    monkeypatch.setattr(timing, "_ROTATED", 1)
    point = EntryPoint("llama3", "lowbit_hf.bench:benchmark", command.GROUP)
    monkeypatch.setattr(command, "discover", lambda *_: {"llama3": point})
    file = tmp_path / "results.json"
    words = [
        "--device",
        "cpu",
        "--tiny",
        "--layers",
        "1",
        "--shapes",
        "32",
        "--formats",
        "INT8_ROW",
        "--seconds",
        "0.01",
    ]
    assert (
        command.main([*words[:2], "llama3", *words[2:], "--json", str(file), "--plot", str(tmp_path / "page.html")])
        == 0
    )
    run = read_run(file)
    assert {each.case["step"] for each in run.outcomes} == {"prefill", "decode"}
    assert command.main(["compare", str(file), str(file)]) == 0


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(FormatError, match="S 301 is more than the 300 tokens"):
        cases(301, [], "--model", str(MODELS / "lm-tiny"), "--tokens", "300")
    with pytest.raises(FormatError, match="--layers is 0"):
        cases(8, [], "--tiny", "--layers", "0")
    with pytest.raises(FormatError, match="attention scheme 'FP9'"):
        cases(8, [], "--tiny", "--attention", "FP9")
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(LowbitError, match="needs transformers, which is not installed; pip install"):
        cases(8, [])
