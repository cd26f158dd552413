"""The typed description of a decoder-only model: sizes and switches, nothing about devices.

Every field is the Megatron flag of the same name, so the class is at once a group of command line
flags, the model part of a checkpoint's `args`, and what a family translates `config.json` to. It
needs neither torch nor megatron. Sizes that Megatron derives are derived here, once: after
construction no field is None. (To vary a model with `dataclasses.replace`, give derived sizes too.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a model; validates itself and fills in derived sizes."""

    num_layers: int
    """Number of transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Number of query heads."""
    max_position_embeddings: int
    """Longest sequence the model is made for, in tokens."""
    vocab_size: int = 0
    """Rows of the embedding table before padding; 0 = take it from the tokenizer."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; default 4 * hidden size, with --swiglu 2/3 of it in multiples of 64."""
    group_query_attention: bool = field(default=False, compare=False)
    """Megatron's switch for grouped-query attention; here --num-query-groups alone is enough."""
    num_query_groups: int | None = None
    """Number of key/value heads; default one for each query head."""
    kv_channels: int | None = None
    """Size of one attention head; default hidden size / number of heads."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of normalization layers."""
    norm_epsilon: float = 1e-5
    """Added to the variance before its root is taken."""
    swiglu: bool = False
    """Gated MLP: silu(gate) * up; without it the MLP is gelu."""
    position_embedding_type: Literal["rope"] = "rope"
    """How positions enter the model."""
    use_rotary_position_embeddings: bool = field(default=True, compare=False)
    """Megatron's older name of --position-embedding-type rope."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies (rope_theta)."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of the embedding table."""
    add_bias_linear: bool = field(default=True, metadata={"off": "--disable-bias-linear"})
    """Biases in all linear layers of attention and MLP."""
    add_qkv_bias: bool = False
    """Bias of query, key and value even with --disable-bias-linear."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        _check_positive(self)
        _check_switches(self)
        if self.kv_channels is None:
            _check_hidden_size(self)
        self._derive("num_query_groups", self.num_attention_heads)
        grouped = self.num_query_groups != self.num_attention_heads
        object.__setattr__(self, "group_query_attention", grouped)
        self._derive("kv_channels", self.hidden_size // self.num_attention_heads)
        self._derive("ffn_hidden_size", _default_ffn_hidden_size(self.hidden_size, self.swiglu))
        _check_heads(self)

    def _derive(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @property
    def query_groups(self) -> int:
        """Number of key/value heads, typed as the number it always is."""
        assert self.num_query_groups is not None
        return self.num_query_groups

    @property
    def head_dim(self) -> int:
        """Size of one attention head, typed as the number it always is."""
        assert self.kv_channels is not None
        return self.kv_channels

    @property
    def ffn_size(self) -> int:
        """Width of the MLP, typed as the number it always is."""
        assert self.ffn_hidden_size is not None
        return self.ffn_hidden_size

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value have a bias."""
        return self.add_bias_linear or self.add_qkv_bias


_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
_DERIVED = ("ffn_hidden_size", "num_query_groups", "kv_channels")
_NUMBERS = ("norm_epsilon", "rotary_base", "init_method_std")


def _default_ffn_hidden_size(hidden_size: int, swiglu: bool) -> int:
    return int(4 * hidden_size * 2 / 3 / 64) * 64 if swiglu else 4 * hidden_size


def _flag(name: str, value: object = "") -> str:
    return f"--{name.replace('_', '-')} {value}".rstrip()


def _check_positive(arch: Architecture) -> None:
    for name in (*_SIZES, *_DERIVED):
        value = getattr(arch, name)
        if value is not None and value < 1:
            raise ValueError(f"{_flag(name, value)}: must be at least 1")
    if arch.vocab_size < 0:
        flag = _flag("vocab_size", arch.vocab_size)
        raise ValueError(f"{flag}: must be at least 1, or 0 for the tokenizer's")
    for name in _NUMBERS:
        value = getattr(arch, name)
        if not value > 0:
            raise ValueError(f"{_flag(name, value)}: must be greater than 0")


def _check_switches(arch: Architecture) -> None:
    if arch.normalization not in ("LayerNorm", "RMSNorm"):
        flag = _flag("normalization", arch.normalization)
        raise ValueError(f"{flag}: valid are LayerNorm, RMSNorm")
    if arch.position_embedding_type != "rope" or not arch.use_rotary_position_embeddings:
        raise ValueError("--position-embedding-type: only rope is supported")
    if arch.group_query_attention and arch.num_query_groups is None:
        raise ValueError(
            "--group-query-attention: give the number of key/value heads with --num-query-groups"
        )


def _check_hidden_size(arch: Architecture) -> None:
    hidden_size, heads = arch.hidden_size, arch.num_attention_heads
    if hidden_size % heads:
        raise ValueError(
            f"{_flag('hidden_size', hidden_size)}: must be divisible by "
            f"{_flag('num_attention_heads', heads)} (nearest: {_nearest(hidden_size, heads)}), "
            "or give the size of a head with --kv-channels"
        )


def _check_heads(arch: Architecture) -> None:
    heads, groups = arch.num_attention_heads, arch.query_groups
    if heads % groups:
        valid = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{_flag('num_query_groups', groups)}: must divide "
            f"{_flag('num_attention_heads', heads)} (valid: {valid})"
        )
    if arch.head_dim % 2:
        raise ValueError(
            f"{_flag('kv_channels', arch.head_dim)}: must be even (rotary positions turn pairs of "
            f"channels), for example {arch.head_dim + 1}"
        )
    if arch.ffn_size < 1:
        raise ValueError(
            f"{_flag('hidden_size', arch.hidden_size)}: too small to derive "
            f"{_flag('ffn_hidden_size')}, give it"
        )


def _nearest(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return " or ".join(str(n) for n in (below, below + divisor) if n > 0)
