"""agent.py: what it makes of observations equals training's, in environments of any kind."""

import csv
import functools
import os
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import make_run

import agent as agent_file
import envs
import sysid

ROOT = Path(__file__).resolve().parent.parent
SHORT = dict(episodes_per_trial=2, env_kwargs=("max_steps_in_episode=7",))
KINDS = {  # settings of a run: projected, with vectors or sysid; bare, discrete; permuted, discrete; bare, continuous
    "DMControl": dict(**SHORT),
    "DMControl, sysid": dict(memory="s5", sysid=True, **SHORT),
    "CartPole": dict(env=("CartPole-v1",), **SHORT),
    "projected CartPole": dict(env=("CartPole-v1",), projection="gaussian", obs_size=6, sysid=True, **SHORT),
    "Pendulum": dict(env=("Pendulum-v1",), **SHORT),
    "CartPole, actions of different lengths": dict(env=("CartPole-v1",), action_repeat=(1, 2), **SHORT)}
N, STEPS = 3, 18


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_acts_on_the_inputs_of_training(kind, tmp_path):
    """Every field of every observation, in three trials of two episodes, and the actions that follow."""
    agent = agent_file.load(make_run(tmp_path / kind, **KINDS[kind]))
    trials = envs.Trials(agent.config.env, N, **agent.trial_kwargs)
    projected = trials.projection != "none"
    assert STEPS > 2 * 7 and STEPS > 2 * sysid.FIT_EVERY and bool(trials.sysid) == agent.config.sysid

    def linear(state, obs):
        return trials.project(state.obs_matrix, obs)

    def first(state):
        return linear(state, trials.flat_obs(0, jax.vmap(trials.envs[0].get_obs)(state.env[0])))

    @jax.jit
    def step(state, bins, t):
        final = trials.advance(jax.random.split(state.key, 3)[1], state, bins)[1]  # as in trials.step
        after, observation, transition = trials.step(state, bins, t)
        return after, observation, transition, linear(state, final), first(after)

    @jax.jit
    def expected_action(hidden, observation, reset):
        hidden, pi, _ = agent.network.apply(*agent.of_seed(0), hidden, observation, reset, critic=False)
        return hidden, pi.mode()

    state, observation = trials.reset(jax.random.PRNGKey(1), stagger=False)
    hidden, inputs = agent.start(first(state))
    other, ends = agent.network.zero_state((N,)), 0
    for t in range(STEPS):
        for name, mine, training in zip(observation._fields, inputs.observation, observation):
            assert (mine is None) == (training is None)
            if mine is not None:
                np.testing.assert_allclose(mine, training, rtol=2e-4, atol=2e-4, err_msg=f"{name} at step {t}")
        mode, _ = agent.act(hidden, inputs, deterministic=True)
        action, hidden = agent.act(hidden, inputs, jax.random.PRNGKey(t))
        other, expected = expected_action(other, observation, inputs.reset)
        np.testing.assert_array_equal(mode.bins, expected)
        control = trials.control(state.act_matrix, action.bins)
        value = action.value  # what the docstring of Action says of it
        if projected and trials.discrete:
            value = np.take_along_axis(np.asarray(state.act_matrix), np.asarray(value)[:, None], 1)[:, 0]
        elif projected:
            value = np.clip(np.einsum("nij,nj->ni", state.act_matrix, value), -1, 1)
        np.testing.assert_allclose(value, control, rtol=1e-5, atol=1e-6)
        state, observation, transition, final, obs = step(state, action.bins, t)
        lasted = None if transition.dt is None else transition.dt * trials.time_unit
        inputs = agent.observe(inputs, action, transition.reward, obs, transition.episode_end, final_obs=final,
                               lasted=lasted)
        np.testing.assert_array_equal(inputs.reset, transition.trial_end)
        ends += int(transition.trial_end.sum())
    assert ends >= N  # of trials, so that hidden state and sysid started anew


