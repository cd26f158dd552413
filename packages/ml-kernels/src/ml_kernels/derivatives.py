"""Derivatives written by hand, which have no derivative themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward pass refuse to run where a graph of it is asked for (`create_graph=True`).

    torch's decorator of the same name lets it run, and refuses when its results are differentiated,
    if the upstream gradient needs one: that of a gradient penalty is 1 and needs none, and a
    Hessian does not reach the results. Both were 0 without a word.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "this operator of ml_kernels is differentiable once: for second derivatives "
                "(create_graph=True) call it with backend='reference' and without a process group"
            )
        return backward(ctx, *upstream)

    return guarded
