"""The cross entropy that computes a few rows at a time."""

from __future__ import annotations

import pytest
import torch
from live_memory import peak_bytes

from ml_kernels.cpu import loss
from ml_kernels.loss import cross_entropy_reference


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 7, 100])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_the_number_of_rows_at_a_time_changes_nothing(ignore_index, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", rows_at_a_time * 13)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 2, 13, generator=generator, requires_grad=True)
    target = torch.randint(13, (7, 2), generator=generator)
    target[3] = ignore_index
    upstream = torch.randn(7, 2, generator=generator)
    found, expected = (
        f(logits, target, ignore_index, None) for f in (loss.cross_entropy, cross_entropy_reference)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, upstream),
        torch.autograd.grad(expected, logits, upstream),
    )


def test_nothing_as_large_as_the_logits_is_made_but_their_gradient():
    logits = torch.zeros(64, 40_000, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(64, dtype=torch.int64)

    def train(function):
        logits.grad = None
        function(logits, target, -100, None).sum().backward()

    gradient, chunks = 2 * logits.numel(), 3 * 4 * loss._CHUNK_ELEMENTS
    assert gradient < peak_bytes(lambda: train(loss.cross_entropy)) < gradient + chunks
    assert peak_bytes(lambda: train(cross_entropy_reference)) > gradient + 8 * logits.numel()
