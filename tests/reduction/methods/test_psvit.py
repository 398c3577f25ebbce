"""PS-ViT: constant sets that hide patches without a trace, and the search that finds them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model
from tdm_jax.errors import InputError
from tdm_jax.reduction import Reducer, ViTShape, plan
from tdm_jax.reduction.methods.psvit import PSViT, select

SIZES = {"image_size": (24, 16), "patch_size": 8, "width": 16, "depth": 3, "num_heads": 2}
SETS = ((0, 1, 3, 4), (1, 3, 4), (1, 4), (4,))
SHAPE = ViTShape(grid=(3, 2), depth=3, width=16, num_heads=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hidden(Reducer):
    """The same by masks: what a block may attend to."""

    def key_weight(self, state, context):
        seen = [1.0] + [float(i in SETS[context.layer]) for i in range(6)]
        return jnp.broadcast_to(jnp.array(seen), state.sequence().shape[:2])


@pytest.mark.slow
def test_equals_hiding_the_others_from_each_attention():
    images = jax.random.normal(jax.random.key(0), (2, 24, 16, 3))
    slim = create_model("vit", PSViT(sets=SETS), num_classes=3, **SIZES)
    params = slim.init(jax.random.key(1), images)
    logits, info = slim.apply(params, images, return_info=True)
    masked = slim.clone(reducer=Hidden()).apply(params, images)
    np.testing.assert_allclose(logits, masked, atol=1e-5)
    assert info.token_counts == (3, 2, 1)
    np.testing.assert_array_equal(info.stages[0].assign[0], [-1, 0, -1, 1, 2, -1])
    np.testing.assert_array_equal(info.assign[1], [-1, -1, -1, -1, 0, -1])


def test_uncalibrated_keeps_all():
    assert plan(PSViT(), SHAPE) == ((6, 6, 6),) * 3
    assert plan(PSViT(sets=SETS), SHAPE) == ((4, 3, 3), (3, 2, 2), (2, 1, 1))


def search(tolerance):
    """Changes that add up: 2 ** patch for each patch that is missing, of 63; none in block 0."""

    def change(layer, useful, kept):
        asked.append((layer, tuple(np.flatnonzero(useful).tolist())))
        missing = (~kept) * 2.0 ** np.arange(6)
        return missing.sum(axis=1) / 63 * (layer > 0)

    asked = []
    return select(change, 3, 6, tolerance), asked


def test_search_drops_from_the_least_while_the_sum_is_tolerated():
    # 1 + 2 + 4 = 7 fits into 8, 15 does not; and then nothing that was useful goes any more.
    sets, asked = search(8.5 / 63)
    assert sets == ((3, 4, 5), (3, 4, 5), (3, 4, 5), (5,))
    assert asked[0] == (2, ())  # the last block's patches are useful to nobody
    assert (1, (3, 4, 5)) in asked
    assert asked[-1][0] == 0


def test_search_at_the_ends_of_the_tolerance():
    sets, _ = search(0.0)
    assert sets == ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5), (5,))
    sets, _ = search(1.0)
    assert sets == ((5,),) * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": 1.0}, r"tolerance must be in \[0, 1\)"),
        ({"sets": ((0, 1), (0,))}, "sets must be 4"),
        ({"sets": ((0, 1), (0, 2), (0,), (0,))}, r"part of the set before; got the others \[2\]"),
        ({"sets": ((0, 1), (), (), ())}, "at least one"),
        ({"sets": ((1, 0), (0,), (0,), (0,))}, "ascending"),
        ({"sets": ((0, 6), (0,), (0,), (0,))}, "indices of the 6 patches; got 6"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        PSViT(**settings).check(SHAPE)


def test_needs_a_class_token():
    shape = dataclasses.replace(SHAPE, prefix=0, class_token=False)
    with pytest.raises(InputError, match="the model has none"):
        PSViT().check(shape)
