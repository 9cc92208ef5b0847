# To be sourced: asks for a TPU slice (queued resources), waits for it, mounts SHARE, if there is one, and installs this code
# on every host. Reads PROJECT, ZONE, SHARE (a folder as HOST:/NAME, or none), NAME, ACCELERATOR, RUNTIME, SPOT and EXTRA (of
# pip, or none); gives tpu and on_every_host.
PROJECT=${PROJECT:?the Google Cloud project}
ZONE=${ZONE:?a zone with such TPUs}
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
  [ -z '${SHARE:-}' ] || mountpoint -q $MOUNT || { sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common
    sudo mkdir -p $MOUNT && sudo mount ${SHARE:-} $MOUNT; }
  rm -rf rfjax && mkdir rfjax && tar -xzf rfjax.tar.gz -C rfjax
  [ -d venv ] || python3.11 -m venv venv || { sudo apt-get -qq install -y python3.11-venv && python3.11 -m venv venv; }
  venv/bin/pip install -q './rfjax${EXTRA:+[$EXTRA]}' 'jax[tpu]' -f https://storage.googleapis.com/jax-releases/libtpu_releases.html"
