"""What `lowbit bench llama3` measures: logits of the last token of a text, of the whole text or beside a cache.

Each length is two cases. The baseline is the model in bfloat16 with the fastest of the attentions that run here; beside
it, sharing what weights it can, the model by 8-bit attention, and that with linear layers in each of the formats. All
are transformers models that call what a user's would. A step of decoding writes the last place of a cache that it
reads whole, so that calls are alike and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    DynamicLayer,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lowbit import Recipe, Rule, bind, quantize_
from lowbit.attention import Scheme, selection
from lowbit.backends import Refusal
from lowbit.bench import Case, Contender, Given, Use, normal, plain
from lowbit.bench.attention import BACKENDS, fastest
from lowbit.bench.case import footprint
from lowbit.errors import FormatError
from lowbit_hf.attention import NAME, register_attention
from lowbit_hf.evaluate import evaluate, tokenize
from lowbit_hf.loading import load

_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Of each contender, after as many calls as warm it up.
_SAMPLES = 20

Kept = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer."""


@dataclass(frozen=True, slots=True)
class _Way:
    """A model in a way that is measured."""

    name: str
    model: PreTrainedModel
    kernels: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def cases(given: Given) -> Iterator[Case]:
    """Prefill and decode of every length.

    Raises:
        FormatError: an attention scheme is unknown, there are no layers, the model is not in bfloat16, or a length is
            more than the text or the model's positions have.
        CheckpointError: the model or the text cannot be read.
    """
    if given.options.layers < 1:
        msg = f"a model has a layer or more; --layers is {given.options.layers}"
        raise FormatError(msg)
    schemes = [Scheme.parse(name) for name in given.options.attention.split(",")]
    lengths = [length for (length,) in given.shapes]
    model, text = _model(given)
    most = min(model.config.max_position_embeddings, max(lengths) if text is None else text.numel())
    if max(lengths) > most:
        msg = f"S {max(lengths)} is more than the {most} tokens that the model and the text have; use --shapes"
        raise FormatError(msg)
    if find_spec("flash_attn_interface") is not None:
        activate_flash_attention_impl("FA3")
    ways = list(_ways(given, model, dict(zip(given.options.attention.split(","), schemes, strict=True))))
    for length in lengths:
        ids = _ids(model, length, given.device) if text is None else text[None, :length].to(given.device)
        for step in ("prefill", "decode"):
            yield _case(given, model, ways, step, ids, text)


