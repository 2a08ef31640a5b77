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
import csv
import dataclasses
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Callable, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.special import stdtrit
from tqdm import tqdm

import devices


@dataclasses.dataclass(frozen=True)
class Options:
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ... train side by side in one compiled function
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=V1,V2,...; every combination of all sweeps trains with every seed in one function"""
    devices: int = 0  # number of devices (0: all that can be used; on a CPU each core is a device)
    out: str = ""  # run folder (default: runs/TRAINER-TASK-DATE)
    resume: str = ""  # run folder to continue; its config.json replaces all other flags
    checkpoint_minutes: float = 5.0  # between two checkpoints; one is always written at the end
    wandb: str = ""  # Weights & Biases project (needs wandb)
    evaluate: bool = True  # evaluate the agents at the end (not after a sweep)

    def __post_init__(self):
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {self.num_seeds}")
        for name in ("seed", "devices", "checkpoint_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class Run(NamedTuple):
    config: Any  # the trainer's Config
    options: Options
    folder: Path


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


# ---- Agents: settings x seeds --------------------------------------------------------------------
def settings_of(config: Any, options: Options) -> list[dict[str, float]]:
    """Returns the sweep's settings {name: value}; [{}] without one. ValueError if invalid."""
    axes = {}
    for text in options.sweep:
        name, _, values = text.partition("=")
        if name not in config.SWEEPABLE:
            known = ": it changes the program, so each value needs a run of its own"
            raise ValueError(f"cannot sweep {name!r} in one compiled function"
                             f"{known if hasattr(config, name) else ''}. "
                             f"Sweepable: {', '.join(config.SWEEPABLE)}")
        try:
            axes[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--sweep {text!r}: expected NAME=V1,V2,... with numbers") from None
        for value in axes[name]:
            dataclasses.replace(config, **{name: value})  # validates the value
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def agents_of(config: Any, options: Options) -> list[tuple[dict[str, float], int]]:
    """Returns (setting, seed) of every agent, settings outermost."""
    seeds = range(options.seed, options.seed + options.num_seeds)
    return list(itertools.product(settings_of(config, options), seeds))


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


# ---- The run folder ------------------------------------------------------------------------------
def open_folder(config: Any, options: Options) -> Path:
    """Returns the run folder, a new one with config.json. Every process calls this."""
    if options.resume or not devices.is_first():
        return Path(devices.from_first(options.resume))
    if not all(isinstance(env, str) for env in config.env):
        raise ValueError("a run folder needs environments by name, such as --env module:Name; "
                         "make_train takes the objects themselves")
    trainer = trainer_of(type(config))
    task = config.env[0].replace(":", "-") if len(config.env) == 1 else f"{len(config.env)}tasks"
    name = f"{trainer.removeprefix('train_')}-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(options.out or Path("runs", name))
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} exists already: choose another --out, or --resume {folder}")
    parts = {"config": dataclasses.asdict(config), "options": dataclasses.asdict(options)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"trainer": trainer} | parts, indent=1)
        write_whole(folder / "config.json", f"{text}\n".encode())
    except OSError as error:
        raise ValueError(f"cannot write the run folder {folder} ({error.strerror}): choose an "
                         "--out that exists or can be made") from None
    return Path(devices.from_first(str(folder)))


