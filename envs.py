"""Environments by name, and `Lanes`, the batched in-context view of them: random projections, trials, resets.

    env, params = make("dmc:finger-spin")            # also "CartPole-v1", "popgym:RepeatPreviousHard", "brax:ant"
    obs, state = env.reset(key, params)              # gymnax 1.x interface throughout
    obs, state, reward, terminated, truncated, info = env.step(key, state, action, params)

    lanes = Lanes(TRAIN_TASKS, num_lanes=192)        # many tasks, random projections, trials
    state, inputs = lanes.reset(key)
    state, inputs, out = lanes.step(state, action, t)

After Lu et al. 2023 (arXiv 2303.03982), an agent meets a task through *random linear projections* of observation
and action, fresh ones in every trial: see Lanes. The DMControl tasks are in dmc.py; popgym.py and brax are wanted for
their tasks only.
"""
import ast
import dataclasses
import difflib
import math
from functools import partial
from typing import Any, NamedTuple

import distrax
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces

import dmc
import sysid

# The split of Lu et al. 2023: an agent trains on the first and is then tested on the second, too
TRAIN_TASKS = ("ball_in_cup-catch", "cartpole-swingup", "finger-spin", "finger-turn_hard", "point_mass-easy",
               "reacher-easy")
HELD_OUT_TASKS = ("cartpole-balance", "finger-turn_easy", "pendulum-swingup", "point_mass-hard", "reacher-hard")


# ---- Environments by name ----------------------------------------------------------------------------------
@struct.dataclass
class BraxState:
    """State of a brax environment."""

    brax: Any  # brax.envs.State
    time: jax.Array  # () int32


class Brax(environment.Environment):
    """A brax environment with gymnax's interface: `done` is termination, 1000 steps truncation.

    Args:
      name: brax's, such as "ant".
      **kwargs: go to the brax environment's constructor (backend="spring", ...).
    """

    def __init__(self, name, **kwargs):
        super().__init__()
        import brax.envs

        self.env, self.env_name = brax.envs.get_environment(name, **kwargs), name

    @property
    def name(self):
        return f"brax:{self.env_name}"

    @property
    def default_params(self):
        return dmc.EnvParams()

    def reset_env(self, key, params):
        state = self.env.reset(key)
        return state.obs, BraxState(state, jnp.int32(0))

    def step_env(self, key, state, action, params):
        brax = self.env.step(state.brax, action)
        state = BraxState(brax, state.time + 1)
        return brax.obs, state, brax.reward, brax.done > 0, {"discount": 1 - brax.done}

    def is_terminated(self, state, params):
        return state.brax.done > 0

    def action_space(self, params=None):
        return spaces.Box(-1.0, 1.0, (self.env.action_size,), jnp.float32)

    def observation_space(self, params=None):
        return spaces.Box(-jnp.inf, jnp.inf, (self.env.observation_size,), jnp.float32)


def is_dmc(name):
    """Whether `name` is one of the DMControl tasks, with or without "dmc:"."""
    return name.removeprefix("dmc:") in dmc.TASKS


def parse_kwargs(texts):
    """The kwargs of `make` from texts: ("memory_length=64",) -> {"memory_length": 64}. Raises ValueError."""
    kwargs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"env_kwargs {text!r}: expected KEY=VALUE")
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = value
    return kwargs


def make(name, backend="fused", **kwargs):
    """The environment called `name` and its default parameters, as gymnax.make.

    Args:
      name: "dmc:finger-spin" ("dmc:" may be left out), "popgym:RepeatPreviousHard", any gymnax name, or "brax:ant".
      backend: physics of DMControl ("fused", "mjx"); for brax, any but "fused" replaces brax's default.
      **kwargs: fields of the parameters (max_steps_in_episode, memory_length, ...), else arguments of the
        environment's constructor.

    Returns:
      (environment, parameters).

    Raises:
      ValueError: unknown name; the nearest known ones are named.
      TypeError: unknown argument.
    """
    known = [f"dmc:{task}" for task in dmc.TASKS] + list(dmc.TASKS) + list(gymnax.registered_envs)
    if name.startswith("brax:"):
        import brax.envs

        known = [f"brax:{env}" for env in brax.envs._envs]
    elif name.startswith("popgym:"):
        import popgym

        known = [f"popgym:{task}" for task in popgym.TASKS]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
        raise ValueError(f"unknown environment {name!r}; nearest: {', '.join(near)}")
    if is_dmc(name):
        build = partial(dmc.DMC, name.removeprefix("dmc:"), backend)
    elif name.startswith("popgym:"):
        build = popgym.TASKS[name.removeprefix("popgym:")]
    elif name.startswith("brax:"):
        build = partial(Brax, name.removeprefix("brax:"), **({} if backend == "fused" else {"backend": backend}))
    else:
        def build(**arguments):
            return gymnax.make(name, **arguments)[0]
    fields = {f.name for f in dataclasses.fields(build().default_params)} if kwargs else ()
    env = build(**{k: v for k, v in kwargs.items() if k not in fields})
    return env, env.default_params.replace(**{k: v for k, v in kwargs.items() if k in fields})


