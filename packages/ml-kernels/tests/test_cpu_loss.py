"""The cross entropy that computes a few rows at a time."""

from __future__ import annotations

import pytest
import torch

from ml_kernels.cpu import loss
from ml_kernels.loss import cross_entropy_reference


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 7, 100])
def test_the_number_of_rows_at_a_time_changes_nothing(rows_at_a_time, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", rows_at_a_time * 13)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 2, 13, generator=generator, requires_grad=True)
    target = torch.randint(13, (7, 2), generator=generator)
    upstream = torch.randn(7, 2, generator=generator)
    found, expected = (f(logits, target) for f in (loss.cross_entropy, cross_entropy_reference))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, upstream),
        torch.autograd.grad(expected, logits, upstream),
    )


def test_columns_of_minus_infinity_take_no_part():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 5, 2])
    padded = torch.cat([logits, torch.full((3, 4), -torch.inf)], dim=1).requires_grad_()
    losses = loss.cross_entropy(padded, target)
    torch.testing.assert_close(losses.detach(), cross_entropy_reference(logits, target))
    losses.sum().backward()
    assert padded.grad is not None
    assert not padded.grad[:, 8:].any()


def test_the_gradient_can_be_taken_twice_and_the_logits_are_left_alone():
    logits = torch.randn(3, 8, requires_grad=True)
    before = logits.detach().clone()
    total = loss.cross_entropy(logits, torch.tensor([1, 2, 3])).sum()
    first, second = (torch.autograd.grad(total, logits, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert torch.equal(logits.detach(), before)
