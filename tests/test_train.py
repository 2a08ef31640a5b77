"""The trainers and their runs: GAE, resume, sweeps, devices, command line. All trainers keep the same promises."""

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import evaluate
import experiment
import train_lstm
import train_s5
import train_transformer

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).resolve().parent.parent
TRAINERS = (train_s5, train_lstm, train_transformer)
SMALL = dict(width=8, num_envs=8, num_steps=16, num_minibatches=2, update_epochs=2, log_every=2, layers=1,
             action_repeat=1)
SIZES = ["--width", "8", "--num-envs", "8", "--num-steps", "16", "--num-minibatches", "2", "--layers", "1"]
FLAGS = [*SIZES, "--no-evaluate", "--no-tensorboard"]
AS_USED = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # equal bits are promised of such programs
bitwise = jax.tree_util.Partial(jax.tree.map, np.testing.assert_array_equal)


def small(trainer, **changes):
    return trainer.Config(**(SMALL | dict(env=("CartPole-v1",), total_timesteps=512) | changes))


def run(trainer, options, **changes):
    """A small run, its options given as a dictionary."""
    options = experiment.Options(tensorboard=False, **options)
    return experiment.run(trainer.make_train, small(trainer, **changes), options)


def resume(trainer, folder):
    return experiment.run(trainer.make_train, *experiment.read_run(folder, trainer.Config))


def command(trainer, *flags, **kwargs):
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | kwargs.pop("env", {})
    return subprocess.run([sys.executable, str(ROOT / f"{trainer}.py"), *flags], capture_output=True, text=True,
                          env=env, **kwargs)


# -- the three trainers -------------------------------------------------------------------------------------
def outside_memory(trainer):
    """Source lines without the usage docstring, the memory section and what only that imports."""
    text = (ROOT / f"{trainer}.py").read_text()
    text = text[text.index('"""\n', 3):].replace("from s5 import S5\n", "")
    start = text.index("# ---- Memory: the only section")
    return (text[:start] + text[text.index("# ---- Configuration"):]).splitlines()


def test_trainers_differ_in_memory_only():
    assert outside_memory("train_s5") == outside_memory("train_lstm") == outside_memory("train_transformer")


@pytest.mark.parametrize("trainer,files", [("train_s5", ("s5.py", "envs.py", "dmc.py", "physics.py", "sysid.py")),
                                           ("train_lstm", ("envs.py", "dmc.py", "physics.py", "sysid.py")),
                                           ("train_transformer", ("envs.py", "dmc.py", "physics.py", "sysid.py"))])
def test_runs_when_copied_alone(trainer, files, tmp_path):
    """Without experiment.py it prints a table, with it and report.py makes a run folder. The same returns."""
    def train(*flags):
        done = subprocess.run([sys.executable, f"{trainer}.py", "--env", "CartPole-v1", "--total-timesteps", "2560",
                               *SIZES, *flags], cwd=tmp_path, capture_output=True, text=True, env=clean)
        assert done.returncode == 0, done.stderr
        return done.stdout

    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    for name in (f"{trainer}.py", *files):
        shutil.copy(ROOT / name, tmp_path)
    head, *lines = [line.split("\t") for line in train().splitlines()]
    assert head == ["steps", "CartPole-v1"] and [int(steps) for steps, _ in lines] == [1280, 2560]
    assert not (tmp_path / "runs").exists()
    for name in ("experiment.py", "report.py"):
        shutil.copy(ROOT / name, tmp_path)
    assert "evaluation left out" in train()
    [folder] = tmp_path.glob("runs/*")
    returns = np.array([row["return/CartPole-v1"] for row in experiment.read_metrics(folder)]).reshape(2, 10)
    np.testing.assert_allclose([float(value) for _, value in lines], np.nanmean(returns, 1), atol=0.02)


def test_presets():
    """Config() has the sizes that the command line has without flags; --preset and Python choose the same others."""
    for trainer in TRAINERS:
        config, options = experiment.parse_flags(trainer.Config, args=[])
        assert options.preset == "cpu" and config == trainer.Config() == experiment.preset(trainer.Config, "cpu")
        large, options = experiment.parse_flags(trainer.Config, args=["--preset", "accelerator", "--num-envs", "1536"])
        assert options.preset == "accelerator"
        assert large == experiment.preset(trainer.Config, "accelerator", num_envs=1536)
        assert large.width > config.width and large.total_timesteps > config.total_timesteps