@pytest.fixture(scope="module")
def agent_with_sysid(tmp_path_factory):
    """An agent that observes the features of sysid.py."""
    return agent_file.load(make_run(tmp_path_factory.mktemp("runs") / "run", sysid=True, **SHORT))


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_a_number_that_cannot_be_used_does_not_stay_in_the_hidden_state(poison, agent_with_sysid):
    """In an observation or a reward. The step is left out by sysid, as a diverged step of training."""
    agent = agent_with_sysid
    hidden, inputs = agent.start(jnp.ones((3, 12)))
    action, _ = agent.act(hidden, inputs, deterministic=True)
    obs, reward = jnp.full((3, 12), 0.5).at[0, 1].set(poison), jnp.ones(3).at[1].set(poison * np.inf)
    after = agent.observe(inputs, action, reward, obs, jnp.zeros(3, bool))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after.observation, after.state.sysid)))
    np.testing.assert_array_equal(after.state.sysid.steps[:, 0], [0, 0, 1])
    np.testing.assert_array_equal(after.observation.context[:, -3], [0, 0, 1])


def test_without_a_final_observation_only_sysid_loses_a_step(agent_with_sysid):
    """The first observation of an episode is not taken for the end of the one before."""
    agent = agent_with_sysid
    obs = jnp.asarray(np.random.default_rng(0).normal(size=(6, 1, 12)), jnp.float32)
    _, inputs = agent.start(obs[0])
    action, _ = agent.act(agent.network.zero_state((1,)), inputs, deterministic=True)
    step = functools.partial(agent.observe, action=action, reward=jnp.ones(1))
    inputs = step(inputs, obs=obs[1], episode_end=jnp.zeros(1, bool))
    without = step(inputs, obs=obs[2], episode_end=jnp.ones(1, bool))
    np.testing.assert_array_equal(without.state.sysid.keys, inputs.state.sysid.keys)
    given = step(inputs, obs=obs[2], episode_end=jnp.ones(1, bool), final_obs=obs[3])
    assert not np.array_equal(given.state.sysid.keys, inputs.state.sysid.keys)
    for name in ("projected", "change", "context"):
        np.testing.assert_array_equal(getattr(without.observation, name), getattr(given.observation, name))
    new_trial = step(inputs, obs=obs[2], episode_end=jnp.ones(1, bool), trial_end=jnp.ones(1, bool))
    assert bool(new_trial.reset) and not bool(without.reset) and not new_trial.state.sysid.keys.any()


def test_wrong_calls_are_refused_in_a_sentence(tmp_path):
    """Mistakes of somebody who knows other libraries: each sentence says what to do."""
    agent = agent_file.load(make_run(tmp_path / "run"))
    for shape in ((3, 5), (12,), (3, 12, 1), ()):
        with pytest.raises(ValueError, match=r"expected observations \(N, 12\) .*obs\[None\]; project them first"):
            agent.start(jnp.zeros(shape))
    hidden, inputs = agent.start(np.zeros((3, 12)))
    action, _ = agent.act(hidden, inputs, deterministic=True)
    with pytest.raises(ValueError, match="needs a key"):
        agent.act(hidden, inputs)
    with pytest.raises(ValueError, match="inputs must be the Inputs that start or .* got an array"):
        agent.act(hidden, jnp.zeros((3, 12)), deterministic=True)
    for wrong in (None, jnp.zeros((3, 8)), agent.start(np.zeros((2, 12)))[0]):
        with pytest.raises(ValueError, match="hidden must be the hidden state that start or the last act returned"):
            agent.act(wrong, inputs, deterministic=True)
    good = dict(reward=np.zeros(3), obs=np.zeros((3, 12)), episode_end=np.zeros(3, bool))
    agent.observe(inputs, action, **good)
    with pytest.raises(ValueError, match="action must be the Action that act returned, got an array"):
        agent.observe(inputs, action.value, **good)
    with pytest.raises(ValueError, match="inputs must be the Inputs .* got NoneType"):
        agent.observe(None, action, **good)
    for wrong in (dict(reward=0.0), dict(reward=np.zeros((3, 1))), dict(episode_end=False),
                  dict(trial_end=True), dict(obs=np.zeros((2, 12)))):
        with pytest.raises(ValueError, match=r"must be of as many environments as start was given, \(3,\)"):
            agent.observe(inputs, action, **good | wrong)


