"""The benchmarks run at tiny sizes, and what they compute from their measurements is right."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import train_lstm
import train_s5

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.usefixtures("quick")


def run(script, folder, *flags, picture=True):
    """(rows of the CSV, everything printed)."""
    out = folder / "deeper" / "table.csv"
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert not picture or out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, done.stdout


def test_sequence(tmp_path):
    rows, printed = run("sequence", tmp_path, "--repeats", "1", "--lengths", "8", "16", "--batches", "2",
                        "--width", "8", "--layers", "1")
    models = ("S5 sequential", "S5 parallel", "LSTM", "GRU", "transformer")
    both = {(m, c, n) for m in models for c in ("forward", "forward+backward") for n in ("8", "16")}
    acting = {(m, "acting", "8") for m in models if m != "S5 parallel"} | {("transformer", "acting", "16")}
    assert {(r["model"], r["cost"], r["length"]) for r in rows} == both | acting and len(rows) == 25
    measured = ("ms", "tokens_per_s", "megabytes", "compile_s", "parameters")
    assert all(float(row[column]) > 0 for row in rows for column in measured)
    assert printed.count("(16 the longest)") == 11


def test_physics(tmp_path):
    rows, _ = run("physics", tmp_path, "--repeats", "1", "--tasks", "pendulum-swingup", "--batches", "4",
                  "--mjx-batch", "2", "--steps", "64", "--threads", "2")
    assert [(r["backend"], r["batch"]) for r in rows] == [
        ("fused", "4"), ("C-1-thread", "4"), ("C-2-threads", "4"), ("mjx", "2")]
    assert all(float(r["steps_per_s"]) > 0 for r in rows)
    for row in rows[0], rows[3]:
        assert float(row["error_qpos"]) < 1e-5 and 0 < float(row["error_qvel"]) < 1e-4
    assert 0 < float(rows[0]["error_qpos_200"]) < 1e-2 and not rows[3]["error_qpos_200"]


def test_train(tmp_path):
    sizes = ("num_envs=4", "num_steps=8", "num_minibatches=2", "layers=1", "width=8", "state_size=6")
    rows, _ = run("train", tmp_path, "--repeats", "1", "--trainers", "train_s5", "--env", "CartPole-v1",
                  "--lanes", "--rollouts", "--widths", "--seeds", "--set", *sizes)
    [row] = rows
    parts = [float(row[f"{part}_%"]) for part in ("environment", "acting", "update")]
    np.testing.assert_allclose(sum(parts), 100, 1e-2)
    assert float(row["cached_compile_s"]) > 0 and float(row["cold_compile_s"]) > 0
    assert float(row["megabytes"]) > 0 and np.isfinite(float(row["of_matmul_%"]))
    # products per step: encoders (13 inputs), detour, B and C, gated unit, two hidden heads, value, two logits
    encoder, others = 13 * 8, 8 * 8 + 2 * 6 * 8 + 2 * 8 * 8 + 2 * 16 * 8 + 8 + 2 * 8
    seen = 4 * 4 * 8  # epochs, lanes, steps; the encoders' inputs need no gradient
    np.testing.assert_allclose(float(row["gflop"]), seen * 2 * (2 * encoder + 3 * others) / 1e9, rtol=1e-3)


def test_memory_chain(tmp_path):
    rows, _ = run("memory_chain", tmp_path, "--lengths", "6", "--trainers", "s5", "memoryless", "--width", "8",
                  "--episodes", "4000", "--seeds", "2", "--lr", "3e-3")
    s5, memoryless = rows
    assert float(s5["mean"]) > 0.5 > float(memoryless["mean"]) and s5["parameters"] == memoryless["parameters"]
    assert float(memoryless["low"]) < float(memoryless["mean"]) < float(memoryless["high"])
    assert all(float(row[cost]) > 0 for row in rows for cost in ("us_per_step", "megabytes"))


@pytest.mark.parametrize("name", ["s5", "lstm", "transformer"])
def test_memory_chain_episodes_end_by_themselves(load, name):
    """Also beyond gymnax's limit of 1000 steps; and the transformer's window holds a whole episode."""
    config = load("memory_chain").make_config(name, 2048, 10_000)
    assert config.total_timesteps == 10_000 * 2049 and config.num_steps == 2 * 2049
    env, params = envs.make("MemoryChain-bsuite", memory_length=2048, max_steps_in_episode=2049)
    assert config.env_kwargs == ("memory_length=2048", "max_steps_in_episode=2049")
    _, state = env.reset(jax.random.PRNGKey(0), params)
    _, _, reward, terminated, _ = env.step_env(None, state.replace(time=2048), 0, params)
    assert terminated and abs(reward) == 1
    assert name != "transformer" or config.window == 2049


@pytest.fixture
def reproduce(load, tmp_path, monkeypatch):
    """The module with folders of its own, one seed and a tiny network."""
    module = load("reproduce")
    paper = tmp_path / "paper"
    paper.mkdir()
    for path in module.PAPER.glob("reference_*.csv"):
        (paper / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "PAPER", paper)
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "SEEDS", range(1))
    monkeypatch.setattr(module, "TRIALS", 2)
    monkeypatch.setattr(module, "PPO", ["--num-envs", "4", "--num-steps", "256", "--num-minibatches", "1",
                                        "--width", "8", "--log-every", "1"])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return module


def test_reproduce_runs_what_is_missing_and_draws_it(reproduce, capsys):
    """A run starts, goes on after a kill, is then complete; its picture and table say how far it came."""
    flags = ["--projection", "orthogonal", "--obs-size", "4", "--episodes-per-trial", "16"]
    runs = reproduce.trainer_runs("metacart", 3000, {"S5, never reset": flags}, ("StatelessCartPoleEasy",))
    [one] = runs
    assert reproduce.launch(runs, 1) == 0 and one.reached() == 3072 and one.todo() is None
    assert reproduce.launch(runs, 1) == 0 and "1 of 1 runs are complete" in capsys.readouterr().out
    metrics = one.path / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(True)[:2]))  # as after a kill
    assert one.reached() == 1024 and one.todo() == ["train_s5.py", "--resume", str(one.path)]
    rows = {row["at"]: row for row in reproduce.draw_metacart(runs)}
    assert rows["episode 16"]["paper"] == 0.36 and 0 < rows["episode 16"]["ours"] <= 1
    reproduce.write_table("metacart", list(rows.values()))
    assert "| metacart | S5, never reset | episode 16 | 0.36 |" in (reproduce.PAPER / "README.md").read_text()
    assert (reproduce.PAPER / "metacart.png").read_bytes().startswith(b"\x89PNG")


def test_reproduce_gives_every_process_a_core_and_keeps_whole_tables_only(reproduce, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\ntime.sleep(0.5)\n"
                      "open(sys.argv[-1], 'w').write(str(len(os.sched_getaffinity(0))))\n"
                      "sys.exit('broken' in sys.argv)\n")
    runs = [reproduce.Run(tmp_path / f"{i}.csv", [str(script), kind], 0, "S5")
            for i, kind in enumerate(("whole", "broken", "whole"))]
    assert reproduce.launch(runs, 2) == 1 and "FAILED" in capsys.readouterr().out
    assert [run.path.exists() for run in runs] == [True, False, True]
    if hasattr(os, "sched_getaffinity"):
        assert runs[0].path.read_text() == runs[2].path.read_text() == "1"


def write_run(reproduce, path, config, rows):
    """A run folder with these rows of metrics.csv."""
    options = reproduce.experiment.Options(runs_dir=str(path.parent), name=path.name)
    reproduce.experiment.new_run(config, options)
    with (path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_reproduce_scores_popgym_by_its_best_update(reproduce):
    runs = reproduce.trainer_runs("popgym", 200, {"S5": [], "none": []}, ("RepeatPreviousHard",))
    for run, best in zip(runs, (0.8, -0.4)):
        rows = [{"update": i, "steps": 100 * i, "seed": 0, "return/popgym:RepeatPreviousHard": x}
                for i, x in ((1, best), (2, best - 0.3))]
        config, _ = reproduce.experiment.parse_flags(train_s5.Config, args=run.command[1:])
        write_run(reproduce, run.path, config, rows)
    s5, none = reproduce.draw_popgym(runs)
    assert (s5["ours"], s5["paper"], none["ours"], none["paper"]) == (0.8, 0.91, -0.4, -0.48)
    assert s5["million_frames"] == 2e-4
    reproduce.PPO.append("--no-observe-change")  # what was made without this flag is neither gone on with nor drawn
    [changed] = reproduce.trainer_runs("popgym", 200, {"S5": []}, ("RepeatPreviousHard",))
    for use in (changed.todo, lambda: reproduce.draw_popgym([changed])):
        with pytest.raises(ValueError, match="made with other flags"):
            use()
    shutil.rmtree(runs[0].path)  # what was scored is not forgotten with its folder
    assert [row["ours"] for row in reproduce.draw_popgym(runs)] == [0.8, -0.4]


def test_single_task_tells_how_far_each_task_has_come(load, reproduce, tmp_path, monkeypatch, capsys):
    module = load("single_task")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    for run, best in zip(module.runs_of("walker-walk", 900, 2), (300.0, 500.0)):
        config, _ = reproduce.experiment.parse_flags(train_s5.Config, args=run.command[1:])
        assert config.resolved_projection == "none" and config.resolved_repeat == 1
        write_run(reproduce, run.path, config, [{"update": i, "steps": 100 * i, "seed": 0, "return/walker-walk": x}
                                                for i, x in ((1, 0.0), (2, best))])
    out = tmp_path / "table.csv"
    monkeypatch.setattr(sys, "argv", ["single_task.py", "--tasks", "walker-walk", "hopper-hop", "--jobs", "0",
                                      "--seeds", "2", "--total-timesteps", "900", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    [row] = csv.DictReader(out.open())
    assert (float(row["return"]), float(row["worst"]), row["steps"], row["published"]) == (400, 300, "200", "945")
    assert "hopper-hop: not every seed has begun" in capsys.readouterr().out
    config = train_s5.Config(env=("hopper-hop",), projection="none", num_envs=32)
    write_run(reproduce, module.runs_of("hopper-hop", 900, 1)[0].path, config, [{"update": 1, "steps": 100, "seed": 0}])
    for jobs, sentence in (("0", "made with other flags"), ("-1", "--jobs must not be negative")):
        monkeypatch.setattr(sys, "argv", ["single_task.py", "--tasks", "hopper-hop", "--jobs", jobs,
                                          "--total-timesteps", "900", "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            module.main()
        assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_reproduce_compares_curves_at_equal_frames(reproduce, tmp_path):
    """Two seeds in one folder, 30 million steps: every task's return is its number times the steps in millions."""
    tasks = list(enumerate(envs.TRAIN_TASKS, 1))
    rows = [{"update": m, "steps": m * 1e6, "seed": seed} | {f"return/{t}": (i + seed) * m for i, t in tasks}
            for m in range(1, 31) for seed in (0, 1)]
    write_run(reproduce, tmp_path / "six", train_s5.Config(), rows)
    found = {r["at"]: r for r in reproduce.draw_dmcontrol([tmp_path / "six"])}
    assert len(found) == 7 * 3  # at 5, 10 and 20 million
    mean, spin = found["mean of the six, 20 of 20 million"], found["finger-spin, 10 of 20 million"]
    assert (mean["paper"], mean["ours"]) == (150, 80) and (spin["ours"], spin["worst"]) == (35, 30)
    assert found["mean of the six, 5 of 20 million"]["paper"] == ""
    write_run(reproduce, tmp_path / "one", train_s5.Config(env=("reacher-easy",)), rows)
    with pytest.raises(ValueError, match="not on the six"):
        reproduce.draw_dmcontrol([tmp_path / "one"])


