"""The figures of Lu et al. 2023 (arXiv 2303.03982) again: runs what is missing, draws ours over the paper's.

    python benchmarks/reproduce.py memory              # return on MemoryChain by length: S5, LSTM, self-attention
    python benchmarks/reproduce.py popgym              # five POPGym tasks: S5, GRU, no memory
    python benchmarks/reproduce.py metacart            # projected StatelessCartPole, 16 episodes in a trial
    python benchmarks/reproduce.py dmcontrol runs/A runs/B    # draws finished or running runs on the six tasks
    python benchmarks/reproduce.py popgym --only RepeatPrevious --jobs 1
    python benchmarks/reproduce.py popgym --draw       # run nothing

Runs live in runs/paper/, one process per core. Kill it at any moment: the same command goes on where it was, and a
figure shows what there is and says how far it has come. A run folder made with other flags is refused. Writes
results/paper/*.csv, *.png and a table, README.md; the paper's numbers are in results/paper/reference_*.csv. Deviations
from its settings are given where they are chosen.
"""

import argparse
import csv
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common import RESULTS, ROOT, plot_into  # first: it finds the project

import envs
import evaluate
import experiment
import memory_chain

PAPER = RESULTS / "paper"
RUNS = ROOT / "runs" / "paper"
COLOURS = {"S5": "C0", "S5, never reset": "C4", "LSTM": "C1", "GRU": "C1", "self-attention": "C2", "none": "C7",
           "blind": "C3", "S5, plain": "C9", "LSTM, plain": "C8", "GRU, plain": "C8"}

# The paper: Adam 5e-5, 30 epochs, width 256, 4 layers. At the 4,170 steps/s that results/train_reference.csv has for
# 4 epochs of that on two cores, 30 would take seven hours for 15 million steps. Here: width 64, the others with as many
# parameters as S5, 4 epochs at a larger step, and this project's defaults where the paper is silent. Environments,
# steps, losses, discounts and the absence of annealing and of an entropy bonus are the paper's. No agent is shown the
# change of its observation: in these tasks that is the velocity which they hide.
PPO = ("--num-envs 64 --num-steps 1024 --num-minibatches 8 --update-epochs 4 --lr 1e-3 --no-anneal-lr "
       "--no-anneal-entropy --gamma 0.99 --gae-lambda 1.0 --clip-eps 0.2 --ent-coef 0 --vf-coef 1.0 "
       "--max-grad-norm 0.5 --log-every 1 --no-observe-change").split()
TRAINERS = {"S5": ["train_s5.py"], "GRU": ["train_lstm.py", "--cell", "gru"],
            "none": ["train_s5.py", "--memory", "none"], "S5, never reset": ["train_s5.py", "--memory", "unreset"],
            "S5, plain": ["train_s5.py", "--no-identify"],
            "GRU, plain": ["train_lstm.py", "--cell", "gru", "--no-identify"]}
POPGYM = ("StatelessCartPoleHard", "NoisyStatelessCartPoleHard", "StatelessPendulumHard", "NoisyStatelessPendulumHard",
          "RepeatPreviousHard")
CHAIN = {"S5": "s5", "LSTM": "lstm", "self-attention": "transformer"}
SEEDS = range(4)
EPISODES, SHOWN, TRIALS = 16, 32, 64  # of a trial: trained on, evaluated on; and trials that are evaluated
BUDGETS = (5, 10, 20, 50, 100, 300, 500)  # million frames


# ---- Runs --------------------------------------------------------------------------------------------------
class Run(NamedTuple):
    """Something to be run: a run folder of a trainer, or a table that a script writes in one go."""

    path: Path
    command: list  # script and flags
    steps: int  # environment steps of a run folder; 0 for a table
    memory: str
    seed: int = 0
    task: str = ""

    def reached(self):
        """Environment steps of the run folder so far. ValueError: it was made with other flags than these."""
        if not (self.path / "config.json").exists():
            return 0
        trainer = importlib.import_module(Path(self.command[0]).stem)
        config, options = experiment.read_run(self.path, trainer.Config)
        flags = [*self.command[1:], "--preset", options.preset]
        if experiment.parse_flags(trainer.Config, args=flags)[0] != config:
            raise ValueError(f"{self.path} was made with other flags than {' '.join(flags)}: move it away")
        rows = experiment.read_metrics(self.path) if (self.path / "metrics.csv").exists() else []
        return int(rows[-1]["steps"]) if rows else 0

    def todo(self):
        """The command that starts or continues it, None if it is complete."""
        if not self.steps:
            return None if self.path.exists() else self.command
        if (self.path / "config.json").exists():
            return [self.command[0], "--resume", str(self.path)] if self.reached() < self.steps else None
        return [*self.command, "--runs-dir", str(self.path.parent), "--name", self.path.name]


