"""Filters: which samples are not worth training on, said by rules, by a model's scores, and by people.

Source: InternVL 2.5, section 4.3 of the paper (fact sheet 3.6): scores of a model with a threshold, repetition, and
heuristics (abnormal sentence lengths, long runs of zeros, too many duplicate lines), the doubtful ones looked at by
people. The paper gives no numbers for the heuristics; the defaults here are ours.

A filter judges a record and says keep or not, why, and by what number. One that is not sure asks for a person: its
verdicts end in a review list, which is read back with the decisions. Filters look at what the assistant says.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from chiasm.data.datasets import Dataset
from chiasm.data.message import Record
from chiasm.errors import ConfigError, DataError

__all__ = [
    "All",
    "DuplicateLines",
    "Filter",
    "Loops",
    "ModelScore",
    "Repetition",
    "Review",
    "SentenceLength",
    "Verdict",
    "ZeroRuns",
    "judge_all",
    "loop_share",
    "ngram_repetition",
    "read_reviews",
    "read_scores",
    "record_key",
    "write_reviews",
]

Action = Literal["reject", "review"]
"""What becomes of a sample that a filter does not like."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a filter says of a sample.

    Attributes:
        keep: whether it stays; False where a person is asked.
        review: a person is to decide.
        reason: one line with the filter's name; empty if nothing was found.
        score: the number that decided, in the filter's own measure; None: there is none.
    """

    keep: bool = True
    review: bool = False
    reason: str = ""
    score: float | None = None


class Filter(Protocol):
    """Anything that judges a record by itself."""

    def judge(self, record: Record) -> Verdict:
        """Say whether the record stays."""
        ...


def _against(action: Action, reason: str, score: float) -> Verdict:
    return Verdict(keep=False, review=action == "review", reason=reason, score=score)


def _answers(record: Record) -> Iterator[str]:
    return (turn.text for turn in record.turns if turn.role == "assistant")


# Repetition ------------------------------------------------------------------------------------------------------


def ngram_repetition(text: str, n: int = 10, *, count: Literal["types", "places"] = "types") -> float:
    """How repetitive a text is, by its runs of `n` words (what white space separates).

    With N runs (one beginning at each word but the last n - 1), of which some are equal:

    - ``types``: the number of *different* runs that occur more than once, over N. This is what the release counts.
      It is at most 1/2 and reaches it where everything is said exactly twice; a sentence that is repeated a hundred
      times gives a *small* number, since its few different runs are divided by many.
    - ``places``: the number of runs that have an equal one elsewhere, over N. It goes to 1 with endless repetition.

    A text of fewer than `n` words gives 0.
    """
    words = text.split()
    total = len(words) - n + 1
    if total <= 0:
        return 0.0
    counts = Counter(tuple(words[at : at + n]) for at in range(total))
    repeated = (1 if count == "types" else number for number in counts.values() if number > 1)
    return sum(repeated) / total


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """Answers that repeat themselves: an assistant turn whose `ngram_repetition` is above the threshold.

    Attributes:
        n: words of a run.
        threshold: of the release, 0.4; for `places` a higher one is sensible.
        count: see `ngram_repetition`.
        action: what follows.
    """

    n: int = 10
    threshold: float = 0.4
    count: Literal["types", "places"] = "types"
    action: Action = "reject"

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.threshold <= 1 or self.count not in ("types", "places"):
            raise ConfigError("Repetition needs n >= 1, a threshold in 0..1 and count types or places")
        _check_action(self.action)

    def judge(self, record: Record) -> Verdict:
        """See `Filter`."""
        worst = max(
            (ngram_repetition(text, self.n, count=self.count) for text in _answers(record)), default=0.0
        )
        if worst > self.threshold:
            return _against(self.action, f"repetition: {worst:.2f} of its {self.n}-grams are repeated", worst)
        return Verdict(score=worst)


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")
_LOOP_LEAST = 30


def loop_share(text: str, n: int = 10) -> float:
    """Share of the n-grams of words (Chinese and Japanese: characters) that occurred before in the text; 0..1.

    Near 1 for a tight loop, for which `ngram_repetition` of the release is near 0. A text of fewer than 30 n-grams
    gives 0.
    """
    words = _WORD.findall(text)
    total = len(words) - n + 1
    if total < _LOOP_LEAST:
        return 0.0
    return 1 - len({hash(tuple(words[t : t + n])) for t in range(total)}) / total


@dataclass(frozen=True, slots=True, kw_only=True)
class Loops:
    """Answers that go round in circles: an assistant turn whose `loop_share` is above the threshold.

    What the linter's rule C603 finds.

    Attributes:
        n: words of a run.
        threshold: of the share.
        action: what follows.
    """

    n: int = 10
    threshold: float = 0.4
    action: Action = "review"

    def __post_init__(self) -> None:
        if self.n < 1 or not 0 <= self.threshold <= 1:
            raise ConfigError("Loops needs n >= 1 and a threshold in 0..1")
        _check_action(self.action)

    def judge(self, record: Record) -> Verdict:
        """See `Filter`."""
        worst = max((loop_share(text, self.n) for text in _answers(record)), default=0.0)
        if worst > self.threshold:
            return _against(self.action, f"loops: {worst:.2f} of its {self.n}-grams occurred before", worst)
        return Verdict(score=worst)


# Heuristics ------------------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？\n]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceLength:
    """Abnormal lengths: an empty answer, or a sentence longer than any that people write.

    A sentence ends at a full stop, question or exclamation mark before white space, at their full-width forms, and at
    the end of a line.

    Attributes:
        longest: characters of one sentence.
        shortest: characters of an answer without its outer white space.
        action: what follows.
    """

    longest: int = 2000
    shortest: int = 1
    action: Action = "review"

    def __post_init__(self) -> None:
        if self.shortest < 0 or self.longest < 1:
            raise ConfigError("SentenceLength needs shortest >= 0 and longest >= 1")
        _check_action(self.action)

    def judge(self, record: Record) -> Verdict:
        """See `Filter`."""
        longest = 0
        for text in _answers(record):
            size = len(text.strip())
            if size < self.shortest:
                return _against(self.action, f"length: an answer of {size} characters", float(size))
            longest = max(longest, *(len(piece.strip()) for piece in _SENTENCE_END.split(text)))
        if longest > self.longest:
            return _against(self.action, f"length: a sentence of {longest} characters", float(longest))
        return Verdict(score=float(longest))


_ZEROS = re.compile(r"0(?:[\s,.;]*0)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroRuns:
    """Long runs of zeros: digits 0 with nothing but white space, commas, semicolons or full stops between them.

    Attributes:
        most: zeros of one run.
        action: what follows.
    """

    most: int = 20
    action: Action = "review"

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ConfigError(f"ZeroRuns needs most >= 1, got {self.most}")
        _check_action(self.action)

    def judge(self, record: Record) -> Verdict:
        """See `Filter`."""
        runs = (run.count("0") for text in _answers(record) for run in _ZEROS.findall(text))
        longest = max(runs, default=0)
        if longest > self.most:
            return _against(self.action, f"zeros: a run of {longest}", float(longest))
        return Verdict(score=float(longest))


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicateLines:
    """Too many lines of an answer that were there before (blank lines and outer white space do not count).

    Attributes:
        share: of an answer's lines that repeat an earlier one.
        least: lines below which an answer is not looked at.
        action: what follows.
    """

    share: float = 0.5
    least: int = 6
    action: Action = "review"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.least < 1:
            raise ConfigError("DuplicateLines needs a share in 0..1 and least >= 1")
        _check_action(self.action)

    def judge(self, record: Record) -> Verdict:
        """See `Filter`."""
        worst = 0.0
        for text in _answers(record):
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if len(lines) >= self.least:
                worst = max(worst, 1 - len(set(lines)) / len(lines))
        if worst > self.share:
            return _against(self.action, f"lines: {worst:.2f} of them are duplicates", worst)
        return Verdict(score=worst)


# A model's scores ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScore:
    """What a model thinks of a sample: below its domain's threshold it is rejected (the paper: below 7 of 10).

    Attributes:
        scores: a function of the record, or scores by the record's `id`.
        thresholds: by domain; ``""`` for domains that are not named.
        domain: field of the row that names its domain, as dotted path ("meta.domain").
        id: field of the row that scores are listed by.
        missing: what happens to a record without a score.
        action: what follows.
    """

    scores: Callable[[Record], float | None] | Mapping[str, float]
    thresholds: Mapping[str, float] = field(default_factory=lambda: {"": 7.0})
    domain: str = "domain"
    id: str = "id"
    missing: Literal["keep", "reject", "review"] = "review"
    action: Action = "reject"

    def __post_init__(self) -> None:
        if not self.thresholds:
            raise ConfigError("ModelScore needs at least one threshold")
        if self.missing not in ("keep", "reject", "review"):
            raise ConfigError(f"missing must be keep, reject or review, got {self.missing!r}")
        _check_action(self.action)

    def judge(self, record: Record) -> Verdict:
        """See `Filter`.

        Raises:
            DataError: the record's domain has no threshold.
        """
        if isinstance(self.scores, Mapping):
            name = _field(record.extra, self.id)
            score = self.scores.get(str(name)) if name is not None else None
        else:
            score = self.scores(record)
        if score is None or math.isnan(score):
            if self.missing == "keep":
                return Verdict()
            return Verdict(keep=False, review=self.missing == "review", reason="score: has none")
        domain = str(_field(record.extra, self.domain) or "")
        threshold = self.thresholds.get(domain, self.thresholds.get(""))
        if threshold is None:
            raise DataError(f"no threshold for the domain {domain!r}: give one, or one for all others")
        if score < threshold:
            of = f" ({domain})" if domain else ""
            return _against(self.action, f"score: {score:g}, below {threshold:g}{of}", float(score))
        return Verdict(score=float(score))


def read_scores(path: str | Path) -> dict[str, float]:
    """Read scores by id from JSON lines {"id", "score"}.

    Raises:
        DataError: a line that is not of that form, or an id with two different scores.
    """
    found: dict[str, float] = {}
    for at, entry in _json_lines(Path(path)):
        name, score = entry.get("id"), entry.get("score")
        if not isinstance(name, str | int) or isinstance(score, bool) or not isinstance(score, int | float):
            raise DataError(f'{at}: must be {{"id": …, "score": number}}')
        if found.get(str(name), score) != score:
            raise DataError(f"{at}: {name!r} has two scores; keep one")
        found[str(name)] = float(score)
    return found


@dataclass(frozen=True, slots=True)
class All:
    """Several filters: a record stays if all keep it; what one rejects is rejected, else what one doubts is reviewed.

    Attributes:
        filters: asked in order; the first that rejects gives the reason.
    """

    filters: Sequence[Filter]

    def judge(self, record: Record) -> Verdict:
        """See `Filter`."""
        doubt: Verdict | None = None
        for each in self.filters:
            verdict = each.judge(record)
            if verdict.keep:
                continue
            if not verdict.review:
                return verdict
            doubt = doubt or verdict
        return doubt or Verdict()


# Reviews ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Review:
    """One line of a review list.

    Attributes:
        decision: ``kept``, ``rejected``, or ``review`` where a person is to write one of the others.
        key: of the conversation, so that a decision outlives changes of the file around it.
        set: name of the data set.
        where: its place.
        reason: of the filter.
        score: of the filter.
        text: the beginning of what was said, for the reader.
    """

    decision: Literal["kept", "rejected", "review"]
    key: str
    set: str
    where: str
    reason: str = ""
    score: float | None = None
    text: str = ""


def record_key(record: Record) -> str:
    """What tells a conversation from others: a hash of its roles, texts and media names (bytes by content)."""
    digest = hashlib.blake2b(digest_size=12)
    for turn in record.turns:
        digest.update(f"\0{turn.role}".encode())
        for part in turn.parts:
            data, sort = part.value, "bytes"
            if not isinstance(data, bytes):
                data, sort = str(data).encode("utf-8", "surrogatepass"), "name"
            digest.update(f"\0{part.kind} {sort} {len(data)} ".encode() + data)
    return digest.hexdigest()


def judge_all(
    dataset: Dataset, rule: Filter, decisions: Mapping[str, bool] | None = None
) -> Iterator[tuple[int, Review]]:
    """Judge every record of a data set; what people have decided goes before the filter.

    Args:
        dataset: whose records are judged. A malformed one is rejected, its error the reason.
        rule: the filter, or `All` of several.
        decisions: of `read_reviews`.
    """
    for index in range(len(dataset)):
        where = dataset.where(index)
        unplaced = getattr(
            dataset, "unplaced", dataset.record
        )  # names as they are written, wherever the root is
        try:
            record = unplaced(index)
            key = record_key(record)
            decided = None if decisions is None else decisions.get(key)
            verdict = (
                rule.judge(record) if decided is None else Verdict(keep=decided, reason="decided by a person")
            )
        except DataError as error:
            reason = str(error).removeprefix(where).lstrip(": ")
            yield index, Review(decision="rejected", key="", set=dataset.name, where=where, reason=reason)
            continue
        yield (
            index,
            Review(
                decision="kept" if verdict.keep else "review" if verdict.review else "rejected",
                key=key,
                set=dataset.name,
                where=where,
                reason=verdict.reason,
                score=verdict.score,
                text=" ".join(" ".join(turn.text for turn in record.turns).split())[:200],
            ),
        )


def write_reviews(path: str | Path, reviews: Iterable[Review]) -> None:
    """Write a review list as JSON lines, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            for review in reviews:
                file.write(json.dumps(asdict(review), ensure_ascii=False) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another name") from error
    finally:
        partial.unlink(missing_ok=True)


def read_reviews(path: str | Path) -> dict[str, bool]:
    """Read the decisions of a review list: key -> whether the sample stays; those still to be made are left out.

    Raises:
        DataError: a line that is no review, or two lines that decide one sample differently.
    """
    found: dict[str, bool] = {}
    meant = {"kept": True, "keep": True, "rejected": False, "reject": False, "review": None}
    for at, entry in _json_lines(Path(path)):
        said, key = entry.get("decision"), entry.get("key")
        if not isinstance(key, str) or not isinstance(said, str) or said not in meant:
            raise DataError(
                f"{at}: needs a key and a decision (kept, rejected or review), found {said!r:.40}"
            )
        decision = meant[said]
        if decision is None or not key:
            continue
        if found.get(key, decision) != decision:
            raise DataError(f"{at}: is decided otherwise in an earlier line; keep one")
        found[key] = decision
    return found


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: is not JSON; repair the line") from error
                if not isinstance(entry, dict):
                    raise DataError(f"{path}:{number}: must be a JSON object")
                yield f"{path}:{number}", entry
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8; save it as UTF-8") from error


def _field(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _check_action(action: str) -> None:
    if action not in ("reject", "review"):
        raise ConfigError(f"action must be reject or review, got {action!r}")
