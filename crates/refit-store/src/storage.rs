//! Where a tensor's bytes lie, and how to read a range of them in logical order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use memmap2::Mmap;

use crate::artifact::TensorInfo;
use crate::convert;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::formats::factored::Factored;
use crate::formats::packed::Packed;

/// Bytes decoded at a time: small enough for a core's own cache, large enough to hide the call.
const CHUNK: usize = 128 * 1024;

/// An open weight file.
#[derive(Debug)]
pub(crate) struct Source {
    pub path: PathBuf,
    pub len: u64,
    file: File,
    map: OnceLock<Option<Mmap>>,
}

impl Source {
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::open(path).map_err(|error| Error::io(path, "open", error))?;
        let meta = file.metadata().map_err(|error| Error::io(path, "read", error))?;
        if !meta.is_file() {
            let reason = "it is neither a regular file nor a directory".to_owned();
            return Err(Error::NotAnArtifact { path: path.to_owned(), reason });
        }
        let (path, len) = (path.to_owned(), meta.len());
        Ok(Arc::new(Self { path, len, file, map: OnceLock::new() }))
    }

    /// Positioned read; a file that shrank since it was opened is an error, not a short read.
    pub fn read_at(&self, out: &mut [u8], offset: u64) -> Result<()> {
        self.file.read_exact_at(out, offset).map_err(|error| Error::io(&self.path, "read", error))
    }

    /// `len` bytes at `offset`, checked against the file before anything is allocated.
    pub fn read_vec(&self, offset: u64, len: u64, what: &str) -> Result<Vec<u8>> {
        let end = offset.checked_add(len).filter(|&end| end <= self.len);
        let Some(_) = end else {
            return Err(self.truncated(what, offset.saturating_add(len)));
        };
        let mut bytes = vec![0; len as usize];
        self.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    pub fn truncated(&self, what: impl Into<String>, need: u64) -> Error {
        Error::Truncated { path: self.path.clone(), what: what.into(), need, have: self.len }
    }

    /// The whole file as memory; `None` where the file system cannot map it.
    pub fn map(&self) -> Option<&[u8]> {
        self.map
            .get_or_init(|| {
                // SAFETY: the mapping is read-only and private to this crate. As with every reader
                // of mapped model files, another process that truncates the file while it is open
                // can still make an access fail.
                unsafe { Mmap::map(&self.file) }.ok()
            })
            .as_deref()
    }
}

/// The order in which a tensor's elements lie in the file.
#[derive(Debug, Clone)]
pub(crate) enum View {
    /// Row-major and contiguous.
    Plain,
    /// Rows interleaved within each head, as llama.cpp stores `q` and `k` for its rotary embedding:
    /// stored row `2 j + p` of a head is Hugging Face's row `p d/2 + j`.
    Interleaved { head_dim: usize },
    /// Strides in elements, innermost last.
    Strided(Vec<u64>),
    /// A matrix `[rows, columns]` stored as its transpose in the given type; presented as `F32`.
    Transposed { stored: DType },
    /// Every stored value is one more than Hugging Face's (GGUF's Gemma norms); presented as `F32`.
    PlusOne { stored: DType },
    /// Codes and scales in tensors of their own; presented as `F32`.
    Packed(Arc<Packed>),
    /// A product of thin matrices, alone or beside a matrix; presented as `F32`.
    Factored(Arc<Factored>),
}

/// A tensor and where it lies.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub info: TensorInfo,
    pub source: Arc<Source>,
    /// First byte in the file.
    pub offset: u64,
    pub view: View,
}

impl Entry {
    /// Stored bytes `start..` in logical (row-major, Hugging Face) order.
    pub fn read_raw(&self, start: u64, out: &mut [u8]) -> Result<()> {
        self.check_range(start, out.len(), self.info.nbytes, "bytes")?;
        match &self.view {
            View::Plain => self.source.read_at(out, self.offset + start),
            View::Interleaved { head_dim } => self.read_interleaved(*head_dim, start, out),
            View::Strided(strides) => self.gather(strides, start, out),
            View::Transposed { .. }
            | View::PlusOne { .. }
            | View::Packed(_)
            | View::Factored(_) => {
                let (first, last) = (start / 4, (start + out.len() as u64).div_ceil(4));
                let mut values = vec![0.0; (last - first) as usize];
                self.read_f32(first as usize, &mut values)?;
                let skip = (start - first * 4) as usize;
                let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                out.copy_from_slice(&bytes[skip..skip + out.len()]);
                Ok(())
            }
        }
    }

