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
    wandb_id, lock   with --wandb, for a resumed run; while a process trains here

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
import shlex
import signal
import sys
import threading
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
import tyro

import devices
from logs import (  # noqa: F401  also for those who read run folders through this file
    Logs,
    failed_in,
    final_scores,
    nanmean,
    panels,
    read_metrics,
    start_wandb,
    summarise,
    t_interval,
    training_returns,
    write_rows,
)
from run_folder import (  # noqa: F401
    Options,
    Run,
    agents_of,
    check_finite,
    discard,
    import_trainer,
    locked,
    open_folder,
    read_agent,
    read_run,
    restore,
    save,
    saved,
    settings_of,
    trainer_of,
    update_config,
)


# ---- Command line --------------------------------------------------------------------------------
def main(config_class: type, make_train: Callable, description: str) -> None:
    """Parses the command line, trains and evaluates. An error is one sentence and exit status 2."""
    use_cache()
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook need not be installed
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a KeyboardInterrupt inside a callback of JAX is lost
    try:
        devices.start()
        if resumed := resumed_folder(sys.argv):
            config, options = parse_resumed(config_class, resumed, description)
        else:
            config, options = parse_flags(config_class, description)
        if getattr(config, "env", ()) == ("help",):
            return print("\n".join(importlib.import_module("envs").names()))
        folder = run(make_train, config, options)
        if options.evaluate and not options.sweep and devices.is_first():
            evaluate(folder)
    except KeyboardInterrupt:
        devices.stop(130)
    except (ValueError, FloatingPointError, OverflowError, OSError) as error:
        devices.stop(2, f"error: {error}{place(error)}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if out_of_memory(error):
            devices.stop(2, "error: out of memory; lower --num-envs, --num-seeds or --width")
        if jax.process_count() == 1:
            raise
        devices.stop(1, "error: another process is gone; go on with --resume in all of them "
                        f"({str(error).splitlines()[0]})")


def place(error: Exception) -> str:
    """Returns where a ValueError arose by mistake, as in an environment of the user's; else ""."""
    libraries = ("site-packages", "dist-packages", os.path.dirname(os.__file__))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not any(part in frame.filename for part in libraries)]
    if not isinstance(error, ValueError) or not frames or (frames[-1].line or "").startswith("raise"):
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})"


def out_of_memory(error: Exception) -> bool:
    """Returns whether an error says so: Python's, or one of the many of JAX."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("RESOURCE_EXHAUSTED", "ut of memory"))


def use_cache() -> None:
    """Keeps compiled functions in JAX_COMPILATION_CACHE_DIR, by default ~/.cache/jax-icrl.

    JAX_ENABLE_COMPILATION_CACHE=0 turns that off. Without a home directory nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        with contextlib.suppress(RuntimeError):  # there is no home directory
            jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jax-icrl"))


def parse_flags(config_class: type, description: str = "", args: list[str] | None = None,
                defaults: tuple[Any, Options] | None = None) -> tuple[Any, Options]:
    """Returns (Config, Options) from one list of flags, by default those of the command line."""
    config, options = defaults or (config_class(), Options())

    def flags(algorithm: config_class = config, run: Options = options):
        return algorithm, run

    return tyro.cli(flags, args=args, description=description, config=(tyro.conf.OmitArgPrefixes,))


def resumed_folder(args: list[str]) -> str:
    """Returns the last value of --resume, "" without the flag. ValueError if it is blank."""
    folder = ""
    for flag, following in zip(args, [*args[1:], ""]):
        name, equals, value = flag.partition("=")
        if name == "--resume":
            folder = (value if equals else following).strip()
            if not folder:
                raise ValueError("--resume needs a run folder")
    return folder


def parse_resumed(config_class: type, folder: str, description: str = "",
                  args: list[str] | None = None) -> tuple[Any, Options]:
    """Returns (Config, Options) of a run folder; --total-timesteps may differ from the folder's.

    With the folder's settings as defaults, what differs after parsing was given as a flag.
    """
    config, options = read_run(folder, config_class)
    defaults = (config, dataclasses.replace(options, sweep=()))  # else --sweep would add to it
    given, given_options = parse_flags(config_class, description, args, defaults)
    found = {**vars(given), **vars(given_options)}
    before = {**vars(config), **vars(options)}
    differ = [name for name, value in found.items() if value != before[name]
              and name not in ("total_timesteps", "resume") and (name, value) != ("sweep", ())]
    if differ:
        flags = ", ".join(flag_of(name, before[name]) for name in differ)
        raise ValueError(f"{folder} was started with {flags}; beside --resume only "
                         "--total-timesteps can change: leave other flags out, or start a new run")
    return dataclasses.replace(config, total_timesteps=given.total_timesteps), options


