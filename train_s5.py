"""In-context reinforcement learning with a resettable S5 memory: PPO, end to end in JAX, in one file.

    python train_s5.py                                        # six DMControl tasks, random projections
    python train_s5.py --memory s5                            # S5 over features in the place of S5 over vectors
    python train_s5.py --env cartpole-swingup --num-seeds 4   # four seeds in one compiled function
    python train_s5.py --sweep lr=3e-4,1e-3 --num-seeds 3     # every setting with every seed
    python train_s5.py --resume runs/NAME                     # go on after a kill, to the same bits

From Python, a whole run is one pure function:

    train = make_train(Config(env=("CartPole-v1",), num_envs=32, total_timesteps=200_000))
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(4))
    out = jax.jit(lambda keys: jax.lax.map(train, keys))(keys)  # on a GPU: jax.jit(jax.vmap(train))(keys)

To copy: s5.py and envs.py suffice for gymnax environments and your own. Random projections need vector_s5.py,
DMControl dmc.py and physics.py, --sysid sysid.py, run folders experiment.py and its imports.

After Lu et al., "Structured State Space Models for In-Context Reinforcement Learning" (arXiv 2303.03982).
"""

import dataclasses
import importlib.util
import inspect
import math
from functools import partial
from typing import Any, Callable, ClassVar, Literal, NamedTuple, get_args, get_origin

import distrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro

import envs
from s5 import S5


def sized(cpu: Any, accelerator: Any) -> Any:
    """A default that depends on the machine."""
    return dataclasses.field(
        default_factory=lambda: cpu if jax.default_backend() == "cpu" else accelerator)


# ---- Memory: the only section in which the trainers differ ---------------------------------------
@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    memory: Literal["auto", "s5", "vector"] = "auto"  # auto: vector under random projections and steps of one length
    width: int = sized(cpu=64, accelerator=256)  # features of every layer of the network
    layers: int = sized(cpu=3, accelerator=4)  # S5 blocks; of s5 only
    state_size: int = sized(cpu=32, accelerator=256)  # P, states of each S5 block; of s5 only
    dt: Literal["recurrence", "input", "none"] = "recurrence"  # use of a step's duration, where it varies


class Memory(S5):
    """The interface of a memory: zero_state(batch_shape), __call__ and step, both of (hidden, x, reset).

    The last two may have fields of the Observation as further arguments, by their names: `context`
    (normalised), `projected`, `change`, and `dt`, which is absent where all steps last equally or config.dt
    hides it.
    """

    durations: tuple[float, ...] = ()  # all values of dt in a sequence, if they are known; a step takes any

    def __call__(self, hidden, x, reset, dt=None):
        if dt is not None and self.durations:
            values = jnp.array(self.durations, jnp.float32)
            dt = values, jnp.abs(dt[..., None] - values).argmin(-1)
        return super().__call__(hidden, x, reset, dt)

    def step(self, hidden, x, reset, dt=None):
        return super().step(self.discretise(), hidden, x, reset, dt)


class VectorMemory(nn.Module):
    """VectorS5 -> GELU -> dense -> GELU -> residual. VectorS5 stores the observation and its change.

    As `Memory`: x (..., N, width), reset (..., N), context (..., N, actions + 3), projected and change
    (..., N, obs_size), with a leading axis T for a sequence.
    """

    layer: Any  # VectorS5
    width: int

    def setup(self):
        self.dense = nn.Dense(self.width)

    @nn.nowrap
    def zero_state(self, batch_shape):
        return self.layer.zero_state(batch_shape)

    def __call__(self, hidden, x, reset, context, projected, change):
        layer = self.layer if reset.ndim > 1 else self.layer.step
        # without symlog, so that vectors are linear in the task's own observation
        now, before = (jnp.sign(o) * jnp.expm1(jnp.abs(o)) for o in (projected, projected - change))
        vectors = jnp.stack([now, now - before], -2)
        hidden, y = layer(hidden, context[..., :-2], vectors, reset)  # context: last action and reward
        return hidden, x + flat(lambda y: nn.gelu(self.dense(nn.gelu(y))), y)

    def step(self, hidden, x, reset, context, projected, change):
        return self(hidden, x, reset, context, projected, change)


