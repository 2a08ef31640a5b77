"""The benchmarks run at tiny sizes, and what they compute from their measurements is right."""

import csv
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import config_of, write_run

import envs
import experiment
import train_lstm
import train_s5

FOLDER = Path(__file__).resolve().parent.parent
TRAINERS = {"train_s5": train_s5, "train_lstm": train_lstm}


@pytest.fixture
def main(load, tmp_path, monkeypatch, capsys):
    """main(module, *flags): rows of the table, what was printed. `module` may be the name of a script."""
    def main(module, *flags, picture=True, code=None):
        module, out = load(module) if isinstance(module, str) else module, tmp_path / "deeper" / "table.csv"
        monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out), *flags])
        try:
            load("common").run_main(module.main)
            assert code is None
        except SystemExit as end:
            assert end.code == code
        assert not picture or out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        printed = "".join(capsys.readouterr())
        return (list(csv.DictReader(out.open(newline=""))) if out.exists() else []), printed

    return main


# ---- Command lines -------------------------------------------------------------------------------
MISTAKES = (  # a command line, and part of the sentence that answers it
    ("memory_chain --seeds 0", "--seeds: must be a whole number from 1"),
    ("memory_chain --lengths 4 99999999999999999999", "--lengths: must be a whole number"),
    ("memory_chain --lr nan", "--lr: must be a number above 0"),
    ("memory_chain --memories s4", "invalid choice: 's4'"),
    ("memory_chain --out {0}", "--out must be a file whose name ends in .csv"),
    ("memory_chain --out {0}/file/table.csv", "file/table.csv (File exists): choose another --out"),
    ("memory_chain --out {0}/table.png", "--out must be a file whose name ends in .csv"),
    ("minutes_to_400 --window inf", "--window: must be a number above 0"),
    ("minutes_to_400 --trainer nowhere.py --out {0}/table.csv --flags --lr 1", "nowhere.py --lr 1 ended with an error"),
    ("parts --jobs -1", "--jobs: must be a whole number from 0"),
    ("parts --variants S5", "unrecognized arguments"),
    ("physics --tasks finger-spin+nowhere", "unknown task 'nowhere'; known: acrobot"),
    ("physics --tasks finger-spin+reacher-easy --batches 3 --out {0}/table.csv", "cannot split 3 environments"),
    ("physics --mjx-batch 0 --threads two", "--threads: must be a whole number from 1"),
    ("reading --num-envs 6", "--num-envs must be a multiple of 4, got 6"),
    ("reproduce nothing", "invalid choice: 'nothing'"),
    ("reproduce dmcontrol {0}/nowhere", "nowhere is not a run folder"),
    ("reproduce dmcontrol {0}/begun", "begun has no logged update yet"),
    ("reproduce dmcontrol {0}/beheaded", "beheaded/metrics.csv does not begin with the names of its columns"),
    ("reproduce popgym --only nowhere", "--only nowhere matches none of"),
    ("reproduce dmcontrol", "dmcontrol needs run folders or --draw"),
    ("scaling --trainers nowhere --out {0}/table.csv", "nowhere.py --total-timesteps 3000000 ended with an error"),
    ("seeds --env Nowhere-v0", "unknown environment 'Nowhere-v0'"),
    ("seeds --num-envs 7", "num_envs=7 must be divisible"),
    ("sequence --width 6", "--width must be a multiple of 4, got 6"),
    ("sequence --models nowhere", "unknown model 'nowhere'; known: S5 sequential"),
    ("single_task --total-timesteps 1e6", "--total-timesteps: must be a whole number from 1"),
    ("summary --nonsense", "unrecognized arguments: --nonsense"),
    ("train --set layers", "expected NAME=VALUE, got 'layers'"),
    ("train --vary seeds=0", "--vary: must be a whole number from 1"),
    ("train --trainers train_lstm --set state_size=8", "train_lstm has no whole-numbered setting 'state_size'"),
    ("gpu --minutes nan", "--minutes: must be a number above 0"),
    ("gpu --out {0}/file", "File exists"),
    ("continuous_time --small --parts irregular --out {0}/file", "cannot write"),
)


