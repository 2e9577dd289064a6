//! Components that are not wholly on their device: which of their layers are there, when they come and when they go.
//!
//! A model knows nothing of this. It asks [`Weights`] for its layers, and those of a paged component are built from
//! the stored tensors when they are used. Owns the policies; leaves reading and moving of tensors to [`Weights`].

use std::{
    any::Any,
    collections::HashMap,
    fmt,
    marker::PhantomData,
    ops::Deref,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use super::Weights;
use crate::{Error, Result};

/// Names at the start of a path that only wrap a model, so that its blocks come after them.
const WRAPPERS: [&str; 5] = ["text_model", "vision_model", "model", "encoder", "decoder"];

/// The number of no group.
const NONE: usize = usize::MAX;

/// When the layers of a component come to the device, and when they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// All of them in their stage of a call; they go when the next stage begins.
    Whole,
    /// Each for the moment of its computation.
    Layers,
    /// Group by group.
    Groups {
        /// How many blocks a group has; with 0 every layer is a group.
        blocks: usize,
        /// Whether a second thread fetches the next group while one computes.
        prefetch: bool,
    },
}

/// Where the tensors of a paged component rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// In the file they come from.
    File,
    /// In host memory, in the type they are used in, from their first use on.
    Host,
}

/// Which stage of a call has its components on the device. Shared by everything that one cache loads.
#[derive(Default)]
pub struct Occupancy {
    present: Mutex<Present>,
}

#[derive(Default)]
struct Present {
    stage: String,
    pagers: Vec<Weak<Pager>>,
}

impl Occupancy {
    /// Makes room for the component of `pager`: what belongs to another stage goes.
    fn enter(&self, pager: &Pager) {
        let mut present = lock(&self.present);
        if present.stage != pager.stage {
            present.clear();
            present.stage.clone_from(&pager.stage);
        }
        if !present.pagers.iter().any(|known| known.ptr_eq(&pager.own)) {
            present.pagers.push(pager.own.clone());
        }
    }

    /// The end of a stage: whatever came for it goes.
    pub(crate) fn leave(&self) {
        lock(&self.present).clear();
    }
}

impl Present {
    fn clear(&mut self) {
        let had_any = !self.pagers.is_empty();
        self.pagers.drain(..).filter_map(|pager| pager.upgrade()).for_each(|pager| pager.evict());
        self.stage.clear();
        if had_any {
            give_back_free_memory();
        }
    }
}

/// The layers of one paged component.
pub(crate) struct Pager {
    /// Itself.
    own: Weak<Pager>,
    paging: Paging,
    pub(super) rest: Rest,
    /// What it calls its stage; components of one stage are on the device together.
    stage: String,
    occupancy: Arc<Occupancy>,
    state: Mutex<State>,
    /// The group that computes and the one that is fetched ahead: what a second thread may still bring.
    wanted: [AtomicUsize; 2],
    tally: Tally,
}

#[derive(Default)]
struct State {
    groups: Vec<Vec<Weak<Page>>>,
    numbers: HashMap<String, usize>,
    current: Option<usize>,
    /// The group that is being fetched ahead.
    ahead: Option<usize>,
    /// Which group came after which, the last time.
    following: HashMap<usize, usize>,
}

/// What a pager did so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    builds: AtomicU64,
    bytes: AtomicU64,
    peak_bytes: AtomicU64,
}

/// One layer: how it is built, and what was built while it is there.
struct Page {
    group: usize,
    bytes: u64,
    build: Box<dyn Fn() -> Result<Built> + Send + Sync>,
    built: Mutex<Option<Built>>,
}

type Built = Arc<dyn Any + Send + Sync>;

impl Pager {
    /// A component that comes to the device as `paging` says, in `stage`.
    pub(crate) fn new(paging: Paging, rest: Rest, stage: &str, occupancy: &Arc<Occupancy>) -> Arc<Self> {
        Arc::new_cyclic(|own| Self {
            own: own.clone(),
            paging,
            rest,
            stage: stage.to_owned(),
            occupancy: Arc::clone(occupancy),
            state: Mutex::default(),
            wanted: [NONE, NONE].map(AtomicUsize::new),
            tally: Tally::default(),
        })
    }

    /// One for another model of the same kind and stage.
    pub(super) fn another(&self) -> Arc<Self> {
        Self::new(self.paging, self.rest, &self.stage, &self.occupancy)
    }

