"""A model ready for inference: weights of any checkpoint on this process's device.

Shapes: `B` texts, `S` tokens, `V` true vocabulary (padding columns are cut off: they belong to no
token, so no caller can choose one).
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.module import MegatronModule

from ml_convert.source import Source
from ml_eval.weights import load_weights
from ml_kernels.device import DeviceChoice
from ml_models.architecture import Architecture
from ml_models.flags import UsageError
from ml_models.gpt import build_model, transformer_config
from ml_models.positions import table_number
from ml_models.weights import EMBEDDING, check_tensor_parallel, padded_vocab_size
from ml_parallel import platform
from ml_parallel.groups import initialize_groups
from ml_parallel.topology import Topology


class Cache(StaticInferenceContext):  # type: ignore[misc]
    """Keys and values of the tokens that were computed, for a number of texts of equal length."""

    ids: torch.Tensor | None = None
    """`(B, S)`, these tokens."""


class Engine:
    """Computes logits; knows nothing about text. A process has one at a time."""

    def __init__(
        self,
        arch: Architecture,
        module: MegatronModule,
        device: torch.device,
        *,
        joined: bool = False,
    ) -> None:
        """Take a model whose weights are there; `joined` = leave the default group at the end."""
        self._module = module.eval().requires_grad_(False)
        self._joined = joined
        self._arch = arch
        self.vocab_size = arch.vocab_size
        self.max_length = arch.max_position_embeddings
        self.device = device

    def close(self) -> None:
        """Leave the process groups; another engine can be loaded after that."""
        parallel_state.destroy_model_parallel()
        if self._joined:
            torch.distributed.destroy_process_group()

    def cache(self, *, batch_size: int, length: int) -> Cache:
        """Make room for the keys and values of `batch_size` texts of up to `length` tokens."""
        return Cache(batch_size, length)

    @torch.inference_mode()
    def next_logits(self, ids: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Compute tokens after those in the cache, which grows by them.

        Args:
            ids: `(B, S)` int64: a whole prompt, a part of one, or one token.
            cache: Of the tokens before.

        Returns:
            `(B, V)`, the logits of what follows the last token.
        """
        start = cache.sequence_len_offset
        earlier = ids[:, :0] if cache.ids is None else cache.ids[:, :start]
        cache.ids = torch.cat((earlier, ids), dim=1)
        if self._tables_change(start, start + ids.shape[1]):
            ids, start = cache.ids, 0
            cache.reset()
        logits = self._forward(ids, start, cache)  # (B, 1, V)
        cache.increment_sequence_len_offset(ids.shape[1])
        return logits[:, -1]

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute whole texts `(B, S)`; returns the logits `(B, S, V)` after each token."""
        return self._forward(ids, 0, None)

    def _tables_change(self, start: int, end: int) -> bool:
        """Say whether texts that grow have other angles at all positions (longrope)."""
        return start > 0 and table_number(self._arch, start) != table_number(self._arch, end)

    def _forward(self, ids: torch.Tensor, start: int, cache: Cache | None) -> torch.Tensor:
        positions = torch.arange(start, start + ids.shape[1], device=self.device)
        logits = self._module(
            ids,
            positions.expand_as(ids),
            None,  # attention is causal without being told
            inference_context=cache,
            runtime_gather_output=True,
        )
        return logits[..., : self.vocab_size]


def load(
    source: Source,
    *,
    device: DeviceChoice = "auto",
    dtype: torch.dtype | None = None,
    tensor_model_parallel_size: int | None = None,
) -> Engine:
    """Bind this process to a device, and load a model onto it.

    Under torchrun every rank must call this; each loads its part of the model.

    Args:
        source: The checkpoint; its own tensor- and pipeline-parallel sizes do not matter.
        device: What to run on.
        dtype: What to compute in; None = as stored.
        tensor_model_parallel_size: Ranks to cut the model over; None = all there are.

    Raises:
        UsageError: The device cannot be used, the environment does not say where the ranks meet,
            or the model cannot be cut in so many parts.
    """
    bound, alone = _join(device)
    size = torch.distributed.get_world_size()
    _check_processes(source.arch, tensor_model_parallel_size, size)
    topology = Topology(tensor_model_parallel_size=size)
    place = initialize_groups(topology)
    padded = padded_vocab_size(
        source.arch.vocab_size, make_vocab_size_divisible_by=128, tensor_model_parallel_size=size
    )
    (chunk,) = build_model(
        source.arch,
        topology,
        transformer_config(source.arch, topology, params_dtype=dtype or _stored_dtype(source)),
        padded_vocab_size=padded,
        seq_length=source.arch.max_position_embeddings,
        parallel_output=False,
    )
    load_weights(
        chunk, source.checkpoint, tp_rank=place.tp_rank, tp_size=size, padded_vocab_size=padded
    )
    return Engine(source.arch, chunk.module, bound.torch, joined=alone)


def _join(choice: DeviceChoice) -> tuple[platform.Device, bool]:
    """Bind this process to a device; joins the default process group unless it is in one."""
    try:
        device = platform.activate(choice)
        alone = not torch.distributed.is_initialized()
        if alone:
            platform.initialize_process_group(device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return device, alone


def _stored_dtype(source: Source) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, source.checkpoint.dtypes[EMBEDDING].name)
    return dtype


def _check_processes(arch: Architecture, wanted: int | None, size: int) -> None:
    if wanted not in (None, size):
        started = "1 process was" if size == 1 else f"{size} processes were"
        raise UsageError(
            f"--tensor-model-parallel-size {wanted}: {started} started; start {wanted} with "
            f"torchrun --nproc-per-node {wanted} -m ml_eval generate ..."
        )
    try:
        check_tensor_parallel(arch, size)
    except ValueError as error:
        raise UsageError(str(error)) from error
