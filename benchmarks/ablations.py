"""What single choices are worth, each against the same baseline: small tables of final returns over seeds.

    python benchmarks/ablations.py                                  # on MemoryChain, length 32
    python benchmarks/ablations.py --env reacher-easy --total-timesteps 2000000
    python benchmarks/ablations.py --only baseline "never reset"

Variants that do not apply (projections of what is not projected) are left out. The score and its interval are
those of memory_chain.py.
"""

import argparse
from pathlib import Path

from common import RESULTS, Table  # first: it finds the project

import envs
import experiment
import train_s5
from memory_chain import mean_interval, train_seeds

VARIANTS = {
    "baseline": {}, "learned initial state": {"initial_state": "learned"},
    "random initial state": {"initial_state": "random"}, "parallel scan": {"scan": "parallel"},
    "never reset": {"memory": "unreset"}, "memoryless": {"memory": "none"},
    "three episodes in a trial": {"episodes_per_trial": 3}}
PROJECTIONS = {
    "orthogonal": {"projection": "orthogonal"}, "Rademacher": {"projection": "rademacher"},
    "unprojected": {"projection": "identity"}, "6 outputs": {"obs_size": 6}, "24 outputs": {"obs_size": 24}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="MemoryChain-bsuite")
    parser.add_argument("--env-kwargs", nargs="*", help="default: memory_length=32 for MemoryChain")
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--total-timesteps", type=int, default=200_000)
    parser.add_argument("--width", type=int, help="default: 32 for MemoryChain, else the trainer's")
    parser.add_argument("--out", type=Path, default=RESULTS / "ablations.csv")
    options = parser.parse_args()
    chain = options.env == "MemoryChain-bsuite"
    kwargs = options.env_kwargs if options.env_kwargs is not None else ["memory_length=32"] * chain
    base = dict(env=(options.env,), env_kwargs=tuple(kwargs), total_timesteps=options.total_timesteps,
                num_envs=32)
    base |= dict(lr=3e-3, gae_lambda=0.5, width=32) if chain else dict(num_envs=64)
    base |= {"width": options.width} if options.width else {}
    variants = VARIANTS | (PROJECTIONS if envs.is_dmc(options.env) else {})
    table = Table(options.out)
    for name in options.only or variants:
        if name not in variants:
            parser.error(f"no variant {name!r}; there are {', '.join(variants)}")
        config = experiment.preset(train_s5.Config, "cpu", **(base | variants[name]))  # the same on every machine
        returns = train_seeds(train_s5, config, options.seeds)["returns"]
        table.add(variant=name.replace(" ", "_"), env=options.env, **mean_interval(returns),
                  steps=config.num_updates * config.steps_per_update)


if __name__ == "__main__":
    main()
