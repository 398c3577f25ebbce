"""What the documents say can be done works."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tdm_jax import create_model, make_reducer
from tdm_jax.reduction.registry import REDUCERS

ROOT = Path(__file__).parents[1]


def code(document: str, containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if containing in block]
    return block


def section(text: str, title: str) -> str:
    _, found, rest = text.partition(f"## {title}\n")
    return rest.split("\n## ")[0] if found else ""


def test_the_readme_names_every_method():
    rows = re.findall(r"^\| (`.*?) \|", section((ROOT / "README.md").read_text(), "Methods"), re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted([*REDUCERS, "tdm"])


def test_the_method_in_contributing_is_one(monkeypatch):
    namespace = {"__name__": "norm"}
    exec(compile(code("CONTRIBUTING.md", "class Norm"), "CONTRIBUTING.md", "exec"), namespace)
    monkeypatch.setitem(REDUCERS, "norm", namespace["Norm"])
    sizes = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    for name in ("norm", "norm+tdm"):
        model = create_model("vit", make_reducer(name, keep_rate=0.5, layers=(1,)), **sizes)
        params = jax.jit(model.init)(jax.random.key(1), images)
        apply = jax.jit(lambda p, x, model=model: model.apply(p, x, return_info=True))
        _, info = apply(params, images)
        assert info.token_counts == (16, 8, 8)
        assert (info.assign >= 0).all() == name.endswith("tdm")


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run(tmp_path, monkeypatch):
    from tdm_jax import checkpoint

    model = create_model("deit_tiny_patch16_224", depth=12, width=64, num_heads=1)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    checkpoint.save_safetensors(tmp_path / "deit.safetensors", model, params)
    text = code("README.md", "load_pretrained").replace(
        "deit_small_patch16_224.pth", str(tmp_path / "deit.safetensors")
    )
    namespace = {"images": jnp.zeros((1, 224, 224, 3))}
    exec(compile(text, "README.md", "exec"), namespace)
    assert namespace["info"].token_counts[3] == 138
    assert namespace["dense"].shape == (1, 196, 64)
    assert namespace["logits"].shape == (1, 1000)
    assert namespace["cost"].macs < 4_603_567_752


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_a_document_names_exists(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:tdm_jax|configs|tests|launch)/[\w./]+)`", text)
    named += re.findall(r"\]\((?!http)([^)#]+)\)", text)
    named.remove("tdm_jax/reduction/norm.py") if document == "CONTRIBUTING.md" else None
    for command in re.findall(r"python -m (tdm_jax\.\w+)", text):
        named.append(command.replace(".", "/") + ".py")
    for row in re.findall(r"^\| `(\w+)` \|", section(text, "Commands"), re.MULTILINE):
        named.append(f"tdm_jax/{row}.py")
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
