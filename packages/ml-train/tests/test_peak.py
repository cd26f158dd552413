"""The peak of a device: from its name where it has a datasheet, else measured."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import ml_kernels
from ml_train import peak
from ml_train.peak import ACCELERATORS, datasheet, matmul_peak

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 67.0),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA H800", 989.4, 67.0),
        ("NVIDIA H200", 989.4, 67.0),
        ("NVIDIA H200 NVL", 835.5, 60.0),
        ("NVIDIA GH200 480GB", 989.4, 67.0),
        ("NVIDIA B200", 2250.0, 75.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("NVIDIA A800-SXM4-40GB", 312.0, 19.5),
        ("NVIDIA L40S", 362.0, 91.6),
        ("Ascend910B2", 354.0, None),
        ("NVIDIA GeForce GTX 1080", None, None),
        ("NVIDIA A10", None, None),
        ("Ascend910A", None, None),
    ],
)
def test_a_known_name_has_the_numbers_of_its_datasheet(
    name: str, half: float | None, single: float | None
) -> None:
    assert datasheet(name, torch.bfloat16) == half
    assert datasheet(name, torch.float16) == half
    assert datasheet(name, torch.float32) == single
    assert datasheet(name, torch.float64) is None


def test_every_number_has_a_source() -> None:
    assert all(accelerator.source for accelerator in ACCELERATORS)


def test_a_cpu_is_measured_once() -> None:
    torch.set_num_threads(1)
    first = matmul_peak(CPU, torch.float32)
    before = peak._measure.cache_info()
    assert matmul_peak(CPU, torch.float32) == first
    assert peak._measure.cache_info() == before._replace(hits=before.hits + 1)
    assert matmul_peak(CPU, torch.bfloat16) != first


@pytest.mark.parametrize(
    ("tflops", "expected", "measured"),
    [(1.0, 1.0, {512, 1024, 2048}), (1e-3, 1e-3 / 3, {512})],
    ids=["fast", "too slow for a second product"],
)
def test_it_is_the_best_of_real_products(
    monkeypatch: pytest.MonkeyPatch, tflops: float, expected: float, measured: set[int]
) -> None:
    """By a clock that only products move on; the first of each size takes three times as long."""
    now, sizes = 0.0, list[int]()

    def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        nonlocal now
        size = left.shape[0]
        now += (1 if size in sizes else 3) * 2 * size**3 / (tflops * 1e12)
        sizes.append(size)
        return left @ right.t()

    monkeypatch.setattr(peak, "_SECONDS", 0.01)
    monkeypatch.setattr(peak, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(ml_kernels, "linear", multiply)
    peak._measure.cache_clear()
    assert matmul_peak(CPU, torch.float32) == pytest.approx(expected)
    assert set(sizes) == measured
    peak._measure.cache_clear()


def test_the_number_of_threads_is_part_of_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peak, "_SECONDS", 0.01)
    peak._measure.cache_clear()
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        matmul_peak(CPU, torch.float32)
    assert peak._measure.cache_info().misses == 2
    peak._measure.cache_clear()


def test_measuring_leaves_the_random_numbers_alone() -> None:
    peak._measure.cache_clear()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    matmul_peak(CPU, torch.float32)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
