"""Chat templates: how a conversation is spelled for a language model.

Source: InternVL 2.5 fact sheet, section 2.9. The strings (tags, separators, default system messages) are part of the
released checkpoints: one other character and the model answers worse, so they are facts here, not choices.

`Template.render` turns (role, text) pairs into pieces that know whether a model learns them. Inference joins their
text, training tokenises the same pieces (`chiasm.text.labels`): the two can not drift apart. Pictures are not this
module's business: `chiasm.data.layout` has put their tokens into the texts before they come here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from chiasm.errors import ConfigError, TemplateError

__all__ = [
    "FRAME_TAGS",
    "ROLES",
    "TEMPLATES",
    "FrameTags",
    "Piece",
    "Template",
    "get_frame_tags",
    "get_template",
    "join",
]

ROLES = ("system", "user", "assistant")

# InternVL 2.5 and 3, in their checkpoints' conversation.py.
SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# InternVL 1.5 and 2.0; the space after the comma is theirs.
SYSTEM_2_0 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)


class KnowsIds(Protocol):
    """What a template asks of a tokenizer."""

    def token_to_id(self, token: str) -> int | None:
        """Id of one token of the vocabulary, None when there is no such token."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text that is learned (`supervised`) or only read.

    `chunk` numbers the stretches that are tokenised on their own: a chunk begins where no token can reach across.
    A chunk holds at most one answer: a supervised piece with its text, if any, and one with the stop string.
    """

    text: str
    supervised: bool
    chunk: int


@dataclass(frozen=True, slots=True)
class FrameTags:
    """How the frames of a video are spelled: `before` (with the number from 1) and the picture, for each frame.

    `closed`: a newline follows the last frame too and is part of the video, so that a newline after a `<video>` tag
    is not a second one. Otherwise newlines only join the frames.
    """

    before: str
    closed: bool = False

    def spell(self, picture: str, count: int) -> str:
        """`count` frames, each with `picture` for its image tokens."""
        return "\n".join(self.before.format(n=n + 1) + picture for n in range(count)) + "\n" * self.closed


FRAME_TAGS: dict[str, FrameTags] = {
    # The release's documentation and video benchmarks: "Frame1: <image>\n" a frame, in front of the question.
    "docs": FrameTags("Frame{n}: ", closed=True),
    # The video processor of transformers: joined in the place of the <video> tag.
    "hf": FrameTags("Frame{n}: "),
    # The release's training: with a hyphen, likewise joined.
    "training": FrameTags("Frame-{n}: "),
}
"""Spellings of frames by name. docs and hf differ only where a text goes on right after a `<video>` tag."""


def get_frame_tags(name: str) -> FrameTags:
    """The spelling of frames called `name`; ConfigError with the known names when there is none."""
    found = FRAME_TAGS.get(name)
    if found is None:
        raise ConfigError(f"unknown spelling of frames {name!r}: known are {', '.join(FRAME_TAGS)}")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """The spelling of one chat format.

    Attributes:
        name: as `config.json` has it under `template`.
        system: default system message; "" means that the template has none.
        bos: whether the text follows the tokenizer's begin token, if that tokenizer uses one.
        opening: always first, after the system block.
        system_prefix, system_suffix, user_prefix, user_suffix: around the texts of those turns.
        assistant_prefix: before an answer; it is also what a model is prompted with, so it is never learned.
        answer_prefix: between `assistant_prefix` and the answer; written by the model itself, hence learned.
        stop: ends an answer, is learned, and ends generation.
        answer_suffix: after `stop`; not learned.
        more_stops: further strings that end generation when the vocabulary has them.
        numbered: several pictures in one turn are introduced as "Image-1: ", "Image-2: ", …
        frames: how the frames of a video are spelled, a name of `FRAME_TAGS`.
        strip: texts lose outer white space in training (as the 2.0 recipe for InternLM did).
        by_exchange: question and answer are tokenised together, for formats whose turns do not begin with a token
            that cannot merge with its neighbours.
    """

    name: str
    system: str = ""
    bos: bool = True
    opening: str = ""
    system_prefix: str
    system_suffix: str
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    answer_prefix: str = ""
    stop: str
    answer_suffix: str = ""
    more_stops: tuple[str, ...] = ()
    numbered: bool = True
    frames: str = "docs"
    strip: bool = False
    by_exchange: bool = False

    def __post_init__(self) -> None:
        for field in ("name", "user_prefix", "assistant_prefix", "stop"):
            if not getattr(self, field):
                raise ConfigError(f"chat template {self.name!r}: {field} must not be empty")
        get_frame_tags(self.frames)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end generation."""
        return (self.stop, *self.more_stops)

    def stop_ids(self, tokenizer: KnowsIds) -> tuple[int, ...]:
        """Token ids that end generation: the id of `stop` and those of `more_stops` that the vocabulary has.

        Raises TemplateError when `stop` is not one token: the model could then never end an answer.
        """
        first = tokenizer.token_to_id(self.stop)
        if first is None:
            raise TemplateError(
                f"chat template {self.name!r} ends answers with {self.stop!r}, which is no token of this tokenizer: "
                "choose the template that the model was trained with"
            )
        more = (tokenizer.token_to_id(text) for text in self.more_stops)
        return (first, *(i for i in more if i is not None))

    def resolve_system(self, argument: str | None = None, checkpoint: str | None = None) -> str:
        """The system message in force: the caller's, else the checkpoint's own, else the template's.

        An empty string is a decision too: it means no system block at all.
        """
        return next(s for s in (argument, checkpoint, self.system) if s is not None)

    def render(
        self,
        turns: Iterable[tuple[str, str]],
        *,
        system: str | None = None,
        generate: bool = False,
        train: bool = False,
    ) -> list[Piece]:
        """Spell a conversation.

        Args:
            turns: (role, text) pairs; a system turn may only come first and then wins over `system`.
            system: replaces the template's default system message; "" leaves the block out.
            generate: append the header after which the model writes its answer.
            train: apply what the training recipes did to texts and inference does not (see `strip`).

        Raises:
            TemplateError: unknown role, a system turn that is not first, or nothing to say.
        """
        spoken = [(role, text.strip() if train and self.strip else text) for role, text in turns]
        for n, (role, _) in enumerate(spoken):
            if role not in ROLES:
                raise TemplateError(f"turn {n} has role {role!r}: use one of {', '.join(ROLES)}")
            if role == "system" and n:
                raise TemplateError(f"turn {n} is a system turn: the system message must come first")
        if not spoken:
            raise TemplateError("an empty conversation: give at least one message")
        pieces = _Pieces()
        if spoken[0][0] == "system":
            head: str | None = spoken.pop(0)[1]  # an explicit turn is kept even when it is empty
        else:
            head = self.resolve_system(system) or None
        block = "" if head is None else self.system_prefix + head + self.system_suffix
        pieces.add(block + self.opening)
        if not self.by_exchange:
            pieces.cut()
        for role, text in spoken:
            if role == "user":
                pieces.add(self.user_prefix + text + self.user_suffix)
            else:
                pieces.add(self.assistant_prefix)
                pieces.add(self.answer_prefix + text, supervised=True)
                pieces.add(self.stop, supervised=True)
                pieces.add(self.answer_suffix)
            if role == "assistant" or not self.by_exchange:
                pieces.cut()
        if generate:
            pieces.add(self.assistant_prefix)
        return pieces.made


