//! Launcher of `route`: experts of rows, and the list of tiles that their products take.
#![forbid(unsafe_code)]

use crate::backend::{ExpertShape, RouterScore};
use crate::cuda::context::CudaContext;
use crate::cuda::driver::interface::{Address, Build, Launch};
use crate::cuda::params::params;
use crate::error::Result;

/// Four warps: as many rows, or experts, of a CTA.
const THREADS: u32 = 128;
const WARPS: u32 = THREADS / 32;

params! {
    /// `route`: entries `route_choose`, `route_count` and `route_order`, in this order.
    RouteParams, 104 bytes {
        /// (rows, num_experts) f32.
        logits: u64 = 0,
        /// (num_experts) f32, or 0 for none.
        bias: u64 = 8,
        /// (rows, top_k) u32, ascending.
        expert: u64 = 16,
        /// (rows, top_k) f32.
        weight: u64 = 24,
        /// (num_experts) u32.
        count: u64 = 32,
        /// (rows * top_k) u32: the row at each place.
        token: u64 = 40,
        /// (rows, top_k) u32: the place of each choice.
        place: u64 = 48,
        /// [`max_tiles`] of four words: expert, first place, places, 0.
        tiles: u64 = 56,
        /// One u32.
        num_tiles: u64 = 64,
        rows: u32 = 72,
        num_experts: u32 = 76,
        top_k: u32 = 80,
        score: u32 = 84,
        num_groups: u32 = 88,
        top_groups: u32 = 92,
        scale: f32 = 96,
        tile_rows: u32 = 100,
    }
}

/// Up to 64, 128 and 256 experts (LLaDA-MoE, Qwen3-MoE, LLaDA2); other numbers are built when they
/// are met.
pub(in crate::cuda) fn builds() -> Vec<Build> {
    [64, 128, 256].map(build).into()
}

fn build(num_experts: u32) -> Build {
    Build { stem: "route", defines: vec![("THREADS", THREADS), ("EXPERTS_PER_LANE", num_experts.div_ceil(32).next_power_of_two())] }
}

/// Tiles of `tile_rows` rows that `rows` rows of this shape can make at most: whole ones, and one
/// that is not for each expert.
pub fn max_tiles(shape: ExpertShape, rows: u32, tile_rows: u32) -> u32 {
    let places = rows * shape.top_k as u32;
    places.min(places / tile_rows + shape.num_experts as u32)
}

/// Chooses the experts of `rows` rows and orders the rows by them.
pub struct Route {
    pub shape: ExpertShape,
    pub score: RouterScore,
    pub rows: u32,
    /// Rows of a tile.
    pub tile_rows: u32,
    pub logits: Address,
    pub bias: Option<Address>,
    pub expert: Address,
    pub weight: Address,
    pub count: Address,
    pub token: Address,
    pub place: Address,
    pub tiles: Address,
    pub num_tiles: Address,
}

pub fn route(context: &CudaContext, op: &Route) -> Result<()> {
    let Route { shape, score, rows, tile_rows, logits, bias, expert, weight, count, token, place, tiles, num_tiles } = *op;
    shape.check(score).unwrap_or_else(|what| panic!("{what}"));
    let num_experts = shape.num_experts as u32;
    assert!(u64::from(rows) * shape.num_experts.max(shape.top_k) as u64 <= u64::from(u32::MAX), "{rows} rows of {shape:?}");
    let (score, num_groups, top_groups, scale) = match score {
        RouterScore::Softmax { renormalise } => (u32::from(renormalise), 1, 1, 1.0),
        RouterScore::Sigmoid { num_groups, top_groups, scale } => (2, num_groups as u32, top_groups as u32, scale),
    };
    let top_k = shape.top_k as u32;
    let bias = bias.unwrap_or(0);
    let params = RouteParams {
        logits,
        bias,
        expert,
        weight,
        count,
        token,
        place,
        tiles,
        num_tiles,
        rows,
        num_experts,
        top_k,
        score,
        num_groups,
        top_groups,
        scale,
        tile_rows,
    };
    for (entry, warps) in [("route_choose", rows), ("route_count", num_experts), ("route_order", num_experts)] {
        context.launch(build(num_experts), entry, Launch::line(warps.div_ceil(WARPS), THREADS), &params)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tiles fit for any choices.
    #[test]
    fn there_is_room_for_every_tile() {
        for (num_experts, top_k, rows, tile_rows) in [(4, 2, 3, 8), (4, 2, 100, 8), (256, 8, 1, 8), (256, 8, 1024, 64), (8, 8, 33, 32)] {
            let shape = ExpertShape { num_experts, top_k, hidden_dim: 1, expert_dim: 1 };
            let room = max_tiles(shape, rows, tile_rows);
            // One more row than whole tiles wherever that is possible, each expert at most once a
            // row.
            let (mut left, mut tiles) = (rows * top_k as u32, 0);
            for _ in 0..num_experts {
                let most = left.min(rows);
                let wanted = (most.saturating_sub(1) / tile_rows * tile_rows + 1).min(most);
                tiles += wanted.div_ceil(tile_rows);
                left -= wanted;
            }
            assert!(tiles <= room, "{shape:?}: {tiles} of {room}");
        }
        assert_eq!(max_tiles(ExpertShape { num_experts: 256, top_k: 8, hidden_dim: 1, expert_dim: 1 }, 0, 8), 0);
    }

    #[test]
    fn a_lane_holds_its_share_of_the_experts() {
        for (experts, lanes) in [(1, 1), (32, 1), (33, 2), (128, 4), (129, 8), (1024, 32)] {
            assert_eq!(build(experts).defines[1].1, lanes);
        }
    }
}
