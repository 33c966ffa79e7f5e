r"""The tokenizer inside a GGUF file: byte-level BPE rebuilt from the metadata.

Source: the ``tokenizer.ggml.*`` keys of the GGUF description. A file holds the vocabulary, the merges and a type for
each token, but of the rule that first cuts text into words only a *name* (``tokenizer.ggml.pre``).

For ``smollm`` two readings of that name exist, and they disagree:

``"joined"`` (default)
    GPT-2's word pattern alone, as transformers' own GGUF conversion does (it has no entry for the name).
``"single"``
    each digit is cut off first, then GPT-2's pattern applies: llama.cpp's rule for the name, with which SmolLM2's
    vocabulary was made.

No merge of the vocabulary joins digits, hence ``1984`` is four tokens either way. What differs is white space of two
or more characters in front of a digit: ``"\n\n1"`` is ``\n`` ``\n`` ``1`` joined, but ``\n\n`` ``1`` single. The
default equals what everyone gets from transformers, so that answers and scores can be compared token for token.
The price: the model has seldom seen such runs apart. A numbered list of four steps costs it 123 nats joined and 112
single (whole text, SmolLM2-135M-Instruct); text without white-space runs before digits costs the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from chiasm.errors import CheckpointError
from chiasm.text.tokenizer import Tokenizer, byte_alphabet

__all__ = ["backend_from_gguf", "tokenizer_from_gguf"]

_CONTROL, _USER_DEFINED = 3, 4
_PREFIX = "tokenizer.ggml."
# Names whose rule is known; another name is refused, since a wrong rule would give wrong ids without a word.
_GPT2_WORDS = frozenset({"smollm", "gpt-2", "gpt2"})
_DIGITS_FIRST = frozenset({"smollm"})


def tokenizer_from_gguf(
    metadata: Mapping[str, Any], *, digits: Literal["joined", "single"] = "joined"
) -> Tokenizer:
    """Return the complete tokenizer: ids, roles of the special tokens, chat template.

    Raises:
        CheckpointError: as ``backend_from_gguf``, or a special token's id is outside the vocabulary.
    """
    backend = backend_from_gguf(metadata, digits=digits)
    tokens = metadata[_PREFIX + "tokens"]
    config: dict[str, Any] = {
        "add_bos_token": bool(metadata.get(_PREFIX + "add_bos_token", False)),
        "add_eos_token": bool(metadata.get(_PREFIX + "add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    length = metadata.get("llama.context_length")
    if isinstance(length, int):
        config["model_max_length"] = length
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for role, key in roles.items():
        index = metadata.get(f"{_PREFIX}{key}_token_id")
        if index is None:
            continue
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise CheckpointError(f"GGUF {key} token id {index!r} is outside the vocabulary: damaged file?")
        config[f"{role}_token"] = tokens[index]
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return Tokenizer(backend, config)


def backend_from_gguf(
    metadata: Mapping[str, Any], *, digits: Literal["joined", "single"] = "joined"
) -> Backend:
    """Rebuild the ``tokenizers`` object from GGUF metadata (see the module's text for ``digits``).

    Raises:
        CheckpointError: not a byte-level BPE, an unknown pre-tokenizer, or lists that do not fit together.
    """
    kind, rule = metadata.get(_PREFIX + "model"), metadata.get(_PREFIX + "pre")
    if kind != "gpt2" or rule not in _GPT2_WORDS:
        raise CheckpointError(
            f"GGUF tokenizer {kind!r} with pre-tokenizer {rule!r} is not supported: use the release's tokenizer.json"
        )
    tokens = _strings(metadata, "tokens")
    pairs = []
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise CheckpointError("GGUF tokenizer.ggml.tokens has a token twice: damaged file?")
    for merge in _strings(metadata, "merges"):
        left, _, right = merge.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise CheckpointError(
                f"GGUF merge {merge[:80]!r} joins what is not in the vocabulary: damaged file?"
            )
        pairs.append((left, right))
    types = metadata.get(_PREFIX + "token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError("GGUF tokenizer.ggml.token_type does not have one entry a token: damaged file?")

    # No unknown token: a byte that the vocabulary lacks (SmolLM2 lacks 21, among them six control characters and
    # the first byte of planes 4 and up) is dropped, as in the release.
    backend = Backend(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if digits == "single" and rule in _DIGITS_FIRST:
        words = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()

    spelling = set(byte_alphabet().values())
    control, plain = [], []
    for token, code in zip(tokens, types, strict=True):
        # A control token is written in text as it is spelled; one that leaves the byte alphabet could not be.
        if code == _CONTROL and set(token) <= spelling:
            control.append(AddedToken(token, normalized=False, special=True))
        elif code == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(control)
    backend.add_tokens(plain)
    if backend.get_vocab_size(with_added_tokens=True) != len(tokens):
        raise CheckpointError("GGUF special tokens do not keep their ids: damaged file?")
    return backend


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = metadata.get(_PREFIX + name)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise CheckpointError(
            f"GGUF {_PREFIX}{name} is not a list of strings: the file has no usable tokenizer"
        )
    return value
