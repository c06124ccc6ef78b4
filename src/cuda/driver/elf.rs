//! Facts in ELF images that no call tells: of machine code how many threads a CTA of an entry may
//! have, the first number of its launch bounds; of a library its build ID.
//!
//! A cubin is an ELF image; section `.nv.info.<entry>` is a list of attributes, each (format,
//! attribute, value) in four bytes, or, for format 4, with the number of bytes that follow as its
//! value.
#![forbid(unsafe_code)]

const EIFMT_SVAL: u8 = 4;
const EIATTR_MAX_THREADS: u8 = 5;

/// None for an entry without launch bounds, and for bytes that are no such image.
pub(in crate::cuda) fn max_threads(cubin: &[u8], entry: &str) -> Option<u32> {
    let mut info = section(cubin, &format!(".nv.info.{entry}"))?;
    while let Some(&[format, attribute, low, high]) = info.first_chunk() {
        let bytes = if format == EIFMT_SVAL { usize::from(u16::from_le_bytes([low, high])) } else { 0 };
        let value = info.get(4..4 + bytes)?;
        if (format, attribute) == (EIFMT_SVAL, EIATTR_MAX_THREADS) {
            let axis = |i: usize| word(value, 4 * i);
            return axis(0)?.checked_mul(axis(1)?)?.checked_mul(axis(2)?);
        }
        info = &info[4 + bytes..];
    }
    None
}

const PT_NOTE: u32 = 4;
const NT_GNU_BUILD_ID: u32 = 3;

/// The first sixteen hexadecimal digits of the GNU build ID of a 64-bit image, of which `head` are
/// the first bytes. None for an image without one, and for bytes that are no such image.
pub(in crate::cuda) fn build_id(head: &[u8]) -> Option<String> {
    let (headers, size, count) = (usize::try_from(long(head, 0x20)?).ok()?, half(head, 0x36)?, half(head, 0x38)?);
    let header = |index: usize| head.get(headers.checked_add(index * size)?..);
    let notes = (0..count).filter_map(header).filter(|header| word(header, 0) == Some(PT_NOTE)).filter_map(|header| {
        let (offset, bytes) = (usize::try_from(long(header, 8)?).ok()?, usize::try_from(long(header, 0x20)?).ok()?);
        head.get(offset..offset.checked_add(bytes)?)
    });
    notes.filter(|_| head.starts_with(b"\x7fELF")).find_map(|mut note| {
        loop {
            let [name, bytes, kind] = [word(note, 0)? as usize, word(note, 4)? as usize, word(note, 8)? as usize];
            let begin = 12 + name.checked_next_multiple_of(4)?;
            let id = note.get(begin..begin.checked_add(bytes)?)?;
            if kind == NT_GNU_BUILD_ID as usize && note[12..].starts_with(b"GNU\0") && bytes >= 8 {
                return Some(id[..8].iter().map(|byte| format!("{byte:02x}")).collect());
            }
            note = note.get(begin.checked_add(bytes.checked_next_multiple_of(4)?)?..)?;
        }
    })
}

/// The bytes of a section, by name.
fn section<'a>(elf: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let headers = usize::try_from(long(elf, 0x28)?).ok()?;
    let (size, count, names) = (half(elf, 0x3a)?, half(elf, 0x3c)?, half(elf, 0x3e)?);
    let header = |index: usize| elf.get(headers.checked_add(index * size)?..);
    let range = |header: &[u8]| -> Option<&'a [u8]> {
        let (offset, bytes) = (usize::try_from(long(header, 0x18)?).ok()?, usize::try_from(long(header, 0x20)?).ok()?);
        elf.get(offset..offset.checked_add(bytes)?)
    };
    let names = range(header(names)?)?;
    (0..count).filter_map(header).find_map(|header| {
        let rest = names.get(word(header, 0)? as usize..)?;
        (rest.strip_prefix(name.as_bytes())?.first() == Some(&0)).then(|| range(header)).flatten()
    })
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    bytes.get(at..)?.first_chunk().map(|b| usize::from(u16::from_le_bytes(*b)))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with a string table and one section of attributes.
    fn image(name: &str, info: &[u8]) -> Vec<u8> {
        let names = [b"\0".as_slice(), name.as_bytes(), b"\0"].concat();
        let mut elf = vec![0u8; 0x40];
        elf[0x28..0x30].copy_from_slice(&0x40u64.to_le_bytes());
        elf[0x3a..0x40].copy_from_slice(&[0x40, 0, 2, 0, 0, 0]);
        let mut offset = 0x40 + 2 * 0x40;
        for (name, bytes) in [(0u32, names.as_slice()), (1, info)] {
            let mut header = [0u8; 0x40];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
            offset += bytes.len();
            elf.extend(header);
        }
        elf.extend(names);
        elf.extend(info);
        elf
    }

    #[test]
    fn a_build_id_is_found_behind_other_notes() {
        let note = |name: &[u8], kind: u32, id: &[u8]| {
            let numbers = [name.len() as u32, id.len() as u32, kind].map(u32::to_le_bytes);
            let padding = vec![0u8; id.len().next_multiple_of(4) - id.len()];
            [numbers.as_flattened(), name, id, &padding].concat()
        };
        let notes =
            [note(b"GNU\0", 1, &[9; 16]), note(b"abc\0", 3, &[9; 8]), note(b"GNU\0", 3, &[1, 2, 3, 0xfd, 5, 6, 7, 8, 9, 10])].concat();
        let mut image = b"\x7fELF".to_vec();
        image.resize(0x40 + 2 * 0x38, 0);
        image[0x20] = 0x40;
        image[0x36..0x3a].copy_from_slice(&[0x38, 0, 2, 0]);
        let header = 0x40 + 0x38;
        image[header] = 4;
        image[header + 8] = (0x40 + 2 * 0x38) as u8;
        image[header + 0x20] = notes.len() as u8;
        image.extend(notes);
        assert_eq!(build_id(&image).as_deref(), Some("010203fd05060708"));
        for cut in 0..image.len() {
            assert_eq!(build_id(&image[..cut]), None, "{cut}");
        }
        image[0] = 0;
        assert_eq!(build_id(&image), None);
    }

    #[test]
    fn launch_bounds_are_found_behind_other_attributes() {
        let attributes =
            [&[3, 0x1b, 0xff, 0][..], &[4, 0x0a, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8], &[4, 5, 12, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]];
        let whole = image(".nv.info.embed_f32", &attributes.concat());
        assert_eq!(max_threads(&whole, "embed_f32"), Some(256));
        assert_eq!(max_threads(&whole, "embed"), None);
        assert_eq!(max_threads(&image(".nv.info.embed", attributes[0]), "embed"), None);
        for cut in 0..whole.len() {
            assert_eq!(max_threads(&whole[..cut], "embed_f32"), None, "{cut}");
        }
    }
}
