"""evaluate.py: rollouts against hand-rolled loops, statistics against scipy, files, refusals."""

import csv
import os
import re
import subprocess
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
import train_lstm
import train_s5

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("quick")
TRIALS, STEPS = 3, 60  # of a run as from make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "s5", seeds=(0, 1))


@pytest.fixture(scope="module")
def agent(run):
    return evaluate.load(run)


@pytest.fixture(scope="module")
def result(agent, quick):
    return evaluate.measure(agent, TASKS, TRIALS, deterministic=True)


@pytest.fixture(scope="module")
def starts(agent, quick):
    """{family: (state, observation)} of the trials of `result`'s second seed, and their TestTrials."""
    trials = evaluate.TestTrials(agent, TASKS, TRIALS)
    families = ("gaussian", "identity", "orthogonal")
    states, observations = evaluate.make_start(trials, families)(evaluate.trial_keys(1)[0])
    found = {"trials": trials}
    for v, family in enumerate(families):
        own = states.replace(spare=None, key=None)
        state, observation = jax.tree.map(lambda x, v=v: x[v], (own, observations))
        found[family] = state.replace(spare=states.spare, key=states.key), observation
    return found


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

    def sequence(network, hidden, observation, reset):
        hidden, x = network.features(norm, observation, hidden, reset)
        return hidden, network.policy(x)

    @jax.jit
    def step(state, observation, hidden, reset, t):
        one = jax.tree.map(lambda x: x[None], observation)
        hidden, pi = network.apply(params, hidden, one, reset[None], method=sequence)
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
    expected = rewards.reshape(evaluate.BINS, -1, TRIALS).mean(1).T
    np.testing.assert_allclose(result.curves[policy][task, seed], expected, rtol=5e-3, atol=1e-3)
    assert task == 0 or expected.max() > 0.3 and np.ptp(expected) > 0.1  # a hanging pole pays little


def test_memory_and_observations_matter_to_the_agent(result):
    """Otherwise the test above would hold for a reset and a blindness that do nothing."""
    for other in ("reset", "blind"):
        assert not np.allclose(result.returns["memory"], result.returns[other], atol=1e-3)


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
        whole = (~np.isnan(curve)).sum(-1) * 1500 / evaluate.BINS  # the last bin may have been cut short
        assert (3 * x <= whole).all() and (3 * x > whole - 1500 / evaluate.BINS).all()
    assert (found.returns["random"] < 60).all() and len(np.unique(found.returns["random"])) > 1


def test_all_policies_have_the_same_action_noise(gym_run):
    """Where all actions are equally likely, whatever is observed, every policy acts as random does."""
    agent = evaluate.load(gym_run)
    agent.params = jax.tree.map(jnp.zeros_like, agent.params)
    found = evaluate.measure(agent, ("CartPole-v1",), 4)
    for policy in evaluate.POLICIES:
        np.testing.assert_array_equal(found.returns[policy], found.returns["memory"])


def test_reduce_trials_by_hand():
    """One variant, two trials, 40 steps with two control steps each: the second is over after 30."""
    alive = np.ones((40, 1, 2), bool)
    alive[30:, 0, 1] = False
    returns, curves = evaluate.reduce_trials(np.arange(40.0)[:, None, None] * alive, alive, 2, 2)
    np.testing.assert_array_equal(returns[0], [390, 217.5])
    np.testing.assert_array_equal(curves[0, 0], (np.arange(20) * 2 + 0.5) / 2)
    np.testing.assert_array_equal(np.isnan(curves[0, 1]), [False] * 15 + [True] * 5)


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
    state, observation = evaluate.make_start(trials, ("identity",))(evaluate.trial_keys(0)[0])
    q = np.concatenate([state.env[0].qpos, state.env[0].qvel], -1)
    np.testing.assert_allclose(observation.projected, np.sign(q) * np.log1p(np.abs(q)), rtol=1e-5)
    np.testing.assert_array_equal(state.act_matrix[0, 0], np.eye(2))


def test_choice_of_tasks(agent):
    assert evaluate.choose_tasks(agent) == (TASKS[0], *envs.HELD_OUT_TASKS)
    assert evaluate.choose_tasks(agent, ("dmc:finger-spin", TASKS[0], "finger-spin")) == ("finger-spin", TASKS[0])


