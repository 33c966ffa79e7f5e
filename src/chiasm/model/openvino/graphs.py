"""Our decoder, text head and vision side written out as OpenVINO graphs, straight from the weights of the modules.

Nothing is traced: each module here has a few lines that say the same in OpenVINO's operations, so that the graph is
known to the last node and building it takes seconds. The shape of the attention subgraph (state -> gather -> concat
-> repeated heads -> attention, and back into the state) is the one that OpenVINO's CPU plugin recognises: it then
keeps keys and values in one growing buffer and copies nothing a step.

What depends on positions comes from outside: rotary tables and the mask are inputs. So every family and every kind of
rotary scaling is the same graph, frequencies that depend on the length of the text included.

Legend: B documents read together (1 here), n new rows, S rows with the past, T tokens of a tile, C width, H/G query
and key heads, D head width, V words, K visual tokens of a tile, P patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from chiasm.errors import ConfigError
from chiasm.model.openvino.weights import INT8, Scheme, matrix, openvino, whole
from chiasm.nn.block import Attention, SwiGLU
from chiasm.nn.norms import HeadNorm, RMSNorm
from chiasm.nn.vit import VitAttention, VitBlock
from chiasm.parts.compress.unshuffle import Unshuffle
from chiasm.parts.connect.projector import Projector
from chiasm.parts.language.decoder import Decoder
from chiasm.parts.vision.internvit import InternViT

__all__ = ["Writer", "decoder_graph", "head_graph", "vision_graph"]


class Writer:
    """Writes modules as nodes; every weight goes through it.

    Args:
        scheme: how matrices are compressed, see `chiasm.model.openvino.weights`.
        exact: keep float32 weights where they are not compressed (else float16).
        written: called after each block of a stack, for a progress display.
    """

    def __init__(
        self, scheme: Scheme | None = None, *, exact: bool = False, written: Callable[[], None] = lambda: None
    ) -> None:
        self.ov = openvino()
        self.op = self.ov.opset13
        self.scheme, self.exact, self.written = scheme, exact, written

    def scalar(self, value: float) -> Any:
        """A float32 constant."""
        return self.op.constant(np.float32(value))

    def ints(self, *values: int) -> Any:
        """An int64 constant of rank 1."""
        return self.op.constant(np.array(values, np.int64))

    def axis(self, value: int) -> Any:
        """An int64 constant of rank 0."""
        return self.op.constant(np.int64(value))

    def linear(self, layer: nn.Module, x: Any) -> Any:
        """The product x · Wᵀ + b of a plain `nn.Linear`; ConfigError for anything wrapped around one."""
        if type(layer) is not nn.Linear:
            raise ConfigError(
                f"a layer is {type(layer).__name__}, not Linear: merge adapters and leave other backends' "
                "quantisation out before the openvino backend writes the model"
            )
        y = self.op.matmul(x, matrix(layer.weight, self.scheme, exact=self.exact), False, True)
        return y if layer.bias is None else self.op.add(y, whole(layer.bias, exact=True))

    def norm(self, layer: nn.Module, x: Any) -> Any:
        """RMSNorm or LayerNorm over the last dimension."""
        op = self.op
        if isinstance(layer, RMSNorm):
            return op.multiply(self._unit(x, layer.eps), whole(layer.weight, exact=True))
        if isinstance(layer, nn.LayerNorm):
            centred = op.mvn(x, self.ints(-1), True, layer.eps, "INSIDE_SQRT")
            scaled = op.multiply(centred, whole(layer.weight, exact=True))
            return op.add(scaled, whole(layer.bias, exact=True))
        raise ConfigError(f"the openvino backend knows no norm {type(layer).__name__}")

    def _unit(self, x: Any, eps: float) -> Any:
        """The input over its root mean square."""
        op = self.op
        mean = op.reduce_mean(op.power(x, self.scalar(2.0)), self.ints(-1), True)
        return op.multiply(x, op.divide(self.scalar(1.0), op.sqrt(op.add(mean, self.scalar(eps)))))

    def heads_norm(self, layer: HeadNorm, q: Any, k: Any) -> tuple[Any, Any]:
        """Each query and key head over its root mean square, times its gain."""
        gains = layer.weight.detach().float().view(2, 1, 1, 1, -1)
        q, k = (
            self.op.multiply(self._unit(x, layer.eps), self.op.constant(gain.numpy()))
            for x, gain in ((q, gains[0]), (k, gains[1]))
        )
        return q, k

    def rotate(self, x: Any, cos: Any, sin: Any, half: int) -> Any:
        """Rotate (B, H, n, D) by tables (1, 1, n, D), as `chiasm.nn.rope.rotate`."""
        op = self.op
        first, second = op.variadic_split(x, self.axis(3), self.ints(half, half)).outputs()
        turned = op.concat([op.multiply(second, self.scalar(-1.0)), first], -1)
        return op.add(op.multiply(x, cos), op.multiply(turned, sin))


class _States:
    """The keys and values of all layers, as variables of the graph; documents begin with none."""

    def __init__(self, write: Writer, x: Any, beam: Any, heads: int, width: int) -> None:
        op = write.op
        self.write, self.beam, self.heads, self.width = write, beam, heads, width
        self.sinks: list[Any] = []
        batch = op.gather(op.shape_of(x), write.ints(0), write.axis(0))
        self.empty = op.broadcast(write.scalar(0.0), op.concat([batch, write.ints(heads, 0, width)], 0))

    def extend(self, name: str, new: Any) -> Any:
        """(B, G, n, D) new rows -> (B, G, S, D): the past and they."""
        ov = self.write.ov
        info = ov.op.util.VariableInfo()
        info.data_shape = ov.PartialShape([-1, self.heads, -1, self.width])
        info.data_type = ov.Type.f32
        info.variable_id = name
        variable = ov.op.util.Variable(info)
        past = ov.op.read_value(self.empty.output(0), variable)
        both = self.write.op.concat([self.write.op.gather(past, self.beam, self.write.axis(0)), new], 2)
        self.sinks.append(ov.op.assign(both, variable))
        return both


def _attention(
    write: Writer, layer: Attention, x: Any, inputs: dict[str, Any], states: _States, i: int
) -> Any:
    op = write.op
    H, G, D = layer.heads, layer.kv_heads, layer.head_dim
    qkv = op.reshape(write.linear(layer.qkv, x), write.ints(0, 0, H + 2 * G, D), True)
    qkv = op.transpose(qkv, write.ints(0, 2, 1, 3))
    q, k, v = op.variadic_split(qkv, write.axis(1), write.ints(H, G, G)).outputs()
    if isinstance(layer.qk_norm, HeadNorm):
        q, k = write.heads_norm(layer.qk_norm, q, k)
    q, k = (write.rotate(y, inputs["cos"], inputs["sin"], D // 2) for y in (q, k))
    k, v = states.extend(f"keys.{i}", k), states.extend(f"values.{i}", v)
    if H != G:
        k, v = _repeat(write, k, H, G, D), _repeat(write, v, H, G, D)
    o = op.scaled_dot_product_attention(q, k, v, inputs["mask"], causal=False)
    o = op.reshape(op.transpose(o, write.ints(0, 2, 1, 3)), write.ints(0, 0, H * D), True)
    return write.linear(layer.out, o)


def _repeat(write: Writer, x: Any, H: int, G: int, D: int) -> Any:
    """(B, G, S, D) -> (B, H, S, D); the plugin recognises these nodes and copies nothing."""
    op = write.op
    shape = op.shape_of(x)
    front, back = (op.gather(shape, write.ints(*at), write.axis(0)) for at in ((0, 1), (2, 3)))
    spread = op.broadcast(
        op.unsqueeze(x, write.ints(2)),
        op.concat([front, write.ints(H // G), back], 0),
        broadcast_spec="BIDIRECTIONAL",
    )
    return op.reshape(spread, write.ints(0, H, -1, D), True)


def _feed_forward(write: Writer, layer: nn.Module, x: Any) -> Any:
    if not isinstance(layer, SwiGLU):
        raise ConfigError(f"the openvino backend knows no feed-forward {type(layer).__name__}")
    op, hidden = write.op, layer.hidden
    both = write.linear(layer.gate_up, x)
    gate, up = op.variadic_split(both, write.axis(2), write.ints(hidden, hidden)).outputs()
    return write.linear(layer.down, op.multiply(op.swish(gate), up))


def decode(write: Writer, decoder: Decoder, x: Any, inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Nodes from embedded rows to hidden states, and the sinks of the states.

    Args:
        x: (B, n, C) float32 rows.
        inputs: nodes `cos` and `sin` (1 or B, 1, n, D), `mask` (1 or B, 1, n, S) to be added to the scores, and
            `beam_idx` (B,) int32, which row of the state each document continues.
    """
    first: Attention = decoder.layers[0].attn  # type: ignore[assignment, union-attr]
    states = _States(write, x, inputs["beam_idx"], first.kv_heads, first.head_dim)
    for i, block in enumerate(decoder.layers):
        attended = _attention(write, block.attn, write.norm(block.norm1, x), inputs, states, i)  # type: ignore[arg-type]
        x = write.op.add(x, attended)
        x = write.op.add(x, _feed_forward(write, block.ffn, write.norm(block.norm2, x)))  # type: ignore[arg-type]
        write.written()
    return write.norm(decoder.norm, x), states.sinks


