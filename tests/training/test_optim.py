import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdm_jax.errors import InputError
from tdm_jax.models.registry import create_model
from tdm_jax.training import optim
from tdm_jax.training.optim import OptimConfig


def test_the_schedule_meets_its_four_corners():
    config = OptimConfig(
        learning_rate=5e-4, warmup_epochs=5, warmup_from=1e-6, end_learning_rate=1e-5
    )
    schedule = optim.learning_rate(config, batch_size=2048, steps=3000, steps_per_epoch=10)
    peak = 5e-4 * 4
    assert schedule(0) == pytest.approx(1e-6, rel=1e-4)
    assert schedule(25) == pytest.approx((1e-6 + peak) / 2, rel=1e-5)
    assert schedule(50) == pytest.approx(peak)
    assert schedule(50 + 1475) == pytest.approx((1e-5 + peak) / 2, rel=1e-5)
    assert schedule(3000) == pytest.approx(1e-5, rel=1e-4)


def test_without_warm_up_it_starts_at_the_peak():
    config = OptimConfig(learning_rate=2e-5, warmup_epochs=0, end_learning_rate=2e-6)
    schedule = optim.learning_rate(config, batch_size=1024, steps=100, steps_per_epoch=10)
    assert schedule(0) == pytest.approx(4e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epochs": 10}, "100 steps.*fewer than the 100"),
        ({"warmup_epochs": 0, "end_learning_rate": 1.0}, "above the peak"),
    ],
)
def test_a_schedule_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        optim.learning_rate(OptimConfig(**settings), batch_size=512, steps=100, steps_per_epoch=10)


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0.0}, {"b1": 1.0}, {"ema_decay": 1.0}, {"weight_decay": -0.1}],
)
def test_bad_numbers(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        OptimConfig(**settings)


@pytest.fixture(scope="module")
def params():
    model = create_model(
        "vit",
        image_size=16,
        patch_size=8,
        width=16,
        depth=1,
        num_heads=2,
        num_classes=4,
        distilled=True,
        num_registers=1,
    )
    return model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_only_kernels_decay(params):
    mask = optim.decays(params)
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
        assert decays == (path[-1].key == "kernel"), path
    assert any(jax.tree.leaves(mask))


def test_weight_decay_moves_what_has_no_gradient_and_nothing_else(params):
    optimizer = optim.make_optimizer(OptimConfig(weight_decay=0.1), lambda step: 0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    kernel = params["params"]["head"]["kernel"]
    np.testing.assert_allclose(updates["params"]["head"]["kernel"], -0.05 * kernel, rtol=1e-6)
    assert not np.any(updates["params"]["cls_token"])
    assert not np.any(updates["params"]["pos_embed"])


def test_clipping_bounds_the_global_norm():
    # The first moment after one step is (1 - b1) times the clipped gradient.
    grads = {"a": jnp.full((3,), 100.0), "kernel": jnp.full((2, 2), 100.0)}
    optimizer = optim.make_optimizer(OptimConfig(clip_norm=1.0), lambda step: 0.1)
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    moment = optax.tree.get(state, "mu")
    assert optax.tree.norm(moment) == pytest.approx(0.1, rel=1e-5)


def test_only_some_modules_are_trained():
    params = {"params": {"head": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}}}
    optimizer = optim.make_optimizer(OptimConfig(only=("head",)), lambda step: 0.1)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert (updates["params"]["head"]["kernel"] != 0).all()
    assert (updates["params"]["norm"]["scale"] == 0).all()
    nobody = optim.make_optimizer(OptimConfig(only=("heads",)), lambda step: 0.1)
    with pytest.raises(InputError, match="has no heads; expected some of head, norm"):
        nobody.init(params)
