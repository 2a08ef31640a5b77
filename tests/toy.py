"""The smallest trainer with the interface that experiment.py needs. It compiles in a moment.

Its agents fit a vector to what random walks add up to; nothing is learned that matters. Like a real
trainer it carries keys, statistics, environments and an empty array from update to update, shares
its environments over an axis, and has metrics that are NaN where no episode ended.
"""

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import experiment  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """What a toy is made of."""

    env: tuple[str, ...] = ("walk", "toy:run")  # tasks
    num_envs: int = 8  # walks
    num_steps: int = 4  # of each walk between two updates
    width: int = dataclasses.field(  # features
        default_factory=lambda: 6 if jax.default_backend() == "cpu" else 12)
    log_every: int = 2  # updates a call
    total_timesteps: int = 320  # steps of all walks
    lr: float = 0.1  # step size
    decay: float = 0.9  # of a walk
    SWEEPABLE: ClassVar = ("lr", "decay")

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.num_envs < 1 or self.num_envs % (2 * len(self.env)):
            raise ValueError(f"num_envs={self.num_envs} must be divisible by tasks x 2")

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        calls = math.ceil(self.total_timesteps / (self.steps_per_update * self.log_every))
        return calls * self.log_every


class Norm(NamedTuple):
    count: jax.Array
    mean: jax.Array


class Runner(NamedTuple):
    params: Any
    norm: Norm
    position: jax.Array  # (N, width)
    ended: jax.Array  # (N,)
    empty: jax.Array  # (N, 0)
    hyper: dict[str, jax.Array]
    key: jax.Array


class Train(NamedTuple):
    init: Any
    update: Any


def make_train(config, axis=None):
    """train, as described in experiment.py."""
    def keys(key):
        """A key for each environment on this device, whatever the number of devices."""
        first = jax.lax.axis_index(axis) * config.num_envs if axis else 0
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(config.num_envs))

    def mean(x):
        return jax.lax.pmean(x.mean(0), axis) if axis else x.mean(0)

    def noise(key):
        return jax.vmap(lambda key: jax.random.normal(key, (config.width,)))(keys(key))

    def init(key, hyper=None):
        key, start, net = jax.random.split(key, 3)
        values = {name: jnp.float32(getattr(config, name)) for name in config.SWEEPABLE}
        params = {"params": {"w": jax.random.normal(net, (config.width,))}}
        norm = Norm(jnp.float32(0), jnp.zeros(config.width))
        ended = jnp.zeros(config.num_envs, bool)
        empty = jnp.zeros((config.num_envs, 0))
        return Runner(params, norm, noise(start), ended, empty, values | (hyper or {}), key)

    def update(runner):
        key, walk = jax.random.split(runner.key)
        position = runner.hyper["decay"] * runner.position + noise(walk)
        w = runner.params["params"]["w"]
        error = position @ w - position.sum(1)
        step = mean(error[:, None] * position)
        new = w - runner.hyper["lr"] * step
        finite = jnp.isfinite(new).all()
        count = runner.norm.count + 1
        norm = Norm(count, runner.norm.mean + (mean(position) - runner.norm.mean) / count)
        score = jnp.where(count < 2, jnp.nan, mean(-error ** 2))
        curve = jnp.arange(3) * mean(position.sum(1)) + jnp.arange(len(config.env))[:, None]
        runner = runner._replace(
            params={"params": {"w": jnp.where(finite, new, w)}}, norm=norm, position=position,
            ended=position[:, 0] > 1, key=key)
        return runner, {"loss": mean(error ** 2), "skipped": 1.0 - finite, "curve": curve,
                        "return": score * (1.0 + jnp.arange(len(config.env)))}

    return Train(init, update)


if __name__ == "__main__":
    if os.environ.get("TOY_DELAY"):  # seconds that a call takes longer, for a kill to hit it
        import time
        add = experiment.Logs.add
        experiment.Logs.add = lambda *args: (time.sleep(float(os.environ["TOY_DELAY"])), add(*args))
    experiment.main(Config, make_train, __doc__)
