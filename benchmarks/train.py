"""Where the wall time of training goes: environment, acting, update; compile time, memory, achieved FLOP/s.

    python benchmarks/train.py                               # three trainers, and train_s5 along four axes
    python benchmarks/train.py --trainers train_s5 --lanes 96 192 384 --rollouts --widths --seeds
    python benchmarks/train.py --reference                   # the released implementation's configuration
    python benchmarks/train.py --scaling                     # cores as devices that share the environments

Every axis is walked alone, from the trainers' defaults for this device, by the trainers named in --along.

    environment  one rollout of steps with given actions
    acting       what a rollout with the policy costs beyond that
    update       what a whole PPO iteration costs beyond the rollout
    compile      seconds to compile `init` and `update`, with an empty compilation cache (cold) and again out
                 of it, with nothing in memory (cached); tracing included
    megabytes    temporaries and outputs of one iteration as XLA plans them; its arguments are not counted
    gflop        matrix products of the update, 2 M N K each, counted in the jaxpr of an iteration less that
                 of its rollout; a scan's body as often as it runs. Nothing elementwise is counted, neither
                 the recurrence of S5 nor softmax nor Adam
    of_matmul_%  that over the update's time, as a part of what one product of two 2048 x 2048 float32
                 matrices reaches on this device in this process

Steps per second are environment steps of all seeds. Medians of several calls, synchronised, after a warm-up.

--scaling runs the default configurations on 1, 2, 4, ... cores, each time in a process pinned to so many:

    devices      that share the environments; one on several cores is XLA's own use of them
    *_ms         environment, acting and update of an iteration, as above
    collectives_ms  what it costs beyond the same work of as many devices that exchange nothing; waiting included
    efficiency_* steps per second, and the rates of the parts, over those of one core, per core
"""

import argparse
import dataclasses
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from common import RESULTS, Table, compile_program, plot_into, seconds  # first: it finds the project

import experiment

TRAINERS = ("train_s5", "train_lstm", "train_transformer")
AXES = {"lanes": "num_envs", "rollouts": "num_steps", "widths": "width"}
REFERENCE = dict(env=("CartPole-v1",), layers=4, width=256, state_size=256, num_envs=64, num_steps=128,
                 update_epochs=4, num_minibatches=8)
MATRIX = 2048


def product_flops(jaxpr):
    """2 M N K of all matrix products in a jaxpr, scans' bodies times their length, the dearest branch."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contract)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [product_flops(getattr(x, "jaxpr", x)) for x in parts if hasattr(x, "eqns")]
        if inner and equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return total


def matmul_rate(repeats):
    """FLOP/s of one large float32 matrix product."""
    a = jax.random.normal(jax.random.PRNGKey(0), (MATRIX, MATRIX))
    return 2 * MATRIX**3 / seconds(jax.jit(jnp.matmul), a, a, repeats=repeats)


def compile_twice(functions):
    """(programs, seconds from an empty cache, seconds from the cache) of [(function, its arguments)]."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for _ in range(2):
            jax.clear_caches()
            compilation_cache.reset_cache()  # forget the last folder
            programs = [compile_program(function, *args) for function, args in functions]
            times.append(sum(program.compile_s for program in programs))
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
    return programs, *times


