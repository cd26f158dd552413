"""Compare the operators of `ml_kernels` with eager torch and with Hugging Face's own modules.

    python tools/bench/kernels.py            # every operator, about four minutes on two cores
    python tools/bench/kernels.py rms_norm   # these operators only
    python tools/bench/kernels.py --quick    # tiny shapes: only to see that it works

Every figure is the time of one forward and backward pass. The sides take turns, many times, and the
fastest turn of each counts: what else the machine does only ever adds. On a machine with a CUDA GPU
everything runs there, against torch.compile and, where it is installed, Liger Kernel; for operators
that only move memory the share of the copy bandwidth is given. Memory is the growth of the peak
resident size of a process of its own (of the peak allocation on a GPU).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, LOSS_SHAPES, Case, Side, Sizes, loss_sides
from machine import machine

import ml_kernels
from ml_kernels.attention_checks import checked_call
from ml_kernels.dispatch import implementation

SECONDS = 4.0
"""Time for all turns of one case."""


def main() -> None:
    """Measure and print Markdown."""
    # transformers looks for a package called `kernels`, and must not take this file for it.
    sys.path.remove(str(Path(__file__).resolve().parent))
    options = _options()
    if options.memory:
        print(json.dumps(peak_growth(options.memory, Sizes(quick=options.quick))))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("\n".join(machine("torch", "transformers", "ml-kernels")))
    sizes = Sizes(quick=options.quick)
    chosen = [case for case in CASES if case.name in options.operators or not options.operators]
    seconds = 0.05 if options.quick else SECONDS
    if chosen:
        print("\n" + "\n".join(speed_table(chosen, sizes, device, seconds)), flush=True)
    if not options.operators or "linear_cross_entropy" in options.operators:
        print("\n" + "\n".join(memory_table(sizes)), flush=True)
    if not options.operators:
        print("\n" + "\n".join(overheads()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = sorted({case.name for case in CASES} | {"linear_cross_entropy"})
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=", ".join(known))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, a moment each")
    parser.add_argument("--memory", choices=LOSS_SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.operators) - set(known):
        parser.error(f"no operator {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return options


# Speed


def speed_table(
    cases: Sequence[Case], sizes: Sizes, device: torch.device, seconds: float
) -> Iterator[str]:
    """Time every case in both dtypes; a column is how many times as fast ours is."""
    copy = copy_bandwidth(device) if device.type == "cuda" else None
    peers = sorted({name for case in cases for name in case.peers}, key=_order)
    yield f"| operator | dtype | ours | {' | '.join(f'/ {peer}' for peer in peers)} |" + (
        " of copy bandwidth |" if copy else ""
    )
    yield "|---|---|---:|" + "---:|" * (len(peers) + bool(copy))
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16):
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
    _synchronize(device)
    start = time.perf_counter()
    side()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes a second that a large copy reads and writes."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sides: dict[str, Side] = {"copy": lambda: target.copy_(source)}
    return 2 * source.numel() / fastest(sides, device, 0.5)["copy"]


def overheads() -> Iterator[str]:
    """Say what a public function adds to a call of its implementation: look-up and checks."""
    x, weight = torch.randn(4, 64), torch.ones(64)
    q = torch.randn(1, 4, 2, 16)
    absent = ("num_heads", "window", "mask", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k")
    given: dict[str, Any] = dict.fromkeys((*absent, "scale", "sinks"))
    given |= {"layout": "BSND", "causal": True, "alibi_form": "square"}
    call = checked_call(q, q, q, **given, dropout_p=0.0, return_lse=False)
    pairs: dict[str, tuple[Side, Side]] = {
        "rms_norm": (
            lambda: ml_kernels.rms_norm(x, weight, eps=1e-6),
            partial(implementation("rms_norm", x), x, weight, 1e-6, False),
        ),
        "swiglu": (lambda: ml_kernels.swiglu(x), partial(implementation("swiglu", x), x, None)),
        "flash_attention": (
            lambda: ml_kernels.flash_attention(q, q, q, layout="BSND", causal=True),
            partial(implementation("flash_attention", q), q, q, q, call),
        ),
    }
    with torch.no_grad():
        look_up = _per_call(lambda: implementation("rms_norm", x))
        added = {name: _per_call(public) - _per_call(own) for name, (public, own) in pairs.items()}
    yield f"Choosing an implementation takes {look_up * 1e6:.2f} us a call; with the checks of the "
    each = ", ".join(f"{seconds * 1e6:.1f} us for `{name}`" for name, seconds in added.items())
    yield f"arguments a public function adds {each}."


def _per_call(function: Callable[[], object], calls: int = 2000, repeats: int = 15) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls)
    return min(times)


# Memory


def memory_table(sizes: Sizes) -> Iterator[str]:
    """Compare the memory and the time of a loss that holds all logits with one that does not."""
    yield "| linear + cross entropy, float32 | peak memory | of full | time | of full |"
    yield "|---|---:|---:|---:|---:|"
    results = {shape: _in_own_process(shape, quick=sizes.quick) for shape in LOSS_SHAPES}
    full = results["full logits"]
    for name, found in results.items():
        memory, seconds = found["bytes"], found["seconds"]
        yield (
            f"| {name} | {memory / 2**20:,.0f} MiB | {memory / max(1, full['bytes']):.0%} "
            f"| {seconds:.2f} s | {seconds / full['seconds']:.2f}x |"
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


def peak_growth(shape: str, sizes: Sizes) -> dict[str, float]:
    """Run one form of the loss in this process; return how its peak memory grew, and its time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
