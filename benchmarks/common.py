"""What the benchmarks share: paths, clock, table, figure. Importing it turns the compilation cache off."""

import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

import experiment  # noqa: E402

jax.config.update("jax_compilation_cache_dir", None)  # else compile times are those of an earlier run


class Program(NamedTuple):
    """A compiled function. Call `run` with arguments of the shapes that it was compiled for."""

    run: Callable
    compile_s: float  # tracing included
    megabytes: float  # temporaries and outputs as XLA plans them, without the arguments


def compile_program(function: Callable, *args: Any) -> Program:
    """Returns jax.jit(function), compiled for args."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    compile_s = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Program(compiled, compile_s, (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 1e6)


def seconds(function: Callable, *args: Any, repeats: int, budget: float = float("inf")) -> float:
    """Returns the median wall time of a call, synchronised, after one call to warm up.

    It makes at least `repeats` calls and a tenth of a second of them, but none after `budget` seconds.
    """
    jax.block_until_ready(function(*args))
    times = []
    while (len(times) < repeats or sum(times) < 0.1) and (not times or sum(times) < budget):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def mean_interval(x: np.ndarray) -> dict[str, float]:
    """Returns mean, 95 % t interval, minimum and number of x (n,) as columns of a table."""
    x = np.asarray(x, float)
    mean, low, high = map(float, experiment.t_interval(x))
    return {"mean": mean, "low": low, "high": high, "worst": float(x.min()), "seeds": len(x)}


def device() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Table:
    """A CSV file that is complete after every row. Rows are also printed, floats with four digits."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        path.parent.mkdir(exist_ok=True, parents=True)
        print(device())

    def add(self, **row: Any) -> None:
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        if not self.rows:
            print(" ".join(f"{name:>17s}" for name in row))
        self.rows.append(row)
        print(" ".join(f"{value!s:>17s}" for value in row.values()), flush=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)


def plot_into(path: Path, lines: int, columns: int, draw: Callable) -> None:
    """Writes a PNG of lines x columns panels, each drawn by draw(axis, line, column)."""
    figure, axes = experiment.panels(lines, columns, 4.4, 3.4)
    for line, column in np.ndindex(lines, columns):
        draw(axes[line, column], line, column)
    figure.suptitle(device(), fontsize=9)
    figure.savefig(path, dpi=120)