def measure(trainer, config, seeds, rate, repeats):
    """One table row for `config` with so many seeds of the trainer module `trainer`; rate: matmul_rate."""
    train = trainer.make_train(config)
    lanes, T = train.lanes, config.num_steps
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(seeds))
    init, update, collect = map(experiment.over_members, (train.init, train.update, train.collect))
    runner = jax.eval_shape(init, keys)
    (start, update_program), cold, cached = compile_twice([(init, (keys,)), (update, (runner,))])
    runner = start.run(keys)
    shape = (seeds, T, config.num_envs)
    if lanes.discrete:
        actions = jax.random.randint(jax.random.PRNGKey(1), shape, 0, lanes.action_size)
    else:
        actions = jax.random.normal(jax.random.PRNGKey(1), (*shape, lanes.action_size))

    def environment(state, actions):
        def step(state, x):
            state, inputs, out = lanes.step(state, x[1], x[0])
            return state, inputs.sum() + out.reward.sum()
        return jax.lax.scan(step, state, (jnp.arange(T), actions))

    env_program = compile_program(experiment.over_members(environment), runner.env_state, actions)
    env_s = seconds(env_program.run, runner.env_state, actions, repeats=repeats)
    collect_s = seconds(compile_program(collect, runner).run, runner, repeats=repeats)
    whole_s = seconds(update_program.run, runner, repeats=repeats)
    flops = [product_flops(jax.make_jaxpr(f)(runner).jaxpr) for f in (update, collect)]
    flops = flops[0] - flops[1]
    return {"trainer": trainer.__name__, "lanes": config.num_envs, "rollout": T, "width": config.width,
            "seeds": seeds, "steps_per_s": round(seeds * config.steps_per_update / whole_s),
            "environment_%": 100 * env_s / whole_s, "acting_%": 100 * (collect_s - env_s) / whole_s,
            "update_%": 100 * (whole_s - collect_s) / whole_s,
            "cold_compile_s": cold, "cached_compile_s": cached, "megabytes": update_program.megabytes,
            "gflop": flops / 1e9,
            "of_matmul_%": 100 * flops / (whole_s - collect_s) / rate}


