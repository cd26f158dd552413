"""Compare the operators of `ml_kernels` with eager torch and with Hugging Face's own modules.

    python tools/bench/kernels.py            # every operator, about four minutes on two cores
    python tools/bench/kernels.py rms_norm   # these operators only
    python tools/bench/kernels.py --quick    # tiny shapes: only to see that it works

Every figure is the time of one forward and backward pass. The sides take turns, many times, and the
fastest turn of each counts: what else the machine does only ever adds. Memory is the growth of the
peak resident size of a process of its own.

On a machine with a CUDA GPU everything runs there, on a layer of Llama-3-8B, against torch.compile
and, where it is installed, Liger Kernel. What is timed is the work of the GPU; for operators that
only move memory the share of the copy bandwidth is given. Memory is the growth of the peak
allocation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from kernel_cases import (
    CASES,
    LARGE,
    LOSS_SHAPES,
    SMALL,
    TINY,
    Case,
    Side,
    Sizes,
    has_liger,
    loss_dtype,
    loss_shapes,
    loss_sides,
)
from machine import machine

import ml_kernels
from ml_kernels import dispatch
from ml_kernels.dispatch import implementation

DTYPES = ("float32", "bfloat16")
_CYCLES = 30_000_000
"""That a GPU sleeps: some twenty milliseconds."""


def main() -> None:
    """Measure and print Markdown."""
    # transformers looks for a package called `kernels`, and must not take this file for it.
    sys.path.remove(str(Path(__file__).resolve().parent))
    options = _options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = TINY if options.quick else LARGE if device.type == "cuda" else SMALL
    if options.memory:
        print(json.dumps(peak_growth(options.memory, sizes, device)))
        return
    packages = ["triton", "liger-kernel"] if has_liger(device) else []
    _print(machine("torch", "transformers", *packages, "ml-kernels"))
    chosen = [case for case in CASES if case.name in options.operators or not options.operators]
    seconds = 0.05 if options.quick else options.seconds
    dtypes = [getattr(torch, name) for name in options.dtypes]
    if chosen:
        _print(speed_table(chosen, sizes, device, dtypes, seconds))
    if not options.operators or "linear_cross_entropy" in options.operators:
        _print(memory_table(device, quick=options.quick))
    if not options.operators:
        _print(overheads())


def _print(lines: Iterable[str]) -> None:
    """Print a paragraph, each line when it is known."""
    for line in lines:
        print(line, flush=True)
    print()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = sorted({case.name for case in CASES} | {"linear_cross_entropy"})
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=", ".join(known))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=4.0, help="for all turns of one case")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a moment each")
    parser.add_argument("--memory", choices=LOSS_SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.operators) - set(known):
        parser.error(f"no operator {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return options


# Speed


def speed_table(
    cases: Sequence[Case],
    sizes: Sizes,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    seconds: float,
) -> Iterator[str]:
    """Time every case in every dtype; a column is how many times as fast ours is."""
    copy = copy_bandwidth(device) if device.type == "cuda" else None
    peers = sorted({name for case in cases for name in case.peers_on(device)}, key=_order)
    yield f"| operator | dtype | ours | {' | '.join(f'/ {peer}' for peer in peers)} |" + (
        " of copy bandwidth |" if copy else ""
    )
    yield "|---|---|---:|" + "---:|" * (len(peers) + bool(copy))
    for case in cases:
        for dtype in dtypes:
            best = fastest(case.sides(sizes, device, dtype), device, seconds)
            ours = best.pop("ours")
            ratios = [f"{best[peer] / ours:.2f}x" if peer in best else "" for peer in peers]
            name = str(dtype).removeprefix("torch.")
            row = f"| {case.title} | {name} | {ours * 1e3:.2f} ms | {' | '.join(ratios)} |"
            if copy:
                moved = case.elements_moved(sizes) * dtype.itemsize
                row += f" {moved / ours / copy:.0%} |" if moved else " |"
            yield row


def _order(peer: str) -> tuple[int, str]:
    known = ("eager", "Hugging Face", "torch.compile", "Liger")
    return known.index(peer) if peer in known else len(known), peer


def fastest(sides: dict[str, Side], device: torch.device, seconds: float) -> dict[str, float]:
    """Let the sides take turns for a while; return the fastest turn of each, in seconds."""
    for side in sides.values():
        for _ in range(2):
            _turn(side, device)
    best = dict.fromkeys(sides, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, side in sides.items():
            best[name] = min(best[name], _turn(side, device))
    return best


def _turn(side: Side, device: torch.device) -> float:
    if device.type == "cuda":
        return _turn_of_gpu(side)
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def _turn_of_gpu(side: Side, passes: int = 5) -> float:
    """Return the seconds that a GPU works for a pass, without waiting for the host to ask for it.

    It sleeps first, while the host puts the passes into its queue: in training the host is ahead.
    """
    start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(passes):
        side()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / passes


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sides: dict[str, Side] = {"copy": lambda: target.copy_(source)}
    return 2 * source.numel() / fastest(sides, device, 0.5)["copy"]


def overheads() -> Iterator[str]:
    """Say how long a public function takes before its implementation runs: look-up and checks."""
    x, weight = torch.randn(4, 64), torch.ones(64)
    q = torch.randn(1, 4, 2, 16)
    calls: dict[str, Side] = {
        "rms_norm": lambda: ml_kernels.rms_norm(x, weight, eps=1e-6),
        "swiglu": lambda: ml_kernels.swiglu(x),
        "flash_attention": lambda: ml_kernels.flash_attention(q, q, q, layout="BSND", causal=True),
    }
    look_up = _per_call(lambda: implementation("rms_norm", x))
    added = {name: _without_work(name, call) for name, call in calls.items()}
    yield f"Choosing an implementation takes {look_up * 1e6:.2f} us a call; with the checks of the"
    each = ", ".join(f"{seconds * 1e6:.1f} us for `{name}`" for name, seconds in added.items())
    yield f"arguments it is {each}."


def _without_work(operator: str, call: Side) -> float:
    """Time a call whose implementation does nothing."""
    implementation(operator, torch.empty(0))
    slot = dispatch._slots[dispatch.IMPLEMENTATIONS[operator, "cpu"]]
    with mock.patch.object(slot, "function", _nothing):
        return _per_call(call)


def _nothing(*_: object) -> None:
    """Stand in for an implementation."""


def _per_call(function: Callable[[], object], calls: int = 2000, repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


# Memory


def memory_table(device: torch.device, *, quick: bool) -> Iterator[str]:
    """Compare the memory and the time of a loss that holds all logits with those that do not."""
    dtype = str(loss_dtype(device)).removeprefix("torch.")
    yield f"| linear + cross entropy, {dtype} | peak memory | of full | time | of full |"
    yield "|---|---:|---:|---:|---:|"
    results = {shape: _in_own_process(shape, quick=quick) for shape in loss_shapes(device)}
    full = results["full logits"]
    for name, found in results.items():
        memory, seconds = found["bytes"], found["seconds"]
        yield (
            f"| {name} | {memory / 2**20:,.0f} MiB | {memory / max(1, full['bytes']):.0%} "
            f"| {seconds * 1e3:,.1f} ms | {seconds / full['seconds']:.2f}x |"
        )


def _in_own_process(shape: str, *, quick: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--memory", shape, *(["--quick"] if quick else [])]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(1 if quick else 3)
    ]
    return {
        "bytes": statistics.median(run["bytes"] for run in runs),
        "seconds": min(run["seconds"] for run in runs),
    }


def peak_growth(shape: str, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """Run one form of the loss in this process; return how its peak memory grew, and its time."""
    warm_up, side = loss_sides(shape, sizes, device)
    warm_up()
    before = _peak(device)
    seconds = min(_turn(side, device) for _ in range(5))
    return {"bytes": _peak(device) - before, "seconds": seconds}


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # the other way counts what the process was before it began this program
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


if __name__ == "__main__":
    main()
