"""Adapters: move tensors between a public layout and our parameter names, and load them into a module.

A checkpoint is planned before it is read: the configs give the full list of native parameters with shapes
(`entries`), a speller of `original.py` or `hf.py` with the family's names (`language.py`) gives the public names of
each. What the files lack, hold too much
or hold in another shape is therefore known, and refused, before one tensor is read.

Native names: `embedder.vision.*`, `embedder.connect.*`, `embedder.words.weight`, `trunk.*`, `head.weight`; the
decoder's `attn.qkv` stacks the rows of q, k, v and `ffn.gate_up` those of gate and up, so several public tensors may
make one native tensor. Where words are tied there is no `head.weight`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from chiasm.checkpoint.config import InternVLPublicConfig, is_internvl, language_from_public
from chiasm.checkpoint.hf import spell_hf, spell_hf_old, spell_text
from chiasm.checkpoint.language import Names, Speller, interleaved_rows, names_of
from chiasm.checkpoint.lora import open_reader
from chiasm.checkpoint.original import spell_original
from chiasm.checkpoint.store import CheckpointReader
from chiasm.errors import CheckpointError
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.vision.internvit import InternViTConfig

__all__ = [
    "Entry",
    "Layout",
    "OpenedCheckpoint",
    "StateDictAdapter",
    "TableAdapter",
    "Unmapped",
    "adapter_for",
    "count_by_part",
    "detect_layout",
    "entries",
    "load_into",
    "open_checkpoint",
]

Layout = Literal["original", "hf", "hf-old", "text"]

Shape = tuple[int, ...]
Devices = torch.device | str | Callable[[str], torch.device]


@dataclass(frozen=True, slots=True)
class Entry:
    """One native parameter: its name, shape, and the row counts of the pieces it stacks (one piece: not fused)."""

    native: str
    shape: Shape
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmapped:
    """How a checkpoint differs from the plan, by public name."""

    missing: dict[str, Shape] = field(default_factory=dict)
    unexpected: dict[str, Shape] = field(default_factory=dict)
    wrong: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """Name -> (shape that the config gives, shape in the file)."""

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.wrong)

    def __str__(self) -> str:
        """One line: what is wrong, at most five names a kind, with shapes and counts."""
        said = []
        if self.wrong:
            name, (expected, found) = next(iter(self.wrong.items()))
            more = f" and {len(self.wrong) - 1} more" if len(self.wrong) > 1 else ""
            said.append(f"{name} should have shape {expected} by the config, found {found}{more}")
        if self.missing:
            said.append(f"missing {_listed(self.missing)}")
        if self.unexpected:
            said.append(f"unexpected {_listed(self.unexpected)}")
        return "; ".join(said) or "every tensor is mapped"


@runtime_checkable
class StateDictAdapter(Protocol):
    """Between the tensors of a public layout and native parameters."""

    def from_public(
        self,
        reader: CheckpointReader,
        *,
        dtype: torch.dtype | None = None,
        device: Devices = "cpu",
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (native name, tensor); each tensor is the caller's own, not a view of the file."""
        ...

    def to_public(
        self, native: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (public name, tensor); tensors are views of the native ones."""
        ...

    def unmapped(self, reader: CheckpointReader) -> Unmapped:
        """What the checkpoint lacks, holds beyond the plan, or holds in another shape."""
        ...


def count_by_part(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Parameters by part from (native name, numbers in it); what is neither encoder nor projector is language."""
    counts = {"vision": 0, "projector": 0, "language": 0}
    parts = {"embedder.vision.": "vision", "embedder.connect.": "projector"}
    for name, size in sizes:
        counts[next((part for prefix, part in parts.items() if name.startswith(prefix)), "language")] += size
    return counts


def entries(
    *,
    language: LanguageConfig,
    vision: InternViTConfig | None = None,
    downsample_ratio: float = 0.5,
) -> tuple[Entry, ...]:
    """The native parameters of a model, in the order in which they are read and written.

    Args:
        language: the decoder; ``tie_words`` leaves out ``head.weight``.
        vision: the encoder, or None for a language model alone (then there is no projector either).
        downsample_ratio: of the pixel unshuffle, which sets the projector's input width.
    """
    plan: list[Entry] = []
    if vision is not None:
        plan += _vision_entries(vision)
        stacked = vision.hidden_size * round(1 / downsample_ratio) ** 2
        plan += _connect_entries(stacked, language.hidden_size)
    return tuple(plan + _language_entries(language))


def _vision_entries(c: InternViTConfig) -> list[Entry]:
    width, inner = c.hidden_size, c.intermediate_size
    plan = {
        "class_embedding": (1, 1, width),
        "patch_embedding.weight": (width, c.channels, c.patch_size, c.patch_size),
        "patch_embedding.bias": (width,),
        "position_embedding": (1, 1 + c.tokens, width),
    }
    block: dict[str, Shape] = {}
    for norm in ("norm1", "norm2"):
        block[f"{norm}.weight"] = (width,)
        if c.norm == "layer_norm":
            block[f"{norm}.bias"] = (width,)
    block["attn.qkv.weight"] = (3 * width, width)
    if c.qkv_bias:
        block["attn.qkv.bias"] = (3 * width,)
    if c.qk_norm:
        block |= {"attn.q_norm.weight": (width,), "attn.k_norm.weight": (width,)}
    block |= {
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
        "ls1": (width,),
        "ls2": (width,),
    }
    for i in range(c.layers):
        plan |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    return [
        Entry(f"embedder.vision.{name}", shape, (width,) * 3 if ".attn.qkv." in name else shape[:1])
        for name, shape in plan.items()
    ]


def _connect_entries(stacked: int, width: int) -> list[Entry]:
    plan = {
        "norm.weight": (stacked,),
        "norm.bias": (stacked,),
        "fc1.weight": (width, stacked),
        "fc1.bias": (width,),
        "fc2.weight": (width, width),
        "fc2.bias": (width,),
    }
    return [Entry(f"embedder.connect.{name}", shape, shape[:1]) for name, shape in plan.items()]


def _language_entries(c: LanguageConfig) -> list[Entry]:
    width, inner = c.hidden_size, c.intermediate_size
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    table = (c.vocab_size, width)
    plan = [Entry("embedder.words.weight", table, table[:1])]
    for i in range(c.layers):
        base = f"trunk.layers.{i}."
        plan += [
            Entry(f"{base}norm1.weight", (width,), (width,)),
            Entry(f"{base}attn.qkv.weight", (q + 2 * kv, width), (q, kv, kv)),
            *([Entry(f"{base}attn.qkv.bias", (q + 2 * kv,), (q, kv, kv))] if c.qkv_bias else []),
            *(
                [Entry(f"{base}attn.qk_norm.weight", (2 * c.head_dim,), (c.head_dim,) * 2)]
                if c.qk_norm
                else []
            ),
            Entry(f"{base}attn.out.weight", (width, q), (width,)),
            Entry(f"{base}norm2.weight", (width,), (width,)),
            Entry(f"{base}ffn.gate_up.weight", (2 * inner, width), (inner, inner)),
            Entry(f"{base}ffn.down.weight", (width, inner), (width,)),
        ]
    plan.append(Entry("trunk.norm.weight", (width,), (width,)))
    return plan if c.tie_words else [*plan, Entry("head.weight", table, table[:1])]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableAdapter:
    """The adapter of a layout: a plan of native parameters and the public names of each.

    Attributes:
        layout: name of the layout.
        plan: native parameters with shapes.
        spell: native name -> public names, whose rows are stacked in that order.
        head_copy: where words are tied, write the output matrix all the same (the original layout forces it).
        ignored: public names that a file may hold though they are no parameters of the model.
        qkv_rows: public order of the decoder's q|k|v rows, where it is another: public == native[qkv_rows].
    """

    layout: Layout
    plan: tuple[Entry, ...]
    spell: Speller
    head_copy: bool = False
    ignored: frozenset[str] = frozenset()
    qkv_rows: Tensor | None = None

    def pieces(self, entry: Entry) -> list[tuple[str, Shape]]:
        """Public names and shapes that make one native tensor."""
        names = self.spell(entry.native)
        if len(names) == 1:
            return [(names[0], entry.shape)]
        return [(name, (rows, *entry.shape[1:])) for name, rows in zip(names, entry.rows, strict=True)]

    def unmapped(self, reader: CheckpointReader) -> Unmapped:
        """Compare names and shapes with the plan; reads headers only.

        A copy of the word table beside tied words, and position buffers of old releases, are no difference.
        """
        expected = {name: shape for entry in self.plan for name, shape in self.pieces(entry)}
        found = {key: reader.shape(key) for key in reader}
        return Unmapped(
            missing={name: shape for name, shape in expected.items() if name not in found},
            unexpected={
                key: shape for key, shape in found.items() if key not in expected and not self._ignores(key)
            },
            wrong={
                name: (shape, found[name])
                for name, shape in expected.items()
                if name in found and found[name] != shape
            },
        )

    def from_public(
        self,
        reader: CheckpointReader,
        *,
        dtype: torch.dtype | None = None,
        device: Devices = "cpu",
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (native name, tensor) in the order of the plan.

        Each tensor is allocated at its final size, dtype and device, and the mapped pieces are copied into it. So
        fusing and casting need no second copy, and nothing yielded keeps pages of the file.

        Args:
            reader: the checkpoint.
            dtype: of floating tensors; None keeps each tensor's own.
            device: where they go: one for all, or a function of the native name.

        Raises:
            CheckpointError: names or shapes do not fit the plan (said before the first tensor), or reading fails.
        """
        self.check(reader)
        for entry in self.plan:
            there = device(entry.native) if callable(device) else device
            yield entry.native, self.read(reader, entry, dtype=dtype, device=there)

    def read(
        self,
        reader: CheckpointReader,
        entry: Entry,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """One native tensor of the plan; arguments as of `from_public`, which checks the whole first."""
        pieces = [name for name, _ in self.pieces(entry)]
        stored = functools.reduce(torch.promote_types, map(reader.dtype, pieces))
        kind = dtype if dtype is not None and stored.is_floating_point else stored
        out = torch.empty(entry.shape, dtype=kind, device=device)
        at = 0
        for name in pieces:
            piece = reader.tensor(name)
            if self._reordered(entry.native):
                piece = piece[torch.argsort(self.qkv_rows)]  # type: ignore[arg-type]
            out[at : at + piece.shape[0]].copy_(piece)
            at += piece.shape[0]
            del piece
        return out

    def check(self, reader: CheckpointReader) -> None:
        """Raise CheckpointError, with names and shapes, unless every tensor is mapped."""
        difference = self.unmapped(reader)
        if not difference:
            return
        remedy = "is it the checkpoint of this config.json?"
        if any(".lora_" in key or "base_model.model." in key for key in difference.unexpected):
            remedy = "these are adapter weights of a kind that is not read: merge them into the model first"
        raise CheckpointError(f"{reader.folder} does not fit its config: {difference}; {remedy}")

    def to_public(
        self, native: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (public name, tensor) as native tensors arrive, in their order; pieces are views, save reordered ones.

        Args:
            native: the parameters of the plan, each once. Where words are tied, ``head.weight`` may come along and
                is not written twice.

        Raises:
            CheckpointError: a name is not of the plan, a shape differs, or at the end a name has not come.
        """
        pending = {entry.native: entry for entry in self.plan}
        tied = "head.weight" not in pending
        pairs: Iterable[tuple[str, Tensor]] = native.items() if isinstance(native, Mapping) else native  # type: ignore[assignment]
        for name, tensor in pairs:
            if name == "head.weight" and tied:
                continue
            entry = pending.pop(name, None)
            if entry is None:
                raise CheckpointError(
                    f"{name} {tuple(tensor.shape)} has no place in the {self.layout} layout"
                )
            if tuple(tensor.shape) != entry.shape:
                raise CheckpointError(
                    f"{name} should have shape {entry.shape} by the config, found {tuple(tensor.shape)}"
                )
            if self._reordered(name):
                tensor = tensor[self.qkv_rows]
            at = 0
            for public, shape in self.pieces(entry):
                yield public, tensor[at : at + shape[0]]
                at += shape[0]
            if name == "embedder.words.weight" and tied and self.head_copy:
                yield self.spell("head.weight")[0], tensor
        if pending:
            left = {name: entry.shape for name, entry in pending.items()}
            raise CheckpointError(f"cannot write the {self.layout} layout: missing {_listed(left)}")

    def _reordered(self, native: str) -> bool:
        return (
            self.qkv_rows is not None and native.startswith("trunk.") and native.endswith(".attn.qkv.weight")
        )

    def _ignores(self, key: str) -> bool:
        return key in self.ignored or key.endswith((".rotary_emb.inv_freq", ".position_ids"))


_SPELLERS: dict[str, Callable[[str, Names], tuple[str, ...]]] = {
    "original": spell_original,
    "hf": spell_hf,
    "hf-old": spell_hf_old,
    "text": spell_text,
}


def _speller(layout: str, family: str) -> Speller:
    names = names_of(family, of_transformers=layout in ("hf", "hf-old"))
    return lambda native: _SPELLERS[layout](native, names)


def adapter_for(
    layout: Layout,
    *,
    language: LanguageConfig,
    vision: InternViTConfig | None = None,
    downsample_ratio: float = 0.5,
) -> TableAdapter:
    """The adapter of a layout for a model of these sizes.

    Raises:
        CheckpointError: the layout is unknown, does not go with or without an encoder, or has no words for the family.
    """
    if layout not in _SPELLERS:
        raise CheckpointError(f"unknown checkpoint layout {layout!r}: use one of {', '.join(_SPELLERS)}")
    if (layout == "text") != (vision is None):
        raise CheckpointError(
            f"the {layout} layout {'has no' if layout == 'text' else 'needs a'} vision encoder"
        )
    if layout in ("hf", "hf-old") and language.family == "phi3":
        raise CheckpointError(
            f"the {layout} layout has no port of InternVL on Phi-3: such a model exists in the original layout only"
        )
    spell = _speller(layout, language.family)
    own = names_of(language.family, of_transformers=layout in ("hf", "hf-old"))
    return TableAdapter(
        layout=layout,
        plan=entries(language=language, vision=vision, downsample_ratio=downsample_ratio),
        spell=spell,
        head_copy=layout == "original",
        ignored=frozenset(spell("head.weight")) if language.tie_words else frozenset(),
        qkv_rows=interleaved_rows(language) if own.interleaved else None,
    )


_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hf", ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.")),
    ("hf-old", ("vision_tower.", "multi_modal_projector.")),
    ("original", ("vision_model.", "mlp1.")),
    ("text", ("model.embed_tokens.", "model.tok_embeddings.", "model.layers.", "model.norm.")),
)


