"""envs.py: environments by name, spaces, projections, and what an agent observes."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollouts import KEY, PLAIN, Clock, ClockState, Sized, rollout, symlog

import envs
import popgym

ROOT = Path(__file__).resolve().parent.parent
VALUES = np.array([-5, -2.8125, -1.25, -0.3125, 0, 0.3125, 1.25, 2.8125, 5])  # of the bins


# ---- Names ---------------------------------------------------------------------------------------
def test_the_tasks_are_those_of_the_paper():
    assert envs.TRAIN_TASKS == ("ball_in_cup-catch", "cartpole-swingup", "finger-spin",
                                "finger-turn_hard", "point_mass-easy", "reacher-easy")
    assert envs.HELD_OUT_TASKS == ("cartpole-balance", "finger-turn_easy", "pendulum-swingup",
                                   "point_mass-hard", "reacher-hard")


def test_environments_are_made_by_name_with_their_arguments():
    assert envs.make("dmc:reacher-easy")[0].name == envs.make("reacher-easy")[0].name == "dmc:reacher-easy"
    assert envs.make("finger-spin", max_steps_in_episode=7)[1].max_steps_in_episode == 7
    assert envs.make("popgym:StatelessCartPoleHard", noise=0.2)[1].noise == 0.2
    env, params = envs.make("MemoryChain-bsuite", memory_length=9, num_bits=2)
    assert params.memory_length == 9 and env.num_bits == 2  # a parameter and an argument
    own, params = envs.make("test_envs:Clock", poison_at=3, max_steps_in_episode=9)
    assert type(own).__name__ == "Clock" and own.poison_at == 3 and params.max_steps_in_episode == 9
    itself = Clock()
    assert envs.make(itself) == (itself, itself.default_params)
    texts = ("memory_length=64", "noise=-0.5", "backend=mjx", "on=True", "off=false", "no=None", "big=1e3")
    assert envs.parse_kwargs(texts) == {"memory_length": 64, "noise": -0.5, "backend": "mjx", "on": True,
                                        "off": False, "no": None, "big": 1000}
    for text in ("memory_length", 3, None):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            envs.parse_kwargs((text,))
    with pytest.raises(ValueError, match="noise is given twice"):
        envs.parse_kwargs(("noise=1", "noise=2"))


@pytest.mark.parametrize("name, text, value", [
    ("FrozenLake-misc", "is_slippery=false", False), ("FrozenLake-misc", "is_slippery=TRUE", True),
    ("MemoryChain-bsuite", "memory_length=1e2", 100), ("popgym:StatelessCartPoleHard", "noise=1", 1.0),
    ("CartPole-v1", "gravity=-1", -1.0), ("test_envs:Clock", "max_steps_in_episode=9.0", 9)])
def test_arguments_have_the_type_of_their_default(name, text, value):
    env, params = envs.make(name, **envs.parse_kwargs((text,)))
    key = text.partition("=")[0]
    found = getattr(params, key) if hasattr(params, key) else getattr(env, key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("name, text, message", [
    ("FrozenLake-misc", "is_slippery=maybe", "is_slippery must be of type bool, got 'maybe'"),
    ("FrozenLake-misc", "is_slippery=0", "must be of type bool"),
    ("MemoryChain-bsuite", "memory_length=2.5", "must be of type int"),
    ("MemoryChain-bsuite", "memory_length=1000", "memory_length must be in 1 ... 999"),
    ("MemoryChain-bsuite", "memory_length=0", "memory_length must be in 1 ... 999"),
    ("MemoryChain-bsuite", "max_steps_in_episode=5", "memory_length must be in 1 ... 4"),
    ("CartPole-v1", "max_steps_in_episode=0", "max_steps_in_episode must be in 1"),
    ("finger-spin", "max_steps_in_episode=-5", "max_steps_in_episode must be in 1"),
    ("finger-spin", "max_steps_in_episode=1e12", "max_steps_in_episode must be in 1"),
    ("CartPole-v1", "max_steps_in_episode=none", "must be of type int, got None"),
    ("CartPole-v1", "gravity=true", "gravity must be of type float, got True"),
    ("CartPole-v1", "gravity=nan", "gravity must be of type float, got 'nan'"),
    ("CartPole-v1", "gravity=1e999", "gravity must be of type float, got inf"),
    ("CartPole-v1", f"gravity={5000 * '-'}1", "gravity must be of type float, got '-"),
    ("UmbrellaChain-bsuite", "chain_length=101", "chain_length must be in 1 ... 100, got 101: no reward"),
    ("DeepSea-bsuite", "max_steps_in_episode=7", "size must be in 1 ... 7, got 8"),
    ("gymnax:Catch-bsuite", "max_steps_in_episode=5", "rows must be in 1 ... 5, got 10"),
    ("finger-spin", "backend=3", "backend must be of type str, got 3"),
    ("test_envs:Clock", "poison=3", "no argument poison; known: poison_at, max_steps_in_episode")])
def test_arguments_that_make_no_sense_are_refused_in_one_sentence(name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.make(name, **envs.parse_kwargs((text,)))
    assert "\n" not in str(error.value)


def test_names_lists_everything_that_can_be_trained():
    names = envs.names()
    assert {"finger-spin", "popgym:RepeatPreviousHard", "CartPole-v1"} <= set(names)
    assert ("brax:ant" in names) == bool(importlib.util.find_spec("brax"))
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError) as error:
        envs.make("help")
    assert all(name in str(error.value) for name in names)


def test_the_libraries_add_nothing_to_the_list_of_names():
    """In a process of its own: a library prints when it is imported first."""
    code = "import envs; print(*envs.names(), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == envs.names()


class Needy(Clock):
    def __init__(self, size):
        super().__init__()


class Leaver:
    def __init__(self):
        sys.exit("a script without a main guard")


class Spaceless:
    default_params = reset_env = step_env = None


@pytest.mark.parametrize("wrong,nearest", [
    ("finger_spin", "finger-spin"), ("dmc:reacher", "reacher-easy"), ("Reacher-hard", "reacher-hard"),
    ("Cartpole-v1", "CartPole-v1"),
    ("walker-wlk", "walker-walk"), ("popgym:StatelessCartPole", "popgym:StatelessCartPoleHard"),
    ("nowhere:Env", "nowhere"), ("test_envs:Clok", "Clok"),
    ("RepeatPreviousHard", "popgym:RepeatPreviousHard"),
    ("json:dumps", "needs the argument obj"), ("test_envs:Needy", "needs the argument size"),
    ("test_envs:Spaceless", "no observation_space, action_space"),
    ("sys:exit", "ends the program"), ("test_envs:Leaver", "ends the program"),
    ("test_envs:KEY", "not a gymnax-style"), ("test_envs:Path", "not a gymnax-style")])
def test_an_unknown_name_is_answered_with_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=nearest):
        envs.make(wrong)


@pytest.mark.parametrize("name, known", [
    ("CartPole-v1", "gravity"), ("finger-spin", "backend"), ("popgym:RepeatPreviousEasy", "max_steps")])
def test_an_unknown_argument_is_answered_with_the_known(name, known):
    with pytest.raises(ValueError, match=f"no argument no_such; known: .*{known}"):
        envs.make(name, no_such=3)


@pytest.mark.parametrize("name", [
    *(n for n in gymnax.registered_envs if not n.startswith("MNIST")),  # MNIST would need a data set
    *(f"popgym:{task}" for task in popgym.TASKS if task.endswith("Hard"))])
def test_every_name_has_trials_that_can_be_scanned(name):
    """Shapes and dtypes, by abstract evaluation."""
    trials = envs.Trials([name], 4, projection="none", **PLAIN)
    state, observation = jax.eval_shape(trials.reset, KEY)
    action = jnp.zeros((4, trials.action_dims), jnp.int32)
    again, after, transition = jax.eval_shape(trials.step, state, action, jnp.int32(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (state, observation)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (again, after))
    assert observation.projected.shape == (4, trials.obs_size)
    assert observation.context.shape == (4, trials.action_width + 3)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(observation))
    assert transition.reward.shape == transition.trial_end.shape == (4,)


def test_importing_envs_and_trainer_loads_no_simulator():
    """Neither mujoco nor gymnax nor a task file; and a DMControl task runs where dm_control is missing."""
    code = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)
missing = Missing()
sys.meta_path.insert(0, missing)
missing.names = {"mujoco", "gymnax", "dm_control", "brax", "dmc", "popgym", "sysid", "brax_env", "physics"}
import envs, train_s5, train_lstm
missing.names = {"dm_control", "brax", "popgym"}
import jax
trials = envs.Trials(["pendulum-swingup"], 4)
state, _ = jax.jit(trials.reset)(jax.random.key(0))  # a typed key, for once
state, _, transition = jax.jit(trials.step)(state, jax.numpy.zeros((4, 2), int), 0)
assert transition.reward.shape == (4,)
assert not {"dm_control", "brax", "popgym", "brax_env", "sysid"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- What is observed, and what is done ----------------------------------------------------------
def test_what_is_not_asked_for_is_not_observed_and_changes_nothing_else():
    tasks, flags = [Sized(4, 2)], dict(observe_action="context", observe_change="change", sysid="sysid",
                                       privileged="state")

    def sizes(**hidden):
        observation = jax.eval_shape(envs.Trials(tasks, 4, **dict(sysid=True) | hidden).reset, KEY)[1]
        return {name: x.shape[1] for name, x in observation._asdict().items() if name != "dt"}

    everything = sizes()
    for flag, field in flags.items():
        assert sizes(**{flag: False}) == everything | {field: 3 if field == "context" else 0}
    full, part = (rollout(envs.Trials(tasks, 4, **fields), 6)
                  for fields in (dict(sysid=True), dict.fromkeys(flags, False)))
    np.testing.assert_array_equal(part.after.projected, full.after.projected)
    np.testing.assert_array_equal(part.after.context, full.after.context[..., 2:])
    jax.tree.map(np.testing.assert_array_equal, part.transition, full.transition)


def test_bins_stand_for_values_that_are_denser_around_zero():
    np.testing.assert_allclose(envs.action_values(), VALUES)
    np.testing.assert_allclose(envs.action_values(5), [-5, -1.25, 0, 1.25, 5])
    trials = envs.Trials(["Pendulum-v1"], 9, projection="identity", action_size=2, **PLAIN)
    action = jnp.stack([jnp.arange(9), jnp.zeros(9, int)], 1)
    np.testing.assert_allclose(trials.observed_action(action), np.stack([VALUES, [-5] * 9], 1))
    torque = trials.control(jnp.broadcast_to(jnp.eye(1, 2), (9, 1, 2)), action)[:, 0]
    np.testing.assert_allclose(torque, 2 * VALUES.clip(-1, 1))  # in [-2, 2]


@pytest.mark.parametrize("space", [SimpleNamespace(shape=(2,), nvec=np.array([2, 3])), SimpleNamespace(nvec=[2, 3])],
                         ids=("with its shape", "without"))
def test_several_discrete_choices_are_one_action(space):
    class Choices(Clock):
        def action_space(self, params):
            return space

        def observation_space(self, params):
            return {"time": SimpleNamespace(n=4), "arrays": (SimpleNamespace(shape=(1, 2)),)}

        def reset_env(self, key, params):
            return self.see(jnp.int32(0)), ClockState(jnp.zeros(2, int), jnp.int32(0))

        def see(self, time):
            return {"time": time, "arrays": (jnp.array([[5.0, 6.0]]),)}

        def step_env(self, key, state, action, params):
            state = ClockState(action, state.time + 1)
            return self.see(state.time), state, jnp.float32(0), jnp.array(False), {}

    trials = envs.Trials([Choices()], 6, projection="none", **PLAIN)
    assert (trials.action_dims, trials.num_bins, trials.action_width, trials.obs_size) == (2, 3, 6, 6)
    state, observation = jax.jit(trials.reset)(KEY)
    np.testing.assert_allclose(observation.projected, symlog(np.array([[5, 6, 1, 0, 0, 0]] * 6)), rtol=1e-6)
    action = jnp.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 2]])
    state, observation, transition = jax.jit(trials.step)(state, action)
    running = ~np.array(transition.episode_end)
    assert running.any()
    np.testing.assert_array_equal(state.env[0].start[running], (action % np.array([2, 3]))[running])
    seen = observation.context[running, :6].reshape(-1, 2, 3)
    np.testing.assert_array_equal(seen, np.eye(3)[action][running])


def test_memory_chain_pays_who_remembers():
    """memory_length is honoured, and a policy that remembers earns 1 in every episode."""
    trials = envs.Trials(["MemoryChain-bsuite"], 16, projection="none", **PLAIN,
                         env_kwargs={"memory_length": 3})
    assert trials.discrete and trials.num_bins == 2 and trials.action_dims == 1 and trials.obs_size == 3
    reset, step = jax.jit(trials.reset, static_argnums=1), jax.jit(trials.step)
    (state, observation), starts = reset(KEY, False), []
    for t in range(12):
        if t % 4 == 0:
            cue = observation.projected[:, 2]
            starts.append(np.array(cue))
        action = (cue > 0).astype(jnp.int32)[:, None]
        state, observation, transition = step(state, action, t)
        last = t % 4 == 3
        assert bool(transition.terminated.all()) == bool(transition.episode_end.any()) == last
        assert not transition.truncated.any()
        np.testing.assert_array_equal(
            observation.context[:, :2], 0 if last else jax.nn.one_hot(action[:, 0], 2))
        if last:
            np.testing.assert_array_equal(transition.episode_return, 1.0)
    np.testing.assert_allclose(np.unique(starts), symlog(np.array([-1, 1])), rtol=1e-6)
    assert (starts[0] != starts[1]).any() and (starts[1] != starts[2]).any()


def test_short_episodes_terminate_and_start_from_fresh_states():
    trials = envs.Trials(["CartPole-v1"], 8, projection="none", **PLAIN)
    out = rollout(trials, 150)
    transition = out.transition
    assert transition.terminated.sum() > 30 and not transition.truncated.any()
    starts = out.after.projected[out.after.context[..., -1] == 1]
    assert len(np.unique(starts, axis=0)) == len(starts)
    assert (transition.episode_return[transition.terminated] >= 8).all()
    np.testing.assert_array_equal(out.after.context[..., -1], transition.episode_end)


def test_pendulum_is_truncated_and_follows_its_own_equation():
    trials = envs.Trials(["Pendulum-v1"], 4, projection="none", **PLAIN,
                         env_kwargs={"max_steps_in_episode": 20})
    assert trials.max_episode_steps == trials.trial_length == 20
    out = rollout(trials, 60)
    truncated = out.transition.truncated
    assert not out.transition.terminated.any()
    assert list(np.flatnonzero(truncated.all(1))) == [19, 39, 59] and truncated.sum() == 12
    shown = out.after.projected
    cos, sin, speed = np.moveaxis(np.sign(shown) * np.expm1(np.abs(shown)), -1, 0)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-5)
    turned = np.diff(np.arctan2(sin, cos), axis=0)
    error = (turned + np.pi) % (2 * np.pi) - np.pi - 0.05 * speed[1:]
    np.testing.assert_allclose(error[~truncated[1:]], 0, atol=1e-4)


def test_brax_environments_have_the_same_interface():
    """More than ten seconds: brax's physics is compiled."""
    pytest.importorskip("brax")
    with pytest.raises(ValueError, match="brax:ant"):
        envs.make("brax:amt")
    arguments = {"max_steps_in_episode": 8, "backend": "spring"}
    trials = envs.Trials(["brax:inverted_pendulum"], 3, projection="none", **PLAIN, env_kwargs=arguments)
    state, observation = jax.eval_shape(trials.reset, KEY)
    assert not trials.discrete and observation.projected.shape == (3, 4)
    assert trials.max_episode_steps == trials.trial_length == 8
    assert jax.eval_shape(trials.step, state, jnp.zeros((3, 1), int))[1].projected.shape == (3, 4)
    env, params = envs.make("brax:inverted_pendulum", **arguments)
    step, record = jax.jit(env.step_env), []
    obs, state = jax.jit(env.reset_env)(KEY, params)
    for t in range(17):
        obs, state, reward, terminated, _ = step(KEY, state, jnp.ones(1), params)
        assert np.isfinite(obs).all() and state.time == t + 1
        assert bool(env.is_truncated(state, params)) == (t + 1 >= 8)
        record.append((float(reward), bool(terminated)))
    assert (1.0, False) in record and record[-1][1]
    env, params = envs.make("brax:ant", backend="positional")
    assert env.observation_space(params).shape == (27,) and env.action_space(params).shape == (8,)
    assert params.max_steps_in_episode == 1000


