"""In-context reinforcement learning with a transformer: the second baseline of train_s5.py, in one file.

    python train_transformer.py                                 # six DMControl tasks, random projections
    python train_transformer.py --env cartpole-swingup --num-seeds 4   # four seeds in one compiled function
    python train_transformer.py --help                          # every flag, its default, one line each

The same file as train_s5.py but for the memory section, causal attention over the last steps of the trial with
as many parameters. Copy this file with envs.py, dmc.py, physics.py and sysid.py into another project and it runs there.
"""

import dataclasses
import importlib.util
import math
from typing import Any, Callable, ClassVar, Literal, NamedTuple

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

if __name__ == "__main__" and importlib.util.find_spec("experiment"):
    importlib.import_module("experiment").start_devices()  # before gymnax, in envs.py, uses JAX

import envs


def by_preset(cpu: Any, accelerator: Any) -> Any:
    """A field of Config whose default depends on the machine (experiment.py: --preset)."""
    return dataclasses.field(default_factory=lambda: cpu if jax.default_backend() == "cpu" else accelerator,
                             metadata={"cpu": cpu, "accelerator": accelerator})


# ---- Memory: the only section in which the trainers differ -------------------------------------------------
@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    width: int = by_preset(cpu=64, accelerator=256)  # features of every layer of the network
    layers: int = 2  # transformer blocks
    heads: int = by_preset(cpu=2, accelerator=4)  # of the attention
    head_size: int = by_preset(cpu=16, accelerator=32)  # features of a head's queries, keys and values
    window: int = 128  # steps that attention sees, the present one included
    hidden_size: int = 0  # of the dense part; 0: as many parameters as train_s5.py's memory of that width


CHUNK = 64  # queries at once: bounds the space of a long window


class Cache(NamedTuple):
    """The last `window` steps of every lane, whatever their trial, as a ring. Batch shape (...)."""

    keys: jax.Array  # (..., heads, window, head_size) float32
    values: jax.Array  # likewise
    slot: jax.Array  # (...) int32, the oldest slot: the next step goes there
    length: jax.Array  # (...) int32, how many of the last steps belong to the running trial, at most `window`


