"""Majority voting over sampled answers: the vote, an unbiased estimate of vote@k from N samples, its interval and cost.

What: ``majority``, ``vote_at``, ``vote_curve``, ``sample_answers``. Source: self-consistency (Wang et al. 2023);
fact sheet InternVL 2.5, section 5 (mode of parsed answers; N and temperature are not published).

Rules. Unparsed answers do not vote. The most frequent answer wins; of equally frequent ones, the one that was sampled
first: no chance in it. vote@k is the expected grade of the vote over k of the N samples, all subsets of k being equally
likely: averaged over all of them where they are few, else over seeded random ones. With that, vote@1 is the mean
grade of single samples, and vote@N the vote over all.

Seeds: sample k of a question has a seed of its own, made of the run's seed, the question's id and k, so that an answer
depends neither on the batch nor on how often one was interrupted.

Shape legend: Q questions, N samples of each, k (K) votes, S subsets, C different answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from chiasm.data.mixture import derive_seed
from chiasm.errors import ConfigError, DataError
from chiasm.eval.intervals import Interval, clustered_mean, share_interval
from chiasm.eval.store import Store

__all__ = ["SUBSETS", "VotePoint", "majority", "plain_reply", "sample_answers", "vote_at", "vote_curve"]

SUBSETS = 500
"""Subsets of k samples that are averaged over; fewer where there are no more."""


class Answers(Protocol):
    """What samples: a `Chats`; its `queue`, where it has one, answers many at once."""

    def batch(self, conversations: Sequence[Any], **options: Any) -> Sequence[Any]:
        """Return one reply per conversation."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VotePoint:
    """vote@k.

    Attributes:
        k: votes.
        value, error, interval: mean grade over questions, its clustered standard error, its 95 % interval.
        tokens: completion tokens that a question costs on average (k times the mean of a sample).
        exact: whether all subsets were averaged over, for every question.
    """

    k: int
    value: float
    error: float | None
    interval: Interval
    tokens: float
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"interval": list(self.interval)}


def majority(ballots: Sequence[Hashable | None]) -> int | None:
    """Return the index of the first sample that agrees with the winner; None when nothing was parsed."""
    counts: dict[Hashable, int] = {}
    first: dict[Hashable, int] = {}
    for n, ballot in enumerate(ballots):
        if ballot is not None:
            counts[ballot] = counts.get(ballot, 0) + 1
            first.setdefault(ballot, n)
    if not counts:
        return None
    # Dictionaries keep the order of first votes, and max takes the first of equals.
    return first[max(counts, key=lambda ballot: counts[ballot])]


