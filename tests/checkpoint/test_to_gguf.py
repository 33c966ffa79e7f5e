"""llama.cpp's files: names and values by the gguf package, logits by transformers' GGUF loader, our own reader back.

What llama.cpp itself makes of such files was measured outside the suite (docs/serving.md).
"""

import itertools
import json

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES
from gguf.quants import quantize
from tests.checkpoint.random_checkpoints import write_text
from tests.checkpoint.servable import LLAMA3, language_config, tokenizer_of, write_servable

from chiasm.checkpoint.adapters import adapter_for, open_checkpoint
from chiasm.checkpoint.convert import convert_part
from chiasm.checkpoint.gguf import GGUFFile, llama_config, to_hf_llama
from chiasm.checkpoint.gguf_write import GGUFTensor, write_gguf
from chiasm.checkpoint.llamacpp import ARCHITECTURES, read_language, stored_type
from chiasm.checkpoint.to_gguf import convert_to_gguf
from chiasm.errors import CheckpointError, TemplateError
from chiasm.text.gguf_words import tokenizer_to_gguf
from chiasm.text.tokenizer import Tokenizer
from tiny_tokenizers import byte_fallback, byte_level

FAMILIES = ("qwen2", "qwen3", "llama", "internlm2", "internlm3", "phi3")


def native(folder):
    """Native tensors of a checkpoint folder."""
    opened = open_checkpoint(folder)
    with opened.reader:
        return opened, dict(opened.adapter.from_public(opened.reader))


