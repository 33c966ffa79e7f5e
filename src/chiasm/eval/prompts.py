"""How benchmarks ask: prompts with names and versions, direct and step by step.

Source: fact sheet InternVL 2.5, section 5. Instructions marked "release" are the literal strings that published numbers
were made with; those marked "own" are ours, where the release only says what its prompt asks for, so numbers made with
them are comparable among themselves.

A template holds {question}, {options}, {hint} and {ref}; a field that is empty leaves its line out. Whoever changes a
template raises its version: manifests carry both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from chiasm.errors import ConfigError, UsageError

__all__ = ["PROMPTS", "Prompt", "get_prompt"]

_FIELDS = ("question", "options", "hint", "ref")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A template of questions.

    Attributes:
        name: by which it is asked for.
        version: raised with every change.
        template: text with {question}, {options}, {hint}, {ref}.
        source: "release" for literal strings, "own" for our words.
        option: how an option is written, with {letter} and {text}.
        reasons: the reply is a chain of thought that ends with a declared answer.
    """

    name: str
    version: int = 1
    template: str
    source: Literal["release", "own"] = "own"
    option: str = "{letter}. {text}"
    reasons: bool = False

    def __post_init__(self) -> None:
        if (
            "{question}" not in self.template
            and "{ref}" not in self.template
            and not self.name.startswith("caption")
        ):
            raise ConfigError(f"prompt {self.name} asks nothing: put {{question}} into its template")

    @property
    def instruction(self) -> str:
        """What the template says behind its last field: the part that some files hold in their questions already."""
        return self.template.rpartition("}")[2].strip()

    def render(self, question: str = "", *, options: Mapping[str, str] | None = None, hint: str = "") -> str:
        """The text that is asked; braces in the question stay as they are.

        A question that holds the instruction already (LLaVA's files do) is asked without saying it twice.
        """
        shown = "\n".join(
            self.option.replace("{letter}", letter).replace("{text}", text)
            for letter, text in (options or {}).items()
        )
        values = {
            "question": question.strip(),
            "options": shown,
            "hint": hint.strip(),
            "ref": question.strip(),
        }
        template = self.template
        if self.instruction and self.instruction in question:
            template = template[: template.rindex(self.instruction)].rstrip()
        lines = []
        for line in template.split("\n"):
            names = [name for name in _FIELDS if f"{{{name}}}" in line]
            if names and not any(values[name] for name in names):
                continue
            lines.append(_fill(line, values))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For manifests."""
        return {"name": self.name, "version": self.version, "template": self.template, "option": self.option}


def _fill(line: str, values: Mapping[str, str]) -> str:
    """Put the fields in from left to right, never into what was put in."""
    out = ""
    while line:
        at = {name: line.find(f"{{{name}}}") for name in _FIELDS if f"{{{name}}}" in line}
        if not at:
            return out + line
        name = min(at, key=lambda field: at[field])
        out += line[: at[name]] + values[name]
        line = line[at[name] + len(name) + 2 :]
    return out


_LETTER = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."
_STEPS = "Work through it step by step, without saying the same thing twice. Then write one last line: "

_ALL = (
    Prompt(name="plain", template="{question}\n{options}", source="release"),
    Prompt(name="short", template="{question} " + _SHORT, source="release"),
    Prompt(
        name="vizwiz",
        template="{question} When the provided information is insufficient, respond with 'Unanswerable'. "
        + _SHORT,
        source="release",
    ),
    Prompt(name="choice", template="{hint}\n{question}\n{options}\n" + _LETTER, source="release"),
    Prompt(
        name="choice_zh", template="{hint}\n{question}\n{options}\n请直接回答选项字母。", source="release"
    ),
    Prompt(name="yes_no", template="{question} Please answer yes or no.", source="own"),
    Prompt(
        name="caption", template="Provide a one-sentence caption for the provided image.", source="release"
    ),
    Prompt(
        name="grounding",
        template="Please provide the bounding box coordinate of the region this sentence describes: <ref>{ref}</ref>",
        source="release",
    ),
    Prompt(
        name="mvbench",
        template="Watch the whole video: what happens, in which order and why, how things move and what people do. "
        "Then choose the option that answers the question best.\nQuestion: {question}\nOptions:\n{options}\n"
        "Only give the best option.",
        option="({letter}) {text}",
    ),
    Prompt(
        name="choice_subtitles",
        template="Subtitles of the video: {hint}\n{question}\n{options}\n" + _LETTER,
    ),
    Prompt(
        name="choice_vision",
        template="{question}\nThe picture shows a question and its options. "
        "Answer with the letter of the right option and nothing else.",
    ),
    # Step by step. What a reply must end with is what `metrics.extract` looks for.
    Prompt(
        name="cot_choice",
        template="{hint}\n{question}\n{options}\n"
        + _STEPS
        + "Final answer: the letter of the right option alone.",
        reasons=True,
    ),
    Prompt(
        name="cot_choice_subtitles",
        template="Subtitles of the video: {hint}\n{question}\n{options}\n"
        + _STEPS
        + "Final answer: the letter of the right option alone.",
        reasons=True,
    ),
    Prompt(
        name="cot_short",
        template="{hint}\n{question}\n" + _STEPS + "Final answer: a single word, number or short phrase.",
        reasons=True,
    ),
    Prompt(name="cot_yes_no", template="{question}\n" + _STEPS + "Final answer: yes or no.", reasons=True),
    Prompt(
        name="cot_letter_line",
        template="{hint}\n{question}\n{options}\n"
        "Think step by step first. The last line must read 'Answer: X', with the letter of an option for X.",
        reasons=True,
    ),
    Prompt(
        name="cot_letter_line_vision",
        template="{question}\nThe picture shows a question and its options. Write the question down, then think step "
        "by step. The last line must read 'Answer: X', with the letter of an option for X.",
        reasons=True,
    ),
    Prompt(
        name="cot_boxed",
        template="{hint}\n{question}\n{options}\nReason step by step, and do not go round in circles. "
        "End with one line 'Answer: \\boxed{…}' that holds the answer alone: for options its letter.",
        reasons=True,
    ),
)

PROMPTS: dict[str, Prompt] = {prompt.name: prompt for prompt in _ALL}


def get_prompt(name: str) -> Prompt:
    """A prompt by name; UsageError names the others."""
    if name not in PROMPTS:
        raise UsageError(f"prompt {name!r} is unknown: choose among {', '.join(PROMPTS)}")
    return PROMPTS[name]
