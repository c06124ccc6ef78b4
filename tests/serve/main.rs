//! The HTTP server as its clients see it.

mod support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Server, model};

/// What `redraft generate` writes.
fn generated(flags: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_redraft"))
        .args(["generate", "--device", "cpu", "--format", "json", "--model"])
        .arg(model())
        .args(flags)
        .output()
        .expect("the command");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// The door changes nothing: ids, confidence and counters are the command's, alone and in company.
#[test]
fn a_completion_is_the_text_of_the_command() {
    let server = Server::start(&[]);
    let alone = generated(&["--prompt", "Once upon a time", "--length", "40", "--seed", "7", "--preset", "did", "--temperature", "0.9"]);
    let body = json!({ "model": "redraft-stories-10m", "prompt": "Once upon a time", "max_tokens": 40, "seed": 7,
        "schedule": "did", "temperature": 0.9, "logprobs": 0, "return_token_ids": true });
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..6).map(|_| scope.spawn(|| server.complete(body.clone()))).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    for answer in &answers {
        let choice = &answer["choices"][0];
        assert_eq!((&choice["text"], &choice["token_ids"]), (&alone["text"], &alone["tokens"]));
        for key in ["tokens", "confidence", "log_prob", "revealed_at", "draft", "schedule", "finish", "seed"] {
            assert_eq!(choice["redraft"][key], alone[key], "{key}");
        }
        assert_eq!(choice["redraft"]["stages"][1]["nfe"], alone["stages"][1]["nfe"]);
        assert_eq!(choice["logprobs"]["token_logprobs"], alone["log_prob"]);
        assert_eq!(joined(&choice["logprobs"]["tokens"]), alone["text"].as_str().unwrap());
        assert_eq!(answer["object"], "text_completion");
        let (prompt, completion) = (&alone["prompt_tokens"], alone["tokens"].as_array().unwrap().len());
        assert_eq!((&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]), (prompt, &completion.into()));
    }
    let ids: std::collections::BTreeSet<&str> = answers.iter().map(|answer| answer["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), answers.len());
}

fn joined(pieces: &Value) -> String {
    pieces.as_array().unwrap().iter().map(|piece| piece.as_str().unwrap()).collect()
}

/// Deltas are final text; snapshots come in chunks without choices, and only where they are asked
/// for.
#[test]
fn chunks_join_to_the_text() {
    let server = Server::start(&[]);
    for (schedule, provisional) in [("draft", json!(false)), ("did", json!(false)), ("did", json!(true)), ("did", json!("steps"))] {
        let mut body = json!({ "prompt": "One day", "max_tokens": 40, "seed": 3, "schedule": schedule });
        let whole = server.complete(body.clone());
        body["stream"] = true.into();
        body["stream_options"] = json!({ "include_usage": true });
        body["provisional"] = provisional.clone();
        let mut chunks = server.stream("/v1/completions", &body);
        let usage = chunks.pop().expect("a chunk of usage");
        assert_eq!((&usage["usage"], &usage["choices"]), (&whole["usage"], &json!([])));
        let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
        assert_eq!(text, whole["choices"][0]["text"].as_str().unwrap(), "{schedule} {provisional}");
        let closing = chunks.last().expect("a last chunk");
        assert_eq!(closing["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
        assert_eq!(closing["choices"][0]["redraft"]["tokens"], whole["choices"][0]["redraft"]["tokens"]);
        let snapshots: Vec<&Value> = chunks.iter().filter(|chunk| chunk["choices"] == json!([])).collect();
        assert_eq!(snapshots.is_empty(), provisional == json!(false), "{schedule} {provisional}");
        for chunk in &snapshots {
            let snapshot = &chunk["redraft"]["snapshot"];
            let count = snapshot["positions"].as_array().unwrap().len();
            for key in ["tokens", "pieces", "confidence"] {
                assert_eq!(snapshot[key].as_array().unwrap().len(), count, "{key}");
            }
            assert_eq!(joined(&snapshot["pieces"]), snapshot["text"].as_str().unwrap());
        }
        if provisional == json!("steps") {
            let nfe: u64 =
                closing["choices"][0]["redraft"]["stages"].as_array().unwrap().iter().map(|stage| stage["nfe"].as_u64().unwrap()).sum();
            assert!(snapshots.len() as u64 >= nfe, "{} snapshots of {nfe} forwards", snapshots.len());
            assert!(snapshots.iter().any(|chunk| !chunk["redraft"]["snapshot"]["remasked"].as_array().unwrap().is_empty()));
        }
    }
}

#[test]
fn prompts_choices_and_holes() {
    let server = Server::start(&[]);
    let common = |mut body: Value| {
        body["max_tokens"] = 12.into();
        body["seed"] = 5.into();
        body["ignore_eos"] = true.into();
        server.complete(body)
    };
    // Choice i of n has the draws of sample i.
    let three = common(json!({ "prompt": ["One day", "The dog"], "n": 3 }));
    assert_eq!(three["choices"].as_array().unwrap().len(), 6);
    for (i, (prompt, sample)) in
        [("One day", 0), ("One day", 1), ("One day", 2), ("The dog", 0), ("The dog", 1), ("The dog", 2)].iter().enumerate()
    {
        let flags = ["--prompt", prompt, "--length", "12", "--seed", "5", "--ignore-eos", "--samples", "3"];
        let output = Command::new(env!("CARGO_BIN_EXE_redraft"))
            .args(["generate", "--device", "cpu", "--format", "jsonl"])
            .args(flags)
            .output()
            .unwrap();
        let line = String::from_utf8(output.stdout).unwrap().lines().nth(*sample).unwrap().to_owned();
        let object: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(three["choices"][i]["text"], object["text"], "{prompt} {sample}");
        assert_eq!(three["choices"][i]["index"], i);
    }
    let one = common(json!({ "prompt": "One day" }));
    assert_eq!(three["usage"]["prompt_tokens"].as_u64().unwrap(), 2 * one["usage"]["prompt_tokens"].as_u64().unwrap());
    assert_eq!(three["usage"]["completion_tokens"], 72);
    // Ids are the text that they spell.
    let (_, tokens) = server.post("/tokenize", &json!({ "prompt": "One day" }));
    let by_ids = common(json!({ "prompt": tokens["tokens"] }));
    assert_eq!(by_ids["choices"][0]["text"], one["choices"][0]["text"]);
    let (_, text) = server.post("/detokenize", &json!({ "tokens": tokens["tokens"].as_array().unwrap()[1..] }));
    assert_eq!(text["prompt"], "One day");
    // Echo, suffix, infill, a draft of one's own.
    let echoed = common(json!({ "prompt": "One day", "echo": true }));
    assert_eq!(echoed["choices"][0]["text"], format!("One day{}", one["choices"][0]["text"].as_str().unwrap()));
    let hole = common(json!({ "prompt": "One day, ", "suffix": " was happy." }));
    assert_eq!(hole["usage"]["completion_tokens"], 12);
    let filled = server.complete(json!({ "prompt": "", "infill": "The [____:4] sat on the mat.", "seed": 1 }));
    let text = filled["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("The") && text.ends_with(" sat on the mat."), "{text}");
    assert_eq!(filled["choices"][0]["redraft"]["filled"], text);
    let draft = " there was a little girl. She green to the park with her friend.";
    let refined = server.complete(json!({ "prompt": "Once upon a time", "draft": draft, "schedule": "did" }));
    assert_eq!(refined["choices"][0]["redraft"]["draft"]["text"], draft);
    // Stop texts end the text before them.
    let stopped = common(json!({ "prompt": "One day", "stop": ["a"], "ignore_eos": false }));
    assert!(!stopped["choices"][0]["text"].as_str().unwrap().contains('a'));
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    // A seed that no request names is told, and writes the text again.
    let free = server.complete(json!({ "prompt": "One day", "max_tokens": 12 }));
    let seed = free["choices"][0]["redraft"]["seed"].clone();
    let again = server.complete(json!({ "prompt": "One day", "max_tokens": 12, "seed": seed }));
    assert_eq!(free["choices"][0]["text"], again["choices"][0]["text"]);
}

/// A copy of a fixture with a chat template.
fn chat_model(dir: &Path) {
    for entry in std::fs::read_dir(model()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), dir.join(entry.file_name())).unwrap();
        }
    }
    let template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    std::fs::write(dir.join("chat_template.jinja"), template).unwrap();
}

#[test]
fn chats_go_through_the_template() {
    let dir = tempfile::tempdir().unwrap();
    chat_model(dir.path());
    let server = Server::of(dir.path(), &["--model-name", "stories"]);
    let messages = json!([{ "role": "system", "content": "Be brief." }, { "role": "user", "content": [{ "type": "text", "text": "Tell me" }, { "type": "text", "text": "a story." }] }]);
    let mut body = json!({ "model": "stories", "messages": messages, "max_completion_tokens": 16, "seed": 2, "logprobs": true });
    let (status, whole) = server.post("/v1/chat/completions", &body);
    assert_eq!((status, &whole["object"]), (200, &json!("chat.completion")), "{whole}");
    let message = &whole["choices"][0]["message"];
    assert_eq!(message["role"], "assistant");
    let pieces: String =
        whole["choices"][0]["logprobs"]["content"].as_array().unwrap().iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert!(pieces.starts_with(message["content"].as_str().unwrap()));
    let (_, tokens) = server.post("/tokenize", &json!({ "messages": messages }));
    assert_eq!(tokens["count"], whole["usage"]["prompt_tokens"]);
    let (_, text) = server.post("/detokenize", &json!({ "tokens": tokens["tokens"] }));
    assert!(text["prompt"].as_str().unwrap().ends_with("system: Be brief.\nuser: Tell me\na story.\nassistant:"), "{text}");
    body["stream"] = true.into();
    let chunks = server.stream("/v1/chat/completions", &body);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({ "role": "assistant", "content": "" }));
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, message["content"].as_str().unwrap());
    // The model that ships has no template.
    let (status, error) = Server::start(&[]).post("/v1/chat/completions", &json!({ "messages": [{ "role": "user", "content": "Hi" }] }));
    assert_eq!(status, 400);
    assert!(error["error"]["message"].as_str().unwrap().contains("chat template"), "{error}");
}

