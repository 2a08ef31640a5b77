"""envs.Trials: a numpy reference of a step, trials, starts, divergence, several devices."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import KEY, PLAIN, Clock, Sized, compiled, point_mass, rollout, symlog
from scipy.stats import chisquare

import envs
import sysid

VALUES = np.array([-5, -2.8125, -1.25, -0.3125, 0, 0.3125, 1.25, 2.8125, 5])  # of the bins
bitwise = functools.partial(jax.tree.map, np.testing.assert_array_equal)


# ---- A step, written out in numpy ----------------------------------------------------------------
def where(mask, new, old):
    """Leaves of `new` where mask (N,), else of `old`, in numpy."""
    return jax.tree.map(
        lambda a, b: np.where(mask.reshape(-1, *[1] * (np.ndim(b) - 1)), a, b), new, old)


class Reference:
    """What Trials should do, one step after the other. Only environments and sysid.py are shared."""

    def __init__(self, trials, first):
        self.trials, self.N = trials, trials.num_envs
        self.episode_step, self.episode = np.zeros((2, self.N), int)
        self.episode_return = np.zeros(self.N)
        self.t = self.early_ends = 0  # ends before an action's last repetition
        self.raw_step = [
            jax.jit(jax.vmap(lambda s, a, env=env, params=params: env.step_env(KEY, s, a, params)))
            for env, params in zip(trials.envs, trials.params)]
        self.sysid = None
        self.begin(np.ones(self.N, bool), np.ones(self.N, bool), first)

    def begin(self, end, trial_end, spare):
        """Ended episodes and trials start from `spare`."""
        blocks = np.split(end, len(self.trials.tasks))
        if self.t == 0:
            self.env, self.obs, self.matrices = spare.env, spare.obs, (spare.obs_matrix, spare.act_matrix)
        self.env = tuple(map(where, blocks, spare.env, self.env))
        self.obs = where(end, spare.obs, self.obs)
        self.matrices = where(trial_end, (spare.obs_matrix, spare.act_matrix), self.matrices)
        linear = self.linear()
        self.projected = symlog(linear)
        if not self.trials.sysid:
            return
        fresh = jax.device_get(start_sysid(np.float32(linear), self.trials.action_width))
        if self.sysid is None:
            self.sysid = fresh
        continued = self.sysid._replace(o=fresh.o, change=fresh.change, action=fresh.action)
        self.sysid = where(trial_end, fresh, where(end, continued, self.sysid))

    def linear(self):
        matrix = self.matrices[0]
        return self.obs if matrix is None else np.einsum("nij,nj->ni", matrix, self.obs)

    def control(self, action):
        """Actions as the environments take them, and as the agent observes them."""
        trials, matrix = self.trials, self.matrices[1]
        if trials.discrete:
            label = action[:, 0]
            real = label if matrix is None else matrix[np.arange(self.N), label]
            return real, np.eye(trials.num_bins)[label]
        value = VALUES[action]
        control = np.clip(value if matrix is None else np.einsum("nij,nj->ni", matrix, value), -1, 1)
        return trials.low + (trials.high - trials.low) * (control + 1) / 2, value

    def advance(self, control):
        """Reward, terminated, truncated and steps taken (N,), after the repeats of an action."""
        trials, results = self.trials, []
        for i, block in enumerate(np.split(control, len(trials.tasks))):
            state, params = self.env[i], trials.params[i]
            block = block if trials.discrete else block[:, :trials.act_dims[i]]
            obs = np.split(self.obs, len(trials.tasks))[i]
            reward, terminated, truncated = np.zeros(len(block)), *np.zeros((2, len(block)), bool)
            lasted = np.zeros(len(block), int)
            for k in range(int(trials.mean_repeat)):
                live = ~(terminated | truncated)
                lasted += live
                self.early_ends += 0 if k == 0 else (~live).sum()
                raw, new, pay, over, _ = self.raw_step[i](state, block)
                state = where(live, new, state)
                raw = np.pad(raw, ((0, 0), (0, obs.shape[1] - raw.shape[1])))
                obs, reward = where(live, raw, obs), reward + live * np.array(pay)
                terminated = np.where(live, over, terminated)
                truncated = np.where(live, np.array(new.time) >= params.max_steps_in_episode, truncated)
            self.env = (*self.env[:i], state, *self.env[i + 1:])
            results.append((obs, reward, terminated, truncated, lasted))
        self.obs, *outcome = map(np.concatenate, zip(*results))
        return outcome

    def step(self, action, spare):
        """Expected (Observation, Transition)."""
        trials, whole = self.trials, np.ones(self.N, bool)
        control, value = self.control(action)
        reward, terminated, truncated, lasted = self.advance(control)
        step = self.episode_step + lasted
        truncated = (truncated | (step >= trials.limits)) & ~terminated
        end = terminated | truncated
        trial_end = end & (self.episode + 1 >= trials.episodes_per_trial)
        self.episode_return += reward
        transition = envs.Transition(reward, terminated, truncated, trial_end, ~whole,
                                     self.episode_return.copy(), whole, step)
        self.episode_step = np.where(end, 0, step)
        self.episode = np.where(trial_end, 0, self.episode + end)
        self.episode_return[end] = 0
        arrays = (np.float32(x) for x in (value, reward, self.linear()))
        features = np.zeros((self.N, 0))
        if trials.sysid:
            solve = self.t % sysid.FIT_EVERY == 0
            self.sysid, features = jax.device_get(update_sysid(self.sysid, *arrays)[solve])
        before = self.projected
        self.t += 1
        self.begin(end, trial_end, spare)
        kept, begun = ~trial_end[:, None], end[:, None]
        context = np.concatenate([kept * value, kept * reward[:, None], begun, ~kept], 1)
        state = np.zeros((self.N, len(trials.tasks), 1 + max(trials.obs_dims)))
        state[np.arange(self.N), trials.task_of_env] = np.insert(symlog(self.obs), 0, 1, axis=1)
        return envs.Observation(
            self.projected, np.where(begun, 0, self.projected - before), context,
            np.where(begun, 0, features), state.reshape(self.N, -1)), transition


@jax.jit
def update_sysid(state, *step):
    """(state, features) without and with solving for the model."""
    state = sysid.update(state, *step)
    solved = sysid.fit(state)
    return (state, sysid.features(state)), (solved, sysid.features(solved))


@functools.partial(jax.jit, static_argnums=1)
def start_sysid(linear, width):
    return sysid.start(linear, width)


class Case(NamedTuple):
    tasks: tuple
    steps: int
    max_steps: int  # of an episode
    trials: dict[str, Any]


CASES = {
    "two DMControl tasks": Case(
        ("pendulum-swingup", "point_mass-hard"), 30, 13, dict(action_repeat=2, episodes_per_trial=2, sysid=True)),
    "CartPole with permuted actions": Case(
        ("CartPole-v1",), 45, 500, dict(action_repeat=3, episodes_per_trial=2, obs_size=5, sysid=True)),
    "Pendulum, torques in [-2, 2]": Case(("Pendulum-v1",), 25, 10, dict(projection="none")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_equals_the_numpy_reference(case):
    trials = envs.Trials(case.tasks, 6, env_kwargs={"max_steps_in_episode": case.max_steps}, **case.trials)
    out = rollout(trials, case.steps)
    first, reset = jax.tree.map(lambda x: x[0], out.state), out.before_any
    raw = np.array(reset.state).reshape(6, len(case.tasks), -1)[np.arange(6), trials.task_of_env, 1:]
    raw = np.sign(raw) * np.expm1(np.abs(raw))
    reference = Reference(trials, envs.Start(first.env, raw, first.obs_matrix, first.act_matrix))
    np.testing.assert_allclose(reset.projected, reference.projected, atol=1e-5)
    assert not reset.change.any() and not reset.sysid.any()
    np.testing.assert_array_equal(reset.context, [[0] * trials.action_width + [0, 1, 1]] * 6)
    episode_ends = 0
    for t in range(case.steps):
        spare = jax.tree.map(lambda x: x[t], out.spare)
        observation, transition = reference.step(out.action[t], spare)
        assert out.transition.dt is None and out.after.dt is None
        for name, expected in zip(transition._fields[:-1], transition):  # without dt
            np.testing.assert_allclose(getattr(out.transition, name)[t], expected, rtol=1e-5, atol=1e-5,
                                       err_msg=f"{name} in step {t}")
        for name, expected in zip(observation._fields[:-1], observation):  # without dt
            found = getattr(out.after, name)[t]
            assert found.dtype == np.float32 and found.shape == expected.shape
            # float32 solves with condition numbers up to 1e4
            tolerance = dict(atol=0.03) if name == "sysid" else dict(rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found, expected, err_msg=f"{name} in step {t}", **tolerance)
            if name in ("sysid", "change"):
                assert not found[transition.terminated | transition.truncated].any()
        episode_ends += (transition.terminated | transition.truncated).sum()
    assert episode_ends >= 12, "the rollout does not exercise restarts"
    assert out.transition.terminated.any() == trials.discrete
    assert (reference.early_ends > 0) == (trials.action_repeat > 1)
    assert out.after.state.any() and (not trials.sysid or np.abs(out.after.sysid).max() > 0.5)


# ---- Trials --------------------------------------------------------------------------------------
def test_trials_of_several_episodes():
    """Flags, clocks, returns, what carries over and what is drawn anew: trials of 3 episodes of 6 steps."""
    trials = point_mass()
    assert trials.trial_length == 18 and trials.max_episode_steps == 6 and trials.refresh_every == 3
    out = rollout(trials, 54)
    t, transition, context = np.arange(54), out.transition, out.after.context

    def every(x):
        return np.repeat(x[:, None], 16, 1)

    np.testing.assert_array_equal(transition.episode_end, every(t % 6 == 5))
    np.testing.assert_array_equal(transition.truncated, every(t % 6 == 5))
    np.testing.assert_array_equal(transition.trial_end, every(t % 18 == 17))
    np.testing.assert_array_equal(out.state.counters.episode_step, every(t % 6))
    np.testing.assert_array_equal(out.state.counters.episode, every(t // 6 % 3))
    assert not transition.terminated.any() and not transition.diverged.any()
    assert transition.whole_episode.all()
    np.testing.assert_array_equal(context[..., 3], every(t % 6 == 5))
    np.testing.assert_array_equal(context[..., 4], every(t % 18 == 17))
    carries = (t % 18 != 17)[:, None]
    action = VALUES[out.action]
    np.testing.assert_allclose(context[..., :2], np.where(carries[..., None], action, 0), rtol=1e-6)
    np.testing.assert_allclose(context[..., 2], np.where(carries, transition.reward, 0), rtol=1e-6)
    for start in range(0, 54, 6):
        total = np.cumsum(transition.reward[start:start + 6], 0)
        np.testing.assert_allclose(transition.episode_return[start:start + 6], total, rtol=1e-5)
    # projections stay for a trial and then change in every environment; every episode starts elsewhere
    for matrix in (out.state.obs_matrix, out.state.act_matrix):
        change = np.abs(np.diff(matrix, axis=0)).reshape(53, 16, -1)
        np.testing.assert_array_equal(change.max(-1) > 0, every(t % 18 == 0)[1:])
    starts = out.state.env[0].qpos[::6].reshape(9 * 16, 2)
    assert len(np.unique(starts, axis=0)) == 9 * 16
    change = np.diff(out.after.projected, axis=0)
    within = t[1:] % 6 != 5
    np.testing.assert_allclose(out.after.change[1:][within], change[within], atol=1e-6)
    assert not out.after.change[t % 6 == 5].any()


def test_discrete_actions_are_permuted_in_every_trial():
    """Uniform over all permutations, constant within a trial, and passed to the environment."""
    trials = envs.Trials(["popgym:RepeatPreviousEasy"], 24 * 40, projection="gaussian", obs_size=5,
                         episodes_per_trial=2, **PLAIN)
    assert trials.num_bins == 4

    @jax.jit
    def run(key):
        def step(state, t):
            right = state.env[0].last[:, 0]  # the card to repeat
            action = (state.act_matrix == right[:, None]).argmax(-1)[:, None]
            new, _, transition = trials.step(state, action, t)
            return new, (state.act_matrix, transition.reward)

        return jax.lax.scan(step, trials.reset(key, stagger=False)[0], jnp.arange(2 * 102))[1]

    permutation, reward = jax.device_get(run(KEY))
    by_trial = permutation.reshape(2, 102, -1, 4)
    assert (by_trial == by_trial[:, :1]).all()
    assert (np.sort(by_trial[:, 0]) == np.arange(4)).all()
    labels, counts = np.unique(by_trial[:, 0].reshape(-1, 4), axis=0, return_counts=True)
    assert len(labels) == 24 and chisquare(counts).pvalue > 1e-3  # 80 of each
    same = (by_trial[0, 0] == by_trial[1, 0]).all(-1).mean()
    assert same < 4 / 24  # 1/24 expected, four standard deviations are 0.026
    assert (reward >= 0).all()
    np.testing.assert_allclose(reward.sum(0), 4, rtol=1e-4)  # four perfect episodes


@pytest.mark.parametrize("projection", ["identity", "none"])
def test_discrete_actions_keep_their_meaning_without_projection(projection):
    trials = envs.Trials(["popgym:RepeatPreviousEasy"], 8, projection=projection, **PLAIN)
    assert jax.eval_shape(trials.reset, KEY)[0].act_matrix is None


def test_starts_are_fresh_however_short_rollouts_are():
    """No two starts of an environment coincide, although t begins at 0 in every rollout."""
    trials = point_mass()
    assert trials.refresh_every == 3
    state, starts = None, []
    for _ in range(6):
        out = rollout(trials, 4, state=state, stagger=True)
        state, begun = out.last, out.after.context[..., 3] == 1
        after = np.concatenate([out.state.env[0].qpos[1:], np.array(state.env[0].qpos)[None]])
        starts.append(after[begun])
    starts = np.concatenate(starts)
    assert len(starts) > 60 and len(np.unique(starts, axis=0)) == len(starts)


def test_first_episodes_end_at_times_spread_evenly():
    """Later episodes end a whole episode later. Only the counters know of the time already spent."""
    trials = envs.Trials([Clock()], 400, projection="none", **PLAIN,
                         env_kwargs={"max_steps_in_episode": 40})
    out = rollout(trials, 80, stagger=True)
    end, whole, n = out.transition.episode_end, out.transition.whole_episode, np.arange(400)
    np.testing.assert_array_equal(end.sum(0), 2)
    first, second = end.argmax(0), 79 - end[::-1].argmax(0)
    np.testing.assert_array_equal(second - first, 40)
    counts = np.bincount(first, minlength=40)
    assert len(counts) == 40 and 5 * counts.max() < 400 and abs(first.mean() - 19.5) < 2
    np.testing.assert_array_equal(whole[first, n], first == 39)
    assert whole[second, n].all()
    assert not out.state.env[0].time[0].any()
    clocks = envs.Trials([Clock()], 3000, episodes_per_trial=3, projection="none", **PLAIN,
                         env_kwargs={"max_steps_in_episode": 10})
    counters = jax.jit(clocks.reset)(KEY)[0].counters  # the trial's clock is random, not only the episode's
    counts = np.bincount(10 * np.array(counters.episode) + counters.episode_step, minlength=30)
    assert len(counts) == 30 and counts.min() > 50 and counts.max() < 150


# ---- Divergence ----------------------------------------------------------------------------------
@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e4])
def test_divergence_never_reaches_the_learner(poison):
    """An environment with an unsound state is truncated, reset and counted; the others do not notice."""
    reset, step = compiled(point_mass())
    state, _ = reset(KEY, False)
    counters = state.counters._replace(episode=state.counters.episode.at[2].set(2))  # of three
    state, action, only = state.replace(counters=counters), jnp.full((16, 2), 6), np.arange(16) == 2
    _, clean_observation, clean = step(state, action, 1)
    broken = state.env[0].replace(qvel=state.env[0].qvel.at[2, 0].set(poison))
    after, observation, transition = step(state.replace(env=(broken,)), action, 1)
    for field in (transition.diverged, transition.truncated, transition.episode_end, transition.trial_end):
        np.testing.assert_array_equal(field, only)
    assert not transition.terminated.any()
    assert transition.reward[2] == 0 and transition.episode_return[2] == 0
    for leaf in jax.tree.leaves((after, observation, transition)):
        assert np.isfinite(np.array(leaf, np.float64)).all()
    others = [jax.tree.map(lambda x: x[~only], outcome) for outcome in (
        (observation, transition), (clean_observation, clean))]
    bitwise(*others)
    np.testing.assert_array_equal(observation.context[2], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(after.env[0].qpos[2], after.spare.env[0].qpos[2])


def test_a_diverged_step_leaves_no_trace_inside_a_trial():
    """Whatever the environment: reward and action are 0, and system identification leaves the step out."""
    trials = envs.Trials([Clock(poison_at=3)], 16, projection="orthogonal", episodes_per_trial=4, sysid=True)
    out = rollout(trials, 10)
    diverged, context = out.transition.diverged, out.after.context
    begun = out.state.env[0].start[0, :, 0] > 0.5  # it diverges in its first episode
    assert 0 < begun.sum() < 16
    np.testing.assert_array_equal(diverged[2], begun)
    assert not diverged[:2].any() and diverged[3:].any()
    assert not out.transition.reward[diverged].any()
    np.testing.assert_array_equal(out.transition.truncated, out.transition.episode_end)
    np.testing.assert_array_equal(context[diverged][:, :4], [[0, 0, 0, 1]] * diverged.sum())
    assert (context[diverged][:, 4] == out.transition.trial_end[diverged]).all()
    assert not out.transition.trial_end[2].any()
    steps = out.state.sysid.steps[3, :, 0]
    np.testing.assert_allclose(steps[begun], 1 + sysid.FORGETTING, rtol=1e-6)
    np.testing.assert_allclose(steps[~begun], 1 + sysid.FORGETTING + sysid.FORGETTING**2, rtol=1e-6)
    for leaf in jax.tree.leaves((out.state.sysid, out.after)):
        assert np.isfinite(np.array(leaf, np.float64)).all()


# ---- Programs ------------------------------------------------------------------------------------
def test_training_tasks_under_seeds_and_scan():
    """The six tasks, vmapped over seeds inside jit and scan; drawing starts and solving remain branches.

    It takes more than ten seconds because the physics of six models is compiled.
    """
    trials = envs.Trials(envs.TRAIN_TASKS, 12, sysid=True, env_kwargs={"max_steps_in_episode": 12})

    def run(key):
        def step(state, t):
            action = (t + jnp.arange(24).reshape(12, 2)) % 9
            state, observation, transition = trials.step(state, action, t)
            return state, (observation, transition)

        return jax.lax.scan(step, trials.reset(key)[0], jnp.arange(24))

    seeds = jax.random.split(KEY, 2)
    traced = jax.jit(jax.vmap(run)).trace(seeds)
    branches = str(traced.jaxpr).count("cond[")
    assert branches >= 2, "a branch became a select: its cost would be paid in every step"
    state, (observation, transition) = traced.lower().compile()(seeds)
    assert observation.projected.shape == (2, 24, 12, 12)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(observation))
    assert len(state.env) == 6 and state.env[2].qpos.shape == (2, 2, 3)
    np.testing.assert_array_equal(transition.episode_end.sum(1), 2)
    first, second = np.array(observation.projected)
    assert (first != second).any((0, 2)).all()
    assert (np.array(transition.reward) >= 0).all() and (np.array(transition.reward) <= 1).all()


@pytest.mark.parametrize("n, blocks", [(8, 1), (12, 2), (24, 3), (13, 1)])
def test_blocks_change_nothing(monkeypatch, n, blocks):
    """On a CPU environments are stepped in equal blocks; 13 of them cannot be cut into such."""
    trials = envs.Trials([Clock()], n, projection="none", **PLAIN)
    state, action = jax.jit(trials.reset)(KEY)[0], jax.random.randint(KEY, (n, 1), 0, 9)
    whole = jax.jit(trials.step)(state, action)[1:]
    monkeypatch.setattr(envs, "CPU_BLOCK", 8)
    x = jnp.arange(n)

    def scans():
        return str(jax.make_jaxpr(lambda x: envs.vmap_in_blocks(jnp.sin, x))(1.0 * x)).count("scan[")

    assert scans() == (blocks > 1)
    found = jax.jit(lambda x: envs.vmap_in_blocks(lambda y: {"y": y, "size": jnp.ones(3) * y}, x))(x)
    assert (found["y"] == x).all() and found["size"].shape == (n, 3)
    again = jax.jit(lambda *args: trials.step(*args))(state, action)[1:]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), again, whole)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert scans() == 0


# ---- Devices that share environments -------------------------------------------------------------
def test_devices_step_the_environments_of_one():
    """Two share them (here over a mapped axis): the same starts, steps and summary, no two alike."""
    N, steps = 8, 5

    def run(shards):
        trials = envs.Trials([Clock(), Sized(5, 2)], N // shards, axis="data", **PLAIN,
                             env_kwargs={"max_steps_in_episode": 4})

        def one(key):
            first = trials.reset(key)[0]

            def step(state, t):
                draw = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 9))
                state, observation, transition = trials.step(state, draw(trials.split(key)), t)
                return state, (observation.projected, transition)
            _, (projected, transition) = jax.lax.scan(step, first, jnp.arange(steps))
            arrays = jax.tree.map(lambda x: x.swapaxes(0, 1), (projected, transition))
            return (first.obs_matrix, first.act_matrix, first.counters, arrays), trials.summary(transition)

        mapped = jax.vmap(one, in_axes=None, axis_name="data", axis_size=shards)
        by_device, summary = jax.jit(mapped)(KEY)

        def in_order(x):  # (shards, N / shards, ...), by device, to (N, ...), by task
            return np.array(x.reshape(shards, 2, -1, *x.shape[2:]).swapaxes(0, 1).reshape(N, *x.shape[2:]))

        return jax.tree.map(in_order, by_device), summary

    one, summary = run(1)
    assert len(np.unique(one[0].reshape(N, -1), axis=0)) == N
    found, shared = run(2)
    bitwise(found[:3], one[:3])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found[3], one[3])
    for x in jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y[0]).max(), shared, summary)):
        assert np.isnan(x) or x < 1e-5


def test_the_summary_counts_whole_episodes_by_task():
    trials = envs.Trials([Clock(), Clock(), Clock()], 6, projection="none", action_repeat=2, **PLAIN)
    rng, shape = np.random.default_rng(0), (9, 6)
    end, whole, diverged = rng.random((3, *shape)) < 0.4
    end[:, 4:] = False
    reward, total = rng.normal(size=(2, *shape))
    no = np.zeros(shape, bool)
    steps = rng.integers(1, 500, shape)
    transition = envs.Transition(reward, no, end, no, diverged, total, whole, steps)
    found = trials.summary(jax.tree.map(jnp.asarray, transition))
    for i in range(3):
        task = np.s_[:, 2 * i:2 * i + 2]
        over = end[task] & whole[task] & ~diverged[task]
        for name, x in (("return", total), ("length", steps)):
            mean = x[task][over].mean() if i < 2 else np.nan
            np.testing.assert_allclose(found[name][i], mean, rtol=1e-5)
        np.testing.assert_allclose(found["reward"][i], reward[task].mean() / 2, rtol=1e-5)
    assert found["diverged"] == diverged.sum()
