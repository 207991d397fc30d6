//! Updates of signs and one number (ComPEFT, arXiv:2311.13171): an adapter's weight file in which every value is `-s`, 0 or `s`.
//!
//! The file is a safetensors container, `adapter_model.cpft.safetensors`, with two tensors of bytes: `header`, JSON, and
//! `payload`. The tensors of the update are thought of as one vector, in the order of their names. For every kept entry the payload
//! holds the gap since the last one as a Golomb-Rice code and a bit for its sign:
//!
//! ```text
//! gap g: (g >> b) ones, a zero, the b low bits of g;   b = max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - k))))
//! ```
//!
//! with `k` the share of kept entries and `phi` the golden ratio (Sattler et al. 2019, arXiv:1903.02891). Bits fill bytes from the
//! lowest. A third tensor, `values`, holds the kept values themselves where an update was only pruned.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::config::{AdapterConfig, FILE_NAME};
use super::form::Values;
use super::read::Stored;
use crate::artifact::{Artifact, SideFile};
use crate::card::{Card, Relation};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::hash;
use crate::lineage::Lineage;
use crate::writer::{ArtifactWriter, TensorSpec, WritePlan};

/// Name of the weight file.
pub const TERNARY_NAME: &str = "adapter_model.cpft.safetensors";

/// What entries that were not kept stand at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Values count from 0: LoRA's factors, and differences from a base.
    Zero,
    /// Values count from 1: (IA)^3's factors.
    One,
}

/// One tensor of the update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TernaryTensor {
    /// Name in the adapter's file.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
}

/// Everything but the positions and signs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Layout of the file, 1.
    pub version: u32,
    /// What values count from.
    pub origin: Origin,
    /// Content hash of the base that a difference was taken from.
    pub base: Option<String>,
    /// Share of entries that was asked for.
    pub density: f64,
    /// Factor on the standard deviation.
    pub alpha: f64,
    /// Standard deviation of the update before pruning (divisor d - 1); of each tensor where scales are.
    pub sigma: Vec<f64>,
    /// The one number `s`, exact in half precision, or one for each tensor; empty where values were kept.
    pub scales: Vec<f32>,
    /// Low bits of a gap.
    pub rice: u32,
    /// Entries that are kept.
    pub kept: u64,
    /// BLAKE3 of the payload.
    pub payload: String,
    /// The tensors, in the order of their names.
    pub tensors: Vec<TernaryTensor>,
}

/// An update in parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Ternary {
    /// What is known of it.
    pub header: Header,
    /// Gaps and signs.
    pub payload: Vec<u8>,
    /// The kept values, where the update was only pruned.
    pub values: Option<Vec<f32>>,
}

/// Low bits of a gap when a share `k` of the entries is kept.
pub fn rice(k: f64) -> u32 {
    if k <= 0.0 || k >= 1.0 {
        return 0;
    }
    let golden = f64::midpoint(1.0, 5f64.sqrt());
    let bits = 1.0 + ((golden - 1.0).ln() / (1.0 - k).ln()).log2().floor();
    bits.clamp(0.0, 40.0) as u32
}

/// Writes gaps and signs.
#[derive(Debug, Clone, Default)]
pub struct Encoder {
    rice: u32,
    bytes: Vec<u8>,
    /// Bits of the last byte that are taken.
    used: u32,
    next: u64,
    kept: u64,
}

impl Encoder {
    /// An encoder for gaps with `rice` low bits.
    pub fn new(rice: u32) -> Self {
        Self { rice, ..Self::default() }
    }

    /// Adds the entry at `index`, which must be above the last one.
    ///
    /// # Panics
    /// When it is not: a bug in the caller.
    pub fn push(&mut self, index: u64, negative: bool) {
        assert!(index >= self.next, "invariant: entries come in order");
        let gap = index - self.next;
        (0..gap >> self.rice).for_each(|_| self.bit(true));
        self.bit(false);
        (0..self.rice).for_each(|bit| self.bit(gap >> bit & 1 == 1));
        self.bit(negative);
        self.next = index + 1;
        self.kept += 1;
    }

