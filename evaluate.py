"""Tests trained agents on fresh projections and on held-out tasks.

    python evaluate.py runs/NAME                         # writes runs/NAME/eval/report.md
    python evaluate.py runs/s5 runs/lstm                 # also compares the two runs
    python evaluate.py runs/NAME --tasks finger-spin --replay finger-spin --gif finger-spin

A test is a number of whole trials of every task for every seed of the run. Their keys are fixed, so
two tests have the same trials. Each seed has its own trials: seeds are independent samples.
All policies, and the seeds of the same place in other runs, start from the same states under the
same projections, so that their differences are paired.
"""

import csv
import functools
import itertools
import math
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.stats import trim_mean
from tqdm import tqdm

import devices
import envs
import experiment
import replay as replay_page
from agent import Agent, load, plain

EVAL_SEED = 230303982  # all randomness of a test
BINS = 20  # equal parts of a trial, in curves
POLICIES = {
    "memory": "the agent",
    "blind": "the agent without observations: each is replaced by its running mean; hidden state, "
             "previous action, previous reward and episode starts remain",
    "reset": "the agent whose hidden state is reset before every step",
    "random": "uniformly random actions"}
FAMILIES = ("gaussian", "orthogonal", "rademacher", "identity")  # the last: no projection
HIDDEN_FIELDS = ("projected", "change", "sysid")  # what a blind agent does not observe


# ---- Tasks ---------------------------------------------------------------------------------------
@functools.cache
def task_sizes(task: str) -> tuple[int, int]:
    """(size of an observation, size of an action) of a DMControl task. ValueError if unknown."""
    env, params = envs.make(task)
    return env.observation_space(params).shape[0], env.action_space(params).shape[0]


