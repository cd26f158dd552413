"""From logits to tokens: pure functions, with the definitions of transformers' logits processors.

Shapes: `B` texts, `V` vocabulary, `T` tokens so far. Logits are float32 here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ml_eval.config import Sampling
from ml_models.flags import UsageError


def choose(
    logits: torch.Tensor,
    ids: torch.Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Choose the next token of each text.

    Random numbers are drawn on the CPU, so that a seed means the same on every device.

    Args:
        logits: `(B, V)`, of the true vocabulary only.
        ids: `(B, T)` int64, the texts so far.
        sampling: How to choose.
        generators: A CPU generator for each text, so that none depends on what it is batched with.

    Returns:
        `(B,)` int64, on the device of `ids`.

    Raises:
        UsageError: A logit is nan, or the largest one infinite.
    """
    if not logits.amax(dim=-1).isfinite().all():  # one nan makes the largest one nan
        raise UsageError(
            "the model computes nan or infinite logits, which choose no token: the weights in "
            "--load-dir have diverged, or are too large for --params-dtype; give another checkpoint"
        )
    logits = repetition_penalty(logits.float(), ids, sampling.repetition_penalty)
    if not sampling.do_sample:
        return logits.argmax(dim=-1)
    rows = probabilities(logits, sampling).cpu()
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(rows, generators, strict=True)
    ]
    return torch.cat(drawn).to(ids.device)


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the distribution `(B, V)` that tokens are drawn from."""
    logits = logits / sampling.temperature
    return torch.softmax(top_p(top_k(logits, sampling.top_k), sampling.top_p), dim=-1)


def top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Rule out all but the `k` most likely tokens, and those as likely as the last of them."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = torch.topk(logits, k).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Rule out all but the fewest most likely tokens whose probabilities sum up to `p`.

    Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751); the most likely token always stays.
    """
    if p == 1.0:
        return logits
    ascending, order = torch.sort(logits)
    removed = torch.softmax(ascending, dim=-1).cumsum(dim=-1) <= 1 - p
    removed[..., -1] = False
    return logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)


def repetition_penalty(logits: torch.Tensor, ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that occur in `ids` less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    if penalty == 1.0:
        return logits
    seen = logits.gather(-1, ids)
    return logits.scatter(-1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