    fn bit(&mut self, set: bool) {
        if self.used.is_multiple_of(8) {
            self.bytes.push(0);
            self.used = 0;
        }
        let last = self.bytes.last_mut().expect("invariant: just pushed");
        *last |= u8::from(set) << self.used;
        self.used += 1;
    }

    /// Entries and bytes.
    pub fn finish(self) -> (u64, Vec<u8>) {
        (self.kept, self.bytes)
    }
}

/// Reads gaps and signs: `(index, negative)`, `None` where the bytes end too early.
struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
    rice: u32,
    next: u64,
}

impl Decoder<'_> {
    fn bit(&mut self) -> Option<bool> {
        let byte = self.bytes.get(self.at / 8)?;
        let bit = byte >> (self.at % 8) & 1 == 1;
        self.at += 1;
        Some(bit)
    }

    fn entry(&mut self) -> Option<(u64, bool)> {
        let mut gap = 0u64;
        while self.bit()? {
            gap += 1;
        }
        gap = gap.checked_shl(self.rice)?;
        for bit in 0..self.rice {
            gap |= u64::from(self.bit()?) << bit;
        }
        let index = self.next.checked_add(gap)?;
        self.next = index.checked_add(1)?;
        Some((index, self.bit()?))
    }
}

impl Header {
    /// Entries of all tensors.
    pub fn total(&self) -> Option<u64> {
        self.tensors.iter().try_fold(0u64, |sum, tensor| {
            let count = tensor.shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d as u64))?;
            sum.checked_add(count)
        })
    }
}

impl Ternary {
    /// The values of every tensor, in the order of the header.
    ///
    /// # Errors
    /// What of header and payload does not fit together.
    pub fn expand(&self) -> Result<Vec<Stored>, String> {
        let header = &self.header;
        if header.version != 1 {
            return Err(format!("version {} is not known here", header.version));
        }
        if hash::blake3_hex(&self.payload) != header.payload {
            return Err("the payload is not what the header says: the file is damaged".into());
        }
        let total = header.total().filter(|total| *total >= header.kept);
        let Some(total) = total else { return Err("the shapes make no sense".into()) };
        // A kept entry takes two bits at least, so a short file cannot ask for much memory by its number of entries.
        let scales = header.scales.len();
        if self.values.is_none() && scales != 1 && scales != header.tensors.len() {
            return Err(format!("{scales} scales for {} tensors", header.tensors.len()));
        }
        if let Some(values) = &self.values
            && values.len() as u64 != header.kept
        {
            return Err(format!("{} values for {} entries", values.len(), header.kept));
        }
        if total > 1 << 40 {
            return Err(format!("{total} entries are more than any model has"));
        }
        let rest = match header.origin {
            Origin::Zero => 0.0,
            Origin::One => 1.0,
        };
        let mut decoder =
            Decoder { bytes: &self.payload, at: 0, rice: header.rice.min(63), next: 0 };
        let mut left = header.kept;
        let mut entry = |left: &mut u64| -> Result<Option<(u64, bool)>, String> {
            if *left == 0 {
                return Ok(None);
            }
            *left -= 1;
            let entry = decoder.entry().ok_or("the payload ends too early")?;
            match entry.0 < total {
                true => Ok(Some(entry)),
                false => Err("an entry lies beyond the last tensor".into()),
            }
        };
        let mut next = entry(&mut left)?;
        let (mut start, mut seen, mut out) = (0u64, 0usize, Vec::new());
        for (at, tensor) in header.tensors.iter().enumerate() {
            let count = tensor.shape.iter().product::<usize>();
            let mut values = vec![rest; count];
            let end = start + count as u64;
            while let Some((index, negative)) = next.filter(|(index, _)| *index < end) {
                let sign = if negative { -1.0 } else { 1.0 };
                let step = match &self.values {
                    Some(values) => values[seen],
                    None => sign * header.scales[if scales == 1 { 0 } else { at }],
                };
                values[(index - start) as usize] = rest + step;
                seen += 1;
                next = entry(&mut left)?;
            }
            start = end;
            out.push((tensor.name.clone(), Values { shape: tensor.shape.clone(), values }));
        }
        Ok(out)
    }

