#!/usr/bin/env bash
# `make gpu-bench`: measures an engine on GPU 0 beside PyTorch's FSDP2 and plain LibTorch; where there is no GPU says so, and
# that is no error. TORCH_PYTHON: a Python whose torch has CUDA. Arguments go to bench/gpu.py.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$root/scripts/gpu_program.sh"
cd "$root" || exit 1
needs_gpu_and_torch "make gpu-bench"

program=$BUILD/bench/bin/fsdp_bench_gpu
step gpu_bench_build gpu_program "$program" bench/gpu/main.cpp -O2 || exit 1
exec python3 -B bench/gpu.py --program "$program" --torch-python "$TORCH_PYTHON" "$@"