def fields(path):
    """Metadata as the gguf package reads it."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {
        tensor.name: tensor for tensor in reader.tensors
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_language_reads_back_bit_for_bit(tmp_path, family, tied):
    dtype = torch.bfloat16 if tied else torch.float32
    write_servable(tmp_path / "a", family, dtype=dtype, language={"tie_word_embeddings": tied})
    report = convert_to_gguf(tmp_path / "a", tmp_path / "b")
    kind = "bf16" if tied else "f32"
    assert report.shards == (f"model-{kind}.gguf", f"mmproj-{kind}.gguf")
    opened, tensors = native(tmp_path / "a")
    with GGUFFile(tmp_path / "b" / f"model-{kind}.gguf") as file:
        config, found = read_language(file)
        found = dict(found)
        types = {info.type for info in file.tensors.values()}
    assert types == ({"F32", "BF16"} if tied else {"F32"})
    own = opened.language
    assert (config.layers, config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (
        (own.layers, own.heads, own.kv_heads, own.head_dim, own.vocab_size)
    )
    if tied and family == "internlm2":  # whose graph in llama.cpp has no tied words
        assert torch.equal(found.pop("head.weight"), found["embedder.words.weight"])
    wanted = {
        name: t for name, t in tensors.items() if name.startswith(("trunk.", "head.", "embedder.words"))
    }
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.float()), name
    assert report.tensors == len(fields(tmp_path / "b" / f"model-{kind}.gguf")[1]) + len(
        fields(tmp_path / "b" / f"mmproj-{kind}.gguf")[1]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_gguf_package(tmp_path, family):
    write_servable(tmp_path / "a", family, language={"rope_scaling": LLAMA3} if family == "llama" else {})
    convert_to_gguf(tmp_path / "a", tmp_path / "b")
    metadata, tensors = fields(tmp_path / "b" / "model-f32.gguf")
    arch = next(a for a, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    known = {TENSOR_NAMES[kind].format(bid=bid) for kind in MODEL_TENSORS[arch] for bid in range(2)}
    assert {name.rpartition(".")[0] for name in tensors} <= known
    assert metadata["general.architecture"] == ARCHITECTURES[family]
    keys = gguf.constants.Keys
    for key in (
        keys.LLM.BLOCK_COUNT,
        keys.LLM.CONTEXT_LENGTH,
        keys.Attention.HEAD_COUNT_KV,
        keys.Rope.FREQ_BASE,
    ):
        assert key.format(arch=ARCHITECTURES[family]) in metadata
    assert metadata["general.file_type"] == gguf.LlamaFileType.ALL_F32

    metadata, tensors = fields(tmp_path / "b" / "mmproj-f32.gguf")
    known = {
        TENSOR_NAMES[kind].format(bid=bid) for kind in MODEL_TENSORS[MODEL_ARCH.MMPROJ] for bid in range(4)
    }
    assert {name.removesuffix(".weight").removesuffix(".bias") for name in tensors} <= known
    assert len(tensors) == 46
    assert metadata[keys.Clip.PROJECTOR_TYPE] == gguf.VisionProjectorType.INTERNVL
    assert metadata[keys.ClipVision.Projector.SCALE_FACTOR] == 2
    assert metadata[keys.ClipVision.PROJECTION_DIM] == 32
    assert metadata[keys.ClipVision.IMAGE_MEAN] == pytest.approx([0.485, 0.456, 0.406])
    assert metadata[keys.ClipVision.Attention.LAYERNORM_EPS] == pytest.approx(1e-6)
    assert metadata["clip.vision.preproc_max_tiles"] == 6


def test_rows_of_q_and_k_are_paired_for_llama_and_not_for_qwen(tmp_path):
    """By the definition: channel i and i + half of a head become neighbours."""
    for family in ("llama", "internlm2", "qwen2"):
        write_servable(tmp_path / family, family)
        convert_to_gguf(tmp_path / family, tmp_path / f"{family}.gguf")
        _, tensors = native(tmp_path / family)
        with GGUFFile(tmp_path / f"{family}.gguf" / "model-f32.gguf") as file:
            q, k, v = (file.tensor(f"blk.1.attn_{which}.weight") for which in "qkv")
        qkv = tensors["trunk.layers.1.attn.qkv.weight"]
        order = list(range(8))
        if family != "qwen2":
            order = [0, 4, 1, 5, 2, 6, 3, 7]
        assert torch.equal(q, torch.cat([qkv[8 * head : 8 * head + 8][order] for head in range(4)]))
        assert torch.equal(k, torch.cat([qkv[32 + 8 * head : 40 + 8 * head][order] for head in range(2)]))
        assert torch.equal(v, qkv[48:])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "phi3"])
def test_transformers_loads_the_file_with_equal_logits(tmp_path, family):
    from transformers import AutoModelForCausalLM

    # Facts of the released sizes that its loader takes for granted instead of reading them.
    language = {
        "phi3": {"rope_scaling": None, "pad_token_id": 0},
        "qwen3": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    }
    write_servable(tmp_path / "a", family, language=language.get(family))
    convert_part(tmp_path / "a", tmp_path / "text", "language")
    convert_to_gguf(tmp_path / "a", tmp_path / "b")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", gguf_file="model-f32.gguf", dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32)
    ids = torch.tensor([[5, 9, 300, 44, 44, 7]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids).logits, rtol=1e-5, atol=1e-5)


def test_our_own_llama_reader_takes_the_file(tmp_path):
    """The one that reads the wheel of SmolLM2."""
    write_text(tmp_path / "a", "llama")
    config = json.loads((tmp_path / "a" / "config.json").read_text()) | {"rope_scaling": None}
    config["vocab_size"] = rows = byte_level().vocab_size
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    opened = {name: t.clone() for name, t in _text_tensors(config).items()}
    _save(tmp_path / "a", opened)
    byte_level().save(tmp_path / "a")
    convert_to_gguf(tmp_path / "a", tmp_path / "b", dtype="f32")
    with GGUFFile(tmp_path / "b" / "model-f32.gguf") as file:
        assert llama_config(file.metadata, file.tensors)["vocab_size"] == rows
        found = dict(to_hf_llama(file))
    assert found.keys() == opened.keys()
    assert all(torch.equal(found[name], opened[name]) for name in opened)


def _text_tensors(config):
    from chiasm.checkpoint.config import language_from_public

    adapter = adapter_for("text", language=language_from_public(config))
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(shape, generator=generator)
        for entry in adapter.plan
        for name, shape in adapter.pieces(entry)
    }


def _save(folder, tensors):
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_mmproj_values_and_the_order_of_positions(tmp_path):
    write_servable(tmp_path / "a")
    convert_to_gguf(tmp_path / "a", tmp_path / "b")
    _, tensors = native(tmp_path / "a")
    with GGUFFile(tmp_path / "b" / "mmproj-f32.gguf") as file:
        assert file.metadata["chiasm.position_rows"] == "class-last"
        positions = tensors["embedder.vision.position_embedding"][0]
        assert torch.equal(file.tensor("v.position_embd.weight"), torch.cat((positions[1:], positions[:1])))
        assert torch.equal(file.tensor("v.class_embd"), tensors["embedder.vision.class_embedding"].flatten())
        patch = tensors["embedder.vision.patch_embedding.weight"]
        assert torch.equal(file.tensor("v.patch_embd.weight"), patch)
        for n, which in enumerate("qkv"):
            rows = tensors["embedder.vision.layers.1.attn.qkv.bias"][32 * n : 32 * n + 32]
            assert torch.equal(file.tensor(f"v.blk.1.attn_{which}.bias"), rows)
        assert torch.equal(file.tensor("v.blk.0.ls2.weight"), tensors["embedder.vision.layers.0.ls2"])
        assert torch.equal(file.tensor("mm.model.mlp.3.weight"), tensors["embedder.connect.fc2.weight"])


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_element_types(tmp_path, dtype):
    write_servable(tmp_path / "a")
    report = convert_to_gguf(tmp_path / "a", tmp_path / "b", dtype=dtype)
    assert report.shards[0] == f"model-{dtype}.gguf"
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    _, plain = native(tmp_path / "a")
    for name in report.shards:
        metadata, tensors = fields(tmp_path / "b" / name)
        assert metadata["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]
        for tensor in tensors.values():
            vector = len(tensor.shape) == 1 or tensor.name.endswith("_norm.weight")
            alone = ("v.position_embd.weight", *(() if dtype == "f16" else ("v.patch_embd.weight",)))
            if vector or tensor.name in alone:
                assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, tensor.name
            elif int(tensor.shape[0]) % 32 == 0:
                assert tensor.tensor_type == kind, tensor.name
            else:
                assert tensor.tensor_type == (gguf.GGMLQuantizationType.F16 if dtype == "q8_0" else kind)
    _, tensors = fields(tmp_path / "b" / report.shards[0])
    words = plain["embedder.words.weight"].numpy()
    assert np.array_equal(
        tensors["token_embd.weight"].data,
        quantize(words, kind).reshape(tensors["token_embd.weight"].data.shape),
    )


def test_q8_0_equals_the_gguf_package(tmp_path):
    rows = (
        torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 3, 64)[:, None]
    )
    rows[3] = 0
    rows[4, :32] = torch.arange(32) - 15.5  # halves, which round away from zero
    write_gguf(
        tmp_path / "x.gguf", {"general.architecture": "x"}, [GGUFTensor("w", (64, 96), "Q8_0", lambda: rows)]
    )
    _, tensors = fields(tmp_path / "x.gguf")
    assert np.array_equal(tensors["w"].data, quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0))
    with GGUFFile(tmp_path / "x.gguf") as file:
        error = (file.tensor("w") - rows).abs() / rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    assert error[40:].max() < 1e-2  # above them fp16 scales underflow


def test_long_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    import chiasm.checkpoint.gguf_write as module

    rows = torch.randn(20, 64)
    for kind in ("F32", "F16", "BF16", "Q8_0"):
        planned = [GGUFTensor("w", (20, 64), kind, lambda: rows)]
        write_gguf(tmp_path / "whole.gguf", {"a": 1}, planned)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_CHUNK", 32)
            write_gguf(tmp_path / "pieces.gguf", {"a": 1}, planned)
        assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_metadata_of_every_kind(tmp_path):
    given = {
        "general.architecture": "x",
        "text": "ä\n",
        "yes": True,
        "count": 4_000_000_000,
        "real": 0.1,
        "texts": ["a", ""],
        "whole": [-1, 2],
        "reals": [0.5],
        "switches": [True, False],
    }
    write_gguf(tmp_path / "x.gguf", given, [])
    found, _ = fields(tmp_path / "x.gguf")
    assert found["real"] == pytest.approx(0.1)
    assert {key: found[key] for key in given if key != "real"} == {
        k: v for k, v in given.items() if k != "real"
    }
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.metadata["whole"] == [-1, 2]
    for key, value in (("x", []), ("x", [1, "a"]), ("x", None), ("x", -1), ("x", 1 << 40), ("x", [[1]])):
        with pytest.raises(CheckpointError, match="GGUF metadata 'x'"):
            write_gguf(tmp_path / "y.gguf", {key: value}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_tensors_that_cannot_be_written(tmp_path):
    big = torch.full((2, 32), 1e6)

    def attempt(*tensors):
        write_gguf(tmp_path / "x.gguf", {"a": 1}, tensors)

    with pytest.raises(
        CheckpointError, match=r"tensor w holds 1e\+06, beyond what float16 can: write it as bf16"
    ):
        attempt(GGUFTensor("w", (2, 32), "F16", lambda: big))
    with pytest.raises(CheckpointError, match="w should have shape"):
        attempt(GGUFTensor("w", (2, 33), "F32", lambda: big))
    with pytest.raises(CheckpointError, match="no whole Q8_0 blocks"):
        attempt(GGUFTensor("w", (2, 33), "Q8_0", lambda: big))
    with pytest.raises(CheckpointError, match="too large for Q8_0"):
        attempt(GGUFTensor("w", (2, 32), "Q8_0", lambda: big * 100))
    with pytest.raises(CheckpointError, match="infinite values or NaN"):
        attempt(GGUFTensor("w", (2, 32), "Q8_0", lambda: big / 0))
    with pytest.raises(CheckpointError, match="occurs twice"):
        attempt(*[GGUFTensor("w", (2, 32), "F32", lambda: big)] * 2)
    with pytest.raises(CheckpointError, match="no element type 'Q4'"):
        attempt(GGUFTensor("w", (2, 32), "Q4", lambda: big))
    with pytest.raises(CheckpointError, match="cannot be written"):
        attempt(GGUFTensor("w", (), "F32", lambda: torch.tensor(1.0)))
    assert not list(tmp_path.iterdir())
    kept = torch.tensor([[float("inf"), 1.0]]).expand(1, 2)  # what is infinite already is not lost
    attempt(GGUFTensor("w", (1, 2), "F16", lambda: kept))


def test_stored_types():
    assert stored_type("F16", "blk.0.attn_q_norm.weight", (8,)) == "F32"
    assert stored_type("F16", "output_norm.weight", (8, 8)) == "F32"
    assert stored_type("Q8_0", "x.weight", (8, 48)) == "F16"


# --- words -----------------------------------------------------------------------------------------------------------

TEXTS = (
    "Hello world, don't 1999\n\n  x",
    "你是书生·万象 👍 café",
    "<|im_start|>user\n<img><IMG_CONTEXT></img>\nWhat?<|im_end|>",
)


def test_byte_level_words_give_the_same_ids_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    write_servable(tmp_path / "a")
    convert_to_gguf(tmp_path / "a", tmp_path / "b")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b", gguf_file="model-f32.gguf")
    ours = byte_level()
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)


def merged_by_score(text, tokens, scores):
    """llama.cpp's rule, slowly: join the neighbours whose union scores best, the leftmost first; bytes for the rest."""
    ids = {token: index for index, token in enumerate(tokens)}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [
            (scores[ids[a + b]], -n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def test_scores_give_the_ids_of_the_merges():
    tokenizer = byte_fallback()
    words = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size + 2)
    tokens, scores, types = (words[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert words["tokenizer.ggml.model"] == "llama"
    assert words["tokenizer.ggml.add_space_prefix"] is False
    assert words["tokenizer.ggml.add_bos_token"] is True
    for text in ("What is in the picture? A cat.", "user\n\nThe answer is 42", "你是 zebra ñ", "  x  don't"):
        assert merged_by_score(text, tokens, scores) == tokenizer.encode(text)
    assert tokens[-2:] == [f"[PAD{tokenizer.vocab_size}]", f"[PAD{tokenizer.vocab_size + 1}]"]
    assert types[-2:] == [gguf.TokenType.UNUSED] * 2
    kinds = {token: kind for token, kind in zip(tokens, types, strict=True)}
    assert kinds["<0x0A>"] == gguf.TokenType.BYTE
    assert kinds["<unk>"] == gguf.TokenType.UNKNOWN
    assert kinds["<IMG_CONTEXT>"] == gguf.TokenType.CONTROL
    assert kinds["\u2581"] == gguf.TokenType.NORMAL


def test_a_space_in_front_of_every_stretch():
    assert tokenizer_to_gguf(byte_fallback(prepend=True), 900)["tokenizer.ggml.add_space_prefix"] is True


def test_ends_begin_and_template(tmp_path):
    write_servable(tmp_path / "a", "internlm2", system_message="Be brief.")
    convert_to_gguf(tmp_path / "a", tmp_path / "b")
    metadata, _ = fields(tmp_path / "b" / "model-f32.gguf")
    ours = tokenizer_of("internlm2")
    assert metadata["tokenizer.ggml.eos_token_id"] == ours.token_to_id("<|im_end|>") != ours.eos_id
    assert metadata["tokenizer.ggml.bos_token_id"] == ours.bos_id
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert "Be brief." in metadata["tokenizer.chat_template"]
    convert_to_gguf(tmp_path / "a", tmp_path / "c", template="Hermes-2")
    metadata, _ = fields(tmp_path / "c" / "model-f32.gguf")
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(CheckpointError, match=r"ends answers with '<\|end\|>', which is no token"):
        convert_to_gguf(tmp_path / "a", tmp_path / "d", template="phi3-chat")
    with pytest.raises(TemplateError):
        convert_to_gguf(tmp_path / "a", tmp_path / "d", template="none")


def altered(tokenizer, change, **config):
    """A tokenizer with another state."""
    from tokenizers import Tokenizer as Backend

    state = json.loads(tokenizer.backend.to_str())
    change(state)
    return Tokenizer(Backend.from_str(json.dumps(state)), {**tokenizer.config, **config})


def test_rules_of_words_that_have_names():
    def llama3(state):
        step = state["pre_tokenizer"]["pretokenizers"][0]
        step["pattern"]["Regex"] = step["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
        state["normalizer"] = None
        state["model"]["ignore_merges"] = True

    def gpt2(state):
        state["pre_tokenizer"] = {**state["pre_tokenizer"]["pretokenizers"][1], "use_regex": True}

    def smollm(state):
        digits = {"type": "Digits", "individual_digits": True}
        words = {**state["pre_tokenizer"]["pretokenizers"][1], "use_regex": True}
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, words]}

    for name, change in (
        ("llama-bpe", llama3),
        ("gpt-2", gpt2),
        ("smollm", smollm),
        ("qwen2", lambda state: None),
    ):
        assert tokenizer_to_gguf(altered(byte_level(), change), 900)["tokenizer.ggml.pre"] == name


def test_words_that_llama_cpp_has_no_rule_for():
    def refused(tokenizer, match, rows=900, **options):
        with pytest.raises(CheckpointError, match=match) as caught:
            tokenizer_to_gguf(tokenizer, rows, **options)
        assert "\n" not in str(caught.value)

    def pattern(state):
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+"}

    def whole(state):
        state["model"]["ignore_merges"] = True

    def lower(state):
        state["normalizer"] = {"type": "Lowercase"}

    def collapse(state):
        state["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Strip", "strip_left": True, "strip_right": True}],
        }

    def first(state):
        state["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first",
            "split": False,
        }

    def strips(state):
        state["added_tokens"][-1]["lstrip"] = True

    refused(altered(byte_level(), pattern), "cuts text into words by a rule that llama.cpp has no name for")
    refused(altered(byte_level(), whole), "does not merge as llama.cpp does under that name")
    refused(altered(byte_level(), lower), "normalises text by Lowercase")
    refused(altered(byte_fallback(), collapse), "a character map or collapses white space")
    refused(altered(byte_fallback(), first), "puts a space in front of the first word only")
    refused(altered(byte_level(), strips), "look at what stands before them")
    refused(byte_fallback(greedy=True), "some control tokens that swallow white space and others that do not")
    refused(byte_level(), "has the id .* but the word table only 10 rows", rows=10)


