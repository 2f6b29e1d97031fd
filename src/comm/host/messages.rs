//! Small messages between ranks, where the host lends them: that this rank has failed or left, and who is where when a
//! collective has missed its deadline.

use super::table::Collectives;
use crate::error::{Error, Result, Status};
use std::sync::{Arc, Mutex};

/// Bytes of every message.
pub const MESSAGE: usize = 1024;
const TEXT: usize = MESSAGE - 16;

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// The communicator has failed: the error of every rank.
    Failed(Error),
    /// Who is there? Answered while a rank waits in a collective.
    Ask,
    /// This rank is there, and has announced so many collectives.
    Answer(u64),
    /// This rank has destroyed its communicator after announcing so many.
    Left(u64),
}

impl Message {
    pub fn encode(&self) -> [u8; MESSAGE] {
        let mut out = [0; MESSAGE];
        let (kind, status, number, text) = match self {
            Message::Failed(e) => (1, e.status as i32, 0, e.message.as_str()),
            Message::Ask => (2, 0, 0, ""),
            Message::Answer(issued) => (3, 0, *issued, ""),
            Message::Left(issued) => (4, 0, *issued, ""),
        };
        let mut len = text.len().min(TEXT);
        while !text.is_char_boundary(len) {
            len -= 1;
        }
        out[0] = kind;
        out[1] = status as u8;
        out[2..4].copy_from_slice(&(len as u16).to_le_bytes());
        out[8..16].copy_from_slice(&number.to_le_bytes());
        out[16..16 + len].copy_from_slice(&text.as_bytes()[..len]);
        out
    }

    /// None if it is none.
    pub fn decode(bytes: &[u8; MESSAGE]) -> Option<Message> {
        let len = usize::from(u16::from_le_bytes([bytes[2], bytes[3]]));
        let number = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
        match bytes[0] {
            1 => {
                let text = String::from_utf8_lossy(bytes.get(16..16 + len)?).into_owned();
                Some(Message::Failed(Error::new(Status::from_code(i32::from(bytes[1]))?, text)))
            }
            2 => Some(Message::Ask),
            3 => Some(Message::Answer(number)),
            4 => Some(Message::Left(number)),
            _ => None,
        }
    }
}

/// The one error that breaks a communicator, and how the others learn of it.
pub struct Broken {
    first: Mutex<Option<Error>>,
    table: Arc<dyn Collectives>,
    rank: usize,
    world: usize,
}

impl Broken {
    pub fn new(table: Arc<dyn Collectives>, rank: usize, world: usize) -> Broken {
        Broken { first: Mutex::new(None), table, rank, world }
    }

    pub fn error(&self) -> Option<Error> {
        self.first.lock().unwrap_or_else(|p| p.into_inner()).clone()
    }

    pub fn check(&self) -> Result<()> {
        self.error().map_or(Ok(()), Err)
    }

    /// Breaks the communicator with `error`, unless it is broken already, and tells the others; returns the error that counts.
    pub fn fail(&self, error: Error) -> Error {
        let counts = self.take(error);
        let (counts, is_first) = counts;
        if is_first {
            self.tell(&Message::Failed(counts.clone()));
            self.table.abort(&counts.message);
        }
        counts
    }

    /// Another rank has told of its error.
    fn told(&self, error: Error) {
        let (counts, is_first) = self.take(error);
        if is_first {
            self.table.abort(&counts.message);
        }
    }

    fn take(&self, error: Error) -> (Error, bool) {
        let mut first = self.first.lock().unwrap_or_else(|p| p.into_inner());
        let is_first = first.is_none();
        (first.get_or_insert(error).clone(), is_first)
    }

    /// To every other rank. One that cannot be reached finds out by its deadline.
    pub fn tell(&self, message: &Message) {
        if self.table.has_messages() {
            let bytes = message.encode();
            for rank in (0..self.world).filter(|r| *r != self.rank) {
                let _ = self.table.post(rank, &bytes);
            }
        }
    }
}

/// What is known of the other ranks.
#[derive(Default)]
pub struct Peers {
    /// Collectives that each had announced when it left.
    pub left: Vec<Option<u64>>,
    /// The same when it answered last.
    pub answered: Vec<Option<u64>>,
}

impl Peers {
    pub fn new(world: usize) -> Peers {
        Peers { left: vec![None; world], answered: vec![None; world] }
    }

    /// Takes in what has come. `issued`: what this rank has announced.
    pub fn hear(&mut self, broken: &Broken, issued: u64) -> Result<()> {
        let mut bytes = [0; MESSAGE];
        while broken.table.has_messages() {
            let polled = broken
                .table
                .poll(&mut bytes)
                .map_err(|e| broken.fail(e.context(format!("rank {}: polling for messages", broken.rank))))?;
            let Some(from) = polled else { break };
            match Message::decode(&bytes) {
                Some(Message::Failed(e)) => broken.told(e),
                Some(Message::Ask) => {
                    let _ = broken.table.post(from, &Message::Answer(issued).encode());
                }
                Some(Message::Answer(issued)) => self.set(from, |p| &mut p.answered, issued),
                Some(Message::Left(issued)) => self.set(from, |p| &mut p.left, issued),
                None => {}
            }
        }
        Ok(())
    }

    fn set(&mut self, rank: usize, which: impl Fn(&mut Peers) -> &mut Vec<Option<u64>>, issued: u64) {
        if let Some(entry) = which(self).get_mut(rank) {
            *entry = Some(issued);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_and_long_texts_are_cut_at_a_character() {
        for m in [Message::Ask, Message::Answer(u64::MAX), Message::Left(3)] {
            assert_eq!(Message::decode(&m.encode()), Some(m));
        }
        let failed = |text: String| Message::Failed(Error::new(Status::Timeout, text));
        let short = failed("rank 1".into());
        assert_eq!(Message::decode(&short.encode()), Some(short));
        let long = Message::decode(&failed("ä".repeat(MESSAGE)).encode());
        assert_eq!(long, Some(failed("ä".repeat(TEXT / 2))));
        assert_eq!(Message::decode(&[0; MESSAGE]), None);
    }
}