def test_parameter_counts_match():
    """The baselines' hidden sizes are chosen so that all memories have as many parameters, within 2 %."""
    for width in (64, 256):
        counts = []
        for trainer, changes in [(trainer, {}) for trainer in TRAINERS] + [(train_lstm, {"cell": "gru"})]:
            preset = "accelerator" if width == 256 else "cpu"
            config = experiment.preset(trainer.Config, preset, width=width, **changes)
            memory = trainer.make_memory(config, jnp.float32)
            x, reset = jnp.zeros((1, 1, width)), jnp.zeros((1, 1), bool)
            shapes = jax.eval_shape(memory.init, jax.random.PRNGKey(0), memory.zero_state((1,)), x, reset)
            counts.append(sum(s.size for s in jax.tree.leaves(shapes)))
        assert max(abs(count / counts[0] - 1) for count in counts) < 0.02, counts


@pytest.mark.parametrize("trainer,changes", [*((trainer, {}) for trainer in TRAINERS), (train_lstm, {"cell": "gru"})])
def test_step_equals_sequence(trainer, changes):
    """Acting step by step and replaying the sequence give the same policy and value, resets included."""
    config = small(trainer, layers=2, **changes)
    network = trainer.ActorCritic(config, 2, False, (0, -1, -1, -1, 0))
    T, B = 12, 3
    key = jax.random.PRNGKey(0)
    x = jax.random.normal(key, (T, B, 5))
    reset = jax.random.bernoulli(key, 0.3, (T, B))
    memory = trainer.make_memory(config, jnp.float32).zero_state((B,))
    params = network.init(key, memory, x, reset)
    _, pi, value = network.apply(params, memory, x, reset)
    prepared = network.apply(params, method="prepare")
    for t in range(T):
        memory, step_pi, step_value = network.apply(params, prepared, memory, x[t], reset[t], method="step")
        np.testing.assert_allclose(step_value, value[t], atol=1e-5)
        np.testing.assert_allclose(step_pi.choice.distribution.logits, pi.choice.distribution.logits[t], atol=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_policy_never_sees_what_the_critic_sees(trainer):
    network = trainer.ActorCritic(small(trainer, layers=1), 2, False, (0, -1, -1, -1, 0))
    x = jax.random.normal(jax.random.PRNGKey(0), (6, 3, 9))  # 5 inputs, 4 for the critic alone
    reset, memory = jnp.zeros((6, 3), bool), trainer.make_memory(network.config, jnp.float32).zero_state((3,))
    params = network.init(jax.random.PRNGKey(1), memory, x, reset)
    other = x.at[..., 5:].add(1.0)
    (state, pi, value), (other_state, other_pi, other_value) = (
        network.apply(params, memory, inputs, reset) for inputs in (x, other))
    jax.tree.map(np.testing.assert_array_equal, (state, pi.choice.distribution.logits),
                 (other_state, other_pi.choice.distribution.logits))
    assert (value != other_value).all()
    prepared = network.apply(params, method="prepare")
    _, without, _ = network.apply(params, prepared, memory, x[0, :, :5], reset[0], method="act")
    np.testing.assert_allclose(without.choice.distribution.logits, pi.choice.distribution.logits[0], atol=1e-5)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_observations_do_not_drown_actions_in_the_memory(trainer):
    """Two hundred numbers of projected observations move its input less than five others do; around it all pass."""
    moved = {}
    for projection in ("gaussian", "none"):
        config = small(trainer, env=("reacher-easy",), projection=projection, layers=1)
        network = trainer.ActorCritic(config, 2, False, (-1,) * 5 + (0,) * 200)
        x = jax.random.normal(jax.random.PRNGKey(0), (50, 3, 205))
        memory, reset = trainer.make_memory(config, jnp.float32).zero_state((3,)), jnp.zeros((50, 3), bool)
        params = jax.jit(network.init)(jax.random.PRNGKey(1), memory, x, reset)
        read = jax.tree_util.Partial(network.apply, params, memory=lambda x: (x, x), method="perceive")
        (own, _), (seen, heads) = read(x.at[..., 5:].set(0)), read(x.at[..., :5].set(0))
        moved[projection] = own.std((0, 1)).mean() / seen.std((0, 1)).mean()
        assert heads[..., config.width:].std((0, 1)).mean() > 0.05
    assert moved["gaussian"] > 5 and 0.5 < moved["none"] < 2


def test_actions_last_two_steps_of_dmcontrol():
    for env, repeat, lasts in (("reacher-easy", 0, 2), ("CartPole-v1", 0, 1), ("reacher-easy", 3, 3)):
        config = train_s5.Config(**SMALL | dict(env=(env,), action_repeat=repeat))
        assert train_s5.make_lanes(config).action_repeat == lasts
        assert config.steps_per_update == lasts * config.num_envs * config.num_steps


def attention_memory(layers=1, window=5, T=23, B=3):
    """A small transformer memory, its parameters and zero state, inputs (T, B, 16)."""
    config = small(train_transformer, width=16, layers=layers, window=window, hidden_size=16)
    memory = train_transformer.make_memory(config, jnp.float32)
    x = jax.random.normal(jax.random.PRNGKey(1), (T, B, 16))
    state = memory.zero_state((B,))
    return memory, memory.init(jax.random.PRNGKey(0), state, x, jnp.zeros((T, B), bool)), state, x


def test_attention_sees_its_window_only():
    """A change at time t reaches the next window - 1 steps and none after them."""
    memory, params, state, x = attention_memory()
    no = jnp.zeros(x.shape[:2], bool)
    before, after = (memory.apply(params, state, inputs, no)[1] for inputs in (x, x.at[7].add(1)))
    assert np.flatnonzero((before != after).any((1, 2))).tolist() == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("chunk", (4, 64))
def test_attention_cache_carries_over_and_forgets_at_resets(chunk, monkeypatch):
    """Sequence, steps and sequences cut anywhere agree, in chunks or whole; a trial gives what it gives alone."""
    monkeypatch.setattr(train_transformer, "CHUNK", chunk)
    memory, params, state, x = attention_memory(layers=2)
    run = jax.jit(memory.apply)
    step = jax.jit(lambda *args: memory.apply(params, (), *args, method="step"))
    reset = jnp.zeros(x.shape[:2], bool).at[9].set(True).at[14, 0].set(True)
    _, whole = run(params, state, x, reset)
    close = jax.tree_util.Partial(np.testing.assert_allclose, atol=1e-5)
    kept, parts = state, []
    for t in range(7):  # the ring of 5 slots is in the middle of its second turn
        kept, y = step(kept, x[t], reset[t])
        parts.append(y[None])
    for cut in (slice(7, 9), slice(9, 19)):  # shorter and longer than the window
        kept, y = run(params, kept, x[cut], reset[cut])
        parts.append(y)
    for t in range(19, len(x)):
        kept, y = step(kept, x[t], reset[t])
        parts.append(y[None])
    close(jnp.concatenate(parts), whole)
    no = jnp.zeros_like(reset)
    close(run(params, state, x[9:], no[9:])[1][:, 1:], whole[9:, 1:])
    close(run(params, state, x[14:], no[14:])[1][:, 0], whole[14:, 0])
    close(run(params, state, x[9:14], no[9:14])[1][:, 0], whole[9:14, 0])


def test_attention_in_chunks_has_the_same_gradient(monkeypatch):
    memory, params, state, x = attention_memory(layers=2)
    reset = jnp.zeros(x.shape[:2], bool).at[9].set(True)

    def gradient(chunk):
        monkeypatch.setattr(train_transformer, "CHUNK", chunk)
        return jax.jit(jax.grad(lambda *args: (memory.apply(*args, reset)[1]**2).sum(), (0, 2)))(params, state, x)

    jax.tree.map(jax.tree_util.Partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradient(4), gradient(64))


# -- GAE ------------------------------------------------------------------------------------------------------
def slow_gae(reward, value, last_value, final_value, terminated, trial_end, gamma, lam):
    """One lane, the definition: sum of discounted TD errors up to the end of the trial."""
    T = len(reward)
    advantage = np.zeros(T)
    for start in range(T):
        weight = 1.0
        for t in range(start, T):
            following = value[t + 1] if t + 1 < T else last_value
            if trial_end[t]:
                following = 0.0 if terminated[t] else final_value[t]
            advantage[start] += weight * (reward[t] + gamma * following - value[t])
            if trial_end[t]:
                break
            weight *= gamma * lam
    return advantage


@pytest.mark.parametrize("seed", range(4))
def test_gae_equals_definition(seed):
    rng = np.random.default_rng(seed)
    T, N = 40, 5
    reward, value, final_value = rng.normal(size=(3, T, N))
    last_value = rng.normal(size=N)
    episode_end = rng.random((T, N)) < 0.2
    terminated = episode_end & (rng.random((T, N)) < 0.5)
    trial_end = episode_end & (rng.random((T, N)) < 0.5)  # the others are episode ends inside a trial
    ours = train_s5.gae(*map(jnp.asarray, (reward, value, last_value, final_value, terminated, trial_end)), 0.9, 0.8)
    for n in range(N):
        expected = slow_gae(reward[:, n], value[:, n], last_value[n], final_value[:, n], terminated[:, n],
                            trial_end[:, n], 0.9, 0.8)
        np.testing.assert_allclose(ours[:, n], expected, rtol=1e-4, atol=1e-5)


def test_rewards_are_scaled_by_their_task():
    """Over the running deviation of its own discounted sums: a task that pays 30 times as much looks no different."""
    lanes = envs.Lanes(["cartpole-swingup", "reacher-easy", "finger-spin"], 6)
    rng, gamma = np.random.default_rng(0), 0.9
    reward, trial_end = np.abs(rng.normal(size=(2, 50, 6))), rng.random((2, 50, 6)) < 0.05

    def scaled(pay):
        returns, stats, found = jnp.zeros(6), {"count": jnp.zeros(3), "mean": jnp.zeros(3), "var": jnp.ones(3)}, []
        for r, end in zip(reward * np.repeat(pay, 2), trial_end):
            r, returns, stats = train_s5.scale_per_task(r, end, returns, stats, gamma, lanes)
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
    rare = scaled([1, 1, 1e-6])  # next to nothing is not made much of
    np.testing.assert_allclose(rare[1][:, 4:], 1e-6 * reward[1][:, 4:] / (0.01 * deviation[:4].max() + 1e-4), rtol=1e-4)
    assert (scaled([0, 0, 0]) == 0).all()


@pytest.mark.parametrize("env,ends", [("CartPole-v1", "terminated"), ("Pendulum-v1", "truncated")])
def test_final_values_of_real_tasks(env, ends):
    """CartPole terminates and needs no final value; Pendulum truncates after 200 steps and has one, which is the
    value of the final observation met by the memory that led there."""
    config = small(train_s5, env=(env,), num_steps=450)
    train = train_s5.make_train(config)
    runner = train.init(jax.random.PRNGKey(0))
    _, rollout, final_value, _ = jax.jit(train.collect)(runner)
    assert getattr(rollout.step, ends).any()
    assert ((final_value != 0) == (rollout.step.trial_end & rollout.step.truncated)).all()
    if ends == "truncated":  # replay: the memory after the last step, then the final input
        t, n = map(int, np.argwhere(rollout.step.trial_end)[0])
        state, inputs = runner.env_state, None
        for s in range(t + 1):
            state, inputs, out = train.lanes.step(state, rollout.action[s], s)

        def upto(x):
            return x[:t + 1]

        memory, _, _ = train.network.apply(runner.params, runner.memory, upto(rollout.inputs), upto(rollout.reset))
        _, _, value = train.network.apply(runner.params, memory, out.final_input[None],
                                          jnp.zeros((1, config.num_envs), bool))
        np.testing.assert_allclose(final_value[t, n], value[0, n], rtol=1e-4, atol=1e-5)


def test_divergence_and_truncation_of_one_lane_in_one_rollout(monkeypatch):
    """Both have their own final value: that of the final input, and that of the last sound one."""
    class Exploding(envs.Lanes):
        def step(self, state, action, t=0):
            qvel = state.env[0].qvel
            state = state.replace(env=(state.env[0].replace(qvel=qvel.at[0].set(jnp.where(t == 7, 1e6, qvel[0]))),))
            return super().step(state, action, t)

    monkeypatch.setattr(envs, "Lanes", Exploding)
    train = train_s5.make_train(small(train_s5, env=("point_mass-easy",)))
    runner = train.init(jax.random.PRNGKey(0))
    state = runner.env_state
    late = state.replace(episode_step=state.episode_step.at[0].set(996))
    _, rollout, final_value, _ = jax.jit(train.collect)(runner._replace(env_state=late))
    step = rollout.step
    assert np.flatnonzero(step.trial_end[:, 0]).tolist() == np.flatnonzero(step.truncated[:, 0]).tolist() == [3, 7]
    assert np.flatnonzero(step.diverged[:, 0]).tolist() == [7]
    assert final_value[7, 0] == rollout.value[7, 0] != 0
    state, jitted = late, jax.jit(train.lanes.step)
    for t in range(4):
        state, _, out = jitted(state, rollout.action[t], t)
    memory, _, _ = train.network.apply(runner.params, runner.memory, rollout.inputs[:4], rollout.reset[:4])
    _, _, value = train.network.apply(runner.params, memory, out.final_input[None], jnp.zeros((1, 8), bool))
    np.testing.assert_allclose(final_value[3, 0], value[0, 0], rtol=1e-4, atol=1e-5)


# -- training functions ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("trainer,changes", [
    (train_s5, dict(env=("cartpole-swingup", "reacher-easy"))),
    (train_s5, dict(env=("point_mass-easy",), episodes_per_trial=2, projection="orthogonal")),
    (train_s5, dict(env=("MemoryChain-bsuite",), env_kwargs=("memory_length=4",), memory="none")),
    (train_s5, dict(env=("Pendulum-v1",), dtype="bfloat16")),
    (train_lstm, dict(env=("Pendulum-v1",), dtype="bfloat16", memory="none")),
    (train_transformer, dict(env=("cartpole-swingup",), dtype="bfloat16", window=24))])
