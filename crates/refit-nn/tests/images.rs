//! Image classifiers from scratch: names, written and read back, training forms, and what is refused.

use std::collections::HashMap;
use std::path::Path;

use burn::module::{ModuleVisitor, Param, ParamId};
use burn::tensor::{Tensor, TensorData};
use refit_nn::adapt::{Ia3, Side};
use refit_nn::scratch::{CnnShape, Downsample, MlpShape, VitShape};
use refit_nn::vision::Vision;
use refit_nn::{BurnDevice as Device, Run, Trainable, ops};
use refit_store::artifact::Artifact;
use serde_json::{Map, Value, json};

#[derive(Default)]
struct Values(HashMap<ParamId, Vec<f32>>);

impl ModuleVisitor for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.insert(param.id, ops::to_vec(&param.base()));
    }
}

/// Writes `config.json` and a safetensors file with every parameter under its name.
fn save(model: &Vision, config: &Value, dir: &Path) {
    let mut values = Values::default();
    burn::module::Module::visit(model, &mut values);
    let (mut header, mut bytes) = (Map::new(), Vec::new());
    for parameter in model.parameters() {
        let from = bytes.len();
        bytes.extend(values.0[&parameter.id].iter().flat_map(|v| v.to_le_bytes()));
        let entry =
            json!({"dtype": "F32", "shape": parameter.shape, "data_offsets": [from, bytes.len()]});
        header.insert(parameter.name, entry);
    }
    let mut header = Value::Object(header).to_string();
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(bytes);
    std::fs::write(dir.join("model.safetensors"), file).expect("the directory is writable");
    std::fs::write(dir.join("config.json"), config.to_string()).expect("the directory is writable");
}

fn images(batch: usize, channels: usize, size: usize) -> Tensor<4> {
    let count = batch * channels * size * size;
    let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.37).sin()).collect();
    Tensor::from_data(TensorData::new(values, [batch, channels, size, size]), &Device::flex())
}

fn shapes() -> Vec<(Value, Vision, [usize; 2])> {
    let device = Device::flex();
    let small = CnnShape {
        image_size: 13,
        inputs: 3,
        channels: vec![5, 8],
        convs: 2,
        separable: false,
        downsample: Downsample::MaxPool,
        classes: 7,
    };
    let mut all = Vec::new();
    for (separable, downsample) in [(false, Downsample::MaxPool), (true, Downsample::Stride)] {
        for convs in [1, 2, 3] {
            let shape = CnnShape { separable, downsample, convs, ..small.clone() };
            let model = Vision::Cnn(shape.init(1, &device).expect("a model can have this shape"));
            all.push((shape.to_config_json(), model, [3, 13]));
        }
    }
    let shape = MlpShape { image_size: 9, inputs: 2, hidden: vec![12, 6], classes: 4 };
    let model = Vision::Mlp(shape.init(1, &device).expect("a model can have this shape"));
    all.push((shape.to_config_json(), model, [2, 9]));
    let shape = VitShape {
        image_size: 12,
        patch: 3,
        inputs: 2,
        hidden: 16,
        intermediate: 24,
        layers: 2,
        heads: 2,
        classes: 5,
    };
    let model = Vision::Vit(shape.init(1, &device).expect("a model can have this shape"));
    all.push((shape.to_config_json(), model, [2, 12]));
    all
}

#[test]
fn what_is_written_is_read_back() {
    for (config, model, [channels, size]) in shapes() {
        let dir = tempfile::tempdir().expect("a directory");
        save(&model, &config, dir.path());
        let artifact = Artifact::open(dir.path()).unwrap_or_else(|e| panic!("{config}: {e}"));
        let report = artifact.load_report();
        assert!(report.is_clean(), "{config}: {report}");
        let loaded =
            Vision::load(&artifact, &Device::flex()).unwrap_or_else(|e| panic!("{config}: {e}"));
        let x = images(2, channels, size);
        let logits = model.forward(x.clone(), &mut Run::plain()).expect("runs");
        let again = loaded.forward(x.clone(), &mut Run::plain()).expect("runs");
        assert_eq!(ops::to_vec(&logits), ops::to_vec(&again), "{config}");
        let features = model.features(x, &mut Run::plain()).expect("runs");
        let width = model.classifier().weight().dims()[1];
        assert_eq!(features.dims(), [2, width], "{config}");
    }
}

