//! Templates that try to run for ever, fill memory or overflow the stack end in an error, soon, and the process lives.

use std::time::{Duration, Instant};

use swarm_text::{ChatTemplate, Message, SpecialTokens, TextError};

/// Compiles and renders; gives the error and how long it took.
fn defuse(label: &str, source: &str) -> TextError {
    let started = Instant::now();
    let chat = [Message::system("s"), Message::user("Hi"), Message::assistant("Ho")];
    let outcome = ChatTemplate::new(source, &SpecialTokens::default())
        .and_then(|template| template.render(&chat, true))
        .map(|prompt| prompt.len());
    let took = started.elapsed();
    eprintln!("{label}: {took:?} {outcome:?}");
    assert!(took < Duration::from_secs(2), "{label} took {took:?}");
    outcome.expect_err(label)
}

fn grow(step: &str) -> String {
    format!(
        "{{% set ns = namespace(x='aaaaaaaa', l=[1, 2]) %}}{{% for i in range(1000) %}}{step}{{% endfor %}}{{{{ ns.x }}}}"
    )
}

#[test]
fn work_without_end() {
    let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}";
    for (label, source) in [
        ("nested loops", nested),
        ("huge range", "{% for i in range(1000000000000) %}x{% endfor %}"),
        (
            "sum of a range",
            "{{ range(100000)|sum }}{% for i in range(90000) %}{{ range(90000)|list|length }}{% endfor %}",
        ),
        (
            "comparisons",
            "{% for i in range(90000) %}{{ range(90000)|list == range(90000)|list }}{% endfor %}",
        ),
        ("search", "{% for i in range(90000) %}{{ 'b' in 'a' * 1000000 }}{% endfor %}"),
        (
            "methods",
            "{% set s = 'a' * 1000000 %}{% for i in range(90000) %}{{ s.upper().lower().strip('b').count('aa') }}{% endfor %}",
        ),
        ("sorting", "{% for i in range(90000) %}{{ range(90000)|sort|first }}{% endfor %}"),
        ("power", "{{ 2 ** 3 ** 4 ** 5 ** 6 }}"),
    ] {
        let error = defuse(label, source);
        assert!(
            !matches!(error, TextError::TimedOut { .. } | TextError::Panicked { .. }),
            "{label}: {error}"
        );
    }
}

#[test]
fn memory_without_end() {
    for (label, source) in [
        ("repeat", "{{ 'a' * 10000000000 }}".to_owned()),
        ("concat", grow("{% set ns.x = ns.x ~ ns.x %}")),
        ("add", grow("{% set ns.x = ns.x + ns.x %}")),
        ("block", grow("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}")),
        ("macro", grow("{% macro m() %}{{ ns.x }}{{ ns.x }}{% endmacro %}{% set ns.x = m() %}")),
        ("lists", grow("{% set ns.l = ns.l + ns.l %}{% set ns.x = ns.l|string %}")),
        ("replace", grow("{% set ns.x = ns.x.replace('a', ns.x) %}")),
        ("replace with nothing", grow("{% set ns.x = ns.x.replace('', ns.x) %}")),
        ("replace filter", grow("{% set ns.x = ns.x|replace('a', ns.x) %}")),
        ("join", grow("{% set ns.x = ns.x.join([ns.x, ns.x, ns.x]) %}")),
        ("join of a lazy list", "{{ ''.join(['aaaaaaaaaaaaaaaa'] * 99999999) }}".to_owned()),
        ("join filter", "{{ (['aaaaaaaaaaaaaaaa'] * 99999999)|join }}".to_owned()),
        (
            "split",
            "{% set s = ',' * 9000000 %}{% for i in range(1000) %}{{ s.split(',')|length }}{% endfor %}"
                .to_owned(),
        ),
        ("tojson", "{{ ([['aaaaaaaaaaaaaaaa'] * 9999] * 99999)|tojson|length }}".to_owned()),
        ("tojson indent", "{{ [[1]]|tojson(indent=1000000000) }}".to_owned()),
        (
            "tojson sorted",
            "{{ ([['aaaaaaaaaaaaaaaa'] * 9999] * 99999)|tojson(sort_keys=true)|length }}".to_owned(),
        ),
        (
            "tojson separators",
            "{{ ([1] * 99999999)|tojson(separators=['a' * 1000000, ':'])|length }}".to_owned(),
        ),
        ("printf width", "{{ '%1000000000d'|format(1)|length }}".to_owned()),
        ("format width", "{{ '{:1000000000}'.format(1)|length }}".to_owned()),
        ("indent", "{{ ('a\n' * 1000)|indent(1000000000)|length }}".to_owned()),
        ("output", "{% for i in range(9999) %}{{ 'a' * 100000 }}{% endfor %}".to_owned()),
        ("lazy output", "{{ ['aaaaaaaaaaaaaaaa'] * 99999999 }}".to_owned()),
        ("batch", "{{ range(9)|batch(1000000000, 'x')|list|length }}".to_owned()),
        ("slice", "{{ range(9)|slice(1000000000, 'x')|list|length }}".to_owned()),
        ("title", grow("{% set ns.x = (ns.x ~ ns.x).title() %}")),
        ("upper", grow("{% set ns.x = (ns.x ~ ns.x).upper().lower().capitalize() %}")),
    ] {
        let error = defuse(label, &source);
        assert!(
            !matches!(error, TextError::TimedOut { .. } | TextError::Panicked { .. }),
            "{label}: {error}"
        );
    }
}

