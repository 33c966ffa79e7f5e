"""Adapters: names, shapes, fusing, tying, refusals; parity with transformers' own models."""

import json
from dataclasses import replace

import pytest
import torch
from tests.checkpoint.random_checkpoints import (
    IMAGE_TOKEN,
    LAYERS,
    V_LAYERS,
    V_WIDTH,
    VOCAB,
    WIDTH,
    language_config,
    language_shapes,
    original_config,
    original_shapes,
    random_tensors,
    write_folder,
    write_original,
    write_sharded,
    write_text,
)
from torch import nn

from chiasm.checkpoint.adapters import (
    StateDictAdapter,
    adapter_for,
    detect_layout,
    load_into,
    open_checkpoint,
)
from chiasm.checkpoint.store import CheckpointReader
from chiasm.errors import CheckpointError, ConfigError
from chiasm.model.causal import CausalVLM
from chiasm.parts.connect.projector import Projector
from chiasm.parts.heads.text import TextHead
from chiasm.parts.language.decoder import build_decoder
from chiasm.parts.vision.internvit import InternViT

FAMILIES = ("qwen2", "llama")


class Embedder(nn.Module):
    def __init__(self, opened):
        super().__init__()
        if opened.vision is not None:
            self.vision = InternViT(opened.vision)
            self.connect = Projector(4 * opened.vision.hidden_size, opened.language.hidden_size)
        self.words = nn.Embedding(opened.language.vocab_size, opened.language.hidden_size)


def skeleton(opened, device="meta"):
    """The whole model's module tree, from its real parts."""
    with torch.device(device):
        embedder = Embedder(opened)
        language = opened.language
        tied = embedder.words.weight if language.tie_words else None
        head = TextHead(language.vocab_size, language.hidden_size, tied=tied)
        return CausalVLM(embedder, build_decoder(language), head)


def fails(match):
    return pytest.raises(CheckpointError, match=match)


def native_state(folder):
    opened = open_checkpoint(folder)
    return opened, dict(opened.adapter.from_public(opened.reader))


# --- the original layout, against names written by hand -----------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("six_b", [False, True])
def test_original_layout(tmp_path, family, six_b):
    public = random_tensors(original_shapes(family, six_b=six_b))
    write_sharded(tmp_path, original_config(family, six_b=six_b), public)
    opened, native = native_state(tmp_path)
    assert opened.layout == "original"
    assert isinstance(opened.adapter, StateDictAdapter)
    for i in range(V_LAYERS):
        theirs = f"vision_model.encoder.layers.{i}."
        for name in [key.removeprefix(theirs) for key in public if key.startswith(theirs)]:
            assert torch.equal(native[f"embedder.vision.layers.{i}.{name}"], public[theirs + name])
    for name in ("class_embedding", "position_embedding", "patch_embedding.weight", "patch_embedding.bias"):
        assert torch.equal(native[f"embedder.vision.{name}"], public[f"vision_model.embeddings.{name}"])
    for ours, theirs in (("norm", 0), ("fc1", 1), ("fc2", 3)):
        for leaf in ("weight", "bias"):
            assert torch.equal(native[f"embedder.connect.{ours}.{leaf}"], public[f"mlp1.{theirs}.{leaf}"])
    check_language(native, public, "language_model.model.", "language_model.lm_head.weight", family)
    assert len(native) == sum(1 for _ in skeleton(opened).state_dict())


