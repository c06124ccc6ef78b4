//! Scores texts under the autoregressive judge: nats a token, lower is more likely.

use redraft::Engine;

fn main() -> redraft::Result<()> {
    let mut judge = Engine::open("models/redraft-judge")?;
    for text in ["Once upon a time there was a little girl.", "Once upon a girl time little was there a."] {
        let nll = judge.score(text)?;
        println!("{:.3}  {text}", nll.iter().sum::<f64>() / nll.len() as f64);
    }
    Ok(())
}
