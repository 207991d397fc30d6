//! Decoding state: keys and values of the tokens seen so far. It belongs to the caller, not to the model.

use burn::tensor::{Device, Tensor};

/// Keys and values of one layer, `[batch, capacity, kv_heads * head_dim]`; the first `len` rows are filled.
#[derive(Debug, Clone)]
struct Layer {
    keys: Tensor<3>,
    values: Tensor<3>,
    len: usize,
}

/// Keys and values of every layer of a decoder.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    layers: Vec<Option<Layer>>,
    len: usize,
}

/// Rows that a cache starts with; it doubles when full.
const FIRST_CAPACITY: usize = 256;

impl Cache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends `keys` and `values` `[batch, seq, width]` to layer `index` and returns all of that layer's.
    pub fn append(
        &mut self,
        index: usize,
        keys: Tensor<3>,
        values: Tensor<3>,
    ) -> (Tensor<3>, Tensor<3>) {
        if self.layers.len() <= index {
            self.layers.resize(index + 1, None);
        }
        let [batch, seq, width] = keys.dims();
        let device = keys.device();
        let (old_keys, old_values, len) = match self.layers[index].take() {
            Some(layer) => (layer.keys, layer.values, layer.len),
            None => {
                let capacity = FIRST_CAPACITY.max(seq.next_power_of_two());
                (empty(batch, capacity, width, &device), empty(batch, capacity, width, &device), 0)
            }
        };
        let total = len + seq;
        let put = |store: Tensor<3>, new: Tensor<3>| {
            let capacity = store.dims()[1];
            let store = if total > capacity {
                let more = empty(batch, total.next_power_of_two() - capacity, width, &device);
                Tensor::cat(vec![store, more], 1)
            } else {
                store
            };
            store.slice_assign([0..batch, len..total, 0..width], new)
        };
        let (keys, values) = (put(old_keys, keys), put(old_values, values));
        let view = |x: &Tensor<3>| match batch {
            // The first rows of a matrix are contiguous, and so need no copy.
            1 => {
                let rows = x.clone().reshape([x.dims()[1], width]).slice([0..total, 0..width]);
                rows.reshape([1, total, width])
            }
            _ => x.clone().slice([0..batch, 0..total, 0..width]),
        };
        let result = (view(&keys), view(&values));
        self.layers[index] = Some(Layer { keys, values, len: total });
        self.len = self.len.max(total);
        result
    }

    /// Forgets every token past the first `n`.
    pub fn truncate(&mut self, n: usize) {
        for layer in self.layers.iter_mut().flatten() {
            layer.len = layer.len.min(n);
        }
        self.len = self.len.min(n);
    }

    /// An independent copy; both may go on separately. Storage is shared until one of them grows.
    pub fn fork(&self) -> Self {
        self.clone()
    }

    /// Forgets everything but keeps the memory.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Bytes that the cache occupies.
    pub fn bytes(&self) -> usize {
        let floats = |x: &Tensor<3>| x.dims().iter().product::<usize>();
        self.layers.iter().flatten().map(|l| 4 * (floats(&l.keys) + floats(&l.values))).sum()
    }
}

fn empty(batch: usize, capacity: usize, width: usize, device: &Device) -> Tensor<3> {
    Tensor::zeros([batch, capacity, width], device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(from: usize, n: usize) -> Tensor<3> {
        let values: Vec<f32> = (from..from + n).map(|i| i as f32).collect();
        Tensor::<1>::from_floats(values.as_slice(), &Device::flex()).reshape([1, n, 1])
    }

    fn values(x: Tensor<3>) -> Vec<f32> {
        x.into_data().try_into_vec().expect("f32")
    }

    #[test]
    fn append_truncate_fork_and_grow() {
        let mut cache = Cache::new();
        cache.append(0, ramp(0, 3), ramp(10, 3));
        let mut other = cache.fork();
        let (k, v) = cache.append(0, ramp(3, 300), ramp(13, 300));
        assert_eq!(cache.len(), 303);
        assert_eq!(values(k), (0..303).map(|i| i as f32).collect::<Vec<_>>());
        assert_eq!(values(v)[302], 312.0);
        // The fork has not seen the growth.
        let (k, _) = other.append(0, ramp(7, 1), ramp(7, 1));
        assert_eq!(values(k), vec![0.0, 1.0, 2.0, 7.0]);
        cache.truncate(2);
        let (k, _) = cache.append(0, ramp(9, 1), ramp(9, 1));
        assert_eq!(values(k), vec![0.0, 1.0, 9.0]);
        cache.reset();
        assert!(cache.is_empty() && cache.bytes() > 0);
    }
}
