"""The operators as modules, alone or inside a Megatron model.

Alone they are built like torch's own: `RMSNorm(64, eps=1e-6)`. megatron-core builds them with its
configuration, `RMSNorm(config=config, hidden_size=64, eps=1e-6)`, of which they read a few fields
by name, so that no megatron is needed. What they cannot honour they refuse.

Shapes: hidden states `(..., H)`.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import torch
from torch import nn

from ml_kernels.activation import Approximation, check_approximation, geglu, gelu, swiglu
from ml_kernels.checks import check_integer, require
from ml_kernels.norm import add_rms_norm, check_eps, layer_norm, rms_norm

_N = TypeVar("_N", bound="_Norm")


class _Norm(nn.Module):
    """What the norms have in common: a weight, and Megatron's mark on the parameters."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        unit_offset: bool | None,
        config: Any,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_integer(name, "hidden_size", hidden_size)
        require(hidden_size >= 0, name, "hidden_size", hidden_size, "must not be negative")
        check_eps(name, eps)
        self.hidden_size, self.eps = hidden_size, eps
        self.unit_offset = _unit_offset(config) if unit_offset is None else unit_offset
        self.sequence_parallel = None if config is None else bool(config.sequence_parallel)
        self.weight = _parameter(hidden_size, config, device, dtype)

    def _mark(self) -> None:
        """Mark the parameters for Megatron, which looks for an attribute no Parameter declares.

        It sums the gradients of such parameters over the tensor-parallel ranks, each of which sees
        only its part of the sequence.
        """
        if self.sequence_parallel is not None:
            for parameter in self.parameters():
                parameter.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    # What makes parameters anew: copy.deepcopy, `to_empty` and its like, `assign=True`.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark()

    def _apply(self: _N, fn: Any, recurse: bool = True) -> _N:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._mark()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mark()

    def reset_parameters(self) -> None:
        """Make the norm scale by 1 and shift by 0 again, as FSDP does with `device="meta"`."""
        with torch.no_grad():
            self.weight.fill_(0.0 if self.unit_offset else 1.0)

    def extra_repr(self) -> str:
        """Show the size and the options in the module's text."""
        return f"{self.hidden_size}, eps={self.eps}, unit_offset={self.unit_offset}"


class RMSNorm(_Norm):
    """Root mean square norm with a learned weight; see `ml_kernels.rms_norm`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        unit_offset: bool | None = None,
        config: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the weight.

        Args:
            hidden_size: `H`.
            eps: Added to the mean square.
            unit_offset: Scale by `1 + weight`, with a weight that starts at 0, as in Gemma. None
                means what `config.layernorm_zero_centered_gamma` says, False without a config.
            config: A megatron-core TransformerConfig, or anything with its `params_dtype` and
                `sequence_parallel`.
            device: None means torch's default, or with a config where Megatron creates parameters.
            dtype: None means torch's default, or with a config `config.params_dtype`.

        Raises:
            ValueError: `hidden_size` or `eps` is negative.
            TypeError: `hidden_size` is no int.
        """
        super().__init__(hidden_size, eps, unit_offset, config, device, dtype)
        self.reset_parameters()
        self._mark()

    @overload
    def forward(self, hidden: torch.Tensor) -> torch.Tensor: ...

    @overload
    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise; with a residual stream, `(norm of the sum, the sum)`: see `add_rms_norm`."""
        if residual is None:
            return rms_norm(hidden, self.weight, eps=self.eps, unit_offset=self.unit_offset)
        return add_rms_norm(
            hidden, residual, self.weight, eps=self.eps, unit_offset=self.unit_offset
        )


class LayerNorm(_Norm):
    """Layer norm with a learned weight and bias; see `ml_kernels.layer_norm`."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        bias: bool = True,
        unit_offset: bool | None = None,
        config: Any = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Create the weight and the bias.

        Args:
            hidden_size: `H`.
            eps: Added to the variance.
            bias: Whether there is a bias.
            unit_offset: Scale by `1 + weight`, as in Nemotron; see `RMSNorm`.
            config: See `RMSNorm`.
            device: See `RMSNorm`.
            dtype: See `RMSNorm`.

        Raises:
            ValueError: `hidden_size` or `eps` is negative.
            TypeError: `hidden_size` is no int.
        """
        super().__init__(hidden_size, eps, unit_offset, config, device, dtype)
        self.bias = _parameter(hidden_size, config, device, dtype) if bias else None
        self.reset_parameters()
        self._mark()

    def reset_parameters(self) -> None:
        """See `RMSNorm`."""
        super().reset_parameters()
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise `(..., H)` over its last dimension."""
        weight = self.weight + 1 if self.unit_offset else self.weight
        return layer_norm(hidden, weight, self.bias, eps=self.eps)


class SwiGLU(nn.Module):
    """`silu(gate) * up` between the two linear layers; see `ml_kernels.swiglu`."""

    def __init__(self, *, config: Any = None) -> None:
        """Check that `config`, a megatron-core TransformerConfig, asks for nothing else."""
        super().__init__()
        _refuse_variants("SwiGLU", config)

    def forward(self, gate_and_up: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `(..., F)` from `(..., 2F)`."""
        return swiglu(gate_and_up, bias)


class GEGLU(nn.Module):
    """`gelu(gate) * up` between the two linear layers; see `ml_kernels.geglu`."""

    def __init__(self, *, approximate: Approximation = "tanh", config: Any = None) -> None:
        """Check that `config`, a megatron-core TransformerConfig, asks for nothing else."""
        super().__init__()
        _refuse_variants("GEGLU", config)
        check_approximation("GEGLU", approximate)
        self.approximate: Approximation = approximate

    def forward(self, gate_and_up: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `(..., F)` from `(..., 2F)`."""
        return geglu(gate_and_up, bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        """Show the options in the module's text."""
        return f"approximate={self.approximate!r}"


class GELU(nn.Module):
    """The Gaussian error linear unit between the two linear layers; see `ml_kernels.gelu`."""

    def __init__(self, *, approximate: Approximation = "none", config: Any = None) -> None:
        """Check that `config`, a megatron-core TransformerConfig, asks for nothing else."""
        super().__init__()
        _refuse_variants("GELU", config)
        check_approximation("GELU", approximate)
        self.approximate: Approximation = approximate

    def forward(self, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `(..., F)` from `(..., F)`."""
        return gelu(hidden, bias, approximate=self.approximate)

    def extra_repr(self) -> str:
        """Show the options in the module's text."""
        return f"approximate={self.approximate!r}"


def _unit_offset(config: Any) -> bool:
    return bool(getattr(config, "layernorm_zero_centered_gamma", False))


def _parameter(
    size: int,
    config: Any,
    device: torch.device | str | int | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    if config is None:
        return nn.Parameter(torch.empty(size, device=device, dtype=dtype))
    if device is None:
        on_cpu = getattr(config, "use_cpu_initialization", False)
        device = "cpu" if on_cpu else torch.cuda.current_device()
    return nn.Parameter(torch.empty(size, device=device, dtype=dtype or config.params_dtype))


def _refuse_variants(name: str, config: Any) -> None:
    clamp = getattr(config, "activation_func_clamp_value", None)
    offset = getattr(config, "glu_linear_offset", 0.0)
    if clamp is not None:
        raise ValueError(f"{name}: activation_func_clamp_value {clamp}: must be None")
    if offset:
        raise ValueError(f"{name}: glu_linear_offset {offset}: must be 0")
