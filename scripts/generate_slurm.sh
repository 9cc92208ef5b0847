#!/usr/bin/env bash
# A job of `rfjax generate` on the nodes of a Slurm cluster, which divide its videos. Not yet run on a cluster.
#
#   sbatch scripts/generate_slurm.sh [flags of rfjax generate ...]
#
# The working folder is one that all nodes see, with venv (rfjax installed in it), checkpoints/self-forcing and
# data/prompts.jsonl; the videos go to videos. Two minutes before its time is over, or when nodes are taken back, the job keeps
# the state of its videos and is queued again; it then goes on inside them.
#SBATCH --job-name=rfjax-generate
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# One task a node: its GPUs share the videos of that node. A task that has ended does not end the others.
job="--checkpoint checkpoints/self-forcing --prompt-file data/prompts.jsonl --output videos --checkpoint-every 20"
# shellcheck disable=SC2086  # words
srun --kill-on-bad-exit=0 venv/bin/rfjax generate --processes auto $job "$@" || code=$?
if [ "${code:-0}" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi   # told to stop, as also at the time limit
exit "${code:-0}"
