//! What a host can choose when it makes an engine. Every field has a default.

use crate::comm::nccl::UniqueId;
use crate::device::cuda::DeviceAllocator;
use crate::dtype::DType;
use crate::error::{err, Result};
use crate::materialize::ModuleInit;
use std::sync::Arc;
use std::time::Duration;

/// When units are resharded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Strategy {
    /// After every forward and backward: a unit's full parameters exist only while it computes (ZeRO-3).
    #[default]
    FullShard = 0,
    /// After the backward only: a unit stays unsharded from its forward on (ZeRO-2).
    ShardGradOp = 1,
    /// Every rank holds all parameters; gradients are averaged (data parallel).
    NoShard = 2,
    /// FullShard within groups of `shard_size` ranks; the groups are replicas of each other.
    HybridShard = 3,
    /// ShardGradOp within such groups.
    HybridShardGradOp = 4,
}

impl Strategy {
    pub const ALL: [Strategy; 5] = [
        Strategy::FullShard,
        Strategy::ShardGradOp,
        Strategy::NoShard,
        Strategy::HybridShard,
        Strategy::HybridShardGradOp,
    ];

    /// How messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::FullShard => "FULL_SHARD",
            Strategy::ShardGradOp => "SHARD_GRAD_OP",
            Strategy::NoShard => "NO_SHARD",
            Strategy::HybridShard => "HYBRID_SHARD",
            Strategy::HybridShardGradOp => "HYBRID_SHARD_GRAD_OP",
        }
    }

    /// Whether units other than the root are resharded after their forward, unless the host says otherwise.
    pub fn reshards_after_forward(self) -> bool {
        matches!(self, Strategy::FullShard | Strategy::HybridShard)
    }
}

/// What is done about ranks that run different forwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum OrderCheck {
    /// Every unshard is compared; a difference is an error on every rank.
    #[default]
    Error = 0,
    /// The first training iteration is compared; a rank that later differs from its own first iteration logs one
    /// warning.
    Warn = 1,
    /// Unshards are not compared.
    Off = 2,
}

impl OrderCheck {
    pub const ALL: [OrderCheck; 3] = [OrderCheck::Error, OrderCheck::Warn, OrderCheck::Off];
}

/// Whether a GPU's fixed unit buffers and gradient slots are memory of NCCL's own that its communicators know. One rank
/// has nothing to register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(i32)]
pub enum Registration {
    /// Where NCCL's version can do that and no allocator of the host's has the device memory.
    #[default]
    Auto = 0,
    Never = 1,
    /// Beside an allocator of the host's, too; an error where NCCL's version cannot.
    Always = 2,
}

impl Registration {
    pub const ALL: [Registration; 3] = [Registration::Auto, Registration::Never, Registration::Always];
}

/// Options of [`crate::engine::Engine::new`]; must be the same on every rank.
#[derive(Clone)]
pub struct EngineConfig {
    /// Gradient buffers per rank, each as large as a unit: how many units may be collecting or reducing gradients at
    /// once. 0: one more than there are levels of nested units, enough for every unit on a path of the module tree to
    /// collect while another is being reduced, and for up to 256 of the next largest units as many as fit in 1 MiB (not on a
    /// GPU). A unit that finds all taken collects in one more, which is given back afterwards.
    pub gradient_slots: u32,
    pub strategy: Strategy,
    /// Ranks of a shard group, a divisor of the world size, for the hybrid strategies; else 0.
    pub shard_size: u32,
    pub order_check: OrderCheck,
    /// The type that gradients are rounded to on each rank before they are summed (in float32, into float32 shards):
    /// F32, F16 or BF16.
    pub reduce_dtype: DType,
    /// The type that parameters are computed in, unless the tree says otherwise: F32, F16 or BF16; None: as registered.
    pub param_dtype: Option<DType>,
    /// A unit whose parameters are all computed in one 16-bit type collects gradients in that type (the first of each
    /// parameter in a backward; what is added to is float32). Not on a GPU.
    pub grads_in_param_dtype: bool,
    /// Initializes parameters without storage, module by module, in place of the tree's own initializers.
    pub param_init: Option<ModuleInit>,
    /// All ranks start from rank 0's values: what the others hold, or would initialize, is not looked at.
    pub sync_module_states: bool,
    /// This rank's shards, gradient shards and optimizer state lie in host memory, and shards are uploaded to the device
    /// when they are needed.
    pub cpu_offload: bool,
    /// The engine computes on a GPU; None: on the CPU.
    pub cuda: Option<CudaConfig>,
}

