"""A tokenizer as the `tokenizer.ggml.*` metadata of a GGUF file, so that llama.cpp gives the same ids.

Source: the GGUF description, and how llama.cpp reads these keys (`src/llama-vocab.cpp`) and its converter writes them.
`gguf_vocab.py` is the way back for byte-level vocabularies.

Of the two kinds that llama.cpp computes and InternVL's language models have, either can be written where its rules are
ones that llama.cpp has:

- *byte-level BPE* (``gpt2``): tokens and merges as they are. The rule that cuts text into words has only a *name* in
  the file, so the tokenizer's own rule must be one of those in `_WORDS`; llama.cpp never normalises, so a tokenizer
  that applies NFC gives other ids there for text that is not NFC.
- *SentencePiece BPE* (``llama``): llama.cpp joins the neighbours whose union has the best score, so a piece's score is
  minus the rank of the first merge that makes it. Character maps, collapsed white space and unigram models are refused.

Phi-3's control tokens swallow the white space behind them. llama.cpp has no key for that: it does it for all control
tokens but three where `general.name` says "phi-3", so that name is written when, and only when, the tokenizer does too.

What is not covered is refused with one line: a wrong rule would give wrong ids without a word.
"""

from __future__ import annotations

import json
from typing import Any

from chiasm.errors import CheckpointError
from chiasm.text.sentencepiece import SPACE
from chiasm.text.tokenizer import Tokenizer
from chiasm.text.vocab_files import QWEN2_WORDS

__all__ = ["tokenizer_to_gguf"]

_PREFIX = "tokenizer.ggml."
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Llama 3's cut: Qwen2's with up to three digits a word.
_LLAMA3_WORDS = QWEN2_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
# (what stands before ByteLevel, whether ByteLevel cuts by GPT-2's own pattern) -> name of the rule in llama.cpp.
_WORDS: dict[tuple[str, bool], str] = {
    (QWEN2_WORDS, False): "qwen2",
    (_LLAMA3_WORDS, False): "llama-bpe",
    ("", True): "gpt-2",
    ("digits", True): "smollm",
}
_PHI3 = ("phi-3", "phi3")
_WHOLE_WORDS = "llama-bpe"  # the rule under which llama.cpp takes a word of the vocabulary without merging


def tokenizer_to_gguf(
    tokenizer: Tokenizer,
    rows: int,
    *,
    name: str = "model",
    end: int | None = None,
    begin: bool = True,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """The metadata of a tokenizer, `general.name` among them.

    Args:
        tokenizer: the model's.
        name: of the model.
        rows: of the word table; rows that no token has are listed as unused.
        end: id of the token that ends an answer, where it is not the tokenizer's own end token.
        begin: whether a prompt starts with the begin token, if the tokenizer puts one.
        chat_template: Jinja source; None for the tokenizer's own, "" for none at all.

    Raises:
        CheckpointError: llama.cpp has no rule that gives this tokenizer's ids, or it has ids beyond the rows.
    """
    state = json.loads(tokenizer.backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"is a {model.get('type')} model and llama.cpp's rules here are for BPE")
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in model["merges"]]
    byte_level = "ByteLevel" in json.dumps(state.get("pre_tokenizer"))
    out = _byte_level(state, merges) if byte_level else _pieces(state)
    tokens, types = _entries(tokenizer, rows, byte_level=byte_level, unknown=model.get("unk_token"))
    out[_PREFIX + "tokens"] = tokens
    out[_PREFIX + "token_type"] = types
    if not byte_level:
        out[_PREFIX + "scores"] = _scores(tokens, types, merges)
    out["general.name"] = _name(tokenizer, name)
    return out | _roles(tokenizer, end, begin) | _template(tokenizer, chat_template)


def _refusal(what: str) -> CheckpointError:
    return CheckpointError(
        f"cannot write this tokenizer to GGUF: it {what}; serve the original or hf layout instead"
    )


def _byte_level(state: dict[str, Any], merges: list[tuple[str, ...]]) -> dict[str, Any]:
    normalizer = state.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _refusal(f"normalises text by {normalizer.get('type')}")
    rule = _WORDS.get(_cut(state["pre_tokenizer"]))
    if rule is None:
        raise _refusal("cuts text into words by a rule that llama.cpp has no name for")
    if bool(state["model"].get("ignore_merges")) != (rule == _WHOLE_WORDS):
        raise _refusal(f"cuts words as {rule} but does not merge as llama.cpp does under that name")
    if not merges:
        raise _refusal("has no merges")
    return {
        _PREFIX + "model": "gpt2",
        _PREFIX + "pre": rule,
        _PREFIX + "merges": [" ".join(pair) for pair in merges],
    }


