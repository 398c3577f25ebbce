"""Exports: the same answers in a process without this library, checked before they get a name.

With `tdm_jax.exporting.stablehlo`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tdm_jax
from tdm_jax.errors import InputError
from tdm_jax.exporting import artifact
from tdm_jax.exporting.artifact import export_model, load_exported
from tdm_jax.exporting.stablehlo import Options, Program
from tdm_jax.models.folding import fold
from tdm_jax.models.preprocessing import Preprocessing

SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 3, "num_heads": 2}
PREPARED = Preprocessing(crop_pct=0.875)
DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"


def what_the_document_shows(folder, images, answers, needs="from jax import export"):
    """The program of docs/export.md for other images, which stores its answers."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if f"\n{needs}" in block]
    block = block.replace('"deit_small_tdm"', repr(str(folder)))
    block = re.sub(r"images = np\.zeros\(.*\)", f"images = np.load({str(images)!r})", block)
    alone = 'import sys; assert not {"tdm_jax", "flax"} & set(sys.modules)'
    return f"{block}\nnp.save({str(answers)!r}, np.asarray(answers))\n{alone}"


def random_model(reducer="tdm", **settings):
    sizes = {"num_classes": 5, "preprocessing": PREPARED, **SIZES}
    names = {"layers", "keep_rate", "r", "source_r"}
    own = {key: value for key, value in settings.items() if key in names}
    fields = {key: value for key, value in settings.items() if key not in names}
    made = tdm_jax.make_reducer(reducer, **own)
    model = tdm_jax.create_model("vit", made, **{**sizes, **fields})
    shape = (1, *model.image_size, model.in_channels)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    draw = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda x: jnp.asarray(0.2 * draw.standard_normal(x.shape), jnp.float32), shapes
    )


def images(batch=2, size=16):
    return np.random.default_rng(1).standard_normal((batch, size, size, 3)).astype(np.float32)


def answers_of(model, variables, x):
    return np.asarray(jax.jit(model.apply)(variables, x))


@pytest.mark.parametrize("weights", ["inside", "beside"])
def test_a_process_without_this_library_answers_the_same(tmp_path, weights):
    model, variables = random_model(layers=(1, 2), keep_rate=0.5)
    export_model(tmp_path / "out", model, variables, Options(weights=weights))
    x = images(3)
    np.save(tmp_path / "x.npy", x)
    code = what_the_document_shows(tmp_path / "out", tmp_path / "x.npy", tmp_path / "y.npy")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    # To rounding: a program for a batch of any size keeps its norms apart from the products.
    said, expected = np.load(tmp_path / "y.npy"), answers_of(model, variables, x)
    np.testing.assert_allclose(said, expected, rtol=0, atol=1e-6)


def test_every_size_of_a_batch_and_those_of_their_own(tmp_path):
    model, variables = random_model(layers=(1,), keep_rate=0.5)
    manifest = export_model(tmp_path / "out", model, variables, Options(batch_sizes=(1, 4)))
    exported = load_exported(tmp_path / "out")
    assert set(exported.programs) == {None, 1, 4}
    assert exported.programs[4].in_avals[0].shape == (4, 16, 16, 3)
    for batch in (1, 2, 4):
        x = images(batch)
        np.testing.assert_allclose(exported(x), answers_of(model, variables, x), atol=1e-5)
    assert exported.manifest == json.loads(json.dumps(manifest))
    assert manifest["input"] == {"shape": ["b", "16", "16", "3"], "dtype": "float32"}
    assert manifest["output"] == {"shape": ["b", 5], "dtype": "float32"}
    assert manifest["programs"]["stablehlo"]["model_batch4.stablehlo"] == 4
    assert manifest["model"]["reducer"]["name"] == "tdm"
    assert manifest["tokens"] == [16, 16, 8, 8]
    cost = tdm_jax.cost.count(model)
    assert (manifest["multiply_adds"], manifest["parameters"]) == (cost.macs, cost.parameters)


METHODS = [name for name in tdm_jax.list_reducers() if name != "none"]
QUICK = ("tdm", "tome", "ats")
# Where a method's own do not fit three blocks.
SETTINGS = {"kmedoids": {"layers": (1,)}, "diffrate": {"merge_kept": (17, 12, 9)}}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_every_method(name, tiny_model):
    model, variables = tiny_model(name, **SETTINGS.get(name, {}))
    variables = jax.tree.map(jnp.asarray, variables)
    program = Program(*fold(model, variables), Options())
    exported = program.exported()
    assert exported.platforms == ("cpu", "cuda", "tpu")
    x = images(2, model.image_size[0])
    got = exported.call(x)
    np.testing.assert_allclose(got, answers_of(model, variables, x), atol=1e-5)


OTHERS = {
    "pooled by attention": {"pool": "map", "class_token": False},
    "rotary": {"rotary": {"temperature": 100.0}, "positions": "none", "num_registers": 2},
    "mean": {"pool": "avg", "fc_norm": True},
    "pre-norm, quick": {"pre_norm": True, "activation": "quick_gelu", "head_bias": False},
    "gated, scaled": {"gated_mlp": True, "activation": "silu", "layer_scale": True},
    "distilled": {"distilled": True},
    "features": {"num_classes": 0},
}


