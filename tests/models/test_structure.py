"""What makes the programs fast and exact, read from the programs rather than from a clock.

Covers models/attention.py and ops/layouts.py.
"""

import collections
import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.extend.core import jaxprs_in_params

from tdm_jax import create_model, make_reducer
from tdm_jax.ops import attention
from tdm_jax.ops.platform import pinned, portable, reverse_mode

BATCH, HEADS, SIZE, PATCH = 4, 2, 112, 16
PATCHES = (SIZE // PATCH) ** 2
MAP = (BATCH, HEADS, PATCHES + 1, PATCHES + 1)
FUSED, BACKWARD = "fused_attention", "fused_attention_backward"


def model(reducer="none", dtype=jnp.float32, **settings):
    if reducer != "none":
        reducer = make_reducer(reducer, keep_rate=0.7, layers=(1, 2))
    return create_model(
        "vit",
        reducer,
        image_size=SIZE,
        patch_size=PATCH,
        width=64,
        depth=4,
        num_heads=HEADS,
        num_classes=10,
        dtype=dtype,
        **settings,
    )


def arguments(model):
    images = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), model.dtype)
    return jax.eval_shape(model.init, jax.random.key(0), images), images


def shapes(jaxpr) -> Iterator[tuple[int, ...]]:
    """The shapes of all that a program computes, programs within it included."""
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            yield from shapes(inner)
        for out in equation.outvars:
            yield out.aval.shape


def attention_maps(model) -> int:
    program = jax.make_jaxpr(model.apply)(*arguments(model))
    return list(shapes(program.jaxpr)).count(MAP)


@pytest.mark.parametrize("name", ["topk", "evit", "tdm", "tome", "ats", "dyvit", "spvit", "iared2"])
def test_a_method_makes_no_attention_map_of_its_own(name):
    reduced = model(name)
    whole = sum(block.attention == PATCHES for block in reduced.schedule)
    assert 0 < whole < reduced.depth
    # The last block has none: the head reads one row of it.
    assert attention_maps(reduced) == attention_maps(model()) * whole / (reduced.depth - 1)


def test_scores_of_the_whole_map_are_the_exception():
    # K-Medoids weighs tokens by the attention of all queries: that does need the map.
    reduced = model("kmedoids")
    whole = sum(block.attention == PATCHES for block in reduced.schedule)
    assert attention_maps(reduced) > attention_maps(model()) * whole / (reduced.depth - 1)


def lowered(function, arguments, platform, calls=()):
    """The program for a platform that need not be here."""
    allowed = [export.DisabledSafetyCheck.custom_call(call) for call in calls]
    exporter = export.export(jax.jit(function), platforms=[platform], disabled_checks=allowed)
    return exporter(*arguments).mlir_module()


@jax.custom_vjp
def fused(q, k, v):
    """What cuDNN's kernel is in a program: one call, which no JAX without a GPU would lower."""
    return jax.ffi.ffi_call(FUSED, q)(q, k, v)


def fused_forward(q, k, v):
    assert q.shape[1] % 2 == 0, "JAX refuses to differentiate the kernel at an odd count"
    return fused(q, k, v), (q, k, v)


fused.defvjp(fused_forward, lambda qkv, g: tuple(jax.ffi.ffi_call(BACKWARD, qkv)(*qkv, g)))


@pytest.fixture
def ampere(monkeypatch):
    """A machine on which cuDNN's kernels can be traced."""
    monkeypatch.setattr(attention, "_on_ampere", lambda: True)
    monkeypatch.setattr(attention, "_kernel", lambda q, k, v, **lengths: fused(q, k, v))


def custom_calls(program):
    return collections.Counter(re.findall(r"custom_call @([^\s(]*)", program))


@pytest.mark.parametrize("name", ["none", "evit", "tdm"])
def test_on_a_gpu_no_attention_map_reaches_memory(ampere, name):
    half = model(name, jnp.bfloat16)
    forward = lowered(half.apply, arguments(half), "cuda", [FUSED])
    assert custom_calls(forward) == {FUSED: half.depth - 1}
    assert f"{PATCHES + 1}x{PATCHES + 1}x" not in forward

    # 50 tokens in all, then 36 and 27: differentiation needs an even number.
    def loss(variables, images):
        return half.apply(variables, images).sum()

    with pinned("cuda"), reverse_mode():
        backward = lowered(jax.grad(loss), arguments(half), "cuda", [FUSED, BACKWARD])
    assert custom_calls(backward) == {FUSED: half.depth - 1, BACKWARD: half.depth - 1}
    assert f"{PATCHES + 1}x{PATCHES + 1}x" not in backward
    assert f"{PATCHES + 2}x{PATCHES + 2}x" not in backward


def test_float32_and_weighted_keys_have_no_fused_kernel(ampere):
    single, weighted = model("tdm"), model("tome", jnp.bfloat16)
    assert not custom_calls(lowered(single.apply, arguments(single), "cuda"))
    # ToMe weighs keys in the two blocks after its first stage.
    program = lowered(weighted.apply, arguments(weighted), "cuda", [FUSED])
    assert custom_calls(program) == {FUSED: 2}


