//! Calibrated methods that change whole blocks, norms and biases with the matrices: the frame of AWQ, SmoothQuant and RepQuant.
//!
//! As in [`crate::calibrated`], the model is streamed block by block, and a finished block produces the inputs of the next.
//! Here a method gets the block itself, with the inputs of its linears, and may replace activations on their way
//! ([`BlockMethod::tap`]). What the plan marks as transformed is written once the block is finished.

use std::time::Instant;

use burn::module::Param;
use burn::tensor::{Tensor, TensorData};
use refit_data::images::Preprocess;
use refit_nn::block::Block;
use refit_nn::config::TransformerConfig;
use refit_nn::operator::{Linear, Norm};
use refit_nn::{BurnDevice, Tap, ops};
use refit_store::architecture::Kind;
use refit_store::{DType, SideFile};
use refit_train::calibrate::{self, BlockStats, Feed, Outcome, Visitor};
use serde_json::{Value, json};

use crate::calibrated::Calibration;
use crate::emit::Emitter;
use crate::error::{Error, Result};
use crate::inputs::{Inputs, Labelled, ModelInput};
use crate::method::{Action, Context, InputSpec, Need, Output, Plan, PlannedTensor, Unit};
use crate::rewrite::{check_finite, copy};

/// One model, and text or, for a Vision Transformer, images to calibrate on.
pub const INPUTS: InputSpec = InputSpec {
    text: Need::Optional,
    labelled: Need::Optional,
    data_role: "calibration data like those the model will see: text of a few thousand tokens, or images for a ViT (labels \
                are not read)",
    ..InputSpec::WEIGHTS
};

/// Images per batch of the stream.
const BATCH: usize = 16;

/// A method that changes a block.
pub trait BlockMethod: Send {
    /// What is collected, and when.
    fn options(&self) -> calibrate::Options;

    /// Changes `block`, knowing what its linears read. Called once for a block, or once for each group of linears with a common
    /// input, as the options say.
    ///
    /// # Errors
    /// Whatever the method meets.
    fn change(
        &mut self,
        index: usize,
        block: &mut Block,
        stats: &BlockStats,
        stored: &Stored,
    ) -> Result<()>;

    /// What activations go through while the model runs.
    fn tap(&mut self) -> Option<&mut dyn Tap> {
        None
    }

    /// Changes a tensor that is in no block; `false` if it is none of the method's.
    ///
    /// # Errors
    /// Whatever the method meets.
    fn outside(&mut self, _tensor: &PlannedTensor, _values: &mut [f32]) -> Result<bool> {
        Ok(false)
    }

    /// Files beside the weights and the report, once all blocks are done.
    ///
    /// # Errors
    /// Whatever the method meets.
    fn finish(&mut self, inputs: &Inputs) -> Result<(Vec<SideFile>, Value)>;
}

/// What tensors will be read back as.
pub struct Stored<'a> {
    /// The model under work.
    pub model: &'a ModelInput,
    /// Its shape.
    pub config: TransformerConfig,
    plan: &'a Plan,
}

impl<'a> Stored<'a> {
    pub(crate) fn new(model: &'a ModelInput, plan: &'a Plan) -> Result<Self> {
        Ok(Self { model, config: TransformerConfig::read(model.artifact.config())?, plan })
    }

    /// Rounds to the type in which `tensor` is stored.
    pub fn round(&self, tensor: &str, values: &mut [f32]) {
        let planned = self.plan.tensors.iter().find(|planned| planned.name == tensor);
        match planned.and_then(|planned| DType::from_safetensors(&planned.dtype)) {
            Some(DType::F16) => {
                values.iter_mut().for_each(|x| *x = half::f16::from_f32(*x).to_f32());
            }
            Some(DType::BF16) => {
                values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
            }
            _ => {}
        }
    }

    /// As [`round`](Self::round), for the scale of a norm, which some families store less one.
    pub fn round_norm(&self, tensor: &str, values: &mut [f32]) {
        let offset = if self.config.norm_offset { 1.0 } else { 0.0 };
        values.iter_mut().for_each(|x| *x -= offset);
        self.round(tensor, values);
        values.iter_mut().for_each(|x| *x += offset);
    }
}

/// What a method is calibrated on.
pub enum Data {
    /// Sequences of token ids.
    Tokens(Vec<Vec<u32>>),
    /// Batches of images.
    Images(Vec<Tensor<4>>),
}

