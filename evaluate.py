"""Tests trained agents on fresh projections and on held-out tasks.

    python evaluate.py runs/NAME                         # writes runs/NAME/eval/report.md
    python evaluate.py runs/s5 runs/lstm                 # also compares the two runs
    python evaluate.py runs/NAME --tasks finger-spin --replay finger-spin --gif finger-spin

A test is a number of whole trials of every task for every seed of the run. Their keys are fixed, so
two tests have the same trials. Each seed has its own trials: seeds are independent samples.
All policies, and the seeds of the same place in other runs, start from the same states under the
same projections, so that their differences are paired.
"""

import functools
import itertools
import math
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import devices
import envs
import experiment
import replay as replay_page
from agent import Agent, load, plain
from report import FAMILIES, POLICIES, Result, reduce_trials, write_comparison, write_report

EVAL_SEED = 230303982  # all randomness of a test
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
        obs_size, action_size = task_sizes(task)
        return obs_size <= agent.trials.obs_size and action_size <= agent.trials.action_dims

    for task in map(plain, tasks):
        if task in agent.tasks:
            continue
        if not agent.dmc:
            raise ValueError(f"{agent.folder} was trained on {', '.join(agent.tasks)}, not from "
                             f"DMControl, and can be tested on that only, not on {task!r}")
        if not envs.is_dmc(task):
            raise ValueError(f"{agent.folder} was trained on DMControl tasks and can be tested on "
                             f"others of these only, such as finger-spin, not on {task!r}")
        if not fits(task):
            obs_size, action_size = task_sizes(task)
            raise ValueError(f"{task} is too large for {agent.folder}: it needs an agent trained "
                             f"with --obs-size {obs_size} and --action-size {action_size} or more")
    held_out = [task for task in envs.HELD_OUT_TASKS if agent.dmc and fits(task)]
    return tuple(dict.fromkeys(map(plain, tasks or (*agent.tasks, *held_out))))


# ---- Rollouts ------------------------------------------------------------------------------------
class Variant(NamedTuple):
    """One way to play a trial."""

    policy: str  # of POLICIES
    family: str  # of projections; what else is in a trial does not depend on it


class TestTrials(envs.Trials):
    """`trials` trials of every task, each in every variant: N = tasks x variants x trials.

    A trial depends on its number and on the name of its task, not on the other tasks. Its variants
    start from the same state, and make their projections from the same normal numbers.

    Args:
      agent: an Agent; DMControl tasks are made under its sizes.
      tasks: names.
      variants: (policy, family) of each variant.
      trials: number of trials of each task.
    """

    def __init__(self, agent: Agent, tasks: tuple[str, ...], variants: list[Variant], trials: int):
        sizes = {"obs_size": agent.trials.obs_size, "action_size": agent.trials.action_dims}
        changes = sizes | {"projection": "gaussian"} if agent.dmc else {}
        self.variants, self.trials = variants, trials
        self.shape = len(tasks), len(variants), trials
        super().__init__(tasks, math.prod(self.shape), **agent.trial_kwargs | changes)
        # environment steps of a trial, (N,); an episode without a limit is followed for 1000
        limits = np.where(self.limits < envs.NO_LIMIT, self.limits, 1000)
        self.trial_steps = limits * self.episodes_per_trial

    def split(self, key):
        """A key for every environment, (N, ...), the same for all variants of a trial."""
        numbers = np.array([zlib.crc32(task.encode()) for task in self.tasks], np.uint32)
        of_task = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        keys = jax.vmap(lambda key: jax.random.split(key, self.trials))(of_task)
        return jnp.repeat(keys[:, None], len(self.variants), 1).reshape(self.num_envs, -1)

    def played_by(self, *policies: str) -> np.ndarray:
        """(N,) bool, whether an environment's variant has one of these policies."""
        found = [variant.policy in policies for variant in self.variants]
        return np.tile(np.repeat(found, self.trials), len(self.tasks))

    def start(self, key):
        """(TrialsState, Observation) at the start of all trials."""
        key, draw_key, _ = jax.random.split(key, 3)
        state, observation = self.begin(super().draw(jax.random.split(draw_key)[0]))
        return state.replace(key=key), observation

    def draw(self, key):
        """Starts of later episodes. None is compiled for trials of one episode, which need none."""
        if self.episodes_per_trial > 1:
            return super().draw(key)
        shapes = jax.eval_shape(super().draw, key)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _matrices(self, key, rows, cols):
        """As envs.Trials makes them, but each variant's of its own family.

        A smaller matrix is the first columns of the largest of as many rows: that compiles sooner.
        """
        families = [variant.family for variant in self.variants]
        if "none" in families:
            return super()._matrices(key, rows, cols)
        shape = max(rows), max(cols)
        normal = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(self.split(key))
        normal = normal.reshape(*self.shape, *shape)[:, 0]
        made = {(r, family): envs.projection_matrix(normal[..., :r, :], family)
                for r in set(rows) for family in set(families)}
        blocks = []
        for i, (r, c) in enumerate(zip(rows, cols)):
            for family in families:
                scale = 1.0 if family == "identity" else math.sqrt(max(cols) / c)
                blocks.append(envs.pad_to(scale * made[r, family][i, ..., :c], shape))
        return jnp.concatenate(blocks)


