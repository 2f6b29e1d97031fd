#!/usr/bin/env bash
# Formatting and lints of the Rust part, and a Cargo.lock that fits Cargo.toml.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$root" || exit 1

step rust-lock cargo metadata --locked --format-version 1
step rust-format cargo fmt --check
step rust-clippy cargo clippy --release --all-targets --features cli -- -D warnings
[ "$failed" -eq 0 ]