# -- statistics ------------------------------------------------------------------------------------
@pytest.mark.parametrize("effect", [0, 60, 300])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_the_truth(seeds, effect):
    """Six tasks, 16 trials: rare large returns, and an effect of the seed that its tasks share."""
    rng, many = np.random.default_rng(seeds), 2000

    def runs():
        return rng.normal(size=(1, seeds, 1, many)) * effect + rng.normal(size=(6, seeds, 1, many)) * effect / 3

    chance = np.array([0.1, 0.2, 0.3, 0.5, 0.8, 0.9])[:, None, None, None]
    trials = 900 * (rng.random((6, seeds, 16, many)) < chance) + rng.normal(size=(6, seeds, 16, many)) * 20
    x, y = trials + runs(), trials + runs() + rng.normal(size=trials.shape) * 100  # two runs, the same trials
    truth = 900 * chance[:, 0, 0, 0]
    cases = [(evaluate.estimate(x), truth.mean()), (evaluate.estimate(x[2:3]), truth[2]),
             (evaluate.compare(x, y), 0), (evaluate.compare(x[3:4], y[3:4]), 0)]
    for e, value in cases:
        assert e.over == "seeds"
        assert 0.92 <= ((e.low <= value) & (value <= e.high)).mean() <= 0.98


def test_statistics_equal_scipy():
    x = np.random.default_rng(3).gamma(2.0, size=(3, 4, 5))
    mean, low, high, _ = evaluate.estimate(x)
    np.testing.assert_allclose(mean, x.mean())
    np.testing.assert_allclose([low, high], scipy.stats.ttest_1samp(x.mean((0, 2)), 0).confidence_interval())
    difference = evaluate.compare(x, 2 * x[:, ::-1])
    expected = scipy.stats.ttest_rel(x.mean((0, 2)), 2 * x[:, ::-1].mean((0, 2))).confidence_interval()
    np.testing.assert_allclose([difference.low, difference.high], expected)


def test_one_seed_is_not_read_as_an_interval_over_runs(result):
    x = np.random.default_rng(0).gamma(2.0, size=(3, 1, 8)) * 100
    e = evaluate.estimate(x)
    np.testing.assert_allclose([e.low, e.high], scipy.stats.ttest_1samp(x[:, 0].mean(0), 0).confidence_interval())
    assert e.over == "trials" and re.fullmatch(r"\d+ to \d+", str(e))
    one = result._replace(returns={policy: x[:, :1] for policy, x in result.returns.items()})
    assert f"{TRIALS} trials of one seed" in evaluate.headline(one) and "2 seeds" in evaluate.headline(result)
    assert np.isnan(evaluate.estimate(x[:, :, :1]).low) and str(evaluate.estimate(x[:, :, :1])) == "-"


def test_comparisons_pair_trials_and_shared_seeds():
    x = np.array([[[3.0, 1.0], [5.0, 5.0]]])
    y = np.array([[[2.0, 4.0], [5.0, 1.0], [9.0, 9.0]]])
    difference = evaluate.compare(x, y)
    assert (difference.mean, difference.over) == (0.5, "seeds")
    np.testing.assert_equal(evaluate.compare(x, x)[:3], (0, np.nan, np.nan))  # no spread, no interval
    assert evaluate.compare(x[:, :1], y).over == "trials"


def test_estimates_leave_out_what_is_over_but_no_task():
    x = np.array([[[[1.0, 2.0], [3.0, np.nan]], [[5.0, 6.0], [7.0, np.nan]]]])
    mean, low, high, _ = evaluate.estimate(x)
    np.testing.assert_array_equal(mean, [4, 4])
    assert (low < 4).all() and (high > 4).all()
    both = evaluate.estimate(np.stack([x[0, ..., 0], np.full((2, 2), np.nan)]))  # one task was not played
    assert np.isnan(both.mean) and evaluate.number(both.mean) == str(both) == "-"


