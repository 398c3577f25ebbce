"""Predictions: every image once, whatever stops them, in shards that say what the model says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from tdm_jax import Preprocessing, preprocess
from tdm_jax.analysis import prediction
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.prediction import Wanted, predict
from tdm_jax.data import sources
from tdm_jax.data.preprocessing import data_config_for
from tdm_jax.errors import InputError

COUNT = 21


@pytest.fixture
def photos(tmp_path):
    """Photographs without classes, the eighth of which is damaged."""
    folder = tmp_path / "photos"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = draw.integers(0, 256, (20 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def candidate(tiny_model):
    model, variables = tiny_model("tdm", 0.5, layers=(1,), preprocessing=Preprocessing())
    return Candidate("tiny", "tdm", 0.5, model, jax.tree.map(jnp.asarray, variables))


def config(candidate, photos, **changes):
    settings = {"data_dir": str(photos), "eval_batch_size": 4, **changes}
    return data_config_for(candidate.model, "photos", **settings)


def read(folder):
    """All shards of a folder, one after the other."""
    shards = [dict(np.load(path)) for path in sorted(folder.glob("*.npz"))]
    return {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}


def test_it_says_what_the_model_says(candidate, photos, tmp_path):
    wanted = Wanted(("probabilities", "features", "patches"), top_k=2, shard=8)
    out = tmp_path / "out"
    done = predict(candidate, config(candidate, photos), "validation", out, wanted)
    assert (done["images"], done["written"]) == (COUNT, COUNT - 1)
    assert [name.endswith("07.png") for name in done["unreadable"]] == [True]
    assert (out / "_unreadable-0.txt").read_text().endswith("07.png\n")
    rows = read(out)
    assert sorted(rows["index"].tolist()) == [i for i in range(COUNT) if i != 7]
    assert "label" not in rows
    x = preprocess(candidate.model)([Image.open(name) for name in rows["name"]])
    apply = jax.jit(lambda v, x: candidate.model.apply(v, x, return_info=True))
    logits, info = apply(candidate.variables, x)
    likely, classes = jax.lax.top_k(jax.nn.softmax(logits), 2)
    np.testing.assert_allclose(rows["top_probabilities"], likely, atol=1e-5)
    np.testing.assert_array_equal(rows["top_labels"], classes)
    np.testing.assert_allclose(rows["features"], info.pooled, atol=1e-4)
    np.testing.assert_allclose(rows["patches"], info.patches, atol=1e-4)
    assert len(list(out.glob("*.npz"))) == 3


def test_what_was_stopped_goes_on(candidate, photos, tmp_path, monkeypatch):
    wanted, settings = Wanted(shard=8), config(candidate, photos)
    predict(candidate, settings, "validation", tmp_path / "whole", wanted)
    write, stops = prediction._write, iter([False, True, False, True])

    def stopping(path, rows):
        if next(stops, False):
            raise KeyboardInterrupt
        write(path, rows)

    monkeypatch.setattr(prediction, "_write", stopping)
    for shards in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            predict(candidate, settings, "validation", tmp_path / "out", wanted)
        assert len(list((tmp_path / "out").glob("part-*"))) == shards
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    done = predict(candidate, settings, "validation", tmp_path / "out", wanted)
    assert done["written"] == COUNT - 1
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    expected, rows = read(tmp_path / "whole"), read(tmp_path / "out")
    for key, values in expected.items():
        np.testing.assert_array_equal(rows[key], values)


@pytest.mark.parametrize("form", prediction.FORMATS)
def test_from_a_bucket_to_a_bucket(candidate, photos, bucket, form):
    settings = config(candidate, f"gs://bucket/{photos.name}")
    for _ in range(2):
        done = predict(
            candidate, settings, "validation", "gs://bucket/out", Wanted(shard=8, format=form)
        )
        assert (done["images"], done["written"]) == (COUNT, COUNT - 1)
        assert done["unreadable"] == ["gs://bucket/photos/07.png"]
    assert sorted(path.name for path in (bucket / "out").iterdir()) == [
        *("_predictions.json", "_unreadable-0.txt"),
        *(f"part-{start:012d}-0.{form}" for start in (0, 8, 16)),
    ]


def test_processes_share_the_images(candidate, photos, tmp_path):
    settings, out = config(candidate, photos, eval_batch_size=8), tmp_path / "out"
    counts = [
        predict(candidate, settings, "validation", out, Wanted(shard=4), process=(i, 2))["images"]
        for i in range(2)
    ]
    assert sum(counts) == COUNT
    assert sorted(read(out)["index"].tolist()) == [i for i in range(COUNT) if i != 7]


def test_parquet(candidate, photos, tmp_path):
    settings, outputs = config(candidate, photos), ("probabilities", "patches")
    for form in prediction.FORMATS:
        wanted = Wanted(outputs, shard=8, format=form)
        predict(candidate, settings, "validation", tmp_path / form, wanted)
    expected = read(tmp_path / "npz")
    table = pyarrow.parquet.read_table(tmp_path / "parquet")
    order = np.argsort(table["index"].to_numpy())
    names = np.array(table["name"].to_pylist())
    np.testing.assert_array_equal(names[order], expected["name"])
    values = np.array(table["top_probabilities"].to_pylist(), np.float32)
    np.testing.assert_array_equal(values[order], expected["top_probabilities"])
    (first, *_) = sorted((tmp_path / "parquet").glob("*.parquet"))
    shape = json.loads(pyarrow.parquet.read_schema(first).metadata[b"patches"])
    assert tuple(shape) == expected["patches"].shape[1:]


def test_a_folder_holds_one_models_answers(candidate, photos, tmp_path):
    settings, out = config(candidate, photos), tmp_path / "out"
    predict(candidate, settings, "validation", out)
    changed = jax.tree.map(lambda x: x + 1, candidate.variables)
    other = Candidate("tiny", "tdm", 0.5, candidate.model, changed)
    with pytest.raises(InputError, match="holds answers with other weights; expected a new folder"):
        predict(other, settings, "validation", out)
    with pytest.raises(InputError, match="holds answers with other top_k"):
        predict(candidate, settings, "validation", out, Wanted(top_k=1))
    (photos / "03.png").rename(photos / "3.png")
    sources._open.cache_clear()  # as in another process
    with pytest.raises(InputError, match="holds answers with other images"):
        predict(candidate, settings, "validation", out)
    (photos / "3.png").rename(photos / "03.png")
    sources._open.cache_clear()
    (shard,) = out.glob("part-*")
    shard.write_bytes(b"PK")
    with pytest.raises(InputError, match="is damaged: .* expected a shard"):
        predict(candidate, settings, "validation", out)


def test_digits_have_labels_and_classes(tiny_model, tmp_path):
    model, variables = tiny_model("none", in_channels=1, num_classes=10, image_size=28)
    one = Candidate("tiny", "none", None, model, jax.tree.map(jnp.asarray, variables))
    settings = data_config_for(model, "digits", eval_batch_size=64)
    predict(one, settings, "validation", tmp_path / "out")
    rows = read(tmp_path / "out")
    assert rows["label"].shape == rows["index"].shape == (360,)
    about = json.loads((tmp_path / "out" / "_predictions.json").read_text())
    assert about["classes"] == list("0123456789")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outputs": ()}, "expected outputs of probabilities"),
        ({"outputs": ("logits",)}, "unknown output 'logits'"),
        ({"format": "csv"}, "unknown format 'csv'"),
        ({"top_k": 0}, "expected top_k and shard of at least 1; got 0"),
    ],
)
def test_what_cannot_be_written(settings, message):
    with pytest.raises(InputError, match=message):
        Wanted(**settings)


def test_features_need_no_classes(tiny_model):
    model, _ = tiny_model("none", num_classes=0)
    Wanted(("features",)).check(model)
    with pytest.raises(InputError, match="a model without classes has no probabilities"):
        Wanted().check(model)
