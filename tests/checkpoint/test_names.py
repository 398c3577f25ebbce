"""The rename table, both ways and for every scheme."""

import numpy as np
import pytest

from tdm_jax.checkpoint.names import Naming, detect, ranges, to_torch
from tdm_jax.errors import InputError

WIDTH, DEPTH = 6, 3
TREE = {
    "cls_token": (1, 1, WIDTH),
    "dist_token": (1, 1, WIDTH),
    "pos_embed": (1, 6, WIDTH),
    "patch_embed/proj/kernel": (2, 2, 3, WIDTH),
    "patch_embed/proj/bias": (WIDTH,),
    "norm/scale": (WIDTH,),
    "norm/bias": (WIDTH,),
    "head/kernel": (WIDTH, 5),
    "head/bias": (5,),
    "head_dist/kernel": (WIDTH, 5),
    "head_dist/bias": (5,),
    **{
        f"blocks_{i}/{name}": shape
        for i in range(DEPTH)
        for name, shape in {
            "norm1/scale": (WIDTH,),
            "norm1/bias": (WIDTH,),
            "attn/qkv/kernel": (WIDTH, 3 * WIDTH),
            "attn/qkv/bias": (3 * WIDTH,),
            "attn/proj/kernel": (WIDTH, WIDTH),
            "attn/proj/bias": (WIDTH,),
            "norm2/scale": (WIDTH,),
            "norm2/bias": (WIDTH,),
            "mlp/fc1/kernel": (WIDTH, 8),
            "mlp/fc1/bias": (8,),
            "mlp/fc2/kernel": (8, WIDTH),
            "mlp/fc2/bias": (WIDTH,),
        }.items()
    },
}
NAMINGS = [
    Naming("timm"),
    Naming("timm", "module."),
    Naming("hf_file", "vit.", "cls_classifier"),
    Naming("hf_file", "", "cls_classifier"),
    Naming("hf_memory", "deit.", "cls_classifier"),
]


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in TREE.items()}


@pytest.mark.parametrize("naming", NAMINGS, ids=str)
def test_there_and_back(naming, params):
    arrays = to_torch(naming, params)
    assert detect(arrays) == naming
    assert naming.depth(arrays) == DEPTH
    mappings = naming.mappings(DEPTH)
    used = []
    for path, array in params.items():
        mapping = mappings[path]
        used += mapping.sources
        assert [arrays[name].shape for name in mapping.sources] == mapping.shapes(array.shape)
        back = mapping.to_flax([arrays[name] for name in mapping.sources])
        np.testing.assert_array_equal(back, array, err_msg=path)
    assert sorted(used) == sorted(arrays)


def test_names_are_timms(params):
    arrays = to_torch(Naming("timm"), params)
    assert arrays["blocks.2.attn.qkv.weight"].shape == (3 * WIDTH, WIDTH)
    assert arrays["patch_embed.proj.weight"].shape == (WIDTH, 3, 2, 2)
    np.testing.assert_array_equal(arrays["blocks.0.norm1.weight"], params["blocks_0/norm1/scale"])
    assert "head_dist.weight" in arrays


def test_rows_of_qkv_are_query_key_value(params):
    timm = to_torch(Naming("timm"), params)
    file = to_torch(Naming("hf_file", "deit.", "cls_classifier"), params)
    memory = to_torch(Naming("hf_memory", "deit.", "cls_classifier"), params)
    for i, (part, short) in enumerate([("query", "q"), ("key", "k"), ("value", "v")]):
        rows = timm["blocks.1.attn.qkv.weight"][i * WIDTH : (i + 1) * WIDTH]
        name = f"deit.encoder.layer.1.attention.attention.{part}.weight"
        np.testing.assert_array_equal(file[name], rows)
        np.testing.assert_array_equal(memory[f"deit.layers.1.attention.{short}_proj.weight"], rows)


def test_unknown_schemes_and_paths():
    with pytest.raises(InputError, match="got 0 among 2 names"):
        detect(["conv1.weight", "fc.weight"])
    with pytest.raises(InputError, match="got 2"):
        detect(["student.patch_embed.proj.weight", "teacher.patch_embed.proj.weight"])
    with pytest.raises(InputError, match="'neck/kernel'"):
        to_torch(Naming("timm"), {"neck/kernel": np.zeros(1)})


def test_reducer_weights_keep_their_path():
    weights = {"reducer/stage_0/kernel": np.ones((2, 3), np.float32)}
    arrays = to_torch(Naming("timm"), weights)
    assert list(arrays) == list(weights)
    assert arrays["reducer/stage_0/kernel"].shape == (2, 3)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([f"blocks.{i}.ls1.gamma" for i in range(12)], "blocks.0-11.ls1.gamma"),
        (["blocks.0.a", "blocks.5.a", "head"], "blocks.0,5.a, head"),
        (["a", "b", "c"], "a, b and 1 more"),
        ([], ""),
    ],
)
def test_ranges(names, shown):
    assert ranges(names, most=2) == shown