def test_trains_and_stays_finite(trainer, changes):
    config = small(trainer, **changes)
    out = jax.jit(trainer.make_train(config))(jax.random.PRNGKey(0))
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), out["runner"].params))
    assert out["metrics"]["return"].shape == (config.num_updates, len(config.env))
    assert np.isfinite(out["metrics"]["kl"]).all() and (out["metrics"]["skipped"] == 0).all()
    start = trainer.make_train(config).init(jax.random.PRNGKey(0)).params
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start,
                                            out["runner"].params))) > 1e-4


def test_vmap_over_seeds_equals_single_runs():
    train = train_s5.make_train(small(train_s5))
    keys = jnp.stack([jax.random.PRNGKey(s) for s in (3, 4)])
    both = jax.jit(jax.vmap(train))(keys)["metrics"]
    for i in range(2):
        alone = jax.jit(train)(keys[i])["metrics"]
        np.testing.assert_allclose(both["value_loss"][i], alone["value_loss"], rtol=2e-3)


def test_non_finite_gradients_skip_the_update():
    train = train_s5.make_train(small(train_s5))
    runner = train.init(jax.random.PRNGKey(0))
    broken = runner._replace(returns=jnp.full_like(runner.returns, jnp.nan))
    after, metrics = jax.jit(train.update)(broken)
    assert metrics["skipped"] == 1.0
    bitwise(after.params["params"], runner.params["params"])


