//! Public engine: what a program that embeds the library sees.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use redraft::{DType, Device, Engine, Error, Generation, Options, Prompt, TextEvent};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/redraft-stories-10m")
}

fn engine() -> Engine {
    Engine::builder(model()).device(Device::Cpu).threads(2).open().expect("the model that ships")
}

fn options() -> Options {
    Options::default().length(24).seed(7)
}

/// Five lines of the README.
#[test]
fn a_text_is_the_one_that_the_command_line_writes() {
    let generation = engine().generate("Once upon a time", options()).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_redraft"))
        .args(["generate", "--prompt", "Once upon a time", "--length", "24", "--seed", "7", "--device", "cpu", "--format", "json"])
        .arg("--model")
        .arg(model())
        .output()
        .expect("the binary");
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(object["text"], generation.text);
    assert_eq!(object["draft"]["text"], generation.draft);
    assert_eq!(serde_json::json!(generation.output.tokens), object["tokens"]);
}

/// Preset and length that no request names are the same behind both doors.
#[test]
fn defaults_are_those_of_the_command_line() {
    let generation = engine().generate("One day", Options::default().ignore_eos(true)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_redraft"))
        .args(["generate", "--prompt", "One day", "--ignore-eos", "--device", "cpu", "--format", "json"])
        .arg("--model")
        .arg(model())
        .output()
        .expect("the binary");
    let object: serde_json::Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(serde_json::json!(generation.output.tokens), object["tokens"]);
}

#[test]
fn a_batch_gives_the_texts_of_its_requests_alone() {
    let mut engine = engine();
    let prompts = ["The dog", "A little girl", "One day"];
    let together: Vec<Generation> = engine.generate_batch(prompts, &options()).unwrap().into_iter().map(Result::unwrap).collect();
    for (prompt, generation) in prompts.iter().zip(&together) {
        assert_eq!(engine.generate(*prompt, options()).unwrap().output.tokens, generation.output.tokens, "{prompt}");
    }
}

/// Deltas join to the text, with stop texts and multi-byte tokens; snapshots come before what is
/// final.
#[test]
fn streamed_pieces_join_to_the_text() {
    let thread = engine().spawn();
    for (preset, stop) in [("draft", None), ("draft", Some("the")), ("did", None), ("did-joint", None)] {
        let mut options = options().preset(preset).length(40);
        if let Some(stop) = stop {
            options = options.stop(stop);
        }
        let whole = thread.submit("Once upon a time", options.clone()).unwrap().wait().unwrap();
        let (mut text, mut snapshots, mut done) = (String::new(), 0, None);
        for event in thread.submit("Once upon a time", options).unwrap().into_text() {
            match event {
                TextEvent::Delta(delta) => text += &delta,
                TextEvent::Snapshot(snapshot) => {
                    assert_eq!(snapshot.positions.len(), snapshot.tokens.len());
                    assert!(snapshot.positions.is_sorted() && snapshot.stage < 2, "{snapshot:?}");
                    assert_eq!((snapshot.pieces.len(), snapshot.pieces.concat()), (snapshot.positions.len(), snapshot.text.clone()));
                    assert!(snapshot.remasked.is_empty() == (snapshot.stage == 0), "{snapshot:?}");
                    snapshots += 1;
                }
                TextEvent::Done(result) => done = Some(result.unwrap()),
                _ => {}
            }
        }
        let done = done.expect("the last event");
        assert_eq!((&text, &done.text), (&whole.text, &whole.text), "{preset} {stop:?}");
        assert!(snapshots > 0 && stop.is_none_or(|stop| !text.contains(stop)), "{preset} {stop:?}: {text}");
    }
}

/// Stands for an executor: counts the wakes, and ends the wait of the thread that polls.
struct Executor {
    wakes: AtomicUsize,
    thread: Thread,
}

impl Wake for Executor {
    fn wake(self: Arc<Self>) {
        self.wakes.fetch_add(1, Ordering::Relaxed);
        self.thread.unpark();
    }
}

/// A task that is pending is woken whenever there is more, and at the end, whatever the end is.
#[test]
fn tasks_are_woken() {
    let thread = engine().spawn();
    let executor = Arc::new(Executor { wakes: AtomicUsize::new(0), thread: std::thread::current() });
    let waker = Waker::from(executor.clone());
    let mut context = Context::from_waker(&waker);
    let whole = thread.submit("Once upon a time", options()).unwrap().wait().unwrap();

    let mut stream = thread.submit("Once upon a time", options()).unwrap().into_text();
    let (mut text, mut pending) = (String::new(), 0);
    let done = loop {
        match stream.poll_next(&mut context) {
            Poll::Ready(Some(TextEvent::Delta(delta))) => text += &delta,
            Poll::Ready(Some(TextEvent::Done(result))) => break result.unwrap(),
            Poll::Ready(Some(_)) => {}
            Poll::Ready(None) => panic!("an end without a result"),
            Poll::Pending => {
                pending += 1;
                std::thread::park();
            }
        }
    };
    assert_eq!((&text, &done.text), (&whole.text, &whole.text));
    assert!(matches!(stream.poll_next(&mut context), Poll::Ready(None)));
    assert!(pending > 0 && executor.wakes.load(Ordering::Relaxed) > 0);

    let handle = thread.submit("Once upon a time", options()).unwrap();
    let waited = loop {
        match handle.poll_wait(&mut context) {
            Poll::Ready(result) => break result.unwrap(),
            Poll::Pending => std::thread::park(),
        }
    };
    assert_eq!(waited.text, whole.text);

    // A stream whose reader waits for the end alone, after its first events.
    let mut stream = thread.submit("Once upon a time", options()).unwrap().into_text();
    while stream.poll_next(&mut context).is_pending() {
        std::thread::park();
    }
    let ended = loop {
        match stream.poll_done(&mut context) {
            Poll::Ready(result) => break result.expect("once").unwrap(),
            Poll::Pending => std::thread::park(),
        }
    };
    assert_eq!(ended.text, whole.text);
    assert!(matches!(stream.poll_done(&mut context), Poll::Ready(None)));
    assert!(matches!(stream.poll_next(&mut context), Poll::Ready(None)));

    // An engine that is dropped wakes who waits for it.
    let mut engine = engine();
    let handle = engine.submit("One day", options()).unwrap();
    assert!(handle.poll_wait(&mut context).is_pending());
    let before = executor.wakes.load(Ordering::Relaxed);
    drop(engine);
    assert!(executor.wakes.load(Ordering::Relaxed) > before);
    assert!(matches!(handle.poll_wait(&mut context), Poll::Ready(Err(Error::EngineGone))));
}

/// Work on the engine's thread, its counters, and what is known of the model beside it.
#[test]
fn a_thread_runs_what_it_is_given() {
    let thread = engine().spawn();
    let alone = engine().score("Once upon a time").unwrap();
    assert_eq!(thread.call(|engine| engine.score("Once upon a time")).unwrap().unwrap(), alone);
    let handles = thread.call(|engine| [1, 2].map(|seed| engine.submit("One day", options().seed(seed)).unwrap())).unwrap();
    let generations = handles.map(|handle| handle.wait().unwrap());
    // Looked at after the tick that ended them.
    thread.call(|_| {}).unwrap();
    let stats = thread.stats();
    assert_eq!((stats.running, stats.queued, stats.kv_pages_used), (0, 0, 0), "{stats:?}");
    assert!(stats.tokens >= 48 && stats.kv_pages > 0, "{stats:?}");
    let rows: usize = generations.iter().flat_map(|generation| &generation.output.stages).map(|stage| stage.rows).sum();
    let positions: usize = generations.iter().flat_map(|generation| &generation.output.stages).map(|stage| stage.canvas_positions).sum();
    assert!(stats.rows >= rows as u64 && stats.canvas_positions >= positions as u64 && positions > 0, "{stats:?}");
    assert_eq!(thread.model(), &engine().model());
    assert!(thread.device_name().starts_with("cpu") && thread.tokenizer().is_ok() && thread.failure().is_none());

    let error = thread.call(|_| panic!("as planned")).unwrap_err().to_string();
    assert!(error.contains("as planned"), "{error}");
    let error = thread.submit("One day", options()).map(drop).unwrap_err().to_string();
    assert!(error.contains("as planned") && thread.failure().is_some(), "{error}");
}

/// Among requests that wait, lower priorities are admitted first; the texts are the same.
#[test]
fn priorities_change_the_order_alone() {
    let mut engine = Engine::builder(model()).device(Device::Cpu).threads(2).max_sequences(1).open().unwrap();
    let alone: Vec<String> = (0..3).map(|seed| engine.generate("One day", options().seed(seed)).unwrap().text).collect();
    let handles: Vec<_> = [0, 5, -5]
        .iter()
        .zip(0..)
        .map(|(priority, seed)| engine.submit("One day", options().seed(seed).priority(*priority)).unwrap())
        .collect();
    let (mut order, mut texts) = (Vec::new(), vec![String::new(); 3]);
    while engine.tick().unwrap() || order.len() < 3 {
        for (i, handle) in handles.iter().enumerate() {
            if let Some(result) = handle.try_wait() {
                order.push(i);
                texts[i] = result.unwrap().text;
            }
        }
    }
    assert_eq!((order, texts), (vec![2, 0, 1], alone));
}

/// One text of JSON makes the request that the builder makes, and the result prints as the
/// command's.
#[test]
fn requests_and_results_as_json() {
    let mut engine = engine();
    let request = r#"{"prompt": "Once upon a time", "length": 24, "seed": 7, "schedule": "did"}"#;
    let (prompt, asked) = redraft::json::request(request).unwrap();
    let generation = engine.generate(prompt, asked).unwrap();
    assert_eq!(generation.text, engine.generate("Once upon a time", options().preset("did")).unwrap().text);
    assert_eq!(generation.pieces().concat(), generation.text);
    let object = serde_json::to_value(&generation).unwrap();
    assert_eq!(object["text"], generation.text);
    assert_eq!((&object["seed"], &object["stages"][1]["nfe"]), (&7.into(), &generation.output.stages[1].nfe().into()));
    assert!(object["timings"].get("load_ms").is_none());
}

/// Settings that were read as JSON act as those of the methods: the device and the type show, and a
/// request that is too large is refused in the same words.
#[test]
fn settings_as_json() {
    let (dir, file) = (model(), model().join("tokenizer.json"));
    let text = serde_json::json!({
        "device": "cpu", "dtype": "bf16", "threads": 1, "max_sequences": 2, "max_rows": 64, "max_positions": 128,
        "kv_pages": 9, "page_size": 16, "tokenizer": file, "models": [dir], "joint": null,
    });
    let read = Engine::builder(&dir).json(&text.to_string()).unwrap().open().unwrap();
    let set = Engine::builder(&dir).device(Device::Cpu).dtype(DType::Bf16).threads(1).max_sequences(2).max_rows(64);
    let set = set.max_positions(128).kv_pages(9).page_size(16).tokenizer_file(&file).add_model(&dir).open().unwrap();
    assert_eq!(read.device_name(), set.device_name());
    let refused = |mut engine: Engine| engine.generate("a", Options::default().length(300)).unwrap_err().to_string();
    let [read, set] = [read, set].map(refused);
    assert!(read == set && read.contains("holds 9"), "{read}\n{set}");

    for (text, expected) in [
        ("[1", "settings: "),
        (r#"{"devise": "cpu"}"#, "unknown field `devise`, expected one of"),
        (r#"{"device": "tpu"}"#, "device: expected auto, cpu, cuda"),
        (r#"{"dtype": "f16"}"#, "dtype: expected f32 or bf16, found `f16`"),
        (r#"{"threads": -1}"#, "expected usize"),
    ] {
        let error = Engine::builder(&dir).json(text).map(drop).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    let error = Engine::builder(&dir).tokenizer_file("no/such.json").open().map(drop).unwrap_err();
    assert!(matches!(&error, Error::Tokenizer { .. }) && error.to_string().contains("no/such.json"), "{error}");
}

/// An engine whose caller ticks: nothing waits, and a wait that could never end is an error.
#[test]
fn a_driven_engine_never_blocks() {
    let mut engine = engine();
    let mut stream = engine.submit("One day", options()).unwrap().into_text();
    let (mut text, mut ticks) = (String::new(), 0);
    let done = 'ticks: loop {
        ticks += 1;
        let busy = engine.tick().unwrap();
        while let Some(event) = stream.try_next() {
            match event {
                TextEvent::Delta(delta) => text += &delta,
                TextEvent::Done(result) => break 'ticks result.unwrap(),
                _ => {}
            }
        }
        assert!(busy, "idle without a result");
    };
    assert_eq!(text, done.text);
    assert!(ticks > 1 && stream.try_next().is_none());
    let error = engine.submit("One day", options()).unwrap().wait().unwrap_err();
    assert!(matches!(error, Error::Request { .. }) && error.to_string().contains("Engine::wait"), "{error}");
}

#[test]
fn requests_are_cancelled_and_outlive_nothing() {
    let thread = engine().spawn();
    let handle = thread.submit("One day", options().preset("draft").length(400).ignore_eos(true)).unwrap();
    handle.cancel();
    assert_eq!(handle.wait().unwrap().output.finish.name(), "cancelled");
    // Dropped handles cancel; the last thread handle waits for what is left.
    drop(thread.submit("One day", options()).unwrap());
    let handle = thread.submit("One day", options()).unwrap();
    drop(thread);
    assert_eq!(handle.wait().unwrap().output.tokens.len(), 24);
    // An engine that is dropped with a request in flight.
    let mut engine = engine();
    let mut stream = engine.submit("One day", options()).unwrap().into_text();
    drop(engine);
    assert!(matches!(stream.try_next(), Some(TextEvent::Done(result)) if matches!(*result, Err(Error::EngineGone))));
}

/// Threads that share one engine get the texts that each would get alone.
#[test]
fn clones_of_a_thread_share_its_engine() {
    let thread = engine().spawn();
    let alone = thread.submit("The dog", options()).unwrap().wait().unwrap();
    let texts: Vec<String> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let thread = thread.clone();
                scope.spawn(move || thread.submit("The dog", options()).unwrap().wait().unwrap().text)
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert!(texts.iter().all(|text| *text == alone.text), "{texts:?}");
}

#[test]
fn holes_are_filled_and_the_rest_stays() {
    let mut engine = engine();
    let generation = engine.generate(Prompt::infill("The [____:4] sat on the mat.").unwrap(), Options::default().seed(1)).unwrap();
    assert!(generation.text.starts_with("The") && generation.text.ends_with(" sat on the mat."), "{}", generation.text);
    assert_eq!(generation.output.tokens.len(), 4);
    assert!(Prompt::infill("no hole").is_err());
}

/// A text of one's own takes the place of the draft, and only what is masked again may change.
#[test]
fn a_given_text_is_refined() {
    let mut engine = engine();
    let text = " there was a little girl. She green to the park with her friend.";
    let tokens = engine.tokenizer().unwrap().encode(text).unwrap();
    let generation = engine.generate(Prompt::refine("Once upon a time", text), options().preset("did")).unwrap();
    assert_eq!((generation.draft.as_str(), &generation.output.draft), (text, &tokens));
    let refine = &generation.output.stages[1];
    assert_eq!(refine.remasked.len(), (0.35 * tokens.len() as f64) as usize);
    let first = generation.output.positions[0];
    for (i, (old, new)) in tokens.iter().zip(&generation.output.tokens).enumerate() {
        assert!(old == new || refine.remasked.contains(&(first + i)), "position {i} changed");
    }
    // Its confidence is the model's own: that of scoring the text in the draft's order.
    let stages = ["block=trained,unmask=left:1", "block=full,remask=0,unmask=linear:1"].map(|stage| stage.parse().unwrap());
    let kept = engine.generate(Prompt::refine("", text), Options::default().stages(stages).top_p(1.0)).unwrap();
    let nll = engine.score(text).unwrap();
    let found: Vec<f64> = kept.output.log_prob.iter().map(|log_prob| -f64::from(*log_prob)).collect();
    assert_eq!(found, nll);
    for (prompt, preset) in [(Prompt::refine("a", ""), "did"), (Prompt::refine("a", text), "draft")] {
        let error = engine.generate(prompt, options().preset(preset)).unwrap_err().to_string();
        assert!(error.starts_with("refine: expected"), "{error}");
    }
}

#[test]
fn wrong_options_are_named() {
    let mut engine = engine();
    for (options, word) in [
        (options().preset("best"), "presets"),
        (options().temperature(-1.0), "temperature"),
        (options().top_p(0.0), "top_p"),
        (options().length(0), "at least 1"),
        (options().length(1 << 40), "positions"),
        (options().stop_entropy(f64::NAN), "stop_entropy"),
        (options().stop(""), "empty"),
    ] {
        let error = engine.generate("a", options).unwrap_err();
        assert!(matches!(error, Error::Request { .. }) && error.to_string().contains(word), "{word}: {error}");
    }
    assert!(engine.score("").is_err());
    assert!(matches!(Engine::open("no/such/directory"), Err(Error::Config { .. } | Error::Io { .. })));
}

/// Weights that are small stay in f32; a type that is named is taken.
#[test]
fn the_type_fits_the_model() {
    let bytes = |engine: &Engine| engine.device_name();
    assert!(!bytes(&engine()).is_empty());
    let mut bf16 = Engine::builder(model()).device(Device::Cpu).dtype(DType::Bf16).threads(1).open().unwrap();
    let mut f32 = engine();
    let [a, b] = [&mut bf16, &mut f32].map(|engine| engine.score("Once upon a time").unwrap());
    assert!(a != b && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 0.1), "{a:?} {b:?}");
}

/// Each program under examples/ runs, and says something.
#[test]
fn examples_run() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names: Vec<String> = std::fs::read_dir(dir.join("examples"))
        .unwrap()
        .filter_map(|entry| Some(entry.unwrap().file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    names.sort();
    assert!(names.len() >= 7, "{names:?}");
    for name in names {
        let output =
            Command::new(env!("CARGO")).args(["run", "--quiet", "--locked", "--example", &name]).current_dir(dir).output().expect("cargo");
        assert!(output.status.success() && output.stdout.len() > 20, "{name}: {output:?}");
    }
}

/// The judge that ships writes too: its default is one token a forward, every door is the same, and
/// deltas join to the text.
#[test]
fn an_autoregressive_model_writes_and_streams() {
    let judge = model().with_file_name("redraft-judge");
    let mut engine = Engine::builder(&judge).device(Device::Cpu).threads(2).open().expect("the judge that ships");
    let info = engine.model();
    assert!(info.generates && info.autoregressive && info.block_len.is_none());
    let whole = engine.generate("Once upon a time", options()).unwrap();
    assert_eq!(whole.output.stages[0].forwards.denoise, whole.output.tokens.len());
    assert_eq!(engine.generate("Once upon a time", options().preset("ar")).unwrap().output.tokens, whole.output.tokens);
    let nll = engine.score(&format!("Once upon a time{}", whole.text)).unwrap();
    assert!(nll.iter().sum::<f64>() / (nll.len() as f64) < 4.0, "a text of its own is likely: {nll:?}");
    assert!(!engine.generate("", options()).unwrap().text.is_empty(), "a text from nothing");
    for (prompt, options) in [
        (Prompt::from("One day"), options().preset("did")),
        (Prompt::infill("One [____:4] day.").unwrap(), Options::default()),
        (Prompt::refine("One day", "a dog sat."), Options::default()),
    ] {
        assert!(matches!(engine.generate(prompt, options), Err(Error::Request { .. })));
    }

    let thread = engine.spawn();
    let (mut text, mut deltas) = (String::new(), 0);
    for event in thread.submit("Once upon a time", options()).unwrap().into_text() {
        if let TextEvent::Delta(delta) = event {
            text += &delta;
            deltas += 1;
        }
    }
    assert_eq!(text, whole.text);
    assert!(deltas > 1, "{deltas} pieces of 24 tokens");
}
