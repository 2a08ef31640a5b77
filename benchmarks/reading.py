"""What a memory can decode from random projections: supervised, without reinforcement learning.

    python benchmarks/reading.py                                        # cartpole-swingup and point_mass-easy
    python benchmarks/reading.py --tasks finger-spin --memories S5 --steps 10000000

Random actions, each held for a random time, drive one task at a time through envs.Trials, with gaussian
projections that are new in every trial. A network with an agent's inputs predicts in every step, all of it
independent of the sign of the matrices:

  ahead_1, ahead_4, ahead_16: the change of the projected observation in so many steps, given the actions
  control: what a controller needs, see FEATURES, in coordinates of the agent's actions: Ma^T f, rows of Ma
           scaled to norm 1

All memories learn from one stream, in which every trial is new. `error` is the mean squared error over its
last fifth, each step before it is learned from, in units of the target's mean square (predicting 0 gives 1),
by steps since the trial began. `closed` is the part of the gap between no memory and the oracle that is
closed, (none - error) / (none - oracle), empty where the gap is below 0.02. The oracle is the network without
memory in the task's own coordinates: its inputs are the raw observation and the controls, it predicts raw
numbers, and the true matrices project them.
"""

import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from common import RESULTS, Table, make_parser, run_main, whole  # first: it finds the project

import dmc
import envs
import train_lstm
import train_s5
from train_s5 import flat

MEMORIES = {  # name: (the trainer of its memory, its inputs); LSTM and S5 have as many parameters
    "none": (None, "plain"), "S5": (train_s5, "plain"), "LSTM": (train_lstm, "plain"),
    "none+sysid": (None, "sysid"), "S5+sysid": (train_s5, "sysid"), "oracle": (None, "raw")}
AHEAD = (1, 4, 16)
TARGETS = [f"ahead_{k}" for k in AHEAD] + ["control"]
SINCE = (0, 50, 200)  # steps since the trial began, from which a column counts, up to the next
LR = 2e-3  # step size of Adam at first; falls to 0
MINIBATCHES = 4  # per rollout, made of whole environments
HOLD = 0.85  # probability that an action is held for another step
BINS = (2, 7)  # of random actions: values from -1.25 to 1.25
CLIP = 5.0  # root mean squares, of inputs, targets and predictions
FEATURES = {  # domain: what decides on the next control, and its velocity, in coordinates of the task's controls
    "ball_in_cup": lambda s: (s.qpos[2:] - s.qpos[:2], s.qvel[2:]),
    "cartpole": lambda s: (jnp.sin(s.qpos[1:]), s.qvel[1:]),
    "finger": lambda s: (s.qpos[:2], s.qvel[:2]),
    "pendulum": lambda s: (jnp.sin(s.qpos), s.qvel),
    "point_mass": lambda s: (s.qpos, s.qvel) if s.wrap_prm is None else tuple(  # along the actuators
        s.wrap_prm.reshape(2, 2) @ x for x in (s.qpos, s.qvel)),
    "reacher": lambda s: (jax.grad(lambda q: -(dmc.reacher_to_target(s.replace(qpos=q))**2).sum() / 2)(s.qpos), s.qvel)}