def test_reproduce_compares_equal_parameters(load):
    """And the flags of every run are ones that its trainer knows."""
    reproduce, sizes = load("reproduce"), {}
    for run in reproduce.runs_of("popgym") + reproduce.runs_of("metacart"):
        trainer = {"train_s5.py": train_s5, "train_lstm.py": train_lstm}[run.command[0]]
        config, options = reproduce.experiment.parse_flags(trainer.Config, args=run.command[1:])
        assert not config.observe_change  # that is the velocity, which these tasks hide
        assert options.seed == run.seed and config.env == (f"popgym:{run.task}",)
        memory = trainer.make_memory(config, jnp.float32)
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
        run.path.write_text("length,trainer,mean,low,high,worst,seeds,parameters,us_per_step,megabytes,episodes,steps\n"
                            f"{length},s5,0.9,0.8,1.0,0.7,5,100,12.5,3.5,10000,50000\n")
    assert [run.todo() is None for run in runs] == [True, True, False]
    rows = reproduce.draw_memory(runs)
    assert [(r["memory"], r["at"], r["paper"]) for r in rows] == [("S5", 4, 1.0), ("LSTM", 4, 1.0)]
    reproduce.write_table("memory", rows)
    runs[0].path.unlink()  # what was drawn is not forgotten with its table
    runs[1].path.write_text(runs[1].path.read_text().replace("12.5", "11.5"))
    assert [(r["memory"], r["us_per_step"]) for r in reproduce.draw_memory(runs)] == [("S5", 12.5), ("LSTM", 11.5)]


