"""envs.Trials with environments that return numbers no learner can use, or types no scan accepts."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import KEY, PLAIN, Clock, ClockState, rollout

import envs


class Poisoned(Clock):
    """A Clock with a number that is not usable at its start, in a reward or in an observation."""

    def __init__(self, place, poison):
        super().__init__()
        self.place, self.poison = place, poison

    def reset_env(self, key, params):
        obs, state = super().reset_env(key, params)
        bad = (state.start[0] > 0.5) & (self.place == "start")
        return obs.at[1].set(jnp.where(bad, self.poison, obs[1])), state

    def step_env(self, key, state, action, params):
        obs, state, reward, terminated, info = super().step_env(key, state, action, params)
        bad = (state.start[0] > 0.5) & (state.time == 2)
        if self.place == "reward":
            reward = jnp.where(bad, self.poison, reward)
        if self.place == "observation":
            obs = obs.at[0].set(jnp.where(bad, self.poison, obs[0]))
        return obs, state, reward, terminated, info


@pytest.mark.parametrize("place, poison", [
    ("start", np.nan), ("start", np.inf), ("start", 1e30), ("reward", np.nan), ("reward", -np.inf),
    ("observation", np.nan), ("observation", -3e38)])
def test_a_number_that_cannot_be_used_is_counted_and_never_reaches_the_learner(place, poison):
    trials = envs.Trials([Poisoned(place, poison)], 8, projection="gaussian", episodes_per_trial=2,
                         sysid=np.isnan(poison), env_kwargs={"max_steps_in_episode": 4})
    out = rollout(trials, 9)
    state = out.state.env[0]
    expected = (state.start[..., 0] > 0.5) & (state.time == (0 if place == "start" else 1))
    np.testing.assert_array_equal(out.transition.diverged, expected)
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(out.transition.truncated & expected, expected)
    learnt = out.after, out.transition, out.before_any, out.state.sysid, out.state.projected
    for leaf in jax.tree.leaves(learnt):
        assert np.isfinite(np.asarray(leaf, np.float64)).all()


def test_a_return_that_would_overflow_ends_its_episode():
    class Rich(Clock):
        def step_env(self, key, state, action, params):
            obs, state, _, terminated, info = super().step_env(key, state, action, params)
            return obs, state, jnp.float32(3e38), terminated, info

    trials = envs.Trials([Rich()], 2, projection="none", **PLAIN)
    out = rollout(trials, 4)
    np.testing.assert_array_equal(out.transition.diverged, [[False] * 2, [True] * 2] * 2)
    summary = trials.summary(jax.tree.map(jnp.asarray, out.transition))
    assert np.isnan(summary["return"])  # not the mean of the parts before
    assert np.isfinite(out.transition.episode_return).all()


class Loose(Clock):
    """Its reset returns numpy and Python numbers, whose types differ from those of a step."""

    def reset_env(self, key, params):
        return np.zeros(3), ClockState(0, np.int8(0))  # start becomes a float

    def step_env(self, key, state, action, params):
        state = ClockState(state.start + 0.5, state.time + 1)
        return np.array([1, 2, 3]), state, 1, np.bool_(False), {}


class Typed(Clock):
    """Its state holds a typed key and a weak type, its observation is one Python number."""

    def observation_space(self, params):
        return SimpleNamespace(shape=())

    def reset_env(self, key, params):
        return 0.0, {"key": jax.random.key(3), "time": jnp.asarray(0.0) * 1}

    def step_env(self, key, state, action, params):
        state = {"key": jax.random.fold_in(state["key"], 1), "time": 0.5 + state["time"]}
        return state["time"], state, np.float64(1), jnp.array(0), {}


def scanned(env, **changes):
    """A function of a key: five steps in a scan, (states, observations, transitions, summary of two)."""
    trials = envs.Trials([env], 2, projection="gaussian", episodes_per_trial=2, obs_size=4,
                         env_kwargs={"max_steps_in_episode": 3}, **changes)

    def run(key):
        def step(state, t):
            action = jnp.ones((2, trials.action_dims), int)
            state, observation, transition = trials.step(state, action, t)
            return state, (state.env[0], observation, transition)

        state = trials.reset(key, stagger=False)[0]
        env_state, observation, transition = jax.lax.scan(step, state, jnp.arange(5))[1]
        first = jax.tree.map(lambda x: x[:2], transition)
        return env_state, observation, transition, trials.summary(first)

    return run


@pytest.mark.parametrize("env", [
    Clock(), Loose(), Typed(), "Pendulum-v1", "CartPole-v1", "popgym:RepeatPreviousEasy",
    "pendulum-swingup"])
def test_trials_can_be_scanned_in_64_bits(env):
    """JAX_ENABLE_X64. By abstract evaluation: what fails is the types of the carry."""
    with jax.enable_x64(True):
        _, observation, transition, _ = jax.eval_shape(scanned(env), KEY)
    assert {x.dtype for x in jax.tree.leaves(observation)} == {np.dtype(np.float32)}
    assert transition.reward.dtype == transition.episode_return.dtype == np.float32


@pytest.mark.parametrize("env", [Loose, Typed])
def test_numbers_of_python_and_numpy_become_arrays_of_the_wider_type(env):
    state, observation, transition, summary = jax.jit(scanned(env(), **PLAIN))(KEY)
    assert not transition.diverged.any() and np.isnan(summary["return"])
    assert list(transition.episode_end[:, 0]) == [False, False, True, False, False]
    np.testing.assert_array_equal(transition.episode_return[:, 0], [1, 2, 3, 1, 2])
    found = state.start[:, 0] if env is Loose else state["time"][:, 0]
    np.testing.assert_array_equal(found, [0.5, 1, 0, 0.5, 1])


def test_nothing_is_nan_under_debug_nans():
    with jax.debug_nans(True):
        summary = jax.jit(scanned(Clock(), **PLAIN))(KEY)[-1]
    assert summary["return"] == -np.inf


class Bounded(Clock):
    """A Clock that remembers its last action, in a space with the given bounds."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def action_space(self, params):
        return SimpleNamespace(shape=(2,), low=self.low, high=self.high)

    def step_env(self, key, state, action, params):
        obs, state, reward, terminated, info = super().step_env(key, state, action, params)
        return obs, state._replace(start=action), reward, terminated, info


