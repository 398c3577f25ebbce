"""The notebooks say what they said when they were run, and they run."""

import json
import os
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs/notebooks").glob("*.ipynb"))


def outputs(cells):
    return [output for cell in cells for output in cell.get("outputs", ())]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_clean_outputs(path):
    """All cells run in order, no warnings, no paths of the machine that ran it, small."""
    text = path.read_text()
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {output["output_type"] for output in outputs(code)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert "stderr" not in {output.get("name") for output in outputs(code)}
    assert not re.search(r"/(tmp|home|root|Users|work)/|site-packages|0x[0-9a-f]{6}", text)
    assert len(text) < 500_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all: what the first has trained the others find."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, folder):
    nbclient = pytest.importorskip("nbclient", reason="notebooks run with the extra test")
    nbformat = pytest.importorskip("nbformat", reason="notebooks run with the extra test")
    pytest.importorskip("ipykernel", reason="notebooks run with the extra test")
    pytest.importorskip("matplotlib", reason="notebooks plot with the extra viz")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    # As users compile, on one device: tests/conftest.py asks for eight, and for no optimisation.
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute(env=env)
    assert [o["text"] for o in outputs(notebook.cells) if o.get("name") == "stderr"] == []
