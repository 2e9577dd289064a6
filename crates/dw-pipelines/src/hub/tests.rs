//! The hub against a server on this machine that speaks as much of its protocol as the client asks for.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use dw_core::{
    cancel::CancellationToken,
    event::{Event, Silent},
};

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A folder that goes when the test ends.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("dw-hub-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        fs_err::create_dir_all(&path).expect("the temporary folder is writable");
        Self(path)
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        let _ = fs_err::remove_dir_all(&self.0);
    }
}

/// What the server serves: files by path, or nothing but a status.
#[derive(Clone, Default)]
struct Served {
    files: BTreeMap<String, Vec<u8>>,
    /// For the listing.
    listing_status: Option<u16>,
    /// For every file.
    file_status: Option<u16>,
    asked: Arc<Mutex<BTreeSet<String>>>,
}

impl Served {
    fn with(files: &[(&str, &str)]) -> Self {
        let files = files.iter().map(|&(path, text)| (path.to_owned(), text.as_bytes().to_vec())).collect();
        Self { files, ..Self::default() }
    }

    /// Starts serving; gives the address.
    fn start(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("the listener is bound");
        let served = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = served.clone();
                std::thread::spawn(move || served.answer(stream));
            }
        });
        format!("http://{address}")
    }

    fn answer(&self, mut stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().expect("a connected stream"));
        let mut line = String::new();
        reader.read_line(&mut line).expect("a request line");
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut range = None;
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).is_err() || header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_ascii_lowercase().strip_prefix("range: bytes=") {
                range = Some(value.trim().to_owned());
            }
        }
        let response = if path.starts_with("/api/") { self.listing() } else { self.file(&path, range.as_deref()) };
        let _ = stream.write_all(&response);
    }

    fn listing(&self) -> Vec<u8> {
        if let Some(status) = self.listing_status {
            return plain(status);
        }
        let siblings: Vec<Value> = self.files.keys().map(|path| serde_json::json!({ "rfilename": path })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
        response("200 OK", "content-type: application/json\r\n", body.as_bytes())
    }

    fn file(&self, path: &str, range: Option<&str>) -> Vec<u8> {
        if let Some(status) = self.file_status {
            return plain(status);
        }
        let name = path.split(&format!("/resolve/{COMMIT}/")).nth(1).unwrap_or_default();
        self.asked.lock().expect("no test panics here").insert(name.to_owned());
        let Some(bytes) = self.files.get(name) else { return plain(404) };
        let (first, last) = range.and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
        let first: usize = first.parse().unwrap_or(0);
        let last = last.parse().unwrap_or(bytes.len() - 1);
        let headers = format!(
            "etag: \"{}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {first}-{last}/{}\r\n",
            name.replace('/', "-"),
            bytes.len()
        );
        response("206 Partial Content", &headers, &bytes[first..=last])
    }
}

fn plain(status: u16) -> Vec<u8> {
    response(&format!("{status} No"), "", b"no")
}

fn response(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}

fn hub(cache: &TempFolder, endpoint: &str) -> Hub {
    Hub { cache: cache.0.clone(), endpoint: endpoint.into(), token: None, offline: false }
}

fn source() -> ModelSource {
    ModelSource::Hub { repo: "owner/name".into(), revision: None }
}

