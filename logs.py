"""What a run logs while it trains, and its figures and ranking at the end.

Each agent, one setting of the sweep with one seed, has its own rows in metrics.csv, its own folder
in tensorboard/ and its own prefix at Weights & Biases. An agent of which most gradient steps in one
call were not finite has failed: its returns count as NaN, and the other agents finish.
"""

import contextlib
import csv
import dataclasses
import itertools
import math
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit
from tqdm import tqdm

from run_folder import LOGS, Options, Run, agents_of, name_of, settings_of


# ---- During training -----------------------------------------------------------------------------
class Board:
    """A file of TensorBoard, written in this thread.

    The thread of tensorboardX.SummaryWriter dies on a full disk, and its caller waits forever.
    """

    def __init__(self, folder: Path, end: str, purge: int | None = None):
        """Begins a file whose name ends in `end`. TensorBoard drops older files' events from step `purge`."""
        from tensorboardX.event_file_writer import EventsWriter
        folder.mkdir(parents=True, exist_ok=True)
        self.writer, self.flushed = EventsWriter(str(folder / "events"), end), -math.inf
        self.close = self.writer.close
        if purge is not None:
            self.write(step=purge, session_log={"status": "START"})

    def write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event
        self.writer.write_event(Event(wall_time=time.time(), **fields))

    def add(self, scalars: dict[str, float], step: int) -> None:
        from tensorboardX.summary import scalar
        for tag, x in scalars.items():
            self.write(step=step, summary=scalar(tag, x))
        if time.monotonic() > self.flushed + 60:  # a flush waits for the disk
            self.writer.flush()
            self.flushed = time.monotonic()


class Logs(contextlib.ExitStack):
    """metrics.csv, timing.csv, TensorBoard, wandb and progress bar of a run from `update` on."""

    def __init__(self, this: Run, update: int, wandb: Any = None):
        super().__init__()
        self.this, self.wandb, self.begin, self.said = this, wandb, time.perf_counter(), set()
        agents = agents_of(this.config, this.options)
        self.names = [name_of(*agent) for agent in agents]
        steps = this.config.steps_per_update
        mode = "a" if update else "w"
        self.files = [
            self.enter_context((this.folder / name).open(mode, newline="")) for name in LOGS]
        purge = update * steps + 1 if this.options.resume else None
        self.boards = [
            self.enter_context(contextlib.closing(  # names of one second differ in their ends
                Board(this.folder / "tensorboard" / name, f".{update}", purge)))
            for name in self.names]
        self.bar = self.enter_context(tqdm(
            total=len(agents) * this.config.num_updates * steps, unit="step", unit_scale=True,
            initial=len(agents) * update * steps))

    def add(self, update: int, metrics: dict[str, np.ndarray], seconds: float) -> None:
        """Logs one call, which ended at `update`: metrics (A, log_every, ...), its duration."""
        config = self.this.config
        rows = metric_rows(config, self.this.options, update - config.log_every, metrics)
        steps = len(self.names) * config.log_every * config.steps_per_update
        timing = {"update": update, "steps": update * config.steps_per_update,
                  "seconds": time.perf_counter() - self.begin, "sps": steps / seconds}
        for file, lines in zip(self.files, (rows, [timing])):
            write_rows(file, lines)
        self.warn(metrics)
        columns = columns_of(config, metrics)
        times = {f"time/{name}": timing[name] for name in ("seconds", "sps")}
        shared = {}
        for i, (name, board) in enumerate(zip(self.names, self.boards)):
            scalars = times | scalars_of({column: x[i] for column, x in columns.items()})
            board.add(scalars, timing["steps"])
            prefix = f"{name}/" if len(self.names) > 1 else ""
            shared |= {tag if tag in times else prefix + tag: x for tag, x in scalars.items()}
        if self.wandb:
            self.wandb.log(shared, step=timing["steps"])
        self.bar.update(steps)
        returns = {task: nanmean(columns[f"return/{task}"]) for task in config.env}
        self.bar.set_postfix_str(" ".join(
            f"{task.split(':')[-1]} {x:.4g}" for task, x in returns.items() if not math.isnan(x)))

    def warn(self, metrics: dict[str, np.ndarray]) -> None:
        """Says once which agents failed, and that environments diverged."""
        sentences = [f"{name} has failed: most of its gradient steps were not finite and were "
                     "skipped; its returns count as NaN"
                     for name, failed in zip(self.names, failed_in(metrics["skipped"])) if failed]
        if np.any(metrics.get("diverged", 0)):
            sentences.append("environments diverged (NaN or too fast); their trials were cut "
                             "short: see the column diverged of metrics.csv")
        for sentence in dict.fromkeys(sentences):
            if sentence not in self.said:
                self.bar.write(f"warning: {sentence}", file=sys.stderr)
                self.said.add(sentence)


def failed_in(skipped: np.ndarray) -> np.ndarray:
    """Returns (A,): were most gradient steps of a call skipped? skipped: (A, updates)."""
    return skipped.mean(1) > 0.5


