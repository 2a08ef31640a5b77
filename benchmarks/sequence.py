"""What a memory costs against the length of the sequence: S5, LSTM, GRU and a causal transformer.

    python benchmarks/sequence.py                                  # lengths 64 ... 16384, batches 1, 16, 64
    python benchmarks/sequence.py --width 256 --layers 4           # the released S5 configuration's sizes

All have the same width and number of blocks and are the trainers' own memories: S5 with as many states as the
width (and its two scans), LSTM and GRU with as many units, flax's cells scanned; attention over the whole
sequence, in chunks that also meet its empty cache, 4 heads of width / 4 and twice the width inside its dense
part. Three costs:

    forward            the whole sequence, from an empty state
    forward+backward   and the gradient of the mean square output with respect to the parameters
    acting             one step of a compiled loop of steps. The transformer attends to a cache of `length`
                       keys and values. The others' cost does not depend on the length: one row, at the
                       shortest (and one for S5, whose scans act alike)

Megabytes are temporaries and outputs as XLA plans them. A model goes no further once the next length, at the
same time per token, would take longer than --limit seconds, or once the planned memory exceeds --memory.
Fitted exponents (time ~ length^x over the longest three lengths) are printed and stand in the PNG's legends.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common import RESULTS, Table, compile_program, plot_into, seconds  # first: it finds the project

import train_lstm
import train_s5
import train_transformer

COSTS = ("forward", "forward+backward", "acting")
ACTING_STEPS = 64  # of one call


def make_models(width, layers):
    """{name: function of the sequence length that gives the memory module}."""
    def s5(scan):
        config = train_s5.Config(width=width, layers=layers, state_size=width, scan=scan)
        return lambda length: train_s5.make_memory(config, None)

    def attention(length):
        config = train_transformer.Config(width=width, layers=layers, window=length, heads=4,
                                          head_size=width // 4, hidden_size=2 * width)
        return train_transformer.make_memory(config, None)

    def recurrent(cell):
        config = train_lstm.Config(width=width, layers=layers, hidden_size=width, cell=cell)
        return lambda length: train_lstm.make_memory(config, None)

    return {"S5 sequential": s5("sequential"), "S5 parallel": s5("parallel"), "LSTM": recurrent("lstm"),
            "GRU": recurrent("gru"), "transformer": attention}


def program(memory, cost, length, batch, width):
    """(Program, its arguments, number of parameters) of one cost."""
    key = jax.random.PRNGKey(0)
    steps = ACTING_STEPS if cost == "acting" else length
    x, reset = jax.random.normal(key, (steps, batch, width)), jnp.zeros((steps, batch), bool)
    state = memory.zero_state((batch,))
    params = memory.init(key, state, x[:1], reset[:1])
    if cost == "acting" and isinstance(memory, train_transformer.Memory):  # a full cache
        state = tuple(cache._replace(length=jnp.full(batch, length)) for cache in state)

    def forward(params, state, x, reset):
        return memory.apply(params, state, x, reset)[1]

    def loss(*args):
        return (forward(*args) ** 2).mean()

    def acting(params, state, x, reset):
        prepared = memory.apply(params, method="prepare")

        def step(s, inputs):
            return memory.apply(params, prepared, s, *inputs, method="step")

        return jax.lax.scan(step, state, (x, reset))

    function = {"forward": forward, "forward+backward": jax.value_and_grad(loss), "acting": acting}[cost]
    args = params, state, x, reset
    return compile_program(function, *args), args, sum(p.size for p in jax.tree.leaves(params))


def exponent(points):
    """Slope of log time against log length over the last three (length, time); NaN for fewer than two."""
    x, y = np.log(np.array(points[-3:])).T
    return np.polyfit(x, y, 1)[0] if len(x) > 1 else float("nan")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024, 4096, 16384])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--width", type=int, default=64, help="a multiple of 4")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=4.0, help="seconds of a call")
    parser.add_argument("--memory", type=float, default=2.0, help="gigabytes of a call")
    parser.add_argument("--out", type=Path, default=RESULTS / "sequence.csv", help="a picture goes beside it")
    options = parser.parse_args()
    table = Table(options.out)
    lines = {}  # (cost, batch, model) -> [(length, milliseconds)]
    for batch in options.batches:
        for name, make in make_models(options.width, options.layers).items():
            for cost in COSTS:
                points = lines.setdefault((cost, batch, name), [])
                for length in sorted(options.lengths):
                    if cost == "acting" and (name == "S5 parallel" or points and name != "transformer"):
                        break
                    if points and points[-1][1] * length / points[-1][0] > 1e3 * options.limit:
                        break
                    compiled, args, parameters = program(make(length), cost, length, batch, options.width)
                    if compiled.megabytes > 1e3 * options.memory:
                        break
                    took = seconds(compiled.run, *args, repeats=options.repeats, budget=options.limit)
                    took /= ACTING_STEPS if cost == "acting" else 1
                    points.append((length, 1e3 * took))
                    tokens = batch * (1 if cost == "acting" else length)
                    table.add(model=name, batch=batch, cost=cost, length=length, ms=1e3 * took,
                              tokens_per_s=round(tokens / took), megabytes=compiled.megabytes,
                              compile_s=compiled.compile_s, parameters=parameters)

    print("\nfitted exponents, time ~ length^x over the longest three lengths reached")
    for (cost, batch, name), points in lines.items():
        if len(points) > 1:
            print(f"{cost:18s} batch {batch:4d} {name:14s} {exponent(points):6.2f}",
                  f"  ({points[-1][0]} the longest)")

    def draw(axis, i, j):
        cost, batch = COSTS[i], options.batches[j]
        for k, name in enumerate(make_models(options.width, options.layers)):
            points = lines[cost, batch, name]
            if not points:
                continue
            if cost == "acting" and name != "transformer":
                axis.axhline(points[0][1], color=f"C{k}", label=name)
            else:
                label = f"{name}: {exponent(points):.2f}" if len(points) > 1 else name
                axis.loglog(*zip(*points), "o-", ms=3, color=f"C{k}", label=label)
        axis.set(xscale="log", yscale="log", title=f"{cost}, batch {batch}", xlabel="length",
                 ylabel="ms per step" if cost == "acting" else "ms")
        axis.legend(fontsize=7)

    plot_into(options.out.with_suffix(".png"), len(COSTS), len(options.batches), draw)


if __name__ == "__main__":
    main()
