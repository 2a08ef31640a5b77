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
import os
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook need not be installed

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

import devices
import envs
import experiment
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
class TestTrials(envs.Trials):
    """`trials` trials of every task: N = tasks x trials environments.

    A trial depends on its number and on the name of its task, not on the other tasks. Under every
    family of projections it starts from the same state, with matrices made of the same numbers.

    Args:
      agent: an Agent; DMControl tasks are made under its sizes.
      tasks: names.
      trials: number of trials of each task.
    """

    def __init__(self, agent: Agent, tasks: tuple[str, ...], trials: int):
        sizes = {"obs_size": agent.trials.obs_size, "action_size": agent.trials.action_dims}
        changes = sizes | {"projection": "gaussian"} if agent.dmc else {}
        self.shape = len(tasks), trials
        self.families = FAMILIES if agent.dmc else (agent.family,)
        super().__init__(tasks, math.prod(self.shape), **agent.trial_kwargs | changes)
        # environment steps of a trial, (N,); an episode without a limit is followed for 1000
        limits = np.where(self.limits < envs.NO_LIMIT, self.limits, 1000)
        self.trial_steps = limits * self.episodes_per_trial

    def split(self, key):
        """A key for every environment, (N, ...)."""
        numbers = np.array([zlib.crc32(task.encode()) for task in self.tasks], np.uint32)
        of_task = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        keys = jax.vmap(lambda key: jax.random.split(key, self.shape[1]))(of_task)
        return keys.reshape(self.num_envs, -1)

    def start(self, key, family):
        """(TrialsState, Observation) at the start of all trials; family: index in `families`."""
        key, draw_key, _ = jax.random.split(key, 3)
        state, observation = self.begin(self.first(jax.random.split(draw_key)[0], family))
        return state.replace(key=key), observation

    def first(self, key, family):
        """A Start for every environment."""
        start = super().draw(key)
        if len(self.families) == 1:
            return start
        return start._replace(obs_matrix=start.obs_matrix[family],
                              act_matrix=start.act_matrix[family])

    def draw(self, key):
        """Starts of later episodes. None is compiled for trials of one episode, which need none."""
        if self.episodes_per_trial > 1:
            return self.first(key, 0)
        shapes = jax.eval_shape(self.first, key, 0)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def _matrices(self, key, rows, cols):
        """As envs.Trials makes them; those of several families, (families, N, ...).

        A matrix is the first columns of a larger one, whose size is the agent's: it does not depend
        on the other tasks, and few sizes compile sooner than many.
        """
        if len(self.families) == 1:
            return super()._matrices(key, rows, cols)
        size = max(*rows, *cols)
        normal = jax.vmap(lambda key: jax.random.normal(key, (size, size), jnp.float32))(
            self.split(key))
        made = []
        for family in self.families:
            larger = {r: self.blocks(envs.projection_matrix(normal[:, :r], family))
                      for r in set(rows)}
            scales = [1.0 if family == "identity" else math.sqrt(size / c) for c in cols]
            made.append(jnp.concatenate([
                envs.pad_to(scales[i] * larger[r][i][..., :c], (max(rows), max(cols)))
                for i, (r, c) in enumerate(zip(rows, cols))]))
        return jnp.stack(made)


def trial_keys(place: int) -> jax.Array:
    """Keys (starts, action noise) of the trials of the seed with index `place` in its run."""
    return jax.random.split(jax.random.fold_in(jax.random.PRNGKey(EVAL_SEED), place))


def make_rollout(agent: Agent, trials: TestTrials, deterministic=False, record=False):
    """rollout(params, norm, policy, state, observation, key) -> dict: one trial of N environments.

    Args:
      agent: an Agent.
      trials: its TestTrials.
      deterministic: take the most likely action instead of a sample.
      record: also return what a replay draws, of the first task.

    Returns:
      A pure function. params and norm are those of one seed, policy is an index in POLICIES, state
      and observation are as from trials.start. It returns arrays (T, N) over the steps of the
      longest trial: "lasted", the environment steps in this one, 0 after the trial; "reward", 0
      after the trial; "episode_end" and "diverged"; with `record` also "qpos", "target",
      "projected" and "action", as they were when the agent acted.
    """
    steps = math.ceil(max(trials.trial_steps) / min(trials.repeats))

    def rollout(params, norm, policy, state, observation, key):
        act = functools.partial(agent.network.apply, params, norm, critic=False)
        blind, reset_always, random = (
            policy == list(POLICIES).index(name) for name in ("blind", "reset", "random"))
        every_step = reset_always | (agent.config.reset == "step")

        def hide(observation):
            return observation._replace(**{
                name: jnp.where(blind, getattr(norm, name).mean, getattr(observation, name))
                for name in HIDDEN_FIELDS})

        def choose(pi, key):
            """Samples (argmax of logits plus Gumbel noise, the same for all policies), or modes."""
            logits = jnp.where(random, 0.0, pi.distribution.logits)
            keys = trials.split(key)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
            return jnp.argmax(logits + noise * (random | (not deterministic)), -1)

        def step(carry, t):
            state, observation, hidden, reset, alive = carry
            hidden, pi, _ = act(hidden, hide(observation), reset | every_step)
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

    return rollout


