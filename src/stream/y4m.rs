//! YUV4MPEG2 (`.y4m`): what ffmpeg's `-f yuv4mpegpipe` writes and reads, 8 bits per sample.
//!
//! The format is a line of text (`YUV4MPEG2 W640 H480 F25:1 C420jpeg`), then for every frame a
//! line `FRAME` and the planes Y, Cb, Cr. It is read here by hand because the `y4m` crate (0.8)
//! takes an end of file within a frame for the end of the stream and multiplies the header's
//! width and height unchecked.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::graph::MAX_SIDE;

/// Longest header that is read; ffmpeg writes about 60 characters.
const MAX_LINE: u64 = 1024;
const MAGIC: &str = "YUV4MPEG2";
const EXPECTED: &str = "a YUV4MPEG2 stream (ffmpeg ... -pix_fmt yuv420p -f yuv4mpegpipe -)";

/// How the planes of colour relate to the plane of brightness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chroma {
    /// Brightness only (`Cmono`).
    Mono,
    /// Half width and height, samples centred between pixels both ways (`C420jpeg`, `C420`).
    C420Jpeg,
    /// Half width and height, samples on the left pixel, between the rows (`C420mpeg2`).
    C420Mpeg2,
    /// Half width and height, samples on the upper left pixel (`C420paldv`).
    C420Paldv,
    /// Half width, samples on the left pixel (`C422`).
    C422,
    /// Full size (`C444`).
    C444,
}

impl Chroma {
    const ALL: [Chroma; 6] = [
        Chroma::Mono,
        Chroma::C420Jpeg,
        Chroma::C420Mpeg2,
        Chroma::C420Paldv,
        Chroma::C422,
        Chroma::C444,
    ];

    /// The header's word for it, after the `C`.
    pub fn name(self) -> &'static str {
        match self {
            Chroma::Mono => "mono",
            Chroma::C420Jpeg => "420jpeg",
            Chroma::C420Mpeg2 => "420mpeg2",
            Chroma::C420Paldv => "420paldv",
            Chroma::C422 => "422",
            Chroma::C444 => "444",
        }
    }

    /// Width and height of a plane of colour for frames of the given size; none for `Mono`.
    pub fn plane(self, width: usize, height: usize) -> Option<(usize, usize)> {
        match self {
            Chroma::Mono => None,
            Chroma::C420Jpeg | Chroma::C420Mpeg2 | Chroma::C420Paldv => {
                Some((width.div_ceil(2), height.div_ceil(2)))
            }
            Chroma::C422 => Some((width.div_ceil(2), height)),
            Chroma::C444 => Some((width, height)),
        }
    }
}

/// Which values stand for black and white.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Range {
    /// Brightness from 16 to 235, colour from 16 to 240.
    Limited,
    /// 0 to 255.
    Full,
}

/// What the first line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Width in pixels, 1 to [`MAX_SIDE`].
    pub width: usize,
    /// Height in pixels, 1 to [`MAX_SIDE`].
    pub height: usize,
    /// Frames per second as a fraction; 0:0 where it is not known.
    pub fps: (u32, u32),
    /// Planes of colour.
    pub chroma: Chroma,
    /// Range, where the stream tells (`XCOLORRANGE`, an extension of ffmpeg's).
    pub range: Option<Range>,
}

impl Header {
    /// Bytes of the planes of one frame.
    pub fn frame_len(&self) -> usize {
        let colour = self.chroma.plane(self.width, self.height).map_or(0, |(w, h)| 2 * w * h);
        self.width * self.height + colour
    }

