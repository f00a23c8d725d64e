use super::*;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, &SpecialTokens::default()).expect("it compiles")
}

fn render(source: &str) -> Result<String, TextError> {
    let messages = [Message::system("Be brief."), Message::user("Hi"), Message::assistant("Ho")];
    template(source).render(&messages, true)
}

#[test]
fn generation_blocks_change_nothing() {
    let source = "{%- for m in messages -%}{% generation %}{{ m.content }}{%- endgeneration -%}{%- endfor %} {% raw %}x";
    let plain = plain_generation_blocks(source);
    let want = "{%- for m in messages -%}{% if true %}{{ m.content }}{%- endif -%}{%- endfor %} {% raw %}x";
    assert_eq!(plain, want);
    assert_eq!(plain_generation_blocks("a {% unfinished"), "a {% unfinished");
    assert_eq!(plain_generation_blocks("{% set generation = 1 %}"), "{% set generation = 1 %}");
}