#[test]
fn a_seed_decides_every_weight() {
    let device = Device::flex();
    let values = |seed: u64| {
        let model = CnnShape::default().init(seed, &device).expect("a model can have this shape");
        let mut values = Values::default();
        burn::module::Module::visit(&model, &mut values);
        let all: Vec<Vec<f32>> =
            model.parameters().iter().map(|p| values.0[&p.id].clone()).collect();
        (model.parameters().iter().map(|p| p.name.clone()).collect::<Vec<_>>(), all)
    };
    let (names, first) = values(3);
    assert_eq!(names[..3], ["features.0.weight", "features.0.bias", "features.1.weight"]);
    assert_eq!(names.last().map(String::as_str), Some("classifier.bias"));
    assert_eq!(first.iter().map(Vec::len).sum::<usize>(), 287_722);
    assert_eq!(first, values(3).1);
    assert_ne!(first, values(4).1);
    // Kaiming: the second convolution sees 32 x 3 x 3 inputs.
    let spread = first[2].iter().map(|w| w * w).sum::<f32>() / first[2].len() as f32;
    assert!((spread / (2.0 / 288.0) - 1.0).abs() < 0.05, "variance {spread}");
    assert!(first[1].iter().all(|b| *b == 0.0));
}

#[test]
fn a_convolution_takes_a_training_form() {
    let device = Device::flex();
    let shape = CnnShape { channels: vec![4], convs: 1, image_size: 6, ..CnnShape::default() };
    let model = shape.init(0, &device).expect("a model can have this shape");
    let mut model = burn::module::Module::train(model);
    let factors = Tensor::from_floats([2.0, 0.0, 1.0, 1.0], &device.clone().autodiff());
    let form = Ia3 { factors: Param::from_tensor(factors.require_grad()), side: Side::Output };
    let conv = &mut model.stages[0].convs[0];
    let plain = conv.weight.val();
    conv.attach(form, true);
    let factors = [2.0, 0.0, 1.0, 1.0];
    let expected: Vec<f32> =
        ops::to_vec(&plain).iter().enumerate().map(|(i, w)| w * factors[i / 9]).collect();
    assert_eq!(ops::to_vec(&conv.weight.val()), expected);
    let x = Tensor::from_inner(images(2, 1, 6));
    let loss = model.forward(x, &mut Run::plain()).expect("runs").powi_scalar(2).sum();
    let grads = loss.backward();
    let conv = &model.stages[0].convs[0];
    let form = conv.form::<Ia3>().expect("attached above");
    assert!(form.factors.val().grad(&grads).is_some(), "the form trains");
    assert!(conv.weight.base().grad(&grads).is_none(), "the frozen weight does not");
    let names: Vec<String> = model.parameters().into_iter().map(|p| p.name).collect();
    assert!(names.contains(&"features.0.ia3.factors".to_owned()), "{names:?}");
}

#[test]
fn what_cannot_be_is_refused() {
    let cnn = CnnShape::default();
    let fails = |shape: CnnShape| shape.check().expect_err("refused").to_string();
    assert!(fails(CnnShape { channels: vec![], ..cnn.clone() }).contains("channels"));
    assert!(fails(CnnShape { channels: vec![8, 0], ..cnn.clone() }).contains("channels"));
    assert!(fails(CnnShape { channels: vec![8; 5], ..cnn.clone() }).contains("halved 4 times"));
    assert!(fails(CnnShape { classes: 0, ..cnn.clone() }).contains("num_labels"));
    let vit = VitShape::default();
    let fails = |shape: VitShape| shape.check().expect_err("refused").to_string();
    assert!(fails(VitShape { patch: 5, ..vit.clone() }).contains("patch_size"));
    assert!(fails(VitShape { heads: 5, ..vit }).contains("num_attention_heads"));
    let mlp = MlpShape { hidden: vec![], ..MlpShape::default() };
    assert!(mlp.check().expect_err("refused").to_string().contains("hidden_sizes"));

    for (config, model, [channels, size]) in shapes() {
        for [channels, size] in [[channels + 1, size], [channels, size + 1]] {
            let error = model.forward(images(1, channels, size), &mut Run::plain());
            let error = error.expect_err("refused").to_string();
            assert!(error.contains("the model takes"), "{config}: {error}");
        }
    }
}
