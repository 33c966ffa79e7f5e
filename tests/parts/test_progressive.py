"""ProgressiveViT, the exact facts.

Zero-init = InternViT, shared trunk = repeats, streaming = batch, causality, symmetry:
each at relative 1e-10 in float64 and 1e-5 in float32.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from chiasm.errors import ConfigError
from chiasm.nn.temporal import TimeEmbedding
from chiasm.parts.compress.unshuffle import pixel_unshuffle
from chiasm.parts.connect.conditioned import ConditionedProjector, coarsened
from chiasm.parts.connect.projector import Projector
from chiasm.parts.vision.internvit import InternViT, InternViTConfig, internvit_300m
from chiasm.parts.vision.progressive import Clips, ProgressiveViT, TemporalConfig

SIX_B = {"norm": "rms_norm", "qkv_bias": False, "qk_norm": True}
VIT = InternViTConfig(hidden_size=12, intermediate_size=20, layers=4, heads=3, patch_size=4, image_size=8)
WAYS = {
    "default": {},
    "full": {"conditioning": "full"},
    "all": {"layers": 4, "conditioned": ("spatial", "temporal", "ffn", "compress")},
    "first": {"place": "before_spatial", "gate": "time", "conditioning": "full"},
    "last": {"place": "after_ffn", "gate": "scalar", "conditioned": ("temporal",)},
    "narrow": {"width": 6, "heads": 2, "gate": "none"},
    "no attention": {"attention": False},
}
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
both = pytest.mark.parametrize("dtype", LIMITS, ids=str)
ways = pytest.mark.parametrize("way", WAYS)


def build(
    way: str = "default", dtype: torch.dtype = torch.float64, *, shaken: bool = True, **vit
) -> ProgressiveViT:
    """A tiny encoder; shaken so that gates and modulations matter."""
    torch.manual_seed(0)
    model = ProgressiveViT(replace(VIT, **vit), TemporalConfig(**{"layers": 2, "time_sines": 8, **WAYS[way]}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if shaken or not any(word in name for word in ("gate", "modulation", "own", "temporal.proj")):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
                gains = ("norm1.weight", "norm2.weight", "norm_t.weight", "ls1", "ls2", "gate")
                if name.endswith(gains):
                    parameter.add_(1)
    return model.to(dtype).eval()


def pictures(count: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


def close(got: Tensor, expected: Tensor) -> None:
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape
    assert float((got - expected).abs().max() / expected.abs().max()) <= LIMITS[expected.dtype]


MIXED = Clips(
    (3, 3, 1, 1, 1, 1, 2), (3, 3, 4, 2), torch.tensor([0, 0.5, 1, 0, 0.5, 1, 0, 0.2, 0.5, 1, 0, 1.0])
)


@both
@ways
@pytest.mark.parametrize("vit", [{}, SIX_B], ids=["300m", "6b"])
def test_a_fresh_one_is_the_internvit_of_its_weights(way, dtype, vit) -> None:
    model = build(way, dtype, shaken=False, **vit)
    plain = InternViT(model.config).to(dtype).eval()
    names = set(plain.state_dict())
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    x = pictures(7, dtype)
    close(model(x, clips=MIXED), MIXED.fan_out(plain(x)))
    close(model(x), plain(x))


@both
@ways
def test_the_trunk_shared_by_repeats_changes_nothing(way, dtype) -> None:
    model, x = build(way, dtype), pictures(7, dtype)
    close(model(x, clips=MIXED), model.forward_reference(x, clips=MIXED))
    close(model.finish(model.trunk(x), MIXED), model.forward_reference(x, clips=MIXED))


@ways
def test_the_shared_trunk_has_the_gradients_of_repeats(way) -> None:
    found = []
    for name in ("forward", "forward_reference"):
        model, x = build(way), pictures(7).requires_grad_()
        getattr(model, name)(x, clips=MIXED).square().sum().backward()
        found.append({n: p.grad for n, p in [("pixels", x), *model.named_parameters()] if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        close(found[0][name], expected)


@both
@ways
def test_streaming_is_the_batch(way, dtype) -> None:
    """Two videos of two tiles each would be four sequences; here two go on together, frame by frame."""
    model = build(way, dtype)
    x = pictures(10, dtype)  # frames 0 … 4 of the first, then of the second
    times = torch.tensor([0.0, 0.3, 0.4, 0.8, 1.0])
    clips = Clips((1,) * 10, (5, 5), times.repeat(2))
    expected = model(x, clips=clips).unflatten(0, (2, 5))
    cache = model.new_cache(window=5)
    for n in range(5):
        close(model.step(model.trunk(x[[n, 5 + n]]), times[n].expand(2), cache), expected[:, n])
    assert cache.frames == (5 if model.temporal_blocks[0].temporal is not None else 0)


@both
@ways
def test_streaming_beyond_the_window_is_a_band_with_a_sink(way, dtype) -> None:
    model, x = build(way, dtype), pictures(9, dtype)
    times = torch.linspace(0, 1, 9)
    clips = Clips((1,) * 9, (9,), times)
    expected = model.forward_reference(x, clips=clips, window=3, sink=1)
    cache = model.new_cache(window=3, sink=1)
    for n in range(9):
        close(model.step(model.trunk(x[n : n + 1]), times[n : n + 1], cache), expected[n : n + 1])


@both
@ways
def test_a_frame_changes_no_earlier_one(way, dtype) -> None:
    model, x = build(way, dtype), pictures(6, dtype)
    clips = Clips((1,) * 6, (6,), torch.linspace(0, 1, 6))
    before = model(x, clips=clips)
    for changed in range(6):
        y = x.clone()
        y[changed] = pictures(1, dtype, seed=9)[0]
        after = model(y, clips=clips)
        assert torch.equal(after[:changed], before[:changed])
        assert not torch.allclose(after[changed], before[changed])
        seen = not torch.equal(after[changed + 1 :], before[changed + 1 :])
        assert seen == (changed < 5 and way != "no attention")


@both
def test_without_the_time_all_repeats_are_equal(dtype) -> None:
    """The symmetry fact: causal attention over equal frames gives the value of one of them."""
    torch.manual_seed(0)
    model = ProgressiveViT(VIT, TemporalConfig(layers=2, conditioned=(), gate="channel"))
    assert model.time is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.to(dtype).eval()
    x = pictures(2, dtype)
    repeated = model(x, clips=Clips.stills(2, 4)).unflatten(0, (2, 4))
    for n in range(1, 4):
        close(repeated[:, n], repeated[:, 0])
    close(repeated[:, 0], model(x))
    knows = build(dtype=dtype)(x, clips=Clips.stills(2, 4)).unflatten(0, (2, 4))
    assert not torch.allclose(knows[:, 1], knows[:, 0], rtol=1e-2)


@ways
def test_small_memory_is_the_same_answer(way) -> None:
    model, x = build(way), pictures(7)
    with torch.no_grad():
        expected = model(x, clips=MIXED)
        for chunk in (1, 2, 5):
            close(model.chunked(chunk)(x, clips=MIXED), expected)


def test_recomputed_layers_give_the_same_gradients() -> None:
    found = []
    for keep in (False, True):
        model = build()
        model(pictures(7), clips=MIXED, checkpoint=keep).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for got, expected in zip(*found, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            close(got, expected)


def test_hidden_states_of_several_depths() -> None:
    model, x = build(), pictures(7)
    states = model.hidden_states(x, (0, 2, 3, -1), clips=MIXED)
    for depth, state in zip((0, 2, 3, -1), states, strict=True):
        close(state, model.forward_reference(x, depth, clips=MIXED))


def test_float16_sums_are_kept_in_float32() -> None:
    model, x = build(dtype=torch.float32), pictures(7, torch.float32)
    with torch.no_grad():
        expected = model(x, clips=MIXED)
        got = model.half()(x, clips=MIXED)
    assert got.dtype == torch.float32
    assert float((got - expected).abs().max() / expected.abs().max()) < 2e-2


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"layers": 5}, "temporal.layers is 5, but the encoder has 4"),
        ({"width": 5}, "no multiple of the encoder's head"),
        ({"layers": 0}, "temporal.layers is 0"),
        ({"place": "nowhere"}, "temporal.place is 'nowhere'"),
        ({"conditioned": ("ffn", "ffn")}, "each once"),
        ({"conditioned": ("mlp",)}, "temporal.conditioned"),
        ({"time_sines": 7}, "must be even"),
        ({"time_scale": 0}, "temporal.time_scale is 0"),
        ({"layers": True}, "temporal.layers is True"),
    ],
)
def test_a_config_that_cannot_be_is_refused(facts, said) -> None:
    with pytest.raises(ConfigError, match=said):
        ProgressiveViT(VIT, TemporalConfig(**{"layers": 2, **facts}))


def test_clips_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="repeats 0 cannot be"):
        Clips.stills(2, 0)
    with pytest.raises(ConfigError, match="3 frames, but sequences of 2"):
        Clips((3,), (2,), torch.zeros(3))
    model = ProgressiveViT(VIT, TemporalConfig(layers=2, max_frames=3)).double()
    with pytest.raises(ConfigError, match="beyond the model's horizon of 3"):
        model(pictures(1), clips=Clips.stills(1, 4))
    with pytest.raises(ConfigError, match="clips of 1 pictures for 2"):
        model(pictures(2), clips=Clips.stills(1, 2))
    with pytest.raises(ConfigError, match="in front of the temporal layers"):
        model.step(pictures(1), torch.zeros(1), model.new_cache(2), select_layer=1)


# Sizes ---------------------------------------------------------------------------------------------------------------


def added(temporal: TemporalConfig, width: int, factor: int = 4) -> int:
    """Parameters beyond those of InternViT-300M and of InternVL's own projector, built on the meta device."""
    with torch.device("meta"):
        vision, plain = ProgressiveViT(internvit_300m(), temporal), InternViT(internvit_300m())
        stacked = 1024 * factor**2
        own = temporal.conditioning == "full"
        embedding = (temporal.compress_time_width or stacked) if own else temporal.embedding(1024)
        time = TimeEmbedding(temporal.time_sines, embedding) if own else None
        connect = ConditionedProjector(stacked, width, embedding=embedding, time=time)
        old = Projector(4096, width)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return count(vision) + count(connect) - count(plain) - count(old)


