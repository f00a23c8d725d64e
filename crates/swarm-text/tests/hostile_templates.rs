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
        ("shared lists", grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "ns.l }}")),
        (
            "shared lists concatenated",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "ns.l ~ '' }}"),
        ),
        (
            "shared lists concatenated right",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "'' ~ ns.l }}"),
        ),
        (
            "shared lists in products",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "ns.l * 1 ~ '' }}"),
        ),
        (
            "shared lists in products left",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "'' ~ 1 * ns.l }}"),
        ),
        (
            "shared lists as string",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "ns.l|string|length }}"),
        ),
        (
            "shared lists joined",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "ns.l|join|length }}"),
        ),
        (
            "shared lists upper",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "ns.l|upper|length }}"),
        ),
        (
            "shared lists trimmed",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "'a'|trim(ns.l)|length }}"),
        ),
        (
            "shared lists formatted",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "'%s'|format(ns.l)|length }}"),
        ),
        (
            "shared lists named",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "'%(a)s'|format(a=ns.l)|length }}"),
        ),
        (
            "shared lists raised",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "raise_exception(ns.l) }}"),
        ),
        (
            "shared lists as JSON",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("ns.x }}", "ns.l|tojson|length }}"),
        ),
        (
            "shared lists in a set block",
            grow("{% set ns.l = [ns.l, ns.l] %}").replace("{{ ns.x }}", "{% set y %}{{ ns.l }}{% endset %}"),
        ),
        ("shared maps", grow("{% set ns.l = {'a': ns.l, 'b': ns.l} %}").replace("ns.x }}", "ns.l ~ '' }}")),
        (
            "shared lists escaped",
            grow("{% set ns.l = [ns.l, ns.l] %}")
                .replace("{{ ns.x }}", "{% autoescape 'json' %}{{ ns.l }}{% endautoescape %}"),
        ),
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