def test_a_name_does_not_change_the_words():
    """llama.cpp strips white space behind control tokens where the name says phi-3."""
    assert tokenizer_to_gguf(byte_fallback(), 900, name="my-Phi-3-copy")["general.name"] == "model"
    assert tokenizer_to_gguf(byte_fallback(), 900, name="mine")["general.name"] == "mine"

    def greedy(state):
        state["added_tokens"] = [
            token | {"rstrip": token["content"] not in ("<unk>", "<s>", "<|endoftext|>")}
            for token in state["added_tokens"]
        ]

    def with_end(state):
        last = max(token["id"] for token in state["added_tokens"])
        token = {**state["added_tokens"][-1], "id": last + 1, "content": "<|endoftext|>"}
        state["added_tokens"].append(token)
        greedy(state)

    assert tokenizer_to_gguf(altered(byte_fallback(), with_end), 900, name="x")["general.name"] == "phi-3 x"
    with pytest.raises(CheckpointError, match="swallow white space"):
        tokenizer_to_gguf(altered(byte_fallback(), greedy), 900, name="x")


# --- refusals and the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ps_version": "v1"}, "no graph for the pixel unshuffle of ps_version 'v1'"),
        ({"select_layer": -2}, "no graph for the encoder's layer -2"),
        ({"pad2square": True}, "no graph for pictures that are padded"),
        ({"vision": {"norm_type": "rms_norm"}}, "32 wide and 2 layers deep with rms_norm"),
        ({"vision": {"qk_normalization": True}}, "norms of queries and keys"),
        ({"force_image_size": 28}, "tiles of 28 pixels with positions for 56"),
    ],
)
def test_eyes_that_llama_cpp_has_no_graph_for(tmp_path, changes, match):
    write_servable(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=match):
        convert_to_gguf(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    convert_part(tmp_path / "a", tmp_path / "text", "language")  # the remedy that is named
    assert convert_to_gguf(tmp_path / "text", tmp_path / "b").shards == ("model-f32.gguf",)


def test_notes_and_refusals_of_the_decoder(tmp_path):
    write_servable(
        tmp_path / "a", language={"rope_scaling": {"type": "dynamic", "factor": 2.0}}, use_thumbnail=False
    )
    notes = " ".join(convert_to_gguf(tmp_path / "a", tmp_path / "b").notes)
    assert "no dynamic rotary scaling: answers are the same up to 512 tokens only" in notes
    assert "always adds an overview" in notes
    write_servable(tmp_path / "p", "phi3")
    assert "context of at most 256 tokens" in " ".join(convert_to_gguf(tmp_path / "p", tmp_path / "q").notes)
    metadata, tensors = fields(tmp_path / "q" / "model-f32.gguf")
    assert tensors["rope_factors_long.weight"].data.tolist() == [1.5, 2.0, 2.5, 3.0]
    assert metadata["phi3.rope.scaling.original_context_length"] == 256
    write_servable(tmp_path / "l", "llama", language={"rope_scaling": {"type": "linear", "factor": 4.0}})
    convert_to_gguf(tmp_path / "l", tmp_path / "m")
    assert fields(tmp_path / "m" / "model-f32.gguf")[0]["llama.rope.scaling.factor"] == 4.0
    scaling = language_config("phi3")["rope_scaling"] | {"original_max_position_embeddings": 256}
    write_servable(tmp_path / "w", "llama", language={"rope_scaling": scaling})
    with pytest.raises(CheckpointError, match="longrope for Phi-3 only"):
        convert_to_gguf(tmp_path / "w", tmp_path / "x")


def test_divisors_of_llama3_give_its_frequencies(tmp_path):
    write_servable(tmp_path / "a", "llama", language={"rope_scaling": LLAMA3})
    convert_to_gguf(tmp_path / "a", tmp_path / "b")
    opened, _ = native(tmp_path / "a")
    with GGUFFile(tmp_path / "b" / "model-f32.gguf") as file:
        divisors = file.tensor("rope_freqs.weight")
    plain = 1.0 / 10_000.0 ** (torch.arange(0, 8, 2).float() / 8)
    torch.testing.assert_close(plain / divisors, opened.language.rope.inverse_frequencies())
    assert divisors.max() == pytest.approx(8.0)


def test_reading_what_is_not_ours(tmp_path):
    write_servable(tmp_path / "a")
    convert_to_gguf(tmp_path / "a", tmp_path / "b")
    with (
        GGUFFile(tmp_path / "b" / "mmproj-f32.gguf") as file,
        pytest.raises(CheckpointError, match="'clip' is not"),
    ):
        read_language(file)
    with GGUFFile(tmp_path / "b" / "model-f32.gguf") as file:
        file.metadata["qwen2.block_count"] = 900
        with pytest.raises(CheckpointError, match="900 layers but"):
            read_language(file)
        file.metadata["qwen2.block_count"] = 1
        with pytest.raises(CheckpointError, match=r"no place in a qwen2 model for tensor 'blk\.1"):
            read_language(file)
        file.metadata["qwen2.feed_forward_length"] = 65
        with pytest.raises(CheckpointError, match="the metadata say"):
            read_language(file)
        file.metadata["qwen2.embedding_length"] = "x"
        with pytest.raises(CheckpointError, match=r"qwen2.embedding_length is x"):
            read_language(file)


def test_command(tmp_path, capsys):
    from chiasm.cli.app import main

    write_servable(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "gguf", "--dtype", "f16"]) == 0
    assert "original -> gguf" in capsys.readouterr().out
    assert (tmp_path / "b" / "model-f16.gguf").is_file()
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "hf", "--dtype", "f16"]) == 2
    assert "--dtype belongs to --to gguf" in capsys.readouterr().err
    order = ["--position-rows", "class-first"]
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "hf", *order]) == 2
    assert "--position-rows belongs to --to gguf" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "p"), "--to", "gguf", *order]) == 0
    assert (
        "note: the encoder's position rows are in the order of llama.cpp's converter"
        in capsys.readouterr().err
    )
    assert (
        main(["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "gguf", "--vocab-size", "9"]) == 2
    )
    assert "--vocab-size changes a whole model" in capsys.readouterr().err
