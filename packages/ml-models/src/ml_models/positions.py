"""Rotary positions of every layer of a model: its tables, and turning queries and keys by them.

megatron-core makes one table for all layers. Here a layer asks for its own: layers with a window
may have another base (Gemma 3), some layers have none (SmolLM 3), and two ways of stretching depend
on the length of the sequence. Equal tables are shared, so a model holds one or two.

Shapes: `S` tokens, `B` batch, `N` heads, `D` head size, `R` channels that turn, a head's first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

import ml_kernels
from ml_kernels.frequencies import RotaryFrequencies
from ml_models.architecture import Architecture
from ml_models.packing import PackedSequences


class _Table(NamedTuple):
    number: int
    """See `table_number`."""
    angles: torch.Tensor
    """`(positions, 1, 1, R)` float32."""
    scale: float
    """Of sine and cosine."""


class Rotary:
    """Turns queries and keys; one for all layers of a model."""

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch
        self._turns = arch.layers_with_rope
        has_local = arch.rotary_base_local is not None
        self._is_local = tuple(has_local and window is not None for window in arch.windows)
        # DeepSeek's latent attention pairs neighbours, in megatron-core and transformers alike.
        self._interleaved = arch.rotary_interleaved or arch.multi_latent_attention
        self._tables: dict[tuple[bool, torch.device], _Table] = {}

    def turn(self, x: torch.Tensor, layer: int, length: int) -> torch.Tensor:
        """Turn queries or keys by their positions.

        Args:
            x: `(S, B, N, D)`, the last `S` tokens of the sequence.
            layer: Global number of the layer, from 0.
            length: Tokens of the sequence up to the last of `x`.
        """
        if not self._turns[layer]:
            return x
        table = self._table(layer, length, x.device)
        return self._turn(x, table.angles[length - x.shape[0] : length], table.scale)

    def turn_packed(self, x: torch.Tensor, layer: int, packed: PackedSequences) -> torch.Tensor:
        """Turn queries or keys of sequences that share a row.

        Where the table depends on the length of the sequence, that of the longest one counts.

        Args:
            x: `(S, 1, N, D)`.
            layer: Global number of the layer, from 0.
            packed: Where they are.
        """
        if not self._turns[layer]:
            return x
        table = self._table(layer, packed.longest, x.device)
        return self._turn(x, table.angles[packed.positions], table.scale)

    def _turn(self, x: torch.Tensor, angles: torch.Tensor, scale: float) -> torch.Tensor:
        return ml_kernels.rotary_embedding(x, angles, interleaved=self._interleaved, scale=scale)

    def _table(self, layer: int, length: int, device: torch.device) -> _Table:
        """Return a table of at least `length` positions; kept until it is too short or another."""
        key = self._is_local[layer], device
        number = 0 if self._is_local[layer] else table_number(self._arch, length)
        found = self._tables.get(key)
        if found is None or found.number != number:
            found = self._tables[key] = self._make(layer, length, length, number, device)
        elif len(found.angles) < length:
            # When a text is written, the length grows by one at a time.
            positions = max(length, 2 * len(found.angles))
            found = self._tables[key] = self._make(layer, length, positions, number, device)
        return found

    def _make(
        self, layer: int, length: int, positions: int, number: int, device: torch.device
    ) -> _Table:
        # A table made for inference could not be used for training afterwards.
        with torch.inference_mode(False):
            if self._is_local[layer]:
                base = self._arch.rotary_base_local or 0.0
                inverse, scale = ml_kernels.rotary_frequencies(self._arch.rotary_dim, base)
            else:
                inverse, scale = frequencies(self._arch, length)
            angles = ml_kernels.rotary_angles(
                inverse.to(device),
                torch.arange(positions, device=device),
                interleaved=self._interleaved,
            )
        return _Table(number, angles, scale)


def table_number(arch: Architecture, length: int) -> int:
    """Number the tables of a model whose table depends on the length of the sequence.

    Keys that one table turned are of no use to queries that another one turns.
    """
    original = arch.original_max_position_embeddings or arch.max_position_embeddings
    match arch.rope_scaling_type:
        case "dynamic":
            return max(length, original)
        case "longrope":
            return int(length > original)
        case _:
            return 0


def frequencies(arch: Architecture, length: int) -> RotaryFrequencies:
    """Return how fast each pair of channels turns in a sequence of so many tokens.

    As Hugging Face's `modeling_rope_utils` does.
    """
    dim, base, factor = arch.rotary_dim, arch.rotary_base, arch.rope_scaling_factor
    original = arch.original_max_position_embeddings or arch.max_position_embeddings
    match arch.rope_scaling_type:
        case None:
            return ml_kernels.rotary_frequencies(dim, base)
        case "linear":
            return ml_kernels.linear_frequencies(dim, base, factor=factor)
        case "dynamic":
            return ml_kernels.dynamic_ntk_frequencies(
                dim,
                base,
                factor=factor,
                seq_length=length,
                original_max_position_embeddings=original,
            )
        case "llama3":
            return ml_kernels.llama3_frequencies(
                dim,
                base,
                factor=factor,
                low_freq_factor=arch.low_freq_factor or 1.0,
                high_freq_factor=arch.high_freq_factor or 4.0,
                original_max_position_embeddings=original,
            )
        case "yarn":
            return _yarn(arch, original)
        case "longrope":
            return _longrope(arch, original, length)


def _yarn(arch: Architecture, original: int) -> RotaryFrequencies:
    return ml_kernels.yarn_frequencies(
        arch.rotary_dim,
        arch.rotary_base,
        factor=arch.rope_scaling_factor,
        original_max_position_embeddings=original,
        beta_fast=arch.rope_scaling_beta_fast,
        beta_slow=arch.rope_scaling_beta_slow,
        mscale=arch.rope_scaling_mscale,
        mscale_all_dim=arch.rope_scaling_mscale_all_dim,
        attention_factor=arch.rope_scaling_attention_factor,
        truncate=arch.rope_scaling_truncate,
    )


def _longrope(arch: Architecture, original: int, length: int) -> RotaryFrequencies:
    """Divide each frequency by a factor of its own (Ding et al. 2024, arXiv:2402.13753)."""
    is_long = length > original
    factors = arch.rope_scaling_long_factors if is_long else arch.rope_scaling_short_factors
    plain = ml_kernels.rotary_frequencies(arch.rotary_dim, arch.rotary_base)
    divisors = torch.tensor(factors, dtype=torch.float32)
    if divisors.shape != plain.inverse.shape:
        which = "long" if is_long else "short"
        raise ValueError(
            f"--rope-scaling-{which}-factors: {len(divisors)} numbers, must be "
            f"{len(plain.inverse)}, one for each pair of the {arch.rotary_dim} channels that turn"
        )
    scale = arch.rope_scaling_attention_factor
    if scale is None:
        factor = arch.rope_scaling_factor
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RotaryFrequencies(plain.inverse / divisors, scale)
