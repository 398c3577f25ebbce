"""Sweeps: what is trained from what, what is kept, and how a killed one goes on.

Covers tdm_jax.sweep.
"""

import dataclasses
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, load_pretrained, make_reducer
from tdm_jax import sweep as command
from tdm_jax.analysis import sweep as sweeping
from tdm_jax.analysis.candidate import make_candidate
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.sweep import Point, sweep
from tdm_jax.analysis.timing import Timing
from tdm_jax.checkpoint import describe, save_model
from tdm_jax.errors import InputError
from tdm_jax.training.config import default_config
from tdm_jax.training.metric_writer import Progress
from tests import commands

SIZES = {"patch_size": 7, "width": 16, "depth": 2, "num_heads": 2}
DIGITS = Evaluation({"name": "digits", "eval_batch_size": 200})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = create_model("vit", **SIZES, image_size=28, in_channels=1, num_classes=10)
    path = tmp_path_factory.mktemp("sweep") / "tiny"
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    save_model(path, describe(model), params)
    return str(path)


@pytest.fixture
def candidates(saved):
    return [make_candidate(saved, "topk", rate, layers=(1,)) for rate in (0.75, 0.5)]


@pytest.fixture
def config():
    config = default_config(name="digits")
    config.model = {"name": "vit", **SIZES}
    config.steps = 2
    config.optim.warmup_epochs = 0.0
    config.data.eval_batch_size = 200
    return config


@pytest.fixture
def trained(monkeypatch):
    """Stands in for training: remembers what was asked, and leaves weights that the seed moved."""
    asked = []

    def train(config, workdir):
        asked.append((config, workdir))
        settings = config.reducer.to_dict()
        reducer = make_reducer(settings.pop("name"), **settings)
        model, variables = load_pretrained(config.init_from, reducer)
        moved = jax.tree.map(lambda leaf: leaf * (1.0 + config.seed), variables)
        save_model(workdir / "model", describe(model), moved)

    monkeypatch.setattr(sweeping, "train_to_end", train)
    return asked


@pytest.mark.slow
def test_off_the_shelf(candidates, tmp_path):
    rows = sweep(candidates, DIGITS, tmp_path, timing=Timing(2, 0.0, 1), batch_size=1)
    assert [(row.method, row.keep_rate) for row in rows] == [
        ("none", None),
        ("topk", 0.75),
        ("topk", 0.5),
    ]
    assert rows[0].macs > rows[1].macs > rows[2].macs
    assert all(0 < row.top1_percent < 100 and row.speedup > 0 for row in rows)
    assert len(list((tmp_path / "points").iterdir())) == 3


@pytest.mark.slow
def test_each_point_is_trained_from_the_checkpoint(candidates, config, trained, tmp_path):
    rows = sweep(candidates, DIGITS, tmp_path, config=config, seeds=(0, 4))
    methods = [config.reducer.to_dict() for config, _ in trained]
    topk = {"name": "topk", "layers": [1]}
    assert methods == [{"name": "none"}] * 2 + [
        {**topk, "keep_rate": rate} for rate in (0.75, 0.75, 0.5, 0.5)
    ]
    assert {config.init_from for config, _ in trained} == {candidates[0].name}
    assert [config.seed for config, _ in trained] == [0, 4] * 3
    assert len({workdir for _, workdir in trained}) == 6
    tuned = [row for row in rows if row.training == "fine-tuned"]
    for row in tuned:
        assert len(row.top1_each) == 2 and row.top1_each[0] != row.top1_each[1]
        assert row.top1_percent == pytest.approx(np.mean(row.top1_each))
        assert row.top1_spread == pytest.approx(np.std(row.top1_each, ddof=1))
        # With seed 0 the stand-in leaves the weights as they are off the shelf.
        shelf = next(r for r in rows if r.training != row.training and r.macs == row.macs)
        assert row.top1_each[0] == shelf.top1_percent and shelf.top1_spread is None
    assert tuned[1].over_unreduced == pytest.approx(tuned[1].top1_percent - tuned[0].top1_percent)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(candidates, config, trained, tmp_path, monkeypatch):
    real, left = Evaluation.__call__, [2]

    def killed(self, candidate, *arguments, **settings):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, candidate, *arguments, **settings)

    monkeypatch.setattr(Evaluation, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(candidates, DIGITS, tmp_path, config=config)
    finished = {path: path.read_bytes() for path in (tmp_path / "points").glob("*.npz")}
    assert len(finished) == 2
    left[0] = 4
    sweep(candidates, DIGITS, tmp_path, config=config)
    assert len(trained) == 3
    assert all(path.read_bytes() == was for path, was in finished.items())
    # What is complete is only tabulated again; another rate adds its own points.
    left[0] = 0
    sweep(candidates, DIGITS, tmp_path, config=config)
    assert len(trained) == 3
    left[0] = 2
    more = make_candidate(candidates[0].name, "topk", 0.25, layers=(1,))
    sweep([*candidates, more], DIGITS, tmp_path, config=config)
    assert len(trained) == 4


def test_points_of_other_checkpoints_and_layers_have_other_names(candidates, tmp_path):
    one = candidates[0]
    namesake = dataclasses.replace(one, name=str(tmp_path / "tiny"))
    elsewhere = make_candidate(one.name, "topk", 0.75, layers=(0,))
    again = make_candidate(one.name, "topk", 0.75, layers=(1,))
    names = [Point(candidate).name for candidate in (one, namesake, elsewhere, again)]
    assert len(set(names)) == 3
    assert names[0] == names[3]


@pytest.mark.slow
def test_a_real_training_of_a_point(candidates, config, tmp_path):
    rows = sweep(candidates[1:], DIGITS, tmp_path, config=config)
    tuned = [row for row in rows if row.training == "fine-tuned"]
    assert [row.method for row in tuned] == ["none", "topk"]
    assert all(0 < row.top1_percent <= 100 for row in tuned)


@pytest.mark.slow
def test_a_training_that_is_told_to_stop_gives_no_result(candidates, config, tmp_path, monkeypatch):
    advance = Progress.advance

    def advance_and_signal(self):
        advance(self)
        signal.raise_signal(signal.SIGTERM)

    # The stopped step is evaluated too: that is not yet the accuracy of the point.
    config.eval.every_epochs = 1e-9
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "advance", advance_and_signal)
        with pytest.raises(SystemExit, match="stopped at step 1 of .*; the same command continues"):
            sweep(candidates[1:], DIGITS, tmp_path, config=config)
    assert not list((tmp_path / "points").glob("*_seed0_*.npz"))
    rows = sweep(candidates[1:], DIGITS, tmp_path, config=config)
    assert [row.training for row in rows].count("fine-tuned") == 2