# ---- Projections ---------------------------------------------------------------------------------
@pytest.mark.parametrize("projection", ["gaussian", "orthogonal", "rademacher", "identity"])
def test_projection_matrices(projection):
    """Scale, structure, and the independence of the two matrices, of environments and of draws."""
    trials = envs.Trials([Sized(4, 2), Sized(6, 2)], 4000, projection=projection, **PLAIN)
    draw = jax.jit(trials.draw)
    start = draw(KEY)
    obs, act = np.array(start.obs_matrix), np.array(start.act_matrix)
    assert obs.shape == (4000, 12, 6) and act.shape == (4000, 2, 2)
    small, large = np.s_[:2000], np.s_[2000:]
    assert not obs[small, :, 4:].any()  # zero-padded
    for block, dim in ((obs[small, :, :4], 4), (obs[large], 6), (act, 2)):
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
        flat = np.concatenate([obs[large].reshape(2000, -1), act[large].reshape(2000, -1)], 1)
        across = np.corrcoef(flat.T)[:72, 72:]
        assert np.abs(across).max() < 0.1, "the two matrices are correlated"
        again = np.array(draw(jax.random.PRNGKey(1)).obs_matrix)
        assert abs(np.corrcoef(obs[large].ravel(), again[large].ravel())[0, 1]) < 0.02
        assert abs(np.corrcoef(obs[2000:3000].ravel(), obs[3000:].ravel())[0, 1]) < 0.02


