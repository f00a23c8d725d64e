//! A small real network: namespaces on one bridge, as computers on one LAN.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{self, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

static LABS: AtomicU32 = AtomicU32::new(0);

/// Set to 1 to let tests go on without network namespaces. `cargo xtask test` sets it where they
/// cannot be had, and says so in its summary.
const SKIP: &str = "SWARM_OS_SKIP_NETLAB";

/// Network namespaces `0..nodes`, each with an `eth0` on a shared bridge, an address
/// `10.77.0.<node + 1>/24`, a default route and a multicast route. The bridge lives in a
/// namespace too, so the host's own network is not touched. All gone on drop; what a killed test
/// left behind is removed by the next lab.
#[derive(Debug)]
pub struct NetLab {
    hub: String,
    nodes: Vec<String>,
}

impl NetLab {
    /// Opens a lab, or `None` (said on stderr) where `SWARM_OS_SKIP_NETLAB=1` allows to go on
    /// without one.
    ///
    /// # Errors
    /// Without root or `ip`: [`NetLab::need_root`].
    pub fn open(nodes: usize) -> Result<Option<NetLab>> {
        if std::env::var_os(SKIP).is_some_and(|value| value == "1") {
            eprintln!("SKIPPED: no network lab, because {SKIP}=1");
            return Ok(None);
        }
        NetLab::new(nodes).map(Some)
    }

