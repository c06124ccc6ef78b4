//! Every op on the CPU backend, named `op/shape/dtype/backend`. Products print GFLOP/s beside a
//! peak measured from registers alone in the same run, since a shared machine's clock is not a
//! constant. Each op is held to its oracle, or to its own result on one row, before the clock
//! starts.
//!
//! `cargo bench --bench ops [-- FILTER]`; `THREADS=1` for one thread.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use redraft::backend::{
    Activation, Backend, Candidates, DType, Epilogue, ExpertShape, HeadShape, KvShape, Norm, NormKind, Rotation, Router, RouterScore,
    WeightShape,
};
use redraft::cpu::simd::{Isa, Kernel, Simd};
use redraft::cpu::{Buffer, Cpu, oracle};
use redraft::plan::{Plan, Visibility};
use redraft::sampling::{Draw, TopK, TopKOrder, TopPRule};

/// `steps` rounds of 24 independent multiply-adds: what the register tile would reach if operands
/// were free.
struct Peak {
    bf16: bool,
    steps: usize,
}

impl Kernel for Peak {
    type Output = f32;
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> f32 {
        let mut sums = [simd.splat(0.0); 24];
        let (a, b) = (simd.word(black_box(0x3f80_3f80)), simd.word(black_box(0x3080_3080)));
        for _ in 0..self.steps {
            for sum in &mut sums {
                *sum = if self.bf16 { simd.step_bf16(*sum, a, b) } else { simd.step_f32(*sum, a, b) };
            }
        }
        sums.iter().map(|sum| simd.sum(*sum)).sum()
    }
}

/// GFLOP/s of one core, the best of twenty short runs.
fn peak(dtype: DType) -> f64 {
    const STEPS: usize = 100_000;
    let per_word = 4 / dtype.bytes();
    let best = (0..20)
        .map(|_| {
            let start = Instant::now();
            black_box(Isa::detect().run(Peak { bf16: dtype == DType::Bf16, steps: STEPS }));
            start.elapsed()
        })
        .min()
        .unwrap_or_default();
    (2 * 24 * 16 * per_word * STEPS) as f64 / best.as_secs_f64() / 1e9
}

/// Repeatable numbers in [-1, 1).
fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn pack(cpu: &Cpu, weight: &[f32], n: usize, k: usize) -> redraft::cpu::Weight {
    cpu.weight(WeightShape::Matrix { n, k }, &|first: usize, dst: &mut [f32]| {
        dst.copy_from_slice(&weight[first * k..][..dst.len()]);
        Ok(())
    })
    .expect("memory for a weight")
}

fn cpus() -> Vec<Cpu> {
    let threads = std::env::var("THREADS").ok().and_then(|threads| threads.parse().ok()).unwrap_or(0);
    [DType::Bf16, DType::F32].map(|dtype| Cpu::new(threads, dtype).expect("threads")).into()
}

fn id(cpu: &Cpu, shape: String) -> BenchmarkId {
    BenchmarkId::from_parameter(format!("{shape}/{}/{}", cpu.dtype().name(), cpu.name().replace([' ', '(', ')', ','], "")))
}

