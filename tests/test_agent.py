"""agent.py: what it makes of observations equals training's, in environments of any kind."""

import csv
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import make_run

import agent as agent_file
import envs
import sysid

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("quick")
SHORT = dict(episodes_per_trial=2, env_kwargs=("max_steps_in_episode=7",))
KINDS = {  # settings of a run: projected, with sysid; bare and discrete; permuted and discrete; bare and continuous
    "DMControl": dict(**SHORT),
    "CartPole": dict(env=("CartPole-v1",), **SHORT),
    "projected CartPole": dict(env=("CartPole-v1",), projection="gaussian", obs_size=6, **SHORT),
    "Pendulum": dict(env=("Pendulum-v1",), **SHORT)}
N, STEPS = 3, 18


@pytest.mark.parametrize("kind", KINDS)
def test_an_agent_acts_on_the_inputs_of_training(kind, tmp_path):
    """Every field of every observation, in three trials of two episodes, and the actions that follow."""
    agent = agent_file.load(make_run(tmp_path / kind, **KINDS[kind]))
    trials = envs.Trials(agent.config.env, N, **agent.trial_kwargs)
    projected = trials.projection != "none"
    assert STEPS > 2 * 7 and STEPS > 2 * sysid.FIT_EVERY and bool(trials.sysid) == projected

    def linear(state, obs):
        return trials.project(state.obs_matrix, obs)

    def first(state):
        return linear(state, trials.flat_obs(0, jax.vmap(trials.envs[0].get_obs)(state.env[0])))

    @jax.jit
    def step(state, bins, t):
        final = trials.advance(jax.random.PRNGKey(0), state, bins)[1]
        after, observation, transition = trials.step(state, bins, t)
        return after, observation, transition, linear(state, final), first(after)

    @jax.jit
    def expected_action(hidden, observation, reset):
        act = functools.partial(agent.network.apply, agent.first[0], critic=False, method="step")
        hidden, pi, _ = act(agent.first[2], agent.first[1], hidden, observation, reset)
        return hidden, pi.mode()

    state, observation = trials.reset(jax.random.PRNGKey(1), stagger=False)
    hidden, inputs = agent.start(first(state))
    other, ends = agent.network.zero_state((N,)), 0
    for t in range(STEPS):
        for name, mine, training in zip(observation._fields, inputs.observation, observation):
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
        inputs = agent.observe(inputs, action, transition.reward, obs, transition.episode_end, final_obs=final)
        np.testing.assert_array_equal(inputs.reset, transition.trial_end)
        ends += int(transition.trial_end.sum())
    assert ends >= N  # of trials, so that hidden state and sysid started anew


def test_without_a_final_observation_only_sysid_loses_a_step(tmp_path):
    """The first observation of an episode is not taken for the end of the one before."""
    agent = agent_file.load(make_run(tmp_path / "run", **SHORT))
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
    agent = agent_file.load(make_run(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"expected observations \(N, 12\), got \(3, 5\)"):
        agent.start(jnp.zeros((3, 5)))
    hidden, inputs = agent.start(jnp.zeros((3, 12)))
    with pytest.raises(ValueError, match="needs a key"):
        agent.act(hidden, inputs)


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
