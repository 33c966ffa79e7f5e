"""Tokenizer, streaming decoder, and the vocabulary of a GGUF file against transformers and a slow twin."""

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

import smollm2_strings
from chiasm.checkpoint.gguf import GGUFFile
from chiasm.checkpoint.wheel import find_wheel_gguf
from chiasm.errors import CheckpointError, ConfigError, DataError
from chiasm.text.gguf_vocab import backend_from_gguf, tokenizer_from_gguf
from chiasm.text.tokenizer import StreamDecoder, Tokenizer, byte_alphabet
from gguf_writer import tiny_vocabulary

needs_wheel = pytest.mark.usefixtures("smollm2_wheel")


def tiny_metadata(**changes):
    tokens, types, merges = tiny_vocabulary()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
        "llama.context_length": 128,
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def byte_level():
    """262 entries: every byte, a few merges, two control tokens; plus added ones of both kinds."""
    tokenizer = tokenizer_from_gguf(tiny_metadata())
    tokenizer.add_special_tokens(["<img>", "<图>"])
    tokenizer.backend.add_tokens([AddedToken("图片", normalized=False, special=False)])
    return tokenizer


def ambiguous():
    """An added token whose characters all spell bytes: the library decodes it as those bytes, so must the stream."""
    tokenizer = byte_level()
    tokenizer.backend.add_tokens(["éé"])
    return tokenizer


