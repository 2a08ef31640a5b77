"""What each part of the agent is worth on the six tasks: memory, sysid, observations, privileged critic.

    python benchmarks/parts.py --steps 5000000 --seeds 3    # an hour and a half on two cores
    python benchmarks/parts.py --jobs 0                     # run nothing, make the table of what there is

Every variant is trained anew. Runs are kept in runs/parts/, a process per core. After a kill the same
command goes on; finished runs are skipped. Columns of results/parts.csv:

    mean, low, high, worst  mean return of the six tasks over the last tenth of training, its 95 % t
                            interval over seeds, and the worst seed
    each                    this mean of every seed
    lost, lost_low, lost_high  mean of the first variant minus this mean, and its 95 % interval (Welch)
    one column per task     mean return over seeds
"""

import sys
from pathlib import Path

import numpy as np
from scipy.stats import ttest_ind

from common import RESULTS, Table, each, make_parser, mean_interval, run_main, whole  # first: it finds the project

import envs
from runs import RUNS, Run, add_jobs_flag, launch

S5, NONE = ["--memory", "s5"], ["--memory", "s5", "--reset", "step"]
VARIANTS = {
    "vectors": ("train_s5", []),
    "vectors, blind": ("train_s5", ["--blind"]),
    "vectors, no privileged critic": ("train_s5", ["--no-privileged-critic"]),
    "S5": ("train_s5", S5),
    "LSTM": ("train_lstm", []),
    "no memory": ("train_s5", NONE),
    "vectors, sysid": ("train_s5", ["--sysid"]),
    "S5, sysid": ("train_s5", [*S5, "--sysid"]),
    "LSTM, sysid": ("train_lstm", ["--sysid"]),
    "no memory, sysid": ("train_s5", [*NONE, "--sysid"]),
}


def runs_of(variants: list[str], steps: int, seeds: int) -> list[Run]:
    """Returns a run for every seed and variant, seeds outermost."""
    runs = []
    for seed in range(seeds):
        for variant in variants:
            trainer, flags = VARIANTS[variant]
            name = variant.replace(",", "").replace(" ", "-")
            runs.append(Run(RUNS / "parts" / f"{name}-{steps}-{seed}", trainer, flags, steps, seed, variant))
    return runs


def lost(first: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Returns mean(first) - mean(scores) and its 95 % interval (Welch), NaN without several seeds.

    There is no interval if both are the same runs.
    """
    difference = float(first.mean() - scores.mean())
    low = high = float("nan")
    if first is not scores and min(len(first), len(scores)) > 1 and max(first.std(), scores.std()) > 0:
        low, high = map(float, ttest_ind(first, scores, equal_var=False).confidence_interval())
    return {"lost": difference, "lost_low": low, "lost_high": high}


def write_table(runs: list[Run], path: Path) -> None:
    """Writes a row for every variant of which each seed has begun."""
    table, first = Table(path), None
    for variant in dict.fromkeys(run.variant for run in runs):
        same = [run for run in runs if run.variant == variant]
        if not all(run.reached() for run in same):
            print(f"{variant}: not every seed has begun; left out")
            continue
        by_task = np.array([run.scores() for run in same])  # (seeds, tasks)
        scores = by_task.mean(1)
        first = scores if first is None else first
        table.add(variant=variant, **mean_interval(scores), each=each(scores), steps=min(run.reached() for run in same),
                  **lost(first, scores), **dict(zip(envs.TRAIN_TASKS, by_task.mean(0).tolist())))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=whole(1), default=5_000_000, help="environment steps of a seed")
    parser.add_argument("--seeds", type=whole(1), default=3)
    add_jobs_flag(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "parts.csv")
    options = parser.parse_args()
    runs = runs_of(list(VARIANTS), options.steps, options.seeds)
    failed = launch(runs, options.jobs)
    write_table(runs, options.out)
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_main(main)
