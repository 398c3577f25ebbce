"""Sinkhorn, PatchMerger and SiT: equal to their originals, and their weights.

`tdm_jax.reduction.methods.sinkhorn`, `tdm_jax.reduction.methods.patchmerger` and
`tdm_jax.reduction.methods.sit`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import make_reducer
from tdm_jax.errors import InputError
from tdm_jax.reduction import ViTShape
from tdm_jax.reduction.methods.sinkhorn import sinkhorn

NAMES = ("sinkhorn", "patchmerger", "sit")
SHAPE = ViTShape((8, 8), 12, 48, 3)


@pytest.mark.golden
@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_original(answer, golden, name, keep_rate):
    expected = golden(f"{name}_keep{keep_rate}")
    logits, info = answer(make_reducer(name, keep_rate=keep_rate), expected)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert [n + 1 for n in info.token_counts] == expected["tokens"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_imported_weights_are_shaped_as_fresh_ones(golden, name):
    reducer = make_reducer(name, keep_rate=0.7)
    arrays = {k[2:]: v for k, v in golden(f"{name}_keep0.7").items() if k.startswith("w:")}
    fresh = jax.eval_shape(lambda key: reducer.init(key, SHAPE), jax.random.key(0))
    imported = reducer.import_weights(arrays)
    assert jax.tree.map(jnp.shape, imported) == jax.tree.map(jnp.shape, fresh)

    missing = min(arrays)
    del arrays[missing]
    arrays["cluster_layers.0.other"] = np.zeros(3)
    with pytest.raises(
        InputError, match=r"1 missing: .*1 unknown: cluster_layers\.0\.other"
    ) as error:
        reducer.import_weights(arrays)
    assert missing in str(error.value)


def test_sinkhorn_hands_out_each_token_and_evens_out_the_clusters():
    scores = jax.random.normal(jax.random.key(0), (2, 9, 4))
    share = sinkhorn(scores, 50)
    np.testing.assert_allclose(share.sum(2), 1.0, rtol=1e-5)
    np.testing.assert_allclose(share.sum(1), 9 / 4, rtol=1e-4)
    # Optimal transport keeps the cross ratios of exp(scores).
    ratio = scores[:, 0, 0] - scores[:, 0, 1] - scores[:, 1, 0] + scores[:, 1, 1]
    log = jnp.log(share)
    after = log[:, 0, 0] - log[:, 0, 1] - log[:, 1, 0] + log[:, 1, 1]
    np.testing.assert_allclose(after, ratio, atol=1e-4)


def test_bad_settings():
    with pytest.raises(InputError, match="eps must be above 0; got 0"):
        make_reducer("sinkhorn", eps=0.0)
    with pytest.raises(InputError, match="iterations must be at least 1; got 0"):
        make_reducer("sinkhorn", iterations=0)
