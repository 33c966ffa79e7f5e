"""Tokenizers from the files of a slow release, converted in memory: `vocab.json` + `merges.txt`, or `tokenizer.model`.

Source: what transformers writes for its slow classes, which is what most InternVL releases hold. Byte-level BPE (the
Qwen2 and GPT-2 classes) has the vocabulary and the merges in two files; its rule that first cuts text into words is in
the class, hence only classes whose rule is known are read. SentencePiece (the Llama and InternLM2 classes) has one
binary file, see `chiasm.text.sentencepiece`.

Added tokens stand in `tokenizer_config.json` (`added_tokens_decoder`, complete since transformers 4.34), before that in
`added_tokens.json` and `special_tokens_map.json`. One whose id lies inside the vocabulary takes that place over:
InternLM2's `<|im_end|>` is 92542, which is `[UNUSED_TOKEN_145]` in its model file.

Rules of InternLM2's own class, from its public file: a begin token unless `add_bos_token` is false, white space kept as
the model file says, ids of begin and end from the model file. Not followed: its decoding removes the space before
punctuation (`a , b` becomes `a, b`), which would change what the model wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from chiasm.errors import CheckpointError
from chiasm.text.sentencepiece import Prefix, SentencePieceModel, backend_from_model, read_model

__all__ = ["QWEN2_WORDS", "added_tokens", "from_model_file", "from_vocab_and_merges", "read_json"]

VOCAB, MERGES, MODEL = "vocab.json", "merges.txt", "tokenizer.model"
_ADDED, _SPECIAL = "added_tokens.json", "special_tokens_map.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2, 2.5 and 3 cut text into words."""

_BYTE_LEVEL = ("Qwen2Tokenizer", "GPT2Tokenizer")
_PIECES = ("LlamaTokenizer", "InternLM2Tokenizer")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file; CheckpointError where it is malformed."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{file}: not readable as JSON ({reason}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: a JSON object was expected, not {type(value).__name__}: download it again"
        )
    return value


def _is_id(value: object) -> bool:
    """Whether the library can count so far: its ids are of 32 bits."""
    return isinstance(value, int) and 0 <= value < 1 << 32


@dataclass(frozen=True, slots=True)
class _Added:
    """Added tokens by id, and special ones whose id is yet to be found."""

    by_id: dict[int, AddedToken]
    homeless: tuple[str, ...]


def added_tokens(folder: Path, config: Mapping[str, Any], *, normalized: bool) -> _Added:
    """The added tokens of a folder.

    Args:
        folder: the release's.
        config: its ``tokenizer_config.json``, with the roles filled in from ``special_tokens_map.json``.
        normalized: honour the flag of that name; else tokens are found in the text as it is written.

    Raises:
        CheckpointError: a table is malformed, or two of them contradict each other.
    """
    special = _special_names(config)
    table = config.get("added_tokens_decoder")
    by_id: dict[int, AddedToken] = {}
    if isinstance(table, dict):
        for key, entry in table.items():
            # The length first: int() itself refuses thousands of digits.
            index = int(key) if isinstance(key, str) and key.isdecimal() and len(key) <= 10 else -1
            if not _is_id(index) or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise CheckpointError(
                    f"{folder / 'tokenizer_config.json'}: added token {key[:40]!r} is malformed: download it again"
                )
            by_id[index] = AddedToken(
                entry["content"],
                single_word=bool(entry.get("single_word")),
                lstrip=bool(entry.get("lstrip")),
                rstrip=bool(entry.get("rstrip")),
                normalized=normalized and bool(entry.get("normalized")),
                special=bool(entry.get("special")) or entry["content"] in special,
            )
    known = {token.content for token in by_id.values()}
    for content, index in read_json(folder / _ADDED).items():
        if not _is_id(index):
            raise CheckpointError(f"{folder / _ADDED}: the id of {content!r} is {index!r}: download it again")
        if content in known:
            continue
        if index in by_id:
            raise CheckpointError(
                f"{folder}: the id {index} belongs to {by_id[index].content!r} and to {content!r}: correct one"
            )
        is_special = content in special
        by_id[index] = AddedToken(content, normalized=normalized and not is_special, special=is_special)
        known.add(content)
    return _Added(by_id, tuple(name for name in special if name not in known))


def _special_names(config: Mapping[str, Any]) -> list[str]:
    """Spellings of the special tokens that the configuration names, in order."""
    values = [config.get(role) for role in _ROLES]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        values += list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
    contents = [value.get("content") if isinstance(value, dict) else value for value in values]
    return list(dict.fromkeys(value for value in contents if isinstance(value, str) and value))


def _completed(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with what only ``special_tokens_map.json`` says."""
    stated = read_json(folder / _SPECIAL)
    keys = (*_ROLES, "additional_special_tokens")
    return {key: stated[key] for key in keys if key in stated} | dict(config)


def _as_fast(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration to save beside a converted tokenizer: its class, or remote code, would build it anew."""
    rest = {key: value for key, value in config.items() if key not in ("auto_map", "legacy")}
    return rest | {"tokenizer_class": "PreTrainedTokenizerFast"}


def _class_name(folder: Path, config: Mapping[str, Any], known: tuple[str, ...]) -> str:
    """Whose rules a folder follows; CheckpointError unless they are known: wrong ones give wrong ids unseen."""
    name = config.get("tokenizer_class")
    stem = name.removesuffix("Fast") if isinstance(name, str) else None
    if stem not in known:
        said = "names no tokenizer class" if name is None else f"has the tokenizer class {name!r}"
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} {said}, known for these files are {', '.join(known)}: "
            "write a tokenizer.json with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return stem


