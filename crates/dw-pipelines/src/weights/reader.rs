//! Reads the tensors of weight files into entries: in the order of the file, converted and quantized on the host by
//! all threads, then uploaded.
//!
//! What files can claim is checked by [`super::file`]; which file to read is decided by [`super::folder`].

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::{
    Entry, decode,
    file::{Encoding, WeightFile, bad_file},
    logical::{Logical, TensorFiles},
    single_file::{Change, CheckpointPart},
};
use crate::{
    Result,
    quant::{Scheme, Weight},
};

/// How many bytes of a file are read together: enough work for all threads, little enough for progress to be seen.
const BATCH: u64 = 64 << 20;

/// What tensors become and where they go.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    /// The type of floating point values.
    pub(super) dtype: DType,
    pub(super) device: &'a Device,
    /// How the weights of layers are stored, where that is to be changed.
    pub(super) scheme: Option<&'a Scheme>,
}

/// A tensor to be read, and what becomes of it.
struct Job<'a> {
    name: &'a str,
    tensor: &'a Logical,
    /// Names in the model, with what is done on the way there.
    places: Vec<(String, Change)>,
}

/// Reads every tensor of `files` into `entries`. `progress` hears of the bytes read so far after each.
pub(super) fn read_all(
    files: &TensorFiles<'_>,
    target: &Target<'_>,
    progress: &mut dyn FnMut(u64) -> Result<()>,
    entries: &mut HashMap<String, Entry>,
) -> Result<()> {
    let job = |(name, tensor): (&'_ String, &'_ Logical)| (name.clone(), tensor.position());
    let mut order: Vec<(String, (usize, usize))> = files.tensors().iter().map(job).collect();
    // In file order, so that a cold disk is read from front to back.
    order.sort_by_key(|(_, position)| *position);
    let jobs = order.iter().map(|(name, _)| {
        let tensor = &files.tensors()[name];
        Job { name, tensor, places: vec![(name.clone(), Change::None)] }
    });
    read_jobs(files, &jobs.collect::<Vec<_>>(), target, progress, entries)
}

/// Reads the tensors of one component of a checkpoint into `entries`, each under its canonical name, and gives the
/// names of those that have no place in the model.
pub(super) fn read_part(
    part: &CheckpointPart,
    target: &Target<'_>,
    progress: &mut dyn FnMut(u64) -> Result<()>,
    entries: &mut HashMap<String, Entry>,
) -> Result<Vec<String>> {
    let (mut passed_over, mut jobs) = (Vec::new(), Vec::new());
    for reading in part.readings()? {
        if reading.targets.is_empty() {
            passed_over.push(reading.name.to_owned());
        }
        let places = reading.targets.into_iter().map(|place| (place.name, place.change)).collect();
        jobs.push(Job { name: reading.name, tensor: reading.tensor, places });
    }
    read_jobs(part.files(), &jobs, target, progress, entries)?;
    Ok(passed_over)
}

fn read_jobs(
    files: &TensorFiles<'_>,
    jobs: &[Job<'_>],
    target: &Target<'_>,
    progress: &mut dyn FnMut(u64) -> Result<()>,
    entries: &mut HashMap<String, Entry>,
) -> Result<()> {
    let origins: HashMap<&Path, Arc<str>> =
        files.files().iter().map(|file| (file.path(), file.path().display().to_string().into())).collect();
    let (mut rest, mut read) = (jobs, 0);
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |job: &&Job<'_>| {
            bytes += job.tensor.bytes();
            bytes <= BATCH
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (batch, later) = rest.split_at(count);
        let settled = batch.par_iter().map(|job| job.run(files, target)).collect::<Result<Vec<_>>>()?;
        for (job, weights) in batch.iter().zip(settled) {
            let origin = &origins[files.path(job.tensor)];
            for (name, weight) in weights {
                entries.insert(name, Entry::held(weight.to_device(target.device)?, origin));
            }
            read += job.tensor.bytes();
            progress(read)?;
        }
        rest = later;
    }
    Ok(())
}

impl Job<'_> {
    /// The weights it becomes, in host memory.
    fn run(&self, files: &TensorFiles<'_>, target: &Target<'_>) -> Result<Vec<(String, Weight)>> {
        if self.places.is_empty() {
            return Ok(Vec::new());
        }
        // What will be quantized is read as it is stored.
        let is_quantized = |(name, change): &(String, Change)| {
            let dims = change.shape(self.tensor.shape()).unwrap_or_default();
            target.scheme.is_some_and(|scheme| scheme.format.is_some() && scheme.covers(name, &dims))
        };
        let dtype = if self.places.iter().any(is_quantized) { None } else { Some(target.dtype) };
        let stored = files.read(self.name, self.tensor, dtype)?;
        // The file does not stay in memory beside what was read of it.
        files.forget(self.tensor);
        let settle = |(name, change): &(String, Change)| Ok((name.clone(), settle(&stored, name, *change, target)?));
        self.places.iter().map(settle).collect()
    }
}

/// A weight under its name in the model, changed on the way there as it must be, quantized if it is to be, else in the
/// type where it is used; in host memory.
pub(super) fn settle(stored: &Weight, name: &str, change: Change, target: &Target<'_>) -> Result<Weight> {
    let weight = change.apply(stored)?;
    let weight = match target.scheme {
        Some(scheme) => scheme.apply(name, weight)?,
        None => weight,
    };
    weight.to_dtype(target.dtype)
}

/// Every tensor of a safetensors file as it is stored, on the host: small files that change a model.
pub(crate) fn read_stored(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let file = WeightFile::open(path)?;
    let read = |(name, record): (&String, &super::file::Record)| {
        let Encoding::Plain(stored) = record.encoding else {
            return Err(bad_file(path, &format!("tensor `{name}` is quantized; use the file as safetensors")));
        };
        Ok((name.clone(), decode::tensor(name, stored, &record.shape, file.data(record), None, path)?))
    };
    file.records().iter().map(read).collect()
}

/// The text that a file holds beside its tensors, by key.
pub(crate) fn read_metadata(path: &Path) -> Result<HashMap<String, String>> {
    Ok(WeightFile::open(path)?.metadata().clone())
}

/// The names of the tensors of a file, read from its header.
pub(crate) fn read_names(path: &Path) -> Result<Vec<String>> {
    Ok(WeightFile::open(path)?.records().keys().cloned().collect())
}
