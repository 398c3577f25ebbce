"""How fast a device could be at best: `python -m tdm_jax.roofline --tflops=197 --gbs=819`.

What is counted `tdm_jax.analysis.roofline` says. The defaults are a TPU v5e's, in bfloat16.
"""

from absl import flags

from tdm_jax.analysis import results
from tdm_jax.analysis.candidate import make_candidates
from tdm_jax.analysis.roofline import TABLE, roofline
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start

FLAGS = flags.FLAGS


def define_flags() -> None:
    """The command's flags."""
    models = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
    shared.define_candidates(models, methods=["tdm"])
    flags.DEFINE_integer("batch_size", 256, "Images of a forward pass.", 1)
    flags.DEFINE_integer("itemsize", 2, "Bytes of a number.", 1)
    flags.DEFINE_float("tflops", 197.0, "Peak of the device, in 1e12 operations per second.", 1e-6)
    flags.DEFINE_float("gbs", 819.0, "Bandwidth of its memory, in 1e9 bytes per second.", 1e-6)
    shared.define_output("roofline.md, .csv and .json")


def main() -> None:
    """The command."""
    output = shared.output()
    about = {key: FLAGS[key].value for key in ("batch_size", "itemsize", "tflops", "gbs")}
    rows = roofline(
        make_candidates(**shared.candidates()),
        batch_size=FLAGS.batch_size,
        itemsize=FLAGS.itemsize,
        peak=1e12 * FLAGS.tflops,
        bandwidth=1e9 * FLAGS.gbs,
    )
    if output:
        results.write(rows, output / "roofline", about, columns=TABLE)
    print(results.markdown(rows, TABLE))


if __name__ == "__main__":
    define_flags()
    start.run(main)
