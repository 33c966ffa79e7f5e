"""The released PVC-InternVL2-8B: find out what its tensors are, say what is not known, and never load half a model.

The names of the release's new modules are in no source that could be read (fact sheet PVC, section 2.5). So nothing is
taken for granted: what InternVL 2 has is known by name and shape; all else is listed with its shape and, where name and
shape allow one, a guess at what it is in our model. A conversion needs a place for every tensor. Who has looked at the
release's code confirms the guesses (``accept_guesses``) or says the names (``names``).

``names`` maps public to native names, with ``{i}`` for the number of a layer::

    {"vision_model.encoder.layers.{i}.t_attn.qkv.weight": "embedder.vision.layers.{i}.temporal.qkv.weight",
     "vision_model.encoder.layers.{i}.t_attn.q.weight": "embedder.vision.layers.{i}.temporal.qkv.weight:q",
     "vision_model.rotary": ""}

``:q``, ``:k`` and ``:v`` are thirds of a fused matrix, "" leaves a tensor out on purpose.

Shape legend: C width of the encoder, I width of the projector's input, E width of a time embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiasm.checkpoint.adapters import OpenedCheckpoint, adapter_for
from chiasm.checkpoint.config import InternVLPublicConfig
from chiasm.checkpoint.convert import ConvertReport, companion_files
from chiasm.checkpoint.edit import check_apart
from chiasm.checkpoint.lora import open_reader
from chiasm.checkpoint.preprocess import read_tile_policy
from chiasm.checkpoint.store import CheckpointReader
from chiasm.errors import CheckpointError, ConfigError
from chiasm.parts.vision.progressive import TemporalConfig
from chiasm.systems.pvc.config import PVCConfig
from chiasm.systems.pvc.convert import PVCOptions, config_of, is_pvc, new_entries, write_pvc

__all__ = ["Discovery", "Finding", "convert_release", "discover", "options_of"]

Shape = tuple[int, ...]
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..+)")
_THIRDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One tensor of the release that InternVL does not have.

    Attributes:
        key: its name. shape: its shape.
        native: what it is in our model; "" leaves it out, None: unknown.
        why: in a few words.
        sure: said by the user, not guessed.
    """

    key: str
    shape: Shape
    native: str | None = None
    why: str = ""
    sure: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What a released checkpoint holds.

    Attributes:
        config: the model as far as shapes tell and the options say; None where no such model can be.
        problem: why there is none.
        known: tensors that InternVL has, too. missing: those that are absent: name -> shape.
        findings: all others, in order.
        lacking: native parameters of our model that nothing is for: name -> shape.
        wrong: public name -> (shape of our parameter, shape found).
    """

    config: PVCConfig | None
    problem: str
    known: tuple[str, ...]
    missing: dict[str, Shape]
    findings: tuple[Finding, ...]
    lacking: dict[str, Shape]
    wrong: dict[str, tuple[Shape, Shape]]

    @property
    def guessed(self) -> tuple[Finding, ...]:
        """Findings that name and shape suggest."""
        return tuple(f for f in self.findings if f.native is not None and not f.sure)

    @property
    def unknown(self) -> tuple[Finding, ...]:
        """Findings that nothing is known of."""
        return tuple(f for f in self.findings if f.native is None)

    @property
    def whole(self) -> bool:
        """Whether every tensor has a place and every place a tensor, guesses counted in."""
        return self.config is not None and not (self.missing or self.unknown or self.lacking or self.wrong)

    def lines(self) -> list[str]:
        """The report: one line a kind of tensor, layers folded together."""
        out = [f"{len(self.known)} tensors are those of an InternVL"]
        for name, shape in self.missing.items():
            out.append(f"missing   {name} {list(shape)}")
        for key, layers, finding in _folded(self.findings):
            what = "unknown" if finding.native is None else "named" if finding.sure else "guess"
            where = "left out" if finding.native == "" else _general(finding.native or "?")
            many = f" (layers {layers})" if layers else ""
            out.append(f"{what:9} {key} {list(finding.shape)}{many} -> {where}; {finding.why}")
        for name, shape in self.lacking.items():
            out.append(f"lacking   {name} {list(shape)}: nothing found is it")
        for key, (wanted, found) in self.wrong.items():
            out.append(f"shape     {key} has {list(found)}, our parameter {list(wanted)}")
        if self.problem:
            out.append(f"no model  {self.problem}")
        return out


def discover(
    src: str | Path, options: PVCOptions | None = None, *, names: Mapping[str, str] | None = None
) -> Discovery:
    """Look at a released PVC without reading a tensor.

    Args:
        src: the folder.
        options: what shapes do not tell; None: as far as they do (layers, widths, gate, conditioning), else defaults.
        names: public -> native names that are known, see the module.

    Raises:
        CheckpointError: the folder cannot be read or is no PVC, or a name of ``names`` is none of the folder.
        ConfigError: its config is none of a model.
    """
    with open_reader(src) as reader:
        return _look(reader, options, names or {})[0]


def options_of(config: PVCConfig) -> PVCOptions:
    """The options that a config came of."""
    return PVCOptions(
        temporal=config.temporal,
        tokens=config.tokens_per_tile,
        repeats=config.repeats,
        video_repeats=config.video_repeats,
        repeat_order=config.repeat_order,
        frame_tiles=config.frame_tiles,
        views=config.views,
    )


def convert_release(
    src: str | Path,
    dst: str | Path,
    options: PVCOptions | None = None,
    *,
    names: Mapping[str, str] | None = None,
    accept_guesses: bool = False,
    force: bool = False,
) -> ConvertReport:
    """Write a released PVC as a folder that Chiasm reads; all of it, or nothing.

    Args:
        src, options, names: as of `discover`. dst: the folder to write.
        accept_guesses: take what is only guessed for true.
        force: replace ``dst`` if it is a checkpoint folder.

    Raises:
        CheckpointError: a tensor has no place, a place no tensor, or a guess was not accepted; the message says how
            many of each and names the first.
    """
    check_apart(Path(src), Path(dst))
    with open_reader(src) as reader:
        found, public = _look(reader, options, names or {})
        _refuse(found, Path(src), accept_guesses)
        assert found.config is not None
        opened = OpenedCheckpoint(
            reader=reader,
            layout="original",
            adapter=_base(found.config),
            language=found.config.language,
            vision=found.config.vision,
            public=public,
        )
        notes = tuple(f"taken as guessed: {line}" for line in found.lines() if line.startswith("guess"))
        return write_pvc(
            dst,
            _tensors(reader, found),
            found.config,
            public,
            companion_files(opened, public),
            source="pvc-release",
            notes=notes,
            force=force,
        )


def _refuse(found: Discovery, src: Path, accepted: bool) -> None:
    """CheckpointError unless all is known."""
    if found.whole and (accepted or not found.guessed):
        return
    said = [found.problem] if found.problem else []
    for what, those in (
        ("unknown", [f"{f.key} {list(f.shape)}" for f in found.unknown]),
        ("missing", [f"{name} {list(shape)}" for name, shape in found.missing.items()]),
        ("without a tensor", [f"{name} {list(shape)}" for name, shape in found.lacking.items()]),
        ("of another shape", list(found.wrong)),
        ("only guessed", [f"{f.key} {list(f.shape)}" for f in found.guessed if not accepted]),
    ):
        if those:
            said.append(f"{len(those)} {what} (first: {those[0]})")
    raise CheckpointError(
        f"{src} is not converted: {'; '.join(said)}; name the tensors (--names FILE), or confirm guesses "
        "(--accept-guesses)"
    )


# Looking -------------------------------------------------------------------------------------------------------------


def _look(
    reader: CheckpointReader, options: PVCOptions | None, names: Mapping[str, str]
) -> tuple[Discovery, InternVLPublicConfig]:
    stated = reader.config
    if not is_pvc(stated):
        raise CheckpointError(
            f"{reader.folder} is no PVC checkpoint (model_type {stated.get('model_type')!r})"
        )
    public = InternVLPublicConfig.from_original(stated)
    vision, language = public.vision_config(), public.language_config(tie_words=False)
    # 256 tokens or 64: the projector's input says which ratio the config, whose value was not seen, must mean.
    if "mlp1.0.weight" in reader:
        folded = (reader.shape("mlp1.0.weight")[0] / vision.hidden_size) ** 0.5
        if folded >= 1 and folded == int(folded):
            public = replace(public, downsample_ratio=1 / folded)
    base = adapter_for("original", language=language, vision=vision, downsample_ratio=public.downsample_ratio)
    expected = {name: shape for entry in base.plan for name, shape in base.pieces(entry)}
    shapes = {key: reader.shape(key) for key in reader}
    wrong = {
        key: (shape, shapes[key]) for key, shape in expected.items() if key in shapes and shapes[key] != shape
    }
    rest = {
        key: shape
        for key, shape in shapes.items()
        if key not in expected and not key.endswith((".rotary_emb.inv_freq", ".position_ids"))
    }
    stacked = vision.hidden_size * round(1 / public.downsample_ratio) ** 2
    guesses = _guesses(rest, vision.hidden_size, stacked, vision.layers)
    findings = _named(rest, guesses, names, reader.folder)
    config, problem = None, ""
    lacking: dict[str, Shape] = {}
    try:
        chosen = options or _options(findings, shapes, stated, vision.hidden_size, vision.layers)
        policy = read_tile_policy(reader.folder, public, "original")
        config = config_of(public, policy, chosen, tie_words=False, tokens=public.tokens_per_tile)
        lacking = _compare(findings, config, wrong)
    except ConfigError as error:
        problem = str(error)
    return (
        Discovery(
            config=config,
            problem=problem,
            known=tuple(key for key in expected if key in shapes),
            missing={key: shape for key, shape in expected.items() if key not in shapes},
            findings=findings,
            lacking=lacking,
            wrong=wrong,
        ),
        public,
    )


def _compare(
    findings: tuple[Finding, ...], config: PVCConfig, wrong: dict[str, tuple[Shape, Shape]]
) -> dict[str, Shape]:
    """Parameters of our model that no finding is; shapes that differ are added to `wrong`."""
    places = {entry.native: entry.shape for entry in new_entries(config)}
    filled: dict[str, set[str]] = {}
    for finding in findings:
        if not finding.native:
            continue
        name, _, third = finding.native.partition(":")
        if name not in places:
            wrong[finding.key] = ((), finding.shape)
            continue
        shape = places[name]
        if third:
            shape = (shape[0] // 3, *shape[1:])
        if shape != finding.shape:
            wrong[finding.key] = (shape, finding.shape)
        filled.setdefault(name, set()).add(third)
    whole = ({""}, set(_THIRDS))
    return {name: shape for name, shape in places.items() if filled.get(name) not in whole}


def _named(
    rest: Mapping[str, Shape], guesses: Mapping[str, tuple[str, str]], names: Mapping[str, str], folder: Path
) -> tuple[Finding, ...]:
    """What the user says wins over what is guessed, for the tensor and for the place."""
    used: set[str] = set()
    places: dict[str, str] = {}
    out = []
    for key, shape in rest.items():
        layer = _LAYER.fullmatch(key)
        general = _general(key)
        said = next((name for name in (key, general) if name in names), None)
        if said is not None:
            used.add(said)
            native = names[said].replace("{i}", layer[2] if layer else "{i}")
            if native and native in places:
                raise CheckpointError(
                    f"{places[native]} and {key} are both named {native}: correct the names"
                )
            places[native] = key
            out.append(Finding(key=key, shape=shape, native=native, why="as named", sure=True))
            continue
        native, why = guesses.get(key, (None, "no rule knows this name and shape"))
        out.append(Finding(key=key, shape=shape, native=native, why=why))
    stray = sorted(set(names) - used)
    if stray:
        raise CheckpointError(f"{folder} has no tensor {stray[0]} that InternVL lacks: correct the names")
    return tuple(
        replace(f, native=None, why=f"its likely place is named for {places[f.native]}")
        if not f.sure and f.native and f.native in places
        else f
        for f in out
    )


def _guesses(rest: Mapping[str, Shape], width: int, stacked: int, layers: int) -> dict[str, tuple[str, str]]:
    """Public name -> (native name, why) for those that name and shape suggest; no native name is given twice."""
    found: dict[str, tuple[str, str]] = {}
    for key, shape in rest.items():
        match = _LAYER.fullmatch(key)
        if match and key.startswith("vision_model.") and int(match[2]) < layers:
            guess = _in_layer(match[3][1:].lower(), shape, width)
            if guess is not None:
                found[key] = (f"embedder.vision.layers.{match[2]}.{guess[0]}", guess[1])
            continue
        guess = _outside(key, shape, rest, width, stacked)
        if guess is not None:
            found[key] = guess
    taken: dict[str, list[str]] = {}
    for key, (native, _) in found.items():
        taken.setdefault(native, []).append(key)
    ambiguous = {key for keys in taken.values() if len(keys) > 1 for key in keys}
    return {key: guess for key, guess in found.items() if key not in ambiguous}


def _in_layer(name: str, shape: Shape, width: int) -> tuple[str, str] | None:
    """A tensor of a layer of the encoder: (name within the layer, why)."""
    stem, _, leaf = name.rpartition(".")
    conditions = re.search(r"ada|mod", stem)
    if conditions and leaf in ("weight", "bias"):
        rows = shape[0] // width
        if shape[0] == rows * width and rows > 1:
            return f"modulation.{leaf}", f"{rows} x {width} rows of a modulation"
        return None
    if re.search(r"gate|gamma|alpha|ls\b|ls_|scale", name) and shape in ((width,), (1,)):
        return "gate", "a gain a channel" if shape == (width,) else "one gain"
    if re.search(r"norm|ln", stem) and shape == (width,) and leaf in ("weight", "bias"):
        if re.search(r"[qk]_?norm", stem):
            return (
                f"temporal.{'q' if 'q' in stem.rpartition('.')[2] else 'k'}_norm.{leaf}",
                "a norm of queries or keys",
            )
        return f"norm_t.{leaf}", "a norm of the encoder's width"
    if not re.search(r"attn|attention|mha|temporal|time", stem):
        return None
    last = stem.rpartition(".")[2]
    if last in ("qkv", "in_proj") or leaf in ("in_proj_weight", "in_proj_bias"):
        kind = "bias" if "bias" in leaf else "weight"
        if shape[0] % 3 == 0 and (kind == "bias" or shape[1] == width):
            return f"temporal.qkv.{kind}", "queries, keys and values in one"
    third = re.fullmatch(r"(?:to_)?([qkv])(?:_proj)?", last)
    if third and leaf in ("weight", "bias"):
        return f"temporal.qkv.{leaf}:{third[1]}", "a third of queries, keys and values"
    if re.search(r"proj|out|dense", last) and leaf in ("weight", "bias") and shape[0] == width:
        return f"temporal.proj.{leaf}", "back to the encoder's width"
    return None


def _outside(
    key: str, shape: Shape, rest: Mapping[str, Shape], width: int, stacked: int
) -> tuple[str, str] | None:
    """A tensor outside of the layers: time embeddings, and the modulation of the projector."""
    stem, _, leaf = key.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    low = stem.lower()
    weight = rest.get(f"{stem}.weight", ())
    of_projector = key.startswith("mlp1.") or stacked in weight[:1]
    part = "embedder.connect" if of_projector else "embedder.vision"
    if re.search(r"ada|mod", low) and weight[:1] == (2 * stacked,):
        return f"embedder.connect.modulation.{leaf}", "scale and shift at the width of the projector's input"
    if not re.search(r"time|t_emb|temb|te\b", low) or len(weight) != 2:
        return None
    # Two matrices follow each other: sinusoids to E, and E to E.
    if weight[0] == weight[1]:
        return f"{part}.time.fc2.{leaf}", "the second matrix of a time embedding"
    if weight[1] < weight[0]:
        return f"{part}.time.fc1.{leaf}", f"a time embedding of {weight[1]} sinusoids"
    return None


def _options(
    findings: tuple[Finding, ...],
    shapes: Mapping[str, Shape],
    stated: Mapping[str, Any],
    width: int,
    layers: int,
) -> PVCOptions:
    """What names and shapes tell of the temporal layers.

    Raises:
        ConfigError: they describe nothing that our model can be.
    """
    own: dict[int, dict[str, Shape]] = {}
    outside: dict[str, Shape] = {}
    for finding in findings:
        if not finding.native:
            continue
        match = re.fullmatch(r"embedder\.vision\.layers\.(\d+)\.(.+)", finding.native)
        if match:
            own.setdefault(int(match[1]), {})[match[2]] = finding.shape
        else:
            outside[finding.native] = finding.shape
    if not own:
        raise ConfigError("no tensor of a temporal layer was recognised: name them")
    if sorted(own) != list(range(layers - len(own), layers)):
        raise ConfigError(
            f"temporal layers {sorted(own)} are not the last ones of {layers}: name their tensors"
        )
    layer = own[layers - 1]
    rows = layer.get("modulation.weight", (0,))[0]
    gates: dict[Shape, str] = {(width,): "channel", (1,): "scalar"}
    gate = gates.get(layer.get("gate", ()), "none")
    conditioned: tuple[str, ...] = {
        0: (),
        2: ("temporal",),
        4: ("temporal", "ffn"),
        6: ("spatial", "temporal", "ffn"),
    }.get(rows // width, ("?",))
    if "?" in conditioned and rows // width in (3, 5, 7) and gate == "none":
        conditioned = {3: ("temporal",), 5: ("temporal", "ffn"), 7: ("spatial", "temporal", "ffn")}[
            rows // width
        ]
        gate = "time"
    if "?" in conditioned:
        raise ConfigError(
            f"a modulation of {rows // width} x {width} rows is none of ours (scale and shift of up to three norms, "
            "and one gate): set temporal.conditioned and temporal.gate, or leave its tensors out by name"
        )
    if "embedder.connect.modulation.weight" in outside:
        conditioned = (*conditioned, "compress")
    first = outside.get("embedder.vision.time.fc1.weight", outside.get("embedder.connect.time.fc1.weight"))
    qkv = layer.get("temporal.qkv.weight") or (3 * layer.get("temporal.qkv.weight:q", (width,))[0],)
    temporal = TemporalConfig(
        layers=len(own),
        width=None if qkv[0] == 3 * width else qkv[0] // 3,
        gate=gate,
        conditioned=conditioned,
        conditioning="full",
        time_sines=256 if first is None else first[1],
        time_width=outside.get("embedder.vision.time.fc1.weight", (None,))[0],
        compress_time_width=outside.get("embedder.connect.time.fc1.weight", (None,))[0],
    )
    order = stated.get("tile_repeat_way")
    return PVCOptions(
        temporal=temporal,
        repeats=stated.get("image_repeat_time") or 4,
        video_repeats=stated.get("video_repeat_time") or 1,
        repeat_order="repeat" if isinstance(order, str) and "repeat" in order.lower() else "tile",
    )


# Writing -------------------------------------------------------------------------------------------------------------


def _base(config: PVCConfig) -> Any:
    return adapter_for(
        "original", language=config.language, vision=config.vision, downsample_ratio=config.downsample
    )


def _tensors(reader: CheckpointReader, found: Discovery) -> Iterator[tuple[str, Tensor]]:
    """Native tensors: those of an InternVL, then the findings, thirds put together."""
    assert found.config is not None
    base = _base(found.config)
    for entry in base.plan:
        yield entry.native, base.read(reader, entry)
    pieces: dict[str, dict[str, str]] = {}
    for finding in found.findings:
        if finding.native:
            name, _, third = finding.native.partition(":")
            pieces.setdefault(name, {})[third] = finding.key
    for name, keys in pieces.items():
        ordered = [keys[third] for third in sorted(keys, key=lambda t: _THIRDS.get(t, 0))]
        read = [reader.tensor(key) for key in ordered]
        yield name, read[0].clone() if len(read) == 1 else torch.cat(read)


def _general(name: str) -> str:
    """A name with ``{i}`` for the number of its layer."""
    match = _LAYER.fullmatch(name)
    return f"{match[1]}{{i}}{match[3]}" if match else name


def _folded(findings: tuple[Finding, ...]) -> list[tuple[str, str, Finding]]:
    """General name, shape and place -> (layers that have it so, one of them)."""
    out: dict[tuple[str, Shape, str | None], tuple[list[int], Finding]] = {}
    for finding in findings:
        match = _LAYER.fullmatch(finding.key)
        place = finding.native and _general(finding.native)
        layers, _ = out.setdefault((_general(finding.key), finding.shape, place), ([], finding))
        if match:
            layers.append(int(match[2]))
    return [(key, _runs(sorted(layers)), finding) for (key, *_), (layers, finding) in out.items()]


def _runs(numbers: list[int]) -> str:
    """Rising numbers as ranges: 0-3, 7."""
    out: list[list[int]] = []
    for n in numbers:
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in out)
