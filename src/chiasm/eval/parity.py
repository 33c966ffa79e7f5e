"""Does a server compute what the model does? Token counts, tile counts, first-token log-probabilities, short answers.

Whoever serves a model elsewhere changes more than its speed: another chat template, another limit of tiles, a missing
thumbnail or another precision answer almost as well, and nothing says so. Here the same conversations are given to both
sides, and each difference is named by its likeliest cause.

What can be told from outside:

- *prompt tokens*, from `usage`. The text's share is measured with a conversation without pictures.
- *tiles*: (tokens − text) / tokens per tile, where that is whole; else it cannot be told.
- *log-probabilities* of the likeliest first tokens. Every candidate of the server is looked up in the whole
  vocabulary; one that is noticeable on one side (within `NOTICEABLE` nats of the likeliest) and missing on the other
  counts.
- *answers*, written greedily. They may part where two tokens are almost equally likely: at the first token where the
  texts part the model's own values are looked at, and the wording counts unless a token as likely within the tolerance
  leads to the server's. Without log-probabilities any other wording counts. White space alone never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from chiasm.errors import UsageError
from chiasm.eval.endpoint import Candidate, Completion, Endpoint, Refused
from chiasm.eval.parity_cases import Case
from chiasm.media.tiles import TilePolicy
from chiasm.model.answer import ModelInputs, Reply
from chiasm.model.chat import ChatModel
from chiasm.parts.embed import FeatureCache
from chiasm.text.sentencepiece import SPACE
from chiasm.text.tokenizer import Tokenizer, byte_alphabet

__all__ = ["NOTICEABLE", "CaseResult", "Comparison", "compare", "explain_tiles"]

NOTICEABLE = 5.0
"""Nats below the likeliest first token down to which a candidate must be known to both sides."""

Parting = Literal["same", "near", "another", "goes on"]


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
        unknown: noticeable candidates of the server that are no tokens of the model.
        missing: noticeable tokens of the model that the server leaves out of its list.
        answer, server_answer: what was written.
        parting: how the answers part: "same" (but for white space); "near", at tokens as likely within the tolerance;
            "goes on", the model ended its answer and the server wrote on to the limit; else "another".
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
    unknown: tuple[str, ...]
    missing: tuple[str, ...]
    answer: str
    server_answer: str
    parting: Parting

    @property
    def same_answer(self) -> bool:
        """Whether both wrote the same, but for white space."""
        return self.parting == "same"

    @property
    def ends_apart(self) -> bool:
        """Whether the model ended its answer and the server went on beyond it."""
        return self.parting == "goes on"


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
    listed: list[tuple[Candidate, ...]] = []
    logprobs, offset = True, 0
    words = _Words(model.spec.tokenizer)
    for case in cases:
        messages = case.for_server()
        first, logprobs = _first(endpoint, name, messages, top, logprobs, remarks)
        written = endpoint.chat(name, messages, max_tokens=max_new_tokens)
        listed.append(first.first[:top])
        result = _result(model, words, case, first, written, offset, tolerance, top, max_new_tokens)
        if not case.pictures and result.server_tokens is not None and not results:
            offset = result.server_tokens - result.tokens
        results.append(result)
    if any(one.server_tokens is None for one in results):
        remarks.append("the server does not say how many tokens it read: tokens and tiles are not compared")
    silent = [one.name for one in results if one.same_top is None]
    if len(silent) < len(results) and silent:
        remarks.append(
            f"no log-probabilities for {', '.join(silent)}: only counts and answers are compared there"
        )
    elif silent and logprobs:
        remarks.append("the server gives no log-probabilities: only counts and answers are compared")
    wanted = min(top, model.spec.tokenizer.vocab_size)
    few = [f"{one.name} {len(found)}" for one, found in zip(results, listed, strict=True) if found]
    if any(0 < len(found) < wanted for found in listed):
        remarks.append(f"the server lists fewer than the {top} likeliest tokens asked for ({', '.join(few)})")
    positions = _positions(model, words, cases, results, listed, tolerance)
    differences = tuple(_differences(model, cases, results, offset, tolerance, positions))
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
    words: _Words,
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
    found = _held_against(words, _next(model, inputs), first.first[:top], tolerance)
    gaps = found.gaps
    return CaseResult(
        name=case.name,
        tokens=tokens,
        server_tokens=first.prompt_tokens,
        tiles=tiles,
        server_tiles=_tiles(
            tokens, tiles, first.prompt_tokens, offset, model.spec.image_rows, len(case.pictures)
        ),
        same_top=found.same_top,
        shared=len(gaps),
        largest=max(gaps) if gaps else None,
        mean=sum(gaps) / len(gaps) if gaps else None,
        unknown=found.unknown,
        missing=found.missing,
        answer=reply.text,
        server_answer=written.text,
        parting=_parting(model, inputs, reply, written, tolerance),
    )


def _next(model: ChatModel, inputs: ModelInputs) -> torch.Tensor:
    """Log-probabilities of the token that follows a prompt."""
    return torch.log_softmax(model.logits(inputs, positions=[-1])[0].double(), dim=-1)


# --- candidates ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Held:
    """A server's candidates beside the model's own values of the same tokens."""

    same_top: bool | None
    gaps: list[float]
    unknown: tuple[str, ...]
    missing: tuple[str, ...]

    def agrees(self, tolerance: float) -> bool:
        """Whether nothing of it differs."""
        alike = self.same_top is not False and not self.unknown and not self.missing
        return alike and max(self.gaps, default=0.0) <= tolerance


def _held_against(
    words: _Words, logprobs: torch.Tensor, candidates: Sequence[Candidate], tolerance: float
) -> _Held:
    """Look each candidate up, and each token of the model that should be among them."""
    if not candidates:
        return _Held(None, [], (), ())
    ids = words.find(candidates, logprobs)
    values = [None if index is None else logprobs[index].item() for index in ids]
    best, theirs = logprobs.max().item(), candidates[0].logprob
    gaps, unknown = [], []
    for one, value in zip(candidates, values, strict=True):
        if value is not None and math.isfinite(value):
            gaps.append(abs(value - one.logprob))
        elif one.logprob >= theirs - NOTICEABLE:
            unknown.append(one.text)
    # A token that the server holds for less likely than the last of its list is rightly not in it.
    floor = max(best - NOTICEABLE, candidates[-1].logprob + tolerance)
    taken = set(ids)
    above = (logprobs > floor).nonzero().flatten().tolist()
    missing = tuple(words.text(index) for index in above if index not in taken)
    likeliest = values[0]
    same_top = likeliest is not None and best - likeliest <= tolerance
    return _Held(same_top, gaps, tuple(unknown), missing)


class _Words:
    """The vocabulary, found by what a server calls a token.

    Exact bytes come first. Where there are none, or where the server's list shows no blank in front of any word (some
    decode each token alone, and SentencePiece then drops it), the text of the token decoded alone is what it may be
    called. Of several tokens called alike the likeliest that is not taken yet is meant: both sides list those first.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._by_text: dict[str, list[int]] = {}
        self._by_bytes: dict[bytes, list[int]] = {}
        byte_level = tokenizer.token_to_id("<0x0A>") is None
        special = tokenizer.special_ids
        for index in range(tokenizer.vocab_size):
            spelled = tokenizer.id_to_token(index)
            if spelled is None:
                continue
            self._by_bytes.setdefault(_bytes_of(spelled, byte_level), []).append(index)
            names = {self.text(index), spelled.replace(SPACE, " ")}  # `<0x0A>` is shown so by some
            for name in names | ({""} if index in special else set()):  # and special tokens not at all
                self._by_text.setdefault(name, []).append(index)

    def text(self, index: int) -> str:
        """A token decoded alone."""
        return self._tokenizer.decode([index], skip_special_tokens=False)

    def find(self, candidates: Sequence[Candidate], logprobs: torch.Tensor) -> list[int | None]:
        """The id of each candidate, no id twice; None for what is no token here."""
        blanks = any(one.raw.startswith(b" ") for one in candidates)
        taken: set[int] = set()
        out: list[int | None] = []
        for one in candidates:
            exact = self._by_bytes.get(one.raw, [])
            spelled = self._by_text.get(one.text, [])
            if not one.text:  # rows that no token has
                spelled = [*spelled, *range(self._tokenizer.vocab_size, logprobs.numel())]
            told = one.raw != one.text.encode("utf-8", "replace")  # bytes that say more than the text
            names = exact if exact and (told or blanks) else [*exact, *spelled]
            free = [index for index in names if index not in taken and index < logprobs.numel()]
            found = max(free, key=lambda index: logprobs[index].item(), default=None)
            out.append(found)
            if found is not None:
                taken.add(found)
        return out


