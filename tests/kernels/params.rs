//! The params structs have the same fields at the same offsets on both sides. Each compiler asserts
//! its own numbers; here the two lists of numbers are compared.

use redraft::cuda::kernels;
use redraft::cuda::ops::attention::AttentionParams;
use redraft::cuda::ops::embed::EmbedParams;
use redraft::cuda::ops::gather::GatherParams;
use redraft::cuda::ops::guidance::GuidanceParams;
use redraft::cuda::ops::linear::LinearParams;
use redraft::cuda::ops::moe::{MoeCombineParams, MoeParams};
use redraft::cuda::ops::norm::NormParams;
use redraft::cuda::ops::remask::RemaskParams;
use redraft::cuda::ops::rope_append::RopeAppendParams;
use redraft::cuda::ops::route::RouteParams;
use redraft::cuda::ops::sample::{DrawRecord, SampleDrawParams, SampleNucleusParams, SampleTilesParams, SampledRecord};
use redraft::cuda::ops::select_masked::{SelectMaskedParams, SequenceSummary, StepRecord};
use redraft::cuda::ops::shortlist::{SampleShortlistParams, ShortlistParams};
use redraft::cuda::ops::unmask::UnmaskParams;
use redraft::cuda::params::Params;

/// What each side says about one struct.
fn twin<P: Params>(name: &'static str) -> (&'static str, Vec<String>) {
    let fields = P::FIELDS.iter().map(|(field, offset)| format!("FIELD({name}, {field}, {offset});"));
    (name, fields.chain([format!("LAYOUT({name}, {});", size_of::<P>())]).collect())
}

#[test]
fn both_sides_state_the_same_layout() {
    let twins = [
        twin::<AttentionParams>("AttentionParams"),
        twin::<SelectMaskedParams>("SelectMaskedParams"),
        twin::<GuidanceParams>("GuidanceParams"),
        twin::<SampleDrawParams>("SampleDrawParams"),
        twin::<SampleNucleusParams>("SampleNucleusParams"),
        twin::<SampleTilesParams>("SampleTilesParams"),
        twin::<SampledRecord>("SampledRecord"),
        twin::<DrawRecord>("DrawRecord"),
        twin::<EmbedParams>("EmbedParams"),
        twin::<MoeCombineParams>("MoeCombineParams"),
        twin::<MoeParams>("MoeParams"),
        twin::<GatherParams>("GatherParams"),
        twin::<LinearParams>("LinearParams"),
        twin::<SampleShortlistParams>("SampleShortlistParams"),
        twin::<NormParams>("NormParams"),
        twin::<RemaskParams>("RemaskParams"),
        twin::<RopeAppendParams>("RopeAppendParams"),
        twin::<UnmaskParams>("UnmaskParams"),
        twin::<RouteParams>("RouteParams"),
        twin::<StepRecord>("StepRecord"),
        twin::<ShortlistParams>("ShortlistParams"),
        twin::<SequenceSummary>("SequenceSummary"),
    ];
    // Every struct that any kernel or header states, by its lines in order.
    let mut stated: Vec<(String, Vec<String>)> = Vec::new();
    let texts = kernels().into_iter().map(|k| k.source).chain(redraft::cuda::headers().iter().map(|(_, text)| *text));
    for line in texts.flat_map(str::lines).filter(|l| l.starts_with("FIELD(") || l.starts_with("LAYOUT(")) {
        let name = line.split_once('(').and_then(|(_, rest)| rest.split(',').next()).expect("a struct").to_owned();
        match stated.iter_mut().find(|(known, _)| *known == name) {
            Some((_, lines)) => lines.push(line.to_owned()),
            None => stated.push((name, vec![line.to_owned()])),
        }
    }
    for (name, lines) in &stated {
        let twin = twins.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("{name} has no twin in this test"));
        assert_eq!(*lines, twin.1, "{name}");
    }
    for (name, _) in &twins {
        assert!(stated.iter().any(|(known, _)| known == name), "{name} is in no kernel");
    }
}
