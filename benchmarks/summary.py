"""The README's figure, drawn from the CSV files in results/.

    python benchmarks/summary.py                     # writes results/summary.png

Left: mean return of the six projected tasks during training, over the paper's curves. Right: return of
agents on MemoryChain by episode length. The paper's values were read off its plots.
"""

import numpy as np

from common import RESULTS, make_parser, read_csv, run_main  # first: it finds the project

from experiment import panels

PAPER = dict(linestyle="--", linewidth=1.2)
OURS = dict(marker="o", markersize=4, linewidth=1.8)
COLOURS = {"S5": "tab:blue", "LSTM": "tab:orange", "self-attention": "tab:green", "none": "tab:gray"}


def numbers(rows: list[dict[str, str]], *columns: str) -> list[np.ndarray]:
    """Returns each column as floats, NaN where a cell is empty."""
    return [np.array([float(row[column] or "nan") for row in rows]) for column in columns]


def run(name: str) -> list[np.ndarray]:
    """Returns (million steps, mean return of the six) of results/paper/NAME."""
    rows = [row for row in read_csv(RESULTS / f"paper/{name}") if row["at"].startswith("mean of the six")]
    return numbers(rows, "million_frames", "ours")


def metrics(name: str, points: int = 20) -> list[np.ndarray]:
    """Returns (million steps, mean return of the tasks) of a run's metrics, in `points` equal parts."""
    rows = read_csv(RESULTS / name)
    tasks = [column for column in rows[0] if column.startswith("return/")]
    steps, *returns = (x[len(x) % points:].reshape(points, -1) for x in numbers(rows, "steps", *tasks))
    return [steps.mean(1) / 1e6, np.nanmean(returns, axis=(0, 2))]


def add_legend(axis) -> None:
    """Puts the legend below the axis."""
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)


def plot_training(axis) -> None:
    """Mean return of the six tasks against environment steps."""
    curves = [row for row in read_csv(RESULTS / "paper/reference_dmcontrol.csv") if row["task"] == "mean of the six"]
    for memory, label in (("S5", "paper: S5"), ("LSTM", "paper: LSTM"), ("none", "paper: no memory")):
        steps, returns = numbers([row for row in curves if row["memory"] == memory], "million_frames", "return")
        axis.plot(steps, returns, color=COLOURS[memory], label=label, **PAPER)
    axis.plot(*run("dmcontrol_three_hundred.csv"), color="navy", label="ours, two CPU cores (one seed)", **OURS)
    axis.plot(*run("dmcontrol_gpu.csv"), color="crimson", label="ours, one H200 (one seed)", **OURS)
    axis.plot(*metrics("gpu/plain64_metrics.csv"), color="crimson", linestyle=":", linewidth=1.8,
              label="ours, no additions, one H200 (one seed)")
    axis.plot(*metrics("vector/metrics.csv"), color="seagreen", linewidth=1.8,
              label="ours, vector memory, no sysid, H200 (three seeds)")
    default = next(row for row in read_csv(RESULTS / "training.csv") if row["run"] == "default 20 million")
    mean, low, high = (float(default[name]) for name in ("return", "low", "high"))
    axis.errorbar(20, mean, [[mean - low], [high - mean]], color="black", fmt="D", markersize=5, capsize=3,
                  zorder=5, label="ours, default command, CPU (three seeds)")
    axis.set(xscale="log", xlim=(4, 600), ylim=(0, 700), xlabel="environment steps (all tasks), millions",
             ylabel="mean return of six tasks", title="Six randomly projected tasks, training")
    axis.set_xticks([5, 10, 20, 50, 100, 200, 500], ["5", "10", "20", "50", "100", "200", "500"])
    axis.minorticks_off()
    add_legend(axis)


def plot_memory(axis) -> None:
    """Return on MemoryChain by episode length."""
    for memory in ("S5", "LSTM", "self-attention"):
        rows = [row for row in read_csv(RESULTS / "paper/memory.csv") if row["memory"] == memory]
        lengths, paper, ours, worst = numbers(rows, "at", "paper", "ours", "worst")
        name, colour = memory.replace("self-", ""), COLOURS[memory]
        axis.plot(lengths, ours, color=colour, label=f"ours: {name} (shade: worst)", **OURS)
        axis.fill_between(lengths, worst, ours, color=colour, alpha=0.15, linewidth=0)
        axis.plot(lengths, paper, color=colour, label=f"paper: {name}", **PAPER)
    lengths = [4, 16, 64, 256, 1024]
    axis.set(xscale="log", ylim=(-0.3, 1.05), xlabel="episode length (steps)",
             ylabel="return (0: chance, 1: perfect)", title="MemoryChain, five seeds")
    axis.set_xticks(lengths, map(str, lengths))
    axis.minorticks_off()
    add_legend(axis)


def main() -> None:
    """Writes results/summary.png."""
    make_parser(__doc__).parse_args()
    figure, [[left, right]] = panels(1, 2, 5, 3.9)
    plot_training(left)
    plot_memory(right)
    figure.savefig(RESULTS / "summary.png")


if __name__ == "__main__":
    run_main(main)
