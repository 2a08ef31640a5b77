"""What a run is, and its folder: options, agents, config.json, checkpoints.

    config.json      trainer, Config, Options
    checkpoints/     the newest two, UPDATE.npz
    agent.msgpack    the agents without optimiser and environments, as of the newest checkpoint

Process 0 writes. A kill at any moment leaves files that are whole.
"""

import dataclasses
import importlib
import inspect
import io
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import flax.serialization
import jax
import numpy as np
import tyro

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
