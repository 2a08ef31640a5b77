"""What training several seeds in one compiled function saves over separate runs, compilation included.

    python benchmarks/seeds.py --seeds 8

Separate: each run traces, compiles and trains on its own, as separate processes do (imports not counted). Both
sides train the same seeds of CartPole-v1 for the same number of steps, in this process, without a compilation cache.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import train_s5  # noqa: E402


def train_seconds(config, seeds):
    """Seconds from nothing compiled to `seeds` trained together."""
    jax.clear_caches()
    start = time.perf_counter()
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    jax.block_until_ready(jax.jit(jax.vmap(train_s5.make_train(config)))(keys))
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    config = train_s5.Config(env=("CartPole-v1",), num_lanes=32, total_steps=options.steps)
    train_seconds(config, [0])  # warm up imports and the backend
    separate = sum(train_seconds(config, [seed]) for seed in range(options.seeds))
    together = train_seconds(config, range(options.seeds))
    print(f"{options.seeds} seeds x {options.steps:,} steps of CartPole-v1: separate {separate:.1f} s, together "
          f"{together:.1f} s, ratio {separate / together:.2f}")


if __name__ == "__main__":
    main()
