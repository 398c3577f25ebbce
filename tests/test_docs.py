"""What the documents say can be done works."""

import contextlib
import importlib
import inspect
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

import tdm_jax
from docs import reference, zoo
from tdm_jax import Preprocessing, checkpoint, describe_reducer, make_reducer
from tdm_jax.data.cluttered_digits import ClutteredDigits
from tdm_jax.reduction.importance import IMPORTANCES
from tdm_jax.reduction.registry import REDUCERS, axes_table
from tests.commands import run

ROOT = Path(__file__).parents[1]
# Pages of the site that only put others together.
COLLECTIONS = {"index", "changelog", "contributing"}
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md") if p.stem not in COLLECTIONS),
]
GUIDE = "docs/write_a_method.md"
# A block of code, the reason not to run it before it, and behind it what it prints.
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]+) -->\n)?```(?P<language>[^\n]*)\n(?P<code>.*?)^```$"
    r"(?:\n\n^```text\n(?P<prints>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
# Documents whose Python other tests run, with what belongs to it.
PYTHON_ELSEWHERE = {
    "README.md": "tests/test_docs.py",
    "docs/export.md": "tests/exporting/test_artifact.py",
}


def blocks(document: str, language: str) -> list[re.Match[str]]:
    """The blocks of code that are to be run."""
    found = BLOCK.finditer((ROOT / document).read_text())
    return [block for block in found if block["language"] == language and not block["why"]]


def commands(document: str) -> list[list[str]]:
    """The commands that are to be run, each without `python -m`."""
    found = []
    for block in blocks(document, "sh"):
        for line in block["code"].replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                assert words[:2] == ["python", "-m"], line
                found.append(words[2:])
    return found


def code(document: str, containing: str) -> str:
    (found,) = [b["code"] for b in blocks(document, "python") if containing in b["code"]]
    return found


def section(text: str, title: str) -> str:
    _, found, rest = text.partition(f"## {title}\n")
    return rest.split("\n## ")[0] if found else ""


def test_the_readme_names_every_method():
    rows = re.findall(r"^\| (`.*?) \|", section((ROOT / "README.md").read_text(), "Methods"), re.M)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(REDUCERS)


def names(containing: str) -> dict[str, Any]:
    """What a block of code in docs/write_a_method.md defines."""
    namespace: dict[str, Any] = {"__name__": "contributed"}
    exec(compile(code(GUIDE, containing), GUIDE, "exec"), namespace)
    return namespace


def reduced(model, variables):
    """`Info` of two images, reduced from 16 tokens to 8 in the second of three blocks."""
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    _, info = jax.jit(lambda v, x: model.apply(v, x, return_info=True))(variables, images)
    assert info.token_counts == (16, 8, 8)
    return info


def test_tables_are_the_codes():
    assert axes_table() in (ROOT / "docs/methods.md").read_text()
    text = (ROOT / "docs/zoo.md").read_text()
    assert zoo.backbones() in text
    assert zoo.methods() in text


def test_the_zoo_names_every_method_and_golden_file():
    assert zoo.METHODS.keys() == REDUCERS.keys()
    starts = tuple(start for compared in zoo.METHODS.values() for start in compared.goldens)
    files = {path.stem for path in zoo.GOLDENS.glob("*.npz")}
    assert {file for file in files if not file.startswith(starts)} == {"vit_weights"}


def test_every_public_name_says_what_it_is():
    """That the reference has them all, the site's build checks."""
    names = dict(reference.public_names())
    assert {f"tdm_jax.{name}" for name in ("reduction", "train", "models.vit")} < names.keys()
    assert [name for name, value in names.items() if not inspect.getdoc(value)] == []


def test_the_pages_of_the_reference_are_there():
    pages = reference.pages()
    assert {f"tdm_jax.{name}" for name in ("ops", "ops.merging", "train")} < pages.keys()
    assert "--workdir" in pages["tdm_jax.train"]
    assert "autofunction:: tdm_jax.unmerge" in pages["index"]


def test_the_method_in_the_guide_is_one_in_less_than_thirty_lines(monkeypatch, tiny_model):
    assert len(code(GUIDE, "STEADY =").splitlines()) < 30
    monkeypatch.setitem(REDUCERS, "steady", names("STEADY =")["STEADY"])
    info = reduced(*tiny_model("steady", 0.5, layers=(1,)))
    assert (info.assign >= 0).all()
    settings = {"counts": (5,), "layers": (1,), "linkage": "single"}
    assert make_reducer("steady", **settings).grouping.linkage == "single"
    described = describe_reducer(make_reducer("steady", **settings))
    assert described == {"name": "steady", "counts": [5], "layers": [1], "linkage": "single"}


def test_the_part_in_the_guide_is_one(monkeypatch, tiny_model):
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


@pytest.fixture
def sandbox(tmp_path, monkeypatch, tiny_model):
    """A folder to work in, with small things of the names that the documents give to large ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dinov2_small").symlink_to(ROOT / "tests/goldens/backbones/hf_dinov2_reg")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 4)):
        for name in ("coats", "shoes"):
            (folder := tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    sizes = {"image_size": 32, "depth": 6, "in_channels": 1, "num_classes": 10}
    model, variables = tiny_model(**sizes)
    checkpoint.save_model(tmp_path / "runs/start", checkpoint.describe(model), variables)
    monkeypatch.setattr(ClutteredDigits, "__len__", lambda self: 24)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_block_of_code_is_run_unless_it_says_why_not(document):
    """Python and shells; what is written in neither shows something else."""
    text = (ROOT / document).read_text()
    found = list(BLOCK.finditer(text))
    languages = {block["language"].split(" ")[0] for block in found}
    assert languages <= {"python", "sh", "json", "text", "", "{include}"}
    assert len(re.findall("^ *```", text, re.MULTILINE)) == sum(
        2 if block["prints"] is None else 4 for block in found
    )
    assert all(commands(document))
    if elsewhere := PYTHON_ELSEWHERE.get(document):
        assert Path(document).name in (ROOT / elsewhere).read_text()


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(document, marks=[pytest.mark.slow] if "start" in document else [])
        for document in DOCUMENTS
        if document not in PYTHON_ELSEWHERE and blocks(document, "python")
    ],
)
@pytest.mark.usefixtures("sandbox")
def test_the_python_of_a_document_runs_and_prints_what_it_says(document):
    given = {"tdm_jax": tdm_jax, "images": jnp.zeros((1, 168, 224, 3)), "__name__": "shown"}
    for block in blocks(document, "python"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block["code"], document, "exec"), given)
        assert out.getvalue() == (block["prints"] or "")


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "sh")])
@pytest.mark.usefixtures("sandbox")
def test_the_commands_of_a_document_run(document, monkeypatch):
    for module, *arguments in commands(document):
        monkeypatch.setattr(sys, "argv", [module, *arguments])  # settings are read there
        run(importlib.import_module(module), *arguments)


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
