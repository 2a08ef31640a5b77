"""The algorithm of train_s5.py and train_lstm.py: statistics, advantages, minibatches, steps, learning."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import Clock
from small import TRAINERS, bitwise, close, small

import train_lstm
import train_s5


def no_pmean(x):
    return x


# ---- Statistics ----------------------------------------------------------------------------------
def test_running_moments_are_those_of_all_values():
    rng = np.random.default_rng(0)
    parts = [rng.normal(3.0, 2.0, size=(n, 4, 5)) for n in (2, 7, 31)]
    moments = train_s5.no_moments((5,))
    for x in parts:
        moments = moments.merge(x[..., 0].size, *train_s5.moments_of(jnp.asarray(x), (0, 1), no_pmean))
    every = np.concatenate(parts).reshape(-1, 5)
    np.testing.assert_allclose(moments.count, len(every), rtol=1e-5)
    np.testing.assert_allclose(moments.mean, every.mean(0), rtol=1e-4)
    np.testing.assert_allclose(moments.var, every.var(0), rtol=1e-3)
    expected = (every - every.mean(0)) / every.std(0)
    np.testing.assert_allclose(moments.normalise(every), expected, rtol=1e-2, atol=1e-3)
    np.testing.assert_array_equal(moments.normalise(jnp.array([1e9, -1e9] * 2 + [1e9])), [5, -5, 5, -5, 5])


def test_moments_over_devices_are_those_of_one():
    x = jax.random.normal(jax.random.PRNGKey(0), (6, 8, 3)) + jnp.arange(8.0)[:, None]
    shared = jax.vmap(lambda x: train_s5.moments_of(x, (0, 1), lambda x: jax.lax.pmean(x, "data")),
                      in_axes=1, axis_name="data")(x.reshape(6, 4, 2, 3))
    for device in range(4):
        close(jax.tree.map(lambda x: x[device], shared), train_s5.moments_of(x, (0, 1), no_pmean), rtol=1e-4)


def test_rewards_are_scaled_by_their_task():
    """By the deviation of its own discounted sums: a task that pays 30 times as much looks no different."""
    rng, gamma = np.random.default_rng(0), 0.9
    reward, trial_end = np.abs(rng.normal(size=(2, 50, 6))), rng.random((2, 50, 6)) < 0.05  # two rollouts

    def scaled(pay):
        returns, scale, found = jnp.zeros(6), train_s5.Moments(jnp.float32(0), jnp.zeros(3), jnp.ones(3)), []
        for r, end in zip(reward * np.repeat(pay, 2), trial_end):
            r, returns, scale = train_s5.scale_rewards(r, end, returns, scale, gamma, no_pmean)
            found.append(r)
        return np.array(found)

    total, sums = np.zeros(6), []
    for r, end in zip(reward.reshape(100, 6), trial_end.reshape(100, 6)):
        total = gamma * total + r
        sums.append(total.copy())
        total[end] = 0.0
    deviation = np.repeat(np.reshape(sums, (100, 3, 2)).std((0, 2)), 2)
    np.testing.assert_allclose(scaled([1, 1, 1])[1], reward[1] / deviation, rtol=1e-4)
    np.testing.assert_allclose(scaled([1, 30, 1]), scaled([1, 1, 1]), rtol=1e-4)
    rare = scaled([1, 1, 1e-6])[1][:, 4:]  # next to nothing is not made much of
    np.testing.assert_allclose(
        rare, 1e-6 * reward[1][:, 4:] / (0.01 * deviation[:4].max() + 1e-4), rtol=1e-4)
    assert (scaled([0, 0, 0]) == 0).all()


def test_advantages_are_standardised_within_each_task():
    rng = np.random.default_rng(0)
    advantage = rng.normal(size=(20, 6)) * np.repeat([1, 30, 0.1], 2) + np.repeat([0, 5, -1], 2)
    found = train_s5.normalise_advantages(jnp.asarray(advantage), 3, no_pmean)
    by_task = advantage.reshape(20, 3, 2)
    expected = (by_task - by_task.mean((0, 2))[:, None]) / by_task.std((0, 2))[:, None]
    np.testing.assert_allclose(found, expected.reshape(20, 6), rtol=1e-3, atol=1e-4)


# ---- Advantages ----------------------------------------------------------------------------------
def slow_gae(reward, value, last_value, terminated, trial_end, gamma, lam):
    """The definition in float64: for each environment the sum of discounted TD errors up to the trial's end."""
    steps, N = reward.shape
    advantage = np.zeros((steps, N))
    for n in range(N):
        for start in range(steps):
            weight = 1.0
            for t in range(start, steps):
                following = value[t + 1, n] if t + 1 < steps else last_value[n]
                if trial_end[t, n]:  # if truncated, the last value in hand stands in for the final one
                    following = 0.0 if terminated[t, n] else value[t, n]
                advantage[start, n] += weight * (reward[t, n] + gamma * following - value[t, n])
                if trial_end[t, n]:
                    break
                weight *= gamma * lam
    return advantage


