r"""Measures latency, throughput, memory and compile time: `python -m tdm_jax.benchmark`.

    CPU   python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm,evit \
              --batch_sizes=1,8,32 --dtypes=float32 --output=benchmark
    GPU   python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm,evit \
    TPU       --batch_sizes=1,4,16,64,256,1024 --dtypes=float32,bfloat16 --output=benchmark

What is measured `tdm_jax.analysis.benchmark` says. `--advise=3.0` measures something else: which
token counts are fastest at no more than 3.0 GFLOPs an image (multiply-adds, as tables count them);
see `tdm_jax.analysis.schedule_search`.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tdm_jax.analysis import environment, results, schedule_search
from tdm_jax.analysis.benchmark import MODES, TABLE, benchmark
from tdm_jax.analysis.candidate import Candidate, make_candidates
from tdm_jax.analysis.results import Result
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.errors import InputError
from tdm_jax.training.experiment import DTYPES

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_candidates(models=["deit_small_patch16_224"])
    flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Images per call.")
    flags.DEFINE_list("modes", list(MODES), "What to measure: forward, train or both.")
    flags.DEFINE_list("dtypes", list(DTYPES), "Types of the computation.")
    flags.DEFINE_integer("rounds", 10, "Turns of each program.", 1)
    flags.DEFINE_float("min_seconds", 0.1, "A turn lasts about this long at least.", 0.0)
    flags.DEFINE_float(
        "advise", None, "Look for the fastest schedule of at most so many GFLOPs instead.", 0.0
    )
    shared.define_output("benchmark.md (advice.md), .csv and .json")


def main() -> None:
    """The command."""
    output, sizes = shared.output(), shared.numbers("batch_sizes", int) or []
    about = environment.describe() | {"rounds": FLAGS.rounds, "started": environment.now()}
    candidates = make_candidates(**shared.candidates())
    timing = Timing(rounds=FLAGS.rounds, min_seconds=FLAGS.min_seconds)
    if FLAGS.advise is not None:
        _advise(candidates, sizes, timing, about, output)
        return
    remark, rows = environment.line(about), []

    def done(new: list[Result]) -> None:
        rows.extend(new)
        verdicts = ", ".join(f"{row.method} {row.verdict}" for row in new)
        first = new[0]
        start.note(
            f"{first.model} {first.dtype} {first.mode}, batch {first.batch_size}: {verdicts}"
        )
        # What is measured is safe, whatever happens to a larger batch.
        if output:
            results.write(rows, output / "benchmark", about, columns=TABLE, remark=remark)

    benchmark(
        candidates,
        batch_sizes=sizes,
        modes=FLAGS.modes,
        dtypes=FLAGS.dtypes,
        timing=timing,
        done=done,
    )
    print(f"{results.markdown(rows, TABLE)}\n{remark}")


def _advise(
    candidates: Sequence[Candidate],
    sizes: Sequence[int],
    timing: Timing,
    about: dict[str, Any],
    output: Path | None,
) -> None:
    limit, rows = round(FLAGS.advise * 1e9), []
    reduced = [candidate for candidate in candidates if not candidate.is_baseline]
    if not reduced:
        raise InputError("--advise: expected --methods with a count for each stage; got none")
    for candidate in reduced:
        schedule_search.schedules(candidate.model, limit)
    for candidate, dtype, size in itertools.product(reduced, FLAGS.dtypes, sizes):
        new = schedule_search.advise(
            candidate, limit, batch_size=size, dtype=DTYPES[dtype], timing=timing
        )
        rows += new
        advice = schedule_search.advice(new)
        print(f"{candidate.name} {dtype}, batch {size}: {advice}", flush=True)
        if output:
            results.write(rows, output / "advice", about, columns=schedule_search.TABLE)
    print(f"{results.markdown(rows, schedule_search.TABLE)}\n{environment.line(about)}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
