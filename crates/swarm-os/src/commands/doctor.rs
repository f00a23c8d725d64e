//! `swarm-os doctor`: what works on this computer and its network, what does not, and what to do next.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use swarm_kernels::KernelPath;
use swarm_link::{ConfigDir, Identity, Scope, exposed_secrets};
use swarm_node::doctor::{Look, NetworkReport, PeerReport, PeerState, Silence, examine, huge_pages};
use swarm_node::firewall::Firewall;
use swarm_node::machine;

use crate::args::DoctorArgs;
use crate::failure::{Code, Failure};
use crate::live;
use crate::present::text;
use crate::settings;

/// Named in a firewall's command where no worker runs: a worker without `--port` listens anywhere.
const USUAL_PORT: u16 = 4747;
/// Less memory than this holds a toy.
const MEMORY_LITTLE: u64 = 1 << 30;
/// A slower round trip costs more than a layer.
const ROUND_TRIP_SLOW_US: f64 = 20_000.0;

/// How something was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum State {
    Broken,
    Note,
    Ok,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Check {
    topic: &'static str,
    state: State,
    text: String,
    /// What to type, where a command helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<String>,
    /// What to do, in one sentence.
    #[serde(skip)]
    next: Option<String>,
}

impl Check {
    fn ok(topic: &'static str, text: impl Into<String>) -> Self {
        Self { topic, state: State::Ok, text: text.into(), command: None, next: None }
    }

    fn note(topic: &'static str, text: impl Into<String>) -> Self {
        Self { state: State::Note, ..Self::ok(topic, text) }
    }

    fn broken(topic: &'static str, text: impl Into<String>) -> Self {
        Self { state: State::Broken, ..Self::ok(topic, text) }
    }

    fn next(mut self, sentence: impl Into<String>) -> Self {
        self.next = Some(sentence.into());
        self
    }

    fn command(mut self, command: impl Into<String>) -> Self {
        self.command = Some(command.into());
        self
    }
}

pub fn doctor(args: &DoctorArgs) -> Result<(), Failure> {
    let named = args.peer.iter().map(|peer| settings::peer_addresses(peer)).collect::<Result<Vec<_>, _>>()?;
    let scope = Scope { interfaces: settings::interfaces(&args.interface)?, address: None };
    let folders = ConfigDir::locate()?;
    let mut checks = vec![files(&folders)];
    checks.extend(computer());
    let network = match Identity::load_or_create(folders.config()) {
        Err(error) => {
            let why = swarm_node::chain(&error);
            checks.insert(1, Check::broken("identity", why.clone()).next(why));
            None
        }
        Ok(identity) => {
            if !args.json {
                text::note(&format!("listens for {} s at most", args.wait));
            }
            let worker = worker_port();
            let look = Look {
                identity: &identity,
                named: &named,
                state_dir: Some(folders.state()),
                scope,
                port: args.port.or(worker),
                within: Duration::from_secs(u64::from(args.wait)),
            };
            let report = examine(&look)?;
            let program = std::env::current_exe().map(|path| path.display().to_string());
            let place = Place {
                report: &report,
                serves: args.port.or(worker),
                firewalls: Firewall::active(),
                program: program.unwrap_or_else(|_| "swarm-os".to_owned()),
            };
            checks.extend(place.checks());
            Some(report)
        }
    };
    tell(args, &checks, network.as_ref())
}

