"""PackedData: from files to packed batches, as a node of recipes; agreement with the plain way; layouts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.data.datasets import DatasetSpec
from chiasm.data.layout import layout
from chiasm.data.quarantine import QuarantinePolicy
from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError, DataError, UsageError
from chiasm.media.tiles import TilePolicy
from chiasm.train.data import Source
from chiasm.train.packed import PackedData, TokenizerLayout
from chiasm.train.recipe import Recipe, apply_overrides, resolved
from chiasm.train.run import RunFolder
from tiny_tokenizers import byte_level


@dataclass(frozen=True)
class Nothing:
    def build(self, *parts):
        raise NotImplementedError


def recipe(data: PackedData, **changes) -> Recipe:
    settings = {"steps": 9, "batch": 4, "accumulate": 2, "seed": 3, **changes}
    return Recipe(name="packed", model=Nothing(), objective=Nothing(), data=data, **settings)


def row(words: int, image: str | None = None) -> dict:
    talk = [{"from": "human", "value": "what is it"}, {"from": "gpt", "value": "a cat " * words}]
    return {"conversations": talk} | ({} if image is None else {"image": image})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    for n in range(5):
        width, height = draw.integers(4, 40, 2)
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    for name, count in (("a", 40), ("b", 10)):
        rows = [row(int(draw.integers(1, 30)), f"{n % 5}.png" if n % 2 else None) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    meta = {
        "a": {"root": str(tmp_path), "annotation": str(tmp_path / "a.jsonl"), "repeat_time": 1, "length": 40},
        "b": {
            "root": str(tmp_path),
            "annotation": str(tmp_path / "b.jsonl"),
            "data_augment": True,
            "max_dynamic_patch": 1,
        },
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    byte_level().save(tmp_path / "tokenizer")
    return tmp_path


def node(folder: Path, **changes) -> PackedData:
    own = TokenizerLayout(
        folder=str(folder / "tokenizer"),
        tiles=TilePolicy(image_size=8, max_tiles=4),
        tokens_per_tile=3,
        system="",
        loss_count="response",
    )
    settings = {
        "layout": own,
        "meta": str(folder / "meta.json"),
        "max_tokens": 256,
        "max_tiles": 12,
        **changes,
    }
    return PackedData(**settings)


def test_a_feed_gives_the_documents_that_the_plain_way_gives(folder: Path) -> None:
    data = node(folder)
    source = data.open()
    assert isinstance(source, Source)
    assert source.sizes == {"a": 40, "b": 10}
    assert source.weights == {"a": 40, "b": 10}
    assert source.spec.loss_count == "response"
    feed = source.feed(recipe(data))
    for step in range(3):
        parts = feed.plan(step)
        assert [len(part.packs) for part in parts] == [2, 2]
        for p, part in enumerate(parts):
            batch = feed.load(part, step=step, part=p)
            keys = [piece.key for pack in part.packs for piece in pack.pieces]
            for key, document in zip(keys, batch.split(), strict=True):
                (plain,) = source.fetch([key[:2]], torch.Generator()).split()
                assert torch.equal(document.ids_T, plain.ids_T)
                assert torch.equal(document.weight_T, plain.weight_T)
                if key[0] == "a":
                    assert [s.key for s in document.spans] == [s.key for s in plain.spans]
                else:  # one tile a picture, through JPEG
                    assert all(s.items == 1 for s in document.spans)
    whole = source.fetch([("a", 1), ("b", 2)], torch.Generator())
    assert whole.docs == 2


def test_jpeg_changes_only_the_sets_that_are_augmented(folder: Path) -> None:
    data = node(folder)
    source = data.open()
    feed, changed = source.feed(recipe(data)), 0
    for step in range(8):
        for p, part in enumerate(feed.plan(step)):
            keys = [piece.key for pack in part.packs for piece in pack.pieces]
            for (name, index, _), document in zip(
                keys, feed.load(part, step=step, part=p).split(), strict=True
            ):
                record = source.sets[name].record(index)
                tiles = 1 if name == "b" else None
                plain = layout(record, replace(source.spec, max_length=None), train=True, max_tiles=tiles)
                same = [s.key for s in document.spans] == [s.key for s in plain.spans]
                assert same or name == "b"
                changed += not same
    assert changed > 3


def test_a_run_lists_its_bad_samples_and_goes_on_exactly(folder: Path) -> None:
    with (folder / "a.jsonl").open("a") as file:
        file.write(json.dumps(row(2, "missing.png")) + "\n" + json.dumps(row(300)) + "\n{")
    data = node(folder, quarantine=QuarantinePolicy(max_share=0.5), buffer=4)
    run = RunFolder.create(folder / "runs", recipe(data))
    feed = data.open().feed(recipe(data), run)
    feed_batches = [batches(feed, step) for step in range(6)]
    state = json.loads(json.dumps(feed.state()))
    after = [batches(feed, step) for step in range(6, 9)]
    listed = [json.loads(line) for line in (run.path / "quarantine.jsonl").read_text().splitlines()]
    assert {one["where"] for one in listed} == {"a.jsonl:41", "a.jsonl:42", "a.jsonl:43"}
    assert all(one["reason"] for one in listed)
    other = data.open().feed(recipe(data), run)
    other.restore(state)
    for step, wanted in zip(range(6, 9), after, strict=True):
        for a, b in zip(batches(other, step), wanted, strict=True):
            assert torch.equal(a.ids_T, b.ids_T)
            assert a.spans == b.spans
    assert len((run.path / "quarantine.jsonl").read_text().splitlines()) == len(listed)
    fresh = data.open().feed(recipe(data))
    assert torch.equal(batches(fresh, 0)[0].ids_T, feed_batches[0][0].ids_T)


def batches(feed, step: int) -> list[Sequence]:
    return [feed.load(part, step=step, part=p) for p, part in enumerate(feed.plan(step))]


def test_a_model_with_a_shorter_context_bounds_documents_not_packs(folder: Path) -> None:
    data = node(folder)
    data = replace(data, layout=replace(data.layout, max_length=60), overflow="split")
    feed = data.open().feed(recipe(data))
    lengths = [
        piece.tokens
        for step in range(6)
        for part in feed.plan(step)
        for pack in part.packs
        for piece in pack.pieces
    ]
    assert max(lengths) <= 60
    assert feed.counts["cut"] > 0


def test_too_many_bad_samples_end_the_run(folder: Path) -> None:
    (folder / "b.jsonl").write_text("".join(json.dumps(row(2, f"no{n}.png")) + "\n" for n in range(10)))
    data = node(folder, quarantine=QuarantinePolicy(max_share=0.05, min_seen=20))
    feed = data.open().feed(recipe(data))
    with pytest.raises(DataError, match="samples cannot be used, more than 5 %"):
        list(map(feed.plan, range(9)))


def test_it_is_a_node_that_the_command_line_can_set(folder: Path) -> None:
    run = recipe(node(folder))
    changed = apply_overrides(
        run,
        [
            "data.max_tokens=512",
            "data.max_tiles=none",
            "data.overflow=split",
            "data.layout.loss_power=1",
            "data.layout.tiles.max_tiles=2",
            "data.quarantine.max_share=0.2",
        ],
    )
    data = changed.data
    assert isinstance(data, PackedData)
    assert (data.max_tokens, data.max_tiles, data.overflow, data.quarantine.max_share) == (
        512,
        None,
        "split",
        0.2,
    )
    assert data.open().spec.loss_power == 1
    assert json.loads(json.dumps(resolved(changed)))["data"]["layout"]["tiles"]["max_tiles"] == 2
    with pytest.raises(UsageError, match="must be one of"):
        apply_overrides(run, ["data.method=worst"])


def test_settings_that_cannot_be_are_refused(folder: Path) -> None:
    sets = {"a": DatasetSpec(annotation=str(folder / "a.jsonl"), root=str(folder))}
    for wrong, said in [
        ({"meta": ""}, "needs data sets"),
        ({"max_tokens": 0}, "max_tokens must be a whole number"),
        ({"strict": True, "max_tiles": None}, "strict needs a limit of tiles"),
        ({"resampling": "cube"}, "must be length or sqrt"),
        ({"jpeg": "pixel"}, "must be tile or image"),
    ]:
        with pytest.raises(ConfigError, match=said):
            node(folder, **wrong)
    with pytest.raises(ConfigError, match=r"'a' is in data\.sets and in .*meta\.json: rename one"):
        node(folder, sets=sets).open()
    assert node(folder, meta="", sets=sets).open().sizes == {"a": 40}


def test_dev_sets_are_scored_and_never_drawn(folder: Path) -> None:
    data = node(folder)
    held = replace(
        data, dev={"held": DatasetSpec(annotation=str(folder / "b.jsonl"), root=str(folder))}, dev_rows=4
    )
    source = held.open()
    assert source.dev_families == ("held",)
    assert "held" not in source.weights
    rows = list(source.dev("held"))
    assert len(rows) == 4
    assert all(one.labels_T is not None for one in rows)
    again = list(source.dev("held"))
    assert all(
        torch.equal(a.media["image"].data, b.media["image"].data)
        for a, b in zip(rows, again, strict=True)
        if a.media
    )


def test_a_bad_dev_row_is_named(folder: Path) -> None:
    bad = folder / "bad.jsonl"
    bad.write_text(json.dumps(row(3, "missing.png")) + "\n")
    source = replace(node(folder), dev={"held": DatasetSpec(annotation=str(bad), root=str(folder))}).open()
    with pytest.raises(DataError, match=r"bad\.jsonl:1.*missing\.png"):
        list(source.dev("held"))
