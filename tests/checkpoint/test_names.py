"""Names and layouts, both ways and for every program.

Covers checkpoint/name_tables.py, checkpoint/layouts.py and checkpoint/foreign.py.
"""

import numpy as np
import pytest

from tdm_jax.checkpoint.foreign import ignored, refuse
from tdm_jax.checkpoint.layouts import Layout
from tdm_jax.checkpoint.names import Naming, detect, ranges, to_torch
from tdm_jax.errors import InputError

WIDTH, DEPTH, HEADS, PATCH = 6, 4, 2, 2
SHAPES = {
    "cls_token": (1, 1, WIDTH),
    "dist_token": (1, 1, WIDTH),
    "reg_token": (1, 2, WIDTH),
    "pos_embed": (1, 6, WIDTH),
    "attn_pool/latent": (1, 1, WIDTH),
    "patch_embed/proj/kernel": (PATCH, PATCH, 3, WIDTH),
    "mlp/fc1/kernel": (WIDTH, 8),
    "mlp/fc1/bias": (8,),
    "mlp/norm/scale": (8,),
    "mlp/norm/bias": (8,),
    "mlp/fc2/kernel": (8, WIDTH),
    "attn/qkv/kernel": (WIDTH, 3 * WIDTH),
    "attn_pool/kv/kernel": (WIDTH, 2 * WIDTH),
    "attn_pool/kv/bias": (2 * WIDTH,),
    "head/kernel": (WIDTH, 5),
    "head/bias": (5,),
    "head_dist/kernel": (WIDTH, 5),
    "head_dist/bias": (5,),
}


def shape(path, naming):
    for end, found in SHAPES.items():
        if path.endswith(end):
            return found
    if path.endswith("attn/qkv/bias"):
        return (len(naming.qkv_bias) * WIDTH,)
    return (WIDTH, WIDTH) if path.endswith("kernel") else (WIDTH,)


def naming(scheme, prefix="", *forms, **settings):
    return Naming(scheme, prefix, frozenset(forms), **settings)


NAMINGS = {
    "timm": naming("timm"),
    "timm in a wrapper": naming("timm", "module."),
    "timm's EVA-02": naming("timm", "", "attn.q_proj", "mlp.fc1_g", qkv_bias="qv"),
    "timm's DINOv3": naming("timm", "", "gamma_1", "q_bias", qkv_bias="qv"),
    "DINOv2": naming("timm", "", "register_tokens", "mlp.w12"),
    "DINOv2 in chunks": naming("timm", "", "register_tokens", chunk=2),
    "ViT": naming("hf", "vit."),
    "DeiT": naming("hf", "", "cls_classifier"),
    "DeiT in memory": naming("hf", "deit.", "cls_classifier", "q_proj"),
    "HF DINOv2": naming("hf", "dinov2.", "layer_scale1", "weights_in"),
    "HF DINOv2 in memory": naming("hf", "", "layer_scale1", "q_proj", "gate_proj"),
    "HF DINOv3": naming("hf_dinov3", "", "gate_proj", qkv_bias=""),
    "HF DINOv3 in memory": naming("hf_dinov3", "", "model.layer.", qkv_bias="qv"),
    "CLIP": naming("hf_clip", "vision_model."),
    "SigLIP": naming("hf_clip", "", "classifier"),
    "NaFlex": naming("hf_clip", "", "naflex", sizes={"row": PATCH, "column": PATCH}),
    "OpenCLIP": naming("openclip"),
    "AugReg": naming("flax", "", sizes={"heads": HEADS}),
    "big_vision": naming("flax", "params/", "LayerNorm_1", sizes={"heads": HEADS}),
    "SigLIP 2": naming(
        "flax", "params/img/", "LayerNorm_1", "encoderblock/", sizes={"heads": HEADS}
    ),
}


def params_of(naming):
    rng = np.random.default_rng(0)
    paths = [path for path, mapping in naming.mappings(DEPTH).items() if mapping.pieces]
    return {p: rng.normal(size=shape(p, naming)).astype(np.float32) for p in paths}


@pytest.fixture
def params():
    return params_of(naming("timm"))


@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS)
def test_there_and_back(naming):
    params = params_of(naming)
    arrays = to_torch(naming, params)
    assert detect(arrays) == naming
    assert naming.depth(arrays) == DEPTH
    mappings = naming.mappings(DEPTH)
    used = set()
    for path, array in params.items():
        mapping = mappings[path]
        used |= set(mapping.sources)
        assert [arrays[name].shape for name in mapping.sources] == mapping.shapes(array.shape)
        assert mapping.our_shape(arrays) == array.shape
        back = mapping.read(arrays)
        np.testing.assert_array_equal(back, array, err_msg=path)
        assert not np.shares_memory(back, arrays[mapping.sources[0]])
    assert used == arrays.keys()


def test_names_are_timms(params):
    arrays = to_torch(Naming("timm"), params)
    assert arrays["blocks.2.attn.qkv.weight"].shape == (3 * WIDTH, WIDTH)
    assert arrays["patch_embed.proj.weight"].shape == (WIDTH, 3, 2, 2)
    np.testing.assert_array_equal(arrays["blocks.0.norm1.weight"], params["blocks_0/norm1/scale"])
    assert {"head_dist.weight", "blocks.3.ls1.gamma", "attn_pool.mlp.fc1.bias"} <= arrays.keys()


