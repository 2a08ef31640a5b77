"""A trained agent, read from agent.msgpack alone, to act with.

    agent = load("runs/NAME")                            # or the path of an agent.msgpack
    hidden, inputs = agent.start(obs)                    # the first observations of N environments
    action, hidden = agent.act(hidden, inputs, key)      # the environments take action.value
    inputs = agent.observe(inputs, action, reward, obs, episode_end)

The environments can be of any kind: examples/act.py plays dm_control itself.
"""

import csv
import functools
import math
import sys
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
import experiment


def plain(task: str) -> str:
    """The name of a task without "dmc:"."""
    return task.removeprefix("dmc:") if envs.is_dmc(task) else task


class Action(NamedTuple):
    """Actions of N environments, in two forms."""

    bins: jax.Array  # (N, action_dims) int32, what the network chose: indices of values
    value: jax.Array  # what an environment takes. Discrete: (N,) int32. Continuous, no projection:
    # (N, *shape of the action space) float32, within its bounds. With projection: (N, action_size)
    # float32 in [-5, 5], of which the environment takes clip(Ma value, -1, 1)


class Inputs(NamedTuple):
    """What the agent acts on next, of N environments."""

    observation: envs.Observation
    reset: jax.Array  # (N,) bool, the hidden state is reset before this step
    state: envs.TrialsState  # previous observation, sysid and number of episodes; no environments
    step: jax.Array  # () int32, steps since `start`


class Agent:
    """The agent of one setting of a run, with one seed or several. It acts with the first seed.

    Environments can be of any kind. Observations are arrays (N, ...) as the environment returns them,
    or (N, obs_size) after the projection o = Mo o_env if the agent was trained with one. The methods
    are pure and compiled; they can also be called inside jax.jit.

    Attributes:
      params, norm: parameters and an envs.Observation of Moments; leaves (seeds, ...).
      seeds: their numbers.
      steps: environment steps of each seed's training.
      tasks: names of the tasks trained on.
      trials: envs.Trials with one environment of the first task, and trial_kwargs, its arguments.
    """

    def __init__(self, folder, saved, setting, seed):
        trainer = experiment.import_trainer(saved["trainer"])
        config = trainer.Config(**saved["config"])
        self.folder, self.name = folder, folder.resolve().name
        self.trainer, self.config = saved["trainer"], config
        self.network = trainer.make_train(config).network
        algorithm = sys.modules[type(self.network).__module__]
        self.trial_kwargs = algorithm.make_trial_kwargs(config) | {"privileged": False}
        self.trials = envs.Trials(config.env[:1], 1, **self.trial_kwargs)
        self.tasks = tuple(map(plain, config.env))
        self.dmc = all(map(envs.is_dmc, config.env))
        self.steps = saved["update"] * config.steps_per_update
        chosen = choose_members(saved["members"], setting, seed, folder)
        self.seeds = [saved["members"][i]["seed"] for i in chosen]
        self.params, norm = jax.tree.map(
            lambda x: jnp.asarray(x)[np.array(chosen)], (saved["params"], saved["norm"]))
        self.norm = envs.Observation(**{name: algorithm.Moments(**x) for name, x in norm.items()})

    @property
    def family(self) -> str:
        """The projections trained with; for DMControl tasks as they are, "identity"."""
        return self.trials.projection.replace("none", "identity" if self.dmc else "none")

    @functools.cached_property
    def first(self):
        """(parameters, statistics) of the first seed."""
        with jax.ensure_compile_time_eval():  # the first use may be inside jax.jit
            return jax.tree.map(lambda x: x[0], (self.params, self.norm))

    @functools.partial(jax.jit, static_argnums=0)
    def start(self, obs: jax.Array) -> tuple[Any, Inputs]:
        """(hidden state, Inputs) at the start of trials; obs (N, ...), the first observations."""
        obs = self._flat(obs)
        state, observation = self.trials.begin(envs.Start((), obs, None, None))
        reset = jnp.ones(len(obs), bool)
        return self.network.zero_state(reset.shape), Inputs(observation, reset, state, jnp.int32(0))

    @functools.partial(jax.jit, static_argnums=0, static_argnames="deterministic")
    def act(self, hidden, inputs, key=None, deterministic=False) -> tuple[Action, Any]:
        """(Action, hidden state after it). The action is a sample or, if deterministic, the mode."""
        if key is None and not deterministic:
            raise ValueError("act needs a key, or deterministic=True")
        params, norm = self.first
        reset = inputs.reset | (self.config.reset == "step")
        hidden, pi, _ = self.network.apply(
            params, norm, hidden, inputs.observation, reset, critic=False)
        bins, trials = pi.mode() if deterministic else pi.sample(seed=key), self.trials
        if trials.discrete:
            value = bins[:, 0]
        elif trials.projection == "none":
            value = trials.control(None, bins).reshape(-1, *trials.act_shapes[0])
        else:
            value = envs.action_values(trials.num_bins)[bins]
        return Action(bins, value), hidden

    @functools.partial(jax.jit, static_argnums=0)
    def observe(self, inputs: Inputs, action: Action, reward, obs, episode_end, trial_end=None,
                final_obs=None) -> Inputs:
        """The Inputs after a step, equal to those of training (envs.Trials.step).

        Args:
          inputs, action: what was acted on, and the action.
          reward: (N,).
          obs: (N, ...) next observations; where an episode ended, the first of the next one.
          episode_end: (N,) bool.
          trial_end: (N,) bool, the next episode belongs to a new trial, with another task or other
            projections. By default a trial has as many episodes as in training.
          final_obs: (N, ...) the last observations of the episodes that ended. Only sysid in trials
            of several episodes uses them; without them it leaves the last step of an episode out.
        """
        trials, state, obs = self.trials, inputs.state, self._flat(obs)
        end = jnp.asarray(episode_end, bool) | (False if trial_end is None else trial_end)
        episode = state.counters.episode + end
        trial_end = end & (episode >= trials.episodes_per_trial) if trial_end is None else trial_end
        trial_end, no = jnp.asarray(trial_end, bool), jnp.zeros_like(end)
        last = obs if final_obs is None else envs.select(end, self._flat(final_obs), obs)
        transition = envs.Transition(jnp.asarray(reward, jnp.float32), end, no, trial_end,
                                     end if final_obs is None else no, None, None)
        own_action = trials.observed_action(action.bins)
        sysid, features = trials.identify(state, own_action, last, transition, inputs.step)
        state = state.replace(
            sysid=sysid, spare=envs.Start((), obs, None, None),
            counters=state.counters._replace(episode=jnp.where(trial_end, 0, episode)))
        state, observation = trials.restart(
            state, obs, own_action, features, transition._replace(diverged=no))
        reset = trial_end & (self.config.reset != "never")
        return Inputs(observation, reset, state, inputs.step + 1)

    def _flat(self, obs):
        """Observations of N environments as float32 (N, obs_size)."""
        obs = jnp.asarray(obs)
        if self.trials.projection == "none":
            obs = self.trials.flat_obs(0, obs)
        if obs.ndim != 2 or obs.shape[1] != self.trials.obs_size:
            raise ValueError(f"expected observations (N, {self.trials.obs_size}), got {obs.shape}")
        return obs.astype(jnp.float32)


