//! Which linears an adapter sits on, spelled as PEFT spells it.

use refit_nn::Decoder;
use refit_store::architecture::{Role, Site};

use crate::error::{Error, Result};
use crate::inputs::ModelInput;
use crate::suggest::nearest;

/// Every linear inside the blocks.
pub const ALL_LINEAR: &str = "all-linear";

/// The linears of `model` that `targets` name: `all-linear`, a module's name or the end of its path (`q_proj`,
/// `self_attn.q_proj`).
///
/// # Errors
/// A target that matches nothing, with the nearest name; a model without linears.
pub fn resolve<'a>(
    method: &'static str,
    model: &'a ModelInput,
    targets: &[String],
) -> Result<Vec<&'a Site>> {
    let all: Vec<&Site> = model.artifact.architecture().linears().collect();
    if targets.iter().any(|target| target == ALL_LINEAR) || targets.is_empty() {
        return match all.is_empty() {
            true => crate::rewrite::linears(model),
            false => Ok(all),
        };
    }
    let matches = |site: &Site, target: &str| {
        site.module() == target || site.module().ends_with(&format!(".{target}"))
    };
    for target in targets {
        if !all.iter().any(|site| matches(site, target)) {
            let mut names: Vec<&str> =
                all.iter().filter_map(|site| site.module().rsplit('.').next()).collect();
            names.sort_unstable();
            names.dedup();
            let hint = nearest(target, &names).map(|name| format!(" (did you mean `{name}`?)"));
            let expected = format!(
                "no linear is called that{}; there are {}, or `{ALL_LINEAR}`",
                hint.unwrap_or_default(),
                names.join(", ")
            );
            return Err(Error::range(method, "target_modules", target, expected));
        }
    }
    Ok(all.into_iter().filter(|s| targets.iter().any(|target| matches(s, target))).collect())
}

/// The last parts of the modules' paths, sorted, as PEFT's `target_modules` lists them.
pub fn names(sites: &[&Site]) -> Vec<String> {
    let mut names: Vec<String> = sites
        .iter()
        .filter_map(|site| site.module().rsplit('.').next())
        .map(str::to_owned)
        .collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Refuses a rank that a matrix does not have.
///
/// # Errors
/// Rank 0, or one above the smaller side of the smallest matrix, which is named.
pub fn check_rank(method: &'static str, rank: usize, sites: &[&Site]) -> Result<()> {
    if rank == 0 {
        return Err(Error::range(method, "rank", 0, "at least 1"));
    }
    let small = sites.iter().filter_map(|site| {
        let (out, inputs) = site.out_in()?;
        Some((out.min(inputs), site, out, inputs))
    });
    match small.min_by_key(|(least, ..)| *least) {
        Some((least, site, out, inputs)) if rank > least => {
            let expected = format!(
                "`{}` is {out} x {inputs}, whose rank is at most {least}; take a rank of at most {least} or other \
                 target_modules",
                site.module()
            );
            Err(Error::range(method, "rank", rank, expected))
        }
        _ => Ok(()),
    }
}

/// Whether the site feeds a nonlinear part of the ffn from its input side: (IA)³ scales its inputs.
pub fn is_feedforward(site: &Site) -> bool {
    matches!(site.role, Role::Down)
}

/// Calls `f` on each linear of the decoder that `sites` names.
///
/// # Errors
/// Whatever `f` says; a site that the running model does not hold.
pub fn for_each(
    model: &ModelInput,
    decoder: &mut Decoder,
    sites: &[&Site],
    mut f: impl FnMut(&Site, &mut refit_nn::operator::Linear) -> Result<()>,
) -> Result<()> {
    for site in sites {
        let linear = decoder.linear_mut(&site.name).ok_or_else(|| {
            Error::tensor(&model.source, &site.name, "the running model does not hold it")
        })?;
        f(site, linear)?;
    }
    Ok(())
}