def trial_keys(place: int) -> jax.Array:
    """Keys (starts, action noise) of the trials of the seed with index `place` in its run."""
    return jax.random.split(jax.random.fold_in(jax.random.PRNGKey(EVAL_SEED), place))


def compile_start(trials: TestTrials):
    """trials.start, compiled."""
    # it runs once: on a CPU, optimising it takes longer than running it
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(trials.start, compiler_options=fast)


def compile_rollout(agent: Agent, trials: TestTrials, deterministic=False, record=False):
    """rollout(params, norm, state, observation, key) -> dict: one trial in each of N environments.

    Args:
      agent: an Agent.
      trials: its TestTrials.
      deterministic: take the most likely action instead of a sample.
      record: also return what a replay draws, of the first task.

    Returns:
      A compiled function. params and norm are those of one seed, state and observation as from
      trials.start. It returns arrays (T, N) over the steps of the longest trial: "lasted", the
      environment steps in this one, 0 after the trial; "reward", 0 after the trial; "episode_end"
      and "diverged"; with `record` also "qpos", "target", "projected" and "action", as they were
      when the agent acted.
    """
    blind, random = trials.played_by("blind"), trials.played_by("random")
    every_step = trials.played_by("reset") | (agent.config.reset == "step")
    steps = math.ceil(max(trials.trial_steps) / min(trials.repeats))

    def hide(norm, observation):
        return observation._replace(**{
            name: jnp.where(blind[:, None], getattr(norm, name).mean, getattr(observation, name))
            for name in HIDDEN_FIELDS})

    def choose(pi, key):
        """Samples (argmax of logits plus Gumbel noise, the same in all variants), or modes."""
        logits = jnp.where(random[:, None, None], 0.0, pi.distribution.logits)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(trials.split(key))
        return jnp.argmax(logits + noise * (random[:, None, None] | (not deterministic)), -1)

    def rollout(params, norm, state, observation, key):
        act = functools.partial(agent.network.apply, params, norm, critic=False)

        def step(carry, t):
            state, observation, hidden, reset, alive = carry
            hidden, pi, _ = act(hidden, hide(norm, observation), reset | every_step)
            action = choose(pi, jax.random.fold_in(key, t))
            result = {}
            if record:
                result |= {"qpos": state.env[0].qpos, "target": state.env[0].target,
                           "projected": observation.projected,
                           "action": envs.action_values(trials.num_bins)[action]}
            state, observation, transition = trials.step(state, action, t)
            lasted = transition.dt * trials.time_unit if trials.irregular else trials.mean_repeat
            result |= {"reward": transition.reward * alive, "lasted": lasted * alive,
                       "episode_end": transition.episode_end & alive,
                       "diverged": transition.diverged & alive}
            alive &= ~transition.trial_end
            return (state, observation, hidden, jnp.zeros_like(alive), alive), result

        yes = jnp.ones(trials.num_envs, bool)
        carry = state, observation, agent.network.zero_state(yes.shape), yes, yes
        return jax.lax.scan(step, carry, jnp.arange(steps))[1]

    return jax.jit(rollout)


