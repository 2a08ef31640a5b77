"""Environments by name, and `Trials`: many environments side by side, observed through random projections.

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
one of their environments, or system identification, is requested. Names, spaces, projections and trials
are one file, because a trainer is copied together with all of them.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import math
import sys
from functools import partial
from typing import Any, Callable, NamedTuple

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
FAMILIES = ("dmc", "popgym", "brax", "gymnax")  # "dmc:" and "gymnax:" are left out of names
CPU_BLOCK = 128  # most environments that a CPU steps at once: their arrays then fit its cache
NO_LIMIT = 2**30  # steps of an episode without a time limit
REWARDED_AFTER = {  # bsuite's environments that are rewarded at their end, after so many steps or one more
    "MemoryChain-bsuite": ("memory_length", 1), "UmbrellaChain-bsuite": ("chain_length", 0),
    "DeepSea-bsuite": ("size", 0), "Catch-bsuite": ("rows", 0)}
LARGEST = 1e15  # observations beyond it count as diverged: sums of their squares would overflow


# ---- Environments by name ------------------------------------------------------------------------
def is_dmc(name: Any) -> bool:
    """Whether `name` is a DMControl task: "dmc:TASK", or TASK alone, which starts in lower case."""
    task = str(name).removeprefix("dmc:")
    return isinstance(name, str) and ":" not in task and task[:1].islower()


def parse_kwargs(texts: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments of `make` from texts: ("memory_length=64",) -> {"memory_length": 64}."""
    kwargs = {}
    for text in texts:
        name, equals, value = str(text).partition("=")
        if not equals:
            raise ValueError(f"env_kwargs {text!r}: expected KEY=VALUE")
        if name in kwargs:
            raise ValueError(f"env_kwargs: {name} is given twice")
        words = {"true": True, "false": False, "none": None}
        try:
            kwargs[name] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError):  # a plain text, such as a name
            kwargs[name] = value
    return kwargs


def make(name: Any, /, **kwargs: Any) -> tuple[Any, Any]:
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
      ValueError: an unknown name, for which the nearest known names are given, or "help", for which all
        are given; a keyword argument that is unknown, of a wrong type or out of range.
    """
    build = _constructor(name) if isinstance(name, str) else lambda: name
    arguments = inspect.signature(build).parameters.values()
    open_ended = any(argument.kind is argument.VAR_KEYWORD for argument in arguments)
    defaults = {argument.name: argument.default for argument in arguments}
    missing = [argument.name for argument in arguments if argument.name not in kwargs
               and argument.default is argument.empty and argument.kind not in (
                   argument.VAR_POSITIONAL, argument.VAR_KEYWORD)]
    if missing:
        raise ValueError(f"{name!r} needs the argument {', '.join(missing)}")
    try:
        env = build(**_typed(kwargs, defaults))
    except ImportError as error:
        raise ValueError(f"{name!r} needs a package that is not installed: {error}") from None
    except SystemExit:
        raise ValueError(f"{name!r} ends the program instead of giving an environment") from None
    interface = ("default_params", "reset_env", "step_env", "observation_space", "action_space")
    missing = [x for x in interface if not hasattr(env, x)]
    if missing:
        raise ValueError(f"{name!r} is not a gymnax-style environment: no {', '.join(missing)}")
    params = env.default_params
    fields = {key: getattr(params, key) for key in getattr(params, "__dataclass_fields__", ())}
    unknown = kwargs.keys() - (defaults | fields).keys()
    if unknown and not open_ended:
        raise ValueError(f"{name} has no argument {', '.join(sorted(unknown))}; "
                         f"known: {', '.join(defaults | fields) or 'none'}")
    if unknown:
        env = build(**{key: value for key, value in kwargs.items() if key not in fields})
    changes = _typed(kwargs, fields)
    params = params.replace(**changes) if changes else params
    limit = getattr(params, "max_steps_in_episode", None)
    limit = NO_LIMIT if limit is None else limit
    if not 1 <= limit <= NO_LIMIT:
        raise ValueError(f"{name}: max_steps_in_episode must be in 1 ... {NO_LIMIT}, got {limit}")
    length, more = REWARDED_AFTER.get(str(name).removeprefix("gymnax:"), (None, 0))
    steps = getattr(params, length, getattr(env, length, 1)) if length else 1
    if not 1 <= steps <= max(limit - more, 1):
        raise ValueError(f"{name}: {length} must be in 1 ... {limit - more}, got {steps}: no reward comes "
                         f"before, and max_steps_in_episode is {limit}")
    return env, params


def _typed(kwargs: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that have a default, in the type of the default: 1e3 is 1000 for an int."""
    typed = {key: value for key, value in kwargs.items() if key in defaults}
    for key, value in typed.items():
        kind = type(defaults[key])
        number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        fits = {bool: isinstance(value, bool), str: isinstance(value, str),
                float: number and math.isfinite(value), int: number and value % 1 == 0}
        if not fits.get(kind, True):
            raise ValueError(f"{key} must be of type {kind.__name__}, got {value!r}")
        typed[key] = kind(value) if kind in fits else value
    return typed


