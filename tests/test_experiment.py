"""Training runs: what they write, kills and signals at any moment, resume."""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import flax.serialization
import jax
import numpy as np
import pytest
import toy
from toy_runs import resume, rows, train

import devices
import experiment
import logs
import train_lstm

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(env=("CartPole-v1",), width=8, num_envs=8, num_steps=16, num_minibatches=2, layers=1,
             update_epochs=2, log_every=2, total_timesteps=512)
pytestmark = pytest.mark.usefixtures("compiled_once")


# ---- What a run writes ---------------------------------------------------------------------------
def test_a_run_writes_its_folder(whole):
    config = toy.Config()
    names = {path.name for path in whole.iterdir()}
    assert names == {"config.json", "metrics.csv", "timing.csv", "checkpoints", "agent.msgpack",
                     "tensorboard", "returns.png"}
    assert (whole / "returns.png").stat().st_size > 1000
    assert {path.name for path in (whole / "tensorboard").iterdir()} == {"seed=0", "seed=1"}
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"8.npz", "10.npz"}
    timing = rows(whole, "timing")
    assert [int(row["update"]) for row in timing] == [2, 4, 6, 8, 10]
    assert [int(row["steps"]) for row in timing] == [64, 128, 192, 256, 320]
    assert all(float(row["sps"]) > 0 for row in timing)
    table = rows(whole)
    assert [(row["update"], row["seed"]) for row in table] == [
        (str(update), seed) for update in range(1, 11) for seed in "01"]
    assert config.num_updates == 10
    assert list(table[0])[:3] == ["update", "steps", "seed"]
    assert {"return/walk", "return/toy:run", "curve/toy:run/2", "loss"} < set(table[0])
    assert table[0]["return/walk"] == ""  # no episode has ended: NaN
    assert table[2]["return/walk"] != ""


def test_metrics_and_agents_are_those_of_the_trainer(whole):
    """Rows, cells and agent.msgpack against the trainer's functions, called seed by seed."""
    config = toy.Config()
    algorithm = toy.make_train(config)
    agent = experiment.read_agent(whole)
    assert agent == experiment.read_agent(whole / "agent.msgpack") | {
        "params": agent["params"], "norm": agent["norm"]}
    assert toy.Config(**agent["config"]) == config and agent["trainer"] == "toy"
    assert agent["agents"] == [{"seed": 0, "setting": {}}, {"seed": 1, "setting": {}}]
    assert agent["update"] == config.num_updates
    table = experiment.read_metrics(whole)
    for seed in (0, 1):
        runner, metrics = jax.lax.scan(
            lambda runner, _: algorithm.update(runner), algorithm.init(jax.random.PRNGKey(seed)),
            None, config.num_updates)
        mine = [row for row in table if row["seed"] == seed]
        for name, x in [("loss", metrics["loss"]), ("return/toy:run", metrics["return"][:, 1]),
                        ("curve/toy:run/2", metrics["curve"][:, 1, 2])]:
            np.testing.assert_allclose([row[name] for row in mine], x, rtol=1e-4)
        one = jax.tree.map(lambda x: x[seed], {"params": agent["params"], "norm": agent["norm"]})
        norm = flax.serialization.from_state_dict(runner.norm, one["norm"])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, (one["params"], norm), (runner.params, runner.norm))


def test_agents_that_cannot_be_read_say_why(tmp_path):
    foreign = flax.serialization.msgpack_serialize({"a": 1})
    for name, data, message in [("absent", None, "No such file"),
                                ("foreign", foreign, "not written"),
                                ("cut", b"\x85\xa7tra", "not written")]:
        path = tmp_path / name
        if data:
            path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            experiment.read_agent(path)
        assert "\n" not in str(error.value)


# ---- Resume --------------------------------------------------------------------------------------
class Killed(BaseException):
    """Ends a run whose folder was copied at the moment of the kill."""


MOMENTS = [  # (module or class, function, kill before or after it, at which of its calls)
    (experiment, "save", "before", 1),  # there is nothing to resume from
    (experiment, "save", "after", 1),
    (experiment.Logs, "add", "after", 1),  # rows, and no checkpoint after them
    (logs, "write_rows", "after", 1),  # rows in metrics.csv, and none in timing.csv
    (experiment.Logs, "add", "before", 3),
    (experiment, "restore", "after", 1),
    (os, "truncate", "after", 1),  # later rows are dropped from metrics.csv only
    (os, "fsync", "before", 3),  # agent.msgpack, after two logs, is not yet named so
    (os, "replace", "after", 1),  # agent.msgpack is newer than the checkpoints
    (os, "replace", "before", 2),  # the checkpoint is not yet named so
    (Path, "unlink", "before", 1),  # there are three checkpoints
    (logs, "plot_training", "before", 1)]


