"""Filters: what exactly is counted, who decides, and lists that people can edit."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.data.datasets import DatasetSpec
from chiasm.data.filters import (
    All,
    DuplicateLines,
    Loops,
    ModelScore,
    Repetition,
    SentenceLength,
    Verdict,
    ZeroRuns,
    judge_all,
    loop_share,
    ngram_repetition,
    read_reviews,
    read_scores,
    record_key,
    write_reviews,
)
from chiasm.data.message import Record, Turn
from chiasm.errors import ConfigError, DataError


def answer(text, **extra):
    return Record(turns=(Turn.of("user", "0 " * 99 + "Q"), Turn.of("assistant", text)), extra=extra)


# Repetition ------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("ab"), max_size=14), st.integers(1, 4))
def test_ngrams_are_counted_as_by_hand(words, n):
    runs = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    often = [run for run in runs if sum(other == run for other in runs) > 1]
    text = "\n ".join(words)
    assert ngram_repetition(text, n) == (len(set(often)) / len(runs) if runs else 0)
    assert ngram_repetition(text, n, count="places") == (len(often) / len(runs) if runs else 0)


def test_what_the_release_counts_and_what_it_misses():
    words = [f"w{n}" for n in range(100)]
    twice, hundred = " ".join(words * 2), " ".join(words[:10] * 100)
    assert ngram_repetition(" ".join(words)) == 0
    assert ngram_repetition(twice) == 91 / 191  # 91 different runs of 191 are there twice
    assert ngram_repetition(hundred) == 10 / 991  # endless repetition has few different runs
    assert ngram_repetition(hundred, count="places") == 1
    assert Repetition().judge(answer(twice)) == Verdict(
        keep=False, reason="repetition: 0.48 of its 10-grams are repeated", score=91 / 191
    )
    assert Repetition().judge(answer(hundred)).keep
    assert not Repetition(count="places").judge(answer(hundred)).keep
    assert Repetition().judge(Record(turns=(Turn.of("user", twice),))) == Verdict(
        score=0
    )  # answers alone count


def test_loops_are_what_the_linter_finds():
    words = [f"w{n}" for n in range(200)]
    assert loop_share(" ".join(words)) == 0
    assert loop_share("a b c " * 100) > 0.95
    assert loop_share("short " * 9) == 0
    assert 0.3 < loop_share(" ".join(words[:100] * 2)) < 0.6
    chinese = answer("一只猫坐在垫子上看着窗外的鸟。" * 20)
    assert Repetition().judge(chinese).keep
    assert Loops().judge(chinese).reason == "loops: 0.95 of its 10-grams occurred before"
    verdict = Loops().judge(answer("a cat on a mat and " * 40))
    assert (verdict.keep, verdict.review) == (False, True)
    assert Loops().judge(answer("A cat.")).keep


# Heuristics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "longest"),
    [
        ("A cat. Two cats!", 8),
        ("3.14 is one sentence", 20),
        ("一只猫。两只猫很大！", 5),
        ("line\nlonger line", 11),
        ("", 0),
    ],
)
def test_sentences(text, longest):
    assert SentenceLength(shortest=0).judge(answer(text)).score == longest


def test_heuristics_ask_for_a_person():
    for rule, good, bad, reason in [
        (SentenceLength(longest=20), "Short. " * 9, "x" * 21, "length: a sentence of 21 characters"),
        (SentenceLength(), "x", " \n", "length: an answer of 0 characters"),
        (ZeroRuns(most=5), "1,001 000 100", "0.000, 00", "zeros: a run of 6"),
        (DuplicateLines(), "a\n" * 3 + "b\nc\nd", "a\n\n a\n" * 3, "lines: 0.83 of them are duplicates"),
        (DuplicateLines(), "a\n" * 5, "a\n" * 6, "lines: 0.83 of them are duplicates"),
    ]:
        kept, doubted = rule.judge(answer(good)), rule.judge(answer(bad))
        assert (kept.keep, kept.reason) == (True, "")
        assert (doubted.keep, doubted.review, doubted.reason) == (False, True, reason)


def test_a_rejection_goes_before_a_doubt():
    doubt, reject = ZeroRuns(most=1), Repetition(n=1, threshold=0.1)
    both = answer("000 a a")
    assert All((doubt, reject)).judge(both).reason.startswith("repetition")
    assert All((doubt,)).judge(both) == doubt.judge(both)
    assert All((doubt, reject)).judge(answer("a b")) == Verdict()
    assert All(()).judge(both) == Verdict()


# Scores ----------------------------------------------------------------------------------------------------------


def test_scores_by_id_and_by_function():
    rule = ModelScore(scores={"1": 6.5, "x": 9}, thresholds={"": 7, "math": 5}, domain="meta.domain")
    assert rule.judge(answer("", id=1)) == Verdict(keep=False, reason="score: 6.5, below 7", score=6.5)
    assert rule.judge(answer("", id=1, meta={"domain": "math"})) == Verdict(score=6.5)
    assert rule.judge(answer("", id="x")) == Verdict(score=9)
    assert rule.judge(answer("")) == Verdict(keep=False, review=True, reason="score: has none")
    assert ModelScore(scores={}, missing="keep").judge(answer("", id=2)).keep
    length = ModelScore(scores=lambda record: float(len(record.turns)), thresholds={"": 3}, action="review")
    assert length.judge(answer("")) == Verdict(keep=False, review=True, reason="score: 2, below 3", score=2)
    with pytest.raises(DataError, match="no threshold for the domain 'law'"):
        ModelScore(scores={"1": 3}, thresholds={"math": 5}).judge(answer("", id=1, domain="law"))


def test_scores_are_read_from_lines(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"id": 1, "score": 7}\n\n{"id": "a", "score": 2.5, "why": "x"}\n{"id": 1, "score": 7}\n')
    assert read_scores(path) == {"1": 7, "a": 2.5}
    for line, said in [
        ("{", r"scores\.jsonl:1: is not JSON"),
        ("[]", ":1: must be a JSON object"),
        ('{"id": 1}', ":1: must be "),
        ('{"id": 1, "score": true}', ":1: must be "),
        ('{"id": 1, "score": 1}\n{"id": "1", "score": 2}', ":2: '1' has two scores"),
    ]:
        path.write_text(line)
        with pytest.raises(DataError, match=said):
            read_scores(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_scores(tmp_path / "none")


# Reviews ---------------------------------------------------------------------------------------------------------


def test_people_decide_and_are_followed(tmp_path):
    rows = [
        {"id": n, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": text}]}
        for n, text in enumerate(["fine", "0" * 30, "0" * 40, "a " * 30])
    ]
    path, reviews = tmp_path / "a.jsonl", tmp_path / "review.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    dataset = DatasetSpec(annotation=str(path)).open("a")
    rule = All((Repetition(count="places"), ZeroRuns()))
    found = dict(judge_all(dataset, rule))
    assert [found[n].decision for n in range(5)] == ["kept", "review", "review", "rejected", "rejected"]
    assert (found[1].where, found[1].score, found[1].text) == ("a.jsonl:2", 30, "Q " + "0" * 30)
    assert found[4].reason.startswith("is not JSON")
    write_reviews(reviews, (found[n] for n in (1, 2, 3, 4)))
    assert read_reviews(reviews) == {found[3].key: False}
    edited = reviews.read_text().splitlines()
    edited[0] = edited[0].replace('"decision": "review"', '"decision": "kept"')
    edited[1] = edited[1].replace('"decision": "review"', '"decision": "reject"')
    edited[2] = edited[2].replace('"decision": "rejected"', '"decision": "keep"')
    reviews.write_text("\n".join(edited))
    decisions = read_reviews(reviews)
    # The file around them may change: decisions belong to conversations.
    path.write_text("\n".join(json.dumps(row) for row in reversed(rows)))
    again = dict(judge_all(DatasetSpec(annotation=str(path)).open("b"), rule, decisions))
    assert [again[n].decision for n in range(4)] == ["kept", "rejected", "kept", "kept"]
    assert again[0].reason == "decided by a person"
    reviews.write_text(edited[0] + "\n" + edited[0].replace('"kept"', '"rejected"'))
    with pytest.raises(DataError, match=r"review\.jsonl:2: is decided otherwise in an earlier line"):
        read_reviews(reviews)
    reviews.write_text('{"key": "a", "decision": "perhaps"}')
    with pytest.raises(DataError, match=r":1: needs a key and a decision"):
        read_reviews(reviews)


def test_keys_tell_conversations_apart():
    same = [answer("a"), answer("a", id=3)]
    assert record_key(same[0]) == record_key(same[1])
    others = [
        Record(turns=(Turn.of("user", "a", images),))
        for images in ([], ["x"], ["y"], [b"x"], [b"y"], [b"x", b"y"])
    ]
    others += [Record(turns=(Turn.of("assistant", "a"),)), Record(turns=(Turn.of("user", "a\ud800"),))]
    keys = {record_key(record) for record in others}
    assert len(keys) == len(others)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Repetition, {"n": 0}),
        (Repetition, {"threshold": 2}),
        (Repetition, {"action": "drop"}),
        (Loops, {"threshold": -1}),
        (SentenceLength, {"longest": 0}),
        (ZeroRuns, {"most": 0}),
        (DuplicateLines, {"share": -1}),
        (ModelScore, {"scores": {}, "thresholds": {}}),
        (ModelScore, {"scores": {}, "missing": "drop"}),
    ],
)
def test_options_are_checked(kind, options):
    with pytest.raises(ConfigError):
        kind(**options)
