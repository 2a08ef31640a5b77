"""Steps of different lengths: Trials, discounting, the network, system identification."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import Clock, ClockParams
from small import SMALL, bitwise, small

import envs
import sysid
import train_lstm
import train_s5

KEY = jax.random.PRNGKey(0)
PLAIN = dict(projection="none", privileged=False)


def rollout(trials, steps, key=KEY):
    """(Observation, Transition, counters) of `steps` steps with the last action bin, each (steps, N, ...)."""
    action = jnp.full((trials.num_envs, trials.action_dims), trials.num_bins - 1)

    def step(state, t):
        state, observation, transition = trials.step(state, action, t)
        return state, (observation, transition, state.counters)

    state, _ = trials.reset(key, stagger=False)
    return jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps)))(state)[1]


class LongClock(Clock):
    default_params = ClockParams(max_steps_in_episode=50)


@functools.cache
def clocks():
    trials = envs.Trials((LongClock(),), 64, action_repeat=(1, 2, 4, 8), **PLAIN)
    return trials, rollout(trials, 60)


def test_durations_are_uniform_and_independent():
    trials, (_, transition, _) = clocks()
    steps = np.rint(np.array(transition.dt) * trials.time_unit).astype(int)
    assert trials.time_unit == 15 / 4
    counts = np.array([(steps == n).sum() for n in (1, 2, 4, 8)])
    assert counts.sum() == steps.size
    expected = steps.size / 4
    assert (abs(counts - expected) < 4 * np.sqrt(expected)).all()
    log = np.log2(steps) - np.log2(steps).mean()
    for other in (log[:, ::-1], np.roll(log, 1, 0)):  # of other environments, of the step before
        assert abs((log * other).mean()) < 4 * log.var() / np.sqrt(log.size)


def test_a_step_lasts_as_long_as_it_says():
    """The clock of an environment advances by the duration; its reward is the sum over the steps."""
    trials, (observation, transition, counters) = clocks()
    steps = np.rint(np.array(transition.dt) * trials.time_unit).astype(int)
    end = np.array(transition.episode_end)
    time = np.zeros(trials.num_envs)
    assert end.any() and not end.all()
    for t in range(len(steps)):
        time += steps[t]
        np.testing.assert_array_equal(end[t], time >= 50)  # limits count environment steps
        time[end[t]] = 0
        np.testing.assert_array_equal(counters.episode_step[t], time)
        clock = np.expm1(np.array(observation.projected[t, :, 2]))
        np.testing.assert_allclose(clock, time, rtol=1e-5)
    np.testing.assert_allclose(transition.reward, steps, rtol=1e-6)  # one in every environment step
    np.testing.assert_allclose(trials.summary(transition)["reward"], [1.0], rtol=1e-5)


def test_the_agent_observes_the_last_duration_and_one_at_a_start():
    _, (observation, transition, _) = clocks()
    expected = jnp.where(transition.trial_end, 1.0, transition.dt)
    np.testing.assert_array_equal(observation.dt, expected)


def test_an_episode_that_ends_early_ends_the_step():
    """CartPole terminates inside a step: the duration counts the environment steps that were taken."""
    trials = envs.Trials(("CartPole-v1",), 32, action_repeat=(1, 8), **PLAIN)
    _, transition, _ = rollout(trials, 40)
    steps = np.rint(np.array(transition.dt) * trials.time_unit).astype(int)
    assert set(steps[~np.array(transition.terminated)]) == {1, 8}
    assert len(set(steps[np.array(transition.terminated)])) > 2
    np.testing.assert_allclose(transition.reward, steps)  # one in every environment step


@pytest.mark.parametrize("fields", [dict(action_repeat=(1, 8)), dict(action_repeat=(3, 4), time_unit=2.0)])
def test_durations_are_all_values_that_an_agent_can_observe(fields):
    trials = envs.Trials(("CartPole-v1",), 32, **fields, **PLAIN)
    observed = np.unique(rollout(trials, 40)[0].dt)
    assert len(observed) > 2
    assert all(np.isclose(trials.durations, dt).any() for dt in observed)


def test_there_are_no_durations_where_steps_last_equally_or_too_many_values_occur():
    for repeats in (1, 2, (1, 17)):
        assert envs.Trials(("CartPole-v1",), 1, action_repeat=repeats, **PLAIN).durations == ()


def test_one_duration_given_as_a_number_or_a_tuple_is_the_same():
    one, many = (rollout(envs.Trials((LongClock(),), 4, action_repeat=repeat, **PLAIN), 20)
                 for repeat in (2, (2,)))
    bitwise(one, many)
    assert one[0].dt is None and one[1].dt is None


def test_equal_durations_in_another_unit_change_nothing_but_dt():
    """An agent trained at two environment steps acts at one: every duration is a half."""
    plain = rollout(envs.Trials((LongClock(),), 4, action_repeat=1, **PLAIN), 20)
    scaled = rollout(envs.Trials((LongClock(),), 4, action_repeat=1, time_unit=2.0, **PLAIN), 20)
    np.testing.assert_array_equal(scaled[1].dt, 0.5)
    bitwise(plain[:2], tuple(part._replace(dt=None) for part in scaled[:2]))


# ---- Discounting ---------------------------------------------------------------------------------
def slow_gae(reward, value, last_value, terminated, trial_end, gamma, lam, dt):
    """The definition in float64, with gamma and lambda to the power of each step's duration."""
    steps, N = reward.shape
    advantage = np.zeros((steps, N))
    for n in range(N):
        for start in range(steps):
            weight = 1.0
            for t in range(start, steps):
                following = value[t + 1, n] if t + 1 < steps else last_value[n]
                if trial_end[t, n]:
                    following = 0.0 if terminated[t, n] else value[t, n]
                advantage[start, n] += weight * (reward[t, n] + gamma ** dt[t, n] * following - value[t, n])
                if trial_end[t, n]:
                    break
                weight *= (gamma * lam) ** dt[t, n]
    return advantage


