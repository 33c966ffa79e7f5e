"""Kinds of rows: the public spellings, and refusals that begin with the place."""

import json

import pytest

from chiasm.data.formats.rows import guess, read_row
from chiasm.data.message import Part, Record, Turn, from_row, spell_turn
from chiasm.errors import DataError


def said(record):
    """Each turn as one string, pictures as [source]."""
    return [
        (turn.role, "".join(f"[{p.value}]" if isinstance(p, Part) else p for p in spell_turn(turn)))
        for turn in record.turns
    ]


ASKED = [("user", "[a.png]\nWhat?"), ("assistant", "A cat.")]
SAME = {
    "internvl": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    },
    "sharegpt": {
        "images": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    },
    "sharegpt with roles": {
        "images": [{"bytes": None, "path": "a.png"}],
        "conversations": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "A cat."},
        ],
    },
    "messages with items": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}],
            },
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "messages with placeholders": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
        "images": ["a.png"],
    },
    "messages with tags": {
        "messages": [
            {"role": "user", "content": "<image>\nWhat?"},
            {"role": "assistant", "content": "A cat."},
        ],
        "images": ["a.png"],
    },
    "messages with an OpenAI url": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "a.png"}},
                    {"type": "text", "text": "What?"},
                ],
            },
            {"role": "assistant", "content": "A cat."},
        ]
    },
    "pairs": {"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A cat."}]},
    "pairs as a struct of lists": {
        "images": ["a.png"],
        "texts": {"user": ["What?"], "assistant": ["A cat."]},
    },
    "a table's JSON string": {
        "image": "a.png",
        "conversations": json.dumps(
            [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
        ),
    },
    "internvl without a tag": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}],
    },
}


@pytest.mark.parametrize("name", SAME)
def test_one_conversation_in_every_spelling(name):
    row = {"id": 7, **SAME[name]}
    record = read_row(row, None, "a.jsonl:1")
    assert said(record) == ASKED
    assert record.extra == {"id": 7}


def test_a_list_of_messages_is_a_row():
    record = read_row(SAME["messages with items"]["messages"], None, "a.json[0]")
    assert said(record) == ASKED


def test_internvl_rows_are_those_of_from_row():
    row = {**SAME["internvl"], "width": 3, "note": None}
    assert read_row(row, None, "x") == from_row(row)
    for pictures in ("a.png", ["a.png"]):  # also by the way of rows with bytes
        row = {**SAME["internvl"], "image": pictures}
        assert read_row({**row, "images": None}, "internvl", "x") == from_row(row)


def test_pictures_as_bytes_and_structs_in_order():
    row = {
        "images": [b"one", {"bytes": b"two", "path": "2.png"}, "three"],
        "conversations": [
            {"from": "human", "value": "<image> and <image>"},
            {"from": "gpt", "value": "<image>?"},
            {"from": "human", "value": "then <image>"},
        ],
    }
    record = read_row(row, None, "x")
    assert [[p.value for p in turn.of_kind("image")] for turn in record.turns] == [
        [b"one", b"two"],
        [],
        ["three"],
    ]
    assert said(record)[1] == ("assistant", "<image>?")


def test_sharegpt_has_a_system_prompt_beside_and_videos():
    row = {
        "system": "Be brief.",
        "videos": ["a.mp4"],
        "clip": [1, 2],
        "conversations": [{"from": "user", "value": "<video>\nWho?"}],
    }
    record = read_row(row, None, "x")
    assert record.turns == (
        Turn("system", (Part("text", "Be brief."),)),
        Turn("user", (Part("video", "a.mp4", {"clip": [1, 2]}), Part("text", "<video>\nWho?"))),
    )
    assert record.extra == {}


def test_messages_take_the_videos_beside_them():
    row = {
        "messages": [
            {"role": "user", "content": "<video> or <video>?"},
            {"role": "assistant", "content": "<video>"},
        ],
        "videos": ["a.mp4", "b.mp4"],
    }
    record = read_row(row, None, "x")
    assert said(record) == [("user", "[a.mp4] or [b.mp4]?"), ("assistant", "<video>")]
    assert record.extra == {}
    assert record.tagged
    assert read_row({**row, "videos": [], "messages": row["messages"][1:]}, None, "x").extra == {"videos": []}


def test_messages_take_the_one_video_beside_them_with_its_clip():
    row = {
        "messages": [{"role": "user", "content": "<video>\nWho?"}],
        "video": "a.mp4",
        "clip": [1, 2],
        "id": 7,
    }
    record = read_row(row, None, "x")
    assert record.turns[0].parts[0] == Part("video", "a.mp4", {"clip": [1, 2]})
    assert said(record) == [("user", "[a.mp4]\nWho?")]
    assert record.extra == {"id": 7}


def test_captions_answer_the_question_of_the_set():
    record = read_row(
        {"caption": "A dog.", "images": [b"x"], "url": "u"}, None, "x", question="What is this?"
    )
    assert record.turns == (Turn.of("user", "What is this?", [b"x"]), Turn.of("assistant", "A dog."))
    assert record.extra == {"url": "u"}


