"""Does a server compute what the model does? Token counts, tile counts, first-token log-probabilities, short answers.

Whoever serves a model elsewhere changes more than its speed: another chat template, another limit of tiles, a missing
thumbnail or another precision answer almost as well, and nothing says so. Here the same conversations are given to both
sides, and each difference is named by its likeliest cause.

What can be told from outside:

- *prompt tokens*, from `usage`. The text's share is measured with a conversation without pictures.
- *tiles*: (tokens − text) / tokens per tile, where that is whole; else it cannot be told.
- *log-probabilities* of the likeliest first tokens, compared where both sides list a token.
- *answers*, written greedily. They may part where two tokens are almost equally likely, so a different wording counts
  only where there are no log-probabilities; an answer that does not end where the model's does counts always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from chiasm.errors import UsageError
from chiasm.eval.endpoint import Candidate, Completion, Endpoint, Refused
from chiasm.eval.parity_cases import Case
from chiasm.media.tiles import TilePolicy
from chiasm.model.chat import ChatModel
from chiasm.text.sentencepiece import SPACE
from chiasm.text.tokenizer import Tokenizer, byte_alphabet

__all__ = ["CaseResult", "Comparison", "compare", "explain_tiles"]

_LISTED = 256  # of the model's own likeliest tokens, among which a server's are looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One conversation, on both sides.

    Attributes:
        name: of the case.
        tokens, server_tokens: of the prompt; None where the server does not say.
        tiles, server_tiles: encoded tiles; None where they cannot be told.
        same_top: whether the likeliest first token is the same, or as likely within the tolerance; None without
            log-probabilities.
        shared: tokens that both list.
        largest, mean: absolute difference of their log-probabilities; None where none is shared.
        answer, server_answer: what was written.
        ends_apart: the model ended its answer and the server went on beyond it.
    """

    name: str
    tokens: int
    server_tokens: int | None
    tiles: int
    server_tiles: int | None
    same_top: bool | None
    shared: int
    largest: float | None
    mean: float | None
    answer: str
    server_answer: str
    ends_apart: bool

    @property
    def same_answer(self) -> bool:
        """Whether both wrote the same."""
        return self.answer == self.server_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came out.

    Attributes:
        model: the name of the model here.
        server: URL of the server.
        served: the name of the model there.
        tolerance: largest difference of log-probabilities that counts as equal.
        cases: one by one.
        differences: what is not equal, one sentence each with its likeliest cause; empty where nothing is.
        remarks: what could not be compared.
    """

    model: str
    server: str
    served: str
    tolerance: float
    cases: tuple[CaseResult, ...]
    differences: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return asdict(self) | {"equal": self.equal}


def compare(
    model: ChatModel,
    endpoint: Endpoint,
    cases: Sequence[Case],
    *,
    served: str | None = None,
    top: int = 20,
    tolerance: float = 0.1,
    max_new_tokens: int = 16,
) -> Comparison:
    """Give the same conversations to the model and to the server.

    Args:
        model: the one here.
        endpoint: the server.
        cases: what to ask; one without pictures should come first, for the others' tiles are told by its text.
        served: name of the model there; None where it has one only.
        top: how many of the likeliest first tokens are compared.
        tolerance: largest difference of log-probabilities that counts as equal.
        max_new_tokens: length of the answers.

    Raises:
        UsageError: no cases, or a number that makes no sense.
        ServiceError: the server cannot be asked.
    """
    if not cases or top < 1 or max_new_tokens < 1 or not tolerance >= 0:
        raise UsageError(
            "a comparison needs cases, top and max_new_tokens of at least 1, and a tolerance of at least 0"
        )
    name = endpoint.choose(served)
    results: list[CaseResult] = []
    remarks: list[str] = []
    logprobs, offset = True, 0
    for case in cases:
        messages = case.for_server()
        first, logprobs = _first(endpoint, name, messages, top, logprobs, remarks)
        written = endpoint.chat(name, messages, max_tokens=max_new_tokens)
        result = _result(model, case, first, written, offset, tolerance, top, max_new_tokens)
        if not case.pictures and result.server_tokens is not None and not results:
            offset = result.server_tokens - result.tokens
        results.append(result)
    if any(one.server_tokens is None for one in results):
        remarks.append("the server does not say how many tokens it read: tokens and tiles are not compared")
    if logprobs and not any(one.shared for one in results):
        remarks.append("the server gives no log-probabilities: only counts and answers are compared")
    differences = tuple(_differences(model, cases, results, offset, tolerance))
    return Comparison(
        model=model.name,
        server=endpoint.url,
        served=name,
        tolerance=tolerance,
        cases=tuple(results),
        differences=differences,
        remarks=tuple(dict.fromkeys(remarks)),
    )


def _first(
    endpoint: Endpoint,
    name: str,
    messages: list[dict[str, Any]],
    top: int,
    logprobs: bool,
    remarks: list[str],
) -> tuple[Completion, bool]:
    """The server's first token with its alternatives; asked without them where the server refuses to tell."""
    if logprobs:
        try:
            return endpoint.chat(name, messages, max_tokens=1, top=top), True
        except Refused as refused:
            if "logprob" not in refused.said.lower():
                raise
            remarks.append(
                f"the server gives no log-probabilities ({refused.said}): only counts and answers are compared"
            )
    return endpoint.chat(name, messages, max_tokens=1), False


