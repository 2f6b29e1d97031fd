//! Text for people: numbers with units, and the one way to standard output.

use std::io::Write;

/// Writes to standard output; a reader that has gone is no failure; returns the exit status.
pub fn print(text: &str) -> i32 {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            eprintln!("fsdp: standard output: {e}");
            1
        }
        _ => 0,
    }
}

/// With three digits and a unit of 1024.
pub fn bytes(n: u64) -> String {
    scaled(n, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// With three digits and a unit of 1000.
pub fn count(n: u64) -> String {
    scaled(n, 1000.0, &["", "thousand", "million", "billion", "trillion"]).trim_end().to_string()
}

fn scaled(n: u64, step: f64, units: &[&str]) -> String {
    let (mut value, mut unit) = (n as f64, 0);
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    match unit {
        0 => format!("{n} {}", units[0]),
        _ => format!("{value:.2} {}", units[unit]),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_get_units() {
        for (n, want) in [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 29, "1.50 GiB")] {
            assert_eq!(super::bytes(n), want);
        }
        assert_eq!((super::count(999).as_str(), super::count(405_853_388_800).as_str()), ("999", "405.85 billion"));
    }
}
