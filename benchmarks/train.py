"""Where the wall time of training goes: environment, acting, update; compile time, memory, FLOP/s.

    python benchmarks/train.py                                       # the three trainers, train_s5 also varied
    python benchmarks/train.py --trainers train_s5 --vary num_envs=384 width=128 seeds=4
    python benchmarks/train.py --trainers train_s5 --vary --set layers=4 width=256 state_size=256 num_envs=64 \\
        num_minibatches=8 --env CartPole-v1 --out results/train_reference.csv    # the released configuration

The first row of a trainer has its default sizes on this machine, changed by --set. Every further row, of
train_s5 only, changes one value, as --vary says.

    environment  one rollout of steps with given actions
    acting       what a rollout with the policy costs beyond that
    update       what a whole PPO iteration costs beyond the rollout
    cold         seconds to compile `init` and `update` with an empty compilation cache, tracing included
    cached       the same out of that cache, with nothing in memory
    megabytes    temporaries and outputs of one iteration as XLA plans them, without its arguments
    gflop        matrix products of the update, 2 M N K each, counted in the jaxpr of an iteration less those
                 of its rollout; a scan's body as often as it runs. Nothing elementwise is counted, neither
                 the recurrence of S5 nor softmax nor Adam
    of_matmul_%  that over the update's time, in percent of the rate which one product of two 2048 x 2048
                 float32 matrices reaches on this device in this process

Steps per second are environment steps of all seeds. Medians of several calls, synchronised, after a warm-up.
"""

import argparse
import dataclasses
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from common import (  # first: it finds the project
    RESULTS,
    Table,
    compile_program,
    device,
    make_parser,
    numbers,
    plot_into,
    run_main,
    seconds,
    whole,
)

import devices
import experiment

TRAINERS = ("train_s5", "train_lstm", "train_transformer")
MATRIX = 2048
REPEATS = 3  # calls of which a time is the median, or more


def product_flops(jaxpr: Any) -> int:
    """Returns 2 M N K of all matrix products: a scan's body times its length, the dearest branch of a cond."""
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


def matmul_rate() -> float:
    """Returns the FLOP/s of one large float32 matrix product."""
    a = jax.random.normal(jax.random.PRNGKey(0), (MATRIX, MATRIX))
    return 2 * MATRIX**3 / seconds(jax.jit(jnp.matmul), a, a, repeats=REPEATS)


def compile_twice(functions: list[tuple]) -> tuple[list, float, float]:
    """Returns (programs, seconds without a cache, seconds from the cache) of [(function, its arguments)]."""
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


def play(train: Any, num_steps: int, env_state: Any, actions: jax.Array) -> Any:
    """A rollout of `train.trials` with given actions (T, N, action_dims)."""
    def step(state, x):
        state, observation, transition = train.trials.step(state, x[1], x[0])
        return state, (observation, transition)

    return jax.lax.scan(step, env_state, (jnp.arange(num_steps), actions))


def collect(train: Any, num_steps: int, runner: Any) -> Any:
    """A rollout of the policy, as in make_train's `collect`."""
    act = partial(train.network.apply, runner.params, runner.norm)

    def step(carry, t):
        env_state, observation, hidden, reset = carry
        hidden, pi, value = act(hidden, observation, reset)
        keys = train.trials.split(jax.random.fold_in(runner.key, t))
        action, log_prob = jax.vmap(lambda pi, key: pi.sample_and_log_prob(seed=key))(pi, keys)
        env_state, new, transition = train.trials.step(env_state, action, t)
        return (env_state, new, hidden, transition.trial_end), (observation, action, log_prob, value, transition)

    carry = runner.env_state, runner.observation, runner.hidden, runner.reset
    carry, rollout = jax.lax.scan(step, carry, jnp.arange(num_steps))
    _, observation, hidden, reset = carry
    return carry, rollout, act(hidden, observation, reset)


