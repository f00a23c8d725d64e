//! Reading Rust source just well enough: blanking comments and literals, finding functions.

/// `text` with comments and the insides of string and character literals replaced by spaces.
/// Lines stay lines.
pub fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while let Some(&c) = chars.get(at) {
        let end = literal_or_comment(&chars, at);
        if end > at {
            out.extend(chars[at..end].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            at = end;
        } else {
            out.push(c);
            at += 1;
        }
    }
    out
}

/// Where the comment or literal that starts at `at` ends; `at` when none starts there.
fn literal_or_comment(chars: &[char], at: usize) -> usize {
    let next = chars.get(at + 1).copied();
    match chars[at] {
        '/' if next == Some('/') => find(chars, at, |c| c == '\n'),
        '/' if next == Some('*') => block_comment(chars, at),
        '"' => string(chars, at + 1),
        '\'' => character(chars, at),
        'r' if !is_word(before(chars, at))
            || before(chars, at) == Some('b')
            || before(chars, at) == Some('c') =>
        {
            raw_string(chars, at)
        }
        _ => at,
    }
}

fn before(chars: &[char], at: usize) -> Option<char> {
    at.checked_sub(1).and_then(|before| chars.get(before)).copied()
}

fn is_word(c: Option<char>) -> bool {
    c.is_some_and(|c| c.is_alphanumeric() || c == '_')
}

fn find(chars: &[char], from: usize, wanted: impl Fn(char) -> bool) -> usize {
    (from..chars.len()).find(|&i| wanted(chars[i])).unwrap_or(chars.len())
}

fn block_comment(chars: &[char], at: usize) -> usize {
    let (mut depth, mut i) = (0usize, at);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) if depth == 1 => return i + 2,
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
    }
    chars.len()
}

/// The end of a string whose inside starts at `i`.
fn string(chars: &[char], mut i: usize) -> usize {
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 2,
            '"' => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

/// The end of `r"..."`, `r#"..."#` and so on; `at` when it is only the letter r.
fn raw_string(chars: &[char], at: usize) -> usize {
    let quote = find(chars, at + 1, |c| c != '#');
    if chars.get(quote) != Some(&'"') {
        return at;
    }
    let hashes = quote - at - 1;
    let closes = |i: usize| {
        chars[i] == '"' && chars.iter().skip(i + 1).take(hashes).filter(|c| **c == '#').count() == hashes
    };
    (quote + 1..chars.len()).find(|&i| closes(i)).map_or(chars.len(), |i| i + 1 + hashes)
}

/// The end of a character literal; `at` when it is a lifetime.
fn character(chars: &[char], at: usize) -> usize {
    match (chars.get(at + 1), chars.get(at + 2)) {
        (Some('\\'), _) => (find(chars, at + 3, |c| c == '\'') + 1).min(chars.len()),
        (Some(_), Some('\'')) => at + 3,
        _ => at,
    }
}

/// Identifiers and keywords of a line.
pub fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

/// One function with a body.
#[derive(Debug, PartialEq)]
pub struct Function {
    pub name: String,
    /// Of the `fn` word, from 1.
    pub line: usize,
    /// From the `fn` word to the closing brace, both included.
    pub lines: usize,
}

/// Every function of `code`, which is already free of comments and literals. Inner functions
/// count for themselves and for the one around them.
pub fn functions(code: &str) -> Vec<Function> {
    let chars: Vec<char> = code.chars().collect();
    let mut found = Vec::new();
    let mut line = 1;
    for (at, &c) in chars.iter().enumerate() {
        if c == '\n' {
            line += 1;
        }
        let starts = c == 'f' && chars.get(at + 1) == Some(&'n') && !is_word(before(&chars, at));
        if !starts || !chars.get(at + 2).is_some_and(|c| c.is_whitespace()) {
            continue; // another word, or a function pointer type
        }
        let name_at = find(&chars, at + 2, |c| !c.is_whitespace());
        let name: String = chars[name_at..].iter().take_while(|&&c| is_word(Some(c))).collect();
        if name.is_empty() {
            continue;
        }
        if let Some(end) = body_end(&chars, name_at) {
            let lines = 1 + chars[at..end].iter().filter(|&&c| c == '\n').count();
            found.push(Function { name, line, lines });
        }
    }
    found
}

/// The closing brace of the body of the function whose signature goes on at `at`; `None` for a
/// declaration without one.
fn body_end(chars: &[char], at: usize) -> Option<usize> {
    let (mut brackets, mut braces) = (0usize, 0usize);
    for (i, &c) in chars.iter().enumerate().skip(at) {
        match c {
            '(' | '[' => brackets += 1,
            ')' | ']' => brackets = brackets.saturating_sub(1),
            ';' if brackets == 0 && braces == 0 => return None,
            '{' => braces += 1,
            '}' => {
                braces = braces.saturating_sub(1);
                // Braces inside brackets of a signature are const expressions.
                if braces == 0 && brackets == 0 {
                    return Some(i);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked() {
        let text =
            "a // x {\nb /* { /* } */ { */ c \"}\\\"{\" r#\"\"{\"# b\"{\" '{' '\\'' '\\u{1}' &'a str d\n";
        let code = code_only(text);
        assert_eq!(words(&code).collect::<Vec<_>>(), ["a", "b", "c", "b", "a", "str", "d"]);
        assert!(!code.contains(['{', '}', '"']));
        assert_eq!(code.lines().count(), text.lines().count());
        assert_eq!(code.chars().count(), text.chars().count());
    }

    #[test]
    fn lifetimes_and_raw_identifiers_stay() {
        let code = code_only("fn f<'a>(x: &'a str, r#type: u8) -> &'static str { for r in 0..1 {} }");
        assert!(code.contains("'a>") && code.contains("'static") && code.contains("r#type"));
    }

    #[test]
    fn functions_are_measured() {
        let code = "fn one() {}\n\npub fn two<const N: usize>(\n    x: [u8; { 3 }],\n) where\n    X: Y,\n{\n    if x {\n    }\n}\n\
                    trait T { fn three(&self); fn four(&self) {\n } }\ntype F = fn(u8) -> u8;\n";
        let found = functions(code);
        let found: Vec<_> = found.iter().map(|f| (f.name.as_str(), f.line, f.lines)).collect();
        assert_eq!(found, [("one", 1, 1), ("two", 3, 8), ("four", 11, 2)]);
    }

    #[test]
    fn an_inner_function_counts_twice() {
        let found = functions("fn outer() {\n fn inner() {\n }\n}\n");
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].lines, found[1].lines), (4, 2));
    }

    #[test]
    fn unfinished_source_is_no_panic() {
        for text in ["\"", "'", "'\\", "r#\"", "/*", "fn", "fn f(", "fn f() {", "b'", "r"] {
            functions(&code_only(text));
        }
    }
}
