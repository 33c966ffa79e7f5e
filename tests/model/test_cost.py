"""The cost model against the real thing: modules, torch's FLOP counter, the cache's tensors, live storages."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from chiasm.data.sequence import Sequence
from chiasm.errors import ConfigError
from chiasm.media.tiles import TilePolicy
from chiasm.model import cost
from chiasm.model.causal import CausalVLM
from chiasm.model.generate import Decoding
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl
from chiasm.systems.internvl.presets import PRESETS

VISION = InternViTConfig(hidden_size=32, intermediate_size=80, layers=3, heads=4, patch_size=7, image_size=28)
LANGUAGE = LanguageConfig(
    family="qwen2",
    vocab_size=101,
    hidden_size=48,
    intermediate_size=112,
    layers=3,
    heads=6,
    kv_heads=2,
    head_dim=8,
    qkv_bias=True,
)
CONFIGS = {
    "qwen2": InternVLConfig(vision=VISION, language=LANGUAGE, tiles=TilePolicy(image_size=28)),
    "qwen3, 6B's eyes": InternVLConfig(
        vision=replace(VISION, norm="rms_norm", qk_norm=True, qkv_bias=False),
        language=replace(LANGUAGE, family="qwen3", qkv_bias=False, qk_norm=True, head_dim=16),
        tiles=TilePolicy(image_size=28),
        select_layer=-2,
    ),
    "llama, tied": InternVLConfig(
        vision=replace(VISION, hidden_size=16, heads=2, intermediate_size=24),
        language=replace(LANGUAGE, family="llama", qkv_bias=False, tie_words=True, kv_heads=6),
        tiles=TilePolicy(image_size=28),
        downsample=0.25,
    ),
    "internlm2": InternVLConfig(
        vision=VISION,
        language=replace(LANGUAGE, family="internlm2", qkv_bias=False),
        tiles=TilePolicy(image_size=28),
    ),
    "phi3": InternVLConfig(
        vision=VISION,
        language=replace(LANGUAGE, family="phi3", qkv_bias=False, kv_heads=6),
        tiles=TilePolicy(image_size=28),
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> InternVLConfig:
    return CONFIGS[request.param]


def build(config: InternVLConfig) -> CausalVLM:
    torch.manual_seed(0)
    return build_internvl(config, generator=torch.Generator().manual_seed(0)).eval().requires_grad_(False)


def counted(step) -> int:
    """FLOPs of a call by torch's counter; attention as plain products, which it knows on every device."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_parameters_are_the_modules_own(name: str) -> None:
    config = CONFIGS.get(name) or PRESETS[name].config
    with torch.device("meta"):
        model = build_internvl(config)
    language = cost.language_parameters(config.language)
    assert cost.vision_parameters(config.vision) == numel(model.embedder.vision)
    assert cost.projector_parameters(config.projector_inputs, config.language.hidden_size) == numel(
        model.embedder.connect
    )
    assert language["words"] == numel(model.embedder.words)
    assert language["layers"] == numel(model.trunk)
    assert language["head"] == (0 if config.language.tie_words else numel(model.head))


def test_flops_of_encoder_and_projector(config: InternVLConfig) -> None:
    model, tiles = build(config), torch.zeros(5, 3, 28, 28)
    features = torch.zeros(7, config.projector_inputs)
    select = config.select_layer
    assert counted(lambda: model.embedder.vision(tiles, select_layer=select)) == cost.vision_flops(
        config.vision, 5, select_layer=select
    )
    assert counted(lambda: model.embedder.connect(features)) == cost.projector_flops(
        config.projector_inputs, config.language.hidden_size, 7
    )


def test_flops_of_prefill_and_decode(config: InternVLConfig) -> None:
    model, c, T = build(config), config.language, 23
    cache = model.new_cache(1, capacity=64)
    prompt = Sequence.of_text(list(range(T)))
    full = cost.language_flops(c, T, causal="full")
    assert counted(lambda: model.hidden(prompt, cache)) == full
    # The two conventions differ by the masked triangle alone.
    assert full - cost.language_flops(c, T) == c.layers * 4 * c.heads * c.head_dim * T * (T - 1) // 2

    def step() -> None:
        row = replace(Sequence.of_text([3]), pos_T=torch.tensor([float(T)]))
        model.head.logits(model.hidden(row, cache))

    assert counted(step) == cost.language_flops(c, 1, past=T) + cost.head_flops(c)
    steps = [cost.language_flops(c, 1, past=T + n) + cost.head_flops(c) for n in range(4)]
    assert cost.decode_flops(c, T, 5) == sum(steps)
    assert cost.decode_flops(c, T, 1) == 0
    assert cost.head_flops(c, 2, used=90) == 2 * 2 * c.hidden_size * 90


@pytest.mark.parametrize(("prompt", "new"), [(5, 1), (40, 12), (70, 256), (70, 300), (9, 600)])
@pytest.mark.parametrize("documents", [1, 3])
def test_cache_bytes_are_those_of_its_tensors(prompt: int, new: int, documents: int) -> None:
    config = CONFIGS["qwen2"]
    small = replace(config, language=replace(config.language, layers=1, hidden_size=8, intermediate_size=8))
    model = build(small)
    run = Decoding(model, [Sequence.of_text([1] * prompt)] * documents, limit=new)
    buffers = 0
    while run.step():
        trunk = run._cache.trunk
        buffers = sum(x.numel() * x.element_size() for x in (*trunk._k, *trunk._v) if x is not None)
    rows = cost.cache_rows(prompt, new)
    assert buffers == cost.cache_bytes(small.language, rows, documents, element=4)
    assert rows >= prompt + new - 1


class Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key in self.known or key in given or not size:
                continue
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)
        return out


def test_activations_are_those_alive() -> None:
    """At the proportions of released models, where small tensors do not count."""
    vision = InternViTConfig(
        hidden_size=64, intermediate_size=256, layers=2, heads=4, patch_size=7, image_size=56
    )
    language = replace(LANGUAGE, hidden_size=64, intermediate_size=256, heads=8, kv_heads=2)
    model = build(InternVLConfig(vision=vision, language=language, tiles=TilePolicy(image_size=56)))
    tiles, prompt = torch.zeros(6, 3, 56, 56), Sequence.of_text([1] * 200)
    with torch.no_grad(), Alive() as alive:
        model.embedder.vision(tiles)
    assert alive.peak == pytest.approx(cost.vision_activations(vision, 6, element=4), rel=0.03)
    with torch.no_grad(), Alive() as alive:
        model.hidden(prompt)
    assert alive.peak == pytest.approx(cost.language_activations(language, 200, element=4), rel=0.03)


def test_machines() -> None:
    machine = cost.named_machine("H100")
    assert machine.seconds(989e12, 0) == pytest.approx(1 / cost.PEAK_SHARES[0])
    assert machine.seconds(0, 3.35e12) == pytest.approx(1 / cost.PEAK_SHARES[1])
    assert cost.named_machine("h100", 1.0, 1.0).seconds(1e12, 3.35e12) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="no machine is called 'h1000': there are h200, h100"):
        cost.named_machine("h1000")
    with pytest.raises(ConfigError, match="flops must be"):
        cost.Machine(flops=0, bandwidth=1)
    with pytest.raises(ConfigError, match="bandwidth_share"):
        cost.named_machine("h100", 0.5, 1.5)


def test_measure_finds_a_rate_of_this_machine() -> None:
    machine = cost.measure(seconds=0.02)
    assert 1e8 < machine.flops < 1e16
    assert 1e8 < machine.bandwidth < 1e14
    assert machine.flops_share == cost.MEASURED_SHARES[0]
