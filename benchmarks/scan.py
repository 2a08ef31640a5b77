"""The linear recurrence of S5, four ways, against the time that moving its bytes would take.

    python benchmarks/scan.py                                       # a grid that suits this device
    python benchmarks/scan.py --lengths 128 --batches 64 --states 64 128 256
    python benchmarks/scan.py --lengths 128 --batches 64 1536 --states 256 --target benchmarks/h100.txtpb

    parallel     s5.linear_recurrence(scan="parallel"): an associative scan over all T steps
    sequential   s5.linear_recurrence(scan="sequential"): a loop of T steps
    unrolled     the same with 16 steps in a turn of the loop
    chunked      a loop over chunks of --chunk steps, an associative scan within each

Shapes as in training: one a (P/2,) for all steps, b (T, B, P/2), x0 (B, P/2), all complex64, and resets
(T, B), one in about a hundred. P states are P/2 complex numbers of 8 bytes: (T, B, P/2) is 4 T B P bytes.

    forward            reads b, x0 and the resets, writes x: 8 T B P + T B + 4 B P
    forward+backward   given the cotangent of x, also the gradients of a, b and x0. The backward pass reads
                       the cotangent, the saved x, the resets and x0 and writes the gradients of b and x0:
                       20 T B P + 2 T B + 12 B P in all

a and its gradient, a few hundred bytes, are left out. floor_ms is these bytes over the rate at which this
device, in this process, negates a large array in place (bytes read plus written); times_floor is ms over it.
Data smaller than a cache can go under that floor. kernels are those of the compiled program and times_bytes
the bytes that they move over the least, both as hlo.py counts them. --target only compiles, for the GPU that
a file describes (hlo.py), and takes the floor from the bandwidth stated there. What would need more than
--memory is left out, and says so. Medians of several calls, synchronised, after a warm-up.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp

from common import RESULTS, Table, compile_program, plot_into, seconds  # first: it finds the project

from hlo import count, describe, parse
from s5 import linear_recurrence

COSTS, SCANS = ("forward", "forward+backward"), ("parallel", "sequential", "unrolled", "chunked")
GRIDS = {True: dict(lengths=[128, 1024, 4096], batches=[16, 64], states=[64]),  # CPU
         False: dict(lengths=[128, 512, 2048, 16384], batches=[16, 128, 1024, 4096], states=[64, 128, 256])}


def chunked_recurrence(a, b, x0, reset, chunk):
    """linear_recurrence for a (P/2,), chunk by chunk. `chunk` divides T: ValueError if it does not."""
    if len(b) % chunk:
        raise ValueError(f"chunk={chunk} does not divide the length {len(b)}")

    def step(x, inputs):
        x = linear_recurrence(a, inputs[0], x, inputs[1], "parallel")
        return x[-1], x

    chunks = jax.tree.map(lambda v: v.reshape(-1, chunk, *v.shape[1:]), (b, reset))
    return jax.lax.scan(step, x0, chunks)[1].reshape(b.shape)


def recurrence(scan, chunk):
    """function(a, b, x0, reset) -> x by the name in SCANS."""
    if scan == "chunked":
        return lambda a, b, x0, reset: chunked_recurrence(a, b, x0, reset, min(chunk, len(b)))
    kwargs = {"scan": "sequential", "unroll": 16} if scan == "unrolled" else {"scan": scan}
    return lambda a, b, x0, reset: linear_recurrence(a, b, x0, reset, **kwargs)


def forward_backward(function):
    """function(a, b, x0, reset, dx) -> x and the gradients of a, b and x0; dx (T, B, P/2): cotangent of x."""
    def both(a, b, x0, reset, dx):
        x, pull = jax.vjp(lambda *v: function(*v, reset), a, b, x0)
        return x, *pull(dx)
    return both


def least_bytes(cost, length, batch, states):
    """Bytes that must move, as counted above."""
    whole, flags, one = 4 * length * batch * states, length * batch, 4 * batch * states
    return 2 * whole + flags + one if cost == "forward" else 5 * whole + 2 * flags + 3 * one


def copy_rate(repeats):
    """Bytes per second, read plus written, of negating a large array in place (no pages to map)."""
    size = 2**24 if jax.default_backend() == "cpu" else 2**28  # 64 MiB, 1 GiB
    negate, held = jax.jit(jnp.negative, donate_argnums=0), [jnp.ones(size, jnp.float32)]

    def turn():
        held[0] = negate(held[0])
        return held[0]
    return 8 * size / seconds(turn, repeats=repeats)


def shapes(length, batch, states):
    """a, b, x0, reset and dx without their values."""
    P = states // 2

    def complex_shape(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.complex64)

    sequence = complex_shape(length, batch, P)
    return (complex_shape(P), sequence, complex_shape(batch, P),
            jax.ShapeDtypeStruct((length, batch), bool), sequence)


def values(length, batch, states):
    """a, b, x0, reset and dx: decays from 1e-3 to 1e-1 per step, normal numbers, a reset in a hundred."""
    P = states // 2
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    a = jnp.exp(jax.lax.complex(-jnp.geomspace(1e-3, 1e-1, P), jnp.linspace(0, 1, P)))

    def normal(key, *shape):
        return jax.random.normal(key, shape, jnp.complex64)

    return (a, normal(keys[0], length, batch, P), normal(keys[1], batch, P),
            jax.random.bernoulli(keys[2], 0.01, (length, batch)), normal(keys[3], length, batch, P))


def device_gigabytes():
    """What a call may use: three quarters of the accelerator's memory, 2 where that is not known."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return 0.75 * limit / 1e9 if limit else 2.0