# ---- Projections and trials --------------------------------------------------------------------------------
PROJECTIONS = ("gaussian", "orthogonal", "rademacher", "identity", "none")
BLOCK = 128  # lanes that a CPU steps at once, at most


def sample_matrix(key, kind, rows, cols):
    """A random float32 (rows, cols) matrix of one of PROJECTIONS (but "none").

    Every random kind has entries of mean 0 and variance 1/fan_in with fan_in = cols, so that inputs of variance 1
    give outputs of variance 1.

    Args:
      key: random key.
      kind: "gaussian": independent normal entries. "rademacher": independent +-1/sqrt(cols). "orthogonal":
        Haar-distributed orthonormal columns (rows >= cols) or rows, times the factor that gives that variance:
        sqrt(rows/cols), or 1. "identity": ones on the diagonal (keeps the first components, pads with zeros).
      rows: size of what comes out.
      cols: size of what goes in.
    """
    return shape_matrix(jax.random.normal(key, (rows, cols), jnp.float32), kind)


def shape_matrix(normal, kind):
    """sample_matrix from independent standard normal entries (..., rows, cols)."""
    rows, cols = normal.shape[-2:]
    if kind == "gaussian":
        return normal / math.sqrt(cols)
    if kind == "rademacher":
        return jnp.where(normal < 0, -1.0, 1.0) / math.sqrt(cols)
    if kind == "orthogonal":
        if rows < cols:
            return shape_matrix(normal.mT, kind).mT / math.sqrt(cols / rows)
        q = jnp.zeros_like(normal)  # Gram and Schmidt's way, not LAPACK's: see sysid.solve
        for j in range(cols):
            column = normal[..., j]
            for _ in range(2):  # a second time, because of rounding
                column = column - (q * (q * column[..., None]).sum(-2, keepdims=True)).sum(-1)
            q = q.at[..., j].set(column / jnp.linalg.norm(column, axis=-1, keepdims=True))
        return q * math.sqrt(rows / cols)
    return jnp.broadcast_to(jnp.eye(rows, cols, dtype=normal.dtype), normal.shape)


class Start(NamedTuple):
    """What a lane takes at the start of an episode (env, obs) and of a trial (matrices)."""

    env: tuple  # per task: environment states, leading axis the task's lanes
    obs: jax.Array  # (N, largest obs_dim) raw observation, zero-padded
    obs_matrix: Any  # (N, obs_size, largest obs_dim), zero-padded; None without projection
    act_matrix: Any  # (N, largest act_dim, action_size), zero-padded; None without projection. If actions are
    # discrete (N, action_size) int32: what each of the agent's actions is to the environment; None if just that


@struct.dataclass
class LanesState:
    """State of all lanes: a pytree of arrays. N lanes in blocks of tasks."""

    env: tuple  # per task: its environments' states (DMCState: env[i].qpos is (N / tasks, nq))
    obs_matrix: Any  # as in Start, of the running trials
    act_matrix: Any
    spare: Start
    input: jax.Array  # (N, input_size + privileged_size) float32, what the agent sees now
    identified: Any  # sysid.State of the running trials; None if not asked for
    episode_step: jax.Array  # (N,) int32, steps of this episode, those a staggered lane did not live included
    episode: jax.Array  # (N,) int32, episodes of this trial that are over
    trial_step: jax.Array  # (N,) int32, steps of this trial
    episode_complete: jax.Array  # (N,) bool, this episode was seen from its start
    episode_return: jax.Array  # (N,) float32
    key: jax.Array


