"""Every layer is on one stage, and on the one where megatron-core builds it."""

import pytest

from ml_parallel import platform
from ml_parallel.stages import pipeline_layout, stage_layers
from ml_parallel.topology import Topology


def topology(pp, per_chunk=None, layers=None):
    return Topology(
        pipeline_model_parallel_size=pp,
        num_layers_per_virtual_pipeline_stage=per_chunk,
        num_layer_list=layers,
    )


CUTS = [
    (4, topology(1)),
    (8, topology(2)),
    (96, topology(12)),
    (8, topology(2, per_chunk=2)),
    (8, topology(2, per_chunk=1)),
    (32, topology(4, per_chunk=2)),
    (7, topology(2, layers=(4, 3))),
    (16, topology(4, layers=(4, 4, 5, 3))),
    (6, topology(3, layers=(1, 4, 1))),
]


@pytest.fixture(scope="module")
def engine():
    platform.import_engine()


def megatron_layers(num_layers, layout, pp_rank, chunk):
    """Return the layers that megatron-core would build on this stage."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    chunks = len(stage_layers(num_layers, layout)[0])
    virtual = chunks if chunks > 1 else None
    config = TransformerConfig(
        num_layers=num_layers,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=pipeline_layout(num_layers, layout),
        pipeline_dtype="float32",
    )
    stage = chunk if virtual else None
    parallel_state.set_pipeline_model_parallel_rank(pp_rank)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)
    try:
        first = get_transformer_layer_offset(config, vp_stage=stage)
        return range(first, first + get_num_layers_to_build(config, vp_stage=stage))
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.usefixtures("engine")
@pytest.mark.filterwarnings("ignore:full scope is deprecated")  # megatron-core warns of its default
@pytest.mark.parametrize(("num_layers", "layout"), CUTS)
def test_every_chunk_holds_the_layers_that_megatron_builds(num_layers, layout):
    stages = stage_layers(num_layers, layout)
    assert len(stages) == layout.pipeline_model_parallel_size
    for pp_rank, chunks in enumerate(stages):
        for chunk, layers in enumerate(chunks):
            assert layers == megatron_layers(num_layers, layout, pp_rank, chunk)


@pytest.mark.parametrize(("num_layers", "layout"), CUTS)
def test_every_layer_is_in_one_chunk(num_layers, layout):
    chunks = [layers for stage in stage_layers(num_layers, layout) for layers in stage]
    assert sorted(layer for layers in chunks for layer in layers) == list(range(num_layers))


def test_chunks_are_dealt_out_in_turn():
    assert stage_layers(8, topology(2, per_chunk=2)) == (
        (range(2), range(4, 6)),
        (range(2, 4), range(6, 8)),
    )


def test_only_a_layer_list_needs_a_layout():
    assert pipeline_layout(7, topology(2, layers=(4, 3))) == "Et*4|t*3L"
    assert pipeline_layout(8, topology(2, per_chunk=2)) is None
    assert pipeline_layout(8, topology(2)) is None


@pytest.mark.usefixtures("engine")
def test_a_layout_has_the_embedding_first_and_the_loss_last():
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    text = pipeline_layout(12, topology(4, layers=(2, 4, 5, 1)))
    layout = PipelineParallelLayerLayout(text, pipeline_model_parallel_size=4)
    layout.validate_layer_layout(num_layers=12, mtp_num_layers=None)
    decoder = LayerType.decoder
    assert layout.layout == [
        [[LayerType.embedding, decoder, decoder]],
        [[decoder] * 4],
        [[decoder] * 5],
        [[decoder, LayerType.loss]],
    ]


@pytest.mark.parametrize(
    ("num_layers", "layout", "message"),
    [
        (
            30,
            topology(4),
            "--pipeline-model-parallel-size 4: must divide --num-layers 30 "
            "(valid: 1, 2, 3, 5, 6, 10, 15, 30), or give --num-layer-list",
        ),
        (
            12,
            topology(2, per_chunk=4),
            "--num-layers-per-virtual-pipeline-stage 4: must divide the 6 layers of a stage "
            "into at least 2 chunks (valid: 1, 2, 3)",
        ),
        (
            12,
            topology(2, per_chunk=6),
            "--num-layers-per-virtual-pipeline-stage 6: must divide the 6 layers of a stage "
            "into at least 2 chunks (valid: 1, 2, 3)",
        ),
        (
            4,
            topology(4, per_chunk=1),
            "--num-layers-per-virtual-pipeline-stage 1: stages of 1 layer cannot be "
            "interleaved; leave it out",
        ),
        (
            8,
            topology(2, layers=(4, 3)),
            "--num-layer-list 4,3: must add up to --num-layers 8, not 7",
        ),
    ],
)
def test_an_impossible_cut_is_refused(num_layers, layout, message):
    for use in (stage_layers, pipeline_layout) if layout.num_layer_list else (stage_layers,):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - compared in full
            use(num_layers, layout)
        assert str(error.value) == message
