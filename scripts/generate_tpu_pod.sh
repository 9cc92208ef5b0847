#!/usr/bin/env bash
# A job of `rfjax generate` on all hosts of a TPU pod slice, which divide its videos. Not yet run on a slice.
#
#   PROJECT=my-project ZONE=us-east5-b SHARE=10.0.0.2:/share scripts/generate_tpu_pod.sh [flags of rfjax generate ...]
#
# SHARE is a folder that every host mounts, such as a Filestore instance in the same network, as HOST:/NAME. It holds:
#   checkpoints/self-forcing, data/prompts.jsonl    inputs, see docs/convert.md and docs/scaling.md
#   videos                                          the job, made here
# Started again, also after the slice was taken back, the script goes on inside the videos. Nothing is deleted at the end;
# the last line says how to.
set -euo pipefail

NAME=${NAME:-rfjax-generate}
ACCELERATOR=${ACCELERATOR:-v6e-16}            # 16 chips of 32 GB, 4 hosts
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e}
SPOT=${SPOT:---spot}                          # cheaper, and taken back at any time; SPOT= for one that stays
EXTRA=
. "$(dirname "$0")/tpu_slice.sh"

# Each host is a TPU of its own (its four chips share its videos); the processes only agree on who makes what.
job="--checkpoint checkpoints/self-forcing --prompt-file data/prompts.jsonl --output videos --checkpoint-every 20"
flags=$(printf ' %q' "$@")
on_every_host "cd $MOUNT && TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 JAX_COMPILATION_CACHE_DIR=$MOUNT/compiled \
  ~/venv/bin/rfjax generate --processes auto $job $flags"

echo "done: $SHARE has videos. The slice costs until it is deleted:"
echo "  gcloud compute tpus queued-resources delete $NAME --force --project $PROJECT --zone $ZONE"
