"""Documents that join, are read in chunks, leave, and take each other's slots: nobody's answer changes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.contracts import hovle, internvl, more3d, pvc, synergen
from tests.contracts.skeleton import Skeleton, extend

from chiasm.data.sequence import MediaBatch, Sequence
from chiasm.errors import ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.model.generate import Decoding, Event, generate
from chiasm.nn.attention import KVCache
from chiasm.nn.sampling import Sampling
from tiny_chat import LONGROPE, SWITCH, tiny_model

SKELETONS = [internvl.SKELETON, pvc.SKELETON, hovle.PRE, hovle.POST, synergen.SKELETON, more3d.SKELETON]


@pytest.fixture(params=SKELETONS, ids=lambda s: s.name)
def skeleton(request: pytest.FixtureRequest) -> Skeleton:
    return request.param


def words(length: int, seed: int = 0) -> Sequence:
    ids = torch.randint(1, 30, (length,), generator=torch.Generator().manual_seed(seed))
    return Sequence.of_text(ids.tolist())


def alone(model: CausalVLM, prompt: Sequence, limit: int, sampling: Sampling | None = None) -> list:
    return drain(Decoding(model, [prompt], limit=limit, sampling=sampling))[0]


def drain(run: Decoding, out: dict[int, list] | None = None) -> dict[int, list]:
    out = {} if out is None else out
    while events := run.step():
        collect(events, out)
    return out


def collect(events: list[Event], out: dict[int, list]) -> None:
    for event in events:
        out.setdefault(event.doc, []).append((event.id, event.codes))


def without_cache(model: CausalVLM, prompt: Sequence, limit: int) -> list:
    """The slow twin: everything is read again for every token."""
    out = []
    with torch.inference_mode():
        for _ in range(limit):
            token = int(model.head.logits(model.hidden(prompt)[-1:])[0].argmax())
            out.append((token, None))
            prompt = extend(prompt, Sequence.of_text([token]))
    return out


def test_late_joins_equal_answers_alone(skeleton: Skeleton) -> None:
    model, prompts = skeleton.build(), skeleton.documents(False)
    expected = [alone(model, p, 4 + n) for n, p in enumerate(prompts)]
    run, got = Decoding(model), {}
    assert run.step() == []
    for n, prompt in enumerate(prompts):
        assert run.add(prompt, limit=4 + n) == n
        collect(run.step(), got)
        collect(run.step(), got)
    again = run.add(prompts[0], limit=4)  # by now others have ended, and it takes a slot of theirs
    drain(run, got)
    assert [got[n] for n in range(len(prompts))] == expected
    assert got[again] == expected[0]
    assert run.live == []


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7])
def test_prompts_in_chunks_equal_whole_ones(skeleton: Skeleton, max_rows: int) -> None:
    """Cuts fall inside pictures too; an embedder with layers of its own has read the whole prompt by then."""
    model, prompts = skeleton.build(), skeleton.documents(False)
    samplings = [Sampling(temperature=1.0, seed=n) for n in range(len(prompts))]
    whole = drain(Decoding(model, prompts, sampling=samplings, limit=5))
    run = Decoding(model, prompts, sampling=samplings, limit=5, max_rows=max_rows)
    passes = []
    trunk = model.trunk.forward
    model.trunk.forward = lambda x, **rest: passes.append(len(x)) or trunk(x, **rest)  # type: ignore[method-assign]
    assert drain(run) == whole
    assert sum(passes) == sum(len(p) for p in prompts) + 4 * len(prompts)  # no row is read twice
    if skeleton.name != "synergen":  # heads with a state see whole prompts
        assert max(passes) <= max(max_rows, len(prompts)) + len(prompts)


def test_a_long_prompt_neither_stops_the_others_nor_waits_for_them() -> None:
    model = tiny_model()
    run = Decoding(model, [words(4, 1)], limit=50, max_rows=6)
    run.step()
    long = run.add(words(60, 2), limit=3)
    short = run.add(words(5, 3), limit=3)
    order = [[event.doc for event in run.advance()] for _ in range(16)]
    assert all(0 in docs for docs in order)
    first = {doc: next(n for n, docs in enumerate(order) if doc in docs) for doc in (long, short)}
    assert first[short] <= 1
    assert first[long] == 10


def test_cancelling_at_any_time_leaves_the_others_alone() -> None:
    model = tiny_model()
    prompts = [words(3 + 5 * n, n) for n in range(9)]
    expected = [alone(model, p, 12) for p in prompts]
    run, got = Decoding(model, prompts[:6], limit=12, max_rows=20), {}
    run.cancel(4)  # before it was read
    for step in range(30):
        if step == 1:
            run.add(prompts[6], limit=12)
            run.cancel(6)  # before it was read, too
        if step == 3:
            run.cancel(0)
            run.cancel(0)
            run.cancel(99)  # never was
            run.add(prompts[7], limit=12)
        if step == 4:
            run.add(prompts[8], limit=12)
            run.cancel(5)
        collect(run.advance(), got)
    run.cancel(1)  # has ended
    assert run.live == []
    for doc in (1, 2, 3, 7, 8):
        assert got[doc] == expected[doc]
    for doc in (0, 5):
        assert got[doc] == expected[doc][: len(got[doc])]
        assert len(got[doc]) < 12
    assert not {4, 6} & got.keys()


def test_a_slot_keeps_nothing_of_its_former_owner() -> None:
    """A NaN would reach the next owner through its mask (0 · NaN is NaN), as a longer neighbour makes it have one."""
    model = tiny_model()
    prompts = [words(30, 1), words(25, 2), words(5, 3)]
    run = Decoding(model, prompts[:2], limit=40)
    run.step()
    slot = 1
    with torch.inference_mode():
        for buffer in (*run._cache.trunk._k, *run._cache.trunk._v):
            buffer[slot, :, :26] = float("nan")
    run.cancel(1)
    third = run.add(prompts[2], limit=20)
    trunk = run._cache.trunk
    assert trunk.lengths[slot] == 0
    assert not any(x[slot].any() for x in (*trunk._k, *trunk._v) if x is not None)
    got = drain(run)
    assert got[third] == alone(model, prompts[2], 20)
    assert len(got[third]) == 20


def test_slots_are_reused_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    copied: list[int] = []
    resize = KVCache.resize
    monkeypatch.setattr(
        KVCache, "resize", lambda self, keep, *rest: copied.append(len(keep)) or resize(self, keep, *rest)
    )
    n = 32
    run = Decoding(model, [words(3, d) for d in range(n)], limit=[2 + d for d in range(n)])
    while run.step():
        pass
    assert sum(copied) <= 2 * n  # all the way down to none; before, it was n²/2
    assert len(copied) <= math.log2(n) + 2
    copied.clear()
    run = Decoding(model, [words(3, d) for d in range(8)], limit=50)
    for d in range(20):  # one leaves, one joins
        run.step()
        run.cancel(run.live[d % 8])
        run.add(words(4, d), limit=50)
    assert copied == []


@pytest.mark.parametrize("max_tokens", [60, 100, 400])
def test_the_cache_stays_within_its_rows(max_tokens: int) -> None:
    """Whatever came before, slots times rows stay below the bound when documents are let in by it."""
    model = tiny_model()
    random = torch.Generator().manual_seed(max_tokens)
    run, needs, got, asked = Decoding(model, max_tokens=max_tokens, max_running=8, max_rows=9), {}, {}, {}
    for seed in range(25):
        length, limit = (int(torch.randint(1, high, (), generator=random)) for high in (31, 29))
        while (needs and (len(needs) + 1) * max(length + limit, *needs.values()) > max_tokens) or len(
            needs
        ) == 8:
            collect(run.advance(), got)
            needs = {doc: need for doc, need in needs.items() if doc in run.live}
        doc = run.add(words(length, seed), limit=limit)
        needs[doc] = length + limit
        asked[doc] = words(length, seed), limit
        collect(run.advance(), got)
        trunk = run._cache.trunk
        assert trunk.slots <= 8
        for x in (*trunk._k, *trunk._v):
            assert x is not None
            assert x.shape[0] * x.shape[2] <= max_tokens
        needs = {doc: need for doc, need in needs.items() if doc in run.live}
    drain(run, got)
    for doc, (prompt, limit) in asked.items():
        assert got[doc] == alone(model, prompt, limit)


@pytest.mark.parametrize("max_rows", [None, 4])
def test_documents_cross_the_switch_while_others_go_on(max_rows: int | None) -> None:
    """A document that grows past Phi-3's first set of factors is read again, in a pass with its neighbours."""
    model = tiny_model(family="phi3", rope_scaling=LONGROPE, max_positions=64)
    lengths = (SWITCH - 3, SWITCH + 5, SWITCH, 2, SWITCH - 5)
    prompts = [words(n, n) for n in lengths]
    expected = [without_cache(model, p, 12) for p in prompts]
    run, got = Decoding(model, prompts[:3], limit=12, max_rows=max_rows), {}
    collect(run.advance(), got)
    collect(run.advance(), got)
    run.add(prompts[3], limit=12)
    collect(run.advance(), got)
    run.add(prompts[4], limit=12)
    drain(run, got)
    assert [got[n] for n in range(5)] == expected
    broken = tiny_model(family="phi3", rope_scaling=LONGROPE, max_positions=64)
    assert without_cache(broken, prompts[0], 2) == expected[0][:2]
    longer = LONGROPE | {"original_max_position_embeddings": 60}
    assert (
        without_cache(tiny_model(family="phi3", rope_scaling=longer, max_positions=64), prompts[0], 12)
        != expected[0]
    )


