//! Writes one text: `cargo run --release --example generate -- "Once upon a time"`.

use redraft::{Engine, Options};

fn main() -> redraft::Result<()> {
    let prompt = std::env::args().nth(1).unwrap_or_else(|| "Once upon a time".into());
    let mut engine = Engine::open("models/redraft-stories-10m")?;
    let generation = engine.generate(prompt.as_str(), Options::default().length(96).seed(1))?;
    println!("{prompt}{}", generation.text);
    for report in &generation.output.stages {
        eprintln!("{}: {} forwards, {} rows, {} tokens changed", report.stage, report.forwards.total(), report.rows, report.changed);
    }
    Ok(())
}
