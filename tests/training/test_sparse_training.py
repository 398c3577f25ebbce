"""Sparse training: masks that keep their count, and where they move."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tdm_jax import create_model
from tdm_jax.errors import InputError
from tdm_jax.training.sparse_training import (
    SparseConfig,
    active_counts,
    regrown,
    sparse,
)

RNG = np.random.default_rng(0)


def tree(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "params": {
        "fc": {"kernel": tree(20, 30), "bias": tree(30)},
        "proj": {"kernel": tree(30, 4), "bias": tree(4)},
        "norm": {"scale": tree(20)},
        "reducer": {"stage_0": {"kernel": tree(20, 1)}},
    }
}


def reference_change(mask, weight, gradient, rate):
    """One weight after another, from the definition."""
    mask, active = mask.ravel().copy(), [i for i, on in enumerate(mask.ravel()) if on]
    replaced = int(rate * len(active))
    for i in sorted(active, key=lambda i: abs(weight.ravel()[i]))[:replaced]:
        mask[i] = False
    off = [i for i, on in enumerate(mask) if not on]
    for i in sorted(off, key=lambda i: -abs(gradient.ravel()[i]))[:replaced]:
        mask[i] = True
    return mask.reshape(weight.shape)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_a_change_prunes_by_magnitude_and_grows_by_gradient(rate):
    mask = RNG.random((12, 15)) < 0.3
    weight, gradient = RNG.normal(size=(2, 12, 15)).astype(np.float32)
    arguments = map(jnp.asarray, (mask, weight * mask, gradient, np.float32(rate)))
    new = jax.jit(regrown)(*arguments)
    np.testing.assert_array_equal(new, reference_change(mask, weight * mask, gradient, rate))
    assert new.sum() == mask.sum()


def test_updates_keep_the_count_and_leave_inactive_weights_at_zero():
    optimizer = sparse(
        optax.adam(0.1), SparseConfig(0.4, every=2, end=0.7, distribution="uniform"), 10
    )
    target = jax.tree.map(lambda x: x + 1.0, PARAMS)

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(lambda p, t: p - t, params, target)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    masks = []
    for _ in range(10):
        params, state = step(params, state)
        masks.append(np.asarray(state.masks["params"]["fc"]["kernel"]))
        assert masks[-1].sum() == 240
        kernel = np.asarray(params["params"]["fc"]["kernel"])
        np.testing.assert_array_equal(kernel[~masks[-1]], 0)
    moves = [(old != new).any() for old, new in itertools.pairwise(masks)]
    # Changes come before updates 2, 4 and 6; the end is at 7.
    assert moves == [False, True, False, True, False, True, False, False, False]
    kernels = [params["params"][name]["kernel"] for name in ("fc", "proj")]
    active = sum(int((kernel != 0).sum()) for kernel in kernels)
    assert active / sum(kernel.size for kernel in kernels) == pytest.approx(0.4)
    # What is no kernel of the transformer is not sparse.
    assert (params["params"]["fc"]["bias"] != 0).all()
    assert (params["params"]["reducer"]["stage_0"]["kernel"] != 0).all()


def test_the_first_masks_keep_the_largest_weights():
    config = SparseConfig(0.25, distribution="uniform")
    state = sparse(optax.sgd(0.1), config, steps=5).init(PARAMS)
    kernel = np.abs(PARAMS["params"]["proj"]["kernel"])
    mask = np.asarray(state.masks["params"]["proj"]["kernel"])
    assert mask.sum() == 30
    assert kernel[mask].min() >= kernel[~mask].max()


def test_full_density_is_the_plain_optimiser():
    plain = optax.adam(0.1)
    assert sparse(plain, SparseConfig(), steps=5) is plain


def test_erk_gives_small_kernels_more_of_the_same_budget():
    counts = active_counts(PARAMS, 0.5, "erk")["params"]
    # 50 + 34 rows and columns share 0.5 * 720 ones; the narrow kernel would get more than it has.
    assert counts["proj"]["kernel"] == 120
    assert counts["fc"]["kernel"] == 240
    counts = active_counts(PARAMS, 0.1, "erk")["params"]
    assert counts["proj"]["kernel"] == round(72 * 34 / 84)
    assert counts["fc"]["kernel"] == round(72 * 50 / 84)


def test_a_transformers_kernels_reach_the_density():
    model = create_model("deit_tiny_patch16_224")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    kernels = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    )
    for distribution in ("erk", "uniform"):
        counts = sum(jax.tree.leaves(active_counts(params, 0.3, distribution)))
        assert counts == pytest.approx(0.3 * kernels, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.0}, r"sparse.density must lie in \(0, 1\], got 0.0"),
        ({"end": 1.5}, r"sparse.end must lie in \(0, 1\], got 1.5"),
        ({"prune_rate": 1.5}, r"sparse.prune_rate must lie in \[0, 1\], got 1.5"),
        ({"every": 0}, "sparse.every must be at least 1, got 0"),
        ({"distribution": "erq"}, "did you mean 'erk'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SparseConfig(**settings)
