//! Small files that change a loaded model: LoRA and its relatives, IP-Adapter, textual inversion.
//!
//! Adapters act where layers are made from weights ([`crate::weights::Weights::linear`] and
//! [`crate::weights::Weights::conv2d`]); no model knows of them.
