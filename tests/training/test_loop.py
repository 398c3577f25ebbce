"""Covers tdm_jax.parallel.preemption as well."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from tdm_jax.checkpoint import Store, load_pretrained
from tdm_jax.errors import InputError
from tdm_jax.parallel.sharding import MeshConfig, make_mesh
from tdm_jax.training import compiled_steps, metric_writer
from tdm_jax.training.config import default_config, parse
from tdm_jax.training.experiment import make_experiment
from tdm_jax.training.loop import DivergedError, train_and_evaluate
from tdm_jax.training.metric_writer import Progress
from tdm_jax.training.saving import restore

ROOT = Path(__file__).parents[2]
TINY = {"name": "vit", "patch_size": 7, "width": 16, "depth": 3, "num_heads": 2, "drop_path": 0.1}


def tiny_config(**changes):
    """Twenty steps on the digits with everything random switched on; saves at 10 and 20."""
    config = default_config(name="digits", mixup=0.8, cutmix=1.0, erasing=0.25, batch_size=16)
    config.model = ConfigDict(TINY)
    config.reducer.layers = (1, 2)
    config.steps = 20
    config.log_every = 5
    config.optim.warmup_epochs = 0.0
    config.optim.learning_rate = 0.03
    config.optim.ema_decay = 0.9
    config.checkpoint.every_epochs = 10 * 16 / 1437
    config.eval.every_epochs = 0.0
    config.update_from_flattened_dict(changes)
    return config


def saved_state(workdir, config):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with contextlib.closing(Store(workdir / "checkpoints", read_only=True)) as store:
        state = jax.device_get(restore(store, make_experiment(parse(config)), mesh))
    return int(state.step), state


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def stop_at(monkeypatch, step):
    """A real SIGTERM to this process, once `step` steps are done."""
    count = itertools.count(1)
    advance = Progress.advance

    def advance_and_signal(self):
        advance(self)
        if next(count) == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Progress, "advance", advance_and_signal)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    result = train_and_evaluate(tiny_config(), workdir)
    return workdir, result


def test_a_run_leaves_what_it_promises(finished):
    workdir, result = finished
    assert result["step"] == 20
    assert result["count"] == 360
    assert 0 <= result["top1"] <= result["top5"] <= 100
    assert json.loads((workdir / "result.json").read_text()) == result
    assert json.loads((workdir / "config.json").read_text())["steps"] == 20
    assert [line["step"] for line in lines(workdir)] == [5, 10, 15, 20, 20]
    assert {"loss", "grad_norm", "learning_rate", "images_per_second"} <= lines(workdir)[0].keys()
    assert lines(workdir)[-1]["ema/top1"] == result["ema/top1"]
    model, variables = load_pretrained(workdir)
    assert model.width == 16
    state = saved_state(workdir, tiny_config())[1]
    jax.tree.map(np.testing.assert_array_equal, variables, state.variables)
    _, averaged = load_pretrained(workdir / "model_ema")
    jax.tree.map(np.testing.assert_array_equal, averaged, state.ema)


def test_a_finished_run_is_not_trained_again(finished):
    workdir, result = finished
    before = (workdir / "metrics.jsonl").read_text()
    again = train_and_evaluate(tiny_config(), workdir)
    assert again == result
    # As after a crash between the last checkpoint and the result.
    (workdir / "result.json").unlink()
    again = train_and_evaluate(tiny_config(), workdir)
    assert again["top1"] == result["top1"]
    assert len(lines(workdir)) == len(before.splitlines())


@pytest.mark.slow
def test_sigterm_saves_and_another_mesh_goes_on(finished, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        # As in a store, where lines are collected.
        patch.setattr(metric_writer, "is_remote", lambda path: True)
        stopped = train_and_evaluate(tiny_config(), tmp_path)
    assert stopped["step"] == 7
    assert saved_state(tmp_path, tiny_config())[0] == 7
    assert [line["step"] for line in lines(tmp_path)] == [5, 7]
    assert not (tmp_path / "result.json").exists()
    assert "stopped at step 7; the same command continues" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    train_and_evaluate(tiny_config(**{"mesh.data": 2, "mesh.fsdp": 4}), tmp_path)
    steps = [line["step"] for line in lines(tmp_path)]
    assert steps == [5, 7, 10, 15, 20, 20]
    whole = {line["step"]: line["loss"] for line in lines(finished[0])[:-1]}
    parts = {line["step"]: line["loss"] for line in lines(tmp_path)[:-1]}
    for step in (10, 15, 20):
        assert parts[step] == pytest.approx(whole[step], abs=1e-5)


COMMAND = """
import os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
sys.path[:0] = [{root!r}, {tests!r}]
from tests.training.test_loop import tiny_config
from tdm_jax.training.loop import train_and_evaluate
train_and_evaluate(tiny_config(**{changes!r}), {workdir!r})
"""


def start(workdir, **changes):
    code = COMMAND.format(
        root=str(ROOT), tests=str(ROOT / "tests"), workdir=str(workdir), changes=changes
    )
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"})


def kill_in_a_save(workdir):
    """Goes on, saving every other step, and kills it while files of a save are being written.

    Returns:
      The folder that was being written, and the last step that was complete before.
    """
    process = start(workdir, **{"checkpoint.every_epochs": 2 * 16 / 1437})
    folder = workdir / "checkpoints"
    while True:
        assert process.poll() is None, "no save was caught"
        names = [path.name for path in folder.iterdir()]
        writing = [name for name in names if "tmp" in name]
        if writing and any((folder / writing[0]).glob("state*/*")):
            process.send_signal(signal.SIGSTOP)
            done = {int(path.name) for path in folder.iterdir() if path.name.isdigit()}
            # A stop comes at once, but the save may have ended before.
            if (folder / writing[0]).is_dir() and int(writing[0].split(".")[0]) not in done:
                process.kill()
                assert process.wait() == -signal.SIGKILL
                return folder / writing[0], max(done)
            process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole).wait() == 0

    process = start(parts)
    while not (parts / "checkpoints" / "10").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (parts / "result.json").exists(), "killed too late to test anything"

    half_written, survivor = kill_in_a_save(parts)
    assert half_written.is_dir()
    store = Store(parts / "checkpoints", read_only=True)
    assert store.latest_step() == survivor
    store.close()
    assert start(parts).wait() == 0
    assert not half_written.exists()
    expected, got = (saved_state(workdir, tiny_config()) for workdir in (whole, parts))
    assert expected[0] == got[0] == 20
    jax.tree.map(np.testing.assert_array_equal, got[1], expected[1])
    steps = [line["step"] for line in lines(parts)]
    assert steps == [5, 10, 15, 20, 20]
    losses = [[line["loss"] for line in lines(workdir)] for workdir in (whole, parts)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_that_diverges_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        train_and_evaluate(tiny_config(), tmp_path)
    update = compiled_steps.lower_train_step

    def poisoned(recipe, mesh, state, teacher):
        step = update(recipe, mesh, state, teacher).compile()

        class Compiled:
            def compile(self):
                return lambda *args: (lambda s, v: (s, v | {"loss": v["loss"] * np.nan}))(
                    *step(*args)
                )

        return Compiled()

    monkeypatch.setattr(compiled_steps, "lower_train_step", poisoned)
    with pytest.raises(DivergedError, match=r"nan.* at step 5.*last good checkpoint: .*/3$"):
        train_and_evaluate(tiny_config(), tmp_path)
    assert saved_state(tmp_path, tiny_config())[0] == 3


@pytest.mark.slow
def test_the_keep_rate_falls_in_phases_that_compile_once(tmp_path, monkeypatch):
    compiled = []
    update = compiled_steps.lower_train_step

    def counted(recipe, *args):
        compiled.append(recipe.model.reducer.schedule.keep_rate)
        return update(recipe, *args)

    monkeypatch.setattr(compiled_steps, "lower_train_step", counted)
    epoch = 16 / 1437
    config = tiny_config(
        **{
            "reducer.name": "tdm",
            "reducer.keep_rate": 0.5,
            "keep_warmup.start_epoch": 4 * epoch,
            "keep_warmup.end_epoch": 16 * epoch,
            "keep_warmup.schedules": 3,
            "eval.keep_rates": (0.7,),
        }
    )
    result = train_and_evaluate(config, tmp_path)
    assert compiled == [1.0, 0.75, 0.5]
    rates = {line["step"]: line["keep_rate"] for line in lines(tmp_path)[:-1]}
    assert rates == {5: 1.0, 10: 0.75, 15: 0.5, 20: 0.5}
    assert {"top1", "keep0.7/top1"} <= result.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.batch_size": 20}, "data.batch_size=20 does not divide over 8 devices"),
        ({"accumulate": 3}, "expected a multiple of 48"),
        ({"data.batch_size": 24}, "an even number on each"),
        ({"mesh.fsdp": 3}, "does not cover 8 devices"),
        ({"reducer.name": "tdn"}, "unknown reducer 'tdn'; did you mean 'tdm'"),
        ({"model.width": 15}, "num_heads must divide the width 15"),
        ({"model.dtype": "float16"}, "unknown model.dtype 'float16'"),
        ({"init_from": "/nowhere.pth"}, "/nowhere.pth: no such file"),
        ({"data.name": "folder", "data.data_dir": "/nowhere"}, "/nowhere"),
        ({"optim.warmup_epochs": 10.0}, "expected fewer than the 20 steps"),
        ({"distill.kind": "soft", "distill.teacher": "init_from"}, "init_from is empty"),
        ({"epochs": -1.0, "steps": 0}, "expected positive epochs or steps"),
        ({"eval.keep_rates": (0.5,)}, "has no keep rate"),
        ({"profile_steps": (5,)}, r"profile_steps must be \(first, last\)"),
    ],
)
def test_what_cannot_be_is_refused_before_compiling(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled_steps, "lower_train_step", None)
    config = tiny_config()
    with config.unlocked():
        config.model.dtype = "float32"
        config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"cannot reach gs://bucket/run: ImportError: .*gcsfs.*expected `pip install gcsfs`"),
        ({"tensorboard": True}, "tensorboard can only write to a local folder"),
    ],
)
def test_a_workdir_in_an_object_store_that_cannot_be(changes, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=message):
        train_and_evaluate(tiny_config(**changes), "gs://bucket/run")


def test_another_run_is_not_continued(finished):
    workdir, _ = finished
    with pytest.raises(InputError, match=r"optim.weight_decay is 0.05 there and 0.1 here"):
        train_and_evaluate(tiny_config(**{"optim.weight_decay": 0.1}), workdir)


@pytest.mark.slow
def test_training_starts_from_a_checkpoint_of_the_same_model_only(finished, tmp_path):
    workdir, result = finished
    config = tiny_config(
        **{"init_from": str(workdir), "steps": 1, "optim.learning_rate": 1e-12,
           "optim.end_learning_rate": 0.0}
    )  # fmt: skip
    assert train_and_evaluate(config, tmp_path / "same")["top1"] == result["top1"]
    config.model.width = 32
    with pytest.raises(InputError, match="is another model: got width 16, expected 32"):
        train_and_evaluate(config, tmp_path / "other")
