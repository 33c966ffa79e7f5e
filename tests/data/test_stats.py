"""Statistics: distributions beside numpy, bins that lose nothing, text bars, the picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.lint_zoo import GOOD, Rows, row, spec_of, write_pictures

from chiasm.data.lint import Source, collect
from chiasm.data.stats import Distribution, SetStats, aspect_bins, bars, length_bins, merged, whole_bins
from chiasm.data.stats_plot import draw_stats, save_plot
from chiasm.errors import UsageError


def filled(values) -> Distribution:
    made = Distribution()
    for value in values:
        made.add(int(value))
    return made


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_distribution_is_numpys(values: list[int], share: float) -> None:
    made = filled(values)
    assert made.quantile(share) == int(np.quantile(values, share, method="inverted_cdf"))
    assert made.as_dict()["min"] == min(values)
    assert made.high == max(values)
    assert made.mean == pytest.approx(np.mean(values))


def test_distribution_stays_small_and_nearly_right() -> None:
    values = np.random.default_rng(0).integers(0, 10**6, 30_000)
    made = filled(values)
    assert len(made.counts) <= 4096
    assert sum(made.counts.values()) == made.n == len(values)
    for share in (0.1, 0.5, 0.99):
        assert made.quantile(share) == pytest.approx(np.quantile(values, share), abs=2 * made.step)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=100))
def test_bins_hold_every_value_once(values: list[int]) -> None:
    made = filled(values)
    for bins in (length_bins(made), whole_bins(made)):
        assert sum(one.count for one in bins) == len(values)
        assert all(a.high == b.low for a, b in pairwise(bins))
        assert 1 <= len(bins) <= 16
        for one in bins:
            assert one.count == sum(one.low <= value < one.high for value in values)


def test_labels_of_bins() -> None:
    assert [one.label for one in whole_bins(filled([1, 1, 3]))] == ["1", "2", "3"]
    assert [one.label for one in length_bins(filled([100, 130, 250]))] == ["96–127", "128–191", "192–255"]
    assert length_bins(Distribution()) == whole_bins(Distribution()) == []


def test_bars() -> None:
    lines = bars("tiles", whole_bins(filled([1] * 8 + [2] * 4 + [4])), width=8)
    assert lines == [
        "tiles",
        "  1  8  62% ████████",
        "  2  4  31% ████",
        "  3  0   0%",
        "  4  1   8% █",
    ]
    assert bars("nothing", []) == []


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[SetStats]:
    root = write_pictures(tmp_path_factory.mktemp("pictures"))
    bad = [row("What?", "A.", image="nowhere.png"), row("What?", roles=("human",)), {"id": 1}]
    sets = {"good": Rows(GOOD, root, "good"), "mixed": Rows(GOOD[:2] + bad, root, "mixed")}
    found, interrupted = collect([Source(name=name, dataset=rows) for name, rows in sets.items()], spec_of())
    assert not interrupted
    return found


def test_what_cannot_be_trained_on_is_counted_apart(counted: list[SetStats]) -> None:
    good, mixed = counted
    assert (good.rows, good.unusable, good.tokens.n) == (len(GOOD), 0, len(GOOD))
    assert (mixed.rows, mixed.unusable, mixed.tokens.n) == (5, 3, 2)
    assert good.images.total == 6
    assert good.turns.counts == {2: len(GOOD) - 1, 4: 1}
    assert good.answers.low == len("Red.")
    assert good.parts["answer"] == good.learned.total
    assert sum(good.parts.values()) == good.tokens.total
    assert good.as_dict()["aspects"] == {"n": 6, "min": 1.5, "p50": 1.5, "max": 1.5}


def test_sets_together_are_their_sum(counted: list[SetStats]) -> None:
    whole = merged(counted)
    assert whole.rows == sum(one.rows for one in counted)
    assert whole.tokens.total == sum(one.tokens.total for one in counted)
    assert whole.tokens.low == min(one.tokens.low or 0 for one in counted)
    assert whole.parts == counted[0].parts + counted[1].parts
    assert sum(one.count for one in aspect_bins(whole)) == whole.aspects.n == 9


def test_aspects_fall_into_their_bins() -> None:
    stats = SetStats("s")
    sizes = [(10, 100), (100, 300), (99, 200), (100, 100), (1600, 1200), (1920, 1080), (5000, 100)]
    for width, height in sizes:
        stats.aspects.add(round(1000 * np.log2(width / height)) + 20_000)
    found = {one.label: one.count for one in aspect_bins(stats) if one.count}
    assert found["under 1:4"] == found["1:1"] == found["3:2"] == found["over 4:1"] == 1
    assert sum(found.values()) == len(sizes)


def test_plot(counted: list[SetStats], tmp_path: Path) -> None:
    stats = SetStats("a set")
    numbers = np.random.default_rng(0)
    for value in numbers.lognormal(5, 0.9, 500):
        stats.tokens.add(int(value) + 1)
    stats.rows = 500
    empty, shown = draw_stats(SetStats("empty")), draw_stats(stats)
    assert empty.size == shown.size == (1320, 430)
    inked = [(np.asarray(one).astype(int).sum(2) < 500).mean() for one in (empty, shown)]
    assert 0 < inked[0] < inked[1] < 0.5
    left, right = (np.asarray(shown)[70:, part].astype(int) for part in (slice(0, 440), slice(880, 1320)))
    blue = [(abs(one - (0, 0x72, 0xB2)).sum(2) < 20).mean() for one in (left, right)]
    assert blue[0] > 0.05  # bars of tokens, where they belong
    assert blue[1] == 0
    save_plot(counted[0], tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(UsageError, match="name a PNG file"):
        save_plot(stats, tmp_path / "a.nothing")
    with pytest.raises(UsageError, match="No such file"):
        save_plot(stats, tmp_path / "nowhere" / "a.png")
