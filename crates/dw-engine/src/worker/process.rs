//! One worker's process and the threads that listen to it: how it is started, how its end is noticed, and that
//! nothing of it stays behind.

use std::{
    collections::{BTreeSet, VecDeque},
    fmt,
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command as Program, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use interprocess::local_socket::{Listener, Stream, prelude::*};

use super::{
    CrashReport,
    frame::{self, FrameError, MessageError},
    liveness::Liveness,
    protocol::{Answer, Command, PROTOCOL_VERSION},
    socket::{self, Connection},
    supervisor::{WorkerError, WorkerLaunch},
};

/// How long a worker may take from its start to its first word.
const START_LIMIT: Duration = Duration::from_secs(30);

/// How long a stranger that got hold of the socket may keep us waiting.
const STRANGER_LIMIT: Duration = Duration::from_secs(2);

/// How long a worker may take to end after it was asked to.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// How long it may take after it was told to.
const TERMINATE_LIMIT: Duration = Duration::from_secs(5);

/// How long a worker whose connection has ended may take to be gone.
const END_LIMIT: Duration = Duration::from_secs(2);

/// How long the threads that listen to a worker may take to notice that it has ended.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(500);

/// How long [`Process::next`] waits.
const TICK: Duration = Duration::from_millis(50);

/// How many of a worker's last log lines are kept.
const LOG_LINES: usize = 20;

/// How many bytes of a log line are kept.
const LOG_LINE_BYTES: u64 = 2000;

/// How a worker was lost.
#[derive(Debug)]
pub(super) enum Loss {
    /// The connection has ended.
    Gone,
    /// What came was no message.
    Nonsense(String),
    /// Nothing came for so long, not even heartbeats.
    Hung(Duration),
}

/// A living worker, as far as we know.
pub(super) struct Process {
    body: Body,
    device: String,
    connection: Connection,
    answers: Receiver<Result<Answer, Loss>>,
    answer_reader: JoinHandle<()>,
    /// How many messages have come, heartbeats included.
    signs: Arc<AtomicU64>,
    liveness: Liveness,
    silence_limit: Duration,
    /// Folders that it may have left unfinished files in.
    output_dirs: BTreeSet<PathBuf>,
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("id", &self.id()).field("device", &self.device).finish_non_exhaustive()
    }
}

impl Process {
    /// Starts a worker and waits until it is ready.
    pub(super) fn start(launch: &WorkerLaunch) -> Result<Self, WorkerError> {
        let failed = |error: &dyn fmt::Display| WorkerError::Unreachable(format!("cannot start the worker: {error}"));
        let (listener, name) = socket::listen().map_err(|error| failed(&error))?;
        let secret = socket::random_text().map_err(|error| failed(&error))?;
        let mut body = Body::spawn(launch, &name, &secret).map_err(|error| {
            WorkerError::Unreachable(format!("cannot start the worker `{}`: {error}", launch.program.display()))
        })?;
        let connection = match accept(&listener, &mut body, &secret) {
            Ok(connection) => connection,
            Err(Early::Died) => return Err(WorkerError::Crashed(Box::new(body.end(None)))),
            Err(Early::Refused(reason)) => {
                let report = body.end(None);
                let said = report.log_lines.last().map(|line| format!(" (its last words: {line})")).unwrap_or_default();
                return Err(WorkerError::Unreachable(format!("cannot start the worker: {reason}{said}")));
            }
        };
        // From here on nobody else can come, and the name is free.
        drop(listener);
        let signs = Arc::new(AtomicU64::new(0));
        let (answers, answer_reader) = read_answers(&connection, &signs);
        let mut process = Self {
            body,
            device: String::new(),
            answers,
            answer_reader,
            connection,
            liveness: Liveness::new(launch.silence_limit, Instant::now(), 0),
            signs,
            silence_limit: launch.silence_limit,
            output_dirs: BTreeSet::new(),
        };
        process.device = process.introduce(launch)?;
        Ok(process)
    }

