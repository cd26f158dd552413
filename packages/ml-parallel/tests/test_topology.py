"""The parallel flags check themselves, and the groups are those that megatron-core builds."""

import dataclasses
import subprocess
import sys
from contextlib import contextmanager

import pytest

from ml_parallel import platform
from ml_parallel.topology import Topology, groups


def topology(tp=1, pp=1, cp=1, ep=1, instances=1, **others):
    return Topology(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        num_distributed_optimizer_instances=instances,
        use_distributed_optimizer=instances > 1,
        **others,
    )


# Groups against megatron-core

# megatron-core's name of each kind; "inter-dp-cp" has none, it asks "inter-expert-dp" instead.
MEGATRON = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp-cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tp-dp",
    "MODEL_PARALLEL_GROUP": "tp-pp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp-cp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp-dp-cp",
    "EMBEDDING_GROUP": "embedding",
    "POSITION_EMBEDDING_GROUP": "position-embedding",
    "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": "intra-dp-cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "tp-ep",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "tp-ep-pp",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert-tp",
    "EXPERT_DATA_PARALLEL_GROUP": "expert-dp",
    "HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_L0": "intra-expert-dp",
    "HIERARCHICAL_EXPERT_DATA_PARALLEL_GROUP_L1": "inter-expert-dp",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer-instance",
}
GETTERS = {
    "tp": lambda state: state.get_tensor_model_parallel_group(),
    "cp": lambda state: state.get_context_parallel_group(),
    "dp": lambda state: state.get_data_parallel_group(),
    "pp": lambda state: state.get_pipeline_model_parallel_group(),
    "tp-pp": lambda state: state.get_model_parallel_group(),
    "dp-cp": lambda state: state.get_data_parallel_group(with_context_parallel=True),
    "intra-dp-cp": lambda state: state.get_data_parallel_group(
        with_context_parallel=True, partial_data_parallel=True
    ),
    "ep": lambda state: state.get_expert_model_parallel_group(),
    "expert-dp": lambda state: state.get_expert_data_parallel_group(),
    "intra-expert-dp": lambda state: state.get_expert_data_parallel_group(
        partial_expert_data_parallel=True
    ),
    "optimizer-instance": lambda state: state.get_intra_distributed_optimizer_instance_group(),
}
RANKS = {
    "tp_rank": lambda state: state.get_tensor_model_parallel_rank(),
    "cp_rank": lambda state: state.get_context_parallel_rank(),
    "dp_rank": lambda state: state.get_data_parallel_rank(),
    "pp_rank": lambda state: state.get_pipeline_model_parallel_rank(),
    "ep_rank": lambda state: state.get_expert_model_parallel_rank(),
    "expert_dp_rank": lambda state: state.get_expert_data_parallel_rank(),
}


@pytest.fixture(scope="module")
def state():
    platform.import_engine()
    from megatron.core import parallel_state

    return parallel_state


@contextmanager
def megatron(state, layout, world_size, rank):
    """Let megatron-core build its groups as one rank of a job without other processes."""
    import torch.distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    built, create_group = {}, state.create_group

    def noting_create_group(ranks=None, **options):
        built.setdefault(MEGATRON[options["group_desc"]], []).append(sorted(ranks))
        return create_group(ranks, **options)

    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "num_distributed_optimizer_instances",
    )
    sizes = {name: getattr(layout, name) for name in names}
    torch.distributed.init_process_group(
        "fake", rank=rank, world_size=world_size, store=FakeStore()
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, "create_group", noting_create_group)
            state.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
        yield built
    finally:
        state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