def killed(monkeypatch, moment, attempt, folder, copy):
    """Copies the folder at a moment of attempt(), as a SIGKILL would leave it, and ends that."""
    owner, name, when, call = moment
    original, calls = getattr(owner, name), 0

    def killing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if when == "after" or calls != call:
            result = original(*args, **kwargs)
        if calls == call:
            shutil.copytree(folder, copy)
            raise Killed
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, killing)
        attempt()


def test_a_kill_at_no_moment_loses_rows(whole, tmp_path, monkeypatch, no_figures):
    """After each kill the logs have the rows up to the newest checkpoint, in the end all."""
    folder = tmp_path / "0"
    attempt = functools.partial(train, folder, toy.Config(total_timesteps=640), evaluate=False)
    train(tmp_path / "reference", toy.Config(total_timesteps=640))
    reference = (tmp_path / "reference/metrics.csv").read_bytes()
    for number, moment in enumerate(MOMENTS, 1):
        copy = tmp_path / str(number)
        killed(monkeypatch, moment, attempt, folder, copy)
        folder, attempt = copy, functools.partial(resume, copy)
        saved = [int(path.stem) for path in folder.glob("checkpoints/*.npz")]
        metrics, timing = ((folder / name).read_bytes() for name in ("metrics.csv", "timing.csv"))
        assert reference.startswith(metrics), moment
        if saved and max(saved) > 0:
            assert metrics.count(b"\n") >= 1 + 2 * max(saved), moment
            assert timing.count(b"\n") >= 1 + max(saved) // 2, moment
    attempt()
    for name in ("metrics.csv", "agent.msgpack"):
        assert (folder / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


def test_a_finished_run_is_resumed_without_a_change(whole, tmp_path, no_figures):
    folder = shutil.copytree(whole, tmp_path / "copy")
    resume(folder)
    for name in ("metrics.csv", "timing.csv", "agent.msgpack", "checkpoints/10.npz"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_real_trainer_resumes_to_the_same_bits(tmp_path, no_figures):
    """train_lstm.py from its checkpoint half-way; train_s5.py is killed in the next test."""
    config = train_lstm.Config(**SMALL)
    folder = train(tmp_path / "whole", config, train_lstm, num_seeds=1)
    half = shutil.copytree(folder, tmp_path / "half")
    updates = sorted(int(path.stem) for path in half.glob("checkpoints/*.npz"))
    assert updates == [2, 4]
    (half / "checkpoints/4.npz").unlink()
    resume(half, train_lstm)
    for name in ("metrics.csv", "agent.msgpack"):
        assert (half / name).read_bytes() == (folder / name).read_bytes()


def test_sigkill_and_resume_are_bit_identical(tmp_path):
    """train_s5.py, fully optimised on two devices, killed at random moments: the same metrics.csv.

    This starts four processes, for only a real kill of a real trainer can show this: 40 s.
    """
    flags = ["--env", "CartPole-v1", "--total-timesteps", "8192", "--log-every", "4",
             "--width", "8", "--num-envs", "8", "--num-steps", "16", "--num-minibatches", "2",
             "--layers", "1", "--devices", "2", "--checkpoint-minutes", "0", "--no-evaluate"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2",
                        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": "",
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def start(*flags):
        return subprocess.Popen([sys.executable, str(ROOT / "train_s5.py"), *flags], env=env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    process = start(*flags, "--out", str(tmp_path / "whole"))
    assert process.wait() == 0, process.stderr.read()
    rng, kills = random.Random(0), 0
    flags = [*flags, "--out", str(tmp_path / "killed")]
    for _ in range(int(os.environ.get("KILLS", 2))):
        before = set(experiment.saved(tmp_path / "killed"))
        process = start(*flags)
        while process.poll() is None and not set(experiment.saved(tmp_path / "killed")) - before:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        flags = ["--resume", str(tmp_path / "killed")]
    process = start(*flags)
    assert process.wait() == 0, process.stderr.read()
    assert kills >= 1
    for name in ("metrics.csv", "agent.msgpack"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---- Runs that end early -------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def heed_ctrl_c():
    """A process in the background ignores Ctrl-C, and so do the processes that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_before_a_run_ends_the_process(monkeypatch, capsys):
    """As an exception it could be raised inside a callback of JAX, which drops exceptions."""
    before = []
    monkeypatch.setattr(sys, "argv", ["toy.py"])
    monkeypatch.setattr(experiment.devices, "start", lambda: before.append(signal.getsignal(signal.SIGINT)))
    monkeypatch.setattr(experiment, "parse_flags", lambda *_: [SimpleNamespace(env=("help",)), None])
    experiment.main(toy.Config, toy.make_train, "")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the shell does for a process in the background
    experiment.main(toy.Config, toy.make_train, "")
    assert before == [signal.SIG_DFL, signal.SIG_IGN]


def test_a_run_that_skips_most_updates_stops(tmp_path):
    with pytest.raises(FloatingPointError, match="lower --lr"):
        train(tmp_path / "run", toy.Config(lr=1e38))
    assert rows(tmp_path / "run")


@pytest.mark.parametrize("number,error,code", [
    (signal.SIGINT, KeyboardInterrupt, ()), (signal.SIGTERM, SystemExit, (143,))])
def test_a_signal_saves_first(
        number, error, code, whole, tmp_path, monkeypatch, capsys, no_figures):
    """It arrives during the third call. The run goes on to the same bytes; handlers are as before.
    """
    def add(self, update, *args, original=logs.Logs.add):
        original(self, update, *args)
        if update == 6:
            signal.raise_signal(number)

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(error) as stop:
        patch.setattr(logs.Logs, "add", add)
        patch.setattr(sys, "argv", ["examples/toy.py"])
        train(tmp_path / "a run", evaluate=False, checkpoint_minutes=5.0)
    assert stop.value.args == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert [path.name for path in experiment.saved(tmp_path / "a run")] == ["6.npz", "0.npz"]
    advice = f"saved; go on with: python examples/toy.py --resume '{tmp_path / 'a run'}'"
    assert capsys.readouterr().err.splitlines()[-1] == advice
    resume(tmp_path / "a run")
    for name in ("metrics.csv", "agent.msgpack"):
        assert (tmp_path / "a run" / name).read_bytes() == (whole / name).read_bytes()


def started(script, *flags, **variables):
    """A trainer as a process, on one device."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | variables
    return subprocess.Popen([sys.executable, str(ROOT / script), *flags], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(process, condition):
    while process.poll() is None and not condition():
        time.sleep(0.01)


def test_a_second_signal_and_a_second_process(tmp_path):
    """While a run trains, --resume of its folder is refused; two signals end it at once.

    The lock of the process that was killed does not block the next. This starts four processes.
    """
    folder = tmp_path / "run"
    run = started("tests/toy.py", "--out", str(folder), "--no-evaluate", TOY_DELAY="1000")
    wait_until(run, lambda: experiment.saved(folder))
    other = started("tests/toy.py", "--resume", str(folder))
    out, err = other.communicate(timeout=100)
    assert other.returncode == 2 and err == f"error: another process trains in {folder}: wait " \
                                            "until it has ended\n"
    run.send_signal(signal.SIGINT)
    while "second signal" not in run.stderr.readline():
        assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=10) == 143 and "go on with: python" in run.stderr.read()
    killed = started("tests/toy.py", "--resume", str(folder), TOY_DELAY="1000")
    wait_until(killed, lambda: (folder / "timing.csv").exists() and (folder / "lock").exists())
    killed.kill()
    killed.wait()
    assert (folder / "lock").exists()
    last = started("tests/toy.py", "--resume", str(folder), "--no-evaluate")
    assert last.communicate(timeout=100) and last.returncode == 0
    assert len(rows(folder)) == 10 and not (folder / "lock").exists()


def test_keys_may_be_of_another_kind(tmp_path, no_figures):
    """JAX_DEFAULT_PRNG_IMPL=rbg: a key is four numbers instead of two."""
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")  # in all threads
    try:
        assert len(rows(train(tmp_path / "run"))) == 20
    finally:
        jax.config.update("jax_default_prng_impl", before)


def test_everything_is_compiled_outside_the_main_thread(whole, monkeypatch):
    """For it handles signals."""
    found = []

    def here(*_):
        found.append(threading.current_thread())

    monkeypatch.setattr(devices, "make_program", lambda *_: SimpleNamespace(compile=here))
    monkeypatch.setattr(experiment, "first_runner", lambda *_: (0, here()))
    experiment.prepare(None, experiment.Run(toy.Config(), experiment.Options(), whole), None)
    assert len(found) == 2 and threading.main_thread() not in found


def test_a_signal_ends_compilation_at_once(tmp_path):
    """train_s5.py, for it is the compiler that must not hold up signals; nothing is saved yet."""
    run = started("train_s5.py", "--env", "CartPole-v1", "--out", str(tmp_path / "run"),
                  JAX_ENABLE_COMPILATION_CACHE="0")
    while "compiling" not in run.stdout.readline():
        assert run.poll() is None
    time.sleep(3)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=5) == 143
    last = run.stderr.read().splitlines()[-1]
    assert last.startswith("interrupted; go on with: python")
    assert last.endswith(f"--resume {tmp_path / 'run'}")
    assert not experiment.saved(tmp_path / "run")
