"""flash_attention against its formula in float64, torch and transformers.

Shapes: `(B, N, S, D)` unless a layout says otherwise.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ROUNDING, assert_matches, assert_near, random, runs, with_gradients
from torch.nn import functional as F
from transformers import masking_utils
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from ml_kernels import flash_attention, flash_attention_backward

RUNS = runs("flash_attention")
DTYPES = list(ROUNDING)
LAYOUTS = ["SBND", "SBH", "BSH", "BSND", "BNSD"]
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
LENGTHS = {"square": (5, 5), "one query": (1, 5), "more keys": (3, 5), "more queries": (5, 3)}
SEEN = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 2},
    "masked": {"mask": random(2, 4, 5, 5) < 0.2},
    "row slopes": {"causal": True, "alibi_slopes": SLOPES, "alibi_form": "row"},
    "square slopes": {"alibi_slopes": SLOPES},
    "slopes in a window": {"causal": True, "window": 2, "alibi_slopes": SLOPES},
    "everything": {
        "causal": True,
        "window": 3,
        "mask": random(2, 1, 5, 5) < 0.2,
        "alibi_slopes": SLOPES,
        "scale": 0.3,
    },
}


def sized(seen, queries, keys):
    """Cut the mask of some options to the lengths."""
    cut = {"mask": seen["mask"][..., :queries, :keys]} if "mask" in seen else {}
    return {**seen, **cut}


def on(device, options):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def tensors(queries=5, keys=5, *, batch=2, heads=4, groups=2, width=4, value_width=4, **options):
    sizes = [(heads, queries, width), (groups, keys, width), (groups, keys, value_width)]
    return [random(batch, *size, seed=s, **options) for s, size in enumerate(sizes)]


def sees(seen, batch, head, query, key, ahead):
    """Say whether a query at a position sees a key."""
    position = query + ahead
    if seen.get("causal") and key > position:
        return False
    if seen.get("window") is not None and key <= position - seen["window"]:
        return False
    mask = seen.get("mask")
    if mask is None:
        return True
    index = (batch, head, query, key)
    return not mask[tuple(i if n > 1 else 0 for i, n in zip(index, mask.shape, strict=True))]


def formula(seen):
    """Return the attention of one row after the other, and its log-sum-exp."""

    def row(q, k, v, sinks, batch, head, query):
        group, ahead = head // (q.shape[1] // k.shape[1]), k.shape[2] - q.shape[2]
        visible = [j for j in range(k.shape[2]) if sees(seen, batch, head, query, j, ahead)]
        logits = []
        for j in visible:
            score = q[batch, head, query] @ k[batch, group, j]
            score = score * seen.get("scale", q.shape[3] ** -0.5)
            if "alibi_slopes" in seen:
                start = 0 if seen.get("alibi_form") == "row" else query + ahead
                score = score + float(seen["alibi_slopes"][head]) * (j - start)
            logits.append(score)
        if not visible:
            return q.sum() * 0 + v.new_zeros(v.shape[3]), q.new_tensor(float("-inf"))
        logits = torch.stack(logits)
        total = logits.exp().sum() + (0 if sinks is None else sinks[head].exp())
        return logits.exp() @ v[batch, group, visible] / total, total.log()

    def attend(q, k, v, sinks=None):
        batch, heads, queries, _ = q.shape
        indices = torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, queries)))
        rows = [row(q, k, v, sinks, *index) for index in indices.tolist()]
        out, lse = (torch.stack(column) for column in zip(*rows, strict=True))
        return out.view(batch, heads, queries, -1), lse.view(batch, heads, queries)

    return attend


def output_of(seen):
    return lambda *inputs: formula(seen)(*inputs)[0]


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_it_matches_its_formula(device, backend, lengths, seen):
    options = sized(SEEN[seen], *LENGTHS[lengths])
    assert_matches(
        lambda q, k, v: flash_attention(
            q, k, v, layout="BNSD", backend=backend, **on(device, options)
        ),
        output_of(options),
        tensors(*LENGTHS[lengths], device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seen", ["full", "causal", "everything"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_it_matches_its_formula_in_every_dtype(device, backend, seen, dtype):
    assert_matches(
        lambda q, k, v: flash_attention(
            q, k, v, layout="BNSD", backend=backend, **on(device, SEEN[seen])
        ),
        output_of(SEEN[seen]),
        tensors(dtype=dtype, device=device),
    )


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_group_of_keys_serves_several_heads(device, backend, groups):
    assert_matches(
        lambda q, k, v: flash_attention(q, k, v, layout="BNSD", causal=True, backend=backend),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        tensors(9, 9, groups=groups, width=8, value_width=8, device=device),
    )


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


@pytest.mark.parametrize("seen", ["full", "causal", "window", "masked", "slopes in a window"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_sinks_take_part_in_the_softmax_and_learn(device, backend, lengths, seen):
    options = sized(SEEN[seen], *LENGTHS[lengths])
    assert_matches(
        lambda q, k, v, sinks: flash_attention(
            q, k, v, layout="BNSD", backend=backend, sinks=sinks, **on(device, options)
        ),
        output_of(options),
        [*tensors(*LENGTHS[lengths], device=device), random(4, seed=3, device=device)],
    )


@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_sinks_are_those_of_gpt_oss(device, backend):
    query, key, value = tensors(device=device)
    sinks = random(4, seed=3, device=device)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    future = torch.full((5, 5), float("-inf"), device=device).triu(1)
    expected, _ = eager_attention_forward(module, query, key, value, future, scaling=0.5)
    out = flash_attention(
        query, key, value, layout="BNSD", causal=True, sinks=sinks, scale=0.5, backend=backend
    )
    assert_near([out], [expected.transpose(1, 2)])


@pytest.mark.parametrize("seen", ["causal", "window", "everything", "square slopes"])
def test_the_reference_passes_gradcheck(seen):
    inputs = tensors(3, 5, batch=1, width=2, value_width=3, dtype=torch.float64)
    options = sized(SEEN[seen], 3, 5)
    options.update({k: v[:1] for k, v in options.items() if k == "mask"})
    sinks = random(4, dtype=torch.float64)
    for more in ([], [sinks]):
        assert torch.autograd.gradcheck(
            lambda q, k, v, *s: flash_attention(
                q, k, v, layout="BNSD", backend="reference", sinks=s[0] if s else None, **options
            ),
            [*inputs, *more],
        )


# What is hidden.


def weights_of(queries, keys, backend, device, **options):
    """Return the matrix of weights: what comes out when the values are a unit matrix."""
    query, key, _ = tensors(queries, keys, batch=1, heads=1, groups=1, width=keys, device=device)
    value = torch.eye(keys, device=device)[None, None]
    return flash_attention(query, key, value, layout="BNSD", backend=backend, **options)[0, 0]


@pytest.mark.parametrize("window", [1, 2, 7, 16, 20])
@pytest.mark.parametrize("queries", [1, 3, 16])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_window_is_that_of_hugging_face(device, backend, queries, window):
    keys = 16
    weights = weights_of(queries, keys, backend, device, causal=True, window=window)
    visible = masking_utils.sdpa_mask(
        batch_size=1,
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        mask_function=masking_utils.sliding_window_causal_mask_function(window),
        allow_is_causal_skip=False,
    )
    assert torch.equal(weights.cpu() > 0, visible[0, 0])


@pytest.mark.parametrize(
    "shape", [(), (5,), (5, 5), (4, 1, 1), (2, 1, 1, 5), (2, 4, 5, 5), (1, 4, 5, 1)]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_mask_of_any_shape_that_broadcasts_is_taken(device, backend, causal, shape):
    mask = (random(*shape, seed=7) < 0).detach()
    inputs = tensors(device=device)
    options = {"layout": "BNSD", "causal": causal, "backend": backend}
    out = flash_attention(*inputs, mask=mask.to(device), **options)
    full = mask.expand(2, 4, 5, 5)
    assert_near([out], output_of({"mask": full, "causal": causal})(*inputs)[None])


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_the_log_sum_exp_is_that_of_the_visible_scores(device, backend, lengths, seen):
    inputs = tensors(*LENGTHS[lengths], device=device)
    options = sized(SEEN[seen], *LENGTHS[lengths])
    out, lse = flash_attention(
        *inputs, layout="BNSD", return_lse=True, backend=backend, **on(device, options)
    )
    expected, expected_lse = formula(options)(*(t.detach().cpu().double() for t in inputs))
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    assert_near([out], [expected])
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("more", [{}, {"return_lse": True}, {"sinks": torch.ones(4)}])
@pytest.mark.parametrize(
    "hidden",
    [
        {"mask": torch.ones(5, 5).triu(-2).bool()},
        {"mask": torch.ones(5, 5).triu(-2).bool(), "causal": True},
        {"keys": 3, "causal": True},
    ],
)
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_a_query_without_keys_gives_zero_and_no_gradient(device, backend, hidden, more):
    blind = 2 if "keys" in hidden else 3
    inputs = tensors(keys=hidden.get("keys", 5), device=device)
    seen = {key: value for key, value in hidden.items() if key != "keys"}
    result = flash_attention(
        *inputs, layout="BNSD", backend=backend, **on(device, {**seen, **more})
    )
    out, *lse = result if isinstance(result, tuple) else (result,)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert not out[:, :, :blind].any()
    assert out[:, :, blind:].any(-1).all()
    assert not gradients[0][:, :, :blind].any()
    assert all(t.isfinite().all() for t in (out, *gradients))
    for logs in lse:
        assert torch.equal(
            logs == float("-inf"), (torch.arange(5) < blind).to(device).expand(2, 4, 5)
        )


# Layouts.


def to_layout(x, layout):
    """Return `(B, N, S, D)` as the layout has it, a view."""
    if layout == "BNSD":
        return x
    if layout == "TND":
        return x[0].transpose(0, 1)
    x = x.permute(2, 0, 1, 3) if layout[0] == "S" else x.transpose(1, 2)
    return x.reshape(*x.shape[:2], -1) if layout[-1] == "H" else x


def from_layout(x, layout, heads=4):
    if layout == "BNSD":
        return x
    if layout == "TND":
        return x.transpose(0, 1)[None]
    if layout[-1] == "H":
        x = x.reshape(*x.shape[:2], heads, -1)
    return x.permute(1, 2, 0, 3) if layout[0] == "S" else x.transpose(1, 2)


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=30, deadline=None)
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


# Dropout.


@pytest.mark.parametrize("seen", ["full", "causal", "window", "masked", "row slopes"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_dropped_weights_leave_the_mean_as_it_was(device, backend, seen):
    torch.manual_seed(0)
    options = {**on(device, SEEN[seen]), "layout": "BNSD", "dropout_p": 0.25, "backend": backend}
    query, key, _ = tensors(64, 64, device=device)
    if "mask" in options:
        options["mask"] = (random(2, 1, 64, 64, seed=3) < 0.2).to(device)
    out = flash_attention(query, key, torch.ones(2, 2, 64, 4, device=device), **options)
    assert out.std() > 0.05
    assert abs(float(out.mean()) - 1.0) < 0.05


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_dropped_weight_has_no_gradient(backend):
    torch.manual_seed(0)
    query, key, _ = tensors(8, 8, batch=1, heads=1, groups=1)
    value = torch.eye(8)[None, None].requires_grad_()
    out = flash_attention(query, key, value, layout="BNSD", dropout_p=0.5, backend=backend)
    (of_value,) = torch.autograd.grad(out[0, 0].diagonal().sum(), value)
    # The diagonal of the weights: where it was dropped, its value does not matter.
    assert torch.equal(of_value[0, 0].diagonal() == 0, out[0, 0].diagonal() == 0)
    assert (out == 0).any()
    assert (out != 0).any()


# Parts of the keys, as ring attention has them.


def merged(first, second):
    """Merge the outputs and log-sum-exps of two parts of the keys."""
    (out_1, lse_1), (out_2, lse_2) = first, second
    lse = torch.logaddexp(lse_1, lse_2)
    shares = [(part - lse).exp().nan_to_num()[..., None] for part in (lse_1, lse_2)]
    return shares[0] * out_1 + shares[1] * out_2, lse


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_halves_of_the_keys_merge_to_the_whole(device, backend, dtype, masked):
    query, key, value = inputs = tensors(8, 8, width=8, value_width=8, dtype=dtype, device=device)
    upstream = random(2, 4, 8, 8, seed=9, dtype=dtype, device=device).detach()
    seen = {}
    if masked:
        mask = random(2, 1, 8, 8, seed=5) < -0.3
        mask[0, 0, 2, :4] = mask[0, 0, 3, 4:] = mask[1, 0, 5] = True  # no key in a half, or at all
        seen = {"mask": mask.detach()}
    parts, options = (slice(0, 4), slice(4, 8)), {"layout": "BNSD", "backend": backend}
    options_of = [
        {**options, **{k: v[..., part].to(device) for k, v in seen.items()}} for part in parts
    ]
    with torch.no_grad():
        halves = [
            flash_attention(query, key[:, :, part], value[:, :, part], return_lse=True, **its)
            for part, its in zip(parts, options_of, strict=True)
        ]
    out, lse = merged(*halves)
    out = out.to(dtype)
    found = [
        flash_attention_backward(
            upstream, query, key[:, :, part], value[:, :, part], out, lse, **its
        )
        for part, its in zip(parts, options_of, strict=True)
    ]
    queries, keys, values = zip(*found, strict=True)
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    whole, whole_lse = formula(seen)(*wide)
    expected = torch.autograd.grad(whole, wide, upstream.cpu().double())
    torch.testing.assert_close(lse.cpu().double(), whole_lse.detach(), rtol=1e-4, atol=1e-4)
    assert_near(
        [out, sum(queries), torch.cat(keys, 2), torch.cat(values, 2)], [whole, *expected], dtype
    )


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("layout", [*LAYOUTS, "TND"])
@pytest.mark.parametrize(("device", "backend"), RUNS)
def test_the_gradients_of_a_part_have_its_layout(device, backend, layout, lengths):
    queries, keys = LENGTHS[lengths]
    width = {} if layout in ("SBH", "BSH") else {"value_width": 6}
    inputs = tensors(queries, keys, batch=1, **width, device=device)
    taken = [to_layout(t, layout).detach().contiguous().requires_grad_() for t in inputs]
    options = {"layout": layout, "causal": True, "backend": backend}
    if layout == "TND":
        options |= {"cu_seqlens_q": (0, 1, queries), "cu_seqlens_k": (0, 2, keys)}
    elif layout[-1] == "H":
        options["num_heads"] = 4
    out, lse = flash_attention(*taken, return_lse=True, **options)
    upstream = random(*out.shape, seed=9).detach().to(device)
    expected = torch.autograd.grad(out, taken, upstream)
    found = flash_attention_backward(upstream, *(t.detach() for t in (*taken, out, lse)), **options)
    assert_near(found, expected)


# Mistakes.


def attend(queries=(2, 4, 5, 8), keys=(2, 2, 5, 8), values=None, layout="BNSD", **options):
    shapes = (queries, keys, keys if values is None else values)
    return flash_attention(*(torch.ones(shape) for shape in shapes), layout=layout, **options)


ENDS = {"queries": (5, 4, 8), "keys": (5, 2, 8), "layout": "TND"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "NBSD"}, r"layout 'NBSD': must be one of SBND, SBH, BSH, BSND, BNSD, TND"),
        ({"queries": (2, 5, 8)}, r"query \(2, 5, 8\): must have the dimensions BNSD"),
        ({"keys": (2, 5, 16)}, r"key \(2, 5, 16\): must have the dimensions BNSD"),
        ({"keys": (2, 3, 5, 8)}, r"key \(2, 3, 5, 8\): its 3 heads must divide the 4 of the query"),
        ({"keys": (2, 0, 5, 8)}, r"its 0 heads must divide the 4"),
        ({"keys": (3, 2, 5, 8)}, r"key \(3, 2, 5, 8\): must have the batch of the query, 2"),
        (
            {"keys": (2, 2, 5, 6)},
            r"key \(2, 2, 5, 6\): must have the head dimension of the query, 8",
        ),
        (
            {"values": (2, 2, 4, 8)},
            r"value \(2, 2, 4, 8\): must have the batch, length and heads of the key",
        ),
        ({"values": (2, 4, 5, 8)}, r"must have the batch, length and heads of the key"),
        ({"num_heads": 4}, r"num_heads 4: layout BNSD says it: leave it out"),
        (
            {"layout": "SBH", "queries": (5, 2, 32), "keys": (5, 2, 16)},
            r"num_heads None: layout SBH needs the number of query heads",
        ),
        (
            {"layout": "BSH", "queries": (2, 5, 32), "keys": (2, 5, 16), "num_heads": 5},
            r"query \(2, 5, 32\): 32 channels must be a multiple of the heads, 5",
        ),
        (
            {"layout": "BSH", "queries": (2, 5, 32), "keys": (2, 5, 12), "num_heads": 4},
            r"key \(2, 5, 12\): 12 channels must be a multiple of the head dimension, 8",
        ),
        (
            {"layout": "SBH", "queries": (5, 2, 32), "keys": (5, 2, 24), "num_heads": 4},
            r"its 3 heads must divide the 4",
        ),
        ({"window": 3}, r"window 3: looks back from the query, so it needs causal=True"),
        ({"window": 0, "causal": True}, r"window 0: must be at least 1"),
        ({"mask": torch.ones(6).bool()}, r"mask \(6,\): must broadcast to .* = \(2, 4, 5, 5\)"),
        ({"mask": torch.ones(1, 2, 4, 5, 5).bool()}, r"mask \(1, 2, 4, 5, 5\): must broadcast"),
        ({"mask": torch.ones(5, device="meta").bool()}, "mask is on meta: must be on cpu"),
        ({**ENDS, "mask": torch.ones(5).bool()}, r"cu_seqlens_q None: layout TND needs the ends"),
        (
            {"cu_seqlens_q": (0, 5)},
            "cu_seqlens given: only layout TND has sequences, BNSD does not",
        ),
        (
            {**ENDS, "cu_seqlens_q": (0, 5), "cu_seqlens_k": (0, 5), "mask": torch.ones(5).bool()},
            r"mask \(5,\): layout TND has no batch for it",
        ),
        (
            {**ENDS, "cu_seqlens_q": (0, 4), "cu_seqlens_k": (0, 5)},
            r"cu_seqlens_q \(0, 4\): must start with 0 and end with all 5 tokens",
        ),
        (
            {**ENDS, "cu_seqlens_q": (2, 5), "cu_seqlens_k": (0, 5)},
            r"cu_seqlens_q \(2, 5\): must start with 0",
        ),
        ({**ENDS, "cu_seqlens_q": (0, 5), "cu_seqlens_k": ()}, r"cu_seqlens_k \(\): must start"),
        (
            {**ENDS, "cu_seqlens_q": (0, 3, 2, 5), "cu_seqlens_k": (0, 5)},
            r"cu_seqlens_q \(0, 3, 2, 5\): must not decrease",
        ),
        (
            {**ENDS, "cu_seqlens_q": (0, 3, 5), "cu_seqlens_k": (0, 5)},
            r"cu_seqlens_k \(0, 5\): must hold as many sequences as cu_seqlens_q \(0, 3, 5\)",
        ),
        ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes \(2,\): must be \(4,\), one for each"),
        ({"alibi_slopes": torch.ones(4), "alibi_form": "line"}, "alibi_form 'line': must be"),
        (
            {"alibi_slopes": torch.ones(4).requires_grad_()},
            "alibi_slopes requires grad: slopes are",
        ),
        ({"sinks": torch.ones(4, 1)}, r"sinks \(4, 1\): must be \(4,\)"),
        ({"sinks": torch.ones(4, device="meta")}, "sinks is on meta: must be on cpu"),
        ({"scale": 0.0}, "scale 0.0: must be positive and finite"),
        ({"scale": float("nan")}, "scale nan: must be positive"),
        ({"dropout_p": 1.0}, r"dropout_p 1.0: must be in \[0, 1\)"),
        ({"dropout_p": 0.5, "return_lse": True}, "return_lse True: cannot be combined"),
        ({"sinks": torch.ones(4), "return_lse": True}, "return_lse True: cannot be combined"),
        ({"backend": "npu"}, "backend='npu': the package torch_npu is not installed"),
    ],
)
def test_a_wrong_value_is_named_with_the_rule(options, message):
    with pytest.raises(ValueError, match=f"flash_attention: {message}|{message}"):
        attend(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": torch.ones(5)}, "mask is torch.float32: must be bool, True where hidden"),
        ({"sinks": torch.ones(4).half()}, "sinks is torch.float16: must be float32"),
        ({"alibi_slopes": torch.ones(4).int()}, "alibi_slopes is torch.int32: must be float32"),
        ({"window": 2.0, "causal": True}, "window is a float: must be an int"),
        (
            {**ENDS, "cu_seqlens_q": (0, 5.0), "cu_seqlens_k": (0, 5)},
            r"cu_seqlens_q \(0, 5.0\): must be one row of integers",
        ),
        (
            {**ENDS, "cu_seqlens_q": torch.tensor([[0, 5]]), "cu_seqlens_k": (0, 5)},
            "cu_seqlens_q .*: must be one row of integers",
        ),
    ],
)
def test_a_wrong_type_is_named_with_the_rule(options, message):
    with pytest.raises(TypeError, match=f"flash_attention: {message}"):
        attend(**options)


def test_tensors_of_different_kinds_are_refused():
    query, key, value = (t.detach() for t in tensors())
    with pytest.raises(TypeError, match="flash_attention: key is torch.float64: must be .*float32"):
        flash_attention(query, key.double(), value, layout="BNSD")
    with pytest.raises(TypeError, match="flash_attention: query is torch.int64: must be floating"):
        flash_attention(query.long(), key, value, layout="BNSD")
    with pytest.raises(TypeError, match="flash_attention: value is a list: must be a tensor"):
        flash_attention(query, key, [1.0], layout="BNSD")
    with pytest.raises(ValueError, match="flash_attention: value is on meta: must be on cpu"):
        flash_attention(query, key, value.to("meta"), layout="BNSD")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lse": torch.ones(2, 4, 4)}, ValueError, r"lse \(2, 4, 4\): must be \(2, 4, 5\)"),
        ({"lse": torch.ones(2, 4, 5).half()}, TypeError, "lse is torch.float16: must be float32"),
        (
            {"out": torch.ones(2, 4, 5, 5)},
            ValueError,
            r"out \(2, 4, 5, 5\): must be \(2, 4, 5, 4\)",
        ),
        ({"gradient": torch.ones(2, 4, 5, 4).half()}, TypeError, "gradient is torch.float16"),
    ],
)
def test_the_backward_pass_checks_what_it_is_given(change, error, message):
    query, key, value = (t.detach() for t in tensors())
    known = {"gradient": query, "out": query, "lse": torch.ones(2, 4, 5)} | change
    with pytest.raises(error, match=message):
        flash_attention_backward(query=query, key=key, value=value, **known, layout="BNSD")
