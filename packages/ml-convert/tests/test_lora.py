"""LoRA adapters, of ModelLink's form and of PEFT's: merged, and turned into each other."""

import argparse
import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ml_convert.conversion import convert
from ml_convert.errors import ConversionError
from ml_convert.files import Buffers
from ml_convert.input import open_source
from ml_convert.request import Request
from ml_models.architecture import Architecture
from ml_models.weights import parameters

R, ALPHA = 3, 6.0
LAYERS = 4
QKV = ("q_proj", "k_proj", "v_proj")
ROW = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
COLUMN = {
    "self_attention.linear_qkv": [f"self_attn.{name}" for name in QKV],
    "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
}
LAYOUTS = {
    "one rank": (1, [[range(LAYERS)]]),
    "tp2 pp2": (2, [[range(2)], [range(2, 4)]]),
    "tp2 pp2 vpp": (2, [[range(1), range(2, 3)], [range(1, 2), range(3, 4)]]),
    "layer list": (1, [[range(3)], [range(3, 4)]]),
}


def numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def as_words(array):
    return torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()


def as_floats(words):
    return torch.from_numpy(words.copy()).view(torch.bfloat16).double().numpy()


@pytest.fixture
def base(make_hf):
    """A bfloat16 Llama of finite numbers."""
    hf = make_hf()
    finite = {n: as_words(numbers(t.shape, i)) for i, (n, t) in enumerate(hf.tensors.items())}
    return make_hf("base", extra=finite)


@pytest.fixture
def adapters(base):
    """One A and one B of each Hugging Face module; those of a Megatron module share A."""
    found, seed = {}, 1000
    for layer in range(LAYERS):
        for modules in [*COLUMN.values(), *([m] for m in ROW.values())]:
            names = [f"model.layers.{layer}.{module}" for module in modules]
            columns = base.tensors[f"{names[0]}.weight"].shape[1]
            a = numbers((R, columns), seed)
            for name in names:
                seed += 1
                rows = base.tensors[f"{name}.weight"].shape[0]
                found[name] = (a, numbers((rows, R), seed))
    return found


def with_adapters(base, adapters, scale=ALPHA / R):
    """Add adapters to the weights of a Hugging Face model by hand."""
    return {
        name: as_floats(words) + (scale * (b.astype(float) @ a.astype(float)) if pair else 0)
        for name, words in base.tensors.items()
        for pair in [adapters.get(name.removesuffix(".weight"))]
        for a, b in [pair or (None, None)]
    }


def cut(oracle, base, adapters, tp, stages, kind=".default"):
    """Cut adapters for ranks: B as the oracle cuts rows of weights, A as it cuts columns."""
    fake = dict(base.tensors)
    for name, (a, b) in adapters.items():
        fake[f"{name}.weight"] = a if name.split(".", 3)[3] in ROW.values() else b
    ranks = oracle.cut_llama(
        SimpleNamespace(config=base.config, tensors=fake), tp=tp, stages=stages, padded=128
    )
    found = {}
    for (tp_rank, pp_rank), chunks in ranks.items():
        found[tp_rank, pp_rank] = []
        for layers, chunk in zip(stages[pp_rank], chunks, strict=True):
            tensors = {}
            for local, layer in enumerate(layers):
                for module, theirs in [*COLUMN.items(), *ROW.items()]:
                    first = theirs if isinstance(theirs, str) else theirs[0]
                    a, b = adapters[f"model.layers.{layer}.{first}"]
                    ours = f"decoder.layers.{local}.{module}"
                    part = chunk[f"{ours}.weight"]
                    pair = (part, b) if module in ROW else (a, part)
                    for which, array in zip("AB", pair, strict=True):
                        tensors[f"{ours}.lora_{which}{kind}.weight"] = torch.from_numpy(
                            np.ascontiguousarray(array)
                        )
            found[tp_rank, pp_rank].append(tensors)
    return found


