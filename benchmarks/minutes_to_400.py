"""Minutes from the start of `python train_s5.py` to a mean training return of 350 and of 400.

    python benchmarks/minutes_to_400.py                                # two cores, three seeds
    python benchmarks/minutes_to_400.py --flags --lr 1e-3 --num-minibatches 8

Wall time of the whole process, imports and compilation included (nothing is cached), until the mean return
of the six tasks over the last --window environment steps reaches a goal. An empty cell: not reached. Every
run goes on to its last step. The column `return` is the mean over the last tenth of the run: it shows whether
speed was bought with return. `minutes` is the wall time of the whole run. Training is annealed over the
trainer's --total-timesteps, so a shorter run can reach a goal sooner.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from common import RESULTS, ROOT, Table, each, make_parser, positive, run_main, whole  # first: it finds the project

import experiment
from runs import read_rows


def newest_return(folder: Path, window: float) -> float:
    """Returns the mean over tasks of the returns in the last `window` steps; -inf before so many are done."""
    rows = read_rows(folder)
    if not rows or rows[-1]["steps"] < window:
        return -np.inf
    recent = [row for row in rows if row["steps"] > rows[-1]["steps"] - window]
    tasks = [name for name in recent[0] if name.startswith("return/")]
    return float(np.mean([experiment.nanmean([row[task] for row in recent]) for task in tasks]))


def measure(trainer: str, seed: int, goals: list[float], window: float, flags: list[str], folder: Path) -> dict:
    """Trains one seed in `folder` and returns the columns of its row, NaN where a goal is not reached.

    ValueError: the trainer ended with an error.
    """
    found = {}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / trainer), "--seed", str(seed), "--no-evaluate", "--out", str(folder),
             *flags], env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}, stdout=subprocess.DEVNULL)
        try:
            ended = False
            while not ended:
                time.sleep(0.5)
                ended = process.poll() is not None  # before the last look at the log
                now, reached = time.perf_counter() - begin, newest_return(folder, window)
                found |= {goal: now / 60 for goal in goals if reached >= goal and goal not in found}
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        raise ValueError(f"{' '.join([trainer, *flags])} ended with an error, which is printed above")
    rows = read_rows(folder)
    tenth = 0.1 * rows[-1]["steps"] if rows else 0.0
    return {f"minutes_to_{goal:g}": found.get(goal, float("nan")) for goal in goals} | {
        "minutes": now / 60, "return": newest_return(folder, tenth)}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--trainer", default="train_s5.py")
    parser.add_argument("--seeds", type=whole(1), default=3)
    parser.add_argument("--goals", type=positive, nargs="+", default=[350.0, 400.0])
    parser.add_argument("--window", type=positive, default=1e6, help="environment steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "minutes_to_400.csv")
    parser.add_argument("--keep", type=Path, help="new folder for the run folders, else they are deleted")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="of the trainer, last on the command line")
    options = parser.parse_args()
    table = Table(options.out)
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seeds):
            row = measure(options.trainer, seed, options.goals, options.window, options.flags,
                          (options.keep or Path(temporary)) / f"seed_{seed}")
            table.add(seed=seed, **row, flags=" ".join(options.flags))
    print(f"return in the last tenth: {each(np.array([row['return'] for row in table.rows]))}")
    for goal in options.goals:
        x = np.array([row[f"minutes_to_{goal:g}"] for row in table.rows])
        reached = np.isfinite(x)
        text = f"{goal:g}: reached by {reached.sum()} of {len(x)} seeds, after {each(x)} minutes"
        if reached.all():  # the mean of the others would be too short
            mean, low, high = map(float, experiment.t_interval(x))
            text += f", mean {mean:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")
        print(text)


if __name__ == "__main__":
    run_main(main)
