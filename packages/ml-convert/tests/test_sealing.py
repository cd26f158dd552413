"""Files are finished by many threads, in whatever order these come to it."""

import hashlib

import numpy as np

from ml_convert.files import Files
from ml_convert.layout import Layout, Stored
from ml_convert.plan import Plan
from ml_convert.safetensors_file import SafetensorsFile
from ml_convert.sealing import Sealer
from ml_convert.target import NewFile, Target
from ml_convert.tensor import DTYPES

NAME, SHAPE, BF16 = "model.safetensors", (4, 1000), DTYPES["bfloat16"]


def one_file():
    """A target that is a file with one tensor."""
    content = SafetensorsFile({"a": (BF16, SHAPE)})
    layout = Layout(tensors=(Stored(NAME, "a", SHAPE, "a"),), rectangles={})
    return Target(layout=layout, dtypes=(BF16,), files=(NewFile(NAME, content, (0,)),))


def test_word_of_growth_that_comes_after_the_seal_changes_nothing(tmp_path):
    """The queue hands out what is done last first, so a thread may come to it that late."""
    target, sealed = one_file(), []
    checkpoint = target.checkpoint(tmp_path)
    plan = Plan(table=(), source=checkpoint, target=checkpoint)
    data = np.random.default_rng(0).integers(0, 256, (4, 2000), np.uint8)
    (extent,) = checkpoint.extents
    with (
        Files() as files,
        Sealer(plan, target, tmp_path, files, sealed=sealed.append) as seal,
    ):
        seal.create(NAME)
        files.write(extent.path, extent.offset, data)
        seal.grown(NAME, 3000)
        seal(NAME, {})
        seal.grown(NAME, 2000)
    (entry,) = sealed
    content = (tmp_path / NAME).read_bytes()
    assert content.endswith(data.tobytes())
    assert (entry.size, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
