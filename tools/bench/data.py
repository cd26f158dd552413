"""Compare `ml-data pretrain` with what its tokenizer could do at most.

    python tools/bench/data.py                    # some minutes, 3 GB of disk
    python tools/bench/data.py --megabytes 100 --no-loader
    python tools/bench/data.py --quick            # little text: only to see that it works

The text is Python: the sources of the packages installed here, each file once, none above 1 MB
(`tokenizers` takes some 110 bytes for a byte of the document it works on). The limit is
`tokenizers.encode_batch_fast` with as many threads as there are workers, in a process that has
everything in memory and keeps nothing. Against it runs the whole command: reading, parsing,
encoding, writing, syncing to disk. The limit is measured before every run of it, and a ratio is
that of such a pair, so that what else the machine does hits both; where it does much, the ratio of
CPU seconds says more. The first token is there when the first line of progress is. Memory is that
of all processes of the command together (PSS: a page that several share counts once), on the text
and on a quarter of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from loader import HEADER
from loader import measure as measure_loader
from machine import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import assets

_LIMIT = """
import json, sys, time
from ml_data.tokenizer import load_tokenizer
encode = load_tokenizer(sys.argv[1]).backend.encode_batch_fast
with open(sys.argv[2], "rb") as file:
    texts = [json.loads(line)["text"] for line in file]
begin, cpu = time.perf_counter(), time.process_time()
for start in range(0, len(texts), 500):
    encode(texts[start : start + 500])
print(time.perf_counter() - begin, time.process_time() - cpu)
"""
_POLL = 0.25
_LARGEST = 10**6


class Limit(NamedTuple):
    """What encoding alone takes."""

    rate: float
    """MB/s."""
    cpu: float
    """Seconds of all threads."""


class Run(NamedTuple):
    """What one run of the command took."""

    seconds: float
    """Until everything was on the disk and the process had ended."""
    first_token: float
    """Seconds to the first line of progress."""
    cpu: float
    """Seconds of user and system, of all processes."""
    memory: int
    """Largest PSS of all processes together, bytes."""
    sha256: str
    """Of the files."""


@dataclass
class Side:
    """One way to do it, and its runs."""

    name: str
    backend: str
    megabytes: float
    runs: list[Run] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    """Of `encode_batch_fast`, right before each run."""

    def __str__(self) -> str:
        """Return a row of the table."""
        rates = [self.megabytes / run.seconds for run in self.runs]
        pairs = list(zip(self.runs, self.limits, strict=True))
        ratios = [self.megabytes / run.seconds / limit.rate for run, limit in pairs]
        cpu = statistics.median(run.cpu for run in self.runs)
        return (
            f"| {self.name} | {statistics.median(rates):.2f} ({min(rates):.2f}-{max(rates):.2f}) "
            f"| {statistics.median(ratios):.2f} "
            f"| {cpu:.1f} ({statistics.median(run.cpu / limit.cpu for run, limit in pairs):.2f}) "
            f"| {statistics.median(run.first_token for run in self.runs):.2f} "
            f"| {max(run.memory for run in self.runs) / 1e6:,.0f} |"
        )


def write_text(path: Path, megabytes: float) -> float:
    """Write sources of installed packages as JSON lines; returns the megabytes of their text."""
    seen: set[bytes] = set()
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for source in _sources():
            content = source.read_bytes()
            digest = hashlib.md5(content).digest()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if not text.strip() or len(content) > _LARGEST or digest in seen:
                continue
            seen.add(digest)
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(content)
            if size >= megabytes * 1e6:
                return size / 1e6
    return size / 1e6


def _sources() -> Iterator[Path]:
    roots = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    for root in sorted(roots):
        yield from (path for path in sorted(Path(root).rglob("*.py")) if path.is_file())


def encode_alone(tokenizer: Path, text: Path, megabytes: float, workers: int) -> Limit:
    """Run `encode_batch_fast` with so many threads."""
    threads = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(workers)}
    command = [sys.executable, "-c", _LIMIT, str(tokenizer), str(text)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **threads}
    )
    seconds, cpu = map(float, done.stdout.split())
    return Limit(megabytes / seconds, cpu)


def prepare(tokenizer: Path, text: Path, backend: str, workers: int, scratch: Path) -> Run:
    """Run the command."""
    prefix = scratch / "out" / "data"
    command = [sys.executable, "-m", "ml_data", "pretrain", "--input", str(text)]
    command += ["--tokenizer-name-or-path", str(tokenizer), "--tokenizer-backend", backend]
    command += ["--output-prefix", str(prefix), "--workers", str(workers), "--append-eod"]
    command += ["--log-interval", "1"]
    os.sync()
    before = os.times()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    memory = _Memory(process.pid)
    first_token = 0.0
    messages = []
    for line in process.stderr or ():
        first_token = first_token or (line.startswith("Processed") and time.perf_counter() - begin)
        messages.append(line)
    if process.wait():
        raise SystemExit("".join(messages[-3:]))
    seconds = time.perf_counter() - begin
    after = os.times()
    cpu = after.children_user - before.children_user
    cpu += after.children_system - before.children_system
    hashes = hashlib.sha256()
    for path in sorted(prefix.parent.iterdir()):
        hashes.update(path.read_bytes())
        path.unlink()
    return Run(seconds, first_token, cpu, memory.stop(), hashes.hexdigest())


class _Memory:
    """Watches the memory of a process and all below it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._ended.wait(_POLL):
            self._most = max(self._most, sum(map(_pss, _tree(self._pid))))


