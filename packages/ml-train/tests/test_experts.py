"""Models with experts, and other blocks that a layout could get wrong, train alike everywhere."""

from __future__ import annotations

import argparse
import dataclasses
import math
from functools import cache

import pytest
import torch
from checkpoint_job import every_tensor
from test_checkpoint import assembled
from test_checkpoint import assert_equal as assert_same
from test_step import gradients
from training_job import DIST, PP2, TP2, UNTIED, Job, Rank, assemble

from ml_models.dropout import Dropout
from ml_parallel.testing import run_ranks
from ml_parallel.topology import Topology
from ml_train.config import Adam, _check_experts

EP2, SP = {"expert_model_parallel_size": 2}, {"sequence_parallel": True}
LAYOUTS = {
    "single": (1, Topology()),
    "tp2": (2, Topology(**TP2)),
    "tp2 sp": (2, Topology(**TP2, **SP)),
    "pp2": (2, Topology(**PP2)),
    "ep2": (2, Topology(**EP2)),
    "ep2 dist": (2, Topology(**EP2, **DIST)),
    "tp2 sp ep2": (4, Topology(**TP2, **SP, **EP2)),
    "pp2 ep2": (4, Topology(**PP2, **EP2)),
    "dp4 ep2 dist": (4, Topology(**EP2, **DIST)),
    "dp4 ep2 dist 2 instances": (
        4,
        Topology(**EP2, **DIST, num_distributed_optimizer_instances=2),
    ),
}

SMALL = dataclasses.replace(UNTIED, num_layers=2, hidden_size=32, kv_channels=8)
DEEPSEEK = dataclasses.replace(
    SMALL, num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, n_shared_experts=1,
    first_k_dense_replace=1, moe_router_score_function="sigmoid", norm_topk_prob=True,
    moe_router_enable_expert_bias=True, routed_scaling_factor=1.5,
    moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.01,
)  # fmt: skip
GPT_OSS = dataclasses.replace(
    SMALL, swiglu=False, quick_geglu=True, activation_func_clamp_value=0.5, glu_linear_offset=1.0,
    add_bias_linear=True, num_experts=4, moe_ffn_hidden_size=24, moe_aux_loss_coeff=0.1,
)  # fmt: skip
GATED = dataclasses.replace(
    SMALL, num_experts=4, moe_ffn_hidden_size=24, n_shared_experts=1, moe_shared_expert_gate=True,
    moe_router_pre_softmax=True, post_norm=True,
)  # fmt: skip
BLOOM = dataclasses.replace(
    SMALL, swiglu=False, normalization="LayerNorm", add_bias_linear=True, embed_layernorm=True,
    untie_embeddings_and_output_weights=False,
)  # fmt: skip
GPT2 = dataclasses.replace(
    BLOOM, embed_layernorm=False, position_embedding_type="learned_absolute",
    use_rotary_position_embeddings=False,
)  # fmt: skip
GEMMA2 = dataclasses.replace(
    SMALL, swiglu=False, geglu=True, add_rmsnorm_offset=True, post_norm=True, qk_layernorm=True,
    input_embeds_norm=True, final_logit_softcapping=3.0, untie_embeddings_and_output_weights=False,
)  # fmt: skip
BAICHUAN2 = dataclasses.replace(SMALL, norm_head=True, output_multiplier_scale=4.0)

WITH_EXPERTS = {"deepseek": DEEPSEEK, "gpt_oss": GPT_OSS, "gated": GATED}
DENSE = {"bloom": BLOOM, "gpt2": GPT2, "gemma2": GEMMA2, "baichuan2": BAICHUAN2}


@cache
def single(arch):
    return assemble(run_ranks(gradients, 1, Job(arch=arch, micro_batch_size=2)), arch, 1)


