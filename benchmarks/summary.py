"""Three figures, drawn from the CSV files in results/.

    python benchmarks/summary.py    # writes results/summary.png, memories.png and parts.png

summary.png, of the README: mean return of the six projected tasks during training; return of agents on
MemoryChain by episode length. memories.png: memories with and without sysid during training; reward of the
default agent within a trial. parts.png: what each part is worth. The paper's values were read off its plots.
"""

import numpy as np

from common import (  # first: it finds the project
    COLOURS,
    MILLIONS,
    OURS,
    PAPER_STYLE,
    RESULTS,
    WORDS,
    add_legend,
    log_axis,
    make_parser,
    numbers,
    plot_into,
    read_csv,
    run_main,
)

import envs

MEMORIES = (  # log of a run, colour, line, label
    ("gpu/vector_memory/metrics.csv", "tab:purple", "-", "vectors, GPU (three seeds)"),
    ("gpu/vector_300/metrics.csv", "tab:purple", "-.", "vectors, 300 million steps (two seeds)"),
    ("default/metrics.csv", "magenta", "-", "vectors, CPU (three seeds)"),
    ("no_privileged_critic/metrics.csv", "magenta", "--", "vectors, no privileged critic, CPU (three seeds)"),
    ("gpu/plain_s5/metrics.csv", "tab:blue", "-", "S5, GPU (three seeds)"),
    ("gpu/plain_s5_300/metrics.csv", "tab:blue", "-.", "S5, 300 million steps (three seeds)"),
    ("gpu/lstm/metrics.csv", "tab:orange", "-", "LSTM, GPU (three seeds)"),
    ("gpu/plain_none/metrics.csv", "tab:gray", "-", "no memory, GPU (three seeds)"),
    ("gpu/plain64/metrics.csv", "navy", "-", "S5, no privileged critic, GPU (one)"),
    ("gpu/s5/metrics.csv", "tab:blue", ":", "S5, sysid, GPU (three seeds)"),
    ("gpu/none/metrics.csv", "black", ":", "no memory, sysid, GPU (three seeds)"))


def run(schedule: int) -> list[np.ndarray]:
    """Returns (million steps, mean return of the six) of the S5 runs with this schedule, in million steps."""
    rows = [row for row in read_csv(RESULTS / "paper/dmcontrol.csv")
            if (row["memory"], row["task"], row["schedule"]) == ("S5", "mean of the six", str(schedule))]
    return numbers(rows, "million_frames", "ours")


def metrics(name: str, points: int = 20) -> list[np.ndarray]:
    """Returns (million steps, mean return of the tasks) of a run's metrics, in `points` equal parts."""
    rows = read_csv(RESULTS / name)
    tasks = [column for column in rows[0] if column.startswith("return/")]
    steps, *returns = (x[len(x) % points:].reshape(points, -1) for x in numbers(rows, "steps", *tasks))
    return [steps.mean(1) / 1e6, np.nanmean(returns, axis=(0, 2))]


def plot_paper(axis) -> None:
    """The paper's mean return of the six tasks against environment steps."""
    curves = [row for row in read_csv(RESULTS / "paper/reference_dmcontrol.csv") if row["task"] == "mean of the six"]
    for memory in ("S5", "LSTM", "none"):
        steps, returns = numbers([row for row in curves if row["memory"] == memory], "million_frames", "return")
        word = WORDS.get(memory, memory)
        axis.plot(steps, returns, color=COLOURS[word], label=f"paper, {word}", **PAPER_STYLE)
    axis.set(xlim=(4, 600), ylim=(0, 700), xlabel=MILLIONS, ylabel="mean return of six tasks")
    log_axis(axis, "x", [5, 10, 20, 50, 100, 200, 500])