def _with_added(backend: Backend, added: _Added, folder: Path) -> Backend:
    """Give the backend its added tokens, each at its id (those of `_displaced` are in its vocabulary already)."""
    backend.add_tokens([token for _, token in sorted(added.by_id.items())])
    for index, token in added.by_id.items():
        if backend.token_to_id(token.content) != index:
            raise CheckpointError(
                f"{folder}: the added token {token.content!r} has the id {index} in one file and "
                f"{backend.token_to_id(token.content)} by another: files of different releases?"
            )
    backend.add_tokens([AddedToken(name, normalized=False, special=True) for name in added.homeless])
    return backend


# --- vocab.json + merges.txt -----------------------------------------------------------------------------------------


def from_vocab_and_merges(folder: Path, config: Mapping[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The byte-level BPE of ``vocab.json`` and ``merges.txt``, and the completed configuration.

    Raises:
        CheckpointError: a file is missing or malformed, the files do not fit together, or the class is not known.
    """
    config = _completed(folder, config)
    kind = _class_name(folder, config, _BYTE_LEVEL)
    vocab = read_json(folder / VOCAB)
    if not vocab or not all(map(_is_id, vocab.values())):
        raise CheckpointError(f"{folder / VOCAB} is no table of ids: download it again")
    if len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{folder / VOCAB} has an id twice: download it again")
    merges = _merges(folder / MERGES, vocab)
    if kind == "Qwen2Tokenizer":
        # The defaults of its class, which a saved configuration may leave out.
        config = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"} | config
    added = added_tokens(folder, config, normalized=True)
    displaced = _displaced(vocab, added)
    if displaced:
        gone = set(displaced.values()) | {text for text, index in vocab.items() if index in displaced}
        vocab = {text: index for text, index in vocab.items() if text not in gone}
        vocab |= {text: index for index, text in displaced.items()}
        merges = [pair for pair in merges if not gone.intersection((*pair, pair[0] + pair[1]))]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    prefix = bool(config.get("add_prefix_space"))
    words: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=True)
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        words = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)]
        )
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    return _with_added(backend, added, folder), _as_fast(config)


def _displaced(vocab: Mapping[str, int], added: _Added) -> dict[int, str]:
    """Id -> text of the added tokens that must stand in the vocabulary itself, for they would not get their ids else.

    None where those that are new to it simply follow, which is how releases are made; otherwise all of them.
    """
    size = len(vocab)
    new = [index for index, token in sorted(added.by_id.items()) if vocab.get(token.content) != index]
    if new == list(range(size, size + len(new))) and not any(
        added.by_id[index].content in vocab for index in new
    ):
        return {}
    return {index: added.by_id[index].content for index in added.by_id}


def _merges(path: Path, vocab: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pairs of ``merges.txt``, best first."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has {VOCAB} but no {MERGES}: download it too")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as text ({error}): download it again") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(
                f"{path}:{number}: {line[:80]!r} joins what is not in {VOCAB}: files of different releases?"
            )
        pairs.append((left, right))
    return pairs


# --- tokenizer.model -------------------------------------------------------------------------------------------------


def from_model_file(folder: Path, config: Mapping[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer of a SentencePiece ``tokenizer.model``, and the completed configuration.

    Raises:
        CheckpointError: the file is malformed or of a kind that is not supported, or the class is not known.
    """
    config = _completed(folder, config)
    kind = _class_name(folder, config, _PIECES)
    model = read_model(folder / MODEL)
    roles = {"bos_token": model.bos, "eos_token": model.eos, "pad_token": model.pad}
    if kind == "InternLM2Tokenizer":
        roles["pad_token"] = model.eos
    for role, index in roles.items():
        piece = model.piece_at(index)
        if role not in config and piece is not None:
            config[role] = piece
    config = {"add_bos_token": True, "add_eos_token": False} | config
    added = added_tokens(folder, config, normalized=False)
    renamed = _displaced({piece.text: n for n, piece in enumerate(model.pieces)}, added)
    backend = backend_from_model(model, prefix=_prefix(kind, config, model), renamed=renamed)
    backend = _with_added(backend, added, folder)
    backend.post_processor = _ends(backend, config)
    return backend, _as_fast(config)


def _ends(backend: Backend, config: Mapping[str, Any]) -> processors.PostProcessor:
    """The begin and end tokens as a rule of the backend, for other readers of a saved file (see `Tokenizer.encode`)."""
    words, ids = ["$A"], []
    for switch, role in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        token = config.get(role)
        text = token.get("content") if isinstance(token, dict) else token
        index = backend.token_to_id(text) if config.get(switch) and isinstance(text, str) else None
        if index is not None and isinstance(text, str):
            words = [text, *words] if role == "bos_token" else [*words, text]
            ids.append((text, index))
    return processors.TemplateProcessing(single=words, special_tokens=list(dict.fromkeys(ids)))


def _prefix(kind: str, config: Mapping[str, Any], model: SentencePieceModel) -> Prefix:
    """Where the space of a text goes.

    InternLM2's class hands each stretch of text to SentencePiece. Llama's does so unless `legacy` is false, which puts
    a space at the very beginning only (there a text that begins with white space of its own gets no other, as in
    transformers' fast classes).
    """
    wanted = config.get("add_prefix_space")
    if not (wanted if isinstance(wanted, bool) and kind == "LlamaTokenizer" else model.dummy_prefix):
        return "never"
    return "first" if kind == "LlamaTokenizer" and config.get("legacy") is False else "each"
