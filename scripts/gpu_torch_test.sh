#!/usr/bin/env bash
# A part of `make gpu-test`: the LibTorch binding on GPU 0, with 1, 2 and 4 ranks, and once more under compute-sanitizer.
# Skips what this machine lacks, and says so. TORCH_PYTHON: a Python whose torch has CUDA.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$root/scripts/gpu_program.sh"
cd "$root" || exit 1
needs_gpu_and_torch "LibTorch on a GPU"

program=$BUILD/bin/feature_cuda
step gpu_torch_build gpu_program "$program" bindings/libtorch/tests/feature_cuda.cpp -O1 || exit 1
for ranks in 1 2 4; do
    step "gpu_torch_$ranks" timeout 900 "$program" "$ranks"
done
if command -v compute-sanitizer >/dev/null; then
    step gpu_torch_sanitizer timeout 3000 compute-sanitizer --target-processes all --error-exitcode 1 "$program" 1
else
    echo "skipped: compute-sanitizer was not found"
fi
[ "$failed" = 0 ]
