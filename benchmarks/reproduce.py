"""The figures of Lu et al. (arXiv 2303.03982) again: runs what is missing, draws ours over the paper's.

    python benchmarks/reproduce.py memory              # return on MemoryChain by length: S5, LSTM, self-attention
    python benchmarks/reproduce.py popgym              # five POPGym tasks: S5, GRU, no memory
    python benchmarks/reproduce.py metacart            # projected StatelessCartPole, 16 episodes in a trial
    python benchmarks/reproduce.py dmcontrol runs/A runs/B --device "one H200"    # runs on the six tasks
    python benchmarks/reproduce.py popgym --only RepeatPrevious --jobs 1
    python benchmarks/reproduce.py popgym --draw       # run nothing, draw results/paper/popgym.csv

Runs are kept in runs/paper/, a process per core. After a kill the same command goes on. A run folder that was
made with other flags is refused. A row of results/paper/FIGURE.csv is replaced by runs of at least as many
seeds and steps; FIGURE.png is drawn from that table. Delete the table when the settings change. The paper's
numbers are in results/paper/reference_*.csv. Deviations from its settings are given where they are chosen.
"""

import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common import (  # first: it finds the project
    COLOURS,
    MILLIONS,
    OURS,
    PAPER_STYLE,
    RESULTS,
    WORDS,
    each,
    log_axis,
    make_parser,
    mean_interval,
    numbers,
    plot_into,
    read_csv,
    run_main,
    write_csv,
)

import envs
import experiment
import logs
import memory_chain
import train_s5
from agent import load
from runs import RUNS, Run, Script, add_jobs_flag, launch, read_rows

PAPER = RESULTS / "paper"

# The paper: Adam 5e-5, 30 epochs, width 256, 4 layers. At the 4,170 steps/s that results/train_reference.csv
# has for 4 epochs of that on two cores, 30 would take seven hours for 15 million steps. Here: width 64, the
# others with as many parameters as S5, 4 epochs at a larger step, and this project's defaults where the paper
# is silent. Environments, steps, losses, discounts and the absence of annealing and of an entropy bonus are
# the paper's. These tasks hide velocities, which changes of observations contain. Only two kinds of
# agents observe changes: vectors, and agents with sysid, whose features are computed from changes.
PPO = ["--num-envs", "64", "--num-steps", "1024", "--num-minibatches", "8", "--update-epochs", "4",
       "--lr", "1e-3", "--anneal", "none", "--gamma", "0.99", "--gae-lambda", "1.0", "--clip-eps", "0.2",
       "--ent-coef", "0", "--vf-coef", "1.0", "--log-every", "1",
       "--no-observe-change"]
S5 = ["--memory", "s5"]
VARIANTS = {
    "S5": ("train_s5", [*S5, "--sysid"]),
    "GRU": ("train_lstm", ["--cell", "gru", "--sysid"]),
    "none": ("train_s5", [*S5, "--reset", "step"]),
    "S5, never reset": ("train_s5", [*S5, "--reset", "never"]),
    "S5, plain": ("train_s5", S5),
    "GRU, plain": ("train_lstm", ["--cell", "gru"]),
    "vectors, plain": ("train_s5", ["--memory", "vector", "--observe-change", "--lr", "3e-4"]),  # 1e-3: see NOTES.md
}
POPGYM = ("StatelessCartPoleHard", "NoisyStatelessCartPoleHard", "StatelessPendulumHard",
          "NoisyStatelessPendulumHard", "RepeatPreviousHard")
CHAIN = {"S5": "s5", "LSTM": "lstm", "self-attention": "transformer"}
SEEDS = range(4)
EPISODES, SHOWN, TRIALS = 16, 32, 64  # of a trial: trained on, evaluated on; and trials that are evaluated
BUDGETS = (5, 10, 20, 50, 100, 300, 500)  # million environment steps
SIX = ("mean of the six", *envs.TRAIN_TASKS)
METACART = {  # variant: words, colour, marker
    "S5": ("S5, sysid", "tab:blue", "o"), "S5, plain": ("S5, no sysid", "tab:cyan", "o"),
    "GRU": ("GRU, sysid", "tab:red", "s"), "GRU, plain": ("GRU, no sysid", "tab:pink", "s"),
    "S5, never reset": ("S5, no sysid, never reset", "tab:purple", "o"),
    "none": ("no memory, no sysid", "tab:gray", "^"), "vectors, plain": ("vectors, no sysid", "magenta", "D")}
