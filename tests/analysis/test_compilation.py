import dataclasses

import jax
import pytest
from ml_collections import ConfigDict

from tdm_jax.analysis import compilation
from tdm_jax.analysis.hlo import Moved
from tdm_jax.analysis.machines import Chip, Machine
from tdm_jax.errors import InputError
from tdm_jax.training.config import default_config, parse
from tdm_jax.training.experiment import make_experiment

# Per second 1e12 operations, 1e9 bytes of memory, 1e8 bytes of links; 10 processors, 1 GHz.
CHIP = Chip(16, 1e12, 1e9, 1e8, 10, 1e9)
SMALL = compilation.Check(
    keep_rate=0.7,
    state_bytes=2**20,
    temporary_bytes=0,
    program_bytes=0,
    flops=1e10,
    moved_bytes=2e7,
    cycles=15_000_000,
    collectives={"all-gather": Moved(1, 1_000_000, 500_000.0)},
)


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
    # Every gradient is reduced over all eight devices.
    assert check.sent_bytes == pytest.approx(2 * 7 / 8 * state / 3, rel=0.1)
    assert check.flops > 0
    assert check.cycles is None
    parts = (check.state_bytes, check.temporary_bytes, check.program_bytes)
    assert check.total_bytes == sum(parts)
    assert "all-reduce" in compilation.report([check])


def test_the_step_time_by_hand():
    bounds = compilation.Bounds.of(SMALL, CHIP)
    assert dataclasses.astuple(bounds) == pytest.approx((0.01, 0.02, 0.005, 0.015))
    assert bounds.seconds == pytest.approx(0.02)
    # 64 images in 20 ms are 3200 a second, 1600 on each of two devices: 16 processors of 100.
    machine = Machine("v9:2x1", [None, None], 16, CHIP)
    row = compilation.speed_report([SMALL], machine, 64, 100.0).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == [
        *("0.7", "10.0", "20.0", "5.00", "15.0"),
        *("3\u202f200", "16.0", "10", "2\u202f000"),
    ]


def test_a_chip_whose_clock_is_not_known():
    assert compilation.Bounds.of(SMALL, CHIP._replace(clock=None)).estimate is None


def test_what_a_machine_can_do_is_reported_where_it_is_known(monkeypatch, capsys):
    monkeypatch.setattr(compilation, "check", lambda *args: SMALL)
    for chip in (None, CHIP):
        compilation.check_machines([Machine("it", jax.devices(), 1.0, chip)], experiment(), 330.0)
        assert ("img/s at best" in capsys.readouterr().out) == (chip is not None)


def test_what_fits_nowhere(monkeypatch):
    monkeypatch.setattr(compilation, "check", lambda *args: SMALL)
    with pytest.raises(InputError, match="no fit on gpu:8x0; more devices"):
        compilation.check_machines([Machine("gpu:8x0", jax.devices(), 0.0)], experiment(), 330.0)
