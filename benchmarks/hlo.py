"""Compiled programs read as text: how many kernels they launch, how many bytes those move.

    kernels   instructions of executed computations that are launched: fusions, matrix products, library
              calls, copies, reductions, sorts, ...; not tuples, parameters, constants, bitcasts. A loop's
              body counts times its known trip count; its condition is not launched then. A library call or a
              sort may launch several: it counts once
    bytes     what these read and write, loops multiplied out. Of what is only sliced, or updated in place,
              the slice counts. What a fusion reads twice counts once

`compile_for` compiles for a GPU that is not here, with XLA's CUDA compiler (pip install
"jax[cuda13]>=0.10.2,<0.12"), from a description such as h100.txtpb, XLA's GpuTargetConfigProto as text.
"""

import math
import re
from typing import NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

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
    if instruction.opcode in ("fusion", "fusion-start"):
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


# ---- A GPU that is not here -------------------------------------------------------------------------------

def describe(path):
    """(its name, bytes per second, sharding onto it) of the GPU in the file. Ends the program without a compiler."""
    text = path.read_text()
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text)
    except (RuntimeError, NotImplementedError) as error:
        raise SystemExit(f'cannot compile for CUDA; is "jax[cuda13]" installed? {error}')
    [device] = topology.devices
    rate = float(re.search(r"memory_bandwidth: (\d+)", text)[1])
    return device.device_kind, rate, SingleDeviceSharding(device)


def compile_for(sharding, function, args):
    """The executable for the device of `sharding`; untuned, because tuning would have to run candidates."""
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    jax.clear_caches()  # of functions traced for this device
    with mock.patch.object(jax, "default_backend", lambda: "gpu"):  # what the project's choices depend on
        traced = jax.jit(function, in_shardings=sharding, out_shardings=sharding).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).compile({"xla_gpu_autotune_level": "0"})
