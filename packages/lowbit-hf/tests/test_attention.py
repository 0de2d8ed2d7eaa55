"""Models of transformers by 8-bit attention: what is seen, against `lowbit.attention` under a mask made here."""

from __future__ import annotations

import json
import math
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, StaticCache

import lowbit
from lowbit import FormatError, NoKernelError, UnsupportedOpError
from lowbit.attention import SCHEMES
from lowbit_hf import load, register_attention
from lowbit_hf.attention import round_attention
from lowbit_hf.evaluate import evaluate, tokenize

MODELS = Path(__file__).parents[3] / "integration_tests" / "models"
WINDOW = 6
# What the tests' models are called there, and how these differ; a window of the second layer alone, and of both.
KINDS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "mixtral": ("mixtral", {"sliding_window": WINDOW}),
    "qwen3-moe": ("qwen3-moe", {}),
    "chunks": ("llama4", {"attention_chunk_size": WINDOW}),
    "narrow values": ("deepseek", {}),
    "odd heads": ("llama", {"head_dim": 24}),
}
# A number in e4m3 is off by 2^-4 / sqrt(3) of itself at most, and so is attention that multiplies such.
NEAR = 2**-4 / math.sqrt(3)


@pytest.fixture
def lm(make):
    """`lm(kind, implementation)`: a random model that has that attention from the start."""

    def of(kind, implementation="lowbit", **config):
        name, changes = KINDS.get(kind, (kind, {}))
        folder = make(name, torch.float32, **changes | config)
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()

    return of


