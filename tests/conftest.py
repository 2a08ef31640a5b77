"""Tests import the top-level files, run on the CPU and share one cache of compiled functions."""

import functools
import importlib.util
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MUJOCO_GL", "disable")
# most programs of the tests run once: they compile three times as fast so, in started processes too
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
FLAGS = "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_enable_concurrency_optimized_scheduler=false"
if version("jaxlib").startswith("0.10."):  # later versions have no such flag
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jax-icrl-tests"))


@pytest.fixture
def optimised():
    """Compiles as users do: for programs that run long, and for bounds that depend on the last bits."""
    import jax  # after the settings above

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def compiled_once():
    """Compiles once for equal trainer, configuration, devices and kind of keys."""
    import jax  # after the settings above

    import devices
    make_program = devices.make_program

    @functools.cache
    def shared(prng_impl, *args):
        program = make_program(*args)
        return program._replace(compile=functools.cache(program.compile))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "make_program", lambda *args: shared(jax.config.jax_default_prng_impl, *args))
        yield


@pytest.fixture(scope="module")
def whole(compiled_once, tmp_path_factory):
    """The folder of a finished run of the toy with two seeds."""
    import toy_runs  # after the settings above
    return toy_runs.train(tmp_path_factory.mktemp("runs") / "whole", evaluate=False)


@pytest.fixture
def no_figures(monkeypatch):
    import logs  # after the settings above
    monkeypatch.setattr(logs, "plot_training", lambda this: None)


@pytest.fixture
def load(monkeypatch):
    """load(name): the benchmark as a module. They turn the compilation cache off, here only for a moment."""
    import jax  # after the settings above

    def load(name):
        monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    cache = jax.config.jax_compilation_cache_dir
    yield load
    jax.config.update("jax_compilation_cache_dir", cache)