DMCONTROL = {"S5": "S5, sysid", "S5, plain": "S5", "LSTM": "LSTM, sysid", "LSTM, plain": "LSTM",
             "vectors": "vectors, sysid", "vectors, plain": "vectors", "none": "no memory",
             "none, sysid": "no memory, sysid", "blind": "observations hidden"}


# ---- Runs ----------------------------------------------------------------------------------------
def trainer_runs(figure, steps, variants, tasks):
    """Returns runs of every task, variant {name: flags} and seed, seeds outermost: each seed is a figure."""
    runs = []
    for seed in SEEDS:
        for task in tasks:
            for name, flags in variants.items():
                trainer, own = VARIANTS[name]
                path = RUNS / "paper" / figure / f"{task}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                flags = [*PPO, "--env", f"popgym:{task}", *flags, *own]
                runs.append(Run(path, trainer, flags, steps, seed, name, task))
    return runs


def runs_of(figure):
    if figure == "memory":
        return [Script(RUNS / "paper" / figure / f"{name}-{length}.csv",
                       ["benchmarks/memory_chain.py", "--memories", memory, "--lengths", str(length)], name)
                for length in (2**k for k in range(2, 12)) for name, memory in CHAIN.items()]
    if figure == "popgym":
        # RepeatPrevious delays 64 suits: with 64 states a layer the return was -0.40 after 2 million steps,
        # with the paper's 256 it was -0.02. The GRU is as wide as its memory needs for as many parameters.
        s5 = ["--layers", "2", "--state-size", "256"]
        return trainer_runs(figure, 15_000_000, {"S5": s5, "GRU": ["--width", "101"], "none": s5}, POPGYM)
    if figure == "metacart":
        # The paper's released code projects by orthogonal 4 x 2 matrices and starts every episode of a trial
        # in the same state. Here the start is new in every episode and the two actions may be swapped: a
        # harder task. A fifth of its 50 million steps.
        flags = ["--projection", "orthogonal", "--obs-size", "4", "--episodes-per-trial", str(EPISODES),
                 "--no-privileged-critic"]
        return trainer_runs(figure, 10_000_000, dict.fromkeys(VARIANTS, flags), ("StatelessCartPoleEasy",))
    return []


# ---- Tables --------------------------------------------------------------------------------------
def row(memory, at, paper, ours, frames):
    """Returns a row of a figure's table: `ours` (seeds,) at `at` after `frames` steps of the slowest seed."""
    columns = mean_interval(ours)
    return {"memory": memory, "at": at, "paper": paper, "ours": columns.pop("mean"), **columns,
            "million_frames": frames / 1e6, "each": each(ours)}


def write_table(figure, rows):
    """Writes `rows` into results/paper/FIGURE.csv, unless a stored row has more seeds or steps. Returns all."""
    path = PAPER / f"{figure}.csv"
    stored = read_csv(path) if path.exists() else []
    table = {(r["memory"], r["at"]): r | {"each": r.get("each", "")} for r in stored}  # older files lack it
    for new in rows:
        new = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in new.items()}
        old = table.setdefault((new["memory"], new["at"]), new)
        if all(float(new[k]) >= float(old[k]) for k in ("seeds", "million_frames")):
            table[new["memory"], new["at"]] = new
        else:
            print(f"{figure}, {new['memory']}, {new['at']}: the stored row has more seeds or steps, and stays")
    if table:
        write_csv(path, list(table.values()))
    return list(table.values())


def begun(runs):
    """Returns {(variant, task): runs with at least one logged update}."""
    groups = {}
    for run in runs:
        if run.reached():
            groups.setdefault((run.variant, run.task), []).append(run)
    return groups


def memory_rows(runs):
    theirs = {(r["length"], r["memory"]): r["return"] for r in read_csv(PAPER / "reference_memory.csv")}
    return [{"memory": run.variant, "at": r["length"], "paper": theirs[r["length"], run.variant], "ours": r["mean"],
             **{k: r[k] for k in ("low", "high", "worst", "seeds")}, "million_frames": float(r["steps"]) / 1e6,
             "us_per_step": r["us_per_step"], "megabytes": r["megabytes"], "each": r.get("each", "")}
            for run in runs if run.path.exists() for r in read_csv(run.path)]


def best_return(run):
    """POPGym's score: the best mean return of the episodes that end in one update. NaN if training failed."""
    if logs.failed_agents(*experiment.read_run(run.path), run.path).any():
        return np.nan
    return np.fmax.reduce([r[f"return/popgym:{run.task}"] for r in experiment.read_metrics(run.path)])