impl Data {
    /// Refuses inputs that the model does not read.
    ///
    /// # Errors
    /// Missing data, and data of another kind than the model's.
    pub fn check(method: &'static str, inputs: &Inputs) -> Result<()> {
        let model = &inputs.models[0];
        let vision = model.artifact.architecture().kind == Kind::Vision;
        let what = INPUTS.data_role.to_owned();
        let conflict = |problem: String| Err(Error::Conflict { method, problem });
        match (vision, &inputs.labelled, inputs.text.is_empty()) {
            (true, None, _) => Err(Error::MissingData { method, what, how: "--labelled DIR" }),
            (true, Some(Labelled::Table(_)), _) => conflict(format!(
                "{} reads images, and a table holds texts; give --labelled a folder per class, or an IDX pair",
                model.source
            )),
            (false, _, true) => Err(Error::MissingData { method, what, how: "--text FILE" }),
            (false, Some(_), false) => {
                conflict(format!("{} reads text; leave out --labelled", model.source))
            }
            _ => Ok(()),
        }
    }

    /// Draws what [`Calibration`] asks for; for images, its samples are images.
    ///
    /// # Errors
    /// Too little text, images that cannot be read.
    pub fn draw(calibration: &Calibration, inputs: &Inputs, seed: u64) -> Result<Self> {
        let Some(images) = &inputs.labelled else {
            return Ok(Self::Tokens(calibration.draw(inputs, seed)?));
        };
        let preprocess = Preprocess::from_artifact(&inputs.models[0].artifact)?;
        let mut rng = refit_data::rng::Rng::named(seed, "calibration");
        let chosen = rng.sample(images.len(), calibration.samples.min(images.len()));
        let batch = |which: &[usize]| {
            crate::adapt::probe::images(images, which, &preprocess, &BurnDevice::flex())
        };
        Ok(Self::Images(chosen.chunks(BATCH).map(batch).collect::<Result<_>>()?))
    }

    fn feed(&self) -> Feed<'_> {
        match self {
            Self::Tokens(sequences) => Feed::Tokens(sequences),
            Self::Images(batches) => Feed::Images(batches),
        }
    }
}

/// The stream's visitor.
struct Visit<'a> {
    stored: Stored<'a>,
    method: &'a mut dyn BlockMethod,
    emitter: &'a Emitter,
    seconds: f64,
}

impl Visitor for Visit<'_> {
    type Error = Error;

    fn tap(&mut self) -> Option<&mut dyn Tap> {
        self.method.tap()
    }

    fn visit(&mut self, index: usize, block: &mut Block, stats: &BlockStats) -> Result<Outcome> {
        let started = Instant::now();
        self.method.change(index, block, stats, &self.stored)?;
        self.seconds += started.elapsed().as_secs_f64();
        Ok(Outcome::Changed)
    }

    fn finished(&mut self, _: usize, block: &mut Block) -> Result<()> {
        let sites: Vec<String> = block.linears().iter().map(|linear| linear.site.clone()).collect();
        for site in sites {
            let linear = block.linear_mut(&site).expect("invariant: the block named it");
            self.write_linear(linear)?;
        }
        let norms = [Some(&mut block.mixer_norm), Some(&mut block.ffn_norm)];
        let after = [block.mixer_post_norm.as_mut(), block.ffn_post_norm.as_mut()];
        for norm in norms.into_iter().chain(after).flatten() {
            self.write_norm(norm)?;
        }
        Ok(())
    }
}

