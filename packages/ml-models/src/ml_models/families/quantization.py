"""Weights that are stored as codes and scales: no family reads them, and each says so."""

from __future__ import annotations

from collections.abc import Mapping

from ml_models.architecture import Architecture
from ml_models.families.config_json import Config
from ml_models.families.entries import Fields


class Unquantized:
    """A `quantization_config` is refused: the tensors of such files are no weights yet."""

    def __init__(
        self, advice: str = "load them with transformers, dequantize and save them"
    ) -> None:
        self.advice = advice
        """How to get plain weights."""

    def read(self, config: Config) -> Fields:
        """Refuse quantized weights."""
        given = config.get("quantization_config")
        if given is None:
            return {}
        method = given.get("quant_method") if isinstance(given, Mapping) else given
        raise ValueError(
            f"config.json: the weights are quantized ({method}, see quantization_config), only "
            f"float32, float16 and bfloat16 are read; {self.advice}"
        )

    def write(self, arch: Architecture) -> Fields:  # noqa: ARG002
        """Write nothing."""
        return {}