    /// How many layers came to the device so far, how many bytes of them are there, and how many were at most. Layers
    /// that come for one computation alone count as come only.
    #[cfg(test)]
    pub(crate) fn tally(&self) -> (u64, u64, u64) {
        (self.tally.builds.load(Relaxed), self.tally.bytes.load(Relaxed), self.tally.peak_bytes.load(Relaxed))
    }

    fn register(&self, path: &str, bytes: u64, build: Box<dyn Fn() -> Result<Built> + Send + Sync>) -> Arc<Page> {
        let mut state = lock(&self.state);
        let key = match self.paging {
            Paging::Groups { blocks, .. } => group_key(path, blocks),
            Paging::Whole | Paging::Layers => String::new(),
        };
        let next = state.groups.len();
        let group = *state.numbers.entry(key).or_insert(next);
        if group == next {
            state.groups.push(Vec::new());
        }
        let page = Arc::new(Page { group, bytes, build, built: Mutex::new(None) });
        state.groups[group].push(Arc::downgrade(&page));
        page
    }

    fn get(&self, page: &Page) -> Result<Built> {
        self.occupancy.enter(self);
        match self.paging {
            Paging::Layers => {
                self.tally.builds.fetch_add(1, Relaxed);
                (page.build)()
            }
            Paging::Whole => page.keep(&self.tally),
            Paging::Groups { prefetch, .. } => {
                self.turn_to(page.group, prefetch);
                page.keep(&self.tally)
            }
        }
    }

    /// Lets the group before go, and has the one after `group` fetched.
    fn turn_to(&self, group: usize, prefetch: bool) {
        let mut state = lock(&self.state);
        if state.current == Some(group) {
            return;
        }
        let next = state.following.get(&group).copied().unwrap_or(group + 1);
        let next = Some(next).filter(|next| prefetch && *next != group && *next < state.groups.len());
        let (before, ahead) = (state.current.replace(group), state.ahead.take());
        state.ahead = next;
        // A thread that comes late must not bring back what goes now.
        self.want(group, next.unwrap_or(NONE));
        if let Some(before) = before {
            state.following.insert(before, group);
            state.evict(before, &self.tally);
        }
        if let Some(wrong) = ahead.filter(|ahead| *ahead != group) {
            state.evict(wrong, &self.tally);
        }
        if let Some(next) = next {
            self.fetch_ahead(state.groups[next].iter().filter_map(Weak::upgrade).collect());
        }
    }

    fn want(&self, group: usize, ahead: usize) {
        self.wanted[0].store(group, Relaxed);
        self.wanted[1].store(ahead, Relaxed);
    }

    /// Builds `pages` in a second thread, as long as they are wanted.
    fn fetch_ahead(&self, pages: Vec<Arc<Page>>) {
        let own = self.own.clone();
        let fetch = move || {
            for page in pages {
                let Some(pager) = own.upgrade() else { return };
                let mut built = lock(&page.built);
                // Looked at under the lock of the page: whoever lets it go changes `wanted` first.
                if !pager.wanted.iter().any(|wanted| wanted.load(Relaxed) == page.group) {
                    return;
                }
                // Whoever needs the layer builds it again and meets the error.
                if built.is_none() && page.fill(&mut built, &pager.tally).is_err() {
                    return;
                }
            }
        };
        // Without a second thread the layers come when they are used.
        drop(std::thread::Builder::new().name("weights".into()).spawn(fetch));
    }

    /// Lets everything go.
    fn evict(&self) {
        let mut state = lock(&self.state);
        self.want(NONE, NONE);
        (0..state.groups.len()).for_each(|group| state.evict(group, &self.tally));
        (state.current, state.ahead) = (None, None);
    }
}

impl State {
    fn evict(&self, group: usize, tally: &Tally) {
        for page in self.groups[group].iter().filter_map(Weak::upgrade) {
            if lock(&page.built).take().is_some() {
                tally.bytes.fetch_sub(page.bytes, Relaxed);
            }
        }
    }
}

impl Page {
    /// The layer, built now if it is not there, which stays.
    fn keep(&self, tally: &Tally) -> Result<Built> {
        let mut built = lock(&self.built);
        match &*built {
            Some(layer) => Ok(Arc::clone(layer)),
            None => self.fill(&mut built, tally),
        }
    }

