"""The programs in examples/, but for act.py: each runs, and each memory is one. Slow: four trainings to success."""

import dataclasses
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import envs
import train_s5

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))

import own_environment  # noqa: E402
import own_memory  # noqa: E402
import train_transformer  # noqa: E402
from own_environment import ContinuousCueRecall, CueRecall, settings  # noqa: E402

SIZES = ["--width", "8", "--num-envs", "8", "--num-steps", "16", "--num-minibatches", "2", "--layers", "1",
         "--log-every", "2"]


def close(actual, expected, atol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol), actual, expected)


def start(memory, width, T, B):
    """Parameters and zero state of a memory, and inputs (T, B, width)."""
    x = jax.random.normal(jax.random.PRNGKey(1), (T, B, width))
    hidden = memory.zero_state((B,))
    return jax.jit(memory.init)(jax.random.PRNGKey(0), hidden, x, jnp.zeros((T, B), bool)), hidden, x


def last_return(config, **kwargs):
    """Mean return of the last ten updates of a run."""
    train = train_s5.make_train(config, **kwargs)
    returns = jax.jit(train)(jax.random.PRNGKey(0))["metrics"]["return"]
    return jnp.nanmean(returns[-10:])


# ---- own_memory.py -------------------------------------------------------------------------------
def test_own_memory_is_short():
    assert len((ROOT / "examples" / "own_memory.py").read_text().splitlines()) <= 60


def test_own_memory_step_equals_sequence():
    """Also from a hidden state that is not zero, and through resets."""
    T, B, width = 9, 3, 16
    memory = own_memory.LinearAttention(features=width, heads=2, head_size=4)
    params, hidden, x = start(memory, width, T, B)
    hidden = hidden + 1.0
    reset = jnp.zeros((T, B), bool).at[4].set(True).at[6, 0].set(True)
    expected, whole = memory.apply(params, hidden, x, reset)
    step = jax.jit(lambda *args: memory.apply(params, *args, method="step"))
    kept = hidden
    for t in range(T):
        kept, y = step(kept, x[t], reset[t])
        close(y, whole[t])
    close(kept, expected)
    fresh = memory.apply(params, memory.zero_state((B,)), x[4:], reset[4:])[1]
    close(fresh, whole[4:])


def test_own_memory_is_linear_attention_with_decay():
    """The sum over all earlier steps, written out."""
    T, B, width, heads, size = 6, 2, 8, 2, 4
    memory = own_memory.LinearAttention(features=width, heads=heads, head_size=size)
    params, hidden, x = start(memory, width, T, B)
    new, _ = memory.apply(params, hidden, x, jnp.zeros((T, B), bool))
    p = params["params"]
    normed = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    _, key, value = jnp.split((normed @ p["Dense_0"]["kernel"]).reshape(T, B, heads, -1), 3, axis=-1)
    decay = np.array([1 - 1 / 16, 1 - 1 / 32])
    expected = sum(decay[:, None, None] ** (T - 1 - t) * key[t][..., None] * value[t][..., None, :]
                   for t in range(T))
    close(new, expected.reshape(B, -1))


def test_own_memory_learns_to_recall():
    config = train_s5.Config(env=(CueRecall(),), **settings)
    assert last_return(config, make_memory=own_memory.make_memory) > 0.95


# ---- own_environment.py --------------------------------------------------------------------------
@pytest.mark.parametrize("env", (CueRecall(), ContinuousCueRecall()), ids=("discrete", "continuous"))
def test_own_environment_is_learned_by_s5(env):
    assert last_return(train_s5.Config(env=(env,), **settings)) > 0.95


def test_own_environment_pays_for_the_right_answer_only():
    for continuous, answers in ((False, [0, 1, 2]), (True, [[-1.0], [0.0], [1.0]])):
        env = CueRecall(delay=2, continuous=continuous)
        for seed in range(6):
            first, state = env.reset_env(jax.random.PRNGKey(seed), None)
            cue = int(state.cue)
            assert first.tolist() == [*np.eye(3)[cue], 0]
            for t in range(2):
                obs, state, reward, terminated, _ = env.step_env(None, state, jnp.array(answers[cue]), None)
                assert reward == 0 and not terminated and obs.tolist() == [0, 0, 0, t == 1]
            rewards = [float(env.step_env(None, state, jnp.array(a), None)[2]) for a in answers]
            assert rewards[cue] == 1 and sum(rewards) <= 2
            assert env.step_env(None, state, jnp.array(answers[0]), None)[3]


