//! Textual inversion (Gal et al. 2022, arXiv:2208.01618): a word of a prompt stands for vectors that training found.
//!
//! Reads the files of diffusers, of the A1111 web UI and of SDXL trainers, and puts the vectors into the table of a
//! text encoder. That the word becomes their ids is the tokenizer's part.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{AdapterFile, first_names};
use crate::Result;

/// The A1111 name of the vectors.
const VECTORS: &str = "emb_params";

/// The A1111 beginning of names in files converted from its older format.
const OLD_VECTORS: &str = "string_to_param";

/// One table of vectors for each of SDXL's text encoders.
const PAIR: [&str; 2] = ["clip_l", "clip_g"];

/// A word and the vectors it stands for.
#[derive(Clone, Debug)]
pub struct TextualInversion {
    /// The word.
    pub token: String,
    /// The tables in the file, each `(vectors, features)` for the text encoder of as many features.
    tables: Vec<Tensor>,
    file: AdapterFile,
}

impl TextualInversion {
    /// Reads a file. Without a `token`, the word is the one diffusers wrote into the file, or else the file's name.
    pub fn read(file: &AdapterFile, token: Option<&str>) -> Result<Self> {
        let (own_token, tables) = tables(file.read()?, token).map_err(|reason| file.bad(reason))?;
        let stem = || file.path().file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let token = token.map(str::to_owned).or(own_token).or_else(stem).unwrap_or_default();
        if token.trim() != token || token.is_empty() || token.contains(char::is_whitespace) {
            return Err(file.bad(format!("the word `{token}` must not be empty or hold blanks; set another `token`")));
        }
        let tables =
            tables.into_iter().map(|table| rows(table).ok_or_else(|| file.bad(SHAPE))).collect::<Result<_>>()?;
        Ok(Self { token, tables, file: file.clone() })
    }

    /// The vectors for a text encoder with `width` features, `(vectors, width)`.
    pub fn vectors(&self, width: usize) -> Option<&Tensor> {
        self.tables.iter().find(|table| table.dims().last() == Some(&width))
    }

    /// The widths the file has vectors of, for messages.
    pub fn widths(&self) -> Vec<usize> {
        self.tables.iter().filter_map(|table| table.dims().last().copied()).collect()
    }

    /// Where it was read from.
    pub fn file(&self) -> &AdapterFile {
        &self.file
    }
}

/// `table` `(words, features)` with `vectors` `(n, features)` as rows `first..first + n`, in the type and on the device
/// of `table`.
pub(crate) fn extended(table: &Tensor, vectors: &Tensor, first: usize) -> Result<Tensor> {
    let vectors = vectors.to_device(table.device())?.to_dtype(table.dtype())?;
    let (words, features) = table.dims2()?;
    let end = first + vectors.dim(0)?;
    let before = table.narrow(0, 0, first.min(words))?;
    let gap = Tensor::zeros((first.saturating_sub(words), features), table.dtype(), table.device())?;
    let after = table.narrow(0, end.min(words), words.saturating_sub(end))?;
    let parts: Vec<&Tensor> = [&before, &gap, &vectors, &after].into_iter().filter(|part| part.dims()[0] > 0).collect();
    Ok(Tensor::cat(&parts, 0)?)
}

const SHAPE: &str = "its vectors must be one row or a table of rows; fetch the file again";

/// The tables in a file, and the word that its format names.
fn tables(
    mut tensors: BTreeMap<String, Tensor>,
    token: Option<&str>,
) -> std::result::Result<(Option<String>, Vec<Tensor>), String> {
    let pair: Vec<Tensor> = PAIR.iter().filter_map(|name| tensors.remove(*name)).collect();
    if !pair.is_empty() {
        return Ok((None, pair));
    }
    if let Some(table) = tensors.remove(VECTORS) {
        return Ok((None, vec![table]));
    }
    let old = tensors.keys().find(|name| name.starts_with(OLD_VECTORS)).cloned();
    if let Some(table) = old.and_then(|name| tensors.remove(&name)) {
        return Ok((None, vec![table]));
    }
    if let Some(table) = token.and_then(|token| tensors.remove(token)) {
        return Ok((None, vec![table]));
    }
    let names: Vec<String> = tensors.keys().cloned().collect();
    match (tensors.pop_first(), tensors.len()) {
        (Some((name, table)), 0) if table.rank() <= 2 => Ok((Some(name), vec![table])),
        (None, _) => Err("holds no tensor; fetch the file again".into()),
        _ => Err(format!(
            "is no textual inversion, or one of several words ({}); name the word as `token`, or another file",
            first_names(&names)
        )),
    }
}

/// One vector or a table of them, as a table.
fn rows(table: Tensor) -> Option<Tensor> {
    let table = if table.rank() == 1 { table.unsqueeze(0).ok()? } else { table };
    (table.rank() == 2 && table.elem_count() > 0 && table.dtype().is_float()).then_some(table)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn tensors(shapes: &[(&str, &[usize])]) -> BTreeMap<String, Tensor> {
        let tensor = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("zeros");
        shapes.iter().map(|(name, shape)| ((*name).to_owned(), tensor(shape))).collect()
    }

    /// The word a file names and the shapes of its tables as rows.
    fn read(shapes: &[(&str, &[usize])], token: Option<&str>) -> Result<(Option<String>, Vec<Vec<usize>>), String> {
        let (own, tables) = tables(tensors(shapes), token)?;
        Ok((own, tables.into_iter().filter_map(rows).map(|table| table.dims().to_vec()).collect()))
    }

    #[test]
    fn the_formats_of_diffusers_a1111_and_sdxl_are_read() {
        assert_eq!(read(&[("<cat>", &[768])], None), Ok((Some("<cat>".into()), vec![vec![1, 768]])));
        assert_eq!(read(&[("<cat>", &[768])], Some("<dog>")).map(|(_, tables)| tables), Ok(vec![vec![1, 768]]));
        assert_eq!(read(&[("emb_params", &[3, 768])], None), Ok((None, vec![vec![3, 768]])));
        assert_eq!(read(&[("string_to_param.*", &[2, 768])], None), Ok((None, vec![vec![2, 768]])));
        let pair = read(&[("clip_g", &[2, 1280]), ("clip_l", &[2, 768])], None);
        assert_eq!(pair, Ok((None, vec![vec![2, 768], vec![2, 1280]])));
        assert_eq!(read(&[("<a>", &[8]), ("<b>", &[2, 8])], Some("<b>")), Ok((None, vec![vec![2, 8]])));
    }

    #[test]
    fn files_that_are_something_else_are_refused() {
        assert!(read(&[], None).is_err());
        assert!(read(&[("<a>", &[8]), ("<b>", &[8])], None).expect_err("two words").contains("`<a>`, `<b>`"));
        assert!(read(&[("conv.weight", &[8, 8, 3, 3])], None).is_err());
    }

    #[test]
    fn vectors_are_appended_or_put_where_a_padded_table_has_room() {
        let table = Tensor::new(&[[1f32], [2.0], [3.0]], &Device::Cpu).expect("a table");
        let vectors = Tensor::new(&[[8f32], [9.0]], &Device::Cpu).expect("a table");
        let column = |first| -> Vec<f32> {
            let table = extended(&table, &vectors, first).expect("the widths agree");
            table.flatten_all().and_then(|table| table.to_vec1()).expect("f32")
        };
        assert_eq!(column(3), [1.0, 2.0, 3.0, 8.0, 9.0]);
        assert_eq!(column(4), [1.0, 2.0, 3.0, 0.0, 8.0, 9.0]);
        assert_eq!(column(0), [8.0, 9.0, 3.0]);
    }
}
