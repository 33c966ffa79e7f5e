"""The linter's rules for single rows: small functions with a code, a severity and a remedy.

Severities: an `error` is what training would refuse, or what certainly teaches something wrong; a `warning` is probably
wrong; a `note` should be known. A rule yields one message for each thing it finds; the message says what and where in
the row (turn, picture), the rule itself carries the remedy. Here are the rules for the row and its length; those for
texts, media, boxes and whole sets are in the modules beside this one. All are in `RULES`.

Codes: C0 the row, C1 the text, C2 pictures and videos, C3 boxes, C4 length, C5 duplicates and leaks, C6 learning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from chiasm.data.layout import LayoutSpec
from chiasm.data.lint.sample import Sample

__all__ = ["ROW_CHECKS", "RULES", "Context", "Rule", "Severity", "declare", "rule"]

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a rule is called, what it finds and what is to be done.

    Attributes:
        code: "C101".
        name: in words, with hyphens.
        severity: error, warning or note.
        says: what it finds.
        example: a row's piece that it finds.
        remedy: what to do.
    """

    code: str
    name: str
    severity: Severity
    says: str
    example: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What the rules know beside the row.

    Attributes:
        spec: how training lays out the row's set.
        pack_tiles: most tiles of one pack, None if not asked for.
    """

    spec: LayoutSpec
    pack_tiles: int | None = None


RowCheck = Callable[[Sample, Context], Iterator[str]]
RULES: dict[str, Rule] = {}
"""All rules by code, of rows, boxes and sets, in order of their codes once all modules are loaded."""
ROW_CHECKS: dict[str, RowCheck] = {}
"""Code -> function, of the rules that look at one row."""


def declare(code: str, name: str, severity: Severity, *, says: str, example: str, remedy: str) -> Rule:
    """Enter a rule without a function of its own."""
    made = Rule(code=code, name=name, severity=severity, says=says, example=example, remedy=remedy)
    if code in RULES:
        raise ValueError(f"rule {code} is declared twice")
    RULES[code] = made
    return made


def rule(
    code: str, name: str, severity: Severity, *, says: str, example: str, remedy: str
) -> Callable[[RowCheck], RowCheck]:
    """Enter a function as the rule of one row."""
    declare(code, name, severity, says=says, example=example, remedy=remedy)

    def enter(check: RowCheck) -> RowCheck:
        ROW_CHECKS[code] = check
        return check

    return enter


# C0: the row -----------------------------------------------------------------------------------------------------

# In the words of chiasm.data.message, which a test holds together with these.
_TAG_COUNT = re.compile(r"<(?:image|video)> tag\(s\)")
_SYSTEM_FIRST = re.compile(r"system (?:message|turn) must come first")


def _broken(sample: Sample) -> str:
    return sample.unreadable or sample.malformed


@rule(
    "C001",
    "unreadable-row",
    "error",
    says="the row is not JSON, lacks a field or has one of the wrong type",
    example='{"image": "a.png", "conversation": [...]}',
    remedy="correct the row; chiasm data convert reads LLaVA, ShareGPT and OpenAI files",
)
def unreadable(sample: Sample, _: Context) -> Iterator[str]:
    """The reader's own line."""
    said = _broken(sample)
    if said and not _TAG_COUNT.search(said) and not _SYSTEM_FIRST.search(said):
        yield said


@rule(
    "C002",
    "media-count",
    "error",
    says="`<image>` or `<video>` tags and pictures or videos do not agree in number",
    example='"image": "a.png" with "<image> or <image>?"',
    remedy="write one tag for each picture, or none at all",
)
def media_count(sample: Sample, _: Context) -> Iterator[str]:
    """Of a turn, or of a whole row."""
    if _TAG_COUNT.search(_broken(sample)):
        yield _broken(sample)


