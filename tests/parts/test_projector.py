"""Projector: parity with transformers, sizes of the releases."""

import pytest
import torch

from chiasm.errors import ConfigError
from chiasm.parts.connect.projector import Projector


def test_parity_with_transformers() -> None:
    from transformers import InternVLConfig
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

    config = InternVLConfig(
        vision_config={"hidden_size": 12, "num_attention_heads": 3},
        text_config={"model_type": "qwen2", "hidden_size": 20, "num_attention_heads": 2},
    )
    theirs, ours = InternVLMultiModalProjector(config), Projector(48, 20)
    names = {"layer_norm": "norm", "linear_1": "fc1", "linear_2": "fc2"}
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight)
    state = {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    x = torch.randn(3, 5, 48) * 4
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "language", "parameters"), [(4096, 896, 4_482_816), (4096, 2048, 12_595_200)]
)
def test_released_sizes(width: int, language: int, parameters: int) -> None:
    with torch.device("meta"):
        projector = Projector(width, language)
    assert sum(p.numel() for p in projector.parameters()) == parameters
    assert projector.norm.eps == 1e-5


def test_leading_dimensions_are_free() -> None:
    projector, x = Projector(8, 6), torch.randn(4, 3, 8)
    torch.testing.assert_close(projector(x)[2, 1], projector(x[2, 1]))


def test_widths_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Projector(0, 8)
