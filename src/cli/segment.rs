//! `fpenet segment`: label maps, colour masks and overlays of photos.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use fpenet::segment::Segmenter;
use fpenet::segment::collect::{self, Item};
use fpenet::segment::pipeline::{self, Segmented};
use fpenet::segment::render::{self, Share};
use fpenet::{Error, bundled, files};

use super::args::{DeviceArgs, ModelArgs, Size};
use crate::say;

/// Options of `fpenet segment`.
#[derive(clap::Args)]
#[command(after_help = "Writes per photo, at the photo's own size:\n  \
    NAME.labels.png   class index per pixel, 8-bit grey\n  \
    NAME.mask.png     the same in the classes' colours\n  \
    NAME.overlay.png  the photo under the mask, with a legend (a photo too small for it grows)\n\
    Photos with the same name get NAME, NAME-2, NAME-3. Files of these names in the output folder \
    are replaced.\n\n\
    Without --size the network runs at the photo's own size; a photo of more than twice the area \
    that the model was trained on is scaled down to that area, one with a side under 16 pixels is \
    scaled up. A file that cannot be segmented is reported, the rest are processed, and the exit \
    code is 1.")]
pub struct Args {
    /// Photos, or folders of photos (by extension, subfolders not included) [default: the bundled
    /// example photo]
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Folder for the results
    #[arg(long, value_name = "DIR", default_value = "out")]
    pub out: PathBuf,
    /// Size at which the network runs [default: the photo's, see below]
    #[arg(long, value_name = "WxH")]
    pub size: Option<Size>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let model = args.model.load()?;
    let items = if args.paths.is_empty() {
        collect::bundled(bundled::PHOTO_NAME, bundled::PHOTO)
    } else {
        collect::collect(&args.paths)
    };
    collect::refuse_overwriting_inputs(&items, &args.out)?;
    let mut segmenter = Segmenter::new(&model, args.device.settings())?;
    files::check_folder(&args.out)?;

    let (kind, name) = segmenter.device();
    say!("device   {}", args.device.explain((kind, &name)))?;
    say!("model    {}", args.model.explain(&model))?;

    let start = Instant::now();
    let mut totals = Totals::new(items.len(), model.classes.len());
    let requested = args.size.map(|size| (size.width, size.height));
    pipeline::run(items, &mut segmenter, requested, &args.out, |item, result| {
        totals.add(item, result, &model.classes);
    });
    segmenter.warnings().iter().for_each(|warning| super::warn(warning));
    totals.finish(start.elapsed(), &model.classes)
}

/// Prints each photo's result as it comes, and keeps what the last lines say.
struct Totals {
    inputs: usize,
    segmented: usize,
    pixels: Vec<u64>,
    /// Inputs that gave nothing.
    failed: usize,
    /// The failure of an input that is the only one: the command's own error.
    failure: Option<Error>,
    /// A report that could not be printed.
    unprinted: Option<std::io::Error>,
}

impl Totals {
    fn new(inputs: usize, classes: usize) -> Self {
        let pixels = vec![0; classes];
        Totals { inputs, segmented: 0, pixels, failed: 0, failure: None, unprinted: None }
    }

    fn add(&mut self, item: &Item, result: fpenet::Result<Segmented>, classes: &[String]) {
        match result {
            Ok(done) => {
                self.segmented += 1;
                for (total, pixels) in self.pixels.iter_mut().zip(&done.pixels) {
                    *total += pixels;
                }
                if let Err(e) = print_photo(item, &done, classes) {
                    self.unprinted.get_or_insert(e);
                }
            }
            Err(error) => {
                self.failed += 1;
                if self.inputs == 1 {
                    self.failure = Some(error);
                } else {
                    super::report(&error.to_string());
                }
            }
        }
    }

    fn finish(self, elapsed: Duration, classes: &[String]) -> anyhow::Result<ExitCode> {
        if let Some(e) = self.unprinted {
            return Err(e.into());
        }
        if self.segmented > 1 {
            say!("")?;
            let rate = self.segmented as f64 / elapsed.as_secs_f64();
            say!(
                "{} photos in {:.1} s, {rate:.1} photos/s",
                self.segmented,
                elapsed.as_secs_f64()
            )?;
            print_shares(&render::shares(&self.pixels), classes)?;
        }
        match (self.failure, self.failed) {
            (Some(error), _) => Err(error.into()),
            (None, 0) => Ok(ExitCode::SUCCESS),
            (None, failed) => {
                let text = format!("{failed} of {} inputs were not segmented", self.inputs);
                Err(Error::Failed(text).into())
            }
        }
    }
}

fn print_photo(item: &Item, done: &Segmented, classes: &[String]) -> std::io::Result<()> {
    let (width, height) = done.size;
    let ms = |time: Duration| format!("{:.0} ms", time.as_secs_f64() * 1e3);
    say!("")?;
    say!("{}: {width}x{height}, network {}", item.path.display(), done.network)?;
    say!(
        "  decode {}, inference {}, write {}",
        ms(done.decode),
        ms(done.inference),
        ms(done.write)
    )?;
    print_shares(&done.shares, classes)?;
    for file in &done.files {
        say!("  -> {}", file.display())?;
    }
    Ok(())
}

fn print_shares(shares: &[Share], classes: &[String]) -> std::io::Result<()> {
    let name = |share: &Share| classes.get(share.class).map_or("", String::as_str);
    let width = shares.iter().map(|s| name(s).chars().count()).max().unwrap_or(0);
    for share in shares {
        say!("  {:<width$}  {:>5} %", name(share), share.percent())?;
    }
    Ok(())
}