def popgym_rows(runs):
    theirs = {(r["memory"], r["task"]): float(r["return"]) for r in read_csv(PAPER / "reference_popgym.csv")}
    return [row(memory, task, theirs[memory, task], list(map(best_return, same)), min(run.reached() for run in same))
            for (memory, task), same in begun(runs).items()]


def returns_by_episode(run):
    """Returns (mean return of episodes 1 ... SHOWN of a trial (SHOWN,), environment steps) of the newest agent.

    They are those of the second trial of TRIALS environments, so that the agent which is never reset has
    something to remember.
    """
    stored = run.path / "by_episode.json"
    if stored.exists():
        found = json.loads(stored.read_text())
        if found["steps"] == run.reached():
            return np.array(found["returns"]), found["steps"]
    agent = load(run.path)
    returns = play_two_trials(agent, run.seed)
    stored.write_text(json.dumps({"steps": agent.steps, "returns": returns.tolist()}))
    return returns, agent.steps


def play_two_trials(agent, seed):
    """Returns the mean return of every episode (SHOWN,) of the second trial of TRIALS environments."""
    config, network, key = agent.config, agent.network, jax.random.PRNGKey(seed)
    trials = envs.Trials(config.env, TRIALS, **agent.trial_kwargs | {"episodes_per_trial": SHOWN})
    params, norm = agent.of_seed(0)

    def play():
        state, observation = trials.reset(key, stagger=False)

        def step(carry, t):
            state, observation, hidden, reset, trial, totals = carry
            hidden, pi, _ = network.apply(
                params, norm, hidden, observation, reset, critic=False)
            action = pi.sample(seed=jax.random.fold_in(key, t))
            episode = state.counters.episode
            state, observation, transition = trials.step(state, action, t)
            reward = jnp.where(trial == 1, transition.reward, 0.0)
            totals = totals.at[jnp.arange(TRIALS), episode].add(reward)
            reset = (transition.trial_end & (config.reset != "never")) | (config.reset == "step")
            return (state, observation, hidden, reset, trial + transition.trial_end, totals), None

        hidden = network.zero_state((TRIALS,))
        carry = (state, observation, hidden, jnp.ones(TRIALS, bool), jnp.zeros(TRIALS, int),
                 jnp.zeros((TRIALS, SHOWN)))
        return jax.lax.scan(step, carry, jnp.arange(2 * trials.trial_length))[0][-1]

    return np.asarray(jax.jit(play)()).mean(0)


def metacart_rows(runs):
    reference, rows = read_csv(PAPER / "reference_metacart.csv"), []
    for (memory, task), same in begun(runs).items():
        found, steps = zip(*[returns_by_episode(run) for run in same])
        found = np.array(found)  # (seeds, SHOWN)
        counterpart = memory.removesuffix(", plain").replace("vectors", "S5")
        theirs = {r["episode"]: float(r["return"]) for r in reference if r["memory"] == counterpart}
        best = [EPISODES * best_return(run) for run in same]
        rows += [row(memory, f"episode {e}", theirs[str(e)], found[:, e - 1], min(steps))
                 for e in (1, 2, 4, 8, 16, 20, 26, 32)]
        rows.append(row(memory, "episodes 13 to 16", (theirs["13"] + theirs["16"]) / 2, found[:, 12:16].mean(1),
                        min(steps)))
        rows.append(row(memory, "best sum of 16", theirs["sum of 16"], best, min(steps)))
    return rows


def read_six(folder):
    """Returns (variant, million frames planned) and metrics.csv, an array for each seed, of a run on the six tasks.

    The plan distinguishes runs because the learning rate follows it. An array has the columns steps and the
    return of each task, NaN if training failed.

    Raises:
      ValueError: it is no run on these tasks, or no update is logged yet.
    """
    config, _ = experiment.read_run(folder)
    tasks = [task.removeprefix("dmc:") for task in config.env]
    if set(tasks) != set(envs.TRAIN_TASKS):
        raise ValueError(f"{folder} is a run on {', '.join(tasks)}, not on the six training tasks")
    trainer = experiment.trainer_of(type(config))
    variant = {"train_s5": "S5", "train_lstm": "LSTM", "train_transformer": "self-attention"}[trainer]
    variant = "vectors" if trainer == "train_s5" and train_s5.memory_of(config) == "vector" else variant
    variant += "" if config.sysid else ", plain"
    none = "none, sysid" if config.sysid else "none"
    variant = "blind" if config.blind else none if config.reset == "step" else variant
    seeds, skipped = {}, {}
    for r in read_rows(folder):
        values = [r[f"return/{name}"] for name in config.env]
        seeds.setdefault(r["seed"], []).append([r["steps"], *[values[tasks.index(t)] for t in envs.TRAIN_TASKS]])
        skipped.setdefault(r["seed"], []).append(r.get("skipped", 0.0))
    if not seeds:
        raise ValueError(f"{folder} has no logged update yet")
    arrays = [np.array(rows) for rows in seeds.values()]
    for rows, failed in zip(arrays, logs.failed_by_call(np.array(list(skipped.values())), config.log_every)):
        rows[:, 1:] = np.nan if failed else rows[:, 1:]
    return (variant, config.total_timesteps / 1e6), arrays


