//! Form of the contract between host and kernels: one `#[repr(C)]` params struct per
//! kernel, its layout stated twice.
//!
//! Each struct lives with its launcher in `cuda/<stem>.rs` and is the twin of the one at the head
//! of `kernels/<stem>.cu`. Its fields and offsets are stated once here and once there; each
//! compiler checks its own side, and `tests/kernels` compares the two lists. Pointers are device
//! addresses ([`crate::cuda::driver::interface::Address`]).
#![forbid(unsafe_code)]

/// What a kernel is told: plain bytes without padding.
pub trait Params: bytemuck::NoUninit {
    /// Fields and their offsets, as the kernel states them.
    const FIELDS: &'static [(&'static str, usize)];

    /// The bytes that the driver hands over.
    fn bytes(&self) -> &[u8] {
        bytemuck::bytes_of(self)
    }
}

/// A params struct whose field offsets and size are asserted where they are declared.
macro_rules! params {
    ($(#[$doc:meta])* $name:ident, $size:literal bytes { $($(#[$field_doc:meta])* $field:ident: $ty:ty = $offset:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $ty,)*
        }

        impl $crate::cuda::params::Params for $name {
            const FIELDS: &'static [(&'static str, usize)] = &[$((stringify!($field), $offset)),*];
        }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            $(assert!(std::mem::offset_of!($name, $field) == $offset);)*
        };
    };
}
pub(crate) use params;
