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

# background NAME COMMAND...: starts a check when fewer than JOBS run; `step NAME show_result NAME`, once it has ended, is its
# line.
results=$BUILD/header_check
rm -rf "$results"
mkdir -p "$results"
background() {
    local result=$results/$1
    shift
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-$(nproc)}" ]; do wait -n; done
    { "$@" >"$result.log" 2>&1 && touch "$result.ok"; } </dev/null &
}
show_result() { cat "$results/$1.log" && [ -f "$results/$1.ok" ]; }

torch=$(cat "$BUILD/torch.dir" 2>/dev/null)
if [ -n "$torch" ]; then
    torch_flags=(-std=c++20 -Iinclude -Ibindings/cpp/include -Ibindings/libtorch/include
        -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include")
    # LibTorch's headers take 20 s to parse: once as a precompiled header, for the parts of the binding, and once for the
    # header that users include, really alone.
    precompiled=$results/torch.hpp
    echo '#include <torch/torch.h>' >"$precompiled"
    background header-torch-precompiled "${CXX:-c++}" -x c++-header "${torch_flags[@]}" -Wall -Wextra -Wpedantic \
        "$precompiled" -o "$precompiled.gch"
    precompiling=$!
    background header-c++20-fsdp-torch.hpp twice fsdp/torch.hpp c++ "${torch_flags[@]}"
fi

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
if [ -n "$torch" ]; then
    wait "$precompiling"
    step header-torch-precompiled show_result header-torch-precompiled
    for header in $(headers bindings/libtorch/include); do
        [ "$header" = fsdp/torch.hpp ] ||
            background "header-c++20-${header//\//-}" twice "$header" c++ "${torch_flags[@]}" -include "$precompiled"
    done
    wait
    for header in $(headers bindings/libtorch/include); do
        step "header-c++20-${header//\//-}" show_result "header-c++20-${header//\//-}"
    done
else
    echo "headers of bindings/libtorch: not checked, $BUILD/torch.dir names no LibTorch"
fi
rm -rf "$results"
[ "$failed" -eq 0 ]
