"""What flash_attention says of wrong arguments, before any kernel runs."""

from __future__ import annotations

import pytest
import torch
from attention_formula import tensors

from ml_kernels import flash_attention


def attend(queries=(2, 4, 5, 8), keys=(2, 2, 5, 8), values=None, layout="BNSD", **options):
    shapes = (queries, keys, keys if values is None else values)
    return flash_attention(*(torch.ones(shape) for shape in shapes), layout=layout, **options)


FLAT = {"queries": (5, 2, 8), "keys": (5, 2, 8)}
ENDS = {"queries": (5, 4, 8), "keys": (5, 2, 8), "layout": "TND"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "NBSD"}, r"layout 'NBSD': must be one of SBND, SBH, BSH, BSND, BNSD, TND"),
        ({"alibi_form": "line"}, "alibi_form 'line': must be 'row' or 'square'"),
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
        ({"window": 2.0, "causal": True}, "window 2.0: must be an int"),
        ({"window": True, "causal": True}, "window True: must be an int"),
        ({"layout": "SBH", "num_heads": 2.0, **FLAT}, "num_heads 2.0: must be an int"),
        ({"mask": [[True]]}, "mask is a list: must be a tensor"),
        ({"sinks": [0.0] * 4}, "sinks is a list: must be a tensor"),
        ({"alibi_slopes": (0.5,) * 4}, "alibi_slopes is a tuple: must be a tensor"),
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
    with pytest.raises(
        TypeError, match=r"flash_attention: key is torch.float64: must be .*float32"
    ):
        flash_attention(query, key.double(), value, layout="BNSD")
    with pytest.raises(TypeError, match=r"flash_attention: query is torch.int64: must be float"):
        flash_attention(query.long(), key, value, layout="BNSD")
    with pytest.raises(TypeError, match="flash_attention: value is a list: must be a tensor"):
        flash_attention(query, key, [1.0], layout="BNSD")
    with pytest.raises(ValueError, match="flash_attention: value is on meta: must be on cpu"):
        flash_attention(query, key, value.to("meta"), layout="BNSD")
