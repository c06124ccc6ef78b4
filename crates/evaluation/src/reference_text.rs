//! Human text: documents of a file, and windows over them that are measured like samples.
#![forbid(unsafe_code)]

/// The line between two documents of a file.
pub const SEPARATOR: &str = "<|endoftext|>";

/// Documents of a text: what stands between separator lines, without space around it. Empty ones
/// are left out.
pub fn documents(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let (mut start, mut at) = (0, 0);
    for line in text.split_inclusive('\n') {
        if line.trim() == SEPARATOR {
            found.push(&text[start..at]);
            start = at + line.len();
        }
        at += line.len();
    }
    found.push(&text[start..]);
    found.into_iter().map(str::trim).filter(|document| !document.is_empty()).collect()
}

/// Windows of human text, each as long as a sample.
#[derive(Debug, PartialEq)]
pub struct Windows {
    pub rows: Vec<Vec<u32>>,
    /// How many of the rows, the last ones, share text with others.
    pub overlapping: usize,
    /// As many rows again from other places, if there is text for them; otherwise none.
    pub spare: Vec<Vec<u32>>,
}

/// A window begins with a document and runs on into those after it, an end-of-text token between
/// them, to `length` tokens. As many windows as documents, at most `count`: first those that begin
/// after the end of the one before, and only where these are too few also the other documents, in
/// order (text ends are then joined to the beginning). Absent where the whole text is shorter than
/// a window.
pub fn windows(documents: &[Vec<u32>], length: usize, count: usize, end_of_text: u32) -> Option<Windows> {
    let mut text = Vec::new();
    let mut starts = Vec::new();
    for document in documents {
        starts.push(text.len());
        text.extend_from_slice(document);
        text.push(end_of_text);
    }
    if length == 0 || text.len() < length {
        return None;
    }
    let mut end = 0;
    let (apart, others): (Vec<usize>, Vec<usize>) = starts.into_iter().partition(|start| {
        let free = *start >= end && start + length <= text.len();
        if free {
            end = start + length;
        }
        free
    });
    let window = |start: &usize| -> Vec<u32> { text.iter().cycle().skip(*start).take(length).copied().collect() };
    let count = count.min(documents.len());
    let overlapping = count.saturating_sub(apart.len());
    let rows = apart.iter().take(count).chain(others.iter().take(overlapping)).map(window).collect();
    let spare = if apart.len() >= 2 * count { apart[count..2 * count].iter().map(window).collect() } else { Vec::new() };
    Some(Windows { rows, overlapping, spare })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_lie_between_separator_lines() {
        let text = "\nOne.\nTwo.\n<|endoftext|>\n<|endoftext|> \r\n  A literal <|endoftext|> stays.\n<|endoftext|>\n";
        assert_eq!(documents(text), ["One.\nTwo.", "A literal <|endoftext|> stays."]);
        assert_eq!(documents("no separator"), ["no separator"]);
        assert_eq!(documents(" \n"), [""; 0]);
    }

    #[test]
    fn windows_begin_with_documents_and_do_not_overlap() {
        let documents = [vec![1, 2, 3], vec![4], vec![5, 6, 7], vec![8, 9]];
        // Text: 1 2 3 0 4 0 5 6 7 0 8 9 0. Documents begin at 0, 4, 6 and 10; the second lies
        // inside the first window.
        let windows = windows(&documents, 5, 2, 0).unwrap();
        assert_eq!(windows.rows, [vec![1, 2, 3, 0, 4], vec![5, 6, 7, 0, 8]]);
        assert_eq!((windows.overlapping, windows.spare.len()), (0, 0));
    }

    #[test]
    fn too_little_text_is_used_again() {
        let documents = [vec![1, 2, 3], vec![4], vec![5, 6, 7], vec![8, 9]];
        let all = windows(&documents, 5, 9, 0).unwrap();
        assert_eq!(all.rows, [vec![1, 2, 3, 0, 4], vec![5, 6, 7, 0, 8], vec![4, 0, 5, 6, 7], vec![8, 9, 0, 1, 2]]);
        assert_eq!(all.overlapping, 2);
        assert_eq!(windows(&documents, 13, 9, 0).unwrap().rows.len(), 4);
        assert_eq!(windows(&documents, 14, 9, 0), None);
        assert_eq!(windows(&[], 1, 9, 0), None);
    }

    #[test]
    fn other_text_of_the_same_size_is_kept_apart() {
        let documents = [vec![1, 2], vec![3, 4], vec![5, 6], vec![7, 8]];
        let windows = windows(&documents, 2, 2, 0).unwrap();
        assert_eq!((windows.rows, windows.spare), (vec![vec![1, 2], vec![3, 4]], vec![vec![5, 6], vec![7, 8]]));
    }
}
