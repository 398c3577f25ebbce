"""What a compiler says a forward pass costs on a device that is not there: compiled, not run.

TPU's compiler prices its own program: estimated cycles, bytes, temporary memory. Gathers, scatters,
sorts and kernels have no price, so their number stands beside; what they cost comes on top.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jax.stages import Lowered

from tdm_jax.analysis import hlo
from tdm_jax.analysis.candidate import Candidate, with_baselines
from tdm_jax.analysis.compilation import DoesNotFitError, compiled_for, for_platform_of
from tdm_jax.analysis.machines import Machine
from tdm_jax.analysis.results import COLUMNS, Column, Result, significant
from tdm_jax.models.vit import VisionTransformer


def _mega(value: float) -> str:
    return significant(value / 1e6)


TABLE = (
    *("model", "method", "keep_rate"),
    Column("cycles", "Mcycles", _mega),
    Column("attention_cycles", "in attention", _mega),
    Column("mlp_cycles", "in MLPs", _mega),
    Column("stage_cycles", "in stages", _mega),
    Column("unpriced", "Not priced", str),
    Column("bytes", "MB/image", _mega),
    Column("temporary_bytes", "Temporaries (MB)", _mega),
    COLUMNS["images_per_second"]._replace(heading="img/s by that"),
    "speedup",
    "verdict",
)


def lower_forward(model: VisionTransformer, batch_size: int, device: Any) -> Lowered:
    """A model's forward pass on one device, which need not be there, ready to compile."""
    shape = (batch_size, *model.image_size, model.in_channels)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    where = SingleDeviceSharding(device)
    forward = jax.jit(
        lambda variables, images: model.apply(variables, images),
        in_shardings=where,
        out_shardings=where,
    )
    with for_platform_of(device):
        return forward.lower(variables, images)


def price(
    candidates: Sequence[Candidate],
    machine: Machine,
    *,
    batch_size: int,
    dtype: Any,
    done: Callable[[Result], None] = lambda row: None,
) -> list[Result]:
    """One row for each candidate; the unreduced models are added.

    Args:
      candidates: who takes part.
      machine: its first device is compiled for.
      batch_size: images of a forward pass.
      dtype: of the computation.
      done: is given each row as soon as it is known.
    """
    rows: list[Result] = []
    baseline: int | None = None
    for candidate in with_baselines(candidates):
        model = candidate.model.clone(dtype=dtype)
        values = _values(model, batch_size, machine)
        own: Any = values.get("cycles")
        if candidate.is_baseline:
            baseline = own
        if own and baseline:
            values["speedup"] = baseline / own
        rows.append(Result(**candidate.row, batch_size=batch_size, **values))
        done(rows[-1])
    return rows


def _values(model: VisionTransformer, batch_size: int, machine: Machine) -> dict[str, Any]:
    try:
        compiled = compiled_for(lower_forward(model, batch_size, machine.devices[0]))
    except DoesNotFitError:
        return {"verdict": "does not fit"}
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    values: dict[str, Any] = {
        "bytes": cost["bytes accessed"] / batch_size,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    text = compiled.as_text() or ""
    parts = hlo.cycles(text)
    if parts:
        values |= {f"{part}_cycles": n for part, n in parts.items() if part != hlo.REST}
        values |= {"cycles": sum(parts.values()), "unpriced": hlo.unpriced(text)}
        if machine.chip is not None and machine.chip.clock is not None:
            values["images_per_second"] = batch_size * machine.chip.clock / values["cycles"]
    return values
