#!/usr/bin/env bash
# Train the model that comes inside the package, from random weights to RUNS/moving_shapes.
# It may be stopped at any time: what is finished is kept, and the same command goes on.
#
#   scripts/make_tiny_model.sh [RUNS [FROM]]      (default: runs; needs pip install ".[train]")
#
# With FROM, a stage such as teacher, the stages before it are left out; their checkpoints that later ones begin with
# (runs/vae_final/model and that of the stage before: of causal runs/score/model, of decoder runs/self_forcing/model)
# have to be there.
set -euo pipefail
where=$(realpath -m "${1:-"$(dirname "$0")/../runs"}")
from=${2:-}
cd "$(dirname "$0")/.."
# Huge pages, and memory that stays with the process: a step takes 0.60 s in place of 0.87 (short clips, 2 cores of an EPYC).
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_MMAP_THRESHOLD_=17179869184 MALLOC_TRIM_THRESHOLD_=17179869184
mkdir -p "$where"
if ! [ "$where" -ef runs ]; then   # the configurations name their inputs below runs/
  [ ! -e runs ] || [ -L runs ] || { echo "$PWD/runs is a folder; move it away, or give no other" >&2; exit 2; }
  ln -sfn "$where" runs
fi

section() { [ "$1" != "$from" ] || from=""; }
unless() { local made=$1; shift; [ -n "$from" ] || [ -e "$made" ] || { echo "== $made"; "$@"; }; }
clips() { unless "runs/$1" rfjax data moving-shapes --output "runs/$1" "${@:2}"; }
latents() { unless "runs/$1" rfjax data latents --output "runs/$1" --checkpoint runs/vae_final/model --dataset "${@:2}"; }
shorts() {
  clips short_pixels --clips 12000 --test-clips 200 --frames 9 --seed 1
  latents shorts runs/short_pixels --batch-size 32
}
mids() {
  clips mid_pixels --clips 15000 --test-clips 100 --frames 33 --seed 101
  latents mids runs/mid_pixels
}
longs() {
  clips clips --clips 600 --test-clips 40 --seed 13
  latents latents runs/clips
}
stage() {
  unless "runs/$1/model" rfjax train --config "moving_shapes_$1" --output "runs/$1" "${@:2}"
  [ -n "$from" ] || [ -e "runs/$1/model" ] || exit 0   # told to stop, and saved
}

section vae_small
unless runs/start python scripts/make_random_checkpoint.py moving_shapes runs/start
clips small_pixels --clips 20000 --test-clips 100 --frames 5 --height 32 --width 48 --seed 2
stage vae_small
clips pixels --clips 2000 --test-clips 100
for name in vae vae_long vae_crops vae_robust; do stage "$name"; done
clips long_pixels --clips 600 --test-clips 20 --frames 129 --seed 5
stage vae_long_crops
stage vae_final

section pictures
clips picture_pixels --clips 40000 --test-clips 400 --frames 1 --seed 7
latents picture_latents runs/picture_pixels --batch-size 64
stage pictures

section short
shorts
stage short

section teacher
longs
stage teacher
mids
unless runs/grown python scripts/grow_checkpoint.py runs/teacher/model runs/grown 1   # 6 layers become 12
# What a GPU learns in 4 minutes, 1.2 million examples, would take a day of 2 CPU cores; they take a 14th of it.
if python -c 'import jax, sys; sys.exit(jax.default_backend() == "cpu")'; then stage score
else stage score --set steps=2700 batch_size=32 dtype=float32; fi

section causal
unless runs/separated python scripts/separate_things.py runs/score/model runs/separated
longs    # the data, where the script begins here
stage causal
shorts   # for their captions
unless runs/trajectories rfjax data trajectories --prompts runs/shorts --checkpoint runs/separated \
  --output runs/trajectories --count 768 --latent-frames 9 --solver-steps 16 --batch-size 32 --guidance 2.5
stage ode
stage self_forcing

section decoder
clips redrawn_pixels --clips 1600 --test-clips 32 --frames 33 --seed 201
unless runs/redrawn rfjax data redrawn --dataset runs/redrawn_pixels --checkpoint runs/self_forcing/model \
  --output runs/redrawn --batch-size 32
stage decoder
unless runs/moving_shapes python scripts/cast_checkpoint.py runs/decoder/model runs/moving_shapes bfloat16

[ -z "$from" ] || { echo "there is no $from to begin from; vae_small, pictures, short, teacher, causal or decoder" >&2; exit 2; }
