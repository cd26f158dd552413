"""The modules alone, and as megatron-core builds and marks them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from oracle import random
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ml_kernels import GEGLU, GELU, LayerNorm, RMSNorm, SwiGLU

NORMS = [RMSNorm, LayerNorm]
ACTIVATIONS = [SwiGLU, GEGLU, GELU]


@dataclass(kw_only=True)
class Config:
    """The fields of a megatron-core TransformerConfig that the modules read."""

    params_dtype: torch.dtype = torch.bfloat16
    sequence_parallel: bool = True
    layernorm_zero_centered_gamma: bool = False
    use_cpu_initialization: bool = True
    activation_func_clamp_value: float | None = None
    glu_linear_offset: float = 0.0


def copy_random(source, target):
    with torch.no_grad():
        source.weight.copy_(random(*source.weight.shape, seed=5))
    target.load_state_dict({"weight": source.weight.detach()})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RMSNorm(32, eps=1e-6), LlamaRMSNorm(32, eps=1e-6)),
        (RMSNorm(32, eps=1e-6, unit_offset=True), GemmaRMSNorm(32, eps=1e-6)),
    ],
    ids=["llama", "gemma"],
)
def test_rms_norm_takes_the_weights_of_transformers_and_gives_its_numbers(ours, theirs):
    assert torch.equal(ours.weight, theirs.weight)  # both start as the identity
    copy_random(theirs, ours)
    x = random(4, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_rms_norm_with_a_residual_returns_the_norm_of_the_sum_and_the_sum():
    norm = RMSNorm(32, eps=1e-6)
    x, residual = random(4, 32), random(4, 32, seed=1)
    normed, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, norm(x + residual))


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_takes_the_parameters_of_torch_and_gives_its_numbers(bias):
    ours, theirs = LayerNorm(32, eps=1e-6, bias=bias), torch.nn.LayerNorm(32, 1e-6, bias=bias)
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter.copy_(random(32, seed=seed))
    ours.load_state_dict(theirs.state_dict())
    x = random(4, 32)
    torch.testing.assert_close(ours(x), theirs(x))


def test_layer_norm_with_an_offset_scales_by_one_plus_the_weight():
    norm, x = LayerNorm(32, unit_offset=True), random(4, 32)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (32,)))
    with torch.no_grad():
        norm.weight.fill_(0.5)
    torch.testing.assert_close(norm(x), 1.5 * F.layer_norm(x, (32,)))


@pytest.mark.parametrize("module", NORMS)
def test_alone_parameters_follow_torchs_defaults_and_the_options(module):
    assert {(p.device.type, p.dtype) for p in module(8).parameters()} == {("cpu", torch.float32)}
    chosen = module(8, device="meta", dtype=torch.float16)
    assert {(p.device.type, p.dtype) for p in chosen.parameters()} == {("meta", torch.float16)}
    with torch.device("meta"):
        assert module(8).weight.is_meta
    assert not hasattr(module(8).weight, "sequence_parallel")


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("module", NORMS)
def test_with_a_config_parameters_have_its_dtype_and_megatrons_mark(module, sequence_parallel):
    norm = module(config=Config(sequence_parallel=sequence_parallel), hidden_size=8, eps=1e-3)
    assert norm.eps == 1e-3
    for parameter in norm.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("module", NORMS)
def test_a_copy_and_a_file_keep_megatrons_mark(module, tmp_path):
    norm = module(config=Config(), hidden_size=8)
    torch.save(norm, tmp_path / "norm.pt")
    copies = copy.deepcopy(norm), torch.load(tmp_path / "norm.pt", weights_only=False)
    for parameter in (parameter for found in copies for parameter in found.parameters()):
        assert parameter.sequence_parallel is True
    for parameter in copy.deepcopy(module(8)).parameters():
        assert not hasattr(parameter, "sequence_parallel")


@pytest.mark.parametrize("module", NORMS)
def test_parameters_that_are_made_anew_keep_megatrons_mark(module):
    norm, other = (module(config=Config(), hidden_size=8, device=d) for d in ("meta", "cpu"))
    norm.to_empty(device="cpu")
    assert all(parameter.sequence_parallel for parameter in norm.parameters())
    norm.load_state_dict(other.state_dict(), assign=True)
    assert all(parameter.sequence_parallel for parameter in norm.parameters())


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("module", NORMS)
def test_a_norm_made_on_meta_starts_as_the_identity_when_it_is_reset(module, unit_offset):
    made = module(8, unit_offset=unit_offset)
    later = module(8, unit_offset=unit_offset, device="meta").to_empty(device="cpu")
    for parameter in later.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    later.reset_parameters()
    for name, parameter in made.state_dict().items():
        assert torch.equal(later.state_dict()[name], parameter)


@pytest.mark.parametrize("module", NORMS)
def test_with_a_config_parameters_are_made_on_megatrons_current_device(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "meta")
    config = Config(use_cpu_initialization=False)
    assert module(config=config, hidden_size=8).weight.is_meta
    assert not module(config=config, hidden_size=8, device="cpu").weight.is_meta
    assert not module(config=Config(), hidden_size=8).weight.is_meta


@pytest.mark.parametrize("module", NORMS)
def test_megatrons_zero_centred_gamma_is_the_unit_offset(module):
    centred = Config(layernorm_zero_centered_gamma=True)
    norm = module(config=centred, hidden_size=8)
    assert norm.unit_offset
    assert not norm.weight.any()
    assert module(config=Config(), hidden_size=8).weight.eq(1).all()
    assert not module(config=centred, hidden_size=8, unit_offset=False).unit_offset


@pytest.mark.parametrize("module", [*NORMS, *ACTIVATIONS])
def test_megatron_core_builds_the_modules(module):
    transformer = pytest.importorskip("megatron.core.transformer")
    specs = pytest.importorskip("megatron.core.transformer.spec_utils")
    config = transformer.TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True
    )
    sizes = {"hidden_size": 8, "eps": config.layernorm_epsilon} if module in NORMS else {}
    built = specs.build_module(specs.ModuleSpec(module=module), config=config, **sizes)
    assert isinstance(built, module)
    assert built(torch.ones(2, 8)).shape[0] == 2


@pytest.mark.parametrize("config", [None, Config()])
def test_activations_are_the_functions(config):
    x, bias = random(4, 32), random(32, seed=1)
    gate, up = (x + bias).chunk(2, dim=-1)
    torch.testing.assert_close(SwiGLU(config=config)(x, bias), F.silu(gate) * up)
    torch.testing.assert_close(GEGLU(config=config)(x, bias), F.gelu(gate, approximate="tanh") * up)
    torch.testing.assert_close(GEGLU(approximate="none")(x, bias), F.gelu(gate) * up)
    torch.testing.assert_close(GELU(config=config)(x, bias), F.gelu(x + bias))
    tanh = GELU(approximate="tanh")(x)
    torch.testing.assert_close(tanh, F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [("activation_func_clamp_value", 7.0, "must be None"), ("glu_linear_offset", 1.0, "must be 0")],
)
@pytest.mark.parametrize("module", ACTIVATIONS)
def test_a_config_that_asks_for_another_activation_is_refused(module, field, value, rule):
    with pytest.raises(ValueError, match=f"{module.__name__}: {field} {value}: {rule}"):
        module(config=Config(**{field: value}))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (RMSNorm(8, eps=1e-6), "RMSNorm(8, eps=1e-06, unit_offset=False)"),
        (LayerNorm(8), "LayerNorm(8, eps=1e-05, unit_offset=False)"),
        (SwiGLU(), "SwiGLU()"),
        (GEGLU(), "GEGLU(approximate='tanh')"),
        (GELU(), "GELU(approximate='none')"),
    ],
)
def test_the_text_of_a_module_shows_its_options(module, text):
    assert str(module) == text


def test_an_unknown_keyword_is_refused():
    with pytest.raises(TypeError, match="zero_centred"):
        RMSNorm(8, zero_centred=True)


@pytest.mark.parametrize("module", NORMS)
def test_a_norm_refuses_impossible_numbers_when_it_is_made(module):
    with pytest.raises(ValueError, match=f"{module.__name__}: eps -1.0: must be at least 0"):
        module(8, eps=-1.0)
    with pytest.raises(ValueError, match=f"{module.__name__}: hidden_size -8: must not be"):
        module(-8)
    with pytest.raises(TypeError, match=f"{module.__name__}: hidden_size 8.0: must be an int"):
        module(8.0)


@pytest.mark.parametrize("module", [GEGLU, GELU])
def test_an_activation_refuses_an_unknown_form_when_it_is_made(module):
    with pytest.raises(ValueError, match=f"{module.__name__}: approximate 'erf': must be 'tanh'"):
        module(approximate="erf")
