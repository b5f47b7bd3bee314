//! `fpenet view` over a real socket: the page, photos in and label maps out, and everything that
//! it must refuse.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fpenet::{Model, ModelConfig, bundled};

/// A running `fpenet view` with a small untrained model, killed when dropped.
struct View {
    child: Child,
    address: SocketAddr,
    dir: tempfile::TempDir,
}

struct Reply {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Reply {
    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().skip(1).filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// A refusal: its status, and one line that holds `words`.
    #[track_caller]
    fn refuses(&self, status: u16, words: &str) {
        let text = String::from_utf8(self.body.clone()).unwrap();
        assert_eq!(self.status, status, "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.contains(words), "{words}: {text}");
    }
}

impl View {
    fn start() -> View {
        let dir = tempfile::tempdir().unwrap();
        let config = ModelConfig { classes: 11, p: 1, q: 1, ..ModelConfig::default() };
        Model::init(config, 3).unwrap().save(&dir.path().join("model.safetensors")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_fpenet"))
            .args(["view", "--port", "0", "--device", "cpu", "--model", "model.safetensors"])
            .current_dir(dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let page = lines.map(Result::unwrap).find(|line| line.starts_with("page ")).unwrap();
        let (_, rest) = page.split_once("http://").expect("the address of the page");
        let address = rest.split('/').next().unwrap().parse().unwrap();
        View { child, address, dir }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    /// Sends a request as it is and reads the answer to the end of the connection.
    fn raw(&self, request: &[u8]) -> Reply {
        let mut stream = self.connect();
        stream.write_all(request).unwrap();
        answer(stream)
    }

    /// A request without a body; `path` goes out as it is.
    fn request(&self, method: &str, path: &str) -> Reply {
        let host = self.address;
        self.raw(
            format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
                .as_bytes(),
        )
    }

    fn post(&self, path: &str, media_type: &str, body: &[u8]) -> Reply {
        self.raw(&[self.post_head(path, media_type, body.len()).as_bytes(), body].concat())
    }

    fn post_head(&self, path: &str, media_type: &str, length: usize) -> String {
        format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: {media_type}\r\n\
             Content-Length: {length}\r\n\r\n",
            self.address
        )
    }

    /// `fpenet segment` with the same model: the labels it writes, or what it says on stderr.
    fn segment(&self, name: &str, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let folder = self.dir.path();
        std::fs::write(folder.join(name), bytes).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_fpenet"))
            .args(["segment", name, "--device", "cpu", "--model", "model.safetensors"])
            .current_dir(folder)
            .output()
            .unwrap();
        let stem = PathBuf::from(name).file_stem().unwrap().to_str().unwrap().to_owned();
        match std::fs::read(folder.join(format!("out/{stem}.labels.png"))) {
            Ok(labels) => Ok(labels),
            Err(_) => Err(String::from_utf8(output.stderr).unwrap()),
        }
    }

    /// Sends a signal and waits for the end.
    fn signal(mut self, signal: &str) -> (Option<i32>, String, Duration) {
        let begun = Instant::now();
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
        let mut rest = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
        let status = self.child.wait().unwrap();
        (status.code(), rest, begun.elapsed())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answer(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("the end of the head");
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head, body: bytes[end + 4..].to_vec() }
}

#[test]
fn a_photo_gets_the_label_map_that_segment_writes() {
    let view = View::start();
    let reply = view.post("/segment?name=street.jpg", "image/jpeg", bundled::PHOTO);
    assert_eq!(reply.status, 200, "{}", reply.head);
    assert_eq!(reply.header("content-type"), Some("image/png"));
    let expected = view.segment("street.jpg", bundled::PHOTO).unwrap();
    assert!(reply.body == expected, "the labels differ from those of fpenet segment");
    let timing = reply.header("server-timing").unwrap();
    for stage in ["upload", "decode", "inference", "encode", "total"] {
        assert!(timing.contains(&format!("{stage};dur=")), "{stage}: {timing}");
    }
    assert!(reply.header("x-network-size").unwrap().starts_with("960x720 ("), "{}", reply.head);

    let photo = view.post("/photo", "application/octet-stream", bundled::PHOTO);
    let photo = image::load_from_memory(&photo.body).unwrap().into_rgb8();
    assert!(photo == image::load_from_memory(bundled::PHOTO).unwrap().into_rgb8());
}

#[test]
fn a_chunked_upload_gets_the_same_answer_as_one_of_known_length() {
    let view = View::start();
    let mut request = format!(
        "POST /segment HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: image/jpeg\r\n\
         Transfer-Encoding: chunked\r\n\r\n",
        view.address
    )
    .into_bytes();
    for chunk in bundled::PHOTO.chunks(10_000) {
        request.extend(format!("{:x}\r\n", chunk.len()).bytes());
        request.extend_from_slice(chunk);
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"0\r\n\r\n");
    let chunked = view.raw(&request);
    let whole = view.post("/segment", "image/jpeg", bundled::PHOTO);
    assert_eq!(chunked.status, 200);
    assert!(chunked.body == whole.body);
}

#[test]
fn the_page_is_served_under_a_policy_that_lets_nothing_in_from_elsewhere() {
    let view = View::start();
    for (path, media_type, words) in [
        ("/", "text/html; charset=utf-8", "<title>fpenet view</title>"),
        ("/view.css", "text/css; charset=utf-8", "#stage"),
        ("/view.js", "text/javascript; charset=utf-8", "\"use strict\""),
        ("/icon.svg", "image/svg+xml", "<svg"),
        ("/model.json", "application/json", "\"palette\""),
    ] {
        let reply = view.request("GET", path);
        assert_eq!((reply.status, reply.header("content-type")), (200, Some(media_type)), "{path}");
        let text = String::from_utf8(reply.body.clone()).unwrap();
        assert!(text.contains(words), "{path}");
        // The only address in any of the files is the name of SVG's format.
        let foreign = text.replace("http://www.w3.org/2000/svg", "");
        assert!(!foreign.contains("http://") && !foreign.contains("https://"), "{path}");
        let policy = reply.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));

        let head = view.request("HEAD", path);
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
        assert_eq!(head.header("content-length"), Some(text.len().to_string().as_str()));
    }
    let model: serde_json::Value =
        serde_json::from_slice(&view.request("GET", "/model.json").body).unwrap();
    assert_eq!(model["classes"].as_array().unwrap().len(), 11);
    assert_eq!(view.request("GET", "/example.jpg").body, bundled::PHOTO);
}

#[test]
fn no_path_leads_to_a_file_that_is_not_the_page_s() {
    let view = View::start();
    for path in [
        "/../Cargo.toml",
        "/..%2fCargo.toml",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/view.css/../../etc/passwd",
        "//etc/passwd",
        "/model.safetensors",
        "/assets/view/index.html",
        "/view.js%00.png",
        "/VIEW.JS",
    ] {
        view.request("GET", path).refuses(404, "no such page");
    }
}

#[test]
fn wrong_methods_and_types_get_their_own_codes() {
    let view = View::start();
    for path in ["/segment", "/photo"] {
        let reply = view.request("GET", path);
        reply.refuses(405, "expected POST");
        assert_eq!(reply.header("allow"), Some("POST"));
    }
    for method in ["POST", "DELETE", "PUT", "OPTIONS", "BREW"] {
        let reply = view.request(method, "/");
        reply.refuses(405, "expected GET, HEAD");
        assert_eq!(reply.header("allow"), Some("GET, HEAD"));
    }
    // What a form of another site could send without the browser asking first.
    for media_type in ["text/plain", "multipart/form-data; boundary=x", "text/html"] {
        view.post("/segment", media_type, bundled::PHOTO).refuses(415, media_type);
    }
    let head = format!("POST /segment HTTP/1.1\r\nHost: {}\r\n", view.address);
    view.raw(format!("{head}Connection: close\r\nContent-Length: 0\r\n\r\n").as_bytes())
        .refuses(415, "found \"none\"");
    assert_eq!(view.raw(b"\x16\x03\x01 this is TLS, not HTTP\r\n\r\n").status, 400);
}

#[test]
fn a_file_that_is_no_image_gets_the_error_of_the_command_line() {
    let view = View::start();
    let cut = &bundled::PHOTO[..bundled::PHOTO.len() / 2];
    let cases: [(&str, &[u8]); 4] =
        [("notes.jpg", b"not an image"), ("cut.jpg", cut), ("empty.png", b""), ("a b.jpg", b"BM")];
    for (name, bytes) in cases {
        let path = format!("/segment?name={}", name.replace(' ', "%20"));
        let reply = view.post(&path, "application/octet-stream", bytes);
        reply.refuses(422, &format!("{name}: expected a complete image"));
        let line = String::from_utf8(reply.body).unwrap();
        assert_eq!(view.segment(name, bytes), Err(format!("error: {line}")));
    }
    // Still there for the next.
    assert_eq!(view.post("/segment", "image/jpeg", bundled::PHOTO).status, 200);
}

#[test]
fn an_upload_that_is_too_large_is_refused_whether_it_says_so_or_not() {
    let view = View::start();
    let limit = fpenet::view::MAX_UPLOAD;
    // Announced, and sent: the client gets to read the answer nevertheless.
    let reply = view.post("/segment?name=big.tif", "image/tiff", &vec![0; limit + 1]);
    reply.refuses(413, "big.tif: expected a file of at most 64 MiB");
    // Announced by a client that waits for leave to send, as curl does: none is given.
    let head = view.post_head("/segment", "image/tiff", usize::MAX / 2);
    let head =
        head.replace("Connection: close\r\n", "Connection: close\r\nExpect: 100-continue\r\n");
    view.raw(head.as_bytes()).refuses(413, "at most 64 MiB");
    // Not announced.
    let mut stream = view.connect();
    let head = view.post_head("/segment", "image/tiff", 0);
    let (head, _) = head.split_once("Content-Length").unwrap();
    write!(stream, "{head}Transfer-Encoding: chunked\r\n\r\n").unwrap();
    let chunk = vec![0; 1 << 20];
    for _ in 0..=limit >> 20 {
        write!(stream, "{:x}\r\n", chunk.len()).unwrap();
        stream.write_all(&chunk).unwrap();
        stream.write_all(b"\r\n").unwrap();
    }
    stream.write_all(b"0\r\n\r\n").unwrap();
    answer(stream).refuses(413, "at most 64 MiB");
}

#[test]
fn other_hosts_and_other_origins_are_refused() {
    let view = View::start();
    let own = view.address;
    let get = |host: &str| {
        view.raw(format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())
    };
    assert_eq!(get(&own.to_string()).status, 200);
    assert_eq!(get(&format!("localhost:{}", own.port())).status, 200);
    for host in ["evil.example", &format!("evil.example:{}", own.port()), "127.0.0.1", ""] {
        get(host).refuses(403, "host: expected 127.0.0.1:");
    }
    view.raw(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").refuses(400, "Host");

    let head = view.post_head("/segment", "image/jpeg", bundled::PHOTO.len());
    let from = |origin: &str| {
        let head = head.replacen("\r\n", &format!("\r\nOrigin: {origin}\r\n"), 1);
        view.raw(&[head.as_bytes(), bundled::PHOTO].concat())
    };
    assert_eq!(from(&format!("http://{own}")).status, 200);
    from("https://evil.example").refuses(403, "origin");
    from("null").refuses(403, "origin");
}

#[test]
fn a_photo_too_many_is_told_to_come_back_and_the_others_are_answered() {
    let view = View::start();
    let head = view.post_head("/segment", "image/jpeg", bundled::PHOTO.len());
    let (first, rest) = bundled::PHOTO.split_at(1000);
    let mut waiting: Vec<TcpStream> = Vec::new();
    for _ in 0..fpenet::view::MAX_PHOTOS {
        let mut stream = view.connect();
        stream.write_all(&[head.as_bytes(), first].concat()).unwrap();
        waiting.push(stream);
    }
    // The server takes them up in an order of its own.
    let begun = Instant::now();
    let busy = loop {
        let reply = view.post("/segment?name=one-more.jpg", "image/jpeg", bundled::PHOTO);
        if reply.status != 200 || begun.elapsed() > Duration::from_secs(10) {
            break reply;
        }
    };
    busy.refuses(503, "one-more.jpg: busy with 4 other photos");
    assert_eq!(busy.header("retry-after"), Some("1"));
    assert_eq!(view.request("GET", "/").status, 200, "the page itself is always there");
    for mut stream in waiting {
        stream.write_all(rest).unwrap();
        assert_eq!(answer(stream).status, 200);
    }
}

#[test]
fn a_browser_that_goes_away_in_the_middle_leaves_the_server_as_it_was() {
    let view = View::start();
    let head = view.post_head("/segment", "image/jpeg", bundled::PHOTO.len());
    for sent in [0, 10, 100_000, bundled::PHOTO.len()].repeat(4) {
        let mut stream = view.connect();
        stream.write_all(&[head.as_bytes(), &bundled::PHOTO[..sent]].concat()).unwrap();
    }
    let begun = Instant::now();
    while view.post("/segment", "image/jpeg", bundled::PHOTO).status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(30), "slots of dead connections stay taken");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_server_at_once_and_with_success() {
    for signal in ["-INT", "-TERM"] {
        let view = View::start();
        // With a connection that is idle, as a browser keeps it.
        let mut idle = view.connect();
        write!(idle, "GET / HTTP/1.1\r\nHost: {}\r\n\r\n", view.address).unwrap();
        idle.read_exact(&mut [0; 100]).unwrap();
        let (code, rest, time) = view.signal(signal);
        assert_eq!((code, rest.as_str()), (Some(0), "stopped\n"));
        assert!(time < Duration::from_secs(4), "{time:?}");
    }
}

#[test]
fn addresses_beyond_this_machine_and_taken_ports_are_refused() {
    let view = |args: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fpenet"));
        let output = command.args(["view", "--device", "cpu"]).args(args).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for host in ["0.0.0.0", "::", "10.1.2.3", "example.com"] {
        let (code, words) = view(&["--host", host]);
        assert_eq!((code, words.lines().count()), (Some(2), 1), "{words}");
        assert!(words.contains("127.0.0.1"), "{words}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let (code, words) = view(&["--port", &port]);
    assert_eq!((code, words.lines().count()), (Some(1), 1), "{words}");
    assert!(words.contains(&port) && words.contains("another --port"), "{words}");
}