def make_play(agent: Agent, trials: TestTrials, deterministic=False, record=False):
    """play(place, policy, family) -> (TrialsState at the start, what a rollout returns).

    It plays all trials by the seed with index `place` and compiles two programs, for any policy and
    family: at once, before this function returns.
    """
    rollout = jax.jit(make_rollout(agent, trials, deterministic, record))
    # a start takes no time: on a CPU, optimising it takes longer than running it
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    start = jax.jit(trials.start, compiler_options=fast)
    key, number = trial_keys(0)[0], np.int32(0)
    with ThreadPoolExecutor(1) as pool:
        traced = start.trace(key, number)
        starting = pool.submit(lambda: traced.lower().compile())
        rollout = rollout.lower(*agent.of_seed(0), number, *traced.out_info, key).compile()
        start = starting.result()

    def play(place: int, policy: str, family: str):
        start_key, noise_key = trial_keys(place)
        state, observation = start(start_key, np.int32(trials.families.index(family)))
        policy = np.int32(list(POLICIES).index(policy))
        return state, jax.device_get(
            rollout(*agent.of_seed(place), policy, state, observation, noise_key))

    return play


def measure(agent: Agent, tasks: tuple, trials: int, deterministic: bool = False) -> Result:
    """Every policy, and the agent under every family, on `trials` trials of each task and seed.

    One compiled program plays all trials of all tasks. On a CPU each core plays one at a time.
    """
    these = TestTrials(agent, tasks, trials)
    variants = [(policy, agent.family) for policy in POLICIES]
    variants += [("memory", family) for family in these.families if family != agent.family]
    seeds = range(len(agent.seeds))
    with tqdm(total=len(variants) * len(seeds), unit="test", leave=False) as bar:
        bar.set_description(f"{agent.name}: compiling, about a minute")
        play = make_play(agent, these, deterministic)
        bar.set_description(f"{agent.name}: playing {len(tasks) * trials} trials a test")

        def test(place, variant):
            _, out = play(place, *variant)
            if diverged := out["diverged"].sum():
                bar.write(f"{agent.name}: {diverged} trials diverged, cut short", file=sys.stderr)
            bar.update()
            found = reduce_trials(out["reward"], out["lasted"], these.episodes_per_trial,
                                  these.trial_steps)
            return [x.reshape(*these.shape, *x.shape[1:]) for x in found]

        cores = devices.num_cores() if jax.default_backend() == "cpu" else 1
        with ThreadPoolExecutor(cores) as pool:
            found = list(pool.map(test, *zip(*itertools.product(seeds, variants))))
    returns, curves = ({variant: np.stack(x[i::len(variants)], 1)
                        for i, variant in enumerate(variants)} for x in zip(*found))
    return Result(
        agent, tasks, {policy: returns[policy, agent.family] for policy in POLICIES},
        {policy: curves[policy, agent.family] for policy in POLICIES},
        {family: returns["memory", family] for family in these.families if agent.dmc},
        tuple(these.trial_steps[::trials].tolist()))


def record_trial(agent: Agent, task: str, trials: int, deterministic: bool = False) -> dict:
    """What replay.py draws: the first seed's trial of median return, with and without memory."""
    these = TestTrials(agent, (task,), trials)
    play = make_play(agent, these, deterministic, record=True)
    played = {name: play(0, policy, agent.family) for name, policy in (
        ("with memory", "memory"), ("hidden state reset at every step", "reset"))}
    state, out = played["with memory"]
    trial = int(np.argsort(out["reward"].sum(0), kind="stable")[(trials - 1) // 2])
    obs_matrix, act_matrix = (
        np.asarray(x[trial], np.float64) for x in (state.obs_matrix, state.act_matrix))
    sides = []
    for name, (_, out) in played.items():
        frames = np.count_nonzero(out["lasted"][:, trial])
        mine = {key: np.asarray(x[:frames, trial], float) for key, x in out.items()
                if x is not None}
        sides.append({
            "name": name, "qpos": mine["qpos"], "target": mine.get("target"),
            "reward": mine["reward"], "observed": mine["projected"], "action": mine["action"],
            "control": np.clip(mine["action"] @ act_matrix.T, -1, 1),
            "ends": np.flatnonzero(mine["episode_end"]).tolist()})
    return dict(
        task=task, run=agent.name, trainer=agent.trainer, seed=agent.seeds[0], trial=trial,
        trials=trials, family=agent.trials.projection, action_repeat=float(these.mean_repeat),
        actions="most likely" if deterministic else "sampled", held_out=task not in agent.tasks,
        obs_matrix=obs_matrix, act_matrix=act_matrix, sides=sides)


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
        taken = {other.name for other in agents[:k]}
        names = [agent.name, *(f"{agent.name} ({number})" for number in range(2, k + 2))]
        agent.name = next(name for name in names if name not in taken)
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
        for kind, names in (("html", replay), ("gif", gif)):
            for task in dict.fromkeys(map(plain, names)):
                write_replay(record_trial(agent, task, trials, deterministic),
                             folder / f"replay-{task}.{kind}")
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


def write_replay(trial: dict, path: Path) -> None:
    """Writes a recorded trial as a page or a GIF."""
    import replay  # needs mujoco

    (replay.write_gif if path.suffix == ".gif" else replay.write_html)(trial, path)
    print(f"wrote {path}")


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
        devices.find_devices()
        tyro.cli(evaluate, description=__doc__)
    except KeyboardInterrupt:
        devices.stop(130)
    except (ValueError, OSError) as error:  # an OSError, such as a full disk, is no bug either
        devices.stop(2, f"error: {error}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not experiment.out_of_memory(error):
            raise
        devices.stop(2, "error: out of memory; lower --trials, or choose one --seed")


if __name__ == "__main__":
    main()
