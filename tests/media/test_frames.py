"""Which frames are taken: properties, golden values, and the published formulas written out as they are published."""

import collections
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from chiasm.errors import ConfigError, ImageError
from chiasm.media.frames import (
    Frames,
    FrameSampling,
    _nearest,
    choose_frames,
    fps_indices,
    middle_indices,
    rand_indices,
)


def steady(total, rate):
    return [n / rate for n in range(total)]


# The published formulas --------------------------------------------------------------------------------------------


def released(total, n):
    """Index by index as the release's documentation states it, with NumPy's own rounding."""
    last = total - 1
    seg = float(last) / n
    return [int(0 + seg / 2 + np.round(seg * k)) for k in range(n)]


def ported(total, n):
    """The video processor of transformers."""
    return torch.arange(total / n / 2, total, total / n).int().tolist()


def at_rate(total, rate, fps):
    """The release's training sampler `fpsX`, before it cuts the end off."""
    delta, duration = 1 / fps, total / rate
    seconds = np.arange(delta / 2, duration + delta / 2, delta)
    return [int(i) for i in np.around(seconds * rate).astype(int) if i < total]


@given(total=st.integers(1, 5000), share=st.floats(0, 1))
def test_middle_is_the_published_formula(total, share):
    n = max(1, min(total, 512, round(share * total)))
    assert middle_indices(total, n) == released(total, n)
    expected = ported(total, n)
    # The published range has one index too many, or an index of 32-bit rounding, where T / n is no binary fraction.
    got = middle_indices(total, n, "hf")
    assert len(got) == n
    assert all(abs(a - b) <= (0 if n & (n - 1) == 0 else 1) for a, b in zip(got, expected, strict=False))


def test_the_ported_formula_bit_by_bit():
    """Where 32-bit arithmetic is exact, and at the numbers of frames that people use."""
    for n in (1, 2, 4, 8, 16, 32, 64):
        for total in (*range(n, 400), 3600, 7193):
            assert middle_indices(total, n, "hf") == ported(total, n), (total, n)


@pytest.mark.parametrize(
    ("total", "n", "formula", "golden"),
    [
        (50, 8, "original", [3, 9, 15, 21, 27, 34, 40, 46]),
        (250, 8, "original", [15, 46, 77, 108, 139, 171, 202, 233]),
        (10, 4, "original", [1, 3, 5, 8]),
        (4, 4, "original", [0, 1, 2, 2]),  # as released: the last frame is not reached
        (3, 8, "original", [0, 1, 2]),
        (1, 8, "original", [0]),
        (50, 8, "hf", [3, 9, 15, 21, 28, 34, 40, 46]),
        (4, 4, "hf", [0, 1, 2, 3]),
    ],
)
def test_golden_indices(total, n, formula, golden):
    assert middle_indices(total, n, formula) == golden


# Properties --------------------------------------------------------------------------------------------------------

rising = st.lists(st.floats(0.001, 5), min_size=0, max_size=60).map(
    lambda gaps: [0.0, *np.cumsum(gaps).tolist()]
)
modes = st.one_of(
    st.tuples(st.sampled_from(["middle", "rand", "fps"]), st.none()),
    st.tuples(st.just("fps"), st.floats(0.05, 50)),
)
samplings = st.builds(
    lambda mode, **options: FrameSampling(mode=mode[0], fps=mode[1], **options),
    mode=modes,
    frames=st.integers(1, 40),
    min_frames=st.integers(1, 5),
    max_frames=st.integers(5, 40),
    seed=st.integers(0, 99),
    formula=st.sampled_from(["original", "hf"]),
)


@given(times=rising, rest=st.floats(0, 5), sampling=samplings)
def test_indices_are_sorted_and_in_range(times, rest, sampling):
    found = choose_frames(times, times[-1] + rest, sampling)
    assert found == sorted(found)
    assert all(0 <= index < len(times) for index in found)
    limit = sampling.max_frames if sampling.mode == "fps" else sampling.frames
    assert 1 <= len(found) <= limit
    if sampling.mode != "fps":
        assert len(found) == min(limit, len(times))
    assert found == choose_frames(times, times[-1] + rest, sampling)


@given(times=rising, sampling=samplings, data=st.data())
def test_clips_bound_the_times(times, sampling, data):
    duration = times[-1] + 0.5
    start = data.draw(st.floats(0, duration * 0.99))
    end = start + data.draw(st.floats(0.001, 10))
    sampling = FrameSampling(
        **{f: getattr(sampling, f) for f in FrameSampling.__dataclass_fields__ if f != "clip"},
        clip=(start, end),
    )
    found = choose_frames(times, duration, sampling)
    inside = [n for n, t in enumerate(times) if start <= t < end]
    if inside:
        # The margin by which equal times may differ is far below what these floats resolve to.
        assert all(inside[0] - 1 <= n <= inside[-1] + 1 for n in found)
    else:
        before = max(n for n, t in enumerate(times) if t <= start or n == 0)
        assert set(found) <= {before, before + 1}
        assert len(set(found)) == 1