@rule(
    "C003",
    "system-not-first",
    "error",
    says="a system turn stands behind another turn",
    example='[{"from": "human"}, {"from": "system"}]',
    remedy="move the system turn to the front, or into the question",
)
def system_not_first(sample: Sample, _: Context) -> Iterator[str]:
    """No template has a place for it."""
    if _SYSTEM_FIRST.search(_broken(sample)):
        yield _broken(sample)


@rule(
    "C004",
    "turn-order",
    "warning",
    says="questions and answers do not take turns: an answer first, two of a kind in a row, a question at the end",
    example='[{"from": "gpt"}, {"from": "human"}]',
    remedy="join or remove turns; a question at the end is read and never answered",
)
def turn_order(sample: Sample, _: Context) -> Iterator[str]:
    """They train, but no chat ever looks like this."""
    roles = [turn.role for turn in sample.turns if turn.role != "system"]
    offset = len(sample.turns) - len(roles)
    if roles and roles[0] == "assistant":
        yield f"turn {offset}: the conversation begins with an answer"
    for n in range(1, len(roles)):
        if roles[n] == roles[n - 1]:
            yield f"turn {offset + n}: a second {roles[n]} turn in a row"
            break
    if "assistant" in roles and roles[-1] == "user":
        yield f"turn {offset + len(roles) - 1}: the last question has no answer"


@rule(
    "C005",
    "misplaced-part",
    "error",
    says="a picture or video in another than a user's turn, or a part that is no text, picture or video",
    example='{"role": "assistant", "content": [{"type": "image", ...}]}',
    remedy="put pictures into user turns and write boxes and points as text",
)
def misplaced_part(sample: Sample, _: Context) -> Iterator[str]:
    """As the layout refuses it."""
    for n, turn in enumerate(sample.turns):
        for part in turn.parts:
            if part.kind not in ("text", "image", "video"):
                yield f"turn {n}: a part of kind {part.kind} cannot be laid out"
            elif part.kind != "text" and turn.role != "user":
                yield f"turn {n}: a part of kind {part.kind} in a turn of role {turn.role}"


_LIKE_TAGS = re.compile(
    r"<(?:Image|IMAGE|img_placeholder|image_placeholder|ImageHere|image_?\d+|image>\s*</image|Video|VIDEO)>"
    r"|<\|(?:image|vision_start|image_pad|vision_end|video_pad|image_\d+)\|>|\[IMG\]|<__media__>"
)


@rule(
    "C006",
    "stray-tag",
    "warning",
    says="a media tag that stands for nothing: in an answer or system turn, without a video, or of another project",
    example='"<|image_pad|>What is this?"',
    remedy="write <image> or <video> in the question, once for each picture or video",
)
def stray_tag(sample: Sample, _: Context) -> Iterator[str]:
    """It is learned or read as plain text."""
    for n, turn in enumerate(sample.turns):
        role, text = sample.said[n][1:]
        if role != "user":
            yield from (
                f"turn {n}: {tag} in a turn of role {role} is plain text"
                for tag in ("<image>", "<video>")
                if tag in text
            )
        elif "<video>" in text and not turn.of_kind("video"):
            yield f"turn {n}: <video> without a video is plain text"
        if found := _LIKE_TAGS.search(text):
            yield f"turn {n}: {found[0]} is plain text here"


declare(
    "C007",
    "empty-set",
    "error",
    says="a set has no rows",
    example="an empty file",
    remedy="check the path, or leave the set out",
)


@rule(
    "C008",
    "refused",
    "error",
    says="training refuses the row for a reason that no other rule names",
    example="a video with fps=0",
    remedy="do what the message says",
)
def refused(sample: Sample, _: Context) -> Iterator[str]:
    """The linter drops it where another error speaks of the row already."""
    if sample.refused:
        yield sample.refused


# C4: length ------------------------------------------------------------------------------------------------------


