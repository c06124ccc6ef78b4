//! `attention` over the paged store, and the store itself. Keys and values enter through
//! `rope_append` at position 0, where the rotation is exact, so that both sides hold the same
//! numbers.

use redraft::backend::{Backend, DType, HeadShape, KvShape, Rotation};
use redraft::cpu::oracle;
use redraft::plan::{Plan, Visibility};

use crate::{TestBackend, assert_close, assert_same, cpus, each, noise};

const NUM_PAGES: usize = 320;

/// A sequence: which positions are query rows, who sees whom, how long it is.
struct Sequence {
    rows: Vec<usize>,
    visibility: Visibility,
    len: usize,
}

fn sequence(rows: impl IntoIterator<Item = usize>, visibility: Visibility, len: usize) -> Sequence {
    Sequence { rows: rows.into_iter().collect(), visibility, len }
}

/// The store of one layer on both sides, NaN wherever no key was written.
struct Store<B: Backend> {
    kv: B::KvCache,
    keys: Vec<f32>,
    values: Vec<f32>,
    heads: HeadShape,
    page_size: usize,
    /// Page table of each sequence, scattered.
    tables: Vec<Vec<u32>>,
}

const LAYER: usize = 1;

impl<B: TestBackend> Store<B> {
    /// Writes the first `written` positions of each sequence.
    fn new(b: &B, heads: HeadShape, page_size: usize, written: &[usize]) -> Self {
        let HeadShape { num_kv_heads, head_dim, .. } = heads;
        let kv = b.kv_cache(KvShape { num_layers: 2, num_pages: NUM_PAGES, page_size, num_kv_heads, head_dim }).unwrap();
        let len = NUM_PAGES * page_size * num_kv_heads * head_dim;
        let mut store = Store { kv, keys: vec![f32::NAN; len], values: vec![f32::NAN; len], heads, page_size, tables: Vec::new() };
        let mut plan = Plan::new();
        let mut next = 0;
        for &written in written {
            // 7 and NUM_PAGES are coprime: a permutation of the pages.
            let table: Vec<u32> = (next..next + written.div_ceil(page_size)).map(|i| (i * 7 % NUM_PAGES) as u32).collect();
            next += table.len();
            let rows: Vec<_> = (0..written).map(|i| (i, 0)).collect();
            plan.push(&rows, &table, page_size, Visibility::Full, written);
            store.tables.push(table);
        }
        assert!(next <= NUM_PAGES);
        plan.positions.fill(0);
        let qkv = noise(plan.num_rows() * heads.qkv_width(), 1);
        b.rope_append(&b.batch(&plan).unwrap(), heads, &Rotation::plain(10_000.0), &mut b.put(&qkv), LAYER, &mut store.kv).unwrap();
        oracle::rope_append(b.dtype(), &plan, heads, &Rotation::plain(10_000.0), &mut qkv.clone(), &mut store.keys, &mut store.values);
        store
    }

    fn plan(&self, sequences: &[Sequence]) -> Plan {
        let mut plan = Plan::new();
        for (s, table) in sequences.iter().zip(&self.tables) {
            let rows: Vec<_> = s.rows.iter().map(|&i| (i, 0)).collect();
            plan.push(&rows, table, self.page_size, s.visibility, s.len);
        }
        plan
    }

    fn attend(&self, b: &B, plan: &Plan, qkv: &[f32]) -> Vec<f32> {
        let len = plan.num_rows() * self.heads.q_width();
        let mut out = b.put(&vec![f32::NAN; len]);
        b.attention(&b.batch(plan).unwrap(), self.heads, &b.put(qkv), LAYER, &self.kv, &mut out).unwrap();
        b.read(&out, len)
    }

