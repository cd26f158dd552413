"""What stands between the two linear layers of an MLP, dense or expert.

Shapes: `F` is the width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from ml_kernels import modules
from ml_models.architecture import Architecture

_SHARPNESS = 1.702
"""Makes x * sigmoid(1.702 x) close to gelu(x) (Hendrycks, Gimpel, arXiv:1606.08415)."""


class _Stateless(nn.Module):
    """A part of an MLP of which megatron-core's distributed checkpoints hold nothing."""

    def sharded_state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Answer megatron-core's MLP, which asks all its parts."""
        return {}


class SwiGLU(_Stateless, modules.SwiGLU):
    """`silu(gate) * up`."""


class GEGLU(_Stateless, modules.GEGLU):
    """`gelu(gate) * up`."""


class GELU(_Stateless, modules.GELU):
    """The Gaussian error linear unit."""


class QuickGEGLU(_Stateless):
    """`gate * sigmoid(1.702 gate) * (up + offset)` after clamping both, as in gpt-oss.

    There is no fused operator of it; each of its few passes is bound by memory.
    """

    def __init__(
        self, *, clamp: float | None = None, offset: float = 0.0, config: Any = None
    ) -> None:
        """Keep the options; `config` is megatron-core's, which says nothing more.

        Args:
            clamp: gate is at most this, up at most this in either direction.
            offset: Added to up.
            config: Ignored.
        """
        super().__init__()
        del config
        self.clamp, self.offset = clamp, offset

    def forward(self, gate_and_up: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `(..., F)` from `(..., 2F)`: gate first, then up."""
        both = gate_and_up if bias is None else gate_and_up + bias
        gate, up = both.chunk(2, dim=-1)
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return gate * torch.sigmoid(_SHARPNESS * gate) * (up + self.offset)

    def extra_repr(self) -> str:
        """Show the options in the module's text."""
        return f"clamp={self.clamp}, offset={self.offset}"


def activation_spec(arch: Architecture) -> type | ModuleSpec:
    """Describe the activation of a model's MLPs and experts."""
    if arch.swiglu:
        return SwiGLU
    if arch.geglu:
        return GEGLU
    if arch.quick_geglu:
        options = {"clamp": arch.activation_func_clamp_value, "offset": arch.glu_linear_offset}
        return ModuleSpec(module=QuickGEGLU, params=options)
    approximate = "tanh" if arch.approximate_gelu else "none"
    return ModuleSpec(module=GELU, params={"approximate": approximate})
