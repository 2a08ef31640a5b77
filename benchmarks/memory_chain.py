"""How far back a memory reaches, and at what cost: return, time and space on bsuite's MemoryChain by length.

    python benchmarks/memory_chain.py                              # 10,000 episodes a length, 5 seeds: hours
    python benchmarks/memory_chain.py --lengths 32 128 --episodes 3000 --memories s5 lstm --seeds 2

A bit is observed in the first step and asked for `length` steps later. The return is 1 or -1, on average 0
without memory. Lengths and episodes are those of Lu et al. (arXiv 2303.03982). A rollout holds two episodes
of each of 8 environments, so that gradients reach an episode's start. Lambda is 0.5, because only one action
of an episode counts. As in bsuite, agents do not observe their previous action: random actions add up in a
memory and drown a bit that was observed once. The transformer attends to a whole episode. All memories have as
many parameters.

Columns: mean return over the last tenth of training with a 95 % t interval over seeds; microseconds of
training per environment step of one seed; megabytes that XLA plans for the training of one seed.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common import (  # first: it finds the project
    COLOURS,
    OURS,
    PAPER_STYLE,
    RESULTS,
    WORDS,
    Table,
    compile_program,
    device,
    each,
    final_returns,
    log_axis,
    make_parser,
    mean_interval,
    numbers,
    plot_into,
    positive,
    run_main,
    whole,
)

import devices
import experiment
import train_lstm
import train_s5

train_transformer = experiment.import_trainer("train_transformer")  # an example
# a trainer, and the sizes of its memory: the same on every machine, equal in parameters at width 32
MEMORIES = {
    "s5": (train_s5, {"layers": 3, "state_size": 32}),
    "lstm": (train_lstm, {"layers": 1}),
    "transformer": (train_transformer, {"layers": 2, "heads": 2, "head_size": 16, "hidden_size": 34}),
    "none": (train_s5, {"layers": 3, "state_size": 32, "reset": "step"}),
}


def make_config(name: str, length: int, episodes: int, **changes: Any) -> Any:
    """Returns the Config for `episodes` episodes of MemoryChain with the memory `name`."""
    trainer, sizes = MEMORIES[name]
    steps = length + 1  # of an episode
    fields = dict(
        env=("MemoryChain-bsuite",), observe_action=False,
        env_kwargs=(f"memory_length={length}", f"max_steps_in_episode={steps}"),
        total_timesteps=episodes * steps, num_envs=8, num_steps=2 * steps, num_minibatches=4,
        width=32, lr=1e-3, gae_lambda=0.5, anneal="lr", **sizes)
    if name == "transformer":
        fields["window"] = steps
    return trainer.Config(**fields | changes)


def train_seeds(name: str, config: Any, seeds: int) -> dict[str, Any]:
    """Trains `seeds` seeds, one after another on a CPU.

    Returns:
      "returns": (seeds,) see common.final_returns. "parameters": of one agent.
      "us_per_step", "megabytes": of one seed.
    """
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(seeds))
    train = MEMORIES[name][0].make_train(config)
    program = compile_program(devices.over_agents(train), keys)
    start = time.perf_counter()
    out = jax.block_until_ready(program.run(keys))
    seconds = time.perf_counter() - start
    side_by_side = 1 if jax.default_backend() == "cpu" else seeds
    return {"returns": final_returns(out["metrics"], config.log_every)[:, 0],
            "parameters": sum(p.size for p in jax.tree.leaves(out["runner"].params)) // seeds,
            "us_per_step": 1e6 * seconds / (seeds * config.num_updates * config.steps_per_update),
            "megabytes": program.megabytes / side_by_side}


def draw(rows: list[dict], path: Path, reference: list[dict] = (), title: str = "") -> None:
    """Writes three panels over the length: return, time, space.

    Args:
      rows: of the table.
      path: of the PNG.
      reference: {"memory", "length", "return"} of a paper, drawn dashed.
      title: of the figure.
    """
    labels = {"mean": "return (0: chance, 1: perfect)", "us_per_step": "microseconds of training per step",
              "megabytes": "megabytes of training"}

    def panel(axis, _, column):
        y = list(labels)[column]
        for name in dict.fromkeys(row["memory"] for row in rows):
            word = WORDS.get(name, name)
            lengths, values, worst = numbers([row for row in rows if row["memory"] == name], "length", y, "worst")
            order = np.argsort(lengths)
            axis.plot(lengths[order], values[order], color=COLOURS[word], label=f"ours, {word}", **OURS)
            if y == "mean":
                axis.fill_between(lengths[order], worst[order], values[order], color=COLOURS[word], alpha=0.15, lw=0)
                theirs = numbers([row for row in reference if row["memory"] == name], "length", "return")
                if len(theirs[0]):
                    axis.plot(*theirs, color=COLOURS[word], label=f"paper, {word}", **PAPER_STYLE)
        axis.set(xlabel="episode length (steps)", ylabel=labels[y])
        log_axis(axis, "x", [4**k for k in range(1, 7)])
        if y == "mean":
            axis.set(ylim=(-0.4, 1.05), title="shade: down to the worst seed")
        else:
            log_axis(axis, "y")

    plot_into(path, 1, 3, panel, title, legend=6)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", type=whole(1), nargs="+", default=[2**k for k in range(2, 12)])
    parser.add_argument("--memories", nargs="+", default=["s5", "lstm", "transformer"], choices=list(MEMORIES))
    parser.add_argument("--seeds", type=whole(1), default=5)
    parser.add_argument("--episodes", type=whole(1), default=10_000, help="of each length and seed")
    parser.add_argument("--width", type=whole(1), default=32)
    parser.add_argument("--lr", type=positive, default=1e-3)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_chain.csv", help="a picture goes beside it")
    options = parser.parse_args()
    table = Table(options.out)
    for name in options.memories:
        for length in options.lengths:
            config = make_config(name, length, options.episodes, width=options.width, lr=options.lr)
            found = train_seeds(name, config, options.seeds)
            returns = found.pop("returns")
            table.add(length=length, memory=name, **mean_interval(returns), **found, episodes=options.episodes,
                      steps=config.num_updates * config.steps_per_update, each=each(returns))
    draw(table.rows, options.out.with_suffix(".png"), title=device())


if __name__ == "__main__":
    run_main(main)
