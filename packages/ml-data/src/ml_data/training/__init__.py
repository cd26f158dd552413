"""Instruction and preference data as a trainer reads it; numpy only.

`LabelledDataset` and `PreferenceDataset` open what `ml-data instruct` and `ml-data preference`
wrote, `RunSamples` mixes several and says which sample comes at which position of a run, `batches`
makes arrays of equal length.
"""

from ml_data.training.batches import in_one_row, padded, padded_length
from ml_data.training.labelled import LabelledDataset, instruction_dataset
from ml_data.training.order import Permutation, RunOrder
from ml_data.training.preference import Pair, PreferenceDataset, chosen_then_rejected
from ml_data.training.rows import Row
from ml_data.training.run import RunSamples

__all__ = [
    "LabelledDataset",
    "Pair",
    "Permutation",
    "PreferenceDataset",
    "Row",
    "RunOrder",
    "RunSamples",
    "chosen_then_rejected",
    "in_one_row",
    "instruction_dataset",
    "padded",
    "padded_length",
]
