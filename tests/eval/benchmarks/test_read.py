"""Readers of benchmark files: layouts, lazy pictures, and one line for what is wrong."""

import base64
import contextlib
import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.errors import ChiasmError, DataError, UsageError
from chiasm.eval.benchmarks import run
from chiasm.eval.benchmarks.items import Stored, data_hash, read_source
from chiasm.eval.benchmarks.read import read_items
from chiasm.eval.benchmarks.records import from_record, parse_list, read_answers
from chiasm.eval.benchmarks.table import get_bench


def png(shade: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# --- TSV ----------------------------------------------------------------------------------------------------------


def coded(shade: int) -> str:
    return base64.b64encode(png(shade, (40, 40))).decode()


@pytest.fixture
def vlmeval(tmp_path: Path) -> Path:
    rows = [
        {
            "index": "0",
            "image": coded(1),
            "question": 'What "is"\nit?',
            "A": "x",
            "B": "y",
            "C": "",
            "answer": "B",
        },
        {"index": "1", "image": "0", "question": "Tab\there", "A": "x", "B": "y", "C": "z", "answer": "C"},
        {"index": "2", "image": "3", "question": "Later", "A": "x", "B": "y", "C": "", "answer": "A"},
        {"index": "3", "image": coded(2), "question": "Last", "A": "x", "B": "y", "C": "", "answer": "A"},
        {
            "index": "4",
            "image": str([coded(3), coded(4)]),
            "question": "Two",
            "A": "1",
            "B": "2",
            "C": "",
            "answer": "A",
        },
    ]
    return table(tmp_path / "bench.tsv", rows)


def test_table(vlmeval):
    items = read_items(vlmeval)
    assert [item.key for item in items] == ["0", "1", "2", "3", "4"]
    assert items[0].question == 'What "is"\nit?'
    assert items[0].options == {"A": "x", "B": "y"}  # empty cells are none
    assert (items[0].letter, items[1].letter) == ("B", "C")
    assert items[1].where == "bench.tsv:4"  # the first question has a line break in it
    loaded = [[read_source(source, "") for source in item.images] for item in items]
    assert loaded[0] == loaded[1] == [png(1, (40, 40))]  # a reference backwards
    assert loaded[2] == loaded[3] == [png(2, (40, 40))]  # and forwards
    assert loaded[4] == [png(3, (40, 40)), png(4, (40, 40))]
    assert items[0].group == items[1].group != items[2].group


def test_pictures_stay_in_the_file(vlmeval):
    item = read_items(vlmeval, limit=1)[0]
    (source,) = item.images
    assert isinstance(source, Stored)
    vlmeval.write_bytes(vlmeval.read_bytes().replace(b"iVBOR", b"!VBOR"))
    with pytest.raises(DataError, match=r"bench\.tsv:2\.image is not base64"):
        source.load()


def test_a_limit_still_finds_what_stands_behind_it(vlmeval):
    item = read_items(vlmeval, limit=3)[-1]
    assert read_source(item.images[0], "") == png(2, (40, 40))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"b\.tsv is empty"),
        ("a\tb\n1\t2\n", r"b\.tsv:1 is no header"),
        ("index\tquestion\n1\tx\n2\n", r"b\.tsv:3 has 1 columns where the header has 2"),
        ("index\tquestion\timage\n1\tx\t7\n", r"b\.tsv:2\.image is '7'"),
        ('index\tquestion\n1\t"x\n', r"b\.tsv:\d+ is no row of a table"),
        ("index\tquestion\n1\t\n", r"b\.tsv:2 asks nothing"),
        ("index\tquestion\n1\tx\n1\ty\n", r"b\.tsv:3: question '1' stood already at b\.tsv:2"),
        ("index\tquestion\n", "no questions"),
    ],
)
def test_damaged_tables(tmp_path, text, message):
    (tmp_path / "b.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_items(tmp_path / "b.tsv")


def test_table_that_is_no_text(tmp_path):
    (tmp_path / "b.tsv").write_bytes(b"index\tquestion\n1\t\xff\n")
    with pytest.raises(DataError, match=r"b\.tsv:2 is not UTF-8"):
        read_items(tmp_path / "b.tsv")


def test_the_limit_of_cells_is_left_alone(vlmeval):
    before = csv.field_size_limit()
    read_items(vlmeval)
    assert csv.field_size_limit() == before


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_internvl_lines(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    path = lines(
        tmp_path / "t.jsonl",
        {"image": "a.png", "question": "Q?", "question_id": 7, "answer": ["x", "y"]},
        {
            "image": "a.png",
            "sent": "the dog",
            "bbox": [1, 2, 3, 4],
            "height": 4,
            "width": 6,
            "question_id": 8,
        },
        {
            "id": 9,
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image>\nWhy?"}, {"from": "gpt", "value": "So."}],
        },
    )
    first, second, third = read_items(path)
    assert (first.key, first.answers, first.where) == ("7", ("x", "y"), "t.jsonl:1")
    assert first.images == (str(tmp_path / "a.png"),)
    assert (second.question, second.facts["bbox"]) == ("the dog", [1, 2, 3, 4])
    assert (third.question, third.answers) == ("<image>\nWhy?", ("So.",))
    assert first.group == second.group


def test_llava_questions_and_answers(tmp_path):
    questions = lines(
        tmp_path / "q.jsonl", {"question_id": 3, "image": "a.png", "text": "Is it?", "category": "random"}
    )
    answers = lines(tmp_path / "a.jsonl", {"question_id": 3, "text": "yes"})
    (item,) = read_items(questions, answers=answers, images=tmp_path)
    assert (item.question, item.answers, item.category) == ("Is it?", ("yes",), "random")
    other = lines(tmp_path / "o.jsonl", {"question_id": 4, "text": "yes"})
    with pytest.raises(DataError, match=r"q\.jsonl:1: o\.jsonl has no answer to question '3'"):
        read_items(questions, answers=other)


def test_vqa_annotations(tmp_path):
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps({"questions": [{"question_id": 1, "question": "Q?", "image": "a.png"}]}))
    notes = tmp_path / "n.json"
    notes.write_text(
        json.dumps({"annotations": [{"question_id": 1, "answers": [{"answer": "x"}, {"answer": "y"}]}]})
    )
    assert read_items(questions, answers=notes)[0].answers == ("x", "y")


def test_pope_labels_by_order(tmp_path):
    questions = lines(
        tmp_path / "q.jsonl",
        *(
            {"question_id": f"{c}{n}", "image": "a.png", "text": "Is it?", "category": c}
            for n in range(2)
            for c in ("random", "popular")
        ),
    )
    folder = tmp_path / "labels"
    folder.mkdir()
    for category, labels in {"random": "yes no", "popular": "no no"}.items():
        lines(
            folder / f"coco_pope_{category}.json",
            *({"question_id": 1, "label": label} for label in labels.split()),
        )
    items = read_items(questions, answers=folder)
    assert [(item.category, item.answers[0]) for item in items] == [
        ("random", "yes"),
        ("popular", "no"),
        ("random", "no"),
        ("popular", "no"),
    ]
    # A question that is left out keeps its place among the labels.
    left = read_items(questions, answers=folder, exclude=["random0"])
    assert [(item.key, item.answers[0]) for item in left if item.category == "random"] == [("random1", "no")]
    lines(folder / "coco_pope_random.json", {"label": "yes"})
    with pytest.raises(DataError, match="no label is left for category 'random'"):
        read_items(questions, answers=folder)


def test_coco_captions(tmp_path):
    path = tmp_path / "c.json"
    whole = {
        "images": [{"id": 5, "file_name": "a.png"}],
        "annotations": [{"image_id": 5, "caption": c} for c in ("one", "two")],
    }
    path.write_text(json.dumps(whole))
    (item,) = read_items(path, images=tmp_path)
    assert (item.key, item.answers, item.images) == ("5", ("one", "two"), (str(tmp_path / "a.png"),))


def test_mme_folder(tmp_path):
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "1.png").write_bytes(png())
    (tmp_path / "count.txt").write_text("1.png\tIs it one? Please answer yes or no.\tYes\n1.png\tTwo?\tNo\n")
    first, second = read_items(tmp_path)
    assert (first.category, first.answers, first.group) == ("count", ("Yes",), second.group)
    assert first.images == (str(tmp_path / "count" / "1.png"),)
    (tmp_path / "count.txt").write_text("1.png\tIs it?\n")
    with pytest.raises(DataError, match=r"count\.txt:1 must hold picture, question and answer"):
        read_items(tmp_path)


