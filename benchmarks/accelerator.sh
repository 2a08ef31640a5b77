#!/usr/bin/env bash
# Every measurement on an accelerator, on a bare CUDA machine with jax[cuda13] and requirements.txt installed.
#
#   bash benchmarks/accelerator.sh            # hours on one GPU; writes results/gpu/
#   FULL=1 bash benchmarks/accelerator.sh     # also the six tasks at their full budget, and their evaluation
#   SMALL=1 OUT=/tmp/gpu bash benchmarks/accelerator.sh    # tiny sizes, any machine: only to see that it runs
#
# Every line writes OUT/NAME.log, most a table OUT/NAME.csv and a picture. One that fails (or takes longer
# than LIMIT, 90m) does not stop the others; they are named at the end and the exit status is 1. PYTHON is
# the interpreter, OUT relative to the repository. SMALL leaves out scripts that have tests of their own.
set -uo pipefail
cd "$(dirname "$0")/.."
SMALL=${SMALL:-} FULL=${FULL:-} PYTHON=${PYTHON:-python} LIMIT=${LIMIT:-90m}
mkdir -p "${OUT:=results/gpu}" && OUT=$(cd "$OUT" && pwd) || exit 2
RUNS=$OUT/runs/$(date +%Y%m%d-%H%M%S)
failed=()

measure() {  # NAME COMMAND...
  local name=$1 start=$SECONDS
  shift
  echo "== $name: $*"
  if timeout "$LIMIT" "$@" >"$OUT/$name.log" 2>&1; then
    echo "   done in $((SECONDS - start)) s"
  else
    echo "   FAILED; the end of $OUT/$name.log:"
    tail -n 5 "$OUT/$name.log" | sed 's/^/   | /'
    failed+=("$name")
  fi
}

bench() {  # NAME SCRIPT FLAGS... -> NAME.csv
  measure "$1" "$PYTHON" "benchmarks/$2.py" --out "$OUT/$1.csv" "${@:3}"
}

large() {  # the same, but not when SMALL
  if [ -n "$SMALL" ]; then echo "-- left out when SMALL: $1"; else bench "$@"; fi
}

train() {  # NAME FLAGS...: a run in $RUNS/NAME, not evaluated
  measure "train_$1" "$PYTHON" train_s5.py --runs-dir "$RUNS" --name "$1" \
    --no-tensorboard --no-evaluate "${@:2}"
}

