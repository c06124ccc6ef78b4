//! Way of a checkpoint's tensors into packed weights: which rows of which tensor become
//! which rows of a matrix, and how far loading is. Which tensors there are is a family's business.
#![forbid(unsafe_code)]

use half::f16;

use crate::backend::groups::{Group4, Group8};
use crate::backend::{Backend, RowSource, WeightFormat, WeightShape};
use crate::error::{Error, Result};
use crate::gguf::blocks::{Group4 as WideGroup4, Groups};
use crate::model::layers::{Linear, NormWeights};
use crate::packed_weights::Loaded;
use crate::weights::{StoredBlocks, Tensor, Weights};

/// Called before each tensor is read: bytes of the tensors before it, bytes in all.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// What a weight is to the model, from which its format follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WeightRole {
    /// Looked up by token id.
    Table,
    /// Inside of a layer.
    Layer,
    /// From the last hidden state to logits.
    Head,
    /// From a row to the scores of experts.
    Router,
}

impl WeightRole {
    /// The format where `asked` is asked for and floats are `float`.
    ///
    /// A wrong code of a router sends a row to another expert, and its weights are few: they stay
    /// floats. Table and head keep 8 bits beside layers of 4, as llama.cpp's own quantiser keeps
    /// more bits there: every logit is read from the head.
    pub(crate) fn format(self, asked: Option<WeightFormat>, float: WeightFormat) -> WeightFormat {
        match (self, asked) {
            (_, None) | (WeightRole::Router, _) => float,
            (WeightRole::Table | WeightRole::Head, Some(WeightFormat::Q4)) => WeightFormat::Q8,
            (_, Some(format)) => format,
        }
    }
}

/// Reads tensors whole and packs matrices, counting the bytes that were read.
pub(super) struct WeightLoader<'a, B: Backend> {
    pub backend: &'a B,
    weights: &'a Weights,
    progress: Progress<'a>,
    done: usize,
    total: usize,
}

impl<'a, B: Backend> WeightLoader<'a, B> {
    /// Shapes first: a checkpoint that lacks one of the `expected` tensors is refused before
    /// anything is packed.
    pub fn new(backend: &'a B, weights: &'a Weights, progress: Progress<'a>, expected: &[(String, Vec<usize>)]) -> Result<Self> {
        weights.check(expected)?;
        if let (Some((packed, _)), Some(asked)) = (weights.packed_types(), backend.weight_format())
            && packed != asked
        {
            let (packed, asked) = (packed.name(), asked.name());
            return Err(Error::request(format!(
                "the weights are packed in {packed}, and {asked} was asked for: quantise the checkpoint again"
            )));
        }
        let bytes = |(name, shape): &(String, Vec<usize>)| match weights.is_in_packed(name) {
            true => Ok(0),
            false => weights.tensor(name, shape).map(|tensor| tensor.num_bytes()),
        };
        let total = expected.iter().map(bytes).sum::<Result<usize>>()?;
        Ok(WeightLoader { backend, weights, progress, done: 0, total })
    }

