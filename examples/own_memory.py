"""A memory of your own: linear attention with decay instead of S5, without a copy of the trainer.

    python examples/own_memory.py

Every head adds the outer product of a key and a value to a matrix that decays, and reads the matrix
with a query: S_t = decay S_{t-1} + k_t v_t^T, y_t = q_t S_t (Sun et al., arXiv 2307.08621).
`make_train` takes any flax module with the methods zero_state, step and __call__ as below.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from own_environment import CueRecall, settings  # before the trainer: it extends sys.path

from s5 import linear_recurrence
from train_s5 import Config, make_train


class LinearAttention(nn.Module):
    """LayerNorm -> linear attention with decay -> LayerNorm -> dense -> residual."""

    features: int  # width of inputs and outputs
    heads: int = 4
    head_size: int = 8

    @nn.nowrap
    def zero_state(self, batch_shape):
        return jnp.zeros((*batch_shape, self.heads * self.head_size**2), jnp.float32)

    def step(self, hidden, x, reset):
        """One step: x (B, features), reset (B,) -> hidden state, output (B, features)."""
        hidden, y = self(hidden, x[None], reset[None])
        return hidden, y[0]

    @nn.compact
    def __call__(self, hidden, x, reset):
        """A sequence: x (T, B, features), reset (T, B) -> hidden state, output (T, B, features)."""
        qkv = nn.Dense(3 * self.heads * self.head_size, use_bias=False)(nn.LayerNorm()(x))
        query, key, value = jnp.split(qkv.reshape(*x.shape[:-1], self.heads, -1), 3, axis=-1)
        update = key[..., :, None] * value[..., None, :]  # (T, B, heads, head_size, head_size)
        decay = jnp.repeat(1.0 - 0.5 ** (4.0 + jnp.arange(self.heads)), self.head_size**2)
        states = linear_recurrence(decay, update.reshape(*x.shape[:-1], -1), hidden, reset)
        y = jnp.einsum("...k,...kv->...v", query, states.reshape(update.shape))
        y = nn.Dense(self.features)(nn.LayerNorm()(y.reshape(*x.shape[:-1], -1)))
        return states[-1], x + y


def make_memory(config, trials):
    return LinearAttention(features=config.width)


if __name__ == "__main__":
    train = make_train(Config(env=(CueRecall(),), **settings), make_memory=make_memory)
    returns = jax.jit(train)(jax.random.PRNGKey(0))["metrics"]["return"]
    print(f"mean return {jnp.nanmean(returns[-10:]):.3f}, without memory at most 0.333")
