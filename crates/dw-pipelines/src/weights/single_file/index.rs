//! Names and shapes of the tensors in a checkpoint, and views on those of one component.

use std::collections::BTreeMap;

/// The shape of every tensor of a file, by name.
pub(crate) type Shapes = BTreeMap<String, Vec<usize>>;

/// The tensors whose names start with a prefix, seen without it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensors<'a> {
    shapes: &'a Shapes,
    prefix: &'a str,
}

impl<'a> Tensors<'a> {
    /// Those of `shapes` below `prefix` (which ends with a dot, or is empty).
    pub(crate) fn below(shapes: &'a Shapes, prefix: &'a str) -> Self {
        Self { shapes, prefix }
    }

    /// Whether there is a tensor `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.shape(name).is_some()
    }

    /// The shape of the tensor `name`.
    pub(crate) fn shape(&self, name: &str) -> Option<&'a [usize]> {
        self.shapes.get(&format!("{}{name}", self.prefix)).map(Vec::as_slice)
    }

    /// How many entries the numbered list `list` has: one more than the last that something belongs to, so that a file
    /// which lacks a tensor is not taken for one of a smaller model.
    pub(crate) fn entries(&self, list: &str) -> usize {
        let number = |name: &str| name.strip_prefix(list)?.strip_prefix('.')?.split('.').next()?.parse::<usize>().ok();
        // A name cannot make a list longer than the file.
        let numbers = self.names().filter_map(|(_, name)| number(name)).filter(|number| *number < self.shapes.len());
        numbers.max().map_or(0, |last| last + 1)
    }

    /// Every name in the file, with the name below the prefix.
    pub(crate) fn names(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let prefix = self.prefix;
        let range = self.shapes.range(prefix.to_owned()..);
        range.map_while(move |(name, _)| Some((name.as_str(), name.strip_prefix(prefix)?)))
    }
}

/// How many numbers from 0 on are there without a gap.
pub(crate) fn count(is_there: impl Fn(usize) -> bool) -> usize {
    let mut count = 0;
    while is_there(count) {
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_below_the_prefix_are_seen() {
        let shapes: Shapes = ["a.x", "a.y", "ab.z", "b"].map(|name| (name.to_owned(), vec![1])).into();
        let tensors = Tensors::below(&shapes, "a.");
        assert_eq!(tensors.names().collect::<Vec<_>>(), [("a.x", "x"), ("a.y", "y")]);
        assert!(tensors.has("x") && !tensors.has("z") && !tensors.has("a.x"));
        assert_eq!(Tensors::below(&shapes, "").names().count(), 4);
    }

    #[test]
    fn a_list_is_as_long_as_its_last_entry_says() {
        let names = ["m.b.0.x", "m.b.2.y", "m.b.z", "m.bb.7.x", "b.3.x", "m.b.99999.x"];
        let shapes: Shapes = names.map(|name| (name.to_owned(), vec![1])).into();
        assert_eq!(Tensors::below(&shapes, "m.").entries("b"), 3);
        assert_eq!(Tensors::below(&shapes, "m.").entries("c"), 0);
    }
}