    /// Tensors that a weight is made of; none of them where it lies packed in the file.
    fn tensors<N: AsRef<str>>(&mut self, names: &[N], shape: &[usize]) -> Result<Vec<Tensor<'a>>> {
        let mut tensors = Vec::new();
        if self.weights.packed(names)?.is_none() {
            for name in names {
                tensors.push(self.tensor(name.as_ref(), shape)?);
            }
        }
        Ok(tensors)
    }

    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'a>> {
        let tensor = self.weights.tensor(name, shape)?;
        // What was asked for before has been read by now; this one is about to be.
        (self.progress)(self.done.min(self.total), self.total);
        self.done += tensor.num_bytes();
        Ok(tensor)
    }

    /// A tensor's numbers, all of them.
    pub fn numbers(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values = self.tensor(name, shape)?.to_vec()?;
        self.weights.observe(Loaded::Values { name, shape, values: &values })?;
        Ok(values)
    }

    /// A vector's numbers.
    pub fn values(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.numbers(name, &[len])
    }

    /// Packs the rows of `source`, made of the tensors of these names, in the format of their role;
    /// or takes them as they lie packed in the file.
    fn pack<N: AsRef<str>>(&self, role: WeightRole, shape: WeightShape, names: &[N], source: &LoaderRows) -> Result<B::Weight> {
        let float = self.backend.dtype().into();
        if let Some((format, words)) = self.weights.packed(names)? {
            let weight = self.backend.weight_of_words(role.format(Some(format), float), shape, words);
            return weight.map_err(|error| self.weights.name_in(names, error));
        }
        let format = match self.backend.weight_format() {
            // As the file has it, where it is quantised.
            None if role != WeightRole::Router => source.format().unwrap_or(float),
            asked => role.format(asked, float),
        };
        let weight = self.backend.weight_as(format, shape, source).map_err(|error| self.weights.name_in(names, error))?;
        if self.weights.is_observed() {
            let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
            match (format.float(), shape, &names[..]) {
                (None, _, names) => {
                    let words = self.backend.words(&weight);
                    let words = words.ok_or_else(|| Error::request("weights are packed into a file on the CPU".to_owned()))?;
                    self.weights.observe(Loaded::Packed { names, words })?;
                }
                (Some(_), WeightShape::Matrix { n, k }, [name]) => {
                    let mut values = vec![0.0; n * k];
                    source.read(0, &mut values)?;
                    self.weights.observe(Loaded::Values { name, shape: &[n, k], values: &values })?;
                }
                (Some(_), shape, names) => return Err(Error::request(format!("{names:?}: {shape:?} in floats is not observed"))),
            }
        }
        Ok(weight)
    }

    /// An (n, k) table for lookups.
    pub fn table(&mut self, name: &str, n: usize, k: usize) -> Result<B::Weight> {
        let tensors = self.tensors(&[name], &[n, k])?;
        let read = |first: usize, dst: &mut [f32]| tensors[0].read(first * k, dst);
        self.pack(WeightRole::Table, WeightShape::Table { n, k }, &[name], &LoaderRows::whole(&tensors, &read, &|row| (0, row)))
    }

    /// Packs an (n, k) weight, each row multiplied by its gate.
    pub fn matrix(&mut self, role: WeightRole, name: &str, n: usize, k: usize, gate: Option<&[f32]>) -> Result<B::Weight> {
        let tensors = self.tensors(&[name], &[n, k])?;
        let read = |first: usize, dst: &mut [f32]| {
            tensors[0].read(first * k, dst)?;
            if let Some(gate) = gate {
                for (row, gate) in dst.chunks_exact_mut(k).zip(&gate[first..]) {
                    row.iter_mut().for_each(|v| *v *= gate);
                }
            }
            Ok(())
        };
        let rows = if gate.is_some() { LoaderRows::parts(&read) } else { LoaderRows::whole(&tensors, &read, &|row| (0, row)) };
        self.pack(role, WeightShape::Matrix { n, k }, &[name], &rows)
    }

    /// Packs `k` columns from `first_column` on of an (n, width) weight.
    pub fn columns(&mut self, name: &str, n: usize, width: usize, first_column: usize, k: usize) -> Result<B::Weight> {
        let part = [format!("{name}[{first_column}..{}]", first_column + k)];
        let tensor = if self.weights.packed(&part)?.is_none() { self.tensors(&[name], &[n, width])? } else { Vec::new() };
        let read = |first: usize, dst: &mut [f32]| {
            let mut rows = dst.chunks_exact_mut(k).enumerate();
            rows.try_for_each(|(i, row)| tensor[0].read((first + i) * width + first_column, row))
        };
        self.pack(WeightRole::Layer, WeightShape::Matrix { n, k }, &part, &LoaderRows::parts(&read))
    }

    /// Packs an (n, k) weight that is stored as (k, n).
    pub fn transposed(&mut self, name: &str, n: usize, k: usize) -> Result<B::Weight> {
        let tensors = self.tensors(&[name], &[k, n])?;
        let values = tensors.first().map(Tensor::to_vec).transpose()?.unwrap_or_default();
        let read = |first: usize, dst: &mut [f32]| {
            // Of each stored row, the stretch that belongs to the asked ones.
            let height = dst.len() / k;
            for (i, stored) in values.chunks_exact(n).enumerate() {
                for (row, value) in dst[i..].iter_mut().step_by(k).zip(&stored[first..first + height]) {
                    *row = *value;
                }
            }
            Ok(())
        };
        self.pack(WeightRole::Layer, WeightShape::Matrix { n, k }, &[name], &LoaderRows::parts(&read))
    }

    /// Packs weights of (rows, k) each as one matrix, one below the other.
    pub fn stacked(&mut self, parts: &[(String, usize)], k: usize) -> Result<B::Weight> {
        let names: Vec<&str> = parts.iter().map(|(name, _)| name.as_str()).collect();
        let packed = self.weights.packed(&names)?.is_some();
        let (mut tensors, mut bounds) = (Vec::with_capacity(parts.len()), vec![0]);
        for (name, rows) in parts {
            if !packed {
                tensors.push(self.tensor(name, &[*rows, k])?);
            }
            bounds.push(bounds[bounds.len() - 1] + rows);
        }
        let read = |first: usize, dst: &mut [f32]| {
            let end = first + dst.len() / k;
            for (rows, tensor) in bounds.windows(2).zip(&tensors) {
                let shared = rows[0].max(first)..rows[1].min(end);
                if !shared.is_empty() {
                    tensor.read((shared.start - rows[0]) * k, &mut dst[(shared.start - first) * k..(shared.end - first) * k])?;
                }
            }
            Ok(())
        };
        let place = |row: usize| {
            let part = bounds.partition_point(|bound| *bound <= row) - 1;
            (part, row - bounds[part])
        };
        let shape = WeightShape::Matrix { n: bounds[parts.len()], k };
        self.pack(WeightRole::Layer, shape, &names, &LoaderRows::whole(&tensors, &read, &place))
    }

    /// Packs two (n, k) weights as one of (2n, k): row 2j is row j of `even`, row 2j + 1 is row j
    /// of `odd`.
    pub fn interleaved(&mut self, even: &str, odd: &str, n: usize, k: usize) -> Result<B::Weight> {
        let tensors = self.tensors(&[even, odd], &[n, k])?;
        let read = |first: usize, dst: &mut [f32]| read_interleaved([&tensors[0], &tensors[1]], first, k, dst);
        let rows = LoaderRows::whole(&tensors, &read, &|row| (row % 2, row / 2));
        self.pack(WeightRole::Layer, WeightShape::Matrix { n: 2 * n, k }, &[even, odd], &rows)
    }

    /// Packs (n, k) weights, one of each expert.
    pub fn stack(&mut self, names: &[String], n: usize, k: usize) -> Result<B::Weight> {
        let tensors = self.tensors(names, &[n, k])?;
        let read_one = |expert: usize, row: usize, dst: &mut [f32]| tensors[expert].read(row * k, dst);
        let read = |first: usize, dst: &mut [f32]| by_expert(first, n, k, dst, read_one);
        let place = |row: usize| (row / n, row % n);
        let shape = WeightShape::Experts { num: names.len(), n, k };
        self.pack(WeightRole::Layer, shape, names, &LoaderRows::whole(&tensors, &read, &place))
    }

    /// Packs two (n, k) weights of each expert as one of (2n, k), as [`WeightLoader::interleaved`]
    /// does.
    pub fn interleaved_stack(&mut self, even: &[String], odd: &[String], n: usize, k: usize) -> Result<B::Weight> {
        let names: Vec<&str> = even.iter().zip(odd).flat_map(|(even, odd)| [even.as_str(), odd.as_str()]).collect();
        let tensors = self.tensors(&names, &[n, k])?;
        let read_one =
            |expert: usize, row: usize, dst: &mut [f32]| read_interleaved([&tensors[2 * expert], &tensors[2 * expert + 1]], row, k, dst);
        let read = |first: usize, dst: &mut [f32]| by_expert(first, 2 * n, k, dst, read_one);
        let place = |row: usize| (row / (2 * n) * 2 + row % 2, row % (2 * n) / 2);
        let shape = WeightShape::Experts { num: even.len(), n: 2 * n, k };
        self.pack(WeightRole::Layer, shape, &names, &LoaderRows::whole(&tensors, &read, &place))
    }

    /// [`WeightLoader::interleaved`] with biases where there are any, all read under the two names.
    pub fn interleaved_linear(&mut self, even: &str, odd: &str, n: usize, k: usize, with_bias: bool) -> Result<Linear<B>> {
        let weight = self.interleaved(&format!("{even}.weight"), &format!("{odd}.weight"), n, k)?;
        if !with_bias {
            return Ok(Linear { weight, bias: None });
        }
        let (even, odd) = (self.values(&format!("{even}.bias"), n)?, self.values(&format!("{odd}.bias"), n)?);
        let bias: Vec<f32> = even.into_iter().zip(odd).flat_map(|(even, odd)| [even, odd]).collect();
        Ok(Linear { weight, bias: Some(self.backend.upload(&bias)?) })
    }

    /// A small parameter vector.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<B::Buffer> {
        let values = self.values(name, len)?;
        self.backend.upload(&values)
    }

    /// A norm without bias.
    pub fn norm(&mut self, name: &str, width: usize) -> Result<NormWeights<B>> {
        Ok(NormWeights { weight: self.vector(name, width)?, bias: None })
    }

    /// A weight with its bias, both read under `name`.
    pub fn linear(&mut self, role: WeightRole, name: &str, n: usize, k: usize, with_bias: bool) -> Result<Linear<B>> {
        let weight = self.matrix(role, &format!("{name}.weight"), n, k, None)?;
        let bias = if with_bias { Some(self.vector(&format!("{name}.bias"), n)?) } else { None };
        Ok(Linear { weight, bias })
    }
}

