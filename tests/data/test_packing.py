"""The packer: both methods, overflow, and what must hold of every stream."""

from __future__ import annotations

import json
import time
from collections import Counter
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.data import packing
from chiasm.data.packing import POOR, Item, Pack, Packer, Piece, example_items, simulate
from chiasm.errors import ConfigError, DataError

TOKENS, TILES = 64, 6


@st.composite
def items(draw):
    """Samples of up to 120 tokens with pictures anywhere and labels anywhere behind the first row."""
    out = []
    for index in range(draw(st.integers(0, 60))):
        cuts, at, tiles = [], 0, 0
        for _ in range(draw(st.integers(0, 3))):
            at += draw(st.integers(0, 12))
            own = draw(st.integers(1, 4))
            cuts.append((at, own * 4 + 2, own))
            at, tiles = at + own * 4 + 2, tiles + own
        tokens = at + draw(st.integers(1, 70))
        runs, row = [], 0
        while row < tokens - 1 and draw(st.booleans()):
            first = draw(st.integers(row, tokens - 2))
            end = draw(st.integers(first + 1, tokens - 1))
            runs.append((first, end))
            row = end + 1
        out.append(Item(("set", index, 0), tokens, tiles, tuple(cuts), tuple(runs)))
    return out


def make(method="best_fit", overflow="refuse", **options):
    options = {"max_tokens": TOKENS, "max_tiles": TILES, "buffer": 4, **options}
    return Packer(method=method, overflow=overflow, **options)


def run(packer, stream):
    packs, refused, dropped = [], [], []
    for item in stream:
        pushed = packer.push(item)
        assert len(packer) <= packer.buffer
        packs += pushed.packs
        refused += [(item.key, pushed.refused)] if pushed.refused else []
        dropped += pushed.dropped
    return packs, refused, dropped


EVERY = st.sampled_from([(m, o) for m in ("best_fit", "first_fit") for o in ("refuse", "truncate", "split")])


@settings(max_examples=60)
@given(items(), EVERY, st.sampled_from([1, 3, 4]), st.sampled_from([None, TILES]))
def test_every_row_is_packed_once_or_accounted_for_and_no_limit_is_broken(stream, how, buffer, max_tiles):
    packer = make(*how, buffer=buffer, max_tiles=max_tiles)
    packs, refused, dropped = run(packer, stream)
    packs += packer.flush()
    for pack in packs:
        assert 0 < pack.tokens <= TOKENS
        assert max_tiles is None or pack.tiles <= max_tiles
    assert all(reason.startswith("too long") for _, reason in refused)
    out = {key for key, _ in refused}
    rows = {item.key: Counter() for item in stream}
    for piece in [p for pack in packs for p in pack.pieces] + dropped:
        rows[piece.key].update(range(piece.start, piece.stop))
    lost = 0
    for item in stream:
        seen = rows[item.key]
        if item.key in out:
            assert not seen  # all or nothing
            continue
        assert set(seen.values()) == {1}
        assert min(seen) == 0
        if how[1] == "truncate":
            lost += item.tokens - len(seen)
            assert len(seen) == item.tokens or item.tokens > TOKENS or item.tiles > (max_tiles or 99)
        else:
            assert len(seen) == item.tokens
    counts = packer.counts
    assert counts.items == len(stream)
    assert counts.refused == len(refused)
    assert counts.dropped == len(dropped)
    assert counts.lost_rows == lost + sum(piece.tokens for piece in dropped)
    assert (counts.packs, counts.tokens) == (len(packs), sum(pack.tokens for pack in packs))


@settings(max_examples=60)
@given(items(), st.sampled_from(["best_fit", "first_fit"]))
def test_cuts_leave_pictures_whole_and_pieces_worth_learning(stream, method):
    packer = make(method, "split")
    packs, _, dropped = run(packer, stream)
    by_key = {item.key: item for item in stream}
    for piece in [p for pack in packs + packer.flush() for p in pack.pieces] + dropped:
        item = by_key[piece.key]
        inside = range(piece.start, piece.stop)
        for first, length, _ in item.cuts:
            assert len(set(inside) & set(range(first, first + length))) in (0, length)
        assert piece.tiles == sum(own for first, _, own in item.cuts if first in inside)
        if not piece.whole:
            assert (item.learned(piece.start, piece.stop) * POOR <= piece.tokens) == (piece in dropped)


@settings(max_examples=40)
@given(items(), EVERY, st.data())
def test_a_restored_packer_goes_on_as_the_first_one(stream, how, data):
    stop = data.draw(st.integers(0, len(stream)))
    packer, other = make(*how), make(*how)
    before, *_ = run(packer, stream[:stop])
    state = json.loads(json.dumps(packer.state()))
    rest = run(packer, stream[stop:])
    other.restore(state)
    assert run(other, stream[stop:]) == rest
    assert other.state() == packer.state()
    whole = make(*how)
    assert run(whole, stream)[0] == before + rest[0]
    assert whole.flush() == other.flush()


