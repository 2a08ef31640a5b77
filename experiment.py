"""A training run and its folder: seeds, sweeps, devices, logs, checkpoints, resume, plots, command line.

The trainers hand their algorithm over and get all of this:

    experiment.main(Config, make_train, __doc__)                     # what `python train_s5.py` does
    folder = experiment.run(make_train, Config(), Options(num_seeds=4))

    config, options = experiment.read_run("runs/NAME", Config)       # of a run folder; then, to go on with it:
    experiment.run(make_train, config, options)

A run is a number of members, every setting of the sweep with every seed, that train in one compiled function,
`log_every` updates at a call. Between two calls its folder grows:

    config.json      trainer, Config, Options
    metrics.csv      a row per update and member, without wall-clock values: a resumed run writes the same bytes
    timing.csv       a row per call: seconds since the (re)start, environment steps per second of all members
    checkpoints/     the newest two, of all members
    tensorboard/     event files
    returns.png      at the end; of a sweep also sweep.csv and sweep.png

What is needed of a trainer: a frozen dataclass Config with the fields env, log_every and SWEEPABLE (names of the fields
whose values may be traced) and the properties num_updates and steps_per_update; make_train(Config) -> train with
init(key, hyper) -> runner and update(runner) -> (runner, metrics), pure, metrics shaped (), (tasks,) or (tasks, n).
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
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Callable, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Options:
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ... trained side by side in one compiled function
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=V1,V2,...; may be given several times: every combination times every seed in one compiled function"""
    sweep_chunk: int = 0  # run the sweep in equal parts of so many settings x seeds (0: all at once)
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
        for name in ("seed", "sweep_chunk", "checkpoint_minutes"):
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

    def flags(algorithm: config_class = preset(config_class, options.preset), run: Options = options):
        return algorithm, run

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(flags, args=args, description=description, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box: a title, the sentence, a rule, the flag's help
        lines = [line.strip("│ ") for line in printed.getvalue().splitlines()[1:]]
        sentence = " ".join(itertools.takewhile(lambda line: not line.startswith(("─", "╰")), lines))
        raise ValueError(re.sub(r"^Error parsing (algorithm: |run: )?", "", sentence)) from None


def main(config_class: type, make_train: Callable, description: str) -> None:
    """What `python train_*.py` does: parse the command line, train, evaluate. Errors are one sentence, status 2."""
    jax.config.update("jax_compilation_cache_dir", os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jax-icrl")))
    try:
        config, options = parse_flags(config_class, description)
        if options.resume:
            config, options = read_run(options.resume, config_class)
        folder = run(make_train, config, options)
        if options.evaluate and not options.sweep:
            if importlib.util.find_spec("evaluate"):
                import evaluate
                evaluate.evaluate([folder])
            else:
                print("evaluate.py is not here: evaluation left out")
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        print("error: out of memory; lower --num-envs, --num-seeds or --width, or set --sweep-chunk", file=sys.stderr)
        sys.exit(2)


# ---- Members: settings x seeds, on all devices -------------------------------------------------------------
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


def over_devices(size: int) -> NamedSharding:
    """Sharding of a leading axis of length `size` over as many devices as divide it."""
    count = max(n for n in range(1, len(jax.devices()) + 1) if size % n == 0)
    return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("member",)), PartitionSpec("member"))


def over_members(function: Callable) -> Callable:
    """function over a leading axis of members: an accelerator runs them side by side, a CPU one after another.

    On a CPU, matrix products batched over members cost more than twice their own time.
    """
    if jax.default_backend() != "cpu":
        return jax.vmap(function)
    return lambda *args: jax.lax.map(lambda one: function(*one), args)


def init_groups(train: Any, config: Any, options: Options) -> list[Any]:
    """The stacked runners of every group of members, at the start of training."""
    groups = []
    for members in groups_of(config, options):
        sharding = over_devices(len(members))
        init = jax.jit(jax.vmap(train.init), in_shardings=sharding, out_shardings=sharding)
        keys = jnp.stack([jax.random.PRNGKey(seed) for _, seed in members])
        hyper = {name: jnp.array([setting[name] for setting, _ in members], jnp.float32) for name in members[0][0]}
        groups.append(init(keys, hyper))
    return groups


def compile_chunk(train: Any, updates: int, runners: Any) -> Callable:
    """The compiled function that runs so many updates of a group of stacked runners, which it takes over."""
    def chunk(runner):
        return jax.lax.scan(lambda r, _: train.update(r), runner, None, updates)

    sharding = over_devices(runners.num_updates.shape[0])
    mapped = jax.shard_map(over_members(chunk), mesh=sharding.mesh, in_specs=sharding.spec,
                           out_specs=sharding.spec, check_vma=False)
    return jax.jit(mapped, donate_argnums=0).lower(runners).compile()


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


