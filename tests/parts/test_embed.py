"""The feature cache: whose weights it belongs to, and several threads."""

import copy
import threading

import torch
from tests.tiny_chat import ask, picture, tiny_chat
from torch import nn

from chiasm.parts.embed import FeatureCache, weights_version


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
