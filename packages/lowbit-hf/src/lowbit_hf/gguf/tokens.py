"""Tokenizers: `tokenizer.json` as llama.cpp's metadata, and back.

llama.cpp has its own code for each way of cutting text before merges apply, and a file names one; so a tokenizer can be
told only where its way is known here. The whole `tokenizer.json` goes along under a key that GGUF reserves for it:
programs that read it lose nothing, llama.cpp passes over it.

Source: llama.cpp's `src/llama-vocab.cpp` and `get_vocab_base` in its `conversion/base.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lowbit.errors import CheckpointError
from lowbit.header import quote
from lowbit_hf.gguf.header import Header, Value

FILE = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"

_LARGEST = 128 << 20
_WHOLE = "tokenizer.huggingface.json"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name: its pattern, and whether a word that is a token is not merged.
_PRE = {
    "gpt-2": (_GPT2, False),
    "qwen2": (_WORDS + r"\p{N}" + _REST, False),
    "llama-bpe": (_WORDS + r"\p{N}{1,3}" + _REST, True),
    "smaug-bpe": (_WORDS + r"\p{N}{1,3}" + _REST, False),
}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a file is told of a tokenizer, each by its key."""

    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    others: Mapping[str, str | int | bool]


def vocabulary_of(folder: Path, size: int, pre: str | None) -> Vocabulary:
    """The vocabulary of a folder's tokenizer, for embeddings of `size` tokens; `pre` names how text is cut if given.

    Raises:
        CheckpointError: there is no tokenizer.json, or llama.cpp has no such tokenizer.
    """
    path = folder / FILE
    text, raw, tokenizer = _read(path)
    try:
        _require_bytes(raw)
        name = pre or _name_of(raw)
        added = {token["id"]: token for token in raw["added_tokens"]}
        tokens, kinds = _tokens(tokenizer, added, size)
        merges = [_merge(pair) for pair in raw["model"]["merges"]]
        told = {"ggml.model": "gpt2", "ggml.pre": name, **_ends(folder, tokenizer), "huggingface.json": text}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is not as tokenizers writes it: {error!r}") from error
    return Vocabulary(tokens, kinds, merges, {f"tokenizer.{key}": value for key, value in told.items()})


def _read(path: Path) -> tuple[str, dict[str, Any], Tokenizer]:
    """A tokenizer.json, what it says, and the tokenizer."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= _LARGEST else ""
        return text, json.loads(text), Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exceptions
        msg = f"{path} cannot be read, and a GGUF file holds the tokenizer too: {error}"
        raise CheckpointError(msg) from error


def _require_bytes(raw: Mapping[str, Any]) -> None:
    """Refuse all but byte-level BPE as llama.cpp does it."""
    model, normalizer = raw["model"], raw.get("normalizer")
    if model["type"] != "BPE" or model.get("byte_fallback"):
        what = "BPE with byte fallback (SentencePiece's)" if model["type"] == "BPE" else model["type"]
        raise CheckpointError(f"its model is {what}; lowbit writes byte-level BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise CheckpointError(f"its model has {key} {model[key]!r}, which llama.cpp does not know")
    # llama.cpp leaves NFC out, as its own converter does.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise CheckpointError(f"its normalizer is {normalizer['type']}, which llama.cpp does not know")
    for token in raw["added_tokens"]:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token[flag]]
        if flags:
            raise CheckpointError(
                f"the token {token['content']!r} is {', '.join(flags)}, which llama.cpp does not know"
            )


def _name_of(raw: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way that text is cut.

    Raises:
        CheckpointError: it has none that lowbit knows.
    """
    whole: dict[str, Any] = raw["pre_tokenizer"] or {"type": "None"}
    parts: list[dict[str, Any]] = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    last, pattern = parts[-1], None
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if len(parts) == 1 and last["use_regex"]:
            pattern = _GPT2
        elif len(parts) == 2 and not last["use_regex"] and parts[0]["type"] == "Split" and not parts[0]["invert"]:
            pattern = parts[0]["pattern"].get("Regex") if parts[0]["behavior"] == "Isolated" else None
    wanted = (pattern, bool(raw["model"].get("ignore_merges")))
    found = next((name for name, way in _PRE.items() if way == wanted), None)
    if found is None:
        what = f"the pattern {quote(pattern)}" if pattern else quote(whole)
        raise CheckpointError(
            f"it cuts text by {what}, which lowbit knows no name of llama.cpp's for; it knows {', '.join(_PRE)}. Name "
            "the nearest by --pre NAME: llama.cpp then cuts text that way"
        )
    return found


