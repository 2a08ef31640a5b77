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

    kernels      instructions of executed computations that are launched: fusions, matrix products, library
                 calls, copies, reductions, sorts, ...; not tuples, parameters, constants, bitcasts. A loop's
                 body counts times its known trip count; its condition is not launched then. Of a conditional
                 the branch of fewer kernels counts: the other draws fresh starts, once in up to 500 steps ...
    rarely       ... and is in this count. A library call or a sort may launch several: it counts once
    loops        while loops inside (static), and unknown: those among them without a known trip count,
                 whose body counts once
    mb           megabytes that these kernels read and write, loops multiplied out, the usual branch. Of what
                 is only sliced, or updated in place, the slice counts
    floor_ms     mb over the rate of a large copy in this process; times_floor is ms over it

On a CPU the counts are of the CPU's program, where a kernel is a function call and costs next to nothing; a
GPU's program fuses differently. --target compiles for the GPU that a file describes, with XLA's CUDA compiler
(pip install "jax[cuda13]>=0.10.2,<0.12"; no GPU is needed): nothing runs, floor_ms is mb over the bandwidth
that the file states. Medians of several calls, synchronised, after a warm-up.
"""

import argparse
import importlib
import math
import re
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from common import RESULTS, Table, seconds  # first: it finds the project

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from scan import copy_rate

PARTS = ("environment", "acting", "collect", "update")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier",
        "partition-id", "replica-id"}  # nothing is launched for these, nor for the end of an asynchronous one
SLICES = {"dynamic-slice", "slice", "gather"}


# ---- The optimised program, read from its text -------------------------------------------------------------

class Instruction(NamedTuple):
    name: str
    size: int  # bytes of the result, all members of a tuple
    opcode: str
    operands: tuple  # names
    text: str  # from the operands on: attributes too
    root: bool

    def called(self, *attributes):
        """Names of the computations in those attributes, such as calls=%a or branch_computations={%a, %b}."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(\{{[^}}]*\}}|%[\w.-]+)", self.text)
        return [name for text in found for name in re.findall(r"%([\w.-]+)", text)]


def shape_bytes(text):
    """Bytes of "f32[3,4]{1,0}", or of a tuple of such."""
    bits = 0
    for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", text):
        width = re.search(r"\d+", kind)
        width = int(width[0]) if width else 8 * (kind == "pred")
        bits += width * math.prod(int(n) for n in sizes.split(",") if n)
    return bits // 8


def parse(text):
    """({computation: {name: Instruction}}, name of the entry) of an HLO module's text."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
            continue
        found = re.match(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)", line)
        if found and current is not None:
            root, name, shape, opcode, rest = found.groups()
            inside = re.split(r"\)(?:, [a-z_]+=|$)", rest)[0]
            operands = tuple(re.findall(r"%([\w.-]+)", inside))
            current[name] = Instruction(name, shape_bytes(shape), opcode, operands, rest, bool(root))
    return computations, entry


def bytes_read(value, inside):
    """Bytes of the instruction `value` that those using it in the computation `inside` read."""
    total = 0
    for user in inside.values():
        if value.name not in user.operands:
            continue
        first = user.operands[0] == value.name
        if user.opcode == "bitcast":
            total += bytes_read(user, inside)
        elif user.opcode in SLICES and first:
            total += user.size
        elif not (user.opcode == "dynamic-update-slice" and first):  # which leaves what it does not replace
            return value.size
    return min(total, value.size)


def bytes_written(value, inside):
    if value.opcode == "tuple":
        return sum(bytes_written(inside[name], inside) for name in value.operands)
    if value.opcode == "bitcast":
        return bytes_written(inside[value.operands[0]], inside)
    return inside[value.operands[1]].size if value.opcode == "dynamic-update-slice" else value.size


def bytes_moved(instruction, computation, computations):
    """Bytes that an executed instruction reads and writes."""
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode == "fusion":
        [name] = instruction.called("calls")
        inside = computations[name]
        parameters = {int(i.text.split(")")[0]): i for i in inside.values() if i.opcode == "parameter"}
        [root] = [i for i in inside.values() if i.root]
        return sum(bytes_read(p, inside) for p in parameters.values()) + bytes_written(root, inside)
    if instruction.opcode in SLICES:
        return 2 * instruction.size + sum(o.size for o in operands[1:])
    if instruction.opcode == "dynamic-update-slice":
        return operands[1].size + sum(o.size for o in operands[1:])
    return instruction.size + sum(o.size for o in operands)


class Count(NamedTuple):
    kernels: int = 0
    loops: int = 0
    unknown: int = 0  # loops without a known trip count
    bytes: int = 0

    def plus(self, other, times=1):
        """The sum, `other` done so many times; loops are static."""
        return Count(self.kernels + times * other.kernels, self.loops + other.loops,
                     self.unknown + other.unknown, self.bytes + times * other.bytes)


def trip_count(instruction):
    """That of a while loop, None if XLA does not know it."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.text)
    return int(found[1]) if found else None


