//! Datasets, tokenizers, batches and label metrics.
