"""Feed and Loader: order, bounds, errors in their place, threads that end, the state of exactly a step."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.train.tiny_run import Blobs, tiny

from chiasm.data.mixture import Mixture, generator
from chiasm.errors import ConfigError, DataError
from chiasm.train.feed import Feed, Loader, MixtureFeed, open_feed


class Counting:
    """Part p of step s is the next number that its lane reads; lanes skip 1 + s % 3 numbers, so it has a memory."""

    def __init__(self, parts=2, slow=0.0, bad_plan=-1, bad_load=(-1, -1), empty=()):
        self.parts, self.slow, self.bad_plan, self.bad_load, self.empty = (
            parts,
            slow,
            bad_plan,
            bad_load,
            empty,
        )
        self.at = [0] * parts
        self.planned, self.loaded, self.loading, self.most = [], [], 0, 0
        self.lock = threading.Lock()

    def plan(self, step):
        if step == self.bad_plan:
            raise DataError(f"cannot plan {step}")
        self.planned.append(step)
        for part in range(self.parts):
            self.at[part] += 1 + step % 3
        return [(part, self.at[part]) for part in range(self.parts)]

    def load(self, handle, *, step, part):
        with self.lock:
            self.loading += 1
            self.most = max(self.most, self.loading)
        time.sleep(self.slow * ((step + part) % 2))  # later ones may be ready first
        with self.lock:
            self.loading -= 1
            self.loaded.append((step, part))
        if (step, part) == self.bad_load:
            raise DataError(f"cannot load {step}.{part}")
        return None if (step, part) in self.empty else (step, part, handle[1])

    def names(self, handle):
        return [f"lane {handle[0]} number {handle[1]}"]

    def state(self):
        return {"at": list(self.at)}

    def restore(self, state):
        self.at = list(state["at"])


def read(feed, *, first=0, stop=7, threads=0, parts=(0, 1), **options):
    with Loader(feed, first=first, stop=stop, parts=parts, threads=threads, **options) as loader:
        return [(s.step, [(p.number, p.batch) for p in s.parts], s.state) for s in loader]


def no_threads_left():
    return not [t for t in threading.enumerate() if t.name.startswith("chiasm-")]


def test_the_feeds_are_feeds():
    assert isinstance(Counting(), Feed)
    assert isinstance(MixtureFeed(Blobs(), tiny()), Feed)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_ahead_is_as_in_turn(threads, depth):
    assert read(Counting(slow=0.002, empty=((2, 1),)), threads=threads, depth=depth) == read(
        Counting(empty=((2, 1),))
    )
    assert no_threads_left()


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(0, 5), st.integers(1, 3), st.data()
)
def test_any_process_and_any_restart_read_the_same(parts, threads, depth, cut, processes, data):
    if parts % processes:
        return
    rank = data.draw(st.integers(0, processes - 1))
    mine = range(rank, parts, processes)
    whole = read(Counting(parts), stop=6, parts=range(parts))
    first = read(Counting(parts), stop=cut, threads=threads, depth=depth, parts=mine)
    feed = Counting(parts)
    feed.restore(first[-1][2] if first else feed.state())
    rest = read(feed, first=cut, stop=6, threads=threads, depth=depth, parts=mine)
    expected = [(step, [p for p in loaded if p[0] in mine], state) for step, loaded, state in whole]
    assert first + rest == expected


def test_it_reads_ahead_but_not_further_than_its_depth():
    feed = Counting()
    with Loader(feed, first=0, stop=100, parts=(0, 1), threads=2, depth=4) as loader:
        steps = iter(loader)
        next(steps)
        deadline = time.monotonic() + 5
        while len(feed.loaded) < 6 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert len(feed.loaded) == 6  # two handed out, four ahead
        assert len(feed.planned) <= 4
    assert no_threads_left()


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("options", [{"bad_plan": 4}, {"bad_load": (4, 1)}])
def test_errors_surface_at_their_step(threads, options):
    seen = []

    def consume():
        with Loader(Counting(**options), first=0, stop=9, parts=(0, 1), threads=threads) as loader:
            for step in loader:
                seen.append(step.step)
                time.sleep(0.01)

    with pytest.raises(DataError, match="cannot"):
        consume()
    assert seen == [0, 1, 2, 3]
    assert no_threads_left()


def test_an_interrupt_ends_the_threads():
    feed = Counting(slow=0.01)

    def consume():
        with Loader(feed, first=0, stop=10**6, parts=(0, 1), threads=3) as loader:
            for step in loader:
                if step.step == 3:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert no_threads_left()
    assert len(feed.planned) < 20


def test_a_loader_that_is_never_asked_ends_too():
    with Loader(Counting(), first=0, stop=10**6, parts=(0, 1), threads=1):
        time.sleep(0.02)
    assert no_threads_left()


def test_waiting_is_measured():
    class Slow(Counting):
        def load(self, handle, *, step, part):
            time.sleep(0.03)
            return 1

    with Loader(Slow(1), first=0, stop=3, parts=(0,), threads=1) as loader:
        waits = []
        for step in loader:
            waits.append(step.waited)
            time.sleep(0.06)
    assert waits[0] > 0.02
    assert waits[2] < 0.02  # it was ready


def test_depth_and_threads_are_checked():
    for options in ({"threads": -1}, {"threads": 1, "depth": 0}):
        with pytest.raises(ConfigError, match="loader"):
            Loader(Counting(), first=0, stop=1, parts=(0,), **options)


def test_the_mixture_feed_is_the_mixture():
    recipe, source = tiny(accumulate=3), Blobs()
    feed = MixtureFeed(source, recipe)
    mixture = Mixture(source.sizes, source.weights, batch=6, seed=7)
    handles = feed.plan(5)
    assert [draw for handle in handles for draw in handle] == mixture.batch_indices(5)
    batch = feed.load(handles[2], step=5, part=2)
    expected = source.fetch(handles[2], generator(7, "augment", 5, 2))
    assert (batch.x == expected.x).all()
    assert feed.names([("left", 3)]) == ["left 3"]
    assert feed.state() == {}
    assert "left" in feed.about(12)
    with pytest.raises(ConfigError, match="packed"):
        feed.restore({"lanes": []})


def test_a_source_may_bring_its_own_feed():
    class Own(Blobs):
        def feed(self, recipe, run):
            return (recipe.name, run)

    assert open_feed(Own(), tiny(), "run") == ("tiny", "run")
    assert isinstance(open_feed(Blobs(), tiny(), None), MixtureFeed)