@pytest.mark.parametrize("line, answer", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_answered_by_a_sentence(load, tmp_path, monkeypatch, capsys, line, answer):
    (tmp_path / "file").touch()
    for name in ("begun", "beheaded"):
        write_run(tmp_path / name, train_s5.Config(), [])
    (tmp_path / "beheaded" / "metrics.csv").write_text("1,100,0,0.5\n2,200,0,0.5\n")
    script, *flags = line.format(tmp_path).split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as end:
        load("common").run_main(load(script).main)
    assert end.value.code == 2 and answer in capsys.readouterr().err.splitlines()[-1]


def test_what_a_user_can_mend_is_a_sentence_and_a_bug_is_a_traceback(load, capsys):
    run_main = load("common").run_main

    def end_with(error):
        def main():
            raise error
        run_main(main)

    for error in (ValueError("wrong"), FileNotFoundError(2, "wrong", "a file"), ImportError("wrong"),
                  MemoryError("wrong"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: wrong"),
                  RuntimeError("Unable to initialize backend 'wrong'"), KeyboardInterrupt()):
        with pytest.raises(SystemExit) as end:
            end_with(error)
        assert end.value.code == (130 if isinstance(error, KeyboardInterrupt) else 2)
        assert len(capsys.readouterr().err.splitlines()) == (end.value.code == 2)
    for bug in (KeyError("wrong"), TypeError("wrong"), AttributeError("wrong"), RuntimeError("wrong")):
        with pytest.raises(type(bug)):
            end_with(bug)


def test_a_failed_seed_is_not_counted(load):
    metrics = {"return": np.arange(60.0).reshape(3, 10, 2), "skipped": np.zeros((3, 10))}
    metrics["skipped"][1, 4:6] = 1
    returns = load("common").final_returns(metrics, log_every=2)
    np.testing.assert_array_equal(returns, [[18, 19], [np.nan, np.nan], [58, 59]])
    assert np.isfinite(load("common").final_returns(metrics, log_every=10)).all()  # two of ten updates
    found = load("common").mean_interval([1.0, np.nan, 3.0])
    assert (found["mean"], found["seeds"]) == (2.0, 2) and np.isnan(found["worst"])


# ---- Speed ---------------------------------------------------------------------------------------
def test_sequence_measures_every_cost_at_every_length(main):
    rows, _ = main("sequence", "--repeats", "1", "--lengths", "8", "16", "--batches", "2", "--width", "8",
                   "--layers", "1", "--models", "S5 sequential", "transformer")
    models = ("S5 sequential", "transformer")
    both = {(m, c, n) for m in models for c in ("forward", "forward+backward") for n in ("8", "16")}
    acting = {("S5 sequential", "acting", "8"), ("transformer", "acting", "8"), ("transformer", "acting", "16")}
    assert {(r["model"], r["cost"], r["length"]) for r in rows} == both | acting and len(rows) == 11
    measured = ("ms", "tokens_per_s", "megabytes", "compile_s", "parameters")
    assert all(float(row[column]) > 0 for row in rows for column in measured)


def test_sequence_has_five_memories_of_one_interface(load):
    memories = load("sequence").make_memories(8, 1)
    assert list(memories) == ["S5 sequential", "S5 parallel", "LSTM", "GRU", "transformer"]
    x, reset = jnp.zeros((4, 2, 8)), jnp.zeros((4, 2), bool)
    for make in memories.values():
        memory = make(4)
        hidden = memory.zero_state((2,))
        (_, y), _ = jax.eval_shape(memory.init_with_output, jax.random.PRNGKey(0), hidden, x, reset)
        assert y.shape == x.shape


def test_exponent_is_the_slope_at_the_longest_lengths(load):
    points = [(n, 1e-3 * n**2) for n in (64, 256, 1024)]
    exponent = load("sequence").exponent
    np.testing.assert_allclose(exponent([(16, 5.0), *points]), 2)
    assert np.isnan(exponent(points[:1]))


def test_physics_compares_backends(main):
    rows, _ = main("physics", "--repeats", "1", "--tasks", "pendulum-swingup", "--batches", "4", "--mjx-batch", "2",
                   "--steps", "64", "--threads", "2")
    assert [(r["backend"], r["batch"]) for r in rows] == [
        ("fused", "4"), ("C-1-thread", "4"), ("C-2-threads", "4"), ("mjx", "2")]
    assert all(float(r["steps_per_s"]) > 0 for r in rows)
    for row in rows[0], rows[3]:
        assert float(row["error_qpos"]) < 1e-5 and 0 < float(row["error_qvel"]) < 1e-4
    assert 0 < float(rows[0]["error_qpos_200"]) < 1e-2 and not rows[3]["error_qpos_200"]


def test_train_counts_the_products_of_the_update(load, main, monkeypatch):
    """Programs are traced here, not compiled: a call returns the shapes of its results."""
    module, Program = load("train"), load("common").Program
    monkeypatch.setattr(module, "compile_program", lambda function, *args: Program(
        lambda *args: jax.eval_shape(function, *args), compile_s=1.0, megabytes=2.0))
    monkeypatch.setattr(module, "matmul_rate", lambda: 1e9)
    times = iter((0.2, 0.5, 2.0))  # environment, rollout, iteration
    monkeypatch.setattr(module, "seconds", lambda *args, **kwargs: next(times))
    [row], _ = main(module, "--trainers", "train_s5", "--env", "CartPole-v1", "--vary", "--set", "num_envs=4",
                    "num_steps=8", "num_minibatches=2", "layers=1", "width=8", "state_size=6")
    assert [float(row[f"{part}_%"]) for part in ("environment", "acting", "update")] == [10, 15, 75]
    assert (row["steps_per_s"], row["cold_compile_s"], row["megabytes"]) == ("16", "2.0", "2.0")
    # products per step: encoders (13 inputs), bypass, B and C, gated unit, two hidden heads, value, two logits
    encoders, others = 13 * 8, 8 * 8 + 2 * 6 * 8 + 2 * 8 * 8 + 2 * 16 * 8 + 8 + 2 * 8
    steps = 4 * 4 * 8  # epochs, environments, steps; the encoders' inputs need no gradient
    flops = steps * 2 * (2 * encoders + 3 * others)
    np.testing.assert_allclose(float(row["gflop"]), flops / 1e9, rtol=1e-3)
    np.testing.assert_allclose(float(row["of_matmul_%"]), 100 * flops / 1.5 / 1e9, rtol=1e-3)


def test_train_compiles_once_without_and_once_with_the_cache(load):
    [program], cold, cached = load("train").compile_twice([(lambda x: jnp.sin(x) @ x, (jnp.ones((3, 3)),))])
    np.testing.assert_allclose(program.run(jnp.ones((3, 3)))[0, 0], 3 * np.sin(1), rtol=1e-6)
    assert cold > 0 and cached > 0 and jax.config.jax_compilation_cache_dir is None


def test_flops_count_loops_and_gradients(load):
    def loss(w, x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, 7)[0].sum()

    w, x, product_flops = jnp.zeros((5, 5)), jnp.zeros((3, 5)), load("train").product_flops

    def count(f):
        return product_flops(jax.make_jaxpr(f)(w, x).jaxpr)

    assert count(loss) == 7 * 2 * 3 * 5 * 5
    assert count(jax.grad(loss)) == 3 * count(loss)  # forward, and two products of the same size backwards
    assert count(jax.vmap(loss, (None, 0))) == 7 * 2 * 3 * 5 * 5
    assert count(lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x)) == 2 * 3 * 5 * 5


def test_seeds_compares_one_function_with_many_runs(load, main, monkeypatch):
    module, trained = load("seeds"), []

    def make_train(config):
        trained.append(config)
        return lambda key: key.sum()

    monkeypatch.setattr(module.train_s5, "make_train", make_train)
    rows, _ = main(module, "--seeds", "2", "4", "--total-timesteps", "1000", "--num-envs", "8", picture=False)
    assert [row["seeds"] for row in rows] == ["2", "4"] and trained[0].total_timesteps == 1000
    assert float(rows[1]["separate_s"]) == pytest.approx(2 * float(rows[0]["separate_s"]), rel=1e-3)
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(float(row["separate_s"]) / float(row["together_s"]), rel=1e-2)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be chosen here")
def test_scaling_leaves_out_the_first_call(main, tmp_path):
    (tmp_path / "trainer.py").write_text(
        "import os, sys, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "folder.mkdir()\n"
        "rate = 100 * len(os.sched_getaffinity(0)) * int(os.environ['JAX_NUM_CPU_DEVICES'])\n"
        "(folder / 'timing.csv').write_text(f'update,sps\\n1,5\\n2,{rate}\\n3,{rate}\\n')\n")
    rows, _ = main("scaling", "--trainers", str(tmp_path / "trainer"), picture=False)
    assert (rows[0]["cores"], rows[0]["devices"], rows[0]["steps_per_s"]) == ("1", "1", "100")
    assert all(float(r["over_one_core"]) == int(r["cores"]) * int(r["devices"]) for r in rows)


def test_minutes_are_those_of_the_first_row_that_reaches_a_goal(main, tmp_path):
    """The mean over tasks of the last two rows is 2 at first, 3 two seconds later."""
    (tmp_path / "trainer.py").write_text(
        "import sys, time, pathlib\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "folder.mkdir(parents=True)\n"
        "for i in range(1, 4):\n"
        "    (folder / 'metrics.csv').write_text('steps,return/a,return/b\\n' + ''.join(\n"
        "        f'{10 * j},{j},{j + 1}\\n' for j in range(1, i + 1)))\n"
        "    time.sleep(2)\n")
    [row], printed = main("minutes_to_400", "--trainer", str(tmp_path / "trainer.py"), "--seeds", "1", "--window",
                          "20", "--goals", "2", "3", "5", "--keep", str(tmp_path / "runs"), picture=False)
    assert 0 < float(row["minutes_to_2"]) < float(row["minutes_to_3"]) <= float(row["minutes"])
    assert row["minutes_to_5"] == "nan" and "5: reached by 0 of 1 seeds, after - minutes\n" in printed
    assert float(row["return"]) == 3.5 and (tmp_path / "runs" / "seed_0" / "metrics.csv").exists()


# ---- Runs ----------------------------------------------------------------------------------------
def test_launch_gives_every_process_a_core_and_counts_failures(load, tmp_path, capsys):
    runs = load("runs")
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\ntime.sleep(0.3)\n'broken' in sys.argv and sys.exit(1)\n"
                      "open(sys.argv[-1], 'w').write(str(len(os.sched_getaffinity(0))))\n")
    todo = [runs.Script(tmp_path / f"{i}.csv", [str(script), kind], "S5")
            for i, kind in enumerate(("whole", "broken", "whole"))]
    assert runs.launch(todo, 2) == 1 and "FAILED" in capsys.readouterr().out
    assert [run.path.exists() for run in todo] == [True, False, True]
    if hasattr(os, "sched_getaffinity"):
        assert todo[0].path.read_text() == todo[2].path.read_text() == "1"


