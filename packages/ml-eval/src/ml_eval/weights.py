"""Weights of a checkpoint into a model's tensors, whatever the checkpoint's format and layout.

`ml_convert` reads rows of a whole parameter out of any checkpoint; `shard_runs` says which of them
this rank holds. Nothing is written to disk, and only a few MiB are in memory besides the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ml_convert.execute import gather
from ml_convert.files import Buffers, Files
from ml_convert.layout import check_parameters, matrix
from ml_convert.plan import BAND_BYTES, Band, Checkpoint
from ml_models.gpt import Chunk
from ml_models.weights import Parameter, Run, shard_runs


def load_weights(
    chunk: Chunk, checkpoint: Checkpoint, *, tp_rank: int, tp_size: int, padded_vocab_size: int
) -> None:
    """Fill the parameters of a model with this rank's part of a checkpoint; padding is zeros.

    Raises:
        ConversionError: The checkpoint is damaged.
    """
    check_parameters(checkpoint.layout, chunk.parameters.values())
    buffers = Buffers()
    with Files() as files:
        for name, tensor in chunk.tensors():
            parameter = chunk.parameters[name]
            _, runs = shard_runs(
                parameter, tp_size=tp_size, tp_rank=tp_rank, padded_vocab_size=padded_vocab_size
            )
            _fill(tensor.detach(), parameter, runs, checkpoint, files, buffers)


def _fill(
    tensor: torch.Tensor,
    parameter: Parameter,
    runs: tuple[Run, ...],
    checkpoint: Checkpoint,
    files: Files,
    buffers: Buffers,
) -> None:
    dtype = getattr(torch, checkpoint.dtypes[parameter.name].name)
    by_columns = parameter.split is not None and parameter.split.dim == 1
    wanted = (Run(0, 0, parameter.shape[0]),) if by_columns else runs
    tensor.zero_()
    for run in wanted:
        for band in _bands(parameter, run, dtype.itemsize):
            content = torch.from_numpy(gather(checkpoint, band, files, buffers)).view(dtype)
            start = band.row - run.global_start + run.local_start
            rows = tensor[start : start + band.rows]
            if not by_columns:
                rows.copy_(content.view(rows.shape))
                continue
            for columns in runs:
                part = content.narrow(1, columns.global_start, columns.length)
                rows.narrow(1, columns.local_start, columns.length).copy_(part)


def _bands(parameter: Parameter, run: Run, itemsize: int) -> Iterator[Band]:
    """Cut rows of a parameter into bands of a few MiB."""
    columns = matrix(parameter.shape)[1]
    step = max(1, BAND_BYTES // (columns * itemsize))
    end = run.global_start + run.length
    for row in range(run.global_start, end, step):
        yield Band(parameter.name, row, min(step, end - row), columns)
