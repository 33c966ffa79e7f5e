"""What all worlds share: messages, the InternVL layout on disk, caches."""

import json

import numpy as np
import pytest
from PIL import Image

from chiasm.data.message import from_row, parse_messages
from chiasm.errors import DataError
from chiasm.worlds import FAMILIES, build_cache, cached, load_cache, open_world, write_jsonl
from chiasm.worlds.counting import CountingWorld
from chiasm.worlds.words import WordsWorld


def test_to_message_is_a_conversation():
    sample = CountingWorld("test").sample(4)
    user, assistant = sample.to_message()
    assert user["content"][0]["image"].size == (64, 64)
    assert user["content"][1] == {"type": "text", "text": sample.question}
    assert assistant["content"] == [{"type": "text", "text": sample.answer}]
    assert len(sample.to_message(answered=False)) == 1
    assert [turn.role for turn in parse_messages(sample.to_message())] == ["user", "assistant"]


def test_jsonl_layout_round_trip(tmp_path):
    world = WordsWorld("test", size=6)
    path = write_jsonl(world, tmp_path, 5)
    meta = json.loads(path.read_text())["words_test"]
    assert meta == {
        "root": ".",
        "annotation": "words_test.jsonl",
        "data_augment": False,
        "repeat_time": 1,
        "length": 5,
    }
    rows = [json.loads(line) for line in (tmp_path / meta["annotation"]).read_text().splitlines()]
    assert len(rows) == 5
    for index, row in enumerate(rows):
        sample = world.sample(index)
        with Image.open(path.parent / meta["root"] / row["image"]) as picture:
            np.testing.assert_array_equal(np.asarray(picture), sample.image)
        assert (row["width"], row["height"], row["id"]) == (64, 64, sample.key)
        asked, answered = from_row(row).turns
        assert [part.value for part in asked.of_kind("image")] == [row["image"]]
        assert (asked.role, answered.role, answered.text) == ("user", "assistant", sample.answer)
        human, gpt = row["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{sample.question}"}
        assert gpt == {"from": "gpt", "value": sample.answer}
    with pytest.raises(DataError, match="cannot write 7"):
        write_jsonl(world, tmp_path, 7)


def test_cache_equals_samples_and_is_built_once(tmp_path, monkeypatch):
    world = CountingWorld("train", size=40)
    arrays = load_cache(build_cache(world, 12, tmp_path / "some" / "cache.npz", start=20))
    for row in range(12):
        sample = world.sample(20 + row)
        np.testing.assert_array_equal(arrays["images"][row], sample.image)
        assert arrays["questions"][arrays["question_ids"][row]] == sample.question
        assert (arrays["answers"][row], arrays["keys"][row]) == (sample.answer, sample.key)
        assert json.loads(str(arrays["meta"][row])) == sample.meta
    assert json.loads(str(arrays["manifest"]))["start"] == 20
    with pytest.raises(DataError, match="no range"):
        build_cache(world, 30, tmp_path / "x.npz", start=20)

    first = cached(world, tmp_path, 6)
    monkeypatch.setattr(CountingWorld, "sample", None)
    np.testing.assert_array_equal(cached(world, tmp_path, 6)["images"], first["images"])
    assert len(list(tmp_path.glob("counting-train-0-6-*.npz"))) == 1


def test_bad_caches_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot read the cache"):
        load_cache(tmp_path / "none.npz")
    np.savez(tmp_path / "odd.npz", images=np.zeros(3))
    with pytest.raises(DataError, match="lacks"):
        load_cache(tmp_path / "odd.npz")


def test_unknown_names():
    assert tuple(FAMILIES) == ("cifar10", "fashion", "words", "counting")
    with pytest.raises(DataError, match="unknown world"):
        open_world("mnist", "train")
    with pytest.raises(DataError, match="unknown split"):
        open_world("counting", "val")
