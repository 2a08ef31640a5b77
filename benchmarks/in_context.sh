#!/usr/bin/env bash
# The learning experiments in results/: three seeds each, about four hours on two CPU cores.
#
#     bash benchmarks/in_context.sh            # trains into runs/, compares into results/; finished runs are skipped
#
# The ceiling is the same agent, memoryless, on the unprojected task: actions are clipped only after the projection, so
# that whatever control the unprojected agent wants is within reach of the projected one.
set -euo pipefail
cd "$(dirname "$0")/.."

train() {  # NAME TRAINER FLAGS...
    local name=$1 trainer=$2
    shift 2
    [ -e "runs/$name/returns.png" ] || python "$trainer.py" --name "$name" --num-seeds 3 --no-evaluate "$@"
}

for task in cartpole-swingup reacher-easy point_mass-easy; do
    flags="--env $task --num-envs 64 --action-repeat 2 --total-timesteps 3000000"
    train $task-s5 train_s5 $flags
    train $task-lstm train_lstm $flags --lr 2e-3
    train $task-blind train_s5 $flags --observe none
    train $task-none train_s5 $flags --memory none
    train $task-ceiling train_s5 $flags --memory none --projection identity
    python evaluate.py runs/$task-{s5,lstm,blind,none,ceiling} --tasks $task --out results/$task
done

train six_s5 train_s5 --total-timesteps 12000000
train six_lstm train_lstm --total-timesteps 12000000 --lr 2e-3
train six_plain train_s5 --total-timesteps 12000000 --no-identify
train six_blind train_s5 --total-timesteps 12000000 --observe none
train six_none train_s5 --total-timesteps 12000000 --memory none
python evaluate.py runs/six_{s5,lstm,plain,blind,none} --no-projections --out results/six