@pytest.mark.parametrize("width", [896, 2048, 4096])
def test_light_conditioning_adds_less_than_a_tenth_of_a_billion(width) -> None:
    assert added(TemporalConfig(), width) < 100e6


def test_full_conditioning_in_all_layers_is_of_the_size_of_the_release() -> None:
    """The release has about 1.47 B parameters more than InternVL2-8B. Ours has no gates that follow the time."""
    extra = added(TemporalConfig(layers=24, conditioning="full"), 4096)
    assert extra == 1_062_832_128


# The projector -------------------------------------------------------------------------------------------------------


def test_a_fresh_conditioned_projector_is_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = Projector(8, 6).double()
    fresh = ConditionedProjector(8, 6, embedding=5).double()
    missing, unexpected = fresh.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["modulation.weight", "modulation.bias"], [])
    x, e = torch.randn(3, 4, 8).double(), torch.randn(3, 5).double()
    assert torch.equal(fresh(x, embedded_FE=e), plain(x))
    with pytest.raises(ConfigError, match="must be told when"):
        fresh(x)
    with torch.no_grad():
        fresh.modulation.weight.normal_()  # type: ignore[union-attr]
    scale, shift = fresh.modulation(e).unflatten(-1, (2, 8)).split(1, dim=1)  # type: ignore[misc]
    h = plain.norm(x) * (1 + scale) + shift
    close(fresh(x, embedded_FE=e), plain.fc2(torch.nn.functional.gelu(plain.fc1(h))))


