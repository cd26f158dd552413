"""Calls of torch_npu's operators on CPU data: schemas and derivatives are its own, values ours.

    from npu_simulator import fake, fake_npu, mutated, recorded_calls, semantics, simulated, ...

    @semantics("npu_swiglu")                     # what the documentation says it computes, on CPU
    def swiglu(input, dim):                      # tensors; the names are those of the real schema;
        gate, up = input.chunk(2, dim)           # missing arguments have its defaults; `**_` takes
        return F.silu(gate) * up                 # those that do not matter

    @semantics("npu_swiglu_backward")            # what torch_npu's derivative formula calls;
    def swiglu_backward(grad_output, input, dim):    # autograd works inside, `vjp` uses it
        return vjp(lambda x: swiglu(x, dim), [input], [grad_output])[0]

    def compare():                               # (c) values and gradients
        x = simulated(values, requires_grad=True)    # device npu:0
        out = ml_kernels.swiglu(x)               # the npu implementation, through the table
        out.backward(simulated(upstream))
        torch.testing.assert_close(to_cpu(out), expected)
        torch.testing.assert_close(to_cpu(x.grad), expected_gradient)

    def compare():                               # the same against our reference, in one line
        assert_like_reference(ml_kernels.swiglu, values)

    with mutated("npu_swiglu", lambda arguments: {"input": arguments["input"].flip(-1)}):
        with pytest.raises(AssertionError):      # (d) a wrong call is noticed
            compare()

    with recorded_calls() as calls: ...          # [("npu_swiglu", {"input": ..., "dim": -1})]

    with fake_npu(), recorded_calls() as calls:  # (a), (b): no values, torch_npu's meta kernels
        x = fake(4, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        ml_kernels.swiglu(x).sum().backward()

Tests run with the simulator on (a fixture in conftest.py), so that tensors created on "npu" inside
an implementation are simulated too; `.cpu()` and `.to("npu")` cross over. An operator without
registered semantics raises NotImplementedError. One that torch_npu has no derivative for raises
MissingDerivativeError when its inputs require gradients: off the test bench these would be None,
with no more than a line on stderr. Several ranks: see `npu_ranks.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NPU = torch.device("npu", 0)

Arguments = dict[str, Any]
Semantics = Callable[..., Any]

_SEMANTICS: dict[str, Semantics] = {}


class UnusedMutationError(RuntimeError):
    """A mutation test whose operator was never called proves nothing."""


class MissingDerivativeError(RuntimeError):
    """torch_npu would silently give no gradient."""


class Simulated(torch.Tensor):
    """A tensor that torch takes for one on npu:0; its numbers are on the CPU."""

    data_on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Simulated:
        made: Simulated = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=NPU,
        )
        made.data_on_cpu = data
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"simulated({self.data_on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def simulated(tensor: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
    """Copy a CPU tensor to the simulated NPU, as a leaf."""
    data = tensor.detach()
    copy = torch.empty_strided(data.shape, data.stride(), dtype=data.dtype)
    return Simulated(copy.copy_(data)).requires_grad_(requires_grad)


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a simulated tensor, detached."""
    assert isinstance(tensor, Simulated), f"not on the simulated NPU: {type(tensor)}"
    return tensor.detach().data_on_cpu


def semantics(operator: str) -> Callable[[Semantics], Semantics]:
    """Register what `torch.ops.npu.<operator>` computes, on CPU tensors.

    An overload is named with its dot: "npu_grouped_matmul.List".
    """
    assert hasattr(torch.ops.npu, operator.partition(".")[0]), f"torch_npu has no {operator}"

    def register(function: Semantics) -> Semantics:
        _SEMANTICS[operator] = function
        return function

    return register


def vjp(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    upstream: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of `inputs` when `upstream` are those of what `function` returns."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    return torch.autograd.grad(
        out, leaves, upstream if isinstance(out, tuple) else upstream[0], allow_unused=True
    )


def assert_like_reference(
    function: Callable[..., Any],
    *inputs: torch.Tensor,
    rtol: float | None = None,
    atol: float | None = None,
) -> None:
    """Compare the npu implementation with the reference: results and gradients of all inputs.

    Args:
        function: Called as `function(*inputs, backend=...)`; returns a tensor or a tuple.
        inputs: CPU tensors; those that are floating point get gradients.
        rtol: As for `torch.testing.assert_close`.
        atol: Likewise.

    Raises:
        AssertionError: They differ.
    """
    places = ((lambda t: t.detach().clone(), "reference"), (simulated, "npu"))
    expected, found = (_with_gradients(function, inputs, *place) for place in places)
    torch.testing.assert_close(tree_map(_plain, found), expected, rtol=rtol, atol=atol)


def _with_gradients(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], place: Any, backend: str
) -> Any:
    leaves = [place(t).requires_grad_(t.is_floating_point()) for t in inputs]
    out = function(*leaves, backend=backend)
    results = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
    generator = torch.Generator().manual_seed(7)
    upstream = [place(torch.randn(t.shape, generator=generator).to(t.dtype)) for t in results]
    torch.autograd.backward(results, upstream)
    return tree_map(torch.Tensor.detach, out), [t.grad for t in leaves]


@contextlib.contextmanager
def simulator() -> Iterator[None]:
    """Simulate tensors that are created on, or moved to, an NPU; refuse missing derivatives."""
    with _Derivatives(), _OnNpu():
        yield


@contextlib.contextmanager
def fake_npu() -> Iterator[FakeTensorMode]:
    """Run torch_npu's meta kernels: shapes, dtypes and devices without values."""
    with FakeTensorMode() as mode:
        yield mode


