import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tdm_jax.data import benchmark


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
    shares = [int(share) for share in re.findall(r"(\d+)% \|", output.read_text())]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(100, abs=2)
    assert re.search(r"\| 1 \| \d+ \| \d+ \|", output.read_text())


@pytest.mark.slow
def test_bad_flags_are_one_line(tmp_path):
    result = run("--threads=none")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--threads: got ['none'], expected positive integers" in result.stderr
