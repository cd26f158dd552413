"""The package as an import: cheap, complete and without side effects."""

from __future__ import annotations

import subprocess
import sys
import typing

import pytest

import ml_kernels


def test_importing_it_loads_neither_torch_nor_what_is_below_it():
    script = (
        "import sys, ml_kernels, ml_kernels.dispatch; "
        "print(*{'torch', 'torch_npu', 'triton', 'numpy', 'megatron'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")


@pytest.mark.parametrize("name", ml_kernels.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(ml_kernels, name).__doc__
    assert getattr(ml_kernels, name) is vars(ml_kernels)[name]  # found once, then remembered


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ml_kernels' has no attribute 'tea'"):
        _ = ml_kernels.tea


def test_public_names_are_completed_before_they_are_loaded():
    script = "import ml_kernels; print(*set(ml_kernels.__all__) - set(dir(ml_kernels)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "")


FUNCTIONS = [name for name in ml_kernels.__all__ if name.islower()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_types_of_a_function_are_known_at_run_time(name):
    assert typing.get_type_hints(getattr(ml_kernels, name))
