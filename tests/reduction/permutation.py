"""The same patches in another order, for tests that a method goes by what tokens are."""

import jax.numpy as jnp
import numpy as np

from tdm_jax.ops.gathering import gather_tokens


def permuted(params, images, grid, order):
    """Images, and parameters with their positions, whose patches stand in another order."""
    batch, height, width, channels = images.shape
    (rows, columns), patches = grid, grid[0] * grid[1]
    tall, wide = height // rows, width // columns
    x = images.reshape(batch, rows, tall, columns, wide, channels).swapaxes(2, 3)
    x = x.reshape(batch, patches, tall, wide, channels)[:, order]
    x = x.reshape(batch, rows, columns, tall, wide, channels).swapaxes(2, 3)
    position = params["params"]["pos_embed"]
    placed = position.shape[1] - patches
    moved = jnp.concatenate([position[:, :placed], position[:, placed:][:, order]], axis=1)
    return {"params": {**params["params"], "pos_embed": moved}}, x.reshape(images.shape)


def assert_alike(info, old, order):
    """What stands for a patch is the same token, wherever it is in the output."""
    stands, stood = (
        gather_tokens(of.features[:, of.prefix :], jnp.maximum(of.assign, 0)) for of in (info, old)
    )
    alive = np.asarray(info.assign) >= 0
    np.testing.assert_array_equal(alive, np.asarray(old.assign)[:, order] >= 0)
    stands, stood = np.asarray(stands)[alive], np.asarray(stood)[:, order][alive]
    np.testing.assert_allclose(stands, stood, atol=1e-4)
