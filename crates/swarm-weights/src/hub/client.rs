//! Requests: who is asked, what is believed of an answer, and what is tried again.

use std::collections::HashMap;
use std::io::Read;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ureq::http::{Response, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{HubError, HubSettings, Listing, RemoteFile, Retry, pause};

const REDIRECTS_MAX: usize = 5;
const LISTING_BYTES_MAX: u64 = 32 << 20;
/// What is read of an answer that is not used, so that its connection can be used again.
const REST_BYTES_MAX: u64 = 64 << 10;
const READ_BYTES: usize = 64 << 10;
/// So long after a Hub could not be reached it is asked once, and not again and again: a command asks several times.
const LOST_FOR: Duration = Duration::from_secs(60);

/// Takes bytes of a file as they come: the offset of the first, and the bytes.
pub(crate) type Sink<'a> = dyn FnMut(u64, &[u8]) -> Result<(), HubError> + 'a;

/// A client of one Hub. Any number of threads may use it at once.
pub struct HubClient {
    settings: HubSettings,
    agent: Agent,
    /// Where the bytes of a file are, as the Hub last said.
    places: Mutex<HashMap<String, String>>,
    /// The tag under which each file's bytes came first; bytes under another tag are never put beside them.
    tags: Mutex<HashMap<String, String>>,
    /// When it was found that nobody can be reached, if nobody was since.
    lost: Mutex<Option<Instant>>,
}

impl HubClient {
    pub fn new(settings: HubSettings) -> Self {
        let Retry { idle, connect, .. } = settings.retry;
        let tls = TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0) // followed here, where it is known who may see the token
            .max_redirects_will_error(false)
            .timeout_connect(Some(connect))
            .timeout_recv_response(Some(connect.max(idle)))
            .timeout_per_read(Some(idle))
            .timeout_per_write(Some(idle))
            .max_idle_connections_per_host(settings.connections)
            .user_agent(concat!("swarm-os/", env!("CARGO_PKG_VERSION")))
            .tls_config(tls)
            .build();
        Self {
            settings,
            agent: config.new_agent(),
            places: Mutex::default(),
            tags: Mutex::default(),
            lost: Mutex::default(),
        }
    }

    pub fn settings(&self) -> &HubSettings {
        &self.settings
    }

    /// The host, for messages.
    pub fn host(&self) -> String {
        host(&self.settings.endpoint)
    }

    /// The Hub may not be asked, or could not be reached a moment ago.
    pub fn is_lost(&self) -> bool {
        self.settings.offline || lock(&self.lost).is_some_and(|lost| lost.elapsed() < LOST_FOR)
    }

    fn note_lost(&self, error: &HubError) {
        if error.is_unreachable() {
            *lock(&self.lost) = Some(Instant::now());
        }
    }

    /// What a repository holds at a revision. With `others` to turn to, a Hub that cannot be reached is asked once.
    ///
    /// # Errors
    /// [`HubError`].
    pub(crate) fn listing(&self, id: &str, revision: &str, others: bool) -> Result<Listing, HubError> {
        let endpoint = &self.settings.endpoint;
        let what = format!("the model {id} at revision {revision}");
        let url = format!("{endpoint}/api/models/{id}/revision/{}?blobs=true", revision.replace('/', "%2F"));
        let ask = || {
            let response = self.follow(&url, None, &what)?;
            self.whole(response, &what, LISTING_BYTES_MAX)
        };
        let first = if others { Some(ask()) } else { None };
        let json = match first {
            Some(Ok(json)) => json,
            Some(Err(error)) if error.is_unreachable() => {
                self.note_lost(&error);
                return Err(error);
            }
            _ => self.patiently(&what, &AtomicBool::new(false), |_| ask())?,
        };
        Listing::parse(&json).map_err(|why| HubError::Wrong { host: self.host(), what, why })
    }

    /// A whole small file.
    ///
    /// # Errors
    /// [`HubError`], also when it has more than `max` bytes.
    pub(crate) fn small(&self, file: &RemoteFile, max: u64) -> Result<Vec<u8>, HubError> {
        let (url, what) = (self.url(file), file.label());
        self.patiently(&what, &AtomicBool::new(false), |_| {
            let response = self.follow(&url, None, &what)?;
            self.check_file(file, &response)?;
            let bytes = self.whole(response, &what, max)?;
            match file.size {
                Some(size) if size != bytes.len() as u64 => {
                    Err(self.wrong(&what, format!("{} bytes instead of {size}", bytes.len())))
                }
                _ => Ok(bytes),
            }
        })
    }

    /// The length of a file that the listing does not tell.
    ///
    /// # Errors
    /// [`HubError`].
    pub(crate) fn size(&self, file: &RemoteFile) -> Result<u64, HubError> {
        let (url, what) = (self.url(file), file.label());
        self.patiently(&what, &AtomicBool::new(false), |_| {
            let response = self.follow(&url, Some(0..1), &what)?;
            self.check_file(file, &response)?;
            let range = content_range(&response);
            let total = match response.status().as_u16() {
                206 => range.map(|(_, total)| total),
                200 => number(&response, "content-length"),
                _ => None,
            };
            total.ok_or_else(|| self.wrong(&what, "its length is not told".into()))
        })
    }

    /// Whether it is worth to ask for a file at all: not for a while after nobody could be reached.
    ///
    /// # Errors
    /// [`HubError::Unreachable`].
    pub(crate) fn hope(&self, file: &RemoteFile) -> Result<(), HubError> {
        if !self.is_lost() || self.settings.offline {
            return Ok(());
        }
        let why = "it could not be a moment ago".to_owned();
        Err(HubError::Unreachable { host: self.host(), what: file.label(), why })
    }

    /// Asks once, without patience, whether anybody answers for a file; what the answer is does not matter. Not even once
    /// where nobody answered a moment ago: each time may take long.
    ///
    /// # Errors
    /// [`HubError::Unreachable`], [`HubError::Offline`].
    pub(crate) fn knock(&self, file: &RemoteFile) -> Result<(), HubError> {
        self.hope(file)?;
        let answer = self.send(&self.url(file), Some(&(0..1)), &file.label());
        answer.map(drain).inspect_err(|error| self.note_lost(error))
    }

    /// Brings `range` of a file of known size into `sink`, in order, each byte once. Goes on where a connection ended;
    /// fails when `retry.failures_max` tries in a row brought nothing.
    ///
    /// # Errors
    /// [`HubError`]; what went into the sink is right even then.
    pub(crate) fn range(
        &self,
        file: &RemoteFile,
        range: Range<u64>,
        sink: &mut Sink<'_>,
        abort: &AtomicBool,
    ) -> Result<(), HubError> {
        let what = file.label();
        let mut at = range.start;
        self.patiently(&what, abort, |failed| {
            while at < range.end {
                let before = at;
                let came = self.some(file, at..range.end, abort, &mut |offset, bytes| {
                    sink(offset, bytes)?;
                    at = offset.saturating_add(bytes.len() as u64);
                    Ok(())
                });
                if at > before {
                    failed.reset();
                }
                came?;
                if at == before {
                    return Err(self.wrong(&what, "an empty answer".into()));
                }
            }
            Ok(())
        })
    }

    /// One request for `range`, and what it brings of it.
    fn some(
        &self,
        file: &RemoteFile,
        range: Range<u64>,
        abort: &AtomicBool,
        sink: &mut Sink<'_>,
    ) -> Result<(), HubError> {
        let what = file.label();
        let response = self.place(file, &range, &what)?;
        let size = file.size.unwrap_or(0);
        let start = match (response.status().as_u16(), content_range(&response)) {
            (206, Some((_, total))) if total != size => {
                return Err(self.changed(&what, format!("it has {total} bytes, {size} were expected")));
            }
            (206, Some((found, _))) if found.start <= range.start && found.end > range.start => found.start,
            (206, Some((found, _))) => {
                let why = format!(
                    "bytes from {} on when those from {} on were asked for",
                    found.start, range.start
                );
                return Err(self.wrong(&what, why));
            }
            (206, None) => return Err(self.wrong(&what, "a part that does not say which".into())),
            (200, _) if range == (0..size) && number(&response, "content-length") == Some(size) => 0,
            (200, _) => {
                let why = "the whole file when a part was asked for: it does not serve byte ranges".into();
                return Err(self.wrong(&what, why));
            }
            (416, _) => return Err(self.changed(&what, "it is shorter than it was".into())),
            (status, _) => return Err(self.refused(&response, &what, status)),
        };
        self.same_tag(file, &response)?;
        let mut reader = response.into_body().into_reader();
        let mut buffer = vec![0; READ_BYTES];
        let mut at = start;
        while at < range.end {
            if abort.load(Ordering::Relaxed) {
                return Err(HubError::Aborted);
            }
            let read = reader.read(&mut buffer).map_err(|error| self.cut(&what, error.to_string()))?;
            let bytes = buffer.get(..read).unwrap_or_default();
            if bytes.is_empty() {
                return if at > range.start { Ok(()) } else { Err(self.cut(&what, "no byte came".into())) };
            }
            // Bytes before and after what was asked for are dropped.
            let skip = usize::try_from(range.start.saturating_sub(at)).unwrap_or(usize::MAX).min(read);
            let keep = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(read);
            let wanted = bytes.get(skip..keep).unwrap_or_default();
            if !wanted.is_empty() {
                sink(at.saturating_add(skip as u64), wanted)?;
            }
            at = at.saturating_add(read as u64);
        }
        Ok(())
    }

    /// Asks where the bytes are, as far as that is known; else by way of the Hub.
    fn place(&self, file: &RemoteFile, range: &Range<u64>, what: &str) -> Result<Response<Body>, HubError> {
        let key = self.url(file);
        let known = lock(&self.places).get(&key).cloned();
        if let Some(url) = known {
            let response = self.send(&url, Some(range), what);
            // Where nobody answers any more, the Hub is asked anew.
            let response = response.inspect_err(|_| drop(lock(&self.places).remove(&key)))?;
            if !matches!(response.status().as_u16(), 401 | 403 | 404 | 410) {
                return Ok(response);
            }
            // A signed URL has its day. Where the bytes are now, only the Hub can say.
            lock(&self.places).remove(&key);
            drain(response);
        }
        let response = self.send(&key, Some(range), what)?;
        self.check_file(file, &response)?;
        match self.next(&key, &response) {
            None => Ok(response),
            Some(next) => {
                drain(response);
                let (response, last) = self.follow_from(next?, Some(range.clone()), what)?;
                if response.status().as_u16() == 206 {
                    lock(&self.places).insert(key, last);
                }
                Ok(response)
            }
        }
    }

    /// What the Hub's own answer says of a file must be what is known of it.
    fn check_file(&self, file: &RemoteFile, response: &Response<Body>) -> Result<(), HubError> {
        let what = file.label();
        if let Some(commit) = header(response, "x-repo-commit")
            && commit != file.commit
        {
            return Err(self.changed(&what, format!("it comes from commit {}", short(commit))));
        }
        let linked = header(response, "x-linked-etag");
        let tag = linked.or_else(|| header(response, "etag")).map(bare_tag);
        if let (Some(tag), Some(known)) = (tag, &file.tag)
            && response.status().as_u16() < 400
            && tag != known
            && (linked.is_some() || response.status().as_u16() < 300)
        {
            return Err(self.changed(&what, "its content has another tag".into()));
        }
        match (number(response, "x-linked-size"), file.size) {
            (Some(now), Some(size)) if now != size => {
                Err(self.changed(&what, format!("it has {now} bytes, {size} were expected")))
            }
            _ => Ok(()),
        }
    }

    /// All bytes of a file must come under one tag.
    fn same_tag(&self, file: &RemoteFile, response: &Response<Body>) -> Result<(), HubError> {
        let Some(tag) = header(response, "etag").map(bare_tag) else { return Ok(()) };
        let mut tags = lock(&self.tags);
        match tags.get(&self.url(file)) {
            Some(first) if first != tag => {
                drop(tags);
                let why = "bytes under two tags; it was replaced while it was read".into();
                Err(self.changed(&file.label(), why))
            }
            Some(_) => Ok(()),
            None => {
                tags.insert(self.url(file), tag.to_owned());
                Ok(())
            }
        }
    }

    /// Sends a request and follows redirects to an answer.
    fn follow(&self, url: &str, range: Option<Range<u64>>, what: &str) -> Result<Response<Body>, HubError> {
        let response = self.send(url, range.as_ref(), what)?;
        match self.next(url, &response) {
            None => Ok(response),
            // What the first host said of the file was looked at by whoever wanted that; here the bytes matter.
            Some(next) => Ok(self.follow_from(next?, range, what)?.0),
        }
    }

    /// The answer at the end of the redirects from `url`, and where it came from.
    fn follow_from(
        &self,
        url: String,
        range: Option<Range<u64>>,
        what: &str,
    ) -> Result<(Response<Body>, String), HubError> {
        let mut url = url;
        for _ in 0..REDIRECTS_MAX {
            let response = self.send(&url, range.as_ref(), what)?;
            match self.next(&url, &response) {
                None => return Ok((response, url)),
                Some(next) => url = next?,
            }
        }
        Err(self.wrong(what, format!("more than {REDIRECTS_MAX} redirects")))
    }

    /// Where a redirect leads; nothing when the answer is none.
    fn next(&self, from: &str, response: &Response<Body>) -> Option<Result<String, HubError>> {
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return None;
        }
        let next = header(response, "location").and_then(|location| absolute(from, location));
        Some(next.ok_or_else(|| self.wrong("a redirect", "a place that is no URL".into())))
    }

    fn send(&self, url: &str, range: Option<&Range<u64>>, what: &str) -> Result<Response<Body>, HubError> {
        if self.settings.offline {
            return Err(HubError::Offline { what: what.to_owned() });
        }
        let mut request = self.agent.get(url);
        if let Some(range) = range {
            request =
                request.header("Range", format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
        }
        // The token is for the Hub and for nobody that the Hub sends us to.
        if let Some(token) =
            self.settings.token.as_ref().filter(|_| same_origin(url, &self.settings.endpoint))
        {
            request = request.header("Authorization", token.bearer());
        }
        let answer = request.call().map_err(|error| HubError::Unreachable {
            host: host(url),
            what: what.to_owned(),
            why: reason(&error),
        })?;
        *lock(&self.lost) = None;
        Ok(answer)
    }

    /// The whole body of a good answer.
    fn whole(&self, response: Response<Body>, what: &str, max: u64) -> Result<Vec<u8>, HubError> {
        let status = response.status().as_u16();
        if status != 200 {
            return Err(self.refused(&response, what, status));
        }
        let length = number(&response, "content-length");
        let mut bytes = Vec::new();
        let mut reader = response.into_body().into_reader().take(max.saturating_add(1));
        reader.read_to_end(&mut bytes).map_err(|error| self.cut(what, error.to_string()))?;
        if bytes.len() as u64 > max {
            return Err(self.changed(what, format!("it has more than the {max} bytes that are accepted")));
        }
        match length {
            Some(length) if length != bytes.len() as u64 => {
                Err(self.cut(what, format!("{} of {length} bytes came", bytes.len())))
            }
            _ => Ok(bytes),
        }
    }

    /// What a status that brings nothing means.
    fn refused(&self, response: &Response<Body>, what: &str, status: u16) -> HubError {
        let (host, what) = (self.host(), what.to_owned());
        match status {
            429 | 503 if number(response, "retry-after").is_some() => {
                let seconds = number(response, "retry-after").unwrap_or(0);
                HubError::Busy { host, what, status, seconds }
            }
            404 | 410 => HubError::NotFound { host, what },
            401 | 403 if header(response, "x-error-code").is_some() || status == 401 => {
                let hint = match self.settings.token {
                    Some(_) => "ask there for access to it, with the account that HF_TOKEN belongs to",
                    None => "if it exists, it wants an account: set HF_TOKEN",
                };
                HubError::Denied { host, what, status, hint }
            }
            _ => HubError::Status { host, what, status },
        }
    }

    /// Tries again what may pass, after longer and longer waits.
    fn patiently<T>(
        &self,
        what: &str,
        abort: &AtomicBool,
        mut attempt: impl FnMut(&mut Failures) -> Result<T, HubError>,
    ) -> Result<T, HubError> {
        let retry = self.settings.retry;
        let mut failed = Failures::default();
        loop {
            let error = match attempt(&mut failed) {
                Ok(done) => return Ok(done),
                Err(error) if error.may_pass() => error,
                Err(error) => return Err(error),
            };
            failed.in_a_row += 1;
            let failures_max = if self.is_lost() { 1 } else { retry.failures_max.max(1) };
            if failed.in_a_row >= failures_max {
                self.note_lost(&error);
                return Err(HubError::GaveUp { failures: failed.in_a_row, source: Box::new(error) });
            }
            let wait = match &error {
                HubError::Busy { seconds, .. } => {
                    let asked = Duration::from_secs(*seconds);
                    if asked > retry.longest_asked {
                        return Err(error);
                    }
                    asked
                }
                _ => failed.wait(&retry, what),
            };
            if !pause(wait, abort) {
                return Err(HubError::Aborted);
            }
        }
    }

    fn url(&self, file: &RemoteFile) -> String {
        let RemoteFile { id, commit, path, .. } = file;
        let path = path.replace('+', "%2B").replace('=', "%3D");
        format!("{}/{id}/resolve/{commit}/{path}", self.settings.endpoint)
    }

    fn changed(&self, what: &str, why: String) -> HubError {
        HubError::Changed { host: self.host(), what: what.to_owned(), why }
    }

    fn wrong(&self, what: &str, why: String) -> HubError {
        HubError::Wrong { host: self.host(), what: what.to_owned(), why }
    }

    fn cut(&self, what: &str, why: String) -> HubError {
        HubError::Cut { host: self.host(), what: what.to_owned(), why }
    }
}

