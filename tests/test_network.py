"""train_s5.py and train_lstm.py: as copied files, their configuration and their network."""

import csv
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import TRAINERS, bitwise, close, small

import envs
import train_lstm
import train_s5

ROOT = Path(__file__).resolve().parent.parent


# ---- The trainers --------------------------------------------------------------------------------
def outside_memory(trainer):
    """Source lines without the usage docstring, the memory section and what only that imports."""
    text = (ROOT / f"{trainer}.py").read_text()
    text = text[text.index('"""\n', 3):].replace("from s5 import S5\n", "")
    start = text.index("# ---- Memory: the only section")
    return (text[:start] + text[text.index("# ---- Configuration"):]).splitlines()


def test_trainers_differ_in_memory_only():
    assert outside_memory("train_s5") == outside_memory("train_lstm")


def test_memories_have_equal_parameter_counts():
    """The baselines' hidden sizes are chosen so that all memories agree within 2 %."""
    for sizes in (dict(width=64, layers=3, state_size=32), dict(width=256, layers=4, state_size=256)):
        counts = []
        for name, (trainer, changes) in TRAINERS.items():
            fields = sizes | dict(memory="s5") if name == "s5" else dict(width=sizes["width"])
            config = trainer.Config(**fields, **changes)
            memory = trainer.make_memory(config)
            x, reset = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1), bool)
            shapes = jax.eval_shape(memory.init, jax.random.PRNGKey(0), memory.zero_state((1,)), x, reset)
            counts.append(sum(s.size for s in jax.tree.leaves(shapes)))
        assert max(abs(count / counts[0] - 1) for count in counts) < 0.02, counts


class Copy(NamedTuple):
    """Files that train in a folder of their own."""

    files: tuple[str, ...]
    flags: tuple[str, ...]
    missing: tuple[str, ...]  # packages that cannot be imported there
    lines: tuple[int, ...]  # the steps that the printed table has


