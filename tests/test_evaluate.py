"""evaluate.py: rollouts against hand-rolled loops, choices, files, refusals."""

import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from small_runs import TASKS, make_run

import envs
import evaluate
import report
import train_s5

ROOT = Path(__file__).resolve().parent.parent
TRIALS, STEPS = 3, 60  # of a run as from make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "s5", seeds=(0, 1), memory="s5", sysid=True)


@pytest.fixture(scope="module")
def agent(run):
    return evaluate.load(run)


@pytest.fixture(scope="module")
def result(agent):
    return evaluate.measure(agent, TASKS, TRIALS, deterministic=True)


@pytest.fixture(scope="module")
def starts(agent):
    """{family: (state, observation)} of the trials of `result`'s second seed, and their TestTrials."""
    trials = evaluate.TestTrials(agent, TASKS, TRIALS)
    start, key = jax.jit(trials.start), evaluate.trial_keys(1)[0]
    found = {family: start(key, i) for i, family in enumerate(evaluate.FAMILIES)}
    return found | {"trials": trials}


@pytest.fixture(scope="module")
def gym_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "gym", env=("CartPole-v1",), episodes_per_trial=3,
                    env_kwargs=())


# -- rollouts --------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["memory", "reset", "blind"])
def test_policies_equal_a_hand_rolled_loop(starts, agent, result, policy):
    """Training's own step, and the network as it is applied to sequences; blind as it is trained blind."""
    trials, (state, observation) = starts["trials"], starts["gaussian"]
    config = train_s5.Config(**vars(agent.config) | {"blind": policy == "blind"})
    network = train_s5.make_train(config).network
    params, norm = jax.tree.map(lambda x: x[1], (agent.params, agent.norm))  # of the second seed

    @jax.jit
    def step(state, observation, hidden, reset, t):
        one = jax.tree.map(lambda x: x[None], observation)
        hidden, pi, _ = network.apply(params, norm, hidden, one, reset[None], critic=False)
        state, observation, transition = trials.step(state, pi.mode()[0], t)
        return state, observation, hidden, transition.reward

    hidden, rewards = network.zero_state((2 * TRIALS,)), []
    for t in range(STEPS):
        reset = jnp.full(2 * TRIALS, policy == "reset" or t == 0)
        state, observation, hidden, reward = step(state, observation, hidden, reset, t)
        rewards.append(reward)
    for task in range(2):
        assert_curve(result, policy, task, 1, np.split(np.array(rewards), 2, axis=1)[task])


def assert_curve(result, policy, task, seed, rewards):
    """The curve of `result` is that of rewards (STEPS, TRIALS)."""
    expected = rewards.reshape(report.BINS, -1, TRIALS).mean(1).T
    np.testing.assert_allclose(result.curves[policy][task, seed], expected, rtol=5e-3, atol=1e-3)
    assert task == 0 or expected.max() > 0.3 and np.ptp(expected) > 0.1  # a hanging pole pays little


def test_all_policies_families_and_seeds_share_one_compilation(agent, monkeypatch):
    traced = []
    make_rollout = evaluate.make_rollout

    def make(*args):
        rollout = make_rollout(*args)
        return lambda *x: traced.append(1) or rollout(*x)

    monkeypatch.setattr(evaluate, "make_rollout", make)
    found = evaluate.measure(agent, TASKS[:1], 1)
    assert len(traced) == 1 and len(found.returns) == 4 and found.returns["memory"].shape == (1, 2, 1)


def test_memory_and_observations_matter_to_the_agent(result):
    """Otherwise the test above would hold for a reset and a blindness that do nothing."""
    for other in ("reset", "blind"):
        assert not np.allclose(result.returns["memory"], result.returns[other], atol=1e-3)


