"""Can vLLM, SGLang or LMDeploy read this folder, and will they compute what the model does?

Source: the servers' own code, as read for these releases (no server has been run here; docs/serving.md repeats that):

    vllm      0.33.0 (4ba787ec9)   model_executor/models/{internvl,interns1}.py, transformers_utils/
    sglang    0.5.23               srt/{models,configs,multimodal/processors}/internvl.py
    lmdeploy  0.16.0 (1263d5cd)    vl/model/{internvl,internvl3_hf}.py, pytorch/models/, turbomind/models/internvl.py

What they need beyond the weights: a config that names the decoder's class, a tokenizer with the image tokens, a chat
template, a generation config that ends at the chat's stop token; for the `-hf` layouts the processors' three files; for
the original layout, but in SGLang, the release's Python files (`auto_map`), which are not Chiasm's to write.

A finding is one of: `ok`; `missing` (the server needs it); `refused` (no class or graph for it there); `differs` (the
server runs, and computes or counts something else than the model).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from chiasm.checkpoint.adapters import detect_layout
from chiasm.checkpoint.config import InternVLPublicConfig, is_internvl
from chiasm.checkpoint.convert import GENERATION, TOKENIZER_CONFIG, added_tokens, has_template
from chiasm.checkpoint.preprocess import IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR, read_tile_policy
from chiasm.checkpoint.store import CheckpointReader, read_json
from chiasm.errors import CheckpointError, UsageError
from chiasm.media.tiles import NORMALIZATIONS, TilePolicy
from chiasm.text.templates import TEMPLATES

__all__ = ["RELEASES", "SERVERS", "Finding", "Readiness", "Server", "check_serving", "layout_for"]

Server = Literal["vllm", "sglang", "lmdeploy"]
SERVERS: tuple[Server, ...] = get_args(Server)
Layout = Literal["original", "hf", "hf-old"]

RELEASES = {"vllm": "0.33.0", "sglang": "0.5.23", "lmdeploy": "0.16.0"}
"""Release whose source the rules of a server come from."""

# Layouts that a server has a class for, the first being the one that is written for it.
_LAYOUTS: dict[Server, tuple[Layout, ...]] = {
    "vllm": ("hf-old", "hf", "original"),
    "sglang": ("original",),
    "lmdeploy": ("hf-old", "original"),
}
_DECODERS: dict[Server, tuple[str, ...]] = {
    "vllm": ("qwen2", "qwen3", "llama", "internlm2", "internlm3", "phi3"),
    "sglang": ("qwen2", "qwen3", "internlm2"),
    "lmdeploy": ("qwen2", "qwen3", "llama", "internlm2", "internlm3", "phi3"),
}
_IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
_SGLANG_TILE, _SGLANG_TILES = 448, 12


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a server looks for: how it stands, what it is, and what helps ("" where nothing need be done)."""

    status: Literal["ok", "missing", "refused", "differs"]
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        """One line."""
        return f"{self.what}: {self.remedy}" if self.remedy else self.what


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """What a server makes of a folder.

    Attributes:
        server: which one, in the release of `RELEASES`.
        layout: of the folder.
        findings: one by one, `ok` ones too.
    """

    server: Server
    layout: str
    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        """Whether the server can read the folder."""
        return not self.of("missing", "refused")

    def of(self, *statuses: str) -> tuple[Finding, ...]:
        """The findings of these kinds."""
        return tuple(finding for finding in self.findings if finding.status in statuses)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return asdict(self) | {"ready": self.ready, "release": RELEASES[self.server]}


def layout_for(servers: tuple[Server, ...]) -> Layout:
    """The layout that all of these servers read.

    Raises:
        UsageError: an unknown server, or none at all.
    """
    unknown = [server for server in servers if server not in SERVERS]
    if unknown or not servers:
        raise UsageError(f"no rules for the server {unknown[:1]}: known are {', '.join(SERVERS)}")
    first = _LAYOUTS[servers[0]]
    return next(layout for layout in first if all(layout in _LAYOUTS[server] for server in servers))


