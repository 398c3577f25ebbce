r"""Measures latency, throughput, memory and compile time: `python -m tdm_jax.benchmark`.

    CPU   python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm,evit \
              --batch_sizes=1,8,32 --dtypes=float32 --output=benchmark
    GPU   python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm,evit \
    TPU       --batch_sizes=1,4,16,64,256,1024 --dtypes=float32,bfloat16 --output=benchmark
    ONNX  python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm,evit \
              --modes=onnx --dtypes=float32 --batch_sizes=1,16 --output=benchmark
    PEERS python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm,evit \
              --modes=forward --dtypes=float32 --batch_sizes=1,16 --output=benchmark \
              --peers=torch,torch_compile,onnxruntime,openvino --peers_python=peers/bin/python
    memory of a training step, compiled and not run:
          python -m tdm_jax.benchmark --models=deit_small_patch16_224 --methods=tdm \
              --modes=train,train_remat --batch_sizes=64 --rounds=0 --output=benchmark

What is measured `tdm_jax.analysis.benchmark` says. `--advise=3.0` measures something else: which
token counts are fastest at no more than 3.0 GFLOPs an image (multiply-adds, as tables count them);
see `tdm_jax.analysis.schedule_search`.
"""

from typing import Any

from absl import flags

from tdm_jax.analysis import environment, peers, results, schedule_search
from tdm_jax.analysis.benchmark import COMPILE, MODES, TABLE, benchmark
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.analysis.results import Result
from tdm_jax.analysis.timing import Timing
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.errors import InputError
from tdm_jax.exporting import onnx
from tdm_jax.exporting.stablehlo import Options
from tdm_jax.training.experiment import DTYPES

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_candidates(models=["deit_small_patch16_224"])
    flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "Images per call.")
    text = (
        "What to measure: forward, train, train_remat (which computes blocks again in the backward "
        "pass), or onnx, the forward pass in ONNX Runtime on the CPU."
    )
    flags.DEFINE_list("modes", list(MODES), text)
    flags.DEFINE_list("dtypes", list(DTYPES), "Types of the computation.")
    flags.DEFINE_integer("rounds", 10, "Turns of each program; 0 to compile alone.", 0)
    flags.DEFINE_float("min_seconds", 0.1, "A turn lasts about this long at least.", 0.0)
    flags.DEFINE_float(
        "advise", None, "Look for the fastest schedule of at most so many GFLOPs instead.", 0.0
    )
    text = f"Other runtimes to measure beside the unreduced models: {', '.join(peers.PEERS)}."
    flags.DEFINE_list("peers", [], text)
    flags.DEFINE_string("peers_python", None, "Python of an environment that has them, and timm.")
    shared.define_output("benchmark.md (advice.md), .csv and .json")


def main() -> None:
    """The command."""
    output, sizes = shared.output(), shared.numbers("batch_sizes", int)
    if "onnx" in FLAGS.modes:  # what it cannot do is said before anything is measured
        onnx.require(*onnx.PACKAGES)
        for dtype in FLAGS.dtypes:
            Options(formats=("onnx",), dtype=dtype)
    about = environment.describe() | {"rounds": FLAGS.rounds, "started": environment.now()}
    remark, rows = environment.line(about), []
    advises = FLAGS.advise is not None
    if advises and FLAGS.peers:
        raise InputError("--peers: expected none with --advise, which measures our programs alone")
    if advises and not FLAGS.rounds:
        raise InputError("--advise measures: expected --rounds of at least 1; got 0")
    name, table = ("advice", schedule_search.TABLE) if advises else ("benchmark", TABLE)

    def done(new: list[Result]) -> None:
        rows.extend(new)
        what = " ".join(filter(None, (new[0].model, new[0].dtype, new[0].mode)))
        what += f", batch {new[0].batch_size}: "
        if advises:
            print(what + schedule_search.advice(new), flush=True)
        else:
            start.note(what + ", ".join(f"{row.method} {row.verdict}" for row in new))
        # What is measured is safe, whatever happens to a larger batch.
        if output:
            results.write(rows, output / name, about, columns=table, remark=remark)

    candidates = make_candidates(**shared.candidates())
    timing = Timing(rounds=FLAGS.rounds, min_seconds=FLAGS.min_seconds) if FLAGS.rounds else None
    settings: dict[str, Any] = {
        "batch_sizes": sizes,
        "dtypes": FLAGS.dtypes,
        "timing": timing,
        "done": done,
    }
    if advises:
        schedule_search.advise(candidates, round(FLAGS.advise * 1e9), **settings)
    else:
        compilers = COMPILE | {"onnx": onnx.compile_forward}
        models = {one.name: one.unreduced().model for one in candidates}
        with peers.started(FLAGS.peers, FLAGS.peers_python, list(models.values())) as beside:
            versions = {k: v for peer in beside for k, v in peer.versions.items()}
            about |= versions
            remark += "".join(f", {package} {version}" for package, version in versions.items())
            benchmark(candidates, modes=FLAGS.modes, compilers=compilers, peers=beside, **settings)
    print(f"{results.markdown(rows, table)}\n{remark}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