def test_a_run_starts_goes_on_and_is_refused_with_other_flags(load, tmp_path):
    run = load("runs").Run(tmp_path / "run", "train_s5", ["--env", "CartPole-v1"], 300, 2, "S5")
    assert run.todo() == [*run.command, "--out", str(run.path)] and run.reached() == 0
    config, options = config_of(run)
    assert options.seed == 2 and options.devices == 1 and not options.evaluate
    rows = [{"update": i, "steps": 100 * i, "seed": 2, "return/CartPole-v1": float(i)} for i in (1, 2)]
    write_run(run.path, config, rows)
    assert run.reached() == 200 and run.todo() == ["train_s5.py", "--resume", str(run.path)]
    assert run.scores().tolist() == [2.0]  # of the last tenth
    with pytest.raises(ValueError, match="made with other flags"):
        run._replace(flags=[*run.flags, "--lr", "1"]).todo()
    with (run.path / "metrics.csv").open("a", newline="") as file:
        experiment.write_rows(file, [rows[0] | {"update": 3, "steps": 300}])
    assert run.todo() is None


def test_single_task_tells_how_far_each_task_has_come(load, main, tmp_path, monkeypatch):
    module = load("single_task")
    monkeypatch.setattr(module, "RUNS", tmp_path)
    for run, best in zip(module.runs_of("walker-walk", 900, 2), (300.0, 500.0)):
        config, _ = config_of(run)
        kwargs = train_s5.make_trial_kwargs(config)
        assert kwargs["projection"] == "none" and kwargs["action_repeat"] == (1,)
        write_run(run.path, config, [{"update": i, "steps": 100 * i, "seed": 0, "return/walker-walk": x}
                                     for i, x in ((1, 0.0), (2, best))])
    flags = ("--jobs", "0", "--seeds", "2", "--total-timesteps", "900", "--tasks", "walker-walk", "hopper-hop")
    [row], printed = main(module, *flags, picture=False, code=0)
    assert (float(row["return"]), float(row["worst"]), row["steps"], row["published"]) == (400, 300, "200", "945")
    assert "hopper-hop: not every seed has begun" in printed
    config = train_s5.Config(env=("hopper-hop",), projection="none", num_envs=32)
    write_run(module.runs_of("hopper-hop", 900, 1)[0].path, config, [{"update": 1, "steps": 100, "seed": 0}])
    assert "made with other flags" in main(module, *flags, picture=False, code=2)[1]


