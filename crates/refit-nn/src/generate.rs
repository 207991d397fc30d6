//! Generation: greedy, temperature, top-k and top-p sampling with a cache.

use std::time::Instant;

use crate::cache::Cache;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::ops;
use crate::run::Run;

/// How the next token is chosen and when generation ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// 0: always the likeliest token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Sample among the `k` likeliest tokens; 0: all.
    pub top_k: usize,
    /// Sample among the likeliest tokens that together hold this probability; 1: all.
    pub top_p: f32,
    /// Seed of the sampler.
    pub seed: u64,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            stop: Vec::new(),
        }
    }
}

/// What was generated, and how fast.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// New tokens, without the stop token.
    pub tokens: Vec<u32>,
    /// Seconds from the start to the first token.
    pub first_token_seconds: f64,
    /// Tokens per second after the first one; 0 if there was no second.
    pub tokens_per_second: f64,
    /// True when a stop token ended it.
    pub stopped: bool,
}

/// Continues `prompt`; `on_token` sees every token and may end the text by returning `false`.
///
/// # Errors
/// An empty prompt, ids outside the vocabulary, a prompt and continuation longer than the context, logits that are not finite.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    options: &Options,
    mut on_token: impl FnMut(u32) -> bool,
) -> Result<Generation> {
    let context = model.config().context;
    if prompt.len() + options.max_new_tokens > context {
        return Err(Error::Context { requested: prompt.len() + options.max_new_tokens, context });
    }
    let mut cache = Cache::new();
    let mut sampler = Sampler::new(options);
    let mut tokens: Vec<u32> = Vec::new();
    let mut stopped = false;
    let start = Instant::now();
    let mut first = start;
    let mut last = start;
    while tokens.len() < options.max_new_tokens {
        let input = match tokens.last() {
            Some(token) => std::slice::from_ref(token),
            None => prompt,
        };
        let logits = model.next(input, 1, &mut Run::cached(&mut cache))?;
        let token = ops::with_values(&logits, |row| sampler.choose(row))?;
        last = Instant::now();
        if tokens.is_empty() {
            first = last;
        }
        if options.stop.contains(&token) {
            stopped = true;
            break;
        }
        tokens.push(token);
        if !on_token(token) {
            break;
        }
    }
    let decoded = (tokens.len() + usize::from(stopped)).saturating_sub(1);
    let seconds = (last - first).as_secs_f64();
    let tokens_per_second =
        if decoded > 0 && seconds > 0.0 { decoded as f64 / seconds } else { 0.0 };
    Ok(Generation {
        tokens,
        first_token_seconds: (first - start).as_secs_f64(),
        tokens_per_second,
        stopped,
    })
}

/// Chooses tokens from logits; the same seed gives the same tokens everywhere.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f32,
    top_k: usize,
    top_p: f32,
    state: u64,
}

impl Sampler {
    /// A sampler with the given options.
    pub fn new(options: &Options) -> Self {
        Self {
            temperature: options.temperature,
            top_k: options.top_k,
            top_p: options.top_p,
            state: options.seed,
        }
    }

    /// Chooses one token.
    ///
    /// # Errors
    /// A logit that is NaN or infinite: the model or its input is broken.
    pub fn choose(&mut self, logits: &[f32]) -> Result<u32> {
        if let Some(index) = logits.iter().position(|x| !x.is_finite()) {
            let message = format!(
                "logit of token {index} is {}: the model's weights or config are broken",
                logits[index]
            );
            return Err(Error::Invalid(message));
        }
        // Ties go to the lowest id.
        let best = (0..logits.len())
            .max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)))
            .unwrap_or(0);
        if self.temperature <= 0.0 {
            return Ok(best as u32);
        }
        let mut candidates: Vec<(u32, f32)> = logits
            .iter()
            .enumerate()
            .map(|(i, &x)| (i as u32, ((x - logits[best]) / self.temperature).exp()))
            .collect();
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.top_k > 0 {
            candidates.truncate(self.top_k);
        }
        let total: f32 = candidates.iter().map(|c| c.1).sum();
        let mut mass = 0.0;
        let kept = candidates.iter().position(|c| {
            mass += c.1;
            mass >= self.top_p * total
        });
        candidates.truncate(kept.map_or(candidates.len(), |k| k + 1));
        let total: f32 = candidates.iter().map(|c| c.1).sum();
        let mut left = self.uniform() * total;
        for &(token, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Ok(token);
            }
        }
        Ok(candidates.last().map_or(best as u32, |c| c.0))
    }

    /// A number in [0, 1) (SplitMix64).
    fn uniform(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampler_honours_its_options() {
        let logits = [1.0, 3.0, 3.0, -2.0];
        let greedy = Options::default();
        assert_eq!(Sampler::new(&greedy).choose(&logits).expect("finite"), 1);
        let one = Options { temperature: 1.0, top_k: 1, ..greedy.clone() };
        assert_eq!(Sampler::new(&one).choose(&logits).expect("finite"), 1);
        let nucleus = Options { temperature: 1.0, top_p: 0.8, seed: 7, ..greedy.clone() };
        let mut sampler = Sampler::new(&nucleus);
        let mut seen = [0; 4];
        for _ in 0..200 {
            seen[sampler.choose(&logits).expect("finite") as usize] += 1;
        }
        assert_eq!((seen[0], seen[3]), (0, 0));
        assert!(seen[1] > 60 && seen[2] > 60);
        assert!(Sampler::new(&greedy).choose(&[0.0, f32::NAN]).is_err());
    }
}