QUICK_FAMILIES = ("pooled by attention", "rotary")
FAMILIES = [
    name if name in QUICK_FAMILIES else pytest.param(name, marks=pytest.mark.slow)
    for name in OTHERS
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, dtype):
    model, variables = random_model("tome", r=2, depth=2, **OTHERS[family])
    program = Program(model, variables, Options(platforms=("cpu",), dtype=dtype))
    got = program.exported().call(images())
    assert got.dtype == jnp.float32
    expected = answers_of(model.clone(dtype=jnp.dtype(dtype)), variables, images())
    np.testing.assert_allclose(got, expected, atol=1e-5 if dtype == "float32" else 2e-2)


def takes_decoded_images(folder, model, variables, options):
    """An export answers to decoded images of any size as to prepared ones."""
    export_model(folder, model, variables, options)
    exported = load_exported(folder)
    assert exported.manifest["input"] == {"shape": ["b", "h", "w", "3"], "dtype": "uint8"}
    preprocess = tdm_jax.preprocess(model)
    for height, width in ((40, 31), (25, 90)):
        pixels = np.random.default_rng(2).integers(0, 256, (2, height, width, 3), np.uint8)
        expected = answers_of(model, variables, preprocess(pixels))
        np.testing.assert_allclose(exported(pixels), expected, atol=0.05)


def test_decoded_images_of_any_size(tmp_path):
    model, variables = random_model(layers=(1,), keep_rate=0.5)
    takes_decoded_images(tmp_path / "out", model, variables, Options(preprocessing=True))
    plain = model.clone(preprocessing=None)
    with pytest.raises(InputError, match="does not say how its images are prepared"):
        export_model(tmp_path / "other", plain, variables, Options(preprocessing=True))
    assert not (tmp_path / "other").exists()


def test_half_the_bytes_in_bfloat16(tmp_path):
    model, variables = random_model("tome", r=2)
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        options = Options(weights="beside", dtype=dtype, platforms=("cpu",))
        export_model(tmp_path / dtype, model, variables, options)
        sizes[dtype] = (tmp_path / dtype / "weights.safetensors").stat().st_size
    assert sizes["bfloat16"] < 0.65 * sizes["float32"]


def test_corrections_of_the_kernels_are_folded(tmp_path):
    model, variables = random_model("tocom", r=3, source_r=1)
    export_model(tmp_path / "out", model, variables, Options(weights="beside"))
    exported = load_exported(tmp_path / "out")
    assert not any("reducer" in name for name in exported.weights)
    np.testing.assert_allclose(exported(images()), answers_of(model, variables, images()), 1e-4)


def test_what_is_wrong_is_written_nowhere(tmp_path, monkeypatch):
    model, variables = random_model()
    with pytest.raises(InputError, match="expected 5 labels; got 1"):
        export_model(tmp_path / "out", model, variables, labels=["one"])
    monkeypatch.setattr(artifact, "TOLERANCE", {"stablehlo": -1.0})
    with pytest.raises(RuntimeError, match="the program for batch None is off by"):
        export_model(tmp_path / "out", model, variables)
    assert list(tmp_path.iterdir()) == []


def test_only_an_export_is_replaced(tmp_path):
    model, variables = random_model("none")
    options = Options(platforms=("cpu",))
    export_model(tmp_path / "out", model, variables, options)
    with pytest.raises(InputError, match="--overwrite would replace it"):
        export_model(tmp_path / "out", model, variables, options)
    labels = list("abcde")
    export_model(tmp_path / "out", model, variables, options, labels=labels, overwrite=True)
    assert load_exported(tmp_path / "out").manifest["labels"] == labels
    (tmp_path / "out" / "mine.txt").write_text("notes")
    with pytest.raises(InputError, match="not an exported model, so it stays"):
        export_model(tmp_path / "out", model, variables, options, overwrite=True)


def test_a_damaged_export_is_refused(tmp_path):
    model, variables = random_model("none")
    out = tmp_path / "out"
    export_model(out, model, variables, Options(platforms=("cpu",)))
    exported = load_exported(out)
    with pytest.raises(InputError, match="unknown format 'onnx'; expected one of: stablehlo"):
        load_exported(out, "onnx")
    with pytest.raises(InputError, match=r"expected images float32\[b, 16, 16, 3\]; got uint8"):
        exported(np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(InputError, match=r"got float32\[1, 8, 16, 3\]"):
        exported(np.zeros((1, 8, 16, 3), np.float32))
    program = out / "model.stablehlo"
    program.write_bytes(program.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="missing, or not the file that was exported"):
        load_exported(out)
    (out / "manifest.json").write_text('{"format": "tdm_jax.export", "sha256": {}}')
    with pytest.raises(
        InputError, match="expected formats, input, output, programs, weights in it"
    ):
        load_exported(out)
    (out / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="expected format tdm_jax.export; got 'other'"):
        load_exported(out)
    with pytest.raises(InputError, match="not readable"):
        load_exported(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ()}, "expected formats of stablehlo, onnx; got none"),
        ({"formats": ("keras",)}, "unknown format 'keras'"),
        ({"formats": ("onnx",), "dtype": "bfloat16"}, "expected it for ONNX; got bfloat16"),
        ({"formats": ("onnx",), "batch_sizes": (1,)}, "expected batch sizes for StableHLO alone"),
        ({"platforms": ()}, "expected platforms of cpu"),
        ({"platforms": ("gpu",)}, "unknown platform 'gpu'"),
        ({"batch_sizes": (0,)}, "expected positive batch sizes; got 0"),
        ({"weights": "away"}, "unknown place of weights 'away'"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Options(**options)
