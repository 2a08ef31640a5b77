"""brax environments with gymnax's interface, for envs.py: `make("brax:ant")`."""

from typing import Any

import brax.envs
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces


def names() -> list[str]:
    """The environments that brax knows."""
    return list(brax.envs._envs)


@struct.dataclass
class EnvParams(environment.EnvParams):
    max_steps_in_episode: int = 1000


@struct.dataclass
class BraxState:
    """State of a brax environment."""

    brax: Any  # brax.envs.State
    time: jax.Array  # () int32


class Brax(environment.Environment):
    """A brax environment: `done` is termination, 1000 steps are truncation.

    Args:
      name: brax's name, such as "ant".
      **kwargs: arguments of the brax environment's constructor, such as backend="spring".
    """

    def __init__(self, name, **kwargs):
        super().__init__()
        self.env = brax.envs.get_environment(name, **kwargs)
        self.env_name = name

    @property
    def name(self):
        return f"brax:{self.env_name}"

    @property
    def default_params(self):
        return EnvParams()

    def reset_env(self, key, params):
        state = self.env.reset(key)
        return state.obs, BraxState(state, jnp.int32(0))

    def step_env(self, key, state, action, params):
        brax_state = self.env.step(state.brax, action)
        state = BraxState(brax_state, state.time + 1)
        info = {"discount": 1 - brax_state.done}
        return brax_state.obs, state, brax_state.reward, brax_state.done > 0, info

    def is_terminated(self, state, params):
        return state.brax.done > 0

    def action_space(self, params=None):
        return spaces.Box(-1.0, 1.0, (self.env.action_size,), jnp.float32)

    def observation_space(self, params=None):
        return spaces.Box(-jnp.inf, jnp.inf, (self.env.observation_size,), jnp.float32)