def trainer_runs(figure, steps, arms, tasks):
    """Run folders of every task, arm (memory: its flags) and seed, seeds outermost: a part of it is a whole figure.

    Each takes one device, whatever --jobs is, for a run goes on with as many as it began with.
    """
    return [Run(RUNS / figure / f"{task}-{memory.replace(', ', '-').replace(' ', '-')}-{seed}",
                [*TRAINERS[memory], "--env", f"popgym:{task}", *flags, *PPO, "--total-timesteps", str(steps), "--seed",
                 str(seed), "--devices", "1", "--no-evaluate", "--no-tensorboard"], steps, memory, seed, task)
            for seed in SEEDS for task in tasks for memory, flags in arms.items()]


def runs_of(figure):
    if figure == "memory":
        return [Run(RUNS / figure / f"{name}-{length}.csv",
                    ["benchmarks/memory_chain.py", "--trainers", trainer, "--lengths", str(length)], 0, name)
                for length in (2**k for k in range(2, 12)) for name, trainer in CHAIN.items()]
    if figure == "popgym":
        # RepeatPrevious delays 64 suits: with 64 states a layer the return was -0.40 after 2 million steps, with the
        # paper's 256 it was -0.02. The GRU's units are such that its memory has as many parameters.
        s5 = ["--layers", "2", "--state-size", "256"]
        return trainer_runs(figure, 15_000_000, {"S5": s5, "GRU": ["--hidden-size", "129"], "none": s5}, POPGYM)
    if figure == "metacart":
        # The paper's released code projects by orthogonal 4 x 2 matrices and starts every episode of a trial in the
        # same state. Here the start is fresh in every episode and the two actions may be swapped: a harder task. A
        # fifth of its 50 million steps. What sysid.py shows contains velocities; "plain" goes without it.
        flags = ["--projection", "orthogonal", "--obs-size", "4", "--episodes-per-trial", str(EPISODES),
                 "--no-privileged-critic"]
        return trainer_runs(figure, 10_000_000, dict.fromkeys(TRAINERS, flags), ("StatelessCartPoleEasy",))
    return []


def launch(runs, jobs):
    """Run what is not complete, `jobs` processes at a time, each on a core of its own. Returns how many failed."""
    waiting = [run for run in runs if run.todo()]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are complete", flush=True)
    cores = queue.Queue()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    for i in range(jobs):
        cores.put(usable[i % len(usable)] if usable and jobs > 1 else None)
    running = set()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no run outlives this process

    def work(run):
        core = cores.get()
        log = run.path.with_suffix(".log") if run.steps == 0 else run.path.parent / f"{run.path.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = run.todo()
        if run.steps == 0:  # a table appears when it is whole
            command = [*command, "--out", str(run.path.with_suffix(".partial"))]
        print(f"starting {run.path.name}" + ("" if core is None else f" on core {core}"), flush=True)
        with log.open("a") as output:
            process = subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=ROOT,
                                       stdout=output, stderr=output)
        running.add(process)
        if core is not None:  # before it has started any threads, which inherit it
            os.sched_setaffinity(process.pid, {core})
        failed = process.wait()
        running.remove(process)
        if not failed and run.steps == 0:
            run.path.with_suffix(".partial").rename(run.path)
        cores.put(core)
        print(f"{'FAILED, see ' + str(log) if failed else 'finished'} {run.path.name}", flush=True)
        return failed != 0

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return sum(pool.map(work, waiting))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            sys.exit(130)


