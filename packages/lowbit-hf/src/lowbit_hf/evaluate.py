"""What quantization cost: perplexity on a text, and distance from the base model's predictions.

Perplexity is `exp(mean -log p(token))` over every predicted token of non-overlapping windows of the model's context; a
last partial window is left out unless it is the only one. Against a base model: mean KL divergence
`sum_v p_base(v) * (log p_base(v) - log p(v))` in nats a token, and the share of positions whose likeliest token agrees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from lowbit.errors import CheckpointError
from lowbit.shards import contained_file, lies_inside
from lowbit_hf.gguf.source import is_gguf, read_metadata
from lowbit_hf.gguf.tokens import tokenizer_of
from lowbit_hf.skeleton import read_json

_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Quality of a model on a text."""

    tokens: int
    perplexity: float
    # Against the base, where there was one: nats a token, and a share in [0, 1].
    kl: float | None = None
    top1: float | None = None


def evaluate(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    context: int,
    base: PreTrainedModel | None = None,
    advance: Callable[[int], None] | None = None,
) -> Evaluation:
    """Perplexity of `model` over token `ids` (1-D), and its distance from `base`; `advance(tokens)` after each batch.

    Raises:
        CheckpointError: there are fewer than two tokens, or the two models have different vocabularies.
    """
    windows = split_windows(ids, context)
    tokens, loss, divergence, agree = 0, 0.0, 0.0, 0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for batch in windows.split(max(_BATCH_TOKENS // windows.shape[1], 1)):
            moved = batch.to(device)
            logs = _log_probabilities(model, moved)
            targets = moved[:, 1:]
            loss -= float(logs.gather(-1, targets.unsqueeze(-1)).sum(dtype=torch.float64))
            tokens += targets.numel()
            if base is not None:
                wanted = _log_probabilities(base, moved)
                if wanted.shape != logs.shape:
                    msg = f"the base has a vocabulary of {wanted.shape[-1]}, the model one of {logs.shape[-1]}"
                    raise CheckpointError(msg)
                # A token that the base rules out (logit -inf) adds nothing, whatever the model says of it.
                terms = torch.where(wanted == -torch.inf, 0.0, wanted.exp() * (wanted - logs))
                divergence += float(terms.sum(dtype=torch.float64))
                agree += int((wanted.argmax(-1) == logs.argmax(-1)).sum())
            if advance is not None:
                advance(batch.numel())
    perplexity = float(torch.tensor(loss / tokens, dtype=torch.float64).exp())  # math.exp raises where this is infinite
    if base is None:
        return Evaluation(tokens, perplexity)
    return Evaluation(tokens, perplexity, divergence / tokens, agree / tokens)


def split_windows(ids: Tensor, context: int) -> Tensor:
    """Token ids (windows, length): as many whole windows of `context` as there are, or one shorter one.

    Raises:
        CheckpointError: there are fewer than two tokens.
    """
    if ids.numel() < 2:
        msg = f"the text has {ids.numel()} tokens; needed are at least 2, and {context} for a whole window"
        raise CheckpointError(msg)
    whole = ids.numel() // context
    return ids[: whole * context].view(whole, context) if whole else ids.view(1, -1)


def tokenize(folder: Path, text: Path) -> Tensor:
    """Token ids (1-D) of a UTF-8 text file, by the tokenizer in the model's folder.

    Raises:
        CheckpointError: the text cannot be read, or the folder has no tokenizer.
    """
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{text} cannot be read as UTF-8 text: {error}"
        raise CheckpointError(msg) from error
    tokenizer = load_tokenizer(folder)
    # A long text warns that it is longer than the context; windows are cut below.
    return torch.tensor(tokenizer(content, verbose=False).input_ids, dtype=torch.int64)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in the model's folder, or in its GGUF file.

    Raises:
        CheckpointError: there is none, or of a kind that lowbit does not read; or a file of it leads elsewhere.
    """
    if is_gguf(folder):
        return tokenizer_of(read_metadata(folder))
    _require_inside(folder)
    try:
        # Undecided, it would ask whether to run the code that a tokenizer comes with.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        msg = f"{folder} has no tokenizer that transformers can load: {error}"
        raise CheckpointError(msg) from error


def _require_inside(folder: Path) -> None:
    """Refuse what transformers would follow to files outside: links, and lists of files that are none of the folder's.

    Raises:
        CheckpointError: there is one; or a config cannot be read.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() and not lies_inside(folder.resolve(), path.resolve()):
            msg = f"{path} is a link to {path.resolve()}, outside the folder; replace it by a copy if you trust it"
            raise CheckpointError(msg)
    for name, key in (("config.json", "configuration_files"), ("tokenizer_config.json", "fast_tokenizer_files")):
        named = read_json(folder / name).get(key) if (folder / name).is_file() else None
        for file in cast("list[object]", named) if isinstance(named, list) else []:
            contained_file(folder, str(file))


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Float32 log-probabilities (windows, length - 1, vocabulary) of each next token."""
    return torch.log_softmax(model(ids, use_cache=False).logits[:, :-1].to(torch.float32), -1)
