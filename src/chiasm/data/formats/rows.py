"""Kinds of rows: what a parsed row of a public data set says, as a `Record`.

InternVL and LLaVA rows are ``chiasm.data.message.from_row``'s. The others are told apart by their fields:

- ``messages``: {"messages": [{"role", "content": str | [items]}], "images": […], "videos": […]} (or "video" with
  "clip"); an item {"type": "image"} without a source takes the next of ``images``; videos go to their tags. A bare list
  of messages is a row too.
- ``sharegpt``: {"conversations": [{"from" | "role", "value" | "content"}], "images": […], "videos": […], "system"}.
- ``pairs``: {"texts": [{"user", "assistant"}], "images": […]}, as FineVision has it.
- ``caption``: {"caption" | "text", "images": […]}: the answer to a question that the data set's spec gives. Without a
  picture there is nothing to ask about: refused.

Pictures may be paths, URLs, bytes, or structs {"bytes", "path"}, alone or in lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from chiasm.data.message import ROW_SAMPLING, Part, Record, Turn, from_row, parse_messages
from chiasm.errors import DataError

__all__ = ["Kind", "guess", "read_row"]

Kind = Literal["internvl", "messages", "sharegpt", "pairs", "caption"]
"""Kinds of rows; LLaVA's are InternVL's."""

_IMAGE_FIELDS = ("image", "images")
_SOUND_FIELDS = ("audio", "audios")
_ROLES = {"user": "human", "assistant": "gpt", "human": "human", "gpt": "gpt", "system": "system"}
_MESSAGE_FIELDS = ("role", "content")
_TOKEN = "\x00picture "


def guess(row: Any, where: str) -> Kind:
    """The kind of a row, by its fields.

    Raises:
        DataError: it is none of the known ones.
    """
    if isinstance(row, list) and row and all(isinstance(entry, Mapping) and "role" in entry for entry in row):
        return "messages"
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: must be a JSON object, not {_type(row)}")
    if row.get("messages") is not None:
        return "messages"
    if row.get("conversations") is not None:
        talk = row["conversations"]
        first = talk[0] if isinstance(talk, list) and talk and isinstance(talk[0], Mapping) else {}
        other = "role" in first or "content" in first
        # InternVL rows have "image" and "video"; the plural and a system prompt beside are ShareGPT's.
        return (
            "sharegpt" if other or any(row.get(key) for key in ("images", "videos", "system")) else "internvl"
        )
    if row.get("texts") is not None:
        return "pairs"
    if any(isinstance(row.get(key), str) for key in ("caption", "text")):
        return "caption"
    raise DataError(
        f"{where}: has no messages, conversations, texts or caption: found only "
        + (", ".join(map(repr, list(row)[:12])) or "no fields")
    )


def read_row(row: Any, kind: Kind | None, where: str, *, question: str = "") -> Record:
    """One row as a record; media stay as the row names them.

    Args:
        row: parsed JSON, or what a parquet row or the members of a tar sample were put together to.
        kind: of the row; None: told from its fields.
        where: how errors name it; each begins with it.
        question: asked of a row that is a caption only.

    Raises:
        DataError: malformed.
    """
    if kind is None:
        kind = guess(row, where)
    if kind == "messages" and isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: must be a JSON object, not {_type(row)}")
    # The common case costs nothing more: rows whose pictures are paths.
    talk = row.get("conversations")
    if kind == "internvl" and "images" not in row and _plain(row.get("image")) and not isinstance(talk, str):
        return from_row(row, where=where)
    pictures = list(_pictures(row, where))
    rest = {key: value for key, value in row.items() if key not in _IMAGE_FIELDS}
    for key in _SOUND_FIELDS:
        if row.get(key):
            raise DataError(f"{where}.{key}: sound cannot be read; leave such rows out")
    match kind:
        case "internvl":
            listed = row.get("images") is not None or isinstance(row.get("image"), list)
            record = _internvl(_decoded(rest, "conversations", where), pictures, where)
            return replace(record, listed=bool(pictures) and listed)
        case "messages":
            return _messages(_decoded(rest, "messages", where), pictures, where)
        case "sharegpt":
            return _sharegpt(_decoded(rest, "conversations", where), pictures, where)
        case "pairs":
            return _pairs(rest, pictures, where)
        case "caption":
            return _caption(rest, pictures, where, question)


def _internvl(row: Mapping[str, Any], pictures: Sequence[Any], where: str) -> Record:
    """`from_row` over pictures of any sort: it sees names, which are then replaced."""
    names = [f"{_TOKEN}{n}" for n in range(len(pictures))]
    record = from_row({**row, "image": names} if names else row, where=where)
    if not names:
        return record
    sources = dict(zip(names, pictures, strict=True))
    turns = tuple(
        replace(
            turn,
            parts=tuple(
                Part("image", sources[part.value]) if part.kind == "image" else part for part in turn.parts
            ),
        )
        for turn in record.turns
    )
    return replace(record, turns=turns, listed=True)


def _sharegpt(row: Mapping[str, Any], pictures: Sequence[Any], where: str) -> Record:
    talk = row.get("conversations")
    if not isinstance(talk, list) or not talk:
        raise DataError(f"{where}.conversations must be a list with at least one turn")
    said: list[dict[str, Any]] = []
    for n, entry in enumerate(talk):
        at = f"{where}.conversations[{n}]"
        if not isinstance(entry, Mapping):
            raise DataError(f"{at} must be an object with from and value, not {_type(entry)}")
        role = entry.get("from", entry.get("role"))
        if not isinstance(role, str) or role not in _ROLES:
            raise DataError(f"{at}.from is {role!r}: use one of {', '.join(_ROLES)}")
        rest = {key: entry[key] for key in entry if key not in ("from", "role", "value", "content")}
        said.append({"from": _ROLES[role], "value": entry.get("value", entry.get("content")), **rest})
    system, videos = row.get("system"), row.get("videos")
    if system:
        if not isinstance(system, str):
            raise DataError(f"{where}.system must be a string, not {_type(system)}")
        if said[0]["from"] == "system":
            raise DataError(f"{where}: has a system prompt beside its turns and one in them; keep one")
        said.insert(0, {"from": "system", "value": system})
    taken = ("conversations", "videos", *(["system"] if isinstance(system, str) else []))
    new: dict[str, Any] = {key: value for key, value in row.items() if key not in taken}
    if videos:
        if isinstance(videos, list) and len(videos) > 1:
            raise DataError(
                f"{where}.videos: holds {len(videos)} videos, a conversation of turns one; use messages"
            )
        new["video"] = videos[0] if isinstance(videos, list) else videos
    return _internvl({**new, "conversations": said}, pictures, where)


def _messages(row: Mapping[str, Any], pictures: Sequence[Any], where: str) -> Record:
    talk = row.get("messages")
    if not isinstance(talk, list) or not talk:
        raise DataError(f"{where}.messages must be a list with at least one message")
    left = iter(pictures)
    filled: list[Any] = []
    extras: list[dict[str, Any]] = []
    placeholders = 0
    for message in talk:
        extra: dict[str, Any] = {}
        if isinstance(message, Mapping):
            content = message.get("content")
            if isinstance(content, list):
                content = [_filled(item, left) for item in content]
                placeholders += sum(
                    new is not old for new, old in zip(content, message["content"], strict=True)
                )
            elif content is None:  # a turn that only calls tools
                content = ""
            extra = {key: message[key] for key in message if key not in _MESSAGE_FIELDS}
            message = {key: message[key] for key in _MESSAGE_FIELDS if key in message}
            if "content" in message:
                message["content"] = content
        filled.append(message)
        extras.append(extra)
    unused = list(left)
    if placeholders and unused:
        raise DataError(
            f"{where}: has {len(pictures)} images but {placeholders} image items; give as many of both"
        )
    try:
        turns = parse_messages(filled, images=unused)
    except DataError as error:
        said = str(error)
        raise DataError(f"{where}.{said}" if said.startswith("messages[") else f"{where}: {said}") from error
    turns = [replace(turn, extra=extra) for turn, extra in zip(turns, extras, strict=True)]
    # One video stands beside messages as it does beside conversations, with its clip and rate.
    name = next((key for key in ("videos", "video") if row.get(key)), None)
    taken = {"messages"} if name is None else {"messages", name}
    if name is not None:
        videos = row[name] if isinstance(row[name], list) else [row[name]]
        facts = {key: row[key] for key in ROW_SAMPLING if name == "video" and row.get(key) is not None}
        turns = _with_videos(turns, videos, facts, f"{where}.{name}")
        taken |= facts.keys()
    return Record(
        turns=tuple(turns),
        tagged=any("<image>" in turn.text or "<video>" in turn.text for turn in turns if turn.role == "user"),
        listed=len(pictures) > 0,
        extra={key: value for key, value in row.items() if key not in taken},
    )


def _with_videos(
    turns: list[Turn], videos: Sequence[Any], sampling: Mapping[str, Any], where: str
) -> list[Turn]:
    """The turns with the videos that stand beside them, by the tags of the user's turns that have none."""
    asked = [
        turn.text.count("<video>") if turn.role == "user" and not turn.of_kind("video") else 0
        for turn in turns
    ]
    if sum(asked) != len(videos):
        raise DataError(
            f"{where.rpartition('.')[0]}: has {sum(asked)} <video> tag(s) but {len(videos)} videos; "
            "write a tag for each"
        )
    for n, video in enumerate(videos):
        if not isinstance(video, str) or not video:
            raise DataError(f"{where}[{n}] must be a path, found {video!r:.60}")
    left = iter(videos)
    return [
        replace(turn, parts=(*(Part("video", next(left), sampling) for _ in range(count)), *turn.parts))
        for turn, count in zip(turns, asked, strict=True)
    ]