def test_reading_scores_between_no_memory_and_the_oracle(tmp_path):
    rows, _ = run("reading", tmp_path, "--tasks", "pendulum-swingup", "--memories", "S5", "--steps", "40000",
                  "--num-envs", "32", "--num-steps", "50", picture=False)
    table = {(row["target"], row["memory"]): row for row in rows}
    assert len(table) == len(rows) == 4 * 3 and {row["memory"] for row in rows} == {"none", "S5", "oracle"}
    none, s5, oracle = (table["control", name] for name in ("none", "S5", "oracle"))
    errors = [float(row["error_200"]) for row in (none, s5, oracle)]
    assert errors[2] < 0.2 < 0.5 < min(errors[:2])  # so soon no memory helps, but the oracle has nothing to find out
    assert (float(none["closed_200"]), float(oracle["closed_200"])) == (0, 1)
    np.testing.assert_allclose(float(s5["closed_200"]), (errors[0] - errors[1]) / (errors[0] - errors[2]), atol=0.01)


def test_reading_asks_for_what_comes(load):
    """What the agent will see is what it saw plus the target; controls are what its later actions do; in one trial."""
    stream = load("reading").Stream("cartpole-swingup", 16, 150, False)
    advance = jax.jit(stream.next)
    carry, first = advance(stream.reset(jax.random.PRNGKey(0)))
    data = jax.tree.map(lambda *x: np.concatenate(x), first, advance(carry)[1])
    shown, action, trial = data["plain"][..., :12], data["plain"][1:, :, 12:14], np.cumsum(data["reset"], 0)
    for i, k in enumerate((1, 4, 16)):
        known = data["known"][:-k, :, i]
        np.testing.assert_array_equal(known, trial[k:] == trial[:-k])
        assert 0 < (~known).sum() < known.sum()
        np.testing.assert_allclose(data["ahead"][:-k, :, i][known], (shown[k:] - shown[:-k])[known], atol=1e-5)
        control = np.clip(np.einsum("tnij,tnj->tni", data["act_matrix"][:-k], action[k - 1:]), -1, 1)
        np.testing.assert_allclose(data["controls"][:-k, :, k - 1][known], control[known], atol=1e-6)
    sin_and_velocity = data["raw"][..., [2, 4], None]  # of the pole's angle
    direction = data["act_matrix"] / np.linalg.norm(data["act_matrix"], axis=-1, keepdims=True)
    np.testing.assert_allclose(data["control"], sin_and_velocity * direction, atol=1e-4)