def loops(model, batch, **options):
    """How often each loop of a forward pass goes round."""
    images = jax.ShapeDtypeStruct((batch, SIZE, SIZE, 3), model.dtype)
    apply = functools.partial(model.apply, **options)
    program = jax.make_jaxpr(apply)(arguments(model)[0], images).jaxpr
    return [e.params["length"] for e in program.eqns if e.primitive.name == "scan"]


def test_one_cpu_answers_a_large_batch_in_parts():
    # 50 tokens: 46 images are the most, 16 the fewest. 64 images have 3.3 MB of activations in an
    # MLP of 256 channels, 256 have 13.1.
    single = model("tdm")
    with pinned("cpu"):
        assert loops(single, 256) == [8]
        assert loops(single, 230) == [5]
        assert loops(single, 64) == []  # small as it is
        assert loops(single, 257) == []  # a prime
        assert loops(single, 256, train=True) == loops(single, 256, return_info=True) == []
        assert loops(single, 256, mutable=["batch_stats"]) == []
        assert loops(single, 256, rngs={"reducer": jax.random.key(0)}) == []
        with portable():
            assert loops(single, 256) == []
        with reverse_mode():
            assert loops(single, 256) == []
    assert loops(single, 256) == []  # eight devices may share it
    for platform in ("cuda", "tpu", "reference"):
        with pinned(platform):
            assert loops(single, 256) == []


def test_parts_of_a_batch_are_answered_as_the_whole():
    single = model("tdm", distilled=True)
    images = jax.random.normal(jax.random.key(1), (192, SIZE, SIZE, 3))
    variables = jax.jit(single.init)(jax.random.key(0), images[:1])
    whole = jax.jit(single.apply)(variables, images)
    with pinned("cpu"):
        assert loops(single, 192) == [6]
        parts = jax.jit(lambda variables, images: single.apply(variables, images))(
            variables, images
        )
    np.testing.assert_allclose(parts, whole, atol=1e-5)


@pytest.mark.parametrize(("name", "rows"), [("none", 0), ("tdm", 2), ("tome", 0)])
def test_on_a_cpu_bfloat16_is_multiplied_as_it_is(name, rows):
    """XLA does so for matrices, or batches of them along one axis, if the answer is float32."""
    half = model(name, jnp.bfloat16)
    program = lowered(half.apply, arguments(half), "cpu")
    products = re.findall(r"stablehlo.dot_general.* : \((\S+), (\S+)\) -> (\S+)", program)

    def is_fast(left, right, answer):
        small = max(side.count("x") for side in (left, right)) <= 3
        return small and "bf16" in left and "bf16" in right and "bf16" not in answer

    slow = [one for one in products if "bf16" in one[0] and not is_fast(*one)]
    # The patches, what the last block's class token asks and what it mixes, and its row in stages.
    assert len(slow) == 3 + rows, slow
    assert len(products) - len(slow) >= 6 * half.depth


def test_patches_are_a_product_on_a_cpu_and_a_convolution_elsewhere():
    plain = model()
    assert "stablehlo.convolution" not in lowered(plain.apply, arguments(plain), "cpu")
    assert "stablehlo.convolution" in lowered(plain.apply, arguments(plain), "tpu")


@pytest.mark.parametrize("name", ["topk", "tdm", "tome", "dpcknn"])
def test_a_tpu_reduces_without_gathers(name):
    reduced = model(name)
    assert "stablehlo.gather" not in lowered(reduced.apply, arguments(reduced), "tpu")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("name", ["none", "topk", "evit", "tdm", "tome", "dpcknn"])
def test_a_program_for_any_batch_can_be_exported(name, platform):
    reduced = model(name)
    variables, images = arguments(reduced)
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    assert "tensor<?x10xf32>" in lowered(reduced.apply, (variables, images), platform)


@pytest.mark.parametrize("name", ["topk", "tdm"])
def test_on_a_tpu_a_large_batch_keeps_its_layout(name):
    reduced = model(name)
    variables, images = arguments(reduced)
    for batch, layouts in ((64, 0), (128, 2)):  # two stages
        images = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
        program = lowered(reduced.apply, (variables, images), "tpu", ["LayoutConstraint"])
        assert custom_calls(program)["LayoutConstraint"] == layouts


def rounded_products(model):
    """How many products of a TPU's program have their float32 factors rounded to bfloat16."""
    program = lowered(model.apply, arguments(model), "tpu")
    return sum("HIGH" not in line for line in re.findall(r"stablehlo.dot_general.*", program))


@pytest.mark.parametrize("name", ["none", "topk", "evit", "tdm", "tome", "dpcknn", "ats"])
def test_on_a_tpu_only_the_layers_round_their_factors(name):
    # qkv, proj, fc1, fc2, the two products of attention and the head may: weights, sizes and scores
    # may not. The last block, whose class token asks the tokens themselves, has two more.
    single = model(name)
    assert rounded_products(single) == 6 * single.depth + 2 + 1


def test_on_a_tpu_the_mean_over_patches_is_exact():
    bare = model(class_token=False)
    assert rounded_products(bare) == 6 * bare.depth + 1
