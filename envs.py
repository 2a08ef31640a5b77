"""Environments by name, and `Trials`: many environments side by side, seen through random projections.

    env, params = make("finger-spin")                # also "CartPole-v1", "popgym:...", "brax:ant"
    obs, state = env.reset(key, params)              # every environment has gymnax's interface

    trials = Trials(TRAIN_TASKS, num_envs=192)       # many tasks, random projections, trials
    state, observation = trials.reset(key)
    state, observation, transition = trials.step(state, action, t)

A *trial* is a number of episodes of one task under one pair of random linear projections (Lu et al.,
arXiv 2303.03982, section 5): the agent observes o' = symlog(Mo o) and acts by a = clip(Ma a', -1, 1).
Mo and Ma are drawn anew in every trial, so an agent cannot memorise a task. It has to find out, inside
its context, what its inputs mean and what its outputs do.

This file needs jax and flax. gymnax, dmc.py, popgym.py, brax_env.py and sysid.py are imported only when
one of their environments, or system identification, is requested.
"""

import ast
import difflib
import importlib
import math
import sys
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# The split of Lu et al.: an agent trains on the first six tasks and is tested on the other five, too.
TRAIN_TASKS = (
    "ball_in_cup-catch", "cartpole-swingup", "finger-spin", "finger-turn_hard", "point_mass-easy",
    "reacher-easy")
HELD_OUT_TASKS = (
    "cartpole-balance", "finger-turn_easy", "pendulum-swingup", "point_mass-hard", "reacher-hard")
PROJECTIONS = ("gaussian", "orthogonal", "rademacher", "identity", "none")
ACTION_BINS = 9  # values of a continuous action, per dimension
CPU_BLOCK = 128  # most environments that a CPU steps at once: their arrays then fit its cache


# ---- Environments by name ------------------------------------------------------------------------
def is_dmc(name: Any) -> bool:
    """Whether `name` is a DMControl task: "dmc:TASK", or TASK alone, which starts in lower case."""
    task = str(name).removeprefix("dmc:")
    return isinstance(name, str) and ":" not in task and task[:1].islower()


def parse_kwargs(texts: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments of `make` from texts: ("memory_length=64",) -> {"memory_length": 64}."""
    kwargs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"env_kwargs {text!r}: expected KEY=VALUE")
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a plain text, such as a name
            kwargs[name] = value
    return kwargs


def make(name: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The environment called `name` and its parameters, as gymnax.make.

    Args:
      name: "finger-spin" or "dmc:finger-spin", "popgym:RepeatPreviousHard", "brax:ant", a gymnax name
        such as "CartPole-v1", "MODULE:NAME" for a class or function of your own that returns a
        gymnax-style environment, or such an environment itself.
      **kwargs: fields of the environment's parameters (max_steps_in_episode=...) or arguments of its
        constructor (backend="mjx").

    Returns:
      (environment, parameters).

    Raises:
      ValueError: unknown name, or one that cannot be imported. The nearest known names are given.
      TypeError: unknown keyword argument.
    """
    build = _builder(name) if isinstance(name, str) else lambda: name
    fields = getattr(build().default_params, "__dataclass_fields__", ()) if kwargs else ()
    env = build(**{key: value for key, value in kwargs.items() if key not in fields})
    changes = {key: value for key, value in kwargs.items() if key in fields}
    return env, env.default_params.replace(**changes) if changes else env.default_params


def _builder(name: str) -> Any:
    """The constructor of the environment called `name`."""
    prefix, _, rest = name.rpartition(":")
    if is_dmc(name):
        import dmc
        known, build = dmc.TASKS, partial(dmc.DMC, rest)
    elif prefix == "popgym":
        import popgym
        known, build = popgym.TASKS, popgym.TASKS.get(rest)
    elif prefix == "brax":
        import brax_env
        known, build = brax_env.names(), partial(brax_env.Brax, rest)
    elif prefix:
        if "" not in sys.path:
            sys.path.append("")  # the working directory
        try:
            return getattr(importlib.import_module(prefix), rest)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"environment {name!r} cannot be imported: {error}") from None
    else:
        import gymnax
        known = gymnax.registered_envs

        def build(**kwargs):
            return gymnax.make(name, **kwargs)[0]
    if rest not in known:
        tasks = [f"{prefix}:{task}" if prefix else task for task in known]
        nearest = difflib.get_close_matches(name, tasks, n=3, cutoff=0.4) or sorted(tasks)
        raise ValueError(f"unknown environment {name!r}; nearest: {', '.join(nearest)}")
    return build


