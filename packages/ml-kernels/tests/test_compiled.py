"""What torch compiles on CUDA, or in a model: one graph for any sizes, and never eager mode."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_formula import COMPILES_FLEX
from oracle import assert_near, random, with_gradients
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention as flex

from ml_kernels.activation import geglu_reference, gelu_reference, swiglu_reference
from ml_kernels.cuda import graphs, softmax
from ml_kernels.cuda.attention import Pattern, mask_mod
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


@pytest.fixture
def graph_count(monkeypatch):
    """Count the graphs that are compiled; they run as they are, which needs no Triton."""
    made = []

    def backend(graph, _inputs):
        made.append(graph)
        return graph

    torch.compiler.reset()
    graphs._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield lambda: len(made)
    graphs._compiled.cache_clear()
    torch.compiler.reset()


@pytest.mark.usefixtures("graph_count")
def test_a_function_is_compiled_once():
    compiled = graphs.compiled(swiglu_reference, dynamic=True)
    assert compiled is graphs.compiled(swiglu_reference, dynamic=True)
    assert compiled is not swiglu_reference


def test_more_variants_than_torch_allows_by_itself_are_compiled(graph_count):
    x, variants = torch.randn(3, 4), torch._dynamo.config.recompile_limit + 4

    def scaled(x, name):
        return x * len(name)

    run = graphs.compiled(scaled)
    for n in range(variants):
        assert torch.equal(run(x, "a" * n), x * n)
    assert graph_count() == variants


@pytest.mark.usefixtures("graph_count")
def test_a_variant_too_many_is_an_error_and_not_eager_mode(monkeypatch):
    monkeypatch.setattr(graphs, "_VARIANTS", 2)
    run = graphs.compiled(lambda x, name: x * len(name))
    x = torch.ones(2)
    run(x, ""), run(x, "a")
    with pytest.raises(FailOnRecompileLimitHit):
        run(x, "aa")


@pytest.mark.usefixtures("graph_count")
def test_an_older_torch_has_its_only_limit_raised(monkeypatch):
    compile_ = torch.compile

    def of_torch_2_7(model=None, *, fullgraph=False, dynamic=None):
        return compile_(model, fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", of_torch_2_7)
    x = torch.randn(3, 4)
    with torch._dynamo.config.patch(recompile_limit=8):
        run = graphs.compiled(lambda x, name: x * len(name))
        for n in range(12):
            assert torch.equal(run(x, "a" * n), x * n)
        assert torch._dynamo.config.recompile_limit == graphs._VARIANTS


@COMPILES_FLEX
def test_flex_attention_is_one_graph_and_the_blocks_it_skips_another(graph_count):
    pattern = Pattern(256, 256, True, 40, (0, 100, 256), (0, 100, 256), torch.device("cpu"))
    mod = mask_mod(pattern, None)
    sizes = (None, None, 256, 256)
    blocks = graphs.compiled(flex.create_block_mask)(mod, *sizes, device="cpu")
    expected = flex.create_block_mask(mod, *sizes, device="cpu")
    assert torch.equal(blocks.to_dense(), expected.to_dense())
    assert graph_count() == 1
    query, key, value = (torch.randn(1, 2, 256, 16) for _ in range(3))
    found = graphs.compiled(flex.flex_attention)(query, key, value, block_mask=blocks)
    hidden = ~mod(torch.tensor(0), 0, torch.arange(256)[:, None], torch.arange(256))
    scores = (query @ key.mT / 4).masked_fill(hidden, float("-inf"))
    torch.testing.assert_close(found, scores.softmax(-1) @ value, rtol=2e-5, atol=2e-5)
    assert graph_count() == 2


def test_a_compiled_function_becomes_a_part_of_its_callers_graph(graph_count):
    scores, mask = random(2, 3, 4, 5), torch.arange(5) > 3

    def model(x):
        return softmax.scaled_masked_softmax(x * 2, mask, 0.5) * 3

    found = with_gradients(torch.compile(model, fullgraph=True), [scores])
    assert graph_count() == 1
    by_hand = with_gradients(
        lambda x: scaled_masked_softmax_reference(x * 2, mask, 0.5) * 3, [scores]
    )
    assert_near(found, by_hand)
