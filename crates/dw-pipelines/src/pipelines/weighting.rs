//! Weighted prompts to embeddings: chunks of token ids, and what weights do to the encoder's states.
//!
//! A prompt is encoded in chunks, each with its own begin and end mark, whose states follow each other on the
//! token axis. `BREAK` starts a new chunk (one at the start, at the end or after another has nothing to separate
//! and changes nothing). All prompts of a call have equally many chunks; what is missing is filled with empty
//! ones. Each token's state is multiplied with its weight, and then each chunk of each prompt is scaled so that
//! its mean is what it was (as AUTOMATIC1111's "Original" emphasis). The pooled state is the first chunk's,
//! without weights.
//!
//! A T5 encoder has no chunks: all pieces follow each other up to the length of the call, `BREAK` only parts them, and
//! weights act as they do there.

use candle_core::{D, DType, Tensor};

use super::{
    prompt::{TextEncoder, Truncations},
    t5_prompt::T5Encoder,
    text_to_image::refuse,
};
use crate::{
    Result,
    models::ClipTextOutput,
    text::{
        ClipTokenizer,
        weighting::{Piece, parse},
    },
};

/// The states of prompts that were encoded in chunks.
pub(crate) struct Encoded {
    /// `(prompts, chunks * tokens, features)`.
    pub(crate) states: Tensor,
    /// The first chunk's pooled and projected state, `(prompts, features)`, where the encoder has one.
    pub(crate) pooled: Option<Tensor>,
}

/// How many chunks every prompt of a call is encoded in; at least one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunks(usize);

impl Default for Chunks {
    fn default() -> Self {
        Self(1)
    }
}

impl Chunks {
    /// As many chunks as the longest of `texts` needs. Errors name the argument `name`.
    pub(crate) fn make_room(&mut self, name: &str, texts: &[String], tokenizer: &ClipTokenizer) -> Result<()> {
        for text in texts {
            let pieces = parse(text).map_err(|error| refuse(name, error.to_string()))?;
            self.0 = self.0.max(chunked(&pieces, tokenizer)?.len());
        }
        Ok(())
    }
}

/// Token ids between the marks, with their weights.
#[derive(Clone, Debug, Default, PartialEq)]
struct Chunk {
    ids: Vec<u32>,
    weights: Vec<f32>,
}

/// The chunks of a prompt; none for a prompt without tokens.
fn chunked(pieces: &[Piece], tokenizer: &ClipTokenizer) -> Result<Vec<Chunk>> {
    let room = tokenizer.room().max(1);
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut is_open = false;
    for piece in pieces {
        if piece.is_break {
            is_open = false;
            continue;
        }
        for id in tokenizer.ids(&piece.text)? {
            if !is_open || chunks.last().is_none_or(|chunk| chunk.ids.len() == room) {
                chunks.push(Chunk::default());
                is_open = true;
            }
            if let Some(chunk) = chunks.last_mut() {
                chunk.ids.push(id);
                chunk.weights.push(piece.weight as f32);
            }
        }
    }
    Ok(chunks)
}