@pytest.mark.parametrize(("factor", "ratio"), [(2, 2), (2, 4), (1, 2), (2, 1)])
def test_a_coarsened_projector_reads_the_mean_of_its_fine_tokens(factor, ratio) -> None:
    C, D, side = 3, 5, factor * ratio
    torch.manual_seed(0)
    fine = Projector(C * factor**2, D).double()
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.normal_()
    coarse = Projector(C * side**2, D).double()
    coarse.load_state_dict(coarsened(fine.state_dict(), C, factor, ratio))
    # One coarse token, and the fine tokens of the same patches by the unshuffle itself.
    patches = torch.randn(1, side * side, C, dtype=torch.float64)
    v = pixel_unshuffle(patches, 1 / side)[0]
    u = pixel_unshuffle(patches, 1 / factor)[0]
    # 1. Of anything: fc1 is fc1 of the mean. 2. Behind the norms' own affine parts, likewise.
    close(coarse.fc1(v)[0], fine.fc1(u.mean(0)))
    affine = v * coarse.norm.weight + coarse.norm.bias
    close(coarse.fc1(affine)[0], fine.fc1((u * fine.norm.weight + fine.norm.bias).mean(0)))
    # 3. Equal fine tokens: the whole projector.
    block = torch.randn(factor, factor, C, dtype=torch.float64)
    equal = block.repeat(ratio, ratio, 1).flatten(0, 1)[None]
    close(
        coarse(pixel_unshuffle(equal, 1 / side)),
        fine(pixel_unshuffle(equal, 1 / factor)).mean(1, keepdim=True),
    )
    # 4. In general only the norm's mean and variance differ: taken over all, the rest is the old projector's.
    joint = (u - v.mean()) / (v.var(unbiased=False) + coarse.norm.eps).sqrt()
    h = (joint * fine.norm.weight + fine.norm.bias).mean(0)
    close(coarse(v)[0], fine.fc2(torch.nn.functional.gelu(fine.fc1(h))))


def test_a_projector_of_another_width_is_not_coarsened() -> None:
    with pytest.raises(ConfigError, match="does not read 2 x 2 patches of 7 channels"):
        coarsened(Projector(12, 5).state_dict(), 7, 2, 2)