compare() {  # NAME GOAL RUN... -> NAME.csv: speed, return over the last tenth, seconds to a return of GOAL
  measure "$1" "$PYTHON" - "$OUT/$1.csv" "$2" "${@:3}" <<'PY'
import csv, math, pathlib, statistics, sys

def read(path):
    with path.open(newline="") as file:
        return [{k: float(v or "nan") for k, v in row.items()} for row in csv.DictReader(file)]

out, goal, *runs = sys.argv[1:]
table = []
for run in map(pathlib.Path, runs):
    timing, metrics, points, start = read(run / "timing.csv"), read(run / "metrics.csv"), [], 0
    for row in timing:  # the mean return of the episodes that ended since the last line of timing.csv
        returns = [v for m in metrics if start < m["update"] <= row["update"]
                   for k, v in m.items() if k.startswith("return/") and not math.isnan(v)]
        start = row["update"]
        points += [(row["seconds"], statistics.fmean(returns))] if returns else []
    last = [value for _, value in points[-max(1, len(points) // 10):]]
    table.append({"run": run.name, "steps": int(timing[-1]["steps"]), "seconds": timing[-1]["seconds"],
                  "steps_per_s": round(statistics.median(row["sps"] for row in timing)),
                  "final_return": statistics.fmean(last) if last else "",
                  f"seconds_to_{goal}": next((s for s, value in points if value >= float(goal)), "")})
with open(out, "w", newline="") as file:
    writer = csv.DictWriter(file, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
print(*table, sep="\n")
PY
}

playground_ppo() {  # NAME ENVIRONMENT: brax PPO with mujoco_playground's settings, as a run for compare
  measure "train_$1" "$PYTHON" - "$RUNS/$1" "$2" <<'PY'
import csv, functools, pathlib, sys, time

from brax.training.agents.ppo import networks, train
from mujoco_playground import registry, wrapper
from mujoco_playground.config import dm_control_suite_params

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
folder.mkdir(parents=True)
settings = dict(dm_control_suite_params.brax_ppo_config(name))
network = functools.partial(networks.make_ppo_networks, **settings.pop("network_factory", {}))
start, points = time.perf_counter(), []

def progress(steps, metrics):  # deterministic evaluation; seconds include compilation
    seconds = time.perf_counter() - start
    points.append((steps, seconds, steps / seconds, float(metrics["eval/episode_reward"])))

train.train(environment=registry.load(name), wrap_env_fn=wrapper.wrap_for_brax_training,
            network_factory=network, progress_fn=progress, seed=0, **settings)
for file, columns in (("timing", ("update", "steps", "seconds", "sps")),
                      ("metrics", ("update", f"return/{name}"))):
    with (folder / f"{file}.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        for update, point in enumerate(points, 1):
            writer.writerow((update, *(point[:3] if file == "timing" else point[3:])))
PY
}

if [ -n "$SMALL" ]; then
  export JAX_DISABLE_MOST_OPTIMIZATIONS=1  # compiles sooner
  tiny=(--env CartPole-v1 --num-envs 8 --num-steps 16 --width 8 --layers 1 --state-size 8
        --num-minibatches 2 --log-every 2 --total-timesteps 512)
  short=("${tiny[@]}") precision=("${tiny[@]}") goal=10
  kernels=(--tasks CartPole-v1 --lanes 8 --set num_steps=16 width=8 layers=1 state_size=8 num_minibatches=2)
  scan=(--lengths 16 32 --batches 2 --states 4 --chunk 8)
else
  "$PYTHON" -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")' ||
    { echo "jax finds no accelerator here; SMALL=1 runs anywhere" >&2; exit 2; }
  short=(--total-timesteps 94000000)  # 42 s at the 2.27 million steps per second that an H200 made
  precision=(--env cartpole-swingup --projection none --num-envs 1024 --total-timesteps 30000000) goal=600
  kernels=() scan=()
fi
six=ball_in_cup-catch+cartpole-swingup+finger-spin+finger-turn_hard+point_mass-easy+reacher-easy

# 0. What this is measured on
measure device "$PYTHON" -c 'import jax; print(jax.__version__, jax.devices(), jax.devices()[0].device_kind)'
if command -v nvidia-smi >/dev/null; then measure nvidia-smi nvidia-smi; fi

# 1. The accelerator preset on a shorter budget: does it run, compile time ("ready in"), speed
train short "${short[@]}"
compare short 0 "$RUNS/short"
# 1. Breakdown environment / acting / update, compile time, memory; the update over the matrix-product rate
large train train --lanes --rollouts --widths --seeds

# 2. Physics: fused against MJX, the six tasks sharing lanes (batches divide by six); MJX wide; tasks alone
large physics physics --tasks "$six" --batches 1026 4104 16416 65664 --mjx-batch 1026 --steps 8388608
large physics_wide physics --tasks "$six" --batches 16416 --mjx-batch 16416 --steps 8388608
large physics_tasks physics --batches 8192 --mjx-batch 8192 --steps 4194304
# 2. mjx-warp is no backend of physics.py
echo "-- mjx-warp: left out, no backend of physics.py"

# 2, 3. Kernels per control step, acting step and update; time over the floor
bench kernels kernels "${kernels[@]}"
# 3. At how many lanes stepping and acting saturate the device; whole iterations along lanes and widths
large saturation kernels --parts environment acting --lanes 384 1536 6144 24576 98304
large train_lanes train --trainers train_s5 --lanes 384 1536 24576 --rollouts 512 --widths 64 128 512 --seeds

# 4. The recurrence: parallel, sequential, unrolled, chunked over the memory floor; whole memories against length
bench scan scan "${scan[@]}"
large sequence sequence --width 256 --layers 4 --batches 1 64 1024 --memory 40

# 5. 8 to 64 seeds: side by side in one function (speed), and against separate runs (8, time with compilation)
large train_seeds train --trainers train_s5 --lanes --rollouts --widths --seeds 8 16 32 64 --set num_envs=192
large seeds seeds --seeds 8
# 5. Time to a given return against brax PPO on mujoco_playground's ports, same device. Its returns are of the
#    deterministic policy and its seconds include compilation; ours are of training and begin when compiled.
if [ -z "$SMALL" ] && "$PYTHON" -c 'import mujoco_playground' 2>/dev/null; then
  playground_ppo cartpole_brax CartpoleSwingup
  playground_ppo reacher_brax ReacherEasy
  for task in cartpole-swingup reacher-easy; do
    for projection in none identity; do
      train "${task%%-*}_$projection" --env "$task" --projection "$projection" \
        --num-envs 2048 --total-timesteps 60000000
    done
  done
  compare end_to_end_cartpole 600 "$RUNS"/cartpole_{brax,none,identity}
  compare end_to_end_reacher 800 "$RUNS"/reacher_{brax,none,identity}
else
  echo "-- brax PPO on mujoco_playground: left out, SMALL or mujoco_playground cannot be imported"
fi

# 6. Precision of matrix products: speed gained, learning unchanged
JAX_DEFAULT_MATMUL_PRECISION=float32 train float32 "${precision[@]}"
JAX_DEFAULT_MATMUL_PRECISION=tensorfloat32 train tensorfloat32 "${precision[@]}"
train bfloat16 --dtype bfloat16 "${precision[@]}"
compare precision "$goal" "$RUNS"/{float32,tensorfloat32,bfloat16}

# 5. The six tasks at the full budget; evaluated on fresh projections and held-out tasks as it ends
if [ -n "$FULL" ] && [ -z "$SMALL" ]; then
  LIMIT=24h measure full "$PYTHON" train_s5.py --runs-dir "$RUNS" --name full
  measure full_copy cp -r "$RUNS"/full/{config.json,metrics.csv,timing.csv,returns.png,eval} "$OUT/"
fi

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all done: $OUT"