def test_fields_of_messages_are_kept():
    row = {
        "messages": [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": None}]
    }
    record = read_row(row, None, "x")
    assert record == Record(
        turns=(Turn("user", (Part("text", "Hi"),), {"name": "Ann"}), Turn("assistant", (Part("text", ""),))),
        tagged=False,
    )


HI = {"from": "human", "value": "Hi"}


@pytest.mark.parametrize(
    ("row", "kind", "line"),
    [
        (3, None, "W: must be a JSON object, not int"),
        (None, "internvl", "W: must be a JSON object, not null"),
        ([], "messages", "W.messages must be a list with at least one message"),
        ([1], None, "W: must be a JSON object, not list"),
        ({}, None, "W: has no messages, conversations, texts or caption: found only no fields"),
        ({"a": 1, "b": 2}, None, "W: has no messages, conversations, texts or caption: found only 'a', 'b'"),
        ({"conversations": []}, None, "W.conversations must be a list with at least one turn"),
        ({"conversations": "{["}, None, "W.conversations is a string that is not JSON"),
        ({"conversations": "[" * 100_000}, None, "W.conversations is a string that is no usable JSON"),
        ({"messages": f"[{'1' * 5000}]"}, None, "W.messages is a string that is no usable JSON"),
        (
            {"conversations": [HI], "images": ["a", "b"], "system": 3},
            None,
            "W.system must be a string, not int",
        ),
        (
            {"conversations": [{"from": "tool", "value": ""}], "system": "x"},
            None,
            "W.conversations[0].from is 'tool'",
        ),
        (
            {"conversations": [7], "system": "x"},
            None,
            "W.conversations[0] must be an object with from and value",
        ),
        (
            {"conversations": [{"from": "system", "value": "a"}], "system": "x"},
            None,
            "W: has a system prompt beside",
        ),
        ({"conversations": [HI], "videos": ["a", "b"]}, None, "W.videos: holds 2 videos"),
        (
            {"conversations": [HI], "images": [""]},
            None,
            "W.images[0] must be a path or the bytes of a picture",
        ),
        (
            {"conversations": [HI], "images": [{"bytes": None, "path": None}]},
            None,
            "W.images[0] must be a path",
        ),
        ({"conversations": [HI], "image": 5}, None, "W.image must be a path"),
        (
            {"conversations": [{"from": "gpt", "value": "x"}], "images": ["a"]},
            None,
            "W has 1 image(s) but no human",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image><image>"}], "images": ["a"]},
            None,
            "W has 2 <image> tag(s) in its human turns but 1 image(s)",
        ),
        ({"messages": "Hi"}, None, "W.messages is a string that is not JSON"),
        ({"messages": [{"role": "tool", "content": ""}]}, None, "W.messages[0].role is 'tool'"),
        ({"messages": [{"role": "user"}]}, None, "W.messages[0] has no 'content'"),
        ({"messages": [5]}, None, "W.messages[0] must be a dict"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            None,
            "W.messages[0].content[0].image is mis",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}], "images": ["a", "b"]},
            None,
            "W: has 2 images but 1 image items",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "images": ["a"]},
            None,
            "W: images were given but no",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "videos": ["a"]},
            None,
            "W: has 0 <video> tag(s) but 1",
        ),
        (
            {"messages": [{"role": "user", "content": "<video>"}], "videos": [3]},
            None,
            "W.videos[0] must be a path",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "audios": ["a"]},
            None,
            "W.audios: sound cannot be read",
        ),
        ({"texts": []}, None, "W.texts must be a list"),
        ({"texts": [{"user": "x"}]}, None, "W.texts[0] must have the strings user and assistant"),
        ({"caption": 3}, "caption", "W: has no caption"),
        ({"text": "Prose."}, None, "W: has a text and no picture"),
        ({"caption": "A dog runs.", "video": "a.mp4"}, None, "W: has a caption and a video"),
        ({"conversations": [HI], "image": "a.png", "video": "a.mp4"}, None, "W: has pictures and a video"),
        ({"conversations": [HI], "images": ["a.png"], "videos": ["a"]}, None, "W: has pictures and a video"),
        (
            {"messages": [{"role": "user", "content": "a"}], "video": "a"},
            None,
            "W: has 0 <video> tag(s) but 1",
        ),
        (
            {"messages": [{"role": "user", "content": "<video>"}], "video": 3},
            None,
            "W.video[0] must be a path",
        ),
    ],
)
def test_refusals_begin_with_the_place(row, kind, line):
    with pytest.raises(DataError) as caught:
        read_row(row, kind, "W")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_kinds_are_told_by_fields():
    assert guess({"conversations": [HI]}, "x") == "internvl"
    assert guess({"conversations": [HI], "system": ""}, "x") == "internvl"
    assert guess({"conversations": [{"role": "user", "content": ""}]}, "x") == "sharegpt"
    assert guess({"messages": []}, "x") == "messages"
    assert guess({"text": "a"}, "x") == "caption"
