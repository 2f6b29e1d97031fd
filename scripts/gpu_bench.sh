#!/usr/bin/env bash
# `make gpu-bench`: measures an engine on GPU 0 beside PyTorch's FSDP2 and plain LibTorch; where there is no GPU says so, and
# that is no error. TORCH_PYTHON: a Python whose torch has CUDA. Arguments go to bench/gpu.py.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$root/scripts/gpu_program.sh"
cd "$root" || exit 1
python3 scripts/gpu_here.py "make gpu-bench" || exit 0
if ! "$TORCH_PYTHON" -c 'import torch' 2>/dev/null; then
    echo "skipped: make gpu-bench: TORCH_PYTHON=$TORCH_PYTHON has no torch (make bench installs one; or name yours)"
    exit 0
fi

program=$BUILD/bench/bin/fsdp_bench_gpu
step gpu_bench_build gpu_program "$program" bench/gpu/main.cpp -O2 || exit 1
exec python3 -B bench/gpu.py --program "$program" --torch-python "$TORCH_PYTHON" "$@"
