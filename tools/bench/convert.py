"""Compare the time and memory of `ml-convert` with copying the same bytes, and with transformers.

    python tools/bench/convert.py                 # a quarter of an hour, 25 GB of disk
    python tools/bench/convert.py --models 1B
    python tools/bench/convert.py --quick         # tiny models: only to see that it works

Random bfloat16 weights in the shapes of TinyLlama 1.1B and OpenLLaMA 3B, and of a mixture of
experts as large as the first, go from Hugging Face to Megatron-Core (two tensor ranks, two stages;
two expert ranks) and back. Before every run `cp -r` copies what it reads; both are timed until
`sync` is done, and a ratio is that of such a pair, so that what else the machine does hits both.
Sources are in the page cache. CPU seconds are those of user and system, of a whole process; those
of `cp -r`, which sums up nothing and leaves writing to the disk to the kernel, are beside ours.
Bytecode is there, as pip leaves it. Memory is the largest resident set. For comparison,
`from_pretrained` and `save_pretrained` of transformers read and write the same model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from machine import machine

from ml_convert import huggingface
from ml_convert.safetensors_file import SafetensorsFile
from ml_convert.tensor import DTYPES
from ml_models.registry import family_for

_BLOCK = 1 << 24
_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    **_LLAMA,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


# A process begins with the memory of the one that starts it, which must therefore be small.
_LAUNCHER = """
import os, sys
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ), 0)
os.sync()
print(usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Model(NamedTuple):
    """What is converted, and how it is cut."""

    name: str
    config: dict[str, object]
    cut: tuple[str, ...]


def _model(name: str, base: dict[str, object], sizes: Sequence[int], *cut: str) -> Model:
    layers, hidden, ffn, heads, groups, vocab = sizes
    config = {
        **base,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
    }
    tp_pp = ("--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2")
    return Model(name, config, (*tp_pp, *cut))


_EP = ("--target-expert-parallel-size", "2")
_MODELS = (
    _model("1B", _LLAMA, (22, 2048, 5632, 32, 4, 32000)),  # TinyLlama
    _model("3B", _LLAMA, (26, 3200, 8640, 32, 32, 32000)),  # OpenLLaMA
    _model("MoE 1B, EP2", _EXPERTS, (16, 1024, 2816, 16, 8, 32000), *_EP),
)
_TINY = (
    _model("1B", _LLAMA, (2, 128, 256, 8, 4, 1000)),
    _model("MoE 1B, EP2", _EXPERTS, (2, 128, 256, 8, 4, 1000), *_EP),
)


class Run(NamedTuple):
    """What one command took."""

    seconds: float
    """Until everything was on the disk."""
    cpu: float
    """Seconds of user and system."""
    memory: int
    """Largest resident set, bytes."""


@dataclass
class Row:
    """A line of the table, with all its runs and those of `cp -r` right before them."""

    model: str
    name: str
    nbytes: int
    runs: list[Run] = field(default_factory=list)
    copies: list[Run] = field(default_factory=list)

    def __str__(self) -> str:
        """Return it as Markdown."""
        seconds = [run.seconds for run in self.runs]
        ratios = [
            run.seconds / copy.seconds for run, copy in zip(self.runs, self.copies, strict=True)
        ]
        gib = self.nbytes / 2**30
        cpu = [run.cpu / gib for run in self.runs]
        return (
            f"| {self.model} | {self.name} | {statistics.median(seconds):.2f} "
            f"({min(seconds):.2f}-{max(seconds):.2f}) "
            f"| {statistics.median(copy.seconds for copy in self.copies):.2f} "
            f"| {statistics.median(ratios):.2f} "
            f"| {statistics.median(cpu):.2f} ({min(cpu):.2f}-{max(cpu):.2f}) "
            f"| {max(run.memory for run in self.runs) / 2**20:,.0f} "
            f"| {statistics.median(copy.cpu for copy in self.copies) / gib:.2f} |"
        )


def _run(command: Sequence[str]) -> Run:
    """Time a command until what it wrote is on the disk."""
    launch = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    started = time.monotonic()
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    cpu, memory = done.stdout.split()[-2:]
    return Run(seconds, float(cpu), int(memory) * (1 if sys.platform == "darwin" else 1024))


def write_model(directory: Path, model: Model) -> int:
    """Write random weights; returns their bytes."""
    family = family_for(model.config)
    arch = family.from_hf(model.config)
    dtype = DTYPES["bfloat16"]
    tensors = {name: (dtype, hf.shape) for name, hf in family.tensors(arch).items()}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**model.config, "dtype": "bfloat16"}))
    new = SafetensorsFile(tensors)
    with (directory / huggingface.SINGLE).open("wb") as file:
        file.truncate(new.size)
        new.finish(file.fileno(), [])
        block = os.urandom(_BLOCK)
        file.seek(min(new.offsets))
        while (left := new.size - file.tell()) > 0:
            file.write(block[: min(left, _BLOCK)])
    return new.size