    fn agrees(&self, b: &B, plan: &Plan) {
        let qkv: Vec<f32> = noise(plan.num_rows() * self.heads.qkv_width(), 2).iter().map(|v| 3.0 * v).collect();
        let rounded: Vec<f32> = qkv.iter().map(|&v| oracle::stored(b.dtype(), v)).collect();
        let want = oracle::attention(plan, self.heads, self.page_size, &rounded, &self.keys, &self.values);
        let tolerance = match b.dtype() {
            // Scores up to 10 with a few roundings each move an exponential by 10 eps; weights sum
            // to 1 and |v| < 1.
            DType::F32 => 4e-6,
            // Each weight is rounded to 8 bits, numerator and denominator alike.
            DType::Bf16 => 2.0f64.powi(-8),
        };
        let what = format!("{} {:?} {:?} page size {}", b.name(), b.dtype(), self.heads, self.page_size);
        assert_close(&what, &self.attend(b, plan, &qkv), &want, |_| tolerance);
    }
}

const D64: HeadShape = HeadShape { num_heads: 2, num_kv_heads: 2, head_dim: 64 };

#[test]
fn agrees_with_the_oracle_over_ragged_lengths() {
    each!(b in cpus(2), {
        for (num_heads, num_kv_heads, head_dim) in
            [(2, 2, 64), (4, 2, 32), (3, 1, 128), (2, 1, 96), (5, 1, 7), (1, 1, 1), (6, 2, 33), (30, 1, 16)]
        {
            let heads = HeadShape { num_heads, num_kv_heads, head_dim };
            if !b.runs(heads) {
                continue;
            }
            let lens = [1, 15, 16, 17, 31, 63, 64, 65, 130, 200];
            let store = Store::new(b, heads, 16, &lens);
            store.agrees(b, &store.plan(&lens.map(|len| sequence(0..len, Visibility::Full, len))));
            store.agrees(b, &store.plan(&lens.map(|len| sequence(0..len, Visibility::BlockCausal(1), len))));
            store.agrees(b, &store.plan(&lens.map(|len| sequence(0..len, Visibility::BlockCausal(4), len))));
            store.agrees(b, &store.plan(&lens.map(|len| sequence(len / 2..len, Visibility::BlockCausal(24), len))));
            store.agrees(b, &store.plan(&lens.map(|len| sequence((0..len).step_by(3), Visibility::Full, len))));
        }
    });
}

#[test]
fn any_power_of_two_is_a_page_size() {
    each!(b in cpus(1), {
        for page_size in [1, 2, 4, 8, 32, 128] {
            let lens = [70, 33, 1, 129].map(|len: usize| if page_size == 1 { len } else { len + 20 });
            for heads in [D64, HeadShape { num_heads: 2, num_kv_heads: 1, head_dim: 5 }].into_iter().filter(|heads| b.runs(*heads)) {
                let store = Store::new(b, heads, page_size, &lens);
                store.agrees(b, &store.plan(&lens.map(|len| sequence(0..len, Visibility::BlockCausal(3), len))));
                store.agrees(b, &store.plan(&lens.map(|len| sequence(0..len, Visibility::Full, len))));
            }
        }
    });
}

#[test]
fn slots_past_the_visible_end_hold_nan() {
    // The store ends where the longest row sees; rows that see less share tiles with it. Everything
    // after is NaN already; this adds NaN between the rows' own ends.
    each!(b in cpus(2), {
        for page_size in [2, 16] {
            let mut store = Store::new(b, D64, page_size, &[100]);
            let mut plan = store.plan(&[sequence(0..100, Visibility::Full, 100)]);
            for (row, visible) in plan.visible.iter_mut().enumerate() {
                *visible = (row % 5 * 9 + row % 3) as u32;
            }
            let end = *plan.visible.iter().max().unwrap() as usize;
            // Slots from `end` on become NaN on both sides, through rows that write NaN.
            let mut poison = store.plan(&[sequence(end..100, Visibility::Full, 100)]);
            poison.positions.fill(0);
            let nan = vec![f32::NAN; poison.num_rows() * D64.qkv_width()];
            b.rope_append(&b.batch(&poison).unwrap(), D64, &Rotation::plain(10_000.0), &mut b.put(&nan), LAYER, &mut store.kv).unwrap();
            store.agrees(b, &plan);
        }
    });
}

