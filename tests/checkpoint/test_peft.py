"""PEFT's files: peft itself reads what we write, and we read what it writes; fused layouts; refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.systems.test_internvl import reference, words
from torch import nn

from chiasm.checkpoint.adapters import adapter_for, open_checkpoint
from chiasm.checkpoint.peft import read_adapter, write_adapter
from chiasm.errors import CheckpointError
from chiasm.nn.lora import LoRALinear, apply_lora, fused_splits
from chiasm.parts.language.config import LanguageConfig
from chiasm.systems.internvl.load import load_folder
from chiasm.systems.internvl.model import build_language_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
# peft asks transformers for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Adapters that do something, in ours and in peft's model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A public InternVL in transformers' layout, on disk."""
    folder = tmp_path_factory.mktemp("public")
    reference("qwen2", "layer_norm").save_pretrained(folder)
    words().save(folder)
    return folder


def theirs_of(folder):
    return transformers.InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def logits(theirs, ours):
    """Of both, for one picture and a few words."""
    token = ours.spec.tokenizer.token_to_id("<IMG_CONTEXT>")
    inputs = ours.inputs([{"role": "user", "content": [{"type": "image", "image": _image()}, "Hm?"]}])
    assert (inputs.token_ids == token).any()
    with torch.no_grad():
        got = theirs(input_ids=inputs.token_ids[None], pixel_values=ours.pixels(inputs)).logits[0]
    return got[:, : ours.logits(inputs).shape[1]], ours.logits(inputs)


def _image():
    from PIL import Image

    return Image.linear_gradient("L").convert("RGB").resize((60, 40))


def ours_of(folder):
    return load_folder(folder, max_tiles=2, mode="original", dynamic=True, thumbnail=True)


def test_peft_reads_what_we_write_for_the_whole_model(saved, tmp_path):
    ours, adapter = ours_of(saved), open_checkpoint(saved).adapter
    adapter = adapter_for(
        "hf", language=open_checkpoint(saved).language, vision=open_checkpoint(saved).vision
    )
    plain, _ = logits(theirs_of(saved), ours)
    trunk, vision = ours.model.trunk, ours.model.embedder.vision
    apply_lora(trunk, ["*"], 4, 8.0, 0.05, splits=fused_splits(trunk))
    apply_lora(vision, ["layers.*"], 2, 2.0, 0.05, splits=fused_splits(vision))
    randomise(ours.model)
    write_adapter(ours.model, tmp_path / "adapter", adapter, base=str(saved))
    theirs = peft.PeftModel.from_pretrained(theirs_of(saved), tmp_path / "adapter").eval()
    got, want = logits(theirs, ours)
    assert (got - plain).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # And back into a fresh model of ours, which then gives the very same numbers.
    again = ours_of(saved)
    paths = read_adapter(again.model, tmp_path / "adapter", adapter)
    assert len(paths) == 2 * 4 + 2 * 4
    torch.testing.assert_close(logits(theirs, again)[1], want, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="adapter already"):
        read_adapter(again.model, tmp_path / "adapter", adapter)
    with pytest.raises(CheckpointError, match="adapter"):
        write_adapter(ours.model, tmp_path / "adapter", adapter)


def test_we_read_what_peft_writes_also_of_some_of_the_splits(saved, tmp_path):
    theirs = theirs_of(saved)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=r".*language_model.*(q_proj|v_proj|down_proj|up_proj)|.*vision_tower.*fc1",
        rank_pattern={"down_proj": 5},
        alpha_pattern={"fc1": 2},
        use_rslora=True,
    )
    wrapped = peft.get_peft_model(theirs, config).eval()
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    ours = ours_of(saved)
    opened = open_checkpoint(saved)
    read_adapter(
        ours.model, tmp_path / "adapter", adapter_for("hf", language=opened.language, vision=opened.vision)
    )
    got, want = logits(wrapped, ours)
    torch.testing.assert_close(want, got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["phi3", "internlm2"])
def test_layouts_that_fuse_get_one_pair_of_the_same_function(tmp_path, family):
    language = LanguageConfig(
        family=family,
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        layers=1,
        heads=4,
        kv_heads=2,
        head_dim=4,
        tie_words=False,
    )
    model = build_language_model(language)
    apply_lora(model.trunk, ["*"], 2, 4.0, splits=fused_splits(model.trunk))
    randomise(model)
    adapter = adapter_for("text", language=language)
    write_adapter(model, tmp_path / "a", adapter)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    # The merged weight of the fused layer, reckoned by peft's formula from the files, is that of ours.
    (public,) = (n.removesuffix(".weight") for n in adapter.spell("trunk.layers.0.attn.qkv.weight"))
    a, b = (stored[f"base_model.model.{public}.lora_{side}.weight"] for side in "AB")
    rank = config["rank_pattern"].get(public, config["r"])
    alpha = config["alpha_pattern"].get(public, config["lora_alpha"])
    assert a.shape[0] == rank == 6
    delta = model.trunk.layers[0].attn.qkv.delta()
    delta = delta if adapter.qkv_rows is None else delta[adapter.qkv_rows]
    torch.testing.assert_close(alpha / rank * b @ a, delta)
    again = build_language_model(language)
    read_adapter(again, tmp_path / "a", adapter)
    for path, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            torch.testing.assert_close(again.get_submodule(path).delta(), layer.delta())


@pytest.fixture
def written(tmp_path):
    model, adapter = small()
    apply_lora(model.trunk, ["layers.*.attn.out"], 2, 4.0)
    return write_adapter(model, tmp_path / "a", adapter)


def small():
    language = LanguageConfig(
        family="llama",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        layers=1,
        heads=4,
        kv_heads=2,
        head_dim=4,
        tie_words=True,
    )
    return build_language_model(language), adapter_for("text", language=language)


def test_refusals_are_one_line(written):
    model, adapter = small()
    with pytest.raises(CheckpointError, match="no LoRA layers"):
        write_adapter(model, written.parent / "b", adapter)
    tensors = load_file(written / "adapter_model.safetensors")
    config = json.loads((written / "adapter_config.json").read_text())
    name = next(iter(tensors))

    def refused(match, *, tensors=tensors, **changes):
        save_file(tensors, written / "adapter_model.safetensors")
        (written / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=match) as caught:
            read_adapter(small()[0], written, adapter)
        assert "\n" not in str(caught.value)

    refused("use_dora", use_dora=True)
    refused("modules_to_save", modules_to_save=["lm_head"])
    refused("not a whole LoRA adapter", r=None)
    refused("one of", tensors={name: tensors[name]})
    refused(
        "does not fit",
        tensors={k: v[:, :-1].contiguous() if "lora_A" in k else v for k, v in tensors.items()},
    )
    refused("elsewhere", tensors=tensors | {"base_model.model.elsewhere.lora_A.weight": torch.zeros(2, 2)})
    (written / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="not a whole LoRA adapter"):
        read_adapter(small()[0], written, adapter)