def check_language(native, public, base, head, family):
    for i in range(LAYERS):
        ours, theirs = f"trunk.layers.{i}.", f"{base}layers.{i}."
        for leaf in ("weight", "bias") if family == "qwen2" else ("weight",):
            qkv = [public[f"{theirs}self_attn.{which}_proj.{leaf}"] for which in "qkv"]
            assert torch.equal(native[f"{ours}attn.qkv.{leaf}"], torch.cat(qkv))
        gate_up = [public[f"{theirs}mlp.{which}_proj.weight"] for which in ("gate", "up")]
        assert torch.equal(native[f"{ours}ffn.gate_up.weight"], torch.cat(gate_up))
        assert torch.equal(native[f"{ours}ffn.down.weight"], public[f"{theirs}mlp.down_proj.weight"])
        assert torch.equal(native[f"{ours}attn.out.weight"], public[f"{theirs}self_attn.o_proj.weight"])
        assert torch.equal(native[f"{ours}norm1.weight"], public[f"{theirs}input_layernorm.weight"])
        assert torch.equal(native[f"{ours}norm2.weight"], public[f"{theirs}post_attention_layernorm.weight"])
    assert torch.equal(native["embedder.words.weight"], public[f"{base}embed_tokens.weight"])
    assert torch.equal(native["trunk.norm.weight"], public[f"{base}norm.weight"])
    if head is not None:
        assert torch.equal(native["head.weight"], public[head])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_text_layout(tmp_path, family, tied):
    write_text(tmp_path, family, tied=tied)
    opened, native = native_state(tmp_path)
    assert opened.layout == "text"
    assert opened.language.tie_words is tied
    assert ("head.weight" in native) is not tied
    public = {key: opened.reader.tensor(key) for key in opened.reader}
    check_language(native, public, "model.", None if tied else "lm_head.weight", family)