def test_an_update_discounts_by_duration(monkeypatch):
    """The arguments of gae in an update, and its result, against float64."""
    calls = []
    gae = train_s5.gae

    def recorded(*args):
        result = gae(*args)
        jax.debug.callback(lambda *x: calls.append(jax.device_get(x)), *args, result)
        return result

    monkeypatch.setattr(train_s5, "gae", recorded)
    train = train_s5.make_train(small(action_repeat=(1, 2, 4), num_steps=24))
    durations = []
    step = train.trials.step

    def watched(*args):
        result = step(*args)
        jax.debug.callback(lambda x: durations.append(np.array(x)), result[2].dt, ordered=True)
        return result

    object.__setattr__(train.trials, "step", watched)
    jax.jit(lambda key: train.update(train.init(key)))(KEY)
    jax.effects_barrier()
    [(*arguments, gamma, lam, found)] = calls
    dt = np.stack(durations)
    np.testing.assert_allclose(gamma, train_s5.Config.gamma**dt, rtol=1e-5)
    np.testing.assert_allclose(lam, train_s5.Config.gae_lambda**dt, rtol=1e-5)
    expected = slow_gae(*map(np.float64, arguments), train_s5.Config.gamma, train_s5.Config.gae_lambda, dt)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


# ---- Network -------------------------------------------------------------------------------------
@functools.cache
def inputs():
    trials = envs.Trials(("CartPole-v1",), 8, action_repeat=(1, 4), **PLAIN)
    observation, transition, _ = rollout(trials, 12)
    return trials, observation, transition.trial_end


def network_of(trainer, dt):
    trials, observation, reset = inputs()
    config = trainer.Config(**SMALL | dict(action_repeat=(1, 4), dt=dt))
    network = train_s5.ActorCritic(config, trainer.make_memory(config, trials), 1, 2)
    norm = jax.tree.map(lambda x: train_s5.no_moments(x.shape[2:]), observation)
    hidden = network.zero_state((8,))
    params = network.init(KEY, norm, hidden, observation, reset)
    return network, lambda *args: network.apply(params, norm, *args), hidden


