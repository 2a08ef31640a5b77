"""A trained agent, read from agent.msgpack alone, to act with.

    agent = load("runs/NAME")                            # or the path of an agent.msgpack
    hidden, inputs = agent.start(obs)                    # the first observations of N environments
    action, hidden = agent.act(hidden, inputs, key)      # a new key in every step
    inputs = agent.observe(inputs, action, reward, obs, episode_end)

The environments can be of any kind, stepped by any library: the agent takes and gives arrays, whose
first axis is N. With one environment N is 1: obs[None], action.value[0].

An agent trained without projections, as on CartPole-v1, takes observations as its environment
returns them, and action.value is what the environment takes. An agent trained under projections, as
that of results/default, plays any task with at most 12 observations and 2 actions, through a pair
of random matrices that stay the same for a trial:

    rng, n, m = np.random.default_rng(0), obs.size, 1    # n observations, m actions of the task
    Mo = rng.normal(size=(agent.trials.obs_size, n)) / n**0.5
    Ma = rng.normal(size=(m, agent.trials.action_dims)) / agent.trials.action_dims**0.5
    hidden, inputs = agent.start((Mo @ obs)[None])       # obs as it is, neither scaled nor clipped
    control = np.clip(Ma @ action.value[0], -1, 1)       # then scaled to the bounds of the task

It was also trained to hold an action for agent.trials.mean_repeat environment steps, and to observe
the sum of their rewards. examples/act.py is a whole program, with dm_control itself.
"""

