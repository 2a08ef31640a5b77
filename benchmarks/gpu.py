"""A quarter of an hour on a GPU: runs the measurements that are missing, most valuable first.

    python benchmarks/gpu.py --list                       # jobs, expected seconds, what each answers
    python benchmarks/gpu.py --minutes 9 --out DIR        # runs what fits into nine minutes
    python benchmarks/gpu.py --small --out DIR            # everything tiny, on any machine

A job is missing while there is no folder results/gpu/JOB. Three jobs run side by side, so that all compile at
once; a job that measures speed runs alone. A job starts only if its expected seconds are left. What still
runs at the end is stopped and kept as JOB-unfinished. After each job all folders so far, without subfolders,
are packed into DIR/gpu-1.tar.gz, gpu-2.tar.gz, ... of at most 15 MB each: the logs and agent.msgpack of a run,
the table of a benchmark, job.json (command, card, seconds). To unpack: tar xzf gpu-1.tar.gz -C results/gpu
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from common import RESULTS, ROOT, make_parser, positive, run_main  # first: it finds the project

LARGEST = 15e6  # bytes of an archive
BESIDE = 3  # jobs at a time
RESERVE = 15  # seconds for stopping and packing
TINY = ("--env", "CartPole-v1", "--num-envs", "8", "--num-steps", "16", "--num-minibatches", "2", "--width",
        "8", "--layers", "1", "--log-every", "2", "--total-timesteps", "512")
SEEDS = ("--env", "CartPole-v1", "--num-envs", "8", "--seeds", "2", "--total-timesteps", "1000")
PAPER = ("--memory", "s5", "--no-privileged-critic")
SYSID = ("--memory", "s5", "--sysid")
ONE_TASK = ("--env", "cartpole-swingup", "--projection", "none", "--num-envs", "1024",
            "--total-timesteps", "30000000", "--num-seeds", "3")


class Job(NamedTuple):
    """One process. The expected seconds are those of an H200, compilation included."""

    name: str
    question: str
    seconds: int
    script: str
    flags: tuple[str, ...]
    small: tuple[str, ...] = TINY  # appended with --small; the last value of a flag counts
    alone: bool = False  # measures speed
    xla_flags: str = ""

    def command(self, small: bool) -> list[str]:
        """The script and its flags, without those that say where to write."""
        return [self.script, *self.flags, *(self.small if small else ())]

    def out(self, folder: Path) -> list[str]:
        if self.script.startswith("benchmarks/"):
            return ["--out", str(folder / "table.csv")]
        return ["--out", str(folder), "--no-evaluate", "--checkpoint-minutes", "2"]


def learn(name: str, question: str, *flags: str, script: str = "train_s5.py", millions: int = 300,
          rate: float = 0.8) -> Job:
    """A training run of 64 minibatches. `rate`: million steps per second, beside other runs."""
    flags = (*flags, "--num-minibatches", "64", "--total-timesteps", f"{millions}000000")
    return Job(name, question, round(110 + millions / rate), script, flags)


def speed(name: str, question: str, num_envs: int, *flags: str, xla_flags: str = "") -> Job:
    """Ten iterations, alone; read the steps per second in timing.csv."""
    flags = ("--num-envs", str(num_envs), "--log-every", "2", "--total-timesteps", str(2560 * num_envs), *flags)
    return Job(name, question, 160, "train_s5.py", flags, alone=True, xla_flags=xla_flags)


def memory(name: str, question: str, *flags: str, script: str = "train_s5.py", millions: int = 100, seeds: int = 3,
           seconds: int = 440) -> Job:
    """A training run of seeds side by side, with the sizes of a network on a CPU."""
    sizes = ("--num-envs", "1536", "--width", "64", "--num-seeds", str(seeds),
             "--total-timesteps", f"{millions}000000")
    if script == "train_s5.py":  # a CPU's sizes of the LSTM follow from the width
        sizes = ("--layers", "3", "--state-size", "32", *sizes)
    return Job(name, question, seconds, script, (*flags, *sizes))


BUFFERS = "--xla_gpu_enable_command_buffer="  # nothing: off
JOBS = (
    memory("vector_memory", "what the default memory learns in 100 million steps", seconds=611),
    memory("none", "what sysid alone learns, hidden state reset in every step", *SYSID, "--reset", "step"),
    memory("s5", "what S5 adds to sysid", *SYSID),
    memory("lstm", "what an LSTM learns without sysid", script="train_lstm.py", seconds=500),
    memory("plain_none", "what no memory learns without sysid", "--memory", "s5", "--reset", "step"),
    memory("plain_s5", "what S5 learns without sysid", "--memory", "s5"),
    memory("plain_s5_300", "what it learns in 300 million steps", "--memory", "s5", millions=300, seconds=600),
    memory("vector_300", "what the default memory learns in 300 million steps", millions=300, seeds=2, seconds=650),
    learn("vector64", "what the default agent learns with the sizes of a GPU", rate=0.6),
    learn("s5_64", "what S5 with sysid learns with these sizes", *SYSID),
    learn("none64", "what sysid alone learns with these sizes", *SYSID, "--reset", "step"),
    learn("plain64", "what the paper's agent learns: S5 without additions", *PAPER),
    learn("lstm64", "what an LSTM learns", script="train_lstm.py"),
    learn("plain_lstm64", "what the paper's LSTM learns", "--no-privileged-critic", script="train_lstm.py"),
    learn("plain_none64", "what the paper's agent learns without memory", *PAPER, "--reset", "step"),
    learn("small_batch", "do fewer environments learn more per step?", "--num-envs", "2304", millions=200),
    Job("float32", "precision, unchanged: three seeds of one task", 150, "train_s5.py", ONE_TASK),
    Job("bfloat16", "does bfloat16 change what is learned?", 150, "train_s5.py", (*ONE_TASK, "--dtype", "bfloat16")),
    speed("speed_1536", "steps per second with 1,536 environments", 1536),
    speed("speed_6144", "steps per second with 6,144 environments", 6144),
    speed("speed_24576", "steps per second with 24,576 environments", 24576),
    speed("speed_bfloat16", "steps per second with bfloat16 products", 6144, "--dtype", "bfloat16"),
    speed("speed_no_buffers", "speed without command buffers", 6144, xla_flags=BUFFERS),
    speed("speed_buffers", "speed with command buffers for loops and conditionals too", 6144,
          xla_flags=BUFFERS + "FUSION,CUBLAS,CUDNN,CUBLASLT,CUSTOM_CALL,CONDITIONAL,WHILE"),
    Job("parts_of_training", "environment, acting and update; planned memory; compiling", 420, "benchmarks/train.py",
        ("--trainers", "train_s5", "--vary"), ("--env", "CartPole-v1", "--set", "num_envs=8"), alone=True),
    Job("seeds_cartpole", "8, 32 and 128 seeds side by side against one after another", 300, "benchmarks/seeds.py",
        ("--seeds", "8", "32", "128"), SEEDS, alone=True),
    Job("seeds_dmcontrol", "the same on a DMControl task", 400, "benchmarks/seeds.py",
        ("--seeds", "8", "32", "128", "--env", "cartpole-swingup", "--total-timesteps", "1000000"), SEEDS, alone=True),
    Job("physics", "physics against MJX and C on a GPU", 300, "benchmarks/physics.py",
        ("--tasks", "cartpole-swingup", "finger-spin", "--batches", "8192", "--mjx-batch", "8192", "--steps", "65536"),
        ("--tasks", "pendulum-swingup", "--batches", "4", "--mjx-batch", "0", "--steps", "64"), alone=True),
)


def card() -> str:
    """Returns the name of the GPU, without starting JAX on it."""
    if not shutil.which("nvidia-smi"):
        return "CPU"
    return subprocess.check_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True).strip()


class Running:
    """A started job."""

    def __init__(self, job: Job, work: Path, small: bool):
        self.job, self.folder, self.begin = job, work / job.name, time.monotonic()
        self.folder.mkdir(parents=True)
        self.command = job.command(small)
        variables = os.environ | ({"XLA_FLAGS": job.xla_flags} if job.xla_flags else {})
        if not job.alone:
            variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(0.9 / BESIDE)
        with (self.folder / "log.txt").open("w") as log:
            command = [sys.executable, *self.command, *job.out(self.folder)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log)
        print(f"{job.name}: started", flush=True)

    def end(self) -> Path:
        """Stops the process if it still runs, writes job.json and returns the folder."""
        code = self.process.poll()
        if code is None:
            self.process.kill()  # what it has written so far is complete
            self.process.wait()
        state = "stopped" if code is None else f"exit status {code}"
        took = round(time.monotonic() - self.begin)
        print(f"{self.job.name}: {state} after {took} s", flush=True)
        record = {"question": self.job.question, "command": self.command, "xla_flags": self.job.xla_flags,
                  "card": card(), "jax": jax.__version__, "seconds": took, "state": state}
        (self.folder / "job.json").write_text(json.dumps(record, indent=1) + "\n")
        name = self.job.name if code == 0 else f"{self.job.name}-unfinished"
        return self.folder.rename(self.folder.with_name(name))


def pack(folders: list[Path], out: Path) -> None:
    """Writes the files in all folders into archives."""
    archives, size = [[]], 0
    for path in (path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()):
        length = path.stat().st_size
        if length > LARGEST:
            print(f"{path.parent.name}/{path.name} is too large and stays behind")
            continue
        if size + length > LARGEST:
            archives.append([])
            size = 0
        archives[-1].append(path)
        size += length
    for number, paths in enumerate(archives, 1):
        with tarfile.open(out / f"gpu-{number}.tar.gz", "w:gz") as archive:
            for path in paths:
                archive.add(path, f"{path.parent.name}/{path.name}")


def run(jobs: list[Job], deadline: float, work: Path, out: Path, small: bool) -> list[Path]:
    """Runs the jobs that fit until the deadline (time.monotonic) and returns their folders."""
    waiting, running, done = list(jobs), [], []
    while waiting or running:
        left = deadline - time.monotonic()
        for one in [one for one in running if one.process.poll() is not None or left < 0]:
            running.remove(one)
            done.append(one.end())
            pack(done, out)
        fits = [job for job in waiting if job.seconds <= left]
        alone = any(one.job.alone for one in running) or fits and fits[0].alone
        if fits and (not running or len(running) < BESIDE and not alone):
            waiting.remove(fits[0])
            running.append(Running(fits[0], work, small))
        elif not running:
            break
        time.sleep(0.2)
    return done


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=positive, default=9.0, help="that the whole call may take")
    parser.add_argument("--out", type=Path, default=Path("gpu_out"), help="folder of the archives")
    parser.add_argument("--list", action="store_true", help="say what there is and what is missing")
    parser.add_argument("--small", action="store_true", help="every job tiny, whatever is done already")
    options = parser.parse_args()
    missing = [job for job in JOBS if not (RESULTS / "gpu" / job.name).is_dir()]
    if options.list:
        for job in JOBS:
            state = "missing" if job in missing else "done"
            print(f"{job.name:18s} {state:8s} {job.seconds:4d} s{' alone' * job.alone:6s}  {job.question}")
        return
    jobs = [job._replace(seconds=0) for job in JOBS] if options.small else missing
    deadline = time.monotonic() + 60 * options.minutes - RESERVE
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        done = run(jobs, deadline, Path(work), options.out, options.small)
    if not done:
        print("no job is missing, or none fits into the time")
    sys.exit(any("unfinished" in path.name for path in done))


if __name__ == "__main__":
    run_main(main)