def _model(given: Given) -> tuple[PreTrainedModel, Tensor | None]:
    """The model, and the tokens of the text that its perplexity is measured on, if it is a trained one."""
    asked = given.options
    if asked.model is not None:
        with as_file(files("lowbit_hf") / "data" / "text.txt") as default:
            text = tokenize(asked.model, asked.text or default)[: asked.tokens]
        model = load(asked.model, device=given.device)
        if model.dtype != torch.bfloat16:
            msg = f"{asked.model} is in {model.dtype}; the benchmark compares with bfloat16, so save it in that"
            raise FormatError(msg)
        return model, text
    config = LlamaConfig(
        **(_TINY if asked.tiny else _8B),
        num_hidden_layers=asked.layers,
        max_position_embeddings=max(length for (length,) in given.shapes),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    with given.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(requires_grad=False), None


def _ids(model: PreTrainedModel, length: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator, device=device)


def _ways(given: Given, model: PreTrainedModel, schemes: dict[str, Scheme]) -> Iterator[_Way | Refusal]:
    """By each scheme of attention, alone and with linear layers in each format."""
    q = torch.empty(1, 1, 1, _head(model), dtype=torch.bfloat16, device=given.device)
    for name, scheme in schemes.items():
        chosen = selection(q, None, 0, str(scheme), "")
        backend = chosen.kernel.name.partition(".")[0]
        if backend == "reference" and given.device.type == "cuda":
            yield Refusal(name, "; ".join(map(str, chosen.refusals)) or "no installed backend has attention")
            continue
        # Where quality is asked for, lengths that plain attention would be faster at are rounded, too.
        register_attention(f"bench {name}", scheme, prefer=() if given.options.model is None else (backend,))
        attended = _copy(model, f"bench {name}")
        kernels = (chosen.kernel.name,)
        yield _Way(name, attended, kernels, chosen.refusals)
        for use in given.uses:
            yield _linear(f"{name} + {use.spec}", attended, use, kernels)


def _linear(name: str, attended: PreTrainedModel, use: Use, kernels: tuple[str, ...]) -> _Way | Refusal:
    """The model with linear layers, but for the head, in a format."""
    model = _copy(attended)
    head: Any = model.get_output_embeddings()
    # By all its names, where it is tied.
    named = model.named_parameters(remove_duplicate=False)
    heads = [key for key, parameter in named if parameter is head.weight]
    rule = Rule("*", use.format, use.activation, modules=("Linear",))
    quantize_(model, Recipe((*(Rule(key, None) for key in heads), rule)))
    found = dict.fromkeys(row.kernel for row in bind(model).rows)
    slow = [kernel for kernel in found if kernel.startswith("reference.")]
    if slow and head.weight.device.type == "cuda":
        return Refusal(name, f"no installed backend has a kernel for {use.spec} here: {', '.join(slow)} would run")
    return _Way(name, model, (*kernels, *found))


def _copy(model: PreTrainedModel, attention: str | None = None) -> PreTrainedModel:
    """A model of the same parameters, perhaps by another attention."""
    made = deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    if attention is not None:
        made.set_attn_implementation(attention)
    return made


def _head(model: PreTrainedModel) -> int:
    config = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _case(
    given: Given, model: PreTrainedModel, ways: list[_Way | Refusal], step: str, ids: Tensor, text: Tensor | None
) -> Case:
    length, decode = ids.shape[1], step == "decode"
    base = _plain(model, length, decode=decode, device=given.device)
    # The whole text's keys and values, of which decoding writes the last.
    kept = _kept(_plain(model, length, decode=False, device=given.device).model, ids) if decode else []
    flops, cached = _work(model, length, decode=decode)

    def contender(way: _Way) -> Contender:
        def operands(ids: Tensor) -> Callable[[int], tuple[PreTrainedModel, Tensor, Kept]]:
            return lambda _: (way.model, ids, kept)

        moved = footprint(way.model) - footprint(model.get_input_embeddings()) + cached
        tell = None if text is None or decode else partial(_perplexity, way.model, text, length)
        kernel = " + ".join(way.kernels) or None
        return Contender(way.name, operands, _logits, moved, plain, kernel, way.refusals, tell=tell)

    first, *others = (way if isinstance(way, Refusal) else contender(way) for way in ways)
    return Case(
        {"step": step, "layers": model.config.num_hidden_layers, "s": length},
        flops,
        lambda _: (ids,),
        partial(_exact, base.model, kept),
        first,
        contender(base),
        peers=tuple(others),
        kinds=("normal",),
        samples=_SAMPLES,
    )


def _plain(model: PreTrainedModel, length: int, *, decode: bool, device: torch.device) -> _Way:
    """The model with the fastest attention in bfloat16 that runs here."""
    heads, keys = model.config.num_attention_heads, model.config.num_key_value_heads
    shapes = ((heads, 1 if decode else length), (keys, length), (keys, length))
    draw = partial(normal, kind="normal", device=device)
    name, _ = fastest(tuple(draw(1, *shape, _head(model), seed=i) for i, shape in enumerate(shapes)), causal=not decode)

    def attend(*given: Any, **told: Any) -> tuple[Tensor, None]:
        with sdpa_kernel(BACKENDS[name]):
            return sdpa_attention_forward(*given, **told)

    # Its name would mean something to transformers, whose own masks are made in CUDA graphs where none is needed, too,
    # and no fast kernel takes them.
    plain_attention = f"bench {length} {decode}"
    AttentionInterface.register(plain_attention, attend)
    AttentionMaskInterface.register(plain_attention, AttentionMaskInterface()[NAME])
    told = current_flash_attention_impl() or name if name == "flash" else name
    return _Way(f"bfloat16, {told}", _copy(model, plain_attention))


def _kept(model: PreTrainedModel, ids: Tensor) -> Kept:
    with torch.no_grad():
        layers: list[Any] = model(ids, logits_to_keep=1, use_cache=True).past_key_values.layers
    return [(layer.keys, layer.values) for layer in layers]


class _Full(DynamicLayer):
    """Keys and values of a text, the last of which are written anew."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


def _logits(model: PreTrainedModel, ids: Tensor, kept: Kept) -> Tensor:
    """Logits (1, 1, vocabulary) after the last token, whose keys and values `kept` has a place for, if it has any."""
    if not kept:
        return model(ids, logits_to_keep=1, use_cache=True).logits
    return model(ids[:, -1:], past_key_values=Cache(layers=[_Full(*each) for each in kept])).logits


def _exact(model: PreTrainedModel, kept: Kept, ids: Tensor) -> Tensor:
    return _logits(model, ids, kept).double()


def _perplexity(model: PreTrainedModel, text: Tensor, length: int) -> dict[str, float]:
    return {"perplexity": evaluate(model, text, context=length).perplexity}


def _work(model: PreTrainedModel, length: int, *, decode: bool) -> tuple[float, float]:
    """Operations of a call, and bytes of keys and values that it reads or writes."""
    config, head = model.config, _head(model)
    layers, each = config.num_hidden_layers, config.num_attention_heads * head
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    output: Any = model.get_output_embeddings()
    last = output.weight.numel()
    queries, seen = (1, length) if decode else (length, length / 2)
    flops = 2 * (linear - last) * queries + 2 * last + 4 * layers * each * queries * seen
    return flops, 4 * layers * config.num_key_value_heads * head * length