/// Prints what was found; broken things end the command with 1.
fn tell(args: &DoctorArgs, checks: &[Check], network: Option<&NetworkReport>) -> Result<(), Failure> {
    let (next, broken) = (next_step(checks), checks.iter().any(|check| check.state == State::Broken));
    if args.json {
        let machines: Vec<_> = network.iter().flat_map(|report| &report.peers).map(object).collect();
        let addresses: Vec<_> = network
            .iter()
            .flat_map(|report| &report.interfaces)
            .map(|found| json!({"interface": found.name, "address": found.address.to_string()}))
            .collect();
        let object = json!({"broken": broken, "next": next, "checks": checks, "machines": machines,
            "addresses": addresses, "hears_own_multicast": network.and_then(|report| report.hears_itself),
            "absent": network.map(|report| &report.absent)});
        text::say(&object.to_string())?;
    } else {
        let mut rows = Vec::new();
        for check in checks {
            let state = match check.state {
                State::Broken => "BROKEN",
                State::Note => "note",
                State::Ok => "ok",
            };
            rows.push([state, check.topic, &check.text].map(text::line).to_vec());
            rows.extend(check.command.iter().map(|command| ["", "", command].map(text::line).to_vec()));
        }
        text::say(&format!("{}\nnext: {}", text::table(&rows, &[]), text::line(&next)))?;
    }
    if broken { Err(Failure::silent(Code::Failed)) } else { Ok(()) }
}

/// One sentence: the first thing that is broken, else the first that could be better.
fn next_step(checks: &[Check]) -> String {
    let mut order: Vec<&Check> = checks.iter().filter(|check| check.next.is_some()).collect();
    order.sort_by_key(|check| check.state);
    let first = order.first().and_then(|check| check.next.clone());
    first.unwrap_or_else(|| "All is well: `swarm-os chat` will use the machines that are here.".to_owned())
}

/// The port of a worker of this user that others can reach.
fn worker_port() -> Option<u16> {
    let processes = live::look().unwrap_or_default();
    let worker = processes.iter().find(|process| process["role"] == "worker" && process["local"] == false)?;
    worker["port"].as_u64().and_then(|port| u16::try_from(port).ok())
}

fn files(folders: &ConfigDir) -> Check {
    let exposed = exposed_secrets(folders.config());
    match exposed.first() {
        None => {
            Check::ok("files", format!("the secrets in {} are this user's alone", folders.config().display()))
        }
        Some(first) => {
            let all: Vec<String> = exposed.iter().map(ToString::to_string).collect();
            Check::broken("files", all.join("; ")).next(format!("First of all: {first}."))
        }
    }
}

/// Processor, memory, huge pages.
fn computer() -> Vec<Check> {
    let (path, best) = (KernelPath::current(), KernelPath::best());
    let can: Vec<&str> = KernelPath::available().into_iter().map(KernelPath::name).collect();
    let words = format!("{} cores, computes by {} (can: {})", machine::cores(), path.name(), can.join(", "));
    let processor = if path != best {
        Check::note("processor", format!("{words}; SWARM_OS_KERNELS keeps it from {}", best.name()))
    } else if path == KernelPath::Scalar {
        Check::note("processor", format!("{words}; none of the instructions that make it fast"))
    } else {
        Check::ok("processor", words)
    };
    let memory = match machine::memory_available() {
        None => Check::note("memory", "the system does not say how much is free; --memory says what to use"),
        Some(bytes) if bytes < MEMORY_LITTLE => {
            Check::note("memory", format!("only {} are free: end other programs", text::bytes(bytes)))
        }
        Some(bytes) => Check::ok("memory", format!("{} are free", text::bytes(bytes))),
    };
    let pages = match huge_pages().as_deref() {
        Some("never") => Check::note("huge pages", "never given out, so that weights are read more slowly")
            .command("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"),
        Some(choice) => Check::ok("huge pages", format!("given out: {choice}")),
        None => Check::ok("huge pages", "the system decides"),
    };
    vec![processor, memory, pages]
}

/// What was found in the network, and what can be done about it here.
struct Place<'a> {
    report: &'a NetworkReport,
    /// The port that others are to reach, because somebody serves there.
    serves: Option<u16>,
    firewalls: Vec<Firewall>,
    program: String,
}

