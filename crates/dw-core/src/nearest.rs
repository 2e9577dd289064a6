//! What a mistyped name was probably meant to be.

/// How much of a name has to be written for one that only begins with it to be offered, in characters.
const SHORTEST_BEGINNING: usize = 4;

/// The candidate that `text` was probably meant to be: one that differs in a few letters, or goes on where `text` ends.
/// None when nothing is alike enough to be offered.
pub fn nearest<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let wanted = text.to_lowercase();
    let length = wanted.chars().count();
    let scored = candidates.into_iter().map(|candidate| {
        let lower = candidate.to_lowercase();
        // Jaro-Winkler alone favours common beginnings too much; both have to agree that it is close.
        let distance = strsim::damerau_levenshtein(&wanted, &lower);
        let limit = 1 + length.max(lower.chars().count()) / 4;
        let is_begun = length >= SHORTEST_BEGINNING && lower.starts_with(&wanted);
        (strsim::jaro_winkler(&wanted, &lower), distance <= limit || is_begun, candidate)
    });
    let close = scored.filter(|(score, near, _)| *near && *score >= 0.75);
    close.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, _, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_wrong_letters_and_a_name_that_goes_on_are_near() {
        let names = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "width", "height"];
        assert_eq!(nearest("eulerdiscretscheduler", names), Some("EulerDiscreteScheduler"));
        assert_eq!(nearest("Euler", names), Some("EulerDiscreteScheduler"));
        assert_eq!(nearest("widht", names), Some("width"));
        assert_eq!(nearest("prompt", names), None);
        assert_eq!(nearest("w", names), None);
    }
}
