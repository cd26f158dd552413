"""`ml-train report`: a run on one page, from its file of metrics alone.

The page holds everything it shows, the picture too, so it can be mailed or archived as one file. It
can be made while the run goes on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_data.sidecar import CorpusInfo, read_sidecar
from ml_models.architecture import Architecture
from ml_models.flags import UsageError, parse
from ml_models.weights import parameters
from ml_parallel import durable
from ml_train.curve import draw
from ml_train.history import History, read_history
from ml_train.page import Page, Section, Tile, render
from ml_train.settings import check_directory

PICTURE, PAGE = "loss.png", "index.html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Report."""

    metrics_file: Path
    """File of metrics of the run, metrics.jsonl in its --save."""
    output: Path
    """Directory to write index.html and loss.png to."""
    data_path: str | None = None
    """Prefix of the corpus: compare the loss with the entropy of its tokens' frequencies."""
    title: str = "Training run"
    """Heading of the page."""
    attach: tuple[Path, ...] = ()
    """Text files to show at the end of the page, such as a sample or the commands of the run."""

    def __post_init__(self) -> None:
        check_directory("--output", self.output)


def main(argv: Sequence[str], prog: str) -> int:
    """Run `ml-train report` with these flags and return its exit code."""
    description = "Show a run on one page: its loss curve, size, speed and layout."
    config = parse(ReportConfig, argv, prog=prog, description=description)
    for path in write_report(config):
        sys.stdout.write(f"wrote {path}\n")
    return 0


def write_report(config: ReportConfig) -> tuple[Path, Path]:
    """Write the page and the picture; returns their paths.

    Raises:
        UsageError: A file cannot be read, or is not what it should be.
    """
    history = read_history(config.metrics_file)
    corpus = _corpus(config.data_path)
    picture = draw(history, unigram_entropy=corpus.unigram_entropy if corpus else None)
    page = render(
        Page(
            title=config.title,
            subtitle=_subtitle(history),
            tiles=tuple(_tiles(history, corpus)),
            picture=picture,
            sections=(
                Section("Model", rows=tuple(_model(history))),
                Section("Run", rows=tuple(_run(history))),
                Section("Data", rows=tuple(_data(history, corpus))),
                Section("Versions", rows=tuple(_versions(history))),
            ),
            texts=tuple((path.stem.replace("-", " "), _text(path)) for path in config.attach),
        )
    )
    config.output.mkdir(parents=True, exist_ok=True)
    written = config.output / PAGE, config.output / PICTURE
    for path, content in zip(written, (page.encode(), picture), strict=True):
        durable.write(path, content)
    return written


def _corpus(prefix: str | None) -> CorpusInfo | None:
    if prefix is None:
        return None
    corpus = read_sidecar(prefix)
    if corpus is None:
        raise UsageError(
            f"--data-path {prefix}: there is no {prefix}.json, which `ml-data pretrain` writes"
        )
    return corpus


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"--attach {path}: {error.strerror}") from error


# What the page says


def _subtitle(history: History) -> str:
    facts, last = history.starts[-1].facts, history.steps[-1]
    done = "" if last.iteration == last.train_iters else f", {last.iteration:,} done"
    devices = _count(facts["world_size"], "device")
    day, _, time = facts["time"].partition("T")
    return f"{last.train_iters:,} steps{done} on {devices} ({facts['device']}), {day} {time[:5]}"


def _tiles(history: History, corpus: CorpusInfo | None) -> Iterator[Tile]:
    loss = history.last_loss()
    yield Tile("training loss", f"{loss:.3f}", "mean of the last 10 steps")
    if history.evaluations:
        evaluation = history.evaluations[-1]
        loss = evaluation.loss
        note = f"perplexity {evaluation.perplexity:,.1f}, after step {evaluation.iteration:,}"
        yield Tile("validation loss", f"{loss:.3f}", note)
    if corpus:
        gain = corpus.unigram_entropy - loss
        entropy = f"{corpus.unigram_entropy:.3f}, the loss without any context"
        yield Tile("below unigram entropy", f"{gain:.3f}", entropy)
    last = history.steps[-1]
    batch = f"{_count(last.iteration, 'step')} of {last.global_batch_size:,} samples"
    yield Tile("tokens", f"{last.consumed_tokens:,}", batch)
    speed = history.tokens_per_second_per_device
    yield Tile("tokens/s/device", f"{speed:,.0f}", f"{_duration(history.seconds)} in steps")
    peak = history.starts[-1].facts["peak_tflops_per_device"]
    yield Tile("MFU", f"{history.mfu:.1%}", f"of {peak:.3g} TFLOP/s, the peak of matmul")


