//! What the operating system says about memory. Linux only; elsewhere nothing is known.

use std::fs;

/// Largest resident set of this process so far, in bytes.
pub fn peak_rss_bytes() -> Option<u64> {
    kib_entry(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
}

/// Bytes that can be allocated without the system having to end somebody: what is free or
/// reclaimable, within the control group's limit where there is one (a container's).
pub fn available_bytes() -> Option<u64> {
    let machine = kib_entry(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
    let group = |file: &str| -> Option<u64> {
        fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse().ok()
    };
    match (group("memory.max"), group("memory.current")) {
        (Some(limit), Some(used)) => Some(machine.min(limit.saturating_sub(used))),
        _ => Some(machine),
    }
}

fn kib_entry(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn linux_tells_both() {
        let before = peak_rss_bytes().unwrap();
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak_rss_bytes().unwrap() >= before, "{}", block.len());
        assert!(peak_rss_bytes().unwrap() > 64 << 20);
        assert!(available_bytes().unwrap() > 1 << 20);
    }

    #[test]
    fn entries_are_in_kib() {
        assert_eq!(kib_entry("A: 1 kB\nMemAvailable:   12 kB\n", "MemAvailable:"), Some(12 << 10));
        assert_eq!(kib_entry("A: 1 kB\n", "VmHWM:"), None);
    }
}
