"""Keeping tensors that depend on sizes only: made once, for all layers and steps of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kept(results: int) -> Callable[[_Function], _Function]:
    """Keep the last results of a function that makes tensors from hashable arguments.

    What is kept must serve every later call. So it is made outside inference mode, whose tensors
    autograd refuses for good; and nothing is kept of what torch traces, or of tensors that a
    dispatch mode makes, as fake ones.

    Args:
        results: How many.
    """

    def of(function: _Function) -> _Function:
        @lru_cache(maxsize=results)
        def make(*args: Hashable) -> Any:
            with torch.inference_mode(False):
                return function(*args)

        @wraps(function)
        def call(*args: Hashable) -> Any:
            if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
                return function(*args)
            return make(*args)

        return call  # type: ignore[return-value]  # of the same signature

    return of
