"""What to convert: the flags of `ml-convert`, and the argument of `ml_convert.convert`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ml_convert.dialects import Dialect, Experts, Latent
from ml_convert.errors import ConversionError
from ml_convert.tensor import DTYPES, Dtype
from ml_models.architecture import Architecture
from ml_models.weights import check_tensor_parallel, expert_range, padded_vocab_size
from ml_parallel.stages import Stages, stage_layers
from ml_parallel.topology import Topology

_DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
_OUR_NAMES = {
    "--tensor-model-parallel-size": "--target-tensor-parallel-size",
    "--pipeline-model-parallel-size": "--target-pipeline-parallel-size",
    "--expert-model-parallel-size": "--target-expert-parallel-size",
}
_HUGGING_FACE_HAS_NO = (
    "target_tensor_parallel_size",
    "target_pipeline_parallel_size",
    "target_expert_parallel_size",
    "num_layer_list",
    "num_layers_per_virtual_pipeline_stage",
    "padded_vocab_size",
    "pad_vocab",
    "transformer_impl",
    "moe_grouped_gemm",
    "mla_names",
)
_LEGACY_HAS_NO = ("transformer_impl", "moe_grouped_gemm", "mla_names")
_TORCH_DIST_HAS_NO = ("transformer_impl", "mla_names")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Checkpoints."""

    load_dir: Path
    """Directory to read: a Hugging Face model, or Megatron checkpoints."""
    save_dir: Path
    """Directory to write; must be new or empty."""
    save_format: Literal["hf", "legacy", "mcore", "torch_dist"]
    """Format to write: Hugging Face, Megatron-Legacy or Megatron-Core; torch_dist is the one of
    Megatron-Core that is not cut into ranks."""
    load_format: Literal["auto", "hf", "legacy", "mcore", "torch_dist"] = "auto"
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
    target_expert_parallel_size: int = field(
        default=1, metadata={"aliases": ("--expert-model-parallel-size",)}
    )
    """Expert-parallel ranks to write for."""
    num_layer_list: tuple[int, ...] | None = None
    """Layers of each pipeline stage, such as 4,4,3; default the same number on all."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of a chunk when every stage holds several chunks in turn."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this times the tensor-parallel ranks."""
    padded_vocab_size: int | None = None
    """Vocabulary with padding, in place of --make-vocab-size-divisible-by."""
    pad_vocab: Literal["zeros", "last-row"] = "zeros"
    """What the rows of padding hold: zeros, or what the last row holds, as ModelLink does it."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Implementation of Megatron-Core to write for: its names of norms and experts differ."""
    moe_grouped_gemm: bool = False
    """Write the experts of a layer together, for Megatron's --moe-grouped-gemm."""
    mla_names: Latent = "megatron"
    """How latent attention is stored: as Megatron-Core, MindSpeed-LLM 2, or ModelLink does it."""
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
    verify: Literal["none", "plan", "bits", "roundtrip", "logits"] = "bits"
    """What to check of the result before it gets its name. plan: its files hold all tensors in the
    right shapes. bits: and every element is that of the source (whose hashes are checked, too, if
    it has a manifest). roundtrip: and writing it back to the source's layout gives the source.
    logits: and the models compute the same (loads torch)."""
    verify_only: bool = False
    """Write nothing: compare an earlier output in --save-dir with --load-dir, bit by bit."""
    dry_run: bool = False
    """Write nothing: check that the conversion is possible and show what would be written."""
    overwrite: bool = False
    """Replace an earlier output of ml-convert in --save-dir."""
    resume: bool = False
    """Go on with an interrupted conversion, skipping the files that are done; if this one is
    interrupted, keep what is done for the next."""
    lora_load: Path | None = None
    """LoRA adapter to merge into the weights: of PEFT, or as Megatron checkpoints as ModelLink
    trains it. (An adapter that is in --load-dir beside the weights is found there.)"""
    lora_r: int | None = None
    """Rank of the adapter, where nothing beside it says it."""
    lora_alpha: float | None = None
    """Scale of the adapter times its rank, where nothing beside it says it."""
    lora_target_modules: tuple[str, ...] | None = None
    """Modules that the adapter must be of, such as linear_qkv linear_proj; default any."""
    lora_only: bool = False
    """Write the adapter by itself instead of merging it: hf for PEFT, mcore and legacy for
    ModelLink."""
    strict_pickle: bool = False
    """Refuse files whose pickles name anything but tensors and plain values; without it, such
    objects are not loaded."""
    workers: int = 0
    """Threads; 0 = as many as there are cores, at most 8."""

    def __post_init__(self) -> None:
        for name in ("load_dir", "save_dir", "hf_config", "lora_load"):
            if isinstance(getattr(self, name), str):  # a caller without a type checker
                object.__setattr__(self, name, Path(getattr(self, name)))
        self._check_numbers()
        if self.save_format == "hf":
            self._check_not_cut()
        if self.save_format == "legacy" and self._given(_LEGACY_HAS_NO):
            raise ConversionError(f"--save-format legacy: has no {self._given(_LEGACY_HAS_NO)}")
        if self.save_format == "torch_dist" and self._given(_TORCH_DIST_HAS_NO):
            given = self._given(_TORCH_DIST_HAS_NO)
            raise ConversionError(f"--save-format torch_dist: has no {given}")
        if self.lora_only and self.verify == "logits":
            raise ConversionError("--lora-only: an adapter alone has no logits to --verify")
        if self.dry_run and self.verify_only:
            raise ConversionError("--dry-run and --verify-only exclude each other")
        _ = self.topology, self.max_shard_bytes

    def _check_numbers(self) -> None:
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ConversionError(f"--lora-alpha {self.lora_alpha:g}: must be above 0")
        for name, least in (
            ("make_vocab_size_divisible_by", 1),
            ("true_vocab_size", 1),
            ("padded_vocab_size", 1),
            ("lora_r", 1),
            ("iteration", 0),
            ("workers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = f"--{name.replace('_', '-')}"
                raise ConversionError(f"{flag} {value}: must be at least {least}")

    def _check_not_cut(self) -> None:
        given = self._given(_HUGGING_FACE_HAS_NO)
        if given:
            raise ConversionError(
                f"--save-format hf is not cut into ranks: leave out {given} (the sizes of "
                "--load-dir are found out)"
            )

    def _given(self, names: tuple[str, ...]) -> str:
        """List those of these flags that are not at their defaults."""
        defaults = {item.name: item.default for item in fields(self)}
        given = [name for name in names if getattr(self, name) != defaults[name]]
        return ", ".join(f"--{name.replace('_', '-')}" for name in given)

    @property
    def compares_bits(self) -> bool:
        """Whether the elements of the result are compared with those of the source."""
        return self.verify not in ("none", "plan")

    @property
    def topology(self) -> Topology:
        """The ranks to write for."""
        try:
            return Topology(
                tensor_model_parallel_size=self.target_tensor_parallel_size,
                pipeline_model_parallel_size=self.target_pipeline_parallel_size,
                expert_model_parallel_size=self.target_expert_parallel_size,
                num_layer_list=self.num_layer_list,
                num_layers_per_virtual_pipeline_stage=self.num_layers_per_virtual_pipeline_stage,
            )
        except ValueError as error:
            raise ConversionError(_in_our_words(error)) from None

    @property
    def dialect(self) -> Dialect:
        """The names to write."""
        grouped: Experts = "stacked" if self.transformer_impl == "local" else "grouped"
        return Dialect(
            legacy=self.save_format == "legacy",
            fused_norms=self.transformer_impl == "transformer_engine",
            experts=grouped if self.moe_grouped_gemm else "sequential",
            latent=self.mla_names,
        )

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
            _check_experts(arch, self.target_expert_parallel_size)
            if self.save_format == "legacy":
                _check_groups(arch, self.target_tensor_parallel_size)
            return stage_layers(arch.num_layers, self.topology)
        except ValueError as error:
            raise ConversionError(_in_our_words(error)) from None

    def padded_vocabulary(self, arch: Architecture) -> int:
        """Give the vocabulary with padding.

        Raises:
            ConversionError: --padded-vocab-size is too small, or cannot be cut.
        """
        if self.padded_vocab_size is not None:
            _check_padded(self.padded_vocab_size, arch, self.target_tensor_parallel_size)
            return self.padded_vocab_size
        return padded_vocab_size(
            arch.vocab_size,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
            tensor_model_parallel_size=self.target_tensor_parallel_size,
        )


def _check_experts(arch: Architecture, ep_size: int) -> None:
    if ep_size > 1 and not arch.num_experts:
        raise ValueError(f"--expert-model-parallel-size {ep_size}: the model has no experts")
    expert_range(arch, ep_rank=0, ep_size=ep_size)


def _check_groups(arch: Architecture, tp_size: int) -> None:
    """Megatron-Core gathers key and value heads that are on several ranks, Legacy does not."""
    if arch.query_groups % tp_size:
        raise ValueError(
            f"--tensor-model-parallel-size {tp_size}: must divide --num-query-groups "
            f"{arch.query_groups} with --save-format legacy"
        )


def _check_padded(size: int, arch: Architecture, tp_size: int) -> None:
    if size < arch.vocab_size:
        raise ConversionError(
            f"--padded-vocab-size {size}: must be at least the vocabulary, {arch.vocab_size}"
        )
    if size % tp_size:
        raise ConversionError(
            f"--padded-vocab-size {size}: must be divisible by --target-tensor-parallel-size "
            f"{tp_size}"
        )


def _in_our_words(error: ValueError) -> str:
    text = str(error)
    for theirs, ours in _OUR_NAMES.items():
        text = text.replace(theirs, ours)
    return text
