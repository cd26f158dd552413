"""The references that CUDA runs compiled: torch must capture each as one graph, for any sizes."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from oracle import assert_near, random, with_gradients

from ml_kernels.activation import geglu_reference, gelu_reference, swiglu_reference
from ml_kernels.cuda import compiled
from ml_kernels.loss import cross_entropy_reference
from ml_kernels.norm import add_rms_norm_reference, rms_norm_reference
from ml_kernels.rotary import rotary_embedding_reference
from ml_kernels.softmax import scaled_masked_softmax_reference


def calls(rows):
    """Return, for each operator, inputs of so many rows and the call on them."""
    x, more, weight = random(rows, 2, 32), random(rows, 2, 32, seed=1), random(32, seed=2)
    target = torch.arange(2 * rows).view(rows, 2) % 32
    angles = random(rows, 1, 1, 8).detach()
    scores, mask = random(2, 3, rows, 5), torch.arange(5) > 3
    return {
        rms_norm_reference: ([x, weight], lambda f: lambda x, w: f(x, w, 1e-5, True)),
        add_rms_norm_reference: (
            [x, more, weight],
            lambda f: lambda x, r, w: f(x, r, w, 1e-5, False),
        ),
        swiglu_reference: ([x, weight], lambda f: f),
        geglu_reference: ([x], lambda f: lambda x: f(x, None, "tanh")),
        gelu_reference: ([x, weight], lambda f: lambda x, b: f(x, b, "none")),
        rotary_embedding_reference: (
            [random(rows, 1, 4, 16)],
            lambda f: lambda x: f(x, angles, True, 2.0),
        ),
        cross_entropy_reference: ([x], lambda f: lambda x: f(x, target, 3, None)),
        scaled_masked_softmax_reference: ([scores], lambda f: lambda x: f(x, mask, 0.5)),
    }


@pytest.mark.parametrize("reference", calls(1), ids=lambda reference: reference.__name__)
def test_a_reference_is_one_graph_whatever_its_sizes(reference):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    captured = torch.compile(reference, dynamic=True, fullgraph=True, backend=backend)
    for rows in (9, 7):  # sizes that no other dimension has: torch takes equal ones for one
        inputs, call = calls(rows)[reference]
        found = with_gradients(call(captured), inputs)
        assert_near(found, with_gradients(call(reference), inputs))
    assert len(graphs) == 1


def test_a_reference_is_compiled_once_and_only_where_triton_is():
    assert compiled.compiled(swiglu_reference) is compiled.compiled(swiglu_reference)
    is_compiled = compiled.compiled(swiglu_reference) is not swiglu_reference
    assert is_compiled == (find_spec("triton") is not None)
