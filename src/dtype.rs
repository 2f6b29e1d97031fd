//! Element types: their size, their name, and their DLPack code.

use std::fmt;

/// An element type that a tensor, a unit buffer or a collective can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DType {
    F32 = 0,
    F64 = 1,
    I32 = 2,
    I64 = 3,
    U8 = 4,
    F16 = 5,
    BF16 = 6,
}

impl DType {
    pub const ALL: [DType; 7] = [DType::F32, DType::F64, DType::I32, DType::I64, DType::U8, DType::F16, DType::BF16];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::F16 | DType::BF16 => 2,
            DType::F32 | DType::I32 => 4,
            DType::F64 | DType::I64 => 8,
        }
    }

    /// DLPack's (type code, bits); lanes are always 1.
    pub fn dlpack(self) -> (u8, u8) {
        match self {
            DType::I32 => (0, 32),
            DType::I64 => (0, 64),
            DType::U8 => (1, 8),
            DType::F16 => (2, 16),
            DType::F32 => (2, 32),
            DType::F64 => (2, 64),
            DType::BF16 => (4, 16),
        }
    }

    /// The element type with this DLPack (type code, bits), if the engine has it.
    pub fn from_dlpack(code: u8, bits: u8) -> Option<DType> {
        DType::ALL.into_iter().find(|d| d.dlpack() == (code, bits))
    }

    /// Whether it is a floating type: averages exist.
    pub fn is_float(self) -> bool {
        match self {
            DType::F32 | DType::F64 | DType::F16 | DType::BF16 => true,
            DType::I32 | DType::I64 | DType::U8 => false,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F64 => "float64",
            DType::I32 => "int32",
            DType::I64 => "int64",
            DType::U8 => "uint8",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_found_by_its_dlpack_code() {
        for d in DType::ALL {
            let (code, bits) = d.dlpack();
            assert_eq!(DType::from_dlpack(code, bits), Some(d), "{d}");
            assert_eq!(usize::from(bits), 8 * d.size(), "{d}");
        }
        assert_eq!(DType::from_dlpack(2, 16), Some(DType::F16));
        assert_eq!(DType::from_dlpack(4, 16), Some(DType::BF16));
        assert_eq!((DType::from_dlpack(4, 32), DType::from_dlpack(2, 8)), (None, None));
    }
}
