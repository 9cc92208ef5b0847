#!/usr/bin/env bash
# Self-Forcing at 1.3B on one machine with 8 NVIDIA GPUs of 80 GB, in one process. Not yet run on such a machine.
#
#   scripts/train_self_forcing_8gpu.sh [--set key=value ...]
#
# Inputs, from docs/training.md:   checkpoints/ode   checkpoints/wan_14b   checkpoints/wan_1_3b   data/prompts.txt
# The same command goes on after Ctrl-C, SIGTERM or a crash, from the newest checkpoint in RUN.
set -euo pipefail

INIT=${INIT:-checkpoints/ode}                 # the student: transformer, text encoder, tokenizer
TEACHER=${TEACHER:-checkpoints/wan_14b}       # the real score
CRITIC=${CRITIC:-checkpoints/wan_1_3b}        # what the fake score begins as, of the student's sizes
PROMPTS=${PROMPTS:-data/prompts.txt}          # one a line
RUN=${RUN:-runs/self_forcing}
GPUS=${GPUS:-8}                               # all share the parameters
ACCUMULATE=${ACCUMULATE:-8}                   # batch of 64 / GPUS: one example a GPU at a time

for input in "$INIT/config.json" "$TEACHER/config.json" "$CRITIC/config.json" "$PROMPTS"; do
  [ -e "$input" ] || { echo "$input is missing; see docs/training.md" >&2; exit 2; }
done

# All memory but what cuDNN and NCCL take beside JAX's own.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

exec rfjax train --config self_forcing --output "$RUN" \
  --set "init=$INIT" --set "data.path=$PROMPTS" \
  --set "self_forcing.teacher=$TEACHER" --set "self_forcing.critic_init=$CRITIC" \
  --set "mesh.fsdp=$GPUS" --set "accumulate=$ACCUMULATE" "$@"
