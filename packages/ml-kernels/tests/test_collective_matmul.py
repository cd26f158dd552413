"""Products joined with collectives: ranks on gloo against the whole layer in one process."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import RankFailedError, run_ranks
from oracle import ROUNDING, assert_near, kept_by, random
from torch.utils._python_dispatch import TorchDispatchMode

import ml_kernels
from ml_kernels import collective_matmul, overlapped
from ml_kernels.dispatch import implementation

SEQUENCE, BATCH, INNER, OUTER = 8, 3, 12, 20

OPERATORS = {
    "all_gather_matmul": ml_kernels.all_gather_matmul,
    "matmul_reduce_scatter": ml_kernels.matmul_reduce_scatter,
    "matmul_all_reduce": ml_kernels.matmul_all_reduce,
}

CUTS = {  # dimensions that are cut over the ranks: of x, of the weight, of the result
    "all_gather_matmul": (0, 0, 2),
    "matmul_reduce_scatter": (2, 1, 0),
    "matmul_all_reduce": (2, 1, None),
}


def whole_layer(dtype=torch.float32, sequence=SEQUENCE, batch=BATCH):
    x = random(sequence, batch, INNER, dtype=dtype)
    weight = random(OUTER, INNER, dtype=dtype, seed=1)
    upstream = random(sequence, batch, OUTER, dtype=dtype, seed=2)
    return x.detach(), weight.detach(), upstream.detach()


def cut(tensor, dim, rank, ranks):
    return tensor if dim is None else tensor.chunk(ranks, dim)[rank]


def in_one_process(operator, ranks, dtype, **shape):
    """Return what each rank should have: output, gradients of x and weight, in float64."""
    x, weight, upstream = (t.double() for t in whole_layer(dtype, **shape))
    of_x, of_weight, of_out = CUTS[operator]
    out = torch.einsum("sbi,oi->sbo", x, weight)
    gradients = (
        torch.einsum("sbo,oi->sbi", upstream, weight),
        torch.einsum("sbo,sbi->oi", upstream, x),
    )
    return [
        [
            cut(out, of_out, rank, ranks),
            cut(gradients[0], of_x, rank, ranks),
            cut(gradients[1], of_weight, rank, ranks),
        ]
        for rank in range(ranks)
    ]


def on_a_rank(operator, dtype, backend, group=None, frozen=(), **shape):
    group = group or dist.group.WORLD
    rank, ranks = group.rank(), group.size()
    of_x, of_weight, of_out = CUTS[operator]
    x, weight, upstream = whole_layer(dtype, **shape)
    x = cut(x, of_x, rank, ranks).requires_grad_("x" not in frozen)
    weight = cut(weight, of_weight, rank, ranks).requires_grad_("weight" not in frozen)
    out = OPERATORS[operator](x, weight, group, backend=backend)
    out.backward(cut(upstream, of_out, rank, ranks))
    return [out.detach(), x.grad, weight.grad]


def on_a_rank_in_every_way():
    return {
        way: on_a_rank(way[0], way[2], way[1])
        for way in itertools.product(OPERATORS, ("reference", "cpu"), ROUNDING)
    }


@functools.cache
def on_ranks(ranks):
    return run_ranks(on_a_rank_in_every_way, ranks)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_ranks_together_compute_the_whole_layer(operator, backend, ranks, dtype):
    expected = in_one_process(operator, ranks, dtype)
    for rank, results in enumerate(on_ranks(ranks)):
        found = results[operator, backend, dtype]
        assert [t.dtype for t in found] == [dtype] * 3
        assert_near(found, expected[rank], dtype)


def everything_about_a_pair():
    """Run on 4 ranks: two groups of two, whose ranks are not those of the world."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = groups[dist.get_rank() % 2]
    return [
        on_a_rank(operator, torch.float64, backend, group=group)
        for operator in OPERATORS
        for backend in ("reference", "cpu")
    ]


def test_a_group_may_be_some_of_the_ranks():
    results = run_ranks(everything_about_a_pair, 4)
    for rank, found in enumerate(results):
        expected = [
            in_one_process(operator, 2, torch.float64)[rank // 2]
            for operator in OPERATORS
            for _ in range(2)
        ]
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)


def everything_alone():
    return [
        on_a_rank(operator, torch.float64, backend)
        for operator in OPERATORS
        for backend in ("reference", "cpu")
    ]


def test_a_group_of_one_multiplies():
    (found,) = run_ranks(everything_alone, 1)
    whole = in_one_process("matmul_all_reduce", 1, torch.float64)[0]
    for result in found:
        assert_near(result, whole)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_backward_of_all_gather_matmul_equals_the_plain_sequence_bit_for_bit(dtype):
    for results in on_ranks(4):
        plain, ours = (results["all_gather_matmul", b, dtype] for b in ("reference", "cpu"))
        assert torch.equal(plain[1], ours[1])
        assert torch.equal(plain[2], ours[2])


