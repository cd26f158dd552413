"""`ml-train pretrain` of a model with experts on two ranks, as a user runs it."""

from __future__ import annotations

import torch
from pretrain_job import flags, predictable_corpus, run, steps, weights

EXPERTS = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_aux_loss_coeff": 1e-2,
    "expert_model_parallel_size": 2,
    "use_distributed_optimizer": True,
    "hidden_dropout": 0.1,
    "nproc_per_node": 2,
    "save_interval": 6,
    "train_iters": 12,
}


def test_it_learns_and_resumes_bit_for_bit(tmp_path):
    corpus = predictable_corpus(tmp_path)
    golden, resumed = tmp_path / "golden", tmp_path / "resumed"
    first = run(flags(corpus, **EXPERTS, save=golden))
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    second = run(flags(corpus, **EXPERTS, load=golden, ckpt_step=6, save=resumed))
    assert second.returncode == 0, second.stderr
    curve, later = (
        [step["loss"] for step in steps(root / "metrics.jsonl")] for root in (golden, resumed)
    )
    assert curve[-1] < curve[0] - 0.3
    assert later == curve[6:]
    expected, found = (weights(root / "iter_0000012") for root in (golden, resumed))
    assert {folder for folder, _ in expected} == {"mp_rank_00_000", "mp_rank_00_001"}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