@pytest.mark.parametrize("seed", range(4))
def test_gae_equals_its_definition(seed):
    """With terminated and truncated trials, and episodes that end inside a trial."""
    rng = np.random.default_rng(seed)
    steps, N = 40, 5
    reward, value = rng.normal(size=(2, steps, N))
    last_value = rng.normal(size=N)
    episode_end = rng.random((steps, N)) < 0.2
    terminated = episode_end & (rng.random((steps, N)) < 0.5)
    trial_end = episode_end & (rng.random((steps, N)) < 0.5)
    assert (terminated & trial_end).any() and (~terminated & trial_end).any()
    assert (terminated & ~trial_end).any()
    arguments = reward, value, last_value, terminated, trial_end
    found = train_s5.gae(*map(jnp.asarray, arguments), 0.9, 0.8)
    np.testing.assert_allclose(found, slow_gae(*arguments, 0.9, 0.8), rtol=1e-4, atol=1e-5)


# ---- Updates -------------------------------------------------------------------------------------
class Calls(NamedTuple):
    """Arguments of the functions of a trainer that an update has called."""

    gae: list
    loss: list  # of (log ratio, value, rollout, advantage, target, hyper), one a gradient step


@functools.cache
def compiled(trainer, **changes):
    """(train, its compiled init and update, the Calls that this update adds to)."""
    calls = Calls([], [])
    gae, ppo_loss = trainer.gae, trainer.ppo_loss

    def recorded_gae(*args):
        jax.debug.callback(lambda *args: calls.gae.append(args), *args, ordered=True)
        return gae(*args)

    def recorded_loss(pi, value, rollout, *rest):
        log_ratio = pi.log_prob(rollout.action) - rollout.log_prob
        jax.debug.callback(lambda *args: calls.loss.append(args), log_ratio, value, rollout, *rest,
                           ordered=True)
        return ppo_loss(pi, value, rollout, *rest)

    train = trainer.make_train(small(trainer, **dict(changes)))

    def update(runner):
        with pytest.MonkeyPatch.context() as patch:  # while it is traced
            patch.setattr(trainer, "gae", recorded_gae)
            patch.setattr(trainer, "ppo_loss", recorded_loss)
            return train.update(runner)

    return train, jax.jit(train.init), jax.jit(update), calls


class Update(NamedTuple):
    train: Any
    before: Any  # RunnerState
    after: Any
    metrics: dict
    calls: Calls


def update(trainer=train_s5, runner=None, count=1, hyper=None, **changes):
    """The last of `count` updates, from `runner` or the start."""
    train, init, run, calls = compiled(trainer, **changes)
    after = init(jax.random.PRNGKey(0), hyper) if runner is None else runner
    for _ in range(count):
        calls.gae.clear()
        calls.loss.clear()
        before = after
        after, metrics = run(before)
        jax.effects_barrier()
    return Update(train, before, after, jax.device_get(metrics), Calls([*calls.gae], [*calls.loss]))


FROZEN = {"lr": jnp.float32(0.0)}  # parameters stay as they are
# Runs that tests share, because a trainer takes seconds to compile
CARTPOLE = dict(env=("CartPole-v1",), num_steps=40)  # episodes terminate in between
MEMORY_CHAIN = dict(env=("MemoryChain-bsuite",), env_kwargs=("memory_length=4",), num_steps=20, reset="step",
                    anneal="lr")
