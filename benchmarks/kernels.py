"""How many kernels does a step launch, and how far is it from the time that moving its bytes would take?

    python benchmarks/kernels.py                                             # the trainers' defaults
    python benchmarks/kernels.py --parts environment acting --lanes 1536 6144 24576
    python benchmarks/kernels.py --tasks cartpole-swingup --set width=16 layers=1 --lanes 16
    python benchmarks/kernels.py --target benchmarks/h100.txtpb              # for a GPU that is not here

Read off the optimised program (HLO) that XLA made for this device, and then run:

    environment  one control step of envs.Lanes with given actions: physics, reward, observation, projection
    acting       one step of the policy on given inputs: network, sampling, log-probability
    collect      both and the storing of the rollout: the body of the trainer's rollout loop
    update       a whole PPO iteration: rollout, advantages, all epochs of minibatches

The first three are counted per turn of a compiled loop of as many steps as a rollout has, as training runs
them; its time over that number is theirs, so what surrounds the loop of collect is spread over its steps.

    kernels      as hlo.py counts them; of a conditional the branch of fewer kernels: the other draws fresh
                 starts, once in up to 500 steps ...
    rarely       ... and is in this count
    loops        while loops inside (static), and unknown: those among them without a known trip count,
                 whose body counts once
    mb           megabytes that these kernels read and write, the usual branch
    floor_ms     mb over the rate of a large copy in this process; times_floor is ms over it

On a CPU the counts are of the CPU's program, where a kernel is a function call and costs next to nothing; a
GPU's program fuses differently. --target compiles for the GPU that a file describes (hlo.py): nothing runs,
floor_ms is mb over the bandwidth that the file states. Medians of several calls, synchronised, after a warm-up.
"""

import argparse
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp

from common import RESULTS, Table, compile_program, seconds  # first: it finds the project

import experiment
from hlo import count, describe, loop_body, parse
from scan import copy_rate

PARTS = ("environment", "acting", "collect", "update")


# ---- The four programs -------------------------------------------------------------------------------------

def programs(trainer, config):
    """{part: (function, its arguments as shapes or arrays, steps in a call)}."""
    train = trainer.make_train(config)
    T, lanes, network = config.num_steps, train.lanes, train.network
    runner = jax.jit(train.init)(jax.random.PRNGKey(0))
    if lanes.discrete:
        actions = jnp.zeros((T, config.num_envs), jnp.int32)
    else:
        actions = jax.random.normal(jax.random.PRNGKey(1), (T, config.num_envs, lanes.action_size))
    inputs = jax.random.normal(jax.random.PRNGKey(2), (T, *runner.inputs.shape))

    def environment(state, actions):
        def step(state, x):
            state, inputs, out = lanes.step(state, x[1], x[0])
            return state, (inputs, out.reward)
        return jax.lax.scan(step, state, (jnp.arange(T), actions))

    def acting(params, memory, inputs, key):
        prepared = network.apply(params, method="prepare")
        reset = jnp.zeros(config.num_envs, bool)

        def step(memory, x):
            memory, pi, value = network.apply(params, prepared, memory, x[1], reset, method="step")
            return memory, (*pi.sample_and_log_prob(seed=jax.random.fold_in(key, x[0])), value)
        return jax.lax.scan(step, memory, (jnp.arange(T), inputs))

    return {"environment": (environment, (runner.env_state, actions), T),
            "acting": (acting, (runner.params, runner.memory, inputs, jax.random.PRNGKey(3)), T),
            "collect": (train.collect, (runner,), T),
            "update": (train.update, (runner,), None)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", default="train_s5",
                        choices=("train_s5", "train_lstm", "train_transformer"))
    parser.add_argument("--tasks", nargs="+", help="default: the trainer's own")
    parser.add_argument("--lanes", type=int, nargs="+", help="default: the trainer's own")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE",
                        help="other whole-numbered trainer settings")
    parser.add_argument("--target", type=Path, help="a GPU to compile for, such as benchmarks/h100.txtpb")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.csv")
    options = parser.parse_args()
    trainer = importlib.import_module(options.trainer)
    settings = {name: int(value) for name, value in (text.split("=") for text in options.set)}
    settings |= {"env": tuple(options.tasks)} if options.tasks else {}
    if options.target:
        platform, rate, sharding = describe(options.target)
    else:
        platform, rate, sharding = jax.default_backend(), copy_rate(options.repeats), None
    table = Table(options.out)
    print(f"counts are of the program compiled for: {platform}"
          + (", which says little about a GPU's" if platform == "cpu" else ""))

    preset = "accelerator" if options.target else experiment.Options().preset
    for lanes in options.lanes or [experiment.preset(trainer.Config, preset, **settings).num_envs]:
        config = experiment.preset(trainer.Config, preset, **settings | {"num_envs": lanes})
        made = programs(trainer, config)
        for part in options.parts:
            function, args, steps = made[part]
            program = compile_program(function, *args, target=sharding)
            computations, entry = parse(program.run.as_text())
            name = loop_body(computations, steps) if steps else entry
            usual, rare = count(computations, name), count(computations, name, max)
            took = "" if options.target else seconds(program.run, *args, repeats=options.repeats) / (steps or 1)
            floor = usual.bytes / rate
            table.add(part=part, platform=platform, tasks=len(config.env), lanes=lanes, kernels=usual.kernels,
                      rarely=rare.kernels, loops=usual.loops, unknown=usual.unknown, mb=usual.bytes / 1e6,
                      ms=took and 1e3 * took, floor_ms=1e3 * floor, times_floor=took and took / floor)


if __name__ == "__main__":
    main()
