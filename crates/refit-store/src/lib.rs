//! Artifacts on disk: formats, architectures, sources, lineage, cards, scan.
