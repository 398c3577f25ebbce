"""From any kind of checkpoint to an Orbax folder, or to what timm or Hugging Face reads."""

import re
from os import PathLike
from typing import Any

from etils import epath
from flax import traverse_util

from tdm_jax.checkpoint.descriptions import describe
from tdm_jax.checkpoint.export import (
    is_exported,
    save_hugging_face,
    save_safetensors,
    save_timm,
)
from tdm_jax.checkpoint.names import ParamMapping, detect
from tdm_jax.checkpoint.pretrained import load_pretrained
from tdm_jax.checkpoint.raw_checkpoint import RawCheckpoint, read_raw_checkpoint
from tdm_jax.checkpoint.saved_model import is_saved_model, save_model
from tdm_jax.errors import InputError, unknown
from tdm_jax.files import reach
from tdm_jax.models.vit import VisionTransformer

FORMATS = ("orbax", "timm", "hugging_face")


def convert(
    source: str | PathLike[str],
    output: str | PathLike[str],
    *,
    format: str | None = None,
    ema: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> tuple[RawCheckpoint, VisionTransformer, dict[str, Any]]:
    """Reads a checkpoint of any kind and writes it in another format.

    Args:
      source: what `load_pretrained` reads.
      output: a folder; or, for timm, a name that ends in .safetensors.
      format: one of `FORMATS`; None for timm's where the output's name says so, else Orbax.
      ema: take a training checkpoint's averaged weights.
      overwrite: replace an output that exists, once the new one is complete.
      **settings: of `load_pretrained`.

    Returns:
      What was read, the model, and its variables.

    Raises:
      InputError: the output exists, the source is unreadable or no model of ours, or the format
        has no such model.
    """
    is_file = str(output).endswith(".safetensors")
    format = format or ("timm" if is_file else "orbax")
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if is_file and format != "timm":
        raise InputError(f"--format={format} writes a folder; got {output}: expected its name")
    _check_output(reach(output), overwrite)
    checkpoint = read_raw_checkpoint(source, ema=ema)
    model, variables = load_pretrained(checkpoint, **settings)
    if format == "orbax":
        save_model(output, describe(model), variables, overwrite=overwrite)
    else:
        save = save_safetensors if is_file else save_timm if format == "timm" else save_hugging_face
        save(output, model, variables, overwrite=overwrite)
    return checkpoint, model, variables


def _check_output(output: epath.Path, overwrite: bool) -> None:
    # The writers refuse as well, but only after the work is done.
    if not output.exists():
        return
    if not overwrite:
        raise InputError(f"{output} exists; expected a new name, or --overwrite")
    written = output.suffix == ".safetensors" or is_saved_model(output) or is_exported(output)
    if not written:
        raise InputError(f"{output} exists and is no model that this command wrote; it stays")


def mapping_table(checkpoint: RawCheckpoint, variables: dict[str, Any]) -> str:
    """What became what: source names, our name, our shape."""
    params = traverse_util.flatten_dict(variables["params"], sep="/")
    naming = detect(checkpoint.arrays)
    mappings = naming.mappings(naming.depth(checkpoint.arrays))
    rows = [("source", "tdm_jax", "shape")] + [
        (_sources(mappings[path]) if path in mappings else path, path, str(list(array.shape)))
        for path, array in params.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def _sources(mapping: ParamMapping) -> str:
    # query, key and value differ in one part of their names.
    parts = zip(*(re.split(r"([./])", name) for name in mapping.sources), strict=True)
    return "".join(part[0] if len(set(part)) == 1 else "{" + ",".join(part) + "}" for part in parts)
