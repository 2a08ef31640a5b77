"""What accelerator.sh runs: recurrences that agree, counts of kernels and bytes, lines with valid flags."""

import argparse
import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiment
import train_s5

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


# ---- The recurrence ----------------------------------------------------------------------------------------

def test_the_four_scans_agree_with_a_plain_loop(load):
    scan = load("scan")
    a, b, x0, reset, dx = scan.values(24, 3, 8)
    reset = reset.at[jnp.array([0, 5, 8, 16, 17]), 1].set(True)  # inside chunks and at their starts
    found = {name: jax.jit(scan.forward_backward(scan.recurrence(name, 8)))(a, b, x0, reset, dx)
             for name in scan.SCANS}
    x, plain = np.asarray(x0), []
    for t in range(24):
        x = a * np.where(reset[t][:, None], 0, x) + b[t]
        plain.append(x)
    for name in scan.SCANS:
        np.testing.assert_allclose(found[name][0], plain, rtol=1e-4, atol=1e-5)
        for mine, parallel in zip(found[name], found["parallel"], strict=True):
            np.testing.assert_allclose(mine, parallel, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(found["chunked"][3][1]).max()) == 0  # the second lane's x0 is forgotten at once
    with pytest.raises(ValueError, match="does not divide"):
        scan.chunked_recurrence(a, b, x0, reset, 7)


def test_the_floor_counts_every_array_once(load):
    scan = load("scan")
    a, b, x0, reset, dx = scan.shapes(16, 4, 8)
    both = scan.forward_backward(scan.recurrence("parallel", 8))
    x, _, db, dx0 = jax.eval_shape(both, a, b, x0, reset, dx)

    def size(*arrays):
        return sum(v.size * v.dtype.itemsize for v in arrays)

    assert scan.least_bytes("forward", 16, 4, 8) == size(b, reset, x0, x)
    assert (scan.least_bytes("forward+backward", 16, 4, 8)
            == size(b, reset, x0, x) + size(dx, x, reset, db, x0, dx0))
    assert [(v.shape, v.dtype) for v in scan.values(16, 4, 8)] == [(v.shape, v.dtype)
                                                                   for v in (a, b, x0, reset, dx)]


# ---- The count of kernels ----------------------------------------------------------------------------------

MODULE = """HloModule m, is_scheduled=true

%fused (p0: f32[13,4], p1: s32[], p2: f32[4]) -> f32[13,4] {
  %p0 = f32[13,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[4]{0} parameter(2)
  %sine = f32[4]{0} sine(%p2)
  %row = f32[1,4]{1,0} bitcast(%sine)
  %zero = s32[] constant(0)
  ROOT %put = f32[13,4]{1,0} dynamic-update-slice(%p0, %row, %p1, %zero)
}

%one (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %copy.1 = f32[4]{0} copy(%q)
}

%two (q.1: f32[4]) -> f32[4] {
  %q.1 = f32[4]{0} parameter(0)
  %copy.2 = f32[4]{0} copy(%q.1)
  ROOT %copy.3 = f32[4]{0} copy(%copy.2)
}

%inner (v: (s32[], c64[4])) -> (s32[], c64[4]) {
  %v = (s32[], c64[4]{0}) parameter(0)
  %v.0 = s32[] get-tuple-element(%v), index=0
  %v.1 = c64[4]{0} get-tuple-element(%v), index=1
  %call.1 = c64[4]{0} custom-call(%v.1), custom_call_target="library"
  ROOT %out = (s32[], c64[4]{0}) tuple(%v.0, %call.1)
}

%body (s: (s32[], /*index=1*/f32[13,4], f32[4], (s32[], c64[4]), pred[])) -> (s32[], f32[13,4]) {
  %s = (s32[], /*index=1*/f32[13,4]{1,0}, f32[4]{0}, (s32[], c64[4]{0}), pred[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %rows = f32[13,4]{1,0} get-tuple-element(%s), index=1
  %x = f32[4]{0} get-tuple-element(%s), index=2
  %pair = (s32[], c64[4]{0}) get-tuple-element(%s), index=3
  %flag = pred[] get-tuple-element(%s), index=4
  %store = f32[13,4]{1,0} fusion(%rows, %i, %x), kind=kLoop, calls=%fused
  %nested = (s32[], c64[4]{0}) while(%pair), condition=%until, body=%inner, backend_config=K3
  %chosen = f32[4]{0} conditional(%flag, %x, %x), true_computation=%two, false_computation=%one
  ROOT %next = (s32[], f32[13,4]{1,0}) tuple(%i, %store)
}

%until (u: (s32[])) -> pred[] {
  %u = (s32[]) parameter(0)
  %u.0 = s32[] get-tuple-element(%u), index=0
  ROOT %less = pred[] compare(%u.0, %u.0), direction=LT
}

ENTRY %main (start: (s32[], f32[13,4], f32[4], (s32[], c64[4]), pred[])) -> (s32[], f32[13,4]) {
  %start = (s32[], f32[13,4]{1,0}, f32[4]{0}, (s32[], c64[4]{0}), pred[]) parameter(0)
  %loop = (s32[], f32[13,4]{1,0}) while(%start), condition=%until, body=%body, backend_config=K13
  ROOT %open = (s32[], f32[13,4]{1,0}) while(%loop), condition=%until, body=%inner
}
"""