impl Place<'_> {
    fn checks(&self) -> Vec<Check> {
        let mut checks = vec![self.addresses(), self.multicast(), self.firewall()];
        checks.extend(self.report.peers.iter().map(|peer| self.machine(peer)));
        checks.extend(self.absent());
        if self.serves.is_some() && self.others().next().is_none() {
            // Whether others find and reach it is seen from where they are.
            checks.push(Check::ok("worker", "waits here").next(
                "A worker waits here: run `swarm-os chat` on another computer, and `swarm-os doctor` there if it does not find this one.",
            ));
        }
        checks
    }

    fn addresses(&self) -> Check {
        let list: Vec<String> =
            self.report.interfaces.iter().map(|found| format!("{} {}", found.name, found.address)).collect();
        if list.is_empty() {
            return Check::broken("addresses", "none: this computer is in no network").next(
                "This computer is in no network: join the Wi-Fi of the others, or open a hotspot on a phone and join it with every computer.",
            );
        }
        let port = match self.serves {
            Some(port) => format!("others are to reach port {port}"),
            None => "no worker runs here, so nobody has to reach this computer".to_owned(),
        };
        Check::ok("addresses", format!("{}; {port}", list.join(", ")))
    }

    /// Members on other computers, with their links.
    fn others(&self) -> impl Iterator<Item = (&PeerReport, &swarm_node::doctor::LinkReport)> {
        self.report.peers.iter().filter_map(|peer| match &peer.state {
            PeerState::Member(link) if !peer.own => Some((peer, link)),
            _ => None,
        })
    }

    fn multicast(&self) -> Check {
        let without = "use --peer HOST:PORT, which is remembered, or put all computers on a phone's hotspot";
        let announced = self.report.peers.iter().filter(|peer| peer.announced && !peer.own).count();
        match self.report.hears_itself {
            Some(false) => {
                let why = self
                    .report
                    .trouble
                    .clone()
                    .unwrap_or_else(|| "its own announcement did not come back".into());
                let links = if self.others().next().is_some() {
                    "The links are good, but multicast"
                } else {
                    "Multicast"
                };
                let open = match &self.firewalls[..] {
                    [only] => format!("run `{}`", self.command(only)),
                    _ => "let UDP 5353 through its firewall or VPN".to_owned(),
                };
                Check::broken("multicast", format!("blocked on this computer: {why}"))
                    .next(format!("{links} is blocked on this computer: {open}, or {without}."))
            }
            None => Check::note(
                "multicast",
                "its own announcement did not come back yet; listen longer with --wait",
            ),
            Some(true) => match self
                .others()
                .find(|(peer, link)| !peer.announced || link.hears == Some(false))
            {
                None => Check::ok(
                    "multicast",
                    match announced {
                        1 => "works on this computer; 1 other is announced".to_owned(),
                        count => format!("works on this computer; {count} others are announced"),
                    },
                ),
                Some((peer, link)) => {
                    let name = name(peer);
                    let words = match (peer.announced, link.hears == Some(false)) {
                        (false, true) => {
                            format!("none goes between this computer and {name}, though both can be reached")
                        }
                        (true, _) => format!("goes in but not out: {name} does not hear this computer"),
                        (false, false) => format!("goes out but not in: this computer does not hear {name}"),
                    };
                    Check::broken("multicast", words.clone()).next(format!(
                        "Multicast {words}: let UDP 5353 through the firewalls of both, and where the network itself does not carry it, {without}."
                    ))
                }
            },
        }
    }

    fn command(&self, firewall: &Firewall) -> String {
        firewall.command(&self.program, self.serves.unwrap_or(USUAL_PORT))
    }

    fn firewall(&self) -> Check {
        let refused = self.others().any(|(_, link)| !link.reaches_back);
        let blocked = refused || self.report.hears_itself == Some(false);
        let possible = if self.firewalls.is_empty() && blocked { Firewall::possible() } else { Vec::new() };
        let shown: Vec<&Firewall> = self.firewalls.iter().chain(&possible).collect();
        let commands: Vec<String> = shown.iter().map(|firewall| self.command(firewall)).collect();
        let commands = commands.join("   or   ");
        let names: Vec<String> =
            shown.iter().map(|firewall| format!("{} (in {})", firewall.name(), firewall.shell())).collect();
        let names = names.join(", ");
        let after = match self.serves {
            Some(_) => String::new(),
            None => format!(", then start the worker with --port {USUAL_PORT}"),
        };
        if refused && self.serves.is_some() {
            let run = if self.firewalls.len() == 1 {
                format!("run `{commands}`")
            } else {
                "open its firewall".to_owned()
            };
            let port = self.report.port;
            return Check::broken(
                "firewall",
                format!("others cannot open a connection to port {port} here: {names}"),
            )
            .command(commands)
            .next(format!("Others cannot reach the worker of this computer: {run} and look again."));
        }
        if refused {
            let words = format!(
                "others cannot open connections to this computer, which a worker would need: {names}{after}"
            );
            return Check::note("firewall", words).command(commands);
        }
        match (self.firewalls.is_empty(), blocked) {
            (true, false) => Check::ok("firewall", "none is on, as far as an ordinary user can see"),
            (true, true) => {
                Check::note("firewall", format!("if one is on: {names}{after}")).command(commands)
            }
            (false, _) => {
                let words = format!("{names} seems to be on; this lets others in{after}");
                Check { state: if blocked { State::Note } else { State::Ok }, ..Check::ok("firewall", words) }
                    .command(commands)
            }
        }
    }

    fn machine(&self, peer: &PeerReport) -> Check {
        let (name, heard) = (name(peer), if peer.announced { "announced" } else { "not announced" });
        let named = |check: Check| {
            // Somebody expects this one to answer.
            Check { state: if peer.named { State::Broken } else { check.state }, ..check }
        };
        let words = |what: &str| format!("{name} ({heard}) {what}");
        match &peer.state {
            PeerState::Member(link) => {
                let what = member(link, peer.own);
                if link.round_trip_us_p50 < ROUND_TRIP_SLOW_US {
                    return Check::ok("machine", words(&what));
                }
                Check::note("machine", words(&what)).next(format!(
                    "The link to {name} is slow: use a cable, or bring both computers nearer to the access point."
                ))
            }
            PeerState::ShowsCode => Check::note("machine", words("shows a pairing code"))
                .next(format!("{name} waits to be paired: run `swarm-os chat` here and type the code that it shows.")),
            PeerState::OtherSwarm => named(Check::note("machine", words("belongs to another swarm")).next(format!(
                "{name} belongs to another swarm: if it should join this one, run `swarm-os pair` here and `swarm-os pair CODE` there."
            ))),
            PeerState::Unmeasured(why) => named(Check::note("machine", words(&format!("is in this swarm, but the link was not measured: {why}"))).next(
                format!("{name} did not answer to the end: bring both computers to the same version of swarm-os and look again."),
            )),
            PeerState::Unusable(why) => named(Check::note("machine", words(&format!("cannot be used: {why}"))).next(
                format!("{name} cannot be used: bring both computers to the same version of swarm-os."),
            )),
            PeerState::Unreachable(Silence::Closed) => named(Check::note("machine", words("is there, but nobody listens at that port")).next(
                format!("Nobody listens at {name} any more: start `swarm-os worker` there, and use the port that it prints."),
            )),
            PeerState::Unreachable(silence) if peer.announced => {
                let how = if *silence == Silence::NoRoute { "is not found in the network" } else { "does not answer" };
                Check::broken("machine", words(how)).next(format!(
                    "{name} is announced but cannot be reached: the access point keeps its clients apart, as guest Wi-Fi often does, or the firewall there is closed; run `swarm-os doctor` there, or put all computers on a phone's hotspot."
                ))
            }
            PeerState::Unreachable(_) => Check::broken("machine", words("does not answer")).next(format!(
                "{name} does not answer: check that it is on and in the same network, and run `swarm-os doctor` there; where the network keeps its clients apart, put all computers on a phone's hotspot."
            )),
        }
    }

    /// Machines of this swarm that were not seen, or nobody at all.
    fn absent(&self) -> Option<Check> {
        if !self.report.absent.is_empty() {
            let names: Vec<&str> = self.report.absent.iter().map(String::as_str).collect();
            let names = names.join(", ");
            let check = Check::note("absent", format!("of this swarm, but not seen: {names}"));
            let next = format!(
                "Not seen: {names}; start `swarm-os worker` there, and if it runs, use --peer HOST:PORT with the port that it prints."
            );
            let quiet = self.serves.is_some() || self.others().next().is_some();
            return Some(if quiet { check } else { check.next(next) });
        }
        let alone = self.report.peers.iter().all(|peer| peer.own) && self.serves.is_none();
        alone.then(|| {
            Check::note("others", "nobody was found").next(
                "Nobody else was found: start `swarm-os worker` on another computer of this network; if it runs there, the network does not carry multicast, so use --peer HOST:PORT or a phone's hotspot.",
            )
        })
    }
}

