"""Tokenizers of slow releases: vocab.json + merges.txt and SentencePiece models, against transformers and slow twins.

The real sentencepiece package is not among the test dependencies; `spm_models` spells its algorithm out.
"""

import contextlib
import json
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import smollm2_strings
import spm_models
from chiasm.errors import CheckpointError
from chiasm.text.sentencepiece import backend_from_model, parse_model, read_model
from chiasm.text.tokenizer import Tokenizer
from chiasm.text.vocab_files import QWEN2_WORDS
from spm_models import CONTROL, NORMAL, UNUSED, USER, model_bytes, slow_encode, trained_pieces, unigram_pieces
from tiny_tokenizers import CORPUS, IMAGE_TOKENS

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS]


def texts(count: int = 700) -> list[str]:
    """Prose, code, other scripts, white space of all sorts, and runs, where equal merges compete."""
    rng = random.Random(1)
    made = [*CORPUS, *smollm2_strings.strings()[: count - 250]]
    for _ in range(150):
        word = rng.choice(["ab", "aba", "=", "-", " ", "  a", "ha", "abc", "0", "\n", "=-"])
        made.append(
            rng.choice(["", "a", "x ", "b"]) + word * rng.randrange(1, 14) + rng.choice(["", " ", "b"])
        )
    made += ["".join(rng.choice("ab= -0h中é\n\tÅÅ") for _ in range(rng.randrange(50))) for _ in range(100)]
    return made


TEXTS = texts()


def added(token: str, **changes: bool) -> dict:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": token, **flags, **changes}


# --- vocab.json + merges.txt -----------------------------------------------------------------------------------------


def write_qwen2(folder: Path, *, old: bool = False, crlf: bool = False, **config) -> Path:
    """A slow Qwen2 release; old: as written before added_tokens_decoder."""
    folder.mkdir(exist_ok=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())["model"]
    merges = [" ".join(pair) for pair in state["merges"]]
    end = "\r\n" if crlf else "\n"
    (folder / "vocab.json").write_text(json.dumps(state["vocab"], ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_bytes((end.join(["#version: 0.2", *merges]) + end).encode())
    size = len(state["vocab"])
    ids = {token: size + n for n, token in enumerate(SPECIAL)}
    roles = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    stated: dict = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}
    if old:
        (folder / "added_tokens.json").write_text(json.dumps(ids), encoding="utf-8")
        table = {"additional_special_tokens": SPECIAL[1:], **{k: v for k, v in roles.items() if v}}
        (folder / "special_tokens_map.json").write_text(json.dumps(table), encoding="utf-8")
    else:
        decoder = {str(n): added(token) for token, n in ids.items()}
        decoder[str(size + len(SPECIAL))] = added("<tool_call>", special=False)
        stated |= roles | {"added_tokens_decoder": decoder, "additional_special_tokens": SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | config), encoding="utf-8")
    return folder


def size_of(folder: Path) -> int:
    return len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))


CHAT = "<|im_start|>user\n<img><IMG_CONTEXT></img>\nwhat is it?<|im_end|>\n\n<|im_start|>assistant\n"


@pytest.mark.parametrize("old", [False, True])
def test_qwen2_ids_equal_those_of_transformers(old: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_qwen2(tmp_path, old=old, crlf=old)
    ours = Tokenizer.from_file(folder)
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder)
    assert len(TEXTS) >= 500
    for text in [*TEXTS, CHAT, "a<tool_call> b", " <|im_end|> x"]:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids), text
    assert ours.vocab_size == len(theirs)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.pad_id == theirs.pad_token_id
    assert ours.bos_id is None
    assert [ours.token_to_id(t) for t in SPECIAL] == [theirs.convert_tokens_to_ids(t) for t in SPECIAL]
    assert {ours.token_to_id(t) for t in SPECIAL} <= ours.special_ids


def test_a_converted_tokenizer_is_saved_as_one_file(tmp_path: Path) -> None:
    ours = Tokenizer.from_file(write_qwen2(tmp_path / "slow"))
    ours.save(tmp_path / "fast")
    again = Tokenizer.from_file(tmp_path / "fast")
    for text in [*TEXTS[::10], CHAT]:
        assert again.encode(text) == ours.encode(text)
    assert again.special_ids == ours.special_ids


