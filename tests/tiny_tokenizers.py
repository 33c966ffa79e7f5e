"""Small tokenizers with the habits of the real ones: merged newlines, byte fallback, begin tokens, greedy specials."""

import json
from functools import cache

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from chiasm.text.tokenizer import Tokenizer

IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
CORPUS = [
    "user\nWhat is in the picture?\nA cat and a dog.\n\n\nassistant\n\nThe answer is 42.\n\n",
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
    "system\nYou are helpful.   Image-1: Image-2: <ref>cat</ref><box>[[1, 2, 3, 4]]</box> don't we'll 1999\n \n  x",
] * 3


@cache
def byte_level() -> Tokenizer:
    """Like Qwen2.5: byte-level BPE, NFC, newlines merge with their neighbours, no begin token."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = Tokenizer(backend, {"eos_token": None})
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS])
    return tokenizer


@cache
def byte_fallback(*, prepend: bool = False, greedy: bool = False) -> Tokenizer:
    """Like InternLM2 and Phi-3: BPE over ▁ with byte fallback and a begin token.

    prepend: a ▁ before every stretch of text between special tokens. greedy: Phi-3's special tokens, which swallow the
    white space after them.
    """
    trained = Backend(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁|\n"), "merged_with_next")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "\n", *state["vocab"]]
    vocab = {word: n for n, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(m) for m in state["merges"]]
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prepend else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if greedy:
        names = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        backend.add_special_tokens(
            [AddedToken(name, rstrip=True, normalized=False, special=True) for name in names]
        )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"})
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", *IMAGE_TOKENS])
    return tokenizer