def _tokens(tokenizer: Tokenizer, added: Mapping[int, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens and their kinds by id; ids that the embeddings have and the tokenizer has not are unused."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for token, number in vocabulary.items():
        if number >= size:
            raise CheckpointError(f"the token {token!r} is number {number}, and the embeddings hold {size}")
        tokens[number], kinds[number] = token, _NORMAL
    for number, token in added.items():
        kinds[number] = _CONTROL if token["special"] else _USER
    return tokens, kinds


def _merge(pair: str | list[str]) -> str:
    """Two tokens with a space between; one in a token is spelled as its byte is."""
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return " ".join(part.replace(" ", "Ġ") for part in (left, right))


def _ends(folder: Path, tokenizer: Tokenizer) -> dict[str, str | int | bool]:
    """Special tokens, which of them text starts and ends with, and the chat template."""
    said: dict[str, Any] = {}
    for name in ("config.json", CONFIG):
        path = folder / name
        said |= cast("dict[str, Any]", json.loads(path.read_bytes())) if path.is_file() else {}
    told: dict[str, str | int | bool] = {}
    for role, theirs in _ROLES.items():
        token = said.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(content) if isinstance(content, str) else said.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            told[f"ggml.{theirs}_token_id"] = number
    plain, whole = (tokenizer.encode("a", add_special_tokens=each).ids for each in (False, True))
    before = whole[: whole.index(plain[0])] if plain else []
    after = whole[len(before) + len(plain) :]
    for role, found in (("bos", before), ("eos", after)):
        number = told.get(f"ggml.{role}_token_id")
        if found not in ([], [number]):
            raise CheckpointError(
                f"it puts the tokens {found} around text, and llama.cpp only the {role} token {number}"
            )
        told[f"ggml.add_{role}_token"] = bool(found)
    template = said.get("chat_template")
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    return told | ({"chat_template": template} if isinstance(template, str) and template else {})


def files_of(header: Header) -> dict[str, str]:
    """The tokenizer's files by name, as a Hugging Face folder has them; none where there is no tokenizer.

    Raises:
        CheckpointError: it is of a kind that lowbit does not read.
    """
    metadata = header.metadata
    if "tokenizer.ggml.model" not in metadata:
        return {}
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, theirs in _ROLES.items():
        number = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            told[f"{role}_token"] = tokens[number]
    files = {FILE: _tokenizer_of(metadata, tokens), CONFIG: json.dumps(told, indent=2) + "\n"}
    template = metadata.get("tokenizer.chat_template")
    return files | ({TEMPLATE: template} if isinstance(template, str) else {})


def tokenizer_of(header: Header) -> PreTrainedTokenizerFast:
    """The tokenizer of a file.

    Raises:
        CheckpointError: there is none, or lowbit does not read its kind.
    """
    files = files_of(header)
    if not files:
        raise CheckpointError("the file holds no tokenizer")
    named = {key: value for key, value in json.loads(files[CONFIG]).items() if key.endswith("_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(files[FILE]), **named)


def _tokenizer_of(metadata: Mapping[str, Value], tokens: Sequence[str]) -> str:
    """The tokenizer.json that goes along, or one made of tokens and merges."""
    whole = metadata.get(_WHOLE)
    try:
        built = Tokenizer.from_str(whole) if isinstance(whole, str) else _built(metadata, tokens)
        vocabulary = built.get_vocab()
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions
        raise CheckpointError(f"the tokenizer in the metadata cannot be read: {error}") from error
    # A file that tells llama.cpp of other tokens than everybody else would mean two things.
    if not all(0 <= i < len(tokens) and tokens[i] == token for token, i in vocabulary.items()):
        raise CheckpointError(f"{_WHOLE} and tokenizer.ggml.tokens are of different tokenizers")
    return whole if isinstance(whole, str) else built.to_str(pretty=True)


def _built(metadata: Mapping[str, Value], tokens: Sequence[str]) -> Tokenizer:
    model, pre = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE:
        raise CheckpointError(
            f"its tokenizer is {model!r} cut by {pre!r}; lowbit reads 'gpt2' cut by {', '.join(map(repr, _PRE))}, or "
            f"any that goes along as {_WHOLE}"
        )
    pattern, ignore = _PRE[str(pre)]
    merges = [cast("tuple[str, str]", tuple(each.split(" "))) for each in _strings(metadata, "tokenizer.ggml.merges")]
    kinds = metadata.get("tokenizer.ggml.token_type", (_NORMAL,) * len(tokens))
    if not isinstance(kinds, tuple) or len(kinds) != len(tokens):
        raise CheckpointError("tokenizer.ggml.token_type is no kind for each token")
    named = {t: i for i, t in enumerate(tokens) if kinds[i] != _UNUSED or not re.fullmatch(r"\[PAD\d+\]", t)}
    built = Tokenizer(models.BPE(vocab=named, merges=merges, ignore_merges=ignore))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER):
            built.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False)])
    ends = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
    around = {
        role: [(tokens[number], number)]
        for role, number in ends.items()
        # llama.cpp takes Llama 3's way to cut text for a beginning too, where nothing else is said.
        if metadata.get(f"tokenizer.ggml.add_{role}_token", role == "bos" and pre == "llama-bpe")
        and isinstance(number, int)
        and 0 <= number < len(tokens)
    }
    if around:
        single = [*(t for t, _ in around.get("bos", [])), "$A", *(t for t, _ in around.get("eos", []))]
        specials = [each for pairs in around.values() for each in pairs]
        built.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    return built


def _strings(metadata: Mapping[str, Value], key: str) -> tuple[str, ...]:
    found = metadata.get(key)
    if not isinstance(found, tuple) or not all(isinstance(each, str) for each in found):
        raise CheckpointError(f"the metadata {key!r} is no list of strings")
    return cast("tuple[str, ...]", found)