def fake(
    *shape: int, dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> torch.Tensor:
    """Return a tensor on npu:0 without values; needs `fake_npu()`."""
    return torch.empty(shape, dtype=dtype, device=NPU, requires_grad=requires_grad)


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[tuple[str, Arguments]]]:
    """Collect `(operator, arguments by name)` of every call of torch_npu, backward included."""
    mode = _Recording()
    with mode:
        yield mode.calls


@contextlib.contextmanager
def mutated(operator: str, change: Callable[[Arguments], Arguments]) -> Iterator[None]:
    """Replace arguments of `operator`: `change` gets all by name and returns those to replace.

    One of torch's own is named with its namespace: "aten::_fused_adamw_".

    Raises:
        UnusedMutationError: The operator was not called.
    """
    mode = _Mutating(operator, change)
    with mode:
        yield
    if not mode.used:
        raise UnusedMutationError(f"{operator} was never called")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Arguments]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "npu":
            self.calls.append((_name(func), _bind(func, args, kwargs or {})))
        return func(*args, **kwargs or {})


class _Mutating(TorchDispatchMode):
    def __init__(self, operator: str, change: Callable[[Arguments], Arguments]) -> None:
        super().__init__()
        self.operator = operator if "::" in operator else f"npu::{operator}"
        self.change, self.used = change, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        named = f"{func.namespace}::{_name(func)}" == self.operator
        if not named or not _touches_npu((args, kwargs)):  # the reference may call it on the CPU
            return func(*args, **kwargs or {})
        self.used = True
        bound = _bind(func, args, kwargs or {})
        bound |= self.change(bound)
        given = func._schema.arguments
        args = tuple(bound[argument.name] for argument in given if not argument.kwarg_only)
        return func(*args, **{a.name: bound[a.name] for a in given if a.kwarg_only})


class _Derivatives(TorchFunctionMode):
    """Sees calls before autograd has them, and results with their place in its graph."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for result in tree_leaves(out):
            node = result.grad_fn if isinstance(result, torch.Tensor) else None
            if node is not None and node.name().endswith("WarnNotImplemented"):
                raise MissingDerivativeError(f"{func} has no derivative")
        return out


class _OnNpu(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # FakeTensorMode comes after this one, whichever was entered first.
        faking = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        if func is torch.ops.aten.lift_fresh.default and not faking:
            return _adopt(args[0])
        if faking or not _to_npu(kwargs):
            return func(*args, **kwargs)
        return _run(func, args, kwargs)


def _adopt(tensor: torch.Tensor) -> torch.Tensor:
    """Simulate what `torch.tensor(..., device="npu")` made out of sight, in the stubs' memory."""
    real = tensor.device.type == NPU.type and not isinstance(tensor, Simulated)
    return Simulated(tensor.cpu()) if real else tensor


def _run(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Arguments) -> Any:
    """Compute on the CPU what was called for the NPU."""
    to_npu = _to_npu(kwargs)
    _check_devices(func, (args, kwargs))
    plain_args, plain_kwargs = tree_map(_plain, (tuple(args), kwargs))
    if to_npu:
        plain_kwargs["device"] = torch.device("cpu")
    if func.namespace == "npu":
        out = _documented(func, plain_args, plain_kwargs)
    else:
        out = func(*plain_args, **plain_kwargs)
    if not to_npu and kwargs.get("device") is not None:
        return out  # it went to the CPU
    out = tree_map_only(torch.Tensor, Simulated, out)
    if func.namespace in ("aten", "npu"):
        return return_and_correct_aliasing(func, tuple(args), kwargs, out)
    return out


def _documented(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Arguments) -> Any:
    function = _SEMANTICS.get(_name(func))
    if function is None:
        raise NotImplementedError(f'no @semantics("{_name(func)}") is registered')
    with _autograd_inside_a_kernel():
        out = function(**_bind(func, args, kwargs))
    return tree_map_only(torch.Tensor, torch.Tensor.detach, out)


@contextlib.contextmanager
def _autograd_inside_a_kernel() -> Iterator[None]:
    """Let autograd work in `__torch_dispatch__`, which runs below it."""
    keys = [torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView]
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    for key in keys:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def _name(func: torch._ops.OpOverload) -> str:
    name = func._schema.name.partition("::")[2]
    return f"{name}.{func._schema.overload_name}" if func._schema.overload_name else name


def _bind(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Arguments) -> Arguments:
    """Name every argument as the real schema does; those not given have its defaults."""
    bound: Arguments = {}
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args) and not argument.kwarg_only:
            bound[argument.name] = args[index]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def _to_npu(kwargs: Arguments) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == NPU.type


def _touches_npu(arguments: Any) -> bool:
    leaves = tree_leaves(arguments)
    return any(isinstance(leaf, torch.Tensor) and leaf.device.type == NPU.type for leaf in leaves)


def _plain(value: Any) -> Any:
    return value.data_on_cpu if isinstance(value, Simulated) else value


def _check_devices(func: torch._ops.OpOverload, arguments: Any) -> None:
    """Refuse CPU tensors beside those on the NPU, as a device does; numbers and copies may mix."""
    if func is torch.ops.aten.copy_.default:
        return
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    strangers = [t for t in tensors if not isinstance(t, Simulated) and t.dim()]
    if strangers and len(strangers) < len(tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in strangers)
        raise RuntimeError(f"{func}: on the CPU, not on the NPU like the others: {shapes}")