def restore(manager: ocp.CheckpointManager, groups: list[Any]) -> tuple[int, list[Any]]:
    """The newest readable checkpoint.

    Args:
      manager: of a run's folder checkpoints/.
      groups: as from init_groups, or their shapes.

    Returns:
      (number of updates done, groups).

    Raises:
      ValueError: there is none that fits.
    """
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, groups)
    problems = []
    for update in sorted(manager.all_steps(), reverse=True):
        try:
            return update, manager.restore(update, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # orbax raises many kinds; an older checkpoint may be whole
            problems.append(f"update {update}: {str(error).splitlines()[0]}")
            print(f"checkpoint of update {update} cannot be read, trying the one before", file=sys.stderr)
    raise ValueError(f"no usable checkpoint in {manager.directory}: {'; '.join(problems) or 'none was written'}")


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
    members = list(itertools.chain(*groups_of(config, options)))
    train = make_train(config)
    folder = Path(options.resume) if options.resume else new_run(config, options)
    groups = init_groups(train, config, options)
    manager = ocp.CheckpointManager((folder / "checkpoints").absolute(),
                                    options=ocp.CheckpointManagerOptions(max_to_keep=2))
    update, saved = 0, set()
    if options.resume and (manager.all_steps() or (folder / "metrics.csv").exists()):  # else killed before training
        update, groups = restore(manager, groups)
        saved.add(update)
    chunk = compile_chunk(train, config.log_every, groups[0])
    weights = sum(x.size for x in jax.tree.leaves(groups[0].params)) // groups[0].key.shape[0]
    print(f"{folder}: {len(members)} x {config.total_timesteps:,} steps of {', '.join(config.env)} on "
          f"{jax.device_count()} {jax.devices()[0].platform}, preset {options.preset}; {weights:,} parameters; "
          f"ready in {time.perf_counter() - begin:.1f} s")

    logs = Logs(config, options, folder, update)
    per_update = config.steps_per_update
    bar = tqdm(total=config.num_updates * per_update, initial=update * per_update, unit="step", unit_scale=True)
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
            rows = metric_rows(config, options, update, metrics)
            update += config.log_every
            means = logs.chunk(rows, {
                "update": update, "steps": update * per_update, "seconds": time.perf_counter() - begin,
                "sps": len(members) * config.log_every * per_update / seconds})
            bar.update(config.log_every * per_update)
            bar.set_postfix_str(" ".join(f"{t.split(':')[-1]} {means[f'return/{t}']:.0f}" for t in config.env))
            if means["skipped"] > 0.5:
                raise FloatingPointError(
                    f"{means['skipped']:.0%} of the gradient steps were not finite and were skipped: "
                    "lower --lr or --max-grad-norm")
            if time.perf_counter() - last_save > 60 * options.checkpoint_minutes:
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
        logs.close()

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


def new_figure(*shape: int, **settings: Any):
    """matplotlib's plt.subplots, drawing without a display."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(*shape, layout="tight", **settings)


def save_figure(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_training(config: Any, options: Options, folder: Path) -> None:
    """returns.png: return of finished episodes per task against steps, mean and range over seeds and settings."""
    returns = training_returns(config, options, folder)
    steps = config.steps_per_update * np.arange(1, len(returns) + 1)
    columns, lines = min(3, len(config.env)), math.ceil(len(config.env) / 3)
    figure, axes = new_figure(lines, columns, figsize=(3.4 * columns, 2.6 * lines), squeeze=False)
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
        axis.grid(alpha=0.3)
    save_figure(figure, folder / "returns.png")


def write_sweep(config: Any, options: Options, folder: Path) -> None:
    """sweep.csv and sweep.png: the settings ranked by final return, mean and 95 % interval (t) over seeds."""
    from scipy.stats import t as student
    settings, n = settings_of(config, options), options.num_seeds
    scores = final_scores(config, options, folder).mean(1).reshape(len(settings), n)
    mean, half = scores.mean(1), np.full(len(settings), np.nan)
    if n > 1:
        half = student.ppf(0.975, n - 1) * scores.std(1, ddof=1) / np.sqrt(n)
    order = np.argsort(-np.nan_to_num(mean, nan=-np.inf))
    table = [settings[i] | {"return": mean[i], "low": mean[i] - half[i], "high": mean[i] + half[i], "seeds": n}
             for i in order]
    with (folder / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    labels = [", ".join(f"{name}={value:g}" for name, value in settings[i].items()) for i in order]
    figure, axis = new_figure(figsize=(7, 1 + 0.35 * len(table)))
    axis.errorbar(mean[order], labels, xerr=np.nan_to_num(half[order]), fmt="o", capsize=3)
    axis.invert_yaxis()
    axis.set_xlabel(f"return over the last tenth of training (mean and 95 % interval, {n} seeds)")
    axis.grid(alpha=0.3)
    save_figure(figure, folder / "sweep.png")
    print("\nsettings, best first:")
    for label, row in zip(labels, table):
        print(f"  {label:40s} {row['return']:9.2f}  [{row['low']:.2f}, {row['high']:.2f}]")