import csv
import sys
from functools import partial
from pathlib import Path
from typing import Any, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import envs
import run_folder


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

    The methods are pure and compiled; they can also be called inside jax.jit.

    Attributes:
      params, norm: parameters and an envs.Observation of Moments; leaves (seeds, ...) of NumPy.
      seeds: their numbers; settings: {name: value} of each in a sweep.
      best_of: of how many settings of a sweep this is the best in training; 1 if it was named.
      steps: environment steps of each seed's training.
      tasks: names of the tasks trained on.
      trials: envs.Trials with one environment of the first task, and trial_kwargs, its arguments.
        trials.projection, obs_size, action_dims, mean_repeat and episodes_per_trial say how the
        agent was trained.
    """

    def __init__(self, folder: Path, saved: dict[str, Any]):
        trainer = run_folder.import_trainer(saved["trainer"])
        config = trainer.Config(**saved["config"])
        self.folder, self.name = folder, folder.resolve().name
        self.trainer, self.config = saved["trainer"], config
        self.network = trainer.make_train(config).network
        algorithm = sys.modules[type(self.network).__module__]
        self.trial_kwargs = algorithm.make_trial_kwargs(config) | {"privileged": False}
        self.trials = envs.Trials(config.env[:1], 1, **self.trial_kwargs)
        self.tasks = tuple(map(plain, config.env))
        self.dmc = all(map(envs.is_dmc, config.env))
        self.steps = int(saved["update"]) * config.steps_per_update
        self.seeds = [int(agent["seed"]) for agent in saved["agents"]]
        self.settings = [dict(agent["setting"]) for agent in saved["agents"]]
        self.best_of = 1
        self.params, norm = saved["params"], saved["norm"]
        self.norm = envs.Observation(**{name: algorithm.Moments(**x)
                                        for name, x in norm.items() if x is not None})

    @property
    def family(self) -> str:
        """The projections trained with; for DMControl tasks as they are, "identity"."""
        return self.trials.projection.replace("none", "identity" if self.dmc else "none")

    def of_seed(self, place: int) -> tuple[Any, envs.Observation]:
        """(parameters, statistics) of the seed with index `place` in `seeds`."""
        return jax.tree.map(lambda x: x[place], (self.params, self.norm))

    @partial(jax.jit, static_argnums=0)
    def start(self, obs: Any) -> tuple[Any, Inputs]:
        """(hidden state, Inputs) at the start of trials.

        Args:
          obs: (N, ...) first observations of N environments, projected if the agent was trained so.
        """
        obs = self._flat(obs)
        state, observation = self.trials.begin(envs.Start((), obs, None, None))
        reset = jnp.ones(len(obs), bool)
        return self.network.zero_state(reset.shape), Inputs(observation, reset, state, jnp.int32(0))

    @partial(jax.jit, static_argnums=0, static_argnames="deterministic")
    def act(self, hidden: Any, inputs: Inputs, key: Any = None, deterministic: bool = False):
        """(Action, hidden state after it).

        Args:
          hidden: hidden state, as `start` or the last `act` returned it.
          inputs: as `start` or the last `observe` returned them.
          key: jax.random key, a new one in every step.
          deterministic: take the most likely action instead of a sample; no key is needed.
        """
        _check("inputs", inputs, Inputs, "start or the last observe")
        like = jax.eval_shape(lambda: self.network.zero_state(inputs.reset.shape))
        if jax.tree.map(jnp.shape, hidden) != jax.tree.map(jnp.shape, like):
            raise ValueError("hidden must be the hidden state that start or the last act returned, "
                             "of as many environments as inputs")
        if key is None and not deterministic:
            raise ValueError("act needs a key, or deterministic=True")
        reset = inputs.reset | (self.config.reset == "step")
        hidden, pi, _ = self.network.apply(
            *self.of_seed(0), hidden, inputs.observation, reset, critic=False)
        bins, trials = pi.mode() if deterministic else pi.sample(seed=key), self.trials
        if trials.discrete or trials.projection == "none":
            value = trials.control(None, bins).reshape(-1, *trials.act_shapes[0])
        else:
            value = envs.action_values(trials.num_bins)[bins]
        return Action(bins, value), hidden

    @partial(jax.jit, static_argnums=0)
    def observe(self, inputs: Inputs, action: Action, reward: Any, obs: Any, episode_end: Any,
                trial_end: Any = None, final_obs: Any = None, lasted: Any = None) -> Inputs:
        """The Inputs after a step, equal to those of training (envs.Trials.step).

        Where an observation or reward is NaN or too large, the agent observes zeros instead.

        Args:
          inputs, action: what was acted on, and the action, an Action as `act` returned it.
          reward: (N,), summed where an action is held for several environment steps.
          obs: (N, ...) next observations; where an episode ended, the first of the next one.
          episode_end: (N,) bool, terminated or truncated.
          trial_end: (N,) bool, the next episode belongs to a new trial, with another task or other
            projections. By default a trial has as many episodes as in training.
          final_obs: (N, ...) the last observations of the episodes that ended. Only sysid in trials
            of several episodes uses them; without them it leaves the last step of an episode out.
          lasted: (N,) environment steps for which the action was held. Only agents trained with
            actions of different lengths need it.
        """
        _check("inputs", inputs, Inputs, "start or the last observe")
        _check("action", action, Action, "act")
        trials, state, obs = self.trials, inputs.state, self._flat(obs)
        shape = inputs.reset.shape
        dt = None
        if trials.irregular:
            if lasted is None and len(trials.repeats) > 1:
                raise ValueError("this agent was trained with actions of different lengths: "
                                 "observe needs lasted=, the environment steps of the action")
            lasted = trials.mean_repeat if lasted is None else lasted
            dt = jnp.full(shape, lasted, jnp.float32) / trials.time_unit
        for name, x in (("reward", reward), ("episode_end", episode_end), ("trial_end", trial_end),
                        ("obs", obs[:, 0])):
            if x is not None and jnp.shape(jnp.asarray(x)) != shape:
                raise ValueError(f"{name} must be of as many environments as start was given, "
                                 f"{shape}, got {jnp.shape(jnp.asarray(x))}")
        end = jnp.asarray(episode_end, bool) | (False if trial_end is None else trial_end)
        episode = state.counters.episode + end
        trial_end = end & (episode >= trials.episodes_per_trial) if trial_end is None else trial_end
        trial_end, no = jnp.asarray(trial_end, bool), jnp.zeros_like(end)
        last = obs if final_obs is None else envs.select(end, self._flat(final_obs), obs)
        reward = jnp.asarray(reward, jnp.float32)
        sound = envs.is_sound(last) & jnp.isfinite(reward)  # else NaN would stay in the hidden state
        transition = envs.Transition(
            reward=jnp.where(sound, reward, 0.0), terminated=end, truncated=no, trial_end=trial_end,
            diverged=~sound | (end if final_obs is None else no), episode_return=None,
            whole_episode=None, dt=dt)
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
        """Observations of N environments as float32 (N, obs_size). ValueError: other shapes."""
        trials, bare = self.trials, self.trials.projection == "none"
        expected = [(trials.obs_size,)]
        if bare:
            expected = [tuple(getattr(part, "shape", None) or ()) for part in trials.obs_parts[0]]
        arrays = [jnp.asarray(x) for x in jax.tree.leaves(obs)]
        found = [x.shape for x in arrays]
        if found != [found[0][:1] + shape for shape in expected] or not arrays[0].ndim:
            wanted = " and ".join(f"(N, {', '.join(map(str, shape))})" for shape in expected)
            advice = "" if bare else "; project them first: Mo @ obs, see the docstring of agent.py"
            raise ValueError(f"expected observations {wanted} of N environments, got "
                             f"{' and '.join(map(str, found))}; of one give obs[None]{advice}")
        flat = trials.flat_obs(0, arrays) if bare else arrays[0]
        return flat.astype(jnp.float32)

    def choose(self, setting: Mapping[str, float], seed: int | None) -> None:
        """Keeps the seeds of one setting, by default of the best in sweep.csv, or one of them."""
        def matches(found, wanted):
            return all(name in found and f"{found[name]:g}" == f"{value:g}" for name, value in wanted.items())

        settings, folder = self.settings, self.folder
        known = "; ".join(dict.fromkeys(map(run_folder.name_of, settings)))
        found = [i for i in range(len(self.seeds))
                 if matches(settings[i], setting) and seed in (None, self.seeds[i])]
        if not found:
            raise ValueError(f"{folder} holds no such agent; settings: {known or 'one'}; seeds: "
                             f"{', '.join(map(str, sorted(set(self.seeds))))}")
        best = settings[found[0]]
        if not all(matches(settings[i], best) for i in found):
            self.best_of = len({run_folder.name_of(settings[i]) for i in found})
            best = best_setting(folder, [settings[i] for i in found], matches, known)
            print(f"{folder} is a sweep; its best setting is evaluated: {run_folder.name_of(best)}")
        chosen = [i for i in found if matches(settings[i], best)]
        self.seeds, self.settings = ([x[i] for i in chosen] for x in (self.seeds, settings))
        self.params, self.norm = jax.tree.map(lambda x: x[chosen], (self.params, self.norm))

    def check(self) -> None:
        """Traces one step, which fails unless parameters and statistics fit the network."""
        for x in jax.tree.leaves((self.params, self.norm)):
            if not isinstance(x, np.ndarray) or x.dtype != np.float32 or len(x) != len(self.seeds):
                raise ValueError(f"it has no float32 parameters of {len(self.seeds)} agents")
        _, observation = jax.eval_shape(self.trials.reset, jax.random.PRNGKey(0))
        params, norm = self.of_seed(0)
        for name in ("projected", "change", "context", "sysid"):
            shapes = [getattr(norm, name).mean.shape, getattr(norm, name).var.shape]
            if shapes != 2 * [getattr(observation, name).shape[1:]]:
                raise ValueError(f"statistics of {name} have the wrong shape")
        jax.eval_shape(lambda *x: self.network.apply(params, norm, *x, critic=False),
                       self.network.zero_state((1,)), observation, jnp.ones(1, bool))


def _check(name: str, x: Any, kind: type, source: str) -> None:
    """ValueError unless an argument is what another method returned."""
    if not isinstance(x, kind):
        found = "an array" if isinstance(x, (jax.Array, np.ndarray)) else type(x).__name__
        raise ValueError(f"{name} must be the {kind.__name__} that {source} returned, got {found}")


def load(path: Path | str, setting: Mapping[str, float] = {}, seed: int | None = None) -> Agent:
    """A trained agent.

    Args:
      path: a run folder, or an agent.msgpack.
      setting: of a sweep, such as {"lr": 1e-3}. By default the best.
      seed: by default all, of which the first acts.

    Raises:
      ValueError: no agent is there, or none of this setting and seed, or one that does not fit.
    """
    path, saved = Path(path), run_folder.read_agent(path)
    try:
        agent = Agent(path if path.is_dir() else path.parent, saved)
        agent.check()
    except Exception as error:  # of any kind: the file may have been edited
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} does not fit {saved.get('trainer')}.py: {reason}") from error
    agent.choose(setting, seed)
    return agent


def best_setting(folder: Path, settings: list, matches: Any, known: str) -> dict[str, float]:
    """The first setting in sweep.csv that matches one of `settings`."""
    try:
        with (folder / "sweep.csv").open(newline="") as file:
            ranked = [{name: float(row[name]) for name in settings[0]}
                      for row in csv.DictReader(file)]
        return next(row for row in ranked if any(matches(setting, row) for setting in settings))
    except Exception:  # it is not there, or was edited
        raise ValueError(f"{folder} holds a sweep without a sweep.csv that ranks it; choose a "
                         f"--setting: {known}") from None
