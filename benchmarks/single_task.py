"""Are the bodies learnable? Single tasks without projection, returns beside published ones.

    python benchmarks/single_task.py                       # a task of each body that the paper leaves out
    python benchmarks/single_task.py --tasks walker-run --total-timesteps 20000000 --seeds 3

`return` is that of the last tenth of training, actions sampled. `published` is PPO's on mujoco_playground's port of the
task after 100 million steps: SLM-Lab, docs/BENCHMARKS.md, phase 5.1, read in November 2026. Empty: none there.
"""

import argparse
from pathlib import Path

from common import RESULTS, Table  # first: it finds the project

import dmc
import train_s5
from memory_chain import mean_interval, train_seeds

PUBLISHED = {
    "acrobot-swingup": 253, "acrobot-swingup_sparse": 147, "ball_in_cup-catch": 942, "cartpole-balance": 968,
    "cartpole-balance_sparse": 995, "cartpole-swingup": 729, "cartpole-swingup_sparse": 522, "cheetah-run": 883,
    "finger-spin": 713, "finger-turn_easy": 664, "finger-turn_hard": 590, "hopper-hop": 22, "hopper-stand": 237,
    "pendulum-swingup": 637, "point_mass-easy": 868, "reacher-easy": 955, "reacher-hard": 947, "walker-run": 760,
    "walker-stand": 948, "walker-walk": 945}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(dmc.TASKS), metavar="TASK", default=[
        "walker-walk", "cheetah-run", "hopper-stand", "acrobot-swingup", "cartpole-two_poles"])
    parser.add_argument("--total-timesteps", type=int, default=3_000_000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "single_task.csv")
    options = parser.parse_args()
    table = Table(options.out)
    for task in options.tasks:
        config = train_s5.Config(env=(task,), projection="none", num_envs=64, action_repeat=1,  # as the published ones
                                 total_timesteps=options.total_timesteps)
        found = mean_interval(train_seeds(train_s5, config, options.seeds)["returns"])
        table.add(task=task, **{"return": found.pop("mean")}, **found, published=PUBLISHED.get(task, ""),
                  steps=config.num_updates * config.steps_per_update)


if __name__ == "__main__":
    main()
