"""A tiny random InternVL on disk, and the command line run within this process."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chiasm.checkpoint.adapters import adapter_for
from chiasm.checkpoint.store import write_checkpoint
from chiasm.cli.app import main
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig
from chiasm.systems.internvl.config import InternVLConfig
from chiasm.systems.internvl.model import build_internvl, build_language_model
from tiny_tokenizers import byte_level

TILE = 28


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The only line on stderr of a command that failed and printed nothing else."""
        assert self.code != 0, self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("error: "), self
        return lines[0]


def language(family: str = "qwen2") -> LanguageConfig:
    return LanguageConfig(
        vocab_size=byte_level().vocab_size,
        hidden_size=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        max_positions=512,
        qkv_bias=family == "qwen2",
        tie_words=False,
        family=family,
    )


def write_internvl(folder: Path, **config_changes: object) -> Path:
    vision = InternViTConfig(
        hidden_size=8, intermediate_size=12, layers=2, heads=2, patch_size=14, image_size=TILE
    )
    config = InternVLConfig(vision=vision, language=language())
    torch.manual_seed(0)
    model = build_internvl(config, generator=torch.Generator().manual_seed(0))
    adapter = adapter_for("original", language=config.language, vision=vision)
    public = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "llm_config": config.language.to_public(),
        "vision_config": vision.to_public("original"),
        "force_image_size": TILE,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 6,
        "template": "internvl2_5",
        "torch_dtype": "float32",
    } | config_changes
    state = {name: value.detach() for name, value in model.named_parameters()}
    write_checkpoint(folder, adapter.to_public(state), public, max_shard_bytes=20_000)
    byte_level().save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random InternVL of a few thousand weights, in the original layout, in several shards."""
    return write_internvl(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama alone."""
    folder = tmp_path_factory.mktemp("models") / "words"
    config = language("llama")
    torch.manual_seed(0)
    model = build_language_model(config)
    torch.nn.init.normal_(model.embedder.words.weight, std=0.02)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    state = {name: value.detach() for name, value in model.named_parameters()}
    adapter = adapter_for("text", language=config)
    write_checkpoint(folder, adapter.to_public(state), config.to_public())
    byte_level().save(folder)
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wide PNG of noise."""
    path = tmp_path_factory.mktemp("pictures") / "wide.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


class Stdin(io.TextIOWrapper):
    """Bytes as standard input; `terminal` says whether a person seems to sit there."""

    def __init__(self, data: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*words, stdin=b"", terminal=False)`: the command line in this process."""

    def call(*words: object, stdin: bytes = b"", terminal: bool = False) -> Ran:
        monkeypatch.setattr(sys, "stdin", Stdin(stdin, terminal))
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


def read_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]
