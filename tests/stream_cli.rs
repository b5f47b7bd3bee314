//! `fpenet stream` as a user runs it: pipes, files and folders in, frames out.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use fpenet::stream::y4m::Reader;
use fpenet::{Model, ModelConfig};

const WIDTH: usize = 32;
const HEIGHT: usize = 24;
const PIXELS: usize = WIDTH * HEIGHT;

/// A folder with a tiny model.
struct Workplace {
    folder: tempfile::TempDir,
    model: Model,
}

impl Workplace {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = ModelConfig { classes: 5, p: 1, q: 1, ..Default::default() };
        let model = Model::init(config, 3).unwrap();
        model.save(&folder.path().join("m.safetensors")).unwrap();
        Workplace { folder, model }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fpenet"));
        command.current_dir(self.folder.path());
        command.args(["stream", "--device", "cpu", "--model", "m.safetensors"]).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn stream(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self.command(args).spawn().unwrap();
        feed(&mut child, input.to_vec());
        child.wait_with_output().unwrap()
    }

    /// Runs with `--quiet`, which leaves stderr to errors.
    #[track_caller]
    fn frames(&self, args: &[&str], input: &[u8]) -> Vec<u8> {
        let output = self.stream(&[args, &["--quiet"]].concat(), input);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        assert_eq!(stderr, "");
        output.stdout
    }

    #[track_caller]
    fn refused(&self, args: &[&str], input: &[u8], code: i32, words: &[&str]) -> Vec<u8> {
        let output = self.stream(&[args, &["--quiet"]].concat(), input);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        for word in words {
            assert!(stderr.contains(word), "{word}: {stderr}");
        }
        output.stdout
    }
}

/// Writes from a thread of its own; the child may end before it has read everything.
fn feed(child: &mut Child, input: Vec<u8>) {
    let mut stdin = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        let _ = stdin.write_all(&input);
    });
}

/// Frame `number` of a film of moving stripes, rgb24.
fn rgb(number: usize) -> Vec<u8> {
    let pixel = |i: usize| {
        let (x, y) = (i % WIDTH, i / WIDTH);
        [(8 * x + 5 * number) as u8, (10 * y) as u8, (40 * (x / 8) + 90 * (y / 12)) as u8]
    };
    (0..PIXELS).flat_map(pixel).collect()
}

fn film(frames: usize) -> Vec<u8> {
    (0..frames).flat_map(rgb).collect()
}

const RAW: [&str; 4] = ["--input-format", "rgb24", "--size", "32x24"];

#[test]
fn raw_frames_become_labels_colours_and_overlays() {
    let place = Workplace::new();
    let raw = |show| [&RAW[..], &["--output-format", "raw", "--show", show]].concat();
    let labels = place.frames(&raw("labels"), &film(6));
    assert_eq!(labels.len(), 6 * PIXELS);
    assert!(labels.iter().all(|&label| label < 5));
    assert!(labels.windows(2).any(|pair| pair[0] != pair[1]), "one class everywhere");

    let colours = place.frames(&raw("colour"), &film(6));
    let expected: Vec<u8> =
        labels.iter().flat_map(|&label| place.model.palette[usize::from(label)]).collect();
    assert_eq!(colours, expected);

    let overlay = place.frames(&raw("overlay"), &film(6));
    let mixed = film(6)
        .iter()
        .zip(&colours)
        .map(|(a, b)| ((f32::from(*a) + f32::from(*b)) / 2.0).round() as u8)
        .collect::<Vec<_>>();
    assert_eq!(overlay, mixed);
}

#[test]
fn a_folder_gives_what_its_pictures_give_in_a_pipe() {
    let place = Workplace::new();
    std::fs::create_dir(place.at("frames")).unwrap();
    for number in 0..4 {
        let picture = image::RgbImage::from_raw(WIDTH as u32, HEIGHT as u32, rgb(number)).unwrap();
        picture.save(place.at(&format!("frames/{number:03}.png"))).unwrap();
    }
    let output = ["--output-format", "raw", "--show", "labels"];
    let piped = place.frames(&[&RAW[..], &output].concat(), &film(4));
    assert_eq!(place.frames(&[&["--input", "frames"], &output[..]].concat(), &[]), piped);
    std::fs::write(place.at("film.rgb"), film(4)).unwrap();
    let file = [&RAW[..], &["--input", "film.rgb"], &output].concat();
    assert_eq!(place.frames(&file, &[]), piped);

    // A picture of another size, and one that is none: an error after the frames before it.
    image::RgbImage::new(20, 20).save(place.at("frames/004.png")).unwrap();
    let args = [&["--input", "frames"], &output[..]].concat();
    let words = ["004.png", "expected 32x24 pixels", "found 20x20"];
    assert_eq!(place.refused(&args, &[], 1, &words), piped);
    std::fs::write(place.at("frames/004.png"), "no picture").unwrap();
    assert_eq!(place.refused(&args, &[], 1, &["004.png"]), piped);
}

