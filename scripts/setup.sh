#!/usr/bin/env bash
# Installs what the build needs and this machine lacks, under the build folder only; never needs root.
#
#   scripts/setup.sh [tools] [torch] [debian] [mpi] [nvrtc]    (default: all but nvrtc)
#
# tools  $BUILD/venv       cmake, ninja, pkgconf, matplotlib, from scripts/requirements/tools.txt
# torch  $BUILD/libtorch   LibTorch from scripts/requirements/torch.txt, unless the user has one: TORCH_DIR or
#                          Torch_DIR (which must then hold one), or one found in CMAKE_PREFIX_PATH. The folder
#                          that was chosen is written to $BUILD/torch.dir.
# debian $BUILD/debian     what scripts/requirements/debian.txt names, unpacked by scripts/fetch_debian.sh, and
#                          $BUILD/text/english.txt, the demo's training text, made of it
# mpi    $BUILD/debian     Open MPI, as scripts/requirements/mpi.txt lists it, unless an mpicc that works is there; and MPICH
#                          (mpich.txt). Without
#                          it the tests labelled mpi say so and are skipped: that is no error.
# nvrtc  $BUILD/nvrtc      CUDA's run-time compiler, from scripts/requirements/nvrtc.txt, for `make test`. Without it the test
#                          that compiles the GPU's kernels looks for another, or says so and is skipped: that is no error.
#
# BUILD (default: build) and PYTHON (default: python3) come from the environment. A part is done when its stamp
# holds the checksum of its requirements; the stamp is written last and removed first, so that an interrupted
# installation is started again. One line a step; the details are in $BUILD/logs, named on failure.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BUILD=${BUILD:-$root/build}
PYTHON=${PYTHON:-python3}
mkdir -p "$BUILD/logs"
BUILD=$(cd "$BUILD" && pwd)
# The environment that this script makes must not be the Python that makes it.
PATH=:$PATH:
PATH=${PATH//:$BUILD\/venv\/bin:/:}
PATH=${PATH#:}
export PATH=${PATH%:}
requirements=$root/scripts/requirements

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

# logged NAME COMMAND...: runs it with its output in a log; on failure shows the end of the log.
logged() {
    local log=$BUILD/logs/$1.log
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        fail "this failed: $* (full output: $log)"
    fi
}

# The stamp of a part: its requirements, the interpreter and the place they were installed for.
stamp_of() {
    { cat "$requirements/$1.txt"; "$PYTHON" -c 'import sys; print(sys.version, sys.base_prefix)'; echo "$BUILD"; } |
        sha256sum | cut -d' ' -f1
}
is_done() { [ -f "$BUILD/$1.stamp" ] && [ "$(cat "$BUILD/$1.stamp")" = "$(stamp_of "$1")" ]; }
begin() { rm -rf "$BUILD/$1.stamp" "${BUILD:?}/$2"; }
finish() { stamp_of "$1" >"$BUILD/$1.stamp.tmp" && mv "$BUILD/$1.stamp.tmp" "$BUILD/$1.stamp"; }

need_python() {
    command -v "$PYTHON" >/dev/null || fail "$PYTHON was not found; install Python 3.11 (Debian: apt-get install python3 python3-venv)"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$PYTHON is $("$PYTHON" --version 2>&1); Python 3.11 or newer is needed (PYTHON=... chooses another)"
}

# A virtual environment, also where Debian's python3-venv is missing but some pip is there.
make_venv() {
    local log=$BUILD/logs/venv.log
    if "$PYTHON" -m venv "$BUILD/venv" >"$log" 2>&1; then
        pip=("$BUILD/venv/bin/python" -m pip)
        return
    fi
    rm -rf "$BUILD/venv"
    if "$PYTHON" -m pip --version >>"$log" 2>&1 && "$PYTHON" -m venv --without-pip "$BUILD/venv" >>"$log" 2>&1; then
        pip=("$PYTHON" -m pip --python "$BUILD/venv/bin/python")
        return
    fi
    fail "$PYTHON has neither a working venv module nor pip; install one of them (Debian: apt-get install python3-venv), then run this again (details: $log)"
}

# The pip that installs into folders (torch): the virtual environment's, or the one that filled it.
find_pip() {
    if "$BUILD/venv/bin/python" -m pip --version >/dev/null 2>&1; then
        pip=("$BUILD/venv/bin/python" -m pip)
    elif "$PYTHON" -m pip --version >/dev/null 2>&1; then
        pip=("$PYTHON" -m pip)
    else
        fail "no pip was found; install python3-venv (Debian: apt-get install python3-venv), then run this again"
    fi
}

setup_tools() {
    if is_done tools && "$BUILD/venv/bin/cmake" --version >/dev/null 2>&1; then
        return
    fi
    say "tools: installing cmake, ninja, pkgconf and matplotlib into $BUILD/venv"
    begin tools venv
    make_venv
    logged tools "${pip[@]}" install --disable-pip-version-check --no-deps -r "$requirements/tools.txt"
    logged tools-check "$BUILD/venv/bin/python" -c 'import matplotlib.pyplot'
    finish tools
}

# is_torch DIR: whether it is the root of a LibTorch that can be built against.
is_torch() { [ -f "$1/lib/libtorch_cpu.so" ] && [ -f "$1/include/torch/csrc/api/include/torch/torch.h" ]; }

# torch_root DIR: DIR, or the LibTorch root around or below it, if there is one.
torch_root() {
    local candidate
    for candidate in "$1" "$1/../../.." "$1/torch" "$1/libtorch"; do
        if is_torch "$candidate"; then
            (cd "$candidate" && pwd)
            return
        fi
    done
    return 1
}

# Prints the user's own LibTorch; fails with a message when TORCH_DIR or Torch_DIR names something else.
user_torch() {
    local name prefix
    for name in TORCH_DIR Torch_DIR; do
        [ -n "${!name:-}" ] || continue
        torch_root "${!name}" && return
        fail "$name=${!name} holds no LibTorch (lib/libtorch_cpu.so and include/torch/csrc/api/include/torch/torch.h)"
    done
    local IFS=':;'
    for prefix in ${CMAKE_PREFIX_PATH:-}; do
        torch_root "$prefix" && return
    done
    return 0
}

setup_torch() {
    local dir
    dir=$(user_torch) || exit 1
    if [ -n "$dir" ]; then
        [ "$(cat "$BUILD/torch.dir" 2>/dev/null)" = "$dir" ] || say "torch: using the LibTorch in $dir"
    else
        dir=$BUILD/libtorch/torch
        if ! { is_done torch && is_torch "$dir"; }; then
            say "torch: installing LibTorch into $BUILD/libtorch (a download of about 0.7 GB)"
            begin torch libtorch
            find_pip
            logged torch "${pip[@]}" install --disable-pip-version-check --no-deps --no-compile \
                --target "$BUILD/libtorch" -r "$requirements/torch.txt"
            is_torch "$dir" || fail "the installed package holds no LibTorch under $dir (see $BUILD/logs/torch.log)"
            if ldd "$dir/lib/libtorch_cpu.so" | grep 'not found'; then
                fail "$dir/lib/libtorch_cpu.so needs the libraries above"
            fi
            finish torch
        fi
    fi
    if [ "$(cat "$BUILD/torch.dir" 2>/dev/null)" != "$dir" ]; then
        printf '%s\n' "$dir" >"$BUILD/torch.dir"
    fi
}

# Headers for the examples and the demo's text, from Debian's packages, unpacked and not installed.
setup_debian() {
    [ -f "$requirements/debian.txt" ] || return 0
    local packages
    mapfile -t packages < <(sed 's/#.*//' "$requirements/debian.txt" | tr -s '[:space:]' '\n' | sed '/^$/d')
    "$root/scripts/fetch_debian.sh" "$BUILD/debian" "${packages[@]}"
    "$PYTHON" "$root/scripts/prepare_text.py" "$BUILD/debian/root" "$BUILD/text/english.txt"
}

# Debian's Open MPI and MPICH, unpacked and not installed; their absence is no error.
setup_mpi() {
    echo '#include <mpi.h>' | mpicc -E - >/dev/null 2>&1 || unpack_mpi mpi "Open MPI" "tests labelled mpi"
    unpack_mpi mpich MPICH "tests on MPICH"
}

# unpack_mpi NAME WHAT TESTS: what requirements/NAME.txt lists, for these tests.
unpack_mpi() {
    local packages
    [ ! -f "$BUILD/$1.missing" ] || return 0
    mapfile -t packages < <(sed 's/#.*//' "$requirements/$1.txt" | tr -s '[:space:]' '\n' | sed '/^$/d')
    if ! "$root/scripts/fetch_debian.sh" "$BUILD/debian" "${packages[@]}" >"$BUILD/logs/$1.log" 2>&1; then
        say "$1: no $2 could be unpacked, so the $3 will be skipped (details: $BUILD/logs/$1.log;" \
            "remove $BUILD/$1.missing to try again)"
        touch "$BUILD/$1.missing"
    fi
}

# Its absence is no error, as Open MPI's.
setup_nvrtc() {
    if is_done nvrtc || [ -f "$BUILD/nvrtc.missing" ]; then
        return
    fi
    say "nvrtc: installing CUDA's run-time compiler into $BUILD/nvrtc (a download of 47 MB)"
    begin nvrtc nvrtc
    find_pip
    if "${pip[@]}" install --disable-pip-version-check --no-deps --no-compile --target "$BUILD/nvrtc" \
        -r "$requirements/nvrtc.txt" >"$BUILD/logs/nvrtc.log" 2>&1 </dev/null; then
        finish nvrtc
    else
        rm -rf "$BUILD/nvrtc"
        say "nvrtc: it could not be installed, so a test may be skipped (details: $BUILD/logs/nvrtc.log;" \
            "remove $BUILD/nvrtc.missing to try again)"
        touch "$BUILD/nvrtc.missing"
    fi
}

need_python
# A second make in the same tree waits instead of installing into the same folder.
if command -v flock >/dev/null; then
    exec 9>"$BUILD/setup.lock"
    flock 9
fi
[ $# -gt 0 ] || set -- tools torch debian mpi
for part in "$@"; do
    case $part in
    tools | torch | debian | mpi | nvrtc) "setup_$part" ;;
    *) fail "unknown part '$part' (tools, torch, debian, mpi, nvrtc)" ;;
    esac
done