impl TextEncoder<'_> {
    /// What the encoder says about each text, read as weighted; `state` picks the state that counts.
    pub(crate) fn encode_weighted(
        &self,
        texts: &[String],
        chunks: Chunks,
        state: &dyn Fn(&ClipTextOutput) -> Result<Tensor>,
    ) -> Result<Encoded> {
        let mut prompts = Vec::with_capacity(texts.len());
        for text in texts {
            let pieces = parse(text).map_err(|error| refuse("prompt", error.to_string()))?;
            let mut of_prompt = chunked(&pieces, self.tokenizer)?;
            of_prompt.resize(chunks.0.max(of_prompt.len()), Chunk::default());
            prompts.push(of_prompt);
        }
        let (mut states, mut pooled) = (Vec::with_capacity(chunks.0), None);
        for at in 0..chunks.0 {
            let rows: Vec<&Chunk> = prompts.iter().map(|of_prompt| &of_prompt[at]).collect();
            let output = self.encode_chunks(&rows)?;
            let weights: Vec<&[f32]> = rows.iter().map(|chunk| chunk.weights.as_slice()).collect();
            states.push(weighted(&state(&output)?, &weights, 1)?);
            pooled = pooled.or(output.text_embeds);
        }
        Ok(Encoded { states: Tensor::cat(&states, 1)?, pooled })
    }

    /// The pooled state of each text, read as weighted: its first chunk's, without weights. `(texts, hidden)`.
    pub(crate) fn pooled_unweighted(&self, texts: &[String]) -> Result<Tensor> {
        let mut firsts = Vec::with_capacity(texts.len());
        for text in texts {
            let pieces = parse(text).map_err(|error| refuse("prompt", error.to_string()))?;
            firsts.push(chunked(&pieces, self.tokenizer)?.into_iter().next().unwrap_or_default());
        }
        Ok(self.encode_chunks(&firsts.iter().collect::<Vec<_>>())?.pooled)
    }

    fn encode_chunks(&self, rows: &[&Chunk]) -> Result<ClipTextOutput> {
        let ids: Vec<u32> = rows.iter().flat_map(|chunk| self.tokenizer.framed(&chunk.ids)).collect();
        let ids = Tensor::from_vec(ids, (rows.len(), self.tokenizer.max_length()), self.model.device())?;
        self.model.forward(&ids)
    }
}

impl T5Encoder<'_> {
    /// The states of `length` tokens of each text, read as weighted: `(texts, length, features)`.
    pub(crate) fn encode_weighted(
        &self,
        texts: &[String],
        length: usize,
        truncations: &mut Truncations<'_>,
    ) -> Result<Tensor> {
        let room = length.saturating_sub(1);
        let (mut rows, mut weights) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
        for text in texts {
            let mut whole = Chunk::default();
            for piece in parse(text).map_err(|error| refuse("prompt", error.to_string()))? {
                if !piece.is_break {
                    let ids = self.tokenizer.ids(&piece.text)?;
                    whole.weights.extend(ids.iter().map(|_| piece.weight as f32));
                    whole.ids.extend(ids);
                }
            }
            if let Some(lost) = whole.ids.get(room..).filter(|lost| !lost.is_empty()) {
                truncations.tell(self.tokenizer.text_of(lost)?, length);
            }
            whole.weights.truncate(room);
            rows.push(self.tokenizer.framed(&whole.ids, length));
            weights.push(whole.weights);
        }
        let weights: Vec<&[f32]> = weights.iter().map(Vec::as_slice).collect();
        weighted(&self.states(&rows, length)?, &weights, 0)
    }
}

/// `states` `(prompts, tokens, features)` times the tokens' weights, of which the first belongs to token `first`, with
/// each prompt's mean restored. States whose weights are all 1 stay as they are, to the bit.
fn weighted(states: &Tensor, weights: &[&[f32]], first: usize) -> Result<Tensor> {
    if weights.iter().all(|weights| weights.iter().all(|&weight| weight == 1.0)) {
        return Ok(states.clone());
    }
    let row = |(row, weights): (usize, &&[f32])| weighted_row(&states.narrow(0, row, 1)?, weights, first);
    let rows = weights.iter().enumerate().map(row).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&rows, 0)?)
}