def test_parts_compares_every_variant_with_the_first(load, main, tmp_path, monkeypatch):
    module = load("parts")
    monkeypatch.setattr(module, "RUNS", tmp_path)
    worth = {"S5": 100.0, "no memory": 90.0}
    for run in module.runs_of(list(worth), 900, 3):
        returns = {f"return/{task}": worth[run.variant] + run.seed for task in envs.TRAIN_TASKS}
        write_run(run.path, config_of(run)[0], [{"update": 1, "steps": 900, "seed": run.seed} | returns])
    rows, printed = main(module, "--steps", "900", "--jobs", "0", picture=False, code=0)
    assert [row["variant"] for row in rows] == list(worth) and "LSTM: not every seed has begun" in printed
    assert printed.count("No interval covers runs that collapse") == 1
    assert rows[0]["each"] == "100 101 102"
    first, none = ({k: float(v) for k, v in row.items() if k not in ("variant", "each")} for row in rows)
    assert first["lost"] == 0 and np.isnan(first["lost_low"])  # against itself there is no interval
    assert (first["mean"], first["worst"], none["lost"], none["reacher-easy"]) == (101, 100, 10, 91)
    half = 4.303 * 1 / np.sqrt(3)  # t of two degrees of freedom, deviation 1
    np.testing.assert_allclose([first["low"], first["high"]], [101 - half, 101 + half], rtol=1e-3)
    half = 2.776 * np.sqrt(2 / 3)  # Welch, equal variances: four degrees of freedom
    np.testing.assert_allclose([none["lost_low"], none["lost_high"]], [10 - half, 10 + half], rtol=1e-3)


