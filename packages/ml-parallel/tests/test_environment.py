"""What a launcher says to a rank has to make sense before anything waits for it."""

import subprocess
import sys

import pytest

from ml_parallel.environment import master_port, rank_and_world_size


def test_a_rank_learns_who_it_is():
    assert rank_and_world_size({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}) == (1, 2)
    assert rank_and_world_size({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1)
    assert master_port({"MASTER_PORT": "29500"}) == 29500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment: must be an integer of at least 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment: must be an integer of at least 1"),
        ({"RANK": "x"}, "RANK=x in the environment: must be an integer of at least 0"),
        ({"RANK": "-1"}, "RANK=-1 in the environment: must be an integer of at least 0"),
        ({"RANK": "3"}, "RANK=3 in the environment: must be from 0 to 1 with WORLD_SIZE=2"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK= in the environment: must be an integer of at least 0"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(changes, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in full
        rank_and_world_size({"RANK": "0", "WORLD_SIZE": "2", **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("port", "valid"), [("x", "an integer of at least 1"), ("65536", "from 1 to 65535")]
)
def test_what_is_no_port_is_named(port, valid):
    with pytest.raises(ValueError, match=f"MASTER_PORT={port} in the environment: must be {valid}"):
        master_port({"MASTER_PORT": port})


def test_reading_it_needs_no_torch():
    script = "import sys, ml_parallel.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