def detect_layout(config: Mapping[str, Any], keys: Iterable[str]) -> Layout:
    """Tell the layout from the tensors' names, and hold it against the config.

    Args:
        config: content of ``config.json``.
        keys: names of the tensors.

    Raises:
        CheckpointError: the names belong to no known layout, to several, or to another one than the config.
    """
    names = list(keys)
    found = [layout for layout, marks in _MARKS if any(name.startswith(marks) for name in names)]
    if not found:
        some = ", ".join(names[:3]) or "none"
        raise CheckpointError(
            f"the tensors' names are of no known layout (original, hf, hf-old, text): {some}"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"the tensors' names mix the layouts {' and '.join(found)}: download the files again"
        )
    layout: Layout = found[0]  # type: ignore[assignment]
    kind = config.get("model_type")
    if "llm_config" in config or kind == "internvl_chat":
        expected, said = ("original",), "InternVLChatModel"
    elif is_internvl(config):
        expected, said = ("hf", "hf-old"), "transformers' InternVL"
    elif "vision_config" in config:
        raise CheckpointError(f"config.json describes a {kind!r} model: only InternVL has pictures here")
    else:
        expected, said = ("text",), f"a {kind} language model"
    if layout not in expected:
        raise CheckpointError(
            f"config.json describes {said}, the tensors are named as in the {layout} layout: "
            "take both from the same release"
        )
    return layout


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedCheckpoint:
    """A checkpoint folder, understood.

    Attributes:
        reader: its tensors.
        layout: how they are named.
        adapter: from those names to native ones and back.
        language: the decoder; ``tie_words`` is settled by what the files hold.
        vision: the encoder; None for a language model alone.
        public: the whole public config; None for a language model alone.
    """

    reader: CheckpointReader
    layout: Layout
    adapter: TableAdapter
    language: LanguageConfig
    vision: InternViTConfig | None = None
    public: InternVLPublicConfig | None = None