    /// Elements `start..` as `f32`.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<()> {
        self.check_range(start as u64, out.len(), self.info.numel() as u64, "elements")?;
        match &self.view {
            View::Transposed { stored } => return self.read_transposed(*stored, start, out),
            View::Packed(packed) => return packed.read_f32(start, out),
            View::Factored(factored) => return factored.read_f32(start, out),
            View::PlusOne { stored } => {
                let plain = self.stored_as(*stored, self.info.shape.clone());
                plain.read_f32(start, out)?;
                out.iter_mut().for_each(|x| *x -= 1.0);
                return Ok(());
            }
            _ => {}
        }
        if self.info.dtype == DType::F32 && cfg!(target_endian = "little") {
            // Stored as wanted: no buffer between.
            return self.read_raw(4 * start as u64, bytemuck::cast_slice_mut(out));
        }
        let (len, bytes) = (self.info.dtype.block_len(), self.info.dtype.block_bytes());
        let per_chunk = (CHUNK / bytes).max(1) * len;
        let mut buffer = Vec::new();
        let mut at = start;
        let mut rest = out;
        while !rest.is_empty() {
            let (within, wanted) = (at % len, rest.len().min(per_chunk - at % len));
            let (values, tail) = std::mem::take(&mut rest).split_at_mut(wanted);
            let blocks = (within + wanted).div_ceil(len);
            buffer.resize(blocks * bytes, 0);
            self.read_raw((at / len * bytes) as u64, &mut buffer)?;
            if within == 0 && wanted % len == 0 {
                convert::decode(self.info.dtype, &buffer, values);
            } else {
                let mut whole = vec![0.0; blocks * len];
                convert::decode(self.info.dtype, &buffer, &mut whole);
                values.copy_from_slice(&whole[within..within + wanted]);
            }
            at += wanted;
            rest = tail;
        }
        Ok(())
    }

    fn check_range(&self, start: u64, count: usize, len: u64, unit: &'static str) -> Result<()> {
        let end = start.saturating_add(count as u64);
        if end > len {
            let tensor = self.info.name.clone();
            return Err(Error::OutOfRange { tensor, start, end, len, unit });
        }
        Ok(())
    }

    /// The same bytes seen as a plain tensor.
    fn stored_as(&self, dtype: DType, shape: Vec<usize>) -> Entry {
        let nbytes = dtype.bytes_of(&shape).expect("invariant: checked when the header was read");
        let info = TensorInfo { name: self.info.name.clone(), shape, dtype, nbytes };
        Entry { info, source: self.source.clone(), offset: self.offset, view: View::Plain }
    }

    fn read_transposed(&self, stored: DType, start: usize, out: &mut [f32]) -> Result<()> {
        let [rows, columns] = self.info.shape[..] else {
            unreachable!("invariant: only matrices are transposed")
        };
        let mut values = vec![0.0; rows * columns];
        self.stored_as(stored, vec![columns, rows]).read_f32(0, &mut values)?;
        for (index, x) in (start..).zip(out) {
            *x = values[index % columns * rows + index / columns];
        }
        Ok(())
    }

    /// Reads whole heads and puts their rows back into Hugging Face's order.
    fn read_interleaved(&self, head_dim: usize, start: u64, out: &mut [u8]) -> Result<()> {
        let rows = self.info.shape[0] as u64;
        let row_bytes = self.info.nbytes / rows;
        let head_bytes = row_bytes * head_dim as u64;
        let mut head = vec![0; head_bytes as usize];
        let mut loaded = None;
        let mut done = 0;
        while done < out.len() {
            let at = start + done as u64;
            let (index, within) = (at / head_bytes, at % head_bytes);
            if loaded != Some(index) {
                self.source.read_at(&mut head, self.offset + index * head_bytes)?;
                loaded = Some(index);
            }
            let (row, column) = ((within / row_bytes) as usize, (within % row_bytes) as usize);
            let stored_row = 2 * (row % (head_dim / 2)) + row / (head_dim / 2);
            let take = (row_bytes as usize - column).min(out.len() - done);
            let from = stored_row * row_bytes as usize + column;
            out[done..done + take].copy_from_slice(&head[from..from + take]);
            done += take;
        }
        Ok(())
    }

    /// Collects the elements of a non-contiguous view.
    fn gather(&self, strides: &[u64], start: u64, out: &mut [u8]) -> Result<()> {
        let size = self.info.dtype.block_bytes();
        let map = self.source.map();
        let mut element = [0; 8];
        let mut done = 0;
        while done < out.len() {
            let at = start + done as u64;
            let (index, within) = (at / size as u64, (at % size as u64) as usize);
            let mut rest = index;
            let mut position = 0;
            for (&dim, &stride) in self.info.shape.iter().zip(strides).rev() {
                position += rest % dim as u64 * stride;
                rest /= dim as u64;
            }
            let offset = self.offset + position * size as u64;
            let element = &mut element[..size];
            match map.and_then(|map| map.get(offset as usize..offset as usize + size)) {
                Some(bytes) => element.copy_from_slice(bytes),
                None => self.source.read_at(element, offset)?,
            }
            let take = (size - within).min(out.len() - done);
            out[done..done + take].copy_from_slice(&element[within..within + take]);
            done += take;
        }
        Ok(())
    }
}
