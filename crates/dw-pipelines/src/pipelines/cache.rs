//! The components that are kept between loads: keyed by what they are, owned by the workflows that use them,
//! the least recently used given up first when they take too much memory.
//!
//! A component that a live pipeline holds stays in memory whatever the cache does; giving it up would only make it
//! be read a second time, so the cache never does.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
};

use super::components::SharedComponent;

struct Kept {
    component: SharedComponent,
    last_used: u64,
    /// Its name in the pipeline that used it last.
    name: String,
    /// The workflows that use it.
    owners: BTreeSet<String>,
}

/// What a cache says about a component it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptComponent {
    /// Its name in the pipeline that used it last (`unet`).
    pub name: String,
    /// Its class (`UNet2DConditionModel`).
    pub class: String,
    /// Bytes of its weights.
    pub bytes: u64,
    /// The workflows that use it, by whatever [`ComponentCache::own`] was given.
    pub owners: BTreeSet<String>,
}

/// What a cache keeps, for reports from other threads; the least recently used component first.
#[derive(Clone, Debug, Default)]
pub struct Inventory(Arc<Mutex<Vec<KeptComponent>>>);

impl Inventory {
    /// The components as of now.
    pub fn components(&self) -> Vec<KeptComponent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Loaded components by key, and the components that earlier steps share by name.
#[derive(Default)]
pub struct ComponentCache {
    budget: Option<u64>,
    clock: u64,
    kept: BTreeMap<String, Kept>,
    shared: BTreeMap<String, SharedComponent>,
    inventory: Inventory,
}

impl ComponentCache {
    /// An empty cache that keeps at most `budget` bytes of weights, or everything when none is given.
    pub fn new(budget: Option<u64>) -> Self {
        Self { budget, ..Self::default() }
    }

    /// Changes how many bytes of weights are kept; takes effect at the next load.
    pub fn set_budget(&mut self, budget: Option<u64>) {
        self.budget = budget;
    }

    /// What is kept, for other threads: the inventory follows every change.
    pub fn inventory(&self) -> Inventory {
        self.inventory.clone()
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
        let name = component.class.clone();
        let kept = Kept { last_used: self.clock, name, owners: BTreeSet::new(), component };
        self.kept.insert(kept.component.key.clone(), kept);
        self.make_room(0);
    }

    /// Notes that the workflow `owner` uses a component, and what it calls it. What an adapted component is made
    /// of belongs to the workflow as well.
    pub fn own(&mut self, key: &str, name: &str, owner: &str) {
        let Some(kept) = self.kept.get_mut(key) else { return };
        name.clone_into(&mut kept.name);
        kept.owners.insert(owner.to_owned());
        let base = kept.component.base.as_ref().map(|base| base.key.clone());
        if let Some(base) = base {
            self.own(&base, name, owner);
        }
        self.publish();
    }

    /// Notes that nothing belongs to the workflow `owner` any more, and gives up what belongs to no workflow and is
    /// not in use.
    pub fn disown(&mut self, owner: &str) {
        let mut orphans = BTreeSet::new();
        for (key, kept) in &mut self.kept {
            if kept.owners.remove(owner) && kept.owners.is_empty() {
                orphans.insert(key.clone());
            }
        }
        while let Some(key) = self.oldest(|key| orphans.contains(key)) {
            self.kept.remove(&key);
        }
        self.publish();
    }

    /// Gives up the least recently used components until `bytes` more fit into the budget. Those in use stay.
    pub fn make_room(&mut self, bytes: u64) {
        while self.budget.is_some_and(|budget| self.bytes().saturating_add(bytes) > budget) {
            let Some(oldest) = self.oldest(|_| true) else { break };
            self.kept.remove(&oldest);
        }
        self.publish();
    }

    /// The least recently used component that nobody holds. One with an adapted version is held by that.
    fn oldest(&self, may_go: impl Fn(&str) -> bool) -> Option<String> {
        let idle = self.kept.iter().filter(|(key, kept)| Arc::strong_count(&kept.component) == 1 && may_go(key));
        idle.min_by_key(|(_, kept)| kept.last_used).map(|(key, _)| key.clone())
    }

    /// Gives up one component; false when it was not there.
    pub fn release(&mut self, key: &str) -> bool {
        let was_there = self.kept.remove(key).is_some();
        self.publish();
        was_there
    }

    /// Gives up everything, shared components too.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.shared.clear();
        self.publish();
    }

    /// How many bytes of weights are kept, shared components left out.
    pub fn bytes(&self) -> u64 {
        self.kept.values().map(|kept| kept.component.bytes).sum()
    }

    fn publish(&self) {
        let mut kept: Vec<&Kept> = self.kept.values().collect();
        kept.sort_by_key(|kept| kept.last_used);
        let summary = |kept: &Kept| KeptComponent {
            name: kept.name.clone(),
            class: kept.component.class.clone(),
            bytes: kept.component.bytes,
            owners: kept.owners.clone(),
        };
        let kept = kept.into_iter().map(summary).collect();
        *self.inventory.0.lock().unwrap_or_else(PoisonError::into_inner) = kept;
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

    #[test]
    fn a_component_in_use_is_never_given_up() {
        let mut cache = ComponentCache::new(Some(100));
        cache.insert(component("a", 90));
        let in_use = cache.get("a");
        cache.insert(component("b", 90));
        assert!(cache.get("a").is_some() && cache.get("b").is_none());
        drop(in_use);
        cache.make_room(20);
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn room_is_made_before_something_new_is_read() {
        let mut cache = ComponentCache::new(Some(100));
        cache.insert(component("a", 30));
        cache.insert(component("b", 30));
        cache.make_room(60);
        assert!(cache.get("a").is_none() && cache.get("b").is_some());
    }

    #[test]
    fn what_belongs_to_another_workflow_too_survives_the_end_of_one() {
        let mut cache = ComponentCache::new(None);
        for key in ["a", "b", "c"] {
            cache.insert(component(key, 1));
        }
        cache.own("a", "unet", "first");
        cache.own("b", "vae", "first");
        cache.own("b", "vae", "second");
        cache.disown("first");
        assert!(cache.get("a").is_none() && cache.get("b").is_some(), "only `a` was the first workflow's alone");
        assert!(cache.get("c").is_some(), "nobody has claimed `c` yet");
        let owners = |name: &str| cache.inventory().components().into_iter().find(|kept| kept.name == name);
        assert_eq!(owners("vae").expect("kept").owners, BTreeSet::from(["second".to_owned()]));
    }

    #[test]
    fn the_inventory_names_the_least_recently_used_component_first() {
        let mut cache = ComponentCache::new(None);
        let inventory = cache.inventory();
        for key in ["a", "b"] {
            cache.insert(component(key, 1));
            cache.own(key, key, "workflow");
        }
        cache.get("a");
        cache.own("a", "a", "workflow");
        let names: Vec<_> = inventory.components().into_iter().map(|kept| kept.name).collect();
        assert_eq!(names, ["b", "a"]);
        cache.clear();
        assert!(inventory.components().is_empty());
    }
}
