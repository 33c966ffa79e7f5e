"""One shared test for five systems: the contracts carry them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from tests.contracts import hovle, internvl, more3d, pvc, synergen
from tests.contracts.skeleton import Skeleton, extend

from chiasm.data.sequence import Sequence
from chiasm.model.causal import CausalVLM
from chiasm.model.generate import Decoding, Event
from chiasm.nn.sampling import Sampling
from chiasm.parts.contracts import Emission

SKELETONS = [internvl.SKELETON, pvc.SKELETON, hovle.PRE, hovle.POST, synergen.SKELETON, more3d.SKELETON]


def assert_same(got: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal to 1e-5 of the largest value: statistics and losses are summed in fp32 whatever the model's dtype."""
    got, expected = got.detach(), expected.detach()
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    assert error <= 1e-5, f"{what}: relative error {error:.1e}"


@pytest.fixture(params=SKELETONS, ids=lambda s: s.name)
def skeleton(request: pytest.FixtureRequest) -> Skeleton:
    return request.param


def gradients(model: CausalVLM) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_loss_is_finite_and_every_parameter_learns(skeleton: Skeleton) -> None:
    model = skeleton.build()
    loss = model.loss(Sequence.pack(skeleton.documents(True)))
    assert torch.isfinite(loss.mean)
    loss.mean.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    # hovle-pre has no fold; the last embedder layer of every other system reaches the loss.
    assert silent <= (
        {"embedder.fold.weight", "embedder.fold.bias"} if skeleton.name == "hovle-pre" else set()
    )


def test_packed_equals_separate_in_loss_and_gradient(skeleton: Skeleton) -> None:
    model = skeleton.build()
    documents = skeleton.documents(True)
    packed = model.loss(Sequence.pack(documents))
    packed.mean.backward()
    together = gradients(model)
    model.zero_grad()
    apart = [model.loss(d) for d in documents]
    names = {name for loss in apart for name in loss.parts}
    assert names == set(packed.parts)
    mean = torch.zeros((), dtype=torch.float64)
    for name in names:
        parts = [loss.parts[name] for loss in apart if name in loss.parts]
        total, weight = sum(p.total for p in parts), sum(p.weight for p in parts)
        assert_same(packed.parts[name].total, total, name)
        mean = mean + parts[0].scale * total / weight
    mean.backward()
    assert together.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        assert_same(together[name], gradient, name)


class Likeliest:
    """The greedy choice."""

    def __call__(self, logits_V: torch.Tensor, doc: int) -> int:
        return int(logits_V.argmax())

    def rows(self, logits_NV: torch.Tensor, docs: list[int]) -> list[int]:
        return [self(logits_V, doc) for logits_V, doc in zip(logits_NV, docs, strict=True)]


def decode_without_cache(
    skeleton: Skeleton, prompt: Sequence, doc: int
) -> list[tuple[int | None, list[int] | None]]:
    """The slow twin: read everything again for every emission (only the head's own state is carried along)."""
    model = skeleton.build()
    cache = model.new_cache(1)
    if hasattr(model.head, "begin"):
        model.head.begin([prompt], cache)
        cache.state[doc] = cache.state[0]
    out = []
    with torch.inference_mode():
        for _ in range(skeleton.limit):
            hidden = model.hidden(prompt)
            emission: Emission = model.head.step(hidden[-1:], [doc], Likeliest(), cache)
            out.append((emission.ids[0], emission.codes[0] if emission.codes else None))
            prompt = extend(prompt, emission.next)
    return out


def run(decoding: Decoding, docs: int) -> list[list[Event]]:
    out: list[list[Event]] = [[] for _ in range(docs)]
    while events := decoding.step():
        for event in events:
            out[event.doc].append(event)
    return out


