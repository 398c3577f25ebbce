"""Candidates on a data set: how their images are prepared, and what the commands make of it.

Covers tdm_jax.evaluate and tdm_jax.compare.
"""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tdm_jax import compare, create_model, evaluate
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.data import make_config
from tdm_jax.errors import InputError
from tdm_jax.models.preprocessing import Preprocessing
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.training.config import default_config
from tdm_jax.training.loop import train_to_end
from tests import commands

DIGITS = {"image_size": 28, "patch_size": 7, "in_channels": 1, "num_classes": 10}
HALF = Preprocessing(mean=(0.5,), std=(0.5,), interpolation="bilinear")


@pytest.fixture
def make(tiny_model):
    def make(reducer="none", keep_rate=None, **settings):
        model, variables = tiny_model(reducer, keep_rate, **{**DIGITS, **settings})
        # Large enough for attention that differs from token to token.
        variables = jax.tree.map(lambda leaf: jnp.asarray(3 * leaf), variables)
        return Candidate("tiny", reducer, keep_rate, model, variables)

    return make


def save(candidate, path):
    save_model(path, describe(candidate.model), candidate.variables)
    return path


def test_images_are_prepared_as_the_model_says(make):
    """Defect A: whatever a model was trained with, its images were normalised by the data's."""
    model = make(preprocessing=HALF).model
    config = Evaluation({"name": "digits"}).data_config(model)
    assert (config.mean, config.std, config.interpolation) == ((0.5,), (0.5,), "bilinear")
    told = Evaluation({"name": "digits", "mean": [0.25]}).data_config(model)
    assert (told.mean, told.std) == ((0.25,), (0.5,))
    run = make_config(name="digits", eval_batch_size=120, mean=(0.1,))
    of_run = Evaluation(config=run).data_config(model)
    assert (of_run.eval_batch_size, of_run.mean) == (120, (0.5,))
    silent = make().model
    assert Evaluation(config=run).data_config(silent).mean == (0.1,)


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_commands_prepare_them_so_too(command, make, tmp_path, monkeypatch):
    """Defect A, for what the commands read from a checkpoint; flags change it."""
    path = save(make(preprocessing=HALF), tmp_path / "model")
    configs = []
    real = Evaluation.data_config

    def record(self, model):
        configs.append(real(self, model))
        return configs[-1]

    monkeypatch.setattr(Evaluation, "data_config", record)
    module, name = {"evaluate": (evaluate, "checkpoint"), "compare": (compare, "models")}[command]
    commands.run(module, f"--{name}={path}", "--data=digits", "--eval_batch_size=360", "--std=0.25")
    assert configs
    assert {(c.mean, c.std, c.interpolation) for c in configs} == {((0.5,), (0.25,), "bilinear")}