def memory_of(config: "Config") -> str:
    """The kind of memory that `config` stands for, "s5" or "vector"."""
    kwargs = make_trial_kwargs(config)
    suited = envs.is_random(kwargs["projection"]) and len(kwargs["action_repeat"]) == 1
    return config.memory.replace("auto", "vector" if suited else "s5")


def make_memory(config: "Config", trials: envs.Trials | None = None) -> nn.Module:
    """The agent's memory. Any flax module with the three methods of `Memory` can take its place."""
    if memory_of(config) == "s5":
        return Memory(features=config.width, state_size=config.state_size, layers=config.layers,
                      dtype=jnp.dtype(config.dtype), durations=trials.durations if trials else ())
    from vector_s5 import VectorS5
    if not (config.observe_action and config.observe_change and config.num_steps % VectorS5.stride == 0):
        raise ValueError("--memory vector, the default under random projections, needs --observe-action, "
                         f"--observe-change and a --num-steps that is a multiple of {VectorS5.stride}; "
                         "--memory s5 does not")
    layer = VectorS5(features=config.width, scalars=trials.action_width + 1, vectors=2,
                     size=trials.obs_size, actions=trials.action_width)
    return VectorMemory(layer, config.width)


# ---- Configuration -------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config(MemoryConfig):
    # the task
    env: tuple[str, ...] = envs.TRAIN_TASKS  # names, see envs.make; several tasks share num_envs
    env_kwargs: tuple[str, ...] = ()  # KEY=VALUE arguments of the environment
    projection: Literal["auto", *envs.PROJECTIONS] = "auto"  # auto: gaussian for DMControl, else none
    obs_size: int = 12  # size of a projected observation
    action_size: int = 2  # dimensions of the action before projection
    action_repeat: tuple[int, ...] = ()  # steps per action, default DMControl 2, else 1; of several, one is drawn
    episodes_per_trial: int = 1  # episodes after which the hidden state is reset
    # the agent
    observe_action: bool = True  # observe the previous action
    observe_change: bool = True  # observe the change of the projected observation
    sysid: bool = False  # under random projections, observe the features of sysid.py
    privileged_critic: bool = True  # under random projections, the critic observes the raw state in training
    blind: bool = False  # hide all observations but actions, rewards and episode starts
    reset: Literal["trial", "step", "never"] = "trial"  # when the hidden state is reset
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products
    # the budget
    total_timesteps: int = sized(cpu=20_000_000, accelerator=500_000_000)  # environment steps per seed
    num_envs: int = sized(cpu=192, accelerator=6144)  # environments, split equally among the tasks
    num_steps: int = 128  # steps per environment and rollout
    log_every: int = 10  # updates per call of the compiled function
    # PPO
    lr: float = 5e-4  # Adam's step size
    anneal: Literal["lr+entropy", "lr", "none"] = "lr+entropy"  # what falls linearly to zero
    update_epochs: int = 4  # passes over every rollout
    num_minibatches: int = sized(cpu=4, accelerator=16)  # per pass; each of whole environments
    gamma: float = 0.995  # discount
    gae_lambda: float = 0.95
    clip_eps: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    MAX_GRAD_NORM: ClassVar = 0.5  # of all gradients together
    SWEEPABLE: ClassVar = ("lr", "gamma", "gae_lambda", "clip_eps", "ent_coef", "vf_coef")  # traced

    def __post_init__(self):
        may_be_zero = ("gamma", "gae_lambda", "ent_coef", "vf_coef")
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), get_origin(field.type) or field.type
            if kind is Literal:
                expected = f"one of {', '.join(get_args(field.type))}"
                valid = value in get_args(field.type)
            elif kind in (int, float):
                least, zero = 1 if kind is int else 1e-30, field.name in may_be_zero
                most = {"total_timesteps": 2**40, "layers": 1000, "update_epochs": 1000}
                most = most.get(field.name, 2**20)
                expected = f"{kind.__name__}, {'0 or ' * zero}at least {least} and below {most}"
                valid = isinstance(value, (int, kind)) and not isinstance(value, bool)
                valid = valid and (least <= value < most or zero and value == 0)
            else:
                expected = kind.__name__
                valid = isinstance(value, kind)
            if not valid:
                raise ValueError(f"{field.name} must be {expected}, got {value!r}")
        if not all(isinstance(n, int) and 0 < n < 1000 for n in self.action_repeat):
            raise ValueError(f"action_repeat must be positive integers below 1000, got {self.action_repeat}")
        if max(self.gamma, self.gae_lambda) > 1:
            raise ValueError(f"gamma and gae_lambda must be at most 1, got {self.gamma}, {self.gae_lambda}")
        if not self.env or self.num_envs % (len(self.env) * self.num_minibatches):
            raise ValueError(f"num_envs={self.num_envs} must be divisible by tasks x minibatches = "
                             f"{len(self.env)} x {self.num_minibatches}")

    @property
    def steps_per_update(self) -> int:  # of the mean duration, if durations vary
        repeats = make_trial_kwargs(self)["action_repeat"]
        return self.num_envs * self.num_steps * sum(repeats) // len(repeats)

    @property
    def num_updates(self) -> int:
        return math.ceil(self.total_timesteps / self.steps_per_update / self.log_every) * self.log_every


