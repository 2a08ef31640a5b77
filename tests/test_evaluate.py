"""evaluate.py, report.py, replay.py: numbers against hand-rolled loops, numpy and scipy; files; refusals."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.stats

import dmc
import envs
import evaluate
import experiment
import physics
import replay
import report
import train_lstm
import train_s5
import train_transformer

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("cartpole-swingup", "cartpole-balance")  # trained on, held out; cheap, and pay in every step
SMALL = dict(width=8, layers=1, num_envs=4, num_steps=8, num_minibatches=2, log_every=1, env=TASKS[:1],
             action_repeat=1)


def make_run(folder, trainer=train_s5, **changes):
    """A run folder with a checkpoint of random parameters, under which actions vary a lot, and of zeros."""
    options = experiment.Options(num_seeds=changes.pop("num_seeds", 1), sweep=changes.pop("sweep", ()))
    config = trainer.Config(**(SMALL | changes))
    train = trainer.make_train(config)
    shapes = jax.eval_shape(lambda: experiment.init_groups(jax.vmap(train.init), config, options))
    rng = np.random.default_rng(len(folder.name))

    def fill(path, x):
        name = jax.tree_util.keystr(path)
        if ".params" not in name:
            return np.zeros(x.shape, x.dtype)
        value = rng.normal(size=x.shape).astype(x.dtype) / (np.sqrt(x.shape[1]) if x.ndim > 2 else 2)
        return value - 4 if "log_dt" in name else np.abs(value) if "var" in name else value

    groups = jax.tree_util.tree_map_with_path(fill, shapes)
    folder.mkdir()
    saved = {"trainer": trainer.__name__, "config": vars(config), "options": vars(options)}
    (folder / "config.json").write_text(json.dumps(saved))
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        manager.save(3, args=ocp.args.StandardSave(groups))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "s5", state_size=8, num_seeds=2)


@pytest.fixture(scope="module")
def result(run):
    agent = evaluate.load(run)
    return evaluate.measure(agent, TASKS, 3, 1, True, (5,), "memory, mode")


@pytest.fixture(scope="module")
def starts(run):
    """(agent, lanes of TASKS[1], {family: (state, inputs)} of the trials of `result`'s second seed on it)."""
    agent = evaluate.load(run)
    lanes = evaluate.make_lanes(agent, TASKS[1], 3, 1)
    families = ["gaussian", "identity", "orthogonal"]
    found = evaluate.make_start(agent, lanes, families)(evaluate.trial_keys(TASKS[1], 1))
    return agent, lanes, {family: jax.tree.map(lambda x: x[v], found) for v, family in enumerate(families)}


@pytest.fixture(scope="module")
def gym_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "gym", state_size=8, env=("CartPole-v1",))


