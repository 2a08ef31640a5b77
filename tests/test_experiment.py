"""Run folders: logs, checkpoints, resume, sweeps, the agent file, the command line.

Most tests train the toy of toy.py, whose compiled function is shared by all runs of this file.
"""

import csv
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
import toy

import devices
import experiment
import logs
import train_lstm
import train_s5

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(env=("CartPole-v1",), width=8, num_envs=8, num_steps=16, num_minibatches=2, layers=1,
             update_epochs=2, log_every=2, total_timesteps=512)
bitwise = functools.partial(jax.tree.map, np.testing.assert_array_equal)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Compiles once for equal trainer, configuration and devices."""
    make_program = devices.make_program

    @functools.cache
    def shared(*args):
        program = make_program(*args)
        return program._replace(compile=functools.cache(program.compile))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "make_program", shared)
        yield


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(logs, "plot_training", lambda this: None)


def train(out, config=toy.Config(), trainer=toy, **options):
    """A run of the toy with a checkpoint after every call; its folder."""
    options = {"num_seeds": 2, "checkpoint_minutes": 0.0} | options
    return experiment.run(trainer.make_train, config, experiment.Options(out=str(out), **options))


def resume(folder, trainer=toy):
    return experiment.run(trainer.make_train, *experiment.read_run(folder, trainer.Config))


def rows(folder, name="metrics"):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run of two seeds."""
    return train(tmp_path_factory.mktemp("runs") / "whole", evaluate=False)


# ---- What a run writes ---------------------------------------------------------------------------
def test_a_run_writes_its_folder(whole):
    config = toy.Config()
    names = {path.name for path in whole.iterdir()}
    assert names == {"config.json", "metrics.csv", "timing.csv", "checkpoints", "agent.msgpack",
                     "tensorboard", "returns.png"}
    assert (whole / "returns.png").stat().st_size > 1000
    assert any(path.stat().st_size > 1000 for path in (whole / "tensorboard").iterdir())
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
    assert agent["members"] == [{"seed": 0, "setting": {}}, {"seed": 1, "setting": {}}]
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


def test_a_broken_checkpoint_falls_back(whole, tmp_path, capsys, no_figures):
    """To the one before, if the newest is cut short or damaged. Then it is replaced."""
    good = (whole / "checkpoints/10.npz").read_bytes()
    with np.load(whole / "checkpoints/10.npz") as file:
        damage = good.index(file["arr_0"].tobytes())
    flipped = bytearray(good)
    flipped[damage] ^= 1
    for broken in (good[:10], good[:-100], bytes(flipped), b""):
        folder = shutil.copytree(whole, tmp_path / str(time.monotonic_ns()))
        (folder / "checkpoints/10.npz").write_bytes(broken)
        resume(folder)
        assert "10.npz cannot be read, trying the one before" in capsys.readouterr().err
        for name in ("metrics.csv", "agent.msgpack"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        before, after = (np.load(run / "checkpoints/10.npz") for run in (whole, folder))
        bitwise([before[name] for name in before if name != "logs"],
                [after[name] for name in after if name != "logs"])


def test_checkpoints_of_another_configuration_are_refused(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "copy")
    with pytest.raises(ValueError, match="was written by toy.py and cannot be read by train_s5.py"):
        resume(folder, train_s5)
    settings = json.loads((folder / "config.json").read_text())
    settings["config"]["width"] += 1
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="no usable checkpoint") as error:
        resume(folder)
    assert "\n" not in str(error.value)
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    shutil.rmtree(folder / "checkpoints")  # there are rows, so training had begun
    with pytest.raises(ValueError, match="none was written"):
        resume(folder)


def test_folders_that_cannot_be_read_say_why(tmp_path):
    """config.json of another version or trainer, with unknown, missing and impossible values."""
    config, options = toy.Config(), experiment.Options()
    good = {"trainer": "toy", "config": dataclasses.asdict(config),
            "options": dataclasses.asdict(options)}
    for saved, message in [
            (good, None), ({"trainer": "toy", "config": {}}, "not written by this version"),
            (good | {"trainer": "train_gru"}, "train_gru.py"), ([1, 2], "not written by"),
            (good | {"config": 3}, "not written by"),
            (good | {"config": good["config"] | {"lr": -1}}, "lr must be"),
            (good | {"config": good["config"] | {"lr": "high"}}, "does not fit"),
            (good | {"config": good["config"] | {"depth": 3}}, "added or removed .depth"),
            (good | {"options": {"seed": 0}}, "checkpoint_minutes, devices")]:
        (tmp_path / "config.json").write_text(json.dumps(saved))
        if message is None:
            found = experiment.read_run(tmp_path, toy.Config)
            assert found == (config, dataclasses.replace(options, resume=str(tmp_path)))
            continue
        with pytest.raises(ValueError, match=message) as error:
            experiment.read_run(tmp_path, toy.Config)
        assert "\n" not in str(error.value)