def _filled(item: Any, left: Iterator[Any]) -> Any:
    """An image item without a source, with the next picture; anything else as it is."""
    if not isinstance(item, Mapping) or item.get("type") != "image":
        return item
    value = next((item[key] for key in ("image", "path", "url") if item.get(key) is not None), None)
    if value is None:
        value = next(left, None)
        return item if value is None else {"type": "image", "image": value}
    if isinstance(value, Mapping):  # a struct of parquet
        return {"type": "image", "image": _picture(value, "image")}
    return item


def _pairs(row: Mapping[str, Any], pictures: Sequence[Any], where: str) -> Record:
    texts = row.get("texts")
    if isinstance(texts, Mapping):  # a list of structs that was stored as a struct of lists
        columns = {key: value for key, value in texts.items() if isinstance(value, list)}
        texts = [dict(zip(columns, values, strict=False)) for values in zip(*columns.values(), strict=False)]
    if not isinstance(texts, list) or not texts:
        raise DataError(f"{where}.texts must be a list with at least one pair of user and assistant")
    said: list[dict[str, Any]] = []
    for n, pair in enumerate(texts):
        for key, role in (("user", "human"), ("assistant", "gpt")):
            value = pair.get(key) if isinstance(pair, Mapping) else None
            if not isinstance(value, str):
                raise DataError(f"{where}.texts[{n}] must have the strings user and assistant")
            said.append({"from": role, "value": value})
    rest = {key: value for key, value in row.items() if key not in ("texts", "conversations")}
    return _internvl({**rest, "conversations": said}, pictures, where)


