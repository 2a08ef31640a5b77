"""Devices and processes: which are used, and that they change nothing but rounding."""

import csv
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy

import devices
import experiment
import train_s5

ROOT = Path(__file__).resolve().parent.parent
QUICKLY = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


# ---- Start-up ------------------------------------------------------------------------------------
@pytest.mark.parametrize("count,process,coordinator,expected", [
    (None, None, None, ("", 1, 0)), ("1", None, None, ("", 1, 0)), ("1", "0", "a:1", ("a:1", 1, 0)),
    ("2", "0", "host:1234", ("host:1234", 2, 0)), ("2", "1", "[::1]:80", ("[::1]:80", 2, 1)),
    ("2", "0", None, "need JAX_COORDINATOR_ADDRESS=HOST:PORT, got ''"),
    ("2", "0", "host", "need JAX_COORDINATOR_ADDRESS=HOST:PORT, got 'host'"),
    ("2", None, "host:1", "JAX_PROCESS_ID must be from 0 to 1, got ''"),
    ("2", "2", "host:1", "JAX_PROCESS_ID must be from 0 to 1, got '2'"),
    (None, "1", None, "JAX_PROCESS_ID must be from 0 to 0, got '1'"),
    ("two", "0", "host:1", "JAX_NUM_PROCESSES must be the number of processes, got 'two'"),
    ("0", "0", "host:1", "JAX_NUM_PROCESSES must be"),
    (None, "0", "host:1", "JAX_NUM_PROCESSES must be")])
def test_processes_are_read_from_the_environment(count, process, coordinator, expected):
    values = {"JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": process,
              "JAX_COORDINATOR_ADDRESS": coordinator}
    variables = {name: value for name, value in values.items() if value is not None}
    if isinstance(expected, tuple):
        assert devices.read_processes(variables) == expected
        return
    with pytest.raises(ValueError) as error:
        devices.read_processes(variables)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("process,address,reason", [
    (1, "localhost:9", "does not answer"), (1, "localhost:99999", "does not answer"),
    (0, "localhost:99999", "cannot listen"), (0, "localhost:{taken}", "cannot listen")])
def test_a_process_that_cannot_join_ends_the_command(monkeypatch, capsys, process, address, reason):
    """Nobody listens on port 9; there is no port 99999."""
    monkeypatch.setattr(sys, "argv", ["toy.py"])
    monkeypatch.setattr(devices, "start", functools.partial(devices.start, patience=0))
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", str(process))
    with socket.create_server(("", 0)) as other:
        address = address.format(taken=other.getsockname()[1])
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
        with pytest.raises(SystemExit) as stop:
            experiment.main(toy.Config, toy.make_train, "")
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: process 0 {reason} at {address}")


@pytest.mark.parametrize("processes,sentence", [
    ((0, 1, 2), ""), ((2, 0, 1), ""), ((0, 2), "no call from process 1"), ((0,), "no call from process 1, 2"),
    ((0, 1, 1), "two processes have JAX_PROCESS_ID=1")])
def test_processes_find_each_other_or_all_say_who_is_missing(processes, sentence):
    """A call of something that is no process is ignored."""
    with socket.create_server(("", 0)) as free:
        address = f"localhost:{free.getsockname()[1]}"

    def join(process):
        try:
            return devices.roll_call(address, 3, process, patience=1)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(join, process) for process in processes]
        stranger = pool.submit(devices.call_first, "localhost", int(address.split(":")[1]), 999,
                               time.monotonic() + 0.5)
        assert [answer.result() for answer in answers] == [sentence or None] * len(processes)
        assert isinstance(stranger.exception(), (OSError, type(None)))


def test_jax_does_not_swallow_a_signal_before_the_run_handles_it(monkeypatch):
    """Its preemption service, on by default, only logs a SIGTERM."""
    services = []
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:9")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setattr(devices, "roll_call", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: services.append(
        jax.config.jax_enable_preemption_service))
    before = jax.config.jax_enable_preemption_service
    try:
        devices.start()
    finally:
        jax.config.update("jax_enable_preemption_service", before)
    assert services == [False]


def test_cores_are_counted_by_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    assert devices.num_cores() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1000, 1001, 1002}, raising=False)
    assert devices.num_cores() == 3  # nothing is known of hyperthreads