def sentencepiece_like():
    """Spaces as U+2581, bytes as <0xNN>, a prefix space: how Llama 2, Phi-3 and InternLM2 spell their text."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    pieces += ["\u2581", "\u2581a", "a", "b", "\u2581\u2581", "中", "é", ".", "\u2581中"]
    backend = Backend(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[("\u2581", "a"), ("\u2581", "\u2581"), ("\u2581", "中")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None})


BYTES, PIECES, AMBIGUOUS = byte_level(), sentencepiece_like(), ambiguous()

# --- ids and text ------------------------------------------------------------------------------------------------


def test_byte_alphabet_is_the_librarys():
    assert set(byte_alphabet().values()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet()) == list(range(256))
    assert byte_alphabet()[ord("A")] == "A"
    assert byte_alphabet()[0x20] == "Ġ"
    assert byte_alphabet()[0x0A] == "Ċ"


def test_special_tokens_inside_text_are_single_ids():
    ids = BYTES.encode("hello<|im_end|><img>")
    assert ids == [BYTES.token_to_id("hello"), 1, BYTES.token_to_id("<img>")]
    assert BYTES.decode(ids) == "hello"
    assert BYTES.decode(ids, skip_special_tokens=False) == "hello<|im_end|><img>"


def test_lookups():
    assert BYTES.vocab_size == 262 + 3
    assert BYTES.token_to_id("nothing like it") is None
    assert BYTES.id_to_token(1) == "<|im_end|>"
    assert BYTES.id_to_token(10**6) is None
    assert BYTES.id_to_token(-1) is None
    assert (BYTES.bos_id, BYTES.eos_id, BYTES.pad_id) == (0, 1, 1)
    assert BYTES.special_ids == {0, 1, 262, 263}
    assert (PIECES.bos_id, PIECES.eos_id, PIECES.pad_id) == (1, 2, None)
    assert BYTES.chat_template == "{{ messages }}"
    assert PIECES.chat_template is None


@given(st.text())
def test_byte_level_round_trip(text):
    assert BYTES.decode(BYTES.encode(text), skip_special_tokens=False) == text


def test_begin_token_comes_only_when_asked_for():
    assert PIECES.encode("a") == [PIECES.token_to_id("\u2581a")]
    assert PIECES.encode("a", add_special_tokens=True) == [1, PIECES.token_to_id("\u2581a")]
    both = Tokenizer(PIECES.backend, PIECES.config | {"add_bos_token": False, "add_eos_token": True})
    assert both.encode("a", add_special_tokens=True) == [PIECES.token_to_id("\u2581a"), 2]
    assert BYTES.encode("a", add_special_tokens=True) == BYTES.encode("a")
    begun = Tokenizer(BYTES.backend, BYTES.config | {"add_bos_token": True})
    assert begun.encode("a", add_special_tokens=True) == [0, *BYTES.encode("a")]


def test_added_special_tokens_follow_in_order_and_only_once():
    tokenizer = tokenizer_from_gguf(tiny_metadata())
    nine = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
    before = tokenizer.vocab_size
    assert tokenizer.add_special_tokens(nine) == 9
    assert [tokenizer.token_to_id(t) for t in nine] == list(range(before, before + 9))
    assert tokenizer.add_special_tokens(nine) == 0
    assert tokenizer.add_special_tokens([*nine, "<new>"]) == 1
    assert tokenizer.token_to_id("<new>") == before + 9
    assert tokenizer.add_special_tokens(["hello"]) == 0  # an ordinary entry keeps its id and becomes special
    assert tokenizer.token_to_id("hello") in tokenizer.special_ids
    assert tokenizer.encode("<img><IMG_CONTEXT></img>") == [before, before + 2, before + 1]
    with pytest.raises(ConfigError, match="empty string"):
        tokenizer.add_special_tokens(["<x>", ""])


def test_lone_surrogate_is_one_line():
    broken = b"caf\xe9".decode("utf-8", "surrogateescape")  # what Python makes of such a command line
    with pytest.raises(DataError, match=r"U\+DCE9 at character 3: pass UTF-8 text") as caught:
        BYTES.encode(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [[-1], [3, -100], ["a"], [1.5]])
def test_impossible_ids_are_one_line(ids):
    with pytest.raises(DataError, match="cannot decode"):
        BYTES.decode(ids)


# --- files -------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    BYTES.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", tmp_path / "new" / "folder" / "tokenizer.json"):
        again = Tokenizer.from_file(path)
        assert again.config == BYTES.config
        assert again.vocab_size == BYTES.vocab_size
        assert again.special_ids == BYTES.special_ids
        text = "hello <img>图片<|im_end|> é 12"
        assert again.encode(text) == BYTES.encode(text)
    assert sorted(p.name for p in path.parent.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_template_file_of_newer_releases_is_read(tmp_path):
    BYTES.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ newer }}", encoding="utf-8")
    assert Tokenizer.from_file(tmp_path).chat_template == "{{ newer }}"


def test_saved_truncation_and_padding_are_not_applied(tmp_path):
    backend = backend_from_gguf(tiny_metadata())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a long sentence")) == "a long sentence"
    assert tokenizer.bos_id is None


def test_transformers_reads_the_saved_folder(tmp_path):
    import transformers

    BYTES.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello <img>图片<|im_end|>", " \n\n1  2\t3", "é中👍 it's"):
        assert theirs(text, add_special_tokens=False).input_ids == BYTES.encode(text)
        assert theirs(text).input_ids == BYTES.encode(text, add_special_tokens=True)
    assert theirs.eos_token_id == BYTES.eos_id
    assert theirs.chat_template == BYTES.chat_template


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "no such file"),
        ({"vocab.json": "{}"}, "names no tokenizer class, known for these files are Qwen2Tokenizer"),
        ({"tokenizer.model": "x"}, "names no tokenizer class, known for these files are LlamaTokenizer"),
        ({"tokenizer.json": ""}, "not a tokenizer"),
        ({"tokenizer.json": "{"}, "not a tokenizer"),
        ({"tokenizer.json": "[1]"}, "not a tokenizer"),
        ({"tokenizer.json": '{"version": "1.0", "model": {"type": "Other"}}'}, "not a tokenizer"),
        ({"tokenizer.json": "good", "tokenizer_config.json": "{"}, "not readable as JSON"),
        ({"tokenizer.json": "good", "tokenizer_config.json": "[]"}, "JSON object was expected"),
        (
            {"tokenizer.json": "good", "tokenizer_config.json": '{"eos_token": "<none>"}'},
            "not in the vocabulary",
        ),
    ],
)
def test_missing_or_malformed_files_are_one_line(files, part, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(BYTES.backend.to_str() if text == "good" else text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=part) as caught:
        Tokenizer.from_file(tmp_path)
    assert "\n" not in str(caught.value)


# --- streaming ---------------------------------------------------------------------------------------------------


def streamed(tokenizer, ids, **kwargs):
    decoder = StreamDecoder(tokenizer, **kwargs)
    pieces = [decoder.push(i) for i in ids]
    return [*pieces, decoder.flush()]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ["bytes", "pieces", "ambiguous"])
@given(data=st.data())
def test_stream_of_any_ids_equals_decode(name, skip, data):
    tokenizer = {"bytes": BYTES, "pieces": PIECES, "ambiguous": AMBIGUOUS}[name]
    few = [0, 1, 2, *range(tokenizer.vocab_size - 12, tokenizer.vocab_size)]
    index = st.one_of(st.sampled_from(few), st.integers(0, tokenizer.vocab_size + 3))
    ids = data.draw(st.lists(index, max_size=24))
    joined = "".join(streamed(tokenizer, ids, skip_special_tokens=skip))
    assert joined == tokenizer.decode(ids, skip_special_tokens=skip)


@given(st.text())
@example("né 中文 👩‍👩‍👧 \ufffd x")
def test_stream_of_text_has_no_half_characters(text):
    for tokenizer in (BYTES, PIECES):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in tokenizer.decode(ids):
            assert not any("\ufffd" in piece for piece in pieces)


@given(
    st.lists(
        st.sampled_from([0x41, 0xC3, 0xA9, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0x80, 0xFF, 0xED, 0xA0]), max_size=12
    )
)
def test_stream_of_broken_utf8_equals_decode(raw):
    ids = [BYTES.token_to_id(byte_alphabet()[byte]) for byte in raw]
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids) == bytes(raw).decode("utf-8", "replace")


def test_character_appears_with_its_last_byte():
    ids = BYTES.encode("中!")
    assert streamed(BYTES, ids) == ["", "", "中", "!", ""]
    assert streamed(BYTES, ids[:2]) == ["", "", "\ufffd"]
    first = BYTES.stream()
    assert first.push(ids[0]) + first.flush() == "\ufffd"
    assert [first.push(i) for i in ids] == ["", "", "中", "!"]  # flush starts afresh


def test_special_tokens_do_not_interrupt_a_character():
    ids = BYTES.encode("中")
    assert "".join(streamed(BYTES, [ids[0], 1, *ids[1:]])) == "中"


# --- the GGUF vocabulary -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model": "llama"}, "tokenizer 'llama'"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"pre": None}, "not supported"),
        ({"tokens": []}, "not a list of strings"),
        ({"tokens": [1, 2]}, "not a list of strings"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"merges": ["x y z w"]}, "joins what is not"),
        ({"merges": ["hello"]}, "joins what is not"),
        ({"token_type": [1]}, "one entry a token"),
        ({"token_type": None}, "one entry a token"),
        ({"eos_token_id": 4000}, "outside the vocabulary"),
        ({"bos_token_id": "x"}, "outside the vocabulary"),
    ],
)
def test_unusable_metadata_is_one_line(changes, part):
    with pytest.raises(CheckpointError, match=part) as caught:
        tokenizer_from_gguf(tiny_metadata(**changes))
    assert "\n" not in str(caught.value)


def test_user_defined_tokens_are_added_but_not_special():
    tokens, types, _ = tiny_vocabulary()
    metadata = tiny_metadata(tokens=[*tokens, "<think>"], token_type=[*types, 4])
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("<think>") == [len(tokens)]
    assert tokenizer.decode([len(tokens)]) == "<think>"


@pytest.fixture(scope="module")
def metadata():
    with GGUFFile(find_wheel_gguf()) as file:
        return file.metadata


@pytest.fixture(scope="module")
def smollm2(metadata):
    return tokenizer_from_gguf(metadata)


@pytest.fixture(scope="module")
def texts():
    return smollm2_strings.strings()


def test_golden_file_belongs_to_the_strings(texts):
    digest, ids = smollm2_strings.read_golden()
    assert digest == smollm2_strings.digest(texts)
    assert len(ids) == len(texts) == smollm2_strings.COUNT == 2000


@needs_wheel
def test_ids_equal_the_golden_ones_of_transformers(smollm2, texts):
    _, golden = smollm2_strings.read_golden()
    assert [smollm2.encode(text) for text in texts] == golden


@needs_wheel
def test_roles_and_template(smollm2, metadata):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.vocab_size) == (1, 2, 2, 49152)
    assert [smollm2.id_to_token(i) for i in range(17)] == smollm2_strings.SPECIAL
    assert smollm2.special_ids == set(range(17))
    assert smollm2.chat_template == metadata["tokenizer.chat_template"]
    assert "named SmolLM" in smollm2.chat_template


@needs_wheel
def test_saved_copy_gives_the_same_ids_and_streams(smollm2, texts, tmp_path):
    smollm2.save(tmp_path)
    again = Tokenizer.from_file(tmp_path)
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == smollm2.chat_template
    )
    for text in texts[::10]:
        ids = again.encode(text)
        assert ids == smollm2.encode(text)
        for skip in (True, False):
            assert "".join(streamed(again, ids, skip_special_tokens=skip)) == again.decode(
                ids, skip_special_tokens=skip
            )


def slow_words(text, digits):
    """GPT-2's word pattern as a plain loop, after cutting at digits when ``digits`` is "single"."""
    if digits == "single":
        out, start = [], 0
        for i, c in enumerate(text):
            if unicodedata.category(c).startswith("N"):
                out += [*slow_words(text[start:i], "joined"), c]
                start = i + 1
        return out + slow_words(text[start:], "joined")

    def kind(c):
        if c.isspace() and c not in "\x1c\x1d\x1e\x1f":  # Python's idea of space is wider than Unicode's
            return "space"
        return unicodedata.category(c)[0] if unicodedata.category(c)[0] in "LN" else "other"

    words, i = [], 0
    while i < len(text):
        short = next(
            (e for e in ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d") if text.startswith(e, i)), None
        )
        if short:
            words.append(short)
            i += len(short)
            continue
        start = i
        first = i + 1 if text[i] == " " and i + 1 < len(text) and kind(text[i + 1]) != "space" else i
        if kind(text[first]) != "space":
            what, i = kind(text[first]), first
            while i < len(text) and kind(text[i]) == what:
                i += 1
        else:
            while i < len(text) and kind(text[i]) == "space":
                i += 1
            if i < len(text) and i - start > 1:  # the last space goes to the next word
                i -= 1
        words.append(text[start:i])
    return words


def slow_encode(text, metadata, digits, tables={}):  # noqa: B006 - memo of the two lookup tables
    """Byte-level BPE as a textbook has it: cut out special tokens, cut into words, merge the best pair, repeat."""
    if not tables:
        tables["id"] = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
        tables["rank"] = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
    ids, rank = tables["id"], tables["rank"]
    spell = byte_alphabet()
    for special in smollm2_strings.SPECIAL:
        if special in text:
            left, _, right = text.partition(special)
            return [*slow_encode(left, metadata, digits), ids[special], *slow_encode(right, metadata, digits)]
    out = []
    for word in slow_words(text, digits):
        # A byte without an entry is dropped before merging.
        parts = [spell[b] for b in word.encode("utf-8") if spell[b] in ids]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: rank.get((parts[i], parts[i + 1]), 10**9))
            if (parts[best], parts[best + 1]) not in rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        out += [ids[part] for part in parts]
    return out


