"""The POPGym tasks: equal to the popgym package where it is installed, else to its published definitions."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import popgym

PACKAGE = """
# Runs by itself, because the package has the name of our file: prints what it does on given states and actions.
import json, sys
import numpy as np
from popgym.envs import position_only_cartpole, noisy_position_only_cartpole
from popgym.envs import position_only_pendulum, noisy_position_only_pendulum, repeat_previous

out = {}
for name, (states, actions) in json.load(sys.stdin).items():
    theirs = name.replace("Stateless", "PositionOnly")
    [module] = [m for m in (position_only_cartpole, noisy_position_only_cartpole, position_only_pendulum,
                            noisy_position_only_pendulum, repeat_previous) if hasattr(m, theirs)]
    env = getattr(module, theirs)()
    env.reset(seed=0)
    facts = {"length": env.max_episode_length, "noise": 0.0}
    if hasattr(env, "deck"):  # states are the suits in their order: stack the deck, whose last card is dealt first
        cards = [list(np.flatnonzero(env.deck.suits_idx == suit)) for suit in range(4)]
        env.deck.idx = np.array([cards[suit].pop() for suit in states])[::-1]
        env.deck.deck_len = len(states) - 1
        env.deck.hands["player"] = [env.deck.idx[-1]]
    else:
        facts |= {"low": env.observation_space.low.tolist(), "high": env.observation_space.high.tolist()}
        if hasattr(env, "noise_sigma"):
            facts["noise"], env.noise_sigma = float(env.noise_sigma[0]), 0 * env.noise_sigma
    steps = []
    for state, action in zip(states, actions):
        if not hasattr(env, "deck"):
            env.state = np.array(state, np.float64)
        obs, reward, terminated, truncated, _ = env.step(np.array(action) if isinstance(action, list) else action)
        steps.append((np.array(obs).tolist(), float(reward), bool(terminated), bool(truncated)))
    out[name] = facts | {"steps": steps}
print(json.dumps(out))
"""
CARTPOLES = [name for name in popgym.TASKS if "CartPole" in name]
PENDULUMS = [name for name in popgym.TASKS if "Pendulum" in name]
CARDS = [name for name in popgym.TASKS if "Repeat" in name]


def play(name, policy, key=0, start=None, **changes):
    """One episode of `name` under policy(state, random number in (0, 1)) -> action.

    Returns numpy (states, actions, observations, rewards, terminated, truncated), leading axis time; there is one
    more observation, the first. `start` replaces fields of the first state, `changes` parameters.
    """
    env = popgym.TASKS[name]()
    params = env.default_params.replace(**changes)
    length = params.max_steps_in_episode

    @jax.jit
    def episode(key):
        reset_key, key = jax.random.split(key)
        obs, state = env.reset(reset_key, params)
        state = state.replace(**(start or {}))

        def step(state, key):
            u = jax.random.uniform(jax.random.fold_in(key, 1))
            action = policy(state, u)
            obs, new, reward, terminated, _ = env.step_env(key, state, action, params)
            return new, (state, action, obs, reward, terminated, env.is_truncated(new, params))

        state = jax.tree.map(jnp.asarray, state)
        return obs, jax.lax.scan(step, state, jax.random.split(key, length))[1]

    first, (states, actions, obs, reward, terminated, truncated) = jax.device_get(episode(jax.random.PRNGKey(key)))
    end = 1 + np.argmax(terminated | truncated)
    cut = lambda x: jax.tree.map(lambda y: y[:end], x)  # noqa: E731
    obs = np.concatenate([first[None], obs[:end]])
    return cut(states), cut(actions), obs, *cut((reward, terminated, truncated))


def physics(name, states):
    """The states that gymnasium's environments have, (T, 4) or (T, 2)."""
    if name in CARTPOLES:
        return np.stack([states.x, states.x_dot, states.theta, states.theta_dot], 1)
    return np.stack([states.theta, states.theta_dot], 1)


def random_policy(name):
    if name in CARTPOLES:
        return lambda state, u: (u < 0.5).astype(int)
    if name in PENDULUMS:
        return lambda state, u: (6 * u - 3)[None]  # beyond the torque limit too
    return lambda state, u: jnp.where(u < 0.8, state.last[0], 3 - state.last[0])


def stand(state, u):
    """Balances the pole from the whole state, near the middle."""
    return (0.3 * state.x + 0.5 * state.x_dot + 5 * state.theta + state.theta_dot > 0).astype(int)


def test_equal_to_the_popgym_package():
    """A step from each state of an episode: observation, reward, end; and lengths, noise and bounds."""
    ours, asked = {}, {}
    for name in popgym.TASKS:
        changes = {} if name in CARDS else {"noise": 0.0}
        policy = stand if name == "StatelessCartPoleMedium" else random_policy(name)  # one cart pole is truncated
        states, actions, obs, *_ = ours[name] = play(name, policy, **changes)
        asked[name] = obs.tolist() if name in CARDS else physics(name, states).tolist(), actions.tolist()
    command = [sys.executable, "-I", "-c", PACKAGE]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        pytest.skip("the popgym package is not installed")
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    for name, (_, _, obs, reward, terminated, truncated) in ours.items():
        env = popgym.TASKS[name]()
        params = env.default_params
        their_obs, their_reward, their_terminated, their_truncated = map(np.array, zip(*theirs[name]["steps"]))
        np.testing.assert_allclose(obs[1:], their_obs, atol=1e-6)
        np.testing.assert_allclose(reward, their_reward, atol=1e-7)
        assert np.array_equal(terminated, their_terminated)
        assert theirs[name]["length"] == params.max_steps_in_episode
        if name not in CARDS:
            assert np.array_equal(truncated, their_truncated)
            assert theirs[name]["noise"] == params.noise
            for bound in ("low", "high"):
                ours_bound = getattr(env.observation_space(params), bound)
                np.testing.assert_allclose(ours_bound, theirs[name][bound], 1e-6)