# ---- Tables ------------------------------------------------------------------------------------------------
def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row(memory, at, paper, ours, frames):
    """A row of a figure's table: `ours` (seeds,) at `at` (a task, a length, ...) when the slowest has seen `frames`."""
    found = memory_chain.mean_interval(np.asarray(ours, float))
    return {"memory": memory, "at": at, "paper": paper, "ours": found.pop("mean"), **found,
            "million_frames": frames / 1e6}


def write_table(figure, rows):
    """results/paper/<figure>.csv, and README.md from the tables of all figures."""
    with (PAPER / f"{figure}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows])
    text = ["# The paper's figures\n", "Numbers of Lu et al. 2023 (arXiv 2303.03982), read off its plots and tables "
            "(`reference_*.csv`), beside those of this project. Written by", "`benchmarks/reproduce.py`; each "
            "interval is a 95 % t interval over seeds.\n"]
    for name in ("memory", "popgym", "metacart", "dmcontrol"):
        if (PAPER / f"{name}.csv").exists():
            text += [f"\n![{name}]({name}.png)\n",
                     "| figure | memory | at | paper | ours | worst | seeds | million frames |",
                     "|---|---|---|---:|---:|---:|---:|---:|"]
            for r in read_csv(PAPER / f"{name}.csv"):
                interval = "" if r["low"] == "nan" else f" [{float(r['low']):.3g}, {float(r['high']):.3g}]"
                text.append(f"| {name} | {r['memory']} | {r['at']} | {r['paper']} | {float(r['ours']):.3g}{interval} | "
                            f"{float(r['worst']):.3g} | {r['seeds']} | {float(r['million_frames']):.3g} |")
    (PAPER / "README.md").write_text("\n".join(text) + "\n")


def group(runs):
    """{(memory, task): run folders with at least one logged update}."""
    groups = {}
    for run in runs:
        if run.reached():
            groups.setdefault((run.memory, run.task), []).append(run)
    return groups


def label(memory, runs):
    """What a line is, with how far its slowest seed has come."""
    return f"{memory}, seeds: {len(runs)}, {min(run.reached() for run in runs) / 1e6:.3g}M"


# ---- Figures -----------------------------------------------------------------------------------------------
def draw_memory(runs):
    """Lengths whose tables are gone or on another machine stay as results/paper/memory.csv has them.

    Delete that file when the settings change: it does not know them.
    """
    reference = [{"trainer": r["memory"], "length": int(r["length"]), "return": float(r["return"])}
                 for r in read_csv(PAPER / "reference_memory.csv")]
    theirs = {(r["length"], r["trainer"]): r["return"] for r in reference}
    columns = ("ours", "low", "high", "worst", "seeds", "million_frames", "us_per_step", "megabytes")
    table = PAPER / "memory.csv"
    found = {f"{r['memory']}-{r['at']}": r for r in (read_csv(table) if table.exists() else [])}
    for run in runs:
        for r in read_csv(run.path) if run.path.exists() else []:
            found[run.path.stem] = r | {"at": r["length"], "ours": r["mean"], "million_frames": float(r["steps"]) / 1e6}
    rows = [{"memory": run.memory, "at": int(r["at"]), "paper": theirs[int(r["at"]), run.memory]}
            | {k: float(r[k]) for k in columns} for run in runs if (r := found.get(run.path.stem))]
    memory_chain.draw([r | {"trainer": r["memory"], "length": r["at"], "mean": r["ours"]} for r in rows],
                      PAPER / "memory.png", reference)
    return rows


def best_return(run):
    """POPGym's score: the best mean return of the episodes that end in one update."""
    return np.nanmax([r[f"return/popgym:{run.task}"] for r in experiment.read_metrics(run.path)])


def popgym_scores(runs):
    """{(memory, task): [(best return, environment steps) of every seed]}, kept in results/paper/popgym_runs.csv.

    So runs count whose folders are gone or on another machine, as long as no folder has come further. Delete the file
    when their settings change: it does not know them.
    """
    stored, scores = PAPER / "popgym_runs.csv", {}
    for r in read_csv(stored) if stored.exists() else []:
        scores[r["memory"], r["task"], int(r["seed"])] = float(r["best_return"]), int(r["steps"])
    for run in runs:
        key, reached = (run.memory, run.task, run.seed), run.reached()
        if reached and reached >= scores.get(key, (0, 0))[1]:
            scores[key] = best_return(run), reached
    with stored.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("memory", "task", "seed", "best_return", "steps"))
        writer.writerows((*key, f"{best:.4g}", steps) for key, (best, steps) in sorted(scores.items()))
    found = {}
    for (memory, task, _), score in scores.items():
        found.setdefault((memory, task), []).append(score)
    return found


