use super::*;
use burn::tensor::{Device, TensorData};

/// A three-stage chain with the tap names of a real block; `fault` breaks one of its parts.
struct Chain {
    fault: &'static str,
}

const STAGES: [&str; 8] = [
    "layers.0.resid.pre",
    "model.layers.0.q_proj:in",
    "model.layers.0.q_proj:out",
    "model.layers.0.o_proj:in",
    "model.layers.0.o_proj:out",
    "layers.0.resid.mid",
    "model.layers.0.down_proj:in",
    "layers.0.resid.post",
];

impl Traced for Chain {
    fn trace(&self, ids: &[u32], tap: &mut dyn Tap) -> Result<Tensor<3>> {
        let values: Vec<f32> = ids.iter().flat_map(|&id| [id as f32 + 1.0, 2.0, -1.0]).collect();
        let data = TensorData::new(values, [1, ids.len(), 3]);
        let mut x: Tensor<3> = Tensor::from_data(data, &Device::flex());
        for stage in STAGES.into_iter().chain([OUTPUT]) {
            x = if stage == self.fault { x * 1.5 + 0.25 } else { x * 0.5 };
            if stage != OUTPUT {
                x = tap.visit(stage, x);
            }
        }
        Ok(x)
    }

    fn has_logits(&self) -> bool {
        true
    }
}

fn probes() -> Vec<Vec<u32>> {
    vec![vec![1, 2, 3], vec![7, 5]]
}

const TOLERANCE: Tolerance = Tolerance::Relative(1e-4);

#[test]
fn a_model_equals_itself() {
    let model = Chain { fault: "none" };
    let result = compare(&model, &model, &probes(), TOLERANCE).unwrap();
    assert!(result.equal && result.first.is_none() && result.origins.is_empty());
    assert_eq!(result.activations.len(), STAGES.len() + 1);
    assert_eq!((result.output.kl, result.output.top1_agreement), (Some(0.0), Some(1.0)));
}

#[test]
fn one_fault_is_found_where_it_is() {
    let reference = Chain { fault: "none" };
    for (at, (fault, word)) in STAGES
        .into_iter()
        .zip([
            "embeddings",
            "norm in front of",
            "weight, bias or operator of `model.layers.0.q_proj`",
            "attention itself",
            "weight, bias or operator of `model.layers.0.o_proj`",
            "residual wiring",
            "norm in front of",
            "residual wiring",
        ])
        .chain([(OUTPUT, "head")])
        .enumerate()
    {
        let result = compare(&Chain { fault }, &reference, &probes(), TOLERANCE).unwrap();
        let first = result.first.expect("the fault shows");
        assert_eq!(first.name, fault);
        assert!(first.suspect.contains(word), "{fault}: {}", first.suspect);
        assert_eq!(result.origins.len(), 1, "{fault}");
        assert!(!result.equal && (at == 0 || first.after.is_some()));
    }
}

#[test]
fn a_trace_comes_back_and_finds_the_same_fault() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("golden.safetensors");
    let reference = Chain { fault: "none" };
    let trace = Trace::record(&reference, &probes(), Keep::All).unwrap();
    trace.save(&path).unwrap();
    let loaded = Trace::load(&path).unwrap();
    assert_eq!(loaded, trace);
    assert!(compare_with_trace(&reference, &loaded, TOLERANCE).unwrap().equal);
    let broken = Chain { fault: STAGES[4] };
    let found = compare_with_trace(&broken, &loaded, TOLERANCE).unwrap();
    assert_eq!(found.first.unwrap().name, STAGES[4]);

    let coarse = Trace::record(&reference, &probes(), Keep::Residual).unwrap();
    let found = compare_with_trace(&broken, &coarse, TOLERANCE).unwrap();
    assert_eq!(found.first.unwrap().name, "layers.0.resid.mid");
    assert_eq!(found.only_model.len(), 5);
}

#[test]
fn what_is_no_trace_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    assert!(matches!(Trace::load(&path), Err(Error::Io { .. })));
    std::fs::write(&path, b"garbage").unwrap();
    assert!(matches!(Trace::load(&path), Err(Error::Malformed { .. })));
    let other =
        safetensors::serialize(Vec::<(String, safetensors::tensor::TensorView)>::new(), None);
    std::fs::write(&path, other.unwrap()).unwrap();
    assert!(matches!(Trace::load(&path), Err(Error::Malformed { .. })));
    let model = Chain { fault: "none" };
    assert!(compare(&model, &model, &[], TOLERANCE).is_err());
}

#[test]
fn values_that_are_not_finite_differ() {
    struct Nan;
    impl Traced for Nan {
        fn trace(&self, ids: &[u32], _: &mut dyn Tap) -> Result<Tensor<3>> {
            let data = TensorData::new(vec![f32::NAN; ids.len() * 3], [1, ids.len(), 3]);
            Ok(Tensor::from_data(data, &Device::flex()))
        }
        fn has_logits(&self) -> bool {
            true
        }
    }
    let result = compare(&Nan, &Chain { fault: "none" }, &probes(), TOLERANCE).unwrap();
    assert!(!result.equal && result.output.error == f64::INFINITY);
    assert_eq!(result.only_reference.len(), STAGES.len());
}

#[test]
fn coarse_formats_are_judged_by_divergence() {
    assert_eq!(tolerance(DType::F32), Tolerance::Relative(1e-4));
    assert_eq!(tolerance(DType::BF16), Tolerance::Relative(2e-2));
    assert!(matches!(tolerance(DType::I8), Tolerance::Divergence(_)));
    let (model, reference) = (Chain { fault: STAGES[7] }, Chain { fault: "none" });
    let lenient = compare(&model, &reference, &probes(), Tolerance::Divergence(10.0)).unwrap();
    assert!(lenient.equal);
    let strict = compare(&model, &reference, &probes(), Tolerance::Divergence(1e-9)).unwrap();
    assert!(!strict.equal);
}
