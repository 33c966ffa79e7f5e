"""docs/laptop.md: its blocks run in order, from rows to a tuned model that answers, on a tiny checkpoint."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shlex
from pathlib import Path

import pytest
from tests.cli.conftest import write_internvl

from chiasm.cli.app import main
from readme_blocks import Block, blocks

pytestmark = pytest.mark.xdist_group("laptop")

PAGE = Path(__file__).resolve().parents[1] / "docs" / "laptop.md"
TEXT = PAGE.read_text(encoding="utf-8")


def execute(block: Block) -> str:
    """What a block prints, run in this process: a block of commands has a verb of chiasm on each line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if block.language == "python":
            exec(compile(block.code, f"laptop.md:{block.line}", "exec"), {"__name__": "__main__"})
        else:
            for line in block.code.replace("\\\n", " ").splitlines():
                first, *words = shlex.split(line.replace("$MODEL", "model"))
                assert first == "chiasm"
                assert main(words) == 0, line
    return out.getvalue()


def ready(block: Block) -> bool:
    return not block.code.startswith("export MODEL=")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Block, str]]:
    folder = tmp_path_factory.mktemp("laptop")
    write_internvl(folder / "model")
    before, state = Path.cwd(), random.getstate()
    os.chdir(folder)
    try:
        return [(block, execute(block)) for block in blocks(TEXT) if ready(block)]
    finally:
        os.chdir(before)
        random.setstate(state)


def test_the_page_goes_all_the_way() -> None:
    verbs = ("data lint", "data stats", "data pack", "train internvl/lora", "convert runs/", "chat --model")
    places = [TEXT.index(f"chiasm {verb}") for verb in verbs]
    assert places == sorted(places)


def test_the_warning_is_as_quoted(said: list[tuple[Block, str]]) -> None:
    first = next(out for block, out in said if "data lint train.jsonl" in block.code)
    quoted = [line.removeprefix("    ") for line in TEXT.splitlines() if line.startswith("    warning C307")]
    place = TEXT.splitlines().index("    " + quoted[0])
    for line in TEXT.splitlines()[place : place + 3]:
        assert line.removeprefix("    ") in first
    assert "0 errors, 1 warning, 0 notes" in first


def test_the_corrected_set_is_strictly_clean(said: list[tuple[Block, str]]) -> None:
    second = next(out for block, out in said if "--strict" in block.code)
    assert "260 rows of 1 set(s): 0 errors, 0 warnings, 0 notes" in second
    stats = next(out for block, out in said if "data stats" in block.code)
    assert "tokens by part: " in stats