class TransformerBlock(nn.Module):
    """LayerNorm -> causal attention -> residual, LayerNorm -> dense -> GELU -> dense -> residual.

    A query sees the last `window` steps of its own trial, itself included. Positions enter as a bias of every
    head that falls linearly with the age of a key (ALiBi: Press et al., arXiv 2108.12409).
    """

    config: Any
    dtype: Any

    def setup(self):
        c = self.config
        self.attention_norm, self.dense_norm = nn.LayerNorm(), nn.LayerNorm()
        self.qkv = nn.Dense(3 * c.heads * c.head_size, use_bias=False, dtype=self.dtype)
        self.out = nn.Dense(c.width, use_bias=False, dtype=self.dtype)
        self.up, self.down = nn.Dense(hidden_size(c), dtype=self.dtype), nn.Dense(c.width, dtype=self.dtype)

    def project(self, x):
        """x (..., width) -> queries, keys and values (..., heads, head_size) float32."""
        qkv = jnp.float32(apply_flat(self.qkv, self.attention_norm(x)))
        return jnp.moveaxis(qkv.reshape(*x.shape[:-1], 3, self.config.heads, -1), -3, 0)

    def attend(self, queries, keys, values, age, length):
        """Queries (..., heads, Q, head_size), keys and values (..., heads, K, head_size) -> (..., Q, heads, head_size).

        age (..., Q, K) int: steps since the key, negative if ahead. length (..., Q) int: ages visible.
        """
        slopes = jnp.array([2.0 ** (-8.0 * h / self.config.heads) for h in range(1, self.config.heads + 1)])
        bias, age = -slopes[:, None, None] * age[..., None, :, :], age[..., None, :, :]
        visible = (age >= 0) & (age < length[..., None, :, None])
        return nn.dot_product_attention(*(jnp.swapaxes(a, -3, -2) for a in (queries, keys, values)), bias, visible)

    def finish(self, x, attended):
        x = x + apply_flat(self.out, attended.reshape(*x.shape[:-1], -1))
        return x + apply_flat(lambda x: self.down(nn.gelu(self.up(x))), self.dense_norm(x))

    def step(self, cache, x, reset):
        """x (..., width), reset (...) -> Cache, (..., width)."""
        query, key, value = self.project(x)
        keys, values = write(cache.keys, cache.slot, key), write(cache.values, cache.slot, value)
        window = self.config.window
        length = jnp.minimum(jnp.where(reset, 0, cache.length) + 1, window)
        age = (cache.slot[..., None] - jnp.arange(window)) % window
        attended = self.attend(query[..., None, :], keys, values, age[..., None, :], length[..., None])
        return Cache(keys, values, (cache.slot + 1) % window, length), self.finish(x, attended)

    def __call__(self, cache, x, reset):
        """x (T, B, width), reset (T, B) -> Cache, (T, B, width): the numbers of `step`, CHUNK steps at once."""
        T, window, chunk = len(x), self.config.window, min(len(x), CHUNK)
        rest = (0, -T % chunk), (0, 0)  # fills the last chunk
        queries, keys, values = jnp.moveaxis(self.project(jnp.pad(x, (*rest, (0, 0)))), 1, 3)
        order = ((cache.slot[:, None] + jnp.arange(window)) % window)[:, None, :, None]  # oldest first
        keys = jnp.concatenate([jnp.take_along_axis(cache.keys, order, 2), keys], 2)
        values = jnp.concatenate([jnp.take_along_axis(cache.values, order, 2), values], 2)

        reset = jnp.pad(reset, rest).T
        t = jnp.arange(reset.shape[1])
        start = jax.lax.cummax(jnp.where(reset, t, -cache.length[:, None]), axis=1)  # of the step's trial
        length = jnp.minimum(t - start + 1, window)
        age = window + jnp.arange(chunk)[:, None] - jnp.arange(window + chunk)

        def attend(first):
            """The chunk of queries from `first` on. Its scores are computed again for the gradient, not kept."""
            q, k, v, n = (jax.lax.dynamic_slice_in_dim(a, first, size, axis) for a, size, axis in (
                (queries, chunk, 2), (keys, window + chunk, 2), (values, window + chunk, 2), (length, chunk, 1)))
            return self.attend(q, k, v, age[None], n)

        attended = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), jnp.arange(0, T, chunk))
        attended = jnp.concatenate(attended.swapaxes(1, 2))[:T]
        last = slice(T, T + window)
        return (Cache(keys[:, :, last], values[:, :, last], jnp.zeros_like(cache.slot), length[:, T - 1]),
                self.finish(x, attended))


class Memory(nn.Module):
    """The agent's memory: zero_state(batch), prepare(), step(prepared, state, x, reset), __call__(state, x, reset)."""
    config: Any
    dtype: Any

    def setup(self):
        self.blocks = [TransformerBlock(self.config, self.dtype) for _ in range(self.config.layers)]

    @nn.nowrap
    def zero_state(self, batch_shape):
        c, count = self.config, jnp.zeros(batch_shape, jnp.int32)
        zeros = jnp.zeros((*batch_shape, c.heads, c.window, c.head_size))
        return (Cache(zeros, zeros, count, count),) * c.layers

    def prepare(self):
        return ()

    def step(self, prepared, state, x, reset):
        return self.through(TransformerBlock.step, state, x, reset)

    def __call__(self, state, x, reset):
        return self.through(TransformerBlock.__call__, state, x, reset)

    def through(self, method, state, x, reset):
        new = []
        for block, s in zip(self.blocks, state):
            s, x = method(block, s, x, reset)
            new.append(s)
        return tuple(new), x


def write(ring, slot, row):
    """ring (..., heads, window, head_size) with row (..., heads, head_size) put into slot (...)."""
    flat = ring.reshape(-1, *ring.shape[-3:])
    flat = flat.at[jnp.arange(len(flat)), :, slot.ravel()].set(row.reshape(-1, *row.shape[-2:]))
    return flat.reshape(ring.shape)