def test_random_actions_fill_the_bounds_of_the_action_space(tmp_path):
    """Pendulum-v1 takes torques in [-2, 2]: uniform bins, stepped in gymnax itself, have the same returns."""
    agent = evaluate.load(make_run(tmp_path / "pendulum", env=("Pendulum-v1",)))
    found = evaluate.measure(agent, ("Pendulum-v1",), 4).returns["random"][0, 0]
    trials = evaluate.TestTrials(agent, ("Pendulum-v1",), 4)
    state, _ = trials.start(evaluate.trial_keys(0)[0], 0)
    keys = jax.vmap(lambda t: trials.split(jax.random.fold_in(evaluate.trial_keys(0)[1], t)))(jnp.arange(STEPS))
    bins = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, (1, envs.ACTION_BINS)).argmax(-1)))(keys)
    torque = 2 * np.clip(envs.action_values()[bins], -1, 1)
    assert torque.min() == -2 and torque.max() == 2
    env, params = envs.make("Pendulum-v1", max_steps_in_episode=STEPS)
    step = jax.vmap(lambda s, u: env.step_env(None, s, u, params)[1:3])
    _, rewards = jax.lax.scan(step, state.env[0], torque)
    np.testing.assert_allclose(found, rewards.reshape(STEPS, 4).sum(0), rtol=1e-4)


def test_random_equals_the_bare_environment(starts, result):
    """Uniform bins, stepped in the task itself: neither Trials nor network."""
    trials, (state, _) = starts["trials"], starts["gaussian"]
    noise_key = evaluate.trial_keys(1)[1]

    def choose(t):
        keys = trials.split(jax.random.fold_in(noise_key, t))
        return jax.vmap(lambda key: jax.random.gumbel(key, (2, envs.ACTION_BINS)))(keys).argmax(-1)

    bins = jax.vmap(choose)(jnp.arange(STEPS))
    assert scipy.stats.chisquare(np.bincount(np.ravel(bins))).pvalue > 1e-4
    control = jnp.clip(jnp.einsum("nca,tna->tnc", state.act_matrix, envs.action_values()[bins]), -1, 1)
    for i, task in enumerate(TASKS):
        env, params = envs.make(task)

        def step(env_state, action, env=env, params=params):
            _, env_state, reward, _, _ = jax.vmap(
                lambda s, u: env.step_env(None, s, u, params))(env_state, action)
            return env_state, reward

        play = jax.jit(lambda s, u, step=step: jax.lax.scan(step, s, u)[1])
        mine = np.s_[:, i * TRIALS:(i + 1) * TRIALS, :env.model.nu]
        assert_curve(result, "random", i, 1, np.asarray(play(state.env[i], control[mine])))


def test_trials_do_not_depend_on_what_else_is_evaluated(agent, result):
    """A task alone, and in another place among the tasks, has the trials that it has in the test of all."""
    alone = evaluate.measure(agent, TASKS[1:], TRIALS, deterministic=True)
    for policy, x in alone.curves.items():
        np.testing.assert_allclose(x[0], result.curves[policy][1], rtol=5e-3, atol=1e-3)
    keys = evaluate.trial_keys(0)[0]
    alone = evaluate.TestTrials(agent, TASKS[1:], TRIALS)._matrices(keys, [12], [5])
    beside = evaluate.TestTrials(agent, (*TASKS[1:], "finger-turn_easy"), TRIALS)._matrices(keys, [12, 12], [5, 12])
    np.testing.assert_allclose(beside[:, :TRIALS, :, :5], alone, rtol=1e-6)
    both, swapped = (evaluate.TestTrials(agent, tasks, TRIALS).split(keys) for tasks in (TASKS, TASKS[::-1]))
    np.testing.assert_array_equal(both, np.roll(swapped, TRIALS, 0))


