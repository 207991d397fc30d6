//! Convolution on plain slices: forward, and the gradients of input, weight and bias.
//!
//! Work is split over images, groups and output channels. The weight's gradient is a sum over images: it is taken over fixed
//! groups of images, which are added in order, so that results do not depend on the number of threads.

use rayon::prelude::*;

use super::super::cpu::SendPtr;
use super::kernels::{Target, correlate, lanes, products, tile_rows, total};
use super::layout::{Geometry, Layout, Pass, backward, beside, forward};

/// Bytes of weights and outputs that one step keeps in cache.
const CACHE: usize = 96 << 10;
/// Output channels of one task of the weight's gradient.
const TASK_ROWS: usize = 32;
/// Tasks that keep all threads busy: with fewer, output channels or images are split as well. Part of the result (the order of
/// sums), so it does not follow the number of threads.
const FEW_TASKS: usize = 16;

/// A set of correlations from the planes of one operand to those of another.
struct Job<'a> {
    layout: Layout,
    passes: &'a [Pass],
    /// Packed weights of each pass: `[groups][tiles][taps][tile_rows]`.
    weights: Vec<Vec<f32>>,
    /// What sums start from: `[groups][tiles][tile_rows]`.
    start: Vec<f32>,
    /// Offsets of all taps of each pass, channel by channel.
    offsets: Vec<Vec<usize>>,
    groups: usize,
    /// Channels of one group that are read, and that are written.
    channels: [usize; 2],
    /// Elements of a plane that is read.
    plane: usize,
    /// Height and width of a plane that is written.
    out: [usize; 2],
}

impl<'a> Job<'a> {
    /// `weight(group, row, channel, index)` is what the input `channel` of a group gives to its output `row`.
    fn new(
        layout: Layout,
        passes: &'a [Pass],
        g: &Geometry,
        channels: [usize; 2],
        planes: [[usize; 2]; 2],
        start: Option<&[f32]>,
        weight: impl Fn(usize, usize, usize, usize) -> f32 + Sync,
    ) -> Self {
        let [from, to] = channels;
        let (m, tiles) = (tile_rows(to), to.div_ceil(tile_rows(to)));
        let pack = |pass: &Pass| {
            let taps = pass.taps.len();
            let mut packed = vec![0.0; g.groups * tiles * from * taps * m];
            packed.par_chunks_mut(from * taps * m).enumerate().for_each(|(i, tile)| {
                let (group, first) = (i / tiles, i % tiles * m);
                for (c, tile) in tile.chunks_exact_mut(taps * m).enumerate() {
                    for (slots, (index, _)) in tile.chunks_exact_mut(m).zip(&pass.taps) {
                        for (row, slot) in slots.iter_mut().enumerate().take(to - first) {
                            *slot = weight(group, first + row, c, *index);
                        }
                    }
                }
            });
            packed
        };
        let offsets = |pass: &Pass| {
            let at =
                |c: usize| pass.taps.iter().map(move |(_, offset)| c * layout.channel + offset);
            (0..from).flat_map(at).collect()
        };
        let mut padded = vec![0.0; g.groups * tiles * m];
        if let Some(start) = start {
            for (to, from) in padded.chunks_exact_mut(tiles * m).zip(start.chunks_exact(to)) {
                to[..from.len()].copy_from_slice(from);
            }
        }
        Self {
            layout,
            weights: passes.iter().map(pack).collect(),
            offsets: passes.iter().map(offsets).collect(),
            passes,
            start: padded,
            groups: g.groups,
            channels,
            plane: planes[0].iter().product(),
            out: planes[1],
        }
    }

