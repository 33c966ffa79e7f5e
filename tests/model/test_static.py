"""Passes of fixed shapes against the ragged ones: same hidden states, same answers, whoever joins and leaves."""

import gc
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.contracts.skeleton import LANGUAGE, initialise
from tests.tiny_chat import DYNAMIC, LONGROPE, ask, picture, ragged, tiny_chat, tiny_model

from chiasm.data.sequence import Sequence
from chiasm.model import generate as loop
from chiasm.model.causal import CausalVLM
from chiasm.model.generate import Decoding
from chiasm.model.placement import Placement, place
from chiasm.model.quantize import quantize_model
from chiasm.model.static import StaticPass, fits
from chiasm.nn.sampling import Sampling
from chiasm.systems.internvl.model import build_language_model

CPU = torch.device("cpu")


def started(model: CausalVLM, lengths: list[int]) -> Decoding:
    """Documents of these lengths, read, with one row waiting for each."""
    prompts = [Sequence.of_text(torch.arange(n) % 30 + n) for n in lengths]
    run = Decoding(model, prompts, limit=100)
    run.step()
    return run


@pytest.mark.parametrize(
    "facts", [{}, {"family": "qwen3", "qk_norm": True}, {"qkv_bias": True, "kv_heads": 1}]
)
@torch.inference_mode()
def test_a_pass_equals_the_ragged_one(facts: dict) -> None:
    model = tiny_model(**facts)
    lengths = [3, 11, 7]
    wanted, got = started(model, lengths), started(model, lengths)
    cache = got._cache.trunk
    fixed = StaticPass(model, cache)
    for turn in range(4):
        slots = [0, 1, 2] if turn < 2 else [2, 0]  # someone has left
        tokens = [5 + turn, 6, 7][: len(slots)]
        positions = [float(cache.lengths[slot]) for slot in slots]
        rows = replace(Sequence.of_rows(list(tokens)), pos_T=torch.tensor(positions))
        there = wanted._cache.trunk
        slow = model.trunk(
            model.embedder(rows).x_TC,
            kind_T=rows.kind_T,
            segments=loop.Segments.of([1] * len(slots), slots),
            pos_T=rows.pos_T,
            cache=there,
        )
        fast = fixed(tokens, positions, slots)
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
        assert cache.lengths == there.lengths
        for (k, v), (k_there, v_there) in zip(cache.buffers(), there.buffers(), strict=True):
            for slot, n in enumerate(cache.lengths):
                torch.testing.assert_close(k[slot, :, :n], k_there[slot, :, :n], rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(v[slot, :, :n], v_there[slot, :, :n], rtol=1e-10, atol=1e-10)


@torch.inference_mode()
def test_a_pass_knows_its_cache() -> None:
    model = tiny_model()
    run = started(model, [4, 5])
    cache = run._cache.trunk
    fixed = StaticPass(model, cache)
    assert fixed.matches(cache)
    assert fixed.room()
    while fixed.room():
        fixed([1, 2], [float(n) for n in cache.lengths], [0, 1])
    assert max(cache.lengths) == fixed.capacity
    cache.resize([0], 1)
    assert not fixed.matches(cache)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many documents each pass of fixed shapes reads."""
    calls: list[int] = []
    plain = StaticPass.__call__

    def call(self: StaticPass, ids, pos, slots) -> torch.Tensor:
        calls.append(len(slots))
        return plain(self, ids, pos, slots)

    monkeypatch.setattr(StaticPass, "__call__", call)
    return calls


def test_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged requests that join and leave, pictures, samplings; the cache grows and shrinks meanwhile."""
    calls = counted(monkeypatch)
    asked = [(messages, {**options, "max_new_tokens": 40}) for messages, options in ragged(12, longest=60)]
    answers = {}
    for static in (False, True):
        chat = tiny_chat(prefixes=None)
        chat.model.static = static
        queue = chat.queue(max_running=5)
        tickets = [queue.submit(messages, **options) for messages, options in asked]
        done = {piece.ticket: piece.reply for piece in queue if piece.last}
        answers[static] = [done[ticket].token_ids for ticket in tickets]
        assert bool(calls) is static
    assert answers[True] == answers[False]
    assert len(calls) > 20
    assert len(set(calls)) > 1


def test_one_long_answer_outgrows_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    monkeypatch.setattr(loop, "ROOM", 8)
    answers = []
    for static in (False, True):
        chat = tiny_chat()
        chat.model.static = static
        answers.append(chat.chat(ask("Hello?", picture()), max_new_tokens=150).token_ids)
    assert answers[0] == answers[1]
    assert len(calls) > 60


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        *((torch.float32, how) for how in ("int8", "w8a8", "int4")),
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float16, "int8"),
    ],
)
def test_other_arithmetics_decode_in_fixed_shapes_too(monkeypatch: pytest.MonkeyPatch, dtype, how) -> None:
    calls = counted(monkeypatch)
    answers = []
    for static in (False, True):
        chat = tiny_chat()
        chat.model.to(dtype)
        if how:
            quantize_model(chat.model, how)
        chat.static = static
        assert chat.static is static
        answers.append(chat.chat("Hello?", max_new_tokens=30).token_ids)
    assert answers[0] == answers[1]
    assert len(calls) > 15