/// What a person calls it.
fn name(peer: &PeerReport) -> String {
    match &peer.name {
        _ if peer.own => "this computer".to_owned(),
        Some(name) => format!("{name} at {}", peer.address),
        None => peer.address.to_string(),
    }
}

fn member(link: &swarm_node::doctor::LinkReport, own: bool) -> String {
    let way = format!(
        "round trip {:.2} ms p50, {:.2} ms p99; {:.0} Mbit/s there, {:.0} back; offers {}",
        link.round_trip_us_p50 / 1e3,
        link.round_trip_us_p99 / 1e3,
        link.up_mbit_s,
        link.down_mbit_s,
        text::bytes(link.memory_bytes),
    );
    if own {
        return way;
    }
    let back = if link.reaches_back { "reaches this computer" } else { "cannot reach this computer" };
    let hears = match link.hears {
        Some(true) => "hears it",
        Some(false) => "does not hear it",
        None => "does not listen for it",
    };
    format!("{way}; {back}, {hears}")
}

fn object(peer: &PeerReport) -> serde_json::Value {
    let (state, why, link) = match &peer.state {
        PeerState::Member(link) => ("member", None, Some(link)),
        PeerState::Unmeasured(why) => ("unmeasured", Some(why.as_str()), None),
        PeerState::ShowsCode => ("shows_code", None, None),
        PeerState::OtherSwarm => ("other_swarm", None, None),
        PeerState::Unreachable(Silence::Closed) => ("unreachable", Some("nobody listens at that port"), None),
        PeerState::Unreachable(Silence::NoAnswer) => ("unreachable", Some("no answer"), None),
        PeerState::Unreachable(Silence::NoRoute) => ("unreachable", Some("not found in the network"), None),
        PeerState::Unusable(why) => ("unusable", Some(why.as_str()), None),
    };
    let link = link.map(|link| {
        json!({"round_trip_us_p50": link.round_trip_us_p50, "round_trip_us_p99": link.round_trip_us_p99,
            "up_mbit_s": link.up_mbit_s, "down_mbit_s": link.down_mbit_s, "reaches_back": link.reaches_back,
            "hears_this": link.hears, "memory_bytes": link.memory_bytes})
    });
    json!({"address": peer.address.to_string(), "name": peer.name, "own": peer.own, "announced": peer.announced,
        "named": peer.named, "state": state, "why": why, "link": link})
}

