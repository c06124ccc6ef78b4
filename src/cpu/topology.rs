//! Facts of the machine that no instruction tells: the cores that this process may use, the size of
//! a core's L2, and whether the system gives huge pages. Where the system does not say, what is
//! most common.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::read_to_string;

/// L2 where nothing tells it: that of most server cores.
const COMMON_L2: usize = 1 << 20;

/// Physical cores that this process may use: of its affinity mask, and no more than a quota of
/// processor time allows. Two hardware threads of a core share its multipliers, so a second thread
/// there only makes the others wait.
pub fn cores() -> usize {
    let logical = logical_cores();
    physical_cores().map_or(logical, |cores| cores.clamp(1, logical))
}

/// Hardware threads that this process may use.
pub fn logical_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn physical_cores() -> Option<usize> {
    let status = read_to_string("/proc/self/status").ok()?;
    let allowed = cpus(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)?;
    // The list of a core's hardware threads names the core.
    let siblings = |cpu: usize| read_to_string(format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"));
    allowed.into_iter().map(|cpu| siblings(cpu).ok()).collect::<Option<BTreeSet<_>>>().map(|cores| cores.len())
}

/// `0-2,5` as numbers.
fn cpus(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cpus)
}

/// Bytes of a core's L2.
pub fn l2_bytes() -> usize {
    let cache = |index: usize, fact: &str| read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{fact}")).ok();
    let l2 = (0..8).find(|index| cache(*index, "level").is_some_and(|level| level.trim() == "2"));
    l2.and_then(|index| bytes(&cache(index, "size")?)).unwrap_or(COMMON_L2)
}

/// `512K` as bytes.
fn bytes(size: &str) -> Option<usize> {
    let size = size.trim();
    let (digits, unit) = match size.strip_suffix('M') {
        Some(digits) => (digits, 1 << 20),
        None => (size.strip_suffix('K')?, 1 << 10),
    };
    digits.parse::<usize>().ok()?.checked_mul(unit).filter(|bytes| *bytes > 0)
}

/// How the system gives huge pages to buffers that ask for them with `madvise`, as those of 8 MiB
/// and more do (`memory`): `always`, `madvise` and `never` are its words; none where it has no such
/// choice.
#[cfg(feature = "cli")]
pub fn huge_pages() -> Option<String> {
    let choices = read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    Some(chosen(&choices)?.to_owned())
}

/// `always [madvise] never`: the word in brackets.
#[cfg(feature = "cli")]
fn chosen(choices: &str) -> Option<&str> {
    Some(choices.split_once('[')?.1.split_once(']')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_sizes_are_read_as_the_system_writes_them() {
        assert_eq!(cpus("\t0-2,5,7-8\n"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(cpus("0"), Some(vec![0]));
        assert_eq!(cpus(""), None);
        assert_eq!((bytes("512K\n"), bytes("2M"), bytes("0K"), bytes("many")), (Some(512 << 10), Some(2 << 20), None, None));
    }

    #[cfg(feature = "cli")]
    #[test]
    fn the_choice_of_huge_pages_stands_in_brackets() {
        assert_eq!((chosen("always [madvise] never\n"), chosen("always\n")), (Some("madvise"), None));
    }

    #[test]
    fn there_is_a_core_and_a_cache() {
        assert!((1..=logical_cores()).contains(&cores()));
        assert!(l2_bytes() >= 64 << 10, "{}", l2_bytes());
    }
}
