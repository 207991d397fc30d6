//! The packed form: signs as bits, scales as signed exponents.
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `X.bweight` I32 | `[out, in / 32, bits]` | bit `k` of word `w` of plane `i`: set for `+alpha_i` of input `32 w + k` |
//! | `X.alpha_exp` I8 | `[in / columns, patches, bits, terms]` | exponent of each power of two; -128 for none |
//! | `X.alpha_sgn` U8 | `[in / columns, patches, bits]` | bit `t` set: term `t` is subtracted |
//! | `X.incoh_scale` F32, `X.incoh_seed` I64 | `[in]`, `[1]` | what undoes the incoherence processing, where there was any |
//!
//! The reference keeps exponents without their signs, which later terms need; here they have a tensor of their own.

use std::collections::BTreeMap;
use std::path::Path;

use refit_store::Artifact;
use serde_json::{Value, json};

use super::bcq::{Term, apot, sums, value_of};
use super::incoherence::Incoherence;
use crate::error::{Error, Result};

/// Name of the file beside the weights.
pub const FILE_NAME: &str = "refit.shiftadd.safetensors";
/// An exponent that stands for no term.
const NO_TERM: i8 = i8::MIN;

/// A packed matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Packed {
    /// Outputs.
    pub rows: usize,
    /// Inputs, a multiple of 32.
    pub inputs: usize,
    /// Bit planes.
    pub bits: usize,
    /// Consecutive inputs that share scales: 1 or 8.
    pub columns: usize,
    /// Groups of consecutive rows with scales of their own.
    pub patches: usize,
    /// Powers of two per scale.
    pub terms: usize,
    /// `[rows, inputs / 32, bits]`.
    pub words: Vec<u32>,
    /// `[inputs / columns, patches, bits, terms]`.
    pub exponents: Vec<i8>,
    /// `[inputs / columns, patches, bits]`.
    pub signs: Vec<u8>,
    /// What was done before quantizing.
    pub incoherence: Option<Incoherence>,
}

/// Scales of a whole matrix, `[inputs / columns, patches, bits]`.
pub type Scales = Vec<f32>;

impl Packed {
    /// Packs weights `[rows, inputs]` that are sums of these scales; `None` if one is not.
    pub fn pack(
        weights: &[f32],
        inputs: usize,
        (columns, patches, bits, terms): (usize, usize, usize, usize),
        scales: &Scales,
        incoherence: Option<Incoherence>,
    ) -> Option<Self> {
        let rows = weights.len() / inputs;
        let tables: Vec<Vec<f32>> = scales.chunks(bits).map(sums).collect();
        let mut words = vec![0u32; rows * inputs / 32 * bits];
        for (at, w) in weights.iter().enumerate() {
            let (row, input) = (at / inputs, at % inputs);
            let table = &tables[input / columns * patches + row * patches / rows];
            let code = table.iter().rposition(|sum| sum == w)?;
            for bit in 0..bits {
                let word = (row * inputs / 32 + input / 32) * bits + bit;
                words[word] |= ((code >> bit & 1) as u32) << (input % 32);
            }
        }
        let (mut exponents, mut signs) = (Vec::new(), Vec::new());
        for scale in scales {
            let found = apot(f64::from(*scale), terms);
            signs
                .push(found.iter().enumerate().map(|(t, term)| u8::from(term.negative) << t).sum());
            exponents
                .extend((0..terms).map(|t| found.get(t).map_or(NO_TERM, |term| term.exponent)));
        }
        Some(Self {
            rows,
            inputs,
            bits,
            columns,
            patches,
            terms,
            words,
            exponents,
            signs,
            incoherence,
        })
    }

