"""ONNX programs answer as the models do, in standard operators, for a batch of any size.

They need the extra `onnx`; continuous integration installs it for this file (.ci/run).
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdm_jax
from tdm_jax import benchmark, export
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tdm_jax.exporting import artifact, onnx
from tdm_jax.exporting.artifact import export_model, load_exported
from tdm_jax.exporting.stablehlo import Options, Program
from tdm_jax.models.folding import fold
from tests import commands
from tests.exporting.test_artifact import (
    METHODS,
    OTHERS,
    SETTINGS,
    answers_of,
    images,
    random_model,
    takes_decoded_images,
    what_the_document_shows,
)

ONNX = Options(formats=("onnx",))
RANDOM = ("random", "random+tdm")


@pytest.fixture
def extra():
    """Skips where the extra is not installed."""
    for name in onnx.PACKAGES:
        pytest.importorskip(name, reason="needs the extra onnx: pip install -e '.[onnx]'")


def answers_in_onnx(model, variables, folder, x):
    """What ONNX Runtime says, by a program of standard operators alone."""
    graph = onnx.convert(Program(*fold(model, variables), ONNX))
    assert {node.domain for node in graph.graph.all_nodes()} == {""} and not graph.functions
    assert graph.opset_imports == {"": onnx.OPSET}
    # Linear maps by the fast operator.
    sums = [node for node in graph.graph.all_nodes() if node.op_type == "Einsum"]
    assert not {"abc,cd->abd"} & {node.attributes["equation"].value for node in sums}
    onnx.write(graph, folder / onnx.PROGRAM, "inside")
    return [onnx.Session(folder / onnx.PROGRAM).call(part) for part in x]


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize("name", ["none", *(name for name in METHODS if name not in RANDOM)])
def test_every_method(name, tiny_model, tmp_path):
    if name == "atc" and jax.__version_info__ >= (0, 11):
        pytest.skip("jax2onnx 0.13 does not read the scan of jax 0.11")
    model, variables = tiny_model(name, **SETTINGS.get(name, {}))
    variables = jax.tree.map(jnp.asarray, variables)
    x = [images(1, model.image_size[0]), images(3, model.image_size[0])]
    for got, part in zip(answers_in_onnx(model, variables, tmp_path, x), x, strict=True):
        np.testing.assert_allclose(got, answers_of(model, variables, part), atol=1e-5)


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize("family", OTHERS)
def test_every_family(family, tmp_path):
    model, variables = random_model("tome", r=2, depth=2, **OTHERS[family])
    (got,) = answers_in_onnx(model, variables, tmp_path, [images()])
    np.testing.assert_allclose(got, answers_of(model, variables, images()), atol=1e-5)


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize("name", RANDOM)
def test_random_draws_are_refused_before_anything_is_written(name, tmp_path):
    model, variables = random_model(name)
    with pytest.raises(InputError, match="no ONNX program of this model: the method draws random"):
        export_model(tmp_path / "out", model, variables, ONNX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("extra")
@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_beside_stablehlo_and_alone(weights, tmp_path):
    model, variables = random_model(layers=(1, 2), keep_rate=0.5)
    options = Options(formats=("stablehlo", "onnx"), platforms=("cpu",), weights=weights)
    manifest = export_model(tmp_path / "out", model, variables, options)
    assert manifest["programs"] == {
        "stablehlo": {"model.stablehlo": None},
        "onnx": {"model.onnx": None},
    }
    assert manifest["opset"] == onnx.OPSET and {"jax2onnx", "onnx"} < set(manifest["versions"])
    assert ("model.onnx.data" in manifest["sha256"]) == (weights == "beside")
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text()) | {
        name: manifest[name] for name in ("formats", "platforms", "batch_sizes")
    }
    x = images(3)
    exported = load_exported(tmp_path / "out", "onnx")
    assert isinstance(exported.programs[None], onnx.Session)
    np.testing.assert_allclose(exported(x), answers_of(model, variables, x), atol=1e-5)
    with pytest.raises(InputError, match=r"expected images float32\[b, 16, 16, 3\]; got uint8"):
        exported(x.astype(np.uint8))
    np.save(tmp_path / "x.npy", x)
    code = what_the_document_shows(
        tmp_path / "out", tmp_path / "x.npy", tmp_path / "y.npy", "import onnxruntime"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), exported(x))


@pytest.mark.usefixtures("extra")
def test_the_command(tmp_path, tiny_model, capsys):
    model, variables = tiny_model("none")
    save_model(tmp_path / "model", describe(model), variables)
    out = tmp_path / "out"
    commands.run(
        export, f"--checkpoint={tmp_path / 'model'}", "--reducer=tome", f"--output={out}",
        "--format=onnx",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "model.onnx: " in said and "; onnx opset 21" in said
    x = images(3)
    reduced, variables = tdm_jax.load_pretrained(tmp_path / "model", reducer="tome")
    got = tdm_jax.load_exported(out)(x)
    np.testing.assert_allclose(got, answers_of(reduced, variables, x), atol=1e-5)


@pytest.mark.usefixtures("extra")
def test_decoded_images_of_any_size(tmp_path):
    model, variables = random_model(layers=(1,), keep_rate=0.5)
    options = Options(("onnx",), preprocessing=True)
    takes_decoded_images(tmp_path / "out", model, variables, options)


@pytest.mark.usefixtures("extra")
def test_what_is_wrong_is_written_nowhere(tmp_path, monkeypatch):
    model, variables = random_model("none")
    monkeypatch.setattr(artifact, "TOLERANCE", {"onnx": -1.0})
    with pytest.raises(RuntimeError, match="the program for batch None is off by"):
        export_model(tmp_path / "out", model, variables, ONNX)
    monkeypatch.setattr(onnx, "_LARGEST", 1000)
    with pytest.raises(InputError, match="expected weights beside; got inside"):
        export_model(tmp_path / "out", model, variables, ONNX)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "broken.onnx").write_bytes(b"no program")
    with pytest.raises(InputError, match="broken.onnx: ONNX Runtime: "):
        onnx.Session(tmp_path / "broken.onnx")


@pytest.mark.usefixtures("extra")
def test_it_is_timed_beside_the_unreduced_model(tmp_path, monkeypatch, capsys):
    model, _ = random_model("tome", r=2)
    one = Candidate("tiny", "tome", None, model)
    monkeypatch.setattr(benchmark, "make_candidates", lambda **names: [one])
    quick = ("--modes=onnx", "--batch_sizes=2", "--rounds=2", "--min_seconds=0")
    commands.run(benchmark, *quick, "--dtypes=float32", f"--output={tmp_path}")
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [(row["method"], row["mode"]) for row in rows] == [("none", "onnx"), ("tome", "onnx")]
    assert rows[1]["speedup"] > 0 and "| onnx |" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected it for ONNX; got bfloat16"):
        commands.run(benchmark, *quick, "--dtypes=float32,bfloat16")


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    message = "ONNX needs jax2onnx, onnx, onnxruntime: .*pip install 'tdm_jax\\[onnx\\]'"
    with pytest.raises(InputError, match=message):
        export_model(tmp_path / "out", *random_model("none"), ONNX)
    assert list(tmp_path.iterdir()) == []
