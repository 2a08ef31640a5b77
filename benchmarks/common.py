"""What the benchmarks share: command line, clock, table, figure.

Importing this file turns the compilation cache off.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

import devices  # noqa: E402
import experiment  # noqa: E402
import logs  # noqa: E402

jax.config.update("jax_compilation_cache_dir", None)  # else compile times are those of an earlier run


# ---- Command line --------------------------------------------------------------------------------
def run_main(main: Callable) -> None:
    """Calls main(). What a user can mend is one sentence and exit status 2; a bug is a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = mendable(error)
        if not sentence:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)


def mendable(error: Exception) -> str:
    """Returns a sentence for the user, or "" if the error is a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory; choose smaller sizes"
    if isinstance(error, ImportError):
        return f"{text}; the packages are listed in requirements.txt"
    if isinstance(error, (ValueError, OSError)) or "Unable to initialize backend" in text:
        return text
    return ""


def make_parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser that prints a benchmark's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def whole(least: int) -> Callable[[str], int]:
    """Returns a type of argparse: a whole number from `least` to 2^31 - 1."""
    def convert(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**31:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to 2^31 - 1, got {text!r}")
        return int(text)

    return convert


def positive(text: str) -> float:
    """A type of argparse: a number above 0, but not infinity."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


# ---- Clock ---------------------------------------------------------------------------------------
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


# ---- Table and figure ----------------------------------------------------------------------------
def mean_interval(x: np.ndarray) -> dict[str, float]:
    """Returns mean, 95 % t interval, minimum and number of x (n,) as columns of a table.

    A failed seed is NaN. The mean and the number leave it out; the minimum is then NaN.
    """
    x = np.asarray(x, float)
    mean, low, high = map(float, experiment.t_interval(x))
    return {"mean": mean, "low": low, "high": high, "worst": float(x.min()), "seeds": int((~np.isnan(x)).sum())}


def final_returns(metrics: dict[str, Any], log_every: int) -> np.ndarray:
    """Returns (seeds, tasks): mean return over the last tenth of training, NaN of seeds that failed.

    Args:
      metrics: of a whole run, (seeds, updates, ...).
      log_every: updates of a call, see logs.failed_by_call.
    """
    returns = np.asarray(metrics["return"])
    failed = logs.failed_by_call(np.asarray(metrics["skipped"]), log_every)
    last = experiment.nanmean(returns[:, -max(1, returns.shape[1] // 10):], 1)
    return np.where(failed[:, None], np.nan, last)


def each(x: Sequence[float]) -> str:
    """Returns x as text for a column of a table, "-" for a failed seed."""
    return " ".join("-" if np.isnan(value) else f"{value:.4g}" for value in x)


def device() -> str:
    """Returns what this process measures on, in words."""
    cpu = jax.default_backend() == "cpu"
    count, kind = (devices.num_cores(), "CPU core") if cpu else (jax.device_count(), jax.devices()[0].device_kind)
    return f"{count} {kind}{'s' * (count > 1)}, jax {jax.__version__}"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict[str, Any]], columns: Sequence[str] = ()) -> None:
    """Writes rows under the names of columns, by default those of the first row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns or rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Table:
    """A CSV file that is complete after every row. Rows are also printed, floats with four digits.

    ValueError: the file cannot be written. That is said before anything is measured.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        if path.suffix != ".csv" or path.is_dir():
            raise ValueError(f"--out must be a file whose name ends in .csv, got {str(path)!r}")
        try:
            path.parent.mkdir(exist_ok=True, parents=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise ValueError(f"cannot write {path} ({error.strerror}): choose another --out") from None
        print(device())

    def add(self, **row: Any) -> None:
        row = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        if not self.rows:
            if "worst" in row:
                print("low to high: 95 % t interval over seeds. No interval covers runs that collapse, and few seeds\n"
                      "rarely hold one: compare the worst")
            print(" ".join(f"{name:>17s}" for name in row))
        self.rows.append(row)
        print(" ".join(f"{value!s:>17s}" for value in row.values()), flush=True)
        write_csv(self.path, self.rows)


# One look for all figures: a colour for each memory, ours solid, a paper's dashed.
WORDS = {"s5": "S5", "lstm": "LSTM", "transformer": "attention", "self-attention": "attention", "none": "no memory"}
COLOURS = {"S5": "tab:blue", "LSTM": "tab:orange", "GRU": "tab:red", "attention": "tab:green", "no memory": "tab:gray"}
OURS = dict(marker="o", markersize=4, linewidth=1.8)
PAPER_STYLE = dict(linestyle="--", linewidth=1.2)
MILLIONS = "environment steps (all tasks), millions"


def numbers(rows: list[dict[str, Any]], *columns: str) -> list[np.ndarray]:
    """Returns each column as floats, NaN where a cell is empty."""
    return [np.array([float(row[column] or "nan") for row in rows]) for column in columns]


def log_axis(axis: Any, name: str, ticks: Sequence[float] = ()) -> None:
    """Makes the axis "x" or "y" logarithmic with plain numbers at `ticks`. Call it after drawing."""
    from matplotlib import ticker
    getattr(axis, f"set_{name}scale")("log")
    low, high = getattr(axis, f"get_{name}lim")()
    line = getattr(axis, f"{name}axis")
    decades = ticker.LogLocator(subs=(1,) if high > 300 * low else (1, 2, 5))
    line.set_major_locator(ticker.FixedLocator(ticks) if len(ticks) else decades)
    line.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1e4 else f"{x:g}"))
    line.set_minor_locator(ticker.NullLocator())


def add_legend(axis: Any) -> None:
    """Puts the legend below the axis."""
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)


def plot_into(path: Path, lines: int, columns: int, draw: Callable, title: str = "",
              size: tuple[float, float] = (4.4, 3.4), legend: int = 0) -> None:
    """Writes a PNG of lines x columns panels, each drawn by draw(axis, line, column).

    Args:
      title: device() where this process has measured time.
      size: inches of a panel.
      legend: number of columns of one legend for all panels, below them (0: none).
    """
    figure, axes = experiment.panels(lines, columns, *size)
    for line, column in np.ndindex(lines, columns):
        draw(axes[line, column], line, column)
    if title:
        figure.suptitle(title, fontsize=9)
    if legend:
        entries = {}
        for axis in axes.flat:
            entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=legend,
                      fontsize=8, frameon=False)
    dpi = min(140, 1400 / (columns * size[0]))  # at most 1,400 pixels wide
    figure.savefig(path, dpi=dpi)
    from PIL import Image  # comes with matplotlib
    Image.open(path).convert("RGB").quantize(dither=Image.Dither.NONE).save(path, optimize=True)  # half the size