def columns_of(config: Any, metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns {column of metrics.csv: (A, updates)}.

    A metric by task has a column NAME/TASK for each, one by task and bin NAME/TASK/BIN.
    """
    columns = {}
    for name, x in metrics.items():
        for index in np.ndindex(x.shape[2:]):
            place = [config.env[index[0]], *map(str, index[1:])] if index else []
            # under JAX_DEBUG_NANS the trainer returns -inf where no episode ended
            columns["/".join([name, *place])] = np.where(np.isneginf(x), np.nan, x)[..., *index]
    return columns


def metric_rows(config: Any, options: Options, update: int, metrics: dict) -> list[dict[str, Any]]:
    """Returns metrics (A, updates, ...) of the updates after `update` as rows of metrics.csv."""
    columns, rows = columns_of(config, metrics), []
    for i, (agent, (setting, seed)) in itertools.product(
            range(config.log_every), enumerate(agents_of(config, options))):
        number = update + i + 1
        row = {"update": number, "steps": number * config.steps_per_update, "seed": seed}
        found = {name: float(x[agent, i]) for name, x in columns.items()}
        rows.append(row | setting | found | setting)  # a swept name, such as lr, is the setting
    return rows


def scalars_of(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns {tag: mean} of one agent's columns (updates,), without bins, NaN and infinity."""
    means = {f"{'charts' if '/' in name or name == 'lr' else 'losses'}/{name}": float(nanmean(x))
             for name, x in columns.items() if name.count("/") < 2}
    return {tag: x for tag, x in means.items() if math.isfinite(x)}


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


def start_wandb(this: Run) -> Any:
    """Returns the run at Weights & Biases, whose id is in the folder. ValueError if that fails."""
    path = this.folder / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    settings = dataclasses.asdict(this.config) | dataclasses.asdict(this.options)
    try:
        import wandb
        return wandb.init(project=this.options.wandb, name=this.folder.name, config=settings,
                          id=path.read_text(), resume="allow")
    except Exception as error:  # of many kinds: no login, no network, no such project
        sentence = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--wandb {this.options.wandb} cannot start: {sentence}") from None


# ---- After training ------------------------------------------------------------------------------
def read_metrics(folder: Path | str) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv, NaN where a cell is empty."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [{name: float(x or "nan") for name, x in row.items()} for row in rows]


def training_returns(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """Returns (updates, A, tasks): mean return of the episodes that ended, NaN if none did."""
    returns = [[row[f"return/{task}"] for task in config.env] for row in read_metrics(folder)]
    return np.array(returns).reshape(-1, len(agents_of(config, options)), len(config.env))


def failed_agents(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """Returns (A,): whether the agent has failed in any call."""
    skipped = np.array([row.get("skipped", 0.0) for row in read_metrics(folder)])
    return failed_by_call(skipped.reshape(-1, len(agents_of(config, options))).T, config.log_every)


def failed_by_call(skipped: np.ndarray, log_every: int) -> np.ndarray:
    """Returns (A,): whether the agent has failed in any call. skipped: (A, updates of all calls)."""
    starts = range(0, skipped.shape[1], log_every)
    return np.any([failed_in(skipped[:, i:i + log_every]) for i in starts], axis=0)


def final_scores(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """Returns (A, tasks): mean return over the last tenth of training, NaN of failed agents."""
    returns = training_returns(config, options, folder)
    scores = nanmean(returns[-max(1, len(returns) // 10):], 0)
    return np.where(failed_agents(config, options, folder)[:, None], np.nan, scores)


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
    """Writes the figures of a finished run and prints its returns, of every seed."""
    scores = final_scores(*this)
    plot_training(this)
    if this.options.sweep:
        write_sweep(this, scores.mean(1))
        return
    print("mean returns over the last tenth of training:")
    for task, score in zip(this.config.env, scores.T):
        print(f"  {task:24s} return {score_text(score.mean()):>8s}{seeds_text(score)}")


def seeds_text(scores: np.ndarray) -> str:
    """Returns the scores of several seeds as a text."""
    return f"   seeds: {' '.join(map(score_text, scores))}" if len(scores) > 1 else ""


def score_text(score: float) -> str:
    """Returns a score as text; "-" for NaN: the agent failed, or no whole episode ended."""
    if math.isnan(score):
        return "-"
    return f"{score:.2f}" if abs(score) >= 0.01 or score == 0 else f"{score:.2g}"


def panels(lines: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """Returns a figure and its axes (lines, columns), each width x height inches."""
    if "matplotlib" not in sys.modules:
        os.environ["MPLBACKEND"] = "agg"  # that of a notebook, if set, need not exist here
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(width * columns, height * lines), dpi=150, layout="constrained")
        return figure, figure.subplots(lines, columns, squeeze=False)


def plot_training(this: Run) -> None:
    """Writes returns.png: return of each task against steps, a line for each setting."""
    tasks, returns = this.config.env, training_returns(*this)
    settings, seeds = settings_of(this.config, this.options), this.options.num_seeds
    window = max(1, len(returns) // 50)
    windows = len(returns) // window
    returns = nanmean(returns[:windows * window].reshape(windows, window, *returns.shape[1:]), 1)
    returns = returns.reshape(windows, len(settings), seeds, len(tasks))
    steps = this.config.steps_per_update * window * (np.arange(windows) + 0.5) / 1e6
    xlabel = f"environment steps{' (all tasks)' * (len(tasks) > 1)}, millions"
    figure, axes = panels(math.ceil(len(tasks) / 3), min(3, len(tasks)), 3.4, 2.6)
    for axis in axes.flat[len(tasks):]:
        axis.remove()
    for axis, task, of_task in zip(axes.flat, tasks, np.moveaxis(returns, -1, 0)):
        for setting, y in zip(settings, np.moveaxis(of_task, 1, 0)):  # y: (windows, seeds)
            axis.plot(steps, nanmean(y, 1), label=name_of(setting).replace(",", ", "))
            axis.fill_between(steps, np.fmin.reduce(y, 1), np.fmax.reduce(y, 1), alpha=0.25, lw=0)
        axis.set(title=task, xlabel=xlabel, ylabel="episode return")
    if seeds > 1:
        figure.suptitle(f"line: mean of {seeds} seeds;{' ' if len(tasks) > 1 else chr(10)}"
                        "band: from the lowest to the highest seed", fontsize=9)  # fits one panel
    if len(settings) > 1:
        handles = axes.flat[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=min(len(settings), len(tasks), 3))
    figure.savefig(this.folder / "returns.png")


BRACKETS = """brackets: 95 % t interval over {} seeds, cut at the lowest and highest return of the run; no interval
covers runs that collapse, and few seeds rarely hold one"""


def best_of(settings: int) -> str:
    """Returns what a reader of the best of several settings has to know."""
    return f"best of {settings} settings, chosen on the same returns"


def write_sweep(this: Run, scores: np.ndarray) -> None:
    """Ranks the settings by scores (A,): prints them, writes sweep.csv and sweep.png.

    A setting of which a seed has failed comes last, for the mean of the others would flatter it.
    """
    settings, seeds = settings_of(this.config, this.options), this.options.num_seeds
    scores = scores.reshape(len(settings), seeds)
    returns = training_returns(*this)
    least, most = (f.reduce(returns, (0, 1)).mean() for f in (np.fmin, np.fmax))
    _, low, high = (np.clip(x, least, most) for x in t_interval(scores.T))
    mean = scores.mean(1)
    low, high = (np.where(np.isnan(mean), np.nan, x) for x in (low, high))
    order = np.argsort(-np.nan_to_num(mean, nan=-np.inf), kind="stable")
    of_seed = {f"seed {seed}": scores[:, i]
               for i, (_, seed) in enumerate(agents_of(this.config, this.options)[:seeds])}
    finite = np.isfinite(scores).sum(1)
    rows = [settings[i] | {"return": mean[i], "low": low[i], "high": high[i], "seeds": finite[i]}
            | {name: x[i] for name, x in of_seed.items()} for i in order]
    with (this.folder / "sweep.csv").open("w", newline="") as file:
        write_rows(file, rows)
    labels = [name_of(setting).replace(",", ", ") for setting in settings]
    print("\nsettings, best first, with mean returns over the last tenth of training:")
    for i in order:
        bracket = "" if np.isnan(low[i]) else f"  [{score_text(low[i])}, {score_text(high[i])}]"
        print(f"  {labels[i]:30s} {score_text(mean[i]):>9s}{bracket}{seeds_text(scores[i])}")
    print(f"{best_of(len(settings))}, so that its own are too high")
    if not np.isnan(low).all():
        print(BRACKETS.format(seeds))
    plot_sweep(this, [labels[i] for i in order], scores[order], low[order], high[order])


def plot_sweep(this: Run, labels: list[str], scores: np.ndarray, low: Any, high: Any) -> None:
    """Writes sweep.png: scores (settings, seeds), means, intervals; empty where a seed failed."""
    mean, place = scores.mean(1), np.arange(len(labels))
    figure, [[axis]] = panels(1, 1, 7, 1.3 + 0.35 * len(labels))
    bars = [np.fmax(x, 0.0) for x in (mean - low, high - mean)]  # no interval is NaN
    axis.errorbar(mean, place, xerr=bars, fmt="o", capsize=3)
    axis.plot(scores, place, "k.", alpha=0.4)
    axis.set_yticks(place, labels)
    axis.invert_yaxis()
    axis.set(title=best_of(len(labels)),
             xlabel="return over the last tenth of training: every seed, the mean, and its 95 % t "
                    "interval,\ncut at the returns of the run")
    figure.savefig(this.folder / "sweep.png")
