"""The benchmarks run at tiny sizes, and what they compute from their measurements is right."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


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


def test_train(tmp_path):
    sizes = ("num_envs=4", "num_steps=8", "num_minibatches=2", "layers=1", "width=8", "state_size=6")
    rows, _ = run("train", tmp_path, "--repeats", "1", "--trainers", "train_s5", "--env", "CartPole-v1",
                  "--lanes", "--rollouts", "--widths", "--seeds", "--set", *sizes)
    [row] = rows
    parts = [float(row[f"{part}_%"]) for part in ("environment", "acting", "update")]
    np.testing.assert_allclose(sum(parts), 100, 1e-2)
    assert float(row["cached_compile_s"]) > 0 and float(row["cold_compile_s"]) > 0
    assert float(row["megabytes"]) > 0 and np.isfinite(float(row["of_matmul_%"]))
    # products per step: encoder (13 inputs), B and C, gated unit, two hidden heads, value, two logits
    encoder, others = 13 * 8, 2 * 6 * 8 + 2 * 8 * 8 + 2 * 8 * 8 + 8 + 2 * 8
    seen = 4 * 4 * 8  # epochs, lanes, steps; the encoder's inputs need no gradient
    np.testing.assert_allclose(float(row["gflop"]), seen * 2 * (2 * encoder + 3 * others) / 1e9, rtol=1e-3)


def test_memory_chain(tmp_path):
    rows, _ = run("memory_chain", tmp_path, "--lengths", "6", "--trainers", "s5", "memoryless", "--width", "8",
                  "--episodes", "4000", "--seeds", "2", "--lr", "3e-3")
    s5, memoryless = rows
    assert float(s5["mean"]) > 0.5 > float(memoryless["mean"]) and s5["parameters"] == memoryless["parameters"]
    assert float(s5["low"]) <= float(s5["mean"]) <= float(s5["high"])
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
