"""Run folders: names, lock, refusals, damaged files."""

import dataclasses
import errno
import functools
import json
import os
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from tensorboardX.record_writer import RecordWriter
from toy_runs import command, refusal, resume, rows, train

import devices
import experiment
import logs
import run_folder
import train_s5

bitwise = functools.partial(jax.tree.map, np.testing.assert_array_equal)
pytestmark = pytest.mark.usefixtures("compiled_once")


# ---- Folders that cannot be used -----------------------------------------------------------------
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
    text = (folder / "config.json").read_text()
    for part, name, value in (("config", "width", 9), ("config", "lr", 0.5), ("options", "seed", 5)):
        settings = json.loads(text)
        before = settings[part][name]
        settings[part][name] = value
        (folder / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=f"was edited since 10.npz was written: {name} was {before}$"):
            resume(folder)
    (folder / "config.json").write_text(text)
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
            (good | {"config": good["config"] | {"env": [3]}}, "env must be texts, got .3,"),
            (good | {"config": good["config"] | {"env": [["walk"]]}}, "env must be texts"),
            (good | {"config": good["config"] | {"env": 3}}, "does not fit"),
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
    for trainer in ("train_gru", "agent", "../s5", "tests/toy", "x" * 300, 3, None, ["train_s5"]):
        (tmp_path / "config.json").write_text(json.dumps(saved | {"trainer": trainer}))
        with pytest.raises(ValueError, match=r"the trainer .*\.py is not here"):
            experiment.read_run(tmp_path)


@pytest.mark.parametrize("values", [
    {"seed": "a"}, {"seed": None}, {"num_seeds": 2.5}, {"sweep": 5}, {"sweep": (3,)}, {"devices": 1.5},
    {"evaluate": "no"}, {"out": 3}, {"checkpoint_minutes": float("nan")},
    {"checkpoint_minutes": float("inf")}, {"seed": True}])
def test_options_of_another_type_are_refused(values, whole, tmp_path):
    settings = json.loads((whole / "config.json").read_text())
    settings["options"] |= values
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=next(iter(values))):
        experiment.read_run(tmp_path, toy.Config)
    with pytest.raises(ValueError, match=next(iter(values))):
        experiment.Options(**values)


# ---- What is left of metrics.csv and checkpoints/ ------------------------------------------------
def without_head(text):
    return text.split("\n", 1)[1]


def without_last_row(text):
    return text[:text[:-1].rindex("\n") + 1]


def without_a_middle_row(text):
    lines = text.split("\n")
    return "\n".join(lines[:5] + lines[6:])


@pytest.mark.parametrize("damage,repaired", [
    (None, False), (without_head, False), (without_a_middle_row, False), (without_last_row, True),
    (lambda text: "", False), (lambda text: text + "11,352", True), (lambda text: text[:-5], True)])
def test_metrics_that_lost_rows(damage, repaired, whole, tmp_path, no_figures):
    """The older checkpoint makes the last rows again. What it cannot make again is one sentence."""
    folder = shutil.copytree(whole, tmp_path / "copy")
    text = (whole / "metrics.csv").read_text()
    (folder / "metrics.csv").unlink()
    if damage:
        (folder / "metrics.csv").write_bytes(damage(text.replace("\r\n", "\n")).replace(
            "\n", "\r\n").encode())
    if repaired:
        resume(folder)
        assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
        return
    with pytest.raises(ValueError, match="metrics.csv has lost rows") as error:
        resume(folder)
    assert "\n" not in str(error.value)


def test_a_lost_timing_file_begins_anew(whole, tmp_path, no_figures):
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "checkpoints/10.npz").unlink()
    (folder / "timing.csv").unlink()
    resume(folder)
    assert [row["update"] for row in rows(folder, "timing")] == ["10"]
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_an_agent_without_its_checkpoints_is_not_overwritten(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "agent.msgpack"):
        shutil.copy(whole / name, folder)
    with pytest.raises(ValueError, match="no usable checkpoint"):
        resume(folder)
    assert (folder / "agent.msgpack").read_bytes() == (whole / "agent.msgpack").read_bytes()


def test_what_is_no_checkpoint_is_passed_over(whole, tmp_path, no_figures):
    """An empty file or folder with a later number, other names; then two checkpoints are kept."""
    folder = shutil.copytree(whole, tmp_path / "copy")
    for name in ("99999.npz", "98.npz"):
        (folder / "checkpoints" / name).touch()
    for name in ("99998", "99997.npz"):
        (folder / "checkpoints" / name).mkdir()
    (folder / "checkpoints/old.npz").touch()
    (folder / "checkpoints/10.npz").unlink()
    resume(folder)
    assert (folder / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert [path.name for path in experiment.saved(folder)] == ["10.npz", "8.npz"]


# ---- Names and locks -----------------------------------------------------------------------------
def test_default_names_of_one_second_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda _: "20260101-000000")
    folders = [experiment.open_folder(toy.Config(), experiment.Options()) for _ in range(3)]
    assert [folder.name for folder in folders] == [
        f"toy-2tasks-20260101-000000{end}" for end in ("", "-2", "-3")]
    assert all((folder / "config.json").exists() for folder in folders)
    folder = experiment.open_folder(toy.Config(env=("a/b:c",)), experiment.Options())
    assert str(folder) == "runs/toy-a-b-c-20260101-000000"