#[test]
fn what_cannot_be_served_is_named() {
    let server = Server::start(&["--max-tokens", "100", "--max-body", "20000"]);
    let max = json!(null);
    for (body, status, param) in [
        (json!({ "prompt": "a", "max_tokens": 0 }), 400, json!("max_tokens")),
        (json!({ "prompt": "a", "max_tokens": 101 }), 400, json!("max_tokens")),
        (json!({ "prompt": "a", "temperature": "warm" }), 400, json!("temperature")),
        (json!({ "prompt": "a", "temperature": -1 }), 400, max.clone()),
        (json!({ "prompt": "a", "top_p": 2 }), 400, max.clone()),
        (json!({ "prompt": "a", "top_k": -7 }), 400, json!("top_k")),
        (json!({ "prompt": "a", "n": 0 }), 400, json!("n")),
        (json!({ "prompt": "a", "n": 4000 }), 400, json!("n")),
        (json!({ "prompt": "a", "best_of": 4 }), 400, json!("best_of")),
        (json!({ "prompt": "a", "lenght": 4 }), 400, json!("lenght")),
        (json!({ "prompt": "a", "presence_penalty": 1 }), 400, json!("presence_penalty")),
        (json!({ "prompt": "a", "min_tokens": 4 }), 400, json!("min_tokens")),
        (json!({ "prompt": "a", "logprobs": 5 }), 400, json!("logprobs")),
        (json!({ "prompt": "a", "schedule": "best" }), 400, max.clone()),
        (json!({ "prompt": "a", "schedule": "block=x" }), 400, json!("schedule")),
        (json!({ "prompt": "a", "stream_options": {} }), 400, json!("stream_options")),
        (json!({ "prompt": "a", "provisional": true }), 400, json!("provisional")),
        (json!({ "prompt": "a", "stop": "" }), 400, max.clone()),
        (json!({ "prompt": "a", "seed": 1.5 }), 400, json!("seed")),
        (json!({ "prompt": [] }), 400, json!("prompt")),
        (json!({ "prompt": [99_999_999] }), 400, max.clone()),
        (json!({ "prompt": 3 }), 400, json!("prompt")),
        (json!({}), 400, json!("prompt")),
        (json!({ "infill": "no hole" }), 400, max.clone()),
        (json!({ "prompt": "a", "infill": "b [_:3]" }), 400, json!("infill")),
        (json!({ "prompt": "a", "model": "gpt-4" }), 404, json!("model")),
        (json!({ "prompt": "a".repeat(30_000) }), 413, max.clone()),
        (json!("text"), 400, max),
    ] {
        let (found, answer) = server.post("/v1/completions", &body);
        assert_eq!(found, status, "{body}: {answer}");
        let error = &answer["error"];
        assert_eq!(error["type"], "invalid_request_error", "{body}: {answer}");
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{body}: {answer}");
        assert_eq!(error["param"], param, "{body}: {answer}");
    }
    server.complete(json!({ "prompt": "a", "max_tokens": 4, "min_tokens": 4, "ignore_eos": true }));
    // A seed below zero is one, and null is absent.
    server.complete(json!({ "prompt": "a", "max_tokens": 2, "seed": -1, "temperature": null, "stop": null, "presence_penalty": 0 }));
    let (status, error) = server.post("/v1/other", &json!({}));
    assert_eq!((status, &error["error"]["type"]), (404, &json!("invalid_request_error")));
    let (status, text) = server.get("/v1/completions");
    assert!(status == 405 && text.contains("does not answer GET"), "{status} {text}");
    // A stream that is refused is an error and no stream.
    let (status, _) = server.post("/v1/completions", &json!({ "prompt": "a", "stream": true, "schedule": "best" }));
    assert_eq!(status, 400);
}