def make_trial_kwargs(config: Config) -> dict[str, Any]:
    """Keyword arguments of envs.Trials that `config` stands for."""
    dmc = all(map(envs.is_dmc, config.env))
    projection = config.projection.replace("auto", "gaussian" if dmc else "none")
    random = envs.is_random(projection)  # else there is nothing to identify
    same = ("obs_size", "action_size", "episodes_per_trial", "observe_action", "observe_change")
    return {name: getattr(config, name) for name in same} | dict(
        projection=projection, action_repeat=config.action_repeat or ((2,) if dmc else (1,)),
        sysid=config.sysid and random, privileged=config.privileged_critic and random,
        env_kwargs=envs.parse_kwargs(config.env_kwargs))


# ---- Running statistics --------------------------------------------------------------------------
class Moments(NamedTuple):
    """Running mean and variance."""

    count: jax.Array
    mean: jax.Array
    var: jax.Array

    def merge(self, n, mean, var):
        """The moments with n more values of that mean and variance (Chan et al.)."""
        count, shift = self.count + n, mean - self.mean
        var = self.count * self.var + n * var + shift**2 * self.count * n / count
        return Moments(count, self.mean + shift * n / count, var / count)

    def normalise(self, x):
        """x in deviations from the mean, at most 5: a rare large input would drown the others."""
        return jnp.clip((x - self.mean) * jax.lax.rsqrt(self.var + 1e-6), -5.0, 5.0)


def no_moments(shape):
    return Moments(jnp.float32(1e-4), jnp.zeros(shape, jnp.float32), jnp.ones(shape, jnp.float32))


def moments_of(x, axes, pmean):
    """Mean and variance of x over `axes` and over the devices that share the environments."""
    mean = pmean(x.mean(axes, keepdims=True))
    return mean.squeeze(axes), pmean(((x - mean) ** 2).mean(axes))


