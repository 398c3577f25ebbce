import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdm_jax.errors import InputError
from tdm_jax.parallel import distributed
from tdm_jax.training.loop import train_and_evaluate

ROOT = Path(__file__).parents[2]

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from tests.training.test_loop import tiny_config

def get_config():
    return tiny_config(steps=6, **{{"log_every": 2}})
"""


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "learning_rate" in line]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(tests=str(ROOT / "tests")))
    two, one = tmp_path / "two", tmp_path / "one"
    done = subprocess.run(
        ["launch/local.sh", "2", f"--config={config}", f"--workdir={two}"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=900,
        env=os.environ | {"DEVICES": "4", "PYTHON": sys.executable, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sys.path.insert(0, str(tmp_path))
    try:
        from config import get_config
    finally:
        sys.path.remove(str(tmp_path))
    result = train_and_evaluate(get_config(), one)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    together = json.loads((two / "result.json").read_text())
    assert together["count"] == result["count"] == 360
    assert together["top1"] == pytest.approx(result["top1"], abs=0.5)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"coordinator_address": "127.0.0.1:1"}, "num_processes and process_id together; got 127"),
        ({"num_processes": 2, "process_id": 0}, "together; got None, 2 and 0"),
        (
            {"coordinator_address": "127.0.0.1:1", "num_processes": 2, "process_id": 2},
            "process_id must be below 2; got 2",
        ),
    ],
)
def test_an_incomplete_place_is_refused(place, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(**place)
    distributed.initialize()  # alone: nothing to join
