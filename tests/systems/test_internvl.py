"""The whole InternVL model against transformers: random small configs, fp32, text families and both norms."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tests.contracts.skeleton import extend
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from chiasm.checkpoint.convert import convert
from chiasm.checkpoint.store import CheckpointReader
from chiasm.checkpoint.vocab import SPECIAL_TOKENS
from chiasm.data.sequence import Sequence
from chiasm.errors import ContextOverflowError, UsageError
from chiasm.model.chat import ChatModel, Reply
from chiasm.systems.internvl.load import load_folder
from chiasm.text.tokenizer import Tokenizer

TILE, PATCH = 28, 7  # 16 patches, 4 tokens a tile


def words() -> Tokenizer:
    """A byte tokenizer with the control tokens of the templates and InternVL's nine."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, {"eos_token": None})
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS])
    return tokenizer


def reference(family: str, norm: str, *, seed: int = 0) -> torch.nn.Module:
    tokenizer = words()
    text = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "model_type": "llama" if family == "internlm2" else family,
        "tie_word_embeddings": False,
    }
    if family == "qwen3":
        text["head_dim"] = 12
    if family == "internlm2":  # what the public conversion leaves: a Llama that names its origin
        text["architectures"] = ["InternLM2ForCausalLM"]
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [TILE, TILE],
        "patch_size": [PATCH, PATCH],
        "norm_type": norm,
        "use_qk_norm": norm == "rms_norm",
        "attention_bias": norm == "layer_norm",
    }
    config = transformers.InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.token_to_id("<IMG_CONTEXT>"),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        tie_word_embeddings=False,
    )
    model = transformers.InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model


PAIRS = [
    *itertools.product(["qwen2", "llama"], ["layer_norm", "rms_norm"]),
    ("qwen3", "layer_norm"),
    ("internlm2", "rms_norm"),
]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.nn.Module, ChatModel]:
    """A transformers model, and ours loaded from the folder that it was saved to."""
    theirs = reference(*request.param)
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs.save_pretrained(folder)
    words().save(folder)
    return theirs, loaded(folder, request.param[0])


def loaded(folder: Path, family: str) -> ChatModel:
    """Ours; an InternLM2 by way of its own names and row order, which only the original layout has."""
    options: dict = {"max_tiles": 6, "mode": "original", "dynamic": True, "thumbnail": True}
    if family != "internlm2":
        return load_folder(folder, **options)
    original = folder.with_name(folder.name + "-original")
    convert(folder, original, to="original")
    assert "language_model.model.layers.1.attention.wqkv.weight" in CheckpointReader(original)
    return load_folder(original, template="internvl-hf", system="", **options)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def conversation(*sizes: tuple[int, int], text: str = "What is it?") -> list[dict]:
    images = [{"type": "image", "image": picture(w, h, i)} for i, (w, h) in enumerate(sizes)]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


QUESTIONS = [conversation(), conversation((28, 28)), conversation((90, 40)), conversation((64, 64), (30, 80))]


@pytest.mark.parametrize("messages", QUESTIONS, ids=["text", "one tile", "wide", "two pictures"])
def test_logits_equal_transformers(pair: tuple[torch.nn.Module, ChatModel], messages: list[dict]) -> None:
    theirs, ours = pair
    inputs = ours.inputs(messages)
    pixels = ours.pixels(inputs)
    with torch.inference_mode():
        options = {"pixel_values": pixels} if len(pixels) else {}
        expected = theirs(input_ids=inputs.token_ids[None], **options).logits[0]
    logits = ours.logits(inputs)
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) <= 1e-4
    torch.testing.assert_close(ours.logits(inputs, [-1, 0]), logits[[-1, 0]], rtol=1e-4, atol=1e-4)