def open_checkpoint(folder: str | Path) -> OpenedCheckpoint:
    """Read config and headers of a checkpoint folder of any known layout; no tensor is read.

    Words are tied when the output matrix is absent, or when the config ties them and the matrix equals the table;
    an original checkpoint with an output matrix is untied. LoRA adapters that the training script of the release has
    saved are merged when their tensors are read.

    Raises:
        CheckpointError: what `open_reader` and `detect_layout` raise, or the output matrix is missing while
            the config denies tying.
        ConfigError: the config asks for what is not supported.
    """
    reader = open_reader(folder)
    layout = detect_layout(reader.config, reader.keys())
    if layout == "text":
        language = language_from_public(reader.config)
        spell = _speller(layout, language.family)
        tied = _is_tied(reader, spell, claimed=language.tie_words, forced_apart=False)
        language = language_from_public(reader.config, tie_words=tied)
        return OpenedCheckpoint(
            reader=reader, layout=layout, adapter=adapter_for(layout, language=language), language=language
        )
    original = layout == "original"
    public = (InternVLPublicConfig.from_original if original else InternVLPublicConfig.from_hf)(reader.config)
    spell = _speller(layout, public.language_config().family)
    tied = _is_tied(reader, spell, claimed=public.tie_words, forced_apart=original)
    language, vision = public.language_config(tie_words=tied), public.vision_config()
    adapter = adapter_for(layout, language=language, vision=vision, downsample_ratio=public.downsample_ratio)
    return OpenedCheckpoint(
        reader=reader, layout=layout, adapter=adapter, language=language, vision=vision, public=public
    )


