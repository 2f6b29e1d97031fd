#!/usr/bin/env bash
# Builds the small project beside this file as a user would, from another folder, against an installed fsdp, and
# runs it alone and as two ranks.
#
#   run.sh KIND PREFIX WORKDIR    (the tools come from the environment: CMAKE CC CXX GENERATOR MAKE_PROGRAM PKG_CONFIG
#                                  TORCH LIBDIR VERSION)
#
# cmake_c, cmake_static, cmake_cpp, cmake_torch   find_package, and the target of that name
# cmake_mpi          the same with COMPONENTS mpi, under MPIRUN
# cmake_relocated    as cmake_c, after the prefix was copied elsewhere
# cmake_no_torch     asking for COMPONENTS torch without a LibTorch is an error that says so
# pkgconfig_shared, pkgconfig_static              plain cc with what pkg-config says
set -euo pipefail

kind=$1 prefix=$2 work=$3
source=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
rm -rf "$work"
mkdir -p "$work"
cp "$source"/CMakeLists.txt "$source"/main.* "$work"
cd "$work"

if [ "$kind" = cmake_relocated ]; then
    cp -a "$prefix" moved
    prefix=$work/moved
fi

configure() {
    env -u TORCH_DIR -u Torch_DIR -u CMAKE_PREFIX_PATH "$CMAKE" -S . -B build -G "$GENERATOR" \
        -DCMAKE_MAKE_PROGRAM="$MAKE_PROGRAM" -DCMAKE_C_COMPILER="$CC" -DCMAKE_CXX_COMPILER="$CXX" \
        -DCMAKE_PREFIX_PATH="$prefix" "$@"
}

# check PROGRAM: prints the sum over its ranks' numbers from 1, that is W (W + 1) / 2.
check() {
    local world expected output
    for world in 1 2; do
        expected="world size $world, sum $((world * (world + 1) / 2)), fsdp $VERSION"
        output=$("$prefix/bin/fsdp" run -n "$world" --no-prefix -- "$@" | sort -u)
        if [ "$output" != "$expected" ]; then
            echo "expected '$expected' from every rank, not: $output" >&2
            exit 1
        fi
    done
}

case $kind in
cmake_mpi)
    configure -DKIND=mpi -DMPI_INCLUDE="${MPI_INCLUDE:-}" -DMPI_LIBRARY="${MPI_LIBRARY:-}"
    "$CMAKE" --build build
    output=$("$MPIRUN" -n 2 build/outside | sort -u)
    [ "$output" = "world size 2, sum 3, fsdp $VERSION" ] || { echo "not: $output" >&2; exit 1; }
    ;;
cmake_no_torch)
    if configure -DKIND=torch >log 2>&1; then
        echo "COMPONENTS torch was found without a LibTorch" >&2
        exit 1
    fi
    grep -q 'no LibTorch was found' log
    ;;
cmake_torch)
    configure -DKIND=torch -DTORCH_DIR="$TORCH"
    "$CMAKE" --build build
    check build/outside
    ;;
cmake_*)
    target=${kind#cmake_}
    [ "$target" = relocated ] && target=c
    configure -DKIND="$target"
    "$CMAKE" --build build
    check build/outside
    if [ "$target" = static ] && readelf -d build/outside | grep libfsdp; then
        echo "the static program needs the shared library" >&2
        exit 1
    fi
    ;;
pkgconfig_*)
    if [ -z "$PKG_CONFIG" ] || [ "${PKG_CONFIG%NOTFOUND}" != "$PKG_CONFIG" ]; then
        echo "pkg-config (or pkgconf) is not installed" >&2
        exit 1
    fi
    export PKG_CONFIG_PATH=$prefix/$LIBDIR/pkgconfig
    [ "$("$PKG_CONFIG" --modversion fsdp)" = "$VERSION" ]
    if [ "$kind" = pkgconfig_static ]; then
        # shellcheck disable=SC2046
        "$CC" main.c -o outside -static $("$PKG_CONFIG" --static --cflags --libs fsdp)
        if readelf -d outside | grep NEEDED; then
            echo "the static program needs shared libraries" >&2
            exit 1
        fi
        check ./outside
    else
        # shellcheck disable=SC2046
        "$CC" main.c -o outside $("$PKG_CONFIG" --cflags --libs fsdp)
        readelf -d outside | grep -q 'NEEDED.*\[libfsdp\.so\.[0-9]*\]'
        export LD_LIBRARY_PATH=$prefix/$LIBDIR
        check ./outside
    fi
    ;;
*)
    echo "unknown kind '$kind'" >&2
    exit 1
    ;;
esac
