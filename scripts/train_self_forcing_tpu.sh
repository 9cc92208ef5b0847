#!/usr/bin/env bash
# Self-Forcing at 1.3B on a TPU pod slice: ask for the slice, put this code on every host, train on all of them.
# Not yet run on a slice.
#
#   PROJECT=my-project ZONE=us-east5-a SHARE=10.0.0.2:/share scripts/train_self_forcing_tpu.sh [--set key=value ...]
#
# SHARE is a folder that every host mounts, such as a Filestore instance in the same network, as HOST:/NAME. It holds:
#   checkpoints/ode, checkpoints/wan_1_3b, data/prompts.txt    inputs, see docs/training.md
#   runs/self_forcing                                          the run, made here
# Started again, the script goes on: with the slice that is there, and from the newest checkpoint. Nothing is deleted at
# the end; the last line says how to.
set -euo pipefail

PROJECT=${PROJECT:?the Google Cloud project}
ZONE=${ZONE:?a zone with TPU v5p}
SHARE=${SHARE:?the shared folder, as HOST:/NAME}
NAME=${NAME:-self-forcing}
ACCELERATOR=${ACCELERATOR:-v5p-128}           # 64 chips of 95 GB, 16 hosts; mesh 8 x 8, an example a chip
RUNTIME=${RUNTIME:-v2-alpha-tpuv5}
SPOT=${SPOT:---spot}                          # cheaper, and taken back at any time; SPOT= for one that stays
FSDP=${FSDP:-8}                               # chips that share the parameters
ACCUMULATE=${ACCUMULATE:-1}                   # batch of 64 / chips: 1 on 64, 4 on 16
RUN=${RUN:-runs/self_forcing}                 # below SHARE
MOUNT=/mnt/rfjax                              # of SHARE, on the hosts

tpu() { gcloud compute tpus "$@" --project "$PROJECT" --zone "$ZONE"; }
on_every_host() { tpu tpu-vm ssh "$NAME" --worker=all --command "$1"; }
state() { tpu queued-resources describe "$NAME" --format 'value(state.state)' 2> /dev/null || true; }

cd "$(dirname "$0")/.."
# A slice that was taken back is still listed; it cannot be used again.
case $(state) in
  SUSPENDED | FAILED) tpu queued-resources delete "$NAME" --force --quiet ;;
esac
if [ -z "$(state)" ]; then
  # shellcheck disable=SC2086  # no word where SPOT is empty
  tpu queued-resources create "$NAME" --node-id "$NAME" --accelerator-type "$ACCELERATOR" \
    --runtime-version "$RUNTIME" $SPOT
fi
until [ "$(state)" = ACTIVE ]; do
  echo "the slice is $(state)"
  case $(state) in SUSPENDED | FAILED) exit 1 ;; esac
  sleep 60
done

code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
git archive --format tar.gz --output "$code/rfjax.tar.gz" HEAD     # what is committed
tpu tpu-vm scp "$code/rfjax.tar.gz" "$NAME:" --worker=all
on_every_host "
  set -e
  mountpoint -q $MOUNT || { sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common
    sudo mkdir -p $MOUNT && sudo mount $SHARE $MOUNT; }
  rm -rf rfjax && mkdir rfjax && tar -xzf rfjax.tar.gz -C rfjax
  [ -d venv ] || python3.11 -m venv venv || { sudo apt-get -qq install -y python3.11-venv && python3.11 -m venv venv; }
  venv/bin/pip install -q './rfjax[train]' 'jax[tpu]' -f https://storage.googleapis.com/jax-releases/libtpu_releases.html"

# One process a host; --distributed lets them find each other. They end together: on a SIGTERM to any, saved.
settings=$(printf ' %q' --set "mesh.fsdp=$FSDP" --set "accumulate=$ACCUMULATE" "$@")
on_every_host "cd $MOUNT && ~/venv/bin/rfjax train --config self_forcing --output $RUN --distributed $settings"

echo "done: $SHARE has $RUN/model. The slice costs until it is deleted:"
echo "  gcloud compute tpus queued-resources delete $NAME --force --project $PROJECT --zone $ZONE"