#[test]
fn one_row_sees_nan_that_its_neighbour_must_not() {
    each!(b in cpus(1), {
        let store = Store::new(b, D64, 16, &[37]);
        // Rows 0 and 2 end before slot 37, row 1 reads the NaN of slots 37 to 40.
        let mut plan = store.plan(&[sequence(0..3, Visibility::Full, 37)]);
        plan.visible = vec![37, 40, 35];
        let qkv = noise(3 * D64.qkv_width(), 3);
        let got = store.attend(b, &plan, &qkv);
        let width = D64.q_width();
        assert!(got[width..2 * width].iter().all(|v| v.is_nan()), "{}: NaN that is visible must show", b.name());
        assert!(got[..width].iter().chain(&got[2 * width..]).all(|v| v.is_finite()), "{}", b.name());
    });
}

#[test]
fn a_row_without_keys_gives_zeros() {
    each!(b in cpus(1), {
        let store = Store::new(b, D64, 16, &[20]);
        let mut plan = store.plan(&[sequence(0..3, Visibility::Full, 20)]);
        plan.visible[1] = 0;
        let got = store.attend(b, &plan, &noise(3 * D64.qkv_width(), 4));
        let width = D64.q_width();
        assert!(got[width..2 * width].iter().all(|v| *v == 0.0));
        assert!(got[..width].iter().all(|v| v.is_finite()));
    });
}

#[test]
fn huge_equal_scores_do_not_overflow() {
    each!(b in cpus(1), {
        let store = Store::new(b, D64, 16, &[50]);
        let plan = store.plan(&[sequence(0..2, Visibility::Full, 50)]);
        let qkv: Vec<f32> = noise(2 * D64.qkv_width(), 5).iter().map(|v| v * 1e4).collect();
        assert!(store.attend(b, &plan, &qkv).iter().all(|v| v.abs() <= 1.0));
    });
}

#[test]
fn a_row_does_not_depend_on_its_neighbours_or_on_threads() {
    let heads = HeadShape { num_heads: 4, num_kv_heads: 2, head_dim: 32 };
    for (one, two) in cpus(1).iter().zip(&cpus(2)) {
        let lens = [150, 90, 33];
        let (store, store_two) = (Store::new(one, heads, 16, &lens), Store::new(two, heads, 16, &lens));
        for visibility in [Visibility::Full, Visibility::BlockCausal(4), Visibility::BlockCausal(1)] {
            let plan = store.plan(&lens.map(|len| sequence(0..len, visibility, len)));
            let qkv = noise(plan.num_rows() * heads.qkv_width(), 6);
            let all = store.attend(one, &plan, &qkv);
            assert_same("two threads", &all, &store_two.attend(two, &plan, &qkv));
            // The same rows alone: the first sequence's last 10, one by one and together.
            let (width, out_width) = (heads.qkv_width(), heads.q_width());
            for rows in [140..150, 149..150, 141..142, 3..8] {
                let alone = store.plan(&[sequence(rows.clone(), visibility, 150)]);
                let got = store.attend(one, &alone, &qkv[rows.start * width..rows.end * width]);
                assert_same(&format!("{} {visibility:?} {rows:?}", one.name()), &got, &all[rows.start * out_width..rows.end * out_width]);
            }
        }
    }
}

#[test]
fn pages_are_copied_in_every_layer_and_begin_as_nan() {
    each!(b in cpus(1), {
        for page_size in [1, 16, 64] {
            let mut store = Store::new(b, D64, page_size, &[page_size]);
            let plan = store.plan(&[sequence(0..1, Visibility::Full, page_size)]);
            let mut copy = plan.clone();
            copy.pages[0] = 300;
            let qkv = noise(D64.qkv_width(), 7);
            let before = store.attend(b, &plan, &qkv);
            b.copy_page(&mut store.kv, plan.pages[0], 300).unwrap();
            // A page that was never written holds NaN.
            b.copy_page(&mut store.kv, 301, plan.pages[0]).unwrap();
            assert_same(&b.name(), &store.attend(b, &copy, &qkv), &before);
            assert!(store.attend(b, &plan, &qkv).iter().all(|v| v.is_nan()));
        }
    });
}

#[test]
fn a_page_size_that_is_no_power_of_two_is_refused() {
    let b = &cpus(1)[0];
    let shape = KvShape { num_layers: 1, num_pages: 1, page_size: 12, num_kv_heads: 1, head_dim: 1 };
    assert!(b.kv_cache(shape).err().unwrap().to_string().contains("12"));
}