class Stream:
    """Steps of N environments of a task under random actions, as (T, N, ...) arrays.

    reset(key) -> carry; next(carry) -> carry, dict of: inputs "plain", "sysid" and "raw"; reset; actions and
    controls (T, N, AHEAD[-1], size) from this step on; targets ahead (T, N, AHEAD, obs_size) and control
    (T, N, 2, action_dims); their raw origins change and features; known (T, N, AHEAD), whether the trial
    lasts that long.
    """

    def __init__(self, task: str, num_envs: int, num_steps: int, sysid: bool):
        self.trials = envs.Trials((task,), num_envs, sysid=sysid, privileged=False)
        self.features, self.num_steps = FEATURES[task.split("-")[0]], num_steps

    def advance(self, carry, t):
        """One step; (carry, what is stored of the step before it)."""
        state, observation, action, key = carry
        key, new_key, hold_key = jax.random.split(key, 3)
        new = jax.random.randint(new_key, action.shape, *BINS)
        action = jnp.where(jax.random.uniform(hold_key, (len(action), 1)) < HOLD, action, new)
        plain = jnp.concatenate([observation.projected, observation.change, observation.context], -1)
        now = dict(
            plain=plain, sysid=jnp.concatenate([plain, observation.sysid], -1),
            action=envs.action_values()[action], trial_step=state.counters.episode_step,
            obs_matrix=state.obs_matrix, act_matrix=state.act_matrix,
            raw=jax.vmap(self.trials.envs[0].get_obs)(state.env[0]),
            features=jnp.stack(jax.vmap(self.features)(state.env[0]), 1))
        state, observation, _ = self.trials.step(state, action, t)
        return (state, observation, action, key), now

    def reset(self, key):
        state, observation = self.trials.reset(key)
        action = jnp.zeros((self.trials.num_envs, self.trials.action_dims), jnp.int32)
        start = state, observation, action, jax.random.fold_in(key, 1)
        return jax.lax.scan(self.advance, start, jnp.arange(AHEAD[-1]))

    def next(self, carry):
        # the last steps are held back until what lies ahead of them is known
        (carry, held), T = carry, self.num_steps
        carry, new = jax.lax.scan(self.advance, carry, jnp.arange(T))
        steps = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), held, new)
        data = jax.tree.map(lambda x: x[:T], steps)

        def later(name, ks):
            return jnp.stack([steps[name][k:k + T] for k in ks], 2)

        known = later("trial_step", AHEAD) == data["trial_step"][..., None] + jnp.array(AHEAD)  # in the same trial
        actions = later("action", range(AHEAD[-1]))
        controls = jnp.clip(jnp.einsum("tnij,tnkj->tnki", data["act_matrix"], actions), -1.0, 1.0)
        change = later("raw", AHEAD) - data["raw"][:, :, None]
        data |= dict(reset=data["trial_step"] == 0, actions=actions, controls=controls, known=known,
                     change=jnp.where(known[..., None], change, 0.0))
        data["ahead"], data["control"] = self.project(data, data["change"], data["features"])
        return (carry, jax.tree.map(lambda x: x[T:], steps)), data

    def project(self, data, change, features):
        """Raw changes (T, N, AHEAD, n) and features (T, N, 2, m) as the targets that they are to the agent."""
        def observe(raw):
            return envs.symlog(jnp.einsum("tnij,tnj->tni", data["obs_matrix"], raw, precision="highest"))

        rows = data["act_matrix"]
        rows = rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)
        now = observe(data["raw"])
        ahead = [observe(data["raw"] + change[:, :, k]) - now for k in range(len(AHEAD))]
        return jnp.stack(ahead, 2), jnp.einsum("tnij,tnfi->tnfj", rows, features)


def units(data):
    """(mean, root mean square about it) of inputs, by channel, and of what is predicted, about 0."""
    found = {k: (data[k].mean((0, 1)), data[k].std((0, 1)) + 1e-3) for k in ("plain", "sysid", "raw")}
    for name, axes in {"change": (0, 1), "features": (0, 1), "ahead": (0, 1, 3), "control": (0, 1, 3)}.items():
        found[name] = 0.0, jnp.sqrt((data[name]**2).mean(axes, keepdims=True)[0, 0]) + 1e-6
    return found


class Reader(nn.Module):
    """Encoder -> memory, or three residual layers without one -> a head for each target."""

    memory: Any
    width: int
    ahead_size: int
    control_size: int

    @nn.compact
    def __call__(self, hidden, inputs, reset, actions):
        """inputs (T, B, D), reset (T, B), actions (T, B, AHEAD[-1], A) -> hidden, ahead, control: see Stream."""
        def mlp(size, x):
            return flat(nn.Dense(size), nn.gelu(flat(nn.Dense(2 * self.width), x)))

        x = nn.gelu(flat(nn.Dense(self.width), inputs))
        if self.memory is None:
            for _ in range(3):
                x = x + mlp(self.width, nn.LayerNorm()(x))
        else:
            hidden, x = self.memory(hidden, x, reset)
        x = nn.LayerNorm()(x)
        ahead = [mlp(self.ahead_size, jnp.concatenate([x, actions[:, :, :k].reshape(*reset.shape, -1)], -1))
                 for k in AHEAD]
        return hidden, jnp.stack(ahead, 2), mlp(2 * self.control_size, x).reshape(*reset.shape, 2, -1)


def make_learner(name, stream, unit, optimiser):
    """init(key, batches) -> learner; learn(learner, batches) -> learner, sums.

    batches: a rollout cut into MINIBATCHES. sums (2, targets, SINCE): of squared errors before a batch is
    learned from, and of squared targets.
    """
    (trainer, inputs), trials = MEMORIES[name], stream.trials
    raw = inputs == "raw"
    given = "controls" if raw else "actions"
    config = train_s5.Config(memory="s5") if trainer is train_s5 else train_lstm.Config()
    memory = trainer and trainer.make_memory(config)
    sizes = (trials.obs_dims[0], trials.act_dims[0]) if raw else (trials.obs_size, trials.action_dims)
    model = Reader(memory, train_s5.Config().width, *sizes)

    def bound(x, name):
        return jnp.clip((x - unit[name][0]) / unit[name][1], -CLIP, CLIP)

    def squares(ahead, control):  # (T, B, targets)
        return jnp.concatenate([(ahead**2).mean(-1), (control**2).mean((-1, -2))[..., None]], -1)

    def loss(params, hidden, batch):
        hidden, *found = model.apply(params, hidden, bound(batch[inputs], inputs), batch["reset"], batch[given])
        found = [x * unit[k][1] for x, k in zip(found, ("change", "features") if raw else ("ahead", "control"))]
        if raw:
            found = stream.project(batch, *found)
        found = [bound(x, k) for x, k in zip(found, ("ahead", "control"))]
        targets = [bound(batch[k], k) for k in ("ahead", "control")]
        error = squares(*(x - y for x, y in zip(found, targets)))
        known = jnp.concatenate([batch["known"], jnp.ones_like(batch["reset"])[..., None]], -1)
        since = jax.nn.one_hot(jnp.searchsorted(jnp.array(SINCE), batch["trial_step"], side="right") - 1, len(SINCE))
        sums = jnp.einsum("stbk,tbk,tbj->skj", jnp.stack([error, squares(*targets)]), known, since)
        return (error * known).mean(), (hidden, sums)

    def init(key, batches):
        hidden = () if memory is None else memory.zero_state(batches["reset"].shape[::2])
        first, batch = jax.tree.map(lambda x: x[0], (hidden, batches))
        params = model.init(key, first, batch[inputs], batch["reset"], batch[given])
        return params, optimiser.init(params), hidden

    def learn(learner, batches):
        def gradient_step(carry, xs):
            params, opt_state = carry
            gradient, found = jax.grad(loss, has_aux=True)(params, *xs)
            change, opt_state = optimiser.update(gradient, opt_state)
            return (optax.apply_updates(params, change), opt_state), found

        *carry, hidden = learner
        carry, (hidden, sums) = jax.lax.scan(gradient_step, tuple(carry), (hidden, batches))
        return (*carry, hidden), sums.sum(0)

    return jax.jit(init), jax.jit(learn, donate_argnums=0)