def _is_tied(reader: CheckpointReader, spell: Speller, *, claimed: bool, forced_apart: bool) -> bool:
    (head,), (words,) = spell("head.weight"), spell("embedder.words.weight")
    if head not in reader:
        return claimed  # if not claimed, the adapter reports the matrix as missing
    if forced_apart or not claimed or words not in reader or reader.shape(head) != reader.shape(words):
        return False
    a, b = reader.tensor(head), reader.tensor(words)
    # Bit patterns, so that a table with NaN equals its copy; by rows, so that little memory is touched at a time.
    step = max(1, (1 << 24) // max(1, a[0].numel() * a.element_size())) if len(a) else 1
    return a.dtype == b.dtype and all(
        torch.equal(a[i : i + step].view(torch.uint8), b[i : i + step].view(torch.uint8))
        for i in range(0, len(a), step)
    )


def load_into(
    module: nn.Module,
    reader: CheckpointReader,
    adapter: StateDictAdapter,
    *,
    dtype: torch.dtype | None = None,
    device: Devices = "cpu",
    loaded: Callable[[str, nn.Module], None] | None = None,
) -> nn.Module:
    """Load a checkpoint into a module that was built on the meta device (or anywhere: its tensors are replaced).

    Peak anonymous memory is that of the weights in ``dtype``: each parameter is allocated once and filled from the
    mapped file. Copying is deliberate. Parameters left as views of the file would start faster, but their pages
    would be read again under memory pressure, would change with the file, and a file cut short would kill the process.

    Args:
        module: its parameters are named natively; parameters that are one object stay one object.
        reader: the checkpoint.
        adapter: from the checkpoint's names to the module's.
        dtype: of floating parameters; None keeps what is stored.
        device: where they go: one for all, or a function of the parameter's name.
        loaded: told the path of every submodule as soon as all of its own parameters are there, and may replace it
            (so that weights can be rounded while the next ones are still in the file).

    Returns:
        The module.

    Raises:
        CheckpointError: the checkpoint does not fit its config, or the module does not fit the checkpoint.
    """
    places = _places(module)
    left = {name: tuple(owner.get_parameter(leaf).shape) for name, (owner, leaf) in places.items()}
    known = frozenset(places)
    by_id: dict[int, list[str]] = {}
    for name, (owner, leaf) in places.items():
        by_id.setdefault(id(owner._parameters[leaf]), []).append(name)
    aliases = {name: names for names in by_id.values() for name in names}
    stray: dict[str, Shape] = {}
    for name, tensor in adapter.from_public(reader, dtype=dtype, device=device):
        if name not in known:
            stray[name] = tuple(tensor.shape)
            continue
        if name not in left:  # a second name of a parameter that is already loaded
            continue
        if left[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} of the model has shape {left[name]}, the checkpoint {reader.folder} has {tuple(tensor.shape)}"
            )
        owner, leaf = places[name]
        old = owner._parameters[leaf]
        new = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)
        for alias in aliases[name]:
            owner, leaf = places[alias]
            owner._parameters[leaf] = new
            del left[alias]
        del tensor, new, old
        for alias in aliases[name]:
            path = alias.rpartition(".")[0]
            owner = places[alias][0]
            own = [f"{path}.{leaf}" if path else leaf for leaf in owner._parameters]
            if loaded is not None and not any(part in left for part in own):
                for part in own:  # what `loaded` may replace must not be kept alive from here
                    places.pop(part, None)
                loaded(path, owner)
        del owner
    if left or stray:
        said = [f"it lacks {_listed(left)}"] if left else []
        said += [f"the model has no place for {_listed(stray)}"] if stray else []
        raise CheckpointError(f"checkpoint {reader.folder} does not fit the model: {'; '.join(said)}")
    _no_meta_buffers(module)
    return module


def _places(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Full name of every parameter, shared ones under each of their names -> (owner, attribute)."""
    return {
        f"{path}.{leaf}" if path else leaf: (owner, leaf)
        for path, owner in module.named_modules(remove_duplicate=False)
        for leaf, parameter in owner._parameters.items()
        if parameter is not None
    }


def _no_meta_buffers(module: nn.Module) -> None:
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left:
        raise CheckpointError(
            f"buffer {left[0]} is still on the meta device and no checkpoint holds it: compute it on first use"
        )


def _listed(shapes: Mapping[str, Shape], limit: int = 5) -> str:
    shown: Sequence[str] = [f"{name} {shape}" for name, shape in list(shapes.items())[:limit]]
    more = f", … ({len(shapes)} in all)" if len(shapes) > limit else ""
    return ", ".join(shown) + more
