"""Logs, figures and the ranking of a sweep, in which each agent is judged alone."""

import sys

import numpy as np
import pytest
import toy
from tensorboardX.proto.event_pb2 import Event
from toy_runs import resume, rows, train

import devices
import experiment
import logs

pytestmark = pytest.mark.usefixtures("compiled_once")


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
    agents = experiment.read_agent(folder)["agents"]
    assert agents[3] == {"seed": 1, "setting": {"lr": 0.1, "decay": 0.9}} and len(agents) == 8


@pytest.mark.parametrize("sweep,message", [
    ("width=8,16", "'width'.*it changes the program.*Sweepable: lr, decay"), ("lr", "NAME=V1,V2"),
    ("speed=1", "cannot sweep 'speed' in one compiled function. Sweepable"),
    ("lr=0.1,0.2,1e-1", "a value is given twice"), ("lr=1,inf", "lr must be finite, got inf"),
    ("lr=nan", "lr must be finite"), ("lr=0.1,0.1000001", "twice; six digits of each"),
    ("lr=low", "expected NAME=V1,V2,... with numbers"), ("lr=0.1,-1", "lr must be positive")])
def test_sweeps_that_cannot_be(sweep, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", sweep=(sweep,))
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_swept_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--sweep lr is given twice"):
        train(tmp_path / "run", sweep=("lr=1,2", "lr=3"))
    assert not list(tmp_path.iterdir())


def test_a_setting_that_fails_is_marked_and_the_others_finish(tmp_path, capsys):
    """1e38 is too large a step. The other setting trains as if alone; the failed one comes last."""
    folder = train(tmp_path / "sweep", sweep=("lr=1e38,0.1",))
    captured = capsys.readouterr()
    for seed in (0, 1):
        assert captured.err.count(f"lr=1e+38,seed={seed} has failed: most of its gradient") == 1
    alone = experiment.read_metrics(train(tmp_path / "alone", toy.Config(lr=0.1)))
    mine = [row["loss"] for row in experiment.read_metrics(folder) if row["lr"] == 0.1]
    np.testing.assert_allclose(mine, [row["loss"] for row in alone], rtol=1e-4)
    best, worst = rows(folder, "sweep")
    assert (best["lr"], worst["lr"]) == ("0.1", "1e+38")
    assert worst["return"] == worst["low"] == worst["high"] == worst["seed 0"] == ""
    scores = experiment.final_scores(*experiment.read_run(folder, toy.Config), folder)
    assert np.isnan(scores[:2]).all() and np.isfinite(scores[2:]).all()
    ranking = captured.out[captured.out.index("settings, best first"):]
    assert "no interval\ncovers runs that collapse" in ranking
    assert "[nan" not in ranking and "best of 2 settings, chosen on the same returns" in ranking


def test_a_ranking_of_single_seeds_speaks_of_no_brackets(tmp_path, capsys):
    train(tmp_path / "sweep", sweep=("lr=0.1,1e-3",), num_seeds=1)
    printed = capsys.readouterr().out
    assert "best of 2 settings, chosen on the same returns" in printed and "bracket" not in printed


@pytest.mark.parametrize("score,text", [
    (12.345, "12.35"), (0.5, "0.50"), (0.00123, "0.0012"), (-0.02, "-0.02"), (0.0, "0.00"), (np.nan, "-")])
def test_a_small_return_is_not_printed_as_zero(score, text):
    assert logs.score_text(score) == text


def test_one_seed_of_a_setting_that_fails_puts_it_last(whole):
    """The mean of its other seeds would flatter it. Every seed is listed."""
    config, options = experiment.read_run(whole, toy.Config)
    options = experiment.Options(sweep=("lr=0.1,0.2",), num_seeds=3)
    scores = np.array([100, np.nan, 100, 1, 2, 3.0])
    folder = whole.parent / "ranking"
    folder.mkdir()
    table = [{"update": u, "steps": u, "seed": s, "return/walk": x, "return/toy:run": x}
             for u in (1, 2) for s, x in enumerate([0, 5, 5, 1, 2, 4.0])]
    with (folder / "metrics.csv").open("w") as file:
        logs.write_rows(file, table)
    logs.write_sweep(experiment.Run(config, options, folder), scores)
    first, second = rows(folder, "sweep")
    assert (first["lr"], first["return"], second["return"]) == ("0.2", "2", "")
    assert [second[f"seed {i}"] for i in range(3)] == ["100", "", "100"]
    assert (first["seeds"], second["seeds"]) == ("3", "2")
    assert float(first["low"]) == 0.0  # the t interval begins at -0.48: no run has returned that
    assert float(first["high"]) == pytest.approx(2 + 2.484, abs=1e-3)


def test_a_swept_name_in_metrics_csv_is_the_setting():
    """Trainers also have a metric lr, the annealed step size."""
    options = experiment.Options(sweep=("lr=0.1,0.2",))
    metrics = {"lr": np.array([[0.01, 0.02], [0.03, 0.04]]), "loss": np.zeros((2, 2))}
    config = toy.Config()
    swept = logs.metric_rows(config, options, 0, metrics)
    assert [row["lr"] for row in swept] == [0.1, 0.2, 0.1, 0.2]
    alone = logs.metric_rows(config, experiment.Options(), 0, metrics)
    assert [row["lr"] for row in alone] == [0.01, 0.02]
    assert logs.scalars_of({"lr": metrics["lr"][0]}) == {"charts/lr": 0.015}
    infinite = {"value_loss": np.array([1.0, np.inf]), "kl": np.array([np.nan])}
    assert logs.scalars_of(infinite) == {}  # tensorboardX would print a warning for each


def test_an_update_without_an_end_of_an_episode_is_no_number():
    """Under JAX_DEBUG_NANS the trainer returns -inf for it, which would make every mean -inf."""
    metrics = {"return": np.array([[[-np.inf, 1.0], [3.0, np.nan]]]), "loss": np.zeros((1, 2))}
    first, second = logs.metric_rows(toy.Config(), experiment.Options(), 0, metrics)
    assert np.isnan([first["return/walk"], second["return/toy:run"]]).all()
    assert (first["return/toy:run"], second["return/walk"]) == (1.0, 3.0)


def test_divergence_is_said_once(tmp_path, monkeypatch, capsys, no_figures):
    """However often environments diverge; and not at all where none does."""
    def add(self, update, metrics, seconds, original=logs.Logs.add):
        diverged = np.full(metrics["loss"].shape, 3.0 if update > 2 else 0.0)
        original(self, update, metrics | {"diverged": diverged}, seconds)

    train(tmp_path / "sound")
    assert "diverged" not in capsys.readouterr().err
    monkeypatch.setattr(logs.Logs, "add", add)
    train(tmp_path / "run")
    assert capsys.readouterr().err.count("environments diverged") == 1


def test_the_bar_has_no_nan(tmp_path, capsys, no_figures):
    """No episode ends in the first update of the toy. The bar counts the steps of all agents."""
    train(tmp_path / "run", toy.Config(log_every=1, total_timesteps=64))
    captured = capsys.readouterr()
    assert "nan" not in captured.err and "128/128" in captured.err and "walk -" in captured.err


def test_a_task_of_which_no_episode_ended_has_a_dash_at_the_end(tmp_path, capsys, no_figures):
    train(tmp_path / "run", toy.Config(env=("walk",), log_every=1, total_timesteps=32))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["walk"]]
    assert line.split() == ["walk", "return", "-", "seeds:", "-", "-"]


