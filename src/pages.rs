//! K/V page pool, page tables and the sharing of prompt pages: counting only, no tensors.
//!
//! Admission is by commitment: a sequence commits the pages of its whole length, and the sum of
//! commitments never exceeds the capacity. Live pages are at most the table entries of all
//! sequences, so once a sequence is admitted an allocation cannot fail and no sequence waits
//! halfway. Shared pages only make the pool emptier than promised.
//!
//! A page is written only by a sequence that holds it alone; anyone else gets a copy first. The
//! prefix index holds no reference of its own: it forgets a page as soon as that page is freed or
//! written again.
#![forbid(unsafe_code)]

use std::collections::HashMap;

/// Pages with reference counts.
#[derive(Debug)]
pub struct PagePool {
    page_size: usize,
    /// References per page; 0 is free.
    refs: Vec<u32>,
    free: Vec<u32>,
    committed: usize,
    prefixes: HashMap<PrefixKey, Prefix>,
}

/// A prompt whose K/V can be shared: same leading tokens, same weights, same block length (K/V
/// depend on which rows see which).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PrefixKey {
    pub weights: usize,
    pub block_len: usize,
    /// With the K/V of a joint sampler's layer.
    pub joint: bool,
    pub tokens: Vec<u32>,
}

#[derive(Debug)]
struct Prefix {
    owner: u64,
    /// Empty while the owner has not computed it yet.
    pages: Vec<u32>,
}

/// What the pool knows of a prefix.
#[derive(Debug, PartialEq, Eq)]
pub enum PrefixState {
    /// No sequence computes it yet: the caller is now responsible and must [`PagePool::publish`]
    /// it.
    Yours,
    /// Another sequence is computing it.
    Pending,
    /// These pages hold it; one reference to each was taken for the caller.
    Ready(Vec<u32>),
}

/// One page to copy before a forward: all layers of `src` to `dst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    pub src: u32,
    pub dst: u32,
}

impl PagePool {
    pub fn new(num_pages: usize, page_size: usize) -> Self {
        assert!(page_size > 0 && num_pages <= u32::MAX as usize / page_size, "{num_pages} pages of {page_size}");
        PagePool {
            page_size,
            refs: vec![0; num_pages],
            free: (0..num_pages as u32).rev().collect(),
            committed: 0,
            prefixes: HashMap::new(),
        }
    }

    pub fn page_size(&self) -> usize {
        self.page_size
    }

    pub fn capacity(&self) -> usize {
        self.refs.len()
    }

    /// Pages not held by anyone.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Pages of a sequence of `len` positions.
    pub fn pages_for(&self, len: usize) -> usize {
        len.div_ceil(self.page_size)
    }

    /// Commits `pages` for a sequence; false if that would promise more than there is.
    pub fn commit(&mut self, pages: usize) -> bool {
        let fits = pages <= self.capacity() - self.committed;
        self.committed += if fits { pages } else { 0 };
        fits
    }

    /// Gives a commitment back.
    pub fn uncommit(&mut self, pages: usize) {
        assert!(pages <= self.committed, "uncommit of {pages}, {} committed", self.committed);
        self.committed -= pages;
    }

    fn alloc(&mut self) -> u32 {
        let page = self.free.pop().expect("live pages never exceed the committed ones");
        assert_eq!(self.refs[page as usize], 0);
        self.refs[page as usize] = 1;
        page
    }

    fn release(&mut self, page: u32) -> bool {
        let refs = &mut self.refs[page as usize];
        assert!(*refs > 0, "release of free page {page}");
        *refs -= 1;
        if *refs > 0 {
            return false;
        }
        self.free.push(page);
        self.forget(page);
        true
    }

    fn forget(&mut self, page: u32) {
        self.prefixes.retain(|_, prefix| !prefix.pages.contains(&page));
    }

    /// Looks a prefix up for `sequence`, see [`PrefixState`].
    pub fn prefix(&mut self, key: &PrefixKey, sequence: u64) -> PrefixState {
        match self.prefixes.get(key) {
            None => {
                self.prefixes.insert(key.clone(), Prefix { owner: sequence, pages: Vec::new() });
                PrefixState::Yours
            }
            Some(prefix) if prefix.pages.is_empty() && prefix.owner == sequence => PrefixState::Yours,
            Some(prefix) if prefix.pages.is_empty() => PrefixState::Pending,
            Some(prefix) => {
                let pages = prefix.pages.clone();
                for &page in &pages {
                    self.refs[page as usize] += 1;
                }
                PrefixState::Ready(pages)
            }
        }
    }

    /// The owner has computed the prefix: others may share its pages from now on.
    pub fn publish(&mut self, key: &PrefixKey, sequence: u64, pages: &[u32]) {
        if let Some(prefix) = self.prefixes.get_mut(key).filter(|p| p.owner == sequence) {
            prefix.pages = pages.to_vec();
        }
    }

    /// A sequence ends: prefixes it owed to others are up for grabs again.
    pub fn abandon(&mut self, sequence: u64) {
        self.prefixes.retain(|_, prefix| prefix.owner != sequence || !prefix.pages.is_empty());
    }
}

/// One sequence's pages: key j lies in entry `j / page_size`. Kept from prompt to the last refine
/// step.
#[derive(Debug, Default)]
pub struct PageTable {
    pages: Vec<u32>,
}