def test_added_tokens_keep_ids_with_gaps_between_them(tmp_path: Path) -> None:
    folder = write_qwen2(tmp_path)
    size = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    table = {
        str(size): added("<|endoftext|>"),
        str(size + 40): added("<far>"),
        str(size + 41): added("<next>"),
    }
    config = {"tokenizer_class": "Qwen2TokenizerFast", "added_tokens_decoder": table, "eos_token": "<far>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_file(folder)
    assert ours.encode("<far><next><|endoftext|>") == [size + 40, size + 41, size]
    assert ours.eos_id == size + 40


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / "merges.txt").unlink(), "has vocab.json but no merges.txt"),
        (
            lambda f: (f / "merges.txt").write_text("#version: 0.2\nzz qq\n"),
            "merges.txt:2: 'zz qq' joins what is not",
        ),
        (lambda f: (f / "merges.txt").write_bytes(b"\xff\xfe"), "not readable as text"),
        (lambda f: (f / "vocab.json").write_text('{"a": 0, "b": 0}'), "has an id twice"),
        (lambda f: (f / "vocab.json").write_text('{"a": "0"}'), "is no table of ids"),
        (lambda f: (f / "vocab.json").write_text("{"), "not readable as JSON"),
        (
            lambda f: (f / "tokenizer_config.json").write_text('{"tokenizer_class": "OtherTokenizer"}'),
            "has the tokenizer class 'OtherTokenizer'",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {"x": {}}}'
            ),
            "added token 'x' is malformed",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text(
                json.dumps(
                    {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {"9" * 5000: added("<x>")}}
                )
            ),
            "added token '9{40}' is malformed",
        ),
        (
            lambda f: (f / "tokenizer_config.json").write_text(
                json.dumps(
                    {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": {"9" * 10: added("<x>")}}
                )
            ),
            "added token '9{10}' is malformed",
        ),
        (lambda f: (f / "vocab.json").write_text(json.dumps({"a": 1 << 32})), "is no table of ids"),
        (lambda f: (f / "added_tokens.json").write_text(json.dumps({"<x>": 1 << 32})), "the id of '<x>' is"),
        (lambda f: (f / "added_tokens.json").write_text('{"<x>": "7"}'), "the id of '<x>' is '7'"),
        (
            lambda f: (f / "added_tokens.json").write_text(json.dumps({"<x>": size_of(f) + 1})),
            "belongs to .* and to",
        ),
    ],
)
def test_damaged_vocabularies_are_one_line(break_it, said: str, tmp_path: Path) -> None:
    folder = write_qwen2(tmp_path)
    break_it(folder)
    with pytest.raises(CheckpointError, match=said) as caught:
        Tokenizer.from_file(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["other.json", "tokenizer.json", "none/", "tokenizer.model"])
