"""`torch.compile` as kernels need it: one graph or an error, never quietly eager mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch

_VARIANTS = 64
"""Of one function: dtypes, ranks, options. From the 9th on, torch's own limit leaves them eager,
which for attention means the matrix of scores in memory."""


def compiled(function: Callable[..., Any], *, dynamic: bool | None = None) -> Callable[..., Any]:
    """Compile a function, once in this process; the work is done when it is first called.

    While torch compiles the caller, the function becomes a part of the caller's graph.

    Args:
        function: Must be one graph; a call that is not, or is one variant too many, raises.
        dynamic: Whether sizes vary; None: found out from the calls.
    """
    return function if torch.compiler.is_compiling() else _compiled(function, dynamic)


@cache
def _compiled(function: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
    options: dict[str, Any] = {}
    if "recompile_limit" in signature(torch.compile).parameters:
        options["recompile_limit"] = _VARIANTS
    else:  # older torch has one limit for all that is compiled: raise it, never lower it
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    if "isolate_recompiles" in signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(function, fullgraph=True, dynamic=dynamic, **options)
