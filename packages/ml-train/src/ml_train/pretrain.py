"""`ml-train pretrain`: check everything, start the ranks, train.

The process a user starts checks the flags, the layout and the files without torch, then runs this
command once per rank; a rank (RANK is set, by us or by torchrun) trains.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from ml_models.flags import UsageError, parse
from ml_train.config import PretrainConfig, check_world, with_vocabulary
from ml_train.corpora import common_tokenizer, read_corpora
from ml_train.launch import launch, under_launcher


def main(argv: Sequence[str], prog: str) -> int:
    """Run `ml-train pretrain` with these flags and return its exit code."""
    config = parse(PretrainConfig, argv, prog=prog, description="Pre-train a model.")
    config = with_vocabulary(config, common_tokenizer(read_corpora(config.data)))
    if under_launcher():
        return _train(check_world(config, int(os.environ["WORLD_SIZE"])), prog)
    config = check_world(config, config.launch.world_size)
    if config.launch.world_size == 1:
        return _train(config, prog)
    command = [sys.executable, "-m", "ml_train", "pretrain", *argv]
    return launch(command, config.launch)


def _train(config: PretrainConfig, prog: str) -> int:
    from ml_parallel import platform
    from ml_train.signals import StopRequest

    logging.basicConfig(level=logging.WARNING, format=f"{prog}: %(message)s")
    try:
        device = platform.activate(config.training.device)
    except ValueError as error:
        raise UsageError(str(error)) from error
    platform.initialize_process_group(
        device, timeout_minutes=config.training.distributed_timeout_minutes
    )
    import torch

    from ml_train.loop import Trainer, TrainingFailedError

    try:
        trainer = Trainer(config, device)
        # Until here a signal ends the process at once: there is nothing to save.
        with StopRequest() as stop:
            trainer.run(stop)
    except TrainingFailedError as error:
        if torch.distributed.get_rank() == 0:
            sys.stderr.write(f"{prog}: {error}\n")
        return 1
    finally:
        torch.distributed.destroy_process_group()
    return 0
