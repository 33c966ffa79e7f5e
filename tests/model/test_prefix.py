"""The prefix cache: what it finds, what it may not find, and that an answer which uses it is the answer without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.contracts import hovle, internvl, more3d, pvc, synergen
from tests.contracts.skeleton import Skeleton, document, extend, noise

from chiasm.data.sequence import IMAGE, VIDEO, MediaBatch, Sequence
from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.model.chat import ChatModel
from chiasm.model.generate import Decoding, generate
from chiasm.model.prefix import PrefixCache, Rows, steady_length
from chiasm.parts.contracts import Past
from tiny_chat import DYNAMIC, LONGROPE, ask, picture, tiny_chat, tiny_model

# --- lookup --------------------------------------------------------------------------------------------------------


def past(rows: int, size: int = 4) -> Past:
    """A past of as many rows that takes 8 · size bytes each."""
    return Past([(torch.zeros(1, rows, size), torch.zeros(1, rows, size))])


def spans(lengths: list[int | tuple[int, str, int]]) -> Sequence:
    """A document of text ids and (rows, key, group) of pictures."""
    rows = [x if isinstance(x, int) else ("image", IMAGE, x[0], 1) for x in lengths]
    media = {"image": MediaBatch(torch.zeros(len(lengths), 1))}
    plain = document(rows, media, train=False)
    facts = [x for x in lengths if not isinstance(x, int)]
    keyed = [replace(s, key=key, group=g) for s, (_, key, g) in zip(plain.spans, facts, strict=True)]
    return replace(plain, spans=tuple(keyed))


def rows_by_hand(sequence: Sequence) -> list[object]:
    """Row by row, what must be equal."""
    out: list[object] = [
        (int(i), int(k), float(p))
        for i, k, p in zip(sequence.ids_T, sequence.kind_T, sequence.pos_T, strict=True)
    ]
    for span in sequence.spans:
        group = [s for s in sequence.spans if s.group == span.group and s.group >= 0]
        for t in range(span.start, span.start + span.length):
            own = span.key or object()
            out[t] = (out[t], span.start, span.length, own, group[0].start if group else None)
    return out


def open_at(sequence: Sequence, at: int) -> bool:
    """Whether a cut here is inside no span and no group."""
    for span in sequence.spans:
        group = [s for s in sequence.spans if s.group == span.group] if span.group >= 0 else [span]
        if group[0].start < at < group[-1].start + group[-1].length:
            return False
    return True


def longest_by_hand(kept: list[Sequence], prompt: Sequence) -> int:
    mine, best = rows_by_hand(prompt), 0
    for other in kept:
        theirs = rows_by_hand(other)
        for n in range(min(len(mine) - 1, len(theirs)) + 1):
            if mine[:n] == theirs[:n] and open_at(prompt, n) and open_at(other, n):
                best = max(best, n)
    return best


part = st.one_of(
    st.integers(1, 2),
    st.tuples(st.integers(1, 3), st.sampled_from(["a", "b", ""]), st.sampled_from([-1, -1, 0])),
)
texts = st.lists(part, min_size=1, max_size=6)


@given(stored=st.lists(texts, max_size=5), asked=texts)
def test_longest_beginning_is_that_of_a_slow_search(stored: list, asked: list) -> None:
    cache, kept = PrefixCache(min_rows=1), []
    for item in stored:
        sequence = spans(item)
        mine, held = rows_by_hand(sequence), past(len(sequence))
        cache.put(Rows.of(sequence), lambda held=held: held)
        if not any(rows_by_hand(k)[: len(mine)] == mine for k in kept):
            kept = [k for k in kept if mine[: len(k)] != rows_by_hand(k)] + [sequence]
    assert len(cache) == len(kept)
    prompt = spans(asked)
    found = cache.find(Rows.of(prompt))
    assert (found.rows if found else 0) == longest_by_hand(kept, prompt)
    assert cache.rows_reused == (found.rows if found else 0)


def test_a_cut_moves_to_the_start_of_a_span_or_group() -> None:
    def reuse(kept: Sequence, prompt: Sequence) -> int:
        cache = PrefixCache(min_rows=1)
        cache.put(Rows.of(kept), lambda: past(len(kept)))
        found = cache.find(Rows.of(prompt))
        return found.rows if found else 0

    seen = spans([1, 2, (4, "a", -1), 3])
    assert reuse(seen, spans([1, 2, (4, "a", -1), 3, 5])) == 7
    assert reuse(seen, spans([1, 2, (4, "a", -1), 9, 5])) == 6
    assert reuse(seen, spans([1, 2, (4, "a", -1)])) == 2  # its last row must be read, and is in the picture
    assert reuse(seen, spans([1, 2, (4, "b", -1), 3, 5])) == 2  # the same text about another picture
    assert reuse(seen, spans([1, 2, (4, "", -1), 3, 5])) == 2
    assert (
        reuse(spans([1, 2, (4, "", -1), 3]), spans([1, 2, (4, "", -1), 3, 5])) == 2
    )  # nobody knows what it is
    assert reuse(seen, spans([1, 2, (3, "a", -1), 3, 5])) == 2
    assert reuse(seen, spans([2, 2, (4, "a", -1), 3, 5])) == 0
    film = spans([1, (2, "a", 0), 2, (2, "b", 0), 3])
    assert reuse(film, spans([1, (2, "a", 0), 2, (2, "b", 0), 4])) == 6
    assert (
        reuse(film, spans([1, (2, "a", 0), 2, (2, "c", 0), 4])) == 1
    )  # two frames of three are not the video
    assert reuse(film, spans([1, (2, "a", 0), 2, 4])) == 1
    shifted = replace(seen, pos_T=seen.pos_T + 1)
    assert reuse(shifted, seen) == 0


def test_times_of_frames_count() -> None:
    film = spans([1, (2, "a", 0), 3, 4])
    timed = [
        replace(film, media={"image": MediaBatch(film.media["image"].data, torch.full((4,), t))})
        for t in (0.0, 0.5)
    ]
    assert Rows.of(timed[0]).common(Rows.of(timed[0])) == 5
    assert Rows.of(timed[0]).common(Rows.of(timed[1])) == 1


def test_memory_is_bounded_and_the_oldest_go() -> None:
    def rows(first: int) -> Rows:
        return Rows.of(Sequence.of_text([first, *range(10)]))

    one = past(11).bytes + rows(1).codes.nbytes
    cache = PrefixCache(2 * one + 1, min_rows=1)
    for first in (1, 2):
        cache.put(rows(first), lambda: past(11))
    assert cache.bytes == 2 * one
    assert cache.find(rows(1)) is not None  # used again: 2 is now the oldest
    cache.put(rows(3), lambda: past(11))
    assert cache.bytes == 2 * one
    assert [cache.find(rows(n)) is not None for n in (1, 2, 3)] == [True, False, True]
    cache.put(rows(4), lambda: past(1000))  # larger than all there is
    assert len(cache) == 2
    cache.clear()
    assert (cache.bytes, len(cache)) == (0, 0)
    nothing = PrefixCache(0)
    nothing.put(rows(1), lambda: pytest.fail("copied what cannot be kept"))
    assert nothing.find(rows(1)) is None


def test_short_beginnings_are_read_again() -> None:
    cache = PrefixCache(min_rows=8)
    rows = Rows.of(Sequence.of_text(list(range(20))))
    cache.put(Rows.of(Sequence.of_text(list(range(7)))), lambda: pytest.fail("too short to be of use"))
    cache.put(rows, lambda: past(20))
    assert cache.find(Rows.of(Sequence.of_text([*range(7), 99, 99]))) is None
    found = cache.find(Rows.of(Sequence.of_text([*range(8), 99, 99])))
    assert found is not None
    assert (found.rows, cache.hits, cache.rows_reused) == (8, 1, 8)


def test_wrong_sizes_and_a_second_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        PrefixCache(-1)
    with pytest.raises(ConfigError, match="min_rows"):
        PrefixCache(min_rows=0)
    cache = PrefixCache()
    first, second = tiny_chat(prefixes=cache), tiny_chat(prefixes=cache)
    first.chat("one", max_new_tokens=1)
    with pytest.raises(ConfigError, match="of one model"):
        second.chat("two", max_new_tokens=1)


def test_other_weights_forget_everything() -> None:
    warm, question = tiny_chat(prefixes=PrefixCache(min_rows=4)), ask("What is it?", picture())
    before = warm.chat(question, max_new_tokens=4)
    assert warm.chat(question, max_new_tokens=4).usage["reused_tokens"] > 10
    with torch.no_grad():
        warm.model.trunk.layers[0].ffn.down.weight.mul_(-1)
    after = warm.chat(question, max_new_tokens=4)
    assert after.usage["reused_tokens"] == 0
    assert after.token_ids != before.token_ids
    warm.model.trunk.layers[1].ffn.down = torch.nn.Linear(32, 24, bias=False)
    assert warm.chat(question, max_new_tokens=4).usage["reused_tokens"] == 0


# --- the contracts -------------------------------------------------------------------------------------------------


class Watched:
    """A model whose head tells which hidden states it reads."""

    def __init__(self, model: CausalVLM) -> None:
        self.model, self.states = model, []
        step = model.head.step

        def watched(hidden_NC, *rest):
            self.states.append(hidden_NC)
            return step(hidden_NC, *rest)

        model.head.step = watched  # type: ignore[method-assign]


def another_question(prompt: Sequence, skeleton: Skeleton) -> Sequence:
    """The same beginning, other words at the end."""
    text = replace(prompt, ids_T=torch.cat([prompt.ids_T[:-1], (prompt.ids_T[-1:] + 1) % 30]))
    return extend(text, Sequence.of_text([3, 9, 4]))


@pytest.mark.parametrize(
    "skeleton",
    [internvl.SKELETON, pvc.SKELETON, hovle.PRE, hovle.POST, more3d.SKELETON],
    ids=lambda s: s.name,
)
def test_states_after_a_reused_beginning_equal_those_of_a_full_reading(skeleton: Skeleton) -> None:
    watched = Watched(skeleton.build())
    model = watched.model
    for prompt in skeleton.documents(False):
        prefixes = PrefixCache(min_rows=1)
        first = generate(model, [prompt], limit=4, prefixes=prefixes)[0]
        for follow in (
            another_question(prompt, skeleton),
            extend(extend(prompt, Sequence.of_text(first)), Sequence.of_text([5, 6])),  # the next turn
        ):
            watched.states.clear()
            run = Decoding(model, [follow], limit=3, prefixes=prefixes)
            expected = len(prompt) - 1 if len(follow) == len(prompt) + 3 else len(prompt) + 3
            assert run.reused(0) == expected
            ids = [e.id for events in iter(run.step, []) for e in events]
            whole = follow
            for n, token in enumerate(ids):
                with torch.inference_mode():
                    hidden = model.hidden(whole)[-1]
                torch.testing.assert_close(watched.states[n][0], hidden, rtol=1e-5, atol=1e-8)
                whole = extend(whole, Sequence.of_text([token or 0]))


def test_frames_that_see_earlier_ones_are_encoded_with_them() -> None:
    """PVC: two videos that begin alike share no frame, for a cut inside the group would leave later ones blind."""
    model = pvc.build()
    frames = MediaBatch(noise(3, 3, pvc.SIDE, pvc.SIDE, seed=1), torch.tensor([0.0, 1.0, 2.0]))
    film: list = [1, 2, ("video", VIDEO, 1, 1), 3, ("video", VIDEO, 1, 1), 4]

    def shown(rows: list, count: int) -> Sequence:
        laid = document(rows, {"video": frames.items(0, count)}, train=False, group=0)
        return replace(laid, spans=tuple(replace(s, key=f"frame {s.first}") for s in laid.spans))

    short, longer = shown([*film, 5], 2), shown([*film, ("video", VIDEO, 1, 1), 5], 3)
    prefixes = PrefixCache(min_rows=1)
    generate(model, [short], limit=2, prefixes=prefixes)
    run = Decoding(model, [longer], limit=3, prefixes=prefixes)
    assert run.reused(0) == 2
    assert [[e.id for events in iter(run.step, []) for e in events]] == generate(model, [longer], limit=3)


def test_heads_with_a_state_and_kept_states_read_everything() -> None:
    prefixes = PrefixCache(min_rows=1)
    prompts = synergen.documents(False)
    for _ in range(2):
        generate(synergen.build(), prompts, limit=3, prefixes=prefixes)
    model = more3d.build()
    for _ in range(2):
        run = Decoding(model, more3d.documents(False), limit=3, prefixes=prefixes, keep_hidden=True)
        while run.step():
            pass
    assert (len(prefixes), prefixes.hits) == (0, 0)


@pytest.mark.parametrize("scaling", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rotations_that_depend_on_the_length_are_reused_only_below_it(scaling: dict) -> None:
    model = tiny_model(rope_scaling=scaling, max_positions=16)
    assert steady_length(model) == 16
    prefixes = PrefixCache(min_rows=1)
    prompt = Sequence.of_text([1, 2, 3, 4, 5, 6])
    generate(model, [prompt], limit=20, prefixes=prefixes)  # might come to be longer
    assert len(prefixes) == 0
    generate(model, [prompt], limit=4, prefixes=prefixes)
    assert len(prefixes) == 1
    short, long = Sequence.of_text([1, 2, 3, 4, 9, 9]), Sequence.of_text([1, 2, 3, 4, *range(14)])
    for follow, limit, reused in ((short, 8, 4), (short, 12, 0), (long, 4, 0)):
        run = Decoding(model, [follow], limit=limit, prefixes=prefixes)
        assert run.reused(0) == reused
        ids = [e.id for events in iter(run.step, []) for e in events]
        assert [ids] == generate(model, [follow], limit=limit)
    assert steady_length(tiny_model()) is None


# --- ChatModel -----------------------------------------------------------------------------------------------------


def pair() -> tuple[ChatModel, ChatModel]:
    """A model that remembers, and its twin that reads everything."""
    return tiny_chat(prefixes=PrefixCache(min_rows=4)), tiny_chat(prefixes=PrefixCache(0))


def test_a_second_question_about_a_picture_is_answered_alike() -> None:
    warm, cold = pair()
    shown = picture()
    first = warm.chat(ask("What is it?", shown), max_new_tokens=6)
    assert (first.usage["reused_tokens"], warm.prefixes.hits) == (0, 0)
    for text in ("What is it not?", "Where?", "What is it?"):
        for options in ({}, {"temperature": 1.0, "seed": 4, "repetition_penalty": 1.3}):
            question = ask(text, shown)
            reply = warm.chat(question, max_new_tokens=12, **options)
            expected = cold.chat(question, max_new_tokens=12, **options)
            spans = warm.inputs(question).sequence.spans
            assert reply.usage["reused_tokens"] >= spans[0].start + spans[0].length
            assert reply.token_ids == expected.token_ids
            assert {**reply.usage, "reused_tokens": 0} == expected.usage
    other = warm.chat(ask("What is it?", picture(seed=1)), max_new_tokens=6)
    assert other.usage["reused_tokens"] == warm.inputs(ask("", shown)).sequence.spans[0].start
    assert other.token_ids == cold.chat(ask("What is it?", picture(seed=1)), max_new_tokens=6).token_ids
    assert warm.prefixes.hits == 7


def test_the_encoder_is_not_asked_for_a_picture_that_was_read() -> None:
    warm, _ = pair()
    warm.chat(ask("What is it?", picture()), max_new_tokens=2)
    seen = warm.features.hits + warm.features.misses
    warm.chat(ask("And where?", picture()), max_new_tokens=2)
    assert warm.features.hits + warm.features.misses == seen


def test_the_next_turn_reads_only_what_is_new() -> None:
    warm, cold = pair()
    messages = ask("Say something", picture())
    said = 0
    for text in ("More", "And more", "The end"):
        reply = warm.chat(messages, max_new_tokens=9)
        assert reply.token_ids == cold.chat(messages, max_new_tokens=9).token_ids
        assert reply.usage["reused_tokens"] >= said
        said = reply.usage["prompt_tokens"]
        answer = {"role": "assistant", "content": reply.text or "-"}
        messages = [*messages, answer, {"role": "user", "content": text}]


def test_stream_and_batch_use_it_too() -> None:
    warm, cold = pair()
    questions = [ask(text, picture()) for text in ("One?", "Two?", "Three?")]
    warm.chat(questions[0], max_new_tokens=4)
    replies = warm.batch(questions, max_new_tokens=5)
    assert [r.usage["reused_tokens"] > 10 for r in replies] == [True] * 3
    assert [r.token_ids for r in replies] == [cold.chat(q, max_new_tokens=5).token_ids for q in questions]
    assert "".join(warm.stream(questions[1], max_new_tokens=5)) == replies[1].text
    assert warm.prefixes.hits == 4


def test_a_batch_about_one_picture_reads_it_once() -> None:
    """Prompts are remembered when they are read, not only when their answers end."""
    warm = tiny_chat(prefixes=PrefixCache(min_rows=4))
    queue = warm.queue(max_rows=40)  # one prompt a step
    for n in range(4):
        queue.submit(ask(f"Question {n}?", picture(90, 30)), max_new_tokens=20)
    reused = {p.ticket: p.reply.usage["reused_tokens"] for p in queue if p.reply}
    assert reused[0] == 0
    assert min(reused[n] for n in (2, 3)) > 20


def test_deterministic_answers_never_use_it() -> None:
    plain = tiny_chat(deterministic=True, prefixes=PrefixCache(min_rows=4))
    for _ in range(2):
        assert plain.chat(ask("What is it?", picture()), max_new_tokens=3).usage["reused_tokens"] == 0
    assert len(plain.prefixes) == 0
    warm, _ = pair()
    warm.chat(ask("What is it?", picture()), max_new_tokens=3)
    found = (len(warm.prefixes), warm.prefixes.hits)
    replies = warm.batch([ask("What is it?", picture())] * 2, max_new_tokens=3, deterministic=True)
    assert [r.usage["reused_tokens"] for r in replies] == [0, 0]
    assert (len(warm.prefixes), warm.prefixes.hits) == found


@pytest.mark.parametrize("passes", [0, 1, 3])
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_an_interrupted_stream_leaves_it_sane(
    passes: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm, cold = pair()
    question, follow = ask("Say something", picture()), ask("Say something else", picture())
    calls = iter(range(100))
    with monkeypatch.context() as patch:
        norm = warm.model.trunk.norm.forward if where == "trunk" else warm.model.head.logits

        def interrupted(x):
            if next(calls) == passes:
                raise KeyboardInterrupt
            return norm(x)

        target = (warm.model.trunk.norm, "forward") if where == "trunk" else (warm.model.head, "logits")
        patch.setattr(*target, interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(warm.stream(question, max_new_tokens=8))
    for messages in (question, follow):
        assert (
            warm.chat(messages, max_new_tokens=8).token_ids == cold.chat(messages, max_new_tokens=8).token_ids
        )
    closed = warm.stream(ask("Say it", picture(seed=3)), max_new_tokens=8)
    next(closed, None)
    closed.close()
    for text in ("Say it", "Say it again"):
        messages = ask(text, picture(seed=3))
        reply = warm.chat(messages, max_new_tokens=8)
        assert reply.usage["reused_tokens"] > 10  # the prompt was read
        assert reply.token_ids == cold.chat(messages, max_new_tokens=8).token_ids
