"""Rollouts of envs.Trials with random actions, and an environment that compiles in a moment."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs

KEY = jax.random.PRNGKey(0)
PLAIN = dict(observe_change=False, privileged=False)  # what compiles soonest


class ClockState(NamedTuple):
    start: jax.Array  # (2,) float32, random
    time: jax.Array  # () int32


@dataclasses.dataclass(frozen=True)
class ClockParams:
    max_steps_in_episode: int = 6

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


class Clock:
    """An environment of one's own, without gymnax. It observes its random start and the time.

    The reward is the action. It diverges `poison_at` steps after its start if that is above 1/2.
    """

    default_params = ClockParams()

    def __init__(self, poison_at=-1):
        self.poison_at = poison_at

    def observation_space(self, params):
        return SimpleNamespace(shape=(3,))

    def action_space(self, params):
        return SimpleNamespace(shape=(1,), low=-1.0, high=1.0)

    def reset_env(self, key, params):
        state = ClockState(jax.random.uniform(key, (2,)), jnp.int32(0))
        return jnp.append(state.start, 0.0), state

    def step_env(self, key, state, action, params):
        state = ClockState(state.start, state.time + 1)
        reward = jnp.where((state.time == self.poison_at) & (state.start[0] > 0.5), jnp.nan, action[0])
        return jnp.append(state.start, state.time), state, reward, jnp.array(False), {}


class Sized(Clock):
    """A Clock whose observations and actions have the given sizes."""

    def __init__(self, obs_dim, act_dim):
        super().__init__()
        self.obs_dim, self.act_dim = obs_dim, act_dim

    def observation_space(self, params):
        return SimpleNamespace(shape=(self.obs_dim,))

    def action_space(self, params):
        return SimpleNamespace(shape=(self.act_dim,), low=-1.0, high=1.0)

    def reset_env(self, key, params):
        _, state = super().reset_env(key, params)
        return jnp.ones(self.obs_dim), state

    def step_env(self, key, state, action, params):
        _, *rest = super().step_env(key, state, action, params)
        return jnp.ones(self.obs_dim), *rest


@functools.cache
def point_mass():
    """Sixteen environments in trials of three episodes of six steps; shared, because compiling them costs."""
    return envs.Trials(["point_mass-easy"], 16, episodes_per_trial=3, sysid=True,
                       env_kwargs={"max_steps_in_episode": 6})


@functools.cache
def compiled(trials):
    """The functions reset(key, stagger) and step(state, action, t)."""
    return jax.jit(trials.reset, static_argnums=1), jax.jit(trials.step)


def rollout(trials, steps, state=None, stagger=False, key=KEY):
    """Random actions from reset, or from `state`.

    Returns:
      A namespace: `last`, the state in the end; `before_any`, the observation after reset; and numpy
      arrays (steps, N, ...): `state` before the step, `action`, `transition`, `after`, the observation
      that follows, and `spare`, what ended episodes started from.
    """
    reset, step = compiled(trials)
    observation, record = None, []
    if state is None:
        state, observation = reset(key, stagger)
    shape = steps, trials.num_envs, trials.action_dims
    actions = np.array(jax.random.randint(KEY, shape, 0, trials.num_bins))
    for t, action in enumerate(actions):
        before = state
        state, after, transition = step(before, action, t)
        record.append(jax.device_get((before, after, transition, state.spare)))
    states, after, transition, spare = jax.tree.map(lambda *x: np.stack(x), *record)
    return SimpleNamespace(last=state, before_any=observation, state=states, after=after,
                           transition=transition, spare=spare, action=actions)


def symlog(x):
    return np.sign(x) * np.log1p(np.abs(x))
