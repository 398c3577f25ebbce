"""Every learned pruning method finds the one patch that matters, better than by chance.

`learning.py` beside this file does the same on the embedded digits, for a table.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from tdm_jax import create_model, make_reducer

CLASSES, PATCH, GRID, STEPS, BATCH = 4, 4, 4, 1500, 64
TEMPLATES = jax.random.normal(jax.random.key(9), (CLASSES, PATCH, PATCH))


def puzzle(key, count):
    """Images of noise in which one patch, anywhere, tells the class; that patch's index."""
    kinds, places, noise = jax.random.split(key, 3)
    label = jax.random.randint(kinds, (count,), 0, CLASSES)
    place = jax.random.randint(places, (count,), 0, GRID**2)
    patches = 0.5 * jax.random.normal(noise, (count, GRID**2, PATCH, PATCH))
    here = jax.nn.one_hot(place, GRID**2)[..., None, None]
    patches = patches * (1 - here) + 2 * TEMPLATES[label][:, None] * here
    images = patches.reshape(count, GRID, GRID, PATCH, PATCH).swapaxes(2, 3)
    images = images.reshape(count, GRID * PATCH, GRID * PATCH, 1)
    return images, jax.nn.one_hot(label, CLASSES), place


def trained(model, params):
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        images, labels, _ = puzzle(key, BATCH)
        logits, info = model.apply(
            params, images, train=True, return_info=True, rngs={"reducer": key}
        )
        own = model.reducer.losses(info, logits, labels)
        return optax.losses.softmax_cross_entropy(logits, labels).mean() + sum(own.values())

    def step(carry, key):
        params, state = carry
        gradient = jax.grad(loss)(params, key)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def judged(model, params):
    """Shares of the images whose telling patch is kept, and of those that are answered right."""
    images, labels, place = puzzle(jax.random.key(2), 512)
    logits, info = model.apply(params, images, return_info=True)
    token = jnp.take_along_axis(info.assign, place[:, None], 1)
    alone = jnp.take_along_axis(info.kind, jnp.maximum(token, 0), 1) == 0
    right = logits.argmax(-1) == labels.argmax(-1)
    return ((token >= 0) & alone).mean(), right.mean()


def puzzled(name):
    # At the input: after a block the class token knows the telling patch, which may then go. But
    # SViTE learns by a token's scale, which the norm hides from the first block.
    return create_model(
        "vit",
        make_reducer(name, keep_rate=0.25, layers=(0,)),
        image_size=GRID * PATCH,
        patch_size=PATCH,
        in_channels=1,
        width=16,
        depth=2 if name == "svite" else 1,
        num_heads=2,
        num_classes=CLASSES,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dyvit", "spvit", "svite", "iared2"])
def test_training_finds_the_telling_patch(name):
    model = puzzled(name)
    fresh = model.init(jax.random.key(1), jnp.zeros((1, GRID * PATCH, GRID * PATCH, 1)))
    judge = jax.jit(functools.partial(judged, model))
    params = jax.jit(functools.partial(trained, model))(fresh)
    kept, right = zip(judge(fresh), judge(params), strict=True)
    assert right[0] < 0.5
    # Dropping by chance finds a quarter, and can answer no more than that and a guess of the rest:
    # 0.25 + 0.75 / 4. All need not be found: one class may be told by the others' absence.
    assert kept[1] > 0.5 and right[1] > 0.7