def test_every_seed_is_listed(tmp_path, capsys, no_figures):
    train(tmp_path / "run")
    config, options = experiment.read_run(tmp_path / "run", toy.Config)
    scores = experiment.final_scores(config, options, tmp_path / "run")
    out = capsys.readouterr().out
    for task, score in zip(config.env, scores.T):
        [line] = [line for line in out.splitlines() if line.split()[:1] == [task]]
        assert line.split()[2:] == [f"{score.mean():.2f}", "seeds:", *(f"{x:.2f}" for x in score)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that logs.py draws, each as (figure, axes)."""
    figures = []

    def panels(*args, original=logs.panels):
        figures.append(original(*args))
        return figures[-1]

    monkeypatch.setattr(logs, "panels", panels)
    return figures


def test_returns_have_a_line_for_each_setting(tmp_path, monkeypatch, drawn):
    """Its mean over seeds, with a band from the lowest to the highest, which the title explains."""
    monkeypatch.setattr(logs, "write_sweep", lambda *_: None)
    folder = train(tmp_path / "sweep", sweep=("lr=0.1,0.001",))
    [(figure, axes)] = drawn
    returns = logs.training_returns(*experiment.read_run(folder, toy.Config), folder)
    assert "mean of 2 seeds" in figure.get_suptitle() and "lowest" in figure.get_suptitle()
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["lr=0.1", "lr=0.001"]
    for task, axis in enumerate(axes.flat):
        for setting, line in enumerate(axis.lines):
            mean = returns[:, 2 * setting:2 * setting + 2, task].mean(1)
            np.testing.assert_allclose(line.get_ydata(), mean)


def test_the_title_of_a_single_panel_is_not_cut_off(tmp_path, drawn):
    train(tmp_path / "run", toy.Config(env=("walk",)))
    [(figure, _)] = drawn
    figure.draw_without_rendering()
    title = figure.texts[0].get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width


def test_the_backend_of_a_notebook_does_not_break_figures(tmp_path, monkeypatch):
    """matplotlib refuses to be imported where that backend is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MPLBACKEND", "module://no_such_notebook.backend")
    figure, _ = logs.panels(1, 1, 2, 2)
    figure.savefig(tmp_path / "figure.png")


def test_t_interval():
    """Against numbers from a table of Student's t; NaNs are left out, one value has no interval."""
    x = np.array([[1.0, 5, 2], [2, np.nan, 2], [4.5, np.nan, 2]])
    mean, low, high = experiment.t_interval(x)
    np.testing.assert_allclose(mean, [2.5, 5, 2])
    half = 4.3027 * np.std([1, 2, 4.5], ddof=1) / np.sqrt(3)
    np.testing.assert_allclose([low[0], high[0]], [2.5 - half, 2.5 + half], rtol=1e-4)
    assert np.isnan([low[1:], high[1:]]).all()


# ---- TensorBoard and wandb -----------------------------------------------------------------------
def test_wandb_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        train(tmp_path / "run", wandb="project")
    assert not list(tmp_path.iterdir())


class Wandb:
    """A stand-in for the package and its run."""

    def __init__(self):
        self.started, self.logged, self.ended = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended += 1

    def log(self, scalars, step):
        self.logged.append((step, scalars))


@pytest.fixture
def wandb(monkeypatch):
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: True)
    return stand_in