@pytest.fixture
def make_adapter(tmp_path, oracle, base, adapters):
    """Write a checkpoint that holds an adapter only, as ModelLink's training does."""

    def make(layout="one rank", *, kind=".default", edit=None, **args):
        tp, stages = LAYOUTS[layout]
        root = tmp_path / "adapter"
        said = {"lora_r": R, "lora_alpha": ALPHA, "num_layers": LAYERS, **args}
        for rank, chunks in cut(oracle, base, adapters, tp, stages, kind).items():
            directory = root / "iter_0000007" / oracle.rank_name(*rank, len(stages))
            directory.mkdir(parents=True)
            content = {"args": oracle.megatron_args(base.config, **said), "checkpoint_version": 3.0}
            for number, chunk in enumerate(chunks):
                content["model" if len(chunks) == 1 else f"model{number}"] = chunk
            if edit is not None:
                edit(content)
            torch.save(content, directory / "model_optim_rng.pt")
        (root / "latest_checkpointed_iteration.txt").write_text("7")
        return root

    return make


def write_peft(path, oracle, adapters, **changes):
    path.mkdir()
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "bias": "none", **changes}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{name}.lora_{which}.weight": array.view(np.uint32)
        for name, pair in adapters.items()
        for which, array in zip("AB", pair, strict=True)
    }
    oracle.write_safetensors(path / "adapter_model.safetensors", tensors, "F32")
    return path


def run(base, target, save_format="hf", **options):
    return convert(Request(load_dir=base, save_dir=target, save_format=save_format, **options)).path


def assert_merged(found, expected):
    """Check that numbers are sums that were rounded once."""
    assert found.keys() == expected.keys()
    for name, words in found.items():
        exact = torch.from_numpy(expected[name])
        merged = torch.from_numpy(words.copy()).view(torch.bfloat16)
        torch.testing.assert_close(merged.double(), exact, rtol=1.01 * 2**-8, atol=1e-5)
        assert (merged == exact.to(torch.bfloat16)).double().mean() > 0.998, name


# Merging


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_of_ranks_is_merged(base, adapters, make_adapter, oracle, tmp_path, layout):
    result = run(base.path, tmp_path / "out", lora_load=make_adapter(layout))
    assert_merged(oracle.read_model(result), with_adapters(base, adapters))


@pytest.mark.parametrize("layout", ["one rank", "tp2 pp2 vpp"])
def test_base_and_adapter_may_lie_in_the_same_files(
    base, adapters, make_megatron, oracle, tmp_path, layout
):
    tp, stages = LAYOUTS[layout]
    parts = cut(oracle, base, adapters, tp, stages, kind="")

    def add(rank, content):
        for number, chunk in enumerate(parts[rank]):
            model = content["model" if len(stages[0]) == 1 else f"model{number}"]
            for name in [n for n in model if n.replace(".weight", ".lora_A.weight") in chunk]:
                model[name.replace(".weight", ".base_layer.weight")] = model.pop(name)
            model |= chunk

    root = make_megatron(base, tp=tp, stages=stages, edit=add, lora_r=R, lora_alpha=ALPHA)
    result = run(root, tmp_path / "out")
    assert_merged(oracle.read_model(result), with_adapters(base, adapters))
    again = run(root, tmp_path / "mcore", "mcore", target_tensor_parallel_size=2)
    args, _ = oracle.load_rank(again / "mp_rank_00" / "model_optim_rng.pt")
    assert not hasattr(args, "lora_r")
    back = oracle.read_model(run(again, tmp_path / "back"))
    assert all((back[name] == words).all() for name, words in oracle.read_model(result).items())


