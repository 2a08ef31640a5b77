"""Does it adapt in context, and to tasks it never saw? A checkpoint in; tables, pictures and replays out.

    python evaluate.py runs/NAME                        # a minute or two on a CPU; writes runs/NAME/eval/
    python evaluate.py runs/s5 runs/lstm runs/none      # also compares them (into runs/s5/eval/, or --out)
    python evaluate.py runs/NAME --replay finger-spin   # also one HTML file that plays without a network
    python evaluate.py --help

An evaluation is `trials` whole trials of every task and of every seed, from fixed keys: two calls give the
same numbers, and all policies, seeds and runs meet the same trials (starts and projections). The policies:

    memory, sampled / mode    the agent, acting at random as in training, or by the mode of its policy
    reset, sampled / mode     the same with its memory reset before every step
    random, zero              uniform random actions in [-1, 1] (or among all discrete ones); zeros

A return is a sum of rewards over an episode, the mean over the trial's episodes if it has several. What
becomes of the numbers is in report.py (statistics, tables, pictures) and replay.py.
"""

import difflib
import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro

import dmc
import envs
import replay as replay_page
import report
from report import BINS

HERE = Path(__file__).resolve().parent
KEY = 230303982  # all randomness of an evaluation
TASKS = envs.TRAIN_TASKS + envs.HELD_OUT_TASKS
SAMPLE, MODE, RANDOM, ZERO = range(4)
POLICIES = {  # name: (kind of action, whether the memory is reset before every step)
    "memory, sampled": (SAMPLE, False), "memory, mode": (MODE, False), "reset, sampled": (SAMPLE, True),
    "reset, mode": (MODE, True), "random": (RANDOM, False), "zero": (ZERO, False)}
FAMILIES = ("gaussian", "orthogonal", "rademacher", "identity")


# ---------------------------------------------------------------------------------------------------------
# A run folder -> agent
# ---------------------------------------------------------------------------------------------------------
class Agent(NamedTuple):
    folder: Path
    trainer: Any  # module that defines the network
    config: Any
    params: Any  # leaves with a leading axis of seeds
    seeds: list
    steps: int  # environment steps that each seed had seen
    family: str  # projection that it was trained with; "none" for what is not from DMControl
    tasks: tuple  # that it was trained on
    obs_size: int
    action_size: int

    @property
    def dmc(self):
        return all(envs.is_dmc(task) for task in self.tasks)


def load(folder):
    """The agent in run folder `folder`; of a sweep, the setting with the best return at the end of training.

    Raises ValueError, one sentence, if there is no run, no checkpoint, or not one that this code can read.
    """
    folder = Path(folder)
    try:
        saved = json.loads((folder / "config.json").read_text())
        name, values = saved["trainer"], saved["config"]
    except OSError:
        raise ValueError(f"{folder} is not a run folder: it holds no readable config.json") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}/config.json was not written by a trainer of this project") from None
    if not (HERE / f"{name}.py").is_file():
        raise ValueError(f"{folder} was written by {name}.py, which is not beside evaluate.py")
    trainer = importlib.import_module(name)
    try:
        config = trainer.load_config(values)
        train = trainer.make_train(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json does not fit {name}.py: {error}") from None
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} holds no checkpoint: it has no folder checkpoints/")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    groups = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here),
                          jax.eval_shape(lambda: trainer.init_groups(config, train)))
    manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(
        create=False))
    try:
        update, groups = trainer.restore(manager, groups)
    finally:
        manager.close()
    params = jax.tree.map(lambda *x: jnp.concatenate(x), *(group.params for group in groups))
    members, settings = trainer.members_of(config), trainer.settings_of(config)
    if len(settings) > 1:
        scores = trainer.final_scores(config, train.lanes.tasks, folder).mean(1)
        best = settings[int(np.nanargmax(scores.reshape(len(settings), -1).mean(1)))]
        print(f"{folder} is a sweep: its best setting at the end of training is evaluated, {best}")
        index = np.array([i for i, (setting, _) in enumerate(members) if setting == best])
        members, params = [members[i] for i in index], jax.tree.map(lambda x: x[index], params)
    tasks = tuple(t.removeprefix("dmc:") if envs.is_dmc(t) else t for t in config.env)
    return Agent(folder, trainer, config, params, [seed for _, seed in members],
                 update * config.steps_per_update, config.resolved_projection, tasks,
                 train.lanes.obs_size, train.lanes.action_size)