def test_another_sweep_in_the_same_folder_is_refused(candidates, config, trained, tmp_path):
    sweep(candidates, DIGITS, tmp_path)
    sweep(candidates, DIGITS, tmp_path, config=config)
    config.steps = 3
    with pytest.raises(InputError, match=r"training.steps is 2 there and 3 here"):
        sweep(candidates, DIGITS, tmp_path, config=config)
    other = Evaluation({"name": "digits", "eval_batch_size": 200, "mean": (0.5,)})
    with pytest.raises(InputError, match=r"another sweep: data\.mean"):
        sweep(candidates, other, tmp_path)


def test_bad_input(candidates, tmp_path):
    with pytest.raises(InputError, match="name without weights"):
        sweep([make_candidate("deit_tiny_patch16_224")], DIGITS, tmp_path)
    sweep(candidates[:1], DIGITS, tmp_path)
    (point,) = (tmp_path / "points").glob("*topk*.npz")
    point.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        sweep(candidates[:1], DIGITS, tmp_path)


def test_a_checkpoint_that_was_trained_again_is_swept_again(candidates, saved, tmp_path):
    """Defect B: the points of other weights at the same path were taken for theirs."""
    sweep(candidates[:1], DIGITS, tmp_path)
    model, variables = candidates[0].model, candidates[0].variables
    again = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    save_model(saved, describe(model), again, overwrite=True)
    retrained = [dataclasses.replace(candidates[0], variables=again)]
    sweep(retrained, DIGITS, tmp_path)
    assert len(list((tmp_path / "points").iterdir())) == 4
    sweep(retrained, DIGITS, tmp_path)
    assert len(list((tmp_path / "points").iterdir())) == 4
    save_model(saved, describe(model), variables, overwrite=True)


@pytest.mark.slow
def test_the_command_writes_tables_and_plots(saved, tmp_path, capsys):
    arguments = (f"--models={saved}", "--methods=topk", "--keep_rates=0.5", "--layers=1")
    quick = ("--measure", "--rounds=1", "--batch_size=1", "--eval_batch_size=200")
    commands.run(command, *arguments, *quick, "--data=digits", f"--output={tmp_path}")
    written = {path.name for path in tmp_path.iterdir()}
    assert {"sweep.md", "sweep.csv", "sweep.json", "points"} <= written
    plots = {"keep_rate", "flops", "throughput", "agreement-flops", "cosine-flops"}
    assert {f"off-the-shelf-{name}.svg" for name in plots} <= written
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [row["training"] for row in rows] == ["off the shelf"] * 2
    assert rows[0]["dense_cosine"] == pytest.approx(1, abs=1e-6)
    assert 0.9 < rows[1]["dense_cosine"] < rows[0]["dense_cosine"]
    low, high = rows[1]["top1_interval"]
    assert low < rows[1]["top1_percent"] < high
    assert "| off the shelf |" in capsys.readouterr().out


# How ml_collections loads a file.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data=digits", "--config=configs/digits.py"), "the data of a training are its own"),
        ((), "a sweep needs data"),
        (("--data=digits", "--seeds=a", "--models=x"), "x: no such file"),
    ],
)
def test_the_command_refuses(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        commands.run(command, f"--output={tmp_path}", *arguments)
