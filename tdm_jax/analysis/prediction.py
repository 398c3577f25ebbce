"""What a model says to every image of a data set, in shards on a disk.

A shard is written whole or not at all, and one that is there is not made again, so what was
stopped goes on. Processes share the images, write their own shards, and do not talk to each other.
A shard is written while the next is computed: in memory are two shards' answers, and a few batches.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Int, PyTree, UInt8
from tqdm import tqdm

from tdm_jax import data
from tdm_jax.analysis.candidate import Candidate, check_weights
from tdm_jax.checkpoint import describe
from tdm_jax.checkpoint.integrity import checksums
from tdm_jax.data import DataConfig
from tdm_jax.data.device_transforms import normalise
from tdm_jax.data.pipeline import Batch, host_row
from tdm_jax.data.source import Source
from tdm_jax.errors import InputError, unknown
from tdm_jax.files import reach, read_json, replacing, write_text
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.ops.platform import split_over
from tdm_jax.parallel import sharding
from tdm_jax.parallel.overlap import Clock, ahead

OUTPUTS = ("probabilities", "features", "patches")
FORMATS = ("npz", "parquet")
SUMMARY = "_predictions.json"
Rows = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be written.

    Attributes:
      outputs: of `OUTPUTS`: "probabilities" of the likeliest classes, "features" that the head
        reads, "patches": each patch's feature, where it was merged its token's (`Info.patches`).
      top_k: classes for each image.
      shard: images in a shard, at most.
      format: "npz", or "parquet" by pyarrow.
    """

    outputs: tuple[str, ...] = ("probabilities",)
    top_k: int = 5
    shard: int = 8192
    format: str = "npz"

    def __post_init__(self) -> None:
        if not self.outputs:
            raise InputError(f"expected outputs of {', '.join(OUTPUTS)}; got none")
        for name in self.outputs:
            if name not in OUTPUTS:
                raise unknown("output", name, OUTPUTS)
        if self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS)
        if self.top_k < 1 or self.shard < 1:
            raise InputError(
                f"expected top_k and shard of at least 1; got {self.top_k} and {self.shard}"
            )

    def check(self, model: VisionTransformer) -> None:
        """Raises InputError if a model cannot say it."""
        if "probabilities" in self.outputs and not model.num_classes > 1:
            raise InputError(
                "a model without classes has no probabilities: expected outputs of features or "
                f"patches; got {', '.join(self.outputs)}"
            )