@torch.inference_mode()
def test_a_pass_is_let_go_with_its_cache() -> None:
    """Its memory must not outlive the cache that it was made for."""
    model = tiny_model()
    model.static = True
    prompts = [Sequence.of_text(torch.arange(n)) for n in (3, 4, 5, 6)]
    run = Decoding(model, prompts, limit=[30, 30, 60, 60])
    for _ in range(20):
        run.step()
    assert run._static is not None
    old = weakref.ref(run._cache.trunk.buffers()[0][0])
    run.cancel(0), run.cancel(1), run.cancel(2)
    run.step()
    assert run._static is None
    gc.collect()
    assert old() is None


def test_models_that_do_not_fit_are_known() -> None:
    assert fits(tiny_model())
    assert fits(initialise(build_language_model(LANGUAGE)))
    for scaling in (DYNAMIC, LONGROPE):
        assert not fits(tiny_model(rope_scaling=scaling))
    several = tiny_model(layers=2)
    place(several, Placement(several, (CPU, torch.device("meta")), torch.float64))
    assert not fits(several)
    chat = tiny_chat(language={"rope_scaling": DYNAMIC})
    chat.model.static = True  # asked for, and not possible: as without
    assert len(chat.chat("Hello?", max_new_tokens=20).token_ids) == 20


def test_the_likeliest_of_all_rows_are_those_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Sequence.of_text(torch.arange(n)) for n in (3, 4, 5)]
    samplings = [Sampling(), Sampling(temperature=1.0, seed=3), Sampling(repetition_penalty=1.5)]
    run = Decoding(tiny_model(), prompts, sampling=samplings, limit=12)
    together = [[event.id for event in run.step()] for _ in range(12)]
    monkeypatch.setattr(
        loop._Picker,
        "rows",
        lambda self, logits, docs: [self(row, doc) for row, doc in zip(logits, docs, strict=True)],
    )
    run = Decoding(tiny_model(), prompts, sampling=samplings, limit=12)
    assert together == [[event.id for event in run.step()] for _ in range(12)]


COMPILED = """
import torch
from tests.contracts.skeleton import initialise
from tests.model.test_static import started
from tests.tiny_chat import tiny_model
from chiasm.model.static import StaticPass

with torch.inference_mode():
    model = tiny_model()
    eager, compiled = started(model, [3, 9]), started(model, [3, 9])
    slow, fast = StaticPass(model, eager._cache.trunk), StaticPass(model, compiled._cache.trunk, compile=True)
    for turn in range(3):
        positions = [float(n) for n in slow._cache.lengths]
        got, wanted = (each([turn, 2], positions, [0, 1]) for each in (fast, slow))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # angles are of float32
print("equal")
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_pass_equals_the_eager_one() -> None:
    """In a process of its own: the shape checks of the tests cannot be compiled."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=root,
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.gpu
@torch.inference_mode()
def test_a_replayed_graph_equals_the_eager_pass() -> None:
    model = tiny_model().to("cuda", torch.float32)
    eager, replayed = started(model, [3, 9]), started(model, [3, 9])
    slow = StaticPass(model, eager._cache.trunk, graph=False)
    fast = StaticPass(model, replayed._cache.trunk)
    for turn in range(5):
        positions = [float(n) for n in slow._cache.lengths]
        got = fast([turn, 2], positions, [0, 1]).clone()
        torch.testing.assert_close(got, slow([turn, 2], positions, [0, 1]), rtol=1e-4, atol=1e-5)
