"""benchmarks/reproduce.py: tables and figures beside the paper's, of runs that were written by hand."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import config_of, write_run

import envs
import experiment
import train_s5


@pytest.fixture
def reproduce(load, tmp_path, monkeypatch):
    """The module with folders of its own, one seed and a tiny network."""
    module = load("reproduce")
    paper = tmp_path / "paper"
    paper.mkdir()
    for path in module.PAPER.glob("reference_*.csv"):
        shutil.copy(path, paper)
    monkeypatch.setattr(module, "PAPER", paper)
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "SEEDS", range(1))
    monkeypatch.setattr(module, "TRIALS", 2)
    monkeypatch.setattr(module, "PPO", ["--num-envs", "4", "--num-steps", "256", "--num-minibatches", "1",
                                        "--width", "8", "--log-every", "1"])
    return module


def test_reproduce_draws_what_an_agent_does_in_every_episode(reproduce):
    """An agent as its training begins, as if it were saved after three updates."""
    [run] = reproduce.trainer_runs("metacart", 3000, {"S5, never reset": [
        "--projection", "orthogonal", "--obs-size", "4", "--episodes-per-trial", "16"]}, ("StatelessCartPoleEasy",))
    config, options = experiment.parse_flags(train_s5.Config, args=run.todo()[1:])
    assert config.reset == "never" and options.out == str(run.path)
    rows = [{"update": i, "steps": 1024 * i, "seed": 0, "return/popgym:StatelessCartPoleEasy": 0.1 * i}
            for i in (1, 2, 3)]
    write_run(run.path, config, rows)
    (run.path / "timing.csv").touch()
    runner = jax.jit(jax.vmap(train_s5.make_train(config).init))(jax.random.PRNGKey(0)[None])
    experiment.save(experiment.Run(config, options, run.path), 3, runner)
    assert run.reached() == 3072 and run.todo() is None
    rows = {row["at"]: row for row in reproduce.metacart_rows([run])}
    assert rows["episode 16"]["paper"] == 0.36 and 0 < rows["episode 16"]["ours"] <= 1
    assert rows["best sum of 16"]["ours"] == pytest.approx(16 * 0.3)
    assert (run.path / "by_episode.json").exists()
    reproduce.draw_metacart(reproduce.write_table("metacart", list(rows.values())))
    assert (reproduce.PAPER / "metacart.png").read_bytes().startswith(b"\x89PNG")


def test_reproduce_scores_popgym_by_its_best_update(reproduce):
    runs = reproduce.trainer_runs("popgym", 200, {"S5": [], "none": []}, ("RepeatPreviousHard",))
    for run, best in zip(runs, (0.8, -0.4)):
        rows = [{"update": i, "steps": 100 * i, "seed": 0, "return/popgym:RepeatPreviousHard": x}
                for i, x in ((1, best), (2, best - 0.3))]
        write_run(run.path, config_of(run)[0], rows)
    s5, none = rows = reproduce.popgym_rows(runs)
    assert (s5["ours"], s5["paper"], none["ours"], none["paper"]) == (0.8, 0.91, -0.4, -0.48)
    assert s5["million_frames"] == 2e-4
    reproduce.write_table("popgym", rows)
    shutil.rmtree(runs[0].path)  # what was scored is not forgotten with its folder
    rows = reproduce.write_table("popgym", reproduce.popgym_rows(runs))
    assert [row["ours"] for row in rows] == ["0.8", "-0.4"]
    reproduce.draw_popgym(rows)
    assert (reproduce.PAPER / "popgym.png").read_bytes().startswith(b"\x89PNG")


def test_reproduce_keeps_a_row_of_more_seeds_or_steps(reproduce):
    four, one = ([0.8] * n for n in (4, 1))
    reproduce.write_table("popgym", [reproduce.row("S5", "RepeatPreviousHard", 0.91, four, 2e6)])
    for seeds, steps in ((one, 3e6), (four, 1e6)):
        [kept] = reproduce.write_table("popgym", [reproduce.row("S5", "RepeatPreviousHard", 0.91, seeds, steps)])
        assert (kept["seeds"], kept["million_frames"]) == ("4", "2")
    [newer] = reproduce.write_table("popgym", [reproduce.row("S5", "RepeatPreviousHard", 0.91, four, 3e6)])
    assert newer["million_frames"] == "3"


def test_reproduce_names_every_seed_also_beside_rows_of_older_files(reproduce):
    tasks = "RepeatPreviousHard", "CountRecallHard"
    old, new = (reproduce.row("S5", task, 0.5, [0.8, np.nan], 2e6) for task in tasks)
    del old["each"]
    reproduce.write_csv(reproduce.PAPER / "popgym.csv", [old])
    assert [row["each"] for row in reproduce.write_table("popgym", [new])] == ["", "0.8 -"]
    assert [row["each"] for row in reproduce.read_csv(reproduce.PAPER / "popgym.csv")] == ["", "0.8 -"]


def test_reproduce_counts_a_failed_seed_as_missing(reproduce, tmp_path, capsys):
    """It is neither left out of the worst nor scored by what it had before."""
    tasks = envs.TRAIN_TASKS
    rows = [{"update": m, "steps": m * 1e6, "seed": seed, "skipped": float(seed == 1)}
            | {f"return/{task}": 300.0 + seed for task in tasks} for m in range(1, 31) for seed in range(3)]
    write_run(tmp_path / "six", train_s5.Config(memory="s5", sysid=True, total_timesteps=20_000_000), rows)
    found = reproduce.dmcontrol_rows([tmp_path / "six"], "one H200")
    assert {(r["ours"], r["seeds"]) for r in found} == {(301, 2)} and np.isnan([r["worst"] for r in found]).all()
    [run] = reproduce.trainer_runs("popgym", 200, {"none": []}, ("RepeatPreviousHard",))[:1]
    write_run(run.path, config_of(run)[0], [
        {"update": 1, "steps": 100, "seed": 0, "skipped": 1.0, "return/popgym:RepeatPreviousHard": 0.8}])
    assert np.isnan(reproduce.best_return(run))
    two = reproduce.row("S5", "RepeatPreviousHard", 0.91, [0.8, 0.8], 2e6)
    reproduce.write_table("popgym", [two])
    reproduce.write_table("popgym", [two | {"ours": np.nan, "seeds": 1}])
    assert "RepeatPreviousHard: the stored row has more seeds or steps, and stays" in capsys.readouterr().out


def test_reproduce_compares_curves_at_equal_frames(reproduce, tmp_path):
    """Two seeds in one folder, 30 million steps: every task's return is its number times the steps in millions."""
    tasks = list(enumerate(envs.TRAIN_TASKS, 1))
    rows = [{"update": m, "steps": m * 1e6, "seed": seed} | {f"return/{t}": float((i + seed) * m) for i, t in tasks}
            for m in range(1, 31) for seed in (0, 1)]
    config = train_s5.Config(memory="s5", sysid=True, total_timesteps=20_000_000)
    write_run(tmp_path / "six", config, rows)
    found = {r["at"]: r for r in reproduce.dmcontrol_rows([tmp_path / "six"], "one H200")}
    assert len(found) == 7 * 3  # at 5, 10 and 20 million
    mean, spin = found["mean of the six, 20 of 20 million"], found["finger-spin, 10 of 20 million"]
    assert (mean["memory"], mean["paper"], mean["ours"]) == ("S5", 150, 80)
    assert (spin["ours"], spin["worst"]) == (35, 30)
    assert found["mean of the six, 5 of 20 million"]["paper"] == ""
    assert (mean["task"], mean["schedule"], mean["device"]) == ("mean of the six", "20", "one H200")
    reproduce.draw_dmcontrol(reproduce.write_table("dmcontrol", list(found.values())))
    assert (reproduce.PAPER / "dmcontrol.png").read_bytes().startswith(b"\x89PNG")
    write_run(tmp_path / "default", train_s5.Config(total_timesteps=20_000_000), rows)
    assert {r["memory"] for r in reproduce.dmcontrol_rows([tmp_path / "default"], "one H200")} == {"vectors, plain"}
    write_run(tmp_path / "one", train_s5.Config(env=("reacher-easy",)), rows)
    with pytest.raises(ValueError, match="not on the six"):
        reproduce.dmcontrol_rows([tmp_path / "one"], "")


