"""Random checkpoints with the true names and shapes of the released layouts, in tiny sizes.

Names are spelled out here by hand, apart from the package's own tables, so that the two can disagree.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, INNER, LAYERS, VOCAB = 16, 24, 2, 40  # language; 4 heads of 4, 2 of keys and values
V_WIDTH, V_INNER, V_LAYERS = 8, 12, 2  # vision; 2 heads, 28 px tiles of 4 patches
IMAGE_TOKEN = 33

# What released files carry beside the keys that shape the encoder.
VISION_NOISE = {
    "architectures": ["InternVisionModel"],
    "capacity_factor": 1.2,
    "drop_path_rate": 0.1,
    "laux_allreduce": "all_nodes",
    "moe_coeff_ratio": 0.5,
    "noisy_gate_policy": "RSample_before",
    "shared_expert_intermediate_size": 3072,
    "use_flash_attn": True,
    "use_moe": False,
}


CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "internlm3": "InternLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def language_config(family: str = "qwen2", *, tied: bool = False) -> dict:
    config = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in ("llama", "internlm2", "internlm3"):
        config["bias"] = False  # InternLM2's word, left over in converted files
    if family == "internlm3":
        config["head_dim"] = 4
    if family == "qwen3":
        config |= {"head_dim": 6, "attention_bias": False, "rope_scaling": None}
    if family == "phi3":
        config |= {
            "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 6.0]},
            "original_max_position_embeddings": 64,
            "sliding_window": 262144,
            "rope_theta": 10000.0,
        }
    return config


def vision_config(*, six_b: bool = False, noise: bool = True) -> dict:
    config = {
        "model_type": "intern_vit_6b",
        "hidden_size": V_WIDTH,
        "intermediate_size": V_INNER,
        "num_hidden_layers": V_LAYERS,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": 28,
        "num_channels": 3,
        "hidden_act": "gelu",
        "norm_type": "rms_norm" if six_b else "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": not six_b,
        "qk_normalization": six_b,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 0.1,
    }
    return config | (VISION_NOISE if noise else {})


def original_config(family: str = "qwen2", *, six_b: bool = False, **changes) -> dict:
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 28,
        "llm_config": {
            **language_config(family),
            "_name_or_path": "somewhere",
            "attn_implementation": "eager",
            "return_dict": True,
            "torch_dtype": "bfloat16",
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": vision_config(six_b=six_b),
        **changes,
    }


def language_shapes(base: str, head: str | None, family: str) -> dict[str, tuple[int, ...]]:
    """`head` is the prefix of the output matrix (None: there is none)."""
    words = "tok_embeddings" if family == "internlm2" else "embed_tokens"
    shapes = {f"{base}{words}.weight": (VOCAB, WIDTH), f"{base}norm.weight": (WIDTH,)}
    q, kv = (24, 12) if family == "qwen3" else (16, 8)
    for i in range(LAYERS):
        layer = f"{base}layers.{i}."
        if family == "internlm2":
            shapes |= {
                f"{layer}attention_norm.weight": (WIDTH,),
                f"{layer}ffn_norm.weight": (WIDTH,),
                f"{layer}attention.wqkv.weight": (32, WIDTH),
                f"{layer}attention.wo.weight": (WIDTH, 16),
                f"{layer}feed_forward.w1.weight": (INNER, WIDTH),
                f"{layer}feed_forward.w2.weight": (WIDTH, INNER),
                f"{layer}feed_forward.w3.weight": (INNER, WIDTH),
            }
            continue
        shapes |= {
            f"{layer}input_layernorm.weight": (WIDTH,),
            f"{layer}post_attention_layernorm.weight": (WIDTH,),
            f"{layer}self_attn.o_proj.weight": (WIDTH, q),
            f"{layer}mlp.down_proj.weight": (WIDTH, INNER),
        }
        if family == "phi3":
            shapes[f"{layer}self_attn.qkv_proj.weight"] = (32, WIDTH)
            shapes[f"{layer}mlp.gate_up_proj.weight"] = (2 * INNER, WIDTH)
            continue
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (q, WIDTH),
            f"{layer}self_attn.k_proj.weight": (kv, WIDTH),
            f"{layer}self_attn.v_proj.weight": (kv, WIDTH),
            f"{layer}mlp.gate_proj.weight": (INNER, WIDTH),
            f"{layer}mlp.up_proj.weight": (INNER, WIDTH),
        }
        if family == "qwen2":
            shapes |= {
                f"{layer}self_attn.q_proj.bias": (16,),
                f"{layer}self_attn.k_proj.bias": (8,),
                f"{layer}self_attn.v_proj.bias": (8,),
            }
        if family == "qwen3":
            shapes |= {f"{layer}self_attn.q_norm.weight": (6,), f"{layer}self_attn.k_norm.weight": (6,)}
    output = "output.weight" if family == "internlm2" else "lm_head.weight"
    return shapes | ({} if head is None else {f"{head}{output}": (VOCAB, WIDTH)})


def original_shapes(family: str = "qwen2", *, six_b: bool = False) -> dict[str, tuple[int, ...]]:
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, V_WIDTH),
        "vision_model.embeddings.patch_embedding.weight": (V_WIDTH, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (V_WIDTH,),
        "vision_model.embeddings.position_embedding": (1, 5, V_WIDTH),
        "mlp1.0.weight": (4 * V_WIDTH,),
        "mlp1.0.bias": (4 * V_WIDTH,),
        "mlp1.1.weight": (WIDTH, 4 * V_WIDTH),
        "mlp1.1.bias": (WIDTH,),
        "mlp1.3.weight": (WIDTH, WIDTH),
        "mlp1.3.bias": (WIDTH,),
    }
    for i in range(V_LAYERS):
        layer = f"vision_model.encoder.layers.{i}."
        shapes |= {
            f"{layer}norm1.weight": (V_WIDTH,),
            f"{layer}norm2.weight": (V_WIDTH,),
            f"{layer}attn.qkv.weight": (3 * V_WIDTH, V_WIDTH),
            f"{layer}attn.proj.weight": (V_WIDTH, V_WIDTH),
            f"{layer}attn.proj.bias": (V_WIDTH,),
            f"{layer}mlp.fc1.weight": (V_INNER, V_WIDTH),
            f"{layer}mlp.fc1.bias": (V_INNER,),
            f"{layer}mlp.fc2.weight": (V_WIDTH, V_INNER),
            f"{layer}mlp.fc2.bias": (V_WIDTH,),
            f"{layer}ls1": (V_WIDTH,),
            f"{layer}ls2": (V_WIDTH,),
        }
        if six_b:
            shapes |= {f"{layer}attn.q_norm.weight": (V_WIDTH,), f"{layer}attn.k_norm.weight": (V_WIDTH,)}
        else:
            shapes |= {
                f"{layer}norm1.bias": (V_WIDTH,),
                f"{layer}norm2.bias": (V_WIDTH,),
                f"{layer}attn.qkv.bias": (3 * V_WIDTH,),
            }
    return shapes | language_shapes("language_model.model.", "language_model.", family)


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype=torch.bfloat16, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_folder(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """One shard, written by the safetensors package itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_sharded(folder: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = list(tensors)
    table = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        held = names[i::shards]
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
        table |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_original(
    folder: Path, family: str = "qwen2", *, six_b: bool = False, seed: int = 0, **changes
) -> Path:
    config = original_config(family, six_b=six_b, **changes)
    return write_folder(folder, config, random_tensors(original_shapes(family, six_b=six_b), seed=seed))


def write_text(folder: Path, family: str = "llama", *, tied: bool = False, seed: int = 0) -> Path:
    shapes = language_shapes("model.", None if tied else "", family)
    return write_folder(folder, language_config(family, tied=tied), random_tensors(shapes, seed=seed))


def write_tokenizer(folder: Path) -> None:
    """The parts of a tokenizer folder that name added tokens, as the releases have them (no vocabulary)."""
    names = [
        "<|im_start|>",
        "<|im_end|>",
        "<img>",
        "</img>",
        "<IMG_CONTEXT>",
        "<quad>",
        "</quad>",
        "<ref>",
        "</ref>",
    ]
    ids = {name: IMAGE_TOKEN - 4 + i for i, name in enumerate(names)}
    (folder / "added_tokens.json").write_text(json.dumps(ids), encoding="utf-8")
    decoder = {str(i): {"content": name, "special": True} for name, i in ids.items()}
    config = {"added_tokens_decoder": decoder, "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
