//! Evaluators, calibration, losses, optimizers and the claim harness.
