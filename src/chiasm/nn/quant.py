"""Linear layers with 8- and 4-bit weights, on the integer kernels that ship inside torch.

Three arithmetics, all with weights rounded once, when the layer is made:

- `Int8Linear(bits=16)`, weight-only: a weight row of int8 numbers and one scale. Activations count as unrounded: each
  row is split into a coarse and a fine int8 part (15 bits of its largest value), which go through the integer product
  as two rows. One packed copy of the weights serves decoding and prefill alike.
- `Int8Linear(bits=8)`, W8A8: the coarse part alone, rounded per row when it arrives ("dynamic"). Half the products.
- `Int4Linear`, weight-only: 4-bit numbers with a scale and an offset for every group of inputs of a row. For few rows
  torch's own int4 kernel; for many, the weights are widened. Both compute in bfloat16 whatever the model does (the
  kernel takes 30 to 60 times as long in other dtypes), so that a row's result does not depend on how many there are,
  up to the rounding of sums.

Where oneDNN's u8 x s8 product is absent or not exact (a GPU, a CPU without VNNI, whose 16-bit sums saturate), int8
weights are widened as well: slower than here, but right. Layers are for inference and stay on the device they were
made on. Source of the rounding: plain round-to-nearest, symmetric for int8 (as LLM.int8, 2208.07339, without its
outlier columns), between the extremes of a group for int4, with a search for the range that costs the least error.

Legend: M rows, K inputs, N outputs, g inputs of a group.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chiasm.errors import ConfigError

__all__ = [
    "GELU_FLOOR",
    "Int4Linear",
    "Int8Linear",
    "RoundedLinear",
    "dequantize_groups",
    "int8_linear_reference",
    "quantize_groups",
    "quantize_rows",
]

GELU_FLOOR = 11 / 64
"""No output of GELU is below -0.17: what follows it can use all 256 codes instead of 128 for its positive side."""

_FEW_ROWS = 64  # up to here torch's int4 kernel beats widening (896 -> 4864: 6.7 against 8 ms, one thread)
_ROWS = 2048  # of a matrix that are rounded at once: whole blocks
_BLOCK = 64  # outputs that the int4 kernel packs together


STAYS = (
    "a model with rounded weights is not moved, copied, saved or trained: load it with the dtype and device that are "
    "wanted; what is to be saved is the checkpoint it came from"
)


def quantize_rows(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8, symmetric: weight ≈ codes * scale.

    Returns:
        (N, K) int8 in -127 … 127, and (N,) float32 scales.
    """
    codes_NK = torch.empty(weight_NK.shape, dtype=torch.int8, device=weight_NK.device)
    scale_N = torch.empty(weight_NK.shape[0], device=weight_NK.device)
    # Some rows at a time: in float32 the head of a large model would take gigabytes.
    for weight, codes, scale in zip(*(x.split(_ROWS) for x in (weight_NK, codes_NK, scale_N)), strict=True):
        weight = weight.float()
        scale.copy_(weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127)
        codes.copy_((weight / scale[:, None]).round_().clamp_(-127, 127))
    return codes_NK, scale_N


def int8_linear_reference(
    x_MK: Tensor,
    codes_NK: Tensor,
    scale_N: Tensor,
    bias_N: Tensor | None = None,
    *,
    bits: Literal[8, 16] = 16,
    floor: float | None = None,
) -> Tensor:
    """Slow twin of `Int8Linear`: the same rounding of activations, then a float64 product. Returns float64."""
    narrow = torch.bfloat16 if bits == 8 and x_MK.dtype is torch.bfloat16 else torch.float32
    x_MK = x_MK.double()
    if floor is None:
        step_M1 = _step(x_MK.abs().amax(1, keepdim=True), 127, narrow)
        coarse_MK = (x_MK / step_M1).round().clamp(-127, 127)
        seen_MK = coarse_MK * step_M1
        if bits == 16:
            seen_MK = seen_MK + ((x_MK - seen_MK) * 254 / step_M1).round() * step_M1 / 254
    else:
        step_M1 = _step(x_MK.amax(1, keepdim=True) + floor, 255, narrow)
        seen_MK = ((x_MK + floor) / step_M1).round() * step_M1 - floor
    y_MN = seen_MK @ codes_NK.double().t() * scale_N.double()
    return y_MN if bias_N is None else y_MN + bias_N.double()


