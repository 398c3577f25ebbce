import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tdm_jax import create_model
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.roofline import DEVICES
from tdm_jax.data import benchmark, make_config
from tdm_jax.errors import InputError


def run(*arguments):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tdm_jax.data.benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_jpegs_are_of_the_usual_size_and_weight(tmp_path):
    paths = benchmark.write_jpegs(tmp_path, 6)
    assert len({path.read_bytes() for path in paths}) == 6
    for path in paths:
        assert 40_000 < path.stat().st_size < 200_000
        with Image.open(path) as image:
            assert image.size == (500, 375)
            assert np.asarray(image).std() > 20


@pytest.mark.slow
def test_the_command_prints_and_writes_its_tables(tmp_path):
    output = tmp_path / "table.md"
    result = run("--images=16", "--image_size=32", "--threads=1", f"--output={output}")
    assert result.returncode == 0, result.stderr
    assert output.read_text() in result.stdout
    assert "| v5e: img/s at most | v5e: cores |" in output.read_text()
    shares = [int(share) for share in re.findall(r"(\d+)% \|", output.read_text())]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=2)
    assert re.search(r"\| 1 \| \d+ \| \d+ \|", output.read_text())


def test_cores_by_hand():
    model = create_model("deit_tiny_patch16_224", "tdm", 0.7)
    candidate = Candidate("tiny", "tdm", 0.7, model)
    table = benchmark.cores([candidate], {"v5e": DEVICES["v5e"]}, 400, 100)
    base, reduced = table.splitlines()[2:]
    # docs/measurements.md: 43 556 and 62 266 images a second at most.
    assert [cell.strip() for cell in base.split("|")[4:-1]] == ["43\u202f556", "109", "146"]
    assert [cell.strip() for cell in reduced.split("|")[4:-1]] == ["62\u202f266", "156", "208"]


def test_every_image_costs_its_processor_time(tmp_path, monkeypatch):
    """Each stage one millisecond by the clock, and nine images by a thread."""
    paths = benchmark.write_jpegs(tmp_path, 6)
    config = make_config(name="folder", data_dir=str(tmp_path), image_size=32, batch_size=4)
    clock = itertools.count()
    monkeypatch.setattr(benchmark.time, "process_time", lambda: next(clock) / 1000)
    took = benchmark.evaluation_stages(config, paths, 3)
    assert took == pytest.approx(
        {"read": 1, "decode": 1, "resize": 1, "batch": 1, "join": 1 / 255 / 8}, rel=1e-2
    )
    assert benchmark.evaluated(config, paths, 9) == pytest.approx(9000)


@pytest.mark.parametrize("wrong", ["v6", "197", "a:b"])
def test_unknown_devices(wrong):
    with pytest.raises(InputError, match="expected v5e, H100 or TFLOPS:GBS; got"):
        benchmark._devices([wrong])
    assert benchmark._devices(["1:2"]) == {"1:2": (1e12, 2e9)}


@pytest.mark.slow
def test_bad_flags_are_one_line(tmp_path):
    result = run("--threads=none")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--threads: got ['none'], expected positive integers" in result.stderr