/// Failures since the last byte.
#[derive(Default)]
struct Failures {
    in_a_row: u32,
}

impl Failures {
    fn reset(&mut self) {
        self.in_a_row = 0;
    }

    /// Doubled each time. A quarter of it differs from file to file, so that not all come back at once.
    fn wait(&self, retry: &Retry, what: &str) -> Duration {
        let doubled = retry.first.saturating_mul(1 << (self.in_a_row.saturating_sub(1)).min(16));
        let own = what.bytes().fold(7_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into())) % 256;
        doubled.min(retry.longest) * (768 + own) / 1024
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn drain(response: Response<Body>) {
    // Failing here only costs the connection.
    let _ = std::io::copy(&mut response.into_body().into_reader().take(REST_BYTES_MAX), &mut std::io::sink());
}

fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

fn number(response: &Response<Body>, name: &str) -> Option<u64> {
    header(response, name)?.trim().parse().ok()
}

/// `bytes 0-9/100`: the range, end exclusive, and the length of the whole.
fn content_range(response: &Response<Body>) -> Option<(Range<u64>, u64)> {
    parse_content_range(header(response, "content-range")?)
}

fn parse_content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, last) = range.split_once('-')?;
    let (start, last, total): (u64, u64, u64) =
        (start.parse().ok()?, last.parse().ok()?, total.parse().ok()?);
    (start <= last && last < total).then(|| (start..last.saturating_add(1), total))
}

