"""What a collective says when another rank is gone, as torch words it."""

import pytest
import torch

from ml_train.peers import is_lost, wants_traceback

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "
LOST = [
    f"{GLOO}Read error [127.0.0.1]:32936: Connection reset by peer. This is typically caused by",
    f"{GLOO}Connection closed by peer [127.0.0.1]:32641. This is typically caused by a remote",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms",
]


@pytest.mark.parametrize("text", LOST, ids=["reset", "closed", "timeout"])
def test_a_closed_connection_and_a_timeout_mean_a_lost_rank(text):
    assert is_lost(RuntimeError(text))
    assert is_lost(torch.distributed.DistNetworkError("anything"))


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError(LOST[0])],
    ids=["shapes", "ValueError"],
)
def test_anything_else_is_a_bug_and_keeps_its_traceback(error):
    assert not is_lost(error)


def test_the_environment_can_ask_for_the_traceback(monkeypatch):
    monkeypatch.delenv("ML_TRAIN_TRACEBACK", raising=False)
    assert not wants_traceback()
    monkeypatch.setenv("ML_TRAIN_TRACEBACK", "1")
    assert wants_traceback()