# -- the numbers --------------------------------------------------------------------------------------------
def test_two_calls_give_the_same_table_and_files(run, capsys):
    """Once here, once as a command in a process of its own; the table of the held-out task comes last."""
    shutil.rmtree(run / "eval", ignore_errors=True)
    evaluate.evaluate((run,), tasks=TASKS, trials=3, sizes=(5,))
    printed = capsys.readouterr().out
    files = {p.name: p.read_bytes() for p in (run / "eval").iterdir() if p.suffix in (".csv", ".md")}
    tables = ("returns", "trials", "curves", "episodes", "projections")
    assert set(files) == {f"{name}.csv" for name in tables} | {"report.md"}
    shutil.rmtree(run / "eval")
    command = [sys.executable, ROOT / "evaluate.py", run, "--tasks", *TASKS, "--trials", "3", "--sizes", "5"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed
    assert files == {name: (run / "eval" / name).read_bytes() for name in files}
    last = printed[printed.rindex("tasks held out"):].splitlines()
    assert len(last) == 8 and TASKS[1] in last[3] and TASKS[1] in last[-1]  # reading, then returns
    text = files["report.md"].decode()
    assert all((run / "eval" / name).stat().st_size > 1000 for name in re.findall(r"!\[\w+\]\((.+?)\)", text))


@pytest.mark.parametrize("policy,reset_every_step,observe", [
    ("memory, mode", False, "full"), ("reset, mode", True, "full"), ("blind, mode", False, "none")])
def test_memory_reset_and_blind_equal_a_hand_rolled_loop(starts, result, policy, reset_every_step, observe):
    """A loop over a single set of lanes, in which the memory sees sequences of one step; blind, as it trains blind."""
    agent, lanes, starts = starts
    state, inputs = starts["gaussian"]
    config = dataclasses.replace(agent.config, observe=observe)
    network = train_s5.ActorCritic(config, lanes.action_size, lanes.discrete, lanes.output_of_input)
    memory = train_s5.make_memory(agent.config, jnp.float32).zero_state((3,))
    params = jax.tree.map(lambda x: x[1], agent.params)  # second seed

    def sequence(network, memory, inputs, reset):
        memory, x = network.perceive(inputs, lambda x: network.core(memory, x, reset))
        return memory, network.policy(x)

    @jax.jit
    def step(state, inputs, memory, reset, t):
        memory, pi = network.apply(params, memory, inputs[None], reset[None], method=sequence)
        state, inputs, out = lanes.step(state, pi.mode()[0], t)
        return state, inputs, memory, out

    rewards = []
    for t in range(150):  # three bins: then rounding errors have grown, because the pole is chaotic
        state, inputs, memory, out = step(state, inputs, memory, jnp.full(3, reset_every_step or t == 0), t)
        rewards.append(out.reward)
    assert_starts_as(result, policy, 1, 1, np.array(rewards))


def assert_starts_as(result, policy, task, seed, rewards):
    """The first three bins of `result` are those of `rewards` (150, trials)."""
    expected = rewards.reshape(3, 50, 3).mean(1).T
    np.testing.assert_allclose(result.curves[policy][task, seed, :, :3], expected, rtol=5e-3, atol=1e-3)
    assert task == 0 or expected.max() > 0.3 and np.ptp(expected) > 0.1  # a hanging pole pays little


def test_memory_and_observations_matter_to_the_agent(result):
    """Otherwise the test above would hold for a reset and a blindness that do nothing."""
    for other in ("reset, mode", "blind, mode"):
        assert not np.allclose(result.returns["memory, mode"], result.returns[other], atol=1e-3)


@pytest.mark.parametrize("trainer", [train_s5, train_lstm, train_transformer])
def test_an_agent_trained_blind_never_sees_an_observation(trainer):
    """Policy and value are the same bits for any observations, and an update leaves their weights alone."""
    config = trainer.Config(**SMALL | dict(env=("CartPole-v1",), observe="none"))
    train = trainer.make_train(config)
    runner = evaluate.jit_once(train.init)(jax.random.PRNGKey(0))
    after, _ = evaluate.jit_once(train.update)(runner)
    hidden = np.array(train.lanes.output_of_input) >= 0
    assert hidden.sum() == 2 * train.lanes.obs_size and hidden.size == train.lanes.input_size
    for encoder, learns in (("own_encoder", True), ("observation_encoder", False)):
        before, now = (np.asarray(r.params["params"][encoder]["kernel"]) for r in (runner, after))
        assert ((before != now).any(1) == learns).all()

    x = np.random.default_rng(0).normal(size=(2, 5, 4, hidden.size)).astype(np.float32)
    x[1] = np.where(hidden, 100 * x[1], x[0])
    reset = jnp.zeros((5, 4), bool)

    def act(config, x):
        network = trainer.ActorCritic(config, train.lanes.action_size, True, train.lanes.output_of_input)

        @evaluate.jit_once
        def outputs(params, memory, x):
            _, pi, value = network.apply(params, memory, x, reset)
            prepared = network.apply(params, method="prepare")
            _, now, _ = network.apply(params, prepared, memory, x[0], reset[0], method="step")
            return pi.logits, value, now.logits

        return jax.device_get(outputs(after.params, after.memory, x))

    for a, b in zip(act(config, x[0]), act(config, x[1])):
        np.testing.assert_array_equal(a, b)
    seeing = dataclasses.replace(config, observe="full")
    assert all((a != b).any() for a, b in zip(act(seeing, x[0]), act(seeing, x[1])))


@pytest.mark.parametrize("policy", ["zero", "random"])
def test_references_equal_bare_environments(run, result, policy):
    """Zero and random actions, stepped in the task itself: no lanes, no network."""
    agent = evaluate.load(run)
    place, variants = list(result.returns).index("random"), len(result.returns) + len(result.projections) - 1
    for i, task in enumerate(TASKS):
        env, params = envs.make(task)
        start = evaluate.make_start(agent, evaluate.make_lanes(agent, task, 3, 1), ["gaussian"])

        def step(s, u, env=env, params=params):
            _, s, reward, _, _ = jax.vmap(lambda s, u: env.step_env(None, s, u, params))(s, u)
            return s, reward

        live = jax.jit(lambda s, u, step=step: jax.lax.scan(step, s, u)[1])
        for seed in range(2):
            keys = evaluate.trial_keys(task, seed)

            def uniform(t, noise=keys[3]):
                key = jax.random.split(jax.random.fold_in(noise, t))[1]
                return jax.random.uniform(key, (variants, 3, 2), minval=-1.0, maxval=1.0)[place]

            state, _ = jax.tree.map(lambda x: x[0], start(keys))
            actions = jax.vmap(uniform)(jnp.arange(150)) * (policy == "random")
            control = jnp.clip(jnp.einsum("nca,tna->tnc", state.act_matrix, actions), -1, 1)
            assert_starts_as(result, policy, i, seed, np.asarray(live(state.env[0], control)))


def test_trials_do_not_depend_on_what_else_is_evaluated(run, result):
    """One task, without projections, gives what it gives in the table of all."""
    alone = evaluate.measure(evaluate.load(run), TASKS[1:], 3, 1, False, (), "memory, mode")
    for policy, x in alone.curves.items():
        np.testing.assert_allclose(x[0, ..., :3], result.curves[policy][1, ..., :3], rtol=5e-3, atol=1e-3)


def test_every_seed_and_task_has_its_own_trials_and_noise(result):
    """No two keys are alike: neither those of tasks or seeds, nor those of projections and action noise."""
    keys = [evaluate.trial_keys(task, place) for task in dmc.TASKS for place in range(10)]
    keys = np.concatenate(keys)
    assert len(np.unique(keys, axis=0)) == len(keys) == len(dmc.TASKS) * 10 * 4
    assert len(np.unique(result.curves["zero"][..., 0].round(6))) > 6  # 12 trials, other starts for each seed


def test_bins_and_episodes_add_up_to_the_return(result):
    for policy, x in result.returns.items():
        assert x.shape == (2, 2, 3)
        steps = result.counts[policy]
        assert (steps == 1000 / report.BINS).all()
        np.testing.assert_allclose((result.curves[policy] * steps).sum(-1), x, rtol=1e-6)
        np.testing.assert_allclose(result.episodes[policy][..., 0], x, rtol=1e-6)


def test_trials_that_end_early_and_trials_of_several_episodes(gym_run):
    """CartPole pays 1 in every step until the pole falls: the return counts the steps that were lived."""
    agent = evaluate.load(gym_run)
    found = evaluate.measure(agent, ("CartPole-v1",), 4, 3, False, (), "memory, sampled")
    for policy, x in found.returns.items():
        steps, curve = found.counts[policy], found.curves[policy]
        assert found.horizon == (1500,) and found.projections == {}
        np.testing.assert_allclose(steps.sum(-1), 3 * x)
        assert (curve[steps > 0] == 1).all() and np.isnan(curve[steps == 0]).all()
        np.testing.assert_allclose(found.episodes[policy].mean(-1), x)
    assert (found.returns["zero"] < 12).all()  # action 0 pushes left for ever
    assert len(np.unique(found.episodes["zero"])) > 1


def test_reduce_trials_by_hand():
    """One variant, two lanes, 40 steps of 2 control steps: the second's trial of two episodes is over after 30."""
    alive = np.ones((40, 1, 2), bool)
    alive[30:, 0, 1] = False
    reward = np.arange(40.0)[:, None, None] * alive
    end = np.zeros((40, 1, 2), bool)
    end[[19, 39], 0, 0] = end[[9, 29], 0, 1] = True
    out = {"reward": reward, "alive": alive, "episode_end": end}
    returns, curves, counts, episodes = evaluate.reduce_trials(out, 2, 2)
    np.testing.assert_array_equal(returns[0], [390, 217.5])
    np.testing.assert_array_equal(episodes[0], [[190, 590], [45, 390]])
    np.testing.assert_array_equal(counts[0, 1], [2] * 15 + [0] * 5)
    np.testing.assert_array_equal(curves[0, 0], (np.arange(20) * 2 + 0.5) / 2)
    end[19, 0, 0] = alive[20:, 0, 0] = False  # the first lane's second episode is never reached
    out["reward"] = reward * alive
    assert np.isnan(evaluate.reduce_trials(out, 2, 2)[3][0, 0, 1])


def test_more_episodes_than_trained_on(gym_run, capsys):
    """Return by episode, as a table on the screen and in the report, and as a curve."""
    found, = evaluate.evaluate((gym_run,), trials=2, episodes=5)
    x = found.episodes["memory, sampled"][0, 0].mean(0)
    printed, text = capsys.readouterr().out, (gym_run / "eval" / "report.md").read_text()
    table = report.episodes_table(found, "memory, sampled", [0])
    assert table in printed and table in text and "In training a trial had 1." in text
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0][1:] == ["1", "2", "4", "5"]
    assert [float(c.split(" (trials")[0]) for c in cells[2][1:]] == [float(f"{x[e]:.1f}") for e in (0, 1, 3, 4)]
    assert (gym_run / "eval" / "episodes.png").stat().st_size > 1000


