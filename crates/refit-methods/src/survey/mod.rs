//! The map of the field: *Model Compression and Efficient Inference for Large Language Models: A Survey* (arXiv:2402.09748)
//! as cells, with what refit has in each.
//!
//! The survey sorts its literature into families: quantization, pruning, distillation, compact architectures, dynamic networks,
//! acceleration. The families were read in its abstract, their leaves are recalled. Merging, reuse, adaptation, unlearning and
//! so on are no headings there; they keep an axis of their own, whose cells are the first two steps of the methods' paths.
//!
//! Nothing here says what refit has: that follows from the registry. Written by hand are the survey's leaves ([`leaves`]), with
//! a reason where nothing stands in one, and the papers that make the project's scope ([`papers`]), with the cell in which each
//! will stand until a method of that name is registered. [`Map::problems`] finds what contradicts the registry.

pub mod leaves;
mod map;
mod page;
pub mod papers;

pub use map::{Axis, Cell, Map, Placed, State};
