"""What to generate, with which model, and how: the flags, one small config per concern.

`Sampling` and `Ending` are all that the library below needs; chat, serving and evaluation share
them. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from ml_data.tokenizer import TokenizerType
from ml_kernels.device import DeviceChoice
from ml_models.hints import Text

LARGEST_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class Model:
    """Model."""

    load_dir: Path = field(metadata={"aliases": ("--load",)})
    """Hugging Face directory, or Megatron checkpoints of any tensor and pipeline size."""
    iteration: int | None = field(default=None, metadata={"aliases": ("--ckpt-step",)})
    """Which Megatron checkpoint of --load-dir; default the latest."""
    true_vocab_size: int | None = None
    """Vocabulary without padding, where a Megatron checkpoint does not say it."""
    tokenizer_name_or_path: Path | None = field(
        default=None, metadata={"aliases": ("--tokenizer-model",)}
    )
    """Directory or file of the tokenizer; default --load-dir."""
    tokenizer_type: TokenizerType | None = None
    """How to read it; by default what is there decides."""
    params_dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Compute in this type; default the one the weights are stored in."""
    device: DeviceChoice = "auto"
    """Where to run; auto prefers an NPU, then a GPU, then the CPU."""
    tensor_model_parallel_size: int | None = None
    """Processes over which the model is cut, started by torchrun; default all it started."""

    def __post_init__(self) -> None:
        for name in ("true_vocab_size", "tensor_model_parallel_size"):
            _check(
                self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1"
            )
        _check(self, "iteration", (self.iteration or 0) >= 0, "at least 0")

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is."""
        return self.tokenizer_name_or_path or self.load_dir


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Choice of tokens."""

    do_sample: bool = field(default=False, metadata={"off": "--greedy"})
    """Draw each token at random; --greedy takes the most likely one."""
    temperature: float = 0.7
    """With --do-sample: divides the logits; less is more certain."""
    top_k: int = 50
    """With --do-sample: draw from this many most likely tokens; 0 = all."""
    top_p: float = 0.95
    """With --do-sample: draw from the most likely tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: makes tokens less likely that are in the text already; 1 = off."""
    seed: int = 1234
    """With --do-sample: the same seed gives the same text; a second prompt has the next seed."""

    def __post_init__(self) -> None:
        _check(self, "temperature", self.temperature > 0, "greater than 0 (or give --greedy)")
        _check(self, "top_k", self.top_k >= 0, "at least 0")
        _check(self, "top_p", 0 <= self.top_p <= 1, "from 0 to 1")
        _check(self, "repetition_penalty", self.repetition_penalty > 0, "greater than 0")
        _check(self, "seed", 0 <= self.seed <= LARGEST_SEED, "from 0 to 2**63 - 1")

    @property
    def without_effect(self) -> list[str]:
        """Flags with a value of the user's that changes nothing, as no token is drawn."""
        drawing = {"temperature", "top_k", "top_p", "seed"} if not self.do_sample else set()
        return [
            _option(flag.name)
            for flag in fields(self)
            if flag.name in drawing and getattr(self, flag.name) != flag.default
        ]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Where a text ends."""

    max_new_tokens: int = 128
    """Longest continuation of a prompt, in tokens."""
    max_length: int | None = None
    """Longest text of prompt and continuation, in tokens; default what the model is made for."""
    add_eos_token: tuple[Text, ...] = ()
    """Tokens that end the text besides the model's own, as text or as spelled in the tokenizer."""
    stop: tuple[Text, ...] = ()
    """Texts that end the continuation when they come up; they are not part of it."""

    def __post_init__(self) -> None:
        _check(self, "max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        _check(self, "max_length", self.max_length is None or self.max_length >= 1, "at least 1")
        if "" in (*self.stop, *self.add_eos_token):
            raise ValueError("--stop and --add-eos-token: cannot be empty")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts."""

    prompt: tuple[Text, ...] = ()
    """Texts to continue."""
    prompt_file: Path | None = None
    """File with a text to continue on each line."""

    def __post_init__(self) -> None:
        if bool(self.prompt) == bool(self.prompt_file):
            raise ValueError("give either --prompt or --prompt-file: what to continue")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue texts with a model."""

    prompts: Prompts
    model: Model
    sampling: Sampling
    ending: Ending


def _check(config: object, name: str, valid: bool, rule: str) -> None:
    if not valid:
        value = getattr(config, name)
        raise ValueError(f"{_option(name)} {value}: must be {rule}")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
