"""What megatron-core needs to run on a CPU over gloo: a CPU that answers the CUDA calls it makes.

A CPU has no streams, no asynchronous kernels and one random generator, so most answers are
"nothing to do". Written for megatron-core 0.16.x and torch 2.7 to 2.13.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ml_parallel.platform.patches import Patch

_CPU = torch.device("cpu")


class Stream:
    """A stream on a device that runs everything at once, in order."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def wait_stream(self, _stream: Stream) -> None:
        """Nothing runs behind: there is nothing to wait for."""

    def wait_event(self, _event: Event) -> None:
        """Nothing runs behind: there is nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """Everything before this call has happened already."""
        return event or Event()

    def synchronize(self) -> None:
        """Everything has happened already."""


class Event:
    """A point in a stream that has always been reached."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def record(self, _stream: Stream | None = None) -> None:
        """Nothing runs behind."""

    def wait(self, _stream: Stream | None = None) -> None:
        """Nothing runs behind."""

    def synchronize(self) -> None:
        """Nothing runs behind."""

    def query(self) -> bool:
        """It has been reached."""
        return True


class TypeName(str):
    """The name of a CPU tensor type that also equals its CUDA name.

    The optimizers accept a parameter only if `param.type()` is "torch.cuda.FloatTensor" (or Half
    or BFloat16).
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        names = (str(self), self.replace("torch.", "torch.cuda.", 1))
        return isinstance(other, str) and str(other) in names

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _factory(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _current_device()
        return original(*args, **kwargs)

    return create


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return TypeName(result) if isinstance(result, str) else result

    return type_


def _stay(_original: object) -> Callable[..., Any]:
    def cuda(self: Any, *_args: object, **_kwargs: object) -> Any:
        return self

    return cuda


def _answer(value: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a `replace` that puts a function calling `value`, whatever was there.

    A new function each time: torch.compile refuses one object under two names of torch.
    """

    def replace(_original: object) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            return value(*args, **kwargs)

        return answer

    return replace


def _get_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
    torch.set_rng_state(state)


def _manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Nothing to wait for, nothing to choose."""


def _current_device() -> torch.device:
    """Return the CPU, or "meta" in a `with torch.device("meta")`: a model without its memory."""
    default = torch.get_default_device()
    return default if default.type == "meta" else _CPU


def _stream_context(_stream: Stream) -> AbstractContextManager[None]:
    return nullcontext()


def _current_stream(_device: object = None) -> Stream:
    return Stream()


def _as_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    return move


def _padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_zeros(length - rows.shape[0], *rows.shape[1:])])


def _gather_uneven(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def gather(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        rows = original(_padded(input_, longest), group)
        parts = torch.split(rows, longest) if longest else [rows] * group.size()
        return torch.cat([part[:n] for part, n in zip(parts, output_split_sizes, strict=True)])

    return gather


def _reduce_scatter_uneven(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def reduce_scatter(
        input_: torch.Tensor,
        group: Any,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        longest = max(input_split_sizes)
        parts = torch.split(input_, input_split_sizes)
        rows = original(torch.cat([_padded(part, longest) for part in parts]), group)
        return rows[: input_split_sizes[group.rank()]].contiguous()

    return reduce_scatter


def _quiet_fork(original: Any) -> Any:
    # On a CPU the "device" generator that the tracker switches IS the CPU generator, so its
    # warning that the CPU generator changed inside `fork` would come at every dropout.
    logging.getLogger(original.__module__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
    return original


def _cuda(name: str, value: Callable[..., Any], reason: str) -> Patch:
    return Patch(module="torch.cuda", name=name, replace=_answer(value), reason=reason)


PATCHES: tuple[Patch, ...] = (
    _cuda("current_device", _current_device, "buffers are created on torch.cuda.current_device()"),
    _cuda("set_device", _nothing, "there is one CPU"),
    _cuda("synchronize", _nothing, "timers and pipeline transfers wait for the device"),
    Patch(
        module="torch.cuda",
        name="Stream",
        replace=lambda _original: Stream,
        reason="DDP creates a communication stream for optimizer instances",
    ),
    Patch(
        module="torch.cuda",
        name="Event",
        replace=lambda _original: Event,
        reason="the counterpart of streams",
    ),
    _cuda("stream", _stream_context, "bucket collectives run inside a stream context"),
    _cuda("current_stream", _current_stream, "tensors are recorded on the current stream"),
    _cuda("default_stream", _current_stream, "gradient reduction waits for the default stream"),
    _cuda("get_rng_state", _get_rng_state, "the random tracker stores the device generator"),
    _cuda("set_rng_state", _set_rng_state, "the random tracker restores the device generator"),
    _cuda("manual_seed", _manual_seed, "model_parallel_cuda_manual_seed seeds the device"),
    *(
        Patch(
            module="torch",
            name=name,
            replace=_factory,
            reason='schedules, optimizers and gradient clipping create tensors on device="cuda"',
        )
        for name in ("empty", "full", "ones", "tensor", "zeros")
    ),
    Patch(
        module="torch",
        name="Tensor.cuda",
        replace=_stay,
        reason="tied embeddings, broadcasts and optimizer state are moved with .cuda()",
    ),
    Patch(
        module="torch.nn",
        name="Module.cuda",
        replace=_stay,
        reason="modules are moved with .cuda()",
    ),
    Patch(
        module="torch",
        name="Tensor.type",
        replace=_tensor_type,
        reason='optimizers and clipping compare it with "torch.cuda.FloatTensor" and its kin',
    ),
    Patch(
        module="megatron.core.tensor_parallel.random",
        name="_get_cuda_rng_state",
        replace=_answer(_get_rng_state),
        reason="it reads the generator of a CUDA device",
    ),
    Patch(
        module="megatron.core.tensor_parallel.random",
        name="_set_cuda_rng_state",
        replace=_answer(_set_rng_state),
        reason="it queues a call until CUDA is initialised, which never happens",
    ),
    Patch(
        module="megatron.core.tensor_parallel.random",
        name="CudaRNGStatesTracker",
        replace=_quiet_fork,
        reason="its warning about the CPU generator is wrong where that is the device generator",
    ),
    Patch(
        module="megatron.core.transformer.moe.token_dispatcher",
        name="maybe_move_tensor_to_cpu",
        replace=_as_sizes,
        reason="it makes the sizes of an all-to-all numbers only if they are on a CUDA device",
    ),
    Patch(
        module="megatron.core.tensor_parallel.mappings",
        name="_gather_along_first_dim",
        replace=_gather_uneven,
        reason="gloo gathers parts of one size only; experts have different numbers of tokens",
    ),
    Patch(
        module="megatron.core.tensor_parallel.mappings",
        name="_reduce_scatter_along_first_dim",
        replace=_reduce_scatter_uneven,
        reason="gloo scatters parts of one size only; experts have different numbers of tokens",
    ),
)
"""Every name replaced on a CPU."""
