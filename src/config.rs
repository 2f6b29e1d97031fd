//! What a host can choose when it makes an engine. Every field has a default.

/// Options of [`crate::engine::Engine::new`]; must be the same on every rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineConfig {
    /// Gradient buffers per rank, each as large as a unit: how many units may be collecting or reducing gradients at
    /// once. 0: one more than there are levels of nested units, enough for every unit on a path of the module tree to
    /// collect while another is being reduced. A unit that finds all taken collects in memory of its own, and
    /// goes through one more buffer when it is reduced.
    pub gradient_slots: u32,
}