def _constructors(family: str) -> dict[str, Callable]:
    """{name: constructor} of a family of environments. ImportError if its packages are missing."""
    if family == "dmc":
        import dmc
        return {task: partial(dmc.DMC, task) for task in dmc.TASKS}
    if family == "popgym":
        import popgym
        return popgym.TASKS
    if family == "brax":
        import brax_env
        return {task: partial(brax_env.Brax, task) for task in brax_env.names()}
    import gymnax
    return {task: partial(gymnax.make, task) for task in gymnax.registered_envs}


def names() -> list[str]:
    """The names of all environments whose packages are installed."""
    found = []
    for family in FAMILIES:
        prefix = f"{family}:" if family in ("popgym", "brax") else ""
        # MJX, which brax imports, prints to stdout that it finds no warp
        with contextlib.suppress(ImportError), contextlib.redirect_stdout(sys.stderr):
            found += [prefix + task for task in _constructors(family)]
    return found


def _constructor(name: str) -> Callable:
    """The constructor of the environment called `name`."""
    prefix, _, task = name.rpartition(":")
    family = "dmc" if is_dmc(name) else prefix or "gymnax"
    if name == "help":
        raise ValueError(f"--env takes MODULE:NAME, or one of: {', '.join(names())}")
    try:
        if family not in FAMILIES:
            sys.path += [] if "" in sys.path else [""]  # the working directory
            found = getattr(importlib.import_module(family), task)
            return found if callable(found) else lambda: found
        build = _constructors(family).get(task)
    except (Exception, SystemExit) as error:  # of any kind: a module of the user's is run
        raise ValueError(f"environment {name!r} cannot be imported: {error}") from None
    if build is None:
        known = {known.rpartition(":")[2]: known for known in names()}
        nearest = difflib.get_close_matches(task, known, n=3, cutoff=0.4)
        raise ValueError(f"unknown environment {name!r}; nearest: "
                         f"{', '.join(map(known.get, nearest)) or 'none'}; --env help lists all")
    return type(build()[0]) if family == "gymnax" else build


# ---- Spaces: read by their attributes, so that those of gymnax, gymnasium and your own do ----------
class ActionSpace(NamedTuple):
    """What is read of an action space."""

    shape: tuple[int, ...]
    choices: tuple[int, ...]  # in each dimension; () if continuous
    first: tuple[int, ...]  # lowest choice in each dimension
    low: np.ndarray  # (prod(shape),) float32 bounds, if continuous
    high: np.ndarray