def draw_popgym(runs):
    theirs = {(r["memory"], r["task"]): float(r["return"]) for r in read_csv(PAPER / "reference_popgym.csv")}
    rows = [row(memory, task, theirs[memory, task], best, min(steps))
            for (memory, task), (best, steps) in ((k, zip(*v)) for k, v in popgym_scores(runs).items())]

    def panel(axis, *_):
        for i, memory in enumerate(("S5", "GRU", "none")):
            mine = [r for r in rows if r["memory"] == memory]
            x = np.array([POPGYM.index(r["at"]) for r in mine]) + (i - 1) * 0.28
            ours, low, high = (np.array([r[k] for r in mine]) for k in ("ours", "low", "high"))
            axis.bar(np.arange(len(POPGYM)) + (i - 1) * 0.28 - 0.06, [theirs[memory, t] for t in POPGYM], 0.12,
                     color=COLOURS[memory], alpha=0.35, label=f"{memory}, paper")
            reached = min((r["million_frames"] for r in mine), default=0)
            axis.bar(x + 0.06, ours, 0.12, yerr=np.nan_to_num([ours - low, high - ours]), color=COLOURS[memory],
                     capsize=2, label=f"{memory}, {reached:.3g}M or more")
        names = [task.replace("Stateless", "\nStateless\n").replace("Hard", "") for task in POPGYM]
        axis.set_xticks(range(len(POPGYM)), names, fontsize=6)
        axis.set_ylabel("best mean return, hard")
        axis.legend(fontsize=6, loc="lower left")

    plot_into(PAPER / "popgym.png", 1, 1, panel)
    return rows


def returns_by_episode(run):
    """Mean return of episodes 1 ... SHOWN of a trial, of the newest checkpoint: (SHOWN,) and its environment steps.

    Of the second trial of TRIALS environments, so that the agent that is never reset has something to remember.
    """
    stored = run.path / "by_episode.json"
    if stored.exists():
        found = json.loads(stored.read_text())
        if found["steps"] == run.reached():
            return np.array(found["returns"]), found["steps"]
    agent = evaluate.load(run.path)
    config, trainer = agent.config, agent.trainer
    lanes = trainer.make_lanes(config, num_lanes=TRIALS, stagger=False, episodes_per_trial=SHOWN)
    network = trainer.make_train(config).network
    params = jax.tree.map(lambda x: x[0], agent.params)
    key = jax.random.PRNGKey(run.seed)

    def play():
        prepared = network.apply(params, method="prepare")
        state, inputs = lanes.reset(key)
        memory = trainer.make_memory(config, jnp.float32).zero_state((TRIALS,))

        def step(carry, t):
            state, inputs, memory, reset, trial, totals = carry
            memory, pi, _ = network.apply(params, prepared, memory, inputs, reset, method="step")
            action = pi.sample(seed=jax.random.fold_in(key, t))
            episode = state.episode
            state, inputs, out = lanes.step(state, action, t)
            totals = totals.at[jnp.arange(TRIALS), episode].add(jnp.where(trial == 1, out.reward, 0.0))
            reset = (out.trial_end & (config.memory != "unreset")) | (config.memory == "none")
            return (state, inputs, memory, reset, trial + out.trial_end, totals), None

        carry = (state, inputs, memory, jnp.ones(TRIALS, bool), jnp.zeros(TRIALS, int), jnp.zeros((TRIALS, SHOWN)))
        return jax.lax.scan(step, carry, jnp.arange(2 * lanes.trial_length))[0][-1]

    returns = np.asarray(jax.jit(play)()).mean(0)
    stored.write_text(json.dumps({"steps": agent.steps, "returns": returns.tolist()}))
    return returns, agent.steps


