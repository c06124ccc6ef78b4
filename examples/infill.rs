//! Fills holes in a given text: both sides of a hole are seen.

use redraft::{Engine, Options, Prompt};

fn main() -> redraft::Result<()> {
    let mut engine = Engine::open("models/redraft-stories-10m")?;
    let prompt = Prompt::infill("Once upon a time there was a [____:8]. She was very happy because [____:12]. The end.")?;
    println!("{}", engine.generate(prompt, Options::default().seed(2))?.text);
    Ok(())
}