def test_a_missing_file_is_not_replaced_by_others_of_its_folder(name: str, tmp_path: Path) -> None:
    write_qwen2(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder: give a folder") as caught:
        Tokenizer.from_file(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


# --- SentencePiece ---------------------------------------------------------------------------------------------------

SHAPES = [
    {"dummy_prefix": True},
    {"dummy_prefix": False},
    {"dummy_prefix": True, "collapse": True},
    {"dummy_prefix": True, "byte_fallback": False},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: ",".join(f"{k}={v}" for k, v in shape.items()))
@pytest.mark.parametrize("kind", [2, 1], ids=["bpe", "unigram"])
def test_sentencepiece_ids_equal_the_slow_twin(kind: int, shape: dict) -> None:
    pieces = trained_pieces() if kind == 2 else unigram_pieces()
    backend = backend_from_model(parse_model(model_bytes(list(pieces), kind=kind, **shape)))
    short = [text[:160] for text in TEXTS if not any(p in text for p, _, k in pieces if k != NORMAL)]
    assert len(short) >= 500
    for text in short:
        ids = backend.encode(text, add_special_tokens=False).ids
        expected = slow_encode(text, pieces, kind=kind, **shape)
        if kind == 1 and ids != expected:  # the same pieces in another order are as likely
            ids, expected = sorted(ids), sorted(expected)
        assert ids == expected, text
        if shape.get("byte_fallback", True) and not shape.get("collapse"):
            written = backend.decode(backend.encode(text, add_special_tokens=False).ids)
            assert written == text.replace(spm_models.SPACE, " "), text


@given(st.text(alphabet="ab= -0hc中é\n", max_size=60))
def test_merging_in_runs_equals_the_slow_twin(text: str) -> None:
    pieces = trained_pieces()
    backend = backend_from_model(parse_model(model_bytes(list(pieces))))
    assert backend.encode(text, add_special_tokens=False).ids == slow_encode(text, pieces)


def write_pieces(folder: Path, pieces=None, *, config: dict, **shape) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model_bytes(list(pieces or trained_pieces()), **shape))
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


PHI3 = ["<|assistant|>", "<|step|>", "<|system|>", "<|end|>", "<|user|>"]


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_ids_equal_those_of_transformers(legacy: bool, tmp_path: Path) -> None:
    """Merges by transformers' own rule; legacy puts the space before each stretch, as its older converter does."""
    transformers = pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = trained_pieces()
    size = len(pieces)
    tokens = ["<|endoftext|>", *PHI3, *IMAGE_TOKENS]
    table = {str(size + n): added(t, rstrip=t in PHI3) for n, t in enumerate(tokens)}
    table |= {str(n): added(t, rstrip=t == "</s>") for n, t in enumerate(["<unk>", "<s>", "</s>"])}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "added_tokens_decoder": table,
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
    }
    ours = Tokenizer.from_file(write_pieces(tmp_path, config=config))
    vocab = {p: n for n, (p, _, _) in enumerate(pieces)}
    scores = {p: s for p, s, k in pieces if k == NORMAL}
    merges = generate_merges(vocab, scores, skip_tokens={p for p, _, k in pieces if k != NORMAL})
    theirs = transformers.LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy)
    if legacy:
        from tokenizers import normalizers

        theirs._tokenizer.pre_tokenizer = None
        theirs._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    theirs.add_tokens(
        [
            transformers.AddedToken(t, rstrip=t in PHI3 or t == "</s>", normalized=False, special=True)
            for t in [*tokens, "<unk>", "<s>", "</s>"]
        ]
    )
    chat = "<|system|>\nBe brief.<|end|><|user|>\n <img><IMG_CONTEXT></img> what is it?<|end|><|assistant|>\n"
    for text in [*TEXTS, chat, " a<|end|> b", "<s>x</s> y"]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
    assert ours.encode(chat, add_special_tokens=True)[0] == ours.bos_id == 1
    assert ours.eos_id == size
    stretch = ours.encode("x<|end|>a")
    assert ours.id_to_token(stretch[-1]) == ("▁a" if legacy else "a")


