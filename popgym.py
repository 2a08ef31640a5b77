"""Five POPGym tasks, each Easy, Medium and Hard, as gymnax 1.x environments. They require memory.

    env = TASKS["StatelessCartPoleHard"]()           # or envs.make("popgym:StatelessCartPoleHard")
    obs, state = env.reset(key)
    obs, state, reward, terminated, truncated, info = env.step(key, state, action)

After Morad et al., "POPGym: Benchmarking Partially Observable Reinforcement Learning" (arXiv 2303.01859). All
constants are from its package, release 1.0.7, in the files that the classes name. The package now calls the first
four tasks PositionOnly...; here they keep the paper's names. Rewards are scaled so that a perfect episode sums to 1.
This file needs jax and gymnax only.
"""
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces
from gymnax.environments.classic_control import cartpole, pendulum


@struct.dataclass
class CartPoleParams(cartpole.EnvParams):
    noise: float = 0.0  # standard deviation of the noise on either observation (metres, radians)


@struct.dataclass
class PendulumParams(pendulum.EnvParams):
    noise: float = 0.0  # standard deviation of the noise on either observation


class PositionOnly:
    """Replaces the observation and the reward of gymnax's CartPole and Pendulum: velocities are hidden.

    `noise` is added to every observation, including the first. The sum is clipped to the observation space.
    """

    def __init__(self, max_steps_in_episode=200, noise=0.0):
        super().__init__()
        self.max_steps_in_episode, self.noise = max_steps_in_episode, noise

    @property
    def default_params(self):
        return self.params(max_steps_in_episode=self.max_steps_in_episode, noise=self.noise)

    @property
    def name(self):
        return f"popgym:{type(self).__name__}"

    def observe(self, key, state, action, params):
        space = self.observation_space(params)
        noise = params.noise * jax.random.normal(key, space.shape)
        return jnp.clip(self.position(state) + noise, space.low, space.high)

    def reset_env(self, key, params):
        start_key, noise_key = jax.random.split(key)
        _, state = super().reset_env(start_key, params)
        return self.observe(noise_key, state, None, params), state

    def step_env(self, key, state, action, params):
        _, state, reward, terminated, info = super().step_env(key, state, action, params)
        reward = self.scale(reward) / params.max_steps_in_episode
        return self.observe(key, state, action, params), state, reward, terminated, info

    def observation_space(self, params):
        return spaces.Box(-self.bounds(params), self.bounds(params), (2,), jnp.float32)


class StatelessCartPole(PositionOnly, cartpole.CartPole):
    """CartPole-v1 whose observation is cart position and pole angle, (2,) float32. Actions: 0 left, 1 right.

    Every step, including that in which the pole falls, earns 1/max_steps_in_episode, so the return is the fraction
    of the episode's time limit for which the pole stood. An episode is terminated beyond 2.4 metres or 12 degrees,
    and truncated at its time limit. Source: popgym/envs/position_only_cartpole.py (lengths 200, 400, 600) and
    noisy_position_only_cartpole.py (length 200, noise 0.1, 0.2, 0.3, clipped to twice those bounds).
    """

    params = CartPoleParams

    def position(self, state):
        return jnp.stack([state.x, state.theta])

    def scale(self, reward):
        return reward

    def bounds(self, params):
        return 2 * jnp.array([params.x_threshold, params.theta_threshold_radians])


class StatelessPendulum(PositionOnly, pendulum.Pendulum):
    """Pendulum-v1 whose observation is cosine and sine of the angle, (2,) float32. Action (1,): torque in [-2, 2].

    The cost of a step, between 0 and pi^2 + 0.1 8^2 + 0.001 2^2 = 16.2736044, is mapped to 1 ... -1 and divided
    by the episode's length: an episode upright and at rest has the return 1. Episodes are truncated. Source:
    popgym/envs/position_only_pendulum.py (lengths 200, 150, 100) and noisy_position_only_pendulum.py (length
    200, noise 0.1, 0.2, 0.3, clipped to [-1, 1]).
    """

    params = PendulumParams

    def position(self, state):
        return jnp.stack([jnp.cos(state.theta), jnp.sin(state.theta)])

    def scale(self, reward):
        return 1 + reward / (16.2736044 / 2)

    def bounds(self, params):
        return jnp.ones(2)


@struct.dataclass
class CardsState:
    left: jax.Array  # (4,) int32, cards of each suit that are still in the deck
    last: jax.Array  # (k,) int32, suits of the last k cards, oldest first; 0 for cards not dealt yet
    time: jax.Array  # () int32, steps since the episode's start


class RepeatPrevious(environment.Environment):
    """A shuffled deck is dealt card by card. The right action is the suit of the card k - 1 cards ago.

    Observation and action are suits, 0 to 3. From the k-th card on, an answer earns +-1/(cards - k): the return is 1
    if all answers are right, -1 if all are wrong, -0.5 on average for guessing. An episode terminates when the last
    card is dealt, after cards - 1 steps. Source: popgym/envs/repeat_previous.py and core/deck.py
    (52 cards a deck; 1, 2, 3 decks with k = 4, 32, 64).
    """

    def __init__(self, decks=1, k=4):
        super().__init__()
        self.cards, self.k = 52 * decks, k

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=self.cards - 1)

    @property
    def name(self):
        return "popgym:RepeatPrevious"

    def deal(self, key, left, last):
        """Suit of a card drawn uniformly from those left in the deck, and the new `left` and `last`."""
        number = jax.random.randint(key, (), 0, left.sum())
        suit = (number >= jnp.cumsum(left)).sum()
        return suit, left.at[suit].add(-1), jnp.append(last[1:], suit)

    def reset_env(self, key, params):
        full = jnp.full(4, self.cards // 4)
        suit, left, last = self.deal(key, full, jnp.zeros(self.k, jnp.int32))
        return suit, CardsState(left, last, jnp.int32(0))

    def step_env(self, key, state, action, params):
        answer = jnp.where(action == state.last[0], 1.0, -1.0) / (self.cards - self.k)
        reward = jnp.where(state.time + 1 >= self.k, answer, 0.0)
        suit, left, last = self.deal(key, state.left, state.last)
        state = CardsState(left, last, state.time + 1)
        terminated = self.is_terminated(state, params)
        return suit, state, reward, terminated, {"discount": 1.0 - terminated}

    def is_terminated(self, state, params):
        return state.time >= self.cards - 1

    def action_space(self, params=None):
        return spaces.Discrete(4)

    def observation_space(self, params=None):
        return spaces.Discrete(4)


LEVELS = ("Easy", "Medium", "Hard")
TASKS = {name + level: partial(task, *arguments) for name, task, settings in (
    ("StatelessCartPole", StatelessCartPole, ((200,), (400,), (600,))),
    ("NoisyStatelessCartPole", StatelessCartPole, ((200, 0.1), (200, 0.2), (200, 0.3))),
    ("StatelessPendulum", StatelessPendulum, ((200,), (150,), (100,))),
    ("NoisyStatelessPendulum", StatelessPendulum, ((200, 0.1), (200, 0.2), (200, 0.3))),
    ("RepeatPrevious", RepeatPrevious, ((1, 4), (2, 32), (3, 64))),
) for level, arguments in zip(LEVELS, settings)}
