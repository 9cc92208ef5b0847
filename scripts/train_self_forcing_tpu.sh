#!/usr/bin/env bash
# Self-Forcing at 1.3B on a TPU pod slice: ask for the slice, put this code on every host, train on all of them.
# Not yet run on a slice.
#
#   PROJECT=my-project ZONE=us-east5-a SHARE=10.0.0.2:/share scripts/train_self_forcing_tpu.sh [--set key=value ...]
#
# SHARE is a folder that every host mounts, such as a Filestore instance in the same network, as HOST:/NAME. It holds:
#   checkpoints/ode, checkpoints/wan_14b, checkpoints/wan_1_3b, data/prompts.txt    inputs, see docs/training.md
#   runs/self_forcing                                                               the run, made here
# Started again, the script goes on: with the slice that is there, and from the newest checkpoint. Nothing is deleted at
# the end; the last line says how to.
set -euo pipefail

NAME=${NAME:-self-forcing}
ACCELERATOR=${ACCELERATOR:-v5p-128}           # 64 chips of 95 GB, 16 hosts; mesh 8 x 8, an example a chip
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}
SPOT=${SPOT:---spot}                          # cheaper, and taken back at any time; SPOT= for one that stays
FSDP=${FSDP:-8}                               # chips that share the parameters
ACCUMULATE=${ACCUMULATE:-1}                   # batch of 64 / chips: 1 on 64, 4 on 16
RUN=${RUN:-runs/self_forcing}                 # below SHARE
SHARE=${SHARE:?the shared folder, as HOST:/NAME}
EXTRA=train
. "$(dirname "$0")/tpu_slice.sh"

# One process a host; --processes auto lets them find each other. They end together: on a SIGTERM to any, saved.
settings=$(printf ' %q' --set "mesh.fsdp=$FSDP" --set "accumulate=$ACCUMULATE" "$@")
on_every_host "cd $MOUNT && ~/venv/bin/rfjax train --config self_forcing --output $RUN --processes auto $settings"

echo "done: $SHARE has $RUN/model. The slice costs until it is deleted:"
echo "  gcloud compute tpus queued-resources delete $NAME --force --project $PROJECT --zone $ZONE"
