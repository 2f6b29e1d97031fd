#!/usr/bin/env bash
# The C ABI as committed against the C ABI as built: include/fsdp.h (what cbindgen makes of src/capi), the exported
# symbols (cmake/fsdp.symbols; only fsdp_*), the soname.
#
#   scripts/check_abi.sh            fails on any difference and shows it
#   scripts/check_abi.sh --update   writes the header and the symbol list (make header)
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root" || exit 1
symbols=cmake/fsdp.symbols
library=$CARGO_TARGET_DIR/release/libfsdp.so

# The header that the build script wrote: cargo says where.
generated_header() {
    cargo build --release --features cli --message-format=json 2>"$BUILD/logs/abi-build.log" |
        python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message["reason"] == "build-script-executed" and "fsdp" in message["package_id"]:
        print(message["out_dir"] + "/fsdp.h")' | tail -n 1
}

exported() { nm -D --defined-only "$library" | awk '{print $3}' | LC_ALL=C sort; }

check_header() { diff -u include/fsdp.h "$header" || { echo "run 'make header' and commit the result"; false; }; }

check_prefix() {
    # Every name that the header declares or defines is ours.
    ! grep -nE '^#define ' "$header" | grep -vE '#define FSDP_' &&
        ! exported | grep -v '^fsdp_[a-z0-9_]*$'
}

check_symbols() { diff -u "$symbols" <(exported) || { echo "run 'make header' and commit the result"; false; }; }

# Each exported function is declared in the header, and the other way round.
check_declared() {
    diff -u <(exported) <(sed "/^ *\/*\*/d" "$header" | grep -oE "\bfsdp_[a-z0-9_]+\(" | tr -d '(' | LC_ALL=C sort -u)
}

check_soname() {
    local major
    major=$(sed -n 's/^version = "\([0-9]*\)\..*/\1/p' Cargo.toml | head -n 1)
    readelf -d "$library" | grep SONAME
    readelf -d "$library" | grep -q "SONAME.*\[libfsdp\.so\.$major\]"
}

header=$(generated_header)
if [ ! -f "$header" ]; then
    echo "no header was generated:" >&2
    tail -n 40 "$BUILD/logs/abi-build.log" >&2
    exit 1
fi
if [ "${1:-}" = --update ]; then
    mkdir -p include
    cmp -s "$header" include/fsdp.h || cp "$header" include/fsdp.h
    exported >"$symbols"
    echo "include/fsdp.h and $symbols are up to date"
    exit 0
fi
step abi-header check_header
step abi-names check_prefix
step abi-symbols check_symbols
step abi-declared check_declared
step abi-soname check_soname
[ "$failed" -eq 0 ]
