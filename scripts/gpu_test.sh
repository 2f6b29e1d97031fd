#!/usr/bin/env bash
# `make gpu-test`: what can only be tested with a GPU, CUDA's compiler or NCCL; says what this machine lacks and skips that.
# The program $BUILD/bin/fsdp-gpu-tests needs nothing else: a machine without Rust runs the one that another machine has built.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source "$root/scripts/gpu_program.sh"
cd "$root" || exit 1
program=$BUILD/bin/fsdp-gpu-tests

if command -v cargo >/dev/null; then
    built=$(cargo test --release --test cuda_gpu --no-run --message-format=json 2>"$BUILD/logs/gpu-test-build.log" |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message["reason"] == "compiler-artifact" and message["target"]["name"] == "cuda_gpu":
        print(message["executable"])' | tail -n 1)
    if [ ! -x "$built" ]; then
        tail -n 40 "$BUILD/logs/gpu-test-build.log" >&2
        exit 1
    fi
    mkdir -p "$BUILD/bin"
    cp "$built" "$program"
elif [ ! -x "$program" ]; then
    echo "make gpu-test: there is no Rust here, and no $program from another machine" >&2
    exit 1
fi
# Where the system has no NVRTC or NCCL, those that torch came with.
cuda_wheels "$("$TORCH_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)"
status=0
"$program" --test-threads=1 || status=1
scripts/gpu_torch_test.sh || status=1
exit $status
