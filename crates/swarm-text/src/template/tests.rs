use super::*;

#[test]
fn generation_blocks_change_nothing() {
    let source = "{%- for m in messages -%}{% generation %}{{ m.content }}{%- endgeneration -%}{%- endfor %} {% raw %}x";
    let plain = plain_generation_blocks(source);
    let want = "{%- for m in messages -%}{% if true %}{{ m.content }}{%- endif -%}{%- endfor %} {% raw %}x";
    assert_eq!(plain, want);
    assert_eq!(plain_generation_blocks("a {% unfinished"), "a {% unfinished");
    assert_eq!(plain_generation_blocks("{% set generation = 1 %}"), "{% set generation = 1 %}");
}

#[test]
fn long_chats_have_fuel_enough() {
    // Qwen 3's format is the one that works hardest for each message.
    let source = include_str!("../../tests/fixtures/templates/qwen3.jinja");
    let template = ChatTemplate::new(source, &SpecialTokens::default()).expect("it compiles");
    let turn = |i: usize| {
        Message::new(if i.is_multiple_of(2) { "user" } else { "assistant" }, "<think>\nhm\n</think>\n\nyes")
    };
    let many: Vec<Message> = (0..2000).map(turn).collect();
    assert!(template.render(&many, true).expect("it renders").len() > 50_000);
    let long = [Message::user("a b\n".repeat(TEXT_BYTES_MAX / 5))];
    assert!(template.render(&long, true).expect("it renders").len() > TEXT_BYTES_MAX / 2);
    let longer = [Message::user("a".repeat(TEXT_BYTES_MAX + 1))];
    assert!(matches!(template.render(&longer, true), Err(TextError::TextTooLong { .. })));
}

#[test]
fn the_time_is_the_given_one_and_cannot_be_replaced() {
    let template =
        ChatTemplate::new("{{ strftime_now('%Y') }}", &SpecialTokens::default()).expect("it compiles");
    let mut options = RenderOptions { now: std::time::UNIX_EPOCH, ..RenderOptions::default() };
    options.variables.insert(NOW.to_owned(), serde_json::json!("forged"));
    assert_eq!(template.render_with(&[], &options).expect("it renders"), "1970");
    let wrong =
        ChatTemplate::new("{{ strftime_now('%Q') }}", &SpecialTokens::default()).expect("it compiles");
    assert!(wrong.render(&[], true).is_err());
}
