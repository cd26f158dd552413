"""Where data go is checked alike by every command that prepares them."""

from __future__ import annotations

import pytest

from ml_data.instruction import sample_config
from ml_data.pretrain import Output

OUTPUTS = pytest.mark.parametrize(
    "output", [Output, sample_config.Output], ids=["pretrain", "samples"]
)


@OUTPUTS
@pytest.mark.parametrize("prefix", ["", "out/", "..", "out/.."])
def test_a_prefix_that_is_a_directory_is_refused(output, prefix):
    with pytest.raises(ValueError, match=r"^--output-prefix '.*': must end in a file name"):
        output(output_prefix=prefix)


@OUTPUTS
@pytest.mark.parametrize("name", ["workers", "n_subs", "log_interval"])
def test_numbers_begin_at_1(output, name):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} 0: must be at least 1"):
        output(output_prefix="out", **{name: 0})


@OUTPUTS
def test_parts_of_the_input_are_worked_on_at_a_time(output):
    assert output(output_prefix="out", workers=2, n_subs=3).processes == 3
    assert output(output_prefix="out", workers=3, n_subs=2).processes == 3