# -- projections --------------------------------------------------------------------------------------------
def test_other_projections_meet_the_same_starts(starts):
    agent, _, starts = starts
    (gaussian, _), (identity, inputs), (other, _) = (starts[f] for f in ("gaussian", "identity", "orthogonal"))
    for a, b, c in zip(*(jax.tree.leaves(s.env) for s in (gaussian, identity, other))):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    lanes = train_s5.make_lanes(agent.config, tasks=TASKS[1:], num_lanes=3, projection="identity", stagger=False)
    expected = evaluate.jit_once(lanes.reset)(evaluate.trial_keys(TASKS[1], 1)[0])[1]
    plain = expected.shape[1]  # then comes what is identified, nothing so far
    np.testing.assert_allclose(inputs[:, :plain], expected, rtol=1e-5, atol=1e-6)
    assert inputs.shape[1] > plain and not inputs[:, plain:].any()
    columns = other.obs_matrix  # orthogonal, of one length
    np.testing.assert_allclose(columns.mT @ columns, np.tile(np.eye(5) * 12 / 5, (3, 1, 1)), atol=1e-5)


def test_first_outputs_are_those_of_a_smaller_projection(starts):
    """What is hidden is what a projection with those rows at zero does not show."""
    _, lanes, starts = starts
    state, _ = starts["gaussian"]
    shown, plain = np.array(lanes.output_of_input) < 5, 12 + 2 + 3 + 12
    assert not shown[plain:].any()  # what is identified comes from all numbers
    matrix, inputs = state.obs_matrix.at[:, 5:].set(0), state.input.at[:, 5:12].set(0)
    smaller = state.replace(obs_matrix=matrix, input=inputs)
    step = jax.jit(lambda state, action: lanes.step(state, action, 1))
    for t in range(3):
        action = jax.random.normal(jax.random.PRNGKey(t), (3, 2))
        state, inputs, _ = step(state, action)
        smaller, expected, _ = step(smaller, action)
        np.testing.assert_array_equal((inputs * shown)[:, :plain], expected[:, :plain])
    assert np.abs(inputs).max() > 0