    /// Parses the line without its end, or tells what is wrong with it.
    fn parse(line: &str) -> Result<Header, String> {
        let mut words = line.split(' ').filter(|word| !word.is_empty());
        if words.next() != Some(MAGIC) {
            return Err(format!("other content; for raw frames say {RAW_REMEDY}"));
        }
        let (mut width, mut height, mut fps) = (None, None, (0, 0));
        let (mut chroma, mut range) = (Chroma::C420Jpeg, None);
        for word in words {
            let Some((tag, value)) = word.split_at_checked(1) else {
                return Err(format!("the word \"{}\" in its header", word.escape_debug()));
            };
            match tag {
                "W" => width = Some(side(word, value)?),
                "H" => height = Some(side(word, value)?),
                "F" => {
                    let parsed = value.split_once(':').map(|(a, b)| (a.parse(), b.parse()));
                    let Some((Ok(a), Ok(b))) = parsed else {
                        return Err(format!("the frame rate \"{}\"", value.escape_debug()));
                    };
                    fps = (a, b);
                }
                "C" => chroma = self::chroma(value)?,
                "X" => match value {
                    "COLORRANGE=FULL" => range = Some(Range::Full),
                    "COLORRANGE=LIMITED" => range = Some(Range::Limited),
                    _ => {}
                },
                // Interlacing and pixel aspect change nothing here; unknown tags are to be ignored.
                _ => {}
            }
        }
        match (width, height) {
            (Some(width), Some(height)) => Ok(Header { width, height, fps, chroma, range }),
            _ => Err("a header without width and height (W, H)".to_string()),
        }
    }
}

const RAW_REMEDY: &str = "--input-format rgb24 --size WxH";

fn side(word: &str, value: &str) -> Result<usize, String> {
    match value.parse() {
        Ok(side) if (1..=MAX_SIDE).contains(&side) => Ok(side),
        _ => Err(format!("\"{}\" where 1 to {MAX_SIDE} pixels are read", word.escape_debug())),
    }
}

fn chroma(value: &str) -> Result<Chroma, String> {
    let known = Chroma::ALL.into_iter().find(|chroma| chroma.name() == value);
    // ffmpeg reads the bare "420" like "420jpeg".
    let known = known.or((value == "420").then_some(Chroma::C420Jpeg));
    known.ok_or_else(|| {
        let names = Chroma::ALL.map(Chroma::name).join(", ");
        format!("the colour space \"{}\" (read are {names})", value.escape_debug())
    })
}

/// Reads frames one by one.
pub struct Reader<R> {
    input: BufReader<R>,
    header: Header,
    origin: PathBuf,
    /// Whole frames read so far.
    frames: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the header; `origin` names the input in messages.
    ///
    /// # Errors
    /// [`Error::Format`] for anything but the header of an 8-bit stream, [`Error::Io`] where the
    /// input cannot be read.
    pub fn new(input: R, origin: &Path) -> Result<Self> {
        let mut input = BufReader::with_capacity(1 << 16, input);
        let wrong = |found: String| Error::format(origin, EXPECTED, found);
        let header = match line(&mut input).map_err(|e| Error::io("cannot read", origin, e))? {
            Line::Whole(text) => Header::parse(&text).map_err(wrong)?,
            Line::End => return Err(wrong("an empty input".into())),
            Line::Cut => return Err(wrong("a header that is cut short".into())),
            Line::Other => {
                return Err(wrong(format!("other content; for raw frames say {RAW_REMEDY}")));
            }
        };
        Ok(Reader { input, header, origin: origin.to_path_buf(), frames: 0 })
    }

    /// What the first line said.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Reads the planes of the next frame, Y, Cb, Cr one after another, in place of what `planes`
    /// held; false at the end of the stream. Memory grows with the bytes that come, not with what
    /// the header promises.
    ///
    /// # Errors
    /// [`Error::Format`] for an end within a frame or content that is no frame, [`Error::Io`].
    pub fn read_frame(&mut self, planes: &mut Vec<u8>) -> Result<bool> {
        let unreadable = |e| Error::io("cannot read", &self.origin, e);
        let number = self.frames + 1;
        match line(&mut self.input).map_err(unreadable)? {
            Line::Whole(text) if text == "FRAME" || text.starts_with("FRAME ") => {}
            Line::End => return Ok(false),
            Line::Cut => return Err(self.wrong("a cut-off frame header".to_string())),
            Line::Whole(_) | Line::Other => {
                let expected = format!("\"FRAME\" at the start of frame {number}");
                return Err(Error::format(&self.origin, expected, "other content"));
            }
        }
        let length = self.header.frame_len();
        planes.clear();
        let found =
            self.input.by_ref().take(length as u64).read_to_end(planes).map_err(unreadable)?;
        if found < length {
            return Err(self.wrong(format!("{found} of {length} bytes")));
        }
        self.frames = number;
        Ok(true)
    }

