# Shared by the scripts of this folder (sourced, not run): where things are, and how steps report.
# Each step is one line, "ok" or "FAILED" with the end of its log; passed and failed count them.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BUILD=${BUILD:-$root/build}
mkdir -p "$BUILD/logs"
BUILD=$(cd "$BUILD" && pwd)
# cmake, ninja, ctest, pkgconf and a Python with matplotlib, once scripts/setup.sh ran.
export PATH="$BUILD/venv/bin:$PATH"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$BUILD/cargo}
passed=0
failed=0

# step NAME COMMAND...: runs it with its output in $BUILD/logs/NAME.log.
step() {
    local name=$1 log=$BUILD/logs/$1.log
    shift
    printf '%-44s ' "$name"
    if "$@" >"$log" 2>&1 </dev/null; then
        printf 'ok\n'
        passed=$((passed + 1))
    else
        printf 'FAILED (full output: %s)\n' "$log"
        tail -n 40 "$log" | sed 's/^/    /'
        failed=$((failed + 1))
        return 1
    fi
}

# cuda_wheels FOLDER...: names what NVIDIA's wheels that are installed there have for tests: CUDA's run-time compiler, NCCL,
# headers. What the user names, or an earlier folder has, stays.
cuda_wheels() {
    local folder file
    for folder; do
        for file in "$folder"/nvidia/*/lib/libnvrtc.so.[0-9]*; do
            [ ! -f "$file" ] || export "FSDP_NVRTC_LIBRARY=${FSDP_NVRTC_LIBRARY:-$file}"
        done
        for file in "$folder"/nvidia/*/lib/libnccl.so.2; do
            [ ! -f "$file" ] || export "FSDP_NCCL_LIBRARY=${FSDP_NCCL_LIBRARY:-$file}"
        done
        for file in "$folder"/nvidia/*/include; do
            [ ! -d "$file" ] || export "FSDP_TEST_INCLUDE=${FSDP_TEST_INCLUDE:+$FSDP_TEST_INCLUDE:}$file"
        done
    done
}