def test_an_adapter_of_the_legacy_format_is_merged(base, adapters, make_adapter, oracle, tmp_path):
    theirs = {"linear_qkv": "query_key_value", "linear_proj": "dense"}
    theirs |= {"linear_fc1": "dense_h_to_4h", "linear_fc2": "dense_4h_to_h"}

    def nest(content):
        layers = {}
        for name, tensor in content["model"].items():
            for ours, legacy in theirs.items():
                name = name.replace(ours, legacy)
            layers[name.removeprefix("decoder.")] = tensor
        content["model"] = {"language_model": {"encoder": layers}}

    adapter = make_adapter("tp2 pp2", edit=nest, lora_target_modules=list(theirs.values()))
    options = {"lora_target_modules": ("query_key_value", "linear_proj", "dense_h_to_4h")}
    with pytest.raises(ConversionError, match=r"is an adapter of linear_fc1, linear_fc2"):
        run(base.path, tmp_path / "out", lora_load=adapter, **options)
    result = run(base.path, tmp_path / "out", lora_load=adapter)
    assert_merged(oracle.read_model(result), with_adapters(base, adapters))


def own_a(adapters):
    """Give each module an A of its own, and leave some modules without an adapter."""
    return {
        name: (numbers(a.shape, seed), b)
        for seed, (name, (a, b)) in enumerate(adapters.items())
        if not name.endswith("k_proj") and "layers.1.mlp" not in name
    }


@pytest.mark.parametrize("shared", [True, False])
def test_an_adapter_of_peft_is_merged(base, adapters, oracle, tmp_path, shared):
    adapters = adapters if shared else own_a(adapters)
    peft = write_peft(tmp_path / "peft", oracle, adapters)
    result = run(base.path, tmp_path / "out", lora_load=peft)
    merged = oracle.read_model(result)
    assert_merged(merged, with_adapters(base, adapters))
    cut_first = run(base.path, tmp_path / "mcore", "mcore", target_tensor_parallel_size=2)
    other = run(cut_first, tmp_path / "other", lora_load=peft)
    assert all((words == merged[name]).all() for name, words in oracle.read_model(other).items())


def test_rank_stabilized_adapters_have_their_own_scale(base, adapters, oracle, tmp_path):
    peft = write_peft(tmp_path / "peft", oracle, adapters, use_rslora=True)
    result = run(base.path, tmp_path / "out", lora_load=peft)
    assert_merged(oracle.read_model(result), with_adapters(base, adapters, ALPHA / R**0.5))


# From one form to the other


def loaded(directory):
    return {
        str(path.parent.name): torch.load(path, weights_only=False)
        for path in sorted(directory.rglob("*.pt"))
    }


@pytest.mark.parametrize("layout", ["tp2 pp2", "tp2 pp2 vpp"])
def test_an_adapter_of_ranks_becomes_one_of_peft_and_comes_back(
    base, adapters, make_adapter, oracle, tmp_path, layout
):
    root = make_adapter(layout)
    peft = run(base.path, tmp_path / "peft", lora_load=root, lora_only=True)
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (R, ALPHA)
    assert config["target_modules"] == sorted(n.rpartition(".")[2] for n in list(adapters)[:7])
    tensors = oracle.read_safetensors(peft / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(adapters)
    for name, pair in adapters.items():
        for which, array in zip("AB", pair, strict=True):
            written = tensors[f"base_model.model.{name}.lora_{which}.weight"]
            assert (written == array.view(np.uint32)).all()
    cut_again = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}
    if "vpp" in layout:
        cut_again["num_layers_per_virtual_pipeline_stage"] = 1
    back = run(base.path, tmp_path / "back", "mcore", lora_load=peft, lora_only=True, **cut_again)
    ours, theirs = loaded(back), loaded(root)
    assert ours.keys() == theirs.keys()
    for rank, content in theirs.items():
        assert vars(ours[rank]["args"])["lora_alpha"] == ALPHA
        for key in [key for key in content if key.startswith("model")]:
            assert ours[rank][key].keys() == content[key].keys()
            for name, tensor in content[key].items():
                assert torch.equal(ours[rank][key][name], tensor), name


