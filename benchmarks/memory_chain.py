"""How far back can a memory reach? Return on bsuite's MemoryChain by length, at equal steps and parameters.

    python benchmarks/memory_chain.py                              # S5, LSTM and no memory, lengths 2 ... 512
    python benchmarks/memory_chain.py --lengths 32 --total-timesteps 200000 --trainers s5

A bit is shown at the first step and asked for `length` steps later: the return is 1 or -1, 0 on average without
memory. Rollouts hold at least one whole episode, so that gradients reach its start; lambda is 0.5, because only
one action in an episode counts. Score: mean return over the last tenth of training, with a 95 % interval (t) over
seeds.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student

from common import RESULTS, Table, plot_into  # first: it finds the project

import experiment
import train_lstm
import train_s5

TRAINERS = {"s5": (train_s5, {}), "lstm": (train_lstm, {}), "memoryless": (train_s5, {"memory": "none"})}
STEPS_PER_UPDATE = 4096


def final_returns(trainer, config, seeds):
    """Mean returns over the last tenth of training (seeds,) and the number of parameters of one agent."""
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(seeds))
    out = jax.jit(experiment.over_members(trainer.make_train(config)))(keys)
    returns = np.asarray(out["metrics"]["return"])[..., 0]
    params = sum(p.size for p in jax.tree.leaves(out["runner"].params)) // seeds
    return experiment.nanmean(returns[:, -max(1, returns.shape[1] // 10):], 1), params


def mean_interval(x):
    """Mean and 95 % interval (t) of x (n,) and its worst, as columns."""
    half = student.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x)**0.5 if len(x) > 1 else np.nan
    mean = float(x.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "worst": float(x.min()), "seeds": len(x)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 8, 32, 128, 256, 512])
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--total-timesteps", type=int, default=600_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_chain.csv", help="the picture goes beside it")
    options = parser.parse_args()
    table = Table(options.out)
    for name in options.trainers:
        trainer, changes = TRAINERS[name]
        for length in options.lengths:
            num_steps = max(128, 2 * length)
            config = trainer.Config(
                env=("MemoryChain-bsuite",), env_kwargs=(f"memory_length={length}",), width=options.width,
                num_envs=max(4, STEPS_PER_UPDATE // num_steps), num_steps=num_steps,
                total_timesteps=options.total_timesteps, lr=options.lr, gae_lambda=0.5, **changes)
            found, params = final_returns(trainer, config, options.seeds)
            table.add(length=length, trainer=name, **mean_interval(found), parameters=params,
                      steps=config.num_updates * config.steps_per_update)

    def draw(axis, *_):
        for name in options.trainers:
            rows = [row for row in table.rows if row["trainer"] == name]
            mean, low, high = (np.array([row[k] for row in rows]) for k in ("mean", "low", "high"))
            axis.errorbar([row["length"] for row in rows], mean, np.nan_to_num([mean - low, high - mean]), fmt="o-",
                          capsize=3, label=name)
        axis.axhline(0.95, ls=":", color="grey")
        axis.set(xscale="log", xlabel="steps between the bit and the question", ylabel="return", ylim=(-0.3, 1.1))
        axis.legend()

    plot_into(options.out.with_suffix(".png"), 1, 1, draw)


if __name__ == "__main__":
    main()
