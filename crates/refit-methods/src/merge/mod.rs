//! One model out of several, without training.
//!
//! [`kernel`] is the seam: a merge method is a struct of parameters and a formula for one piece of a tensor;
//! [`group`] shows it the pieces, [`program`] reads, writes and resumes, [`mergekit`] reads recipes. No model is
//! ever whole in memory, and no large tensor either.

pub mod arcee_fusion;
pub mod blend;
pub mod breadcrumbs;
pub mod dare;
pub mod della;
pub mod delta;
pub mod fisher;
pub mod fold;
pub mod group;
pub mod informed;
pub mod interference;
pub mod karcher;
pub mod kernel;
pub mod linear;
pub mod mergekit;
pub mod model_soups;
pub mod model_stock;
pub mod multislerp;
pub mod nearswap;
pub mod nuslerp;
pub mod opcm;
pub mod passthrough;
pub mod program;
pub mod regmean;
pub mod sce;
pub mod scratch;
pub mod select;
pub mod slerp;
pub mod task_arithmetic;
#[cfg(test)]
pub mod testing;
pub mod ties;

use crate::registry::Entry;
use kernel::Maker;

/// The methods of this family.
pub const METHODS: &[Entry] = &[
    Entry::of::<model_soups::ModelSoups>(),
    Entry::of::<linear::Linear>(),
    Entry::of::<slerp::Slerp>(),
    Entry::of::<nuslerp::Nuslerp>(),
    Entry::of::<multislerp::Multislerp>(),
    Entry::of::<karcher::Karcher>(),
    Entry::of::<task_arithmetic::TaskArithmetic>(),
    Entry::of::<ties::Ties>(),
    Entry::of::<dare::DareLinear>(),
    Entry::of::<dare::DareTies>(),
    Entry::of::<della::Della>(),
    Entry::of::<della::DellaLinear>(),
    Entry::of::<breadcrumbs::Breadcrumbs>(),
    Entry::of::<breadcrumbs::BreadcrumbsTies>(),
    Entry::of::<model_stock::ModelStock>(),
    Entry::of::<sce::Sce>(),
    Entry::of::<arcee_fusion::ArceeFusion>(),
    Entry::of::<nearswap::Nearswap>(),
    Entry::of::<passthrough::Passthrough>(),
    Entry::of::<fisher::Fisher>(),
    Entry::of::<regmean::RegMean>(),
    Entry::of::<opcm::Opcm>(),
];

/// The methods that a mergekit recipe can name.
pub const KERNELS: &[Maker] = &[
    Maker::of::<linear::Linear>(),
    Maker::of::<slerp::Slerp>(),
    Maker::of::<nuslerp::Nuslerp>(),
    Maker::of::<multislerp::Multislerp>(),
    Maker::of::<karcher::Karcher>(),
    Maker::of::<task_arithmetic::TaskArithmetic>(),
    Maker::of::<ties::Ties>(),
    Maker::of::<dare::DareLinear>(),
    Maker::of::<dare::DareTies>(),
    Maker::of::<della::Della>(),
    Maker::of::<della::DellaLinear>(),
    Maker::of::<breadcrumbs::Breadcrumbs>(),
    Maker::of::<breadcrumbs::BreadcrumbsTies>(),
    Maker::of::<model_stock::ModelStock>(),
    Maker::of::<sce::Sce>(),
    Maker::of::<arcee_fusion::ArceeFusion>(),
    Maker::of::<nearswap::Nearswap>(),
    Maker::of::<passthrough::Passthrough>(),
];