def _model(history: History) -> Iterator[tuple[str, str]]:
    arch = history.starts[-1].arch
    size = sum(math.prod(parameter.shape) for parameter in parameters(arch))
    yield "parameters", f"{size:,}"
    yield "layers", f"{arch.num_layers}"
    yield "hidden size", f"{arch.hidden_size:,}"
    if arch.num_experts:
        yield "active per token", f"{_active(arch):,}"
    yield from _feed_forward(arch)
    yield "attention", f"{arch.num_attention_heads} heads, {arch.query_groups} key/value heads"
    yield "vocabulary", f"{arch.vocab_size:,}"
    yield "normalization", arch.normalization


def _feed_forward(arch: Architecture) -> Iterator[tuple[str, str]]:
    kinds = {"SwiGLU": arch.swiglu, "GEGLU": arch.geglu, "quick GEGLU": arch.quick_geglu}
    kind = next((name for name, chosen in kinds.items() if chosen), "GELU")
    sparse = sum(map(arch.has_experts, range(arch.num_layers)))
    if sparse < arch.num_layers:
        yield "MLP", f"{arch.ffn_size:,} wide, {kind}"
    if sparse:
        layers = "" if sparse == arch.num_layers else f", in {_count(sparse, 'layer')}"
        choice = f"{arch.moe_router_topk} of {_count(arch.num_experts or 0, 'expert')}"
        yield "experts", f"{choice}, {arch.expert_size:,} wide, {kind}{layers}"
    if sparse and arch.shared_expert_size:
        yield "shared experts", f"{arch.shared_expert_size:,} wide"


def _active(arch: Architecture) -> int:
    """Count the parameters that a token meets."""
    of_experts = sum(math.prod(p.shape) for p in parameters(arch) if p.expert is not None)
    rest = sum(math.prod(p.shape) for p in parameters(arch) if p.expert is None)
    return rest + of_experts * arch.moe_router_topk // (arch.num_experts or 1)


def _run(history: History) -> Iterator[tuple[str, str]]:
    facts = history.starts[-1].facts
    yield "devices", f"{facts['world_size']} x {facts['device']}"
    yield "layout", _layout(facts["topology"], facts["world_size"])
    yield "computed in", facts["dtype"]
    yield "sequence length", f"{facts['seq_length']:,}"
    yield "global batch size", f"{facts['global_batch_size']:,}"
    yield "highest learning rate", f"{max(step.learning_rate for step in history.steps):.2e}"
    resumed = [f"after step {start.iteration:,}" for start in history.starts[1:]]
    yield "stopped and resumed", ", ".join(resumed) or "never"
    yield "skipped steps", f"{sum(step.skipped_iterations for step in history.steps)}"


def _data(history: History, corpus: CorpusInfo | None) -> Iterator[tuple[str, str]]:
    if corpus is None:
        return
    yield "documents", f"{corpus.documents:,}"
    yield "tokens", f"{corpus.tokens:,}"
    yield "text", f"{corpus.text_bytes / 1e6:,.1f} MB"
    yield "tokenizer", f"{Path(corpus.tokenizer).name} ({corpus.tokenizer_kind})"
    yield "epochs", f"{history.steps[-1].consumed_tokens / corpus.tokens:.2f}"
    yield "unigram entropy", f"{corpus.unigram_entropy:.3f} nats per token"


def _versions(history: History) -> Iterator[tuple[str, str]]:
    facts = history.starts[-1].facts
    yield "Python", facts["python"]
    yield from facts["versions"].items()


def _layout(topology: dict[str, object], world_size: int) -> str:
    """Name the ways the model is cut: "TP 2, PP 2, DP 4"."""
    sizes = {
        "TP": topology["tensor_model_parallel_size"],
        "PP": topology["pipeline_model_parallel_size"],
        "CP": topology["context_parallel_size"],
    }
    replicas = world_size
    for size in sizes.values():
        replicas //= int(str(size))
    sizes["EP"] = topology["expert_model_parallel_size"]  # of the same ranks as DP
    named = [f"{name} {size}" for name, size in sizes.items() if size != 1]
    return ", ".join([*named, f"DP {replicas}"])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