def test_own_environment_by_name():
    """MODULE:NAME with arguments of the constructor, as the command line gives it."""
    env, params = envs.make("own_environment:CueRecall", delay=3)
    assert isinstance(env, own_environment.CueRecall) and env.delay == 3 and params is None
    trials = envs.Trials(("own_environment:ContinuousCueRecall",), 4, projection="none")
    state, observation = jax.jit(trials.reset)(jax.random.PRNGKey(0))
    assert observation.projected.shape == (4, 4) and trials.num_bins == envs.ACTION_BINS
    with pytest.raises(ValueError, match="own_environment:Nothing"):
        envs.make("own_environment:Nothing")


class Structured:
    """Observations and actions with parts; every step pays the first part of the action."""

    default_params = None

    def observation_space(self, params):
        inner = SimpleNamespace(spaces=(SimpleNamespace(shape=(2,)), SimpleNamespace(n=3)))
        return {"b": inner, "a": SimpleNamespace(shape=(1, 2))}

    def action_space(self, params):
        return SimpleNamespace(shape=(2,), nvec=np.array([2, 3]))

    def observe(self, symbol):
        return {"b": (jnp.array([3.0, 4.0]), symbol), "a": jnp.array([[1.0, 2.0]])}

    def reset_env(self, key, params):
        return self.observe(jnp.int32(0)), jnp.int32(0)

    def step_env(self, key, state, action, params):
        return self.observe(action[1]), state, action[0], False, {}


def test_dictionaries_tuples_and_several_discrete_actions():
    """Observations are flattened in the order of jax.tree.leaves; choices are taken modulo their number."""
    trials = envs.Trials((Structured(),), 6, projection="none", privileged=False)
    assert (trials.action_dims, trials.num_bins, trials.obs_size) == (2, 3, 7)
    state, observation = trials.reset(jax.random.PRNGKey(0))
    symlog = jnp.log1p(jnp.array([1.0, 2.0, 3.0, 4.0, 1.0, 0.0, 0.0]))
    close(observation.projected, jnp.broadcast_to(symlog, (6, 7)))
    action = jnp.array([[i, j] for i in (0, 1) for j in range(3)])
    _, observation, transition = trials.step(state, action)
    np.testing.assert_array_equal(transition.reward, action[:, 0])
    np.testing.assert_array_equal(observation.projected[:, 4:].argmax(-1), action[:, 1])
    np.testing.assert_array_equal(observation.context[:, :6].reshape(6, 2, 3).argmax(-1), action)


@pytest.mark.parametrize("spaces, message", [
    (dict(action_space=SimpleNamespace(shape=(2,), low=-np.inf, high=1.0)), "low=-inf"),
    (dict(action_space={"left": SimpleNamespace(n=2)}), "left"),
    (dict(action_space=SimpleNamespace(shape=(2,))), "finite"),
    (dict(observation_space={"text": "words"}), "words")])
def test_spaces_that_cannot_work_are_named(spaces, message):
    env = Structured()
    for name, space in spaces.items():
        setattr(env, name, lambda params, space=space: space)
    with pytest.raises(ValueError, match=message) as error:
        envs.Trials((env,), 2, projection="none")
    assert "\n" not in str(error.value)


# ---- adapters.py ---------------------------------------------------------------------------------
@struct.dataclass
class Step:
    """What the steps of navix, xminigrid and playground have in common with this file's stand-in."""

    time: jax.Array
    obs: jax.Array
    observation: jax.Array
    reward: jax.Array
    step_type: jax.Array  # 0, or 1 (truncated) and 2 (terminated), as navix counts
    discount: jax.Array
    done: jax.Array


@struct.dataclass
class Limit:
    max_timesteps: int = 4
    max_steps: int = 4