def test_rows_of_qkv_are_query_key_value(params):
    params = {k: v for k, v in params.items() if "attn/qkv" in k}
    timm = to_torch(Naming("timm"), params)["blocks.1.attn.qkv.weight"]
    file = to_torch(NAMINGS["DeiT"], params)
    memory = to_torch(NAMINGS["DeiT in memory"], params)
    flax = to_torch(NAMINGS["SigLIP 2"], params)
    for i, part in enumerate(("query", "key", "value")):
        rows = timm[i * WIDTH : (i + 1) * WIDTH]
        name = f"encoder.layer.1.attention.attention.{part}.weight"
        np.testing.assert_array_equal(file[name], rows)
        name = f"deit.layers.1.attention.{part[0]}_proj.weight"
        np.testing.assert_array_equal(memory[name], rows)
        name = f"params/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/{part}/kernel"
        assert flax[name].shape == (DEPTH, WIDTH, HEADS, WIDTH // HEADS)
        np.testing.assert_array_equal(flax[name][1].reshape(WIDTH, WIDTH), rows.T)


def test_the_gate_comes_first():
    array = np.arange(WIDTH * 8, dtype=np.float32).reshape(WIDTH, 8)
    written = to_torch(NAMINGS["HF DINOv3"], {"blocks_0/mlp/fc1/kernel": array})
    np.testing.assert_array_equal(written["layer.0.mlp.gate_proj.weight"], array[:, :4].T)
    np.testing.assert_array_equal(written["layer.0.mlp.up_proj.weight"], array[:, 4:].T)


def test_flat_patches_have_channels_last():
    kernel = np.arange(PATCH * PATCH * 3 * WIDTH, dtype=np.float32)
    kernel = kernel.reshape(PATCH, PATCH, 3, WIDTH)
    written = to_torch(NAMINGS["NaFlex"], {"patch_embed/proj/kernel": kernel})
    flat = written["embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(flat[1], kernel[..., 1].reshape(-1))


def test_unknown_schemes_and_paths():
    nothing = np.zeros(1, np.float32)
    with pytest.raises(InputError, match="got 0 among 2 names"):
        detect({"conv1.weight": nothing, "fc.weight": nothing})
    both = ("student.patch_embed.proj.weight", "teacher.patch_embed.proj.weight")
    with pytest.raises(InputError, match="got 2"):
        detect(dict.fromkeys(both, nothing))
    with pytest.raises(InputError, match="'neck/kernel'"):
        to_torch(Naming("timm"), {"neck/kernel": np.zeros(1)})


def test_reducer_weights_keep_their_path():
    weights = {"reducer/stage_0/kernel": np.ones((2, 3), np.float32)}
    arrays = to_torch(Naming("timm"), weights)
    assert list(arrays) == list(weights)
    assert arrays["reducer/stage_0/kernel"].shape == (2, 3)


def test_a_layout_of_another_rank():
    assert Layout("out in", "in out").our_shape((3,), {}) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embeddings.mask_token", True),
        ("decoder_blocks.0.attn.qkv.weight", True),
        ("decoder.decoder_layers.0.mlp.fc1.bias", True),
        ("text_model.encoder.layers.0.mlp.fc1.bias", True),
        ("transformer.resblocks.0.ln_1.weight", True),
        ("params/txt/Embed_0/embedding", True),
        ("vision_model.embeddings.position_ids", True),
        ("visual.transformer.resblocks.0.ln_1.weight", False),
        ("params/img/embedding/bias", False),
        ("pos_embed", False),
        ("positional_embeddings", False),
    ],
)
def test_ignored(name, expected):
    assert ignored(name) == expected


TIMM = {"patch_embed.proj.weight": (6, 3, 2, 2), "pos_embed": (1, 5, 6)}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ({**TIMM, "blocks.0.attn.relative_position_index": (9, 9)}, "BEiT.*expected a ViT, DeiT"),
        ({**TIMM, "layers.0.blocks.0.norm1.weight": (6,)}, "windows and stages"),
        ({**TIMM, "patch_embed.backbone.stem.conv.weight": (6, 3, 7, 7)}, "hybrid stem"),
        ({"embedding/kernel": (1, 1, 8, 6), "conv_root/kernel": (7, 7, 3, 8)}, "hybrid stem"),
        ({**TIMM, "blocks.0.attn.q_norm.weight": (3,)}, "normalised queries and keys"),
        ({**TIMM, "blocks.0.attn.qkv.qweight": (6, 6)}, "quantised weights; expected those"),
        ({**TIMM, "blocks.0.attn.qkv.SCB": (6,)}, "quantised"),
        ({**TIMM, "storage_tokens": (1, 4, 6)}, "facebook's own names of DINOv3"),
        ({"decoder_embed.weight": (6, 6)}, "the decoder of MAE alone"),
        ({"text_model.final_layer_norm.weight": (6,)}, "a text tower alone; expected the vision"),
        ({"token_embedding.weight": (6, 6)}, "a text tower alone"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(reversed(value)),
)
def test_refusals(names, reason):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in names.items()}
    with pytest.raises(InputError, match=f"x.pth: not supported: .*{reason}") as error:
        refuse("x.pth", arrays)
    assert "\n" not in str(error.value)


def test_integers_of_one_byte_are_quantised():
    arrays = {name: np.zeros(shape, np.float32) for name, shape in TIMM.items()}
    refuse("x", arrays)
    with pytest.raises(InputError, match="quantised"):
        refuse("x", arrays | {"blocks.0.mlp.fc1.weight": np.zeros((2, 2), np.int8)})


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