    /// Bytes of the payload and the kept values.
    pub fn bytes(&self) -> u64 {
        self.payload.len() as u64 + self.values.as_ref().map_or(0, |v| 4 * v.len() as u64)
    }

    /// Opens the weight file of a compressed update.
    ///
    /// # Errors
    /// Files that are none.
    pub fn open(path: &Path) -> Result<Self> {
        let bad = |reason: String| Error::NotAnArtifact { path: path.to_owned(), reason };
        let artifact = Artifact::open(path)?;
        let part = |name: &str| -> Result<Vec<u8>> {
            let info = artifact.tensor(name)?;
            if info.dtype != DType::U8 || info.shape.len() != 1 {
                return Err(bad(format!("`{name}` is no vector of bytes")));
            }
            let mut bytes = vec![0; info.nbytes as usize];
            artifact.read_raw_into(name, 0, &mut bytes)?;
            Ok(bytes)
        };
        let header = part("header")?;
        let header =
            serde_json::from_slice(&header).map_err(|e| bad(format!("its header: {e}")))?;
        let values =
            artifact.contains("values").then(|| artifact.read_f32("values")).transpose()?;
        let payload = if artifact.contains("payload") { part("payload")? } else { Vec::new() };
        Ok(Self { header, payload, values })
    }

    /// Writes an adapter with this update as its weights.
    ///
    /// # Errors
    /// As [`super::write()`].
    pub fn write(
        &self,
        out: &Path,
        config: &AdapterConfig,
        lineage: Lineage,
        mut card: Card,
        force: bool,
    ) -> Result<PathBuf> {
        let header = serde_json::to_vec(&self.header).expect("invariant: plain data serializes");
        let mut parts: Vec<(&str, &[u8])> = vec![("header", &header)];
        if !self.payload.is_empty() {
            parts.push(("payload", &self.payload));
        }
        let spec = |name: &str, len: usize, dtype| TensorSpec {
            name: name.to_owned(),
            shape: vec![len],
            dtype,
        };
        let mut tensors: Vec<TensorSpec> =
            parts.iter().map(|(name, bytes)| spec(name, bytes.len(), DType::U8)).collect();
        if let Some(values) = &self.values {
            tensors.push(spec("values", values.len(), DType::F32));
        }
        let plan = WritePlan {
            tensors,
            weights_name: Some(TERNARY_NAME),
            side_files: vec![SideFile::from_bytes(FILE_NAME, config.to_json())],
            identity: hash::blake3_hex(&header),
            force,
            ..WritePlan::default()
        };
        let writer = ArtifactWriter::create(out, plan)?;
        for (name, bytes) in parts {
            writer.write_raw(name, 0, bytes)?;
            writer.done(name)?;
        }
        if let Some(values) = &self.values {
            writer.write_f32("values", 0, values)?;
            writer.done("values")?;
        }
        card.relation = card.relation.or(Some(Relation::Adapter));
        writer.finish(lineage, card)
    }
}

