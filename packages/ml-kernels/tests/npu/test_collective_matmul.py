"""MC2: the fused products of several simulated NPUs, whose collectives are real ones of gloo.

Semantics are those of the operators' documentation, its restrictions as assertions. Each rank holds
its part of one layer, whose whole is computed in one process in float64.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from npu_ranks import communicator, run_ranks
from npu_simulator import fake, fake_npu, mutated, recorded_calls, semantics, simulated, to_cpu
from oracle import assert_near, random

import ml_kernels
from ml_kernels.dispatch import BackendUnavailableError

SEQUENCE, BATCH, WIDTH = 8, 2, 256

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

KERNELS = {
    "all_gather_matmul": ["npu_all_gather_base_mm"],
    "matmul_reduce_scatter": ["npu_mm_reduce_scatter_base", "npu_all_gather_base_mm"],
    "matmul_all_reduce": ["npu_mm_all_reduce_base"],
}


def documented_group(left, right, hcom, others):
    assert left.dtype == right.dtype
    assert left.dtype in (torch.bfloat16, torch.float16)
    assert left.is_contiguous(), "the left operand must not be transposed"
    assert right.is_contiguous() or right.t().is_contiguous()
    assert others.pop("bias") is None, "not supported yet"
    assert others.pop("comm_turn") == 0
    assert others.pop("reduce_op", "sum") == "sum"
    assert others.pop("comm_quant_mode", 0) == others.pop("antiquant_group_size", 0) == 0
    assert not any(value is not None for value in others.values())
    return communicator(hcom)


def documented_width(left, world_size, group):
    assert 256 <= left.shape[1] < 65535
    assert world_size == group.size()
    assert world_size in (2, 4, 8)


def product(left, right):
    return left.float() @ right.float()


@semantics("npu_all_gather_base_mm")
def all_gather_base_mm(input, x2, hcom, world_size, gather_index, gather_output, **others):
    group = documented_group(input, x2, hcom, others)
    documented_width(input, world_size, group)
    assert gather_index == 0, "1 is not supported"
    parts = [torch.empty_like(input) for _ in range(world_size)]
    dist.all_gather(parts, input, group=group)
    gathered = torch.cat(parts)
    kept = gathered if gather_output else torch.empty(0, dtype=input.dtype)
    return product(gathered, x2).to(input.dtype), kept


@semantics("npu_mm_reduce_scatter_base")
def mm_reduce_scatter_base(input, x2, hcom, world_size, **others):
    group = documented_group(input, x2, hcom, others)
    documented_width(input, world_size, group)
    assert len(input) % world_size == 0
    total = product(input, x2)
    dist.all_reduce(total, group=group)
    return total.chunk(world_size)[group.rank()].to(input.dtype)


@semantics("npu_mm_all_reduce_base")
def mm_all_reduce_base(x1, x2, hcom, **others):
    group = documented_group(x1, x2, hcom, others)
    assert group.size() in (1, 2, 4, 8)
    assert x1.numel()
    total = product(x1, x2)
    dist.all_reduce(total, group=group)
    return total.to(x1.dtype)


def whole_layer(ranks, dtype=torch.bfloat16):
    """Weights of a rank are square, so that a missing transpose still multiplies."""
    x = random(SEQUENCE, BATCH, WIDTH * ranks, dtype=dtype)
    weight = random(WIDTH * ranks, WIDTH * ranks, dtype=dtype, seed=1)
    upstream = random(SEQUENCE, BATCH, WIDTH * ranks, dtype=dtype, seed=2)
    return x.detach(), weight.detach(), upstream.detach()


def cut(tensor, dim, rank, ranks):
    return tensor if dim is None else tensor.chunk(ranks, dim)[rank]


def layer_of(operator, ranks, dtype=torch.bfloat16):
    """Cut a layer so that the inner width is `WIDTH` on a rank, as the kernels want it."""
    x, weight, upstream = whole_layer(ranks, dtype)
    if operator != "all_gather_matmul":
        return x, weight[:WIDTH], upstream[..., :WIDTH]
    return x[..., :WIDTH], weight[:, :WIDTH], upstream


def in_one_process(operator, ranks, dtype=torch.bfloat16):
    x, weight, upstream = (t.double() for t in layer_of(operator, ranks, dtype))
    of_x, of_weight, of_out = CUTS[operator]
    whole = (
        (torch.einsum("sbi,oi->sbo", x, weight), of_out),
        (torch.einsum("sbo,oi->sbi", upstream, weight), of_x),
        (torch.einsum("sbo,sbi->oi", upstream, x), of_weight),
    )
    return [[cut(t, dim, rank, ranks) for t, dim in whole] for rank in range(ranks)]


def on_a_rank(operator, group, dtype=torch.bfloat16, strided=False):
    rank, ranks = group.rank(), group.size()
    given = zip(layer_of(operator, ranks, dtype), CUTS[operator], strict=True)
    x, weight, upstream = (cut(t, dim, rank, ranks) for t, dim in given)
    if strided:
        x, weight, upstream = (
            t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, weight, upstream)
        )
    x, weight = simulated(x, requires_grad=True), simulated(weight, requires_grad=True)
    with recorded_calls() as calls:
        out = OPERATORS[operator](x, weight, group)
        out.backward(simulated(upstream))
    assert [name for name, _ in calls] == KERNELS[operator]
    return [to_cpu(t).contiguous() for t in (out, x.grad, weight.grad)]


def every_layer(group):
    return {
        (name, dtype, strided): on_a_rank(name, group, dtype, strided)
        for name in OPERATORS
        for dtype in (torch.bfloat16, torch.float16)
        for strided in (False, True)
    }


def layers_of_pairs():
    """On four ranks: their numbers in the world and in the group differ."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return {name: on_a_rank(name, pairs[dist.get_rank() % 2]) for name in OPERATORS}


