"""What every operator checks of its arguments before a kernel runs.

The NPU's own checks accept many wrong calls, and compute something else. Each message names the
operator, the argument, what it is and the rule.
"""

from __future__ import annotations

import math

import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensor


def require(condition: bool, operator: str, argument: str, value: object, rule: str) -> None:
    """Raise the ValueError of an argument whose value breaks a rule.

    Raises:
        ValueError: `condition` is False.
    """
    if not condition:
        raise ValueError(f"{operator}: {argument} {value}: {rule}")


def may_look_at(tensor: torch.Tensor) -> bool:
    """Say whether the values of a tensor can be checked at no cost: real ones, on the CPU.

    An accelerator would have to be waited for, a graph that is traced would break, and a fake
    tensor has none.
    """
    fake = isinstance(tensor, FakeTensor)
    return tensor.device.type == "cpu" and not fake and not torch.compiler.is_compiling()


def check_integer(operator: str, argument: str, value: object) -> None:
    """Refuse what counts nothing: 2.0 and True too, which torch takes in some places.

    Raises:
        TypeError: `value` is no int.
    """
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{operator}: {argument} {value!r}: must be an int")


def check_finite(operator: str, **values: float) -> None:
    """Refuse numbers that would make every result inf or NaN.

    Raises:
        ValueError: One of them is.
    """
    for argument, value in values.items():
        require(math.isfinite(value), operator, argument, value, "must be finite")


def check_floating(operator: str, argument: str, tensor: torch.Tensor) -> None:
    """Refuse what is no floating-point tensor.

    Raises:
        TypeError: It is not.
    """
    check_tensor(operator, argument, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{operator}: {argument} is {tensor.dtype}: must be floating point")


def check_tensor(operator: str, argument: str, tensor: object) -> None:
    """Refuse what is no tensor.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{operator}: {argument} is a {type(tensor).__name__}: must be a tensor")


def check_same_device(
    operator: str, argument: str, tensor: torch.Tensor, like: torch.Tensor
) -> None:
    """Refuse tensors on different devices.

    Raises:
        ValueError: `tensor` is not where `like` is.
        TypeError: It is no tensor.
    """
    check_tensor(operator, argument, tensor)
    if tensor.device != like.device:
        raise ValueError(
            f"{operator}: {argument} is on {tensor.device}: must be on {like.device} like the first"
        )


def check_same_dtype(
    operator: str, argument: str, tensor: torch.Tensor, like: torch.Tensor
) -> None:
    """Refuse tensors of different dtypes.

    Raises:
        TypeError: `tensor` is not of the dtype of `like`.
    """
    check_tensor(operator, argument, tensor)
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"{operator}: {argument} is {tensor.dtype}: must be {like.dtype} like the first"
        )


def check_group(operator: str, group: object) -> None:
    """Refuse what `torch.distributed.new_group` gives to processes that it leaves out.

    Raises:
        TypeError: `group` is no process group.
    """
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            f"{operator}: group is {group!r}: must be a ProcessGroup that this process belongs to"
        )


def check_weight(operator: str, argument: str, weight: torch.Tensor, x: torch.Tensor) -> None:
    """Check a vector that scales or shifts the last dimension of `x`.

    Raises:
        ValueError: Its shape or device does not fit.
        TypeError: It has neither the dtype of `x` nor float32.
    """
    check_tensor(operator, argument, weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{operator}: {argument} {tuple(weight.shape)}: must be ({x.shape[-1]},), the last "
            f"dimension of x {tuple(x.shape)}"
        )
    check_same_device(operator, argument, weight, x)
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        raise TypeError(f"{operator}: {argument} is {weight.dtype}: must be {x.dtype} or float32")
