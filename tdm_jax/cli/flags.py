"""The flags that several commands share, and their values as plain numbers, lists and mappings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from tdm_jax.errors import InputError
from tdm_jax.files import is_remote

FLAGS = flags.FLAGS
# A command's --help lists these flags as its own.
flags.disclaim_key_flags()


def numbers(flag: str, kind: type[int] | type[float] = float) -> list[Any] | None:
    """The numbers of a list flag; None where it has no value."""
    texts: Any = FLAGS[flag].value
    try:
        return None if texts is None else [kind(text) for text in texts]
    except ValueError as error:
        raise InputError(f"--{flag}: expected numbers; got {','.join(texts)!r}") from error


def define_candidates(models: Sequence[str] = (), methods: Sequence[str] = ("none",)) -> None:
    """Who takes part."""
    flags.DEFINE_list("models", list(models), "Names of models, or checkpoints of any kind.")
    text = "Methods to run each model with, with settings as in tdm/preset=published."
    flags.DEFINE_list("methods", list(methods), text)
    flags.DEFINE_list("keep_rates", ["0.7"], "Keep rates to run each method at.")
    text = "Multiply-adds in G to bring each method to, instead of keep rates, by its own setting."
    flags.DEFINE_list("gmacs", None, text)
    text = "The same as shares of what the model takes without reduction."
    flags.DEFINE_list("macs_ratio", None, text)
    text = "One more row, as MODEL:METHOD:KEEP_RATE. May be given several times."
    flags.DEFINE_multi_string("candidate", [], text)
    flags.DEFINE_alias("entry", "candidate")
    _define_model()


def candidates() -> dict[str, Any]:
    """What `analysis.candidate.make_candidates` takes."""
    further = []
    for text in FLAGS.candidate:
        try:
            model, method, keep_rate = text.rsplit(":", 2)
            further.append((model, method, float(keep_rate)))
        except ValueError as error:
            raise InputError(
                f"--candidate: expected MODEL:METHOD:KEEP_RATE; got {text!r}"
            ) from error
    return {
        "models": FLAGS.models,
        "methods": FLAGS.methods or ["none"],
        "keep_rates": numbers("keep_rates") or [None],
        "candidates": further,
        "gmacs": numbers("gmacs") or [],
        "macs_ratios": numbers("macs_ratio") or [],
        **_model(),
    }


def define_checkpoint() -> None:
    """One checkpoint."""
    flags.DEFINE_string("checkpoint", None, "A checkpoint of any kind.", required=True)
    flags.DEFINE_bool("ema", False, "Take the averaged weights of a training.")
    _define_model()


def checkpoint() -> dict[str, Any]:
    """What `analysis.candidate.make_candidates` takes, but for the methods."""
    return {"models": [FLAGS.checkpoint], **({"ema": True} if FLAGS.ema else {}), **_model()}


def _define_model() -> None:
    flags.DEFINE_list("layers", None, "Blocks where methods act, from 0; by default their own.")
    text = "Heads of a checkpoint that does not say; by default one for 64 channels."
    flags.DEFINE_integer("num_heads", None, text)
    text = "Side of the images in pixels; by default the model's own."
    flags.DEFINE_integer("image_size", None, text, 1)


def _model() -> dict[str, Any]:
    sizes = {"num_heads": FLAGS.num_heads, "image_size": FLAGS.image_size}
    chosen = {name: value for name, value in sizes.items() if value is not None}
    return {"layers": numbers("layers", int), **chosen}


def define_processes() -> None:
    """The other processes of a command that runs as several."""
    elsewhere = "where the processes do not find each other"
    text = "Join the other processes; on a TPU pod or under Slurm they find each other."
    flags.DEFINE_bool("distributed", False, text)
    text = f"Address of process 0, as host:port, {elsewhere}."
    flags.DEFINE_string("coordinator_address", None, text)
    flags.DEFINE_integer("num_processes", None, f"Number of all processes, {elsewhere}.", 1)
    flags.DEFINE_integer("process_id", None, f"Number of this process, from 0, {elsewhere}.", 0)


def processes() -> tuple[bool, str | None, int | None, int | None]:
    """What `parallel.distributed.initialize` takes."""
    return (
        *(FLAGS.distributed, FLAGS.coordinator_address),
        *(FLAGS.num_processes, FLAGS.process_id),
    )


def define_reducer() -> None:
    """The method of the checkpoint."""
    text = "Method, with settings as in tdm/preset=published; by default the saved one."
    flags.DEFINE_string("reducer", None, text)
    flags.DEFINE_list("keep_rate", None, "Keep rates; one row for each of them.")


def define_data(eval_batch_size: int = 64) -> None:
    """Which data, and how their images are prepared where that is not as the model says."""
    text = (
        "Data to read: digits, cluttered_digits, folder (of class folders), photos (without "
        "labels), tfds:<name>."
    )
    flags.DEFINE_string("data", "", text)
    text = "Root of the folder (photos: or a list, a path on each line), or the data_dir of TFDS."
    flags.DEFINE_string("data_dir", "", text)
    flags.DEFINE_string("split", "", "Name of the validation split, where it has no usual one.")
    text = "Images in a batch of an evaluation; 0 for what the data say."
    flags.DEFINE_integer("eval_batch_size", eval_batch_size, text, 0)
    default = "by default as the model says."
    flags.DEFINE_list("mean", None, f"Mean of each channel in [0, 1]; {default}")
    flags.DEFINE_list("std", None, f"Standard deviation of each channel in [0, 1]; {default}")
    flags.DEFINE_float("crop_pct", None, f"Share of the resized image that is cut out; {default}")
    text = f"How images are resized: nearest, bilinear, bicubic or lanczos; {default}"
    flags.DEFINE_string("interpolation", None, text)


def data(why: str = "") -> dict[str, Any]:
    """What `data.preprocessing.data_config_for` takes beside the model; {} without --data.

    Args:
      why: what needs data, for the message where there are none; "" where nothing does.

    Raises:
      InputError: there are none where they are needed, or a number cannot be read.
    """
    if why and not FLAGS.data:
        raise InputError(f"{why}; expected --data; got none")
    return {"name": FLAGS.data, **data_changes()} if FLAGS.data else {}


def data_changes() -> dict[str, Any]:
    """What the flags change of a data configuration."""
    values = {
        "data_dir": FLAGS.data_dir,
        "validation_split": FLAGS.split,
        "eval_batch_size": FLAGS.eval_batch_size,
    }
    return {name: value for name, value in values.items() if value} | preprocessing()


def preprocessing() -> dict[str, Any]:
    """What the flags say of how images are prepared, as settings of a data configuration."""
    values = {"mean": numbers("mean"), "std": numbers("std")}
    values |= {"crop_pct": FLAGS.crop_pct, "interpolation": FLAGS.interpolation}
    return {name: value for name, value in values.items() if value is not None}


def define_trace() -> None:
    """Whether a trace is taken."""
    text = "Folder for a profiler's trace, which says how busy devices were; for short runs."
    flags.DEFINE_string("trace", "", text)


def define_judging() -> None:
    """What is asked of the answers, beside their accuracy."""
    text = "Measure how true methods stay to the unreduced model, too; labels are not needed."
    flags.DEFINE_bool("fidelity", True, text)
    flags.DEFINE_integer("tries", 3, "How often a method that draws is evaluated.", 1)


def define_calibration() -> None:
    """Whether adaptive methods are calibrated first."""
    text = "Fix the counts of adaptive methods on so many batches of training images first."
    flags.DEFINE_integer("calibrate", 0, text, 0)


def define_measuring() -> None:
    """Whether and how speed is measured."""
    flags.DEFINE_bool("measure", False, "Measure the speed, beside the unreduced model.")
    flags.DEFINE_integer("batch_size", 32, "Images per call where speed is measured.", 1)
    flags.DEFINE_integer("rounds", 20, "Turns of each program where speed is measured.", 1)


def define_output(files: str, default: str | None = "") -> None:
    """Where results go; required without a default."""
    text = f"Folder to write {files} to."
    flags.DEFINE_string("output", default, text, required=default is None)


def output() -> Path | None:
    """The folder for results; None where none is asked for.

    Raises:
      InputError: it can be no folder.
    """
    path = Path(FLAGS.output)
    if is_remote(FLAGS.output):
        raise InputError(f"--output: expected a folder on a disk; got {FLAGS.output}")
    if path.exists() and not path.is_dir():
        raise InputError(f"--output: expected a folder; got the file {path}")
    return path if FLAGS.output else None