def flag_of(name: str, value: Any) -> str:
    """Returns a setting as it is written on a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if value in ("", ()):
        return f"no --{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


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

    Ctrl-C and SIGTERM end the run after a checkpoint, or at once before training and when repeated.

    Args:
      make_train: the trainer's. Every process calls `run`; process 0 writes the folder.
      config, options: of a resumed run as returned by read_run; its total_timesteps may be changed.

    Returns:
      The run folder.

    Raises:
      ValueError: invalid flags, run folder or checkpoint, in one sentence.
      FloatingPointError: most gradient steps of every agent were not finite.
      KeyboardInterrupt, SystemExit: after Ctrl-C and SIGTERM.
    """
    begin = time.perf_counter()
    check(config, options)
    agents = agents_of(config, options)
    mesh = devices.make_mesh(config, len(agents), options.devices)
    options = dataclasses.replace(options, devices=mesh.size)
    digest = zlib.crc32(repr((config, options)).encode()) // 2  # of 31 bits
    if devices.highest(digest, -digest) != [digest, -digest]:
        raise ValueError("the processes were started with different flags: give all the same")
    with contextlib.ExitStack() as stack:
        folder = on_first(open_folder, config, options)
        this = Run(config, options, Path(devices.from_first(str(folder))))
        on_first(lambda: stack.enter_context(locked(this.folder)))
        signals = stack.enter_context(Signals(this))
        try:
            wandb = on_first(lambda: options.wandb and stack.enter_context(start_wandb(this)))
            say(f"{this.folder}: {len(agents)} x {config.num_updates * config.steps_per_update:,} steps of "
                f"{', '.join(config.env)} on {mesh.size} {jax.default_backend()}")
            update, runner, chunk = prepare(make_train, this, mesh)
        except (Exception, SystemExit):
            if devices.is_first() and not options.resume:
                discard(this.folder)
            raise
        size = sum(x.size for x in jax.tree.leaves(runner.params)) // len(agents)
        say(f"{size:,} parameters; ready in {time.perf_counter() - begin:.1f} s")
        try:
            logs = Logs(this, update, wandb) if devices.is_first() else contextlib.nullcontext()
            with logs:
                train_to_the_end(this, chunk, update, runner, logs, signals)
            if devices.is_first():
                summarise(this)
        except OSError as error:  # such as a full disk
            raise ValueError(f"{error}; mend that, then {signals.advice}") from None
    say(f"{time.perf_counter() - begin:.0f} s; everything is in {this.folder}")
    return this.folder


def on_first(function: Callable, *args: Any) -> Any:
    """Returns function(*args) in process 0, None in the others. Every process calls this.

    ValueError in all processes if the function raised one, or an OSError.
    """
    result, problem = None, ""
    try:
        result = function(*args) if devices.is_first() else None
    except (ValueError, OSError) as error:
        problem = str(error)[:1000]
    if problem := devices.from_first(problem):
        raise ValueError(problem)
    return result


def say(sentence: str) -> None:
    """Prints a sentence, at once, in process 0."""
    if devices.is_first():
        print(sentence, flush=True)


def check(config: Any, options: Options) -> None:
    """ValueError if a run with a folder cannot have these settings, whatever the trainer."""
    if not all(isinstance(env, str) for env in config.env):
        raise ValueError("a run folder needs environments by name, such as --env module:Name; "
                         "make_train takes the objects themselves")
    tasks = [env.removeprefix("dmc:").removeprefix("gymnax:") for env in config.env]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"a task is given twice: --env {' '.join(config.env)}")
    for name, value in vars(config).items():
        check_finite(name, value)
    if options.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs the wandb package: pip install wandb")