def test_projection_columns(result):
    assert list(result.projections) == [*evaluate.FAMILIES, "gaussian, 5 of 12"]
    np.testing.assert_array_equal(result.projections["gaussian"], result.returns["memory, mode"])
    values = [x.tobytes() for x in result.projections.values()]
    assert len(set(values)) == len(values)


def test_unprojected_agent_meets_projections(tmp_path):
    """Trained on bare observations, 4 numbers: tasks that do not fit are left out, projections all fit."""
    agent = evaluate.load(make_run(tmp_path / "bare", env=("point_mass-easy",), projection="none"))
    assert (agent.obs_size, agent.action_size) == (4, 2)
    tasks = evaluate.choose_tasks(agent)
    assert tasks == ("point_mass-easy", "pendulum-swingup", "point_mass-hard")
    with pytest.raises(ValueError, match="finger-spin is too large .* --obs-size 9 and --action-size 2"):
        evaluate.choose_tasks(agent, ("finger-spin",))
    lanes = evaluate.make_lanes(agent, tasks[0], 2, 1)
    start = evaluate.make_start(agent, lanes, ["identity"])
    state, inputs = jax.tree.map(lambda x: x[0], start(evaluate.trial_keys(tasks[0], 0)))
    assert inputs.shape[1] == 4 + 4 + 2 + 3  # with differences
    q = np.concatenate([state.env[0].qpos, state.env[0].qvel], 1)
    np.testing.assert_allclose(inputs[:, :4], np.sign(q) * np.log1p(np.abs(q)), rtol=1e-5)


