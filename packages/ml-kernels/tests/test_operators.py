"""The table of operators: what it names, how it chooses and what it says."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import ml_kernels
from ml_kernels.device import why_unavailable
from ml_kernels.dispatch import (
    DEVICES,
    IMPLEMENTATIONS,
    WITHOUT,
    BackendUnavailableError,
    implementation,
    operators,
)


def test_a_backend_asked_for_by_name_never_falls_back():
    x = torch.ones(2, 4)
    for backend in ("npu", "cuda"):
        with pytest.raises(BackendUnavailableError) as error:
            ml_kernels.swiglu(x, backend=backend)
        reason = why_unavailable(backend) or "the tensors are on cpu"
        assert str(error.value) == f"swiglu: backend={backend!r}: {reason}"
    with pytest.raises(BackendUnavailableError, match="there is no backend 'tpu'; there are refer"):
        ml_kernels.swiglu(x, backend="tpu")


def test_an_operator_without_an_implementation_says_why():
    with pytest.raises(BackendUnavailableError, match=r"topk_gating has no cpu implementation \("):
        ml_kernels.topk_gating(torch.ones(2, 4), 1, backend="cpu")
    assert "there is no operator 'tea'" in ml_kernels.why_not("tea", "cpu")
    assert ml_kernels.why_not("rms_norm", "cpu") is None
    assert ml_kernels.why_not("rms_norm", "reference") is None


def test_the_implementation_follows_the_device_of_the_tensor():
    x = torch.ones(2)
    assert implementation("rms_norm", x).__module__ == "ml_kernels.cpu.norm"
    assert implementation("rms_norm", x, "reference").__module__ == "ml_kernels.norm"
    assert implementation("rms_norm", x.to("meta")).__module__ == "ml_kernels.norm"
    assert implementation("topk_gating", x).__module__ == "ml_kernels.moe"


def test_available_prints_a_line_for_each_operator_and_each_reason(capsys):
    ml_kernels.available()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["operator", *DEVICES]
    assert [line.split()[0] for line in lines[1 : len(operators()) + 1]] == operators()
    assert next(line for line in lines if line.startswith("rms_norm")).split()[1] == "yes"
    for device in DEVICES:
        reason = why_unavailable(device)
        assert reason is None or f"no {device}: {reason}" in lines
    for (operator, device), reason in WITHOUT.items():
        assert f"reference for {operator} on {device}: {reason}" in lines


@pytest.mark.parametrize(("operator", "backend"), sorted(IMPLEMENTATIONS))
def test_every_entry_of_the_table_names_a_function(operator, backend):
    module, _, function = IMPLEMENTATIONS[operator, backend].partition(":")
    # Read and not imported: the modules for NPU need torch_npu.
    tree = ast.parse(Path(find_spec(module).origin).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("operator", operators())
def test_every_operator_has_a_reference_and_an_answer_for_every_device(operator):
    assert (operator, "reference") in IMPLEMENTATIONS
    for device in DEVICES:
        assert ((operator, device) in IMPLEMENTATIONS) != ((operator, device) in WITHOUT)
    assert callable(getattr(ml_kernels, operator))
