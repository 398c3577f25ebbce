"""Weights cast once answer as those that are cast in every forward pass."""

import jax
import jax.numpy as jnp
import numpy as np

from tdm_jax import cast_weights


def test_the_model_rounds_the_same_weights_itself(tiny_model):
    model, variables = tiny_model("tocom", r=2, source_r=1, dtype=jnp.bfloat16, layer_scale=True)
    images = jax.random.normal(jax.random.key(0), (2, *model.image_size, 3))
    cast = cast_weights(variables, model.dtype)
    answers = [jax.jit(model.apply)(some, images) for some in (variables, cast)]
    assert answers[0].dtype == answers[1].dtype == jnp.float32
    np.testing.assert_allclose(*answers, atol=1e-2)

    kept = jax.tree.map(lambda x: x.dtype == jnp.float32, cast["params"])
    block = kept["blocks_0"]
    assert block["norm1"]["scale"] and block["ls1"]["gamma"] and block["attn"]["qkv"]["bias"]
    assert not (block["attn"]["qkv"]["kernel"] or kept["pos_embed"] or kept["cls_token"])
    assert all(jax.tree.leaves(kept["reducer"])) and jax.tree.leaves(kept["reducer"])
    assert jax.tree.structure(cast) == jax.tree.structure(variables)


def test_in_float32_nothing_changes(tiny_model):
    model, variables = tiny_model()
    jax.tree.map(np.testing.assert_array_equal, cast_weights(variables, model.dtype), variables)
