//! Who may ask: the page itself, and programs on this machine; no page of another site.
//!
//! A server on loopback is reachable by every web page that the browser has open. The browser
//! names the site that a page believes to talk to in `Host` (another name there means DNS
//! rebinding), and the site that a page comes from in `Origin`.

use std::net::SocketAddr;

use hyper::header::{HOST, HeaderMap, HeaderName, ORIGIN};
use hyper::{StatusCode, Uri};

/// Why a request is refused: status and one line.
pub type Refusal = (StatusCode, String);

/// Checks that a request is meant for the server at `own` and does not come from elsewhere.
///
/// # Errors
/// 400 for no host or several, 403 for another host or origin.
pub fn check(uri: &Uri, headers: &HeaderMap, own: SocketAddr) -> Result<(), Refusal> {
    let wrong = |what: &str, found: &str| {
        let expected = names(own).join(" or ");
        (StatusCode::FORBIDDEN, format!("{what}: expected {expected}, found {found:?}"))
    };
    let mut hosts = headers.get_all(HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (Some(host), None) => host.to_str().unwrap_or_default(),
        _ => return Err((StatusCode::BAD_REQUEST, "expected one Host header".into())),
    };
    if !names(own).iter().any(|name| name.eq_ignore_ascii_case(host)) {
        return Err(wrong("host", host));
    }
    // A request line may hold a whole address, which then counts instead of the header.
    if let Some(authority) = uri.authority()
        && !authority.as_str().eq_ignore_ascii_case(host)
    {
        return Err(wrong("host", authority.as_str()));
    }
    if let Some(origin) = text(headers, &ORIGIN)
        && !names(own).iter().any(|name| origin.eq_ignore_ascii_case(&format!("http://{name}")))
    {
        return Err(wrong("origin", origin));
    }
    Ok(())
}

/// A header's value; what is not text reads as nothing that could be meant.
fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).map(|value| value.to_str().unwrap_or_default())
}

/// What the server is called: its address, and localhost.
fn names(own: SocketAddr) -> [String; 2] {
    [own.to_string(), format!("localhost:{}", own.port())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(uri: &str, headers: &[(HeaderName, &str)]) -> Result<(), StatusCode> {
        let headers =
            headers.iter().map(|(name, value)| (name.clone(), value.parse().unwrap())).collect();
        let own = "127.0.0.1:8010".parse().unwrap();
        check(&uri.parse().unwrap(), &headers, own).map_err(|(status, _)| status)
    }

    #[test]
    fn the_page_and_local_programs_pass() {
        for host in ["127.0.0.1:8010", "localhost:8010", "LocalHost:8010"] {
            assert_eq!(request("/", &[(HOST, host)]), Ok(()), "{host}");
        }
        let own = [(HOST, "localhost:8010"), (ORIGIN, "http://localhost:8010")];
        assert_eq!(request("/segment", &own), Ok(()));
        assert_eq!(request("http://localhost:8010/", &own), Ok(()));
    }

    #[test]
    fn other_names_and_other_origins_are_refused() {
        let forbidden = Err(StatusCode::FORBIDDEN);
        let hosts =
            ["evil.example", "evil.example:8010", "127.0.0.1", "127.0.0.1:80", "localhost.:8010"];
        for host in hosts {
            assert_eq!(request("/", &[(HOST, host)]), forbidden, "{host}");
        }
        let host = (HOST, "127.0.0.1:8010");
        for origin in ["http://evil.example", "https://127.0.0.1:8010", "null", ""] {
            assert_eq!(request("/", &[host.clone(), (ORIGIN, origin)]), forbidden, "{origin}");
        }
        assert_eq!(request("http://evil.example/", std::slice::from_ref(&host)), forbidden);
        assert_eq!(request("/", &[]), Err(StatusCode::BAD_REQUEST));
        assert_eq!(request("/", &[host.clone(), host]), Err(StatusCode::BAD_REQUEST));
    }
}
