"""PVC's claims: their data and rig, that every arm is what it says, and every mechanism at toy size."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.cli.conftest import Run, run  # noqa: F401  (a fixture)

from chiasm.data.mixture import generator
from chiasm.data.sequence import IGNORE
from chiasm.data.sequence import Sequence as Row
from chiasm.errors import ConfigError
from chiasm.parts.vision.progressive import Clips
from chiasm.systems.pvc import claims, rig, rig_runs
from chiasm.systems.pvc.model import PVCEmbedder, change
from chiasm.systems.pvc.plan import shots_of
from chiasm.systems.pvc.rig import (
    NarrowProjector,
    PooledEmbedder,
    RigModel,
    accuracies,
    changes,
    parameters_of,
    rig_recipe,
    spread,
    stopped,
)
from chiasm.systems.pvc.rig_data import ASKED, DIGITS, MEDIA, MOTION, SAID, RigData
from chiasm.systems.pvc.rig_worlds import ANSWERS, QUESTIONS, SQUARE

pytest.importorskip("sklearn")
TINY = RigModel(vision_width=16, width=16, layers=1, ffn=16)
EXPERIMENTS = {e.id: e for e in claims.EXPERIMENTS}


class Seen(Exception):
    """Carries what an arm would train."""


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch):
    """(experiment, scale) -> arm -> (data, model, size of its batches in that of the budget)."""

    def stop(trial, data: RigData, model: RigModel, *, batches: int = 1) -> None:
        raise Seen(data, model, batches)

    def read(name: str, scale: str = "mini") -> dict[str, tuple[RigData, RigModel, int]]:
        monkeypatch.setattr(rig_runs, "_train", stop)
        found = {}
        for arm in EXPERIMENTS[name].arms:
            with pytest.raises(Seen) as seen:
                EXPERIMENTS[name].run(EXPERIMENTS[name].trial(arm.name, 100, scale))
            found[arm.name] = seen.value.args
        return found

    return read


def built(model: RigModel, seed: int = 0, stir: float = 0.0):
    """A model in eval mode; `stir` moves every parameter, so that nothing that starts as zero stays it."""
    torch.manual_seed(seed)
    made = model.build().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(stir * torch.randn_like(parameter))
    return made


# --- data ---


@pytest.mark.parametrize("frames", [2, 8])
def test_a_batch_is_its_documents_packed(frames: int) -> None:
    source = RigData(
        tasks={"still": 1, "clip": 1}, size=6, frames=frames, window=frames // 2, repeats=3
    ).open()
    draws = [("clip", 4), ("still", 0), ("still", 5), ("clip", 1)]
    whole, parts = source.batch(draws), Row.pack([source.batch([draw]) for draw in draws])
    for name in ("ids_T", "kind_T", "doc_T", "pos_T", "labels_T", "weight_T"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=0, atol=0)
    assert whole.spans == parts.spans
    for name in ("image", "video"):
        assert torch.equal(whole.media[name].data, parts.media[name].data)
    assert whole.media["video"].times_N is not None
    assert torch.equal(whole.media["video"].times_N, torch.arange(frames).float().repeat(2))


def test_every_answer_of_a_clip_is_true_at_its_moment() -> None:
    source = RigData(tasks={"clip": 1}, size=30).open()
    for n in range(30):
        row = source.batch([("clip", n)])
        assert row.labels_T is not None
        places = []
        for frame in row.media["video"].data[:, 0]:
            y, x = (frame == SQUARE).nonzero().T
            places.append((int(x.min()), int(y.min())))
        steps = [(x - a, y - b) for (a, b), (x, y) in pairwise(places)]
        words = row.ids_T.tolist()
        seen = 0
        for t, word in enumerate(words):
            seen += word == MEDIA
            label = int(row.labels_T[t])
            if word == MEDIA or word < ASKED + DIGITS or label == IGNORE:
                assert (label == IGNORE) == (
                    word == MEDIA or (seen == 4 and word != ASKED + QUESTIONS.index("cell"))
                )
                continue
            now, said, asked = seen // 4 - 1, ANSWERS[label - SAID], QUESTIONS[word - ASKED]
            if asked == "cell":
                assert said == f"cell {places[now][1] // 8},{places[now][0] // 8}"
            elif asked == "direction":
                assert (
                    said == {(4, 0): "right", (0, 4): "down", (-4, 0): "left", (0, -4): "up"}[steps[now - 1]]
                )
            else:
                past = steps[:now]
                assert said == f"{sum(a != b for a, b in pairwise(past))} turns"
        assert words[-DIGITS:] == list(range(ASKED, ASKED + DIGITS))


def test_the_answers_at_the_end_are_those_of_the_world() -> None:
    from chiasm.systems.pvc.rig_worlds import items

    source = RigData(tasks={"clip": 1}, split="dev", size=12, frames=2).open()
    made = items("clip", "dev", 0, 0, 12, questions=MOTION)
    for n in range(12):
        column = made.question_N[n] - DIGITS - len(MOTION)
        assert source.answers["clip"][n, column] == SAID + made.answer_N[n]
        assert source.asked["clip"][n] == made.question_N[n]
    assert torch.equal(source.frames["clip"], torch.from_numpy(made.frames_NTHW[:, [3, 7]]))


def test_batches_have_lengths_of_their_own_where_asked() -> None:
    cut = RigData(tasks={"clip": 1, "still": 1}, size=4, cut=True, varied=True).open()
    draws = [("clip", 0), ("still", 1)]
    lengths, repeats = set(), []
    for seed in range(60):
        row = cut.fetch(draws, generator(seed))
        frames = len(row.media["video"])
        lengths.add(frames)
        repeats.append(row.spans_of("image")[0].repeats)
        assert torch.equal(row.media["video"].data, cut.batch(draws).media["video"].data[:frames])
        assert int((row.ids_T == MEDIA).sum()) == 4 * frames + 4 * repeats[-1]
    assert lengths == {1, 2, 4, 8}
    assert set(repeats) == {1, 2, 3, 4}
    assert 20 < repeats.count(4) < 40
    windows = RigData(tasks={"clip": 1}, size=4, cut=True, window=4).open()
    assert {len(windows.fetch(draws[:1], generator(s)).media["video"]) for s in range(20)} == {4, 8}
    still = RigData(tasks={"clip": 1, "still": 1}, size=4).open()
    assert torch.equal(still.fetch(draws, generator(1)).ids_T, still.fetch(draws, generator(2)).ids_T)


def test_the_page_and_the_square_have_their_shares_of_the_loss() -> None:
    source = RigData(tasks={"clip": 1}, size=2).open()
    for frames in (2, 8):
        row = source.batch([("clip", 0)], frames=frames)
        assert row.weight_T is not None
        digits = (row.ids_T >= ASKED) & (row.ids_T < ASKED + DIGITS)
        assert float(row.weight_T[digits].sum()) == DIGITS
        cells = row.ids_T == ASKED + QUESTIONS.index("cell")
        assert float(row.weight_T[cells].sum()) == pytest.approx(DIGITS / 4)
        assert not row.weight_T[row.labels_T == IGNORE].any()


@pytest.mark.parametrize("task", ["still", "clip"])
def test_blank_quarters_are_blank_and_not_asked_about(task: str) -> None:
    some, full = (RigData(tasks={task: 1}, size=300, full=share).open() for share in (0.5, 1.0))
    told_NQ = some.answers[task][:, :DIGITS] != IGNORE
    cells = some.frames[task].unflatten(2, (4, 8)).unflatten(4, (4, 8)).float()
    ink_NQ = torch.where(cells == SQUARE, 0.0, cells).amax((1, 3, 5)).flatten(1) > 0
    assert torch.equal(ink_NQ, told_NQ)
    counts = told_NQ.sum(1)
    assert set(counts.tolist()) == ({4, 8, 12, 16} if task == "still" else {0, 4, 8, 12, 16})
    assert 0.4 < (counts == 16).float().mean() < 0.6
    assert torch.equal((some.frames[task] == SQUARE), (full.frames[task] == SQUARE))
    assert torch.equal(some.answers[task][told_NQ.all(1)], full.answers[task][told_NQ.all(1)])


def test_data_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="frames is 3"):
        RigData(tasks={"clip": 1}, frames=3)
    with pytest.raises(ConfigError, match="window is 4"):
        RigData(tasks={"clip": 1}, frames=2, window=4)
    with pytest.raises(ConfigError, match="parameters are too few"):
        replace(TINY, parameters=100).build()


# --- arms ---


@pytest.mark.parametrize("scale", ["ci", "mini"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_arms_have_equal_parameters_and_data(arms, name: str, scale: str) -> None:
    found = arms(name, scale)
    counts = {arm: parameters_of(model) for arm, (_, model, _) in found.items()}
    assert max(counts.values()) <= 1.02 * min(counts.values()), counts
    for data, model, batches in found.values():
        assert (data.split, data.seed) == ("train", 100)
        assert data.size == EXPERIMENTS[name].budgets[scale]["items"]
        assert batches == len(data.tasks)  # as many items of each task in every arm
        assert data.tokens == model.tokens
        if model.pool > 1:
            assert data.window == model.pool
    _, model, _ = next(iter(found.values()))
    assert sum(p.numel() for p in model.build().parameters()) == parameters_of(model)


def test_arms_differ_in_what_they_say_only(arms) -> None:
    static = arms("static_repeats")
    # (a frame's tokens, repeats, knows the time, sees earlier repeats, noise)
    said = {
        arm: (m.tokens, d.repeats, m.timed, m.attention, m.noise > 0) for arm, (d, m, _) in static.items()
    }
    assert said == {
        "a": (4, 1, False, False, True),
        "b": (4, 4, False, True, True),
        "c": (4, 4, True, False, True),
        "d": (4, 4, True, True, True),
        "e": (16, 1, False, False, True),
        "a_quiet": (4, 1, False, False, False),
        "b_quiet": (4, 4, False, True, False),
    }
    for data, model, _ in static.values():
        embedder = replace(model, parameters=0).build().embedder
        assert (embedder.vision.time is not None) == model.timed == (embedder.connect.modulation is not None)
        assert (embedder.vision.temporal_blocks[0].temporal is not None) == model.attention
        rows = replace(data, size=2).open().batch([("still", 0), ("still", 1)]).ids_T == MEDIA
        assert int(rows.sum()) == 2 * model.tokens * data.repeats
    films = arms("video")
    for data, model, _ in films.values():  # equal tokens of a whole clip
        row = replace(data, size=2).open().batch([("clip", 1)])
        assert int((row.ids_T == MEDIA).sum()) == 32
        assert data.cut
        assert model.timed == model.attention == (films["pvc"][1] is model)
    for arm, (data, _, batches) in arms("mixed").items():
        assert set(data.tasks) == {"one": {"still", "clip"}, "stills": {"still"}, "clips": {"clip"}}[arm]
        assert batches == len(data.tasks)


def test_repeats_are_equal_without_the_time_and_only_then(arms) -> None:
    for arm, (data, model, _) in arms("static_repeats", "ci").items():
        made, source = built(model, stir=0.1), replace(data, size=3).open()
        row = source.batch([("still", n) for n in range(3)])
        torch.manual_seed(1)
        rows_NRC = made.embedder(row).x_TC[row.ids_T == MEDIA].view(3, data.repeats, -1).detach()
        apart = float((rows_NRC - rows_NRC[:, :1]).abs().max())
        if data.repeats == 1:
            assert apart == spread(made, source) == 0
        elif model.timed:
            assert spread(made, source) > 0.01
        else:
            assert spread(made, source) < 1e-5
            assert (apart < 1e-5) == (arm == "b_quiet")  # noise is drawn for every repeat


def test_noise_is_where_it_is_said_to_be() -> None:
    for noise in (0.0, 0.1):
        made = built(replace(TINY, noise=noise), stir=0.05)
        source = RigData(tasks={"still": 1}, size=20).open()
        row = source.batch([("still", n) for n in range(20)])
        projector = made.embedder.connect
        assert isinstance(projector, NarrowProjector)
        widened, code = [], projector.code(torch.randn(50, 4, 64), None, torch.zeros(50, 32))
        torch.testing.assert_close(code.square().mean(-1), torch.ones(50, 4), atol=1e-3, rtol=0)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            widened.append(made.embedder(row).x_TC)
        assert torch.equal(widened[0], widened[1])
        assert torch.equal(widened[0], widened[2]) == (noise == 0)
        torch.manual_seed(0)
        with torch.no_grad():
            projector.widen.weight.copy_(torch.eye(16, 4))
            projector.widen.bias.zero_()
            inputs = torch.randn(200, 4, 64), None, torch.zeros(200, 32)
            found = float((projector(*inputs)[..., :4] - projector.code(*inputs)).std())
        assert found == pytest.approx(noise, rel=0.1)


def test_the_mean_over_time_equals_a_loop() -> None:
    made = built(replace(TINY, pool=4, noise=0.0, timed=False, attention=False), stir=0.05)
    embedder = made.embedder
    assert isinstance(embedder, PooledEmbedder)
    source = RigData(tasks={"clip": 1}, size=3, window=4).open()
    row = source.batch([("clip", 0), ("clip", 2)])
    rows = embedder(row).x_TC[row.ids_T == MEDIA].view(2, 2, 16, -1)
    for n in range(2):
        for half in range(2):
            frames = row.media["video"].data[8 * n + 4 * half :][:4]
            features = [embedder.vision(embedder._normal(f[None]), clips=Clips.stills(1)) for f in frames]
            mean = torch.stack(features).mean(0)[:, 1:]
            patches = [mean[0, 4 * r + q] for r in range(4) for q in range(4)]  # 16 tokens: a patch each
            wanted = embedder.connect(torch.stack(patches)[None])[0]
            torch.testing.assert_close(rows[n, half], wanted, atol=1e-5, rtol=1e-4)


def test_arms_of_a_seed_share_their_items(arms) -> None:
    static = [replace(data, size=5).open() for data, _, _ in arms("static_repeats").values()]
    assert all(torch.equal(source.frames["still"], static[0].frames["still"]) for source in static)
    films = {arm: replace(data, size=5).open() for arm, (data, _, _) in arms("video").items()}
    assert torch.equal(films["few"].frames["clip"], films["pvc"].frames["clip"][:, [3, 7]])
    assert torch.equal(films["mean_pool"].frames["clip"], films["per_frame"].frames["clip"])
    # An arm that sees less often is asked less often, of the same.
    assert torch.equal(films["few"].answers["clip"], films["mean_pool"].answers["clip"])
    last = DIGITS + len(MOTION) * 3
    assert torch.equal(
        films["few"].answers["clip"][:, DIGITS:-3], films["pvc"].answers["clip"][:, last : last + 3]
    )


# --- what is measured ---


def test_accuracies_count_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    source = RigData(tasks={"clip": 1, "still": 1}, size=30, full=0.5).open()
    model = built(TINY)

    def only(words: set[int]):
        def told(_, row: Row) -> torch.Tensor:
            return torch.isin(row.ids_T, torch.tensor(sorted(words))) & (row.labels_T != IGNORE)

        return told

    digits = set(range(ASKED, ASKED + DIGITS))
    monkeypatch.setattr(rig, "hits", only(digits))
    assert accuracies(model, source, "still") == {"digits": 1.0}
    found = accuracies(model, source, "clip", batch=7)
    assert (found["detail"], found["motion"], found["both"]) == (1.0, 0.0, 0.5)
    monkeypatch.setattr(rig, "hits", only({ASKED + QUESTIONS.index("cell")}))
    found = accuracies(model, source, "clip", batch=7)
    assert (found["detail"], found["cell"], found["direction"], found["turns"]) == (0.0, 1.0, 0.0, 0.0)
    assert found["motion"] == pytest.approx(1 / 3)


def test_hits_are_the_likeliest_words_where_something_is_asked() -> None:
    source = RigData(tasks={"still": 1}, size=4, full=0.0).open()
    made = built(replace(TINY, noise=0.0), stir=0.2)
    row = source.batch([("still", n) for n in range(4)])
    with torch.no_grad():
        guess_T = made.head.logits(made.hidden(row)).argmax(-1)  # type: ignore[operator]
    learned = replace(row, labels_T=torch.where(row.labels_T == IGNORE, IGNORE, guess_T))
    assert torch.equal(rig.hits(made, learned), row.labels_T != IGNORE)
    assert torch.equal(rig.hits(made, row), (guess_T == row.labels_T) & (row.labels_T != IGNORE))


def test_pages_that_stop_early_are_read_from_fewer_repeats() -> None:
    made = built(replace(TINY, noise=0.0), stir=0.2)
    source = RigData(tasks={"still": 1}, size=12).open()
    found_NR = changes(made, source, batch=5)
    assert found_NR.shape == (12, 3)
    embedder, row = made.embedder, source.batch([("still", 3)])
    assert isinstance(embedder, PVCEmbedder)
    with torch.no_grad():
        tokens_RKC = embedder.encode(shots_of(row, embedder.config), row)
    wanted = [change(tokens_RKC[n : n + 1], tokens_RKC[n - 1 : n]) for n in (1, 2, 3)]
    np.testing.assert_allclose(found_NR[3].numpy(), wanted, rtol=1e-4)
    for threshold, repeats in ((1e9, 1), (1e-9, 4)):
        right, mean = stopped(made, source, threshold, batch=5)
        assert mean == repeats
        assert right == pytest.approx(accuracies(made, source, "still", repeats=repeats)["digits"])
    middle = float(found_NR[:, 0].median()) + 1e-6
    first = (found_NR < middle).float().argmax(1) + 1  # repeats before the first that changes less
    kept = torch.where((found_NR < middle).any(1), first, 4)
    assert stopped(made, source, middle)[1] == pytest.approx(float(kept.float().mean()))


def test_training_learns_and_repeats_itself() -> None:
    from chiasm.lab.training import train_rig

    data = RigData(tasks={"still": 1, "clip": 1}, size=4, cut=True)
    losses = []
    for _ in range(2):
        made, rows = train_rig(rig_recipe(data, replace(TINY, width=32), steps=40, batch=4, seed=5))
        losses.append([row["loss"] for row in rows])
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.75 * losses[0][0]
    assert accuracies(made, data.open(), "still")["digits"] > 0.2  # four pages, by heart


# --- runs ---


def test_the_required_claims_are_there() -> None:
    ids = [c.id for e in claims.EXPERIMENTS for c in e.claims]
    assert len(set(ids)) == len(ids)
    assert all({"ci", "mini"} <= e.budgets.keys() for e in claims.EXPERIMENTS)
    by_id = {c.id: c for c in EXPERIMENTS["static_repeats"].claims}
    for name in ("repeats_detail", "repeats_match"):
        assert any((g.side, g.at_least) == ("e:digits", 0.8) for g in by_id[name].gates)
    assert EXPERIMENTS["curve"].claims == ()


def test_ci_runs_every_mechanism_within_20_seconds(run: Run, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    ran = run("reproduce", "pvc", "--scale", "ci", "--json")
    assert ran.code == 0, ran.err
    assert time.process_time() - began < 20
    data = json.loads(ran.out)
    assert data["mechanics"] == "ok"
    assert len(data["runs"]) == sum(len(e.arms) for e in claims.EXPERIMENTS)
    assert {row["split"] for row in data["runs"]} == {"dev"}
    assert "verdict" not in ran.out
    assert list(tmp_path.iterdir()) == []
