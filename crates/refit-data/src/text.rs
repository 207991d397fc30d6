//! Plain text as a stream of tokens, cut into windows.
//!
//! This is the protocol of `refit eval`: files are concatenated byte for byte,
//! tokenized as one text with no special tokens, and cut into consecutive windows
//! that do not overlap. Perplexities are comparable only under one protocol.

use crate::{Error, Result, Tokenizer, file};
use std::path::Path;

/// The files' texts one after another, nothing in between; a byte order mark at
/// the start of a file is dropped.
///
/// # Errors
/// A file that is missing or not UTF-8 (with the byte offset), or no text at all.
pub fn concatenate<P: AsRef<Path>>(paths: &[P]) -> Result<String> {
    let mut text = String::new();
    for path in paths {
        text.push_str(&file::read_text(path.as_ref())?);
    }
    if text.trim().is_empty() {
        let names: Vec<_> = paths.iter().map(|p| p.as_ref().display().to_string()).collect();
        let names = if names.is_empty() { "no file".into() } else { names.join(", ") };
        return Err(Error::Invalid(format!("{names}: no text; pass a file with some in it")));
    }
    Ok(text)
}

/// A tokenized text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextStream {
    /// Ids without special tokens.
    pub ids: Vec<u32>,
}

impl TextStream {
    /// Tokenizes `text`.
    ///
    /// # Errors
    /// Fewer than two tokens: nothing to predict.
    pub fn new(tokenizer: &Tokenizer, text: &str) -> Result<Self> {
        let ids = tokenizer.encode(text, false)?;
        if ids.len() < 2 {
            let message = format!(
                "the text has {} tokens; at least 2 are needed to predict one from another",
                ids.len()
            );
            return Err(Error::Invalid(message));
        }
        Ok(TextStream { ids })
    }

    /// Tokenizes [`concatenate`]d files.
    ///
    /// # Errors
    /// As `concatenate` and [`TextStream::new`].
    pub fn from_files<P: AsRef<Path>>(tokenizer: &Tokenizer, paths: &[P]) -> Result<Self> {
        Self::new(tokenizer, &concatenate(paths)?)
    }

    /// The first `max_tokens`.
    pub fn truncate(&mut self, max_tokens: usize) {
        self.ids.truncate(max_tokens);
    }

    /// Consecutive windows of `window` tokens for a model that reads at most
    /// `context` of them.
    ///
    /// # Errors
    /// As [`windows`].
    pub fn windows(&self, window: usize, context: Option<usize>) -> Result<Vec<&[u32]>> {
        windows(&self.ids, window, context)
    }
}

/// Consecutive, non-overlapping windows of `ids`. The last one may be shorter; a
/// single leftover token is dropped, because nothing in its window predicts it.
///
/// # Errors
/// A window of fewer than two tokens or beyond `context`; fewer than two ids.
pub fn windows(ids: &[u32], window: usize, context: Option<usize>) -> Result<Vec<&[u32]>> {
    if window < 2 {
        let message = format!("a window of {window} tokens predicts nothing; use at least 2");
        return Err(Error::Invalid(message));
    }
    if let Some(context) = context.filter(|c| window > *c) {
        let message = format!(
            "a window of {window} tokens is larger than the model's context of {context}; use --window {context} or less"
        );
        return Err(Error::Invalid(message));
    }
    if ids.len() < 2 {
        return Err(Error::Invalid(format!("{} tokens; at least 2 are needed", ids.len())));
    }
    Ok(ids.chunks(window).filter(|w| w.len() >= 2).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn files_are_joined_without_a_seam() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, "\u{feff}one ").unwrap();
        std::fs::write(&b, "two\n").unwrap();
        assert_eq!(concatenate(&[&a, &b]).unwrap(), "one two\n");
        std::fs::write(&b, b"tw\xff").unwrap();
        let error = concatenate(&[&a, &b]).unwrap_err().to_string();
        assert!(error.contains("b: not valid UTF-8 at byte 2"), "{error}");
        std::fs::write(&a, " \n").unwrap();
        assert!(concatenate(&[&a]).unwrap_err().to_string().contains("no text"));
        let missing = concatenate(&[dir.path().join("zzz")]).unwrap_err().to_string();
        assert!(missing.contains("zzz"), "{missing}");
    }

    #[test]
    fn bad_windows_say_what_would_do() {
        let message = |w, c| windows(&[1, 2, 3], w, c).unwrap_err().to_string();
        assert!(message(2048, Some(1024)).contains("--window 1024 or less"));
        assert!(message(1, None).contains("at least 2"));
        assert!(windows(&[1], 4, None).is_err());
    }

    proptest! {
        #[test]
        fn windows_cover_the_text_once(n in 2usize..300, window in 2usize..40) {
            let ids: Vec<u32> = (0..n as u32).collect();
            let cut = windows(&ids, window, None).unwrap();
            let joined: Vec<u32> = cut.concat();
            prop_assert!(ids.starts_with(&joined));
            prop_assert!(n - joined.len() <= 1);
            prop_assert!(cut.iter().all(|w| (2..=window).contains(&w.len())));
        }
    }
}