    /// Writes all planes of `out`, which holds zeros.
    fn run(&self, src: &[f32], out: &mut [f32]) {
        let [from, to] = self.channels;
        let out_plane: usize = self.out.iter().product();
        let (read, written) = (from * self.plane, to * out_plane);
        if read == 0 || written == 0 {
            return;
        }
        let units = src.len() / read;
        let m = tile_rows(to);
        let widest = self.passes.iter().map(|p| p.size[0] * self.layout.pitch).max().unwrap_or(0);
        let longest = self.offsets.iter().map(Vec::len).max().unwrap_or(0);
        // Rows whose weights and outputs stay in cache, a whole number of tiles.
        let fit = CACHE / 4 / (longest + widest.min(1 << 12)).max(1);
        let mut rows = (fit / m * m).clamp(m, to.next_multiple_of(m));
        if units < FEW_TASKS {
            let parts = FEW_TASKS.div_ceil(units);
            rows = rows.min(to.div_ceil(parts).next_multiple_of(m));
        }
        let blocks = to.div_ceil(rows);
        if units >= FEW_TASKS {
            let scratch = || (vec![0.0; self.scratch()], Vec::new());
            out.par_chunks_exact_mut(written)
                .zip(src.par_chunks_exact(read))
                .enumerate()
                .for_each_init(scratch, |(laid, results), (unit, (out, src))| {
                    let src = self.lay(src, laid);
                    for (block, out) in out.chunks_mut(rows * out_plane).enumerate() {
                        self.block(unit % self.groups, block * rows, src, out, results);
                    }
                });
            return;
        }
        let mut laid = vec![0.0; units * self.scratch()];
        if !self.layout.is_plain() {
            let laid = laid.par_chunks_exact_mut(self.scratch()).zip(src.par_chunks_exact(read));
            laid.for_each(|(laid, src)| self.layout.place(0, src, laid));
        }
        let (laid, target) = (&laid, SendPtr(out.as_mut_ptr()));
        (0..units * blocks).into_par_iter().for_each_init(Vec::new, |results, task| {
            let target = &target;
            let (unit, first) = (task / blocks, task % blocks * rows);
            let src = match self.layout.is_plain() {
                true => &src[unit * read..][..read],
                false => &laid[unit * self.scratch()..][..self.scratch()],
            };
            let count = rows.min(to - first) * out_plane;
            // SAFETY: each task has its own unit and rows of `out`.
            let out = unsafe {
                std::slice::from_raw_parts_mut(
                    target.0.add(unit * written + first * out_plane),
                    count,
                )
            };
            self.block(unit % self.groups, first, src, out, results);
        });
    }

    /// Elements of the scratch that one unit's operand is laid out in.
    fn scratch(&self) -> usize {
        if self.layout.is_plain() { 0 } else { self.layout.elements(self.channels[0]) }
    }

    fn lay<'b>(&self, src: &'b [f32], scratch: &'b mut [f32]) -> &'b [f32] {
        if self.layout.is_plain() {
            return src;
        }
        self.layout.place(0, src, scratch);
        scratch
    }

    /// The output planes `first..` of one group, as many as `out` holds.
    fn block(
        &self,
        group: usize,
        first: usize,
        src: &[f32],
        out: &mut [f32],
        results: &mut Vec<f32>,
    ) {
        let [height, width] = self.out;
        let to = self.channels[1];
        let (m, tiles) = (tile_rows(to), to.div_ceil(tile_rows(to)));
        let rows = out.len() / (height * width);
        let range = |size: usize| {
            let tile = group * tiles + first / m;
            tile * size..(tile + rows.div_ceil(m)) * size
        };
        for ((pass, weights), offsets) in self.passes.iter().zip(&self.weights).zip(&self.offsets) {
            let [pass_rows, columns] = pass.size;
            let pitch = self.layout.pitch;
            let len = (pass_rows - 1) * pitch + columns;
            let direct = pass.step == 1 && pitch == width && pass.size == self.out;
            let (at, stride) = match direct {
                true => (out.as_mut_ptr(), len),
                false => {
                    results.resize(results.len().max(rows * len), 0.0);
                    (results.as_mut_ptr(), len)
                }
            };
            let (weights, start) = (&weights[range(offsets.len() * m)], &self.start[range(m)]);
            let target = Target { at: SendPtr(at), stride, rows };
            // SAFETY: `out` or `results` has `rows` rows of `len`, and is borrowed by this call alone.
            unsafe { correlate(m, weights, start, offsets, src, target, len) }
            if direct {
                continue;
            }
            for (plane, result) in
                out.chunks_exact_mut(height * width).zip(results.chunks_exact(len))
            {
                for (i, line) in result.chunks(pitch).enumerate() {
                    let at = (pass.from[0] + i * pass.step) * width + pass.from[1];
                    let line = &line[..columns];
                    match pass.step {
                        1 => plane[at..at + columns].copy_from_slice(line),
                        step => {
                            let slots = plane[at..].iter_mut().step_by(step);
                            slots.zip(line).for_each(|(o, v)| *o = *v);
                        }
                    }
                }
            }
        }
    }
}

/// `out[n, o, y, x] = bias[o] + Σ weight[o, c, i, j] · x[n, c, s y + i - top, s x + j - left]`; `out` holds zeros.
pub fn conv2d(x: &[f32], weight: &[f32], bias: Option<&[f32]>, out: &mut [f32], g: &Geometry) {
    let (from, to) = (g.inputs / g.groups, g.outputs / g.groups);
    let taps = g.kernel[0] * g.kernel[1];
    let (layout, pass) = forward(g, 1);
    let passes = [pass];
    let at = |group: usize, row: usize, c: usize, index: usize| {
        weight[((group * to + row) * from + c) * taps + index]
    };
    Job::new(layout, &passes, g, [from, to], [g.size, g.out()], bias, at).run(x, out);
}

