"""The embedding table with what some families do to its rows before the first layer.

Shapes: `S` sequence (of this rank, with sequence parallelism), `B` batch, `H` hidden.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import VocabParallelEmbedding

from ml_kernels.modules import LayerNorm
from ml_models.architecture import Architecture


class WordEmbedding(VocabParallelEmbedding):  # type: ignore[misc]
    """megatron-core's embedding, whose rows are scaled and normalized.

    megatron-core builds the embedding itself and asks no one for its class, so this one is put on
    an embedding that exists: see `refine_embedding`.
    """

    scale: float
    norm: LayerNorm | None

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Return `(S, B, H)` with sequence parallelism, else `(B, S, H)`, of tokens `(B, S)`."""
        rows: torch.Tensor = super().forward(input_)
        if self.scale != 1.0:
            # Gemma's own code rounds the factor to the dtype of the rows.
            rows = rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)
        return rows if self.norm is None else self.norm(rows)


def refine_embedding(module: GPTModel, arch: Architecture) -> None:
    """Let the embedding of a model do what `arch` says, beside looking rows up."""
    words = module.embedding.word_embeddings
    words.__class__ = WordEmbedding
    words.scale = arch.embedding_multiplier_scale
    if arch.input_embeds_norm:
        words.scale *= math.sqrt(arch.hidden_size)
    words.norm = None
    if arch.embed_layernorm:
        words.norm = LayerNorm(arch.hidden_size, arch.norm_epsilon, config=module.config)
        # Without it every rank normalizes the whole sequence, and has the whole gradient.
        for parameter in words.norm.parameters():
            parameter.sequence_parallel = words.reduce_scatter_embeddings
    if module.embedding.add_position_embedding:
        module.embedding.position_embeddings.to(module.config.params_dtype)
