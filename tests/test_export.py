"""The export command: from a checkpoint to a folder, with what cannot be refused before work."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import tdm_jax
from tdm_jax import export
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tests.commands import run


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    model, variables = tiny_model("none")
    save_model(tmp_path / "model", describe(model), variables)
    return tmp_path / "model"


def test_a_checkpoint_with_a_method(checkpoint, tmp_path, capsys):
    model, variables = tdm_jax.load_pretrained(
        checkpoint, reducer="tdm", keep_rate=0.5, layers=(1,)
    )
    (tmp_path / "labels").write_text("\n".join(f"class {i}" for i in range(model.num_classes)))
    out = tmp_path / "out"
    run(
        export, f"--checkpoint={checkpoint}", "--reducer=tdm", "--keep_rate=0.5", "--layers=1",
        f"--labels={tmp_path / 'labels'}", "--platforms=cpu", "--batch_sizes=3", f"--output={out}",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "model_batch3.stablehlo: " in said
    assert "tdm 0.5: float32[b, 16, 16, 3] -> float32[b, " in said
    exported = tdm_jax.load_exported(out)
    assert exported.manifest["labels"][0] == "class 0"
    assert json.loads((out / "manifest.json").read_text())["model"] == describe(model)
    x = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(exported(x), model.apply(variables, jnp.asarray(x)), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--keep_rate=0.7,0.5", "--reducer=tdm"], "--keep_rate: an export has one; got 0.7, 0.5"),
        (["--platforms=gpu"], "unknown platform 'gpu'"),
        (["--format=stablehlo,keras"], "unknown format 'keras'"),
        (["--format=onnx", "--dtype=bfloat16"], "expected it for ONNX; got bfloat16"),
        (["--labels=nowhere"], "--labels=nowhere: not readable"),
        (["--checkpoint=deit_small_patch16_224"], "weights"),
    ],
)
def test_what_cannot_be(checkpoint, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(export, f"--checkpoint={checkpoint}", f"--output={tmp_path / 'out'}", *changes)
    assert not (tmp_path / "out").exists()
