"""An environment of your own: name a cue that was observed once, some steps ago.

    python examples/own_environment.py        # discrete and continuous, half a minute each on one core
    python train_s5.py --env examples.own_environment:CueRecall --width 32 --layers 1 --num-envs 32 \
        --num-steps 44 --lr 4e-3 --total-timesteps 75000

An environment is any object with the interface of gymnax 1.x. The trainers use six of its members:

    default_params                         a dataclass of settings, or None
    observation_space(params)              `.n` symbols or an array of `.shape`; dictionaries and
                                           tuples are flattened in the order of jax.tree.leaves
    action_space(params)                   `.n` choices, `.nvec` choices per dimension, or an array
                                           of `.shape` with finite `.low` and `.high`
    reset_env(key, params)                 -> observation, state
    step_env(key, state, action, params)   -> observation, state, reward, terminated, info
    is_truncated(state, params)            optional: the episode ends, but the task is not over

If `default_params` has a field max_steps_in_episode, episodes also end after so many steps. All
functions are called inside jit and vmap. gymnax need not be installed. adapters.py has the environments of
other libraries.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp

sys.path.append(str(Path(__file__).parents[1]))  # the folder of train_s5.py


class State(NamedTuple):
    cue: jax.Array  # () int32
    time: jax.Array  # () int32, steps since the cue


class CueRecall:
    """The first observation shows one of `num_cues` cues. The action `delay` steps later names it.

    An episode has delay + 1 steps. Only the last one is rewarded: discrete actions by 1 if right,
    continuous actions by 1 minus the distance to the cue's value in linspace(-1, 1, num_cues), or 0
    if that is negative.

    Args:
      num_cues: number of cues. With three, an agent without memory reaches a return of 1/3.
      delay: steps between cue and answer.
      continuous: actions are a number in [-1, 1] instead of one of num_cues choices.
    """

    default_params = None

    def __init__(self, num_cues=3, delay=10, continuous=False):
        self.num_cues = num_cues
        self.delay = delay
        self.continuous = continuous

    def observation_space(self, params):
        return SimpleNamespace(shape=(self.num_cues + 1,))

    def action_space(self, params):
        if self.continuous:
            return SimpleNamespace(shape=(1,), low=-1.0, high=1.0)
        return SimpleNamespace(n=self.num_cues)

    def reset_env(self, key, params):
        state = State(jax.random.randint(key, (), 0, self.num_cues), jnp.int32(0))
        return self.observe(state), state

    def step_env(self, key, state, action, params):
        asked = state.time == self.delay
        reward = jnp.where(asked, self.score(state.cue, action), 0.0)
        state = State(state.cue, state.time + 1)
        return self.observe(state), state, reward, asked, {}

    def observe(self, state):
        """The cue, one-hot in the first observation only, and whether it is asked for."""
        cue = jax.nn.one_hot(state.cue, self.num_cues) * (state.time == 0)
        return jnp.append(cue, state.time == self.delay)

    def score(self, cue, action):
        if self.continuous:
            value = 2.0 * cue / (self.num_cues - 1) - 1.0
            return jnp.maximum(0.0, 1.0 - jnp.abs(action[0] - value))
        return jnp.float32(action == cue)


def ContinuousCueRecall(**kwargs):
    return CueRecall(continuous=True, **kwargs)


settings = dict(  # of a Config that learns this
    width=32, layers=1, num_envs=32, num_steps=44, lr=4e-3, total_timesteps=75_000)

if __name__ == "__main__":
    from train_s5 import Config, make_train

    for name, env in (("discrete", CueRecall()), ("continuous", ContinuousCueRecall())):
        train = make_train(Config(env=(env,), **settings))
        returns = jax.jit(train)(jax.random.PRNGKey(0))["metrics"]["return"]
        print(f"{name}: mean return {jnp.nanmean(returns[-10:]):.3f}, without memory at most 0.333")
