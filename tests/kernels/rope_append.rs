//! `rope_append` against the numbers of the CPU, bit for bit without a norm, and against f64 with
//! one.

use redraft::backend::rope::extend_rotations;
use redraft::backend::{DType, HeadShape, Rope, Rotation};
use redraft::cpu::oracle;
use redraft::cuda::context::CudaContext;
use redraft::cuda::ops::rope_append::{HeadNorm, NO_SLOT, RopeAppend, rope_append};
use redraft::plan::Plan;

use crate::emulator::{Array, any_machine, machines, noise};

const ROPE: Rope = Rope::plain(10_000.0);
const EPS: f32 = 1e-6;
const UNTOUCHED: u32 = 0x7fc0_1234;

struct Case {
    heads: HeadShape,
    /// Leading elements of a head that turn.
    rotary_dim: usize,
    page_size: usize,
    normed: bool,
    positions: Vec<u32>,
    /// With rows of padding.
    slots: Vec<u32>,
    num_pages: usize,
}

/// The norm of a head in f64, or as it is.
fn norm(head: &[f32], weight: Option<&[f32]>) -> Vec<f64> {
    let Some(weight) = weight else { return head.iter().map(|&x| f64::from(x)).collect() };
    let squares: f64 = head.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    let scale = 1.0 / (squares / head.len() as f64 + f64::from(EPS)).sqrt();
    head.iter().zip(weight).map(|(&x, &w)| f64::from(x) * scale * f64::from(w)).collect()
}

/// The same in f32.
fn plain_norm(head: &[f32], weight: Option<&[f32]>) -> Vec<f32> {
    let Some(weight) = weight else { return head.to_vec() };
    let squares: f32 = head.iter().map(|&x| x * x).sum();
    let scale = 1.0 / (squares / head.len() as f32 + EPS).sqrt();
    head.iter().zip(weight).map(|(&x, &w)| x * scale * w).collect()
}

impl Case {
    fn new(heads: HeadShape, page_size: usize, normed: bool, positions: &[u32]) -> Case {
        let num_pages = positions.len() / page_size + 2;
        // Slots in falling order from the last page on, every fourth row padding.
        let slot = |row: usize| if row % 4 == 3 { NO_SLOT } else { (num_pages * page_size - 1 - row) as u32 };
        let rotary_dim = heads.head_dim;
        Case {
            heads,
            rotary_dim,
            page_size,
            normed,
            positions: positions.to_vec(),
            slots: (0..positions.len()).map(slot).collect(),
            num_pages,
        }
    }

    fn partly(self, rotary_dim: usize) -> Case {
        Case { rotary_dim, ..self }
    }

    fn holds(&self, context: &CudaContext, dtype: DType) -> Result<(), String> {
        match dtype {
            DType::F32 => self.holds_in(context, dtype, |bits: u32| f32::from_bits(bits), UNTOUCHED),
            DType::Bf16 => self.holds_in(context, dtype, |bits: u16| f32::from_bits(u32::from(bits) << 16), 0x7fc1),
        }
    }

    fn holds_in<T: bytemuck::Pod + PartialEq>(
        &self,
        context: &CudaContext,
        dtype: DType,
        value: impl Fn(T) -> f32,
        untouched: T,
    ) -> Result<(), String> {
        let HeadShape { num_heads, num_kv_heads, head_dim } = self.heads;
        let rows = self.positions.len();
        let rope = Rope { width: Some(self.rotary_dim), ..ROPE };
        let what = format!("{dtype:?}, {:?}, {} turning, page size {}, norm {}", self.heads, self.rotary_dim, self.page_size, self.normed);
        let before = noise(11, rows * self.heads.qkv_width());
        let weights = [12, 13].map(|seed| noise(seed, head_dim).iter().map(|x| 1.0 + 0.5 * x).collect::<Vec<f32>>());
        let mut table = Vec::new();
        extend_rotations(rope, head_dim, *self.positions.iter().max().unwrap() as usize + 1, &mut table);
        table.push(f32::NAN); // never empty, as no device array is

        let len = self.num_pages * self.page_size * num_kv_heads * head_dim;
        let (keys, values) = (Array::new(context, &vec![untouched; len]), Array::new(context, &vec![untouched; len]));
        let (q_norm, k_norm) = (Array::new(context, &weights[0]), Array::new(context, &weights[1]));
        let (qkv, rotations) = (Array::new(context, &before), Array::new(context, &table));
        let (positions, slots) = (Array::new(context, &self.positions), Array::new(context, &self.slots));
        let op = RopeAppend {
            rows: rows as u32,
            heads: self.heads,
            rotary_dim: self.rotary_dim,
            page_size: self.page_size as u32,
            dtype,
            norm: self.normed.then(|| HeadNorm { q: q_norm.address(), k: k_norm.address(), eps: EPS }),
            qkv: qkv.address(),
            positions: positions.address(),
            slots: slots.address(),
            rotations: rotations.address(),
            keys: keys.address(),
            values: values.address(),
        };
        rope_append(context, &op).map_err(|e| e.to_string())?;
        let (after, keys, values) = (qkv.read()?, keys.read()?, values.read()?);

        let (mut worst, mut worst_plain) = (0.0f64, 0.0f64);
        let mut written = 0;
        for row in 0..rows {
            let width = self.heads.qkv_width();
            let (before, after) = (&before[row * width..][..width], &after[row * width..][..width]);
            let pad = self.slots[row] == NO_SLOT;
            for head in 0..num_heads + 2 * num_kv_heads {
                let range = head * head_dim..(head + 1) * head_dim;
                let kv_head = head.saturating_sub(num_heads) % num_kv_heads;
                let (is_query, is_value) = (head < num_heads, head >= num_heads + num_kv_heads);
                if pad || !is_query {
                    if after[range.clone()].iter().zip(&before[range.clone()]).any(|(a, b)| a.to_bits() != b.to_bits()) {
                        return Err(format!("{what}: row {row}, head {head} is rewritten"));
                    }
                    if pad {
                        continue;
                    }
                }
                let weight = (self.normed && !is_value).then(|| weights[usize::from(!is_query)].as_slice());
                let (mut exact, mut plain) = (norm(&before[range.clone()], weight), plain_norm(&before[range.clone()], weight));
                let half = self.rotary_dim / 2;
                for i in 0..if is_value { 0 } else { half } {
                    let (sin, cos) = f64::from(oracle::rope_angle(self.positions[row], rope, i, head_dim)).sin_cos();
                    (exact[i], exact[i + half]) = (exact[i] * cos - exact[i + half] * sin, exact[i + half] * cos + exact[i] * sin);
                    let (sin, cos) = (sin as f32, cos as f32);
                    (plain[i], plain[i + half]) = (plain[i] * cos - plain[i + half] * sin, plain[i + half] * cos + plain[i] * sin);
                }
                let slot = self.slots[row] as usize;
                let page = slot / self.page_size * num_kv_heads + kv_head;
                let place = (page * self.page_size + slot % self.page_size) * head_dim;
                for i in 0..head_dim {
                    let (got, plain) = match (is_query, is_value) {
                        (true, _) => (after[range.start + i], plain[i]),
                        (_, false) => (value(keys[place + i]), oracle::stored(dtype, plain[i])),
                        (_, true) => (value(values[place + i]), oracle::stored(dtype, plain[i])),
                    };
                    if !self.normed && got.to_bits() != plain.to_bits() {
                        return Err(format!("{what}: row {row}, head {head}, element {i} is {got} instead of {plain}"));
                    }
                    let error = |x: f32| (f64::from(x) - exact[i]).abs();
                    if got.is_nan() {
                        return Err(format!("{what}: row {row}, head {head}, element {i} is NaN"));
                    }
                    (worst, worst_plain) = (worst.max(error(got)), worst_plain.max(error(plain)));
                }
                written += usize::from(!is_query) * head_dim;
            }
        }
        if worst > 2.0 * worst_plain {
            return Err(format!("{what}: error {worst:e}, that of a plain loop is {worst_plain:e}"));
        }
        let found = [keys, values].concat().into_iter().filter(|x| *x != untouched).count();
        if found != written {
            return Err(format!("{what}: {found} elements of the pages are written instead of {written}"));
        }
        Ok(())
    }
}

