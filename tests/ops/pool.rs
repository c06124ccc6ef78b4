//! The thread pool and its disjoint writes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use redraft::cpu::pool::{Order, Pool};

#[test]
fn every_task_runs_once() {
    for threads in [1, 2, 3, 8] {
        let pool = Pool::new(threads).unwrap();
        for num in [0, 1, 2, 3, 7, 100, 1000] {
            let counts: Vec<AtomicUsize> = (0..num).map(|_| AtomicUsize::new(0)).collect();
            pool.run(num, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {num} tasks");
        }
    }
}

#[test]
fn many_tiny_jobs_and_pauses_long_enough_to_fall_asleep() {
    let pool = Pool::new(3).unwrap();
    let sum = AtomicUsize::new(0);
    for job in 0..20_000 {
        pool.run(5, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        if job % 4000 == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    assert_eq!(sum.into_inner(), 20_000 * 10);
}

#[test]
fn a_panic_comes_out_and_the_pool_lives_on() {
    let pool = Pool::new(2).unwrap();
    for bad in [0, 3, 7] {
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert!(i != bad, "task {bad}"))));
        assert_eq!(caught.unwrap_err().downcast_ref::<String>(), Some(&format!("task {bad}")));
        let count = AtomicUsize::new(0);
        pool.run(8, &|_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 8);
    }
}

#[test]
fn a_call_from_inside_a_task_and_from_another_thread_works() {
    let pool = Pool::new(2).unwrap();
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.run(4, &|_| {
                        pool.run(4, &|_| {
                            count.fetch_add(1, Ordering::Relaxed);
                        })
                    });
                }
            });
        }
    });
    assert_eq!(count.into_inner(), 3 * 200 * 16);
}

#[test]
fn chunks_and_tiles_cover_everything_once() {
    let pool = Pool::new(2).unwrap();
    let mut data = vec![0usize; 103];
    pool.chunks(&mut data, 10, &|i, chunk| chunk.iter_mut().for_each(|v| *v += i + 1));
    assert!(data.iter().enumerate().all(|(at, v)| *v == at / 10 + 1));

    let (rows, width) = (17, 23);
    for order in [Order::RowsFirst, Order::ColumnsFirst] {
        let mut data = vec![0usize; rows * width + 5];
        pool.tiles(&mut data, width, &[0, 4, 4, 9, 17], 7, order, &|mut tile| {
            for row in tile.rows.clone() {
                let first = tile.cols.start;
                for (i, v) in tile.row(row).iter_mut().enumerate() {
                    *v += row * width + first + i + 1;
                }
            }
        });
        assert!(data[..rows * width].iter().enumerate().all(|(at, v)| *v == at + 1));
        assert!(data[rows * width..].iter().all(|v| *v == 0));
    }
}

#[test]
fn drop_ends_sleeping_and_polling_workers() {
    for pause in [0, 5] {
        let pool = Pool::new(4).unwrap();
        pool.run(4, &|_| {});
        std::thread::sleep(Duration::from_millis(pause));
        drop(pool);
    }
}

#[test]
fn everything_can_move_to_another_thread() {
    use redraft::cpu::{Batch, Buffer, Cpu, KvCache, Weight};
    fn moves<T: Send + Sync>() {}
    moves::<(Pool, Cpu, Buffer, Weight, KvCache, Batch)>();
}