def _bytes_of(spelled: str, byte_level: bool) -> bytes:
    """What a token stands for: byte-level vocabularies spell bytes, others `<0x0A>` and a mark for a space."""
    if byte_level and all(c in _BYTE_OF for c in spelled):
        return bytes(_BYTE_OF[c] for c in spelled)
    if not byte_level and len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
        try:
            return bytes.fromhex(spelled[3:5])
        except ValueError:
            pass
    return spelled.replace(SPACE, " ").encode("utf-8", "replace")


_BYTE_OF = {character: byte for byte, character in byte_alphabet().items()}


# --- answers ---------------------------------------------------------------------------------------------------------

_BROKEN = "\ufffd"  # what stands for bytes that are no character yet


def _bare(text: str) -> str:
    """A text without white space, and without half a character at its end."""
    return "".join(text.split()).rstrip(_BROKEN)


def _parting(
    model: ChatModel, inputs: ModelInputs, reply: Reply, written: Completion, tolerance: float
) -> Parting:
    """How the greedy answers part."""
    ours, theirs = _bare(reply.text), _bare(written.text)
    if ours == theirs:
        return "same"
    cut = written.finish == "length"
    if cut and theirs and ours.startswith(theirs):
        return "same"  # it counts its tokens otherwise, and was cut off sooner
    if reply.finish == "length" and ours and theirs.startswith(ours):
        return "same"
    if _near(model, inputs, reply.token_ids, theirs, tolerance):
        return "near"
    return "goes on" if ours and cut and reply.finish == "stop" and theirs.startswith(ours) else "another"