    /// Opens a lab.
    ///
    /// # Errors
    /// Without root or `ip`: [`NetLab::need_root`].
    pub fn new(nodes: usize) -> Result<NetLab> {
        remove_leftovers();
        let stem = format!("swarm-lab-{}-{}", process::id(), LABS.fetch_add(1, Ordering::Relaxed));
        let hub = format!("{stem}-hub");
        ip(&["netns", "add", &hub]).with_context(NetLab::need_root)?;
        let mut lab = NetLab { hub, nodes: Vec::new() };
        let hub = lab.hub.as_str();
        ip(&["-n", hub, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0"])?;
        ip(&["-n", hub, "link", "set", "br0", "up"])?;
        for node in 0..nodes {
            let name = format!("{stem}-{node}");
            ip(&["netns", "add", &name])?;
            lab.nodes.push(name);
            lab.connect(node)?;
        }
        Ok(lab)
    }

    fn connect(&self, node: usize) -> Result<()> {
        let (hub, name, port) = (self.hub.as_str(), self.name(node), format!("port{node}"));
        ip(&["-n", hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", name])?;
        ip(&["-n", hub, "link", "set", &port, "master", "br0", "up"])?;
        ip(&["-n", name, "addr", "add", &format!("{}/24", self.address(node)), "dev", "eth0"])?;
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        ip(&["-n", name, "link", "set", "eth0", "up"])?;
        ip(&["-n", name, "route", "add", "224.0.0.0/4", "dev", "eth0"])?;
        ip(&["-n", name, "route", "add", "default", "dev", "eth0"])
    }

    /// What to tell someone whose machine cannot open a lab.
    pub fn need_root() -> String {
        format!(
            "network namespaces need root (CAP_NET_ADMIN) and `ip` of iproute2; install it and run as root, or set {SKIP}=1 to leave these tests out"
        )
    }

    /// The namespace of `node`, for `ip netns exec`.
    pub fn name(&self, node: usize) -> &str {
        &self.nodes[node]
    }

    /// The address of `node` on the bridge.
    pub fn address(&self, node: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, node as u8 + 1)
    }

    /// The same command, to run inside the namespace of `node`. Program, arguments, environment
    /// and working folder are kept; redirections are the caller's to set again.
    pub fn run_in(&self, node: usize, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", self.name(node)]).arg(command.get_program()).args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(key, value),
                None => inside.env_remove(key),
            };
        }
        if let Some(folder) = command.get_current_dir() {
            inside.current_dir(folder);
        }
        inside
    }

    /// Pulls the cable of `node`, or puts it back.
    pub fn set_link(&self, node: usize, up: bool) -> Result<()> {
        ip(&["-n", &self.hub, "link", "set", &format!("port{node}"), if up { "up" } else { "down" }])
    }

    /// Lays a second cable between two nodes: `eth1` at both ends, with the addresses `10.78.0.<node + 1>/24`.
    pub fn add_cable(&self, one: usize, two: usize) -> Result<()> {
        let ends = [one, two].map(|node| self.name(node));
        let [first, second] = ends;
        ip(&["-n", first, "link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", second])?;
        for (node, name) in [one, two].into_iter().zip(ends) {
            ip(&["-n", name, "addr", "add", &format!("10.78.0.{}/24", node + 1), "dev", "eth1"])?;
            ip(&["-n", name, "link", "set", "eth1", "up"])?;
        }
        Ok(())
    }

    /// Gives `node` another IPv4 address, `10.77.0.<last>/24`, instead of its own.
    pub fn move_to(&self, node: usize, last: u8) -> Result<()> {
        ip(&["-n", self.name(node), "-4", "addr", "flush", "dev", "eth0"])?;
        ip(&["-n", self.name(node), "addr", "add", &format!("10.77.0.{last}/24"), "dev", "eth0"])?;
        ip(&["-n", self.name(node), "route", "replace", "224.0.0.0/4", "dev", "eth0"])?;
        ip(&["-n", self.name(node), "route", "replace", "default", "dev", "eth0"])
    }

    /// The network carries no multicast from one node to another, or carries it again; each hears itself all the same.
    pub fn set_multicast(&self, on: bool) -> Result<()> {
        self.set_ports(&["mcast_flood", if on { "on" } else { "off" }])
    }

    /// The network keeps its clients apart, as the access point of a guest Wi-Fi does: multicast goes through, but no
    /// frame from one node to another.
    pub fn isolate_clients(&self) -> Result<()> {
        self.set_ports(&["learning", "off", "flood", "off"])?;
        self.set_ports(&["fdb_flush"])
    }

    fn set_ports(&self, flags: &[&str]) -> Result<()> {
        for node in 0..self.nodes.len() {
            let port = format!("port{node}");
            let start = ["-n", &self.hub, "link", "set", "dev", &port, "type", "bridge_slave"];
            ip(&[&start[..], flags].concat())?;
        }
        Ok(())
    }

    /// From now on no process of `node` that begins to listen to multicast hears any, not even its own.
    pub fn forbid_multicast(&self, node: usize) -> Result<()> {
        let script = "echo 0 > /proc/sys/net/ipv4/igmp_max_memberships; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6";
        ip(&["netns", "exec", self.name(node), "sh", "-c", script])
    }
}

impl Drop for NetLab {
    fn drop(&mut self) {
        for name in self.nodes.iter().chain([&self.hub]) {
            if let Err(error) = ip(&["netns", "del", name]) {
                eprintln!("cannot remove network namespace {name}: {error:#}");
            }
        }
    }
}

/// Removes namespaces of labs whose process is gone. Others may do the same at the same time, so
/// failures do not matter.
fn remove_leftovers() {
    let Ok(output) = Command::new("ip").args(["netns", "list"]).output() else { return };
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let name = line.split(' ').next().unwrap_or_default();
        let Some(rest) = name.strip_prefix("swarm-lab-") else { continue };
        let owner = rest.split('-').next().unwrap_or_default();
        if !Path::new("/proc").join(owner).exists() {
            drop(ip(&["netns", "del", name]));
        }
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start `ip {}`", args.join(" ")))?;
    if !output.status.success() {
        bail!("`ip {}` failed: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Proc;

    const SOON: Duration = Duration::from_secs(30);

    const LISTEN: &str = "
import socket
s = socket.socket(); s.bind(('0.0.0.0', 7000)); s.listen(); print('listening', flush=True)
c, who = s.accept(); print('from', who[0], c.recv(100).decode(), flush=True)
m = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); m.bind(('', 7001))
m.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton('224.0.0.251') + socket.inet_aton('0.0.0.0'))
print('joined', flush=True); print('datagram', m.recv(100).decode(), flush=True)
";
    const TALK: &str = "
import socket, sys
s = socket.create_connection(('10.77.0.1', 7000)); s.sendall(b'stream')
sys.stdin.readline()
m = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); m.sendto(b'multicast', ('224.0.0.251', 7001))
";

    #[test]
    fn two_namespaces_hear_each_other_and_leave_nothing_behind() {
        let Some(lab) = NetLab::open(2).unwrap() else { return };
        let python = |node, script| {
            let mut command = Command::new("python3");
            Proc::spawn(&mut lab.run_in(node, command.args(["-c", script]))).unwrap()
        };
        let mut listener = python(0, LISTEN);
        listener.expect(SOON, "listening").unwrap();
        let mut talker = python(1, TALK);
        listener.expect(SOON, "from 10.77.0.2 stream").unwrap();
        listener.expect(SOON, "joined").unwrap();
        talker.say("").unwrap();
        listener.expect(SOON, "datagram multicast").unwrap();
        assert!(listener.finish(SOON).unwrap().status.success());
        let name = lab.name(0).to_owned();
        drop((talker, lab));
        assert!(ip(&["netns", "exec", &name, "true"]).is_err());
    }
}