fn with_context<T>(body: impl FnOnce(Context<'_>) -> T) -> T {
    body(Context { events: &Silent, cancel: &CancellationToken::default() })
}

fn message<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

fn repository() -> Served {
    Served::with(&[
        ("model_index.json", "{}"),
        ("README.md", "nothing to load"),
        ("unet/config.json", "{}"),
        ("unet/diffusion_pytorch_model.bin", "a pickle"),
        ("unet/diffusion_pytorch_model.safetensors", "full weights"),
        ("unet/diffusion_pytorch_model.fp16.safetensors", "half weights"),
        ("tokenizer/vocab.json", "{}"),
        ("tokenizer/merges.txt", "#version: 0.2"),
        ("tokenizer/tokenizer_config.json", "{}"),
    ])
}

#[test]
fn only_the_needed_files_are_downloaded_and_the_cache_then_serves_them_offline() {
    let (served, cache) = (repository(), TempFolder::new());
    let hub = hub(&cache, &served.start());
    with_context(|context| {
        let files = hub.open(&source(), context).expect("the repository is served");
        files.fetch("", Need::File("model_index.json"), context).expect("it is there");
        files.fetch("unet", Need::Weights(Some("fp16")), context).expect("the variant is there");
        files.fetch("tokenizer", Need::Tokenizer, context).expect("the tokenizer is there");
    });
    let asked: Vec<String> = served.asked.lock().expect("no panic").iter().cloned().collect();
    let expected = [
        "model_index.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ];
    assert_eq!(asked, expected);

    let offline = Hub { offline: true, endpoint: "http://127.0.0.1:1".into(), ..hub };
    with_context(|context| {
        let files = offline.open(&source(), context).expect("the snapshot is cached");
        files.fetch("unet", Need::Weights(Some("fp16")), context).expect("cached");
        let WeightFiles::Disk(paths) = files.weights("unet", Some("fp16")).expect("cached") else {
            panic!("weights of a repository are files");
        };
        assert_eq!(fs_err::read(&paths[0]).expect("a readable file"), b"half weights");
        let said = message(files.fetch("unet", Need::Weights(None), context));
        assert!(said.contains("offline") && said.contains("`unet`") && said.contains("--offline"), "{said}");
    });
}

#[test]
fn a_complete_snapshot_is_used_without_asking_the_network() {
    let (served, cache) = (repository(), TempFolder::new());
    let online = hub(&cache, &served.start());
    with_context(|context| {
        let files = online.open(&source(), context).expect("served");
        files.fetch("tokenizer", Need::Tokenizer, context).expect("served");
        let unreachable = Hub { endpoint: "http://127.0.0.1:1".into(), ..online };
        let files = unreachable.open(&source(), context).expect("cached");
        files.fetch("tokenizer", Need::Tokenizer, context).expect("cached");
        let by_commit = ModelSource::Hub { repo: "owner/name".into(), revision: Some(COMMIT.into()) };
        unreachable.open(&by_commit, context).expect("cached under its commit");
    });
}

#[test]
fn a_download_tells_how_far_it_is() {
    let (served, cache) = (repository(), TempFolder::new());
    let seen = Mutex::new(Vec::new());
    let sink = |event: Event| seen.lock().expect("no panic").push(event);
    let context = Context { events: &sink, cancel: &CancellationToken::default() };
    let files = hub(&cache, &served.start()).open(&source(), context).expect("served");
    files.fetch("unet", Need::File("config.json"), context).expect("served");
    let expected = Event::Download { file: "unet/config.json".into(), bytes: 2, total: 2 };
    assert_eq!(seen.into_inner().expect("no panic").last(), Some(&expected));
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let (served, cache) = (repository(), TempFolder::new());
    let hub = hub(&cache, &served.start());
    let blobs = cache.0.join("models--owner--name/blobs");
    fs_err::create_dir_all(&blobs).expect("writable");
    // What the server would send again begins differently, so the first bytes must be the kept ones.
    let part = blobs.join("unet-diffusion_pytorch_model.part");
    fs_err::write(&part, "FULL ").expect("writable");
    with_context(|context| {
        let files = hub.open(&source(), context).expect("served");
        files.fetch("unet", Need::Weights(None), context).expect("served");
        let text = files.read("unet/diffusion_pytorch_model.safetensors").expect("readable");
        assert_eq!(text.as_deref(), Some(b"FULL weights".as_slice()));
    });
}

#[test]
fn refusals_of_the_hub_come_with_their_remedy() {
    let cases = [
        (Served { listing_status: Some(401), ..repository() }, None, "does not exist on the hub, or is private"),
        (Served { listing_status: Some(404), ..repository() }, None, "check the name and the revision"),
        (Served { file_status: Some(401), ..repository() }, None, "accept its licence"),
        (Served { file_status: Some(403), ..repository() }, Some("hf_x"), "your HuggingFace token has no access"),
        (Served { listing_status: Some(500), ..repository() }, None, "check the network"),
    ];
    for (served, token, expected) in cases {
        let cache = TempFolder::new();
        let hub = Hub { token: token.map(str::to_owned), ..hub(&cache, &served.start()) };
        let said = with_context(|context| {
            message(hub.open(&source(), context).and_then(|files| files.fetch("", Need::File("model_index.json"), context)))
        });
        assert!(said.contains(expected) && said.contains("`owner/name`"), "{said}");
    }
}

#[test]
fn a_repository_without_the_needed_files_is_named() {
    let cache = TempFolder::new();
    let served = Served::with(&[("unet/config.json", "{}"), ("unet/diffusion_pytorch_model.bin", "a pickle")]);
    let hub = hub(&cache, &served.start());
    with_context(|context| {
        let files = hub.open(&source(), context).expect("served");
        let said = message(files.fetch("", Need::File("model_index.json"), context));
        assert!(said.contains("has no `model_index.json`"), "{said}");
        let said = message(files.fetch("unet", Need::Weights(None), context));
        assert!(said.contains("pickle") && said.contains("convert"), "{said}");
    });
}

#[test]
fn offline_and_not_cached_says_what_to_do() {
    let cache = TempFolder::new();
    let hub = Hub { offline: true, ..hub(&cache, "http://127.0.0.1:1") };
    let said = with_context(|context| message(hub.open(&source(), context)));
    assert!(said.contains("offline") && said.contains("`owner/name`") && said.contains("not in the cache"), "{said}");
}

#[test]
fn names_and_revisions_that_lead_out_of_the_cache_are_refused() {
    let cache = TempFolder::new();
    let hub = hub(&cache, "http://127.0.0.1:1");
    for (repo, revision) in [("../x", "main"), ("a/../b", "main"), ("a/b", "../main"), ("", "main"), ("a b/c", "main")] {
        let source = ModelSource::Hub { repo: repo.into(), revision: Some(revision.into()) };
        let said = with_context(|context| message(hub.open(&source, context)));
        assert!(said.contains("is neither a folder") || said.contains("is not a revision"), "{said}");
    }
}

#[test]
fn a_missing_folder_and_a_pickle_are_refused_with_the_way_out() {
    let cache = TempFolder::new();
    let hub = hub(&cache, "http://127.0.0.1:1");
    with_context(|context| {
        let said = message(hub.open(&ModelSource::Folder(cache.0.join("no")), context));
        assert!(said.contains("does not exist"), "{said}");
        let pickle = ModelSource::SingleFile { path: "model.ckpt".into(), config: None };
        let said = message(hub.open(&pickle, context));
        assert!(said.contains("convert it to safetensors"), "{said}");
    });
}

#[test]
fn the_environment_places_the_cache_and_the_token() {
    let vars = |pairs: &'static [(&str, &str)]| {
        move |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    };
    let home = Hub::from_vars(false, vars(&[("HF_HOME", "/h"), ("HF_TOKEN", " t\n"), ("HF_ENDPOINT", "http://m/")]));
    assert_eq!(home.cache, Path::new("/h/hub"));
    assert_eq!((home.token.as_deref(), home.endpoint.as_str(), home.offline), (Some("t"), "http://m", false));
    let cache = Hub::from_vars(false, vars(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/h"), ("HF_HUB_OFFLINE", "1")]));
    assert_eq!((cache.cache.as_path(), cache.offline), (Path::new("/c"), true));
    assert!(Hub::from_vars(true, vars(&[("HF_HOME", "/h"), ("HF_HUB_OFFLINE", "0")])).offline);
}

#[test]
fn a_built_in_model_reads_like_a_folder() {
    let cache = TempFolder::new();
    let hub = hub(&cache, "http://127.0.0.1:1");
    with_context(|context| {
        let files = hub.open(&ModelSource::Builtin("landscapes".into()), context).expect("it is inside the program");
        let index = files.require_json("model_index.json").expect("it has an index");
        assert_eq!(index["_class_name"], "StableDiffusionXLPipeline");
        assert!(matches!(files.weights("unet", Some("fp16")), Ok(WeightFiles::Memory { .. })));
        assert!(files.read("no/such.file").expect("not an error").is_none());
        let said = message(hub.open(&ModelSource::Builtin("seascapes".into()), context));
        assert!(said.contains("`builtin:landscapes`"), "{said}");
    });
}