def _near(model: ChatModel, inputs: ModelInputs, ids: list[int], theirs: str, tolerance: float) -> bool:
    """Whether a token that is as likely as the model's leads to the other text, before the texts part."""
    rows = _answered(model, inputs, ids)
    hidden = model.spec.tokenizer.special_ids | set(model.stop_ids)

    def text(some: list[int]) -> str:
        shown = [index for index in some if index not in hidden]
        return model.spec.tokenizer.decode(shown, skip_special_tokens=False)

    for at, row in enumerate(rows):
        before = _bare(text(ids[:at]))
        if not theirs.startswith(before):
            return False
        for other in ((row - row[ids[at]]).abs() <= tolerance).nonzero().flatten().tolist():
            if other == ids[at]:
                continue
            if other in model.stop_ids:
                if theirs == before:
                    return True
                continue
            after = text([*ids[:at], other])
            whole = _bare(after)
            if not theirs.startswith(whole):
                continue
            # Half a character says little, but that what follows is one of several bytes.
            following = theirs[len(whole) : len(whole) + 1]
            if not after.endswith(_BROKEN) or following == _BROKEN or len(following.encode()) > 1:
                return True
    return False


def _answered(model: ChatModel, inputs: ModelInputs, ids: list[int]) -> torch.Tensor:
    """Log-probabilities in front of each token of an answer."""
    read = inputs.sequence
    T, more = len(read.ids_T), len(ids) - 1
    text = torch.tensor(ids[:more], dtype=torch.int64)
    steps = torch.arange(1, more + 1, dtype=read.pos_T.dtype).reshape(-1, *[1] * (read.pos_T.dim() - 1))
    longer = replace(
        read,
        ids_T=torch.cat((read.ids_T, text)),
        kind_T=torch.cat((read.kind_T, torch.zeros(more, dtype=read.kind_T.dtype))),
        doc_T=torch.cat((read.doc_T, read.doc_T[-1:].expand(more))),
        pos_T=torch.cat((read.pos_T, read.pos_T[-1:] + steps)),
        labels_T=None,
        weight_T=None,
    )
    whole = ModelInputs(longer.ids_T, inputs.tiles, longer)
    return torch.log_softmax(model.logits(whole, positions=list(range(T - 1, T + more))).double(), dim=-1)


# --- counts ----------------------------------------------------------------------------------------------------------


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


def _off(one: CaseResult, tolerance: float) -> bool:
    """Whether the values of the first token differ."""
    far = one.largest is not None and one.largest > tolerance
    return one.same_top is False or far or bool(one.unknown or one.missing)


def _positions(
    model: ChatModel,
    words: _Words,
    cases: Sequence[Case],
    results: Sequence[CaseResult],
    listed: Sequence[tuple[Candidate, ...]],
    tolerance: float,
) -> str | None:
    """The order of position rows that a GGUF encoder needs, where pictures differ for the order alone.

    llama.cpp's graph and the file may disagree about the class token's row (`chiasm.checkpoint.mmproj`): every patch
    then has its neighbour's position, so the model with its positions rolled by one agrees with the server.
    """
    seen = [
        (case, found)
        for case, one, found in zip(cases, results, listed, strict=True)
        if case.pictures and found and one.server_tokens in (one.tokens, None)
    ]
    blind = [one for one in results if not one.tiles]
    off = any(_off(one, tolerance) for one in results if one.tiles)
    embedder = model.model.embedder
    table = getattr(getattr(embedder, "vision", None), "position_embedding", None)
    if not seen or not off or any(_off(one, tolerance) for one in blind) or table is None:
        return None
    kept, features = table.data, model.features
    embedder.features = FeatureCache(0)  # type: ignore[assignment]
    try:
        for shift, remedy in ((1, "class-last"), (-1, "class-first")):
            table.data = kept.roll(shift, dims=-2)
            if all(
                _held_against(words, _next(model, model.inputs(case.for_model())), found, tolerance).agrees(
                    tolerance
                )
                for case, found in seen
            ):
                return remedy
    finally:
        table.data = kept
        embedder.features = features  # type: ignore[assignment]
    return None


