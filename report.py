"""Numbers, tables and pictures of what evaluate.py measured.

Returns are arrays x (tasks, seeds, trials). Intervals are 95 % percentile bootstraps that draw seeds, then
trials within a seed, separately in each task. IQM, the mean of the middle half of seeds x trials (x tasks),
and the probability of improvement follow Agarwal et al., "Deep Reinforcement Learning at the Edge of the
Statistical Precipice" (arXiv 2108.13264). A `result` is an evaluate.Result.
"""

import csv

import numpy as np

BINS = 20  # of an in-context curve


# ---------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------
def iqm(x, axis=-1):
    """Mean of what is left when the lowest and highest quarter (rounded down) are cut off."""
    x = np.sort(x, axis)
    n = x.shape[axis]
    return np.take(x, range(n // 4, n - n // 4), axis).mean(axis)


def resample(x, draws=2000, seed=0):
    """x (tasks, seeds, trials, ...) -> (draws, tasks, seeds * trials, ...), drawn with replacement."""
    rng = np.random.default_rng(seed)
    tasks, seeds, trials = x.shape[:3]
    which_seed = rng.integers(seeds, size=(draws, tasks, seeds, 1))
    which_trial = rng.integers(trials, size=(draws, tasks, seeds, trials))
    drawn = x[np.arange(tasks)[:, None, None], which_seed, which_trial]
    return drawn.reshape(draws, tasks, seeds * trials, *x.shape[3:])


def interval(samples):
    """2.5 and 97.5 % quantiles over the first axis, as two arrays."""
    return np.quantile(samples, [0.025, 0.975], axis=0)


def statistics(x):
    """mean, iqm and their _low and _high of x (tasks, seeds, trials), tasks pooled; NaN for one trial."""
    drawn, row = resample(x).reshape(-1, x.size), {}
    for name, statistic in (("mean", np.mean), ("iqm", iqm)):
        low, high = interval(statistic(drawn, axis=-1)) if x[0].size > 1 else (np.nan, np.nan)
        row |= {name: statistic(x.ravel(), axis=-1), f"{name}_low": low, f"{name}_high": high}
    return row


def curve_statistics(x):
    """Means over seeds and trials of x (seeds, trials, K) and intervals, (K,) each, leaving out NaNs."""
    valid = ~np.isnan(x)
    both = np.stack([np.where(valid, x, 0.0), valid], -1)  # sums and counts, resampled together
    with np.errstate(invalid="ignore"):
        drawn = resample(both[None], 1000)[:, 0].sum(1)
        total, count = both.sum((0, 1)).T
        return total / count, *interval(drawn[..., 0] / drawn[..., 1])


def superiority(x, y):
    """P(X > Y) + P(X = Y) / 2 of x (tasks, n) and y (tasks, m), the mean over tasks."""
    difference = x[:, :, None] - y[:, None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean()


def improvement(x, y, draws=1000):
    """(value, low, high) of the probability that a trial of x beats one of y on the same task."""
    samples = [superiority(a, b) for a, b in zip(resample(x, draws, 1), resample(y, draws, 2))]
    return superiority(x.reshape(len(x), -1), y.reshape(len(y), -1)), *interval(samples)


# ---------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------
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
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.1f}"


def cell(x):
    """mean / IQM [interval of the mean] of x (tasks, seeds, trials); "-" if a task was not evaluated."""
    s = statistics(x)
    around = "" if np.isnan(s["mean_low"]) else f" [{number(s['mean_low'])}, {number(s['mean_high'])}]"
    return "-" if np.isnan(s["mean"]) else f"{number(s['mean'])} / {number(s['iqm'])}{around}"


def returns_table(result, index):
    """A row per task, a column per policy; of the two that need no network the mean only."""
    return grid(["return: mean / IQM [95 %]", *result.returns], [
        [label, *(number(x[which].mean()) if policy in ("random", "zero") else cell(x[which])
                  for policy, x in result.returns.items())]
        for label, which in rows_of(result, index)])


def projections_table(results):
    """Rows trained-on, columns evaluated-on; a row for each group of tasks of every run."""
    columns = list(dict.fromkeys(c for r in results for c in r.projections))
    return grid(["trained on \\ evaluated on", *columns], [
        [f"{label_of(r)}: {r.agent.family}, tasks {group}",
         *(cell(r.projections[c][index]) if c in r.projections else "-" for c in columns)]
        for r in results for group, index in groups(r).items()])


def comparison_table(results, shown, index):
    """A row per task, a column per run; the runs have the same tasks."""
    return grid(["return: mean / IQM [95 %]", *map(label_of, results)], [
        [label, *(cell(r.returns[shown][which]) for r in results)]
        for label, which in rows_of(results[0], index)])


def improvements(results, shown):
    """[{run, other, tasks, mean, mean_low, mean_high}]: P(run beats other), all pairs and groups of tasks."""
    rows = []
    for group, index in groups(results[0]).items():
        for i, a in enumerate(results):
            for b in results[i + 1:]:
                value, low, high = improvement(a.returns[shown][index], b.returns[shown][index])
                rows.append({"run": label_of(a), "other": label_of(b), "tasks": group, "mean": value,
                             "mean_low": low, "mean_high": high})
    return rows


def improvements_table(rows):
    return grid(["probability of improvement", "tasks", "P [95 %]"], [
        [f"{r['run']} > {r['other']}", r["tasks"],
         f"{r['mean']:.2f} [{r['mean_low']:.2f}, {r['mean_high']:.2f}]"] for r in rows])


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
            for policy, x in result.returns.items():
                size = {"seeds": x.shape[1], "trials": x.shape[2]}
                tables["returns"].append(row | {"policy": policy} | statistics(x[which]) | size)
            for column, x in result.projections.items():
                trained = {"trained_on": result.agent.family, "evaluated_on": column}
                tables["projections"].append(row | trained | statistics(x[which]))
    edges = -(-np.arange(BINS + 1) * result.horizon // BINS)
    for i, task in enumerate(result.tasks):
        for policy in result.returns:
            row = run | {"task": task, "policy": policy}
            for (s, k), value in np.ndenumerate(result.returns[policy][i]):
                place = {"seed": result.agent.seeds[s], "trial": k, "return": float(value)}
                tables["trials"].append(row | place)
            for b, (mean, low, high) in enumerate(zip(*curve_statistics(result.curves[policy][i]))):
                place = {"from_step": int(edges[b]), "to_step": int(edges[b + 1])}
                tables["curves"].append(row | place | {"reward": mean, "low": low, "high": high})
            for e, (mean, low, high) in enumerate(zip(*curve_statistics(result.episodes[policy][i]))):
                tables["episodes"].append(row | {"episode": e, "return": mean, "low": low, "high": high})
    for name, rows in tables.items():
        if rows:
            write_csv(folder / f"{name}.csv", rows)


# ---------------------------------------------------------------------------------------------------------
# Pictures: colours of Okabe and Ito, which colour-blind readers can tell apart; markers and dashes differ too
# ---------------------------------------------------------------------------------------------------------
BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
STYLE = {"memory, sampled": (BLUE, "o", "-"), "memory, mode": (SKY, "s", "-"),
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


def dots(axis, series, labels, xlabel):
    """Horizontal dot plot of series [(name, style, statistics of each label)] with intervals."""
    for k, (name, (colour, marker, _), stats) in enumerate(series):
        y = np.arange(len(labels)) + (k - (len(series) - 1) / 2) * 0.8 / len(series)
        mean, low, high = (np.array([s[f] for s in stats]) for f in ("mean", "mean_low", "mean_high"))
        around = np.nan_to_num(np.maximum([mean - low, high - mean], 0))
        axis.errorbar(mean, y, xerr=around, fmt=marker, color=colour, ms=4, lw=1, capsize=1.5, label=name)
    axis.set(yticks=range(len(labels)), yticklabels=labels, xlabel=xlabel, ylim=(len(labels) - 0.5, -0.5))
    for y in np.arange(len(labels) - 1) + 0.5:
        axis.axhline(y, color="0.8", lw=0.5)
    axis.grid(axis="y", visible=False)


def plot_returns(series, result, path, better=()):
    """A panel per group of tasks for series [(name, style, returns)], one for `better` (improvements)."""
    height = [len(rows_of(result, i)) * (0.15 + 0.09 * len(series)) for i in groups(result).values()]
    height += [0.3 + 0.3 * len(better)] * bool(better)
    figure, axes = panels(len(height), 1, figsize=(7, 1 + sum(height)), height_ratios=height)
    for axis, (group, index) in zip(axes[:, 0], groups(result).items()):
        rows = rows_of(result, index)
        dots(axis, [(name, style, [statistics(x[which]) for _, which in rows]) for name, style, x in series],
             [label for label, _ in rows], "return of an episode (mean, 95 % interval)")
        axis.set_title(f"tasks {group}", loc="left")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    if better:
        axis = axes[-1, 0]
        dots(axis, [("", (BLACK, "o", "-"), better)],
             [f"{r['run']} > {r['other']}, {r['tasks']}" for r in better],
             "probability of improvement (95 % interval; dashed: no difference)")
        axis.axvline(0.5, color=BLACK, lw=0.8, ls="--")
        axis.set_xlim(0, 1)
    save(figure, path)


def plot_over(series, result, x, xlabel, ylabel, least, path):
    """A panel per task for series [(name, style, data (tasks, seeds, trials, K))] over x (K,). DMControl: from 0 to
    `least` or more."""
    columns = min(4, len(result.tasks))
    rows = -(-len(result.tasks) // columns)
    figure, axes = panels(rows, columns, figsize=(2.5 * columns + 0.5, 1.9 * rows + 0.8), sharex=True)
    for axis in axes.ravel()[len(result.tasks):]:
        axis.axis("off")
    for i, (axis, task) in enumerate(zip(axes.ravel(), result.tasks)):
        for name, (colour, marker, line), data in series:
            mean, low, high = curve_statistics(data[i])
            axis.plot(x, mean, line, color=colour, marker=marker, ms=2.5, lw=1.2, label=name)
            axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        axis.set_title(task + ("" if task in result.agent.tasks else " (held out)"), fontsize=9)
        if result.agent.dmc:
            axis.set_ylim(0, max(axis.get_ylim()[1], least))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=min(4, 1 + columns))
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    save(figure, path)


def plot_curves(series, result, path):
    """Reward against time since the trial began, see plot_over."""
    steps = (np.arange(BINS) + 0.5) * result.horizon / BINS
    plot_over(series, result, steps, "environment steps since the trial began", "reward per step", 0.05, path)


def plot_projections(results, path):
    """Heat map of mean returns: trained on (rows), evaluated on (columns), a panel per group of tasks."""
    columns = list(dict.fromkeys(c for r in results for c in r.projections))
    names = list(groups(results[0]))
    size = (1.6 + 0.95 * len(columns), len(names) * (1.0 + 0.45 * len(results)) + 0.6)
    figure, axes = panels(len(names), 1, figsize=size)
    for axis, group in zip(axes[:, 0], names):
        known = lambda r, c: c in r.projections and group in groups(r)  # noqa: E731
        mean = lambda r, c: r.projections[c][groups(r)[group]].mean() if known(r, c) else np.nan  # noqa: E731
        values = np.array([[mean(r, c) for c in columns] for r in results])
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


# ---------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------
NOTES = """## How to read this

Returns are sums of rewards over an episode (the mean of a trial's episodes if there are several). Cells are
mean / interquartile mean [95 % bootstrap interval of the mean, over seeds and trials within seeds, tasks kept
apart]; the CSV files have the interval of every number. *memory* is the agent; *reset* the same agent with
its memory cleared before every step (it still sees its last action and reward); *random* acts uniformly,
*zero* with zeros; *sampled* and *mode* say how the policy becomes an action. All lived the same trials, from
fixed keys. Curves leave out trials that are over."""


def describe(result):
    a, (_, seeds, trials) = result.agent, result.returns["zero"].shape
    return (f"{label_of(result)}: {a.trainer.__name__}, memory {a.config.memory}, projection {a.family}, "
            f"trained for {a.steps:,} steps on {', '.join(a.tasks)}; "
            f"{seeds} seed{'s' * (seeds > 1)} x {trials} trials per task")


def write_report(result, shown, folder):
    """All tables and pictures of one run, and report.md, which embeds them."""
    for stale in ("projections.csv", "projections.png", "episodes.png"):  # of an evaluation with other flags
        (folder / stale).unlink(missing_ok=True)
    write_tables(result, folder)
    policies = (shown, shown.replace("memory", "reset"), "random")
    chosen = lambda data: [(p, STYLE[p], data[p]) for p in policies]  # noqa: E731
    plot_returns([(p, STYLE[p], x) for p, x in result.returns.items()], result, folder / "returns.png")
    plot_curves(chosen(result.curves), result, folder / "curves.png")
    parts = [f"# {label_of(result)}", describe(result) + "."]
    for group, index in reversed(groups(result).items()):
        parts += [f"## Tasks {group}", returns_table(result, index)]
    parts += ["![returns](returns.png)", "## In context", "Reward by time since the trial began, with memory "
              "and with memory reset at every step.", "![curves](curves.png)"]
    episodes = result.episodes[shown].shape[-1]
    if episodes > 1:
        plot_over(chosen(result.episodes), result, 1 + np.arange(episodes), "episode of the trial",
                  "return of the episode", 50, folder / "episodes.png")
        parts += ["![episodes](episodes.png)"]
    if result.projections:
        plot_projections([result], folder / "projections.png")
        parts += ["## Projections", f"The agent ({shown}), the same starts, other projections. `k of n`: "
                  "only the first k outputs of the projection are shown, the rest are zero.",
                  projections_table([result]), "![projections](projections.png)"]
    replays = sorted(folder.glob("replay-*.html"))
    replays = [f"- [{r.stem.removeprefix('replay-')}]({r.name})" for r in replays]
    parts += ["## Replays", "\n".join(replays)] * bool(replays)
    (folder / "report.md").write_text("\n\n".join([*parts, NOTES]) + "\n")


def write_comparison(results, shown, folder):
    """comparison.csv, improvement.csv, pictures, and comparison.md around them. Returns the text to print."""
    tasks = [t for t in results[0].tasks if all(t in r.tasks for r in results)]
    if not tasks:
        raise ValueError("these runs have no task in common to be compared on")
    projected = [r for r in results if r.projections]
    shared = [[r.tasks.index(t) for t in tasks] for r in results]
    results = [r._replace(tasks=tuple(tasks), returns={p: x[index] for p, x in r.returns.items()},
                          curves={p: x[index] for p, x in r.curves.items()}) for r, index in zip(results, shared)]
    first, styles = results[0], RUN_STYLES * len(results)
    better = improvements(results, shown)
    write_csv(folder / "improvement.csv", better)
    write_csv(folder / "comparison.csv", [
        {"run": label_of(r), "tasks": group, "task": label, **statistics(r.returns[shown][which])}
        for group, index in groups(first).items() for label, which in rows_of(first, index) for r in results])
    plot_returns([(label_of(r), style, r.returns[shown]) for r, style in zip(results, styles)], first,
                 folder / "comparison.png", better)
    plot_curves([(label_of(r), style, r.curves[shown]) for r, style in zip(results, styles)], first,
                folder / "comparison_curves.png")
    parts = [improvements_table(better)]
    if projected:
        plot_projections(projected, folder / "trained_on_evaluated_on.png")
        parts += ["## Projections: trained on, evaluated on", projections_table(projected)]
    for group, index in groups(first).items():
        parts += [f"## Tasks {group} ({label_of(first)})", comparison_table(results, shown, index)]
    pictures = ["![comparison](comparison.png)", "![in context](comparison_curves.png)",
                "![projections](trained_on_evaluated_on.png)"]
    pictures = pictures[:2 + bool(projected)]
    head = [f"# Comparison ({shown})", "\n".join(f"- {describe(r)}" for r in results), *pictures]
    (folder / "comparison.md").write_text("\n\n".join([*head, *parts, NOTES]) + "\n")
    return "\n\n".join(parts)
