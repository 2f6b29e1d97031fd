#!/usr/bin/env bash
# Trains a small GPT on real text, sharded over two ranks with one thread each: two to three minutes on two cores.
#
#   examples/train_gpt/demo.sh [train_gpt's options]
#
# From the environment: BUILD (default: build), the build folder; OUT (default: BUILD/demo), which an earlier demo's
# files are removed from; RANKS (default: 2); TEXT (default: BUILD/text/english.txt).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
build=${BUILD:-$root/build}
text=${TEXT:-$build/text/english.txt}

exec "$build/bin/fsdp" run -n "${RANKS:-2}" -- "$build/examples/train_gpt/train_gpt" \
    --text "$text" --out "${OUT:-$build/demo}" --overwrite \
    --d-model 128 --layers 4 --heads 4 --seq 64 --global-batch 16 --steps 2000 \
    --lr 3e-3 --min-lr 3e-4 --warmup 50 --betas 0.9 0.99 \
    --val-every 250 --save-every 500 --sample-tokens 400 --threads 1 "$@"
