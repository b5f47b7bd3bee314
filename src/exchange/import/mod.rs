//! PyTorch's weights: a state dict saved as safetensors or as npz becomes a parameter table.
//!
//! ```python
//! safetensors.torch.save_file(model.state_dict(), "weights.safetensors")
//! numpy.savez("weights.npz", **{k: v.cpu().numpy() for k, v in model.state_dict().items()})
//! ```

mod archive;
mod names;

use std::collections::BTreeMap;
use std::path::Path;

pub use archive::{Weights, read_bytes};
pub use names::Mapping;

use crate::error::{Error, Result};
use crate::graph::{ParamRole, ParamSpec, ParamStore};
use crate::model::tensors::dimensions;

/// Names that a message lists before it only counts.
const LISTED: usize = 6;

/// A state dict as a parameter table.
#[derive(Debug, Clone, PartialEq)]
pub struct Imported {
    /// Every parameter of the network.
    pub params: ParamStore,
    /// What was done besides copying, in words: prefixes taken off, types converted, counters and
    /// dropped tensors passed over.
    pub notes: Vec<String>,
}

/// Classes of the network that a state dict is of: the rows of its classifier, where it has one.
///
/// # Errors
/// As [`import`] for a classifier that cannot be read.
pub fn classes(weights: &Weights, mapping: &Mapping) -> Result<Option<usize>> {
    let resolved = names::resolve(weights.names(), mapping, |name| name == "classifier.weight");
    match resolved.ours.get("classifier.weight") {
        Some(theirs) => Ok(weights.tensor(theirs)?.shape.first().copied()),
        None => Ok(None),
    }
}

/// Fills a parameter table from a state dict. Tensors are found under the SPEC's names, under
/// what `mapping` calls them, and behind the prefixes `module.` and `model.` that wrappers add;
/// `num_batches_tracked` counters are passed over. f16, bf16 and f64 become f32.
///
/// # Errors
/// [`Error::Format`] that names in one line every tensor that is missing, not the network's, of
/// another shape or type, or given twice; or the first that is not finite.
pub fn import(weights: &Weights, specs: &[ParamSpec], mapping: &Mapping) -> Result<Imported> {
    let known = |name: &str| specs.iter().any(|spec| spec.name == name);
    let resolved = names::resolve(weights.names(), mapping, known);

    let mut faults = Faults::default();
    let mut store = ParamStore::zeros(specs);
    let mut converted: BTreeMap<&'static str, usize> = BTreeMap::new();
    for spec in specs {
        let Some(theirs) = resolved.ours.get(&spec.name) else {
            faults.missing.push(spec.name.clone());
            continue;
        };
        let tensor = weights.tensor(theirs)?;
        let label = if *theirs == spec.name {
            theirs.clone()
        } else {
            format!("{theirs} for {}", spec.name)
        };
        if tensor.shape != spec.shape {
            let (found, expected) = (dimensions(&tensor.shape), dimensions(&spec.shape));
            faults.shape.push(format!("{label}: {found}, not {expected}"));
            continue;
        }
        check_values(weights.path(), spec, theirs, &tensor.values)?;
        if tensor.kind != "f32" {
            *converted.entry(tensor.kind).or_default() += 1;
        }
        store.values[spec.range()].copy_from_slice(&tensor.values);
    }
    faults.extra = resolved.extra;
    faults.twice = resolved.twice;
    faults.unmatched = mapping.unmatched(weights.names());
    if let Some(found) = faults.describe() {
        let hint = hint(weights.names(), specs);
        let expected = format!("the {} tensors of the network", specs.len());
        return Err(Error::format(weights.path(), expected, format!("{found}{hint}")));
    }

    let mut notes = Vec::new();
    for (prefix, count) in resolved.prefixes {
        notes.push(format!("prefix {prefix} taken off {count} names"));
    }
    for (kind, count) in converted {
        notes.push(format!("{count} tensors converted from {kind} to f32"));
    }
    if resolved.counters > 0 {
        notes.push(format!("{} num_batches_tracked passed over", resolved.counters));
    }
    if resolved.dropped > 0 {
        notes.push(format!("{} tensors passed over, as the mapping says", resolved.dropped));
    }
    Ok(Imported { params: store, notes })
}

/// Refuses NaN, infinities (those among them that an f64 becomes as f32) and negative variances.
fn check_values(path: &Path, spec: &ParamSpec, theirs: &str, values: &[f32]) -> Result<()> {
    let variance = spec.role == ParamRole::RunningVar;
    match values.iter().position(|v| !v.is_finite() || (variance && *v < 0.0)) {
        Some(i) => {
            let kind = if variance { "finite, not negative" } else { "finite" };
            let expected = format!("tensor {theirs} to hold {kind} values (as f32)");
            Err(Error::format(path, expected, format!("{} at element {i}", values[i])))
        }
        None => Ok(()),
    }
}

/// Everything that keeps a state dict from being this network's.
#[derive(Default)]
struct Faults {
    missing: Vec<String>,
    extra: Vec<String>,
    shape: Vec<String>,
    twice: Vec<String>,
    unmatched: Vec<String>,
}

impl Faults {
    fn describe(&self) -> Option<String> {
        let part = |list: &[String], kind: &str| match list.len() {
            0 => None,
            count => {
                let shown = list[..count.min(LISTED)].join(", ");
                let more = if count > LISTED { ", ..." } else { "" };
                Some(format!("{count} {kind} ({shown}{more})"))
            }
        };
        let parts = [
            part(&self.missing, "missing"),
            part(&self.extra, "that it does not have"),
            part(&self.shape, "of another shape"),
            part(&self.twice, "given twice"),
            part(&self.unmatched, "named by the mapping but not there"),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// Where the file's blocks show another depth than the network's: the switches that fit.
fn hint<'a>(found: impl Iterator<Item = &'a str>, specs: &[ParamSpec]) -> String {
    let theirs: Vec<&str> = found.collect();
    let ours: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    let mut switches = Vec::new();
    for (stage, switch) in [("stage2.", "--p"), ("stage3.", "--q")] {
        match (blocks(&theirs, stage), blocks(&ours, stage)) {
            (Some(found), Some(expected)) if found != expected => {
                switches.push(format!("{switch} {found}"));
            }
            _ => {}
        }
    }
    if switches.is_empty() {
        "; the network is set with the config switches".to_string()
    } else {
        format!("; its blocks are those of {}", switches.join(" "))
    }
}

/// Number of blocks of a stage, by the highest number in the names.
fn blocks(names: &[&str], stage: &str) -> Option<usize> {
    let number = |name: &&str| {
        let start = name.find(stage).filter(|&at| at == 0 || name[..at].ends_with('.'))?;
        name[start + stage.len()..].split('.').next()?.parse::<usize>().ok()
    };
    names.iter().filter_map(number).max()?.checked_add(1)
}

#[cfg(test)]
mod tests;