def hidden_size(config):
    """Units of the dense part: given, or such that the memory has as many parameters as train_s5.py's."""
    w = config.width
    layers, p = (4, 256) if w >= 256 else (3, 32)  # the defaults of train_s5.py
    target = layers * (2 * p * w + 2 * w * w + 5 * w + 3 * p // 2) / config.layers
    attention = 4 * w * config.heads * config.head_size  # a block also has 4 w of norms and 2 w h + h + w
    return config.hidden_size or max(1, round((target - attention - 5 * w) / (2 * w + 1)))


def make_memory(config: MemoryConfig, dtype: Any) -> Memory:
    """The memory of an agent, its matrix products in `dtype`."""
    return Memory(config, dtype)


# ---- Configuration: what changes the algorithm -------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config(MemoryConfig):
    # what to learn
    env: tuple[str, ...] = envs.TRAIN_TASKS  # DMControl tasks (several share num_envs), a gymnax name or brax:NAME
    env_kwargs: tuple[str, ...] = ()  # KEY=VALUE arguments of the environment, such as memory_length=64
    projection: Literal["auto", "gaussian", "orthogonal", "rademacher", "identity", "none"] = "auto"
    """how the agent meets a task; auto: gaussian for DMControl, none elsewhere"""
    obs_size: int = 12  # size of a projected observation
    action_size: int = 2  # size of the agent's action before projection
    action_repeat: int = 0  # environment steps that an action lasts (0: two of DMControl, else one)
    episodes_per_trial: int = 1  # the memory is reset after so many episodes
    observe_action: bool = True  # show the agent its last action
    observe_change: bool = True  # also show the change of the projected observation
    identify: bool = True  # also show what sysid.py finds out: inner products that no random projection hides
    privileged_critic: bool = True  # the critic, wanted in training only, also sees raw observations (arXiv 1710.06542)
    policy: Literal["categorical", "gaussian"] = "categorical"  # of continuous actions, see envs.continuous_policy
    action_bins: int = 9  # values of a categorical policy in every dimension
    observe: Literal["full", "none"] = "full"  # none: observations never reach the network (the blind control)
    memory: Literal["full", "none", "unreset"] = "full"  # none: reset at every step (memoryless); unreset: never
    backend: Literal["fused", "mjx"] = "fused"  # physics
    # how long, how wide
    total_timesteps: int = by_preset(cpu=20_000_000, accelerator=500_000_000)  # of one seed, up to whole log lines
    num_envs: int = by_preset(cpu=192, accelerator=6144)  # stepped side by side, split equally among the tasks
    num_steps: int = 128  # steps of every environment between two updates
    log_every: int = 10  # updates between two log lines (one call of the compiled function)
    # PPO
    lr: float = 5e-4  # Adam step size
    anneal_lr: bool = True  # let the step size fall linearly to zero
    anneal_entropy: bool = True  # let the entropy bonus fall likewise
    update_epochs: int = 4  # passes over every rollout
    num_minibatches: int = by_preset(cpu=4, accelerator=16)  # per pass; of whole lanes (environments), all their steps
    gamma: float = 0.995  # discount
    gae_lambda: float = 0.95  # generalised advantage estimation
    clip_eps: float = 0.2  # PPO clipping
    ent_coef: float = 0.01  # entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # gradient clipping
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; the recurrence stays float32
    SWEEPABLE: ClassVar = ("lr", "gamma", "gae_lambda", "clip_eps", "ent_coef", "vf_coef")  # traced values

    @property
    def resolved_repeat(self) -> int:
        return self.action_repeat or (2 if all(map(envs.is_dmc, self.env)) else 1)

    @property
    def steps_per_update(self) -> int:
        return self.num_envs * self.num_steps * self.resolved_repeat

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / (self.steps_per_update * self.log_every)) * self.log_every

    @property
    def resolved_projection(self) -> str:
        return self.projection.replace("auto", "gaussian" if all(map(envs.is_dmc, self.env)) else "none")

    def __post_init__(self):
        rules = {
            "at least 1": (lambda x: x >= 1, "width layers total_timesteps num_envs num_steps log_every update_epochs "
                           "num_minibatches episodes_per_trial obs_size action_size action_bins"),
            "positive": (lambda x: x > 0, "lr clip_eps max_grad_norm"),
            "non-negative": (lambda x: x >= 0, "action_repeat ent_coef vf_coef"),
            "in [0, 1]": (lambda x: 0 <= x <= 1, "gamma gae_lambda")}
        for rule, (holds, names) in rules.items():
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must be {rule}, got {getattr(self, name)}")
        if not self.env or self.num_envs % (len(self.env) * self.num_minibatches):
            raise ValueError(f"num_envs={self.num_envs} must be divisible by tasks x minibatches = {len(self.env)} x "
                             f"{self.num_minibatches}, so that every minibatch holds the same lanes of each task")


