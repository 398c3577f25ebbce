r"""Measures the input pipeline: images a second for a core, and where the time goes.

    python -m tdm_jax.data.benchmark --images=400 --output=pipeline.md
    python -m tdm_jax.data.benchmark --models=deit_small_patch16_224 --methods=tdm \
        --keep_rates=0.9,0.7,0.5 --devices=v5e,H100,312:2039

The data are JPEGs of 500 × 375 pixels, about ImageNet's average, made for the purpose; the recipe
is DeiT's on the host: random resized crop, flip, RandAugment; an evaluation reads the files, and
resizes and cuts out. The last table says how many cores like this one keep a device busy that is as
fast as it can be at best (`tdm_jax.analysis.roofline`; a training step takes three times as long as
a forward pass).

What was measured before the pipeline was built on Pillow, images a second on one core for the same
task: Pillow 460–495 without and 325–345 with RandAugment; OpenCV 665 without, but its crop does not
antialias; tf.data with operations written by hand 400–430; torchvision v2 350; Keras's layers 25.
Pillow also lets other threads work: 299 on one core were 618 on two.
"""

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from tdm_jax import data
from tdm_jax.analysis.candidate import Candidate, make_candidates
from tdm_jax.analysis.results import COLUMNS, pipe_table, significant
from tdm_jax.analysis.roofline import DEVICES, roofline
from tdm_jax.cli import flags as shared
from tdm_jax.cli import start
from tdm_jax.data import images, transforms
from tdm_jax.data.config import DataConfig
from tdm_jax.errors import InputError
from tdm_jax.files import write_text

_SIZE = (500, 375)
_FILES = 64
_BATCH = 256
_JOINS = 8
_MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")


def write_jpegs(root: Path, count: int, seed: int = 0) -> list[Path]:
    """Makes photograph-like JPEGs in two class folders, in `root`/train and `root`/val.

    Smooth colours with some grain, at quality 90: about 100 kB each, as ImageNet's.
    """
    rng = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        split = "val" if number < 2 else "train"
        path = root / split / f"class_{number % 2}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(colours.resize(_SIZE, Image.Resampling.BICUBIC), np.int16)
        grain = rng.normal(0, 12, (_SIZE[1], _SIZE[0], 1)).astype(np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=90)
        paths.append(path)
    return paths


def stages(config: DataConfig, files: list[bytes], count: int) -> dict[str, float]:
    """Mean milliseconds of processor time an image spends in each stage, in their order."""
    rng = np.random.default_rng(0)
    resample = Image.Resampling[config.interpolation.upper()]
    marks = []
    for number in tqdm(range(count), "stages", leave=False):
        mark = [time.process_time()]
        image = images.load(images.open_image(files[number % len(files)]), config.channels)
        mark.append(time.process_time())
        box = transforms.random_crop_box(image.size, rng, config.crop_scale, config.crop_ratio)
        image = transforms.crop_and_resize(image, box, config.image_size, config.channels, resample)
        mark.append(time.process_time())
        image = transforms.distort(image, config, rng)
        mark.append(time.process_time())
        np.stack([transforms.to_array(image)])
        mark.append(time.process_time())
        marks.append(np.diff(mark))
    mean = 1000 * np.mean(marks, axis=0)
    return dict(zip(("decode", "crop", "augment", "batch"), mean.tolist(), strict=True))


