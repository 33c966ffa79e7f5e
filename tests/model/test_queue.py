"""The queue: requests that come and go, each answered as if it were alone."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from chiasm.data.sequence import MediaBatch
from chiasm.errors import ChiasmError, ConfigError, ContextOverflowError, DataError, ImageError, UsageError
from chiasm.model import generate
from chiasm.model.answer import Reply
from chiasm.model.chat import ChatModel
from chiasm.model.prefix import PrefixCache
from chiasm.model.quantize import quantize_model
from chiasm.model.queue import Piece, Queue
from chiasm.nn.sampling import Sampling
from tiny_chat import ask, picture, ragged, tiny_chat


@pytest.fixture
def model() -> ChatModel:
    return tiny_chat(prefixes=PrefixCache(0))


def finish(queue: Queue, pieces: list[Piece] | None = None) -> dict[int, Reply | Exception]:
    """Drive to the end: the last piece of every ticket, of which there must be one; texts must join to the reply's."""
    pieces = [*(pieces or []), *queue]
    last: dict[int, Any] = {}
    texts: dict[int, str] = {}
    for piece in pieces:
        assert piece.ticket not in last, "a piece came after the last one"
        texts[piece.ticket] = texts.get(piece.ticket, "") + piece.text
        if piece.last:
            last[piece.ticket] = piece.reply or piece.error
            assert piece.reply is None or piece.reply.text == texts[piece.ticket]
    assert texts.keys() == last.keys()
    assert not queue.busy
    return last


def equal(reply: Any, expected: Reply) -> bool:
    """The same answer; how much of the prompt was remembered may differ."""
    assert isinstance(reply, Reply), reply
    usage = {**reply.usage, "reused_tokens": 0}
    return (reply.text, reply.token_ids, reply.finish, usage) == (
        expected.text,
        expected.token_ids,
        expected.finish,
        {**expected.usage, "reused_tokens": 0},
    )


@pytest.fixture(scope="module")
def one_by_one() -> list[Reply]:
    """The answers to `ragged(80, seed=3)`, each alone and cold."""
    cold = tiny_chat(prefixes=PrefixCache(0))
    return [cold.chat(messages, **options) for messages, options in ragged(80, seed=3)]


@pytest.mark.parametrize(("remember", "max_rows"), [(False, 512), (True, 64)], ids=["cold", "prefixes"])
def test_cancellations_change_no_other_answer(remember: bool, max_rows: int, one_by_one: list[Reply]) -> None:
    """64 ragged requests, some with pictures, of all samplings and limits; others come late; a third is cancelled."""
    model = tiny_chat(prefixes=PrefixCache(min_rows=16) if remember else PrefixCache(0))
    requests = ragged(80, seed=3)
    assert len({len(r.token_ids) for r in one_by_one}) > 10
    assert {r.finish for r in one_by_one} == {"stop", "length"}

    quiet = model.queue(max_rows=max_rows)
    tickets = [quiet.submit(messages, **options) for messages, options in requests]
    undisturbed = finish(quiet)
    assert all(equal(undisturbed[t], e) for t, e in zip(tickets, one_by_one, strict=True))

    queue = model.queue(max_rows=max_rows)
    tickets = [queue.submit(messages, **options) for messages, options in requests[:64]]
    gone, pieces, random = set(), [], torch.Generator().manual_seed(1)
    for step in range(24):
        pieces += queue.step()
        if step < 8:  # these come late
            tickets += [queue.submit(m, **o) for m, o in requests[64 + 2 * step : 66 + 2 * step]]
        for _ in range(2):
            ticket = tickets[int(torch.randint(len(tickets), (), generator=random))]
            gone |= {ticket} if queue.cancel(ticket) else set()
    replies = finish(queue, pieces)
    assert 12 < len(gone) < 50
    cut = 0
    for ticket, expected in zip(tickets, one_by_one, strict=True):
        reply = replies[ticket]
        if ticket not in gone:
            assert equal(reply, expected)
            continue
        assert isinstance(reply, Reply)
        assert reply.finish == "cancelled"
        assert reply.token_ids == expected.token_ids[: len(reply.token_ids)]
        assert expected.text.startswith(reply.text)
        cut += 0 < len(reply.token_ids) < len(expected.token_ids)
    assert cut >= 4  # in the middle, not only before they began


def test_an_empty_queue(model: ChatModel) -> None:
    queue = model.queue()
    assert not queue.busy
    assert queue.step() == []
    assert list(queue) == []
    assert queue.wait(0.01) is False
    assert model.batch([]) == []


