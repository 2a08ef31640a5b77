"""Environment steps per second: the fused physics against MJX on the same tasks, in one process.

    python benchmarks/physics.py                            # the six training tasks, one by one and together
    python benchmarks/physics.py --batch 64 --tasks finger-spin pendulum-swingup

A step is everything that training pays for: control step, reward, observation, projection and automatic reset
(envs.Lanes.step in a compiled scan). Medians of several calls, synchronised, after a warm-up; MJX runs fewer steps.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import envs  # noqa: E402


def steps_per_second(tasks, batch, backend, steps, repeats):
    """(environment steps per second, seconds to compile) of `steps` steps on `batch` lanes."""
    lanes = envs.Lanes(tasks, batch, delta=True, backend=backend)
    state, _ = jax.jit(lanes.reset)(jax.random.PRNGKey(0))
    actions = jax.random.normal(jax.random.PRNGKey(1), (steps, batch, lanes.action_size))

    @jax.jit
    def rollout(state, actions):
        def step(state, x):
            state, inputs, out = lanes.step(state, x[1], x[0] + 1)
            return state, inputs.sum() + out.reward.sum()
        return jax.lax.scan(step, state, (jnp.arange(steps), actions))

    start = time.perf_counter()
    compiled = rollout.lower(state, actions).compile()
    compile_seconds = time.perf_counter() - start
    state, _ = jax.block_until_ready(compiled(state, actions))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, actions))
        seconds.append(time.perf_counter() - start)
    return batch * steps / statistics.median(seconds), compile_seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[*envs.TRAIN_TASKS, "+".join(envs.TRAIN_TASKS)],
                        help="task names; names joined by + share the lanes")
    parser.add_argument("--batch", type=int, nargs="+", default=[252])
    parser.add_argument("--steps", type=int, default=256, help="of a call on the fused physics; MJX runs a 16th")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "physics.csv")
    options = parser.parse_args()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    rows = []
    for name in options.tasks:
        for batch in options.batch:
            tasks = name.split("+")
            row = {"tasks": name if len(tasks) == 1 else f"{len(tasks)} tasks", "batch": batch}
            for backend, steps in (("fused", options.steps), ("mjx", max(1, options.steps // 16))):
                speed, compile_seconds = steps_per_second(tasks, batch, backend, steps, options.repeats)
                row |= {f"{backend}_steps_per_s": round(speed), f"{backend}_compile_s": round(compile_seconds, 1)}
            row["ratio"] = round(row["fused_steps_per_s"] / row["mjx_steps_per_s"], 1)
            if not rows:
                print(" ".join(f"{column:>18s}" for column in row))
            rows.append(row)
            print(" ".join(f"{value:>18}" for value in row.values()), flush=True)
    options.out.parent.mkdir(exist_ok=True, parents=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
