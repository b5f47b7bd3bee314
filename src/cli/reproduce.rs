//! `fpenet reproduce`: the paper's tables, measured here.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use fpenet::config::{Attention, BlockActivation};
use fpenet::data::{Dataset, DatasetKind};
use fpenet::reproduce::markdown::Markdown;
use fpenet::reproduce::runs::{Finished, Job, Runs, State};
use fpenet::reproduce::{Table, ablation, camvid, depth, paper, speed};
use fpenet::train::{Request, Runtime};
use fpenet::{Error, ModelConfig, files};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::args::{DeviceArgs, Size, positive};
use super::progress::Progress;
use crate::say;

/// Options of `fpenet reproduce`.
#[derive(clap::Args)]
#[command(after_help = "\
table2  branches 1, 2, 4 and dilations 1,2,3,4 or 1,2,4,8      trains 4 networks\n\
table3  addition between branches off, on                      trains 2\n\
table4  parameters and FLOPs over p and q                      counts, needs no data\n\
table5  long skips off, on                                     trains 2\n\
table6  decoder bilinear, channel attention only, full MEU     trains 3\n\
table7  images per second at 768x384, 1024x512, 1536x768       times, needs no data\n\
table8  CamVid: trains on train,val, measures on test\n\n\
Which switches the paper puts in table 2 and which in table 3, and on which baseline, is not known \
here for sure: each row is the full network with one switch changed, and a network that several \
tables hold is trained once. The paper's figures are shown where this project has them on record \
(tables 4, 7 and 8), else a dash.\n\n\
Each training is a run of `fpenet train` in OUT/runs/NAME. A finished run is kept and skipped, a \
begun one is continued bit for bit, one made with other settings is refused. Tables go to \
OUT/tableN.md and tableN.json. The defaults are the paper's protocol (days on a CPU): shorten it \
with --epochs and --size.")]
pub struct Args {
    /// Tables to make
    #[arg(value_enum, required = true, value_name = "TABLE")]
    pub tables: Vec<Table>,
    /// Folder for runs and tables
    #[arg(long, value_name = "FOLDER", default_value = "runs/reproduce")]
    pub out: PathBuf,
    /// Root folder of the data set, for tables 2, 3, 5, 6 and 8
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Layout of the data set [default: told from the folder]
    #[arg(long, value_enum)]
    pub dataset: Option<DatasetKind>,
    /// Epochs of each training [default: 400 for Cityscapes, 300 for CamVid]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub epochs: Option<usize>,
    /// Training size [default: 1024x512 for Cityscapes, 480x360 for CamVid]
    #[arg(long, value_name = "WxH", help_heading = "Training")]
    pub size: Option<Size>,
    /// Images per update [default: 8]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Training")]
    pub batch: Option<usize>,
    /// Learning rate of the first epoch [default: 0.0005]
    #[arg(long, value_name = "X", help_heading = "Training")]
    pub lr: Option<f64>,
    /// Seed of every training [default: 0]
    #[arg(long, value_name = "N", help_heading = "Training")]
    pub seed: Option<u64>,
    /// Attention gates of every network [default: relu]
    #[arg(long, value_enum, help_heading = "Training")]
    pub attention: Option<Attention>,
    /// What follows a block's residual addition in every network [default: linear]
    #[arg(long, value_enum, help_heading = "Training")]
    pub block_activation: Option<BlockActivation>,
    /// Splits to train on [default: train, for table 8 train,val]
    #[arg(long, value_name = "S,S", value_delimiter = ',', help_heading = "Training")]
    pub splits: Option<Vec<String>>,
    /// Split that table 8 is measured on [default: test]
    #[arg(long, value_name = "SPLIT", help_heading = "Training")]
    pub test_split: Option<String>,
    /// Threads that decode and augment [default: by the number of cores]
    #[arg(long, value_name = "N", value_parser = positive, help_heading = "Training")]
    pub workers: Option<usize>,
    /// Timed runs per size of table 7 [default: 100, as many as the paper's]
    #[arg(long, value_name = "N", value_parser = positive)]
    pub iterations: Option<usize>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command. Interrupted, it writes the tables of what is finished and exits with 1.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut tables = args.tables.clone();
    let mut seen = Vec::new();
    tables.retain(|table| !seen.contains(table) && (seen.push(*table), true).1);
    check_heeded(&args, &tables)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let plans = plans(&args, &tables)?;
    let _made = files::create_folder(&args.out)?;
    if !plans.is_empty() {
        // The first Ctrl-C (or kill) asks for a checkpoint; the second ends the process at once.
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register_conditional_shutdown(signal, 130, interrupted.clone())?;
            signal_hook::flag::register(signal, interrupted.clone())?;
        }
    }
    let mut missing = 0;
    for table in tables {
        let (markdown, data) = match table {
            Table::Depth => (depth::table(&config(&args)?)?, Value::Null),
            Table::Speed => speed(&args)?,
            _ => {
                let plan = &plans[&table];
                let (markdown, data, unfinished) = trained(&args, table, plan, &interrupted)?;
                missing += unfinished;
                (markdown, data)
            }
        };
        if markdown.rows.is_empty() {
            continue;
        }
        markdown.write(&args.out, table.name(), data)?;
        say!("{markdown}")?;
        say!("-> {}", args.out.join(format!("{}.md", table.name())).display())?;
        say!("")?;
    }
    if missing > 0 {
        let text = format!(
            "interrupted: {missing} rows are not finished; the same command continues in {}",
            args.out.display()
        );
        return Err(Error::Failed(text).into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses an option that none of the tables reads: its user expects something of it. Where to run is let through,
/// since scripts say so to every command.
fn check_heeded(args: &Args, tables: &[Table]) -> fpenet::Result<()> {
    let all = Table::value_variants().iter().copied();
    let trained: Vec<Table> =
        all.filter(|table| ![Table::Depth, Table::Speed].contains(table)).collect();
    let options: [(&str, bool, &[Table]); 11] = [
        ("--data", args.data.is_some(), &trained),
        ("--dataset", args.dataset.is_some(), &trained),
        ("--epochs", args.epochs.is_some(), &trained),
        ("--size", args.size.is_some(), &trained),
        ("--batch", args.batch.is_some(), &trained),
        ("--lr", args.lr.is_some(), &trained),
        ("--seed", args.seed.is_some(), &trained),
        ("--splits", args.splits.is_some(), &trained),
        ("--workers", args.workers.is_some(), &trained),
        ("--test-split", args.test_split.is_some(), &[Table::Camvid]),
        ("--iterations", args.iterations.is_some(), &[Table::Speed]),
    ];
    let names = |tables: &[Table]| tables.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
    for (option, given, readers) in options {
        if given && !tables.iter().any(|table| readers.contains(table)) {
            return Err(Error::Usage(format!(
                "{option}: expected with {} only, found {}, which does not read it; leave it out",
                names(readers),
                names(tables)
            )));
        }
    }
    Ok(())
}

/// A table's training: the request that its rows share.
struct Plan {
    request: Request,
    jobs: Vec<Job>,
    /// What table 8 is measured on.
    test: Option<Dataset>,
}

/// Checks the settings, the data and the runs that are there of every table, before any work.
fn plans(args: &Args, tables: &[Table]) -> anyhow::Result<HashMap<Table, Plan>> {
    let mut plans = HashMap::new();
    for &table in tables {
        if matches!(table, Table::Depth | Table::Speed) {
            continue;
        }
        let Some(data) = &args.data else {
            let text = format!("{}: expected --data DIR with the data to train on", table.name());
            return Err(Error::Usage(text).into());
        };
        args.device.for_training()?;
        let mut request = request(args, data);
        let jobs = match table {
            Table::Camvid => {
                request.splits.get_or_insert_with(|| vec!["train".into(), "val".into()]);
                request.val_split = Some("none".into());
                vec![camvid::job()]
            }
            _ => ablation::jobs(table),
        };
        let runs = Runs::new(&request)?;
        let test = match table {
            Table::Camvid => {
                let split = args.test_split.as_deref().unwrap_or("test");
                Some(camvid::test_split(&request, runs.kind(), split)?)
            }
            _ => None,
        };
        // One validation, after the last epoch: its weights are what the table is about.
        request.val_every = Some(runs.protocol(&jobs[0])?.epochs);
        let runs = Runs::new(&request)?;
        for job in &jobs {
            runs.state(job)?;
        }
        plans.insert(table, Plan { request, jobs, test });
    }
    Ok(plans)
}

fn request(args: &Args, data: &std::path::Path) -> Request {
    let mut request = Request::new(data, &args.out);
    request.dataset = args.dataset;
    request.splits = args.splits.clone();
    request.epochs = args.epochs;
    request.batch = args.batch;
    request.lr = args.lr;
    request.seed = args.seed;
    request.size = args.size.map(|s| (s.width, s.height));
    if let Some(attention) = args.attention {
        request.config.insert("attention".into(), json!(attention));
    }
    if let Some(activation) = args.block_activation {
        request.config.insert("block_activation".into(), json!(activation));
    }
    request.runtime = Runtime {
        device: args.device.device,
        precision: args.device.precision,
        threads: args.device.threads,
        workers: args.workers,
        ..Runtime::default()
    };
    request
}

/// The full network with the options that hold for every table.
fn config(args: &Args) -> anyhow::Result<ModelConfig> {
    let base = ModelConfig::default();
    let config = ModelConfig {
        attention: args.attention.unwrap_or(base.attention),
        block_activation: args.block_activation.unwrap_or(base.block_activation),
        ..base
    };
    config.validate()?;
    Ok(config)
}

fn trained(
    args: &Args,
    table: Table,
    plan: &Plan,
    interrupted: &AtomicBool,
) -> anyhow::Result<(Markdown, Value, usize)> {
    let runs = Runs::new(&plan.request)?;
    let mut rows: Vec<(Job, Option<Finished>)> = Vec::new();
    for (i, job) in plan.jobs.iter().enumerate() {
        let state = runs.state(job)?;
        let words = match &state {
            State::New => "to train".to_string(),
            State::Begun(epochs) => format!("continued after {epochs} epochs"),
            State::Finished(_) => "finished before, kept".to_string(),
        };
        let (name, of) = (table.name(), plan.jobs.len());
        eprint_line(&format!("{name}, run {} of {of}: {} ({words})", i + 1, job.folder));
        let finished = match state {
            State::Finished(done) => Some(*done),
            _ if interrupted.load(Ordering::Relaxed) => None,
            _ => {
                let mut progress = Progress::new();
                let finished = runs.finish(job, interrupted, &mut progress)?;
                progress.finish();
                finished
            }
        };
        rows.push((job.clone(), finished));
    }
    let unfinished = rows.iter().filter(|(_, finished)| finished.is_none()).count();
    let data = json!(
        rows.iter().map(|(job, f)| json!({ "run": job.folder, "finished": f })).collect::<Vec<_>>()
    );
    let Some(test) = &plan.test else {
        let markdown = ablation::table(table, &runs, &plan.request, &rows)?;
        return Ok((markdown, data, unfinished));
    };
    let Some(finished) = &rows[0].1 else {
        let nothing = Markdown {
            title: String::new(),
            notes: Vec::new(),
            header: Vec::new(),
            rows: Vec::new(),
            remarks: Vec::new(),
        };
        return Ok((nothing, data, unfinished));
    };
    let bar = ProgressBar::new(test.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} images, {eta} left")?);
    let evaluation = camvid::measure(finished, test, &mut || args.device.open(), &mut |done, _| {
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok((camvid::table(&runs, &plan.request, test, &evaluation?)?, data, unfinished))
}

fn speed(args: &Args) -> anyhow::Result<(Markdown, Value)> {
    let config = config(args)?;
    let settings = speed::Settings { iterations: args.iterations.unwrap_or(100), warmup: 5 };
    let total = paper::TABLE_7.len() * (settings.iterations + settings.warmup);
    let bar = ProgressBar::new(total as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} runs")?);
    let measured =
        speed::measure(&config, settings, &mut || args.device.open(), &mut || bar.inc(1));
    bar.finish_and_clear();
    let (device, all) = measured?;
    let how = format!("{device}, {}", args.device.precision.name());
    Ok((speed::table(&config, settings, how, &all)?, json!(all)))
}

/// A line on stderr, beside the progress of the runs.
fn eprint_line(text: &str) {
    use std::io::Write;
    // Where stderr is closed there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "{text}");
}
