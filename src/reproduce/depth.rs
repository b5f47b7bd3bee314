//! Table 4: parameters and FLOPs over the number of blocks, from the model alone.

use super::markdown::{Markdown, UNKNOWN, grouped};
use super::paper::TABLE_4;
use crate::config::ModelConfig;
use crate::error::Result;
use crate::graph::summary::summarise;

/// Size at which FLOPs are counted.
const SIZE: (usize, usize) = (1024, 512);

/// Counts every row of Table 4 for `base` with that row's p and q.
///
/// # Errors
/// [`crate::Error::Usage`] for an invalid configuration.
pub fn table(base: &ModelConfig) -> Result<Markdown> {
    let giga = |flops: u64| format!("{:.2}", flops as f64 / 1e9);
    let row = |paper: &super::paper::Depth| {
        let config = ModelConfig { p: paper.p, q: paper.q, ..base.clone() };
        let counted = summarise(&config, 1, SIZE.1, SIZE.0)?;
        Ok(vec![
            paper.p.to_string(),
            paper.q.to_string(),
            grouped(counted.parameters as u64),
            format!("{}K", paper.parameters_k),
            giga(counted.flops_as_executed),
            giga(counted.flops_as_published),
            paper.gflops.map_or(UNKNOWN.into(), |g| format!("{g:.2}")),
        ])
    };
    let header = [
        "p",
        "q",
        "parameters",
        "paper",
        "GFLOPs as executed",
        "GFLOPs as published",
        "paper GFLOPs",
    ];
    Ok(Markdown {
        title: "Table 4: blocks of stages 2 and 3".into(),
        notes: vec![format!(
            "Counted from the model alone: {} classes, {}x{} for the FLOPs.",
            base.classes, SIZE.0, SIZE.1
        )],
        header: header.map(String::from).into(),
        rows: TABLE_4.iter().map(row).collect::<Result<_>>()?,
        remarks: vec![
            "FLOPs are multiply-accumulates of convolutions, two per batch-norm output, one per \
             activation output and one per bias addition. As published: the decoder's high-level \
             1x1 convolutions counted behind the upsampling, as the paper's Table 7 does; as \
             executed: before it. The paper's FLOPs here are of another decoder (SPEC, \"Totals \
             that must come out\"), so they need not agree. A dash: not on record in this project."
                .into(),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_agree_with_the_papers_when_cut_to_thousands() {
        let table = table(&ModelConfig::default()).unwrap();
        assert_eq!(table.rows.len(), 6);
        for row in &table.rows {
            let counted: usize = row[2].replace(',', "").parse().unwrap();
            assert_eq!(format!("{}K", counted / 1000), row[3], "{row:?}");
        }
        let full = &table.rows[3];
        assert_eq!(
            (full[4].as_str(), full[5].as_str(), full[6].as_str()),
            ("5.23", "5.64", "4.98")
        );
    }
}
