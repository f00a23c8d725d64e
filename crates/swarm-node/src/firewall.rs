//! The firewalls of a computer: which one seems to be on, as far as an ordinary user may see, and the command that lets
//! other machines in.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::deadlines::{FIREWALL, FIREWALL_LOOK};

/// Processes looked at to find a firewall's.
const PROCESSES_MAX: usize = 20_000;
/// Nobody has a longer file of rules.
const RULES_BYTES_MAX: u64 = 1 << 20;

/// Whose firewall.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Firewall {
    /// Ubuntu and its kin.
    Ufw,
    /// Fedora, RHEL, openSUSE.
    Firewalld,
    /// Rules loaded from `/etc/nftables.conf`: the family, the table and the chain that sees what comes in.
    Nftables {
        /// For example `inet`.
        family: String,
        /// For example `filter`.
        table: String,
        /// For example `input`.
        chain: String,
    },
    /// The application firewall of macOS.
    MacOs,
    /// Windows Defender Firewall.
    Windows,
}

impl Firewall {
    /// Those of this computer that seem to be on.
    pub fn active() -> Vec<Self> {
        if cfg!(target_os = "macos") {
            let tool = "/usr/libexec/ApplicationFirewall/socketfilterfw";
            let on = says(tool, &["--getglobalstate"]).is_some_and(|text| macos_is_on(&text));
            return on.then_some(Self::MacOs).into_iter().collect();
        }
        if cfg!(target_os = "windows") {
            // On unless somebody has turned it off, and what its tool says depends on the language.
            return vec![Self::Windows];
        }
        Self::of_linux(Path::new("/"))
    }

    /// All that a computer of this kind may have.
    pub fn possible() -> Vec<Self> {
        match () {
            () if cfg!(target_os = "macos") => vec![Self::MacOs],
            () if cfg!(target_os = "windows") => vec![Self::Windows],
            () => vec![Self::Ufw, Self::Firewalld, Self::usual_nftables()],
        }
    }

    fn usual_nftables() -> Self {
        let [family, table, chain] = ["inet", "filter", "input"].map(str::to_owned);
        Self::Nftables { family, table, chain }
    }

    /// Those of a Linux whose files are under `root`.
    fn of_linux(root: &Path) -> Vec<Self> {
        let ufw = read(&root.join("etc/ufw/ufw.conf")).is_some_and(|text| ufw_is_on(&text));
        let firewalld = has_process(&root.join("proc"), "firewalld");
        let nftables = read(&root.join("etc/nftables.conf")).and_then(|text| nftables_input(&text));
        // The first two load rules of their own into nftables.
        let nftables = nftables.filter(|_| !ufw && !firewalld);
        [ufw.then_some(Self::Ufw), firewalld.then_some(Self::Firewalld), nftables]
            .into_iter()
            .flatten()
            .collect()
    }

    /// What people call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ufw => "ufw",
            Self::Firewalld => "firewalld",
            Self::Nftables { .. } => "nftables",
            Self::MacOs => "macOS application firewall",
            Self::Windows => "Windows Defender Firewall",
        }
    }

    /// Where its command is typed.
    pub fn shell(&self) -> &'static str {
        if *self == Self::Windows { "PowerShell as Administrator" } else { "a terminal" }
    }

    /// The command that lets other machines reach `program`: discovery on UDP 5353, and links on TCP `port`.
    pub fn command(&self, program: &str, port: u16) -> String {
        match self {
            Self::Ufw => format!("sudo ufw allow 5353/udp && sudo ufw allow {port}/tcp"),
            Self::Firewalld => format!(
                "sudo firewall-cmd --permanent --add-service=mdns && sudo firewall-cmd --permanent --add-port={port}/tcp && sudo firewall-cmd --reload"
            ),
            Self::Nftables { family, table, chain } => format!(
                "sudo nft insert rule {family} {table} {chain} udp dport 5353 accept && sudo nft insert rule {family} {table} {chain} tcp dport {port} accept"
            ),
            Self::MacOs => {
                let (tool, program) =
                    ("sudo /usr/libexec/ApplicationFirewall/socketfilterfw", in_shell(program));
                format!("{tool} --add {program} && {tool} --unblockapp {program}")
            }
            Self::Windows => format!(
                "New-NetFirewallRule -DisplayName swarm-os -Direction Inbound -Action Allow -Profile Any -Program '{}'",
                program.replace('\'', "''")
            ),
        }
    }
}

