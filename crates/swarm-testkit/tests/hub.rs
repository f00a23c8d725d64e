//! The test Hub answers as the real one does.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use swarm_testkit::Hub;
use swarm_testkit::hub::Trouble;

/// Status, headers in lower case, body.
fn get(url: &str, headers: &str) -> (u16, String, Vec<u8>) {
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    write!(stream, "GET /{path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n").unwrap();
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = header(&head, "content-length").parse().unwrap();
    let mut body = Vec::new();
    stream.take(length).read_to_end(&mut body).unwrap();
    (head[9..12].parse().unwrap(), head, body)
}

fn header(head: &str, name: &str) -> String {
    let start = format!("{name}: ");
    head.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_default().to_owned()
}

fn hub() -> (Hub, String) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    std::fs::write(folder.path().join("model.safetensors"), [7; 1000]).unwrap();
    let hub = Hub::start().unwrap();
    let commit = hub.add("org/name", folder.path()).unwrap();
    (hub, commit)
}

#[test]
fn files_are_listed_and_large_ones_are_redirected() {
    let (hub, commit) = hub();
    let front = hub.endpoint();
    let (status, _, body) = get(&format!("{front}/api/models/org/name/revision/main?blobs=true"), "");
    let listing: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, listing["sha"].as_str()), (200, Some(commit.as_str())));
    assert_eq!(listing["siblings"][1]["size"], 1000);
    let (status, head, body) = get(&format!("{front}/org/name/resolve/main/config.json"), "");
    assert_eq!((status, body.as_slice(), header(&head, "x-repo-commit")), (200, &b"{}"[..], commit.clone()));
    let url = format!("{front}/org/name/resolve/{commit}/model.safetensors");
    let (status, head, _) = get(&url, "Authorization: Bearer secret\r\n");
    assert_eq!((status, header(&head, "x-linked-size")), (302, "1000".to_owned()));
    let location = header(&head, "location");
    let (status, head, body) = get(&location, "Range: bytes=10-19\r\n");
    assert_eq!((status, header(&head, "content-range").as_str(), body.len()), (206, "bytes 10-19/1000", 10));
    assert_eq!(get(&location.replace("signature=", "signature=0"), "").0, 403);
    let log = hub.log();
    let last = &log[log.len() - 2];
    assert_eq!((last.store, last.who.as_deref(), last.offset, last.bytes), (true, Some("secret"), 10, 10));
    assert!(!last.token_leaked);
    get(&location, "Range: bytes=15-24\r\nAuthorization: Bearer secret\r\n");
    assert_eq!(hub.bytes_again(), 5);
    assert!(hub.log().last().unwrap().token_leaked);
}

#[test]
fn urls_expire_and_troubles_come_as_planned() {
    let (hub, _) = hub();
    let url = format!("{}/org/name/resolve/main/model.safetensors", hub.endpoint());
    hub.set_url_life(Duration::ZERO);
    let location = header(&get(&url, "").1, "location");
    assert_eq!(get(&location, "").0, 403);
    hub.set_url_life(Duration::from_secs(60));
    let location = header(&get(&url, "").1, "location");
    hub.trouble(|request| if request.store { Trouble::Cut(3) } else { Trouble::Busy(Some(2)) });
    let (status, head, _) = get(&url, "");
    assert_eq!((status, header(&head, "retry-after").as_str()), (429, "2"));
    assert_eq!(get(&location, "").2.len(), 3);
    hub.trouble(|_| Trouble::IgnoreRange);
    assert_eq!(get(&location, "Range: bytes=0-1\r\n").2.len(), 1000);
}
