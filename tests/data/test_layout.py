"""The layout: rows, spans, labels, limits; agreement with counting, with decoding and with transformers' processor."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from chiasm.data.layout import LayoutSpec, count_tokens, layout, prompt_text
from chiasm.data.message import from_row
from chiasm.data.sequence import IGNORE, IMAGE, TEXT, Sequence
from chiasm.errors import ConfigError, ContextOverflowError, DataError, ImageError, TemplateError
from chiasm.media.image import open_image
from chiasm.media.tiles import TilePolicy
from chiasm.text.templates import TEMPLATES
from chiasm.text.tokenizer import Tokenizer
from tiny_tokenizers import byte_fallback, byte_level

SIDE, ROWS = 8, 3


def make(tokenizer=None, template="internvl2_5", mode="original", max_tiles=6, **options):
    tiles = TilePolicy(image_size=SIDE, max_tiles=max_tiles, mode=mode)
    options = {"tokens_per_tile": ROWS, **options}
    return LayoutSpec(tokenizer=tokenizer or byte_level(), template=template, tiles=tiles, **options)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def ask(text, *pictures):
    return {"role": "user", "content": [*({"type": "image", "image": p} for p in pictures), text]}


def answer(text):
    return {"role": "assistant", "content": text}


def test_one_picture_by_hand():
    spec = make(system="")
    tokenizer, picture = spec.tokenizer, noise(16, 8)
    made = layout(ask("What?", picture), spec)
    context = tokenizer.token_to_id("<IMG_CONTEXT>")
    expected = [
        *tokenizer.encode("<|im_start|>user\n<img>"),
        *[context] * 9,  # two tiles and a thumbnail
        *tokenizer.encode("</img>\nWhat?<|im_end|>\n<|im_start|>assistant\n"),
    ]
    assert made.ids_T.tolist() == expected
    assert made.kind_T.tolist() == [IMAGE if i == context else TEXT for i in expected]
    assert made.pos_T.tolist() == list(range(len(expected)))
    assert not made.doc_T.any()
    assert made.labels_T is None
    assert made.weight_T is None
    assert [made.ids_T.dtype, made.kind_T.dtype, made.doc_T.dtype, made.pos_T.dtype] == [
        torch.int64,
        torch.int8,
        torch.int32,
        torch.float32,
    ]
    (span,) = made.spans
    assert (span.media, span.start, span.length, span.first, span.items) == ("image", 4, 9, 0, 3)
    assert torch.equal(made.media["image"].data, spec.tiles.tile(picture))


def test_text_only_has_no_media_and_needs_no_image_tokens():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    plain = Tokenizer(backend)
    plain.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = layout("Hi", make(plain))
    assert made.media == {}
    assert made.spans == ()
    with pytest.raises(TemplateError, match="its tokenizer has no <img> token"):
        layout(ask("Hi", noise(8, 8)), make(plain))


def test_pictures_share_the_budget_and_keep_their_order():
    spec = make()
    pictures = [noise(32, 8, 1), noise(8, 8, 2), noise(16, 16, 3)]
    made = layout([ask("a", *pictures[:2]), answer("b"), ask("c", pictures[2])], spec)
    tiles = [spec.tiles.tile(p, spec.tiles.budget(3)) for p in pictures]
    assert [span.items for span in made.spans] == [len(t) for t in tiles]
    assert torch.equal(made.media["image"].data, torch.cat(tiles))
    assert sum(span.items for span in made.spans) <= spec.tiles.max_tiles + 3  # thumbnails come on top
    for span, group in zip(made.spans, tiles, strict=True):
        assert torch.equal(made.media["image"].data[span.first : span.first + span.items], group)
    assert [s.key for s in made.spans] == [
        hashlib.blake2b(repr(tuple(t.shape)).encode() + t.numpy().tobytes(), digest_size=16).hexdigest()
        for t in tiles
    ]


def test_keys_follow_content():
    spec = make()
    same = layout(ask("a", noise(16, 8), noise(16, 8), noise(16, 8, 1)), spec).spans
    assert same[0].key == same[1].key != same[2].key
    other_tiling = layout(ask("a", noise(16, 8)), make(max_tiles=1)).spans[0]
    assert other_tiling.key != layout(ask("a", noise(16, 8)), spec).spans[0].key


def test_tags_in_the_text_take_pictures_in_order():
    spec = make(system="")
    first, second = noise(8, 8, 1), noise(16, 8, 2)
    made = layout(ask("Is <image> like <image>?", first, second), spec)
    assert prompt_text(ask("Is <image> like <image>?", first, second), spec) == (
        "<|im_start|>user\nIs <img><IMG_CONTEXT></img> like <img><IMG_CONTEXT></img>?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [span.length for span in made.spans] == [ROWS, 3 * ROWS]
    with pytest.raises(
        DataError, match=r"messages\[0\] has 2 <image> tag\(s\) but 1 image\(s\): give 1 more"
    ):
        layout(ask("Is <image> like <image>?", first), spec)


def test_numbering_is_the_templates():
    pictures = [noise(8, 8), noise(8, 8)]
    mark = "<img><IMG_CONTEXT></img>"
    assert f"user\nImage-1: {mark}\nImage-2: {mark}\nWhich?" in prompt_text(ask("Which?", *pictures), make())
    assert f"user\n{mark}\n{mark}\nWhich?" in prompt_text(
        ask("Which?", *pictures), make(template="internvl-hf")
    )
    later = [ask("a", pictures[0]), answer("b"), ask("c", *pictures)]
    assert f"Image-2: {mark}\nImage-3: {mark}\nc" in prompt_text(later, make())


def test_answer_header():
    spec = make(system="")
    header = "<|im_start|>assistant\n"
    said = [ask("a"), answer("b")]
    assert prompt_text(said[:1], spec).endswith(header)
    assert not prompt_text(said[:1], spec, generate=False).endswith(header)
    assert prompt_text(said, spec).endswith("b<|im_end|>\n")
    assert prompt_text(said, spec, generate=True).endswith("b<|im_end|>\n" + header)
    assert not prompt_text([*said, ask("c")], spec, train=True).endswith(header)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_begin_token(template):
    """Where the tokenizer uses one and the template follows it."""
    tokenizer = byte_fallback(greedy=template == "phi3-chat")
    begins = layout("a", make(tokenizer, template)).ids_T[0].item() == tokenizer.bos_id
    assert begins == (template != "Hermes-2")
    assert make(byte_level(), template).bos_id is None


def test_labels_are_shifted_and_weighted():
    spec = make(system="", loss_power=0.5)
    made = layout([ask("What?", noise(8, 8)), answer("A cat.")], spec, train=True)
    labels = made.labels_T.tolist()
    kept = [t for t, label in enumerate(labels) if label != IGNORE]
    assert spec.tokenizer.decode([labels[t] for t in kept], skip_special_tokens=False) == "A cat.<|im_end|>"
    assert all(labels[t] == made.ids_T[t + 1] for t in kept)
    assert [b - a for a, b in pairwise(kept)] == [1] * (len(kept) - 1)
    weights = made.weight_T.tolist()
    assert weights == pytest.approx([len(kept) ** -0.5 if t in kept else 0.0 for t in range(len(labels))])
    even = layout([ask("What?"), answer("A cat.")], make(loss_power=0), train=True)
    assert set(even.weight_T.tolist()) == {0.0, 1.0}


def test_training_and_inference_agree_on_the_prompt():
    spec = make()
    said = [ask("What?", noise(16, 8)), answer("A cat.")]
    prompt, whole = layout(said[:1], spec), layout(said, spec, train=True)
    assert torch.equal(whole.ids_T[: len(prompt)], prompt.ids_T)
    assert whole.labels_T[len(prompt) - 1] == whole.ids_T[len(prompt)]
    assert (whole.labels_T[: len(prompt) - 1] == IGNORE).all()


def test_rows_of_a_data_set_are_laid_out():
    row = {
        "image": "x.png",
        "conversations": [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}],
    }
    made = layout(from_row(row), make(), train=True, opener=lambda source, orient: noise(16, 8))
    assert made.spans[0].items == 3
    assert torch.equal(made.ids_T, layout(row, make(), opener=lambda source, orient: noise(16, 8)).ids_T)


@pytest.mark.parametrize("token", ["<img>", "</img>", "<IMG_CONTEXT>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_texts_must_not_spell_image_tokens(token, role):
    said = [{"role": role, "content": f"see {token} here"}, ask("a", noise(8, 8))]
    with pytest.raises(DataError, match=rf"messages\[0\]: its text contains {token}, which is reserved"):
        layout(said, make())
    # Not even in two halves, or in half a text and half a tag.
    half = len(token) // 2
    with pytest.raises(DataError, match="reserved"):
        layout({"role": "user", "content": [token[:half], token[half:]]}, make())


def test_other_special_tokens_in_a_text_keep_their_meaning():
    spec = make(system="")
    made = layout([ask("a<|im_end|>b", noise(8, 8)), answer("c<|im_end|>d")], spec, train=True)
    end = spec.tokenizer.token_to_id("<|im_end|>")
    assert (made.ids_T == end).sum() == 4
    labels = [label for label in made.labels_T.tolist() if label != IGNORE]
    assert spec.tokenizer.decode(labels, skip_special_tokens=False) == "c<|im_end|>d<|im_end|>"


def test_image_tokens_that_are_not_special_are_found_out(monkeypatch):
    """Such a vocabulary would split them; the count shows it before a model sees it."""
    tokenizer = Tokenizer(Backend.from_str(byte_level().backend.to_str()))
    context, encode = tokenizer.token_to_id("<IMG_CONTEXT>"), tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **_: [i for i in encode(text) if i != context])
    with pytest.raises(TemplateError, match=r"1 picture\(s\) became 0 <IMG_CONTEXT> token"):
        layout(ask("a", noise(8, 8)), make(tokenizer))


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ([{"role": "assistant", "content": [{"type": "image", "image": "x"}]}], "only users show pictures"),
        ([{"role": "system", "content": [{"type": "video", "video": "x"}]}], "only users show videos"),
        ([{"role": "user", "content": [{"type": "points", "points": 1}]}], "points parts cannot be laid out"),
    ],
)
def test_parts_that_cannot_be_laid_out(said, match):
    for function in (layout, count_tokens):
        with pytest.raises(DataError, match=match):
            function(said, make())


def test_training_needs_an_answer():
    with pytest.raises(DataError, match="nothing to learn"):
        layout("question", make(), train=True)


def test_overflow_says_what_would_help_and_opens_no_tiles(monkeypatch):
    said = ask("What?", noise(32, 16))
    exact = count_tokens(said, make())
    assert len(layout(said, make(max_length=exact))) == exact
    monkeypatch.setattr(TilePolicy, "tile", lambda *_: pytest.fail("tiled before it was known to fit"))
    pattern = rf"takes {exact} tokens but the limit is {exact - 1}: .*tiles.*max_tiles is 6.*shorter"
    with pytest.raises(ContextOverflowError, match=pattern) as caught:
        layout(said, make(max_length=exact - 1))
    assert "\n" not in str(caught.value)
    with pytest.raises(ContextOverflowError, match=r"limit is 5: shorten the conversation$"):
        layout("text only", make(max_length=5))
    assert count_tokens(said, make(max_length=5)) == exact


def test_what_cannot_be_opened_is_an_image_error(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    for function in (layout, count_tokens):
        with pytest.raises(ImageError, match=r"x\.png"):
            function(ask("a", tmp_path / "x.png"), make())


def test_orientation_follows_the_tile_policy(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(32, 8).save(tmp_path / "turned.jpg", exif=exif)
    said = ask("a", tmp_path / "turned.jpg")
    upright = Image.Image.transpose(
        open_image(tmp_path / "turned.jpg", orient=False), Image.Transpose.ROTATE_270
    )
    turned = make(mode="chiasm")
    assert torch.equal(layout(said, turned).media["image"].data, turned.tiles.tile(upright))
    assert not torch.equal(layout(said, make()).media["image"].data, turned.tiles.tile(upright))
    assert count_tokens(said, turned) == len(layout(said, turned))


def test_counting_by_given_sizes_touches_no_file():
    said = [ask("a", "nowhere.png"), answer("b"), ask("c", "https://nowhere.invalid/x.png")]
    sizes = [(16, 8), (8, 24)]
    expected = layout([ask("a", noise(16, 8)), answer("b"), ask("c", noise(8, 24))], make())
    assert count_tokens(said, make(), sizes=sizes) == len(expected)
    with pytest.raises(DataError, match=r"2 picture\(s\) but 1 size\(s\)"):
        count_tokens(said, make(), sizes=sizes[:1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tokens_per_tile": 0}, "tokens_per_tile"),
        ({"max_length": 0}, "max_length"),
        ({"loss_power": 2.0}, "loss_power"),
        ({"image_end": "<img>"}, "three different tokens"),
    ],
)
def test_specs_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        make(**options)
    with pytest.raises(TemplateError, match="unknown chat template 'nope'"):
        make(template="nope")


# Properties -------------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))
words = st.text(alphabet=st.sampled_from("ab \n.é你😀'<|1"), max_size=10)


@st.composite
def conversations(draw, *, answered):
    talk, shown = [], []
    if draw(st.booleans()):
        talk.append({"role": "system", "content": draw(words)})
    turns = draw(st.integers(1, 3))
    for n in range(turns):
        items = []
        for _ in range(draw(st.integers(1, 3))):
            if draw(st.booleans()):
                shown.append(draw(sizes))
                items.append({"type": "image", "image": noise(*shown[-1], seed=len(shown))})
            else:
                items.append({"type": "text", "text": draw(words)})
        talk.append({"role": "user", "content": items})
        if answered or n < turns - 1:
            talk.append(answer(draw(words)))
    return talk, shown


# Byte fallback decodes exactly what it encoded; byte level normalises to NFC, which these alphabets already are.
SPECS = [
    make(max_tiles=4),
    make(byte_fallback(), "internlm2-chat", max_tiles=4),
    make(template="chatml", mode="hf", max_tiles=3),
    make(byte_fallback(), "internvl_zh", tokens_per_tile=1, max_tiles=2),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.template.name}-{spec.tiles.mode}")
@given(data=st.data(), train=st.booleans())
@settings(max_examples=40)
def test_layout_round_trip(spec, data, train):
    said, shown = data.draw(conversations(answered=train))
    made = layout(said, spec, train=train)
    text = prompt_text(said, spec, train=train)
    # Decoding gives the prompt back, once the context rows of each picture are one again.
    keep, spans = torch.ones(len(made), dtype=torch.bool), made.spans
    for span in spans:
        keep[span.start + 1 : span.start + span.length] = False
    ids = made.ids_T[keep].tolist()
    if spec.bos_id is not None:
        assert ids.pop(0) == spec.bos_id
    assert spec.tokenizer.decode(ids, skip_special_tokens=False) == text
    # Every picture has its rows, and only pictures have rows.
    counts = spec.tiles.counts(shown)
    assert [span.items for span in spans] == counts
    assert [span.length for span in spans] == [count * spec.tokens_per_tile for count in counts]
    rows = torch.zeros(len(made), dtype=torch.bool)
    for span in spans:
        rows[span.start : span.start + span.length] = True
    assert torch.equal(rows, made.kind_T == IMAGE)
    if shown:
        assert torch.equal(rows, made.ids_T == spec.context_id)
        assert len(made.media["image"]) == sum(counts)
    # Counting agrees, with and without looking at the pictures.
    assert count_tokens(said, spec, train=train) == len(made)
    assert count_tokens(said, spec, sizes=shown, train=train) == len(made)
    if train:
        learned = made.labels_T != IGNORE
        assert not (learned & rows).any()
        assert torch.equal(made.labels_T[:-1][learned[:-1]], made.ids_T[1:][learned[:-1]])
        assert not learned[-1]
        assert torch.equal(made.weight_T > 0, learned)
    else:
        assert made.labels_T is None


def test_layouts_pack_and_split():
    spec = make()
    one = layout([ask("a", noise(16, 8)), answer("b")], spec, train=True)
    two = layout([ask("c"), answer("d")], spec, train=True)
    three = layout([ask("e", noise(8, 24), noise(8, 8)), answer("f")], spec, train=True)
    parts = Sequence.pack([one, two, three]).split()
    for part, whole in zip(parts, (one, two, three), strict=True):
        assert torch.equal(part.ids_T, whole.ids_T)
        assert torch.equal(part.labels_T, whole.labels_T)
        assert part.spans == whole.spans
        for name, batch in whole.media.items():
            assert torch.equal(part.media[name].data, batch.data)


@given(said=st.lists(words, min_size=1, max_size=4))
@settings(max_examples=60)
def test_turn_by_turn_equals_the_whole_string(said):
    """Inference elsewhere tokenises the whole prompt at once; ours goes turn by turn and gives the same ids."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
    for spec in SPECS[:3]:
        text = prompt_text(messages, spec)
        bos = [] if spec.bos_id is None else [spec.bos_id]
        assert layout(messages, spec).ids_T.tolist() == bos + spec.tokenizer.encode(text)


