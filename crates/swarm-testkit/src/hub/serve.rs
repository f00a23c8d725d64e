//! What the two hosts answer.

use std::io::BufReader;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::http::{Manner, Request, answer};
use super::{HubRequest, Repo, Served, State, StoredFile, Trouble, digest, is_large, lock};

/// A connection that asks nothing for so long is closed.
const IDLE: Duration = Duration::from_secs(30);

pub(super) fn listen(listener: TcpListener, state: &Arc<State>, store: bool) {
    let state = state.clone();
    thread::spawn(move || {
        for stream in listener.incoming() {
            if state.closed.load(Ordering::Relaxed) {
                return;
            }
            let (Ok(stream), state) = (stream, state.clone()) else { continue };
            thread::spawn(move || connection(&state, stream, store));
        }
    });
}

fn connection(state: &State, mut stream: TcpStream, store: bool) {
    let Ok(reading) = stream.try_clone() else { return };
    let _ = stream.set_nodelay(true);
    let _ = stream.set_read_timeout(Some(IDLE));
    let mut input = BufReader::new(reading);
    while let Ok(Some(request)) = Request::read(&mut input) {
        if state.closed.load(Ordering::Relaxed) {
            return;
        }
        let asked = Asked::new(state, &request, store);
        let reply = asked.reply();
        let body = if request.method == "HEAD" { &[][..] } else { &reply.body };
        let place = asked.log(&reply);
        let count = |bytes: u64| {
            if let Some(served) = lock(&state.log).get_mut(place) {
                served.bytes = bytes;
            }
        };
        let Ok(true) = answer(&mut stream, reply.status, &reply.headers, body, reply.manner, &count) else {
            return;
        };
    }
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    offset: u64,
    manner: Manner,
}

impl Reply {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let manner = Manner::default();
        Self { status, headers: Vec::new(), body: body.into(), offset: 0, manner }
    }

    fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

struct Asked<'a> {
    state: &'a State,
    request: &'a Request,
    seen: HubRequest,
    /// Repository, commit and name of the file that is meant.
    file: Option<(String, String, String)>,
}

impl<'a> Asked<'a> {
    fn new(state: &'a State, request: &'a Request, store: bool) -> Self {
        let number = state.numbers[usize::from(store)].fetch_add(1, Ordering::Relaxed);
        let parts: Vec<&str> = request.path.trim_matches('/').split('/').collect();
        let text = |part: &&str| (*part).to_owned();
        let file = match parts.as_slice() {
            [org, name, "resolve" | "store", revision, file @ ..] if !file.is_empty() => {
                Some((format!("{org}/{name}"), text(revision), file.join("/")))
            }
            _ => None,
        };
        let path = file.as_ref().map_or(request.path.clone(), |(repo, _, file)| format!("{repo}/{file}"));
        Self { state, request, seen: HubRequest { number, store, path, range: request.range() }, file }
    }

    fn who(&self) -> Option<String> {
        if self.seen.store { self.request.query.get("for").cloned() } else { self.request.token() }
    }

    /// Returns the place in the log.
    fn log(&self, reply: &Reply) -> usize {
        let store = self.seen.store;
        let mut log = lock(&self.state.log);
        log.push(Served {
            store,
            who: self.who(),
            path: self.seen.path.clone(),
            offset: reply.offset,
            bytes: 0,
            status: reply.status,
            token_leaked: store && self.request.token().is_some(),
        });
        log.len() - 1
    }

    fn reply(&self) -> Reply {
        let trouble = { lock(&self.state.plan).clone() }(&self.seen);
        match trouble {
            Trouble::Busy(after) => {
                let reply = Reply::new(429, "slow down");
                return match after {
                    Some(seconds) => reply.with("Retry-After", seconds.to_string()),
                    None => reply,
                };
            }
            Trouble::Status(status) => return Reply::new(status, "no"),
            Trouble::Expired => return Reply::new(403, "<Error><Code>AccessDenied</Code></Error>"),
            _ => {}
        }
        let required = lock(&self.state.required_token).clone();
        if !self.seen.store && required.is_some() && self.request.token() != required {
            return Reply::new(401, "Invalid credentials").with("X-Error-Code", "GatedRepo");
        }
        match &self.file {
            Some((repo, revision, file)) => self.file(repo, revision, file, &trouble),
            None => self.listing(),
        }
    }

    fn repo(&self, id: &str, revision: &str) -> Option<Repo> {
        let repos = lock(&self.state.repos);
        let commits = repos.get(id)?;
        let named = commits.iter().find(|repo| repo.commit == revision);
        named.or_else(|| commits.last().filter(|_| revision == "main")).cloned()
    }

