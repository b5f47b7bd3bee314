//! `fpenet stream`: video in, labels, colours or overlays out.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use fpenet::segment::Segmenter;
use fpenet::segment::input::{SizeReason, network_size};
use fpenet::stream::colour::Matrix;
use fpenet::stream::pipeline::{self, Options, Status};
use fpenet::stream::sink::{Container, Format, Show, Sink};
use fpenet::stream::source::{Folder, RawRgb, Source, Y4m};
use fpenet::stream::y4m::{self, Range};
use fpenet::stream::{STDIN, STDOUT};
use fpenet::{Error, Result};

use super::args::{DeviceArgs, ModelArgs, Size};

/// How often the status line is renewed on a terminal.
const RENEWAL: Duration = Duration::from_millis(250);
/// Frames per second where the input does not tell.
const DEFAULT_FPS: (u32, u32) = (25, 1);

/// How frames come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum InputFormat {
    /// YUV4MPEG2, 8 bits: C420jpeg, C420mpeg2, C420paldv, C422, C444, Cmono
    Y4m,
    /// Interleaved RGB, 3 bytes a pixel, rows without gaps
    Rgb24,
}

/// Options of `fpenet stream`.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    ffmpeg -i drive.mp4 -pix_fmt yuv420p -f yuv4mpegpipe - | fpenet stream | ffplay -\n  \
    ffmpeg -i drive.mp4 -s 640x360 -pix_fmt rgb24 -f rawvideo - |\n    \
    fpenet stream --input-format rgb24 --size 640x360 --show labels --output-format raw > labels.gray\n  \
    fpenet stream --input frames/ --fps 10 --show colour > colour.y4m\n\n\
    Output frames have the input's size. In YUV4MPEG2 labels are Cmono of full range, pictures C444 of \
    limited range; raw they are gray8 and rgb24. The input's range is what its header says, else \
    limited. Its matrix, and the output's, is BT.709 from 1280 pixels of width or above 576 of height, \
    else BT.601, as players take it.\n\n\
    An input that ends within a frame is an error (exit code 1) after all whole frames are out. An \
    output that is closed ends the stream without one.")]
