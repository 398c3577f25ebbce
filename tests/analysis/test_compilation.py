import jax
import pytest
from ml_collections import ConfigDict

from tdm_jax.analysis import compilation
from tdm_jax.errors import InputError
from tdm_jax.training.config import default_config, parse
from tdm_jax.training.experiment import make_experiment

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
    assert compilation.collectives(TEXT) == {
        "all-reduce": (1, 32 * 16 * 4 + 8 * 2 + 4),
        "all-gather": (2, 64 * 512 * 2 + 1024 * 4),
        "reduce-scatter": (2, 64 * 512 * 2 + 32 * 16 * 4),
    }


def experiment():
    config = default_config(name="tfds:imagenet2012", batch_size=16, image_size=32)
    sizes = {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2}
    config.model = ConfigDict({"name": "vit", "dtype": "float32", **sizes})
    return make_experiment(parse(config), dataset=(1600, 10))


def test_a_step_is_measured_without_data():
    run = experiment()
    check = compilation.check(run, jax.devices(), 0)
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves(run.abstract_state()))
    batch = 16 // 8 * (32 * 32 * 3 + 4)
    assert check.state_bytes == pytest.approx(state + batch, rel=0.05)
    assert set(check.collectives) == {"all-reduce"}
    assert check.flops > 0
    parts = (check.state_bytes, check.temporary_bytes, check.program_bytes)
    assert check.total_bytes == sum(parts)
    assert "all-reduce" in compilation.report([check])


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
        compilation.devices_of(topology)


def test_what_fits_nowhere(monkeypatch):
    small = compilation.Check(0.7, 2**20, 0, 0, 1.0, {})
    monkeypatch.setattr(compilation, "check", lambda *args: small)
    with pytest.raises(InputError, match="no fit on gpu:8x0; more devices"):
        compilation.check_machines({"gpu:8x0": (jax.devices(), 0.0)}, experiment())