def with_one_input_frozen():
    return {
        (operator, backend, frozen): on_a_rank(operator, torch.float64, backend, frozen=(frozen,))
        for operator in OPERATORS
        for backend in ("reference", "cpu")
        for frozen in ("x", "weight")
    }


def test_a_frozen_input_has_no_gradient_and_the_other_the_same():
    for rank, found in enumerate(run_ranks(with_one_input_frozen, 2)):
        for (operator, _, frozen), (out, *gradients) in found.items():
            expected = in_one_process(operator, 2, torch.float64)[rank]
            missing = 0 if frozen == "x" else 1
            assert gradients[missing] is None
            assert_near([out, gradients[1 - missing]], [expected[0], expected[2 - missing]])


def of_rank(operator, **dtypes):
    """Return x and the weight of this rank, leaves."""
    x, weight, _ = whole_layer()
    cuts = zip(("x", "weight"), (x, weight), CUTS[operator][:2], strict=True)
    return [
        cut(t, dim, dist.get_rank(), dist.get_world_size()).to(dtypes.get(name)).requires_grad_()
        for name, t, dim in cuts
    ]


AUTOCAST = {
    "float32": {},
    "bfloat16 activations": {"x": torch.bfloat16},
    "float64": {"x": torch.float64, "weight": torch.float64},
}


def under_autocast():
    results = {}
    for operator, backend, case in itertools.product(OPERATORS, ("reference", "cpu"), AUTOCAST):
        x, weight = of_rank(operator, **AUTOCAST[case])
        with torch.autocast("cpu", torch.bfloat16):
            out = OPERATORS[operator](x, weight, dist.group.WORLD, backend=backend)
        _, _, upstream = whole_layer()
        part = cut(upstream, CUTS[operator][2], dist.get_rank(), dist.get_world_size())
        out.backward(part.to(out.dtype))
        results[operator, backend, case] = [out.detach(), x.grad, weight.grad]
    return results


@pytest.mark.parametrize("ranks", [1, 2])
def test_autocast_is_followed_as_by_the_linear_layer(ranks):
    for rank, found in enumerate(run_ranks(under_autocast, ranks)):
        for (operator, _, case), results in found.items():
            given = AUTOCAST[case]
            inner = torch.float64 if case == "float64" else torch.bfloat16
            expected = [inner, *(given.get(name, torch.float32) for name in ("x", "weight"))]
            assert [t.dtype for t in results] == expected
            whole = in_one_process(operator, ranks, torch.float32)[rank]
            assert_near(results, whole, inner)


def changed_in_place():
    results = {}
    for operator, backend in itertools.product(OPERATORS, ("reference", "cpu")):
        x, weight = of_rank(operator)
        out = OPERATORS[operator](x, weight, dist.group.WORLD, backend=backend)
        out += 1
        out.sum().backward()
        results[operator, backend] = out.detach() - 1
    return results


def test_results_may_be_changed_in_place():
    for rank, found in enumerate(run_ranks(changed_in_place, 2)):
        for (operator, _), out in found.items():
            assert_near([out], in_one_process(operator, 2, torch.float32)[rank][:1])


def kept_with_a_frozen_weight():
    """Return whether the weight, and it alone, is kept for the backward pass."""
    found = {}
    for operator in OPERATORS:
        x, weight = of_rank(operator)
        weight, group = weight.detach(), dist.group.WORLD
        kept = kept_by(OPERATORS[operator], x, weight, group, backend="cpu")
        found[operator] = kept == [weight.data_ptr()]
    return found


def test_a_frozen_weight_keeps_no_activations():
    for found in run_ranks(kept_with_a_frozen_weight, 2):
        assert found == dict.fromkeys(OPERATORS, True)


SHAPES = {"no_sequence": {"sequence": 0}, "no_batch": {"batch": 0}, "short": {"sequence": 2}}


def other_shapes():
    results = {
        (operator, backend, case): on_a_rank(operator, torch.float64, backend, **SHAPES[case])
        for operator in OPERATORS
        for backend in ("reference", "cpu")
        for case in SHAPES
    }
    x, weight, _ = whole_layer(torch.float64)
    for backend in ("reference", "cpu"):
        # Neither contiguous nor of three dimensions.
        part = x[:, 0].chunk(2)[dist.get_rank()].t().contiguous().t()
        columns = weight.t().contiguous().t()
        results["columns", backend] = ml_kernels.all_gather_matmul(
            part, columns, dist.group.WORLD, backend=backend
        )
    return results


