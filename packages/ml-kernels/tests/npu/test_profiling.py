"""The profiler of torch_npu is made and driven as the options say."""

from __future__ import annotations

import json

import pytest
import torch
import torch_npu

import ml_kernels


def made(tmp_path, **options):
    return ml_kernels.profiler(device="npu", save_path=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("level", "metrics"),
    [("level0", "AiCoreNone"), ("level1", "PipeUtilization"), ("level2", "PipeUtilization")],
)
def test_the_level_decides_what_of_the_cores_is_measured(level, metrics, tmp_path):
    config = made(tmp_path, level=level).prof_if.experimental_config
    profiler = torch_npu.profiler
    assert config._profiler_level == getattr(profiler.ProfilerLevel, level.capitalize())
    assert config._aic_metrics == getattr(profiler.AiCMetrics, metrics)


def test_every_option_reaches_the_profiler(tmp_path, capsys):
    bare = made(tmp_path).prof_if
    full = made(
        tmp_path,
        with_cpu=True,
        with_stack=True,
        with_memory=True,
        record_shapes=True,
        metadata={"rank": 3},
    ).prof_if
    activities = torch_npu.profiler.ProfilerActivity
    assert set(bare.activities) == {activities.NPU}
    assert set(full.activities) == {activities.NPU, activities.CPU}
    flags = ("record_shapes", "profile_memory", "with_stack")
    assert [getattr(bare, flag) for flag in flags] == [False] * 3
    assert [getattr(full, flag) for flag in flags] == [True] * 3
    assert full.metadata == {"distributed_args": {"rank": 3}}
    assert "Warning" not in capsys.readouterr().out


def test_one_step_warms_up_and_the_rest_are_collected(tmp_path):
    actions = torch_npu.profiler.ProfilerAction
    schedule = made(tmp_path, step_start=1, step_end=3).schedule
    assert [schedule(step) for step in range(6)] == [
        actions.NONE,
        actions.WARMUP,
        actions.RECORD,
        actions.RECORD_AND_SAVE,
        actions.NONE,
        actions.NONE,
    ]


def test_a_loop_leaves_a_trace_folder(tmp_path):
    with made(tmp_path, step_start=0, step_end=1, metadata={"rank": 3}) as profile:
        for _ in range(3):
            torch.ones(2, device="npu").sum()
            profile.step()
    (metadata,) = tmp_path.rglob("profiler_metadata.json")
    assert json.loads(metadata.read_text())["distributed_args"] == {"rank": 3}
