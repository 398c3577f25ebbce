"""What the documents say can be done works."""

import importlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags

from tdm_jax import Preprocessing, checkpoint, describe_reducer, make_reducer
from tdm_jax.reduction.importance import IMPORTANCES
from tdm_jax.reduction.registry import REDUCERS, axes_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(
        f"docs/{n}.md"
        for n in ("backbones", "export", "methods", "performance", "results", "serving")
    ),
]


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
    assert sorted(named) == sorted(REDUCERS)


def names(containing: str) -> dict[str, Any]:
    """What a block of code in CONTRIBUTING.md defines."""
    namespace: dict[str, Any] = {"__name__": "contributed"}
    exec(compile(code("CONTRIBUTING.md", containing), "CONTRIBUTING.md", "exec"), namespace)
    return namespace


def reduced(model, variables):
    """`Info` of two images, reduced from 16 tokens to 8 in the second of three blocks."""
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    _, info = jax.jit(lambda v, x: model.apply(v, x, return_info=True))(variables, images)
    assert info.token_counts == (16, 8, 8)
    return info


def test_the_table_of_axes_is_the_codes():
    assert axes_table() in (ROOT / "docs/methods.md").read_text()


def test_the_method_in_contributing_is_one_in_less_than_thirty_lines(monkeypatch, tiny_model):
    assert len(code("CONTRIBUTING.md", "STEADY =").splitlines()) < 30
    monkeypatch.setitem(REDUCERS, "steady", names("STEADY =")["STEADY"])
    info = reduced(*tiny_model("steady", 0.5, layers=(1,)))
    assert (info.assign >= 0).all()
    settings = {"counts": (5,), "layers": (1,), "linkage": "single"}
    assert make_reducer("steady", **settings).grouping.linkage == "single"
    described = describe_reducer(make_reducer("steady", **settings))
    assert described == {"name": "steady", "counts": [5], "layers": [1], "linkage": "single"}


def test_the_part_in_contributing_is_one(monkeypatch, tiny_model):
    part = names("class Norm")["Norm"]()
    monkeypatch.setitem(IMPORTANCES, "norm", part)
    monkeypatch.setitem(REDUCERS, "norm", make_reducer("topk", importance="norm"))
    for name in ("norm", "norm+tdm"):
        info = reduced(*tiny_model(name, 0.5, layers=(1,)))
        assert (info.assign >= 0).all() == name.endswith("tdm")
    assert make_reducer("evit", importance="norm").importance == part


@pytest.mark.slow
def test_the_ten_lines_of_the_readme_run(tmp_path, tiny_model):
    sizes = {"image_size": 224, "patch_size": 16, "depth": 12, "num_classes": 1000}
    sizes |= {"width": 64, "num_heads": 1, "preprocessing": Preprocessing()}
    model, variables = tiny_model(**sizes)
    checkpoint.save_safetensors(tmp_path / "deit.safetensors", model, variables)
    model, variables = tiny_model("tdm", 0.5, layers=(1,))
    checkpoint.save_model(tmp_path / "digits", checkpoint.describe(model), variables)
    text = code("README.md", "load_pretrained")
    deit = "deit.safetensors"
    for name, path in (("runs/digits", "digits"), ("dinov2-small", deit), ("deit_small.pth", deit)):
        assert name in text
        text = text.replace(name, str(tmp_path / path))
    namespace = {"images": np.zeros((1, 300, 200, 3), np.uint8)}
    exec(compile(text, "README.md", "exec"), namespace)
    assert namespace["info"].token_counts[:4] == (196, 196, 196, 138)
    assert [stage.layer for stage in namespace["info"].intermediates] == [3, 7, 11]
    assert namespace["dense"].shape == (1, 196, 64)
    assert namespace["logits"].shape == (1, 1000)
    assert namespace["cost"].macs < 4_603_567_752


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:tdm_jax|configs|tests|launch)/[\w./]+)`", text)
    folder = Path(document).parent
    named += [str(folder / link) for link in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
    for command in re.findall(r"python -m (tdm_jax(?:\.\w+)+)", text):
        named.append(command.replace(".", "/") + ".py")
    for row in re.findall(r"^\| `([\w.]+)` \|", section(text, "Commands"), re.MULTILINE):
        named.append(f"tdm_jax/{row.replace('.', '/')}.py")
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_know_the_flags_that_a_document_gives_them(document):
    text = (ROOT / document).read_text().replace("\\\n", " ")
    for name, arguments in re.findall(r"python -m (tdm_jax(?:\.\w+)+)(.*)", text):
        before = set(flags.FLAGS)
        try:
            importlib.import_module(name).define_flags()
            assert set(re.findall(r"--(\w+)", arguments)) <= set(flags.FLAGS), name
        finally:
            for flag in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, flag)
