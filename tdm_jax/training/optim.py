"""DeiT's optimiser: AdamW, warm-up and cosine, weight decay on matrices alone, clipping."""

import dataclasses

import jax
import optax
from jaxtyping import PyTree

from tdm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser's numbers; the defaults are DeiT's 300 epochs from scratch.

    Attributes:
      learning_rate: peak, for a batch of 512; scaled linearly with the batch size.
      warmup_epochs: length of the linear warm-up; 0 starts at the peak.
      warmup_from: learning rate of the first step of the warm-up (not scaled).
      end_learning_rate: where the cosine ends (not scaled).
      weight_decay: decoupled, times the learning rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      clip_norm: global norm that gradients are clipped to; 0 is off.
      ema_decay: decay of the averaged weights; 0 keeps none.
      only: the modules that are trained, by the first part of their parameters' names ("reducer",
        "head"); empty for all.
    """

    learning_rate: float = 5e-4
    warmup_epochs: float = 5.0
    warmup_from: float = 1e-6
    end_learning_rate: float = 1e-5
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 0.0
    ema_decay: float = 0.0
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.learning_rate <= 0.0:
            raise InputError(f"optim.learning_rate must be positive, got {self.learning_rate}")
        for name in ("b1", "b2", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"optim.{name} must lie in [0, 1), got {getattr(self, name)}")
        nonnegative = (
            "warmup_epochs",
            "warmup_from",
            "end_learning_rate",
            "weight_decay",
            "clip_norm",
        )
        for name in nonnegative:
            if getattr(self, name) < 0.0:
                raise InputError(f"optim.{name} must not be negative, got {getattr(self, name)}")


def learning_rate(
    config: OptimConfig, *, batch_size: int, steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """Step -> learning rate: linear warm-up, then one cosine down to the last step.

    Raises:
      InputError: if the warm-up is as long as the training, or the end above the peak.
    """
    peak = config.learning_rate * batch_size / 512
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise InputError(
            f"warm-up takes {warmup} steps (optim.warmup_epochs={config.warmup_epochs}), "
            f"expected fewer than the {steps} steps of training"
        )
    if config.end_learning_rate > peak:
        raise InputError(
            f"optim.end_learning_rate={config.end_learning_rate} is above the peak {peak:g} "
            f"(optim.learning_rate={config.learning_rate} times batch {batch_size} / 512)"
        )
    cosine = optax.schedules.cosine_decay_schedule(
        peak, steps - warmup, alpha=config.end_learning_rate / peak
    )
    if warmup == 0:
        return cosine
    ramp = optax.schedules.linear_schedule(config.warmup_from, peak, warmup)
    return optax.schedules.join_schedules([ramp, cosine], [warmup])


def decays(params: PyTree) -> PyTree:
    """True where weight decay acts: kernels; not biases, norms, tokens or position embeddings."""

    def decay(path: tuple, leaf: jax.Array) -> bool:
        name = path[-1].key
        return leaf.ndim > 1 and not name.endswith(("_token", "pos_embed", "bias", "scale"))

    return jax.tree_util.tree_map_with_path(decay, params)


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW under `schedule`, behind gradient clipping when it is on."""
    adamw = optax.adamw(
        schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decays
    )
    if config.clip_norm > 0.0:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
    if not config.only:
        return adamw

    def labels(variables: PyTree) -> PyTree:
        params = variables["params"]
        missing = set(config.only) - set(params)
        if missing:
            raise InputError(
                f"optim.only: the model has no {', '.join(sorted(missing))}; expected some of "
                f"{', '.join(params)}"
            )
        return {"params": {name: name in config.only for name in params}}

    return optax.partition({True: adamw, False: optax.set_to_zero()}, labels)
