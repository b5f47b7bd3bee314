//! Which of a state dict's tensors is which of the network's.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::files;

/// Largest mapping file that is read.
const MAX_FILE: u64 = 1 << 24;
/// What `DataParallel`, Lightning and the like put before every name.
const PREFIXES: [&str; 2] = ["module.", "model."];

/// Their names and ours: a JSON object such as
/// `{"head.weight": "classifier.weight", "backbone.layer2.": "stage2.", "aux.": null}`.
///
/// A key that ends with a dot stands for every name that starts with it (the longest such key
/// counts, a whole name above all); null passes the tensor over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping(BTreeMap<String, Option<String>>);

impl Mapping {
    /// Reads a mapping file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Format`] for anything but an object of names.
    pub fn load(path: &Path) -> Result<Mapping> {
        let bytes = files::read_limited(path, MAX_FILE)?;
        let expected = "a JSON object of names, {\"theirs\": \"ours\"}";
        let entries: BTreeMap<String, Option<String>> = serde_json::from_slice(&bytes)
            .map_err(|e| Error::format(path, expected, e.to_string()))?;
        let uneven = |(theirs, ours): &(&String, &Option<String>)| {
            ours.as_ref().is_some_and(|ours| ours.ends_with('.') != theirs.ends_with('.'))
        };
        if let Some((theirs, Some(ours))) = entries.iter().find(uneven) {
            let expected = "a name or, with a dot at the end, a prefix on both sides";
            return Err(Error::format(path, expected, format!("\"{theirs}\": \"{ours}\"")));
        }
        Ok(Mapping(entries))
    }

    /// Our name for one of theirs: none where the mapping is silent, null as `Some(None)`.
    fn look_up(&self, theirs: &str) -> Option<Option<String>> {
        if let Some(ours) = self.0.get(theirs) {
            return Some(ours.clone());
        }
        let prefixes = self.0.iter().filter(|(key, _)| key.ends_with('.'));
        let fitting = prefixes.filter_map(|(key, ours)| Some((theirs.strip_prefix(key)?, ours)));
        let (rest, ours) = fitting.min_by_key(|(rest, _)| rest.len())?;
        Some(ours.as_ref().map(|ours| format!("{ours}{rest}")))
    }

    /// Keys that fit none of the names.
    pub(super) fn unmatched<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<String> {
        let names: Vec<&str> = names.flat_map(candidates).collect();
        let fits = |key: &str| {
            names.iter().any(|n| *n == key || (key.ends_with('.') && n.starts_with(key)))
        };
        self.0.keys().filter(|key| !fits(key)).cloned().collect()
    }
}

/// A name as it is, then without each prefix in front of it.
fn candidates(name: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(name), |name| {
        PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix))
    })
}

/// What every tensor of a state dict is.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    /// Our name to theirs.
    pub ours: BTreeMap<String, String>,
    /// Prefixes that were taken off, and how often.
    pub prefixes: BTreeMap<String, usize>,
    /// `num_batches_tracked` tensors.
    pub counters: usize,
    /// Tensors that the mapping passes over.
    pub dropped: usize,
    /// Their names that are none of ours.
    pub extra: Vec<String>,
    /// Their names for what another name stands for already.
    pub twice: Vec<String>,
}

pub(super) fn resolve<'a>(
    names: impl Iterator<Item = &'a str>,
    mapping: &Mapping,
    known: impl Fn(&str) -> bool,
) -> Resolved {
    let mut resolved = Resolved::default();
    for theirs in names {
        // The mapping is asked first, with and without prefix; then the name may be our own.
        let mapped = candidates(theirs).find_map(|name| Some((name, mapping.look_up(name)?)));
        let own = || candidates(theirs).find(|n| known(n)).map(|n| (n, Some(n.to_string())));
        match mapped.or_else(own) {
            Some((_, None)) => resolved.dropped += 1,
            Some((name, Some(ours))) if known(&ours) => {
                if let Some(first) = resolved.ours.get(&ours) {
                    resolved.twice.push(format!("{ours}: {first} and {theirs}"));
                    continue;
                }
                resolved.ours.insert(ours, theirs.to_string());
                if name.len() < theirs.len() {
                    let prefix = &theirs[..theirs.len() - name.len()];
                    *resolved.prefixes.entry(prefix.to_string()).or_default() += 1;
                }
            }
            _ if theirs.ends_with("num_batches_tracked") => resolved.counters += 1,
            Some((_, Some(ours))) => resolved.extra.push(format!("{theirs} as {ours}")),
            None => resolved.extra.push(theirs.to_string()),
        }
    }
    resolved
}
