"""How Sphinx builds the site: `make docs`."""

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for autodoc's processes, too

import reference  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402
from sphinx.util import logging  # noqa: E402

import tdm_jax  # noqa: E402

project = "tdm_jax"
author = "the authors of tdm_jax"
version = release = tdm_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]

highlight_language = "none"  # where a block names no other
html_theme = "furo"
html_title = f"tdm_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_copy_source = html_show_copyright = False

# The notebooks show what they were committed with; tests/test_notebooks.py runs them.
nb_execution_mode = "off"
# Headings are found as on GitHub.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

# Single backticks in docstrings are code, and links where the reference knows the name.
default_role = "py:obj"
# Of names like `tdm_jax.…` all must be found; others' are, too, where there is a link to them.
nitpick_ignore_regex = [("py:.*", r"(?!tdm_jax\.).*")]
nitpick_ignore = [
    ("py:class", "tdm_jax.parsing.T"),
    ("py:class", "tdm_jax.parallel.overlap.Batch"),
]
# Attributes of one name in several classes: nothing is meant by their names alone.
suppress_warnings = ["ref.python"]
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
napoleon_use_ivar, napoleon_attr_annotations = True, False  # signatures have the types
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88

# Links of the pages that leave the folder on GitHub, and what the site has instead.
ELSEWHERE = {
    r"\.\./README\.md#commands": "api/commands.rst",
    r"\.\./README\.md#methods": "zoo.md#methods",
    r"\.\./README\.md": "index.md",
    r"\.\./CONTRIBUTING\.md": "contributing.md",
    r"\.\./CHANGELOG\.md": "changelog.md",
    r"\.\./tdm_jax/([\w/]+)\.py": lambda link: f"api/tdm_jax.{link[1].replace('/', '.')}.rst",
}


def write_reference(app: Sphinx) -> None:
    """Writes the pages of the reference that are not there yet, or not as they should be."""
    folder = HERE / "api"
    folder.mkdir(exist_ok=True)
    made = {folder / f"{name}.rst": text for name, text in reference.pages().items()}
    for path, text in made.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for path in set(folder.iterdir()) - made.keys():
        path.unlink()


def inside(app: Sphinx, page: str, source: list[str]) -> None:
    """Leads links that leave the folder on GitHub to the site's own pages."""
    for link, own in ELSEWHERE.items():
        source[0] = re.sub(rf"(?<=\]\(){link}(?=[)#])", own, source[0])


def verbatim(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Shows what docstrings indent by four, commands and formulas, as it stands."""
    text = re.sub(r"(?<=\n\n)(?=    \S)", "::\n\n", "\n".join(lines))
    if what == "module":
        lines[:] = text.split("\n")


def fields(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out what named tuples say of their fields, which the class's docstring describes."""
    return (getattr(value, "__doc__", None) or "").startswith("Alias for field number") or None


def plainly(
    app: Sphinx, what: str, name: str, value: Any, options: Any, takes: str | None, gives: str
) -> tuple[str, str] | None:
    """Signatures as they are written, and without what flax adds to a module's."""
    if takes is None:
        return None
    takes = re.sub(r"(, )?parent: .*? = <flax.*?>, name: str \| None = None", "", takes)
    takes = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", takes)
    return takes.replace("jaxlib._jax.", ""), gives and gives.replace("jaxlib._jax.", "")


def front_door(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Finds what docstrings call by the name that `import tdm_jax` gives it."""
    if node.get("refdomain") != "py" or "." in node["reftarget"]:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", f"tdm_jax.{node['reftarget']}", node, content
    )


def complete(app: Sphinx, env: Any) -> None:
    """Warns of public names that the reference has not."""
    there = env.get_domain("py").objects
    for name, _ in reference.public_names():
        if name not in there:
            logging.getLogger(__name__).warning("%s is public, and not in the reference", name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's hook."""
    app.connect("builder-inited", write_reference)
    app.connect("source-read", inside)
    app.connect("autodoc-process-docstring", verbatim)
    app.connect("autodoc-skip-member", fields)
    app.connect("autodoc-process-signature", plainly)
    app.connect("missing-reference", front_door)
    app.connect("env-check-consistency", complete)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