def test_choice_of_tasks(run):
    agent = evaluate.load(run)
    assert evaluate.choose_tasks(agent) == (TASKS[0], *envs.HELD_OUT_TASKS)
    assert evaluate.choose_tasks(agent, held_out=("finger-spin",)) == (TASKS[0], "finger-spin")
    assert evaluate.choose_tasks(agent, ("dmc:finger-spin",)) == ("finger-spin",)
    assert evaluate.choose_tasks(agent, TASKS, ("finger-spin", TASKS[0])) == (*TASKS, "finger-spin")


# -- statistics ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("effect", [0, 60, 300])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_the_truth(seeds, effect):
    """Simulated tables of six tasks, 16 trials: rare large returns, and an effect of the seed common to the tasks."""
    rng, many = np.random.default_rng(seeds), 2000

    def runs():
        return rng.normal(size=(1, seeds, 1, many)) * effect + rng.normal(size=(6, seeds, 1, many)) * effect / 3

    chance = np.array([0.1, 0.2, 0.3, 0.5, 0.8, 0.9])[:, None, None, None]
    trials = 900 * (rng.random((6, seeds, 16, many)) < chance) + rng.normal(size=(6, seeds, 16, many)) * 20
    x, y = trials + runs(), trials + runs() + rng.normal(size=trials.shape) * 100  # two runs in the same trials
    truth = 900 * chance[:, 0, 0, 0]
    cases = [(report.estimate(x), truth.mean()), (report.estimate(x[2:3]), truth[2]),
             *zip(report.compare(x, y), (0, 0.5)), *zip(report.compare(x[3:4], y[3:4]), (0, 0.5))]
    if (seeds, effect) == (3, 300):  # whole seeds are better or worse: three such answers bound no probability
        del cases[3::2]
    for e, value in cases:
        assert e.over == "seeds"
        assert 0.92 <= ((e.low <= value) & (value <= e.high)).mean() <= 0.98


def test_statistics_equal_scipy():
    rng = np.random.default_rng(3)
    for n in (1, 2, 5, 8, 33):
        x = rng.normal(size=(4, n))
        np.testing.assert_allclose(report.iqm(x), scipy.stats.trim_mean(x, 0.25, axis=-1))
    x = rng.gamma(2.0, size=(3, 4, 5))
    s = report.statistics(x)
    np.testing.assert_allclose([s["mean"], s["iqm"]], [x.mean(), scipy.stats.trim_mean(x.ravel(), 0.25)])
    expected = scipy.stats.ttest_1samp(x.mean((0, 2)), 0).confidence_interval()
    np.testing.assert_allclose([s["low"], s["high"]], expected)
    difference, _ = report.compare(x, 2 * x[:, ::-1])
    expected = scipy.stats.ttest_rel(x.mean((0, 2)), 2 * x[:, ::-1].mean((0, 2))).confidence_interval()
    np.testing.assert_allclose([difference.low, difference.high], expected)


def test_reading_is_the_paired_difference(result):
    x, y = result.returns["memory, mode"], result.returns["blind, mode"]
    line = report.reading_table(result, [0, 1]).splitlines()[-1]
    expected = scipy.stats.ttest_rel(x.mean((0, 2)), y.mean((0, 2))).confidence_interval()
    difference = " ".join([report.number((x - y).mean()), f"[{', '.join(map(report.number, expected))}]"])
    assert line.startswith("| mean of 2") and line.endswith(f"{difference} |")


def test_one_seed_is_not_read_as_an_interval_over_runs():
    rng = np.random.default_rng(0)
    x = rng.gamma(2.0, size=(3, 1, 8)) * 100
    e = report.estimate(x)
    expected = scipy.stats.ttest_1samp(x[:, 0].mean(0), 0).confidence_interval()
    np.testing.assert_allclose([e.low, e.high], expected)
    assert e.over == "trials" and report.statistics(x)["interval_over"] == "trials"
    assert re.fullmatch(r"\d+ / \d+ \(trials [\d.]+ to [\d.]+\)", report.cell(x))
    assert re.fullmatch(r"\d+ / \d+ \[-?[\d.]+, \d+\]", report.cell(np.concatenate([x, 2 * x], 1)))
    assert np.isnan(report.estimate(x[:, :, :1]).low) and "(" not in report.cell(x[:, :, :1])


