"""Rendered words: disjoint words and fonts, legible ink, determinism."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.errors import DataError
from chiasm.worlds import fonts as fonts_module
from chiasm.worlds.fonts import FONTS, find_fonts
from chiasm.worlds.words import MAX_LETTERS, WordsWorld, letters, word_split, words_of

SPLITS = ("train", "dev", "test")


def test_words_are_a_partition_of_the_list():
    parts = {split: set(words_of(split)) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 2050
    assert [len(parts[split]) for split in SPLITS] == [1653, 142, 255]
    assert all(re.fullmatch("[a-z]{3,6}", word) for words in parts.values() for word in words)
    assert all(word_split(word) == split for split, words in parts.items() for word in words)


def test_fonts_are_disjoint_by_name_and_family():
    stems = [stem for split in SPLITS for stem in FONTS[split]]
    assert len(stems) == len(set(stems))

    def families(split: str) -> set[str]:
        return {re.split(r"[-_ ]|Bold|Mono|Serif|Sans", stem)[0] for stem in FONTS[split]} - {""}

    assert not families("train") & families("test")
    assert not families("train") & families("dev")
    found = [set(find_fonts(split)) for split in SPLITS]
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]


def test_matplotlib_alone_is_enough(monkeypatch):
    folder = fonts_module._system_folders()[-1]
    monkeypatch.setattr(fonts_module, "_system_folders", lambda: (folder,))
    for split in SPLITS:
        sample = WordsWorld(split, size=4).sample(1)
        assert sample.answer in words_of(split)


def test_prepared_folder_alone_is_used_when_complete(assets, monkeypatch):
    (assets / "fonts").mkdir(parents=True)
    for split in SPLITS:
        stem, path = next(iter(find_fonts(split).items()))
        (assets / "fonts" / f"{stem}.ttf").write_bytes(path.read_bytes())
    for split in SPLITS:
        assert [path.parent for path in find_fonts(split).values()] == [assets / "fonts"]


def test_no_font_at_all(monkeypatch):
    monkeypatch.setattr(fonts_module, "_system_folders", tuple)
    with pytest.raises(DataError, match="install matplotlib"):
        WordsWorld("train")


@pytest.mark.parametrize("split", SPLITS)
def test_ink_is_inside_the_box_and_stands_out(split):
    world = WordsWorld(split, size=30)
    for sample in world:
        x0, y0, x1, y1 = sample.meta["box"]
        assert 0 <= x0 < x1 <= 64
        assert 0 <= y0 < y1 <= 64
        assert sample.answer in world.words
        luma = sample.image @ np.array([0.299, 0.587, 0.114])
        outside = np.ones((64, 64), bool)
        outside[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = False
        paper = np.median(luma[outside]) if outside.any() else np.median(luma)
        assert np.abs(luma[y0:y1, x0:x1] - paper).max() > 80
        if outside.any():
            assert np.abs(luma[outside] - paper).max() < 40  # texture only
        assert world.fonts[sample.meta["font"]].is_file()


def test_same_seed_same_pictures_in_any_order():
    first, second = WordsWorld("train", size=8), WordsWorld("train", size=99)
    for index in (5, 0, 7, 5):
        one, two = first.sample(index), second.sample(index)
        assert one.answer == two.answer
        assert one.question == two.question
        np.testing.assert_array_equal(one.image, two.image)
    other = WordsWorld("train", seed=1, size=8)
    assert any((first.sample(k).image != other.sample(k).image).any() for k in range(3))


def test_random_strings_are_training_only():
    world = WordsWorld("train", size=60, pseudo=0.5)
    made_up = [sample for sample in world if sample.meta["pseudo"]]
    assert 15 <= len(made_up) <= 45
    assert all(word_split(sample.answer) == "train" and 3 <= len(sample.answer) <= 6 for sample in made_up)
    with pytest.raises(DataError, match="training pictures only"):
        WordsWorld("test", pseudo=0.1)


@given(st.from_regex("[a-z]{1,6}", fullmatch=True))
def test_letters_spell_the_word(word):
    codes = letters(word)
    assert codes.shape == (MAX_LETTERS,)
    assert "".join(chr(97 + code) for code in codes if code < 26) == word
    assert (codes[len(word) :] == 26).all()


def test_manifest_names_fonts_with_hashes():
    facts = WordsWorld("dev").manifest()
    assert facts["words"] == 142
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in facts["fonts"].values())