/// A YUV4MPEG2 stream whose planes hold grey values.
fn y4m(chroma: &str, length: usize, frames: usize) -> Vec<u8> {
    let mut bytes = format!("YUV4MPEG2 W32 H24 F30000:1001 {chroma}\n").into_bytes();
    for number in 0..frames {
        bytes.extend(b"FRAME\n");
        bytes.extend(
            (0..length).map(|i| if i < PIXELS { (i * 3 + number * 20) as u8 } else { 128 }),
        );
    }
    bytes
}

#[test]
fn y4m_comes_in_every_layout_and_goes_out_with_its_size_and_rate() {
    let place = Workplace::new();
    let quarter = 2 * (WIDTH / 2) * (HEIGHT / 2);
    let layouts = [
        ("C420jpeg", PIXELS + quarter),
        ("C420mpeg2", PIXELS + quarter),
        ("C420paldv", PIXELS + quarter),
        ("C422", PIXELS + 2 * quarter),
        ("C444", 3 * PIXELS),
        ("Cmono", PIXELS),
        ("", PIXELS + quarter),
    ];
    let mut labels = Vec::new();
    for (chroma, length) in layouts {
        let out = place.frames(&["--show", "labels"], &y4m(chroma, length, 3));
        let mut reader = Reader::new(out.as_slice(), Path::new("out")).unwrap();
        let header = *reader.header();
        assert_eq!((header.width, header.height, header.fps), (WIDTH, HEIGHT, (30000, 1001)));
        assert_eq!(header.chroma.name(), "mono");
        let (mut frames, mut plane) = (Vec::new(), Vec::new());
        while reader.read_frame(&mut plane).unwrap() {
            frames.push(plane.clone());
        }
        assert_eq!(frames.len(), 3);
        labels.push(frames);
    }
    // Without colour every layout says the same.
    assert!(labels.iter().all(|frames| *frames == labels[0]));

    let out = place.frames(&[], &y4m("Cmono", PIXELS, 2));
    let first = out.split(|b| *b == b'\n').next().unwrap();
    let expected = "YUV4MPEG2 W32 H24 F30000:1001 Ip A1:1 C444 XCOLORRANGE=LIMITED";
    assert_eq!(String::from_utf8_lossy(first), expected);
    assert_eq!(out.len(), expected.len() + 1 + 2 * ("FRAME\n".len() + 3 * PIXELS));
}

#[test]
fn a_cut_off_last_frame_is_an_error_after_the_whole_ones() {
    let place = Workplace::new();
    let output = ["--output-format", "raw", "--show", "labels"];
    let raw = [&RAW[..], &output].concat();
    let film = film(5);
    let words = ["standard input: expected whole frames", "frame 5: 2304 of 2304 bytes"];
    let cut = &film[..film.len() - 1];
    let out = place.refused(&raw, cut, 1, &[words[0], "frame 5: 2303 of 2304 bytes"]);
    assert_eq!(out, place.frames(&raw, &film[..4 * 3 * PIXELS]));
    assert_eq!(out.len(), 4 * PIXELS);

    let film = y4m("Cmono", PIXELS, 5);
    let cut = &film[..film.len() - 100];
    let out = place.refused(&output, cut, 1, &[words[0], "frame 5: 668 of 768 bytes"]);
    assert_eq!(out.len(), 4 * PIXELS);
}