def test_a_folder_names_its_trainer(tmp_path):
    """read_run without a Config imports the trainer named in the folder."""
    saved = {"trainer": "train_s5", "config": dataclasses.asdict(train_s5.Config()),
             "options": dataclasses.asdict(experiment.Options())}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert experiment.read_run(tmp_path)[0] == train_s5.Config()
    (tmp_path / "config.json").write_text(json.dumps(saved | {"trainer": "train_gru"}))
    with pytest.raises(ValueError, match="train_gru.py is not here"):
        experiment.read_run(tmp_path)


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
                        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}

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


# ---- Sweeps --------------------------------------------------------------------------------------
def test_a_sweep_ranks_settings_that_train_as_if_alone(tmp_path, capsys):
    """Two by two settings with two seeds: a row for each, and that of a run with this setting."""
    folder = train(tmp_path / "sweep", sweep=("lr=0.1,1e-3", "decay=0.5,0.9"))
    table = rows(folder)
    assert len(table) == 8 * 10
    assert [(row["lr"], row["decay"], row["seed"]) for row in table[:8]] == [
        (lr, decay, seed) for lr in ("0.1", "0.001") for decay in ("0.5", "0.9") for seed in "01"]
    ranking = rows(folder, "sweep")
    scores = [float(row["return"]) for row in ranking]
    assert len(scores) == 4 and scores == sorted(scores, reverse=True)
    assert all(float(r["low"]) < float(r["return"]) < float(r["high"]) for r in ranking)
    assert (folder / "sweep.png").stat().st_size > 1000
    best = f"lr={float(ranking[0]['lr']):g}, decay={float(ranking[0]['decay']):g}"
    assert capsys.readouterr().out.index(best) > 0
    alone = experiment.read_metrics(train(tmp_path / "alone", toy.Config(lr=1e-3, decay=0.5)))
    swept = [row["loss"] for row in experiment.read_metrics(folder)
             if (row["lr"], row["decay"]) == (1e-3, 0.5)]
    np.testing.assert_allclose(swept, [row["loss"] for row in alone], rtol=1e-4)
    members = experiment.read_agent(folder)["members"]
    assert members[3] == {"seed": 1, "setting": {"lr": 0.1, "decay": 0.9}} and len(members) == 8


@pytest.mark.parametrize("sweep,message", [
    ("width=8,16", "'width'.*it changes the program.*Sweepable: lr, decay"), ("lr", "NAME=V1,V2"),
    ("speed=1", "cannot sweep 'speed' in one compiled function. Sweepable"),
    ("lr=low", "expected NAME=V1,V2,... with numbers"), ("lr=0.1,-1", "lr must be positive")])
def test_sweeps_that_cannot_be(sweep, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", sweep=(sweep,))
    assert not list(tmp_path.iterdir())


def test_t_interval():
    """Against numbers from a table of Student's t; NaNs are left out, one value has no interval."""
    x = np.array([[1.0, 5, 2], [2, np.nan, 2], [4.5, np.nan, 2]])
    mean, low, high = experiment.t_interval(x)
    np.testing.assert_allclose(mean, [2.5, 5, 2])
    half = 4.3027 * np.std([1, 2, 4.5], ddof=1) / np.sqrt(3)
    np.testing.assert_allclose([low[0], high[0]], [2.5 - half, 2.5 + half], rtol=1e-4)
    assert np.isnan([low[1:], high[1:]]).all()


# ---- Runs that end early -------------------------------------------------------------------------
def test_a_run_that_skips_most_updates_stops(tmp_path):
    with pytest.raises(FloatingPointError, match="lower --lr"):
        train(tmp_path / "run", toy.Config(lr=1e38))
    assert rows(tmp_path / "run")


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Logs, "add", interrupt)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "--out", str(tmp_path / "run"))
    assert stop.value.code == 130
    assert f"go on with: python toy.py --resume {tmp_path / 'run'}" in capsys.readouterr().err


