//! A fixed number of pieces of memory, and which unit has which.

use crate::plan::UnitId;

/// What a piece of memory is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nothing, and nobody has to be waited for.
    Free,
    /// Nothing, once what its last user has launched is done.
    Busy,
    /// Filled for this unit, which nobody has read yet.
    Ahead(UnitId),
    /// This unit's.
    Open(UnitId),
}

struct Place {
    bytes: usize,
    state: Use,
    /// When the state was set; a smaller number is longer ago.
    since: u64,
}

/// See the module's text. After the fixed places there is one for each unit, of its own size, which has memory only while it
/// is used.
pub struct Pool {
    places: Vec<Place>,
    fixed: usize,
    /// By unit: the place that is filled for it or its own.
    of_unit: Vec<Option<usize>>,
    time: u64,
}

impl Pool {
    pub fn new(bytes: &[usize], units: impl ExactSizeIterator<Item = usize>) -> Pool {
        let of_unit = vec![None; units.len()];
        let all = bytes.iter().copied().chain(units);
        let places = all.map(|bytes| Place { bytes, state: Use::Free, since: 0 }).collect();
        Pool { places, fixed: bytes.len(), of_unit, time: 0 }
    }

    /// Fixed places.
    pub fn len(&self) -> usize {
        self.fixed
    }

    pub fn is_beyond(&self, place: usize) -> bool {
        place >= self.fixed
    }

    /// The place of `unit` beyond the fixed ones, unless it is in use.
    pub fn beyond(&self, unit: UnitId) -> Option<usize> {
        Some(self.fixed + unit as usize).filter(|p| matches!(self.places[*p].state, Use::Free | Use::Busy))
    }

    /// Places that hold or await a unit.
    pub fn in_use(&self) -> usize {
        self.of_unit.iter().flatten().count()
    }

    /// The places of units that have one of their own.
    pub fn open_places(&self) -> impl Iterator<Item = usize> + '_ {
        self.of_unit.iter().flatten().copied().filter(|p| matches!(self.places[*p].state, Use::Open(_)))
    }

    /// Places beyond the fixed ones whose last user's work may still run.
    pub fn busy_beyond(&self) -> impl Iterator<Item = usize> + '_ {
        (self.fixed..self.places.len()).filter(|p| self.places[*p].state == Use::Busy)
    }

    pub fn bytes(&self, place: usize) -> usize {
        self.places[place].bytes
    }

    pub fn state(&self, place: usize) -> Use {
        self.places[place].state
    }

    pub fn place(&self, unit: UnitId) -> Option<usize> {
        self.of_unit[unit as usize]
    }

    pub fn set(&mut self, place: usize, state: Use) {
        if let Use::Ahead(unit) | Use::Open(unit) = self.places[place].state {
            self.of_unit[unit as usize] = None;
        }
        if let Use::Ahead(unit) | Use::Open(unit) = state {
            self.of_unit[unit as usize] = Some(place);
        }
        self.time += 1;
        (self.places[place].state, self.places[place].since) = (state, self.time);
    }

    /// What nobody has, of the smallest size that fits: first what nobody has to be waited for, then what was given
    /// back longest ago.
    pub fn choose(&self, bytes: usize) -> Option<usize> {
        let free = |i: &usize| matches!(self.places[*i].state, Use::Free | Use::Busy) && self.places[*i].bytes >= bytes;
        let key = |i: &usize| (self.places[*i].bytes, self.places[*i].state == Use::Busy, self.places[*i].since);
        (0..self.fixed).filter(free).min_by_key(key)
    }

    /// The units that have a place of their own.
    pub fn open(&self) -> impl Iterator<Item = UnitId> + '_ {
        self.open_places().filter_map(|p| match self.places[p].state {
            Use::Open(unit) => Some(unit),
            _ => None,
        })
    }

    /// The places that are filled for units that nobody has read yet, in the order in which they were filled.
    pub fn ahead(&self) -> impl Iterator<Item = usize> {
        let mut ahead: Vec<usize> =
            (0..self.fixed).filter(|i| matches!(self.places[*i].state, Use::Ahead(_))).collect();
        ahead.sort_unstable_by_key(|i| self.places[*i].since);
        ahead.into_iter()
    }

    /// Forgets what was filled ahead: nobody has read it, so nobody has to be waited for.
    pub fn drop_ahead(&mut self) {
        self.ahead().for_each(|place| self.set(place, Use::Free));
    }
}