def test_kernels_and_bytes_of_a_program_written_by_hand(load):
    hlo = load("hlo")
    known = re.sub(r"K(\d+)", r'{"known_trip_count":{"n":"\1"}}', MODULE)
    computations, entry = hlo.parse(known)
    # a turn of the loop: the store (index and row read, row written), three library calls, one copy or two
    moved = (4 + 16 + 16) + 3 * (32 + 32)
    assert hlo.loop_body(computations, 13) == "body" and entry == "main"
    assert hlo.count(computations, "body") == (1 + 3 + 1, 1, 0, moved + 32)
    assert hlo.count(computations, "body", max) == (1 + 3 + 2, 1, 0, moved + 64)
    started, _ = hlo.parse(known.replace(" fusion(", " fusion-start("))  # jax 0.11 lets a store run beside other work
    assert hlo.count(started, "body") == hlo.count(computations, "body")
    # the loop without a known count adds its body and its condition once
    assert hlo.count(computations, "main") == (13 * 5 + 2, 3, 1, 13 * (moved + 32) + 64 + (1 + 8))
    assert hlo.shape_bytes("(s32[], /*index=1*/bf16[2,3]{1,0}, pred[7], c64[2])") == 4 + 12 + 7 + 16


def test_kernels_of_a_compiled_loop(load):
    hlo = load("hlo")
    weights, x = jnp.ones((64, 64)), jnp.ones((8, 64))

    def compiled(turns):
        def step(x, _):
            return jnp.tanh(x @ weights) @ weights.T, None
        return jax.jit(lambda x: jax.lax.scan(step, x, None, turns)[0]).lower(x).compile()

    counts, costs = [], []
    for turns in (13, 26):
        program = compiled(turns)
        computations, entry = hlo.parse(program.as_text())
        body = hlo.count(computations, hlo.loop_body(computations, turns))
        assert body.kernels >= 3 and not body.unknown  # two products with a nonlinearity between them
        assert body.bytes >= (2 * 64 * 64 + 4 * 8 * 64) * 4
        counts.append((hlo.count(computations, entry), body))
        costs.append(program.cost_analysis()["flops"])
    (short, body), (long, same) = counts
    assert body == same and long.kernels - short.kernels == 13 * body.kernels
    assert long.bytes - short.bytes == 13 * body.bytes and (short.loops, short.unknown) == (1, 0)
    assert costs[0] == costs[1]  # why loops are multiplied out here: cost_analysis() sees one turn