# ---- Network -------------------------------------------------------------------------------------
def flat(layer: Callable, x: jax.Array) -> jax.Array:
    """layer(x) with the leading axes of x (..., D) flattened: XLA's backward pass is faster on matrices."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class ActorCritic(nn.Module):
    """Encoders -> memory -> policy head and value head.

    Observations are normalised by `norm`, an envs.Observation of Moments pooled over all tasks, so that
    the scale of an input does not reveal the task.
    """

    config: Config
    memory: nn.Module
    action_dims: int
    num_bins: int

    def setup(self):
        dense = partial(nn.Dense, self.config.width, dtype=jnp.dtype(self.config.dtype))
        self.context_encoder, self.observation_encoder, self.bypass = dense(), dense(), dense()
        self.memory_norm = nn.LayerNorm()
        self.actor, self.critic = dense(), dense()
        width = self.config.width
        self.state_encoder = nn.Sequential([nn.Dense(2 * width), nn.gelu, nn.Dense(width), nn.gelu])
        self.value_head = nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))
        # a small gain: at first all actions are equally likely, whatever the input
        self.policy_head = nn.Dense(self.action_dims * self.num_bins,
                                    kernel_init=nn.initializers.orthogonal(0.01))

    @nn.nowrap
    def zero_state(self, batch_shape):
        """The hidden state of environments (*batch_shape) whose trials have not begun."""
        return self.memory.zero_state(batch_shape)

    def __call__(self, norm, hidden, observation, reset, critic=True):
        """The agent over sequences, or in one step.

        Args:
          norm: envs.Observation of Moments.
          hidden: hidden state before the first step.
          observation: of sequences (T, N, ...) or of one step (N, ...).
          reset: (T, N) or (N,) bool, whether the hidden state is reset before the step.
          critic: also compute the value, which may need the raw state.

        Returns:
          (hidden state, distribution of actions (..., N, action_dims) int32, value (..., N) in the scale of
          the task's rewards or None).
        """
        hidden, x = self.features(norm, hidden, observation, reset)
        return hidden, self.policy(x), self.value(norm, x, observation) if critic else None

    def policy(self, features):
        """Distribution of actions (..., action_dims) int32, independent bins in every dimension."""
        logits = flat(lambda x: self.policy_head(nn.gelu(self.actor(x))), features)
        logits = logits.reshape(*logits.shape[:-1], self.action_dims, self.num_bins)
        return distrax.Independent(distrax.Categorical(logits=logits), 1)

    def value(self, norm, features, observation):
        """(...) float32, in the scale of the task's rewards."""
        if observation.state.shape[-1]:
            state = flat(self.state_encoder, norm.state.normalise(observation.state))
            features = jnp.concatenate([features, state], -1)
        return flat(lambda x: self.value_head(nn.gelu(self.critic(x))), features)[..., 0]

    def features(self, norm, hidden, observation, reset):
        """(hidden state, features (..., 2 width) for the heads).

        Observation features bypass the memory. They also enter it, scaled by 0.1 under random projections,
        because they outnumber action and reward and would drown them early in training.
        """
        parts = [getattr(norm, name).normalise(getattr(observation, name))
                 for name in ("projected", "change", "sysid")]
        visible = 0.0 if self.config.blind else 1.0
        observed = flat(self.observation_encoder, visible * jnp.concatenate(parts, -1))
        context = norm.context.normalise(observation.context)
        fields = {"context": context, "projected": visible * observation.projected,
                  "change": visible * observation.change}
        if observation.dt is not None and self.config.dt == "recurrence":
            fields["dt"] = observation.dt
        elif observation.dt is not None and self.config.dt == "input":
            duration = norm.dt.normalise(observation.dt)
            context = jnp.concatenate([context, duration[..., None]], -1)
        scale = 0.1 if envs.is_random(make_trial_kwargs(self.config)["projection"]) else 1.0
        x = nn.gelu(flat(self.context_encoder, context) + scale * observed)
        memory = self.memory.step if reset.ndim == 1 else self.memory
        taken = inspect.signature(self.memory.__call__).parameters
        hidden, x = memory(hidden, x, reset, **{name: fields[name] for name in fields if name in taken})
        bypass = nn.gelu(flat(self.bypass, nn.gelu(observed)))
        return hidden, jnp.concatenate([self.memory_norm(x), bypass], -1)


# ---- PPO -----------------------------------------------------------------------------------------
class RunnerState(NamedTuple):
    """Everything that training carries from update to update."""

    params: Any
    norm: envs.Observation  # Moments of every field
    opt_state: Any
    env_state: envs.TrialsState
    observation: envs.Observation  # what the agent acts on next
    hidden: Any  # hidden state before `observation`
    reset: jax.Array  # (N,) bool, whether the hidden state is reset before `observation`
    returns: jax.Array  # (N,) running discounted return, for the scale of rewards
    reward_scale: Moments  # of these returns, per task (tasks,)
    hyper: dict[str, jax.Array]  # values of Config.SWEEPABLE
    key: jax.Array
    num_updates: jax.Array


class Rollout(NamedTuple):
    """One rollout: T steps of N environments, (T, N, ...)."""

    observation: envs.Observation
    reset: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    transition: envs.Transition


def gae(reward, value, last_value, terminated, trial_end, gamma, lam) -> jax.Array:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438) over trials, (T, N).

    Arguments are (T, N), but last_value (N,), gamma and lam () or (T, N). Inside a trial the next value is
    that of the next step, across episode boundaries too. At a trial's end it is 0 if the task terminated.
    If the trial ran out of time, the value of the last observation acted on replaces that of the final one.
    """
    next_value = jnp.concatenate([value[1:], last_value[None]])
    next_value = jnp.where(trial_end, jnp.where(terminated, 0.0, value), next_value)
    delta = reward + gamma * next_value - value
    decay = jnp.where(trial_end, 0.0, gamma * lam)

    def backward(advantage, x):
        advantage = x[0] + x[1] * advantage
        return advantage, advantage

    start = jnp.zeros_like(last_value)
    return jax.lax.scan(backward, start, (delta, decay), reverse=True, unroll=8)[1]


def scale_rewards(reward, trial_end, returns, scale, gamma, pmean) -> tuple[Any, jax.Array, Moments]:
    """Rewards (T, N) over the running deviation of their task's discounted returns, at most 10 in size.

    With one scale for all tasks the critic would learn little of those that pay little (compare van
    Hasselt et al., arXiv 1602.07714). The smallest scale is a hundredth of the largest. The bound is for
    rewards that come after long zeros. gamma is () or (T, N). `returns` (N,) and `scale`, Moments
    (tasks,), are carried from rollout to rollout and returned second and third.
    """
    def accumulate(total, x):
        reward, trial_end, gamma = x
        total = jnp.clip(total * gamma + reward, -1e12, 1e12)  # its square must be finite
        return jnp.where(trial_end, 0.0, total), total

    steps = reward, trial_end, jnp.broadcast_to(gamma, reward.shape)
    returns, history = jax.lax.scan(accumulate, returns, steps, unroll=8)
    by_task = history.reshape(len(history), len(scale.mean), -1)  # (T, N) -> (T, tasks, N / tasks)
    scale = scale.merge(by_task[:, 0].size, *moments_of(by_task, (0, 2), pmean))
    deviation = jnp.sqrt(scale.var)
    deviation = jnp.maximum(deviation, 0.01 * deviation.max() + 1e-4)
    scaled = reward / jnp.repeat(deviation, by_task.shape[2])
    return jnp.clip(scaled, -10.0, 10.0), returns, scale


def normalise_advantages(advantage: jax.Array, tasks: int, pmean: Callable) -> jax.Array:
    """Advantages (T, N) standardised within each task, so that every task weighs the same."""
    by_task = advantage.reshape(len(advantage), tasks, -1)  # (T, N) -> (T, tasks, N / tasks)
    mean, var = moments_of(by_task, (0, 2), pmean)
    return ((by_task - mean[:, None]) / (jnp.sqrt(var)[:, None] + 1e-8)).reshape(advantage.shape)


def ppo_loss(pi, value, rollout, advantage, target, hyper) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped objective of PPO (Schulman et al., arXiv 1707.06347), its value loss clipped as well."""
    eps = hyper["clip_eps"]
    log_ratio = pi.log_prob(rollout.action) - rollout.log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - eps, 1.0 + eps)
    policy_loss = -jnp.minimum(ratio * advantage, clipped * advantage).mean()
    value_clipped = rollout.value + jnp.clip(value - rollout.value, -eps, eps)
    value_loss = 0.5 * jnp.maximum((value - target) ** 2, (value_clipped - target) ** 2).mean()
    entropy = pi.entropy().mean()
    loss = policy_loss + hyper["vf_coef"] * value_loss - hyper["ent_coef"] * entropy
    return loss, {
        "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy,
        "kl": (ratio - 1.0 - log_ratio).mean(), "clip_fraction": (jnp.abs(ratio - 1.0) > eps).mean()}