#[test]
fn keys_origins_and_what_stays_open() {
    let server = Server::start(&["--api-key", "secret", "--api-key", "other", "--cors", "https://example.org"]);
    let body = json!({ "prompt": "a", "max_tokens": 2 }).to_string();
    for (headers, status) in [
        (vec![], 401),
        (vec![("Authorization", "Bearer wrong")], 401),
        (vec![("Authorization", "Bearer secre")], 401),
        (vec![("Authorization", "secret")], 401),
        (vec![("Authorization", "Bearer secret")], 200),
        (vec![("Authorization", "Bearer other"), ("Origin", "https://example.org")], 200),
    ] {
        let response = server.send("/v1/completions", &body, &headers);
        assert_eq!(response.status().as_u16(), status, "{headers:?}");
        let allowed = response.headers().get("access-control-allow-origin").map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(allowed.as_deref(), headers.iter().any(|(name, _)| *name == "Origin").then_some("https://example.org"));
    }
    assert_eq!(server.get("/v1/models").0, 401);
    for path in ["/health", "/ready", "/metrics", "/openapi.json", "/"] {
        assert_eq!(server.get(path).0, 200, "{path}");
    }
    assert!(!server.log().contains("secret"));
    // No other origin, and none by default.
    let response = Server::start(&[]).send("/v1/completions", &body, &[("Origin", "https://example.org")]);
    assert!(response.headers().get("access-control-allow-origin").is_none());
}

