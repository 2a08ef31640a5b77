"""Tests of envs.py: names, adapters, projections, trials, lanes."""
import functools
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "disable")  # before dm_control is imported: nothing is rendered
sys.path.insert(0, str(Path(__file__).parent.parent))

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

import envs
import popgym

ROOT = Path(__file__).parent.parent
KEY = jax.random.PRNGKey(0)
# most programs here run once: compile time is what counts
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# ---- Names and adapters ------------------------------------------------------------------------------------
def test_make_names():
    assert envs.TRAIN_TASKS == ("ball_in_cup-catch", "cartpole-swingup", "finger-spin", "finger-turn_hard",
                                "point_mass-easy", "reacher-easy")
    assert envs.HELD_OUT_TASKS == ("cartpole-balance", "finger-turn_easy", "pendulum-swingup",
                                   "point_mass-hard", "reacher-hard")
    assert envs.make("dmc:reacher-easy")[0].name == envs.make("reacher-easy")[0].name == "dmc:reacher-easy"
    for wrong, nearest in (("finger_spin", "finger-spin"), ("dmc:reacher", "dmc:reacher-"),
                           ("Cartpole-v1", "CartPole-v1"), ("walker-wlk", "walker-walk"),
                           ("popgym:StatelessCartPole", "popgym:StatelessCartPoleHard")):
        with pytest.raises(ValueError, match=nearest):
            envs.make(wrong)
    with pytest.raises(TypeError, match="no_such"):
        envs.make("CartPole-v1", no_such=3)
    with pytest.raises(TypeError, match="no_such"):
        envs.make("finger-spin", no_such=3)
    assert envs.make("finger-spin", max_steps_in_episode=7)[1].max_steps_in_episode == 7
    assert envs.make("popgym:StatelessCartPoleHard", noise=0.2)[1].noise == 0.2
    env, params = envs.make("MemoryChain-bsuite", memory_length=9, num_bits=2)  # a parameter and an argument
    assert params.memory_length == 9 and env.num_bits == 2


@pytest.mark.parametrize("name", [n for n in gymnax.registered_envs if not n.startswith("MNIST")]
                         + [f"popgym:{task}" for task in popgym.TASKS if task.endswith("Hard")])
def test_every_name_has_lanes(name):
    """Shapes and dtypes by abstract evaluation: the state can be scanned. (MNIST would need a data set.)"""
    lanes = envs.Lanes([name], 4, projection="none")
    state, inputs = jax.eval_shape(lanes.reset, KEY)
    assert inputs.shape == (4, lanes.input_size) and inputs.dtype == jnp.float32
    action = jnp.zeros(4, jnp.int32) if lanes.discrete else jnp.zeros((4, lanes.action_size))
    again, inputs, out = jax.eval_shape(lanes.step, state, action)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), again)
    assert inputs.shape == out.final_input.shape == (4, lanes.input_size)


