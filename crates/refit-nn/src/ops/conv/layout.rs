//! Where pixels lie in scratch memory, so that every tap of a kernel is one constant offset.
//!
//! A plane `[height, width]` is stored row after row with zeros before each row that stand for the padding on both sides: the
//! end of one row runs into the zeros of the next. A tap of the kernel then reads the plane shifted by a constant, and a
//! whole plane of outputs is one long vector. A stride `s` splits the plane into `s²` phases, each with every `s`-th row and
//! column, among which the same holds. The last columns of an output row, where windows wrap around, are computed and dropped.

/// Extents of one convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Images.
    pub batch: usize,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Groups of channels that do not see each other; divides inputs and outputs.
    pub groups: usize,
    /// Height and width of the input.
    pub size: [usize; 2],
    /// Height and width of the kernel.
    pub kernel: [usize; 2],
    /// Step of the kernel.
    pub stride: usize,
    /// Zeros above, below, left and right of the input.
    pub padding: [usize; 4],
}

impl Geometry {
    /// Height and width of the output.
    ///
    /// # Panics
    /// A kernel larger than the padded input.
    pub fn out(&self) -> [usize; 2] {
        let [top, bottom, left, right] = self.padding;
        let along = |size: usize, kernel: usize| {
            assert!(size >= kernel, "a kernel of {kernel} does not fit into {size} padded pixels");
            (size - kernel) / self.stride + 1
        };
        [
            along(self.size[0] + top + bottom, self.kernel[0]),
            along(self.size[1] + left + right, self.kernel[1]),
        ]
    }

    /// Weights of one group.
    pub(super) fn group_weights(&self) -> usize {
        self.outputs / self.groups * (self.inputs / self.groups) * self.kernel[0] * self.kernel[1]
    }
}

/// How the planes of one operand lie in scratch: channel by channel, in each phase by phase, in each image by image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Phases along each side.
    step: usize,
    /// Elements from one row of a phase to the next.
    pub pitch: usize,
    /// Elements from one image to the next.
    pub plane: usize,
    /// Elements from one phase to the next.
    phase: usize,
    /// Elements from one channel to the next.
    pub channel: usize,
    /// Zero rows above each image.
    top: usize,
    /// Zeros before each row.
    lead: usize,
    /// Elements behind the last channel: the zeros that its last row runs into.
    tail: usize,
    /// Height and width of the operand itself.
    pub size: [usize; 2],
}

impl Layout {
    /// Elements of `channels` channels.
    pub fn elements(&self, channels: usize) -> usize {
        channels * self.channel + self.tail
    }

    /// With room for `elements` more to be read behind the last channel.
    pub fn with_tail(self, elements: usize) -> Self {
        Self { tail: self.tail + elements, ..self }
    }

    /// True when one image needs no copy: its rows lie as the layout wants them.
    pub fn is_plain(&self) -> bool {
        let [height, width] = self.size;
        self.tail == 0 && self.channel == height * width && self.pitch == width
    }

    /// Copies the planes of image `image` to `scratch`, whose zeros stay as they are.
    pub fn place(&self, image: usize, planes: &[f32], scratch: &mut [f32]) {
        let [height, width] = self.size;
        for (plane, out) in
            planes.chunks_exact(height * width).zip(scratch.chunks_mut(self.channel))
        {
            for (y, row) in plane.chunks_exact(width).enumerate() {
                let y = self.top + y;
                let line = image * self.plane + (y / self.step) * self.pitch;
                if self.step == 1 {
                    out[line + self.lead..][..width].copy_from_slice(row);
                    continue;
                }
                for px in 0..self.step {
                    // The first column of this phase, and where it goes.
                    let x = (px + self.step - self.lead % self.step) % self.step;
                    let phase = ((y % self.step) * self.step + px) * self.phase;
                    let out = &mut out[phase + line + (self.lead + x) / self.step..];
                    let values = row.iter().skip(x).step_by(self.step);
                    out.iter_mut().zip(values).for_each(|(o, v)| *o = *v);
                }
            }
        }
    }
}

/// One correlation: outputs `[rows, columns]` from a laid out operand.
#[derive(Debug, Clone)]
pub(super) struct Pass {
    /// Index of a weight in its kernel, and the offset of what it reads.
    pub taps: Vec<(usize, usize)>,
    /// Outputs along each side.
    pub size: [usize; 2],
    /// Row and column of the first output.
    pub from: [usize; 2],
    /// Rows and columns from one output to the next.
    pub step: usize,
}