impl PageTable {
    pub fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Takes over shared pages (references already counted) as the start of an empty table.
    pub fn adopt(&mut self, pages: Vec<u32>) {
        assert!(self.pages.is_empty(), "prefix adopted into a table in use");
        self.pages = pages;
    }

    /// Makes the pages of `positions` exist and be held by this table alone. Returns the copies to
    /// run before writing.
    pub fn make_writable(&mut self, pool: &mut PagePool, positions: impl Iterator<Item = usize>) -> Vec<PageCopy> {
        let mut copies = Vec::new();
        let mut last = usize::MAX;
        let page_size = pool.page_size;
        for index in positions.map(|p| p / page_size) {
            if index == last {
                continue;
            }
            last = index;
            while self.pages.len() <= index {
                self.pages.push(pool.alloc());
            }
            let page = self.pages[index];
            if pool.refs[page as usize] > 1 {
                let copy = pool.alloc();
                pool.release(page);
                self.pages[index] = copy;
                copies.push(PageCopy { src: page, dst: copy });
            } else {
                pool.forget(page);
            }
        }
        copies
    }

    /// Drops the pages beyond `len` positions. Returns those that no sequence holds any more.
    pub fn truncate(&mut self, pool: &mut PagePool, len: usize) -> Vec<u32> {
        let keep = pool.pages_for(len).min(self.pages.len());
        let dropped: Vec<u32> = self.pages.drain(keep..).collect();
        dropped.into_iter().filter(|page| pool.release(*page)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(n: u32) -> PrefixKey {
        PrefixKey { weights: 0, block_len: 4, joint: false, tokens: vec![n; 8] }
    }

    #[test]
    fn a_shared_prompt_is_copied_on_write_and_forgotten_when_rewritten() {
        let mut pool = PagePool::new(8, 4);
        assert!(pool.commit(3) && pool.commit(3) && !pool.commit(3));
        let (mut a, mut b) = (PageTable::default(), PageTable::default());
        assert_eq!(pool.prefix(&key(1), 1), PrefixState::Yours);
        assert_eq!(pool.prefix(&key(1), 2), PrefixState::Pending);
        assert!(a.make_writable(&mut pool, 0..8).is_empty());
        pool.publish(&key(1), 1, a.pages());
        let PrefixState::Ready(pages) = pool.prefix(&key(1), 2) else { panic!("published") };
        assert_eq!(pages, a.pages());
        b.adopt(pages);
        // b writes into the second page: a copy, a's page untouched.
        let before = a.pages().to_vec();
        assert_eq!(b.make_writable(&mut pool, 4..5), [PageCopy { src: before[1], dst: b.pages()[1] }]);
        assert_eq!((a.pages(), b.pages()[0]), (before.as_slice(), before[0]));
        // a holds its second page alone again: writing in place ends the prefix.
        assert!(a.make_writable(&mut pool, 4..8).is_empty());
        assert_eq!(pool.prefix(&key(1), 3), PrefixState::Yours);
        assert_eq!(pool.num_free(), 8 - 3);
    }

    #[test]
    fn an_owner_that_leaves_hands_the_prefix_on() {
        let mut pool = PagePool::new(4, 4);
        assert_eq!(pool.prefix(&key(1), 1), PrefixState::Yours);
        pool.abandon(1);
        assert_eq!(pool.prefix(&key(1), 2), PrefixState::Yours);
    }

    proptest! {
        /// Random sequences that share, write and leave: free + live = capacity, no page has two
        /// writers, no prefix names a free page, and a committed sequence always gets its pages.
        #[test]
        fn page_invariants(moves in proptest::collection::vec((0usize..6, 0usize..4, 0usize..24), 1..200)) {
            const LEN: usize = 24;
            let mut pool = PagePool::new(18, 4);
            let mut tables: Vec<Option<PageTable>> = (0..6).map(|_| None).collect();
            for (who, what, position) in moves {
                match (&mut tables[who], what) {
                    (slot @ None, _) => {
                        if pool.commit(pool.pages_for(LEN)) {
                            let mut table = PageTable::default();
                            match pool.prefix(&key(position as u32 % 2), who as u64) {
                                PrefixState::Ready(pages) => table.adopt(pages),
                                PrefixState::Yours => {
                                    table.make_writable(&mut pool, 0..8);
                                    pool.publish(&key(position as u32 % 2), who as u64, table.pages());
                                }
                                PrefixState::Pending => {}
                            }
                            *slot = Some(table);
                        }
                    }
                    (Some(table), 0..3) => {
                        let copies = table.make_writable(&mut pool, position..LEN);
                        prop_assert!(copies.iter().all(|c| c.src != c.dst));
                        for page in &table.pages()[position / 4..] {
                            prop_assert_eq!(pool.refs[*page as usize], 1);
                        }
                    }
                    (slot, _) => {
                        let mut table = slot.take().unwrap();
                        table.truncate(&mut pool, 0);
                        pool.abandon(who as u64);
                        pool.uncommit(pool.pages_for(LEN));
                    }
                }
                let mut refs = vec![0; pool.capacity()];
                for page in tables.iter().flatten().flat_map(|t| t.pages()) {
                    refs[*page as usize] += 1;
                }
                prop_assert_eq!(&refs, &pool.refs);
                prop_assert_eq!(pool.num_free() + refs.iter().filter(|r| **r > 0).count(), pool.capacity());
                prop_assert!(pool.prefixes.values().flat_map(|p| &p.pages).all(|p| refs[*p as usize] > 0));
            }
        }
    }
}