#[cfg(test)]
mod tests {
    use swarm_link::InterfaceAddress;
    use swarm_node::doctor::LinkReport;

    use super::*;

    const GOOD: LinkReport = LinkReport {
        round_trip_us_p50: 100.0,
        round_trip_us_p99: 200.0,
        up_mbit_s: 900.0,
        down_mbit_s: 900.0,
        reaches_back: true,
        hears: Some(true),
        memory_bytes: 1 << 33,
    };

    fn peer(announced: bool, state: PeerState) -> PeerReport {
        let address = ([10, 0, 0, 2], 4747).into();
        PeerReport { address, name: Some("den".into()), own: false, announced, named: false, state }
    }

    fn report(hears_itself: Option<bool>, peers: Vec<PeerReport>) -> NetworkReport {
        let interfaces =
            vec![InterfaceAddress { name: "eth0".into(), index: 2, address: [10, 0, 0, 1].into() }];
        NetworkReport { interfaces, hears_itself, trouble: None, port: 4747, peers, absent: Vec::new() }
    }

    /// Whether something is broken, and the sentence.
    fn advice(report: &NetworkReport, serves: Option<u16>, firewalls: Vec<Firewall>) -> (bool, String) {
        let checks = Place { report, serves, firewalls, program: "/bin/swarm-os".into() }.checks();
        let sentence = next_step(&checks);
        assert!(!sentence.trim_end_matches('.').contains(". "), "more than one sentence: {sentence}");
        (checks.iter().any(|check| check.state == State::Broken), sentence)
    }