def _result(
    model: ChatModel,
    case: Case,
    first: Completion,
    written: Completion,
    offset: int,
    tolerance: float,
    top: int,
    max_new_tokens: int,
) -> CaseResult:
    inputs = model.inputs(case.for_model())
    tokens, tiles = len(inputs.token_ids), inputs.tiles.shape[0]
    reply = model.chat(case.for_model(), max_new_tokens=max_new_tokens)
    logprobs = torch.log_softmax(model.logits(inputs, positions=[-1])[0], dim=-1)
    own = _Own(logprobs, model.spec.tokenizer)
    best = logprobs.max().item()
    found = [(own.take(one), one.logprob) for one in first.first[:top]]
    gaps = [abs(ours - theirs) for ours, theirs in found if ours is not None]
    same_top = None
    if first.first:
        likeliest, _ = found[0]
        same_top = likeliest is not None and best - likeliest <= tolerance
    return CaseResult(
        name=case.name,
        tokens=tokens,
        server_tokens=first.prompt_tokens,
        tiles=tiles,
        server_tiles=_tiles(
            tokens, tiles, first.prompt_tokens, offset, model.spec.tokens_per_tile, len(case.pictures)
        ),
        same_top=same_top,
        shared=len(gaps),
        largest=max(gaps) if gaps else None,
        mean=sum(gaps) / len(gaps) if gaps else None,
        answer=reply.text,
        server_answer=written.text,
        ends_apart=reply.finish == "stop"
        and written.finish == "length"
        and written.text.strip() != reply.text.strip()
        and written.text.startswith(reply.text),
    )


class _Own:
    """The model's likeliest tokens, found by what a server calls them.

    Several tokens may be spelled alike (stretches of a character's bytes all read U+FFFD, and some servers drop a space
    in front). Both sides list the likeliest first, so the n-th of a spelling is the n-th here.
    """

    def __init__(self, logprobs: torch.Tensor, tokenizer: Tokenizer) -> None:
        values, ids = logprobs.topk(min(_LISTED, logprobs.numel()))
        self._by_text: dict[str, list[float]] = {}
        self._by_bytes: dict[bytes, list[float]] = {}
        for value, index in zip(values.tolist(), ids.tolist(), strict=True):
            text = tokenizer.decode([index], skip_special_tokens=False)
            self._by_text.setdefault(text, []).append(value)
            raw = _bytes_of(tokenizer.id_to_token(index), text)
            self._by_bytes.setdefault(raw, []).append(value)

    def take(self, candidate: Candidate) -> float | None:
        """The log-probability of a server's candidate here; None where it is not among the likeliest."""
        by_text = self._by_text.get(candidate.text)
        by_bytes = self._by_bytes.get(candidate.raw)
        # Bytes that say more than the text were told by the server itself.
        told = candidate.raw != candidate.text.encode("utf-8", "replace")
        left = by_bytes if told or not by_text else by_text
        return left.pop(0) if left else None


def _bytes_of(spelled: str | None, text: str) -> bytes:
    """What a token stands for: byte-level vocabularies spell bytes, others `<0x0A>` and a mark for a space."""
    if spelled is not None and all(c in _BYTE_OF for c in spelled):
        return bytes(_BYTE_OF[c] for c in spelled)
    if spelled is not None and len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
        return bytes.fromhex(spelled[3:5])
    return (text if spelled is None else spelled.replace(SPACE, " ")).encode()


_BYTE_OF = {character: byte for byte, character in byte_alphabet().items()}


def _tiles(
    tokens: int, tiles: int, theirs: int | None, offset: int, per_tile: int, pictures: int
) -> int | None:
    """Tiles that the server encoded, from what it read; None where that is not a whole number of them."""
    if theirs is None or not pictures:
        return None if theirs is None else 0
    more, rest = divmod(theirs - offset - tokens, per_tile)
    found = tiles + more
    return found if not rest and found >= pictures else None


# --- what differs, and why -------------------------------------------------------------------------------------------


