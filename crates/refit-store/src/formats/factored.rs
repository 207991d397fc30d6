//! Products of thin matrices inside safetensors: weights that are stored as two factors, and quantized weights with a product of
//! low rank beside them.
//!
//! | | tensors of a matrix `X.weight` `[rows, columns]` | what is read |
//! |---|---|---|
//! | low rank, as PELA lays it out | `X.0.weight` `[r, columns]`, `X.1.weight` `[rows, r]`, `X.1.bias`; `low_rank.sites` of the configuration names `X` | `X.1 X.0` |
//! | compensated (LoRC) | `X.weight`; `X.lorc_u` `[rows, r]`, `X.lorc_v` `[r, columns]`; codes of 8 bits have `X.lorc_u_scale` `[r]` and `X.lorc_v_scale` `[r]` | `X.weight + u v` |
//!
//! `rows` and `columns` are those of the stored matrix: GPT-2's projections are factored as they are stored, `[in, out]`. Opening
//! presents each as one `F32` tensor `X.weight`, multiplied out when it is read; [`Artifact::factors`](crate::Artifact::factors)
//! gives the factors.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::artifact::TensorInfo;
use crate::config::Config;
use crate::dtype::DType;
use crate::error::{Error, Result, TensorFault};
use crate::storage::{Entry, View};

/// Key of the configuration under which a factored model says which linears are factored.
pub const LOW_RANK: &str = "low_rank";
/// Ends of the names of a compensation's factors.
pub const COMPENSATION: [&str; 2] = ["lorc_u", "lorc_v"];

/// `left · right`, `[rows, rank] · [rank, columns]`, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// `[rows, rank]`.
    pub left: Vec<f32>,
    /// `[rank, columns]`.
    pub right: Vec<f32>,
    /// Inner dimension.
    pub rank: usize,
}

/// A matrix in factors.
#[derive(Debug)]
pub(crate) struct Factored {
    /// What the product is added to, if anything.
    pub base: Option<Entry>,
    left: Factor,
    right: Factor,
    /// `[rows, columns]`.
    shape: [usize; 2],
    rank: usize,
}

/// One factor, and the scales of its codes: of a left factor's columns, of a right factor's rows.
#[derive(Debug)]
struct Factor {
    values: Entry,
    scales: Option<Entry>,
}

impl Factored {
    /// Every stored part.
    pub fn parts(&self) -> impl Iterator<Item = &Entry> {
        let (left, right) = (&self.left, &self.right);
        let optional = [&self.base, &left.scales, &right.scales];
        optional.into_iter().flatten().chain([&left.values, &right.values])
    }

    /// Stored bytes of all parts.
    pub fn nbytes(&self) -> u64 {
        self.parts().map(|part| part.info.nbytes).sum()
    }

    /// Rank of the product.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Both factors, decoded.
    pub fn factors(&self) -> Result<Factors> {
        let left = self.left_rows(0, self.shape[0])?;
        Ok(Factors { left, right: self.right()?, rank: self.rank })
    }

    /// Rows of the left factor.
    fn left_rows(&self, first: usize, rows: usize) -> Result<Vec<f32>> {
        let mut left = vec![0.0; rows * self.rank];
        self.left.values.read_f32(first * self.rank, &mut left)?;
        if let Some(scales) = self.left.scales()? {
            for row in left.chunks_exact_mut(self.rank) {
                row.iter_mut().zip(&scales).for_each(|(x, s)| *x *= s);
            }
        }
        Ok(left)
    }

    fn right(&self) -> Result<Vec<f32>> {
        let mut right = vec![0.0; self.rank * self.shape[1]];
        self.right.values.read_f32(0, &mut right)?;
        if let Some(scales) = self.right.scales()? {
            for (row, s) in right.chunks_exact_mut(self.shape[1]).zip(scales) {
                row.iter_mut().for_each(|x| *x *= s);
            }
        }
        Ok(right)
    }

    /// Elements `start..` of the matrix, row-major.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        let columns = self.shape[1];
        if out.is_empty() {
            return Ok(());
        }
        let (first, last) = (start / columns, (start + out.len()).div_ceil(columns));
        let mut rows = vec![0.0; (last - first) * columns];
        if let Some(base) = &self.base {
            base.read_f32(first * columns, &mut rows)?;
        }
        let (left, right) = (self.left_rows(first, last - first)?, self.right()?);
        // Each row is one thread's, and its terms are added in one order.
        rows.par_chunks_exact_mut(columns).zip(left.par_chunks_exact(self.rank)).for_each(
            |(row, left)| {
                for (l, right) in left.iter().zip(right.chunks_exact(columns)) {
                    row.iter_mut().zip(right).for_each(|(x, r)| *x += l * r);
                }
            },
        );
        let skip = start - first * columns;
        out.copy_from_slice(&rows[skip..skip + out.len()]);
        Ok(())
    }
}

