//! Shortlists on the device: the most probable ids of rows, and sampled tokens among them.
#![forbid(unsafe_code)]

use crate::backend::not_on_shortlist;
use crate::cuda::context::Memory;
use crate::cuda::ops::sample::{SampledRecord, status};
use crate::cuda::ops::shortlist::{NO_ID, SampleShortlistOp, ShortlistOp, sample_shortlist, shortlist};
use crate::cuda::state::{Buffer, Cuda, Weight};
use crate::error::Result;
use crate::sampling::{Draw, SampledToken};

/// The most probable ids of each of some rows, on the device.
pub struct Shortlists {
    memory: Memory,
    rows: usize,
    count: usize,
}

/// The contracts of the backend.
impl Cuda {
    pub(super) fn make_shortlist(
        &self,
        rows: usize,
        hidden: &Buffer,
        head: &Weight,
        bias: Option<&Buffer>,
        banned: &[u32],
        count: usize,
    ) -> Result<Shortlists> {
        let Weight { n, k, .. } = *head;
        assert!(hidden.len >= rows * k, "hidden of {} for {rows} rows of {k}", hidden.len);
        let memory = self.context.memory(4 * rows * count)?;
        let (hidden, _copy) = self.as_input(hidden, rows * k)?;
        let op = ShortlistOp {
            rows: rows as u32,
            k: k as u32,
            vocab: n as u32,
            hidden,
            dtype: self.weight_dtype(),
            head: head.at(),
            bias: bias.map(Buffer::address),
            banned: self.banned_mask(banned, n)?,
            count: count as u32,
            ids: memory.address(),
        };
        shortlist(&self.context, &op)?;
        Ok(Shortlists { memory, rows, count })
    }

    pub(super) fn read_shortlist(&self, lists: &Shortlists) -> Result<Vec<Vec<u32>>> {
        let mut ids = vec![0u32; lists.rows * lists.count];
        self.context.driver.read(lists.memory.address(), bytemuck::cast_slice_mut(&mut ids))?;
        Ok(ids.chunks_exact(lists.count).map(|ids| ids.iter().copied().take_while(|id| *id != NO_ID).collect()).collect())
    }

    pub(super) fn sample_shortlist(
        &self,
        hidden: &Buffer,
        head: &Weight,
        bias: Option<&Buffer>,
        lists: &Shortlists,
        which: &[u32],
        draws: &[Draw],
    ) -> Result<Vec<SampledToken>> {
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let (k, rows) = (head.k, draws.len());
        assert!(which.len() == rows && hidden.len >= rows * k, "{} lists, hidden of {} for {rows} rows of {k}", which.len(), hidden.len);
        assert!(which.iter().all(|list| (*list as usize) < lists.rows), "{which:?} of {} lists", lists.rows);
        let draws = self.upload_draws(draws)?;
        let which = self.upload_words(which)?;
        let output = self.context.memory(rows * size_of::<SampledRecord>())?;
        let (hidden, _copy) = self.as_input(hidden, rows * k)?;
        let op = SampleShortlistOp {
            rows: rows as u32,
            k: k as u32,
            hidden,
            dtype: self.weight_dtype(),
            head: head.at(),
            bias: bias.map(Buffer::address),
            count: lists.count as u32,
            ids: lists.memory.address(),
            which: which.address(),
            draws: draws.address(),
            sampled: output.address(),
        };
        sample_shortlist(&self.context, &op)?;
        let records = self.read_sampled(&output, rows)?;
        let sampled = |(row, record): (usize, &SampledRecord)| match record.status {
            status::FORCED => Err(not_on_shortlist(row, record.token)),
            _ => record.sampled(row),
        };
        records.iter().enumerate().map(sampled).collect()
    }
}