def test_blanks_around_a_name_do_not_count(tmp_path, monkeypatch, capsys, no_figures):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "--out", " a b ", "--no-evaluate", "--num-seeds", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]
    command(monkeypatch, "--resume", "a b ", "--no-evaluate")
    assert "exists already" in refusal(monkeypatch, capsys, "--out", "a b  ")
    assert [path.name for path in tmp_path.iterdir()] == ["a b"]


def test_a_folder_in_use_is_refused_unchanged(whole, tmp_path, no_figures):
    folder = shutil.copytree(whole, tmp_path / "copy")
    (folder / "lock").touch()  # of a process that was killed
    with experiment.locked(folder):
        with pytest.raises(ValueError, match="another process trains in"):
            resume(folder)
    resume(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_the_lock_of_a_folder_that_was_removed_does_not_count(tmp_path, monkeypatch):
    """Its file was removed between opening and locking: another process may hold the new one."""
    def flock(*_):
        (tmp_path / "lock").unlink()

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with pytest.raises(ValueError, match="another process"), experiment.locked(tmp_path):
        pass


# ---- Refusals ------------------------------------------------------------------------------------
def test_what_fails_before_training_leaves_no_folder(tmp_path, monkeypatch, capsys):
    """So that the corrected command can have the same name."""
    def fail(error):
        def make_program(*_):
            raise error
        return make_program

    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--out", "run"], ["--out", "deep/run"]):
        for error in (ValueError("unknown environment"), OverflowError("too large")):
            monkeypatch.setattr(devices, "make_program", fail(error))
            assert str(error) in refusal(monkeypatch, capsys, *flags)
        for error in (KeyError("a bug"), SystemExit("a module without a main guard")):
            monkeypatch.setattr(devices, "make_program", fail(error))
            with pytest.raises(type(error)):
                command(monkeypatch, *flags)
        assert not list(tmp_path.rglob("*.json")) and not (tmp_path / "runs").exists()
        assert not (tmp_path / "run").exists()


def test_a_resumed_folder_outlives_a_refusal(whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.setattr(experiment, "prepare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        resume(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("owner,name,call", [
    (logs, "write_rows", 3), (run_folder, "write_whole", 1), (run_folder, "write_whole", 4),
    (Path, "mkdir", 2), (os, "fsync", 9), (RecordWriter, "write", 20)])
def test_a_full_disk_is_one_sentence(owner, name, call, whole, tmp_path, monkeypatch, capsys):
    """And resume goes on from there. The last case is TensorBoard's file."""
    original, calls = getattr(owner, name), 0

    def full(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        flags = ["--checkpoint-minutes", "0", "--num-seeds", "2", "--no-evaluate"]
        line = refusal(patch, capsys, "--out", "run", *flags)
    assert "No space left on device; mend that, then go on with: python toy.py --resume run" in line
    command(monkeypatch, "--resume", "run")
    assert (tmp_path / "run/metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "settings_text", full)
    line = refusal(monkeypatch, capsys, "--out", str(tmp_path / "run"))
    assert "cannot write the run folder" in line and "No space left" in line
    assert not list(tmp_path.iterdir())


def test_a_run_with_a_repeated_task_is_refused(tmp_path):
    """Its columns in metrics.csv would be one."""
    for tasks in (("walk", "walk"), ("walk", "dmc:walk"), ("gymnax:walk", "walk")):
        with pytest.raises(ValueError, match="given twice"):
            train(tmp_path / "run", toy.Config(env=tasks))
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_goes_on_to_a_later_end(whole, tmp_path, monkeypatch, capsys, no_figures):
    """The same bytes as a run with this end from the start, for the toy has no schedule."""
    folder = shutil.copytree(whole, tmp_path / "copy")
    command(monkeypatch, "--resume", str(folder), "--total-timesteps", "640", "--no-evaluate")
    assert "goes on to 640 steps instead of 320; schedules" in capsys.readouterr().out
    longer = train(tmp_path / "longer", toy.Config(total_timesteps=640), evaluate=False)
    for name in ("metrics.csv", "agent.msgpack"):
        assert (folder / name).read_bytes() == (longer / name).read_bytes()
    assert experiment.read_run(folder, toy.Config)[0].total_timesteps == 640
    with pytest.raises(SystemExit):
        command(monkeypatch, "--resume", str(folder), "--total-timesteps", "64")
    out, err = capsys.readouterr()
    assert "has 640 steps already, more than --total-timesteps 64" in err and "goes on to" not in out
    assert experiment.read_run(folder, toy.Config)[0].total_timesteps == 640