def count(computations, name, branch=min):
    """Count of the computation `name`. branch: min or max, which branch of a conditional by its kernels."""
    total = Count()
    for i in computations[name].values():
        if i.opcode in FREE or i.opcode.endswith(("-done", "-update")):
            continue
        if i.opcode == "while":
            trips = trip_count(i)
            run = ("body",) if trips is not None else ("body", "condition")
            for inner in i.called(*run):
                total = total.plus(count(computations, inner, branch), 1 if trips is None else trips)
            total = total.plus(Count(loops=1, unknown=trips is None))
        elif i.opcode == "conditional":
            names = i.called("branch_computations", "true_computation", "false_computation")
            branches = [count(computations, inner, branch) for inner in names]
            total = total.plus(branch(branches, key=lambda c: c.kernels))
        elif i.opcode in ("call", "call-start", "async-start"):
            for inner in i.called("to_apply", "calls"):
                total = total.plus(count(computations, inner, branch))
        else:
            total = total.plus(Count(1, bytes=bytes_moved(i, computations[name], computations)))
    return total


def loop_body(computations, trips):
    """Name of the body that most kernels run in, of all loops of so many trips."""
    bodies = [i.called("body")[0] for instructions in computations.values() for i in instructions.values()
              if i.opcode == "while" and trip_count(i) == trips]
    return max(bodies, key=lambda name: count(computations, name).kernels)


# ---- The four programs -------------------------------------------------------------------------------------

def programs(trainer, config):
    """{part: (function, its arguments as shapes or arrays, steps in a call)}."""
    train = trainer.make_train(config)
    T, lanes, network = config.rollout_length, train.lanes, train.network
    runner = jax.jit(train.init)(jax.random.PRNGKey(0))
    if lanes.discrete:
        actions = jnp.zeros((T, config.num_lanes), jnp.int32)
    else:
        actions = jax.random.normal(jax.random.PRNGKey(1), (T, config.num_lanes, lanes.action_size))
    inputs = jax.random.normal(jax.random.PRNGKey(2), (T, *runner.inputs.shape))

    def environment(state, actions):
        def step(state, x):
            state, inputs, out = lanes.step(state, x[1], x[0])
            return state, (inputs, out.reward)
        return jax.lax.scan(step, state, (jnp.arange(T), actions))

    def acting(params, memory, inputs, key):
        prepared = network.apply(params, method="prepare")
        reset = jnp.zeros(config.num_lanes, bool)

        def step(memory, x):
            memory, pi, value = network.apply(params, prepared, memory, x[1], reset, method="step")
            return memory, (*pi.sample_and_log_prob(seed=jax.random.fold_in(key, x[0])), value)
        return jax.lax.scan(step, memory, (jnp.arange(T), inputs))

    return {"environment": (environment, (runner.env_state, actions), T),
            "acting": (acting, (runner.params, runner.memory, inputs, jax.random.PRNGKey(3)), T),
            "collect": (train.collect, (runner,), T),
            "update": (train.update, (runner,), None)}


# ---- A GPU that is not here -------------------------------------------------------------------------------

def describe(parser, path):
    """(its name, bytes per second, sharding onto it) of the GPU in `path`, XLA's GpuTargetConfigProto as text."""
    text = path.read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text)
    except (RuntimeError, NotImplementedError) as error:
        parser.error(f'cannot compile for CUDA; is "jax[cuda13]" installed? {error}')
    [device] = topology.devices
    rate = float(re.search(r"memory_bandwidth: (\d+)", text)[1])
    return device.device_kind, rate, SingleDeviceSharding(device)


def compile_for(sharding, function, args):
    """The executable for the device of `sharding`; untuned, because tuning would have to run candidates."""
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):  # what the project's choices depend on
        traced = jax.jit(function, in_shardings=sharding, out_shardings=sharding).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).compile({"xla_gpu_autotune_level": "0"})


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
    settings = trainer.ACCELERATOR if options.target or jax.default_backend() != "cpu" else {}
    settings |= {name: int(value) for name, value in (text.split("=") for text in options.set)}
    settings |= {"env": tuple(options.tasks)} if options.tasks else {}
    if options.target:
        platform, rate, sharding = describe(parser, options.target)
    else:
        platform, rate = jax.default_backend(), copy_rate(options.repeats)
    table = Table(options.out)
    print(f"counts are of the program compiled for: {platform}"
          + (", which says little about a GPU's" if platform == "cpu" else ""))

    for lanes in options.lanes or [trainer.Config(**settings).num_lanes]:
        config = trainer.Config(**settings | {"num_lanes": lanes})
        made = programs(trainer, config)
        for part in options.parts:
            function, args, steps = made[part]
            if options.target:
                compiled = compile_for(sharding, function, args)
            else:
                compiled = jax.jit(function).lower(*args).compile()
            computations, entry = parse(compiled.as_text())
            name = loop_body(computations, steps) if steps else entry
            usual, rare = count(computations, name), count(computations, name, max)
            took = "" if options.target else seconds(compiled, *args, repeats=options.repeats) / (steps or 1)
            floor = usual.bytes / rate
            table.add(part=part, platform=platform, tasks=len(config.env), lanes=lanes, kernels=usual.kernels,
                      rarely=rare.kernels, loops=usual.loops, unknown=usual.unknown, mb=usual.bytes / 1e6,
                      ms=took and 1e3 * took, floor_ms=1e3 * floor, times_floor=took and took / floor)


if __name__ == "__main__":
    main()
