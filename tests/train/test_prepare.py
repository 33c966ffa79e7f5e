"""What a recipe switches on a model: DropPath, recomputation, LoRA, compilation, layer-wise rates, freezing."""

import shutil
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from chiasm.cli.train import train
from chiasm.data.mixture import generator
from chiasm.errors import ConfigError, UsageError
from chiasm.nn.lora import LoRALinear
from chiasm.nn.vit import DropPath
from chiasm.systems.internvl.recipes import debug
from chiasm.train import freeze
from chiasm.train.objective import Objective
from chiasm.train.optim import depth_factors, make_optimizers, named_parameters, trainable
from chiasm.train.prepare import decoder_of, keep_features, prepare, require_compiler, vision_of
from chiasm.train.recipe import Group, Lora, Optim, Schedule, apply_overrides
from chiasm.train.trainer import build_parts


def built(*overrides):
    return build_parts(apply_overrides(debug(), overrides))


def gradients(parts, draws=6):
    source, model, objective = parts
    model.train()
    batch = source.fetch([("counting", i) for i in range(draws)], generator(3))
    torch.manual_seed(5)
    loss = objective.loss(model, batch)
    loss.total.backward()
    return loss.total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("which", ["vision", "language", "all"])
def test_recomputed_activations_change_nothing(which):
    """With DropPath and LoRA dropout, whose draws must be the same the second time."""
    settings = ("drop_path=0.3", "lora.rank=2", "lora.dropout=0.3", "vision_lora.rank=2")
    kept, again = built(*settings), built(*settings, f"checkpointing={which}")
    assert vision_of(again[1]).checkpoint == (which != "language")
    assert decoder_of(again[1]).checkpointing == (which != "vision")
    (loss, grads), (loss_again, grads_again) = gradients(kept), gradients(again)
    assert torch.equal(loss, loss_again)
    assert grads.keys() == grads_again.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grads_again[name], grad, rtol=1e-6, atol=1e-7)


def test_drop_path_is_linear_in_depth():
    rates = [m.rate for m in built("drop_path=0.4")[1].modules() if isinstance(m, DropPath)]
    assert rates == [0.0, 0.4]
    assert [m.rate for m in built()[1].modules() if isinstance(m, DropPath)] == [0.0, 0.1]  # the model's own


def test_adapters_of_the_decoder_freeze_the_language_model():
    _, model, objective = built("lora.rank=4")
    adapters = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert len(adapters) == 2 * 4
    assert all(name.startswith("trunk.layers.") for name in adapters)
    qkv = adapters["trunk.layers.0.attn.qkv"]
    assert (qkv.rank, qkv.scale, qkv.dropout, len(qkv.splits)) == (4, 2.0, 0.05, 3)
    names = trainable(model, objective, Optim())
    language = [n for n in names if n.startswith(("trunk.", "embedder.words", "head"))]
    assert language
    assert all("lora_" in n for n in language)
    assert any(n.startswith("embedder.vision.") for n in names)


def test_adapters_start_from_the_seed_alone_and_change_nothing_at_first():
    torch.manual_seed(1)
    _, a, _ = built("lora.rank=2", "vision_lora.rank=3", 'vision_lora.targets=["layers.*.mlp.*"]')
    torch.manual_seed(2)
    source, b, _ = built("lora.rank=2", "vision_lora.rank=3", 'vision_lora.targets=["layers.*.mlp.*"]')
    adapters = [n for n, m in a.named_modules() if isinstance(m, LoRALinear) and n.startswith("embedder")]
    assert sorted({n.rpartition(".")[2] for n in adapters}) == ["fc1", "fc2"]
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    batch = source.fetch([("counting", 1)], generator(3))
    with torch.no_grad():
        torch.testing.assert_close(b.eval().loss(batch).mean, built()[1].eval().loss(batch).mean)


def test_lora_alone_trains_beside_a_frozen_rest():
    _, model, objective = built("lora.rank=2")
    names = trainable(model, objective, Optim(train=("embedder.connect.*",)))
    assert {n.split(".")[0] for n in names} == {"embedder", "trunk"}
    assert all("lora_" in n or n.startswith("embedder.connect.") for n in names)