/// The plain loop above is the oracle's, where there is neither norm nor padding.
#[test]
fn the_oracle_agrees_with_the_loop_of_this_test() {
    let heads = HeadShape { num_heads: 2, num_kv_heads: 1, head_dim: 7 };
    let mut plan = Plan::new();
    plan.push(&[(1, 0)], &[0], 4, redraft::plan::Visibility::Full, 4);
    plan.positions = vec![31_000];
    let before = noise(1, heads.qkv_width());
    let (mut after, mut keys, mut values) = (before.clone(), vec![f32::NAN; 28], vec![f32::NAN; 28]);
    oracle::rope_append(DType::F32, &plan, heads, &Rotation { rope: ROPE, norm: None }, &mut after, &mut keys, &mut values);
    let (sin, cos) = f64::from(oracle::rope_angle(31_000, ROPE, 2, 7)).sin_cos();
    let (a, b) = (f64::from(before[14 + 2]), f64::from(before[14 + 5]));
    assert_eq!((keys[7 + 2], keys[7 + 5]), ((a * cos - b * sin) as f32, (b * cos + a * sin) as f32));
}

fn shape(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> HeadShape {
    HeadShape { num_heads, num_kv_heads, head_dim }
}

pub fn holds(context: &CudaContext) -> Result<(), String> {
    let positions = [0, 1, 77, 5, 4095, 31_999, 2, 0, 12, 640, 641, 7, 1000];
    for dtype in [DType::F32, DType::Bf16] {
        for normed in [false, true] {
            Case::new(shape(2, 2, 64), 16, normed, &positions).holds(context, dtype)?;
            Case::new(shape(6, 2, 96), 16, normed, &positions[..5]).holds(context, dtype)?;
            Case::new(shape(3, 1, 32), 4, normed, &positions).holds(context, dtype)?;
            Case::new(shape(2, 1, 64), 16, normed, &positions).partly(32).holds(context, dtype)?;
        }
    }
    Ok(())
}

#[test]
fn keys_and_queries_rotate_and_pages_fill() {
    for context in machines() {
        holds(&context).unwrap();
    }
}

#[test]
fn any_head_dim() {
    let context = &any_machine();
    for (i, head_dim) in [1, 2, 7, 8, 16, 33, 80, 128, 250, 256].into_iter().enumerate() {
        for dtype in [DType::F32, DType::Bf16] {
            let case = Case::new(shape(3, 1, head_dim), 1 << (i % 8), i % 2 == 1, &[3, 200, 1, 0, 17]);
            case.holds(context, dtype).unwrap();
        }
    }
}

#[test]
fn any_part_of_a_head() {
    let context = &any_machine();
    for (i, (head_dim, rotary_dim)) in
        [(16, 0), (16, 4), (16, 8), (33, 6), (33, 0), (128, 64), (128, 126), (256, 8)].into_iter().enumerate()
    {
        for dtype in [DType::F32, DType::Bf16] {
            Case::new(shape(3, 1, head_dim), 16, i % 2 == 1, &[3, 200, 1, 0, 17]).partly(rotary_dim).holds(context, dtype).unwrap();
        }
    }
}
