"""The packed feed: lanes, exact resume, chance of its own for every sample, bad samples, padding."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.data.feed import PackedFeed, Part, SetOptions
from chiasm.data.layout import LayoutSpec, layout, measure
from chiasm.data.message import Record, Turn
from chiasm.data.packing import Pack, Packer, Piece
from chiasm.data.sequence import IGNORE, Sequence
from chiasm.errors import ConfigError, DataError, MissingExtraError, UsageError
from chiasm.media.frames import FrameSampling
from chiasm.media.tiles import TilePolicy
from clips import folder
from tiny_tokenizers import byte_level

SIDE, ROWS = 8, 3


class Rows:
    """A data set in memory that follows the protocol; rows that are errors are raised."""

    def __init__(self, name: str, rows: list) -> None:
        self.name, self.rows, self.read = name, rows, Counter()

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        return f"{self.name}.jsonl:{index + 1}"

    def record(self, index: int) -> Record:
        self.read[index] += 1
        row = self.rows[index]
        if isinstance(row, Exception):
            raise row
        return row() if callable(row) else row


class Bin:
    """A quarantine that keeps what it is given and ends the run above a number."""

    def __init__(self, most: int = 1000) -> None:
        self.listed: dict[tuple[str, str], str] = {}
        self.count, self.most = 0, most

    def add(self, where: str, dataset: str, reason: str) -> None:
        self.listed[where, reason.removeprefix(f"{where}: ")] = dataset
        if len(self.listed) > self.most:
            raise DataError(f"{len(self.listed)} bad samples")

    def seen(self, n: int) -> None:
        self.count += n

    def state(self) -> dict:
        return {"count": self.count, "listed": [[*key, name] for key, name in self.listed.items()]}

    def restore(self, state: dict) -> None:
        self.count = state["count"]
        self.listed = {(where, reason): name for where, reason, name in state["listed"]}


def picture(seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    width, height = draw.integers(4, 40, 2)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def talk(seed: int, pictures: int = 0, words: int = 5) -> Record:
    ask = Turn.of("user", "what " * (seed % 7 + 1), [picture(seed + n) for n in range(pictures)])
    return Record(turns=(ask, Turn.of("assistant", "a cat " * words)))


def sets() -> dict[str, Rows]:
    return {
        "text": Rows("text", [talk(n, words=3 + n * n % 23) for n in range(23)]),
        "seen": Rows("seen", [talk(n, 1 + n % 3, 4 + n % 5) for n in range(17)]),
    }


def spec(**options: object) -> LayoutSpec:
    return LayoutSpec(
        tokenizer=byte_level(),
        template="internvl2_5",
        tiles=TilePolicy(image_size=SIDE, max_tiles=4, mode="original"),
        tokens_per_tile=ROWS,
        system="",
        max_length=5,  # must not matter
        **options,
    )


def make(
    data: dict[str, Rows] | None = None, *, lanes: int = 2, packs: int = 2, **options: object
) -> PackedFeed:
    data = sets() if data is None else data
    packing = {"max_tokens": 256, "max_tiles": 12, "buffer": 3}
    packing |= {name: options.pop(name) for name in ("overflow", "max_tokens", "method") if name in options}
    return PackedFeed(
        data,
        {name: 1.0 for name in data},
        options.pop("spec", None) or spec(),
        options.pop("quarantine", None) or Bin(),
        packers=[Packer(**packing) for _ in range(lanes)],
        packs=packs,
        seed=options.pop("seed", 0),
        **options,
    )


def batches(feed: PackedFeed, first: int, steps: int) -> list[Sequence | None]:
    return [
        feed.load(part, step=step, part=p)
        for step in range(first, first + steps)
        for p, part in enumerate(feed.plan(step))
    ]


def same(a: Sequence | None, b: Sequence | None) -> bool:
    if a is None or b is None:
        return a is b
    fields = ("ids_T", "kind_T", "doc_T", "pos_T", "labels_T", "weight_T")
    return (
        all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields)
        and a.spans == b.spans
        and a.media.keys() == b.media.keys()
        and all(torch.equal(a.media[name].data, b.media[name].data) for name in a.media)
    )


def test_batches_are_the_documents_of_their_packs() -> None:
    data = sets()
    feed = make(data)
    for step in range(3):
        parts = feed.plan(step)
        assert len(parts) == 2
        for p, part in enumerate(parts):
            assert len(part.packs) == 2
            made = feed.load(part, step=step, part=p)
            keys = [piece.key for pack in part.packs for piece in pack.pieces]
            wanted = [layout(data[name].rows[index], spec_free(), train=True) for name, index, _ in keys]
            assert same(made, Sequence.pack(wanted))
            assert feed.names(part) == [f"{name} {name}.jsonl:{index + 1}" for name, index, _ in keys]
            assert part.tokens == len(made)
            assert part.tiles == sum(map(len, made.media.values()))


def spec_free() -> LayoutSpec:
    import dataclasses

    return dataclasses.replace(spec(), max_length=None)


def test_every_sample_is_drawn_as_the_mixture_says() -> None:
    feed = make(lanes=3)
    drawn = [
        (piece.key, lane)
        for step in range(6)
        for lane, part in enumerate(feed.plan(step))
        for pack in part.packs
        for piece in pack.pieces
    ]
    stream = {feed.mixture.place(position): position % 3 for position in range(3000)}
    assert all(stream[key] == lane for key, lane in drawn)
    assert len({key for key, _ in drawn}) == len(drawn)
    assert max(nth for (_, _, nth), _ in drawn) > 0  # second epochs are keys of their own


@pytest.mark.parametrize("overflow", ["refuse", "split"])
def test_a_restored_feed_gives_the_same_batches(overflow: str) -> None:
    options = {"max_tokens": 60, "overflow": overflow, "packs": 1}
    feed = make(**options)
    batches(feed, 0, 5)
    state = json.loads(json.dumps(feed.state()))
    wanted = batches(feed, 5, 6)
    other = make(**options)
    other.restore(state)
    got = batches(other, 5, 6)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert other.state() == feed.state()
    assert bool(feed.quarantine.listed) == (overflow == "refuse")  # some are longer than 60
    assert (feed.counts["cut"] > 0) == (overflow == "split")


def test_loading_may_happen_anywhere_and_in_any_order() -> None:
    feed = make(options={"seen": SetOptions(change=noisy)})
    handles = [(step, p, part) for step in range(4) for p, part in enumerate(feed.plan(step))]
    slow = [feed.load(part, step=step, part=p) for step, p, part in handles]
    with ThreadPoolExecutor(4) as pool:
        fast = list(pool.map(lambda h: feed.load(h[2], step=h[0], part=h[1]), reversed(handles)))
    assert all(same(a, b) for a, b in zip(slow, reversed(fast), strict=True))


def noisy(tiles: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    return tiles ^ torch.randint(0, 256, tiles.shape, dtype=torch.uint8, generator=chance)


def changes(feed: PackedFeed) -> dict[tuple, list[str]]:
    """Content keys of every sample's pictures by (set, index, time)."""
    out = {}
    for step in range(8):
        for p, part in enumerate(feed.plan(step)):
            made = feed.load(part, step=step, part=p)
            keys = [piece.key for pack in part.packs for piece in pack.pieces]
            for key, row in zip(keys, made.split(), strict=True):
                out[key] = [span.key for span in row.spans]
    return out


