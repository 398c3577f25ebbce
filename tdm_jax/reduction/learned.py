"""What methods with a learned decision per token share: masks in training, gathers at inference.

A choice of tokens has no gradient, and how many tokens an image needs is not known while it is
being learned. So in training all n tokens stay, and a mask hides the dropped ones from the
attention of the others; it is 0 or 1 on the way forward and the probability's on the way back
(straight through). At inference the highest scores are gathered to the scheduled count, and the
shapes are really smaller. With TDM's merger in place ("dyvit+tdm") training merges as inference
does, and the decision learns through the weights of the merge.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tdm_jax.errors import InputError
from tdm_jax.ops.gathering import gather_tokens
from tdm_jax.reduction.contract import KeyMask
from tdm_jax.reduction.token_state import TokenKind, TokenState


def key_mask(state: TokenState) -> KeyMask:
    """Hides the slots that a stage in training has masked from all but themselves."""
    there = still_there(state)
    prefix = jnp.ones(state.prefix.shape[:2], there.dtype)
    return KeyMask(jnp.concatenate([prefix, there], axis=1))


def training_key(title: str, key: Any) -> Array:
    """The randomness of a training step of a method.

    Raises:
      InputError: the caller gave none.
    """
    if key is None:
        raise InputError(f"{title} draws in training: expected rngs={{'reducer': key}}; got none")
    return key


def still_there(state: TokenState) -> Float[Array, "b n"]:
    """1 for slots that no earlier stage has masked."""
    return jnp.ones(state.tokens.shape[:2]) if state.valid is None else state.valid


def gumbel_keep(key: Array, logits: Float[Array, "b n 2"]) -> Float[Array, "b n"]:
    """Draws keep (1) or drop (0) with the odds of `logits`; the gradient is the Gumbel-softmax's.

    Jang et al., ICLR 2017 (arXiv 1611.01144), straight through, temperature 1.
    """
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax(noisy, axis=-1)[..., 0]
    # The difference first: it is exactly 0, so the mask is exactly 0 or 1.
    return (soft > 0.5) + (soft - jax.lax.stop_gradient(soft))


def mask_tokens(state: TokenState, keep: Float[Array, "b n"]) -> TokenState:
    """Masks the slots where `keep` is 0. They stay in place; their patches count as dropped."""
    slots = jnp.arange(state.count)
    masked = state.replace_tokens(
        state.tokens, jnp.where(keep > 0.5, slots, -1), state.kind, valid=keep
    )
    # Showing a hidden key, which a gradient asks for, would show it where it stands.
    return masked.replace(moved=state.moved)


def recorded(state: TokenState, name: str, value: Float[Array, " b"]) -> TokenState:
    """Appends a stage's value to what the state carries, as `carry[name]` of shape [b, stages]."""
    column = value[:, None]
    if name in state.carry:
        column = jnp.concatenate([state.carry[name], column], axis=1)
    return state.replace(carry={**state.carry, name: column})


def check_answers(title: str, logits: Float[Array, "b c"], labels: Float[Array, "b k"]) -> None:
    """Raises InputError if there is no answer to compare with the labels or with a teacher's."""
    if logits.shape != labels.shape:
        raise InputError(
            f"{title}: its losses compare answers: expected logits of {labels.shape[-1]} "
            f"classes; got {logits.shape[-1]} numbers, as of a model without classes "
            "(num_classes=0)"
        )


def ratio_loss(excess: Float[Array, "b s"]) -> Float[Array, ""]:
    """`mean (kept share - planned share)^2` over images and stages (DynamicViT, equation 16)."""
    return (excess**2).mean()


def logit_distillation(
    logits: Float[Array, "b c"], teacher: Float[Array, "b c"]
) -> Float[Array, ""]:
    """`KL(teacher || student)` of the answers, averaged over images."""
    return optax.losses.kl_divergence_with_log_targets(
        jax.nn.log_softmax(logits), jax.lax.stop_gradient(jax.nn.log_softmax(teacher))
    ).mean()


def token_distillation(info: Any, teacher: Any) -> Float[Array, ""]:
    """Mean squared difference to the unreduced model's final features, over the kept patches.

    Kept is a patch that has a final token for itself (DynamicViT, equation 14).

    Args:
      info: `Info` of the student.
      teacher: `Info` of the unreduced model, of the same width and patches.

    Raises:
      InputError: the two have different shapes.
    """
    target = teacher.features[:, teacher.prefix :]
    expected = (*info.assign.shape, info.features.shape[-1])
    if target.shape != expected:
        raise InputError(
            "distilling tokens needs a teacher with the same patches and width: "
            f"got features {target.shape}, expected {expected}"
        )
    place = jnp.maximum(info.assign, 0)
    kept = (info.assign >= 0) & (gather_tokens(info.kind, place) == TokenKind.KEPT)
    own = gather_tokens(info.features[:, info.prefix :], place).astype(jnp.float32)
    difference = own - jax.lax.stop_gradient(target.astype(jnp.float32))
    squared = jnp.where(kept, (difference**2).mean(axis=-1), 0.0)
    return squared.sum() / jnp.maximum(kept.sum(), 1)
