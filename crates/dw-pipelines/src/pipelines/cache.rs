//! The components that are kept between loads: keyed by what they are, the least recently used given up
//! first when they take too much memory.
//!
//! A component that a live pipeline holds stays in memory whatever the cache does; the cache only decides
//! what is found again.

use std::{collections::BTreeMap, sync::Arc};

use super::components::SharedComponent;
use crate::weights::Occupancy;

struct Kept {
    component: SharedComponent,
    last_used: u64,
}

/// Loaded components by key, and the components that earlier steps share by name.
#[derive(Default)]
pub struct ComponentCache {
    budget: Option<u64>,
    clock: u64,
    kept: BTreeMap<String, Kept>,
    shared: BTreeMap<String, SharedComponent>,
    /// Which paged components are on the device.
    occupancy: Arc<Occupancy>,
}

impl ComponentCache {
    /// What the paged components of this cache make room for each other by.
    pub(crate) fn occupancy(&self) -> &Arc<Occupancy> {
        &self.occupancy
    }

    /// Whether a component with this key is kept. It does not count as used.
    pub fn contains(&self, key: &str) -> bool {
        self.kept.contains_key(key)
    }

    /// An empty cache that keeps at most `budget` bytes of weights, or everything when none is given.
    pub fn new(budget: Option<u64>) -> Self {
        Self { budget, ..Self::default() }
    }

    /// The component with this key, which counts as used now.
    pub fn get(&mut self, key: &str) -> Option<SharedComponent> {
        self.clock += 1;
        let kept = self.kept.get_mut(key)?;
        kept.last_used = self.clock;
        Some(Arc::clone(&kept.component))
    }

    /// Keeps a component under its key and gives up the least recently used ones beyond the budget.
    pub fn insert(&mut self, component: SharedComponent) {
        self.clock += 1;
        let kept = Kept { last_used: self.clock, component };
        self.kept.insert(kept.component.key.clone(), kept);
        while self.budget.is_some_and(|budget| self.bytes() > budget) {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.last_used).map(|(key, _)| key.clone());
            let Some(oldest) = oldest else { break };
            self.kept.remove(&oldest);
        }
    }

    /// Gives up one component; false when it was not there.
    pub fn release(&mut self, key: &str) -> bool {
        self.kept.remove(key).is_some()
    }

    /// Gives up everything, shared components too.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.shared.clear();
    }

    /// How many bytes of weights are kept, shared components left out.
    pub fn bytes(&self) -> u64 {
        self.kept.values().map(|kept| kept.component.bytes).sum()
    }

    /// Offers a component to later pipelines under `name`; the last one shared under a name counts.
    pub fn share(&mut self, name: impl Into<String>, component: SharedComponent) {
        self.shared.insert(name.into(), component);
    }

    /// The component an earlier step shared under `name`.
    pub fn shared(&self, name: &str) -> Option<SharedComponent> {
        self.shared.get(name).cloned()
    }

    /// The names under which components are shared.
    pub fn shared_names(&self) -> impl Iterator<Item = &str> {
        self.shared.keys().map(String::as_str)
    }

    /// Ends all sharing (between two runs); what is kept by key stays.
    pub fn unshare_all(&mut self) {
        self.shared.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        pipelines::components::{Component, Model},
        text::{ClipTokenizer, TokenizerFiles},
    };

    fn component(key: &str, bytes: u64) -> SharedComponent {
        let files = TokenizerFiles {
            vocab: Some(serde_json::json!({ "<|startoftext|>": 0, "<|endoftext|>": 1 })),
            merges: Some(String::new()),
            ..TokenizerFiles::default()
        };
        let model = Model::Tokenizer(ClipTokenizer::new(&files).expect("a small tokenizer"));
        Arc::new(Component { class: "CLIPTokenizer".into(), key: key.into(), bytes, model, weights: None, base: None })
    }

    #[test]
    fn beyond_the_budget_the_least_recently_used_component_goes_first() {
        let mut cache = ComponentCache::new(Some(100));
        cache.insert(component("a", 40));
        cache.insert(component("b", 40));
        assert!(cache.get("a").is_some());
        cache.insert(component("c", 40));
        assert!(cache.get("b").is_none() && cache.get("a").is_some() && cache.get("c").is_some());
        assert_eq!(cache.bytes(), 80);
    }

    #[test]
    fn a_released_component_is_gone_and_a_cleared_cache_is_empty() {
        let mut cache = ComponentCache::new(None);
        cache.insert(component("a", 40));
        cache.share("vae", component("b", 1));
        assert!(cache.release("a") && !cache.release("a"));
        assert!(cache.shared("vae").is_some());
        cache.clear();
        assert!(cache.shared("vae").is_none() && cache.bytes() == 0);
    }
}
