import jax
import pytest

from tdm_jax import compile_check
from tdm_jax.errors import InputError
from tdm_jax.experiment import make_experiment
from tdm_jax.settings import default_config, parse

TEXT = """
  %a = (f32[32,16]{1,0}, /*index=1*/bf16[8]{0}, f32[]) all-reduce(%x, %y, %z), channel_id=1
  %b = f32[1024]{0} all-gather-start(%w), dimensions={0}
  %c = f32[1024]{0} all-gather-done(%b)
  %d = f32[32,16]{1,0} get-tuple-element(%all-reduce.1), index=0
"""


def test_collectives_are_read_from_the_program():
    assert compile_check.collectives(TEXT) == {
        "all-reduce": (1, 32 * 16 * 4 + 8 * 2 + 4),
        "all-gather": (1, 1024 * 4),
    }


def test_a_step_is_measured_without_data():
    config = default_config(name="tfds:imagenet2012", batch_size=16, image_size=32)
    config.data.data_dir = "not looked at"
    config.model.update({"name": "vit", "drop_path": 0.0})
    with config.unlocked():
        config.model.update({"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2})
    experiment = make_experiment(parse(config), dataset=(1600, 10))
    found = compile_check.check(experiment, jax.devices(), 0)
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves(experiment.abstract_state()))
    batch = 16 // 8 * (32 * 32 * 3 + 4)
    assert found.state_bytes == pytest.approx(state + batch, rel=0.05)
    assert set(found.collectives) == {"all-reduce"}
    assert found.flops > 0
    assert "all-reduce" in compile_check.report([found])


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "expected gpu:<devices>x<GiB>, or one of v4:<shape>"),
        ("gpu:8", "expected gpu:<devices>x<GiB of each>"),
    ],
)
def test_a_topology_that_is_none(topology, message):
    with pytest.raises(InputError, match=message):
        compile_check.devices_of(topology)
