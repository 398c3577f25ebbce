r"""The paper's diversity score, and fidelity, behind each block: `python -m tdm_jax.diversity`.

    python -m tdm_jax.diversity --models=deit_small.pth --methods=topk,evit,tdm --data=folder \
        --data_dir=/data/imagenet --output=diversity

writes `diversity.md`, `.csv`, `.json` and plots: diversity against accuracy, and behind each block
how true the tokens stay to the unreduced model, against the block and against the diversity. What
the score is `tdm_jax.analysis.diversity` says.
"""

from absl import flags

from tdm_jax.analysis import environment, results
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.analysis.diversity import by_block, diversity_rows, per_block
from tdm_jax.analysis.evaluation import Evaluation
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.plotting import plots
from tdm_jax.plotting.curves import DENSE

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_candidates()
    shared.define_data()
    flags.DEFINE_integer("block", -1, "Block whose tokens are plotted, from 0; -1 is the last.")
    flags.DEFINE_integer(
        "batches", None, "Batches that the diversity is averaged over; by default all.", 1
    )
    shared.define_output("diversity.md, .csv, .json and the plot")


def main() -> None:
    """The command."""
    output = shared.output()
    if output:
        plots.check_installed()
    evaluation = Evaluation(shared.data("diversity is measured on images"))
    candidates = make_candidates(**shared.candidates())
    rows = diversity_rows(
        candidates, evaluation, block=FLAGS.block, limit=FLAGS.batches, note=start.note
    )
    about = environment.describe()
    remark = f"{per_block(rows)}\n{environment.line(about)}"
    if output:
        results.write(rows, output / "diversity", about | {"block": FLAGS.block}, remark=remark)
        blocks = by_block(rows)
        figures = {"diversity": plots.plot(rows, "diversity")}
        for axis in ("block", "diversity") if blocks else ():
            figures[f"fidelity-{axis}"] = plots.plot(blocks, axis, value=DENSE)
        for name, figure in figures.items():
            for suffix in (".svg", ".png"):
                plots.save(figure, output / f"{name}{suffix}")
    print(f"{results.markdown(rows)}\n{remark}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