/// Reads rows from the one given on.
type ReadRows<'a> = &'a (dyn Fn(usize, &mut [f32]) -> Result<()> + Sync);
/// The tensor of a row, and the row there.
type Place<'a> = &'a (dyn Fn(usize) -> (usize, usize) + Sync);

/// Rows of a weight that is made of tensors.
struct LoaderRows<'a> {
    read: ReadRows<'a>,
    /// Where every row is a whole row of a tensor.
    rows: Option<(&'a [Tensor<'a>], Place<'a>)>,
    /// The groups that all tensors are in.
    groups: Option<Groups>,
}

impl<'a> LoaderRows<'a> {
    fn whole(tensors: &'a [Tensor<'a>], read: ReadRows<'a>, place: Place<'a>) -> LoaderRows<'a> {
        let groups_of = |tensor: &Tensor| tensor.blocks().and_then(|blocks| blocks.kind().groups());
        let groups = tensors.first().and_then(groups_of).filter(|groups| tensors.iter().all(|tensor| groups_of(tensor) == Some(*groups)));
        LoaderRows { read, rows: Some((tensors, place)), groups }
    }

    /// Rows that are computed, or parts of those of a tensor.
    fn parts(read: ReadRows<'a>) -> LoaderRows<'a> {
        LoaderRows { read, rows: None, groups: None }
    }

    /// The format that keeps the tensors best where they are in blocks: 8 bits for several kinds.
    fn format(&self) -> Option<WeightFormat> {
        let (first, rest) = self.rows?.0.split_first()?;
        let format = first.format()?;
        Some(if rest.iter().all(|tensor| tensor.format() == Some(format)) { format } else { WeightFormat::Q8 })
    }

    /// The blocks of a row and its place there, if all tensors are in such groups.
    fn stored(&self, row: usize, groups: Groups) -> Option<(StoredBlocks<'a>, usize)> {
        let (tensors, place) = self.rows.filter(|_| self.groups == Some(groups))?;
        let (tensor, row) = place(row);
        Some((tensors[tensor].blocks()?, row))
    }
}