def test_wrong_observations_of_an_unprojected_agent_are_refused(tmp_path):
    agent = agent_file.load(make_run(tmp_path / "run", env=("CartPole-v1",), env_kwargs=()))
    for wrong in (np.zeros(4), np.zeros((3, 5)), [np.zeros((3, 4)), np.zeros((3, 4))]):
        with pytest.raises(ValueError, match=r"expected observations \(N, 4\) of N environments, got"):
            agent.start(wrong)
    with pytest.raises(ValueError) as refusal:
        agent.start(np.zeros(4))
    assert str(refusal.value).endswith("of one give obs[None]")  # there is nothing to project


def damaged(change):
    """Edits of the contents of an agent.msgpack: {what: function that changes them}."""
    return pytest.param(change, id=change.__name__)


def update(where, **values):
    def change(saved):
        (saved if where is None else saved[where]).update(values)
    change.__name__ = f"{where or 'top'}: {values}"[:60]
    return damaged(change)


def fewer(*path):
    def change(saved):
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]
    change.__name__ = f"without {'/'.join(path)}"
    return damaged(change)


def other(function, *path):
    def change(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = function(saved[path[-1]])
    change.__name__ = f"other {'/'.join(path)}"
    return damaged(change)


@pytest.mark.parametrize("change", [
    *(update(None, trainer=x) for x in (5, None, "agent", "../agent", "nothing")),
    *(update(None, config=x) for x in (None, [], "text", {})), *(update(None, update=x) for x in ("x", None)),
    *(update(None, agents=x) for x in (None, [], [{}], 3, [{"seed": "x", "setting": {}}], [None])),
    *(update("config", width=x) for x in ("64", -1, 2.5, None, 16)),
    *(update("config", env=x) for x in ([], [3], ["finger-spine"], None, "finger-spin")),
    update("config", projection="round"), update("config", no_such_setting=1),
    update("config", action_repeat=[0]), update("config", memory="s5"), update("config", obs_size=10**9),
    update(None, params={}), update(None, params="text"), update(None, norm={}), update(None, norm=None),
    fewer("trainer"), fewer("config"), fewer("agents"), fewer("update"), fewer("params"), fewer("norm"),
    fewer("norm", "projected"), fewer("params", "params", "actor"), fewer("norm", "sysid", "var"),
    other(lambda x: x[..., :-1], "norm", "projected", "mean"),
    other(lambda x: x[..., :-1], "params", "params", "actor", "kernel"),
    other(lambda x: np.concatenate([x, x]), "params", "params", "actor", "kernel"),
    other(lambda x: x.astype(complex), "params", "params", "actor", "kernel"),
    other(lambda x: "text", "params", "params", "actor", "kernel")])
def test_an_edited_file_is_refused_in_a_sentence(change, good, tmp_path):
    """Whatever was edited, the error names the file, and no agent is returned."""
    saved = flax.serialization.msgpack_restore(good.read_bytes())
    change(saved)
    path = tmp_path / "agent.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(saved))
    with pytest.raises(ValueError) as refusal:
        agent_file.load(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(part, good, tmp_path):
    path = tmp_path / "agent.msgpack"
    data = good.read_bytes()
    path.write_bytes(data[:int(part * len(data))])
    with pytest.raises(ValueError, match="was not written by this version"):
        agent_file.load(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs") / "good") / "agent.msgpack"
    assert agent_file.load(path).seeds == [0]
    return path


@pytest.mark.parametrize("table", [
    "", "lr,return\n", "lr,return\nfast,1\n", "return\n3\n", "\x00\xff", "lr,return\n7,1\n"])
def test_an_edited_ranking_is_refused(table, tmp_path):
    folder = make_run(tmp_path / "sweep", settings=({"lr": 0.1}, {"lr": 0.01}))
    (folder / "sweep.csv").write_text(table, encoding="latin-1")
    with pytest.raises(ValueError, match="choose a --setting: lr=0.1; lr=0.01"):
        agent_file.load(folder)


def test_actions_of_different_lengths_need_their_lengths(tmp_path):
    """The agent then observes what training's own trials give it."""
    agent = agent_file.load(make_run(tmp_path / "run", action_repeat=(1, 3), **SHORT))
    hidden, inputs = agent.start(np.ones((2, 12)))
    action, _ = agent.act(hidden, inputs, deterministic=True)
    step = functools.partial(agent.observe, inputs, action, np.ones(2), np.ones((2, 12)), np.zeros(2, bool))
    with pytest.raises(ValueError, match="needs lasted="):
        step()
    np.testing.assert_allclose(step(lasted=np.array([1, 3])).observation.dt, [0.5, 1.5])


def test_setting_and_seed_choose_the_agent(tmp_path, capsys):
    settings = ({"lr": 0.1, "gamma": 0.9}, {"lr": 0.01, "gamma": 0.9})
    folder = make_run(tmp_path / "sweep", settings=settings, seeds=(4, 5))

    def kernel(agent):
        return np.asarray(agent.params["params"]["policy_head"]["kernel"])

    chosen = agent_file.load(folder, setting={"lr": 1e-2})
    assert chosen.seeds == [4, 5]
    one = agent_file.load(folder / "agent.msgpack", setting={"lr": 0.01}, seed=5)
    assert one.seeds == [5]
    np.testing.assert_array_equal(kernel(one)[0], kernel(chosen)[1])
    with pytest.raises(ValueError, match="choose a --setting: gamma=0.9,lr=0.1; gamma=0.9,lr=0.01"):
        agent_file.load(folder)
    with (folder / "sweep.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("lr", "gamma", "return"), (0.01, 0.9, 3), (0.1, 0.9, 2)])
    np.testing.assert_array_equal(kernel(agent_file.load(folder)), kernel(chosen))
    assert "best setting is evaluated: gamma=0.9,lr=0.01" in capsys.readouterr().out
    for wrong in (dict(setting={"lr": 0.5}), dict(seed=6), dict(setting={"clip_eps": 0.1})):
        with pytest.raises(ValueError, match="holds no such agent; settings: gamma=0.9,lr=0.1.*; seeds: 4, 5"):
            agent_file.load(folder, **wrong)


def test_settings_that_are_close_are_told_apart(tmp_path):
    folder = make_run(tmp_path / "sweep", settings=({"gamma": 0.99999}, {"gamma": 0.999999}), seeds=(4,))
    for gamma in (0.99999, 0.999999):
        assert agent_file.load(folder, setting={"gamma": gamma}).settings == [{"gamma": gamma}]


@pytest.mark.parametrize("environment", ["dm_control", "dmc"])
def test_the_example_plays_cartpole_through_a_projection(environment, tmp_path):
    folder = make_run(tmp_path / "run", env_kwargs=())
    if environment == "dm_control":
        pytest.importorskip("dm_control")
    else:  # where dm_control cannot be imported
        (tmp_path / "dm_control.py").write_text("raise ImportError\n")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "act.py", folder], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False)
    assert done.returncode == 0, done.stderr
    assert 0 <= float(done.stdout.rsplit(maxsplit=1)[1]) <= 1000
    assert f"{environment}'s" in done.stdout
    assert len((ROOT / "examples" / "act.py").read_text().splitlines()) <= 40