class _Pieces:
    """Collects pieces and numbers their chunks."""

    def __init__(self) -> None:
        self.made: list[Piece] = []
        self._chunk = 0

    def add(self, text: str, *, supervised: bool = False) -> None:
        if text:
            self.made.append(Piece(text, supervised, self._chunk))

    def cut(self) -> None:
        self._chunk += 1


def join(pieces: Sequence[Piece]) -> str:
    """The whole text of rendered pieces."""
    return "".join(piece.text for piece in pieces)


def _chatml(name: str, *, system: str, end: str, **more: object) -> Template:
    """The family <|im_start|>role⏎text<|im_end|>; `end` is what follows the end tag."""
    return Template(
        name=name,
        system=system,
        system_prefix="<|im_start|>system\n",
        system_suffix="<|im_end|>" + end,
        user_prefix="<|im_start|>user\n",
        user_suffix="<|im_end|>" + end,
        assistant_prefix="<|im_start|>assistant\n",
        stop="<|im_end|>",
        answer_suffix=end,
        **more,  # type: ignore[arg-type]
    )


_CHATML = _chatml("chatml", system="", end="\n")

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # InternVL 2.5 and later.
        _chatml("internvl2_5", system=SYSTEM_2_5, end="\n"),
        # InternVL 2.0 on Yi and Qwen2: no newline between turns, and training puts no begin token in front.
        _chatml("Hermes-2", system=SYSTEM_2_0, end="", bos=False, more_stops=("<|endoftext|>",)),
        # InternVL 2.0 on InternLM2.
        _chatml("internlm2-chat", system=SYSTEM_2_0, end="", strip=True),
        # InternVL 2.0 4B.
        Template(
            name="phi3-chat",
            system=SYSTEM_2_0,
            system_prefix="<|system|>\n",
            system_suffix="<|end|>",
            user_prefix="<|user|>\n",
            user_suffix="<|end|>",
            assistant_prefix="<|assistant|>\n",
            stop="<|end|>",
        ),
        # InternVL 1.1. A prompt ends in "<bot>:", so the space before an answer is the model's own.
        Template(
            name="internvl_zh",
            opening=" ",
            system_prefix="",
            system_suffix="",
            user_prefix="<human>: ",
            user_suffix=" ",
            assistant_prefix="<bot>:",
            answer_prefix=" ",
            stop="</s>",
            by_exchange=True,
        ),
        # Plain ChatML with newlines, as SmolLM2 speaks it; no system message unless one is given.
        _CHATML,
        replace(_CHATML, name="chiasm-mini"),
        # The native port in transformers (-hf checkpoints): no system message, pictures are never numbered.
        replace(_CHATML, name="internvl-hf", numbered=False, frames="hf"),
    )
}


def get_template(name: str | Template) -> Template:
    """The template called `name` (a Template is returned as it is).

    Raises TemplateError with the known names when there is none.
    """
    if isinstance(name, Template):
        return name
    found = TEMPLATES.get(name)
    if found is None:
        raise TemplateError(f"unknown chat template {name!r}: known are {', '.join(sorted(TEMPLATES))}")
    return found