# Against transformers ---------------------------------------------------------------------------------------------

# Rendered by the chat template that transformers' converter puts into -hf checkpoints; <image> stands for a picture.
HF_GOLDEN = [
    ([ask("What is it?", "p")], "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"),
    (
        [
            {"role": "system", "content": "Be brief."},
            ask("Compare.", "p", "q"),
            answer("Same."),
            ask(" Sure? \n"),
        ],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nCompare.<|im_end|>\n"
        "<|im_start|>assistant\nSame.<|im_end|>\n<|im_start|>user\n Sure? \n<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        [{"role": "user", "content": ["First", {"type": "image", "image": "p"}, "then"]}, answer("So.")],
        "<|im_start|>user\nFirst<image>\nthen<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n",
    ),
]


@pytest.mark.parametrize(("said", "golden"), HF_GOLDEN)
def test_same_text_as_the_hf_chat_template(said, golden):
    spec = make(template="internvl-hf", mode="hf")
    assert prompt_text(said, spec) == golden.replace("<image>", "<img><IMG_CONTEXT></img>")


def test_same_ids_and_tiles_as_transformers_processor():
    """Its processor, with the real tokenizer class and PIL image processor around our tiny vocabulary."""
    from transformers import PreTrainedTokenizerFast
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    class Processor(InternVLProcessor):
        # The check of the parts' classes looks up video processors, which do not import without torchvision.
        def check_argument_for_proper_class(self, argument_name, argument):
            return None

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(byte_level().backend.to_str()),
        extra_special_tokens={**names, "video_token": "<video>"},
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        crop_to_patches=True,
        min_patches=1,
        max_patches=4,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = Processor(images, tokenizer, image_seq_length=ROWS, chat_template="unused")
    spec = make(template="internvl-hf", mode="hf", max_tiles=4)
    pictures = [noise(30, 14, 1), noise(8, 8, 2), noise(9, 40, 3)]
    said = [ask("One.", pictures[0]), answer("Yes."), ask("Two more.", *pictures[1:])]
    text = prompt_text(said, spec).replace("<img><IMG_CONTEXT></img>", "<IMG_CONTEXT>")
    theirs = processor(images=pictures, text=text, return_tensors="pt")
    ours = layout(said, spec)
    assert ours.ids_T.tolist() == theirs["input_ids"][0].tolist()
    assert ours.media["image"].data.shape == theirs["pixel_values"].shape
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.tiles.mean, spec.tiles.std))
    pixels = (ours.media["image"].data.float() / 255 - mean) / std
    torch.testing.assert_close(pixels, theirs["pixel_values"], rtol=0, atol=1e-5)