# ---- Spaces: read by their attributes, so that those of gymnax, gymnasium and your own do ----------
def parts_of(space: Any) -> list[Any]:
    """The spaces inside dictionaries and tuples, in the order of jax.tree.leaves of an observation."""
    if hasattr(space, "n") or getattr(space, "shape", None) is not None:
        return [space]
    inner = getattr(space, "spaces", space)
    if not isinstance(inner, (dict, tuple, list)):
        return [space]
    inner = [inner[key] for key in sorted(inner)] if isinstance(inner, dict) else inner
    return [part for child in inner for part in parts_of(child)]


def choices_of(space: Any) -> tuple[int, ...]:
    """Choices in each dimension of a discrete action; () if it is continuous."""
    choices = getattr(space, "nvec", None)  # of a MultiDiscrete space
    choices = getattr(space, "n", ()) if choices is None else choices
    return tuple(int(n) for n in np.ravel(choices))


def _check_spaces(task: Any, observation: Any, action: Any) -> None:
    """ValueError, one sentence that names the space, unless a trainer can use both."""
    for part in parts_of(observation):
        if not hasattr(part, "n") and getattr(part, "shape", None) is None:
            raise ValueError(f"{task} has the observation space {part}, which has neither .n nor .shape")
    bounds = [np.asarray(getattr(action, name, np.nan)) for name in ("low", "high")]
    bounded = getattr(action, "shape", None) is not None and all(np.isfinite(x).all() for x in bounds)
    if not choices_of(action) and not bounded:
        raise ValueError(f"{task} has the action space {action}; supported are one or more discrete "
                         "choices (.n or .nvec), and arrays (.shape) with finite .low and .high")


# ---- Projections ---------------------------------------------------------------------------------
def projection_matrix(normal: jax.Array, kind: str) -> jax.Array:
    """A random projection from independent standard normal entries (..., rows, cols).

    The entries of every random kind have mean 0 and variance 1/cols, so that inputs of variance 1
    give outputs of variance 1. "gaussian": independent normal entries. "rademacher": independent
    +-1/sqrt(cols). "orthogonal": Haar-distributed orthonormal columns (rows >= cols) or rows, scaled
    to that variance. "identity": ones on the diagonal.
    """
    rows, cols = normal.shape[-2:]
    if kind == "gaussian":
        return normal / math.sqrt(cols)
    if kind == "rademacher":
        return jnp.where(normal < 0, -1.0, 1.0) / math.sqrt(cols)
    if kind == "identity":
        return jnp.broadcast_to(jnp.eye(rows, cols, dtype=normal.dtype), normal.shape)
    if rows < cols:
        return projection_matrix(normal.mT, kind).mT / math.sqrt(cols / rows)
    q = jnp.zeros_like(normal)  # Gram-Schmidt by hand: LAPACK's batched QR can deadlock, see sysid.solve
    for j in range(cols):
        column = normal[..., j]
        for _ in range(2):  # the second pass removes the rounding errors of the first
            column = column - (q * (q * column[..., None]).sum(-2, keepdims=True)).sum(-1)
        q = q.at[..., j].set(column / jnp.linalg.norm(column, axis=-1, keepdims=True))
    return q * math.sqrt(rows / cols)


