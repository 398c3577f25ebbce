"""The arrows between rooms point down, nothing heavy comes in, and every module has its tests."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tdm_jax"
LEAVES = ("version", "errors", "files", "parsing")
# A room imports those before it; the commands, and the front door with them, are above all.
ROOMS = (
    *LEAVES, "ops", "reduction", "parallel", "cli", "models", "data",
    "checkpoint", "training", "analysis", "exporting", "plotting",
)  # fmt: skip
# These are beside the others of their floor: they know this much alone.
KNOW = {
    "errors": set(),
    "files": {"errors"},
    "parsing": {"errors"},
    "ops": {"errors"},
    "parallel": {"errors", "files"},
    "cli": {"errors", "files"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_bytes()) for path in PACKAGE.rglob("*.py")}


def imports(name: str) -> set[str]:
    """Modules of the package that `name` imports, inside functions too."""
    targets = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                targets.add(full if full in TREES else node.module)
    return targets & TREES.keys() - {name}


def is_command(name: str) -> bool:
    """Whether its last statement is `if __name__ == "__main__"`."""
    last = TREES[name].body[-1]
    return isinstance(last, ast.If) and "__name__" in ast.unparse(last.test)


def room(name: str) -> str | None:
    """The room of a module; None for the commands and the front door."""
    return None if name == "tdm_jax" or is_command(name) else name.split(".")[1]


def test_arrows_between_rooms_point_down():
    upwards = {}
    for name in TREES:
        if (here := room(name)) is not None:
            allowed = {here} | KNOW.get(here, set(ROOMS[: ROOMS.index(here)]))
            upwards[name] = {target for target in imports(name) if room(target) not in allowed}
    assert {name: targets for name, targets in upwards.items() if targets} == {}


def test_no_cycles():
    TopologicalSorter({name: imports(name) for name in TREES}).prepare()  # raises CycleError


def test_nobody_imports_a_command():
    arrows = {name: {t for t in imports(name) if is_command(t)} for name in TREES}
    assert {name: targets for name, targets in arrows.items() if targets} == {}


def test_the_root_holds_what_a_user_types():
    modules = {path.stem for path in PACKAGE.glob("*.py") if not is_command(module_name(path))}
    assert modules == {"__init__", *LEAVES}


def only_collects(tree: ast.Module) -> bool:
    """Whether a module holds nothing but a docstring, imports and names for them."""
    kinds = ast.Expr | ast.Import | ast.ImportFrom | ast.Assign
    return all(isinstance(node, kinds) for node in tree.body)


def test_every_module_has_tests():
    """tests/<room>/test_<module>.py, or a test file whose docstring names the module."""
    covered = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        place = path.relative_to(ROOT / "tests").with_name(path.stem.removeprefix("test_"))
        covered.add(".".join(("tdm_jax", *place.parts)))
        docstring = ast.get_docstring(ast.parse(path.read_bytes())) or ""
        covered |= set(re.findall(r"tdm_jax(?:\.\w+)+", docstring))
        for module in re.findall(r"((?:\w+/)*\w+)\.py\b", docstring):
            covered.add(f"tdm_jax.{module.replace('/', '.')}")
    tested = {name for name, tree in TREES.items() if not only_collects(tree)}
    assert sorted(tested - covered) == []


def loaded(modules: list[str], names: tuple[str, ...]) -> str:
    """Which of some libraries are there after an import of some modules, in a fresh process."""
    code = f"import sys, {', '.join(modules)}; print(*(n for n in {names} if n in sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_front_door_is_light():
    heavy = ("torch", "tensorflow", "keras", "sklearn", "matplotlib", "tensorflow_datasets")
    assert loaded(["tdm_jax"], heavy) == ""


def test_no_torch_and_no_tensorflow_at_run_time():
    commands = [name for name in TREES if is_command(name)]
    assert loaded(commands, ("torch", "tensorflow", "keras")) == ""