def decoder_graph(write: Writer, decoder: Decoder) -> Any:
    """Inputs rows (B, n, C), cos and sin (1, 1, n, D), mask (1, 1, n, S), beam_idx (B,) -> hidden (B, n, C)."""
    op = write.op
    first: Attention = decoder.layers[0].attn  # type: ignore[assignment, union-attr]
    width, D = first.qkv.in_features, first.head_dim
    shapes = {"rows": [-1, -1, width], "cos": [1, 1, -1, D], "sin": [1, 1, -1, D], "mask": [1, 1, -1, -1]}
    inputs = {name: op.parameter(shape, np.float32, name=name) for name, shape in shapes.items()}
    inputs["beam_idx"] = op.parameter([-1], np.int32, name="beam_idx")
    hidden, sinks = decode(write, decoder, inputs["rows"], inputs)
    return _model(write, "decoder", hidden, inputs, sinks)


def head_graph(write: Writer, weight: torch.Tensor) -> Any:
    """Input hidden (N, C) -> logits (N, V). Compressed, it is int8 whatever the scheme of the rest."""
    op = write.op
    hidden = op.parameter([-1, weight.shape[1]], np.float32, name="hidden")
    scheme = INT8 if write.scheme else None
    logits = op.matmul(hidden, matrix(weight, scheme, exact=write.exact), False, True)
    return _model(write, "head", logits, {"hidden": hidden}, [])


