"""What a memory costs against the length of the sequence: S5, LSTM, GRU and a causal transformer.

    python benchmarks/sequence.py                                  # lengths 64 ... 16384, batches 1, 16, 64
    python benchmarks/sequence.py --width 256 --layers 4           # the sizes of the released S5 configuration

All have the same width and number of blocks and are the trainers' own memories: S5 with as many states as the
width (and either scan), LSTM and GRU with as many parameters, attention over the whole sequence with 4 heads
of width / 4 and twice the width inside its dense part. Three costs:

    forward            the whole sequence, from a zero state
    forward+backward   and the gradient of the mean square output with respect to the parameters
    acting             one step of a compiled loop of steps. The transformer attends to a cache of `length`
                       keys and values. The cost of the others does not depend on the length: one row

Megabytes are temporaries and outputs as XLA plans them. A memory goes no further once the next length, at the
same time per token, would take longer than 4 seconds, or the planned megabytes exceed 2,000. The
fitted exponents (time ~ length^x over the longest three lengths) stand in the figure's legends.
"""

from functools import partial
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from common import (  # first: it finds the project
    COLOURS,
    RESULTS,
    WORDS,
    Program,
    Table,
    add_legend,
    compile_program,
    device,
    log_axis,
    make_parser,
    numbers,
    plot_into,
    run_main,
    seconds,
    whole,
)

import experiment
import train_lstm
import train_s5

train_transformer = experiment.import_trainer("train_transformer")  # an example
COSTS = ("forward", "forward+backward", "acting")
ACTING_STEPS = 64  # of one call
LIMIT = 4.0  # seconds of a call
LARGEST = 2.0  # gigabytes of a call


def make_memories(width: int, layers: int) -> dict[str, Callable]:
    """Returns {name: function of the sequence length that makes the memory}."""
    def s5(scan, length):
        return train_s5.Memory(features=width, state_size=width, layers=layers, scan=scan)

    def recurrent(cell, length):
        return train_lstm.make_memory(train_lstm.Config(width=width, layers=layers, cell=cell))

    def attention(length):
        return train_transformer.make_memory(train_transformer.Config(
            width=width, layers=layers, window=length, heads=4, head_size=width // 4, hidden_size=2 * width))

    return {"S5 sequential": partial(s5, "sequential"), "S5 parallel": partial(s5, "parallel"),
            "LSTM": partial(recurrent, "lstm"), "GRU": partial(recurrent, "gru"), "transformer": attention}


def compile_cost(memory: Any, cost: str, length: int, batch: int, width: int) -> tuple[Program, tuple, int]:
    """Returns (Program, its arguments, number of parameters) of one cost."""
    key = jax.random.PRNGKey(0)
    steps = ACTING_STEPS if cost == "acting" else length
    x = jax.random.normal(key, (steps, batch, width))
    reset = jnp.zeros((steps, batch), bool)
    hidden = memory.zero_state((batch,))
    params = jax.jit(memory.init)(key, hidden, x[:1], reset[:1])
    if cost == "acting" and isinstance(memory, train_transformer.Memory):  # a full cache
        hidden = tuple(cache._replace(length=jnp.full(batch, length)) for cache in hidden)

    def forward(params, hidden, x, reset):
        return memory.apply(params, hidden, x, reset)[1]

    def loss(*args):
        return (forward(*args) ** 2).mean()

    def acting(params, hidden, x, reset):
        def step(hidden, inputs):
            return memory.apply(params, hidden, *inputs, method="step")

        return jax.lax.scan(step, hidden, (x, reset))

    function = {"forward": forward, "forward+backward": jax.value_and_grad(loss), "acting": acting}[cost]
    args = params, hidden, x, reset
    return compile_program(function, *args), args, sum(p.size for p in jax.tree.leaves(params))


def measure(name: str, make: Callable, cost: str, batch: int, options: Any, table: Table) -> None:
    """Adds a row for every length that a memory reaches."""
    points = []
    for length in sorted(options.lengths):
        once = cost == "acting" and name != "transformer"  # its cost does not depend on the length
        if points and (once or points[-1][1] * length / points[-1][0] > 1e3 * LIMIT):
            break
        program, args, parameters = compile_cost(make(length), cost, length, batch, options.width)
        if program.megabytes > 1e3 * LARGEST:
            break
        took = seconds(program.run, *args, repeats=options.repeats, budget=LIMIT)
        took /= ACTING_STEPS if cost == "acting" else 1
        points.append((length, 1e3 * took))
        tokens = batch * (1 if cost == "acting" else length)
        table.add(model=name, batch=batch, cost=cost, length=length, ms=1e3 * took,
                  tokens_per_s=round(tokens / took), megabytes=program.megabytes,
                  compile_s=program.compile_s, parameters=parameters)


def exponent(points: list[tuple]) -> float:
    """Returns the slope of log time against log length over the last three (length, time), or NaN."""
    if len(points) < 2:
        return float("nan")
    return np.polyfit(*np.log(np.array(points[-3:])).T, 1)[0]


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Writes a panel for each cost and batch: milliseconds against the length."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))

    def panel(axis, i, j):
        mine = [row for row in rows if (row["cost"], row["batch"]) == (COSTS[i], batches[j])]
        for name in dict.fromkeys(row["model"] for row in mine):
            points = list(zip(*numbers([row for row in mine if row["model"] == name], "length", "ms")))
            word = WORDS.get(name, name)
            style = dict(color=COLOURS[word.split()[0]], linestyle=":" if "parallel" in word else "-")
            if len(points) == 1:
                axis.axhline(points[0][1], label=f"{word}, any length", **style)
            else:
                axis.plot(*zip(*points), label=f"{word}, length^{exponent(points):.1f}", marker="o", ms=3, **style)
        axis.set(title=f"{COSTS[i]}, batch {batches[j]}", xlabel="sequence length (steps)",
                 ylabel="milliseconds per step" if COSTS[i] == "acting" else "milliseconds")
        log_axis(axis, "x", [4**k for k in range(1, 9)])
        log_axis(axis, "y")
        add_legend(axis)

    plot_into(path, len(COSTS), len(batches), panel, title, size=(3.9, 3.2))


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", help="names as in the table (default: all)")
    parser.add_argument("--lengths", type=whole(1), nargs="+", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--batches", type=whole(1), nargs="+", default=[1, 16, 64])
    parser.add_argument("--width", type=whole(4), default=64, help="a multiple of 4")
    parser.add_argument("--layers", type=whole(1), default=2)
    parser.add_argument("--repeats", type=whole(1), default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "sequence.csv", help="a picture goes beside it")
    options = parser.parse_args()
    if options.width % 4:
        parser.error(f"--width must be a multiple of 4, got {options.width}")
    memories = make_memories(options.width, options.layers)
    unknown = set(options.models or ()) - set(memories)
    if unknown:
        parser.error(f"unknown model {min(unknown)!r}; known: {', '.join(memories)}")
    memories = {name: memories[name] for name in options.models or memories}
    table = Table(options.out)
    for batch in options.batches:
        for name, make in memories.items():
            for cost in COSTS:
                if (cost, name) != ("acting", "S5 parallel"):  # either scan acts alike
                    measure(name, make, cost, batch, options, table)
    draw(table.rows, options.out.with_suffix(".png"), device())


if __name__ == "__main__":
    run_main(main)
