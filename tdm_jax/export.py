r"""Exports a checkpoint with any reducer: `python -m tdm_jax.export --checkpoint=... --output=...`.

    python -m tdm_jax.export --checkpoint=runs/digits --output=digits_export
    python -m tdm_jax.export --checkpoint=deit_small.pth --reducer=tdm --keep_rate=0.7 \
        --preprocessing --batch_sizes=1,8,32 --dtype=bfloat16 --output=deit_small_tdm
    python -m tdm_jax.export --checkpoint=dinov2-small --format=stablehlo,onnx --output=dinov2

The folder has a program for any batch (StableHLO, ONNX or both), on request others for batches of
one size, and `manifest.json`, which says what they take and give. JAX alone runs StableHLO, ONNX
Runtime alone the other: see docs/export.md. Before the folder gets its name, every program in it
has answered as the model does.
"""

from pathlib import Path

from absl import flags

from tdm_jax.analysis.candidate import check_weights, make_candidates
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.errors import InputError
from tdm_jax.exporting import onnx, stablehlo
from tdm_jax.exporting.artifact import export_model
from tdm_jax.training.workdir import settings_of

FLAGS = flags.FLAGS
DEFAULT = stablehlo.Options()


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    shared.define_checkpoint()
    shared.define_reducer()
    flags.DEFINE_string("output", None, "Folder to make.", required=True)
    text = f"Of the programs: {', '.join(stablehlo.FORMATS)}."
    flags.DEFINE_list("format", list(DEFAULT.formats), text)
    text = "What one StableHLO program is to run on."
    flags.DEFINE_list("platforms", list(DEFAULT.platforms), text)
    text = "Sizes of batches to make a program for, beside the one for any size."
    flags.DEFINE_list("batch_sizes", [], text)
    text = "Whether the program takes decoded images, uint8 of any size, and prepares them itself."
    flags.DEFINE_bool("preprocessing", False, text)
    flags.DEFINE_enum("weights", DEFAULT.weights, stablehlo.WEIGHTS, "Where the weights go.")
    flags.DEFINE_enum("dtype", DEFAULT.dtype, list(stablehlo.DTYPES), "Type of the computation.")
    flags.DEFINE_string("labels", "", "File with the names of the classes, one a line.")
    flags.DEFINE_bool("overwrite", False, "Replace an export that exists.")


def _labels() -> list[str] | None:
    if not FLAGS.labels:
        return None
    try:
        return Path(FLAGS.labels).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--labels={FLAGS.labels}: not readable: {error}") from error


def main() -> None:
    """The command."""
    options = stablehlo.Options(
        formats=tuple(FLAGS.format),
        platforms=tuple(FLAGS.platforms),
        batch_sizes=tuple(shared.numbers("batch_sizes", int) or ()),
        preprocessing=FLAGS.preprocessing,
        weights=FLAGS.weights,
        dtype=FLAGS.dtype,
    )
    labels, rates = _labels(), shared.numbers("keep_rate") or [None]
    if len(rates) > 1:
        raise InputError(f"--keep_rate: an export has one; got {', '.join(map(str, rates))}")
    settings = settings_of(FLAGS.checkpoint)
    layers = None if settings is None else settings.reducer.get("layers")
    candidates = make_candidates(
        methods=[FLAGS.reducer], keep_rates=rates, run_layers=layers, **shared.checkpoint()
    )
    check_weights(candidates)
    (one,) = candidates
    manifest = export_model(
        FLAGS.output, one.model, one.variables, options, labels=labels, overwrite=FLAGS.overwrite
    )
    for name in manifest["sha256"]:
        print(f"{Path(FLAGS.output) / name}: {(Path(FLAGS.output) / name).stat().st_size:,} bytes")
    takes, gives = (
        f"{manifest[way]['dtype']}[{', '.join(map(str, manifest[way]['shape']))}]"
        for way in ("input", "output")
    )
    where = {"stablehlo": f"on {', '.join(options.platforms)}", "onnx": f"opset {onnx.OPSET}"}
    formats = ", ".join(f"{name} {where[name]}" for name in options.formats)
    print(f"{one.label}: {takes} -> {gives}; {formats}")


if __name__ == "__main__":
    define_flags()
    start.run(main)
