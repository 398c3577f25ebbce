"""What a training step minimises: one number per example, so that masks and means stay outside."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tdm_jax.errors import InputError, unknown

DISTILLATIONS = ("none", "hard", "soft")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How a teacher takes part in the loss (Touvron et al., arXiv 2012.12877, section 4).

    Attributes:
      kind: "none", "hard" (the teacher's decision is the label) or "soft" (its distribution).
      teacher: path of the teacher's checkpoint, anything `load_pretrained` reads; "init_from" is
        the unreduced model that training starts from.
      weight: share of the distillation term; the labels keep 1 - weight.
      temperature: softens both distributions; used by "soft" alone.
    """

    kind: str = "none"
    teacher: str = ""
    weight: float = 0.5
    temperature: float = 3.0

    def __post_init__(self) -> None:
        if self.kind not in DISTILLATIONS:
            raise unknown("distillation", self.kind, DISTILLATIONS)
        if not 0.0 <= self.weight <= 1.0:
            raise InputError(f"distill.weight must lie in [0, 1], got {self.weight}")
        if self.temperature <= 0.0:
            raise InputError(f"distill.temperature must be positive, got {self.temperature}")
        if (self.kind == "none") != (not self.teacher):
            raise InputError(
                f"distillation needs a kind and a teacher together, "
                f"got distill.kind={self.kind!r} and distill.teacher={self.teacher!r}"
            )


NO_DISTILLATION = DistillConfig()


def cross_entropy(logits: Float[Array, "b c"], targets: Float[Array, "b c"]) -> Float[Array, " b"]:
    """`-sum_c targets_c log softmax(logits)_c`; targets are distributions (mixup, smoothing)."""
    return optax.losses.softmax_cross_entropy(logits, targets)


def hard_distillation(
    logits: Float[Array, "b c"], teacher: Float[Array, "b c"]
) -> Float[Array, " b"]:
    """Cross entropy with the teacher's decision as the label."""
    decision = jnp.argmax(teacher, axis=-1)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, decision)


def soft_distillation(
    logits: Float[Array, "b c"], teacher: Float[Array, "b c"], temperature: float
) -> Float[Array, " b"]:
    """`T^2 KL(softmax(teacher / T) || softmax(logits / T))`, as the DeiT paper writes it.

    DeiT's released code divides by the number of classes as well; the paper does not, nor do we.
    """
    student = jax.nn.log_softmax(logits / temperature)
    target = jax.nn.log_softmax(teacher / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(student, target)
    return temperature**2 * divergence


def distillation(
    logits: Float[Array, "b c"], teacher: Float[Array, "b c"], config: DistillConfig
) -> Float[Array, " b"]:
    """The distillation term of `config`; the teacher receives no gradient."""
    teacher = jax.lax.stop_gradient(teacher)
    if config.kind == "hard":
        return hard_distillation(logits, teacher)
    return soft_distillation(logits, teacher, config.temperature)
