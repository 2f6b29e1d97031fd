# Sourced after lib.sh: programs on LibTorch for machines with a GPU. They are compiled by g++ alone, so that a machine needs
# neither Rust nor CMake: $BUILD/lib/libfsdp.so.0 may have been built elsewhere and carried over.

# The Python whose torch has CUDA; its wheel is the LibTorch, too.
TORCH_PYTHON=${TORCH_PYTHON:-$BUILD/pytorch/bin/python}

# needs_gpu_and_torch WHAT: ends the script, without an error, where there is no GPU or $TORCH_PYTHON has no torch, and says that
# WHAT is skipped.
needs_gpu_and_torch() {
    python3 scripts/gpu_here.py "$1" || exit 0
    if ! "$TORCH_PYTHON" -c 'import torch' 2>/dev/null; then
        echo "skipped: $1: TORCH_PYTHON=$TORCH_PYTHON has no torch (make bench installs one; or name yours)"
        exit 0
    fi
}

# gpu_program OUT SOURCE [FLAGS...]: compiles SOURCE to OUT against this tree, its log in $BUILD/logs.
gpu_program() {
    local out=$1 source=$2 log torch
    log=$BUILD/logs/$(basename "$1")-build.log
    shift 2
    if command -v cargo >/dev/null; then
        cargo build --release >"$log" 2>&1 || { tail -n 40 "$log" >&2; return 1; }
        mkdir -p "$BUILD/lib"
        cp "$CARGO_TARGET_DIR/release/libfsdp.so" "$BUILD/lib/libfsdp.so.0"
        ln -sf libfsdp.so.0 "$BUILD/lib/libfsdp.so"
    elif [ ! -e "$BUILD/lib/libfsdp.so.0" ]; then
        echo "make: there is no Rust here, and no $BUILD/lib/libfsdp.so.0 from another machine" >&2
        return 1
    fi
    torch=$("$TORCH_PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))') || return 1
    mkdir -p "$(dirname "$out")"
    # NDEBUG as LibTorch was built: some of its inline functions differ without it.
    "${CXX:-g++}" -std=c++20 -DNDEBUG "$@" -I include -I bindings/cpp/include -I bindings/libtorch/include \
        -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" "$source" -o "$out" \
        "$BUILD/lib/libfsdp.so.0" "$torch/lib/libtorch_cpu.so" "$torch/lib/libc10.so" -ldl -pthread \
        -Wl,--allow-shlib-undefined "-Wl,-rpath,$BUILD/lib:$torch/lib" >"$log" 2>&1 || { tail -n 40 "$log" >&2; return 1; }
}