def test_step_size_and_entropy_bonus_fall_linearly():
    """Half of the way through a run, an update is that of a run without annealing at half of both."""
    config = small(train_s5, ent_coef=0.5, anneal_entropy=True)
    falling = train_s5.make_train(config)
    constant = train_s5.make_train(dataclasses.replace(config, anneal_lr=False, anneal_entropy=False))
    runner = falling.init(jax.random.PRNGKey(0))._replace(num_updates=jnp.int32(config.num_updates // 2))
    found = jax.jit(falling.update)(runner)[0].params["params"]

    def expected(*halved):
        hyper = runner.hyper | {name: runner.hyper[name] / 2 for name in halved}
        return jax.jit(constant.update)(runner._replace(hyper=hyper))[0].params["params"]

    bitwise(found, expected("lr", "ent_coef"))
    with pytest.raises(AssertionError):
        bitwise(found, expected("lr"))


@pytest.mark.parametrize("memory", ["full", "none", "unreset"])
def test_when_the_memory_is_reset(memory):
    train = train_s5.make_train(small(train_s5, memory=memory, num_steps=64))
    _, rollout, _, _ = jax.jit(train.collect)(train.init(jax.random.PRNGKey(0)))
    ends = rollout.step.trial_end[:-1]
    assert ends.any() and rollout.reset[0].all()
    expected = {"full": ends, "none": jnp.ones_like(ends), "unreset": jnp.zeros_like(ends)}[memory]
    np.testing.assert_array_equal(rollout.reset[1:], expected)


def test_learns_a_task_that_needs_memory():
    """MemoryChain of length 5: the bit of the first step decides the reward of the last; chance is 0."""
    config = train_s5.Config(env=("MemoryChain-bsuite",), env_kwargs=("memory_length=5",), width=32, state_size=32,
                             layers=1, num_envs=32, num_steps=64, num_minibatches=2, total_timesteps=120_000,
                             lr=3e-3)
    returns = jax.jit(train_s5.make_train(config))(jax.random.PRNGKey(0))["metrics"]["return"]
    assert np.nanmean(returns[-5:]) > 0.8


# -- runs: resume, sweeps, devices, messages --------------------------------------------------------------------
def rows(folder):
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("trainer,devices", [("train_s5", 2), ("train_lstm", 1)])
def test_kill_and_resume_is_bit_identical(trainer, devices, tmp_path):
    """SIGKILL at random moments, resume until done: the same metrics.csv as a run that nobody killed."""
    flags = ["--env", "CartPole-v1", "--total-timesteps", "20000", "--log-every", "4", "--checkpoint-minutes", "0",
             "--runs-dir", str(tmp_path), "--devices", str(devices), *FLAGS]
    env = os.environ | AS_USED | {"JAX_NUM_CPU_DEVICES": str(devices)}
    assert command(trainer, *flags, "--name", "whole", env=env).returncode == 0
    rng, kills = random.Random(0), 0
    script = [sys.executable, str(ROOT / f"{trainer}.py")]
    attempt = script + flags + ["--name", "killed"]
    while True:
        process = subprocess.Popen(attempt, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if kills < int(os.environ.get("KILLS", 3)):  # wait for the first new checkpoint, then a random while
            before = set(tmp_path.glob("killed/checkpoints/*"))
            while process.poll() is None and not set(tmp_path.glob("killed/checkpoints/*[0-9]")) - before:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.5)
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        elif process.wait() == 0:
            break
        else:
            pytest.fail(process.stderr.read())
        attempt = script + ["--resume", str(tmp_path / "killed")]
    assert kills >= 1
    assert (tmp_path / "killed/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


KILLER = """
import os, runpy, signal, sys
import experiment
script, owner, name, when, calls, *flags = sys.argv[1:]
owner, calls = eval(owner), int(calls)
original = getattr(owner, name)
def killing(*args, **kwargs):
    global calls
    calls -= 1
    if when == "after" or calls:
        result = original(*args, **kwargs)
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, killing)
sys.argv = [script, *flags]
runpy.run_path(script, run_name="__main__")
"""
MOMENTS = [  # (owner, function, SIGKILL before or after it, at which call)
    ("experiment.ocp.CheckpointManager", "save", "before", 1),  # there is nothing to resume from
    ("experiment.Logs", "chunk", "after", 1),  # rows, and no checkpoint after them
    ("experiment.Logs", "chunk", "before", 3),
    ("experiment", "restore", "after", 1),
    ("experiment.os", "fsync", "after", 1),  # old rows are being dropped
    ("experiment.os", "replace", "before", 1),
    ("experiment.os", "replace", "after", 1),
    ("experiment.Logs", "__init__", "after", 1),  # right after "ready"
    ("experiment.ocp.CheckpointManager", "save", "after", 1),  # while a checkpoint is written
    ("experiment", "plot_training", "before", 1)]


def test_a_kill_at_no_moment_loses_rows(tmp_path):
    """After each of ten kills the logs hold all that the newest checkpoint stands for; in the end they are whole."""
    flags = ["--env", "CartPole-v1", "--total-timesteps", "4000", "--log-every", "4", "--checkpoint-minutes", "0",
             "--runs-dir", str(tmp_path), *FLAGS]
    assert command("train_s5", *flags, "--name", "whole", env=AS_USED).returncode == 0
    whole, folder = (tmp_path / "whole/metrics.csv").read_bytes(), tmp_path / "killed"
    flags += ["--name", "killed"]
    for moment in MOMENTS:
        done = subprocess.run([sys.executable, "-c", KILLER, str(ROOT / "train_s5.py"), *map(str, moment), *flags],
                              cwd=ROOT, capture_output=True, text=True, env=os.environ | AS_USED)
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
        flags = ["--resume", str(folder)]
        saved = [int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit()]
        if not saved or max(saved) == 0:
            continue
        metrics, timing = ((folder / f"{name}.csv").read_bytes() for name in ("metrics", "timing"))
        assert whole.startswith(metrics) and metrics.count(b"\n") >= 1 + max(saved), moment
        assert timing.count(b"\n") >= 1 + max(saved) // 4, moment
    assert command("train_s5", *flags, env=AS_USED).returncode == 0
    assert (folder / "metrics.csv").read_bytes() == whole


@pytest.mark.parametrize("text,update,kept", [
    ("update,a\r\n2,1\r\n4,2\r\n6", 4, "update,a\r\n2,1\r\n4,2\r\n"),
    ("update,a\r\n2,1\r\n4,2\r\n", 2, "update,a\r\n2,1\r\n"),
    ("upda", 0, None), ("", 0, None), ("update,a\r\n2,1\r\n", 0, None)])
def test_rows_after_the_checkpoint_are_dropped(tmp_path, text, update, kept):
    """Also where a kill has cut the last row short, or the header."""
    path = tmp_path / "log.csv"
    path.write_bytes(text.encode())
    experiment.keep_rows(path, update)
    assert (path.read_bytes().decode() if path.exists() else None) == kept


def test_broken_checkpoint_falls_back_and_foreign_is_refused(tmp_path):
    folder = run(train_s5, dict(runs_dir=str(tmp_path), checkpoint_minutes=0.0), total_timesteps=1024)
    steps = sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    assert len(steps) == 2
    whole = (folder / "metrics.csv").read_bytes()
    for path in (folder / "checkpoints" / str(steps[-1])).rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    resume(train_s5, folder)
    assert (folder / "metrics.csv").read_bytes() == whole
    resume(train_s5, folder)  # the broken one was replaced: nothing left to do
    with pytest.raises(ValueError, match="train_s5"):
        resume(train_lstm, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["config"]["width"] = 16  # the checkpoint no longer fits
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no usable checkpoint"):
        resume(train_s5, folder)
    assert (folder / "metrics.csv").read_bytes() == whole


def test_folders_that_cannot_be_read_say_why(tmp_path):
    """config.json of the time before Options, of another trainer, with unknown, missing and impossible values."""
    config, options = small(train_s5), experiment.Options()
    whole = {"trainer": "train_s5", "config": dataclasses.asdict(config), "options": dataclasses.asdict(options)}
    old = {"trainer": "train_s5", "config": {"num_lanes": 8, "total_steps": 512, "seed": 0}}
    for saved, message in [
            (whole, None), (old, "num_lanes became num_envs"), (whole | {"trainer": "train_gru"}, "train_gru.py"),
            ([1, 2], "not written by a trainer"), (whole | {"config": 3}, "not written by a trainer"),
            (whole | {"config": whole["config"] | {"lr": -1}}, "lr must be"),
            (whole | {"config": whole["config"] | {"lr": "high"}}, "does not fit"),
            (whole | {"config": whole["config"] | {"depth": 3}}, "unknown: depth"),
            (whole | {"options": {"seed": 0}}, "missing: checkpoint_minutes")]:
        (tmp_path / "config.json").write_text(json.dumps(saved))
        if message is None:
            assert experiment.read_run(tmp_path) == (config, dataclasses.replace(options, resume=str(tmp_path)))
            continue
        with pytest.raises(ValueError, match=message) as error:
            experiment.read_run(tmp_path)
        assert "\n" not in str(error.value)


def test_sweep_ranks_settings_and_chunks_agree(tmp_path):
    sweep = dict(sweep=("lr=1e-4,1e-2", "ent_coef=0,0.01"), num_seeds=2, runs_dir=str(tmp_path))
    folder = run(train_s5, sweep | dict(name="whole"), total_timesteps=2048)
    parts = run(train_s5, sweep | dict(name="parts", sweep_chunk=4), total_timesteps=2048)
    table = rows(folder)
    assert len(table) == 8 * int(table[-1]["update"])
    assert {(r["lr"], r["ent_coef"], r["seed"]) for r in table} == {
        (a, b, c) for a in ("0.0001", "0.01") for b in ("0", "0.01") for c in "01"}
    with (folder / "sweep.csv").open() as file:
        ranking = [float(r["return"]) for r in csv.DictReader(file)]
    assert len(ranking) == 4 and ranking == sorted(ranking, reverse=True)
    assert (folder / "sweep.png").stat().st_size > 1000
    for a, b in zip(table, rows(parts)):
        np.testing.assert_allclose(float(a["value_loss"]), float(b["value_loss"]), rtol=1e-2)


def test_devices_have_the_lanes_of_one():
    """However many share them (here by a mapped axis): the same projections and starts, no two alike."""
    def reset(shards):
        lanes = envs.Lanes(["cartpole-swingup", "reacher-easy"], 8, shards=shards)
        state, _ = jax.jit(jax.vmap(lanes.reset, in_axes=None, axis_name="data", axis_size=shards))(
            jax.random.PRNGKey(0))
        matrix = state.obs_matrix.reshape(shards, 2, 4 // shards, -1).swapaxes(0, 1)  # (tasks, shards, lanes, ...)
        return matrix.reshape(8, -1), *(env.qpos.reshape(4, -1) for env in state.env), state.episode_step.ravel()

    one = reset(1)
    assert all(len(np.unique(x[:, 0])) == len(x) for x in one[:3])
    for shards in (2, 4):
        found = reset(shards)
        bitwise(found[:3], one[:3])
        assert sorted(found[3]) == sorted(one[3])


def test_devices_equal_one(tmp_path):
    """One seed on 1 and 4 devices, two seeds on 2 x 2: the same metrics and parameters but for rounding.

    Sums over lanes are taken in another order, 1e-7 relative; Adam divides small gradients by their size and so makes
    up to 1e-3 of that, of steps of 5e-4.
    """
    def close(a, b):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5), a, b)

    flags = ["--env", "CartPole-v1", "--total-timesteps", "2000", "--log-every", "4", "--runs-dir", str(tmp_path),
             *FLAGS]
    one = None
    for devices, seeds in ((1, 1), (4, 1), (4, 2)):
        done = command("train_s5", *flags, "--name", f"{devices}x{seeds}", "--num-seeds", str(seeds),
                       "--devices", str(devices), env={"JAX_NUM_CPU_DEVICES": str(devices)})
        assert done.returncode == 0, done.stderr
        assert f"on {devices} cpu" in done.stdout
        found = [{name: float(x or "nan") for name, x in row.items()} for row in rows(tmp_path / f"{devices}x{seeds}")
                 if row["seed"] == "0"]
        params = jax.tree.map(lambda x: x[0], evaluate.load(tmp_path / f"{devices}x{seeds}").params)
        one = one or (found, params)
        close((found, params), one)
    done = command("train_s5", "--resume", str(tmp_path / "4x1"), env={"JAX_NUM_CPU_DEVICES": "2"})
    assert done.returncode == 2 and "devices=4, but there are 2" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("changes,existing,processes,shape", [
    (dict(), 1, 1, (1, 1)), (dict(), 4, 1, (1, 4)), (dict(), 5, 1, (1, 4)), (dict(num_seeds=2), 4, 1, (2, 2)),
    (dict(num_seeds=4), 4, 1, (4, 1)), (dict(num_seeds=3), 4, 1, (1, 4)), (dict(num_seeds=3), 2, 1, (1, 2)),
    (dict(num_seeds=6, sweep_chunk=2), 4, 1, (2, 2)), (dict(devices=2), 4, 2, (1, 2)), (dict(devices=1), 4, 1, (1, 1)),
    (dict(devices=3), 4, 1, "divisible by devices x tasks x minibatches"), (dict(devices=8), 4, 1, "there are 4"),
    (dict(devices=1), 4, 2, "in 2 processes"), (dict(), 3, 3, "in 3 processes")])
def test_sweeps_fill_members_first(changes, existing, processes, shape):
    """8 environments, 2 minibatches: 1, 2 or 4 devices can share them; explicit --devices are all used or refused."""
    config, options = small(train_s5), experiment.Options(**changes)
    if isinstance(shape, tuple):
        assert experiment.mesh_shape(config, options, existing, processes) == shape
    else:
        with pytest.raises(ValueError, match=shape):
            experiment.mesh_shape(config, options, existing, processes)


def test_two_processes_survive_kills(tmp_path):
    """SIGKILL of both, then of either (the other ends by itself): each time --resume goes on, to the same bits."""
    flags = ["--env", "CartPole-v1", "--total-timesteps", "6000", "--log-every", "4", "--checkpoint-minutes", "0",
             "--runs-dir", str(tmp_path), *FLAGS]

    def start(*flags):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        return [subprocess.Popen(
            [sys.executable, str(ROOT / "train_s5.py"), *flags, "--coordinator", coordinator, "--num-processes", "2",
             "--process-id", str(i)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=os.environ | AS_USED | {"JAX_NUM_CPU_DEVICES": "1"}) for i in range(2)]

    def finish(pair):
        for process in pair:
            assert process.wait() == 0, process.stderr.read()

    finish(start(*flags, "--name", "whole"))
    flags += ["--name", "killed"]
    for victims in ((0, 1), (1,), (0,)):
        before = set(tmp_path.glob("killed/checkpoints/*"))
        pair = start(*flags)
        while pair[0].poll() is None and len(set(tmp_path.glob("killed/checkpoints/*[0-9]")) - before) < 1:
            time.sleep(0.01)
        for i in victims:
            pair[i].send_signal(signal.SIGKILL)
        for i, process in enumerate(pair):
            code = process.wait(timeout=60)
            assert code == -signal.SIGKILL if i in victims else code != 0, code
        flags = ["--resume", str(tmp_path / "killed")]
    finish(start(*flags))
    assert (tmp_path / "killed/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()


def test_a_coordinator_that_does_not_answer():
    with pytest.raises(ValueError, match="no answer from the coordinator, localhost:9") as error:
        experiment.join(experiment.Processes("localhost:9", 2, 1), patience=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags,message", [
    (["--env", "finger-spinn"], "finger-spin"), (["--num-envs", "7"], "divisible"), (["--num-seeds", "0"], "num_seeds"),
    (["--lr", "-1"], "lr must be positive"), (["--lr", "high"], "--lr"), (["--sweep", "width=8,16"], "sweep"),
    (["--no-such-flag"], "no-such-flag"), (["--preset", "gpu"], "accelerator"), (["--name", "../x"], "name must be"),
    (["--runs-dir", "/proc/nowhere"], "choose a --runs-dir"), (["--resume", "nowhere"], "nowhere"),
    (["--sweep-chunk", "2"], "sweep_chunk=2 must divide"), (["--devices", "99"], "devices=99"),
    (["--num-processes", "2"], "--coordinator HOST:PORT"), (["--process-id", "1"], "process_id must be")])
def test_bad_input_is_one_sentence_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_s5.py", *flags])
    with pytest.raises(SystemExit) as stop:
        train_s5.main()
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.rglob("config.json"))


def test_wandb_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        run(train_s5, dict(wandb="project", runs_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_run_that_skips_most_updates_stops(tmp_path):
    with pytest.raises(FloatingPointError, match="lower --lr"):
        run(train_s5, dict(runs_dir=str(tmp_path)), lr=1e38, total_timesteps=4096)
    assert len(list(tmp_path.glob("*/metrics.csv"))) == 1


def test_out_of_memory_names_the_flags(monkeypatch, capsys):
    def run(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(sys, "argv", ["train_s5.py"])
    with pytest.raises(SystemExit) as stop:
        train_s5.main()
    assert stop.value.code == 2 and "--sweep-chunk" in capsys.readouterr().err
