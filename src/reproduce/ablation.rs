//! Tables 2, 3, 5 and 6: the same training with one switch of the network changed per row.

use serde_json::{Map, Value, json};

use super::Table;
use super::markdown::{Markdown, UNKNOWN, grouped, percent};
use super::runs::{Finished, Job, Runs, describe};
use crate::error::Result;
use crate::graph::summary::summarise;
use crate::train::Request;

/// The rows of a table in its order; none for tables that are not ablations.
///
/// Which switches the paper puts in which of its tables is this project's reading of the order
/// in which it names them; the switches themselves are the paper's. Every row is the full network
/// with one switch changed, so that the full network is one run, shared by all tables.
pub fn jobs(table: Table) -> Vec<Job> {
    let full = |label: &str| job("full", label, json!({}));
    match table {
        Table::Branches => vec![
            job("branches-1", "1 branch, dilation 1", json!({ "branches": 1 })),
            job("branches-2", "2 branches, dilations 1, 2", json!({ "branches": 2 })),
            job(
                "dilations-1-2-3-4",
                "4 branches, dilations 1, 2, 3, 4",
                json!({ "dilations": [1, 2, 3, 4] }),
            ),
            full("4 branches, dilations 1, 2, 4, 8 (full network)"),
        ],
        Table::Addition => vec![
            job("no-branch-addition", "branches apart", json!({ "branch_addition": false })),
            full("each branch added to the next (full network)"),
        ],
        Table::LongSkip => vec![
            job("no-long-skip", "a stage hands on its last block", json!({ "long_skip": false })),
            full("concatenated with its first unit (full network)"),
        ],
        Table::Decoder => vec![
            job("decoder-bilinear", "bilinear", json!({ "decoder": "bilinear" })),
            job("decoder-ca", "channel attention only", json!({ "decoder": "ca" })),
            full("MEU: channel and spatial attention (full network)"),
        ],
        Table::Depth | Table::Speed | Table::Camvid => Vec::new(),
    }
}

fn job(folder: &str, label: &str, switches: Value) -> Job {
    let switches = match switches {
        Value::Object(switches) => switches,
        _ => Map::new(),
    };
    Job { folder: folder.into(), label: label.into(), switches }
}

/// The table of what is finished; a row without its run reads "not finished".
///
/// # Errors
/// [`crate::Error::Usage`] for an invalid configuration.
pub fn table(
    which: Table,
    runs: &Runs,
    request: &Request,
    rows: &[(Job, Option<Finished>)],
) -> Result<Markdown> {
    let row = |(job, finished): &(Job, Option<Finished>)| {
        let protocol = runs.protocol(job)?;
        let (width, height) = protocol.size;
        let counted = summarise(&protocol.config, 1, height, width)?;
        let last = finished.as_ref().map(|f| &f.last);
        let validation = last.and_then(|last| last.validation.as_ref());
        let miou = match last {
            Some(_) => percent(validation.map(|v| v.miou)),
            None => "not finished".into(),
        };
        Ok(vec![
            job.label.clone(),
            grouped(counted.parameters as u64),
            last.map_or(UNKNOWN.into(), |last| format!("{:.3}", last.loss)),
            percent(validation.map(|v| v.global_accuracy)),
            miou,
            UNKNOWN.to_string(),
        ])
    };
    let header =
        ["variant", "parameters", "training loss", "global accuracy %", "mIoU %", "paper mIoU %"];
    let mut notes = Vec::new();
    if let Some((job, _)) = rows.first() {
        let protocol = runs.protocol(job)?;
        let val = protocol.val_split.as_deref().unwrap_or("nothing");
        notes.push(describe(&protocol, runs.images(), &request.data));
        notes.push(format!(
            "Losses are the last epoch's mean; mIoU and accuracy are of the weights after the last \
             epoch (none is chosen) on {val}, one confusion matrix over the split at full size."
        ));
    }
    Ok(Markdown {
        title: format!("{}: {}", heading(which), which.title()),
        notes,
        header: header.map(String::from).into(),
        rows: rows.iter().map(row).collect::<Result<_>>()?,
        remarks: vec![
            "One run per row: differences that another seed could turn round say nothing. A dash: \
             the paper's figure is not on record in this project."
                .into(),
        ],
    })
}

fn heading(table: Table) -> String {
    table.name().replace("table", "Table ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::ModelConfig;

    #[test]
    fn every_row_is_a_valid_network_and_a_folder_always_means_the_same_one() {
        let mut seen: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
        for table in [Table::Branches, Table::Addition, Table::LongSkip, Table::Decoder] {
            let jobs = jobs(table);
            assert!(jobs.iter().any(|job| job.switches.is_empty()), "no full network in {table:?}");
            for job in jobs {
                let config: ModelConfig =
                    serde_json::from_value(Value::Object(job.switches.clone())).unwrap();
                config.validate().unwrap();
                assert!(config == ModelConfig::default() || job.folder != "full", "{job:?}");
                let first = seen.entry(job.folder.clone()).or_insert(job.switches.clone());
                assert_eq!(*first, job.switches, "{}", job.folder);
            }
        }
        // The paper's ablations: branches 1 and 2, dilations 1 to 4, addition, long skip, two
        // other decoders, and the full network.
        assert_eq!(seen.len(), 8);
    }
}