/// Options of an engine on a GPU. Those that ranks must agree on are in [`EngineConfig::agreed`].
#[derive(Clone)]
pub struct CudaConfig {
    /// The GPU's number among those that this process sees.
    pub device: usize,
    /// Units gathered ahead of their use at most.
    pub prefetch: usize,
    /// Most unit buffers at once; 0: as many as needed.
    pub max_units_in_flight: usize,
    /// The host's stream (a CUstream); 0: the legacy default stream.
    pub compute_stream: usize,
    /// How long a collective may take on the GPU once it is its turn.
    pub timeout: Duration,
    /// By which NCCL's ranks meet; None: rank 0 makes one.
    pub unique_id: Option<[u8; UniqueId::BYTES]>,
    /// Where device memory comes from; None: the driver's pool.
    pub allocator: Option<Arc<dyn DeviceAllocator>>,
    pub registration: Registration,
}

impl Default for CudaConfig {
    fn default() -> CudaConfig {
        CudaConfig {
            device: 0,
            prefetch: 1,
            max_units_in_flight: 0,
            compute_stream: 0,
            timeout: Duration::from_secs(600),
            unique_id: None,
            allocator: None,
            registration: Registration::Auto,
        }
    }
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            gradient_slots: 0,
            strategy: Strategy::default(),
            shard_size: 0,
            order_check: OrderCheck::default(),
            reduce_dtype: DType::F32,
            param_dtype: None,
            grads_in_param_dtype: false,
            param_init: None,
            sync_module_states: false,
            cpu_offload: false,
            cuda: None,
        }
    }
}

impl EngineConfig {
    /// Refuses what no engine can do.
    pub fn check(&self) -> Result<()> {
        match self.grads_in_param_dtype && self.cuda.is_some() {
            true => Err(err!(
                Unsupported,
                "grads_in_param_dtype is for engines on the CPU: on a GPU gradients are collected in float32"
            )),
            false => Ok(()),
        }
    }

    /// (name, value) of every option that ranks must agree on.
    pub fn agreed(&self) -> [(&'static str, String); 11] {
        [
            ("gradient_slots", self.gradient_slots.to_string()),
            ("strategy", self.strategy.name().to_string()),
            ("shard_size", self.shard_size.to_string()),
            ("order_check", format!("{:?}", self.order_check)),
            ("reduce_dtype", self.reduce_dtype.to_string()),
            ("sync_module_states", self.sync_module_states.to_string()),
            ("cpu_offload", self.cpu_offload.to_string()),
            ("param_dtype", self.param_dtype.map_or("as registered".to_string(), |d| d.to_string())),
            ("grads_in_param_dtype", self.grads_in_param_dtype.to_string()),
            ("cuda", self.cuda.as_ref().map_or("not set".to_string(), CudaConfig::agreed)),
            ("param_init_fn", if self.param_init.is_some() { "set" } else { "not set" }.to_string()),
        ]
    }
}

impl CudaConfig {
    /// What of it decides which collectives there are, and when.
    fn agreed(&self) -> String {
        let id = if self.unique_id.is_some() { "a" } else { "no" };
        let lent = if self.allocator.is_some() { "an" } else { "no" };
        let (prefetch, most, registration) = (self.prefetch, self.max_units_in_flight, self.registration);
        format!(
            "set, with prefetch {prefetch}, max_units_in_flight {most}, {id} nccl_unique_id, {lent} allocator and \
             registration {registration:?}"
        )
    }
}
