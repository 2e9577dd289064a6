//! One repository of the HuggingFace hub: its snapshot in the local cache, and the download of what the
//! snapshot lacks.
//!
//! The cache has the layout of `huggingface_hub`, so both share their files. A model is pinned to one
//! commit when it is opened; everything fetched later belongs to that commit. A snapshot that holds what
//! is asked for is used without any network traffic.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{OnceLock, mpsc},
    time::Duration,
};

use dw_core::event::Event;
use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        Progress, RepoInfo,
        sync::{Api, ApiBuilder, ApiError, ApiRepo},
    },
};

use super::{Hub, Need, TOKENIZER_FILES, file_names, join, sub};
use crate::{Error, Result, request::Context, weights::folder};

/// How often a running download looks whether somebody asked to stop.
const CANCEL_INTERVAL: Duration = Duration::from_millis(100);

/// How many bytes arrive between two progress events.
const REPORT_BYTES: u64 = 1 << 20;

/// How often a broken connection is taken up again.
const RETRIES: usize = 3;

/// A repository at one commit.
#[derive(Debug)]
pub struct HubModel {
    hub: Hub,
    repo: String,
    commit: String,
    root: PathBuf,
    files: OnceLock<BTreeSet<String>>,
}

impl HubModel {
    /// Pins `revision` (branch, tag or commit) to a commit: by the cache when it knows the revision, else by
    /// asking the hub.
    pub(super) fn open(hub: &Hub, repo: &str, revision: &str, context: Context<'_>) -> Result<Self> {
        check_name(repo)?;
        check_revision(revision)?;
        let cached = cached_commit(hub, repo, revision);
        let mut model = Self {
            root: PathBuf::new(),
            hub: hub.clone(),
            repo: repo.to_owned(),
            commit: cached.clone().unwrap_or_else(|| revision.to_owned()),
            files: OnceLock::new(),
        };
        if cached.is_none() {
            model.pin(revision, context)?;
        }
        model.root = repo_cache(hub, repo).join("snapshots").join(&model.commit);
        Ok(model)
    }

    /// The snapshot's folder.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Asks the hub which commit `revision` is and remembers it in the cache.
    fn pin(&mut self, revision: &str, context: Context<'_>) -> Result<()> {
        if self.hub.offline {
            return Err(self.not_cached("the model"));
        }
        let info = self.ask(context)?;
        self.commit.clone_from(&info.sha);
        let repo = Repo::with_revision(self.repo.clone(), RepoType::Model, revision.to_owned());
        Cache::new(self.hub.cache.clone()).repo(repo).create_ref(&self.commit)?;
        self.files.get_or_init(|| names(&info));
        Ok(())
    }

    /// Downloads what `folder` lacks.
    pub(super) fn fetch(&self, folder: &str, need: Need<'_>, context: Context<'_>) -> Result<()> {
        if self.has(folder, need) {
            return Ok(());
        }
        if self.hub.offline {
            return Err(self.not_cached(&wanted(folder, need)));
        }
        match need {
            Need::File(name) => self.fetch_required(&sub(folder, name), context),
            Need::Tokenizer => {
                let listed = self.listed(context)?;
                let wanted = TOKENIZER_FILES.iter().map(|name| sub(folder, name)).filter(|path| listed.contains(path));
                wanted.into_iter().try_for_each(|path| self.download(&path, context))
            }
            Need::Weights(variant) => {
                self.fetch_required(&sub(folder, "config.json"), context)?;
                self.fetch_weights(folder, variant, context)
            }
        }
    }

    /// Whether the snapshot already holds it.
    fn has(&self, folder: &str, need: Need<'_>) -> bool {
        let dir = join(&self.root, folder);
        let has = |name: &str| dir.join(name).is_file();
        match need {
            Need::File(name) => has(name),
            Need::Tokenizer => has("tokenizer.json") || (has("vocab.json") && has("merges.txt")),
            Need::Weights(variant) => has("config.json") && folder::weight_files(&dir, variant).is_ok(),
        }
    }

    fn fetch_required(&self, path: &str, context: Context<'_>) -> Result<()> {
        if join(&self.root, path).is_file() {
            return Ok(());
        }
        if !self.listed(context)?.contains(path) {
            return Err(Error::Source(format!(
                "`{}` on the hub has no `{path}`; it is not a complete model in the diffusers layout, choose another",
                self.repo
            )));
        }
        self.download(path, context)
    }

