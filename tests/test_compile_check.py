import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from tdm_jax import compile_check
from tdm_jax.errors import InputError
from tdm_jax.training.config import parse
from tdm_jax.training.experiment import make_experiment

ROOT = Path(__file__).parents[1]
TEXT = """
%all-reduce-scatter.2 (input.2: bf16[64,512]) -> bf16[16,512] {
  %f = bf16[64,512]{1,0} all-reduce(%input.2), channel_id=7, to_apply=%add
  ROOT %g = bf16[16,512]{1,0} dynamic-slice(%f, %i, %j)
}
%async_collective_fusion.1 (param_0.1: bf16[16,512]) -> bf16[64,512] {
  %h = bf16[64,512]{1,0} all-gather(%param_0.1), channel_id=9, dimensions={0}
}
%async_collective_fusion.2 (param_0.2: bf16[16,512]) -> bf16[64,512] {
  %k = bf16[64,512]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=9, dimensions={0}
}
ENTRY %main () -> f32[] {
  %a = (f32[32,16]{1,0}, /*index=1*/bf16[8]{0}, f32[]) all-reduce(%x, %y, %z), channel_id=1
  %b = (f32[128]{0}, f32[1024]{0}) all-gather-start(%w), channel_id=2, dimensions={0}
  %c = f32[1024]{0} all-gather-done(%b)
  %d = f32[32,16]{1,0} get-tuple-element(%all-reduce.1), index=0
  %e = f32[4,16]{1,0} reduce-scatter(%d), channel_id=3, dimensions={0}
"""


def test_collectives_are_read_from_the_program():
    assert compile_check.collectives(TEXT) == {
        "all-reduce": (1, 32 * 16 * 4 + 8 * 2 + 4),
        "all-gather": (2, 64 * 512 * 2 + 1024 * 4),
        "reduce-scatter": (2, 64 * 512 * 2 + 32 * 16 * 4),
    }


CONFIG = """
from tdm_jax.training.config import default_config

def get_config():
    config = default_config(name="tfds:imagenet2012", batch_size=16, image_size=32)
    config.model.update({"name": "vit", "drop_path": 0.0})
    with config.unlocked():
        config.model.update({"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2})
    return config
"""


def test_a_step_is_measured_without_data():
    module = {}
    exec(CONFIG, module)
    config = module["get_config"]()
    config.data.data_dir = "not looked at"
    experiment = make_experiment(parse(config), dataset=(1600, 10))
    found = compile_check.check(experiment, jax.devices(), 0)
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves(experiment.abstract_state()))
    batch = 16 // 8 * (32 * 32 * 3 + 4)
    assert found.state_bytes == pytest.approx(state + batch, rel=0.05)
    assert set(found.collectives) == {"all-reduce"}
    assert found.flops > 0
    parts = (found.state_bytes, found.temporary_bytes, found.program_bytes)
    assert found.total_bytes == sum(parts)
    assert "all-reduce" in compile_check.report([found])


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "expected gpu:<devices>x<GiB>, or one of v4:<shape>"),
        ("gpu:8", "expected gpu:<devices>x<GiB of each>"),
        ("gpu:0x80", "expected 1 to 8 devices"),
    ],
)
def test_a_topology_that_is_none(topology, message):
    with pytest.raises(InputError, match=message):
        compile_check.devices_of(topology)


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


def test_what_fits_nowhere(monkeypatch):
    module = {}
    exec(CONFIG, module)
    given = SimpleNamespace(
        config=module["get_config"](), topology=["gpu:8x0"], examples=1600, classes=10
    )
    monkeypatch.setattr(compile_check.flags, "FLAGS", given)
    small = compile_check.Check(0.7, 2**20, 0, 0, 1.0, {})
    monkeypatch.setattr(compile_check, "check", lambda *args: small)
    with pytest.raises(InputError, match="no fit on gpu:8x0; more devices"):
        compile_check.main()
