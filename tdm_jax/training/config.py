"""What a configuration file may say: every key, its default and its meaning, checked in one place.

Configuration files hold a `ml_collections.ConfigDict`, so that `--config.key=value` works; the
programs work with the typed, immutable `Settings` that `parse` makes of it.
"""

import dataclasses
from dataclasses import field
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from tdm_jax import parsing
from tdm_jax.data import DataConfig, make_config
from tdm_jax.errors import InputError
from tdm_jax.parallel.sharding import MeshConfig
from tdm_jax.training.keep_rate_schedule import KeepWarmupConfig
from tdm_jax.training.losses import DistillConfig
from tdm_jax.training.optim import OptimConfig
from tdm_jax.training.sparse_training import SparseConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training.

    Attributes:
      every_epochs: how often; the last step is always evaluated. 0: only the last step.
      keep_rates: further keep rates to report beside the reducer's own.
    """

    every_epochs: float = 1.0
    keep_rates: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When and how many checkpoints are kept; the last step is always saved.

    Attributes:
      every_epochs: how often. 0: only the last step.
      keep_last: number of the newest that stay.
      keep_best: number of the best by top-1 that stay.
    """

    every_epochs: float = 1.0
    keep_last: int = 3
    keep_best: int = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole experiment.

    Attributes:
      model: `name` and overrides for `create_model`; the name "init_from" stands for the
        transformer of that checkpoint. `dtype` is "float32" or "bfloat16". Image size, channels and
        classes are the data's.
      reducer: `name` and settings for `make_reducer`, also those that no file lists
        (`--config.reducer.preset=published`); None stands for the method's own default.
      data: what `data.make_config` takes; the seed is that of the experiment unless given there.
      init_from: checkpoint that training starts from (anything `load_pretrained` reads); "" starts
        from random weights.
      reset_head: start with a fresh head, for another number of classes than the checkpoint's.
      seed: root of all randomness: weights, steps, data.
      accumulate: parts that a batch is computed in, one after another.
      epochs: length of the training.
      steps: length in steps; 0 for what `epochs` says.
      optim: the optimiser.
      distill: a teacher.
      keep_warmup: the keep rate's way down.
      sparse: which share of the weights is trained (SViTE).
      mesh: how devices share the work.
      eval: evaluation during training.
      checkpoint: what is saved when.
      log_every: steps between two lines of metrics.
      tensorboard: whether to write TensorBoard events as well (needs tensorboardX).
      profile_steps: first and last step of a profiler trace; () for none.
    """

    model: dict
    reducer: dict
    data: DataConfig
    init_from: str = ""
    reset_head: bool = False
    seed: int = 0
    accumulate: int = 1
    epochs: float = 300.0
    steps: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    keep_warmup: KeepWarmupConfig = field(default_factory=KeepWarmupConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log_every: int = 50
    tensorboard: bool = False
    profile_steps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.distill.teacher == "init_from" and not self.init_from:
            raise InputError("distill.teacher is 'init_from', but init_from is empty")
        for name in ("accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0 or (self.steps == 0 and self.epochs <= 0.0):
            raise InputError(
                f"expected positive epochs or steps, got epochs={self.epochs}, steps={self.steps}"
            )
        if self.profile_steps and (
            len(self.profile_steps) != 2 or self.profile_steps[0] > self.profile_steps[1]
        ):
            raise InputError(
                f"profile_steps must be (first, last) or empty, got {self.profile_steps}"
            )


def default_config(**data: Any) -> ConfigDict:
    """Every key with its default, for a configuration file to change.

    Args:
      **data: what `data.make_config` takes; the other keys get the defaults of that source.
    """
    settings = Settings(
        model={
            "name": "deit_small_patch16_224",
            "drop_path": 0.0,
            "dtype": "float32",
            "remat": False,
        },
        reducer={"name": "none"},
        data=make_config(data),
    )
    config = ConfigDict(dataclasses.asdict(settings))
    del config.data["seed"]  # That of the experiment.
    for name in ("keep_rate", "layers"):
        config.reducer[name] = placeholder(object)
    return config


def parse(config: ConfigDict) -> Settings:
    """The typed settings of a configuration.

    Raises:
      InputError: a key is unknown, or a value has the wrong type or lies out of range.
    """
    values = config.to_dict()
    if isinstance(values.get("data"), dict):
        values["data"] = make_config({"seed": values.get("seed"), **values["data"]})
    return parsing.parse(Settings, values)
