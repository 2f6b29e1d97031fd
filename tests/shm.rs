//! The shared-memory communicator with real processes. Each test starts this same test binary again, once a rank, with
//! the name of a role in the environment; the roles and the tests that use them are in `tests/shm/`.

#[path = "shm/support.rs"]
mod support;

#[path = "shm/collectives.rs"]
mod collectives;
#[path = "shm/faults.rs"]
mod faults;
#[path = "shm/life.rs"]
mod life;

/// Not a test: what a rank process runs. Without a role in the environment it is an ordinary start, and does nothing.
#[test]
fn rank_process() {
    support::run_role(&|rank| match rank.role.as_str() {
        "host" => collectives::host(rank),
        "phases" => collectives::phases(rank),
        "reductions" => collectives::reductions(rank),
        "unordered" => collectives::unordered(rank),
        "wrap" => collectives::wrap(rank),
        "several" => collectives::several(rank),
        "kill" => faults::kill(rank),
        "loop" => faults::train_loop(rank),
        "mismatch" => faults::mismatch(rank),
        "skip" => faults::skip(rank),
        "late" => faults::late(rank),
        "abort" => faults::abort(rank),
        "leave" => faults::leave(rank),
        "leave-late" => faults::leave_late(rank),
        "misuse" => life::misuse(rank),
        "leak" => life::leak(rank),
        "again" => life::again(rank),
        "env" => life::from_env(rank),
        "too-much" => life::too_much(rank),
        "stranger" => life::stranger(rank),
        "squatter" => life::squatter(rank),
        role => panic!("no role {role}"),
    });
}