def draw_metacart(runs):
    reference = read_csv(PAPER / "reference_metacart.csv")
    rows, ours, curves = [], {}, {}
    for (memory, task), members in group(runs).items():
        found, steps = zip(*[returns_by_episode(run) for run in members])
        ours[memory] = np.array(found), members
        theirs = {r["episode"]: float(r["return"]) for r in reference if r["memory"] == memory.removesuffix(", plain")}
        at = {f"episode {e}": (theirs.get(str(e), ""), ours[memory][0][:, e - 1]) for e in (1, 2, 4, 8, 16, 20, 26, 32)}
        late = ours[memory][0][:, 12:16].mean(1)
        at["episodes 13 to 16"] = (theirs["13"] + theirs["16"]) / 2, late
        logs = [experiment.read_metrics(run.path) for run in members]
        curves[memory] = [np.array([(r["steps"], EPISODES * r[f"return/popgym:{task}"]) for r in log]) for log in logs]
        best = [np.nanmax(curve[:, 1]) for curve in curves[memory]]
        at["best sum of 16"] = theirs["sum of 16"], best
        rows += [row(memory, k, *v, min(steps)) for k, v in at.items()]

    def panel(axis, _, column):
        for memory, (found, members) in ours.items():
            colour = COLOURS[memory]
            theirs = {r["episode"]: float(r["return"]) for r in reference if r["memory"] == memory}  # none of "plain"
            best = theirs.pop("sum of 16", None)
            if column == 0:
                axis.plot(np.arange(SHOWN) + 1, found.mean(0), color=colour, label=label(memory, members))
                axis.fill_between(np.arange(SHOWN) + 1, found.min(0), found.max(0), color=colour, alpha=0.2, lw=0)
                axis.plot([int(episode) for episode in theirs], list(theirs.values()), ":", color=colour)
            else:
                for curve in curves[memory]:
                    axis.plot(curve[:, 0] / 1e6, curve[:, 1], color=colour, lw=0.7)
                if best is not None:
                    axis.axhline(best, ls=":", color=colour)
        if column == 0:
            axis.axvline(EPISODES + 0.5, color="grey", lw=0.7)
            axis.set(xlabel="episode of the trial", ylabel="return (dotted: paper)", ylim=(0, None))
            axis.legend(fontsize=6, loc="center right", bbox_to_anchor=(1, 0.6))
        else:
            axis.set(xlabel="million frames", ylabel="sum of 16 (dotted: paper's best)", ylim=(0, None))

    plot_into(PAPER / "metacart.png", 1, 2, panel)
    return rows


def read_six(folder):
    """(memory, million frames planned), seeds' rows of metrics.csv as arrays; of a run on the six tasks.

    The plan belongs to it because the learning rate follows it. Raises ValueError if it is a run on other tasks.
    """
    config, _ = experiment.read_run(folder)
    tasks = [task.removeprefix("dmc:") for task in config.env]
    if set(tasks) != set(envs.TRAIN_TASKS):
        raise ValueError(f"{folder} is a run on {', '.join(tasks)}, not on the six training tasks")
    memory = {"train_s5": "S5", "train_lstm": "LSTM", "train_transformer": "self-attention"}[type(config).__module__]
    memory += "" if config.identify else ", plain"
    memory = "blind" if config.observe == "none" else "none" if config.memory == "none" else memory
    seeds = {}
    for r in experiment.read_metrics(folder):
        values = [r[f"return/{name}"] for name in config.env]
        seeds.setdefault(r["seed"], []).append([r["steps"], *[values[tasks.index(t)] for t in envs.TRAIN_TASKS]])
    return (memory, config.total_timesteps / 1e6), [np.array(rows) for rows in seeds.values()]