/// Lists that contain one list twice, a thousand times over: small in memory, endless as text.
#[test]
fn text_without_end() {
    let shared = |print: &str| grow("{% set ns.l = [ns.l, ns.l] %}").replace("{{ ns.x }}", print);
    for (label, print) in [
        ("printed", "{{ ns.l }}"),
        ("concatenated", "{{ ns.l ~ '' }}"),
        ("concatenated right", "{{ '' ~ ns.l }}"),
        ("in a product", "{{ ns.l * 1 ~ '' }}"),
        ("in a product, right", "{{ '' ~ 1 * ns.l }}"),
        ("in parentheses", "{{ '' ~ (1 * ns.l) }}"),
        ("in a condition", "{{ '' ~ (ns.l if true else 1) }}"),
        ("in a key", "{{ {'' ~ ns.l: 1}|length }}"),
        ("as an argument", "{{ range('' ~ ns.l)|length }}"),
        ("as string", "{{ ns.l|string|length }}"),
        ("joined", "{{ ns.l|join|length }}"),
        ("joined by a method", "{{ ''.join(ns.l)|length }}"),
        ("upper", "{{ ns.l|upper|length }}"),
        ("trimmed", "{{ 'a'|trim(ns.l)|length }}"),
        ("split", "{{ 'a'|split(ns.l)|length }}{{ 1 // 0 }}"),
        ("formatted", "{{ '%s'|format(ns.l)|length }}"),
        ("formatted by name", "{{ '%(a)s'|format(a=ns.l)|length }}"),
        ("filter block", "{% filter upper %}{{ ns.l }}{% endfilter %}"),
        ("mapped", "{{ [ns.l]|map('string')|list|length }}"),
        ("mapped to upper", "{{ [ns.l]|map('upper')|list|length }}"),
        ("tested", "{{ [ns.l]|select('startingwith', ns.l)|list|length }}"),
        ("raised", "{{ raise_exception(ns.l) }}"),
        ("as JSON", "{{ ns.l|tojson|length }}"),
        ("in a set block", "{% set y %}{{ ns.l }}{% endset %}"),
        ("in a macro", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(ns.l)|length }}"),
        ("escaped", "{% autoescape 'json' %}{{ ns.l }}{% endautoescape %}"),
        ("escaped and safe", "{% autoescape true %}{{ ('<'|safe) ~ ns.l }}{% endautoescape %}"),
        ("sliced", "{{ ns.l[0:1] ~ '' }}"),
        ("compared", "{{ ns.l == ns.l }}{{ 1 // 0 }}"),
        ("sorted", "{{ [ns.l, ns.l]|sort|length }}{{ 1 // 0 }}"),
        ("unique", "{{ [ns.l, ns.l]|unique|list|length }}{{ 1 // 0 }}"),
        ("included", "{% include ns.l %}"),
        ("as an index", "{{ messages[ns.l] }}{{ 1 // 0 }}"),
        ("in an error", "{{ ns.l + 1 }}"),
        ("as a method's argument", "{{ 'a'.replace(ns.l, 'b') }}"),
        ("as a time format", "{{ strftime_now(ns.l) }}"),
        ("as a number", "{{ ns.l|int }}{{ 1 // 0 }}"),
        ("as a default", "{{ (missing|default(ns.l)) ~ '' }}"),
        ("as an attribute", "{{ messages|map(attribute=ns.l)|list }}{{ 1 // 0 }}"),
        ("as a name", "{{ messages|groupby(ns.l)|list }}{{ 1 // 0 }}"),
        ("as a separator", "{{ [1, 2]|join(ns.l) }}{{ 1 // 0 }}"),
        ("as an indent", "{{ [1]|tojson(indent=ns.l) }}{{ 1 // 0 }}"),
        ("as separators", "{{ [1]|tojson(separators=[ns.l, ns.l]) }}{{ 1 // 0 }}"),
    ] {
        let error = defuse(label, &shared(print));
        assert!(!matches!(error, TextError::Panicked { .. }), "{label}: {error}");
    }
    defuse("maps", &grow("{% set ns.l = {'a': ns.l, 'b': ns.l} %}").replace("ns.x }}", "ns.l ~ '' }}"));
    let peak = peak_resident_bytes();
    assert!(peak.is_none_or(|bytes| bytes < 400 << 20), "{peak:?} bytes were resident at the peak");
}