CLOCK = dict(env=(Clock(),), num_steps=20, reset="never", anneal="none")  # episodes of six steps are truncated


@pytest.mark.parametrize("name,run", [
    ("s5", CARTPOLE), ("s5", MEMORY_CHAIN), ("s5", CLOCK), ("lstm", CLOCK | dict(reset="trial"))])
def test_an_update_sees_the_logits_that_were_acted_on(name, run):
    """While the parameters stay the ratio of new to old probability is one, and the values are the same.

    The second update is looked at: its hidden state and statistics are no longer those of the start.
    """
    trainer, changes = TRAINERS[name]
    train, before, after, metrics, calls = update(trainer, count=2, hyper=FROZEN, **run, **changes)
    assert len(calls.loss) == 4 and metrics["entropy"] > 0.5
    assert all(np.abs(h).max() > 0.01 for h in jax.tree.leaves(before.hidden))
    assert before.norm.projected.count > 8 * run["num_steps"] - 1
    for log_ratio, value, rollout, *_ in calls.loss:
        np.testing.assert_allclose(log_ratio, 0.0, atol=1e-5)
        np.testing.assert_allclose(value, rollout.value, atol=1e-5)
    bitwise(before.params, after.params)
    [(_, _, last_value, *_)] = calls.gae

    @jax.jit
    def value_after(params, *arguments):
        return train.network.apply(params, *arguments)[2]

    expected = value_after(after.params, before.norm, after.hidden, after.observation, after.reset)
    np.testing.assert_allclose(last_value, expected, atol=1e-5)


@pytest.mark.parametrize("changes", [CARTPOLE, MEMORY_CHAIN, CLOCK], ids=["trial", "step", "never"])
def test_when_the_hidden_state_is_reset(changes):
    reset = changes.get("reset", "trial")
    first = update(hyper=FROZEN, **changes)
    second = update(runner=first.after, **changes)
    for found in (first, second):
        trial_end = found.calls.gae[0][4]
        rollouts = [rollout for _, _, rollout, *_ in found.calls.loss[:2]]
        resets = np.concatenate([rollout.reset for rollout in rollouts], 1)
        starts = np.concatenate([rollout.observation.context[..., -1] for rollout in rollouts], 1) == 1
        assert starts[1:].any() and trial_end[:-1].sum() == starts[1:].sum()
        expected = {"trial": starts, "step": np.ones_like(starts), "never": np.zeros_like(starts)}[reset]
        np.testing.assert_array_equal(resets[1:], expected[1:])
        np.testing.assert_array_equal(resets[0], True if found is first else expected[0])
    if reset == "step":  # then the hidden state before a rollout does not matter
        runner = second.after
        other = runner._replace(hidden=jax.tree.map(lambda h: h + 1.0, runner.hidden))
        bitwise(*(update(runner=x, **changes).after.params for x in (runner, other)))