    /// Terms of scale `at`.
    pub fn terms_of(&self, at: usize) -> impl Iterator<Item = Term> + '_ {
        let exponents = self.exponents[at * self.terms..(at + 1) * self.terms].iter();
        let negative = move |t: usize| self.signs[at] >> t & 1 == 1;
        exponents
            .enumerate()
            .filter(|(_, exponent)| **exponent != NO_TERM)
            .map(move |(t, &exponent)| Term { exponent, negative: negative(t) })
    }

    /// The scales as numbers.
    pub fn scales(&self) -> Scales {
        let scale = |at| value_of(&self.terms_of(at).collect::<Vec<Term>>());
        (0..self.signs.len()).map(scale).collect()
    }

    /// The code of a weight.
    pub fn code(&self, row: usize, input: usize) -> usize {
        let word = (row * self.inputs / 32 + input / 32) * self.bits;
        let bit = |bit: usize| (self.words[word + bit] >> (input % 32) & 1) as usize;
        (0..self.bits).map(|at| bit(at) << at).sum()
    }

    /// The scales' place for a row and an input, in patches.
    pub fn patch(&self, row: usize, input: usize) -> usize {
        input / self.columns * self.patches + row * self.patches / self.rows
    }

    /// The weights `[rows, inputs]`, bit for bit those that were written.
    pub fn decode(&self) -> Vec<f32> {
        let tables: Vec<Vec<f32>> = self.scales().chunks(self.bits).map(sums).collect();
        let weight = |at: usize| {
            let (row, input) = (at / self.inputs, at % self.inputs);
            tables[self.patch(row, input)][self.code(row, input)]
        };
        let mut weights: Vec<f32> = (0..self.rows * self.inputs).map(weight).collect();
        if let Some(incoherence) = &self.incoherence {
            incoherence.undo(&mut weights);
        }
        weights
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> u64 {
        let incoherence = self.incoherence.as_ref().map_or(0, |i| 4 * i.scales.len() + 8);
        (4 * self.words.len() + self.exponents.len() + self.signs.len() + incoherence) as u64
    }

    fn parts(&self, name: &str) -> Vec<(String, &'static str, Vec<usize>, Vec<u8>)> {
        let part = |part: &str| format!("{name}.{part}");
        let scales = vec![self.inputs / self.columns, self.patches, self.bits];
        let mut exponents = scales.clone();
        exponents.push(self.terms);
        let words = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut all = vec![
            (part("bweight"), "I32", vec![self.rows, self.inputs / 32, self.bits], words),
            (part("alpha_exp"), "I8", exponents, self.exponents.iter().map(|e| *e as u8).collect()),
            (part("alpha_sgn"), "U8", scales, self.signs.clone()),
        ];
        if let Some(Incoherence { scales, seed }) = &self.incoherence {
            let bytes = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
            all.push((part("incoh_scale"), "F32", vec![scales.len()], bytes));
            all.push((part("incoh_seed"), "I64", vec![1], seed.to_le_bytes().to_vec()));
        }
        all
    }
}

/// Packed matrices as a safetensors file.
pub fn encode(matrices: &BTreeMap<String, Packed>) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert(
        "__metadata__".into(),
        json!({"format": "pt", "refit": "binary codes with power-of-two scales"}),
    );
    let mut parts: Vec<_> = matrices
        .iter()
        .flat_map(|(name, packed)| packed.parts(name.trim_end_matches(".weight")))
        .collect();
    // Wide elements first, so that every tensor is aligned.
    let width = |dtype: &str| match dtype {
        "I64" => 8,
        "I32" | "F32" => 4,
        _ => 1,
    };
    parts.sort_by(|a, b| width(b.1).cmp(&width(a.1)).then_with(|| a.0.cmp(&b.0)));
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in parts {
        let start = data.len();
        data.extend(bytes);
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] });
        header.insert(name, entry);
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text);
    file.extend(data);
    file
}

/// Reads a file of packed matrices, by the names of the weights.
///
/// # Errors
/// Files that cannot be read, parts that are missing or do not fit together.
pub fn read(path: &Path) -> Result<BTreeMap<String, Packed>> {
    let file = Artifact::open(path)?;
    let bytes = |name: &str| -> Result<(Vec<usize>, Vec<u8>)> {
        let info = file.tensor(name)?;
        let mut bytes = vec![0; info.nbytes as usize];
        file.read_raw_into(name, 0, &mut bytes)?;
        Ok((info.shape.clone(), bytes))
    };
    let stems = file.tensors().iter().filter_map(|info| info.name.strip_suffix(".bweight"));
    stems
        .map(|stem| {
            let part = |part: &str| bytes(&format!("{stem}.{part}"));
            let bad = || {
                Error::tensor(path.display(), stem, "its parts do not fit together; write it again")
            };
            let ((shape, words), (scales, exponents), (_, signs)) =
                (part("bweight")?, part("alpha_exp")?, part("alpha_sgn")?);
            let ([rows, groups, bits], [blocks, patches, planes, terms]) = (
                <[usize; 3]>::try_from(shape).map_err(|_| bad())?,
                <[usize; 4]>::try_from(scales).map_err(|_| bad())?,
            );
            let inputs = groups * 32;
            let sound = bits == planes
                && blocks > 0
                && patches > 0
                && inputs.is_multiple_of(blocks)
                && rows.is_multiple_of(patches)
                && signs.len() == blocks * patches * bits;
            if !sound {
                return Err(bad());
            }
            let quads = |bytes: &[u8]| -> Vec<[u8; 4]> {
                bytes.chunks_exact(4).map(|c| [c[0], c[1], c[2], c[3]]).collect()
            };
            let incoherence = match file.tensor(&format!("{stem}.incoh_scale")) {
                Ok(_) => {
                    let (scales, seed) = (part("incoh_scale")?.1, part("incoh_seed")?.1);
                    Some(Incoherence {
                        scales: quads(&scales).into_iter().map(f32::from_le_bytes).collect(),
                        seed: u64::from_le_bytes(seed.try_into().map_err(|_| bad())?),
                    })
                }
                Err(_) => None,
            };
            let packed = Packed {
                rows,
                inputs,
                bits,
                columns: inputs / blocks,
                patches,
                terms,
                words: quads(&words).into_iter().map(u32::from_le_bytes).collect(),
                exponents: exponents.into_iter().map(|e| e as i8).collect(),
                signs,
                incoherence,
            };
            Ok((format!("{stem}.weight"), packed))
        })
        .collect()
}