    fn wrong(&self, found: String) -> Error {
        let number = self.frames + 1;
        Error::format(&self.origin, "whole frames to the end", format!("frame {number}: {found}"))
    }
}

enum Line {
    /// Without its end.
    Whole(String),
    /// The input ends here.
    End,
    /// The input ends within the line.
    Cut,
    /// Too long, or no text.
    Other,
}

fn line(input: &mut impl BufRead) -> io::Result<Line> {
    let mut bytes = Vec::new();
    input.take(MAX_LINE).read_until(b'\n', &mut bytes)?;
    Ok(match bytes.pop() {
        None => Line::End,
        Some(b'\n') => String::from_utf8(bytes).map_or(Line::Other, Line::Whole),
        Some(_) if bytes.len() as u64 + 1 == MAX_LINE => Line::Other,
        Some(_) => Line::Cut,
    })
}

/// Writes a stream's header.
///
/// # Errors
/// What the output says.
pub fn write_header(output: &mut impl Write, header: &Header) -> io::Result<()> {
    let Header { width, height, fps: (num, den), chroma, range } = header;
    let range = match range {
        Some(Range::Full) => " XCOLORRANGE=FULL",
        Some(Range::Limited) => " XCOLORRANGE=LIMITED",
        None => "",
    };
    writeln!(output, "{MAGIC} W{width} H{height} F{num}:{den} Ip A1:1 C{}{range}", chroma.name())
}

