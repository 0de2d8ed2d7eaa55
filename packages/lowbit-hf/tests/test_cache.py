from __future__ import annotations

import copy
import random
from importlib.resources import as_file, files
from math import log
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import lowbit
import lowbit_hf
from lowbit.errors import FormatError, UnsupportedOpError
from lowbit_hf import QuantizedCache, load
from lowbit_hf.cache import FixedLayer, GrowingLayer
from lowbit_hf.cache_rows import TENSOR_SCALE_ROOM, Rows
from lowbit_hf.evaluate import evaluate, tokenize

FORMATS = ["FP8_ROW", "INT8_ROW", "INT8_ROW_ASYM", "INT4_G32", "UINT2_G32", "NVFP4", "MXFP4", "MXFP6_E2M3", "MXFP8"]
MODELS = Path(__file__).parents[3] / "integration_tests/models"
K = 64


class Rounding:
    """Rounds what a transformers cache is given beforehand, as QuantizedTensors do; a tensor scale is the first's."""

    def __init__(self, spec):
        self.format, self.whole = lowbit.Format.parse(spec), None

    def __call__(self, x, first):
        if self.format.tensor_scale and first:
            amax = x.abs().float().amax((2, 3), keepdim=True)
            self.whole = torch.exp2(torch.ceil(torch.log2(amax / 6 / 448))) * TENSOR_SCALE_ROOM
        scale = lowbit.choose_scale(x, self.format, tensor_scale=self.whole)
        parts = (scale.scale, scale.zero, scale.tensor_scale)
        return lowbit.quantize(x, self.format, scale=parts[0], zero=parts[1], tensor_scale=parts[2]).dequantize(x.dtype)

    def pick(self, index):
        self.whole = None if self.whole is None else self.whole[index]


class Beforehand(DynamicCache):
    """transformers' own cache, given rounded values."""

    def __init__(self, config, keys, values=None):
        super().__init__(config=config)
        self.ways = [(Rounding(keys), Rounding(values or keys)) for _ in range(len(self.layers))]

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        first = self.layers[layer_idx].get_seq_length() == 0
        pair = zip(self.ways[layer_idx], (key_states, value_states), strict=True)
        return super().update(*(way(states, first) for way, states in pair), layer_idx, *args, **kwargs)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        for pair in self.ways:
            for way in pair:
                way.pick(beam_idx)


def formats(keys, values=None):
    return lowbit.Format.parse(keys), lowbit.Format.parse(values or keys)


def states(draw, batch, tokens, heads=2, k=K, dtype=torch.float32):
    random_ = torch.Generator().manual_seed(draw.randrange(2**31))
    return torch.randn(batch, heads, tokens, k, generator=random_).to(dtype) * 3


# Layers, beside those of transformers that are given rounded values.