def _cut(rule: dict[str, Any]) -> tuple[str, bool]:
    """The key into `_WORDS` of a byte-level pre-tokenizer; one that is not there for any other."""
    steps = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return "another", False
    first = "" if not before else "another"
    if len(before) == 1:
        step = before[0]
        pattern = step.get("pattern", {}).get("Regex")
        if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            first = pattern or "another"
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            first = "digits"
    return first, bool(last.get("use_regex", True))


def _pieces(state: dict[str, Any]) -> dict[str, Any]:
    if not state["model"].get("byte_fallback"):
        raise _refusal("is neither byte-level nor spells unknown characters as bytes")
    if state.get("pre_tokenizer") is not None:
        raise _refusal(
            "puts a space in front of the first word only (llama.cpp: of every stretch or of none)"
        )
    normalizer = state.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prefix = bool(steps) and steps[0] == {"type": "Prepend", "prepend": SPACE}
    if steps[prefix:] != [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]:
        raise _refusal("normalises text by a character map or collapses white space")
    return {
        _PREFIX + "model": "llama",
        _PREFIX + "pre": "default",
        _PREFIX + "add_space_prefix": prefix,
    }


def _entries(
    tokenizer: Tokenizer, rows: int, *, byte_level: bool, unknown: str | None
) -> tuple[list[str], list[int]]:
    """Text and type of every row."""
    texts: list[str] = [f"[PAD{index}]" for index in range(rows)]
    types = [_UNUSED] * rows
    added = tokenizer.backend.get_added_tokens_decoder()
    for text, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if index >= rows:
            raise CheckpointError(
                f"the tokenizer has the id {index} but the word table only {rows} rows: they are not of one model"
            )
        texts[index], types[index] = text, _NORMAL
        if not byte_level and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[index] = _BYTE
        if index in added:
            types[index] = _CONTROL if added[index].special else _USER_DEFINED
        if text == unknown and not byte_level:
            types[index] = _UNKNOWN
    if len(set(texts)) != rows:
        raise _refusal("spells two tokens alike (a padding row's name among them)")
    if not all(texts) or any("\0" in text for text in texts):
        # llama.cpp reads texts up to a NUL; a piece that is a NUL would be an empty one.
        at = next(index for index, text in enumerate(texts) if not text or "\0" in text)
        texts[at], types[at] = f"[NUL{at}]", _UNUSED
        if not all(texts) or any("\0" in text for text in texts):
            raise _refusal("has several tokens with a NUL character")
    return texts, types


def _scores(tokens: list[str], types: list[int], merges: list[tuple[str, ...]]) -> list[float]:
    """Minus the rank at which a piece is made; added tokens and single characters are never made by joining."""
    rank: dict[str, int] = {}
    for n, pair in enumerate(merges, start=1):
        rank.setdefault("".join(pair), n)
    last = float(len(merges) + 1)
    if last > 1 << 24:
        raise _refusal("has more merges than scores can tell apart")
    return [
        0.0 if kind in (_BYTE, _UNKNOWN) else -float(rank.get(text, last))
        for text, kind in zip(tokens, types, strict=True)
    ]


def _name(tokenizer: Tokenizer, name: str) -> str:
    """A name under which llama.cpp treats white space beside control tokens as the tokenizer does."""
    added = tokenizer.backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.single_word for token in added):
        raise _refusal("has added tokens that look at what stands before them")
    plain = [phi for phi in _PHI3 if phi in name.lower()]
    if not any(token.rstrip for token in added):
        return name if not plain else "model"
    control = {token.content: token.rstrip for token in added if token.special}
    exempt, needed = ("<unk>", "<s>", "<|endoftext|>"), ("</s>", "<unk>", "<s>", "<|endoftext|>")
    if any(tokenizer.token_to_id(text) is None for text in needed) or any(
        strips == (text in exempt) for text, strips in control.items()
    ):
        raise _refusal("has some control tokens that swallow white space and others that do not")
    return name if plain else f"phi-3 {name}"


def _roles(tokenizer: Tokenizer, end: int | None, begin: bool) -> dict[str, Any]:
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id if end is None else end,
        "padding": tokenizer.pad_id,
    }
    out: dict[str, Any] = {
        f"{_PREFIX}{role}_token_id": index for role, index in ids.items() if index is not None
    }
    puts = tokenizer.bos_id is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [
        tokenizer.bos_id
    ]
    out[_PREFIX + "add_bos_token"] = begin and puts
    out[_PREFIX + "add_eos_token"] = False
    return out


def _template(tokenizer: Tokenizer, given: str | None) -> dict[str, Any]:
    source = tokenizer.chat_template if given is None else given
    return {"tokenizer.chat_template": source} if source else {}