def seen(module, queries, keys, padding, at, static):
    """Which keys (B, 1, S, T) a layer's queries see: the tokens from `at` on, of the last keys or of a static cache."""
    query = at + torch.arange(queries)[:, None]
    key = torch.arange(keys) if static else at + queries - keys + torch.arange(keys)
    config, kind = module.config, (getattr(module.config, "layer_types", None) or [""] * 2)[module.layer_idx]
    found = (key <= query).expand(2, 1, -1, -1)
    if kind == "chunked_attention":
        # They begin where padding ends.
        begin = 0 if padding is None else padding.argmax(1)[:, None, None, None]
        found = found & ((key - begin) // WINDOW == (query - begin) // WINDOW)
    elif kind == "sliding_attention" or (not kind and getattr(config, "sliding_window", None)):
        found = found & (key > query - WINDOW)
    return found if padding is None else found & (padding[:, None, None, key] > 0)


@pytest.fixture
def direct():
    """Attention called `direct`, by `lowbit.attention` under those masks; what is set here is where queries begin."""
    told = {"at": 0, "padding": None, "static": False, "scheme": "INT8_FP8"}

    def attend(module, q, k, v, mask, scaling, **others):
        v = torch.cat([v, v.new_zeros(*v.shape[:3], k.shape[3] - v.shape[3])], 3)
        width = getattr(module, "v_head_dim", q.shape[3])
        mask = seen(module, q.shape[2], k.shape[2], told["padding"], told["at"], told["static"])
        out = lowbit.attention(q, k, v, scheme=told["scheme"], mask=mask, scale=scaling)
        return out[..., :width].transpose(1, 2).contiguous(), None

    AttentionInterface.register("direct", attend)
    AttentionMaskInterface.register("direct", lambda *_, **__: None)
    yield told
    del AttentionInterface._global_mapping["direct"], AttentionMaskInterface._global_mapping["direct"]


def padded(side):
    mask = torch.ones(2, 16, dtype=torch.int64)
    if side is not None:
        mask[0, slice(None, 5) if side == "left" else slice(-5, None)] = 0
    return mask


def off(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_model_sees_what_it_should(lm, direct, tokens, kind, side):
    direct["padding"] = padded(side)
    ours, theirs = lm(kind), lm(kind, "direct")
    with torch.no_grad():
        found = ours(tokens, attention_mask=direct["padding"]).logits
        assert torch.equal(found, theirs(tokens, attention_mask=direct["padding"]).logits)
        if side is None:
            assert torch.equal(found, ours(tokens).logits)
        ours.set_attn_implementation("sdpa")
        plain = ours(tokens, attention_mask=direct["padding"]).logits
    kept = direct["padding"].bool()
    assert 0 < off(found[kept], plain[kept]) < 2 * NEAR  # two layers


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_encoders_and_what_attends_to_them(kind, side):
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "max_position_embeddings": 32}
    if kind == "bert":
        sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    else:
        sizes |= {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        model = transformers.BartModel(transformers.BartConfig(**sizes, **heads))
    mask, found = padded(side), []
    given = {"input_ids": torch.arange(32).view(2, 16) + 4, "attention_mask": mask}
    if kind == "bart":
        # Fewer tokens than the encoder has.
        given["decoder_input_ids"] = torch.arange(18).view(2, 9) + 40
    for implementation in ("eager", "lowbit"):
        model.eval().set_attn_implementation(implementation)
        with torch.no_grad():
            out = model(**given).last_hidden_state
        found.append(out if kind == "bart" else out[mask.bool()])
    # Two layers of attention over the same values, beside what passes around them.
    assert 0 < off(found[1], found[0]) < 2 * NEAR


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_by_name(lm, direct, tokens, scheme):
    direct["scheme"] = scheme
    with torch.no_grad():
        wanted = lm("llama", "direct")(tokens).logits
        assert torch.equal(lm("llama", f"lowbit:{scheme}")(tokens).logits, wanted)


def test_scores_are_scaled_as_the_model_says(lm, direct, tokens):
    models = [lm("llama"), lm("llama", "direct")]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.scaling = 0.7
    with torch.no_grad():
        found, wanted = (model(tokens).logits for model in models)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("kind", "static"),
    [("llama", True), *((kind, False) for kind in ("llama", "qwen2", "mixtral", "chunks", "narrow values"))],
)
def test_caches(lm, direct, tokens, kind, static):
    """Texts in pieces: the first, some more, and one token at a time."""
    direct["static"] = static
    models = [lm(kind), lm(kind, "direct")]
    made = (lambda c: StaticCache(c, 20)) if static else (lambda c: DynamicCache(config=c))
    caches = [made(model.config) for model in models]
    with torch.no_grad():
        for piece in tokens.split([7, 6, 1, 1, 1], 1):
            found, wanted = (
                model(piece, past_key_values=cache).logits for model, cache in zip(models, caches, strict=True)
            )
            assert torch.equal(found, wanted)
            direct["at"] += piece.shape[1]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3-moe"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(lm, tokens, kind, cache):
    """Each token's logits are those of the whole text, but for scales that cover other tokens."""
    model = lm(kind)
    made = model.generate(
        tokens,
        attention_mask=padded("left"),
        max_new_tokens=8,
        eos_token_id=None,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        cache_implementation=cache,
        disable_compile=True,
    )
    mask = torch.cat([padded("left"), torch.ones(2, 8, dtype=torch.int64)], 1)
    with torch.no_grad():
        whole = model(made.sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    assert off(torch.stack(made.logits, 1), whole.logits[:, 15:-1]) < 2 * NEAR


def test_gradients(lm, tokens):
    found = {}
    for name in ("lowbit", "sdpa"):
        model = lm("llama", name).train()
        model(tokens, attention_mask=padded("left"), labels=tokens).loss.backward()
        found[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, wanted in found["sdpa"].items():
        # Rounded scores, weights and values: three factors.
        assert off(found["lowbit"][key], wanted) < 3 * 2 * NEAR, key


@pytest.mark.parametrize(
    ("kind", "backend", "given"),
    [
        ("llama", "eager", {}),
        ("qwen2", "eager", {"use_cache": False}),
        ("llama", "eager", {"attention_mask": padded("left")}),
        pytest.param("odd heads", "inductor", {"use_cache": False}, marks=pytest.mark.slow),
    ],
)
def test_compiled(lm, tokens, kind, backend, given):
    """One graph, with and without a cache, a window and padding."""
    torch._dynamo.reset()
    model = lm(kind, num_hidden_layers=1, max_window_layers=0)
    step = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(step(tokens, **given).logits, model(tokens, **given).logits)


def test_exported(lm, tokens):
    """For texts of any length, whose queries are the last of the keys."""
    model = lm("qwen2", num_hidden_layers=1, max_window_layers=0)
    given, shapes = {"input_ids": tokens, "use_cache": False}, {"input_ids": {1: torch.export.Dim("length", max=32)}}
    with torch.no_grad():
        exported = torch.export.export(model, (), given, dynamic_shapes=shapes | {"use_cache": None}, strict=False)
        shorter = tokens[:, :11]
        found = exported.module()(input_ids=shorter, use_cache=False).logits
        torch.testing.assert_close(found, model(shorter).logits)


def test_other_schemes_and_backends(lm, direct, tokens):
    direct["scheme"] = "e4m3fn:*x*:float32,none,rotate_qk"
    register_attention("mine", direct["scheme"])
    with torch.no_grad():
        assert torch.equal(lm("llama", "mine")(tokens).logits, lm("llama", "direct")(tokens).logits)
    register_attention("absent", prefer=("cuda",))
    with pytest.raises(NoKernelError, match="cuda"):
        lm("llama", "absent")(tokens)
    with pytest.raises(FormatError, match="attention scheme 'FP9'"):
        register_attention("absent", "FP9")
    with pytest.raises(ValueError, match="lowbit:FP9"):
        lm("llama", "lowbit:FP9")


SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("kind", "config", "how", "reason"),
    [
        ("Gemma2ForCausalLM", {"head_dim": 32, "num_key_value_heads": 2}, {}, r"caps scores \(softcap\)"),
        ("GptOssForCausalLM", {"head_dim": 32, "num_key_value_heads": 2, "num_local_experts": 2}, {}, "sinks"),
        ("LlamaForCausalLM", {"attention_dropout": 0.1}, {"train": True}, "drops 0.1 of its weights"),
        ("LlamaForCausalLM", {}, {"output_attentions": True}, "keeps no weights to put out"),
        ("PhimoeForCausalLM", {"sliding_window": 6, "num_key_value_heads": 2}, {}, "window of 6 tokens that is only"),
        ("T5ForConditionalGeneration", {"d_model": 64, "d_ff": 64, "num_layers": 1}, {}, "bias to scores"),
        ("BloomForCausalLM", {}, {}, "BloomModel does not go through transformers' interface"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(tokens, kind, config, how, reason):
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**SMALL | config, attn_implementation="lowbit")).train(how.pop("train", False))
    more = {"decoder_input_ids": tokens} if kind.startswith("T5") else {}
    with pytest.raises(UnsupportedOpError, match=reason):
        model(tokens, **how, **more)
    if kind.startswith("Phimoe"):  # all of it is in the window
        model(tokens[:, :6])


def test_a_model_that_would_stay_as_it_is_is_refused():
    model = transformers.BloomModel(transformers.BloomConfig(**SMALL | {"n_layer": 1, "n_head": 2}))
    with pytest.raises(UnsupportedOpError, match="so it stays as it is"):
        round_attention(model, "INT8_FP8")
    assert not model.config._attn_implementation.startswith("lowbit")


def test_eval(command, lm, direct, worded, tmp_path):
    """By the scheme of `--attention`, and of the model alone."""
    folder, text = worded(), tmp_path / "text.txt"
    words = torch.randint(2, 96, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text(" ".join(f"w{word}" for word in words))
    arguments = ("eval", folder, "--text", text, "--against", folder, "--json", "--device", "cpu")
    code, said, _ = command(*arguments, "--attention", "FP8")
    assert code == 0
    model, base = load(folder), load(folder)
    direct["scheme"] = "FP8"
    model.set_attn_implementation("direct")
    wanted = evaluate(model, torch.tensor(words), context=32, base=base)
    found = json.loads(said)
    assert (found["attention"], found["perplexity"], found["kl"]) == ("FP8", wanted.perplexity, wanted.kl)
    assert found["kl"] > 0
    code, _, err = command(*arguments, "--attention", "FP9")
    assert code
    assert "attention scheme 'FP9'" in err


def measured(name, schemes, count):
    """Perplexity of a trained model over full contexts, by each scheme, over that in bfloat16."""
    model = load(MODELS / name)
    with as_file(files("lowbit_hf") / "data" / "text.txt") as text:
        ids = tokenize(MODELS / name, text)[:count]
    base = evaluate(model, ids, context=512).perplexity
    for scheme in schemes:
        round_attention(model, scheme)
        yield evaluate(model, ids, context=512).perplexity / base


def test_perplexity_is_that_of_bfloat16():
    """Within 0.5 %, and not the same."""
    (ratio,) = measured("lm-tiny", ["INT8_FP8"], 4096)
    assert 0 < abs(ratio - 1) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm-tiny", "moe-tiny"])
def test_perplexity_of_every_scheme(name):
    for ratio in measured(name, SCHEMES, 32768):
        assert 0 < abs(ratio - 1) < 0.005