/// Writes a frame whose planes stand one after another.
///
/// # Errors
/// What the output says.
pub fn write_frame(output: &mut impl Write, planes: &[u8]) -> io::Result<()> {
    output.write_all(b"FRAME\n")?;
    output.write_all(planes)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Frames = Vec<Vec<u8>>;

    /// The whole stream; an error with the number of frames before it.
    fn read(bytes: &[u8]) -> Result<(Header, Frames), (usize, String)> {
        let at = |frames: &Frames, e: Error| (frames.len(), e.to_string());
        let mut frames = Vec::new();
        let mut reader = Reader::new(bytes, Path::new("in.y4m")).map_err(|e| at(&frames, e))?;
        loop {
            let mut planes = Vec::new();
            match reader.read_frame(&mut planes) {
                Ok(true) => frames.push(planes),
                Ok(false) => return Ok((*reader.header(), frames)),
                Err(e) => return Err(at(&frames, e)),
            }
        }
    }

    /// A stream of two 5x3 frames.
    fn stream(chroma: Chroma) -> (Header, Frames, Vec<u8>) {
        let range = Some(Range::Limited);
        let header = Header { width: 5, height: 3, fps: (30000, 1001), chroma, range };
        let frame = |start: u8| (0..header.frame_len() as u8).map(|i| start + i).collect();
        let frames: Frames = vec![frame(0), frame(100)];
        let mut bytes = Vec::new();
        write_header(&mut bytes, &header).unwrap();
        frames.iter().for_each(|frame| write_frame(&mut bytes, frame).unwrap());
        (header, frames, bytes)
    }

    #[test]
    fn what_is_written_is_read_back_in_every_layout() {
        let lengths = [15, 15 + 2 * 6, 15 + 2 * 6, 15 + 2 * 6, 15 + 2 * 9, 45];
        for (chroma, length) in Chroma::ALL.into_iter().zip(lengths) {
            let (header, frames, bytes) = stream(chroma);
            assert_eq!(header.frame_len(), length, "{chroma:?}");
            assert_eq!(read(&bytes).unwrap(), (header, frames));
        }
    }

    #[test]
    fn every_cut_is_an_error_after_the_whole_frames() {
        let (header, _, bytes) = stream(Chroma::C420Jpeg);
        let frame = header.frame_len() + "FRAME\n".len();
        let start = bytes.len() - 2 * frame;
        for keep in 0..bytes.len() {
            let whole = keep.saturating_sub(start) / frame;
            match read(&bytes[..keep]) {
                Ok((_, frames)) => {
                    assert!(keep >= start && (keep - start).is_multiple_of(frame), "cut at {keep}");
                    assert_eq!(frames.len(), whole);
                }
                Err((frames, message)) => {
                    assert_eq!(frames, whole, "{message}");
                    assert!(message.starts_with("in.y4m: expected "), "{message}");
                }
            }
        }
    }

    #[test]
    fn headers_of_other_programs_are_understood() {
        let header = |line: &str| Header::parse(line).unwrap();
        let ffmpeg = header("YUV4MPEG2 W640 H360 F25:1 Ip A1:1 C420mpeg2 XYSCSS=420MPEG2");
        assert_eq!((ffmpeg.width, ffmpeg.height, ffmpeg.fps), (640, 360, (25, 1)));
        assert_eq!((ffmpeg.chroma, ffmpeg.range), (Chroma::C420Mpeg2, None));
        assert_eq!(header("YUV4MPEG2 W2 H2").chroma, Chroma::C420Jpeg);
        let full = header("YUV4MPEG2 H7 W9 C444 XCOLORRANGE=FULL");
        assert_eq!((full.chroma, full.range), (Chroma::C444, Some(Range::Full)));
        let (_, frames) = read(b"YUV4MPEG2 W1 H1 Cmono\nFRAME Ixyz\nA").unwrap();
        assert_eq!(frames, [b"A"]);
    }

    #[test]
    fn other_content_is_refused_with_a_reason() {
        let long = [b"YUV4MPEG2 W4 H4 X".as_slice(), &[b'a'; 2000]].concat();
        let huge = b"YUV4MPEG2 W99999999999999999999 H1\n";
        let cases: [(&[u8], &str); 12] = [
            (b"", "an empty input"),
            (b"RIFF....AVI \n", "other content; for raw frames say --input-format rgb24"),
            (&[0; 4000], "other content"),
            (&long, "other content"),
            (b"YUV4MPEG2 W4", "cut short"),
            (b"YUV4MPEG2 W4\n", "without width and height"),
            (b"YUV4MPEG2 W0 H4\n", "\"W0\""),
            (huge, "where 1 to 32768 pixels are read"),
            (b"YUV4MPEG2 W4 H-4\n", "\"H-4\""),
            (b"YUV4MPEG2 W4 H4 F25\n", "the frame rate \"25\""),
            (b"YUV4MPEG2 W4 H4 C420p10\n", "the colour space \"420p10\" (read are mono, 420jpeg"),
            (
                b"YUV4MPEG2 W1 H1 Cmono\nFRAME\nAFRAMES\nA",
                "expected \"FRAME\" at the start of frame 2",
            ),
        ];
        for (bytes, expected) in cases {
            let (_, message) = read(bytes).unwrap_err();
            assert!(message.contains(expected), "{expected}: {message}");
            assert!(message.starts_with("in.y4m: ") && !message.contains('\n'), "{message}");
        }
        // A header that promises 3 GiB does not get them.
        let (_, message) = read(b"YUV4MPEG2 W32768 H32768 C444\nFRAME\nabc").unwrap_err();
        assert!(message.contains("frame 1: 3 of 3221225472 bytes"), "{message}");
    }
}