def test_greedy_tokens_equal_transformers(pair: tuple[torch.nn.Module, ChatModel]) -> None:
    theirs, ours = pair
    for messages in QUESTIONS:
        inputs = ours.inputs(messages)
        reply = ours.chat(messages, max_new_tokens=12)
        ids = torch.cat([inputs.token_ids, torch.tensor(reply.token_ids)])
        pixels = ours.pixels(inputs)
        with torch.inference_mode():
            options = {"pixel_values": pixels} if len(pixels) else {}
            logits = theirs(input_ids=ids[None], **options).logits[0]
        rows = logits[len(inputs.token_ids) - 1 : -1]
        top = rows.topk(2).values
        sure = (top[:, 0] - top[:, 1]) > 1e-3
        assert sure.any()
        assert (rows.argmax(-1) == torch.tensor(reply.token_ids))[sure].all()


def test_batch_equals_one_by_one(pair: tuple[torch.nn.Module, ChatModel]) -> None:
    """Ragged prompts with 0, 1 and several tiles in one row change no logit by more than 2e-4."""
    _, ours = pair
    laid = [ours.inputs(m) for m in QUESTIONS]
    with torch.inference_mode():
        packed = ours.model.hidden(Sequence.pack([i.sequence for i in laid]))
        for inputs, hidden in zip(laid, packed.split([len(i.token_ids) for i in laid]), strict=True):
            together = ours.model.head.logits(hidden)
            assert float((together - ours.logits(inputs)).abs().max()) <= 2e-4
    replies = ours.batch(QUESTIONS, max_new_tokens=8)
    for messages, reply in zip(QUESTIONS, replies, strict=True):
        alone = ours.chat(messages, max_new_tokens=8)
        prefix = _equal_where_sure(ours, messages, alone.token_ids, reply.token_ids)
        assert prefix, (alone.token_ids, reply.token_ids)
    ours.features.clear()  # neither side may profit from what the other has encoded
    exact = ours.batch(QUESTIONS, max_new_tokens=8, deterministic=True)
    alone = []
    for messages in reversed(QUESTIONS):
        ours.features.clear()
        alone.insert(0, ours.chat(messages, max_new_tokens=8))
    assert exact == alone


def test_features_do_not_depend_on_what_is_encoded_beside_them(
    pair: tuple[torch.nn.Module, ChatModel],
) -> None:
    _, ours = pair
    laid = [ours.inputs(m).sequence for m in QUESTIONS[1:]]
    with torch.inference_mode():
        ours.features.clear()
        together = ours.model.embedder(Sequence.pack(laid)).x_TC.split([len(s) for s in laid])
        for sequence, rows in zip(laid, together, strict=True):
            ours.features.clear()
            assert torch.equal(ours.model.embedder(sequence).x_TC, rows)


def _equal_where_sure(ours: ChatModel, messages: list[dict], a: list[int], b: list[int]) -> bool:
    """Equal up to the first token whose top-2 margin is at most 1e-3."""
    inputs = ours.inputs(messages)
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            ids = torch.cat([inputs.token_ids, torch.tensor(a[:n], dtype=torch.int64)])
            sequence = inputs.sequence
            if n:
                sequence = extend(sequence, Sequence.of_text(a[:n]))
            assert len(sequence) == len(ids)
            with torch.inference_mode():
                top = ours.model.head.logits(ours.model.hidden(sequence)[-1:]).topk(2).values[0]
            return float(top[0] - top[1]) <= 1e-3
    return True


def drain(pieces: Generator[str, None, Reply]) -> tuple[str, Reply]:
    """All pieces joined, and what the generator returned."""
    got = []
    while True:
        try:
            got.append(next(pieces))
        except StopIteration as end:
            return "".join(got), end.value


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "seed": 3, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2}]
)
def test_stream_joins_to_the_text(pair: tuple[torch.nn.Module, ChatModel], options: dict) -> None:
    _, ours = pair
    reply = ours.chat("Say something", max_new_tokens=24, **options)
    assert "".join(ours.stream("Say something", max_new_tokens=24, **options)) == reply.text
    assert reply == ours.chat("Say something", max_new_tokens=24, **options)


