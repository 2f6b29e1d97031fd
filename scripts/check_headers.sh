#!/usr/bin/env bash
# Every public header compiles alone and included twice, without a warning: C headers as C11 and C++17, C++ headers
# as C++17, LibTorch's layer as C++20 (where LibTorch was set up).
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root" || exit 1
warnings=(-Wall -Wextra -Wpedantic -Werror -fsyntax-only)

# twice NAME LANGUAGE FLAGS...: a program of nothing but the header, twice.
twice() {
    local name=$1 language=$2 compiler=${CXX:-c++}
    shift 2
    [ "$language" = c ] && compiler=${CC:-cc}
    printf '#include <%s>\n#include <%s>\nint main(void) { return 0; }\n' "$name" "$name" |
        "$compiler" -x "$language" "${warnings[@]}" "$@" -
}

# headers DIR: the header files below it, as they are included.
headers() { [ -d "$1" ] && (cd "$1" && find . -name '*.h' -o -name '*.hpp' | sed 's|^\./||' | LC_ALL=C sort); }

# show_result FILE: the log of a check that ran in the background, and whether it succeeded.
show_result() { cat "$1.log" && [ -f "$1.ok" ]; }

for header in $(headers include); do
    step "header-c11-${header//\//-}" twice "$header" c -std=c11 -Iinclude
    step "header-c++17-${header//\//-}" twice "$header" c++ -std=c++17 -Iinclude
done
for header in $(headers bindings/cpp/include); do
    step "header-c++17-${header//\//-}" twice "$header" c++ -std=c++17 -Iinclude -Ibindings/cpp/include
done
# With whichever MPI is there: installed, or unpacked by setup.sh.
mpi=$(dirname "$(find /usr/lib/*/openmpi/include /usr/include "$BUILD"/debian/root/usr/lib/*/openmpi/include -maxdepth 2 \
    -name mpi.h 2>/dev/null | head -n 1)")
if [ -f "$mpi/mpi.h" ]; then
    flags=(-Iinclude -Ibindings/cpp/include -Ibindings/mpi/include -isystem "$mpi" -isystem "$mpi/openmpi")
    step "header-c11-fsdp_mpi.h" twice fsdp_mpi.h c -std=c11 "${flags[@]}"
    for header in $(headers bindings/mpi/include); do
        step "header-c++17-${header//\//-}" twice "$header" c++ -std=c++17 "${flags[@]}"
    done
else
    echo "headers of bindings/mpi: not checked, there is no mpi.h"
fi
torch=$(cat "$BUILD/torch.dir" 2>/dev/null)
if [ -n "$torch" ]; then
    flags=(-std=c++20 -Iinclude -Ibindings/cpp/include -Ibindings/libtorch/include
        -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include")
    # LibTorch's headers take 20 s to parse: once for the header that users include, really alone, and once as a
    # precompiled header for the parts below it.
    precompiled=$BUILD/header_check/torch.hpp
    mkdir -p "${precompiled%/*}"
    echo '#include <torch/torch.h>' >"$precompiled"
    step "header-torch-precompiled" "${CXX:-c++}" -x c++-header "${flags[@]}" -Wall -Wextra -Wpedantic \
        "$precompiled" -o "$precompiled.gch"
    # Several at once; then one line each.
    running=0
    for header in $(headers bindings/libtorch/include); do
        before=(-include "$precompiled")
        [ "${header%/*}" = fsdp ] && before=()
        result=${precompiled%/*}/${header//\//-}
        { twice "$header" c++ "${flags[@]}" "${before[@]}" >"$result.log" 2>&1 && touch "$result.ok"; } &
        running=$((running + 1))
        [ "$running" -ge "${JOBS:-$(nproc)}" ] && { wait -n; running=$((running - 1)); }
    done
    wait
    for header in $(headers bindings/libtorch/include); do
        result=${precompiled%/*}/${header//\//-}
        step "header-c++20-${header//\//-}" show_result "$result"
    done
    rm -rf "${precompiled%/*}"
else
    echo "headers of bindings/libtorch: not checked, $BUILD/torch.dir names no LibTorch"
fi
[ "$failed" -eq 0 ]
