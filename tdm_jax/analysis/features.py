"""What frozen models make of a data set: the vectors that their heads read, kept on a disk.

They are computed once for each model, method, data set and way to prepare its images, in blocks, so
what was stopped goes on. In memory they take 4 bytes a channel: 2 GB for ImageNet's training images
by a ViT-S, 8 GB by a ViT-g; while they are computed, a block's.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from tdm_jax import data
from tdm_jax.analysis.answers import Forward
from tdm_jax.analysis.candidate import Candidate, check_weights
from tdm_jax.checkpoint.integrity import checksums
from tdm_jax.data import DataConfig
from tdm_jax.errors import InputError
from tdm_jax.files import replacing

_BLOCK = 4096
# What decides how an image is prepared, and which images there are.
_DECIDES = (
    *("name", "data_dir", "train_split", "validation_split", "holdout", "image_size", "channels"),
    *("mean", "std", "crop_pct", "interpolation"),
)


class Features(NamedTuple):
    """Of the images of a split that could be read, in order."""

    values: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, " n"]


def extract(
    candidate: Candidate, config: DataConfig, split: str, folder: Path, *, bar: str = ""
) -> Features:
    """The pooled features of a split.

    Args:
      candidate: with weights; its head, if there is one, does not matter.
      config: the data, as the model takes them.
      split: "train" or "validation".
      folder: where features are kept; those of other models may be there, too.
      bar: label of a progress bar; none without one.

    Raises:
      InputError: the candidate has no weights, the data cannot be read, or a block is damaged.
    """
    check_weights([candidate])
    count = data.num_examples(config, split)
    forward = Forward(config, min(config.eval_batch_size or config.batch_size, count))
    config = dataclasses.replace(config, eval_batch_size=forward.batch_size)
    variables = forward.place(candidate.variables)
    own = folder / _key(candidate, config, split)
    per_block = -(-_BLOCK // forward.batch_size)
    steps = -(-count // forward.batch_size)
    blocks = []
    with tqdm(total=steps, desc=bar, disable=not bar) as progress:
        for start in range(0, steps, per_block):
            stop = min(start + per_block, steps)
            path = own / f"{start * forward.batch_size:09d}.npz"
            if not path.exists():
                batches = data.eval_batches(config, split, start_step=start)
                values, labels = [], []
                for _ in range(start, stop):
                    batch = next(batches)
                    real = batch["mask"] > 0
                    answers = forward(candidate.model, variables, batch["image"])
                    values.append(np.asarray(answers.pooled, np.float32)[real])
                    labels.append(batch["label"][real])
                    progress.update()
                batches.close()
                with replacing(path) as beside:
                    np.savez(beside, values=np.concatenate(values), labels=np.concatenate(labels))
            progress.update(stop - progress.n)
            blocks.append(_read(path))
    values, labels = map(np.concatenate, zip(*blocks, strict=True))
    return Features(values, labels)


def _read(path: Path) -> Features:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Features(arrays["values"], arrays["labels"])
    except Exception as error:  # each damaged file fails in its own way
        raise InputError(
            f"{path} is damaged: {error}; expected features (without the file, they are redone)"
        ) from error


def _key(candidate: Candidate, config: DataConfig, split: str) -> str:
    """A folder's name: a digest of the weights, the model with its method, and the images."""
    source = data.open_source(config, split)
    digest = hashlib.sha256()
    variables: Any = candidate.variables
    params = {k: v for k, v in variables["params"].items() if not k.startswith("head")}
    model = candidate.model.clone(num_classes=0)
    decides = {name: getattr(config, name) for name in _DECIDES}
    for part in (split, model, decides, config.eval_batch_size, sorted(checksums(params).items())):
        digest.update(f"{part!r}\n".encode())
    for index in range(len(source)):
        digest.update(f"{source.describe(index)}\n".encode())
    return digest.hexdigest()[:16]
