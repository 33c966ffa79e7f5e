"""InternVL's claims: the worlds and the rig that they rest on, and every mechanism at toy size."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.cli.conftest import Run, run  # noqa: F401  (a fixture)

from chiasm.data.mixture import generator
from chiasm.data.sequence import IGNORE
from chiasm.data.sequence import Sequence as Row
from chiasm.errors import ConfigError
from chiasm.lab.claim import Trial
from chiasm.lab.training import train_rig
from chiasm.systems.internvl import claims, rig, rig_runs
from chiasm.systems.internvl.rig import (
    LOOPS,
    PooledTokens,
    RigData,
    RigModel,
    RigSource,
    repetition,
    tokenizer,
)
from chiasm.systems.internvl.rig_worlds import TASKS, item, jpeg, running_sums, worksheet

TINY = RigModel(vision_width=32, vision_layers=1, width=32, layers=1)


def trial(experiment, arm: str, **budget) -> Trial:
    made = experiment.trial(arm, 100, "ci")
    return replace(made, budget={**made.budget, **budget})


# --- worlds ---


@pytest.mark.parametrize("task", TASKS)
def test_items_are_functions_of_their_arguments(task: str) -> None:
    first, again = item(task, "train", 3, 7), item(task, "train", 3, 7)
    assert (first.question, first.answer) == (again.question, again.answer)
    assert first.image.tobytes() == again.image.tobytes()
    others = [
        item(task, s, seed, n)
        for s, seed, n in (("dev", 3, 7), ("test", 3, 7), ("train", 4, 7), ("train", 3, 8))
    ]
    assert len({first.image.tobytes(), *(o.image.tobytes() for o in others)}) == 5
    assert all(side % 28 == 0 for side in first.image.size)
    text = first.question + first.answer
    assert tokenizer().decode(tokenizer().encode(text)) == text  # nothing unknown
    assert "?" not in first.answer


def test_splits_share_no_picture() -> None:
    seen = {
        split: {item("code", split, 0, n).image.tobytes() for n in range(200)}
        for split in ("train", "dev", "test")
    }
    assert not seen["train"] & seen["dev"]
    assert not seen["train"] & seen["test"]
    assert not seen["dev"] & seen["test"]
    with pytest.raises(ConfigError, match="no task"):
        item("nonsense", "train", 0, 0)
    with pytest.raises(ConfigError, match="split"):
        item("code", "all", 0, 0)


def test_answers_are_true() -> None:
    for n in range(50):
        page, one, steps = (item(t, "dev", 1, n) for t in ("read_small", "sum", "sum_cot"))
        assert len(page.answer) == 8
        assert len(one.answer) == 1
        read, _, rest = steps.answer.partition(" ")
        sums, left, final = rest.replace(". Answer:", "").split(" ")
        assert [ord(c) - ord("a") for c in sums] == [sum(map(int, read[: k + 1])) for k in range(8)]
        assert left == "".join(str((ord(c) - ord("a")) % 5) for c in sums)
        assert final == left[-1] == steps.facts[0]
    assert running_sums([3, 0, 3]) == "ddg 331"
    assert worksheet([3, 9]).split() == [
        "39",
        "40",
        "60",
        "14",
        "11",
        "84",
        "91",
        "97",
        "59",
        "35",
        "28",
        "39",
    ]
    lengths = {len(item("long", "dev", 0, n).answer) for n in range(20)}
    assert len(lengths) == 1  # every character has its place
    assert lengths.pop() == 59


def test_small_digits_are_lost_in_one_tile() -> None:
    """What the tiling claims presuppose: shrinking to one tile takes away most of what tells two pages apart."""
    pages = [np.asarray(item("code", "dev", 0, n).image.convert("L"), np.float64) for n in range(20)]
    from PIL import Image

    shrunk = [
        np.asarray(Image.fromarray(p.astype(np.uint8)).resize((28, 28)).resize((56, 56)), np.float64)
        for p in pages
    ]
    kept = np.mean([s.std() for s in shrunk]) / np.mean([p.std() for p in pages])
    assert kept < 0.75


# --- rig ---


def test_tokens_and_labels_of_a_document() -> None:
    data = RigData(tasks={"read": 1}, max_tiles=1)
    row = RigSource(data).row("read", 0)
    answer = item("read", "train", 0, 0).answer
    assert row.labels_T is not None
    learned = row.labels_T[row.labels_T != IGNORE].tolist()
    assert tokenizer().decode(learned[:-1]) == answer
    assert learned[-1] == tokenizer().token_to_id("<|im_end|>")
    assert sum(s.length for s in row.spans) == TINY.tokens_per_tile == 4
    assert RigModel(compress="none").tokens_per_tile == 16
    patches = (RigModel().config.vision.image_size // RigModel().config.vision.patch_size) ** 2
    assert patches == 16  # the limit of the miniature
    four = RigSource(RigData(tasks={"code": 1}, max_tiles=4, thumbnail=True)).row("code", 0)
    assert len(four.media["image"]) == 5


def test_the_upsampled_page_has_the_tokens_and_not_the_detail() -> None:
    arms = {a.name: a.settings for a in claims.TILING.arms}
    rows = {}
    for name in ("four", "upsampled"):
        s = arms[name]
        data = RigData(tasks={"code": 1}, max_tiles=int(s["tiles"]), detail=int(s["detail"]))
        rows[name] = RigSource(data).row("code", 0)
    assert rows["four"].ids_T.tolist() == rows["upsampled"].ids_T.tolist()
    sharp, blurred = (rows[n].media["image"].data.float() for n in ("four", "upsampled"))
    assert blurred.diff(dim=-1).abs().mean() < 0.7 * sharp.diff(dim=-1).abs().mean()


def test_pooled_tokens_equal_a_loop() -> None:
    x = torch.randn(2, 16, 5)
    grid = x.view(2, 4, 4, 5)
    for how in ("mean", "drop"):
        found = PooledTokens(how)(x)
        for r in range(2):
            for q in range(2):
                block = grid[:, 2 * r : 2 * r + 2, 2 * q : 2 * q + 2]
                wanted = block.mean((1, 2)) if how == "mean" else block[:, 0, 0]
                torch.testing.assert_close(found[:, 2 * r + q], wanted)


def test_jpeg_is_drawn_anew_from_the_generator_given() -> None:
    draws = [("faint", n) for n in range(3)]
    plain = RigSource(RigData(tasks={"faint": 1}, max_tiles=2)).fetch(draws, generator(0))
    for augment in ("tile", "image"):
        source = RigSource(RigData(tasks={"faint": 1}, max_tiles=2, augment=augment))
        one, same, other = (source.fetch(draws, generator(seed)).media["image"].data for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        difference = (one.float() - plain.media["image"].data.float()).abs()
        assert 0 < difference.mean() < 6
    picture = item("faint", "dev", 0, 0).image
    errors = [
        np.abs(np.asarray(jpeg(picture, q), int) - np.asarray(picture, int)).mean() for q in (100, 75, 30)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_the_filter_finds_the_loops_and_nothing_else() -> None:
    assert repetition("abcdefghijklmnop") == 0
    assert repetition("ab " * 30) > 0.9
    assert repetition("short") == 0
    source = RigSource(RigData(tasks={"long": 0.9, "long_loop": 0.1}, size=50, filtered=True))
    assert source.sizes == {"long": 50, "long_loop": 0}
    assert source.weights == {"long": 0.9, "long_loop": 0}
    assert all(repetition(item("long_loop", "train", 0, n).answer) > LOOPS for n in range(50))


def test_arms_of_a_seed_share_weights_and_data() -> None:
    data = RigData(tasks={"short": 1, "long": 1}, size=16)
    first = train_rig(rig.rig_recipe(data, steps=1, batch=4, seed=3, model=TINY, lr=1e-12))[0]
    again = train_rig(
        rig.rig_recipe(replace(data, power=1.0), steps=1, batch=4, seed=3, model=TINY, lr=1e-12)
    )[0]
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_writing_greedily_is_what_exact_counts() -> None:
    """``exact`` judges by one pass over the true answer, ``write`` by generating: the same items are right."""
    data = RigData(tasks={"colour": 1}, size=8, max_tiles=1)
    model = train_rig(rig.rig_recipe(data, steps=60, batch=8, seed=0, model=TINY, lr=3e-3))[0]
    texts, tokens = rig.write(model, data, "colour", count=8, limit=12)
    right = sum(t[0] == item("colour", "train", 0, n).answer for n, t in enumerate(texts)) / 8
    assert right == rig.exact(model, data, "colour", count=8)
    assert right > 0  # eight pictures can be learned by heart
    assert 2 <= tokens <= 12
    sampled = [
        rig.write(model, data, "colour", count=3, samples=3, temperature=1.5, limit=8, seed=s)[0]
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


# --- runs ---


def test_votes() -> None:
    assert rig_runs._final("32 df. Answer: 0") == "0"
    assert rig_runs._final("32 df") == ""
    assert rig_runs._vote(["", "7", "3", "3", ""]) == "3"
    assert rig_runs._vote(["7", "3"]) == "7"
    assert rig_runs._vote(["", ""]) == ""


def test_best_fit_packs_everything_within_the_limit() -> None:
    random = np.random.default_rng(0)
    documents = [Row.of_text([0] * int(n)) for n in random.integers(10, 200, 60)]
    packs = rig_runs._best_fit(documents, 256, buffer=5)
    assert sorted(id(d) for pack in packs for d in pack) == sorted(map(id, documents))
    assert max(sum(map(len, pack)) for pack in packs) <= 256
    assert sum(map(len, documents)) / (256 * len(packs)) > 0.85


def test_padded_and_packed_do_the_same_work() -> None:
    padded, packed = (
        rig_runs.packing_speed(trial(claims.PACKING_SPEED, arm)) for arm in ("padded", "packed")
    )
    assert padded["loss"] == pytest.approx(packed["loss"], rel=1e-5)
    assert padded["fill"] < packed["fill"] == 1.0


def test_half_the_compute_is_half() -> None:
    mini = claims.PROGRESSIVE.budgets["mini"]
    large = RigModel()
    small = replace(large, width=64, layers=1)
    first = round(0.25 * mini["steps"] * rig_runs._cost(large) / rig_runs._cost(small))
    spent = first * rig_runs._cost(small) + mini["steps"] // 4 * rig_runs._cost(large)
    assert spent / (mini["steps"] * rig_runs._cost(large)) == pytest.approx(0.5, abs=0.01)


def test_every_experiment_has_ci_and_mini_and_the_required_ones_are_there() -> None:
    assert all({"ci", "mini"} <= e.budgets.keys() for e in claims.EXPERIMENTS)
    ids = [c.id for e in claims.EXPERIMENTS for c in e.claims]
    assert len(set(ids)) == len(ids)
    assert {e.id for e in claims.EXPERIMENTS} >= {
        "packing_exact",
        "packing_speed",
        "loss_power",
        "tiling",
        "jpeg",
        "cot",
    }


def test_ci_runs_every_mechanism_within_20_seconds(run: Run, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    began = time.process_time()
    ran = run("reproduce", "internvl", "--scale", "ci", "--json")
    assert ran.code == 0, ran.err
    assert time.process_time() - began < 20
    data = json.loads(ran.out)
    assert data["mechanics"] == "ok"
    assert len(data["runs"]) == sum(len(e.arms) for e in claims.EXPERIMENTS)
    assert {row["split"] for row in data["runs"]} == {"dev"}
    assert "verdict" not in ran.out
    assert list(tmp_path.iterdir()) == []
