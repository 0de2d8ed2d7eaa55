"""Checkpoints are data: whatever stands in their files, reading them succeeds or ends in a LowbitError.

Nothing outside the folder is opened, no code is run, no pickle is loaded. `LOWBIT_EXAMPLES=1000 pytest
integration_tests/test_fuzz.py` draws that many of each kind, other ones each time; `nox -s fuzz` lets coverage choose.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hostile import EVIL, LAYOUTS, TARGETS, attempt, made, mutated, rewritten, scrambled, watched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parsers import TARGETS as TEXTS
from safetensors.torch import load_file, save_file

from lowbit.errors import CheckpointError
from lowbit.shards import INDEX_NAME, Checkpoint
from lowbit_hf import load
from lowbit_hf.convert import Source
from lowbit_hf.layouts import WRITERS
from lowbit_hf.lint import lint
from lowbit_hf.skeleton import Skeleton, read_config

EXAMPLES = os.environ.get("LOWBIT_EXAMPLES")
CORPUS = Path(__file__).parent / "fuzz" / "corpus"
KINDS = ("plain", "shards", "W4A16_G32", "NVFP4A16", "FP8_BLOCK", *LAYOUTS, "mxfp4")


def holds(examples):
    return settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# What transformers warns of is not what is asked here.
pytestmark = pytest.mark.filterwarnings("ignore")
draws = st.integers(0, 1 << 32).map(random.Random)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return made(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="session")
def work(tmp_path_factory, folders):
    """`work(kind)`: a fresh copy of a folder, in place of the one before."""
    place = tmp_path_factory.mktemp("work") / "model"

    def copy(kind):
        shutil.rmtree(place, ignore_errors=True)
        return shutil.copytree(folders[kind], place)

    return copy


def held(folder):
    """All that reads a checkpoint, watched; it leaves no file open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    with watched(folder) as seen:
        attempt(folder)
    assert seen == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_sound_folders_are_read(folders):
    """Or nothing below would mean anything."""
    for kind, folder in folders.items():
        with watched(folder) as seen:
            assert attempt(folder) >= 5, kind
        assert seen == []


@pytest.mark.parametrize("kind", KINDS)
def test_configs_may_say_anything(work, kind):
    @holds(2)
    @given(draws, st.booleans())
    def run(draw, inner):
        folder = work(kind)
        config = read_config(folder)
        # Most of what is lowbit's own to read lies there.
        if inner and "quantization_config" in config:
            part, config["quantization_config"] = config["quantization_config"], "@here"
            text = json.dumps(config).replace('"@here"', mutated(part, draw))
        else:
            text = mutated(config, draw)
        (folder / "config.json").write_text(text)
        held(folder)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_headers_may_say_anything(work, kind):
    @holds(2)
    @given(draws, st.booleans())
    def run(draw, parsed):
        folder = work(kind)
        file = draw.choice(sorted(folder.glob("*.safetensors")))
        raw = file.read_bytes()
        file.write_bytes(rewritten(raw, draw) if parsed else scrambled(raw, draw, 2000))
        held(folder)

    run()


OTHERS = [(INDEX_NAME, "shards"), ("generation_config.json", "plain"), ("tokenizer_config.json", "plain")]
OTHERS += [("tokenizer.json", "plain"), ("hf_quant_config.json", "modelopt")]


@pytest.mark.parametrize(("name", "kind"), OTHERS)
def test_other_files_may_say_anything(work, name, kind):
    @holds(2)
    @given(draws)
    def run(draw):
        folder = work(kind)
        if name == "hf_quant_config.json":
            config = read_config(folder)
            del config["quantization_config"]
            (folder / "config.json").write_text(json.dumps(config))
        (folder / name).write_text(mutated(json.loads((folder / name).read_text()), draw))
        held(folder)

    run()


def test_gguf_files_may_hold_anything(work):
    @holds(10)
    @given(draws)
    def run(draw):
        folder = work("gguf")
        file = folder / "model.gguf"
        file.write_bytes(scrambled(file.read_bytes(), draw, 4000))
        held(folder)

    run()