fn linear(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear");
    for cpu in cpus() {
        let peak = peak(cpu.dtype());
        eprintln!("{}, {}: {peak:.0} GFLOP/s per core from registers alone", cpu.name(), cpu.dtype().name());
        for (n, k, all_rows) in [
            (768, 768, &[1, 4, 16, 64, 128, 1024][..]),
            (3072, 768, &[1, 4, 16, 64, 128, 1024]),
            (768, 3072, &[4, 128]),
            (768, 192, &[4, 128]),
            (50258, 768, &[1, 4, 16, 64]),
        ] {
            if cpu.dtype() == DType::F32 && n == 50258 {
                continue;
            }
            let weight = noise(n * k, 1);
            let packed = pack(&cpu, &weight, n, k);
            for &rows in all_rows {
                let host = noise(rows * k, 2);
                let x = Buffer::from(&host[..]);
                let [mut out] = cpu.alloc([Activation::F32(rows * n)]).expect("memory");
                cpu.linear(rows, &x, &packed, None, Epilogue::Store, &mut out).expect("product");
                let columns = 8.min(n);
                let want = oracle::linear(cpu.dtype(), &host[..k], &weight[..columns * k], k, None, Epilogue::Store, &[0.0; 8][..columns]);
                let mut got = vec![0.0; columns];
                cpu.download(&out, 0, &mut got).expect("download");
                assert!(
                    got.iter().zip(&want).all(|(g, w)| (f64::from(*g) - w).abs() < 1e-3),
                    "{rows} x {n} x {k}: {got:?}, expected {want:?}"
                );

                let flops = (2 * rows * n * k) as u64;
                group.throughput(Throughput::Elements(flops));
                let mut best = Duration::MAX;
                group.bench_function(id(&cpu, format!("{rows}x{n}x{k}")), |b| {
                    b.iter_custom(|iterations| {
                        let start = Instant::now();
                        for _ in 0..iterations {
                            cpu.linear(rows, &x, &packed, None, Epilogue::Store, &mut out).expect("product");
                        }
                        let elapsed = start.elapsed();
                        best = best.min(elapsed / iterations as u32);
                        elapsed
                    });
                });
                let rate = flops as f64 / best.as_secs_f64() / 1e9;
                let bytes = (n * k * cpu.dtype().bytes()) as f64 / best.as_secs_f64() / 1e9;
                eprintln!("    best {rate:.0} GFLOP/s, {:.2} of one core's peak; weights at {bytes:.0} GB/s", rate / peak);
            }
        }
    }
    group.finish();
}

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    let heads = HeadShape { num_heads: 12, num_kv_heads: 12, head_dim: 64 };
    for cpu in cpus() {
        for (rows, len) in [(4, 128), (8, 1024), (128, 128), (1024, 1024)] {
            let shape = KvShape { num_layers: 1, num_pages: 64, page_size: 16, num_kv_heads: heads.num_kv_heads, head_dim: heads.head_dim };
            let mut kv = cpu.kv_cache(shape).expect("memory");
            let pages: Vec<u32> = (0..64).map(|i| i * 7 % 64).collect();
            let plan = |rows: std::ops::Range<usize>, visibility| {
                let mut plan = Plan::new();
                plan.push(&rows.map(|i| (i, 0)).collect::<Vec<_>>(), &pages, 16, visibility, len);
                plan
            };
            let all = plan(0..len, Visibility::Full);
            let host = noise(len * heads.qkv_width(), 3);
            let mut qkv = Buffer::from(&host[..]);
            let batch = cpu.batch(&all).expect("plan");
            cpu.rope_append(&batch, heads, &Rotation::plain(1e4), &mut qkv, 0, &mut kv).expect("append");

            let mut rotated = host.clone();
            let (mut keys, mut values) = (vec![0.0; 1024 * heads.q_width()], vec![0.0; 1024 * heads.q_width()]);
            oracle::rope_append(cpu.dtype(), &all, heads, &Rotation::plain(1e4), &mut rotated, &mut keys, &mut values);
            let one = plan(0..1, Visibility::Full);
            let want = oracle::attention(&one, heads, 16, &rotated, &keys, &values);
            let [mut out] = cpu.alloc([Activation::F32(rows * heads.q_width())]).expect("memory");
            for (name, visibility) in [("full", Visibility::Full), ("block4", Visibility::BlockCausal(4))] {
                cpu.attention(&cpu.batch(&one).expect("plan"), heads, &qkv, 0, &kv, &mut out).expect("attention");
                let mut got = vec![0.0; heads.q_width()];
                cpu.download(&out, 0, &mut got).expect("download");
                assert!(got.iter().zip(&want).all(|(g, w)| (f64::from(*g) - w).abs() < 1e-2), "{rows} rows of {len}");

                let plan = plan(len - rows..len, visibility);
                let batch = cpu.batch(&plan).expect("plan");
                let pairs: u64 = plan.visible.iter().map(|&end| u64::from(end)).sum();
                group.throughput(Throughput::Elements(pairs * 4 * heads.q_width() as u64));
                group.bench_function(id(&cpu, format!("{rows}of{len}x12x64-{name}")), |b| {
                    b.iter(|| cpu.attention(&batch, heads, &qkv, 0, &kv, &mut out).expect("attention"));
                });
            }
            if rows == len {
                group.throughput(Throughput::Elements(len as u64));
                group.bench_function(id(&cpu, format!("rope_append-{len}x12x64")), |b| {
                    b.iter(|| cpu.rope_append(&batch, heads, &Rotation::plain(1e4), &mut qkv, 0, &mut kv).expect("append"));
                });
            }
        }
    }
    group.finish();
}