def load(path: Path | str, setting: Mapping[str, float] = {}, seed: int | None = None) -> Agent:
    """A trained agent.

    Args:
      path: a run folder, or an agent.msgpack.
      setting: of a sweep, such as {"lr": 1e-3}. By default the best.
      seed: by default all, of which the first acts.

    Raises:
      ValueError: no agent is there, or none of this setting and seed.
    """
    path, saved = Path(path), experiment.read_agent(path)
    try:
        return Agent(path if path.is_dir() else path.parent, saved, setting, seed)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} does not fit {saved.get('trainer')}.py: {error}") from None


def choose_members(members, setting, seed, folder) -> list[int]:
    """Indices of the members {"seed", "setting"} of one setting; sweep.csv ranks settings."""
    def matches(member, wanted):
        return all(math.isclose(member["setting"].get(name, math.nan), value, rel_tol=1e-5)
                   for name, value in wanted.items())

    def text(setting):
        return ",".join(f"{name}={value:g}" for name, value in setting.items())

    found = [i for i, m in enumerate(members) if matches(m, setting) and seed in (None, m["seed"])]
    known = "; ".join(dict.fromkeys(text(m["setting"]) for m in members))
    if not found:
        raise ValueError(f"{folder} holds no such agent; settings: {known or 'one'}; seeds: "
                         f"{', '.join(map(str, sorted({m['seed'] for m in members})))}")
    first = members[found[0]]["setting"]
    if all(matches(members[i], first) for i in found):
        return found
    if not (folder / "sweep.csv").is_file():
        raise ValueError(f"{folder} holds a sweep without sweep.csv; choose a --setting: {known}")
    with (folder / "sweep.csv").open(newline="") as file:
        ranked = [{name: float(row[name]) for name in first} for row in csv.DictReader(file)]
    best = next(row for row in ranked if any(matches(members[i], row) for i in found))
    print(f"{folder} is a sweep; its best setting is evaluated: {text(best)}")
    return [i for i in found if matches(members[i], best)]