@pytest.mark.parametrize("task, expected", {  # easy, medium, hard
    "StatelessCartPole": ((200, 0), (400, 0), (600, 0)),
    "NoisyStatelessCartPole": ((200, 0.1), (200, 0.2), (200, 0.3)),
    "StatelessPendulum": ((200, 0), (150, 0), (100, 0)),
    "NoisyStatelessPendulum": ((200, 0.1), (200, 0.2), (200, 0.3)),
    "RepeatPrevious": ((51, 4), (103, 32), (155, 64)),
}.items())
def test_published_lengths_noise_and_decks(task, expected):
    for level, (length, noise_or_k) in zip(("Easy", "Medium", "Hard"), expected):
        env = popgym.TASKS[task + level]()
        params = env.default_params
        assert params.max_steps_in_episode == length
        assert (env.k if task == "RepeatPrevious" else params.noise) == noise_or_k


def test_a_pole_that_stands_sums_to_one_and_a_falling_one_to_its_time():
    _, _, _, reward, terminated, truncated = play("StatelessCartPoleHard", stand)
    assert len(reward) == 600 and truncated[-1] and not terminated.any()
    np.testing.assert_allclose(reward.sum(), 1, 1e-5)
    _, _, _, reward, terminated, truncated = play("StatelessCartPoleHard", lambda state, u: 1)
    assert len(reward) < 20 and terminated[-1] and not truncated.any()
    np.testing.assert_allclose(reward, 1 / 600, 1e-6)


def test_a_pendulum_at_rest_upright_sums_to_one_and_the_worst_step_is_minus_one():
    rest = dict(theta=jnp.float32(0), theta_dot=jnp.float32(0))
    _, _, obs, reward, terminated, truncated = play("StatelessPendulumMedium", lambda state, u: jnp.zeros(1),
                                                    start=rest)
    assert len(reward) == 150 and truncated[-1] and not terminated.any()
    np.testing.assert_allclose(reward.sum(), 1, 1e-5)
    np.testing.assert_allclose(obs[1:], [[1, 0]] * 150, atol=1e-6)
    worst = dict(theta=jnp.float32(-np.pi), theta_dot=jnp.float32(8))
    reward = play("StatelessPendulumHard", lambda state, u: jnp.full(1, 2.0), start=worst)[3]
    np.testing.assert_allclose(reward[0], -0.01, 1e-5)


@pytest.mark.parametrize("name", ["RepeatPreviousEasy", "RepeatPreviousHard"])
def test_cards_pay_for_the_suit_of_k_cards_ago_and_the_deck_holds_every_suit_equally(name):
    k = popgym.TASKS[name]().k
    _, _, suits, reward, terminated, _ = play(name, lambda state, u: state.last[0])
    assert np.array_equal(np.bincount(suits), [len(suits) // 4] * 4) and len(suits) == len(reward) + 1
    assert terminated[-1] and not terminated[:-1].any()
    assert (reward[:k - 1] == 0).all()
    np.testing.assert_allclose(reward.sum(), 1, 1e-5)
    np.testing.assert_allclose(play(name, lambda state, u: 3 - state.last[0])[3].sum(), -1, 1e-5)
    _, actions, suits, reward, _, _ = play(name, lambda state, u: (4 * u).astype(int))
    # the pay, told from the observations alone
    right = actions[k - 1:] == suits[:len(suits) - k]
    assert np.array_equal(reward[k - 1:] > 0, right) and 0 < right.mean() < 0.6


def test_cards_are_shuffled():
    """The next card has the suit of the first with probability 12/51, and each suit comes first equally often."""
    env = popgym.TASKS["RepeatPreviousEasy"]()

    def two(key):
        first, state = env.reset(key)
        second, *_ = env.step_env(key, state, 0, env.default_params)
        return first, second

    first, second = jax.vmap(two)(jax.random.split(jax.random.PRNGKey(0), 20_000))
    np.testing.assert_allclose(np.bincount(first) / 20_000, 0.25, atol=0.012)  # four standard deviations
    np.testing.assert_allclose((first == second).mean(), 12 / 51, atol=0.012)


@pytest.mark.parametrize("name", [
    "StatelessCartPoleHard", "NoisyStatelessCartPoleHard", "NoisyStatelessPendulumEasy"])
def test_observations_are_positions_with_fresh_noise_clipped_to_their_space(name):
    env = popgym.TASKS[name]()
    params = env.default_params
    states, actions, obs, *_ = play(name, stand if name in CARTPOLES else random_policy(name))
    space = env.observation_space(params)
    assert (obs >= space.low).all() and (obs <= space.high).all()
    angle = states.theta
    exact = np.stack([states.x, angle] if name in CARTPOLES else [np.cos(angle), np.sin(angle)], 1)
    error = obs[:-1] - exact
    if params.noise == 0:
        np.testing.assert_allclose(error, 0, atol=1e-6)
        return
    free = (np.abs(obs[:-1]) < space.high) & (np.abs(exact) < 0.1)  # away from the bounds noise is not clipped
    assert 0.8 * params.noise < error[free].std() < 1.2 * params.noise
    assert abs(error[free].mean()) < 0.2 * params.noise
    assert len(np.unique(error[free])) > 0.9 * free.sum()