def test_minibatches_are_whole_environments_and_each_is_used_once_an_epoch():
    """Of every two neighbours each minibatch gets one, and epochs are shuffled anew."""
    found = update(hyper=FROZEN, **CARTPOLE)
    first = np.array(found.before.observation.projected)
    assert len(np.unique(first, axis=0)) == 8
    numbers = []
    for _, _, rollout, *_ in found.calls.loss:
        numbers.append([int(np.flatnonzero((first == x).all(1))[0])
                        for x in rollout.observation.projected[0]])
    for epoch in (numbers[:2], numbers[2:]):
        assert sorted(sum(epoch, [])) == list(range(8))
        for minibatch in epoch:
            assert sorted(n // 2 for n in minibatch) == [0, 1, 2, 3]
    assert numbers[:2] != numbers[2:]
    _, _, rollout, advantage, target, _ = found.calls.loss[0]
    assert rollout.observation.projected.shape == (40, 4, 4)
    _, values, *_ = found.calls.gae[0]
    everything = expected_advantage(found)
    np.testing.assert_array_equal(rollout.value, values[:, numbers[0]])
    np.testing.assert_allclose(target, (everything + values)[:, numbers[0]], rtol=1e-3, atol=1e-4)
    standard = (everything - everything.mean()) / everything.std()
    np.testing.assert_allclose(advantage, standard[:, numbers[0]], rtol=1e-3, atol=1e-3)


def expected_advantage(found):
    """Of an update, by slow_gae in float64."""
    reward, value, last_value, terminated, trial_end, gamma, lam = found.calls.gae[0]
    arrays = map(np.float64, (reward, value, last_value))
    return slow_gae(*arrays, terminated, trial_end, gamma, lam)


def test_the_value_of_the_last_observation_stands_in_where_a_trial_runs_out_of_time():
    found = update(hyper=FROZEN, **CLOCK)
    _, value, _, terminated, trial_end, *_ = found.calls.gae[0]
    assert trial_end.sum() >= 8 * 3 and not terminated.any()
    expected = expected_advantage(found) + value
    for _, _, _, _, target, _ in found.calls.loss:
        for column in target.T:
            assert np.isclose(column[:, None], expected, rtol=1e-3, atol=1e-3).all(0).any()


def test_statistics_change_between_iterations_only_and_are_those_of_the_rollout():
    found = update(hyper=FROZEN, **CARTPOLE)
    rollouts = [rollout for _, _, rollout, *_ in found.calls.loss[:2]]
    observation = jax.tree.map(lambda *x: np.concatenate(x, 1), *(x.observation for x in rollouts))
    for name in ("projected", "change", "context"):
        moments, x = getattr(found.after.norm, name), getattr(observation, name).reshape(40 * 8, -1)
        assert moments.mean.shape == (x.shape[1],)
        np.testing.assert_allclose(moments.count, 40 * 8, rtol=1e-5)
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(moments.var, x.var(0), rtol=1e-3, atol=1e-4)
    assert found.after.norm.sysid.mean.shape == found.after.norm.state.mean.shape == (0,)


def test_non_finite_gradients_skip_the_step():
    runner = update(hyper={"lr": jnp.float32(1e-3)}, **CARTPOLE).after
    broken = runner._replace(returns=jnp.full_like(runner.returns, jnp.nan))
    _, before, after, metrics, _ = update(runner=broken, **CARTPOLE)
    assert metrics["skipped"] == 1.0
    bitwise((after.params, after.opt_state), (before.params, before.opt_state))
    _, before, after, metrics, _ = update(runner=runner, **CARTPOLE)
    assert metrics["skipped"] == 0.0
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before.params, after.params)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_step_size_and_entropy_bonus_fall_linearly():
    """Half of the way through a run, an update is that of the start at half of both."""
    train, _, start, *_ = update(**CARTPOLE)
    hyper = start.hyper | {"ent_coef": jnp.float32(0.5), "lr": jnp.float32(0.01)}
    halfway = jnp.int32(train.num_updates // 2)
    assert train.num_updates == 2

    def parameters(number, *halved):
        changed = hyper | {name: hyper[name] / 2 for name in halved}
        runner = start._replace(hyper=changed, num_updates=jnp.int32(number))
        return update(runner=runner, **CARTPOLE).after.params

    bitwise(parameters(halfway), parameters(0, "lr", "ent_coef"))
    with pytest.raises(AssertionError):
        bitwise(parameters(halfway), parameters(0, "lr"))


@pytest.mark.parametrize("changes,lr,ent_coef", [
    (CARTPOLE, 0.5, 0.5), (MEMORY_CHAIN, 0.5, 1.0), (CLOCK, 1.0, 1.0)], ids=["lr+entropy", "lr", "none"])
def test_what_falls_is_chosen(changes, lr, ent_coef):
    train, before, after, *_ = update(hyper=FROZEN, **changes)
    halfway = after._replace(num_updates=jnp.int32(train.num_updates // 2), hyper=after.hyper | {
        "lr": jnp.float32(0.1), "ent_coef": jnp.float32(0.2)})
    hyper = update(runner=halfway, **changes).calls.loss[0][-1]
    np.testing.assert_allclose([hyper["lr"], hyper["ent_coef"]], [0.1 * lr, 0.2 * ent_coef], rtol=1e-6)


def test_seeds_side_by_side_train_as_if_alone():
    train, init, run, _ = compiled(train_s5, **CARTPOLE)
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in (3, 4)])
    whole = jax.jit(jax.vmap(train))(keys)["metrics"]
    for i in range(2):
        runner = init(keys[i])
        for j in range(train.num_updates):
            runner, metrics = run(runner)
            np.testing.assert_allclose(whole["value_loss"][i, j], metrics["value_loss"], rtol=2e-3)
            np.testing.assert_allclose(whole["return"][i, j], metrics["return"], rtol=1e-5)


