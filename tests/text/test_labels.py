"""Label masks against the rule read literally: whole string, character offsets, one answer after the other."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chiasm.text.labels import IGNORE, encode_pieces, official_labels, shift
from chiasm.text.templates import TEMPLATES, Piece, get_template, join
from tiny_tokenizers import byte_fallback, byte_level

TOKENIZERS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "prepend": lambda: byte_fallback(prepend=True),
    "greedy": lambda: byte_fallback(prepend=True, greedy=True),
}
# What stands around a turn, spelled once more; (system, user, assistant header, end tag, after it).
SPELLED = {
    "internvl2_5": (
        "<|im_start|>system\n",
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "\n",
    ),
    "internlm2-chat": (
        "<|im_start|>system\n",
        "<|im_start|>user\n",
        "<|im_start|>assistant\n",
        "<|im_end|>",
        "",
    ),
    "Hermes-2": ("<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", ""),
    "phi3-chat": ("<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>", ""),
}
FITTING = [
    ("internvl2_5", "byte_level"),
    ("internvl2_5", "byte_fallback"),
    ("internvl2_5", "prepend"),
    ("Hermes-2", "byte_level"),
    ("internlm2-chat", "byte_fallback"),
    ("phi3-chat", "greedy"),
]

words = st.text(alphabet=st.sampled_from("ab \n\t.é你😀'1<|>"), max_size=12)
turns = st.lists(st.tuples(words, words), min_size=1, max_size=4)
systems = st.one_of(st.none(), st.text(alphabet="ab\n 你", min_size=1, max_size=6))


def by_offsets(name, tokenizer, system, exchanges, *, bos):
    """Ids and labels of the sheet's sentence: loss on the answer and its end tag, wherever they are in the string."""
    template = TEMPLATES[name]
    head, user, header, end, after = SPELLED[name]
    text = head + (template.system if system is None else system) + end + after
    spans = []
    for question, answer in exchanges:
        if name == "internlm2-chat":
            question, answer = question.strip(), answer.strip()
        text += user + question + end + after + header
        spans.append((len(text), len(text) + len(answer + end)))
        text += answer + end + after
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    learned = [any(a <= start and stop <= b for a, b in spans) for start, stop in encoding.offsets]
    labels = [i if keep else IGNORE for i, keep in zip(encoding.ids, learned, strict=True)]
    return ([tokenizer.bos_id, *encoding.ids], [IGNORE, *labels]) if bos else (encoding.ids, labels)


@pytest.mark.parametrize(("name", "kind"), FITTING)
@given(exchanges=turns, system=systems)
@settings(max_examples=60)
def test_same_ids_and_labels_as_the_rule_over_offsets(name, kind, exchanges, system):
    tokenizer = TOKENIZERS[kind]()
    said = [
        (role, text) for pair in exchanges for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if system is not None and len(exchanges) % 2:  # the override comes as a turn or as an argument
        pieces = get_template(name).render([("system", system), *said], train=True)
    else:
        pieces = get_template(name).render(said, system=system, train=True)
    bos = tokenizer.bos_id if kind != "byte_level" else None
    ids, learned = encode_pieces(pieces, tokenizer.encode, bos=bos)
    expected = by_offsets(
        name,
        tokenizer,
        system.strip() if system and name == "internlm2-chat" and len(exchanges) % 2 else system,
        exchanges,
        bos=bos is not None,
    )
    assert (ids, official_labels(ids, learned)) == expected


def test_a_conversation_by_hand():
    tokenizer = byte_level()
    pieces = get_template("internvl2_5").render([("user", "What is it?"), ("assistant", "A cat.")], system="")
    ids, learned = encode_pieces(pieces, tokenizer.encode)
    kept = [i for i, keep in zip(ids, learned, strict=True) if keep]
    assert tokenizer.decode(kept, skip_special_tokens=False) == "A cat.<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == join(pieces)
    assert learned[-1] is False  # the newline after the end tag
    assert learned[-2] is True


def test_newlines_that_merge_with_the_header_are_not_learned():
    """Official: three header tokens are ignored, even when the third one already holds newlines of the answer."""
    tokenizer = byte_level()
    header = tokenizer.encode("<|im_start|>assistant\n")
    turn = tokenizer.encode("<|im_start|>assistant\n\n\nyes<|im_end|>\n")
    assert turn[: len(header)] != header  # the premise: the newlines merged
    ids, learned = encode_pieces(
        get_template("internvl2_5").render([("assistant", "\n\nyes")], system=""), tokenizer.encode
    )
    assert ids == turn
    assert learned == [n >= len(header) and n < len(turn) - 1 for n in range(len(turn))]


def test_generation_header_and_questions_are_never_learned():
    pieces = get_template("internvl2_5").render(
        [("user", "a"), ("assistant", "b"), ("user", "c")], generate=True
    )
    _, learned = encode_pieces(pieces, byte_level().encode)
    assert not any(learned[-8:])
    assert any(learned)


def test_the_oldest_template_learns_the_space_that_the_model_writes():
    tokenizer = byte_level()
    tokenizer_ids, learned = encode_pieces(
        get_template("internvl_zh").render(
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
        ),
        tokenizer.encode,
    )
    kept = [i for i, keep in zip(tokenizer_ids, learned, strict=True) if keep]
    assert tokenizer.decode(kept) == " b</s> d</s>"


def test_shift():
    assert shift([IGNORE, 7, 8, IGNORE]) == [7, 8, IGNORE, IGNORE]
    assert shift([]) == []


def test_an_answer_without_text_still_learns_to_stop():
    ids, learned = encode_pieces([Piece("a", False, 0), Piece("<|im_end|>", True, 0)], byte_level().encode)
    assert learned == [False, True]
    assert official_labels(ids, learned) == [IGNORE, byte_level().token_to_id("<|im_end|>")]