    fn fetch_weights(&self, folder: &str, variant: Option<&str>, context: Context<'_>) -> Result<()> {
        let prefix = sub(folder, "");
        let inside = |path: &String| path.strip_prefix(&prefix).filter(|name| !name.contains('/')).map(str::to_owned);
        let names: BTreeSet<String> = self.listed(context)?.iter().filter_map(inside).collect();
        match folder::choose(&names, variant) {
            Some(folder::Choice::Single(name)) => self.download(&sub(folder, &name), context),
            Some(folder::Choice::Index(name)) => {
                self.download(&sub(folder, &name), context)?;
                let dir = join(&self.root, folder);
                let shards = folder::shard_names(&dir, &name)?;
                shards.iter().try_for_each(|shard| self.download(&sub(folder, shard), context))
            }
            None => Err(folder::nothing_found(&PathBuf::from(&self.repo).join(folder), variant, &names)),
        }
    }

    /// The names of the files directly inside `folder`: what the hub lists, or what is here when dw is offline.
    pub(super) fn names(&self, folder: &str, context: Context<'_>) -> Result<Vec<String>> {
        if self.hub.offline {
            return file_names(&join(&self.root, folder));
        }
        let prefix = sub(folder, "");
        let inside = |path: &String| path.strip_prefix(&prefix).filter(|name| !name.contains('/')).map(str::to_owned);
        Ok(self.listed(context)?.iter().filter_map(inside).collect())
    }

    /// The names of all files of the repository at this commit.
    fn listed(&self, context: Context<'_>) -> Result<&BTreeSet<String>> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let info = self.ask(context)?;
        Ok(self.files.get_or_init(|| names(&info)))
    }

    fn ask(&self, context: Context<'_>) -> Result<RepoInfo> {
        context.cancel.check()?;
        self.remote()?.info().map_err(|error| self.explain(&error, None))
    }

    fn remote(&self) -> Result<ApiRepo> {
        let api: Api = ApiBuilder::from_cache(Cache::new(self.hub.cache.clone()))
            .with_endpoint(self.hub.endpoint.clone())
            .with_token(self.hub.token.clone())
            .with_retries(RETRIES)
            .with_progress(false)
            .build()
            .map_err(|error| self.explain(&error, None))?;
        Ok(api.repo(Repo::with_revision(self.repo.clone(), RepoType::Model, self.commit.clone())))
    }

    /// Downloads one file into the snapshot. The transfer runs on a thread of its own, which an abandoned
    /// download leaves to end with the program: the part on disk is taken up again next time.
    fn download(&self, path: &str, context: Context<'_>) -> Result<()> {
        context.cancel.check()?;
        if join(&self.root, path).is_file() {
            return Ok(());
        }
        let remote = self.remote()?;
        let (sender, receiver) = mpsc::channel();
        let (progress, file) = (Reporter { sender: sender.clone(), bytes: 0, reported: 0, total: 0 }, path.to_owned());
        std::thread::spawn(move || {
            let result = remote.download_with_progress(&file, progress);
            // Nobody listens any more after a cancellation.
            let _ = sender.send(Message::Done(result.map(drop)));
        });
        loop {
            match receiver.recv_timeout(CANCEL_INTERVAL) {
                Ok(Message::Bytes { bytes, total }) => {
                    context.events.emit(Event::Download { file: path.to_owned(), bytes, total });
                }
                Ok(Message::Done(result)) => return result.map_err(|error| self.explain(&error, Some(path))),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(Error::Source(format!("the download of `{path}` ended without a result; try again")));
                }
            }
            context.cancel.check()?;
        }
    }

    fn not_cached(&self, what: &str) -> Error {
        Error::Source(format!(
            "dw is offline and {what} of `{}` is not in the cache `{}`; run once without `--offline` and \
             HF_HUB_OFFLINE, or use a local folder",
            self.repo,
            self.hub.cache.display()
        ))
    }

    /// What an answer of the hub means for the user. `path` is the file asked for, none for the listing.
    fn explain(&self, error: &ApiError, path: Option<&str>) -> Error {
        let (repo, page) = (&self.repo, format!("{}/{}", self.hub.endpoint, self.repo));
        let what = path.map_or_else(|| format!("model `{repo}`"), |path| format!("`{path}` of model `{repo}`"));
        Error::Source(match (status(error), path, &self.hub.token) {
            (Some(401), Some(_), None) => {
                format!("{what} is gated; accept its licence at {page}, then put an access token into HF_TOKEN")
            }
            (Some(401), None, None) => format!(
                "{what} does not exist on the hub, or is private; check the name, or put an access token into HF_TOKEN"
            ),
            (Some(401 | 403), ..) => format!(
                "your HuggingFace token has no access to {what}; accept its licence at {page}, or use the token of an \
                 account that has access"
            ),
            (Some(404), ..) => {
                format!(
                    "{what} does not exist on the hub at revision `{}`; check the name and the revision",
                    self.commit
                )
            }
            (Some(429), ..) => {
                format!("the hub refuses {what} for now (too many requests); try again in a few minutes")
            }
            _ => format!(
                "{what} could not be fetched from {}: {error}; check the network and try again (a started download \
                 goes on where it stopped), or use a local folder",
                self.hub.endpoint
            ),
        })
    }
}

