"""InternVL: tiles -> InternViT -> pixel unshuffle -> MLP -> language model.

Source: InternVL 2.5 (2412.05271, section 2); 1.5 (2404.16821) for tiling and unshuffle.
Legend: N tiles, P patches of a tile, K tokens of a tile, S tile side in pixels, T rows, C language width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chiasm.data.sequence import Sequence
from chiasm.errors import UsageError
from chiasm.media.pixels import normalize
from chiasm.media.tiles import TilePolicy
from chiasm.model.causal import CausalVLM
from chiasm.parts.compress.unshuffle import Unshuffle
from chiasm.parts.connect.projector import Projector
from chiasm.parts.contracts import Embedded, ModelCache
from chiasm.parts.embed import FeatureCache, WordTable, encode_spans, overwrite_rows
from chiasm.parts.heads.text import TextHead
from chiasm.parts.language.config import LanguageConfig
from chiasm.parts.language.decoder import build_decoder, init_decoder
from chiasm.parts.vision.internvit import InternViT
from chiasm.systems.internvl.config import InternVLConfig


class InternVLEmbedder(nn.Module):
    """Words from the table, rows of images and of video frames from the encoder, to which both are the same.

    `features`, when set, remembers encoded images by content (inference only).
    `lockstep`, when set, encodes exactly once in every pass, be it a blank tile that counts nothing: processes that
    share the encoder's weights must run its layers equally often, also where no gradient is wanted (the guard's search
    for culprits, each process in micro-batches of its own).
    `kept`, when set, remembers what a frozen encoder saw between training steps; the projector still learns.
    """

    lockstep: bool = False
    kept: FeatureCache | None = None

    def __init__(
        self,
        words: WordTable,
        vision: InternViT,
        compress: Unshuffle,
        connect: Projector,
        policy: TilePolicy,
        *,
        select_layer: int = -1,
    ) -> None:
        super().__init__()
        self.words, self.vision, self.compress, self.connect = words, vision, compress, connect
        self.policy, self.select_layer = policy, select_layer
        self.features: FeatureCache | None = None

    def encode(self, tiles_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 tiles -> (N, K, C) tokens."""
        weight = self.vision.patch_embedding.weight
        return self.project(normalize(tiles_N3SS.to(weight.device), self.policy, dtype=weight.dtype))

    def project(self, pixels_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) normalised pixels -> (N, K, C) tokens. The class token is dropped before unshuffling."""
        return self.connect(self._see(pixels_N3SS))

    def _see(self, pixels_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) normalised pixels -> (N, K, C') tokens as the projector takes them."""
        return self.compress(self.vision(pixels_N3SS, select_layer=self.select_layer)[:, 1:])

    def forward(self, sequence: Sequence, cache: ModelCache | None = None) -> Embedded:
        """(T,) positions -> (T, C) rows."""
        x_TC = self.words(sequence.ids_T)
        if self.lockstep:
            return Embedded(self._in_lockstep(x_TC, sequence))
        if self.kept is not None and torch.is_grad_enabled():
            return Embedded(self._with_kept(x_TC, sequence, self.kept))
        store = None if torch.is_grad_enabled() else self.features
        if store is not None and sequence.spans:
            store.bind(self)
        seen = encode_spans(sequence, ("image", "video"), self.encode, store)
        return Embedded(overwrite_rows(x_TC, seen))

    def _with_kept(self, x_TC: Tensor, sequence: Sequence, store: FeatureCache) -> Tensor:
        """Rows whose media were encoded now or earlier, without gradient, and are projected now, with one."""
        weight = self.vision.patch_embedding.weight

        def see(tiles_N3SS: Tensor) -> Tensor:
            return self._see(normalize(tiles_N3SS.to(weight.device), self.policy, dtype=weight.dtype))

        with torch.no_grad():
            store.bind(self.vision)
            found = encode_spans(sequence, ("image", "video"), see, store)
        if not found:
            return x_TC
        rows = self.connect(torch.cat([features for _, features in found]))
        parts = rows.split([len(features) for _, features in found])
        return overwrite_rows(x_TC, [(span, part) for (span, _), part in zip(found, parts, strict=True)])

    def _in_lockstep(self, x_TC: Tensor, sequence: Sequence) -> Tensor:
        """Rows with all media encoded in one call, whatever their number."""
        kinds = [media for media in ("image", "video") if sequence.spans_of(media)]
        if not kinds:
            side = self.policy.image_size
            blank_13SS = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=x_TC.device)
            # The draws of DropPath for the blank tile must not shift those that follow.
            with torch.random.fork_rng(devices=[x_TC.device] if x_TC.is_cuda else []):
                return x_TC + 0.0 * self.encode(blank_13SS).sum().to(x_TC.dtype)
        tiles_N3SS = torch.cat([sequence.media[media].data for media in kinds])
        encoded_NKC = self.encode(tiles_N3SS)
        seen, before = [], 0
        for media in kinds:
            for s in sequence.spans_of(media):
                items = encoded_NKC[before + s.first : before + s.first + s.items]
                seen.append((s, items.flatten(0, 1)))
            before += len(sequence.media[media])
        return overwrite_rows(x_TC, seen)


def build_internvl(config: InternVLConfig, *, generator: torch.Generator | None = None) -> CausalVLM:
    """The model of a config, on the current default device.

    With a `generator` the language side is initialised from it (tests, training from scratch); without one its
    matrices are left unset, to be overwritten by a checkpoint.
    """
    c = config
    words = WordTable(c.language.vocab_size, c.language.hidden_size)
    embedder = InternVLEmbedder(
        words,
        InternViT(c.vision),
        Unshuffle(c.downsample, c.unshuffle),
        Projector(c.projector_inputs, c.language.hidden_size),
        c.tiles,
        select_layer=c.select_layer,
    )
    head = TextHead(
        c.language.vocab_size, c.language.hidden_size, tied=words.weight if c.language.tie_words else None
    )
    model = CausalVLM(embedder, build_decoder(c.language), head)
    if generator is not None:
        init_decoder(model.trunk, generator=generator)
        with torch.no_grad():
            words.weight.normal_(0, 0.02, generator=generator)
            if not c.language.tie_words:
                head.weight.normal_(0, 0.02, generator=generator)
    return model


class WordsOnly(nn.Module):
    """The embedder of a language model alone."""

    def __init__(self, words: WordTable) -> None:
        super().__init__()
        self.words = words

    def forward(self, sequence: Sequence, cache: ModelCache | None = None) -> Embedded:
        """(T,) ids -> (T, C) rows; UsageError when there is something to see."""
        if sequence.spans:
            raise UsageError("this model is a language model alone and sees no pictures: choose another one")
        return Embedded(self.words(sequence.ids_T))


def build_language_model(config: LanguageConfig) -> CausalVLM:
    """Word table, decoder and text head, without any encoder."""
    words = WordTable(config.vocab_size, config.hidden_size)
    head = TextHead(config.vocab_size, config.hidden_size, tied=words.weight if config.tie_words else None)
    return CausalVLM(WordsOnly(words), build_decoder(config), head)
