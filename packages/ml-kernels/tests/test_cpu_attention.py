"""Attention on a CPU: what is written for causal bfloat16, and the tiles of torch's kernel."""

from __future__ import annotations

import pytest
import torch
from attention_formula import SLOPES, tensors, to_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from live_memory import peak_bytes
from oracle import assert_near, random, with_gradients
from torch.multiprocessing.reductions import StorageWeakRef

from ml_kernels import flash_attention
from ml_kernels.cpu import attention, causal, flash

OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def inputs(dtype, *, positions=300, batch=2, heads=6, groups=2, width=16, size=1.0):
    """Return query, key, value and the gradient of the output, `(S, B, N, D)`."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, groups, groups, heads)
    return [
        (torch.randn(positions, batch, n, width, generator=generator) * size).to(dtype)
        for n in sizes
    ]


def torchs_own(query, key, value, upstream, scale=0.25):
    """Return torch's output, its log-sum-exp and its gradients, in the layout of the inputs."""
    leaves = [t.detach().permute(1, 2, 0, 3).requires_grad_() for t in (query, key, value)]
    out, lse = OPERATOR(*leaves, is_causal=True, scale=scale)
    found = torch.autograd.grad(out, leaves, upstream.permute(1, 2, 0, 3).to(out.dtype))
    return out.detach().permute(2, 0, 1, 3), lse, [t.permute(2, 0, 1, 3) for t in found]


def ours(query, key, value, upstream, scale=0.25):
    out, lse, _ = torchs_own(query, key, value, upstream, scale)
    return gradients_from(query, key, value, upstream, out, lse.float(), scale)


def gradients_from(query, key, value, upstream, out, lse, scale=0.25):
    given = [t.permute(1, 2, 0, 3) for t in (upstream, query, key, value, out)]
    whole = slice(0, len(query))
    found = flash.gradients(*given, lse, scale, [flash.Tile(whole, whole, True, None, None, None)])
    return [t.permute(2, 0, 1, 3) for t in found]


def forward_errors(query, key, value, scale=0.25):
    """Return the errors of output and log-sum-exp, ours and torch's."""
    upstream = torch.zeros_like(query)
    expected, expected_lse, _ = torchs_own(*(t.double() for t in (query, key, value, upstream)))
    found, lse = causal.causal_attention(query, key, value, scale)
    theirs, their_lse, _ = torchs_own(query, key, value, upstream)
    assert found.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert found.shape == query.shape
    lses = [(x - expected_lse).abs().max() for x in (lse.permute(1, 2, 0), their_lse)]
    return relative_errors([found, theirs], [expected, expected]), [float(x) for x in lses]


def relative_errors(found, expected):
    return [float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]


def exact(*given):
    return torchs_own(*(t.double() for t in given))[2]


@pytest.mark.parametrize("groups", [6, 2, 1])
def test_blocks_of_queries_give_the_gradients_of_the_formula(groups):
    given = inputs(torch.float32, groups=groups)
    assert max(relative_errors(ours(*given), exact(*given))) < 1e-6


@pytest.mark.parametrize(("positions", "size"), [(64, 1.0), (1200, 1.0), (1200, 0.1), (300, 3.0)])
def test_scores_of_any_size_cost_no_more_accuracy_than_in_torch(positions, size):
    given = inputs(torch.bfloat16, positions=positions, size=size, batch=1)
    expected = exact(*given)
    torchs = relative_errors(torchs_own(*given)[2], expected)
    for found, limit in zip(relative_errors(ours(*given), expected), torchs, strict=True):
        assert found < 1.2 * limit


def test_attention_to_all_keys_alike_has_no_bias():
    _, key, value, _ = inputs(torch.bfloat16, positions=1200, batch=1)
    query, upstream = torch.zeros(2, 1200, 1, 6, 16).bfloat16()
    upstream += 1
    given = query, key, value, upstream
    found, expected = (x[2][-100:].double() for x in (ours(*given), exact(*given)))
    assert abs(found.sum() / expected.sum() - 1) < 1e-3
    assert (found / expected - 1).abs().max() < 6e-3  # of a row, rounded weights gave 1e-2


