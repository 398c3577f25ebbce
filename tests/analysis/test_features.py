"""Features of a split: as the model answers, once, and on after a stop."""

import jax
import numpy as np
import pytest
from PIL import Image

from tdm_jax import data, make_reducer
from tdm_jax.analysis import features
from tdm_jax.analysis.answers import Forward
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.features import extract
from tdm_jax.data.preprocessing import preprocess
from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import Preprocessing

HALF = Preprocessing(mean=(0.5,), std=(0.5,))


@pytest.fixture
def candidate(tiny_model):
    model, variables = tiny_model(
        image_size=28, patch_size=7, in_channels=1, num_classes=0, preprocessing=HALF
    )
    return Candidate("tiny", "none", None, model, variables)


@pytest.fixture
def config(candidate):
    return Evaluation({"name": "digits", "eval_batch_size": 48}).data_config(candidate.model)


@pytest.fixture
def calls(monkeypatch):
    """How many batches went through a model."""
    made, real = [], Forward.__call__

    def counted(self, *arguments):
        made.append(1)
        return real(self, *arguments)

    monkeypatch.setattr(Forward, "__call__", counted)
    monkeypatch.setattr(features, "_BLOCK", 144)
    return made


def test_they_are_what_the_model_answers(candidate, config, tmp_path):
    values, labels = extract(candidate, config, "validation", tmp_path)
    assert values.shape == (360, candidate.model.width) and values.dtype == np.float32
    source = data.open_source(config, "validation")
    assert labels.tolist() == [source[i]["label"] for i in range(360)]
    images = preprocess(candidate.model)([source[i]["image"] for i in (0, 359)])
    expected = jax.jit(candidate.model.apply)(candidate.variables, images)
    np.testing.assert_allclose(values[[0, 359]], expected, atol=1e-5)


def test_they_are_computed_once_and_go_on_after_a_stop(candidate, config, tmp_path, calls):
    first = extract(candidate, config, "validation", tmp_path)
    assert len(calls) == 8
    (folder,) = tmp_path.iterdir()
    blocks = sorted(folder.iterdir())
    assert len(blocks) == 3
    blocks[1].unlink()
    again = extract(candidate, config, "validation", tmp_path)
    assert len(calls) == 8 + 3
    for own, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(own, other)
    # The head does not matter; the method, the weights and the preparation do.
    model = candidate.model.clone(num_classes=10)
    params = {**candidate.variables["params"], "head": {"kernel": np.zeros((1, 10))}}
    headed = Candidate("tiny", "none", None, model, {"params": params})
    extract(headed, config, "validation", tmp_path)
    assert len(calls) == 11
    reduced = candidate.with_reducer(make_reducer("tome", r=2))
    extract(reduced, config, "validation", tmp_path)
    assert len(calls) == 19
    blocks[0].write_bytes(b"PK")
    with pytest.raises(InputError, match="is damaged"):
        extract(candidate, config, "validation", tmp_path)


def test_unreadable_images_are_left_out(candidate, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for number in range(3):
            path = tmp_path / "data" / split / "a" / f"{number}.png"
            Image.new("L", (30, 30), 40 * number).save(path)
    path.write_bytes(b"cut")
    settings = {"name": "folder", "data_dir": str(tmp_path / "data"), "eval_batch_size": 2}
    config = Evaluation(settings).data_config(candidate.model)
    assert len(extract(candidate, config, "train", tmp_path / "kept").labels) == 3
    assert len(extract(candidate, config, "validation", tmp_path / "kept").labels) == 2