WAYS = [(train_s5, "recurrence"), (train_s5, "input"), (train_s5, "none"),
        (train_lstm, "input"), (train_lstm, "none")]


@pytest.mark.parametrize("trainer,dt", WAYS)
def test_steps_equal_a_sequence(trainer, dt):
    _, apply, hidden = network_of(trainer, dt)
    _, observation, reset = inputs()
    assert reset.any()
    last, pi, value = apply(hidden, observation, reset)
    for t in range(len(reset)):
        now = jax.tree.map(lambda x: x[t], observation)
        hidden, step_pi, step_value = apply(hidden, now, reset[t])
        np.testing.assert_allclose(step_value, value[t], atol=1e-5)
        np.testing.assert_allclose(
            step_pi.distribution.logits, pi.distribution.logits[t], atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), hidden, last)


@pytest.mark.parametrize("trainer,dt", WAYS)
def test_durations_matter_unless_they_are_hidden(trainer, dt):
    _, apply, hidden = network_of(trainer, dt)
    _, observation, reset = inputs()
    value = apply(hidden, observation, reset)[2]
    other = apply(hidden, observation._replace(dt=1.5 * observation.dt), reset)[2]
    assert (np.abs(value - other).max() > 1e-6) == (dt != "none")


def test_durations_of_one_are_the_regular_recurrence():
    network, apply, hidden = network_of(train_s5, "recurrence")
    _, observation, reset = inputs()
    one = apply(hidden, observation._replace(dt=jnp.ones_like(observation.dt)), reset)[2]
    np.testing.assert_allclose(one, apply(hidden, observation._replace(dt=None), reset)[2], atol=1e-5)


# ---- System identification -----------------------------------------------------------------------
def test_sysid_finds_the_same_effects_at_any_duration():
    """A point moved by its action: the effect per time is that of equal durations of one."""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=(2, 4))

    def identified(dt):
        state = sysid.start(jnp.zeros((1, 4)), 2)
        o = np.zeros((1, 4))
        for step in dt:
            action = rng.normal(size=(1, 2))
            o = o + step * action @ effect
            state = sysid.update(state, jnp.float32(action), jnp.zeros(1), jnp.float32(o), jnp.full(1, step))
        model = sysid.fit(state).model
        return np.array(model.effects[0, :2] * model.change_unit[0])

    irregular = identified(rng.choice([0.5, 1.0, 2.0], 300))
    np.testing.assert_allclose(irregular, identified(np.ones(300)), atol=0.1)
    np.testing.assert_allclose(irregular, effect, atol=0.1)


# ---- Positions only ------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["pendulum-swingup", "cartpole-swingup", "finger-spin"])
def test_velocities_can_be_hidden(task):
    """What remains does not change with the velocities, and is a part of the whole observation."""
    whole, params = envs.make(task)
    part, _ = envs.make(task, velocities=False)
    obs, state = part.reset_env(KEY, params)
    assert obs.shape == part.observation_space(params).shape
    assert len(obs) == len(whole.get_obs(state)) - len(state.qvel)
    np.testing.assert_array_equal(obs, part.get_obs(state.replace(qvel=state.qvel + 1)))
    assert set(np.array(obs)) <= set(np.array(whole.get_obs(state)))


# ---- Bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("repeat,message", [
    ((0, 1), "action_repeat must be at least 1"), ((-2,), "action_repeat must be at least 1"),
    ((1, 7), "action_repeat=.* is longer than an episode, which has 6 steps")])
def test_impossible_durations_are_refused(repeat, message):
    with pytest.raises(ValueError, match=message):
        envs.Trials((Clock(),), 4, action_repeat=repeat, **PLAIN)


def test_a_memory_without_dt_refuses_it():
    with pytest.raises(ValueError, match="dt must be one of input, none, got 'recurrence'"):
        small(train_lstm, dt="recurrence")
    with pytest.raises(ValueError, match="memory"):
        config = dataclasses.replace(small(), action_repeat=(1, 2))
        train_s5.make_train(config, make_memory=train_lstm.make_memory)
