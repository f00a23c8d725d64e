//! What goes wrong in a life, and when.

use super::net::{Happening, Hostile, Mend, Net, Node, Power};

/// How bad a life is.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Mean time between faults in microseconds; 0 when there are none at all.
    pub every_us: u64,
    pub hostile: bool,
    pub until_us: u64,
}

impl Weather {
    /// One life in ten has no fault, four in ten a hostile network.
    pub fn draw(net: &mut Net) -> Self {
        let calm = net.rng.chance(100);
        let hostile = !calm && net.rng.chance(400);
        if hostile {
            net.hostile = Hostile { duplicate: 10, swap: 10, replay: 10 };
        }
        let every_us = if calm { 0 } else { net.rng.within(150_000, 1_500_000) };
        Self { every_us, hostile, until_us: net.rng.within(3_000_000, 15_000_000) }
    }

    pub fn calm(&self) -> bool {
        self.every_us == 0
    }

    pub fn next(&self, net: &mut Net) {
        if !self.calm() {
            let within_us = net.rng.within(1, 2 * self.every_us);
            net.at(net.now + within_us, Happening::Fault);
        }
    }
}

/// Something goes wrong. Returns a node whose process ended by it.
pub fn strike(net: &mut Net) -> Option<Node> {
    let nodes = net.machines.len();
    let (one, other) = (net.rng.index(nodes), net.rng.index(nodes));
    // Mostly short; now and then longer than anybody may wait.
    let lasts_us = if net.rng.chance(100) { 12_000_000 } else { net.rng.within(20_000, 5_000_000) };
    match net.rng.below(9) {
        0 | 1 => cut(net, &[(one, other)], lasts_us, "cut one way"),
        2 => cut(net, &[(one, other), (other, one)], lasts_us, "cut both ways"),
        3 => {
            let links: Vec<_> = (0..nodes).flat_map(|far| [(one, far), (far, one)]).collect();
            cut(net, &links, lasts_us, "node cut off");
        }
        4 => {
            net.delay_us[one][other] = net.rng.within(10_000, 300_000);
            net.saw("link slowed");
            net.tell(|| format!("link {one} -> {other} becomes slow"));
        }
        5 => {
            if let Some(conn) = net.any_open() {
                net.lose(conn);
                net.saw("connection lost");
                net.tell(|| format!("connection {conn} is lost"));
            }
        }
        6 if net.machines[one].power == Power::On && !net.machines[one].paused => {
            net.pause(one);
            net.at(net.now + lasts_us, Happening::Mend(Mend::Resume(one)));
            net.saw("node paused");
            net.tell(|| format!("node {one} stops for {lasts_us} us"));
        }
        7 | 8 if net.machines[one].power == Power::On => {
            let power = if net.rng.chance(500) { Power::Killed } else { Power::Off };
            net.stop(one, power);
            net.at(net.now + lasts_us, Happening::Mend(Mend::Restart(one)));
            net.saw(if power == Power::Killed { "node killed" } else { "node without power" });
            net.tell(|| format!("node {one}: {power:?}, until {lasts_us} us later"));
            return Some(one);
        }
        _ => {}
    }
    None
}

fn cut(net: &mut Net, links: &[(Node, Node)], lasts_us: u64, what: &'static str) {
    for &(from, to) in links.iter().filter(|(from, to)| from != to) {
        if !net.is_cut(from, to) {
            net.cut(from, to);
            net.at(net.now + lasts_us, Happening::Mend(Mend::Join(from, to)));
        }
    }
    net.saw(what);
    net.tell(|| format!("{what}: {links:?} for {lasts_us} us"));
}
