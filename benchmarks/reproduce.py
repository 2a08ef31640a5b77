"""The figures of Lu et al. (arXiv 2303.03982) again: runs what is missing, draws ours over the paper's.

    python benchmarks/reproduce.py memory              # return on MemoryChain by length: S5, LSTM, self-attention
    python benchmarks/reproduce.py popgym              # five POPGym tasks: S5, GRU, no memory
    python benchmarks/reproduce.py metacart            # projected StatelessCartPole, 16 episodes in a trial
    python benchmarks/reproduce.py dmcontrol runs/A runs/B    # draws finished or running runs on the six tasks
    python benchmarks/reproduce.py popgym --only RepeatPrevious --jobs 1
    python benchmarks/reproduce.py popgym --jobs 0     # run nothing, draw what there is

Runs are kept in runs/paper/, a process per core. After a kill the same command goes on, and a figure says how
far each of its runs has come. A run folder that was made with other flags is refused. Writes
results/paper/*.csv, *.png and a table, README.md; the paper's numbers are in results/paper/reference_*.csv.
Deviations from its settings are given where they are chosen.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common import (  # first: it finds the project
    RESULTS,
    make_parser,
    mean_interval,
    plot_into,
    read_csv,
    run_main,
    write_csv,
)

import envs
import experiment
import memory_chain
from agent import load
from runs import RUNS, Run, Script, add_jobs_flag, launch, read_rows

PAPER = RESULTS / "paper"
COLOURS = {"S5": "C0", "S5, never reset": "C4", "LSTM": "C1", "GRU": "C1", "self-attention": "C2", "none": "C7",
           "blind": "C3", "S5, plain": "C9", "LSTM, plain": "C8", "GRU, plain": "C8"}

# The paper: Adam 5e-5, 30 epochs, width 256, 4 layers. At the 4,170 steps/s that results/train_reference.csv
# has for 4 epochs of that on two cores, 30 would take seven hours for 15 million steps. Here: width 64, the
# others with as many parameters as S5, 4 epochs at a larger step, and this project's defaults where the paper
# is silent. Environments, steps, losses, discounts and the absence of annealing and of an entropy bonus are
# the paper's. No agent observes the change of its observation: in these tasks that is the velocity, which
# they hide.
PPO = ["--num-envs", "64", "--num-steps", "1024", "--num-minibatches", "8", "--update-epochs", "4",
       "--lr", "1e-3", "--anneal", "none", "--gamma", "0.99", "--gae-lambda", "1.0", "--clip-eps", "0.2",
       "--ent-coef", "0", "--vf-coef", "1.0", "--log-every", "1",
       "--no-observe-change"]
VARIANTS = {
    "S5": ("train_s5", []),
    "GRU": ("train_lstm", ["--cell", "gru"]),
    "none": ("train_s5", ["--reset", "step"]),
    "S5, never reset": ("train_s5", ["--reset", "never"]),
    "S5, plain": ("train_s5", ["--no-sysid"]),
    "GRU, plain": ("train_lstm", ["--cell", "gru", "--no-sysid"]),
}
POPGYM = ("StatelessCartPoleHard", "NoisyStatelessCartPoleHard", "StatelessPendulumHard",
          "NoisyStatelessPendulumHard", "RepeatPreviousHard")
CHAIN = {"S5": "s5", "LSTM": "lstm", "self-attention": "transformer"}
SEEDS = range(4)
EPISODES, SHOWN, TRIALS = 16, 32, 64  # of a trial: trained on, evaluated on; and trials that are evaluated
BUDGETS = (5, 10, 20, 50, 100, 300, 500)  # million frames


# ---- Runs ----------------------------------------------------------------------------------------
def trainer_runs(figure, steps, variants, tasks):
    """Returns runs of every task, variant {name: flags} and seed, seeds outermost: each seed is a figure."""
    runs = []
    for seed in SEEDS:
        for task in tasks:
            for name, flags in variants.items():
                trainer, own = VARIANTS[name]
                path = RUNS / "paper" / figure / f"{task}-{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                flags = [*own, "--env", f"popgym:{task}", *flags, *PPO]
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
        # harder task. A fifth of its 50 million steps. sysid features contain velocities; "plain" is without.
        flags = ["--projection", "orthogonal", "--obs-size", "4", "--episodes-per-trial", str(EPISODES),
                 "--no-privileged-critic"]
        return trainer_runs(figure, 10_000_000, dict.fromkeys(VARIANTS, flags), ("StatelessCartPoleEasy",))
    return []


# ---- Tables --------------------------------------------------------------------------------------
def row(memory, at, paper, ours, frames):
    """Returns a row of a figure's table: `ours` (seeds,) at `at` after `frames` steps of the slowest seed."""
    columns = mean_interval(ours)
    return {"memory": memory, "at": at, "paper": paper, "ours": columns.pop("mean"), **columns,
            "million_frames": frames / 1e6}