    fn fill(&self, built: &mut Option<Built>, tally: &Tally) -> Result<Built> {
        let layer = (self.build)()?;
        tally.builds.fetch_add(1, Relaxed);
        let bytes = tally.bytes.fetch_add(self.bytes, Relaxed) + self.bytes;
        tally.peak_bytes.fetch_max(bytes, Relaxed);
        *built = Some(Arc::clone(&layer));
        Ok(layer)
    }
}

/// The group of a layer: `blocks` successive entries of a list of blocks, or what is beside such lists by its first
/// name. With 0 the layer itself.
pub(crate) fn group_key(path: &str, blocks: usize) -> String {
    if blocks == 0 {
        return path.to_owned();
    }
    let names: Vec<&str> = path.split('.').collect();
    let first = names.iter().take_while(|name| WRAPPERS.contains(name)).count();
    // The inner list of a T5 encoder has its wrapper's name in front of it, and nothing else.
    let (first, number) = match names.get(first + 1).and_then(|name| name.parse::<usize>().ok()) {
        Some(number) => (first, Some(number / blocks)),
        None => (first.min(names.len() - 1), None),
    };
    let list = names[..=first].join(".");
    number.map_or(list.clone(), |number| format!("{list}.{number}"))
}

/// A layer of a model: there, or fetched when it is used.
pub(crate) enum Layer<T> {
    /// On the device, as long as the model is.
    Here(T),
    /// On the device when its pager says so.
    Paged(Paged<T>),
}

/// A layer that comes and goes.
pub(crate) struct Paged<T> {
    page: Arc<Page>,
    pager: Arc<Pager>,
    layer: PhantomData<fn() -> T>,
}

/// A layer for one computation.
pub(crate) enum Borrowed<'a, T> {
    Here(&'a T),
    Fetched(Arc<T>),
}

impl<T> Deref for Borrowed<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self {
            Self::Here(layer) => layer,
            Self::Fetched(layer) => layer,
        }
    }
}

impl<T: Send + Sync + 'static> Layer<T> {
    /// The layer on its device.
    pub(crate) fn get(&self) -> Result<Borrowed<'_, T>> {
        match self {
            Self::Here(layer) => Ok(Borrowed::Here(layer)),
            Self::Paged(Paged { page, pager, .. }) => {
                let layer = pager.get(page)?.downcast::<T>();
                let layer = layer.map_err(|_| Error::Unsupported("a layer was built as another kind".into()))?;
                Ok(Borrowed::Fetched(layer))
            }
        }
    }
}

impl<T: Clone> Clone for Layer<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Here(layer) => Self::Here(layer.clone()),
            Self::Paged(Paged { page, pager, layer }) => {
                Self::Paged(Paged { page: Arc::clone(page), pager: Arc::clone(pager), layer: *layer })
            }
        }
    }
}

impl<T: fmt::Debug> fmt::Debug for Layer<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Here(layer) => layer.fmt(formatter),
            Self::Paged(paged) => write!(formatter, "a layer of {} bytes that comes when it is used", paged.page.bytes),
        }
    }
}

impl Weights {
    /// The layer that `build` makes at this path: now, or when it is used where the component is paged. `parameters`
    /// are the names of its tensors below this path, already checked.
    pub(crate) fn layer<T: Send + Sync + 'static>(
        &self,
        parameters: &[&str],
        build: impl Fn(&Self) -> Result<T> + Send + Sync + 'static,
    ) -> Result<Layer<T>> {
        let Some(pager) = self.pager() else { return Ok(Layer::Here(build(self)?)) };
        let bytes = parameters.iter().map(|name| self.bytes_of(name)).sum();
        let weights = self.fetching();
        let build = Box::new(move || Ok(Arc::new(build(&weights)?) as Built));
        let page = pager.register(self.path(), bytes, build);
        Ok(Layer::Paged(Paged { page, pager: Arc::clone(pager), layer: PhantomData }))
    }
}

/// What other threads left behind is as good as before: every change is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The C library keeps freed memory for later; after a component has gone, others need it.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
fn give_back_free_memory() {
    unsafe extern "C" {
        fn malloc_trim(pad: usize) -> std::ffi::c_int;
    }
    // SAFETY: the function takes a number, may be called at any time by any thread, and changes nothing that a program
    // can see.
    unsafe { malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_back_free_memory() {}

#[cfg(test)]
mod tests;
