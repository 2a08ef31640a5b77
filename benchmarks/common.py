"""What the benchmarks share: clock, table, picture. Importing it turns the compilation cache off."""

import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from hlo import compile_for  # noqa: E402

jax.config.update("jax_compilation_cache_dir", None)  # else compile times would be those of an earlier run


class Program(NamedTuple):
    """A compiled function. Call it with the arguments that it was compiled for."""

    run: Any
    compile_s: float  # tracing included
    megabytes: float  # temporaries and outputs, as XLA plans them; arguments are not counted


def compile_program(function, *args, target=None):
    """Program of jax.jit(function) for args, for this device or a `target`. The megabytes are known before it runs."""
    start = time.perf_counter()
    compiled = compile_for(target, function, args) if target else jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Program(compiled, compile_s, (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6)


def seconds(function, *args, repeats, budget=float("inf")):
    """Median wall time of a call, synchronised, after one to warm up.

    At least `repeats` calls and a tenth of a second of them, but no further one after `budget` seconds.
    """
    jax.block_until_ready(function(*args))
    times = []
    while (len(times) < repeats or sum(times) < 0.1) and (not times or sum(times) < budget):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def device():
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


class Table:
    """Rows printed as they come and kept in a CSV file, which is whole after every row."""

    def __init__(self, path):
        self.path, self.rows = path, []
        path.parent.mkdir(exist_ok=True, parents=True)
        print(device())

    def add(self, **row):
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        if not self.rows:
            print(" ".join(f"{name:>17s}" for name in row))
        self.rows.append(row)
        print(" ".join(f"{value!s:>17s}" for value in row.values()), flush=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def plot_into(path, rows, columns, draw):
    """PNG of rows x columns panels, each made by draw(axis, row, column)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False)
    for i in range(rows):
        for j in range(columns):
            draw(axes[i, j], i, j)
            axes[i, j].grid(alpha=0.3)
    figure.suptitle(device(), fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