# -- reports ---------------------------------------------------------------------------------------
def test_two_calls_print_and_write_the_same(run, result):
    """Once here, once as a command in another process. The three numbers that matter come last."""
    (run / "first").mkdir()
    printed = evaluate.write_report(result, run / "first")
    command = [sys.executable, ROOT / "evaluate.py", run, "--tasks", *TASKS, "--trials", str(TRIALS),
               "--deterministic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert_same_text(done.stdout.strip(), printed.replace(str(run / "first"), str(run / "eval")))
    for name in ("returns.csv", "trials.csv", "curves.csv", "report.md"):
        assert_same_text((run / "eval" / name).read_text(), (run / "first" / name).read_text())
    assert widest(printed) <= 100
    memory, blind = (result.returns[policy] for policy in ("memory", "blind"))
    last = [[cell.strip() for cell in line.split("|")[2:-1]] for line in printed.splitlines()[-3:]]
    for cells, x in zip(last, (memory[:1], memory[1:], (memory - blind)[:1])):
        interval = scipy.stats.ttest_1samp(x.mean((0, 2)), 0).confidence_interval()
        assert cells == ["1", evaluate.number(x.mean()), " to ".join(map(evaluate.number, interval))]
    assert "95 % over 2 seeds" in printed
    text = (run / "first" / "report.md").read_text()
    assert all((run / "first" / name).stat().st_size > 1000 for name in re.findall(r"!\[\w+\]\((.+?)\)", text))
    assert all(line.count("|") <= 7 for line in text.splitlines())  # six columns


def assert_same_text(a, b):
    """The same words, and numbers that differ by rounding only: a stored program may round differently."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    assert re.sub(r" +|-+", " ", re.sub(number, "#", a)) == re.sub(r" +|-+", " ", re.sub(number, "#", b))
    numbers = [np.array(re.findall(number, text), float) for text in (a, b)]
    np.testing.assert_allclose(*numbers, rtol=5e-3, atol=2e-2)


def widest(text):
    """Length of the longest line without a path."""
    return max(len(line) for line in text.splitlines() if not line.startswith("more: "))


def test_csv_files_hold_every_trial(run, agent, result, tmp_path):
    evaluate.write_tables(result, tmp_path)
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * TRIALS * (len(evaluate.POLICIES) + len(evaluate.FAMILIES) - 1)
    blind = [float(r["return"]) for r in rows if (r["task"], r["policy"], r["seed"]) == (TASKS[1], "blind", "1")]
    np.testing.assert_allclose(blind, result.returns["blind"][1, 1], rtol=1e-4)
    with (tmp_path / "returns.csv").open() as file:
        rows = {(r["task"], r["policy"], r["projection"]): r for r in csv.DictReader(file)}
    row, x = rows[TASKS[1], "memory", "identity"], result.projections["identity"][1:]
    np.testing.assert_allclose([float(row[k]) for k in ("mean", "low", "high")], evaluate.estimate(x)[:3], rtol=1e-4)
    np.testing.assert_allclose(float(row["iqm"]), scipy.stats.trim_mean(x.ravel(), 0.25), rtol=1e-4)
    row, x = rows[TASKS[0], "memory - blind", "gaussian"], result.returns["memory"] - result.returns["blind"]
    np.testing.assert_allclose(float(row["mean"]), x[0].mean(), rtol=1e-4)


def test_comparison_of_runs(tmp_path, capsys):
    """An LSTM trained on gaussian projections; S5 trained on none, its hidden state reset in every step."""
    lstm = make_run(tmp_path / "lstm", train_lstm, seeds=(0, 1), sysid=False)
    step = make_run(tmp_path / "step", reset="step", projection="identity")
    found = evaluate.evaluate((lstm, step), tasks=TASKS, trials=TRIALS, out=tmp_path / "out")
    np.testing.assert_array_equal(found[1].returns["memory"], found[1].returns["reset"])
    np.testing.assert_array_equal(found[1].projections["identity"], found[1].returns["memory"])
    assert widest(capsys.readouterr().out) <= 100
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["run"], r["other"], r["tasks"], r["over"]) for r in rows] == [
        ("lstm", "step", "trained on", "trials"), ("lstm", "step", "held out", "trials")]  # one has one seed
    for i, row in enumerate(rows):
        a, b = (r.returns["memory"][i, 0] for r in found)
        np.testing.assert_allclose(float(row["mean"]), (a - b).mean(), rtol=1e-4)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "step: train_s5, projection identity" in text and "lstm: train_lstm, projection gaussian" in text
    assert all((tmp_path / "out" / name).exists() for name in re.findall(r"!\[\w+\]\((.+?)\)", text))


# -- refusals --------------------------------------------------------------------------------------
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
    assert "seeds: 0, 1" in refusal(run, "--seed", "7")
    small = make_run(tmp_path / "small", obs_size=6)
    assert "needs an agent trained with --obs-size 12" in refusal(small, "--tasks", "finger-turn_easy")
    assert "trials" in refusal(run, "--trials", "0")
    assert "replays draw DMControl tasks only" in refusal(gym_run, "--gif", "CartPole-v1")
    assert "not from DMControl" in refusal(gym_run, "--tasks", "finger-spin")


def test_imports_run_one_way():
    """evaluate -> agent -> experiment -> logs -> run_folder -> devices, without a circle.

    Agents find their trainer by name.
    """
    def imported(name):
        found = re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        return {f for f in found if (ROOT / f"{f}.py").exists()}

    assert imported("evaluate") == {"agent", "devices", "envs", "experiment", "replay"}
    assert imported("agent") == {"envs", "experiment"} and imported("experiment") == {
        "devices", "logs", "run_folder"}
    assert imported("logs") == {"run_folder"} and imported("run_folder") == {"devices"}
    assert imported("replay") == {"dmc"} and imported("dmc") == {"physics"}
    assert imported("devices") == imported("envs") == imported("physics") == imported("sysid") == set()
    assert not {"evaluate", "agent"} & (imported("train_s5") | imported("train_lstm"))