def near(rows, steps):
    """Mean returns (tasks,) over the twentieth of training before `steps`; NaN if no episode ended."""
    chosen = rows[(rows[:, 0] > 0.95 * steps) & (rows[:, 0] <= steps)]
    return experiment.nanmean(chosen[:, 1:], 0)


def dmcontrol_rows(folders, device):
    """Returns rows of runs on `device` (in words), after every budget that they have reached."""
    series = {}
    for folder in dict.fromkeys(map(Path.resolve, folders)):  # each once
        plan, seeds = read_six(folder)
        series.setdefault(plan, []).extend(seeds)
    reference, rows = read_csv(PAPER / "reference_dmcontrol.csv"), []
    for (memory, planned), seeds in series.items():
        theirs = memory.split(", ")[0].replace("vectors", "S5")
        for i, name in enumerate(SIX):
            curve = [r for r in reference if (r["task"], r["memory"]) == (name, theirs)]
            steps, returns = numbers(curve, "million_frames", "return")
            for budget in BUDGETS:
                found = np.array([near(s, 1e6 * budget) for s in seeds if s[-1, 0] >= 1e6 * budget])
                if len(found):
                    found = found.mean(1) if i == 0 else found[:, i - 1]
                    within = len(curve) and steps[0] <= budget <= steps[-1]
                    paper = float(np.interp(budget, steps, returns)) if within else ""
                    rows.append(row(memory, f"{name}, {budget} of {planned:g} million", paper, found, 1e6 * budget)
                                | {"task": name, "schedule": f"{planned:g}", "device": device})
    return rows


# ---- Figures: each is drawn from the rows of its table -------------------------------------------
def seeds_in_words(rows):
    """Returns "3 seeds", or "2 to 3 seeds" if the rows differ."""
    least, most = (f(int(r["seeds"]) for r in rows) for f in (min, max))
    return f"{least} seed{'s' * (least > 1)}" if least == most else f"{least} to {most} seeds"


def draw_memory(rows):
    rows = [r | {"length": r["at"], "mean": r["ours"]} for r in rows]
    memory_chain.draw(rows, PAPER / "memory.png", read_csv(PAPER / "reference_memory.csv"))


def draw_popgym(rows):
    def panel(axis, *_):
        for i, memory in enumerate(("S5", "GRU", "none")):
            mine = [r for r in rows if r["memory"] == memory]
            if not mine:
                continue
            word = WORDS.get(memory, memory)
            x = np.array([POPGYM.index(r["at"]) for r in mine]) + (i - 1) * 0.28
            paper, ours, low, high = numbers(mine, "paper", "ours", "low", "high")
            axis.bar(x - 0.06, ours, 0.12, yerr=[ours - low, high - ours], capsize=2,
                     color=COLOURS[word], label=f"ours, {word} ({seeds_in_words(mine)})")
            axis.bar(x + 0.06, paper, 0.12, facecolor="white", edgecolor=COLOURS[word], linestyle="--",
                     label=f"paper, {word}")
        names = [task.replace("Stateless", "\nStateless").removesuffix("Hard").strip() for task in POPGYM]
        axis.set_xticks(range(len(POPGYM)), names)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(ylabel="best mean return, 95 % t interval over seeds",
                 title="POPGym, hard versions, within 15 million environment steps")

    plot_into(PAPER / "popgym.png", 1, 1, panel, size=(8, 3.8), legend=3)


