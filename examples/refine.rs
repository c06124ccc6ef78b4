//! Refines a text of one's own: the model scores it, masks the tokens that it believes least, and
//! writes them again.

use redraft::{Engine, Options, Prompt};

fn main() -> redraft::Result<()> {
    let mut engine = Engine::open("models/redraft-stories-10m")?;
    let text = " there was a little girl who lived in a house. She green to the park with her friend. They played all day.";
    let options = Options::default()
        .stages(["block=trained,unmask=left:1".parse()?, "block=full,remask=0.1,by=held-out:4,unmask=linear:4".parse()?])
        .temperature(0.0);
    let generation = engine.generate(Prompt::refine("Once upon a time", text), options)?;
    println!("before:{text}\nafter: {}", generation.text);
    println!("{} tokens masked again", generation.output.stages[1].remasked.len());
    Ok(())
}