/// A word of a POSIX shell.
fn in_shell(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn read(path: &Path) -> Option<String> {
    use std::io::Read;
    let mut text = String::new();
    fs::File::open(path).ok()?.take(RULES_BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

fn ufw_is_on(text: &str) -> bool {
    let on = |line: &str| {
        line.split_once('=').is_some_and(|(key, value)| {
            key.trim() == "ENABLED" && value.trim().trim_matches('"').eq_ignore_ascii_case("yes")
        })
    };
    text.lines().any(on)
}

fn macos_is_on(text: &str) -> bool {
    text.contains("State = 1") || text.contains("State = 2")
}

/// Whether a process of this name runs.
fn has_process(proc: &Path, name: &str) -> bool {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten().take(PROCESSES_MAX);
    let numbered = |entry: &fs::DirEntry| {
        entry.file_name().to_str().is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    };
    entries
        .filter(numbered)
        .any(|entry| read(&entry.path().join("comm")).is_some_and(|comm| comm.trim() == name))
}

/// The first chain of a file of rules that sees what comes in and does not let everything pass.
fn nftables_input(text: &str) -> Option<Firewall> {
    let (mut table, mut chain): (Option<(String, String)>, Option<String>) = (None, None);
    let mut hooked = false;
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["table", family, name, ..] if name != "{" => table = Some((plain(family)?, plain(name)?)),
            ["table", name, ..] => table = Some(("ip".to_owned(), plain(name)?)),
            ["chain", name, ..] => (chain, hooked) = (Some(plain(name)?), false),
            _ => {}
        }
        hooked |= line.contains("hook input");
        let refuses =
            ["drop", "reject"].iter().any(|word| words.iter().any(|w| w.trim_end_matches(';') == *word));
        if hooked
            && refuses
            && let (Some((family, table)), Some(chain)) = (&table, &chain)
        {
            return Some(Firewall::Nftables {
                family: family.clone(),
                table: table.clone(),
                chain: chain.clone(),
            });
        }
    }
    None
}

/// A name that can stand in a command as it is.
fn plain(name: &str) -> Option<String> {
    let name = name.trim_end_matches('{');
    let good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    (!name.is_empty() && name.bytes().all(good)).then(|| name.to_owned())
}

/// What a program says within [`FIREWALL`].
fn says(program: &str, args: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    let mut child =
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let until = Instant::now() + FIREWALL;
    while child.try_wait().ok()?.is_none() {
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(FIREWALL_LOOK);
    }
    let output = child.wait_with_output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(files: &[(&str, &str)]) -> Vec<Firewall> {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Firewall::of_linux(root.path())
    }

    const RULES: &str = "#!/usr/sbin/nft -f
flush ruleset
# chain in comments { hook input drop }
table inet guard {
    chain forward { type filter hook forward priority 0; policy drop; }
    chain incoming {
        type filter hook input priority filter; policy accept;
        tcp dport 22 accept
        ct state invalid drop
    }
}
";

    #[test]
    fn what_is_on_is_found_by_its_traces() {
        assert_eq!(linux(&[]), []);
        assert_eq!(linux(&[("etc/ufw/ufw.conf", "# x\nENABLED=yes\n")]), [Firewall::Ufw]);
        assert_eq!(linux(&[("etc/ufw/ufw.conf", "ENABLED=no\nLOGLEVEL=yes\n")]), []);
        assert_eq!(
            linux(&[("proc/817/comm", "firewalld\n"), ("proc/9/comm", "sh\n")]),
            [Firewall::Firewalld]
        );
        assert_eq!(linux(&[("proc/self/comm", "firewalld\n")]), []);
        let [family, table, chain] = ["inet", "guard", "incoming"].map(str::to_owned);
        assert_eq!(linux(&[("etc/nftables.conf", RULES)]), [Firewall::Nftables { family, table, chain }]);
        let both = [("etc/nftables.conf", RULES), ("etc/ufw/ufw.conf", "ENABLED=yes")];
        assert_eq!(linux(&both), [Firewall::Ufw]);
        let open = "table inet filter {\n chain input {\n type filter hook input priority 0;\n }\n}\n";
        assert_eq!(linux(&[("etc/nftables.conf", open)]), []);
        let odd = "table ip `id` {\n chain input { type filter hook input priority 0; policy drop; }\n}\n";
        assert_eq!(linux(&[("etc/nftables.conf", odd)]), []);
        assert!(macos_is_on("Firewall is enabled. (State = 1)\n") && !macos_is_on("disabled. (State = 0)"));
    }

    #[test]
    fn every_firewall_has_its_exact_command() {
        let nftables = nftables_input(RULES).unwrap();
        for (firewall, command) in [
            (Firewall::Ufw, "sudo ufw allow 5353/udp && sudo ufw allow 7000/tcp"),
            (
                Firewall::Firewalld,
                "sudo firewall-cmd --permanent --add-service=mdns && sudo firewall-cmd --permanent --add-port=7000/tcp && sudo firewall-cmd --reload",
            ),
            (
                nftables,
                "sudo nft insert rule inet guard incoming udp dport 5353 accept && sudo nft insert rule inet guard incoming tcp dport 7000 accept",
            ),
            (
                Firewall::MacOs,
                r"sudo /usr/libexec/ApplicationFirewall/socketfilterfw --add '/it'\''s/swarm-os' && sudo /usr/libexec/ApplicationFirewall/socketfilterfw --unblockapp '/it'\''s/swarm-os'",
            ),
            (
                Firewall::Windows,
                "New-NetFirewallRule -DisplayName swarm-os -Direction Inbound -Action Allow -Profile Any -Program '/it''s/swarm-os'",
            ),
        ] {
            assert_eq!(firewall.command("/it's/swarm-os", 7000), command);
        }
        assert!(!Firewall::possible().is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn a_tool_that_hangs_is_not_waited_for() {
        assert_eq!(says("echo", &["on"]).as_deref(), Some("on\n"));
        assert_eq!(says("/no/such/tool", &[]), None);
        let began = Instant::now();
        assert_eq!(says("sleep", &["60"]), None);
        assert!(began.elapsed() < 2 * FIREWALL);
    }
}
