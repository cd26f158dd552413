"""One profiler for torch and torch_npu, with the options of the reference's command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, get_args

from ml_kernels.checks import check_integer, require
from ml_kernels.device import DeviceType, why_unavailable
from ml_kernels.dispatch import BackendUnavailableError

Level = Literal["level0", "level1", "level2"]

EVERY_RANK = -1
METADATA_KEY = "distributed_args"


class Profiler(Protocol):
    """What the profilers of torch and torch_npu have in common, and the one that does nothing."""

    def __enter__(self) -> Any:
        """Start."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop, and write the trace if its last step was not reached."""

    def step(self) -> None:
        """Say that a step of the training loop is over."""


class Options(NamedTuple):
    """What a profiler is made from, whoever makes it; see `profiler`."""

    level: Level
    with_cpu: bool
    with_stack: bool
    with_memory: bool
    record_shapes: bool
    skipped: int
    collected: int
    save_path: str
    metadata: str | None
    """As JSON."""


def profiler(
    *,
    device: DeviceType,
    level: Level = "level0",
    with_cpu: bool = False,
    with_stack: bool = False,
    with_memory: bool = False,
    record_shapes: bool = False,
    step_start: int = 10,
    step_end: int = 12,
    save_path: str = "./profile_dir",
    rank: int = 0,
    ranks: Sequence[int] = (EVERY_RANK,),
    metadata: Mapping[str, Any] | None = None,
) -> Profiler:
    """Profile some steps of a training loop and write a trace for TensorBoard or MindStudio.

    `with profiler(device="npu", ...) as profile:`, and `profile.step()` at the end of every step.
    Counted from 0, step `step_start` is the warm-up and steps `step_start + 1` to `step_end` are
    collected.

    Args:
        device: Whose kernels to trace.
        level: How much of an NPU to collect: 0 kernels, 1 also collectives, CANN's calls and the
            use of the pipelines, 2 also the runtime's. Other devices have one level only.
        with_cpu: Trace what the host does as well; on a CPU that is all there is.
        with_stack: Record the Python stack of every operation.
        with_memory: Record allocations.
        record_shapes: Record the shapes of arguments.
        step_start: First step that is not skipped.
        step_end: Last step collected; `step_end - step_start` are.
        save_path: Folder of the traces, created when needed.
        rank: Of this process.
        ranks: The ranks that profile; -1 means all. On others the profiler does nothing.
        metadata: Goes into the trace under the key `distributed_args`.

    Raises:
        ValueError: The level or the device is unknown, or the steps are not in order.
        TypeError: A step is no int, or the metadata cannot be written as JSON.
        BackendUnavailableError: The device cannot be used here.
    """
    require(level in get_args(Level), "profiler", "level", level, f"must be of {get_args(Level)}")
    devices = get_args(DeviceType)
    require(device in devices, "profiler", "device", repr(device), f"must be of {devices}")
    check_integer("profiler", "step_start", step_start)
    check_integer("profiler", "step_end", step_end)
    require(step_start >= 0, "profiler", "step_start", step_start, "must not be negative")
    rule = f"must be after step_start ({step_start})"
    require(step_end > step_start, "profiler", "step_end", step_end, rule)
    if EVERY_RANK not in ranks and rank not in ranks:
        return _Off()
    if reason := why_unavailable(device):
        raise BackendUnavailableError(f"profiler: device={device!r}: {reason}")
    options = Options(
        level,
        with_cpu,
        with_stack,
        with_memory,
        record_shapes,
        step_start,
        step_end - step_start,
        save_path,
        _as_json(metadata),
    )
    if device == "npu":
        from ml_kernels.npu.profiling import npu_profiler

        return npu_profiler(options)
    return _torch_profiler(device, options)


def _as_json(metadata: Mapping[str, Any] | None) -> str | None:
    try:
        return None if metadata is None else json.dumps(metadata)
    except TypeError as error:
        raise TypeError(f"profiler: metadata {metadata}: {error}") from error


def _torch_profiler(device: DeviceType, options: Options) -> Profiler:
    from torch import profiler as torchs

    activities = [torchs.ProfilerActivity.CUDA] if device == "cuda" else []
    if options.with_cpu or device == "cpu":
        activities.append(torchs.ProfilerActivity.CPU)
    made = torchs.profile(
        activities=activities,
        schedule=torchs.schedule(
            skip_first=options.skipped, wait=0, warmup=1, active=options.collected, repeat=1
        ),
        on_trace_ready=torchs.tensorboard_trace_handler(options.save_path),
        record_shapes=options.record_shapes,
        profile_memory=options.with_memory,
        with_stack=options.with_stack,
    )
    if options.metadata is not None:
        made.preset_metadata_json(METADATA_KEY, options.metadata)
    return made


class _Off:
    """The profiler of a rank that does not profile."""

    def __enter__(self) -> _Off:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def step(self) -> None:
        return None
