//! Suggestions for mistyped names.

/// Most letters in which a typing error differs from the name that was meant.
const DISTANCE_MAX: usize = 2;

/// The known name that is nearest to a mistyped one, if any is near.
pub(crate) fn closest(given: &str, known: impl IntoIterator<Item = String>) -> Option<String> {
    let length = given.chars().count();
    let known = known.into_iter().filter(|name| name.chars().count().abs_diff(length) <= DISTANCE_MAX);
    let near = known.map(|name| (distance(given, &name), name));
    near.filter(|(distance, _)| *distance <= DISTANCE_MAX).min().map(|(_, name)| name)
}

/// Number of letters to add, remove or change (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let changed = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_the_letters_that_differ() {
        for (a, b, apart) in [("", "", 0), ("", "abc", 3), ("listn", "listen", 1), ("kitten", "sitting", 3)] {
            assert_eq!((distance(a, b), distance(b, a)), (apart, apart), "{a} {b}");
        }
        assert_eq!(closest("--listn", ["--admin".into(), "--listen".into()]).as_deref(), Some("--listen"));
        assert_eq!(closest("--port", ["--admin".into(), "--listen".into()]), None);
    }
}