def test_probability_of_improvement_pairs_trials_and_shared_seeds():
    x = np.array([[[3.0, 1.0], [5.0, 5.0]]])
    y = np.array([[[2.0, 4.0], [5.0, 1.0], [9.0, 9.0]]])
    difference, better = report.compare(x, y)
    assert (difference.mean, better.mean, better.over) == (0.5, 0.625, "seeds")
    np.testing.assert_equal(report.compare(x, x)[1][:3], (0.5, np.nan, np.nan))  # no spread, no interval
    assert report.compare(x[:, :1], y)[0].over == "trials"


def test_estimates_leave_out_what_is_over_but_no_task():
    x = np.array([[[[1.0, 2.0], [3.0, np.nan]], [[5.0, 6.0], [7.0, np.nan]]]])
    mean, low, high, _ = report.estimate(x)
    np.testing.assert_array_equal(mean, [4, 4])
    assert (low < 4).all() and (high > 4).all()
    both = report.estimate(np.stack([x[0, ..., 0], np.full((2, 2), np.nan)]))  # a task that was not evaluated
    assert np.isnan(both.mean) and report.ranged(both) == "-"


# -- comparison ---------------------------------------------------------------------------------------------
def test_comparison_of_runs(tmp_path, capsys):
    """An LSTM trained on gaussian projections and a memoryless agent trained on none."""
    lstm = make_run(tmp_path / "lstm", train_lstm, num_seeds=2)
    none = make_run(tmp_path / "none", state_size=8, memory="none", projection="identity")
    found = evaluate.evaluate((lstm, none), tasks=TASKS, trials=3, sizes=(6,), out=tmp_path / "out")
    np.testing.assert_array_equal(found[1].returns["memory, mode"], found[1].returns["reset, mode"])
    starts = [r.curves["zero"][:, 0, :, 0] for r in found]  # the same trials, whatever the network
    np.testing.assert_allclose(*starts, rtol=1e-5)
    printed = capsys.readouterr().out
    last = printed[printed.rindex("## Tasks held out"):]  # the comparison ends with the held-out tasks
    assert TASKS[1] in last and TASKS[0] not in last
    with (tmp_path / "out" / "improvement.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["run"], r["other"], r["tasks"], r["interval_over"]) for r in rows] == [
        ("lstm", "none", "trained on", "trials"), ("lstm", "none", "held out", "trials")]  # one has a single seed
    for i, row in enumerate(rows):
        a, b = (r.returns["memory, sampled"][i, 0] for r in found)
        np.testing.assert_allclose(float(row["difference"]), (a - b).mean(), rtol=1e-4)
        np.testing.assert_allclose(float(row["better"]), (a > b).mean(), atol=1e-6)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "none: identity" in text and "lstm: gaussian" in text
    assert all((tmp_path / "out" / name).exists() for name in re.findall(r"!\[\w+\]\((.+?)\)", text))


def test_of_a_sweep_the_best_setting_is_evaluated(tmp_path, capsys):
    folder = make_run(tmp_path / "sweep", state_size=8, sweep=("lr=0.1,0.01",), num_seeds=2)
    with (folder / "metrics.csv").open("w") as file:
        file.write(f"update,seed,return/{TASKS[0]}\n" + "".join(
            f"1,{seed},{value}\n" for seed, value in zip((0, 1, 0, 1), (3, 4, 5, 6))))
    everything = evaluate.load(folder)
    assert "'lr': 0.01" in capsys.readouterr().out
    assert everything.seeds == [0, 1]
    assert {x.shape[0] for x in jax.tree.leaves(everything.params)} == {2}


