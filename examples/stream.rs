//! Streams a text from an engine on its own thread: final text to stdout, drafts to stderr.

use std::io::Write;

use redraft::{Engine, Options, TextEvent};

fn main() -> redraft::Result<()> {
    let engine = Engine::open("models/redraft-stories-10m")?.spawn();
    // A draft alone: a block is final as soon as it is committed.
    let draft = engine.submit("One day", Options::default().preset("draft").length(48).seed(3))?;
    // Draft-then-refine: nothing is final before the last stage is done.
    let refined = engine.submit("One day", Options::default().preset("did").length(48).seed(3))?;
    print!("One day");
    for event in draft.into_text() {
        match event {
            TextEvent::Delta(text) => print!("{text}"),
            TextEvent::Done(result) => println!("\n[{}]", (*result)?.output.finish.name()),
            _ => {}
        }
        std::io::stdout().flush().expect("stdout");
    }
    for event in refined.into_text() {
        match event {
            TextEvent::Snapshot(snapshot) => eprintln!("stage {}:{}", snapshot.stage, snapshot.text),
            TextEvent::Delta(text) => println!("One day{text}"),
            _ => {}
        }
    }
    Ok(())
}