def write_table(figure, rows):
    """Writes results/paper/FIGURE.csv, and README.md from the tables of all figures."""
    rounded = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    write_csv(PAPER / f"{figure}.csv", rounded)
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


def begun(runs):
    """Returns {(variant, task): runs with at least one logged update}."""
    groups = {}
    for run in runs:
        if run.reached():
            groups.setdefault((run.variant, run.task), []).append(run)
    return groups


def label(variant, runs):
    """Returns a line's label: how many seeds, and how far the slowest has come."""
    return f"{variant}, seeds: {len(runs)}, {min(run.reached() for run in runs) / 1e6:.3g}M"


# ---- Figures -------------------------------------------------------------------------------------
def draw_memory(runs):
    """Lengths whose tables are gone or on another machine stay as results/paper/memory.csv has them.

    Delete that file when the settings change.
    """
    reference = [{"memory": r["memory"], "length": int(r["length"]), "return": float(r["return"])}
                 for r in read_csv(PAPER / "reference_memory.csv")]
    theirs = {(r["length"], r["memory"]): r["return"] for r in reference}
    columns = ("ours", "low", "high", "worst", "seeds", "million_frames", "us_per_step", "megabytes")
    table = PAPER / "memory.csv"
    found = {f"{r['memory']}-{r['at']}": r for r in (read_csv(table) if table.exists() else [])}
    for run in runs:
        for r in read_csv(run.path) if run.path.exists() else []:
            frames = float(r["steps"]) / 1e6
            found[run.path.stem] = r | {"at": r["length"], "ours": r["mean"], "million_frames": frames}
    rows = []
    for run in runs:
        if run.path.stem in found:
            r = found[run.path.stem]
            at = int(r["at"])
            rows.append({"memory": run.variant, "at": at, "paper": theirs[at, run.variant]}
                        | {k: float(r[k] or "nan") for k in columns})
    memory_chain.draw([r | {"length": r["at"], "mean": r["ours"]} for r in rows], PAPER / "memory.png", reference)
    return rows


def best_return(run):
    """POPGym's score: the best mean return of the episodes that end in one update."""
    return np.nanmax([r[f"return/popgym:{run.task}"] for r in experiment.read_metrics(run.path)])


def popgym_scores(runs):
    """Returns {(variant, task): [(best return, environment steps) of every seed]}.

    They are kept in results/paper/popgym_runs.csv, so that runs count whose folders are gone or on another
    machine, as long as no folder has come further. Delete that file when the settings change.
    """
    stored, scores = PAPER / "popgym_runs.csv", {}
    for r in read_csv(stored) if stored.exists() else []:
        scores[r["memory"], r["task"], int(r["seed"])] = float(r["best_return"]), int(r["steps"])
    for run in runs:
        key, reached = (run.variant, run.task, run.seed), run.reached()
        if reached and reached >= scores.get(key, (0, 0))[1]:
            scores[key] = best_return(run), reached
    columns = ("memory", "task", "seed", "best_return", "steps")
    rows = [(*key, f"{best:.4g}", steps) for key, (best, steps) in sorted(scores.items())]
    write_csv(stored, [dict(zip(columns, row)) for row in rows], columns)
    found = {}
    for (variant, task, _), score in scores.items():
        found.setdefault((variant, task), []).append(score)
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


