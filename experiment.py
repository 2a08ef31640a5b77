"""A training run and its folder: seeds, sweeps, devices, logs, checkpoints, resume, plots, command line.

The trainers hand their algorithm over and get all of this:

    experiment.main(Config, make_train, __doc__)                     # what `python train_s5.py` does
    folder = experiment.run(make_train, Config(), Options(num_seeds=4))

    config, options = experiment.read_run("runs/NAME", Config)       # of a run folder; then, to go on with it:
    experiment.run(make_train, config, options)

A run is a number of members, every setting of the sweep with every seed, that train in one compiled function on all
devices of all processes, `log_every` updates at a call. Between two calls process 0 adds to the folder:

    config.json      trainer, Config, Options
    metrics.csv      a row per update and member, without wall-clock values: a resumed run writes the same bytes
    timing.csv       a row per call: seconds since the (re)start, environment steps per second of all members
    checkpoints/     the newest two, of all members
    tensorboard/     event files
    returns.png      at the end; of a sweep also sweep.csv and sweep.png

What is needed of a trainer: a frozen dataclass Config with the fields env, num_envs, log_every and SWEEPABLE (names of
the fields whose values may be traced) and the properties num_updates and steps_per_update; make_train(Config, shards)
-> train with init(key, hyper) -> runner and update(runner) -> (runner, metrics), pure, metrics shaped (), (tasks,) or
(tasks, n), the same on all of the devices that share num_envs, `shards` of them.
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
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Callable, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import report


@dataclasses.dataclass(frozen=True)
class Processes:
    coordinator: str = ""  # HOST:PORT of process 0, to train in several processes: the same command on every host
    num_processes: int = 1  # how many they are; all see one file system
    process_id: int = 0  # which of them this is

    def __post_init__(self):
        if self.num_processes > 1 and not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"several processes need --coordinator HOST:PORT, got {self.coordinator!r}")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"process_id must be from 0 to {self.num_processes - 1}, got {self.process_id}")


@dataclasses.dataclass(frozen=True)
class Options:
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ... trained side by side in one compiled function
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=V1,V2,...; may be given several times: every combination times every seed in one compiled function"""
    sweep_chunk: int = 0  # run the sweep in equal parts of so many settings x seeds (0: all at once)
    devices: int = 0  # of all processes together (0: all that can be used; of a CPU every core is one)
    preset: Literal["cpu", "accelerator"] = dataclasses.field(
        default_factory=lambda: "cpu" if jax.default_backend() == "cpu" else "accelerator")
    """decides on the default sizes; its own default is this machine's"""
    name: str = ""  # run folder under runs_dir (default: made from the trainer, the task and the date)
    runs_dir: str = "runs"  # where run folders are made
    resume: str = ""  # run folder to continue; its config.json replaces all other flags
    checkpoint_minutes: float = 5.0  # between two checkpoints; one is always written at the end
    tensorboard: bool = True  # write TensorBoard event files
    wandb: str = ""  # Weights & Biases project (needs wandb)
    evaluate: bool = True  # test on fresh projections and held-out tasks at the end (not after a sweep)

    def __post_init__(self):
        if self.num_seeds < 1:
            raise ValueError(f"num_seeds must be at least 1, got {self.num_seeds}")
        for name in ("seed", "sweep_chunk", "devices", "checkpoint_minutes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.name in (".", "..") or re.search(r"[/\\\0]", self.name):
            raise ValueError(f"name must be that of one folder under runs_dir, without / or \\, got {self.name!r}")


# ---- Command line ------------------------------------------------------------------------------------------
def preset(config_class: type, name: str, **changes: Any) -> Any:
    """Config with the defaults of `name`, "cpu" or "accelerator". Config() has those of the machine it runs on."""
    sizes = {field.name: field.metadata[name] for field in dataclasses.fields(config_class) if field.metadata}
    return config_class(**(sizes | changes))


def parse_flags(config_class: type, description: str = "", args: list[str] | None = None) -> tuple[Any, Options]:
    """Config and Options from one flat list of flags (default: the command line's). ValueError: one sentence."""
    args = sys.argv[1:] if args is None else args
    chosen = re.search(r"--preset[ =](cpu|accelerator)\b", " ".join(args))  # decides on the other flags' defaults
    options = Options(preset=chosen[1]) if chosen else Options()

    def flags(algorithm: config_class = preset(config_class, options.preset), run: Options = options,
              processes: Processes = Processes()):
        return algorithm, run

    return one_sentence(tyro.cli, flags, args=args, description=description, config=(tyro.conf.OmitArgPrefixes,))


def one_sentence(cli: Callable, *args: Any, **kwargs: Any) -> Any:
    """tyro.cli, its errors as ValueError."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return cli(*args, **kwargs)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box: a title, the sentence, a rule, the flag's help
        lines = [line.strip("│ ") for line in printed.getvalue().splitlines()[1:]]
        sentence = " ".join(itertools.takewhile(lambda line: not line.startswith(("─", "╰")), lines))
        raise ValueError(re.sub(r"^Error parsing (algorithm: |run: |processes: )?", "", sentence)) from None


def main(config_class: type, make_train: Callable, description: str) -> None:
    """What `python train_*.py` does: parse the command line, train, evaluate. Errors are one sentence, status 2."""
    jax.config.update("jax_compilation_cache_dir", os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax-icrl")))
    try:
        config, options = parse_flags(config_class, description)
        if options.resume:
            config, options = read_run(options.resume, config_class)
        folder = run(make_train, config, options)
        if options.evaluate and not options.sweep and jax.process_index() == 0:
            if jax.process_count() > 1:
                print(f"evaluation is for one process: python evaluate.py {folder}")
            elif importlib.util.find_spec("evaluate"):
                import evaluate
                evaluate.evaluate([folder])
            else:
                print("evaluate.py is not here: evaluation left out")
    except (ValueError, FloatingPointError) as error:
        stop(2, f"error: {error}")
    except KeyboardInterrupt:
        stop(130)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            stop(2, "error: out of memory; lower --num-envs, --num-seeds or --width, or set --sweep-chunk")
        if jax.process_count() == 1:
            raise
        stop(1, f"error: another process is gone; go on with --resume in all of them ({str(error).splitlines()[0]})")


def stop(code: int, sentence: str = "") -> None:
    """Exit. One of several processes does not wait for the others, as JAX would: they may be waiting for this one."""
    if sentence:
        print(sentence, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


# ---- Devices and processes ---------------------------------------------------------------------------------
def start_devices() -> None:
    """Before JAX is used: make every core of the CPU a device and find the other processes of the command line."""
    if jax.config.jax_num_cpu_devices < 0 and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", num_cores())
    try:
        join(one_sentence(tyro.cli, Processes, return_unknown_args=True, add_help=False)[0])
    except ValueError as error:
        stop(2, f"error: {error}")


def join(processes: Processes, patience: float = 60.0) -> None:
    """Find the other processes. ValueError: the coordinator has not answered for `patience` seconds."""
    if processes.num_processes == 1:
        return
    host, _, port = processes.coordinator.rpartition(":")
    deadline = time.monotonic() + patience
    while processes.process_id > 0:  # JAX's own attempt ends in an abort
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError(f"no answer from the coordinator, {processes.coordinator} ({error})") from None
            time.sleep(0.5)
    # one that is gone takes the others down after so many seconds without a heartbeat
    jax.distributed.initialize(processes.coordinator, processes.num_processes, processes.process_id,
                               heartbeat_timeout_seconds=30)


def num_cores() -> int:
    """Physical cores that this process may use: hyperthreads of a core share its vector units."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in usable]
    return len({path.read_text() if path.exists() else path for path in siblings})


def mesh_shape(config: Any, options: Options, existing: int, processes: int = 1) -> tuple[int, int]:
    """How many devices members are split over, and how many share the environments of each: as many as possible.

    Args:
      existing: devices of all processes, of which each gives as many.

    Raises:
      ValueError: options.devices do not exist or cannot be used.
    """
    def can_share(shards):
        with contextlib.suppress(ValueError):
            return dataclasses.replace(config, num_envs=config.num_envs // shards).num_envs * shards == config.num_envs

    if options.devices > existing:
        raise ValueError(f"devices={options.devices}, but there are {existing}; a run is resumed on as many as before")
    count, size = options.devices or existing, len(groups_of(config, options)[0])
    shapes = [(members, shards) for members in range(1, count + 1) if size % members == 0
              for shards in range(1, count // members + 1) if members * shards % processes == 0 and can_share(shards)]
    shape = max(shapes, key=lambda shape: (math.prod(shape), shape), default=(0, 0))
    if math.prod(shape) == 0 or options.devices not in (0, math.prod(shape)):
        raise ValueError(f"devices={count} in {processes} processes do not fit {size} x num_envs={config.num_envs}: "
                         "num_envs must be divisible by devices x tasks x minibatches")
    return shape


def device_mesh(config: Any, options: Options) -> Mesh:
    """The devices to train on, with the axes member and data; ValueError as in mesh_shape."""
    processes = jax.process_count()
    shape = mesh_shape(config, options, jax.device_count(), processes)
    devices = [jax.local_devices(process)[:math.prod(shape) // processes] for process in range(processes)]
    return Mesh(np.array(devices).reshape(shape), ("member", "data"))


def runner_specs(make_train: Callable, config: Any, mesh: Mesh) -> Any:
    """How a stacked runner lies on the mesh, a PartitionSpec of every leaf: what grows with num_envs is shared."""
    whole, part = (
        jax.eval_shape(make_train(dataclasses.replace(config, num_envs=config.num_envs // shards)).init,
                       jax.random.PRNGKey(0)) for shards in (1, mesh.shape["data"]))
    return jax.tree.map(lambda a, b: PartitionSpec(
        "member", *("data" if m != n else None for m, n in zip(a.shape, b.shape))), whole, part)


# ---- Members: settings x seeds -----------------------------------------------------------------------------
def settings_of(config: Any, options: Options) -> list[dict[str, float]]:
    """The sweep's settings: {name: value}, every combination; [{}] without a sweep. ValueError if it cannot be."""
    axes = {}
    for text in options.sweep:
        name, _, values = text.partition("=")
        if name not in config.SWEEPABLE:
            known = name in {field.name for field in dataclasses.fields(config)}
            raise ValueError(f"cannot sweep {name!r} in one compiled function"
                             + (": it changes shapes or the program; run it as separate runs" if known else "")
                             + f". Sweepable: {', '.join(config.SWEEPABLE)}")
        try:
            axes[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--sweep {text!r}: expected NAME=V1,V2,... with numbers") from None
        for value in axes[name]:
            dataclasses.replace(config, **{name: value})  # validates the value
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def members_of(config: Any, options: Options) -> list[tuple[dict[str, float], int]]:
    """Every setting with every seed, settings outermost: (setting, seed)."""
    seeds = range(options.seed, options.seed + options.num_seeds)
    return list(itertools.product(settings_of(config, options), seeds))


def groups_of(config: Any, options: Options) -> list[list[tuple[dict[str, float], int]]]:
    """The members in equal parts of sweep_chunk, each a call of the compiled function; one part by default.

    Raises:
      ValueError: sweep_chunk does not divide the number of members.
    """
    members = members_of(config, options)
    size = options.sweep_chunk or len(members)
    if len(members) % size:
        raise ValueError(f"sweep_chunk={size} must divide settings x seeds = {len(members)}")
    return [members[start:start + size] for start in range(0, len(members), size)]


def over_members(function: Callable) -> Callable:
    """function over a leading axis of members: an accelerator runs them side by side, a CPU one after another.

    On a CPU, matrix products batched over members cost more than twice their own time.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function)
    return lambda *args: jax.lax.map(lambda one: function(*one), args)


def init_groups(init: Callable, config: Any, options: Options) -> list[Any]:
    """The stacked runners of every group of members, at the start of training; init: of one member."""
    groups = []
    for members in groups_of(config, options):
        keys = jnp.stack([jax.random.PRNGKey(seed) for _, seed in members])
        hyper = {name: jnp.array([setting[name] for setting, _ in members], jnp.float32) for name in members[0][0]}
        groups.append(init(keys, hyper))
    return groups


def compile_chunk(train: Any, updates: int, mesh: Mesh, specs: Any, shapes: Any) -> Callable:
    """The compiled function that runs so many updates of stacked runners of these shapes, which it takes over."""
    def chunk(runner):
        return jax.lax.scan(lambda r, _: train.update(r), runner, None, updates)

    mapped = jax.shard_map(over_members(chunk), mesh=mesh, in_specs=(specs,),
                           out_specs=(specs, PartitionSpec("member")), check_vma=False)
    everywhere = NamedSharding(mesh, PartitionSpec())  # every process reads all metrics
    jitted = jax.jit(mapped, donate_argnums=0, out_shardings=(None, everywhere))
    return jitted.lower(shapes).compile(compiler_options(mesh))


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """XLA's, for a program on this mesh: cores that are devices share no threads."""
    cores = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return {"xla_cpu_multi_thread_eigen": False} if cores else {}


# ---- The run folder ----------------------------------------------------------------------------------------
def new_run(config: Any, options: Options) -> Path:
    """Make the run folder and write config.json into it. ValueError when it cannot be."""
    trainer = Path(inspect.getfile(type(config))).stem
    task = config.env[0].replace(":", "-") if len(config.env) == 1 else f"{len(config.env)}tasks"
    name = options.name or f"{trainer.removeprefix('train_')}-{task}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(options.runs_dir) / name
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} exists already: choose another --name, or --resume {folder}")
    saved = {"trainer": trainer, "config": dataclasses.asdict(config), "options": dataclasses.asdict(options)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(saved, indent=1) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write the run folder {folder} ({error.strerror}): choose a --runs-dir that exists or "
                         "can be made") from None
    return folder


def read_run(folder: Path | str, config_class: type | None = None) -> tuple[Any, Options]:
    """What a run folder was made with: (Config, Options), whose `resume` is the folder.

    Args:
      folder: of a run.
      config_class: the trainer's Config; without it that of the trainer named in the folder, which is imported.

    Raises:
      ValueError: one sentence, if it is not a run folder, or one of another trainer or version.
    """
    path = Path(folder) / "config.json"
    try:
        saved = json.loads(path.read_text())
        trainer, parts = saved["trainer"], [{**saved["config"]}, saved.get("options")]
    except OSError:
        raise ValueError(f"{folder} is not a run folder: it holds no readable config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} was not written by a trainer of this project") from None
    if config_class is None:
        if not (Path(__file__).parent / f"{trainer}.py").is_file():
            raise ValueError(f"{folder} was written by {trainer}.py, which is not here")
        config_class = importlib.import_module(trainer).Config
    own = Path(inspect.getfile(config_class)).stem
    if trainer != own:
        raise ValueError(f"{folder} was written by {trainer}.py and cannot be read by {own}.py")
    if parts[1] is None:
        raise ValueError(f"{folder} was written before the flags were renamed (num_lanes became num_envs, ...) and can "
                         "only be read by the code of its time: train again")
    for kind, values in zip((config_class, Options), parts):
        names = {field.name for field in dataclasses.fields(kind)}
        unknown, missing = (", ".join(sorted(group)) for group in (set(values) - names, names - set(values)))
        if unknown or missing:
            raise ValueError(f"{path} does not fit {trainer}.py, which has other settings (unknown: "
                             f"{unknown or 'none'}; missing: {missing or 'none'}): train again")
    try:
        config, options = (
            kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
            for kind, values in zip((config_class, Options), parts))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit {trainer}.py: {error}") from None
    return config, dataclasses.replace(options, resume=str(folder))


def restore(manager: ocp.CheckpointManager, shapes: list[Any]) -> tuple[int, list[Any]]:
    """The newest readable checkpoint.

    Args:
      manager: of a run's folder checkpoints/.
      shapes: what init_groups makes, as jax.ShapeDtypeStruct with shardings.

    Returns:
      (number of updates done, groups).

    Raises:
      ValueError: there is none that fits.
    """
    problems = []
    for update in sorted(manager.all_steps(), reverse=True):
        try:
            return update, manager.restore(update, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # orbax raises many kinds; an older checkpoint may be whole
            problems.append(f"update {update}: {str(error).splitlines()[0]}")
            print(f"checkpoint of update {update} cannot be read, trying the one before", file=sys.stderr)
    raise ValueError(f"no usable checkpoint in {manager.directory}: {'; '.join(problems) or 'none was written'}")


def from_first(text: str) -> str:
    """The text that process 0 has."""
    return bytes(broadcast_one_to_all(np.frombuffer(text.encode().ljust(4096), np.uint8))).decode().rstrip()


def metric_rows(config: Any, options: Options, first_update: int, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The metrics of one call, arrays (members, updates, ...), as rows of metrics.csv, oldest first.

    A metric by task has a column NAME/TASK for each, one by task and bin NAME/TASK/BIN.
    """
    columns = {}
    for name, x in metrics.items():
        for index in np.ndindex(x.shape[2:]):
            place = [config.env[index[0]], *map(str, index[1:])] if index else []
            columns["/".join([name, *place])] = x[..., *index]
    rows = []
    for i, update in enumerate(range(first_update + 1, first_update + config.log_every + 1)):
        for member, (setting, seed) in enumerate(members_of(config, options)):
            row = {"update": update, "steps": update * config.steps_per_update, "seed": seed} | setting
            rows.append(row | {name: float(x[member, i]) for name, x in columns.items()})
    return rows


class Logs:
    """metrics.csv, timing.csv, TensorBoard and wandb of one run, from `update` on: later rows are dropped."""

    def __init__(self, config: Any, options: Options, folder: Path, update: int):
        self.folder, self.files, self.board, self.wandb = folder, {}, None, None
        for name in ("metrics", "timing"):
            keep_rows(folder / f"{name}.csv", update)
        if options.tensorboard:
            from tensorboardX import SummaryWriter
            self.board = SummaryWriter(str(folder / "tensorboard"))
        if options.wandb:
            import wandb
            settings = dataclasses.asdict(config) | dataclasses.asdict(options)
            self.wandb = wandb.init(project=options.wandb, name=folder.name, config=settings)

    def write(self, name: str, row: dict[str, Any]) -> None:
        """Add a row to NAME.csv."""
        if name not in self.files:
            self.files[name] = (self.folder / f"{name}.csv").open("a", newline="")
        writer = csv.DictWriter(self.files[name], list(row))
        if self.files[name].tell() == 0:
            writer.writeheader()
        writer.writerow({column: cell(value) for column, value in row.items()})

    def chunk(self, rows: list[dict[str, Any]], timing: dict[str, float]) -> dict[str, float]:
        """Log the rows of one call of the compiled function. Returns the mean of every column."""
        for row in rows:
            self.write("metrics", row)
        self.write("timing", timing)
        for file in self.files.values():
            file.flush()
        means = {column: nanmean([row[column] for row in rows]) for column in rows[0]}
        scalars = {column: value for column, value in (means | timing).items()
                   if not column.startswith("curve/") and not math.isnan(value)}
        if self.board:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, timing["steps"])
        if self.wandb:
            self.wandb.log(scalars, step=timing["steps"])
        return means

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def keep_rows(path: Path, update: int) -> None:
    """Drop the rows after `update` from a log. The file is replaced whole: a kill at any moment leaves old or new."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        header, *rows = csv.reader(file) if path.stat().st_size else [[]]
    # a kill may have cut the last row short: such rows are always later than the last checkpoint
    kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= update]
    if not kept:
        path.unlink()  # the header too may have been cut short
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def cell(value: Any) -> Any:
    """A value as it stands in a CSV file: six digits of a float, nothing for NaN."""
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"


def nanmean(x: Any, axis: int | None = None) -> np.ndarray:
    """np.nanmean without its warning where there is nothing to average."""
    x = np.asarray(x, float)
    with np.errstate(invalid="ignore"):
        return np.nansum(x, axis) / (~np.isnan(x)).sum(axis)


# ---- Training ----------------------------------------------------------------------------------------------
def run(make_train: Callable, config: Any, options: Options) -> Path:
    """Train, into a new run folder or, with options.resume, on from the newest checkpoint in that one.

    Every process calls this; process 0 writes the folder, but for the checkpoints, of which each writes its part.

    Args:
      make_train: the trainer's.
      config: the trainer's Config; of a resumed run as from read_run.
      options: likewise.

    Returns:
      The run folder.

    Raises:
      ValueError: one sentence about flags, folder or checkpoints that do not do.
      FloatingPointError: most gradient steps were not finite.
    """
    if options.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb needs the wandb package: pip install wandb")
    begin = time.perf_counter()
    members = members_of(config, options)
    mesh, first = device_mesh(config, options), jax.process_index() == 0
    options = dataclasses.replace(options, devices=mesh.size)
    train = make_train(config, mesh.shape["data"])
    folder = Path(from_first(options.resume or str(new_run(config, options) if first else "")))
    if first:  # now, for compiling takes half a minute, on a GPU two
        print(f"{folder}: {len(members)} x {config.total_timesteps:,} steps of {', '.join(config.env)} on "
              f"{mesh.size} {jax.devices()[0].platform}, preset {options.preset}", flush=True)
    specs = runner_specs(make_train, config, mesh)
    init = jax.jit(jax.shard_map(jax.vmap(train.init), mesh=mesh, in_specs=PartitionSpec("member"), out_specs=specs,
                                 check_vma=False))
    shapes = jax.tree.map(lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
                          jax.eval_shape(lambda: init_groups(init, config, options)[0]), specs)
    manager = ocp.CheckpointManager((folder / "checkpoints").absolute(),
                                    options=ocp.CheckpointManagerOptions(max_to_keep=2))
    update, saved, groups = 0, set(), None
    if options.resume and (manager.all_steps() or (folder / "metrics.csv").exists()):  # else killed before training
        update, groups = restore(manager, [shapes] * len(groups_of(config, options)))
        saved.add(update)
    with ThreadPoolExecutor() as pool:  # both compile, which takes nearly all of the time
        compiled = pool.submit(compile_chunk, train, config.log_every, mesh, specs, shapes)
        groups = groups or init_groups(init, config, options)
        chunk = compiled.result()
    weights = sum(x.size for x in jax.tree.leaves(groups[0].params)) // groups[0].key.shape[0]
    if first:
        print(f"{weights:,} parameters; ready in {time.perf_counter() - begin:.1f} s")

    logs = Logs(config, options, folder, update) if first else None
    per_update = config.steps_per_update
    bar = tqdm(total=config.num_updates * per_update, initial=update * per_update, unit="step", unit_scale=True,
               disable=not first)
    begin = last_save = time.perf_counter()

    def save():
        if update not in saved:
            if update in manager.all_steps():  # one that could not be read
                manager.delete(update)
            manager.save(update, args=ocp.args.StandardSave(groups))
            saved.add(update)

    try:
        save()
        manager.wait_until_finished()  # there is no row without a checkpoint before it
        while update < config.num_updates:
            start = time.perf_counter()
            results = [chunk(group) for group in groups]
            groups = [runners for runners, _ in results]
            metrics = jax.tree.map(lambda *x: np.concatenate(x), *jax.device_get([m for _, m in results]))
            seconds = time.perf_counter() - start
            update += config.log_every
            if first:
                means = logs.chunk(metric_rows(config, options, update - config.log_every, metrics), {
                    "update": update, "steps": update * per_update, "seconds": time.perf_counter() - begin,
                    "sps": len(members) * config.log_every * per_update / seconds})
                bar.update(config.log_every * per_update)
                bar.set_postfix_str(" ".join(f"{t.split(':')[-1]} {means[f'return/{t}']:.4g}" for t in config.env))
            skipped = metrics["skipped"].mean()
            if skipped > 0.5:
                raise FloatingPointError(f"{skipped:.0%} of the gradient steps were not finite and were skipped: "
                                         "lower --lr or --max-grad-norm")
            due = time.perf_counter() - last_save > 60 * options.checkpoint_minutes
            if broadcast_one_to_all(np.int32(due)):  # process 0 has the clock
                save()
                last_save = time.perf_counter()
        save()
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: python {Path(inspect.getfile(type(config))).name} --resume {folder}",
              file=sys.stderr)
        raise
    finally:
        bar.close()
        manager.wait_until_finished()
        manager.close()
        if first:
            logs.close()

    if not first:
        return folder
    plot_training(config, options, folder)
    for task, score in zip(config.env, final_scores(config, options, folder).mean(0)):
        print(f"  {task:24s} return {score:8.2f}  (mean over the last tenth of training)")
    if options.sweep:
        write_sweep(config, options, folder)
    print(f"{time.perf_counter() - begin:.0f} s; everything is in {folder}")
    return folder


# ---- What came of it ---------------------------------------------------------------------------------------
def read_metrics(folder: Path | str) -> list[dict[str, float]]:
    """The rows of metrics.csv, NaN where a cell is empty."""
    with (Path(folder) / "metrics.csv").open(newline="") as file:
        return [{column: float(value or "nan") for column, value in row.items()} for row in csv.DictReader(file)]


def training_returns(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """(updates, members, tasks): mean return of the episodes that ended, NaN if none did."""
    returns = [[row[f"return/{task}"] for task in config.env] for row in read_metrics(folder)]
    return np.array(returns).reshape(-1, len(members_of(config, options)), len(config.env))


def final_scores(config: Any, options: Options, folder: Path | str) -> np.ndarray:
    """(members, tasks): mean return over the last tenth of training."""
    returns = training_returns(config, options, folder)
    return nanmean(returns[-max(1, len(returns) // 10):], 0)


def plot_training(config: Any, options: Options, folder: Path) -> None:
    """returns.png: return of finished episodes per task against steps, mean and range over seeds and settings."""
    returns = training_returns(config, options, folder)
    steps = config.steps_per_update * np.arange(1, len(returns) + 1)
    columns, lines = min(3, len(config.env)), math.ceil(len(config.env) / 3)
    figure, axes = report.panels(lines, columns, figsize=(3.4 * columns, 2.6 * lines))
    window = max(1, len(steps) // 50)
    n = len(steps) // window * window
    x = steps[:n].reshape(-1, window).mean(1) / 1e6
    for axis in axes.flat[len(config.env):]:
        axis.remove()
    for axis, task, y in zip(axes.flat, config.env, np.moveaxis(returns, -1, 0)):
        y = nanmean(y[:n].reshape(len(x), window, -1), 1)  # (windows, members)
        axis.plot(x, nanmean(y, 1), color="C0")
        axis.fill_between(x, np.fmin.reduce(y, 1), np.fmax.reduce(y, 1), alpha=0.25, lw=0, color="C0")
        axis.set(title=task, xlabel="million steps", ylabel="episode return")
    report.save(figure, folder / "returns.png")


def write_sweep(config: Any, options: Options, folder: Path) -> None:
    """sweep.csv and sweep.png: the settings ranked by final return, mean and 95 % interval (t) over seeds."""
    settings, n = settings_of(config, options), options.num_seeds
    mean, low, high = report.t_interval(final_scores(config, options, folder).mean(1).reshape(len(settings), n).T)
    order = np.argsort(-np.nan_to_num(mean, nan=-np.inf))
    table = [settings[i] | {"return": mean[i], "low": low[i], "high": high[i], "seeds": n} for i in order]
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    labels = [", ".join(f"{name}={value:g}" for name, value in settings[i].items()) for i in order]
    figure, [[axis]] = report.panels(1, 1, figsize=(7, 1 + 0.35 * len(table)))
    axis.errorbar(mean[order], labels, xerr=np.nan_to_num((high - mean)[order]), fmt="o", capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel(f"return over the last tenth of training (mean and 95 % interval, {n} seeds)")
    report.save(figure, folder / "sweep.png")
    print("\nsettings, best first:")
    for label, row in zip(labels, table):
        print(f"  {label:40s} {row['return']:9.2f}  [{row['low']:.2f}, {row['high']:.2f}]")