def main():
    grid = GRIDS[jax.default_backend() == "cpu"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=grid["lengths"], help="T")
    parser.add_argument("--batches", type=int, nargs="+", default=grid["batches"], help="B")
    parser.add_argument("--states", type=int, nargs="+", default=grid["states"], help="P, even")
    parser.add_argument("--chunk", type=int, default=128, help="divides every length above it")
    parser.add_argument("--memory", type=float, default=device_gigabytes(), help="gigabytes of a call")
    parser.add_argument("--target", type=Path, help="a GPU to compile for, such as benchmarks/h100.txtpb")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "scan.csv", help="a picture goes beside it")
    options = parser.parse_args()
    table = Table(options.out)
    if options.target:
        name, rate, sharding = describe(options.target)
        print(f"compiled for {name}, {rate / 1e9:.0f} GB/s; times are not known")
    else:
        rate, sharding = copy_rate(options.repeats), None
        print(f"copy of a large array: {rate / 1e9:.1f} GB/s read plus written")

    for states in options.states:
        for batch in options.batches:
            for length in options.lengths:
                size = length, batch, states
                if least_bytes("forward", *size) > 1e9 * options.memory:
                    print(f"T={length} B={batch} P={states} left out: more than {options.memory:.1f} GB")
                    continue
                inputs = shapes(*size) if options.target else values(*size)
                for cost in COSTS:
                    args = inputs[:4] if cost == "forward" else inputs
                    for scan in SCANS:
                        function = recurrence(scan, options.chunk)
                        function = function if cost == "forward" else forward_backward(function)
                        program = compile_program(function, *shapes(*size)[:len(args)], target=sharding)
                        megabytes = program.megabytes + sum(x.size * x.dtype.itemsize for x in inputs) / 1e6
                        if megabytes > 1e3 * options.memory:
                            print(f"T={length} B={batch} P={states} {cost} {scan} left out: "
                                  f"{megabytes:.0f} MB")
                            continue
                        took = "" if options.target else seconds(
                            program.run, *args, repeats=options.repeats, budget=10.0)
                        least = least_bytes(cost, *size)
                        moved = count(*parse(program.run.as_text()))
                        table.add(cost=cost, scan=scan, length=length, batch=batch, states=states,
                                  ms=took and 1e3 * took, floor_ms=1e3 * least / rate,
                                  times_floor=took and took * rate / least,
                                  kernels=moved.kernels, times_bytes=moved.bytes / least,
                                  compile_s=program.compile_s, megabytes=megabytes)

    if options.target:
        return

    def draw(axis, i, j):
        for k, scan in enumerate(SCANS):
            for batch, style in zip(options.batches, ("o-", "s--", "^:", "d-.") * len(options.batches)):
                points = [(row["length"], row["times_floor"]) for row in table.rows
                          if (row["cost"], row["states"], row["batch"], row["scan"])
                          == (COSTS[i], options.states[j], batch, scan)]
                if points:
                    axis.loglog(*zip(*points), style, ms=3, color=f"C{k}", label=f"{scan}, B={batch}")
        axis.axhline(1, color="grey", lw=1)
        axis.set(title=f"{COSTS[i]}, P={options.states[j]}", xlabel="T", ylabel="time over the floor")
        axis.legend(fontsize=6)

    plot_into(options.out.with_suffix(".png"), len(COSTS), len(options.states), draw)


if __name__ == "__main__":
    main()