/// The forward pass: how the inputs of `images` images lie, and the one correlation.
pub(super) fn forward(g: &Geometry, images: usize) -> (Layout, Pass) {
    let ([height, width], s) = (g.size, g.stride);
    let [above, below, left, right] = g.padding;
    let out = g.out();
    let (top, lead) = (above.max(below), left.max(right));
    let pitch = (lead + width).div_ceil(s).max(out[1]);
    let plane = (top + height).div_ceil(s).max(out[0]) * pitch;
    let tail = if top + lead == 0 { 0 } else { (top / s + 1) * pitch + lead };
    // What runs over the end of a phase must not meet the first pixels of another one.
    let phase = images * plane + if s > 1 { tail } else { 0 };
    let channel = s * s * phase;
    let layout = Layout { step: s, pitch, plane, phase, channel, top, lead, tail, size: g.size };
    let mut taps = Vec::new();
    for y in 0..g.kernel[0] {
        for x in 0..g.kernel[1] {
            let (row, column) = (y + top - above, x + lead - left);
            let from = ((row % s) * s + column % s) * phase;
            taps.push((y * g.kernel[1] + x, from + (row / s) * pitch + column / s));
        }
    }
    (layout, Pass { taps, size: out, from: [0, 0], step: 1 })
}

/// Rows (or columns) of one phase of the input's gradient, counted in steps of the output.
struct Reach {
    /// First and number.
    first: usize,
    count: usize,
    /// First row of the input.
    from: usize,
}

/// What output positions reach phase `phase` of the input along one side.
fn reach(g: &Geometry, side: usize, phase: usize) -> Reach {
    let (before, size, s) = (g.padding[2 * side], g.size[side], g.stride);
    let most = g.out()[side] + (g.kernel[side] - 1) / s;
    let first = before.saturating_sub(phase).div_ceil(s);
    let end = (before + size).saturating_sub(phase).div_ceil(s).min(most);
    Reach {
        first,
        count: end.saturating_sub(first),
        from: (first * s + phase).saturating_sub(before),
    }
}

/// The backward pass: how the output's gradient lies, and one correlation for each phase of the input.
pub(super) fn backward(g: &Geometry) -> (Layout, Vec<Pass>) {
    let (out, s) = (g.out(), g.stride);
    let back = [(g.kernel[0] - 1) / s, (g.kernel[1] - 1) / s];
    let reaches = |side: usize| (0..s).map(move |phase| reach(g, side, phase)).collect::<Vec<_>>();
    let (rows, columns) = (reaches(0), reaches(1));
    let before = |side: usize, r: &[Reach]| {
        r.iter().map(|r| back[side].saturating_sub(r.first)).max().unwrap_or(0)
    };
    let after = |side: usize, r: &[Reach]| {
        r.iter().map(|r| (r.first + r.count).saturating_sub(out[side])).max().unwrap_or(0)
    };
    let top = before(0, &rows);
    let lead = before(1, &columns).max(after(1, &columns));
    let widest = columns.iter().map(|c| c.count).max().unwrap_or(0);
    let pitch = (lead + out[1]).max(widest);
    let plane = (top + out[0] + after(0, &rows)) * pitch;
    let (phase, channel) = (plane, plane);
    let layout = Layout { step: 1, pitch, plane, phase, channel, top, lead, tail: lead, size: out };
    let mut passes = Vec::new();
    for (py, rows) in rows.iter().enumerate() {
        for (px, columns) in columns.iter().enumerate() {
            let mut taps = Vec::new();
            for y in (py..g.kernel[0]).step_by(s) {
                for x in (px..g.kernel[1]).step_by(s) {
                    let line = (top + rows.first - y / s) * pitch;
                    taps.push((y * g.kernel[1] + x, line + lead + columns.first - x / s));
                }
            }
            if !taps.is_empty() && rows.count * columns.count > 0 {
                let (size, from) = ([rows.count, columns.count], [rows.from, columns.from]);
                passes.push(Pass { taps, size, from, step: s });
            }
        }
    }
    (layout, passes)
}

/// The gradient of the output as the weight's gradient reads it: images and rows as those of the input, zeros behind each, and
/// channels a multiple of `lanes`.
pub(super) fn beside(g: &Geometry, input: &Layout, images: usize, lanes: usize) -> Layout {
    let (size, pitch, plane) = (g.out(), input.pitch, input.plane);
    let last = (size[0] - 1) * pitch + size[1];
    let channel = ((images - 1) * plane + last).next_multiple_of(lanes);
    Layout { step: 1, pitch, plane, phase: channel, channel, top: 0, lead: 0, tail: 0, size }
}
