"""What a run logs while it trains, and its figures and ranking at the end."""

import contextlib
import csv
import dataclasses
import itertools
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit
from tqdm import tqdm

from run_folder import LOGS, Options, Run, agents_of, settings_of


# ---- Logs ----------------------------------------------------------------------------------------
class Logs(contextlib.ExitStack):
    """metrics.csv, timing.csv, TensorBoard, wandb and progress bar of a run from `update` on."""

    def __init__(self, this: Run, update: int):
        super().__init__()
        from tensorboardX import SummaryWriter
        self.this, self.begin = this, time.perf_counter()
        mode = "a" if update else "w"
        self.files = [
            self.enter_context((this.folder / name).open(mode, newline="")) for name in LOGS]
        self.board = self.enter_context(SummaryWriter(str(this.folder / "tensorboard")))
        self.wandb = None
        if this.options.wandb:
            import wandb
            settings = dataclasses.asdict(this.config) | dataclasses.asdict(this.options)
            self.wandb = self.enter_context(
                wandb.init(project=this.options.wandb, name=this.folder.name, config=settings))
        steps = this.config.steps_per_update
        self.bar = self.enter_context(tqdm(total=this.config.num_updates * steps,
                                           initial=update * steps, unit="step", unit_scale=True))

    def add(self, update: int, metrics: dict[str, np.ndarray], seconds: float) -> None:
        """Logs one call, which ended at `update`: metrics (A, log_every, ...), its duration."""
        config = self.this.config
        rows = metric_rows(config, self.this.options, update - config.log_every, metrics)
        steps = config.log_every * config.steps_per_update
        timing = {"update": update, "steps": update * config.steps_per_update,
                  "seconds": time.perf_counter() - self.begin,
                  "sps": len(metrics["skipped"]) * steps / seconds}
        for file, lines in zip(self.files, (rows, [timing])):
            write_rows(file, lines)
        means = {name: nanmean([row[name] for row in rows]) for name in rows[0]}
        scalars = {name: x for name, x in (means | timing).items()
                   if not name.startswith("curve/") and not math.isnan(x)}
        for name, x in scalars.items():
            self.board.add_scalar(name, x, timing["steps"])
        if self.wandb:
            self.wandb.log(scalars, step=timing["steps"])
        self.bar.update(steps)
        self.bar.set_postfix_str(
            " ".join(f"{task.split(':')[-1]} {means[f'return/{task}']:.4g}" for task in config.env))


def metric_rows(config: Any, options: Options, update: int, metrics: dict) -> list[dict[str, Any]]:
    """Returns metrics (A, updates, ...) of the updates after `update` as rows of metrics.csv.

    A metric by task has a column NAME/TASK for each, one by task and bin NAME/TASK/BIN.
    """
    columns = {}
    for name, x in metrics.items():
        for index in np.ndindex(x.shape[2:]):
            place = [config.env[index[0]], *map(str, index[1:])] if index else []
            columns["/".join([name, *place])] = x[..., *index]
    rows = []
    for i, (agent, (setting, seed)) in itertools.product(
            range(config.log_every), enumerate(agents_of(config, options))):
        number = update + i + 1
        row = {"update": number, "steps": number * config.steps_per_update, "seed": seed}
        rows.append(row | setting | {name: float(x[agent, i]) for name, x in columns.items()})
    return rows


def write_rows(file: Any, rows: list[dict]) -> None:
    """Adds rows to a CSV file: six digits of a float, nothing for NaN."""
    writer = csv.writer(file)
    if file.tell() == 0:
        writer.writerow(rows[0])
    for row in rows:
        writer.writerow([("" if math.isnan(x) else f"{x:.6g}") if isinstance(x, float) else x
                         for x in row.values()])
    file.flush()
    os.fsync(file.fileno())


# ---- Results of a run ----------------------------------------------------------------------------
def read_metrics(folder: Path | str) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv, NaN where a cell is empty."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [{name: float(x or "nan") for name, x in row.items()} for row in rows]


