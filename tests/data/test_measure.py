"""Measuring agrees with laying out; what training asks of a layout; pieces of documents; padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.layout import LayoutSpec, count_tokens, layout, measure
from chiasm.data.packing import Item
from chiasm.data.sequence import IGNORE, IMAGE, TEXT, VIDEO, MediaBatch, Sequence
from chiasm.errors import ConfigError, DataError
from chiasm.media.frames import FrameSampling
from chiasm.media.tiles import TilePolicy
from chiasm.nn.losses import token_weights
from clips import folder
from tiny_tokenizers import byte_level

SIDE, ROWS = 8, 3


def make(max_tiles: int = 6, **options) -> LayoutSpec:
    tiles = TilePolicy(image_size=SIDE, max_tiles=max_tiles, mode="original")
    options = {"system": "", "tokens_per_tile": ROWS, "template": "internvl2_5", **options}
    return LayoutSpec(tokenizer=byte_level(), tiles=tiles, **options)


def picture(width: int, height: int, seed: int = 0) -> dict:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def ask(*parts: object) -> dict:
    return {"role": "user", "content": list(parts)}


def say(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("film") / "film", [f"{n}.png" for n in range(12)])


TURNS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=3),
        st.sampled_from(["", "What is it?", "a b c " * 9]),
        st.sampled_from(["Yes.", "A cat and a dog.\n\n", "x " * 30]),
        st.sampled_from([None, 2, 5]),
    ),
    min_size=1,
    max_size=3,
)


def conversation(turns, film: Path | None) -> list[dict]:
    out = []
    for pictures, question, answer, frames in turns:
        videos = (
            [] if film is None or frames is None else [{"type": "video", "video": film, "frames": frames}]
        )
        out += [ask(*(picture(*size) for size in pictures), *videos, question), say(answer)]
    return out


@settings(max_examples=60)
@given(turns=TURNS, max_tiles=st.sampled_from([None, 1, 4]), train=st.booleans(), seed=st.integers(0, 9))
def test_a_measure_is_what_the_layout_makes(film, turns, max_tiles, train, seed):
    said = conversation(turns, film)
    spec = make(sampling=FrameSampling(mode="rand", frames=3))
    options = {"train": train, "max_tiles": max_tiles, "seed": seed}
    found, made = measure(said, spec, **options), layout(said, spec, **options)
    assert found.tokens == len(made)
    assert found.tiles == sum(len(batch) for batch in made.media.values())
    labelled = [] if made.labels_T is None else (made.labels_T != IGNORE).nonzero().flatten().tolist()
    assert found.learned == len(labelled)
    assert [t for first, end in found.runs for t in range(first, end)] == labelled
    assert found.cuts == tuple((span.start - 1, span.length + 2, span.items) for span in made.spans)
    start, end = (byte_level().token_to_id(token) for token in ("<img>", "</img>"))
    for first, length, _ in found.cuts:
        assert (made.ids_T[first], made.ids_T[first + length - 1]) == (start, end)
    if max_tiles is None:
        assert count_tokens(said, spec, train=train) == found.tokens


def test_frames_drawn_at_random_follow_the_seed(film):
    spec = make(sampling=FrameSampling(mode="rand", frames=None, min_frames=2, max_frames=9))
    said = [ask({"type": "video", "video": film}, "?"), say("a")]
    sizes = [measure(said, spec, seed=seed).tiles for seed in range(12)]
    assert len(set(sizes)) > 3
    for seed, size in enumerate(sizes):
        made = layout(said, spec, seed=seed)
        assert len(made.media["video"]) == size
        assert torch.equal(made.media["video"].data, layout(said, spec, seed=seed).media["video"].data)
    own = [ask({"type": "video", "video": film, "mode": "rand", "frames": 3, "seed": 5}, "?"), say("a")]
    times = [layout(own, spec, seed=seed).media["video"].times_N.tolist() for seed in range(6)]
    assert all(t == times[0] for t in times)  # a part's own seed wins


def test_augmented_tiles_are_hashed_as_they_are(film):
    seen = []

    def invert(tiles):
        seen.append(len(tiles))
        return 255 - tiles

    said = [ask(picture(16, 8), {"type": "video", "video": film, "frames": 2}, picture(8, 8), "?"), say("a")]
    plain, changed = layout(said, make()), layout(said, make(), augment=invert)
    assert seen == [1, 1, 3, 1]  # each frame, then each picture with its thumbnail
    for name in ("image", "video"):
        assert torch.equal(changed.media[name].data, 255 - plain.media[name].data)
    assert not {span.key for span in plain.spans} & {span.key for span in changed.spans}
    with pytest.raises(ConfigError, match="augment turned tiles"):
        layout(said, make(), augment=lambda tiles: tiles.float())


def test_nothing_to_learn_is_found_without_decoding():
    with pytest.raises(DataError, match="nothing to learn"):
        measure(ask("Hi"), make(), train=True)


def test_the_limit_of_a_set_may_be_below_the_least():
    spec = LayoutSpec(
        tokenizer=byte_level(),
        template="internvl2_5",
        tiles=TilePolicy(image_size=SIDE, min_tiles=3, max_tiles=6),
        tokens_per_tile=ROWS,
    )
    assert spec.limited(None) is spec
    assert measure(ask(picture(16, 8)), spec, max_tiles=1).tiles == 1


def test_weights_count_samples_or_responses():
    said = [ask("a"), say("Yes."), ask("b"), say("A cat and a dog and a cat.")]
    whole, each = (
        layout(said, make(loss_count=count, loss_power=1.0), train=True) for count in ("sample", "response")
    )
    runs = measure(said, make(), train=True).runs
    assert len(runs) == 2
    assert float(whole.weight_T.sum()) == pytest.approx(1)
    for first, end in runs:
        assert float(each.weight_T[first:end].sum()) == pytest.approx(1)
    assert float(each.weight_T.sum()) == pytest.approx(2)
    with pytest.raises(ConfigError, match="loss_count is 'turn'"):
        make(loss_count="turn")


# --- pieces -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(turns=TURNS, count=st.sampled_from(["sample", "response"]), data=st.data())
def test_pieces_are_documents_of_their_own(film, turns, count, data):
    spec = make(loss_count=count)
    said = conversation(turns, film)
    whole, found = layout(said, spec, train=True), measure(said, spec, train=True)
    item = Item.of(("s", 0, 0), found)
    start, spans = 0, []
    while start < len(whole):  # as a packer cuts
        stop = item.reach(start, data.draw(st.integers(25, 60)), data.draw(st.integers(7, 9)))
        spans.append((start, stop))
        start = stop
    pieces = [whole.piece(*span, power=spec.loss_power, count=count) for span in spans]
    assert torch.equal(torch.cat([p.ids_T for p in pieces]), whole.ids_T)
    assert torch.equal(torch.cat([p.kind_T for p in pieces]), whole.kind_T)
    for name, batch in whole.media.items():
        assert torch.equal(torch.cat([p.media[name].data for p in pieces if name in p.media]), batch.data)
    assert [s.key for p in pieces for s in p.spans] == [s.key for s in whole.spans]
    for (start, stop), piece in zip(spans, pieces, strict=True):
        assert piece.pos_T.tolist() == list(range(stop - start))
        expected = whole.labels_T[start:stop].clone()
        if stop < len(whole):
            expected[-1] = IGNORE
        assert torch.equal(piece.labels_T, expected)
        assert torch.equal(piece.weight_T, token_weights(expected, piece.doc_T, spec.loss_power, count))
        assert int((expected != IGNORE).sum()) == item.learned(start, stop)
        assert item.piece(start, stop).tiles == sum(len(b) for b in piece.media.values())
        # What a row must predict is the token that follows it in the piece.
        for t in (expected != IGNORE).nonzero().flatten().tolist():
            assert expected[t] == piece.ids_T[t + 1]
        for span in piece.spans:
            kind = VIDEO if span.media == "video" else IMAGE
            assert (piece.kind_T[span.start : span.start + span.length] == kind).all()
    packed = Sequence.pack(pieces)
    assert all(torch.equal(a.ids_T, b.ids_T) for a, b in zip(packed.split(), pieces, strict=True))


def test_a_piece_may_keep_its_weights_and_cuts_no_picture():
    row = layout([ask(picture(8, 8), "?"), say("A cat.")], make(), train=True)
    learned = (row.labels_T != IGNORE).nonzero().flatten().tolist()
    piece = row.piece(0, learned[1] + 1)
    assert piece.weight_T[learned[0]] == row.weight_T[learned[0]] > 0
    assert piece.weight_T[learned[1]] == 0
    assert piece.labels_T[-1] == IGNORE
    (span,) = row.spans
    with pytest.raises(DataError, match="cut the image at rows"):
        row.piece(0, span.start + 1)
    with pytest.raises(DataError, match="are no piece of a document"):
        row.piece(3, 3)
    with pytest.raises(DataError, match="only one document"):
        Sequence.pack([row, row]).piece(0, 3)


# --- padding ----------------------------------------------------------------------------------------------------


def test_padding_is_a_document_that_learns_nothing_and_tiles_that_stand_nowhere(film):
    rows = [
        layout([ask(picture(16, 8), "?"), say("a")], make(), train=True),
        layout([ask({"type": "video", "video": film, "frames": 2}, "?"), say("b")], make(), train=True),
    ]
    row = Sequence.pack(rows)
    padded = row.padded(len(row) + 7, 9, shape=(3, SIDE, SIDE))
    assert len(padded) == len(row) + 7
    assert sum(map(len, padded.media.values())) == 9
    assert padded.docs == 3
    assert padded.pos_T[-7:].tolist() == list(range(7))
    assert (padded.labels_T[-7:] == IGNORE).all()
    assert not padded.weight_T[-7:].any()
    assert (padded.kind_T[-7:] == TEXT).all()
    assert padded.spans == row.spans
    assert all(torch.equal(a.ids_T, b.ids_T) for a, b in zip(padded.split()[:2], rows, strict=True))
    # Packs of padded packs keep their spans on their own tiles.
    twice = Sequence.pack([padded, padded])
    for span in twice.spans:
        own = twice.media[span.media].data[span.first : span.first + span.items]
        assert own.any()
    with pytest.raises(DataError, match="cannot pad"):
        row.padded(3)
    with pytest.raises(DataError, match="shape of one image item"):
        Sequence.of_text([1, 2]).padded(3, 1)
    assert row.padded(len(row)).media["image"] is row.media["image"]


def test_padding_of_timed_media_has_times():
    timed = Sequence.of_text([1])
    timed = Sequence(
        ids_T=timed.ids_T,
        kind_T=timed.kind_T,
        doc_T=timed.doc_T,
        pos_T=timed.pos_T,
        media={"image": MediaBatch(torch.ones(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([4.0]))},
    )
    assert timed.padded(2, 3).media["image"].times_N.tolist() == [4, 0, 0]
