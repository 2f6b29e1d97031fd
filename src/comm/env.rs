//! The communicator a launcher asks for in the environment: torchrun, Open MPI, MPICH and Slurm.
//!
//! The first launcher whose rank variable is set counts (in that order: inside a Slurm allocation `mpirun` is the one
//! that started the ranks). `FSDP_JOB` replaces the job name made from the launcher's variables; `FSDP_TIMEOUT_MS` and
//! `FSDP_RENDEZVOUS_TIMEOUT_MS` replace the timeouts. No launcher at all is a world of one.

use super::{shm, single, Communicator};
use crate::error::{err, Result};
use std::sync::Arc;
use std::time::Duration;

/// Collective: the communicator that the environment describes.
pub fn init() -> Result<Arc<dyn Communicator>> {
    match config(&|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))? {
        Some(config) if config.world_size > 1 => shm::init(&config),
        _ => Ok(single::init()),
    }
}

/// Reads one variable.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// How one launcher tells its ranks who they are. Of several names the first that is set counts.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    world: &'static [&'static str],
    local_rank: &'static str,
    /// Ranks on this host; they must be all.
    local_world: &'static str,
    /// Hosts; there must be one.
    hosts: &'static [&'static str],
    /// What tells this job from others on the host.
    job: &'static [&'static str],
    /// Whether the world size is also set outside ranks, so that alone it says nothing.
    world_alone_is_fine: bool,
}

const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        name: "torchrun",
        rank: "RANK",
        world: &["WORLD_SIZE"],
        local_rank: "LOCAL_RANK",
        local_world: "LOCAL_WORLD_SIZE",
        hosts: &[],
        job: &["TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"],
        world_alone_is_fine: false,
    },
    Launcher {
        name: "ompi",
        rank: "OMPI_COMM_WORLD_RANK",
        world: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
        hosts: &[],
        job: &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"],
        world_alone_is_fine: false,
    },
    Launcher {
        name: "mpich",
        rank: "PMI_RANK",
        world: &["PMI_SIZE"],
        local_rank: "MPI_LOCALRANKID",
        local_world: "MPI_LOCALNRANKS",
        hosts: &[],
        job: &["PMI_JOBID", "PMI_PORT", "HYDI_CONTROL_FD"],
        world_alone_is_fine: false,
    },
    Launcher {
        name: "slurm",
        rank: "SLURM_PROCID",
        world: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        local_rank: "SLURM_LOCALID",
        local_world: "",
        hosts: &["SLURM_STEP_NUM_NODES", "SLURM_NNODES"],
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
        // An allocation's shell has it too.
        world_alone_is_fine: true,
    },
];

/// The rank, world size, job and timeouts that the variables give; `None` without a launcher.
pub fn config(get: Lookup<'_>) -> Result<Option<shm::Config>> {
    // A bad timeout is an error even where nothing waits.
    let rendezvous_timeout = timeout(get, "FSDP_RENDEZVOUS_TIMEOUT_MS", shm::DEFAULT_RENDEZVOUS_TIMEOUT)?;
    let timeout = timeout(get, "FSDP_TIMEOUT_MS", shm::DEFAULT_TIMEOUT)?;
    for l in &LAUNCHERS {
        let world = l.world.iter().copied().find(|n| get(n).is_some());
        let Some(rank) = number(get, l.rank)? else {
            match world {
                Some(name) if !l.world_alone_is_fine => {
                    return Err(err!(InvalidArgument, "{name} is set but {} is not", l.rank));
                }
                _ => continue,
            }
        };
        let world_name = world.ok_or_else(|| {
            let names = l.world.join(" or ");
            err!(InvalidArgument, "{} is set but {names} is not", l.rank)
        })?;
        let world_size = number(get, world_name)?.unwrap_or(0);
        check(get, l, rank, world_name, world_size)?;
        let job = job(get, l)?;
        return Ok(Some(shm::Config { job, rank, world_size, rendezvous_timeout, timeout }));
    }
    Ok(None)
}

fn check(get: Lookup<'_>, l: &Launcher, rank: usize, world_name: &str, world_size: usize) -> Result<()> {
    if !(1..=shm::MAX_WORLD).contains(&world_size) {
        return Err(err!(InvalidArgument, "{world_name}={world_size} is not in 1..={}", shm::MAX_WORLD));
    }
    if rank >= world_size {
        return Err(err!(InvalidArgument, "{}={rank} is out of range for {world_name}={world_size}", l.rank));
    }
    if let Some(local) = number(get, l.local_rank)?.filter(|n| *n >= world_size) {
        return Err(err!(InvalidArgument, "{}={local} is out of range for {world_name}={world_size}", l.local_rank));
    }
    let one_host = "the shared-memory communicator joins ranks of one host only";
    if let Some(local) = number(get, l.local_world)?.filter(|n| *n != world_size) {
        return Err(err!(Unsupported, "{}={local} but {world_name}={world_size}: {one_host}", l.local_world));
    }
    if let Some(name) = l.hosts.iter().find(|n| get(n).is_some()) {
        if let Some(hosts) = number(get, name)?.filter(|n| *n != 1) {
            return Err(err!(Unsupported, "{name}={hosts}: {one_host}"));
        }
    }
    Ok(())
}