def make_lanes(config: Config, **changes: Any) -> envs.Lanes:
    """The environments that `config` describes; `changes` replace arguments of envs.Lanes."""
    same_name = "obs_size action_size episodes_per_trial observe_action observe_change backend"
    return envs.Lanes(**{name: getattr(config, name) for name in same_name.split()} | dict(
        tasks=config.env, num_lanes=config.num_envs, action_repeat=config.resolved_repeat,
        identify=config.identify and config.memory == "full",
        privileged=config.privileged_critic, projection=config.resolved_projection,
        env_kwargs=envs.parse_kwargs(config.env_kwargs)) | changes)


# ---- Network -----------------------------------------------------------------------------------------------
class RunningNorm(nn.Module):
    """x (..., D) over the running mean and deviation in its "stats" collection, which training updates.

    The statistics are pooled over all lanes and tasks, so they reveal nothing about the task at hand. More than
    five deviations from the mean is clipped: a rare large input would drown the others.
    """

    @nn.compact
    def __call__(self, x):
        self.variable("stats", "count", lambda: jnp.float32(1e-4))
        mean = self.variable("stats", "mean", jnp.zeros, x.shape[-1:]).value
        var = self.variable("stats", "var", jnp.ones, x.shape[-1:]).value
        mean, var = (jax.lax.stop_gradient(s[:x.shape[-1]]) for s in (mean, var))  # to act, less is seen than to learn
        return jnp.clip((x - mean) * jax.lax.rsqrt(var + 1e-6), -5.0, 5.0)


