//! Datasets, tokenizers, images, splits: everything a model reads, and nothing
//! that needs a tensor engine.
//!
//! | module | what it gives |
//! |---|---|
//! | [`Tokenizer`] | text to ids and back, special ids, chat templates |
//! | [`text`] | files as one token stream, cut into windows |
//! | [`records`] | JSONL, CSV and Parquet tables, with checks |
//! | [`examples`] | what a language model is trained on: ids, and which are learned |
//! | [`classes`] | classified texts: a column of texts, a column of labels, the classes they name |
//! | [`split`] | deterministic splits that leak nothing |
//! | [`images`] | IDX, class folders, decoding, preprocessing |
//! | [`corpus`] | text corpora from installed packages, and the small held-out texts that travel with refit |
//! | [`wordnet`] | glosses, lexicographer classes, the hypernym tree |
//! | [`rng`] | the generator behind every seeded choice; its outputs never change |
//!
//! Every reader returns [`Error`], which names the file and the line or byte.

pub mod classes;
pub mod corpus;
mod error;
pub mod examples;
mod file;
mod foreign;
pub mod images;
pub mod records;
pub mod rng;
pub mod split;
pub mod text;
mod tokenizer;
pub mod wordnet;

pub use error::{Error, Result};
pub use records::Records;
pub use rng::Rng;
pub use text::TextStream;
pub use tokenizer::{
    Message, SpecialIds, StreamDecoder, Tokenizer, TokenizerFiles, TokenizerReport,
};

#[cfg(test)]
mod testing {
    /// So many cases of a property, or as many as `PROPTEST_CASES` asks for.
    pub fn cases(usual: u32) -> proptest::test_runner::Config {
        let asked = std::env::var_os("PROPTEST_CASES").is_some();
        let usual = proptest::test_runner::Config::with_cases(usual);
        if asked { proptest::test_runner::Config::default() } else { usual }
    }
}
