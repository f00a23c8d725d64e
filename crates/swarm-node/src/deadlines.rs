//! Every wait of this room, in one table. `docs/deadlines.md` shows it, with the waits of the rooms below; a test
//! compares the two.

use std::time::Duration;

use swarm_ring::Heartbeat;

/// A wait that ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deadline {
    /// Its name in the code.
    pub name: &'static str,
    /// How long.
    pub within: Duration,
    /// What is waited for, and what happens when it does not come.
    pub what: &'static str,
}

macro_rules! deadlines {
    ($($(#[doc = $doc:literal])+ $name:ident = $ms:expr;)*) => {
        $($(#[doc = $doc])+ pub(crate) const $name: Duration = Duration::from_millis($ms);)*

        /// The table.
        pub const TABLE: &[Deadline] = &[$(
            Deadline { name: stringify!($name), within: $name, what: concat!($($doc),+) },
        )*];
    };
}

deadlines! {
    /// A heartbeat goes to every member this often, from a thread that never computes.
    HEARTBEAT = Heartbeat::PING_EVERY_US / 1000;
    /// A member that left heartbeats unanswered for so long is suspected; `status` and errors say so.
    SUSPECT = Heartbeat::PING_EVERY_US * Heartbeat::SUSPECT_PINGS as u64 / 1000;
    /// A member that left heartbeats unanswered for so long is dead: its links are closed, the answer ends with an error.
    DEAD = Heartbeat::PING_EVERY_US * Heartbeat::DEAD_PINGS as u64 / 1000;
    /// A batch that the next node does not acknowledge, a second more for each 64 kB on the way; then the link is closed and the answer ends with an error.
    ACKNOWLEDGE = 2_500;
    /// Between two looks whether a receipt is late.
    RECEIPT_LOOK = 100;
    /// Receipts that are on their way, when those that are here have been read.
    RECEIPT_HERE = 1;
    /// The receipt of a batch; then an echo is sent behind it, and one that is back before the receipt proves that the batch was lost.
    RECEIPT_LATE = 50;
    /// A thread that computes to read its link again; then another one reads it, and acknowledges what came.
    STAND_IN = 50;
    /// The answer of a lap, between two looks of the coordinator at what else there is to do.
    ANSWER_LOOK = 50;
    /// The rest of a long answer that has begun; then the link is closed.
    ANSWER_WHOLE = 2_500;
    /// The pings of a coordinator; without one a worker takes it for gone and frees its stage.
    COORDINATOR_SILENT = 8_000;
    /// The first message on a connection to a worker; then it is closed.
    FIRST_MESSAGE = 5_000;
    /// One peer's answer to a dial and a hello; then another is tried.
    WELCOME = 4_000;
    /// Another worker, after the last that was required; then the search ends.
    SETTLE = 1_200;
    /// Between two looks for a worker that was lost, and where one was once.
    LOOK_AGAIN = 1_000;
    /// What the workers measure before layers are placed; who does not answer is placed by what its hello says.
    MEASURING = 15_000;
    /// The measurement of one link; what is not measured by then is assumed.
    LINK_MEASURED = 2_000;
    /// A node to take the connection that measures the link to it; then it counts as out of reach.
    LINK_DIAL = 1_500;
    /// Messages that measure bandwidth go on for so long.
    LINK_BULK = 300;
    /// Passes of a probe of this node's speed go on for so long, and for three passes at least.
    PROBE = 250;
    /// An answer to `doctor`, and its next question; then the link between the two is closed.
    EXAMINE_ANSWER = 4_000;
    /// A try of a node to reach the one that asks it to; then the answer is no.
    EXAMINE_REACH = 2_000;
    /// The announcement of `doctor` to be heard by another node; then its multicast does not get there.
    EXAMINE_HEARS = 3_000;
    /// Between two looks of `doctor` at what was heard.
    EXAMINE_LOOK = 100;
    /// A firewall's own tool to say whether it is on; then it is not known.
    FIREWALL = 2_000;
    /// Between two looks whether that tool has ended.
    FIREWALL_LOOK = 10;
    /// Between two looks of a worker at what other processes of this user did to the list of machines.
    MEMBERS_LOOK = 1_000;
    /// News of a worker that loads its layers; then it counts as lost.
    LOADING_SILENT = 120_000;
    /// A coordinator to dial a worker that wants bytes of the model; then the worker does without it.
    SUPPLY_COMES = 8_000;
    /// A worker to take the connection that bytes of the model go over; then it is served none.
    SUPPLY_DIAL = 5_000;
    /// Any bytes, or a word, of a node that was asked for bytes of the model; then they are fetched elsewhere.
    SUPPLY_SILENT = 15_000;
    /// The same of a node that fetches them from the Hub on the way.
    SUPPLY_THROUGH = 110_000;
    /// Between two words of a node that bytes are coming to which it was asked for.
    SUPPLY_WORD = 1_000;
    /// The next question for bytes; then the connection is closed.
    SUPPLY_ASK = 120_000;
    /// Answers of the room to which models it has; who has not answered by then is named as silent.
    LISTED = 2_500;
    /// A worker to open its models, before it says which it has; those that are left then are counted.
    LISTING = 1_200;
    /// Another node to say that it has a published model, or to look it up at the Hub; then it is done without.
    RESOLVED = 25_000;
    /// A worker to read whole files of a model, so that it can say what they hash to; the rest is read between steps.
    HASHING = 1_500;
    /// A step to end, before bytes of a model are sent beside it.
    YIELD = 50;
    /// After a step, bytes of a model are sent little by little for so long.
    QUIET = 1_000;
    /// The end of the stage before, whose memory is needed; then the order is refused.
    STAGE_TURN = 100_000;
    /// The ring's other connections once a worker's stage is loaded; then the stage is given up.
    ASSEMBLY = 600_000;
    /// All data connections once every stage is loaded; then the start fails.
    CONNECTING = 15_000;
    /// The next stage to take a data connection; then the stage is given up.
    DIAL = 5_000;
    /// The next stage to take any bytes of a frame, which may wait behind a prompt chunk; then the link is closed.
    FRAME_WRITE = 60_000;
    /// The news that explains why a link ended; then the link itself is named.
    EXPLANATION = 250;
    /// Every deadline of a lap is waited for at least so long, however late it is looked at.
    GRACE = 50;
    /// Between two looks of a compute thread that has nothing to wait for.
    IDLE = 3_600_000;
    /// Between two words of a worker about how far it has read its weights.
    LOADING_NEWS = 200;
    /// The compute thread to take a request, which it does between two steps; then the request fails.
    ADMISSION = 130_000;
    /// Any news of an answer: a token, or a prompt chunk that came round; then the answer ends with an error.
    ANSWER_SILENT = 130_000;
    /// A worker process of this command to say where it listens; then the command fails.
    LOCAL_START = 20_000;
    /// A worker process of this command to leave when asked to; then it is killed.
    LOCAL_LEAVE = 2_000;
}

/// The table for people, with the waits of `swarm-link` and `swarm-ring` as they are set here.
pub fn table() -> String {
    let link = swarm_link::LinkSettings::default();
    let timers = swarm_ring::Timers::default();
    let mut rows: Vec<(String, u128, String)> = TABLE
        .iter()
        .map(|row| (row.name.to_owned(), row.within.as_millis(), row.what.trim().to_owned()))
        .collect();
    let us = |us: u64| u128::from(us / 1000);
    let below = [
        (
            "LinkSettings::handshake_timeout",
            link.handshake_timeout.as_millis(),
            "From the first byte to an authenticated link, all reads and writes together; then it is closed.",
        ),
        (
            "LinkSettings::write_timeout",
            link.write_timeout.as_millis(),
            "A peer to take any bytes of a control message; then the link is closed.",
        ),
        (
            "Timers::lap_us_min",
            us(timers.lap_us_min),
            "A lap is never overdue before this; from then on at 8 times the slowest of 100 measured laps.",
        ),
        (
            "Timers::first_lap_us",
            us(timers.first_lap_us),
            "A lap before any was measured, and half a second more for each of its rows.",
        ),
        (
            "Timers::lap_us_max",
            us(timers.lap_us_max),
            "No lap may take longer, whatever was measured; then the answer ends with an error.",
        ),
    ];
    rows.extend(below.map(|(name, ms, what)| (name.to_owned(), ms, what.to_owned())));
    let mut text = String::from("| wait | ms | for what, and what happens then |\n| --- | ---: | --- |\n");
    for (name, ms, what) in rows {
        text += &format!("| `{name}` | {ms} | {what} |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `SWARM_OS_WRITE_DOCS=1` writes the table into the page instead.
    #[test]
    fn the_page_shows_the_table() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/deadlines.md");
        let page = std::fs::read_to_string(&path).unwrap();
        let start = page.find("| wait |").expect("a table");
        let end = page[start..].find("\n\n").map_or(page.len(), |end| start + end + 1);
        if std::env::var_os("SWARM_OS_WRITE_DOCS").is_some() {
            std::fs::write(&path, format!("{}{}{}", &page[..start], table(), &page[end..])).unwrap();
            return;
        }
        assert_eq!(&page[start..end], table(), "SWARM_OS_WRITE_DOCS=1 cargo test -p swarm-node writes it");
    }

    #[test]
    fn no_wait_is_made_up_elsewhere() {
        let src = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        for entry in std::fs::read_dir(src).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            let waits = ["Duration::from_secs(", "Duration::from_millis("];
            assert!(
                name == "deadlines.rs" || !waits.iter().any(|wait| code.contains(wait)),
                "{name}: a wait that is not in deadlines.rs"
            );
        }
    }

    #[test]
    fn the_waits_agree_with_each_other() {
        // Suspected before dead, and a worker does not give its coordinator up before that one gave it up.
        const {
            assert!(
                HEARTBEAT.as_millis() * 4 <= SUSPECT.as_millis() && SUSPECT.as_millis() < DEAD.as_millis()
            )
        };
        const {
            assert!(
                DEAD.as_millis() < COORDINATOR_SILENT.as_millis() && COORDINATOR_SILENT.as_millis() < 10_000
            )
        };
        // A receipt is looked for twice before it is missed, and that says who is to blame before the lap's deadline.
        let missed_us = (ACKNOWLEDGE + 2 * RECEIPT_LOOK).as_micros();
        assert!(missed_us <= DEAD.as_micros());
        assert!(missed_us <= u128::from(swarm_ring::Timers::default().lap_us_min));
        // A lap's deadline is looked at between two looks for its answer.
        const { assert!(GRACE.as_millis() <= ANSWER_LOOK.as_millis()) };
        // A worker that waits for its memory is not taken for silent.
        const { assert!(STAGE_TURN.as_millis() < LOADING_SILENT.as_millis()) };
        assert!(ANSWER_SILENT.as_micros() > u128::from(swarm_ring::Timers::default().lap_us_max));
    }
}