class RoundedLinear(nn.Module):
    """What rounded layers have in common: they answer, and are not moved, copied, saved or trained."""

    in_features: int
    out_features: int
    checksum: int
    device: torch.device
    """Where it was made, and stays."""

    def _apply(self, fn: object, recurse: bool = True) -> RoundedLinear:
        raise ConfigError(STAYS)

    def _save_to_state_dict(self, *given: object) -> None:
        raise ConfigError(STAYS)

    def __reduce_ex__(self, protocol: object) -> str:
        raise ConfigError(STAYS)

    def __deepcopy__(self, memo: object) -> RoundedLinear:
        raise ConfigError(STAYS)


class Int8Linear(RoundedLinear):
    """A linear layer with int8 weights, one scale for each output.

    Args:
        linear: what it replaces. Its weight is read once and not kept.
        bits: of the activations: 16 (as good as unrounded) or 8 (rounded per row).
        floor: with 8 bits, inputs are known to be at least ``-floor``; None takes them as symmetric.

    Raises:
        ConfigError: the layer is called where a gradient is wanted, or moved after it was made.
    """

    def __init__(self, linear: nn.Linear, *, bits: Literal[8, 16] = 16, floor: float | None = None) -> None:
        super().__init__()
        if floor is not None and bits == 16:
            raise ConfigError("floor is for activations of 8 bits: leave it out with 16")
        weight_NK = linear.weight.detach()
        self.out_features, self.in_features = weight_NK.shape
        self.device = weight_NK.device
        self.bits, self.floor = bits, floor
        codes_NK, self.scale = quantize_rows(weight_NK)
        bias_N = None if linear.bias is None else linear.bias.detach().float()
        if floor is not None:  # sum(w * (x + floor)) is too large by this constant
            shift_N = floor * self.scale * codes_NK.sum(1)
            bias_N = -shift_N if bias_N is None else bias_N - shift_N
        self.bias = None if bias_N is None else bias_N.to(weight_NK.dtype)
        self.packed = weight_NK.device.type == "cpu" and _integer_product()
        self.codes = torch.ops.onednn.qlinear_prepack(codes_NK, None) if self.packed else codes_NK
        self.checksum = _checksum(codes_NK, self.scale, self.bias)
        """Of all numbers it multiplies and adds with, to tell one model from another."""

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.in_features * self.out_features + self.scale.nbytes + bias

    def forward(self, x_K: Tensor) -> Tensor:
        """Map (..., K) to (..., N) in the dtype of x."""
        _refuse_gradient(x_K)
        x_MK = x_K.reshape(-1, self.in_features)
        rows = 512 if self.bits == 16 else 4096  # bounds what is held in float32
        parts = [self._rows(part) for part in x_MK.split(rows)] or [x_MK.new_empty(0, self.out_features)]
        y_MN = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y_MN.view(*x_K.shape[:-1], self.out_features)

    def _rows(self, x_MK: Tensor) -> Tensor:
        dtype = x_MK.dtype
        if self.bits == 16:
            if not self.packed:
                return _widened(x_MK, self.codes, self.scale, self.bias)
            x_MK = x_MK.float()
            step_M1 = _step(x_MK.abs().amax(1, keepdim=True), 127, torch.float32)
            coarse_MK = (x_MK / step_M1).round_()
            fine_MK = torch.addcmul(x_MK, coarse_MK, step_M1, value=-1).mul_(254 / step_M1).round_()
            codes_2MK = _unsigned(torch.cat((coarse_MK, fine_MK)).to(torch.int8))
            high_MN, low_MN = self._product(codes_2MK, 128, torch.float32).chunk(2)
            y_MN = high_MN.add_(low_MN, alpha=1 / 254).mul_(step_M1)
            return (y_MN if self.bias is None else y_MN.add_(self.bias)).to(dtype)
        codes_MK, step_M1 = _codes(x_MK, self.floor)
        if not self.packed:
            seen_MK = codes_MK.to(torch.int16) - (128 if self.floor is None else 0)
            if dtype is torch.float16:  # a sum of whole numbers would pass its range
                return _widened((seen_MK * step_M1).to(dtype), self.codes, self.scale, self.bias)
            return _widened(seen_MK.to(dtype), self.codes, self.scale, self.bias, step_M1.to(dtype))
        wide = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
        y_MN = self._product(codes_MK, 128 if self.floor is None else 0, wide)
        step_M1 = step_M1.to(wide)  # exact: the steps were chosen from this dtype's numbers
        if self.bias is None:
            return y_MN.mul_(step_M1).to(dtype)
        return torch.addcmul(self.bias.to(wide), y_MN, step_M1).to(dtype)

    def _product(self, codes_MK: Tensor, zero: int, dtype: torch.dtype) -> Tensor:
        """(codes - zero) @ weight, scaled by the weights' scales only."""
        zeros_N = torch.zeros(self.out_features, dtype=torch.int32)
        return torch.ops.onednn.qlinear_pointwise(
            codes_MK, 1.0, zero, self.codes, self.scale, zeros_N, None, 1.0, 0, dtype, "none", [], "none"
        )

    def extra_repr(self) -> str:
        """Show widths and bits in ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, int8 weights, {self.bits}-bit activations"


def quantize_groups(weight_NK: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round groups of `group` inputs of each row to 4 bits: weight ≈ (codes - 8) * scale + zero.

    The range of a group may be narrower than its extremes, where that lessens the squared error. Scales and zeros are
    numbers of bfloat16, and the codes are those that fit them best.

    Returns:
        (N, K) int32 codes in 0 … 15, (N, K / g) float32 scales, (N, K / g) float32 zeros.

    Raises:
        ConfigError: K is no multiple of the group.
    """
    N, K = weight_NK.shape
    if K % group:
        raise ConfigError(f"{K} inputs cannot be divided into groups of {group}")
    w_NGg = weight_NK.float().view(N, K // group, group)
    low_NG1, high_NG1 = torch.aminmax(w_NGg, dim=2, keepdim=True)
    best: tuple[Tensor, ...] | None = None
    for share in (1.0, 0.92, 0.84, 0.76):
        middle = (low_NG1 + high_NG1) / 2
        scale = ((high_NG1 - low_NG1) * (share / 15)).clamp_min(1e-12).bfloat16().float()
        zero = (middle + scale / 2).bfloat16().float()
        codes = ((w_NGg - zero) / scale).add_(8).round_().clamp_(0, 15)
        error = (torch.addcmul(zero, codes - 8, scale) - w_NGg).square_().sum(2, keepdim=True)
        if best is None:
            best = (error, codes, scale, zero)
        else:
            better = error < best[0]
            found = zip((error, codes, scale, zero), best, strict=True)
            best = tuple(torch.where(better, new, old) for new, old in found)
    assert best is not None
    _, codes, scale, zero = best
    return codes.view(N, K).to(torch.int32), scale[..., 0], zero[..., 0]


def dequantize_groups(codes_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
    """(N, K) float32 weights of the result of `quantize_groups`."""
    N, groups = scale_NG.shape
    codes_NGg = codes_NK.view(N, groups, -1).float() - 8
    return torch.addcmul(zero_NG[..., None], codes_NGg, scale_NG[..., None]).view(N, -1)


class Int4Linear(RoundedLinear):
    """A linear layer with 4-bit weights, a scale and an offset for each group of inputs of an output.

    Args:
        linear: what it replaces. Its weight is read once and not kept.
        group: inputs that share a scale: 32, 64, 128 or 256. A width that is no multiple is filled up with zeros.

    Raises:
        ConfigError: another group, or the layer is called where a gradient is wanted, or moved after it was made.
    """

    def __init__(self, linear: nn.Linear, *, group: int = 64) -> None:
        super().__init__()
        if group not in (32, 64, 128, 256):
            raise ConfigError(f"int4 weights come in groups of 32, 64, 128 or 256, not {group}")
        weight_NK = linear.weight.detach()
        self.out_features, self.in_features = weight_NK.shape
        self.device = weight_NK.device
        self.group = group
        self.fill = -self.in_features % group
        self.kernel = weight_NK.device.type == "cpu"
        packed, theirs, scale_zero, alike = [], [], [], True
        for part in weight_NK.split(_ROWS):
            padded = F.pad(part.float(), (0, self.fill, 0, -part.shape[0] % _BLOCK))
            codes, scale_NG, zero_NG = quantize_groups(padded, group)
            packed.append(_pack(codes))
            scale_zero.append(torch.stack((scale_NG.t(), zero_NG.t()), dim=-1).bfloat16())
            if self.kernel and (alike is False or not theirs):
                # The kernel's own order depends on the processor. Where it is another, it is kept beside ours.
                theirs.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
                alike = torch.equal(theirs[-1].flatten(), packed[-1].flatten())
        self.scale_zero = torch.cat(scale_zero, dim=1)  # (G, N, 2)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()
        self.packed = torch.cat(packed)
        """(N / 64, K, 32) bytes: outputs n and n + 32 of a block share one, the first in its low half."""
        self.checksum = _checksum(self.packed, self.scale_zero, self.bias)
        """Of all numbers it multiplies and adds with, to tell one model from another."""
        if self.kernel:
            self.theirs = self.packed.view(-1, theirs[0].shape[1]) if alike else torch.cat(theirs)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, offsets and bias."""
        own = self.kernel and self.theirs.data_ptr() != self.packed.data_ptr()
        bias = 0 if self.bias is None else self.bias.nbytes
        return self.packed.nbytes * (2 if own else 1) + self.scale_zero.nbytes + bias

    def forward(self, x_K: Tensor) -> Tensor:
        """Map (..., K) to (..., N) in the dtype of x."""
        _refuse_gradient(x_K)
        x_MK = x_K.reshape(-1, self.in_features)
        if self.fill:
            x_MK = F.pad(x_MK, (0, self.fill))
        if self.kernel and 0 < x_MK.shape[0] <= _FEW_ROWS:
            y_MN = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x_MK.to(torch.bfloat16).contiguous(), self.theirs, self.group, self.scale_zero
            )
            y_MN = y_MN[:, : self.out_features]
        else:
            y_MN = self._many(x_MK.to(torch.bfloat16))
        y_MN = y_MN.to(x_MK.dtype)
        y_MN = y_MN if self.bias is None else y_MN + self.bias.to(y_MN.dtype)
        return y_MN.reshape(*x_K.shape[:-1], self.out_features)

    def _many(self, x_MK: Tensor) -> Tensor:
        """(M, K) bfloat16 -> (M, N): weights widened a few blocks at a time, so that they stay in the cache."""
        y_MN = x_MK.new_empty(x_MK.shape[0], self.out_features)
        for first in range(0, self.packed.shape[0], 8):
            weight_KN = self._widen(first, first + 8)
            begin = first * _BLOCK
            end = min(begin + weight_KN.shape[1], self.out_features)
            y_MN[:, begin:end] = x_MK @ weight_KN[:, : end - begin]
        return y_MN

    def _widen(self, first: int, last: int) -> Tensor:
        """(K, outputs) weights of blocks `first` up to `last`, in bfloat16."""
        bytes_BKh = self.packed[first:last]
        scale_GN2 = self.scale_zero[:, first * _BLOCK : last * _BLOCK]
        blocks, K, half = bytes_BKh.shape
        codes_KBhN = torch.stack((bytes_BKh & 15, bytes_BKh >> 4), dim=2).permute(1, 0, 2, 3)
        codes_GgN = codes_KBhN.reshape(-1, self.group, blocks * 2 * half).to(torch.bfloat16).sub_(8)
        scale_2G1N = (
            scale_GN2.permute(2, 0, 1).unsqueeze(2).contiguous()
        )  # strided, it would take 7x the time
        return torch.addcmul(scale_2G1N[1], codes_GgN, scale_2G1N[0]).view(K, -1)

    def dequantized(self) -> Tensor:
        """(N, K) weights that the layer multiplies with."""
        weight_KN = self._widen(0, self.packed.shape[0])
        return weight_KN.t()[: self.out_features, : self.in_features]

    def extra_repr(self) -> str:
        """Show widths and group in ``print(model)``."""
        return f"{self.in_features} -> {self.out_features}, int4 weights in groups of {self.group}"


def _refuse_gradient(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ConfigError(
            "a layer with rounded weights passes no gradient on: train the model without quantize"
        )


def _step(top_M1: Tensor, codes: int, dtype: torch.dtype) -> Tensor:
    """Distance of two codes so that `top` is within reach of the last one; a number of `dtype`, in float32 or wider."""
    step_M1 = (top_M1 / codes).clamp_min(1e-30)
    if dtype is torch.float32 or dtype is torch.float64:
        return step_M1
    # Rounding to nearest may shrink it by half a unit in the last place, which would push `top` past the last code.
    return (step_M1 * (1 + torch.finfo(dtype).eps)).to(dtype).to(step_M1.dtype)


def _codes(x_MK: Tensor, floor: float | None) -> tuple[Tensor, Tensor]:
    """(M, K) uint8 codes (around 128 without a floor, from 0 with one) and (M, 1) float32 steps."""
    narrow = torch.bfloat16 if x_MK.dtype is torch.bfloat16 else torch.float32
    codes_MK = torch.empty(x_MK.shape, dtype=torch.int8, device=x_MK.device)
    step_M1 = torch.empty(x_MK.shape[0], 1, device=x_MK.device)
    # A few rows at a time: five passes over memory become one.
    rows = max(1, (1 << 17) // x_MK.shape[1])
    for x, codes, step in zip(x_MK.split(rows), codes_MK.split(rows), step_M1.split(rows), strict=True):
        x = x.float()
        if floor is None:
            step.copy_(_step(x.abs().amax(1, keepdim=True), 127, narrow))
            codes.copy_((x / step).round_())
        else:
            step.copy_(_step(x.amax(1, keepdim=True) + floor, 255, narrow))
            codes.copy_((x + floor).div_(step).round_().clamp_(0, 255).sub_(128))
    return _unsigned(codes_MK), step_M1


def _unsigned(codes: Tensor) -> Tensor:
    """int8 numbers + 128 as uint8, in place (a conversion from float to uint8 takes five times as long)."""
    return codes.view(torch.uint8).bitwise_xor_(128)


def _widened(
    x_MK: Tensor, codes_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, step_M1: Tensor | None = None
) -> Tensor:
    """The product with weights widened to the dtype of x, some thousands of outputs at a time."""
    parts = []
    for codes, scale in zip(codes_NK.split(4096), scale_N.split(4096), strict=True):
        if x_MK.dtype is torch.float16:  # its sums must not be those of unscaled codes, which pass 65,504
            parts.append(F.linear(x_MK, (codes * scale[:, None]).to(x_MK.dtype)))
        else:  # the codes are exact in bfloat16, their products with the scales are not
            parts.append(F.linear(x_MK, codes.to(x_MK.dtype)) * scale.to(x_MK.dtype))
    y_MN = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    y_MN = y_MN if step_M1 is None else y_MN * step_M1
    return y_MN if bias_N is None else y_MN + bias_N.to(y_MN.dtype)


def _checksum(*tensors: Tensor | None) -> int:
    total = 0
    for x in tensors:
        if x is not None:
            total = zlib.crc32(x.cpu().contiguous().view(torch.uint8).numpy().data, total)
    return total


def _pack(codes_NK: Tensor) -> Tensor:
    """(N, K) int32 codes, N whole blocks -> (N / 64, K, 32) bytes."""
    N, K = codes_NK.shape
    blocks_BhnK = codes_NK.to(torch.uint8).view(N // _BLOCK, 2, _BLOCK // 2, K)
    return (blocks_BhnK[:, 0] | (blocks_BhnK[:, 1] << 4)).transpose(1, 2).contiguous()


@cache
def _integer_product() -> bool:
    """Whether oneDNN multiplies u8 with s8 here, and exactly: at the largest values, 16-bit sums would saturate."""
    codes = torch.full((2, 64), 127, dtype=torch.int8)
    x = torch.tensor([[255], [1]], dtype=torch.uint8).expand(2, 64).contiguous()
    try:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        ones, zeros = torch.ones(2), torch.zeros(2, dtype=torch.int32)
        y = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "none"
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(y, (x.double() @ codes.double().t()).float())
