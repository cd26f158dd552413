"""The profiler of torch_npu."""

from __future__ import annotations

import torch_npu

from ml_kernels.profiling import METADATA_KEY, Options, Profiler


def npu_profiler(options: Options) -> Profiler:
    """See `ml_kernels.profiler`. The use of the pipelines is measured from level 1 on only."""
    torchs = torch_npu.profiler
    level = getattr(torchs.ProfilerLevel, options.level.capitalize())
    metrics = torchs.AiCMetrics
    made = torchs.profile(
        activities=[
            torchs.ProfilerActivity.NPU,
            *([torchs.ProfilerActivity.CPU] if options.with_cpu else []),
        ],
        schedule=torchs.schedule(
            skip_first=options.skipped, wait=0, warmup=1, active=options.collected, repeat=1
        ),
        on_trace_ready=torchs.tensorboard_trace_handler(options.save_path),
        record_shapes=options.record_shapes,
        profile_memory=options.with_memory,
        with_stack=options.with_stack,
        experimental_config=torchs._ExperimentalConfig(
            profiler_level=level,
            aic_metrics=metrics.AiCoreNone
            if options.level == "level0"
            else metrics.PipeUtilization,
        ),
    )
    if options.metadata is not None:
        made.add_metadata_json(METADATA_KEY, options.metadata)
    profiler: Profiler = made
    return profiler