def measure_shared(trainer, devices, repeats):
    """Seconds of the parts of an iteration whose environments so many devices share."""
    config = trainer.Config()
    mesh = experiment.device_mesh(config, experiment.Options(devices=devices))
    specs = experiment.runner_specs(trainer.make_train, config, mesh)
    member, by_lane = PartitionSpec("member"), PartitionSpec("member", None, "data")

    def compiled(function, *args, in_specs, out_specs=member):
        mapped = jax.shard_map(experiment.over_members(function), mesh=mesh, in_specs=in_specs, out_specs=out_specs,
                               check_vma=False)
        return jax.jit(mapped).lower(*args).compile(experiment.compiler_options(mesh))

    keys, T = jax.random.PRNGKey(0)[None], config.num_steps
    train = trainer.make_train(config, devices)
    lanes = train.lanes
    runner = compiled(train.init, keys, in_specs=(member,), out_specs=specs)(jax.device_put(
        keys, NamedSharding(mesh, member)))
    actions = jax.device_put(jax.random.normal(keys[0], (1, T, config.num_envs, lanes.action_size)),
                             NamedSharding(mesh, by_lane))

    def environment(state, actions):
        def step(state, x):
            state, inputs, out = lanes.step(state, x[1], x[0])
            return state, inputs.sum() + out.reward.sum()
        return jax.lax.scan(step, state, (jnp.arange(T), actions))

    alone = trainer.make_train(dataclasses.replace(config, num_envs=config.num_envs // devices))
    env_s = seconds(compiled(environment, runner.env_state, actions, in_specs=(specs.env_state, by_lane)),
                    runner.env_state, actions, repeats=repeats)
    collect_s, whole_s, alone_s = (
        seconds(compiled(function, runner, in_specs=(specs,)), runner, repeats=repeats)
        for function in (train.collect, train.update, alone.update))
    return {"environment": env_s, "acting": collect_s - env_s, "update": whole_s - collect_s, "whole": whole_s,
            "collectives": whole_s - alone_s, "steps_per_s": config.steps_per_update / whole_s}


def scaling(trainers, repeats, out):
    """Table of measure_shared, every row from a process of its own."""
    table, cores = Table(out), sorted(os.sched_getaffinity(0))
    one, counts = None, [2**i for i in range(len(cores).bit_length()) if 2**i <= len(cores)]
    parts = ("environment", "acting", "update")
    for name in trainers:
        for devices, count in sorted({(1, 1), (1, counts[-1]), *((count, count) for count in counts)}):
            os.sched_setaffinity(0, cores[:count])  # which the process inherits
            done = subprocess.run(
                [sys.executable, __file__, "--trainers", name, "--share", str(devices), "--repeats", str(repeats)],
                env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}, stdout=subprocess.PIPE,
                text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            if count == 1:
                one = found
            table.add(trainer=name, cores=count, devices=devices, steps_per_s=round(found["steps_per_s"]),
                      **{f"{part}_ms": 1e3 * found[part] for part in (*parts, "collectives")},
                      **{f"efficiency_{part}": one[part] / found[part] / count for part in ("whole", *parts)})


def plot(rows, base, path):
    """Bars of the breakdown at the trainers' defaults; steps per second along each axis that was walked."""
    columns = ("lanes", "rollout", "width", "seeds")
    walked = [c for c in columns if len({row[c] for row in rows}) > 1]

    def draw(axis, i, j):
        if j == 0:
            bottom = [0.0] * len(base)
            for part in ("environment", "acting", "update"):
                height = [row[f"{part}_%"] / 100 / row["steps_per_s"] * 1e6 for row in base]
                names = [row["trainer"].removeprefix("train_") for row in base]
                axis.bar(names, height, bottom=bottom, label=part)
                bottom = [a + b for a, b in zip(bottom, height)]
            axis.set(title="defaults", ylabel="microseconds per environment step")
            axis.legend(fontsize=7)
            return
        column = walked[j - 1]
        for origin in base:
            same = [row for row in rows if row["trainer"] == origin["trainer"]
                    and all(row[c] == origin[c] for c in columns if c != column)]
            points = sorted((row[column], row["steps_per_s"]) for row in same)
            if len(points) > 1:
                axis.plot(*zip(*points), "o-", label=origin["trainer"])
        values = sorted({row[column] for row in rows})
        axis.set(xscale="log", title=f"against {column}", ylim=(0, None), ylabel="environment steps per second")
        axis.set_xticks(values, values)
        axis.minorticks_off()
        axis.legend(fontsize=7)

    plot_into(path, 1, 1 + len(walked), draw)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", nargs="+", default=TRAINERS, choices=TRAINERS)
    parser.add_argument("--along", nargs="*", default=["train_s5"], choices=TRAINERS,
                        help="trainers that walk the axes")
    parser.add_argument("--lanes", type=int, nargs="*", default=[192])
    parser.add_argument("--rollouts", type=int, nargs="*", default=[512])
    parser.add_argument("--widths", type=int, nargs="*", default=[128])
    parser.add_argument("--seeds", type=int, nargs="*", default=[4])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE",
                        help="other whole-numbered trainer settings")
    parser.add_argument("--env", nargs="+", help="tasks (default: the trainers' own)")
    parser.add_argument("--reference", action="store_true",
                        help="only the released implementation's sizes on CartPole-v1")
    parser.add_argument("--scaling", action="store_true", help="only cores as devices, train_s5 and train_lstm")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)  # devices of one process of --scaling
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path,
                        help="default: results/train.csv, or train_reference.csv; a picture beside it")
    options = parser.parse_args()
    if options.share:
        print(json.dumps(measure_shared(importlib.import_module(options.trainers[0]), options.share, options.repeats)))
        return
    if options.scaling:
        scaling([name for name in options.trainers if name != "train_transformer"], options.repeats,
                options.out or RESULTS / "scaling.csv")
        return
    out = options.out or RESULTS / ("train_reference.csv" if options.reference else "train.csv")
    table, rate = Table(out), matmul_rate(options.repeats)
    print(f"a product of two {MATRIX} x {MATRIX} float32 matrices: {rate / 1e9:.0f} GFLOP/s")
    if options.reference:
        trainer = importlib.import_module("train_s5")
        table.add(**measure(trainer, trainer.Config(**REFERENCE), 1, rate, options.repeats))
        return

    settings = {name: int(value) for name, value in (text.split("=") for text in options.set)}
    settings |= {"env": tuple(options.env)} if options.env else {}
    base = []
    for name in options.trainers:
        trainer = importlib.import_module(name)
        origin = trainer.Config(**settings)
        walked = [(origin, 1)]
        if name in options.along:
            for axis, field in AXES.items():
                walked += [(trainer.Config(**settings | {field: value}), 1) for value in getattr(options, axis)
                           if value != getattr(origin, field)]
            walked += [(origin, seeds) for seeds in options.seeds if seeds != 1]
        base.append(len(table.rows))
        for config, seeds in walked:
            table.add(**measure(trainer, config, seeds, rate, options.repeats))
    plot(table.rows, [table.rows[i] for i in base], out.with_suffix(".png"))


if __name__ == "__main__":
    main()
