"""Does it adapt in context, and to tasks it never saw? A checkpoint in; tables, pictures and replays out.

    python evaluate.py runs/NAME                        # three minutes on a CPU core; writes runs/NAME/eval/
    python evaluate.py runs/s5 runs/lstm runs/none      # also compares them (into runs/s5/eval/, or --out)
    python evaluate.py runs/NAME --replay finger-spin   # also one HTML file that plays without a network
    python evaluate.py --help

An evaluation is `trials` whole trials of every task for every seed, from fixed keys: two calls give the same
numbers. Each seed of a run has its own trials, so that seeds are independent samples. All policies, and the
seeds of the same place in other runs, meet the same ones (starts and projections), so that their differences
are paired. The trials of a task do not depend on what else is evaluated. The policies:

    memory, sampled / mode    the agent, acting at random as in training, or by the mode of its policy
    blind, sampled / mode     the same with all observations hidden; its memory, last action, reward and flags stay
    reset, sampled / mode     the agent with its memory reset before every step
    random, zero              uniform random actions in [-1, 1] (or among all discrete ones); zeros

A return is a sum of rewards over an episode, the mean over the trial's episodes if it has several; with
--episodes a trial may last longer than in training. What becomes of the numbers is in report.py (statistics,
tables, pictures) and replay.py. "Reading", in the report, is the return with memory minus the blind one in the same
trials: what the agent gains by looking.
"""

import difflib
import importlib
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro

import dmc
import envs
import experiment
import replay as replay_page
import report
from report import BINS

EVAL_SEED = 230303982  # all randomness of an evaluation
SAMPLE, MODE, RANDOM, ZERO = range(4)
POLICIES = {  # name: (kind of action, whether the memory is reset before every step, whether observations are hidden)
    "memory, sampled": (SAMPLE, False, False), "memory, mode": (MODE, False, False),
    "blind, sampled": (SAMPLE, False, True), "blind, mode": (MODE, False, True),
    "reset, sampled": (SAMPLE, True, False), "reset, mode": (MODE, True, False),
    "random": (RANDOM, False, False), "zero": (ZERO, False, False)}
FAMILIES = ("gaussian", "orthogonal", "rademacher", "identity")


# ---- A run folder -> agent ---------------------------------------------------------------------------------
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
    identify: bool  # whether it sees what sysid.py finds out

    @property
    def dmc(self):
        return all(envs.is_dmc(task) for task in self.tasks)


