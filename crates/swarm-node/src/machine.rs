//! What this computer has: memory, cores, and how fast it reads.

use std::time::Instant;

use swarm_kernels::Pool;

/// Memory that can be used without swapping, in bytes; `None` where the system does not say.
pub fn memory_available() -> Option<u64> {
    let kib = proc_field("/proc/meminfo", "MemAvailable:")?;
    // A memory limit on the process group counts as well (containers, services).
    let limit = cgroup_headroom().unwrap_or(u64::MAX);
    Some(kib.saturating_mul(1024).min(limit))
}

/// Memory of this computer, in bytes; `None` where the system does not say.
pub fn memory_total() -> Option<u64> {
    proc_field("/proc/meminfo", "MemTotal:").map(|kib| kib.saturating_mul(1024))
}

/// Most memory this process has had resident, in bytes.
pub fn peak_rss() -> Option<u64> {
    peak_rss_of(std::process::id())
}

/// The same of another process of this user.
pub fn peak_rss_of(process: u32) -> Option<u64> {
    proc_field(&format!("/proc/{process}/status"), "VmHWM:").map(|kib| kib.saturating_mul(1024))
}

/// Bytes of this process's own memory that are in huge pages; `None` where the system does not say.
pub fn huge_page_bytes() -> Option<u64> {
    proc_field("/proc/self/smaps_rollup", "AnonHugePages:").map(|kib| kib.saturating_mul(1024))
}

fn proc_field(file: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

fn cgroup_headroom() -> Option<u64> {
    let read = |name: &str| {
        std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse::<u64>().ok()
    };
    read("memory.max")?.checked_sub(read("memory.current")?)
}

/// Cores this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// Ids of the cores this process may be pinned to, rising.
pub fn core_ids() -> Vec<usize> {
    let mut ids: Vec<usize> =
        core_affinity::get_core_ids().unwrap_or_default().into_iter().map(|core| core.id).collect();
    ids.sort_unstable();
    ids
}

/// The computer's name, for people; never sent by mDNS.
pub fn host_name() -> String {
    let file = std::fs::read_to_string("/etc/hostname").ok();
    let env = || std::env::var("HOSTNAME").or_else(|_| std::env::var("COMPUTERNAME")).ok();
    let name = file.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).or_else(env);
    name.unwrap_or_else(|| "node".to_owned()).chars().take(48).collect()
}

/// Pins the calling thread to the first of `cores`: what the thread that gives a pool its work does.
pub fn pin_caller(cores: Option<&[usize]>) {
    if let Some(&id) = cores.and_then(<[usize]>::first) {
        core_affinity::set_for_current(core_affinity::CoreId { id });
    }
}

/// A compute pool of `threads`, pinned to `cores` when given: thread `i` to `cores[i]`. Thread 0 is whoever calls the
/// pool, and pins itself ([`pin_caller`]).
pub fn pool(threads: usize, cores: Option<Vec<usize>>) -> Pool {
    let Some(cores) = cores.filter(|cores| !cores.is_empty()) else { return Pool::new(threads) };
    Pool::with_start(threads, move |thread: usize| {
        if let Some(&id) = cores.get(thread % cores.len()) {
            core_affinity::set_for_current(core_affinity::CoreId { id });
        }
    })
}

/// Sequential read bandwidth in 10^9 bytes per second with the pool's threads: the median of `rounds` passes over
/// a buffer far larger than the caches. Takes about `rounds * bytes / bandwidth` seconds.
pub fn read_bandwidth(pool: &Pool, bytes: usize, rounds: usize) -> f64 {
    let words = (bytes / 8).max(1024);
    let memory = swarm_kernels::ReadProbe::new(words);
    let mut speeds: Vec<f64> = (0..rounds.max(1))
        .map(|_| {
            let start = Instant::now();
            std::hint::black_box(memory.read(pool));
            (words * 8) as f64 / start.elapsed().as_secs_f64() / 1e9
        })
        .collect();
    speeds.sort_by(f64::total_cmp);
    speeds[speeds.len() / 2]
}
