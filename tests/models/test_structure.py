"""What makes the programs fast, read from the programs themselves rather than from a clock."""

import collections
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.extend.core import jaxprs_in_params

from tdm_jax import create_model, make_reducer
from tdm_jax.ops import attention
from tdm_jax.ops.gathering import gather_tokens

BATCH, HEADS, SIZE, PATCH = 4, 2, 112, 16
PATCHES = (SIZE // PATCH) ** 2
MAP = (BATCH, HEADS, PATCHES + 1, PATCHES + 1)
FUSED = "__cudnn$fmhaSoftmax"


def model(reducer="none", dtype=jnp.float32):
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
    assert attention_maps(reduced) == attention_maps(model()) * whole / reduced.depth


def test_scores_of_the_whole_map_are_the_exception():
    # K-Medoids weighs tokens by the attention of all queries: that does need the map.
    reduced = model("kmedoids")
    whole = sum(block.attention == PATCHES for block in reduced.schedule)
    assert attention_maps(reduced) > attention_maps(model()) * whole / reduced.depth


def lowered(function, arguments, platform, calls=()):
    """The program for a platform that need not be here."""
    allowed = [export.DisabledSafetyCheck.custom_call(call) for call in calls]
    exporter = export.export(jax.jit(function), platforms=[platform], disabled_checks=allowed)
    return exporter(*arguments).mlir_module()


@pytest.fixture
def hopper(monkeypatch):
    """A machine on which cuDNN's kernels can be traced."""
    monkeypatch.setattr(attention, "_on_ampere", lambda: True)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)


def custom_calls(program):
    return collections.Counter(re.findall(r"custom_call @([^\s(]*)", program))


@pytest.mark.parametrize("name", ["none", "evit", "tdm"])
def test_on_a_gpu_no_attention_map_reaches_memory(hopper, name):
    half = model(name, jnp.bfloat16)
    forward = lowered(half.apply, arguments(half), "cuda", [FUSED])
    assert custom_calls(forward) == {FUSED: half.depth}
    assert f"{PATCHES + 1}x{PATCHES + 1}x" not in forward

    # 50 tokens in all, then 36 and 27: differentiation needs an even number.
    def loss(params, images):
        return half.apply(params, images).sum()

    backward = lowered(jax.grad(loss), arguments(half), "cuda", [FUSED, FUSED + "Backward"])
    assert custom_calls(backward) == {FUSED: half.depth, FUSED + "Backward": half.depth}


def test_float32_and_weighted_keys_have_no_fused_kernel(hopper):
    single, weighted = model("tdm"), model("tome", jnp.bfloat16)
    assert not custom_calls(lowered(single.apply, arguments(single), "cuda"))
    # ToMe weighs keys in the two blocks after its first stage.
    program = lowered(weighted.apply, arguments(weighted), "cuda", [FUSED])
    assert custom_calls(program) == {FUSED: 2}


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
    params, images = arguments(reduced)
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    assert "tensor<?x10xf32>" in lowered(reduced.apply, (params, images), platform)


@pytest.mark.parametrize("name", ["topk", "tdm"])
def test_on_a_tpu_a_large_batch_keeps_its_layout(name):
    reduced = model(name)
    params, images = arguments(reduced)
    for batch, found in ((64, 0), (128, 2)):  # two stages
        images = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
        program = lowered(reduced.apply, (params, images), "tpu", ["LayoutConstraint"])
        assert custom_calls(program)["LayoutConstraint"] == found


@pytest.mark.parametrize("rank", [2, 3])
def test_a_tpu_takes_by_products_and_others_by_gathers(rank):
    values = jax.ShapeDtypeStruct((BATCH, PATCHES, 8)[:rank], jnp.float32)
    index = jax.ShapeDtypeStruct((BATCH, 5), jnp.int32)
    assert "stablehlo.gather" not in lowered(gather_tokens, (values, index), "tpu")
    assert "stablehlo.gather" in lowered(gather_tokens, (values, index), "cpu")
