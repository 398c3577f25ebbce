"""What is compiled once is found again by another process: training steps and forward passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import collections, json
import jax
from tdm_jax import create_model
from tdm_jax.analysis.benchmark import compile_training
from tdm_jax.analysis.timing import compile_forward

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
model = create_model(
    "vit", "tdm", 0.5, layers=(1,), image_size=16, patch_size=4, width=16, depth=3, num_heads=2,
    num_classes=4, drop_path=0.1,
)
variables = jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, 16, 16, 3)))
found = {}
for compile in compile_forward, compile_training:
    events.clear()
    compile(model, variables, 4).seconds(1)
    name = "/jax/compilation_cache/cache_"
    found[compile.__name__] = [events[name + "hits"], events[name + "misses"]]
print(json.dumps(found))
"""


def hits_and_misses(folder: Path) -> dict[str, list[int]]:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # a second, for what users compile
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=True, env=os.environ | settings,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.slow
def test_another_process_finds_every_program_in_the_persistent_cache(tmp_path):
    first, second = hits_and_misses(tmp_path), hits_and_misses(tmp_path)
    for name in ("compile_forward", "compile_training"):
        assert first[name][1] > 0
        assert second[name] == [sum(first[name]), 0]