impl Visit<'_> {
    fn changes(&self, tensor: &str) -> bool {
        let planned = self.stored.plan.tensors.iter().find(|planned| planned.name == tensor);
        planned.is_some_and(|planned| planned.action == Action::Transform)
    }

    /// Rounds to the stored type, so that later blocks see what will be read back, and writes.
    fn write_linear(&self, linear: &mut Linear) -> Result<()> {
        let (stored, source) = (&self.stored, &self.stored.model.source);
        let name = format!("{}.weight", linear.site);
        if self.changes(&name) {
            let site =
                stored.model.artifact.architecture().site(&name).ok_or_else(|| {
                    Error::tensor(source, &name, "the architecture does not list it")
                })?;
            let weight = linear.weight();
            let (mut values, device) = (ops::to_vec(&weight), weight.device());
            stored.round(&name, &mut values);
            check_finite(source, &name, &values, 0)?;
            if !self.emitter.is_done(&name) {
                self.emitter.write_matrix(site, values.clone())?;
            }
            linear.set_weight(values, &device);
        }
        let name = format!("{}.bias", linear.site);
        if let Some(bias) = linear.bias.as_mut().filter(|_| self.changes(&name)) {
            self.write_vector(&name, bias, |values| stored.round(&name, values), 0.0)?;
        }
        Ok(())
    }

    fn write_norm(&self, norm: &mut Norm) -> Result<()> {
        let stored = &self.stored;
        let offset = if stored.config.norm_offset { 1.0 } else { 0.0 };
        let name = format!("{}.weight", norm.site);
        if self.changes(&name) {
            let round = |values: &mut [f32]| stored.round_norm(&name, values);
            self.write_vector(&name, &mut norm.weight, round, offset)?;
        }
        let name = format!("{}.bias", norm.site);
        if let Some(bias) = norm.bias.as_mut().filter(|_| self.changes(&name)) {
            self.write_vector(&name, bias, |values| stored.round(&name, values), 0.0)?;
        }
        Ok(())
    }

    fn write_vector(
        &self,
        name: &str,
        param: &mut Param<Tensor<1>>,
        round: impl Fn(&mut [f32]),
        offset: f32,
    ) -> Result<()> {
        let (mut values, device) = (ops::to_vec(&param.val()), param.val().device());
        round(&mut values);
        check_finite(&self.stored.model.source, name, &values, 0)?;
        *param = vector(values.clone(), &device);
        if !self.emitter.is_done(name) {
            values.iter_mut().for_each(|x| *x -= offset);
            self.emitter.write_f32(name, 0, &values)?;
            self.emitter.done(name)?;
        }
        Ok(())
    }
}

/// A parameter of one dimension.
pub fn vector(values: Vec<f32>, device: &BurnDevice) -> Param<Tensor<1>> {
    let shape = [values.len()];
    Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), device))
}

/// Carries out a plan: streams the blocks through `method`, copies everything else.
///
/// # Errors
/// Whatever reading, running, changing or writing meets.
pub fn run(
    inputs: &Inputs,
    plan: &Plan,
    cx: &Context,
    calibration: &Calibration,
    method: &mut dyn BlockMethod,
) -> Result<Output> {
    let model = &inputs.models[0];
    let data = Data::draw(calibration, inputs, cx.seed)?;
    let emitter = Emitter::begin(inputs, plan, cx)?;
    let options = method.options();
    let started = Instant::now();
    cx.progress.begin("calibrating", model.artifact.architecture().layers() as u64, Unit::Blocks);
    let streamed = cx.install(|| {
        let stored = Stored::new(model, plan)?;
        let mut visit = Visit { stored, method: &mut *method, emitter: &emitter, seconds: 0.0 };
        let progress = |done: u64, _total: u64| cx.progress.advance(u64::from(done > 0));
        let feed = data.feed();
        let summary = calibrate::run_on(&model.artifact, &feed, &options, &mut visit, &progress)?;
        Ok((summary, visit.seconds))
    });
    cx.progress.end();
    let (summary, method_seconds) = streamed?;
    let seconds = started.elapsed().as_secs_f64();
    for tensor in &plan.tensors {
        if emitter.is_done(&tensor.name) {
            continue;
        }
        if tensor.action == Action::Copy {
            copy(&model.artifact, &model.source, &emitter, tensor)?;
            continue;
        }
        let mut values = model.artifact.read_f32(&tensor.name)?;
        check_finite(&model.source, &tensor.name, &values, 0)?;
        if !method.outside(tensor, &mut values)? {
            let problem = "no block of the running model holds it, so it was not calibrated";
            return Err(Error::tensor(&model.source, &tensor.name, problem));
        }
        emitter.write_f32(&tensor.name, 0, &values)?;
        emitter.done(&tensor.name)?;
    }
    let (side_files, mut report) = method.finish(inputs)?;
    report["calibration"] = json!({
        "sequences": summary.sequences,
        "tokens": summary.tokens,
        "blocks": summary.blocks,
    });
    let artifact = emitter.finish(inputs, plan, cx, side_files, &report)?;
    // Times go to the caller and not to the lineage: they differ from run to run.
    report["calibration"]["seconds"] = json!(seconds);
    report["calibration"]["method_seconds"] = json!(method_seconds);
    Ok(Output { artifact: Some(artifact), report, warnings: summary.warnings })
}
