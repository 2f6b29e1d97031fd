#!/usr/bin/env bash
# `make test`: every check and every test, to the end even when some fail. The last line counts them all.
# JOBS (default: the number of processors) is how many tests ctest runs at once.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root" || exit 1
JOBS=${JOBS:-$(nproc)}
total_passed=0
total_failed=0
skipped=0

# Runs a check script that prints one line a step, and adds up its lines.
checks() {
    local log=$BUILD/logs/$1.log
    "scripts/$1.sh" 2>&1 | tee "$log"
    local status=${PIPESTATUS[0]} ok bad
    ok=$(grep -c ' ok$' "$log")
    bad=$(grep -c 'FAILED (full output' "$log")
    # A script that failed before its first step counts as one failure.
    [ "$status" -ne 0 ] && [ "$bad" -eq 0 ] && bad=1
    total_passed=$((total_passed + ok))
    total_failed=$((total_failed + bad))
}

echo "== checks"
checks check_rust
checks check_abi
checks check_headers

echo "== cargo test"
log=$BUILD/logs/cargo-test.log
scripts/setup.sh nvrtc
{
    cuda_wheels "$BUILD/nvrtc" "$BUILD/libtorch" "$BUILD"/pytorch/lib/python*/site-packages
    cargo test --profile testing --features cli --no-fail-fast
} 2>&1 | tee "$log" | grep -vE '^ +(Compiling|Running)|^$'
status=${PIPESTATUS[0]}
read -r ok bad ignored < <(awk '/^test result:/ { p += $4; f += $6; i += $8 } END { print p + 0, f + 0, i + 0 }' "$log")
[ "$status" -ne 0 ] && [ "$bad" -eq 0 ] && bad=1
total_passed=$((total_passed + ok))
total_failed=$((total_failed + bad))
skipped=$((skipped + ignored))

echo "== ctest"
log=$BUILD/logs/ctest.log
junit=$BUILD/logs/ctest.xml
rm -f "$junit"
ctest --test-dir "$BUILD" -j "$JOBS" --output-on-failure --no-tests=error --output-junit "$junit" 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
read -r ok bad not_run < <(python3 - "$junit" <<'PYTHON'
import sys, xml.etree.ElementTree as tree
try:
    suite = tree.parse(sys.argv[1]).getroot()
    count = lambda name: int(suite.get(name) or 0)
    skipped = count("skipped") + count("disabled")
    print(count("tests") - count("failures") - skipped, count("failures"), skipped)
except (OSError, tree.ParseError):
    print(0, 1, 0)
PYTHON
)
[ "$status" -ne 0 ] && [ "$bad" -eq 0 ] && bad=1
total_passed=$((total_passed + ok))
total_failed=$((total_failed + bad))
skipped=$((skipped + not_run))

echo
echo "$total_passed passed, $total_failed failed, $skipped skipped"
[ "$total_failed" -eq 0 ]
