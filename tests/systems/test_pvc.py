"""The PVC model: which pictures are encoded together, what is remembered, and what the rows of a sequence hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.contracts.pvc import CONFIG, documents, repeated
from tests.contracts.skeleton import document, initialise, noise
from torch import Tensor

from chiasm.data.sequence import IMAGE, VIDEO, MediaBatch, Sequence
from chiasm.errors import ConfigError, DataError
from chiasm.model.causal import CausalVLM
from chiasm.parts.embed import FeatureCache
from chiasm.parts.vision.progressive import Clips, TemporalConfig
from chiasm.systems.pvc.config import PVCConfig, downsample_for
from chiasm.systems.pvc.model import FRAMES_AT_ONCE, build_pvc, change, views_of
from chiasm.systems.pvc.plan import repeat_times, shots_of, video_times, with_repeats


def build(config: PVCConfig = CONFIG) -> CausalVLM:
    return initialise(build_pvc(config))


def close(got: Tensor, expected: Tensor, limit: float = 1e-10) -> None:
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) <= limit


def slow_rows(model: CausalVLM, sequence: Sequence, order: str = "tile") -> Tensor:
    """The embedder written out: every tile of a picture, every place of a video as a batch of its own."""
    e = model.embedder
    x = e.words(sequence.ids_T).clone()

    def encoded(tiles: Tensor, times: list[float]) -> Tensor:
        pixels = e._normal(tiles)
        clips = Clips((1,) * len(tiles), (len(tiles),), torch.tensor(times, dtype=torch.float64))
        features = e.vision.forward_reference(pixels, e.config.select_layer, clips=clips)
        return e.compressed(features, clips.times_F)

    for span in sequence.spans_of("image"):
        data = sequence.media["image"].data
        R = span.repeats
        times = list(repeat_times(R, e.config))
        parts = [
            encoded(data[n].expand(R, -1, -1, -1), times) for n in range(span.first, span.first + span.items)
        ]
        tokens = torch.stack(parts)  # (tiles, R, K, C)
        tokens = tokens if order == "tile" else tokens.transpose(0, 1)
        x[span.start : span.start + span.length] = tokens.flatten(0, 2)
    for group in sorted({s.group for s in sequence.spans_of("video")}):
        spans = [s for s in sequence.spans_of("video") if s.group == group]
        batch = sequence.media["video"]
        seconds = [float(batch.times_N[s.first]) for s in spans]  # type: ignore[index]
        times = list(video_times(seconds, e.config))
        for place in range(spans[0].items):
            tokens = encoded(batch.data[[s.first + place for s in spans]], times)
            K = tokens.shape[1]
            for s, rows in zip(spans, tokens, strict=True):
                x[s.start + place * K : s.start + (place + 1) * K] = rows
    return x


@pytest.mark.parametrize("time", ["relative", "seconds"])
@pytest.mark.parametrize("conditioning", ["light", "full"])
def test_rows_are_those_of_the_embedder_written_out(time, conditioning) -> None:
    config = replace(CONFIG, temporal=replace(CONFIG.temporal, time=time, conditioning=conditioning))
    model = build(config)
    packed = Sequence.pack(documents(False))
    expected = slow_rows(model, packed)
    close(model.embedder(packed).x_TC, expected)
    with torch.no_grad():
        close(model.embedder(packed).x_TC, expected)
        model.embedder.features = FeatureCache()  # type: ignore[assignment]
        close(model.embedder(packed).x_TC, expected)
        close(model.embedder(packed).x_TC, expected)
    assert model.embedder.features.hits == 4  # two pictures and two videos, remembered as a whole


def test_repeat_major_rows_hold_all_tiles_once_then_all_again() -> None:
    config = replace(CONFIG, repeat_order="repeat")
    packed = Sequence.pack(documents(False))
    model = build(config)
    close(model.embedder(packed).x_TC, slow_rows(model, packed, "repeat"))


def test_what_is_remembered_depends_on_repeats_and_on_times() -> None:
    model = build()
    store = model.embedder.features = FeatureCache()  # type: ignore[assignment]
    image, clip = documents(False)[:2]
    other = replace(
        clip, media={"video": MediaBatch(clip.media["video"].data, torch.tensor([0.0, 1.0, 2.0, 4.0]))}
    )
    fewer = with_repeats(image, dict.fromkeys(image.spans, 2), CONFIG)
    with torch.no_grad():
        for sequence in (image, clip, other, fewer):
            close(model.embedder(sequence).x_TC, slow_rows(model, sequence))
    assert store.hits == 0


def test_relative_and_absolute_times() -> None:
    seconds = replace(CONFIG, temporal=replace(CONFIG.temporal, time="seconds", repeat_seconds=0.5))
    assert repeat_times(3, CONFIG) == (0.0, 0.5, 1.0)
    assert repeat_times(2, CONFIG) == (0.0, 0.5)  # a beginning of three
    assert repeat_times(5, CONFIG) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert repeat_times(1, replace(CONFIG, repeats=1)) == (0.0,)
    assert repeat_times(3, seconds) == (0.0, 0.5, 1.0)
    assert video_times([2.0, 3.0, 6.0], CONFIG) == (0.0, 0.25, 1.0)
    assert video_times([2.0, 3.0, 6.0], CONFIG, horizon=8.0) == (0.0, 0.125, 0.5)
    assert video_times([2.0, 3.0, 6.0], seconds) == (0.0, 1.0, 4.0)
    assert video_times([2.0], CONFIG) == (0.0,)


def test_repeats_of_a_frame_share_its_time() -> None:
    clip = documents(False)[1]
    spans = tuple(replace(s, repeats=2, length=1) for s in clip.spans)
    with pytest.raises(DataError, match=r"1 tile\(s\) x 2 repeat\(s\) x 1 tokens are 2"):
        shots_of(replace(clip, spans=spans), CONFIG)
    data = {"video": MediaBatch(noise(2, 3, 16, 16, seed=2), torch.tensor([0.0, 4.0]))}
    two = document([4, ("video", VIDEO, 2, 1), 5, ("video", VIDEO, 2, 1), 6], data, train=False, group=0)
    two = replace(two, spans=tuple(replace(s, repeats=2) for s in two.spans))
    (shot,) = shots_of(two, CONFIG)
    assert (shot.frames, shot.times) == (4, (0.0, 0.0, 1.0, 1.0))
    model = build()
    twice = data["video"].data.repeat_interleave(2, dim=0)
    clips = Clips((1,) * 4, (4,), torch.tensor(shot.times, dtype=torch.float64))
    tokens = model.embedder.project(model.embedder._normal(twice), clips)
    rows = model.embedder(two).x_TC
    close(rows[[1, 2, 4, 5]], tokens.flatten(0, 1))


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (lambda s: replace(s, media={"video": MediaBatch(s.media["video"].data)}), "no time stamps"),
        (lambda s: _timed(s, [0.0, 2.0, 1.0, 3.0]), "time stamps of a video's frames fall"),
        (lambda s: _timed(s, [0.0, float("nan"), 1.0, 3.0]), "time stamps of a video's frames fall"),
        (lambda s: replace(s, spans=(replace(s.spans[0], items=2, length=2), *s.spans[2:])), "cut alike"),
        (
            lambda s: replace(s, spans=(replace(s.spans[0], length=2), *s.spans[1:])),
            "lay it out for this model",
        ),
    ],
)
def test_videos_that_cannot_be_are_refused(spoiled, said) -> None:
    with pytest.raises(DataError, match=said) as caught:
        build().embedder(spoiled(documents(False)[1]))
    assert "\n" not in str(caught.value)


def _timed(sequence: Sequence, times: list[float]) -> Sequence:
    return replace(sequence, media={"video": MediaBatch(sequence.media["video"].data, torch.tensor(times))})


def test_more_frames_than_the_horizon_are_refused() -> None:
    config = replace(CONFIG, temporal=replace(CONFIG.temporal, max_frames=3))
    with pytest.raises(
        DataError, match=r"a video of 4 frames is beyond the model's horizon of 3 frames: take fewer"
    ):
        shots_of(documents(False)[1], config)
    picture = document(
        [1, ("image", IMAGE, 4, 1)], {"image": MediaBatch(noise(1, 3, 16, 16, seed=1))}, train=False
    )
    with pytest.raises(DataError, match=r"a picture of 4 repeats .* use fewer repeats"):
        shots_of(repeated(picture, 4), config)


def test_items_that_nobody_shows_are_encoded_and_reach_nothing() -> None:
    model = build()
    sequence = documents(True)[0]
    padded = sequence.padded(len(sequence) + 3, 5)
    seen: list[int] = []
    model.embedder.vision.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    close(model.loss(padded).mean, model.loss(sequence).mean)
    assert seen == [5, 3]
    alone = replace(documents(True)[2], media={"image": MediaBatch(noise(2, 3, 16, 16, seed=1))})
    model.loss(alone).mean.backward()
    assert model.embedder.vision.patch_embedding.weight.grad is not None
    assert not model.embedder.vision.patch_embedding.weight.grad.any()


def test_in_lockstep_every_pass_encodes_once() -> None:
    model = build()
    model.embedder.lockstep = True  # type: ignore[assignment]
    seen: list[int] = []
    model.embedder.vision.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    for sequence in documents(True):
        model.loss(sequence).mean.backward()
    assert seen == [3, 4, 1, 4]
    plain = build()
    close(model.loss(documents(True)[2]).mean, plain.loss(documents(True)[2]).mean)


def test_in_lockstep_every_layer_runs_equally_often() -> None:
    """Without gradient too, where long videos are otherwise read in chunks."""
    model = build()
    model.embedder.lockstep = True  # type: ignore[assignment]
    few, many = (
        document(
            [1, ("image", IMAGE, n * 3, n), 2],
            {"image": MediaBatch(noise(n, 3, 16, 16, seed=n))},
            train=False,
        )
        for n in (1, FRAMES_AT_ONCE + 1)
    )
    counts = []
    for sequence in (few, many):
        seen: list[int] = []
        hooks = [
            layer.register_forward_pre_hook(lambda *_, seen=seen, n=n: seen.append(n))
            for n, layer in enumerate(model.embedder.vision.layers)
        ]
        with torch.no_grad():
            model.embedder(repeated(sequence, 3))
        for hook in hooks:
            hook.remove()
        counts.append(seen)
    assert counts[0] == counts[1]


# Anytime and views ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["tile", "repeat"])
def test_fewer_repeats_are_the_first_of_all(order) -> None:
    """What remains is said as before: rows of the shortened sequence are rows of the whole one."""
    config = replace(CONFIG, repeat_order=order)
    model = build(config)
    whole = Sequence.pack(documents(False))
    first, second = whole.spans_of("image")
    fewer = with_repeats(whole, {first: 1, second: 2}, config)
    rows = model.embedder(fewer).x_TC
    before = model.embedder(whole).x_TC
    kept = [0, *([1, 4] if order == "tile" else [1, 2]), 7, 8, 9, 11, *range(12, len(whole))]
    close(rows, before[kept])
    assert torch.equal(fewer.ids_T, whole.ids_T[kept])
    for part in fewer.split():
        assert torch.equal(part.pos_T, torch.arange(len(part), dtype=torch.float32))
    with pytest.raises(DataError, match="0 repeats of a span that has 3"):
        with_repeats(whole, {first: 0}, config)
    with pytest.raises(DataError, match=r"this model's own number is 2"):
        with_repeats(whole, {first: 1}, replace(config, repeats=2))


def test_a_picture_is_repeated_until_nothing_changes() -> None:
    model = build()
    store = model.embedder.features = FeatureCache()  # type: ignore[assignment]
    sequence = documents(False)[0]
    tokens = model.embedder.encode(shots_of(sequence, CONFIG)[:1], sequence).detach().unflatten(0, (2, 3))
    changes = [change(tokens[:, n], tokens[:, n - 1]) for n in (1, 2)]
    low, high = sorted(changes)
    assert low < high
    every = model.embedder.settled(sequence, low / 2)
    assert every.spans[0].repeats == 3
    one = model.embedder.settled(sequence, 2 * changes[0])
    assert one.spans[0].repeats == 1
    misses = store.misses
    with torch.no_grad():
        close(model.embedder(one).x_TC, slow_rows(model, one))
    assert store.misses == misses  # what was computed to decide is not computed again


def test_a_model_whose_repeats_are_equal_needs_one() -> None:
    model = build()
    model.embedder.vision.start_as_nothing()
    model.embedder.connect.start_as_nothing()
    assert [s.repeats for s in model.embedder.settled(documents(False)[0], 1e-6).spans] == [1, 1]
    with pytest.raises(ConfigError, match="share of change above 0"):
        model.embedder.settled(documents(False)[0], 0.0)


def test_views_of_a_tile() -> None:
    ramp = torch.arange(16.0).expand(1, 3, 16, 16).contiguous()
    crops = views_of(ramp, 5, "crops")
    assert crops.shape == (5, 3, 16, 16)
    assert torch.equal(crops[0], ramp[0])
    assert float(crops[1].max()) < 8 < float(crops[2].min()) + 1.5  # left quarter, right quarter
    close(crops[3], crops[1], 1e-6)  # the picture is the same from top to bottom
    scales = views_of(ramp, 4, "scales")
    assert torch.equal(scales[3], ramp[0])
    assert float((scales[0] - ramp[0]).abs().max()) > float((scales[2] - ramp[0]).abs().max())
    assert torch.equal(views_of(ramp, 2, "same"), ramp.repeat(2, 1, 1, 1))
    for views, wide in (("crops", crops), ("scales", scales)):
        for dtype in (torch.bfloat16, torch.float16):
            narrow = views_of(ramp.to(dtype), len(wide), views)
            assert narrow.dtype == dtype
            torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=0.1)


@pytest.mark.parametrize("views", ["crops", "scales"])
def test_repeats_may_show_other_views(views) -> None:
    model = build(replace(CONFIG, views=views))
    sequence = documents(False)[0]
    shot = shots_of(sequence, CONFIG)[0]
    pixels = views_of(model.embedder._normal(sequence.media["image"].data[:2]), 3, views)
    clips = Clips((1,) * 6, (3, 3), torch.tensor(shot.times * 2, dtype=torch.float64))
    close(model.embedder(sequence).x_TC[1:7], model.embedder.project(pixels, clips).flatten(0, 1))
    with pytest.raises(ConfigError, match="anytime compares equal repeats"):
        model.embedder.settled(sequence, 0.1)


# Configuration -------------------------------------------------------------------------------------------------------


def test_tokens_of_a_tile() -> None:
    vision = replace(CONFIG.vision, patch_size=14, image_size=448)
    assert [downsample_for(n, vision) for n in (16, 64, 256)] == [0.125, 0.25, 0.5]
    with pytest.raises(ConfigError, match="cannot have 100 tokens: 1024, 256, 64, 16, 4, 1"):
        downsample_for(100, vision)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"repeats": 0}, "repeats is 0"),
        ({"repeats": 97}, "beyond the horizon of 96"),
        ({"views": "zoom"}, "views is 'zoom'"),
        ({"repeat_order": "frame"}, "use tile or repeat"),
        ({"downsample": 0.3}, "does not divide the patch grid"),
        ({"temporal": TemporalConfig(layers=4)}, "has 3 layers"),
        ({"select_layer": 1}, "in front of all temporal layers"),
    ],
)
def test_a_model_that_cannot_be_is_refused(facts, said) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(CONFIG, **facts)
