"""SentencePiece models written by hand, and their encoding spelled out slowly: the fast backend is held against it.

The writer knows the public `sentencepiece_model.proto` by itself, apart from the package's parser. The slow twin
follows the documented algorithms: normalise, then merge the best-scored pair of neighbours (leftmost among equals)
until there is none, or take the likeliest path.
"""

import struct
from functools import cache

from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tiny_tokenizers import CORPUS, IMAGE_TOKENS

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"


def varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def message(fields: list[tuple[int, object]]) -> bytes:
    """(number, bool | int | float | str | bytes) in the order given."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(int(value))
        else:
            data = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def model_bytes(
    pieces: list[tuple[str, float, int]],
    *,
    kind: int = 2,
    byte_fallback: bool = True,
    dummy_prefix: bool = True,
    collapse: bool = False,
    suffix: bool = False,
    bos: int = 1,
    eos: int = 2,
    pad: int = -1,
) -> bytes:
    """A model file: (text, score, type) of each piece; kind 1 unigram, 2 BPE, 3 word, 4 characters."""
    body = []
    for text, score, what in pieces:
        fields: list[tuple[int, object]] = [(1, text), (2, float(score))]
        body.append((1, message(fields + ([(3, what)] if what != NORMAL else []))))
    trainer = [(3, kind), (4, len(pieces)), (24, suffix), (35, byte_fallback)]
    trainer += [(40, 0), (41, bos), (42, eos), (43, pad), (45, "<unk>")]
    normalizer = [(1, "identity"), (3, dummy_prefix), (4, collapse), (5, True)]
    return message([*body, (2, message(trainer)), (3, message(normalizer))])


@cache
def trained_pieces(size: int = 420) -> tuple[tuple[str, float, int], ...]:
    """<unk> <s> </s>, the bytes, merged pieces with falling scores, then characters: as a trained BPE model is."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+|\n"), "merged_with_next")
    more = ["aaaa bbbb ababab abcabc === ---- 0000 haha    ", "a  b   c    d =-=-=- <s> </s> <0x0A>"] * 4
    backend.train_from_iterator([*CORPUS, *more], trainers.BpeTrainer(vocab_size=size, show_progress=False))
    words = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    words = [item for item in words if item[0] not in IMAGE_TOKENS]
    merged = [word for word, _ in words if len(word) > 1]
    single = [word for word, _ in words if len(word) == 1]
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    pieces += [(word, float(-n), NORMAL) for n, word in enumerate([*merged, *single])]
    return tuple(pieces)


def unigram_pieces() -> tuple[tuple[str, float, int], ...]:
    """The same words with log probabilities without ties."""
    head = [piece for piece in trained_pieces() if piece[2] != NORMAL]
    words = [piece[0] for piece in trained_pieces() if piece[2] == NORMAL]
    return (
        *head,
        *(
            (w, -4.0 - 0.013717 * n - (6.0 if len(w) == 1 else 0.0) + 0.31 * len(w), NORMAL)
            for n, w in enumerate(words)
        ),
    )


# --- the slow twin ---------------------------------------------------------------------------------------------------


def slow_normalize(text: str, *, dummy_prefix: bool, collapse: bool) -> str:
    if collapse:
        text = text.lstrip(" ")
        while "  " in text:
            text = text.replace("  ", " ")
        text = text.rstrip(" " + SPACE)
    if not text:
        return ""
    return ((" " if dummy_prefix else "") + text).replace(" ", SPACE)


def slow_encode(
    text: str,
    pieces: tuple[tuple[str, float, int], ...],
    *,
    kind: int = 2,
    byte_fallback: bool = True,
    dummy_prefix: bool = True,
    collapse: bool = False,
) -> list[int]:
    """Ids of a text without control pieces in it, by the letter of the algorithm."""
    text = slow_normalize(text, dummy_prefix=dummy_prefix, collapse=collapse)
    score = {p: s for p, s, k in pieces if k == NORMAL}
    ids = {p: n for n, (p, _, k) in enumerate(pieces) if k in (NORMAL, BYTE)}
    words = _merge(text, score) if kind == 2 else _viterbi(text, score)
    out: list[int] = []
    unknown_before = False
    for word in words:
        if word in score:
            out.append(ids[word])
            unknown_before = False
        elif byte_fallback:
            out += [ids[f"<0x{byte:02X}>"] for byte in word.encode()]
        else:
            out += [] if unknown_before else [0]
            unknown_before = True
    return out


def _merge(text: str, score: dict[str, float]) -> list[str]:
    words = list(text)
    while True:
        best = None
        for n in range(len(words) - 1):
            union = words[n] + words[n + 1]
            if union in score and (best is None or score[union] > score[words[best] + words[best + 1]]):
                best = n
        if best is None:
            return words
        words[best : best + 2] = [words[best] + words[best + 1]]


def _viterbi(text: str, score: dict[str, float]) -> list[str]:
    unknown = min(score.values()) - 10
    best: list[tuple[float, int]] = [(0.0, 0)] + [(float("-inf"), 0)] * len(text)
    for end in range(1, len(text) + 1):
        for begin in range(end):
            word = text[begin:end]
            price = score.get(word, unknown if len(word) == 1 else None)
            if price is not None and best[begin][0] + price > best[end][0]:
                best[end] = (best[begin][0] + price, begin)
    words, end = [], len(text)
    while end:
        words.append(text[best[end][1] : end])
        end = best[end][1]
    return words[::-1]
