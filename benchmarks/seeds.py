"""Many seeds in one compiled function against as many runs of one seed each, compilation included.

    python benchmarks/seeds.py                                     # CartPole-v1, 200,000 steps a seed, 8 seeds
    python benchmarks/seeds.py --seeds 8 32 128                    # on an accelerator
    python benchmarks/seeds.py --env finger-spin --total-timesteps 1000000

Together they run as in experiment.py: side by side on an accelerator, one after another on a CPU. The
separate runs are one run, measured once, times the number of seeds. Nothing is cached.
"""

import time
from pathlib import Path
from typing import Callable

import jax
import jax.numpy as jnp

from common import RESULTS, Table, make_parser, run_main, whole  # first: it finds the project

import devices
import train_s5


def run(function: Callable, *args) -> tuple[float, float]:
    """Returns (seconds to compile, seconds to run) of jax.jit(function)(*args)."""
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    middle = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return middle - start, time.perf_counter() - middle


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--env", nargs="+", default=["CartPole-v1"])
    parser.add_argument("--seeds", type=whole(1), nargs="+", default=[8])
    parser.add_argument("--total-timesteps", type=whole(1), default=200_000, help="of one seed")
    parser.add_argument("--num-envs", type=whole(1), default=192)
    parser.add_argument("--out", type=Path, default=RESULTS / "seeds.csv")
    options = parser.parse_args()
    train = train_s5.make_train(train_s5.Config(
        env=tuple(options.env), total_timesteps=options.total_timesteps, num_envs=options.num_envs))
    one_compile, one_run = run(train, jax.random.PRNGKey(0))
    table = Table(options.out)
    for seeds in options.seeds:
        keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(seeds))
        together_compile, together_run = run(devices.over_agents(train), keys)
        table.add(seeds=seeds, separate_s=seeds * (one_compile + one_run), separate_run_s=seeds * one_run,
                  together_s=together_compile + together_run, together_run_s=together_run,
                  ratio=seeds * (one_compile + one_run) / (together_compile + together_run))


if __name__ == "__main__":
    run_main(main)
