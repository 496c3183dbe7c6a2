"""From logits to a token. Pure functions that run on the device, with no notion of a model."""

import jax
import jax.numpy as jnp


def keep_top_k(logits_V: jax.Array, k: jax.Array | int) -> jax.Array:
    """The logits with all but the k largest at -inf; ties with the k-th stay, and k = 0 keeps all."""
    V = logits_V.shape[-1]
    kth = jnp.sort(logits_V)[V - jnp.clip(k, 1, V)]
    return jnp.where((k > 0) & (logits_V < kth), -jnp.inf, logits_V)


def draw(logits_V: jax.Array, key: jax.Array, temperature: jax.Array | float, top_k: jax.Array | int) -> jax.Array:
    """One id from softmax(logits / temperature) over the top k; the likeliest at temperature 0."""
    cooled_V = keep_top_k(logits_V, top_k) / jnp.where(temperature > 0, temperature, 1.0)
    return jnp.where(temperature > 0, jax.random.categorical(key, cooled_V), jnp.argmax(logits_V))