def _differences(
    model: ChatModel,
    cases: Sequence[Case],
    results: Sequence[CaseResult],
    offset: int,
    tolerance: float,
) -> Iterator[str]:
    if offset:
        more = f"{abs(offset)} tokens {'more' if offset > 0 else 'fewer'}"
        yield (
            f"template: the server reads {more} of text than the model: another chat template or system message "
            "(--template, --system)"
        )
    wrong = [one for one in results if one.server_tiles is not None and one.server_tiles != one.tiles]
    if wrong:
        shown = ", ".join(f"{one.name} {one.server_tiles} instead of {one.tiles}" for one in wrong)
        yield f"tiles: {shown}: {explain_tiles(model.spec.tiles, cases, results)}"
    for one in results:
        if one.server_tokens is not None and one.server_tiles is None:
            yield (
                f"tokens: the server reads {one.server_tokens} tokens of {one.name!r}, the model {one.tokens}, which "
                "is no whole number of tiles: the text around the pictures differs (numbers, newlines, tags)"
            )
    yield from _values(results, tolerance, bool(offset))
    apart = [one.name for one in results if one.ends_apart]
    if apart:
        yield (
            f"end: the server goes on where the model ends its answer ({', '.join(apart)}): its generation config "
            "lacks the chat's stop token"
        )


def _values(results: Sequence[CaseResult], tolerance: float, other_template: bool) -> Iterator[str]:
    """Differences of log-probabilities where the same was read; of answers where there are none."""
    off = [
        one
        for one in results
        if one.same_top is False or (one.largest is not None and one.largest > tolerance)
    ]
    read_alike = [one for one in off if one.server_tokens == one.tokens]
    if read_alike and not other_template:
        shown = ", ".join(f"{one.name} {_gap(one)}" for one in read_alike)
        blind = [one for one in results if not one.tiles]
        if any(not one.tiles for one in read_alike):
            cause = "other weights, a lower precision, or a template with as many tokens"
        elif blind:
            cause = "the text alone agrees, so the pictures' pixels or the encoder differ"
        else:
            cause = "other weights, a lower precision, or other pixels"
        yield f"values: {shown} (tolerance {tolerance:g}): {cause}"
    elif off and not other_template and all(one.server_tokens is None for one in off):
        shown = ", ".join(f"{one.name} {_gap(one)}" for one in off)
        yield f"values: {shown} (tolerance {tolerance:g})"
    if not any(one.same_top is not None for one in results):
        unlike = [one.name for one in results if not one.same_answer and not one.ends_apart]
        if unlike:
            yield f"answers: another wording of {', '.join(unlike)}, and no log-probabilities to say how far off"


def _gap(one: CaseResult) -> str:
    if one.largest is None:
        return "no token in common"
    return f"{one.largest:.3g}" + (", another likeliest token" if one.same_top is False else "")


def explain_tiles(policy: TilePolicy, cases: Sequence[Case], results: Sequence[CaseResult]) -> str:
    """Which way of cutting gives the tile counts that a server has; the nearest to the policy is named.

    Args:
        policy: the model's.
        cases: with the sizes of their pictures.
        results: of the same cases.
    """
    told = [
        (case.sizes, one.server_tiles)
        for case, one in zip(cases, results, strict=True)
        if case.sizes and one.server_tiles is not None
    ]
    for words, others, shared in _ways(policy):
        fits = [
            other.max_tiles
            for other in others
            if all(sum(_counts(other, sizes, shared)) == count for sizes, count in told)
        ]
        if fits:
            limits = str(fits[0]) if len(fits) == 1 else f"{fits[0]} to {fits[-1]}"
            return f"the server {words.format(limits)}"
    return "no limit of tiles, with or without a thumbnail, gives these counts"


def _ways(policy: TilePolicy) -> Iterator[tuple[str, list[TilePolicy], bool]]:
    """Other ways to cut, the likelier ones first: words, policies, and whether pictures share the limit."""
    own = policy.mode != "hf"
    yield "gives every picture the whole limit of tiles", [policy], not own
    other_thumb = replace(policy, thumbnail=not policy.thumbnail)
    thumb = "adds no thumbnail" if policy.thumbnail else "adds a thumbnail"
    limit = policy.max_tiles if policy.dynamic else 1
    for shared in (own, not own):
        apart = "" if shared == own else ", for every picture"
        yield thumb + apart, [other_thumb], shared
        yield "does not cut pictures into tiles" + apart, [replace(policy, dynamic=False)], shared
        cut = f"cuts with max_tiles {{}} (the model: {limit}){apart}"
        yield cut, _limits(policy), shared
        yield f"{cut} and {thumb}", _limits(other_thumb), shared


def _limits(policy: TilePolicy) -> list[TilePolicy]:
    return [
        replace(policy, dynamic=True, min_tiles=min(policy.min_tiles, limit), max_tiles=limit)
        for limit in range(1, 41)
    ]


def _counts(policy: TilePolicy, sizes: Sequence[tuple[int, int]], shared: bool) -> list[int]:
    if shared:
        limit = max(1, policy.max_tiles // max(1, len(sizes)))
        return [policy.count(width, height, limit) for width, height in sizes]
    return [policy.count(width, height, policy.max_tiles) for width, height in sizes]
