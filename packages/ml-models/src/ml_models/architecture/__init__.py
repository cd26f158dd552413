"""The typed description of a decoder-only model: sizes and switches, nothing about devices.

Every field is the Megatron or ModelLink flag of the same name, so the class is at once a group of
command line flags, the model part of a checkpoint's `args`, and what a family translates
`config.json` to. It needs neither torch nor megatron. Sizes that Megatron derives are derived here,
once: after construction no size of a plain model is None. (To vary a model with
`dataclasses.replace`, give derived sizes too.)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ml_models.architecture.attention import Attention
from ml_models.architecture.block import Block
from ml_models.architecture.experts import Experts
from ml_models.architecture.positions import Positions
from ml_models.architecture.rules import at_least_one, check_needs, flag

__all__ = ["Architecture"]

_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True, kw_only=True)
class Architecture(Experts, Positions, Attention, Block):
    """The shape of a model; validates itself and fills in derived sizes."""

    def __post_init__(self) -> None:
        self._set_patterns()
        at_least_one(self, (*_SIZES, "ffn_hidden_size"))
        if self.vocab_size < 0:
            given = flag("vocab_size", self.vocab_size)
            raise ValueError(f"{given}: must be at least 1, or 0 for the tokenizer's")
        check_needs(self)
        self._check_block()
        self._check_positions()
        self._check_attention()
        self._check_experts()
        if self.add_bias_linear:  # the others say nothing then
            self._set("add_qkv_bias", False)
            self._set("add_dense_bias", False)
            if self.shared_expert_size or self.n_shared_experts:
                raise ValueError("--n-shared-experts: have no biases: give --disable-bias-linear")
        if self.kv_channels is None and not self.multi_latent_attention:
            _check_hidden_size(self)
        self._derive_sizes()
        _check_heads(self)

    def check_given(self, names: Collection[str]) -> None:
        """Check fields that were given, though at their default; `ml_models.flags` knows which."""
        check_needs(self, names)

    def _derive_sizes(self) -> None:
        if self.multi_latent_attention:
            self._set("kv_channels", self.query_head_dim)
        self._derive("num_query_groups", self.num_attention_heads)
        grouped = self.num_query_groups != self.num_attention_heads
        self._set("group_query_attention", grouped)
        self._derive("kv_channels", self.hidden_size // self.num_attention_heads)
        self._derive("ffn_hidden_size", _default_ffn_hidden_size(self.hidden_size, self.is_gated))
        if self.num_experts is not None:
            self._derive("moe_ffn_hidden_size", self.ffn_size)
            self._count_shared_experts()
        self._set("use_rotary_position_embeddings", self.position_embedding_type == "rope")

    def _set_patterns(self) -> None:
        """Take patterns of layers as Megatron's args hold them, too: one number, or a list."""
        for name in ("moe_layer_freq", "window_attn_skip_freq", "no_rope_freq"):
            value = getattr(self, name)
            if isinstance(value, int):
                self._set(name, (value,))
            elif value is not None:
                self._set(name, tuple(value))

    def _count_shared_experts(self) -> None:
        """Say in the one way that config.json files know how wide shared experts are."""
        size, one = self.moe_shared_expert_intermediate_size, self.expert_size
        if size and size % one == 0 and self.n_shared_experts in (None, size // one):
            self._set("n_shared_experts", size // one)
            self._set("moe_shared_expert_intermediate_size", None)

    def _derive(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def query_groups(self) -> int:
        """Number of key/value heads, typed as the number it always is."""
        assert self.num_query_groups is not None
        return self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Size of one head of query and key, typed as the number it always is."""
        assert self.kv_channels is not None
        return self.kv_channels

    @property
    def value_head_dim(self) -> int:
        """Size of one head of the values."""
        return self.v_head_dim or self.head_dim

    @property
    def query_head_dim(self) -> int:
        """With latent attention: channels of a query's head, those without position first."""
        return (self.qk_head_dim or 0) + (self.qk_pos_emb_head_dim or 0)

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head turn with the position."""
        if self.multi_latent_attention:
            return self.qk_pos_emb_head_dim or 0
        return int(self.head_dim * self.rotary_percent)

    @property
    def ffn_size(self) -> int:
        """Width of the MLP, typed as the number it always is."""
        assert self.ffn_hidden_size is not None
        return self.ffn_hidden_size

    @property
    def expert_size(self) -> int:
        """Width of one expert; 0 if there are none."""
        return self.moe_ffn_hidden_size or 0


def _default_ffn_hidden_size(hidden_size: int, gated: bool) -> int:
    return int(4 * hidden_size * 2 / 3 / 64) * 64 if gated else 4 * hidden_size


def _check_hidden_size(arch: Architecture) -> None:
    hidden_size, heads = arch.hidden_size, arch.num_attention_heads
    if hidden_size % heads:
        raise ValueError(
            f"{flag('hidden_size', hidden_size)}: must be divisible by "
            f"{flag('num_attention_heads', heads)} (nearest: {_nearest(hidden_size, heads)}), "
            "or give the size of a head with --kv-channels"
        )


def _check_heads(arch: Architecture) -> None:
    heads, groups = arch.num_attention_heads, arch.query_groups
    if heads % groups:
        valid = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{flag('num_query_groups', groups)}: must divide "
            f"{flag('num_attention_heads', heads)} (valid: {valid})"
        )
    if arch.multi_latent_attention and heads != groups:
        raise ValueError("--multi-latent-attention: has no --num-query-groups")
    has_alibi = arch.position_embedding_type == "alibi"
    if arch.attn_logit_softcapping and (has_alibi or arch.softmax_type != "vanilla"):
        other = "--position-embedding-type alibi" if has_alibi else "--softmax-type learnable"
        raise ValueError(f"--attn-logit-softcapping: cannot be combined with {other}")
    if arch.position_embedding_type == "rope" and (arch.rotary_dim % 2 or not arch.rotary_dim):
        raise ValueError(
            f"{flag('kv_channels', arch.head_dim)}: must be even (rotary positions turn pairs of "
            f"channels), for example {arch.head_dim + 1}"
        )
    if arch.ffn_size < 1:
        raise ValueError(
            f"{flag('hidden_size', arch.hidden_size)}: too small to derive "
            f"{flag('ffn_hidden_size')}, give it"
        )


def _nearest(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return " or ".join(str(n) for n in (below, below + divisor) if n > 0)
