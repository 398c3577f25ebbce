r"""The method that keeps most of a network at a given cost: `python -m tdm_jax.search`.

    python -m tdm_jax.search --checkpoint=dinov2_small --image_size=224 --macs_ratio=0.65 \
        --data=folder --data_dir=photos --output=search

needs photos, no labels: `--images` of the training split to choose by, `--unseen` of the validation
split to report on; photos of any kind (`--data=photos`) are divided. What is
searched, and how, `tdm_jax.analysis.search` says. The same command goes on where it was stopped.
`search.md`, `.csv`, `.json`, a plot and `best.txt`, which holds the winner as every command takes
it (`--methods=`, `--reducer=`), follow at the end; with several budgets one of each.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from tdm_jax.analysis import costs, environment, results
from tdm_jax.analysis.candidate import make_candidates, parse_method
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.analysis.fidelity import Photographs
from tdm_jax.analysis.results import Result
from tdm_jax.analysis.search import Measurements, Search, Trial, macs_of_latency
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.data import DataConfig
from tdm_jax.data.pictures import Picture, read_examples
from tdm_jax.errors import InputError
from tdm_jax.files import write_text
from tdm_jax.plotting import plots
from tdm_jax.plotting.curves import COSINE

FLAGS = flags.FLAGS
TABLE = ("method", "macs", "agreement_percent", "cosine", "dense_cosine", "examples", "description")


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_checkpoint()
    shared.define_data(eval_batch_size=32)
    flags.DEFINE_list("gmacs", None, "Multiply-adds that an image may cost, in G.")
    flags.DEFINE_list("macs_ratio", None, "The same as shares of the unreduced model's.")
    text = "The budget as a share of the unreduced model's time on this device, measured first."
    flags.DEFINE_float("latency_ratio", None, text, 0.0, 1.0)
    flags.DEFINE_integer("images", 192, "Images to choose by.", 8)
    flags.DEFINE_integer("unseen", 384, "Images to report on, which no choice sees.", 8)
    flags.DEFINE_float("dense_weight", 0.25, "Weight of the dense features' loss.", 0.0)
    flags.DEFINE_bool("ablation", False, "Move the winner along each axis, one at a time, too.")
    shared.define_output("tables, plots and the winner", default=None)


def main() -> None:
    """The command."""
    output: Any = shared.output()
    plots.check_installed()
    data = shared.data("a search compares models on images")
    given = [FLAGS.gmacs, FLAGS.macs_ratio, FLAGS.latency_ratio]
    if sum(budget is not None for budget in given) != 1:
        raise InputError(
            "a search needs a budget; expected one of --gmacs, --macs_ratio and --latency_ratio"
        )
    (candidate,) = make_candidates(methods=["none"], **shared.checkpoint())
    whole = costs.multiply_adds(candidate.model)
    shares = shared.numbers("macs_ratio") or []
    budgets = [int(share * whole) for share in shares]
    budgets = budgets or [int(gmacs * 1e9) for gmacs in shared.numbers("gmacs") or []]
    config = Evaluation(data).data_config(candidate.model)
    both = photos(config)
    if FLAGS.latency_ratio is not None:
        start.note("search: how much the time buys on this device")
        timing, size = Timing(rounds=10), FLAGS.eval_batch_size
        budgets = [macs_of_latency(candidate, FLAGS.latency_ratio, timing, size)]
    measured = []
    for pictures in both:
        start.note(f"search: what the unreduced model says to {len(pictures)} images")
        pixels = np.stack([picture.pixels for picture in pictures])
        photographs = Photographs(candidate, pixels, config, FLAGS.eval_batch_size)
        digest = hashlib.sha256(pixels.tobytes()).hexdigest()
        measured.append(Measurements(candidate, photographs, digest, output / "measured"))
    about = environment.describe() | {"images": len(measured[0]), "unseen": len(measured[1])}
    found: list[list[Result]] = []
    for macs in budgets:
        search = Search(candidate, measured[0], measured[1], macs, FLAGS.dense_weight, start.note)
        found.append(search())
        write(found, output, about)
        if FLAGS.ablation:
            name, settings = parse_method(str(found[-1][0].description))
            moved = search.ablation(Trial.of(name, settings))
            path = output / f"ablation_{macs / 1e9:.2f}"
            results.write(moved, path, about, columns=TABLE, remark=environment.line(about))
    rows = [row for of_budget in found for row in of_budget]
    print(f"{results.markdown(rows, TABLE)}\n{environment.line(about)}")
    print(f"Written to {output}/")


def write(found: Sequence[Sequence[Result]], output: Path, about: dict[str, Any]) -> None:
    """The tables, the winners and the plot of what has been found so far, by budget."""
    rows = [row for of_budget in found for row in of_budget]
    results.write(rows, output / "search", about, columns=TABLE, remark=environment.line(about))
    write_text(output / "best.txt", "".join(f"{of[0].description}\n" for of in found))
    drawn = [dataclasses.replace(of[0], method="found") for of in found]
    drawn += [row for row in rows if not (row.description or "").startswith("tdm/")]
    drawn += [row for row in rows if (row.description or "").startswith("tdm/keep_rate")]
    figure = plots.plot(drawn, "flops", "Fidelity to the unreduced model", value=COSINE)
    for suffix in (".svg", ".png"):
        plots.save(figure, output / f"search{suffix}")


def photos(config: DataConfig) -> tuple[list[Picture], list[Picture]]:
    """Images to choose by and images to report on, each in an order of chance."""
    if config.unlabelled:
        every = shuffled(read_examples(config, FLAGS.images + FLAGS.unseen, spread=True))
        chosen = min(FLAGS.images, len(every) // 2)
        return every[:chosen], every[chosen:]
    chosen = read_examples(config, FLAGS.images, spread=True, split="train")
    return shuffled(chosen), shuffled(read_examples(config, FLAGS.unseen, spread=True))


def shuffled(pictures: list[Picture]) -> list[Picture]:
    """The same in another order, always the same."""
    return [pictures[i] for i in np.random.default_rng(0).permutation(len(pictures))]


if __name__ == "__main__":
    define_flags()
    start.run(main)