/// The tensors of a compressed weight file.
pub(super) fn load(path: &Path) -> Result<Vec<Stored>> {
    let bad = |reason: String| Error::NotAnArtifact { path: path.to_owned(), reason };
    let expanded = Ternary::open(path)?.expand().map_err(bad)?;
    if expanded.iter().any(|(_, stored)| stored.values.iter().any(|x| !x.is_finite())) {
        return Err(bad("a scale or value is not finite".into()));
    }
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ternary(mask: &[i8], scale: f32) -> Ternary {
        let kept = mask.iter().filter(|m| **m != 0).count();
        let bits = rice(kept as f64 / mask.len().max(1) as f64);
        let mut encoder = Encoder::new(bits);
        for (at, sign) in mask.iter().enumerate().filter(|(_, sign)| **sign != 0) {
            encoder.push(at as u64, *sign < 0);
        }
        let (kept, payload) = encoder.finish();
        let header = Header {
            version: 1,
            origin: Origin::Zero,
            base: None,
            density: 0.5,
            alpha: 1.0,
            sigma: vec![1.0],
            scales: vec![scale],
            rice: bits,
            kept,
            payload: hash::blake3_hex(&payload),
            tensors: vec![TernaryTensor { name: "x".into(), shape: vec![mask.len()] }],
        };
        Ternary { header, payload, values: None }
    }

    fn values(mask: &[i8]) -> Vec<f32> {
        mask.iter().map(|m| 0.5 * f32::from(*m)).collect()
    }

    /// A mask with `kept` of `total` entries, spread by a generator.
    fn mask(total: usize, kept: f64, mut state: u64) -> Vec<i8> {
        (0..total)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let keep = ((state >> 33) as f64 / f64::from(1u32 << 31)) < kept;
                if !keep {
                    0
                } else if state >> 20 & 1 == 1 {
                    1
                } else {
                    -1
                }
            })
            .collect()
    }

    proptest! {
        #![proptest_config(crate::testing::cases(64))]

        #[test]
        fn any_mask_comes_back(signs in prop::collection::vec(-1i8..=1, 1..400)) {
            let found = ternary(&signs, 0.5).expand().unwrap();
            prop_assert_eq!(&found[0].1.values, &values(&signs));
        }

        #[test]
        fn damaged_bytes_are_errors(signs in prop::collection::vec(-1i8..=1, 8..200), at in any::<usize>(), bit in 0u8..8) {
            let mut damaged = ternary(&signs, 0.5);
            prop_assume!(!damaged.payload.is_empty());
            let at = at % damaged.payload.len();
            damaged.payload[at] ^= 1 << bit;
            prop_assert!(damaged.expand().is_err());
            // Without the hash nothing panics either.
            damaged.header.payload = hash::blake3_hex(&damaged.payload);
            let _ = damaged.expand();
        }
    }

    #[test]
    fn empty_full_and_long_runs_come_back() {
        let mut run = vec![0i8; (1 << 20) + 77];
        run[3] = 1;
        *run.last_mut().unwrap() = -1;
        for mask in [vec![0i8; 50], vec![1i8; 50], vec![-1i8; 33], run] {
            assert_eq!(ternary(&mask, 0.5).expand().unwrap()[0].1.values, values(&mask));
        }
    }

    #[test]
    fn codes_are_near_the_entropy() {
        assert_eq!((rice(0.05), rice(0.5), rice(0.2), rice(0.1)), (4, 0, 2, 3));
        for k in [0.02, 0.05, 0.1, 0.2, 0.3, 0.5] {
            let total = 400_000;
            let mask = mask(total, k, 7);
            let found = ternary(&mask, 1.0);
            let k = found.header.kept as f64 / total as f64;
            let entropy = -(1.0 - k) * (1.0 - k).log2() - k * (k / 2.0).log2();
            let bits = 8.0 * found.payload.len() as f64 / total as f64;
            assert!(bits <= 1.03 * entropy, "{k}: {bits} bits, entropy {entropy}");
        }
    }

    #[test]
    fn headers_that_do_not_fit_are_said() {
        let mut signs = [0i8; 64];
        (signs[0], signs[2]) = (1, -1);
        let good = ternary(&signs, 1.0);
        let broken = |change: &dyn Fn(&mut Ternary), part: &str| {
            let mut broken = good.clone();
            change(&mut broken);
            let error = broken.expand().unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        broken(&|t| t.header.kept = 40, "early");
        broken(&|t| t.header.kept = 90, "shapes");
        broken(&|t| t.header.tensors[0].shape = vec![2], "beyond");
        broken(&|t| t.header.scales = vec![1.0; 3], "scales");
        broken(&|t| t.header.version = 2, "version");
        broken(&|t| t.values = Some(vec![1.0]), "values");
        broken(&|t| t.header.tensors[0].shape = vec![usize::MAX, 9], "shapes");
    }
}
