"""The focal loss of single logits (Lin et al. 2017, arXiv 1708.02002)."""

import jax
import jax.numpy as jnp
from jaxtyping import Float


def focal_terms(
    logits: Float[jax.Array, "*s"], alpha: float, gamma: float
) -> tuple[Float[jax.Array, "*s"], Float[jax.Array, "*s"]]:
    """Focal loss of each logit as a positive and as a negative (equation 5).

    positive = −α (1 − p)^γ log p;  negative = −(1 − α) p^γ log(1 − p);  p = σ(logit).
    """
    log_p, log_not_p = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    positive = -alpha * jnp.exp(gamma * log_not_p) * log_p
    negative = -(1 - alpha) * jnp.exp(gamma * log_p) * log_not_p
    return positive, negative
