//! Owns the contract between host and kernels: what one launch is told, and how it is cut into CTAs.
//!
//! Each struct is the twin of the one at the head of `kernels/<stem>.cu`. Its fields and offsets are stated once here and once
//! there; each compiler checks its own side, and `tests/kernels` compares the two lists. Pointers are device addresses.
#![forbid(unsafe_code)]

/// CTAs of a launch and threads of a CTA, both in one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    pub grid: u32,
    pub block: u32,
}

/// The preprocessor constants of a kernel. They are part of its identity.
pub fn defines(stem: &str) -> &'static [(&'static str, u32)] {
    match stem {
        "embed" => &[("THREADS", EmbedParams::THREADS)],
        "layer_norm" => &[("THREADS", LayerNormParams::THREADS)],
        "remask" => &[("THREADS", RemaskParams::THREADS)],
        _ => &[],
    }
}

/// A `#[repr(C)]` params struct whose field offsets and size are asserted where they are declared.
macro_rules! params {
    ($(#[$doc:meta])* $name:ident, $size:literal bytes, $threads:literal threads { $($(#[$field_doc:meta])* $field:ident: $ty:ty = $offset:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $ty,)*
        }

        impl $name {
            /// Threads of a CTA.
            pub const THREADS: u32 = $threads;
            /// Fields and their offsets, as the kernel states them.
            pub const FIELDS: &[(&str, usize)] = &[$((stringify!($field), $offset)),*];

            /// One CTA for each of `count` rows or sequences. A grid of 0 is not launched: the driver refuses it.
            pub fn launch(count: u32) -> Launch {
                Launch { grid: count, block: Self::THREADS }
            }
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)*
        };
    };
}

params! {
    /// `embed`: entries `embed_f32` and `embed_bf16` by the element type of the table.
    EmbedParams, 32 bytes, 128 threads {
        /// (T) u32.
        ids: u64 = 0,
        /// (vocab, width) f32 or bf16.
        table: u64 = 8,
        /// (T, width) f32.
        out: u64 = 16,
        width: u32 = 24,
        vocab: u32 = 28,
    }
}

params! {
    /// `layer_norm`: entries `layer_norm_f32` and `layer_norm_bf16` by the element type of the output.
    LayerNormParams, 40 bytes, 256 threads {
        /// (rows, width) f32.
        x: u64 = 0,
        /// (width) f32.
        weight: u64 = 8,
        /// (width) f32, or 0 for none.
        bias: u64 = 16,
        /// (rows, width) f32 or bf16.
        out: u64 = 24,
        width: u32 = 32,
        eps: f32 = 36,
    }
}

params! {
    /// `remask`: one entry. N is the number of positions of all sequences, S the number of sequences.
    RemaskParams, 80 bytes, 256 threads {
        /// (S + 1) u32 offsets of the sequences in the canvas arrays.
        indptr: u64 = 0,
        /// (S) u32 positions wanted.
        count: u64 = 8,
        /// (N) u32.
        token: u64 = 16,
        /// (N) f32 snapshot confidence; 0 where nothing is revealed.
        confidence: u64 = 24,
        /// (N) u8, see [`state`].
        state: u64 = 32,
        /// (N) u8 stage that decides the position.
        stage: u64 = 40,
        /// (N) u32 step of the reveal; 0 where nothing is revealed.
        step: u64 = 48,
        /// (N) u32 out: positions taken, ascending within each sequence, from its offset.
        positions: u64 = 56,
        /// (S) u32 out: how many were taken.
        taken: u64 = 64,
        mask_id: u32 = 72,
        next_stage: u32 = 76,
    }
}

/// States of a canvas position on the device, the `STATE_*` of `kernels/remask.cu` and the variants of `canvas::State`.
pub mod state {
    pub const FIXED: u8 = 0;
    pub const MASKED: u8 = 1;
    pub const REVEALED: u8 = 2;
}
