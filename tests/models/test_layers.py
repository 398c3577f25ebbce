"""The layers against flax's, and gradients in every mode.

Covers ops/activations.py, ops/normalisation.py, ops/patches.py and ops/products.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tdm_jax import create_model
from tdm_jax.models.layers import Dense, LayerNorm, PatchEmbed
from tdm_jax.ops.activations import gelu
from tdm_jax.ops.normalisation import layer_norm
from tdm_jax.ops.products import product


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def with_gradients(layer, x, g):
    """Output, and gradients with respect to the parameters and x, of a layer drawn at random."""
    variables = layer.init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf + 0.3 * draw(*leaf.shape), variables)
    y, backward = jax.vjp(layer.apply, variables, x)
    return y, *backward(g.astype(y.dtype))


def agree(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours, theirs)


@pytest.mark.parametrize(("k", "n"), [(6, 10), (10, 6), (6, 6)])
@pytest.mark.parametrize("lead", [(3,), (3, 5)])
def test_dense_is_flax_dense(k, n, lead):
    x, g = draw(*lead, k), draw(*lead, n, seed=1)
    ours = with_gradients(Dense(n), x, g)
    theirs = with_gradients(nn.Dense(n, kernel_init=nn.initializers.truncated_normal(0.02)), x, g)
    agree(ours, theirs, rtol=1e-5, atol=1e-5)


def test_patches_are_flax_convolution():
    images, g = draw(2, 8, 12, 3), draw(2, 6, 5, seed=1)
    convolution = nn.Conv(5, (4, 4), (4, 4), "VALID")
    variables = convolution.init(jax.random.key(0), images)

    def theirs(variables, images):
        return convolution.apply(variables, images).reshape(2, 6, 5)

    def ours(variables, images):
        return PatchEmbed(4, 5).apply({"params": {"proj": variables["params"]}}, images)

    (y, back), (expected, backward) = (jax.vjp(f, variables, images) for f in (ours, theirs))
    agree((y, *back(g)), (expected, *backward(g)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm_is_flax_layer_norm(offset):
    x, g = offset + draw(3, 5, 8), draw(3, 5, 8, seed=1)
    ours = with_gradients(LayerNorm(1e-6), x, g)
    agree(ours, with_gradients(nn.LayerNorm(epsilon=1e-6), x, g), rtol=1e-4, atol=1e-4)


def test_layer_norm_of_half_precision_keeps_float32_statistics():
    x, g = (100 + draw(3, 5, 64)).astype(jnp.bfloat16), draw(3, 5, 64, seed=1)
    ours = with_gradients(LayerNorm(1e-6, jnp.bfloat16), x, g)
    theirs = with_gradients(nn.LayerNorm(epsilon=1e-6, dtype=jnp.bfloat16), x, g)
    assert jax.tree.map(lambda a: a.dtype, ours) == jax.tree.map(lambda a: a.dtype, theirs)
    agree(*(jax.tree.map(lambda a: a.astype(jnp.float32), z) for z in (ours, theirs)), atol=0.15)


def test_equal_channels_have_no_infinite_gradient():
    _, backward = jax.vjp(
        lambda x: layer_norm(x, jnp.ones(4), jnp.zeros(4), 1e-6), jnp.ones((2, 4))
    )
    assert np.isfinite(backward(draw(2, 4))[0]).all()


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (product, (draw(2, 3, 4), draw(4, 5, seed=1))),
        (product, (draw(2, 3, 5), draw(5, 4, seed=1))),
        (lambda *a: layer_norm(*a, 1e-6), (draw(2, 3, 6), draw(6, seed=1), draw(6, seed=2))),
        (gelu, (draw(2, 9),)),
    ],
    ids=["product, wide", "product, narrow", "layer_norm", "gelu"],
)
def test_gradients_of_both_orders_are_the_numerical_ones(function, arguments):
    check_grads(jax.jit(function), arguments, order=2, rtol=0.03, atol=0.03)


def test_vmap_is_the_loop():
    x, kernel, g = draw(4, 2, 3, 5), draw(4, 5, 2, seed=1), draw(4, 2, 3, 2, seed=2)

    def gradients(x, kernel, g):
        return jax.vjp(product, x, kernel)[1](g)

    loop = [gradients(*image) for image in zip(x, kernel, g, strict=True)]
    agree(
        jax.vmap(gradients)(x, kernel, g), jax.tree.map(lambda *z: jnp.stack(z), *loop), rtol=1e-5
    )


@pytest.fixture(scope="module")
def reduced():
    """A loss of a tiny model with TDM for each image, and its parameters."""
    sizes = {"image_size": 16, "patch_size": 4, "width": 8, "depth": 2, "num_heads": 2}
    model = create_model("vit", "tdm", 0.5, layers=(1,), num_classes=3, **sizes)
    variables = jax.jit(model.init)(jax.random.key(0), draw(1, 16, 16, 3))

    def loss(variables, image):
        return jnp.sin(model.apply(variables, image[None])).sum()

    return loss, variables


def dot(x, y):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), x, y)))


@pytest.mark.slow
def test_forward_mode_goes_through_a_model(reduced):
    loss, variables = reduced
    image = draw(16, 16, 3)
    tangent = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=1), variables)
    value, gradient = jax.jit(jax.value_and_grad(loss))(variables, image)
    expected = dot(gradient, tangent)
    assert abs(expected) > 1e-3

    @jax.jit
    def forward(variables, tangent):
        out, along = jax.jvp(lambda v: loss(v, image), (variables,), (tangent,))
        _, linear = jax.linearize(lambda v: loss(v, image), variables)
        return out, along, linear(tangent)

    np.testing.assert_allclose(forward(variables, tangent), (value, expected, expected), rtol=1e-4)
    by_columns = jax.jit(jax.jacfwd(lambda s: loss(variables, s * image)))(1.0)
    by_rows = jax.jit(jax.jacrev(lambda s: loss(variables, s * image)))(1.0)
    np.testing.assert_allclose(by_columns, by_rows, rtol=1e-4)


@pytest.mark.slow
def test_gradients_for_each_image_and_second_derivatives_of_a_model(reduced):
    loss, variables = reduced
    images, tangent = draw(2, 16, 16, 3), draw(16, 16, 3, seed=1)
    gradient = jax.jit(jax.grad(loss))
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(variables, images)
    for i, image in enumerate(images):
        agree(jax.tree.map(lambda g, i=i: g[i], each), gradient(variables, image), atol=1e-5)

    def slope(image):
        return dot(jax.grad(loss, argnums=1)(variables, image), tangent)

    def curvature(image):
        along = jax.jvp(jax.grad(loss, argnums=1), (variables, image), (zeros, tangent))[1]
        return dot(along, tangent)

    zeros = jax.tree.map(jnp.zeros_like, variables)
    over = jax.jit(lambda image: dot(jax.grad(slope)(image), tangent))(images[0])
    np.testing.assert_allclose(jax.jit(curvature)(images[0]), over, rtol=1e-3, atol=1e-5)
