"""BLEU, ROUGE-L, CIDEr-D: by hand, and against coco-caption's and sacrebleu's own code where installed."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import DataError
from chiasm.eval.metrics.captions import bleu, cider_d, rouge_l, tokenize_caption


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man, riding a wave.", ["a", "man", "riding", "a", "wave"]),  # punctuation goes
        ("dog's isn't", ["dog", "'s", "is", "n't"]),  # clitics apart, as PTB has them
        ("black-and-white 3.5", ["black-and-white", "3.5"]),  # inner marks stay
        ("…", []),
    ],
)
def test_tokenizer(text, words):
    assert tokenize_caption(text) == words


def test_bleu_by_hand():
    # "the" occurs seven times and at most twice in a reference: clipped to 2 / 7 (Papineni's example).
    caption = ["the"] * 7
    references = [["the", "cat", "is", "on", "the", "mat"], ["there", "is", "a", "cat", "on", "the", "mat"]]
    assert bleu([caption], [references])[0] == pytest.approx(2 / 7)
    # Brevity: two right words for a reference of four, exp(1 - 4 / 2).
    assert bleu([["a", "b"]], [[["a", "b", "c", "d"]]], 1)[0] == pytest.approx(math.exp(-1))
    assert bleu([[]], [[["a"]]]) == [0.0] * 4


def test_rouge_by_hand():
    # Common subsequence "police the gunman": P = R = 3 / 4.
    assert rouge_l([["police", "ended", "the", "gunman"]], [[["police", "kill", "the", "gunman"]]])[
        0
    ] == pytest.approx(0.75)
    # The best precision and the best recall may be of different references.
    found = rouge_l([["a", "b"]], [[["a"], ["a", "b", "c", "d"]]])[0]
    assert found == pytest.approx((1 + 1.44) * 1.0 * 1.0 / (1.0 + 1.44 * 1.0))


def test_cider_by_hand():
    # Two pictures, words that only one of them has: every n-gram has idf log 2, so equal captions have cosine 1 for the
    # orders that exist (1 and 2 of four): 10 * 2 / 4.
    captions = [["red", "bus"], ["old", "dog"]]
    assert cider_d(captions, [[c] for c in captions]).tolist() == pytest.approx([5.0, 5.0])
    # Nothing in common is 0; a single picture has idf log 1 = 0.
    assert cider_d(captions, [[["x"]], [["y"]]]).tolist() == [0.0, 0.0]
    assert cider_d([["a"]], [[["a"]]]).tolist() == [0.0]


def corpus(seed: int = 0, pictures: int = 30) -> tuple[list[list[str]], list[list[list[str]]]]:
    chance = random.Random(seed)
    words = ["a", "man", "on", "the", "wave", "rides", "red", "board", "of", "his", "dog"]

    def sentence() -> list[str]:
        return [chance.choice(words) for _ in range(chance.randint(2, 12))]

    return [sentence() for _ in range(pictures)], [
        [sentence() for _ in range(chance.randint(1, 5))] for _ in range(pictures)
    ]


def test_scorers_of_coco_caption():
    cider = pytest.importorskip("pycocoevalcap.cider.cider_scorer")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    captions, references = corpus()
    scorer = cider.CiderScorer()
    for caption, own in zip(captions, references, strict=True):
        scorer += (" ".join(caption), [" ".join(reference) for reference in own])
    np.testing.assert_allclose(cider_d(captions, references), scorer.compute_score()[1], rtol=1e-12)
    truth = {n: [" ".join(r) for r in own] for n, own in enumerate(references)}
    said = {n: [" ".join(caption)] for n, caption in enumerate(captions)}
    np.testing.assert_allclose(
        bleu(captions, references), Bleu(4).compute_score(truth, said, verbose=0)[0], rtol=1e-12
    )
    np.testing.assert_allclose(
        rouge_l(captions, references), Rouge().compute_score(truth, said)[1], rtol=1e-12
    )


def test_bleu_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    _, references = corpus(1)
    captions = [[*own[0][:-1], "bus"] for own in references]  # long matches, or smoothing is compared
    references = [(own * 5)[:5] for own in references]  # it wants equally many
    streams = [[" ".join(own[n]) for own in references] for n in range(5)]
    said = [" ".join(caption) for caption in captions]
    theirs = sacrebleu.corpus_bleu(said, streams, tokenize="none", smooth_method="none", force=True)
    assert bleu(captions, references)[3] == pytest.approx(theirs.score / 100, rel=1e-6)


def test_golden_values():
    """Kept from a run that agreed with coco-caption's scorers, for machines without them."""
    captions, references = corpus()
    assert cider_d(captions, references).mean() == pytest.approx(GOLDEN["cider"], rel=1e-9)
    assert bleu(captions, references)[:3] == pytest.approx(GOLDEN["bleu"], rel=1e-9)
    assert rouge_l(captions, references).mean() == pytest.approx(GOLDEN["rouge"], rel=1e-9)


GOLDEN = {
    "cider": 0.648155889225805,
    "bleu": [0.5482456140326831, 0.2411374340372764, 0.07021124319179113],
    "rouge": 0.3524207462350434,
}


def test_nothing_to_score():
    with pytest.raises(DataError, match="0 captions"):
        cider_d([], [])
    with pytest.raises(DataError, match="picture 1 has no reference"):
        bleu([["a"], ["b"]], [[["a"]], []])


@given(
    st.lists(
        st.tuples(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_any_texts(pairs):
    captions = [tokenize_caption(c) for c, _ in pairs]
    references = [[tokenize_caption(r) for r in own] for _, own in pairs]
    assert all(0 <= score <= 1 + 1e-9 for score in bleu(captions, references))
    assert ((rouge_l(captions, references) >= 0) & (rouge_l(captions, references) <= 1 + 1e-9)).all()
    assert ((cider_d(captions, references) >= 0) & (cider_d(captions, references) <= 10 + 1e-6)).all()
