//! "Did you mean …?"

/// The known word that takes the fewest changes to get to from `word`, if that is at most two.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let all = known.into_iter().map(|k| (distance(&word, k), k));
    all.min().filter(|(changes, _)| *changes <= 2).map(|(_, k)| k)
}

/// Levenshtein's distance, one row of the table at a time.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_changes_and_no_more() {
        let known = ["mac", "bridge", "backend"];
        assert_eq!(nearest("Brigde", known), Some("bridge"));
        assert_eq!(nearest("macc", known), Some("mac"));
        assert_eq!(nearest("backendtype", known), None);
        assert_eq!(nearest("", []), None);
    }
}