/// What is missing, in words.
fn wanted(folder: &str, need: Need<'_>) -> String {
    match need {
        Need::File(name) => format!("`{}`", sub(folder, name)),
        Need::Tokenizer => format!("the tokenizer `{folder}`"),
        Need::Weights(Some(variant)) => format!("the weights `{folder}` (variant `{variant}`)"),
        Need::Weights(None) => format!("the weights `{folder}`"),
    }
}

/// The HTTP status in an error of the hub's client, which hands it on as text only.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::TooManyRetries(inner) => status(inner),
        ApiError::RequestError(inner) => inner.to_string().strip_prefix("http status: ")?.parse().ok(),
        _ => None,
    }
}

fn names(info: &RepoInfo) -> BTreeSet<String> {
    // A listing is data from the network: names that lead out of the snapshot are not followed.
    let is_plain = |name: &str| name.split('/').all(|part| !part.is_empty() && part != ".." && part != ".");
    info.siblings.iter().map(|file| file.rfilename.clone()).filter(|name| is_plain(name)).collect()
}

fn repo_cache(hub: &Hub, repo: &str) -> PathBuf {
    hub.cache.join(format!("models--{}", repo.replace('/', "--")))
}

/// The commit the cache has a snapshot of, for a branch, a tag or the commit itself.
fn cached_commit(hub: &Hub, repo: &str, revision: &str) -> Option<String> {
    let cache = repo_cache(hub, repo);
    let named = fs_err::read_to_string(join(&cache, &format!("refs/{revision}"))).ok();
    let commit = named.map_or_else(|| revision.to_owned(), |commit| commit.trim().to_owned());
    cache.join("snapshots").join(&commit).is_dir().then_some(commit)
}

fn check_name(repo: &str) -> Result<()> {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    if repo.split('/').count() <= 2 && repo.split('/').all(is_part) && !repo.contains("..") {
        return Ok(());
    }
    Err(Error::Source(format!(
        "`{repo}` is neither a folder nor the name of a model on the hub; use a path that exists, `owner/name`, or \
         `builtin:NAME`"
    )))
}

/// A revision becomes part of a path in the cache.
fn check_revision(revision: &str) -> Result<()> {
    if !revision.is_empty() && revision.split('/').all(|part| !part.is_empty() && !part.starts_with('.')) {
        return Ok(());
    }
    Err(Error::Source(format!(
        "`{revision}` is not a revision; use a branch, a tag or a commit, `main` for the newest"
    )))
}

/// What the downloading thread tells the waiting one.
enum Message {
    Bytes { bytes: u64, total: u64 },
    Done(Result<(), ApiError>),
}

/// Passes progress on, a step of [`REPORT_BYTES`] at a time.
struct Reporter {
    sender: mpsc::Sender<Message>,
    bytes: u64,
    reported: u64,
    total: u64,
}

impl Progress for Reporter {
    fn init(&mut self, size: usize, _: &str) {
        (self.bytes, self.reported, self.total) = (0, 0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.bytes += size as u64;
        if self.bytes < self.total && self.bytes - self.reported < REPORT_BYTES {
            return;
        }
        self.reported = self.bytes;
        // Nobody listens any more after a cancellation.
        let _ = self.sender.send(Message::Bytes { bytes: self.bytes, total: self.total });
    }

    fn finish(&mut self) {}
}