def vision_graph(
    write: Writer, vision: InternViT, compress: Unshuffle, connect: Projector, *, select_layer: int = -1
) -> Any:
    """Input pixels (1, 3, S, S), normalised -> visual tokens (1, K, C) in the width of the language model."""
    op, c = write.op, vision.config
    side, width = c.image_size, c.hidden_size
    pixels = op.parameter([1, c.channels, side, side], np.float32, name="pixels")
    stem = vision.patch_embedding
    strides = [c.patch_size] * 2
    patches = op.convolution(pixels, whole(stem.weight, exact=write.exact), strides, [0, 0], [0, 0], [1, 1])
    patches = op.transpose(op.reshape(patches, write.ints(1, width, -1), False), write.ints(0, 2, 1))
    if stem.bias is not None:
        patches = op.add(patches, whole(stem.bias, exact=True))
    x = op.concat([whole(vision.class_embedding, exact=True), patches], 1)
    x = op.add(x, whole(vision.position_embedding, exact=True))
    states = 1 + len(vision.layers)
    if not -states <= select_layer < states:
        raise ConfigError(f"select_layer {select_layer} is out of range: there are {states} hidden states")
    for block in vision.layers[: select_layer % states]:
        x = _vit_block(write, block, x)  # type: ignore[arg-type]
        write.written()
    # The class token is dropped; the rest is folded as `chiasm.parts.compress.unshuffle` says.
    x = op.slice(x, write.ints(1), write.ints(1 + c.tokens), write.ints(1), write.ints(1))
    f, grid = compress.factor, c.grid // compress.factor
    x = op.reshape(x, write.ints(grid, f, grid, f, width), False)
    order = (0, 2, 1, 3, 4) if compress.version == "v2" else (2, 0, 1, 3, 4)
    x = op.reshape(op.transpose(x, write.ints(*order)), write.ints(1, grid * grid, f * f * width), False)
    x = op.gelu(write.linear(connect.fc1, write.norm(connect.norm, x)), "ERF")
    return _model(write, "vision", write.linear(connect.fc2, x), {"pixels": pixels}, [])


def _vit_block(write: Writer, block: VitBlock, x: Any) -> Any:
    op = write.op
    attended = _vit_attention(write, block.attn, write.norm(block.norm1, x))  # type: ignore[arg-type]
    x = op.add(x, op.multiply(attended, whole(block.ls1, exact=True)))
    inner = op.gelu(write.linear(block.mlp.fc1, write.norm(block.norm2, x)), "ERF")  # type: ignore[union-attr, arg-type]
    return op.add(x, op.multiply(write.linear(block.mlp.fc2, inner), whole(block.ls2, exact=True)))  # type: ignore[union-attr, arg-type]


def _vit_attention(write: Writer, layer: VitAttention, x: Any) -> Any:
    op, C = write.op, layer.width
    H, D = layer.heads, layer.width // layer.heads
    q, k, v = op.variadic_split(write.linear(layer.qkv, x), write.axis(2), write.ints(C, C, C)).outputs()
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = write.norm(layer.q_norm, q), write.norm(layer.k_norm, k)
    q, k, v = (
        op.transpose(op.reshape(y, write.ints(0, 0, H, D), True), write.ints(0, 2, 1, 3)) for y in (q, k, v)
    )
    o = op.scaled_dot_product_attention(q, k, v, causal=False)
    o = op.reshape(op.transpose(o, write.ints(0, 2, 1, 3)), write.ints(0, 0, C), True)
    return write.linear(layer.proj, o)


def _model(write: Writer, name: str, output: Any, inputs: dict[str, Any], sinks: list[Any]) -> Any:
    output.output(0).set_names({"out"})
    for key, node in inputs.items():
        node.output(0).set_names({key})
    return write.ov.Model([write.op.result(output)], sinks, list(inputs.values()), name)