@needs_wheel
@pytest.mark.parametrize("digits", ["joined", "single"])
def test_both_digit_rules_equal_the_slow_twin(digits, metadata, texts):
    """Every sixteenth string; unassigned code points are left out, where Unicode versions may disagree."""
    tokenizer = tokenizer_from_gguf(metadata, digits=digits)
    for text in texts[: len(smollm2_strings.FIXED)] + texts[::16]:
        text = "".join(c for c in text if unicodedata.category(c) != "Cn")
        assert tokenizer.encode(text) == slow_encode(text, metadata, digits), repr(text)


@needs_wheel
def test_digit_rules_differ_only_by_white_space_before_digits(metadata, smollm2):
    single = tokenizer_from_gguf(metadata, digits="single")
    for text in ("1984", "x 12 y", "a1b22", "v2.0 (2024)", "3 4 5", "1'st", "½²٣"):
        assert single.encode(text) == smollm2.encode(text)
    spelled = [[t.id_to_token(i) for i in t.encode("\n\n12")] for t in (smollm2, single)]
    assert spelled == [["Ċ", "Ċ", "1", "2"], ["ĊĊ", "1", "2"]]


@needs_wheel
@pytest.mark.slow
def test_ids_equal_transformers_own_conversion(smollm2, texts):
    """The golden file itself, made again: 2,000 strings, transformers' GGUF tokenizer."""
    theirs = smollm2_strings.reference()
    ids = [theirs(text, add_special_tokens=False).input_ids for text in texts]
    assert ids == smollm2_strings.read_golden()[1]
    assert ids == [smollm2.encode(text) for text in texts]
    assert theirs("a 1", add_special_tokens=True).input_ids == smollm2.encode("a 1", add_special_tokens=True)
    assert theirs.chat_template == smollm2.chat_template
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
    assert len(theirs) == smollm2.vocab_size