class LaneStep(NamedTuple):
    """What happened in one step of N lanes."""

    reward: jax.Array  # (N,) float32, raw; 0 where diverged
    terminated: jax.Array  # (N,) bool, the task is over: nothing to bootstrap
    truncated: jax.Array  # (N,) bool, and not terminated: out of time, or diverged
    episode_end: jax.Array  # (N,) bool, terminated or truncated
    trial_end: jax.Array  # (N,) bool, the memory is to be reset before the next input
    final_input: jax.Array  # (N, input_size + privileged_size) float32, made from the observation before any reset
    episode_return: jax.Array  # (N,) float32, sum of raw rewards of this episode so far
    episode_complete: jax.Array  # (N,) bool, this episode was seen from its true start (not a staggered one)
    diverged: jax.Array  # (N,) bool
    trial_step: jax.Array  # (N,) int32, index of this step within its trial


def select(mask, new, old):
    """Leaves of `new` where mask (N,), else of `old`, which has the dtypes."""

    def pick(a, b):
        return jnp.where(jnp.expand_dims(mask, tuple(range(1, b.ndim))), a, b).astype(b.dtype)

    return jax.tree.map(pick, new, old)


def matvec(matrix, x):
    """(N, rows, cols), (N, cols) -> (N, rows), in full float32 and fused with what surrounds it."""
    return (matrix * x[:, None, :]).sum(-1)