def vote_at(
    ballots: Sequence[Hashable | None],
    grades: Sequence[float],
    k: int,
    *,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> tuple[float, bool]:
    """Return (expected grade of the vote over k of N samples, whether that is exact).

    Args:
        ballots: N parsed answers as they are compared; None for unparsed ones.
        grades: N grades of the samples' own values; what does not win does not count.
        k: 1 … N.
        subsets: most subsets to average over.
        seed: of the subsets where there are more.

    Raises:
        ConfigError: k outside 1 … N.
    """
    n = len(ballots)
    if not 1 <= k <= n or len(grades) != n:
        raise ConfigError(
            f"vote@{k} of {n} samples with {len(grades)} grades: choose k from 1 to the number of samples"
        )
    exact = math.comb(n, k) <= subsets
    if exact:
        chosen_SK = _subsets(n, k)
    else:
        rng = np.random.Generator(np.random.PCG64(derive_seed(seed, "vote", n, k)))
        chosen_SK = np.sort(rng.random((subsets, n)).argsort(1)[:, :k], 1)
    return float(_winning(ballots, grades, chosen_SK).mean()), exact


@lru_cache(maxsize=64)
def _subsets(n: int, k: int) -> np.ndarray:
    return np.array(list(itertools.combinations(range(n), k)), np.int64)


def _winning(
    ballots: Sequence[Hashable | None], grades: Sequence[float], chosen_SK: np.ndarray
) -> np.ndarray:
    """(S,) grade of the sample that `majority` finds in each subset, 0 where nothing was parsed."""
    names = [name for name in dict.fromkeys(ballots) if name is not None]
    if not names:
        return np.zeros(len(chosen_SK))
    k = chosen_SK.shape[1]
    values = np.array([np.array([ballot == name for ballot in ballots]) for name in names])
    votes_CSK = values[:, chosen_SK]
    count_CS = votes_CSK.sum(2)
    first_CS = votes_CSK.argmax(2)
    # More votes win; of equal ones the earlier first vote, which is less than k and so never outweighs a vote.
    winner_S = (count_CS * k - first_CS * (count_CS > 0)).argmax(0)
    at = np.arange(len(chosen_SK))
    sample_S = chosen_SK[at, first_CS[winner_S, at]]
    return np.where(count_CS.max(0) > 0, np.asarray(grades, np.float64)[sample_S], 0.0)


def vote_curve(
    ballots_QN: Sequence[Sequence[Hashable | None]],
    grades_QN: Sequence[Sequence[float]],
    tokens_QN: Sequence[Sequence[int]],
    groups_Q: Sequence[Hashable],
    *,
    ks: Sequence[int] | None = None,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> list[VotePoint]:
    """Return vote@k for several k, by default 1, 2, 4, … and N.

    Args:
        ballots_QN: of each question, its N parsed answers.
        grades_QN: likewise.
        tokens_QN: completion tokens of each sample.
        groups_Q: cluster (picture) of each question.
        ks: numbers of votes.
        subsets: see `vote_at`.
        seed: see `vote_at`; a question adds its place.

    Raises:
        DataError: no questions, or unequal numbers of samples.
    """
    sizes = {len(ballots) for ballots in ballots_QN}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(
            f"cannot vote over {sorted(sizes)} samples: give every question equally many, at least one"
        )
    n = sizes.pop()
    if ks is None:
        ks = sorted({*(2**e for e in range(n.bit_length()) if 2**e <= n), n})
    mean_tokens = float(np.mean([sum(tokens) / n for tokens in tokens_QN]))
    points = []
    for k in ks:
        found = [
            vote_at(ballots, grades, k, subsets=subsets, seed=derive_seed(seed, q))
            for q, (ballots, grades) in enumerate(zip(ballots_QN, grades_QN, strict=True))
        ]
        value, error, clusters = clustered_mean([v for v, _ in found], groups_Q)
        points.append(
            VotePoint(
                k=k,
                value=value,
                error=error,
                interval=share_interval(value, error, clusters),
                tokens=k * mean_tokens,
                exact=all(exact for _, exact in found),
            )
        )
    return points


def sample_answers(
    model: Answers,
    conversation: Callable[[int], Any],
    keys: Sequence[str],
    n: int,
    *,
    options: Mapping[str, Any],
    seed: int,
    store: Store,
    name: str,
    identity: Mapping[str, Any],
    batch: int = 64,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Sample N answers to each question; what the store holds already is not asked again.

    Args:
        model: what answers.
        conversation: index of a question -> its messages, made when they are asked.
        keys: ids of the questions.
        n: samples of each.
        options: of the answers (temperature, top_p, max_new_tokens).
        seed: of the run.
        store: keeps finished questions.
        name: of the part in the store.
        identity: what the answers depend on.
        batch: answers being written at once.
        report: is told how many questions are done.

    Returns:
        (for each question its N answers as {"text", "finish", "completion", "prompt"}, the store's record).

    Raises:
        ConfigError: n below 1.
    """
    if n < 1:
        raise ConfigError(f"{n} samples of each question: take at least one")

    def work(first: int, last: int) -> list[list[dict[str, Any]]]:
        asked = [
            (conversation(q), derive_seed(seed, "sample", keys[q], k))
            for q in range(first, last)
            for k in range(n)
        ]
        flat = _answer(model, asked, options)
        return [flat[at : at + n] for at in range(0, len(flat), n)]

    whole = {**identity, "samples": n, "options": dict(options), "seed": seed}
    return store.run(name, whole, len(keys), work, batch=max(1, batch // n), report=report)


def _answer(model: Any, asked: Sequence[tuple[Any, int]], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Answers with a seed each: through the model's queue where it has one, else one by one."""
    if not hasattr(model, "queue"):
        return [plain_reply(model.batch([talk], **options, seed=seed)[0]) for talk, seed in asked]
    queue = model.queue(refuse_large=False)
    order = {queue.submit(talk, **options, seed=seed): place for place, (talk, seed) in enumerate(asked)}
    replies: dict[int, dict[str, Any]] = {}
    for piece in queue:
        if piece.error is not None:
            raise piece.error
        if piece.reply is not None:
            replies[order[piece.ticket]] = plain_reply(piece.reply)
    return [replies[place] for place in range(len(asked))]


def plain_reply(reply: Any) -> dict[str, Any]:
    """What is kept of a reply: text, why it ended, tokens written and read."""
    usage = reply.usage or {}
    return {
        "text": reply.text,
        "finish": reply.finish,
        "completion": int(usage.get("completion_tokens", len(reply.token_ids))),
        "prompt": int(usage.get("prompt_tokens", 0)),
    }
