"""flash_attention in every layout: the same numbers in another order, and packed sequences."""

from __future__ import annotations

import pytest
import torch
from attention_formula import (
    COMPILES_FLEX,
    LAYOUTS,
    SLOPES,
    formula,
    from_layout,
    output_of,
    tensors,
    to_layout,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_matches, assert_near, random, runs, with_gradients

from ml_kernels import flash_attention

pytestmark = COMPILES_FLEX
RUNS = runs("flash_attention")


@pytest.mark.parametrize("value_width", [3, 6])
@pytest.mark.parametrize("layout", ["BNSD", "SBND", "BSND", "TND"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_values_may_be_narrower_or_wider_than_keys(device, backend, layout, value_width):
    ends = {"cu_seqlens_q": (0, 5), "cu_seqlens_k": (0, 5)} if layout == "TND" else {}
    assert_matches(
        lambda *qkv: from_layout(
            flash_attention(
                *(to_layout(t, layout) for t in qkv), layout=layout, backend=backend, **ends
            ),
            layout,
        ),
        output_of({}),
        tensors(batch=1, value_width=value_width, device=device),
    )


@settings(max_examples=25, deadline=None)
@given(st.data())
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_all_layouts_give_the_same_numbers(device, backend, data):
    lengths = st.integers(1, 9)
    groups, repeats = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    heads, queries, keys = groups * repeats, data.draw(lengths), data.draw(lengths)
    sizes = {"batch": data.draw(st.integers(1, 3)), "heads": heads, "groups": groups}
    causal = data.draw(st.booleans())
    options = {"causal": causal, "window": data.draw(st.none() | lengths) if causal else None}
    layout, contiguous = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.booleans())

    def attend(*inputs):
        taken = [to_layout(t, layout) for t in inputs]
        taken = [t.contiguous() for t in taken] if contiguous else taken
        more = {"num_heads": heads} if layout in ("SBH", "BSH") else {}
        out = flash_attention(*taken, layout=layout, backend=backend, **options, **more)
        assert out.shape == taken[0].shape
        return from_layout(out, layout, heads)

    inputs = tensors(queries, keys, **sizes, device=device)
    expected = with_gradients(
        lambda *qkv: flash_attention(*qkv, layout="BNSD", backend="reference", **options), inputs
    )
    assert_near(with_gradients(attend, inputs), expected)


@settings(max_examples=15, deadline=None)
@given(st.data())
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_packed_sequences_are_those_alone(device, backend, data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1))
    causal = data.draw(st.booleans())
    options = {"causal": causal, "window": data.draw(st.none() | st.integers(1, 4))}
    options = options if causal else {"causal": False}
    if data.draw(st.booleans()):
        form = data.draw(st.sampled_from(["row", "square"]))
        options |= {"alibi_slopes": SLOPES.to(device), "alibi_form": form}
    ends = [[sum(pair[i] for pair in pairs[:n]) for n in range(len(pairs) + 1)] for i in (0, 1)]
    as_tensor = data.draw(st.booleans())
    taken = [torch.tensor(e, dtype=torch.int32) if as_tensor else e for e in ends]
    inputs = tensors(ends[0][-1], ends[1][-1], batch=1, device=device)
    options["return_lse"] = True

    def packed(*qkv):
        return flash_attention(
            *(to_layout(t, "TND") for t in qkv),
            layout="TND",
            cu_seqlens_q=taken[0],
            cu_seqlens_k=taken[1],
            backend=backend,
            **options,
        )

    def alone(query, key, value):
        found = []
        for i in range(len(pairs)):
            rows, keys = (slice(e[i], e[i + 1]) for e in ends)
            some = query[:, :, rows], key[:, :, keys], value[:, :, keys]
            found.append(flash_attention(*some, layout="BNSD", backend="reference", **options))
        out, lse = (torch.cat(column, 2) for column in zip(*found, strict=True))
        return to_layout(out, "TND"), lse[0].T

    (out, lse), (expected, expected_lse) = packed(*inputs), alone(*inputs)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=2e-5)
    upstream = random(*out.shape).detach().to(device)
    gradients = [torch.autograd.grad(x, inputs, upstream) for x in (out, expected)]
    assert_near([out, *gradients[0]], [expected, *gradients[1]])


@pytest.mark.parametrize("sequences", [((0, 2, 5), (0, 2, 5)), ((0, 5), (0, 5))])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_packed_sequences_have_sinks_of_their_own(device, backend, sequences):
    ends_q, ends_k = sequences
    queries = torch.bucketize(torch.arange(5), torch.tensor(ends_q[1:]), right=True)
    mask = queries[:, None] != queries

    def packed(q, k, v, sinks):
        out = flash_attention(
            *(to_layout(t, "TND") for t in (q, k, v)),
            layout="TND",
            cu_seqlens_q=ends_q,
            cu_seqlens_k=ends_k,
            sinks=sinks,
            backend=backend,
        )
        return from_layout(out, "TND")

    inputs = [*tensors(batch=1, device=device), random(4, seed=3, device=device)]
    assert_matches(packed, output_of({"mask": mask[None, None]}), inputs)


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_views_of_one_projection_are_taken(device, backend):
    mixed = random(5, 2, 4 + 2 + 2, 4, device=device)

    def attend(x):
        return flash_attention(
            *x.split([4, 2, 2], dim=2), layout="SBND", causal=True, backend=backend
        )

    def expected(x):
        query, key, value = (t.permute(1, 2, 0, 3) for t in x.split([4, 2, 2], dim=2))
        out, _ = formula({"causal": True})(query, key, value)
        return out.permute(2, 0, 1, 3)

    assert_matches(attend, expected, [mixed])


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_channels_need_not_be_next_to_each_other(device, backend):
    turned = [t.detach().mT.contiguous().requires_grad_() for t in tensors(device=device)]
    assert_matches(
        lambda *qkv: flash_attention(*(t.mT for t in qkv), layout="BNSD", backend=backend),
        lambda *qkv: output_of({})(*(t.mT for t in qkv)),
        turned,
    )


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"queries": 0}, {"keys": 0}, {"width": 0}, {"value_width": 0}]
)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_nothing_to_attend_to_gives_nothing(device, backend, sizes):
    inputs = tensors(**sizes, device=device)
    out, lse = flash_attention(*inputs, layout="BNSD", return_lse=True, backend=backend)
    assert out.shape == (*inputs[0].shape[:3], inputs[2].shape[3])
    assert lse.shape == inputs[0].shape[:3]
    assert "width" in sizes or not out.any()
    gradients = torch.autograd.grad(out.sum(), inputs, materialize_grads=True)
    assert [g.shape for g in gradients] == [t.shape for t in inputs]
