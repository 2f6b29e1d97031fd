//! Rendezvous within one process: ranks are threads, strangers are raw connections.

use super::*;
use crate::comm::shm::socket;
use crate::error::Status;
use std::thread;

fn config(job: &str, rank: usize, world_size: usize, ms: u64) -> Config {
    let job = format!("{job}-{}", std::process::id());
    Config { rendezvous_timeout: Duration::from_millis(ms), ..Config::new(job, rank, world_size) }
}

/// Runs the ranks, 20 ms apart, and returns each one's outcome.
fn run(configs: Vec<Config>) -> Vec<Result<Mesh>> {
    let start = |(i, c): (usize, Config)| {
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(20 * i as u64));
            meet(&c, &|| Ok(()))
        })
    };
    let threads: Vec<_> = configs.into_iter().enumerate().map(start).collect();
    threads.into_iter().map(|t| t.join().unwrap()).collect()
}

/// All ranks failed with one message, which is returned.
fn one_error(outcomes: Vec<Result<Mesh>>) -> String {
    let errors: Vec<Error> = outcomes.into_iter().map(|o| o.err().expect("the rendezvous fails")).collect();
    for e in &errors {
        assert_eq!((e.status, &e.message), (Status::Rendezvous, &errors[0].message));
    }
    errors[0].message.clone()
}

#[test]
fn every_pair_of_ranks_gets_a_socket() {
    for world in [1, 2, 3, 8] {
        let configs = (0..world).map(|r| config(&format!("mesh{world}"), world - 1 - r, world, 20_000)).collect();
        let mut meshes: Vec<Mesh> = run(configs).into_iter().map(|m| m.unwrap()).collect();
        meshes.reverse();
        let deadline = Instant::now() + Duration::from_secs(10);
        for (r, mesh) in meshes.iter().enumerate() {
            for (p, peer) in mesh.peers.iter().enumerate() {
                assert_eq!(peer.is_none(), p == r);
                if let Some((fd, pid)) = peer {
                    assert_eq!(*pid, std::process::id());
                    socket::send(fd.as_fd(), &[r as u8, p as u8], None, deadline).unwrap();
                }
            }
        }
        for (r, mesh) in meshes.iter().enumerate() {
            for (p, (fd, _)) in mesh.peers.iter().enumerate().filter_map(|(p, x)| Some((p, x.as_ref()?))) {
                let socket::Received::Message(m, None) = socket::receive(fd.as_fd()).unwrap() else { panic!() };
                assert_eq!(m, [p as u8, r as u8]);
            }
        }
    }
}

#[test]
fn missing_ranks_are_named_on_every_rank() {
    let message = one_error(run(vec![config("missing", 0, 4, 400), config("missing", 2, 4, 60_000)]));
    assert!(message.starts_with("ranks 1, 3 of job \"missing-"), "{message}");
    assert!(message.contains("did not appear within"), "{message}");
}

#[test]
fn the_least_patient_rank_sets_the_deadline() {
    let message = one_error(run(vec![config("patience", 0, 3, 60_000), config("patience", 2, 3, 300)]));
    assert!(message.starts_with("rank 1 of job"), "{message}");
}

#[test]
fn a_missing_rank_0_is_named() {
    let message = one_error(run(vec![config("norank0", 1, 2, 200)]));
    assert!(message.contains("rank 0 of job") && message.contains("did not appear within 200 ms"), "{message}");
}

#[test]
fn different_world_sizes_name_both_ranks() {
    let c = |rank, world| config("sizes", rank, world, 20_000);
    let message = one_error(run(vec![c(0, 3), c(2, 8), c(1, 3)]));
    assert!(message.contains("rank 0 has world size 3 but rank 2 (pid "), "{message}");
    assert!(message.contains("has world size 8"), "{message}");
}

#[test]
fn two_of_the_same_rank_are_named_to_all() {
    for rank in [0, 1] {
        let c = |r| config(&format!("twice{rank}"), r, 3, 20_000);
        let message = one_error(run(vec![c(0), c(rank), c(1)]));
        assert!(message.contains(&format!("two processes say they are rank {rank}: pid ")), "{message}");
    }
}