@pytest.mark.parametrize("size", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_large_scores_cost_the_output_little_more_accuracy_than_in_torch(size, groups, batch):
    given = inputs(torch.bfloat16, size=size, groups=groups, batch=batch)[:3]
    (our_error, torchs_error), (our_lse, torchs_lse) = forward_errors(*given)
    largest = torch.einsum("sbnd,sbnd->sbn", given[0], given[0]).max() * 0.25  # about a score
    assert our_error < 1.3 * torchs_error
    assert our_lse < torchs_lse + 2**-17 * largest


@pytest.mark.parametrize("size", [1.0, 3.0, 8.0])
def test_gradients_from_the_output_here_are_not_much_less_exact_than_torchs(size):
    query, key, value, upstream = inputs(torch.bfloat16, size=size)
    out, lse = causal.causal_attention(query, key, value, 0.25)
    found = gradients_from(query, key, value, upstream, out, lse.permute(1, 2, 0))
    expected = exact(query, key, value, upstream)
    torchs = relative_errors(torchs_own(query, key, value, upstream)[2], expected)
    assert max(relative_errors(found, expected)) < 1.5 * max(torchs)


@pytest.mark.parametrize("positions", [1, 2, 63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("groups", [6, 2])
def test_the_output_of_any_number_of_positions(positions, groups):
    errors, lses = forward_errors(*inputs(torch.bfloat16, positions=positions, groups=groups)[:3])
    assert errors[0] < 4e-3
    assert lses[0] < 2e-5


def test_the_output_of_views_of_one_projection():
    mixed = torch.cat(inputs(torch.bfloat16)[:3], dim=2).transpose(0, 1).contiguous()
    query, key, value = mixed.transpose(0, 1).split([6, 2, 2], dim=2)
    errors, lses = forward_errors(query, key, value)
    assert errors[0] < 4e-3
    assert lses[0] < 2e-5


def test_the_output_ignores_future_scores_however_large():
    query, key, value, _ = inputs(torch.bfloat16, positions=130)
    before, lse = causal.causal_attention(query, key, value, 0.25)
    key[65:], value[65:] = 1e4, 1e4
    after, new_lse = causal.causal_attention(query, key, value, 0.25)
    assert torch.equal(after[:65], before[:65])
    assert torch.equal(new_lse[:65], lse[:65])


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize(("positions", "times"), [(255, 0), (256, 1)])
def test_the_forward_pass_is_used_for_many_queries(monkeypatch, needs_gradient, positions, times):
    calls, function = [], causal.causal_attention
    monkeypatch.setattr(causal, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(causal, "causal_attention", lambda *x: calls.append(x) or function(*x))
    given = inputs(torch.bfloat16, positions=positions)[:3]
    leaves = [t.requires_grad_(needs_gradient) for t in given]
    out, lse = flash_attention(*leaves, layout="SBND", causal=True, return_lse=True)
    expected = flash_attention(
        *leaves, layout="SBND", causal=True, return_lse=True, backend="reference"
    )
    assert_near([out.detach()], [expected[0].detach()], torch.bfloat16)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=2e-4)
    assert len(calls) == times
    assert out.requires_grad == needs_gradient


def test_tensors_that_are_views_of_one_projection_are_accepted():
    mixed = torch.cat(inputs(torch.float32)[:3], dim=2)  # (S, B, heads + 2 groups, D)
    query, key, value = mixed.split([6, 2, 2], dim=2)
    upstream = torch.ones(300, 6, 2, 16).transpose(1, 2)
    found = ours(query, key, value, upstream)
    assert max(relative_errors(found, exact(query, key, value, upstream))) < 1e-6


def test_a_future_score_however_large_changes_nothing():
    query, key, value, upstream = inputs(torch.bfloat16, positions=8, groups=6)
    query[:4], key[4:] = 1e3, 1e3
    upstream[4:] = 0
    of_query, of_key, of_value = ours(query, key, value, upstream)
    assert of_query.isfinite().all()
    assert not of_key[4:].any()
    assert not of_value[4:].any()


@pytest.fixture
def counted(monkeypatch):
    """Count the calls of the products written here, as on a CPU where they are faster."""
    calls, function = [], causal.causal_attention

    def attention_(*given):
        calls.append(given)
        return function(*given)

    monkeypatch.setattr(causal, "causal_attention", attention_)
    monkeypatch.setattr(causal, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(flash, "_MANY", 4)
    return calls


@pytest.mark.parametrize(
    ("times", "options"),
    [
        (1, {}),
        (1, {"sinks": torch.ones(4)}),
        (1, {"return_lse": True}),
        (0, {"causal": False}),
        (0, {"keys": 5}),
        (0, {"keys": 3, "window": 2}),
        (0, {"dropout_p": 0.5}),
        (0, {"alibi_slopes": SLOPES}),
        (0, {"mask": torch.zeros(4, 4).bool()}),
        (0, {"dtype": torch.float32}),
    ],
)
def test_they_are_used_where_they_are_faster_only(counted, times, options):
    options = dict(options)
    keys, dtype = options.pop("keys", 4), options.pop("dtype", torch.bfloat16)
    given = [t.detach().requires_grad_() for t in tensors(4, keys, dtype=dtype)]
    result = flash_attention(*given, layout="BNSD", **{"causal": True, **options})
    out = result[0] if isinstance(result, tuple) else result
    torch.autograd.grad(out.sum(), given)
    assert len(counted) == times


def test_they_take_the_tensors_of_megatrons_layout_as_they_are(counted):
    given = inputs(torch.bfloat16, positions=8)
    leaves = [t.requires_grad_() for t in given[:3]]
    out = flash_attention(*leaves, layout="SBND", causal=True)
    out.backward(given[3])
    for taken, leaf in zip(counted[0][:3], leaves, strict=True):
        assert taken.data_ptr() == leaf.data_ptr()
        assert taken.stride() == leaf.stride()


@pytest.mark.parametrize("sinks", [None, random(4, seed=5).detach()])
@pytest.mark.parametrize("layout", ["SBND", "TND"])
def test_attention_with_them_has_the_gradients_of_the_reference(counted, layout, sinks):
    ends = {"cu_seqlens_q": (0, 2, 9), "cu_seqlens_k": (0, 2, 9)} if layout == "TND" else {}
    options = {"layout": layout, "causal": True, **ends}
    given = [t.detach().bfloat16() for t in tensors(9, 9, batch=1)]
    given = [to_layout(t, layout).requires_grad_() for t in given]
    sinks = [] if sinks is None else [sinks.clone().requires_grad_()]

    def attend(q, k, v, *s, **more):
        return flash_attention(q, k, v, sinks=s[0] if s else None, **options, **more)

    found = with_gradients(attend, [*given, *sinks])
    expected = with_gradients(lambda *x: attend(*x, backend="reference"), [*given, *sinks])
    assert_near(found, expected, torch.bfloat16)
    assert counted


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_blocks_of_any_size_give_the_same_numbers(data):
    lengths = st.integers(1, 12)
    queries, keys, window = (data.draw(lengths) for _ in range(3))
    options = {"layout": "BNSD", "causal": True, "window": window}
    form = data.draw(st.sampled_from([None, "row", "square"]))
    if form:
        options |= {"alibi_slopes": SLOPES, "alibi_form": form}
    sinks = [random(4, seed=7)] if data.draw(st.booleans()) else []
    given = [*tensors(queries, keys), *sinks]

    def attend(q, k, v, *s, **more):
        return flash_attention(q, k, v, sinks=s[0] if s else None, **options, **more)

    expected = with_gradients(lambda *x: attend(*x, backend="reference"), given)
    _, expected_lse = attend(*given[:3], return_lse=True, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_BLOCK", data.draw(st.integers(1, 5)))
        assert_near(with_gradients(attend, given), expected)
        _, lse = attend(*given[:3], return_lse=True)
    torch.testing.assert_close(lse, expected_lse, rtol=2e-5, atol=2e-5)


def test_a_window_never_meets_the_keys_it_does_not_see(monkeypatch):
    tiles, cut = [], attention._tiles
    monkeypatch.setattr(attention, "_BLOCK", 16)
    monkeypatch.setattr(attention, "_tiles", lambda call: tiles.extend(cut(call)) or cut(call))
    flash_attention(*tensors(64, 64), layout="BNSD", causal=True, window=8)
    sizes = [(t.queries.stop - t.queries.start, t.keys.stop - t.keys.start) for t in tiles]
    assert sizes == [(16, 16), *[(16, 16 + 8 - 1)] * 3]
    assert len({tile.bias.untyped_storage().data_ptr() for tile in tiles[1:4]}) == 1


def test_fewer_queries_than_keys_need_no_bias_as_large_as_the_scores():
    def attend():
        flash_attention(*(t.detach() for t in tensors(2048, 4096)), layout="BNSD", causal=True)

    assert peak_bytes(attend) < 2048 * 4096 * 4 / 2


@pytest.mark.parametrize("options", [{"window": 3}, {"mask": torch.eye(5).bool()}])
def test_biases_are_gone_after_the_backward_pass(options):
    packed = []
    sinks = torch.zeros(4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        out = flash_attention(*tensors(), layout="BNSD", causal=True, sinks=sinks, **options)
    (bias,) = (t for t in packed if t.shape[-2:] == (5, 5))
    storage = StorageWeakRef(bias.untyped_storage())
    packed.clear()
    del bias
    assert not storage.expired()
    out.sum().backward()
    assert storage.expired()
    del out


def test_torchs_own_derivative_is_used_where_nothing_is_added(monkeypatch):
    monkeypatch.setattr(flash, "_Flash", None)
    given = tensors()
    out = flash_attention(*given, layout="BNSD", causal=True)
    torch.autograd.grad(out.sum(), given)
