"""Video benchmarks: the layouts in which they are published, their subtitles, and what the manifest says of frames."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chiasm.cli.bench import bench_table
from chiasm.errors import DataError, UsageError
from chiasm.eval.benchmarks.items import Item
from chiasm.eval.benchmarks.read import read_items
from chiasm.eval.benchmarks.run import Settings, check_request, messages_of, run_bench
from chiasm.eval.benchmarks.table import VIDEO_FRAMES, get_bench
from chiasm.eval.benchmarks.videos import Line, find_video, read_subtitles, shown_at
from chiasm.eval.manifest import Manifest, first_difference
from chiasm.model.chat import Reply
from clips import folder, write_clip
from tiny_chat import tiny_chat

SRT = """1
00:00:00,000 --> 00:00:01,500
<i>Hello</i> there.

2
00:00:01,500 --> 00:00:03,000
Two
lines

3
01:00:00,000 --> 01:00:02,000
Much later
"""


class Says:
    def __init__(self, reply: str) -> None:
        self.reply, self.asked = reply, []

    def batch(self, conversations, **options):
        self.asked += [turn["content"] for (turn,) in conversations]
        usage = {"prompt_tokens": 7, "completion_tokens": 1}
        return [Reply(text=self.reply, token_ids=[1], usage=usage) for _ in conversations]


def film(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_clip(path, 30)


def write(path: Path, whole: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole), encoding="utf-8")
    return path


# --- layouts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def videomme(tmp_path: Path) -> Path:
    film(tmp_path / "data" / "fFjv93ACGo8.mp4")
    film(tmp_path / "data" / "abc-_0.mp4")
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "subtitle" / "fFjv93ACGo8.srt").write_text(SRT)
    rows = []
    for n, (video, kind) in enumerate(
        (("fFjv93ACGo8", "short"), ("fFjv93ACGo8", "short"), ("abc-_0", "long"))
    ):
        rows.append(
            {
                "video_id": f"{n // 2:03}",
                "duration": kind,
                "domain": "Knowledge",
                "sub_category": "Humanity",
                "url": f"https://www.youtube.com/watch?v={video}",
                "videoID": video,
                "question_id": f"{n // 2:03}-{n % 2 + 1}",
                "task_type": "Counting Problem",
                "question": "What is counted?",
                "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. None."],
                "answer": "C",
            }
        )
    return write(tmp_path / "test.json", rows)


def test_videomme(videomme: Path) -> None:
    items = read_items(videomme)
    first = items[0]
    assert first.key == "000-1"
    assert first.video == str(videomme.parent / "data" / "fFjv93ACGo8.mp4")
    assert first.options == {"A": "Apples.", "B": "Candles.", "C": "Berries.", "D": "None."}
    assert (first.letter, first.category) == ("C", "short")
    assert [item.category for item in items] == ["short", "short", "long"]
    assert first.group == items[1].group != items[2].group  # errors are clustered by video
    assert first.subtitles == str(videomme.parent / "subtitle" / "fFjv93ACGo8.srt")
    assert items[2].subtitles is None


def test_parquet_is_read_alike(videomme: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = videomme.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(json.loads(videomme.read_text())), path)
    for a, b in zip(read_items(videomme), read_items(path), strict=True):
        assert (a.key, a.video, a.options, a.letter, a.category, a.subtitles) == (
            *(b.key, b.video, b.options, b.letter, b.category, b.subtitles),
        )


def test_mlvu(tmp_path: Path) -> None:
    film(tmp_path / "video" / "1_plotQA" / "movie101_66.mp4")
    write(
        tmp_path / "json" / "1_plotQA.json",
        [
            {
                "video": "movie101_66.mp4",
                "duration": 480.0,
                "question": "What colour is the hat?",
                "candidates": ["Yellow", "Red", "Green", "Blue"],
                "answer": "Red",
                "question_type": "plotQA",
            }
        ],
    )
    (item,) = read_items(tmp_path / "json", images=tmp_path)
    # The folder of videos is called like the file of questions, the category like the task.
    assert (item.letter, item.category, item.key) == ("B", "plotQA", "1_plotQA/0")
    assert find_video("movie101_66.mp4", tmp_path, ["1_plotQA"]).is_file()
    assert item.video == str(tmp_path / "video" / "1_plotQA" / "movie101_66.mp4")


def test_longvideobench(tmp_path: Path) -> None:
    film(tmp_path / "videos" / "86CxyhFV9MI.mp4")
    write(
        tmp_path / "subtitles" / "86CxyhFV9MI_en.json",
        [
            {"start": "00:00:00.500", "end": "00:00:01.250", "line": "first"},
            {"start": "00:00:02", "end": None, "line": "last"},
        ],
    )
    row = {
        "video_id": "86CxyhFV9MI",
        "question": "What happens next?",
        "question_wo_referring_query": "…",
        "candidates": ["rain", "snow", "2"],
        "correct_choice": 1,
        "position": [1, 2],
        "topic_category": "NP-News",
        "question_category": "S2E",
        "level": "L1-Perception",
        "id": "86CxyhFV9MI_0",
        "video_path": "86CxyhFV9MI.mp4",
        "subtitle_path": "86CxyhFV9MI_en.json",
        "duration_group": 600,
        "starting_timestamp_for_subtitles": 0,
        "duration": 189.16,
        "view_count": 166582,
    }
    path = write(tmp_path / "lvb_val.json", [row, row | {"id": "86CxyhFV9MI_1", "correct_choice": 2}])
    first, second = read_items(path)
    assert (first.letter, first.category, first.key) == ("B", "600", "86CxyhFV9MI_0")
    assert second.letter == "C"  # counted, although an option reads "2"
    assert first.video == str(tmp_path / "videos" / "86CxyhFV9MI.mp4")
    assert first.subtitles is not None
    lines = read_subtitles(first.subtitles)
    assert [(line.start, line.text) for line in lines] == [(0.5, "first"), (2.0, "last")]
    assert shown_at(lines, [0.6, 999]) == "first last"


def test_nextqa(tmp_path: Path) -> None:
    film(tmp_path / "videos" / "4010069381.mp4")
    fields = [
        "video",
        "frame_count",
        "width",
        "height",
        "question",
        "answer",
        "qid",
        "type",
        *(f"a{n}" for n in range(5)),
    ]
    with (tmp_path / "val.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for qid, video in ((6, "4010069381"), (7, "4010069381"), (6, "5")):
            writer.writerow(
                [
                    video,
                    369,
                    640,
                    480,
                    "how do they hold, it",
                    3,
                    qid,
                    "CH",
                    "carry",
                    "hold",
                    "2",
                    "walk",
                    "sit",
                ]
            )
    items = read_items(tmp_path / "val.csv")
    assert [item.key for item in items] == [
        "4010069381_6",
        "4010069381_7",
        "5_6",
    ]  # ids start anew in every video
    first = items[0]
    assert first.question == "how do they hold, it"
    assert first.options == {"A": "carry", "B": "hold", "C": "2", "D": "walk", "E": "sit"}
    assert (first.letter, first.category) == ("D", "CH")
    assert first.video == str(tmp_path / "videos" / "4010069381.mp4")
    assert items[2].video == str(tmp_path / "5.mp4")  # nowhere: said when it is asked about
    with pytest.raises(DataError, match=r"val\.csv:4: there is no video .*5\.mp4: give the folder of videos"):
        messages_of(items[2], get_bench("nextqa").prompts(cot=False))


def test_egoschema(tmp_path: Path) -> None:
    ids = ["0074f737-11cb-497d-8d07-77c3a8127391", "00aa7247-9a4b-4667-8588-37df29d40fe8"]
    film(tmp_path / "videos" / f"{ids[0]}.mp4")
    questions = write(
        tmp_path / "questions.json",
        [
            {"q_uid": uid, "google_drive_id": "x", "question": "What is C doing?"}
            | {f"option {n}": f"thing {n}" for n in range(5)}
            for uid in ids
        ],
    )
    answers = write(tmp_path / "subset_answers.json", {ids[0]: 3, ids[1]: 0})
    first, second = read_items(questions, answers=answers)
    assert first.key == ids[0]
    assert first.options == {letter: f"thing {n}" for n, letter in enumerate("ABCDE")}
    assert (first.letter, second.letter) == ("D", "A")
    assert first.video == str(tmp_path / "videos" / f"{ids[0]}.mp4")
    bad = write(tmp_path / "bad.json", {ids[0]: 5, ids[1]: 0})
    with pytest.raises(DataError, match=r"names option 5 of question '0074f737.*which has 5"):
        read_items(questions, answers=bad)
    short = write(tmp_path / "short.json", {ids[0]: 1})
    with pytest.raises(DataError, match="has no answer to question '00aa7247"):
        read_items(questions, answers=short)
    # As a table with the answer beside it, a place that is written as text.
    row = {
        "question_idx": "0",
        "question": "What?",
        "video_idx": ids[0],
        "option": ["A. this", "B. that", "C. 1"],
        "answer": "1",
    }
    (item,) = read_items(write(tmp_path / "sub.json", [row]))
    assert (item.letter, item.options["B"], item.key) == ("B", "that", "0")


def test_perception_test(tmp_path: Path) -> None:
    film(tmp_path / "videos" / "video_1.mp4")
    asked = {"question": "Is it stable?", "options": ["Yes", "No", "1"], "answer_id": 1, "area": "physics"}
    path = write(
        tmp_path / "valid.json",
        {
            "video_1": {
                "metadata": {"split": "valid"},
                "mc_question": [{"id": 0, **asked}, {"id": 1, **asked}],
            },
            "video_2": {"mc_question": [{"id": 0, **asked}]},
        },
    )
    items = read_items(path)
    assert [item.key for item in items] == ["video_1_0", "video_1_1", "video_2_0"]
    assert (items[0].letter, items[0].category) == ("B", "physics")
    assert items[0].video == str(tmp_path / "videos" / "video_1.mp4")
    with pytest.raises(DataError, match=r"mc_question\[0\] must be an object"):
        read_items(write(tmp_path / "bad.json", {"v": {"mc_question": [3]}}))


def test_activitynet(tmp_path: Path) -> None:
    film(tmp_path / "v_1QIUV7WYKXg.mp4")
    questions = write(
        tmp_path / "test_q.json",
        [{"video_name": "1QIUV7WYKXg", "question": "is he outdoors", "question_id": "v_1QIUV7WYKXg_3"}],
    )
    answers = write(
        tmp_path / "test_a.json", [{"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}]
    )
    (item,) = read_items(questions, answers=answers)
    assert (item.answers, item.video) == (("yes",), str(tmp_path / "v_1QIUV7WYKXg.mp4"))
    result = run_bench(Says("Yes"), get_bench("activitynetqa"), [item])
    assert result.headline.value == 1.0


def test_letters_are_taken_off_only_where_all_options_have_theirs(tmp_path: Path) -> None:
    def options(*texts: str) -> dict[str, str]:
        row = {"question": "?", "video": "a.mp4", "options": list(texts), "answer": "A"}
        return dict(read_items(write(tmp_path / "one.json", [row]))[0].options)

    assert options("(A) x", "(B) y") == {"A": "x", "B": "y"}
    assert options("A. x", "C. y") == {"A": "A. x", "B": "C. y"}
    assert options("A. x") == {"A": "A. x"}
    assert options("A.", "B.") == {"A": "A.", "B": "B."}
    assert options("A big dog", "B movies") == {"A": "A big dog", "B": "B movies"}


# --- subtitles --------------------------------------------------------------------------------------------------


def test_subrip_and_webvtt(tmp_path: Path) -> None:
    path = tmp_path / "a.srt"
    path.write_bytes(("\ufeff" + SRT.replace("\n", "\r\n")).encode())
    lines = read_subtitles(path)
    assert lines == [Line(0, 1.5, "Hello there."), Line(1.5, 3, "Two lines"), Line(3600, 3602, "Much later")]
    (tmp_path / "a.vtt").write_text("WEBVTT\n\nNOTE x\n\n00:01.000 --> 00:02.500 align:start\n<v Ann>Hi\n")
    assert read_subtitles(tmp_path / "a.vtt") == [Line(1, 2.5, "Hi")]
    (tmp_path / "t.json").write_text('[{"timestamp": [1, 2.5], "text": "Hi"}]')
    assert read_subtitles(tmp_path / "t.json") == [Line(1, 2.5, "Hi")]
    (tmp_path / "empty.srt").write_text("")
    assert read_subtitles(tmp_path / "empty.srt") == []


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.srt", "hello", r"a\.srt: is no subtitle file"),
        ("a.json", "{", r"a\.json: the subtitles are not JSON"),
        ("a.json", '[{"start": 1}]', r"a\.json\[0\] needs start, end and line"),
        ("a.json", '[{"start": "x", "end": 1, "line": "y"}]', r"a\.json\[0\] needs start"),
    ],
)
def test_damaged_subtitles(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=match):
        read_subtitles(tmp_path / name)
    with pytest.raises(DataError, match=r"gone\.srt: the subtitles cannot be read"):
        read_subtitles(tmp_path / "gone.srt")


@given(
    spans=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=8),
    times=st.lists(st.floats(0, 60), max_size=6),
)
def test_what_is_shown_is_on_screen(spans, times) -> None:
    lines = sorted(
        (Line(a, a + b, f"<{n}>") for n, (a, b) in enumerate(spans)), key=lambda x: (x.start, x.end)
    )
    found = shown_at(lines, times).split()
    assert found == [x.text for x in lines if any(x.start <= when < x.end for when in times)]
    assert shown_at(lines).split() == [x.text for x in lines]


def test_subtitles_are_those_of_the_frames(videomme: Path) -> None:
    items = read_items(videomme)
    model = Says("C")
    result = run_bench(model, get_bench("videomme_subs"), items, Settings(frames=2))
    # Two frames of three seconds, at 0.7 and 2.2: both lines are on screen.
    said = model.asked[0][-1]["text"]
    assert said.startswith(
        "Subtitles of the video: Hello there. Two lines\nWhat is counted?\nA. Apples.\nB. Candles."
    )
    assert said.endswith("Answer with the option's letter from the given choices directly.")
    assert "Subtitles" not in model.asked[2][-1]["text"]  # that video has none
    assert result.headline.value == 1.0
    assert result.manifest.video["subtitles"] | {"hash": ""} == {
        "of": "frames",
        "videos": 1,
        "without": 1,
        "hash": "",
    }
    one = Says("C")
    run_bench(one, get_bench("videomme_subs"), items, Settings(frames=1))
    assert "Two lines" not in one.asked[0][-1]["text"] or "Hello" not in one.asked[0][-1]["text"]
    without = Says("C")
    run_bench(without, get_bench("videomme"), items, Settings(frames=2))
    assert without.asked[0][-1]["text"].startswith("What is counted?")
    for path in (videomme.parent / "subtitle").iterdir():
        path.unlink()
    with pytest.raises(
        UsageError, match="videomme_subs: no subtitles are there: put them into a folder subtitle"
    ):
        check_request(get_bench("videomme_subs"), read_items(videomme), Settings())


def test_broken_subtitles_say_which_question(videomme: Path) -> None:
    next((videomme.parent / "subtitle").iterdir()).write_text("nothing")
    with pytest.raises(DataError, match=r"^test\.json\[0\]: fFjv93ACGo8\.srt: is no subtitle file"):
        run_bench(Says("C"), get_bench("videomme_subs"), read_items(videomme))


# --- what the manifest says ---------------------------------------------------------------------------------------


def test_the_manifest_says_how_videos_are_looked_at(tmp_path: Path) -> None:
    frames = folder(tmp_path / "film", [f"{n}.png" for n in range(6)])
    items = [
        Item(
            key=str(n),
            where=f"t:{n}",
            question="?",
            video=str(frames),
            options={"A": "x", "B": "y"},
            answers=("A",),
            letter="A",
        )
        for n in range(2)
    ]
    chat = tiny_chat()
    bench = get_bench("videomme")
    assert bench.frames == VIDEO_FRAMES == 16
    result = run_bench(chat, bench, items, Settings(frames=2, max_new_tokens=3))
    assert result.manifest.frames == 2
    assert result.manifest.video == {
        "sampling": "middle",
        "formula": "original",
        "tiles_per_frame": "one",
        "tokens_per_tile": chat.spec.tokens_per_tile,
        "frame_tags": "Frame{n}: ",
    }
    shown = bench_table(result.to_dict())
    tokens = chat.spec.tokens_per_tile
    assert (
        f"videos: 2 frames each (fewer of a shorter one), sampling middle (original), one tile of {tokens} tokens a "
        "frame" in shown
    )
    # Whoever compares numbers of different frames, or tokens of frames, is told.
    other = Manifest.from_dict(result.manifest.to_dict() | {"video": {"sampling": "fps"}})
    assert first_difference(result.manifest, other) == 'video.sampling: "middle" and "fps"'
    assert "video" in result.manifest.identity()


def test_pictures_have_the_identity_that_they_had() -> None:
    manifest = Manifest(bench="docvqa", data={}, metric={}, parser={}, prompt={})
    assert "video" not in manifest.identity()
    assert "videos:" not in bench_table(run_bench(Says("x"), get_bench("docvqa"), [_picture()]).to_dict())


def _picture() -> Item:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    return Item(key="0", where="t:1", question="?", images=(file.getvalue(),), answers=("x",), group="p")
