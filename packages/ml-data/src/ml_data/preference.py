"""`ml-data preference`: questions with a better and a worse answer to token files, for DPO.

`PREFIX_packed_{chosen,rejected}_{input_ids,labels}_document`, a document a preference in each of
the four; the loss sees the two answers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ml_data.instruction.preparation import Preparation, prepare, run
from ml_data.instruction.sample_config import SampleConfig
from ml_data.instruction.sample_info import SampleInfo
from ml_data.progress import Progress, silent
from ml_models.flags import parse


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(SampleConfig):
    """Questions with a better and a worse answer to token files."""

    def prepared(self) -> Preparation:
        """Return what is to be done.

        Raises:
            UsageError: values contradict each other, or name what is not there.
        """
        return self.preparation(pairwise=True)


def main(argv: Sequence[str], prog: str) -> int:
    """Run the command."""
    config = parse(PreferenceConfig, argv, prog=prog)
    return run(config.prepared(), config.output.log_interval)


def prefer(config: PreferenceConfig, progress: Progress = silent) -> SampleInfo:
    """Write the files and return their description.

    Raises:
        UsageError: an input, the tokenizer or the template is missing or not as it should be, or
            there is no preference at all.
        OSError: the files cannot be written, or a worker died.
    """
    info, _ = prepare(config.prepared(), progress)
    return info