# -- replays ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", dmc.TASKS)
def test_poses_and_shapes_equal_the_model(task):
    """Bodies as physics.py places them, outlines as C MuJoCo places the geoms, at random joint positions."""
    model = mujoco.MjModel.from_xml_string(dmc.TASKS[task].model)
    scene = replay.SCENES.get(task, replay.SCENES.get(task.split("-")[0]))
    assert len(scene.obs) >= dmc.TASKS[task].obs_dim
    axes = list(scene.axes)
    qpos = np.random.default_rng(0).uniform(-1, 1, (4, model.nq))
    pose = replay.poses(model, qpos, scene.axes)
    kinematics, data = physics.make_kinematics(model), mujoco.MjData(model)
    rest = np.asarray(kinematics(jnp.asarray(model.qpos0, jnp.float32)).xmat)
    geoms = {"CAPSULE": "capsule", "SPHERE": "circle", "CYLINDER": "circle", "BOX": "box"}
    drawn = [[s for s in body["shapes"]] for body in replay.shapes(model, replay.Scene(scene.axes, (), ()))]
    assert sum(map(len, drawn)) == model.ngeom - (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE).sum()
    for q, p in zip(qpos, pose):
        k = kinematics(jnp.asarray(q, jnp.float32))
        np.testing.assert_allclose(p[:, :2], np.asarray(k.xpos)[1:, axes], atol=1e-5)
        turn = np.einsum("bij,bkj->bik", np.asarray(k.xmat), rest)[1:][:, axes][:, :, axes]
        c, s = np.cos(p[:, 2]), np.sin(p[:, 2])
        expected = np.array([[c, -s], [s, c]]).transpose(2, 0, 1)
        np.testing.assert_allclose(turn, expected, atol=1e-5)
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        place = {b + 1: lambda v, t=turn[b], o=p[b, :2]: o + t @ np.array(v) for b in range(model.nbody - 1)}
        for b in place:
            for shape, g in zip(drawn[b], range(model.body_geomadr[b], model.ngeom)):
                assert shape["kind"] == geoms[mujoco.mjtGeom(model.geom_type[g]).name[7:]]
                if shape["kind"] == "capsule":
                    reach = data.geom_xmat[g].reshape(3, 3)[axes, 2] * model.geom_size[g, 1]
                    ends = data.geom_xpos[g, axes] + np.stack([-reach, reach])
                    np.testing.assert_allclose([place[b](shape[e]) for e in "ab"], ends, atol=1e-5)
                else:
                    np.testing.assert_allclose(place[b](shape["c"]), data.geom_xpos[g, axes], atol=1e-5)


def test_replay_page(run):
    """The page of a task with a target: nothing from a network, and the data that were recorded."""
    agent = evaluate.load(run)
    head = agent.params["params"]["policy_head"] | {"kernel": 1e3 * agent.params["params"]["policy_head"]["kernel"]}
    params = agent.params | {"params": agent.params["params"] | {"policy_head": head}}  # what it sees decides
    data = evaluate.record_trial(agent._replace(params=params), "reacher-easy", 3, 1, "memory, mode")
    path = run / "replay.html"
    replay.write(data, path)
    text = path.read_text()
    assert path.stat().st_size < 3e6
    assert not re.search(r"https?:|//[a-z]+\.|src\s*=|<link|@import|url\(|fetch\(|XMLHttp|\bimport\b", text)
    page = json.loads(re.search(r"const R = (\{.*\});\n", text).group(1))
    model = mujoco.MjModel.from_xml_string(dmc.TASKS["reacher-easy"].model)
    kinematics = jax.jit(jax.vmap(physics.make_kinematics(model)))
    assert [side["name"] for side in page["sides"]] == ["memory on", "memory reset at every step"]
    for side, recorded in zip(page["sides"], data["sides"]):
        pose = np.array(side["pose"]).reshape(1000, 3, 3)
        k = kinematics(jnp.asarray(recorded["qpos"], jnp.float32))
        np.testing.assert_allclose(pose[..., :2], k.xpos[:, 1:, :2], atol=2e-4)
        np.testing.assert_allclose(np.cos(pose[..., 2]), k.xmat[:, 1:, 0, 0], atol=2e-4)
        control = np.clip(recorded["acts"] @ data["act_matrix"].T, -1, 1)
        np.testing.assert_allclose(side["control"], control, atol=1e-3)
        # what was seen is what the recorded state looks like through the recorded matrix
        env, state = envs.make("reacher-easy")[0], dmc.DMCState(*[None] * 3)
        velocity = np.diff(recorded["qpos"], axis=0) / 0.02  # one step later, semi-implicit Euler's velocity
        state = state.replace(qpos=recorded["qpos"][1:], qvel=velocity, target=recorded["target"][1:])
        obs = jax.vmap(lambda s, env=env: env.get_obs(s))(jax.tree.map(jnp.float32, state))
        seen = np.asarray(obs, np.float64) @ data["obs_matrix"].T
        seen = np.sign(seen) * np.log1p(np.abs(seen))
        np.testing.assert_allclose(np.array(side["sees"])[1:], seen, atol=5e-3)
        reach = np.linalg.norm(pose[:, 2, :2] - np.array(side["target"]), axis=-1)  # finger to target
        paid = np.array(side["reward"])[:-1] > 0  # the reward of a step is that of the state after it
        clear = np.abs(reach[1:] - 0.06) > 1e-3
        np.testing.assert_array_equal(paid[clear], (reach[1:] < 0.06)[clear])
    first = [np.array(side["pose"][0]) for side in page["sides"]]
    np.testing.assert_array_equal(*first)  # the same trial
    assert not np.array_equal(page["sides"][0]["pose"], page["sides"][1]["pose"])


