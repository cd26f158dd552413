"""Softmax of scaled and masked scores. Shapes: `B` batch, `N` heads, `Sq` queries, `Sk` keys."""

from __future__ import annotations

import torch

from ml_kernels.checks import check_finite, check_floating, check_same_device, check_tensor, require
from ml_kernels.dispatch import Backend, BackendUnavailableError, implementation


def scaled_masked_softmax(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float = 1.0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Return the softmax over the keys of `scale * x`, where the mask does not hide them.

    `flash_attention` needs no scores in memory; this is for attention that does, as in Megatron's
    unfused path.

    Args:
        x: `(B, N, Sq, Sk)`; the softmax is taken in float32 and rounded once.
        mask: bool, broadcastable to `x`, True where a key is hidden; or None. A visible score must
            be above the lowest float32: one that is not counts like a hidden one.
        scale: Factor of the scores.
        backend: Force an implementation by name. An NPU's kernel takes lengths that are multiples
            of 32 up to 4096: others go through torch's formula, or are refused if "npu" is named.

    Returns:
        `(B, N, Sq, Sk)` in the dtype of `x`; 0 in a row whose keys are all hidden.

    Raises:
        ValueError: Shapes or devices do not fit, or the scale is not finite.
        TypeError: `x` is not floating point or `mask` is no bool tensor.
        BackendUnavailableError: The named backend cannot compute this.
    """
    operator = "scaled_masked_softmax"
    check_floating(operator, "x", x)
    require(x.dim() == 4, operator, "x", tuple(x.shape), "must be (B, N, Sq, Sk)")
    check_finite(operator, scale=scale)
    if mask is not None:
        check_tensor(operator, "mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"{operator}: mask is {mask.dtype}: must be torch.bool, True = hidden")
        check_same_device(operator, "mask", mask, x)
        rule = f"must be broadcastable to x {tuple(x.shape)}"
        require(_broadcasts(mask, x), operator, "mask", tuple(mask.shape), rule)
    run = implementation(operator, x, backend)
    try:
        return run(x, mask, scale)
    except BackendUnavailableError:
        if backend is not None:
            raise
        return scaled_masked_softmax_reference(x, mask, scale)


def scaled_masked_softmax_reference(
    x: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The formula. Hidden scores are the lowest number, not -inf: no row becomes NaN."""
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if mask is None:
        return torch.softmax(scores, dim=-1).to(x.dtype)
    lowest = torch.finfo(scores.dtype).min
    hidden = torch.softmax(scores.masked_fill(mask, lowest), dim=-1).masked_fill(mask, 0)
    return hidden.to(x.dtype)


def _broadcasts(mask: torch.Tensor, x: torch.Tensor) -> bool:
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    return mask.dim() <= x.dim() and all(size in (1, whole) for size, whole in sizes)
