"""Losses: weighted next-token cross-entropy without ever holding all logits, and feature distillation.

Sources: loss weights of InternVL 2.5 (arXiv 2412.05271, section 4: token, sample and square averaging);
negative cosine similarity of Mini-InternVL (arXiv 2410.16261, section 3).

Cross-entropy is the largest buffer of a language model: rows x vocabulary. Here only supervised rows meet the
head, a chunk of rows at a time, and each chunk's gradient is formed while its logits are at hand, so nothing
of size rows x vocabulary outlives its chunk and nothing is computed twice.

Shape legend: T tokens of a packed row, S supervised ones, B rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from chiasm.errors import ConfigError
from chiasm.shapes import Float, Int

__all__ = [
    "IGNORE",
    "Count",
    "cross_entropy",
    "cross_entropy_reference",
    "token_weights",
]

IGNORE = -100
"""Label of a row that is not supervised."""

Count = Literal["sample", "response"]
"""What a loss weight counts: the supervised rows of the document, or those of the response that a row is part of."""


def token_weights(
    labels_T: Int[Tensor, " T"], doc_T: Int[Tensor, " T"], power: float, count: Count = "sample"
) -> Float[Tensor, " T"]:
    """Return the loss weight of every row, ``x ** -power`` with x the supervised rows of its document or response.

    A response is an unbroken run of supervised rows inside one document: chat templates put at least one row that is
    not learned (the header of a turn) between two answers.

    Args:
        labels_T: labels, `IGNORE` where a row is not supervised.
        doc_T: number of the document that each row belongs to (any integers; need not be contiguous).
        power: 0 weighs tokens equally ("token"), 1 documents ("sample"), 0.5 is the "square" average.
        count: "sample" counts whole documents (the released code), "response" single answers (the paper's text).

    Returns:
        (T,) fp32, 0 where a row is not supervised.

    Raises:
        ConfigError: power is outside [0, 1], or the two arguments differ in length.
    """
    if not 0.0 <= power <= 1.0:
        raise ConfigError(f"loss power {power} is outside [0, 1]: 0 is token, 0.5 square, 1 sample averaging")
    if labels_T.shape != doc_T.shape:
        raise ConfigError(
            f"labels have shape {tuple(labels_T.shape)}, documents {tuple(doc_T.shape)}: make them equal"
        )
    supervised_T = labels_T != IGNORE
    if power == 0.0:
        return supervised_T.float()
    if count == "response":  # runs are numbered by their first rows; what lies between counts for nothing
        first_T = supervised_T.clone()
        first_T[1:] &= ~supervised_T[:-1] | (doc_T[1:] != doc_T[:-1])
        index_T = first_T.cumsum(0)
        index_T = torch.where(supervised_T, index_T - 1, 0)
    else:
        _, index_T = torch.unique(doc_T, return_inverse=True)
    counts_T = torch.zeros(doc_T.shape, dtype=torch.float32, device=doc_T.device)
    counts_T.index_add_(0, index_T, supervised_T.float())
    return counts_T[index_T].clamp_min(1.0).pow(-power) * supervised_T


def cross_entropy(
    hidden_TD: Float[Tensor, "T D"],
    head_weight_VD: Float[Tensor, "V D"],
    labels_T: Int[Tensor, " T"],
    weight_T: Float[Tensor, " T"],
    *,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of token losses and the sum of their weights; the mean is their quotient.

    They are returned apart so that micro-batches and processes can be added before dividing.

    Args:
        hidden_TD: last hidden states; cast to the dtype of the head if they differ.
        head_weight_VD: the head; its gradient is computed only if it requires one.
        labels_T: the token that row t must predict (already shifted), `IGNORE` for none.
        weight_T: weights of the rows, not differentiated; rows of weight 0 are skipped.
        chunk: rows whose logits exist at the same time.

    Returns:
        ``(loss_sum, weight_sum)``, fp32 scalars; both 0, and still differentiable, if no row is supervised.
        The gradient of ``loss_sum`` can be taken once, not twice.

    Raises:
        ConfigError: chunk is not positive.
    """
    if chunk < 1:
        raise ConfigError(f"cross-entropy chunk {chunk} must be at least 1")
    rows_S = ((labels_T != IGNORE) & (weight_T != 0)).nonzero().squeeze(1)
    weight_S = weight_T.detach()[rows_S].float()
    hidden_SD = hidden_TD[rows_S].to(head_weight_VD.dtype)
    loss_sum: Tensor = _ChunkedCrossEntropy.apply(
        hidden_SD, head_weight_VD, labels_T[rows_S], weight_S, chunk
    )
    return loss_sum, weight_S.sum()


def cross_entropy_reference(
    hidden_TD: Tensor, head_weight_VD: Tensor, labels_T: Tensor, weight_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Slow twin of `cross_entropy`: all logits at once through `torch.nn.functional.cross_entropy`."""
    logits_TV = F.linear(hidden_TD.to(head_weight_VD.dtype), head_weight_VD).float()
    loss_T = F.cross_entropy(logits_TV, labels_T, reduction="none", ignore_index=IGNORE)
    weight_T = weight_T.float() * (labels_T != IGNORE)
    return (loss_T * weight_T).sum(), weight_T.sum()


def _logits(hidden_BD: Tensor, head_weight_VD: Tensor) -> Tensor:
    """Return the fp32 logits of one chunk, freshly allocated (the caller overwrites them)."""
    return F.linear(hidden_BD, head_weight_VD).float()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies whose gradients are formed chunk by chunk during the forward pass.

    With e = exp(logits - max), s = sum(e) and y the one-hot label, the gradient of w * loss with respect to
    the logits is (w / s) * (e - s y). The factor w / s is applied to the D-wide side of each product, which
    saves two passes over the V-wide buffer.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_SD: Tensor, head_weight_VD: Tensor, labels_S: Tensor, weight_S: Tensor, chunk: int
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden_SD.device)
        grad_hidden_SD = torch.empty_like(hidden_SD) if need_hidden else None
        grad_weight_VD = torch.zeros_like(head_weight_VD, dtype=torch.float32) if need_weight else None
        for start in range(0, hidden_SD.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden_BD, labels_B1, weight_B = hidden_SD[part], labels_S[part].unsqueeze(1), weight_S[part]
            e_BV = _logits(hidden_BD, head_weight_VD)
            e_BV.sub_(e_BV.amax(dim=1, keepdim=True))
            picked_B = e_BV.gather(1, labels_B1).squeeze(1)
            s_B = e_BV.exp_().sum(dim=1)
            loss += ((s_B.log() - picked_B) * weight_B).sum()
            if not (need_hidden or need_weight):
                continue
            e_BV.scatter_add_(1, labels_B1, -s_B.unsqueeze(1))
            scale_B1 = (weight_B / s_B).unsqueeze(1)
            g_BV = e_BV.to(hidden_SD.dtype)
            if grad_hidden_SD is not None:
                grad_hidden_SD[part] = (g_BV @ head_weight_VD) * scale_B1
            if grad_weight_VD is not None:
                scaled_BD = (hidden_BD * scale_B1).to(g_BV.dtype)
                if g_BV.dtype == grad_weight_VD.dtype:
                    grad_weight_VD.addmm_(g_BV.T, scaled_BD)
                else:
                    grad_weight_VD += g_BV.T @ scaled_BD
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(head_weight_VD.dtype)
        ctx.save_for_backward(grad_hidden_SD, grad_weight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden_SD, grad_weight_VD = ctx.saved_tensors
        return (
            None if grad_hidden_SD is None else grad_hidden_SD * grad.to(grad_hidden_SD.dtype),
            None if grad_weight_VD is None else grad_weight_VD * grad.to(grad_weight_VD.dtype),
            None,
            None,
            None,
        )
