"""Compare the training throughput of `ml-train pretrain` with the Hugging Face Trainer.

    python tools/bench/train.py                  # both dtypes, about half an hour on two cores
    python tools/bench/train.py --dtype bf16
    python tools/bench/train.py --quick          # a tiny model: only to see that it works

Both train a Llama of 99 million parameters on the same tokens, with the same batches and AdamW, in
processes of their own that take turns, so that what else the machine does hits both. Tokens/s are
those of the median step, global batch size x sequence length / seconds, over all devices; the first
steps of every run are left out on both sides. "Memory kept" is the Trainer with glibc told to reuse
freed memory, which `ml-train` does by itself. MFU is the model's FLOP/s as `ml-train` counts them
(attention without causal sparsity, as Megatron does) over the matmul peak of the same machine,
measured in the same turns. On a machine with a CUDA GPU both use one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from machine import machine

from ml_data.atomic import FileSet
from ml_data.indexed import IndexedDatasetWriter
from ml_models.architecture import Architecture
from ml_models.registry import family
from ml_train.throughput import model_flops_per_iteration

LEARNING_RATE = "3e-4"
WARM_UP = 2
"""First steps of a run that are not counted: caches, lazy allocations, the first kernel calls."""

KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""What `ml_parallel.platform.memory` does, for the other side: shows its part of the ratio."""

