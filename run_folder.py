"""What a run is, and its folder: options, agents, config.json, lock, checkpoints.

    config.json      trainer, Config, Options
    checkpoints/     the newest two, UPDATE.npz
    agent.msgpack    the agents without optimiser and environments, as of the newest checkpoint
    lock             while a process trains here

Process 0 writes. A kill at any moment leaves files that are whole.
"""

import contextlib
import dataclasses
import importlib
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
from typing import Annotated, Any, NamedTuple

import flax.serialization
import jax
import numpy as np
import tyro

import devices

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclasses.dataclass(frozen=True)
class Options:
    seed: int = 0  # first seed
    num_seeds: int = 1  # seeds seed, seed + 1, ... train side by side in one compiled function
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=V1,V2,...; every combination of all sweeps trains with every seed in one function"""
    devices: int = 0  # number of devices (0: all that can be used; on a CPU each core is a device)
    out: str = ""  # run folder (default: runs/TRAINER-TASK-DATE)
    resume: str = ""  # run folder to continue, with its own flags; --total-timesteps may be changed
    checkpoint_minutes: float = 5.0  # between two checkpoints; one is always written at the end
    wandb: str = ""  # Weights & Biases project (needs wandb)
    evaluate: bool = True  # evaluate the agents at the end (not after a sweep)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            if type(value) not in ((int, float) if kind is float else (kind,)):
                raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")
            check_finite(field.name, value)
            if isinstance(value, str) and value and not value.strip():
                raise ValueError(f"{field.name} must not be blank")
            if kind in (int, float) and value < 0:
                raise ValueError(f"{field.name} must not be negative, got {value}")
        check_texts("sweep", self.sweep)
        if not 1 <= self.num_seeds <= 2**16:
            raise ValueError(f"num_seeds must be at least 1 and at most 65536, got {self.num_seeds}")
        if self.seed + self.num_seeds > 2**32:
            raise ValueError("seeds must be below 2**32 = 4294967296, got seeds up to "
                             f"{self.seed + self.num_seeds - 1}")


class Run(NamedTuple):
    config: Any  # the trainer's Config
    options: Options
    folder: Path


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
        if name in axes:
            raise ValueError(f"--sweep {name} is given twice: write all its values into one")
        try:
            axes[name] = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--sweep {text!r}: expected NAME=V1,V2,... with numbers") from None
        for value in axes[name]:
            check_finite(name, value)
            dataclasses.replace(config, **{name: value})  # validates the value
        if len({f"{value:g}" for value in axes[name]}) < len(axes[name]):
            raise ValueError(f"--sweep {text!r}: a value is given twice; six digits of each count")
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def agents_of(config: Any, options: Options) -> list[tuple[dict[str, float], int]]:
    """Returns (setting, seed) of every agent, settings outermost."""
    seeds = range(options.seed, options.seed + options.num_seeds)
    return list(itertools.product(settings_of(config, options), seeds))


def name_of(setting: dict[str, float], seed: int | None = None) -> str:
    """Returns the name of a setting, or of an agent, such as "lr=0.001,seed=2"."""
    parts = [f"{name}={value:g}" for name, value in setting.items()]
    return ",".join(parts if seed is None else [*parts, f"seed={seed}"])


def check_finite(name: str, value: Any) -> None:
    """ValueError if a value is infinite or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def check_texts(name: str, values: tuple) -> None:
    """ValueError if one of the values is no text."""
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be texts, got {values}")


