//! A server of the command's own, and a client for it.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The model that ships.
pub fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/redraft-stories-10m")
}

/// A running `redraft serve`; it is killed when this is dropped.
pub struct Server {
    child: Child,
    pub url: String,
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Starts one of the shipped model on a free port.
    pub fn start(flags: &[&str]) -> Server {
        Server::of(&model(), flags)
    }

    pub fn of(model: &Path, flags: &[&str]) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_redraft"))
            .args(["serve", "--addr", "127.0.0.1:0", "--device", "cpu", "--json-logs", "--model"])
            .arg(model)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the command");
        let mut lines = BufReader::new(child.stderr.take().expect("piped"));
        let log = Arc::new(Mutex::new(String::new()));
        let url = loop {
            let mut line = String::new();
            assert!(lines.read_line(&mut line).expect("a log") > 0, "the server ended: {}", log.lock().unwrap());
            log.lock().unwrap().push_str(&line);
            let object: Value = serde_json::from_str(&line).unwrap_or_default();
            if let Some(addr) = object["addr"].as_str() {
                break format!("http://{addr}");
            }
        };
        let kept = log.clone();
        std::thread::spawn(move || {
            let mut line = String::new();
            while lines.read_line(&mut line).is_ok_and(|n| n > 0) {
                kept.lock().unwrap().push_str(&std::mem::take(&mut line));
            }
        });
        Server { child, url, log }
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn get(&self, path: &str) -> (u16, String) {
        let mut response = agent().get(format!("{}{path}", self.url)).call().expect("an answer");
        (response.status().as_u16(), response.body_mut().read_to_string().expect("a text"))
    }

    /// Status and body of a POST.
    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let mut response = self.send(path, &body.to_string(), &[]);
        let text = response.body_mut().read_to_string().expect("a text");
        (response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub fn send(&self, path: &str, body: &str, headers: &[(&str, &str)]) -> ureq::http::Response<ureq::Body> {
        let request = agent().post(format!("{}{path}", self.url)).header("Content-Type", "application/json");
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send(body).expect("an answer")
    }

    /// The answer of a completion, which must be one.
    pub fn complete(&self, body: Value) -> Value {
        let (status, answer) = self.post("/v1/completions", &body);
        assert_eq!(status, 200, "{answer}");
        answer
    }

    /// Chunks of a stream, up to `[DONE]`.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut response = self.send(path, &body.to_string(), &[]);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let text = response.body_mut().read_to_string().expect("a text");
        let mut data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{text}");
        data.into_iter().map(|data| serde_json::from_str(data).expect("JSON")).collect()
    }

    /// A stream that is read up to some bytes and then left.
    pub fn leave(&self, body: &Value) {
        let response = self.send("/v1/completions", &body.to_string(), &[]);
        let mut bytes = [0; 200];
        let _ = response.into_body().into_reader().read(&mut bytes);
    }

    /// The value of a metric; `name` may have labels.
    pub fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let value = |line: &str| {
            let (found, value) = line.rsplit_once(' ')?;
            let (plain, labels) = found.split_once('{').unwrap_or((found, ""));
            let (wanted, label) = name.split_once('{').unwrap_or((name, ""));
            (plain == wanted && labels.contains(label.trim_end_matches('}'))).then(|| value.parse::<f64>().expect("a number"))
        };
        text.lines().filter_map(value).fold(0.0, |sum, value| sum + value)
    }

    /// Waits until nothing is in flight.
    pub fn idle(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.metric("redraft_requests_running") + self.metric("redraft_requests_waiting") > 0.0 {
            assert!(Instant::now() < until, "still busy: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(status.expect("kill").success());
    }

    /// Exit status, once it has ended.
    pub fn ended(&mut self) -> std::process::ExitStatus {
        self.child.wait().expect("a child")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(120))).build().into()
}