def action_space(space: Any) -> ActionSpace:
    """Reads one or more discrete choices, or a bounded array. ValueError if it is something else."""
    shape = tuple(getattr(space, "shape", None) or ())
    choices = getattr(space, "nvec", None)  # of a MultiDiscrete space
    if choices is not None:
        shape = np.shape(choices)
    else:
        choices = np.full(shape, 2) if shape and hasattr(space, "n") else getattr(space, "n", ())
    choices = np.ravel(choices)
    first = np.broadcast_to(np.ravel(getattr(space, "start", 0)), choices.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = (np.broadcast_to(np.float32(getattr(space, bound, np.nan)), shape).ravel()
                     for bound in ("low", "high"))
        bounded = np.isfinite(high - low).all() and (low <= high).all()
    if not len(choices) and not (bounded and getattr(space, "shape", None) is not None):
        raise ValueError(f"the action space {space} is not supported; supported are one or more discrete "
                         "choices (.n or .nvec), and arrays (.shape) with finite .low and .high")
    return ActionSpace(shape, tuple(map(int, choices)), tuple(map(int, first)), low, high)


def parts_of(space: Any) -> list[Any]:
    """The spaces inside dictionaries and tuples, in the order of jax.tree.leaves of an observation."""
    if hasattr(space, "n") or getattr(space, "shape", None) is not None:
        return [space]
    inner = getattr(space, "spaces", space)
    if isinstance(inner, dict):
        inner = [inner[key] for key in sorted(inner)]
    if not isinstance(inner, (tuple, list)):
        raise ValueError(f"the observation space {space} has neither .n nor .shape")
    return [part for child in inner for part in parts_of(child)]


def size_of(space: Any) -> int:
    """Numbers in an observation of a space without parts; a discrete one is one-hot."""
    return space.n if is_discrete(space) else math.prod(space.shape)


def is_discrete(space: Any) -> bool:
    """Whether a space is one choice; several, such as binary ones, have a shape."""
    return hasattr(space, "n") and not getattr(space, "shape", None)


# ---- Projections ---------------------------------------------------------------------------------
def is_random(projection: str) -> bool:
    """Whether a projection is drawn in every trial, so that an agent has to identify it."""
    return projection not in ("identity", "none")


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
    x = jnp.linspace(-1.0, 1.0, num_bins, dtype=jnp.float32)
    return 5.0 * x * jnp.abs(x)


# ---- What an agent observes, and what a step returns ---------------------------------------------
class Observation(NamedTuple):
    """What the network observes in one step of N environments. Every field is float32."""

    projected: jax.Array  # (N, obs_size) o' = symlog(Mo o), or symlog(o) without a projection
    change: jax.Array  # (N, obs_size) o' minus the previous o'; 0 at an episode's start; or (N, 0)
    context: jax.Array  # (N, actions + 3) previous action (one-hot if discrete), previous reward,
    # episode start, trial start. Action and reward are 0 at a trial's start and after a divergence.
    sysid: jax.Array  # (N, F) features of sysid.py, 0 at an episode's start; or (N, 0)
    state: jax.Array  # (N, S) task and raw observation, for the critic in training only; or (N, 0)
    dt: Any = None  # (N,) duration of the last step, see Trials.time_unit; None where all last equally


class Transition(NamedTuple):
    """The outcome of one step of N environments."""

    reward: jax.Array  # (N,) float32, raw; 0 where diverged
    terminated: jax.Array  # (N,) bool, the task is over: no value follows
    truncated: jax.Array  # (N,) bool, the episode ends, but not because the task is over
    trial_end: jax.Array  # (N,) bool, the hidden state is reset before the next observation
    diverged: jax.Array  # (N,) bool, a number was not finite, or too large, in the step or at its start
    episode_return: jax.Array  # (N,) float32, sum of the raw rewards of this episode so far
    whole_episode: jax.Array  # (N,) bool, the return counts from the episode's true start
    episode_step: Any = None  # (N,) int32, environment steps of this episode so far
    dt: Any = None  # (N,) float32, duration of the step; None where all steps last equally

    @property
    def episode_end(self) -> jax.Array:
        return self.terminated | self.truncated


class Counters(NamedTuple):
    """Where N environments are in their trials."""

    episode_step: jax.Array  # (N,) int32, environment steps; a staggered first episode begins above 0
    episode: jax.Array  # (N,) int32, episodes of this trial that are over
    episode_return: jax.Array  # (N,) float32
    whole_episode: jax.Array  # (N,) bool
    sound: jax.Array  # (N,) bool, the last observation can be used, see is_sound


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


def is_sound(obs: jax.Array) -> jax.Array:
    """(N,) bool, which of the observations (N, ...) can be used: no number is NaN or beyond LARGEST."""
    return (jnp.abs(obs) < LARGEST).all(-1)


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
@dataclasses.dataclass(eq=False)
class Trials:
    """Many environments side by side, in trials under random projections.

    The environments are split equally among `tasks`, in contiguous blocks, and each task steps its own
    only. Actions are scaled to the bounds of their space. Discrete actions are permuted instead of
    projected. Spare starts of DMControl tasks are drawn every `refresh_every` steps for all
    environments, not in every step; an environment uses one twice only if it diverges twice in between.

    Attributes:
      envs, params: the environments and their parameters, per task.
      task_of_env: (N,) numpy int, index of each environment's task.
      action_dims, num_bins: an action is (N, action_dims) int32 with values below num_bins.
      max_episode_steps, trial_length: of the shortest task; None where episodes have no limit.
      refresh_every: steps between two draws of spare starts.
      durations: all values that Observation.dt can take; () if there is no dt, or more than 17 values.

    Raises:
      ValueError: the environments cannot be split, or the tasks do not go together, or a size is too
        small for a projection that must lose nothing.
    """

    tasks: tuple  # names or environments, see `make`
    num_envs: int  # environments N on this device, a multiple of the number of tasks
    _: dataclasses.KW_ONLY
    projection: str = "gaussian"  # one of PROJECTIONS; "none" passes observation and action as they are
    obs_size: int = 12  # size of a projected observation
    action_size: int = 2  # dimensions of the agent's continuous action before projection
    episodes_per_trial: int = 1  # episodes under one pair of projections
    action_repeat: Any = 1  # environment steps with one action; of several, each step draws one
    time_unit: float | None = None  # environment steps of duration 1 (default: the mean action_repeat)
    observe_action: bool = True  # observe the previous action
    observe_change: bool = True  # observe the change of the projected observation
    sysid: Any = False  # observe the features of sysid.py; becomes that module, or None
    privileged: bool = True  # give Observation.state its contents
    env_kwargs: dict | None = None  # further arguments of `make`
    axis: str | None = None  # a mapped axis whose devices share the environments, each N of them

    def __post_init__(self):
        self.tasks = tuple(self.tasks)
        names = [task.removeprefix("dmc:").removeprefix("gymnax:") for task in self.tasks if isinstance(task, str)]
        if len(set(names)) < len(names):
            raise ValueError(f"a task is listed twice: {', '.join(names)}")
        if not self.tasks or self.num_envs < 1 or self.num_envs % len(self.tasks):
            raise ValueError(f"cannot split {self.num_envs} environments equally among "
                             f"{len(self.tasks)} tasks")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {self.projection!r}")
        for name in ("obs_size", "action_size", "episodes_per_trial", "action_repeat"):
            if np.min(getattr(self, name), initial=1) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.repeats = np.atleast_1d(np.asarray(self.action_repeat, np.int32))
        self.mean_repeat = self.repeats[0] if len(self.repeats) == 1 else self.repeats.mean()
        self.irregular = len(self.repeats) > 1 or self.time_unit is not None
        self.time_unit = self.time_unit or self.mean_repeat
        longest = self.repeats.max() if self.irregular else 0  # an episode's end can cut an action short
        self.durations = (1.0, *(np.arange(1, longest + 1) / self.time_unit)) if 0 < longest <= 16 else ()
        self.sysid = importlib.import_module("sysid") if self.sysid else None
        self.envs, self.params = zip(*(make(task, **(self.env_kwargs or {})) for task in self.tasks))
        self.task_of_env = np.repeat(np.arange(len(self.tasks)), self.num_envs // len(self.tasks))
        self._read_spaces()
        self._read_limits()

    def _read_spaces(self):
        self.obs_parts = [parts_of(env.observation_space(params))
                          for env, params in zip(self.envs, self.params)]
        self.obs_dims = [sum(map(size_of, parts)) for parts in self.obs_parts]
        actions = [action_space(env.action_space(params)) for env, params in zip(self.envs, self.params)]
        self.act_shapes = [space.shape for space in actions]
        self.act_dims = [math.prod(shape) for shape in self.act_shapes]
        if len({(space.choices, space.first) for space in actions}) > 1:
            raise ValueError(f"tasks {self.tasks} do not share one kind of action")
        self.choices, self.first_choice = actions[0].choices, actions[0].first
        self.discrete = bool(self.choices)
        whole = self.projection == "none"
        sizes = list(zip(self.obs_dims, self.act_dims))
        if whole and len(set(sizes)) > 1:
            raise ValueError("projection='none' needs tasks of equal sizes, got (observation, action) "
                             f"sizes {sizes}; use a projection")
        self.obs_size = self.obs_dims[0] if whole else self.obs_size
        self.num_bins = max(self.choices, default=ACTION_BINS)
        self.action_dims = len(self.choices) or (self.act_dims[0] if whole else self.action_size)
        self.action_width = self.action_dims * (self.num_bins if self.discrete else 1)  # as it is observed
        for task, (obs_dim, act_dim) in zip(self.tasks, sizes):
            # only a random projection of what is not from DMControl may be smaller than the task
            lossless = self.projection in ("identity", "orthogonal") or is_dmc(task)
            if lossless and not whole and (self.obs_size < obs_dim or self.action_dims < act_dim):
                raise ValueError(
                    f"the {self.projection} projection needs obs_size >= {obs_dim} and action_size >= "
                    f"{act_dim} for {task}, got {self.obs_size} and {self.action_dims}")
        if self.discrete:
            return
        self.low, self.high = (  # (N, largest act_dim), zero-padded
            np.stack([np.pad(getattr(space, bound), (0, max(self.act_dims) - dim))
                      for space, dim in zip(actions, self.act_dims)])[self.task_of_env]
            for bound in ("low", "high"))

    def _read_limits(self):
        limits = [getattr(params, "max_steps_in_episode", None) for params in self.params]
        known = [limit for limit in limits if limit is not None]
        if max(self.repeats) > min(known, default=NO_LIMIT):
            raise ValueError(f"action_repeat={self.action_repeat} is longer than an episode, "
                             f"which has {min(known)} steps")
        if max(known, default=1000) * self.episodes_per_trial >= 2**31:
            raise ValueError(f"episodes_per_trial={self.episodes_per_trial} is too large: "
                             "a trial must have fewer than 2**31 steps")
        self.max_episode_steps = math.ceil(min(known) / min(self.repeats)) if known else None
        self.trial_length = self.max_episode_steps and self.max_episode_steps * self.episodes_per_trial
        self.staggered = len(known) == len(limits)
        limits = [NO_LIMIT if limit is None else limit for limit in limits]
        self.limits = np.array(limits, np.int32)[self.task_of_env]  # in environment steps
        slow = all(map(is_dmc, self.tasks))  # episodes of known length whose starts are costly
        self.refresh_every = max(1, min(500, math.ceil(min(limits) / max(self.repeats)) // 2)) if slow else 1

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
        both = jax.vmap(self.draw)(jax.random.split(draw_key))
        first, spare = (jax.tree.map(lambda x: x[i], both) for i in range(2))
        spent = jnp.zeros(self.num_envs, jnp.int32)
        steps = np.ceil(self.limits / self.mean_repeat).astype(np.int32)
        if stagger and self.staggered:
            spent = jax.vmap(lambda k, limit: jax.random.randint(k, (), 0, limit, jnp.int32))(
                self.split(stagger_key), steps * self.episodes_per_trial)
        state, observation = self.begin(first)
        step = (spent % steps * np.float32(self.mean_repeat)).astype(jnp.int32)
        counters = state.counters._replace(
            episode_step=step, episode=spent // steps, whole_episode=step == 0)
        return state.replace(spare=spare, counters=counters, key=key), observation

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
        spare = jax.lax.cond(draw, self.draw, lambda _: state.spare, draw_key)
        state = state.replace(spare=spare, key=key)
        env, obs, *outcome = self.advance(step_key, state, action)
        transition, counters = self._ended(state.counters, *outcome)
        own_action = self.observed_action(action)
        sysid, features = self.identify(state, own_action, obs, transition, t)
        state = state.replace(env=env, counters=counters, sysid=sysid)
        return *self.restart(state, obs, own_action, features, transition), transition

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
          dict: "return" (tasks,), mean return of the whole episodes that ended and not by divergence, NaN if
          there were none (-inf under JAX_DEBUG_NANS, which stops at a NaN); "length" (tasks,), their mean number of
          environment steps; "reward" (tasks,), mean per environment step; "diverged" (), number of steps.
        """
        total = partial(jax.lax.psum, axis_name=self.axis) if self.axis else lambda x: x

        def by_task(x):  # (T, N) -> (tasks,)
            return total(x.reshape(len(x), len(self.tasks), -1).sum((0, 2)))

        whole = transition.episode_end & transition.whole_episode & ~transition.diverged
        episodes = by_task(whole)
        nothing = -jnp.inf if jax.config.jax_debug_nans else jnp.nan

        def mean(x):  # over these episodes
            return jnp.where(episodes > 0, by_task(whole * x) / jnp.maximum(episodes, 1), nothing)

        dt = jnp.ones_like(transition.reward) if transition.dt is None else transition.dt
        steps = self.time_unit * by_task(dt)
        return {"return": mean(transition.episode_return), "length": mean(transition.episode_step),
                "reward": by_task(transition.reward) / steps,
                "diverged": total(transition.diverged.sum())}

    # -- the parts of a step
    def advance(self, key, state, action):
        """(environment states, raw observations, reward, terminated, truncated, lasted, sound) after a step.

        `lasted` (N,) int32 is the number of environment steps that were taken.
        """
        control = self.control(state.act_matrix, action)
        repeats = jnp.full(self.num_envs, self.repeats[0])
        if len(self.repeats) > 1:
            repeats = jax.vmap(lambda k: jax.random.choice(jax.random.fold_in(k, 0), self.repeats))(
                self.split(jax.random.fold_in(key, 1)))
        results = []
        for i, (keys, block, count) in enumerate(zip(
                *map(self.blocks, (self.split(key), control, repeats)))):
            if not self.discrete:
                block = block[:, :self.act_dims[i]].reshape(-1, *self.act_shapes[i])
            env, obs, reward, *ends = self._repeat(i, keys, state.env[i], block, count)
            sound = is_sound(obs) & jnp.isfinite(reward)
            if is_dmc(self.tasks[i]):  # a NaN fails the comparison
                sound &= jnp.isfinite(env.qpos).all(-1) & (jnp.abs(env.qvel) <= 1e4).all(-1)
            results.append((env, obs, reward, *ends, sound))
        env, *rest = zip(*results)
        return env, *map(jnp.concatenate, rest)

    def _repeat(self, i, keys, env, action, count):
        """`count` (n,) steps of task i's environments; those whose episode ends stop there."""

        def once(k, old):
            repeat_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, k)
            obs, env, reward, terminated, _ = vmap_in_blocks(
                lambda x: self.envs[i].step_env(*x, self.params[i]), (repeat_keys, old[0], action))
            reward = old[2] + reward.reshape(-1).astype(jnp.float32)
            is_truncated = getattr(self.envs[i], "is_truncated", lambda *_: jnp.zeros((), bool))
            truncated = jax.vmap(is_truncated, (0, None))(env, self.params[i])
            new = env, self.flat_obs(i, obs), reward, terminated, truncated, old[5] + 1
            return select(~(old[3] | old[4]) & (k < count), new, old)

        n = len(keys)
        no = jnp.zeros(n, bool)
        none = (env, jnp.zeros((n, max(self.obs_dims)), jnp.float32), jnp.zeros(n, jnp.float32), no, no,
                jnp.zeros(n, jnp.int32))
        return jax.lax.fori_loop(0, max(self.repeats), once, none)

    def _ended(self, counters, reward, terminated, truncated, lasted, sound):
        """(Transition, Counters after it): which episodes and trials end with this step."""
        diverged = ~(sound & counters.sound & jnp.isfinite(counters.episode_return + reward))
        reward = jnp.where(diverged, 0.0, reward)
        terminated &= ~diverged
        step = counters.episode_step + lasted
        out_of_time = truncated | (step >= self.limits)
        truncated = (out_of_time | diverged) & ~terminated
        end = terminated | truncated
        episode = counters.episode + end
        trial_end = end & (episode >= self.episodes_per_trial)
        episode_return = counters.episode_return + reward
        transition = Transition(reward, terminated, truncated, trial_end, diverged, episode_return,
                                counters.whole_episode, step, self._duration(lasted))
        return transition, counters._replace(
            episode_step=jnp.where(end, 0, step),
            episode=jnp.where(trial_end, 0, episode),
            episode_return=jnp.where(end, 0.0, episode_return),
            whole_episode=counters.whole_episode | end)

    def identify(self, state, action, obs, transition, t):
        """(sysid.State, its features (N, F)) after the step; a diverged step is left out."""
        if not self.sysid:
            return None, jnp.zeros((len(obs), 0), jnp.float32)
        linear = self.project(state.obs_matrix, obs)
        new = self.sysid.update(state.sysid, action, transition.reward, linear, transition.dt)
        new = select(transition.diverged, state.sysid, new)
        new = jax.lax.cond(t % self.sysid.FIT_EVERY == 0, self.sysid.fit, lambda state: state, new)
        return new, self.sysid.features(new)

    def begin(self, start):
        """(TrialsState without a key, Observation) of trials that begin at `start`, a Start."""
        N = len(start.obs)
        zero = jnp.zeros(N, jnp.float32)
        no, yes = jnp.zeros(N, bool), jnp.ones(N, bool)
        linear = self.project(start.obs_matrix, start.obs)
        state = TrialsState(
            env=start.env, obs_matrix=start.obs_matrix, act_matrix=start.act_matrix, spare=start,
            projected=symlog(linear), sysid=self.start_sysid(linear), key=None,
            counters=Counters(jnp.zeros(N, jnp.int32), jnp.zeros(N, jnp.int32), zero, yes, yes))
        action = jnp.zeros((N, self.action_width), jnp.float32)
        num_features = self.sysid.num_features(self.action_width) if self.sysid else 0
        features = jnp.zeros((N, num_features), jnp.float32)
        over = Transition(zero, no, yes, yes, no, zero, no, dt=self._duration(zero))
        return self.restart(state, start.obs, action, features, over)

    def restart(self, state, obs, action, features, transition):
        """(TrialsState, Observation) with the ended episodes and trials begun anew.

        Args:
          state: TrialsState whose counters are those after the step.
          obs, action, features: (N, ...) raw observation, observed action and sysid features of the step.
          transition: Transition.
        """
        end, trial_end, spare = transition.episode_end, transition.trial_end, state.spare
        obs = select(end, spare.obs, obs)
        sound = is_sound(obs)  # if not, at a start, the agent observes zeros and the first step diverges
        obs = jnp.where(sound[:, None], obs, 0.0)
        obs_matrix, act_matrix = select(trial_end, (spare.obs_matrix, spare.act_matrix),
                                        (state.obs_matrix, state.act_matrix))
        linear = self.project(obs_matrix, obs)
        projected = symlog(linear)
        reward = jnp.where(trial_end, 0.0, transition.reward)
        context = jnp.stack([reward, end, trial_end], -1).astype(jnp.float32)
        if self.observe_action:
            own = jnp.where((trial_end | transition.diverged)[:, None], 0.0, action)
            context = jnp.concatenate([own, context], -1)
        change = jnp.where(end[:, None], 0.0, projected - state.projected)
        observation = Observation(
            projected, change if self.observe_change else change[:, :0], context,
            jnp.where(end[:, None], 0.0, features), self._privileged(obs),
            jnp.where(trial_end, 1.0, transition.dt) if self.irregular else None)
        sysid = state.sysid
        if self.sysid:
            fresh = self.start_sysid(linear)
            # the first change of an episode does not follow from the last change of the episode before
            continued = sysid._replace(o=fresh.o, change=fresh.change, action=fresh.action)
            sysid = select(trial_end, fresh, select(end, continued, sysid))
        env = tuple(map(select, self.blocks(end), spare.env, state.env))
        return state.replace(env=env, obs_matrix=obs_matrix, act_matrix=act_matrix, projected=projected,
                             sysid=sysid, counters=state.counters._replace(sound=sound)), observation

    # -- observations, actions, starts
    def _duration(self, steps):
        """Environment steps (N,) in units of time; None where all steps last equally."""
        return (steps / self.time_unit).astype(jnp.float32) if self.irregular else None

    def _privileged(self, obs):
        """[1, symlog(raw observation)] in the place of the environment's task, else zeros."""
        if not self.privileged:
            return obs[:, :0]
        entry = jnp.concatenate([jnp.ones_like(obs[:, :1]), symlog(obs)], -1)
        task = np.eye(len(self.tasks), dtype=np.float32)[self.task_of_env]
        return (task[:, :, None] * entry[:, None]).reshape(len(obs), -1)

    def project(self, obs_matrix, obs):
        """Mo o, (N, obs_size)."""
        return obs if obs_matrix is None else matvec(obs_matrix, obs)

    def observed_action(self, action):
        """Actions (N, action_dims) int32 as the agent observes them, (N, action_width) float32."""
        if self.discrete:
            return jax.nn.one_hot(action, self.num_bins, dtype=jnp.float32).reshape(len(action), -1)
        return action_values(self.num_bins)[action]

    def control(self, act_matrix, action):
        """Actions (N, action_dims) int32 as the environments take them, (N, act_dim) or (N, ...) int32."""
        if self.discrete:
            if act_matrix is not None:
                action = jnp.take_along_axis(act_matrix, action, -1)
            # where dimensions have different numbers of choices
            action = action % np.array(self.choices, np.int32) + np.array(self.first_choice, np.int32)
            return action.reshape(len(action), *self.act_shapes[0])
        action = action_values(self.num_bins)[action]
        if act_matrix is not None:
            action = matvec(act_matrix, action)
        action = jnp.clip(action, -1.0, 1.0)
        control = 0.5 * (self.low + self.high) + 0.5 * (self.high - self.low) * action
        return jnp.clip(control, self.low, self.high)  # no rounding beyond the bounds

    def start_sysid(self, linear):
        """sysid.State of trials whose first projected observations are (N, obs_size); or None."""
        return self.sysid.start(linear, self.action_width) if self.sysid else None

    def blocks(self, x):
        """x (N, ...) as one array (N / tasks, ...) per task."""
        return jnp.split(x, len(self.tasks))

    def flat_obs(self, i, obs):
        """Observations of task i as float32 (n, largest obs_dim), zero-padded."""
        leaves, spaces = jax.tree.leaves(obs), self.obs_parts[i]
        if len(leaves) != len(spaces):
            raise ValueError(f"{self.tasks[i]} gives observations of {len(leaves)} arrays, its space says "
                             f"{len(spaces)}: {', '.join(map(str, spaces))}")
        parts = [jax.nn.one_hot(x - getattr(part, "start", 0), part.n) if is_discrete(part) else x
                 for x, part in zip(leaves, spaces)]
        flat = jnp.concatenate([x.reshape(len(x), -1).astype(jnp.float32) for x in parts], -1)
        if flat.shape[1] != self.obs_dims[i]:
            raise ValueError(f"{self.tasks[i]} gives observations of {flat.shape[1]} numbers, its space says "
                             f"{self.obs_dims[i]}")
        return pad_to(flat, (max(self.obs_dims),))

    def draw(self, key):
        """A fresh Start for every environment."""
        reset_key, obs_key, act_key = jax.random.split(key, 3)
        states, obs = [], []
        for i, keys in enumerate(self.blocks(self.split(reset_key))):
            started = jax.vmap(self.envs[i].reset_env, (0, None))(keys, self.params[i])
            first, state = self._returned(i, "reset_env", started, ("observation", "state"))
            states.append(self._as_after_a_step(i, keys, state))
            obs.append(self.flat_obs(i, first))
        obs_matrix = act_matrix = None
        if self.projection != "none":
            obs_matrix = self._matrices(obs_key, [self.obs_size] * len(self.tasks), self.obs_dims)
            if not self.discrete:
                sizes = [self.action_dims] * len(self.tasks)
                act_matrix = self._matrices(act_key, self.act_dims, sizes)
            elif self.projection != "identity":
                act_matrix = jax.vmap(lambda k: jax.random.permutation(k, self.num_bins))(
                    self.split(act_key)).astype(jnp.int32)
        return Start(tuple(states), jnp.concatenate(obs), obs_matrix, act_matrix)

    def _as_after_a_step(self, i, keys, state):
        """States of task i in the types that a step returns, which a scan requires: 0 may become 0.5."""
        def strong(x, after):
            if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # a typed key
                return x
            return jax.lax.convert_element_type(x, jnp.promote_types(x.dtype, after.dtype))

        if is_dmc(self.tasks[i]):  # the types are right, and tracing its step takes a second
            return jax.tree.map(strong, state, state)
        kind = jnp.int32 if self.discrete else jnp.float32
        action = jnp.zeros((len(keys), *self.act_shapes[i]), kind)
        step = jax.vmap(lambda *x: self.envs[i].step_env(*x, self.params[i]))
        after = self._returned(i, "step_env", jax.eval_shape(step, keys, state, action),
                               ("observation", "state", "reward", "terminated", "info"))
        return jax.tree.map(strong, state, after[1])

    def _returned(self, i, function, values, expected):
        """What a function of task i has returned. ValueError if it has another number of parts."""
        if not isinstance(values, (tuple, list)) or len(values) != len(expected):
            raise ValueError(f"{self.tasks[i]}: {function} must return {', '.join(expected)}")
        return values

    def _matrices(self, key, rows, cols):
        """A projection matrix for every environment, (N, largest of rows, largest of cols)."""
        shape = max(rows), max(cols)
        normal = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(self.split(key))
        return jnp.concatenate([
            pad_to(projection_matrix(block[:, :r, :c], self.projection), shape)
            for block, r, c in zip(self.blocks(normal), rows, cols)])
