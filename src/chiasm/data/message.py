"""Messages: a conversation is a list of turns, a turn is a role and parts.

Everything that people write conversations in (a plain question, OpenAI-style message lists, InternVL rows) is read
into `Turn`s here, checked, and reported in one line with the index and field where it is wrong. No picture is
opened here: an image part holds a path, URL, PIL image, bytes or array.

Pictures and `<image>` tags (fact sheet InternVL 2.5, sections 2.9 and 3.1). Within one user turn:
- if its text has tags, they stand for that turn's pictures, in order, and the numbers must agree;
- if it has none, its pictures stand where their parts stand, each followed by a newline; several of them are
  introduced as `Image-1: `, `Image-2: `, … (counted through the conversation) where the template numbers pictures.
In system and assistant turns a tag is plain text. `<video>` tags likewise, in turns that hold videos.

A video part may say which frames are to be taken: fields of `chiasm.media.frames.FrameSampling` beside its source,
{"type": "video", "video": "a.mp4", "clip": [2, 8], "frames": 16}, or beside the url in {"video_url": {"url", …}}. They
win over what the layout does by default; `fps` alone means the mode of that name. A row's `clip` is that of its video,
and its `folder_fps` the rate of a video that is a folder of frames.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from chiasm.errors import DataError
from chiasm.media.fetch import is_url
from chiasm.text.templates import ROLES

__all__ = [
    "ROW_SAMPLING",
    "SAMPLING",
    "Kind",
    "Part",
    "Record",
    "Turn",
    "from_row",
    "parse_messages",
    "spell_turn",
    "to_row",
]

Kind = Literal["text", "image", "video", "points", "box", "mask", "codes"]
KINDS: tuple[str, ...] = get_args(Kind)

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"
_TAGS = {"image": IMAGE_TAG, "video": VIDEO_TAG}
_ROLE_NAMES = {**{role: role for role in ROLES}, "developer": "system", "human": "user", "gpt": "assistant"}
_ROW_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_ROW_NAMES = {role: name for name, role in _ROW_ROLES.items()}
# Where the value of a content item may stand; "image_url" is OpenAI's spelling.
_VALUE_KEYS = {"image": ("image", "path", "url"), "video": ("video", "path", "url")}


SAMPLING = ("mode", "frames", "fps", "min_frames", "max_frames", "clip", "seed", "formula", "folder_fps")
"""Fields by which a video part says which of its frames are taken; those of `FrameSampling`."""
ROW_SAMPLING = ("clip", "folder_fps")
"""Those that an InternVL row may have beside its video: what is true of the file, not how a model looks at it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a turn. `value` is a str for text; the source (path, URL, PIL image, …) or the data otherwise.

    `sampling` are fields of a video's frame sampling (see `SAMPLING`); empty: what the layout does by default.
    """

    kind: Kind
    value: Any
    sampling: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown part kind {self.kind!r}: use one of {', '.join(KINDS)}")
        if self.kind == "text" and not isinstance(self.value, str):
            raise DataError(f"a text part must hold a str, not {type(self.value).__name__}")
        if self.sampling and self.kind != "video":
            raise DataError(
                f"{self.kind} parts have no frames to sample: leave out {', '.join(self.sampling)}"
            )
        for name in self.sampling:
            if name not in SAMPLING:
                raise DataError(f"unknown field {name!r} of a video's sampling: use {', '.join(SAMPLING)}")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role says at once. `extra` keeps fields of a data set's row that are not ours, for writing back."""

    role: str
    parts: tuple[Part, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError(f"unknown role {self.role!r}: use one of {', '.join(ROLES)}")

    @classmethod
    def of(cls, role: str, text: str, images: Iterable[Any] = ()) -> Turn:
        """A turn of pictures followed by a text."""
        return cls(role, (*(Part("image", image) for image in images), Part("text", text)))

    @property
    def text(self) -> str:
        """All text parts, joined; other parts left out."""
        return "".join(part.value for part in self.parts if part.kind == "text")

    def of_kind(self, kind: Kind) -> list[Part]:
        """The parts of one kind, in order."""
        return [part for part in self.parts if part.kind == kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One sample of a data set: a conversation and what its row says beside it.

    Attributes:
        turns: the conversation.
        tagged: write media as tags in the text. False for rows that came without any: the official rule puts their
            media in front of the first question, and writing them back leaves them as they were.
        listed: write a single picture as a list of one.
        extra: all other fields of the row (id, width, height, …), untouched.
    """

    turns: tuple[Turn, ...]
    tagged: bool = True
    listed: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self, root: str | Path) -> list[Turn]:
        """The turns with relative picture and video paths put under `root`; URLs stay as they are."""

        def place(part: Part) -> Part:
            value = part.value
            if part.kind not in _TAGS or not isinstance(value, str | Path) or is_url(str(value)):
                return part
            return Part(part.kind, str(Path(root) / value), part.sampling)

        return [Turn(turn.role, tuple(map(place, turn.parts)), turn.extra) for turn in self.turns]


# Reading messages ------------------------------------------------------------------------------------------------


def parse_messages(messages: Any, *, images: Sequence[Any] = ()) -> list[Turn]:
    """Read a conversation.

    Args:
        messages: a question (str); one message or a list of them, each a `Turn` or a dict {"role", "content"} whose
            content is a str or a list of items ({"type": "text", "text"}, {"type": "image", "image" | "path" |
            "url"}, {"type": "image_url", "image_url": url | {"url"}}, {"type": "video", …}, and points, box, mask,
            codes with a field of that name); a dict with "messages"; an InternVL row (dict with "conversations");
            or a `Record`.
        images: pictures given beside the messages. Where the user's turns without pictures have as many `<image>`
            tags, each gets what its tags ask for; else all of them come before the last user turn's parts.

    Raises:
        DataError: one line naming the index and the field; pictures but no user turn; tags that do not agree.
    """
    match messages:
        case str():
            turns = [Turn.of("user", messages)]
        case Turn():
            turns = [messages]
        case Record():
            turns = list(messages.turns)
        case Mapping() if "role" in messages:
            turns = [_read_message(messages, "messages[0]")]
        case Mapping() if "messages" in messages:
            return parse_messages(messages["messages"], images=images)
        case Mapping() if "conversations" in messages:
            turns = list(from_row(messages).turns)
        case Mapping():
            raise DataError(f"a message needs a role and a content, found only {_keys(messages)}")
        case Sequence() if not isinstance(messages, bytes | bytearray | memoryview):
            turns = [_read_message(message, f"messages[{n}]") for n, message in enumerate(messages)]
        case _:
            raise DataError(
                f"messages must be a str, a dict or a list of dicts, not {type(messages).__name__}"
            )
    if not turns:
        raise DataError("messages is empty: give at least one message")
    if images:
        turns = _with_images(turns, images)
    for n, turn in enumerate(turns):
        if turn.role == "system" and n:
            raise DataError(f"messages[{n}]: the system message must come first")
        spell_turn(turn, where=f"messages[{n}]")
    return turns


def _with_images(turns: list[Turn], images: Sequence[Any]) -> list[Turn]:
    """The turns with the pictures where they belong; see `parse_messages`."""
    users = [n for n, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        raise DataError("images were given but no message has the role user")
    asked = {n: turns[n].text.count(IMAGE_TAG) for n in users if not turns[n].of_kind("image")}
    if sum(asked.values()) != len(images):
        asked = {users[-1]: len(images)}
    left, turns = iter(images), list(turns)
    for n, count in asked.items():
        shown = tuple(Part("image", image) for image in islice(left, count))
        turns[n] = replace(turns[n], parts=(*shown, *turns[n].parts))
    return turns


def _read_message(message: Any, where: str) -> Turn:
    if isinstance(message, Turn):
        return message
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must be a dict with role and content, not {type(message).__name__}")
    for name in ("role", "content"):
        if name not in message:
            raise DataError(f"{where} has no {name!r}: found only {_keys(message)}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in _ROLE_NAMES:
        raise DataError(f"{where}.role is {role!r}: use one of {', '.join(ROLES)}")
    if isinstance(content, str):
        return Turn.of(_ROLE_NAMES[role], content)
    if not isinstance(content, list | tuple):
        raise DataError(f"{where}.content must be a str or a list, not {type(content).__name__}")
    parts = tuple(_read_part(item, f"{where}.content[{n}]") for n, item in enumerate(content))
    return Turn(_ROLE_NAMES[role], parts)


def _read_part(item: Any, where: str) -> Part:
    if isinstance(item, Part):
        return item
    if isinstance(item, str):
        return Part("text", item)
    if not isinstance(item, Mapping):
        raise DataError(f"{where} must be a dict with a type, not {type(item).__name__}")
    kind = item.get("type")
    said: Mapping[str, Any] = item
    if kind in ("image_url", "video_url"):
        name, value = kind, item.get(kind)
        if isinstance(value, Mapping):
            said = {**value, **item}
            value = value.get("url")
        kind = "image" if kind == "image_url" else "video"
    elif isinstance(kind, str) and kind in KINDS:
        name = next((key for key in _VALUE_KEYS.get(kind, (kind,)) if key in item), kind)
        value = item.get(name)
    else:
        raise DataError(f"{where}.type is {kind!r}: use one of {', '.join(KINDS)} or image_url")
    if kind == "text" and not isinstance(value, str):
        raise DataError(f"{where}.{name} must be a str, not {type(value).__name__}")
    if value is None or (kind != "text" and isinstance(value, str | bytes) and not value):
        raise DataError(f"{where}.{name} is missing or empty")
    sampling = {key: said[key] for key in SAMPLING if key in said} if kind == "video" else {}
    return Part(kind, value, sampling)  # type: ignore[arg-type]


# Pictures and tags -----------------------------------------------------------------------------------------------


def spell_turn(
    turn: Turn, *, before: int = 0, numbered: bool = True, where: str = "turn"
) -> list[str | Part]:
    """The turn in reading order: texts, and parts where something other than text stands.

    Args:
        turn: of a conversation.
        before: pictures in earlier turns, for the numbers of untagged ones.
        numbered: introduce several untagged pictures as `Image-1: ` and so on.
        where: how to call the turn in errors.

    Raises:
        DataError: tags and pictures of a user turn do not agree.
    """
    text = turn.text
    by_tag: dict[str, list[Part]] = {}
    for kind, tag in _TAGS.items():
        media = turn.of_kind(kind)  # type: ignore[arg-type]
        tags = text.count(tag)
        if turn.role != "user" or not tags or (kind == "video" and not media):
            continue
        if tags != len(media):
            more = (
                f"give {tags - len(media)} more"
                if tags > len(media)
                else "write a tag for each, or none at all"
            )
            raise DataError(f"{where} has {tags} {tag} tag(s) but {len(media)} {kind}(s): {more}")
        by_tag[tag] = media
    used = dict.fromkeys(by_tag, 0)
    untagged = 0 if IMAGE_TAG in by_tag else len(turn.of_kind("image"))
    out: list[str | Part] = []
    for part in turn.parts:
        if part.kind == "text":
            # The capturing group keeps the tags between the texts.
            pattern = "|".join(map(re.escape, by_tag))
            for piece in re.split(f"({pattern})", part.value) if by_tag else [part.value]:
                if piece in by_tag:
                    out.append(by_tag[piece][used[piece]])
                    used[piece] += 1
                elif piece:
                    out.append(piece)
        elif _TAGS.get(part.kind) in by_tag:
            continue  # stands where its tag is
        elif part.kind in _TAGS:
            if part.kind == "image":
                before += 1
                if numbered and untagged > 1:
                    out.append(f"Image-{before}: ")
            out += [part, "\n"]
        else:
            out.append(part)
    return out


# InternVL rows ---------------------------------------------------------------------------------------------------


def from_row(row: Mapping[str, Any], *, where: str = "row") -> Record:
    """Read one line of an InternVL data set: {"image": str | [str], "conversations": [{"from", "value"}], …}.

    Each human turn gets the pictures that its tags ask for. A row without tags gets them all in its first human turn,
    as the official loader does (which has this rule for one picture and refuses several; we number them).

    Args:
        row: the parsed JSON object.
        where: how to call it in errors, for instance "train.jsonl:17".

    Raises:
        DataError: malformed, or tags and pictures do not agree.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where} must be a JSON object, not {type(row).__name__}")
    talk = row.get("conversations")
    if not isinstance(talk, list) or not talk:
        raise DataError(f"{where}.conversations must be a list with at least one turn")
    said: list[tuple[str, str, dict[str, Any]]] = []
    for n, entry in enumerate(talk):
        at = f"{where}.conversations[{n}]"
        if not isinstance(entry, Mapping):
            raise DataError(f"{at} must be an object with from and value, not {type(entry).__name__}")
        role, value = entry.get("from"), entry.get("value")
        if not isinstance(role, str) or role not in _ROW_ROLES:
            raise DataError(f"{at}.from is {role!r}: use one of {', '.join(_ROW_ROLES)}")
        if role == "system" and n:
            raise DataError(f"{at}.from is 'system': a system turn must come first")
        if not isinstance(value, str):
            raise DataError(f"{at}.value must be a string, not {type(value).__name__}")
        rest = {key: entry[key] for key in entry if key not in ("from", "value")}
        said.append((_ROW_ROLES[role], value, rest))
    kind, sources, taken = _row_media(row, where)
    given = _hand_out(kind, sources, said, where)
    # Null is how writers of such rows spell "the whole video".
    facts = {name: row[name] for name in ROW_SAMPLING if kind == "video" and row.get(name) is not None}
    turns = tuple(
        Turn(role, (*(Part(kind, source, facts) for source in mine), Part("text", value)), rest)
        for (role, value, rest), mine in zip(said, given, strict=True)
    )
    for n, turn in enumerate(turns):
        spell_turn(turn, where=f"{where}.conversations[{n}]")
    return Record(
        turns=turns,
        tagged=any(mine and _TAGS[kind] in value for (_, value, _), mine in zip(said, given, strict=True)),
        listed=taken == "image" and isinstance(row["image"], list),
        extra={key: row[key] for key in row if key not in ("conversations", taken, *facts)},
    )


def _row_media(row: Mapping[str, Any], where: str) -> tuple[Literal["image", "video"], list[str], str | None]:
    """Kind and sources of a row's media and the field they are from: pictures or one video."""
    if all(row.get(kind) for kind in ("image", "video")):
        raise DataError(f"{where}: has pictures and a video, a row holds one of them; use messages")
    for kind in ("image", "video"):
        value = row.get(kind)
        if value is None or value == "" or value == []:
            continue
        if isinstance(value, str):
            return kind, [value], kind
        if kind == "video" or not isinstance(value, list):
            raise DataError(
                f"{where}.{kind} must be a string{' or a list' * (kind == 'image')}, found {value!r:.60}"
            )
        for n, source in enumerate(value):
            if not isinstance(source, str) or not source:
                raise DataError(f"{where}.{kind}[{n}] must be a path, found {source!r:.60}")
        return kind, value, kind
    return "image", [], None


def _hand_out(
    kind: Literal["image", "video"],
    sources: list[str],
    said: list[tuple[str, str, dict[str, Any]]],
    where: str,
) -> list[list[str]]:
    """Which media each turn gets."""
    tag = _TAGS[kind]
    asked = [value.count(tag) if role == "user" else 0 for role, value, _ in said]
    if sum(asked) == 0 and sources:
        first = next((n for n, (role, _, _) in enumerate(said) if role == "user"), None)
        if first is None:
            raise DataError(f"{where} has {len(sources)} {kind}(s) but no human turn to put them in")
        asked[first] = len(sources)
    if sum(asked) != len(sources):
        raise DataError(
            f"{where} has {sum(asked)} {tag} tag(s) in its human turns but {len(sources)} {kind}(s): "
            f"write one tag for each {kind}, or none at all"
        )
    out, at = [], 0
    for count in asked:
        out.append(list(sources[at : at + count]))
        at += count
    return out


def to_row(record: Record | Sequence[Turn], *, where: str = "record") -> dict[str, Any]:
    """Write a conversation as an InternVL row; the inverse of `from_row`.

    Raises:
        DataError: what the format cannot hold: media in other than user turns, media without a path, pictures together
            with a video, several videos, other sampling than `clip` and `folder_fps`, other parts than text, image,
            video.
    """
    if not isinstance(record, Record):
        record = Record(turns=tuple(record))
    sources: dict[str, list[str]] = {"image": [], "video": []}
    facts: dict[str, Any] = {}
    talk: list[dict[str, Any]] = []
    seen = 0
    for n, turn in enumerate(record.turns):
        at = f"{where}.turns[{n}]"
        spelled = spell_turn(turn, before=seen, where=at)
        seen += len(turn.of_kind("image"))
        for part in spelled:
            if not isinstance(part, Part):
                continue
            if part.kind not in sources or turn.role != "user":
                raise DataError(f"{at}: a row cannot hold {part.kind} parts in {turn.role} turns")
            if not isinstance(part.value, str | Path):
                raise DataError(
                    f"{at}: a row holds paths, not {type(part.value).__name__}: save the {part.kind} first"
                )
            sources[part.kind].append(str(part.value))
            if set(part.sampling) - set(ROW_SAMPLING):
                raise DataError(
                    f"{at}: a row holds the clip and folder_fps of a video, no other sampling: leave that out"
                )
            facts |= part.sampling
        marked = "".join(_TAGS[p.kind] if isinstance(p, Part) else p for p in spelled)
        value = marked if record.tagged else turn.text
        talk.append({"from": _ROW_NAMES[turn.role], "value": value, **turn.extra})
    if len(sources["video"]) > 1 or (sources["video"] and sources["image"]):
        raise DataError(f"{where}: a row holds either pictures or one video")
    row = dict(record.extra)
    if sources["image"]:
        one = len(sources["image"]) == 1 and not record.listed
        row["image"] = sources["image"][0] if one else sources["image"]
    elif sources["video"]:
        row["video"] = sources["video"][0]
        row |= {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}
    row["conversations"] = talk
    return row


def _keys(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, mapping)) or "no fields"