def test_a_hostile_run_name_stays_text(run, tmp_path):
    """Nothing in the embedded data can open a tag or a comment, or end the script."""
    data = evaluate.record_trial(evaluate.load(run), TASKS[0], 1, 1, "memory, mode")
    name = "<!--<script>alert(1)</script>-->"
    replay.write(data | {"run": name}, tmp_path / "replay.html")
    text = (tmp_path / "replay.html").read_text()
    embedded = re.search(r"const R = (\{.*\});\n", text).group(1)
    assert "<" not in embedded and json.loads(embedded)["run"] == name
    assert "<!--" not in text and text.count("<script") == text.count("</script") == 1


def test_replay_is_a_trial_of_the_table(run, result):
    """The recorded trial is that of median return, and both its sides have the returns of the table."""
    data = evaluate.record_trial(evaluate.load(run), TASKS[0], 3, 1, "memory, mode")
    for side, policy in zip(data["sides"], ("memory, mode", "reset, mode")):
        expected = result.curves[policy][0, 0, data["trial"], :3]
        found = side["reward"][:150].reshape(3, 50).mean(1)
        np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-3)
    median = np.median(result.returns["memory, mode"][0, 0])
    np.testing.assert_allclose(data["sides"][0]["reward"].sum(), median, rtol=0.1, atol=1)


# -- refusals -----------------------------------------------------------------------------------------------
def refused(monkeypatch, capsys, *flags):
    """Exit code 2 and one sentence on the last line."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_refusals(run, gym_run, tmp_path, monkeypatch, capsys):
    def refusal(*flags):
        return refused(monkeypatch, capsys, *flags)

    assert "not a run folder" in refusal(tmp_path / "nothing")
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "checkpoints")
    assert "holds no checkpoint" in refusal(bare)
    (bare / "checkpoints").mkdir()
    assert "no usable checkpoint" in refusal(bare)
    (bare / "config.json").write_text("[1, 2]")
    assert "not written by a trainer" in refusal(bare)
    (bare / "config.json").write_text('{"trainer": "train_gpt", "config": {}}')
    assert "train_gpt.py" in refusal(bare)
    (bare / "config.json").write_text('{"trainer": "train_s5", "config": {"depth": 3}, "options": {}}')
    assert "depth" in refusal(bare)
    other = tmp_path / "other"  # a checkpoint that does not belong to its config.json
    shutil.copytree(run, other)
    saved = json.loads((other / "config.json").read_text())
    saved["config"]["width"] = 16
    (other / "config.json").write_text(json.dumps(saved))
    assert "no usable checkpoint" in refusal(other)
    assert "finger-spin" in refusal(run, "--tasks", "finger-spine")
    assert "finger-spin" in refusal(run, "--replay", "finger-spine")
    assert "finger-spin" in refusal(run, "--held-out", "finger-spine")
    small = make_run(tmp_path / "small", state_size=8, obs_size=6)
    assert "needs a network trained with --obs-size 12" in refusal(small, "--held-out", "finger-turn_easy")
    assert "size 13" in refusal(run, "--sizes", "13")
    assert "trials" in refusal(run, "--trials", "0")
    assert "replays draw DMControl tasks only" in refusal(gym_run, "--replay", "CartPole-v1")
    assert "not from DMControl" in refusal(gym_run, "--tasks", "finger-spin")
    assert "size 3" in refusal(gym_run, "--sizes", "3")


def test_imports_run_one_way():
    """trainer -> envs -> dmc -> physics, experiment -> report; evaluate finds the trainer by name; no circle."""
    def imported(name):
        found = re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        return {f for f in found if (ROOT / f"{f}.py").exists()}

    assert imported("evaluate") == {"dmc", "envs", "experiment", "replay", "report"}
    assert imported("experiment") == {"report"}
    assert imported("report") == set() and imported("replay") == {"dmc"}
    assert imported("envs") == {"dmc", "sysid"} and imported("dmc") == {"physics"}
    assert imported("physics") == imported("sysid") == set()
    assert "evaluate" not in imported("train_s5") | imported("train_lstm")
