"""Prices of forward passes; TPU's own compiler is not among what the tests install."""

import jax
import jax.numpy as jnp
import pytest

from tdm_jax.analysis import pricing
from tdm_jax.analysis.candidate import Candidate
from tdm_jax.analysis.machines import TPUS, Machine
from tdm_jax.analysis.results import markdown

MACHINE = Machine("v5e:1x1", jax.devices(), 16, TPUS["v5e"])


@pytest.fixture
def candidate(tiny_model):
    return Candidate("tiny", "tdm", 0.5, tiny_model("tdm", 0.5, layers=(1,))[0])


def test_a_forward_pass_is_compiled_and_priced(candidate):
    done = []
    rows = pricing.price([candidate], MACHINE, batch_size=2, dtype=jnp.bfloat16, done=done.append)
    assert done == rows
    assert [row.method for row in rows] == ["none", "tdm"]
    assert rows[0].bytes > 0
    assert rows[0].temporary_bytes > 0
    # This compiler estimates no cycles.
    assert rows[0].cycles is rows[0].speedup is None
    assert "Mcycles" not in markdown(rows, pricing.TABLE)


def test_the_compilers_cycles(candidate, monkeypatch):
    estimates = iter([{"attention": 6_000_000, "rest": 3_000_000}, {"attention": 4_500_000}])
    monkeypatch.setattr(pricing.hlo, "cycles", lambda text: next(estimates))
    base, reduced = pricing.price([candidate], MACHINE, batch_size=2, dtype=jnp.float32)
    assert (base.cycles, base.attention_cycles, base.speedup) == (9_000_000, 6_000_000, 1)
    assert reduced.speedup == 2
    assert base.images_per_second == pytest.approx(2 * TPUS["v5e"].clock / 9e6)


def test_what_does_not_fit(candidate, monkeypatch):
    def full(lowered):
        raise pricing.DoesNotFitError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(pricing, "compiled_for", full)
    rows = pricing.price([candidate], MACHINE, batch_size=2, dtype=jnp.float32)
    assert {row.verdict for row in rows} == {"does not fit"}