impl Factor {
    fn scales(&self) -> Result<Option<Vec<f32>>> {
        let Some(scales) = &self.scales else { return Ok(None) };
        let mut values = vec![0.0; scales.info.numel()];
        scales.read_f32(0, &mut values)?;
        Ok(Some(values))
    }
}

/// What was found.
pub(crate) struct Opened {
    /// The tensors, factored ones as single matrices.
    pub entries: Vec<Entry>,
    /// Whether there are any.
    pub factored: bool,
}

/// Puts factored matrices together: pairs that the configuration names, and compensations by their names.
pub(crate) fn open(path: &Path, entries: Vec<Entry>, config: &Config) -> Result<Opened> {
    let sites: Vec<String> = config
        .raw()
        .get(LOW_RANK)
        .and_then(|settings| settings["sites"].as_object())
        .map_or_else(Vec::new, |sites| sites.keys().cloned().collect());
    let compensated: Vec<String> = entries
        .iter()
        .filter_map(|entry| entry.info.name.strip_suffix(".lorc_u").map(str::to_owned))
        .collect();
    if sites.is_empty() && compensated.is_empty() {
        return Ok(Opened { entries, factored: false });
    }
    let mut parts: HashMap<String, Entry> =
        entries.into_iter().map(|entry| (entry.info.name.clone(), entry)).collect();
    let mut done = Vec::new();
    for site in &sites {
        let fault =
            |reason| Error::tensor(path, format!("{site}.weight"), TensorFault::Other(reason));
        let mut take = |part: &str| {
            parts.remove(&format!("{site}.{part}")).ok_or_else(|| {
                fault(format!(
                    "the configuration says that it is stored in two factors, but `{site}.{part}` is missing; \
                     get the model again"
                ))
            })
        };
        let right = Factor { values: take("0.weight")?, scales: None };
        let left = Factor { values: take("1.weight")?, scales: None };
        if let Some(mut bias) = parts.remove(&format!("{site}.1.bias")) {
            bias.info.name = format!("{site}.bias");
            done.push(bias);
        }
        done.push(matrix(site, None, left, right).map_err(fault)?);
    }
    for site in &compensated {
        let fault =
            |reason| Error::tensor(path, format!("{site}.weight"), TensorFault::Other(reason));
        let mut factor = |name: &str| -> Result<Factor> {
            let part = format!("{site}.{name}");
            let values = parts.remove(&part).ok_or_else(|| {
                fault(format!("half of its compensation is missing: `{part}`; get the model again"))
            })?;
            let scales = parts.remove(&format!("{part}_scale"));
            if (values.info.dtype == DType::I8) != scales.is_some() {
                return Err(fault(format!(
                    "`{part}` is {} and its scales are {}",
                    values.info.dtype,
                    if scales.is_some() { "there" } else { "missing" }
                )));
            }
            Ok(Factor { values, scales })
        };
        let [left, right] = COMPENSATION.map(&mut factor);
        let base = parts.remove(&format!("{site}.weight")).ok_or_else(|| {
            fault("its compensation is here, but the weight itself is not".into())
        })?;
        done.push(matrix(site, Some(base), left?, right?).map_err(fault)?);
    }
    done.extend(parts.into_values());
    Ok(Opened { entries: done, factored: true })
}

/// Checks that parts fit, and makes one matrix of them.
fn matrix(
    site: &str,
    base: Option<Entry>,
    left: Factor,
    right: Factor,
) -> std::result::Result<Entry, String> {
    let shapes = (&left.values.info.shape[..], &right.values.info.shape[..]);
    let (&[rows, rank], &[inner, columns]) = shapes else {
        return Err(format!("its factors are {:?} and {:?}, not matrices", shapes.0, shapes.1));
    };
    if rank != inner || [rank, rows, columns].contains(&0) {
        return Err(format!(
            "its factors are [{rows}, {rank}] and [{inner}, {columns}]: no product"
        ));
    }
    let shape = [rows, columns];
    if let Some(base) = &base
        && base.info.shape != shape
    {
        return Err(format!("it is {:?} and its compensation {shape:?}", base.info.shape));
    }
    for scales in [&left.scales, &right.scales].into_iter().flatten() {
        if scales.info.numel() != rank {
            let (name, shape) = (&scales.info.name, &scales.info.shape);
            return Err(format!(
                "`{name}` is {shape:?}, expected one scale for each of {rank} ranks"
            ));
        }
    }
    let nbytes =
        DType::F32.bytes_of(&shape).ok_or_else(|| format!("the size of {shape:?} overflows"))?;
    let name = format!("{site}.weight");
    let info = TensorInfo { name, shape: shape.to_vec(), dtype: DType::F32, nbytes };
    let place = base.as_ref().unwrap_or(&left.values);
    let (source, offset) = (place.source.clone(), place.offset);
    let view = View::Factored(Arc::new(Factored { base, left, right, shape, rank }));
    Ok(Entry { info, source, offset, view })
}
