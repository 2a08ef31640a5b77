"""In-context reinforcement learning with an LSTM memory: the baseline of train_s5.py, in one file.

    python train_lstm.py                                      # six DMControl tasks through random projections
    python train_lstm.py --env cartpole-swingup --num-seeds 4 # one task, four seeds in one compiled function
    python train_lstm.py --help                               # every flag, its default, one line each

The same file as train_s5.py but for the memory section: an LSTM with as many parameters, reset inside its scan.
Copy this file with envs.py and physics.py into another project and it runs there.
"""

import ast
import csv
import dataclasses
import importlib.util
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import envs

# ---------------------------------------------------------------------------------------------------------
# Memory: the only section in which the trainers differ
# ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    width: int = 64  # features of every layer of the network
    layers: int = 1  # LSTM blocks
    hidden_size: int = 0  # units of each LSTM; 0: as many parameters as train_s5.py's memory of that width


ACCELERATOR_MEMORY = dict(width=256)


class LSTMBlock(nn.Module):
    """LayerNorm -> LSTM -> dense -> residual, whose state is reset to zero inside the scan."""

    config: Any
    dtype: Any

    def setup(self):
        self.norm = nn.LayerNorm()
        self.cell = nn.OptimizedLSTMCell(hidden_size(self.config), dtype=self.dtype)
        self.out = nn.Dense(self.config.width, dtype=self.dtype)

    def step(self, state, x, reset):
        state = jax.tree.map(lambda s: jnp.where(reset[..., None], 0.0, s), state)
        state, y = self.cell(state, self.norm(x))
        return jax.tree.map(jnp.float32, state), x + self.out(y)

    def __call__(self, state, x, reset):
        scan = nn.scan(LSTMBlock.step, variable_broadcast="params", split_rngs={"params": False})
        return scan(self, state, x, reset)


class Memory(nn.Module):
    """The agent's memory: zero_state(batch), prepare(), step(prepared, state, x, reset), __call__(state, x, reset)."""

    config: Any
    dtype: Any

    def setup(self):
        self.blocks = [LSTMBlock(self.config, self.dtype) for _ in range(self.config.layers)]

    @nn.nowrap
    def zero_state(self, batch_shape):
        zeros = jnp.zeros((*batch_shape, hidden_size(self.config)))
        return ((zeros, zeros),) * self.config.layers

    def prepare(self):
        return ()

    def step(self, prepared, state, x, reset):
        return self.through(LSTMBlock.step, state, x, reset)

    def __call__(self, state, x, reset):
        return self.through(LSTMBlock.__call__, state, x, reset)

    def through(self, method, state, x, reset):
        new = []
        for block, s in zip(self.blocks, state):
            s, x = method(block, s, x, reset)
            new.append(s)
        return tuple(new), x


