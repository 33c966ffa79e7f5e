"""OpenVINO graphs against our own modules: small random weights, float32, then what rounding costs.

OpenVINO comes with the extra `dev`. What users meet is in tests/cli/test_backend.py.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import openvino as ov
import pytest
import torch

from chiasm.errors import ConfigError, UsageError
from chiasm.media.tiles import TilePolicy
from chiasm.model.openvino import check, parts
from chiasm.model.openvino.check import Agreement, VisionSide, agreement, distance
from chiasm.model.openvino.export import Options, write_graphs
from chiasm.model.openvino.graphs import Writer, decoder_graph, vision_graph
from chiasm.model.openvino.parts import CompiledTrunk, StateCache, compile_graph, run_graph, settings
from chiasm.model.openvino.weights import INT8, Scheme, compress, core, matrix, rounded, schemes
from chiasm.nn.attention import KVCache, Segments
from chiasm.nn.lora import apply_lora
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl, build_language_model

C = 64
FAMILIES = {
    "qwen2": {"qkv_bias": True, "tie_words": True},
    "llama": {"kv_heads": 4},
    "internlm2": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_positions": 16},
    "qwen3": {"qk_norm": True, "head_dim": 24},
    "phi3": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.3 * i for i in range(8)],
            "original_max_position_embeddings": 64,
        },
        "max_positions": 128,
    },
}


def config(family: str = "qwen2", **changes) -> LanguageConfig:
    sizes = {
        "hidden_size": C,
        "intermediate_size": 96,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
    }
    return LanguageConfig(family=family, vocab_size=90, **sizes | FAMILIES[family] | changes)  # type: ignore[arg-type]


def shaken(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights, in which nothing is at its neutral value: norms, biases and LayerScale too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        gain = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.data = gain + spread * torch.randn(parameter.shape, generator=generator)
    return module.eval().requires_grad_(False)


def language(family: str = "qwen2", **changes):
    return shaken(build_language_model(config(family, **changes)))


def internvl(**changes):
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "layers": 3,
        "heads": 2,
        "patch_size": 7,
        "image_size": 28,
    }
    given = {"tiles": TilePolicy(dynamic=False, image_size=28), "language": config()}
    split = {key: value for key, value in changes.items() if key not in ("unshuffle", "select_layer")}
    whole = given | {key: value for key, value in changes.items() if key in ("unshuffle", "select_layer")}
    return shaken(build_internvl(InternVLConfig(vision=InternViTConfig(**vision | split), **whole)))


def side(model) -> VisionSide:
    e = model.embedder
    return VisionSide(e.vision, e.compress, e.connect, e.select_layer)


def compiled_trunk(decoder, scheme=None, dtype="float32") -> CompiledTrunk:
    return CompiledTrunk(
        compile_graph(decoder_graph(Writer(scheme, exact=True), decoder), dtype), decoder.rope
    )


PASSES = ((9, 7), (1, 1), (1, 1), (3, 6), (1, 1))


def conversation(trunk, cache: KVCache | None = None, seed: int = 0) -> torch.Tensor:
    """Hidden states of two documents: prompts of other lengths, single rows, a ragged second turn, a row again."""
    cache = trunk.new_cache(2) if cache is None else cache
    generator = torch.Generator().manual_seed(seed)
    read, out = [0, 0], []
    for pair in PASSES:
        positions = torch.cat([torch.arange(at, at + n) for at, n in zip(read, pair, strict=True)]).float()
        rows = torch.randn(sum(pair), C, generator=generator)
        kind = torch.zeros(sum(pair), dtype=torch.int64)
        out.append(trunk(rows, kind_T=kind, segments=Segments.of(pair), pos_T=positions, cache=cache))
        read = [at + n for at, n in zip(read, pair, strict=True)]
    assert cache.lengths == read
    return torch.cat(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_ours_in_prefill_decoding_and_a_second_turn(family: str) -> None:
    decoder = language(family).trunk
    expected = conversation(decoder)
    torch.testing.assert_close(conversation(compiled_trunk(decoder)), expected, rtol=1e-4, atol=1e-4)


def test_without_a_cache_documents_begin_anew() -> None:
    decoder = language().trunk
    trunk = compiled_trunk(decoder)
    rows = torch.randn(11, C, generator=torch.Generator().manual_seed(1))
    given = {
        "kind_T": torch.zeros(11, dtype=torch.int64),
        "segments": Segments.of((4, 7)),
        "pos_T": torch.cat([torch.arange(4), torch.arange(7)]).float(),
    }
    first, second = trunk(rows, **given), trunk(rows, **given)
    torch.testing.assert_close(first, decoder(rows, **given), rtol=1e-4, atol=1e-4)
    assert torch.equal(first, second)


def test_a_long_prompt_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = language("llama").trunk
    trunk = compiled_trunk(decoder)
    monkeypatch.setattr(parts, "CHUNK", 4)
    torch.testing.assert_close(conversation(trunk), conversation(decoder), rtol=1e-4, atol=1e-4)


def test_the_cache_drops_restarts_and_views_documents() -> None:
    decoder = language().trunk
    trunk = compiled_trunk(decoder)
    caches = [KVCache(2, 3), trunk.new_cache(3)]
    seen = []
    for model, cache in zip((decoder, trunk), caches, strict=True):
        generator = torch.Generator().manual_seed(2)

        def read(lengths, slots, begin, model=model, cache=cache, generator=generator):
            positions = torch.cat(
                [torch.arange(b, b + n) for b, n in zip(begin, lengths, strict=True)]
            ).float()
            rows = torch.randn(sum(lengths), C, generator=generator)
            kind = torch.zeros(sum(lengths), dtype=torch.int64)
            return model(
                rows, kind_T=kind, segments=Segments.of(lengths, slots), pos_T=positions, cache=cache
            )

        out = [read((3, 5, 2), (0, 1, 2), (0, 0, 0))]
        cache.resize([2, 1], 2)
        out.append(read((1, 1), (0, 1), (2, 5)))
        cache.restart(1)
        out.append(read((4, 1), (1, 0), (0, 3)))
        assert cache.lengths == [4, 4]
        seen.append(torch.cat(out))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    states = caches[1]
    assert isinstance(states, StateCache)
    part = states.view([1])
    kind = torch.zeros(1, dtype=torch.int64)
    trunk(torch.ones(1, C), kind_T=kind, segments=Segments.of((1,)), pos_T=torch.tensor([4.0]), cache=part)
    assert states.lengths == [4, 5]
    states.resize([1], 2)
    assert states.lengths == [5, 0]


def test_a_document_continues_from_a_copy_of_another() -> None:
    trunk = compiled_trunk(language().trunk)
    cache = trunk.new_cache(2)
    rows = torch.randn(8, C, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(8).float()

    def read(first: int, last: int, slot: int) -> torch.Tensor:
        given = {"kind_T": torch.zeros(last - first, dtype=torch.int64), "pos_T": positions[first:last]}
        segments = Segments.of((last - first,), (slot,))
        return trunk(rows[first:last], segments=segments, cache=cache, **given)

    read(0, 6, 0)
    saved = cache.take(0)
    assert [tuple(x.shape) for x in saved[0]] == [(2, 6, 16)] * 2
    whole = read(6, 8, 0)
    cache.put(1, saved, 6)
    torch.testing.assert_close(read(6, 8, 1), whole, rtol=1e-5, atol=1e-5)
    cache.restart(1)
    cache.put(1, saved, 4)
    torch.testing.assert_close(read(4, 8, 1)[2:], whole, rtol=1e-5, atol=1e-5)


def test_a_cache_of_another_backend_is_refused() -> None:
    trunk = compiled_trunk(language().trunk)
    with pytest.raises(ConfigError, match="not one of the openvino backend"):
        conversation(trunk, KVCache(2, 2))


def test_a_switch_of_rotary_factors_is_not_crossed_in_the_cache() -> None:
    trunk = compiled_trunk(language("phi3").trunk)
    cache = trunk.new_cache()
    kind = torch.zeros(63, dtype=torch.int64)
    positions = torch.arange(63).float()
    trunk(torch.zeros(63, C), kind_T=kind, segments=Segments.of((63,)), pos_T=positions, cache=cache)
    given = {"kind_T": kind[:2], "segments": Segments.of((2,)), "pos_T": torch.tensor([63.0, 64.0])}
    with pytest.raises(ConfigError, match="grows past 64"):
        trunk(torch.zeros(2, C), cache=cache, **given)


def test_the_plugin_recognises_the_attention() -> None:
    """Else keys and values would be copied at every step: right, but slow."""
    graph = compile_graph(decoder_graph(Writer(), language().trunk), None).get_runtime_model()
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in graph.get_ops()]
    assert kinds.count("ScaledDotProductAttention") == 2
    assert kinds.count("RoPE") == 4
    assert "Softmax" not in kinds


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(("unshuffle", "select_layer"), [("v2", -1), ("v1", -2)])
def test_the_vision_side_is_ours(norm: str, unshuffle: str, select_layer: int) -> None:
    six_b = norm == "rms_norm"
    model = internvl(
        norm=norm, qk_norm=six_b, qkv_bias=not six_b, unshuffle=unshuffle, select_layer=select_layer
    )
    s = side(model)
    graph = vision_graph(Writer(exact=True), s.vision, s.compress, s.connect, select_layer=s.select_layer)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    found = run_graph(compile_graph(graph, "float32").create_infer_request(), pixels=pixels.numpy())
    torch.testing.assert_close(torch.from_numpy(found), model.embedder.project(pixels), rtol=1e-4, atol=1e-4)


# --- compressed weights ------------------------------------------------------------


@pytest.mark.parametrize("scheme", [None, INT8, Scheme(4, 64), Scheme(4, 32)])
def test_a_compressed_matrix_stands_for_what_its_twin_says(scheme: Scheme | None) -> None:
    weight = torch.randn(12, 128, generator=torch.Generator().manual_seed(5))
    weight[3] = 0
    weight[4, :64] = 0
    x = ov.opset13.parameter([-1, 128], np.float32, name="x")
    result = ov.opset13.result(ov.opset13.matmul(x, matrix(weight, scheme), False, True))
    request = (
        core().compile_model(ov.Model([result], [x], "m"), "CPU", settings("float32")).create_infer_request()
    )
    found = torch.from_numpy(request.infer([np.eye(128, dtype=np.float32)])[0].copy()).T
    torch.testing.assert_close(found, rounded(weight, scheme), rtol=1e-5, atol=1e-6)


def test_rounding_is_to_the_nearest() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(6))
    for scheme, widest in ((INT8, 127), (Scheme(4, 64), 8)):
        packed = compress(weight, scheme)
        assert packed.bits == scheme.bits
        assert int(packed.values_OQR.abs().max()) == widest
        step = packed.scales_OQ1.abs()
        error = (packed.matrix_OI - weight).unflatten(1, (packed.values_OQR.shape[1], -1)).abs()
        # Half a step; the one value beyond 7 steps on the side without -8 may be a whole one away.
        assert bool((error <= step * (0.5001 if scheme is INT8 else 1.0001)).all())
    assert compress(torch.randn(6, 100), Scheme(4, 64)).bits == 8  # no whole groups


def test_values_beyond_float16_stay_float32() -> None:
    weight = torch.tensor([[1e6, 1.0], [2.0, 3.0]])
    assert torch.equal(rounded(weight, None), weight)
    assert float(rounded(weight[1:] + 1e-5, None)[0, 0]) == 2.0


def test_the_words_of_quantize() -> None:
    assert schemes(None) == (None, None)
    assert schemes("int8") == (INT8, None)
    assert schemes("int4-128+vision-w8a8") == (Scheme(4, 128), INT8)
    with pytest.raises(UsageError, match="no w8a8 for the language model"):
        schemes("w8a8")
    with pytest.raises(UsageError, match="'int3' is not known"):
        schemes("int3")


# --- the check ------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantize", "dtype"),
    [(None, "float32"), (None, None), ("int8", None), ("int4-32", "float32"), ("int4-32+vision-w8a8", None)],
)
def test_graphs_agree_with_the_model(quantize: str | None, dtype: str | None) -> None:
    model = internvl()
    options = Options(dtype=dtype, quantize=quantize)
    made = write_graphs(model, side(model), options)
    found = agreement(model, made.graphs, side(model), schemes(quantize), dtype)
    assert found.graph < 1e-5
    exact = quantize is None and dtype == "float32"
    assert found.served == pytest.approx(found.graph) if exact else found.graph < found.served < 0.5


def test_a_model_stored_in_bfloat16_is_compared_in_float32() -> None:
    model = language().bfloat16()
    made = write_graphs(model, None, Options(dtype=None))
    assert agreement(model, made.graphs, None, (None, None), None).graph < 1e-5


def test_a_wrong_graph_is_refused() -> None:
    model, other = language(), language(rope_theta=5e3)
    made = write_graphs(model, None, Options(dtype="float32"))
    made.graphs["head"] = write_graphs(shaken(build_language_model(config()), 1), None, Options()).graphs[
        "head"
    ]
    found = agreement(other, made.graphs, None, (None, None), "float32")
    with pytest.raises(
        ConfigError, match=r"the OpenVINO graph of tiny differs from the model by .*leave backend= out"
    ):
        found.demand("tiny", None)


def test_rounding_beyond_its_bound_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"differ from the model's by 90% .*, more than 80%: leave quantize out"
    ):
        Agreement(1e-6, 0.9).demand("tiny", Scheme(4, 64))
    with pytest.raises(ConfigError, match='more than 10%: use dtype="float32"'):
        Agreement(1e-6, float("inf")).demand("tiny", None)
    Agreement(1e-6, check.SERVED_BOUNDS[8]).demand("tiny", INT8)
    assert distance(torch.tensor([float("nan"), 1.0]), torch.tensor([0.0, 1.0])) == float("inf")


def test_adapters_must_be_merged() -> None:
    model = language()
    apply_lora(model.trunk, ("layers.*.attn.qkv",), 2, 4.0)
    with pytest.raises(ConfigError, match="LoRALinear, not Linear: merge adapters"):
        write_graphs(model, None, Options())


def test_an_encoder_that_is_not_there_cannot_be_rounded() -> None:
    with pytest.raises(UsageError, match="no vision encoder to round"):
        write_graphs(language(), None, Options(quantize="vision-w8a8"))


SIGNALLED = """
import gc, signal, sys
import numpy as np
import openvino as ov
from chiasm.model.openvino import weights
from chiasm.model.openvino.parts import compile_graph, settings

def graph():
    x = ov.opset13.parameter([-1, 8], np.float32, name="x")
    product = ov.opset13.matmul(x, ov.opset13.constant(np.ones((8, 8), np.float32)), False, False)
    return ov.Model([ov.opset13.result(product)], [x], "m")

settings(None)
first = compile_graph(graph(), None)
second = compile_graph(graph(), None)
settings(None)
del first
gc.collect()
del second
gc.collect()
caught = []
signal.signal(signal.SIGINT, lambda *given: caught.append(given))
signal.raise_signal(signal.SIGINT)
print(len(caught))
"""


def test_a_signal_after_models_are_gone_reaches_its_handler() -> None:
    """Every core registers an alternate signal stack, and a freed one ends the process (`weights.core`)."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr[-2000:]
