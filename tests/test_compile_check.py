"""Covers tdm_jax.compile_check; what it prints is that of tests/analysis/test_compilation.py and
test_pricing.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tdm_jax import compile_check
from tdm_jax.errors import InputError
from tests import commands

ROOT = Path(__file__).parents[1]

CONFIG = """
from tdm_jax.training.config import default_config

def get_config():
    config = default_config(name="tfds:imagenet2012", batch_size=16, image_size=32)
    config.model.update({"name": "vit", "drop_path": 0.0})
    with config.unlocked():
        config.model.update({"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2})
    return config
"""


@pytest.mark.slow
def test_the_command_stops_at_the_first_that_fits(tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)

    def run(topology):
        command = [sys.executable, "-m", "tdm_jax.compile_check", f"--config={config}"]
        return subprocess.run(
            [*command, f"--topology={topology}"],
            cwd=ROOT, capture_output=True, text=True, check=False,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        )  # fmt: skip

    done = run("gpu:1x0,gpu:2x1,gpu:4x1")
    assert done.returncode == 0, done.stderr
    small, fits = done.stdout.split("\n\n")
    assert small.splitlines()[-1].startswith("does not fit: ")
    assert fits.startswith("gpu:2x1: 2 devices of 1 GiB (data=2, fsdp=1), batch 16, 8 on each")
    assert fits.splitlines()[-1].startswith("fits: ")
    done = run("gpu:2x1,gpu:3x1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.batch_size=16 does not divide over 3 devices")
    assert done.stderr.count("\n") == 1


def test_forward_passes(tmp_path, capsys):
    arguments = ("--models=deit_tiny_patch16_224", "--image_size=32", "--batch_size=2")
    commands.run(compile_check, "--topology=gpu:1x80", *arguments, f"--output={tmp_path}")
    assert "| MB/image |" in capsys.readouterr().out
    written = json.loads((tmp_path / "prices.json").read_text())
    assert written["about"]["dtype"] == "bfloat16"
    assert written["rows"][0]["bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "forward passes; got neither"),
        (["--config=configs/digits.py", "--models=vit"], "forward passes; got both"),
        (["--models=vit", "--topology=gpu:1x80,gpu:2x80"], "forward passes run on one device"),
        (["--models=vit", "--dtype=float12"], "unknown dtype 'float12'"),
    ],
)
def test_what_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        commands.run(compile_check, "--topology=gpu:1x80", *arguments)
