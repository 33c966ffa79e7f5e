"""Language families, from their own checkpoints to logits: transformers is the oracle, random small configs, fp32."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.checkpoint.random_checkpoints import (
    IMAGE_TOKEN,
    LAYERS,
    language_config,
    language_shapes,
    original_config,
    original_shapes,
    random_tensors,
    write_folder,
    write_original,
    write_text,
    write_tokenizer,
)
from tests.contracts.skeleton import extend

from chiasm.checkpoint.adapters import adapter_for, load_into, open_checkpoint
from chiasm.checkpoint.config import InternVLPublicConfig, read_config
from chiasm.checkpoint.convert import convert
from chiasm.checkpoint.store import CheckpointReader, read_json
from chiasm.data.sequence import Sequence
from chiasm.errors import CheckpointError, ConfigError
from chiasm.model.generate import Decoding, generate
from chiasm.systems.internvl.model import build_language_model

SWITCH, TRAINED = 16, 64
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 2.0],
    "long_factor": [1.5, 2.0, 4.0, 9.0],
}
CASES = {
    "phi3": ("phi3", None, 4),
    "phi3-grouped": ("phi3", None, 2),
    "phi3-longrope": ("phi3", LONGROPE, 4),
    "phi3-stated-attention-factor": ("phi3", LONGROPE | {"attention_factor": 1.7}, 2),
    "phi3-stated-factor": ("phi3", LONGROPE | {"factor": 3.0}, 2),
    "qwen3": ("qwen3", None, 2),
    "qwen3-dynamic": ("qwen3", DYNAMIC, 1),
    "internlm2": ("internlm2", None, 2),
    "internlm2-one-head-a-key": ("internlm2", None, 4),
    "internlm2-dynamic": ("internlm2", DYNAMIC, 2),
    "internlm3-dynamic": ("internlm3", DYNAMIC, 2),
}


def reference(family: str, scaling: dict | None, kv_heads: int) -> torch.nn.Module:
    """A random transformers model whose every parameter matters; InternLM2 is a Llama there."""
    kinds = {
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "internlm2": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "internlm3": (transformers.AutoConfig.for_model, transformers.LlamaForCausalLM),
    }
    make, kind = kinds[family]
    # 4 heads of 8; Qwen3's heads are wider than width / heads.
    more: dict = {"head_dim": 12} if family == "qwen3" else {"head_dim": 8} if family == "internlm3" else {}
    if scaling and scaling["rope_type"] == "longrope":
        more["original_max_position_embeddings"] = SWITCH
    config = make(
        *(["internlm3"] if family == "internlm3" else []),
        vocab_size=53,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=TRAINED if scaling is None or "short_factor" in scaling else 32,
        rope_parameters={"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})},
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    config._attn_implementation = "eager"
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model


def as_internlm2(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A Llama's weights as InternLM2 stores them; the interleaving is written head by head."""
    config, out = model.config, {}
    D, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for name, tensor in model.state_dict().items():
        for theirs, ours in (
            ("model.embed_tokens", "model.tok_embeddings"),
            ("lm_head", "output"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            name = name.replace(theirs, ours)
        if "_proj" not in name:
            out[name] = tensor.clone()
    for i, layer in enumerate(model.model.layers):
        q, k, v = (getattr(layer.self_attn, f"{x}_proj").weight.detach().split(D) for x in "qkv")
        rows = []
        for head in range(config.num_key_value_heads):
            rows += [*q[head * group : (head + 1) * group], k[head], v[head]]
        out[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(rows)
    return out


def save(folder, family: str, model: torch.nn.Module) -> None:
    model.save_pretrained(folder)
    if family == "internlm2":
        config = json.loads((folder / "config.json").read_text())
        config |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
        (folder / "config.json").write_text(json.dumps(config))
        save_file(as_internlm2(model), folder / "model.safetensors")


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A transformers model, and ours loaded from the files of its family."""
    family, scaling, kv_heads = CASES[request.param]
    model = reference(family, scaling, kv_heads)
    folder = tmp_path_factory.mktemp("m")
    save(folder, family, model)
    opened = open_checkpoint(folder)
    assert (opened.layout, opened.language.family) == ("text", family)
    with torch.device("meta"):
        ours = build_language_model(opened.language)
    return model, load_into(ours, opened.reader, opened.adapter).eval()


def tokens(length: int, seed: int = 1) -> list[int]:
    return torch.randint(3, 53, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(ours, sequence: Sequence) -> torch.Tensor:
    with torch.inference_mode():
        return ours.head.logits(ours.hidden(sequence))


@pytest.mark.parametrize("length", [1, SWITCH, SWITCH + 1, 45])
def test_logits_equal_transformers(pair, length: int) -> None:
    """On both sides of the length at which the factors change, and beyond the trained length of dynamic ones."""
    model, ours = pair
    ids = tokens(length)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert float((logits_of(ours, Sequence.of_text(ids)) - expected).abs().max()) <= 1e-4


def test_packed_equals_separate(pair) -> None:
    """Short and long documents in one row: each has the frequencies of its own length."""
    _, ours = pair
    documents = [Sequence.of_text(tokens(n, n)) for n in (5, 40, SWITCH, 31)]
    together = logits_of(ours, Sequence.pack(documents)).split([len(d) for d in documents])
    for document, logits in zip(documents, together, strict=True):
        torch.testing.assert_close(logits, logits_of(ours, document), rtol=1e-5, atol=1e-4)


def test_cached_equals_full(pair) -> None:
    """Ragged prompts that stay below, cross and start above the switch; the slow twin reads everything anew."""
    model, ours = pair
    prompts = [Sequence.of_text(tokens(n, n)) for n in (3, SWITCH - 2, SWITCH + 3)]
    written = generate(ours, prompts, limit=8)
    for prompt, cached in zip(prompts, written, strict=True):
        sequence = prompt
        for token in cached:
            logits = logits_of(ours, sequence)[-1]
            best, second = logits.topk(2).values.tolist()
            assert int(logits.argmax()) == token or best - second < 1e-4
            with torch.inference_mode():
                theirs = model(sequence.ids_T[None]).logits[0, -1]
            assert float((logits - theirs).abs().max()) <= 1e-4
            sequence = extend(sequence, Sequence.of_text([token]))


def test_generation_across_the_switch_equals_transformers(tmp_path) -> None:
    model = reference("phi3", LONGROPE, 2)
    save(tmp_path, "phi3", model)
    opened = open_checkpoint(tmp_path)
    ours = load_into(build_language_model(opened.language), opened.reader, opened.adapter).eval()
    ids = tokens(SWITCH - 3, 7)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert generate(ours, [Sequence.of_text(ids)], limit=9) == [expected[0, len(ids) :].tolist()]
    kept = Decoding(ours, [Sequence.of_text(ids)], limit=9, keep_hidden=True)
    hidden = [events[0].hidden for events in iter(kept.step, [])]
    whole = Sequence.of_text(expected[0, :-1].tolist())
    with torch.inference_mode():
        torch.testing.assert_close(hidden[-1], ours.hidden(whole)[-1], rtol=1e-5, atol=1e-5)


def test_a_cache_is_not_continued_past_the_switch(tmp_path) -> None:
    save(tmp_path, "phi3", reference("phi3", LONGROPE, 2))
    opened = open_checkpoint(tmp_path)
    ours = load_into(build_language_model(opened.language), opened.reader, opened.adapter)
    cache = ours.new_cache()
    with torch.inference_mode():
        ours.hidden(Sequence.of_text(tokens(SWITCH)), cache)
        with pytest.raises(ConfigError, match=f"16 cached tokens grows past {SWITCH}") as caught:
            ours.hidden(Sequence.of_text([3], start=SWITCH), cache)
    assert "\n" not in str(caught.value)


# --- layouts -------------------------------------------------------------------------------------------------------


def tensors_of(folder) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {key: reader.tensor(key) for key in reader}


def same_tensors(a, b) -> bool:
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a
    )


@pytest.mark.parametrize("family", ["internlm2", "internlm3", "qwen3"])
@pytest.mark.parametrize("six_b", [False, True])
@pytest.mark.parametrize("through", ["hf", "hf-old"])
def test_original_to_hf_and_back(tmp_path, family, six_b, through) -> None:
    write_original(tmp_path / "a", family, six_b=six_b)
    write_tokenizer(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", through)
    convert(tmp_path / "b", tmp_path / "c", "original")
    assert same_tensors(tmp_path / "a", tmp_path / "c")
    a, b, c = (read_config(tmp_path / name) for name in "abc")
    assert replace(c, image_token_id=None) == a
    assert b.language_config() == a.language_config()
    config = read_json(tmp_path / "c" / "config.json")
    for added in ("hf_config", "tie_word_embeddings"):
        config.pop(added)
    assert config == original_config(family, six_b=six_b)
    text = read_json(tmp_path / "b" / "config.json")["text_config"]
    assert text["model_type"] == {"qwen3": "qwen3"}.get(family, "llama")


@pytest.mark.parametrize("family", ["internlm2", "internlm3", "qwen3"])
def test_between_the_hf_spellings(tmp_path, family) -> None:
    write_original(tmp_path / "a", family)
    write_tokenizer(tmp_path / "a")
    for src, dst, to in (("a", "b", "hf"), ("b", "c", "hf-old"), ("c", "d", "hf"), ("c", "e", "original")):
        assert convert(tmp_path / src, tmp_path / dst, to).target == to
    assert same_tensors(tmp_path / "b", tmp_path / "d")
    assert same_tensors(tmp_path / "a", tmp_path / "e")
    assert tensors_of(tmp_path / "b").keys() != tensors_of(tmp_path / "c").keys()
    languages = [read_config(tmp_path / name).language_config() for name in "abcde"]
    assert all(language == languages[0] for language in languages)


@pytest.mark.parametrize("family", ["internlm2", "internlm3", "qwen3"])
@pytest.mark.parametrize("to", ["hf", "hf-old"])
def test_transformers_reads_what_we_write(tmp_path, family, to) -> None:
    write_original(tmp_path / "a", family)
    write_tokenizer(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", to)
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "b", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    opened = open_checkpoint(tmp_path / "a")
    ours = build_language_model(opened.language)
    language = adapter_for("text", language=opened.language).plan
    native = dict(opened.adapter.from_public(opened.reader, dtype=torch.float32))
    ours.load_state_dict({entry.native: native[entry.native] for entry in language})
    ids = [token % 30 for token in tokens(20)]
    with torch.inference_mode():
        expected = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    scale = float(expected.abs().max())
    assert float((logits_of(ours, Sequence.of_text(ids)) - expected).abs().max()) <= 1e-4 * max(1, scale)


@pytest.mark.parametrize("family", ["internlm2", "internlm3", "qwen3", "phi3"])
def test_the_same_layout_only_rewrites(tmp_path, family) -> None:
    write_original(tmp_path / "a", family)
    convert(tmp_path / "a", tmp_path / "b", "original")
    assert same_tensors(tmp_path / "a", tmp_path / "b")
    assert read_config(tmp_path / "a") == read_config(tmp_path / "b")


@pytest.mark.parametrize("family", ["internlm2", "internlm3", "qwen3", "phi3"])
@pytest.mark.parametrize("tied", [False, True])
def test_text_layout_round_trip(tmp_path, family, tied) -> None:
    opened = open_checkpoint(write_text(tmp_path, family, tied=tied))
    assert (opened.layout, opened.language.family, opened.language.tie_words) == ("text", family, tied)
    public = dict(opened.adapter.to_public(opened.adapter.from_public(opened.reader)))
    assert public.keys() == tensors_of(tmp_path).keys()
    assert all(torch.equal(public[name], tensor) for name, tensor in tensors_of(tmp_path).items())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_wqkv_is_taken_apart_head_by_head(tmp_path, dtype) -> None:
    public = random_tensors(language_shapes("model.", "", "internlm2"))
    write_folder(tmp_path, language_config("internlm2"), public)
    opened = open_checkpoint(tmp_path)
    native = dict(opened.adapter.from_public(opened.reader, dtype=dtype))
    for i in range(LAYERS):  # 4 query heads and 2 key heads of 4: q0 q1 k0 v0 q2 q3 k1 v1
        heads = public[f"model.layers.{i}.attention.wqkv.weight"].to(dtype or torch.bfloat16).split(4)
        expected = torch.cat([heads[n] for n in (0, 1, 4, 5, 2, 6, 3, 7)])
        assert torch.equal(native[f"trunk.layers.{i}.attn.qkv.weight"], expected)


def test_phi3_has_no_hf_port(tmp_path) -> None:
    write_original(tmp_path / "a", "phi3")
    write_tokenizer(tmp_path / "a")
    for to in ("hf", "hf-old"):
        with pytest.raises(CheckpointError, match="no port of InternVL on Phi-3") as caught:
            convert(tmp_path / "a", tmp_path / "b", to)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no port of InternVL on Phi-3"):
        replace(read_config(tmp_path / "a"), image_token_id=IMAGE_TOKEN).to_hf()


def test_a_converted_llama_that_names_internlm2_goes_back_to_it(tmp_path) -> None:
    """The public conversion leaves `architectures` of the source in its Llama config."""
    write_original(tmp_path / "a", "internlm2")
    write_tokenizer(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", "hf")
    path = tmp_path / "b" / "config.json"
    config = read_json(path)
    del config["original_config"]
    config["text_config"]["architectures"] = ["InternLM2ForCausalLM"]
    path.write_text(json.dumps(config))
    convert(tmp_path / "b", tmp_path / "c", "original")
    assert same_tensors(tmp_path / "a", tmp_path / "c")
    llm = read_json(tmp_path / "c" / "config.json")["llm_config"]
    assert (llm["architectures"], llm["bias"]) == (["InternLM2ForCausalLM"], False)
    config["text_config"]["architectures"] = ["LlamaForCausalLM"]
    path.write_text(json.dumps(config))
    convert(tmp_path / "b", tmp_path / "d", "original")
    assert read_config(tmp_path / "d").language_config().family == "llama"


def test_absent_keys_take_the_defaults_of_the_class() -> None:
    for family, kind in (("phi3", transformers.Phi3Config), ("qwen3", transformers.Qwen3Config)):
        llm = {"model_type": family}
        config = InternVLPublicConfig.from_original(original_config(family) | {"llm_config": llm})
        ours, theirs = config.language_config(), kind()
        assert ours.vocab_size == theirs.vocab_size
        assert ours.intermediate_size == theirs.intermediate_size
        assert ours.kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
        assert (ours.max_positions, ours.norm_eps) == (theirs.max_position_embeddings, theirs.rms_norm_eps)


FACTORS = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0]}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("phi3", {"sliding_window": 64}, "sliding_window is 64"),
        ("phi3", {"sliding_window": True}, "sliding_window is True"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor"),
        ("phi3", {"original_max_position_embeddings": None}, "needs original_max_position_embeddings"),
        ("phi3", {"original_max_position_embeddings": "4k"}, "original_max_position_embeddings is '4k'"),
        ("phi3", {"rope_scaling": FACTORS | {"short_factor": [1.0]}}, "short_factor must hold 2 numbers"),
        ("phi3", {"rope_scaling": FACTORS | {"long_factor": None}}, "long_factor must hold 2 numbers"),
        ("phi3", {"rope_scaling": FACTORS | {"long_factor": [1, 0]}}, "long_factor must hold positive"),
        ("phi3", {"rope_scaling": FACTORS | {"factor": "x"}}, "factor is 'x'"),
        ("phi3", {"rope_scaling": FACTORS | {"type": "yarn"}}, "'yarn' is not known"),
        ("phi3", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention"]}, "layer_types"),
        ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, "architectures"),
        ("internlm2", {"bias": True}, "bias is True"),
        ("internlm2", {"rope_scaling": {"type": "dynamic"}}, "lacks 'factor'"),
        ("internlm2", {"num_key_value_heads": 3}, "multiple of kv_heads"),
        ("internlm3", {"qkv_bias": True}, "qkv_bias is True"),
    ],
)
def test_bad_configs_name_the_key(family, change, message) -> None:
    config = original_config(family)
    config["llm_config"] |= change
    with pytest.raises(ConfigError, match=message) as caught:
        InternVLPublicConfig.from_original(config).language_config()
    assert "\n" not in str(caught.value)


def test_windows_that_hold_the_context_are_read() -> None:
    for window in (None, 128, 262144):
        config = original_config("phi3")
        config["llm_config"]["sliding_window"] = window
        assert InternVLPublicConfig.from_original(config).language_config().max_positions == 128


@pytest.mark.parametrize("family", ["internlm2", "internlm3", "qwen3", "phi3"])
def test_original_shapes_are_all_mapped(tmp_path, family) -> None:
    write_folder(tmp_path, original_config(family), random_tensors(original_shapes(family)))
    opened = open_checkpoint(tmp_path)
    assert not opened.adapter.unmapped(opened.reader)