def draw_metacart(runs):
    reference = read_csv(PAPER / "reference_metacart.csv")
    rows, ours, curves = [], {}, {}
    for (memory, task), same in begun(runs).items():
        found, steps = zip(*[returns_by_episode(run) for run in same])
        ours[memory] = np.array(found), same
        theirs = {r["episode"]: float(r["return"]) for r in reference if r["memory"] == memory.removesuffix(", plain")}
        at = {f"episode {e}": (theirs.get(str(e), ""), ours[memory][0][:, e - 1]) for e in (1, 2, 4, 8, 16, 20, 26, 32)}
        late = ours[memory][0][:, 12:16].mean(1)
        at["episodes 13 to 16"] = (theirs["13"] + theirs["16"]) / 2, late
        logs = [experiment.read_metrics(run.path) for run in same]
        curves[memory] = [np.array([(r["steps"], EPISODES * r[f"return/popgym:{task}"]) for r in log]) for log in logs]
        best = [np.nanmax(curve[:, 1]) for curve in curves[memory]]
        at["best sum of 16"] = theirs["sum of 16"], best
        rows += [row(memory, k, *v, min(steps)) for k, v in at.items()]

    def panel(axis, _, column):
        for memory, (found, same) in ours.items():
            colour = COLOURS[memory]
            theirs = {r["episode"]: float(r["return"]) for r in reference if r["memory"] == memory}  # none of "plain"
            best = theirs.pop("sum of 16", None)
            if column == 0:
                axis.plot(np.arange(SHOWN) + 1, found.mean(0), color=colour, label=label(memory, same))
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
    """Returns (variant, million frames planned) and metrics.csv, an array for each seed, of a run on the six tasks.

    The plan distinguishes runs because the learning rate follows it. An array has the columns steps and the
    return of each task.

    Raises:
      ValueError: it is no run on these tasks, or no update is logged yet.
    """
    config, _ = experiment.read_run(folder)
    tasks = [task.removeprefix("dmc:") for task in config.env]
    if set(tasks) != set(envs.TRAIN_TASKS):
        raise ValueError(f"{folder} is a run on {', '.join(tasks)}, not on the six training tasks")
    variant = {"train_s5": "S5", "train_lstm": "LSTM", "train_transformer": "self-attention"}[
        experiment.trainer_of(type(config))]
    variant += "" if config.sysid else ", plain"
    variant = "blind" if config.blind else "none" if config.reset == "step" else variant
    seeds = {}
    for r in read_rows(folder):
        values = [r[f"return/{name}"] for name in config.env]
        seeds.setdefault(r["seed"], []).append([r["steps"], *[values[tasks.index(t)] for t in envs.TRAIN_TASKS]])
    if not seeds:
        raise ValueError(f"{folder} has no logged update yet")
    return (variant, config.total_timesteps / 1e6), [np.array(rows) for rows in seeds.values()]


def near(rows, steps):
    """Mean returns (tasks,) over the twentieth of training before `steps`; NaN if it is not there yet."""
    chosen = rows[(rows[:, 0] > 0.95 * steps) & (rows[:, 0] <= steps)]
    if steps > rows[-1, 0] or not len(chosen):
        return np.full(rows.shape[1] - 1, np.nan)
    return experiment.nanmean(chosen[:, 1:], 0)


def draw_dmcontrol(folders):
    series = {}
    for folder in dict.fromkeys(map(Path.resolve, folders)):  # each once
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
    parser = make_parser(__doc__)
    parser.add_argument("figure", choices=[*FIGURES, "dmcontrol"])
    parser.add_argument("folders", nargs="*", type=Path, help="run folders (dmcontrol only)")
    parser.add_argument("--only", nargs="+", default=[""], help="only runs whose name contains one of these")
    add_jobs_flag(parser)
    options = parser.parse_args()
    if (options.figure == "dmcontrol") != bool(options.folders):
        parser.error("dmcontrol draws the run folders that it is given; the other figures have their own")
    runs = runs_of(options.figure)
    chosen = [run for run in runs if any(part in run.path.name for part in options.only)]
    if runs and not chosen:
        parser.error(f"--only {' '.join(options.only)} matches none of {', '.join(run.path.name for run in runs)}")
    failed = launch(chosen, options.jobs)
    rows = draw_dmcontrol(options.folders) if options.folders else FIGURES[options.figure](runs)
    if not rows:
        parser.error("nothing to draw yet")
    write_table(options.figure, rows)
    print(f"wrote {PAPER / options.figure}.csv and .png")
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_main(main)