@pytest.mark.parametrize(
    ("block", "layout"),
    [
        *((block, layout) for block in DENSE for layout in ("tp2", "tp2 sp", "pp2")),
        *((block, layout) for block in WITH_EXPERTS for layout in ("tp2 sp", "tp2 sp ep2")),
        *(("deepseek", layout) for layout in ("pp2", "ep2", "pp2 ep2", "dp4 ep2 dist")),
    ],
)
def test_gradients_agree_with_the_single_process(block, layout):
    world_size, topology = LAYOUTS[layout]
    arch = {**DENSE, **WITH_EXPERTS}[block]
    job = Job(topology=topology, arch=arch, micro_batch_size=2)
    ranks = run_ranks(gradients, world_size, job)
    found = assemble(ranks, arch, topology.tensor_model_parallel_size)
    for name, expected in single(arch).items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * scale, msg=name)


def whole_gradients(job, mask):
    """Return the gradients of a step, divided by the tokens, by name."""
    from ml_train.step import _run_schedule

    rank = Rank(job)
    _run_schedule(rank.ddp, rank.batches(0, poison=mask), rank.shape, forward_only=False)
    names = rank.state.global_names()
    found = ((names[id(p)], p.main_grad) for chunk in rank.ddp for p in chunk.module.parameters())
    return {name: gradient.clone() for name, gradient in found}


@pytest.mark.parametrize("layout", ["single", "tp2 sp"])
def test_losses_of_routers_do_not_grow_where_the_loss_counts_fewer_tokens(layout):
    world_size, topology = LAYOUTS[layout]
    job = Job(topology=topology, arch=DEEPSEEK, micro_batch_size=2)
    whole, half = (run_ranks(whole_gradients, world_size, job, mask)[0] for mask in (1.0, 0.5))
    for name, expected in whole.items():
        torch.testing.assert_close(half[name], expected, rtol=1e-4, atol=1e-7, msg=name)


def biases(rank):
    """Return the biases by which the routers of this rank choose, by name."""
    names = rank.state.global_names()
    return {
        names[id(tensor)]: tensor.tolist()
        for chunk in rank.state.chunks
        for tensor in chunk.module.buffers()
        if id(tensor) in names
    }


def train(job, steps, root=None, start=0, stop=None):
    """Run steps [start, steps), from the checkpoint of step `start`; save after step `stop`."""
    from ml_train import checkpoint
    from ml_train.state import Progress

    rank = Rank(job)
    if start:
        assert checkpoint.load(root, rank.state).iteration == start
    before = every_tensor(rank), biases(rank)
    losses = []
    for i in range(start, steps):
        losses.append(rank.step(i).loss)
        if i + 1 == stop:
            progress = Progress(iteration=stop, consumed_samples=8 * stop)
            checkpoint.save(root, rank.state, progress, keep=None)
    return losses, before[0], every_tensor(rank), before[1], biases(rank)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("dp4 ep2 dist 2 instances", torch.float32),
        ("tp2 sp ep2", torch.bfloat16),
        ("ep2", torch.float16),
    ],
)
def test_a_run_with_experts_continues_bit_for_bit(tmp_path, layout, dtype):
    world_size, topology = LAYOUTS[layout]
    dropout = Dropout(attention_dropout=0.1, hidden_dropout=0.1)
    job = Job(topology=topology, arch=DEEPSEEK, dtype=dtype, dropout=dropout)
    golden = run_ranks(train, world_size, job, 4, tmp_path, 0, 2)
    resumed = run_ranks(train, world_size, job, 4, tmp_path, 2)
    assert resumed[0][0] == golden[0][0][2:]
    assert_same(assembled(resumed, 2, job), assembled(golden, 2, job))
    assert [rank[4] for rank in resumed] == [rank[4] for rank in golden]
    assert all(any(bias) for rank in golden for bias in rank[4].values())