def test_out_of_memory_names_the_flags(monkeypatch, capsys):
    def run(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(experiment, "run", run)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "lower --num-envs, --num-seeds or --width" in line


def test_wandb_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        train(tmp_path / "run", wandb="project")
    assert not list(tmp_path.iterdir())


def test_wandb_gets_the_numbers(monkeypatch, tmp_path, no_figures):
    """A stand-in for the package: settings once, scalars of every call, no NaN, an end."""
    class Wandb:
        log_calls, ended = [], False

        def init(self, **settings):
            self.settings = settings
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.ended = True

        def log(self, scalars, step):
            self.log_calls.append((step, scalars))

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: True)
    train(tmp_path / "run", wandb="project")
    assert wandb.settings["project"] == "project" and wandb.settings["name"] == "run"
    assert wandb.settings["config"]["lr"] == 0.1 and wandb.settings["config"]["num_seeds"] == 2
    assert [step for step, _ in wandb.log_calls] == [64, 128, 192, 256, 320] and wandb.ended
    assert all(np.isfinite(list(scalars.values())).all() for _, scalars in wandb.log_calls)


# ---- Command line --------------------------------------------------------------------------------
def command(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["toy.py", *flags])
    experiment.main(toy.Config, toy.make_train, toy.__doc__)


def test_the_command_line_trains_and_evaluates(tmp_path, monkeypatch, capsys, no_figures):
    """In a folder named after trainer, task and date. It does not evaluate a sweep."""
    class Evaluate:
        folders = []

        def report(self, folder):
            self.folders.append(folder)

    monkeypatch.setitem(sys.modules, "evaluate", Evaluate())
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "--num-seeds", "2")
    [folder] = Path("runs").iterdir()
    assert folder.name.startswith("toy-2tasks-20") and Evaluate.folders == [folder]
    out = capsys.readouterr().out
    assert f"{folder}: 2 x 320 steps of walk, toy:run on 1 cpu" in out
    assert "6 parameters; ready in" in out and f"everything is in {folder}" in out
    command(monkeypatch, "--no-evaluate", "--out", "one", "--num-seeds", "2")
    command(monkeypatch, "--sweep", "lr=0.1,1e-3", "--sweep", "decay=0.5,0.9", "--num-seeds", "2",
            "--out", "two")
    command(monkeypatch, "--resume", "one", "--num-seeds", "7")
    assert Evaluate.folders == [folder]
    assert experiment.read_agent("one")["params"]["params"]["w"].shape == (2, 6)
    monkeypatch.setattr(experiment, "__file__", str(tmp_path / "experiment.py"))
    experiment.evaluate(folder)
    assert "evaluate.py is not here" in capsys.readouterr().out


@pytest.mark.parametrize("flags,message", [
    (["--num-seeds", "0"], "num_seeds must be at least 1"), (["--seed", "-1"], "seed must not be"),
    (["--lr", "-1"], "lr must be positive"), (["--lr", "high"], "--lr"),
    (["--num-envs", "7"], "divisible"), (["--no-such-flag"], "no-such-flag"),
    (["--evaluate", "3"], "3")])
def test_invalid_flags_are_explained_by_tyro(flags, message, tmp_path, monkeypatch, capsys):
    """Its message and exit status 2."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *flags)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags,message", [
    (["--sweep", "width=8,16"], "cannot sweep"), (["--out", "/proc/nowhere"], "choose an --out"),
    (["--out", "old"], "old exists already: choose another --out, or --resume old"),
    (["--resume", "nowhere"], "nowhere is not a run folder"), (["--devices", "99"], "devices=99"),
    (["--resume", "old", "--lr", "1"], "not written by this version")])
def test_what_cannot_be_run_is_one_sentence_and_exit_status_2(
        flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    Path("old/config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *flags)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.rglob("config.json")] == ["config.json"]


def test_there_are_at_most_forty_flags(capsys):
    options = dataclasses.fields(experiment.Options)
    for trainer in (train_s5, train_lstm):
        assert len(dataclasses.fields(trainer.Config)) + len(options) <= 40
    with pytest.raises(SystemExit) as stop:
        experiment.parse_flags(train_s5.Config, args=["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for field in options:
        assert f"--{field.name.replace('_', '-')}" in text


def test_sizes_depend_on_the_machine(monkeypatch):
    """The command line without flags has the sizes of Config(), on a CPU and on an accelerator."""
    for backend, width in (("cpu", 6), ("gpu", 12)):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        config, options = experiment.parse_flags(toy.Config, args=[])
        assert config == toy.Config() and config.width == width and options == experiment.Options()
