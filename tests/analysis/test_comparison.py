"""The comparison: baselines, costs, accuracy, shared measurements."""

import jax
import jax.numpy as jnp
import pytest

from tdm_jax.analysis import costs, timing
from tdm_jax.analysis.candidate import Candidate, make_candidate
from tdm_jax.analysis.comparison import compare, measure_speeds
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.timing import Timing
from tdm_jax.errors import InputError

SIZES = {"image_size": 28, "patch_size": 7, "in_channels": 1, "num_classes": 10}
QUICK = Timing(rounds=2, min_seconds=0.0, warmup=1)


@pytest.fixture
def make(tiny_model):
    def make(method="none", keep_rate=None, training=""):
        layers = {} if method == "none" else {"layers": (1,)}
        model, variables = tiny_model(method, keep_rate, **layers, **SIZES)
        variables = jax.tree.map(jnp.asarray, variables)
        return Candidate("tiny", method, keep_rate, model, variables, training)

    return make


def test_rows_without_data_have_costs_and_no_accuracy():
    base, evit = compare([make_candidate("deit_small_patch16_224", "evit", 0.7)])
    assert (base.macs, evit.macs) == (4_603_567_752, 3_032_105_162)
    assert base.flops_reduction_percent == 0
    assert evit.flops_reduction_percent == pytest.approx(34.13, abs=0.01)
    assert evit.top1_percent is evit.images_per_second is evit.verdict is None


@pytest.mark.slow
def test_rows_with_data_and_measurement(make):
    candidates = [make(), make("topk", 0.5), make("topk", 1.0)]
    evaluation = Evaluation({"name": "digits", "eval_batch_size": 256})
    base, half, whole = compare(candidates, evaluation=evaluation, timing=QUICK, batch_size=2)
    assert (base.verdict, base.speedup) == (timing.BASELINE, 1.0)
    assert half.macs == costs.count(candidates[1].model).macs < base.macs
    assert half.flops_ratio == base.macs / half.macs
    assert half.speedup_quartiles[0] <= half.speedup <= half.speedup_quartiles[1]
    # Keeping everything is the unreduced model, to the last digit of its accuracy.
    assert 0 < whole.top1_percent == base.top1_percent < 100


def test_candidates_of_one_model_share_a_measurement(make):
    notes = []
    candidates = [make(), make("topk", 0.5), make("topk", 0.5, "fine-tuned")]
    speeds = measure_speeds(candidates, QUICK, batch_size=1, note=notes.append)
    assert speeds[1] is speeds[2]
    assert "2 programs" in notes[0]
    # Every baseline stands beside its candidates: the same rounds, the same machine.
    assert speeds[0].baseline == speeds[1].baseline


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (lambda make: make_candidate("deit_tiny_patch16_224"), "name without weights"),
        (lambda make: make().unreduced(), "digits has 10 classes; the model has 7"),
    ],
)
def test_who_cannot_be_evaluated_is_refused_at_once(candidate, message, make, monkeypatch):
    monkeypatch.setitem(SIZES, "num_classes", 7)
    with pytest.raises(InputError, match=message):
        compare([candidate(make)], evaluation=Evaluation({"name": "digits"}))
