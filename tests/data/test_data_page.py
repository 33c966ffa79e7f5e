"""The page about data: every row on it can be read, its meta file is one, its numbers are the code's."""

import inspect
import json
import re
from pathlib import Path

import pytest

from chiasm.data.datasets import TOLERATED, DatasetSpec, read_meta
from chiasm.data.filters import DuplicateLines, Repetition, SentenceLength, ZeroRuns
from chiasm.data.formats.rows import read_row
from chiasm.data.quarantine import QuarantinePolicy

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]
ROWS = [block for block in BLOCKS if "mine" not in block]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row))
def test_rows_can_be_read(row):
    record = read_row(row, None, "docs", question="?")
    assert record.turns[-1].role == "assistant"
    assert any(turn.of_kind("image") or turn.of_kind("video") for turn in record.turns)


def test_the_meta_file_can_be_read(tmp_path):
    (meta,) = [block for block in BLOCKS if "mine" in block]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    spec = read_meta(tmp_path / "meta.json")["mine"]
    assert spec == DatasetSpec(
        annotation="train.jsonl", root="images/", augment=True, repeat_time=0.5, max_tiles=12, length=1000
    )
    assert all(f"`{name}`" in PAGE for name in TOLERATED if name != "notes")


def test_defaults_are_the_code_s():
    assert "different 10-grams" in PAGE
    assert (Repetition().n, Repetition().threshold, Repetition().count) == (10, 0.4, "types")
    assert (SentenceLength().longest, ZeroRuns().most, DuplicateLines().share, DuplicateLines().least) == (
        2000,
        20,
        0.5,
        6,
    )
    assert (QuarantinePolicy().max_share, QuarantinePolicy().min_seen) == (0.01, 1000)
    assert inspect.signature(DatasetSpec).parameters["question"].default in " ".join(PAGE.split())