@given(total=st.integers(1, 2000), rate=st.sampled_from([10, 24, 25, 30, 50, 60]), sampling=samplings)
def test_a_constant_rate_is_the_formula_itself(total, rate, sampling):
    assume(sampling.mode != "fps")
    found = choose_frames(steady(total, rate), total / rate, sampling)
    if sampling.mode == "middle":
        assert found == middle_indices(total, sampling.frames, sampling.formula)
    else:
        assert found == rand_indices(total, sampling.frames, sampling.seed)
    # Time stamps in whole milliseconds, as Matroska rounds them, change nothing.
    coarse = [round(1000 * t) / 1000 for t in steady(total, rate)]
    assert choose_frames(coarse, total / rate, sampling) == found


@given(
    total=st.integers(1, 1500), rate=st.sampled_from([10, 24, 25, 30]), fps=st.sampled_from([0.5, 1, 2, 4])
)
def test_frames_a_second_as_released(total, rate, fps):
    assert fps_indices(steady(total, rate), fps, 0.0, total / rate) == at_rate(total, rate, fps)


def test_frames_a_second_follow_the_time_stamps():
    # One frame a second for ten seconds, then ten a second for one.
    times = [*range(10), *(10 + n / 10 for n in range(10))]
    taken = choose_frames(times, 11.0, FrameSampling(mode="fps", fps=1))
    assert [times[n] for n in taken] == [0, 2, 4, 6, 8, 10, 10.5]  # halves go to the even index
    even = [times[n] for n in choose_frames(times, 11.0, FrameSampling(frames=5))]
    assert max(np.diff(even)) < 3.1  # by index alone, half of them would lie in the last second
    assert sum(t >= 10 for t in even) <= 1


def test_too_many_a_second_are_spread_not_cut():
    times = steady(1000, 10)
    taken = choose_frames(times, 100.0, FrameSampling(mode="fps", fps=5, max_frames=8))
    assert taken == middle_indices(1000, 8)
    few = choose_frames(steady(20, 10), 2.0, FrameSampling(mode="fps", fps=0.1, min_frames=4))
    assert few == middle_indices(20, 4)


def once_each(times, fps, start, end):
    """`fps_indices` moment by moment, as it is defined."""
    stretched = [*times, max(end, times[-1])]
    gap = (stretched[-1] - stretched[0]) / (len(stretched) - 1)
    count = math.ceil((end - start) * fps) + 1
    found = [_nearest(stretched, start + (0.5 + k) / fps, gap) for k in range(count)]
    return sorted({index for index in found if index < len(times)})


@given(times=rising, rest=st.floats(0, 5), fps=st.floats(0.05, 200), most=st.integers(1, 70))
def test_frames_a_second_without_enumerating_is_the_same(times, rest, fps, most):
    expected = once_each(times, fps, 0.0, times[-1] + rest)
    assert fps_indices(times, fps, 0.0, times[-1] + rest) == expected
    assert fps_indices(times, fps, 0.0, times[-1] + rest, most=most) == expected[:most]


def test_a_high_rate_costs_no_more_than_the_frames(monkeypatch):
    from chiasm.media import frames

    looked = []
    monkeypatch.setattr(frames, "_nearest", lambda *given: looked.append(0) or _nearest(*given))
    times = steady(1000, 10)
    taken = choose_frames(times, 100.0, FrameSampling(mode="fps", fps=1e6))
    assert taken == middle_indices(1000, 64)
    assert len(looked) < 300
    slow = FrameSampling(mode="fps", fps=1e6, folder_fps=1e-6)
    assert choose_frames([n * 1e6 for n in range(9)], 9e6, slow) == list(range(9))


def test_no_frame_a_second_comes_twice():
    assert choose_frames([0.0, 10.0, 20.0], 30.0, FrameSampling(mode="fps", fps=1)) == [0, 1, 2]
    assert choose_frames(steady(4, 1), 4.0, FrameSampling(mode="fps", fps=0.1, min_frames=4)) == [0, 1, 2, 3]
    burst = [0.0, *(10 + n / 100 for n in range(99))]
    few = choose_frames(burst, 11.0, FrameSampling(mode="fps", fps=0.01, min_frames=50))
    assert len(few) == len(set(few)) < 50


@pytest.mark.parametrize("mode", ["middle", "rand", "fps"])
def test_fewer_frames_than_asked_come_once_each_whatever_their_times(mode):
    sampling = FrameSampling(mode=mode, frames=9, fps=0.01 if mode == "fps" else None, min_frames=9)
    assert choose_frames([0.0, 0.1, 0.2, 10.0], 11.0, sampling) == [0, 1, 2, 3]