@pytest.mark.parametrize("layout", ["original", "hf", "hf-old"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_to_public_and_back(tmp_path, layout, family, tied):
    opened, native = native_state(write_original(tmp_path / "src", family))
    language = replace(opened.language, tie_words=tied)
    if tied:
        del native["head.weight"]
    adapter = adapter_for(layout, language=language, vision=opened.vision)
    public = dict(adapter.to_public(native))
    heads = [name for name in public if name.endswith("lm_head.weight")]
    assert len(heads) == (not tied or layout == "original")
    assert all(torch.equal(public[name], native["embedder.words.weight"]) for name in heads if tied)
    config = {
        "original": lambda: opened.public.to_original(),
        "hf": lambda: replace(opened.public, tie_words=tied, image_token_id=IMAGE_TOKEN).to_hf(),
        "hf-old": lambda: replace(opened.public, tie_words=tied, image_token_id=IMAGE_TOKEN).to_hf(old=True),
    }[layout]()
    write_folder(tmp_path / "dst", config, {key: value.clone() for key, value in public.items()})
    again, state = native_state(tmp_path / "dst")
    assert again.layout == layout
    assert again.language.tie_words is (tied and layout != "original")
    state.pop("head.weight", None)
    native.pop("head.weight", None)
    assert state.keys() == native.keys()
    assert all(torch.equal(state[name], native[name]) for name in state)


def test_to_public_is_strict(tmp_path):
    opened, native = native_state(write_original(tmp_path))
    with fails(r"trunk.extra \(2,\) has no place in the original layout"):
        list(opened.adapter.to_public(native | {"trunk.extra": torch.zeros(2)}))
    lacking = {name: tensor for name, tensor in native.items() if name != "trunk.norm.weight"}
    with fails(rf"missing trunk.norm.weight \({WIDTH},\)"):
        list(opened.adapter.to_public(lacking))
    with fails(rf"trunk.norm.weight should have shape \({WIDTH},\) by the config, found \(3,\)"):
        list(opened.adapter.to_public(native | {"trunk.norm.weight": torch.zeros(3)}))
    with fails("has no place"):  # twice
        list(opened.adapter.to_public([*native.items(), *native.items()]))


# --- transformers as the oracle ----------------------------------------------------------------------------------


def hf_model(family, *, tied=False, six_b=False):
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    text = {k: v for k, v in language_config(family, tied=tied).items() if k not in ("architectures", "bias")}
    vision = {
        "hidden_size": V_WIDTH,
        "intermediate_size": 12,
        "num_hidden_layers": V_LAYERS,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [14, 14],
        "attention_bias": not six_b,
        "use_qk_norm": six_b,
        "norm_type": "rms_norm" if six_b else "layer_norm",
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=1,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("six_b", [False, True])
@pytest.mark.parametrize("prefix", ["saved", "new"])
def test_reads_what_transformers_saves(tmp_path, family, tied, six_b, prefix):
    """Both prefixes: `save_pretrained` writes the old one, the parameters' own names are the new one."""
    model = hf_model(family, tied=tied, six_b=six_b)
    model.save_pretrained(tmp_path)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if prefix == "new":
        kept = {k: v.clone() for k, v in state.items() if not (tied and k == "lm_head.weight")}
        write_folder(tmp_path, json.loads((tmp_path / "config.json").read_text()), kept)
    opened, native = native_state(tmp_path)
    assert opened.layout == {"saved": "hf-old", "new": "hf"}[prefix]
    assert opened.language.tie_words is tied
    assert opened.public.image_token_id == IMAGE_TOKEN
    assert opened.public.ps_version == "v2"
    assert opened.vision.qk_norm is six_b
    tower = "model.vision_tower."
    for ours, theirs in {
        "class_embedding": "embeddings.cls_token",
        "position_embedding": "embeddings.position_embeddings",
        "patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
    }.items():
        assert torch.equal(native[f"embedder.vision.{ours}"], state[tower + theirs])
    for i in range(V_LAYERS):
        ours, theirs = f"embedder.vision.layers.{i}.", f"{tower}encoder.layer.{i}."
        for leaf in ("weight", "bias"):
            if leaf == "weight" or not six_b:
                qkv = [state[f"{theirs}attention.{which}_proj.{leaf}"] for which in "qkv"]
                assert torch.equal(native[f"{ours}attn.qkv.{leaf}"], torch.cat(qkv))
                assert torch.equal(native[f"{ours}norm1.{leaf}"], state[f"{theirs}layernorm_before.{leaf}"])
                assert torch.equal(native[f"{ours}norm2.{leaf}"], state[f"{theirs}layernorm_after.{leaf}"])
            assert torch.equal(
                native[f"{ours}attn.proj.{leaf}"], state[f"{theirs}attention.projection_layer.{leaf}"]
            )
            for fc in ("fc1", "fc2"):
                assert torch.equal(native[f"{ours}mlp.{fc}.{leaf}"], state[f"{theirs}mlp.{fc}.{leaf}"])
        for mine, other in (("ls1", "lambda_1"), ("ls2", "lambda_2")):
            assert torch.equal(native[ours + mine], state[theirs + other])
        if six_b:
            for norm in ("q_norm", "k_norm"):
                assert torch.equal(
                    native[f"{ours}attn.{norm}.weight"], state[f"{theirs}attention.{norm}.weight"]
                )
    for mine, other in (("norm", "layer_norm"), ("fc1", "linear_1"), ("fc2", "linear_2")):
        for leaf in ("weight", "bias"):
            assert torch.equal(
                native[f"embedder.connect.{mine}.{leaf}"],
                state[f"model.multi_modal_projector.{other}.{leaf}"],
            )
    check_language(native, state, "model.language_model.", None if tied else "lm_head.weight", family)
    load_into(skeleton(opened), opened.reader, opened.adapter)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_language_models_of_transformers(tmp_path, family, tied):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    text = {k: v for k, v in language_config(family, tied=tied).items() if k not in ("architectures", "bias")}
    kinds = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config, kind = kinds[family]
    model = kind(config(**text)).eval()
    model.save_pretrained(tmp_path)
    opened, native = native_state(tmp_path)
    state = model.state_dict()
    check_language(native, state, "model.", None if tied else "lm_head.weight", family)
    assert opened.language.tie_words is tied
    assert opened.language.rope_theta == 1e6


# --- tying ---------------------------------------------------------------------------------------------------------


def test_tied_config_with_an_equal_matrix_is_tied(tmp_path):
    tensors = random_tensors(language_shapes("model.", "", "llama"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.embed_tokens.weight"][0, 0] = tensors["lm_head.weight"][0, 0] = float("nan")
    write_folder(tmp_path, language_config("llama", tied=True), tensors)
    opened, native = native_state(tmp_path)
    assert opened.language.tie_words
    assert "head.weight" not in native
    assert not opened.adapter.unmapped(opened.reader)


def test_tied_config_with_another_matrix_is_untied(tmp_path):
    tensors = random_tensors(language_shapes("model.", "", "llama"))
    write_folder(tmp_path, language_config("llama", tied=True), tensors)
    opened, native = native_state(tmp_path)
    assert not opened.language.tie_words
    assert torch.equal(native["head.weight"], tensors["lm_head.weight"])


def test_original_with_a_matrix_is_untied_even_if_equal(tmp_path):
    tensors = random_tensors(original_shapes())
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
    config = original_config()
    config["llm_config"]["tie_word_embeddings"] = True
    write_folder(tmp_path / "a", config, tensors)
    assert not open_checkpoint(tmp_path / "a").language.tie_words
    del tensors["language_model.lm_head.weight"]
    write_folder(tmp_path / "b", config, tensors)
    assert open_checkpoint(tmp_path / "b").language.tie_words


def test_absent_matrix_without_a_tying_flag_is_missing(tmp_path):
    tensors = random_tensors(language_shapes("model.", None, "llama"))
    write_folder(tmp_path, language_config("llama", tied=False), tensors)
    with fails(rf"missing lm_head.weight \({VOCAB}, {WIDTH}\)"):
        native_state(tmp_path)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_list_five_names_with_shapes(tmp_path):
    tensors = random_tensors(original_shapes())
    gone = [name for name in tensors if ".encoder.layers.0." in name][:7]
    for name in gone:
        del tensors[name]
    tensors["vision_model.surplus"] = torch.zeros(3, 2)
    write_folder(tmp_path, original_config(), tensors)
    opened = open_checkpoint(tmp_path)
    report = opened.adapter.unmapped(opened.reader)
    assert list(report.missing) == sorted(gone, key=list(report.missing).index)
    assert report.missing[gone[0]] == (V_WIDTH,)
    assert report.unexpected == {"vision_model.surplus": (3, 2)}
    with fails(r"\(7 in all\); unexpected vision_model.surplus \(3, 2\)") as caught:
        next(opened.adapter.from_public(opened.reader))
    assert str(caught.value).count("vision_model.encoder") == 5
    assert "\n" not in str(caught.value)


def test_wrong_shape_names_key_expected_and_found(tmp_path):
    tensors = random_tensors(original_shapes())
    tensors["mlp1.1.weight"] = torch.zeros(WIDTH, 3)
    write_folder(tmp_path, original_config(), tensors)
    with fails(
        rf"mlp1.1.weight should have shape \({WIDTH}, {4 * V_WIDTH}\) by the config, found \({WIDTH}, 3\)"
    ):
        native_state(tmp_path)


def test_other_adapters_get_their_own_remedy(tmp_path):
    tensors = random_tensors(language_shapes("model.", "", "llama"))
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(1)
    write_folder(tmp_path, language_config("llama"), tensors)
    with fails("merge them into the model first"):
        native_state(tmp_path)


def test_position_buffers_of_old_releases_are_no_difference(tmp_path):
    tensors = random_tensors(language_shapes("model.", "", "llama"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    write_folder(tmp_path, language_config("llama"), tensors)
    native_state(tmp_path)


@pytest.mark.parametrize("name", ["Phi4ForCausalLM", "Gemma2ForCausalLM"])
def test_unsupported_language_models_are_named(tmp_path, name):
    config = original_config()
    config["llm_config"] |= {"architectures": [name], "model_type": name.removesuffix("ForCausalLM").lower()}
    write_folder(tmp_path, config, random_tensors(original_shapes()))
    with pytest.raises(ConfigError, match=name.removesuffix("ForCausalLM").lower()):
        open_checkpoint(tmp_path)


def test_detect_layout():
    original, hf = {"llm_config": {}, "vision_config": {}}, {"model_type": "internvl", "vision_config": {}}
    text = {"model_type": "llama"}
    assert (
        detect_layout(original, ["vision_model.x", "mlp1.0.weight", "language_model.model.x"]) == "original"
    )
    assert detect_layout(hf, ["model.vision_tower.x", "lm_head.weight"]) == "hf"
    assert detect_layout(hf, ["vision_tower.x", "language_model.model.x"]) == "hf-old"
    assert detect_layout(text, ["model.layers.0.x", "lm_head.weight"]) == "text"
    with fails("of no known layout"):
        detect_layout(text, ["transformer.h.0.attn"])
    with fails("of no known layout .*: none"):
        detect_layout(text, [])
    with fails("mix the layouts hf and original"):
        detect_layout(hf, ["model.vision_tower.x", "vision_model.x"])
    with fails("describes transformers' InternVL, the tensors are named as in the original layout"):
        detect_layout(hf, ["vision_model.x"])
    with fails("describes InternVLChatModel"):
        detect_layout(original, ["vision_tower.x"])
    with fails("describes a 'llava' model"):
        detect_layout({"model_type": "llava", "vision_config": {}}, ["vision_tower.x"])
    with fails("a llama language model"):
        detect_layout(text, ["vision_tower.x"])


def test_adapter_for_refuses_what_does_not_go_together(tmp_path):
    opened = open_checkpoint(write_original(tmp_path))
    with fails("unknown checkpoint layout 'gguf'"):
        adapter_for("gguf", language=opened.language)
    with fails("needs a vision encoder"):
        adapter_for("hf", language=opened.language)
    with fails("has no vision encoder"):
        adapter_for("text", language=opened.language, vision=opened.vision)


# --- loading into a module -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_load_into_a_meta_module(tmp_path, dtype):
    opened = open_checkpoint(write_original(tmp_path))
    module = skeleton(opened)
    module.embedder.vision.requires_grad_(False)
    assert load_into(module, opened.reader, opened.adapter, dtype=dtype) is module
    _, native = native_state(tmp_path)
    state = module.state_dict()
    assert state.keys() == native.keys()
    for name, tensor in native.items():
        assert torch.equal(state[name], tensor.to(dtype or tensor.dtype))
        assert state[name].dtype == (dtype or torch.bfloat16)
    assert not any(p.requires_grad for p in module.embedder.vision.parameters())
    assert all(p.requires_grad for p in module.trunk.parameters())


def test_loaded_parameters_do_not_alias_the_file(tmp_path):
    opened = open_checkpoint(write_original(tmp_path))
    module = load_into(skeleton(opened), opened.reader, opened.adapter)
    for parameter in module.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        with torch.no_grad():
            parameter.zero_()
    _, native = native_state(tmp_path)
    assert all(tensor.float().abs().sum() > 0 for tensor in native.values())


def test_tied_parameters_stay_one_object(tmp_path):
    opened = open_checkpoint(write_text(tmp_path, tied=True))
    module = load_into(skeleton(opened), opened.reader, opened.adapter)
    assert module.head.weight is module.embedder.words.weight
    assert not module.head.weight.is_meta


def test_a_tied_module_takes_an_untied_checkpoint_only_if_built_untied(tmp_path):
    opened = open_checkpoint(write_text(tmp_path, tied=True))
    untied = replace(opened, language=replace(opened.language, tie_words=False))
    with fails(rf"it lacks head.weight \({VOCAB}, {WIDTH}\)"):
        load_into(skeleton(untied), opened.reader, opened.adapter)


def test_a_module_that_does_not_fit(tmp_path):
    opened = open_checkpoint(write_original(tmp_path))
    module = skeleton(opened)
    module.embedder.extra = nn.Linear(2, 2, device="meta")
    module.trunk.norm = nn.Identity()
    with fails(
        r"it lacks embedder.extra.weight \(2, 2\), embedder.extra.bias \(2,\); "
        rf"the model has no place for trunk.norm.weight \({WIDTH},\)"
    ):
        load_into(module, opened.reader, opened.adapter)
    module = skeleton(opened)
    module.trunk.norm.weight = nn.Parameter(torch.ones(3))
    with fails(rf"trunk.norm.weight of the model has shape \(3,\), .* has \({WIDTH},\)"):
        load_into(module, opened.reader, opened.adapter)


def test_a_buffer_left_on_meta_is_an_error(tmp_path):
    opened = open_checkpoint(write_original(tmp_path))
    module = skeleton(opened)
    module.trunk.register_buffer("table", torch.ones(2, device="meta"), persistent=False)
    with fails("buffer trunk.table is still on the meta device"):
        load_into(module, opened.reader, opened.adapter)


def test_mixed_dtypes_in_a_fused_tensor_lose_nothing(tmp_path):
    tensors = random_tensors(language_shapes("model.", "", "llama"), dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    write_folder(tmp_path, language_config("llama"), tensors)
    _, native = native_state(tmp_path)
    check_language(native, {k: v.float() for k, v in tensors.items()}, "model.", "lm_head.weight", "llama")


def test_reader_is_not_kept_open(tmp_path):
    opened = open_checkpoint(write_original(tmp_path))
    opened.reader.close()
    assert isinstance(opened.reader, CheckpointReader)
    assert len(dict(opened.adapter.from_public(opened.reader))) > 0  # opens again by itself
