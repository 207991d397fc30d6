//! compressed-tensors and GPTQ: which linears are packed, on which grid, and the configuration that says so.

use std::collections::BTreeMap;

use refit_store::architecture::Site;
use refit_store::lattice::Lattice;
use refit_store::{DType, SideFile};
use serde_json::{Value, json};

use super::decide::{Decision, How, Packing, Parts, float_of};
use super::inputs::{self, Said};
use super::lattices::Found;
use super::seen::Seen;
use super::{Activations, CheckpointFormat, Export, Layout, NAME, Target};
use crate::emit::serialize;
use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::method::Plan;
use crate::quantize::activations;
use crate::rewrite::{linears, shape_of};

/// Decides about every tensor: linears on a grid are packed, everything else stays as it is.
///
/// # Errors
/// A model without such linears, and grids that the format has no word for.
pub fn decide(
    export: &Export,
    model: &ModelInput,
    seen: &Seen,
    plan: &mut Plan,
) -> Result<Vec<Decision>> {
    let sites = linears(model)?;
    let found = &seen.grids;
    if found.is_empty() {
        let problem = format!(
            "none of its {} linears lies on a grid of equal steps, and this format holds nothing else; quantize it \
             first: refit apply rtn {} -o OUT --bits 4 --group 64",
            sites.len(),
            model.source
        );
        return Err(Error::BadData { source_name: model.source.clone(), problem });
    }
    let packed: Vec<(&Site, Found)> =
        sites.iter().filter_map(|site| Some((*site, *found.get(&site.name)?))).collect();
    if packed.len() < sites.len() {
        let first = sites.iter().find(|site| !found.contains_key(&site.name));
        plan.notes.push(format!(
            "{} of {} linears lie on no grid and stay as they are (the first: `{}`)",
            sites.len() - packed.len(),
            sites.len(),
            first.map_or("", |site| &*site.name)
        ));
    }
    let packing = match export.to {
        Target::Gptq => gptq(export, model, &packed, plan)?,
        _ => compressed(export, model, &packed, plan)?,
    };
    let mut decisions = match export.to {
        Target::Gptq => Vec::new(),
        _ => said(export, model, &packed, &mut Vec::new())?.parts(),
    };
    for info in &seen.tensors {
        decisions.push(match packing.get(&info.name) {
            Some(&(own, packing)) => Decision {
                source: Some(info.name.clone()),
                name: info.name.trim_end_matches(".weight").to_owned(),
                shape: info.shape.clone(),
                dtype: DType::F16.to_string(),
                how: How::Codes(own),
                packed: Some(packing),
            },
            None => {
                let dtype = float_of(info.dtype);
                Decision::whole(&info.name, info.name.clone(), &info.shape, dtype, How::Plain)
            }
        });
    }
    Ok(decisions)
}

/// The source's grid and the packing of every packed linear.
type Packings = BTreeMap<String, (Lattice, Packing)>;

fn compressed(
    export: &Export,
    model: &ModelInput,
    packed: &[(&Site, Found)],
    plan: &mut Plan,
) -> Result<Packings> {
    let narrow = packed.iter().find(|(_, found)| found.lattice.bits != 8);
    let int8 = said(export, model, packed, &mut plan.notes)? != Said::Nothing;
    let parts = match (export.layout, int8, narrow) {
        (Layout::IntQuantized, _, None) | (Layout::Auto, true, None) => Parts::Bytes,
        (Layout::IntQuantized, _, Some((site, found))) | (_, true, Some((site, found))) => {
            let problem = format!(
                "{} needs weights of 8 bits, but `{}` has {}; quantize with --bits 8, or take --layout pack-quantized \
                 without --activations",
                if int8 { "--activations int8" } else { "--layout int-quantized" },
                site.name,
                found.lattice.bits
            );
            return Err(Error::Conflict { method: NAME, problem });
        }
        _ => Parts::Words,
    };
    let entry = |(site, found): &(&Site, Found)| {
        let packing = Packing { parts, lattice: found.lattice };
        (site.name.clone(), (found.lattice, packing))
    };
    Ok(packed.iter().map(entry).collect())
}

