"""`ml-train pretrain`: check everything, start the ranks, train.

The process a user starts checks the flags, the layout and the files without torch, then runs this
command once per rank; a rank (RANK is set, by us or by torchrun) trains.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ml_models.flags import UsageError, parse
from ml_train.config import PretrainConfig, check_world, with_vocabulary
from ml_train.corpora import (
    TokensInfo,
    check_splits,
    common_tokenizer,
    read_corpora,
    read_descriptions,
)
from ml_train.identity import differences, of_command
from ml_train.instructions import check_instructions, describe_instructions
from ml_train.launch import launch, launched_world_size, under_launcher
from ml_train.signals import StopRequest
from ml_train.streams import lasting_streams

if TYPE_CHECKING:
    from ml_parallel.platform import Device

logger = logging.getLogger(__name__)


def main(argv: Sequence[str], prog: str) -> int:
    """Run `ml-train pretrain` with these flags and return its exit code."""
    with lasting_streams(), StopRequest() as stop:
        try:
            return _run(argv, prog, stop)
        except KeyboardInterrupt:
            if stop.received is None or stop.deferred:
                raise
            return _stopped(stop)


def _run(argv: Sequence[str], prog: str, stop: StopRequest) -> int:
    config = parse(PretrainConfig, argv, prog=prog, description="Pre-train a model.")
    launched = under_launcher()
    world_size = launched_world_size(config.launch) if launched else config.launch.world_size
    config = check_world(with_vocabulary(config, _check_data(config)), world_size)
    if launched or world_size == 1:
        return _rank(config, prog, stop)
    # Modules are found where this process finds them, and never in the current directory.
    where = f"import signal, sys; sys.path[:] = {sys.path!r}"
    quiet = "signal.signal(signal.SIGINT, signal.SIG_DFL)"  # Ctrl-C meanwhile is no traceback
    program = f"{where}; {quiet}; from ml_train.cli import main; sys.exit(main())"
    return launch([sys.executable, "-c", program, "pretrain", *argv], config.launch)


def _check_data(config: PretrainConfig) -> TokensInfo | None:
    """Check the data, unless the process that started this one has; return what made them.

    An index can be large: one process of a node reads it here, and rank 0 once it needs it.
    """
    data, training = config.data, config.training
    tested = training.eval_iters if data.test_data_path else 0
    samples = (training.train_iters, training.eval_iters, tested)
    if data.is_instruction_dataset:
        if not under_launcher():
            check_instructions(data, training.seq_length, samples)
        return common_tokenizer(describe_instructions(data))
    if under_launcher():
        return common_tokenizer(read_descriptions(data))
    corpora = read_corpora(data)
    check_splits(data, corpora, seq_length=training.seq_length, samples=samples)
    return common_tokenizer(corpora)


def _rank(config: PretrainConfig, prog: str, stop: StopRequest) -> int:
    """Be one rank of the run."""
    from ml_parallel import platform
    from ml_train.peers import is_lost, say_lost, wants_traceback

    logging.basicConfig(level=logging.WARNING, format=f"{prog}: %(message)s")
    if config.ignored.given and os.environ.get("RANK", "0") == "0":
        logger.warning("ignored, as it has no meaning here: %s", ", ".join(config.ignored.given))
    try:
        device = platform.activate(config.training.device)
        with stop.suspended():  # torch waits for the other ranks without looking at signals
            platform.initialize_process_group(
                device,
                timeout_minutes=config.training.distributed_timeout_minutes,
                join_minutes=config.launch.rendezvous_timeout_minutes,
            )
    except ValueError as error:
        raise UsageError(str(error)) from error
    try:
        return _train(config, device, prog, stop)
    except RuntimeError as error:
        if wants_traceback() or not is_lost(error):
            raise
        lost = error
    if stop.received is not None and not stop.began:
        return 0  # the others were asked to stop as well, and one of them says so
    with stop.suspended():
        return say_lost(lost, prog)


def _train(config: PretrainConfig, device: Device, prog: str, stop: StopRequest) -> int:
    import torch

    from ml_train.checkpoint import check, claimed
    from ml_train.loop import Trainer, TrainingFailedError

    try:
        _check_same_flags(config)
        check(config.checkpoint, config.model)
        with claimed(config.checkpoint.save):
            trainer = Trainer(config, device)
            if not _all_begin(stop, device):
                return _stopped(stop)
            trainer.run(stop)
    except TrainingFailedError as error:
        if _speaks():
            sys.stderr.write(f"{prog}: {error}\n")
        return 1
    finally:
        torch.distributed.destroy_process_group()
    return 0


def _check_same_flags(config: PretrainConfig) -> None:
    """Check that every rank was started with the same flags, where they must not differ."""
    from ml_train.together import on_every_rank

    first, *others = on_every_rank(lambda: (socket.gethostname(), of_command(config)))
    for rank, (host, flags) in enumerate(others, start=1):
        found = differences(first[1], flags)
        if found:
            listed = "; ".join(f"{flag} {new} instead of {old}" for flag, old, new in found)
            raise UsageError(
                f"rank {rank} (on {host}) was started with other flags than rank 0 (on "
                f"{first[0]}): {listed}; give the same command on every node"
            )


def _all_begin(stop: StopRequest, device: Device) -> bool:
    """Tell, on every rank alike, whether to begin: no rank has been asked to stop so far."""
    import torch

    stop.defer()
    asked = torch.tensor(float(stop.received is not None), device=device.torch)
    torch.distributed.all_reduce(asked)
    stop.began = not bool(asked)
    return stop.began


def _stopped(stop: StopRequest) -> int:
    if _speaks():
        cause = stop.received.name if stop.received else "a signal on another rank"
        sys.stdout.write(f"stopped by {cause} before the first step\n")
    return 0


def _speaks() -> bool:
    """Tell whether this rank says what all know: the first one of each node does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