def test_switches_of_absent_parts_are_refused():
    for change in ({"drop_path": 0.1}, {"checkpointing": "vision"}, {"vision_lora": Lora(rank=1)}):
        with pytest.raises(ConfigError, match="no InternViT"):
            prepare(nn.Linear(2, 2), replace(debug(), **change))
    for change in ({"checkpointing": "language"}, {"lora": Lora(rank=1)}):
        with pytest.raises(ConfigError, match="no decoder"):
            prepare(nn.Linear(2, 2), replace(debug(), **change))
    with pytest.raises(ConfigError, match="matches no linear layer"):
        built("lora.rank=2", 'lora.targets=["attn.qqq"]')


def test_compilation_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="C\\+\\+ compiler"):
        train("internvl/debug", overrides=("compile=true",), runs=tmp_path, run_id="x")
    assert not (tmp_path / "x").exists()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UsageError, match="triton"):
        require_compiler(torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_give_the_same_numbers():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no compiler")
    plain, compiled = built("drop_path=0"), built("drop_path=0", "compile=true")
    (loss, grads), (loss_compiled, grads_compiled) = gradients(plain), gradients(compiled)
    torch.testing.assert_close(loss_compiled, loss, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_compiled[name], grad, rtol=1e-4, atol=1e-5)
    assert compiled[1].state_dict().keys() == plain[1].state_dict().keys()


def test_layer_wise_rates():
    names = [
        "embedder.words.weight",
        "embedder.vision.class_embedding",
        "embedder.vision.patch_embedding.weight",
        "embedder.vision.layers.0.ls1",
        "embedder.vision.layers.2.attn.qkv.weight",
        "embedder.connect.fc1.weight",
        "trunk.layers.0.norm1.weight",
        "trunk.layers.1.norm1.weight",
        "trunk.norm.weight",
        "head.weight",
    ]
    assert set(depth_factors(names, Optim()).values()) == {1.0}
    both = depth_factors(names, Optim(vision_decay=0.5, language_decay=0.1))
    expected = [0.1**3, 0.5**4, 0.5**4, 0.5**3, 0.5, 1, 0.1**2, 0.1, 1, 1]
    assert list(both.values()) == pytest.approx(expected)
    assert depth_factors(["vision.layers.0.ls1"], Optim(vision_decay=0.5)) == {"vision.layers.0.ls1": 0.5}


def test_layer_wise_rates_count_frozen_layers_and_multiply_groups():
    _, model, objective = built()
    optim = apply_overrides(debug(), ["optim.vision_decay=0.5"]).optim  # and a group of 0.5 on the encoder
    optim = replace(optim, freeze=("embedder.vision.layers.1.*", "trunk.*"))
    left = trainable(model, objective, optim)
    (optimizer,) = make_optimizers(left, optim, named_parameters(model, objective))
    scale = {name: group["scale"] for group in optimizer.param_groups for name in group["names"]}
    assert scale["embedder.vision.layers.0.ls1"] == 0.5 * 0.25  # two layers, though one is frozen
    assert scale["embedder.vision.position_embedding"] == 0.5 * 0.125
    assert scale["embedder.connect.fc1.weight"] == 1.0


def test_presets_of_the_stages():
    def names(patterns, *overrides):
        _, model, objective = built(*overrides)
        return set(trainable(model, objective, Optim(train=patterns)))

    everything = names(freeze.stage_2())
    connect = {n for n in everything if n.startswith("embedder.connect.")}
    vision = {n for n in everything if n.startswith("embedder.vision.")}
    assert names(freeze.stage_1()) == connect
    assert names(freeze.stage_1_5()) == connect | vision
    last = names(freeze.trained(vit_layers=1, vit_depth=2))
    assert last == connect | {n for n in vision if ".layers.1." in n}
    assert names(freeze.trained(vision=True, language=True, tied=True)) == everything
    words = {"embedder.words.weight"}
    assert names(freeze.trained(connect=False, lm_head=True, tied=True)) == words
    assert freeze.trained(lm_head=True)[-1] == "head.weight"
    for wrong in ({"connect": False}, {"vit_layers": 3, "vit_depth": 2}, {"vit_layers": 1}):
        with pytest.raises(ConfigError):
            freeze.trained(**wrong)
    with pytest.raises(ConfigError, match="matches no parameter"):
        trainable(*built()[1:], Optim(train=("embedder.conect.*",)))


def test_warm_up_as_a_share():
    ratio, steps = Schedule(warmup_ratio=0.03), Schedule(warmup=4)
    assert [ratio.factor(s, 110) for s in range(110)] == [steps.factor(s, 110) for s in range(110)]
    with pytest.raises(ConfigError, match="both warmup"):
        Schedule(warmup=3, warmup_ratio=0.1)
    with pytest.raises(ConfigError, match="warmup_ratio"):
        Schedule(warmup_ratio=1.0)


@pytest.mark.parametrize(
    "setting",
    ["lora.rank=-1", "lora.alpha=0", "optim.eps=-1", "vision_lora.dropout=1",
     "drop_path=1", "optim.vision_decay=0", "checkpointing=some",
     'writers=["tensorbord"]'],
)  # fmt: skip
def test_wrong_switches_are_refused(setting):
    with pytest.raises((ConfigError, UsageError)):
        apply_overrides(debug(), [setting])


class Headless(Objective):
    def loss(self, model, batch):
        raise NotImplementedError


def test_an_objective_says_nothing_by_default():
    assert Headless().denominators(nn.Linear(1, 1), None) is None
    assert Headless().document_losses(nn.Linear(1, 1), None) is None


def test_nothing_is_trained_in_bfloat16() -> None:
    """Autocast or not: at a rate of 1e-5 most updates would be rounded away."""
    _, model, objective = build_parts(debug())
    model.trunk.to(torch.bfloat16)
    with pytest.raises(
        ConfigError, match=r"trunk\.\S+ would be trained in bfloat16.*model.language_dtype=float32"
    ):
        trainable(model, objective, Optim())
    left = trainable(model, objective, Optim(freeze=("trunk.*",)))
    assert {p.dtype for p in left.values()} == {torch.float32}


def test_tied_words_have_two_names() -> None:
    """The output matrix is the word table: a pattern for either means both, whatever a checkpoint ties."""
    for optim, trained in (
        (Optim(train=("head.*",)), ["embedder.words.weight"]),
        (Optim(train=("embedder.words.*", "head.weight")), ["embedder.words.weight"]),
    ):
        _, model, objective = build_parts(debug())
        assert model.head.weight is model.embedder.words.weight
        assert list(trainable(model, objective, optim)) == trained
    _, model, objective = build_parts(debug())
    assert "embedder.words.weight" not in trainable(model, objective, Optim(freeze=("head.weight",)))
    with pytest.raises(ConfigError, match=r"'head\.\*' matches no parameter"):  # it would change nothing
        trainable(model, objective, Optim(groups=(Group(pattern="head.*", lr_scale=0.0),)))


def test_mixed_dtypes_need_autocast() -> None:
    model = built()[1]
    model.trunk.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="bfloat16 and float32, which only autocast brings together"):
        prepare(model, debug())
    prepare(model, replace(debug(), compute="bfloat16"))


