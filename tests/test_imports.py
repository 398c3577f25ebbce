"""The arrows between modules point one way, and nothing heavy comes in by the back door."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tdm_jax"
# Leaves know nothing of the package but how errors look.
LEAVES = ("tokens", "errors", "losses", "metrics", "optim", "partition", "augment", "files")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(name, *, late=True):
    """Modules of the package that `name` imports; `late`: inside functions too."""
    found = set()
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return {target for target in found if target in MODULES} - {name}


def test_no_cycles():
    # A package's __init__ collects what is below it; those arrows are not dependencies. Nor is an
    # import inside a function, which puts off a slow one.
    graph = {
        name: {target for target in imported(name, late=False) if not name.startswith(f"{target}.")}
        for name in MODULES
        if name != "tdm_jax"
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_no_siblings(leaf):
    assert imported(f"tdm_jax.{leaf}") <= {"tdm_jax.errors"}


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("tdm_jax.reduction", "tdm_jax.models.vit"),
        ("tdm_jax.models.vit", "tdm_jax.models"),
        ("tdm_jax.data", "tdm_jax.training.step"),
        ("tdm_jax.checkpoint", "tdm_jax.training.step"),
        ("tdm_jax.training.step", "tdm_jax.train"),
    ],
)
def test_lower_layers_do_not_know_higher_ones(below, above):
    reached, todo = (
        set(),
        [name for name in MODULES if name == below or name.startswith(f"{below}.")],
    )
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += imported(name)
    assert above not in reached


def test_nobody_imports_a_command_but_its_own_kind():
    # `train` and `evaluate` are commands that others build on, through their functions.
    commands = {
        name for name, path in MODULES.items() if 'if __name__ == "__main__"' in path.read_text()
    } - {"tdm_jax.train", "tdm_jax.evaluate"}
    for name in MODULES.keys() - commands:
        assert not imported(name) & commands, name


def test_no_torch_and_no_tensorflow_at_run_time():
    code = (
        "import sys, tdm_jax, tdm_jax.train, tdm_jax.evaluate; "
        "print([m for m in ('torch', 'tensorflow', 'sklearn', 'keras') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
