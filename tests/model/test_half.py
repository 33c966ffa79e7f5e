"""float16: the sums that layers add to stay in float32, and what is no number is said."""

import pytest
import torch
from tests.contracts import internvl
from tests.contracts.skeleton import initialise
from tests.tiny_chat import ask, picture, tiny_chat

from chiasm.data.sequence import Sequence
from chiasm.errors import NumericsError
from chiasm.model.generate import generate
from chiasm.model.quantize import quantize_model
from chiasm.nn import quant
from chiasm.nn.sampling import Sampling, choose
from chiasm.parts.connect.projector import Projector
from chiasm.parts.vision.internvit import InternViT, InternViTConfig
from chiasm.systems.internvl.model import build_internvl


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_an_encoder_may_pass_the_range_of_float16(norm: str) -> None:
    config = InternViTConfig(
        hidden_size=16, intermediate_size=24, layers=2, heads=2, patch_size=7, image_size=14, norm=norm
    )
    wide = InternViT(config).requires_grad_(False)
    wide.position_embedding[..., 3] = 40_000.0
    for layer in wide.layers:
        layer.mlp.fc2.bias[3] = 15_000.0  # twice of this, and the sum is past 65,504
        layer.ls2.fill_(1.0)
    pixels = torch.randn(2, 3, 14, 14)
    states = wide.hidden_states(pixels, (-1, -2))
    assert float(states[0].max()) > 65_504
    narrow = InternViT(config).requires_grad_(False)
    narrow.load_state_dict(wide.state_dict())
    narrow.half()
    got = narrow.hidden_states(pixels.half(), (-1, -2))
    for state, wanted in zip(got, states, strict=True):
        assert state.dtype == torch.float32  # up to the projector, whose norm brings it back into range
        torch.testing.assert_close(state, wanted, rtol=2e-3, atol=2e-2)
    projector = Projector(16, 8).half().requires_grad_(False)
    projected = projector(got[0][:, 1:])
    assert projected.dtype == torch.float16
    torch.testing.assert_close(projected.float(), projector.float()(states[0][:, 1:]), rtol=2e-2, atol=5e-3)


def test_a_decoder_may_pass_the_range_of_float16() -> None:
    wide = initialise(build_internvl(internvl.CONFIG)).float().requires_grad_(False)
    rows = Sequence.of_text(torch.ones(4, dtype=torch.int64))  # equal rows, so that one weight fits all
    wide.embedder.words.weight[:, 3] = 50_000.0
    ffn = wide.trunk.layers[0].ffn
    seen = []
    with ffn.down.register_forward_pre_hook(lambda module, given: seen.append(given[0][0])):
        wide.hidden(rows)
    ffn.down.weight[3] = seen[0] / seen[0].square().sum() * 30_000
    sums = []
    with wide.trunk.norm.register_forward_pre_hook(lambda module, given: sums.append(given[0])):
        wide.hidden(rows)
    assert float(sums[0].max()) > 65_504
    assert float(ffn.down.weight.abs().max()) < 65_504
    narrow = initialise(build_internvl(internvl.CONFIG)).requires_grad_(False)
    narrow.load_state_dict(wide.state_dict())
    narrow.half()
    want, got = wide.hidden(rows), narrow.hidden(rows)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)


def test_float16_answers_as_float32() -> None:
    model = initialise(build_internvl(internvl.CONFIG)).float().requires_grad_(False)
    rows = Sequence.of_text(torch.arange(6))
    want = model.head.logits(model.hidden(rows))
    got = model.half().head.logits(model.hidden(rows))
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    assert len(generate(model, [rows], limit=3)[0]) == 3


@pytest.mark.parametrize("how", ["int8", "w8a8", "int4", "vision-w8a8", "w8a8+vision-w8a8"])
@pytest.mark.parametrize("kernel", [True, False])
def test_float16_and_rounded_weights_go_together(
    monkeypatch: pytest.MonkeyPatch, how: str, kernel: bool
) -> None:
    """Also where weights are widened, as on the GPUs that float16 is for."""
    if not kernel:
        monkeypatch.setattr(quant, "_integer_product", lambda: False)
    logits = []
    for half in (False, True):
        chat = tiny_chat(language={"hidden_size": 64, "intermediate_size": 96})
        if half:
            chat.model.half()
        quantize_model(chat.model, how)
        logits.append(chat.logits(chat.inputs(ask("Hello?", picture()))))
    assert bool(logits[1].isfinite().all())
    # Activations that are rounded more coarsely fall to other sides here and there.
    bound = 0.3 if how == "int4" else 0.05
    assert float((logits[1] - logits[0]).norm() / logits[0].norm()) < bound


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_said(temperature: float) -> None:
    logits = torch.tensor([0.0, float("nan"), 1.0])
    with pytest.raises(NumericsError, match="load it with dtype bfloat16 or float32"):
        choose(
            logits, Sampling(temperature=temperature), torch.tensor([], dtype=torch.int64), torch.Generator()
        )
    model = initialise(build_internvl(internvl.CONFIG)).float().requires_grad_(False)
    model.trunk.norm.weight.fill_(float("inf"))
    with pytest.raises(NumericsError):
        generate(model, [Sequence.of_text(torch.arange(4))], limit=2)
