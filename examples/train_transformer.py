"""In-context reinforcement learning with a transformer as the memory of train_s5.py's agent.

    python examples/train_transformer.py                  # six DMControl tasks, random projections
    python examples/train_transformer.py --env CartPole-v1 --window 32
    python examples/train_transformer.py --help           # flags of train_s5.py and the memory's own

The memory is causal attention over the last `window` steps of the trial. By default it has as many
parameters as S5 in train_s5.py. The network around it, PPO and the run folder are those of train_s5.py.
"""

import dataclasses
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the folder of train_s5.py

import train_s5  # noqa: E402

CHUNK = 64  # queries that attend at once: bounds the memory that a long rollout takes


@dataclasses.dataclass(frozen=True)
class Config(train_s5.Config):
    layers: int = 2  # transformer blocks
    heads: int = train_s5.sized(cpu=2, accelerator=4)  # attention heads of each block
    head_size: int = train_s5.sized(cpu=16, accelerator=32)  # features of a query, key or value
    window: int = 128  # steps that a query attends to, its own included
    hidden_size: int = train_s5.sized(cpu=81, accelerator=770)  # units between the dense layers
    memory: ClassVar[None] = None  # removes the flags of the memories of train_s5.py
    state_size: ClassVar[None] = None
    dt: Literal["input", "none"] = "input"  # use of a step's duration, where it varies


# ---- Memory --------------------------------------------------------------------------------------
class Cache(NamedTuple):
    """Keys and values of each environment's last `window` steps, whatever their trial, as a ring."""

    keys: jax.Array  # (B, heads, window, head_size) float32
    values: jax.Array  # (B, heads, window, head_size) float32
    slot: jax.Array  # (B,) int32, the oldest slot, which the next step overwrites
    length: jax.Array  # (B,) int32, how many of the last steps belong to the running trial


class TransformerBlock(nn.Module):
    """LayerNorm -> causal attention -> residual, LayerNorm -> dense -> GELU -> dense -> residual.

    A query attends to the last `window` steps of its own trial, itself included. Positions enter as
    a bias that falls linearly with the age of a key, at another rate in each head (ALiBi, Press et
    al., arXiv 2108.12409).
    """

    config: Config

    def setup(self):
        config = self.config
        dense = partial(nn.Dense, dtype=jnp.dtype(config.dtype))
        self.attention_norm = nn.LayerNorm()
        self.qkv = dense(3 * config.heads * config.head_size, use_bias=False)
        self.out = dense(config.width, use_bias=False)
        self.dense_norm = nn.LayerNorm()
        self.up = dense(config.hidden_size)
        self.down = dense(config.width)

    def project(self, x):
        """x (..., width) -> queries, keys and values (..., heads, head_size) float32."""
        qkv = jnp.float32(train_s5.flat(self.qkv, self.attention_norm(x)))
        return jnp.moveaxis(qkv.reshape(*x.shape[:-1], 3, self.config.heads, -1), -3, 0)

    def attend(self, queries, keys, values, age, length):
        """Attention of Q queries to K keys, (B, Q, heads, head_size).

        Args:
          queries: (B, heads, Q, head_size).
          keys, values: (B, heads, K, head_size).
          age: (B or 1, Q, K) int, steps from key to query; negative if the key is later.
          length: (B, Q) int, ages below it are attended to.
        """
        heads = self.config.heads
        slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1) / heads)
        age = age[:, None]
        bias = -slopes[:, None, None] * age
        visible = (age >= 0) & (age < length[:, None, :, None])
        queries, keys, values = (jnp.swapaxes(x, 1, 2) for x in (queries, keys, values))
        return nn.dot_product_attention(queries, keys, values, bias, visible)

    def finish(self, x, attended):
        """The rest of the block: x (..., width), attended (..., heads, head_size) -> (..., width)."""
        x = x + train_s5.flat(self.out, attended.reshape(*x.shape[:-1], -1))
        return x + train_s5.flat(lambda x: self.down(nn.gelu(self.up(x))), self.dense_norm(x))

    def step(self, cache, x, reset):
        """One step: x (B, width), reset (B,) -> Cache, (B, width)."""
        window = self.config.window
        query, key, value = self.project(x)
        keys = write(cache.keys, cache.slot, key)
        values = write(cache.values, cache.slot, value)
        length = jnp.minimum(jnp.where(reset, 0, cache.length) + 1, window)
        age = (cache.slot[:, None] - jnp.arange(window)) % window
        attended = self.attend(query[:, :, None], keys, values, age[:, None], length[:, None])
        cache = Cache(keys, values, (cache.slot + 1) % window, length)
        return cache, self.finish(x, attended[:, 0])

    def __call__(self, cache, x, reset):
        """A sequence: x (T, B, width), reset (T, B) -> Cache, (T, B, width), by CHUNK queries."""
        T, window = len(x), self.config.window
        chunk = min(T, CHUNK)
        missing = (0, -T % chunk), (0, 0)  # fills the last chunk
        queries, keys, values = jnp.moveaxis(self.project(jnp.pad(x, (*missing, (0, 0)))), 1, 3)
        keys = jnp.concatenate([oldest_first(cache.keys, cache.slot), keys], 2)
        values = jnp.concatenate([oldest_first(cache.values, cache.slot), values], 2)
        length = trial_length(jnp.pad(reset, missing).T, cache.length, window)
        age = window + jnp.arange(chunk)[:, None] - jnp.arange(window + chunk)

        def attend(first):
            """The queries from `first` on. The gradient recomputes their scores: none is stored."""
            cut = jax.lax.dynamic_slice_in_dim
            return self.attend(
                cut(queries, first, chunk, 2), cut(keys, first, window + chunk, 2),
                cut(values, first, window + chunk, 2), age[None], cut(length, first, chunk, 1))

        attended = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), jnp.arange(0, T, chunk))
        attended = jnp.concatenate(attended.swapaxes(1, 2))[:T]
        last = slice(T, T + window)
        slot = jnp.zeros_like(cache.slot)
        cache = Cache(keys[:, :, last], values[:, :, last], slot, length[:, T - 1])
        return cache, self.finish(x, attended)


