//! Names of devices as people type them. Which of them exists is the engine's to find out.

use std::str::FromStr;

/// A device somebody asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    /// The best there is.
    Auto,
    /// A certain one, by the engine's name for it (`cpu`, `cuda`, `cuda:1`, `metal`).
    Named(String),
}

impl DeviceChoice {
    /// The engine's form: none lets it choose.
    pub(crate) fn name(&self) -> Option<String> {
        match self {
            Self::Auto => None,
            Self::Named(name) => Some(name.clone()),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.trim().to_ascii_lowercase();
        match name.as_str() {
            "auto" => Ok(Self::Auto),
            "cpu" | "cuda" | "metal" => Ok(Self::Named(name)),
            // What torch calls Apple's GPU.
            "mps" => Ok(Self::Named("metal".into())),
            _ if name.strip_prefix("cuda:").is_some_and(|index| index.parse::<u16>().is_ok()) => Ok(Self::Named(name)),
            _ => Err(format!("`{text}` is not a device; use cpu, cuda, cuda:N, metal or auto")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_read_as_torch_users_type_them() {
        let named = |name: &str| Ok(DeviceChoice::Named(name.into()));
        assert_eq!("cpu".parse(), named("cpu"));
        assert_eq!("CUDA:1".parse(), named("cuda:1"));
        assert_eq!("mps".parse(), named("metal"));
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        for bad in ["gpu", "cuda:", "cuda:x", ""] {
            assert!(bad.parse::<DeviceChoice>().is_err(), "{bad}");
        }
    }
}
