"""Determinism is switched on for every library, and off again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ml_kernels
from ml_kernels.determinism import ENVIRONMENT


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    yield
    ml_kernels.deterministic(False)


def nondeterministic_operation():
    torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))


def test_operations_without_a_deterministic_version_raise():
    nondeterministic_operation()
    ml_kernels.deterministic()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        nondeterministic_operation()
    ml_kernels.deterministic(False)
    nondeterministic_operation()


def test_cudnn_may_not_choose_its_kernels_by_measuring():
    torch.backends.cudnn.benchmark = True
    try:
        ml_kernels.deterministic()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        ml_kernels.deterministic(False)
        assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.benchmark = False


def test_libraries_of_every_device_are_told_through_the_environment(monkeypatch):
    monkeypatch.setenv("HCCL_DETERMINISTIC", "false")
    with ml_kernels.deterministic():
        child = "import os; print(*sorted(os.environ), sep='\\n')"
        seen = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
        assert set(ENVIRONMENT) <= set(seen.stdout.split())
        assert os.environ["HCCL_DETERMINISTIC"] == "true"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert os.environ["CLOSE_MATMUL_K_SHIFT"] == os.environ["LCCL_DETERMINISTIC"] == "1"
        assert os.environ["ATB_MATMUL_SHUFFLE_K_ENABLE"] == "0"
    assert os.environ["HCCL_DETERMINISTIC"] == "false"
    assert not {name for name in ENVIRONMENT if name in os.environ} - {"HCCL_DETERMINISTIC"}


def test_other_values_that_mean_deterministic_are_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("HCCL_DETERMINISTIC", "STRICT")
    with ml_kernels.deterministic():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
        assert os.environ["HCCL_DETERMINISTIC"] == "STRICT"


def test_blocks_nest_and_only_the_outermost_one_restores():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with ml_kernels.deterministic():
            with ml_kernels.deterministic():
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            with ml_kernels.deterministic(False):
                assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_switching_off_what_was_never_on_changes_nothing(monkeypatch):
    monkeypatch.setenv("CLOSE_MATMUL_K_SHIFT", "1")
    ml_kernels.deterministic(False)
    assert os.environ["CLOSE_MATMUL_K_SHIFT"] == "1"
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_was_switched_off_by_hand_is_switched_on_again():
    ml_kernels.deterministic()
    torch.use_deterministic_algorithms(False)
    ml_kernels.deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    with ml_kernels.deterministic():
        torch.use_deterministic_algorithms(False)
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_the_compilers_setting_is_put_back_too(monkeypatch, before):
    config = pytest.importorskip("torch._inductor.config")
    if not hasattr(config, "deterministic"):
        pytest.skip("this torch's compiler has no such setting")
    monkeypatch.setattr(config, "deterministic", before)
    with ml_kernels.deterministic():
        assert config.deterministic
    assert config.deterministic == before
