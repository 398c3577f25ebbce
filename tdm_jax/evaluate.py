"""Evaluates a checkpoint with any reducer: `python -m tdm_jax.evaluate --checkpoint=...`.

    python -m tdm_jax.evaluate --checkpoint=runs/digits --reducer=tdm --keep_rate=0.7,0.5
    python -m tdm_jax.evaluate --checkpoint=deit_small.pth --reducer=tdm --keep_rate=0.7 \
        --data=folder --data_dir=/data/imagenet --batch_size=256 --output=deit_small_tdm.json

`--checkpoint` is a training's working directory (its last checkpoint counts, its data and its
reducer are the defaults), or anything that `load_pretrained` reads. The data are those that
`--data` names, else those of `--config`. Every example counts once, whatever the batch size.
"""

import dataclasses
from typing import Any

import jax
from absl import flags
from etils import epath
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from tdm_jax.analysis import costs, environment, results
from tdm_jax.analysis.candidate import parse_method
from tdm_jax.analysis.results import COLUMNS, Column
from tdm_jax.checkpoint import Store, load_pretrained
from tdm_jax.cli import start
from tdm_jax.cli.config import define_config
from tdm_jax.data import DataConfig, make_config
from tdm_jax.errors import InputError
from tdm_jax.files import write_text
from tdm_jax.models.vit import VisionTransformer
from tdm_jax.parallel import sharding
from tdm_jax.parallel.sharding import MeshConfig
from tdm_jax.reduction import Reducer, StageReducer
from tdm_jax.training import experiment
from tdm_jax.training.config import Settings, parse
from tdm_jax.training.evaluator import Evaluator
from tdm_jax.training.losses import NO_DISTILLATION
from tdm_jax.training.workdir import CHECKPOINTS, settings_of

COLUMNS_SHOWN = (
    *COLUMNS[:5],
    Column("top5_percent", "Top-5 (%)", lambda v: f"{v:.2f}"),
    Column("loss", "Loss", lambda v: f"{v:.4f}"),
    Column("examples", "Examples", lambda v: f"{v:,}"),
    *COLUMNS[5:7],
)


def evaluate(
    name: str,
    method: str,
    model: VisionTransformer,
    params: PyTree,
    source: DataConfig,
    mesh: Mesh,
) -> dict[str, Any]:
    """One row of the result: accuracy, loss and cost of a model on the validation split."""
    evaluator = Evaluator(model, source, mesh, params)
    params = jax.device_put(params, sharding.state_shardings(mesh, params))
    found = evaluator(params, bar=method)
    cost = costs.count(model)
    reducer = model.reducer
    return {
        "model": name,
        "method": method,
        "keep_rate": reducer.keep_rate if isinstance(reducer, StageReducer) else None,
        "top1_percent": found["top1"],
        "top5_percent": found["top5"],
        "loss": found["loss"],
        "examples": int(found["count"]),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "tokens": cost.tokens,
        "evaluated_images_per_second": found["images_per_second"],
    }


def trained(
    workdir: epath.Path, settings: Settings, *, ema: bool = False
) -> tuple[VisionTransformer, PyTree]:
    """The model and the parameters of a training's last checkpoint, whether it goes on or not.

    Raises:
      InputError: nothing was saved yet, or there are no averaged weights.
    """
    if ema and settings.optim.ema_decay == 0.0:
        raise InputError(f"{workdir} keeps no averaged weights (optim.ema_decay is 0)")
    run = experiment.make_experiment(dataclasses.replace(settings, distill=NO_DISTILLATION))
    device = SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        run.abstract_state(),
    )
    store = Store(workdir / CHECKPOINTS, read_only=True)
    found = store.restore(abstract)
    store.close()
    if found is None:
        raise InputError(f"{workdir} has no checkpoint yet")
    return run.model, found[1].ema if ema else found[1].params


def define_flags() -> None:
    """The command's flags; not at import, so that programs may import several commands."""
    flags.DEFINE_string("checkpoint", None, "A working directory, or what load_pretrained reads.")
    flags.DEFINE_bool("ema", False, "Take the averaged weights.")
    flags.DEFINE_string("reducer", None, "Method, with settings as in tdm/preset=published.")
    flags.DEFINE_list("keep_rate", [], "One row for each of these.")
    flags.DEFINE_list("layers", [], "Blocks where the method acts, from 0.")
    define_config(None, "Whose data to evaluate on.")
    flags.DEFINE_string("data", "", "digits, folder or tfds:<name>; before those of --config.")
    flags.DEFINE_string("data_dir", "", "Root of the folder, or TFDS's data_dir.")
    flags.DEFINE_string("split", "", "Name of the validation split, where it is none of the usual.")
    flags.DEFINE_integer("batch_size", 0, "Images at once; 0 for what the data say.", 0)
    flags.DEFINE_string("output", "", "JSON file for the result.")
    flags.mark_flag_as_required("checkpoint")


def main() -> None:
    """The command."""
    given = flags.FLAGS
    path = epath.Path(given.checkpoint)
    settings = settings_of(path)
    mesh = sharding.make_mesh(MeshConfig())
    methods = _reducers(settings)
    if settings is None:
        model, params = load_pretrained(path, methods[0][1], ema=given.ema)
    else:
        model, params = trained(path, settings, ema=given.ema)
    source = _data(model, settings)
    rows = [
        evaluate(path.name, name, model.clone(reducer=reducer), params, source, mesh)
        for name, reducer in methods
    ]
    print(results.markdown(rows, COLUMNS_SHOWN), end="")
    if given.output:
        about = environment.describe() | {
            "checkpoint": str(path),
            "data": dataclasses.asdict(source),
        }
        write_text(given.output, results.to_json(rows, about))


def _reducers(settings: Settings | None) -> list[tuple[str, Reducer]]:
    """The methods that the flags name, else the one that was trained with."""
    given = flags.FLAGS
    rates = [_number(text, float, "keep_rate") for text in given.keep_rate]
    if given.reducer is None:
        own = {"name": "none"} if settings is None else settings.reducer
        name, known = own["name"], {k: v for k, v in own.items() if k != "name"}
        rates = rates or [known.get("keep_rate", 0.0)]
    else:
        name, known = parse_method(given.reducer)
        if settings is not None:
            known = {"layers": settings.reducer.get("layers", ())} | known
        rates = rates or [0.0]
    if given.layers:
        known["layers"] = tuple(_number(text, int, "layers") for text in given.layers)
    label = given.reducer or name
    return [
        (label, experiment.reducer_of({"name": name, **known, "keep_rate": rate})) for rate in rates
    ]


def _data(model: VisionTransformer, settings: Settings | None) -> DataConfig:
    given = flags.FLAGS
    if given.data:
        shape = {"image_size": model.image_size, "channels": model.in_channels}
        if given.data_dir:
            shape["data_dir"] = given.data_dir
        source = make_config(name=given.data, **shape)
    elif given.config is not None:
        source = experiment.data_config(parse(given.config))
    elif settings is not None:
        source = experiment.data_config(settings)
    else:
        raise InputError("no data given; expected --data (digits, folder, tfds:<name>) or --config")
    changes = {"eval_batch_size": given.batch_size, "validation_split": given.split}
    return dataclasses.replace(source, **{key: value for key, value in changes.items() if value})


def _number(text: str, kind: type, flag: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"--{flag}: expected numbers, got {text!r}") from error


if __name__ == "__main__":
    define_flags()
    start.run(main)
