"""Dropout, apart from the model: the same model is trained with and without it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout probabilities; off by default, as in every published recipe of these families."""

    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    hidden_dropout: float = 0.0
    """Probability of dropping an element before each residual addition, and of the embeddings."""

    def __post_init__(self) -> None:
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: must be at least 0 and less than 1"
                )
