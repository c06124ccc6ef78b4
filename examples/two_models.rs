//! Drafts with one model and refines with another. They share a vocabulary; here both are the model
//! that ships.

use redraft::{Engine, Options};

fn main() -> redraft::Result<()> {
    let mut engine = Engine::builder("models/redraft-stories-10m").add_model("models/redraft-stories-10m").open()?;
    let options = Options::default()
        .stages([
            "block=trained,unmask=uniform:1".parse()?,
            "block=full,weights=1,remask=0.25,by=snapshot,unmask=linear:6,order=uniform".parse()?,
        ])
        .length(48)
        .seed(4);
    let generation = engine.generate("Lily and Tom", options)?;
    println!("draft:   Lily and Tom{}\nrefined: Lily and Tom{}", generation.draft, generation.text);
    Ok(())
}