/// One row of [`weighted`]. Marks and padding weigh 1.
fn weighted_row(states: &Tensor, weights: &[f32], first: usize) -> Result<Tensor> {
    if weights.iter().all(|&weight| weight == 1.0) {
        return Ok(states.clone());
    }
    let mut all = vec![1.0f32; states.dim(1)?];
    for (place, &weight) in all.iter_mut().skip(first).zip(weights) {
        *place = weight;
    }
    let weights = Tensor::from_vec(all, (1, states.dim(1)?, 1), states.device())?;
    let wide = states.to_dtype(DType::F32)?;
    let scaled = wide.broadcast_mul(&weights)?;
    let mean = |tensor: &Tensor| tensor.flatten_all()?.mean(D::Minus1)?.to_scalar::<f32>();
    let ratio = f64::from(mean(&wide)? / mean(&scaled)?);
    // Weights that cancel each other leave no mean to restore.
    let restored = if ratio.is_finite() { (scaled * ratio)? } else { scaled };
    Ok(restored.to_dtype(states.dtype())?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;

    use super::*;
    use crate::text::TokenizerFiles;

    fn tokenizer() -> ClipTokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/parity/models/sdxl/tokenizer");
        let read = |name: &str| fs_err::read_to_string(folder.join(name)).ok();
        let json = |name: &str| read(name).and_then(|text| serde_json::from_str(&text).ok());
        let files = TokenizerFiles {
            place: folder.clone(),
            tokenizer: json("tokenizer.json"),
            vocab: json("vocab.json"),
            merges: read("merges.txt"),
            config: json("tokenizer_config.json"),
            special_tokens_map: json("special_tokens_map.json"),
        };
        ClipTokenizer::new(&files).expect("the tokenizer is complete")
    }

    fn chunks_of(prompt: &str) -> Vec<Chunk> {
        chunked(&parse(prompt).expect("valid syntax"), &tokenizer()).expect("text can be tokenized")
    }

    #[test]
    fn a_short_prompt_is_one_chunk_with_marks_around_it() {
        let tokenizer = tokenizer();
        let ids = tokenizer.ids("a").expect("text can be tokenized");
        let framed = tokenizer.framed(&ids);
        assert_eq!(framed, tokenizer.encode("a").expect("text can be tokenized").ids);
        assert_eq!(framed.len(), 77);
        assert_eq!(chunks_of("a").len(), 1);
    }

    #[test]
    fn long_prompts_are_cut_every_75_tokens_and_breaks_start_chunks() {
        let one = chunks_of("a")[0].ids.len();
        let lengths = |prompt: &str| chunks_of(prompt).iter().map(|chunk| chunk.ids.len()).collect::<Vec<_>>();
        assert_eq!(one, 1);
        assert_eq!(lengths(&"a ".repeat(75)), [75]);
        assert_eq!(lengths(&"a ".repeat(80)), [75, 5]);
        assert_eq!(lengths("a a BREAK a"), [2, 1]);
        assert_eq!(lengths(&format!("{} BREAK a", "a ".repeat(75))), [75, 1]);
        assert_eq!(lengths("BREAK a BREAK BREAK a a BREAK"), [1, 2]);
        assert!(lengths("").is_empty());
        assert_eq!(chunks_of("a (a:1.5)")[0].weights, [1.0, 1.5]);
    }

    #[test]
    fn weights_scale_tokens_and_leave_the_mean() {
        let states = Tensor::from_vec((1..=8).map(|i| i as f32).collect(), (1, 4, 2), &Device::Cpu).expect("fits");
        let scaled = weighted(&states, &[&[2.0, 1.0]], 1).expect("fits").flatten_all().expect("flat");
        let scaled = scaled.to_vec1::<f32>().expect("floats");
        let mean = scaled.iter().sum::<f32>() / 8.0;
        assert!((mean - 4.5).abs() < 1e-5, "{mean}");
        assert!((scaled[2] / scaled[0] - 6.0).abs() < 1e-5, "{scaled:?}");
        assert!((scaled[4] / scaled[0] - 5.0).abs() < 1e-5, "{scaled:?}");
    }

    #[test]
    fn weights_of_one_change_no_bit_and_prompts_do_not_mix() {
        let states = Tensor::from_vec((0..16).map(|i| (i as f32).cos()).collect(), (2, 4, 2), &Device::Cpu);
        let states = states.expect("fits");
        let (plain, strong): (&[f32], &[f32]) = (&[1.0], &[1.4]);
        let rows = |tensor: &Tensor| tensor.to_vec3::<f32>().expect("floats");
        assert_eq!(rows(&weighted(&states, &[plain, plain], 1).expect("fits")), rows(&states));
        let mixed = rows(&weighted(&states, &[plain, strong], 1).expect("fits"));
        assert_eq!(mixed[0], rows(&states)[0]);
        assert_ne!(mixed[1], rows(&states)[1]);
    }
}