@rule(
    "C401",
    "too-long",
    "error",
    says="more tokens than the limit (--max-length): the layout refuses it; packing refuses, truncates or splits it",
    example="9,000 tokens, limit 8,192",
    remedy="fewer tiles (max_tiles), pictures or frames, a split conversation, or a larger limit",
)
def too_long(sample: Sample, context: Context) -> Iterator[str]:
    """Says which part is to blame and what lies beyond the limit."""
    limit = context.spec.max_length
    if sample.tokens is None or limit is None or sample.tokens <= limit:
        return
    parts = sample.parts
    made = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
    over = sample.tokens - limit
    fixed = parts["system"] + parts["question"] + parts["answer"] + parts["video"]
    room = (limit - fixed) // context.spec.image_rows
    if parts["image"] and room >= len(sample.tiles):
        help_ = f"it fits with {room} tiles in all instead of {sum(sample.tiles)}"
    elif parts["image"] and limit >= parts["system"]:
        help_ = (
            f"even without its {len(sample.tiles)} picture(s) it takes {fixed:,}"
            if fixed > limit
            else (f"{len(sample.tiles)} picture(s) do not fit beside the text with a tile each")
        )
    elif (
        sample.frame_tiles
        and (frames := (limit - sample.tokens + parts["video"]) * sample.frames // parts["video"]) > 0
    ):
        # Frames that are left out take their tags with them: so many fit for certain.
        help_ = f"it fits with {frames} frames in all instead of {sample.frames}"
    else:
        help_ = f"its last {over:,} tokens do not fit"
    if sample.beyond is not None:
        lost, shown = sample.beyond
        help_ += f"; {lost:,} learned tokens lie beyond the limit"
        help_ += f", and {shown} picture(s) or frame(s)" if shown else ""
    yield f"{sample.tokens:,} tokens ({made}), {over:,} more than {limit:,}: {help_}"


@rule(
    "C402",
    "too-many-tiles",
    "error",
    says="more tiles than one pack may hold (--pack-tiles)",
    example="40 tiles, packs of 24",
    remedy="fewer tiles a sample (max_tiles of its set), fewer pictures, or larger packs",
)
def too_many_tiles(sample: Sample, context: Context) -> Iterator[str]:
    """A picture is never cut, so the sample cannot be packed whole."""
    total = sum(sample.tiles) + sample.frame_tiles
    limit = context.pack_tiles
    if limit is not None and total > limit:
        yield f"{total} tiles of {len(sample.tiles)} picture(s) and {sample.frames} frame(s), limit {limit}"


@rule(
    "C403",
    "budget-shared-out",
    "note",
    says="so many pictures that each gets a single tile, and more tiles than max_tiles in all",
    example="30 pictures with max_tiles 12",
    remedy="nothing, if that is meant; small print will not be legible",
)
def budget_shared_out(sample: Sample, context: Context) -> Iterator[str]:
    """One tile each is the least a picture takes."""
    tiles = context.spec.tiles
    if tiles.dynamic and tiles.mode != "hf" and len(sample.pictures) > tiles.max_tiles:
        yield f"{len(sample.pictures)} pictures share max_tiles {tiles.max_tiles}"


# C6: learning ----------------------------------------------------------------------------------------------------


@rule(
    "C601",
    "nothing-to-learn",
    "error",
    says="no token of the row is learned: there is no answer",
    example='[{"from": "human", "value": "What?"}]',
    remedy="add the answer or remove the row",
)
def nothing_to_learn(sample: Sample, _: Context) -> Iterator[str]:
    """The label span would be empty."""
    if sample.parts and not sample.learned:
        yield "no answer: all labels would be empty"


@rule(
    "C602",
    "empty-answer",
    "warning",
    says="an answer without text: only the end of the turn is learned",
    example='{"from": "gpt", "value": ""}',
    remedy="remove the row, unless silence is the right answer",
)
def empty_answer(sample: Sample, _: Context) -> Iterator[str]:
    """White space counts as no text."""
    for n, role, text in sample.said:
        if role == "assistant" and not text.strip():
            yield f"turn {n}: the answer is empty"
