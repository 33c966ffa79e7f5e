"""Decoder: the trunk that all systems share, and the builder of a language family from its config.

Source: Llama (2302.13971), Qwen2 (2407.10671), InternLM2 (2403.17297), Phi-3 (2404.14219), Qwen3 (2505.09388): all
pre-norm blocks of grouped-query attention and SwiGLU, of which Qwen2 adds biases to q, k and v, Qwen3 a norm to each
head of q and k, and Phi-3 its rotary factors. The trunk reads embedded rows and returns the hidden state of
every row after the final norm; words and logits belong to the embedder and the head around it.
Legend: T tokens, C width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from chiasm.nn.attention import KVCache, Segments
from chiasm.nn.block import Attention, Block, SwiGLU
from chiasm.nn.norms import HeadNorm, RMSNorm
from chiasm.nn.rope import Rope
from chiasm.parts.language.config import LanguageConfig


class Decoder(nn.Module):
    """A stack of blocks and a final norm.

    Args:
        blocks: the layers. rope: frequencies of their rotary positions.
        norm: applied to the last layer's output (`nn.Identity()` for stacks that feed another stack).
    """

    def __init__(self, blocks: list[Block], rope: Rope, norm: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.rope = rope
        self.norm = norm
        self.checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.devices: tuple[torch.device, ...] | None = None
        """The device of each layer, where they are several (`chiasm.model.placement`)."""

    def new_cache(self, slots: int = 1, *, capacity: int = 0) -> KVCache:
        """An empty KV cache for `slots` documents."""
        return KVCache(len(self.layers), slots, capacity=capacity)

    def forward(
        self,
        x_TC: Tensor,
        *,
        kind_T: Tensor,
        segments: Segments,
        pos_T: Tensor,
        cache: KVCache | None = None,
    ) -> Tensor:
        """(T, C) embedded rows -> (T, C) hidden states; new keys and values are counted into `cache`.

        In float16 the sum that the layers add to is kept in float32: it may pass float16's 65,504.
        Layers compute in the dtype of the rows, which is also that of the result.

        Raises ConfigError where a cached document grows past the length at which its rotary frequencies change
        (`Rope.switch`): what is cached was read with the others. The generation loop reads it again instead.
        """
        if cache is not None:
            self.rope.refuse_crossing(cache.past(segments), segments.lengths)
        dtype = x_TC.dtype
        table = self.rope.table(pos_T, dtype, segments.lengths)
        if dtype == torch.float16:
            x_TC = x_TC.float()
        for i, block in enumerate(self.layers):
            if self.devices is not None and self.devices[i] != x_TC.device:
                x_TC, kind_T = x_TC.to(self.devices[i]), kind_T.to(self.devices[i])
                table = table[0].to(self.devices[i]), table[1].to(self.devices[i])
            if self.checkpointing and torch.is_grad_enabled():
                x_TC = checkpoint(block, x_TC, table, segments, kind_T, None, i, use_reentrant=False)  # type: ignore[assignment]
            else:
                x_TC = block(x_TC, table, segments, kind_T, cache, i)
        if cache is not None:
            cache.advance(segments)
        if self.devices is not None:  # the last one may have no layer
            weight = next(self.norm.parameters(), x_TC)
            x_TC = x_TC.to(weight.device)
        x_TC = self.norm(x_TC)
        return x_TC.to(dtype) if dtype == torch.float16 else x_TC


def build_decoder(
    config: LanguageConfig,
    *,
    ffn: Callable[[int], nn.Module] | None = None,
    layers: int | None = None,
    norm: nn.Module | None = None,
) -> Decoder:
    """The decoder of a language family.

    Args:
        config: widths and counts.
        ffn: layer index -> feed-forward, where a system changes it (routed experts); default SwiGLU.
        layers: fewer or more layers than the config says. norm: in place of the final RMSNorm.
    """
    c = config

    def block(i: int) -> Block:
        return Block(
            RMSNorm(c.hidden_size, c.norm_eps),
            Attention(
                c.hidden_size,
                c.heads,
                c.kv_heads,
                c.head_dim,
                qkv_bias=c.qkv_bias,
                qk_norm=HeadNorm(c.heads, c.kv_heads, c.head_dim, c.norm_eps) if c.qk_norm else None,
            ),
            RMSNorm(c.hidden_size, c.norm_eps),
            ffn(i) if ffn else SwiGLU(c.hidden_size, c.intermediate_size),
        )

    blocks = [block(i) for i in range(c.layers if layers is None else layers)]
    return Decoder(blocks, c.rope, RMSNorm(c.hidden_size, c.norm_eps) if norm is None else norm)


def init_decoder(decoder: nn.Module, *, std: float = 0.02, generator: torch.Generator | None = None) -> None:
    """Normal(0, std) matrices, zero biases, unit norms: the families' own initialisation, reproducible."""
    for parameter in decoder.parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 1:
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.ones_(parameter)