SMALL = [
    (1, {}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (2, {}),
    (2, {"instances": 2}),
    (4, {"tp": 2, "pp": 2}),
    (8, {"tp": 2, "pp": 2}),
    (8, {"tp": 2, "cp": 2, "pp": 2}),
    (8, {"tp": 2, "instances": 2}),
    (8, {"ep": 2, "instances": 2}),
    (8, {"cp": 4, "instances": 4}),
    (8, {"cp": 2, "ep": 4}),
    (12, {"tp": 3, "pp": 2}),
    (16, {"tp": 2, "pp": 2, "cp": 2, "ep": 2, "instances": 2}),
    (24, {"tp": 2, "pp": 3, "ep": 2, "instances": 2}),
    (32, {"tp": 2, "pp": 2, "cp": 2, "ep": 4, "instances": 2}),
]
LARGE = [
    (256, {"tp": 8, "pp": 4, "cp": 2, "ep": 4, "instances": 2}),
    (1024, {"tp": 8, "pp": 8}),
    (3072, {"tp": 8, "pp": 12, "cp": 4, "ep": 16, "instances": 2}),
    (7968, {"tp": 8, "pp": 12}),
    (7968, {"tp": 8, "pp": 3, "cp": 2, "ep": 2, "instances": 83}),
    (7968, {"instances": 2}),
]


@pytest.mark.parametrize(("world_size", "sizes"), SMALL + LARGE, ids=str)
def test_every_group_is_the_one_megatron_builds(state, world_size, sizes):
    layout = topology(**sizes)
    ours = groups(layout, world_size)
    with megatron(state, layout, world_size, world_size // 2) as built:
        for kind, theirs in built.items():
            assert ours[kind] == theirs, kind
    without_group = {"inter-dp-cp"}
    if layout.num_distributed_optimizer_instances == 1:
        without_group |= {"intra-dp-cp", "intra-expert-dp", "inter-expert-dp"}
    assert set(ours) - set(built) == without_group


@pytest.mark.parametrize(("world_size", "sizes"), SMALL + LARGE[:1] + LARGE[3:5], ids=str)
def test_every_rank_finds_itself_where_megatron_puts_it(state, world_size, sizes):
    from torch.distributed import get_process_group_ranks

    layout = topology(**sizes)
    ours = groups(layout, world_size)
    for rank in range(world_size) if world_size < 100 else (0, 101, world_size - 1):
        with megatron(state, layout, world_size, rank):
            place = layout.coordinates(rank, world_size)
            assert place._asdict() == {name: ask(state) for name, ask in RANKS.items()}
            for kind, ask in GETTERS.items():
                (mine,) = (group for group in ours[kind] if rank in group)
                assert mine == get_process_group_ranks(ask(state)), kind


def test_partners_stand_at_the_same_place_of_different_instances():
    ours = groups(topology(tp=2, cp=2, pp=2, instances=2), 32)
    assert ours["inter-dp-cp"] == ours["inter-expert-dp"]
    place = {rank: half.index(rank) for half in ours["intra-dp-cp"] for rank in half}
    assert sorted(place) == list(range(32))
    for first, second in ours["inter-dp-cp"]:
        assert place[first] == place[second]
        assert not any({first, second} <= set(ranks) for ranks in ours["optimizer-instance"])


# Sizes


def test_a_topology_of_defaults_is_one_copy_per_rank():
    assert Topology().data_parallel_size(4) == 4
    assert topology(tp=2, pp=2, cp=3).data_parallel_size(24) == 2
    assert topology(tp=2, pp=2, cp=3).model_parallel_size == 12
    Topology().validate(1)


def test_an_interleaved_pipeline_overlaps_its_messages():
    assert topology(pp=2, num_layers_per_virtual_pipeline_stage=1).overlap_p2p_comm
    assert not topology(pp=2).overlap_p2p_comm


def test_sequence_parallel_is_dropped_without_tensor_parallel_and_says_so(caplog):
    assert Topology(sequence_parallel=True).sequence_parallel is False
    assert "--sequence-parallel has no effect" in caplog.text
    caplog.clear()
    assert topology(tp=2, sequence_parallel=True).sequence_parallel is True
    assert caplog.text == ""


def test_mc2_goes_with_sequence_parallel_only(caplog):
    assert topology(tp=2, sequence_parallel=True, use_mc2=True).use_mc2 is True
    assert Topology(sequence_parallel=True, use_mc2=True).use_mc2 is False
    assert "--sequence-parallel has no effect" in caplog.text
    with pytest.raises(ValueError, match="--use-mc2: needs --sequence-parallel"):
        topology(tp=2, use_mc2=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp": 0}, "--tensor-model-parallel-size 0: must be at least 1"),
        ({"pp": -1}, "--pipeline-model-parallel-size -1: must be at least 1"),
        ({"cp": 0}, "--context-parallel-size 0: must be at least 1"),
        ({"ep": 0}, "--expert-model-parallel-size 0: must be at least 1"),
        ({"instances": 0}, "--num-distributed-optimizer-instances 0: must be at least 1"),
        (
            {"pp": 2, "num_layers_per_virtual_pipeline_stage": 0},
            "--num-layers-per-virtual-pipeline-stage 0: must be at least 1",
        ),
        (
            {"num_layers_per_virtual_pipeline_stage": 2},
            "--num-layers-per-virtual-pipeline-stage 2: needs at least 2 pipeline stages, "
            "not --pipeline-model-parallel-size 1",
        ),
        (
            {"num_layer_list": (4,)},
            "--num-layer-list 4: needs at least 2 pipeline stages, "
            "not --pipeline-model-parallel-size 1",
        ),
        (
            {"pp": 2, "num_layer_list": (4, 4, 4)},
            "--num-layer-list 4,4,4: must have one number for each stage of "
            "--pipeline-model-parallel-size 2, not 3",
        ),
        (
            {"pp": 2, "num_layer_list": (4, 0)},
            "--num-layer-list 4,0: every stage must have at least 1 layer",
        ),
        (
            {"pp": 2, "num_layer_list": (4, 4), "num_layers_per_virtual_pipeline_stage": 2},
            "--num-layer-list 4,4: cannot be combined with --num-layers-per-virtual-pipeline-stage",
        ),
        (
            {"instances": 2, "overlap_grad_reduce": True},
            "--num-distributed-optimizer-instances 2: cannot be combined with "
            "--overlap-grad-reduce, which gives wrong gradients there in megatron-core 0.16",
        ),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True},
            "--overlap-param-gather: needs --use-distributed-optimizer and --overlap-grad-reduce",
        ),
    ],
)
def test_an_impossible_topology_is_refused(fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - compared in full
        topology(**fields)
    assert str(error.value) == message


def test_instances_need_the_distributed_optimizer():
    with pytest.raises(ValueError, match="instances 2: needs --use-distributed-optimizer"):
        Topology(num_distributed_optimizer_instances=2)
    with pytest.raises(ValueError, match="--overlap-param-gather: needs"):
        Topology(overlap_param_gather=True, use_distributed_optimizer=True)


@pytest.mark.parametrize(
    ("sizes", "world_size", "message"),
    [
        (
            {"tp": 3},
            8,
            "--tensor-model-parallel-size 3: must divide the number of ranks, 8 "
            "(nearest: 6 or 9 ranks; --tensor-model-parallel-size 2 or 4)",
        ),
        (
            {"tp": 2, "pp": 3},
            8,
            "--tensor-model-parallel-size 2 * --pipeline-model-parallel-size 3 = 6: must divide "
            "the number of ranks, 8 "
            "(nearest: 6 or 12 ranks; --pipeline-model-parallel-size 2 or 4)",
        ),
        (
            {"tp": 4, "cp": 2},
            4,
            "--tensor-model-parallel-size 4 * --context-parallel-size 2 = 8: must divide the "
            "number of ranks, 4 (nearest: 8 ranks; --tensor-model-parallel-size 1 or 2; "
            "--context-parallel-size 1)",
        ),
        (
            {"tp": 2, "ep": 3},
            8,
            "--expert-model-parallel-size 3: must divide the 4 data and context parallel ranks of "
            "8 ranks (valid: 1, 2 or 4)",
        ),
        (
            {"instances": 3},
            8,
            "--num-distributed-optimizer-instances 3: must divide the 8 ranks of 8 with the same "
            "parameters (valid: 1, 2, 4 or 8)",
        ),
        (
            {"ep": 4, "instances": 4},
            8,
            "--num-distributed-optimizer-instances 4: must divide the 2 ranks of 8 with the same "
            "parameters (valid: 1 or 2)",
        ),
        ({}, 0, "0 ranks: there must be at least 1"),
    ],
)
def test_a_number_of_ranks_that_does_not_fit_is_refused(sizes, world_size, message):
    for use in (topology(**sizes).validate, lambda size: groups(topology(**sizes), size)):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - compared in full
            use(world_size)
        assert str(error.value) == message


@pytest.mark.parametrize(
    "sizes", [{"tp": 3}, {"tp": 2, "ep": 3}, {"instances": 3}, {"ep": 4, "instances": 4}], ids=str
)
def test_what_is_refused_megatron_refuses_too(state, sizes):
    refused = pytest.raises((RuntimeError, AssertionError), match="divisible")
    with refused, megatron(state, topology(**sizes), 8, 0):
        pass


def test_a_rank_outside_the_job_has_no_coordinates():
    with pytest.raises(ValueError, match="rank 8 is not one of 8 ranks"):
        Topology().coordinates(8, 8)


def test_a_topology_is_a_value():
    assert topology(tp=2) == topology(tp=2)
    assert len({topology(tp=2), topology(tp=2)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        topology().sequence_parallel = True


def test_topologies_need_neither_torch_nor_megatron():
    script = "import sys, ml_parallel.stages; print({'torch', 'megatron'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.stdout == "set()\n", run.stderr
