"""What surrounds attention and experts: norms, MLP, biases, embeddings and the output layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ml_models.architecture.rules import needs, one_of, positive

_GATED = ("swiglu", "geglu", "quick_geglu")


@dataclass(frozen=True, kw_only=True)
class Block:
    """The part of an architecture that says what a layer, and the model around layers, computes."""

    hidden_size: int
    """Width of the residual stream."""
    vocab_size: int = 0
    """Rows of the embedding table before padding; 0 = take it from the tokenizer."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; default 4 * hidden size, with a gated MLP 2/3 of it in multiples of 64."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Kind of normalization layers."""
    norm_epsilon: float = 1e-5
    """Added to the variance before its root is taken."""
    add_rmsnorm_offset: bool = field(default=False, metadata={"aliases": ("--apply-layernorm-1p",)})
    """Norms multiply by 1 + weight (Gemma)."""
    post_norm: bool = False
    """Normalize what attention and MLP add to the residual stream, too (Grok-1, Gemma 2)."""
    swiglu: bool = False
    """Gated MLP: silu(gate) * up; without a gate the MLP is gelu."""
    geglu: bool = False
    """Gated MLP: gelu(gate) * up, with the tanh approximation of gelu."""
    quick_geglu: bool = False
    """Gated MLP: gate * sigmoid(1.702 gate) * up (gpt-oss)."""
    activation_func_clamp_value: float | None = field(default=None, metadata=needs("quick_geglu"))
    """quick_geglu: gate is at most this, up at most this in either direction."""
    glu_linear_offset: float = field(default=0.0, metadata=needs("quick_geglu"))
    """quick_geglu: added to up."""
    approximate_gelu: bool = False
    """Without a gate: the tanh approximation of gelu (GPT-2, Bloom)."""
    add_bias_linear: bool = field(default=True, metadata={"off": "--disable-bias-linear"})
    """Biases in all linear layers of attention, MLP, experts and router."""
    add_qkv_bias: bool = False
    """Bias of query, key and value even with --disable-bias-linear."""
    add_dense_bias: bool = False
    """Bias of the output of attention even with --disable-bias-linear."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output layer its own weight instead of the embedding table."""
    embed_layernorm: bool = False
    """Normalize embeddings (Bloom)."""
    input_embeds_norm: bool = False
    """Multiply embeddings by sqrt(hidden size) (Gemma)."""
    embedding_multiplier_scale: float = 1.0
    """Multiplies embeddings (Grok-1)."""
    output_multiplier_scale: float = 1.0
    """Multiplies logits (Grok-1)."""
    final_logit_softcapping: float | None = None
    """Squash logits z to c * tanh(z / c) for this c (Gemma 2)."""
    norm_head: bool = False
    """Divide each row of the output layer by its length when it is used (Baichuan 2)."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""

    def _check_block(self) -> None:
        one_of(self, "normalization", ("LayerNorm", "RMSNorm"))
        positive(self, ("norm_epsilon", "init_method_std", "activation_func_clamp_value"))
        positive(self, ("embedding_multiplier_scale", "output_multiplier_scale"))
        positive(self, ("final_logit_softcapping",))
        chosen = [name for name in _GATED if getattr(self, name)]
        if len(chosen) > 1:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in chosen)
            raise ValueError(f"{names}: choose one")
        if chosen and self.approximate_gelu:
            raise ValueError(f"--approximate-gelu: means nothing with --{chosen[0]}")
        if self.add_rmsnorm_offset and self.normalization != "RMSNorm":
            raise ValueError("--add-rmsnorm-offset: needs --normalization RMSNorm")
        if self.norm_head and not self.untie_embeddings_and_output_weights:
            raise ValueError("--norm-head: needs --untie-embeddings-and-output-weights")

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies by a gate: its first layer is [gate; up]."""
        return self.swiglu or self.geglu or self.quick_geglu

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value have a bias."""
        return self.add_bias_linear or self.add_qkv_bias

    @property
    def has_dense_bias(self) -> bool:
        """Whether the output of attention has a bias."""
        return self.add_bias_linear or self.add_dense_bias
