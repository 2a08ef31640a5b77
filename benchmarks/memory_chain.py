"""How far back can a memory reach, and at what cost? Return, time and space on bsuite's MemoryChain by length.

    python benchmarks/memory_chain.py                              # 10,000 episodes of each length, 5 seeds: hours
    python benchmarks/memory_chain.py --lengths 32 128 --episodes 3000 --trainers s5 lstm --seeds 2

A bit is shown at the first step and asked for `length` steps later: the return is 1 or -1, 0 on average without
memory. The lengths and episodes are those of Lu et al. 2023 (arXiv 2303.03982). An update sees two episodes of each of
8 environments, whatever the length, so that gradients reach an episode's start; lambda is 0.5, because only one action
in an episode counts. Like bsuite's, the agents do not see their own last action: random actions add up in a memory and
drown a bit that was seen once. The transformer attends to a whole episode. All have as many parameters.

Score: mean return over the last tenth of training, with a 95 % interval (t) over seeds. Time is that of training, per
environment step of one seed; space is what XLA plans for the training of one seed.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common import RESULTS, Table, compile_program, plot_into  # first: it finds the project

import experiment
import report
import train_lstm
import train_s5
import train_transformer

TRAINERS = {"s5": train_s5, "lstm": train_lstm, "transformer": train_transformer, "memoryless": train_s5}


def make_config(name, length, episodes, **changes):
    """Configuration of trainer `name` for `episodes` episodes of MemoryChain, changed as asked."""
    steps = length + 1  # of an episode
    special = {"transformer": {"window": steps}, "memoryless": {"memory": "none"}}.get(name, {})
    return experiment.preset(TRAINERS[name].Config, "cpu", **dict(  # the same agent on every machine
        env=("MemoryChain-bsuite",), env_kwargs=(f"memory_length={length}", f"max_steps_in_episode={steps}"),
        total_timesteps=episodes * steps, num_envs=8, num_steps=2 * steps, width=32, lr=1e-3, gae_lambda=0.5,
        anneal_entropy=False, observe_action=False
    ) | special | changes)


def train_seeds(trainer, config, seeds):
    """Train `seeds` seeds of `config`, one after another on a CPU.

    Returns:
      {"returns": mean return over the last tenth of training (seeds,), "parameters": of one agent, "us_per_step":
      microseconds of a seed's step, "megabytes": of a seed's training}.
    """
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(seeds))
    program = compile_program(experiment.over_members(trainer.make_train(config)), keys)
    start = time.perf_counter()
    out = jax.block_until_ready(program.run(keys))
    seconds = time.perf_counter() - start
    returns = np.asarray(out["metrics"]["return"])[..., 0]
    side_by_side = 1 if jax.default_backend() == "cpu" else seeds
    return {"returns": experiment.nanmean(returns[:, -max(1, returns.shape[1] // 10):], 1),
            "parameters": sum(p.size for p in jax.tree.leaves(out["runner"].params)) // seeds,
            "us_per_step": 1e6 * seconds / (seeds * config.num_updates * config.steps_per_update),
            "megabytes": program.megabytes / side_by_side}


def mean_interval(x):
    """Mean and 95 % interval (t) of x (n,) and its worst, as columns."""
    mean, low, high = map(float, report.t_interval(x))
    return {"mean": mean, "low": low, "high": high, "worst": float(x.min()), "seeds": len(x)}


def draw(rows, path, reference=()):
    """Three panels over the length: return, time, space. `reference`: rows of a paper's return, drawn dotted."""
    names = list(dict.fromkeys(row["trainer"] for row in rows))

    def panel(axis, _, column):
        for i, name in enumerate(names):
            mine = sorted((row for row in rows if row["trainer"] == name), key=lambda row: row["length"])
            lengths = [row["length"] for row in mine]
            if column == 0:
                mean, low, high = (np.array([row[k] for row in mine]) for k in ("mean", "low", "high"))
                axis.errorbar(lengths, mean, np.nan_to_num([mean - low, high - mean]), fmt="o-", capsize=3,
                              color=f"C{i}", label=name)
                theirs = [(row["length"], row["return"]) for row in reference if row["trainer"] == name]
                if theirs:
                    axis.plot(*zip(*theirs), ":", color=f"C{i}", label=f"{name}, paper")
            else:
                axis.plot(lengths, [row[("us_per_step", "megabytes")[column - 1]] for row in mine], "o-", label=name)
        label = ("return", "microseconds of training per step", "megabytes of training")[column]
        axis.set(xscale="log", xlabel="steps between the bit and the question", ylabel=label)
        if column == 0:
            axis.set_ylim(-0.4, 1.1)
            axis.legend(fontsize=7)
        else:
            axis.set_yscale("log")

    plot_into(path, 1, 3, panel)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**k for k in range(2, 12)])
    parser.add_argument("--trainers", nargs="+", default=["s5", "lstm", "transformer"], choices=list(TRAINERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=10_000, help="of each length and seed")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_chain.csv", help="the picture goes beside it")
    options = parser.parse_args()
    table = Table(options.out)
    for name in options.trainers:
        for length in options.lengths:
            config = make_config(name, length, options.episodes, width=options.width, lr=options.lr)
            found = train_seeds(TRAINERS[name], config, options.seeds)
            table.add(length=length, trainer=name, **mean_interval(found.pop("returns")), **found,
                      episodes=options.episodes, steps=config.num_updates * config.steps_per_update)
    draw(table.rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