def load(folder):
    """The agent in run folder `folder`; of a sweep, the setting with the best return at the end of training.

    Raises ValueError, one sentence, if there is no run, no checkpoint, or not one that this code can read.
    """
    folder = Path(folder)
    config, options = experiment.read_run(folder)
    trainer = importlib.import_module(type(config).__module__)
    try:
        train = trainer.make_train(config)
    except ValueError as error:
        raise ValueError(f"{folder}/config.json does not fit {trainer.__name__}.py: {error}") from None
    if not (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} holds no checkpoint: it has no folder checkpoints/")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here),
                          jax.eval_shape(lambda: experiment.init_groups(jax.vmap(train.init), config, options)))
    manager = ocp.CheckpointManager((folder / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(
        create=False))
    try:
        update, groups = experiment.restore(manager, shapes)
    finally:
        manager.close()
    params = jax.tree.map(lambda *x: jnp.concatenate(x), *(group.params for group in groups))
    members, settings = experiment.members_of(config, options), experiment.settings_of(config, options)
    if len(settings) > 1:
        scores = experiment.final_scores(config, options, folder).mean(1)
        best = settings[int(np.nanargmax(scores.reshape(len(settings), -1).mean(1)))]
        print(f"{folder} is a sweep: its best setting at the end of training is evaluated, {best}")
        index = np.array([i for i, (setting, _) in enumerate(members) if setting == best])
        members, params = [members[i] for i in index], jax.tree.map(lambda x: x[index], params)
    tasks = tuple(t.removeprefix("dmc:") if envs.is_dmc(t) else t for t in config.env)
    return Agent(folder, trainer, config, params, [seed for _, seed in members],
                 update * config.steps_per_update, config.resolved_projection, tasks,
                 train.lanes.obs_size, train.lanes.action_size, train.lanes.identify)


def choose_tasks(agent, tasks=(), held_out=()):
    """Names of the tasks to evaluate, without "dmc:", each once.

    Args:
      agent: an Agent.
      tasks: names; () stands for those that it was trained on and, for DMControl, the held-out ones.
      held_out: names of further tasks; () stands for envs.HELD_OUT_TASKS, less those too large for the network.

    Raises:
      ValueError: one sentence, if a task is unknown, or not one that this agent can play.
    """
    wanted = [t.removeprefix("dmc:") if envs.is_dmc(t) else t for t in (*tasks, *held_out)]
    possible = dmc.TASKS if agent.dmc else agent.tasks
    for task in wanted:
        if task not in possible and not agent.dmc:
            raise ValueError(f"{agent.folder} was trained on {', '.join(agent.tasks)}, which is not from "
                             f"DMControl, and can be evaluated on that only, not on {task!r}")
        if task not in possible:
            near = difflib.get_close_matches(task, possible, 3, 0.4) or possible
            raise ValueError(f"unknown task {task!r}; nearest: {', '.join(near)}")
        obs_dim, action_dim = task_sizes(task) if agent.dmc else (0, 0)
        if task not in agent.tasks and not fits(agent, task):
            raise ValueError(f"{task} is too large for {agent.folder}: it needs a network trained with --obs-size "
                             f"{obs_dim} and --action-size {action_dim} or more, not {agent.obs_size} and "
                             f"{agent.action_size}")
    if not tasks:
        paper = [t for t in envs.HELD_OUT_TASKS if fits(agent, t)] if agent.dmc and not held_out else []
        wanted = [*agent.tasks, *wanted, *paper]
    return tuple(dict.fromkeys(wanted))


def own_family(agent):
    """The family of projections of its own trials: "none" is the identity of a DMControl task's own size."""
    return "identity" if agent.dmc and agent.family == "none" else agent.family


def task_sizes(task):
    """(numbers in an observation, numbers in an action) of a DMControl task."""
    return dmc.TASKS[task].obs_dim, envs.make(task)[0].model.nu


def fits(agent, task):
    """Whether observation and action of a DMControl task are no larger than what the agent reads and gives."""
    obs_dim, action_dim = task_sizes(task)
    return obs_dim <= agent.obs_size and action_dim <= agent.action_size


# ---- Trials ------------------------------------------------------------------------------------------------
class Variants(NamedTuple):
    """What differs between V ways to live the same trials inside one compiled function."""

    kind: Any  # (V,) SAMPLE, MODE, RANDOM or ZERO
    reset_every_step: Any  # (V,) bool, reset the memory before every step
    outputs: Any  # (V,) int, how many numbers of a projected observation are shown to the agent; 0: it is blind


def trial_keys(task, place):
    """Keys (starts, observation matrices, action matrices, action noise) of the trials of a run's seed number
    `place`, counted from 0, on the task of this name: whatever else is evaluated, they stay the same."""
    name = np.uint32(zlib.crc32(task.encode()))
    return jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.PRNGKey(EVAL_SEED), name), place), 4)


def make_lanes(agent, task, trials, episodes):
    """Lanes of `trials` fresh trials of one task. DMControl: see make_start for their projections."""
    changes = dict(projection="gaussian", obs_size=agent.obs_size, action_size=agent.action_size,
                   identify=agent.identify) if agent.dmc else {}
    return agent.trainer.make_lanes(agent.config, tasks=(task,), num_lanes=trials, stagger=False, privileged=False,
                                    episodes_per_trial=episodes, **changes)