def _sees_none(model: ChatModel, cases: Sequence[Case], results: Sequence[CaseResult], offset: int) -> bool:
    """Whether the server reads each picture as next to nothing."""
    per_tile = model.spec.image_rows
    read = [
        one.server_tokens is not None
        and one.server_tokens - offset < one.tokens - one.tiles * per_tile + per_tile / 2
        for case, one in zip(cases, results, strict=True)
        if case.pictures
    ]
    return bool(read) and all(read)


def _differences(
    model: ChatModel,
    cases: Sequence[Case],
    results: Sequence[CaseResult],
    offset: int,
    tolerance: float,
    positions: str | None,
) -> Iterator[str]:
    if offset:
        more = f"{abs(offset)} tokens {'more' if offset > 0 else 'fewer'}"
        yield (
            f"template: the server reads {more} of text than the model: another chat template or system message "
            "(--template, --system)"
        )
    if _sees_none(model, cases, results, offset):
        yield (
            "pictures: the server does not see pictures, it reads hardly more tokens than the text has: start it with "
            "the encoder (llama-server: --mmproj)"
        )
        results = [one for one in results if not one.tiles]
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
    yield from _values(results, tolerance, bool(offset), positions)
    apart = [one.name for one in results if one.ends_apart]
    if apart:
        yield (
            f"end: the server goes on where the model ends its answer ({', '.join(apart)}): its generation config "
            "lacks the chat's stop token"
        )


def _values(
    results: Sequence[CaseResult], tolerance: float, other_template: bool, positions: str | None
) -> Iterator[str]:
    """Differences of log-probabilities and of answers, where the same was read."""
    off = [one for one in results if _off(one, tolerance)]
    read_alike = [one for one in off if one.server_tokens == one.tokens]
    if read_alike and not other_template:
        shown = ", ".join(f"{one.name} {_gap(one)}" for one in read_alike)
        blind = [one for one in results if not one.tiles]
        if any(not one.tiles for one in read_alike):
            cause = "other weights, a lower precision, or a template with as many tokens"
        elif positions is not None:
            cause = (
                "the text alone agrees, and so does the model with its positions moved by one: the rows of the mmproj "
                f"file and the server's graph disagree (chiasm convert --to gguf --position-rows {positions})"
            )
        elif blind:
            cause = "the text alone agrees, so the pictures' pixels or the encoder differ"
        else:
            cause = "other weights, a lower precision, or other pixels"
        yield f"values: {shown} (tolerance {tolerance:g}): {cause}"
    elif off and not other_template and all(one.server_tokens is None for one in off):
        shown = ", ".join(f"{one.name} {_gap(one)}" for one in off)
        yield f"values: {shown} (tolerance {tolerance:g})"
    # Another prompt or other values have been named already; they would explain any answer.
    comparable = [
        one
        for one in results
        if one not in off and one.server_tokens in (one.tokens, None) and not other_template
    ]
    worded = [one.name for one in comparable if one.same_top is not None and one.parting == "another"]
    if worded:
        yield (
            f"answers: another wording of {', '.join(worded)}, and the model holds none of the server's tokens where "
            f"they part for as likely within {tolerance:g}: another decoding (sampling, penalties) or what follows "
            "the first token"
        )
    unlike = [one.name for one in comparable if one.same_top is None and one.parting in ("another", "near")]
    if unlike:
        yield f"answers: another wording of {', '.join(unlike)}, and no log-probabilities to say how far off"


def _gap(one: CaseResult) -> str:
    said = [] if one.largest is None else [f"{one.largest:.3g}"]
    said += ["another likeliest token"] if one.same_top is False and one.shared else []
    said += [] if one.shared else ["no token in common"]
    for listed, where in ((one.unknown, "unknown here"), (one.missing, "missing there")):
        if listed:
            said.append(f"{', '.join(map(repr, listed[:3]))}{' …' if len(listed) > 3 else ''} {where}")
    return ", ".join(said)


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