def near(rows, steps):
    """Mean returns (tasks,) over the twentieth of training before `steps`; NaN if it is not there yet."""
    chosen = rows[(rows[:, 0] > 0.95 * steps) & (rows[:, 0] <= steps)]
    if steps > rows[-1, 0] or not len(chosen):
        return np.full(rows.shape[1] - 1, np.nan)
    return experiment.nanmean(chosen[:, 1:], 0)


def draw_dmcontrol(folders):
    series = {}
    for folder in folders:
        plan, seeds = read_six(folder)
        series.setdefault(plan, []).extend(seeds)
    reference = {}
    for r in read_csv(PAPER / "reference_dmcontrol.csv"):
        reference.setdefault((r["task"], r["memory"]), []).append((float(r["million_frames"]), float(r["return"])))
    names, longest = ("mean of the six", *envs.TRAIN_TASKS), max(planned for _, planned in series)
    rows = []
    for (memory, planned), seeds in series.items():
        for i, name in enumerate(names):
            theirs = np.array(reference.get((name, memory), [(np.nan, np.nan)]))
            for budget in BUDGETS:
                found = np.array([near(s, 1e6 * budget) for s in seeds])
                found = found.mean(1) if i == 0 else found[:, i - 1]
                found = found[np.isfinite(found)]
                if len(found):
                    within = theirs[0, 0] <= budget <= theirs[-1, 0]
                    paper = float(np.interp(budget, *theirs.T)) if within else ""
                    rows.append(row(memory, f"{name}, {budget} of {planned:g} million", paper, found, 1e6 * budget))

    def panel(axis, line, column):
        i = 4 * line + column
        if i >= len(names):
            axis.axis("off")
            return
        for (memory, planned), seeds in series.items():
            colour = COLOURS[memory]
            end = max(s[-1, 0] for s in seeds)
            x = np.geomspace(min(s[0, 0] for s in seeds) / 0.95, end, 80)
            y = np.array([[near(s, steps) for steps in x] for s in seeds])  # (seeds, 80, tasks)
            y = y.mean(2) if i == 0 else y[..., i - 1]
            axis.plot(x / 1e6, experiment.nanmean(y, 0), color=colour, alpha=1 if planned == longest else 0.5,
                      label=f"{memory}, seeds: {len(seeds)}, {end / 1e6:.3g} of {planned:g}M")
            axis.fill_between(x / 1e6, np.fmin.reduce(y, 0), np.fmax.reduce(y, 0), color=colour, alpha=0.2, lw=0)
            if (names[i], memory) in reference:
                axis.plot(*zip(*reference[names[i], memory]), ":", color=colour)
        axis.set(xscale="log", xlabel="million frames, of all tasks", title=names[i], ylabel="return (dotted: paper)")
        if i == 0:
            axis.legend(fontsize=7)

    plot_into(PAPER / "dmcontrol.png", 2, 4, panel)
    return rows


FIGURES = {"memory": draw_memory, "popgym": draw_popgym, "metacart": draw_metacart}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "dmcontrol"])
    parser.add_argument("folders", nargs="*", type=Path, help="run folders (dmcontrol only)")
    parser.add_argument("--jobs", type=int, default=experiment.num_cores(), help="processes (default: one per core)")
    parser.add_argument("--only", nargs="+", default=[""], help="only runs whose name contains one of these")
    parser.add_argument("--draw", action="store_true", help="run nothing, draw what there is")
    options = parser.parse_args()
    if (options.figure == "dmcontrol") != bool(options.folders):
        parser.error("dmcontrol draws the run folders that it is given; the other figures have their own")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    runs = runs_of(options.figure)
    chosen = [run for run in runs if any(part in run.path.name for part in options.only)]
    if runs and not chosen:
        parser.error(f"--only {' '.join(options.only)} matches none of {', '.join(run.path.name for run in runs)}")
    try:
        failed = launch(chosen, options.jobs) if chosen and not options.draw else 0
        rows = draw_dmcontrol(options.folders) if options.folders else FIGURES[options.figure](runs)
    except ValueError as error:
        parser.error(str(error))
    if not rows:
        parser.error("nothing to draw yet")
    PAPER.mkdir(parents=True, exist_ok=True)
    write_table(options.figure, rows)
    print(f"wrote {PAPER / options.figure}.csv and .png")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
