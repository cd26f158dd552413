"""`ml-data instruct`: instructions and conversations to the token files of instruction tuning.

ModelLink's layout: `PREFIX_packed_{input_ids,attention_mask,labels}_document`, a document a sample.
With `--pack` a document is a row of several samples, each a sequence of it: the index says where
they begin, so nobody has to guess it from tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ml_data.instruction.preparation import Preparation, prepare, run
from ml_data.instruction.sample_config import SampleConfig
from ml_data.instruction.sample_info import SampleInfo
from ml_data.progress import Progress, silent
from ml_models.flags import UsageError, parse


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Instruction tuning."""

    mask_history: bool = False
    """The loss sees the last answer only, not those before it."""
    pack: bool = False
    """Put samples together to rows of --seq-length tokens."""


@dataclass(frozen=True, kw_only=True)
class InstructConfig(SampleConfig):
    """Instructions and conversations to the token files of instruction tuning."""

    learning: Learning = Learning()

    def prepared(self) -> Preparation:
        """Return what is to be done.

        Raises:
            UsageError: values contradict each other, or name what is not there.
        """
        if self.learning.pack and self.shape.seq_length is None:
            raise UsageError("--pack: needs --seq-length, the tokens of a row")
        return self.preparation(
            pairwise=False,
            pack=self.learning.pack,
            last_answer_only=self.learning.mask_history,
        )


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    config = parse(InstructConfig, argv, prog=prog)
    return run(config.prepared(), config.output.log_interval)


def instruct(config: InstructConfig, progress: Progress = silent) -> SampleInfo:
    """Write the files and return their description.

    Raises:
        UsageError: an input, the tokenizer or the template is missing or not as it should be, or
            there is no sample at all.
        OSError: the files cannot be written, or a worker died.
    """
    info, _ = prepare(config.prepared(), progress)
    return info
