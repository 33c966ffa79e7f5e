"""The runner: asks a model the questions of a bench, parses, grades and sums up, with a manifest.

What was answered is kept (`chiasm.eval.store`) and asked again only when something changed that it depends on. Replies
are kept, not grades: a better parser scores old answers anew.

With `votes` every question is answered N times at a temperature; the score is that of the vote, and the curve of vote@k
stands in `extra["votes"]`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chiasm.data.message import Part
from chiasm.errors import ChiasmError, ConfigError, DataError, UsageError
from chiasm.eval.benchmarks.items import Item, data_hash, read_source
from chiasm.eval.benchmarks.scoring import Asked
from chiasm.eval.benchmarks.table import COT_TOKENS, Bench
from chiasm.eval.benchmarks.videos import read_subtitles, shown_at
from chiasm.eval.manifest import Manifest
from chiasm.eval.metrics.extract import EXTRACT_VERSION, checked_mode
from chiasm.eval.prompts import Prompt, get_prompt
from chiasm.eval.result import Result
from chiasm.eval.store import Store
from chiasm.eval.summary import Estimate, Row, summarise
from chiasm.eval.vote import majority, plain_reply, sample_answers, vote_curve
from chiasm.media.frames import FrameSampling
from chiasm.media.image import open_image
from chiasm.media.video import open_video

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Settings", "check_request", "messages_of", "run_bench"]

BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a bench is run.

    Attributes:
        mode: of the metrics, "chiasm" or "original".
        cot: ask for a chain of thought.
        prompt: name of another prompt than the bench's.
        votes: answers to each question; 1 is one answer.
        temperature, top_p, seed: of sampling; temperature 0 (greedy) needs votes 1.
        max_new_tokens: instead of the bench's limit.
        frames: frames of a video instead of the bench's number.
        batch: answers being written at once.
    """

    mode: str = "chiasm"
    cot: bool = False
    prompt: str | None = None
    votes: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    frames: int | None = None
    batch: int = BATCH

    def __post_init__(self) -> None:
        checked_mode(self.mode)
        if self.votes < 1 or self.batch < 1:
            raise ConfigError(f"votes {self.votes} and batch {self.batch} must be at least 1")
        if self.temperature is None:
            object.__setattr__(self, "temperature", 0.8 if self.votes > 1 else 0.0)
        if self.votes > 1 and not self.temperature:
            raise ConfigError("votes at temperature 0 are all the same answer: set a temperature above 0")
        if self.frames is not None and self.frames < 1:
            raise ConfigError(f"{self.frames} frames of a video: take at least one")
        if self.cot and self.prompt is not None:
            raise ConfigError(
                "a prompt and the bench's chain-of-thought prompt exclude each other: name one of the cot prompts"
            )