#[test]
fn a_rank_out_of_range_ends_the_wait_of_the_others() {
    let outcomes = run(vec![config("range", 0, 2, 20_000), config("range", 5, 2, 20_000)]);
    let errors: Vec<Error> = outcomes.into_iter().map(|o| o.err().unwrap()).collect();
    assert_eq!((errors[0].status, errors[1].status), (Status::Rendezvous, Status::InvalidArgument));
    for e in errors {
        assert!(e.message.contains("out of range for world size 2"), "{e}");
    }
}

#[test]
fn garbage_and_silence_do_not_disturb() {
    let first = config("garbage", 0, 2, 20_000);
    let name = socket_name(me(), &first.job);
    let server = thread::spawn(move || meet(&first, &|| Ok(())));
    let mut strangers = Vec::new();
    for i in 0..200 {
        let deadline = Instant::now() + Duration::from_secs(10);
        let connection = loop {
            match socket::connect(&name) {
                Ok(c) => break c,
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
                Err(e) => panic!("{e}"),
            }
        };
        match i % 3 {
            0 => drop(connection),
            1 => {
                let bytes = vec![i as u8; 1 + i * 7];
                socket::send(connection.as_fd(), &bytes, Some(connection.as_fd()), deadline).unwrap();
                strangers.push(connection);
            }
            _ => strangers.push(connection),
        }
    }
    let second = meet(&config("garbage", 1, 2, 20_000), &|| Ok(()));
    assert!(second.is_ok() && server.join().unwrap().is_ok());
}

#[test]
fn another_job_behind_the_same_name_is_refused() {
    let first = config("collision", 0, 2, 20_000);
    let name = socket_name(me(), &first.job);
    let server = thread::spawn(move || meet(&first, &|| Ok(())));
    let other = wire::Hello {
        version: wire::VERSION,
        rank: 1,
        world: 2,
        pid: 1,
        remaining_ms: 1000,
        job: "another".to_string(),
    };
    for hello in [other.clone(), wire::Hello { version: 99, ..other }] {
        let deadline = Instant::now() + Duration::from_secs(10);
        let connection = loop {
            match socket::connect(&name) {
                Ok(c) => break c,
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        };
        socket::send(connection.as_fd(), &hello.encode(), None, deadline).unwrap();
        let answer = loop {
            match socket::receive(connection.as_fd()).unwrap() {
                socket::Received::Message(m, _) => break wire::Answer::decode(&m).unwrap(),
                _ => assert!(Instant::now() < deadline),
            }
            thread::sleep(Duration::from_millis(1));
        };
        let wire::Answer::Failed(e) = answer else { panic!("{answer:?}") };
        assert!(e.message.contains("refused a process") && e.message.contains("\"another\""), "{e}");
    }
    assert!(meet(&config("collision", 1, 2, 20_000), &|| Ok(())).is_ok());
    assert!(server.join().unwrap().is_ok());
}

#[test]
fn a_rank_that_dies_before_the_others_come_is_named() {
    let first = config("dies", 0, 3, 20_000);
    let name = socket_name(me(), &first.job);
    let job = first.job.clone();
    let server = thread::spawn(move || meet(&first, &|| Ok(())));
    let hello = wire::Hello { version: wire::VERSION, rank: 2, world: 3, pid: 77, remaining_ms: 20_000, job };
    let deadline = Instant::now() + Duration::from_secs(10);
    let connection = loop {
        match socket::connect(&name) {
            Ok(c) => break c,
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    };
    socket::send(connection.as_fd(), &hello.encode(), None, deadline).unwrap();
    thread::sleep(Duration::from_millis(50));
    drop(connection);
    let e = server.join().unwrap().err().unwrap();
    assert!(e.message.contains("rank 2") && e.message.contains("died before all ranks were there"), "{e}");
}