def measure(task, memories, options):
    """Trains memories (names) on one stream.

    Returns:
      {name: error (TARGETS, SINCE)}, {name: microseconds of learning per step}.
    """
    size, key = options.num_envs * options.num_steps, jax.random.PRNGKey(options.seed)
    rollouts = max(5, round(options.steps / size))
    sysid = any(MEMORIES[name][1] == "sysid" for name in memories)
    stream, sample = (Stream(task, options.num_envs, steps, sysid) for steps in (options.num_steps, 1000))
    unit = jax.jit(lambda key: units(sample.next(sample.reset(key))[1]))(jax.random.fold_in(key, 1))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LR, 20, max(21, rollouts * MINIBATCHES))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    @jax.jit
    def collect(carry):  # (T, N, ...) -> (MINIBATCHES, T, N / MINIBATCHES, ...)
        carry, data = stream.next(carry)
        return carry, jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(len(x), MINIBATCHES, -1, *x.shape[2:]), 1, 0), data)

    carry = jax.jit(stream.reset)(key)
    functions = {name: make_learner(name, stream, unit, optimiser) for name in memories}
    learners, sums, seconds = {}, {name: [] for name in memories}, {name: [] for name in memories}
    for k in tqdm(range(rollouts), desc=task, mininterval=5):
        carry, batches = jax.block_until_ready(collect(carry))
        for name, (init, learn) in functions.items():
            learner = init(key, batches) if k == 0 else learners[name]
            start = time.perf_counter()
            learners[name], new = jax.block_until_ready(learn(learner, batches))
            seconds[name].append(time.perf_counter() - start)
            sums[name].append(np.asarray(new))
    error = {name: np.divide(*np.sum(x[-(rollouts // 5):], 0).clip(1e-9)) for name, x in sums.items()}
    return error, {name: 1e6 * float(np.median(x)) / size for name, x in seconds.items()}


def main():
    parser = make_parser(__doc__)
    tasks = [task for task in dmc.TASKS if task.split("-")[0] in FEATURES and "poles" not in task]
    parser.add_argument("--tasks", nargs="+", default=["cartpole-swingup", "point_mass-easy"], choices=tasks)
    parser.add_argument("--memories", nargs="+", default=list(MEMORIES), choices=list(MEMORIES),
                        help="none and oracle are always measured")
    parser.add_argument("--steps", type=whole(1), default=2_000_000, help="of each task")
    parser.add_argument("--num-envs", type=whole(1), default=128)
    parser.add_argument("--num-steps", type=whole(1), default=128, help="of a rollout, through which gradients flow")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "reading.csv")
    options = parser.parse_args()
    if options.num_envs % MINIBATCHES:
        parser.error(f"--num-envs must be a multiple of {MINIBATCHES}, got {options.num_envs}")
    memories = [name for name in MEMORIES if name in {"none", "oracle", *options.memories}]
    table = Table(options.out)
    for task in options.tasks:
        error, cost = measure(task, memories, options)
        gap = error["none"] - error["oracle"]
        for i, target in enumerate(TARGETS):
            for name in memories:
                closed = (error["none"] - error[name])[i] / np.where(gap[i] < 0.02, np.nan, gap[i])
                table.add(task=task, target=target, memory=name,
                          **{f"error_{s}": float(x) for s, x in zip(SINCE, error[name][i])},
                          **{f"closed_{s}": "" if np.isnan(x) else float(x) for s, x in zip(SINCE, closed)},
                          us_per_step=cost[name], steps=options.steps, seed=options.seed)


if __name__ == "__main__":
    run_main(main)
