"""The benches by name: which question field, which prompts, which scorer, how many tokens, how many frames.

Source: fact sheet InternVL 2.5, section 5 (prompts, metrics, limits of tokens). A bench is a row; a new one is a row
more.
"""

from __future__ import annotations

from dataclasses import dataclass

from chiasm.errors import ConfigError, UsageError
from chiasm.eval.benchmarks.scoring import SCORERS, Scorer
from chiasm.eval.prompts import PROMPTS, Prompt

__all__ = ["BENCHES", "COT_TOKENS", "Bench", "get_bench"]

COT_TOKENS = 4096
"""Limit of a chain of thought."""

VIDEO_FRAMES = 16
"""Frames of a video unless told otherwise: InternVL 2's number for MVBench. PVC's published numbers took 96 there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One benchmark.

    Attributes:
        name: by which it is asked for.
        title: as people write it.
        scorer: name in `SCORERS`.
        prompt: name in `PROMPTS` of questions with options, or of all.
        open_prompt: of questions without options, where there are both kinds.
        cot: prompt of a chain of thought; `open_cot` likewise.
        max_new_tokens: limit of a direct answer.
        frames: frames of a video; None where there are only pictures.
        prefer: spellings of the question's field to be looked for first.
        folder_fps: frames a second of a video that lies as a folder of frames (MVBench's from TVQA: 3); None for 1.
        subtitles: show the subtitles of the frames that are taken (those of a whole video where all are), as the hint.
        upscale: enlargement of the first picture before tiling in mode "original" (MMMU's released script).
    """

    name: str
    title: str
    scorer: str
    prompt: str
    open_prompt: str = ""
    cot: str = ""
    open_cot: str = ""
    max_new_tokens: int = 100
    frames: int | None = None
    prefer: tuple[str, ...] = ()
    folder_fps: float | None = None
    subtitles: bool = False
    upscale: int = 1

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ConfigError(f"bench {self.name}: scorer {self.scorer!r} is unknown")
        for name in (self.prompt, self.open_prompt, self.cot, self.open_cot):
            if name and name not in PROMPTS:
                raise ConfigError(f"bench {self.name}: prompt {name!r} is unknown")

    @property
    def scoring(self) -> Scorer:
        """The scorer itself."""
        return SCORERS[self.scorer]

    def prompts(self, *, cot: bool) -> tuple[Prompt, Prompt]:
        """(prompt of questions with options, of questions without).

        Raises:
            UsageError: a chain of thought where the bench has no prompt for one.
        """
        chosen, bare = (self.cot, self.open_cot) if cot else (self.prompt, self.open_prompt)
        if not chosen:
            raise UsageError(f"--cot: {self.name} has no step-by-step prompt; leave --cot out")
        return PROMPTS[chosen], PROMPTS[bare or chosen]


def _vqa(name: str, title: str, prompt: str = "short") -> Bench:
    return Bench(name=name, title=title, scorer="vqa", prompt=prompt, cot="cot_short", max_new_tokens=10)


def _document(name: str, title: str) -> Bench:
    return Bench(name=name, title=title, scorer="anls", prompt="short", cot="cot_short")


def _choice(name: str, title: str, scorer: str = "choice", prompt: str = "choice", tokens: int = 30) -> Bench:
    return Bench(
        name=name,
        title=title,
        scorer=scorer,
        prompt=prompt,
        open_prompt="short",
        cot="cot_choice",
        open_cot="cot_short",
        max_new_tokens=tokens,
    )


def _caption(name: str, title: str) -> Bench:
    return Bench(name=name, title=title, scorer="caption", prompt="caption", max_new_tokens=30)


def _video_choice(name: str, title: str, *, subtitles: bool = False) -> Bench:
    more = "_subtitles" if subtitles else ""
    return Bench(
        name=name,
        title=title,
        scorer="choice",
        prompt=f"choice{more}",
        cot=f"cot_choice{more}",
        max_new_tokens=30,
        frames=VIDEO_FRAMES,
        subtitles=subtitles,
    )


