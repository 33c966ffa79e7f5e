"""Captions against several references: BLEU-1 … 4, ROUGE-L, CIDEr-D, as COCO's evaluation defines them.

Sources: Papineni et al. 2002; Lin 2004; Vedantam et al. 2015 and the coco-caption code, whose choices are kept: BLEU of
the corpus with the closest reference length (shorter of two equally close); ROUGE-L of beta 1.2 with the best precision
and the best recall over references, each for itself; CIDEr-D with n = 1 … 4, sigma = 6, clipped counts, document
frequencies of the references at hand, times 10.

Tokenizer: coco-caption runs Stanford's PTB tokenizer (Java) and then drops punctuation. Here, in plain Python: lower
case; words are runs of letters, digits and inner apostrophes, points or hyphens; a clitic becomes a word of its own
("dog's" -> dog 's, "isn't" -> is n't) as PTB has it; everything else separates. On ordinary captions that gives the
same words; it differs for abbreviations ("U.S."), emoticons and quotation marks. Given the same words the scores are
equal (tests).

Shape legend: N pictures.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from chiasm.errors import DataError

__all__ = ["CAPTION_VERSION", "bleu", "cider_d", "rouge_l", "tokenize_caption"]

CAPTION_VERSION = 1

Words = Sequence[str]

_WORD = re.compile(r"\w+(?:[.\-'’]\w+)*")
_CLITIC = re.compile(r"(n['’]t|['’](?:s|m|d|re|ve|ll))$")


def tokenize_caption(text: str) -> list[str]:
    """Words of a caption, see the module's first lines."""
    words = []
    for word in _WORD.findall(text.lower()):
        clitic = _CLITIC.search(word)
        if clitic and clitic.start():
            words += [word[: clitic.start()], clitic[0].replace("’", "'")]
        else:
            words.append(word)
    return words


def bleu(captions_N: Sequence[Words], references_N: Sequence[Sequence[Words]], n: int = 4) -> list[float]:
    """Return corpus BLEU-1 … BLEU-n in 0 … 1.

    Raises:
        DataError: nothing to score, or a picture without references.
    """
    _check(captions_N, references_N)
    right, said = np.zeros(n), np.zeros(n)
    length = closest = 0
    for caption, references in zip(captions_N, references_N, strict=True):
        length += len(caption)
        closest += min((abs(len(r) - len(caption)), len(r)) for r in references)[1]
        for k in range(n):
            given = _grams(caption, k + 1)
            most: Counter[tuple[str, ...]] = Counter()
            for reference in references:
                most |= _grams(reference, k + 1)
            right[k] += (given & most).total()
            said[k] += max(0, len(caption) - k)
    if not length:
        return [0.0] * n
    # The constants of the reference code keep an empty order from dividing by 0, and its score at almost 0.
    precisions = (right + 1e-15) / (said + 1e-9)
    ratio = (length + 1e-15) / (closest + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(np.prod(precisions[: k + 1]) ** (1 / (k + 1)) * brevity) for k in range(n)]


def rouge_l(
    captions_N: Sequence[Words], references_N: Sequence[Sequence[Words]], beta: float = 1.2
) -> np.ndarray:
    """Return (N,) ROUGE-L F scores, (1 + beta²) P R / (R + beta² P) with P and R the best over the references.

    Raises:
        DataError: nothing to score, or a picture without references.
    """
    _check(captions_N, references_N)
    scores = []
    for caption, references in zip(captions_N, references_N, strict=True):
        common = [(_common(caption, reference), len(reference)) for reference in references]
        precision = max(c / len(caption) if caption else 0.0 for c, _ in common)
        recall = max(c / length if length else 0.0 for c, length in common)
        both = (1 + beta**2) * precision * recall
        scores.append(both / (recall + beta**2 * precision) if both else 0.0)
    return np.array(scores)


def cider_d(
    captions_N: Sequence[Words], references_N: Sequence[Sequence[Words]], *, n: int = 4, sigma: float = 6.0
) -> np.ndarray:
    """Return (N,) CIDEr-D scores (0 … 10; published tables show 100 times their mean).

    Document frequencies come from these references, so a score depends on which pictures are scored together, and a
    single picture scores 0 (its log N is 0).

    Raises:
        DataError: nothing to score, or a picture without references.
    """
    _check(captions_N, references_N)
    cooked_N = [[_all_grams(reference, n) for reference in references] for references in references_N]
    seen = Counter(gram for references in cooked_N for gram in set().union(*references))
    log_pictures = math.log(len(captions_N))
    rarity = {gram: log_pictures - math.log(count) for gram, count in seen.items()}
    scores = []
    for caption, references in zip(captions_N, cooked_N, strict=True):
        ours, norm, length = _vector(_all_grams(caption, n), rarity, log_pictures, n)
        total = 0.0
        for reference in references:
            theirs, their_norm, their_length = _vector(reference, rarity, log_pictures, n)
            overlap = np.zeros(n)
            for gram, value in ours.items():
                other = theirs.get(gram, 0.0)
                overlap[len(gram) - 1] += min(value, other) * other
            norms = norm * their_norm
            cosine = np.divide(overlap, norms, out=overlap, where=norms > 0)
            total += cosine.mean() * math.exp(-((length - their_length) ** 2) / (2 * sigma**2))
        scores.append(10 * total / len(references))
    return np.array(scores)


def _vector(
    counts: Counter[tuple[str, ...]], rarity: dict[tuple[str, ...], float], unseen: float, n: int
) -> tuple[dict[tuple[str, ...], float], np.ndarray, int]:
    """tf-idf of every n-gram, the norm of each order, and the length (in bigrams, as the reference code counts it)."""
    values = {gram: count * rarity.get(gram, unseen) for gram, count in counts.items()}
    squares = np.zeros(n)
    for gram, value in values.items():
        squares[len(gram) - 1] += value * value
    return values, np.sqrt(squares), sum(count for gram, count in counts.items() if len(gram) == 2)


def _grams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _all_grams(words: Words, n: int) -> Counter[tuple[str, ...]]:
    counts: Counter[tuple[str, ...]] = Counter()
    for k in range(1, n + 1):
        counts.update(_grams(words, k))
    return counts


def _common(a: Words, b: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for left in a:
        diagonal = 0
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if left == right else max(row[j], row[j - 1])
    return row[-1]


def _check(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if not captions or len(captions) != len(references):
        raise DataError(
            f"cannot score {len(captions)} captions against references of {len(references)} pictures"
        )
    bare = next((n for n, given in enumerate(references) if not given), None)
    if bare is not None:
        raise DataError(f"picture {bare} has no reference caption: leave it out")
