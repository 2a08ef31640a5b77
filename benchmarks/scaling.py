"""How training speeds up with cores that share the environments of a seed.

    python benchmarks/scaling.py                 # train_s5.py and train_lstm.py on 1, 2, 4, ... cores

Every row is a run of the trainer's default configuration, pinned to so many cores. `devices` share the
environments; one device on several cores is XLA's own use of them. Steps per second are the median over the
calls of the compiled function but the first. `over_one_core` divides them by those of one core.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS, ROOT, Table, make_parser, read_csv, run_main  # first: it finds the project


def steps_per_second(trainer: str, cores: list[int], devices: int, flags: list[str]) -> float:
    """Returns the environment steps per second of a run on these cores.

    ValueError: the run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{trainer}.py"), "--devices", str(devices), "--no-evaluate",
                   "--out", f"{folder}/run", *flags]
        variables = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        process = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
        os.sched_setaffinity(process.pid, cores)  # before it has started threads
        if process.wait():
            raise ValueError(f"{' '.join([trainer + '.py', *flags])} ended with an error, which is printed above")
        calls = read_csv(Path(folder, "run", "timing.csv"))[1:]
    return statistics.median(float(row["sps"]) for row in calls)


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--trainers", nargs="+", default=["train_s5", "train_lstm"])
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=["--total-timesteps", "3000000"],
                        help="of the trainers, last on the command line")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.csv")
    options = parser.parse_args()
    if not hasattr(os, "sched_setaffinity"):
        parser.error("this system does not let a program choose its cores")
    table, cores = Table(options.out), sorted(os.sched_getaffinity(0))
    counts = [2**i for i in range(len(cores).bit_length()) if 2**i <= len(cores)]
    for name in options.trainers:
        one = None
        for count, devices in sorted({(counts[-1], 1), *((count, count) for count in counts)}):
            speed = steps_per_second(name, cores[:count], devices, options.flags)
            one = one or speed
            table.add(trainer=name, cores=count, devices=devices, steps_per_s=round(speed),
                      over_one_core=speed / one)


if __name__ == "__main__":
    run_main(main)