def apply_flat(layer: Callable, x: jax.Array) -> jax.Array:
    """layer(x) with the leading axes of x (..., D) flattened: XLA's backward pass is faster on matrices."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class ActorCritic(nn.Module):
    """Encoder -> memory -> policy and value heads."""

    config: Config
    num_outputs: int  # action dimensions (continuous) or number of actions (discrete)
    discrete: bool  # whether the policy is categorical
    output_of_input: tuple[int, ...]  # see envs.Lanes

    def setup(self):
        width, dtype = self.config.width, jnp.dtype(self.config.dtype)
        self.input_norm, self.core_norm = RunningNorm(), nn.LayerNorm()
        self.own_encoder, self.observation_encoder = nn.Dense(width, dtype=dtype), nn.Dense(width, dtype=dtype)
        self.core, self.detour = make_memory(self.config, dtype), nn.Dense(width, dtype=dtype)
        self.actor, self.critic = nn.Dense(width, dtype=dtype), nn.Dense(width, dtype=dtype)
        self.privileged_encoder = nn.Sequential([nn.Dense(2 * width), nn.gelu, nn.Dense(width), nn.gelu])
        self.value_head = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))
        per_action = 1 if self.discrete else self.config.action_bins if self.config.policy == "categorical" else 2
        # a small gain: at first all actions are equally likely, whatever the input
        self.policy_head = nn.Dense(self.num_outputs * per_action, kernel_init=nn.initializers.orthogonal(0.01))

    def perceive(self, inputs, memory, outputs=math.inf):
        """(state, x (..., 2 width) for the heads) of inputs (..., input_size or more).

        memory maps its input (..., width) to (state, output (..., width)). What comes of observations also goes around
        it; into it, damped where they are projected: many numbers, at first all noise, they would drown action and
        reward. outputs: how many numbers of a projected observation are shown.
        """
        output_of = np.array(self.output_of_input)
        shown = output_of < jnp.expand_dims(0 if self.config.observe == "none" else outputs, -1)
        x = jnp.where(shown, self.input_norm(inputs)[..., :len(output_of)], 0.0)  # hidden is at 0, its mean
        own = apply_flat(self.own_encoder, x[..., output_of < 0])
        seen = apply_flat(self.observation_encoder, x[..., output_of >= 0])
        damping = 1.0 if self.config.resolved_projection in ("identity", "none") else 0.1
        state, x = memory(nn.gelu(own + damping * seen))
        return state, jnp.concatenate([self.core_norm(x), nn.gelu(apply_flat(self.detour, nn.gelu(seen)))], -1)

    def policy(self, x):
        """x of perceive -> distribution of actions (...)."""
        logits = apply_flat(lambda x: self.policy_head(nn.gelu(self.actor(x))), x)
        if self.discrete:
            return distrax.Categorical(logits=logits)
        return envs.continuous_policy(self.config.policy, logits, self.num_outputs)

    def value(self, x, inputs):
        """x of perceive, inputs (..., input_size + privileged_size) -> (...) float32, in the scale of its task."""
        privileged = self.input_norm(inputs)[..., len(self.output_of_input):]
        if privileged.shape[-1]:
            x = jnp.concatenate([x, apply_flat(self.privileged_encoder, privileged)], -1)
        return apply_flat(lambda x: self.value_head(nn.gelu(self.critic(x))), x)[..., 0]

    def __call__(self, state, inputs, reset):
        """Whole sequences: inputs (T, B, input_size + privileged_size), reset (T, B) -> state, policy, value (T, B)."""
        state, x = self.perceive(inputs, lambda x: self.core(state, x, reset))
        return state, self.policy(x), self.value(x, inputs)

    def prepare(self):
        """Everything of an acting step that depends on the parameters alone; once per rollout."""
        return self.core.prepare()

    def act(self, prepared, state, inputs, reset, outputs=math.inf):
        """One step: inputs (B, input_size), reset (B,), outputs as in perceive -> state, policy (B,), perceive's x."""
        state, x = self.perceive(inputs, lambda x: self.core.step(prepared, state, x, reset), outputs)
        return state, self.policy(x), x

    def step(self, prepared, state, inputs, reset):
        """One step of a rollout: inputs with what the critic sees, reset (B,) -> state, policy and value (B,)."""
        state, pi, x = self.act(prepared, state, inputs, reset)
        return state, pi, self.value(x, inputs)


# ---- Rollouts: T steps of N lanes, time-major (T, N, ...) --------------------------------------------------
class RunnerState(NamedTuple):
    """Everything that training carries from update to update."""

    params: Any  # {"params", "stats"}: the network's variables
    opt_state: Any
    env_state: Any
    inputs: jax.Array  # (N, input_size + privileged_size) what the agent and its critic see next
    memory: Any  # memory state before that
    reset: jax.Array  # (N,) whether the memory is to be reset before that
    returns: jax.Array  # (N,) running discounted return, for the scale of rewards
    return_stats: dict[str, jax.Array]  # its count, mean and variance in each task (tasks,)
    hyper: dict[str, jax.Array]  # Config.SWEEPABLE values
    key: jax.Array
    num_updates: jax.Array


class Rollout(NamedTuple):
    """What was lived, (T, N, ...)."""

    inputs: jax.Array
    reset: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    step: envs.LaneStep


def keep_final_input(slots: list[tuple], ended: jax.Array, entry: tuple) -> list[tuple]:
    """`entry` (memory, inputs, time) put into the first empty slot of every lane where `ended` (N,).

    GAE needs the value of the input that would have come next in a trial that ran out of time. To value such an input
    in every step would double the cost of acting. But trials end rarely: a few slots hold all final inputs of a
    rollout, each with the memory that met it, and are valued after it. time (N,): step of the rollout, -1: empty.
    """
    used = sum((time >= 0).astype(jnp.int32) for _, _, time in slots)
    return [envs.select(ended & (used == k), entry, slot) for k, slot in enumerate(slots)]


def merge_stats(stats: dict[str, jax.Array], n: int, mean: jax.Array, var: jax.Array) -> dict[str, jax.Array]:
    """Chan's parallel update of {"count", "mean", "var"} with n values of that mean and variance."""
    count, shift = stats["count"] + n, mean - stats["mean"]
    return {"count": count, "mean": stats["mean"] + shift * n / count,
            "var": (stats["count"] * stats["var"] + n * var + shift**2 * stats["count"] * n / count) / count}