@cache
def single_losses():
    return run_ranks(train, 1, Job(arch=DEEPSEEK), 3)[0][0]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("single", "tp2 sp ep2"),
        ("tp2 sp ep2", "dp4 ep2 dist"),
        ("dp4 ep2 dist", "pp2 ep2"),
        ("pp2 ep2", "single"),
    ],
)
def test_experts_are_dealt_out_anew_by_another_layout(tmp_path, written, read):
    jobs = {name: Job(topology=LAYOUTS[name][1], arch=DEEPSEEK) for name in (written, read)}
    saved = run_ranks(train, LAYOUTS[written][0], jobs[written], 2, tmp_path, 0, 2)
    loaded = run_ranks(train, LAYOUTS[read][0], jobs[read], 3, tmp_path, 2)
    assert_same(assembled(loaded, 1, jobs[read]), assembled(saved, 2, jobs[written]))
    known = {name: bias for rank in saved for name, bias in rank[4].items()}
    for rank in loaded:
        assert rank[3] == {name: known[name] for name in rank[3]}
    assert saved[0][0] + loaded[0][0] == pytest.approx(single_losses(), rel=1e-4)


def test_the_files_of_experts_are_megatrons(tmp_path):
    job = Job(topology=LAYOUTS["tp2 sp ep2"][1], arch=DEEPSEEK, dtype=torch.bfloat16)
    run_ranks(train, 4, job, 1, tmp_path, 0, 1)
    folder = tmp_path / "iter_0000001"
    names = sorted(path.name for path in folder.glob("mp_rank_*"))
    assert names == [f"mp_rank_{tp:02d}_{ep:03d}" for tp in (0, 1) for ep in (0, 1)]
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(folder / "mp_rank_01_001" / "model_optim_rng.pt", weights_only=True)
    assert content["args"].expert_model_parallel_size == 2
    model, mlp = content["model"], "decoder.layers.1.mlp"
    experts = {name.split(".")[6] for name in model if ".local_experts." in name}
    assert experts == {"0", "1"}
    assert model[f"{mlp}.experts.local_experts.1.linear_fc1.weight"].shape == (24, 32)
    assert model[f"{mlp}.shared_experts.linear_fc2.weight"].shape == (32, 12)
    assert model[f"{mlp}.router.expert_bias"].dtype == torch.float32
    assert model[f"{mlp}.router.weight"].dtype == torch.bfloat16
    assert model["decoder.layers.0.mlp.linear_fc1.weight"].shape == (160, 32)


def weights_after(job, folder, edit=None):
    """Return the weights of a checkpoint whose arguments were edited, or new ones."""
    from ml_train.restore import restore

    rank = Rank(job)
    if edit is not None:
        path = folder / "mp_rank_00" / "model_optim_rng.pt"
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, weights_only=True)
        vars(content["args"]).update(edit)
        torch.save(content, path)
        restore(folder, rank.state)
    return [shard[-1].tolist() for shard in rank.shards(lambda s: s.main)]


def test_which_layers_have_experts_may_be_said_in_megatrons_way(tmp_path):
    job = Job(arch=dataclasses.replace(GATED, moe_layer_freq=(2,)))
    ((_, _, expected, *_),) = run_ranks(train, 1, job, 1, tmp_path, 0, 1)
    for spelled in (2, [1, 0]):
        edit = {"moe_layer_freq": spelled, "window_attn_skip_freq": None}
        (found,) = run_ranks(weights_after, 1, job, tmp_path / "iter_0000001", edit)
        assert found == [shard[-1].tolist() for shard in expected["main"]]
    assert found != run_ranks(weights_after, 1, job, tmp_path)[0]


def biases_around_poison(job, poison):
    rank = Rank(job)
    rank.step(0)
    before = biases(rank)
    skipped = rank.step(1, poison=poison if rank.place.dp_rank == 1 else None)
    after = biases(rank)
    rank.step(2)
    return skipped.updated, before, after, biases(rank)