def prepare(make_train: Callable, this: Run, mesh: Any) -> tuple[int, Any, Callable]:
    """Returns (updates done, runner, compiled function).

    Everything is compiled in other threads, because this one handles signals.
    """
    try:
        program = devices.make_program(make_train, this.config, mesh, len(agents_of(*this[:2])))
    except (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError) as error:
        if not getattr(this.config, "env_kwargs", ()):
            raise
        raise ValueError(f"--env-kwargs {' '.join(this.config.env_kwargs)} do not fit the environment: "
                         f"{str(error) or type(error).__name__}") from None
    say("compiling, which takes about a minute")
    with ThreadPoolExecutor() as pool:
        compiling = pool.submit(program.compile)
        update, runner = pool.submit(first_runner, this, program).result()
        return update, runner, compiling.result()


def first_runner(this: Run, program: devices.Program) -> tuple[int, Any]:
    """Returns (updates done, runner): new, or of the newest checkpoint."""
    written = [this.folder / name for name in ("metrics.csv", "agent.msgpack")]
    begun = saved(this.folder) or any(path.exists() and path.stat().st_size for path in written)
    if this.options.resume and begun:
        update, runner = restore(this, program.shapes)
        if update != devices.from_first(update):
            raise ValueError("the processes found different checkpoints: is the folder shared?")
        if update > this.config.num_updates:
            raise ValueError(f"{this.folder} has {update * this.config.steps_per_update:,} steps already, "
                             f"more than --total-timesteps {this.config.total_timesteps:,}")
        on_first(update_config, this)
        return update, runner
    agents = agents_of(this.config, this.options)  # also if a kill came before the first checkpoint
    keys = jnp.stack([jax.random.PRNGKey(seed) for _, seed in agents])
    hyper = {name: jnp.array([setting[name] for setting, _ in agents], jnp.float32)
             for name in agents[0][0]}
    return 0, program.init(keys, hyper)


def train_to_the_end(this: Run, chunk: Callable, update: int, runner: Any, logs: Any,
                     signals: Any) -> None:
    """Calls the compiled function until training ends; logs its metrics and saves its runners."""
    def call(runner):
        runner, metrics = chunk(runner)
        return runner, jax.device_get(metrics)

    save(this, update, runner)  # there is no row without a checkpoint before it
    signals.can_wait = True
    last_save = time.perf_counter()
    failed = False
    while update < this.config.num_updates:
        start = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:  # this thread handles signals meanwhile
            runner, metrics = pool.submit(call, runner).result()
        update += this.config.log_every
        if devices.is_first():
            logs.add(update, metrics, time.perf_counter() - start)
        failed |= failed_in(metrics["skipped"])
        if failed.all():
            raise FloatingPointError(f"{metrics['skipped'].mean():.0%} of the gradient steps were "
                                     "not finite and were skipped: lower --lr")
        due = time.perf_counter() - last_save > 60 * this.options.checkpoint_minutes
        due, received = devices.highest(due, signals.received)  # the same in all processes
        if due or received or update >= this.config.num_updates:
            save(this, update, runner)
            last_save = time.perf_counter()
        if received:
            signals.end(received)
    signals.can_wait = False


class Signals:
    """Ctrl-C and SIGTERM while a run trains. Its advice says how to go on.

    While the run `can_wait`, the first signal is only kept in `received`, for the run to save and
    then to `end`. Any other signal ends the process at once.
    """

    def __init__(self, this: Run):
        script = Path(inspect.getfile(type(this.config))).name
        if Path(sys.argv[0]).name == script:
            script = sys.argv[0]  # as it was called, perhaps from another folder
        self.advice = f"go on with: python {script} --resume {shlex.quote(str(this.folder))}"
        self.received, self.can_wait = 0, False

    def __enter__(self):
        """Handles both from now on, in the main thread; not one that the starting shell ignores."""
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM)
                   if threading.current_thread() is threading.main_thread()
                   and signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.handle) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and devices.is_first():
            print(f"saved; {self.advice}", file=sys.stderr, flush=True)

    def handle(self, number, _):
        first = self.can_wait and not self.received
        self.received = int(number)  # before the text, during which the second signal may come
        text = ("a checkpoint follows; a second signal ends at once" if first else self.advice)
        os.write(2, f"\ninterrupted; {text}\n".encode())  # print may be busy
        if not first:
            os._exit(128 + number)

    def end(self, number):
        """Ends the run because some process received this signal."""
        self.received = number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