def read_run(folder: Path | str, config_class: type | None = None) -> tuple[Any, Options]:
    """Returns the (Config, Options) of a run folder; options.resume is the folder.

    Args:
      folder: of a run.
      config_class: the trainer's Config; by default that of the trainer named in the folder.

    Raises:
      ValueError: one sentence, if it is no run folder, or one of another trainer or version.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text())
        trainer = values["trainer"]
        fields = ({**values["config"]}, {**values["options"]})
    except OSError:
        raise ValueError(f"{folder} is not a run folder: no config.json can be read") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} was not written by this version of a trainer") from None
    kinds = (config_class or import_trainer(trainer).Config, Options)
    own = trainer_of(kinds[0])
    if trainer != own:
        raise ValueError(f"{folder} was written by {trainer}.py and cannot be read by {own}.py")
    for kind, part in zip(kinds, fields):
        differ = {field.name for field in dataclasses.fields(kind)} ^ set(part)
        if differ:
            raise ValueError(f"{path} does not fit {own}.py: settings were added or removed "
                             f"({', '.join(sorted(differ))}); train again")
    try:
        config, options = (kind(**with_tuples(part)) for kind, part in zip(kinds, fields))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit {own}.py: {error}") from None
    return config, dataclasses.replace(options, resume=str(folder))


def trainer_of(config_class: type) -> str:
    """Returns the name of the trainer, without .py, that defines a Config."""
    return Path(inspect.getfile(config_class)).stem


def import_trainer(name: str) -> Any:
    """Returns the module of a trainer that is beside this file or in its folder examples/."""
    for folder in (Path(__file__).parent, Path(__file__).parent / "examples"):
        if (folder / f"{name}.py").is_file():
            sys.path.append(str(folder))
            return importlib.import_module(name)
    raise ValueError(f"the trainer {name}.py is not here")


def with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns fields of a dataclass as they were before JSON made lists of tuples."""
    return {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file as a whole: a kill at any moment leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---- Checkpoints ---------------------------------------------------------------------------------
LOGS = ("metrics.csv", "timing.csv")


def saved(folder: Path) -> list[Path]:
    """Returns the checkpoints of a run folder, newest first."""
    return sorted(folder.glob("checkpoints/*.npz"), key=lambda path: -int(path.stem))


def save(this: Run, update: int, runner: Any) -> None:
    """Writes agent.msgpack and a checkpoint, and keeps the newest two. Every process calls this."""
    runner = devices.gather(runner)
    if not devices.is_first():
        return
    agents = agents_of(this.config, this.options)
    agent = {"trainer": trainer_of(type(this.config)),
             "config": json.loads(json.dumps(dataclasses.asdict(this.config))),  # lists for tuples
             "members": [{"seed": seed, "setting": setting} for setting, seed in agents],
             "update": update,
             "params": flax.serialization.to_state_dict(runner.params),
             "norm": flax.serialization.to_state_dict(runner.norm)}
    write_whole(this.folder / "agent.msgpack", flax.serialization.msgpack_serialize(agent))
    sizes = [(this.folder / name).stat().st_size for name in LOGS]  # to drop later rows on resume
    data = io.BytesIO()
    np.savez(data, *jax.tree.leaves(runner), logs=sizes)
    (this.folder / "checkpoints").mkdir(exist_ok=True)
    write_whole(this.folder / "checkpoints" / f"{update}.npz", data.getvalue())
    for path in saved(this.folder)[2:]:
        path.unlink()


def restore(folder: Path, shapes: Any) -> tuple[int, Any]:
    """Returns (updates done, runner) of the newest whole checkpoint; drops later rows of the logs.

    shapes: of the runner, jax.ShapeDtypeStruct with shardings. ValueError if no checkpoint fits.
    """
    likes, tree = jax.tree.flatten(shapes)
    problems = []
    for path in saved(folder):
        try:
            with np.load(path) as file:
                sizes = file["logs"]
                leaves = [file[f"arr_{i}"] for i in range(len(likes))]
            if [(x.shape, x.dtype) for x in leaves] != [(x.shape, x.dtype) for x in likes]:
                raise ValueError("it has other shapes")
        except Exception as error:  # of many kinds; an older checkpoint may be whole
            problems.append(f"{path.name}: {error}")
            print(f"{path} cannot be read, trying the one before", file=sys.stderr)
            continue
        leaves = [jax.make_array_from_callback(x.shape, like.sharding, lambda index, x=x: x[index])
                  for x, like in zip(leaves, likes)]
        if devices.is_first():
            for name, size in zip(LOGS, sizes):
                os.truncate(folder / name, size)
        return int(path.stem), jax.tree.unflatten(tree, leaves)
    problems = "; ".join(problems) or "none was written"
    raise ValueError(f"no usable checkpoint in {folder}: {problems}")


def read_agent(path: Path | str) -> dict[str, Any]:
    """Returns the contents of agent.msgpack, A agents with what they were trained with.

    Args:
      path: of the file, or of the run folder that holds it.

    Returns:
      "trainer": its name, without .py. "config": {field: value}. "update": updates done.
      "members": {"seed", "setting": {name: value}} of each agent. "params", "norm": parameters and
      statistics of observations, nested dictionaries of NumPy arrays (A, ...), to which
      flax.serialization.from_state_dict gives back their types.

    Raises:
      ValueError: one sentence, if there is no such file, or one of another version.
    """
    path = Path(path) / "agent.msgpack" if Path(path).is_dir() else Path(path)
    try:
        agent = flax.serialization.msgpack_restore(path.read_bytes())
        return agent | {"config": with_tuples(agent["config"])}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except Exception:  # msgpack raises many kinds
        raise ValueError(f"{path} was not written by this version of a trainer") from None


# ---- Logs ----------------------------------------------------------------------------------------
class Logs(contextlib.ExitStack):
    """metrics.csv, timing.csv, TensorBoard, wandb and progress bar of a run from `update` on."""

    def __init__(self, this: Run, update: int):
        super().__init__()
        from tensorboardX import SummaryWriter
        self.this, self.begin = this, time.perf_counter()
        mode = "a" if update else "w"
        self.files = [
            self.enter_context((this.folder / name).open(mode, newline="")) for name in LOGS]
        self.board = self.enter_context(SummaryWriter(str(this.folder / "tensorboard")))
        self.wandb = None
        if this.options.wandb:
            import wandb
            settings = dataclasses.asdict(this.config) | dataclasses.asdict(this.options)
            self.wandb = self.enter_context(
                wandb.init(project=this.options.wandb, name=this.folder.name, config=settings))
        steps = this.config.steps_per_update
        self.bar = self.enter_context(tqdm(total=this.config.num_updates * steps,
                                           initial=update * steps, unit="step", unit_scale=True))

    def add(self, update: int, metrics: dict[str, np.ndarray], seconds: float) -> None:
        """Logs one call, which ended at `update`: metrics (A, log_every, ...), its duration."""
        config = self.this.config
        rows = metric_rows(config, self.this.options, update - config.log_every, metrics)
        steps = config.log_every * config.steps_per_update
        timing = {"update": update, "steps": update * config.steps_per_update,
                  "seconds": time.perf_counter() - self.begin,
                  "sps": len(metrics["skipped"]) * steps / seconds}
        for file, lines in zip(self.files, (rows, [timing])):
            write_rows(file, lines)
        means = {name: nanmean([row[name] for row in rows]) for name in rows[0]}
        scalars = {name: x for name, x in (means | timing).items()
                   if not name.startswith("curve/") and not math.isnan(x)}
        for name, x in scalars.items():
            self.board.add_scalar(name, x, timing["steps"])
        if self.wandb:
            self.wandb.log(scalars, step=timing["steps"])
        self.bar.update(steps)
        self.bar.set_postfix_str(
            " ".join(f"{task.split(':')[-1]} {means[f'return/{task}']:.4g}" for task in config.env))


def metric_rows(config: Any, options: Options, update: int, metrics: dict) -> list[dict[str, Any]]:
    """Returns metrics (A, updates, ...) of the updates after `update` as rows of metrics.csv.

    A metric by task has a column NAME/TASK for each, one by task and bin NAME/TASK/BIN.
    """
    columns = {}
    for name, x in metrics.items():
        for index in np.ndindex(x.shape[2:]):
            place = [config.env[index[0]], *map(str, index[1:])] if index else []
            columns["/".join([name, *place])] = x[..., *index]
    rows = []
    for i, (agent, (setting, seed)) in itertools.product(
            range(config.log_every), enumerate(agents_of(config, options))):
        number = update + i + 1
        row = {"update": number, "steps": number * config.steps_per_update, "seed": seed}
        rows.append(row | setting | {name: float(x[agent, i]) for name, x in columns.items()})
    return rows


def write_rows(file: Any, rows: list[dict]) -> None:
    """Adds rows to a CSV file: six digits of a float, nothing for NaN."""
    writer = csv.writer(file)
    if file.tell() == 0:
        writer.writerow(rows[0])
    for row in rows:
        writer.writerow([("" if math.isnan(x) else f"{x:.6g}") if isinstance(x, float) else x
                         for x in row.values()])
    file.flush()
    os.fsync(file.fileno())


# ---- Results of a run ----------------------------------------------------------------------------
def read_metrics(folder: Path | str) -> list[dict[str, float]]:
    """Returns the rows of metrics.csv, NaN where a cell is empty."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [{name: float(x or "nan") for name, x in row.items()} for row in rows]


def training_returns(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """Returns (updates, A, tasks): mean return of the episodes that ended, NaN if none did."""
    returns = [[row[f"return/{task}"] for task in config.env] for row in read_metrics(folder)]
    return np.array(returns).reshape(-1, len(agents_of(config, options)), len(config.env))


def final_scores(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """Returns (A, tasks): mean return over the last tenth of training."""
    returns = training_returns(config, options, folder)
    return nanmean(returns[-max(1, len(returns) // 10):], 0)


def nanmean(x: Any, axis: int | None = None) -> np.ndarray:
    """Returns np.nanmean(x, axis), without its warning where there is nothing to average."""
    x = np.asarray(x, float)
    with np.errstate(invalid="ignore"):
        return np.nansum(x, axis) / (~np.isnan(x)).sum(axis)


def t_interval(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns mean, low and high (...) of the mean's 95 % t interval, from independent x (n, ...).

    NaNs are left out. All three are NaN without a value, low and high also where no two differ.
    """
    valid = ~np.isnan(x)
    n = valid.sum(0)
    differ = np.where(valid, x, -np.inf).max(0) > np.where(valid, x, np.inf).min(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(valid, x, 0.0).sum(0) / n
        variance = np.where(valid, (x - mean) ** 2, 0.0).sum(0) / (n - 1)
        half = np.where(differ, stdtrit(n - 1, 0.975) * np.sqrt(variance / n), np.nan)
    return mean, mean - half, mean + half


def summarise(this: Run) -> None:
    """Writes the figures of a finished run and prints its returns."""
    config, scores = this.config, final_scores(*this)
    plot_training(this)
    for task, score in zip(config.env, scores.mean(0)):
        print(f"  {task:24s} return {score:8.2f}  (mean over the last tenth of training)")
    if this.options.sweep:
        write_sweep(this, scores.mean(1))


def panels(lines: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """Returns a figure and its axes (lines, columns), each width x height inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(width * columns, height * lines), dpi=150, layout="constrained")
        return figure, figure.subplots(lines, columns, squeeze=False)


def plot_training(this: Run) -> None:
    """Writes returns.png: return of each task against steps, mean and range over the agents."""
    tasks, returns = this.config.env, training_returns(*this)
    window = max(1, len(returns) // 50)
    windows = len(returns) // window
    returns = nanmean(returns[:windows * window].reshape(windows, window, *returns.shape[1:]), 1)
    steps = this.config.steps_per_update * window * (np.arange(windows) + 0.5) / 1e6
    figure, axes = panels(math.ceil(len(tasks) / 3), min(3, len(tasks)), 3.4, 2.6)
    for axis in axes.flat[len(tasks):]:
        axis.remove()
    for axis, task, y in zip(axes.flat, tasks, np.moveaxis(returns, -1, 0)):  # y: (windows, A)
        axis.plot(steps, nanmean(y, 1))
        axis.fill_between(steps, np.fmin.reduce(y, 1), np.fmax.reduce(y, 1), alpha=0.25, lw=0)
        axis.set(title=task, xlabel="million steps", ylabel="episode return")
    figure.savefig(this.folder / "returns.png")


def write_sweep(this: Run, scores: np.ndarray) -> None:
    """Ranks the settings by scores (A,): prints them, writes sweep.csv and sweep.png."""
    settings, seeds = settings_of(this.config, this.options), this.options.num_seeds
    mean, low, high = t_interval(scores.reshape(len(settings), seeds).T)
    order = np.argsort(-np.nan_to_num(mean, nan=-np.inf))
    rows = [settings[i] | {"return": mean[i], "low": low[i], "high": high[i], "seeds": seeds}
            for i in order]
    with (this.folder / "sweep.csv").open("w", newline="") as file:
        write_rows(file, rows)
    labels = [", ".join(f"{name}={x:g}" for name, x in settings[i].items()) for i in order]
    print("\nsettings, best first:")
    for label, row in zip(labels, rows):
        print(f"  {label:40s} {row['return']:9.2f}  [{row['low']:.2f}, {row['high']:.2f}]")
    figure, [[axis]] = panels(1, 1, 7, 1 + 0.35 * len(rows))
    axis.errorbar(mean[order], labels, xerr=np.nan_to_num((high - mean)[order]), fmt="o", capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel(f"return over the last tenth of training, 95 % t interval over {seeds} seeds")
    figure.savefig(this.folder / "sweep.png")
