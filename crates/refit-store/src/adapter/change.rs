//! What an adapter does to the tensors of its base, tensor by tensor.

use std::collections::BTreeMap;

use super::form::Form;
use super::{Adapter, Part};
use crate::architecture::Layout;
use crate::error::Result;

/// What a form does to one tensor.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// To the weight of its site, or to the tensor that it replaces.
    Weight(&'a Form),
    /// To the bias beside that weight.
    Bias(&'a Form),
}

impl Change<'_> {
    /// Changes `values` of a tensor held as `shape`, matrices as `[out, in]`; `layout` is how the base stores it: tensors that
    /// replace the base's come in that order and are turned.
    ///
    /// # Errors
    /// [`Error::AdapterForm`](crate::Error::AdapterForm) as [`Form::apply`] and [`Form::apply_bias`].
    pub fn apply(self, values: &mut [f32], shape: &[usize], layout: Layout) -> Result<()> {
        match (self, shape) {
            (Self::Bias(form), _) => form.apply_bias(values).map(drop),
            // Held `[out, in]` and stored `[in, out]`: what is held is the stored matrix read by columns.
            (Self::Weight(form @ (Form::Full { .. } | Form::Delta { .. })), &[out, inputs])
                if layout == Layout::InOut =>
            {
                let mut stored = vec![0.0; values.len()];
                for (row, held) in values.chunks_exact(inputs.max(1)).enumerate() {
                    for (column, x) in held.iter().enumerate() {
                        stored[column * out + row] = *x;
                    }
                }
                form.apply(&mut stored, inputs, out)?;
                for (row, held) in values.chunks_exact_mut(inputs.max(1)).enumerate() {
                    for (x, new) in held.iter_mut().zip(stored[row..].iter().step_by(out)) {
                        *x = *new;
                    }
                }
                Ok(())
            }
            (Self::Weight(form), _) => {
                let out = shape.first().copied().unwrap_or(1);
                form.apply(values, out, shape.iter().skip(1).product())
            }
        }
    }
}

impl Adapter {
    /// The changes of every tensor, in the order in which they are made. `has` says which tensors the base holds: a form that
    /// scales a bias leaves a site without one alone. Forms that depend on the input change no tensor and are left out.
    pub fn changes(&self, has: impl Fn(&str) -> bool) -> BTreeMap<String, Vec<Change<'_>>> {
        let mut changes: BTreeMap<String, Vec<Change>> = BTreeMap::new();
        for part @ Part { site, form } in self.parts().iter().filter(|part| part.form.mergeable()) {
            changes.entry(part.tensor()).or_default().push(Change::Weight(form));
            let bias = format!("{site}.bias");
            if form.changes_bias() && !matches!(form, Form::Full { .. }) && has(&bias) {
                changes.entry(bias).or_default().push(Change::Bias(form));
            }
        }
        changes
    }
}
