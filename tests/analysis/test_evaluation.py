import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tdm_jax.checkpoint import describe, save_model
from tdm_jax.data import make_config
from tdm_jax.errors import InputError
from tdm_jax.models.registry import create_model
from tdm_jax.parallel import sharding
from tdm_jax.parallel.sharding import MeshConfig
from tdm_jax.training.evaluator import Evaluator

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model():
    return create_model(
        "vit",
        "evit",
        keep_rate=0.5,
        layers=(1,),
        image_size=28,
        patch_size=7,
        width=16,
        depth=2,
        num_heads=2,
        num_classes=10,
        in_channels=1,
    )


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))


def test_every_example_counts_once_whatever_the_batch_size(model, params):
    results = []
    for batch, devices in ((360, 1), (50, 8), (7, 1), (1000, 8)):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
        source = make_config(name="digits", eval_batch_size=batch)
        results.append(Evaluator(model, source, mesh, params)(params))
    assert results[0]["count"] == 360
    for result in results[1:]:
        for name in ("count", "top1", "top5"):
            assert result[name] == results[0][name]
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 35}, r"images of \(35, 35, 1\); the model takes \(28, 28, 1\)"),
        ({"name": "folder"}, "has 2 classes; the model has 10"),
    ],
)
def test_other_data_than_the_models(settings, message, model, params, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.png").write_bytes(b"never decoded")
    shape = {"image_size": 28, "channels": 1, "mean": (0.5,), "std": (0.5,)}
    given = {"name": "digits"} | shape | settings
    if given["name"] == "folder":
        given["data_dir"] = str(tmp_path)
    mesh = sharding.make_mesh(MeshConfig())
    with pytest.raises(InputError, match=message):
        Evaluator(model, make_config(given), mesh, params)


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "tdm_jax.evaluate", *flags],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )  # fmt: skip


def test_the_command_prints_a_table_and_writes_json(model, params, tmp_path):
    save_model(tmp_path / "model", describe(model), params)
    done = run(
        f"--checkpoint={tmp_path}/model",
        "--data=digits",
        "--reducer=tdm",
        "--keep_rate=0.7,0.5",
        "--layers=1",
        f"--output={tmp_path}/result.json",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 4
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [row["keep_rate"] for row in rows] == [0.7, 0.5]
    assert [row["tokens"] for row in rows] == [[16, 12], [16, 8]]
    assert all(row["examples"] == 360 for row in rows)


def test_the_command_reports_bad_input_in_one_line(tmp_path):
    done = run(f"--checkpoint={tmp_path}/missing.pth", "--data=digits")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/missing.pth: no such file or folder; " \
        "expected a checkpoint\n"  # fmt: skip
