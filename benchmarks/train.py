"""Where the wall time of training goes: environment, acting, update; compile time; steps per second.

    python benchmarks/train.py                       # the default configurations of both trainers
    python benchmarks/train.py --lanes 96 192 384    # against the number of lanes

Environment: one rollout of steps with given actions. Acting: what a rollout with the policy costs beyond that.
Update: what a whole PPO iteration costs beyond the rollout. Medians of several calls, synchronised, after a warm-up.
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

import train_lstm  # noqa: E402
import train_s5  # noqa: E402


def clock(function, *args, repeats):
    """(seconds per call, seconds to compile) of jax.jit(function)(*args)."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), compile_seconds


def measure(trainer, config, repeats):
    """One table row for `config` with the trainer module `trainer`."""
    train = trainer.make_train(config)
    lanes, T = train.lanes, config.rollout_length
    runner = jax.jit(train.init)(jax.random.PRNGKey(0))
    if lanes.discrete:
        actions = jax.random.randint(jax.random.PRNGKey(1), (T, config.num_lanes), 0, lanes.action_size)
    else:
        actions = jax.random.normal(jax.random.PRNGKey(1), (T, config.num_lanes, lanes.action_size))

    def environment(state, actions):
        def step(state, x):
            state, inputs, out = lanes.step(state, x[1], x[0])
            return state, inputs.sum() + out.reward.sum()
        return jax.lax.scan(step, state, (jnp.arange(T), actions))

    env, _ = clock(environment, runner.env_state, actions, repeats=repeats)
    collect, _ = clock(train.collect, runner, repeats=repeats)
    update, compile_seconds = clock(train.update, runner, repeats=repeats)
    steps = config.num_lanes * T
    return {"trainer": trainer.__name__, "lanes": config.num_lanes, "rollout": T, "width": config.width,
            "compile_s": compile_seconds, "steps_per_s": steps / update, "env_steps_per_s": steps / env,
            "environment_%": 100 * env / update, "acting_%": 100 * (collect - env) / update,
            "update_%": 100 * (update - collect) / update}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", type=int, nargs="+", help="numbers of lanes (default: the trainers' own)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "train.csv")
    options = parser.parse_args()
    accelerated = jax.default_backend() != "cpu"
    rows = []
    for trainer in (train_s5, train_lstm):
        default = trainer.ACCELERATOR if accelerated else {}
        for lanes in options.lanes or [trainer.Config(**default).num_lanes]:
            config = trainer.Config(**(default | {"num_lanes": lanes}))
            rows.append(measure(trainer, config, options.repeats))
            if len(rows) == 1:
                print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
                print(" ".join(f"{name:>15s}" for name in rows[0]))
            print(" ".join(f"{v:>15.1f}" if isinstance(v, float) else f"{v:>15}" for v in rows[-1].values()), flush=True)
    options.out.parent.mkdir(exist_ok=True, parents=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
