#!/usr/bin/env bash
# Unpacks Debian packages under a folder of ours: no root, nothing installed on the system.
#
#   scripts/fetch_debian.sh DEST PACKAGE...
#
# Effect: each PACKAGE that the system has not installed is downloaded with apt's own signature checks, from the
# sources the system is configured for, and unpacked into DEST/root (DEST/root/usr/include, ...). A package that is
# installed on the system is left to it. Dependencies are not followed: name them. apt's lists and cache are
# private, in DEST/apt; the system's are not touched. DEST/PACKAGE.stamp, written last, says that a package is
# done; a second run then does nothing and needs no network.
set -euo pipefail

say() { printf 'fetch_debian: %s\n' "$*"; }
fail() { printf 'fetch_debian: error: %s\n' "$*" >&2; exit 1; }

[ $# -ge 2 ] || fail "usage: fetch_debian.sh DEST PACKAGE..."
mkdir -p "$1"
dest=$(cd "$1" && pwd)
shift
by_hand="install by hand what these hold (nlohmann-json3-dev: nlohmann/json.hpp 3.11 or newer; libcli11-dev: \
CLI/CLI.hpp 2.1 or newer; valgrind: what it says, for one test; sword-text-web: any English text of 1 MB or more, given to the trainer as --text FILE) \
where the compiler finds it"

installed() {
    command -v dpkg-query >/dev/null &&
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

wanted=()
for package in "$@"; do
    [[ $package =~ ^[a-z0-9][a-z0-9+.-]+$ ]] || fail "'$package' is not a package name"
    [ -f "$dest/$package.stamp" ] || installed "$package" || wanted+=("$package")
done
[ ${#wanted[@]} -gt 0 ] || exit 0

for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null ||
        fail "$tool was not found, so this is no Debian system; to go on without ${wanted[*]}: $by_hand"
done

mkdir -p "$dest/apt/lists/partial" "$dest/apt/cache/archives/partial" "$dest/root"
# Under root apt would switch to its own user, which cannot write into DEST; other users cannot switch at all.
private=(
    -o "Dir::State::Lists=$dest/apt/lists" -o "Dir::Cache=$dest/apt/cache"
    -o "APT::Sandbox::User=$(id -un)" -o Acquire::Languages=none -o Acquire::Retries=3 -q
)
log=$dest/apt/log
# run COMMAND...: shows the log's end on failure.
run() {
    if ! "$@" >>"$log" 2>&1 </dev/null; then
        tail -n 12 "$log" >&2
        fail "this failed: $* (full output: $log); no network? To go on without ${wanted[*]}: $by_hand"
    fi
}

: >"$log"
say "reading the package lists"
run apt-get "${private[@]}" update
for package in "${wanted[@]}"; do
    folder=$dest/apt/$package
    rm -rf "$folder"
    mkdir -p "$folder"
    (cd "$folder" && run apt-get "${private[@]}" download "$package")
    for file in "$folder"/*.deb; do
        run dpkg -x "$file" "$dest/root"
        name=${file##*/}
    done
    say "unpacked $name into $dest/root"
    printf '%s\n' "$name" >"$dest/$package.stamp.tmp"
    mv "$dest/$package.stamp.tmp" "$dest/$package.stamp"
    rm -rf "$folder"
done
rm -rf "$dest/apt/lists" "$dest/apt/cache"