@pytest.mark.parametrize("projection", ["none", "identity", "gaussian"])
@pytest.mark.parametrize("low, high", [
    (-0.1, 0.1), (-100, 100), (0, 1), (-1, np.array([3, 5e6])), (np.array([2, 2]), 2)])
def test_actions_use_the_bounds_of_their_space(low, high, projection):
    """All of it and no more: both ends and something between them are reached."""
    trials = envs.Trials([Bounded(low, high)], 81, projection=projection, **PLAIN)
    bins = jnp.stack(jnp.meshgrid(jnp.arange(9), jnp.arange(9)), -1).reshape(81, 2)
    matrix = jax.jit(trials.draw)(KEY).act_matrix
    control = np.asarray(trials.control(matrix, bins))
    low, high = (np.float32(np.broadcast_to(x, 2)) for x in (low, high))
    np.testing.assert_array_equal(control.min(0), low)
    np.testing.assert_array_equal(control.max(0), high)
    inside = ((control > low) & (control < high)).any(0)
    np.testing.assert_array_equal(inside, low < high)


@pytest.mark.parametrize("low, high", [
    (-np.inf, np.inf), (-1, np.inf), (np.nan, 1), (1, -1), (-3.4e38, 3.4e38), (-1, np.array([1, 1e39]))])
@pytest.mark.parametrize("projection", ["none", "gaussian"])
def test_a_space_without_usable_bounds_is_refused(low, high, projection):
    with pytest.raises(ValueError, match="action space namespace.* finite .low and .high"):
        envs.Trials([Bounded(low, high)], 2, projection=projection, **PLAIN)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2)])