# ---- Mesh ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("agents,wanted,existing,processes,shape", [
    (1, 0, 1, 1, (1, 1)), (1, 0, 4, 1, (1, 4)), (1, 0, 5, 1, (1, 4)), (2, 0, 4, 1, (2, 2)),
    (4, 0, 4, 1, (4, 1)), (3, 0, 4, 1, (1, 4)), (3, 0, 2, 1, (1, 2)), (6, 0, 4, 1, (2, 2)),
    (1, 2, 4, 2, (1, 2)), (1, 1, 4, 1, (1, 1)),
    (1, 3, 4, 1, "divisible by devices x tasks x minibatches"), (1, 8, 4, 1, "there are 4"),
    (1, 1, 4, 2, "in 2 processes"), (1, 0, 3, 3, "in 3 processes")])
def test_devices_are_filled_with_agents_first(agents, wanted, existing, processes, shape):
    """Of 16 environments of 2 tasks x 2, which 1, 2 or 4 devices can share.

    The devices that are asked for are all used, or refused.
    """
    config = toy.Config(num_envs=16)
    if isinstance(shape, tuple):
        assert devices.mesh_shape(config, agents, wanted, existing, processes) == shape
    else:
        with pytest.raises(ValueError, match=shape):
            devices.mesh_shape(config, agents, wanted, existing, processes)


def test_agents_side_by_side_equal_agents_in_turn(monkeypatch):
    """An accelerator vmaps what a CPU maps."""
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in range(3)])
    found = []
    for backend in ("cpu", "gpu"):
        mesh = devices.make_mesh(toy.Config(), 3, 1)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        program = devices.make_program(toy.make_train, toy.Config(width=6), mesh, 3)
        found.append(program.compile()(program.init(keys, {})))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), *found)


