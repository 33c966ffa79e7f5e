"""Vocabulary growth: ids, mean output rows, kept and drawn input rows, padding."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from chiasm.checkpoint.vocab import SPECIAL_TOKENS, add_special_tokens, check_rows, resize_rows, used_rows
from chiasm.errors import CheckpointError, ConfigError
from chiasm.text.tokenizer import Tokenizer
from tiny_tokenizers import byte_level


def words_of(count):
    """A tokenizer of ``count`` words."""
    return Tokenizer(Backend(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0")))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tables(rows, width=6, dtype=torch.float32):
    generator = seeded(7)
    return (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))


def test_order_and_ids():
    tokenizer = words_of(100)
    words, head = tables(100)
    grown = add_special_tokens(tokenizer, words, head, generator=seeded())
    assert list(grown.added.items()) == [(token, 100 + i) for i, token in enumerate(SPECIAL_TOKENS)]
    assert SPECIAL_TOKENS == (
        "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
    )  # fmt: skip
    assert tokenizer.encode("<IMG_CONTEXT>") == [102]
    assert grown.words_VC.shape == grown.head_VC.shape == (109, 6)


def test_rows_without_padding():
    """Output rows become the mean; input rows are drawn; old rows stay, and the given tables too."""
    words, head = tables(50)
    before = words.clone(), head.clone()
    grown = add_special_tokens(words_of(50), words, head, generator=seeded(3))
    assert torch.equal(grown.words_VC[:50], words)
    assert torch.equal(grown.head_VC[:50], head)
    torch.testing.assert_close(grown.head_VC[50:], head.mean(0).expand(9, -1))
    expected = torch.empty(9, 6).normal_(0.0, 0.02, generator=seeded(3))
    assert torch.equal(grown.words_VC[50:], expected)
    assert torch.equal(words, before[0])
    assert torch.equal(head, before[1])


def test_against_the_release_rule_on_a_padded_table():
    """The released script cuts to the tokenizer's size, then averages all but the new rows."""
    words, head = tables(128)
    tokenizer = words_of(50)
    grown = add_special_tokens(tokenizer, words, head, generator=seeded())
    size = tokenizer.vocab_size
    their_words, their_head = words[:size].clone(), head[:size].clone()
    their_head[-9:] = their_head[:-9].mean(dim=0, keepdim=True)
    assert torch.equal(grown.words_VC, their_words)  # padding rows of the new ids are taken over
    torch.testing.assert_close(grown.head_VC, their_head)


def test_half_covered_by_padding():
    words, head = tables(54)
    grown = add_special_tokens(words_of(50), words, head, generator=seeded(1))
    assert torch.equal(grown.words_VC[:54], words)
    assert torch.equal(grown.words_VC[54:], torch.empty(5, 6).normal_(0.0, 0.02, generator=seeded(1)))


def test_tied_tables_take_the_mean():
    words, _ = tables(20)
    grown = add_special_tokens(words_of(20), words, None, generator=seeded())
    assert grown.head_VC is None
    torch.testing.assert_close(grown.words_VC[20:], words.mean(0).expand(9, -1))


def test_bfloat16_mean_is_summed_in_float32():
    words, head = tables(3000, dtype=torch.bfloat16)
    head += 100
    grown = add_special_tokens(words_of(3000), words, head, generator=seeded())
    assert grown.head_VC.dtype is torch.bfloat16
    assert torch.equal(grown.head_VC[3000], head.double().mean(0).bfloat16())


def test_known_tokens_keep_their_rows():
    tokenizer = words_of(30)
    tokenizer.add_special_tokens(["<img>", "<box>"])
    words, head = tables(32)
    grown = add_special_tokens(tokenizer, words, head, generator=seeded())
    assert "<img>" not in grown.added
    assert list(grown.added.values()) == list(range(32, 39))
    assert torch.equal(grown.head_VC[:32], head)


def test_a_second_time_changes_nothing():
    tokenizer = words_of(30)
    words, head = tables(30)
    first = add_special_tokens(tokenizer, words, head, generator=seeded())
    second = add_special_tokens(tokenizer, first.words_VC, first.head_VC, generator=seeded(5))
    assert second.added == {}
    assert second.words_VC is first.words_VC
    assert second.head_VC is first.head_VC


@given(count=st.integers(1, 40), padding=st.integers(0, 30), multiple=st.integers(1, 64), tied=st.booleans())
def test_any_padding(count, padding, multiple, tied):
    words, head = tables(count + padding)
    tokenizer = words_of(count)
    grown = add_special_tokens(
        tokenizer, words, None if tied else head, generator=seeded(), multiple=multiple
    )
    rows = grown.words_VC.shape[0]
    assert rows % multiple == 0
    assert count + 9 <= rows < count + 9 + multiple
    assert check_rows(tokenizer, rows) == count + 9
    assert torch.equal(grown.words_VC[:count], words[:count])
    for table in (grown.words_VC, grown.head_VC):
        if table is not None:
            assert not table[count + 9 :].any()
            assert table.shape == (rows, 6)
            assert torch.isfinite(table).all()


def test_a_byte_level_tokenizer_with_specials():
    tokenizer = Tokenizer(Backend.from_str(byte_level().backend.to_str()))
    used = used_rows(tokenizer)
    assert used == tokenizer.vocab_size
    words, head = tables(used)
    assert add_special_tokens(tokenizer, words, head, generator=seeded()).added == {}


def test_ids_with_holes_count_to_the_highest():
    tokenizer = Tokenizer(Backend(models.WordLevel({"a": 0, "b": 17}, unk_token="a")))
    assert used_rows(tokenizer) == 18
    assert check_rows(tokenizer, 20) == 18


def test_resize():
    table, _ = tables(8)
    assert torch.equal(resize_rows(table, 5), table[:5])
    assert torch.equal(resize_rows(table, 8), table)
    assert resize_rows(table, 8).data_ptr() != table.data_ptr()
    longer = resize_rows(table, 4000, generator=seeded())
    assert torch.equal(longer[:8], table)
    assert float(longer[8:].std()) == pytest.approx(0.02, rel=0.02)
    assert torch.equal(longer, resize_rows(table, 4000, generator=seeded()))
    with pytest.raises(ConfigError, match="give a generator"):
        resize_rows(table, 9)
    with pytest.raises(ConfigError, match="at least one row"):
        resize_rows(table, 0)


def test_what_does_not_belong_together():
    tokenizer = words_of(30)
    words, head = tables(29)
    with pytest.raises(CheckpointError, match="ids up to 29 but the word table only 29 rows"):
        add_special_tokens(copy.copy(tokenizer), words, head, generator=seeded())
    words, _ = tables(30)
    with pytest.raises(CheckpointError, match="differ in shape"):
        add_special_tokens(tokenizer, words, head, generator=seeded())
    with pytest.raises(ConfigError, match="multiple is 0"):
        add_special_tokens(tokenizer, words, None, generator=seeded(), multiple=0)
    assert tokenizer.vocab_size == 30  # refused before anything was added