@pytest.mark.parametrize("file", sorted(CORPUS.rglob("*.*")), ids=lambda file: f"{file.parent.name}-{file.name}")
def test_what_fuzzing_starts_from_and_what_it_found(folders, tmp_path, file):
    copies = {kind: shutil.copytree(folder, tmp_path / kind) for kind, folder in folders.items()}
    with watched(tmp_path) as seen:
        (TARGETS | TEXTS)[file.parent.name](file.read_bytes(), copies)
    assert seen == []


@pytest.mark.parametrize("name", TEXTS)
def test_texts_and_records_may_say_anything(tmp_path, name):
    starts = [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]

    @holds(20)
    @given(draws, st.booleans())
    def run(draw, parsed):
        raw = draw.choice(starts)
        try:
            changed = mutated(json.loads(raw), draw).encode(errors="replace") if parsed else None
        except (ValueError, RecursionError):
            changed = None
        TEXTS[name](scrambled(raw, draw, len(raw)) if changed is None else changed, {"plain": tmp_path})

    run()


# One by one, what drawing at random finds too seldom.


BOMBS = {
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and no model has more than"),
    "labels": ({"num_labels": 10**12}, "num_labels is 1000000000000, and no model"),
    "a part's layers": ({"text_config": {"encoder_layers": 10**9}}, "encoder_layers is 1000000000, and no model"),
    "modules": ({"num_hidden_layers": 60_000}, "it has more than 50 modules"),
    "buffers": ({"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "dim": 8, "n_heads": 2}
        | {"max_position_embeddings": 10**12}, "its buffers, which no checkpoint holds, take 8000000000000 bytes"),
    "numbers for weights": ({"dtype": "int8"}, "its dtype is torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_models_of_any_size_are_refused_before_they_are_built(work, monkeypatch, case):
    monkeypatch.setattr("lowbit_hf.skeleton._MOST_MODULES", 50)
    change, words = BOMBS[case]
    folder = work("plain")
    (folder / "config.json").write_text(json.dumps(read_config(folder) | change))
    started = time.process_time()
    with pytest.raises(CheckpointError, match=words):
        Skeleton.build(folder)
    assert time.process_time() - started < 5


def test_a_model_far_larger_than_its_files_is_not_loaded(work):
    folder = work("plain")
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"vocab_size": 10**12}))
    with pytest.raises(CheckpointError, match="describes 12800000.* weights, and its files hold"):
        load(folder)


SLOW = {
    "a target": ("W4A16_G32", lambda q, p: q["config_groups"]["group_0"].update(targets=[f"re:{p}"])),
    "GPTQ's dynamic": ("gptq", lambda q, p: q.update(dynamic={f"+:{p}": {}})),
    "a rule": ("lowbit", lambda q, p: q["rules"][0].update(match=f"re:{p}")),
    "ignore": ("W4A16_G32", lambda q, p: q.update(ignore=[f"re:{p}"])),
}


@pytest.mark.parametrize("case", SLOW)
def test_expressions_that_never_end_do(work, monkeypatch, case):
    monkeypatch.setattr("lowbit_hf.patterns._SECONDS", 0.2)
    kind, change = SLOW[case]
    folder = work(kind)
    config = read_config(folder)
    change(config["quantization_config"], r"(.|..|...)*(?<![jt])$")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="takes more than 0.2 s for names such as 'model.layers"):
        lint(folder, ["vllm"]) if case == "ignore" else Source(folder, WRITERS["lowbit"])


def test_experts_are_not_counted_to_whatever_a_config_claims(work):
    folder = work("W4A16_G32")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".up_proj." in name]:
        tensors[name.replace("mlp", "mlp.experts.3")] = tensors[name].clone()
        tensors[name.replace("mlp", f"mlp.experts.{'9' * 5000}"[:2000])] = tensors[name].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"num_experts": 10**12}))
    found = [each for each in lint(folder).findings if "the expert has no tensors" in each.what]
    assert len(found) == 1
    assert attempt(folder) >= 1