def test_empty_short_and_strided_inputs_work():
    for rank, found in enumerate(run_ranks(other_shapes, 2)):
        for backend in ("reference", "cpu"):
            x, weight, _ = whole_layer(torch.float64)
            assert_near([found.pop(("columns", backend))], [x[:, 0] @ weight.t()])
        for (operator, _, case), result in found.items():
            expected = in_one_process(operator, 2, torch.float64, **SHAPES[case])[rank]
            assert [t.shape for t in result] == [t.shape for t in expected]
            assert_near(result, expected)


class _TellAfterProducts(TorchDispatchMode):
    """Sets a key of a store when so many products have been made."""

    def __init__(self, store, wanted):
        super().__init__()
        self.store, self.wanted, self.made = store, wanted, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket is torch.ops.aten.mm:
            self.made += 1
            if self.made == self.wanted:
                self.store.set("products", "made")
        return out


def compute_before_the_other_rank_comes(operator, backend, products, path):
    """Let rank 1 take part only when rank 0 has made so many products: a deadlock if it waits."""
    store = dist.FileStore(path, 2)
    x, weight, _ = whole_layer()
    of_x, of_weight, _ = CUTS[operator]
    x, weight = cut(x, of_x, dist.get_rank(), 2), cut(weight, of_weight, dist.get_rank(), 2)
    if dist.get_rank() == 1:
        store.wait(["products"])
        return OPERATORS[operator](x, weight, dist.group.WORLD, backend=backend)
    with _TellAfterProducts(store, products):
        return OPERATORS[operator](x, weight, dist.group.WORLD, backend=backend)


@pytest.mark.parametrize(
    ("operator", "products"),
    [("all_gather_matmul", 1), ("matmul_reduce_scatter", 2), ("matmul_all_reduce", 4)],
)
def test_products_are_made_while_parts_travel(operator, products, tmp_path):
    path = str(tmp_path / "store")
    results = run_ranks(compute_before_the_other_rank_comes, 2, operator, "cpu", products, path)
    expected = in_one_process(operator, 2, torch.float32)
    for rank in range(2):
        assert_near([results[rank]], [expected[rank][0]])


def test_the_plain_sequence_makes_no_product_before_the_gather(tmp_path):
    """That the test above can fail."""
    with pytest.raises(RankFailedError, match="not done in 3"):
        run_ranks(
            compute_before_the_other_rank_comes,
            2,
            "all_gather_matmul",
            "reference",
            1,
            str(tmp_path / "store"),
            timeout=3.0,
        )


def refusals():
    dist.barrier()  # a rank that is gone before the others have connected fails them
    messages = []
    for x, weight, group in (
        (torch.zeros(3, 4, 6), torch.zeros(5, 6), dist.group.WORLD),
        (torch.zeros(4, 4, 6), torch.zeros(5, 6), dist.GroupMember.NON_GROUP_MEMBER),
    ):
        try:
            ml_kernels.matmul_reduce_scatter(x, weight, group)
        except (ValueError, TypeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_a_sequence_that_the_ranks_do_not_divide_and_strangers_are_refused():
    for uneven, stranger in run_ranks(refusals, 2):
        assert uneven == (
            "ValueError: matmul_reduce_scatter: x (3, 4, 6): the sequence, 3, must be divisible by "
            "the ranks of the group, 2"
        )
        assert stranger.startswith("TypeError: matmul_reduce_scatter: group is")
        assert stranger.endswith("must be a ProcessGroup that this process belongs to")


@pytest.mark.parametrize("operator", OPERATORS)
def test_shapes_and_dtypes_that_do_not_fit_are_refused(operator):
    function, x, weight = OPERATORS[operator], torch.zeros(4, 2, 6), torch.zeros(5, 6)
    with pytest.raises(TypeError, match=rf"{operator}: group is None: must be a ProcessGroup"):
        function(x, weight, None)
    with pytest.raises(ValueError, match=rf"{operator}: weight \(6, 5\): must be \(outer width, 6"):
        function(x, weight.t(), None)
    with pytest.raises(ValueError, match=rf"{operator}: x \(6,\): must be \(sequence"):
        function(x[0, 0], weight, None)
    with pytest.raises(TypeError, match=rf"{operator}: weight is torch\.float64: must be"):
        function(x, weight.double(), None)
    with pytest.raises(TypeError, match=rf"{operator}: x is torch\.int64: must be floating"):
        function(x.long(), weight, None)
    with pytest.raises(ValueError, match=rf"{operator}: weight is on meta: must be on cpu"):
        function(x, weight.to("meta"), None)


def test_the_table_names_the_overlapped_versions_for_cpu_and_cuda():
    for operator in OPERATORS:
        assert implementation(operator, torch.zeros(1)) is getattr(overlapped, operator)
        reference = getattr(collective_matmul, f"{operator}_reference")
        assert implementation(operator, torch.zeros(1), "reference") is reference
