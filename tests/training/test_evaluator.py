import jax
import pytest

from tdm_jax.data import make_config
from tdm_jax.errors import InputError
from tdm_jax.parallel.sharding import MeshConfig, make_mesh, state_shardings
from tdm_jax.training.evaluator import Evaluator

DIGITS = {"image_size": 28, "patch_size": 14, "in_channels": 1, "num_classes": 10}


@pytest.mark.parametrize("changes", [{}, {"channels": 3}])
def test_every_example_counts_once(tiny_model, changes):
    """Whatever the batch; 360 examples do not divide over eight devices in batches of 100."""
    config = make_config(name="digits", eval_batch_size=100, **changes)
    model, variables = tiny_model(**DIGITS | {"in_channels": config.channels})
    results = []
    for devices in (8, 1):
        mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
        placed = jax.device_put(variables, state_shardings(mesh, variables))
        results.append(Evaluator(model, config, mesh, placed)(placed))
    assert results[0]["count"] == results[1]["count"] == 360
    assert 0 <= results[0]["top1"] <= results[0]["top5"] <= 100
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 14}, r"digits gives images of \(28, 28, 1\); the model takes \(14, 14, 1"),
        ({"num_classes": 3}, "digits has 10 classes; the model has 3"),
        ({"num_classes": 0}, "digits has 10 classes; the model has no classifier"),
    ],
)
def test_data_of_another_kind_are_refused(tiny_model, changes, message):
    model, variables = tiny_model(**DIGITS | changes)
    with pytest.raises(InputError, match=message):
        Evaluator(model, make_config(name="digits"), make_mesh(MeshConfig()), variables)