def _convert(source: Path, target: Path, save_format: str, verify: str, *cut: str) -> list[str]:
    command = [sys.executable, "-m", "ml_convert", "--load-dir", str(source)]
    command += ["--save-dir", str(target), "--save-format", save_format, "--verify", verify]
    return [*command, *cut]


def measure(model: Model, scratch: Path, repeats: int) -> list[Row]:
    """Let the sides that read the same files take turns; only those files are there then.

    transformers comes by itself: it needs more memory than the model, and leaves no file cached.
    """
    source, megatron, output = scratch / "hf", scratch / "mcore", scratch / "output"
    nbytes = write_model(source, model)
    there = {
        f"to Megatron, `--verify {v}`": _convert(source, output, "mcore", v, *model.cut)
        for v in ("none", "bits")
    }
    back = {
        f"to Hugging Face, `--verify {v}`": _convert(megatron, output, "hf", v)
        for v in ("none", "bits")
    }
    peer = [sys.executable, "-c", _TRANSFORMERS, str(source), str(output)]
    rows = {
        name: Row(model.name, name, nbytes)
        for name in (*there, *back, "transformers, load and save")
    }
    _take_turns([(rows[name], there[name]) for name in there], source, output, repeats)
    _take_turns([(rows["transformers, load and save"], peer)], source, output, repeats)
    _run(_convert(source, megatron, "mcore", "none", *model.cut))
    shutil.rmtree(source)
    _take_turns([(rows[name], back[name]) for name in back], megatron, output, repeats)
    shutil.rmtree(megatron)
    return list(rows.values())


def _take_turns(
    sides: Sequence[tuple[Row, list[str]]], read: Path, output: Path, repeats: int
) -> None:
    """Run each command after a copy of what it reads; what they write is removed."""
    copied = output.with_name("copy")
    for turn in range(repeats):
        for row, command in sides:
            for runs, words, written in (
                (row.copies, ["cp", "-r", str(read), str(copied)], copied),
                (row.runs, command, output),
            ):
                os.sync()
                runs.append(_run(words))
                shutil.rmtree(written)
            run, copy = row.runs[-1], row.copies[-1]
            _say(f"{row.model} turn {turn + 1}/{repeats}: {row.name}: {run.seconds:.2f} s, "
                 f"cp {copy.seconds:.2f} s, CPU {run.cpu:.2f} s")  # fmt: skip


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Write the result as Markdown."""
    yield (
        "| model | conversion | seconds | `cp -r` | ratio | CPU s/GiB | memory, MiB "
        "| `cp -r`: CPU s/GiB |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    yield from map(str, rows)


def main() -> None:
    """Measure and print Markdown."""
    options = _options()
    print("\n".join(machine("numpy", "torch", "transformers", "ml-convert")))
    before = os.getloadavg()[0]
    rows: list[Row] = []
    models = _TINY if options.quick else _MODELS
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="convert-") as scratch:
        _keep_bytecode(Path(scratch))
        for model in models:
            if not options.models or model.name.split(",")[0] in options.models:
                rows += measure(model, Path(scratch), options.repeats)
        helps = [_run([sys.executable, "-m", "ml_convert", "--help"]) for _ in range(5)]
    print("\n" + "\n".join(table(rows)))
    start = statistics.median(run.cpu for run in helps)
    print(f"\n`ml-convert --help` takes {start:.2f} CPU seconds, the fastest of 5 runs "
          f"{min(run.seconds for run in helps):.2f} s.")  # fmt: skip
    print(f"Load of the machine before the first run: {before:.1f}.")


def _keep_bytecode(scratch: Path) -> None:
    """Let programs that are started from now on find their bytecode, as where pip installed them.

    Those of a checkout have none if Python is told to write none.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(scratch / "bytecode")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of a side (default: 5)")
    parser.add_argument("--models", nargs="*", default=[], help="1B, 3B, 'MoE 1B' (default: all)")
    parser.add_argument("--scratch", type=Path, help="directory with room (default: that of temp)")
    parser.add_argument("--quick", action="store_true", help="tiny models, one turn")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    return options


if __name__ == "__main__":
    main()
