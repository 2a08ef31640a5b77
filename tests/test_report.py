"""report.py: statistics against scipy and by hand, files, names that could break them."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from small_runs import TASKS, make_run

import evaluate
import report
import train_lstm

ROOT = Path(__file__).resolve().parent.parent
TRIALS = 3
NOTEBOOK = "module://no_such_notebook.backend"  # MPLBACKEND of a notebook that is not here


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "s5", seeds=(0, 1), memory="s5", sysid=True)


@pytest.fixture(scope="module")
def agent(run):
    return evaluate.load(run)


@pytest.fixture(scope="module")
def result(agent):
    return evaluate.measure(agent, TASKS, TRIALS, deterministic=True)


def test_reduce_trials_by_hand():
    """Two trials, 40 steps with two environment steps each: the second trial is over after 30."""
    lasted = np.full((40, 2), 2)
    lasted[30:, 1] = 0
    reward = np.arange(40.0)[:, None] * (lasted > 0)
    returns, curves = report.reduce_trials(reward, lasted, 2, np.array([80, 80]))
    np.testing.assert_array_equal(returns, [390, 217.5])
    np.testing.assert_array_equal(curves[0], (np.arange(20) * 2 + 0.5) / 2)
    np.testing.assert_array_equal(np.isnan(curves[1]), [False] * 15 + [True] * 5)


def test_a_curve_counts_environment_steps_of_different_lengths():
    """40 steps, 20 bins: an action held for 4 of them is in the bin in which it begins."""
    lasted = np.array([[4], [2], [34], [0]])
    _, curves = report.reduce_trials(np.array([[4.0], [1.0], [34.0], [0.0]]), lasted, 1, np.array([40]))
    np.testing.assert_array_equal(curves[0, :4], [1, np.nan, 0.5, 1])
    assert np.isnan(curves[0, 4:]).all()


def compare(x, y):
    return report.estimate(report.differences(x, y))


# -- statistics ------------------------------------------------------------------------------------
@pytest.mark.parametrize("effect", [0, 60, 300])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_the_truth(seeds, effect):
    """Six tasks, 16 trials: rare large returns, and an effect of the seed that its tasks share."""
    rng, many = np.random.default_rng(seeds), 2000

    def runs():
        return rng.normal(size=(1, seeds, 1, many)) * effect + rng.normal(size=(6, seeds, 1, many)) * effect / 3

    chance = np.array([0.1, 0.2, 0.3, 0.5, 0.8, 0.9])[:, None, None, None]
    trials = 900 * (rng.random((6, seeds, 16, many)) < chance) + rng.normal(size=(6, seeds, 16, many)) * 20
    x, y = trials + runs(), trials + runs() + rng.normal(size=trials.shape) * 100  # two runs, the same trials
    truth = 900 * chance[:, 0, 0, 0]
    cases = [(report.estimate(x), truth.mean()), (report.estimate(x[2:3]), truth[2]),
             (compare(x, y), 0), (compare(x[3:4], y[3:4]), 0)]
    for e, value in cases:
        assert e.over == "seeds"
        assert 0.92 <= ((e.low <= value) & (value <= e.high)).mean() <= 0.98


@pytest.mark.parametrize("size", [1, 4, 7, 96])
def test_the_interquartile_mean_equals_scipy(size):
    x = np.random.default_rng(size).normal(size=(size, 1))
    np.testing.assert_allclose(report.interquartile_mean(x), scipy.stats.trim_mean(x, 0.25, axis=None))


@pytest.mark.parametrize("seeds", [1, 2, 4, 5])
def test_tables_over_few_seeds_show_each(result, seeds):
    """In the table of tasks and in the headline; five seeds or more have an interval alone."""
    x = np.random.default_rng(seeds).gamma(2.0, size=(2, seeds, TRIALS)) * 100
    some = result._replace(returns={policy: x for policy in report.POLICIES})
    shown = ", ".join(map(report.number, x[:1].mean((0, 2))))
    few = 1 < seeds < 5
    for table in (report.returns_table(some, [0]), report.headline(some)):
        assert (f" {shown} |" in table and seeds > 1) == few == ("each seed" in table)
    assert ("95 %" in report.returns_table(some, [0])) == (not few)


def test_statistics_equal_scipy():
    x = np.random.default_rng(3).gamma(2.0, size=(3, 4, 5))
    mean, low, high, _ = report.estimate(x)
    np.testing.assert_allclose(mean, x.mean())
    np.testing.assert_allclose([low, high], scipy.stats.ttest_1samp(x.mean((0, 2)), 0).confidence_interval())
    difference = compare(x, 2 * x[:, ::-1])
    expected = scipy.stats.ttest_rel(x.mean((0, 2)), 2 * x[:, ::-1].mean((0, 2))).confidence_interval()
    np.testing.assert_allclose([difference.low, difference.high], expected)


def test_one_seed_is_not_read_as_an_interval_over_runs(result):
    x = np.random.default_rng(0).gamma(2.0, size=(3, 1, 8)) * 100
    e = report.estimate(x)
    np.testing.assert_allclose([e.low, e.high], scipy.stats.ttest_1samp(x[:, 0].mean(0), 0).confidence_interval())
    assert e.over == "trials" and re.fullmatch(r"\d+ to \d+", str(e))
    one = result._replace(returns={policy: x[:, :1] for policy, x in result.returns.items()})
    assert f"{TRIALS} trials of one seed" in report.headline(one) and "2 seeds" in report.headline(result)
    assert np.isnan(report.estimate(x[:, :, :1]).low) and str(report.estimate(x[:, :, :1])) == "-"


def test_comparisons_pair_trials_and_shared_seeds():
    x = np.array([[[3.0, 1.0], [5.0, 5.0]]])
    y = np.array([[[2.0, 4.0], [5.0, 1.0], [9.0, 9.0]]])
    difference = compare(x, y)
    assert (difference.mean, difference.over) == (0.5, "seeds")
    np.testing.assert_equal(compare(x, x)[:3], (0, np.nan, np.nan))  # no spread, no interval
    assert compare(x[:, :1], y).over == "trials"


def test_estimates_leave_out_what_is_over_but_no_task():
    x = np.array([[[[1.0, 2.0], [3.0, np.nan]], [[5.0, 6.0], [7.0, np.nan]]]])
    mean, low, high, _ = report.estimate(x)
    np.testing.assert_array_equal(mean, [4, 4])
    assert (low < 4).all() and (high > 4).all()
    both = report.estimate(np.stack([x[0, ..., 0], np.full((2, 2), np.nan)]))  # one task was not played
    assert np.isnan(both.mean) and report.number(both.mean) == str(both) == "-"


# -- reports ---------------------------------------------------------------------------------------
def test_two_calls_print_and_write_the_same(run, result):
    """Once here, once as a command from a notebook. The three numbers that matter come last."""
    (run / "first").mkdir()
    printed = report.write_report(result, run / "first")
    command = [sys.executable, ROOT / "evaluate.py", run, "--tasks", *TASKS, "--trials", str(TRIALS),
               "--deterministic"]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env=os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": NOTEBOOK})
    assert done.returncode == 0, done.stderr
    assert_same_text(done.stdout.strip(), printed.replace(str(run / "first"), str(run / "eval")))
    for name in ("returns.csv", "trials.csv", "curves.csv", "report.md"):
        assert_same_text((run / "eval" / name).read_text(), (run / "first" / name).read_text())
    assert widest(printed) <= 100
    memory, blind = (result.returns[policy] for policy in ("memory", "blind"))
    last = [[cell.strip() for cell in line.split("|")[2:-1]] for line in printed.splitlines()[-3:]]
    for cells, x in zip(last, (memory[:1], memory[1:], (memory - blind)[:1])):
        interval = scipy.stats.ttest_1samp(x.mean((0, 2)), 0).confidence_interval()
        each = ", ".join(map(report.number, x.mean((0, 2))))
        assert cells == ["1", report.number(x.mean()), " to ".join(map(report.number, interval)), each]
    assert "95 % over 2 seeds" in printed and report.INTERVALS in printed
    assert "No interval covers runs that\ncollapse: few seeds rarely hold one." in printed
    text = (run / "first" / "report.md").read_text()
    assert all((run / "first" / name).stat().st_size > 1000 for name in re.findall(r"!\[\w+\]\((.+?)\)", text))
    assert all(line.count("|") <= 7 for line in text.splitlines())  # six columns


def assert_same_text(a, b):
    """The same words, and numbers that differ by rounding only: a stored program may round differently."""
    number = r"-?\d+\.\d+(?:e-?\d+)?"
    assert re.sub(r" +|-+", " ", re.sub(number, "#", a)) == re.sub(r" +|-+", " ", re.sub(number, "#", b))
    numbers = [np.array(re.findall(number, text), float) for text in (a, b)]
    np.testing.assert_allclose(*numbers, rtol=5e-3, atol=2e-2)


def widest(text):
    """Length of the longest line without a path."""
    return max(len(line) for line in text.splitlines() if not line.startswith("more: "))


def test_csv_files_hold_every_trial(run, agent, result, tmp_path):
    report.write_tables(result, tmp_path)
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * TRIALS * (len(report.POLICIES) + len(report.FAMILIES) - 1)
    blind = [float(r["return"]) for r in rows if (r["task"], r["policy"], r["seed"]) == (TASKS[1], "blind", "1")]
    np.testing.assert_allclose(blind, result.returns["blind"][1, 1], rtol=1e-4)
    with (tmp_path / "returns.csv").open() as file:
        rows = {(r["task"], r["policy"], r["projection"]): r for r in csv.DictReader(file)}
    row, x = rows[TASKS[1], "memory", "identity"], result.projections["identity"][1:]
    np.testing.assert_allclose([float(row[k]) for k in ("mean", "low", "high")], report.estimate(x)[:3], rtol=1e-4)
    np.testing.assert_allclose(float(row["iqm"]), scipy.stats.trim_mean(x.ravel(), 0.25), rtol=1e-4)
    row, x = rows[TASKS[0], "memory - blind", "gaussian"], result.returns["memory"] - result.returns["blind"]
    np.testing.assert_allclose(float(row["mean"]), x[0].mean(), rtol=1e-4)


NAMES = ("a_$^_$b", "=1+1", "<b>x</b>", "say \"hi\" & 'ho'", "_hidden_", "two\nlines | cells", "$x$ 100%")


@pytest.mark.parametrize("name", NAMES)
def test_names_break_neither_pictures_nor_tables_nor_pages(name, result, tmp_path):
    """The name of a folder can be anything. Ordinary names stay as they are."""
    named = result._replace(agent=SimpleNamespace(**vars(result.agent), family="gaussian") )
    named.agent.name = name
    report.write_comparison([named, result], tmp_path)  # draws every figure that has names
    with (tmp_path / "comparison.csv").open(newline="") as file:
        cell = next(csv.DictReader(file))["run"]
    assert cell.removeprefix("'") == name and not cell.startswith("=")
    text = report.write_report(named, tmp_path)
    widths = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}
    assert widths <= {5, 6, 7}  # no name has made a cell, or a line, of its own
    assert not re.search(r"(?<!\\)[<$]", (tmp_path / "report.md").read_text().replace("![", ""))
    label = report.plain_label(name)
    assert not label.startswith("_") and "\n" not in label


def test_ordinary_names_are_not_escaped():
    for name in ("s5-6tasks-20261127-0238", "train_s5", "lr=0.001,seed=2", "default (2)"):
        assert report.markdown(name) == report.plain_label(name) == name


def test_a_figure_draws_dollars_and_underscores_as_they_are(result, tmp_path):
    figure, axes = report.logs.panels(1, 1, 3, 2)
    axes[0, 0].plot([0], [0], label=report.plain_label("_a_$^_$b"))
    figure.legend(*axes[0, 0].get_legend_handles_labels())
    figure.savefig(tmp_path / "figure.png")
    assert [text.get_text() for text in figure.legends[0].texts] == [r" _a_\$^_\$b"]


def test_a_comparison_says_which_run_was_trained_on_a_task_and_on_how_many_seeds(result, tmp_path):
    """Three seeds against two, trained on different tasks."""
    a, b = TASKS
    more = {name: np.concatenate([x, x[:, :1]], 1) for name, x in result.returns.items()}
    other = result._replace(agent=SimpleNamespace(**vars(result.agent), family="gaussian"), returns=more)
    other.agent.name, other.agent.tasks = "other", (b,)
    assert report.groups(other) == {"trained on": [1], "held out": [0]}
    assert report.groups(result, other) == {"trained on by some": [0, 1]}
    printed = report.write_comparison([result, other], tmp_path)
    assert "| trained on by some |" in printed and "| 2 seeds |" in printed
    with (tmp_path / "comparison.csv").open() as file:
        [row] = csv.DictReader(file)
    assert (row["seeds"], row["trials"]) == ("2", str(TRIALS))


def test_a_report_names_the_setting_and_the_seeds_that_failed(result, tmp_path, monkeypatch):
    """The best setting was chosen by its training returns, so that those are too high."""
    assert "Setting" not in report.describe(result) and "Failed" not in report.describe(result)
    agent = SimpleNamespace(**vars(result.agent), family="gaussian")
    agent.settings, agent.best_of, agent.folder = 2 * [{"lr": 1e-3}], 3, tmp_path
    chosen = result._replace(agent=agent)
    assert "Setting: lr=0.001, the best of 3 settings, chosen on the same returns.\n" in report.describe(chosen)
    run = agent.config, evaluate.experiment.Options(sweep=("lr=0.001,1e6",), num_seeds=2)
    monkeypatch.setattr(report.run_folder, "read_run", lambda folder: run)
    with (tmp_path / "metrics.csv").open("w") as file:
        report.logs.write_rows(file, [{"update": u, "skipped": x} for u in (1, 2) for x in (0.0, 1.0, 1.0, 1.0)])
    agent.best_of = 1
    assert ("Setting: lr=0.001.\nFailed in training, and tested all the same: lr=0.001,seed=1.\n"
            in report.describe(chosen))


def test_comparison_of_runs(tmp_path, capsys):
    """An LSTM trained on gaussian projections; S5 trained on none, its hidden state reset in every step."""
    lstm = make_run(tmp_path / "lstm", train_lstm, seeds=(0, 1))
    step = make_run(tmp_path / "step", reset="step", projection="identity")
    found = evaluate.evaluate((lstm, step), tasks=TASKS, trials=TRIALS, out=tmp_path / "out")
    np.testing.assert_array_equal(found[1].returns["memory"], found[1].returns["reset"])
    np.testing.assert_array_equal(found[1].projections["identity"], found[1].returns["memory"])
    assert widest(capsys.readouterr().out) <= 100
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["run"], r["other"], r["tasks"], r["over"]) for r in rows] == [
        ("lstm", "step", "trained on", "trials"), ("lstm", "step", "held out", "trials")]  # one has one seed
    for i, row in enumerate(rows):
        a, b = (r.returns["memory"][i, 0] for r in found)
        np.testing.assert_allclose(float(row["mean"]), (a - b).mean(), rtol=1e-4)
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "step: train_s5, projection identity" in text and "lstm: train_lstm, projection gaussian" in text
    assert all((tmp_path / "out" / name).exists() for name in re.findall(r"!\[\w+\]\((.+?)\)", text))