@pytest.mark.parametrize("how", ["int8", "w8a8+vision-w8a8"])
def test_nor_do_they_with_rounded_weights(how: str) -> None:
    cold = tiny_chat(prefixes=PrefixCache(0))
    model = tiny_chat(prefixes=PrefixCache(min_rows=16))
    for chat in (cold, model):
        quantize_model(chat.model, how)
    requests = ragged(64, seed=5, longest=150)
    alone = [cold.chat(messages, **options) for messages, options in requests]
    queue = model.queue(max_rows=64)
    tickets = [queue.submit(messages, **options) for messages, options in requests]
    pieces: list[Piece] = []
    gone = set()
    for step in range(12):
        pieces += queue.step()
        gone |= {tickets[5 * step]} if queue.cancel(tickets[5 * step]) else set()
    replies = finish(queue, pieces)
    assert len(gone) > 3
    for ticket, expected in zip(tickets, alone, strict=True):
        assert ticket in gone or equal(replies[ticket], expected)


@pytest.mark.parametrize("fails", range(8))
def test_a_cache_that_finds_no_memory_changes_no_answer(
    monkeypatch: pytest.MonkeyPatch, model: ChatModel, fails: int
) -> None:
    """The n-th allocation of a growing cache fails: who joined ends with the error, the other as if alone."""
    expected = model.chat(ask("The first one?"), max_new_tokens=40)
    queue = model.queue()
    first = queue.submit(ask("The first one?"), max_new_tokens=40)
    pieces = [piece for _ in range(5) for piece in queue.step()]
    plain, count = torch.Tensor.new_zeros, 0

    def scarce(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == fails + 1:
            raise torch.OutOfMemoryError("no memory")
        return plain(self, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", scarce)
    second = queue.submit(ask("The second one, and it is a little longer?"), max_new_tokens=40)
    pieces += queue.step()
    monkeypatch.undo()
    replies = finish(queue, pieces)
    for ticket in (first, second):
        if not isinstance(replies[ticket], torch.OutOfMemoryError):
            alone = (
                expected
                if ticket == first
                else model.chat(ask("The second one, and it is a little longer?"), max_new_tokens=40)
            )
            assert equal(replies[ticket], alone)
    assert count > fails or fails > 3


def test_cancel_before_the_start_twice_and_after_the_end(model: ChatModel) -> None:
    queue = model.queue(max_running=1)
    first, second = (queue.submit(ask(t), max_new_tokens=4) for t in ("one", "two"))
    assert queue.cancel(second)
    assert not queue.cancel(second)
    assert not queue.cancel(99)
    replies = finish(queue)
    assert equal(replies[first], model.chat(ask("one"), max_new_tokens=4))
    reply = replies[second]
    assert isinstance(reply, Reply)
    assert (reply.text, reply.token_ids, reply.finish) == ("", [], "cancelled")
    first_reply = replies[first]
    assert isinstance(first_reply, Reply)
    assert reply.usage == dict.fromkeys(first_reply.usage, 0)
    assert not queue.cancel(first)
    assert list(queue) == []


def test_a_wrong_request_fails_alone(model: ChatModel, tmp_path) -> None:
    (tmp_path / "no.png").write_text("not a picture")
    queue = model.queue(max_tokens=600)
    wrong = {
        queue.submit([{"role": "nobody", "content": "hi"}]): DataError,
        queue.submit("What is it?", [tmp_path / "no.png"]): ImageError,
        queue.submit("What is it?", "photo.png"): UsageError,
        queue.submit("long " * 600): ContextOverflowError,  # for the model
        queue.submit("hi", max_new_tokens=590): ContextOverflowError,  # for the queue
        queue.submit(3): ChiasmError,
    }
    good = [queue.submit(ask(t), max_new_tokens=5) for t in ("one", "two")]
    replies = finish(queue)
    for ticket, kind in wrong.items():
        assert isinstance(replies[ticket], kind)
        assert "\n" not in str(replies[ticket])
    for ticket, text in zip(good, ("one", "two"), strict=True):
        assert equal(replies[ticket], model.chat(ask(text), max_new_tokens=5))
    with pytest.raises(UsageError, match="max_tokens"):
        queue.submit("hi", max_tokens=3)
    with pytest.raises(UsageError, match="laid out already"):
        queue.submit(model.inputs("hi"), [picture()])
    with pytest.raises(ConfigError, match="max_running must be at least 1"):
        model.queue(max_running=0)
    assert not queue.busy


def test_inputs_of_another_model_fail_alone(model: ChatModel) -> None:
    """What the encoder refuses when a request joins is that request's own affair."""
    laid = model.inputs(ask("What?", picture()))
    tiles = torch.zeros(9, 3, 5, 6, dtype=torch.uint8)
    spans = tuple(replace(span, key="") for span in laid.sequence.spans)
    sequence = replace(laid.sequence, spans=spans, media={"image": MediaBatch(tiles)})
    broken = replace(laid, sequence=sequence)
    queue = model.queue()
    good = queue.submit(ask("one"), max_new_tokens=6)
    pieces = queue.step()
    bad, late = queue.submit(broken), queue.submit(ask("two"), max_new_tokens=6)
    replies = finish(queue, pieces)
    assert isinstance(replies[bad], ConfigError)
    assert equal(replies[good], model.chat(ask("one"), max_new_tokens=6))
    assert equal(replies[late], model.chat(ask("two"), max_new_tokens=6))


def test_first_come_first_served_within_the_bounds(model: ChatModel) -> None:
    requests = ragged(40, seed=5)
    queue = model.queue(max_running=6, max_tokens=900, max_rows=48)
    tickets = [queue.submit(messages, **options) for messages, options in requests]
    pieces, seen = [], 0
    while queue.busy:
        pieces += queue.step()
        assert queue.running <= 6
        seen = max(seen, queue.running)
        if queue._run is not None:
            trunk = queue._run._cache.trunk
            assert all(x is None or x.shape[0] * x.shape[2] <= 900 for x in (*trunk._k, *trunk._v))
    assert seen >= 3
    replies = finish(queue, pieces)
    assert all(equal(replies[t], model.chat(m, **o)) for t, (m, o) in zip(tickets, requests, strict=True))
    assert queue._run is None  # an idle queue holds no cache


def test_a_thousand_conversations_take_few_slots(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    most, laid = 0, 0
    advance, inputs = Queue._advance, ChatModel.inputs

    def watched(self: Queue) -> None:
        nonlocal most
        advance(self)
        if self._run is not None:
            most = max(most, self._run._cache.trunk.slots)
            assert laid - (1000 - self.waiting) <= 1  # laid out when their turn comes

    def counted(self: ChatModel, *rest: Any):
        nonlocal laid
        laid += 1
        return inputs(self, *rest)

    monkeypatch.setattr(Queue, "_advance", watched)
    monkeypatch.setattr(ChatModel, "inputs", counted)
    questions = [f"Question {n % 7}?" for n in range(1000)]
    replies = model.batch(questions, max_new_tokens=2)
    assert most <= 64
    expected = {q: model.chat(q, max_new_tokens=2) for q in questions[:7]}
    assert all(equal(r, expected[q]) for q, r in zip(questions, replies, strict=True))


def test_batch_raises_what_is_wrong_and_answers_what_is_large(model: ChatModel, tmp_path) -> None:
    with pytest.raises(DataError, match="nobody"):
        model.batch(["hi", [{"role": "nobody", "content": "hi"}]])
    with pytest.raises(ImageError):
        model.batch(["hi", ask("what?", tmp_path / "absent.png")], max_new_tokens=1)
    free = tiny_chat(max_length=None, prefixes=PrefixCache(0))
    replies = free.batch(["hi", "ho"], max_new_tokens=100_000, stop=("a", "e", "t", " "))
    assert [r.finish for r in replies] == ["stop", "stop"]


def test_a_short_request_does_not_wait_for_a_long_prompt(model: ChatModel) -> None:
    queue = model.queue(max_rows=16)
    long = queue.submit("word " * 100, max_new_tokens=3)
    queue.step()
    short = queue.submit("hi", max_new_tokens=3)
    ends = [piece.ticket for piece in queue if piece.last]
    assert ends == [short, long]


def test_a_deterministic_model_answers_with_the_bits_of_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_chat(deterministic=True)
    requests = ragged(9, seed=2)
    rows: list[torch.Tensor] = []
    logits = model.model.head.logits
    monkeypatch.setattr(model.model.head, "logits", lambda hidden: rows.append(logits(hidden)) or rows[-1])
    alone = [model.chat(messages, **options) for messages, options in requests]
    expected = torch.cat(rows)
    rows.clear()
    queue = model.queue(max_rows=16)
    tickets = [queue.submit(messages, **options) for messages, options in requests]
    replies = finish(queue)
    assert [replies[ticket] for ticket in tickets] == alone
    assert torch.equal(torch.cat(rows), expected)


def test_a_failing_pass_ends_what_ran_and_nothing_else(
    model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = model.queue(max_running=2)
    tickets = [queue.submit(ask(t), max_new_tokens=6) for t in ("one", "two", "three")]
    pieces = queue.step()
    with monkeypatch.context() as patch:
        patch.setattr(
            model.model.trunk, "forward", lambda *x, **y: (_ for _ in ()).throw(MemoryError("no memory"))
        )
        pieces += queue.step()
    assert [p.ticket for p in pieces if p.error] == tickets[:2]
    with monkeypatch.context() as patch:
        patch.setattr(
            model.model.trunk, "forward", lambda *x, **y: (_ for _ in ()).throw(KeyboardInterrupt())
        )
        with pytest.raises(KeyboardInterrupt):
            queue.step()
    late = queue.submit(ask("four"), max_new_tokens=6)
    replies = finish(queue, pieces)
    assert isinstance(replies[tickets[0]], MemoryError)
    assert isinstance(replies[tickets[2]], ChiasmError)
    assert equal(replies[late], model.chat(ask("four"), max_new_tokens=6))


def test_an_answer_without_numbers_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything of it remembered."""
    model = tiny_chat(prefixes=PrefixCache(min_rows=4))
    expected = {t: model.chat(ask(t), max_new_tokens=6) for t in ("one", "two")}
    choose = generate.choose

    def strict(logits_V: torch.Tensor, sampling: Sampling, *rest: Any) -> int:
        if sampling.seed == 7:
            raise ConfigError("no numbers")
        return choose(logits_V, sampling, *rest)

    monkeypatch.setattr(generate, "choose", strict)
    queue, kept = model.queue(), len(model.prefixes)
    bad = queue.submit("Something else altogether", max_new_tokens=6, seed=7, temperature=1.0)
    good = {queue.submit(ask(t), max_new_tokens=6): t for t in expected}
    late = queue.submit("Something else altogether", max_new_tokens=2)
    replies = finish(queue)
    assert str(replies[bad]) == "no numbers"
    assert all(equal(replies[ticket], expected[t]) for ticket, t in good.items())
    assert isinstance(replies[late], Reply)
    assert len(model.prefixes) == kept + 1  # that of the late one
    with pytest.raises(ConfigError, match="no numbers"):
        model.chat("one", seed=7, temperature=1.0)


def test_others_may_submit_and_cancel_while_one_drives(model: ChatModel) -> None:
    queue = model.queue(max_running=8)
    requests = ragged(48, seed=8, longest=80)
    tickets: dict[int, int] = {}
    cancelled: set[int] = set()
    lock = threading.Lock()

    def client(part: int) -> None:
        for n in range(part, 48, 3):
            ticket = queue.submit(requests[n][0], **requests[n][1])
            with lock:
                tickets[ticket] = n
            if n % 6 == 5 and queue.cancel(ticket):
                with lock:
                    cancelled.add(ticket)

    threads = [threading.Thread(target=client, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    pieces = []
    while any(t.is_alive() for t in threads) or queue.busy:
        if queue.wait(0.05):
            pieces += queue.step()
    replies = finish(queue, pieces)
    assert replies.keys() == tickets.keys()
    for ticket, n in tickets.items():
        if ticket not in cancelled:
            assert equal(replies[ticket], model.chat(requests[n][0], **requests[n][1]))


def test_only_one_thread_drives(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = model.queue()
    queue.submit("hi", max_new_tokens=2)
    errors: list[Exception] = []
    layout = ChatModel.inputs

    def second_driver(self: ChatModel, *rest: Any):
        def drive() -> None:
            try:
                queue.step()
            except UsageError as error:
                errors.append(error)

        thread = threading.Thread(target=drive)
        thread.start()
        thread.join()
        return layout(self, *rest)

    monkeypatch.setattr(ChatModel, "inputs", second_driver)
    finish(queue)
    assert ["another thread" in str(e) for e in errors] == [True]


def test_iteration_may_be_left_and_begun_again(model: ChatModel) -> None:
    queue = model.queue()
    for text in ("one", "two"):
        queue.submit(ask(text), max_new_tokens=5)
    pieces = []
    for piece in queue:
        pieces.append(piece)
        break
    finish(queue, pieces)