def test_modules_with_their_own_a_become_an_adapter_of_higher_rank(
    base, adapters, oracle, tmp_path
):
    adapters = own_a(adapters)
    peft = write_peft(tmp_path / "peft", oracle, adapters)
    back = run(base.path, tmp_path / "back", "mcore", lora_load=peft, lora_only=True)
    (content,) = loaded(back).values()
    assert (content["args"].lora_r, content["args"].lora_alpha) == (2 * R, 2 * ALPHA)
    assert content["args"].lora_target_modules == [
        "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"
    ]  # fmt: skip
    ours = f"decoder.layers.0.self_attention.linear_qkv.lora_{{}}{'.default'}.weight"
    a, b = (content["model"][ours.format(which)].double().numpy() for which in "AB")
    rows = (b @ a).reshape(4, 4, 4, 32)  # groups, two queries + key + value, channels, columns
    for name, found in (("q", rows[:, :2]), ("v", rows[:, 3:])):
        their_a, their_b = adapters[f"model.layers.0.self_attn.{name}_proj"]
        np.testing.assert_allclose(
            found.reshape(-1, 32), their_b.astype(float) @ their_a.astype(float), rtol=1e-12
        )
    assert not rows[:, 2].any()
    from_ranks = run(base.path, tmp_path / "a", lora_load=tmp_path / "back")
    from_peft = run(base.path, tmp_path / "b", lora_load=peft)
    expected = oracle.read_model(from_peft)
    assert all((w == expected[n]).all() for n, w in oracle.read_model(from_ranks).items())


def test_an_adapter_is_written_in_the_legacy_format(base, make_adapter, oracle, tmp_path):
    root = make_adapter()
    legacy = run(base.path, tmp_path / "legacy", "legacy", lora_load=root, lora_only=True)
    (content,) = loaded(legacy).values()
    assert content["args"].lora_target_modules[0] == "query_key_value"
    layers = content["model"]["language_model"]["encoder"]
    assert "layers.3.self_attention.query_key_value.lora_B.default.weight" in layers
    ours = run(base.path, tmp_path / "a", lora_load=root)
    theirs = run(base.path, tmp_path / "b", lora_load=tmp_path / "legacy")
    expected = oracle.read_model(ours)
    assert all((w == expected[n]).all() for n, w in oracle.read_model(theirs).items())


# What cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"bias": "all"}, "bias is 'all', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 5}, "its tensors are of rank 3, but r is said to be 5"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number above 0"),
    ],
)
def test_what_is_more_than_lora_is_refused(base, adapters, oracle, tmp_path, changes, message):
    peft = write_peft(tmp_path / "peft", oracle, adapters, **changes)
    with pytest.raises(ConversionError, match=message):
        run(base.path, tmp_path / "out", lora_load=peft)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 7.0}, r"--lora-alpha 7: .*adapter_config.json says 6"),
        ({"lora_r": 4}, r"--lora-r 4: .* says 3"),
        ({"lora_target_modules": ("q_proj",)}, "is an adapter of down_proj, gate_proj"),
    ],
)
def test_flags_must_agree_with_the_adapter(base, adapters, oracle, tmp_path, options, message):
    peft = write_peft(tmp_path / "peft", oracle, adapters)
    with pytest.raises(ConversionError, match=message):
        run(base.path, tmp_path / "out", lora_load=peft, **options)


def test_alpha_must_be_known(base, make_adapter, tmp_path):
    root = make_adapter(lora_alpha=None)
    with pytest.raises(ConversionError, match="does not say what alpha is; give --lora-alpha"):
        run(base.path, tmp_path / "out", lora_load=root)
    run(base.path, tmp_path / "out", lora_load=root, lora_alpha=ALPHA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pair: (pair[0][:, :-1], pair[1]), "do not fit a weight of shape"),
        (lambda pair: (pair[0], pair[1][1:]), "do not fit a weight of shape"),
        (lambda pair: (pair[0], pair[1][:, :2]), "do not fit a weight of shape"),
        (lambda pair: (pair[0][:2], pair[1][:, :2]), r"different ranks \(2, 3\)"),
    ],
)
def test_shapes_of_peft_must_fit(base, adapters, oracle, tmp_path, change, message):
    name = "model.layers.1.mlp.up_proj"
    changed = {**adapters, name: tuple(map(np.ascontiguousarray, change(adapters[name])))}
    peft = write_peft(tmp_path / "peft", oracle, changed)
    with pytest.raises(ConversionError, match=message):
        run(base.path, tmp_path / "out", lora_load=peft)