def symlog(x):
    """sign(x) log(1 + |x|), elementwise."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def pad_to(x, shape):
    """x (n, ...) with zeros up to (n, *shape)."""
    return jnp.pad(x, [(0, 0)] + [(0, want - have) for want, have in zip(shape, x.shape[1:])])


@struct.dataclass
class BinnedActions:
    """A policy over continuous actions: in every dimension one of `bins` values in [-5, 5], denser around 0.

    The bound is far beyond 1, the limit of every actuator, because most projections leave some direction of control
    weak; small values are there for those that are strong.
    """

    logits: jax.Array  # (..., action_size, bins) float32

    @property
    def choice(self):
        return distrax.Independent(distrax.Categorical(logits=self.logits), 1)

    @property
    def values(self):
        x = jnp.linspace(-1.0, 1.0, self.logits.shape[-1])
        return 5.0 * x * jnp.abs(x)

    def sample_and_log_prob(self, seed):
        """Actions (..., action_size) float32 and their log probabilities (...)."""
        choice, log_prob = self.choice.sample_and_log_prob(seed=seed)
        return self.values[choice], log_prob

    def sample(self, seed):
        """Actions (..., action_size) float32."""
        return self.sample_and_log_prob(seed)[0]

    def mode(self):
        """The most probable actions (..., action_size) float32."""
        return self.values[self.choice.mode()]

    def log_prob(self, action):
        """Log probability (...) of actions (..., action_size), each taken as the nearest of the values."""
        return self.choice.log_prob(jnp.abs(action[..., None] - self.values).argmin(-1))

    def entropy(self):
        """(...) nats."""
        return self.choice.entropy()


def continuous_policy(kind, outputs, action_size):
    """The distribution of actions (..., action_size) that a policy head's outputs stand for.

    "categorical" is BinnedActions. "gaussian" is a diagonal normal distribution with a deviation between 0.3 and 1.35:
    free to, it collapses in a few states, whose gradients then drown all others; and wider is only noise, because
    actions are clipped. outputs: (..., action_size * n) float32, n the number of bins or 2.
    """
    outputs = outputs.reshape(*outputs.shape[:-1], action_size, -1)
    if kind == "categorical":
        return BinnedActions(outputs)
    mean, spread = outputs[..., 0], outputs[..., 1]
    return distrax.Independent(distrax.Normal(mean, jnp.exp(1.5 * jax.nn.sigmoid(spread) - 1.2)), 1)


def in_blocks(f, x):
    """vmap of f over the leading axis of x, arrays (n, ...); on a CPU in equal blocks of at most BLOCK, if n has such.

    The numbers in between then stay in the CPU's cache, and a solver's turns end with the slowest lane of a block.
    """
    n = len(jax.tree.leaves(x)[0])
    blocks = next(k for k in range(-(-n // BLOCK), n + 1) if n % k == 0)
    size = n // blocks
    if blocks == 1 or size < BLOCK // 4 or jax.default_backend() != "cpu":  # small if n has no better divisor
        return jax.vmap(f)(x)
    return jax.lax.map(f, x, batch_size=size)


class Lanes:
    """Many environments side by side, as an in-context agent meets them.

    Lanes are split statically and equally among `tasks`, in contiguous blocks, and each task steps its own lanes
    only. A *trial* is `episodes_per_trial` episodes under one pair of projections, o' = Mo o and
    a = clip(Ma a', -1, 1), with Mo (obs_size, obs_dim) and Ma (act_dim, action_size) drawn independently, see
    sample_matrix. Bounded action spaces other than [-1, 1] are scaled to. Discrete actions are relabelled instead: by a
    permutation, uniform over all, drawn in each trial under every projection but "identity" and "none".

    The agent sees [o', previous a' as it gave it (one-hot if discrete), previous reward, episode-start flag,
    trial-start flag]; `observe_action` and `observe_change` change that. Action and reward carry over into the next
    episode of a trial and are 0 at a trial's start.

    Resets of DMControl tasks (collision-free starts, new matrices) are not paid in every step: a lane that ends takes
    the one spare start it holds, and all spares are drawn anew at steps t with t % refresh_every == 0, at most half an
    episode apart. So a lane meets a spare twice only if it diverges twice in between. As soon as one task is not from
    DMControl, with episodes of unknown length, all are drawn in every step, as gymnax does.

    A lane diverges if its action, observation, reward, qpos or qvel is not finite, or |qvel| > 1e4: it is then
    truncated, its reward 0 and its final_input the last input, so that no NaN reaches the learner.

    Args:
      tasks: names, see make.
      num_lanes: how many environments, N; a multiple of the number of tasks.
      projection: one of PROJECTIONS. "none" passes observation and action (clipped to its space) as they are.
      obs_size: size of o', at least that of the largest observation. Only a gaussian or rademacher projection of
        what is not from DMControl may be smaller: the task is then only partly seen.
      action_size: size of a', likewise.
      episodes_per_trial: episodes under one pair of projections.
      action_repeat: steps of the environment with one action, fewer where the episode ends in between; their rewards
        are added. All counts of steps here are of such steps.
      stagger: a lane's first trial begins with a uniformly random part of its time already spent. Only the counters
        know: the physical state is a fresh reset, `trial_step` counts from 0 and `episode_complete` is False.
      observe_action: show the previous a'. Where it tells nothing it is noise, which adds up in a memory and drowns
        what was seen long ago. sysid.py takes it in either way.
      observe_change: also show o' minus the previous o' (0 at episode starts).
      identify: also show what sysid.py finds out about the trial so far (0 at episode starts). Left out where
        nothing is hidden (projection "none" and "identity").
      privileged: append what a critic may see in training and the agent never: which task it is, and its raw
        observation. Left out where nothing is hidden.
      obs_transform: "symlog", whatever the projection, shows sign(o') log(1 + |o'|), because velocities reach +-100;
        "none" shows o'.
      backend: see make.
      env_kwargs: dict of further arguments of make.
      shards: devices that share the lanes, each an equal part of every task's. If several, `reset` and `step` are
        called in jax.shard_map over an axis "data" of so many devices, and see those of their device.

    Attributes:
      tasks, obs_size, shards: as given.
      num_lanes: N, those of one device.
      lane_task: (num_lanes,) numpy int, index of each lane's task.
      input_size: size of what the agent sees.
      privileged_size: how many further numbers there are behind it, for a critic.
      output_of_input: input_size numbers: which number of o' an input is, or is the change of; -1 for all others.
      discrete: whether actions are.
      action_size: number of actions if discrete.
      max_episode_steps, trial_length: the shortest among tasks, None if there is no limit.
      refresh_every: see above.

    Raises:
      ValueError: lanes cannot be split equally, tasks do not go together, or a size is too small.
    """

    def __init__(self, tasks, num_lanes, projection="gaussian", obs_size=12, action_size=2,
                 episodes_per_trial=1, action_repeat=1, stagger=True, observe_action=True, observe_change=False,
                 identify=False, privileged=False, obs_transform="symlog", backend="fused", env_kwargs=None, shards=1):
        self.tasks, self.projection, self.shards = tuple(tasks), projection, shards
        self.episodes_per_trial, self.action_repeat = episodes_per_trial, action_repeat
        self.observe_action, self.observe_change, self.obs_transform = observe_action, observe_change, obs_transform
        if not self.tasks or num_lanes < 1 or num_lanes % (len(self.tasks) * shards):
            raise ValueError(f"cannot split num_lanes={num_lanes} equally among {len(self.tasks)} tasks"
                             + (f" on each of {shards} devices" if shards > 1 else ""))
        self.num_lanes = num_lanes = num_lanes // shards
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
        if obs_transform not in ("none", "symlog"):
            raise ValueError(f"obs_transform must be none or symlog, got {obs_transform!r}")
        for name, value in (("episodes_per_trial", episodes_per_trial), ("action_repeat", action_repeat)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.envs, self.params = zip(*(make(task, backend, **(env_kwargs or {})) for task in self.tasks))
        self.lane_task = np.repeat(np.arange(len(self.tasks)), num_lanes // len(self.tasks))

        obs_spaces = [env.observation_space(params) for env, params in zip(self.envs, self.params)]
        act_spaces = [env.action_space(params) for env, params in zip(self.envs, self.params)]
        self.one_hot_obs = [space.n if isinstance(space, spaces.Discrete) else 0 for space in obs_spaces]
        self.obs_dims = [n or math.prod(space.shape) for n, space in zip(self.one_hot_obs, obs_spaces)]
        self.act_shapes = [space.shape for space in act_spaces]
        self.act_dims = [math.prod(shape) for shape in self.act_shapes]
        discrete = [isinstance(space, spaces.Discrete) for space in act_spaces]
        self.discrete = all(discrete)
        if self.discrete != any(discrete) or self.discrete and len({space.n for space in act_spaces}) > 1:
            raise ValueError(f"tasks {', '.join(self.tasks)} do not share one kind of action")
        if projection == "none" and len(set(zip(self.obs_dims, self.act_dims))) > 1:
            raise ValueError(f"projection='none' needs tasks of equal sizes, got (observation, action) sizes "
                             f"{list(zip(self.obs_dims, self.act_dims))}; use a projection")
        if not self.discrete:
            self.low, self.high = np.zeros((2, num_lanes, max(self.act_dims)), np.float32)
            for i, (space, dim) in enumerate(zip(act_spaces, self.act_dims)):
                for ours, theirs in ((self.low, space.low), (self.high, space.high)):
                    ours[self.lane_task == i, :dim] = np.broadcast_to(theirs, space.shape).ravel()
        self.obs_size = self.obs_dims[0] if projection == "none" else obs_size
        self.action_size = (act_spaces[0].n if self.discrete else
                            self.act_dims[0] if projection == "none" else action_size)
        for task, env, obs_dim, act_dim in zip(self.tasks, self.envs, self.obs_dims, self.act_dims):
            whole = projection in ("identity", "orthogonal") or projection != "none" and isinstance(env, dmc.DMC)
            if whole and (obs_size < obs_dim or not self.discrete and action_size < act_dim):
                raise ValueError(f"the {projection} projection needs obs_size >= {obs_dim} and action_size >= "
                                 f"{act_dim} for {task}, got obs_size={obs_size} and action_size={action_size}")
        hidden = projection not in ("identity", "none")
        self.identify = identify and hidden
        self.privileged_size = len(self.tasks) * (1 + max(self.obs_dims)) if privileged and hidden else 0
        outputs = tuple(range(self.obs_size))
        own = 3 + (self.action_size if observe_action else 0)
        self.output_of_input = outputs + (-1,) * own + (outputs if observe_change else ())
        if self.identify:  # from all numbers of o', so that to hide one hides these
            self.output_of_input += (self.obs_size - 1,) * sysid.num_features(self.action_size)
        self.input_size = len(self.output_of_input)

        limits = [getattr(params, "max_steps_in_episode", None) for params in self.params]
        limits = [None if n is None else math.ceil(n / action_repeat) for n in limits]
        self.max_episode_steps = min((n for n in limits if n is not None), default=None)
        self.trial_length = None if self.max_episode_steps is None else self.max_episode_steps * episodes_per_trial
        self.stagger = stagger and None not in limits
        self.limits = np.array([2**30 if n is None else n for n in limits], np.int32)[self.lane_task]
        only_dmc = all(isinstance(env, dmc.DMC) for env in self.envs)
        self.refresh_every = max(1, min(500, self.max_episode_steps // 2)) if only_dmc else 1

    # -- devices that share the lanes
    def keys(self, key):
        """A key for every lane: (num_lanes, ...). It depends on the lane's number among those of all devices only."""
        number = jnp.arange(self.shards * self.num_lanes).reshape(len(self.tasks), self.shards, -1)
        number = number[:, jax.lax.axis_index("data") if self.shards > 1 else 0].ravel()
        return jax.vmap(jax.random.fold_in, (None, 0))(key, number)

    def pmean(self, x):
        """x averaged over the devices that share the lanes."""
        return jax.lax.pmean(x, "data") if self.shards > 1 else x

    def moments(self, x, axes):
        """Mean and variance of x over `axes` and these devices."""
        mean = self.pmean(x.mean(axes))
        return mean, self.pmean(x.var(axes) + (x.mean(axes) - mean) ** 2)

    # -- observations and starts
    def _blocks(self, x):
        """x (N, ...) cut into the tasks' blocks."""
        return jnp.split(x, len(self.tasks))

    def _flat_obs(self, i, obs):
        """Observations of task i's lanes, flattened to float32 (n, obs_dim) and padded to the largest."""
        obs = jax.nn.one_hot(obs, self.one_hot_obs[i]) if self.one_hot_obs[i] else obs
        return pad_to(obs.reshape(obs.shape[0], -1).astype(jnp.float32), (max(self.obs_dims),))

    def _matrices(self, key, rows, cols):
        """A matrix for every lane, of its task's sizes and zero-padded: (N, largest rows, largest cols)."""
        largest = max(rows), max(cols)
        normal = jax.vmap(lambda k: jax.random.normal(k, largest, jnp.float32))(self.keys(key))
        return jnp.concatenate([pad_to(shape_matrix(block[:, :r, :c], self.projection), largest)
                                for block, r, c in zip(self._blocks(normal), rows, cols)])

    def _draw(self, key):
        """A fresh Start for every lane."""
        reset_key, obs_key, act_key = jax.random.split(key, 3)
        blocks = []
        for i, keys in enumerate(self._blocks(self.keys(reset_key))):
            obs, state = jax.vmap(self.envs[i].reset_env, (0, None))(keys, self.params[i])
            state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)  # no weak types
            blocks.append((state, self._flat_obs(i, obs)))
        states, obs = zip(*blocks)
        obs_matrix = act_matrix = None
        if self.projection != "none":
            obs_matrix = self._matrices(obs_key, [self.obs_size] * len(self.tasks), self.obs_dims)
            if not self.discrete:
                act_matrix = self._matrices(act_key, self.act_dims, [self.action_size] * len(self.tasks))
            elif self.projection != "identity":
                act_matrix = jax.vmap(lambda k: jax.random.permutation(k, self.action_size))(self.keys(act_key))
        return Start(states, jnp.concatenate(obs), obs_matrix, act_matrix)

    def project_observation(self, obs_matrix, obs):
        """Raw observations (N, largest obs_dim) as the agent sees them (N, obs_size)."""
        return self._transform(self._project(obs_matrix, obs))

    def _project(self, obs_matrix, obs):
        return obs if obs_matrix is None else matvec(obs_matrix, obs)

    def _transform(self, projected):
        return symlog(projected) if self.obs_transform == "symlog" else projected

    def _input(self, shown, change, action, reward, episode_start, trial_start, found, obs):
        flags = jnp.stack([reward, episode_start, trial_start], -1).astype(jnp.float32)
        actions, changes = [action] if self.observe_action else [], [change] if self.observe_change else []
        return jnp.concatenate([shown, *actions, flags, *changes, *found, *self._privileged(obs)], -1)

    def _privileged(self, obs):
        """[1, raw observation], compressed, in the place of the lane's task; zeros in those of the others."""
        if not self.privileged_size:
            return []
        told = jnp.concatenate([jnp.ones_like(obs[:, :1]), symlog(obs)], -1)
        task = np.eye(len(self.tasks), dtype=np.float32)[self.lane_task]
        return [(task[:, :, None] * told[:, None]).reshape(len(obs), -1)]

    def _found(self, identified):
        return [sysid.features(identified)] if self.identify else []

    def start_identification(self, obs_matrix, obs):
        """sysid.State of trials that begin with raw observations (N, largest obs_dim); None if not asked for."""
        return sysid.start(self._project(obs_matrix, obs), self.action_size) if self.identify else None

    def _control(self, act_matrix, action):
        """The agent's actions as the environments take them, padded: (N, largest act_dim) or (N,) int."""
        if act_matrix is None:
            return action if self.discrete else jnp.clip(action, self.low, self.high)
        if self.discrete:
            return jnp.take_along_axis(act_matrix, action[:, None], -1)[:, 0]
        action = jnp.clip(matvec(act_matrix, action), -1.0, 1.0)
        return 0.5 * (self.low + self.high) + 0.5 * (self.high - self.low) * action

    def _advance(self, i, keys, state, action):
        """action_repeat steps of task i's n lanes: (flat observation, state, reward, terminated, truncated)."""
        env, params = self.envs[i], self.params[i]

        def once(k, old):
            repeat_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
            obs, state, reward, terminated, _ = in_blocks(
                lambda x: env.step_env(*x, params), (repeat_keys, old[1], action))
            reward = old[2] + reward.reshape(-1).astype(jnp.float32)
            truncated = jax.vmap(env.is_truncated, (0, None))(state, params)
            new = self._flat_obs(i, obs), state, reward, terminated, truncated
            return select(~(old[3] | old[4]), new, old)

        n, no = action.shape[0], jnp.zeros(action.shape[0], bool)
        none = jnp.zeros((n, max(self.obs_dims))), state, jnp.zeros(n), no, no
        return jax.lax.fori_loop(0, self.action_repeat, once, none)

    # -- interface
    def reset(self, key):
        """All lanes at the start of a trial.

        Returns:
          (LanesState, inputs (num_lanes, input_size + privileged_size) float32).
        """
        N = self.num_lanes
        key, draw_key, stagger_key = jax.random.split(key, 3)
        both = jax.vmap(self._draw)(jax.random.split(draw_key))
        first, spare = (jax.tree.map(lambda x: x[k], both) for k in range(2))
        spent = jnp.zeros(N, jnp.int32)
        if self.stagger:
            spent = jax.vmap(lambda k, limit: jax.random.randint(k, (), 0, limit))(
                self.keys(stagger_key), self.limits * self.episodes_per_trial)
        zeros, ones = jnp.zeros(N, jnp.float32), jnp.ones(N, jnp.float32)
        shown = self.project_observation(first.obs_matrix, first.obs)
        identified = self.start_identification(first.obs_matrix, first.obs)
        inputs = self._input(shown, 0.0 * shown, jnp.zeros((N, self.action_size), jnp.float32),
                             zeros, ones, ones, self._found(identified), first.obs)
        episode_step = spent % self.limits
        state = LanesState(
            env=first.env, obs_matrix=first.obs_matrix, act_matrix=first.act_matrix, spare=spare,
            input=inputs, identified=identified, episode_step=episode_step, episode=spent // self.limits,
            trial_step=jnp.zeros(N, jnp.int32), episode_complete=episode_step == 0, episode_return=zeros, key=key)
        return state, inputs

    def step(self, state, action, t=0):
        """One step of every lane.

        Args:
          state: LanesState.
          action: (num_lanes, action_size) float, or (num_lanes,) int if discrete.
          t: int, step index within the rollout; decides when spares are drawn and sysid.py fits (0: now). Under vmap
            over seeds it should stay unbatched (scanned over, not part of the state): then both remain true branches.

        Returns:
          (LanesState, inputs (num_lanes, input_size + privileged_size) float32, LaneStep).
        """
        key, step_key, draw_key = jax.random.split(state.key, 3)
        if self.refresh_every == 1:
            spare = self._draw(draw_key)
        else:
            spare = jax.lax.cond(t % self.refresh_every == 0, self._draw, lambda _: state.spare, draw_key)

        control = self._control(state.act_matrix, action)
        stepped, outs = [], []
        step_keys = self._blocks(self.keys(step_key))
        for i, (env, block) in enumerate(zip(self.envs, self._blocks(control))):
            if not self.discrete:
                block = block[:, :self.act_dims[i]].reshape(-1, *self.act_shapes[i])
            obs, env_state, reward, terminated, truncated = self._advance(i, step_keys[i], state.env[i], block)
            sound = jnp.isfinite(obs).all(-1) & jnp.isfinite(reward)
            if isinstance(env, dmc.DMC):  # NaN fails the comparison
                sound &= jnp.isfinite(env_state.qpos).all(-1) & (jnp.abs(env_state.qvel) <= 1e4).all(-1)
            stepped.append(env_state)
            outs.append((obs, reward, terminated, truncated, sound))
        obs, reward, terminated, truncated, sound = jax.tree.map(lambda *xs: jnp.concatenate(xs), *outs)

        last_action = jax.nn.one_hot(action, self.action_size) if self.discrete else action
        diverged = ~(sound & jnp.isfinite(last_action).all(-1))
        last_action = jnp.where(diverged[:, None], 0.0, last_action).astype(jnp.float32)
        reward = jnp.where(diverged, 0.0, reward)
        terminated &= ~diverged
        truncated = (truncated | (state.episode_step + 1 >= self.limits) | diverged) & ~terminated
        end = terminated | truncated
        episode = state.episode + end
        trial_end = end & (episode >= self.episodes_per_trial)

        no = jnp.zeros_like(end)
        old_shown = state.input[:, :self.obs_size]
        projected = self._project(state.obs_matrix, obs)
        shown, identified = self._transform(projected), state.identified
        if self.identify:
            identified = select(diverged, identified, sysid.update(identified, last_action, reward, projected))
            identified = jax.lax.cond(t % sysid.FIT_EVERY == 0, sysid.fit, lambda state: state, identified)
        found = self._found(identified)
        final_input = self._input(shown, shown - old_shown, last_action, reward, no, no, found, obs)
        final_input = jnp.where(diverged[:, None], state.input, final_input)

        obs = select(end, spare.obs, obs)
        obs_matrix, act_matrix = select(trial_end, (spare.obs_matrix, spare.act_matrix),
                                        (state.obs_matrix, state.act_matrix))
        shown = self.project_observation(obs_matrix, obs)
        inputs = self._input(shown, jnp.where(end[:, None], 0.0, shown - old_shown),
                             jnp.where(trial_end[:, None], 0.0, last_action),
                             jnp.where(trial_end, 0.0, reward), end, trial_end,
                             [jnp.where(end[:, None], 0.0, x) for x in found], obs)
        if self.identify:
            fresh = self.start_identification(obs_matrix, obs)
            # the first change of an episode does not follow from the last one's
            begun = identified._replace(o=fresh.o, change=fresh.change, action=fresh.action)
            identified = select(trial_end, fresh, select(end, begun, identified))
        env_states = tuple(
            select(ended, fresh, jax.tree.map(lambda new, old: new.astype(old.dtype), new, old))
            for ended, fresh, new, old in zip(self._blocks(end), spare.env, stepped, state.env))

        episode_return = state.episode_return + reward
        out = LaneStep(reward, terminated, truncated, end, trial_end, final_input, episode_return,
                       state.episode_complete, diverged, state.trial_step)
        state = LanesState(
            env=env_states, obs_matrix=obs_matrix, act_matrix=act_matrix, spare=spare, input=inputs,
            identified=identified, episode_step=jnp.where(end, 0, state.episode_step + 1),
            episode=jnp.where(trial_end, 0, episode), trial_step=jnp.where(trial_end, 0, state.trial_step + 1),
            episode_complete=state.episode_complete | end, episode_return=jnp.where(end, 0.0, episode_return), key=key)
        return state, inputs, out

    def summary(self, step, bins=10):
        """What happened in a rollout.

        Args:
          step: LaneStep of arrays (T, num_lanes).
          bins: equal parts of a trial.

        Returns:
          dict of "return" (tasks,), mean of the whole episodes that ended (NaN if none); "reward" (tasks,), mean per
          step of the environment; "curve" (tasks, bins), the same by time within the trial; "diverged" (), how often.
        """
        T, tasks = len(step.reward), len(self.tasks)

        def per_task(x):
            return self.pmean(x.reshape(T, tasks, -1).sum((0, 2)))  # (T, N) -> (tasks,)

        whole = step.episode_end & step.episode_complete
        curve_bin = jnp.clip(step.trial_step * bins // (self.trial_length or T), 0, bins - 1)
        index = jnp.asarray(self.lane_task) * bins + curve_bin  # (T, N)
        reward = step.reward / self.action_repeat
        totals, counts = (self.pmean(jax.ops.segment_sum(x.ravel(), index.ravel(), tasks * bins).reshape(tasks, bins))
                          for x in (reward, jnp.ones_like(reward)))
        return {"return": per_task(jnp.where(whole, step.episode_return, 0.0)) / per_task(whole),
                "reward": per_task(reward) / (T * self.num_lanes // tasks), "curve": totals / counts,
                "diverged": self.shards * self.pmean(step.diverged.sum())}
