//! The files of the page. They lie in `assets/view` and are part of the binary.

use hyper::body::Bytes;

use crate::bundled;

/// A file that the server hands out.
pub struct File {
    /// Its path in the address.
    pub path: &'static str,
    /// Media type.
    pub media_type: &'static str,
    /// Content.
    pub bytes: &'static [u8],
}

/// All of them: no other path exists, so none can lead out of a folder.
pub const FILES: [File; 5] = [
    File {
        path: "/",
        media_type: "text/html; charset=utf-8",
        bytes: include_str!("../../assets/view/index.html").as_bytes(),
    },
    File {
        path: "/view.css",
        media_type: "text/css; charset=utf-8",
        bytes: include_str!("../../assets/view/view.css").as_bytes(),
    },
    File {
        path: "/view.js",
        media_type: "text/javascript; charset=utf-8",
        bytes: include_str!("../../assets/view/view.js").as_bytes(),
    },
    File {
        path: "/icon.svg",
        media_type: "image/svg+xml",
        bytes: include_str!("../../assets/view/icon.svg").as_bytes(),
    },
    File { path: "/example.jpg", media_type: "image/jpeg", bytes: bundled::PHOTO },
];

/// The file of a path.
pub fn find(path: &str) -> Option<(Bytes, &'static str)> {
    let file = FILES.iter().find(|file| file.path == path)?;
    Some((Bytes::from_static(file.bytes), file.media_type))
}
