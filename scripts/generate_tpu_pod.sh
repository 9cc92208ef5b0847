#!/usr/bin/env bash
# A job of `rfjax generate` on all hosts of a TPU pod slice, which divide its videos. Not yet run on a slice.
#
#   PROJECT=my-project ZONE=us-east5-b BUCKET=gs://my-bucket scripts/generate_tpu_pod.sh [flags of rfjax generate ...]
#
# BUCKET is one, or a folder of one, that the hosts' service account may read and write. It holds:
#   checkpoints/self-forcing, data/prompts.jsonl    inputs, see docs/convert.md and docs/scaling.md
#   videos                                          the job, made here
#   compiled                                        its programs, for the next time
# Started again, also after the slice was taken back, the script goes on inside the videos. Nothing is deleted at the end;
# the last line says how to.
set -euo pipefail

NAME=${NAME:-rfjax-generate}
ACCELERATOR=${ACCELERATOR:-v6e-16}            # 16 chips of 32 GB, 4 hosts
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e}
SPOT=${SPOT:---spot}                          # cheaper, and taken back at any time; SPOT= for one that stays
BUCKET=${BUCKET:?the bucket, as gs://NAME}
EXTRA=buckets
. "$(dirname "$0")/tpu_slice.sh"

# Each host is a TPU of its own (its four chips share its videos); the processes only agree on who makes what.
job="--checkpoint $BUCKET/checkpoints/self-forcing --prompt-file $BUCKET/data/prompts.jsonl --output $BUCKET/videos --checkpoint-every 20 --processes-timeout 1800"
flags=${*:+$(printf ' %q' "$@")}
on_every_host "TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1 JAX_COMPILATION_CACHE_DIR=$BUCKET/compiled \
  ~/venv/bin/rfjax generate --processes auto $job $flags"

echo "done: $BUCKET has videos. The slice costs until it is deleted:"
echo "  gcloud compute tpus queued-resources delete $NAME --force --project $PROJECT --zone $ZONE"