#[test]
fn wrong_requests_and_empty_inputs_are_refused() {
    let place = Workplace::new();
    std::fs::create_dir(place.at("empty")).unwrap();
    place.refused(&[], b"", 1, &["standard input: expected a YUV4MPEG2 stream", "an empty input"]);
    place.refused(&[], &film(1), 1, &["for raw frames say --input-format rgb24 --size WxH"]);
    place.refused(&RAW, b"", 1, &["standard input: expected at least one frame"]);
    place.refused(&["--input-format", "rgb24"], b"", 2, &["expected --size WxH"]);
    place.refused(&["--size", "32x24"], b"", 2, &["--network-size"]);
    place.refused(&["--input", "none.y4m"], b"", 1, &["none.y4m: cannot read"]);
    place.refused(&["--input", "empty"], b"", 1, &["empty: expected a folder with images"]);
    place.refused(&["--input", "empty", "--size", "32x24"], b"", 2, &["its pictures tell"]);
    place.refused(&["--input", "empty", "--range", "full"], b"", 2, &["--range: expected with"]);
    let matrix = [&RAW[..], &["--matrix", "bt709", "--output-format", "raw"]].concat();
    place.refused(&matrix, b"", 2, &["--matrix: expected with"]);
    let labels = [&RAW[..], &["--matrix", "bt709", "--show", "labels"]].concat();
    place.refused(&labels, b"", 2, &["--matrix: expected with"]);
    let rate = ["--fps", "10", "--output-format", "raw"];
    place.refused(&rate, b"", 2, &["--fps: expected with --output-format y4m only"]);
    let header = b"YUV4MPEG2 W32 H24 C420p10\n";
    place.refused(&[], header, 1, &["the colour space \"420p10\"", "-pix_fmt yuv420p"]);
}

#[test]
fn the_last_line_on_stderr_tells_frames_rate_latency_and_drops() {
    let place = Workplace::new();
    let output = place.stream(&[&RAW[..], &["--show", "labels"]].concat(), &film(20));
    let stderr = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{stderr}");
    assert!(
        lines[0].starts_with("standard input: rgb24, frames 32x24, network the same, cpu: "),
        "{stderr}"
    );
    assert!(lines[1].starts_with("20 frames, "), "{stderr}");
    for word in [" fps, latency ", " ms (p99 ", " ms), 0 dropped"] {
        assert!(lines[1].contains(word), "{stderr}");
    }
}

#[test]
fn a_closed_output_ends_the_stream_without_an_error() {
    let place = Workplace::new();
    let args = [&RAW[..], &["--output-format", "raw", "--quiet"]].concat();
    let mut child = place.command(&args).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    // One frame is taken, then nobody reads; the input stays open until the stream has ended.
    stdin.write_all(&rgb(0)).unwrap();
    let mut first = vec![0; 3 * PIXELS];
    stdout.read_exact(&mut first).unwrap();
    drop(stdout);
    while stdin.write_all(&rgb(1)).is_ok() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn an_output_closed_before_the_first_frame_is_no_empty_input() {
    let place = Workplace::new();
    let args = [&RAW[..], &["--output-format", "raw", "--quiet"]].concat();
    let mut child = place.command(&args).spawn().unwrap();
    drop(child.stdout.take().unwrap());
    child.stdin.take().unwrap().write_all(&rgb(0)).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

#[test]
fn drop_frames_keeps_a_live_source_going() {
    let place = Workplace::new();
    let args = [&RAW[..], &["--output-format", "raw", "--show", "labels", "--drop"]].concat();
    let mut child = place.command(&args).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // Nobody reads the output meanwhile: without --drop the pipes would fill up and this write
    // would never end. The output's pipe holds 64 KiB, 85 label frames.
    let frames = 2000;
    stdin.write_all(&film(50).repeat(frames / 50)).unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    let written = output.stdout.len() / PIXELS;
    let last = stderr.lines().last().unwrap();
    assert!(last.starts_with(&format!("{written} frames")), "{last}");
    assert!(last.ends_with(&format!("{} dropped", frames - written)), "{last}");
    assert!(written < frames, "nothing was dropped");
}

/// KiB of `key` (VmRSS, VmHWM) of a process.
#[cfg(target_os = "linux")]
fn memory(process: u32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn ten_thousand_frames_take_no_more_memory_than_a_thousand() {
    const FRAMES: usize = 10_000;
    let place = Workplace::new();
    let args = [&RAW[..], &["--output-format", "raw", "--quiet", "--threads", "1"]].concat();
    let mut child = place.command(&args).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    std::thread::spawn(move || {
        let film = film(50);
        for _ in 0..FRAMES / 50 {
            stdin.write_all(&film).unwrap();
        }
    });
    let mut frame = vec![0; 3 * PIXELS];
    let mut early = 0;
    for number in 0..FRAMES {
        stdout.read_exact(&mut frame).unwrap();
        if number == 1000 {
            early = memory(child.id(), "VmHWM");
        }
        if number == FRAMES - 100 {
            // A frame's buffers take 16 KB: a leak of a tenth of one a frame would show here.
            let (late, resident) = (memory(child.id(), "VmHWM"), memory(child.id(), "VmRSS"));
            assert!(late <= early + 1024, "{early} KiB, then {late} KiB ({resident} KiB now)");
        }
    }
    assert_eq!(stdout.read(&mut frame).unwrap(), 0);
    assert!(child.wait().unwrap().success());
}

/// Runs a shell pipeline of ffmpeg and this binary; none where there is no ffmpeg.
fn with_ffmpeg(place: &Workplace, pipeline: &str) -> Option<Output> {
    if Command::new("ffmpeg").arg("-version").output().is_err() {
        eprintln!("skipped: ffmpeg is not installed (apt-get install ffmpeg)");
        return None;
    }
    let mut command = Command::new("bash");
    command.current_dir(place.folder.path()).args(["-o", "pipefail", "-c", pipeline]);
    command.env("FPENET", env!("CARGO_BIN_EXE_fpenet"));
    Some(command.output().unwrap())
}

#[test]
fn ffmpeg_pipes_in_and_out() {
    let place = Workplace::new();
    let source = "ffmpeg -v error -f lavfi -i testsrc2=size=66x50:rate=10:duration=1.2 \
                  -vf format=rgb24,crop=65:49";
    let network = "\"$FPENET\" stream --quiet --device cpu --model m.safetensors";
    for (pixels, show) in [
        ("yuv420p", "overlay"),
        ("yuvj420p", "colour"),
        ("yuv422p", "labels"),
        ("yuv444p", "overlay"),
        ("gray", "labels"),
    ] {
        // What ffmpeg makes of the output: one line of checksum per frame, with its size.
        let pipeline = format!(
            "{source} -pix_fmt {pixels} -f yuv4mpegpipe - | {network} --show {show} | \
             ffmpeg -v error -f yuv4mpegpipe -i - -pix_fmt rgb24 -f framecrc -"
        );
        let Some(output) = with_ffmpeg(&place, &pipeline) else { return };
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && stderr.is_empty(), "{pixels} {show}: {stderr}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("#dimensions 0: 65x49"), "{text}");
        assert!(text.contains("#tb 0: 1/10"), "{text}");
        assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), 12, "{text}");
    }
    let pipeline = format!(
        "{source} -pix_fmt rgb24 -f rawvideo - | \
         {network} --input-format rgb24 --size 65x49 --output-format raw --show colour | \
         ffmpeg -v error -f rawvideo -pix_fmt rgb24 -s 65x49 -i - -f framecrc -"
    );
    let Some(output) = with_ffmpeg(&place, &pipeline) else { return };
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text.lines().filter(|line| !line.starts_with('#')).count(), 12, "{text}");
}