def test_bytes_without_loops_are_those_of_xla(load):
    hlo = load("hlo")
    function = jax.jit(lambda x, y: jnp.sin(x + y).sum(0))
    program = function.lower(jnp.ones((64, 32)), jnp.ones(32)).compile()
    computations, entry = hlo.parse(program.as_text())
    np.testing.assert_allclose(hlo.count(computations, entry).bytes,
                               program.cost_analysis()["bytes accessed"], rtol=0.02)


def test_a_gpu_that_is_not_here_needs_its_compiler(load, monkeypatch):
    hlo = load("hlo")

    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")
    monkeypatch.setattr(hlo.topologies, "get_topology_desc", missing)
    with pytest.raises(SystemExit, match="jax.cuda13"):
        hlo.describe(FOLDER / "h100.txtpb")


# ---- The script --------------------------------------------------------------------------------------------

def accelerator(out, **environment):
    """(exit status, printed lines)."""
    clean = {k: v for k, v in os.environ.items() if k not in ("SMALL", "FULL", "LIMIT")}
    done = subprocess.run(["bash", str(FOLDER / "accelerator.sh")], capture_output=True, text=True,
                          env=clean | {"OUT": str(out), "PYTHON": sys.executable} | environment)
    return done.returncode, (done.stdout + done.stderr).splitlines()


class Parsed(Exception):
    """The flags were understood."""


def test_every_line_has_flags_that_its_script_knows(load, tmp_path, monkeypatch):
    """All lines at full size with a python that does nothing; their flags go to the real parsers."""
    status, lines = accelerator(tmp_path, PYTHON="true", FULL="1")
    assert status == 1 and lines[-1] == "failed: full_copy"  # nothing else can fail
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *args):
        parse(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    seen = []
    for line in lines:
        words = shlex.split(line.partition(": ")[2]) if line.startswith("== ") else []
        script, flags = [*words, "", ""][1], words[2:]
        if script == "train_s5.py":
            config, _ = experiment.parse_flags(train_s5.Config, args=["--preset", "accelerator", *flags])
            assert config.num_updates > 0
        elif script.startswith("benchmarks/"):
            monkeypatch.setattr(sys, "argv", words[1:])
            with pytest.raises(Parsed):
                load(Path(script).stem).main()
        else:
            continue
        seen.append(script)
    assert set(seen) == {"train_s5.py", *(f"benchmarks/{name}.py" for name in
                                          ("train", "physics", "kernels", "scan", "sequence", "seeds"))}
    assert seen.count("train_s5.py") == 9


def test_failures_are_named_and_do_not_stop_the_rest(tmp_path):
    status, lines = accelerator(tmp_path, PYTHON="false", SMALL="1")
    assert status == 1
    failed = lines[-1].removeprefix("failed: ").split()
    assert {"device", "train_short", "kernels", "scan", "precision"} <= set(failed)
    status, lines = accelerator(tmp_path, PYTHON="false")
    assert status == 2 and lines == ["jax finds no accelerator here; SMALL=1 runs anywhere"]


def test_small(tmp_path):
    status, lines = accelerator(tmp_path, SMALL="1", JAX_PLATFORMS="cpu")
    assert status == 0 and lines[-1] == f"all done: {tmp_path}", "\n".join(lines)
    tables = {}
    for path in tmp_path.glob("*.csv"):
        with path.open(newline="") as file:
            tables[path.stem] = list(csv.DictReader(file))
    assert tables.keys() == {"short", "kernels", "scan", "precision"}
    assert [row["part"] for row in tables["kernels"]] == ["environment", "acting", "collect", "update"]
    environment, acting, collect, update = (int(row["kernels"]) for row in tables["kernels"])
    assert 0 < environment < collect and 0 < acting < collect and 16 * collect < update
    assert {row["run"] for row in tables["precision"]} == {"float32", "tensorfloat32", "bfloat16"}
    assert all(float(row["steps_per_s"]) > 0 and float(row["final_return"]) > 0
               for row in tables["precision"] + tables["short"])
    assert len(tables["scan"]) == 16
    assert all(float(row[k]) > 0 for row in tables["scan"] for k in ("times_floor", "times_bytes", "kernels"))
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")