def test_reproduce_compares_equal_parameters(load):
    """And the flags of every run are ones that its trainer knows."""
    reproduce, sizes = load("reproduce"), {}
    for run in reproduce.runs_of("popgym") + reproduce.runs_of("metacart"):
        if run.seed:
            continue
        config, _ = config_of(run)
        assert config.env == (f"popgym:{run.task}",)
        # the change is the velocity, which these tasks hide
        assert config.observe_change == (run.variant == "vectors, plain")
        if run.variant == "vectors, plain":  # its size follows from that of a vector
            continue
        memory = experiment.import_trainer(run.trainer).make_memory(config)
        x, reset = jnp.zeros((1, 1, config.width)), jnp.zeros((1, 1), bool)
        shapes = jax.eval_shape(memory.init, jax.random.PRNGKey(0), memory.zero_state((1,)), x, reset)
        sizes.setdefault(run.path.parent.name, []).append(sum(s.size for s in jax.tree.leaves(shapes)))
    for figure in sizes.values():
        assert max(figure) < 1.02 * min(figure)


def test_reproduce_draws_finished_lengths(reproduce):
    runs = [run for run in reproduce.runs_of("memory") if run.path.name in ("S5-4.csv", "S5-512.csv", "LSTM-4.csv")]
    for run in runs[:2]:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        length = run.path.stem.split("-")[1]
        run.path.write_text("length,memory,mean,low,high,worst,seeds,parameters,us_per_step,megabytes,episodes,steps\n"
                            f"{length},s5,0.9,0.8,1.0,0.7,5,100,12.5,3.5,10000,50000\n")
    assert [run.todo() is None for run in runs] == [True, True, False]
    rows = reproduce.write_table("memory", reproduce.memory_rows(runs))
    assert [(r["memory"], r["at"], r["paper"]) for r in rows] == [("S5", "4", "1.0"), ("LSTM", "4", "1.0")]
    reproduce.draw_memory(rows)
    runs[0].path.unlink()  # what was drawn is not forgotten with its table
    runs[1].path.write_text(runs[1].path.read_text().replace("12.5", "11.5"))
    rows = reproduce.write_table("memory", reproduce.memory_rows(runs))
    assert [(r["memory"], r["us_per_step"]) for r in rows] == [("S5", "12.5"), ("LSTM", "11.5")]
