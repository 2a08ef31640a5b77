"""What a test by evaluate.py found: statistics, tables, figures, report.md.

    print(write_report(result, folder))
    print(write_comparison(results, folder))
"""

import csv
import itertools
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import logs
import run_folder
from agent import Agent

BINS = 20  # equal parts of a trial, in curves
FEW = 5  # tables over fewer seeds show each of them
POLICIES = {
    "memory": "the agent",
    "blind": "the agent without observations: each is replaced by its running mean; hidden state, "
             "previous action, previous reward and episode starts remain",
    "reset": "the agent whose hidden state is reset before every step",
    "random": "uniformly random actions"}
FAMILIES = ("gaussian", "orthogonal", "rademacher", "identity")  # the last: no projection


class Result(NamedTuple):
    """A test of one run. Arrays begin with the axes (tasks, seeds, trials)."""

    agent: Agent
    tasks: tuple
    returns: dict  # {policy: (tasks, seeds, trials)} return of an episode, mean over the trial's
    curves: dict  # {policy: (..., BINS)} reward of an environment step by time; NaN after the end
    projections: dict  # {family: (tasks, seeds, trials)} the agent's return; {} without DMControl
    steps: tuple  # per task, environment steps of a trial


def reduce_trials(reward, lasted, episodes: int, steps) -> tuple[np.ndarray, np.ndarray]:
    """(returns (N,), curves (N, BINS)) of trials, float64.

    Args:
      reward, lasted: (T, N), see evaluate.make_rollout.
      episodes: episodes of a trial.
      steps: (N,) environment steps of a trial.
    """
    lasted = lasted.astype(float)
    place = np.minimum((np.cumsum(lasted, 0) - lasted) * BINS // steps, BINS - 1)
    totals, counts = (np.stack([x.sum(0, float, where=place == b) for b in range(BINS)], -1)
                      for x in (reward, lasted))
    with np.errstate(invalid="ignore"):
        return totals.sum(-1) / episodes, totals / counts


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
        return Estimate(*logs.t_interval(x[:, 0].mean(0)), "trials")
    return Estimate(*logs.t_interval(logs.nanmean(x, 2).mean(0)), "seeds")


def differences(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x - y (tasks, seeds, trials), in the seeds and trials that both have."""
    seeds = min(x.shape[1], y.shape[1])
    return x[:, :seeds] - y[:, :seeds]


def each_seed(x: np.ndarray) -> str:
    """Means of the seeds of x (tasks, seeds, trials) as text for tables; "" for one or many."""
    return ", ".join(map(number, x.mean((0, 2)))) if few_seeds(x) else ""


def interquartile_mean(x: np.ndarray) -> float:
    """Mean of all numbers in x but the lowest and the highest quarter."""
    return float(np.sort(x, None)[x.size // 4:x.size - x.size // 4].mean())


def over(x: np.ndarray) -> str:
    """What the estimate of x (tasks, seeds, trials) is over, in words."""
    _, seeds, trials = x.shape
    return f"{seeds} seeds" if seeds > 1 else f"{trials} trials of one seed"


def few_seeds(x: np.ndarray) -> bool:
    return 1 < x.shape[1] < FEW


# ---- Tables --------------------------------------------------------------------------------------
def groups(*results: Result) -> dict[str, list[int]]:
    """{group: indices of tasks}: "trained on" by all runs, "held out" by all, or "trained on by some"."""
    found = {"trained on": [], "trained on by some": [], "held out": []}
    for i, task in enumerate(results[0].tasks):
        trained = [task in result.agent.tasks for result in results]
        found["trained on" if all(trained) else "trained on by some" if any(trained) else "held out"].append(i)
    return {name: index for name, index in found.items() if index}


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
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}" if abs(x) >= 10 else logs.score_text(x)


def returns_table(result: Result, index: list[int]) -> str:
    """A row for each task: the agent's return, its interval or each seed, the other policies."""
    memory, *others = result.returns.values()
    rows = [[label, number(memory[which].mean()),
             each_seed(memory[which]) or estimate(memory[which]),
             *(number(x[which].mean()) for x in others)] for label, which in rows_of(result, index)]
    spread = "each seed" if few_seeds(memory) else "95 %"
    return grid(["return", "memory", spread, *list(POLICIES)[1:]], rows)


def projections_table(results: list[Result]) -> str:
    """Mean returns; a row for each run and group of tasks, a column for each family tested on."""
    return grid(["run", "tasks", *FAMILIES], [
        [markdown(r.agent.name), group,
         *(number(r.projections[family][index].mean()) for family in FAMILIES)]
        for r in results for group, index in groups(r).items()])


def headline(result: Result) -> str:
    """The three numbers that matter: return on each group of tasks, and what blindness costs."""
    found, memory = groups(result), result.returns["memory"]
    group, index = next(iter(found.items()))
    rows = [(f"return, {group}", index, memory[index]) for group, index in found.items()]
    rows.append((f"cost of hiding observations, {group}", index,
                 (memory - result.returns["blind"])[index]))
    few = ["each seed"] if few_seeds(memory) else []
    return grid([markdown(result.agent.name), "tasks", "mean", f"95 % over {over(memory)}", *few], [
        [label, len(index), number(x.mean()), estimate(x), *(each_seed(x) for _ in few)]
        for label, index, x in rows])


# Names of folders can hold anything.
def markdown(name: str) -> str:
    """A name that a Markdown table, and mathematics and HTML inside it, leave as it is."""
    return re.sub(r"[\\`*\[\]<>|$~&]|\b_|_\b|(?<!\w)_", r"\\\g<0>", " ".join(name.split()))


def plain_label(name: str) -> str:
    """A name that matplotlib draws as it is, neither as mathematics nor hidden from the legend."""
    return " " * name.startswith("_") + " ".join(name.split()).replace("$", r"\$")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a CSV file, in which a spreadsheet takes no text for a formula."""
    def cell(x):
        if isinstance(x, float):
            return f"{x:.6g}"
        return f"'{x}" if str(x).startswith(("=", "+", "-", "@", "\t", "\r")) else x

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({name: cell(x) for name, x in row.items()})


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
               | estimate(x[which])._asdict() | {"iqm": interquartile_mean(x[which]),
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


def plot_returns(results: list[Result], series: dict[str, np.ndarray], path: Path) -> None:
    """Returns by task with intervals and, of few, each seed; series as Result.returns."""
    found = groups(*results)
    height = max(len(index) for index in found.values()) * (0.15 + 0.09 * len(series))
    figure, axes = logs.panels(len(found), 1, 7, 1.2 + height)
    for axis, (group, index) in zip(axes[:, 0], found.items()):
        rows = rows_of(results[0], index)
        for k, (name, x) in enumerate(series.items()):
            colour, marker, _ = STYLES[k % len(STYLES)]
            y = np.arange(len(rows)) + (k - (len(series) - 1) / 2) * 0.8 / len(series)
            mean, _, high, _ = zip(*(estimate(x[which]) for _, which in rows))
            if few_seeds(x):
                seeds = np.stack([x[which].mean((0, 2)) for _, which in rows])
                axis.plot(seeds, y, ".", color=colour, ms=7, alpha=0.4)
            axis.errorbar(mean, y, xerr=np.nan_to_num(np.subtract(high, mean)), fmt=marker,
                          color=colour, ms=4, lw=1, capsize=1.5, label=plain_label(name))
        axis.set(yticks=range(len(rows)), yticklabels=[label for label, _ in rows],
                 ylim=(len(rows) - 0.5, -0.5), title=f"tasks {group}")
    axes[-1, 0].set_xlabel("return of an episode (95 % over seeds, or trials of the only seed)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path)


def plot_curves(results: list[Result], series: dict[str, np.ndarray], path: Path) -> None:
    """Reward against time in the trial, a panel for each task; series as Result.curves."""
    tasks, steps = results[0].tasks, results[0].steps
    groups_of = {i: group for group, index in groups(*results).items() for i in index}
    columns = min(4, len(tasks))
    width = max(2.6, 5.2 / columns)  # room for the legend and the label of the axis
    figure, axes = logs.panels(math.ceil(len(tasks) / columns), columns, width, 2.1)
    for axis in axes.flat[len(tasks):]:
        axis.remove()
    for i, (axis, task) in enumerate(zip(axes.flat, tasks)):
        x = (np.arange(BINS) + 0.5) * steps[i] / BINS
        for (name, data), (colour, marker, line) in zip(series.items(), itertools.cycle(STYLES)):
            e = estimate(data[[i]])
            axis.plot(x, e.mean, line, color=colour, marker=marker, ms=2.5, lw=1.2,
                      label=plain_label(name))
            axis.fill_between(x, e.low, e.high, color=colour, alpha=0.18, lw=0)
        group = groups_of[i]
        axis.set_title(task + f" ({group})" * (group != "trained on"), fontsize=9)
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.supxlabel("environment steps since the trial began (95 % as in the tables)", fontsize=9)
    figure.supylabel("reward of a step", fontsize=9)
    figure.savefig(path)


# ---- Reports -------------------------------------------------------------------------------------
INTERVALS = """\
95 %: t interval of the mean over seeds (training runs), or over the trials of the only seed, which
says nothing about other seeds. It may reach beyond what is possible. No interval covers runs that
collapse: few seeds rarely hold one."""
NOTES = f"""A return is the sum of the rewards of an episode, or the mean over a trial's episodes.
Policies: {"; ".join(f"*{name}*, {text}" for name, text in POLICIES.items())}.
{INTERVALS}
The CSV files hold all intervals, interquartile means and every trial."""


def sweep_text(agent: Agent) -> str:
    """Which setting of a sweep this is, as a line; "" without a sweep."""
    if not agent.settings[0]:
        return ""
    how = f", the {logs.best_of(agent.best_of)}" if agent.best_of > 1 else ""
    return f"Setting: {markdown(run_folder.name_of(agent.settings[0]))}{how}.\n"


def failed_text(agent: Agent) -> str:
    """Which of the seeds have failed in training, as a line; "" if the run folder does not say so."""
    try:
        run = run_folder.read_run(agent.folder)
        failed = logs.failed_agents(*run, agent.folder)
    except (ValueError, OSError):  # the file of the agent alone
        return ""
    names = [run_folder.name_of(*each) for each in run_folder.agents_of(*run)]
    mine = [run_folder.name_of(*each) for each in zip(agent.settings, agent.seeds)]
    names = [name for name, fail in zip(names, failed) if fail and name in mine]
    return f"Failed in training, and tested all the same: {markdown('; '.join(names))}.\n" if names else ""


def describe(result: Result) -> str:
    agent, (_, seeds, trials) = result.agent, result.returns["memory"].shape
    return (f"{markdown(agent.name)}: {agent.trainer}, projection {agent.trials.projection}, "
            f"{agent.steps:,} steps of training on\n{', '.join(agent.tasks)}.\n"
            f"{sweep_text(agent)}{failed_text(agent)}"
            f"Tested: {seeds} seed{'s' * (seeds > 1)} x {trials} trials of each task.")


def write_report(result: Result, folder: Path) -> str:
    """Writes tables and figures of one run, and report.md around them. Returns what to print."""
    write_tables(result, folder)
    plot_returns([result], result.returns, folder / "returns.png")
    plot_curves([result], result.curves, folder / "curves.png")
    tables = [f"Tasks {group}\n\n{returns_table(result, i)}" for group, i in groups(result).items()]
    figures = ["![returns](returns.png)", "![curves](curves.png)"]
    if result.projections:
        plot_returns([result], result.projections, folder / "projections.png")
        tables.append(f"Returns under other projections\n\n{projections_table([result])}")
        figures.append("![projections](projections.png)")
    figures += [f"[{path.name}]({path.name})" for path in sorted(folder.glob("replay-*.*"))]
    parts = [f"# {markdown(result.agent.name)}", headline(result), describe(result), *tables,
             *figures, NOTES]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")
    printed = [describe(result), *tables, INTERVALS, f"more: {folder / 'report.md'}",
               headline(result)]
    return "\n\n".join(printed)


def write_comparison(results: list[Result], folder: Path) -> str:
    """Writes comparison.csv, figures and comparison.md of runs. Returns what to print."""
    pairs = [(a.agent.name, b.agent.name, group,
              differences(a.returns["memory"][index], b.returns["memory"][index]))
             for a, b in itertools.combinations(results, 2)
             for group, index in groups(a, b).items()]
    write_csv(folder / "comparison.csv", [
        {"run": a, "other": b, "tasks": group} | estimate(x)._asdict() | {"seeds": x.shape[1], "trials": x.shape[2]}
        for a, b, group, x in pairs])
    plot_returns(results, {r.agent.name: r.returns["memory"] for r in results},
                 folder / "comparison.png")
    plot_curves(results, {r.agent.name: r.curves["memory"] for r in results},
                folder / "comparison_curves.png")
    parts = ["Differences of returns in the seeds and trials that both runs have\n\n" + grid(
        ["run - other", "tasks", "difference", "95 %", "over", "each seed"],
        [[f"{markdown(a)} - {markdown(b)}", group, number(x.mean()), estimate(x), over(x), each_seed(x) or "-"]
         for a, b, group, x in pairs])]
    if all(r.projections for r in results):
        parts.append(f"Returns under other projections\n\n{projections_table(results)}")
    figures = ["![returns](comparison.png)", "![curves](comparison_curves.png)"]
    text = ["# Comparison", *map(describe, results), *parts, *figures, NOTES]
    (folder / "comparison.md").write_text("\n\n".join(text) + "\n")
    return "\n\n".join([*parts, INTERVALS, f"more: {folder / 'comparison.md'}"])
