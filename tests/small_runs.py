"""Run folders for tests: agent.msgpack of small networks with random parameters; metrics.csv."""

import dataclasses
import json

import flax.serialization
import jax
import numpy as np

import experiment
import train_s5

TASKS = ("cartpole-swingup", "cartpole-balance")  # trained on, held out; both pay in every step
SMALL = dict(width=8, layers=1, state_size=8, num_envs=4, num_steps=8, num_minibatches=2, log_every=1,
             env=TASKS[:1], action_repeat=(1,), env_kwargs=("max_steps_in_episode=60",))


def make_run(folder, trainer=train_s5, settings=({},), seeds=(0,), **changes):
    """Writes agent.msgpack with parameters under which actions vary a lot. Returns the folder."""
    config = trainer.Config(**{k: v for k, v in (SMALL | changes).items()
                               if k in {field.name for field in dataclasses.fields(trainer.Config)}})
    shapes = jax.eval_shape(trainer.make_train(config).init, jax.random.PRNGKey(0))
    agents = [{"seed": seed, "setting": setting} for setting in settings for seed in seeds]
    rng = np.random.default_rng(len(folder.name))

    def fill(path, x):
        name, shape = jax.tree_util.keystr(path), (len(agents), *x.shape)
        value = rng.normal(size=shape) / (np.sqrt(x.shape[0]) if x.ndim > 1 else 2)
        value = value.astype(x.dtype)
        if "log_dt" in name:
            return value - 4
        if "'C'" in name:
            return 30 * value  # S5's output matrix: so that the hidden state matters in short trials
        return np.abs(value) if "var" in name else value

    saved = {name: jax.tree_util.tree_map_with_path(fill, flax.serialization.to_state_dict(getattr(shapes, name)))
             for name in ("params", "norm")}
    saved |= {"trainer": trainer.__name__, "update": 3, "agents": agents,
              "config": json.loads(json.dumps(dataclasses.asdict(config)))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "agent.msgpack").write_bytes(flax.serialization.msgpack_serialize(saved))
    return folder


def write_run(path, config, rows):
    """A run folder with these rows of metrics.csv."""
    experiment.open_folder(config, experiment.Options(out=str(path)))
    if rows:
        with (path / "metrics.csv").open("w", newline="") as file:
            experiment.write_rows(file, rows)


def config_of(run):
    """The Config and Options that the command of a run gives its trainer."""
    return experiment.parse_flags(experiment.import_trainer(run.trainer).Config, args=run.command[1:])