CARTPOLE = ("--env", "CartPole-v1", "--total-timesteps", "2560", "--num-envs", "8", "--num-steps", "16")
COPIES = {
    "train_s5 on gymnax": Copy(("train_s5.py", "s5.py", "envs.py"), CARTPOLE,
                               ("mujoco", "dm_control", "brax"), (1280, 2560)),
    "train_lstm on gymnax": Copy(("train_lstm.py", "envs.py"), CARTPOLE, ("mujoco",), (1280, 2560)),
    # more than ten seconds: the physics of six models is compiled
    "train_s5 on its default tasks": Copy(
        ("train_s5.py", "s5.py", "vector_s5.py", "envs.py", "dmc.py", "physics.py"),
        ("--total-timesteps", "192", "--num-envs", "12", "--num-steps", "8", "--log-every", "1"),
        ("dm_control", "brax"), (192,)),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copied_files_train_elsewhere(copy, tmp_path):
    """They print a table: steps, and the mean return of each task."""
    copied = TrainedCopy(copy, tmp_path)
    head, *lines = [line.split("\t") for line in copied.train().splitlines()]
    tasks = ["CartPole-v1"] if "--env" in copy.flags else list(envs.TRAIN_TASKS)
    assert head == ["steps", *tasks] and [int(steps) for steps, *_ in lines] == list(copy.lines)
    returns = np.array([[float(x) for x in values] for _, *values in lines])
    assert returns.shape == (len(lines), len(tasks)) and not (tmp_path / "runs").exists()
    if "--env" in copy.flags:
        assert (8 < returns).all() and (returns < 200).all()
    if copy is COPIES["train_s5 on gymnax"]:  # with these it makes a run folder, of the same returns
        copied.take("experiment.py", "logs.py", "run_folder.py", "devices.py")
        copied.train("--no-evaluate", "--out", "run")
        with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
            again = np.array([float(row["return/CartPole-v1"] or "nan") for row in csv.DictReader(file)])
        np.testing.assert_allclose(returns[:, 0], np.nanmean(again.reshape(2, 10), 1), atol=0.02)


class TrainedCopy:
    """Runs a trainer in a folder that holds a Copy's files only."""

    def __init__(self, copy, folder):
        self.copy, self.folder = copy, folder
        self.take(*copy.files)
        for package in copy.missing:
            (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('{package} was imported')")

    def take(self, *files):
        for name in files:
            shutil.copy(ROOT / name, self.folder)

    def train(self, *flags):
        """What is printed."""
        sizes = ["--width", "8", "--layers", "1", "--num-minibatches", "2", "--update-epochs", "1"]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, self.copy.files[0], *self.copy.flags, *sizes, *flags]
        done = subprocess.run(command, cwd=self.folder, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


# ---- Configuration -------------------------------------------------------------------------------
@pytest.mark.parametrize("changes,message", [
    (dict(lr=-1.0), "lr must be float, at least 1e-30 and below 1048576"), (dict(lr=0.0), "lr must be float, at least"),
    (dict(lr=float("nan")), "lr must be float, at least"), (dict(lr=float("inf")), "lr must be float, at least"),
    (dict(lr="high"), "lr must be float"), (dict(ent_coef=-1), "ent_coef must be float, 0 or at least 1e-30 and below"),
    (dict(num_steps=0), "num_steps must be int, at least 1 and below"), (dict(layers=1000), "layers must be int"),
    (dict(lr=1e-50), "lr must be float, at least 1e-30"), (dict(update_epochs=1000), "update_epochs must be int"),
    (dict(num_steps=True), "num_steps must be int"),
    (dict(num_steps=1.5), "num_steps must be int"), (dict(num_envs=2**50), "num_envs must be int, at least 1"),
    (dict(gamma=1.5), "gamma and gae_lambda must be at most 1"),
    (dict(action_repeat=2), "action_repeat must be tuple, got 2"),
    (dict(action_repeat=(-1,)), "action_repeat must be positive integers"),
    (dict(action_repeat=(1, 0)), "action_repeat must be positive integers"),
    (dict(action_repeat=(1.5,)), "action_repeat must be positive integers"),
    (dict(num_envs=7), "num_envs=7 must be divisible by tasks x minibatches = 1 x 2"),
    (dict(env=()), "env"), (dict(env="CartPole-v1"), "env must be tuple, got 'CartPole-v1'"),
    (dict(reset="off"), "reset must be one of trial, step, never, got 'off'"),
    (dict(projection="random"), "projection must be one of auto, gaussian"),
    (dict(dtype="float16"), "dtype must be one of"), (dict(anneal="everything"), "anneal must be one of"),
    (dict(sysid="no"), "sysid must be bool")])
@pytest.mark.parametrize("trainer", [train_s5, train_lstm])
def test_every_field_is_validated_from_python(trainer, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        small(trainer, **changes)
    assert "\n" not in str(error.value)


def test_actions_last_two_steps_of_dmcontrol():
    for env, repeat, lasts in (("reacher-easy", (), 2), ("CartPole-v1", (), 1), ("reacher-easy", (3,), 3)):
        config = small(env=(env,), action_repeat=repeat)
        assert train_s5.make_trial_kwargs(config)["action_repeat"] == (lasts,)
        assert config.steps_per_update == lasts * config.num_envs * config.num_steps
        assert config.num_updates % config.log_every == 0
        assert config.num_updates * config.steps_per_update >= config.total_timesteps


@pytest.mark.parametrize("env,projection,hidden", [
    ("point_mass-easy", "auto", True), ("point_mass-easy", "orthogonal", True),
    ("point_mass-easy", "identity", False), ("CartPole-v1", "auto", False), ("CartPole-v1", "gaussian", True)])
def test_nothing_is_identified_where_nothing_is_hidden(env, projection, hidden):
    kwargs = train_s5.make_trial_kwargs(small(env=(env,), projection=projection, sysid=True))
    assert kwargs["sysid"] == kwargs["privileged"] == hidden
    assert kwargs["projection"] == ("gaussian" if env == "point_mass-easy" else "none"
                                    if projection == "auto" else projection) or projection != "auto"
    for reset in ("trial", "step", "never"):  # the memory does not decide about system identification
        config = small(env=(env,), projection=projection, reset=reset, sysid=True)
        assert train_s5.make_trial_kwargs(config) == kwargs
    off = small(env=(env,), projection=projection, privileged_critic=False)
    kwargs = train_s5.make_trial_kwargs(off)
    assert not kwargs["sysid"] and not kwargs["privileged"]


# ---- Network -------------------------------------------------------------------------------------
T, B = 12, 3


def random_observation(key=0, shape=(T, B), **sizes):
    """An Observation of normal numbers. `sizes` are those of its fields."""
    sizes = dict(projected=4, change=4, context=5, sysid=6, state=7) | sizes
    keys = jax.random.split(jax.random.PRNGKey(key), 5)
    fields = {name: jax.random.normal(k, (*shape, size)) for k, (name, size) in zip(keys, sizes.items())}
    return envs.Observation(**fields)


class Network(NamedTuple):
    module: Any
    apply: Any  # compiled: (params, norm, hidden, observation, reset) -> hidden state, policy, value
    params: Any
    arguments: tuple  # norm, hidden, observation, reset


@functools.cache
def network_of(trainer=train_s5, sizes=(), shape=(T, B), **changes):
    """A network for random observations of these sizes, with what it is applied to."""
    config = small(trainer, **changes)
    memory = trainer.make_memory(config, SimpleNamespace(obs_size=4, action_width=2, durations=()))
    module = trainer.ActorCritic(config, memory, 2, 9)
    observation = random_observation(shape=shape, **dict(sizes))
    norm = jax.tree.map(lambda x: trainer.no_moments(x.shape[2:]), observation)
    reset = jax.random.bernoulli(jax.random.PRNGKey(9), 0.3, shape)
    arguments = norm, module.zero_state((B,)), observation, reset
    one_step = jax.tree.map(lambda x: x[:1], arguments[2:])  # compiles sooner, the same parameters
    params = jax.jit(module.init)(jax.random.PRNGKey(1), *arguments[:2], *one_step)
    return Network(module, jax.jit(module.apply), params, arguments)


def logits_of(policy):
    return policy.distribution.logits


@pytest.mark.parametrize("name", [*TRAINERS, "vectors"])
def test_steps_equal_a_sequence(name):
    """Acting step by step and replaying the sequence give the same policy and value, resets included."""
    trainer, changes = TRAINERS.get(name, (train_s5, dict(memory="vector")))
    network, apply, params, arguments = network_of(trainer, layers=2, **changes)
    norm, hidden, observation, reset = arguments
    last, pi, value = apply(params, *arguments)
    assert value.shape == (T, B) and logits_of(pi).shape == (T, B, 2, 9)

    @jax.jit
    def act(hidden, now, reset):
        step = functools.partial(network.apply, params, norm, hidden, now, reset)
        return step(critic=True), step(critic=False)

    for t in range(T):
        now = jax.tree.map(lambda x: x[t], observation)
        step, without_critic = act(hidden, now, reset[t])
        hidden, step_pi, step_value = step
        np.testing.assert_allclose(step_value, value[t], atol=1e-5)
        np.testing.assert_allclose(logits_of(step_pi), logits_of(pi)[t], atol=1e-5)
        bitwise(logits_of(without_critic[1]), logits_of(step_pi))
        assert without_critic[2] is None
    close(hidden, last, atol=1e-5 if name in TRAINERS else 1e-3)


@pytest.mark.parametrize("changes, memory", [
    (dict(env=("reacher-easy",)), "vector"), (dict(env=("CartPole-v1",)), "s5"),
    (dict(env=("CartPole-v1",), projection="gaussian"), "vector"),
    (dict(env=("reacher-easy",), projection="identity"), "s5"),
    (dict(env=("reacher-easy",), action_repeat=(1, 2)), "s5")])
def test_the_memory_has_vectors_where_observations_are_projected(changes, memory):
    config = small(**changes)
    assert train_s5.memory_of(config) == memory
    for chosen in ("s5", "vector"):
        config = small(**changes | dict(memory=chosen))
        assert train_s5.memory_of(config) == chosen
        made = train_s5.make_memory(config, SimpleNamespace(obs_size=4, action_width=2, durations=()))
        assert isinstance(made, train_s5.VectorMemory) == (chosen == "vector")


def test_a_blind_agent_with_vector_memory_is_blind():
    _, apply, params, (norm, hidden, observation, reset) = network_of(memory="vector", blind=True)
    other = observation._replace(projected=observation.projected + 1.0, change=2.0 * observation.change)
    bitwise(*(logits_of(apply(params, norm, hidden, x, reset)[1]) for x in (observation, other)))


def test_vector_memory_needs_what_it_stores():
    for changes in (dict(observe_action=False), dict(observe_change=False), dict(num_steps=12)):
        with pytest.raises(ValueError, match="--memory vector, .* needs"):
            train_s5.make_train(small(train_s5, memory="vector", **changes))


@pytest.mark.parametrize("trainer", [train_s5, train_lstm])
def test_the_policy_never_depends_on_the_critics_state(trainer):
    _, apply, params, (norm, hidden, observation, reset) = network_of(trainer)

    def outputs(state):
        return apply(params, norm, hidden, observation._replace(state=state), reset)

    last, pi, value = outputs(observation.state)
    other_last, other_pi, other_value = outputs(observation.state + 1.0)
    bitwise((last, logits_of(pi)), (other_last, logits_of(other_pi)))
    assert (value != other_value).all()
    _, pullback = jax.vjp(lambda state: (logits_of(outputs(state)[1]), outputs(state)[2]), observation.state)
    ones, zeros = jnp.ones_like, jnp.zeros_like
    assert not pullback((ones(logits_of(pi)), zeros(value)))[0].any()
    assert pullback((zeros(logits_of(pi)), ones(value)))[0].any()


@pytest.mark.parametrize("blind", [True, False])
def test_a_blind_policy_depends_on_actions_rewards_and_episode_starts_only(blind):
    _, apply, params, (norm, hidden, observation, reset) = (
        network_of(blind=True) if blind else network_of())
    other = random_observation(key=1)
    last, pi, value = apply(params, norm, hidden, observation, reset)
    elsewhere = other._replace(context=observation.context, state=observation.state)
    last_elsewhere, pi_elsewhere, value_elsewhere = apply(params, norm, hidden, elsewhere, reset)
    if blind:
        bitwise((last, logits_of(pi), value), (last_elsewhere, logits_of(pi_elsewhere), value_elsewhere))
    else:
        assert (logits_of(pi) != logits_of(pi_elsewhere)).any((2, 3)).all()
    rewarded = observation._replace(context=other.context)
    _, pi_rewarded, _ = apply(params, norm, hidden, rewarded, reset)
    assert (logits_of(pi) != logits_of(pi_rewarded)).any((2, 3)).all()


class Echo(nn.Module):
    """A memory whose hidden state and output are its input."""

    def __call__(self, hidden, x, reset):
        return x, x


@pytest.mark.parametrize("trainer", [train_s5, train_lstm])
def test_observations_do_not_drown_actions_in_the_memory(trainer):
    """Two hundred projected numbers move its input less than five others do; all of them bypass it."""
    sizes, moved = (("projected", 200), ("change", 0), ("sysid", 0), ("state", 0)), {}
    s5 = {"memory": "s5"} if trainer is train_s5 else {}
    for projection in ("gaussian", "none"):
        network, _, params, (norm, _, observation, _) = network_of(
            trainer, sizes, (50, B), env=("reacher-easy",), projection=projection, **s5)

        @jax.jit
        def features(projected, context):
            changed = observation._replace(projected=projected, context=context)
            return network.clone(memory=Echo()).apply(
                params, norm, None, changed, jnp.zeros((50, B), bool), method="features")

        own, _ = features(0.0 * observation.projected, observation.context)
        seen, heads = features(observation.projected, 0.0 * observation.context)
        moved[projection] = own.std((0, 1)).mean() / seen.std((0, 1)).mean()
        assert heads[..., network.config.width:].std((0, 1)).mean() > 0.05
    assert moved["gaussian"] > 5 and 0.5 < moved["none"] < 2


def test_the_policy_is_a_distribution_over_bins():
    """The probabilities of all joint actions sum to one; entropy, mode and samples are theirs."""
    network, _, params, _ = network_of()
    features = 3.0 * jax.random.normal(jax.random.PRNGKey(0), (50, 16))
    policy = network.apply(jax.tree.map(lambda x: 10.0 * x, params), features, method="policy")
    action, log_prob = policy.sample_and_log_prob(seed=jax.random.PRNGKey(1))
    assert action.shape == (50, 2) and action.dtype == jnp.int32
    assert set(np.unique(action)) <= set(range(9))
    np.testing.assert_allclose(policy.log_prob(action), log_prob, rtol=1e-5)
    every = jnp.stack(jnp.meshgrid(jnp.arange(9), jnp.arange(9)), -1).reshape(81, 1, 2)
    log_probs = jax.vmap(policy.log_prob)(jnp.broadcast_to(every, (81, 50, 2)))
    assert np.ptp(log_probs, axis=0).min() > 0.1
    np.testing.assert_allclose(jnp.exp(log_probs).sum(0), 1.0, rtol=1e-5)
    np.testing.assert_allclose(-(jnp.exp(log_probs) * log_probs).sum(0), policy.entropy(), rtol=1e-4)
    np.testing.assert_allclose(policy.log_prob(policy.mode()), log_probs.max(0), rtol=1e-5)
    start = network.apply(params, features, method="policy")  # at first all actions are equally likely
    np.testing.assert_allclose(start.entropy(), 2 * np.log(9), atol=0.01)