def test_grey_photographs_and_digits_in_colour(make, tmp_path):
    """Defect J: comparisons refused them, though training takes them."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("L", (30, 30), 40 * len(split)).save(tmp_path / split / label / "0.png")
    photos = Evaluation({"name": "folder", "data_dir": str(tmp_path), "eval_batch_size": 8})
    assert photos(make(num_classes=2)).examples == 2
    colour = make(in_channels=3)
    assert Evaluation({"name": "digits", "eval_batch_size": 360})(colour).examples == 360


def test_adaptive_methods_are_calibrated_and_the_others_stay(make):
    candidates = [make(), make("topk", 0.5, layers=(1,)), make("ats", 0.9, layers=(1,))]
    evaluation = Evaluation({"name": "digits", "eval_batch_size": 16})
    assert evaluation.calibrated(candidates, 0) == candidates
    none, topk, ats = evaluation.calibrated(candidates, 2)
    assert [none.model, topk.model] == [candidates[0].model, candidates[1].model]
    assert ats.model.reducer.schedule.counts is not None
    assert ats.model.schedule[-1].out < candidates[2].model.schedule[-1].out


def test_training_images_are_shuffled_and_of_one_size(make):
    evaluation = Evaluation({"name": "digits", "eval_batch_size": 50})
    batches = [np.asarray(batch) for batch in evaluation.training_images(make().model, 2)]
    assert [batch.shape for batch in batches] == [(50, 28, 28, 1)] * 2
    assert (batches[0] != batches[1]).any()


def test_explaining_shares_the_program_of_the_evaluation(make, monkeypatch):
    """Defect M: a report compiled every model twice."""
    candidate = make("topk", 0.5, layers=(1,))
    evaluation = Evaluation({"name": "digits", "eval_batch_size": 64})
    evaluation(candidate)
    images = np.random.default_rng(0).integers(0, 256, (70, 28, 28, 1), np.uint8)
    with monkeypatch.context() as patch:
        patch.delattr(VisionTransformer, "__call__")  # nothing is traced again
        logits, _, patches, (stage,) = evaluation.explain(candidate, images)
    assert logits.shape == (70, 10) and patches.shape[:2] == (70, 16)
    assert stage.assign.shape == (70, 16)
    config = evaluation.data_config(candidate.model)
    normalised = (images / 255 - config.mean[0]) / config.std[0]
    expected = jax.jit(candidate.model.apply)(candidate.variables, jnp.float32(normalised))
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_fidelity_is_to_the_unreduced_model_on_the_same_images(make, monkeypatch):
    whole, half = make(), make("topk", 0.5, layers=(1,))
    evaluation = Evaluation({"name": "digits", "eval_batch_size": 100}, fidelity=True)
    own = evaluation(whole, whole)
    assert own.fidelity.agreement.all()
    np.testing.assert_allclose(own.fidelity.cosine, 1, atol=1e-5)
    other = evaluation(half, whole)
    assert other.examples == own.examples == 360
    assert 0.5 < other.fidelity.cosine.mean() < 1 - 1e-5
    assert 0 < other.fidelity.dense_error.mean() < 1
    # Without room to remember, the unreduced model is asked again, and says the same.
    monkeypatch.setattr("tdm_jax.analysis.fidelity._REMEMBERED", 0)
    forgetful = Evaluation({"name": "digits", "eval_batch_size": 100}, fidelity=True)
    again = forgetful(half, whole)
    np.testing.assert_allclose(again.fidelity.cosine, other.fidelity.cosine, atol=1e-6)
    np.testing.assert_array_equal(again.top1, other.top1)


def test_what_draws_is_tried_several_times(make):
    evaluation = Evaluation({"name": "digits", "eval_batch_size": 360})
    chance = make("random", 0.5, layers=(0,))
    each = [evaluation(chance, seed=seed) for seed in (0, 1)]
    assert (each[0].loss != each[1].loss).any()
    both = evaluation.repeated(chance, tries=2)
    np.testing.assert_allclose(both.loss, (each[0].loss + each[1].loss) / 2)
    topk = make("topk", 0.5, layers=(1,))
    np.testing.assert_array_equal(evaluation.repeated(topk, tries=2).loss, evaluation(topk).loss)


def test_photos_without_classes(make, tmp_path):
    for number in range(3):
        Image.new("L", (30, 30), 40 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"cut")
    settings = {"name": "photos", "data_dir": str(tmp_path), "eval_batch_size": 2}
    outcome = Evaluation(settings, fidelity=True)(make("topk", 0.5, layers=(1,)))
    assert outcome.top1 is None and outcome.examples == 2
    assert "agreement_percent" in outcome.columns() and "top1_percent" not in outcome.columns()
    with pytest.raises(InputError, match="photos has 0 classes; the model has 10"):
        Evaluation(settings)(make())


def test_a_model_without_a_head_has_fidelity_alone(make):
    evaluation = Evaluation({"name": "digits", "eval_batch_size": 360}, fidelity=True)
    columns = evaluation(make("topk", 0.5, layers=(1,), num_classes=0)).columns()
    assert columns["cosine"] < 1
    assert not {"top1_percent", "agreement_percent"} & columns.keys()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished training with TopK in block 1."""
    path = tmp_path_factory.mktemp("run") / "workdir"
    config = default_config(name="digits")
    config.model = {"name": "vit", "patch_size": 7, "width": 16, "depth": 3, "num_heads": 2}
    config.reducer = {"name": "topk", "keep_rate": 0.75, "layers": (1,)}
    config.steps = 1
    config.optim.warmup_epochs = 0.0
    config.data.eval_batch_size = 360
    train_to_end(config, path)
    return path


def rows_of(path):
    return json.loads(Path(path).read_text())["rows"]