def choose_tasks(agent, wanted):
    """Names of the tasks to evaluate, in a fixed order; `wanted` () is all that fit. Raises ValueError."""
    wanted = [t.removeprefix("dmc:") if envs.is_dmc(t) else t for t in wanted]
    possible = TASKS if agent.dmc else agent.tasks
    for task in wanted:
        if task not in possible and not agent.dmc:
            raise ValueError(f"{agent.folder} was trained on {', '.join(agent.tasks)}, which is not from "
                             f"DMControl, and can be evaluated on that only, not on {task!r}")
        if task not in possible:
            near = difflib.get_close_matches(task, possible, 3, 0.4) or possible
            raise ValueError(f"unknown task {task!r}; nearest: {', '.join(near)}")
    tasks = tuple(t for t in possible if not wanted or t in wanted)
    if not agent.dmc:
        return tasks
    fitting = tuple(t for t in tasks if fits(agent, own_family(agent), t))
    for task in set(wanted) - set(fitting):
        raise ValueError(f"{task} does not fit the network of {agent.folder}, which reads {agent.obs_size} "
                         f"and gives {agent.action_size} numbers without a random projection")
    return fitting


def own_family(agent):
    """ "none" is the identity of the task's own size; several tasks share lanes only through matrices."""
    return "identity" if agent.dmc and agent.family == "none" else agent.family


def fits(agent, family, task):
    """Whether projections of `family` keep all of a DMControl task in the sizes of the agent's network."""
    env = envs.make(task)[0]
    return family not in ("identity", "orthogonal") or (
        agent.obs_size >= dmc.TASKS[task].obs_dim and agent.action_size >= env.model.nu)


# ---------------------------------------------------------------------------------------------------------
# Trials
# ---------------------------------------------------------------------------------------------------------
class Variants(NamedTuple):
    """What differs between V ways to live the same trials inside one compiled function."""

    kind: Any  # (V,) SAMPLE, MODE, RANDOM or ZERO
    forget: Any  # (V,) bool, reset the memory before every step
    visible: Any  # (V, input_size) 0 or 1, factor on the agent's input


def make_lanes(agent, tasks, trials, episodes):
    """Lanes of `trials` fresh trials of each task. DMControl: of gaussian projections, see `starts`."""
    sizes = dict(projection="gaussian", obs_size=agent.obs_size, action_size=agent.action_size)
    changes = sizes if agent.dmc else {}
    return agent.trainer.make_lanes(agent.config, tasks=tasks, num_lanes=trials * len(tasks), stagger=False,
                                    episodes_per_trial=episodes, **changes)