# ---- The run folder ------------------------------------------------------------------------------
def open_folder(config: Any, options: Options) -> Path:
    """Returns the run folder, a new one with config.json unless this is a resumed run."""
    if options.resume:
        return Path(options.resume)
    task = re.sub(r"[:/\\]", "-", config.env[0]) if len(config.env) == 1 else f"{len(config.env)}tasks"
    trainer = trainer_of(type(config)).removeprefix("train_")
    folder = Path(options.out.strip() or f"runs/{trainer}-{task}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        if options.out.strip():
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = new_folder(folder)
        with (folder / "config.json").open("x") as file:  # only one process can do this
            file.write(settings_text(config, options))
    except FileExistsError:
        raise ValueError(f"{folder} exists already: choose another --out, or --resume {folder}"
                         ) from None
    except OSError as error:
        discard(folder)
        raise ValueError(f"cannot write the run folder {folder} ({error.strerror}): choose an "
                         "--out that exists or can be made") from None
    return folder


def new_folder(wanted: Path) -> Path:
    """Makes a folder of this name, or with a number if others have it. Returns its path."""
    for number in itertools.count(1):
        folder = wanted.with_name(f"{wanted.name}-{number}") if number > 1 else wanted
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def discard(folder: Path) -> None:
    """Removes a run folder in which nothing was trained, so that its name can be used again."""
    with contextlib.suppress(OSError):
        for name in ("config.json", "wandb_id", "lock"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
        if folder.parent == Path("runs"):
            folder.parent.rmdir()


@contextlib.contextmanager
def locked(folder: Path):
    """Holds the lock of a run folder, which a process that dies gives back. ValueError if held."""
    path = folder / "lock"
    with path.open("a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino
        except BlockingIOError:
            held = False
        except OSError:  # a file system without locks
            held = True
        if not held:
            raise ValueError(f"another process trains in {folder}: wait until it has ended")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def settings_text(config: Any, options: Options) -> str:
    """Returns the contents of config.json."""
    options = dataclasses.replace(options, resume="")
    parts = {"config": dataclasses.asdict(config), "options": dataclasses.asdict(options)}
    return json.dumps({"trainer": trainer_of(type(config))} | parts, indent=1) + "\n"


def update_config(this: Run) -> None:
    """Writes config.json anew if a resumed run has got another total_timesteps, and says so."""
    path, text = this.folder / "config.json", settings_text(this.config, this.options)
    before = json.loads(path.read_text())["config"]["total_timesteps"]
    if this.config.total_timesteps != before:
        print(f"{this.folder} goes on to {this.config.total_timesteps:,} steps instead of {before:,}; "
              "schedules such as that of lr now run to the new end", flush=True)
        write_whole(path, text.encode())


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
    except (ValueError, KeyError, TypeError, RecursionError):
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
        for name in ("env", "env_kwargs"):
            check_texts(name, getattr(config, name, ()))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} does not fit {own}.py: {error}") from None
    return config, dataclasses.replace(options, resume=str(folder))


def trainer_of(config_class: type) -> str:
    """Returns the name of the trainer, without .py, that defines a Config."""
    return Path(inspect.getfile(config_class)).stem


def import_trainer(name: str) -> Any:
    """Returns the module of a trainer that is beside this file or in its folder examples/."""
    for folder in (Path(__file__).parent, Path(__file__).parent / "examples"):
        if str(name) in {path.stem for path in folder.glob("*.py")}:
            sys.path.append(str(folder))
            module = importlib.import_module(name)
            if hasattr(module, "Config"):
                return module
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
    found = [path for path in folder.glob("checkpoints/*.npz")
             if path.stem.isdecimal() and path.is_file()]
    return sorted(found, key=lambda path: -int(path.stem))


def save(this: Run, update: int, runner: Any) -> None:
    """Writes agent.msgpack and a checkpoint, and keeps the newest two. Every process calls this."""
    runner = devices.gather(runner)
    if not devices.is_first():
        return
    agents = agents_of(this.config, this.options)
    agent = {"trainer": trainer_of(type(this.config)),
             "config": json.loads(json.dumps(dataclasses.asdict(this.config))),  # lists for tuples
             "agents": [{"seed": seed, "setting": setting} for setting, seed in agents],
             "update": update,
             "params": flax.serialization.to_state_dict(runner.params),
             "norm": flax.serialization.to_state_dict(runner.norm)}
    write_whole(this.folder / "agent.msgpack", flax.serialization.msgpack_serialize(agent))
    sizes = [(this.folder / name).stat().st_size for name in LOGS]  # to drop later rows on resume
    data = io.BytesIO()
    np.savez(data, *jax.tree.leaves(runner), logs=sizes, settings=json.dumps(lasting(this)))
    (this.folder / "checkpoints").mkdir(exist_ok=True)
    write_whole(this.folder / "checkpoints" / f"{update}.npz", data.getvalue())
    older = [path for path in saved(this.folder) if int(path.stem) <= update]
    for path in set(saved(this.folder)).difference(older[:2]):  # a later one cannot be read
        path.unlink()


def lasting(this: Run) -> dict[str, Any]:
    """Returns the settings that a run keeps from its start to its end."""
    options = {name: getattr(this.options, name) for name in ("seed", "num_seeds", "sweep")}
    found = dataclasses.asdict(this.config) | options
    return json.loads(json.dumps({name: x for name, x in found.items() if name != "total_timesteps"}))


def restore(this: Run, shapes: Any) -> tuple[int, Any]:
    """Returns (updates done, runner) of the newest whole checkpoint; drops later rows of the logs.

    shapes: of the runner, jax.ShapeDtypeStruct with shardings. ValueError if no checkpoint fits, or if
    config.json has been edited since.
    """
    likes, tree = jax.tree.flatten(shapes)
    folder, now, problems = this.folder, lasting(this), []
    for path in saved(folder):
        try:
            with np.load(path) as file:
                sizes, before = file["logs"], json.loads(str(file["settings"]))
                edited = [name for name in now if now[name] != before[name]]
                leaves = [] if edited else [file[f"arr_{i}"] for i in range(len(likes))]
            if not edited:
                if [(x.shape, x.dtype) for x in leaves] != [(x.shape, x.dtype) for x in likes]:
                    raise ValueError("it has other shapes")
                check_metrics(folder, sizes[0], rows=int(path.stem) * likes[0].shape[0])
        except Exception as error:  # of many kinds; an older checkpoint may be whole
            problems.append(f"{path.name}: {error}")
            print(f"{path} cannot be read, trying the one before ({error})", file=sys.stderr)
            continue
        if edited:
            raise ValueError(f"{folder}/config.json was edited since {path.name} was written: "
                             f"{', '.join(f'{name} was {before[name]}' for name in edited)}")
        leaves = [jax.make_array_from_callback(x.shape, like.sharding, lambda index, x=x: x[index])
                  for x, like in zip(leaves, likes)]
        if devices.is_first():
            for name, size in zip(LOGS, sizes):
                if (folder / name).exists() and (folder / name).stat().st_size >= size:
                    os.truncate(folder / name, size)
        return int(path.stem), jax.tree.unflatten(tree, leaves)
    problems = "; ".join(problems) or "none was written"
    raise ValueError(f"no usable checkpoint in {folder}: {problems}")


def check_metrics(folder: Path, size: int, rows: int) -> None:
    """ValueError unless the first `size` bytes of metrics.csv are its head and so many rows."""
    path = folder / "metrics.csv"
    data = path.read_bytes()[:size] if path.exists() else b""
    if size and (len(data), data[:7], data.count(b"\n")) != (size, b"update,", rows + 1):
        raise ValueError("metrics.csv has lost rows that were there when it was written")


def read_agent(path: Path | str) -> dict[str, Any]:
    """Returns the contents of agent.msgpack, A agents with what they were trained with.

    Args:
      path: of the file, or of the run folder that holds it.

    Returns:
      "trainer": its name, without .py. "config": {field: value}. "update": updates done.
      "agents": {"seed", "setting": {name: value}} of each agent. "params", "norm": parameters and
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
