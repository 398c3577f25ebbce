import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdm_jax.train import train_and_evaluate

ROOT = Path(__file__).parents[2]

CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from tests.test_train import tiny_config

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


def test_incomplete_flags_are_refused():
    done = subprocess.run(
        [sys.executable, "-m", "tdm_jax.train", "--config=configs/digits.py", "--workdir=/nowhere",
         "--coordinator=127.0.0.1:1"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "expected --coordinator, --processes and --process together" in done.stderr