def plot_training(axis) -> None:
    """Mean return of the six tasks against environment steps."""
    plot_paper(axis)
    for log, colour, label in (
            ("default/metrics.csv", "magenta", "ours, default command, CPU (three seeds)"),
            ("gpu/vector_memory/metrics.csv", "tab:purple", "ours, the same network, one H200 (three seeds)"),
            ("gpu/vector_300/metrics.csv", "black", "the same, 300 million steps (two seeds)")):
        axis.plot(*metrics(log), color=colour, linewidth=1.8, label=label)
    axis.plot(*run(500), color="navy", label="ours, S5, sysid, width 256, one H200 (one)", **OURS | {"marker": "s"})
    axis.plot(*metrics("gpu/plain64/metrics.csv"), color="navy", linestyle=":", linewidth=1.8,
              label="ours, S5, no privileged critic, one H200 (one seed)")
    axis.set_title("Six randomly projected tasks, training")
    add_legend(axis)


def plot_memories(axis) -> None:
    """Mean return of the six tasks during training: memories without sysid (solid) and with (dotted)."""
    plot_paper(axis)
    for log, colour, line, label in MEMORIES:
        axis.plot(*metrics(log), color=colour, linestyle=line, linewidth=1.8, label=label)
    axis.set_title("Memories without and with sysid, training")
    add_legend(axis)


def plot_trial(axis) -> None:
    """Reward against time since the trial began, mean of the six tasks on fresh projections."""
    rows = [row for row in read_csv(RESULTS / "default/curves.csv") if row["task"] in envs.TRAIN_TASKS]
    for policy, label in (("memory", "default agent"), ("reset", "hidden state reset in every step"),
                          ("blind", "observations hidden"), ("random", "random actions")):
        steps, means = numbers([row for row in rows if row["policy"] == policy], "from_step", "mean")
        axis.plot(*np.array([(step, means[steps == step].mean()) for step in np.unique(steps)]).T, label=label)
    axis.set(xlabel="environment steps since the trial began", ylabel="mean reward per step",
             title="Fresh projections, six tasks")
    axis.set_ylim(0)
    add_legend(axis)


def plot_memory(axis) -> None:
    """Return on MemoryChain by episode length."""
    for memory in ("S5", "LSTM", "self-attention"):
        rows = [row for row in read_csv(RESULTS / "paper/memory.csv") if row["memory"] == memory]
        lengths, paper, ours, worst = numbers(rows, "at", "paper", "ours", "worst")
        word = WORDS.get(memory, memory)
        colour = COLOURS[word]
        axis.plot(lengths, ours, color=colour, label=f"ours, {word} (shade: worst seed)", **OURS)
        axis.fill_between(lengths, worst, ours, color=colour, alpha=0.15, linewidth=0)
        axis.plot(lengths, paper, color=colour, label=f"paper, {word}", **PAPER_STYLE)
    axis.set(ylim=(-0.3, 1.05), xlabel="episode length (steps)",
             ylabel="return (0: chance, 1: perfect)", title="MemoryChain, five seeds")
    log_axis(axis, "x", [4, 16, 64, 256, 1024])
    add_legend(axis)


def plot_parts(axis) -> None:
    """Mean return of the six tasks after 5 million steps, every seed, and the intervals in parts.csv."""
    rows = read_csv(RESULTS / "parts.csv")
    mean, low, high = numbers(rows, "mean", "low", "high")
    axis.errorbar(mean, range(len(rows)), xerr=[mean - low, high - mean], fmt="o", color=COLOURS["S5"], capsize=3)
    for place, row in enumerate(rows):
        seeds = [float(x) for x in row["each"].split() if x != "-"]
        axis.plot(seeds, [place] * len(seeds), "k.", alpha=0.4)
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axis.invert_yaxis()
    axis.set(xlim=(0, 450), xlabel="mean return of six tasks: every seed, mean, 95 % t interval",
             title="Six tasks, 5 million steps")


def main() -> None:
    """Writes the figures."""
    make_parser(__doc__).parse_args()
    plot_into(RESULTS / "parts.png", 1, 1, lambda axis, *_: plot_parts(axis), size=(6, 3.2))
    for name, *panels in ("summary", plot_training, plot_memory), ("memories", plot_memories, plot_trial):
        plot_into(RESULTS / f"{name}.png", 1, 2, lambda axis, _, i: panels[i](axis), size=(5, 3.9))


if __name__ == "__main__":
    run_main(main)