def test_cached_ragged_batch_equals_full_generation(skeleton: Skeleton) -> None:
    prompts = skeleton.documents(False)
    cached = run(Decoding(skeleton.build(), prompts, limit=skeleton.limit), len(prompts))
    for doc, prompt in enumerate(prompts):
        assert [(e.id, e.codes) for e in cached[doc]] == decode_without_cache(skeleton, prompt, doc)
        assert [e.finish for e in cached[doc]] == [None] * (skeleton.limit - 1) + ["length"]


def test_documents_that_end_leave_the_others_unchanged(skeleton: Skeleton) -> None:
    prompts = skeleton.documents(False)
    whole = run(Decoding(skeleton.build(), prompts, limit=6), len(prompts))
    limits = [2] + [6] * (len(prompts) - 1)
    ragged = Decoding(skeleton.build(), prompts, limit=limits)
    got = run(ragged, len(prompts))
    assert len(got[0]) == 2
    for doc in range(1, len(prompts)):
        assert [(e.id, e.codes) for e in got[doc]] == [(e.id, e.codes) for e in whole[doc]]


def test_sampling_does_not_depend_on_the_batch(skeleton: Skeleton) -> None:
    prompts = skeleton.documents(False)
    samplings = [Sampling(temperature=1.0, top_p=0.9, seed=s) for s in range(len(prompts))]
    together = run(Decoding(skeleton.build(), prompts, limit=5, sampling=samplings), len(prompts))
    for doc, prompt in enumerate(prompts):
        alone = run(Decoding(skeleton.build(), [prompt], limit=5, sampling=samplings[doc]), 1)
        assert [(e.id, e.codes) for e in alone[0]] == [(e.id, e.codes) for e in together[doc]]


def test_save_and_load(skeleton: Skeleton, tmp_path: Path) -> None:
    model = skeleton.build()
    save_model(model, str(tmp_path / "model.safetensors"))
    other = skeleton.build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_model(other, str(tmp_path / "model.safetensors"))
    prompts = Sequence.pack(skeleton.documents(False))
    with torch.inference_mode():
        assert torch.equal(model.hidden(prompts), other.hidden(prompts))


def test_one_step_emits_many_codes_then_returns_to_text() -> None:
    prompts = synergen.documents(False)[:1]
    events = run(Decoding(synergen.build(), prompts, limit=synergen.GROUPS + 2), 1)[0]
    assert [e.id is None for e in events] == [True] * synergen.GROUPS + [False, False]
    assert all(len(e.codes or []) == synergen.K for e in events[: synergen.GROUPS])
    assert events[synergen.GROUPS].id == synergen.EOI


def test_guided_pairs_draw_the_same_codes_from_mixed_logits() -> None:
    a, b = synergen.documents(False)[0], Sequence.of_text([3, synergen.BOI])

    def draw(guidance: float) -> list[list[Event]]:
        model = synergen.build(guidance)
        return run(Decoding(model, [a, b], limit=2), 2)

    guided = draw(3.0)
    assert [e.codes for e in guided[0]] == [e.codes for e in guided[1]]
    assert [e.codes for e in draw(1.0)[0]] != [e.codes for e in draw(1.0)[1]]


def test_hidden_states_of_written_tokens_give_masks() -> None:
    """Masks from the states kept while writing equal masks from reading the finished answer again."""
    model = more3d.build()
    prompt = more3d.documents(False)[0]
    events = run(Decoding(model, [prompt], limit=4, keep_hidden=True), 1)[0]
    # The state kept with event i+1 is that of the row which holds token i.
    written = extend(prompt, Sequence.of_text([e.id for e in events[:-1] if e.id is not None]))
    with torch.inference_mode():
        embedded = model.embedder(written)
        states = model.hidden(written)[len(prompt) :]
        dense = embedded.features["points"].expand(len(states), -1, -1)
        kept = torch.stack([e.hidden for e in events[1:] if e.hidden is not None])
        assert_same(model.head.masks(kept, dense), model.head.masks(states, dense))
