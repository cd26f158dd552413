"""Positions: how a model knows where a token stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ml_models.architecture.rules import flag, needs, one_of, per_layer, positive

PositionEmbeddingType = Literal["learned_absolute", "rope", "alibi", "none"]
RopeScalingType = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]

_NEEDS = {
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "dynamic": ("original_max_position_embeddings",),
    "longrope": (
        "original_max_position_embeddings",
        "rope_scaling_short_factors",
        "rope_scaling_long_factors",
    ),
}
_WITH_ROPE = needs(position_embedding_type="rope")
_STRETCHED = needs("rope_scaling_type")
_YARN = needs(rope_scaling_type="yarn")


@dataclass(frozen=True, kw_only=True)
class Positions:
    """The part of an architecture that says how positions enter the model."""

    num_layers: int
    """Number of transformer layers."""
    max_position_embeddings: int
    """Longest sequence the model is made for, in tokens."""
    position_embedding_type: PositionEmbeddingType = "rope"
    """How positions enter the model."""
    use_rotary_position_embeddings: bool = field(default=True, compare=False)
    """Megatron's older name of --position-embedding-type rope."""
    square_alibi_mask: bool = field(default=False, compare=False)
    """ModelLink's choice of how ALiBi is added up; the result is the same."""
    fill_neg_inf: bool = field(default=False, compare=False)
    """ModelLink's choice of how ALiBi hides later tokens; the result is the same."""
    rotary_base: float = field(default=10000.0, metadata=_WITH_ROPE)
    """Base of the rotary frequencies (rope_theta)."""
    rotary_percent: float = field(default=1.0, metadata=_WITH_ROPE)
    """Share of a head's channels that turn with the position, the first ones."""
    rotary_interleaved: bool = field(default=False, metadata=_WITH_ROPE)
    """Channels 2i and 2i + 1 turn as a pair (ChatGLM, GLM-4), not i and i + half."""
    no_rope_freq: tuple[int, ...] | None = field(default=None, metadata=_WITH_ROPE)
    """Layers without positions: n for every n-th one, or for each layer 0 (positions) or 1."""
    rotary_base_local: float | None = field(default=None, metadata=needs("sliding_window"))
    """Base of the rotary frequencies of layers with a window, unscaled (Gemma 3)."""
    rope_scaling_type: RopeScalingType | None = field(default=None, metadata=_WITH_ROPE)
    """Stretch the rotary frequencies for longer sequences than were trained on."""
    rope_scaling_factor: float = field(default=1.0, metadata=_STRETCHED)
    """How many times longer."""
    original_max_position_embeddings: int | None = field(
        default=None,
        metadata={"aliases": ("--rope-scaling-original-max-position-embeddings",), **_STRETCHED},
    )
    """Sequence length before stretching, in tokens."""
    low_freq_factor: float | None = field(default=None, metadata=needs(rope_scaling_type="llama3"))
    """llama3: pairs that turn fewer times than this in the original length are stretched fully."""
    high_freq_factor: float | None = field(default=None, metadata=needs(rope_scaling_type="llama3"))
    """llama3: pairs that turn more often than this are left alone."""
    rope_scaling_beta_fast: float = field(default=32.0, metadata=_YARN)
    """yarn: pairs that turn at least this often in the original length are left alone."""
    rope_scaling_beta_slow: float = field(default=1.0, metadata=_YARN)
    """yarn: pairs that turn at most this often are stretched fully."""
    rope_scaling_mscale: float = field(default=1.0, metadata=_YARN)
    """yarn: strength of the scale of sine and cosine."""
    rope_scaling_mscale_all_dim: float = field(default=0.0, metadata=_YARN)
    """yarn: part of the scale that multiplies the scores with latent attention (squared)."""
    rope_scaling_attention_factor: float | None = field(
        default=None, metadata=needs(rope_scaling_type=("yarn", "longrope"))
    )
    """yarn, longrope: the scale of sine and cosine itself, in place of the rule."""
    rope_scaling_truncate: bool = field(default=True, metadata=_YARN)
    """yarn: round the ends of the ramp to whole pairs (gpt-oss does not)."""
    rope_scaling_short_factors: tuple[float, ...] | None = field(
        default=None, metadata=needs(rope_scaling_type="longrope")
    )
    """longrope: divisor of each frequency up to the original length."""
    rope_scaling_long_factors: tuple[float, ...] | None = field(
        default=None, metadata=needs(rope_scaling_type="longrope")
    )
    """longrope: divisor of each frequency beyond the original length."""

    def _check_positions(self) -> None:
        valid = ("learned_absolute", "rope", "alibi", "none")
        one_of(self, "position_embedding_type", valid)
        if not self.use_rotary_position_embeddings and self.position_embedding_type == "rope":
            raise ValueError(
                "--no-use-rotary-position-embeddings: contradicts --position-embedding-type rope"
            )
        one_of(self, "rope_scaling_type", (None, "linear", *_NEEDS))
        numbers = ("rotary_base", "rotary_base_local", "low_freq_factor", "high_freq_factor")
        positive(self, (*numbers, "original_max_position_embeddings"))
        if not 0 < self.rotary_percent <= 1:
            given = flag("rotary_percent", self.rotary_percent)
            raise ValueError(f"{given}: must be greater than 0 and at most 1")
        if self.rope_scaling_factor < 1:
            given = flag("rope_scaling_factor", self.rope_scaling_factor)
            raise ValueError(f"{given}: must be at least 1")
        for name in _NEEDS.get(self.rope_scaling_type or "", ()):
            if getattr(self, name) is None:
                raise ValueError(
                    f"--rope-scaling-type {self.rope_scaling_type}: needs {flag(name)}"
                )
        turned = self.layers_with_rope
        if len(self.no_rope_freq or ()) > 1:
            object.__setattr__(self, "no_rope_freq", _shortest(turned))

    @property
    def layers_with_rope(self) -> tuple[bool, ...]:
        """Whether query and key of each layer turn with the position."""
        if self.position_embedding_type != "rope":
            return (False,) * self.num_layers
        return tuple(not no for no in per_layer("no_rope_freq", self.no_rope_freq, self.num_layers))


def _shortest(turned: tuple[bool, ...]) -> tuple[int, ...] | None:
    """Say with fewer numbers which layers have no positions, so that equal models are equal."""
    if all(turned):
        return None
    for n in range(1, len(turned) + 1):
        if turned == tuple((layer + 1) % n != 0 for layer in range(len(turned))):
            return (n,)
    return tuple(int(not turns) for turns in turned)
