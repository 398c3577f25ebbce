"""One self-contained page: a table of results, their plots, and an explorer of patches."""

import html
import json
import re
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from tdm_jax.analysis.candidate import Candidate, check_weights, with_baselines
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.results import COMPARISON, Column, Result, known, shown
from tdm_jax.data.pictures import read_examples
from tdm_jax.errors import InputError
from tdm_jax.files import write_text
from tdm_jax.plotting import curves, plots
from tdm_jax.plotting.explorer import explorer

TITLE = "Token reduction, compared"
_PLOTS = (
    ("keep_rate", curves.TOP1, "Top-1 accuracy against keep rate"),
    ("flops", curves.TOP1, "Top-1 accuracy against multiply-adds per image"),
    ("throughput", curves.TOP1, "Top-1 accuracy against throughput"),
    ("diversity", curves.TOP1, "Top-1 accuracy against diversity"),
    ("flops", curves.AGREEMENT, "Agreement with the unreduced model against multiply-adds"),
    ("flops", curves.COSINE, "Cosine with the unreduced model against multiply-adds"),
    ("flops", curves.DENSE, "The same of the patches' features"),
)
_PLOT_SIZE = (4.8, 3.6)  # legible at a phone's width


def check_page(candidates: Sequence[Candidate]) -> None:
    """Raises InputError unless the candidates are of one transformer, with weights."""
    names = sorted({candidate.name for candidate in candidates})
    if len(names) != 1:
        raise InputError(f"a report shows one model; got {', '.join(names) or 'none'}")
    check_weights(candidates)


def write_page(
    path: str | Path,
    candidates: Sequence[Candidate],
    rows: Sequence[Result],
    evaluation: Evaluation,
    *,
    images: int = 8,
    title: str = TITLE,
    remark: str = "",
) -> None:
    """Writes the page, whole or not at all.

    Args:
      path: of the file.
      candidates: who is in the explorer, with weights; of one transformer.
      rows: of the table and the plots.
      evaluation: made to explain, on the data that the explorer's images are from.
      images: how many of them, spread evenly over the validation split.
      title: of the page.
      remark: a line below the table, e.g. the machine.

    Raises:
      InputError: see `check_page`; or nothing can be written there.
    """
    check_page(candidates)
    candidates = with_baselines(candidates)
    pictures = read_examples(evaluation.data_config(candidates[0].model), images, spread=True)
    document = explorer(candidates, pictures, evaluation)
    page = resources.files("tdm_jax.plotting").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(title),
        "table": html_table(rows),
        "remark": html.escape(remark),
        "plots": "\n".join(_figures(rows)),
        # No label may end the script that it stands in.
        "data": json.dumps(document, separators=(",", ":")).replace("<", "\\u003c"),
    }
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], page))


def html_table(rows: Sequence[Result], columns: Sequence[str | Column] = COMPARISON) -> str:
    """The rows as an HTML table, every cell escaped; a model that all share is its caption."""
    visible = shown(rows, columns)
    models = {row.model for row in rows}
    caption = ""
    if len(models) == 1 and known(model := models.pop()):
        visible = [column for column in visible if column.key != "model"]
        caption = f"<caption>{html.escape(model)}</caption>"

    def kind(column: Column) -> str:
        return "text" if column.show is None else "number"

    def cell(row: Result, column: Column) -> str:
        text, spread = map(html.escape, column.cell(row))
        small = f" <small>{spread}</small>" if spread else ""
        return f'<td class="{kind(column)}">{text}{small}</td>'

    head = "".join(
        f'<th scope="col" class="{kind(column)}">{html.escape(column.heading)}</th>'
        for column in visible
    )
    body = "\n".join(f"<tr>{''.join(cell(row, c) for c in visible)}</tr>" for row in rows)
    return f"{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"


def _figures(rows: Sequence[Result]) -> list[str]:
    """Each plot that the rows suffice for, as inline SVG; none without matplotlib."""
    figures: list[str] = []
    if not plots.installed():
        return figures
    for axis, value, name in _PLOTS:
        if not curves.suffices(rows, curves.AXES[axis], value):
            continue
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plot.svg"
            plots.save(plots.plot(rows, axis, size=_PLOT_SIZE, value=value), file)
            text = file.read_text(encoding="utf-8")
        drawing = text[text.index("<svg") :]
        drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
        # Names of one drawing must not be taken for another's.
        drawing = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{axis}-{value.key}-", drawing)
        label = f'<svg role="img" aria-label="{html.escape(name)}"'
        figures.append(
            f"<figure>{drawing.replace('<svg', label, 1)}<figcaption>{name}</figcaption></figure>"
        )
    return figures
