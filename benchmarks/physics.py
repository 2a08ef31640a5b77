"""Physics backends on the same tasks: fused, MJX and C MuJoCo. Speed, compile time, agreement.

    python benchmarks/physics.py                                     # all tasks, batches 1 ... 8192
    python benchmarks/physics.py --batches 64 --tasks finger-spin pendulum-swingup
    python benchmarks/physics.py --batches 252 --mjx-batch 252 \\
        --tasks ball_in_cup-catch+cartpole-swingup+finger-spin+finger-turn_hard+point_mass-easy+reacher-easy

A step of "fused" and "mjx" is everything that training pays for: control step, reward, observation,
projection and automatic reset (envs.Lanes.step in a compiled scan); names joined by + share lanes equally.
A step of "C-n-threads" (mujoco.rollout) is the control step alone, in double precision: no reward, no
observation, no reset, which flatters it. "playground" rows are mujoco_playground's own ports, stepped without
reset, where that package is installed. MJX and playground are slow: one batch size, few steps.

error_qpos and error_qvel: the largest difference from C MuJoCo after one control step in float32, over 64
states that C reaches from fresh starts by up to 50 random actions (metres and radians, and those per second).
error_qpos_200: that of the positions after 200 steps of random actions, the median over the states, for contacts
are chaotic; "fused" only.
Medians of several calls, synchronised, after a warm-up.
"""

import argparse
import importlib.util
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import mujoco
import mujoco.rollout
import numpy as np

from common import RESULTS, Table, compile_program, plot_into, seconds  # first: it finds the project

import dmc
import envs
import physics

STATES, ACTIONS_BEFORE, DRIFT = 64, 50, 200  # of the errors
PLAYGROUND = {task: task.replace("-", "_").title().replace("_", "") for task in dmc.TASKS} | {
    "ball_in_cup-catch": "BallInCup", "point_mass-easy": "PointMass"}  # registered names


def scanned(step, state, actions, repeats):
    """(calls per second, compile seconds) of step(state, (t, action)), scanned over actions (T, ...)."""
    compiled = compile_program(lambda s, a: jax.lax.scan(step, s, (jnp.arange(len(a)), a)), state, actions)
    took = seconds(compiled.run, state, actions, repeats=repeats, budget=5.0)
    return len(actions) / took, compiled.compile_s


def lanes_speed(tasks, batch, backend, steps, repeats):
    """(environment steps per second, compile seconds) of `steps` steps on `batch` lanes."""
    made = [envs.make(task)[0] for task in tasks]
    obs_size = max(12, *(env.observation_space().shape[0] for env in made))  # the paper's sizes, if they will do
    action_size = max(2, *(env.model.nu for env in made))
    lanes = envs.Lanes(tasks, batch, obs_size=obs_size, action_size=action_size, observe_change=True, backend=backend)
    state, _ = jax.jit(lanes.reset)(jax.random.PRNGKey(0))

    def step(state, x):
        state, inputs, out = lanes.step(state, x[1], x[0] + 1)
        return state, inputs.sum() + out.reward.sum()

    actions = jax.random.normal(jax.random.PRNGKey(1), (steps, batch, lanes.action_size))
    calls, compile_s = scanned(step, state, actions, repeats)
    return batch * calls, compile_s


def playground_speed(task, batch, steps, repeats):
    """As lanes_speed, of mujoco_playground's port of `task`."""
    from mujoco_playground import registry
    env = registry.load(PLAYGROUND[task], config_overrides={"impl": "jax"})  # its default, Warp, needs a GPU
    state = jax.jit(jax.vmap(env.reset))(jax.random.split(jax.random.PRNGKey(0), batch))

    def step(state, x):
        state = jax.vmap(env.step)(state, x[1])
        return state, state.reward.sum()

    actions = jax.random.uniform(jax.random.PRNGKey(1), (steps, batch, env.action_size), minval=-1.0)
    calls, compile_s = scanned(step, state, actions, repeats)
    return batch * calls, compile_s


def full_states(model, qpos, qvel):
    """MuJoCo's full-physics states (n, size): time, positions, velocities, no activations."""
    return np.concatenate([np.zeros((len(qpos), 1)), qpos, qvel], 1)


def starts(model, task, count):
    """Fresh starts of the task: full-physics states (count, size)."""
    env, params = envs.make(task)
    keys = jax.random.split(jax.random.PRNGKey(0), count)
    _, state = jax.jit(jax.vmap(env.reset_env, (0, None)))(keys, params)
    return full_states(model, *map(np.float64, (state.qpos, state.qvel)))


def c_speed(model, substeps, start, threads, steps, repeats):
    """Control steps per second of mujoco.rollout from full-physics states `start` (n, size)."""
    control = np.random.default_rng(0).uniform(-1, 1, (len(start), steps, model.nu)).repeat(substeps, 1)
    data = [mujoco.MjData(model) for _ in range(threads)]
    with mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0) as pool:
        took = seconds(pool.rollout, model, data, start, control, repeats=repeats, budget=5.0)
    return len(start) * steps / took