def matvec(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """(N, rows, cols), (N, cols) -> (N, rows) in full float32."""
    return (matrix * x[:, None, :]).sum(-1)


def symlog(x: jax.Array) -> jax.Array:
    """sign(x) log(1 + |x|), elementwise: velocities reach +-100."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def action_values(num_bins: int = ACTION_BINS) -> jax.Array:
    """The values in [-5, 5] that the bins of a continuous action stand for, denser around 0.

    The bound is far beyond 1, every actuator's limit, because most projections leave some direction of
    control weak. The small values serve directions that are strong.
    """
    x = jnp.linspace(-1.0, 1.0, num_bins)
    return 5.0 * x * jnp.abs(x)


# ---- What an agent observes, and what a step returns ---------------------------------------------
class Observation(NamedTuple):
    """What the network observes in one step of N environments. Every field is float32."""

    projected: jax.Array  # (N, obs_size) o' = symlog(Mo o), or symlog(o) without a projection
    change: jax.Array  # (N, obs_size) o' minus the previous o'; 0 at an episode's start; or (N, 0)
    context: jax.Array  # (N, actions + 3) previous action (one-hot if discrete), previous reward,
    # episode start, trial start. Action and reward are 0 at a trial's start only.
    sysid: jax.Array  # (N, F) features of sysid.py, 0 at an episode's start; or (N, 0)
    state: jax.Array  # (N, S) task and raw observation, for the critic in training only; or (N, 0)


class Transition(NamedTuple):
    """The outcome of one step of N environments."""

    reward: jax.Array  # (N,) float32, raw; 0 where diverged
    terminated: jax.Array  # (N,) bool, the task is over: no value follows
    truncated: jax.Array  # (N,) bool, the episode ends, but not because the task is over
    trial_end: jax.Array  # (N,) bool, the hidden state is reset before the next observation
    diverged: jax.Array  # (N,) bool, a number was not finite or a velocity exceeded 1e4
    episode_return: jax.Array  # (N,) float32, sum of the raw rewards of this episode so far
    whole_episode: jax.Array  # (N,) bool, the return counts from the episode's true start

    @property
    def episode_end(self) -> jax.Array:
        return self.terminated | self.truncated


class Counters(NamedTuple):
    """Where N environments are in their trials."""

    episode_step: jax.Array  # (N,) int32; a staggered first episode does not begin at 0
    episode: jax.Array  # (N,) int32, episodes of this trial that are over
    episode_return: jax.Array  # (N,) float32
    whole_episode: jax.Array  # (N,) bool


class Start(NamedTuple):
    """Where an environment starts: an episode takes `env` and `obs`, a trial also the matrices."""

    env: tuple  # per task: states of its environments
    obs: jax.Array  # (N, largest obs_dim) raw observation, zero-padded
    obs_matrix: Any  # (N, obs_size, largest obs_dim), zero-padded; None without a projection
    act_matrix: Any  # (N, largest act_dim, action_size), zero-padded; None without a projection.
    # For discrete actions (N, num_bins) int32, a permutation; None without a projection


@struct.dataclass
class TrialsState:
    """State of N environments, a pytree of arrays. Those of one task are neighbours."""

    env: tuple  # per task: its environments' states; a DMControl task's env[i].qpos is (N / tasks, nq)
    obs_matrix: Any
    act_matrix: Any
    spare: Start  # what the next episode or trial starts from
    projected: jax.Array  # (N, obs_size), as observed last
    sysid: Any  # sysid.State, or None
    counters: Counters
    key: jax.Array


def select(mask: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of `new` where mask (N,), else of `old`, in the dtypes of `old`."""

    def pick(a, b):
        return jnp.where(jnp.expand_dims(mask, tuple(range(1, b.ndim))), a, b).astype(b.dtype)

    return jax.tree.map(pick, new, old)


def pad_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x (N, ...) with zeros up to (N, *shape)."""
    return jnp.pad(x, [(0, 0)] + [(0, want - have) for want, have in zip(shape, x.shape[1:])])


def vmap_in_blocks(f: Any, x: Any) -> Any:
    """jax.vmap(f)(x), on a CPU in equal blocks of at most CPU_BLOCK where the size allows."""
    n = len(jax.tree.leaves(x)[0])
    blocks = next(k for k in range(-(-n // CPU_BLOCK), n + 1) if n % k == 0)
    size = n // blocks
    if blocks == 1 or size < CPU_BLOCK // 4 or jax.default_backend() != "cpu":
        return jax.vmap(f)(x)
    return jax.lax.map(f, x, batch_size=size)


# ---- Trials --------------------------------------------------------------------------------------
class Trials:
    """Many environments side by side, in trials under random projections.

    The environments are split equally among `tasks`, in contiguous blocks, and each task steps its own
    only. Bounded action spaces other than [-1, 1] are scaled. Discrete actions are permuted instead of
    projected. Spare starts of DMControl tasks are drawn every `refresh_every` steps for all
    environments, not in every step; an environment uses one twice only if it diverges twice in between.

    Args:
      tasks: names or environments, see `make`.
      num_envs: number of environments N on this device, a multiple of the number of tasks.
      projection: one of PROJECTIONS. "none" passes observation and action as they are.
      obs_size: size of a projected observation.
      action_size: dimensions of the agent's continuous action before projection.
      episodes_per_trial: episodes under one pair of projections.
      action_repeat: environment steps with one action; rewards are summed. Step counts are after it.
      observe_action: observe the previous action.
      observe_change: observe the change of the projected observation.
      sysid: observe the features of sysid.py.
      privileged: give Observation.state its contents.
      env_kwargs: further arguments of `make`.
      axis: name of a mapped axis whose devices share the environments, each N of them.

    Attributes:
      envs, params: the environments and their parameters, per task.
      task_of_env: (N,) numpy int, index of each environment's task.
      action_dims, num_bins: an action is (N, action_dims) int32 with values below num_bins.
      max_episode_steps, trial_length: of the shortest task; None where episodes have no limit.
      refresh_every: steps between two draws of spare starts.

    Raises:
      ValueError: the environments cannot be split, or the tasks do not go together, or a size is too
        small for a projection that must lose nothing.
    """

    def __init__(self, tasks, num_envs, *, projection="gaussian", obs_size=12, action_size=2,
                 episodes_per_trial=1, action_repeat=1, observe_action=True, observe_change=True,
                 sysid=True, privileged=True, env_kwargs=None, axis=None):
        if not tasks or num_envs < 1 or num_envs % len(tasks):
            raise ValueError(f"cannot split {num_envs} environments equally among {len(tasks)} tasks")
        if projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
        if min(episodes_per_trial, action_repeat) < 1:
            raise ValueError("episodes_per_trial and action_repeat must be at least 1, "
                             f"got {episodes_per_trial} and {action_repeat}")
        self.tasks, self.num_envs, self.projection, self.axis = tuple(tasks), num_envs, projection, axis
        self.episodes_per_trial, self.action_repeat = episodes_per_trial, action_repeat
        self.observe_action, self.observe_change = observe_action, observe_change
        self.privileged = privileged
        self.sysid = importlib.import_module("sysid") if sysid else None
        self.envs, self.params = zip(*(make(task, **(env_kwargs or {})) for task in self.tasks))
        self.task_of_env = np.repeat(np.arange(len(self.tasks)), num_envs // len(self.tasks))
        self._read_spaces(obs_size, action_size)
        self._read_limits()

    def _read_spaces(self, obs_size, action_size):
        observed = [env.observation_space(params) for env, params in zip(self.envs, self.params)]
        actions = [env.action_space(params) for env, params in zip(self.envs, self.params)]
        for task, space, action in zip(self.tasks, observed, actions):
            _check_spaces(task, space, action)
        self.obs_parts = [parts_of(space) for space in observed]
        self.obs_dims = [sum(getattr(part, "n", 0) or math.prod(part.shape) for part in parts)
                         for parts in self.obs_parts]
        self.act_shapes = [getattr(space, "shape", None) or () for space in actions]
        self.act_dims = [math.prod(shape) for shape in self.act_shapes]
        choices = {choices_of(space) for space in actions}
        if len(choices) > 1:
            raise ValueError(f"tasks {self.tasks} do not share one kind of action")
        self.choices = choices.pop()
        self.discrete = bool(self.choices)
        whole = self.projection == "none"
        if whole and len(set(zip(self.obs_dims, self.act_dims))) > 1:
            raise ValueError(
                "projection='none' needs tasks of equal sizes, got (observation, action) sizes "
                f"{list(zip(self.obs_dims, self.act_dims))}; use a projection")
        self.obs_size = self.obs_dims[0] if whole else obs_size
        self.num_bins = max(self.choices, default=ACTION_BINS)
        self.action_dims = len(self.choices) or (self.act_dims[0] if whole else action_size)
        self.action_width = self.action_dims * (self.num_bins if self.discrete else 1)  # as it is observed
        if not self.discrete:
            self._check_sizes()
            self.low, self.high = np.zeros((2, self.num_envs, max(self.act_dims)), np.float32)
            for i, (space, dim) in enumerate(zip(actions, self.act_dims)):
                block = np.ix_(self.task_of_env == i, range(dim))
                self.low[block] = np.broadcast_to(space.low, space.shape).ravel()
                self.high[block] = np.broadcast_to(space.high, space.shape).ravel()

    def _check_sizes(self):
        """Only a random projection of what is not from DMControl may be smaller than the task."""
        for task, obs_dim, act_dim in zip(self.tasks, self.obs_dims, self.act_dims):
            lossless = self.projection in ("identity", "orthogonal") or is_dmc(task)
            small = self.obs_size < obs_dim or self.action_dims < act_dim
            if self.projection != "none" and lossless and small:
                raise ValueError(
                    f"the {self.projection} projection needs obs_size >= {obs_dim} and action_size >= "
                    f"{act_dim} for {task}, got {self.obs_size} and {self.action_dims}")

    def _read_limits(self):
        steps = [getattr(params, "max_steps_in_episode", None) for params in self.params]
        steps = [None if n is None else math.ceil(n / self.action_repeat) for n in steps]
        known = [n for n in steps if n is not None]
        self.max_episode_steps = min(known, default=None)
        self.trial_length = self.max_episode_steps and self.max_episode_steps * self.episodes_per_trial
        self.staggered = len(known) == len(steps)
        self.limits = np.array([n or 2**30 for n in steps], np.int32)[self.task_of_env]
        slow = all(map(is_dmc, self.tasks))  # episodes of known length whose starts are costly
        self.refresh_every = max(1, min(500, self.max_episode_steps // 2)) if slow else 1

    # -- interface
    def reset(self, key, stagger=True):
        """All environments at the start of a trial.

        Args:
          key: random key.
          stagger: begin each first trial with a uniformly random part of its time already spent, so
            that trials do not all end at once. Only the counters know: states are fresh.

        Returns:
          (TrialsState, Observation).
        """
        key, draw_key, stagger_key = jax.random.split(key, 3)
        both = jax.vmap(self._draw)(jax.random.split(draw_key))
        first, spare = (jax.tree.map(lambda x: x[i], both) for i in range(2))
        N, spent = self.num_envs, jnp.zeros(self.num_envs, jnp.int32)
        if stagger and self.staggered:
            spent = jax.vmap(lambda k, limit: jax.random.randint(k, (), 0, limit))(
                self.split(stagger_key), self.limits * self.episodes_per_trial)
        step, no, yes = spent % self.limits, jnp.zeros(N, bool), jnp.ones(N, bool)
        linear = self._project(first.obs_matrix, first.obs)
        state = TrialsState(
            env=first.env, obs_matrix=first.obs_matrix, act_matrix=first.act_matrix, spare=first,
            projected=symlog(linear), sysid=self._start_sysid(linear), key=key,
            counters=Counters(step, spent // self.limits, jnp.zeros(N), step == 0))
        over = Transition(jnp.zeros(N), no, yes, yes, no, jnp.zeros(N), no)
        action, features = jnp.zeros((N, self.action_width)), jnp.zeros((N, self._num_sysid))
        state, observation = self._restart(state, first.obs, action, features, over)
        return state.replace(spare=spare), observation

    def step(self, state, action, t=0):
        """One step of every environment: advance, find which episodes ended, observe, restart.

        Args:
          state: TrialsState.
          action: (N, action_dims) int32, bin indices.
          t: int, index of the step in its rollout. It decides when spare starts are drawn and sysid.py
            solves (0: in this step). Under vmap over seeds it should be unbatched.

        Returns:
          (TrialsState, Observation, Transition). The observation is after any restart.
        """
        key, step_key, draw_key = jax.random.split(state.key, 3)
        draw = jnp.asarray(t % self.refresh_every == 0)
        spare = jax.lax.cond(draw, self._draw, lambda _: state.spare, draw_key)
        state = state.replace(spare=spare, key=key)
        env, obs, *outcome = self._advance(step_key, state, action)
        transition, counters = self._ended(state.counters, *outcome)
        own_action = self._observed_action(action)
        sysid, features = self._identify(state, own_action, obs, transition, t)
        state = state.replace(env=env, counters=counters, sysid=sysid)
        return *self._restart(state, obs, own_action, features, transition), transition

    def split(self, key):
        """A key for every environment, (N, ...), that does not depend on how many devices share them."""
        each = self.num_envs // len(self.tasks)
        shards = jax.lax.axis_size(self.axis) if self.axis else 1
        shard = jax.lax.axis_index(self.axis) if self.axis else 0
        number = jnp.arange(len(self.tasks))[:, None] * shards * each + shard * each + jnp.arange(each)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, number.ravel())

    def summary(self, transition):
        """Metrics of a rollout, over all devices that share the environments.

        Args:
          transition: Transition of arrays (T, N).

        Returns:
          dict: "return" (tasks,), mean return of the whole episodes that ended, NaN if there were none;
          "reward" (tasks,), mean per environment step; "diverged" (), number of steps.
        """
        total = partial(jax.lax.psum, axis_name=self.axis) if self.axis else lambda x: x

        def by_task(x):  # (T, N) -> (tasks,)
            return total(x.reshape(len(x), len(self.tasks), -1).sum((0, 2)))

        whole = transition.episode_end & transition.whole_episode
        steps = self.action_repeat * by_task(jnp.ones_like(transition.reward))
        return {"return": by_task(whole * transition.episode_return) / by_task(whole),
                "reward": by_task(transition.reward) / steps,
                "diverged": total(transition.diverged.sum())}

    # -- the parts of a step
    def _advance(self, key, state, action):
        """(environment states, raw observations, reward, terminated, truncated, sound) after a step."""
        control, results = self._control(state.act_matrix, action), []
        for i, (keys, block) in enumerate(zip(self._blocks(self.split(key)), self._blocks(control))):
            if not self.discrete:
                block = block[:, :self.act_dims[i]].reshape(-1, *self.act_shapes[i])
            env, obs, reward, terminated, truncated = self._repeat(i, keys, state.env[i], block)
            sound = jnp.isfinite(obs).all(-1) & jnp.isfinite(reward)
            if is_dmc(self.tasks[i]):  # a NaN fails the comparison
                sound &= jnp.isfinite(env.qpos).all(-1) & (jnp.abs(env.qvel) <= 1e4).all(-1)
            results.append((env, obs, reward, terminated, truncated, sound))
        env, *rest = zip(*results)
        return env, *map(jnp.concatenate, rest)

    def _repeat(self, i, keys, env, action):
        """`action_repeat` steps of task i's environments; those whose episode ends stop there."""

        def once(k, old):
            repeat_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
            obs, env, reward, terminated, _ = vmap_in_blocks(
                lambda x: self.envs[i].step_env(*x, self.params[i]), (repeat_keys, old[0], action))
            reward = old[2] + reward.reshape(-1).astype(jnp.float32)
            is_truncated = getattr(self.envs[i], "is_truncated", lambda *_: jnp.zeros((), bool))
            truncated = jax.vmap(is_truncated, (0, None))(env, self.params[i])
            new = env, self._flat_obs(i, obs), reward, terminated, truncated
            return select(~(old[3] | old[4]), new, old)

        n, no = len(keys), jnp.zeros(len(keys), bool)
        none = env, jnp.zeros((n, max(self.obs_dims))), jnp.zeros(n), no, no
        return jax.lax.fori_loop(0, self.action_repeat, once, none)

    def _ended(self, counters, reward, terminated, truncated, sound):
        """(Transition, Counters after it): which episodes and trials end with this step."""
        diverged = ~sound
        reward = jnp.where(diverged, 0.0, reward)
        terminated &= sound
        out_of_time = truncated | (counters.episode_step + 1 >= self.limits)
        truncated = (out_of_time | diverged) & ~terminated
        end = terminated | truncated
        episode = counters.episode + end
        trial_end = end & (episode >= self.episodes_per_trial)
        episode_return = counters.episode_return + reward
        transition = Transition(reward, terminated, truncated, trial_end, diverged, episode_return,
                                counters.whole_episode)
        return transition, Counters(
            episode_step=jnp.where(end, 0, counters.episode_step + 1),
            episode=jnp.where(trial_end, 0, episode),
            episode_return=jnp.where(end, 0.0, episode_return),
            whole_episode=counters.whole_episode | end)

    def _identify(self, state, action, obs, transition, t):
        """(sysid.State, its features (N, F)) after the step; a diverged step is left out."""
        if not self.sysid:
            return None, jnp.zeros((self.num_envs, 0))
        linear = self._project(state.obs_matrix, obs)
        new = self.sysid.update(state.sysid, action, transition.reward, linear)
        new = select(transition.diverged, state.sysid, new)
        new = jax.lax.cond(t % self.sysid.FIT_EVERY == 0, self.sysid.fit, lambda state: state, new)
        return new, self.sysid.features(new)

    def _restart(self, state, obs, action, features, transition):
        """(TrialsState, Observation) with the ended episodes and trials begun anew."""
        end, trial_end, spare = transition.episode_end, transition.trial_end, state.spare
        obs = select(end, spare.obs, obs)
        obs_matrix, act_matrix = select(trial_end, (spare.obs_matrix, spare.act_matrix),
                                        (state.obs_matrix, state.act_matrix))
        linear = self._project(obs_matrix, obs)
        projected = symlog(linear)
        observation = self._observation(
            projected, jnp.where(end[:, None], 0.0, projected - state.projected),
            jnp.where((trial_end | transition.diverged)[:, None], 0.0, action),
            jnp.where(trial_end, 0.0, transition.reward), end, trial_end,
            jnp.where(end[:, None], 0.0, features), obs)
        sysid = state.sysid
        if self.sysid:
            fresh = self._start_sysid(linear)
            # the first change of an episode does not follow from the last change of the episode before
            continued = sysid._replace(o=fresh.o, change=fresh.change, action=fresh.action)
            sysid = select(trial_end, fresh, select(end, continued, sysid))
        env = tuple(map(select, self._blocks(end), spare.env, state.env))
        return state.replace(env=env, obs_matrix=obs_matrix, act_matrix=act_matrix,
                             projected=projected, sysid=sysid), observation

    # -- observations, actions, starts
    def _observation(self, projected, change, action, reward, episode_start, trial_start, sysid, obs):
        context = jnp.stack([reward, episode_start, trial_start], -1).astype(jnp.float32)
        if self.observe_action:
            context = jnp.concatenate([action, context], -1)
        return Observation(projected, change if self.observe_change else change[:, :0], context, sysid,
                           self._privileged_state(obs))

    def _privileged_state(self, obs):
        """[1, symlog(raw observation)] in the place of the environment's task, else zeros."""
        if not self.privileged:
            return obs[:, :0]
        entry = jnp.concatenate([jnp.ones_like(obs[:, :1]), symlog(obs)], -1)
        task = np.eye(len(self.tasks), dtype=np.float32)[self.task_of_env]
        return (task[:, :, None] * entry[:, None]).reshape(len(obs), -1)

    def _project(self, obs_matrix, obs):
        return obs if obs_matrix is None else matvec(obs_matrix, obs)

    def _observed_action(self, action):
        """Actions (N, action_dims) int32 as the agent observes them, (N, action_width) float32."""
        if self.discrete:
            return jax.nn.one_hot(action, self.num_bins).reshape(len(action), -1)
        return action_values(self.num_bins)[action]

    def _control(self, act_matrix, action):
        """Actions (N, action_dims) int32 as the environments take them, (N, act_dim) or (N, ...) int32."""
        if self.discrete:
            if act_matrix is not None:
                action = jnp.take_along_axis(act_matrix, action, -1)
            action = action % np.array(self.choices)  # where dimensions have different numbers of choices
            return action.reshape(len(action), *self.act_shapes[0])
        action = action_values(self.num_bins)[action]
        if act_matrix is not None:
            action = matvec(act_matrix, action)
        action = jnp.clip(action, -1.0, 1.0)
        return 0.5 * (self.low + self.high) + 0.5 * (self.high - self.low) * action

    @property
    def _num_sysid(self):
        return self.sysid.num_features(self.action_width) if self.sysid else 0

    def _start_sysid(self, linear):
        return self.sysid.start(linear, self.action_width) if self.sysid else None

    def _blocks(self, x):
        """x (N, ...) as one array (N / tasks, ...) per task."""
        return jnp.split(x, len(self.tasks))

    def _flat_obs(self, i, obs):
        """Observations of task i as float32 (n, largest obs_dim), zero-padded."""
        parts = [jax.nn.one_hot(x, part.n) if getattr(part, "n", 0) else x
                 for x, part in zip(jax.tree.leaves(obs), self.obs_parts[i], strict=True)]
        flat = [x.reshape(len(x), -1).astype(jnp.float32) for x in parts]
        return pad_to(jnp.concatenate(flat, -1), (max(self.obs_dims),))

    def _matrices(self, key, rows, cols):
        """A projection matrix for every environment, (N, largest of rows, largest of cols)."""
        shape = max(rows), max(cols)
        normal = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(self.split(key))
        return jnp.concatenate([
            pad_to(projection_matrix(block[:, :r, :c], self.projection), shape)
            for block, r, c in zip(self._blocks(normal), rows, cols)])

    def _draw(self, key):
        """A fresh Start for every environment."""
        reset_key, obs_key, act_key = jax.random.split(key, 3)
        states, obs = [], []
        for i, keys in enumerate(self._blocks(self.split(reset_key))):
            first, state = jax.vmap(self.envs[i].reset_env, (0, None))(keys, self.params[i])
            # strong types, as a step returns them
            states.append(jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state))
            obs.append(self._flat_obs(i, first))
        obs_matrix = act_matrix = None
        if self.projection != "none":
            obs_matrix = self._matrices(obs_key, [self.obs_size] * len(self.tasks), self.obs_dims)
            if not self.discrete:
                sizes = [self.action_dims] * len(self.tasks)
                act_matrix = self._matrices(act_key, self.act_dims, sizes)
            elif self.projection != "identity":
                act_matrix = jax.vmap(lambda k: jax.random.permutation(k, self.num_bins))(
                    self.split(act_key))
        return Start(tuple(states), jnp.concatenate(obs), obs_matrix, act_matrix)