def measure(agent: Agent, tasks: tuple, trials: int, deterministic: bool = False) -> Result:
    """Every policy, and the agent under every family, on `trials` trials of each task and seed.

    All variants and trials of a group of tasks are one compiled function. Each core has a group.
    """
    others = [family for family in FAMILIES if agent.dmc and family != agent.family]
    variants = [Variant(policy, agent.family) for policy in POLICIES]
    variants += [Variant("memory", family) for family in others]
    bar = tqdm(total=len(tasks) * len(agent.seeds), unit="task", leave=False,
               desc=f"testing {agent.name}: compiling, about a minute")

    def play(group):
        """(returns (tasks, variants, seeds, trials), curves (..., BINS), environment steps)"""
        these = TestTrials(agent, group, variants, trials)
        start, rollout = compile_start(these), compile_rollout(agent, these, deterministic)
        found = []
        for place in range(len(agent.seeds)):
            start_key, noise_key = trial_keys(place)
            state, observation = start(start_key)
            out = rollout(*agent.of_seed(place), state, observation, noise_key)
            bar.set_description(f"testing {agent.name}: playing")  # it is compiled now, and runs
            out = jax.device_get(out)
            if diverged := out["diverged"].sum():
                bar.write(f"{agent.name}: {diverged} trials diverged, cut short", file=sys.stderr)
            found.append(reduce_trials(out["reward"], out["lasted"], these.episodes_per_trial,
                                       these.trial_steps))
            bar.update(len(group))
        returns, curves = (np.stack([x.reshape(*these.shape, *x.shape[1:]) for x in of_seeds], 2)
                           for of_seeds in zip(*found))
        return returns, curves, these.trial_steps.reshape(these.shape)[:, 0, 0]

    groups = [group for i in range(devices.num_cores()) if (group := tasks[i::devices.num_cores()])]
    with ThreadPoolExecutor(len(groups)) as pool, bar:
        parts = list(pool.map(play, groups))
    order = [list(itertools.chain(*groups)).index(task) for task in tasks]
    returns, curves, steps = (np.concatenate(x)[order] for x in zip(*parts))
    returns, curves = np.moveaxis(returns, 1, 0), np.moveaxis(curves, 1, 0)
    by_family = {agent.family: returns[0]} | dict(zip(others, returns[len(POLICIES):]))
    return Result(agent, tasks, dict(zip(POLICIES, returns)), dict(zip(POLICIES, curves)),
                  {family: by_family[family] for family in FAMILIES if agent.dmc},
                  tuple(steps.tolist()))


