"""The command line: flags, --resume, and one sentence for what a user can mend."""

import dataclasses
import sys
from pathlib import Path

import jax
import pytest
import toy
from toy_runs import command, refusal, train

import experiment
import train_lstm
import train_s5

pytestmark = pytest.mark.usefixtures("compiled_once")


# ---- Flags ---------------------------------------------------------------------------------------
def test_out_of_memory_names_the_flags(monkeypatch, capsys):
    def run(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")

    monkeypatch.setattr(experiment, "run", run)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "lower --num-envs, --num-seeds or --width" in line


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
    assert out.index("compiling, which takes about a minute\n") < out.index("6 parameters; ready")
    assert f"everything is in {folder}" in out
    command(monkeypatch, "--no-evaluate", "--out", "one", "--num-seeds", "2")
    command(monkeypatch, "--sweep", "lr=0.1,1e-3", "--sweep", "decay=0.5,0.9", "--num-seeds", "2",
            "--out", "two")
    command(monkeypatch, "--resume", "one")
    assert Evaluate.folders == [folder]
    assert experiment.read_agent("one")["params"]["params"]["w"].shape == (2, 6)
    monkeypatch.setattr(experiment, "__file__", str(tmp_path / "experiment.py"))
    experiment.evaluate(folder)
    assert "evaluate.py is not here" in capsys.readouterr().out


@pytest.mark.parametrize("flags,message", [
    (["--num-seeds", "0"], "num_seeds must be at least 1"), (["--seed", "-1"], "seed must not be"),
    (["--num-seeds", "100000000"], "at most 65536"),
    (["--lr", "-1"], "lr must be positive"), (["--lr", "high"], "--lr"),
    (["--num-envs", "7"], "divisible"), (["--no-such-flag"], "no-such-flag"),
    (["--total-timestep", "7"], "--total-timesteps"), (["--num-seed", "2"], "--num-seeds"),
    (["--seed", str(2**32)], "below 2**32"), (["--checkpoint-minutes", "nan"], "must be finite"),
    (["--seed", str(2**32 - 1), "--num-seeds", "2"], "below 2**32"),
    (["--checkpoint-minutes", "inf"], "must be finite"),
    (["--evaluate", "3"], "3"), (["--out", "  "], "out must not be blank")])
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
    (["--lr", "inf"], "lr must be finite, got inf"), (["--decay", "nan"], "decay must be finite"),
    (["--env", "walk", "walk"], "given twice"),
    (["--resume", " "], "--resume needs a run folder"), (["--resume="], "--resume needs a run folder"),
    (["--resume", "nowhere"], "nowhere is not a run folder"), (["--devices", "99"], "devices=99"),
    (["--resume", "old", "--resume=nowhere"], "nowhere is not a run folder"),
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


def test_a_mistake_in_other_code_is_said_with_its_place(monkeypatch, capsys, tmp_path):
    def run(*_):
        _, _ = 1, 2, 3

    monkeypatch.setattr(experiment, "run", run)
    line = refusal(monkeypatch, capsys, "--out", str(tmp_path / "run"))
    place = f"({__file__}, line {run.__code__.co_firstlineno + 1})"
    assert line == f"error: too many values to unpack (expected 2) {place}"


def test_help_lists_the_environments(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "--env", "help")
    assert {"finger-spin", "CartPole-v1"} <= set(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_there_are_at_most_forty_flags(capsys):
    options = dataclasses.fields(experiment.Options)
    for trainer in (train_s5, train_lstm):
        assert len(dataclasses.fields(trainer.Config)) + len(options) <= 41  # forty, and --dt
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


def test_the_largest_seed_is_its_own(tmp_path, no_figures):
    """2**32 - 1, the last that a key of JAX can tell from the others."""
    folder = train(tmp_path / "run", seed=2**32 - 1, num_seeds=1)
    assert {row["seed"] for row in experiment.read_metrics(folder)} == {2**32 - 1}


@pytest.mark.parametrize("flags,differ", [
    (["--lr", "0.2"], "--lr 0.1"), (["--num-seeds", "1"], "--num-seeds 2"),
    (["--env", "walk"], "with --env walk toy:run;"), (["--sweep", "lr=1,2"], "with no --sweep;"),
    (["--out", "other", "--decay", "0.5"], "--decay 0.9, --out "), (["--evaluate"], "with --no-evaluate;")])
def test_flags_beside_resume_that_differ_are_refused(flags, differ, whole, monkeypatch, capsys):
    """Also those that are equal to the defaults: the folder has --no-evaluate and two seeds."""
    line = refusal(monkeypatch, capsys, "--resume", str(whole), *flags)
    assert "was started with" in line and differ in line and "--total-timesteps" in line


def test_flags_beside_resume_may_repeat_the_folder(tmp_path, monkeypatch, no_figures):
    """As in a script that adds --resume to the command of the start."""
    monkeypatch.chdir(tmp_path)
    flags = ["--out", "run", "--sweep", "lr=0.1,0.2", "--num-seeds", "2", "--num-envs", "8"]
    command(monkeypatch, *flags)
    before = Path("run/config.json").read_bytes()
    command(monkeypatch, *flags, "--resume", "run")
    command(monkeypatch, "--resume", "run", "--total-timesteps", "320")
    assert Path("run/config.json").read_bytes() == before


@pytest.mark.parametrize("error,message", [
    (OSError(28, "No space left on device"), "No space left"), (OverflowError("int"), "int"),
    (MemoryError(), "out of memory; lower"), (ValueError("env"), "env")])
def test_what_a_user_can_mend_is_one_sentence(error, message, monkeypatch, capsys):
    def run(*_):
        raise error

    monkeypatch.setattr(experiment, "run", run)
    assert message in refusal(monkeypatch, capsys)


@pytest.mark.parametrize("error", [
    TypeError, AttributeError, IndexError, KeyError, ZeroDivisionError, AssertionError])
@pytest.mark.parametrize("kwargs", [(), ("speed=1",)])
def test_arguments_that_do_not_fit_the_environment(kwargs, error, tmp_path):
    """Most errors are a sentence if env_kwargs were given, else they are a bug."""
    def make_train(config, axis=None):
        raise error("unexpected keyword argument 'speed'")

    @dataclasses.dataclass(frozen=True)
    class Config(toy.Config):
        env_kwargs: tuple[str, ...] = kwargs

    with pytest.raises(ValueError if kwargs else error, match="'speed'"):
        experiment.run(make_train, Config(), experiment.Options(out=str(tmp_path / "run")))
    assert not list(tmp_path.iterdir())


# ---- Compilation cache ---------------------------------------------------------------------------
def test_the_cache_needs_no_home(monkeypatch):
    """The variable comes first, then the home directory; without one nothing is kept."""
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    chosen = []
    monkeypatch.setattr(jax.config, "update", lambda *args: chosen.append(args))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    monkeypatch.setattr(Path, "home", no_home)
    experiment.use_cache()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    experiment.use_cache()
    assert chosen == []
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    experiment.use_cache()
    assert chosen == [("jax_compilation_cache_dir", "/home/me/.cache/jax-icrl")]
