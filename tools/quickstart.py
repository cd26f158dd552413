"""The whole path on one machine in minutes: text, tokens, training, Hugging Face, a sample.

    hatch run quickstart                        # into quickstart-run/
    hatch run quickstart --output DIRECTORY

Every step is a command of this repository, shown before it runs, so that it can be copied and run
by itself. What a step claims is checked, and the first check that fails ends the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import assets
from rich.console import Console
from rich.table import Table
from shell import CommandError, Shell

from ml_data.sidecar import CorpusInfo, read_sidecar
from ml_models.flags import UsageError, parse
from ml_train.config import PretrainConfig
from ml_train.history import History, read_history

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".quickstart"
PROMPT = "Return the number of"
NATS_BELOW_ENTROPY = 0.5
"""How much better than the best guess without context the model must get."""

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 110


class QuickstartError(RuntimeError):
    """What a step did is not what it should be."""


class Files:
    """Where everything is, as short as it can be said from here."""

    def __init__(self, output: Path) -> None:
        self.output = near(output.absolute())
        self.corpus = self.output / "data" / "python-docs"
        self.data = f"{self.corpus}_text_document"
        self.checkpoints = self.output / "checkpoints"
        self.metrics = self.checkpoints / "metrics.jsonl"
        self.exported = self.output / "huggingface"
        self.report = self.output / "report"
        self.commands = self.output / "commands.txt"
        self.sample = self.output / "sample.txt"
        self.check = self.output / "check.txt"
        self.list = self.output / "files.txt"
        self.config = near(ROOT / "examples" / "llama-tiny.yaml")
        self.tools = near(ROOT / "tools")

    def results(self) -> dict[str, Path]:
        """Return what a run leaves behind, by what it is."""
        return {
            "report": self.report / "index.html",
            "loss curve": self.report / "loss.png",
            "tokens": Path(f"{self.data}.bin"),
            "checkpoints": self.checkpoints,
            "metrics": self.metrics,
            "Hugging Face": self.exported,
        }


def near(path: Path) -> Path:
    """Return an absolute path relative to the current directory if it is below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


# The steps


def prepare(shell: Shell, files: Files) -> Path:
    """Fetch a tokenizer and a text, and turn the text into tokens; returns the tokenizer."""
    names = ("tokenizer-mistral", "text-python-docs")
    shell.run("python", files.tools / "assets.py", *names)
    tokenizer, text = (assets.fetch(name) for name in names)
    files.corpus.parent.mkdir(parents=True)
    shell.run(
        *("ml-data", "pretrain", "--input", text / "text.jsonl"),
        *("--tokenizer-name-or-path", tokenizer / "tokenizer.model", "--append-eod"),
        *("--output-prefix", files.corpus),
    )
    return tokenizer


def train(shell: Shell, files: Files, flags: Sequence[str | Path]) -> None:
    """Train; send SIGTERM half-way, as a cluster does that wants its machines back; resume."""
    command = ("ml-train", "pretrain", *flags)
    config = parse(PretrainConfig, list(map(str, flags)), prog="quickstart")
    stop_after = config.training.train_iters // 2
    with shell.start(*command) as process:
        while process.poll() is None and steps_in(files.metrics) < stop_after:
            time.sleep(0.1)
        console.print(f"\n$ kill -TERM {process.pid}\n", style="bold cyan")
        process.send_signal(signal.SIGTERM)
    shell.check(process)
    shell.run(*command)


def steps_in(metrics: Path) -> int:
    """Return the number of the last step that a file of metrics has so far."""
    try:
        lines = metrics.read_text().splitlines()
        return max((json.loads(line)["iteration"] for line in lines), default=0)
    except (OSError, ValueError):  # not there yet, or a line that is just being written
        return 0


def use(shell: Shell, files: Files, flags: Sequence[str | Path], tokenizer: Path) -> None:
    """Export the model, compare it with the one that was trained, and let it write."""
    shell.run(
        *("ml-convert", "--load-dir", files.checkpoints, "--save-dir", files.exported),
        *("--save-format", "hf", "--hf-config", tokenizer),
    )
    shell.run("python", files.tools / "check_export.py", files.exported, *flags, keep=files.check)
    shell.run(
        *("ml-eval", "generate", "--load-dir", files.exported, "--prompt", PROMPT),
        *("--do-sample", "--temperature", "0.7", "--max-new-tokens", "80"),
        keep=files.sample,
    )
    files.sample.write_text(PROMPT + files.sample.read_text())


