//! The messages of the rendezvous and their bytes (little-endian, one SEQPACKET message each).

use crate::error::{Error, Status};

/// Version of this protocol and of the control segment's layout: both sides must have the same.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 4] = *b"FSDP";
/// Longest error text that is sent; longer ones are cut.
const MAX_TEXT: usize = 4096;

/// Who a process says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub version: u32,
    pub rank: u32,
    pub world: u32,
    pub pid: u32,
    /// How much longer the process will wait.
    pub remaining_ms: u64,
    pub job: String,
}

impl Hello {
    pub fn encode(&self) -> Vec<u8> {
        let mut b = MAGIC.to_vec();
        for n in [self.version, self.rank, self.world, self.pid] {
            b.extend(n.to_le_bytes());
        }
        b.extend(self.remaining_ms.to_le_bytes());
        b.extend(self.job.as_bytes());
        b
    }

    /// `None` for bytes that are no greeting.
    pub fn decode(bytes: &[u8]) -> Option<Hello> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let n = |i: usize| Some(u32::from_le_bytes(rest.get(4 * i..4 * i + 4)?.try_into().ok()?));
        let remaining_ms = u64::from_le_bytes(rest.get(16..24)?.try_into().ok()?);
        let job = String::from_utf8(rest.get(24..)?.to_vec()).ok()?;
        Some(Hello { version: n(0)?, rank: n(1)?, world: n(2)?, pid: n(3)?, remaining_ms, job })
    }
}

/// What rank 0 answers; `Control` and `Peer` carry a descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The greeting is accepted; the others are awaited.
    Joined,
    /// The rendezvous has failed.
    Failed(Error),
    /// The control segment.
    Control,
    /// The socket to a rank, and its process id.
    Peer { rank: u32, pid: u32 },
    /// Every rank has everything.
    Go,
}

impl Answer {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Answer::Joined => vec![1],
            Answer::Failed(e) => {
                let mut b = vec![2];
                b.extend((e.status as i32).to_le_bytes());
                b.extend(e.message.bytes().take(MAX_TEXT));
                b
            }
            Answer::Control => vec![3],
            Answer::Peer { rank, pid } => {
                let mut b = vec![4];
                b.extend(rank.to_le_bytes());
                b.extend(pid.to_le_bytes());
                b
            }
            Answer::Go => vec![5],
        }
    }

    pub fn decode(bytes: &[u8]) -> Option<Answer> {
        let (kind, rest) = bytes.split_first()?;
        let n = |i: usize| Some(u32::from_le_bytes(rest.get(4 * i..4 * i + 4)?.try_into().ok()?));
        Some(match kind {
            1 => Answer::Joined,
            2 => {
                let status = Status::from_code(n(0)? as i32)?;
                Answer::Failed(Error::new(status, String::from_utf8_lossy(rest.get(4..)?)))
            }
            3 => Answer::Control,
            4 => Answer::Peer { rank: n(0)?, pid: n(1)? },
            5 => Answer::Go,
            _ => return None,
        })
    }
}

/// What a rank tells rank 0 at the end.
pub enum Report {
    /// It has everything.
    Ready,
    Failed(Error),
}

impl Report {
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Report::Ready => Answer::Go.encode(),
            Report::Failed(e) => Answer::Failed(e.clone()).encode(),
        }
    }

    pub fn decode(bytes: &[u8]) -> Option<Report> {
        match Answer::decode(bytes)? {
            Answer::Go => Some(Report::Ready),
            Answer::Failed(e) => Some(Report::Failed(e)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn messages_survive() {
        let hello =
            Hello { version: 1, rank: 2, world: 3, pid: 4, remaining_ms: 1 << 40, job: "a job, \u{e9}".to_string() };
        assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        let error = Error::new(Status::Rendezvous, "no");
        for a in [Answer::Joined, Answer::Failed(error), Answer::Control, Answer::Peer { rank: 9, pid: 8 }, Answer::Go]
        {
            assert_eq!(Answer::decode(&a.encode()), Some(a));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64), magic: bool) {
            let bytes = if magic { [&MAGIC[..], &bytes[..]].concat() } else { bytes };
            if let Some(h) = Hello::decode(&bytes) {
                prop_assert_eq!(h.encode(), bytes.clone());
            }
            let _ = (Answer::decode(&bytes), Report::decode(&bytes));
        }
    }
}
