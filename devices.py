"""Which devices and processes a run uses, and how its arrays are spread over them.

A run trains A agents: every setting of its sweep with every seed. Its devices form a mesh with two
axes. The agents are split over the axis `agents`, the environments of each agent over the axis
`envs`. One device is the mesh (1, 1). On a CPU each core counts as a device.

Several processes are joined through environment variables. They use one file system. On host1:

    JAX_COORDINATOR_ADDRESS=host0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 python train_s5.py
"""

import contextlib
import dataclasses
import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec


# ---- Start-up ------------------------------------------------------------------------------------
def start(patience: float = 120.0) -> None:
    """Makes each core of a CPU a device and joins the other processes. Call it before JAX is used.

    ValueError: invalid variables, no device, or processes that do not find each other in `patience` s.
    """
    if jax.config.jax_num_cpu_devices < 0 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX is in use: its devices stay as they are
            jax.config.update("jax_num_cpu_devices", num_cores())
    coordinator, num_processes, process_id = read_processes(os.environ)
    if num_processes > 1 and not jax.distributed.is_initialized():
        roll_call(coordinator, num_processes, process_id, patience)
        # else JAX would swallow a SIGTERM that comes before experiment.Signals handles it
        jax.config.update("jax_enable_preemption_service", False)
        # the others end after so many seconds without the heartbeat of one that is gone
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=30)
    find_devices()


def find_devices() -> None:
    """ValueError if JAX has no device."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError):
        kinds = os.environ.get("JAX_PLATFORMS", "")
        raise ValueError(f"JAX finds no device with JAX_PLATFORMS={kinds!r}") from None


def read_processes(variables: Mapping[str, str]) -> tuple[str, int, int]:
    """Returns the coordinator's address, the number of processes and that of this process.

    ValueError: a variable of the environment is missing or invalid.
    """
    coordinator = variables.get("JAX_COORDINATOR_ADDRESS", "")
    count = variables.get("JAX_NUM_PROCESSES", "" if coordinator else "1")
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f"JAX_NUM_PROCESSES must be the number of processes, got {count!r}")
    process = variables.get("JAX_PROCESS_ID", "0" if int(count) == 1 else "")
    if not process.isdecimal() or int(process) >= int(count):
        raise ValueError(f"JAX_PROCESS_ID must be from 0 to {int(count) - 1}, got {process!r}")
    host, _, port = coordinator.rpartition(":")
    if int(count) > 1 and not (host and port.isdecimal()):
        raise ValueError(
            f"several processes need JAX_COORDINATOR_ADDRESS=HOST:PORT, got {coordinator!r}")
    return coordinator, int(count), int(process)


def roll_call(coordinator: str, count: int, process: int, patience: float) -> None:
    """Returns in every process when each has called process 0, at the coordinator's address.

    ValueError, in all of them: one is missing, or two have the same number. (JAX would abort.)
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + patience
    try:
        answer = (answer_calls(int(port), count, deadline) if process == 0 else
                  call_first(host.strip("[]"), int(port), process, deadline))
    except (OSError, OverflowError) as error:  # OverflowError: no such port
        doing = "cannot listen" if process == 0 else "does not answer"
        raise ValueError(f"process 0 {doing} at {coordinator} ({error})") from None
    if answer != "go":
        raise ValueError(answer or f"process 0 at {coordinator} ended")


def answer_calls(port: int, count: int, deadline: float) -> str:
    """Returns what process 0 answers to the calls of the others."""
    numbers, calls = [], []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("", port)))
        answer = "go"
        while answer == "go" and len(numbers) < count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                call = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = sorted(set(range(1, count)) - set(numbers))
                answer = f"no call from process {', '.join(map(str, missing))}"
                break
            call.settimeout(5)
            with contextlib.suppress(OSError):
                number = int.from_bytes(call.recv(4), "big")
                if number in numbers:
                    answer = f"two processes have JAX_PROCESS_ID={number}"
                if 0 < number < count:  # else it is something else that called
                    numbers.append(number)
                    calls.append(call)
        for call in calls:
            call.sendall(answer.encode())
    return answer