def linked(name):
    def change(folder, secret):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)

    return change


def told(name, **values):
    def change(folder, secret):
        found = json.loads((folder / name).read_text())
        found |= {key: [value.format(secret)] for key, value in values.items()}
        (folder / name).write_text(json.dumps(found))

    return change


ELSEWHERE = {
    "a config": linked("config.json"),
    "a generation config": linked("generation_config.json"),
    "a tokenizer": linked("tokenizer.json"),
    "a tokenizer's config": linked("tokenizer_config.json"),
    "special tokens": linked("special_tokens_map.json"),
    "a config by version": told("config.json", configuration_files="../config.4.0.0.json"),
    "a tokenizer by version": told("tokenizer_config.json", fast_tokenizer_files="../tokenizer.4.0.0.json"),
    "vocabulary": told("tokenizer_config.json", vocab_file="{}", tokenizer_file="{}", merges_file="{}"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_nothing_outside_the_folder_is_read(work, case):
    folder = work("plain")
    for name in ("config.4.0.0.json", "tokenizer.4.0.0.json", "secret"):
        (folder.parent / name).write_text((folder / "tokenizer.json").read_text())
    ELSEWHERE[case](folder, folder.parent / "secret")
    held(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_pipes_are_not_waited_for(work, name):
    folder = work("plain")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with watched(folder) as seen:
        attempt(folder)
    assert seen == []


def test_code_that_comes_with_a_checkpoint_is_not_run(work):
    folder = work("plain")
    (folder / f"{EVIL}.py").write_text(f"{EVIL} = open('/tmp/{EVIL}', 'w')\nclass Tokenizer: pass\nclass Model: pass\n")
    mapping = {"AutoConfig": f"{EVIL}.Model", "AutoModelForCausalLM": f"{EVIL}.Model"}
    for name, auto in (
        ("config.json", mapping),
        ("tokenizer_config.json", {"AutoTokenizer": [None, f"{EVIL}.Tokenizer"]}),
    ):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | {"auto_map": auto, "trust_remote_code": True}))
    held(folder)
    assert load(folder)


def test_the_watch_sees_what_it_is_there_for(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_text("x")
    (tmp_path / "in" / "code.py").write_text(f"{EVIL} = 1")
    with watched(tmp_path / "in") as seen:
        (tmp_path / "out").read_text()
        os.close(os.open(tmp_path / "out", os.O_RDONLY))
        exec(compile((tmp_path / "in" / "code.py").read_text(), f"{tmp_path}/in/code.py", "exec"), {})
        subprocess.run(["true"], check=True)
        pickle.loads(pickle.dumps(Path))
    kinds = [each.split()[0] for each in seen]
    assert kinds[:2] == ["open", "open"]
    assert {"compile", "exec", "subprocess.Popen", "pickle.find_class"} <= set(kinds)


def test_the_way_to_convert_a_pickle_works(work, tmp_path):
    """The words of the error, executed: a .bin by transformers, whatever else by torch."""
    folder, new_folder = work("plain"), tmp_path / "new"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles, which can run code and are never loaded") as bin_:
        Checkpoint.open(folder)
    exec(
        how(bin_),
        {"AutoModelForCausalLM": transformers.AutoModelForCausalLM, "folder": folder, "new_folder": new_folder},
    )
    assert {n: t.tolist() for n, t in load_file(new_folder / "model.safetensors").items()} == {
        n: t.tolist() for n, t in tensors.items()
    }
    (folder / "pytorch_model.bin").rename(folder / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="'consolidated.00.pth', pickles") as pth:
        Checkpoint.open(folder)
    names = {"torch": torch, "safetensors": safetensors, "file": folder / "consolidated.00.pth"}
    exec(how(pth), names | {"new_file": folder / "model.safetensors"})
    with Checkpoint.open(folder) as checkpoint:
        assert all(torch.equal(checkpoint.read(checkpoint.entries[name]), tensors[name]) for name in tensors)


def how(raised):
    return str(raised.value).rpartition("you trust: ")[2]