def test_modules_of_peft_must_be_of_the_model(base, adapters, oracle, tmp_path):
    odd = {**adapters, "model.layers.9.mlp.up_proj": adapters["model.layers.1.mlp.up_proj"]}
    peft = write_peft(tmp_path / "peft", oracle, odd)
    with pytest.raises(ConversionError, match=r"model\.layers\.9\.mlp\.up_proj is no linear layer"):
        run(base.path, tmp_path / "out", lora_load=peft)


QKV_A = "decoder.layers.0.self_attention.linear_qkv.lora_A.default.weight"


ODD = "decoder.layers.0.x.lora_A.default.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop(QKV_A), r"linear_qkv\.lora_A\.weight .* is missing"),
        (lambda m: m.update({QKV_A: torch.ones(3, 31)}), r"has shape \[3, 31\]"),
        (lambda m: m.update({ODD: m[QKV_A]}), "not part of this"),
        (lambda m: m.update({"x.modules_to_save.default.weight": m[QKV_A]}), "is not supported"),
        (lambda m: m.update({QKV_A.replace("default", "b"): m[QKV_A]}), "several adapters"),
        (lambda m: m.update({"decoder.final_layernorm.weight": m[QKV_A]}), "besides its adapter"),
        (lambda m: m.clear(), "holds no LoRA adapter"),
    ],
)
def test_what_is_wrong_with_an_adapter_of_ranks_is_named(
    base, make_adapter, tmp_path, edit, message
):
    root = make_adapter(edit=lambda content: edit(content["model"]))
    with pytest.raises(ConversionError, match=message):
        run(base.path, tmp_path / "out", lora_load=root)
    assert not (tmp_path / "out").exists()


def test_copies_of_a_must_agree(base, make_adapter, tmp_path):
    seen = []

    def change_second(content):
        seen.append(content)
        if len(seen) == 2:
            content["model"][QKV_A] = content["model"][QKV_A] + 1

    root = make_adapter("tp2 pp2", edit=change_second)
    with pytest.raises(ConversionError, match="should repeat"):
        run(base.path, tmp_path / "out", lora_load=root)


def test_flags_without_an_adapter_are_refused(base, tmp_path):
    for options in ({"lora_alpha": 4.0}, {"lora_only": True}):
        with pytest.raises(ConversionError, match="holds no adapter; name one with --lora-load"):
            run(base.path, tmp_path / "out", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="holds neither an adapter of PEFT"):
        run(base.path, tmp_path / "out", lora_load=tmp_path / "empty")
    with pytest.raises(ConversionError, match="no such directory"):
        run(base.path, tmp_path / "out", lora_load=tmp_path / "nowhere")


# Experts, and other formats of the base

EXPERTS = Architecture(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=24,
    vocab_size=64,
    max_position_embeddings=32,
    normalization="RMSNorm",
    swiglu=True,
    add_bias_linear=False,
    untie_embeddings_and_output_weights=True,
    num_experts=4,
)