class Both:
    """A layer and transformers' own; every operation is done to both, and what they answer compared."""

    def __init__(self, ours, theirs, ways, seed, dtype=torch.float32):
        self.ours, self.theirs, self.ways, self.dtype = ours, theirs, ways, dtype
        # Tokens since the last crop, which the next may take back whatever the window.
        self.draw, self.batch, self.recorded = random.Random(seed), 3, 0

    def update(self, tokens=None):
        tokens = tokens or self.draw.choice([1, 1, 1, 2, 7])
        assert self.ours.get_mask_sizes(tokens) == self.theirs.get_mask_sizes(tokens) or isinstance(
            self.ours, FixedLayer
        )
        given = [states(self.draw, self.batch, tokens, dtype=self.dtype) for _ in range(2)]
        first = self.theirs.get_seq_length() == 0
        wanted = self.theirs.update(*(way(x, first) for way, x in zip(self.ways, given, strict=True)))
        for ours, theirs in zip(self.ours.update(*given), wanted, strict=True):
            assert ours.dtype == self.dtype
            if isinstance(self.ours, FixedLayer):
                assert ours.shape[2] == self.ours.get_mask_sizes(tokens)[0]
                assert torch.isfinite(ours).all()
                ours = ours[:, :, : theirs.shape[2]]  # noqa: PLW2901 - beyond are positions that masks hide
            assert torch.equal(ours, theirs)
        assert int(self.ours.get_seq_length()) == self.theirs.get_seq_length()
        self.recorded += tokens

    def pick(self, name, argument, index):
        getattr(self.ours, name)(argument)
        getattr(self.theirs, name)(argument)
        for way in self.ways:
            way.pick(index)
        self.batch = len(index)

    def reorder(self):
        index = torch.tensor([self.draw.randrange(self.batch) for _ in range(self.batch)])
        self.pick("reorder_cache", index, index)

    def repeat(self):
        if self.batch <= 3 and self.theirs.get_seq_length():
            self.pick("batch_repeat_interleave", 2, torch.arange(self.batch).repeat_interleave(2))

    def select(self):
        if not self.theirs.get_seq_length():
            return
        mask = torch.tensor([True, *(self.draw.random() < 0.5 for _ in range(self.batch - 1))])
        chosen = mask if self.draw.random() < 0.5 else mask.nonzero()[:, 0]
        self.pick("batch_select_indices", chosen, mask.nonzero()[:, 0])

    def crop(self):
        removed, seen = self.draw.choice([0, 1, 2, 5, 100]), self.theirs.get_seq_length()
        window = getattr(self.ours, "window", None)
        if window is not None and (not seen or (seen >= window and not self.theirs.record_past)):
            return  # transformers' has no crop of nothing, nor, unless it recorded, of what left the window
        if window is not None and seen >= window:
            removed = min(removed, self.recorded)
        self.recorded = 0
        self.ours.crop(-removed)
        self.theirs.crop(-removed)

    def reset(self):
        if self.draw.random() < 0.1:
            self.ours.reset()
            self.theirs.reset()
            self.batch = 3 if isinstance(self.ours, GrowingLayer) else self.batch

    def all_of(self, steps):
        self.update()
        for _ in range(steps):
            getattr(self, self.draw.choice(["update"] * 4 + ["reorder", "repeat", "select", "crop", "reset"]))()
        self.update()


@pytest.mark.parametrize("window", [None, 2, 9])
@pytest.mark.parametrize("fmt", FORMATS)
def test_growing_layer_does_as_transformers(fmt, window):
    for seed in range(6):
        theirs = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
        ours = GrowingLayer(formats(fmt), window)
        if seed % 2 and window is not None:
            ours.activate_past_recording()
            theirs.activate_past_recording()
        Both(ours, theirs, [Rounding(fmt), Rounding(fmt)], seed).all_of(40)


@pytest.mark.parametrize("fmt", FORMATS)
def test_fixed_layer_does_as_transformers(fmt):
    for seed in range(6):
        ours = FixedLayer(formats(fmt), 400)
        Both(ours, DynamicLayer(), [Rounding(fmt), Rounding(fmt)], seed).all_of(40)


