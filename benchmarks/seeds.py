"""Eight seeds in one compiled function against eight runs of one seed each, compilation included.

    python benchmarks/seeds.py                                              # CartPole-v1, 200,000 steps a seed
    python benchmarks/seeds.py --env finger-spin --seeds 4 --total-timesteps 1000000

Together they run as in the trainers: side by side on an accelerator, one after another on a CPU. Both sides compile
from nothing: no persistent cache, and jax's own caches are cleared before every run.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from common import RESULTS, Table  # first: it finds the project

import experiment
import train_s5


def run(function, *args):
    """(seconds to compile, seconds to run) of jax.jit(function)(*args), nothing cached."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    middle = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return middle - start, time.perf_counter() - middle


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["CartPole-v1"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--total-timesteps", type=int, default=200_000, help="of one seed")
    parser.add_argument("--num-envs", type=int, default=train_s5.Config().num_envs)
    parser.add_argument("--out", type=Path, default=RESULTS / "seeds.csv")
    options = parser.parse_args()
    config = train_s5.Config(env=tuple(options.env), total_timesteps=options.total_timesteps,
                             num_envs=options.num_envs)
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(options.seeds))
    separate = [run(train_s5.make_train(config), key) for key in keys]
    together = run(experiment.over_members(train_s5.make_train(config)), keys)
    table = Table(options.out)
    for name, (compile_s, run_s) in (("separate", map(sum, zip(*separate))), ("together", together)):
        table.add(seeds=name, compile_s=compile_s, run_s=run_s, total_s=compile_s + run_s)
    total = [row["total_s"] for row in table.rows]
    print(f"\n{options.seeds} seeds together take {total[0] / total[1]:.2f} times less time than separately")


if __name__ == "__main__":
    main()
