//! What ranks must agree on when an engine or an optimizer is made: the model, the options, and whether it went well.

use crate::comm::Communicator;
use crate::config::EngineConfig;
use crate::error::{err, Error, Result, Status};
use crate::timeline;
use xxhash_rust::xxh3::xxh3_128;

/// Makes an error of one rank the same error on every rank. Collective.
pub fn on_result(done: Result<u64>, comm: &dyn Communicator) -> Result<u64> {
    let mine = done.as_ref().err().map_or(String::new(), |e| format!("{}\n{}", e.status as i32, e.message));
    let all = comm.exchange(mine.as_bytes())?;
    let Some((rank, text)) = all.iter().enumerate().find(|(_, text)| !text.is_empty()) else { return done };
    let text = String::from_utf8_lossy(text);
    let (code, message) = text.split_once('\n').unwrap_or(("", &text));
    let status = code.parse().ok().and_then(Status::from_code).unwrap_or(Status::Callback);
    Err(Error::new(status, format!("rank {rank}: {message}")))
}

/// Compares the options of all ranks; every rank gets the same error. Collective.
pub fn on_options(config: &EngineConfig, comm: &dyn Communicator) -> Result<()> {
    let mut lines: Vec<String> = config.agreed().map(|(name, value)| format!("{name} = {value}")).into();
    lines.push(format!("{} = {:?}", timeline::VARIABLE, timeline::wanted()));
    on_lines(&lines, |_| "options", comm)
}

/// Compares the model of all ranks; every rank gets the same error. Collective.
pub fn on_model(description: &[String], comm: &dyn Communicator) -> Result<()> {
    on_lines(description, |_| "models", comm)
}

/// Compares lines of text of all ranks; every rank gets the same error, which shows the first that differs and says
/// `what` they are part of. Collective.
pub fn on_lines(lines: &[String], what: impl Fn(usize) -> &'static str, comm: &dyn Communicator) -> Result<()> {
    let text = lines.join("\n");
    // A hash first: the text, which may be long, only matters when it differs.
    let hashes = comm.exchange(&xxh3_128(text.as_bytes()).to_le_bytes())?;
    if hashes.iter().all(|hash| *hash == hashes[0]) {
        return Ok(());
    }
    let all = comm.exchange(text.as_bytes())?;
    let Some(rank) = (1..all.len()).find(|r| all[*r] != all[0]) else { return Ok(()) };
    let (first, other) = (String::from_utf8_lossy(&all[0]), String::from_utf8_lossy(&all[rank]));
    let mut pairs = (first.lines(), other.lines());
    for line in 0.. {
        let (a, b) = (pairs.0.next(), pairs.1.next());
        if a != b {
            let what = what(line);
            let (a, b) = (a.unwrap_or("nothing there"), b.unwrap_or("nothing there"));
            return Err(err!(Mismatch, "ranks have different {what}: rank 0 has {a}, but rank {rank} has {b}"));
        }
        if a.is_none() {
            break;
        }
    }
    Err(err!(Mismatch, "ranks have different {}", what(lines.len())))
}
