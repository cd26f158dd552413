"""Attention: heads, windows, scales, and DeepSeek's latent attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ml_models.architecture.rules import at_least_one, flag, needs, one_of, per_layer, positive

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_WITH_LATENT = needs("multi_latent_attention")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The part of an architecture that says how tokens look at each other."""

    num_layers: int
    """Number of transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Number of query heads."""
    group_query_attention: bool = field(default=False, compare=False)
    """Megatron's switch for grouped-query attention; here --num-query-groups alone is enough."""
    num_query_groups: int | None = None
    """Number of key/value heads; default one for each query head."""
    kv_channels: int | None = None
    """Size of one attention head; default hidden size / number of heads."""
    qk_layernorm: bool = False
    """Normalize each head of query and key (with latent attention: the latent vectors)."""
    softmax_scale: float | None = None
    """Multiplies the scores; default 1 / sqrt(size of a head)."""
    attn_logit_softcapping: float | None = None
    """Squash scores s to c * tanh(s / c) for this c (Gemma 2, Grok-1)."""
    softmax_type: Literal["vanilla", "learnable"] = "vanilla"
    """learnable: each head has a logit that takes its share of the softmax (gpt-oss)."""
    sliding_window: int | None = None
    """A query sees this many keys, its own included, where the layer has a window."""
    window_attn_skip_freq: tuple[int, ...] | None = field(
        default=None, metadata=needs("sliding_window")
    )
    """Layers without a window: n for every n-th one, or for each layer 0 (none) or 1 (window)."""
    multi_latent_attention: bool = field(
        default=False, metadata={"aliases": ("--multi-head-latent-attention",)}
    )
    """DeepSeek's attention: keys and values are computed from one short latent vector."""
    q_lora_rank: int | None = field(default=None, metadata=_WITH_LATENT)
    """Size of the latent vector of queries; none: queries are projected directly."""
    kv_lora_rank: int | None = field(default=None, metadata=_WITH_LATENT)
    """Size of the latent vector of keys and values."""
    qk_head_dim: int | None = field(
        default=None, metadata={"aliases": ("--qk-nope-head-dim",), **_WITH_LATENT}
    )
    """Channels of a head of query and key that carry no position."""
    qk_pos_emb_head_dim: int | None = field(
        default=None, metadata={"aliases": ("--qk-rope-head-dim",), **_WITH_LATENT}
    )
    """Channels of a head of query and key that carry the position."""
    v_head_dim: int | None = field(default=None, metadata=_WITH_LATENT)
    """Size of a head of the values."""

    def _check_attention(self) -> None:
        at_least_one(self, ("num_query_groups", "kv_channels", "sliding_window", *_LATENT))
        positive(self, ("softmax_scale", "attn_logit_softcapping"))
        one_of(self, "softmax_type", ("vanilla", "learnable"))
        windows = self.windows
        if len(self.window_attn_skip_freq or ()) > 1:
            object.__setattr__(self, "window_attn_skip_freq", _shortest(windows))
        if self.group_query_attention and self.num_query_groups is None:
            raise ValueError(
                "--group-query-attention: give the number of key/value heads with "
                "--num-query-groups"
            )
        if self.multi_latent_attention:
            self._check_latent()

    def _check_latent(self) -> None:
        missing = [n for n in _LATENT[1:] if getattr(self, n) is None]
        if missing:
            raise ValueError(f"--multi-latent-attention: also needs {flag(missing[0])}")
        if self.sliding_window or self.softmax_type != "vanilla":
            raise ValueError("--multi-latent-attention: has no --sliding-window, no --softmax-type")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many keys a query sees; None = all before it."""
        pattern, name = self.window_attn_skip_freq, "window_attn_skip_freq"
        if self.sliding_window is None:
            return (None,) * self.num_layers
        marked = per_layer(name, pattern, self.num_layers)
        every_nth = pattern is None or (len(pattern) == 1 and self.num_layers > 1)
        has_window = [not mark for mark in marked] if every_nth else marked
        return tuple(self.sliding_window if window else None for window in has_window)


def _shortest(windows: tuple[int | None, ...]) -> tuple[int, ...] | None:
    """Say with fewer numbers which layers have windows, so that equal models are equal."""
    full = tuple(window is None for window in windows)
    if not any(full):
        return None
    for n in range(2, len(full) + 1):
        if full == tuple((layer + 1) % n == 0 for layer in range(len(full))):
            return (n,)
    return tuple(int(not is_full) for is_full in full)
