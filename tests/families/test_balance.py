"""What `router_aux_loss_coef` of a config.json means in transformers, and here."""

import pytest
import torch

from ml_parallel import platform

TOKENS, EXPERTS, TOPK = 64, 8, 3


def losses(logits):
    """Return transformers' loss of all layers, and the sum of megatron-core's, coefficients 1."""
    platform.import_engine()
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    theirs = load_balancing_loss_func(tuple(logits), EXPERTS, TOPK)
    ours = []
    for layer in logits:
        scores = layer.softmax(dim=-1)
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(TOPK).indices, 1)
        counts = chosen.sum(dim=0)
        ours.append(switch_load_balancing_loss_func(scores, counts, TOKENS, TOPK, EXPERTS, 1.0))
    return theirs, sum(ours)


@pytest.mark.parametrize("layers", [1, 4])
def test_with_the_same_load_in_all_layers_theirs_is_ours_times_topk_by_layers(layers):
    torch.manual_seed(0)
    logits = torch.randn(TOKENS, EXPERTS).expand(layers, -1, -1).clone().requires_grad_()
    theirs, ours = losses(logits)
    torch.testing.assert_close(theirs, ours * TOPK / layers)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(gradients[0], gradients[1] * TOPK / layers)


def test_with_other_loads_there_is_no_factor():
    """transformers pools the layers: one that overloads an expert and one that spares it are even.

    So no coefficient makes one loss the other, and the number of the config.json is taken as it is.
    """
    torch.manual_seed(0)
    logits = torch.randn(2, TOKENS, EXPERTS)
    logits[0, :, 0] += 9
    logits[1, :, 0] -= 9
    theirs, ours = losses(logits)
    assert theirs < 0.9 * ours * TOPK / 2