def slow_best_fit(stream, buffer):
    """The rule word for word, over a plain list: the longest pack that the sample fits into."""
    opened, done = [], []
    behind = {}  # how many packs were opened behind each
    for item in stream:
        if item.tokens > TOKENS or item.tiles > TILES:
            continue
        fitting = [
            pack
            for pack in opened
            if sum(i.tokens for i in pack) + item.tokens <= TOKENS
            and sum(i.tiles for i in pack) + item.tiles <= TILES
        ]
        if fitting:  # of equally long ones the oldest
            longest = max(sum(i.tokens for i in pack) for pack in fitting)
            pack = next(p for p in fitting if sum(i.tokens for i in p) == longest)
        else:
            pack = []
            opened.append(pack)
            behind = {id(p): behind.get(id(p), -1) + 1 for p in opened}
        pack.append(item)
        if sum(i.tokens for i in pack) == TOKENS:
            opened.remove(pack)
            done.append(pack)
        elif not fitting and behind[id(opened[0])] >= packing.PATIENCE * buffer:
            done.append(opened.pop(0))
        elif len(opened) > buffer:
            limited = [pack for pack in opened if sum(i.tiles for i in pack) == TILES]
            pool = limited if len(limited) > buffer / 2 else opened
            longest = max(sum(i.tokens for i in pack) for pack in pool)
            fullest = next(p for p in pool if sum(i.tokens for i in p) == longest)
            opened.remove(fullest)
            done.append(fullest)
    return [[item.key for item in pack] for pack in done]


@settings(max_examples=50)
@given(items(), st.sampled_from([1, 3]), st.sampled_from([1, 20]))
def test_best_fit_equals_its_slow_twin(stream, buffer, patience):
    with mock.patch.object(packing, "PATIENCE", patience):
        packs, *_ = run(make(buffer=buffer), stream)
        assert [[piece.key for piece in pack.pieces] for pack in packs] == slow_best_fit(stream, buffer)


def test_no_sample_waits_for_ever():
    """Packs at the limit of tiles that are shorter than all later ones are never the longest."""
    packer = make(buffer=4)
    waited, given_out = 0, set()
    for n in range(1000):
        for pack in packer.push(Item((n,), 20 if n in (3, 5, 8) else 30, 6)).packs:
            given_out |= {piece.key[0] for piece in pack.pieces}
            waited = max(waited, *(n - piece.key[0] for piece in pack.pieces))
    assert {3, 5, 8} <= given_out
    assert waited == packing.PATIENCE * packer.buffer


def keys(packs):
    return [[piece.key[0] for piece in pack.pieces] for pack in packs]


def test_first_fit_by_hand_as_in_the_released_code():
    packer = make("first_fit", buffer=2)
    packs = []
    # c fits into both; the one with more tiles, b's, comes first.
    for name, tokens, tiles in [("a", 40, 1), ("b", 30, 4), ("c", 20, 1), ("d", 60, 0), ("e", 50, 0)]:
        packs += packer.push(Item((name,), tokens, tiles)).packs
    assert keys(packs) == [["b", "c"], ["a"]]  # by most tiles, when a third and a fourth were opened
    (done,) = packer.push(Item(("f",), 1, 6)).packs  # at the limit of tiles
    assert keys([done]) == [["d", "f"]]
    assert keys(packer.flush()) == [["e"]]


def test_best_fit_takes_the_longest_and_the_longest_goes():
    packer = make(buffer=2)
    packs = []
    for name, tokens, tiles in [("a", 30, 0), ("b", 40, 0), ("c", 20, 0), ("t", 10, 6)]:
        packs += packer.push(Item((name,), tokens, tiles)).packs
    assert packs == []
    packs += packer.push(Item(("d",), 50, 2)).packs  # fits nowhere: a third pack, and b's is the longest
    assert keys(packs) == [["b", "c"]]
    packs += packer.push(Item(("e",), 14, 1)).packs
    assert keys(packs) == [["b", "c"], ["d", "e"]]  # full in tokens
    assert keys(packer.flush()) == [["a", "t"]]


def test_packs_at_the_tile_limit_do_not_take_over_the_buffer():
    packer = make(buffer=2)
    for name, tokens, tiles in [("t", 10, 6), ("u", 20, 6)]:
        assert packer.push(Item((name,), tokens, tiles)).packs == []
    (pack,) = packer.push(Item(("a",), 60, 1)).packs  # longer, but the others can take only text
    assert keys([pack]) == [["u"]]