def refusals_of_three_ranks():
    group = dist.new_group([0, 1, 2])
    x = simulated(torch.zeros(3, 256, dtype=torch.bfloat16))
    return [] if dist.get_rank() == 3 else [refused(name, x, x, group) for name in OPERATORS]


def layers_alone():
    group = [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]
    results = {}
    for name, operator in OPERATORS.items():
        given = [simulated(t, requires_grad=True) for t in small_layer()]
        with recorded_calls() as calls:
            out = operator(*given, group)
            out.sum().backward()
        results[name] = [to_cpu(out), *(to_cpu(t.grad) for t in given)]
        assert calls == []
    return results


def small_layer():
    return random(4, 3, 5), random(7, 5, seed=1)


def refused(name, x, weight, group):
    try:
        OPERATORS[name](x, weight, group)
    except BackendUnavailableError as error:
        return str(error)
    return "accepted"


WRONG = [
    (
        "all_gather_matmul",
        "npu_all_gather_base_mm",
        {
            "missing transpose": lambda given: {"x2": given["x2"].t()},
            "wrong gather_index": lambda _: {"gather_index": 1},
            "transposed x": lambda given: {"input": given["input"].t().contiguous().t()},
            "wrong world_size": lambda given: {"world_size": 2 * given["world_size"]},
        },
    ),
    (
        "matmul_reduce_scatter",
        "npu_mm_reduce_scatter_base",
        {
            "missing transpose": lambda given: {"x2": given["x2"].t()},
            "rows of another rank": lambda given: {"input": given["input"].flip(0)},
            "wrong reduction": lambda _: {"reduce_op": "max"},
        },
    ),
    (
        "matmul_reduce_scatter",
        "npu_all_gather_base_mm",
        {
            "transposed in the backward": lambda given: {"x2": given["x2"].t()},
            "gathered gradient not kept": lambda _: {"gather_output": False},
        },
    ),
    (
        "matmul_all_reduce",
        "npu_mm_all_reduce_base",
        {
            "missing transpose": lambda given: {"x2": given["x2"].t()},
            "other rows": lambda given: {"x1": given["x1"].flip(0)},
        },
    ),
]


def wrong_calls(group):
    """Name the wrong calls that go unnoticed. All ranks fail alike, or they would hang."""
    unnoticed = []
    for operator, kernel, changes in WRONG:
        for name, change in changes.items():
            try:
                with mutated(kernel, change):
                    found = on_a_rank(operator, group)
                assert_near(found, in_one_process(operator, group.size())[group.rank()])
            except (AssertionError, RuntimeError):
                continue
            unnoticed.append(f"{operator}: {kernel}: {name}")
    return unnoticed