    #[test]
    fn one_sentence_says_what_to_do_and_only_what_is_broken_is_broken() {
        let member = |link| PeerState::Member(link);
        let far = LinkReport { reaches_back: false, ..GOOD };
        let deaf = LinkReport { hears: Some(false), ..GOOD };
        let slow = LinkReport { round_trip_us_p50: 25_000.0, ..GOOD };
        let one = |hears, announced, state| report(hears, vec![peer(announced, state)]);
        let named = |state| report(Some(true), vec![PeerReport { named: true, ..peer(false, state) }]);
        let nowhere = NetworkReport { interfaces: Vec::new(), ..report(None, Vec::new()) };
        let absent = NetworkReport { absent: vec!["attic".into()], ..report(Some(true), Vec::new()) };
        for (report, broken, text) in [
            (nowhere, true, "in no network"),
            (report(Some(true), Vec::new()), false, "Nobody else was found"),
            (report(Some(false), Vec::new()), true, "Multicast is blocked on this computer"),
            (absent, false, "Not seen: attic"),
            (one(Some(true), true, member(GOOD)), false, "All is well"),
            (one(Some(true), true, member(slow)), false, "use a cable"),
            (one(Some(false), false, member(GOOD)), true, "The links are good, but multicast"),
            (one(Some(true), false, member(deaf)), true, "none goes between this computer and den"),
            (one(Some(true), true, member(deaf)), true, "goes in but not out"),
            (one(Some(true), false, member(GOOD)), true, "goes out but not in"),
            (one(Some(true), true, PeerState::ShowsCode), false, "type the code"),
            (one(Some(true), true, PeerState::OtherSwarm), false, "another swarm"),
            (
                one(Some(true), true, PeerState::Unreachable(Silence::NoAnswer)),
                true,
                "keeps its clients apart",
            ),
            (one(Some(true), true, PeerState::Unreachable(Silence::NoRoute)), true, "phone's hotspot"),
            (one(Some(true), true, PeerState::Unreachable(Silence::Closed)), false, "Nobody listens at den"),
            (one(Some(true), true, PeerState::Unusable("x".into())), false, "same version"),
            (one(Some(true), true, PeerState::Unmeasured("x".into())), false, "same version"),
            (named(PeerState::Unreachable(Silence::Closed)), true, "Nobody listens at den"),
            (named(PeerState::Unreachable(Silence::NoAnswer)), true, "does not answer"),
            (named(PeerState::OtherSwarm), true, "another swarm"),
        ] {
            let (is_broken, sentence) = advice(&report, None, Vec::new());
            assert!(sentence.contains(text), "{text:?}: {sentence}");
            assert_eq!(is_broken, broken, "{sentence}");
        }
        // Nobody has to reach a computer that only asks; one that serves has to be reached.
        let closed = one(Some(true), true, member(far));
        assert_eq!(advice(&closed, None, vec![Firewall::Ufw]), (false, next_step(&[])));
        let (broken, sentence) = advice(&closed, Some(7000), vec![Firewall::Ufw]);
        assert!(
            broken && sentence.contains("`sudo ufw allow 5353/udp && sudo ufw allow 7000/tcp`"),
            "{sentence}"
        );
        let (_, sentence) = advice(&report(Some(false), Vec::new()), None, vec![Firewall::Ufw]);
        assert!(sentence.contains("sudo ufw allow 4747/tcp"), "{sentence}");
    }

    #[test]
    fn what_is_broken_comes_first() {
        let checks = [
            Check::note("a", "").next("note"),
            Check::broken("b", ""),
            Check::broken("c", "").next("broken"),
            Check::ok("d", ""),
        ];
        assert_eq!(next_step(&checks), "broken");
    }
}