/// A tag without quotes and without the mark of a weak one.
fn bare_tag(tag: &str) -> &str {
    tag.trim().trim_start_matches("W/").trim_matches('"')
}

fn short(commit: &str) -> String {
    commit.chars().filter(char::is_ascii_alphanumeric).take(12).collect()
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

fn same_origin(a: &str, b: &str) -> bool {
    origin(a).is_some_and(|a| origin(b) == Some(a))
}

/// Host and port of a URL; never its query, which may be a signature.
fn host(url: &str) -> String {
    let uri: Option<Uri> = url.parse().ok();
    let authority = uri.as_ref().and_then(Uri::authority).map(|authority| match authority.port_u16() {
        Some(port) => format!("{}:{port}", authority.host()),
        None => authority.host().to_owned(),
    });
    authority.unwrap_or_else(|| "the Hub".to_owned())
}

/// `location` as seen from `from`.
fn absolute(from: &str, location: &str) -> Option<String> {
    if location.starts_with("http://") || location.starts_with("https://") {
        return location.parse::<Uri>().is_ok().then(|| location.to_owned());
    }
    let (scheme, rest) = from.split_once("://")?;
    let authority = rest.split('/').next()?;
    location.starts_with('/').then(|| match location.strip_prefix("//") {
        Some(elsewhere) => format!("{scheme}://{elsewhere}"),
        None => format!("{scheme}://{authority}{location}"),
    })
}

/// An error of the transport, in words that hold no URL.
fn reason(error: &ureq::Error) -> String {
    match error {
        ureq::Error::BadUri(_) => "its address is no URL".into(),
        ureq::Error::HostNotFound => "no host of that name is known".into(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn places_are_read_from_content_range_alone() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0..10, 100)));
        for bad in [
            "",
            "bytes",
            "bytes 0-9",
            "bytes 5-4/10",
            "bytes 0-10/10",
            "bytes */10",
            "bytes 0-9/*",
            "0-9/100",
            "bytes -1-9/100",
            "bytes 0-18446744073709551615/18446744073709551615",
            "bytes 1-99999999999999999999/2",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn content_ranges_lie_in_their_file(text in "(bytes )?[0-9]{0,20}[-/]?[0-9]{0,20}[-/]?[0-9]{0,20}") {
            if let Some((range, total)) = parse_content_range(&text) {
                prop_assert!(range.start < range.end && range.end <= total);
            }
        }
    }

    #[test]
    fn origins_and_redirects() {
        assert!(same_origin("https://hf.co/a", "https://HF.co:443"));
        for other in
            ["http://hf.co", "https://hf.co.evil.com", "https://hf.co:444", "https://x@evil.com", "hf.co"]
        {
            assert!(!same_origin("https://hf.co/a", other), "{other}");
        }
        let from = "https://hf.co/a/b?c";
        assert_eq!(absolute(from, "/x?y").as_deref(), Some("https://hf.co/x?y"));
        assert_eq!(absolute(from, "//cdn.co/x").as_deref(), Some("https://cdn.co/x"));
        assert_eq!(absolute(from, "http://cdn.co/x").as_deref(), Some("http://cdn.co/x"));
        assert_eq!(absolute(from, "file:///etc/passwd"), None);
        assert_eq!(host("https://cdn.co:8443/x?signature=secret"), "cdn.co:8443");
    }

    #[test]
    fn waits_grow_to_a_limit() {
        let retry = Retry::default();
        let wait = |in_a_row| Failures { in_a_row }.wait(&retry, "x");
        assert!(wait(1) < wait(2) && wait(2) < wait(3));
        assert!(wait(1) <= retry.first && wait(40) <= retry.longest);
    }
}