def _tree(pid: int) -> list[int]:
    """Return a process and all below it."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [child for one in threads for child in (one / "children").read_text().split()]
    except OSError:  # it ended
        return []
    return [pid, *(below for child in children for below in _tree(int(child)))]


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def compare(tokenizer: Path, scratch: Path, options: argparse.Namespace) -> list[Side]:
    """Let all sides take turns."""
    text, quarter = scratch / "text.jsonl", scratch / "quarter.jsonl"
    megabytes = write_text(text, options.megabytes)
    little = write_text(quarter, options.megabytes / 4)
    sides = [
        Side("`tokenizers`", "tokenizers", megabytes),
        Side("`gigatoken`", "gigatoken", megabytes),
        Side("`tokenizers`, a quarter of the text", "tokenizers", little),
        Side("`gigatoken`, a quarter of the text", "gigatoken", little),
    ]
    for turn in range(options.repeats):
        for side in sides:
            source = text if side.megabytes == megabytes else quarter
            fastest = encode_alone(tokenizer, source, side.megabytes, options.workers)
            run = prepare(tokenizer, source, side.backend, options.workers, scratch)
            side.limits.append(fastest)
            side.runs.append(run)
            _say(f"turn {turn + 1}/{options.repeats}: {side.name}: {run.seconds:.2f} s, first "
                 f"token {run.first_token:.2f} s, limit {fastest.rate:.2f} MB/s, "
                 f"{run.memory / 1e6:.0f} MB")  # fmt: skip
    for one, other in ((sides[0], sides[1]), (sides[2], sides[3])):
        if len({run.sha256 for run in (*one.runs, *other.runs)}) > 1:
            raise SystemExit("the backends wrote different files")
    return sides


def table(sides: Sequence[Side], workers: int) -> Iterator[str]:
    """Write the result as Markdown."""
    limits = [limit.rate for side in sides for limit in side.limits]
    yield f"{sides[0].megabytes:.0f} MB of text; `encode_batch_fast` alone, {workers} threads: "
    yield f"{statistics.median(limits):.2f} MB/s ({min(limits):.2f}-{max(limits):.2f})."
    yield ""
    yield "| `ml-data pretrain` | MB/s | / limit | CPU s (/ limit) | first token, s | memory, MB |"
    yield "|---|---:|---:|---:|---:|---:|"
    yield from map(str, sides)
    yield ""
    yield "All backends wrote the same files."


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> None:
    """Measure and print Markdown."""
    options = _options()
    print("\n".join(machine("tokenizers", "gigatoken", "numpy", "ml-data")))
    print(f"- load before the first run: {os.getloadavg()[0]:.1f}\n")
    tokenizer = assets.fetch(options.tokenizer)
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="data-") as scratch:
        sides = compare(tokenizer, Path(scratch), options)
        print("\n".join(table(sides, options.workers)))
        if options.loader:
            print(f"\n{HEADER}")
            for times in measure_loader(Path(scratch), int(options.loader_tokens)):
                print(times.row())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="of text (default: 200)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of a side (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--tokenizer", default="tokenizer-llama3", help="asset (default: Llama 3)")
    parser.add_argument("--loader", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--loader-tokens", type=float, default=1e8, help="(default: 1e8)")
    parser.add_argument("--scratch", type=Path, help="directory with room (default: that of temp)")
    parser.add_argument("--quick", action="store_true", help="2 MB, one turn")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.repeats, options.loader_tokens = 2, 1, 1e5
    return options


if __name__ == "__main__":
    main()
