"""Are the bodies learnable? Single tasks without projection, returns beside published ones.

    python benchmarks/single_task.py                       # a task of each body that the paper leaves out: hours
    python benchmarks/single_task.py --tasks walker-run --total-timesteps 20000000 --seeds 3
    python benchmarks/single_task.py --jobs 0              # run nothing, make the table of what there is

Runs live in runs/single_task/, a process per core. Kill it at any moment: the same command goes on where it was.
`return` is that of the last tenth of what was trained, actions sampled, `steps` how far the slowest seed has come.
`published` is PPO's on mujoco_playground's port of the task after 100 million steps: SLM-Lab, docs/BENCHMARKS.md, phase
5.1, read in November 2026. Empty: none there.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from common import RESULTS, ROOT, Table  # first: it finds the project

import dmc
import experiment
from memory_chain import mean_interval
from reproduce import Run, launch

PUBLISHED = {
    "acrobot-swingup": 253, "acrobot-swingup_sparse": 147, "ball_in_cup-catch": 942, "cartpole-balance": 968,
    "cartpole-balance_sparse": 995, "cartpole-swingup": 729, "cartpole-swingup_sparse": 522, "cheetah-run": 883,
    "finger-spin": 713, "finger-turn_easy": 664, "finger-turn_hard": 590, "hopper-hop": 22, "hopper-stand": 237,
    "pendulum-swingup": 637, "point_mass-easy": 868, "reacher-easy": 955, "reacher-hard": 947, "walker-run": 760,
    "walker-stand": 948, "walker-walk": 945}


def runs_of(task, steps, seeds):
    """A run folder for every seed; an action lasts one step, as where the published returns come from."""
    return [Run(ROOT / "runs" / "single_task" / f"{task}-{steps}-{seed}",
                ["train_s5.py", "--env", task, "--projection", "none", "--num-envs", "64", "--action-repeat", "1",
                 "--total-timesteps", str(steps), "--seed", str(seed), "--preset", "cpu", "--devices", "1",
                 "--no-evaluate", "--no-tensorboard"], steps, "S5", seed, task) for seed in range(seeds)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(dmc.TASKS), metavar="TASK", default=[
        "cheetah-run", "walker-walk", "acrobot-swingup", "hopper-stand", "cartpole-two_poles"])
    parser.add_argument("--total-timesteps", type=int, default=100_000_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=experiment.num_cores(), help="processes (default: one per core)")
    parser.add_argument("--out", type=Path, default=RESULTS / "single_task.csv")
    options = parser.parse_args()
    if options.jobs < 0 or options.seeds < 1:
        parser.error(f"--jobs must not be negative and --seeds at least 1, got {options.jobs} and {options.seeds}")
    runs = {task: runs_of(task, options.total_timesteps, options.seeds) for task in options.tasks}
    try:
        failed = launch(sum(runs.values(), []), options.jobs) if options.jobs else 0
        reached = {task: [run.reached() for run in members] for task, members in runs.items()}
    except ValueError as error:  # a run folder that was made with other flags
        parser.error(str(error))
    table = Table(options.out)
    for task, members in runs.items():
        steps = reached[task]
        if not all(steps):
            print(f"{task}: not every seed has begun, so it is left out")
            continue
        scores = [experiment.final_scores(*experiment.read_run(run.path), run.path)[0, 0] for run in members]
        found = mean_interval(np.asarray(scores))
        table.add(task=task, **{"return": found.pop("mean")}, **found, published=PUBLISHED.get(task, ""),
                  steps=min(steps))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