    fn listing(&self) -> Reply {
        let path = self.request.path.strip_prefix("/api/models/");
        let Some((id, revision)) = path.and_then(|path| path.split_once("/revision/")) else {
            return Reply::new(404, "not found");
        };
        let Some(repo) = self.repo(id, revision) else {
            return Reply::new(404, "not found").with("X-Error-Code", "RepoNotFound");
        };
        let blobs =
            self.state.lists_blobs.load(Ordering::Relaxed) && self.request.query.contains_key("blobs");
        let sibling = |(name, file): (&String, &StoredFile)| match (blobs, is_large(name)) {
            (false, _) => json!({"rfilename": name}),
            (true, false) => json!({"rfilename": name, "size": file.bytes.len(), "blobId": file.tag}),
            (true, true) => {
                json!({"rfilename": name, "size": file.bytes.len(), "blobId": digest(file.tag.as_bytes(), 40),
                "lfs": {"sha256": file.tag, "size": file.bytes.len(), "pointerSize": 134}})
            }
        };
        let siblings: Vec<_> = repo.files.iter().map(sibling).collect();
        let body = json!({"id": id, "sha": repo.commit, "private": false, "siblings": siblings});
        Reply::new(200, body.to_string()).with("Content-Type", "application/json")
    }

    fn file(&self, id: &str, revision: &str, name: &str, trouble: &Trouble) -> Reply {
        let Some(repo) = self.repo(id, revision) else { return Reply::new(404, "no such revision") };
        let Some(mut file) = repo.files.get(name).cloned() else {
            return Reply::new(404, "no such file").with("X-Error-Code", "EntryNotFound");
        };
        let commit =
            if *trouble == Trouble::OtherCommit { digest(b"another", 40) } else { repo.commit.clone() };
        if *trouble == Trouble::OtherVersion {
            let bytes = file.bytes.iter().map(|byte| byte ^ 0x55).collect();
            file = StoredFile::new(name, bytes);
        }
        if self.seen.store {
            if !self.is_signed(id, &repo.commit, name) {
                return Reply::new(403, "<Error><Code>AccessDenied</Code></Error>");
            }
            return self.bytes(&file, trouble).with("ETag", format!("\"{}\"", file.tag));
        }
        if is_large(name) {
            return Reply::new(302, "Found")
                .with("Location", self.signed(id, &repo.commit, name))
                .with("X-Repo-Commit", commit)
                .with("X-Linked-Size", file.bytes.len().to_string())
                .with("X-Linked-ETag", format!("\"{}\"", file.tag))
                .with("Accept-Ranges", "bytes");
        }
        self.bytes(&file, trouble).with("ETag", format!("\"{}\"", file.tag)).with("X-Repo-Commit", commit)
    }

    fn bytes(&self, file: &StoredFile, trouble: &Trouble) -> Reply {
        let total = file.bytes.len() as u64;
        let mut manner = Manner::default();
        match trouble {
            Trouble::Cut(at) => manner.cut = Some(*at),
            Trouble::Slow(pause) => manner.pause = Some(*pause),
            Trouble::Stall(at, pause) => manner.stall = Some((*at, *pause)),
            _ => {}
        }
        let Some((start, end)) = self.seen.range.filter(|_| *trouble != Trouble::IgnoreRange) else {
            return Reply { manner, ..Reply::new(200, file.bytes.as_slice()) };
        };
        let shift = if let Trouble::Shifted(by) = trouble { *by } else { 0 };
        let (start, mut end) = (start.saturating_add(shift), end.saturating_add(shift).min(total));
        if start >= end {
            return Reply::new(416, "").with("Content-Range", format!("bytes */{total}"));
        }
        if *trouble == Trouble::Half {
            end = start + (end - start).div_ceil(2);
        }
        let body = &file.bytes[start as usize..end as usize];
        let reply = Reply { manner, offset: start, ..Reply::new(206, body) };
        let total = if *trouble == Trouble::OtherTotal { total + 1 } else { total };
        match trouble {
            Trouble::NoContentRange => reply,
            _ => reply.with("Content-Range", format!("bytes {start}-{}/{total}", end - 1)),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.state.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn signed(&self, id: &str, commit: &str, name: &str) -> String {
        let until = self.now_ms() + lock(&self.state.url_life).as_millis() as u64;
        let who = self.request.token().unwrap_or_default();
        let signature = signature(id, commit, name, &who, until);
        let address = self.state.store;
        format!("http://{address}/{id}/store/{commit}/{name}?for={who}&until={until}&signature={signature}")
    }

    fn is_signed(&self, id: &str, commit: &str, name: &str) -> bool {
        let part = |key: &str| self.request.query.get(key).cloned().unwrap_or_default();
        let until: u64 = part("until").parse().unwrap_or(0);
        part("signature") == signature(id, commit, name, &part("for"), until) && self.now_ms() < until
    }
}

fn signature(id: &str, commit: &str, name: &str, who: &str, until: u64) -> String {
    digest(format!("{id} {commit} {name} {who} {until}").as_bytes(), 32)
}
