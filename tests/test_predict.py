"""The predict command: from a checkpoint and photographs to a folder of answers."""

import numpy as np
import pytest
from PIL import Image

from tdm_jax import predict
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import Preprocessing
from tests.commands import run


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    model, variables = tiny_model("none", preprocessing=Preprocessing())
    save_model(tmp_path / "model", describe(model), variables)
    return tmp_path / "model"


def test_photographs(checkpoint, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 30), (80 * i, 9, 9)).save(tmp_path / "photos" / f"{i}.png")
    run(
        predict, f"--checkpoint={checkpoint}", "--reducer=tdm", "--keep_rate=0.5", "--layers=1",
        "--data=photos", f"--data_dir={tmp_path / 'photos'}", "--outputs=probabilities,features",
        f"--output={tmp_path / 'out'}",
    )  # fmt: skip
    assert "3 of 3 images, 0 unreadable" in capsys.readouterr().out
    (shard,) = (tmp_path / "out").glob("*.npz")
    rows = np.load(shard)
    assert rows["features"].shape == (3, 16)
    np.testing.assert_allclose(rows["top_probabilities"].sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "predictions are of images; expected --data; got none"),
        (["--data=photos", "--keep_rate=0.5,0.7", "--reducer=tdm"], "expected one; got 0.5, 0.7"),
        (["--data=photos", "--outputs=logits"], "unknown output 'logits'"),
        (["--data=photos", "--output="], "expected --output; got none"),
    ],
)
def test_what_cannot_be(checkpoint, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(predict, f"--checkpoint={checkpoint}", f"--output={tmp_path / 'out'}", *changes)