def test_stop_strings_end_an_answer_and_are_held_back(
    pair: tuple[torch.nn.Module, ChatModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that writes a known text: its every infix is found, whole tokens or not, streamed or not."""
    _, ours = pair
    text = "abcab abcabd. The end"
    ids = ours.spec.tokenizer.encode(text)

    def chat(stop: object, *, streamed: bool) -> tuple[str, str]:
        script = iter([*ids, *ours.stop_ids[:1]])
        monkeypatch.setattr(
            ours.model.head,
            "logits",
            lambda hidden: torch.nn.functional.one_hot(
                torch.full((len(hidden),), next(script)), ours.spec.tokenizer.vocab_size
            ).float(),
        )
        if streamed:
            pieces = ours.stream("Say it", stop=stop)
            got, reply = drain(pieces)
            assert reply.text == got
            return got, reply.finish
        reply = ours.chat("Say it", stop=stop)
        return reply.text, reply.finish

    for streamed in (False, True):
        assert chat((), streamed=streamed) == (text, "stop")
        for begin in range(len(text)):
            stop = text[begin : begin + 4]
            assert chat((stop, "never"), streamed=streamed) == (text[: text.index(stop)], "stop")
        assert chat(("abcabx", "zz"), streamed=streamed) == (text, "stop")


def test_second_question_about_a_picture_skips_the_encoder(pair: tuple[torch.nn.Module, ChatModel]) -> None:
    _, ours = pair
    ours.features.clear()
    before = (ours.features.hits, ours.features.misses)
    first = ours.chat("What is it?", [picture(90, 40)], max_new_tokens=4)
    second = ours.chat("What is it?", [picture(90, 40)], max_new_tokens=4)
    both = ours.batch([conversation((90, 40)), conversation((90, 40), text="And where?")], max_new_tokens=4)
    assert first == second
    assert both[0].text == first.text
    assert ours.features.misses - before[1] == 1
    assert ours.features.hits - before[0] == 3  # once for every conversation that joins


def test_several_turns_and_limits(pair: tuple[torch.nn.Module, ChatModel]) -> None:
    _, ours = pair
    messages = [
        *conversation((28, 28)),
        {"role": "assistant", "content": "A dot."},
        {"role": "user", "content": "Sure?"},
    ]
    reply = ours.chat(messages, max_new_tokens=3)
    assert reply.usage == {
        "prompt_tokens": len(ours.inputs(messages).token_ids),
        "completion_tokens": 3,
        "tiles": 1,
        "frames": 0,
        "reused_tokens": 0,
    }
    assert reply.finish == "length"
    with pytest.raises(ContextOverflowError, match="512"):
        ours.chat("long " * 600)
    with pytest.raises(UsageError, match="max_tokens"):
        ours.chat("hi", max_tokens=3)
    room = 512 - len(ours.inputs("x" * 440).token_ids)
    assert len(ours.chat("x" * 440, max_new_tokens=10_000).token_ids) <= room
    with pytest.raises(UsageError, match="whole number"):
        ours.chat("hi", max_new_tokens="3")
    with pytest.raises(UsageError, match="images must be a list"):
        ours.chat("hi", "photo.png")
    with pytest.raises(UsageError, match="outside"):
        ours.logits(ours.inputs("hi"), [9999])


def test_a_converted_checkpoint_answers_alike(
    pair: tuple[torch.nn.Module, ChatModel], tmp_path: Path
) -> None:
    theirs, ours = pair
    theirs.save_pretrained(tmp_path / "hf")
    words().save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "original", to="original")
    again = load_folder(tmp_path / "original", template="internvl-hf", system="")
    inputs = ours.inputs(conversation((28, 28)))
    assert torch.equal(again.model.hidden(inputs.sequence), ours.model.hidden(inputs.sequence))
