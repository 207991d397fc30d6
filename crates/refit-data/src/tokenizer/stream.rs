use super::Tokenizer;
use crate::Result;

/// Decodes ids as they come. A piece is handed out once it is complete: half a
/// character stays inside until its other bytes arrive.
#[derive(Debug, Clone)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// `ids[..start]` are out and forgotten; `ids[start..shown]` are out but still
    /// needed, because a token's text may depend on its left neighbour.
    shown: usize,
}

/// Ids kept as left context.
const CONTEXT: usize = 8;

impl<'a> StreamDecoder<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> Self {
        StreamDecoder { tokenizer, skip_special, ids: Vec::new(), shown: 0 }
    }

    /// The text that `id` completes; often one piece, sometimes nothing.
    ///
    /// # Errors
    /// A decoder that refuses.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        self.emit(false)
    }

    /// What is left, an incomplete character included (as U+FFFD).
    ///
    /// # Errors
    /// A decoder that refuses.
    pub fn finish(mut self) -> Result<String> {
        self.emit(true)
    }

    fn emit(&mut self, all: bool) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.shown], self.skip_special)?;
        let after = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let incomplete = after.ends_with('\u{fffd}') && !all;
        let Some(new) = after.strip_prefix(&before[..]).filter(|_| !incomplete) else {
            return Ok(String::new());
        };
        let new = new.to_owned();
        let first_pending = self.ids.len();
        // Cut the context where a character ends, so that it decodes alone.
        if first_pending > 4 * CONTEXT {
            let keep = first_pending - CONTEXT;
            let tail = self.tokenizer.decode(&self.ids[keep..], self.skip_special)?;
            if !tail.starts_with('\u{fffd}') && after.ends_with(&tail) {
                self.ids.drain(..keep);
            }
        }
        self.shown = self.ids.len();
        Ok(new)
    }
}