def test_a_skipped_step_moves_no_bias():
    job = Job(topology=LAYOUTS["ep2"][1], arch=DEEPSEEK)
    for updated, before, after, later in run_ranks(biases_around_poison, 2, job, math.nan):
        assert not updated
        assert before == after != later
        (bias,) = before.values()
        # The same number of tokens as the mean moves nothing; more, down; fewer, up.
        assert {round(value, 8) for value in bias} <= {-1e-3, 0.0, 1e-3}


def scales_around_an_overflow(job):
    """Return the loss scales after steps without and with an overflow in experts only."""
    from ml_models.weights import parameters

    rank = Rank(job)
    of_experts = {p.name for p in parameters(job.arch) if p.expert is not None}
    names, scales, updated = rank.state.global_names(), [], []
    for overflows in (False, True, False):
        if overflows:
            for chunk in rank.ddp:
                for tensor in chunk.module.parameters():
                    if names[id(tensor)] in of_experts and rank.place.ep_rank == 1:
                        tensor.register_hook(lambda grad: grad * math.inf)
        updated.append(rank.step(len(scales)).updated)
        scales.append(
            [float(inner.get_loss_scale()) for inner in rank.optimizer.chained_optimizers]
        )
    return updated, scales


def test_an_overflow_in_experts_lowers_the_loss_scale_of_all():
    adam = Adam(initial_loss_scale=256.0, hysteresis=1)
    job = Job(topology=LAYOUTS["ep2"][1], arch=DEEPSEEK, dtype=torch.float16, optimizer=adam)
    for updated, scales in run_ranks(scales_around_an_overflow, 2, job):
        assert updated == [True, False, False]  # the hooks stay
        assert scales == [[256.0, 256.0], [128.0, 128.0], [64.0, 64.0]]


def first_step(job):
    return Rank(job).step(0)


def test_a_normed_head_with_rows_of_padding_trains_in_float16():
    assert BAICHUAN2.vocab_size % 8  # which the table is a multiple of
    adam = Adam(initial_loss_scale=1024.0, hysteresis=1)
    step = run_ranks(first_step, 1, Job(arch=BAICHUAN2, dtype=torch.float16, optimizer=adam))[0]
    expected = run_ranks(first_step, 1, Job(arch=BAICHUAN2))[0]
    assert step.updated
    assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)


@pytest.mark.parametrize("block", {**DENSE, **WITH_EXPERTS})
def test_every_block_trains_in_bfloat16(block):
    arch = {**DENSE, **WITH_EXPERTS}[block]
    ((losses, *_),) = run_ranks(train, 1, Job(arch=arch, dtype=torch.bfloat16), 2)
    ((expected, *_),) = run_ranks(train, 1, Job(arch=arch), 2)
    assert losses == pytest.approx(expected, rel=5e-3)


def losses_of_two_experts(job):
    """Train with a bias that leaves experts without any token."""
    rank = Rank(job)
    with torch.no_grad():
        for chunk in rank.state.chunks:
            for name, tensor in chunk.tensors():
                if name.endswith("expert_bias"):
                    tensor.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    return [(result.loss, result.grad_norm) for result in map(rank.step, range(3))]


def test_experts_without_a_token_hold_nobody_up():
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    dealt = Topology(expert_model_parallel_size=4, **DIST, **overlap)
    (expected,) = run_ranks(losses_of_two_experts, 1, Job(arch=DEEPSEEK))
    for found in run_ranks(losses_of_two_experts, 4, Job(topology=dealt, arch=DEEPSEEK)):
        for step, reference in zip(found, expected, strict=True):
            assert step == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("how", [{}, {"moe_router_pre_softmax": True, "norm_topk_prob": True}])
def test_a_router_that_could_not_learn_is_refused(how):
    arch = dataclasses.replace(GATED, moe_router_topk=1, **{"moe_router_pre_softmax": False} | how)
    with pytest.raises(ValueError, match="--moe-router-topk 1: the weight of a single expert"):
        _check_experts(arch, Topology())
    _check_experts(dataclasses.replace(GATED, moe_router_topk=1), Topology())