/// Counters that tools read, and the log, which holds no text unless it is asked to.
#[test]
fn metrics_and_logs() {
    let server = Server::start(&[]);
    let answer =
        server.complete(json!({ "prompt": "Once upon a time", "max_tokens": 24, "seed": 7, "schedule": "did", "ignore_eos": true }));
    server.idle();
    let details = &answer["choices"][0]["redraft"];
    let sum = |key: &str| details["stages"].as_array().unwrap().iter().map(|stage| stage[key].as_f64().unwrap()).sum::<f64>();
    assert_eq!(server.metric("vllm:diffusion_num_denoising_steps_total"), sum("nfe"));
    assert_eq!(server.metric("vllm:diffusion_num_committed_tokens_total"), 24.0);
    assert!(server.metric("vllm:diffusion_num_canvas_positions_total") >= 24.0);
    assert_eq!(server.metric("redraft_rows_total"), sum("rows"));
    assert_eq!(server.metric("redraft_generated_tokens_total"), 24.0);
    assert_eq!(server.metric("redraft_requests_total{reason=\"length\"}"), 1.0);
    assert_eq!(server.metric("redraft_forwards_total{kind=\"denoise\"}"), sum("nfe"));
    assert_eq!(server.metric("redraft_kv_pages_used"), 0.0);
    assert!(server.metric("redraft_kv_pages") > 0.0);
    for name in ["queued", "first_provisional_token", "first_final_token", "request"] {
        assert_eq!(server.metric(&format!("redraft_{name}_seconds_count")), 1.0, "{name}");
    }
    let (first, last) =
        (server.metric("redraft_first_provisional_token_seconds_sum"), server.metric("redraft_first_final_token_seconds_sum"));
    assert!(first > 0.0 && last > first && server.metric("redraft_request_seconds_sum") >= last);
    let text = answer["choices"][0]["text"].as_str().unwrap();
    let log = server.log();
    assert!(log.contains("\"finished\"") && !log.contains("Once upon") && !log.contains(text), "{log}");
    for line in log.lines() {
        serde_json::from_str::<Value>(line).expect("a log of JSON");
    }
    let told = Server::start(&["--log-prompts"]);
    told.complete(json!({ "prompt": "Once upon a time", "max_tokens": 2 }));
    assert!(told.log().contains("Once upon"));
}