# ---- Refusals ------------------------------------------------------------------------------------
class Endless(Clock):
    def action_space(self, params):
        return SimpleNamespace(shape=(1,), low=-np.inf, high=np.inf)


class Unsized(Clock):
    def observation_space(self, params):
        return SimpleNamespace(kind="graph")


@pytest.mark.parametrize("kwargs,message", [
    (dict(num_envs=7), "cannot split 7"), (dict(num_envs=0), "cannot split 0"),
    (dict(tasks=[]), "among 0 tasks"), (dict(projection="random"), "gaussian"),
    (dict(projection="none"), "equal sizes"), (dict(projection="identity", obs_size=5), "obs_size >= 6"),
    (dict(projection="orthogonal", action_size=1), "action_size >= 2"),
    (dict(projection="rademacher", action_size=1), "action_size >= 2"),
    (dict(tasks=["CartPole-v1"], projection="identity", obs_size=3), "obs_size >= 4 .* for CartPole-v1, got 3"),
    (dict(tasks=["Acrobot-v1"], projection="orthogonal", obs_size=5), "obs_size >= 6"),
    (dict(tasks=["walker-walk"]), "obs_size >= 24 and action_size >= 6 for walker-walk, got 12"),
    (dict(episodes_per_trial=0), "episodes_per_trial"), (dict(action_repeat=0), "action_repeat"),
    (dict(tasks=["CartPole-v1", "reacher-easy"]), "kind"),
    (dict(tasks=["CartPole-v1", "Acrobot-v1"]), "kind"),
    (dict(tasks=["reacher-esy"]), "reacher-easy"),
    (dict(tasks=["reacher-easy", "dmc:reacher-easy"]), "listed twice"), (dict(obs_size=0), "obs_size"),
    (dict(tasks=["CartPole-v1", "gymnax:CartPole-v1"]), "listed twice"),
    (dict(tasks=["CartPole-v1"], action_repeat=501), "longer than an episode, which has 500 steps"),
    (dict(tasks=["CartPole-v1"], episodes_per_trial=10**9), "fewer than 2..31 steps"),
    (dict(episodes_per_trial=2**22), "fewer than 2..31 steps"),
    (dict(tasks=[Endless()]), "finite .low and .high"), (dict(tasks=[Unsized()]), "observation space")])
def test_what_does_not_go_together_is_refused_in_one_sentence(kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        envs.Trials(**(dict(tasks=["reacher-easy", "point_mass-easy"], num_envs=8) | kwargs))
    assert "\n" not in str(error.value)


def test_a_random_projection_may_be_smaller_than_a_task_that_is_not_from_dmcontrol():
    trials = envs.Trials(["Pendulum-v1"], 2, projection="gaussian", obs_size=2, **PLAIN)
    state, observation = jax.eval_shape(trials.reset, KEY)
    after = jax.eval_shape(trials.step, state, jnp.zeros((2, 2), int))[1]
    assert after.projected.shape == observation.projected.shape == (2, 2)
    assert after.context.shape == (2, 2 + 3)