def write(ring, slot, row):
    """ring (B, heads, window, head_size) with row (B, heads, head_size) in slot (B,)."""
    return ring.at[jnp.arange(len(ring)), :, slot].set(row)


def oldest_first(ring, slot):
    """ring (B, heads, window, head_size) turned so that slot (B,) comes first."""
    window = ring.shape[2]
    order = (slot[:, None] + jnp.arange(window)) % window
    return jnp.take_along_axis(ring, order[:, None, :, None], 2)


def trial_length(reset, length, window):
    """Steps of the trial up to each step of a sequence, itself included, at most `window`: (B, T) int.

    Args:
      reset: (B, T) bool.
      length: (B,) int, steps of the trial before the sequence.
      window: int.
    """
    t = jnp.arange(reset.shape[1])
    start = jax.lax.cummax(jnp.where(reset, t, -length[:, None]), axis=1)
    return jnp.minimum(t - start + 1, window)


class Memory(nn.Module):
    """The agent's memory: `config.layers` blocks. Its methods are those of train_s5.Memory."""

    config: Config

    def setup(self):
        self.blocks = [TransformerBlock(self.config) for _ in range(self.config.layers)]

    @nn.nowrap
    def zero_state(self, batch_shape):
        config = self.config
        count = jnp.zeros(batch_shape, jnp.int32)
        zeros = jnp.zeros((*batch_shape, config.heads, config.window, config.head_size), jnp.float32)
        return (Cache(zeros, zeros, count, count),) * config.layers

    def step(self, hidden, x, reset):
        return self.through(TransformerBlock.step, hidden, x, reset)

    def __call__(self, hidden, x, reset):
        return self.through(TransformerBlock.__call__, hidden, x, reset)

    def through(self, method, hidden, x, reset):
        new = []
        for block, cache in zip(self.blocks, hidden, strict=True):
            cache, x = method(block, cache, x, reset)
            new.append(cache)
        return tuple(new), x


def make_memory(config, trials=None):
    """The agent's memory."""
    return Memory(config)


make_train = partial(train_s5.make_train, make_memory=make_memory)


# ---- Command line --------------------------------------------------------------------------------
def main():
    """A run folder with experiment.py, else one seed and its returns."""
    if importlib.util.find_spec("experiment"):
        import experiment
        return experiment.main(Config, make_train, __doc__)
    train = make_train(tyro.cli(Config, description=__doc__))
    metrics = jax.jit(train)(jax.random.PRNGKey(0))["metrics"]
    print("mean return of every update:", *(f"{x:.2f}" for x in jnp.nanmean(metrics["return"], -1)))


if __name__ == "__main__":
    main()