def evaluation_stages(config: DataConfig, paths: Sequence[Path], count: int) -> dict[str, float]:
    """The same of an image that is evaluated, from its file on; `join` is one thread's work."""
    resample = Image.Resampling[config.interpolation.upper()]
    marks = []
    arrays: list[np.ndarray] = []
    for number in tqdm(range(count), "evaluation", leave=False):
        mark = [time.process_time()]
        content = paths[number % len(paths)].read_bytes()
        mark.append(time.process_time())
        image = images.load(images.open_image(content), config.channels)
        mark.append(time.process_time())
        image = transforms.resize_and_center_crop(
            image, config.image_size, config.crop_pct, resample
        )
        mark.append(time.process_time())
        arrays = [*arrays[-15:], np.stack([transforms.to_array(image)])]
        mark.append(time.process_time())
        marks.append(np.diff(mark))
    mean = 1000 * np.mean(marks, axis=0)
    took = dict(zip(("read", "decode", "resize", "batch"), mean.tolist(), strict=True))
    chunks = [np.concatenate(arrays)] * (_BATCH // len(arrays))
    begin, joined = time.process_time(), 0
    for _ in range(_JOINS):
        joined += len(np.concatenate(chunks))
    return took | {"join": 1000 * (time.process_time() - begin) / joined}


def evaluated(config: DataConfig, paths: Sequence[Path], count: int) -> float:
    """Images of `data.eval_batches` a second of processor time, by one thread."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{path}\n" for path, _ in zip(itertools.cycle(paths), range(count)))
        file.flush()
        config = dataclasses.replace(config, name="photos", data_dir=file.name, threads=1)
        begin = time.process_time()
        batches = data.eval_batches(config)
        done = sum(float(batch["mask"].sum()) for batch in batches)
        took = time.process_time() - begin
        batches.close()
    return done / took


def cores(
    candidates: Sequence[Candidate],
    devices: dict[str, tuple[float, float]],
    evaluating: float,
    training: float,
) -> str:
    """How many cores keep a device busy, as a Markdown table.

    Args:
      candidates: who takes part.
      devices: by name, peak operations and bytes per second, in half precision.
      evaluating: images that a core prepares in a second.
      training: the same by the training recipe.
    """
    who = [COLUMNS[key] for key in ("model", "method", "keep_rate")]
    headings = {column.heading: column.show is not None for column in who}
    lines: list[list[str]] = []
    for name, (peak, bandwidth) in devices.items():
        rows = roofline(candidates, batch_size=_BATCH, itemsize=2, peak=peak, bandwidth=bandwidth)
        lines = lines or [[column.cell(row)[0] for column in who] for row in rows]
        words = ("img/s at most", "cores", "cores in training")
        headings |= dict.fromkeys((f"{name}: {word}" for word in words), True)
        for line, row in zip(lines, rows, strict=True):
            rate = row.images_per_second or 0.0
            needed = (rate / evaluating, rate / 3 / training)
            line += [significant(rate), *(str(math.ceil(number)) for number in needed)]
    return pipe_table(headings, lines)


def throughput(config: DataConfig, count: int) -> tuple[float, float]:
    """Images of `data.train_batches` a second, and a second of processor time.

    On a busy machine the latter tells more: what one core gives that has nothing else to do.
    """
    batches = data.train_batches(config)
    next(batches)
    steps = max(1, count // config.batch_size)
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in tqdm(range(steps), f"{config.threads} threads", leave=False):
        next(batches)
    took, took_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    batches.close()
    return steps * config.batch_size / took, steps * config.batch_size / took_cpu


def measure(
    image_size: int,
    count: int,
    threads: list[int],
    candidates: Sequence[Candidate],
    devices: dict[str, tuple[float, float]],
) -> str:
    """Runs everything on data of its own; the tables as Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        paths = write_jpegs(Path(directory), _FILES)
        files = [path.read_bytes() for path in paths]
        config = data.make_config(
            name="folder", data_dir=directory, image_size=image_size, batch_size=16
        )
        took = stages(config, files, count)
        of_evaluation = evaluation_stages(config, paths, count)
        rates = [throughput(dataclasses.replace(config, threads=n), count) for n in threads]
        evaluating = evaluated(config, paths, count)
    total = sum(took.values())
    lines = [f"DeiT's recipe at {image_size} pixels, JPEGs of {_SIZE[0]} × {_SIZE[1]}:", ""]
    lines += ["| stage | ms an image | share |", "|---|---:|---:|"]
    lines += [f"| {stage} | {ms:.2f} | {ms / total:.0%} |" for stage, ms in took.items()]
    lines += ["", "| threads | images/s | images/s per core (processor time) |", "|---:|---:|---:|"]
    lines += [
        f"| {n} | {rate:.0f} | {cpu_rate:.0f} |"
        for n, (rate, cpu_rate) in zip(threads, rates, strict=True)
    ]
    title = f"An evaluation: {evaluating:.0f} images/s per core (processor time)."
    lines += ["", title, "", "| stage | ms an image |", "|---|---:|"]
    lines += [f"| {stage} | {ms:.3f} |" for stage, ms in of_evaluation.items()]
    lines += ["", f"Cores that keep a device busy, batches of {_BATCH} in bfloat16:", ""]
    return "\n".join(lines) + "\n" + cores(candidates, devices, evaluating, rates[0][1])


def _devices(names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Peaks of known devices, and of `TFLOPS:GBS`."""
    found = {}
    for name in names:
        tflops, colon, gbs = name.partition(":")
        try:
            found[name] = (1e12 * float(tflops), 1e9 * float(gbs)) if colon else DEVICES[name]
        except (KeyError, ValueError):
            known = ", ".join(DEVICES)
            raise InputError(f"--devices: expected {known} or TFLOPS:GBS; got {name!r}") from None
    return found


def define_flags() -> None:
    """The command's flags."""
    flags.DEFINE_integer("images", 400, "Images measured in each row of the table.", 1)
    flags.DEFINE_list("threads", ["1", "2"], "Numbers of threads for the whole pipeline.")
    shared.define_candidates(_MODELS, methods=["tdm"])
    text = f"Devices to keep busy: {', '.join(DEVICES)}, or TFLOPS:GBS."
    flags.DEFINE_list("devices", list(DEVICES), text)
    flags.DEFINE_string("output", "", "Markdown file that the table is written to as well.")


def main() -> None:
    """Prints the tables, and writes them where `--output` says."""
    FLAGS = flags.FLAGS
    if not all(number.isdigit() and int(number) > 0 for number in FLAGS.threads):
        raise InputError(f"--threads: got {FLAGS.threads}, expected positive integers")
    devices, candidates = _devices(FLAGS.devices), make_candidates(**shared.candidates())
    table = measure(
        FLAGS.image_size or 224, FLAGS.images, list(map(int, FLAGS.threads)), candidates, devices
    )
    print(table)
    if FLAGS.output:
        write_text(FLAGS.output, table)


if __name__ == "__main__":
    define_flags()
    start.run(main)