def test_too_long_samples_are_refused_by_name_truncated_or_split():
    long = Item(("long",), 100, 0, (), ((50, 99),))
    refused = make().push(long)
    assert refused.refused == "too long: 100 tokens, 0 tiles (limit 64 tokens, 6 tiles)"
    assert not refused.packs
    (pack,) = make(overflow="truncate").push(long).packs
    assert pack == Pack((Piece(("long",), 0, 64, 0, 100),))
    packer = make(overflow="split")
    (left,) = packer.push(long).packs
    assert left == Pack((Piece(("long",), 0, 64, 0, 100),))
    assert packer.flush() == [Pack((Piece(("long",), 64, 100, 0, 100),))]
    assert (packer.counts.cut, packer.counts.lost_rows) == (1, 0)


def test_a_cut_moves_before_the_picture_and_keeps_the_text_behind_it():
    item = Item(("x",), 100, 2, ((55, 10, 1), (80, 10, 1)), ((0, 99),))
    packer = make(overflow="split")
    packer.push(item)
    pieces = [piece for pack in packer.flush() for piece in pack.pieces]
    assert [(p.start, p.stop, p.tiles) for p in pieces] == [(0, 55, 0), (55, 100, 2)]


def test_pieces_without_labels_are_dropped_and_counted():
    item = Item(("x",), 128, 0, (), ((100, 127),))
    packer = make(overflow="split")
    (dropped,) = packer.push(item).dropped
    assert (dropped.start, dropped.stop) == (0, 64)
    assert (packer.counts.dropped, packer.counts.lost_rows) == (1, 64)
    none = Item(("y",), 128, 0, (), ())
    assert "no piece of it has more than 1/256 labelled tokens" in (packer.push(none).refused or "")
    cut = Item(("z",), 128, 0, (), ((63, 64),))  # its only label is at the cut
    assert packer.push(cut).refused


def test_a_picture_beyond_the_limits_cannot_be_cut():
    for overflow in ("split", "truncate"):
        refused = make(overflow=overflow).push(Item(("x",), 60, 7, ((3, 40, 7),), ((50, 59),))).refused
        assert refused is not None
        assert refused.endswith("and one picture of 40 tokens, 7 tiles cannot be cut")


def test_nothing_is_cut_where_the_pictures_are_not_known():
    packer = make(overflow="split", buffer=2)
    assert (packer.push(Item(("a",), 70, 2)).refused or "").endswith("where its pictures lie is not known")
    packer.push(Item(("b",), 50, 2))
    assert not packer.push(Item(("c",), 40, 2)).packs
    assert packer.counts.cut == 0


def test_a_sample_is_cut_to_fill_a_pack_once_half_of_the_buffer_is_in_use():
    packer = make(overflow="split", buffer=4)
    assert packer.push(Item(("a",), 60)).packs == []
    assert packer.push(Item(("b",), 50)).packs == []
    (pack,) = packer.push(Item(("c",), 40)).packs  # b has the most room
    assert pack.pieces == (Piece(("b",), 0, 50, 0, 50), Piece(("c",), 0, 14, 0, 40))
    assert keys(packer.flush()) == [["a"], ["c"]]


def test_documents_may_have_a_shorter_limit_than_packs():
    packer = make(max_document=30, overflow="split")
    (pack,) = packer.push(Item(("a",), 64)).packs
    assert [piece.tokens for piece in pack.pieces] == [30, 30, 4]


def test_an_empty_sample_is_refused():
    assert make().push(Item(("a",), 0)).refused == "too short: no tokens"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tiles": 0},
        {"buffer": 0},
        {"method": "worst"},
        {"overflow": "x"},
        {"max_document": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError):
        Packer(**{"max_tokens": 8, "max_tiles": 2, **wrong})


def test_other_settings_cannot_go_on():
    with pytest.raises(ConfigError, match="saved with buffer 4 and cannot go on with 5"):
        make(buffer=5).restore(make().state())


def test_fill_and_speed_of_a_mixture():
    stream = example_items(20_000)
    started = time.process_time()
    best = simulate(stream, max_tokens=8192, max_tiles=24)
    assert 20_000 / (time.process_time() - started) > 20_000
    assert best.token_fill > 0.99
    assert best.waste == 1 - best.token_fill
    first = simulate(stream, max_tokens=8192, max_tiles=24, method="first_fit")
    assert 0.85 < first.token_fill < best.token_fill
    split = simulate(stream, max_tokens=8192, max_tiles=24, overflow="split")
    assert split.token_fill > 0.99
    assert split.cut > 0
    assert (split.refused, best.refused) == (0, 1)  # one text is longer than a pack


def test_simulations_of_almost_nothing():
    few = simulate([(10, 1), (20, 2)], max_tokens=100, max_tiles=None)
    assert (few.packs, few.rest, few.token_fill, few.tile_fill) == (0, 1, 0.3, 0.0)
    with pytest.raises(DataError, match="none of 1 samples fits into 5 tokens"):
        simulate([(10, 1)], max_tokens=5, max_tiles=None)