def predict(
    candidate: Candidate,
    config: DataConfig,
    split: str,
    folder: str | PathLike[str],
    wanted: Wanted | None = None,
    *,
    process: tuple[int, int] = (0, 1),
    bar: str = "",
) -> dict[str, Any]:
    """Writes what a model says to every image of a split.

    Args:
      candidate: with weights.
      config: the data, as the model takes them.
      split: "train" or "validation".
      folder: for the shards, `part-<first image>-<process>.npz` (or .parquet), with an `index`, a
        `name` and, where there is one, a `label` for each image that could be read; for
        `_predictions.json`, which says what they are of; and for a list of the unreadable images.
        Readers of Parquet pass over names that begin with an underscore. On a disk or in an object
        store.
      wanted: what is to be written.
      process: number and count of the processes that share the images.
      bar: label of a progress bar; none without one.

    Returns:
      `images`, those of this process; `written`; the names of the `unreadable` ones; and `road`,
      where the time went, None where fewer than two batches were computed.

    Raises:
      InputError: the candidate has no weights or no such outputs, the data cannot be read, or the
        folder is a file, or holds answers of another model, to other images or in another form.
    """
    wanted, folder = wanted or Wanted(), reach(folder)
    check_weights([candidate])
    wanted.check(candidate.model)
    if wanted.format == "parquet":
        _parquet()
    if folder.is_file():
        raise InputError(f"expected a folder for the answers; got the file {folder}")
    source, count = data.open_source(config, split), data.num_examples(config, split)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices())
    host, hosts = process
    unit = mesh.size * hosts
    batch = -(-min(config.eval_batch_size or config.batch_size, count) // unit) * unit
    # One that cannot be read is no reason to stop.
    config = dataclasses.replace(config, eval_batch_size=batch, max_corrupt=count)
    about = _about(candidate, config, split, wanted, source) | {"processes": hosts}
    _same_or_new(folder / SUMMARY, about, write=host == 0)
    variables = jax.device_put(candidate.variables, sharding.replicated(mesh))
    normalisation = config.mean, config.std
    answer = functools.partial(_program(candidate.model, normalisation, wanted), variables)

    steps, local = -(-count // batch), batch // hosts
    per_shard = max(1, wanted.shard // local)
    shards = []
    for start in range(0, steps, per_shard):
        path = folder / f"part-{start * batch:012d}-{host}.{wanted.format}"
        shards.append(Shard(path, start, min(start + per_shard, steps)))
    rows = functools.partial(host_row, batch=batch, local=local, host=host, step=0)
    own = [i for i in map(rows, range(steps * local)) if i < count]
    found = {shard: _index(shard.path) for shard in shards if shard.path.exists()}
    read = functools.partial(
        data.eval_batches, config, split, process_index=host, process_count=hosts
    )
    clock = Clock()

    def ask(_: Any, images: Array) -> Any:
        with split_over(mesh):
            return answer(images)

    answered = ahead(
        _batches([shard for shard in shards if shard not in found], read),
        lambda each: jax.device_put(each[1]["image"], sharding.batch_sharding(mesh)),
        ask,
        clock,
    )
    progress = tqdm(total=len(own), desc=bar, unit="image", disable=not bar)
    # One beside what is computed, and no more: memory is bounded.
    with progress, ThreadPoolExecutor(1) as writer, contextlib.closing(answered):
        writing = None
        progress.update(min(len(own), sum(one.stop - one.start for one in found) * local))
        for shard, parts in itertools.groupby(answered, lambda each: each[0][0]):
            index = np.array([rows(i) for i in range(shard.start * local, shard.stop * local)])
            new = _rows(_shown(parts, progress), index, source, labelled=not config.unlabelled)
            found[shard] = new["index"]
            if writing is not None:
                writing.result()
            writing = writer.submit(_write, shard.path, new)
        if writing is not None:
            writing.result()
    if clock.road is not None and host == 0:
        write_text(folder / SUMMARY, json.dumps(about | {"road": clock.road.rates()}, indent=2))
    written = np.concatenate(list(found.values()))
    missing = sorted(set(own) - set(written.tolist()))
    unreadable = [source.describe(i) for i in missing]
    if unreadable:
        write_text(folder / f"_unreadable-{host}.txt", "\n".join(unreadable) + "\n")
    return {
        "images": len(own), "written": len(written), "unreadable": unreadable, "road": clock.road
    }  # fmt: skip


def _about(
    candidate: Candidate, config: DataConfig, split: str, wanted: Wanted, source: Source
) -> dict[str, Any]:
    """What answers are of: where it is the same, so are they."""
    weights = hashlib.sha256(repr(sorted(checksums(candidate.variables).items())).encode())
    names = hashlib.sha256()
    for index in range(len(source)):
        names.update(f"{source.describe(index)}\n".encode())
    prepared = ("image_size", "channels", "mean", "std", "crop_pct", "interpolation")
    return {
        "model": describe(candidate.model),
        "weights": weights.hexdigest()[:16],
        "data": {"name": config.name, "data_dir": config.data_dir, "split": split},
        "prepared": {name: getattr(config, name) for name in prepared},
        "images": {"count": len(source), "names": names.hexdigest()[:16]},
        "batch_size": config.eval_batch_size,
        **dataclasses.asdict(wanted),
        "classes": None if config.unlabelled else data.class_names(config),
    }


def _same_or_new(path: epath.Path, about: dict[str, Any], *, write: bool) -> None:
    about = json.loads(json.dumps(about))
    if path.exists():
        before = read_json(path)
        differing = [key for key, value in about.items() if before.get(key) != value]
        if differing:
            raise InputError(
                f"{path.parent} holds answers with other {', '.join(differing)}; expected a new "
                "folder"
            )
    elif write:
        write_text(path, json.dumps(about, indent=2))


@functools.lru_cache(maxsize=1)
def _program(model: VisionTransformer, normalisation: tuple[Any, Any], wanted: Wanted) -> Any:
    """Only what is asked for leaves the program; the compiler drops the rest."""
    told = set(wanted.outputs) != {"probabilities"}

    def answers(variables: PyTree, images: UInt8[Array, "b h w c"]) -> dict[str, Array]:
        output: Any = model.apply(variables, normalise(images, *normalisation), return_info=told)
        both: Any = output if told else (output, None)
        logits, info = both
        said = {}
        if "probabilities" in wanted.outputs:
            k = min(wanted.top_k, model.num_classes)
            said["top_probabilities"], said["top_labels"] = jax.lax.top_k(jax.nn.softmax(logits), k)
        if "features" in wanted.outputs:
            said["features"] = info.pooled.astype(jnp.float32)
        if "patches" in wanted.outputs:
            said["patches"] = info.patches.astype(jnp.float32)
        return said

    return jax.jit(answers)


class Shard(NamedTuple):
    """A file of answers, to the batches from `start` to before `stop`."""

    path: epath.Path
    start: int
    stop: int


def _batches(shards: Sequence[Shard], read: Any) -> Iterator[tuple[Shard, Batch]]:
    """Every batch of some shards; what lies between them is not read."""
    batches: Any = None
    place = -1
    try:
        for shard in shards:
            if shard.start != place:
                if batches is not None:
                    batches.close()
                batches = read(start_step=shard.start)
            for _ in range(shard.start, shard.stop):
                yield shard, next(batches)
            place = shard.stop
    finally:
        if batches is not None:
            batches.close()


def _shown(parts: Iterator[tuple[Any, Rows]], progress: Any) -> Iterator[tuple[Batch, Rows]]:
    for (_, batch), said in parts:
        progress.update(min(len(batch["mask"]), progress.total - progress.n))
        yield batch, said


def _rows(
    parts: Iterator[tuple[Batch, Rows]],
    index: Int[np.ndarray, " n"],
    source: Source,
    *,
    labelled: bool,
) -> Rows:
    # Of a batch the images are let go at once.
    kept = [(batch["mask"] > 0, batch["label"], rows) for batch, rows in parts]
    masks, labels, said = zip(*kept, strict=True)
    real = np.concatenate(masks)
    names = [source.describe(i) for i in index[real].tolist()]
    rows = {"index": index[real], "name": np.array(names, dtype=str)}
    if labelled:
        rows["label"] = np.concatenate(labels)[real]
    return rows | {name: np.concatenate([one[name] for one in said])[real] for name in said[0]}


def _write(path: epath.Path, rows: Rows) -> None:
    with replacing(path) as beside:
        if path.suffix == ".npz":
            np.savez(beside, **rows)  # type: ignore[arg-type]
        else:
            _parquet().write_table(_table(rows), beside)


def _table(rows: Rows) -> Any:
    """Columns; of several numbers for each image lists, with their shape beside them."""
    import pyarrow

    columns, shapes = {}, {}
    for name, values in rows.items():
        flat = pyarrow.array(values.reshape(-1))
        inner = values.shape[1:]
        if inner:
            flat = pyarrow.FixedSizeListArray.from_arrays(flat, int(np.prod(inner)))
            shapes[name] = json.dumps(inner)
        columns[name] = flat
    return pyarrow.table(columns).replace_schema_metadata(shapes)


def _index(path: epath.Path) -> Int[np.ndarray, " n"]:
    try:
        with path.open("rb") as file:
            if path.suffix == ".npz":
                return np.load(file, allow_pickle=False)["index"]
            return _parquet().read_table(file, columns=["index"])["index"].to_numpy()
    except Exception as error:  # each damaged file fails in its own way
        raise InputError(
            f"{path} is damaged: {error}; expected a shard (without the file, it is redone)"
        ) from error


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("--format=parquet needs pyarrow; expected pip install pyarrow") from error
    return pyarrow.parquet