def internlm2(folder: Path, *, dummy_prefix: bool = False) -> tuple[Tokenizer, int]:
    """A model file whose last pieces are unused names, and the public configuration that takes them over."""
    pieces = [*trained_pieces(), *((f"[UNUSED_TOKEN_{n}]", -9000.0 - n, NORMAL) for n in range(141, 147))]
    size = len(pieces)
    names = [
        "<|plugin|>",
        "<|interpreter|>",
        "<|action_end|>",
        "<|action_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    table = {str(size - 6 + n): added(name) for n, name in enumerate([*names, *IMAGE_TOKENS])}
    table |= {str(n): added(t) for n, t in enumerate(["<unk>", "<s>", "</s>"])}
    config = {
        "added_tokens_decoder": table,
        "additional_special_tokens": [*names[::-1], *IMAGE_TOKENS],
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "pad_token": "</s>",
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    return Tokenizer.from_file(write_pieces(folder, pieces, config=config, dummy_prefix=dummy_prefix)), size


def test_internlm2_takes_its_unused_pieces_over(tmp_path: Path) -> None:
    ours, size = internlm2(tmp_path)
    assert ours.token_to_id("<|im_end|>") == size - 2
    assert ours.token_to_id("<|im_start|>") == size - 1
    assert [ours.token_to_id(t) for t in IMAGE_TOKENS] == list(range(size, size + 9))
    assert ours.token_to_id("[UNUSED_TOKEN_145]") is None
    assert ours.vocab_size == size + 9
    ids = ours.encode("<|im_start|>user\na , b<|im_end|>", add_special_tokens=True)
    assert ids[:2] == [1, size - 1]
    assert ids[2:-1] == slow_encode("user\na , b", trained_pieces(), dummy_prefix=False)
    assert ids[-1] == size - 2
    assert ours.decode(ids) == "user\na , b"  # the release's class would remove the space before the comma
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 2, 2)
    spelled = ours.encode("[UNUSED_TOKEN_145]")
    assert ours.decode(spelled) == "[UNUSED_TOKEN_145]"
    assert len(spelled) > 1


def test_an_added_token_takes_over_a_piece_of_its_spelling(tmp_path: Path) -> None:
    pieces = [*trained_pieces(), ("<q>", -7000.0, NORMAL)]
    size = len(pieces)
    table = {str(size): added("<p>"), str(size + 1): added("<q>")}
    config = {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": table}
    ours = Tokenizer.from_file(write_pieces(tmp_path, pieces, config=config))
    assert ours.encode("<q><p>") == [size + 1, size]
    assert ours.id_to_token(size - 1) is None


def test_internlm2_hands_each_stretch_over_as_a_text(tmp_path: Path) -> None:
    ours, size = internlm2(tmp_path, dummy_prefix=True)
    stretches = ["user\nhello", " world"]
    ids = ours.encode("<|im_start|>".join(stretches))
    expected = [slow_encode(stretch, trained_pieces(), dummy_prefix=True) for stretch in stretches]
    assert ids == [*expected[0], size - 1, *expected[1]]


def test_a_saved_sentencepiece_tokenizer_begins_and_streams_alike(tmp_path: Path) -> None:
    ours, _ = internlm2(tmp_path / "slow")
    ours.save(tmp_path / "fast")
    again = Tokenizer.from_file(tmp_path / "fast")
    for text in TEXTS[::10]:
        ids = ours.encode(text, add_special_tokens=True)
        assert again.encode(text, add_special_tokens=True) == ids
        stream = again.stream()
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == ours.decode(ids)


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
def test_transformers_reads_the_saved_folder(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    slow = tmp_path / "slow"
    ours = internlm2(slow)[0] if kind == "internlm2" else Tokenizer.from_file(write_qwen2(slow))
    ours.save(tmp_path / "fast")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "fast")
    for text in [*TEXTS[::7], CHAT]:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text), text
        assert theirs(text).input_ids == ours.encode(text, add_special_tokens=True), text
    assert theirs.eos_token_id == ours.eos_id


def test_user_defined_and_control_pieces() -> None:
    pieces = [*trained_pieces(), ("<sep>", 0.0, USER), ("<ctl>", 0.0, CONTROL), ("never", 0.0, UNUSED)]
    tokenizer = Tokenizer(backend_from_model(parse_model(model_bytes(pieces, dummy_prefix=False))))
    at = len(trained_pieces())
    ids = tokenizer.encode("a<sep>b<ctl>")
    assert (ids[1], ids[3]) == (at, at + 1)
    assert tokenizer.special_ids == {0, 1, 2, at + 1}
    assert tokenizer.decode(ids) == "a<sep>b"
    assert at + 2 not in tokenizer.encode("never")


def test_pieces_that_cannot_be_made_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    pieces = [*trained_pieces(), ("жщ", -5000.0, NORMAL)]
    backend_from_model(parse_model(model_bytes(pieces)))
    assert caplog.messages == [
        f"1 of {len(pieces)} SentencePiece pieces are made of characters that are no pieces, "
        "and will not be written"
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it has no pieces"),
        (b"\x00\x01\x02 not a model", "not a SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (model_bytes(list(trained_pieces()))[:-900], "not a SentencePiece model|one unknown piece"),
        (model_bytes(list(trained_pieces()))[:40], "not a SentencePiece model"),
        (model_bytes([("a", 0.0, NORMAL)]), "one unknown piece, this one has 0"),
        (model_bytes([*trained_pieces(), ("a", 0.0, NORMAL), ("a", 0.0, NORMAL)]), "a piece twice"),
        (model_bytes([("<unk>", 0.0, 9)]), "not a SentencePiece model"),
        (b"\x0a\x0b\x10" + b"\xff" * 9 + b"\x7f", "a number of more than 64 bits"),
        (model_bytes(list(trained_pieces()), kind=3), "type word is not supported"),
        (model_bytes(list(trained_pieces()), suffix=True), "white space as a suffix"),
        (model_bytes([("<unk>", 0.0, 2), ("a", -1.0, 1)]), "lacks byte pieces"),
        (model_bytes([*trained_pieces(), ("▁qq▁", 0.0, USER)]), "holds a space"),
    ],
)
def test_unusable_models_are_one_line(data: bytes, said: str, tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "tokenizer.model").write_bytes(data)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match=said) as caught:
        Tokenizer.from_file(folder)
    assert "\n" not in str(caught.value)