# ---- PPO ---------------------------------------------------------------------------------------------------
def gae(reward, value, last_value, final_value, terminated, trial_end, gamma, lam) -> jax.Array:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438) over trials: advantages (T, N).

    Arguments are (T, N); last_value (N,) is the value after the last step, gamma and lam are scalars. Inside a trial
    the next value is the next step's, through episode boundaries too. At a trial's end it is 0 if the task
    terminated, else final_value, the value of the final observation.
    """
    next_value = jnp.concatenate([value[1:], last_value[None]])
    next_value = jnp.where(trial_end, jnp.where(terminated, 0.0, final_value), next_value)
    delta = reward + gamma * next_value - value
    decay = gamma * lam * (1.0 - trial_end)

    def backward(advantage, x):
        advantage = x[0] + x[1] * advantage
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(last_value), (delta, decay), reverse=True, unroll=8)[1]


def scale_per_task(reward, trial_end, returns, stats, gamma, lanes) -> tuple[jax.Array, jax.Array, Any]:
    """Rewards over the running deviation of their task's discounted sums, so that a critic's errors count alike in all.

    With one scale for all tasks it learns little of those that pay little (as van Hasselt et al., arXiv 1602.07714, for
    targets). The least scale is a hundredth of the largest.

    Args:
      reward, trial_end: (T, N); returns: (N,) the discounted sums so far; gamma: scalar discount.
      stats: their {"count", "mean", "var"}, (tasks,) each.
      lanes: the envs.Lanes that were stepped: which lane has which task, and who shares them.

    Returns:
      (rewards (T, N), returns, stats), the last two after these steps.
    """
    def accumulate(total, x):
        total = total * gamma + x[0]
        return total * (1.0 - x[1]), total

    returns, history = jax.lax.scan(accumulate, returns, (reward, trial_end), unroll=8)
    by_task = history.reshape(len(history), len(lanes.tasks), -1)  # (T, N) -> (T, tasks, N / tasks)
    stats = merge_stats(stats, lanes.shards * by_task[:, 0].size, *lanes.moments(by_task, (0, 2)))
    deviation = jnp.sqrt(stats["var"])
    return reward / jnp.maximum(deviation, 0.01 * deviation.max() + 1e-4)[lanes.lane_task], returns, stats


def normalise_per_task(advantage: jax.Array, lanes: envs.Lanes) -> jax.Array:
    """Advantages (T, N) standardised within each task, so that every task weighs the same."""
    by_task = advantage.reshape(len(advantage), len(lanes.tasks), -1)  # (T, N) -> (T, tasks, N / tasks)
    mean, var = (x[:, None] for x in lanes.moments(by_task, (0, 2)))
    return ((by_task - mean) / (jnp.sqrt(var) + 1e-8)).reshape(advantage.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Train:
    """train(key) -> {"runner": RunnerState, "metrics"} is a whole run, init and update are its halves. All are pure."""

    init: Callable  # (key, hyper=None) -> RunnerState; hyper: traced scalars in place of Config.SWEEPABLE values
    update: Callable  # RunnerState -> (RunnerState, metrics), one PPO iteration
    collect: Callable  # RunnerState -> (RunnerState, Rollout, final values (T, N), last values (N,))
    lanes: envs.Lanes
    network: ActorCritic
    num_updates: int

    def __call__(self, key, hyper=None):
        runner, metrics = jax.lax.scan(lambda r, _: self.update(r), self.init(key, hyper), None, self.num_updates)
        return {"runner": runner, "metrics": metrics}


def make_train(config: Config, shards: int = 1) -> Train:
    """Proximal policy optimisation (Schulman et al., arXiv 1707.06347) of a recurrent agent.

    Metrics are scalars of an update, {"return", "reward"} of every task (tasks,), "curve" (tasks, bins).
    shards: devices that share num_envs, each with N of them. If several, all is called in jax.shard_map over an axis
    "data" of so many, `lanes.pmean` averages over it, and what is learned differs from one device's by rounding only.
    """
    lanes = make_lanes(config, shards=shards)
    network = ActorCritic(config, lanes.action_size, lanes.discrete, lanes.output_of_input)
    N, T = lanes.num_lanes, config.num_steps
    num_slots = 1 + (T - 1) // (lanes.max_episode_steps or T)  # how often a lane can run out of time in a rollout
    # Adam without its rate: that is traced, for sweeps, and multiplied where the step is taken
    optimiser = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam())
    memoryless, forgets = config.memory == "none", config.memory != "unreset"
    dataclasses.replace(config, num_envs=N)  # raises ValueError if minibatches cannot be made of them

    def init(key, hyper=None):
        key, env_key, net_key = jax.random.split(key, 3)
        env_state, inputs = lanes.reset(env_key)
        memory, reset = make_memory(config, jnp.float32).zero_state((N,)), jnp.ones(N, bool)
        params = network.init(net_key, memory, inputs[None], reset[None])
        values = {name: jnp.float32(getattr(config, name)) for name in config.SWEEPABLE} | (hyper or {})
        start = {"count": 1e-4, "mean": 0.0, "var": 1.0}
        return_stats = {k: jnp.full(len(lanes.tasks), v, jnp.float32) for k, v in start.items()}
        return RunnerState(params, optimiser.init(params), env_state, inputs, memory, reset, jnp.zeros(N),
                           return_stats, values, key, jnp.int32(0))

    def collect(runner):
        prepared = network.apply(runner.params, method="prepare")
        key, action_key = jax.random.split(runner.key)

        def policy(memory, inputs, reset):
            return network.apply(runner.params, prepared, memory, inputs, reset, method="step")

        def env_step(carry, t):
            env_state, inputs, memory, reset, slots = carry
            memory, pi, value = policy(memory, inputs, reset)
            keys = lanes.keys(jax.random.fold_in(action_key, t))
            action, log_prob = jax.vmap(lambda pi, key: pi.sample_and_log_prob(seed=key))(pi, keys)
            env_state, next_inputs, out = lanes.step(env_state, action, t)
            entry = (memory, out.final_input, jnp.full(N, t))
            slots = keep_final_input(slots, out.trial_end & out.truncated & ~out.diverged, entry)
            stored = Rollout(inputs, reset, action, log_prob, value, out._replace(final_input=jnp.zeros(())))
            return (env_state, next_inputs, memory, (out.trial_end & forgets) | memoryless, slots), stored

        slots = [(runner.memory, runner.inputs, jnp.full(N, -1))] * num_slots
        carry = (runner.env_state, runner.inputs, runner.memory, runner.reset, slots)
        (env_state, inputs, memory, reset, slots), rollout = jax.lax.scan(env_step, carry, jnp.arange(T))
        # a trial that diverged has no final input; the last sound one, whose value is known, stands in for it
        final_value = jnp.where(rollout.step.trial_end & rollout.step.truncated, rollout.value, 0.0)
        for kept_memory, kept_inputs, time in slots:
            value = policy(kept_memory, kept_inputs, jnp.full(N, memoryless))[2]
            final_value = jnp.where(jnp.arange(T)[:, None] == time, value, final_value)
        runner = runner._replace(env_state=env_state, inputs=inputs, memory=memory, reset=reset, key=key)
        return runner, rollout, final_value, policy(memory, inputs, reset)[2]

    def loss_fn(params, hyper, memory, rollout, advantage, target):
        """The clipped loss on the whole sequences of a minibatch; memory: its state before their first step."""
        _, pi, value = network.apply(params, memory, rollout.inputs, rollout.reset)
        log_ratio = pi.log_prob(rollout.action) - rollout.log_prob
        ratio = jnp.exp(log_ratio)
        clipped = jnp.clip(ratio, 1.0 - hyper["clip_eps"], 1.0 + hyper["clip_eps"])
        policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
        value_clipped = rollout.value + jnp.clip(value - rollout.value, -hyper["clip_eps"], hyper["clip_eps"])
        value_loss = 0.5 * jnp.maximum((value - target) ** 2, (value_clipped - target) ** 2).mean()
        entropy = pi.entropy().mean()
        return policy_loss + hyper["vf_coef"] * value_loss - hyper["ent_coef"] * entropy, {
            "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy,
            "kl": (ratio - 1.0 - log_ratio).mean(), "clip_fraction": (jnp.abs(ratio - 1.0) > hyper["clip_eps"]).mean()}

    def shuffle_lanes(key):
        """(M, N / M) lane numbers of M minibatches: of every M neighbours, lanes of one task, each gets one."""
        M = config.num_minibatches
        order = jax.vmap(lambda k: jax.random.permutation(k, M))(lanes.keys(key)[::M])  # (N / M, M)
        return (jnp.arange(0, N, M)[:, None] + order).T

    def update(runner):
        memory = runner.memory  # that of the rollout's start
        runner, rollout, final_value, last_value = collect(runner)
        hyper, step = runner.hyper, rollout.step
        reward, returns, return_stats = scale_per_task(
            step.reward, step.trial_end, runner.returns, runner.return_stats, hyper["gamma"], lanes)
        advantage = gae(reward, rollout.value, last_value, final_value, step.terminated, step.trial_end,
                        hyper["gamma"], hyper["gae_lambda"])
        target = advantage + rollout.value
        advantage = normalise_per_task(advantage, lanes)
        remaining = 1.0 - runner.num_updates / config.num_updates
        lr = hyper["lr"] * (remaining if config.anneal_lr else 1.0)
        hyper = hyper | {"ent_coef": hyper["ent_coef"] * (remaining if config.anneal_entropy else 1.0)}

        def update_minibatch(train_state, lane_index):
            params, opt_state = train_state
            data = rollout._replace(step=None), advantage, target
            minibatch = jax.tree.map(lambda x: jnp.take(x, lane_index, axis=1), data)
            start = jax.tree.map(lambda x: jnp.take(x, lane_index, axis=0), memory)
            found = jax.value_and_grad(loss_fn, has_aux=True)(params, hyper, start, *minibatch)
            (loss, metrics), gradient = lanes.pmean(found)
            norm = optax.tree.norm(gradient)
            steps, new_opt_state = optimiser.update(gradient, opt_state, params)
            new_params = optax.apply_updates(params, jax.tree.map(lambda step: -lr * step, steps))
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)  # if not, the step is skipped
            train_state = jax.tree.map(lambda *x: jnp.where(finite, *x), (new_params, new_opt_state), train_state)
            return train_state, metrics | {"grad_norm": norm, "skipped": 1.0 - finite}

        key, *epoch_keys = jax.random.split(runner.key, config.update_epochs + 1)
        lane_index = jnp.concatenate([shuffle_lanes(k) for k in epoch_keys])  # (epochs x minibatches, lanes)
        (params, opt_state), losses = jax.lax.scan(update_minibatch, (runner.params, runner.opt_state), lane_index)
        # inputs are normalised anew between iterations only, so that the update replays what was lived
        stats = merge_stats(params["stats"]["input_norm"], shards * T * N, *lanes.moments(rollout.inputs, (0, 1)))
        params = params | {"stats": {"input_norm": stats}}
        runner = runner._replace(params=params, opt_state=opt_state, returns=returns, return_stats=return_stats,
                                 key=key, num_updates=runner.num_updates + 1)
        return runner, jax.tree.map(jnp.mean, losses) | lanes.summary(step)

    return Train(init, update, collect, lanes, network, config.num_updates)


# ---- Command line ------------------------------------------------------------------------------------------
def main() -> None:
    """With experiment.py: run folder, seeds, sweeps, logs, checkpoints, plots. Without: one seed, a printed table."""
    if importlib.util.find_spec("experiment"):
        import experiment
        return experiment.main(Config, make_train, __doc__)
    config = tyro.cli(Config, description=__doc__)
    metrics = jax.jit(jax.vmap(make_train(config)))(jax.random.PRNGKey(0)[None])["metrics"]
    returns = metrics["return"][0].reshape(-1, config.log_every, len(config.env))  # (updates, tasks) -> (lines, ...)
    print("steps", *config.env, sep="\t")
    for line, means in enumerate(jnp.nanmean(returns, 1), 1):
        print(line * config.log_every * config.steps_per_update, *(f"{x:.2f}" for x in means), sep="\t")


if __name__ == "__main__":
    main()