# ---- The same results ----------------------------------------------------------------------------
def test_devices_have_the_environments_of_one():
    """However many share them, here over a mapped axis: the same observations, none twice."""
    config = dict(env=("cartpole-swingup", "reacher-easy"), width=8, layers=1, num_minibatches=1)

    def start(shards):
        train = train_s5.make_train(
            train_s5.Config(num_envs=8 // shards, **config), axis="envs" if shards > 1 else None)
        init = jax.vmap(train.init, in_axes=None, axis_name="envs", axis_size=shards)
        projected = jax.jit(lambda key: init(key).observation.projected)(jax.random.PRNGKey(0))
        # (shards, tasks, environments on each, features) -> tasks first
        return projected.reshape(shards, 2, 4 // shards, -1).swapaxes(0, 1).reshape(8, -1)

    one = start(1)
    assert len(np.unique(one, axis=0)) == 8
    for shards in (2, 4):
        np.testing.assert_allclose(start(shards), one, rtol=1e-5, atol=1e-6)


RUNS = """
import sys
sys.path[:0] = ["ROOT", "ROOT/tests"]
import experiment, logs, toy, train_s5
for trainer, config, count, seeds in [
        (toy, toy.Config(), 2, 1),
        (train_s5, train_s5.Config(**SMALL), 1, 1), (train_s5, train_s5.Config(**SMALL), 4, 1),
        (train_s5, train_s5.Config(**SMALL), 4, 2)]:
    logs.plot_training = lambda this: None
    experiment.run(trainer.make_train, config, experiment.Options(
        out=f"{trainer.__name__}-{count}x{seeds}", devices=count, num_seeds=seeds))
""".replace("ROOT", str(ROOT)).replace("SMALL", repr(dict(
    env=("CartPole-v1",), width=8, num_envs=8, num_steps=16, num_minibatches=2, layers=1,
    log_every=4, total_timesteps=1000)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs on one, two and four devices, all of one process that has four.

    XLA fixes their number when JAX starts, hence the process; three programs of a real trainer take
    half a minute to compile.
    """
    folder = tmp_path_factory.mktemp("devices")
    done = subprocess.run([sys.executable, "-c", RUNS], cwd=folder, capture_output=True, text=True,
                          env=os.environ | QUICKLY | {"JAX_NUM_CPU_DEVICES": "4"})
    assert done.returncode == 0, done.stderr
    for shape, name in [("4 cpu", "4x1"), ("4 cpu", "4x2"), ("1 cpu", "1x1")]:
        lines = done.stdout.splitlines()
        [line] = [line for line in lines if line.startswith(f"train_s5-{name}: ")]
        assert f"on {shape}" in line
    return folder


def test_devices_equal_one(runs):
    """One seed on 1 and 4 devices, two seeds on 2 x 2: equal metrics and agents but for rounding.

    Sums over environments are taken in another order, 1e-7 relative. Adam divides small gradients
    by their size and makes up to 1e-3 of that, of steps of 5e-4.
    """
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5)
    found = []
    for name in ("1x1", "4x1", "4x2"):
        folder = runs / f"train_s5-{name}"
        table = [row for row in experiment.read_metrics(folder) if row["seed"] == 0]
        agent = experiment.read_agent(folder)
        found.append((table, jax.tree.map(lambda x: x[0], (agent["params"], agent["norm"]))))
    for other in found[1:]:
        jax.tree.map(close, other, found[0])


def test_a_run_is_resumed_on_as_many_devices(runs):
    config, options = experiment.read_run(runs / "train_s5-4x1", train_s5.Config)
    with pytest.raises(ValueError, match="devices=4, but there are 1") as error:
        experiment.run(train_s5.make_train, config, options)
    assert "\n" not in str(error.value)


def start_two(*flags, delay="", second=()):
    """Two processes that train the toy together, the second with more flags."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | QUICKLY | {
        "JAX_NUM_CPU_DEVICES": "1", "TOY_DELAY": delay, "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2"}
    return [subprocess.Popen([sys.executable, str(ROOT / "tests/toy.py"), *flags, *more],
                             env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
            for i, more in enumerate([(), second])]


def test_two_processes_survive_kills(runs, tmp_path):
    """SIGKILL of both, then of either, after which the other ends by itself. --resume goes on.

    In the end metrics.csv has the bytes that one process on two devices writes. Four times two
    processes have to start, and the one that is left notices after a while: 30 s.
    """
    folder = tmp_path / "killed"
    flags = ["--out", str(folder), "--checkpoint-minutes", "0", "--no-evaluate"]
    for victims in ((0, 1), (1,), (0,)):
        before = set(folder.glob("checkpoints/*.npz"))
        pair = start_two(*flags, delay="0.5")
        while pair[0].poll() is None and not set(folder.glob("checkpoints/*.npz")) - before:
            time.sleep(0.01)
        for i in victims:
            pair[i].send_signal(signal.SIGKILL)
        for i, process in enumerate(pair):
            code = process.wait(timeout=60)
            assert code == -signal.SIGKILL if i in victims else code != 0, process.stderr.read()
        flags = ["--resume", str(folder)]
    for process in start_two(*flags):
        assert process.wait() == 0, process.stderr.read()
    assert (folder / "metrics.csv").read_bytes() == (runs / "toy-2x1/metrics.csv").read_bytes()
    with (folder / "timing.csv").open() as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["2", "4", "6", "8", "10"]


def test_two_processes_are_refused_and_interrupted_together(tmp_path):
    """Other flags on the second are refused by both. SIGTERM of the second saves and ends both.

    Three times two processes have to start, the last because nothing may be left in the way: 15 s.
    """
    folder = tmp_path / "run"
    flags = ["--out", str(folder), "--no-evaluate"]
    for process in start_two(*flags, second=["--lr", "0.2"]):
        error = process.communicate(timeout=100)[1]
        assert process.returncode == 2 and "started with different flags" in error
    assert not folder.exists()
    pair = start_two(*flags, delay="0.5")
    rows = folder / "metrics.csv"
    while pair[0].poll() is None and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.01)
    pair[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in pair]
    assert [process.returncode for process in pair] == [143, 143], errors
    assert f"saved; go on with: python {ROOT / 'tests/toy.py'} --resume {folder}" in errors[0]
    update = int(experiment.saved(folder)[0].stem)
    assert 0 < update < 10 and len(experiment.read_metrics(folder)) == update
    for process in start_two("--resume", str(folder)):
        assert process.communicate(timeout=100) and process.returncode == 0
    assert len(experiment.read_metrics(folder)) == 10


def test_a_kind_of_device_that_is_not_here_is_one_sentence():
    """JAX_PLATFORMS is read when JAX starts, hence the processes."""
    for kind, *command in (("tpu", "tests/toy.py"), ("nothing", "evaluate.py", "results/default")):
        done = subprocess.run([sys.executable, *command], text=True, cwd=ROOT,
                              capture_output=True, env=os.environ | {"JAX_PLATFORMS": kind})
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1] == (
            f"error: JAX finds no device with JAX_PLATFORMS='{kind}'")