# ---- Runs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("trainer,changes", [
    # more than ten seconds: physics, system identification and S5 are compiled
    (train_s5, dict(env=("cartpole-swingup", "point_mass-easy"), num_envs=4, episodes_per_trial=2,
                    projection="orthogonal", memory="s5", sysid=True, dtype="bfloat16")),
    (train_s5, MEMORY_CHAIN),
    (train_lstm, dict(env=("Pendulum-v1",), dtype="bfloat16", reset="step"))])
def test_trains_and_stays_finite(trainer, changes):
    train, init, run, _ = compiled(trainer, **changes)
    start = after = init(jax.random.PRNGKey(0))
    for _ in range(4):
        after, metrics = run(after)
        assert metrics["return"].shape == (len(changes["env"]),)
        assert np.isfinite(metrics["kl"]) and metrics["skipped"] == 0
    start, params = jax.tree.leaves(start.params), jax.tree.leaves(after.params)
    assert all(np.isfinite(x).all() for x in params)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(start, params)) > 1e-4


def test_learns_cartpole():
    """A random policy balances for 22 steps. JAX_DEBUG_NANS finds no NaN on the way.

    A task that needs memory: tests/test_benchmarks.py.
    """
    config = train_s5.Config(
        env=("CartPole-v1",), total_timesteps=120_000, width=32, state_size=32, layers=1, num_envs=32,
        num_steps=64, num_minibatches=2, lr=3e-3)
    with jax.debug_nans(True):
        returns = jax.jit(train_s5.make_train(config))(jax.random.PRNGKey(0))["metrics"]["return"]
    assert returns[-5:][np.isfinite(returns[-5:])].mean() > 150  # in some updates no episode ends


# ---- Unusual numbers -----------------------------------------------------------------------------
def scaled(reward, deviation):
    """Rewards (T, 1) after scaling by a task's running deviation, which has settled."""
    no, steps = jnp.zeros(reward.shape, bool), jnp.float32(1e6)
    scale = train_s5.Moments(steps, jnp.zeros(1), jnp.full(1, deviation**2))
    return train_s5.scale_rewards(reward, no, jnp.zeros(1), scale, 0.9, lambda x: x)


@pytest.mark.parametrize("size", [1.0, -1.0, 1e6, 1e20, -1e30])
def test_a_reward_after_long_zeros_is_bounded(size):
    """It counts, with its sign, and neither drowns everything else nor becomes zero."""
    reward = jnp.zeros((8, 1)).at[5].set(size)
    found, returns, scale = scaled(reward, 0.0)
    assert 1 < np.sign(size) * found[5, 0] <= 10
    assert np.isfinite(returns).all() and all(np.isfinite(x).all() for x in scale)
    np.testing.assert_array_equal(found[:5], 0.0)


def test_ordinary_rewards_are_only_scaled():
    reward = jnp.asarray(np.random.default_rng(0).normal(size=(16, 1)), jnp.float32)
    found, _, scale = scaled(reward, 2.0)
    np.testing.assert_allclose(found, reward / jnp.sqrt(scale.var), rtol=1e-5)


@pytest.mark.parametrize("trainer,changes", [
    (train_s5, {}), (train_s5, dict(action_repeat=(1, 2))), (train_lstm, {}), (train_lstm, dict(cell="gru")),
    (train_s5, dict(env=("pendulum-swingup",), memory="vector"))])
def test_an_update_keeps_its_types_where_float64_is_enabled(trainer, changes):
    """Runners before and after an update have equal dtypes, as a scan over updates requires."""
    with jax.enable_x64(True):
        train = trainer.make_train(small(trainer, **changes))
        before = jax.eval_shape(train.init, jax.ShapeDtypeStruct((2,), np.uint32))
        after, _ = jax.eval_shape(train.update, before)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), before) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
