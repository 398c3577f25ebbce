"""The whole road on embedded data: `python -m tdm_jax.demo`, or `make demo`.

Trains a small DeiT to find a handwritten digit among fragments of others, thins its tokens out off
the shelf and after a short fine-tuning, shows that a PyTorch-named export says the same, and
compares. Two CPU cores need about six minutes. `--output` gets `report.html`, `comparison.md`
(.csv, .json), plots, `tokens.png` (.svg) and the trained models; a second run continues where the
first was stopped.

Most patches show nothing of the digit, so it matters which are kept; what photographs say is in
docs/results.md.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from tdm_jax import checkpoint
from tdm_jax.analysis import environment, results
from tdm_jax.analysis.candidate import BASELINE, Candidate
from tdm_jax.analysis.comparison import compare
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.data.pictures import read_examples
from tdm_jax.plotting import figure, plots
from tdm_jax.plotting.figure import Panel
from tdm_jax.plotting.page import write_page
from tdm_jax.plotting.patch_maps import SourceMap
from tdm_jax.reduction import make_reducer
from tdm_jax.training.config import parse
from tdm_jax.training.loop import train_to_end

FLAGS = flags.FLAGS
METHODS = ("random", "evit", "tdm")
KEEP_RATES = (0.7, 0.5, 0.3)
FINE_TUNED = 0.5
NAME = "cluttered digits"
FINE_TUNING_EPOCHS = 0.24


def demo(config: ConfigDict, output: Path) -> str:
    """Runs everything and writes all results below `output`.

    Args:
      config: of the training without reduction, see `configs/cluttered_digits.py`.
      output: a folder, made if it does not exist.

    Returns:
      The comparison as Markdown.

    Raises:
      InputError: the configuration cannot be, or `output` holds runs of another one.
    """
    _say("training without reduction")
    runs = output / "runs"
    train_to_end(config, runs / BASELINE)
    trained = runs / BASELINE / "model"
    model, variables = checkpoint.load_pretrained(trained)
    shelf, tuned = [Candidate(NAME, BASELINE, None, model, variables)], []
    for method, keep_rate in itertools.product(METHODS, KEEP_RATES):
        reducer = make_reducer(method, keep_rate=keep_rate, layers=config.reducer.layers)
        reduced = model.clone(reducer=reducer)
        shelf.append(Candidate(NAME, method, keep_rate, reduced, variables, "off the shelf"))
        if keep_rate == FINE_TUNED:
            _say(f"fine-tuning with {method} at keep rate {keep_rate}")
            workdir = runs / f"{method}-{keep_rate}"
            train_to_end(fine_tuning(config, trained, method, keep_rate), workdir)
            weights = checkpoint.load_pretrained(workdir / "model")[1]
            tuned.append(dataclasses.replace(shelf[-1], variables=weights, training="fine-tuned"))

    _say("evaluating and measuring")
    evaluation = Evaluation(config=parse(config).data)
    rows = compare(
        shelf + tuned, evaluation=evaluation, timing=Timing(rounds=15), batch_size=64, note=_say
    )
    same = round_trip(output / "timm.safetensors", shelf[0], evaluation)
    about: dict[str, Any] = {
        "machine": environment.describe(),
        "note": "one seed; what photographs say is in docs/results.md",
    }
    results.write(rows, output / "comparison", about=about)
    if not plots.installed():
        _say("no plots without matplotlib: pip install 'tdm_jax[viz]'")
    for against in ("keep_rate", "flops", "throughput") if plots.installed() else ():
        plot = plots.plot([row for row in rows if row.training != "fine-tuned"], against, NAME)
        plots.save(plot, output / f"accuracy-{against}.png")
    picture = tokens(tuned[-1], evaluation)
    for suffix in ("png", "svg"):
        figure.save(picture, output / f"tokens.{suffix}")
    _say("writing the report")
    remark = f"{environment.line(about['machine'])}; {about['note']}"
    write_page(output / "report.html", shelf, rows, evaluation, remark=remark)
    return "\n".join([results.markdown(rows), same, remark])


def fine_tuning(config: ConfigDict, trained: Path, method: str, keep_rate: float) -> ConfigDict:
    """The configuration that adapts trained weights to a method in a few epochs."""
    config = ConfigDict(config.to_dict())
    config.init_from = str(trained)
    config.epochs = FINE_TUNING_EPOCHS
    config.optim.learning_rate = config.optim.learning_rate / 16
    config.optim.warmup_epochs = 0.0
    config.eval.every_epochs = 0.0
    config.checkpoint.every_epochs = 0.0
    config.reducer = ConfigDict(
        {"name": method, "keep_rate": keep_rate, "layers": config.reducer.layers}
    )
    return config


def round_trip(path: Path, candidate: Candidate, evaluation: Evaluation) -> str:
    """Exports to a timm-named file, reads that back, and says what the copy achieves.

    Raises:
      RuntimeError: the copy's accuracy is another.
    """
    variables: Any = candidate.variables
    checkpoint.save_safetensors(path, candidate.model, variables, overwrite=True)
    copy = Candidate(NAME, BASELINE, None, *checkpoint.load_pretrained(path))
    own, read = (evaluation(one).columns()["top1_percent"] for one in (candidate, copy))
    if own != read:
        raise RuntimeError(f"{path} has {read}% top-1, the model it was made of {own}%")
    return f"Exported to {path.name} with timm's names and read back: {read:.2f}% top-1, the same."


def tokens(candidate: Candidate, evaluation: Evaluation) -> figure.Figure:
    """One test image of each class and what becomes of its patches, stage by stage."""
    pictures = read_examples(evaluation.data_config(candidate.model), 100)
    first = {picture.label: picture.pixels for picture in reversed(pictures)}
    images = np.stack([first[label] for label in sorted(first)])
    logits, _, _, stages = evaluation.explain(candidate, images)
    panels = []
    for i, image in enumerate(images):
        maps = [SourceMap.of(stage, i, candidate.model.shape.grid) for stage in stages]
        panels.append(
            [
                Panel(image, caption=f"label {sorted(first)[i]}"),
                *(Panel(image, source, caption=f"{source.tokens} tokens") for source in maps),
                Panel(image, maps[0], "importance"),
                Panel(image, maps[0], "diversity", f"says {int(logits[i].argmax())}"),
            ]
        )
    columns = ["image", *(f"after block {stage.layer + 1}" for stage in stages)]
    columns += ["importance", "groups"]
    return figure.figure(panels, columns, title="What TDM keeps, matches and clusters", cell=112)


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def define_flags() -> None:
    """The command's flags."""
    define_config("configs/cluttered_digits.py", "The training to start from.")
    shared.define_output("all results", default="demo_output")


def main() -> None:
    """The command."""
    output = shared.output() or Path()
    # Training, evaluation and comparison share programs; a second run finds them all.
    jax.config.update("jax_compilation_cache_dir", str(output / "compiled"))
    table = demo(FLAGS.config, output)
    print(f"\n{table}\n\nWritten to {output}/")


if __name__ == "__main__":
    define_flags()
    start.run(main)