/// A client that goes away frees its place and its pages; others get their texts.
#[test]
fn clients_that_leave_cost_nothing() {
    let server = Server::start(&["--max-sequences", "2", "--max-positions", "1024"]);
    let body = json!({ "prompt": "One day", "max_tokens": 24, "seed": 3 });
    let alone = server.complete(body.clone());
    std::thread::scope(|scope| {
        let stayers: Vec<_> = (0..4).map(|_| scope.spawn(|| server.complete(body.clone()))).collect();
        for _ in 0..6 {
            scope.spawn(|| {
                server.leave(&json!({ "prompt": "One day", "max_tokens": 600, "stream": true, "ignore_eos": true, "schedule": "draft" }))
            });
        }
        for stayer in stayers {
            assert_eq!(stayer.join().unwrap()["choices"][0]["text"], alone["choices"][0]["text"]);
        }
    });
    server.idle();
    assert_eq!(server.metric("redraft_kv_pages_used"), 0.0);
    let (_, ready) = server.get("/ready");
    assert_eq!(serde_json::from_str::<Value>(&ready).unwrap()["requests"], 0, "{ready}");
    assert_eq!(server.metric("redraft_requests_total{reason=\"client-gone\"}"), 6.0);
    assert_eq!(server.complete(body)["choices"][0]["text"], alone["choices"][0]["text"]);
}

