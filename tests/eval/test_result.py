"""Manifests decide what may be compared; results survive their file; differences are paired."""

import json
from dataclasses import replace

import pytest

from chiasm.errors import ConfigError, DataError
from chiasm.eval.manifest import Manifest, first_difference
from chiasm.eval.result import Result, compare_results
from chiasm.eval.summary import Row, summarise

MANIFEST = Manifest(
    bench="vqav2",
    data={"hash": "aa", "items": 8},
    metric={"name": "vqa", "statistic": "mean", "mode": "chiasm"},
    parser={"vqa": 1},
    prompt={"name": "short", "version": 1},
    tiles={"max_tiles": 6},
    decoding={"kind": "greedy"},
    model={"name": "a", "weights": "w1"},
    versions={"torch": "1"},
)


def result(grades, *, statistic="mean", manifest=MANIFEST, values=None, labels=None):
    rows = [
        Row(
            key=str(n),
            group=str(n // 2),
            grade=float(g),
            value=None if values is None else values[n],
            label="" if labels is None else labels[n],
        )
        for n, g in enumerate(grades)
    ]
    return Result(manifest=manifest, statistic=statistic, scores=summarise(rows, statistic), rows=rows)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": {"name": "short", "version": 2}}, "prompt.version: 1 and 2"),
        ({"data": {"hash": "bb", "items": 8}}, 'data.hash: "aa" and "bb"'),
        ({"tiles": {"max_tiles": 12}}, "tiles.max_tiles: 6 and 12"),
        ({"decoding": {"kind": "greedy", "votes": 4}}, "decoding.votes: null and 4"),
        (
            {"metric": {"name": "vqa", "statistic": "mean", "mode": "original"}},
            'metric.mode: "chiasm" and "original"',
        ),
        ({"seed": 3}, "seed: 0 and 3"),
        ({"frames": 8}, "frames: null and 8"),
    ],
)
def test_first_difference_is_named(change, named):
    other = replace(MANIFEST, **change)
    assert first_difference(MANIFEST, other) == named
    with pytest.raises(DataError, match="cannot be compared"):
        compare_results(result([1, 0]), result([1, 0], manifest=other))
    assert first_difference(MANIFEST, other, vary=tuple(change)) is None


def test_models_may_differ_and_versions_are_notes():
    other = replace(MANIFEST, model={"name": "b", "weights": "w2"}, versions={"torch": "2"})
    assert first_difference(MANIFEST, other) is None
    assert first_difference(MANIFEST, other, vary=()) == 'model.name: "a" and "b"'
    found = compare_results(result([1, 1, 1, 0]), result([0, 1, 0, 0], manifest=other))
    assert found.value == 0.5
    assert found.notes == ("torch: 1 and 2",)
    with pytest.raises(ConfigError, match="'versions'"):
        first_difference(MANIFEST, other, vary=("versions",))


def test_paired_difference_is_narrower_than_two_intervals():
    ours, theirs = [1, 0] * 40, [1, 0] * 39 + [0, 0]
    found = compare_results(result(ours), result(theirs))
    assert found.value == pytest.approx(1 / 80)
    # One question of eighty differs: its error comes from that alone, not from the 40 that both get wrong.
    assert found.error == pytest.approx(1 / 80, rel=0.05)
    assert found.pictures == 40
    same = compare_results(result(ours), result(ours))
    assert (same.value, same.error, same.p_value) == (0.0, 0.0, 1.0)


def test_statistics_that_are_no_means_are_resampled_together():
    labels = ["yes", "no"] * 30
    right = [1] * 60
    worse = ["yes", "yes"] * 10 + ["yes", "no"] * 20
    ours = result(right, statistic="f1", values=labels, labels=labels)
    theirs = result(right, statistic="f1", values=worse, labels=labels)
    found = compare_results(ours, theirs, resamples=300)
    assert found.value == pytest.approx(1 - ours.scores["f1"].value + (1 - theirs.scores["f1"].value))
    assert found.interval is not None
    assert 0 < found.interval[0] < found.value < found.interval[1]
    assert found.p_value == pytest.approx(2 / 300)


def test_other_questions_are_refused():
    fewer = result([1, 0, 1])
    with pytest.raises(DataError, match="same questions"):
        compare_results(result([1, 0]), fewer)


def test_file_round_trip(tmp_path):
    whole = result([1, 0, 1, 1])
    whole.save(tmp_path / "r.json")
    again = Result.load(tmp_path / "r.json")
    assert again.to_dict() == whole.to_dict()
    assert again.headline.value == 0.75
    assert "rows" not in whole.to_dict(rows=False)
    (tmp_path / "torn.json").write_text('{"scores": {}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"a": 1}')
    for name, message in [
        ("torn", "cannot be read"),
        ("list", "a list"),
        ("other", "no result"),
        ("gone", "cannot be"),
    ]:
        with pytest.raises(DataError, match=message):
            Result.load(tmp_path / f"{name}.json")
    broken = json.loads((tmp_path / "r.json").read_text())
    del broken["manifest"]["prompt"]
    with pytest.raises(DataError, match="'prompt'"):
        Result.from_dict(broken)
