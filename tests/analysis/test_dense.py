"""Dense use: dropping everything is chance, keeping everything is no loss, and the command.

Covers tdm_jax.dense.
"""

import json

import numpy as np
import pytest
from PIL import Image

from tdm_jax import dense as command
from tdm_jax import make_reducer
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.dense import dense_rows, mean_iou
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tests import commands


@pytest.fixture
def candidate(tiny_model):
    model, variables = tiny_model(image_size=28, patch_size=4, in_channels=1, num_classes=0)
    return Candidate("tiny", "none", None, model, variables)


def test_intersection_over_union():
    labels = np.array([[0, 0, 1, 1]])
    assert mean_iou(labels, labels, 5) == 100
    # Of class 0 one of two is found, and one of class 1 is taken for it: 1/3 and 1/3.
    assert mean_iou(np.array([[0, 1, 0, 1]]), labels, 5) == pytest.approx(100 / 3)


@pytest.mark.slow
def test_rows(candidate, tmp_path):
    for split, label, grey in (("train", "a", 40), ("train", "b", 200), ("val", "a", 60)):
        (tmp_path / split / label).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (30, 30), grey + number).save(tmp_path / split / label / f"{number}.png")
    settings = {"name": "folder", "data_dir": str(tmp_path), "eval_batch_size": 16}
    config = Evaluation(settings).data_config(candidate.model)
    reducers = {"whole": make_reducer("topk", keep_rate=1.0, layers=(0,))}
    reducers["tome"] = make_reducer("tome", r=4)
    candidates = [
        Candidate("tiny", name, None, candidate.model.clone(reducer=own), candidate.variables)
        for name, own in reducers.items()
    ]
    none, whole, tome = dense_rows(candidates, config, train=40, test=24)
    assert none.method == "none" and none.examples == 24
    assert none.patches_percent > 90  # two classes, dark and light
    assert whole.patches_percent == none.patches_percent and whole.patches_over_unreduced == 0
    assert tome.macs < none.macs and tome.miou_percent > 80
    difference = tome.patches_percent - none.patches_percent
    assert tome.patches_over_unreduced == pytest.approx(difference)


@pytest.mark.slow
def test_the_command(candidate, tmp_path, capsys):
    save_model(tmp_path / "tiny", describe(candidate.model), candidate.variables)
    own = (f"--models={tmp_path / 'tiny'}", "--data=digits", "--eval_batch_size=16")
    few = ("--train_mosaics=16", "--test_mosaics=8", f"--output={tmp_path / 'out'}")
    commands.run(command, *own, *few, "--methods=tome", "--macs_ratio=0.8")
    rows = json.loads((tmp_path / "out" / "dense.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", "tome"]
    assert rows[1]["macs"] <= 0.8 * rows[0]["macs"]
    assert (tmp_path / "out" / "dense.md").read_text() == capsys.readouterr().out
    with pytest.raises(InputError, match="expected one of --models"):
        commands.run(command, *own, f"--models={tmp_path / 'tiny'},{tmp_path}/./tiny")
