"""Measuring: turns, quotients, verdicts; and what a compiled program reports of itself.

Covers tdm_jax.analysis.environment.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from tdm_jax import create_model
from tdm_jax.analysis import environment, timing
from tdm_jax.analysis.timing import Measurement, Program, Timing, measure
from tdm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scripted(Program):
    """A program whose time follows a script instead of a clock."""

    time: object = None

    def seconds(self, repeats):
        return self.time(repeats)


def scripted(time, images=8):
    return Scripted(lambda: None, images, 0.0, 0, time)


def test_a_drifting_machine_leaves_the_speedup_exact():
    # The machine becomes slower with every turn; whole rounds are affected alike.
    clock = itertools.count()

    def takes(seconds):
        def time(repeats):
            drift = 1.0 + (next(clock) // 2)
            return seconds * drift

        return scripted(time)

    slow, fast = measure([takes(2.0), takes(1.0)], Timing(rounds=8, min_seconds=0.0))
    assert slow.speedup.median == 1.0
    assert fast.speedup.low == fast.speedup.median == fast.speedup.high == 2.0
    assert fast.latency.low < fast.latency.median < fast.latency.high
    assert fast.verdict == timing.FASTER


def test_candidates_take_turns_in_changing_order():
    calls = []
    programs = [scripted(lambda n, i=i: calls.append(i) or 1.0) for i in range(3)]
    measure(programs, Timing(rounds=6, min_seconds=0.0))
    rounds = [tuple(calls[i : i + 3]) for i in range(6, len(calls), 3)]
    assert all(sorted(order) == [0, 1, 2] for order in rounds)
    assert len(set(rounds)) == 6


def test_a_turn_lasts_as_long_as_asked():
    repeats = []
    measure(
        [scripted(lambda n: repeats.append(n) or 0.01)],
        Timing(rounds=2, min_seconds=0.2, warmup=3),
    )
    assert repeats == [3, 1, 20, 20]


@pytest.mark.parametrize(
    ("own", "verdict"),
    [
        ((1.0, 1.0, 1.0), timing.FASTER),
        ((1.0, 1.6, 3.0), timing.UNCLEAR),
        ((2.0, 2.0, 2.0), timing.SLOWER),
        ((4.0, 1.0, 4.0), timing.SLOWER),
    ],
)
def test_verdict(own, verdict):
    # The baseline handles 4 images per second.
    assert Measurement(8, own, (4.0,) * 3).verdict == verdict


def test_programs_of_different_batches_compare_by_image():
    measurement = Measurement(16, (4.0,), (2.0,))
    assert measurement.throughput.median == 4.0
    assert measurement.speedup.median == 2.0


def test_the_baseline_may_stand_anywhere():
    times = [scripted(lambda n: 1.0), scripted(lambda n: 3.0)]
    fast, slow = measure(times, Timing(rounds=2, min_seconds=0.0), baseline=1)
    assert fast.speedup.median == 3.0
    assert slow.speedup.median == 1.0


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"warmup": 0}, {"min_seconds": -1.0}])
def test_a_measurement_of_nothing_is_refused(wrong):
    with pytest.raises(InputError, match=r"rounds >= 1.*got"):
        Timing(**wrong)


def test_a_forward_pass_is_compiled_measured_and_accounted_for():
    model = create_model(
        "vit", image_size=32, patch_size=8, width=32, depth=2, num_heads=2, num_classes=5
    )
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    small, large = (timing.compile_forward(model, variables, n) for n in (1, 4))
    assert small.call().shape == (1, 5)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert small.memory_bytes > weights
    assert large.memory_bytes > small.memory_bytes
    assert small.compile_seconds > 0
    first, second = measure([small, large], Timing(rounds=2, min_seconds=0.0, warmup=1))
    assert first.images == 1
    assert second.images == 4
    assert len(second.seconds) == 2


def test_a_donated_argument_counts_once():
    ones = jnp.ones((256, 256))
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0).lower(ones).compile()
    copy = jax.jit(lambda x: x + 1.0).lower(ones).compile()
    assert timing.program_bytes(add) + ones.nbytes == timing.program_bytes(copy)


def test_facts_of_the_machine():
    facts = environment.describe()
    assert facts["jax"] == jax.__version__
    assert facts["platform"] == "cpu"
    assert facts["devices"] == 8
    assert str(facts["load"]) in environment.line(facts)
