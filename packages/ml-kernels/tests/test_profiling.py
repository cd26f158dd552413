"""Profiles of a small loop on a CPU: the trace files that are written."""

from __future__ import annotations

import json

import pytest
import torch

import ml_kernels
from ml_kernels.device import why_unavailable


def profile_steps(folder, steps=6, **options):
    """Run `steps` products under the profiler and return the traces that it wrote."""
    x = torch.ones(4, 4)
    with ml_kernels.profiler(device="cpu", save_path=str(folder), **options) as profile:
        for _ in range(steps):
            torch.mm(x, x)
            profile.step()
    return [json.loads(file.read_text()) for file in folder.glob("*.pt.trace.json")]


def names(trace):
    return [event["name"] for event in trace["traceEvents"] if "name" in event]


def test_the_steps_after_the_warm_up_are_collected(tmp_path):
    (trace,) = profile_steps(tmp_path, step_start=1, step_end=3)
    steps = sorted({name for name in names(trace) if name.startswith("ProfilerStep#")})
    assert steps == ["ProfilerStep#2", "ProfilerStep#3"]
    assert names(trace).count("aten::mm") == 2


def test_a_loop_that_ends_early_leaves_what_it_has(tmp_path):
    (trace,) = profile_steps(tmp_path, steps=3, step_start=0, step_end=9)
    assert names(trace).count("aten::mm") == 2


def test_shapes_stacks_and_memory_are_recorded_when_asked_for(tmp_path):
    (bare,) = profile_steps(tmp_path / "bare", step_start=0, step_end=1)
    (full,) = profile_steps(
        tmp_path / "full",
        step_start=0,
        step_end=1,
        record_shapes=True,
        with_stack=True,
        with_memory=True,
    )
    found = [
        (
            any("Input Dims" in event.get("args", {}) for event in trace["traceEvents"]),
            any(event.get("cat") == "python_function" for event in trace["traceEvents"]),
            "[memory]" in names(trace),
        )
        for trace in (bare, full)
    ]
    assert found == [(False, False, False), (True, True, True)]


def test_the_layout_of_the_ranks_goes_into_the_trace(tmp_path):
    layout = {"tensor_model_parallel_size": 2, "rank": 1}
    (trace,) = profile_steps(tmp_path, step_start=0, step_end=1, metadata=layout)
    assert trace["distributed_args"] == layout


@pytest.mark.parametrize(("ranks", "traces"), [((-1,), 1), ((0, 3), 1), ((0, 1), 0)])
def test_only_the_chosen_ranks_profile(ranks, traces, tmp_path):
    found = profile_steps(tmp_path, step_start=0, step_end=1, rank=3, ranks=ranks)
    assert len(found) == traces


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "level3"}, "profiler: level level3: must be of .*level0"),
        ({"step_start": -1}, "step_start -1: must not be negative"),
        ({"device": "tpu"}, "profiler: device 'tpu': must be of .*'npu', 'cuda', 'cpu'"),
        ({"step_start": 5, "step_end": 5}, r"step_end 5: must be after step_start \(5\)"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ml_kernels.profiler(**{"device": "cpu", **options})


def test_metadata_that_json_does_not_know_is_named():
    with pytest.raises(TypeError, match=r"profiler: metadata .*torch.float32.*: Object of type"):
        ml_kernels.profiler(device="cpu", metadata={"dtype": torch.float32})


def test_steps_are_counted_in_whole_numbers():
    with pytest.raises(TypeError, match=r"profiler: step_end 3\.5: must be an int"):
        ml_kernels.profiler(device="cpu", step_start=1, step_end=3.5)


@pytest.mark.skipif(why_unavailable("npu") is None, reason="there is an NPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ml_kernels.BackendUnavailableError, match=r"device='npu': .*torch_npu"):
        ml_kernels.profiler(device="npu")
