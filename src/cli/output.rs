//! What a finished sample looks like on the command line: text, and the contract's JSON object.

use std::sync::Arc;

use serde::Serialize;

use crate::api::json::GenerationJson;
use crate::api::text::TextRules;
use crate::request::Output;
use crate::schedule::Schedule;
use crate::tokenizer::Tokenizer;

/// What is the same for all samples of a run.
pub(super) struct RunFacts {
    /// Directories, the first being the one that names the run.
    pub models: Vec<String>,
    pub device: String,
    pub dtype: &'static str,
    pub seed: u64,
    pub schedule: Schedule,
    pub load_ms: f64,
    /// Ids that end the text, if the model writes them.
    pub ends: Vec<u32>,
    pub stop: Vec<String>,
    pub infills: bool,
    pub tokenizer: Arc<Tokenizer>,
}

impl RunFacts {
    fn rules(&self, output: &Output) -> TextRules {
        let before = if self.infills { Vec::new() } else { output.canvas[..output.prompt_tokens].to_vec() };
        TextRules {
            tokenizer: Some(self.tokenizer.clone()),
            before,
            ends: self.ends.clone(),
            stop: self.stop.clone(),
            infills: self.infills,
        }
    }
}

#[derive(Serialize)]
struct Json<'a> {
    model: &'a str,
    /// Where stages name more than one (`weights=INDEX`).
    #[serde(skip_serializing_if = "Option::is_none")]
    models: Option<&'a Vec<String>>,
    device: &'a str,
    dtype: &'a str,
    #[serde(flatten)]
    generation: GenerationJson<'a>,
}

/// The contract's object, on one line.
pub(super) fn json(output: &Output, run: &RunFacts) -> String {
    let object = Json {
        model: &run.models[0],
        models: (run.models.len() > 1).then_some(&run.models),
        device: &run.device,
        dtype: run.dtype,
        generation: GenerationJson::new(output, &run.rules(output), run.seed, &run.schedule).loaded_in(run.load_ms),
    };
    serde_json::to_string(&object).expect("plain data") + "\n"
}

/// The whole text, prompt included; samples of a batch are told apart by a header line.
pub(super) fn text(output: &Output, run: &RunFacts, many: bool) -> String {
    let prompt = &output.canvas[..output.prompt_tokens];
    let continues = output.positions.len() + output.prompt_tokens == output.canvas.len();
    let body = if continues && !run.infills {
        run.tokenizer.decode_before(prompt, &output.tokens) + &run.rules(output).text(&output.tokens).0
    } else {
        run.tokenizer.decode(&output.canvas)
    };
    if many { format!("=== sample {}\n{body}\n\n", output.sample) } else { format!("{body}\n") }
}