_ALL = (
    _vqa("vqav2", "VQAv2"),
    _vqa("okvqa", "OK-VQA"),
    _vqa("textvqa", "TextVQA"),
    _vqa("vizwiz", "VizWiz", "vizwiz"),
    _document("docvqa", "DocVQA"),
    _document("infovqa", "InfographicVQA"),
    Bench(name="chartqa", title="ChartQA", scorer="relaxed", prompt="short", cot="cot_short"),
    Bench(name="gqa", title="GQA", scorer="gqa", prompt="short", cot="cot_short", max_new_tokens=10),
    # The released JSONL of AI2D holds options and instruction in the question itself: then it has no options here.
    Bench(
        name="ai2d",
        title="AI2D",
        scorer="choice",
        prompt="choice",
        open_prompt="plain",
        cot="cot_choice",
        open_cot="cot_short",
        max_new_tokens=10,
    ),
    Bench(name="ocrvqa", title="OCR-VQA", scorer="match", prompt="short", cot="cot_short"),
    _choice("scienceqa", "ScienceQA"),
    Bench(
        name="mmmu",
        title="MMMU",
        scorer="mmmu",
        prompt="choice",
        open_prompt="short",
        cot="cot_choice",
        open_cot="cot_short",
        max_new_tokens=10,
        upscale=2,
    ),
    Bench(
        name="mmmu_pro",
        title="MMMU-Pro, ten options",
        scorer="mmmu",
        prompt="choice",
        cot="cot_letter_line",
        max_new_tokens=10,
    ),
    Bench(
        name="mmmu_pro_vision",
        title="MMMU-Pro, vision",
        scorer="mmmu",
        prompt="choice_vision",
        cot="cot_letter_line_vision",
        max_new_tokens=10,
    ),
    _choice("mmbench", "MMBench (every rotation of the options must be right)", "circular"),
    _choice("mmbench_cn", "MMBench, Chinese", "circular", "choice_zh"),
    _choice("mcq", "any multiple-choice file"),
    Bench(name="pope", title="POPE", scorer="pope", prompt="short", cot="cot_yes_no", max_new_tokens=100),
    Bench(name="mme", title="MME", scorer="mme", prompt="short", cot="cot_yes_no", max_new_tokens=20),
    Bench(
        name="hallusionbench",
        title="HallusionBench",
        scorer="hallusion",
        prompt="yes_no",
        cot="cot_yes_no",
        max_new_tokens=100,
    ),
    Bench(name="refcoco", title="RefCOCO, +, g", scorer="grounding", prompt="grounding", max_new_tokens=100),
    Bench(name="ocrbench", title="OCRBench", scorer="ocr", prompt="plain", max_new_tokens=200),
    Bench(
        name="mathvista",
        title="MathVista",
        scorer="mathvista",
        prompt="plain",
        cot="cot_choice",
        open_cot="cot_short",
        max_new_tokens=1024,
        prefer=("query",),  # the question with its options and the form of its answer
    ),
    Bench(
        name="mvbench",
        title="MVBench",
        scorer="choice",
        prompt="mvbench",
        cot="cot_choice",
        max_new_tokens=100,
        frames=VIDEO_FRAMES,
        folder_fps=3.0,
    ),
    _video_choice("videomme", "Video-MME, without subtitles"),
    _video_choice("videomme_subs", "Video-MME, with subtitles", subtitles=True),
    _video_choice("mlvu", "MLVU, multiple choice"),
    _video_choice("longvideobench", "LongVideoBench, without subtitles"),
    _video_choice("longvideobench_subs", "LongVideoBench, with subtitles", subtitles=True),
    _video_choice("nextqa", "NExT-QA, multiple choice"),
    _video_choice("egoschema", "EgoSchema"),
    _video_choice("perceptiontest", "Perception Test, multiple choice"),
    # Published numbers are a language model's judgement of the replies; these are equal texts.
    Bench(
        name="activitynetqa",
        title="ActivityNet-QA (equal texts, no judge)",
        scorer="match",
        prompt="short",
        cot="cot_short",
        frames=VIDEO_FRAMES,
    ),
    _video_choice("video_mcq", "any multiple-choice file about videos"),
    _caption("coco_caption", "COCO captions"),
    _caption("flickr30k", "Flickr30k captions"),
)

BENCHES: dict[str, Bench] = {bench.name: bench for bench in _ALL}


def get_bench(name: str) -> Bench:
    """A bench by name; UsageError suggests the nearest."""
    if name not in BENCHES:
        from difflib import get_close_matches

        near = get_close_matches(name.lower().replace("-", "_"), BENCHES, 1, 0.4)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"bench {name!r} is unknown: {meant}there are {', '.join(BENCHES)}")
    return BENCHES[name]