@dataclasses.dataclass(frozen=True, eq=False)
class Train:
    """train(key, hyper=None) -> {"runner", "metrics"} is a whole run, `init` and `update` are its halves."""

    init: Callable  # (key, hyper=None) -> RunnerState; hyper: traced values of Config.SWEEPABLE
    update: Callable  # RunnerState -> (RunnerState, metrics), one iteration of PPO
    trials: envs.Trials
    network: ActorCritic
    num_updates: int

    def __call__(self, key, hyper=None):
        runner, metrics = jax.lax.scan(
            lambda runner, _: self.update(runner), self.init(key, hyper), None, self.num_updates)
        return {"runner": runner, "metrics": metrics}


def make_train(config: Config, make_memory: Callable = make_memory, axis: str | None = None) -> Train:
    """PPO of a recurrent agent, as pure functions.

    Args:
      config: the configuration.
      make_memory: (config, envs.Trials) -> memory, see `Memory`.
      axis: name of a mapped axis whose devices share the environments of a seed. `config.num_envs` is
        then the number on each. What is learned differs from one device's by rounding only.

    Returns:
      Train. The metrics of an update are scalars, (tasks,) or (tasks, bins).
    """
    trials = envs.Trials(config.env, config.num_envs, axis=axis, **make_trial_kwargs(config))
    memory = make_memory(config, trials)
    takes_dt = "dt" in inspect.signature(memory.__call__).parameters
    if trials.irregular and config.dt == "recurrence" and not takes_dt:
        raise ValueError("this memory has no argument dt: choose dt='input' or 'none'")
    network = ActorCritic(config, memory, trials.action_dims, trials.num_bins)
    # Adam without its step size, which is traced for sweeps and multiplied where the step is taken
    optimiser = optax.chain(optax.clip_by_global_norm(config.MAX_GRAD_NORM), optax.scale_by_adam())
    tasks, N = len(config.env), config.num_envs
    pmean = partial(jax.lax.pmean, axis_name=axis) if axis else lambda x: x

    def init(key, hyper=None):
        key, env_key, net_key = jax.random.split(key, 3)
        env_state, observation = trials.reset(env_key)
        hidden, reset = network.zero_state((N,)), jnp.ones(N, bool)
        norm = jax.tree.map(lambda x: no_moments(x.shape[1:]), observation)
        sequence = jax.tree.map(lambda x: x[None], observation)
        params = network.init(net_key, norm, hidden, sequence, reset[None])
        values = {name: jnp.float32(getattr(config, name)) for name in config.SWEEPABLE}
        return RunnerState(
            params, norm, optimiser.init(params), env_state, observation, hidden, reset,
            jnp.zeros(N, jnp.float32), no_moments((tasks,)), values | (hyper or {}), key, jnp.int32(0))

    def collect(runner):
        """(runner, Rollout, value (N,) after it)."""
        act = partial(network.apply, runner.params, runner.norm)
        key, action_key = jax.random.split(runner.key)

        def env_step(runner, t):
            hidden, pi, value = act(runner.hidden, runner.observation, runner.reset)
            keys = trials.split(jax.random.fold_in(action_key, t))
            action, log_prob = jax.vmap(lambda pi, key: pi.sample_and_log_prob(seed=key))(pi, keys)
            env_state, observation, transition = trials.step(runner.env_state, action, t)
            step = Rollout(runner.observation, runner.reset, action, log_prob, value, transition)
            reset = {"trial": transition.trial_end, "step": jnp.ones(N, bool),
                     "never": jnp.zeros(N, bool)}[config.reset]
            return runner._replace(env_state=env_state, observation=observation, hidden=hidden,
                                   reset=reset), step

        runner, rollout = jax.lax.scan(env_step, runner, jnp.arange(config.num_steps))
        _, _, last_value = act(runner.hidden, runner.observation, runner.reset)
        return runner._replace(key=key), rollout, last_value

    def learn(params, opt_state, norm, hidden, data, hyper, key):
        """The gradient steps of one iteration; data: (rollout, advantage, target), all (T, N, ...)."""

        def loss_fn(params, hidden, rollout, advantage, target):
            _, pi, value = network.apply(params, norm, hidden, rollout.observation, rollout.reset)
            return ppo_loss(pi, value, rollout, advantage, target, hyper)

        def gradient_step(carry, index):
            params, opt_state = carry
            minibatch = jax.tree.map(lambda x: jnp.take(x, index, axis=1), data)
            start = jax.tree.map(lambda x: jnp.take(x, index, axis=0), hidden)
            found = jax.value_and_grad(loss_fn, has_aux=True)(params, start, *minibatch)
            (loss, metrics), gradient = pmean(found)
            norm = optax.tree.norm(gradient)
            steps, new_opt_state = optimiser.update(gradient, opt_state, params)
            new_params = jax.tree.map(lambda p, step: p - hyper["lr"] * step, params, steps)
            finite = jnp.isfinite(norm) & jnp.isfinite(loss)  # if not, the step is skipped
            carry = jax.tree.map(lambda *x: jnp.where(finite, *x), (new_params, new_opt_state), carry)
            return carry, metrics | {"grad_norm": norm, "skipped": 1.0 - finite}

        def shuffle(key):
            """(M, N / M) environments of M minibatches: each has one of every M neighbours."""
            M = config.num_minibatches
            order = jax.vmap(lambda k: jax.random.permutation(k, M))(trials.split(key)[::M])
            return (jnp.arange(0, N, M)[:, None] + order).T

        index = jax.vmap(shuffle)(jax.random.split(key, config.update_epochs))  # (epochs, M, N / M)
        carry, metrics = jax.lax.scan(gradient_step, (params, opt_state), index.reshape(-1, index.shape[-1]))
        return *carry, jax.tree.map(jnp.mean, metrics)

    def update(runner):
        hidden, norm = runner.hidden, runner.norm
        runner, rollout, last_value = collect(runner)
        hyper, transition = runner.hyper, rollout.transition
        gamma, lam = hyper["gamma"], hyper["gae_lambda"]
        if transition.dt is not None:  # the settings are those of a step of the mean duration
            gamma, lam = gamma**transition.dt, lam**transition.dt
        reward, returns, reward_scale = scale_rewards(
            transition.reward, transition.trial_end, runner.returns, runner.reward_scale, gamma, pmean)
        advantage = gae(reward, rollout.value, last_value, transition.terminated,
                        transition.trial_end, gamma, lam)
        data = (rollout._replace(transition=None), normalise_advantages(advantage, tasks, pmean),
                advantage + rollout.value)
        shards = jax.lax.axis_size(axis) if axis else 1
        whole = dataclasses.replace(config, num_envs=N * shards)
        left = 1.0 - runner.num_updates.astype(jnp.float32) / whole.num_updates
        annealed = hyper | {"lr": hyper["lr"] * (left if "lr" in config.anneal else 1.0),
                            "ent_coef": hyper["ent_coef"] * (left if "entropy" in config.anneal else 1.0)}
        key, learn_key = jax.random.split(runner.key)
        params, opt_state, metrics = learn(
            runner.params, runner.opt_state, norm, hidden, data, annealed, learn_key)
        error_var, var = (moments_of(x, (0, 1), pmean)[1] for x in (advantage, data[2]))
        metrics |= {"lr": annealed["lr"], "explained_variance": 1.0 - error_var / (var + 1e-8)}
        # statistics change between iterations only: an update uses the inputs that were acted on
        norm = jax.tree.map(
            lambda old, x: old.merge(shards * x.shape[0] * N, *moments_of(x, (0, 1), pmean)),
            norm, rollout.observation, is_leaf=lambda x: isinstance(x, Moments))
        runner = runner._replace(
            params=params, norm=norm, opt_state=opt_state, returns=returns, reward_scale=reward_scale,
            key=key, num_updates=runner.num_updates + 1)
        return runner, metrics | trials.summary(transition)

    return Train(init, update, trials, network, config.num_updates)


# ---- Command line --------------------------------------------------------------------------------
def main() -> None:
    """A run folder with experiment.py, else one seed and a printed table."""
    if importlib.util.find_spec("experiment"):
        import experiment
        return experiment.main(Config, make_train, __doc__)
    config = tyro.cli(Config, description=__doc__)
    metrics = jax.jit(make_train(config))(jax.random.PRNGKey(0))["metrics"]
    returns = metrics["return"].reshape(-1, config.log_every, len(config.env))  # (lines, updates, tasks)
    print("steps", *config.env, sep="\t")
    for line, means in enumerate(jnp.nanmean(returns, 1), 1):
        steps = line * config.log_every * config.steps_per_update
        print(steps, *(f"{x:.2f}" for x in means), sep="\t")


if __name__ == "__main__":
    main()
