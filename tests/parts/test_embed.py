"""The feature cache: whose weights it belongs to, and several threads; items that no span stands for."""

import copy
import threading
from dataclasses import replace

import torch
from tests.tiny_chat import ask, picture, tiny_chat
from torch import nn

from chiasm.data.sequence import MediaBatch, Sequence, Span
from chiasm.parts.embed import FeatureCache, encode_spans, overwrite_rows, weights_version


def test_several_threads_leave_it_whole() -> None:
    cache, failed = FeatureCache(max_bytes=400), []

    def work(seed: int) -> None:
        try:
            for n in range(3000):
                cache.put(f"{seed}-{n % 7}", torch.zeros(10 + n % 5))
                cache.get(f"{(seed + 1) % 4}-{n % 7}")
        except KeyError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert cache.bytes == sum(x.nbytes for x in cache._store.values()) <= 400


def test_a_copy_is_empty() -> None:
    cache = FeatureCache(1000)
    cache.put("a", torch.ones(1))
    other = copy.deepcopy(cache)
    assert (other.max_bytes, other.bytes, other.get("a")) == (1000, 0, None)
    assert cache.get("a") is not None


def test_other_weights_are_noticed() -> None:
    cache, encoder = FeatureCache(), nn.Linear(2, 2)
    cache.bind(encoder)
    cache.put("a", torch.ones(1))
    cache.bind(encoder)
    assert cache.get("a") is not None
    before = weights_version(encoder)
    with torch.no_grad():
        encoder.weight.add_(1)
    assert weights_version(encoder) != before
    cache.bind(encoder)
    assert cache.get("a") is None


def test_an_encoder_that_changed_is_asked_again() -> None:
    chat = tiny_chat()
    inputs = chat.inputs(ask("What is it?", picture()))
    first = chat.logits(inputs)
    with torch.no_grad():
        chat.model.embedder.vision.layers[0].attn.proj.weight.mul_(-1)
    second = chat.logits(inputs)
    assert not torch.allclose(first, second)
    chat.features.clear()
    torch.testing.assert_close(chat.logits(inputs), second)


def test_items_that_stand_nowhere_are_encoded_and_reach_no_row() -> None:
    def encode(items: torch.Tensor) -> torch.Tensor:
        calls.append(len(items))
        return items.double().view(len(items), 1, 1) * scale

    calls: list[int] = []
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    media = {
        "image": MediaBatch(torch.tensor([1, 2, 0], dtype=torch.uint8)),
        "video": MediaBatch(torch.tensor([3, 0], dtype=torch.uint8)),
    }
    text = Sequence.of_text([1, 2, 3, 4])
    spans = (
        Span(media="image", start=0, length=1, first=1, items=1),
        Span(media="video", start=2, length=1, first=0, items=1),
    )
    seen = encode_spans(replace(text, media=media, spans=spans), ("image", "video"), encode, max_items=4)
    assert calls == [4, 1]
    assert [(span.media, float(rows.detach().sum())) for span, rows in seen] == [
        ("image", 2.0),
        ("video", 3.0),
    ]
    rows = overwrite_rows(torch.zeros(4, 1, dtype=torch.float64), seen)
    assert rows.detach().flatten().tolist() == [2, 0, 3, 0]
    (gradient,) = torch.autograd.grad(rows.sum(), scale)
    assert gradient == 5
    # Nothing is shown: nothing is written, and the encoder is in the graph all the same.
    calls.clear()
    nothing = overwrite_rows(
        torch.zeros(4, 1, dtype=torch.float64),
        encode_spans(replace(text, media=media), ("image", "video"), encode),
    )
    assert calls == [5]
    assert not nothing.any()
    (gradient,) = torch.autograd.grad(nothing.sum(), scale)
    assert gradient == 0
    # With a cache only what is shown is encoded.
    calls.clear()
    encode_spans(replace(text, media=media, spans=spans), ("image", "video"), encode, FeatureCache())
    assert calls == [1, 1]
