//! Names of devices.

use burn::tensor::Device;

use crate::error::{Error, Result};

/// Opens the device that `--device NAME` means: `cpu` always, `vulkan`, `metal`, `cuda`, `rocm` where that cargo feature was built.
pub fn device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::flex()),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(Default::default())),
        #[cfg(feature = "metal")]
        "metal" => Ok(Device::metal(Default::default())),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(0usize)),
        #[cfg(feature = "rocm")]
        "rocm" => Ok(Device::rocm(0usize)),
        "vulkan" | "metal" | "cuda" | "rocm" => Err(Error::Device {
            device: name.into(),
            reason: format!("this binary was built without it; build with `--features {name}`"),
        }),
        _ => Err(Error::Device {
            device: name.into(),
            reason: "known devices are cpu, vulkan, metal, cuda and rocm".into(),
        }),
    }
}
