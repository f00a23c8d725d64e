//! Models over several files: `name-00001-of-00003.gguf` and so on.

/// Files of one model at most.
const PARTS_MAX: u32 = 999;
const DIGITS: usize = 5;
const END: &str = ".gguf";

/// One file of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Split<'a> {
    /// What comes before the number.
    pub stem: &'a str,
    /// From 1 on.
    pub number: u32,
    pub count: u32,
}

impl<'a> Split<'a> {
    /// Reads a file name or path; nothing when it is a file of its own.
    pub fn of(name: &'a str) -> Option<Self> {
        let rest = name.strip_suffix(END)?;
        let (rest, count) = number_at_end(rest)?;
        let (stem, number) = number_at_end(rest.strip_suffix("-of-")?)?;
        let stem = stem.strip_suffix('-')?;
        ((1..=count).contains(&number) && count <= PARTS_MAX).then_some(Self { stem, number, count })
    }

    /// The names of all files, in order.
    pub fn names(self) -> impl Iterator<Item = String> + 'a {
        (1..=self.count).map(move |number| format!("{}-{number:05}-of-{:05}{END}", self.stem, self.count))
    }
}

fn number_at_end(text: &str) -> Option<(&str, u32)> {
    let (rest, digits) = text.split_at_checked(text.len().checked_sub(DIGITS)?)?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| Some((rest, digits.parse().ok()?)))?
}

/// The files of a model, by any one of them.
pub(crate) fn parts(name: &str) -> Vec<String> {
    match Split::of(name) {
        Some(split) => split.names().collect(),
        None => vec![name.to_owned()],
    }
}

/// What the model of a file is called: the name without number and end.
pub(crate) fn stem(name: &str) -> &str {
    match Split::of(name) {
        Some(split) => split.stem,
        None => name.rsplit_once('.').map_or(name, |(stem, _)| stem),
    }
}

/// Whether a name stands for a model in a list: all but the later files of several.
pub(crate) fn leads(name: &str) -> bool {
    Split::of(name).is_none_or(|split| split.number == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_one_model_are_known_by_their_numbers() {
        let split = Split::of("a/b-Q4_K_M-00002-of-00003.gguf").unwrap();
        assert_eq!(split, Split { stem: "a/b-Q4_K_M", number: 2, count: 3 });
        assert_eq!(split.names().last().unwrap(), "a/b-Q4_K_M-00003-of-00003.gguf");
        for name in [
            "x.gguf",
            "x-00001-of-00000.gguf",
            "x-00004-of-00003.gguf",
            "x-0001-of-0003.gguf",
            "x-00001-of-99999.gguf",
            "00001-of-00003.gguf",
            "x-00001-of-00003.bin",
            "\u{e9}\u{e9}\u{e9}.gguf",
        ] {
            assert_eq!(Split::of(name), None, "{name}");
            assert_eq!(parts(name), [name]);
        }
        assert_eq!((stem("x.Q8_0.gguf"), stem("x-00001-of-00002.gguf")), ("x.Q8_0", "x"));
        assert!(leads("x.gguf") && leads("x-00001-of-00002.gguf") && !leads("x-00002-of-00002.gguf"));
    }
}