/// ffmpeg's own conversion is the judge of this library's.
#[test]
fn colours_are_those_that_ffmpeg_sees() {
    use fpenet::stream::colour::{Matrix, ToRgb};
    use fpenet::stream::y4m::Range;
    let place = Workplace::new();
    let source = "ffmpeg -v error -f lavfi -i testsrc2=size=66x50:rate=1:duration=1 \
                  -vf format=rgb24,gblur=sigma=4";
    for (pixels, range) in
        [("yuv420p", Range::Limited), ("yuvj420p", Range::Full), ("yuv444p", Range::Limited)]
    {
        let stream = format!("{source} -pix_fmt {pixels} -f yuv4mpegpipe -");
        let Some(output) = with_ffmpeg(&place, &stream) else { return };
        let mut reader = Reader::new(output.stdout.as_slice(), Path::new("ffmpeg")).unwrap();
        let mut planes = Vec::new();
        assert!(reader.read_frame(&mut planes).unwrap());
        let told = reader.header().range.unwrap_or(Range::Limited);
        assert_eq!(told, range, "{pixels}");
        let mut found = vec![0; 3 * 66 * 50];
        ToRgb::new(reader.header(), Matrix::Bt601, range).convert(&planes, &mut found);

        let exact = "scale=flags=bilinear+accurate_rnd+full_chroma_int+full_chroma_inp";
        let back = format!(
            "{stream} | ffmpeg -v error -f yuv4mpegpipe -i - -vf {exact} -pix_fmt rgb24 -f rawvideo -"
        );
        let expected = with_ffmpeg(&place, &back).unwrap().stdout;
        assert_eq!(expected.len(), found.len());
        let distance = |(a, b): (&u8, &u8)| f64::from(a.abs_diff(*b));
        let mean = found.iter().zip(&expected).map(distance).sum::<f64>() / found.len() as f64;
        // Full colour planes leave rounding alone; halved ones are interpolated a little
        // otherwise, which the blur keeps small.
        let tolerance = if pixels == "yuv444p" { 0.5 } else { 1.0 };
        assert!(mean < tolerance, "{pixels}: {mean}");
    }
}