def check_serving(folder: str | Path, server: Server, together: tuple[Server, ...] = ()) -> Readiness:
    """Hold a checkpoint folder against what a server needs; names and small files are read, no weights.

    Args:
        folder: the checkpoint.
        server: which one.
        together: all servers that shall read the folder, so that a remedy helps them all; () for this one alone.

    Raises:
        UsageError: an unknown server.
        CheckpointError: the folder is not an InternVL checkpoint, or a file in it is malformed.
        ConfigError: its config asks for what InternVL does not do.
    """
    together = together or (server,)
    layout_for((server, *together))
    folder = Path(folder)
    with CheckpointReader(folder) as reader:
        config = reader.config
        if not is_internvl(config):
            raise CheckpointError(
                f"{folder} is not an InternVL checkpoint: a language model alone needs no rules of these"
            )
        layout = detect_layout(config, reader.keys())
    original = layout == "original"
    public = (InternVLPublicConfig.from_original if original else InternVLPublicConfig.from_hf)(config)
    found = [*_layout(server, layout, together), *_decoder(server, config, public, layout)]
    if layout != "text":
        policy = read_tile_policy(folder, public, layout)
        found += _words(folder, public, layout, server)
        found += _processors(folder) if layout != "original" else _python(folder, config, server, together)
        if layout in _LAYOUTS[server]:
            found += _pictures(server, layout, public, policy)
            found += _encoder(server, layout, config, public)
    return Readiness(server=server, layout=layout, findings=tuple(found))


def _layout(server: Server, layout: str, together: tuple[Server, ...]) -> Iterator[Finding]:
    if layout in _LAYOUTS[server]:
        yield Finding("ok", f"the {layout} layout")
        return
    yield Finding(
        "refused",
        f"{server} has no class that reads the names of the {layout} layout",
        f"chiasm convert --to {layout_for(together)}",
    )


def _decoder(
    server: Server, config: dict[str, Any], public: InternVLPublicConfig, layout: str
) -> Iterator[Finding]:
    section = config.get("llm_config" if layout == "original" else "text_config") or {}
    names = section.get("architectures")
    family = public.language_config().family
    if family not in _DECODERS[server]:
        yield Finding(
            "refused", f"{server} has no InternVL on {family}", f"it has {', '.join(_DECODERS[server])}"
        )
    elif not (isinstance(names, list) and names and isinstance(names[0], str)):
        yield Finding(
            "missing", "the language config has no list of architectures", "chiasm convert writes one"
        )
    else:
        yield Finding("ok", f"decoder {names[0]}")