def call_first(host: str, port: int, process: int, deadline: float) -> str:
    """Returns the answer of process 0. OSError: it did not answer before the deadline."""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as call:
                call.sendall(process.to_bytes(4, "big"))
                call.settimeout(None)
                return call.makefile().read()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def num_cores() -> int:
    """Returns how many cores this process may use; hyperthreads of a core share vector units."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    siblings = [
        Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in usable]
    return len({path.read_text() if path.exists() else path for path in siblings})


# ---- Processes -----------------------------------------------------------------------------------
def is_first() -> bool:
    """Returns whether this is process 0, which prints and writes the run folder."""
    return jax.process_index() == 0


def from_first(value: Any) -> Any:
    """Returns what process 0 passes, of at most 4,096 bytes as JSON. Every process calls this."""
    text = np.frombuffer(json.dumps(value).encode().ljust(4096), np.uint8)
    return json.loads(bytes(broadcast_one_to_all(text)))


def highest(*values: int) -> list[int]:
    """Returns the highest of each value among all processes. Every process calls this."""
    return process_allgather(np.array(values, np.int32)).max(0).tolist()


def gather(tree: Any) -> Any:
    """Returns a tree of whole NumPy arrays. Every process calls this."""
    return process_allgather(tree, tiled=True)


def stop(code: int, sentence: str = "") -> None:
    """Exits, after a sentence to stderr; at once, where JAX would wait for the other processes."""
    if sentence:
        print(sentence, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


# ---- Mesh ----------------------------------------------------------------------------------------
def mesh_shape(
        config: Any, num_agents: int, wanted: int, existing: int, processes: int = 1,
) -> tuple[int, int]:
    """Returns the sizes of the axes (agents, envs): most devices first, then most agents.

    Args:
      config: the trainer's Config, which refuses a num_envs that cannot be divided.
      num_agents: settings x seeds.
      wanted: number of devices that must be used; 0 for as many as can be.
      existing: devices of all `processes`, each of which must take part.

    Raises:
      ValueError: `wanted` devices do not exist or cannot be used.
    """
    def can_share(shards: int) -> bool:
        with contextlib.suppress(ValueError):
            dataclasses.replace(config, num_envs=config.num_envs // shards)
            return config.num_envs % shards == 0
        return False

    if wanted > existing:
        raise ValueError(
            f"devices={wanted}, but there are {existing}; a run is resumed on as many as before")
    count = wanted or existing
    shapes = [(agents, envs)
              for agents in range(1, count + 1) if num_agents % agents == 0
              for envs in range(1, count // agents + 1) if can_share(envs)]
    fitting = [(math.prod(shape), *shape) for shape in shapes if math.prod(shape) % processes == 0]
    size, *shape = max(fitting, default=(0, 0, 0))
    if size == 0 or wanted not in (0, size):
        raise ValueError(
            f"devices={count} in {processes} processes do not fit {num_agents} x num_envs="
            f"{config.num_envs}: num_envs must be divisible by devices x tasks x minibatches")
    return tuple(shape)


def make_mesh(config: Any, num_agents: int, wanted: int = 0) -> Mesh:
    """Returns the mesh of the devices to train on; arguments and errors as in mesh_shape."""
    processes = jax.process_count()
    shape = mesh_shape(config, num_agents, wanted, jax.device_count(), processes)
    devices = [jax.local_devices(i)[:math.prod(shape) // processes] for i in range(processes)]
    return Mesh(np.array(devices).reshape(shape), ("agents", "envs"))


# ---- Programs ------------------------------------------------------------------------------------
class Program(NamedTuple):
    """What a run calls. Runners are the trainer's, with a leading axis of A agents."""

    init: Callable  # (keys (A, ...), hyper {name: (A,)}) -> runner
    shapes: Any  # of a runner: jax.ShapeDtypeStruct with shardings
    compile: Callable  # () -> function: runner (donated) -> (runner, metrics (A, log_every, ...))


def make_program(make_train: Callable, config: Any, mesh: Mesh, num_agents: int) -> Program:
    """Returns the functions that initialise and train the agents on all devices of a mesh."""
    shards = mesh.shape["envs"]
    local = dataclasses.replace(config, num_envs=config.num_envs // shards)
    train = make_train(local, axis="envs" if shards > 1 else None)
    key = jax.eval_shape(lambda: jax.random.PRNGKey(0))
    keys = jax.ShapeDtypeStruct((num_agents, *key.shape), key.dtype)
    whole = jax.eval_shape(jax.vmap(make_train(config).init), keys)
    share = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), whole)
    if shards > 1:
        share = jax.eval_shape(make_train(local).init, key)
    agents = PartitionSpec("agents")
    specs = jax.tree.map(lambda x, part: PartitionSpec("agents", *(
        "envs" if n != m else None for n, m in zip(x.shape[1:], part.shape))), whole, share)
    shapes = jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), whole, specs)
    init = jax.shard_map(
        jax.vmap(train.init), mesh=mesh, in_specs=agents, out_specs=specs, check_vma=False)

    def chunk(leaves):
        runner = add_empty(leaves, share)
        runner, metrics = jax.lax.scan(lambda r, _: train.update(r), runner, None, config.log_every)
        return drop_empty(runner, share), metrics

    def program(runner):
        full = drop_empty(specs, whole)
        mapped = jax.shard_map(over_agents(chunk), mesh=mesh, in_specs=(full,),
                               out_specs=(full, agents), check_vma=False)
        leaves, metrics = mapped(drop_empty(runner, whole))
        return add_empty(leaves, whole), metrics

    def compile():
        everywhere = NamedSharding(mesh, PartitionSpec())  # every process reads all metrics
        layout = (jax.tree.map(lambda x: x.sharding, shapes), everywhere)
        jitted = jax.jit(program, donate_argnums=0, out_shardings=layout)
        cores = mesh.size > 1 and jax.default_backend() == "cpu"  # as devices they share no threads
        return jitted.lower(shapes).compile({"xla_cpu_multi_thread_eigen": False} if cores else {})

    once = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return Program(jax.jit(init, compiler_options=once), shapes, compile)


def drop_empty(tree: Any, shapes: Any) -> list[Any]:
    """Returns the leaves that are not empty, which crash the compiler of shard_map (JAX 0.11)."""
    return [x for x, like in zip(jax.tree.leaves(tree), jax.tree.leaves(shapes)) if like.size]


def add_empty(leaves: list[Any], shapes: Any) -> Any:
    """Returns the tree of which drop_empty returned the leaves."""
    leaves = iter(leaves)
    return jax.tree.map(lambda x: next(leaves) if x.size else jnp.zeros(x.shape, x.dtype), shapes)


def over_agents(function: Callable) -> Callable:
    """Returns `function` over a leading axis: vmapped on accelerators, mapped on a CPU.

    On a CPU, batched matrix products cost more than twice as much as one product after another.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function)
    return lambda *args: jax.lax.map(lambda one: function(*one), args)