/// The most memory this process ever had, where the system tells (Linux).
fn peak_resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

#[test]
fn stack_without_end() {
    let deep = |build: &str, then: &str| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for a in range(99999) %}}{{% for b in range(99999) %}}{build}{{% endfor %}}{{% endfor %}}{then}"
        )
    };
    let finite = |build: &str, then: &str| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for a in range(99999) %}}{build}{{% endfor %}}{then}{{{{ raise_exception('built') }}}}"
        )
    };
    for (label, source) in [
        ("macro", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_owned()),
        ("caller", "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{% call m() %}{% endcall %}".to_owned()),
        ("recursive loop", "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".to_owned()),
        ("include", "{% include 'chat' %}".to_owned()),
        ("import", "{% import 'chat' as c %}{{ c }}".to_owned()),
        ("extends", "{% extends 'chat' %}".to_owned()),
        ("parentheses", format!("{{{{ {}1{} }}}}", "(".repeat(30_000), ")".repeat(30_000))),
        ("brackets", format!("{{{{ {}1{} }}}}", "[".repeat(30_000), "]".repeat(30_000))),
        ("not", format!("{{{{ {}1 // 0 }}}}", "not ".repeat(16_000))),
        ("minus", format!("{{{{ {}1 // 0 }}}}", "-".repeat(65_000))),
        ("filters", format!("{{{{ 1{} // 0 }}}}", "|abs".repeat(16_000))),
        ("attributes", format!("{{{{ messages{} }}}}", ".a".repeat(32_000))),
        ("additions", format!("{{{{ 'a'{} }}}}", "+1".repeat(32_000))),
        ("ifs", "{%if 1%}".repeat(8_000)),
        ("elifs", format!("{{% if false %}}{}{{% endif %}}{{{{ 1//0 }}}}", "{%elif 0%}".repeat(6_500))),
        ("ternaries", format!("{{{{ {}1 // 0 }}}}", "1 if 0 else ".repeat(5_400))),
        ("concatenations", format!("{{{{ 1{} // 0 }}}}", "~1".repeat(32_000))),
        ("comparisons", format!("{{{{ 1{} }}}}{{{{ 1 // 0 }}}}", "<1".repeat(32_000))),
        ("tests", format!("{{{{ 1{} // 0 }}}}", " is odd".repeat(9_000))),
        ("calls", format!("{{{{ x{} }}}}", "()".repeat(32_000))),
        ("for loops", "{%for a in b%}".repeat(4_600)),
        ("macros in macros", "{%macro a()%}".repeat(5_000)),
        ("slices of slices", finite("{% set ns.x = ns.x[0:] %}", "{{ ns.x|list }}")),
        ("nested lists", deep("{% set ns.x = [ns.x] %}", "")),
        ("nested lists printed", finite("{% set ns.x = [ns.x] %}", "{{ ns.x }}")),
        ("nested lists as JSON", finite("{% set ns.x = [ns.x] %}", "{{ ns.x|tojson }}")),
        ("nested lists compared", finite("{% set ns.x = [ns.x] %}{% set ns.y = [ns.y] %}", "{{ ns.x == ns.y }}")),
        ("nested maps", finite("{% set ns.x = {'a': ns.x} %}", "{{ ns.x }}")),
        ("nested sums", finite("{% set ns.x = ns.x + [1] %}", "{{ ns.x|length }}")),
        ("nested generators", finite("{% set ns.x = ns.x|map('upper') %}", "{{ ns.x|list }}")),
    ] {
        let error = defuse(label, &source);
        assert!(!matches!(error, TextError::Panicked { .. }), "{label}: {error}");
    }
}

#[test]
fn nothing_of_the_host_is_reachable() {
    for source in [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self.__init__() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ open('/etc/passwd') }}",
        "{{ messages.__reduce__() }}",
        "{{ __now() }}",
    ] {
        defuse(source, source);
    }
}