class Library:
    """One stand-in for the four libraries. The action 1 ends the task, the fourth step the time."""

    max_steps, action_size = 4, 1
    default_params = Limit()

    def at(self, time, ended):
        step_type = jnp.where(ended, 2, jnp.where(time == 4, 1, 0))
        grid = jnp.full((1, 2), time)
        return Step(time, jnp.full(3, 1.0 * time), grid, jnp.float32(1), step_type, 1.0 - ended, 1.0 * ended)

    def next(self, state, action):
        return self.at(state.time + 1, jnp.ravel(action)[0] > 0.5)

    def craftax(self, task, auto_reset):
        assert not auto_reset
        return SimpleNamespace(
            default_params=Limit(), action_space=lambda: SimpleNamespace(n=2),
            reset_env=lambda key, params: (jnp.zeros(3), self.at(0, False)), step_env=self.step_craftax)

    def step_craftax(self, key, state, action, params):
        state = self.next(state, action)
        return state.obs, state, state.reward, (state.done > 0) | (state.time >= params.max_timesteps), {}

    def navix(self, task, observation_fn):
        assert observation_fn == "first person"
        return SimpleNamespace(max_steps=4, action_space=SimpleNamespace(n=jnp.int32(2)),
                               reset=lambda key: self.at(0, False), step=self.next)

    def xminigrid(self, task):
        return SimpleNamespace(num_actions=lambda params: 2, reset=lambda params, key: self.at(0, False),
                               step=lambda params, state, action: self.next(state, action)), Limit()

    def playground(self, task, config_overrides):
        assert config_overrides == {"impl": "jax"}
        return SimpleNamespace(action_size=1, reset=lambda key: self.at(0, False), step=self.next)

    def modules(self):
        registry = SimpleNamespace(load=self.playground, get_default_config=lambda task: SimpleNamespace(
            episode_length=4))
        return {"craftax": SimpleNamespace(), "mujoco_playground": SimpleNamespace(registry=registry),
                "craftax.craftax_env": SimpleNamespace(make_craftax_env_from_name=self.craftax),
                "navix": SimpleNamespace(make=self.navix, observations=SimpleNamespace(
                    symbolic_first_person="first person")),
                "xminigrid": SimpleNamespace(make=self.xminigrid)}


ADAPTERS = {"Craftax": "craftax", "Navix": "navix", "XLandMiniGrid": "xminigrid", "Playground": "mujoco_playground"}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_tell_the_end_of_a_task_from_the_end_of_its_time(name, monkeypatch):
    """With a stand-in for each library: CI has none of them."""
    for module, stand_in in Library().modules().items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    trials = envs.Trials((f"adapters:{name}",), 2, projection="none", privileged=False)
    assert trials.max_episode_steps == 4 and trials.obs_size in (3, 22, 26)
    state, observation = trials.reset(jax.random.PRNGKey(0), stagger=False)
    stop = trials.num_bins - 1
    step, ends = jax.jit(trials.step), []
    for t in range(6):  # the second environment ends its task in step 1
        first = observation.projected
        action = jnp.array([[0], [stop if t == 1 else 0]])
        state, observation, transition = step(state, action, t)
        ends.append((transition.terminated.tolist(), transition.truncated.tolist()))
        np.testing.assert_array_equal(transition.reward, 1)
    no = [False, False]
    assert ends == [(no, no), ([False, True], no), (no, no), (no, [True, False]), (no, no), (no, [False, True])]
    assert not np.array_equal(first[1], observation.projected[1])


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_fit_their_libraries(name):
    pytest.importorskip(ADAPTERS[name])
    trials = envs.Trials((f"adapters:{name}",), 2, projection="none", privileged=False)
    state, observation = jax.eval_shape(trials.reset, jax.random.PRNGKey(0))
    action = jnp.zeros((2, trials.action_dims), jnp.int32)
    new, *_ = jax.eval_shape(trials.step, state, action)
    assert jax.tree.leaves(new) == jax.tree.leaves(state)
    assert observation.projected.shape == (2, trials.obs_size)


def test_adapters_without_their_library_say_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "xminigrid", None)
    with pytest.raises(ValueError, match="'adapters:XLandMiniGrid' needs a package.*xminigrid"):
        envs.make("adapters:XLandMiniGrid")


# ---- train_transformer.py ------------------------------------------------------------------------
def attention(layers=1, window=5, T=23, B=3):
    """A small attention memory, its parameters and zero state, inputs (T, B, 16)."""
    memory = train_transformer.make_memory(
        train_transformer.Config(width=16, layers=layers, window=window, hidden_size=16))
    return memory, *start(memory, 16, T, B)


def test_attention_sees_its_window_only():
    """A change at time t reaches the next window - 1 steps and none after them."""
    memory, params, hidden, x = attention()
    no = jnp.zeros(x.shape[:2], bool)
    run = jax.jit(memory.apply)
    before, after = (run(params, hidden, inputs, no)[1] for inputs in (x, x.at[7].add(1)))
    assert np.flatnonzero((before != after).any((1, 2))).tolist() == [7, 8, 9, 10, 11]