def jit_once(function, **settings):
    """jax.jit for what runs once: on a CPU half of an evaluation would go by in optimising it."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options, **settings)


def starts(agent, lanes):
    """start(family) -> (state, inputs) as from lanes.reset: the same starts, any family of projections."""
    state, inputs = jit_once(lanes.reset)(jax.random.PRNGKey(KEY))
    n = lanes.num_lanes // len(lanes.tasks)

    def project(state, inputs, family):
        obs, obs_matrix, act_matrix = [], [], []
        for i, (env, obs_dim, act_dim) in enumerate(zip(lanes.envs, lanes.obs_dims, lanes.act_dims)):
            obs_keys, act_keys = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(KEY), 1 + i), (2, n))
            draw = jax.vmap(envs.sample_matrix, (0, None, None, None))
            obs_matrix.append(envs.pad_to(draw(obs_keys, family, lanes.obs_size, obs_dim),
                                          (lanes.obs_size, max(lanes.obs_dims))))
            act_matrix.append(envs.pad_to(draw(act_keys, family, act_dim, lanes.action_size),
                                          (max(lanes.act_dims), lanes.action_size)))
            obs.append(envs.pad_to(jax.vmap(env.get_obs)(state.env[i]), (max(lanes.obs_dims),)))
        obs, obs_matrix, act_matrix = map(jnp.concatenate, (obs, obs_matrix, act_matrix))
        inputs = inputs.at[:, :lanes.obs_size].set(lanes.project_observation(obs_matrix, obs))
        return state.replace(obs_matrix=obs_matrix, act_matrix=act_matrix, input=inputs), inputs

    project = jit_once(project, static_argnums=2)
    return functools.cache(lambda family: (state, inputs) if family == lanes.projection or not agent.dmc
                           else project(state, inputs, family))


def first_outputs(lanes, size):
    """(input_size,) 0/1: hides all but `size` outputs of a projection, and their differences."""
    position, after = np.arange(lanes.input_size), lanes.obs_size + lanes.action_size + 3
    channel = np.where(position < after, -1, position - after)
    channel = np.where(position < lanes.obs_size, position, channel)
    return (channel < size).astype(np.float32)


def horizon(lanes):
    """Steps of the longest trial; episodes without a time limit are followed for 1000 steps."""
    longest = int(lanes.limits.max())
    return (longest if longest < 2**30 else 1000) * lanes.episodes_per_trial


def make_rollout(agent, lanes, record=False):
    """rollout(params, state, inputs, variants) -> one trial of every lane and variant, time-major.

    params are of one seed; state and inputs as from lanes.reset with a leading axis V. Returns a dict of
    arrays (T, V, N), T = horizon(lanes): reward (0 after the trial's end), alive, episode_end, diverged; with
    record=True also qpos, target, inputs and action, as they were when the agent acted.
    """
    network = agent.trainer.make_network(agent.config, lanes)
    memory = agent.trainer.make_memory(agent.config, jnp.float32)
    steps = horizon(lanes)
    one_episode = lanes.episodes_per_trial == 1  # then no spare start is ever taken: draw none

    def rollout(params, state, inputs, variants):
        prepared = network.apply(params, method="prepare")
        shape = inputs.shape[:2]
        forget = jnp.broadcast_to(variants.forget[:, None] | (agent.config.memory == "none"), shape)
        key = jax.random.PRNGKey(KEY)

        def act(pi, key):
            sample_key, random_key = jax.random.split(key)
            sampled = pi.sample(seed=sample_key)
            if lanes.discrete:
                uniform = jax.random.randint(random_key, sampled.shape, 0, lanes.action_size, sampled.dtype)
            else:
                uniform = jax.random.uniform(random_key, sampled.shape, minval=-1.0, maxval=1.0)
            kind = variants.kind.reshape(-1, *[1] * (sampled.ndim - 1))
            return jnp.select([kind == SAMPLE, kind == MODE, kind == RANDOM], [sampled, pi.mode(), uniform],
                              jnp.zeros_like(sampled))

        def step(carry, t):
            state, inputs, memory_state, reset, alive = carry
            seen = inputs * variants.visible[:, None]
            memory_state, pi, _ = network.apply(params, prepared, memory_state, seen, reset, method="step")
            action = act(pi, jax.random.fold_in(key, t))
            when = 1 if one_episode else t
            new_state, new_inputs, out = jax.vmap(lanes.step, (0, 0, None))(state, action, when)
            result = dict(reward=jnp.where(alive, out.reward, 0.0), alive=alive,
                          episode_end=out.episode_end & alive, diverged=out.diverged & alive)
            if record:
                result |= dict(qpos=state.env[0].qpos, target=state.env[0].target, inputs=seen, action=action)
            reset, alive = out.trial_end | forget, alive & ~out.trial_end
            return (new_state, new_inputs, memory_state, reset, alive), result

        carry = (state, inputs, memory.zero_state(shape), jnp.ones(shape, bool), jnp.ones(shape, bool))
        return jax.lax.scan(step, carry, jnp.arange(steps))[1]

    return jax.jit(rollout)


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


class Result(NamedTuple):
    """All that was measured of one agent. Arrays begin with the axes (tasks, seeds, trials)."""

    agent: Agent
    tasks: tuple
    returns: dict  # {policy: (tasks, seeds, trials)}
    curves: dict  # {policy: (tasks, seeds, trials, BINS)} mean reward of an environment step by time
    counts: dict  # likewise, the number of steps in each bin
    episodes: dict  # {policy: (tasks, seeds, trials, episodes)} return by episode, NaN if not reached
    projections: dict  # {column: (tasks, seeds, trials)} returns, NaN where a task does not fit
    horizon: int  # environment steps of a trial


def summarise(out, tasks, episodes, repeat):
    """Rollout (T, V, N) -> returns, curves, counts and episodes, each (V, tasks, N / tasks, ...)."""
    reward, alive, end = (np.asarray(out[k], np.float64) for k in ("reward", "alive", "episode_end"))
    T = len(reward)
    split = lambda x: x.reshape(len(x), tasks, -1, *x.shape[2:])  # noqa: E731
    place = np.arange(T) * BINS // T
    totals, counts = (np.stack([x[place == b].sum(0) for b in range(BINS)], -1) for x in (reward, alive))
    with np.errstate(invalid="ignore"):
        curves = totals / counts / repeat
    number = np.cumsum(end, 0) - end  # index of the episode that each step belongs to
    by_episode = np.stack([np.where((alive * (number == e)).any(0), (reward * (number == e)).sum(0), np.nan)
                           for e in range(episodes)], -1)
    return [split(x) for x in (reward.sum(0) / episodes, curves, counts, by_episode)]


def measure(agent, tasks, trials, episodes, projections, sizes, shown):
    """Every policy and, if asked, every projection on `trials` trials of each task: a Result."""
    lanes = make_lanes(agent, tasks, trials, episodes)
    rollout = make_rollout(agent, lanes)
    own, start = own_family(agent), starts(agent, lanes)
    visible = np.ones(lanes.input_size, np.float32)
    jobs = [(name, own, kind, forget, visible) for name, (kind, forget) in POLICIES.items()]
    columns = {}  # name: (family, visible)
    if projections:
        columns |= {family: (family, visible) for family in FAMILIES if family != own}
        family = "gaussian" if own == "identity" else own
        for size in sizes:
            columns[f"{family}, {size} of {lanes.obs_size}"] = family, first_outputs(lanes, size)
    jobs += [(name, family, *POLICIES[shown], mask) for name, (family, mask) in columns.items()]

    found, diverged = {}, 0
    for first in range(0, len(jobs), len(POLICIES)):  # always as many: one compiled function serves all
        part = jobs[first:first + len(POLICIES)]
        padded = part + part[-1:] * (len(POLICIES) - len(part))
        state, inputs = stack([start(family) for _, family, *_ in padded])
        variants = Variants(*(jnp.array(x) for x in zip(*[job[2:] for job in padded])))
        outs = []
        for seed in range(len(agent.seeds)):
            params = jax.tree.map(lambda x: x[seed], agent.params)
            out = jax.device_get(rollout(params, state, inputs, variants))
            diverged += out["diverged"][:, :len(part)].sum()
            outs.append(summarise(out, len(tasks), episodes, lanes.action_repeat))
        for v, (name, *_) in enumerate(part):
            found[name] = [np.stack([seed[k][v] for seed in outs], 1) for k in range(4)]
    if diverged:
        print(f"{agent.folder}: {diverged} trials diverged and were cut short there", file=sys.stderr)
    table = {own: found[shown][0]} if projections else {}
    for name, (family, _) in columns.items():
        fitting = np.array([fits(agent, family, task) for task in tasks])
        table[name] = np.where(fitting[:, None, None], found[name][0], np.nan)
    order = [c for f in FAMILIES for c in table if c == f] + [c for c in table if c not in FAMILIES]
    by_policy = [{name: found[name][k] for name in POLICIES} for k in range(4)]
    return Result(agent, tasks, *by_policy, {c: table[c] for c in order}, horizon(lanes) * lanes.action_repeat)


def record(agent, task, trials, episodes, shown):
    """Data for replay.write: the first seed's trial of median return with memory, and the same without."""
    lanes = make_lanes(agent, (task,), trials, episodes)
    start = starts(agent, lanes)(own_family(agent))
    kind = POLICIES[shown][0]
    variants = Variants(jnp.array([kind, kind]), jnp.array([False, True]), jnp.ones((2, lanes.input_size)))
    params = jax.tree.map(lambda x: x[0], agent.params)
    out = jax.device_get(make_rollout(agent, lanes, record=True)(params, *stack([start, start]), variants))
    returns = out["reward"].sum(0)  # (2, trials)
    lane = int(np.argsort(returns[0], kind="stable")[(trials - 1) // 2])
    matrices = [np.asarray(m[lane], np.float64) for m in (start[0].obs_matrix, start[0].act_matrix)]
    sides = []
    for v, name in enumerate(("memory on", "memory reset at every step")):
        frames = int(out["alive"][:, v, lane].sum())
        told = {k: np.asarray(x[:frames, v, lane], np.float64) for k, x in out.items() if x is not None}
        sides.append({"name": name, "qpos": told["qpos"], "target": told.get("target"),
                      "reward": told["reward"], "sees": told["inputs"][:, :lanes.obs_size],
                      "acts": told["action"], "control": np.clip(told["action"] @ matrices[1].T, -1, 1),
                      "ends": np.flatnonzero(told["episode_end"]).tolist()})
    return {"task": task, "run": agent.folder.name, "trainer": agent.trainer.__name__, "family": agent.family,
            "action_repeat": lanes.action_repeat, "seed": agent.seeds[0], "trial": lane, "trials": trials,
            "actions": shown.split(", ")[1], "held_out": task not in agent.tasks, "obs_matrix": matrices[0], "act_matrix": matrices[1],
            "sides": sides}


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------
def evaluate(folders: tyro.conf.Positional[tuple[Path, ...]], tasks: tuple[str, ...] = (), trials: int = 32,
             episodes: int = 0, sizes: tuple[int, ...] = (), projections: bool = True,
             deterministic: bool = False, replay: tuple[str, ...] = (), tables: bool = True,
             out: Path | None = None) -> list[Result]:
    """Evaluate runs; write tables, pictures, replays and report.md into <run>/eval/. Raises ValueError.

    Args:
        folders: run folders; several are also compared, over the tasks that they share
        tasks: DMControl tasks (default: all eleven; of a run on other environments its own)
        trials: trials of every task and seed
        episodes: episodes in a trial (0: as in training)
        sizes: k, ...: show only k outputs of a projection (default: 1/4, 1/2 and 3/4 of the network's)
        projections: make the table of projections (DMControl only)
        deterministic: curves, projections, comparisons and replays show the policy's mode, not samples
        replay: tasks to record as an HTML file each
        tables: make tables and pictures (--no-tables: replays only)
        out: folder of the comparison of several runs (default: eval/ of the first)
    """
    if not folders:
        raise ValueError("name at least one run folder, such as runs/NAME")
    if trials < 1 or episodes < 0:
        raise ValueError(f"trials must be at least 1 and episodes at least 0, got {trials} and {episodes}")
    shown = "memory, mode" if deterministic else "memory, sampled"
    agents, results = [load(folder) for folder in folders], []
    for agent in agents:  # refuse before the first minute is spent
        choose_tasks(agent, tasks)
        for task in replay:
            if not agent.dmc:
                raise ValueError(f"replays draw DMControl tasks only, and {agent.folder} is a run on "
                                 f"{', '.join(agent.tasks)}")
            choose_tasks(agent, (task,))
        for size in sizes:
            if not agent.dmc or not 1 <= size <= agent.obs_size:
                sizes_that_do = f"sizes 1 to {agent.obs_size} do" if agent.dmc else "without projection"
                raise ValueError(f"size {size} does not fit the network of {agent.folder}, which reads "
                                 f"{agent.obs_size} observations ({sizes_that_do})")
    for agent in agents:
        folder = agent.folder / "eval"
        folder.mkdir(exist_ok=True)
        length = episodes or agent.config.episodes_per_trial
        for task in replay:
            path = folder / f"replay-{task.removeprefix('dmc:')}.html"
            replay_page.write(record(agent, task.removeprefix("dmc:"), trials, length, shown), path)
            print(f"wrote {path}")
        if not tables:
            continue
        chosen = sizes or sorted({max(1, round(k * agent.obs_size / 4)) for k in (1, 2, 3)})
        result = measure(agent, choose_tasks(agent, tasks), trials, length, projections and agent.dmc, chosen,
                         shown)
        results.append(result)
        report.write_report(result, shown, folder)
        print(f"\n{report.describe(result)}\nwrote {folder / 'report.md'}")
        if result.projections and len(agents) == 1:
            print(f"\nprojections, {shown}\n{report.projections_table([result])}")
        for group, index in report.groups(result).items():
            print(f"\ntasks {group}\n{report.returns_table(result, index)}")
    if len(results) > 1:
        folder = out or agents[0].folder / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"\n{report.write_comparison(results, shown, folder)}")
    return results


def main():
    jax.config.update("jax_compilation_cache_dir", os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax-icrl")))
    try:
        tyro.cli(evaluate, description=__doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