def test_parts_leaves_out_one_part_at_a_time(load):
    module = load("parts")
    runs = module.runs_of(list(module.VARIANTS), 5_000_000, 1)
    configs = {run.variant: config_of(run)[0] for run in runs}
    assert {run.trainer for run in runs} == set(TRAINERS) and len({run.path for run in runs}) == len(runs) == 10

    def those(condition):
        return [name for name, config in configs.items() if condition(config)]

    assert configs["vectors"] == train_s5.Config(total_timesteps=5_000_000)
    assert those(lambda config: config.sysid) == ["vectors, sysid", "S5, sysid", "LSTM, sysid", "no memory, sysid"]
    assert those(lambda config: config.reset == "step") == ["no memory", "no memory, sysid"]
    assert those(lambda config: config.blind) == ["vectors, blind"]
    assert those(lambda config: not config.privileged_critic) == ["vectors, no privileged critic"]
    s5 = those(lambda config: isinstance(config, train_s5.Config) and train_s5.memory_of(config) == "s5")
    assert s5 == ["S5", "no memory", "S5, sysid", "no memory, sysid"]


# ---- A quarter of an hour on a GPU ---------------------------------------------------------------
@pytest.mark.parametrize("small", [False, True])
def test_gpu_jobs_have_flags_that_their_scripts_know(load, tmp_path, monkeypatch, small):
    jobs = load("gpu").JOBS
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if small else "gpu")  # for the default sizes
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        script, *flags = [*job.command(small), *job.out(tmp_path)]
        trainer = TRAINERS.get(script.removesuffix(".py"))
        if trainer:
            config, options = experiment.parse_flags(trainer.Config, args=flags)
            assert options.out == str(tmp_path) and not options.evaluate
            assert (config.env == ("CartPole-v1",)) >= small and config.total_timesteps == 512 or not small
        else:
            assert flags[-2:] == ["--out", str(tmp_path / "table.csv")] and (FOLDER / script).exists()


