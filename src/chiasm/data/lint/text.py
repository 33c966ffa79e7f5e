"""The linter's rules for texts: marks of templates, borders of tokens, encoding, loops.

Source: InternVL 2.5 fact sheet, sections 2.9 (templates, labels) and 3.6 (repetition).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from chiasm.data.filters import Loops, loop_share
from chiasm.data.layout import LayoutSpec
from chiasm.data.lint.rules import Context, rule
from chiasm.data.lint.sample import Sample
from chiasm.text.templates import TEMPLATES, Template

__all__ = ["markers_of"]

_TAGGED = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?[A-Za-z_][\w.-]{0,30}>:?")
_GROUNDING = re.compile(r"</?(?:ref|box|quad)>")
_MORE_FOREIGN = (
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>"),
    *("<|end_of_utterance|>", "<end_of_utterance>", "<|end_of_turn|>", "<|eom_id|>"),
)
_LINE_ROLES = re.compile(
    r"^(?:USER:|ASSISTANT:|#{2,3} ?(?:Human|Assistant|Instruction|Response):)", re.MULTILINE
)


def markers_of(template: Template) -> frozenset[str]:
    """The marks of turns that a template writes, as `<|im_end|>`."""
    spelled = (
        *(template.system_prefix, template.system_suffix, template.user_prefix, template.user_suffix),
        *(template.assistant_prefix, template.stop, template.answer_suffix, *template.more_stops),
    )
    return frozenset(mark for text in spelled for mark in _TAGGED.findall(text)) | {template.stop}


@lru_cache(maxsize=16)
def _own_markers(spec: LayoutSpec) -> tuple[str, ...]:
    """Of the template, and all special tokens of the vocabulary that are not for pictures or boxes."""
    marks = set(markers_of(spec.template))
    backend = getattr(spec.tokenizer, "backend", None)
    if backend is not None:
        added = backend.get_added_tokens_decoder().values()
        marks |= {token.content for token in added if token.special}
    return tuple(sorted(m for m in marks if m and m not in spec.image_tokens and not _GROUNDING.fullmatch(m)))


@lru_cache(maxsize=16)
def _foreign_markers(spec: LayoutSpec) -> tuple[str, ...]:
    marks = set(_MORE_FOREIGN)
    for template in TEMPLATES.values():
        marks |= markers_of(template)
    return tuple(sorted(marks - set(_own_markers(spec))))


@lru_cache(maxsize=16)
def _any_of(marks: tuple[str, ...]) -> re.Pattern[str]:
    # Of two marks that begin alike the longer one is meant.
    return re.compile("|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True)) or r"(?!)")


@rule(
    "C101",
    "reserved-token",
    "error",
    says="a text spells a token that is reserved for pictures",
    example='"The <IMG_CONTEXT> token"',
    remedy="remove it or break it up; pictures are written <image>",
)
def reserved_token(sample: Sample, context: Context) -> Iterator[str]:
    """The layout refuses it: such rows would claim to be a picture."""
    for n, _role, text in sample.said:
        yield from (f"turn {n}: {token}" for token in context.spec.image_tokens if token in text)


@rule(
    "C102",
    "own-marker",
    "error",
    says="a text spells a mark of the template in use, or another special token of the vocabulary",
    example='"A cat.<|im_end|>"',
    remedy="remove the marks: the template writes them, and in a text they begin or end a turn",
)
def own_marker(sample: Sample, context: Context) -> Iterator[str]:
    """It becomes that very token, so it ends the turn in the middle."""
    marks = _any_of(_own_markers(context.spec))
    for n, role, text in sample.said:
        for mark in sorted(set(marks.findall(text))):
            yield f"turn {n}: {mark} inside the text of role {role}"


@rule(
    "C103",
    "foreign-marker",
    "warning",
    says="a text spells the marks of another chat template",
    example='"[INST] What is this? [/INST]"',
    remedy="remove the marks: the row was rendered for another model, or is of two turns in one",
)
def foreign_marker(sample: Sample, context: Context) -> Iterator[str]:
    """They are ordinary text here, and would be learned as such."""
    marks = _any_of(_foreign_markers(context.spec))
    for n, role, text in sample.said:
        for mark in sorted(set(marks.findall(text))):
            # "</s>" is also HTML; only where a sequence's end would stand does it mean one.
            if mark != "</s>" or text.rstrip().endswith(mark):
                yield f"turn {n}: {mark} inside the text of role {role}"
        if found := _LINE_ROLES.search(text):
            yield f"turn {n}: a line begins with {found[0]!r}, as if another turn began"


@rule(
    "C104",
    "tokens-differ",
    "note",
    says="tokenised at one go the conversation gives other tokens than turn by turn",
    example="a tokenizer that puts a blank before each stretch of text",
    remedy="nothing for training here; a server that tokenises the whole prompt will read other tokens",
)
def tokens_differ(sample: Sample, _: Context) -> Iterator[str]:
    """The recipe tokenises turn by turn, most servers do not."""
    if sample.whole_differs:
        yield "the tokens of the whole text differ from those of its turns"


@rule(
    "C105",
    "merged-border",
    "warning",
    says="an answer's first token begins in the header before it, so its beginning is not learned",
    example='"\\n\\nA cat."',
    remedy="strip white space from the beginning of answers",
)
def merged_border(sample: Sample, _: Context) -> Iterator[str]:
    """Typically newlines: the header ends in one."""
    if sample.merged:
        yield f"{sample.merged} answer(s) begin within a token of the header"


@rule(
    "C110",
    "lone-surrogate",
    "error",
    says="a text holds half of a character, which has no UTF-8 form",
    example='"\\ud83d"',
    remedy="write the file again from its source as UTF-8",
)
def lone_surrogate(sample: Sample, _: Context) -> Iterator[str]:
    """The tokenizer refuses it."""
    for n, _role, text in sample.said:
        if not text.isascii() and (bad := _SURROGATE.search(text)):
            yield f"turn {n}: lone surrogate U+{ord(bad[0]):04X}"


_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u202a-\u202e\u2066-\u2069]")


@rule(
    "C111",
    "control-character",
    "warning",
    says="control characters, a byte order mark, or marks that turn the direction of writing",
    example='"A\\x00cat"',
    remedy="remove them: the model would learn to write them",
)
def control_character(sample: Sample, _: Context) -> Iterator[str]:
    """Tab and line ends are fine."""
    for n, _role, text in sample.said:
        if found := _CONTROL.search(text):
            yield f"turn {n}: character U+{ord(found[0]):04X}"


_CP1252_HIGH = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_SUSPECT = re.compile(f"[\u00c2-\u00f4][\u0080-\u00bf{_CP1252_HIGH}]{{1,3}}")


def _repaired(piece: str) -> str | None:
    """What the piece was before its UTF-8 bytes were read as Windows-1252, None if it was not."""
    for code in ("cp1252", "latin-1"):
        try:
            return piece.encode(code).decode("utf-8")
        except UnicodeError:
            continue
    return None


@rule(
    "C112",
    "mojibake",
    "warning",
    says="text that was decoded with a wrong encoding, or replacement characters",
    example='"cafÃ©"',
    remedy="read the source again as UTF-8, or repair the text (ftfy)",
)
def mojibake(sample: Sample, _: Context) -> Iterator[str]:
    """Only what turns into one proper character when it is decoded anew."""
    for n, _role, text in sample.said:
        if text.isascii():
            continue
        if "\ufffd" in text or "锟斤拷" in text:
            yield f"turn {n}: replacement character {'锟斤拷' if '锟斤拷' in text else 'U+FFFD'}"
            continue
        for found in _SUSPECT.finditer(text):
            proper = _repaired(found[0])
            if proper is not None and len(proper) == 1 and unicodedata.category(proper) != "Cc":
                yield f"turn {n}: {found[0]!r} was probably {proper!r}"
                break


# Loops

_LOOPS = Loops()


@rule(
    "C603",
    "repetition",
    "warning",
    says=f"an answer that repeats itself: over {_LOOPS.threshold:.0%} of its {_LOOPS.n}-grams of words occurred before",
    example='"the cat is on the mat and the cat is on the mat and …"',
    remedy="remove the row (chiasm data filter, rule loops): a few such rows teach endless loops",
)
def repeats(sample: Sample, _: Context) -> Iterator[str]:
    """The fact sheet's threshold (section 3.6), with a measure that sees tight loops."""
    for n, role, text in sample.said:
        if role == "assistant" and (share := loop_share(text, _LOOPS.n)) > _LOOPS.threshold:
            yield f"turn {n}: {share:.0%} of the {_LOOPS.n}-grams are repetitions"
