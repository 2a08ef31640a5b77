"""benchmarks/continuous_time.py runs at tiny sizes, and its tables say what was measured."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import envs
import experiment
import train_s5


@pytest.fixture
def module(load):
    return load("continuous_time")


def untrained(trainer, config, seeds):
    """As train_seeds, without training: the policy is made to differ much between hidden states."""
    train = experiment.import_trainer(trainer).make_train(config)
    runner = jax.jit(jax.vmap(train.init))(jax.vmap(jax.random.PRNGKey)(jnp.arange(seeds)))
    params = jax.tree.map(jnp.copy, runner.params)
    params["params"]["policy_head"]["kernel"] *= 1000.0
    return np.zeros((seeds, 1)), train, runner._replace(params=params)


def test_it_runs_small(module, tmp_path, monkeypatch, capsys):
    """One agent is trained on one task."""
    flags = ["--small", "--out", str(tmp_path), "--parts", "irregular", "figure"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    module.main()
    [row] = module.read_csv(tmp_path / "irregular.csv")
    assert row["task"] == "popgym:StatelessCartPoleHard" and row["seeds"] == "2"
    assert "StatelessCartPoleHard | S5, dt in recurrence" in capsys.readouterr().out


def test_agents_act_at_other_intervals(module, tmp_path, monkeypatch):
    """At the interval of training durations are 1, and hiding them changes nothing."""
    monkeypatch.setattr(module, "train_seeds", untrained)
    module.transfer(module.SMALL, tmp_path)
    rows = module.read_csv(tmp_path / "transfer.csv")
    found = {(row["interval"], row["dt"]): row for row in rows}
    assert len(found) == len(rows) == 4
    assert {row["trained"] for row in rows} == {"(2,)"}
    for dt in ("recurrence", "none"):
        assert float(found["(2,)", dt]["kept"]) == pytest.approx(100)
        assert -1 < float(found["(2,)", dt]["mean"]) < 1
    same, other = ([found[interval, dt]["seed_0"] for dt in ("recurrence", "none")]
                   for interval in ("(2,)", str(module.RANDOM)))
    assert same[0] == same[1] and other[0] != other[1]
    module.figure(module.SMALL, tmp_path)
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_start_skips_finished_jobs(module, tmp_path, monkeypatch):
    """The first start is killed in its third job."""
    trained = []

    def train_seeds(trainer, config, seeds):
        if len(trained) == killed_after:
            raise KeyboardInterrupt
        trained.append((trainer, config.env, config.dt))
        return np.arange(seeds)[:, None] + np.full(len(config.env), 1.0), None, None

    monkeypatch.setattr(module, "train_seeds", train_seeds)
    killed_after = 2
    with pytest.raises(KeyboardInterrupt):
        module.irregular(module.Budget(), tmp_path)
    killed_after = None
    module.irregular(module.Budget(), tmp_path)
    module.irregular(module.Budget(), tmp_path)
    assert len(trained) == 20  # each once
    rows = module.read_csv(tmp_path / "irregular.csv")
    assert len(rows) == 20
    assert {(row["mean"], row["worst"], row["seed_4"]) for row in rows} == {("3.0", "1.0", "5.0")}
    module.projected(module.Budget(), tmp_path)
    assert len(module.read_csv(tmp_path / "projected.csv")) == 4
    module.figure(module.Budget(), tmp_path)


def test_agents_of_a_task_have_equal_budgets_and_observe_positions_only(module):
    positions = {"pendulum-swingup": 2, "cartpole-swingup": 3, "popgym:StatelessPendulumHard": 2,
                 "popgym:StatelessCartPoleHard": 2}
    for task, repeats in module.REPEATS.items():
        configs = [
            module.make_config(trainer, task, module.Budget(), action_repeat=repeats, **fields)
            for trainer, fields in module.AGENTS.values()]
        assert len({(c.total_timesteps, c.num_updates, c.steps_per_update) for c in configs}) == 1
        assert 1e6 < configs[0].total_timesteps < 3e6
        trials = envs.Trials((task,), 2, **train_s5.make_trial_kwargs(configs[0]))
        assert trials.obs_size == positions[task] and not trials.observe_change


def test_costs_are_ratios_of_pairs(module, tmp_path, monkeypatch):
    """Times double from pair to pair, as beside other work."""
    times = iter([0.2, 0.1, 0.3, 0.2, 0.003, 0.002, 0.006, 0.004])
    monkeypatch.setattr(module, "seconds", lambda *call, repeats: next(times))
    module.cost(module.SMALL, tmp_path)
    iteration, acting = module.read_csv(tmp_path / "cost.csv")
    assert (iteration["ratio"], acting["ratio"]) == ("1.75", "1.5")
    assert (iteration["recurrence_ms"], iteration["hidden_ms"]) == ("250.0", "150.0")
    module.cost(module.SMALL, tmp_path)  # is not measured again
