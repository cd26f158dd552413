"""The step of megatron-core's attention between q, k, v and the scores: positions and the cache.

Shapes: `S` sequence, `B` batch, `N` heads and `G` groups of this rank, `D` head size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.inference.contexts import BaseInferenceContext

from ml_models.packing import PackedSequences
from ml_models.positions import Rotary


class TurnsQueriesAndKeys:
    """Put before a class of megatron-core's attention; turns by our tables instead of its one."""

    rotary: Rotary
    layer_number: int
    """Number of the layer in the whole model, from 1."""
    _packed: PackedSequences | None = None

    def forward(
        self, *given: Any, packed_seq_params: PackedSequences | None = None, **options: Any
    ) -> Any:
        """Attend, and know meanwhile which sequences share a row; megatron-core's arguments.

        megatron-core does not tell the step below.
        """
        self._packed = packed_seq_params
        try:
            return super().forward(  # type: ignore[misc]
                *given, packed_seq_params=packed_seq_params, **options
            )
        finally:
            self._packed = None

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
        if self._packed is None:
            query, key = (self.rotary.turn(x, layer, length) for x in (query, key))
        else:
            query, key = (self.rotary.turn_packed(x, layer, self._packed) for x in (query, key))
        query, key, value, _, *rest = super()._adjust_key_value_for_inference(  # type: ignore[misc]
            inference_context, query, key, value, None
        )
        return query, key, value, None, *rest