_PEAK = """
import sys, torch
from ml_train.peak import matmul_peak
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(matmul_peak(device, getattr(torch, sys.argv[1])))
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides train."""

    arch: Architecture
    dtype: str
    seq_length: int
    micro_batch_size: int
    global_batch_size: int
    steps: int
    """Measured ones, in each run."""

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.global_batch_size * self.seq_length

    @property
    def flops(self) -> float:
        """FLOP of a step."""
        return model_flops_per_iteration(
            self.arch,
            self.global_batch_size,
            seq_length=self.seq_length,
            padded_vocab_size=self.arch.vocab_size,
        )

    def flags(self, data: str, metrics: Path) -> list[str]:
        """Return the flags of `ml-train pretrain`."""
        arch = self.arch
        names = (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "max_position_embeddings",
            "vocab_size",
            "normalization",
        )
        shape = [word for n in names for word in (_flag(n), str(getattr(arch, n)))]
        batch = [
            word
            for name in ("seq_length", "micro_batch_size", "global_batch_size")
            for word in (_flag(name), str(getattr(self, name)))
        ]
        return [
            *shape,
            *("--swiglu", "--untie-embeddings-and-output-weights", "--disable-bias-linear"),
            *batch,
            *("--train-iters", str(self.steps + WARM_UP)),
            *(["--bf16"] if self.dtype == "bf16" else []),
            *("--lr", LEARNING_RATE, "--lr-decay-style", "constant", "--weight-decay", "0.1"),
            *("--data-path", data, "--split", "1,0,0", "--metrics-file", str(metrics)),
        ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the things compared, and what was measured of it."""

    name: str
    ours: bool
    processes: int
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """Of every measured step."""
    peak_rss: list[int] = field(default_factory=list)
    """Bytes, of the largest process of every run."""

    def run(self, job: Job, data: str, scratch: Path) -> None:
        """Train once and note the measured steps."""
        threads = max(1, (os.cpu_count() or 1) // self.processes)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **self.environment}
        metrics = scratch / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        command = self._ours(job, data, metrics) if self.ours else self._theirs(job, data)
        output, peak_rss = _run(command, environment)
        steps = _steps(metrics) if self.ours else json.loads(output.splitlines()[-1])
        # The Trainer has no time for its first step, which is a warm-up anyway.
        self.seconds.extend(steps[-job.steps :])
        self.peak_rss.append(peak_rss)

    def _ours(self, job: Job, data: str, metrics: Path) -> list[str]:
        command = [sys.executable, "-m", "ml_train", "pretrain", *job.flags(data, metrics)]
        return [*command, "--nproc-per-node", str(self.processes)]

    def _theirs(self, job: Job, data: str) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.processes)]
        accumulation = job.global_batch_size // (job.micro_batch_size * self.processes)
        config = family("llama").to_hf(job.arch, "float32")
        return [
            *(sys.executable, "-W", "ignore"),
            *(launcher if self.processes > 1 else []),
            str(Path(__file__).with_name("huggingface_trainer.py")),
            *("--data", data, "--model", json.dumps(config)),
            *("--dtype", job.dtype, "--seq-length", str(job.seq_length)),
            *("--steps", str(job.steps + WARM_UP), "--accumulation", str(accumulation)),
            *("--micro-batch-size", str(job.micro_batch_size), "--lr", LEARNING_RATE),
        ]


def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
    """Run a command; return what it prints and the resident bytes of its largest process."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
        return output.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _steps(metrics: Path) -> list[float]:
    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    return [line["elapsed_seconds"] for line in lines if line["kind"] == "step"]


def write_data(prefix: str, job: Job) -> None:
    """Write random tokens, one sample a document; their values do not change the speed."""
    samples = (job.steps + WARM_UP) * job.global_batch_size
    tokens = np.random.default_rng(0).integers(
        job.arch.vocab_size, size=samples * (job.seq_length + 1)
    )
    with FileSet() as files:
        writer = IndexedDatasetWriter(prefix, np.uint16, files)
        writer.add_documents(tokens, np.full(samples, job.seq_length + 1))
        writer.write_index()
        files.publish()


def measure(job: Job, sides: Sequence[Side], repeats: int) -> float:
    """Let the sides and the matmul take turns; return the matmul peak of the machine, FLOP/s."""
    dtype = "bfloat16" if job.dtype == "bf16" else "float32"
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        data = str(Path(scratch) / "tokens")
        write_data(data, job)
        for turn in range(repeats):
            text, _ = _run([sys.executable, "-c", _PEAK, dtype], {**os.environ, **threads})
            peaks.append(float(text) * 1e12)
            for side in sides:
                side.run(job, data, Path(scratch))
                _say(f"{job.dtype} turn {turn + 1}/{repeats}: {side.name}: {_times(side, job)}")
    return max(peaks)


def _times(side: Side, job: Job) -> str:
    return " ".join(f"{seconds:.2f}" for seconds in side.seconds[-job.steps :]) + " s"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def table(job: Job, sides: Sequence[Side], peak: float) -> Iterator[str]:
    """Write the result as Markdown."""
    baseline = statistics.median(sides[0].seconds)
    yield f"| {job.dtype} | tokens/s | ratio | MFU | best step: tokens/s | MFU | memory |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for side in sides:
        middle, best = statistics.median(side.seconds), min(side.seconds)
        yield (
            f"| {side.name} | {job.tokens / middle:,.0f} | {baseline / middle:.2f} "
            f"| {job.flops / middle / peak:.2g} | {job.tokens / best:,.0f} "
            f"| {job.flops / best / peak:.2g} | {max(side.peak_rss) / 2**30:.1f} GiB |"
        )
    yield ""
    yield (
        f"Matmul peak {peak / 1e9:,.0f} GFLOP/s; {len(sides[0].seconds)} steps of {job.tokens:,} "
        f"tokens ({job.global_batch_size} samples of {job.seq_length}, {job.micro_batch_size} at a "
        f"time) on each side; {job.flops / job.tokens / 1e9:.3f} GFLOP a token."
    )


def main() -> None:
    """Measure and print Markdown."""
    options = _options()
    packages = ("torch", "megatron-core", "transformers", "accelerate", "ml-train", "ml-kernels")
    print("\n".join(machine(*packages)))
    sides = _sides(quick=options.quick)
    before = os.getloadavg()[0]
    for dtype in ("fp32", "bf16") if options.dtype == "both" else (options.dtype,):
        fresh = [dataclasses.replace(side, seconds=[], peak_rss=[]) for side in sides]
        job = _job(options, dtype)
        peak = measure(job, fresh, options.repeats)
        print("\n" + "\n".join(table(job, fresh, peak)), flush=True)
    print(f"\nLoad of the machine before the first run: {before:.1f}.")


def _sides(*, quick: bool) -> list[Side]:
    theirs, ours = "Hugging Face Trainer", "ml-train pretrain"
    sides = [
        Side(name=theirs, ours=False, processes=1),
        Side(name=ours, ours=True, processes=1),
    ]
    if quick or torch.cuda.is_available():
        return sides
    sides.append(Side(name=f"{theirs}, memory kept", ours=False, processes=1, environment=KEPT))
    if (os.cpu_count() or 1) > 1:
        two = "2 data-parallel processes"
        sides.append(
            Side(name=f"{theirs}, memory kept, {two}", ours=False, processes=2, environment=KEPT)
        )
        sides.append(Side(name=f"{ours}, {two}", ours=True, processes=2))
    return sides


def _job(options: argparse.Namespace, dtype: str) -> Job:
    quick = options.quick
    arch = Architecture(
        num_layers=2 if quick else 8,
        hidden_size=96 if quick else 768,
        ffn_hidden_size=256 if quick else 2048,
        num_attention_heads=12,
        num_query_groups=4,
        vocab_size=1024 if quick else 32000,
        max_position_embeddings=options.seq_length,
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=True,
    )
    return Job(
        arch=arch,
        dtype=dtype,
        seq_length=options.seq_length,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.global_batch_size,
        steps=options.steps,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("both", "fp32", "bf16"), default="both")
    parser.add_argument("--steps", type=int, default=4, help="measured in a run (default: 4)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a side (default: 3)")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats = 2, 1
        options.seq_length, options.global_batch_size = 128, 4
    return options


if __name__ == "__main__":
    main()