def test_gpu_runs_what_is_missing_and_packs_it(load, tmp_path, monkeypatch, capsys):
    module = load("gpu")
    script = tmp_path / "script.py"
    script.write_text("import os, pathlib, sys, time\n"
                      "folder = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
                      "(folder / 'memory').write_text(os.environ.get('XLA_PYTHON_CLIENT_MEM_FRACTION', 'all'))\n"
                      "(folder / 'agent.msgpack').write_bytes(bytes(60))\n"
                      "(folder / 'checkpoints').mkdir()\n"
                      "float(sys.argv[1]) > 1 and pathlib.Path(__file__).with_name('late').touch()\n"
                      "time.sleep(float(sys.argv[1]))\n"
                      "sys.exit(int(sys.argv[2]))\n")

    def job(name, sleep, code=0, **settings):
        return module.Job(name, "?", settings.pop("seconds", 0), str(script), (str(sleep), str(code)), **settings)

    jobs = [job("done", 0), job("first", 0.5), job("second", 0.5), job("alone", 0.1, alone=True),
            job("broken", 0, 3), job("endless", 60), job("costly", 0, seconds=100)]
    monkeypatch.setattr(module, "JOBS", jobs)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "LARGEST", 800)
    (tmp_path / "results" / "gpu" / "done").mkdir(parents=True)
    # the time is up as soon as the endless job runs
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=time.sleep, monotonic=lambda: (
        time.monotonic() + 1000 * (tmp_path / "late").exists())))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--minutes", "1.5", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 1
    events = capsys.readouterr().out.splitlines()
    assert events[:2] == ["first: started", "second: started"] and not any("costly" in line for line in events)
    started = events.index("alone: started")
    assert events[started + 1].startswith("alone: exit status 0")  # nothing ran beside it
    archives = sorted(out.iterdir())
    assert [path.name for path in archives] == [f"gpu-{i}.tar.gz" for i in range(1, len(archives) + 1)]
    assert len(archives) > 1
    for path in archives:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "results" / "gpu", filter="data")
    found = tmp_path / "results" / "gpu"
    names = {"done", "first", "second", "alone", "broken-unfinished", "endless-unfinished"}
    assert {path.name for path in found.iterdir()} == names
    assert {path.name for path in (found / "first").iterdir()} == {"agent.msgpack", "job.json", "log.txt", "memory"}
    assert (found / "first" / "memory").read_text() == "0.3" and (found / "alone" / "memory").read_text() == "all"
    assert '"state": "stopped"' in (found / "endless-unfinished" / "job.json").read_text()
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list"])
    module.main()
    listed = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["done"] * 4 + ["missing"] * 3