def test_a_document_that_cannot_be_embedded_leaves_no_trace() -> None:
    model = internvl.SKELETON.build()
    good = internvl.SKELETON.documents(False)
    expected = alone(model, good[1], 6)
    run, got = Decoding(model, [good[1]], limit=6), {}
    collect(run.step(), got)
    wrong = replace(good[0], media={"image": MediaBatch(torch.zeros(1, 3, 7, 9, dtype=torch.uint8))})
    for _ in range(3):
        with pytest.raises(ConfigError, match="7x9 pixels"):
            run.add(wrong)
    assert run.live == [0]
    joined = run.add(good[0], limit=6)
    drain(run, got)
    assert got[0] == expected
    assert got[joined] == alone(model, good[0], 6)
    assert joined == 1


def test_wrong_calls_say_what_is_wrong() -> None:
    model = tiny_model()
    run = Decoding(model)
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        run.add(words(3), limit=0)
    with pytest.raises(ConfigError, match="one document"):
        run.add(Sequence.pack([words(3), words(4)]))
    with pytest.raises(ConfigError, match="max_rows"):
        Decoding(model, max_rows=0)
    with pytest.raises(ConfigError, match="need one each"):
        Decoding(model, [words(3)], limit=[1, 2])
    assert generate(model, []) == []