/// Gradient of the input: each output's gradient goes back to what it was computed from.
pub fn conv2d_x(grad: &[f32], weight: &[f32], g: &Geometry) -> Vec<f32> {
    let (from, to) = (g.inputs / g.groups, g.outputs / g.groups);
    let taps = g.kernel[0] * g.kernel[1];
    let (layout, passes) = backward(g);
    let at = |group: usize, row: usize, c: usize, index: usize| {
        weight[((group * to + c) * from + row) * taps + index]
    };
    let mut out = vec![0.0; g.batch * g.inputs * g.size[0] * g.size[1]];
    Job::new(layout, &passes, g, [to, from], [g.out(), g.size], None, at).run(grad, &mut out);
    out
}

/// Gradient of the weight `[out, in / groups, k, k]`.
pub fn conv2d_w(grad: &[f32], x: &[f32], g: &Geometry) -> Vec<f32> {
    let (from, to) = (g.inputs / g.groups, g.outputs / g.groups);
    let [height, width] = g.out();
    let (read, plane) = (from * g.size[0] * g.size[1], height * width);
    // Rows of one task, images of one sum, and of these the images whose planes stay in cache together.
    let rows = to.div_ceil(to.div_ceil(TASK_ROWS)).next_multiple_of(4);
    let images = g.batch.div_ceil(FEW_TASKS.div_ceil(to.div_ceil(rows) * g.groups)).max(1);
    let together = (CACHE / (read + rows.min(to) * plane)).clamp(1, images);
    let together = images.div_ceil(images.div_ceil(together));
    let (layout, pass) = forward(g, together);
    let beside = beside(g, &layout, together, lanes());
    // Zeros in the gradient stand against what is read past the last output.
    let len = beside.channel;
    let last = (together - 1) * layout.plane + (height - 1) * layout.pitch + width;
    let layout = layout.with_tail(len - last);
    let at = |c: usize| pass.taps.iter().map(move |(_, offset)| c * layout.channel + offset);
    let offsets: Vec<usize> = (0..from).flat_map(at).collect();
    let parts = g.batch.div_ceil(images);
    let each = g.group_weights();
    let mut sums = vec![0.0; parts * g.groups * each];
    let space = |layout: &Layout, channels| match layout.is_plain() {
        true => Vec::new(),
        false => vec![0.0; layout.elements(channels)],
    };
    let spaces = || (space(&layout, from), space(&beside, rows.min(to)));
    sums.par_chunks_exact_mut(each).enumerate().for_each(|(unit, sums)| {
        let (part, group) = (unit / g.groups, unit % g.groups);
        let end = ((part + 1) * images).min(g.batch);
        let blocks = sums.par_chunks_mut(rows * offsets.len()).enumerate();
        blocks.for_each_init(spaces, |(xs, gs), (block, sums)| {
            let count = sums.len() / offsets.len();
            for first in (part * images..end).step_by(together) {
                let some = Images { first, count: together.min(end - first), together };
                let src = some.lay(&layout, x, [g.inputs, group * from, from], xs);
                let row = group * to + block * rows;
                let grad = some.lay(&beside, grad, [g.outputs, row, count], gs);
                products(grad, beside.channel, count, src, &offsets, len, sums);
            }
        });
    });
    let (first, rest) = sums.split_at(g.groups * each);
    let mut out = first.to_vec();
    out.par_chunks_mut(1 << 12).enumerate().for_each(|(i, out)| {
        for part in rest.chunks_exact(g.groups * each) {
            let part = &part[i << 12..][..out.len()];
            out.iter_mut().zip(part).for_each(|(o, p)| *o += p);
        }
    });
    out
}

/// A few images.
struct Images {
    first: usize,
    count: usize,
    /// Images that the layout has room for.
    together: usize,
}

impl Images {
    /// The planes of `count` channels from `first` on, of `channels` that each image has, in the layout.
    fn lay<'a>(
        &self,
        layout: &Layout,
        planes: &'a [f32],
        [channels, first, count]: [usize; 3],
        scratch: &'a mut [f32],
    ) -> &'a [f32] {
        let size = layout.size[0] * layout.size[1];
        let image =
            |i: usize| &planes[((self.first + i) * channels + first) * size..][..count * size];
        if layout.is_plain() {
            return image(0);
        }
        if self.count < self.together {
            scratch.fill(0.0);
        }
        for i in 0..self.count {
            layout.place(i, image(i), scratch);
        }
        scratch
    }
}

/// Sums of `grad [batch, channels, plane]` over images and positions: the gradient of a bias.
pub fn channel_sums(grad: &[f32], channels: usize, plane: usize) -> Vec<f32> {
    let sum = |c: usize| {
        let planes = grad.chunks_exact(plane).skip(c).step_by(channels);
        planes.map(total).sum()
    };
    (0..channels).into_par_iter().map(sum).collect()
}