# ---- What a memory can do ------------------------------------------------------------------------
def test_memory_chain_needs_memory(main):
    rows, _ = main("memory_chain", "--lengths", "6", "--memories", "s5", "none", "--width", "8", "--episodes", "4000",
                   "--seeds", "2", "--lr", "3e-3")
    s5, none = rows
    assert float(s5["mean"]) > 0.5 > float(none["mean"]) and s5["parameters"] == none["parameters"]
    assert float(none["low"]) < float(none["mean"]) < float(none["high"])
    assert all(float(row[cost]) > 0 for row in rows for cost in ("us_per_step", "megabytes"))


@pytest.mark.parametrize("name", ["s5", "lstm", "transformer"])
def test_memory_chain_episodes_end_by_themselves(load, name):
    """Also beyond gymnax's limit of 1000 steps; and the transformer's window holds a whole episode."""
    config = load("memory_chain").make_config(name, 2048, 10_000)
    assert config.total_timesteps == 10_000 * 2049 and config.num_steps == 2 * 2049
    assert config.env_kwargs == ("memory_length=2048", "max_steps_in_episode=2049")
    env, params = envs.make("MemoryChain-bsuite", **envs.parse_kwargs(config.env_kwargs))
    _, state = env.reset(jax.random.PRNGKey(0), params)
    _, _, reward, terminated, _ = env.step_env(None, state.replace(time=2048), 0, params)
    assert terminated and abs(reward) == 1
    assert name != "transformer" or config.window == 2049


def test_reading_scores_between_no_memory_and_the_oracle(main):
    rows, _ = main("reading", "--tasks", "pendulum-swingup", "--memories", "S5", "--steps", "40000",
                   "--num-envs", "32", "--num-steps", "50", picture=False)
    table = {(row["target"], row["memory"]): row for row in rows}
    assert len(table) == len(rows) == 4 * 3 and {row["memory"] for row in rows} == {"none", "S5", "oracle"}
    none, s5, oracle = (table["control", name] for name in ("none", "S5", "oracle"))
    errors = [float(row["error_200"]) for row in (none, s5, oracle)]
    assert errors[2] < 0.2 < 0.5 < min(errors[:2])  # so soon no memory helps; the oracle need not identify anything
    assert (float(none["closed_200"]), float(oracle["closed_200"])) == (0, 1)
    np.testing.assert_allclose(float(s5["closed_200"]), (errors[0] - errors[1]) / (errors[0] - errors[2]), atol=0.01)


def test_reading_asks_for_what_comes(load):
    """The target added to an observation is the later one; controls follow from later actions; in one trial."""
    stream = load("reading").Stream("cartpole-swingup", 16, 150, False)
    advance = jax.jit(stream.next)
    carry, first = advance(stream.reset(jax.random.PRNGKey(0)))
    data = jax.tree.map(lambda *x: np.concatenate(x), first, advance(carry)[1])
    observed, action, trial = data["plain"][..., :12], data["plain"][1:, :, 24:26], np.cumsum(data["reset"], 0)
    for i, k in enumerate((1, 4, 16)):
        known = data["known"][:-k, :, i]
        np.testing.assert_array_equal(known, trial[k:] == trial[:-k])
        assert 0 < (~known).sum() < known.sum()
        np.testing.assert_allclose(data["ahead"][:-k, :, i][known], (observed[k:] - observed[:-k])[known], atol=1e-5)
        control = np.clip(np.einsum("tnij,tnj->tni", data["act_matrix"][:-k], action[k - 1:]), -1, 1)
        np.testing.assert_allclose(data["controls"][:-k, :, k - 1][known], control[known], atol=1e-6)
    sin_and_velocity = data["raw"][..., [2, 4], None]  # of the pole's angle
    direction = data["act_matrix"] / np.linalg.norm(data["act_matrix"], axis=-1, keepdims=True)
    np.testing.assert_allclose(data["control"], sin_and_velocity * direction, atol=1e-4)


def test_a_script_runs_in_any_folder_without_the_settings_of_the_tests():
    done = subprocess.run([sys.executable, str(FOLDER / "benchmarks" / "gpu.py"), "--list"], cwd="/",
                          capture_output=True, text=True)
    assert done.returncode == 0 and "plain_lstm64" in done.stdout, done.stderr