def choose_tasks(agent: Agent, tasks: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Names of the tasks to test on, each once.

    Args:
      agent: an Agent.
      tasks: names. By default the tasks trained on, and for DMControl those of envs.HELD_OUT_TASKS
        that are not too large for the network.

    Raises:
      ValueError: a task is unknown, or this agent cannot play it.
    """
    def fits(task):
        largest = agent.trials.obs_size, agent.trials.action_dims
        return all(map(int.__le__, task_sizes(task), largest))

    for task in map(plain, tasks):
        if task not in agent.tasks and not agent.dmc:
            raise ValueError(f"{agent.folder} was trained on {', '.join(agent.tasks)}, not from "
                             f"DMControl, and can be tested on that only, not on {task!r}")
        if task not in agent.tasks and not fits(task):
            raise ValueError(
                "{} is too large for {}: it needs an agent trained with --obs-size {} and "
                "--action-size {} or more".format(task, agent.folder, *task_sizes(task)))
    held_out = [task for task in envs.HELD_OUT_TASKS if agent.dmc and fits(task)]
    return tuple(dict.fromkeys(map(plain, tasks or (*agent.tasks, *held_out))))


# ---- Rollouts ------------------------------------------------------------------------------------
# V variants of a trial differ in policy and projection. Only what differs has the axis of variants.
STATE_AXES = envs.TrialsState(env=0, obs_matrix=0, act_matrix=0, spare=None, projected=0, sysid=0,
                              counters=0, key=None)


class TestTrials(envs.Trials):
    """`trials` trials of every task. They depend on the task's name, not on the other tasks.

    Args:
      agent: an Agent; DMControl tasks are made under its sizes with gaussian projections.
      tasks: names.
      trials: number of trials of each task.
    """

    def __init__(self, agent: Agent, tasks: tuple[str, ...], trials: int):
        sizes = {"obs_size": agent.trials.obs_size, "action_size": agent.trials.action_dims}
        changes = sizes | {"projection": "gaussian"} if agent.dmc else {}
        super().__init__(tasks, trials * len(tasks), **agent.trial_kwargs | changes)
        self.trials = trials

    def split(self, key):
        """A key for every environment, (N, ...)."""
        numbers = np.array([zlib.crc32(task.encode()) for task in self.tasks], np.uint32)
        of_task = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        keys = jax.vmap(lambda key: jax.random.split(key, self.trials))(of_task)
        return keys.reshape(self.num_envs, -1)

    def steps(self, task: int) -> int:
        """Steps of a trial of a task; an episode without a limit is followed for 1000 steps."""
        limit = int(self.limits[task * self.trials])
        return (limit if limit < 2**30 else 1000) * self.episodes_per_trial

    def under(self, state, observation, family):
        """(state, observation) at the start of trials, with gaussian projections made into others.

        All families have the same physical starts, and are made from the same normal numbers.
        """
        if family in ("gaussian", "none"):
            return state, observation

        def convert(matrix, rows, cols):
            blocks, sizes, made = self.blocks(matrix), list(zip(rows, cols)), {}
            for r, c in dict.fromkeys(sizes):  # all of one size together: that compiles sooner
                same = [i for i, size in enumerate(sizes) if size == (r, c)]
                normal = jnp.stack([blocks[i][:, :r, :c] for i in same]) * c**0.5
                made.update(zip(same, envs.projection_matrix(normal, family)))
            return jnp.concatenate([envs.pad_to(made[i], matrix.shape[1:]) for i in sorted(made)])

        obs_matrix = convert(state.obs_matrix, [self.obs_size] * len(self.tasks), self.obs_dims)
        act_matrix = convert(state.act_matrix, self.act_dims, [self.action_dims] * len(self.tasks))
        raw = [self.flat_obs(i, jax.vmap(env.get_obs)(state.env[i]))
               for i, env in enumerate(self.envs)]
        linear = envs.matvec(obs_matrix, jnp.concatenate(raw))
        state = state.replace(obs_matrix=obs_matrix, act_matrix=act_matrix,
                              projected=envs.symlog(linear), sysid=self.start_sysid(linear))
        return state, observation._replace(projected=envs.symlog(linear))


class FirstEpisodes(TestTrials):
    """Trials of one episode: they end before a spare start is needed, so none is compiled."""

    def draw(self, key):
        shapes = jax.eval_shape(super().draw, key)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def trial_keys(place: int) -> jax.Array:
    """Keys (starts, action noise) of the trials of the seed with index `place` in its run."""
    return jax.random.split(jax.random.fold_in(jax.random.PRNGKey(EVAL_SEED), place))


def make_start(trials: TestTrials, families: tuple[str, ...]):
    """start(key) -> (TrialsState, Observation) of N trials, each in V = len(families) variants."""
    def start(key):
        state, observation = trials.reset(key, stagger=False)
        own = state.replace(spare=None, key=None)
        made = {name: trials.under(own, observation, name) for name in dict.fromkeys(families)}
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *(made[family] for family in families))
        return stacked[0].replace(spare=state.spare, key=state.key), stacked[1]

    # it runs once: on a CPU, optimising it takes longer than running it
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(start, compiler_options=fast)


def make_rollout(agent, tasks, trials, policies, deterministic=False, record=False):
    """rollout(params, norm, state, observation, key) -> dict: one trial of every environment.

    Args:
      agent, tasks, trials: as of TestTrials; N = trials * len(tasks).
      policies: names, one for each of V variants.
      deterministic: take the most likely action instead of a sample.
      record: also return what a replay draws, of the first task.

    Returns:
      A compiled function. params and norm are those of one seed, state and observation as from
      make_start. It returns arrays (T, V, N) over the steps of the longest trial: "alive" (the trial
      has not ended), "reward" (0 where not alive), "episode_end" and "diverged"; with `record` also
      "qpos", "target", "projected" and "action", as they were when the agent acted.
    """
    blind, every_step, random = (np.array([[policy == name] for policy in policies])
                                 for name in ("blind", "reset", "random"))
    every_step |= agent.config.reset == "step"
    single = agent.trials.episodes_per_trial == 1
    trials = (FirstEpisodes if single else TestTrials)(agent, tasks, trials)
    step_all = jax.vmap(trials.step, (STATE_AXES, 0, None), (STATE_AXES, 0, 0))

    def hide(norm, observation):
        return observation._replace(**{
            name: jnp.where(blind[..., None], getattr(norm, name).mean, getattr(observation, name))
            for name in HIDDEN_FIELDS})

    def choose(pi, key):
        """Samples (argmax of logits plus Gumbel noise, the same in all variants), or modes."""
        logits = pi.distribution.logits.reshape(len(policies), trials.num_envs, -1, trials.num_bins)
        logits = jnp.where(random[..., None, None], 0.0, logits)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[2:]))(trials.split(key))
        return jnp.argmax(logits + noise * (random[..., None, None] | (not deterministic)), -1)

    def rollout(params, norm, state, observation, key):
        act = functools.partial(agent.network.apply, params, norm, critic=False)
        V, N = observation.context.shape[:2]

        def step(carry, t):
            state, observation, hidden, reset, alive = carry
            inputs = jax.tree.map(lambda x: x.reshape(V * N, *x.shape[2:]),
                                  (hide(norm, observation), reset | every_step))
            hidden, pi, _ = act(hidden, *inputs)
            action = choose(pi, jax.random.fold_in(key, t))
            result = {"alive": alive}
            if record:
                result |= {"qpos": state.env[0].qpos, "target": state.env[0].target,
                           "projected": observation.projected,
                           "action": envs.action_values(trials.num_bins)[action]}
            state, observation, transition = step_all(state, action, t)
            result |= {"reward": transition.reward * alive, "diverged": transition.diverged & alive,
                       "episode_end": transition.episode_end & alive}
            alive &= ~transition.trial_end
            return (state, observation, hidden, jnp.zeros_like(alive), alive), result

        yes = jnp.ones((V, N), bool)
        carry = state, observation, agent.network.zero_state((V * N,)), yes, yes
        return jax.lax.scan(step, carry, jnp.arange(max(map(trials.steps, range(len(tasks))))))[1]

    return jax.jit(rollout)


class Result(NamedTuple):
    """A test of one run. Arrays begin with the axes (tasks, seeds, trials)."""

    agent: Agent
    tasks: tuple
    returns: dict  # {policy: (tasks, seeds, trials)} return of an episode, mean over the trial's
    curves: dict  # {policy: (..., BINS)} reward of an environment step by time; NaN after the end
    projections: dict  # {family: (tasks, seeds, trials)} the agent's return; {} without DMControl
    steps: tuple  # per task, environment steps of a trial


def reduce_trials(reward, alive, episodes: int, repeat: int) -> tuple[np.ndarray, np.ndarray]:
    """(returns (V, N), curves (V, N, BINS)) of trials, float64.

    Args:
      reward, alive: (T, V, N), see make_rollout.
      episodes: episodes of a trial.
      repeat: environment steps in a step of the rollout.
    """
    bin_of_step = np.arange(len(reward)) * BINS // len(reward)
    totals, counts = (np.stack([x[bin_of_step == b].sum(0, dtype=float) for b in range(BINS)], -1)
                      for x in (reward, alive))
    with np.errstate(invalid="ignore"):
        return totals.sum(-1) / episodes, totals / counts / repeat


def measure(agent: Agent, tasks: tuple, trials: int, deterministic: bool = False) -> Result:
    """Every policy, and the agent under every family, on `trials` trials of each task and seed.

    The trials of a group of tasks run in one compiled function. A group for each core compiles.
    """
    others = [family for family in FAMILIES if agent.dmc and family != agent.family]
    policies = (*POLICIES, *["memory"] * len(others))
    families = (*[agent.family] * len(POLICIES), *others)
    bar = tqdm(desc=f"testing {agent.name}", total=len(tasks) * len(agent.seeds), leave=False)

    def play(group):
        """[(returns (V, seeds, trials), curves, environment steps of a trial) of each task]"""
        these = TestTrials(agent, group, trials)
        start, rollout = make_start(these, families), make_rollout(
            agent, group, trials, policies, deterministic)
        found = [[] for _ in group]
        for place in range(len(agent.seeds)):
            start_key, noise_key = trial_keys(place)
            weights = jax.tree.map(lambda x: x[place], (agent.params, agent.norm))
            out = jax.device_get(rollout(*weights, *start(start_key), noise_key))
            if diverged := out["diverged"].sum():
                print(f"{agent.name}: {diverged} trials diverged, cut short", file=sys.stderr)
            for i, results in enumerate(found):
                mine = np.s_[:these.steps(i), :, i * trials:(i + 1) * trials]
                results.append(reduce_trials(out["reward"][mine], out["alive"][mine],
                                             these.episodes_per_trial, these.mean_repeat))
            bar.update(len(group))
        return [(*(np.stack(x, 1) for x in zip(*results)), these.steps(i) * these.mean_repeat)
                for i, results in enumerate(found)]

    groups = [group for i in range(devices.num_cores()) if (group := tasks[i::devices.num_cores()])]
    with ThreadPoolExecutor(len(groups)) as pool, bar:
        played = dict(zip(itertools.chain(*groups), itertools.chain(*pool.map(play, groups))))
    returns, curves, steps = zip(*(played[task] for task in tasks))
    returns, curves = np.stack(returns, 1), np.stack(curves, 1)
    by_family = {agent.family: returns[0]} | dict(zip(others, returns[len(POLICIES):]))
    return Result(agent, tasks, dict(zip(POLICIES, returns)), dict(zip(POLICIES, curves)),
                  {family: by_family[family] for family in FAMILIES if agent.dmc}, steps)


def record_trial(agent: Agent, task: str, trials: int, deterministic: bool = False) -> dict:
    """What replay.py draws: the first seed's trial of median return, with and without memory."""
    policies = "memory", "reset"
    these, (start_key, noise_key) = TestTrials(agent, (task,), trials), trial_keys(0)
    start = make_start(these, (agent.family,) * 2)(start_key)
    rollout = make_rollout(agent, (task,), trials, policies, deterministic, record=True)
    weights = jax.tree.map(lambda x: x[0], (agent.params, agent.norm))
    out = jax.device_get(rollout(*weights, *start, noise_key))
    trial = int(np.argsort(out["reward"].sum(0)[0], kind="stable")[(trials - 1) // 2])
    obs_matrix, act_matrix = (
        np.asarray(x[0, trial], np.float64) for x in (start[0].obs_matrix, start[0].act_matrix))
    sides = []
    for v, name in enumerate(("with memory", "hidden state reset at every step")):
        frames = out["alive"][:, v, trial].sum()
        mine = {key: np.asarray(x[:frames, v, trial], float) for key, x in out.items()
                if x is not None}
        sides.append({
            "name": name, "qpos": mine["qpos"], "target": mine.get("target"),
            "reward": mine["reward"], "observed": mine["projected"], "action": mine["action"],
            "control": np.clip(mine["action"] @ act_matrix.T, -1, 1),
            "ends": np.flatnonzero(mine["episode_end"]).tolist()})
    return dict(
        task=task, run=agent.name, trainer=agent.trainer, seed=agent.seeds[0], trial=trial,
        trials=trials, family=agent.trials.projection, action_repeat=these.mean_repeat,
        actions="most likely" if deterministic else "sampled", held_out=task not in agent.tasks,
        obs_matrix=obs_matrix, act_matrix=act_matrix, sides=sides)


# ---- Statistics ----------------------------------------------------------------------------------
# The unit is the seed, one training run. Its network plays all tasks, so each seed contributes one
# number, whatever is asked: the mean of a task or of several, or a difference in the same trials.
# These numbers are independent, so Student's t gives a 95 % interval of their mean, for three seeds
# as for ten. One seed says nothing about other training runs: its interval is over its trials.
class Estimate(NamedTuple):
    """A mean and its 95 % interval, (...) each, over "seeds" or over the "trials" of one seed."""

    mean: Any
    low: Any
    high: Any
    over: str

    def __str__(self):
        return "-" if np.isnan(self.low) else f"{number(self.low)} to {number(self.high)}"


def estimate(x: np.ndarray) -> Estimate:
    """Estimate of the mean of x (tasks, seeds, trials, ...), without NaNs.

    Each seed counts by its mean over trials and tasks; each trial of one seed by that over tasks.
    """
    if x.shape[1] == 1:
        return Estimate(*experiment.t_interval(x[:, 0].mean(0)), "trials")
    return Estimate(*experiment.t_interval(experiment.nanmean(x, 2).mean(0)), "seeds")


def compare(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Estimate of the mean of x - y (tasks, seeds, trials), in the trials that both have."""
    seeds = min(x.shape[1], y.shape[1])
    return estimate(x[:, :seeds] - y[:, :seeds])


# ---- Tables --------------------------------------------------------------------------------------
def groups(result: Result) -> dict[str, list[int]]:
    """{"trained on" and "held out": indices of tasks}, those that are not empty."""
    trained = [i for i, task in enumerate(result.tasks) if task in result.agent.tasks]
    others = [i for i in range(len(result.tasks)) if i not in trained]
    return {name: i for name, i in (("trained on", trained), ("held out", others)) if i}


def rows_of(result: Result, index: list[int]) -> list[tuple[str, list[int]]]:
    """(label, indices of tasks) of the rows of a table: tasks, then their mean."""
    mean = [(f"mean of {len(index)}", index)] if len(index) > 1 else []
    return [(result.tasks[i], [i]) for i in index] + mean


def grid(header: list, rows: list[list]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    cells.insert(1, ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])])
    lines = [[row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x: float) -> str:
    """With as many digits as tell apart tasks that pay up to 1000 and tasks that pay up to 1."""
    return "-" if np.isnan(x) else f"{x:.{0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2}f}"


def returns_table(result: Result, index: list[int]) -> str:
    """A row for each task: the agent's return, its interval, the other policies."""
    rows = [(label, [estimate(x[which]) for x in result.returns.values()])
            for label, which in rows_of(result, index)]
    return grid(["return", "memory", "95 %", *list(POLICIES)[1:]], [
        [label, number(memory.mean), memory, *(number(e.mean) for e in others)]
        for label, (memory, *others) in rows])


def projections_table(results: list[Result]) -> str:
    """Mean returns; a row for each run and group of tasks, a column for each family tested on."""
    return grid(["run", "tasks", *FAMILIES], [
        [r.agent.name, group,
         *(number(r.projections[family][index].mean()) for family in FAMILIES)]
        for r in results for group, index in groups(r).items()])


def headline(result: Result) -> str:
    """The three numbers that matter: return on each group of tasks, and what blindness costs."""
    found, memory = groups(result), result.returns["memory"]
    (group, index), seeds, trials = next(iter(found.items())), *memory.shape[1:]
    rows = [(f"return, {group}", index, memory[index]) for group, index in found.items()]
    rows.append((f"cost of hiding observations, {group}", index,
                 (memory - result.returns["blind"])[index]))
    over = f"{seeds} seeds" if seeds > 1 else f"{trials} trials of one seed"
    return grid([result.agent.name, "tasks", "mean", f"95 % over {over}"], [
        [label, len(index), number(x.mean()), estimate(x)] for label, index, x in rows])


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})


def write_tables(result: Result, folder: Path) -> None:
    """Writes returns.csv (statistics), trials.csv (every trial) and curves.csv."""
    run, own = {"run": result.agent.name}, result.agent.family
    series = [(policy, own, x) for policy, x in result.returns.items()]
    series += [("memory", family, x) for family, x in result.projections.items() if family != own]
    trials = [run | {"task": result.tasks[i], "policy": policy, "projection": family,
                     "seed": result.agent.seeds[s], "trial": k, "return": float(value)}
              for policy, family, x in series for (i, s, k), value in np.ndenumerate(x)]
    series.append(("memory - blind", own, result.returns["memory"] - result.returns["blind"]))
    returns = [run | {"tasks": group, "task": label, "policy": policy, "projection": family}
               | estimate(x[which])._asdict() | {"iqm": trim_mean(x[which], 0.25, axis=None),
                                                 "seeds": x.shape[1], "trials": x.shape[2]}
               for group, index in groups(result).items() for label, which in rows_of(result, index)
               for policy, family, x in series]
    curves = [run | {"task": task, "policy": policy, "from_step": math.ceil(b * steps / BINS)}
              | estimate(x[[i], ..., b])._asdict()
              for i, (task, steps) in enumerate(zip(result.tasks, result.steps))
              for policy, x in result.curves.items() for b in range(BINS)]
    for name, rows in (("returns", returns), ("trials", trials), ("curves", curves)):
        write_csv(folder / f"{name}.csv", rows)


# ---- Figures: the colours of Okabe and Ito, with different markers and dashes --------------------
STYLES = (("#0072B2", "o", "-"), ("#009E73", "D", "-."), ("#D55E00", "v", "--"),
          ("#000000", "x", ":"), ("#E69F00", "s", "-"), ("#CC79A7", "^", "--"))


def plot_returns(result: Result, series: dict[str, np.ndarray], path: Path) -> None:
    """Returns by task with intervals, a panel for each group; series as Result.returns."""
    found = groups(result)
    height = max(len(index) for index in found.values()) * (0.15 + 0.09 * len(series))
    figure, axes = experiment.panels(len(found), 1, 7, 1.2 + height)
    for axis, (group, index) in zip(axes[:, 0], found.items()):
        rows = rows_of(result, index)
        for k, (name, x) in enumerate(series.items()):
            y = np.arange(len(rows)) + (k - (len(series) - 1) / 2) * 0.8 / len(series)
            mean, _, high, _ = zip(*(estimate(x[which]) for _, which in rows))
            colour, marker, _ = STYLES[k % len(STYLES)]
            axis.errorbar(mean, y, xerr=np.nan_to_num(np.subtract(high, mean)), fmt=marker,
                          color=colour, ms=4, lw=1, capsize=1.5, label=name)
        axis.set(yticks=range(len(rows)), yticklabels=[label for label, _ in rows],
                 ylim=(len(rows) - 0.5, -0.5), title=f"tasks {group}")
    axes[-1, 0].set_xlabel("return of an episode (95 % over seeds, or trials of the only seed)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path)


def plot_curves(result: Result, series: dict[str, np.ndarray], path: Path) -> None:
    """Reward against time in the trial, a panel for each task; series as Result.curves."""
    columns = min(4, len(result.tasks))
    width = max(2.6, 5.2 / columns)  # room for the legend and the label of the axis
    figure, axes = experiment.panels(math.ceil(len(result.tasks) / columns), columns, width, 2.1)
    for axis in axes.flat[len(result.tasks):]:
        axis.remove()
    for i, (axis, task) in enumerate(zip(axes.flat, result.tasks)):
        x = (np.arange(BINS) + 0.5) * result.steps[i] / BINS
        for (name, data), (colour, marker, line) in zip(series.items(), itertools.cycle(STYLES)):
            e = estimate(data[[i]])
            axis.plot(x, e.mean, line, color=colour, marker=marker, ms=2.5, lw=1.2, label=name)
            axis.fill_between(x, e.low, e.high, color=colour, alpha=0.18, lw=0)
        axis.set_title(task + ("" if task in result.agent.tasks else " (held out)"), fontsize=9)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel("environment steps since the trial began (95 % as in the tables)", fontsize=9)
    figure.supylabel("reward of a step", fontsize=9)
    figure.savefig(path)


# ---- Reports -------------------------------------------------------------------------------------
NOTES = f"""A return is the sum of the rewards of an episode, or the mean over a trial's episodes.
Policies: {"; ".join(f"*{name}*, {text}" for name, text in POLICIES.items())}.
95 %: t interval of the mean over seeds (training runs), or over the trials of the only seed; other
seeds may lie far outside. The CSV files hold all intervals, interquartile means and every trial."""


def describe(result: Result) -> str:
    agent, (_, seeds, trials) = result.agent, result.returns["memory"].shape
    return (f"{agent.name}: {agent.trainer}, projection {agent.trials.projection}, "
            f"{agent.steps:,} steps of training on\n{', '.join(agent.tasks)}.\n"
            f"Tested: {seeds} seed{'s' * (seeds > 1)} x {trials} trials of each task.")


def write_report(result: Result, folder: Path) -> str:
    """Writes tables and figures of one run, and report.md around them. Returns what to print."""
    write_tables(result, folder)
    plot_returns(result, result.returns, folder / "returns.png")
    plot_curves(result, result.curves, folder / "curves.png")
    tables = [f"Tasks {group}\n\n{returns_table(result, i)}" for group, i in groups(result).items()]
    figures = ["![returns](returns.png)", "![curves](curves.png)"]
    if result.projections:
        plot_returns(result, result.projections, folder / "projections.png")
        tables.append(f"Returns under other projections\n\n{projections_table([result])}")
        figures.append("![projections](projections.png)")
    figures += [f"[{path.name}]({path.name})" for path in sorted(folder.glob("replay-*.*"))]
    parts = [f"# {result.agent.name}", headline(result), describe(result), *tables, *figures, NOTES]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    printed = [describe(result), *tables, f"more: {folder / 'report.md'}", headline(result)]
    return "\n\n".join(printed)


def write_comparison(results: list[Result], folder: Path) -> str:
    """Writes comparison.csv, figures and comparison.md of runs. Returns what to print."""
    rows = [({"run": a.agent.name, "other": b.agent.name, "tasks": group},
             compare(a.returns["memory"][index], b.returns["memory"][index]))
            for group, index in groups(results[0]).items()
            for a, b in itertools.combinations(results, 2)]
    write_csv(folder / "comparison.csv", [row | e._asdict() for row, e in rows])
    plot_returns(results[0], {r.agent.name: r.returns["memory"] for r in results},
                 folder / "comparison.png")
    plot_curves(results[0], {r.agent.name: r.curves["memory"] for r in results},
                folder / "comparison_curves.png")
    parts = ["Differences of returns in the same trials\n\n" + grid(
        ["run - other", "tasks", "difference", "95 %", "over"],
        [["{run} - {other}".format(**row), row["tasks"], number(e.mean), e, e.over]
         for row, e in rows])]
    if all(r.projections for r in results):
        parts.append(f"Returns under other projections\n\n{projections_table(results)}")
    figures = ["![returns](comparison.png)", "![curves](comparison_curves.png)"]
    text = ["# Comparison", *map(describe, results), *parts, *figures, NOTES]
    (folder / "comparison.md").write_text("\n\n".join(text) + "\n")
    return "\n\n".join([*parts, f"more: {folder / 'comparison.md'}"])


# ---- Command line --------------------------------------------------------------------------------
def evaluate(folders: tyro.conf.Positional[tuple[Path, ...]], tasks: tuple[str, ...] = (),
             trials: int = 32, deterministic: bool = False, replay: tuple[str, ...] = (),
             gif: tuple[str, ...] = (), setting: tuple[str, ...] = (), seed: int | None = None,
             out: Path | None = None) -> list[Result]:
    """Tests runs and writes report.md with tables, figures and replays into RUN/eval/.

    Args:
      folders: run folders or agent.msgpack files; several are compared, on the tasks common to all
      tasks: tasks (default: those trained on and, for DMControl, five held-out ones)
      trials: trials of each task and seed
      deterministic: take the most likely action instead of a sample
      replay: tasks to record as a page that plays in a browser
      gif: tasks to record as a GIF
      setting: NAME=VALUE of a sweep (default: the best setting)
      seed: test one seed (default: all)
      out: folder of the report, or of the comparison of several runs (default: eval/ in the run)

    Returns:
      a Result for each run
    """
    if not folders or trials < 1:
        raise ValueError(f"expected run folders and trials >= 1, got {len(folders)} and {trials}")
    agents, results = [load(folder, envs.parse_kwargs(setting), seed) for folder in folders], []
    chosen = [choose_tasks(agent, tasks) for agent in agents]
    chosen = tuple(task for task in chosen[0] if all(task in others for others in chosen))
    if not chosen:
        raise ValueError("these runs have no task in common to be compared on")
    for agent in agents:
        choose_tasks(agent, (*replay, *gif))
        if (replay or gif) and not agent.dmc:
            raise ValueError(f"replays draw DMControl tasks only, not {', '.join(agent.tasks)}")
    for agent in agents:
        folder = out if out and len(agents) == 1 else agent.folder / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        for write, names in ((replay_page.write_html, replay), (replay_page.write_gif, gif)):
            for task in map(plain, names):
                path = folder / f"replay-{task}.{write.__name__.removeprefix('write_')}"
                write(record_trial(agent, task, trials, deterministic), path)
                print(f"wrote {path}")
        results.append(measure(agent, chosen, trials, deterministic))
        print(f"\n{write_report(results[-1], folder)}")
    if len(results) > 1:
        folder = out or agents[0].folder / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"\n{write_comparison(results, folder)}")
    return results


def report(folder: Path | str) -> Result:
    """Tests a run on all tasks, as `python evaluate.py FOLDER` does."""
    return evaluate((Path(folder),))[0]


def main() -> None:
    jax.config.update("jax_compilation_cache_dir", os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax-icrl")))
    try:
        tyro.cli(evaluate, description=__doc__)
    except ValueError as error:
        devices.stop(2, f"error: {error}")


if __name__ == "__main__":
    main()