@pytest.mark.slow
def test_a_working_directory_has_its_data_reducer_and_layers(workdir, tmp_path, capsys):
    out = tmp_path / "rows.json"
    commands.run(evaluate, f"--checkpoint={workdir}", f"--output={out}")
    (own,) = rows_of(out)
    trained = json.loads((workdir / "result.json").read_text())
    assert own["top1_percent"] == trained["top1"]
    assert (own["model"], own["method"], own["keep_rate"]) == ("workdir", "topk", 0.75)
    assert own["tokens"] == [16, 12, 12]
    commands.run(evaluate, f"--checkpoint={workdir}", "--keep_rate=0.5", f"--output={out}")
    assert rows_of(out)[0]["tokens"] == [16, 8, 8]
    commands.run(evaluate, f"--checkpoint={workdir}", "--reducer=evit", f"--output={out}")
    assert rows_of(out)[0]["tokens"][0] == 16 > rows_of(out)[0]["tokens"][1]
    assert "| Top-5 (%) |" in capsys.readouterr().out


def test_a_learned_reducer_without_weights_is_one_line(workdir):
    """Defect D: it ended in a traceback of flax."""
    with pytest.raises(InputError, match="reducer") as caught:
        commands.run(evaluate, f"--checkpoint={workdir}", "--reducer=dyvit")
    assert "\n" not in str(caught.value)


def test_layers_of_a_run_are_for_methods_with_stages(workdir, tmp_path):
    """Defect D: ToMe and A-ViT got them, unlike in a comparison."""
    out = tmp_path / "out"
    commands.run(evaluate, f"--checkpoint={workdir}", "--reducer=tome", f"--output={out}.json")
    commands.run(compare, f"--models={workdir}", "--methods=tome", f"--output={out}")
    (evaluated,), (_, compared) = (rows_of(p) for p in (f"{out}.json", out / "comparison.json"))
    assert evaluated["macs"] == compared["macs"]


@pytest.mark.slow
def test_the_comparison_calibrates(make, tmp_path):
    """Defect M: it could not."""
    path = save(make(), tmp_path / "model")
    names = (f"--models={path}", "--methods=ats", "--keep_rates=0.9", "--layers=1")
    data = ("--data=digits", "--eval_batch_size=64")
    for calibrate in (0, 1):
        output = f"--output={tmp_path / str(calibrate)}"
        commands.run(compare, *names, *data, f"--calibrate={calibrate}", output)
    loose, fixed = (rows_of(tmp_path / name / "comparison.json")[1] for name in "01")
    assert fixed["macs"] < loose["macs"]
    with pytest.raises(InputError, match="calibration needs training images; expected --data"):
        commands.run(compare, *names, "--calibrate=1")


def test_the_command_compares(make, tmp_path, capsys):
    path = save(make(), tmp_path / "model")
    names = (f"--models={path}", "--methods=topk", "--keep_rates=0.5", "--layers=1")
    data = ("--data=digits", "--eval_batch_size=180")
    commands.run(compare, *names, *data, f"--output={tmp_path / 'out'}")
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [row["method"] for row in written["rows"]] == ["none", "topk"]
    assert all(0 < row["top1_percent"] < 100 for row in written["rows"])
    assert written["about"]["jax"] == jax.__version__
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text == capsys.readouterr().out
    assert "JAX" in text
    assert (tmp_path / "out" / "comparison.csv").exists()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (compare, [], "no model given"),
        (compare, ["--models=deit_tiny_patch16_224", "--keep_rates=much"], "expected numbers; got"),
        (compare, ["--entry=deit_tiny_patch16_224"], "MODEL:METHOD:KEEP_RATE"),
        (evaluate, ["--checkpoint=x", "--reducer=none"], "an evaluation needs data"),
        (evaluate, ["--checkpoint=x.pth", "--data=digits"], "x.pth: no such file or folder"),
    ],
)
def test_bad_flags(module, arguments, message):
    with pytest.raises(InputError, match=message):
        commands.run(module, *arguments)


def test_a_command_fails_in_one_line_with_code_2():
    command = [sys.executable, "-m", "tdm_jax.evaluate", "--checkpoint=x.pth", "--data=digits"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: x.pth: no such file or folder; expected a checkpoint\n"


def test_a_name_has_no_accuracy():
    model = create_model("deit_tiny_patch16_224")
    with pytest.raises(InputError, match="name without weights"):
        Evaluation({"name": "digits"}).check([Candidate("deit", "none", None, model)])