def errors(model, substeps, start, backends):
    """{backend: difference from C MuJoCo: (largest of qpos, of qvel after a control step, of qpos after DRIFT)}."""
    rng, data = np.random.default_rng(0), mujoco.MjData(model)
    control = rng.uniform(-1, 1, (len(start), ACTIONS_BEFORE + DRIFT, model.nu)).astype(np.float32)
    states, _ = mujoco.rollout.rollout(model, data, start, control.repeat(substeps, 1).astype(float))
    begin = states[np.arange(len(start)), rng.integers(1, ACTIONS_BEFORE + 1, len(start)) * substeps - 1]
    qpos, qvel = np.float32(begin[:, 1:1 + model.nq]), np.float32(begin[:, 1 + model.nq:])
    control = control[:, ACTIONS_BEFORE:]
    begin = full_states(model, qpos, qvel)
    states, _ = mujoco.rollout.rollout(model, data, begin, control.repeat(substeps, 1).astype(float))
    truth = np.split(states[:, substeps - 1::substeps, 1:], [model.nq], -1)
    found = {}
    for backend in backends:
        step, steps = physics.make_step(model, substeps, backend), DRIFT if backend == "fused" else 1

        def run(qpos, qvel, control):
            return jax.lax.scan(lambda s, u: (step(*s, u)[:2],) * 2, (qpos, qvel), control)[1]

        ours = jax.jit(jax.vmap(run))(qpos, qvel, control[:, :steps])
        difference = [np.abs(np.asarray(a) - b[:, :steps]).max(-1) for a, b in zip(ours, truth)]
        drift = float(np.median(difference[0][:, -1])) if steps == DRIFT else None
        found[backend] = *(float(x[:, 0].max()) for x in difference), drift
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(dmc.TASKS),
                        help="task names; those joined by + share lanes")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 512, 8192])
    parser.add_argument("--mjx-batch", type=int, default=64, help="of MJX and playground (0: leave both out)")
    parser.add_argument("--steps", type=int, default=32768, help="of all lanes in a call; MJX runs a 256th")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the threaded C rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "physics.csv", help="a picture goes beside it")
    options = parser.parse_args()
    ports = importlib.util.find_spec("mujoco_playground") is not None
    if not ports:
        print("mujoco_playground is not installed: its ports are left out")
    table = Table(options.out)

    for name in options.tasks:
        tasks, error, alone = name.split("+"), {}, "+" not in name

        def row(backend, batch, speed, compile_s=None):
            error_qpos, error_qvel, error_qpos_200 = error.get(backend, (None, None, None))
            table.add(
                tasks=name if alone else f"{len(tasks)}-tasks", backend=backend, batch=batch,
                steps_per_s=round(speed), compile_s=compile_s, error_qpos=error_qpos, error_qvel=error_qvel,
                error_qpos_200=error_qpos_200)

        if alone:
            task = name.removeprefix("dmc:")
            model = mujoco.MjModel.from_xml_string(dmc.TASKS[task].model)
            substeps = dmc.TASKS[task].substeps
            backends = ("fused", "mjx") if options.mjx_batch else ("fused",)
            error = errors(model, substeps, starts(model, task, STATES), backends)
        for batch in options.batches:
            steps = max(2, min(options.steps // batch, 1024))
            row("fused", batch, *lanes_speed(tasks, batch, "fused", steps, options.repeats))
            if alone:
                start = starts(model, task, batch)
                for threads in sorted({1, options.threads}):
                    row(f"C-{threads}-thread{'s' * (threads > 1)}", batch,
                        c_speed(model, substeps, start, threads, steps, options.repeats))
        if options.mjx_batch:
            batch, steps = options.mjx_batch, max(2, options.steps // 256 // options.mjx_batch)
            row("mjx", batch, *lanes_speed(tasks, batch, "mjx", steps, options.repeats))
            if ports and alone:
                try:
                    row("playground", batch, *playground_speed(task, batch, steps, options.repeats))
                except (AttributeError, ValueError) as error:  # no port, or one that this MuJoCo has left behind
                    print(f"the port of {task} in mujoco_playground is left out: {error}")

    shown = list(dict.fromkeys(row["tasks"] for row in table.rows))
    columns = min(4, len(shown))

    def draw(axis, i, j):
        if i * columns + j >= len(shown):
            axis.remove()
            return
        rows = [row for row in table.rows if row["tasks"] == shown[i * columns + j]]
        for backend in dict.fromkeys(row["backend"] for row in rows):
            points = [(row["batch"], row["steps_per_s"]) for row in rows if row["backend"] == backend]
            axis.loglog(*zip(*points), "o-", ms=4, label=backend)
        axis.set(title=shown[i * columns + j], xlabel="batch", ylabel="control steps per second")
        axis.legend(fontsize=7)

    plot_into(options.out.with_suffix(".png"), -(-len(shown) // columns), columns, draw)


if __name__ == "__main__":
    main()
