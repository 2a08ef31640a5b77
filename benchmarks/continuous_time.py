"""Steps of different lengths: does a continuous-time memory help, does it transfer, at what cost?

    python benchmarks/continuous_time.py          # everything, on a CPU: hours
    python benchmarks/continuous_time.py --parts irregular cost
    python benchmarks/continuous_time.py --small  # a little of everything, in its own folder

A job trains one agent, all seeds in one compiled function, and stores its rows at its end. After a
kill the same command goes on. In the first two parts velocities are hidden, nothing is projected.

    irregular  a step lasts 1, 2, 4 or 8 environment steps. popgym's tasks have 1, 2 or 4: 8 tip
               StatelessCartPole's pole by 10 of the 12 degrees that end an episode, and leave 27
               steps to an episode of StatelessPendulumHard
    transfer   agents trained at one interval, or at random ones, act at others. `dt`: the use of
               durations, in units of their mean in training. `kept`: return in percent of that at
               trained intervals, StatelessPendulum's counted from that of random actions (`random`)
    cost       milliseconds with dt in the recurrence and hidden, in turn; median ratio of pairs
    projected  S5 with sysid at intervals 1, 2 and 4, beside an interval of 2
    figure     return against interval, and tables

Returns (mean, 95 % t interval, worst, every seed) are those of the last tenth of training, in
`transfer` of whole trials. Rewards are summed over environment steps, so returns compare between
intervals. Agents observe these sums, which tell durations even where dt is hidden: exactly so in
StatelessCartPole, whose steps all pay the same.
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common import (  # first
    RESULTS,
    Table,
    add_legend,
    each,
    final_returns,
    mean_interval,
    plot_into,
    read_csv,
    run_main,
    seconds,
)

import devices
import envs
import experiment
import train_s5
from parts import lost
from runs import RUNS

RANDOM = (1, 2, 4)
REPEATS = {  # intervals of each task in `irregular`
    "pendulum-swingup": (1, 2, 4, 8), "cartpole-swingup": (1, 2, 4, 8),
    "popgym:StatelessPendulumHard": RANDOM, "popgym:StatelessCartPoleHard": RANDOM}
AGENTS = {  # of `irregular`, most informative first
    "S5, dt in recurrence": ("train_s5", {"dt": "recurrence"}),
    "S5, dt hidden": ("train_s5", {"dt": "none"}),
    "GRU, dt as input": ("train_lstm", {"dt": "input", "cell": "gru"}),
    "S5, dt as input": ("train_s5", {"dt": "input"}),
    "transformer, dt as input": ("train_transformer", {"dt": "input"})}
TRANSFER_TASKS = ("cartpole-swingup", "pendulum-swingup", "popgym:StatelessPendulumHard")
TRANSFER_AGENTS = {  # trainer; intervals and dt in training; dt in tests
    "S5": ("train_s5", (2,), "recurrence", ("recurrence", "none")),
    "S5, random intervals": ("train_s5", RANDOM, "recurrence", ("recurrence", "none")),
    "LSTM": ("train_lstm", (2,), "none", ("none",)),
    "LSTM, random intervals": ("train_lstm", RANDOM, "input", ("input",))}
INTERVALS = ((2,), RANDOM, (1,), (3,), (4,))  # of tests
PROJECTED = {"interval 2": ((2,), "none"), "dt in recurrence": (RANDOM, "recurrence"),
             "dt hidden": (RANDOM, "none"), "dt as input": (RANDOM, "input")}


class Budget(NamedTuple):
    seeds: int = 5
    updates: int = 130  # of the first two parts: 533,000 steps of the agent
    trials: int = 64  # of a test, for each seed
    projected_seeds: int = 5
    projected_steps: int = 5_000_000  # environment steps
    projected_tasks: tuple = envs.TRAIN_TASKS
    pairs: int = 15  # of times
    agents: int = 5  # the first ones
    intervals: int = 5  # of tests, the first ones
    tasks: int = 4  # the last ones
    sizes: dict = {}  # changes of all configurations


SMALL = Budget(2, 1, 2, 2, 1, ("pendulum-swingup",), 2, 1, 2, 1, dict(
    width=8, layers=1, num_envs=4, num_steps=16, num_minibatches=1, update_epochs=1, log_every=1))


# ---- Training and tests --------------------------------------------------------------------------
def make_config(trainer: str, task: str, budget: Budget, **fields: Any) -> Any:
    """Returns the Config of a task whose velocities, and changes of observations, are hidden."""
    hidden = {"env_kwargs": ("velocities=false",)} if envs.is_dmc(task) else {}
    config = experiment.import_trainer(trainer).Config(**dict(
        env=(task,), projection="none", observe_change=False, num_envs=64, num_steps=64,
        num_minibatches=8, log_every=1) | hidden | budget.sizes | fields)
    return dataclasses.replace(config, total_timesteps=budget.updates * config.steps_per_update)


def train_seeds(trainer: str, config: Any, seeds: int) -> tuple[np.ndarray, Any, Any]:
    """Returns (returns (seeds, tasks), see common.final_returns, Train, RunnerState of all)."""
    train = experiment.import_trainer(trainer).make_train(config)
    out = jax.jit(devices.over_agents(train))(jax.vmap(jax.random.PRNGKey)(jnp.arange(seeds)))
    return final_returns(out["metrics"], config.log_every), train, out["runner"]


def test(network: Any, trials: envs.Trials, seed: Any, params: Any, norm: Any) -> jax.Array:
    """Returns the mean return of one whole trial of every environment."""
    start_key, action_key = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(41), seed))

    def step(carry, t):
        state, observation, hidden, reset, alive, total = carry
        hidden, pi, _ = network.apply(params, norm, hidden, observation, reset, critic=False)
        action = pi.sample(seed=jax.random.fold_in(action_key, t))
        state, observation, transition = trials.step(state, action, t)
        total += alive * transition.reward
        alive &= ~transition.trial_end
        return (state, observation, hidden, transition.trial_end, alive, total), None

    yes = jnp.ones(trials.num_envs, bool)
    start = trials.reset(start_key, stagger=False)
    carry = *start, network.zero_state(yes.shape), yes, yes, jnp.zeros(trials.num_envs)
    return jax.lax.scan(step, carry, jnp.arange(trials.trial_length))[0][-1].mean()


# ---- Parts ---------------------------------------------------------------------------------------
def resumed(path: Path) -> Table:
    """Returns the table with the rows that are stored."""
    table = Table(path)
    table.rows = read_csv(path) if path.exists() else []
    return table


def stored(table: Table, **columns: str) -> bool:
    return any(columns.items() <= row.items() for row in table.rows)


def columns_of(returns: np.ndarray) -> dict[str, float]:
    """Returns the columns of a table for returns (seeds,)."""
    return mean_interval(returns) | {f"seed_{i}": float(x) for i, x in enumerate(returns)}


def irregular(budget: Budget, folder: Path) -> None:
    table = resumed(folder / "irregular.csv")
    for agent, (trainer, fields) in list(AGENTS.items())[:budget.agents]:
        for task in list(REPEATS)[-budget.tasks:]:
            if not stored(table, task=task, agent=agent):
                config = make_config(trainer, task, budget, action_repeat=REPEATS[task], **fields)
                returns = train_seeds(trainer, config, budget.seeds)[0][:, 0]
                table.add(task=task, agent=agent, **columns_of(returns),
                          steps=config.total_timesteps)


def transfer(budget: Budget, folder: Path) -> None:
    table = resumed(folder / "transfer.csv")
    for task in TRANSFER_TASKS[-budget.tasks:]:
        for agent, (trainer, repeats, dt, dts) in list(TRANSFER_AGENTS.items())[:budget.agents]:
            if not stored(table, task=task, agent=agent):
                config = make_config(trainer, task, budget, action_repeat=repeats, dt=dt)
                for row in test_rows(trainer, config, dts, budget):
                    table.add(task=task, agent=agent, **row)


def test_rows(trainer: str, config: Any, dts: tuple[str, ...], budget: Budget) -> list[dict]:
    """Trains an agent. Returns a row for each interval and use of durations in a test."""
    _, train, runner = train_seeds(trainer, config, budget.seeds)
    seeds = jnp.arange(budget.seeds)
    uniform = jax.tree.map(jnp.zeros_like, runner.params)  # all actions are equally likely
    kwargs = train_s5.make_trial_kwargs(config) | {"time_unit": np.mean(config.action_repeat)}
    found, random = {}, {}
    for interval in INTERVALS[:budget.intervals]:
        trials = envs.Trials(config.env, budget.trials, **kwargs | {"action_repeat": interval})
        for dt in dts:
            network = train.network.clone(config=dataclasses.replace(config, dt=dt))
            program = jax.jit(devices.over_agents(partial(test, network, trials)))
            found[interval, dt] = np.asarray(program(seeds, runner.params, runner.norm))
        random[interval] = float(program(seeds, uniform, runner.norm).mean())
    floor = dict.fromkeys(random, 0.0) if envs.is_dmc(config.env[0]) else random
    rows, trained = [], found[config.action_repeat, config.dt] - floor[config.action_repeat]
    for (interval, dt), returns in found.items():
        kept = mean_interval(100 * (returns - floor[interval]) / trained)
        kept = {"kept": kept["mean"], "kept_low": kept["low"], "kept_high": kept["high"]}
        rows.append(dict(trained=str(config.action_repeat), interval=str(interval), dt=dt, **kept,
                         random=random[interval], **columns_of(returns)))
    return rows


def projected(budget: Budget, folder: Path) -> None:
    table = resumed(folder / "projected.csv")
    for agent, (repeats, dt) in list(PROJECTED.items())[:budget.agents]:
        if not stored(table, agent=agent):
            config = train_s5.Config(env=budget.projected_tasks, action_repeat=repeats, dt=dt, memory="s5", sysid=True,
                                     total_timesteps=budget.projected_steps, **budget.sizes)
            returns, *_ = train_seeds("train_s5", config, budget.projected_seeds)
            table.add(agent=agent, **columns_of(returns.mean(1)), steps=budget.projected_steps,
                      **dict(zip(config.env, returns.mean(0).tolist())))


def cost(budget: Budget, folder: Path) -> None:
    """Of the agent of `projected`, one seed."""
    table, calls = resumed(folder / "cost.csv"), {"training iteration": [], "acting step": []}
    for dt in () if table.rows else ("recurrence", "none"):
        train = train_s5.make_train(train_s5.Config(
            env=budget.projected_tasks, action_repeat=RANDOM, dt=dt, memory="s5", sysid=True, **budget.sizes))
        runner = jax.jit(train.init)(jax.random.PRNGKey(0))
        inputs = runner.params, runner.norm, runner.hidden, runner.observation, runner.reset
        calls["training iteration"].append((jax.jit(train.update), runner))
        calls["acting step"].append((jax.jit(train.network.apply), *inputs))
    for what, pair in () if table.rows else calls.items():
        times = [[seconds(*call, repeats=1) for call in pair] for _ in range(budget.pairs)]
        recurrence, hidden = np.median(1e3 * np.array(times), 0).tolist()
        table.add(what=what, recurrence_ms=recurrence, hidden_ms=hidden, pairs=budget.pairs,
                  ratio=float(np.median([a / b for a, b in times])))


# ---- Tables and figure ---------------------------------------------------------------------------
def figure(_: Budget, folder: Path) -> None:
    tables = {path.stem: read_csv(path) for path in folder.glob("*.csv")}
    print_table(tables.get("irregular", []), ["task"])
    print_table(tables.get("transfer", []), ["task", "agent", "interval"])
    print_table(tables.get("projected", []), [])
    rows = tables.get("transfer", [])
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if tasks:
        plot_into(folder / "transfer.png", 1, len(tasks), lambda axis, _, i: draw(
            axis, tasks[i], [row for row in rows if row["task"] == tasks[i]]))


def print_table(rows: list[dict], same: list[str]) -> None:
    """Prints returns of every seed, and what is lost against the first row with equal columns `same`.

    Brackets are 95 % t intervals over seeds, which do not cover runs that collapse.
    """
    def bracket(low, high):
        return "" if np.isnan(float(low)) else f" [{float(low):.3g}, {float(high):.3g}]"

    best = {}
    for row in sorted(rows, key=lambda row: [row[name] for name in same]):
        seeds = np.array([float(x) for name, x in row.items() if name.startswith("seed_")])
        first = best.setdefault(tuple(row[name] for name in same), seeds)
        paired = "kept" in row  # tests of the same agents
        less = mean_interval(first - seeds) if paired else lost(first, seeds)
        names = [row[name] for name in ("task", "agent", "interval", "dt") if name in row]
        mean, low, high = list(less.values())[:3]
        kept = f"kept {float(row['kept']):.3g} %{bracket(row['kept_low'], row['kept_high'])}, " if paired else ""
        found = f"{float(row['mean']):.3g}{bracket(row['low'], row['high'])}, seeds {each(seeds)}"
        print(" | ".join(names), f"| {found}, {kept}lost {mean:.3g}{bracket(low, high)}")


def draw(axis: Any, task: str, rows: list[dict]) -> None:
    """Draws the return of every agent against the interval, trained points as stars."""
    places, agents = ["(1,)", "(2,)", "(3,)", "(4,)", str(RANDOM)], list(TRANSFER_AGENTS)
    for agent, dt in dict.fromkeys((row["agent"], row["dt"]) for row in rows):
        mine = sorted((row for row in rows if (row["agent"], row["dt"]) == (agent, dt)),
                      key=lambda row: places.index(row["interval"]))
        x = np.array([places.index(row["interval"]) for row in mine])
        columns = [[float(row[name]) for row in mine] for name in ("mean", "low", "high")]
        mean, low, high = map(np.array, columns)
        style = {"recurrence": "-", "none": ":", "input": "--"}[dt] + f"C{agents.index(agent)}"
        axis.errorbar(x, mean, np.nan_to_num([mean - low, high - mean]), fmt=style, capsize=2,
                      label=f"{agent}; dt: {dt}")
        trained = np.array([row["interval"] == row["trained"] for row in mine])
        axis.plot(x[trained], mean[trained], "*" + style[-2:], ms=11)
    axis.set_xticks(range(len(places)), [place.strip("(),") for place in places])
    axis.set(title=task, xlabel="environment steps of an action", ylabel="return")
    add_legend(axis)


PARTS = {part.__name__: part for part in (irregular, transfer, cost, projected, figure)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="a little of everything")
    parser.add_argument("--out", type=Path, help="folder (default: results/continuous_time)")
    options = parser.parse_args()
    default = RUNS / "continuous_time_small" if options.small else RESULTS / "continuous_time"
    for part in options.parts:
        PARTS[part](SMALL if options.small else Budget(), options.out or default)


if __name__ == "__main__":
    run_main(main)