def report(shell: Shell, files: Files) -> None:
    """Put the run on a page."""
    lines = [f"{name:14}{path}\n" for name, path in files.results().items()]
    files.list.write_text("".join(lines))
    shell.run(
        *("ml-train", "report", "--metrics-file", files.metrics, "--output", files.report),
        *(
            "--data-path",
            files.data,
            "--title",
            "A small Llama, trained on the Python documentation",
        ),
        *("--attach", files.sample, files.check, files.commands, files.list),
    )


# The end


def check(history: History, corpus: CorpusInfo) -> None:
    """Check what the run says of itself.

    Raises:
        QuickstartError: It is not what it should be.
    """
    done = [step.iteration for step in history.steps]
    total = history.steps[-1].train_iters
    if done != list(range(1, total + 1)):
        raise QuickstartError(f"the steps of the run are {done}, not 1 to {total} once each")
    stopped = [start.iteration for start in history.starts]
    if len(stopped) != 2 or not 0 < stopped[1] < total:
        raise QuickstartError(f"the run started after steps {stopped}: it was not resumed once")
    limit = corpus.unigram_entropy - NATS_BELOW_ENTROPY
    loss = history.evaluations[-1].loss
    if not loss <= limit:
        raise QuickstartError(f"the validation loss ended at {loss:.3f}, above {limit:.3f}")


def summary(history: History, corpus: CorpusInfo, files: Files, seconds: float) -> Table:
    """Return what happened and where it is."""
    first, last = history.steps[0], history.steps[-1]
    loss = history.evaluations[-1].loss
    table = Table("what", "result", title=f"Done in {seconds / 60:.1f} minutes", title_style="bold")
    table.add_row("text", f"{corpus.documents:,} documents, {corpus.tokens:,} tokens")
    table.add_row("trained", f"{last.iteration} steps, {last.consumed_tokens:,} tokens")
    speed = f"{history.tokens_per_second_per_device:,.0f} tokens/s/device, MFU {history.mfu:.0%}"
    table.add_row("speed", f"2 processes, tensor parallel: {speed}")
    table.add_row("resumed", f"stopped by SIGTERM after step {history.starts[-1].iteration}")
    table.add_row("loss", f"{first.loss:.2f} at the start, {loss:.2f} on validation data")
    gain = corpus.unigram_entropy - loss
    table.add_row("", f"{gain:.2f} nats below the unigram entropy, {corpus.unigram_entropy:.2f}")
    for line in files.check.read_text().splitlines():
        table.add_row(*line.split(": ", 1))
    table.add_section()
    for name, path in files.results().items():
        table.add_row(name, str(path))
    return table


def claim(output: Path) -> None:
    """Make the directory afresh; an earlier output of the quickstart is removed, nothing else.

    Raises:
        QuickstartError: It holds something else.
    """
    if output.exists() and any(output.iterdir()):
        if not (output / MARKER).is_file():
            raise QuickstartError(f"--output {output}: holds something else; name another one")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


def quickstart(output: Path) -> None:
    """Run everything."""
    started = time.perf_counter()
    claim(output)
    files = Files(output)
    shell = Shell(console, files.commands)
    tokenizer = prepare(shell, files)
    flags = (
        *("--config", files.config, "--data-path", files.data),
        *("--nproc-per-node", "2", "--tensor-model-parallel-size", "2"),
        *("--save", files.checkpoints, "--load", files.checkpoints),
    )
    train(shell, files, flags)
    history, corpus = read_history(files.metrics), read_sidecar(files.data)
    assert corpus is not None, "ml-data wrote it"
    check(history, corpus)
    use(shell, files, flags, tokenizer)
    report(shell, files)
    console.print(summary(history, corpus, files, time.perf_counter() - started))


def main() -> int:
    """Run the quickstart; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "quickstart-run", metavar="DIR")
    given = parser.parse_args()
    try:
        quickstart(given.output)
    except (CommandError, QuickstartError, assets.AssetError, UsageError, OSError) as error:
        console.print(f"quickstart: {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