def test_ablations(tmp_path):
    rows, _ = run("ablations", tmp_path, "--only", "never reset", "--width", "8", "--total-timesteps", "1000",
                  "--seeds", "1", picture=False)
    assert [row["variant"] for row in rows] == ["never_reset"]


def test_seeds(tmp_path):
    rows, printed = run("seeds", tmp_path, "--seeds", "2", "--total-timesteps", "1000", "--num-envs", "8",
                        picture=False)
    assert [row["seeds"] for row in rows] == ["separate", "together"] and "times less" in printed


def test_flops_count_loops_and_gradients(load):
    def loss(w, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, 7)[0].sum()

    w, x = jnp.zeros((5, 5)), jnp.zeros((3, 5))
    def count(f):
        return load("train").product_flops(jax.make_jaxpr(f)(w, x).jaxpr)

    assert count(loss) == 7 * 2 * 3 * 5 * 5
    assert count(jax.grad(loss)) == 3 * count(loss)  # forward, and two products of the same size backwards
    assert count(jax.vmap(loss, (None, 0))) == 7 * 2 * 3 * 5 * 5
    assert count(lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x)) == 2 * 3 * 5 * 5


def test_exponent_is_the_slope_at_the_longest_lengths(load):
    points = [(n, 1e-3 * n**2) for n in (64, 256, 1024)]
    np.testing.assert_allclose(load("sequence").exponent([(16, 5.0), *points]), 2)