@pytest.mark.parametrize("make", [GrowingLayer, lambda pair: FixedLayer(pair, 60)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_and_values_of_other_formats(make, dtype):
    ways = [Rounding("FP8_ROW"), Rounding("NVFP4")]
    Both(make(formats("FP8_ROW", "NVFP4")), DynamicLayer(), ways, 1, dtype).all_of(10)


def test_beams_are_reordered_in_place():
    """A compiled step goes on writing where it did."""
    draw, layer = random.Random(0), FixedLayer(formats("NVFP4"), 8)
    layer.update(states(draw, 3, 2), states(draw, 3, 2))
    before = [part.data_ptr() for rows in layer.rows for part in rows.tensors]
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert [part.data_ptr() for rows in layer.rows for part in rows.tensors] == before


def test_a_token_keeps_its_values_while_others_come():
    draw, layer = random.Random(0), GrowingLayer(formats("NVFP4", "INT4_G32"))
    before = layer.update(states(draw, 2, 3), states(draw, 2, 3))
    for _ in range(40):
        after = layer.update(states(draw, 2, 2) * 50, states(draw, 2, 2) * 50)
        assert all(torch.equal(a[:, :, : b.shape[2]], b) for a, b in zip(after, before, strict=True))
        before = after


def test_growth(monkeypatch):
    """Writing n tokens one by one moves a constant number of times n tokens, into room for half as many more."""
    moved = []
    monkeypatch.setattr(
        Rows,
        "move",
        lambda rows, start, end, room, move=Rows.move: (moved.append(end - start), move(rows, start, end, room)),
    )
    draw, layer, count = random.Random(0), GrowingLayer(formats("FP8_ROW")), 2000
    x = states(draw, 1, 1)
    for n in range(1, count + 1):
        layer.update(x, x)
        assert n <= layer.rows[0].room <= max(1.5 * n + 1, 2)
    assert sum(moved) <= 2 * 3 * count  # keys and values; 1 + 1/1.5 + 1/1.5^2 + .. times
    assert len(moved) <= 2 * (log(count, 1.5) + 2)
    layer = GrowingLayer(formats("FP8_ROW"))
    layer.update(states(draw, 1, 300), states(draw, 1, 300))
    assert layer.rows[0].room == 300


def test_a_window_bounds_room():
    draw, layer = random.Random(0), GrowingLayer(formats("FP8_ROW"), 16)
    layer.update(states(draw, 1, 500), states(draw, 1, 500))
    for _ in range(100):
        keys, _ = layer.update(states(draw, 1, 1), states(draw, 1, 1))
        assert keys.shape[2] == 16
        assert layer.rows[0].room <= 16 * 1.5 + 1
    assert layer.get_seq_length() == 600


def test_bytes():
    config = AutoConfig.from_pretrained(MODELS / "lm-tiny")  # 6 layers, 2 heads of 64
    draw = random.Random(0)
    rows = 2 * 2 * 10  # texts, heads, tokens
    for keys, values, wanted in [
        ("FP8_ROW", None, 2 * rows * (64 + 4)),
        ("INT4_G32", "MXFP6_E2M3", rows * (32 + 2 * 2) + rows * (48 + 2)),
        ("INT8_ROW_ASYM", None, 2 * rows * (64 + 4 + 1)),
        ("NVFP4", None, 2 * (rows * (32 + 4) + 2 * 2 * 4)),
    ]:
        for room in (None, 10):
            cache = QuantizedCache(config, keys, values, max_cache_len=room)
            assert (cache.nbytes, cache.bfloat16_nbytes) == (0, 0)
            for layer in range(6):
                cache.update(states(draw, 2, 10), states(draw, 2, 10), layer)
            assert cache.nbytes == 6 * wanted
            assert cache.bfloat16_nbytes == 6 * 2 * rows * 128


# Models: the same answers as with transformers' cache of rounded values.


@pytest.fixture(scope="module")
def model(make):
    made = {}

    def of(kind, **config):
        key = (kind, str(config))
        if key not in made:
            made[key] = load(make(kind, torch.float32, **config)).float()
        return made[key]

    return of


def answers(model, cache, ids, **options):
    chosen = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, past_key_values=cache, attention_mask=mask, eos_token_id=None, **chosen | options)


def same(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe", "gpt-oss", "llama4", "deepseek", "olmo"])
@pytest.mark.parametrize("fmt", ["FP8_ROW", "INT4_G32", "NVFP4"])
def test_generate(model, tokens, kind, fmt):
    """GQA, windows of 8 tokens, chunks, keys wider than values."""
    lm = model(kind, max_position_embeddings=64)
    same(
        answers(lm, QuantizedCache(lm.config, fmt), tokens),
        answers(lm, Beforehand(lm.config, fmt), tokens),
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_with_each_attention(model, tokens, attention):
    lm = copy.deepcopy(model("llama"))
    lm.set_attn_implementation(attention)
    same(answers(lm, QuantizedCache(lm.config, "MXFP8"), tokens), answers(lm, Beforehand(lm.config, "MXFP8"), tokens))


@pytest.mark.parametrize("kind", ["llama", "gpt-oss"])
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
def test_generate_in_other_ways(model, tokens, kind, options):
    """Beams reorder, several answers repeat, guesses that were wrong are cropped."""
    lm, ids = model(kind), tokens[:1] if "prompt_lookup_num_tokens" in options else tokens
    found = []
    for cache in (QuantizedCache(lm.config, "NVFP4", "FP8_ROW"), Beforehand(lm.config, "NVFP4", "FP8_ROW")):
        torch.manual_seed(0)
        found.append(answers(lm, cache, ids, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)


def test_left_padding(model, tokens):
    """A padded text gets the answer that it gets alone: no scale covers other tokens or texts."""
    lm = model("llama")
    ids, mask = tokens.clone(), torch.ones_like(tokens)
    ids[0, :5], mask[0, :5] = 1, 0
    for room in (None, 64):
        both = answers(lm, QuantizedCache(lm.config, "INT4_G32", max_cache_len=room), ids, attention_mask=mask)
        alone = answers(lm, QuantizedCache(lm.config, "INT4_G32"), ids[:1, 5:])
        assert torch.equal(both.sequences[0, 5:], alone.sequences[0])


@pytest.mark.parametrize("kind", ["llama", "gpt-oss", "llama4", "deepseek"])
def test_fixed_room_gives_the_same(model, tokens, kind):
    """Up to the order of sums, which masks over all of the room change."""
    lm = model(kind, max_position_embeddings=64)
    for _ in range(2):
        cache = QuantizedCache(lm.config, "INT4_G32", max_cache_len=40)
        fixed = answers(lm, cache, tokens)
        grown = answers(lm, QuantizedCache(lm.config, "INT4_G32"), tokens)
        assert torch.equal(fixed.sequences, grown.sequences)
        torch.testing.assert_close(torch.stack(fixed.logits), torch.stack(grown.logits), rtol=1e-4, atol=1e-4)
        cache.reset()


def test_cut_into_calls(model, tokens):
    """However a text is cut, no logit changes by more than the order of sums."""
    lm = model("llama")
    with torch.no_grad():
        whole = lm(tokens, past_key_values=QuantizedCache(lm.config, "INT4_G32")).logits
        for size in (1, 5):
            cache = QuantizedCache(lm.config, "INT4_G32")
            parts = [lm(piece, past_key_values=cache).logits for piece in tokens.split(size, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_copy_is_another_cache(model, tokens):
    lm = model("llama")
    with torch.no_grad():
        prompt = QuantizedCache(lm.config, "FP8_ROW")
        lm(tokens, past_key_values=prompt)
        lm(tokens[:, :3], past_key_values=copy.deepcopy(prompt))
        assert prompt.get_seq_length() == 16
        # Begun in inference mode, a cache is written to outside of it.
        cache = QuantizedCache(lm.config, "FP8_ROW", max_cache_len=40)
        with torch.inference_mode():
            lm(tokens, past_key_values=cache)
        ours = lm(tokens[:, :3], past_key_values=cache).logits
        torch.testing.assert_close(ours, lm(tokens[:, :3], past_key_values=prompt).logits, rtol=1e-4, atol=1e-4)


def test_training_leaves_no_graph_in_the_cache(model, tokens):
    lm, cache = model("llama"), QuantizedCache(model("llama").config, "FP8_ROW")
    lm.requires_grad_(requires_grad=True)
    lm(tokens, past_key_values=cache)
    lm.requires_grad_(requires_grad=False)
    assert not any(part.requires_grad for layer in cache.layers for rows in layer.rows for part in rows.tensors)


# torch.compile.


@pytest.mark.parametrize("fmt", ["FP8_ROW", "INT8_ROW_ASYM", "INT4_G32", "NVFP4", "MXFP4"])
@pytest.mark.parametrize("early", [True, False])
def test_compiled_layer(fmt, early):
    """One graph writes every token, by inductor; the first call may be inside, where room was made beforehand or not."""
    torch._dynamo.reset()
    draw, ours, eager = random.Random(0), FixedLayer(formats(fmt), 12), FixedLayer(formats(fmt), 12)
    x = [states(draw, 2, 1) for _ in range(16)]
    if early:
        ours.lazy_initialization(x[0][:, :, :0], x[0][:, :, :0])
    step = torch.compile(lambda keys, values: tuple(2 * each for each in ours.update(keys, values)), fullgraph=True)
    addresses = set()
    for i in range(0, 16, 2):
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i > 2):
            found = step(*x[i : i + 2])
        wanted = eager.update(*x[i : i + 2])
        assert all(torch.equal(a, 2 * b) for a, b in zip(found, wanted, strict=True))
        addresses.add(tuple(part.data_ptr() for rows in ours.rows for part in rows.tensors))
    assert len(addresses) == 1
    held = [part for rows in ours.rows for part in rows.tensors]
    assert all(
        torch.equal(a, b) for a, b in zip(held, (part for rows in eager.rows for part in rows.tensors), strict=True)
    )


@pytest.mark.parametrize("kind", ["llama", "gpt-oss"])
def test_compiled_model(model, tokens, kind):
    torch._dynamo.reset()
    lm = model(kind)
    caches = [QuantizedCache(lm.config, "FP8_ROW", "NVFP4", max_cache_len=32) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            lm(tokens, past_key_values=cache)
        step = torch.compile(lambda ids: lm(ids, past_key_values=caches[0]).logits, fullgraph=True, backend="aot_eager")
        for i in range(4):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                found = step(tokens[:, i : i + 1])
            wanted = lm(tokens[:, i : i + 1], past_key_values=caches[1]).logits
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert int(caches[0].get_seq_length()) == 20


# Trained models: what it costs.


class Cached(nn.Module):
    """A model that reads its windows in pieces of 64 tokens, through a cache each."""

    def __init__(self, model, make):
        super().__init__()
        self.model, self.make = model, make

    def forward(self, ids, *, use_cache):
        cache = self.make(self.model.config)
        pieces = [self.model(piece, past_key_values=cache).logits for piece in ids.split(64, 1)]
        return SimpleNamespace(logits=torch.cat(pieces, 1))


class Noisy(DynamicCache):
    """transformers' cache, each number off by up to half a gap of the format there, at random: what rounding may do."""

    def __init__(self, config, spec):
        super().__init__(config=config)
        self.format, self.random = lowbit.Format.parse(spec), torch.Generator().manual_seed(0)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        off = (
            (x + (torch.rand(x.shape, generator=self.random) - 0.5) * self.gap(x.float())).to(x.dtype)
            for x in (key_states, value_states)
        )
        return super().update(*off, layer_idx, *args, **kwargs)

    def gap(self, x):
        blocks = x.unflatten(-1, (-1, self.format.block[-1] or x.shape[-1]))
        amax = blocks.abs().amax(-1, keepdim=True)
        if self.format.element.name == "int4":
            return (amax / 7.5).expand_as(blocks).flatten(-2)
        top, lowest, mantissa = {"e4m3fn": (448, -6, 3), "e2m1": (6, 0, 1)}[self.format.element.name]
        exponent = torch.log2((blocks * top / amax).abs().clamp_min(2.0**lowest)).floor()
        return (torch.exp2(exponent - mantissa) * amax / top).flatten(-2)


@pytest.mark.parametrize("name", ["lm-tiny", "moe-tiny"])
def test_perplexity(name):
    """FP8 loses less than 0.5 % over full contexts; four bits as much as noise of their gaps' size does, within a half.

    Perplexity over 8192 tokens is uncertain by 0.2 % under errors as small as those of FP8.
    """
    lm = load(MODELS / name)
    with as_file(files("lowbit_hf") / "data" / "text.txt") as text:
        ids = tokenize(MODELS / name, text)[:8192]

    def lost(make):
        return evaluate(Cached(lm, make), ids, context=512).perplexity / plain - 1

    plain = evaluate(lm, ids, context=512).perplexity
    assert abs(lost(lambda config: DynamicCache(config=config))) < 0.001
    assert abs(lost(lambda config: QuantizedCache(config, "FP8_ROW"))) < 0.005
    for fmt in ("INT4_G32", "NVFP4"):
        noise = lost(lambda config, fmt=fmt: Noisy(config, fmt))
        found = lost(lambda config, fmt=fmt: QuantizedCache(config, fmt))
        assert 0.01 < noise < 0.06
        assert 0.4 * noise < found < 1.5 * noise
        assert found < 0.04


# What is refused.


@pytest.fixture(scope="module")
def config():
    return AutoConfig.from_pretrained(MODELS / "lm-tiny")


def test_exported():
    assert lowbit_hf.QuantizedCache is QuantizedCache


def test_an_unknown_format(config):
    with pytest.raises(FormatError, match="format 'FP9' is not one of"):
        QuantizedCache(config, "FP9")
    with pytest.raises(FormatError, match="format 'FP9' is not one of"):
        QuantizedCache(config, "FP8_ROW", "FP9")


@pytest.mark.parametrize(
    "fmt",
    ["FP8_TENSOR", "INT8_TENSOR_ASYM", "FP8_128x128", lowbit.FP8_TENSOR, "int8:2x32:float32", "int8:2x1x32:float32"],
    ids=str,
)
def test_scales_of_several_tokens(config, fmt):
    with pytest.raises(FormatError, match="so several tokens; .* needs scales within one row: FP8_ROW"):
        QuantizedCache(config, fmt)


def test_room_for_nothing(config):
    with pytest.raises(FormatError, match="max_cache_len is 0; needed is room for one token or more"):
        QuantizedCache(config, "FP8_ROW", max_cache_len=0)


def test_layers_that_keep_something_else(make):
    config = AutoConfig.from_pretrained(make("qwen3-next"))
    for room in (None, 8):
        with pytest.raises(
            UnsupportedOpError, match="layer 0 of the model is a 'linear_attention' layer, .*: use DynamicCache"
        ):
            QuantizedCache(config, "FP8_ROW", max_cache_len=room)


@pytest.mark.parametrize("room", [None, 8])
def test_what_does_not_fit_the_first(config, room):
    cache, x = QuantizedCache(config, "FP8_ROW", max_cache_len=room), torch.zeros(2, 2, 3, K)
    cache.update(x, x, 0)
    for keys, values, said in [
        (
            x[:1],
            x[:1],
            r"keys are torch.float32 of shape \(1, 2, 3, 64\); .* needed is torch.float32 of shape \(2, 2, 3, 64\)",
        ),
        (x.half(), x.half(), "keys are torch.float16 .* needed is torch.float32"),
        (x, x.double(), "values are torch.float64"),
        (x, x[:, :1], r"values are torch.float32 of shape \(2, 1, 3, 64\)"),
        (x, x[:, :, :2], r"values are torch.float32 of shape \(2, 2, 2, 64\)"),
        (x[..., :32], x, r"keys are torch.float32 of shape \(2, 2, 3, 32\)"),
    ]:
        with pytest.raises(FormatError, match=said):
            cache.update(keys, values, 0)
    assert cache.get_seq_length() == 3


def test_a_head_that_groups_do_not_divide(config):
    x = torch.zeros(1, 2, 3, 48)
    with pytest.raises(FormatError, match="heads have 48 channels, which groups of 32 do not divide"):
        QuantizedCache(config, "INT4_G32").update(x, x, 0)


def test_integers_are_no_keys(config):
    x = torch.zeros(1, 2, 3, K, dtype=torch.int32)
    with pytest.raises(FormatError, match="needed is one of float32, float16, bfloat16 and float64"):
        QuantizedCache(config, "FP8_ROW").update(x, x, 0)


def test_full(config):
    cache, x = QuantizedCache(config, "FP8_ROW", max_cache_len=4), torch.ones(1, 2, 3, K)
    cache.update(x, x, 0)
    with pytest.raises(FormatError, match="3 tokens are held and 3 more come; max_cache_len is 4"):
        cache.update(x, x, 0)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("room", [None, 8])
def test_crop_by_length(config, room):
    with pytest.raises(FormatError, match="crop was given 3; it takes minus the number of tokens to remove"):
        QuantizedCache(config, "FP8_ROW", max_cache_len=room).crop(3)


def test_crop_beyond_a_window():
    layer, x = GrowingLayer(formats("FP8_ROW"), 4), torch.ones(1, 2, 6, K)
    layer.update(x, x)
    layer.crop(0)
    with pytest.raises(
        UnsupportedOpError,
        match=r"2 tokens cannot be removed from a layer with a window of 4 that has seen 6: .* activate_past_recording\(\)",
    ):
        layer.crop(-2)
    assert layer.get_seq_length() == 6


def test_offloading(config):
    with pytest.raises(UnsupportedOpError, match="a QuantizedCache is not offloaded"):
        QuantizedCache(config, "FP8_ROW").offload(0)
