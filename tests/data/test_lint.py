"""The linter: a zoo with one animal for each rule, agreement with the layout, memory, order, interruption."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.data.lint_zoo import CASES, GOOD, Case, Rows, picture, row, run, spec_of, write_pictures

from chiasm.data.layout import count_tokens, layout
from chiasm.data.lint import (
    Finding,
    LintOptions,
    Report,
    Source,
    all_rules,
    lint,
    scan,
)
from chiasm.data.lint.rules import RULES
from chiasm.data.lint.run import chosen
from chiasm.data.lint.sample import Reader, picture_hash
from chiasm.data.lint.sets import DigestTable, Seen, script_of
from chiasm.data.lint.text import markers_of
from chiasm.errors import ChiasmError, ConfigError
from chiasm.media.frames import FrameSampling
from chiasm.text.templates import TEMPLATES

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("code", sorted(RULES))
def test_each_rule_finds_its_animal(code: str, root: Path) -> None:
    case = CASES[code]
    report = run(case, root)
    assert report.found[code] == case.hit, report.as_dict()["rules"]
    assert case.says in report.examples[code][0].message
    others = [other for other in report.found if other != code and RULES[other].severity == "error"]
    assert others == (["C512"] if code == "C511" else []), report.as_dict()["rules"]


@pytest.mark.parametrize("decode", [False, True])
def test_no_rule_speaks_of_healthy_rows(root: Path, decode: bool) -> None:
    case = Case(rows=GOOD, options={"decode": decode}, against=[row("Never asked?", "No.", image="thin.png")])
    report = run(case, root)
    assert report.as_dict()["rules"] == {}
    assert report.rows == len(GOOD)
    assert report.stats["train"].unusable == 0


MANY = ("C104", "C401", "C402", "C403", "C502", "C503", "C504", "C511", "C512")
"""Rules that also find healthy rows, with the settings of their cases or beside the rows of their cases."""


@pytest.mark.parametrize("code", sorted(RULES))
def test_a_rule_is_silent_about_the_other_rows(code: str, root: Path) -> None:
    """The healthy rows beside the animal change nothing: each finding points at the animal."""
    case = CASES[code]
    mixed = Case(
        rows=[*case.rows, *GOOD] if case.rows else [],
        spec=case.spec,
        options={**case.options, "select": (code,)},
        against=case.against,
    )
    found: list[Finding] = []
    run(mixed, root, on_finding=found.append)
    rows = [one.index for one in found if one.index is not None]
    if code not in MANY:
        assert all(index < len(case.rows) for index in rows)
    assert {one.rule.code for one in found} <= {code}


def test_every_rule_is_documented() -> None:
    spec = importlib.util.spec_from_file_location("lint_table", DOCS / "lint_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "lint.md").read_text(encoding="utf-8")
    assert page == module.render(page), "run: python docs/lint_table.py"
    assert all(f"| {one.code} | {one.name} | {one.severity} |" in page for one in all_rules())
    assert sorted(CASES) == [one.code for one in all_rules()]


# Agreement with training --------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            "cat",
            " ",
            "\n",
            "<image>",
            "<video>",
            "<IMG_CONTEXT>",
            "<img>",
            "<|im_end|>",
            "</s>",
            "é",
            "猫",
            "\ud800",
        ),
        *("<box>[[1,2,3,4]]</box>", "\x00", "A long answer of several words. ", "[INST]", "<ref>"),
    ]
)
TEXTS = st.lists(PIECES, max_size=5).map("".join)
NAMES = st.sampled_from(
    ["a.png", "b.png", "lying.jpg", "nowhere.png", "empty.png", "page.jpg", "cut.png", "bomb.png"]
)
ROLES = st.sampled_from(["human", "human", "gpt", "gpt", "system", "nobody"])


@st.composite
def any_row(draw):
    talk = draw(st.lists(st.fixed_dictionaries({"from": ROLES, "value": TEXTS}), min_size=0, max_size=4))
    images = draw(st.one_of(st.none(), NAMES, st.lists(NAMES, max_size=3), st.just(5)))
    return {"image": images, "conversations": talk}


@st.composite
def likely_row(draw):
    """Nearly always in order, so that what fails is deeper."""
    images = draw(st.lists(NAMES, max_size=2))
    tags = "<image>\n" * len(images)
    calm = st.lists(
        st.sampled_from(["cat ", "dog\n", "A long answer. ", "猫", "<IMG_CONTEXT>", "\n"]), max_size=6
    )
    answer = draw(calm.map("".join))
    talk = [{"from": "human", "value": tags + draw(calm.map("".join))}, {"from": "gpt", "value": answer}]
    return {"image": images, "conversations": talk[: draw(st.sampled_from([2, 2, 2, 1]))]}


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    any_row() | likely_row(),
    st.sampled_from(["internvl2_5", "internvl_zh", "internvl-hf", "chatml"]),
    st.sampled_from([None, 60, 130]),
)
def test_no_error_means_that_the_layout_succeeds(
    root: Path, made: dict, template: str, limit: int | None
) -> None:
    spec = spec_of(
        template=template, max_length=limit, **({"mode": "hf"} if template == "internvl-hf" else {})
    )
    dataset = Rows([made], root)
    source = Source(name="train", dataset=dataset)
    report = lint([source], spec, LintOptions(decode=True, threads=1))
    sequence, refused = None, ""
    try:
        sequence = layout(dataset.record(0), spec, train=True)
    except ChiasmError as error:
        refused = str(error)
    if sequence is None:
        assert report.count("error"), refused
        assert "C008" not in report.found, refused  # a rule with a name and a remedy speaks of it
        return
    refusals = {
        "C001",
        "C002",
        "C003",
        "C005",
        "C008",
        "C101",
        "C110",
        "C201",
        "C202",
        "C203",
        "C208",
        "C401",
        "C601",
    }
    assert not refusals & set(report.found)
    stats = report.stats["train"]
    assert stats.tokens.total == len(sequence.ids_T) == sum(stats.parts.values())
    assert stats.learned.total == int((sequence.labels_T >= 0).sum())
    assert stats.tiles.total == (len(sequence.media["image"].data) if sequence.media else 0)


def test_tokens_are_those_of_counting(root: Path) -> None:
    spec = spec_of()
    dataset = Rows(GOOD, root)
    for index in range(len(GOOD)):
        sample = Reader(spec).read(dataset, index)
        assert sample.tokens == count_tokens(dataset.record(index), spec, train=True)
        assert sum(sample.parts.values()) == sample.tokens


def test_what_lies_beyond_the_limit(root: Path) -> None:
    """As cutting the laid-out sequence shows."""
    rows = [
        row("<image>What?", "A " * 30, image="a.png"),
        row("<image> or <image>?", "The second, of course.", image=["a.png", "b.png"]),
        row("Hi", " ".join(map(str, range(60)))),
    ]
    for n in range(len(rows)):
        dataset, long = Rows(rows, root), spec_of(max_length=None)
        whole = layout(dataset.record(n), long, train=True)
        for limit in range(20, len(whole.ids_T), 7):
            sample = Reader(spec_of(max_length=limit)).read(dataset, n)
            # Labels stand a row before the token that they are.
            learned = int((whole.labels_T[limit - 1 : -1] >= 0).sum())
            shown = sum(span.start + span.length > limit for span in whole.spans)
            assert sample.beyond == (learned, shown), (n, limit)


def test_videos_are_counted_by_their_frames(root: Path) -> None:
    frames = [picture(n, 40, 30) for n in range(5)]
    frames[0].save(root / "film.gif", save_all=True, append_images=frames[1:], duration=100)
    made = {
        "video": "film.gif",
        "conversations": row("<video>\nWhat happens?", "It changes.")["conversations"],
    }
    spec = spec_of()
    sample = Reader(spec).read(Rows([made], root), 0)
    sequence = layout(Rows([made], root).record(0), spec, train=True)
    assert sample.frames == len(sequence.media["video"].data)
    assert sample.tokens == len(sequence.ids_T)
    assert run(Case(rows=[made]), root).as_dict()["rules"] == {}


def test_repeats_and_tiles_of_frames_are_counted_as_laid_out(root: Path) -> None:
    frames = [picture(n, 56, 28) for n in range(5)]
    frames[0].save(root / "wide.gif", save_all=True, append_images=frames[1:], duration=100)
    made = {
        "video": "wide.gif",
        "conversations": row("<video>\nWhat happens?", "It changes.")["conversations"],
    }
    for changes in (
        {"repeats": 4},
        {"frame_tiles": 2},
        {"repeats": 3, "frame_tiles": 2, "video_repeats": 2, "sampling": FrameSampling(frames=3)},
    ):
        spec = spec_of(**changes)
        dataset = Rows([made, *GOOD], root)
        for n in range(len(dataset)):
            sample = Reader(spec).read(dataset, n)
            sequence = layout(dataset.record(n), spec, train=True)
            assert sample.tokens == len(sequence.ids_T)
            for medium in ("image", "video"):
                rows = sum(span.length for span in sequence.spans_of(medium))
                tiles = len(sequence.media[medium]) if medium in sequence.media else 0
                assert sample.parts[medium] == rows
                assert {"image": sum(sample.tiles), "video": sample.frame_tiles}[medium] == tiles
        report = lint([Source(name="train", dataset=dataset)], spec, LintOptions())
        stats = report.stats["train"]
        assert stats.frames.total == (3 if "sampling" in changes else 5)
        assert stats.videos.total == 1
        assert stats.shown.total == stats.parts["image"] + stats.parts["video"]
        assert not report.found


def test_a_long_video_is_told_how_many_frames_fit(root: Path) -> None:
    frames = [picture(n, 40, 30) for n in range(20)]
    frames[0].save(root / "long.gif", save_all=True, append_images=frames[1:], duration=100)
    made = {
        "video": "long.gif",
        "conversations": row("<video>\nWhat happens?", "It changes.")["conversations"],
    }
    dataset = Rows([made], root)
    every = FrameSampling(frames=20)
    tokens = Reader(spec_of(sampling=every)).read(dataset, 0).tokens
    report = lint(
        [Source(name="train", dataset=dataset)],
        spec_of(sampling=every, max_length=tokens - 10),
        LintOptions(),
    )
    (found,) = report.examples["C401"]
    fits = int(re.search(r"it fits with (\d+) frames in all instead of 20", found.message)[1])
    assert fits == 17
    fewer = spec_of(sampling=FrameSampling(frames=fits), max_length=tokens - 10)
    assert len(layout(dataset.record(0), fewer, train=True)) <= tokens - 10
    beyond = lint(
        [Source(name="train", dataset=dataset)], spec_of(sampling=every, max_frames=19), LintOptions()
    )
    assert "20 frames are taken but the model looks at 19 at most" in beyond.examples["C008"][0].message


def test_a_video_without_pyav_is_a_note(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (root / "b.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(64))
    monkeypatch.setitem(sys.modules, "av", None)
    made = {"video": "b.mp4", "conversations": row("<video>What?", "A.")["conversations"]}
    report = run(Case(rows=[made]), root)
    assert set(report.found) == {"C209"}
    assert "chiasm[video]" in report.examples["C209"][0].message


def test_a_sets_own_tile_limit_counts(root: Path) -> None:
    rows = Rows([row("What?", "A.", image="a.png")], root)
    spec = spec_of()
    free = lint([Source(name="s", dataset=rows)], spec).stats["s"].tiles.total
    one = lint([Source(name="s", dataset=rows, max_tiles=1)], spec).stats["s"].tiles.total
    assert (free, one) == (7, 1)


# The pass ----------------------------------------------------------------------------------------------------------


def test_threads_change_nothing(root: Path) -> None:
    rows = [case for code in sorted(CASES) for case in CASES[code].rows] + GOOD
    found: dict[int, list[str]] = {}
    for threads in (1, 3):
        lines: list[str] = []
        run(
            Case(rows=rows, options={"threads": threads}),
            root,
            on_finding=lambda f, to=lines: to.append(f.line),
        )
        found[threads] = lines
    assert found[1] == found[3]
    assert len(found[1]) > 60


def test_one_pass_of_bounded_width() -> None:
    """However slow the reader of the results is, only a few rows are ahead of it."""
    read: list[int] = []
    lock = threading.Lock()

    def work(source: Source, index: int) -> int:
        with lock:
            read.append(index)
        return index

    source = Source(name="s", dataset=Rows([None] * 5000, Path()))
    ahead = [len(read) - index for _, index, _ in scan([source], work, threads=2)]
    assert sorted(read) == list(range(5000))  # once each
    assert max(ahead) <= 8 * 8


def test_results_come_in_order_over_several_sets() -> None:
    sources = [Source(name=str(n), dataset=Rows([None] * n, Path(), str(n))) for n in (3, 0, 20)]
    seen = [(n, index) for n, index, _ in scan(sources, lambda s, i: i, threads=3)]
    assert seen == [(0, i) for i in range(3)] + [(2, i) for i in range(20)]


def test_limit_and_sample() -> None:
    assert list(chosen(10, 3, None, 0)) == [0, 1, 2]
    assert list(chosen(2, 3, None, 0)) == [0, 1]
    some = chosen(1000, None, 20, 1)
    assert len(some) == 20
    assert list(some) == sorted(set(some))
    assert some != chosen(1000, None, 20, 2)
    assert list(chosen(5, None, 20, 1)) == list(range(5))


def test_duplicates_of_a_sample_name_the_right_row(root: Path) -> None:
    rows = [row(f"q {n % 50}", f"a {n % 50}") for n in range(100)]
    report = run(Case(rows=rows, options={"sample": 90, "seed": 3, "first": 200}), root)
    for finding in report.examples["C501"]:
        assert finding.message == f"same as train.jsonl:{finding.index - 50 + 1}"
    assert report.found["C501"] >= 80 - 50


def test_duplicates_across_sets_are_found(root: Path) -> None:
    sources = [Source(name=n, dataset=Rows(GOOD[:2], root, n)) for n in ("one", "two")]
    report = lint(sources, spec_of())
    assert [f.message for f in report.examples["C501"]] == ["same as one.jsonl:1", "same as one.jsonl:2"]
    assert {f.set_name for f in report.examples["C501"]} == {"two"}


def test_interruption_keeps_what_was_found(root: Path) -> None:
    rows = [row("What?", "", image="nowhere.png")] * 50

    def stop(done: int, total: int, report: Report) -> None:
        if done == 20:
            raise KeyboardInterrupt

    report = run(Case(rows=rows, options={"threads": 2}), root, on_progress=stop)
    assert report.interrupted
    assert report.rows == 20
    assert report.found["C201"] == 20
    assert len(report.examples["C201"]) == 5


def test_rules_are_chosen_by_code_name_and_beginning(root: Path) -> None:
    rows = [row("What?", "", image="nowhere.png"), row("[INST]", "a")]
    assert set(run(Case(rows=rows, options={"select": ("C2", "empty-answer")}), root).found) == {
        "C201",
        "C602",
    }
    assert "C103" not in run(Case(rows=rows, options={"ignore": ("C1",)}), root).found
    with pytest.raises(ConfigError, match="no rule is called 'C9'"):
        LintOptions(select=("C9",))
    with pytest.raises(ConfigError, match="exclude each other"):
        LintOptions(limit=1, sample=1)
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        LintOptions(threads=0)


def test_a_report_is_plain_data(root: Path) -> None:
    report = run(Case(rows=[row("What?", "A.", image="nowhere.png")]), root)
    data = json.loads(json.dumps(report.as_dict()))
    assert data["errors"] == 1
    assert data["rules"]["C201"]["first"][0]["where"] == "train.jsonl:1"
    assert report.examples["C201"][0].line.startswith("train.jsonl:1: error C201 picture-missing: ")
    assert json.loads(json.dumps(report.examples["C201"][0].as_dict()))["index"] == 0


# Pieces ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 2**64 - 1), max_size=300), st.integers(0, 2**32))
def test_digest_table_is_a_dict(digests: list[int], seed: int) -> None:
    table, plain = DigestTable(slots=4), {}
    picks = random.Random(seed)
    for n, digest in enumerate(digests + [picks.choice(digests) for _ in digests]):
        assert table.get(digest) == plain.get(digest)
        assert table.add(digest, n) == plain.get(digest)
        plain.setdefault(digest, n)
    assert len(table) == len(plain)


def test_digest_table_keeps_to_its_memory() -> None:
    table = DigestTable()
    numbers = random.Random(0)
    for n in range(20_000):
        table.add(numbers.getrandbits(64) | 1, n)
    assert table.nbytes <= 48 * len(table)


def test_memory_of_duplicates(root: Path) -> None:
    seen = Seen(str)
    reader = Reader(spec_of(), whole=False)
    made = Rows([row(f"What is {n}?", f"It is {n}.") for n in range(3000)], root)
    for n in range(len(made)):
        assert list(seen.duplicates(reader.read(made, n), n)) == []
    assert seen.nbytes <= 2 * 48 * len(made) + 6 * 12 * 1024


def test_looks_survive_resizing_and_tell_pictures_apart() -> None:
    hashes = []
    for seed in range(30):
        shown = picture(seed, 320, 240)
        one, two = picture_hash(shown), picture_hash(shown.resize((150, 113)))
        assert one is not None
        assert two is not None
        assert (one ^ two).bit_count() <= 2
        hashes.append(one)
    assert min((a ^ b).bit_count() for n, a in enumerate(hashes) for b in hashes[:n]) > 6
    from PIL import Image

    assert picture_hash(Image.new("RGB", (50, 50), "white")) is None


def test_markers_of_templates() -> None:
    assert markers_of(TEMPLATES["internvl2_5"]) == {"<|im_start|>", "<|im_end|>"}
    assert markers_of(TEMPLATES["internvl_zh"]) == {"<human>:", "<bot>:", "</s>"}
    assert "<|end|>" in markers_of(TEMPLATES["phi3-chat"])


def test_scripts() -> None:
    asked = {
        "A cat": "Latin",
        "猫": "Han",
        "ねこ猫猫": "Kana",
        "кот": "Cyrillic",
        "42": None,
        "<box>[[1]]</box>": None,
    }
    assert {text: script_of(text) for text in asked} == asked


def test_codes_are_in_groups() -> None:
    codes = [one.code for one in all_rules()]
    assert all(a < b for a, b in pairwise(codes))
    assert {one.severity for one in all_rules()} == {"error", "warning", "note"}
    assert np.all([len(code) == 4 for code in codes])