def save_rank(root, rank, model, **args):
    directory = root / "iter_0000001" / rank
    directory.mkdir(parents=True)
    said = argparse.Namespace(**dataclasses.asdict(EXPERTS), **args)
    content = {"args": said, "checkpoint_version": 3.0, "model": model}
    torch.save(content, directory / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("1")


def test_experts_of_expert_parallel_ranks_have_adapters(tmp_path):
    weights = {
        parameter.name: torch.from_numpy(numbers(parameter.shape, seed))
        for seed, parameter in enumerate(parameters(EXPERTS))
    }
    save_rank(tmp_path / "base", "mp_rank_00", weights)
    expected, ranks = dict(weights), [{}, {}]
    for seed, (name, weight) in enumerate(weights.items()):
        if not name.endswith(("linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")):
            continue
        a = torch.from_numpy(numbers((R, weight.shape[1]), 5000 + seed))
        b = torch.from_numpy(numbers((weight.shape[0], R), 6000 + seed))
        expected[name] = weight.double() + ALPHA / R * (b.double() @ a.double())
        module = name.removesuffix(".weight")
        expert = int(module.split(".")[6]) if "experts" in module else None
        for number, rank in enumerate(ranks):
            if expert is None or expert // 2 == number:
                local = module if expert is None else module.replace(
                    f"experts.{expert}", f"experts.{expert % 2}"
                )  # fmt: skip
                rank |= {f"{local}.lora_A.default.weight": a, f"{local}.lora_B.default.weight": b}
    sizes = {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    for number, rank in enumerate(ranks):
        said = {"lora_r": R, "lora_alpha": ALPHA, **sizes}
        save_rank(tmp_path / "adapter", f"mp_rank_00_{number:03d}", rank, **said)
    # Both ranks of the base hold what is no expert, and must agree before the adapter is added.
    cut_base = run(tmp_path / "base", tmp_path / "cut", "mcore", target_expert_parallel_size=2)
    result = run(
        cut_base,
        tmp_path / "out",
        "mcore",
        lora_load=tmp_path / "adapter",
        target_expert_parallel_size=2,
        make_vocab_size_divisible_by=1,
    )
    back = run(result, tmp_path / "back", "mcore", make_vocab_size_divisible_by=1)
    (content,) = loaded(back).values()
    assert content["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            content["model"][name].double(), tensor.double(), rtol=1e-5, atol=1e-5
        )
    only = run(
        tmp_path / "base",
        tmp_path / "only",
        "mcore",
        lora_load=tmp_path / "adapter",
        lora_only=True,
        target_expert_parallel_size=2,
    )
    for ours, theirs in zip(loaded(only).values(), ranks, strict=True):
        assert ours["model"].keys() == theirs.keys()
        assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs.items())


def test_an_adapter_is_merged_into_torch_dist_and_out_of_it(
    base, adapters, make_adapter, oracle, tmp_path
):
    root = make_adapter("tp2 pp2")
    run(base.path, tmp_path / "base_td", "torch_dist")
    run(base.path, tmp_path / "merged_td", "torch_dist", lora_load=root)
    ours = run(tmp_path / "base_td", tmp_path / "a", lora_load=root)
    theirs = run(tmp_path / "merged_td", tmp_path / "b")
    expected = oracle.read_model(theirs)
    assert_merged(expected, with_adapters(base, adapters))
    assert all((w == expected[n]).all() for n, w in oracle.read_model(ours).items())
    with pytest.raises(ConversionError, match="torch_dist has no form of adapters"):
        run(base.path, tmp_path / "c", "torch_dist", lora_load=root, lora_only=True)


def test_the_merged_weight_must_fit_its_dtype(make_hf, adapters, oracle, tmp_path):
    hf = make_hf("fp16", dtype="F16")
    huge = {n: np.full(t.shape, np.float16(60000)).view(np.uint16) for n, t in hf.tensors.items()}
    hf = make_hf("huge", dtype="F16", extra=huge)
    large = {name: (np.abs(a) * 100, np.abs(b) * 100) for name, (a, b) in adapters.items()}
    peft = write_peft(tmp_path / "peft", oracle, large)
    with pytest.raises(ConversionError, match=r"with its adapter, .* too large for float16"):
        run(hf.path, tmp_path / "out", lora_load=peft)
    assert not (tmp_path / "out").exists()


def test_merging_takes_the_same_memory_however_many_weights_there_are(base, make_adapter):
    request = Request(
        load_dir=base.path, save_dir=base.path, save_format="hf", lora_load=make_adapter()
    )
    source = open_source(request)
    held = {
        id(value)
        for update in source.checkpoint.updates.values()
        for value in vars(update).values()
        if isinstance(value, Buffers)
    }
    assert len(source.checkpoint.updates) == 4 * LAYERS
    assert len(held) == 1