def refusals(group):
    half = torch.bfloat16
    x, weight = (simulated(torch.zeros(8, 256, dtype=half)) for _ in range(2))
    narrow = simulated(torch.zeros(8, 255, dtype=half))
    return [
        refused("all_gather_matmul", x.float(), weight.float(), group),
        refused("all_gather_matmul", narrow, narrow, group),
        refused("matmul_reduce_scatter", narrow, narrow, group),
        refused("matmul_reduce_scatter", x, weight, group),
        refused("matmul_reduce_scatter", x, weight.requires_grad_(), group),
        refused("matmul_all_reduce", x.float(), weight.float(), group),
    ]


def empty_layers(group):
    x, weight = simulated(torch.zeros(0, 3, 256)), simulated(torch.zeros(5, 256))
    with recorded_calls() as calls:
        shapes = [tuple(operator(x, weight, group).shape) for operator in OPERATORS.values()]
    return shapes, len(calls)


def fake_layers(group):
    """Call the real schemas and meta kernels; return shape, dtype and device of the result."""
    results = {}
    for operator in OPERATORS:
        given = zip(layer_of(operator, group.size()), CUTS[operator], strict=True)
        x, weight, _ = (cut(t, dim, group.rank(), group.size()) for t, dim in given)
        with fake_npu():
            out = OPERATORS[operator](
                fake(*x.shape, dtype=x.dtype), fake(*weight.shape, dtype=x.dtype), group
            )
        results[operator] = (tuple(out.shape), out.dtype, out.device.type)
    return results


def on_two():
    group = dist.group.WORLD
    return {
        "layers": every_layer(group),
        "alone": layers_alone(),
        "wrong calls": wrong_calls(group),
        "refusals": refusals(group),
        "empty": empty_layers(group),
        "fake": fake_layers(group),
    }


def on_four():
    return {
        "layers": every_layer(dist.group.WORLD),
        "pairs": layers_of_pairs(),
        "refusals of three": refusals_of_three_ranks(),
    }


@functools.cache
def results_on(ranks):
    """Run everything in one go: a start of torch_npu takes seconds."""
    return run_ranks({2: on_two, 4: on_four}[ranks], ranks)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_ranks_together_compute_the_whole_layer(operator, ranks, dtype, strided):
    expected = in_one_process(operator, ranks, dtype)
    for rank, results in enumerate(results_on(ranks)):
        found = results["layers"][operator, dtype, strided]
        assert [t.dtype for t in found] == [dtype] * 3
        assert_near(found, expected[rank])


def test_a_group_may_be_some_of_the_ranks():
    for rank, results in enumerate(results_on(4)):
        for operator, found in results["pairs"].items():
            assert_near(found, in_one_process(operator, 2)[rank // 2])


def test_a_group_of_one_multiplies_without_a_kernel():
    x, weight = small_layer()
    out = x @ weight.t()
    expected = [out, *torch.autograd.grad(out.sum(), [x, weight])]
    for results in results_on(2):
        for found in results["alone"].values():
            assert_near(found, expected)


def test_three_ranks_are_refused():
    for results in results_on(4)[:3]:
        for operator, message in zip(OPERATORS, results["refusals of three"], strict=True):
            assert f"{operator}: group of 3: an NPU takes 1, 2, 4 or 8 ranks" in message


def test_wrong_calls_are_noticed():
    for results in results_on(2):
        assert results["wrong calls"] == []


def test_calls_fit_the_real_schemas():
    for rank, results in enumerate(results_on(2)):
        for operator, (shape, dtype, device) in results["fake"].items():
            expected, _, _ = in_one_process(operator, 2)[rank]
            assert (shape, dtype, device) == (tuple(expected.shape), torch.bfloat16, "npu")


def test_layers_without_rows_call_no_kernel():
    for shapes, calls in (results["empty"] for results in results_on(2)):
        assert shapes == [(0, 3, 5)] * 3
        assert calls == 0


def test_what_the_kernels_do_not_document_is_refused():
    for results in results_on(2):
        gather, narrow, narrow_scatter, inference, training, reduction = results["refusals"]
        assert "all_gather_matmul: x is torch.float32: an NPU takes bfloat16 and float16" in gather
        assert "x (8, 255): on an NPU the inner width must be in [256, 65535), is 255" in narrow
        assert narrow_scatter.startswith("matmul_reduce_scatter: x (8, 255): ")
        assert inference == "accepted"
        assert "weight (8, 256): on an NPU the outer width (for gradients) must" in training
        assert "matmul_all_reduce: x is torch.float32" in reduction