impl RowSource for LoaderRows<'_> {
    fn read(&self, first_row: usize, dst: &mut [f32]) -> Result<()> {
        (self.read)(first_row, dst)
    }

    fn read_q8(&self, first_row: usize, dst: &mut [Group8]) -> Result<bool> {
        let mut row = first_row;
        let mut rest = dst;
        while !rest.is_empty() {
            let Some((blocks, at)) = self.stored(row, Groups::Eight) else { return Ok(false) };
            let (groups, after) = rest.split_at_mut(blocks.groups_per_row());
            blocks.read8(at, groups)?;
            (row, rest) = (row + 1, after);
        }
        Ok(true)
    }

    fn read_q4(&self, first_row: usize, dst: &mut [Group4]) -> Result<bool> {
        let mut row = first_row;
        let mut rest = dst;
        while !rest.is_empty() {
            let Some((blocks, at)) = self.stored(row, Groups::Four) else { return Ok(false) };
            let (groups, after) = rest.split_at_mut(blocks.groups_per_row());
            let mut wide = vec![WideGroup4::ZERO; groups.len()];
            blocks.read4(at, &mut wide)?;
            // Exact for Q4_0 and Q4_1; a Q4_K's products are rounded to the 11 bits of f16.
            for (group, wide) in groups.iter_mut().zip(wide) {
                *group = Group4 { scale: f16::from_f32(wide.scale), min: f16::from_f32(wide.min), codes: wide.codes };
            }
            (row, rest) = (row + 1, after);
        }
        Ok(true)
    }
}

/// Rows from `first` on of two interleaved weights of width k.
fn read_interleaved(tensors: [&Tensor; 2], first: usize, k: usize, dst: &mut [f32]) -> Result<()> {
    let end = first + dst.len() / k;
    for (parity, tensor) in tensors.into_iter().enumerate() {
        // Rows 2j + parity from `first` up to `end`.
        let (from, to) = ((first + 1 - parity) / 2, (end + 1 - parity) / 2);
        let mut rows = vec![0.0; (to - from) * k];
        tensor.read(from * k, &mut rows)?;
        for (j, row) in (from..to).zip(rows.chunks_exact(k)) {
            dst[(2 * j + parity - first) * k..][..k].copy_from_slice(row);
        }
    }
    Ok(())
}

/// Rows from `first` on of weights of n rows each, one below the other: `read(weight, row, dst)`
/// for the part of each.
fn by_expert(first: usize, n: usize, k: usize, dst: &mut [f32], read: impl Fn(usize, usize, &mut [f32]) -> Result<()>) -> Result<()> {
    let mut rest = dst;
    let mut row = first;
    while !rest.is_empty() {
        let (part, after) = rest.split_at_mut(rest.len().min((n - row % n) * k));
        read(row / n, row % n, part)?;
        row += part.len() / k;
        rest = after;
    }
    Ok(())
}