def training_returns(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """Returns (updates, A, tasks): mean return of the episodes that ended, NaN if none did."""
    returns = [[row[f"return/{task}"] for task in config.env] for row in read_metrics(folder)]
    return np.array(returns).reshape(-1, len(agents_of(config, options)), len(config.env))


def final_scores(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """Returns (A, tasks): mean return over the last tenth of training."""
    returns = training_returns(config, options, folder)
    return nanmean(returns[-max(1, len(returns) // 10):], 0)


def nanmean(x: Any, axis: int | None = None) -> np.ndarray:
    """Returns np.nanmean(x, axis), without its warning where there is nothing to average."""
    x = np.asarray(x, float)
    with np.errstate(invalid="ignore"):
        return np.nansum(x, axis) / (~np.isnan(x)).sum(axis)


def t_interval(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean, low and high (...) of the mean's 95 % t interval, from independent x (n, ...).

    NaNs are left out. All three are NaN without a value, low and high also where no two differ.
    """
    valid = ~np.isnan(x)
    n = valid.sum(0)
    differ = np.where(valid, x, -np.inf).max(0) > np.where(valid, x, np.inf).min(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(valid, x, 0.0).sum(0) / n
        variance = np.where(valid, (x - mean) ** 2, 0.0).sum(0) / (n - 1)
        half = np.where(differ, stdtrit(n - 1, 0.975) * np.sqrt(variance / n), np.nan)
    return mean, mean - half, mean + half


def summarise(this: Run) -> None:
    """Writes the figures of a finished run and prints its returns."""
    config, scores = this.config, final_scores(*this)
    plot_training(this)
    for task, score in zip(config.env, scores.mean(0)):
        print(f"  {task:24s} return {score:8.2f}  (mean over the last tenth of training)")
    if this.options.sweep:
        write_sweep(this, scores.mean(1))


def panels(lines: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """Returns a figure and its axes (lines, columns), each width x height inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(width * columns, height * lines), dpi=150, layout="constrained")
        return figure, figure.subplots(lines, columns, squeeze=False)


def plot_training(this: Run) -> None:
    """Writes returns.png: return of each task against steps, mean and range over the agents."""
    tasks, returns = this.config.env, training_returns(*this)
    window = max(1, len(returns) // 50)
    windows = len(returns) // window
    returns = nanmean(returns[:windows * window].reshape(windows, window, *returns.shape[1:]), 1)
    steps = this.config.steps_per_update * window * (np.arange(windows) + 0.5) / 1e6
    figure, axes = panels(math.ceil(len(tasks) / 3), min(3, len(tasks)), 3.4, 2.6)
    for axis in axes.flat[len(tasks):]:
        axis.remove()
    for axis, task, y in zip(axes.flat, tasks, np.moveaxis(returns, -1, 0)):  # y: (windows, A)
        axis.plot(steps, nanmean(y, 1))
        axis.fill_between(steps, np.fmin.reduce(y, 1), np.fmax.reduce(y, 1), alpha=0.25, lw=0)
        axis.set(title=task, xlabel="million steps", ylabel="episode return")
    figure.savefig(this.folder / "returns.png")


def write_sweep(this: Run, scores: np.ndarray) -> None:
    """Ranks the settings by scores (A,): prints them, writes sweep.csv and sweep.png."""
    settings, seeds = settings_of(this.config, this.options), this.options.num_seeds
    mean, low, high = t_interval(scores.reshape(len(settings), seeds).T)
    order = np.argsort(-np.nan_to_num(mean, nan=-np.inf))
    rows = [settings[i] | {"return": mean[i], "low": low[i], "high": high[i], "seeds": seeds}
            for i in order]
    with (this.folder / "sweep.csv").open("w", newline="") as file:
        write_rows(file, rows)
    labels = [", ".join(f"{name}={x:g}" for name, x in settings[i].items()) for i in order]
    print("\nsettings, best first:")
    for label, row in zip(labels, rows):
        print(f"  {label:40s} {row['return']:9.2f}  [{row['low']:.2f}, {row['high']:.2f}]")
    figure, [[axis]] = panels(1, 1, 7, 1 + 0.35 * len(rows))
    axis.errorbar(mean[order], labels, xerr=np.nan_to_num((high - mean)[order]), fmt="o", capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel(f"return over the last tenth of training, 95 % t interval over {seeds} seeds")
    figure.savefig(this.folder / "sweep.png")
