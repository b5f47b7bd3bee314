//! The compiler's report on the kernels, as tools/kernel-report.sh wrote it last: registers per
//! thread by kernel and architecture.

use std::collections::HashMap;
use std::sync::LazyLock;

/// The newest `benches/results/kernel-report-*.md`, chosen by build.rs; empty where there is none.
const REPORT: &str = include_str!(concat!(env!("OUT_DIR"), "/kernel-report.md"));

static REGISTERS: LazyLock<HashMap<(&'static str, u32), usize>> = LazyLock::new(|| parse(REPORT));

/// Registers of a kernel's thread on the newest reported architecture that is not newer than `arch`;
/// none for a kernel that the report does not know.
pub fn registers(kernel: &str, arch: u32) -> Option<usize> {
    let reported = [90, 75, 70].into_iter().filter(|&known| known <= arch);
    reported.filter_map(|known| REGISTERS.get(&(kernel, known)).copied()).next()
}

/// Rows of the form `| file | kernel | block | shared | 46, 50 % | ..`, with the architectures in the
/// header.
fn parse(report: &str) -> HashMap<(&str, u32), usize> {
    let mut registers = HashMap::new();
    let mut archs: Vec<Option<u32>> = Vec::new();
    for line in report.lines().filter(|line| line.starts_with('|')) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if cells.contains(&"kernel") {
            let arch = |cell: &&str| cell.strip_prefix("sm_").and_then(|arch| arch.parse().ok());
            archs = cells.iter().map(arch).collect();
            continue;
        }
        let Some(&kernel) = cells.get(2) else { continue };
        for (arch, cell) in archs.iter().zip(&cells) {
            let count = cell.split([',', ' ']).next().and_then(|count| count.parse().ok());
            if let (Some(arch), Some(count)) = (arch, count) {
                registers.insert((kernel, *arch), count);
            }
        }
    }
    registers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_read_from_the_table() {
        let text = "# Title\n\n| file | kernel | block | shared | sm_70 | sm_75 |\n| --- | --- |\n\
            | cascade | cascade_forward_f32 | 1024 | 0 | 46, 50 % | 47, 100 %, spills |\n";
        let found = parse(text);
        assert_eq!(found.get(&("cascade_forward_f32", 70)), Some(&46));
        assert_eq!(found.get(&("cascade_forward_f32", 75)), Some(&47));
        assert_eq!(found.len(), 2);
        assert!(parse("").is_empty());
    }

    #[test]
    fn a_kernel_of_the_report_has_registers_on_newer_cards_too() {
        if !REPORT.is_empty() {
            let at = |arch| registers("resize_forward_f32", arch);
            assert!(at(70).is_some_and(|count| (1..=255).contains(&count)));
            assert_eq!(at(120), at(90));
        }
        assert_eq!(registers("no_such_kernel", 90), None);
    }
}
