"""PVC: pictures as still videos and videos alike -> ProgressiveViT -> unshuffle -> conditioned MLP -> language model.

Source: PVC (2412.09613); fact sheet, section 2. Each repeat of a tile, each frame of a video becomes K tokens.
Legend: N tiles, F frames of all sequences, P patches of a tile, K tokens of a frame, S tile side in pixels, T rows,
C language width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.data.sequence import Sequence, Span
from chiasm.errors import ConfigError
from chiasm.media.pixels import normalize
from chiasm.model.causal import CausalVLM
from chiasm.nn.temporal import TimeEmbedding
from chiasm.parts.compress.unshuffle import Unshuffle
from chiasm.parts.connect.conditioned import ConditionedProjector
from chiasm.parts.contracts import Embedded, ModelCache
from chiasm.parts.embed import FeatureCache, WordTable, overwrite_rows
from chiasm.parts.heads.text import TextHead
from chiasm.parts.language.decoder import build_decoder, init_decoder
from chiasm.parts.vision.progressive import Clips, ProgressiveViT
from chiasm.systems.pvc.config import PVCConfig
from chiasm.systems.pvc.plan import ENCODED, Shot, key_of, shots_of, stray_items, with_repeats

__all__ = ["FRAMES_AT_ONCE", "PVCEmbedder", "build_pvc", "change", "check_anytime", "views_of"]

FRAMES_AT_ONCE = 16
"""Frames that one call of a layer takes where no gradient is wanted: what bounds the memory of long videos."""


def views_of(pixels_N3SS: Tensor, repeats: int, views: str) -> Tensor:
    """(N, 3, S, S) -> (N * repeats, 3, S, S): what each repeat shows, tile by tile; see `PVCConfig.views`."""
    side = pixels_N3SS.shape[-1]

    def resized(x: Tensor, to: int) -> Tensor:
        # Narrow numbers have no such kernel on the CPU.
        wide = x if x.dtype == torch.float64 else x.float()
        wide = F.interpolate(wide, size=(to, to), mode="bicubic", align_corners=False, antialias=True)
        return wide.to(x.dtype)

    shown = [pixels_N3SS]
    if views == "crops":
        half = side // 2
        for n in range(1, repeats):
            top, left = divmod((n - 1) % 4, 2)
            y, x = top * (side - half), left * (side - half)
            shown.append(resized(pixels_N3SS[..., y : y + half, x : x + half], side))
    elif views == "scales":
        shown = [
            resized(resized(pixels_N3SS, max(1, side * n // repeats)), side) if n < repeats else pixels_N3SS
            for n in range(1, repeats + 1)
        ]
    else:
        shown *= repeats
    return torch.stack(shown, dim=1).flatten(0, 1)


class PVCEmbedder(nn.Module):
    """Words from the table, rows of pictures and of frames from the encoder.

    `features`, when set, remembers encoded pictures and videos by content (inference only).
    `lockstep`, when set, encodes exactly once in every pass, be it a blank tile that counts nothing, for processes that
    share the encoder's weights.
    """

    lockstep: bool = False

    def __init__(
        self,
        words: WordTable,
        vision: ProgressiveViT,
        compress: Unshuffle,
        connect: ConditionedProjector,
        config: PVCConfig,
    ) -> None:
        super().__init__()
        self.words, self.vision, self.compress, self.connect = words, vision, compress, connect
        self.config, self.policy = config, config.tiles
        self.features: FeatureCache | None = None
        vision.chunked(FRAMES_AT_ONCE)

    def forward(self, sequence: Sequence, cache: ModelCache | None = None) -> Embedded:
        """(T,) positions -> (T, C) rows; DataError as of `plan.shots_of`."""
        x_TC = self.words(sequence.ids_T)
        if not sequence.media and not self.lockstep:
            return Embedded(x_TC)
        if ENCODED in sequence.media:
            data = sequence.media[ENCODED].data
            ready = [(s, data[s.first : s.first + s.items].flatten(0, 1)) for s in sequence.spans_of(ENCODED)]
            x_TC = overwrite_rows(x_TC, ready)
        shots = shots_of(sequence, self.config)
        store = None if torch.is_grad_enabled() or self.lockstep else self.features
        if store is None:
            return Embedded(self._together(x_TC, sequence, shots))
        if shots:
            store.bind(self)
        rows: list[tuple[Span, Tensor]] = []
        for shot in shots:
            # Each on its own: what is remembered must not depend, in its last bits, on what stood beside it.
            key = key_of(shot, self.config)
            tokens_FKC = store.get(key)
            if tokens_FKC is None:
                tokens_FKC = self.encode([shot], sequence)
                store.put(key, tokens_FKC)
            rows += shot.rows(tokens_FKC, self.config.repeat_order)
        return Embedded(overwrite_rows(x_TC, rows))

    def _together(self, x_TC: Tensor, sequence: Sequence, shots: list[Shot]) -> Tensor:
        """Rows with all media encoded in one call. Items that no span stands for are encoded and reach no row."""
        if self.lockstep:
            # In chunks, processes with different numbers of frames would run a shared layer differently often.
            self.vision.chunked(None)
        if not any(len(batch) for name, batch in sequence.media.items() if name in ("image", "video")):
            if not self.lockstep:
                return x_TC
            side = self.policy.image_size
            blank_13SS = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=x_TC.device)
            # The draws of DropPath for the blank tile must not shift those that follow.
            with torch.random.fork_rng(devices=[x_TC.device] if x_TC.is_cuda else []):
                encoded = self.project(self._normal(blank_13SS), Clips.stills(1))
            return x_TC + 0.0 * encoded.sum().to(x_TC.dtype)
        encoded_FKC = self.encode(shots, sequence, stray=True)
        if not shots:
            return x_TC + 0.0 * encoded_FKC.sum().to(x_TC.dtype)
        rows: list[tuple[Span, Tensor]] = []
        at = 0
        for shot in shots:
            count = shot.tiles * shot.frames
            rows += shot.rows(encoded_FKC[at : at + count], self.config.repeat_order)
            at += count
        return overwrite_rows(x_TC, rows)

    def encode(self, shots: list[Shot], sequence: Sequence, *, stray: bool = False) -> Tensor:
        """Tokens (F, K, C) of all frames of these shots, one behind the other.

        Args:
            stray: behind them, one frame of each item that no span stands for.
        """
        pixels: list[Tensor] = []
        copies: list[int] = []
        lengths: list[int] = []
        times: list[float] = []
        for shot in shots:
            seen_N3SS = self._seen(shot, sequence)
            if shot.media == "image" and self.config.views != "same":
                seen_N3SS = views_of(seen_N3SS, shot.copies, self.config.views)
                copies += [1] * len(seen_N3SS)
            else:
                copies += [shot.copies] * len(seen_N3SS)
            pixels.append(seen_N3SS)
            lengths += [shot.frames] * shot.tiles
            times += shot.times * shot.tiles
        if stray:
            for media, items in stray_items(sequence).items():
                if items:
                    pixels.append(self._normal(sequence.media[media].data[items]))
                    copies += [1] * len(items)
                    lengths += [1] * len(items)
                    times += [0.0] * len(items)
        clips = Clips(tuple(copies), tuple(lengths), torch.tensor(times, dtype=torch.float64))
        return self.project(pixels[0] if len(pixels) == 1 else torch.cat(pixels), clips)

    def project(self, pixels_N3SS: Tensor, clips: Clips) -> Tensor:
        """(N, 3, S, S) normalised pixels -> (F, K, C) tokens."""
        return self.compressed(self.vision(pixels_N3SS, self.config.select_layer, clips=clips), clips.times_F)

    def compressed(self, features_FTC: Tensor, times_F: Tensor) -> Tensor:
        """(F, 1 + P, C') of the encoder -> (F, K, C) tokens. The class token is dropped before unshuffling."""
        embedded = None
        if self.connect.modulation is not None and self.connect.time is None:
            assert self.vision.time is not None
            embedded = self.vision.time(times_F)
        return self.connect(self.compress(features_FTC[:, 1:]), times_F, embedded)

    def _seen(self, shot: Shot, sequence: Sequence) -> Tensor:
        """The normalised pixels of a shot's items, in its order."""
        data, items = sequence.media[shot.media].data, shot.items
        first = items[0]
        whole = items == list(range(first, first + len(items)))
        return self._normal(data[first : first + len(items)] if whole else data[items])

    def _normal(self, tiles_N3SS: Tensor) -> Tensor:
        weight = self.vision.patch_embedding.weight
        return normalize(tiles_N3SS.to(weight.device), self.policy, dtype=weight.dtype)

    # Anytime ---------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def settled(self, sequence: Sequence, threshold: float) -> Sequence:
        """The sequence with as many repeats of each picture as say something new.

        A picture is repeated until its tokens differ from those of the repeat before by less than `threshold` (norm of
        the difference over the norm of the tokens, of the tile that changes most). That last repeat is left out, and
        those behind it are never computed. The tokens found go into `features`, so that they are not computed again.

        Raises:
            ConfigError: the threshold is not positive, or the model's repeats show different things.
        """
        check_anytime(threshold, self.config)
        if self.features is not None:
            self.features.bind(self)
        wanted: dict[Span, int] = {}
        for shot in shots_of(sequence, self.config):
            if shot.media != "image" or shot.copies < 2:
                continue
            (span,) = shot.spans
            tokens_NRKC = self.until_settled(self._seen(shot, sequence), shot.times, threshold)
            wanted[span] = tokens_NRKC.shape[1]
            if self.features is not None:
                kept = tokens_NRKC.shape[1]
                shorter = Shot(
                    media="image", spans=shot.spans, tiles=shot.tiles, copies=kept, times=shot.times[:kept]
                )
                self.features.put(key_of(shorter, self.config), tokens_NRKC.flatten(0, 1))
        return with_repeats(sequence, wanted, self.config) if wanted else sequence

    def until_settled(self, pixels_N3SS: Tensor, times: tuple[float, ...], threshold: float) -> Tensor:
        """(N, R, K, C): the repeats of N tiles up to the one that changes less than `threshold`, at most all times."""
        trunk = torch.cat([self.vision.trunk(part) for part in pixels_N3SS.split(FRAMES_AT_ONCE)])
        cache = self.vision.new_cache(window=len(times))
        found: list[Tensor] = []
        for when in times:
            times_N = torch.full((len(trunk),), when, dtype=torch.float64)
            features = self.vision.step(trunk, times_N, cache, self.config.select_layer)
            tokens_NKC = self.compressed(features, times_N)
            if found and change(tokens_NKC, found[-1]) < threshold:
                break
            found.append(tokens_NKC)
        return torch.stack(found, dim=1)


def check_anytime(threshold: float, config: PVCConfig) -> None:
    """Raise ConfigError unless a picture's repeats can be stopped at this share of change."""
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not threshold > 0:
        raise ConfigError(f"anytime is {threshold!r}: give a share of change above 0, for instance 0.05")
    if config.views != "same":
        raise ConfigError(f"anytime compares equal repeats, but views is {config.views!r}: use 'same'")


def change(tokens_NKC: Tensor, before_NKC: Tensor) -> float:
    """How much the tokens of a repeat differ from those before, of the tile that changes most: 0 equal, about 1 new."""
    difference_N = (tokens_NKC.float() - before_NKC.float()).flatten(1).norm(dim=1)
    return float((difference_N / tokens_NKC.float().flatten(1).norm(dim=1).clamp_min(1e-12)).max())


def build_pvc(config: PVCConfig, *, generator: torch.Generator | None = None) -> CausalVLM:
    """The model of a config, on the current default device.

    With a `generator` the language side is initialised from it (tests, training from scratch); without one its
    matrices are left unset, to be overwritten by a checkpoint.
    """
    c = config
    words = WordTable(c.language.vocab_size, c.language.hidden_size)
    embedding, time = c.projector_embedding, None
    if embedding is not None and c.temporal.conditioning == "full":
        time = TimeEmbedding(
            c.temporal.time_sines, embedding, act=c.temporal.time_act, scale=c.temporal.scale
        )
    embedder = PVCEmbedder(
        words,
        ProgressiveViT(c.vision, c.temporal),
        Unshuffle(c.downsample, c.unshuffle),
        ConditionedProjector(c.projector_inputs, c.language.hidden_size, embedding=embedding, time=time),
        c,
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