pub struct Args {
    /// File of frames, or folder of pictures of one size [default, and -: standard input]
    #[arg(long, value_name = "FILE|FOLDER")]
    pub input: Option<PathBuf>,
    /// How frames come in
    #[arg(long, value_enum, default_value = "y4m")]
    pub input_format: InputFormat,
    /// Size of raw frames
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    /// What to write
    #[arg(long, value_enum, default_value = "overlay")]
    pub show: Show,
    /// How to pack it
    #[arg(long, value_enum, default_value = "y4m")]
    pub output_format: Container,
    /// Frames per second of raw frames and folders, for the output's header [default: 25]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub fps: Option<u32>,
    /// Matrix of the colours in YUV4MPEG2 [default: by the frame's size]
    #[arg(long, value_enum)]
    pub matrix: Option<Matrix>,
    /// Range of the input's values in YUV4MPEG2 [default: what its header says, else limited]
    #[arg(long, value_enum)]
    pub range: Option<Range>,
    /// Size at which the network runs [default: the frame's, or the training area for larger ones]
    #[arg(long, value_name = "WxH")]
    pub network_size: Option<Size>,
    /// For live sources: drop the oldest waiting frame when the network does not keep up
    #[arg(long)]
    pub drop: bool,
    /// No status line
    #[arg(long)]
    pub quiet: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(mut args: Args) -> anyhow::Result<ExitCode> {
    if io::stdout().is_terminal() {
        let text = "standard output: expected a pipe or a file for the frames, found a terminal";
        return Err(Error::Usage(text.into()).into());
    }
    check_heeded(&args)?;
    let model = args.model.load()?;
    let mut segmenter = Segmenter::new(&model, args.device.settings())?;
    let (kind, name) = segmenter.device();

    args.input.take_if(|input| input.as_os_str() == "-");
    let input = open(&args)?;
    let (width, height) = input.source.size();
    let requested = args.network_size.map(|size| (size.width, size.height));
    let network = network_size((width, height), requested, model.train_size);
    // Before the first frame, so that it does not wait for memory.
    segmenter.prepare(network, (width, height))?;
    if !args.quiet {
        let network = match network.reason {
            SizeReason::Own => "the same".to_string(),
            _ => network.to_string(),
        };
        status_line(format_args!(
            "{}, frames {width}x{height}, network {network}, {kind}: {name}\n",
            input.description
        ));
    }

    let format = Format {
        show: args.show,
        container: args.output_format,
        fps: input.fps,
        matrix: matrix(&args, width, height),
    };
    let sink = match Sink::new(io::stdout(), format, &model.palette, (width, height)) {
        Ok(sink) => sink,
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
        Err(e) => return Err(Error::io("cannot write", STDOUT, e).into()),
    };
    let options = Options { network, drop_frames: args.drop };
    let mut meter = Meter::new(!args.quiet && io::stderr().is_terminal());
    let (status, result) =
        pipeline::run(input.source, &mut segmenter, sink, options, |status| meter.update(status));
    if !args.quiet {
        let rate = status.frames as f64 / status.elapsed.as_secs_f64();
        status_line(format_args!("{}\n", describe(&status, rate)));
    }
    result?;
    if status.frames == 0 && status.dropped == 0 && !status.output_closed {
        let found = "none: an empty input";
        return Err(Error::format(input.origin, "at least one frame", found).into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses an option that input and output have no use for: its user expects something of it.
fn check_heeded(args: &Args) -> Result<()> {
    let folder = args.input.as_deref().is_some_and(Path::is_dir);
    let y4m_in = !folder && args.input_format == InputFormat::Y4m;
    let y4m_out = args.output_format == Container::Y4m;
    let pictures = args.show != Show::Labels;
    let idle = [
        (
            args.range.is_some() && !y4m_in,
            "--range: expected with YUV4MPEG2 input only: RGB is of full range",
        ),
        (
            args.matrix.is_some() && !y4m_in && !(y4m_out && pictures),
            "--matrix: expected with YUV4MPEG2 input, or pictures in YUV4MPEG2 as output: RGB and \
             labels have none",
        ),
        (
            args.fps.is_some() && !y4m_out,
            "--fps: expected with --output-format y4m only: raw frames have no header to hold it",
        ),
    ];
    match idle.into_iter().find(|(idle, _)| *idle) {
        Some((_, text)) => Err(Error::Usage(text.into())),
        None => Ok(()),
    }
}

struct Input {
    source: Box<dyn Source>,
    origin: PathBuf,
    fps: (u32, u32),
    description: String,
}

fn open(args: &Args) -> Result<Input> {
    let raw = args.input_format == InputFormat::Rgb24;
    let fps = args.fps.map_or(DEFAULT_FPS, |fps| (fps, 1));
    if let Some(path) = args.input.as_deref().filter(|path| path.is_dir()) {
        if raw || args.size.is_some() {
            return Err(Error::Usage(format!(
                "{}: expected no --input-format and --size for a folder: its pictures tell",
                path.display()
            )));
        }
        let source = Box::new(Folder::open(path)?);
        let description = format!("{}: folder", path.display());
        return Ok(Input { source, origin: path.to_path_buf(), fps, description });
    }
    let origin = args.input.clone().unwrap_or_else(|| PathBuf::from(STDIN));
    let bytes: Box<dyn Read + Send> = match &args.input {
        Some(path) => Box::new(File::open(path).map_err(|e| Error::io("cannot read", path, e))?),
        None => Box::new(io::stdin()),
    };
    match (raw, args.size) {
        (true, Some(size)) => {
            let source = RawRgb::new(bytes, &origin, (size.width as u32, size.height as u32));
            let description = format!("{}: rgb24", origin.display());
            Ok(Input { source: Box::new(source), origin, fps, description })
        }
        (true, None) => {
            Err(Error::Usage("--input-format rgb24: expected --size WxH, found none".into()))
        }
        (false, Some(_)) => Err(Error::Usage(
            "--size: expected with --input-format rgb24 only: YUV4MPEG2 tells its own; for the \
             network's size say --network-size"
                .into(),
        )),
        (false, None) => open_y4m(args, bytes, &origin),
    }
}

fn open_y4m(args: &Args, bytes: Box<dyn Read + Send>, origin: &Path) -> Result<Input> {
    let reader = y4m::Reader::new(bytes, origin)?;
    let header = *reader.header();
    let matrix = matrix(args, header.width as u32, header.height as u32);
    let source = Y4m::new(reader, matrix, args.range);
    // 0:0 stands for a rate that is not known.
    let own = Some(header.fps).filter(|(num, den)| *num > 0 && *den > 0);
    let fps = args.fps.map(|fps| (fps, 1)).or(own).unwrap_or(DEFAULT_FPS);
    let description = format!("{}: Y4M C{}", origin.display(), header.chroma.name());
    Ok(Input { source: Box::new(source), origin: origin.to_path_buf(), fps, description })
}

fn matrix(args: &Args, width: u32, height: u32) -> Matrix {
    args.matrix.unwrap_or_else(|| Matrix::usual(width as usize, height as usize))
}

/// The status line of a terminal, renewed now and then.
struct Meter {
    on: bool,
    shown: Instant,
    frames: u64,
}

impl Meter {
    fn new(on: bool) -> Self {
        Meter { on, shown: Instant::now(), frames: 0 }
    }

    fn update(&mut self, status: &Status) {
        let since = self.shown.elapsed();
        if self.on && since >= RENEWAL {
            let rate = (status.frames - self.frames) as f64 / since.as_secs_f64();
            status_line(format_args!("{}", describe(status, rate)));
            (self.shown, self.frames) = (Instant::now(), status.frames);
        }
    }
}

fn describe(status: &Status, rate: f64) -> String {
    let ms = |q| status.latency.quantile(q).as_secs_f64() * 1e3;
    format!(
        "{} frames, {rate:.1} fps, latency {:.1} ms (p99 {:.1} ms), {} dropped",
        status.frames,
        ms(0.5),
        ms(0.99),
        status.dropped
    )
}

/// Over the line before, where stderr is a terminal. Where it is closed there is nobody to tell.
fn status_line(text: std::fmt::Arguments) {
    let mut err = io::stderr().lock();
    let _ = if err.is_terminal() { write!(err, "\r\x1b[K{text}") } else { write!(err, "{text}") };
}