def hidden_size(config):
    """Units of an LSTM block: given, or such that the memory has as many parameters as the S5 memory of train_s5.py."""
    if config.hidden_size:
        return config.hidden_size
    w = config.width
    layers, p = (4, 256) if w >= 256 else (3, 32)  # the defaults of train_s5.py
    target = layers * (2 * p * w + 2 * w * w + 3 * w + 2 * w + 3 * p // 2) / config.layers
    # one block: 4 h (w + h + 1) + h w + w + 2 w parameters
    b = 5 * w + 4
    return round((-b + np.sqrt(b * b + 16 * (target - 3 * w))) / 8)


def make_memory(config, dtype):
    return Memory(config, dtype)


# ---------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------
SWEEPABLE = ("lr", "gamma", "gae_lambda", "clip_eps", "ent_coef", "vf_coef")  # traced: a sweep compiles once
ACCELERATOR = ACCELERATOR_MEMORY | dict(num_lanes=6144, total_steps=500_000_000)  # the defaults where there is one
CURVE_BINS = 10
LOG_STD = (-4.0, 0.0)  # range of the policy's: actions are clipped, so a wider one is only noise


@dataclasses.dataclass(frozen=True)
class Config(MemoryConfig):
    # what to learn
    env: tuple[str, ...] = envs.TRAIN_TASKS  # DMControl tasks (several share the lanes), a gymnax name or brax:NAME
    env_kwargs: tuple[str, ...] = ()  # KEY=VALUE arguments of the environment, such as memory_length=64
    projection: Literal["auto", "gaussian", "orthogonal", "rademacher", "identity", "none"] = "auto"
    """how the agent meets a task; auto: gaussian for DMControl, none elsewhere"""
    obs_size: int = 12  # size of a projected observation
    action_size: int = 2  # size of the agent's action before projection
    action_repeat: int = 1  # environment steps that an action lasts
    episodes_per_trial: int = 1  # the memory is reset after so many episodes
    delta: bool = True  # also show the change of the projected observation
    memory: Literal["full", "none", "unreset"] = "full"
    """none: reset at every step (the memoryless control); unreset: never, so that trials run into each other"""
    backend: Literal["fused", "mjx"] = "fused"  # physics
    # how long, how wide
    total_steps: int = 20_000_000  # environment steps of one seed (rounded up to whole logging periods)
    num_lanes: int = 96  # environments stepped side by side, split equally among the tasks
    rollout_length: int = 128  # steps of every lane between two updates
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ... trained side by side in one compiled function
    # PPO
    lr: float = 1e-3  # Adam step size
    anneal_lr: bool = True  # let the step size fall linearly to zero
    epochs: int = 4  # passes over every rollout
    minibatches: int = 4  # per pass; made of whole lanes, never of time slices
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # generalised advantage estimation
    clip_eps: float = 0.2  # PPO clipping
    ent_coef: float = 0.01  # entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient clipping
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; the recurrence stays float32
    # sweeps: every combination times every seed inside one compiled function
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=V1,V2,...; may be given several times"""
    sweep_chunk: int = 0  # run the sweep in equal parts of so many settings x seeds (0: all at once)
    # bookkeeping
    name: str = ""  # run folder under runs_dir (default: made from the trainer, the task and the date)
    runs_dir: str = "runs"
    resume: str = ""  # run folder to continue; its config.json replaces all other flags
    log_every: int = 10  # updates between two log lines (one call of the compiled function)
    checkpoint_minutes: float = 5.0  # between two checkpoints; one is always written at the end
    tensorboard: bool = True  # write TensorBoard event files
    wandb: str = ""  # Weights & Biases project (needs wandb)
    evaluate: bool = True  # test on fresh projections and held-out tasks at the end

    @property
    def num_updates(self) -> int:
        return -(-self.total_steps // (self.steps_per_update * self.log_every)) * self.log_every

    @property
    def steps_per_update(self) -> int:
        return self.num_lanes * self.rollout_length * self.action_repeat

    @property
    def resolved_projection(self) -> str:
        if self.projection != "auto":
            return self.projection
        return "gaussian" if all(envs.is_dmc(name) for name in self.env) else "none"

    def __post_init__(self):
        def require(condition, message):
            if not condition:
                raise ValueError(message)

        for name in ("width", "layers", "total_steps", "num_lanes", "rollout_length", "num_seeds", "epochs",
                     "minibatches", "episodes_per_trial", "action_repeat", "obs_size", "action_size", "log_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip_eps", "max_grad_norm"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("ent_coef", "vf_coef", "checkpoint_minutes", "sweep_chunk", "seed"):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"{name} must lie in [0, 1], got {getattr(self, name)}")
        require(self.env, "env names no task")
        require(self.num_lanes % (len(self.env) * self.minibatches) == 0,
                f"num_lanes={self.num_lanes} must be divisible by tasks x minibatches = "
                f"{len(self.env)} x {self.minibatches}, so that every minibatch holds the same lanes of each task")
        members = len(settings_of(self)) * self.num_seeds
        require(not self.sweep_chunk or members % self.sweep_chunk == 0,
                f"sweep_chunk={self.sweep_chunk} must divide settings x seeds = {members}")


def settings_of(config):
    """The sweep's settings: a list of {name: value}, every combination, [{}] without a sweep."""
    axes = {}
    for text in config.sweep:
        name, _, values = text.partition("=")
        if name not in SWEEPABLE:
            known = name in {f.name for f in dataclasses.fields(config)}
            raise ValueError(f"cannot sweep {name!r} in one compiled function"
                             + (": it changes shapes or the program; run it as separate runs" if known else "")
                             + f". Sweepable: {', '.join(SWEEPABLE)}")
        try:
            axes[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--sweep {text!r}: expected NAME=V1,V2,... with numbers") from None
        for value in axes[name]:
            dataclasses.replace(config, sweep=(), sweep_chunk=0, **{name: value})  # validates the value
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


# ---------------------------------------------------------------------------------------------------------
# Network
# ---------------------------------------------------------------------------------------------------------
class RunningNorm(nn.Module):
    """x (..., D) over the running mean and deviation in its "stats" collection, which training updates.

    The statistics are pooled over all lanes and tasks, so they reveal nothing about the task at hand.
    """

    @nn.compact
    def __call__(self, x):
        self.variable("stats", "count", lambda: jnp.float32(1e-4))
        mean = self.variable("stats", "mean", jnp.zeros, x.shape[-1:]).value
        var = self.variable("stats", "var", jnp.ones, x.shape[-1:]).value
        mean, var = jax.lax.stop_gradient((mean, var))
        return jnp.clip((x - mean) * jax.lax.rsqrt(var + 1e-6), -5.0, 5.0)


def by_rows(layer, x):
    """layer(x) with the leading axes of x (..., D) flattened: XLA's backward pass is faster on matrices."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class ActorCritic(nn.Module):
    """Encoder -> memory -> policy and value heads.

    Attributes:
      config: Config.
      num_outputs: action dimensions (continuous) or number of actions (discrete).
      discrete: whether the policy is categorical.
    """

    config: Any
    num_outputs: int
    discrete: bool

    def setup(self):
        width, dtype = self.config.width, jnp.dtype(self.config.dtype)
        self.input_norm = RunningNorm()
        self.encoder = nn.Dense(width, dtype=dtype)
        self.core = make_memory(self.config, dtype)
        self.core_norm = nn.LayerNorm()
        self.actor = nn.Dense(width, dtype=dtype)
        self.critic = nn.Dense(width, dtype=dtype)
        self.value_head = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))
        outputs = self.num_outputs if self.discrete else 2 * self.num_outputs
        self.policy_head = nn.Dense(outputs, kernel_init=nn.initializers.orthogonal(0.01))

    def encode(self, inputs):
        return nn.gelu(by_rows(self.encoder, self.input_norm(inputs)))

    def heads(self, x):
        x = self.core_norm(x)
        logits = by_rows(lambda x: self.policy_head(nn.gelu(self.actor(x))), x)
        value = by_rows(lambda x: self.value_head(nn.gelu(self.critic(x))), x)[..., 0]
        if self.discrete:
            return distrax.Categorical(logits=logits), value
        mean, log_std = jnp.split(logits, 2, axis=-1)
        return distrax.MultivariateNormalDiag(mean, jnp.exp(jnp.clip(log_std, *LOG_STD))), value

    def __call__(self, state, inputs, reset):
        """Whole sequences: inputs (T, B, input_size), reset (T, B) -> state, policy and value (T, B)."""
        state, x = self.core(state, self.encode(inputs), reset)
        return state, *self.heads(x)

    def prepare(self):
        """Everything of an acting step that depends on the parameters alone; once per rollout."""
        return self.core.prepare()

    def step(self, prepared, state, inputs, reset):
        """One acting step: inputs (B, input_size), reset (B,) -> state, policy and value (B,)."""
        state, x = self.core.step(prepared, state, self.encode(inputs), reset)
        return state, *self.heads(x)


# ---------------------------------------------------------------------------------------------------------
# The trainer: make_train(config) -> train(key), pure, to be jitted and vmapped
# ---------------------------------------------------------------------------------------------------------
class Runner(NamedTuple):
    """Everything that training carries from update to update."""

    params: Any  # {"params", "stats"}: the network's variables
    opt_state: Any
    env_state: Any
    inputs: jax.Array  # (N, input_size) what the agent sees next
    memory: Any  # memory state before that
    reset: jax.Array  # (N,) whether the memory is to be reset before that
    returns: jax.Array  # (N,) running discounted return, for the reward scale
    return_stats: dict[str, jax.Array]  # its count, mean and variance
    hyper: dict[str, jax.Array]  # SWEEPABLE values
    key: jax.Array
    num_updates: jax.Array


class Rollout(NamedTuple):
    """One rollout, time-major (T, N, ...)."""

    inputs: jax.Array
    reset: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    step: envs.LaneStep


def gae(reward, value, last_value, final_value, terminated, trial_end, gamma, lam):
    """Generalised advantage estimation over trials.

    All arguments (T, N) but last_value (N,), the value after the last step. Inside a trial the next value is
    the next step's, through episode boundaries too. At a trial's end it is 0 if the task terminated, else
    final_value, the value of the final observation. Returns advantages (T, N).
    """
    next_value = jnp.concatenate([value[1:], last_value[None]])
    next_value = jnp.where(trial_end, jnp.where(terminated, 0.0, final_value), next_value)
    delta = reward + gamma * next_value - value
    decay = gamma * lam * (1.0 - trial_end)

    def backward(advantage, x):
        advantage = x[0] + x[1] * advantage
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(last_value), (delta, decay), reverse=True, unroll=8)[1]


def merge_stats(stats, x):
    """Chan's parallel update of {"count", "mean", "var"} with the rows of x (n, ...)."""
    n, shift = x.shape[0], x.mean(0) - stats["mean"]
    count = stats["count"] + n
    return {"count": count, "mean": stats["mean"] + shift * n / count,
            "var": (stats["count"] * stats["var"] + n * x.var(0) + shift**2 * stats["count"] * n / count) / count}


def parse_env_kwargs(texts):
    """("memory_length=64",) -> {"memory_length": 64}."""
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


def make_lanes(config, **changes):
    """The environments that `config` describes; `changes` replace arguments of envs.Lanes."""
    arguments = dict(
        tasks=config.env, num_lanes=config.num_lanes, projection=config.resolved_projection,
        obs_size=config.obs_size, action_size=config.action_size, episodes_per_trial=config.episodes_per_trial,
        action_repeat=config.action_repeat, observe_change=config.delta, backend=config.backend,
        env_kwargs=parse_env_kwargs(config.env_kwargs))
    return envs.Lanes(**(arguments | changes))


def make_network(config, lanes):
    return ActorCritic(config, lanes.action_size, lanes.discrete)


def make_train(config):
    """Compile-time part of training: returns train(key, hyper=None) -> {"runner": Runner, "metrics": {...}}.

    train.init(key, hyper=None) -> runner and train.update(runner) -> (runner, metrics) are its two halves.
    hyper optionally replaces values of SWEEPABLE by traced scalars. Metrics are scalars per update, and
    (tasks,) or (tasks, CURVE_BINS) arrays of returns and in-trial mean rewards.
    """
    lanes = make_lanes(config)
    network = make_network(config, lanes)
    N, T, tasks = config.num_lanes, config.rollout_length, len(lanes.tasks)
    num_slots = 1 + (T - 1) // (lanes.max_episode_steps or T)  # truncations that one rollout can hold per lane
    optimiser = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(eps=1e-5))
    memoryless, forgets = config.memory == "none", config.memory != "unreset"

    def init(key, hyper=None):
        key, env_key, net_key = jax.random.split(key, 3)
        env_state, inputs = lanes.reset(env_key)
        memory = make_memory(config, jnp.float32).zero_state((N,))
        reset = jnp.ones(N, bool)
        params = network.init(net_key, memory, inputs[None], reset[None])
        values = {name: jnp.float32(getattr(config, name)) for name in SWEEPABLE} | (hyper or {})
        return_stats = {"count": jnp.float32(1e-4), "mean": jnp.float32(0), "var": jnp.float32(1)}
        return Runner(params, optimiser.init(params), env_state, inputs, memory, reset, jnp.zeros(N), return_stats,
                      values, key, jnp.int32(0))

    # -- rollout ------------------------------------------------------------------------------------------
    def collect(runner):
        """T steps on N lanes. Returns the runner, the rollout and the value of truncated trials (T, N)."""
        prepared = network.apply(runner.params, method="prepare")
        key, action_key = jax.random.split(runner.key)

        def policy(memory, inputs, reset):
            return network.apply(runner.params, prepared, memory, inputs, reset, method="step")

        def step(carry, t):
            env_state, inputs, memory, reset, slots = carry
            memory, pi, value = policy(memory, inputs, reset)
            action, log_prob = pi.sample_and_log_prob(seed=jax.random.fold_in(action_key, t))
            env_state, next_inputs, out = lanes.step(env_state, action, t)
            # a truncated trial's final input, and the memory that met it, wait in a slot for their value
            used = jnp.minimum(sum((when >= 0).astype(jnp.int32) for _, when in slots), num_slots - 1)
            waits, entry = out.trial_end & out.truncated, ((memory, out.final_input), jnp.full(N, t))
            slots = [envs.select(waits & (used == k), entry, slot) for k, slot in enumerate(slots)]
            stored = Rollout(inputs, reset, action, log_prob, value, out._replace(final_input=jnp.zeros(())))
            return (env_state, next_inputs, memory, out.trial_end & forgets | memoryless, slots), stored

        empty = ((runner.memory, runner.inputs), jnp.full(N, -1))
        carry = (runner.env_state, runner.inputs, runner.memory, runner.reset, [empty] * num_slots)
        (env_state, inputs, memory, reset, slots), rollout = jax.lax.scan(step, carry, jnp.arange(T))
        no_reset = jnp.full(N, memoryless)
        final_value = sum(jnp.where(jnp.arange(T)[:, None] == when, policy(*kept, no_reset)[2], 0.0)
                          for kept, when in slots)
        last_value = policy(memory, inputs, reset)[2]
        runner = runner._replace(env_state=env_state, inputs=inputs, memory=memory, reset=reset, key=key)
        return runner, rollout, final_value, last_value

    def scale_rewards(runner, step):
        """Rewards over the running standard deviation of their discounted sum, one scale for all tasks."""

        def accumulate(total, x):
            reward, end = x
            total = total * runner.hyper["gamma"] + reward
            return total * (1.0 - end), total

        returns, history = jax.lax.scan(accumulate, runner.returns, (step.reward, step.trial_end), unroll=8)
        stats = merge_stats(runner.return_stats, history.ravel())
        scaled = step.reward * jax.lax.rsqrt(stats["var"] + 1e-8)
        return runner._replace(returns=returns, return_stats=stats), scaled

    # -- update -------------------------------------------------------------------------------------------
    def loss_fn(params, hyper, memory, rollout, advantage, target):
        _, pi, value = network.apply(params, memory, rollout.inputs, rollout.reset)
        log_ratio = pi.log_prob(rollout.action) - rollout.log_prob
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 1.0 - hyper["clip_eps"], 1.0 + hyper["clip_eps"])
        policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
        value_clipped = rollout.value + jnp.clip(value - rollout.value, -hyper["clip_eps"], hyper["clip_eps"])
        value_loss = 0.5 * jnp.maximum((value - target) ** 2, (value_clipped - target) ** 2).mean()
        entropy = pi.entropy().mean()
        loss = policy_loss + hyper["vf_coef"] * value_loss - hyper["ent_coef"] * entropy
        return loss, {
            "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy,
            "kl": (ratio - 1.0 - log_ratio).mean(),
            "clip_fraction": (jnp.abs(ratio - 1.0) > hyper["clip_eps"]).mean()}

    def gradient_step(carry, lane_index):
        (params, opt_state), (hyper, lr, memory, rollout, advantage, target) = carry
        take = lambda tree, axis: jax.tree.map(lambda x: jnp.take(x, lane_index, axis), tree)  # noqa: E731
        batch = take(rollout._replace(step=None), 1)
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), gradient = gradient_fn(
            params, hyper, take(memory, 0), batch, take(advantage, 1), take(target, 1))
        norm = optax.tree.norm(gradient)
        steps, new_opt_state = optimiser.update(gradient, opt_state, params)
        new_params = optax.apply_updates(params, jax.tree.map(lambda s: -lr * s, steps))
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old),
                                         (new_params, new_opt_state), (params, opt_state))
        return ((params, opt_state), carry[1]), metrics | {"grad_norm": norm, "skipped": 1.0 - finite}

    def update(runner):
        """One PPO iteration: rollout, advantages, epochs of minibatches."""
        start = runner
        runner, rollout, final_value, last_value = collect(runner)
        runner, reward = scale_rewards(runner, rollout.step)
        hyper = runner.hyper
        advantage = gae(reward, rollout.value, last_value, final_value, rollout.step.terminated,
                        rollout.step.trial_end, hyper["gamma"], hyper["gae_lambda"])
        target = advantage + rollout.value
        per_task = advantage.reshape(T, tasks, -1)  # every task weighs the same
        spread = per_task.std((0, 2), keepdims=True)
        per_task = (per_task - per_task.mean((0, 2), keepdims=True)) / (spread + 1e-8)
        advantage = per_task.reshape(T, N)

        key, *epoch_keys = jax.random.split(runner.key, config.epochs + 1)
        lane_index = jnp.concatenate([shuffle_lanes(k) for k in epoch_keys])
        fraction = runner.num_updates / config.num_updates if config.anneal_lr else 0.0
        data = (hyper, hyper["lr"] * (1.0 - fraction), start.memory, rollout, advantage, target)
        ((params, opt_state), _), losses = jax.lax.scan(
            gradient_step, ((runner.params, runner.opt_state), data), lane_index)
        seen = rollout.inputs.reshape(T * N, -1)  # the norm changes between iterations only
        stats = merge_stats(params["stats"]["input_norm"], seen)
        params = params | {"stats": {"input_norm": stats}}
        runner = runner._replace(params=params, opt_state=opt_state, key=key, num_updates=runner.num_updates + 1)
        return runner, jax.tree.map(jnp.mean, losses) | summarise(rollout.step)

    def shuffle_lanes(key):
        """(minibatches, N / minibatches) lane numbers; every minibatch holds as many lanes of each task."""
        order = jax.vmap(lambda k: jax.random.permutation(k, N // tasks))(jax.random.split(key, tasks))
        order = order + jnp.arange(tasks)[:, None] * (N // tasks)
        return order.reshape(tasks, config.minibatches, -1).swapaxes(0, 1).reshape(config.minibatches, -1)

    def summarise(step):
        """Per-task returns of finished episodes (NaN if none) and mean reward by time within the trial."""
        whole = step.episode_end & step.episode_complete
        by_task = lambda x: x.reshape(T, tasks, -1).sum((0, 2))  # noqa: E731
        length = lanes.trial_length or T
        curve_bin = jnp.clip(step.trial_step * CURVE_BINS // length, 0, CURVE_BINS - 1)
        index = jnp.asarray(lanes.lane_task) * CURVE_BINS + curve_bin
        totals = [jax.ops.segment_sum(x.ravel(), index.ravel(), tasks * CURVE_BINS).reshape(tasks, CURVE_BINS)
                  for x in (step.reward / config.action_repeat, jnp.ones_like(step.reward))]
        return {"return": by_task(jnp.where(whole, step.episode_return, 0.0)) / by_task(whole),
                "reward": by_task(step.reward) / (config.steps_per_update // tasks), "curve": totals[0] / totals[1],
                "diverged": step.diverged.sum()}

    def train(key, hyper=None):
        runner, metrics = jax.lax.scan(lambda r, _: update(r), init(key, hyper), None, config.num_updates)
        return {"runner": runner, "metrics": metrics}

    train.init, train.update, train.collect, train.lanes, train.network = init, update, collect, lanes, network
    return train


# ---------------------------------------------------------------------------------------------------------
# A run: folder, chunks of updates, logs, checkpoints
# ---------------------------------------------------------------------------------------------------------
def members_of(config):
    """Every setting with every seed, settings outermost: list of (setting, seed)."""
    seeds = range(config.seed, config.seed + config.num_seeds)
    return [(setting, seed) for setting in settings_of(config) for seed in seeds]


def over_devices(size):
    """Sharding of a leading axis of length `size` over as many devices as divide it."""
    count = max(n for n in range(1, len(jax.devices()) + 1) if size % n == 0)
    return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("member",)), PartitionSpec("member"))


def over_members(function):
    """function over a leading axis of members: an accelerator runs them side by side, a CPU one after another.

    On a CPU, matrix products batched over members cost more than twice their own time.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function)
    return lambda *args: jax.lax.map(lambda one: function(*one), args)


def compile_for_members(function, runners):
    """function compiled for a group of stacked runners, which it takes over, shared out among the devices."""
    sharding = over_devices(runners.num_updates.shape[0])
    mapped = jax.shard_map(over_members(function), mesh=sharding.mesh, in_specs=sharding.spec,
                           out_specs=sharding.spec, check_vma=False)
    return jax.jit(mapped, donate_argnums=0).lower(runners).compile()


def init_groups(config, train):
    """The stacked runners of every group of members (one group unless sweep_chunk says otherwise)."""
    members = members_of(config)
    size = config.sweep_chunk or len(members)
    init = jax.jit(jax.vmap(train.init), in_shardings=over_devices(size), out_shardings=over_devices(size))
    groups = []
    for start in range(0, len(members), size):
        part = members[start:start + size]
        keys = jnp.stack([jax.random.PRNGKey(seed) for _, seed in part])
        hyper = {name: jnp.array([setting[name] for setting, _ in part], jnp.float32) for name in part[0][0]}
        groups.append(init(keys, hyper))
    return groups


def metric_rows(config, tasks, first_update, metrics):
    """Flatten one chunk's metrics, leaves (members, updates, ...), into CSV rows, oldest first."""
    names = {"return": [f"return/{t}" for t in tasks], "reward": [f"reward/{t}" for t in tasks],
             "curve": [f"curve/{t}/{i}" for t in tasks for i in range(CURVE_BINS)]}
    flat = {}
    for name, x in metrics.items():
        x = np.asarray(x)
        for i, column in enumerate(names.get(name, [name])):
            flat[column] = x.reshape(*x.shape[:2], -1)[:, :, i]
    for update in range(config.log_every):
        for member, (setting, seed) in enumerate(members_of(config)):
            row = {"update": first_update + update + 1,
                   "steps": (first_update + update + 1) * config.steps_per_update, "seed": seed}
            yield row | setting | {k: float(v[member, update]) for k, v in flat.items()}


def nanmean(x, axis=None):
    """np.nanmean without its warning where there is nothing to average."""
    x = np.asarray(x, float)
    with np.errstate(invalid="ignore"):
        return np.nansum(x, axis) / (~np.isnan(x)).sum(axis)


class Logs:
    """metrics.csv (no wall-clock values: a resumed run writes the same bytes), timing.csv, TensorBoard, wandb."""

    def __init__(self, config, folder, update):
        self.folder, self.writers = folder, {}
        for name in ("metrics", "timing"):  # forget what came after the checkpoint
            path = folder / f"{name}.csv"
            if path.exists():
                with path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
                path.unlink()
                for row in rows:
                    if int(row["update"]) <= update:
                        self.write(name, row)
        self.board = self.wandb = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter
            self.board = SummaryWriter(str(folder / "tensorboard"))
        if config.wandb:
            import wandb
            self.wandb = wandb.init(project=config.wandb, name=folder.name, config=dataclasses.asdict(config))

    def write(self, name, row):
        if name not in self.writers:
            file = (self.folder / f"{name}.csv").open("a", newline="")
            self.writers[name] = (file, csv.DictWriter(file, list(row)))
            if file.tell() == 0:
                self.writers[name][1].writeheader()
        row = {k: "" if v != v else f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        self.writers[name][1].writerow(row)

    def chunk(self, rows, timing):
        for row in rows:
            self.write("metrics", row)
        self.write("timing", timing)
        for file, _ in self.writers.values():
            file.flush()
        means = {k: nanmean([r[k] for r in rows]) for k in rows[0]}
        scalars = {k: v for k, v in (means | timing).items() if not k.startswith("curve/") and v == v}
        for name, value in scalars.items() if self.board else ():
            self.board.add_scalar(name, value, timing["steps"])
        if self.wandb:
            self.wandb.log(scalars, step=timing["steps"])
        return means

    def close(self):
        for file, _ in self.writers.values():
            file.close()
        for sink, end in ((self.board, "close"), (self.wandb, "finish")):
            if sink:
                getattr(sink, end)()


def restore(manager, groups):
    """The newest readable checkpoint: (update, groups). Raises ValueError when there is none that fits."""
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, groups)
    problems = []
    for update in sorted(manager.all_steps(), reverse=True):
        try:
            return update, manager.restore(update, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # orbax raises many kinds; an older checkpoint may be whole
            problems.append(f"update {update}: {str(error).splitlines()[0]}")
            print(f"checkpoint of update {update} cannot be read, trying the one before", file=sys.stderr)
    raise ValueError(f"no usable checkpoint in {manager.directory}: {'; '.join(problems) or 'none was written'}")


def read_metrics(folder):
    """metrics.csv as a list of {column: float}, NaN where a cell is empty."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]


def plot_returns(config, tasks, folder):
    """returns.png: return of finished episodes per task against steps, mean and range over seeds and settings."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = read_metrics(folder)
    columns, lines = min(3, len(tasks)), -(-len(tasks) // 3)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.6 * lines), squeeze=False)
    members = len(members_of(config))
    for axis in axes.flat[len(tasks):]:
        axis.remove()
    for axis, task in zip(axes.flat, tasks):
        y = np.array([r[f"return/{task}"] for r in rows]).reshape(-1, members)
        x = np.array([r["steps"] for r in rows]).reshape(-1, members)[:, 0]
        window = max(1, len(x) // 50)
        n = len(x) // window * window
        y = nanmean(y[:n].reshape(-1, window, members), 1)
        x = x[:n].reshape(-1, window).mean(1) / 1e6
        axis.plot(x, nanmean(y, 1), color="C0")
        axis.fill_between(x, np.fmin.reduce(y, 1), np.fmax.reduce(y, 1), alpha=0.25, lw=0, color="C0")
        axis.set(title=task, xlabel="million steps", ylabel="episode return")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "returns.png", dpi=120)
    plt.close(figure)


def final_scores(config, tasks, folder):
    """(members, tasks): mean return over the last tenth of training."""
    rows = read_metrics(folder)
    members = len(members_of(config))
    y = np.array([[r[f"return/{t}"] for t in tasks] for r in rows]).reshape(-1, members, len(tasks))
    return nanmean(y[-max(1, len(y) // 10):], 0)


def write_sweep(config, tasks, folder):
    """sweep.csv and sweep.png: the settings ranked by final return, mean and 95 % interval (t) over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from scipy.stats import t as student
    settings, n = settings_of(config), config.num_seeds
    scores = final_scores(config, tasks, folder).mean(1).reshape(len(settings), n)
    half = student.ppf(0.975, n - 1) * scores.std(1, ddof=1) / np.sqrt(n) if n > 1 else np.full(len(settings), np.nan)
    order = np.argsort(-np.nan_to_num(scores.mean(1), nan=-np.inf))
    table = [settings[i] | {"return": scores[i].mean(), "low": scores[i].mean() - half[i],
                            "high": scores[i].mean() + half[i], "seeds": n} for i in order]
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    labels = [", ".join(f"{k}={v:g}" for k, v in settings[i].items()) for i in order]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.35 * len(table)))
    axis.errorbar(scores.mean(1)[order], labels, xerr=np.nan_to_num(half[order]), fmt="o", capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel(f"return over the last tenth of training (mean and 95 % interval, {n} seeds)")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "sweep.png", dpi=120)
    plt.close(figure)
    print("\nsettings, best first:")
    for label, row in zip(labels, table):
        print(f"  {label:40s} {row['return']:9.2f}  [{row['low']:.2f}, {row['high']:.2f}]")


def new_run(config):
    """Make the run folder of `config` and write config.json into it. ValueError when it cannot be."""
    trainer = Path(__file__).stem
    task = config.env[0].replace(":", "-") if len(config.env) == 1 else f"{len(config.env)}tasks"
    name = config.name or f"{trainer.removeprefix('train_')}-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.runs_dir) / name
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} exists already: choose another --name, or --resume {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"trainer": trainer, "config": dataclasses.asdict(config)}, indent=1)
        (folder / "config.json").write_text(text + "\n")
    except OSError as error:
        raise ValueError(f"cannot write the run folder {folder}: {error}") from None
    return folder


def old_run(folder):
    """The configuration of the run in `folder`. ValueError when it is not a run of this trainer."""
    try:
        saved = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot resume {folder}: {error}") from None
    if saved.get("trainer") != Path(__file__).stem:
        raise ValueError(f"cannot resume {folder}: it was written by {saved.get('trainer')}.py")
    return load_config(saved["config"], resume=str(folder))


def load_config(saved, **changes):
    """Config from the dictionary in config.json."""
    return Config(**({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()} | changes))


def run(config):
    """Train as `config` says, in a run folder: config.json, metrics.csv, timing.csv, plots, checkpoints."""
    if config.resume:
        config = old_run(config.resume)
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs the wandb package: pip install wandb")
    begin = time.perf_counter()
    train = make_train(config)
    tasks, members = train.lanes.tasks, members_of(config)
    folder = Path(config.resume) if config.resume else new_run(config)
    groups = init_groups(config, train)
    manager = ocp.CheckpointManager((folder / "checkpoints").absolute(),
                                    options=ocp.CheckpointManagerOptions(max_to_keep=2))
    update = 0
    if config.resume:
        update, groups = restore(manager, groups)
    chunk = compile_for_members(
        lambda runner: jax.lax.scan(lambda r, _: train.update(r), runner, None, config.log_every), groups[0])
    weights = sum(x.size for x in jax.tree.leaves(groups[0].params)) // groups[0].key.shape[0]
    print(f"{folder}: {len(members)} x {config.total_steps:,} steps of {', '.join(tasks)} on "
          f"{jax.device_count()} {jax.devices()[0].platform}; {weights:,} parameters; "
          f"ready in {time.perf_counter() - begin:.1f} s")

    logs = Logs(config, folder, update)
    per_update = config.steps_per_update
    bar = tqdm(total=config.num_updates * per_update, initial=update * per_update, unit="step", unit_scale=True)
    begin = last_save = time.perf_counter()

    saved = {update} if config.resume else set()

    def save():
        if update not in saved:
            if update in manager.all_steps():  # one that could not be read
                manager.delete(update)
            manager.save(update, args=ocp.args.StandardSave(groups))
            saved.add(update)

    try:
        save()
        while update < config.num_updates:
            start = time.perf_counter()
            results = [chunk(group) for group in groups]
            groups = [result[0] for result in results]
            metrics = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get([r[1] for r in results]))
            seconds = time.perf_counter() - start
            rows = list(metric_rows(config, tasks, update, metrics))
            update += config.log_every
            means = logs.chunk(rows, {
                "update": update, "steps": update * per_update, "seconds": time.perf_counter() - begin,
                "sps": len(members) * config.log_every * per_update / seconds})
            bar.update(config.log_every * per_update)
            bar.set_postfix_str(" ".join(f"{t.split(':')[-1]} {means[f'return/{t}']:.0f}" for t in tasks))
            if means["skipped"] > 0.5:
                raise FloatingPointError(
                    f"{means['skipped']:.0%} of the gradient steps were not finite and were skipped: "
                    "lower --lr or --max-grad-norm")
            if time.perf_counter() - last_save > 60 * config.checkpoint_minutes:
                save()
                last_save = time.perf_counter()
        save()
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: python {Path(__file__).name} --resume {folder}", file=sys.stderr)
        raise
    finally:
        bar.close()
        manager.wait_until_finished()
        manager.close()
        logs.close()

    plot_returns(config, tasks, folder)
    for task, score in zip(tasks, final_scores(config, tasks, folder).mean(0)):
        print(f"  {task:24s} return {score:8.2f}  (mean over the last tenth of training)")
    if config.sweep:
        write_sweep(config, tasks, folder)
    print(f"{time.perf_counter() - begin:.0f} s; everything is in {folder}")
    return folder


def main():
    accelerated = jax.default_backend() != "cpu"
    jax.config.update("jax_compilation_cache_dir", os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax-icrl")))
    try:
        config = tyro.cli(Config, default=Config(**(ACCELERATOR if accelerated else {})), description=__doc__)
        folder = run(config)
        if config.evaluate and not config.sweep:
            if importlib.util.find_spec("evaluate"):
                import evaluate
                evaluate.evaluate([folder])
            else:
                print("evaluate.py is not here: evaluation left out")
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        print("error: out of memory; lower --num-lanes, --num-seeds or --width, or set --sweep-chunk", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
