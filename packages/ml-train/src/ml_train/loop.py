"""The training loop of one rank: build, resume, step, evaluate, save, stop.

Everything a step depends on is a function of the run's flags and its `Progress`: the batch, the
learning rate, the dropout masks. So a resumed run needs only the weights, the optimizer's state and
those counters to continue bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ml_parallel.platform import Device
from ml_train import checkpoint
from ml_train.batches import Batch, Datasets, Samples, TokenBatches
from ml_train.build import Built, build
from ml_train.config import PretrainConfig
from ml_train.data import build_datasets
from ml_train.instruction_samples import build_instructions
from ml_train.log_line import evaluation_line
from ml_train.metrics import Reporter
from ml_train.schedule import set_learning_rate
from ml_train.signals import StopRequest
from ml_train.state import Progress
from ml_train.step import (
    BatchShape,
    StepResult,
    Totals,
    evaluate,
    mean_loss,
    parameters_in_place,
    seed_step,
    train_step,
)
from ml_train.together import on_rank_0


class TrainingFailedError(RuntimeError):
    """The run cannot go on, through no fault of its flags."""


class Trainer:
    """One rank of a run."""

    def __init__(self, config: PretrainConfig, device: Device) -> None:
        self.config = config
        self.device = device
        self.built: Built = build(config)
        self.saved_in: Path | None = None
        """Where the checkpoint of the step that was done last is, if it has one."""
        self.progress = self._resume()
        self.datasets = self._open_data()
        self.reporter = self._reporter()
        self.skipped_in_a_row = 0

    def run(self, stop: StopRequest) -> None:
        """Train until the last step, or until asked to stop; save at the end of either.

        Raises:
            TrainingFailedError: Too many steps in a row were skipped.
            OSError: A checkpoint cannot be written.
        """
        last = self.config.training.train_iters
        with self.reporter:
            stop_now = self._make_up(stop)
            while self.progress.iteration < last and not stop_now:
                stop_now = self._step(stop)
                if not stop_now and self._evaluation_is_due():
                    stop_now = self._evaluate(stop)
                is_last = self.progress.iteration == last
                if is_last or stop_now or self._is_due(self.config.checkpoint.save_interval):
                    self._save()
            if stop_now:
                self.reporter.note(self._stopped(stop))
            else:
                self._test(stop)

    # Setting up

    def _resume(self) -> Progress:
        found = checkpoint.resume(self.config.checkpoint, self.built.state)
        if found is not None:
            self.saved_in = self.config.checkpoint.source
        return found or Progress()

    def _open_data(self) -> Datasets:
        training = self.config.training
        batch = self.built.global_batch_size
        steps = max(0, training.train_iters - self.progress.iteration)
        samples = (
            self.progress.consumed_samples + steps * batch,
            training.eval_iters * batch,
            training.eval_iters * batch if self.config.data.test_data_path else 0,
        )
        given = {"seq_length": training.seq_length, "seed": training.seed}
        if not self.config.data.is_instruction_dataset:
            return build_datasets(self.config.data, samples=samples, **given)
        # Kernels like a multiple of 8, and with --sequence-parallel ranks share a row.
        multiple = math.lcm(8, self.built.place.tp_size)
        return build_instructions(self.config.data, multiple=multiple, samples=samples, **given)

    def _reporter(self) -> Reporter:
        return Reporter(
            self.config,
            self.device,
            active=torch.distributed.get_rank() == 0,
            world_size=torch.distributed.get_world_size(),
            padded_vocab_size=self.built.state.padded_vocab_size,
            iteration=self.progress.iteration,
        )

    def _shape(self, samples: Samples) -> BatchShape:
        return self.built.shape.in_one_row() if samples.in_one_row else self.built.shape

    def _batches(self, samples: Samples, consumed: int) -> Sequence[Iterator[Batch]]:
        place, shape = self.built.place, self.built.shape
        batches = TokenBatches(
            samples,
            micro_batch_size=shape.micro_batch_size,
            data_parallel_rank=place.dp_rank,
            data_parallel_size=place.dp_size,
            vocab_size=self.config.model.vocab_size,
            device=self.device.torch,
        )
        return [batches.step(consumed, shape.num_microbatches) for _ in self.built.chunks]

    # One step

    def _step(self, stop: StopRequest) -> bool:
        """Train one step and return whether to stop after it."""
        started = time.perf_counter()
        training, built = self.config.training, self.built
        iteration = self.progress.iteration
        rate = set_learning_rate(
            built.optimizer,
            self.config.learning_rate,
            updates=iteration - self.progress.skipped_iterations,
            train_iters=training.train_iters,
        )
        seed_step(training.seed, iteration, built.place)
        scale = float(built.optimizer.get_loss_scale())
        result = train_step(
            built.chunks,
            built.optimizer,
            self._batches(self.datasets.train, self.progress.consumed_samples),
            self._shape(self.datasets.train),
            stop_requested=lambda: stop.received is not None,
        )
        self.progress = _advance(
            self.progress, result, built.global_batch_size, training.seq_length
        )
        self.saved_in = None
        self.reporter.step(
            self.progress,
            result,
            learning_rate=rate,
            loss_scale=scale,
            elapsed_seconds=time.perf_counter() - started,
        )
        self._give_up_if_stuck(result)
        return result.stop_requested

    def _give_up_if_stuck(self, result: StepResult) -> None:
        self.skipped_in_a_row = 0 if result.updated else self.skipped_in_a_row + 1
        limit = self.config.training.max_skipped_iterations
        if self.skipped_in_a_row >= limit:
            self._save()
            raise TrainingFailedError(
                f"{limit} steps in a row were skipped for a NaN or Inf, up to step "
                f"{self.progress.iteration} (loss {result.loss}, gradient norm "
                f"{result.grad_norm}); the weights are those of the last good step. Lower --lr, "
                f"check the data, or raise --max-skipped-iterations"
            )

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.progress.iteration % interval == 0

    def _evaluation_is_due(self) -> bool:
        training = self.config.training
        is_last = self.progress.iteration == training.train_iters
        return is_last or self._is_due(training.eval_interval)

    def _make_up(self, stop: StopRequest) -> bool:
        """Do an evaluation that is owed, or say if nothing is to do; return whether to stop."""
        if self._owes_evaluation():
            return self._evaluate(stop)
        done, last = self.progress.iteration, self.config.training.train_iters
        if done >= last and self.datasets.test is None:
            self.reporter.note(f"nothing to do: {self.saved_in} is at step {done} of {last}")
        return False

    def _owes_evaluation(self) -> bool:
        """Tell whether the run was stopped before the evaluation that was due after a step."""
        if self.progress.iteration == 0 or not self._evaluation_is_due():
            return False
        return self.datasets.valid is not None and not on_rank_0(self.reporter.has_evaluation)

    def _evaluate(self, stop: StopRequest) -> bool:
        """Evaluate, and return whether to stop; a part of an evaluation is not reported."""
        if self.datasets.valid is None:
            return False
        loss, stop_now = self._mean_loss(self.datasets.valid, stop)
        if loss is not None:
            self.reporter.evaluation(self.progress.iteration, loss)
        return stop_now

    def _test(self, stop: StopRequest) -> None:
        """Show the loss on the test data, if any were given."""
        if self.datasets.test is None:
            return
        loss, _ = self._mean_loss(self.datasets.test, stop)
        if loss is not None:
            self.reporter.note(evaluation_line(self.progress.iteration, loss, data="test"))

    def _mean_loss(self, samples: Samples, stop: StopRequest) -> tuple[float | None, bool]:
        """Return the mean loss, None if a signal came before its end, and whether to stop."""
        found: list[Totals] = []
        stop_now = False
        with parameters_in_place(self.built.chunks):
            while len(found) < self.config.training.eval_iters and not stop_now:
                consumed = len(found) * self.built.global_batch_size
                totals = evaluate(
                    self.built.chunks,
                    self._batches(samples, consumed),
                    self._shape(samples),
                    stop_requested=lambda: stop.received is not None,
                )
                found.append(totals)
                stop_now = totals.stop_requested
        whole = len(found) == self.config.training.eval_iters
        return (mean_loss(found) if whole else None), stop_now

    def _save(self) -> None:
        config = self.config.checkpoint
        if config.save is None:
            return
        # Weights whose gradients are not finite may be spoilt: the older ones stay.
        keep = None if self.skipped_in_a_row else config.keep_last
        path = checkpoint.save(config.save, self.built.state, self.progress, keep=keep)
        self.saved_in = config.save
        self.reporter.note(f"saved checkpoint {path}")

    def _stopped(self, stop: StopRequest) -> str:
        cause = stop.received.name if stop.received else "a signal on another rank"
        where = "nothing was saved: --save is not given"
        if self.saved_in is not None:
            where = f"resume with --load {self.saved_in}"
        return f"stopped by {cause} after step {self.progress.iteration}; {where}"


def _advance(progress: Progress, result: StepResult, samples: int, seq_length: int) -> Progress:
    return replace(
        progress,
        iteration=progress.iteration + 1,
        consumed_samples=progress.consumed_samples + samples,
        consumed_tokens=progress.consumed_tokens + round(samples * seq_length * result.filled),
        skipped_iterations=progress.skipped_iterations + (not result.updated),
        nan_iterations=progress.nan_iterations + (not math.isfinite(result.loss)),
    )