def test_every_seed_task_and_trial_has_its_own_start_and_noise(agent, result):
    trials = evaluate.TestTrials(agent, TASKS, TRIALS)
    keys = [trials.split(key) for place in range(10) for key in evaluate.trial_keys(place)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 10 * 2 * len(TASKS) * TRIALS
    assert len(np.unique(result.curves["random"][..., 0].round(6))) == 2 * 2 * TRIALS


def test_curves_add_up_to_the_return(result):
    for policy, x in result.returns.items():
        assert x.shape == (2, 2, TRIALS) and result.steps == (STEPS, STEPS)
        np.testing.assert_allclose(result.curves[policy].mean(-1) * STEPS, x, rtol=1e-6)


def test_trials_that_end_early_and_have_several_episodes(gym_run):
    """CartPole pays 1 in every step until the pole falls; a trial is over after its third fall."""
    found = evaluate.measure(evaluate.load(gym_run), ("CartPole-v1",), 4)
    assert found.steps == (1500,) and found.projections == {}
    for policy, x in found.returns.items():
        curve = found.curves[policy]
        assert (curve[~np.isnan(curve)] == 1).all()  # no step counts after the end
        whole = (~np.isnan(curve)).sum(-1) * 1500 / report.BINS  # the last bin may have been cut short
        assert (3 * x <= whole).all() and (3 * x > whole - 1500 / report.BINS).all()
    assert (found.returns["random"] < 60).all() and len(np.unique(found.returns["random"])) > 1


def test_all_policies_have_the_same_action_noise(gym_run):
    """Where all actions are equally likely, whatever is observed, every policy acts as random does."""
    agent = evaluate.load(gym_run)
    agent.params = jax.tree.map(jnp.zeros_like, agent.params)
    found = evaluate.measure(agent, ("CartPole-v1",), 4)
    for policy in evaluate.POLICIES:
        np.testing.assert_array_equal(found.returns[policy], found.returns["memory"])


# -- projections -----------------------------------------------------------------------------------
def test_families_have_the_same_starts(starts):
    (gaussian, _), (identity, observation), (other, _) = (
        starts[family] for family in ("gaussian", "identity", "orthogonal"))
    for a, b, c in zip(*(jax.tree.leaves(state.env) for state in (gaussian, identity, other))):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    obs = np.concatenate([
        jax.vmap(env.get_obs)(state) for env, state in zip(starts["trials"].envs, identity.env)])
    expected = np.pad(np.sign(obs) * np.log1p(np.abs(obs)), ((0, 0), (0, 12 - obs.shape[1])))
    np.testing.assert_allclose(observation.projected, expected, rtol=1e-5, atol=1e-6)
    assert observation.sysid.shape[1] > 0 and not observation.sysid.any() and not observation.change.any()
    columns = np.asarray(other.obs_matrix)  # orthogonal, of one length
    np.testing.assert_allclose(columns.mT @ columns, np.tile(np.eye(5) * 12 / 5, (2 * TRIALS, 1, 1)), atol=1e-5)


def test_projections_are_returns_of_the_agent(result):
    assert tuple(result.projections) == evaluate.FAMILIES
    np.testing.assert_array_equal(result.projections["gaussian"], result.returns["memory"])
    assert len({x.tobytes() for x in result.projections.values()}) == len(evaluate.FAMILIES)


def test_an_unprojected_agent_is_tested_where_sizes_allow(tmp_path):
    """Trained on bare observations, 4 numbers: its own family is the identity, and gaussian is another."""
    agent = evaluate.load(make_run(tmp_path / "bare", env=("point_mass-easy",), projection="none"))
    assert (agent.trials.obs_size, agent.trials.action_dims, agent.family) == (4, 2, "identity")
    assert evaluate.choose_tasks(agent) == ("point_mass-easy", "pendulum-swingup", "point_mass-hard")
    with pytest.raises(ValueError, match="finger-spin is too large .* --obs-size 9 and --action-size 2"):
        evaluate.choose_tasks(agent, ("finger-spin",))
    trials = evaluate.TestTrials(agent, ("point_mass-easy",), 2)
    place = trials.families.index("identity")
    state, observation = jax.jit(trials.start)(evaluate.trial_keys(0)[0], place)
    q = np.concatenate([state.env[0].qpos, state.env[0].qvel], -1)
    np.testing.assert_allclose(observation.projected, np.sign(q) * np.log1p(np.abs(q)), rtol=1e-5)
    np.testing.assert_array_equal(state.act_matrix[0], np.eye(2))


def test_choice_of_tasks(agent):
    assert evaluate.choose_tasks(agent) == (TASKS[0], *envs.HELD_OUT_TASKS)
    assert evaluate.choose_tasks(agent, ("dmc:finger-spin", TASKS[0], "finger-spin")) == ("finger-spin", TASKS[0])


# -- files and refusals ----------------------------------------------------------------------------
def test_with_out_nothing_is_written_into_the_run_folder(gym_run, tmp_path, capsys):
    """It may be read-only. Here its eval is a file, in which nothing can be written by anybody."""
    (gym_run / "eval").write_text("in the way")
    before = sorted(path.name for path in gym_run.iterdir())
    with pytest.raises(ValueError, match=r"cannot write into .*eval .*: choose an --out"):
        evaluate.evaluate((gym_run,), trials=1)
    twice = evaluate.evaluate((gym_run, gym_run), trials=1, out=tmp_path / "out")
    assert [result.agent.name for result in twice] == ["gym", "gym (2)"]
    for name in ("gym/report.md", "gym (2)/trials.csv", "comparison.md"):
        assert (tmp_path / "out" / name).is_file()
    assert sorted(path.name for path in gym_run.iterdir()) == before
    copies = [shutil.copytree(gym_run, tmp_path / name, ignore=shutil.ignore_patterns("eval"))
              for name in ("a/gym (2)", "b/gym", "c/gym")]
    names = [result.agent.name for result in evaluate.evaluate(tuple(copies), trials=1)]
    assert names == ["gym (2)", "gym", "gym (3)"]


def test_refusals(run, gym_run, tmp_path, monkeypatch, capsys):
    def refusal(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            evaluate.main()
        sentence = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and sentence.startswith("error: ") and "\n" not in sentence
        return sentence

    assert "cannot be read" in refusal(tmp_path / "nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "agent.msgpack").write_bytes((run / "agent.msgpack").read_bytes()[:1000])
    assert "not written by this version" in refusal(broken)
    assert "finger-spin" in refusal(run, "--tasks", "finger-spine")
    assert "finger-spin" in refusal(run, "--replay", "finger-spine")
    assert "DMControl tasks" in refusal(run, "--tasks", "CartPole-v1")
    assert "seeds: 0, 1" in refusal(run, "--seed", "7")
    assert "holds no such agent" in refusal(run, "--setting", "lr=nan")
    for setting in ("lr", "lr=fast", "=", str(run)):
        assert "expected NAME=NUMBER" in refusal(run, "--setting", setting)
    small = make_run(tmp_path / "small", obs_size=6)
    assert "needs an agent trained with --obs-size 12" in refusal(small, "--tasks", "finger-turn_easy")
    for trials in ("0", "-1", "1000000000"):
        assert "trials" in refusal(run, "--trials", trials)
    assert "replays draw DMControl tasks only" in refusal(gym_run, "--gif", "CartPole-v1")
    assert "not from DMControl" in refusal(gym_run, "--tasks", "finger-spin")
    (tmp_path / "file").write_text("")
    assert "choose an --out" in refusal(run, "--out", tmp_path / "file")


def test_imports_run_one_way():
    """evaluate -> report -> agent, logs -> run_folder -> devices, without a circle.

    Agents find their trainer by name.
    """
    def imported(name):
        found = re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        return {f for f in found if (ROOT / f"{f}.py").exists()}

    assert imported("evaluate") == {"agent", "devices", "envs", "experiment", "report"}  # replay on request
    assert imported("report") == {"agent", "logs", "run_folder"}
    assert imported("agent") == {"envs", "run_folder"}
    assert imported("experiment") == {"devices", "logs", "run_folder"}
    assert imported("logs") == {"run_folder"} and imported("run_folder") == {"devices"}
    assert imported("replay") == {"dmc"} and imported("dmc") == {"physics"}
    assert imported("devices") == imported("envs") == imported("physics") == imported("sysid") == set()
    assert not {"evaluate", "agent"} & (imported("train_s5") | imported("train_lstm"))