fn job(get: Lookup<'_>, l: &Launcher) -> Result<String> {
    if let Some(job) = get("FSDP_JOB") {
        if job.is_empty() || job.len() > shm::MAX_JOB {
            return Err(err!(InvalidArgument, "FSDP_JOB has {} bytes, not 1..={}", job.len(), shm::MAX_JOB));
        }
        return Ok(job);
    }
    let parts = l.job.iter().filter_map(|name| get(name));
    let mut job = parts.fold(l.name.to_string(), |job, part| job + "/" + &part);
    // What names a job is at the end; cut at a character.
    let mut start = job.len().saturating_sub(shm::MAX_JOB);
    while !job.is_char_boundary(start) {
        start += 1;
    }
    Ok(job.split_off(start))
}

/// The variable as a whole number; `None` if it is not set or has no name.
fn number(get: Lookup<'_>, name: &str) -> Result<Option<usize>> {
    if name.is_empty() {
        return Ok(None);
    }
    let Some(text) = get(name) else { return Ok(None) };
    match text.trim().parse() {
        Ok(n) => Ok(Some(n)),
        Err(_) => Err(err!(InvalidArgument, "{name}={text:?} is not a whole number")),
    }
}

fn timeout(get: Lookup<'_>, name: &str, default: Duration) -> Result<Duration> {
    match number(get, name)? {
        None => Ok(default),
        Some(0) => Err(err!(InvalidArgument, "{name}=0: a timeout of 0 ms lets no rank arrive")),
        Some(ms) => Ok(Duration::from_millis(ms as u64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Status};

    fn read(text: &str) -> Result<Option<shm::Config>> {
        let vars: Vec<(&str, &str)> = text.split_whitespace().filter_map(|p| p.split_once('=')).collect();
        config(&|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string()))
    }

    fn error(text: &str) -> Error {
        read(text).expect_err(text)
    }

    #[test]
    fn nothing_set_is_single() {
        assert_eq!(read("").unwrap(), None);
        assert_eq!(read("SLURM_NTASKS=4 SLURM_JOB_ID=7").unwrap(), None);
    }

    #[test]
    fn every_launcher_is_understood() {
        let torchrun = "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=29500 \
                        TORCHELASTIC_RUN_ID=none";
        let cases = [
            (torchrun, 1, 2, "torchrun/none/h/29500"),
            ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=3 OMPI_COMM_WORLD_LOCAL_RANK=0", 0, 3, "ompi"),
            ("PMI_RANK=3 PMI_SIZE=4 PMI_PORT=h:1", 3, 4, "mpich/h:1"),
            ("SLURM_PROCID=2 SLURM_NTASKS=8 SLURM_LOCALID=2 SLURM_JOB_ID=5 SLURM_STEP_ID=0", 2, 8, "slurm/5/0"),
            ("SLURM_PROCID=1 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=2", 1, 2, "slurm"),
            ("SLURM_PROCID=0 SLURM_NTASKS=1 PMI_RANK=1 PMI_SIZE=2", 1, 2, "mpich"),
            ("RANK=0 WORLD_SIZE=2 FSDP_JOB=mine", 0, 2, "mine"),
        ];
        for (text, rank, world_size, job) in cases {
            assert_eq!(read(text).unwrap(), Some(shm::Config::new(job, rank, world_size)), "{text}");
        }
    }

    #[test]
    fn timeouts_are_taken() {
        let c = read("RANK=0 WORLD_SIZE=2 FSDP_TIMEOUT_MS=7 FSDP_RENDEZVOUS_TIMEOUT_MS=9").unwrap().unwrap();
        assert_eq!((c.timeout, c.rendezvous_timeout), (Duration::from_millis(7), Duration::from_millis(9)));
        assert!(error("FSDP_TIMEOUT_MS=soon").message.contains("FSDP_TIMEOUT_MS"));
        assert!(error("FSDP_RENDEZVOUS_TIMEOUT_MS=0").message.contains("FSDP_RENDEZVOUS_TIMEOUT_MS"));
    }

    #[test]
    fn bad_variables_are_named() {
        let cases = [
            ("RANK=0", "WORLD_SIZE"),
            ("WORLD_SIZE=2", "RANK"),
            ("RANK=x WORLD_SIZE=2", "RANK=\"x\""),
            ("RANK=-1 WORLD_SIZE=2", "RANK=\"-1\""),
            ("RANK=2 WORLD_SIZE=2", "RANK=2"),
            ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE=0"),
            ("RANK=0 WORLD_SIZE=65", "WORLD_SIZE=65"),
            ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=9", "LOCAL_RANK=9"),
            ("OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_RANK"),
            ("PMI_RANK=0", "PMI_SIZE"),
            ("SLURM_PROCID=0", "SLURM_NTASKS"),
            ("RANK=0 WORLD_SIZE=2 FSDP_JOB=", "FSDP_JOB"),
        ];
        for (text, named) in cases {
            let e = error(text);
            assert_eq!(e.status, Status::InvalidArgument, "{text}");
            assert!(e.message.contains(named), "{text}: {e}");
        }
    }

    #[test]
    fn several_hosts_are_unsupported() {
        for text in [
            "RANK=0 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2",
            "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2",
            "PMI_RANK=0 PMI_SIZE=4 MPI_LOCALNRANKS=1",
            "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_NNODES=2",
        ] {
            assert_eq!(error(text).status, Status::Unsupported, "{text}");
        }
    }

    #[test]
    fn long_launcher_names_are_cut() {
        let text = format!("RANK=0 WORLD_SIZE=2 TORCHELASTIC_RUN_ID={} MASTER_PORT=77", "é".repeat(2000));
        let c = read(&text).unwrap().unwrap();
        assert!(c.job.len() <= shm::MAX_JOB && c.job.ends_with("/77"));
    }
}