def _words(folder: Path, public: InternVLPublicConfig, layout: str, server: Server) -> Iterator[Finding]:
    """Tokenizer, chat template and end of an answer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        yield Finding(
            "missing", "there is no tokenizer", "copy the release's tokenizer files, then convert again"
        )
    else:
        yield Finding("ok", "tokenizer files")
    known = added_tokens(folder)
    lost = [token for token in _IMAGE_TOKENS if token not in known]
    if lost:
        yield Finding(
            "missing", f"the tokenizer has no token {lost[0]}", "add InternVL's special tokens to it"
        )
    if layout != "original":
        path = folder / TOKENIZER_CONFIG
        named = read_json(path).get("extra_special_tokens") if path.is_file() else None
        if not (isinstance(named, dict) and "context_image_token" in named):
            yield Finding(
                "missing",
                f"{TOKENIZER_CONFIG} does not name context_image_token, which the processor asks for",
                "chiasm convert from the original layout writes it",
            )
    if server == "sglang":
        yield Finding("ok", "chat template: the server's own internvl-2-5")
    elif has_template(folder):
        yield Finding("ok", "chat template")
    else:
        yield Finding("missing", "there is no chat template", _template_remedy(public))
    yield _end(folder, public, known)


def _template_remedy(public: InternVLPublicConfig) -> str:
    """What brings a chat template: converting does where the config names one that can be written."""
    template = TEMPLATES.get(public.template or "internvl2_5")
    if template is not None and not template.by_exchange:
        return "chiasm convert writes one"
    known = ", ".join(name for name, one in TEMPLATES.items() if not one.by_exchange)
    return f"chiasm convert --template NAME writes one (config.json names {public.template!r}; NAME is of {known})"


def _end(folder: Path, public: InternVLPublicConfig, known: dict[str, int]) -> Finding:
    """Whether an answer ends where the chat format ends it."""
    template = TEMPLATES.get(public.template or "internvl2_5")
    if template is None:
        return Finding(
            "differs",
            f"config.json names the chat template {public.template!r}, which is not known: nothing says what ends an "
            "answer",
            _template_remedy(public),
        )
    stop = known.get(template.stop)
    if stop is None:
        return Finding(
            "differs",
            f"the chat template {template.name} ends answers with {template.stop!r}, which is none of the tokenizer's "
            "added tokens",
            "chiasm convert --template NAME notes the template that the model was trained with",
        )
    path = folder / GENERATION
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    if stop not in (ends if isinstance(ends, list) else [ends]):
        return Finding(
            "differs",
            f"{GENERATION} does not end answers at {template.stop!r} ({stop})",
            "chiasm convert writes it",
        )
    return Finding("ok", "answers end at the chat's stop token")


def _processors(folder: Path) -> Iterator[Finding]:
    there = [name for name in (IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR) if (folder / name).is_file()]
    nested = read_json(folder / PROCESSOR) if PROCESSOR in there else {}
    for name, key in ((IMAGE_PROCESSOR, "image_processor"), (VIDEO_PROCESSOR, "video_processor")):
        if name not in there and not isinstance(nested.get(key), dict):
            yield Finding(
                "missing", f"there is no {name}", "chiasm convert from the original layout writes it"
            )
    if "image_seq_length" not in nested:
        yield Finding(
            "differs", f"{PROCESSOR} has no image_seq_length: 256 is taken", "chiasm convert writes it"
        )
    if there:
        yield Finding("ok", f"processor files {', '.join(there)}")


def _python(
    folder: Path, config: dict[str, Any], server: Server, together: tuple[Server, ...]
) -> Iterator[Finding]:
    """The files that `auto_map` names for the config; SGLang has classes of its own."""
    if server == "sglang":
        yield Finding("ok", "no Python files needed: the server has its own config classes")
        return
    auto_map = config.get("auto_map")
    named = auto_map.get("AutoConfig") if isinstance(auto_map, dict) else None
    module = str(named).partition(".")[0] + ".py" if isinstance(named, str) else None
    if module is None or not (folder / module).is_file():
        yield Finding(
            "missing",
            f"{server} reads the original layout with the release's own Python files, and {module or 'auto_map'} is "
            "not here",
            "copy the release's *.py files beside config.json (they are run)"
            + (
                ""
                if layout_for(together) == "original"
                else f", or chiasm convert --to {layout_for(together)}"
            ),
        )
    else:
        yield Finding("ok", f"{module}, to be run with --trust-remote-code")


def _pictures(
    server: Server, layout: str, public: InternVLPublicConfig, policy: TilePolicy
) -> Iterator[Finding]:
    """Tile counts and normalisation."""
    if public.pad2square:
        yield Finding("differs", f"{server} does not pad pictures to a square; the model does")
    imagenet = NORMALIZATIONS["imagenet"]
    if layout == "original" and (tuple(policy.mean), tuple(policy.std)) != imagenet:
        yield Finding(
            "differs", f"{server} normalises by ImageNet's mean and std; the model by others", _HF_REMEDY
        )
    if server == "sglang":
        if public.image_size != _SGLANG_TILE:
            yield Finding(
                "refused", f"sglang cuts tiles of {_SGLANG_TILE} pixels; the model's have {public.image_size}"
            )
        if (
            not policy.dynamic
            or not policy.thumbnail
            or policy.max_tiles != _SGLANG_TILES
            or policy.min_tiles != 1
        ):
            yield Finding(
                "differs",
                f"sglang cuts every picture into 1 to {_SGLANG_TILES} tiles with a thumbnail, whatever the config says",
                "send max_dynamic_patch with each request",
            )
        if (public.template or "internvl2_5") != "internvl2_5" or public.system_message is not None:
            yield Finding(
                "differs",
                "sglang speaks its own template internvl-2-5, with the system message of InternVL 2.5",
                "start it with --chat-template",
            )
    elif layout != "original":
        if not policy.thumbnail:
            yield Finding(
                "differs", "the processor of transformers always adds a thumbnail; the model does not"
            )
        if not policy.dynamic:
            yield Finding("differs", "the processor of transformers cuts tiles; the model does not")
    elif public.force_image_size not in (None, public.vision["image_size"]):
        yield Finding(
            "differs",
            f"{server} cuts tiles of the encoder's {public.vision['image_size']} pixels, the model of "
            f"{public.image_size}",
            f"chiasm convert --image-size {public.image_size}",
        )


_HF_REMEDY = "chiasm convert --to hf-old keeps them"


def _encoder(
    server: Server, layout: str, config: dict[str, Any], public: InternVLPublicConfig
) -> Iterator[Finding]:
    if layout != "original":
        return
    if server == "lmdeploy":
        if config.get("force_image_size") is None:
            yield Finding("missing", "config.json has no force_image_size", "chiasm convert writes it")
        if public.ps_version != "v2":
            yield Finding(
                "refused", "lmdeploy's TurboMind engine knows the pixel unshuffle of ps_version 'v2' only"
            )
        if public.select_layer != -1:
            yield Finding(
                "refused",
                f"lmdeploy reads the encoder's last layer only; the model reads {public.select_layer}",
            )
    if server == "sglang" and "norm_type" not in (config.get("vision_config") or {}):
        yield Finding("missing", "vision_config has no norm_type", "chiasm convert writes it")