/// A layer of 64 experts of which every row takes 8, and the router before it.
fn moe(c: &mut Criterion) {
    let mut group = c.benchmark_group("moe");
    let shape = ExpertShape { num_experts: 64, top_k: 8, hidden_dim: 768, expert_dim: 256 };
    let ExpertShape { num_experts, top_k, hidden_dim: width, expert_dim: inner } = shape;
    let router = RouterScore::Softmax { renormalise: true };
    for cpu in cpus() {
        let weights: Vec<f32> = noise(num_experts * 2 * inner * width, 7).iter().map(|w| w * 0.1).collect();
        let experts = |n: usize, k: usize| {
            cpu.weight(WeightShape::Experts { num: num_experts, n, k }, &|first: usize, dst: &mut [f32]| {
                dst.copy_from_slice(&weights[first * k..][..dst.len()]);
                Ok(())
            })
        };
        let (up, down) = (experts(2 * inner, width).expect("memory"), experts(width, inner).expect("memory"));
        for rows in [1, 4, 32, 128, 1024] {
            let (host, scores) = (noise(rows * width, 8), noise(rows * num_experts, 9));
            let (x, logits) = (Buffer::from(&host[..]), Buffer::from(&scores[..]));
            let [mut out] = cpu.alloc([Activation::F32(rows * width)]).expect("memory");
            let mut routing = cpu.routing(rows, shape).expect("memory");
            let by = Router { score: router, bias: None };
            cpu.route(rows, &logits, &by, &mut routing).expect("routing");
            cpu.moe(&mut routing, &x, &up, &down, &mut out).expect("experts");
            let chosen = oracle::route(shape, &Router { score: router, bias: None }, &scores[..num_experts]);
            let zeros = vec![0.0; width];
            let want = oracle::moe(cpu.dtype(), shape, &chosen, &host[..width], &weights, &weights[..num_experts * width * inner], &zeros);
            let mut got = vec![0.0; width];
            cpu.download(&out, 0, &mut got).expect("download");
            assert!(got.iter().zip(&want).all(|(g, w)| (f64::from(*g) - w).abs() < 1e-2), "{rows} rows");

            group.throughput(Throughput::Elements(rows as u64));
            group.bench_function(id(&cpu, format!("route-{rows}x{num_experts}of{top_k}")), |b| {
                b.iter(|| cpu.route(rows, &logits, &by, &mut routing).expect("routing"));
            });
            group.throughput(Throughput::Elements((6 * rows * top_k * width * inner) as u64));
            group.bench_function(id(&cpu, format!("{rows}x{num_experts}of{top_k}x{width}x{inner}")), |b| {
                b.iter(|| cpu.moe(&mut routing, &x, &up, &down, &mut out).expect("experts"));
            });
        }
    }
    group.finish();
}

fn norm(c: &mut Criterion) {
    let mut group = c.benchmark_group("norm");
    let cpu = &cpus()[1];
    let shapes = [(4, 192), (128, 768), (1024, 768)];
    for ((rows, width), kind) in shapes.into_iter().flat_map(|shape| [(shape, NormKind::Layer), (shape, NormKind::Rms)]) {
        let host = noise(rows * width, 4);
        let (mut x, weight) = (Buffer::from(&host[..]), cpu.upload(&vec![1.0; width]).expect("memory"));
        let [mut out] = cpu.alloc([Activation::F32(rows * width)]).expect("memory");
        let norm = Norm { kind, eps: 1e-5, weight: &weight, bias: None };
        cpu.norm(rows, &mut x, None, &norm, &mut out).expect("norm");
        let mut got = vec![0.0; rows * width];
        cpu.download(&out, 0, &mut got).expect("download");
        let want = oracle::norm(&host, &Norm { kind, eps: 1e-5, weight: &vec![1.0; width][..], bias: None });
        assert!(got.iter().zip(&want).all(|(g, w)| (f64::from(*g) - w).abs() < 1e-5));
        group.throughput(Throughput::Bytes((rows * width * 8) as u64));
        group.bench_function(id(cpu, format!("{kind:?}-{rows}x{width}")), |b| {
            b.iter(|| cpu.norm(rows, &mut x, None, &norm, &mut out).expect("norm"));
        });
    }
    group.finish();
}