def test_kept_features_of_a_frozen_encoder_change_nothing() -> None:
    recipe = replace(debug(), drop_path=0.0, optim=Optim(lr=3e-3, freeze=("embedder.vision.*",)))
    plain, kept = build_parts(recipe), build_parts(replace(recipe, keep_features=1))
    for parts, own in ((plain, recipe), (kept, replace(recipe, keep_features=1))):
        trainable(parts[1], parts[2], own.optim)
        keep_features(parts[1], own)
    encoded = []
    vision = kept[1].embedder.vision
    vision.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    for model in (plain[1], kept[1]):
        source = plain[0]
        model.train()
        row = source.document(source.worlds["counting"].sample(0))
        span = replace(row.spans[0], key="picture")
        batch = replace(row, spans=(span,))
        for _ in range(2):
            model.zero_grad()
            model.loss(batch).parts["text"].total.backward()
    assert encoded == [1]
    for (name, a), b in zip(plain[1].named_parameters(), kept[1].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-7)


def test_features_that_change_are_not_kept() -> None:
    trained = replace(debug(), keep_features=1)
    with pytest.raises(ConfigError, match="freeze it"):
        keep_features(build_parts(trained)[1], trained)
    frozen = replace(trained, optim=Optim(freeze=("embedder.vision.*",)))
    _, model, objective = build_parts(frozen)
    trainable(model, objective, frozen.optim)
    with pytest.raises(ConfigError, match="drops paths"):
        keep_features(model, frozen)
    with pytest.raises(ConfigError, match="2 processes"):
        keep_features(model, frozen, processes=2)