def test_chance_follows_the_sample_not_its_place() -> None:
    options = {"seen": SetOptions(change=noisy)}
    one, other = (
        changes(make(options=options)),
        changes(make(options=options, lanes=1, packs=3, method="first_fit")),
    )
    common = [key for key in one.keys() & other.keys() if key[0] == "seen"]
    assert len(common) > 20
    assert all(one[key] == other[key] for key in common)
    twice = [key for key in one if key[0] == "seen" and key[2] == 1 and (*key[:2], 0) in one]
    assert twice
    assert all(one[key] != one[(*key[:2], 0)] for key in twice)
    assert changes(make(options=options, seed=1)) != one


def test_frames_are_drawn_anew_each_time(tmp_path) -> None:
    film = folder(tmp_path / "film", [f"{n}.png" for n in range(20)])
    rows = [
        Record(turns=(Turn("user", (part(film),)), Turn.of("assistant", "a cat and a dog"))) for _ in range(2)
    ]
    feed = make(
        {"film": Rows("film", rows)},
        lanes=1,
        packs=1,
        spec=spec(sampling=FrameSampling(mode="rand", frames=None, min_frames=2, max_frames=8)),
    )
    sizes = set()
    for step in range(6):
        (handle,) = feed.plan(step)
        row = feed.load(handle, step=step, part=0)
        assert len(row) == handle.tokens  # measured with the frames that are laid out
        sizes |= {piece.tiles for pack in handle.packs for piece in pack.pieces}
    assert len(sizes) > 3