def test_mvbench_folder(tmp_path):
    for name in ("moving", "order"):
        rows = [
            {
                "video": "a.mp4",
                "question": "Why?",
                "candidates": ["x", "y"],
                "answer": "y",
                "start": 1,
                "end": 2.5,
            }
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    first, second = read_items(tmp_path)
    assert (first.category, first.letter, first.clip) == ("moving", "B", (1.0, 2.5))
    assert (first.key, second.key) == ("moving/0", "order/0")
    assert first.video == str(tmp_path / "a.mp4")


def test_parquet_rows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = {
        "id": ["v_1", "v_2"],
        "question": ["See <image 1>: which?", "Compare <image 1> and <image 2>"],
        "options": ["['one', 'two']", "[]"],
        "answer": ["B", "['3', 'three']"],
        "image_1": [{"bytes": png(1), "path": "a"}] * 2,
        "image_2": [None, {"bytes": png(2), "path": "b"}],
    }
    pq.write_table(pa.table(rows), tmp_path / "m.parquet")
    first, second = read_items(tmp_path / "m.parquet")
    assert (first.key, first.letter, first.images) == ("v_1", "B", (png(1),))
    assert first.question == "See : which?"
    assert second.question == "Compare Image-1 and Image-2"
    assert (second.answers, second.options, len(second.images)) == (("3", "three"), {}, 2)
    (tmp_path / "n.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"n\.parquet cannot be read"):
        read_items(tmp_path / "n.parquet")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], r"t\.jsonl:1 must be an object"),
        ({"question": 3}, r"t\.jsonl:1\.question must be a string"),
        ({"answer": "x"}, r"t\.jsonl:1 asks nothing"),
        ({"question": "q", "image": {"a": 1}}, r"t\.jsonl:1\.image\[0\] must be a path"),
        ({"question": "q", "answer": {"a": 1}}, r"t\.jsonl:1\.answer must be"),
        ({"question": "q", "answers": [["x"]]}, r"t\.jsonl:1\.answers\[0\] must be"),
        ({"question": "q", "options": "one, two"}, r"t\.jsonl:1\.options must be a list"),
        ({"question": "q", "options": ["x"] * 27}, "letters end at Z"),
        ({"question": "q", "video": "a.mp4", "clip": [3, 2]}, "no span of time"),
        ({"question": "q", "video": 3}, r"t\.jsonl:1\.video must be a path"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "no human turn"),
    ],
)
def test_malformed_records(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        read_items(lines(tmp_path / "t.jsonl", record))


def test_broken_json(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"question": "q"}\n{"question": "q"\n')
    with pytest.raises(DataError, match=r"t\.jsonl:2 is not JSON"):
        read_items(tmp_path / "t.jsonl")
    (tmp_path / "t.json").write_text('[\n{"question": }]')
    with pytest.raises(DataError, match=r"t\.json:2 is not JSON"):
        read_items(tmp_path / "t.json")
    (tmp_path / "u.json").write_text("3")
    with pytest.raises(DataError, match="a list or an object"):
        read_items(tmp_path / "u.json")


def test_wrong_paths(tmp_path):
    (tmp_path / "x.ods").write_text("a")
    path = lines(tmp_path / "t.jsonl", {"question": "q", "id": 1}, {"question": "r", "id": 2})
    for arguments, message in [
        ({"data": tmp_path / "gone"}, "no such file or folder"),
        ({"data": tmp_path / "x.ods"}, "are read from"),
        ({"data": path, "images": tmp_path / "gone"}, "no such folder"),
        ({"data": path, "answers": tmp_path / "gone"}, "--answers"),
        ({"data": path, "limit": 0}, "at least one question"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_items(**arguments)
    assert [item.key for item in read_items(path, exclude=["1"])] == ["2"]
    with pytest.raises(DataError, match="there is no picture"):
        read_source(str(tmp_path / "gone.png"), "t.jsonl:1")


def test_hallusionbench_ids_are_unique_together(tmp_path):
    rows = [
        {
            "category": "VD",
            "subcategory": "ocr",
            "set_id": s,
            "figure_id": f,
            "question_id": q,
            "filename": "a.png",
        }
        | {"question": "Q?", "gt_answer": "1"}
        for s in "01"
        for f in "01"
        for q in "01"
    ]
    (tmp_path / "h.json").write_text(json.dumps(rows))
    items = read_items(tmp_path / "h.json")
    assert len({item.key for item in items}) == 8
    units = [run._units(get_bench("hallusionbench"), item) for item in items]
    assert len({unit["figure"] for unit in units}) == len({unit["question"] for unit in units}) == 4
    assert units[0] == {"figure": "VD_ocr_0_0", "question": "VD_ocr_0_0"}


@pytest.mark.parametrize(
    ("record", "letter"),
    [
        ({"candidates": ["a", "c", "b"], "answer": "c"}, "B"),  # letters that somebody wrote
        ({"choices": ["C", "A", "B"], "answer": "A"}, "B"),
        ({"candidates": ["a dog", "a cat"], "answer": "B"}, "B"),
        ({"options": ["C", "A", "B"], "answer": "A"}, "A"),  # MMMU's answers are letters
        ({"A": "C", "B": "A", "answer": "A"}, "A"),
    ],
)
def test_letter_of_options_that_are_letters(tmp_path, record, letter):
    (item,) = read_items(lines(tmp_path / "t.jsonl", {"question": "Q?"} | record))
    assert item.letter == letter


def test_hash_covers_what_is_asked(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    record = {"image": "a.png", "question": "Q?", "answer": "x", "id": 1}
    base = data_hash(read_items(lines(tmp_path / "t.jsonl", record)))
    assert (
        data_hash(read_items(lines(tmp_path / "other.jsonl", record))) == base
    )  # the name of the file does not count
    changes = ({"question": "R?"}, {"answer": "y"}, {"options": ["x", "y"]}, {"bbox": [1, 2, 3, 4]})
    for change in changes:
        assert data_hash(read_items(lines(tmp_path / "t.jsonl", record | change))) != base
    (tmp_path / "a.png").write_bytes(png(2))
    assert data_hash(read_items(lines(tmp_path / "t.jsonl", record))) != base


# --- fuzz ---------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "question",
        "text",
        "image",
        "images",
        "answer",
        "answers",
        "options",
        "video",
        "clip",
        "start",
        "end",
        "conversations",
        "A",
        "id",
        "bbox",
    ]
)


@given(st.dictionaries(FIELDS, JSON, max_size=6) | JSON)
def test_any_record_is_read_or_refused_in_one_line(record):
    item, refused = None, "f.jsonl:3"
    try:
        item = from_record(record, where="f.jsonl:3", key="3")
    except ChiasmError as error:
        refused = str(error)
    assert refused.startswith("f.jsonl:3")
    assert "\n" not in refused
    assert item is None or item.letter == "" or item.letter in item.options


@given(st.text(max_size=30))
def test_any_text_is_a_list_or_not(text):
    found = parse_list(text)
    assert found is None or isinstance(found, list)
    assert isinstance(read_answers(text, "x"), tuple)


def test_lists_as_answers():
    assert read_answers("['3', 'three']", "x") == ("3", "three")  # several answers
    assert read_answers("[3, 7]", "x") == ("[3, 7]",)  # one answer that is a list
    assert read_answers([1, 2.0, "x"], "x") == ("1", "2", "x")
    assert read_answers(True, "x") == ("yes",)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.binary(max_size=60), st.sampled_from([".tsv", ".jsonl", ".json", ".txt"]))
def test_any_bytes_are_read_or_refused(tmp_path, raw, suffix):
    folder = tmp_path / "f"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    path = folder / f"x{suffix}"
    path.write_bytes(b"index\tquestion\n" + raw if suffix == ".tsv" else raw)
    with contextlib.suppress(ChiasmError):  # anything else would be a bug
        assert read_items(folder if suffix == ".txt" else path)
