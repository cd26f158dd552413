"""The step of megatron-core's attention between q, k, v and the scores: positions and the cache.

Shapes: `S` sequence, `B` batch, `N` heads and `G` groups of this rank, `D` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext

from ml_models.positions import Rotary


class TurnsQueriesAndKeys:
    """Put before a class of megatron-core's attention; turns by our tables instead of its one."""

    rotary: Rotary
    layer_number: int
    """Number of the layer in the whole model, from 1."""

    def _adjust_key_value_for_inference(
        self,
        inference_context: BaseInferenceContext | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_given: Any,
        **_options: Any,
    ) -> tuple[Any, ...]:
        """Turn by position, and add new keys and values to the cache; megatron-core's arguments."""
        start = 0 if inference_context is None else inference_context.sequence_len_offset
        layer, length = self.layer_number - 1, start + key.shape[0]
        query, key = (self.rotary.turn(x, layer, length) for x in (query, key))
        query, key, value, _, *rest = super()._adjust_key_value_for_inference(  # type: ignore[misc]
            inference_context, query, key, value, None
        )
        return query, key, value, None, *rest