def run_bench(
    model: Any,
    bench: Bench,
    items: Sequence[Item],
    settings: Settings | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    report: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Result:
    """Ask a model the questions of a bench and score its answers.

    Args:
        model: any `Chats`, or whatever has `batch`.
        bench: a row of the table.
        items: from `read_items`; those without a right answer are refused before anything is asked.
        settings: how.
        about: facts of the model for the manifest (`chiasm.eval.families.describe`).
        environment: {"versions", …} for the manifest.
        out: folder that keeps answers; None keeps nothing.
        report: is told (part, questions done, in all).

    Raises:
        UsageError: the settings do not fit the bench.
        DataError, ImageError: an item is malformed or its picture cannot be opened; the message says where it stands.
    """
    settings = settings or Settings()
    scorer = bench.scoring
    prompts = check_request(bench, items, settings)
    frames = settings.frames or bench.frames
    spec = getattr(model, "spec", None)
    manifest = _manifest(bench, items, settings, prompts, frames, spec, about or {}, environment or {})
    orient = spec.tiles.orient if spec is not None else True
    upscale = _upscale(bench, settings)

    def conversation(n: int) -> list[dict[str, Any]]:
        return messages_of(
            items[n],
            prompts,
            frames=frames,
            folder_fps=bench.folder_fps,
            orient=orient,
            upscale=upscale,
            subtitles=bench.subtitles,
            spec=spec,
        )

    store = Store(out, {k: v for k, v in (environment or {}).items() if k in ("git", "machine", "cpu")})
    identity = manifest.identity()
    # Neither the parser nor the metric changes what is answered.
    for name in ("metric", "parser"):
        del identity[name]
    name = _part(bench, settings, frames)

    def told(done: int, total: int) -> None:
        report(name, done, total)

    replies_QN, record = _ask(model, items, conversation, settings, manifest, store, name, identity, told)
    reasons = settings.cot or prompts[0].reasons
    graded = _grade(bench, items, replies_QN, Asked(checked_mode(settings.mode), reasons), settings)
    flat = [reply for replies in replies_QN for reply in replies]
    unparsed = [item for item, row in zip(items, graded.rows, strict=True) if row.value is None]
    guessed = sum(scorer.chance(item) for item in unparsed)
    scores = summarise(graded.rows, scorer.statistic)
    if scorer.corpus is not None:
        scores = {"CIDEr-D": next(iter(scores.values()))}
    could_guess = any(scorer.chance(item) for item in items) and scorer.statistic in ("mean", "circular")
    return Result(
        manifest=manifest,
        statistic=scorer.statistic,
        unit=scorer.unit,
        scores=scores,
        rows=graded.rows,
        unparsed=len(unparsed),
        with_chance=_plain_mean(scores) + guessed / len(items) if could_guess else None,
        cut=sum(reply["finish"] == "length" for reply in flat),
        tokens={kind: sum(reply[kind] for reply in flat) for kind in ("prompt", "completion")},
        extra=graded.extra,
        record=record,
    )


def check_request(bench: Bench, items: Sequence[Item], settings: Settings) -> tuple[Prompt, Prompt]:
    """Everything that can be wrong before a model is there; returns the prompts (with options, without).

    Raises:
        UsageError: the settings do not fit the bench.
        DataError: an item that cannot be scored; the message begins with where it stands.
    """
    if settings.votes > 1 and bench.scoring.corpus is not None:
        raise UsageError(f"{bench.name}: captions cannot vote; leave --votes out")
    if settings.frames is not None and bench.frames is None and not any(item.video for item in items):
        raise UsageError(f"{bench.name} shows pictures: frames are for videos")
    if bench.subtitles and not any(item.subtitles for item in items):
        raise UsageError(
            f"{bench.name}: no subtitles are there: put them into a folder subtitle or subtitles beside the videos, or "
            f"take {bench.name.removesuffix('_subs')}"
        )
    prompts = _prompts(bench, settings)
    for item in items:
        bench.scoring.check(item)
    return prompts


def messages_of(
    item: Item,
    prompts: tuple[Prompt, Prompt],
    *,
    frames: int | None = None,
    folder_fps: float | None = None,
    orient: bool = True,
    upscale: int = 1,
    subtitles: bool = False,
    spec: Any = None,
) -> list[dict[str, Any]]:
    """The conversation that asks an item: pictures or video first, then the text.

    With `subtitles` the hint is what is said while the frames are shown that the layout `spec` (a `LayoutSpec`; None:
    the default one's sampling) takes.

    Raises:
        DataError, ImageError: a picture is missing or cannot be opened; the message begins with where the item stands.
    """
    parts: list[dict[str, Any]] = []
    for n, source in enumerate(item.images):
        picture = _open(item, source, orient)
        if n == 0 and upscale > 1:
            from PIL import Image as pil

            size = (picture.width * upscale, picture.height * upscale)
            picture = picture.resize(size, pil.Resampling.BILINEAR)
        parts.append({"type": "image", "image": picture})
    if item.video is not None:
        if not Path(item.video).exists():
            raise DataError(
                f"{item.where}: there is no video {item.video}: give the folder of videos with --images"
            )
        part: dict[str, Any] = {"type": "video", "video": item.video}
        if frames is not None:
            part |= {"mode": "middle", "frames": frames}
        if item.clip is not None:
            part["clip"] = list(item.clip)
        if folder_fps is not None and Path(item.video).is_dir():
            part["folder_fps"] = folder_fps
        parts.append(part)
    prompt = prompts[0] if item.options else prompts[1]
    options = {} if _shown(item) else item.options
    hint = (
        _said(item, parts[-1], spec) if subtitles and item.subtitles and item.video is not None else item.hint
    )
    text = prompt.render(item.question, options=options, hint=hint)
    if text.count("<image>") not in (0, len(item.images)):
        text = text.replace("<image>", "")
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# --- steps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Graded:
    rows: list[Row]
    extra: dict[str, Any]


def _ask(
    model: Any,
    items: Sequence[Item],
    conversation: Callable[[int], Any],
    settings: Settings,
    manifest: Manifest,
    store: Store,
    name: str,
    identity: Mapping[str, Any],
    report: Callable[[int, int], None],
) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    options: dict[str, Any] = {
        "max_new_tokens": manifest.decoding["max_new_tokens"],
        "temperature": settings.temperature,
    }
    if settings.temperature:
        return sample_answers(
            model,
            conversation,
            [item.key for item in items],
            settings.votes,
            options=options | {"top_p": settings.top_p},
            seed=settings.seed,
            store=store,
            name=name,
            identity=identity,
            batch=settings.batch,
            report=report,
        )

    def work(first: int, last: int) -> list[list[dict[str, Any]]]:
        replies = model.batch([conversation(n) for n in range(first, last)], **options)
        return [[plain_reply(reply)] for reply in replies]

    return store.run(name, identity, len(items), work, batch=settings.batch, report=report)


def _grade(
    bench: Bench,
    items: Sequence[Item],
    replies_QN: list[list[dict[str, Any]]],
    asked: Asked,
    settings: Settings,
) -> _Graded:
    scorer = bench.scoring
    if scorer.corpus is not None:
        grades, extra = scorer.corpus([replies[0]["text"] for replies in replies_QN], items)
        values = [
            scorer.parse(replies[0]["text"], item, asked)
            for replies, item in zip(replies_QN, items, strict=True)
        ]
        rows = [_row(bench, item, v, g) for item, v, g in zip(items, values, grades, strict=True)]
        return _Graded(rows, {"captions": extra})
    values_QN = [
        [scorer.parse(reply["text"], item, asked) for reply in replies]
        for replies, item in zip(replies_QN, items, strict=True)
    ]
    grades_QN = [
        [0.0 if value is None else scorer.grade(value, item, asked) for value in values]
        for values, item in zip(values_QN, items, strict=True)
    ]
    ballots_QN = [[None if v is None else scorer.key(v) for v in values] for values in values_QN]
    rows = []
    for item, values, grades, ballots in zip(items, values_QN, grades_QN, ballots_QN, strict=True):
        winner = majority(ballots)
        rows.append(
            _row(bench, item, None, 0.0)
            if winner is None
            else _row(bench, item, values[winner], grades[winner])
        )
    extra: dict[str, Any] = {}
    if settings.votes > 1:
        tokens_QN = [[reply["completion"] for reply in replies] for replies in replies_QN]
        groups = [row.group for row in rows]
        curve = vote_curve(ballots_QN, grades_QN, tokens_QN, groups, seed=settings.seed)
        extra["votes"] = [point.to_dict() for point in curve]
        extra["unparsed_samples"] = sum(ballot is None for ballots in ballots_QN for ballot in ballots)
    return _Graded(rows, extra)


def _row(bench: Bench, item: Item, value: Any, grade: float) -> Row:
    label = item.answers[0].strip().lower().rstrip(".") if item.answers else ""
    if bench.scorer in ("pope", "mme", "hallusion"):
        label = {"1": "yes", "0": "no", "true": "yes", "false": "no"}.get(label, label)
    return Row(
        key=item.key,
        group=item.group or item.key,
        grade=float(grade),
        category=item.category,
        value=list(value) if isinstance(value, tuple) else value,
        label=label if bench.scorer in ("pope", "mme", "hallusion") else item.letter,
        chance=bench.scoring.chance(item),
        units=_units(bench, item),
    )


def _units(bench: Bench, item: Item) -> dict[str, str]:
    """Other questions that must be right with this one."""
    if bench.scorer == "circular":
        # VLMEvalKit numbers the rotations of question n as n, n + 1000000, n + 2000000, …
        head, slash, number = item.key.rpartition("/")  # of a folder, keys begin with the file's name
        return {"circle": f"{head}{slash}{int(number) % 1_000_000}" if number.isdecimal() else item.key}
    if bench.scorer == "hallusion":
        kind = item.facts.get("l2-category") or f"{item.category}_{item.facts.get('subcategory', '')}"
        parts = item.key.split("_")
        ids = [item.facts.get(name) for name in ("set_id", "figure_id", "question_id")]
        if ids[0] is None and len(parts) >= 6:  # VLMEvalKit puts them into the index
            ids = list(parts[3:6])
        if ids[0] is None or ids[1] is None:
            return {}
        question = ids[2] if ids[2] is not None else item.key
        return {"figure": f"{kind}_{ids[0]}_{ids[1]}", "question": f"{kind}_{ids[0]}_{question}"}
    return {}


def _prompts(bench: Bench, settings: Settings) -> tuple[Prompt, Prompt]:
    if settings.prompt is not None:
        one = get_prompt(settings.prompt)
        return one, one
    return bench.prompts(cot=settings.cot)


def _manifest(
    bench: Bench,
    items: Sequence[Item],
    settings: Settings,
    prompts: tuple[Prompt, Prompt],
    frames: int | None,
    spec: Any,
    about: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Manifest:
    reasons = settings.cot or prompts[0].reasons
    limit = settings.max_new_tokens or (COT_TOKENS if reasons else bench.max_new_tokens)
    decoding: dict[str, Any] = {"kind": "greedy", "max_new_tokens": limit}
    if settings.temperature:
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "votes": settings.votes}
        decoding = {"kind": "sampling", "max_new_tokens": limit} | sampling
    facts = dict(about)
    tiles = dict(facts.pop("tiles", {}))
    if (upscale := _upscale(bench, settings)) > 1:  # another picture is shown: old replies must not be reused
        tiles["upscale"] = upscale
    used = [p.to_dict() for p in dict.fromkeys(prompts)]
    scorer = bench.scoring
    return Manifest(
        bench=bench.name,
        data={"hash": data_hash(items), "items": len(items), "pictures": len({item.group for item in items})},
        metric={"name": scorer.name, "statistic": scorer.statistic, "mode": settings.mode},
        parser={"mode": settings.mode, "reasons": reasons, "extract": EXTRACT_VERSION, **scorer.parts},
        prompt=used[0] if len(used) == 1 else {"options": used[0], "open": used[1]},
        tiles=tiles,
        frames=frames,
        video=_video_facts(bench, frames, items, spec),
        decoding=decoding,
        seed=settings.seed if settings.temperature else 0,
        model=facts,
        versions=dict(environment.get("versions", {})),
        environment={k: v for k, v in environment.items() if k != "versions"},
    )


def _upscale(bench: Bench, settings: Settings) -> int:
    """How much the first picture is enlarged before it is cut into tiles."""
    return bench.upscale if settings.mode == "original" else 1


def _part(bench: Bench, settings: Settings, frames: int | None) -> str:
    words = [
        bench.name,
        settings.prompt or ("cot" if settings.cot else ""),
        f"frames{frames}" if frames else "",
    ]
    words.append(
        f"votes{settings.votes}" if settings.votes > 1 else "sampled" if settings.temperature else ""
    )
    return "-".join(word for word in words if word)


def _video_facts(bench: Bench, frames: int | None, items: Sequence[Item], spec: Any) -> dict[str, Any]:
    """How videos are looked at, for the manifest, which has the number of frames beside it."""
    if not any(item.video for item in items):
        return {}
    found: dict[str, Any] = {"sampling": _sampling(frames, None, spec).mode if frames is None else "middle"}
    if spec is not None:
        per_frame = "one" if spec.frame_tiles == 1 else f"up to {spec.frame_tiles}"
        found |= {
            "formula": _sampling(frames, None, spec).formula,
            "tiles_per_frame": per_frame,
            "tokens_per_tile": spec.frame_rows,
            "frame_tags": spec.frame_spelling.before,
        }
    if bench.folder_fps is not None:
        found["folder_fps"] = bench.folder_fps
    if any(item.clip for item in items):
        found["clips"] = sum(item.clip is not None for item in items)
    if bench.subtitles:
        names = sorted({item.subtitles for item in items if item.subtitles})
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            digest.update(Path(name).read_bytes())
        found["subtitles"] = {
            "of": "frames",
            "videos": len(names),
            "without": len({item.video for item in items if not item.subtitles}),
            "hash": digest.hexdigest(),
        }
    return found


def _sampling(
    frames: int | None, clip: tuple[float, float] | None, spec: Any, folder_fps: float | None = None
) -> FrameSampling:
    """As `LayoutSpec.frame_sampling` of the part that `messages_of` writes."""
    asked: dict[str, Any] = {} if frames is None else {"mode": "middle", "frames": frames}
    if clip is not None:
        asked["clip"] = clip
    if folder_fps is not None:
        asked["folder_fps"] = folder_fps
    return FrameSampling(**asked) if spec is None else spec.frame_sampling(Part("video", "", asked))


def _said(item: Item, part: Mapping[str, Any], spec: Any) -> str:
    """The subtitles of the frames that will be taken; only time stamps of the video are read."""
    try:
        lines = read_subtitles(item.subtitles or "")
        sampling = _sampling(part.get("frames"), item.clip, spec, part.get("folder_fps"))
        with open_video(item.video or "", folder_fps=sampling.folder_fps) as video:
            times = [video.times[index] for index in video.plan(sampling)]
    except ChiasmError as error:
        raise type(error)(f"{item.where}: {error}") from error
    return shown_at(lines, times)


def _open(item: Item, source: Any, orient: bool) -> Image:
    try:
        return open_image(read_source(source, item.where), orient=orient, on_note=lambda text: None)
    except ChiasmError as error:
        text = str(error)
        raise type(error)(text if text.startswith(item.where) else f"{item.where}: {text}") from error


def _shown(item: Item) -> bool:
    """Whether the question holds its options already (MathVista's query)."""
    marked = all(
        f"({k})" in item.question or f"{k}." in item.question or f"{k}:" in item.question
        for k in item.options
    )
    return bool(item.options) and marked and all(text in item.question for text in item.options.values())


def _plain_mean(scores: Mapping[str, Estimate]) -> float:
    """The mean grade, which the second score of the circular statistic is."""
    return scores["vanilla"].value if "vanilla" in scores else next(iter(scores.values())).value