def draw_metacart(rows):
    reference = read_csv(PAPER / "reference_metacart.csv")

    def panel(axis, *_):
        for memory in dict.fromkeys(r["memory"] for r in rows):
            word, colour, marker = METACART[memory]
            mine = [r for r in rows if r["memory"] == memory and r["at"].startswith("episode ")]
            ours, worst = numbers(mine, "ours", "worst")
            episodes = [int(r["at"].removeprefix("episode ")) for r in mine]
            axis.plot(episodes, ours, color=colour, label=f"ours, {word} ({seeds_in_words(mine)})",
                      **OURS | {"marker": marker})
            axis.fill_between(episodes, worst, ours, color=colour, alpha=0.15, lw=0)
            theirs = [r for r in reference if r["memory"] == memory and r["episode"].isdecimal()]
            if theirs:  # none of "plain"
                axis.plot(*numbers(theirs, "episode", "return"), color=colour,
                          label=f"paper, {WORDS.get(memory, memory)}", **PAPER_STYLE)
        axis.axvline(EPISODES + 0.5, color="grey", lw=0.7)
        axis.text(EPISODES + 0.7, 1.02, "longer than in training", fontsize=7, color="grey")
        axis.set(xlabel="episode of the trial", ylabel="return (1: perfect)", ylim=(0, 1.07),
                 title="Projected StatelessCartPole (shade: down to the worst seed)")

    plot_into(PAPER / "metacart.png", 1, 1, panel, size=(8, 4.6), legend=3)


def draw_dmcontrol(rows):
    reference = read_csv(PAPER / "reference_dmcontrol.csv")
    series = dict.fromkeys((r["memory"], r["schedule"], r["device"]) for r in rows)

    def panel(axis, line, column):
        i = 4 * line + column
        if i == len(SIX):  # the legend of all panels
            axis.legend(*figure_entries, loc="center", fontsize=8, frameon=False)
            axis.axis("off")
            return
        of_task = [r for r in rows if r["task"] == SIX[i]]
        for (memory, schedule, device), marker in zip(series, itertools.cycle("osD^vP")):
            mine = [r for r in of_task if (r["memory"], r["schedule"], r["device"]) == (memory, schedule, device)]
            steps, ours, worst = numbers(mine, "million_frames", "ours", "worst")
            words = ", ".join(filter(None, ["ours", DMCONTROL.get(memory, memory), device]))
            colour = COLOURS.get(WORDS.get(memory, memory), "tab:purple")
            colour = "navy" if (memory, device) == ("S5", "one H200") else colour  # as in summary.py
            axis.plot(steps, ours, color=colour, **OURS | {"marker": marker},
                      label=f"{words}, schedule of {schedule} million ({seeds_in_words(mine)})")
            axis.fill_between(steps, worst, ours, color=colour, alpha=0.15, lw=0)
        for memory in ("S5", "LSTM", "none"):
            curve = [r for r in reference if (r["task"], r["memory"]) == (SIX[i], memory)
                     and float(r["million_frames"]) <= BUDGETS[-1]]
            word = WORDS.get(memory, memory)
            axis.plot(*numbers(curve, "million_frames", "return"), color=COLOURS[word], label=f"paper, {word}",
                      **PAPER_STYLE)
        figure_entries[:] = axis.get_legend_handles_labels()
        axis.set(xlim=(4, 600), ylim=(0, None), xlabel=MILLIONS, title=SIX[i], ylabel="return")
        log_axis(axis, "x", [5, 10, 20, 50, 100, 200, 500])

    figure_entries = []
    plot_into(PAPER / "dmcontrol.png", 2, 4, panel, size=(3.9, 3))


FIGURES = {"memory": (memory_rows, draw_memory), "popgym": (popgym_rows, draw_popgym),
           "metacart": (metacart_rows, draw_metacart), "dmcontrol": (dmcontrol_rows, draw_dmcontrol)}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("figure", choices=list(FIGURES))
    parser.add_argument("folders", nargs="*", type=Path, help="run folders (dmcontrol only)")
    parser.add_argument("--device", default="", help="of these runs, in words (dmcontrol only)")
    parser.add_argument("--draw", action="store_true", help="run and read nothing, draw the table")
    parser.add_argument("--only", nargs="+", default=[""], help="only runs whose name contains one of these")
    add_jobs_flag(parser)
    options = parser.parse_args()
    if bool(options.folders) != (options.figure == "dmcontrol" and not options.draw):
        parser.error("dmcontrol needs run folders or --draw; the other figures have their own runs")
    rows_of, draw = FIGURES[options.figure]
    rows, failed = [], 0
    if options.folders:
        rows = rows_of(options.folders, options.device)
    elif not options.draw:
        runs = runs_of(options.figure)
        chosen = [run for run in runs if any(part in run.path.name for part in options.only)]
        if not chosen:
            parser.error(f"--only {' '.join(options.only)} matches none of {', '.join(run.path.name for run in runs)}")
        failed = launch(chosen, options.jobs)
        rows = rows_of(runs)
    rows = write_table(options.figure, rows)
    if not rows:
        parser.error("nothing to draw yet")
    draw(rows)
    print(f"wrote {PAPER / options.figure}.csv and .png")
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_main(main)
