"""Messages: every accepted spelling, every refusal with its place, rows that survive a round trip."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from chiasm.data.message import SAMPLING, Part, Record, Turn, from_row, parse_messages, spell_turn, to_row
from chiasm.errors import DataError
from chiasm.media.frames import FrameSampling


def text(value):
    return Part("text", value)


def image(value):
    return Part("image", value)


def spelled(turn, **options):
    """As one string, pictures as [source]."""
    return "".join(f"[{p.value}]" if isinstance(p, Part) else p for p in spell_turn(turn, **options))


def test_accepted_spellings():
    asked = Turn("user", (text("Hi"),))
    assert parse_messages("Hi") == [asked]
    assert parse_messages(asked) == [asked]
    assert parse_messages([asked]) == [asked]
    assert parse_messages({"role": "user", "content": "Hi"}) == [asked]
    assert parse_messages({"messages": [{"role": "user", "content": "Hi"}]}) == [asked]
    assert parse_messages({"conversations": [{"from": "human", "value": "Hi"}]}) == [asked]
    assert parse_messages(Record(turns=(asked,))) == [asked]
    assert parse_messages([{"role": "human", "content": ["Hi"]}, {"role": "gpt", "content": "Yo"}]) == [
        asked,
        Turn("assistant", (text("Yo"),)),
    ]


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ({"type": "text", "text": ""}, text("")),
        ({"type": "image", "image": "a.png"}, image("a.png")),
        ({"type": "image", "path": Path("a.png")}, image(Path("a.png"))),
        ({"type": "image", "url": "https://x/a.png"}, image("https://x/a.png")),
        ({"type": "image_url", "image_url": "data:image/png;base64,AA"}, image("data:image/png;base64,AA")),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, image("a.png")),
        ({"type": "video", "video": "a.mp4"}, Part("video", "a.mp4")),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, Part("video", "a.mp4")),
        (
            {"type": "video_url", "video_url": {"url": "a.mp4", "fps": 2, "detail": "low"}, "clip": [1, 2]},
            Part("video", "a.mp4", {"fps": 2, "clip": [1, 2]}),
        ),
        ({"type": "points", "points": [1, 2]}, Part("points", [1, 2])),
        ({"type": "box", "box": [1, 2, 3, 4]}, Part("box", [1, 2, 3, 4])),
        ({"type": "codes", "codes": [7]}, Part("codes", [7])),
        (image("b.png"), image("b.png")),
    ],
)
def test_content_items(item, part):
    assert parse_messages([{"role": "user", "content": [item]}]) == [Turn("user", (part,))]


def test_pictures_of_any_kind_are_carried_unopened():
    picture, array = Image.new("RGB", (2, 3)), np.zeros((2, 2, 3), np.uint8)
    content = [
        {"type": "image", "image": picture},
        {"type": "image", "image": array},
        {"type": "mask", "mask": array},
    ]
    (turn,) = parse_messages({"role": "user", "content": content})
    assert turn.parts[0].value is picture
    assert turn.parts[1].value is array
    assert turn.parts[2].value is array


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        (7, "messages must be a str, a dict or a list of dicts, not int"),
        (b"hi", "not bytes"),
        ({"content": "x"}, "a message needs a role and a content, found only 'content'"),
        (["hi"], r"messages\[0\] must be a dict with role and content, not str"),
        ([{"role": "user", "content": "a"}, {"role": "user"}], r"messages\[1\] has no 'content'"),
        (
            [{"role": "wizard", "content": "a"}],
            r"messages\[0\]\.role is 'wizard': use one of system, user, assistant",
        ),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\]\.role is"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be a str or a list, not int"),
        (
            [{"role": "user", "content": None}],
            r"messages\[0\]\.content must be a str or a list, not NoneType",
        ),
        (
            [{"role": "user", "content": [4]}],
            r"messages\[0\]\.content\[0\] must be a dict with a type, not int",
        ),
        (
            [{"role": "user", "content": [{"type": "smell"}]}],
            r"content\[0\]\.type is 'smell': use one of text, image",
        ),
        ([{"role": "user", "content": [{"text": "x"}]}], r"content\[0\]\.type is None"),
        ([{"role": "user", "content": [{"type": ["text"]}]}], r"content\[0\]\.type is"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            r"content\[0\]\.text must be a str, not int",
        ),
        ([{"role": "user", "content": ["a", {"type": "image"}]}], r"content\[1\]\.image is missing or empty"),
        (
            [{"role": "user", "content": [{"type": "image", "url": ""}]}],
            r"content\[0\]\.url is missing or empty",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\]\.image_url is missing or empty",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
            r"messages\[1\]: the system message must come first",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": "<image>\nand <image>"}],
            r"messages\[1\] has 2 <image> tag\(s\) but 0 image\(s\): give 2 more",
        ),
        (
            {
                "role": "user",
                "content": [{"type": "image", "image": "a"}, {"type": "image", "image": "b"}, "<image>"],
            },
            r"messages\[0\] has 1 <image> tag\(s\) but 2 image\(s\): write a tag for each, or none at all",
        ),
    ],
)
def test_refusals_name_the_place(messages, said):
    with pytest.raises(DataError, match=said) as caught:
        parse_messages(messages)
    assert "\n" not in str(caught.value)


def test_pictures_beside_the_messages_stand_at_their_tags():
    def told(messages, *images):
        return [spelled(turn, numbered=False) for turn in parse_messages(messages, images=images)]

    assert told("Left <image> or right <image>?", "a", "b") == ["Left [a] or right [b]?"]
    assert told("Image-1: <image>\nImage-2: <image>\nWhat?", "a", "b") == [
        "Image-1: [a]\nImage-2: [b]\nWhat?"
    ]
    assert told("What?", "a") == ["[a]\nWhat?"]
    talk = [
        {"role": "user", "content": "<image> What?"},
        {"role": "assistant", "content": "A cat in an <image>."},
        {"role": "user", "content": "And <image>?"},
    ]
    assert told(talk, "a", "b") == ["[a] What?", "A cat in an <image>.", "And [b]?"]
    # A turn that has pictures of its own keeps them; without tags, or with other tags, the last question gets all.
    talk[0]["content"] = [{"type": "image", "image": "x"}, "<image> What?"]
    assert told(talk, "b") == ["[x] What?", "A cat in an <image>.", "And [b]?"]
    talk[2]["content"] = "And these?"
    assert told(talk, "b", "c") == ["[x] What?", "A cat in an <image>.", "[b]\n[c]\nAnd these?"]


@pytest.mark.parametrize(
    ("messages", "images", "said"),
    [
        ("<image> <image>", ["a"], r"messages\[0\] has 2 <image> tag\(s\) but 1 image\(s\): give 1 more"),
        ("<image>", ["a", "b"], r"1 <image> tag\(s\) but 2 image\(s\): write a tag for each"),
        ([{"role": "assistant", "content": "x"}], ["a"], "no message has the role user"),
    ],
)
def test_pictures_beside_the_messages_must_fit(messages, images, said):
    with pytest.raises(DataError, match=said):
        parse_messages(messages, images=images)


def test_parts_and_turns_check_themselves():
    with pytest.raises(DataError, match="unknown part kind 'smell'"):
        Part("smell", 1)
    with pytest.raises(DataError, match="a text part must hold a str, not int"):
        Part("text", 1)
    with pytest.raises(DataError, match="unknown role 'human'"):
        Turn("human", ())


def test_where_pictures_stand():
    one = Turn.of("user", "What?", ["a"])
    two = Turn.of("user", "Which?", ["a", "b"])
    assert spelled(one) == "[a]\nWhat?"
    assert spelled(two) == "Image-1: [a]\nImage-2: [b]\nWhich?"
    assert spelled(two, before=3) == "Image-4: [a]\nImage-5: [b]\nWhich?"
    assert spelled(two, numbered=False) == "[a]\n[b]\nWhich?"
    mixed = Turn("user", (text("First "), image("a"), text("then "), image("b")))
    assert spelled(mixed, numbered=False) == "First [a]\nthen [b]\n"
    tagged = Turn.of("user", "Compare <image> with <image>.", ["a", "b"])
    assert spelled(tagged) == "Compare [a] with [b]."
    split = Turn("user", (image("a"), text("x<image>"), text("<image>y"), image("b")))
    assert spelled(split) == "x[a][b]y"


def test_tags_outside_of_questions_are_text():
    assert spelled(Turn.of("assistant", "I see <image>")) == "I see <image>"
    assert spelled(Turn.of("system", "Tags look like <image>")) == "Tags look like <image>"
    assert spelled(Turn.of("user", "a <video> tag")) == "a <video> tag"
    film = Turn("user", (Part("video", "v"), text("<video>\nWhat?")))
    assert spelled(film) == "[v]\nWhat?"
    assert spelled(Turn("user", (Part("video", "v"), text("What?")))) == "[v]\nWhat?"


def test_turn_views():
    turn = Turn("user", (text("a"), image("x"), text("b")))
    assert turn.text == "ab"
    assert turn.of_kind("image") == [image("x")]


# Rows ------------------------------------------------------------------------------------------------------------


def row(*values, **fields):
    talk = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
    return {**fields, "conversations": talk}


def test_rows_give_each_question_its_pictures():
    record = from_row(row("<image>\nA?", "a", "<image> and <image>?", "b", image=["1", "2", "3"]))
    assert [[p.value for p in turn.of_kind("image")] for turn in record.turns] == [["1"], [], ["2", "3"], []]
    assert spelled(record.turns[2]) == "[2] and [3]?"


def test_rows_without_tags_follow_the_official_rule():
    assert spelled(from_row(row("What?", "A cat.", image="a.png")).turns[0]) == "[a.png]\nWhat?"
    several = from_row(row("Which?", "A.", image=["a", "b"]))
    assert spelled(several.turns[0]) == "Image-1: [a]\nImage-2: [b]\nWhich?"
    system = {
        "image": "a",
        "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}],
    }
    assert spelled(from_row(system).turns[1]) == "[a]\nQ"
    film = from_row(row("What happens?", "Rain.", video="v.mp4", clip=[1, 2]))
    assert spelled(film.turns[0]) == "[v.mp4]\nWhat happens?"
    assert film.extra == {}
    assert film.turns[0].parts[0] == Part("video", "v.mp4", {"clip": [1, 2]})
    assert from_row(row("Q", "A", video="v.mp4", clip=None)).turns[0].parts[0] == Part("video", "v.mp4")
    assert film.resolved("/data")[0].parts[0] == Part("video", "/data/v.mp4", {"clip": [1, 2]})


def test_a_clip_that_is_taken_away_stays_away():
    given = row("What happens?", "Rain.", video="v.mp4", clip=[1, 2])
    film = from_row(given)
    assert to_row(film) == given
    first, *rest = film.turns
    whole = replace(first, parts=(Part("video", "v.mp4"), *first.parts[1:]))
    assert "clip" not in to_row(replace(film, turns=(whole, *rest)))
    pictured = row("<image>Q", "A", image="a.png", clip=[1, 2])
    assert to_row(from_row(pictured)) == pictured


def test_a_folder_of_frames_has_a_rate():
    given = row("What happens?", "Rain.", video="frames", clip=[1, 2], folder_fps=3)
    made = from_row(given)
    assert made.turns[0].parts[0] == Part("video", "frames", {"clip": [1, 2], "folder_fps": 3})
    assert made.extra == {}
    assert to_row(made) == given
    pictured = row("<image>Q", "A", image="a.png", folder_fps=3)
    assert from_row(pictured).extra == {"folder_fps": 3}
    assert to_row(from_row(pictured)) == pictured


def test_the_sampling_of_a_video():
    item = {"type": "video", "video": "a.mp4", "clip": [2, 8], "frames": 16, "other": 1}
    (turn,) = parse_messages({"role": "user", "content": [item]})
    assert turn.parts == (Part("video", "a.mp4", {"frames": 16, "clip": [2, 8]}),)
    assert to_row([Turn("user", (Part("video", "a.mp4", {"clip": (2, 8)}), text("Q")))])["clip"] == [2, 8]
    with pytest.raises(DataError, match="a row holds the clip and folder_fps of a video, no other sampling"):
        to_row([turn])
    with pytest.raises(DataError, match="unknown field 'best' of a video's sampling: use mode, frames"):
        Part("video", "a.mp4", {"best": 1})
    with pytest.raises(DataError, match="image parts have no frames to sample: leave out clip"):
        Part("image", "a.png", {"clip": (1, 2)})
    fields = tuple(FrameSampling.__dataclass_fields__)
    assert fields == SAMPLING


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], r"d\.jsonl:3 must be a JSON object, not list"),
        ({}, r"d\.jsonl:3\.conversations must be a list with at least one turn"),
        ({"conversations": []}, "at least one turn"),
        ({"conversations": ["x"]}, r"conversations\[0\] must be an object with from and value, not str"),
        (
            {"conversations": [{"from": "user", "value": "x"}]},
            r"\[0\]\.from is 'user': use one of system, human, gpt",
        ),
        (
            {"conversations": [{"from": "human", "value": None}]},
            r"\[0\]\.value must be a string, not NoneType",
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "system", "value": "x"}]},
            r"\[1\]\.from is 'system': a system turn must come first",
        ),
        (row("<image>", "a"), r"1 <image> tag\(s\) in its human turns but 0 image\(s\)"),
        (row("<image><image>", "a", image="x"), r"2 <image> tag\(s\) in its human turns but 1 image\(s\)"),
        (row("<image>", "a", image=["x", "y"]), r"1 <image> tag\(s\) in its human turns but 2 image\(s\)"),
        (row("a", "b", image=["x", 3]), r"d\.jsonl:3\.image\[1\] must be a path, found 3"),
        (row("a", "b", image={"x": 1}), r"d\.jsonl:3\.image must be a string or a list"),
        (row("a", "b", video=["x"]), r"d\.jsonl:3\.video must be a string"),
        (row("<video><video>", "b", video="x"), r"2 <video> tag\(s\)"),
        (row("<image>", "b", video="x"), r"conversations\[0\] has 1 <image> tag\(s\) but 0 image\(s\)"),
        ({"image": "x", "conversations": [{"from": "gpt", "value": "x"}]}, "no human turn to put them in"),
    ],
)
def test_bad_rows(bad, said):
    with pytest.raises(DataError, match=said) as caught:
        from_row(bad, where="d.jsonl:3")
    assert "\n" not in str(caught.value)


words = st.text(alphabet=st.sampled_from("ab \n-<>你1"), max_size=8).filter(lambda t: "<image>" not in t)
paths = st.text(alphabet="abc/.", min_size=1, max_size=5)
extras = st.dictionaries(
    st.sampled_from(["id", "width", "height", "length", "source"]), st.one_of(st.integers(), words, st.none())
)


@st.composite
def rows(draw):
    """Valid rows: text only, one picture, lists, tagged and untagged, a video, a system turn, unknown fields."""
    talk, tags = [], 0
    if draw(st.booleans()):
        talk.append({"from": "system", "value": draw(words)})
    kind = draw(st.sampled_from(["none", "image", "images", "untagged", "video"]))
    for n in range(draw(st.integers(1, 3))):
        value = draw(words)
        if kind in ("image", "images"):
            count = draw(st.integers(0, 2)) if kind == "images" else int(n == 0)
            value = draw(st.sampled_from(["", "Image-1: "])) + "<image>\n" * count + value
            tags += count
        elif kind == "video" and n == 0:
            value = draw(st.sampled_from(["", "<video>\n"])) + value
        entry = {"from": "human", "value": value}
        if draw(st.integers(0, 4)) == 0:
            entry["weight"] = draw(st.integers())
        talk += [entry, {"from": "gpt", "value": draw(words)}]
    made = {**draw(extras), "conversations": talk}
    if kind == "image":
        made["image"] = draw(paths)
    elif kind == "images" and tags:
        made["image"] = [draw(paths) for _ in range(tags)]
    elif kind == "untagged":
        made["image"] = draw(st.one_of(paths, st.lists(paths, min_size=1, max_size=3)))
    elif kind == "video":
        made["video"] = draw(paths)
        made |= draw(st.sampled_from([{}, {"clip": None}, {"clip": [1, 2.5]}]))
    else:
        made |= draw(st.sampled_from([{}, {"image": ""}, {"image": []}, {"image": None}]))
    return made


@given(rows())
@settings(max_examples=120)
def test_rows_survive_a_round_trip(made):
    before = json.dumps(made, sort_keys=True)
    record = from_row(made)
    assert to_row(record) == made
    assert json.dumps(made, sort_keys=True) == before  # reading changes nothing
    assert from_row(to_row(record)) == record
    assert parse_messages(made) == list(record.turns)


@given(rows())
def test_turns_written_as_rows_say_the_same(made):
    turns = from_row(made).turns
    again = from_row(to_row(turns)).turns
    assert [spelled(turn) for turn in again] == [spelled(turn) for turn in turns]
    assert [turn.role for turn in again] == [turn.role for turn in turns]


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (
            [Turn.of("user", "x", [Image.new("RGB", (1, 1))])],
            r"turns\[0\]: a row holds paths, not Image: save the image",
        ),
        ([Turn.of("assistant", "x", ["a"])], r"turns\[0\]: a row cannot hold image parts in assistant turns"),
        ([Turn("user", (Part("points", 1),))], "a row cannot hold points parts in user turns"),
        ([Turn("user", (Part("video", "a"), Part("image", "b")))], "either pictures or one video"),
        ([Turn("user", (Part("video", "a"), Part("video", "b")))], "either pictures or one video"),
    ],
)
def test_what_a_row_cannot_hold(turns, said):
    with pytest.raises(DataError, match=said):
        to_row(turns)


def test_paths_under_a_root():
    record = from_row(row("<image><image><image>", "a", image=["a.png", "/b.png", "https://x/c.png"]))
    values = [p.value for p in record.resolved("/data")[0].of_kind("image")]
    assert values == [str(Path("/data/a.png")), "/b.png", "https://x/c.png"]
    assert record.resolved("/data")[0].text == "<image><image><image>"