def part(film):
    from chiasm.data.message import Part

    return Part("video", film)


def test_sets_have_tile_limits_of_their_own() -> None:
    feed = make(options={"seen": SetOptions(max_tiles=1)})
    for step in range(4):
        for handle in feed.plan(step):
            for pack in handle.packs:
                assert all(p.tiles <= 3 for p in pack.pieces)  # one tile a picture
    assert make().plan(0) != make(options={"seen": SetOptions(max_tiles=1)}).plan(0)


def test_bad_samples_are_left_out_and_listed(tmp_path) -> None:
    broken = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:300])  # a sound header, and little behind it
    missing = Turn.of("user", "?", [str(tmp_path / "missing.png")])
    damaged = Turn.of("user", "?", [str(broken)])
    answer = Turn.of("assistant", "a cat")
    data = sets()
    data["text"].rows += [
        DataError("text.jsonl:24: not JSON (Expecting value at column 3)"),
        Record(turns=(missing, answer)),
        Record(turns=(damaged, answer)),
        Record(turns=(Turn.of("user", "Hi"),)),
        talk(0, words=500),
    ]
    feed = make(data)
    made = batches(feed, 0, 14)
    assert all(isinstance(row, Sequence) for row in made)
    listed = dict(feed.quarantine.listed)
    assert set(listed.values()) == {"text"}
    reasons = {where: reason for where, reason in listed}
    assert reasons["text.jsonl:24"] == "not JSON (Expecting value at column 3)"
    assert "missing.png" in reasons["text.jsonl:25"]
    assert "broken.png" in reasons["text.jsonl:26"]  # found when it was loaded
    assert reasons["text.jsonl:27"].startswith("nothing to learn")
    assert reasons["text.jsonl:28"].startswith("too long: ")
    assert len(listed) == 5
    assert feed.quarantine.count == sum((p - lane) // 2 for lane, p in enumerate(feed.state()["positions"]))


def test_a_batch_of_bad_samples_is_none_or_padding(tmp_path) -> None:
    broken = tmp_path / "broken.png"
    Image.new("RGB", (40, 40)).save(broken)
    broken.write_bytes(broken.read_bytes()[:-30])
    row = Record(turns=(Turn.of("user", "?", [str(broken)]), Turn.of("assistant", "a")))
    feed = make({"bad": Rows("bad", [row] * 40)}, lanes=1, packs=1)
    (handle,) = feed.plan(0)
    assert feed.load(handle, step=0, part=0) is None
    assert feed.names(handle) == []
    strict = make({"bad": Rows("bad", [row] * 40)}, lanes=1, packs=1, strict=True)
    (handle,) = strict.plan(0)
    made = strict.load(handle, step=0, part=0)
    assert (len(made), len(made.media["image"]), made.docs) == (256, 12, 1)
    assert (made.labels_T == IGNORE).all()
    assert strict.names(handle) == ["padding"]


def test_strict_batches_have_one_size() -> None:
    plain, feed = make(), make(strict=True)
    for step in range(5):
        for p, (a, b) in enumerate(zip(plain.plan(step), feed.plan(step), strict=True)):
            assert a == b
            made = feed.load(b, step=step, part=p)
            assert len(made) == 512
            assert sum(map(len, made.media.values())) == 24
            assert made.docs == len(feed.names(b))
            assert float(made.weight_T.sum()) == pytest.approx(
                float(plain.load(a, step=step, part=p).weight_T.sum())
            )


def test_the_quarantine_may_end_the_run() -> None:
    data = sets()
    data["text"].rows[3:6] = [DataError(f"text.jsonl:{n + 1}: torn") for n in range(3, 6)]
    with pytest.raises(DataError, match="3 bad samples"):
        batches(make(data, quarantine=Bin(most=2)), 0, 30)


def test_data_without_any_good_sample_end_it_too() -> None:
    rows = Rows("a", [DataError(f"a.jsonl:{n + 1}: torn") for n in range(5)])
    with pytest.raises(DataError, match=r"none of the last 11 samples can be used \(the last: a.jsonl"):
        make({"a": rows}).plan(0)


def test_what_is_wrong_with_the_machine_is_no_bad_sample() -> None:
    rows = Rows("a", [MissingExtraError("av is not installed")])
    with pytest.raises(MissingExtraError):
        make({"a": rows}).plan(0)


def test_files_that_changed_are_noticed() -> None:
    data = {"a": Rows("a", [talk(n) for n in range(40)])}
    feed = make(data, lanes=1, packs=1)
    (handle,) = feed.plan(0)
    index = handle.packs[0].pieces[0].key[1]
    data["a"].rows[index] = talk(index, words=9)
    feed.load(handle, step=0, part=0)
    ((where, reason),) = feed.quarantine.listed
    assert where == f"a.jsonl:{index + 1}"
    assert reason.endswith("its files have changed")


def test_a_picture_that_lies_across_a_cut_by_now_is_a_bad_sample() -> None:
    wide, square = Image.new("RGB", (32, 8)), Image.new("RGB", (8, 8))

    def row(*pictures: Image.Image) -> Record:
        return Record(turns=(Turn.of("user", "which?", pictures), Turn.of("assistant", "this one")))

    data = {"a": Rows("a", [row(wide, square)])}
    feed = make(data, lanes=1, packs=1)
    found = measure(data["a"].rows[0], spec_free(), train=True)
    stop = found.cuts[1][0]  # before the second picture
    handle = Part((Pack((Piece(("a", 0, 0), 0, stop, found.cuts[0][2], found.tokens),)),))
    assert len(feed.load(handle, step=0, part=0)) == stop
    data["a"].rows[0] = row(square, wide)  # as long as before
    assert feed.load(handle, step=0, part=0) is None
    ((where, reason),) = feed.quarantine.listed
    assert where == "a.jsonl:1"
    assert "cut the image" in reason


def test_measures_are_remembered() -> None:
    data = sets()
    feed = make(data, remember=1000)
    for step in range(12):
        feed.plan(step)
    assert (
        max(nth for lane in feed.state()["packers"] for _, ps in lane["open"] for (_, _, nth), *_ in ps) > 1
    )
    assert max(max(rows.read.values()) for rows in data.values()) == 1
    again, few = make(), make(remember=3)
    assert [again.plan(s) for s in range(12)] == [few.plan(s) for s in range(12)]


def test_steps_come_in_order_and_states_fit() -> None:
    feed = make()
    feed.plan(0)
    with pytest.raises(UsageError, match="goes on with step 1, not 3"):
        feed.plan(3)
    state = feed.state()
    for other, said in [
        (make(seed=1), "saved with seed 0, not 1"),
        (make(packs=1), "saved with packs 2, not 1"),
        (make(lanes=1), "saved with 2 lanes, not 1"),
        (make(max_tokens=128), "saved with max_tokens 256"),
    ]:
        with pytest.raises(ConfigError, match=said):
            other.restore(state)
    data = sets()
    data["seen"].rows.pop()
    with pytest.raises(DataError, match="data set seen has 16 samples but had 17"):
        make(data).restore(state)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs lanes and packs"):
        make(lanes=0)
    with pytest.raises(ConfigError, match="strict padding needs a limit of tiles"):
        PackedFeed(
            sets(),
            {"text": 1.0},
            spec(),
            Bin(),
            packers=[Packer(max_tokens=9, max_tiles=None)],
            packs=1,
            seed=0,
            strict=True,
        )


def test_what_the_log_says() -> None:
    feed = make()
    assert feed.capacity == {"tokens": 512, "tiles": 24}
    assert feed.about(9) == (
        "2 x 2 packs of 256 tokens, 12 tiles a step (best_fit, refuse what overflows, 3 open); "
        "samples: seen 17, text 23"
    )