def test_a_binary_space_is_that_many_choices_of_two(shape):
    """As gymnasium's MultiBinary, whose n is its size or its shape: both the observation and the action."""
    class Switches(Clock):
        def action_space(self, params):
            return SimpleNamespace(n=shape[0] if len(shape) == 1 else shape, shape=shape)

        observation_space = action_space

        def reset_env(self, key, params):
            return jnp.ones(shape, jnp.int8), ClockState(jnp.zeros(shape, jnp.int32), jnp.int32(0))

        def step_env(self, key, state, action, params):
            return action.astype(jnp.int8), ClockState(action, state.time + 1), 0.0, False, {}

    trials = envs.Trials([Switches()], 2, projection="none", **PLAIN)
    size = int(np.prod(shape))
    assert (trials.action_dims, trials.num_bins, trials.obs_size) == (size, 2, size)
    state, observation = jax.jit(trials.reset, static_argnums=1)(KEY, False)
    action = jnp.arange(2 * size).reshape(2, size) % 2
    state, observation, _ = jax.jit(trials.step)(state, action)
    np.testing.assert_array_equal(state.env[0].start, action.reshape(2, *shape))
    np.testing.assert_allclose(observation.projected, action * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("function, count", [("reset_env", 1), ("reset_env", 3), ("step_env", 3), ("step_env", 6)])
def test_a_function_that_returns_too_little_or_too_much_is_named(function, count):
    """Six are the values of gymnasium and more."""
    class Odd(Clock):
        pass

    def odd(self, *args):
        values = getattr(super(Odd, self), function)(*args)
        return (*values, *values)[:count]

    setattr(Odd, function, odd)
    trials = envs.Trials([Odd()], 2, projection="none", **PLAIN)
    with pytest.raises(ValueError, match=f"{function} must return observation, state"):
        trials.reset(KEY)


@pytest.mark.parametrize("size", [2, 4])
def test_an_observation_that_is_not_as_its_space_says_is_refused(size):
    class Liar(Clock):
        def observation_space(self, params):
            return SimpleNamespace(shape=(3,))

        def reset_env(self, key, params):
            return jnp.zeros(size), super().reset_env(key, params)[1]

    trials = envs.Trials([Liar()], 2, projection="none", **PLAIN)
    with pytest.raises(ValueError, match=f"gives observations of {size} numbers, its space says 3"):
        trials.reset(KEY)


def test_an_observation_of_another_number_of_arrays_than_its_space_is_refused():
    class Liar(Clock):
        def observation_space(self, params):
            return {"time": SimpleNamespace(shape=(3,))}

        def reset_env(self, key, params):
            return {"time": jnp.zeros(3), "forgotten": jnp.zeros(2)}, super().reset_env(key, params)[1]

    trials = envs.Trials([Liar()], 2, projection="none", **PLAIN)
    with pytest.raises(ValueError, match=r"observations of 2 arrays, its space says 1: namespace\(shape=\(3,\)\)"):
        trials.reset(KEY)


def test_discrete_spaces_may_start_anywhere():
    """As gymnasium's Discrete(3, start=-1): both the observation and the action."""
    class Shifted(Clock):
        def action_space(self, params):
            return SimpleNamespace(n=3, start=-1, shape=())

        def observation_space(self, params):
            return SimpleNamespace(n=7, start=10, shape=())

        def reset_env(self, key, params):
            return jnp.int32(10), ClockState(jnp.zeros((), jnp.int32), jnp.int32(0))

        def step_env(self, key, state, action, params):
            return 11 + state.time, ClockState(action, state.time + 1), 0.0, False, {}

    trials = envs.Trials([Shifted()], 3, projection="none", **PLAIN)
    state, observation = jax.jit(trials.reset, static_argnums=1)(KEY, False)
    assert (observation.projected.argmax(-1) == 0).all() and trials.obs_size == 7
    state, observation, _ = jax.jit(trials.step)(state, jnp.arange(3)[:, None])
    np.testing.assert_array_equal(state.env[0].start, [-1, 0, 1])
    assert (observation.projected.argmax(-1) == 1).all()
