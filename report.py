"""Numbers, tables and pictures of what evaluate.py measured. A `result` is an evaluate.Result.

Returns are arrays x (tasks, seeds, trials). The unit of all statistics is the seed, one training run: its network
plays all tasks, each on trials of its own. So whatever is asked (the mean of a task, the mean over tasks, a
difference from another run or policy in the same trials, how often one is better), every seed answers with one
number, these numbers are independent and of one distribution, and Student's t gives a 95 % interval of their mean
that holds for three seeds as for ten: tests/test_evaluate.py simulates its coverage. A bootstrap of so few seeds is
too narrow, and one that draws seeds anew for each task misses what a run has in common over its tasks. From one seed
nothing can be said about other runs: its interval is over its trials, and the tables write it differently.

IQM is the mean of the middle half of seeds x trials (x tasks), and the probability of improvement follows Agarwal et
al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264), here in the same trials.
"""

import csv
import math
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

BINS = 20  # of an in-context curve


# ---- Statistics --------------------------------------------------------------------------------------------
def iqm(x, axis=-1):
    """Mean of what is left when the lowest and highest quarter (rounded down) are cut off."""
    x = np.sort(x, axis)
    n = x.shape[axis]
    return np.take(x, range(n // 4, n - n // 4), axis).mean(axis)


def t_interval(x):
    """Mean and 95 % t interval of the mean of independent x (n, ...), leaving out NaNs.

    Returns:
      mean, low and high, (...) each; NaN without a value, low and high also where fewer than two values differ.
    """
    valid = ~np.isnan(x)
    n = valid.sum(0)
    differ = np.where(valid, x, -np.inf).max(0) > np.where(valid, x, np.inf).min(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(valid, x, 0.0).sum(0) / n
        variance = np.where(valid, (x - mean) ** 2, 0.0).sum(0) / (n - 1)
        half = np.where(differ, student.ppf(0.975, n - 1) * np.sqrt(variance / n), np.nan)
    return mean, mean - half, mean + half


class Estimate(NamedTuple):
    """A mean and its 95 % interval, (...) each, and whether that is over "seeds" or over the "trials" of one."""

    mean: Any
    low: Any
    high: Any
    over: str


def estimate(x):
    """Estimate of the mean of x (tasks, seeds, trials, ...), NaN where nothing was measured.

    Each seed counts by its mean over trials and tasks. With one seed each trial counts by its mean over tasks (the
    trials of different tasks are independent).
    """
    if x.shape[1] == 1:
        return Estimate(*t_interval(x[:, 0].mean(0)), "trials")
    valid = ~np.isnan(x)
    with np.errstate(invalid="ignore"):
        by_task_and_seed = np.where(valid, x, 0.0).sum(2) / valid.sum(2)
    return Estimate(*t_interval(by_task_and_seed.mean(0)), "seeds")


def statistics(x):
    """The columns of a CSV file for x (tasks, seeds, trials), tasks pooled."""
    e = estimate(x)
    return {"mean": e.mean, "low": e.low, "high": e.high, "interval_over": e.over, "iqm": iqm(x.ravel())}


def compare(x, y):
    """Differences of two arrays of returns (tasks, seeds, trials), paired by trial; seeds as far as both go.

    Returns:
      Estimates of the mean of x - y, and of the probability that x is better than y in the same trial (a tie counts
      half). Where nearly all trials of three seeds agree, the interval of the latter is too narrow: read the former.
    """
    seeds = min(x.shape[1], y.shape[1])
    difference = x[:, :seeds] - y[:, :seeds]
    better = estimate((difference > 0) + 0.5 * (difference == 0))
    return estimate(difference), better._replace(low=np.maximum(better.low, 0), high=np.minimum(better.high, 1))


# ---- Tables ------------------------------------------------------------------------------------------------
def groups(result):
    """{"trained on" and "held out": indices of tasks}, those that are not empty, in this order."""
    found = {"trained on": [], "held out": []}
    for i, task in enumerate(result.tasks):
        found["trained on" if task in result.agent.tasks else "held out"].append(i)
    return {name: index for name, index in found.items() if index}


def rows_of(result, index):
    """(label, task indices) of every row of a table: the tasks of a group, then their mean."""
    mean = [(f"mean of {len(index)}", index)] if len(index) > 1 else []
    return [(result.tasks[i], [i]) for i in index] + mean


def label_of(result):
    return result.agent.folder.name


def grid(header, rows):
    """A Markdown table with aligned columns, which reads well on a terminal too."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [[c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, width))] for row in cells]
    lines.insert(1, ["-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(width)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(x):
    """With as many digits as tell tasks apart that pay up to 1000 and such that pay up to 1."""
    return f"{x:.{0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2}f}"


def around(e, show=number):
    """The interval of an Estimate: " [low, high]" over seeds, " (trials low to high)" over those of one seed, or ""."""
    if np.isnan(e.low):
        return ""
    low, high = show(e.low), show(e.high)
    return f" [{low}, {high}]" if e.over == "seeds" else f" (trials {low} to {high})"


def ranged(e, show=number):
    """An Estimate as text: mean and interval; "-" if nothing was measured."""
    return "-" if np.isnan(e.mean) else show(e.mean) + around(e, show)


def cell(x):
    """mean / IQM and interval of the mean of x (tasks, seeds, trials); "-" if a task was not evaluated."""
    e = estimate(x)
    return "-" if np.isnan(e.mean) else f"{number(e.mean)} / {number(iqm(x.ravel()))}{around(e)}"


def heading(results):
    """What the cells of a table of returns hold, for its corner."""
    seeds = sorted({r.returns["zero"].shape[1] for r in results})
    several = [f"[95 %, {' or '.join(str(n) for n in seeds if n > 1)} seeds]"] if seeds[-1] > 1 else []
    return " ".join(["return: mean / IQM", *several, *(["(one seed: 95 % of its trials)"] if seeds[0] == 1 else [])])


def returns_table(result, index):
    """A row per task, a column per policy; of the two that need no network the mean only."""
    return grid([heading([result]), *result.returns], [
        [label, *(number(x[which].mean()) if policy in ("random", "zero") else cell(x[which])
                  for policy, x in result.returns.items())]
        for label, which in rows_of(result, index)])


def reading(result):
    """{"memory - blind, sampled" and ", mode": differences (tasks, seeds, trials) of returns in the same trials}."""
    return {f"memory - blind, {how}": result.returns[f"memory, {how}"] - result.returns[f"blind, {how}"]
            for how in ("sampled", "mode")}


def reading_table(result, index):
    """A row per task: what the agent gains by looking."""
    return grid(["reading, in the same trials", *reading(result)], [
        [label, *(ranged(estimate(x[which])) for x in reading(result).values())]
        for label, which in rows_of(result, index)])


def episodes_table(result, policy, index):
    """A row per task, a column for some of the trial's episodes: 1, 2, 4, ..., as many as trained on, the last."""
    x = result.episodes[policy]
    columns = {2**k for k in range(x.shape[-1].bit_length())} | {x.shape[-1]}
    columns = sorted(columns | {min(result.agent.config.episodes_per_trial, x.shape[-1])})
    return grid(["return of episode", *columns], [
        [label, *(ranged(estimate(x[which][..., e - 1])) for e in columns)] for label, which in rows_of(result, index)])


def projections_table(results):
    """Rows trained-on, columns evaluated-on; a row for each group of tasks of every run."""
    columns = list(dict.fromkeys(c for r in results for c in r.projections))
    return grid(["trained on \\ evaluated on", *columns], [
        [f"{label_of(r)}: {r.agent.family}, tasks {group}",
         *(cell(r.projections[c][index]) if c in r.projections else "-" for c in columns)]
        for r in results for group, index in groups(r).items()])


def comparison_table(results, shown, index):
    """A row per task, a column per run; the runs have the same tasks."""
    return grid([heading(results), *map(label_of, results)], [
        [label, *(cell(r.returns[shown][which]) for r in results)]
        for label, which in rows_of(results[0], index)])


def comparisons(results, shown):
    """[(run, other, group of tasks, *compare(run, other))] for all pairs of runs, which have the same tasks."""
    return [(label_of(a), label_of(b), group, *compare(a.returns[shown][index], b.returns[shown][index]))
            for group, index in groups(results[0]).items()
            for i, a in enumerate(results) for b in results[i + 1:]]


def comparisons_table(rows):
    return grid(["run - other, in the same trials", "tasks", "difference of returns [95 %]",
                 "P(run better) [95 %]"], [
        [f"{run} - {other}", group, ranged(difference), ranged(better, "{:.2f}".format)]
        for run, other, group, difference, better in rows])


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def write_tables(result, folder):
    """returns.csv (statistics), trials.csv (every trial), curves.csv, episodes.csv and projections.csv."""
    run = {"run": label_of(result)}
    tables = {name: [] for name in ("returns", "trials", "curves", "episodes", "projections")}
    for group, index in groups(result).items():
        for label, which in rows_of(result, index):
            row = run | {"tasks": group, "task": label}
            for policy, x in (result.returns | reading(result)).items():
                size = {"seeds": x.shape[1], "trials": x.shape[2]}
                tables["returns"].append(row | {"policy": policy} | statistics(x[which]) | size)
            for column, x in result.projections.items():
                trained = {"trained_on": result.agent.family, "evaluated_on": column}
                tables["projections"].append(row | trained | statistics(x[which]))
    for i, task in enumerate(result.tasks):
        edges = np.ceil(np.arange(BINS + 1) * result.horizon[i] / BINS).astype(int)
        for policy in result.returns:
            row = run | {"task": task, "policy": policy}
            for (s, k), value in np.ndenumerate(result.returns[policy][i]):
                place = {"seed": result.agent.seeds[s], "trial": k, "return": float(value)}
                tables["trials"].append(row | place)
            *curve, over = estimate(result.curves[policy][[i]])
            for b, (mean, low, high) in enumerate(zip(*curve)):
                place = {"from_step": edges[b], "to_step": edges[b + 1]}
                tables["curves"].append(
                    row | place | {"reward": mean, "low": low, "high": high, "interval_over": over})
            *curve, over = estimate(result.episodes[policy][[i]])
            for e, (mean, low, high) in enumerate(zip(*curve)):
                tables["episodes"].append(
                    row | {"episode": e + 1, "return": mean, "low": low, "high": high, "interval_over": over})
    for name, rows in tables.items():
        if rows:
            write_csv(folder / f"{name}.csv", rows)


# ---- Pictures: colours of Okabe and Ito, which colour-blind readers can tell apart; markers and dashes differ too 
BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#777777")
STYLE = {"memory, sampled": (BLUE, "o", "-"), "memory, mode": (SKY, "s", "-"),
         "blind, sampled": (GREEN, "D", "-."), "blind, mode": (GREY, "d", "-."),
         "reset, sampled": (RED, "v", "--"), "reset, mode": (ORANGE, "^", "--"),
         "random": (BLACK, "x", ":"), "zero": (PINK, "+", ":")}
RUN_STYLES = [(BLUE, "o", "-"), (RED, "v", "--"), (GREEN, "s", "-."), (ORANGE, "^", ":"), (PINK, "D", "-"),
              (SKY, "P", "--"), (BLACK, "x", "-")]


def panels(*shape, **settings):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "savefig.dpi": 150})
    return plt.subplots(*shape, squeeze=False, layout="constrained", **settings)


def save(figure, path):
    import matplotlib.pyplot as plt
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def whiskers(results):
    """What the intervals of a picture mean."""
    seeds = {r.returns["zero"].shape[1] for r in results}
    if seeds == {1}:
        return "95 % over the trials of one seed, not over runs"
    return "95 % over seeds" + (", or over the trials of the only seed" if 1 in seeds else "")


def dots(axis, series, labels, xlabel):
    """Horizontal dot plot of series [(name, style, an Estimate for each label)] with intervals."""
    for k, (name, (colour, marker, _), estimates) in enumerate(series):
        y = np.arange(len(labels)) + (k - (len(series) - 1) / 2) * 0.8 / len(series)
        mean = np.array([e.mean for e in estimates])
        half = np.nan_to_num([e.high - e.mean for e in estimates])
        axis.errorbar(mean, y, xerr=half, fmt=marker, color=colour, ms=4, lw=1, capsize=1.5, label=name)
    axis.set(yticks=range(len(labels)), yticklabels=labels, xlabel=xlabel, ylim=(len(labels) - 0.5, -0.5))
    for y in np.arange(len(labels) - 1) + 0.5:
        axis.axhline(y, color="0.8", lw=0.5)
    axis.grid(axis="y", visible=False)


def plot_intervals(series, results, path, better=()):
    """A panel per group of tasks for series [(name, style, returns)], one for `better` (see comparisons)."""
    result = results[0]
    height = [len(rows_of(result, i)) * (0.15 + 0.09 * len(series)) for i in groups(result).values()]
    if better:
        height.append(0.3 + 0.3 * len(better))
    figure, axes = panels(len(height), 1, figsize=(7, 1 + sum(height)), height_ratios=height)
    for axis, (group, index) in zip(axes[:, 0], groups(result).items()):
        rows = rows_of(result, index)
        dots(axis, [(name, style, [estimate(x[which]) for _, which in rows]) for name, style, x in series],
             [label for label, _ in rows], f"return of an episode (mean; {whiskers(results)})")
        axis.set_title(f"tasks {group}", loc="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    if better:
        axis = axes[-1, 0]
        dots(axis, [("", (BLACK, "o", "-"), [row[-1] for row in better])],
             [f"{run} > {other}, {group}" for run, other, group, *_ in better],
             "probability of a better return in the same trial (dashed: no difference)")
        axis.axvline(0.5, color=BLACK, lw=0.8, ls="--")
        axis.set_xlim(0, 1)
    save(figure, path)


def plot_over(series, results, x, xlabel, ylabel, least, path, mark=None):
    """A panel per task for series [(name, style, data (tasks, seeds, trials, K))] over x[task] (K,).

    DMControl: from 0 to `least` or more. mark: where on the x axis to draw a dashed line.
    """
    result = results[0]
    columns = min(4, len(result.tasks))
    rows = math.ceil(len(result.tasks) / columns)
    figure, axes = panels(rows, columns, figsize=(2.5 * columns + 0.5, 1.9 * rows + 0.8), sharex=True)
    for axis in axes.ravel()[len(result.tasks):]:
        axis.axis("off")
    for i, (axis, task) in enumerate(zip(axes.ravel(), result.tasks)):
        for name, (colour, marker, line), data in series:
            mean, low, high, _ = estimate(data[[i]])
            axis.plot(x[i], mean, line, color=colour, marker=marker, ms=2.5, lw=1.2, label=name)
            axis.fill_between(x[i], low, high, color=colour, alpha=0.18, lw=0)
        axis.set_title(task + ("" if task in result.agent.tasks else " (held out)"), fontsize=9)
        if mark is not None:
            axis.axvline(mark, color=BLACK, lw=0.8, ls="--")
        if result.agent.dmc:
            axis.set_ylim(0, max(axis.get_ylim()[1], least))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, 1 + columns))
    figure.supxlabel(f"{xlabel} (bands: {whiskers(results)})", fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    save(figure, path)


def plot_curves(series, results, path):
    """Reward against time since the trial began, see plot_over."""
    steps = [(np.arange(BINS) + 0.5) * steps / BINS for steps in results[0].horizon]
    plot_over(series, results, steps, "environment steps since the trial began", "reward per step", 0.05, path)


def plot_projections(results, path):
    """Heat map of mean returns: trained on (rows), evaluated on (columns), a panel per group of tasks."""
    columns = list(dict.fromkeys(c for r in results for c in r.projections))
    names = list(groups(results[0]))
    size = (1.6 + 0.95 * len(columns), len(names) * (1.0 + 0.45 * len(results)) + 0.6)
    figure, axes = panels(len(names), 1, figsize=size)

    def mean(result, column, group):
        if column not in result.projections or group not in groups(result):
            return np.nan
        return result.projections[column][groups(result)[group]].mean()

    for axis, group in zip(axes[:, 0], names):
        values = np.array([[mean(r, c, group) for c in columns] for r in results])
        top = np.nanmax([*values.ravel(), 1e-3])
        image = axis.imshow(values, cmap="cividis", aspect="auto", vmin=0, vmax=top)
        for (i, j), value in np.ndenumerate(values):
            bright = np.isnan(value) or value > 0.6 * top
            axis.text(j, i, "-" if np.isnan(value) else number(value), ha="center", va="center",
                      color="black" if bright else "white")
        axis.set(xticks=range(len(columns)), yticks=range(len(results)), ylabel="trained on",
                 yticklabels=[f"{label_of(r)}: {r.agent.family}" for r in results])
        axis.set_xticklabels([c.replace(", ", "\n") for c in columns], fontsize=7.5)
        axis.set_title(f"tasks {group}", loc="left")
        axis.grid(visible=False)
        figure.colorbar(image, ax=axis, label="mean return")
    axes[-1, 0].set_xlabel("evaluated on")
    save(figure, path)


# ---- Reports -----------------------------------------------------------------------------------------------
NOTES = """## How to read this

Returns are sums of rewards over an episode (the mean of a trial's episodes if there are several); IQM is the
interquartile mean. [low, high] is a 95 % t interval of the mean over seeds, that is over training runs: every seed
counts once, by its mean over its own trials and the tasks. Of a run with one seed nothing is known about other runs:
(trials low to high) is a 95 % interval over that seed's trials, and the next seed may lie far outside. Differences are
between policies or runs in the same trials. *memory* is the agent; *blind* the same agent with all observations hidden
(it still has its memory, last action and reward), so that memory - blind, *reading*, is what looking gains; *reset*
the same agent with its memory cleared before every step, which it never met in training unless that was memoryless;
*random* acts uniformly, *zero* with zeros; *sampled* and *mode* say how the policy becomes an action. Trials come from
fixed keys. Curves leave out trials that are over."""


def describe(result):
    a, (_, seeds, trials) = result.agent, result.returns["zero"].shape
    return (f"{label_of(result)}: {a.trainer.__name__}, memory {a.config.memory}, projection {a.family}, "
            f"trained for {a.steps:,} steps on {', '.join(a.tasks)}; "
            f"{seeds} seed{'s' if seeds > 1 else ''} x {trials} trials per task")


def write_report(result, shown, folder):
    """All tables and pictures of one run, and report.md, which embeds them."""
    for stale in ("projections.csv", "projections.png", "episodes.png"):  # of an evaluation with other flags
        (folder / stale).unlink(missing_ok=True)
    write_tables(result, folder)

    def chosen(data):
        return [(p, STYLE[p], data[p]) for p in (*(shown.replace("memory", p) for p in ("memory", "blind", "reset")),
                                                 "random")]

    plot_intervals([(p, STYLE[p], x) for p, x in result.returns.items()], [result], folder / "returns.png")
    plot_curves(chosen(result.curves), [result], folder / "curves.png")
    parts = [f"# {label_of(result)}", describe(result) + "."]
    for group, index in reversed(groups(result).items()):
        parts += [f"## Tasks {group}", returns_table(result, index), reading_table(result, index)]
    parts += ["![returns](returns.png)", "## In context", "Reward by time since the trial began.",
              "![curves](curves.png)"]
    episodes, trained = result.episodes[shown].shape[-1], result.agent.config.episodes_per_trial
    if episodes > 1:
        mark = trained + 0.5 if trained < episodes else None
        numbers = [1 + np.arange(episodes)] * len(result.tasks)
        plot_over(chosen(result.episodes), [result], numbers, "episode of the trial", "return of the episode", 50,
                  folder / "episodes.png", mark)
        parts += ["## By episode", f"Return of each episode of a trial ({shown}). In training a trial had {trained}."]
        parts += [episodes_table(result, shown, index) for index in groups(result).values()]
        parts += ["![episodes](episodes.png)"]
    if result.projections:
        plot_projections([result], folder / "projections.png")
        parts += ["## Projections", f"The agent ({shown}), the same starts, other projections. `k of n`: "
                  "only the first k outputs of the projection are shown, the rest are zero.",
                  projections_table([result]), "![projections](projections.png)"]
    replays = sorted(folder.glob("replay-*.html"))
    if replays:
        parts += ["## Replays", "\n".join(f"- [{r.stem.removeprefix('replay-')}]({r.name})" for r in replays)]
    (folder / "report.md").write_text("\n\n".join([*parts, NOTES]) + "\n")


def write_comparison(results, shown, folder):
    """comparison.csv, improvement.csv, pictures, and comparison.md around them.

    Returns:
      the text to print.

    Raises:
      ValueError: if the runs share no task.
    """
    tasks = [t for t in results[0].tasks if all(t in r.tasks for r in results)]
    if not tasks:
        raise ValueError("these runs have no task in common to be compared on")
    projected = [r for r in results if r.projections]

    def only_shared(r):
        index = [r.tasks.index(t) for t in tasks]
        return r._replace(tasks=tuple(tasks), returns={p: x[index] for p, x in r.returns.items()},
                          curves={p: x[index] for p, x in r.curves.items()},
                          horizon=tuple(r.horizon[i] for i in index))

    results = [only_shared(r) for r in results]
    first, styles = results[0], RUN_STYLES * len(results)
    better = comparisons(results, shown)
    write_csv(folder / "improvement.csv", [
        {"run": run, "other": other, "tasks": group, "difference": d.mean, "difference_low": d.low,
         "difference_high": d.high, "better": p.mean, "better_low": p.low, "better_high": p.high,
         "interval_over": d.over} for run, other, group, d, p in better])
    write_csv(folder / "comparison.csv", [
        {"run": label_of(r), "tasks": group, "task": label, **statistics(r.returns[shown][which])}
        for group, index in groups(first).items() for label, which in rows_of(first, index) for r in results])
    plot_intervals([(label_of(r), style, r.returns[shown]) for r, style in zip(results, styles)], results,
                   folder / "comparison.png", better)
    plot_curves([(label_of(r), style, r.curves[shown]) for r, style in zip(results, styles)], results,
                folder / "comparison_curves.png")
    parts, pictures = [comparisons_table(better)], ["![comparison](comparison.png)",
                                                    "![in context](comparison_curves.png)"]
    if projected:
        plot_projections(projected, folder / "trained_on_evaluated_on.png")
        pictures.append("![projections](trained_on_evaluated_on.png)")
        parts += ["## Projections: trained on, evaluated on", projections_table(projected)]
    for group, index in groups(first).items():
        parts += [f"## Tasks {group} ({label_of(first)})", comparison_table(results, shown, index)]
    head = [f"# Comparison ({shown})", "\n".join(f"- {describe(r)}" for r in results), *pictures]
    (folder / "comparison.md").write_text("\n\n".join([*head, *parts, NOTES]) + "\n")
    return "\n\n".join(parts)
