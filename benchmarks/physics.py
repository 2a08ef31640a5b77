"""Physics backends on the same tasks: fused, MJX and C MuJoCo. Speed, compile time, agreement.

    python benchmarks/physics.py                                     # all tasks, batches 1 ... 8192
    python benchmarks/physics.py --batches 64 --tasks finger-spin pendulum-swingup
    python benchmarks/physics.py --batches 252 --mjx-batch 252 \\
        --tasks ball_in_cup-catch+cartpole-swingup+finger-spin+finger-turn_hard+point_mass-easy+reacher-easy

A step of "fused" and "mjx" is everything that training pays for: control step, reward, observation,
projection and automatic reset (envs.Trials.step in a compiled scan). Tasks joined by + share the
environments equally. A step of "C-n-threads" (mujoco.rollout) is the control step alone in double precision,
without reward, observation and reset, which flatters C. "playground" rows are mujoco_playground's own ports,
stepped without reset, where that package is installed. MJX and playground are slow: one batch, few steps.

error_qpos and error_qvel: the largest difference from C MuJoCo after one control step in float32, over 64
states that C reaches from fresh starts by up to 50 random actions (metres and radians, and those per second).
error_qpos_200: the median over the states of the difference in qpos after 200 steps of random actions
("fused" only). It is a median because contacts are chaotic.
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

from common import (  # first: it finds the project
    RESULTS,
    Table,
    compile_program,
    device,
    log_axis,
    make_parser,
    numbers,
    plot_into,
    run_main,
    seconds,
    whole,
)

import dmc
import envs
import physics

STATES, ACTIONS_BEFORE, DRIFT = 64, 50, 200  # of the errors
PLAYGROUND = {task: task.replace("-", "_").title().replace("_", "") for task in dmc.TASKS} | {
    "ball_in_cup-catch": "BallInCup", "point_mass-easy": "PointMass"}  # registered names
BACKENDS = {  # words, colour and style in the figure; others are C with several threads
    "fused": ("fused (this project)", "tab:blue", "o-"), "C-1-thread": ("C MuJoCo, 1 thread", "black", "o-"),
    "mjx": ("MJX", "tab:red", "o-"), "playground": ("mujoco_playground", "tab:purple", "o-")}


def scanned(step, state, actions, repeats):
    """Returns (calls per second, compile seconds) of step(state, (t, action)), scanned over actions (T, ...)."""
    compiled = compile_program(lambda s, a: jax.lax.scan(step, s, (jnp.arange(len(a)), a)), state, actions)
    took = seconds(compiled.run, state, actions, repeats=repeats, budget=5.0)
    return len(actions) / took, compiled.compile_s


def trials_speed(tasks, batch, backend, steps, repeats):
    """Returns (environment steps per second, compile seconds) of `steps` steps of `batch` environments."""
    made = [envs.make(task)[0] for task in tasks]
    trials = envs.Trials(  # the paper's sizes, if they suffice
        tasks, batch, obs_size=max(12, *(env.observation_space().shape[0] for env in made)),
        action_size=max(2, *(env.model.nu for env in made)), privileged=False,
        env_kwargs={"backend": backend})
    state, _ = jax.jit(trials.reset)(jax.random.PRNGKey(0))

    def step(state, x):
        state, observation, transition = trials.step(state, x[1], x[0] + 1)
        return state, observation.projected.sum() + transition.reward.sum()

    shape = steps, batch, trials.action_dims
    actions = jax.random.randint(jax.random.PRNGKey(1), shape, 0, trials.num_bins)
    calls, compile_s = scanned(step, state, actions, repeats)
    return batch * calls, compile_s


def playground_speed(task, batch, steps, repeats):
    """As trials_speed, of mujoco_playground's port of `task`."""
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
    """Returns MuJoCo's full-physics states (n, size): time, positions, velocities, no activations."""
    return np.concatenate([np.zeros((len(qpos), 1)), qpos, qvel], 1)


def starts(model, task, count):
    """Returns fresh starts of the task, full-physics states (count, size)."""
    env, params = envs.make(task)
    keys = jax.random.split(jax.random.PRNGKey(0), count)
    _, state = jax.jit(jax.vmap(env.reset_env, (0, None)))(keys, params)
    return full_states(model, *map(np.float64, (state.qpos, state.qvel)))


def c_speed(model, substeps, start, threads, steps, repeats):
    """Returns the control steps per second of mujoco.rollout from full-physics states `start` (n, size)."""
    control = np.random.default_rng(0).uniform(-1, 1, (len(start), steps, model.nu)).repeat(substeps, 1)
    data = [mujoco.MjData(model) for _ in range(threads)]
    with mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0) as pool:
        took = seconds(pool.rollout, model, data, start, control, repeats=repeats, budget=5.0)
    return len(start) * steps / took


