"""Outcomes: the columns that two of them make on the same images, and their files."""

import numpy as np
import pytest

from tdm_jax.analysis.fidelity import Fidelity
from tdm_jax.analysis.outcome import Outcome, mean
from tdm_jax.errors import InputError


def outcome(right, n=200, fidelity=None):
    top1 = np.zeros(n)
    top1[:right] = 1
    return Outcome(top1, np.ones(n), np.full(n, 0.5), fidelity)


def test_columns_compare_on_the_same_images():
    whole, some, chance = outcome(180), outcome(178), outcome(120)
    columns = some.columns(whole, chance)
    assert columns["top1_percent"] == 89 and columns["examples"] == 200
    assert columns["top1_interval"][0] < 89 < columns["top1_interval"][1]
    assert columns["over_unreduced"] == -1 and columns["over_random"] == pytest.approx(29)
    assert columns["over_random_interval"][0] > 20
    assert columns["within_noise"] == "unreduced"
    assert "within_noise" not in chance.columns(whole)
    # Nothing is compared with itself.
    assert "over_unreduced" not in whole.columns(whole)


def test_tries_are_averaged_image_by_image():
    both = mean([outcome(100), outcome(50)])
    assert both.columns()["top1_percent"] == 37.5
    assert set(both.top1) == {1.0, 0.5, 0.0}


@pytest.mark.parametrize("agreement", [None, np.ones(200)])
def test_files(agreement, tmp_path):
    value = np.linspace(0, 1, 200)
    own = outcome(20, fidelity=Fidelity(agreement, value, value, value, value))
    own.save(tmp_path / "point.npz")
    read = Outcome.load(tmp_path / "point.npz")
    assert read.columns() == own.columns()
    outcome(3).save(tmp_path / "plain.npz")
    assert Outcome.load(tmp_path / "plain.npz").fidelity is None
    (tmp_path / "point.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="point.npz is damaged"):
        Outcome.load(tmp_path / "point.npz")
