"""Are the bodies learnable? Single tasks without projection, their returns beside published ones.

    python benchmarks/single_task.py                       # a task of each body that the paper leaves out: hours
    python benchmarks/single_task.py --tasks walker-run --total-timesteps 20000000 --seeds 3
    python benchmarks/single_task.py --jobs 0              # run nothing, make the table of what there is

Runs are kept in runs/single_task/, a process per core. After a kill the same command goes on. `return` is
the mean over the last tenth of what was trained, actions sampled; `steps` are those of the slowest seed.
`published` is the return of PPO on mujoco_playground's port of the task after 100 million steps (SLM-Lab,
docs/BENCHMARKS.md, phase 5.1, read in November 2026), empty where there is none.
"""

import sys
from pathlib import Path

from common import RESULTS, Table, each, make_parser, mean_interval, run_main, whole  # first: it finds the project

import dmc
from runs import RUNS, Run, add_jobs_flag, launch

PUBLISHED = {
    "acrobot-swingup": 253, "acrobot-swingup_sparse": 147, "ball_in_cup-catch": 942, "cartpole-balance": 968,
    "cartpole-balance_sparse": 995, "cartpole-swingup": 729, "cartpole-swingup_sparse": 522, "cheetah-run": 883,
    "finger-spin": 713, "finger-turn_easy": 664, "finger-turn_hard": 590, "hopper-hop": 22, "hopper-stand": 237,
    "pendulum-swingup": 637, "point_mass-easy": 868, "reacher-easy": 955, "reacher-hard": 947, "walker-run": 760,
    "walker-stand": 948, "walker-walk": 945}
BODIES = ("cheetah-run", "walker-walk", "acrobot-swingup", "hopper-stand", "cartpole-two_poles")
# the published runs have no action repeat either
FLAGS = ["--projection", "none", "--num-envs", "64", "--action-repeat", "1"]


def runs_of(task: str, steps: int, seeds: int) -> list[Run]:
    return [Run(RUNS / "single_task" / f"{task}-{steps}-{seed}", "train_s5", ["--env", task, *FLAGS], steps,
                seed, "S5", task) for seed in range(seeds)]


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(dmc.TASKS), metavar="TASK", default=BODIES)
    parser.add_argument("--total-timesteps", type=whole(1), default=100_000_000)
    parser.add_argument("--seeds", type=whole(1), default=1)
    add_jobs_flag(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "single_task.csv")
    options = parser.parse_args()
    runs = {task: runs_of(task, options.total_timesteps, options.seeds) for task in options.tasks}
    failed = launch(sum(runs.values(), []), options.jobs)
    reached = {task: min(run.reached() for run in same) for task, same in runs.items()}
    table = Table(options.out)
    for task, same in runs.items():
        if not reached[task]:
            print(f"{task}: not every seed has begun; left out")
            continue
        scores = [run.scores()[0] for run in same]
        columns = mean_interval(scores)
        table.add(task=task, **{"return": columns.pop("mean")}, **columns, each=each(scores),
                  published=PUBLISHED.get(task, ""), steps=reached[task])
    sys.exit(failed > 0)


if __name__ == "__main__":
    run_main(main)