def record_trial(agent: Agent, task: str, trials: int, deterministic: bool = False) -> dict:
    """What replay.py draws: the first seed's trial of median return, with and without memory."""
    sides = {"memory": "with memory", "reset": "hidden state reset at every step"}
    these = TestTrials(agent, (task,), [Variant(policy, agent.family) for policy in sides], trials)
    start_key, noise_key = trial_keys(0)
    state, observation = compile_start(these)(start_key)
    rollout = compile_rollout(agent, these, deterministic, record=True)
    out = jax.device_get(rollout(*agent.of_seed(0), state, observation, noise_key))
    order = np.argsort(out["reward"][:, :trials].sum(0), kind="stable")
    trial = int(order[(trials - 1) // 2])
    obs_matrix, act_matrix = (
        np.asarray(x[trial], np.float64) for x in (state.obs_matrix, state.act_matrix))
    recorded = []
    for v, name in enumerate(sides.values()):
        frames = np.count_nonzero(out["lasted"][:, v * trials + trial])
        mine = {key: np.asarray(x[:frames, v * trials + trial], float) for key, x in out.items()
                if x is not None}
        recorded.append({
            "name": name, "qpos": mine["qpos"], "target": mine.get("target"),
            "reward": mine["reward"], "observed": mine["projected"], "action": mine["action"],
            "control": np.clip(mine["action"] @ act_matrix.T, -1, 1),
            "ends": np.flatnonzero(mine["episode_end"]).tolist()})
    return dict(
        task=task, run=agent.name, trainer=agent.trainer, seed=agent.seeds[0], trial=trial,
        trials=trials, family=agent.trials.projection, action_repeat=these.mean_repeat,
        actions="most likely" if deterministic else "sampled", held_out=task not in agent.tasks,
        obs_matrix=obs_matrix, act_matrix=act_matrix, sides=recorded)


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
      setting: NAME=NUMBER of a sweep (default: the best setting)
      seed: test one seed (default: all)
      out: folder for everything that is written; with several runs, each has its own folder in it

    Returns:
      a Result for each run
    """
    if not folders or not 0 < trials <= 100_000:
        raise ValueError("expected run folders and a number of trials in 1 ... 100000, got "
                         f"{len(folders)} folders and {trials}")
    agents = [load(folder, parse_setting(setting), seed) for folder in folders]
    for k, agent in enumerate(agents):  # names tell runs apart
        same = [other.name for other in agents[:k]].count(agent.name)
        agent.name += f" ({same + 1})" * (same > 0)
    chosen = [choose_tasks(agent, tasks) for agent in agents]
    chosen = tuple(task for task in chosen[0] if all(task in others for others in chosen))
    if not chosen:
        raise ValueError("these runs have no task in common to be compared on")
    for agent in agents:
        choose_tasks(agent, (*replay, *gif))
        if (replay or gif) and not agent.dmc:
            raise ValueError(f"replays draw DMControl tasks only, not {', '.join(agent.tasks)}")
    places = [agent.folder / "eval" for agent in agents]
    if out:
        places = [out / agent.name if len(agents) > 1 else out for agent in agents]
    common = out or places[0]
    for folder in (*places, common):
        make_folder(folder)  # before the work
    results = []
    for agent, folder in zip(agents, places):
        for write, names in ((replay_page.write_html, replay), (replay_page.write_gif, gif)):
            for task in dict.fromkeys(map(plain, names)):
                path = folder / f"replay-{task}.{write.__name__.removeprefix('write_')}"
                write(record_trial(agent, task, trials, deterministic), path)
                print(f"wrote {path}")
        results.append(measure(agent, chosen, trials, deterministic))
        print(f"\n{write_report(results[-1], folder)}")
    if len(results) > 1:
        print(f"\n{write_comparison(results, common)}")
    return results


def parse_setting(texts: tuple[str, ...]) -> dict[str, float]:
    """("lr=1e-3",) -> {"lr": 0.001}."""
    pairs = [text.partition("=") for text in texts]
    try:
        return {name: float(value) for name, _, value in pairs}
    except ValueError:
        raise ValueError(f"--setting {' '.join(texts)}: expected NAME=NUMBER, such as lr=1e-3"
                         ) from None


def make_folder(folder: Path) -> None:
    """Makes a folder in which files can be written, or raises ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write into {folder} ({error.strerror}): choose an --out that can "
                         "be written") from None


def report(folder: Path | str) -> Result:
    """Tests a run on all tasks, as `python evaluate.py FOLDER` does."""
    return evaluate((Path(folder),))[0]


def main() -> None:
    experiment.use_cache()
    try:
        tyro.cli(evaluate, description=__doc__)
    except KeyboardInterrupt:
        devices.stop(130)
    except (ValueError, OSError) as error:  # an OSError, such as a full disk, is no bug either
        devices.stop(2, f"error: {error}")


if __name__ == "__main__":
    main()