#[test]
fn a_full_queue_and_a_long_request_are_refused() {
    let server = Server::start(&["--max-sequences", "1", "--max-queue", "1", "--request-timeout", "1", "--max-positions", "1024"]);
    let long = json!({ "prompt": "One day", "max_tokens": 900, "ignore_eos": true, "schedule": "global" });
    let statuses: Vec<(u16, bool)> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..5)
            .map(|_| {
                scope.spawn(|| {
                    let response = server.send("/v1/completions", &long.to_string(), &[]);
                    (response.status().as_u16(), response.headers().contains_key("retry-after"))
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert!(statuses.iter().filter(|(status, _)| *status == 429).count() >= 3, "{statuses:?}");
    assert!(statuses.iter().all(|(status, retry)| *status != 429 || *retry), "{statuses:?}");
    assert!(statuses.iter().any(|(status, _)| *status == 504), "{statuses:?}");
    server.idle();
    // In a stream the same is told in its last event.
    let mut stream = long.clone();
    stream["stream"] = true.into();
    let mut response = server.send("/v1/completions", &stream.to_string(), &[]);
    let text = response.body_mut().read_to_string().unwrap();
    assert!(text.contains("\"code\":\"timeout\"") && !text.contains("[DONE]"), "{text}");
    server.idle();
    server.complete(json!({ "prompt": "One day", "max_tokens": 4 }));
    let (status, _) = server.post("/v1/completions", &json!({ "prompt": "a", "n": 3, "max_tokens": 2 }));
    assert_eq!(status, 400, "more choices than there are places");
}

/// On SIGTERM what is in flight is finished, nothing new is taken, and the exit is clean.
#[test]
fn a_signal_drains() {
    let mut server = Server::start(&[]);
    let text = std::thread::scope(|scope| {
        let client = scope
            .spawn(|| server.complete(json!({ "prompt": "One day", "max_tokens": 400, "ignore_eos": true, "schedule": "did", "seed": 1 })));
        while server.metric("redraft_requests_running") == 0.0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        server.signal("TERM");
        client.join().unwrap()
    });
    assert_eq!(text["usage"]["completion_tokens"], 400);
    assert!(server.ended().success(), "{}", server.log());
    // What takes longer than the limit is cut.
    let mut server = Server::start(&["--drain-timeout", "0"]);
    let began = Instant::now();
    std::thread::scope(|scope| {
        let (url, body) = (server.url.clone(), json!({ "prompt": "One day", "max_tokens": 900, "ignore_eos": true, "schedule": "global" }));
        let client = scope.spawn(move || ureq::post(format!("{url}/v1/completions")).send(body.to_string()).is_err());
        while server.metric("redraft_requests_running") == 0.0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        server.signal("TERM");
        assert!(client.join().unwrap(), "cut");
    });
    assert!(server.ended().success() && began.elapsed() < Duration::from_secs(30), "{}", server.log());
}

#[test]
fn models_and_the_description_of_the_api() {
    let server = Server::start(&[]);
    let (_, models) = server.get("/v1/models");
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("redraft-stories-10m")));
    assert_eq!((&models["data"][0]["redraft"]["block_len"], &models["data"][0]["root"]), (&json!(4), &models["data"][0]["id"]));
    assert_eq!(server.get("/v1/models/redraft-stories-10m").0, 200);
    assert_eq!(server.get("/v1/models/gpt-4").0, 404);
    // Every path that is described answers, and the other way round.
    let (_, described) = server.get("/openapi.json");
    let described: Value = serde_json::from_str(&described).unwrap();
    let paths: Vec<&String> = described["paths"].as_object().unwrap().keys().collect();
    for path in &paths {
        let (status, _) = server.get(&path.replace("{name}", "redraft-stories-10m"));
        assert!(status == 200 || status == 405, "{path}: {status}");
    }
    let routes = include_str!("../../src/serve/routes.rs");
    for line in routes.lines().filter_map(|line| line.trim().strip_prefix(".route(\"")) {
        let path = line.split('"').next().unwrap().replace("{*name}", "{name}");
        assert!(paths.iter().any(|known| **known == path), "{path} is not described");
    }
    let (_, page) = server.get("/");
    assert!(page.contains("<title>redraft</title>") && !page.contains("src=\"http") && !page.contains("href=\"http"));
}

/// What is wrong with the flags is said before a model is loaded.
#[test]
fn flags_that_are_wrong() {
    for (flags, word) in [
        (vec!["--addr", "nowhere"], "--addr"),
        (vec!["--addr", "203.0.113.7:80"], "--addr 203.0.113.7:80"),
        (vec!["--max-sequences", "0"], "--max-sequences"),
        (vec!["--api-key", ""], "--api-key"),
        (vec!["--model", "no/such/directory"], "no/such/directory"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_redraft")).arg("serve").args(&flags).output().expect("the command");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(word), "{flags:?}: {text}");
    }
}

/// The judge that ships is autoregressive: it serves completions, and says what it cannot do.
#[test]
fn an_autoregressive_model_is_served() {
    let server = Server::of(&model().with_file_name("redraft-judge"), &[]);
    let body = json!({ "prompt": "Once upon a time", "max_tokens": 20, "seed": 3, "logprobs": 0, "return_token_ids": true });
    let answer = server.complete(body.clone());
    let choice = &answer["choices"][0];
    assert!(choice["text"].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
    assert_eq!(joined(&choice["logprobs"]["tokens"]), choice["text"].as_str().unwrap());
    assert_eq!(server.complete(body)["choices"][0]["token_ids"], choice["token_ids"], "one seed, one text");
    let (status, error) = server.post("/v1/completions", &json!({ "prompt": "One day", "max_tokens": 8, "schedule": "did" }));
    assert!(status == 400 && error.to_string().contains("autoregressive"), "{status}: {error}");
}