@pytest.mark.parametrize("chunk", (4, 64))
def test_attention_cache_carries_over_and_forgets_at_resets(chunk, monkeypatch):
    """Sequence, steps and sequences cut anywhere agree, in chunks or whole; a trial gives what it gives alone."""
    monkeypatch.setattr(train_transformer, "CHUNK", chunk)
    memory, params, hidden, x = attention(layers=2)
    run = jax.jit(lambda *args: memory.apply(params, *args))
    step = jax.jit(lambda *args: memory.apply(params, *args, method="step"))
    reset = jnp.zeros(x.shape[:2], bool).at[9].set(True).at[14, 0].set(True)
    _, whole = run(hidden, x, reset)
    kept, parts = hidden, []
    for t in range(7):  # the ring of 5 slots is in the middle of its second turn
        kept, y = step(kept, x[t], reset[t])
        parts.append(y[None])
    for cut in (slice(7, 9), slice(9, 19)):  # shorter and longer than the window
        kept, y = run(kept, x[cut], reset[cut])
        parts.append(y)
    for t in range(19, len(x)):
        kept, y = step(kept, x[t], reset[t])
        parts.append(y[None])
    close(jnp.concatenate(parts), whole)
    no = jnp.zeros_like(reset)
    close(run(hidden, x[9:], no[9:])[1][:, 1:], whole[9:, 1:])
    close(run(hidden, x[14:], no[14:])[1][:, 0], whole[14:, 0])
    close(run(hidden, x[9:14], no[9:14])[1][:, 0], whole[9:14, 0])


def test_attention_in_chunks_has_the_same_gradient(monkeypatch):
    memory, params, hidden, x = attention(layers=2)
    reset = jnp.zeros(x.shape[:2], bool).at[9].set(True)

    def gradient(chunk):
        monkeypatch.setattr(train_transformer, "CHUNK", chunk)

        def loss(params, x):
            return (memory.apply(params, hidden, x, reset)[1] ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), gradient(4), gradient(64))


@pytest.mark.parametrize("width", (64, 256))
def test_transformer_has_as_many_parameters_as_s5(width):
    """Within 2 %, with the defaults of a CPU (width 64) and of an accelerator (width 256)."""
    def count(trainer, **sizes):
        memory = trainer.make_memory(trainer.Config(width=width, **sizes))
        x, reset = jnp.zeros((1, 1, width)), jnp.zeros((1, 1), bool)
        shapes = jax.eval_shape(memory.init, jax.random.PRNGKey(0), memory.zero_state((1,)), x, reset)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    s5 = {64: dict(memory="s5", layers=3, state_size=32), 256: dict(memory="s5", layers=4, state_size=256)}
    attention = {64: dict(heads=2, head_size=16, hidden_size=81),
                 256: dict(heads=4, head_size=32, hidden_size=770)}
    assert abs(count(train_transformer, **attention[width]) / count(train_s5, **s5[width]) - 1) < 0.02


def test_defaults_of_the_transformer_are_those_of_the_parameter_count():
    config = train_transformer.Config()
    assert (config.width, config.heads, config.head_size, config.hidden_size) == (64, 2, 16, 81)


def test_transformer_has_flags_of_its_own_and_not_those_of_s5():
    names = {field.name for field in dataclasses.fields(train_transformer.Config)}
    s5 = {field.name for field in dataclasses.fields(train_s5.Config)}
    assert names - s5 == {"heads", "head_size", "window", "hidden_size"} and s5 - names == {"memory", "state_size"}


def run_script(folder, *flags):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *flags], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformer_runs_when_copied_without_experiment(tmp_path):
    """train_s5.py, s5.py and envs.py are all that it needs."""
    (tmp_path / "examples").mkdir()
    for name in ("train_s5.py", "s5.py", "envs.py", "examples/train_transformer.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    printed = run_script(tmp_path, "examples/train_transformer.py", "--env", "CartPole-v1",
                         "--total-timesteps", "512", "--window", "8", *SIZES)
    assert "mean return" in printed and not (tmp_path / "runs").exists()


def test_transformer_makes_a_run_folder(tmp_path):
    """With experiment.py, whose agents are loaded under the example's name; its environment is one's own."""
    printed = run_script(ROOT, "examples/train_transformer.py", "--env", "examples.own_environment:CueRecall",
                         "--total-timesteps", "512", "--window", "8", *SIZES, "--no-evaluate",
                         "--out", str(tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 5, printed
    assert '"train_transformer"' in (tmp_path / "run" / "config.json").read_text()