/// One grid for the whole model: codes as wide as the widest, the greatest common divisor of the groups.
fn gptq(
    export: &Export,
    model: &ModelInput,
    packed: &[(&Site, Found)],
    plan: &mut Plan,
) -> Result<Packings> {
    let widest = packed.iter().map(|(_, found)| found.lattice.bits).max().unwrap_or(4);
    // The narrowest width that holds all codes, and whose words every matrix fills.
    let fits = |bits: u8| {
        let whole = |size: usize| (size * usize::from(bits)).is_multiple_of(32);
        let mut shapes = packed.iter().map(|(site, _)| shape_of(site));
        bits >= widest && shapes.all(|(out, inputs)| whole(out) && whole(inputs))
    };
    let bits = [2, 3, 4, 8].into_iter().find(|&bits| fits(bits)).unwrap_or(8);
    let whole_rows = packed.iter().all(|(site, found)| found.lattice.group == shape_of(site).1);
    let common = packed.iter().fold(0, |common, (_, found)| gcd(common, found.lattice.group));
    let middle = 1i16 << (bits - 1);
    let symmetric =
        packed.iter().all(|(_, found)| -middle <= found.range.0 && found.range.1 < middle);
    let mut packings = Packings::new();
    let mut finer = 0;
    for (site, found) in packed {
        let (out, inputs) = shape_of(site);
        for (what, size) in [("inputs", inputs), ("outputs", out)] {
            if !(size * usize::from(bits)).is_multiple_of(32) {
                let problem = format!(
                    "{size} {what} of {bits} bits are no whole 32-bit words, which GPTQ asks for; export to \
                     compressed-tensors"
                );
                return Err(Error::tensor(&model.source, &site.name, problem));
            }
        }
        // Its highest code leaves only zero point 0.
        let only_zero = !symmetric && found.range.1 == 2 * middle - 1;
        if only_zero && export.checkpoint_format == CheckpointFormat::Gptq {
            let problem = "a group has zero point 0, which version 1 of GPTQ, storing z - 1, has no word for; take \
                           --checkpoint-format gptq_v2, or compressed-tensors";
            return Err(Error::tensor(&model.source, &site.name, problem));
        }
        let group = if whole_rows { inputs } else { common };
        finer += usize::from(group != found.lattice.group);
        let lattice = Lattice { bits, symmetric, group };
        let packing = Packing { parts: Parts::Gptq, lattice };
        packings.insert(site.name.clone(), (found.lattice, packing));
    }
    if finer > 0 {
        plan.notes.push(format!(
            "GPTQ has one group size for a model: groups of {common} everywhere, {finer} matrices repeat their scales"
        ));
    }
    if packed.iter().any(|(_, found)| found.lattice.bits != bits) {
        plan.notes.push(format!("GPTQ has one width for a model: codes of {bits} bits everywhere"));
    }
    Ok(packings)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The source's side files, with a configuration that describes the packing.
///
/// # Errors
/// None in practice: plain data always serializes.
pub fn side_files(
    export: &Export,
    model: &ModelInput,
    decisions: &[Decision],
) -> Result<Vec<SideFile>> {
    let mut files = model.artifact.side_files().to_vec();
    let settings = match export.to {
        Target::Gptq => gptq_settings(export, decisions),
        _ => {
            let sites = linears(model)?;
            let packed = |site: &&Site| is_packed(decisions, &site.name);
            let packed: Vec<&Site> = sites.into_iter().filter(packed).collect();
            let bytes = decisions.iter().any(|d| d.packed.is_some_and(|p| p.parts == Parts::Bytes));
            let asked = match export.activations {
                // Decided while planning: see `said`.
                Activations::Stated if !bytes => Activations::None,
                asked => asked,
            };
            let said = inputs::decide(asked, model, &packed, &mut Vec::new())?;
            compressed_settings(model, decisions, &said)
        }
    };
    let mut config = model.artifact.config().raw().clone();
    config.retain(|key, _| !matches!(key.as_str(), "quantization_config" | "compression_config"));
    config.insert("quantization_config".into(), settings.clone());
    let mut replace = |name: &str, bytes: Vec<u8>| {
        files.retain(|file| file.name != name);
        files.push(SideFile::from_bytes(name, bytes));
    };
    replace("config.json", serialize("config.json", &config)?);
    if export.to == Target::Gptq {
        replace("quantize_config.json", serialize("quantize_config.json", &settings)?);
    }
    Ok(files)
}

fn gptq_settings(export: &Export, decisions: &[Decision]) -> Value {
    let first = decisions.iter().find_map(|decision| Some((decision, decision.packed?)));
    let (decision, packing) = first.expect("invariant: something is packed");
    let Lattice { bits, symmetric, .. } = packing.lattice;
    let whole_rows = decisions
        .iter()
        .all(|d| d.packed.is_none_or(|packing| packing.lattice.group == d.shape[1]));
    let group =
        if whole_rows { -1 } else { decision.packed.map_or(-1, |p| p.lattice.group as i64) };
    json!({
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": false,
        "sym": symmetric,
        "lm_head": false,
        "checkpoint_format": export.checkpoint_format,
        "pack_dtype": "int32",
        "meta": { "quantizer": [format!("refit:{}", env!("CARGO_PKG_VERSION"))] },
    })
}

/// What is said of the inputs of packed linears. Statements beside weights of other than 8 bits are left out.
fn said(
    export: &Export,
    model: &ModelInput,
    packed: &[(&Site, Found)],
    notes: &mut Vec<String>,
) -> Result<Said> {
    let sites: Vec<&Site> = packed.iter().map(|(site, _)| *site).collect();
    let narrow = packed.iter().any(|(_, found)| found.lattice.bits != 8);
    let asked = match (export.activations, narrow || export.layout == Layout::PackQuantized) {
        (Activations::Stated, true) => {
            if !activations::stated(&model.artifact)?.is_empty() {
                notes.push(
                    "what the model states of activations is left out: it goes with weights of 8 bits in bytes only".into(),
                );
            }
            Activations::None
        }
        (asked, _) => asked,
    };
    inputs::decide(asked, model, &sites, notes)
}

fn is_packed(decisions: &[Decision], name: &str) -> bool {
    decisions.iter().any(|d| d.packed.is_some() && d.source.as_deref() == Some(name))
}

fn compressed_settings(model: &ModelInput, decisions: &[Decision], said: &Said) -> Value {
    // One configuration group for every grid.
    let mut grids: BTreeMap<(u8, bool, Option<usize>), Vec<&str>> = BTreeMap::new();
    let mut bytes = false;
    for decision in decisions {
        let Some(Packing { parts, lattice }) = decision.packed else { continue };
        bytes |= parts == Parts::Bytes;
        let group = (lattice.group != decision.shape[1]).then_some(lattice.group);
        grids.entry((lattice.bits, lattice.symmetric, group)).or_default().push(&decision.name);
    }
    let format = if bytes { "int-quantized" } else { "pack-quantized" };
    let activations = said.settings();
    let single = grids.len() == 1;
    let groups: serde_json::Map<String, Value> = grids
        .into_iter()
        .enumerate()
        .map(|(at, ((bits, symmetric, group), names))| {
            let targets = if single { json!(["Linear"]) } else { json!(names) };
            let strategy = if group.is_some() { "group" } else { "channel" };
            let settings = json!({
                "targets": targets,
                "weights": {
                    "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
                    "group_size": group, "dynamic": false, "actorder": null,
                },
                "input_activations": activations,
                "output_activations": null,
            });
            (format!("group_{at}"), settings)
        })
        .collect();
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored(model, decisions),
        "kv_cache_scheme": null,
    })
}

/// Modules of class `Linear` that are not packed: the head, and linears on no grid.
fn ignored(model: &ModelInput, decisions: &[Decision]) -> Vec<String> {
    let packed = |name: &str| is_packed(decisions, name);
    let architecture = model.artifact.architecture();
    let mut names: Vec<String> = architecture
        .linears()
        .filter(|site| !packed(&site.name))
        .map(|site| site.module().to_owned())
        .collect();
    // A tied head is a module of its own in transformers, stored or not.
    names.push("lm_head".to_owned());
    names
}
