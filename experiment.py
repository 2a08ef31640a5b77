"""A training run and its folder: seeds, sweeps, logs, checkpoints, resume, command line.

    experiment.main(Config, make_train, __doc__)                      # `python train_s5.py`
    folder = experiment.run(make_train, Config(), Options(num_seeds=4))
    experiment.run(make_train, *experiment.read_run(folder, Config))  # resume

A run trains A agents, every setting of the sweep with every seed, in one compiled function that
does `log_every` updates a call. After each call process 0 writes to the run folder:

    config.json      trainer, Config, Options
    metrics.csv      a row for each update and agent; a resumed run writes the same bytes
    timing.csv       a row for each call: seconds since the (re)start, environment steps per second
    checkpoints/     the newest two, UPDATE.npz
    agent.msgpack    the agents without optimiser and environments, as of the newest checkpoint
    tensorboard/     event files
    returns.png      at the end; a sweep also writes sweep.csv and sweep.png

A trainer provides a frozen dataclass Config with the fields env, num_envs, log_every and
total_timesteps, the properties num_updates and steps_per_update, and SWEEPABLE, the names of the
fields that may be traced; and make_train(config, axis=None) -> train, with train.init(key, hyper)
-> runner and train.update(runner) -> (runner, {name: (), (tasks,) or (tasks, bins)}).
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
import tyro

import devices
from logs import (  # noqa: F401  also for those who read run folders through this file
    Logs,
    final_scores,
    nanmean,
    panels,
    read_metrics,
    summarise,
    t_interval,
    training_returns,
    write_rows,
)
from run_folder import (  # noqa: F401
    Options,
    Run,
    agents_of,
    import_trainer,
    open_folder,
    read_agent,
    read_run,
    restore,
    save,
    saved,
    settings_of,
    trainer_of,
)


# ---- Command line --------------------------------------------------------------------------------
def main(config_class: type, make_train: Callable, description: str) -> None:
    """Parses the command line, trains and evaluates. An error is one sentence and exit status 2."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax-icrl"))
    jax.config.update("jax_compilation_cache_dir", cache)
    try:
        devices.start()
        config, options = parse_flags(config_class, description)
        if options.resume:
            config, options = read_run(options.resume, config_class)
        folder = run(make_train, config, options)
        if options.evaluate and not options.sweep and devices.is_first():
            evaluate(folder)
    except (ValueError, FloatingPointError) as error:
        devices.stop(2, f"error: {error}")
    except KeyboardInterrupt:
        devices.stop(130)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            devices.stop(2, "error: out of memory; lower --num-envs, --num-seeds or --width")
        if jax.process_count() == 1:
            raise
        devices.stop(1, "error: another process is gone; go on with --resume in all of them "
                        f"({str(error).splitlines()[0]})")


def parse_flags(config_class: type, description: str = "", args: list[str] | None = None):
    """Returns (Config, Options) from one list of flags, by default those of the command line."""
    def flags(algorithm: config_class, run: Options):
        return algorithm, run

    return tyro.cli(flags, args=args, description=description, config=(tyro.conf.OmitArgPrefixes,))


def evaluate(folder: Path) -> None:
    """Evaluates the agents of a run folder if evaluate.py is beside this file."""
    if jax.process_count() > 1:
        print(f"evaluation is for one process: python evaluate.py {folder}")
    elif (Path(__file__).parent / "evaluate.py").is_file():
        importlib.import_module("evaluate").report(folder)
    else:
        print("evaluate.py is not here: no evaluation")


# ---- Training ------------------------------------------------------------------------------------
def run(make_train: Callable, config: Any, options: Options) -> Path:
    """Trains, into a new run folder or on from the newest checkpoint of options.resume.

    Args:
      make_train: the trainer's. Every process calls `run`; process 0 writes the folder.
      config, options: of a resumed run as returned by read_run.

    Returns:
      The run folder.

    Raises:
      ValueError: invalid flags, run folder or checkpoint, in one sentence.
      FloatingPointError: most gradient steps were not finite.
    """
    if options.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs the wandb package: pip install wandb")
    begin = time.perf_counter()
    agents = agents_of(config, options)
    mesh = devices.make_mesh(config, len(agents), options.devices)
    options = dataclasses.replace(options, devices=mesh.size)
    this = Run(config, options, open_folder(config, options))
    if devices.is_first():  # before compiling, which takes a while
        print(f"{this.folder}: {len(agents)} x {config.total_timesteps:,} steps of "
              f"{', '.join(config.env)} on {mesh.size} {jax.default_backend()}", flush=True)
    program = devices.make_program(make_train, config, mesh, len(agents))
    with ThreadPoolExecutor() as pool:
        compiling = pool.submit(program.compile)  # at once with the compilation of program.init
        update, runner = first_runner(this, program)
        chunk = compiling.result()
    if devices.is_first():
        size = sum(x.size for x in jax.tree.leaves(runner.params)) // len(agents)
        print(f"{size:,} parameters; ready in {time.perf_counter() - begin:.1f} s")
    try:
        with Logs(this, update) if devices.is_first() else contextlib.nullcontext() as logs:
            train_to_the_end(this, chunk, update, runner, logs)
    except KeyboardInterrupt:
        script = Path(inspect.getfile(type(config))).name
        print(f"\ninterrupted; go on with: python {script} --resume {this.folder}", file=sys.stderr)
        raise
    if devices.is_first():
        summarise(this)
        print(f"{time.perf_counter() - begin:.0f} s; everything is in {this.folder}")
    return this.folder


def first_runner(this: Run, program: devices.Program) -> tuple[int, Any]:
    """Returns (updates done, runner): new, or of the newest checkpoint."""
    rows = this.folder / "metrics.csv"
    if this.options.resume and (saved(this.folder) or rows.exists() and rows.stat().st_size):
        update, runner = restore(this.folder, program.shapes)
        if update != devices.from_first(update):
            raise ValueError("the processes found different checkpoints: is the folder shared?")
        return update, runner
    agents = agents_of(this.config, this.options)  # also if a kill came before the first checkpoint
    keys = jnp.stack([jax.random.PRNGKey(seed) for _, seed in agents])
    hyper = {name: jnp.array([setting[name] for setting, _ in agents], jnp.float32)
             for name in agents[0][0]}
    return 0, program.init(keys, hyper)


def train_to_the_end(this: Run, chunk: Callable, update: int, runner: Any, logs: Any) -> None:
    """Calls the compiled function until training ends; logs its metrics and saves its runners."""
    save(this, update, runner)  # there is no row without a checkpoint before it
    last_save = time.perf_counter()
    while update < this.config.num_updates:
        start = time.perf_counter()
        runner, metrics = chunk(runner)
        metrics = jax.device_get(metrics)
        update += this.config.log_every
        if logs:
            logs.add(update, metrics, time.perf_counter() - start)
        skipped = metrics["skipped"].mean()
        if skipped > 0.5:
            raise FloatingPointError(f"{skipped:.0%} of the gradient steps were not finite and "
                                     "were skipped: lower --lr")
        due = time.perf_counter() - last_save > 60 * this.options.checkpoint_minutes
        due = devices.from_first(due)  # the processes' clocks differ
        if due or update >= this.config.num_updates:
            save(this, update, runner)
            last_save = time.perf_counter()
