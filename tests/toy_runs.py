"""Runs of the toy of toy.py and their folders. See conftest.py for fixtures."""

import csv
import sys

import pytest
import toy

import experiment


def train(out, config=toy.Config(), trainer=toy, **options):
    """A run of the toy with a checkpoint after every call; its folder."""
    options = {"num_seeds": 2, "checkpoint_minutes": 0.0} | options
    return experiment.run(trainer.make_train, config, experiment.Options(out=str(out), **options))


def resume(folder, trainer=toy):
    return experiment.run(trainer.make_train, *experiment.read_run(folder, trainer.Config))


def rows(folder, name="metrics"):
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def command(monkeypatch, *flags):
    """`python toy.py FLAGS` in this process."""
    monkeypatch.setattr(sys, "argv", ["toy.py", *flags])
    experiment.main(toy.Config, toy.make_train, toy.__doc__)


def refusal(monkeypatch, capsys, *flags):
    """The one sentence with which `python toy.py FLAGS` ends."""
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *flags)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]
