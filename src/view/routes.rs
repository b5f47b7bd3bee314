//! What is answered to which request.
//!
//! | request | answer |
//! | --- | --- |
//! | `GET /` and the page's files | the file |
//! | `GET /model.json` | classes, palette, model and device in words, limits |
//! | `POST /segment?name=FILE`, the photo's bytes as body | its label map as PNG, as `fpenet segment` writes it; stages in `Server-Timing`, the network's size in `X-Network-Size` |
//! | `POST /photo?name=FILE`, likewise | the photo, upright, as PNG |
//!
//! An error is one line of text.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::json;
use tokio::sync::Semaphore;

use super::guard::{self, Refusal};
use super::worker::{Done, Job, Queue, Task, Worker};
use super::{MAX_PHOTOS, MAX_UPLOAD, page};
use crate::error::Error;
use crate::model::Model;

/// For the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
/// For reading on after a refusal, so that the client gets to see the answer: a connection that
/// is closed while it still sends reports a reset instead.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest file name that messages repeat, in characters.
const MAX_NAME: usize = 120;
const NETWORK_SIZE: HeaderName = HeaderName::from_static("x-network-size");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// Nothing but the page's own files runs, and nothing else is fetched, framed or sent anywhere.
const SECURITY: [(HeaderName, &str); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; \
         connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (header::CACHE_CONTROL, "no-store"),
];

/// What all requests share.
pub struct Shared {
    address: SocketAddr,
    model: Bytes,
    queue: Queue,
    slots: Arc<Semaphore>,
}

impl Shared {
    /// State of a server at `address`.
    pub fn new(address: SocketAddr, model: &Model, worker: &Worker) -> Self {
        let (kind, device) = worker.device();
        let text = json!({
            "classes": model.classes,
            "palette": model.palette,
            "parameters": model.params.trainable_count(),
            "train_size": model.train_size,
            "device": format!("{kind}: {device}"),
            "version": env!("CARGO_PKG_VERSION"),
            "max_upload_bytes": MAX_UPLOAD,
        });
        Shared {
            address,
            model: Bytes::from(text.to_string()),
            queue: worker.queue(),
            slots: Arc::new(Semaphore::new(MAX_PHOTOS)),
        }
    }
}

type Reply = Response<Full<Bytes>>;

