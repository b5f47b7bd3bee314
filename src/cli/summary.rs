//! `fpenet summary`: layers, parameters, FLOPs, receptive fields.

use std::process::ExitCode;

use fpenet::graph::summary::{Layer, summarise};

use super::args::{ConfigArgs, Size};
use crate::say;

/// Options of `fpenet summary`.
#[derive(clap::Args)]
pub struct Args {
    /// Input size
    #[arg(long, value_name = "WxH", default_value = "1024x512")]
    pub size: Size,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub network: ConfigArgs,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let config = args.network.config()?;
    let summary = summarise(&config, 1, args.size.height, args.size.width)?;
    if args.json {
        let mut object = serde_json::to_value(&summary)?;
        object["size"] = args.size.to_string().into();
        object["config"] = serde_json::to_value(&config)?;
        say!("{}", serde_json::to_string_pretty(&object)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    print_layers(&summary.layers)?;
    say!("")?;
    say!("network               {}", serde_json::to_string(&config)?)?;
    say!("input                 1 x 3 x {} x {}", args.size.height, args.size.width)?;
    say!("parameters            {}", grouped(summary.parameters as u64))?;
    say!("multiply-accumulates  {}", giga(summary.macs))?;
    say!("FLOPs as published    {}", giga(summary.flops_as_published))?;
    say!("FLOPs as executed     {}", giga(summary.flops_as_executed))?;
    say!(
        "Published figures count the decoder's high-level 1x1 convolutions behind the upsampling;"
    )?;
    say!("they run before it, with the same result.")?;
    Ok(ExitCode::SUCCESS)
}

fn print_layers(layers: &[Layer]) -> anyhow::Result<()> {
    let header = ["layer", "kind", "output", "parameters", "MACs", "FLOPs", "receptive field"];
    let mut rows = vec![header.map(String::from)];
    rows.extend(layers.iter().map(|layer| {
        [
            layer.name.clone(),
            layer.kind.to_string(),
            layer.shape.map(|d| d.to_string()).join(" x "),
            grouped(layer.parameters as u64),
            grouped(layer.macs),
            grouped(layer.flops),
            layer.receptive_field.map_or("image".to_string(), |field| field.to_string()),
        ]
    }));
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    for row in &rows {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            // Names to the left, figures to the right.
            if column < 3 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        say!("{}", cells.collect::<Vec<_>>().join("  "))?;
    }
    Ok(())
}

/// 1234567 -> "1,234,567".
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let chunks: Vec<&[u8]> = digits.as_bytes().rchunks(3).rev().collect();
    chunks.into_iter().map(String::from_utf8_lossy).collect::<Vec<_>>().join(",")
}

fn giga(value: u64) -> String {
    format!("{:.2} G", value as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn thousands_are_grouped() {
        let cases = [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")];
        for (value, text) in cases {
            assert_eq!(grouped(value), text);
        }
    }
}