def _caption(row: Mapping[str, Any], pictures: Sequence[Any], where: str, question: str) -> Record:
    key = next((key for key in ("caption", "text") if isinstance(row.get(key), str)), None)
    if key is None:
        raise DataError(f"{where}: has no caption")
    if not pictures:
        what = "a video, which conversations or messages ask for" if row.get("video") else "no picture"
        raise DataError(
            f"{where}: has a {key} and {what}: add image or images, or write text alone as messages"
        )
    turns = (Turn.of("user", question, pictures), Turn.of("assistant", row[key]))
    return Record(
        turns=turns,
        tagged=False,
        listed=len(pictures) > 1,
        extra={name: value for name, value in row.items() if name != key},
    )


def _decoded(row: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """The row; its turns parsed where a table holds them as one JSON string."""
    if not isinstance(row.get(key), str):
        return row
    try:
        return {**row, key: json.loads(row[key])}
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}.{key} is a string that is not JSON ({error.msg}); write a list of turns"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; lists in lists without end
        raise DataError(f"{where}.{key} is a string that is no usable JSON; write a list of turns") from error


def _plain(image: Any) -> bool:
    return (
        image is None
        or isinstance(image, str)
        or (isinstance(image, list) and all(type(v) is str for v in image))
    )


def _pictures(row: Mapping[str, Any], where: str) -> Iterator[Any]:
    """The pictures of a row, from ``image`` and ``images``."""
    for key in _IMAGE_FIELDS:
        value = row.get(key)
        if value is None or (isinstance(value, str | list) and not value):
            continue
        if isinstance(value, list):
            for n, entry in enumerate(value):
                yield _picture(entry, f"{where}.{key}[{n}]")
        else:
            yield _picture(value, f"{where}.{key}")


def _picture(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path", value.get("url"))
        value = data if data is not None else path
    if not isinstance(value, str | bytes) or not value:
        raise DataError(f"{where} must be a path or the bytes of a picture, found {value!r:.60}")
    return value


def _type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", type(None): "null"}
    return names.get(type(value), type(value).__name__)
