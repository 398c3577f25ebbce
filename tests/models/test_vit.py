"""The transformer: sizes, tokens that pass, what it reports (models/info.py), what it refuses."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import VisionTransformer, create_model, make_reducer, unmerge
from tdm_jax.errors import InputError
from tdm_jax.models.rotary import Rotary
from tdm_jax.reduction import Reducer
from tdm_jax.reduction.sliced import Sliced

TINY = {
    "image_size": (32, 48),
    "patch_size": 8,
    "width": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
IMAGES = jax.random.normal(jax.random.key(1), (3, 32, 48, 3))


def tiny(reducer="none", keep_rate=None, **overrides):
    if isinstance(reducer, str) and reducer != "none":
        overrides.setdefault("layers", (1, 2))
    return create_model("vit", reducer, keep_rate, **{**TINY, **overrides})


def init(model):
    return jax.jit(model.init)(jax.random.key(0), IMAGES)


def run(model, variables, images=IMAGES, **options):
    """One compiled forward pass: op by op it takes ten times as long."""
    return jax.jit(functools.partial(model.apply, **options))(variables, images)


@pytest.fixture(scope="module")
def variables():
    return init(tiny())


def test_parameter_names_and_shapes_are_timms(variables):
    shapes = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    }
    block = {
        "norm1/scale": (32,),
        "norm1/bias": (32,),
        "attn/qkv/kernel": (32, 96),
        "attn/qkv/bias": (96,),
        "attn/proj/kernel": (32, 32),
        "attn/proj/bias": (32,),
        "norm2/scale": (32,),
        "norm2/bias": (32,),
        "mlp/fc1/kernel": (32, 128),
        "mlp/fc1/bias": (128,),
        "mlp/fc2/kernel": (128, 32),
        "mlp/fc2/bias": (32,),
    }
    assert shapes == {
        "cls_token": (1, 1, 32),
        "pos_embed": (1, 25, 32),
        "patch_embed/proj/kernel": (8, 8, 3, 32),
        "patch_embed/proj/bias": (32,),
        "norm/scale": (32,),
        "norm/bias": (32,),
        "head/kernel": (32, 5),
        "head/bias": (5,),
        **{f"blocks_{i}/{name}": shape for i in range(4) for name, shape in block.items()},
    }


def test_logits_are_float32_in_either_compute_type(variables):
    model = tiny()
    exact = run(model, variables)
    rounded = run(model.clone(dtype=jnp.bfloat16), variables)
    assert exact.shape == (3, 5)
    assert exact.dtype == rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.03)
    assert not np.array_equal(rounded, exact)


@pytest.mark.slow
def test_distilled_averages_its_heads_and_trains_them_apart():
    model = tiny("tdm", 0.5, distilled=True)
    variables = init(model)
    logits, distilled = run(model, variables, train=True)
    np.testing.assert_allclose(run(model, variables), (logits + distilled) / 2, atol=1e-6)
    assert not np.allclose(logits, distilled)


STAGE = {"keep_rate": 0.5, "layers": (0,)}


@pytest.mark.parametrize(
    ("reducer", "settings"),
    [
        (Reducer(), {"drop_path": 0.2, "remat": True}),
        (make_reducer("tdm", **STAGE), {"num_registers": 3, "layer_scale": True}),
        (make_reducer("tome", **STAGE), {"qkv_bias": "qv"}),  # weighs the keys
        (make_reducer("mctf", **STAGE), {"qkv_bias": ""}),  # brings the softmax
        (make_reducer("evit", **STAGE), {"rotary": Rotary()}),
        (make_reducer("dyvit", **STAGE), {"distilled": True}),  # learns a mask of the keys
    ],
    ids=["none", "tdm", "tome", "mctf", "evit", "dyvit"],
)
def test_what_the_head_does_not_read_decides_neither_answer_nor_gradient(reducer, settings):
    """Without `Info` it is left out of the last block, in training too."""
    model = tiny(reducer, depth=2, **settings)
    assert model.read == 1 + model.distilled
    variables = init(model)
    waves = functools.partial(
        jax.tree.map, lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    )

    def answer(variables, **info):
        rngs = {"reducer": jax.random.key(2), "dropout": jax.random.key(3)}
        answer = model.apply(waves(variables), IMAGES, train=True, rngs=rngs, **info)
        answer = answer[0] if info else answer
        return sum(x.std() for x in jax.tree.leaves(answer)), answer

    short, whole = (
        jax.jit(jax.grad(functools.partial(answer, **info), has_aux=True))(variables)
        for info in ({}, {"return_info": True})
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), short, whole)


def test_who_collects_what_blocks_say_gets_all_tokens(variables):
    _, collected = run(tiny(), variables, capture_intermediates=True, mutable=["intermediates"])
    last = collected["intermediates"]["blocks_3"]["__call__"][0]
    _, info = run(tiny(), variables, return_info=True, intermediates=(3,))
    np.testing.assert_allclose(last.sequence(), info.intermediates[0].features, atol=1e-5)


@pytest.mark.parametrize("name", ["avit", "evovit"])
def test_a_method_whose_head_reads_another_token_needs_the_whole_last_block(name):
    model = tiny(make_reducer(name))
    assert model.read is None
    assert model.clone(reducer=Sliced(like=model.reducer)).read is None
    assert tiny(class_token=False).read is None


def test_registers_and_class_token_pass_every_stage():
    model = tiny("tdm", 0.5, num_registers=3)
    variables = init(model)
    _, info = run(model, variables, return_info=True)
    assert info.prefix == 4
    assert info.token_counts == (24, 12, 6, 6)
    assert info.features.shape == (3, 4 + 6, 32)
    assert variables["params"]["pos_embed"].shape == (1, 1 + 24, 32)


def test_without_class_token_the_head_reads_the_mean_over_patches():
    model = tiny(class_token=False)
    variables = init(model)
    logits, info = run(model, variables, return_info=True)
    head = variables["params"]["head"]
    expected = info.features.mean(axis=1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_merged_tokens_count_for_all_their_patches_in_the_mean():
    reducer = make_reducer("tdm", keep_rate=0.5, layers=(1,), importance="mean")
    model = tiny(reducer, class_token=False)
    variables = init(model)
    logits, info = run(model, variables, return_info=True)
    head = variables["params"]["head"]
    expected = unmerge(info).mean(axis=1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_drop_path_drops_whole_images_and_keeps_the_expectation(variables):
    # With a rate close to 1 the last blocks vanish from almost every image.
    model = tiny(drop_path=0.9)
    plain = run(tiny(), variables)
    np.testing.assert_array_equal(run(model, variables), plain)

    @jax.jit
    def draw(key):
        return model.apply(variables, IMAGES, train=True, rngs={"dropout": key})

    draws = jax.vmap(draw)(jax.random.split(jax.random.key(2), 64))
    assert np.std(np.asarray(draws), axis=0).min() > 1e-4
    assert np.isfinite(draws).all()
    first, again = draw(jax.random.key(3)), draw(jax.random.key(3))
    np.testing.assert_array_equal(first, again)


@pytest.mark.slow
def test_remat_changes_no_value_and_no_gradient(variables):
    model = tiny("tdm", 0.5)

    def loss(model, variables):
        return (model.apply(variables, IMAGES) ** 2).sum()

    plain = jax.jit(jax.value_and_grad(lambda p: loss(model, p)))(variables)
    again = jax.jit(jax.value_and_grad(lambda p: loss(model.clone(remat=True), p)))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, again)


def test_info_tells_the_source_of_every_token(variables):
    model = tiny("tdm", 0.5)
    _, info = run(model, variables, return_info=True)
    assert info.token_counts == tuple(block.out for block in model.schedule) == (24, 12, 6, 6)
    assert [stage.layer for stage in info.stages] == [1, 2]
    for assign, size in [(s.assign, s.size) for s in info.stages] + [(info.assign, info.size)]:
        counted = (np.asarray(assign)[:, :, None] == np.arange(size.shape[1])).sum(1)
        np.testing.assert_array_equal(counted, size)
        assert (size.sum(axis=1) == 24).all()


def test_unmerge_returns_dropped_patches_as_they_were_or_as_told(variables):
    model = tiny("topk", 0.5, layers=(2,))
    _, info = run(model, variables, return_info=True)
    dense = unmerge(info)
    dropped = np.asarray(info.assign) < 0
    assert dropped.sum(axis=1).tolist() == [12, 12, 12]
    assert (np.asarray(unmerge(info, fill=7.0))[dropped] == 7.0).all()
    # What was dropped in block 2 left with the value it had after that block's attention:
    # closer to the unreduced token after block 1 or 2 than the mean of all is.
    assert np.isfinite(dense).all()
    np.testing.assert_array_equal(dense[dropped], np.asarray(info.dropped_values)[dropped])
    assert np.abs(np.asarray(dense)[dropped]).sum(axis=-1).min() > 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("none", {}),
        ("tdm", {"keep_rate": 0.5, "layers": (1, 2)}),
        ("topk", {"keep_rate": 0.5, "layers": (1, 2)}),
        ("evovit", {"keep_rate": 0.5, "layers": (1, 3)}),
        ("avit", {"center": 0.0}),  # about half of the tokens halt in the first block
    ],
)
def test_the_tokens_of_any_block_on_the_full_grid(variables, name, settings):
    model = tiny(make_reducer(name, **settings))
    _, info = run(model, variables, return_info=True, intermediates=(3, 0, 2))
    assert [block.layer for block in info.intermediates] == [3, 0, 2]
    last, _, third = info.intermediates
    for block in info.intermediates:
        assert block.features.shape == (3, 1 + info.token_counts[block.layer], 32)
        dense = np.asarray(unmerge(info, block))
        assert dense.shape == (3, 24, 32)
        dropped = np.asarray(block.assign) < 0
        assert (np.abs(dense).sum(axis=-1) > 0).all()
        assert (np.asarray(unmerge(info, block, fill=7.0))[dropped] == 7.0).all()
        np.testing.assert_array_equal(
            dense[~dropped], np.asarray(unmerge(info, block, fill=0.0))[~dropped]
        )
    if name == "topk":
        assert (np.asarray(third.assign) < 0).sum(axis=1).tolist() == [18, 18, 18]
    # Evo-ViT's slow tokens come back before the next stage.
    assert (np.asarray(third.assign) < 0).any() == (name not in ("none", "tdm", "evovit"))
    if name in ("none", "tdm", "topk"):
        # The final features are the last block's, normed.
        normed = nn.LayerNorm(1e-6).apply(
            {"params": variables["params"]["norm"]}, unmerge(info, last)
        )
        np.testing.assert_allclose(normed, unmerge(info), atol=1e-4)


def test_any_values_of_the_final_tokens_on_the_full_grid(variables):
    model = tiny("topk", 0.5)
    _, info = run(model, variables, return_info=True)
    values = jnp.arange(3 * 6 * 2, dtype=jnp.float32).reshape(3, 6, 2) + 1
    dense, dropped = np.asarray(unmerge(info, values)), np.asarray(info.assign) < 0
    assert (dense[dropped] == 0).all()
    assert (np.asarray(unmerge(info, values, fill=-1.0))[dropped] == -1).all()
    for image in range(3):
        kept = values[image][info.assign[image][~dropped[image]]]
        np.testing.assert_array_equal(dense[image][~dropped[image]], kept)
    with pytest.raises(InputError, match=r"the 6 final patch tokens of 3 images; got \(3, 7, 32\)"):
        unmerge(info, info.features)


@pytest.mark.parametrize("intermediates", [(0, 4), (-1,)])
def test_blocks_that_a_model_has_not_are_refused(variables, intermediates):
    with pytest.raises(InputError, match=r"must be blocks from 0 to 3; got \("):
        tiny().apply(variables, IMAGES, return_info=True, intermediates=intermediates)
    with pytest.raises(InputError, match="expected return_info=True"):
        tiny().apply(variables, IMAGES, intermediates=intermediates)


def test_one_trace_for_each_shape(variables):
    traces = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Counting(Reducer):
        def finish(self, state, shape):
            traces.append(state.tokens.shape)
            return state

    model = tiny().clone(reducer=Counting())
    apply = jax.jit(model.apply)
    for batch in (3, 3, 2, 3, 2):
        apply(variables, IMAGES[:batch])
    assert traces == [(3, 24, 32), (2, 24, 32)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"image_size": 30}, r"multiples of patch_size 8; got \(30, 30\)"),
        ({"image_size": (32, 0)}, "multiples of patch_size 8"),
        ({"num_heads": 5}, "num_heads must divide the width 32; got 5"),
        ({"depth": 0}, "depth must be at least 1; got 0"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\); got 1.0"),
        ({"distilled": True, "class_token": False}, "needs its class token"),
        ({"widht": 3}, "setting 'widht'; did you mean 'width'"),
        ({"reducer": "tdn"}, "unknown reducer 'tdn'; did you mean 'tdm'"),
        ({"reducer": "tdm", "keep_rate": 0.0}, r"keep_rate must be in \(0, 1\]; got 0.0"),
        ({"reducer": "tdm", "keep_rate": 1.5}, r"keep_rate must be in \(0, 1\]; got 1.5"),
        ({"reducer": "tdm", "layers": (1, 4)}, "layers must lie within the 4 blocks"),
        ({"reducer": "tdm", "layers": (2, 1)}, "layers must be ascending"),
        ({"reducer": "ats", "class_token": False}, "expected a class token to go by"),
        ({"reducer": "none", "keep_rate": 0.5}, "'none'"),
    ],
)
def test_bad_settings_are_refused_at_construction(overrides, message):
    with pytest.raises(InputError, match=message):
        tiny(**overrides)


def test_images_of_another_size_are_refused(variables):
    with pytest.raises(InputError, match=r"\[batch, 32, 48, 3\]; got \(3, 48, 32, 3\)"):
        tiny().apply(variables, IMAGES.transpose(0, 2, 1, 3))


def test_missing_sizes_are_all_named():
    with pytest.raises(InputError, match="patch_size, width, depth, num_heads"):
        create_model("vit", image_size=32, num_classes=3)


def test_a_reducer_object_brings_its_own_settings():
    reducer = make_reducer("tdm", keep_rate=0.5, layers=(1,))
    model = tiny(reducer)
    assert isinstance(model, VisionTransformer)
    assert model.reducer is reducer
    with pytest.raises(InputError, match="belong to the reducer"):
        tiny(reducer, 0.7)


def test_a_keep_rate_of_one_is_the_plain_model(variables):
    plain = run(tiny(), variables)
    for name in ("none", "topk", "evit", "tdm", "evit+tdm", "random"):
        np.testing.assert_array_equal(run(tiny(name, 1.0), variables), plain)