def measure(trainer: Any, config: Any, seeds: int, rate: float) -> dict[str, Any]:
    """Returns the row of `config` with so many seeds of a trainer (module); rate: matmul_rate."""
    train, T = trainer.make_train(config), config.num_steps
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(seeds))
    init, update, acting, environment = map(devices.over_agents, (
        train.init, train.update, partial(collect, train, T), partial(play, train, T)))
    runner = jax.eval_shape(init, keys)
    (start, iteration), cold, cached = compile_twice([(init, (keys,)), (update, (runner,))])
    runner = start.run(keys)
    shape = seeds, T, config.num_envs, train.trials.action_dims
    actions = jax.random.randint(keys[0], shape, 0, train.trials.num_bins)
    played = compile_program(environment, runner.env_state, actions)
    env_s = seconds(played.run, runner.env_state, actions, repeats=REPEATS)
    rollout_s = seconds(compile_program(acting, runner).run, runner, repeats=REPEATS)
    whole_s = seconds(iteration.run, runner, repeats=REPEATS)
    update_s = whole_s - rollout_s
    flops, rollout_flops = (product_flops(jax.make_jaxpr(f)(runner).jaxpr) for f in (update, acting))
    flops -= rollout_flops
    return {"trainer": trainer.__name__, "num_envs": config.num_envs, "num_steps": T, "width": config.width,
            "seeds": seeds, "steps_per_s": round(seeds * config.steps_per_update / whole_s),
            "environment_%": 100 * env_s / whole_s, "acting_%": 100 * (rollout_s - env_s) / whole_s,
            "update_%": 100 * update_s / whole_s, "cold_compile_s": cold, "cached_compile_s": cached,
            "megabytes": iteration.megabytes, "gflop": flops / 1e9,
            "of_matmul_%": 100 * flops / update_s / rate}


def draw(rows: list[dict], path: Path, title: str) -> None:
    """Writes bars: microseconds per environment step of every row, by part."""
    def panel(axis, *_):
        bottom, (rate,) = np.zeros(len(rows)), numbers(rows, "steps_per_s")
        for part in ("environment", "acting", "update"):
            height = 1e4 * numbers(rows, f"{part}_%")[0] / rate
            axis.barh(range(len(rows)), height, left=bottom, label=part)
            bottom = bottom + height
        axis.set_yticks(range(len(rows)), [
            f"{row['trainer']}: {row['num_envs']} environments x {row['num_steps']} steps,\n"
            f"width {row['width']}, {row['seeds']} seed{'s' * (int(row['seeds']) > 1)}" for row in rows], fontsize=7)
        axis.set(xlabel="microseconds per environment step")
        axis.invert_yaxis()

    plot_into(path, 1, 1, panel, title, size=(7, 1 + 0.4 * len(rows)), legend=3)


def setting(text: str) -> tuple[str, int]:
    """A type of argparse: ("width", 128) from "width=128"."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, whole(1)(value)


def make_config(trainer: Any, settings: dict[str, Any]) -> Any:
    """Returns the Config of a trainer (module). ValueError: a setting is unknown or invalid."""
    known = [field.name for field in dataclasses.fields(trainer.Config) if field.type is int]
    for name in settings:
        if name not in ("env", *known):
            raise ValueError(f"{trainer.__name__} has no whole-numbered setting {name!r}; "
                             f"those are {', '.join(known)}")
    return trainer.Config(**settings)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--trainers", nargs="+", default=TRAINERS, choices=TRAINERS)
    parser.add_argument("--vary", type=setting, nargs="*", metavar="NAME=VALUE",
                        default=[("num_envs", 384), ("num_steps", 512), ("width", 128), ("seeds", 4)])
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE",
                        help="whole-numbered settings of all rows")
    parser.add_argument("--env", nargs="+", help="tasks (default: the trainers' own)")
    parser.add_argument("--out", type=Path, default=RESULTS / "train.csv", help="a picture goes beside it")
    options = parser.parse_args()
    fixed = dict(options.set) | ({"env": tuple(options.env)} if options.env else {})
    wanted = []
    for name in options.trainers:
        trainer = experiment.import_trainer(name)
        for change in [{}] + [{k: v} for k, v in options.vary if name == "train_s5"]:
            seeds = change.pop("seeds", 1)
            wanted.append((trainer, make_config(trainer, fixed | change), seeds))
    table, rate = Table(options.out), matmul_rate()
    print(f"a product of two {MATRIX} x {MATRIX} float32 matrices: {rate / 1e9:.0f} GFLOP/s")
    for trainer, config, seeds in wanted:
        table.add(**measure(trainer, config, seeds, rate))
    draw(table.rows, options.out.with_suffix(".png"), device())


if __name__ == "__main__":
    run_main(main)