def test_wandb_gets_the_numbers_of_every_agent(wandb, tmp_path, no_figures):
    """Settings once, scalars of every call in groups, no NaN, an end; resume has the same id."""
    folder = train(tmp_path / "run", wandb="project")
    [settings] = wandb.started
    assert settings["project"] == "project" and settings["name"] == "run"
    assert settings["config"]["lr"] == 0.1 and settings["config"]["num_seeds"] == 2
    assert [step for step, _ in wandb.logged] == [64, 128, 192, 256, 320] and wandb.ended == 1
    assert all(np.isfinite(list(scalars.values())).all() for _, scalars in wandb.logged)
    _, last = wandb.logged[-1]
    agent = ("losses/loss", "losses/skipped", "charts/return/walk", "charts/return/toy:run")
    assert set(last) == {f"seed={seed}/{tag}" for seed in (0, 1) for tag in agent} | {
        "time/seconds", "time/sps"}
    table = experiment.read_metrics(folder)
    for seed in (0, 1):
        mean = np.mean([row["loss"] for row in table[-4:] if row["seed"] == seed])
        assert last[f"seed={seed}/losses/loss"] == pytest.approx(mean, rel=1e-4)
    (folder / "checkpoints/10.npz").unlink()
    resume(folder)
    assert [start["id"] for start in wandb.started] == [settings["id"]] * 2
    assert [start["resume"] for start in wandb.started] == ["allow"] * 2
    assert [step for step, _ in wandb.logged[5:]] == [320] and wandb.ended == 2


def test_a_single_agent_has_no_prefix_at_wandb(wandb, tmp_path, no_figures):
    train(tmp_path / "run", wandb="project", num_seeds=1)
    assert "losses/loss" in wandb.logged[0][1]


def test_wandb_that_cannot_start_is_refused_before_compiling(wandb, tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not\nconfigured")

    wandb.init = init
    monkeypatch.setattr(devices, "make_program", lambda *_: pytest.fail("it compiles"))
    with pytest.raises(ValueError, match="--wandb project cannot start: api_key not configured"):
        train(tmp_path / "run", wandb="project")
    assert not list(tmp_path.iterdir())


def events_of(folder):
    """The events in the files of a folder: records of length, checksum, data, checksum."""
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            yield Event.FromString(data[12:12 + size])
            data = data[16 + size:]


def test_tensorboard_has_a_curve_for_each_agent(tmp_path, no_figures, monkeypatch):
    """In a folder of its own. On resume what came after the checkpoint is purged.

    The clock stands still: files of one second must not replace each other.
    """
    monkeypatch.setattr("time.time", lambda: 1e9)
    folder = train(tmp_path / "run", sweep=("lr=0.1,0.001",))
    names = {path.name for path in (folder / "tensorboard").iterdir()}
    assert names == {f"lr={lr},seed={seed}" for lr in ("0.1", "0.001") for seed in (0, 1)}
    (folder / "checkpoints/10.npz").unlink()
    resume(folder)
    table = experiment.read_metrics(folder)
    for name in names:
        lr, seed = (float(part.split("=")[1]) for part in name.split(","))
        kept = {}
        for event in events_of(folder / "tensorboard" / name):
            if event.HasField("session_log"):
                kept = {key: values for key, values in kept.items() if key[1] < event.step}
            for value in event.summary.value:
                kept.setdefault((value.tag, event.step), []).append(value.simple_value)
        assert all(len(values) == 1 for values in kept.values())
        assert {tag.split("/")[0] for tag, _ in kept} == {"charts", "losses", "time"}
        for step in (64, 320):
            mean = np.mean([row["loss"] for row in table if (row["lr"], row["seed"]) == (lr, seed)
                            and step - 64 < row["steps"] <= step])
            np.testing.assert_allclose(kept["losses/loss", step], mean, rtol=1e-4)
