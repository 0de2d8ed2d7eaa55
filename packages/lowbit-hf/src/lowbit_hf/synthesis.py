"""More text to calibrate on, which the model itself writes where there is too little.

Sources: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models"; Williams et al.,
"Self-calibration for Language Model Quantization and Pruning".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lowbit.errors import CheckpointError
from lowbit.journal import sync_path, writing
from lowbit_hf.evaluate import load_tokenizer
from lowbit_hf.loading import load
from lowbit_hf.skeleton import Skeleton
from lowbit_hf.texts import Calibration

# Tokens in a batch, whose keys and values are held: a few GiB where a model has no grouped heads. Other batches draw
# other random numbers, so this must not follow from the machine.
_BATCH_TOKENS = 8192
# What Calibration reads as JSON lines.
_SUFFIXES = (".jsonl", ".ndjson")


def synthesize(
    folder: Path,
    prompts: Calibration,
    out: Path,
    *,
    length: int,
    device: str = "cpu",
    overwrite: bool = False,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Write JSON lines of documents to `out`, each a window of `prompts` continued to `length` tokens by the model.

    `out` appears whole or not at all; `advance(tokens)` is called after every token of a batch.

    Raises:
        CheckpointError: the model is no causal language model, has a shorter context or predicts NaN; the prompts
            cannot be read, hold too little text or leave nothing to write; or `out` exists or cannot be written.
    """
    _require_place(out, overwrite=overwrite)
    _require_model(folder, prompts.length, length)
    windows, tokenizer = prompts.windows(folder), load_tokenizer(folder)
    partial = out.with_name(f".{out.name}.partial")
    with writing(out, partial):
        # What cannot be written is told before the work, not after it.
        partial.touch()
    try:
        ids = sample(load(folder, device=device), windows, length, seed=prompts.seed, advance=advance)
        # Anything tidied up would be other tokens when it is read again.
        texts = [tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in ids]
        with writing(out, partial):
            partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            sync_path(partial)
            _require_place(out, overwrite=overwrite)
            partial.replace(out)
            sync_path(out.parent)
    finally:
        partial.unlink(missing_ok=True)


def sample(
    model: PreTrainedModel,
    prompts: Tensor,
    length: int,
    *,
    seed: int,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """Token ids (samples, length) that continue `prompts` (samples, p), drawn from what the model predicts, as it is.

    An end token is a token like others: another document follows. The model's generation config is replaced.

    Raises:
        CheckpointError: the model predicts NaN.
    """
    # Also where a config is given, the model's own fills what that leaves open: penalties, end tokens, and so on.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=length)
    device, streamer = model.device, None if advance is None else _Counter(advance)
    generate: Any = model.generate  # whose type its decorator hides
    with torch.inference_mode(), torch.random.fork_rng([] if device.type == "cpu" else [device]):
        first = prompts[:1].to(device)
        if bool(torch.isnan(model(first, attention_mask=torch.ones_like(first), use_cache=False).logits).any()):
            raise CheckpointError("the model predicts NaN, so there is nothing to sample; repair the checkpoint")
        torch.manual_seed(seed)
        made = [
            generate(
                batch,
                # Nothing is padding, whatever token it looks like.
                attention_mask=torch.ones_like(batch),
                generation_config=model.generation_config,
                streamer=streamer,
            ).cpu()
            for batch in prompts.to(device).split(max(_BATCH_TOKENS // length, 1))
        ]
    return torch.cat(made)


class _Counter(BaseStreamer):
    """Counts the tokens of a batch, prompts included, as they come."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def put(self, value: Tensor) -> None:
        """Count tokens."""
        self._advance(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


def _require_place(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that is in the way or has no place, or that would be read as something else."""
    if out.suffix.lower() not in _SUFFIXES:
        raise CheckpointError(f"{out} will hold JSON lines, which are read by their name: call it {out.stem}.jsonl")
    if not out.parent.is_dir():
        raise CheckpointError(f"cannot make {out}: the folder {out.parent} does not exist; create it first")
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder; choose another name")
    if os.path.lexists(out) and not overwrite:
        raise CheckpointError(f"output {out} exists; pass --overwrite to replace it, or choose another name")


def _require_model(folder: Path, prompt: int, length: int) -> None:
    """Refuse what is no causal language model, and documents that it cannot write."""
    skeleton = Skeleton.build(folder)
    architecture = type(skeleton.model).__name__
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise CheckpointError(
            f"{folder} is a {architecture}, which does not continue text; needed is a causal language model"
        )
    context = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise CheckpointError(f"--seq-len {length} is beyond the context of {folder}; needed are {context} or fewer")
    if length <= prompt:
        raise CheckpointError(
            f"--seq-len {length} leaves the model nothing to write after {prompt} tokens of text; give more than "
            "--prompt-tokens"
        )