def test_rand_takes_every_frame_of_an_interval_in_time():
    seen = {index for seed in range(300) for index in rand_indices(12, 3, seed)}
    assert seen == set(range(12))
    assert rand_indices(5, 9) == [0, 1, 2, 3, 4]
    counts = {
        len(
            choose_frames(
                steady(100, 10),
                10.0,
                FrameSampling(mode="rand", frames=None, min_frames=4, max_frames=6, seed=s),
            )
        )
        for s in range(40)
    }
    assert counts == {4, 5, 6}


def test_rand_differs_between_videos_and_not_between_runs():
    times, sampling = steady(500, 10), FrameSampling(mode="rand", seed=3)
    taken = [choose_frames(times, 50.0, sampling, name=name) for name in ("a.mp4", "b.mp4", "c.mp4", "a.mp4")]
    assert taken[0] == taken[3] == [8, 104, 156, 239, 250, 321, 379, 439]
    assert len(set(map(tuple, taken))) == 3
    drawn = FrameSampling(mode="rand", frames=None)
    counts = [len(choose_frames(times, 50.0, drawn, name=f"{n}.mp4")) for n in range(9)]
    assert len(set(counts)) > 1


@pytest.mark.parametrize("mode", ["rand", "middle"])
def test_the_number_of_frames_is_drawn_evenly(mode):
    """T ~ U[16, 96], as PVC is trained: every number occurs, none more often than chance allows."""
    times, draws = steady(400, 10), 81 * 60
    counts = collections.Counter(
        len(
            choose_frames(
                times,
                40.0,
                FrameSampling(mode=mode, frames=None, min_frames=16, max_frames=96, seed=n % 60),
                name=f"{n // 60}.mp4",
            )
        )
        for n in range(draws)
    )
    assert set(counts) == set(range(16, 97))
    chi2 = sum((count - 60) ** 2 / 60 for count in counts.values())
    assert chi2 < 122  # 80 degrees of freedom: once in 600 times by chance
    # A video that is shorter than what was drawn is taken whole.
    short = FrameSampling(mode=mode, frames=None, min_frames=16, max_frames=96)
    assert choose_frames(times[:9], 0.9, short) == list(range(9))


def test_a_drawn_number_is_spread_evenly():
    """Mode middle draws how many, never which."""
    times = steady(400, 10)
    for seed in range(5):
        drawn = FrameSampling(frames=None, min_frames=16, max_frames=96, seed=seed)
        taken = choose_frames(times, 40.0, drawn, name="a.mp4")
        assert taken == middle_indices(400, len(taken))


def test_clips():
    times = steady(50, 10)
    whole = choose_frames(times, 5.0, FrameSampling(frames=50, clip=(1.0, 2.0)))
    assert whole == list(range(10, 20))
    assert choose_frames(times, 5.0, FrameSampling(frames=4, clip=(4.5, 99.0))) == [
        45 + n for n in released(5, 4)
    ]
    assert choose_frames(times, 5.0, FrameSampling(clip=(1.01, 1.02))) == [10]
    assert choose_frames(times, 5.0, FrameSampling(mode="fps", fps=2, clip=(1.0, 3.0))) == [12, 18, 22, 28]
    with pytest.raises(ImageError, match=r"^a\.mp4: the clip 5:7 lies outside of its 5\.00 seconds; give"):
        choose_frames(times, 5.0, FrameSampling(clip=(5, 7)), name="a.mp4")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "best"}, r"sampling mode 'best' is unknown: middle \| rand \| fps"),
        ({"formula": "x"}, "sampling formula"),
        ({"frames": 0}, "frames must be a whole number of at least 1"),
        ({"frames": True}, "frames must be"),
        ({"fps": 0}, "fps must be a number from 0.000001 to 1000000"),
        ({"fps": -1.0}, "fps must be"),
        ({"fps": math.nan}, "fps must be"),
        ({"fps": math.inf}, "fps must be"),
        ({"fps": 1e308}, "fps must be"),
        ({"mode": "middle", "fps": 2}, "fps does not go with sampling mode middle: leave one of them out"),
        ({"fps": 10**400}, "fps must be"),
        ({"folder_fps": "2"}, "folder_fps must be"),
        ({"folder_fps": 1e-300}, "folder_fps must be"),
        ({"clip": (0, 10**400)}, "a clip is"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames 9 is above max_frames 8"),
        ({"clip": (2, 1)}, "a clip must start at 0 or later and end after"),
        ({"clip": (-1, 1)}, "a clip must start"),
        ({"clip": (1,)}, "a clip is"),
        ({"clip": "1:2"}, "a clip is"),
        ({"clip": (0, math.inf)}, "a clip is"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_samplings_are_checked(options, match):
    with pytest.raises(ConfigError, match=match) as caught:
        FrameSampling(**options)
    assert "\n" not in str(caught.value)


def test_frames_are_checked():
    picture = Image.new("RGB", (2, 2))
    assert len(Frames(images=(picture,), times=(0.0,))) == 1
    with pytest.raises(ImageError, match="1 frames but 0 times"):
        Frames(images=(picture,), times=())
    with pytest.raises(ImageError, match="has no frames"):
        Frames(images=(), times=())