def errors(model, substeps, start, backends):
    """Returns {backend: difference from C MuJoCo}.

    A difference is (largest in qpos, largest in qvel after a control step, median in qpos after DRIFT).
    """
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


def measure(name, options, table):
    """Adds the rows of a task, or of several tasks joined by +."""
    tasks, alone, error = name.split("+"), "+" not in name, {}

    def row(backend, batch, speed, compile_s=None):
        error_qpos, error_qvel, error_qpos_200 = error.get(backend, (None, None, None))
        table.add(tasks=name if alone else f"{len(tasks)}-tasks", backend=backend, batch=batch,
                  steps_per_s=round(speed), compile_s=compile_s, error_qpos=error_qpos,
                  error_qvel=error_qvel, error_qpos_200=error_qpos_200)

    if alone:
        task = dmc.TASKS[name]
        model = mujoco.MjModel.from_xml_string(task.model)
        backends = ("fused", "mjx") if options.mjx_batch else ("fused",)
        error = errors(model, task.substeps, starts(model, name, STATES), backends)
    for batch in options.batches:
        steps = max(2, min(options.steps // batch, 1024))
        row("fused", batch, *trials_speed(tasks, batch, "fused", steps, options.repeats))
        for threads in sorted({1, options.threads} if alone else ()):
            row(f"C-{threads}-thread{'s' * (threads > 1)}", batch,
                c_speed(model, task.substeps, starts(model, name, batch), threads, steps, options.repeats))
    if options.mjx_batch:
        batch, steps = options.mjx_batch, max(2, options.steps // 256 // options.mjx_batch)
        row("mjx", batch, *trials_speed(tasks, batch, "mjx", steps, options.repeats))
        if alone and importlib.util.find_spec("mujoco_playground"):
            try:
                row("playground", batch, *playground_speed(name, batch, steps, options.repeats))
            except (AttributeError, ValueError) as reason:  # no port, or one that does not fit this MuJoCo
                print(f"the port of {name} in mujoco_playground is left out: {reason}")


def draw(rows, path, title):
    """Writes a panel for each task: control steps per second against the batch."""
    shown = list(dict.fromkeys(row["tasks"] for row in rows))
    columns = min(4, len(shown))

    def panel(axis, line, column):
        tasks = shown[line * columns + column:][:1]
        if not tasks:
            axis.remove()
            return
        mine = [row for row in rows if row["tasks"] == tasks[0]]
        for backend in dict.fromkeys(row["backend"] for row in mine):
            batch, speed = numbers([row for row in mine if row["backend"] == backend], "batch", "steps_per_s")
            threads = (backend.replace("C-", "C MuJoCo, ").replace("-", " "), "tab:gray", "x:")
            word, colour, style = BACKENDS.get(backend, threads)
            axis.plot(batch, speed, style, ms=4, color=colour, label=word)
        axis.set(title=tasks[0], xlabel="environments (batch)", ylabel="control steps per second")
        log_axis(axis, "x", [1, 8, 64, 512, 4096])
        log_axis(axis, "y")

    plot_into(path, -(-len(shown) // columns), columns, panel, title, size=(3.6, 2.8), legend=5)


def joined_tasks(text):
    """A type of argparse: names of tasks joined by +."""
    for task in text.split("+"):
        if task not in dmc.TASKS:
            raise argparse.ArgumentTypeError(f"unknown task {task!r}; known: {', '.join(dmc.TASKS)}")
    return text


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--tasks", type=joined_tasks, nargs="+", default=list(dmc.TASKS),
                        help="task names; those joined by + share the environments")
    parser.add_argument("--batches", type=whole(1), nargs="+", default=[1, 32, 512, 8192])
    parser.add_argument("--mjx-batch", type=whole(0), default=64, help="of MJX and playground (0: leave both out)")
    parser.add_argument("--steps", type=whole(1), default=32768, help="of all environments in a call; MJX runs a 256th")
    parser.add_argument("--threads", type=whole(1), default=os.cpu_count(), help="of the threaded C rows")
    parser.add_argument("--repeats", type=whole(1), default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "physics.csv", help="a picture goes beside it")
    options = parser.parse_args()
    table = Table(options.out)
    for name in options.tasks:
        measure(name, options, table)
    draw(table.rows, options.out.with_suffix(".png"), device())


if __name__ == "__main__":
    run_main(main)
