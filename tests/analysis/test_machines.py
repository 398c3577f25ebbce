import jax
import pytest

from tdm_jax.analysis.machines import TPUS, find_machine
from tdm_jax.errors import InputError


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "expected gpu:<devices>x<GiB>, or one of v4:<shape>"),
        ("gpu:8", "expected gpu:<devices>x<GiB of each>"),
        ("gpu:0x80", "expected 1 to [0-9]+ devices"),
    ],
)
def test_a_topology_that_is_none(topology, message):
    with pytest.raises(InputError, match=message):
        find_machine(topology)


def test_stand_ins():
    machine = find_machine("gpu:4x80")
    assert machine.devices == jax.devices()[:4]
    assert (machine.memory, machine.chip) == (80, None)


def test_the_clocks_are_those_of_the_matrix_units():
    clocks = {name: chip.clock and chip.clock / 1e9 for name, chip in TPUS.items()}
    assert clocks["v5e"] == pytest.approx(1.5, abs=0.01)
    assert clocks["v5p"] == pytest.approx(1.75, abs=0.01)
    assert clocks["v6e"] is None