def test_runs_without_dm_control():
    """envs.py steps a task when dm_control cannot be imported."""
    code = ("import sys; sys.modules['dm_control'] = None\n"
            "import envs, jax\n"
            "quick = lambda f: jax.jit(f, compiler_options={'xla_backend_optimization_level': 0})\n"
            "lanes = envs.Lanes(['pendulum-swingup', 'point_mass-hard'], 4)\n"
            "state, inputs = quick(lanes.reset)(jax.random.key(0))\n"  # a typed key, for once
            "state, inputs, out = quick(lanes.step)(state, jax.numpy.zeros((4, 2)), 0)\n"
            "assert out.reward.shape == (4,) and not any(m.startswith('dm_control.') for m in sys.modules)\n"
            "assert 'brax' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


RUNS = {}  # compiled rollouts


def rollout(lanes, steps, state=None):
    """Runs lanes from reset (or state) with uniformly random actions.

    Returns the last state and a dict of numpy arrays (steps, N, ...): the LaneStep's fields, action, and
    input, what the agent saw when it acted; plus env, the first task's state before the step, and its qpos (if there).
    """
    if state is None:
        state = quick(lanes.reset)(KEY)[0]

    def step(state, t):
        key = jax.random.fold_in(KEY, t)
        if lanes.discrete:
            action = jax.random.randint(key, (lanes.num_lanes,), 0, lanes.action_size)
        else:
            action = jax.random.uniform(key, (lanes.num_lanes, lanes.action_size), minval=-1.5, maxval=1.5)
        new, inputs, out = lanes.step(state, action, t)
        record = out._asdict() | {"input": state.input, "action": action, "obs_matrix": state.obs_matrix,
                                  "act_matrix": state.act_matrix, "qpos": getattr(state.env[0], "qpos", None),
                                  "env": state.env[0]}
        return new, record

    run = RUNS.setdefault((lanes, steps), quick(lambda s, t: jax.lax.scan(step, s, t)))
    state, out = run(state, jnp.arange(steps))
    return state, jax.tree.map(np.array, out)


def test_observe_action():
    """Without it the agent sees all but its last action, and steps through the same states."""
    both = [envs.Lanes(["point_mass-easy", "cartpole-swingup"], 4, observe_action=shown, observe_change=True)
            for shown in (True, False)]
    (state, seen), (other, rest) = (quick(lanes.reset)(KEY) for lanes in both)
    columns = [k for k in range(both[0].input_size) if k not in (12, 13)]
    assert both[1].output_of_input == tuple(both[0].output_of_input[k] for k in columns)
    action = jax.random.normal(jax.random.PRNGKey(2), (4, 2))
    for _ in range(2):
        np.testing.assert_array_equal(rest, seen[:, columns])
        (state, seen, out), (other, rest, out_other) = (
            quick(lanes.step)(s, action) for lanes, s in zip(both, (state, other)))
        np.testing.assert_array_equal(seen[:, 12:14], action)
        np.testing.assert_array_equal(out.final_input[:, columns], out_other.final_input)


def test_memory_chain_lanes():
    """memory_length is honoured, and a policy that remembers earns 1 in every episode."""
    lanes = envs.Lanes(["MemoryChain-bsuite"], 16, projection="none", obs_transform="none", stagger=False,
                       env_kwargs={"memory_length": 3})
    assert lanes.discrete and lanes.action_size == 2 and lanes.input_size == 3 + 2 + 3
    state, inputs = quick(lanes.reset)(KEY)
    step, starts = quick(lanes.step), []
    for t in range(12):
        if t % 4 == 0:
            first = inputs
            starts.append(np.array(inputs[:, 2]))
        action = (first[:, 2] > 0).astype(jnp.int32)
        state, inputs, out = step(state, action, t)
        assert bool(out.terminated.all()) == bool(out.episode_end.any()) == (t % 4 == 3)
        assert not out.truncated.any()
        np.testing.assert_array_equal(inputs[:, 3:5], 0 if t % 4 == 3 else jax.nn.one_hot(action, 2))
        if t % 4 == 3:
            np.testing.assert_array_equal(out.episode_return, 1.0)
    assert np.unique(starts).tolist() == [-1, 1]
    assert (starts[0] != starts[1]).any() and (starts[1] != starts[2]).any()


def test_cartpole_v1_resets_are_fresh():
    """Short episodes end by termination, and no two of them start from the same state."""
    lanes = envs.Lanes(["CartPole-v1"], 8, projection="none", stagger=False)
    _, out = rollout(lanes, 150)
    assert out["terminated"].sum() > 30 and not out["truncated"].any()
    starts = out["input"][out["input"][..., -1] == 1]
    assert len(np.unique(starts, axis=0)) == len(starts)
    assert (out["episode_return"][out["terminated"]] >= 8).all()
    np.testing.assert_array_equal(out["input"][1:, :, -1], out["episode_end"][:-1])


def test_pendulum_v1_truncates():
    lanes = envs.Lanes(["Pendulum-v1"], 4, projection="none", obs_transform="none", stagger=False,
                       env_kwargs={"max_steps_in_episode": 20})
    assert lanes.max_episode_steps == lanes.trial_length == 20
    _, out = rollout(lanes, 60)
    assert not out["terminated"].any()
    assert list(np.flatnonzero(out["truncated"].all(1))) == [19, 39, 59] and out["truncated"].sum() == 12
    obs = out["input"][..., :3]
    np.testing.assert_allclose(obs[..., 0] ** 2 + obs[..., 1] ** 2, 1, atol=1e-5)
    angle = np.arctan2(obs[..., 1], obs[..., 0])  # the pendulum's own equation links last and final input
    final = out["final_input"][..., :3]
    turned = np.arctan2(final[..., 1], final[..., 0]) - angle
    np.testing.assert_allclose((turned + np.pi) % (2 * np.pi) - np.pi, 0.05 * final[..., 2], atol=1e-4)
    scaled = envs.Lanes(["Pendulum-v1"], 4, projection="identity", action_size=1)  # torque in [-2, 2]
    control = scaled._control(jnp.ones((4, 1, 1)), jnp.array([[-3.0], [-0.5], [0.5], [9.0]]))
    np.testing.assert_allclose(control[:, 0], [-2, -1, 1, 2])


def test_brax_adapter():
    pytest.importorskip("brax")
    with pytest.raises(ValueError, match="brax:ant"):
        envs.make("brax:amt")
    lanes = envs.Lanes(["brax:inverted_pendulum"], 3, projection="none", stagger=False, backend="spring",
                       env_kwargs={"max_steps_in_episode": 8})
    assert lanes.input_size == 4 + 1 + 3 and not lanes.discrete
    state, out = rollout(lanes, 17)
    assert np.isfinite(out["input"]).all() and out["episode_end"].any()
    assert not (out["terminated"] & out["truncated"]).any()
    assert (out["reward"] == 1).any()
    env, params = envs.make("brax:ant", backend="positional")
    assert env.observation_space(params).shape == (27,) and env.action_space(params).shape == (8,)
    assert params.max_steps_in_episode == 1000


# ---- Lanes -------------------------------------------------------------------------------------------------
def symlog(x):
    return np.sign(x) * np.log1p(np.abs(x))


@pytest.mark.parametrize("projection", ["gaussian", "orthogonal", "rademacher", "identity"])
def test_projection_matrices(projection):
    """Scale, structure, and the independence of the two matrices, of lanes and of draws."""
    lanes = envs.Lanes(["point_mass-easy", "reacher-easy"], 4000, projection=projection)
    start = quick(lanes._draw)(KEY)
    obs, act = np.array(start.obs_matrix), np.array(start.act_matrix)
    assert obs.shape == (4000, 12, 6) and act.shape == (4000, 2, 2)
    assert not obs[:2000, :, 4:].any()  # point_mass observes 4 numbers
    for block, dim in ((obs[:2000, :, :4], 4), (obs[2000:], 6), (act, 2)):
        if projection == "identity":
            np.testing.assert_array_equal(block, np.broadcast_to(np.eye(*block.shape[1:]), block.shape))
            continue
        np.testing.assert_allclose(block.mean(0), 0, atol=4.5 / np.sqrt(dim * len(block)))
        np.testing.assert_allclose(block.var(0), 1 / dim, rtol=0.2)
        if projection == "rademacher":
            np.testing.assert_allclose(np.abs(block), 1 / np.sqrt(dim), rtol=1e-6)
        if projection == "orthogonal":
            gram = np.einsum("nij,nik->njk", block, block) * dim / block.shape[1]
            np.testing.assert_allclose(gram, np.broadcast_to(np.eye(dim), gram.shape), atol=1e-5)
    if projection != "identity":
        flat = np.concatenate([obs[2000:].reshape(2000, -1), act[2000:].reshape(2000, -1)], 1)
        across = np.corrcoef(flat.T)[:72, 72:]
        assert np.abs(across).max() < 0.1, "the two matrices are correlated"
        again = np.array(quick(lanes._draw)(jax.random.PRNGKey(1)).obs_matrix)
        assert abs(np.corrcoef(obs[2000:].ravel(), again[2000:].ravel())[0, 1]) < 0.02
        assert abs(np.corrcoef(obs[2000:3000].ravel(), obs[3000:].ravel())[0, 1]) < 0.02


def test_lane_is_the_projected_environment():
    """A lane's input and motion are those of the bare environment behind its two matrices; a critic is told that."""
    lanes = envs.Lanes(["point_mass-hard", "pendulum-swingup"], 6, observe_change=True, privileged=True)
    assert lanes.input_size == 12 + 2 + 3 + 12 and lanes.privileged_size == 2 * (1 + 4)
    assert lanes.action_size == 2 and not lanes.discrete
    np.testing.assert_array_equal(lanes.lane_task, [0, 0, 0, 1, 1, 1])
    state, inputs = quick(lanes.reset)(KEY)
    assert inputs.dtype == jnp.float32
    action = 1.5 * jax.random.normal(jax.random.PRNGKey(2), (6, 2))
    _, after, out = quick(lanes.step)(state, action)
    for i, (env, params) in enumerate(zip(lanes.envs, lanes.params)):
        rows, obs_dim, act_dim = slice(3 * i, 3 * i + 3), lanes.obs_dims[i], lanes.act_dims[i]
        obs_matrix = np.array(state.obs_matrix)[rows, :, :obs_dim]
        act_matrix = np.array(state.act_matrix)[rows, :act_dim]
        assert not np.array(state.act_matrix)[rows, act_dim:].any()
        raw = jax.vmap(env.get_obs)(state.env[i])
        shown = symlog(np.einsum("nij,nj->ni", obs_matrix, raw))
        np.testing.assert_allclose(inputs[rows, :12], shown, atol=1e-5)
        np.testing.assert_array_equal(inputs[rows, 12:17], [[0, 0, 0, 1, 1]] * 3)
        control = np.clip(np.einsum("nij,nj->ni", act_matrix, action[rows]), -1, 1)
        env_step = quick(jax.vmap(env.step_env, (None, 0, 0, None)))
        obs, _, reward, _, _ = env_step(KEY, state.env[i], control, params)
        after_shown = symlog(np.einsum("nij,nj->ni", obs_matrix, obs))
        np.testing.assert_allclose(after[rows, :12], after_shown, atol=1e-5)
        np.testing.assert_allclose(after[rows, 17:29], after_shown - shown, atol=1e-5)
        for told, truth in ((inputs, raw), (after, obs), (out.final_input, obs)):
            expected = np.zeros((3, 2, 5))
            expected[:, i, 0], expected[:, i, 1:1 + obs_dim] = 1, symlog(truth)
            np.testing.assert_allclose(told[rows, 29:], expected.reshape(3, 10), atol=1e-5)
        np.testing.assert_allclose(after[rows, 12:14], action[rows], rtol=1e-6)
        np.testing.assert_allclose(after[rows, 14], reward, rtol=1e-5)
        np.testing.assert_array_equal(after[rows, 15:17], 0)
        np.testing.assert_allclose(out.reward[rows], reward, rtol=1e-5)


@pytest.mark.parametrize("tasks,steps", [(("finger-spin", "reacher-easy"), 4), (("CartPole-v1",), 12)])
def test_action_repeat(tasks, steps):
    """A step is so many with the same action; an episode that ends in between waits for the next step."""
    projection = "none" if len(tasks) == 1 else "gaussian"
    once, thrice = (envs.Lanes(tasks, 4, projection=projection, stagger=False, action_repeat=k) for k in (1, 3))
    state = fine = once.reset(jax.random.PRNGKey(0))[0]
    single, triple = jax.jit(once.step), jax.jit(thrice.step)
    over, early = np.zeros(4, bool), 0
    for t in range(1, steps):
        key = jax.random.PRNGKey(t)
        action = jax.random.normal(key, (4, 2)) if not once.discrete else jnp.full(4, t // 6 % 2)
        state, inputs, out = triple(state, action, t)
        reward, ended = np.zeros(4), over.copy()
        for k in range(3):
            fine, fine_inputs, fine_out = single(fine, action, t)
            reward += np.where(ended, 0, fine_out.reward)
            early += (fine_out.terminated & ~ended).sum() if k < 2 else 0
            ended |= np.asarray(fine_out.episode_end)
        live = ~over
        np.testing.assert_allclose(out.reward[live], reward[live], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(out.episode_end[live], ended[live])
        over = ended
        size = once.obs_size
        np.testing.assert_allclose(inputs[~over, :size], fine_inputs[~over, :size], rtol=1e-4, atol=1e-5)
    if once.discrete:
        assert over.all() and early > 0
    else:
        assert thrice.trial_length == 334 and not over.any()
    with pytest.raises(ValueError, match="action_repeat"):
        envs.Lanes(tasks, 4, projection=projection, action_repeat=0)


def test_trials_of_several_episodes():
    """Flags, clocks, returns, what carries over and what is drawn anew: trials of 3 episodes of 6 steps."""
    lanes = envs.Lanes(["reacher-easy"], 5, episodes_per_trial=3, stagger=False, observe_change=True,
                       env_kwargs={"max_steps_in_episode": 6})
    assert lanes.trial_length == 18 and lanes.max_episode_steps == 6 and lanes.refresh_every == 3
    _, out = rollout(lanes, 54)
    t = np.arange(54)

    def every(x):
        return np.repeat(x[:, None], 5, 1)

    np.testing.assert_array_equal(out["episode_end"], every(t % 6 == 5))
    np.testing.assert_array_equal(out["truncated"], every(t % 6 == 5))
    np.testing.assert_array_equal(out["trial_end"], every(t % 18 == 17))
    np.testing.assert_array_equal(out["trial_step"], every(t % 18))
    assert not out["terminated"].any() and not out["diverged"].any() and out["episode_complete"].all()
    inputs, action = out["input"], out["action"]
    np.testing.assert_array_equal(inputs[..., 15], every(t % 6 == 0))
    np.testing.assert_array_equal(inputs[..., 16], every(t % 18 == 0))
    carries = (t[1:] % 18 != 0)[:, None]
    np.testing.assert_allclose(inputs[1:, :, 12:14], np.where(carries[..., None], action[:-1], 0), rtol=1e-6)
    np.testing.assert_allclose(inputs[1:, :, 14], np.where(carries, out["reward"][:-1], 0), rtol=1e-6)
    for start in range(0, 54, 6):
        total = np.cumsum(out["reward"][start:start + 6], 0)
        np.testing.assert_allclose(out["episode_return"][start:start + 6], total, rtol=1e-5)
    # projections stay for a trial and then change in every lane; every episode starts elsewhere
    for name in ("obs_matrix", "act_matrix"):
        change = np.abs(np.diff(out[name], axis=0)).reshape(53, 5, -1)
        np.testing.assert_array_equal(change.max(-1) > 0, every(t % 18 == 0)[1:])
    starts = out["qpos"][::6].reshape(45, 2)
    assert len(np.unique(starts, axis=0)) == 45
    # final_input: the next input, but before any reset
    within = (t[:-1] % 6 != 5)
    np.testing.assert_allclose(out["final_input"][:-1][within], inputs[1:][within], rtol=1e-5, atol=1e-6)
    ends = out["final_input"][t % 6 == 5]
    np.testing.assert_array_equal(ends[..., 15:17], 0)
    np.testing.assert_allclose(ends[..., 12:14], action[t % 6 == 5], rtol=1e-6)
    np.testing.assert_allclose(ends[..., 14], out["reward"][t % 6 == 5])
    np.testing.assert_allclose(ends[..., 17:], ends[..., :12] - inputs[t % 6 == 5][..., :12], atol=1e-6)
    before, key = jax.tree.map(lambda x: x[t % 6 == 5], out["env"]), jax.random.PRNGKey(0)
    control = np.clip(np.einsum("tnij,tnj->tni", out["act_matrix"], action), -1, 1)[t % 6 == 5]
    step = jax.vmap(jax.vmap(lambda state, control: lanes.envs[0].step_env(key, state, control, lanes.params[0])[0]))
    projected = np.einsum("tnij,tnj->tni", out["obs_matrix"][t % 6 == 5], jax.jit(step)(before, control))
    np.testing.assert_allclose(ends[..., :12], np.sign(projected) * np.log1p(np.abs(projected)), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(inputs[::6][..., 17:], 0)
    change = np.diff(inputs[..., :12], axis=0)
    np.testing.assert_allclose(inputs[1:, :, 17:][within], change[within], atol=1e-6)


def test_discrete_actions_are_relabelled_in_every_trial():
    """A permutation, the same throughout a trial, uniform over trials, and what the environment is told."""
    lanes = envs.Lanes(["popgym:RepeatPreviousEasy"], 24 * 40, "gaussian", obs_size=5, episodes_per_trial=2,
                       stagger=False)
    assert lanes.action_size == 4

    @jax.jit
    def run(key):
        def step(state, t):
            right = state.env[0].last[:, 0]  # the card to repeat
            action = (state.act_matrix == right[:, None]).argmax(-1)
            new, _, out = lanes.step(state, action, t)
            return new, (state.act_matrix, out.reward)

        return jax.lax.scan(step, lanes.reset(key)[0], jnp.arange(2 * 102))[1]

    permutation, reward = jax.device_get(run(KEY))
    trials = permutation.reshape(2, 102, -1, 4)
    assert (trials == trials[:, :1]).all()
    assert np.array_equal(np.sort(trials[:, 0]), np.broadcast_to(np.arange(4), trials[:, 0].shape))
    labels, counts = np.unique(trials[:, 0].reshape(-1, 4), axis=0, return_counts=True)
    assert len(labels) == 24 and chisquare(counts).pvalue > 1e-3  # 80 of each
    same = (trials[0, 0] == trials[1, 0]).all(-1).mean()
    assert same < 4 / 24  # 1/24 expected, four standard deviations are 0.026
    assert (reward >= 0).all()
    np.testing.assert_allclose(reward.sum(0), 4, rtol=1e-4)  # four perfect episodes


@pytest.mark.parametrize("projection", ["identity", "none"])
def test_discrete_actions_keep_their_meaning_without_projection(projection):
    lanes = envs.Lanes(["popgym:RepeatPreviousEasy"], 8, projection)
    assert jax.eval_shape(lanes.reset, KEY)[0].act_matrix is None


def test_spares_are_fresh_in_short_rollouts():
    """However rollouts are cut, no two starts of a lane coincide: t begins at 0 in every rollout."""
    lanes = envs.Lanes(["point_mass-easy"], 16, env_kwargs={"max_steps_in_episode": 10})
    state, starts = None, []
    for k in range(6):
        state, out = rollout(lanes, 7, state=state)
        starts.append(out["qpos"][out["input"][..., 15] == 1])
    starts = np.concatenate(starts)
    assert len(starts) > 60 and len(np.unique(starts, axis=0)) == len(starts)


def test_stagger():
    """First episodes end at times spread evenly, later ones a whole episode later; their starts are fresh."""
    lanes = envs.Lanes(["pendulum-swingup"], 400, env_kwargs={"max_steps_in_episode": 40})
    _, out = rollout(lanes, 80)
    np.testing.assert_array_equal(out["episode_end"].sum(0), 2)
    first, second = (out["episode_end"].argmax(0), 79 - out["episode_end"][::-1].argmax(0))
    np.testing.assert_array_equal(second - first, 40)
    counts = np.bincount(first, minlength=40)
    assert len(counts) == 40 and 5 * counts.max() < 400 and abs(first.mean() - 19.5) < 2
    lane = np.arange(400)
    np.testing.assert_array_equal(out["episode_complete"][first, lane], first == 39)
    assert out["episode_complete"][second, lane].all()
    np.testing.assert_array_equal(out["trial_step"][first, lane], first)  # counts what the agent has lived
    np.testing.assert_array_equal(out["trial_step"][second, lane], 39)
    assert out["qpos"][0].std() > 1.5  # not settled, as after time really spent
    trial = envs.Lanes(["pendulum-swingup"], 3000, episodes_per_trial=3,
                       env_kwargs={"max_steps_in_episode": 10})
    state = quick(trial.reset)(KEY)[0]  # here the trial's clock is random, not only the episode's
    counts = np.bincount(10 * np.array(state.episode) + np.array(state.episode_step), minlength=30)
    assert len(counts) == 30 and counts.min() > 50 and counts.max() < 150


@functools.cache
def divergence_lanes():
    lanes = envs.Lanes(["reacher-easy", "cartpole-swingup"], 8, stagger=False, observe_change=True)
    return quick(lanes.reset)(KEY), quick(lanes.step)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e4])
def test_divergence_never_reaches_the_learner(poison):
    """A lane with an unsound state is truncated, reset and counted; other lanes do not notice."""
    (state, inputs), step = divergence_lanes()
    action = jnp.ones((8, 2))
    _, clean_inputs, clean = step(state, action, 1)
    broken = state.env[0].replace(qvel=state.env[0].qvel.at[2, 0].set(poison))
    bad = state.replace(env=(broken, state.env[1]))
    after, bad_inputs, out = step(bad, action, 1)
    only = np.arange(8) == 2
    for field in (out.diverged, out.truncated, out.episode_end, out.trial_end):
        np.testing.assert_array_equal(field, only)
    assert not out.terminated.any() and out.reward[2] == 0 and out.episode_return[2] == 0
    np.testing.assert_array_equal(out.final_input[2], inputs[2])
    for leaf in jax.tree.leaves((after, bad_inputs, out)):
        assert np.isfinite(np.array(leaf, np.float64)).all()
    np.testing.assert_array_equal(np.array(bad_inputs)[~only], np.array(clean_inputs)[~only])
    np.testing.assert_array_equal(np.array(out.final_input)[~only], np.array(clean.final_input)[~only])
    assert bad_inputs[2, 15] == 1 and bad_inputs[2, 16] == 1
    # an action that is not finite is the learner's own doing, and does not come back either
    after, inputs, out = step(after, action.at[5].set(jnp.nan), 2)
    np.testing.assert_array_equal(out.diverged, np.arange(8) == 5)
    assert np.isfinite(np.array(inputs)).all() and np.isfinite(np.array(out.final_input)).all()


def test_training_lanes_under_seeds_and_scan():
    """The six training tasks, vmapped over seeds inside jit and scan; drawing spares remains a branch."""
    lanes = envs.Lanes(envs.TRAIN_TASKS, 12, env_kwargs={"max_steps_in_episode": 12})
    assert lanes.input_size == 17 and len(lanes.tasks) == 6

    def run(key):
        def step(state, t):
            action = jnp.sin(t + jnp.arange(24.0).reshape(12, 2))
            state, inputs, out = lanes.step(state, action, t)
            return state, (inputs, out)

        return jax.lax.scan(step, lanes.reset(key)[0], jnp.arange(24))

    seeds = jax.random.split(KEY, 2)
    traced = quick(jax.vmap(run)).trace(seeds)
    assert "cond[" in str(traced.jaxpr), "drawing spares became a select: it would be paid in every step"
    state, (inputs, out) = traced.lower().compile()(seeds)
    assert inputs.shape == (2, 24, 12, 17) and np.isfinite(np.array(inputs)).all()
    assert len(state.env) == 6 and state.env[2].qpos.shape == (2, 2, 3)
    np.testing.assert_array_equal(out.episode_end.sum(1), 2)
    assert (np.array(inputs)[0] != np.array(inputs)[1]).any((0, 2)).all()
    assert (np.array(out.reward) >= 0).all() and (np.array(out.reward) <= 1).all()


@pytest.mark.parametrize("n, blocks", [(8, 1), (12, 2), (24, 3), (13, 1)])
def test_blocks_change_nothing(monkeypatch, n, blocks):
    """On a CPU lanes are stepped in equal blocks; 13 lanes cannot be cut into such."""
    def step(_):
        lanes = envs.Lanes(("pendulum-swingup",), n)
        state, _ = lanes.reset(KEY)
        return lanes.step(state, jax.random.normal(KEY, (n, lanes.action_size)))[1:]

    whole = quick(step)(0)
    monkeypatch.setattr(envs, "BLOCK", 8)
    x = jnp.arange(n)
    assert str(jax.make_jaxpr(lambda x: envs.in_blocks(jnp.sin, x))(1.0 * x)).count("scan[") == (blocks > 1)
    found = quick(lambda x: envs.in_blocks(lambda y: {"y": y, "size": jnp.ones(3) * y}, x))(x)
    assert (found["y"] == x).all() and found["size"].shape == (n, 3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), quick(step)(0), whole)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "scan[" not in str(jax.make_jaxpr(lambda x: envs.in_blocks(jnp.sin, x))(1.0 * x))


def test_lanes_errors():
    for kwargs, message in (
            (dict(num_lanes=7), "num_lanes=7"), (dict(num_lanes=0), "num_lanes=0"),
            (dict(projection="random"), "gaussian"), (dict(projection="none"), "equal sizes"),
            (dict(projection="identity", obs_size=5), "obs_size >= 6"),
            (dict(projection="orthogonal", action_size=1), "action_size >= 2"),
            (dict(tasks=["walker-walk"]), "obs_size >= 24 and action_size >= 6 for walker-walk, got obs_size=12"),
            (dict(projection="rademacher", action_size=1), "action_size >= 2"),
            (dict(obs_transform="log"), "symlog"), (dict(episodes_per_trial=0), "episodes_per_trial"),
            (dict(tasks=["CartPole-v1", "reacher-easy"]), "kind"),
            (dict(tasks=["CartPole-v1", "Acrobot-v1"]), "kind"),
            (dict(tasks=["reacher-esy"] * 2), "reacher-easy")):
        with pytest.raises(ValueError, match=message):
            envs.Lanes(**(dict(tasks=["reacher-easy", "point_mass-easy"], num_lanes=8) | kwargs))
    gaussian = envs.Lanes(["Pendulum-v1"], 2, "gaussian", obs_size=2)  # fewer than its 3: partly seen
    state, inputs = jax.eval_shape(gaussian.reset, KEY)
    assert jax.eval_shape(gaussian.step, state, jnp.zeros((2, 2)))[1].shape == inputs.shape == (2, 2 + 2 + 3)
