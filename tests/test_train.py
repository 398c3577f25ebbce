import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdm_jax import train
from tdm_jax.parallel import distributed
from tdm_jax.reduction import make_reducer
from tdm_jax.training.config import parse
from tdm_jax.training.experiment import reducer_of
from tests.commands import run

ROOT = Path(__file__).parents[1]
THREE_RATES = make_reducer("topk", keep_rate=(0.9, 0.8, 0.7), layers=(2, 3, 5))


def test_the_command_reports_bad_input_in_one_line(tmp_path):
    command = [sys.executable, "-m", "tdm_jax.train", "--config=configs/digits.py"]
    command += [f"--workdir={tmp_path}", "--config.optim.learning_rat=1"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "learning_rat" in done.stderr


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["name=tdm"], make_reducer("tdm", layers=(2, 3, 5))),
        (["name=tdm", "layers=None", "keep_rate=1"], make_reducer("tdm", keep_rate=1.0)),
        (["name=topk", "keep_rate=0.9,0.8,0.7"], THREE_RATES),
        (
            ["name=tdm", "preset=published", "keep_rate=0.5", "layers=1,2,3"],
            make_reducer("tdm", preset="published", keep_rate=0.5, layers=(1, 2, 3)),
        ),
        (["name=tome", "r=2", "keep_rate=None"], make_reducer("tome", r=2, layers=(2, 3, 5))),
    ],
)
def test_the_flags_reach_the_run(settings, expected, monkeypatch, tmp_path):
    """Also a method's settings that no file lists; None is a default, a whole number a float."""
    joined, trained = [], []
    monkeypatch.setattr(distributed, "initialize", lambda *place: joined.append(place))
    monkeypatch.setattr(train, "train_and_evaluate", lambda *run: trained.append(run) or {})
    arguments = [
        "--config=configs/digits.py",
        f"--workdir={tmp_path}",
        "--coordinator_address=host:1",
        "--num_processes=2",
        "--process_id=1",
        *(f"--config.reducer.{setting}" for setting in settings),
    ]
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    run(train, *arguments)
    assert joined == [(False, "host:1", 2, 1)]
    ((config, workdir),) = trained
    assert workdir == str(tmp_path)
    assert reducer_of(parse(config).reducer) == expected
