"""Training runs that a benchmark needs: starts what is missing, goes on after a kill, a process per core."""

import argparse
import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import ROOT, whole  # first: it finds the project

import devices
import experiment

RUNS = ROOT / "runs"


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv, none before there are any. ValueError: the first line is lost."""
    if not (folder / "metrics.csv").exists():
        return []
    rows = experiment.read_metrics(folder)
    if rows and "steps" not in rows[0]:
        raise ValueError(f"{folder}/metrics.csv does not begin with the names of its columns")
    return rows


class Run(NamedTuple):
    """One seed of one variant, in a run folder of its own."""

    path: Path
    trainer: str  # "train_s5"
    flags: list[str]
    steps: int  # environment steps
    seed: int
    variant: str
    task: str = ""

    @property
    def command(self) -> list[str]:
        """Script and flags. A run takes one device, since it resumes on as many as it began with."""
        return [f"{self.trainer}.py", *self.flags, "--total-timesteps", str(self.steps),
                "--seed", str(self.seed), "--devices", "1", "--no-evaluate"]

    def reached(self) -> int:
        """Returns the environment steps done.

        Raises:
          ValueError: the folder was made with other flags.
        """
        rows = read_rows(self.path)
        if not rows:
            return 0
        config, _ = self.read()
        if experiment.parse_flags(type(config), args=self.command[1:])[0] != config:
            raise ValueError(f"{self.path} was made with other flags than {' '.join(self.command)}: "
                             "move it away")
        return int(rows[-1]["steps"])

    def todo(self) -> list[str] | None:
        """Returns the command that starts or continues it, None if it is complete."""
        if self.reached() >= self.steps:
            return None
        if (self.path / "config.json").exists():
            return [self.command[0], "--resume", str(self.path)]
        return [*self.command, "--out", str(self.path)]

    def read(self) -> tuple[Any, Any]:
        """Returns its (Config, Options)."""
        return experiment.read_run(self.path, experiment.import_trainer(self.trainer).Config)

    def scores(self) -> np.ndarray:
        """Returns (tasks,): mean return over the last tenth of what has been trained."""
        return experiment.final_scores(*self.read(), self.path)[0]


class Script(NamedTuple):
    """A benchmark that writes its table at its end."""

    path: Path  # the table
    command: list[str]
    variant: str

    def todo(self) -> list[str] | None:
        return None if self.path.exists() else [*self.command, "--out", str(self.path)]


def launch(runs: list[Any], jobs: int) -> int:
    """Runs what is not complete, `jobs` processes at a time, each on a core of its own. 0: runs nothing.

    Returns:
      How many failed.
    """
    if not jobs:
        return 0
    waiting = [run for run in runs if run.todo()]
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are complete", flush=True)
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    cores = queue.Queue()
    for i in range(min(jobs, len(waiting))):
        cores.put(usable[i % len(usable)] if usable and jobs > 1 else None)
    running = set()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no run outlives this process

    def work(run):
        core, command = cores.get(), run.todo()
        log = run.path.with_name(run.path.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"starting {run.path.name}" + ("" if core is None else f" on core {core}"), flush=True)
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, str(ROOT / command[0]), *command[1:]], cwd=ROOT, stdout=output, stderr=output)
        running.add(process)
        if core is not None:  # before it has started threads, which inherit the core
            os.sched_setaffinity(process.pid, {core})
        failed = process.wait() != 0
        running.remove(process)
        cores.put(core)
        print(f"{'FAILED, see ' + str(log) if failed else 'finished'} {run.path.name}", flush=True)
        return failed

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return sum(pool.map(work, waiting))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            sys.exit(130)


def add_jobs_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=whole(0), default=devices.num_cores(),
                        help="processes (default: one per core; 0: run nothing, make the table of what there is)")
