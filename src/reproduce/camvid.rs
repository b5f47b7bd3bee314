//! Table 8: training on CamVid and evaluation on its test split.

use serde_json::Map;

use super::markdown::{Markdown, UNKNOWN, grouped, percent};
use super::paper::TABLE_8_MIOU;
use super::runs::{Finished, Job, Runs, describe};
use crate::backend::Backend;
use crate::data::{Dataset, DatasetKind};
use crate::error::{Error, Result};
use crate::evaluate::{Evaluation, evaluate};
use crate::metrics::Confusion;
use crate::model::Model;
use crate::train::Request;

/// The training run: the full network.
pub fn job() -> Job {
    Job { folder: "camvid".into(), label: "FPENet".into(), switches: Map::new() }
}

/// Opens the split that the figures are taken on, before any training.
///
/// # Errors
/// [`Error::Usage`] for data that are not CamVid's or a split that was trained on;
/// [`Error::Format`] where the split is missing, with what can be asked for instead.
pub fn test_split(request: &Request, kind: DatasetKind, split: &str) -> Result<Dataset> {
    if kind != DatasetKind::Camvid {
        return Err(Error::Usage(format!(
            "table8: expected CamVid in {}, found {kind}",
            request.data.display()
        )));
    }
    if request.splits.iter().flatten().any(|trained| trained == split) {
        return Err(Error::Usage(format!(
            "--test-split {split}: expected a split that is not trained on ({}); leave it out of \
             --splits",
            request.splits.iter().flatten().cloned().collect::<Vec<_>>().join(",")
        )));
    }
    Dataset::open(kind, &request.data, &[split.to_string()]).map_err(|error| match error {
        Error::Format { path, expected, found } => Error::Format {
            path,
            expected,
            found: format!(
                "{found}; without CamVid's {split} frames use --splits train --test-split val"
            ),
        },
        other => other,
    })
}

/// Evaluates the last weights of the run.
///
/// # Errors
/// As [`evaluate`].
pub fn measure(
    finished: &Finished,
    data: &Dataset,
    open: &mut dyn FnMut() -> Result<Box<dyn Backend>>,
    progress: &mut dyn FnMut(usize, &Confusion),
) -> Result<Evaluation> {
    let model = Model::load(&finished.folder.join("last.safetensors"))?;
    evaluate(&model, data, None, open, progress)
}

/// Table 8 with what was measured.
///
/// # Errors
/// [`Error::Usage`] for an invalid configuration.
pub fn table(
    runs: &Runs,
    request: &Request,
    data: &Dataset,
    evaluation: &Evaluation,
) -> Result<Markdown> {
    let protocol = runs.protocol(&job())?;
    let confusion = &evaluation.confusion;
    let parameters = crate::graph::Graph::fpenet(&protocol.config)?;
    let (_, trainable) = crate::graph::params::flat_len(&parameters.params);
    let mut rows: Vec<Vec<String>> = data
        .classes
        .iter()
        .zip(confusion.per_class_iou())
        .map(|(class, iou)| {
            vec![class.clone(), percent(iou.is_finite().then_some(iou)), UNKNOWN.into()]
        })
        .collect();
    let papers = format!("{TABLE_8_MIOU:.1}");
    rows.push(vec!["**mIoU**".into(), percent(Some(confusion.miou())), papers]);
    rows.push(vec![
        "**global accuracy**".into(),
        percent(Some(confusion.global_accuracy())),
        UNKNOWN.into(),
    ]);
    Ok(Markdown {
        title: "Table 8: CamVid".into(),
        notes: vec![
            describe(&protocol, runs.images(), &request.data),
            format!(
                "{} parameters; weights after the last epoch, on the {} frames of {}.",
                grouped(trainable as u64),
                evaluation.images,
                data.splits.join("+")
            ),
        ],
        header: ["class", "IoU %", "paper"].map(String::from).into(),
        rows,
        remarks: vec![
            "The paper trains for 300 epochs on train + val and measures on test. A dash: the \
             paper's figure is not on record in this project."
                .into(),
        ],
    })
}