/// Answers a request; every failure is an answer too.
pub async fn respond(shared: &Shared, request: Request<Incoming>) -> Reply {
    let mut reply = route(shared, request).await.unwrap_or_else(|(status, line)| {
        let mut reply = file(Bytes::from(line + "\n"), "text/plain; charset=utf-8");
        *reply.status_mut() = status;
        if status == StatusCode::SERVICE_UNAVAILABLE {
            reply.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        reply
    });
    for (name, value) in SECURITY {
        reply.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    reply
}

async fn route(shared: &Shared, request: Request<Incoming>) -> Result<Reply, Refusal> {
    guard::check(request.uri(), request.headers(), shared.address)?;
    let task = match request.uri().path() {
        "/segment" => Some(Task::Labels),
        "/photo" => Some(Task::Photo),
        _ => None,
    };
    if let Some(task) = task {
        return match *request.method() {
            Method::POST => photo(shared, task, request).await,
            _ => Ok(wrong_method("POST")),
        };
    }
    let found = match request.uri().path() {
        "/model.json" => Some((shared.model.clone(), "application/json")),
        path => page::find(path),
    };
    match (found, request.method()) {
        (Some((bytes, media_type)), &Method::GET | &Method::HEAD) => Ok(file(bytes, media_type)),
        (Some(_), _) => Ok(wrong_method("GET, HEAD")),
        (None, _) => Err((StatusCode::NOT_FOUND, "no such page; the start is at /".into())),
    }
}

fn file(bytes: Bytes, media_type: &'static str) -> Reply {
    let mut reply = Response::new(Full::new(bytes));
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    reply
}

fn wrong_method(allowed: &'static str) -> Reply {
    let line = format!("wrong method: expected {allowed}\n");
    let mut reply = file(Bytes::from(line), "text/plain; charset=utf-8");
    *reply.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    reply.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
    reply
}

async fn photo(shared: &Shared, task: Task, request: Request<Incoming>) -> Result<Reply, Refusal> {
    let start = Instant::now();
    check_media_type(request.headers())?;
    let name = file_name(request.uri().query());
    let Ok(slot) = shared.slots.clone().try_acquire_owned() else {
        let line = format!("{name}: busy with {MAX_PHOTOS} other photos; send it again later");
        return Err((StatusCode::SERVICE_UNAVAILABLE, line));
    };
    let bytes = upload(request, &name).await?;
    let upload = start.elapsed();
    let done = shared.queue.run(Job { task, bytes, name, slot }).await.map_err(|error| {
        let status = match error {
            Error::Format { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, error.to_string())
    })?;
    Ok(picture(done, upload, start.elapsed()))
}

fn picture(done: Done, upload: Duration, total: Duration) -> Reply {
    let mut reply = file(Bytes::from(done.png), "image/png");
    let mut stages = vec![("upload", upload)];
    stages.extend(done.stages);
    stages.push(("total", total));
    let ms =
        |(name, time): &(&str, Duration)| format!("{name};dur={:.3}", time.as_secs_f64() * 1e3);
    let timing = stages.iter().map(ms).collect::<Vec<_>>().join(", ");
    let network = done.network.map(|network| network.to_string());
    for (name, value) in [(SERVER_TIMING, Some(timing)), (NETWORK_SIZE, network)] {
        if let Some(value) = value.and_then(|text| HeaderValue::try_from(text).ok()) {
            reply.headers_mut().insert(name, value);
        }
    }
    reply
}

/// Types that a form of another site can send without asking first are refused with the rest.
fn check_media_type(headers: &HeaderMap) -> Result<(), Refusal> {
    let found = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("none");
    let known = found.starts_with("image/") || found.starts_with("application/octet-stream");
    let line = format!(
        "Content-Type: expected image/* or application/octet-stream with the photo's bytes as \
         body, found {found:?}"
    );
    if known { Ok(()) } else { Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, line)) }
}

/// The file name in the query, for messages only.
fn file_name(query: Option<&str>) -> String {
    let mut pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    let name = pairs.find(|(key, _)| key == "name").map(|(_, name)| name).unwrap_or_default();
    let kept: String = name.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect();
    if kept.trim().is_empty() { "photo".into() } else { kept }
}

/// The whole body, of at most [`MAX_UPLOAD`] bytes.
async fn upload(request: Request<Incoming>, name: &str) -> Result<Bytes, Refusal> {
    // A client that asks before it sends has sent nothing yet.
    let asks_first = request.headers().contains_key(header::EXPECT);
    let mut body = request.into_body();
    let announced = body.size_hint().lower();
    if announced > MAX_UPLOAD as u64 {
        if !asks_first {
            discard(body).await;
        }
        return Err(too_large(name, announced));
    }
    let read = async {
        let mut bytes = Vec::with_capacity(announced as usize);
        while let Some(frame) = body.frame().await {
            let cut = |_| {
                let line = format!("{name}: the upload ended after {} bytes", bytes.len());
                (StatusCode::BAD_REQUEST, line)
            };
            let Ok(data) = frame.map_err(cut)?.into_data() else { continue };
            let total = bytes.len() + data.len();
            if total > MAX_UPLOAD {
                discard(body).await;
                return Err(too_large(name, total as u64));
            }
            bytes.extend_from_slice(&data);
        }
        Ok(Bytes::from(bytes))
    };
    let late = || {
        let line = format!("{name}: the upload took more than {} s", BODY_TIMEOUT.as_secs());
        (StatusCode::REQUEST_TIMEOUT, line)
    };
    tokio::time::timeout(BODY_TIMEOUT, read).await.map_err(|_| late())?
}

fn too_large(name: &str, bytes: u64) -> Refusal {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let line = format!(
        "{name}: expected a file of at most {:.0} MiB, found {:.1} MiB or more",
        mib(MAX_UPLOAD as u64),
        mib(bytes)
    );
    (StatusCode::PAYLOAD_TOO_LARGE, line)
}

async fn discard(mut body: Incoming) {
    let all = async { while body.frame().await.is_some_and(|frame| frame.is_ok()) {} };
    let _ = tokio::time::timeout(DISCARD_TIMEOUT, all).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_decoded_and_stay_on_one_line() {
        assert_eq!(file_name(Some("name=my%20street%C3%A9.jpg&x=1")), "my street\u{e9}.jpg");
        assert_eq!(file_name(Some("name=a%0Ab%0D%00c")), "abc");
        assert_eq!(file_name(Some("name=%20")), "photo");
        assert_eq!(file_name(None), "photo");
        assert_eq!(file_name(Some(&format!("name={}", "x".repeat(5000)))).len(), MAX_NAME);
    }
}