def charsmap(units: dict[int, int], words: bytes = b"", *, size: int = 512) -> bytes:
    """A compiled character map: a double array with these units, and the replacements."""
    table = [
        units.get(n, n & 0xFF) for n in range(size)
    ]  # units that are not in use, as darts-clone leaves them
    return struct.pack(f"<I{size}I", 4 * size, *table) + words


# "q" -> what stands at the offset: the root's state is 256, that of "q" 256 ^ 0x71, and its value is where that leads.
def one_letter(offset: int, words: bytes, *, leap: int = 1) -> bytes:
    at = 256 ^ ord("q")
    return charsmap({0: 256 << 10, at: leap << 10 | 0x100 | ord("q"), at ^ leap: 1 << 31 | offset}, words)


def with_map(data: bytes) -> bytes:
    return model_bytes(list(trained_pieces())) + spm_models.message([(3, spm_models.message([(2, data)]))])


def test_a_character_map_is_followed() -> None:
    # What follows in the file adds to what was said before it, so white space is collapsed and "_" put in front.
    backend = backend_from_model(parse_model(with_map(one_letter(3, "xy\0ab\0é\0".encode()))))
    assert backend.normalizer is not None
    assert backend.normalizer.normalize_str("a q") == "▁a▁ab"


@pytest.mark.parametrize(
    "data",
    [
        bytes.fromhex("040000000000000061626300"),  # one unit: nothing can follow
        b"\0",
        bytes(4),
        charsmap({}, size=512)[:-1],
        charsmap({}, size=300),  # a block that is cut
        charsmap({0: 512 << 10}),  # the root leads outside
        charsmap({0: 256 << 10, 256 ^ ord("q"): 1 << 20 | ord("q")}),  # a letter does
        one_letter(9, b"ab\0"),  # the replacement lies outside
        one_letter(1, "é\0".encode()),  # within a character
    ],
)
def test_a_damaged_character_map_is_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(with_map(data))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(CheckpointError, match="character map is damaged: download it again"):
        Tokenizer.from_file(tmp_path)


@given(st.data())
def test_any_character_map_is_refused_or_never_fails(data: st.DataObject) -> None:
    """One unit of a good map is replaced, and the replacements are cut."""
    good = bytearray(one_letter(0, "é\0".encode()))
    at = data.draw(st.sampled_from([0, 256 ^ ord("q"), 256 ^ ord("q") ^ 1]))
    letter = data.draw(st.sampled_from([0, ord("q"), 0x100 | ord("q")]))
    unit = data.draw(st.integers(0, 1 << 22)) << 10 & 0x7FFF_FC00 | letter
    struct.pack_into("<I", good, 4 + 4 * at, unit)
    try:
        backend = backend_from_model(
            parse_model(with_map(bytes(good[: len(good) - data.draw(st.integers(0, 3))])))
        )
    except CheckpointError:
        return
    for byte in range(256):
        backend.encode(f"q{chr(byte)}")


def test_a_panic_of_the_library_is_one_line(tmp_path: Path) -> None:
    """A tokenizer.json, whose character map nobody has looked at."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Precompiled(bytes.fromhex("040000000000000061626300"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"damaged.* \(index out of bounds.*\): download") as caught:
        tokenizer.encode("abc")
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_model_or_a_foreseen_failure(data: bytes) -> None:
    with contextlib.suppress(CheckpointError):
        parse_model(data)


def test_a_missing_model_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        read_model(tmp_path / "none.model")
