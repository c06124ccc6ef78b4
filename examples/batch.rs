//! Writes several texts in one batch. Each is the text that its request would give alone.

use redraft::{Engine, Options};

fn main() -> redraft::Result<()> {
    let mut engine = Engine::builder("models/redraft-stories-10m").max_sequences(4).open()?;
    let prompts = ["The dog", "The cat", "A little bird", "One morning"];
    let options = Options::default().preset("draft").length(32).seed(5);
    for (prompt, generation) in prompts.iter().zip(engine.generate_batch(prompts, &options)?) {
        println!("{prompt}{}\n", generation?.text);
    }
    let alone = engine.generate("The dog", options)?;
    println!("alone: The dog{}", alone.text);
    Ok(())
}
