//! The agreement of ranks: before anything else, every collective is announced by a header of fixed size, which all ranks
//! gather. So sizes always match, and whoever runs something else is found before its bytes meet others'.

use crate::comm::shm::{Announcement, Detail};
use crate::comm::{Kind, Tag, UnitName};
use crate::dtype::DType;
use crate::error::{err, Result};

/// Bytes of a header.
pub const HEADER: usize = 64;

/// What a rank is about to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub sequence: u64,
    pub what: Announcement,
    /// What the others need not have the same: the length of this rank's part, which gradients it has.
    pub own: u64,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER] {
        let Tag { kind, unit, dtype, bytes } = self.what.tag;
        let words = [
            self.sequence,
            u64::from(unit) << 32 | (kind as u64) << 8 | dtype as u64,
            bytes,
            self.what.detail.pack(),
            self.own,
        ];
        let mut out = [0; HEADER];
        for (to, word) in out.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// None if it is none.
    pub fn decode(bytes: &[u8]) -> Option<Header> {
        let word = |i: usize| Some(u64::from_le_bytes(bytes.get(8 * i..8 * i + 8)?.try_into().ok()?));
        let code = word(1)?;
        let tag = Tag {
            kind: Kind::from_code((code >> 8) as u8)?,
            unit: (code >> 32) as u32,
            dtype: DType::ALL.into_iter().find(|d| *d as u64 == code & 0xff)?,
            bytes: word(2)?,
        };
        let what = Announcement { tag, detail: Detail::unpack(word(3)?) };
        Some(Header { sequence: word(0)?, what, own: word(4)? })
    }
}

/// What all ranks together run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Agreed {
    /// The same. What each rank has of its own.
    Same(Vec<u64>),
    /// Some ranks run this reduce-scatter, the others have ended their backward (None): they take part without gradients.
    Joined(Announcement, Vec<Option<u64>>),
}

/// Compares the ranks' headers.
pub fn compare(headers: &[u8], names: &[UnitName]) -> Result<Agreed> {
    let all: Vec<Option<Header>> = headers.chunks_exact(HEADER).map(Header::decode).collect();
    let id = |h: &Option<Header>| h.map(|h| (h.sequence, h.what));
    if all.iter().all(|h| h.is_some() && id(h) == id(&all[0])) {
        return Ok(Agreed::Same(all.iter().flatten().map(|h| h.own).collect()));
    }
    let ended = |h: &Option<Header>| h.is_some_and(|h| h.what.tag.kind == Kind::EndReductions);
    let reduces = all.iter().find(|h| !ended(h)).copied().flatten();
    if let Some(first) = reduces.filter(|h| h.what.tag.kind == Kind::ReduceScatter) {
        // Backwards of the same slots only, and all that still reduce reduce the same.
        let fits = |h: &Option<Header>| match h {
            Some(h) if ended(&Some(*h)) => h.sequence == first.sequence && slots(&h.what) == slots(&first.what),
            other => id(other) == id(&Some(first)),
        };
        if all.iter().all(fits) {
            let own = |h: &Option<Header>| h.filter(|h| h.what.tag.kind == Kind::ReduceScatter).map(|h| h.own);
            return Ok(Agreed::Joined(first.what, all.iter().map(own).collect()));
        }
    }
    let b = all.iter().position(|h| id(h) != id(&all[0])).unwrap_or(0);
    let text = |h: &Option<Header>| h.map_or("something unreadable".to_string(), |h| fully(&h.what, names));
    let forward = all.iter().flatten().any(|h| h.what.tag.kind == Kind::ForwardAllGather);
    let what = if forward { "Forward order differs across ranks" } else { "ranks disagree" };
    let sequence = all[0].map_or(0, |h| h.sequence);
    Err(err!(
        Mismatch,
        "{what}: at collective {sequence} rank 0 runs {} but rank {b} runs {}",
        text(&all[0]),
        text(&all[b])
    ))
}

fn slots(what: &Announcement) -> Option<u32> {
    match what.detail {
        Detail::Slots(slots, _) => Some(slots),
        _ => None,
    }
}

/// With the names of the unit's parameters.
fn fully(a: &Announcement, names: &[UnitName]) -> String {
    let params = names.get(a.tag.unit as usize).map(|n| n.params.as_str()).filter(|p| !p.is_empty());
    a.describe(names) + &params.map_or(String::new(), |p| format!(" with parameters {p}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: Kind, unit: u32, own: u64) -> Header {
        let tag = Tag { kind, unit, dtype: DType::F32, bytes: if kind == Kind::EndReductions { 0 } else { 64 } };
        let params = if kind == Kind::EndReductions { 0 } else { 2 };
        Header { sequence: 7, what: Announcement { tag, detail: Detail::Slots(1, params) }, own }
    }

    fn agreed(headers: &[Header]) -> Result<Agreed> {
        let names = ["a", "b"].map(|n| UnitName { label: n.into(), params: format!("{n}.w") });
        compare(&headers.iter().flat_map(Header::encode).collect::<Vec<u8>>(), &names)
    }

    #[test]
    fn headers_survive() {
        let h = header(Kind::ReduceScatter, 1, u64::MAX);
        assert_eq!(Header::decode(&h.encode()), Some(h));
        assert_eq!(Header::decode(&[0; HEADER]), None);
    }

    #[test]
    fn what_is_ones_own_may_differ() {
        let same = [header(Kind::ReduceScatter, 1, 3), header(Kind::ReduceScatter, 1, 4)];
        assert_eq!(agreed(&same), Ok(Agreed::Same(vec![3, 4])));
    }

    #[test]
    fn a_difference_names_ranks_and_units() {
        let e = agreed(&[header(Kind::ForwardAllGather, 0, 0), header(Kind::ForwardAllGather, 1, 0)]).unwrap_err();
        for part in ["Forward order differs", "collective 7", "rank 0", "\"a\"", "rank 1", "\"b\"", "b.w"] {
            assert!(e.message.contains(part), "{e}");
        }
        let mut late = header(Kind::ReduceScatter, 0, 0);
        late.sequence = 8;
        assert!(agreed(&[header(Kind::ReduceScatter, 0, 0), late]).is_err());
    }

    #[test]
    fn who_has_ended_joins_one_reduction_and_not_two() {
        let (end, a, b) =
            (header(Kind::EndReductions, 9, 0), header(Kind::ReduceScatter, 0, 1), header(Kind::ReduceScatter, 1, 1));
        assert_eq!(agreed(&[end, a, a]), Ok(Agreed::Joined(a.what, vec![None, Some(1), Some(1)])));
        assert!(agreed(&[a, end, b]).is_err());
        assert!(agreed(&[end, header(Kind::AllGather, 0, 0)]).is_err());
    }
}