fn sample(c: &mut Criterion) {
    let mut group = c.benchmark_group("sample");
    let (vocab, k) = (50258, 192);
    let cpu = &cpus()[0];
    // Spread 0.9: nearly flat, the dear case of a nucleus.
    let weight: Vec<f32> = noise(vocab * k, 5).iter().map(|w| w * 0.2).collect();
    let head = pack(cpu, &weight, vocab, k);
    for rows in [1, 4, 64] {
        let hidden = Buffer::from(&noise(rows * k, 6)[..]);
        let [mut logits] = cpu.alloc([Activation::F32(rows * vocab)]).expect("memory");
        // Below, sampled tokens are held to these, also where a filter leaves out the product's own
        // row.
        cpu.linear(rows, &hidden, &head, None, Epilogue::Store, &mut logits).expect("product");
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(id(cpu, format!("{rows}x{vocab}x{k}-head-alone")), |b| {
            b.iter(|| cpu.linear(rows, &hidden, &head, None, Epilogue::Store, &mut logits).expect("product"));
        });
        let mut host = vec![0.0; vocab];
        cpu.download(&logits, 0, &mut host).expect("download");
        let fifty = Some(TopK { k: 50, order: TopKOrder::Before });
        let kinds = [("greedy", 0.0, 1.0, None), ("plain", 1.0, 1.0, None), ("nucleus", 1.0, 0.9, None), ("top-50", 1.0, 1.0, fifty)];
        for (name, temperature, top_p, top_k) in kinds {
            let draw = |row: usize| Draw {
                u: (row as f64 + 0.37) / rows as f64,
                temperature,
                top_p,
                top_p_rule: TopPRule::Within,
                top_k,
                forced: None,
                truncated_confidence: false,
            };
            let draws: Vec<Draw> = (0..rows).map(draw).collect();
            let got = cpu.sample(&hidden, &head, None, Candidates::AllBut(&[]), &draws).expect("sampled tokens")[0];
            let want = redraft::sampling::sample_row(&host, &[], &draws[0]).expect("sampled token");
            assert_eq!(got.token, want.token, "{name}");
            group.bench_function(id(cpu, format!("{rows}x{vocab}x{k}-{name}")), |b| {
                b.iter(|| cpu.sample(&hidden, &head, None, Candidates::AllBut(&[]), &draws).expect("sampled tokens"));
            });
        }
    }
    group.finish();
}

/// What a joint sampler's pass costs at the head: over all ids, and among those of a list; and what
/// making the lists costs.
fn shortlist(c: &mut Criterion) {
    let mut group = c.benchmark_group("shortlist");
    let cpu = &cpus()[0];
    for (vocab, k) in [(4096, 256), (152_064, 3584)] {
        // Made row by row: the larger head is 2.2 GB in f32.
        let head = cpu.weight(WeightShape::Matrix { n: vocab, k }, &|first: usize, dst: &mut [f32]| {
            dst.copy_from_slice(&noise(dst.len(), first as u64));
            Ok(())
        });
        let head = head.expect("memory for a weight");
        for rows in [1, 32] {
            let hidden = Buffer::from(&noise(rows * k, 6)[..]);
            let draw = |row: usize| Draw {
                u: (row as f64 + 0.37) / rows as f64,
                temperature: 1.0,
                top_p: 1.0,
                top_p_rule: TopPRule::Within,
                top_k: None,
                forced: None,
                truncated_confidence: false,
            };
            let draws: Vec<Draw> = (0..rows).map(draw).collect();
            let which: Vec<u32> = (0..rows as u32).collect();
            group.throughput(Throughput::Elements(rows as u64));
            group.bench_function(id(cpu, format!("{rows}x{vocab}x{k}-all")), |b| {
                b.iter(|| cpu.sample(&hidden, &head, None, Candidates::AllBut(&[]), &draws).expect("sampled tokens"));
            });
            for n in [64, 256] {
                let lists = cpu.shortlist(rows, &hidden, &head, None, &[], n).expect("lists");
                let greedy: Vec<Draw> = draws.iter().map(|draw| Draw { temperature: 0.0, ..*draw }).collect();
                let tokens = |sampled: Vec<redraft::sampling::SampledToken>| sampled.iter().map(|d| d.token).collect::<Vec<_>>();
                let among = tokens(
                    cpu.sample(&hidden, &head, None, Candidates::Shortlists { lists: &lists, which: &which }, &greedy)
                        .expect("sampled tokens"),
                );
                assert_eq!(
                    among,
                    tokens(cpu.sample(&hidden, &head, None, Candidates::AllBut(&[]), &greedy).expect("sampled tokens")),
                    "the most probable are listed"
                );
                group.bench_function(id(cpu, format!("{rows}x{vocab}x{k}-lists-of-{n}")), |b| {
                    b.iter(|| cpu.shortlist(rows, &hidden, &head, None, &[], n).expect("lists"));
                });
                group.bench_function(id(cpu, format!("{rows}x{vocab}x{k}-among-{n}")), |b| {
                    b.iter(|| {
                        cpu.sample(&hidden, &head, None, Candidates::Shortlists { lists: &lists, which: &which }, &draws)
                            .expect("sampled tokens")
                    });
                });
            }
        }
    }
    group.finish();
}

fn config() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .without_plots()
}

criterion_group! { name = ops; config = config(); targets = linear, attention, moe, norm, sample, shortlist }
criterion_main!(ops);
