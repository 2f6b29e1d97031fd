//! How the ranks of a communicator meet: an id that all have.

use super::library::Nccl;
use crate::error::{err, Result};
use cudarc::nccl::sys::ncclUniqueId;

/// NCCL's own variable: host:port where rank 0 listens; with it every rank gets the same id.
const VARIABLE: &str = "NCCL_COMM_ID";

/// What ncclCommInitRankConfig needs: made by one rank and given to all by the host, or made by all from the
/// environment.
#[derive(Clone)]
pub struct UniqueId(pub(super) ncclUniqueId);

impl UniqueId {
    pub const BYTES: usize = 128;

    /// A new id: for rank 0, which gives its bytes to the others. Local.
    pub fn new(nccl: &Nccl) -> Result<UniqueId> {
        let mut id = ncclUniqueId { internal: [0; UniqueId::BYTES] };
        // SAFETY: the pointer is valid.
        nccl.check("making an id for NCCL", unsafe { (nccl.fns.ncclGetUniqueId)(&mut id) })?;
        Ok(UniqueId(id))
    }

    /// The same id on every rank, from the launcher's variables: NCCL_COMM_ID if it is set, else the port after
    /// MASTER_PORT (which the launcher itself may listen on) at MASTER_ADDR. Sets NCCL_COMM_ID in this process. For one
    /// communicator at a time. Local.
    pub fn from_environment(nccl: &Nccl) -> Result<UniqueId> {
        let get = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        std::env::set_var(VARIABLE, address(&get)?);
        UniqueId::new(nccl)
    }

    pub fn to_bytes(&self) -> [u8; UniqueId::BYTES] {
        self.0.internal.map(|c| c as u8)
    }

    /// An id that rank 0 has made.
    pub fn from_bytes(bytes: &[u8]) -> Result<UniqueId> {
        let internal: [u8; UniqueId::BYTES] =
            bytes.try_into().map_err(|_| err!(InvalidArgument, "an id of NCCL has 128 bytes, not {}", bytes.len()))?;
        Ok(UniqueId(ncclUniqueId { internal: internal.map(|b| b as _) }))
    }
}

/// host:port, as NCCL reads it.
fn address(get: &dyn Fn(&str) -> Option<String>) -> Result<String> {
    if let Some(address) = get(VARIABLE) {
        return Ok(address);
    }
    let need = |name: &str| {
        get(name).ok_or_else(|| {
            err!(Rendezvous, "NCCL's ranks cannot meet: give them an id, or set {VARIABLE}, or MASTER_ADDR and MASTER_PORT; {name} is \
                 not set")
        })
    };
    let (host, port) = (need("MASTER_ADDR")?, need("MASTER_PORT")?);
    let number: u16 =
        port.parse().ok().filter(|n| *n > 0).ok_or_else(|| err!(InvalidArgument, "MASTER_PORT is \"{port}\""))?;
    let next = if number == u16::MAX { number - 1 } else { number + 1 };
    Ok(if host.contains(':') { format!("[{host}]:{next}") } else { format!("{host}:{next}") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    fn from(variables: &[(&str, &str)]) -> Result<String> {
        address(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn the_port_after_the_launchers() {
        let at = |host, port| from(&[("MASTER_ADDR", host), ("MASTER_PORT", port)]);
        assert_eq!(at("node1", "29500").unwrap(), "node1:29501");
        assert_eq!(at("::1", "65535").unwrap(), "[::1]:65534");
        assert_eq!(from(&[("NCCL_COMM_ID", "a:1"), ("MASTER_ADDR", "b"), ("MASTER_PORT", "2")]).unwrap(), "a:1");
        for port in ["", "0", "70000", "x"] {
            assert!(at("node1", port).unwrap_err().message.contains("MASTER_PORT"), "{port}");
        }
        let e = from(&[("MASTER_PORT", "1")]).unwrap_err();
        assert_eq!(e.status, Status::Rendezvous);
        assert!(e.message.contains("MASTER_ADDR is not set"), "{e}");
    }

    #[test]
    fn an_id_travels_as_bytes() {
        let bytes: Vec<u8> = (0..128).map(|i| i as u8 * 2).collect();
        assert_eq!(UniqueId::from_bytes(&bytes).unwrap().to_bytes()[..], bytes[..]);
        assert!(UniqueId::from_bytes(&bytes[1..]).err().unwrap().message.contains("not 127"));
    }
}
