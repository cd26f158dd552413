"""What to convert: the flags of `ml-convert`, and the argument of `ml_convert.convert`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ml_convert.errors import ConversionError
from ml_convert.tensor import DTYPES, Dtype
from ml_models.architecture import Architecture
from ml_models.weights import check_tensor_parallel, padded_vocab_size
from ml_parallel.stages import Stages, stage_layers
from ml_parallel.topology import Topology

_DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_OUR_NAMES = {
    "--tensor-model-parallel-size": "--target-tensor-parallel-size",
    "--pipeline-model-parallel-size": "--target-pipeline-parallel-size",
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Checkpoints."""

    load_dir: Path
    """Directory to read: a Hugging Face model, or Megatron checkpoints."""
    save_dir: Path
    """Directory to write; must be new or empty."""
    save_format: Literal["hf", "mcore"]
    """Format to write: Hugging Face, or Megatron-Core."""
    load_format: Literal["auto", "hf", "mcore"] = "auto"
    """Format to read; auto looks at the files."""
    iteration: int | None = None
    """Which Megatron checkpoint of --load-dir to read; default the latest."""
    target_tensor_parallel_size: int = field(
        default=1, metadata={"aliases": ("--tensor-model-parallel-size",)}
    )
    """Tensor-parallel ranks to write for."""
    target_pipeline_parallel_size: int = field(
        default=1, metadata={"aliases": ("--pipeline-model-parallel-size",)}
    )
    """Pipeline stages to write for."""
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each pipeline stage, such as 4,4,3; default the same number on all."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk when every stage holds several chunks in turn."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this times the tensor-parallel ranks."""
    true_vocab_size: int | None = None
    """Vocabulary without padding, where a Megatron checkpoint does not say it."""
    params_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Convert weights to this type; default keep them bit for bit."""
    hf_config: Path | None = None
    """Directory whose config.json and tokenizer files go with an exported Hugging Face model."""
    model_type_hf: str | None = None
    """Model family, such as llama; default what the checkpoint says."""
    max_shard_size: str = "5GB"
    """Largest size of an exported safetensors file."""
    verify: bool = False
    """Check the hashes of what is read, if it has a manifest; after writing, read everything back
    and compare it bit by bit before it gets its name."""
    verify_only: bool = False
    """Write nothing: compare an earlier output in --save-dir with --load-dir, bit by bit."""
    dry_run: bool = False
    """Write nothing: check that the conversion is possible and show what would be written."""
    overwrite: bool = False
    """Replace an earlier output of ml-convert in --save-dir."""
    workers: int = 0
    """Threads; 0 = as many as there are cores, at most 8."""

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.save_format == "hf":
            self._check_not_cut()
        if self.dry_run and self.verify_only:
            raise ConversionError("--dry-run and --verify-only exclude each other")
        _ = self.topology, self.max_shard_bytes

    def _check_numbers(self) -> None:
        for name, least in (
            ("make_vocab_size_divisible_by", 1),
            ("true_vocab_size", 1),
            ("iteration", 0),
            ("workers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = f"--{name.replace('_', '-')}"
                raise ConversionError(f"{flag} {value}: must be at least {least}")

    def _check_not_cut(self) -> None:
        tp, pp = self.target_tensor_parallel_size, self.target_pipeline_parallel_size
        if (tp, pp) != (1, 1) or self.num_layer_list or self.num_layers_per_virtual_pipeline_stage:
            raise ConversionError(
                "--save-format hf is not cut into ranks: leave out --target-tensor-parallel-size, "
                "--target-pipeline-parallel-size, --num-layer-list and "
                "--num-layers-per-virtual-pipeline-stage (the sizes of --load-dir are found out)"
            )

    @property
    def topology(self) -> Topology:
        """The ranks to write for."""
        try:
            return Topology(
                tensor_model_parallel_size=self.target_tensor_parallel_size,
                pipeline_model_parallel_size=self.target_pipeline_parallel_size,
                num_layer_list=self.num_layer_list,
                num_layers_per_virtual_pipeline_stage=self.num_layers_per_virtual_pipeline_stage,
            )
        except ValueError as error:
            raise ConversionError(_in_our_words(error)) from None

    @property
    def dtype(self) -> Dtype | None:
        """The dtype to convert to; None = keep."""
        return DTYPES[_DTYPE_NAMES[self.params_dtype]] if self.params_dtype else None

    @property
    def max_shard_bytes(self) -> int:
        """Largest size of an exported file."""
        match = re.fullmatch(r"([0-9]+)\s*([KMG]i?|)B?", self.max_shard_size.strip())
        if match is None or int(match[1]) == 0:
            raise ConversionError(
                f"--max-shard-size {self.max_shard_size}: must be a size such as 5GB or 500MiB"
            )
        return int(match[1]) * _UNITS[match[2]]

    def stages(self, arch: Architecture) -> Stages:
        """Cut a model into pipeline stages, after checking that its tensors can be cut, too."""
        try:
            check_tensor_parallel(arch, self.target_tensor_parallel_size)
            return stage_layers(arch.num_layers, self.topology)
        except ValueError as error:
            raise ConversionError(_in_our_words(error)) from None

    def padded_vocab_size(self, arch: Architecture) -> int:
        """Give the vocabulary with padding."""
        return padded_vocab_size(
            arch.vocab_size,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
            tensor_model_parallel_size=self.target_tensor_parallel_size,
        )


def _in_our_words(error: ValueError) -> str:
    text = str(error)
    for theirs, ours in _OUR_NAMES.items():
        text = text.replace(theirs, ours)
    return text