def jit_once(function):
    """jax.jit for what runs once: on a CPU half of an evaluation would go by in optimising it."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


def make_start(agent, lanes, families):
    """start(keys) -> (state, inputs) as from lanes.reset, with a leading axis V = len(families).

    The physical starts are the same along V, and so are the normal numbers behind the matrices; families[v]
    names the distribution of projections. keys: as from trial_keys. Only DMControl has a choice of projections.
    """
    def start(keys):
        state, inputs = lanes.reset(keys[0])
        made = {}
        for family in dict.fromkeys(families):
            if not agent.dmc:
                made[family] = state, inputs
                continue
            draw = jax.vmap(envs.sample_matrix, (0, None, None, None))
            obs_dim, action_dim = lanes.obs_dims[0], lanes.act_dims[0]
            obs_matrix = draw(jax.random.split(keys[1], lanes.num_lanes), family, lanes.obs_size, obs_dim)
            act_matrix = draw(jax.random.split(keys[2], lanes.num_lanes), family, action_dim, lanes.action_size)
            obs = jax.vmap(lanes.envs[0].get_obs)(state.env[0])
            seen = inputs.at[:, :lanes.obs_size].set(lanes.project_observation(obs_matrix, obs))
            made[family] = state.replace(obs_matrix=obs_matrix, act_matrix=act_matrix, input=seen,
                                         identified=lanes.start_identification(obs_matrix, obs)), seen
        return stack([made[family] for family in families])

    return jit_once(start)


def horizon(lanes):
    """Steps of the longest trial; episodes without a time limit are followed for 1000 steps."""
    longest = int(lanes.limits.max())
    return (longest if longest < 2**30 else 1000) * lanes.episodes_per_trial


def make_rollout(agent, lanes, record=False):
    """rollout(params, state, inputs, variants, key) -> one trial of every lane and variant, time-major.

    params are of one seed; state and inputs as from lanes.reset with a leading axis V; key makes the actions'
    noise. Returns a dict of arrays (T, V, N), T = horizon(lanes): reward (0 after the trial's end), alive,
    episode_end, diverged; with record=True also qpos, target, inputs and action, as they were when the agent
    acted.
    """
    network = agent.trainer.ActorCritic(agent.config, lanes.action_size, lanes.discrete, lanes.output_of_input)
    memory = agent.trainer.make_memory(agent.config, jnp.float32)
    steps = horizon(lanes)

    def rollout(params, state, inputs, variants, key):
        prepared = network.apply(params, method="prepare")
        shape = inputs.shape[:2]
        memoryless = agent.config.memory == "none"
        reset_every_step = jnp.broadcast_to(variants.reset_every_step[:, None] | memoryless, shape)

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
            memory_state, pi, _ = network.apply(params, prepared, memory_state, inputs, reset,
                                                variants.outputs[:, None], method="act")
            action = act(pi, jax.random.fold_in(key, t))
            new_state, new_inputs, out = jax.vmap(lanes.step, (0, 0, None))(state, action, t)
            result = dict(reward=jnp.where(alive, out.reward, 0.0), alive=alive,
                          episode_end=out.episode_end & alive, diverged=out.diverged & alive)
            if record:
                result |= dict(qpos=state.env[0].qpos, target=state.env[0].target, inputs=inputs, action=action)
            reset, alive = out.trial_end | reset_every_step, alive & ~out.trial_end
            return (new_state, new_inputs, memory_state, reset, alive), result

        carry = (state, inputs, memory.zero_state(shape), jnp.ones(shape, bool), jnp.ones(shape, bool))
        return jax.lax.scan(step, carry, jnp.arange(steps))[1]

    return jax.jit(rollout)


def stack(trees):
    """Equal pytrees of arrays -> one, with a leading axis."""
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
    horizon: tuple  # per task, environment steps of a trial


def reduce_trials(out, episodes, repeat):
    """What Result keeps of a rollout.

    Args:
      out: arrays (T, V, N) as from make_rollout.
      episodes: episodes in a trial.
      repeat: environment steps in a step of the rollout.

    Returns:
      returns (V, N), curves and counts (V, N, BINS) and episodes (V, N, episodes), float64; see Result.
    """
    reward, alive, end = (np.asarray(out[k]) for k in ("reward", "alive", "episode_end"))
    bin_of_step = np.arange(len(reward)) * BINS // len(reward)
    totals, counts = (np.stack([x[bin_of_step == b].sum(0, dtype=np.float64) for b in range(BINS)], -1)
                      for x in (reward, alive))
    number = np.cumsum(end, 0) - end  # index of the episode that each step belongs to
    lane = np.arange(reward[0].size).reshape(reward[0].shape)
    cell = (number * reward[0].size + lane)[alive]
    lived, paid = (np.bincount(cell, weights, episodes * reward[0].size).reshape(episodes, *reward[0].shape)
                   for weights in (None, reward[alive]))
    with np.errstate(invalid="ignore"):
        curves, by_episode = totals / counts / repeat, np.where(lived > 0, paid, np.nan)
    return paid.sum(0) / episodes, curves, counts, np.moveaxis(by_episode, 0, -1)


def measure(agent, tasks, trials, episodes, projections, sizes, shown):
    """Every policy and, if asked, every projection on `trials` trials of each task and seed.

    Args:
      agent: an Agent.
      tasks: names, as from choose_tasks.
      trials: trials of each task and seed.
      episodes: episodes in a trial.
      projections: whether to fill Result.projections.
      sizes: numbers of outputs of a projection to show, a column each.
      shown: the policy (of POLICIES) that plays under the other projections.

    Returns:
      a Result.
    """
    own, everything = own_family(agent), agent.obs_size
    jobs = {name: (own, kind, reset, 0 if blind else everything) for name, (kind, reset, blind) in POLICIES.items()}
    columns = {}
    if projections:
        kind, reset, _ = POLICIES[shown]
        columns = {family: (family, kind, reset, everything) for family in FAMILIES if family != own}
        family = "gaussian" if own == "identity" else own
        columns |= {f"{family}, {size} of {everything}": (family, kind, reset, size) for size in sizes}
    names, (families, *variants) = [*jobs, *columns], zip(*jobs.values(), *columns.values())
    variants = Variants(*map(jnp.array, variants))

    def live(task):
        """Four arrays (V, seeds, trials, ...) of one task, environment steps of a trial, trials that diverged."""
        lanes = make_lanes(agent, task, trials, episodes)
        start, rollout, by_seed, diverged = make_start(agent, lanes, families), make_rollout(agent, lanes), [], 0
        for place in range(len(agent.seeds)):
            keys = trial_keys(task, place)
            params = jax.tree.map(lambda x: x[place], agent.params)
            out = jax.device_get(rollout(params, *start(keys), variants, keys[3]))
            diverged += out["diverged"].sum()
            by_seed.append(reduce_trials(out, episodes, lanes.action_repeat))
        return [np.stack(x, 1) for x in zip(*by_seed)], horizon(lanes) * lanes.action_repeat, diverged

    with ThreadPoolExecutor(experiment.num_cores()) as pool:  # on a GPU compiling takes nearly all of the time
        found, steps, diverged = zip(*pool.map(live, tasks))
    diverged = sum(diverged)
    if diverged:
        print(f"{agent.folder}: {diverged} trials diverged and were cut short there", file=sys.stderr)
    found = [dict(zip(names, np.stack(x, 1))) for x in zip(*found)]
    table = {own: found[0][shown]} if projections else {}
    for name, (family, *_) in columns.items():
        whole = np.array([family not in ("orthogonal", "identity") or fits(agent, task) for task in tasks])
        table[name] = np.where(whole[:, None, None], found[0][name], np.nan)
    order = [c for f in FAMILIES for c in table if c == f] + [c for c in table if c not in FAMILIES]
    by_policy = [{name: x[name] for name in POLICIES} for x in found]
    return Result(agent, tasks, *by_policy, {c: table[c] for c in order}, steps)


def record_trial(agent, task, trials, episodes, shown):
    """Data for replay.write: the first seed's trial of median return with memory, and the same without."""
    lanes, keys = make_lanes(agent, task, trials, episodes), trial_keys(task, 0)
    state, inputs = make_start(agent, lanes, [own_family(agent)] * 2)(keys)
    kind = POLICIES[shown][0]
    variants = Variants(jnp.array([kind, kind]), jnp.array([False, True]), jnp.full(2, lanes.obs_size))
    params = jax.tree.map(lambda x: x[0], agent.params)
    out = jax.device_get(make_rollout(agent, lanes, record=True)(params, state, inputs, variants, keys[3]))
    returns = out["reward"].sum(0)  # (2, trials)
    lane = int(np.argsort(returns[0], kind="stable")[(trials - 1) // 2])
    matrices = [np.asarray(m[0, lane], np.float64) for m in (state.obs_matrix, state.act_matrix)]
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
            "actions": shown.split(", ")[1], "held_out": task not in agent.tasks, "obs_matrix": matrices[0],
            "act_matrix": matrices[1], "sides": sides}


# ---- Command line ------------------------------------------------------------------------------------------
def evaluate(folders: tyro.conf.Positional[tuple[Path, ...]], tasks: tuple[str, ...] = (),
             held_out: tuple[str, ...] = (), trials: int = 32, episodes: int = 0, sizes: tuple[int, ...] = (),
             projections: bool = True, deterministic: bool = False, replay: tuple[str, ...] = (),
             tables: bool = True, out: Path | None = None) -> list[Result]:
    """Evaluate runs; write tables, pictures, replays and report.md into <run>/eval/.

    Args:
      folders: run folders; several are also compared, over the tasks that they share
      tasks: DMControl tasks (default: those it was trained on, and the held-out ones)
      held_out: tasks to test on beside those (default: the paper's five)
      trials: trials of every task and seed
      episodes: episodes in a trial (0: as in training)
      sizes: k, ...: show only k outputs of a projection (default: 1/4, 1/2 and 3/4 of the network's)
      projections: make the table of projections (DMControl only)
      deterministic: curves, projections, comparisons and replays show the policy's mode, not samples
      replay: tasks to record as an HTML file each
      tables: make tables and pictures (--no-tables: replays only)
      out: folder of the comparison of several runs (default: eval/ of the first)

    Returns:
      a Result for each folder; [] without tables

    Raises:
      ValueError: one sentence, before anything is evaluated
    """
    if not folders:
        raise ValueError("name at least one run folder, such as runs/NAME")
    if trials < 1 or episodes < 0:
        raise ValueError(f"trials must be at least 1 and episodes at least 0, got {trials} and {episodes}")
    shown = "memory, mode" if deterministic else "memory, sampled"
    agents, results = [load(folder) for folder in folders], []
    for agent in agents:  # refuse before the first minute is spent
        choose_tasks(agent, tasks, held_out)
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
        for task in choose_tasks(agent, replay) if replay else ():
            path = folder / f"replay-{task}.html"
            replay_page.write(record_trial(agent, task, trials, length, shown), path)
            print(f"wrote {path}")
        if not tables:
            continue
        chosen = sizes or sorted({max(1, round(k * agent.obs_size / 4)) for k in (1, 2, 3)})
        result = measure(agent, choose_tasks(agent, tasks, held_out), trials, length, projections and agent.dmc,
                         chosen, shown)
        results.append(result)
        report.write_report(result, shown, folder)
        print(f"\n{report.describe(result)}\nwrote {folder / 'report.md'}")
        if result.projections and len(agents) == 1:
            print(f"\nprojections, {shown}\n{report.projections_table([result])}")
        for group, index in report.groups(result).items():
            if length > 1:
                print(f"\nreturn by episode, tasks {group}\n{report.episodes_table(result, shown, index)}")
            print(f"\ntasks {group}\n{report.reading_table(result, index)}\n\n{report.returns_table(result, index)}")
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