    /// Says what the worker is to be; gives the name of its device once it is ready.
    fn introduce(&mut self, launch: &WorkerLaunch) -> Result<String, WorkerError> {
        let hello = Command::Hello {
            protocol: PROTOCOL_VERSION,
            engine: launch.engine.clone(),
            cache_budget: launch.cache_budget,
        };
        let mut next = self.send(&hello).map(|()| None);
        loop {
            match next {
                Ok(Some(Answer::Ready { device })) => return Ok(device),
                Ok(Some(Answer::Error { message, .. })) => {
                    self.await_end();
                    self.bury(None);
                    return Err(WorkerError::Unreachable(message));
                }
                Ok(_) => {}
                Err(Loss::Nonsense(reason)) => {
                    self.bury(None);
                    return Err(WorkerError::Unreachable(format!("the worker broke the protocol: {reason}")));
                }
                Err(Loss::Hung(silence)) => {
                    let log_lines = self.bury(None).log_lines;
                    return Err(WorkerError::Hung { silence, log_lines });
                }
                Err(Loss::Gone) => {
                    self.await_end();
                    return Err(WorkerError::Crashed(Box::new(self.bury(None))));
                }
            }
            next = self.next();
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.body.child.id()
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// Whether the process has not ended.
    pub(super) fn is_alive(&mut self) -> bool {
        self.body.status().is_none()
    }

    /// Notes a folder that the worker writes to.
    pub(super) fn writes_to(&mut self, output_dir: &Path) {
        if !self.output_dirs.contains(output_dir) {
            self.output_dirs.insert(output_dir.to_owned());
        }
    }

    pub(super) fn send(&mut self, command: &Command) -> Result<(), Loss> {
        // Silence before a question means nothing: nobody was watching.
        self.liveness = Liveness::new(self.silence_limit, Instant::now(), self.signs.load(Ordering::Relaxed));
        frame::write(&mut &*self.connection, command).map_err(|error| match error {
            FrameError::Io(_) => Loss::Gone,
            other => Loss::Nonsense(other.to_string()),
        })
    }

    /// The next answer; none when nothing has come for a moment.
    pub(super) fn next(&mut self) -> Result<Option<Answer>, Loss> {
        match self.answers.recv_timeout(TICK) {
            Ok(Ok(answer)) => return Ok(Some(answer)),
            Ok(Err(loss)) => return Err(loss),
            Err(RecvTimeoutError::Disconnected) => return Err(Loss::Gone),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if self.liveness.is_hung(Instant::now(), self.signs.load(Ordering::Relaxed)) {
            return Err(Loss::Hung(self.silence_limit));
        }
        Ok(None)
    }

    /// Ends the worker: asks it, then has it terminated, then killed.
    pub(super) fn shut_down(&mut self) {
        let asked = self.send(&Command::Shutdown).is_ok();
        if asked {
            self.body.has_ended_within(SHUTDOWN_LIMIT);
        }
        self.body.terminate();
        self.bury(None);
    }

    /// Gives a worker whose connection has ended the time to end by itself, so that its exit code is its own.
    pub(super) fn await_end(&mut self) {
        self.body.has_ended_within(END_LIMIT);
    }

    /// Kills what is left of the worker, and removes the files that it had not finished.
    pub(super) fn bury(&mut self, message: Option<String>) -> CrashReport {
        let report = self.body.end(message);
        // With the worker's end of the connection gone, ours has nothing to wait for.
        wait_until(LAST_WORDS_LIMIT, || self.answer_reader.is_finished());
        for folder in &self.output_dirs {
            // A folder that cannot be listed holds nothing that we could remove.
            let _ = dw_core::output::remove_unfinished(folder, self.id());
        }
        report
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.bury(None);
    }
}

/// A child process with its last log lines. Never outlives its owner.
struct Body {
    child: Child,
    status: Option<ExitStatus>,
    log: Arc<Mutex<VecDeque<String>>>,
    log_reader: JoinHandle<()>,
}

impl Body {
    fn spawn(launch: &WorkerLaunch, name: &str, secret: &str) -> io::Result<Self> {
        let mut program = Program::new(&launch.program);
        program.args(&launch.arguments).arg("--connect").arg(name);
        if let Some(file) = &launch.log_file {
            program.arg("--log-file").arg(file);
        }
        program.envs(launch.environment.iter().map(|(name, value)| (name, value)));
        program.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        keep_from_terminal(&mut program);
        let mut child = program.spawn()?;
        // On its standard input nobody else can read the secret, unlike among its arguments. A worker that has ended
        // already is noticed when its connection is awaited.
        if let Some(mut input) = child.stdin.take() {
            let _ = writeln!(input, "{secret}");
        }
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let (errors, lines) = (child.stderr.take(), Arc::clone(&log));
        let log_reader = thread::spawn(move || {
            if let Some(errors) = errors {
                keep_last_lines(errors, &lines);
            }
        });
        Ok(Self { child, status: None, log, log_reader })
    }

    /// How it ended, when it has.
    fn status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    fn has_ended_within(&mut self, limit: Duration) -> bool {
        wait_until(limit, || self.status().is_some())
    }

    /// Tells it to end and gives it time to. Windows has no such request.
    fn terminate(&mut self) {
        // Once its status is taken, its number may be another's.
        #[cfg(unix)]
        if self.status().is_none()
            && let Ok(id) = i32::try_from(self.child.id())
        {
            use nix::{sys::signal, unistd::Pid};
            // Fails when it has ended in this moment.
            let _ = signal::kill(Pid::from_raw(id), signal::Signal::SIGTERM);
            self.has_ended_within(TERMINATE_LIMIT);
        }
    }

    /// Kills it when it lives, takes its exit status so that no zombie stays, and tells how it ended.
    fn end(&mut self, message: Option<String>) -> CrashReport {
        if self.status().is_none() {
            // Fails when it has ended in this moment.
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
        // Its last words may still be on the way; a child of its own could hold the pipe open for ever.
        wait_until(LAST_WORDS_LIMIT, || self.log_reader.is_finished());
        let lines = self.log.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        CrashReport::new(self.status, message, lines)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        if self.status().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Looks every few milliseconds whether something is so, for as long as `limit`.
fn wait_until(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !is_so() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(2));
    }
    true
}

/// A Ctrl-C in the terminal is for us; the worker hears of it from us.
#[cfg(unix)]
fn keep_from_terminal(program: &mut Program) {
    std::os::unix::process::CommandExt::process_group(program, 0);
}

#[cfg(windows)]
fn keep_from_terminal(program: &mut Program) {
    const CREATE_NEW_PROCESS_GROUP: u32 = 0x200;
    std::os::windows::process::CommandExt::creation_flags(program, CREATE_NEW_PROCESS_GROUP);
}

/// Why a worker did not come.
enum Early {
    /// It ended.
    Died,
    /// It did not come in time, or the system would not let it.
    Refused(String),
}

/// Waits for the one who knows the secret.
fn accept(listener: &Listener, body: &mut Body, secret: &str) -> Result<Connection, Early> {
    let deadline = Instant::now() + START_LIMIT;
    while Instant::now() < deadline {
        match listener.accept() {
            Ok(stream) => match greet(stream, secret) {
                Ok(Some(connection)) => return Ok(connection),
                Ok(None) => {}
                Err(reason) => return Err(Early::Refused(reason)),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if body.status().is_some() {
                    return Err(Early::Died);
                }
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(Early::Refused(error.to_string())),
        }
    }
    Err(Early::Refused(format!("it did not connect within {} seconds", START_LIMIT.as_secs())))
}

/// Hears who has connected. None for a stranger; an error for a worker of another version.
fn greet(stream: Stream, secret: &str) -> Result<Option<Connection>, String> {
    // Not every system has time limits on pipes; then only the worker itself could keep us waiting.
    let _ = stream.set_recv_timeout(Some(STRANGER_LIMIT));
    let hello = frame::read(&mut &stream).ok().flatten().and_then(|body| frame::decode::<Answer>(&body).ok());
    let Some(Answer::Hello { protocol, secret: given, .. }) = hello else { return Ok(None) };
    if given != secret {
        return Ok(None);
    }
    if protocol != PROTOCOL_VERSION {
        return Err(format!("it speaks version {protocol} of the protocol, this is version {PROTOCOL_VERSION}"));
    }
    let _ = stream.set_recv_timeout(None);
    Ok(Some(Arc::new(stream)))
}

/// Reads answers on a thread of its own, so that a worker never has to wait for us. Heartbeats are only counted.
fn read_answers(connection: &Connection, signs: &Arc<AtomicU64>) -> (Receiver<Result<Answer, Loss>>, JoinHandle<()>) {
    let (sender, receiver) = mpsc::channel();
    let (connection, signs) = (Arc::clone(connection), Arc::clone(signs));
    let reader = thread::spawn(move || {
        loop {
            let answer = next_answer(&connection);
            signs.fetch_add(1, Ordering::Relaxed);
            let is_last = answer.is_err();
            if !matches!(answer, Ok(Answer::Heartbeat)) && sender.send(answer).is_err() || is_last {
                break;
            }
        }
    });
    (receiver, reader)
}

/// The next answer. Messages of a type that is not known are a newer worker's and are passed over.
fn next_answer(connection: &Connection) -> Result<Answer, Loss> {
    let loss = |error: FrameError| match error {
        FrameError::Io(_) | FrameError::Truncated { .. } => Loss::Gone,
        other => Loss::Nonsense(other.to_string()),
    };
    loop {
        let body = frame::read(&mut &**connection).map_err(loss)?.ok_or(Loss::Gone)?;
        match frame::decode(&body) {
            Err(FrameError::Message(MessageError::UnknownType(_))) => {}
            decoded => return decoded.map_err(loss),
        }
    }
}

/// Reads to the end and keeps the last lines.
fn keep_last_lines(errors: impl Read, lines: &Mutex<VecDeque<String>>) {
    let mut errors = BufReader::new(errors);
    let mut line = Vec::new();
    while matches!(errors.by_ref().take(LOG_LINE_BYTES).read_until(b'\n', &mut line), Ok(1..)) {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if !text.is_empty() {
            lines.push_back(text);
        }
        while lines.len() > LOG_LINES {
            lines.pop_front();
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_are_kept_and_none_is_endless() {
        let lines: Vec<String> = (0..30).map(|number| format!("line {number}\n\n")).collect();
        let text = lines.concat() + &"x".repeat(5000);
        let lines = Mutex::default();
        keep_last_lines(text.as_bytes(), &lines);
        let lines = lines.into_inner().expect("unbroken");
        assert_eq!(lines.len(), LOG_LINES);
        assert_eq!((lines[0].as_str(), lines[16].as_str(), lines[19].len()), ("line 13", "line 29", 1000));
    }
}
