"""Convert model weights between Hugging Face and Megatron, for any parallel layout.

    from ml_convert import Request, convert

    convert(Request(load_dir="llama", save_dir="out", save_format="mcore"))

Nothing is loaded until it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ml_convert.conversion import convert
    from ml_convert.errors import ConversionError, VerificationError
    from ml_convert.report import Report
    from ml_convert.request import Request
    from ml_convert.streaming import tensors

__all__ = [
    "ConversionError",
    "Report",
    "Request",
    "VerificationError",
    "convert",
    "tensors",
]

_MODULES = {
    "ConversionError": "errors",
    "Report": "report",
    "Request": "request",
    "VerificationError": "errors",
    "convert": "conversion",
    "tensors": "streaming",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
