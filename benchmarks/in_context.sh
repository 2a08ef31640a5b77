#!/usr/bin/env bash
# What each part of the agent is worth on the six tasks.
#
#     bash benchmarks/in_context.sh [STEPS] [SEEDS]    # 5000000 and 1: forty minutes on one CPU core
#
# Trains into runs/six-*, in which finished runs are skipped, and compares into results/six.
set -euo pipefail
cd "$(dirname "$0")/.."
steps=${1:-5000000} seeds=${2:-1}

train() {  # NAME TRAINER FLAGS...
    local name=six-$1 trainer=$2
    shift 2
    [ -e "runs/$name/returns.png" ] ||
        python "$trainer.py" --name "$name" --total-timesteps "$steps" --num-seeds "$seeds" --no-evaluate "$@"
}

train s5 train_s5
train lstm train_lstm
train plain train_s5 --no-identify
train sees-alike train_s5 --no-privileged-critic
train blind train_s5 --observe none
train none train_s5 --memory none
python evaluate.py runs/six-{s5,lstm,plain,sees-alike,blind,none} --no-projections --out results/six
